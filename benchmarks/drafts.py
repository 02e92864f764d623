"""Drafts on a real model: prompt lookup and an assistant, beside the library's own on the source.

A causal language model and the TarFlowLM that it is converted to continue the same prompts, with
drafts and without, taking turns in one run. The library's assisted generation on the source is
measured in the same rounds.

    python benchmarks/drafts.py FOLDER --gguf_file F.gguf      # SmolLM2-135M: needs the package gguf
    python benchmarks/drafts.py FOLDER_OR_ID --assistant bfloat16 --drafts assistant   # by the source itself, rounded

`speedup` is the time of a token without drafts over that with them, the median of the rounds'
ratios; `cpu_speedup` is the same of the process's own time, which other work on the machine disturbs
less. `per_forward` is the number of new tokens over the model's passes. `changed`
counts tokens that differ from those without drafts: 0 for a TarFlowLM, but for ties to within
rounding; at temperatures above 0 the library's are other samples.

With an assistant a second table says how often its tokens are the model's, behind the same text: by
the same noise (`common`), and by noise of its own (`independent`). 1 - `distance`, the total variation
distance of the two distributions, is the most that any pair of samples can agree, and what rejection
sampling keeps. `copy` repeats its prompt, `rename` asks for an edit of code that SmolLM2 copies from,
`edit` for one at which it writes something else, `story` for neither.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Results, load_and_convert
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tarflow_hf import TarFlowLMModel
from tarflow_hf.modeling.coupling import mixture_rosenblatt_inverse

LIGHTHOUSE = (
    "The lighthouse at Cape Wrath was built in 1828 by Robert Stevenson. It was manned until 1998, when it was "
    "converted to automatic operation by the Northern Lighthouse Board. The tower is 20 metres high, and its lamp "
    "stands 122 metres above the sea."
)
CODE = """def totals(orders):
    result = {}
    for order in orders:
        name = order["name"]
        price = order["price"] * order["count"]
        result[name] = result.get(name, 0) + price
    return result
"""
STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            return None
        return self.items.pop()

    def size(self):
        return len(self.items)
"""

# Prompts, and whether the chat template goes around them.
PROMPTS = {
    "copy": (f"Repeat this text word for word:\n{LIGHTHOUSE}", True),
    "rename": (
        f"# Before:\n{STACK}\n\n# The same, where items is called elements:\nclass Stack:\n",
        False,
    ),
    "edit": (f"# Before:\n{CODE}\n\n# The same, with a docstring:\ndef totals(orders):\n", False),
    "story": ("Write a short story about a fisherman and his daughter.", True),
}


ROUNDED = ("int8", "bfloat16")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="an id of the Hub, or a folder")
    parser.add_argument("--gguf_file", help="the file of the source to read")
    parser.add_argument("--name", help="the source's name in the rows")
    parser.add_argument("--texts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--num_tokens", type=int, default=10, help="that are guessed at most")
    parser.add_argument(
        "--drafts", nargs="+", choices=["prompt lookup", "assistant"], default=["prompt lookup"]
    )
    parser.add_argument(
        "--assistant", choices=ROUNDED, default="int8", help="the source in this dtype"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")
    return parser.parse_args()


def in_8_bits(source: PreTrainedModel) -> PreTrainedModel:
    """The source with linear layers in integers, but for `down_proj`, whose inputs have outliers."""
    config = torch.ao.quantization.per_channel_dynamic_qconfig
    layers = {
        name: config
        for name, module in source.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("down_proj")
    }
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(source), layers, torch.qint8)


