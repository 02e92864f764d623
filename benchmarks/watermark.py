"""Power of watermarks against the length of a text: noise from a key, beside the library's two on the source.

A causal language model and the TarFlowLM that it is converted to write texts behind the same
prompts, marked by `NoiseWatermark`, by the library's green lists (Kirchenbauer et al., ICML 2023,
arXiv:2301.10226) and by SynthID-Text (Dathathri et al., Nature 2024). All of them are detected in
the text alone, without its prompt, as it was written and after edits.

    python benchmarks/watermark.py FOLDER --gguf_file F.gguf          # SmolLM2-135M: needs the package gguf
    python benchmarks/watermark.py --checkpoint checkpoints/python-docs  # a TarFlowLM of its own, that has no source

`share 1e-3` and `share 1e-6` are the shares of texts with a smaller p-value, `median` is the median of
log10 p. Edits replace, delete or insert a share of the tokens, each with a token of another text. The
`detect` is told the temperature, and in the rows "untold" it is not. The
p-value of green lists is that of a binomial distribution of their number, and SynthID's of the same of
all its bits behind contexts that are new; the library's own Bayesian detector for it has to be
trained. `nats` is the negative log-likelihood of a token under the source at that temperature, with
its standard error over texts, and `cost` how many more nats a token takes than without the mark behind
the same text, the mean of sum_x (p(x) - q(x)) log p(x) over the positions of the marked texts. The noise
of a key has q = p over keys (tests/test_watermark.py), and no row for it.
"""

import argparse
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Results, load_and_convert
from scipy.stats import binom
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SynthIDTextWatermarkingConfig,
    WatermarkDetector,
    WatermarkingConfig,
    set_seed,
)

from tarflow_hf import TarFlowLMModel
from tarflow_hf.watermark import Evidence, NoiseWatermark, read_evidence

TOPICS = (
    "a fisherman and his daughter", "the history of bread", "how rain forms", "a lost letter", "why cats purr",
    "a journey by train", "the first winter on a farm", "how bridges carry weight", "an old clock", "learning to swim",
    "the smell of the sea", "a market in the morning", "how bees find their way", "a broken radio", "friendship",
    "a garden on a roof", "the invention of paper", "a night in the mountains", "how to make soup", "a blue bicycle",
)  # fmt: skip

EDITS = [("none", 0.0)] + [
    (e, r) for e in ("replaced", "deleted", "inserted") for r in (0.1, 0.2, 0.3)
]

NOISE, GREEN, SYNTHID = "NoiseWatermark", "WatermarkingConfig", "SynthID-Text"
UNTOLD = f"{NOISE}, untold"  # `detect` does not know the temperature
MARKS = (NOISE, GREEN, SYNTHID)
SYNTHID_KEYS = [
    654, 400, 836, 123, 340, 443, 597, 160, 57, 29, 590, 639, 13, 715, 468, 990, 966, 226, 324, 585,
]  # fmt: skip
CONFIGS = {
    GREEN: WatermarkingConfig(),
    SYNTHID: SynthIDTextWatermarkingConfig(ngram_len=5, keys=SYNTHID_KEYS),
}

# log10 p of the first tokens of a text, given the text, its row and the number of tokens.
Detector = Callable[[Tensor, int, int], float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="an id of the Hub, or a folder")
    parser.add_argument("--gguf_file", help="the file of the source to read")
    parser.add_argument("--checkpoint", help="a TarFlowLM instead")
    parser.add_argument("--name", help="the model's name in the rows")
    parser.add_argument("--marks", nargs="+", choices=MARKS, default=list(MARKS))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7])
    parser.add_argument("--num_texts", type=int, default=20)
    parser.add_argument("--lengths", type=int, nargs="+", default=[12, 25, 50, 100])
    parser.add_argument("--edited_length", type=int, default=100, help="of texts that are edited")
    parser.add_argument("--max_offset", type=int, default=64, help="of NoiseWatermark")
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")
    arguments = parser.parse_args()
    if (arguments.source is None) == (arguments.checkpoint is None):
        parser.error("Give a source, or --checkpoint.")

    return arguments


class Keys:
    """A key for each text of a batch, which asks for its noise row by row."""

    def __init__(self, num_texts: int, max_offset: int):
        self.marks = [NoiseWatermark(key, 1, max_offset) for key in range(num_texts)]
        self.row = 0

    def noise(self, first: int, last: int, latent_size: int, stream: int = 0) -> Tensor:
        """The numbers of the next row's key."""
        self.row += 1
        return self.marks[self.row - 1].noise(first, last, latent_size)

    def remember(self, model: TarFlowLMModel) -> None:
        """Nothing is to be compared: there is one model."""


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, start: int, num_texts: int
) -> tuple[Tensor, Tensor]:
    """Prompts (B, T), padded on the left behind a start token, and their mask."""
    rows = []
    for number in range(num_texts):
        text = f"Write about {TOPICS[number % len(TOPICS)]}."
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )

        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows.append([start, *ids])

    length = max(map(len, rows))
    prompts = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return prompts, mask