def in_bfloat16(source: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(source).bfloat16()


class Case:
    """A prompt, a temperature, and the ways to continue it.

    Each way returns the new tokens and the number of passes of the model.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        model: TarFlowLMModel,
        prompt: torch.Tensor,
        temperature: float,
        arguments: argparse.Namespace,
        assistant: PreTrainedModel | None,
    ):
        self.source, self.model, self.prompt = source, model, prompt
        self.temperature, self.new_tokens = temperature, arguments.new_tokens
        self.drafts = {"": {}}
        if "prompt lookup" in arguments.drafts:
            self.drafts["prompt lookup"] = {"prompt_lookup_num_tokens": arguments.num_tokens}
        if assistant is not None:
            self.drafts[arguments.assistant] = {"assistant_model": assistant}

        self.num_calls = 0
        source.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.num_calls += 1

    def flow(self, seed: int, **drafts) -> tuple[torch.Tensor, int]:
        steering = {"mixture_temperature": self.temperature} if self.temperature else {"top_k": 1}
        out = self.model.generate(
            self.prompt,
            max_new_tokens=self.new_tokens,
            generator=torch.Generator().manual_seed(seed),
            output_inverse_report=True,
            **steering,
            **drafts,
        )
        return out.sequences[0, self.prompt.shape[1] :], out.inverse_reports[0].iterations

    def library(self, seed: int, **drafts) -> tuple[torch.Tensor, int]:
        set_seed(seed)
        start = self.prompt.new_full((1, 1), self.model.config.start_token_id)
        prompt = torch.cat([start, self.prompt], 1)
        sampling = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}

        self.num_calls = 0
        tokens = self.source.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.new_tokens,
            **sampling,
            **drafts,
        )
        return tokens[0, prompt.shape[1] :], self.num_calls

    def ways(self) -> dict[tuple[str, str], Callable[[int], tuple[torch.Tensor, int]]]:
        generators = {"TarFlowLM": self.flow, "source": self.library}
        return {
            (name, drafts): lambda seed, run=run, options=options: run(seed, **options)
            for name, run in generators.items()
            for drafts, options in self.drafts.items()
        }


def measure(case: Case, rounds: int) -> list[dict]:
    """The rows of a case: each way with drafts, compared with the same way without."""
    wall: dict[tuple, list[float]] = {way: [] for way in case.ways()}
    cpu: dict[tuple, list[float]] = {way: [] for way in case.ways()}
    lengths: dict[tuple, list[int]] = {way: [] for way in case.ways()}
    passes: dict[tuple, list[int]] = {way: [] for way in case.ways()}
    changed: dict[tuple, int] = dict.fromkeys(case.ways(), 0)

    for seed in range(rounds):
        plain = {}
        for (name, drafts), run in case.ways().items():
            began, cpu_began = time.perf_counter(), time.process_time()
            tokens, num_passes = run(seed)
            wall[name, drafts].append((time.perf_counter() - began) / len(tokens))
            cpu[name, drafts].append((time.process_time() - cpu_began) / len(tokens))
            lengths[name, drafts].append(len(tokens))
            passes[name, drafts].append(num_passes)

            reference = plain.setdefault(name, tokens)
            size = min(len(tokens), len(reference))
            changed[name, drafts] += int((tokens[:size] != reference[:size]).sum())
            changed[name, drafts] += abs(len(tokens) - len(reference))

    return [
        {
            "model": name,
            "drafts": drafts,
            "new_tokens": sum(lengths[name, drafts]),
            "per_forward": sum(lengths[name, drafts]) / sum(passes[name, drafts]),
            "ms_per_token": 1000 * statistics.median(wall[name, drafts]),
            "plain_ms": 1000 * statistics.median(wall[name, ""]),
            "speedup": _ratio(wall[name, ""], wall[name, drafts]),
            "cpu_speedup": _ratio(cpu[name, ""], cpu[name, drafts]),
            "changed": changed[name, drafts],
        }
        for name, drafts in case.ways()
        if drafts
    ]


@torch.no_grad()
def agreement(case: Case, assistant: PreTrainedModel) -> dict:
    """The share of the assistant's tokens that are the model's, behind the same text."""
    temperature = case.temperature
    out = case.model.generate(
        case.prompt,
        max_new_tokens=case.new_tokens,
        generator=torch.Generator().manual_seed(0),
        mixture_temperature=temperature,
        return_dict_in_generate=True,
    )
    start = case.prompt.new_full((1, 1), case.model.config.start_token_id)
    ids = torch.cat([start, out.sequences], 1)
    first = case.prompt.shape[1]
    written, noise = out.sequences[0, first:], out.noise[0, first : out.sequences.shape[1]]

    logits, others = (
        model(input_ids=ids, use_cache=False).logits[0, first:-1].float() / temperature
        for model in (case.source, assistant)
    )
    codebook = case.model.codebook()
    latents = mixture_rosenblatt_inverse(noise, others, *codebook)
    same = codebook.most_likely_token(latents) == written
    p, q = logits.softmax(-1), others.softmax(-1)
    return {
        "tokens": len(written),
        "distance": 0.5 * (p - q).abs().sum(-1).mean().item(),
        "common": same.float().mean().item(),
        "independent": (p * q).sum(-1).mean().item(),
    }


def _ratio(plain: list[float], drafted: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(plain, drafted, strict=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, is_chat: bool) -> torch.Tensor:
    """The ids (1, n) of a prompt, without the start token, which the flow reads by itself."""
    if is_chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )

    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def main():
    arguments = parse_arguments()
    table = Results("cpu", arguments.output)
    source, model, tokenizer = load_and_convert(arguments.source, arguments.gguf_file)
    assistant = None
    if "assistant" in arguments.drafts:
        assistant = (in_8_bits if arguments.assistant == "int8" else in_bfloat16)(source)

    cases = {
        (name, temperature): Case(
            source, model, encode(tokenizer, *PROMPTS[name]), temperature, arguments, assistant
        )
        for name in arguments.texts
        for temperature in arguments.temperatures
    }
    facts = {"source": arguments.name or arguments.source}
    widths = {"text": 5, "temperature": 11}

    if assistant is not None:
        facts["assistant"] = arguments.assistant
        table.title(**widths, assistant=9, tokens=6, distance=8, common=6, independent=11)
        for (name, temperature), case in cases.items():
            if temperature > 0:
                row = agreement(case, assistant)
                table.row(**facts, text=name, temperature=temperature, **row)

    columns = {"model": 9, "drafts": 13, "new_tokens": 10, "per_forward": 11, "plain_ms": 8}
    table.title(**widths, **columns, speedup=7, cpu_speedup=11, changed=7)
    for (name, temperature), case in cases.items():
        for row in measure(case, arguments.rounds):
            table.row(**facts, text=name, temperature=temperature, **row)


if __name__ == "__main__":
    main()