@torch.no_grad()
def write_with_library(
    source: PreTrainedModel, prompts: Tensor, mask: Tensor, length: int, temperature: float, config
) -> tuple[Tensor, Tensor]:
    """Tokens (B, n) that the source writes under a mark, and the cost (B,) in nats a token."""
    set_seed(0)
    out = source.generate(
        prompts,
        attention_mask=mask,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        eos_token_id=source.config.vocab_size,  # never
        pad_token_id=0,
        watermarking_config=config,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    cost = 0.0
    for logits, scores in zip(out.logits, out.scores, strict=True):
        log_p, q = (logits.float() / temperature).log_softmax(-1), scores.float().softmax(-1)
        cost = cost + ((log_p.exp() - q) * log_p).sum(-1) / length

    return out.sequences[:, prompts.shape[1] :], cost


def write_from_keys(
    model: TarFlowLMModel,
    prompts: Tensor | None,
    mask: Tensor | None,
    length: int,
    temperature: float,
    keys: Keys,
) -> Tensor:
    """Tokens (B, n) that follow from each row's key."""
    options = {"max_new_tokens": length, "watermark": keys, "eos_token_id": -1}
    if temperature != 1:
        options["mixture_temperature"] = temperature
    if prompts is None:
        return model.generate(num_return_sequences=len(keys.marks), **options)

    return model.generate(prompts, attention_mask=mask, **options)[:, prompts.shape[1] :]


@torch.no_grad()
def nats(
    source: PreTrainedModel, prompts: Tensor, mask: Tensor, tokens: Tensor, temperature: float
) -> Tensor:
    """The negative log-likelihood (B,) of a token under the source."""
    ids = torch.cat([prompts, tokens], 1)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    total = []
    for row in range(len(ids)):
        some = slice(row, row + 1)
        logits = source(
            ids[some],
            attention_mask=mask[some],
            position_ids=places[some],
            use_cache=False,
            logits_to_keep=tokens.shape[1] + 1,
        ).logits[:, :-1]
        log_prob = (logits.float() / temperature).log_softmax(-1)
        total.append(-log_prob.gather(-1, tokens[some, :, None]).mean((1, 2)))

    return torch.cat(total)


# --------------------------------------------------------------------------------------------------
# Editing and detecting
# --------------------------------------------------------------------------------------------------


def edited(
    tokens: Tensor, edit: str, rate: float, others: Tensor, generator: torch.Generator
) -> Tensor:
    """A text (n,), of which a share of the tokens is edited, with tokens of other texts."""
    is_edited = torch.rand(tokens.shape, generator=generator) < rate
    drawn = others[torch.randint(len(others), tokens.shape, generator=generator)]
    if edit == "deleted":
        return tokens[~is_edited]
    if edit == "replaced":
        return torch.where(is_edited, drawn, tokens)

    both = torch.stack([drawn, tokens], -1).flatten()
    return both[torch.stack([is_edited, torch.ones_like(is_edited)], -1).flatten()]


def by_noise(model: TarFlowLMModel, keys: Keys, temperature: float = 1.0) -> Detector:
    """The detector of a row's key."""
    told = {} if temperature == 1 else {"mixture_temperature": temperature}
    is_causal = len(model.config.flows) == 1 and model.config.patch_size == 1

    @lru_cache(maxsize=1)
    def evidence_of(text: Tensor) -> Evidence:
        return read_evidence(model, text[None], **told)

    def log10_p(text: Tensor, row: int, length: int) -> float:
        if is_causal:
            # A beginning has the evidence of the whole text there: that is read once.
            whole = evidence_of(text)
            mean, variance = whole.mean[:, :length], whole.variance[:, :length]
            evidence = whole._replace(mean=mean, variance=variance)
        else:
            evidence = evidence_of(text[:length])

        return keys.marks[row].test(evidence).log_p_value / math.log(10)

    return log10_p


def by_green_lists(source: PreTrainedModel, config: WatermarkingConfig) -> Detector:
    """The library's detector, by the number of green tokens."""
    detector = WatermarkDetector(source.config, "cpu", config, ignore_repeated_ngrams=True)

    def log10_p(text: Tensor, row: int, length: int) -> float:
        out = detector(text[None, :length], return_dict=True)
        number, total = int(out.num_green_tokens[0]), int(out.num_tokens_scored[0])
        tail = binom.logsf(number - 1, total, config.greenlist_ratio)
        return float(tail) / math.log(10)

    return log10_p


def by_synthid(source: PreTrainedModel, config: SynthIDTextWatermarkingConfig) -> Detector:
    """The number of ones among the library's g values, behind contexts that are new."""
    processor = config.construct_processor(source.config.vocab_size, "cpu")

    def log10_p(text: Tensor, row: int, length: int) -> float:
        is_new = processor.compute_context_repetition_mask(text[None, :length])[0].bool()
        bits = processor.compute_g_values(text[None, :length])[0][is_new]
        tail = binom.logsf(int(bits.sum()) - 1, bits.numel(), 0.5)
        return float(tail) / math.log(10)

    return log10_p


def power(tokens: Tensor, log10_p: Detector, lengths: list[int], edited_length: int) -> list[dict]:
    """The rows of texts (B, n) under each edit."""
    rows = []
    for edit, rate in EDITS:
        generator = torch.Generator().manual_seed(1)
        values = []
        for row, text in enumerate(tokens):
            cuts = lengths
            if rate > 0:
                others = torch.cat([tokens[:row], tokens[row + 1 :]]).flatten()
                text = edited(text[:edited_length], edit, rate, others, generator)
                cuts = [len(text)]

            values.append([log10_p(text, row, length) for length in cuts])

        for length, column in zip(
            lengths if rate == 0 else [edited_length], zip(*values, strict=True), strict=True
        ):
            log_p = torch.tensor(column)
            shares = {f"share 1e{n}": (log_p < n).float().mean().item() for n in (-3, -6)}
            facts = {"edit": edit, "rate": rate, "tokens": length, "texts": len(log_p)}
            rows.append({**facts, **shares, "median": log_p.median().item()})

    return rows


# --------------------------------------------------------------------------------------------------
# The two tables
# --------------------------------------------------------------------------------------------------


class Writers(NamedTuple):
    """The models that write, and prompts (B, T) with their mask; a TarFlowLM of its own has none."""

    model: TarFlowLMModel
    source: PreTrainedModel | None = None
    prompts: Tensor | None = None
    mask: Tensor | None = None


def write_and_cost(
    writers: Writers, keys: Keys, arguments: argparse.Namespace, table: Results
) -> dict[tuple[float, str], Tensor]:
    """The texts (B, n) by temperature and mark; the rows are what the source thinks of them."""
    model, source, prompts, mask_of_prompts = writers
    length = max(arguments.lengths)
    texts = {}
    table.title(temperature=11, mark=18, nats=6, error=6, cost=7)

    for temperature in arguments.temperatures:
        keys.row = 0
        ours = (None, None) if prompts is None else (prompts[:, 1:], mask_of_prompts[:, 1:])
        texts[temperature, NOISE] = write_from_keys(model, *ours, length, temperature, keys)
        if source is None:
            continue

        for mark in ("none", *arguments.marks):
            cost = None
            if mark != NOISE:
                texts[temperature, mark], cost = write_with_library(
                    source, prompts, mask_of_prompts, length, temperature, CONFIGS.get(mark)
                )

            each = nats(source, prompts, mask_of_prompts, texts[temperature, mark], temperature)
            table.row(
                **{"kind": "likelihood", "temperature": temperature, "mark": mark},
                texts=len(each),
                tokens=length,
                nats=each.mean().item(),
                error=(each.std() / len(each) ** 0.5).item(),
                cost=None if cost is None else cost.mean().item(),
            )

    return texts


def power_table(
    texts: dict[tuple[float, str], Tensor],
    writers: Writers,
    keys: Keys,
    arguments: argparse.Namespace,
    table: Results,
) -> None:
    """The power of each mark's detector on its own texts, as they were written and edited."""
    model, source = writers.model, writers.source
    widths = {"temperature": 11, "mark": 22, "edit": 8, "rate": 4, "tokens": 6}
    table.title(**widths, **{"share 1e-3": 10, "share 1e-6": 10, "median": 7})

    for temperature in arguments.temperatures:
        detectors = {NOISE: by_noise(model, keys, temperature)}
        if temperature != 1:
            detectors[UNTOLD] = by_noise(model, keys)
        if source is not None:
            detectors[GREEN] = by_green_lists(source, CONFIGS[GREEN])
            detectors[SYNTHID] = by_synthid(source, CONFIGS[SYNTHID])

        for mark, log10_p in detectors.items():
            written_by = NOISE if mark == UNTOLD else mark
            if written_by not in arguments.marks:
                continue

            tokens = texts[temperature, written_by]
            for row in power(tokens, log10_p, arguments.lengths, arguments.edited_length):
                table.row(kind="power", temperature=temperature, mark=mark, **row)


# --------------------------------------------------------------------------------------------------


def main():
    arguments = parse_arguments()
    table = Results("cpu", arguments.output)
    if arguments.checkpoint is None:
        source, model, tokenizer = load_and_convert(arguments.source, arguments.gguf_file)
        prompts = prompts_of(tokenizer, model.config.start_token_id, arguments.num_texts)
        writers = Writers(model, source, *prompts)
    else:
        writers = Writers(TarFlowLMModel.from_pretrained(arguments.checkpoint).eval())

    table.facts["model"] = arguments.name or Path(arguments.source or arguments.checkpoint).name
    keys = Keys(arguments.num_texts, arguments.max_offset)
    texts = write_and_cost(writers, keys, arguments, table)
    power_table(texts, writers, keys, arguments, table)


if __name__ == "__main__":
    main()
