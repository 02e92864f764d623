"""A real model and its source: scoring, generation and training of the same model, side by side.

A causal language model and the TarFlowLM of one Mix-d flow that it is converted to do the same
work, taking turns in one run.

    python benchmarks/real.py FOLDER --gguf_file F.gguf      # SmolLM2-135M: needs the package gguf
    python benchmarks/real.py FOLDER_OR_ID --what generation --batch_sizes 1 8
    python benchmarks/real.py --random --layers 4 --hidden_size 256 --vocab_size 8192

Times are in milliseconds, medians of the rounds; `ratio` is the model's time over the source's.
Sampling is at temperature 1 and of a fixed number of tokens, behind a prompt of 8. The training step
is forward and backward of all parameters. The memory is the largest resident size that scoring adds
in a process of its own, on Linux.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from measure import Results, median_times, output_of_own_process, peak_resident_memory
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed

from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import from_causal_lm, load_source
from tarflow_hf.modeling.coupling import mixture_rosenblatt_inverse

WHAT = ("scoring", "memory", "generation", "training", "inverse")
MODELS = ("source", "TarFlowLM")
Models = dict[str, PreTrainedModel]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="an id of the Hub, or a folder")
    parser.add_argument("--gguf_file", help="the file of the source to read")
    parser.add_argument("--name", help="the source's name in the rows")
    parser.add_argument("--random", action="store_true", help="a Llama of random weights instead")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--vocab_size", type=int, default=49_152)
    parser.add_argument("--latent_size", type=int, default=16)
    parser.add_argument("--log_scale", type=float, default=-3.5)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--num_tokens", type=int, default=1000, help="that are scored")
    parser.add_argument("--new_tokens", type=int, default=48, help="that are generated")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--train_shape", type=int, nargs=2, default=[4, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory_of", choices=MODELS, help="print the memory of scoring with one")
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")
    arguments = parser.parse_args()
    if (arguments.source is None) != arguments.random:
        parser.error("Give a source, or --random.")

    return arguments


def make_source(arguments: argparse.Namespace) -> PreTrainedModel:
    if not arguments.random:
        options = {"gguf_file": arguments.gguf_file, "dtype": torch.float32}
        source, _ = load_source(arguments.source, **options)
        return source.eval()

    set_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=8 * arguments.hidden_size // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64 or 1,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def convert(source: PreTrainedModel, arguments: argparse.Namespace) -> TarFlowLMModel:
    options = {"latent_size": arguments.latent_size, "log_scale": arguments.log_scale}
    return from_causal_lm(source, **options)


def random_ids(source: PreTrainedModel, *shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(3, source.config.vocab_size, shape, generator=random)


def score(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of ids (B, T), or its bound; the source's is of all but the first."""
    if isinstance(model, TarFlowLMModel):
        return -model(input_ids).elbo

    log_prob = model(input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return -log_prob.gather(-1, input_ids[:, 1:, None]).sum((1, 2))


def scoring(models: Models, arguments: argparse.Namespace) -> Iterator[dict]:
    """Time of scoring one text, in milliseconds."""
    input_ids = random_ids(models["source"], 1, arguments.num_tokens)
    modes = {name: partial(score, model, input_ids) for name, model in models.items()}
    with torch.no_grad():
        yield {"what": "scoring", "tokens": arguments.num_tokens, **timed(modes, arguments)}


def memory(models: Models, arguments: argparse.Namespace) -> Iterator[dict]:
    """Memory of scoring one text, in MiB."""
    command = __file__, *sys.argv[1:], "--memory_of"
    used = {name: output_of_own_process(*command, name)["bytes"] / 2**20 for name in MODELS}
    yield {"what": "memory of scoring, MiB", "tokens": arguments.num_tokens, **used}


def generation(models: Models, arguments: argparse.Namespace) -> Iterator[dict]:
    """Time of sampling, plain and steered, in milliseconds."""
    length = arguments.new_tokens
    whole = {"min_new_tokens": length, "do_sample": True, "pad_token_id": 0}
    steering = {"": {}, "top_k 50": {"top_k": 50}, "top_p 0.9": {"top_p": 0.9}}

    for batch, name in product(arguments.batch_sizes, steering):
        prompt = random_ids(models["source"], batch, 8)
        options = {"max_new_tokens": length, "attention_mask": torch.ones_like(prompt)}
        options |= steering[name]
        modes = {
            "source": partial(
                models["source"].generate, prompt, **{"top_k": 0, **whole, **options}
            ),
            "TarFlowLM": partial(
                models["TarFlowLM"].generate, prompt, eos_token_id=None, **options
            ),
        }
        what = f"generation {name}".strip()
        yield {"what": what, "batch": batch, "tokens": length, **timed(modes, arguments)}


def training(models: Models, arguments: argparse.Namespace) -> Iterator[dict]:
    """Time of a forward and a backward pass, in milliseconds."""
    batch, length = arguments.train_shape
    input_ids = random_ids(models["source"], batch, length)

    def step(model: PreTrainedModel) -> None:
        model(input_ids, labels=input_ids).loss.backward()
        model.zero_grad()

    modes = {name: partial(step, model) for name, model in models.items()}
    yield {"what": "training step", "batch": batch, "tokens": length, **timed(modes, arguments)}


def inverse(models: Models, arguments: argparse.Namespace) -> Iterator[dict]:
    """Time of the Mix-d inverse of one position with the source's logits, in milliseconds."""
    codebook = models["TarFlowLM"].codebook()
    with torch.no_grad():
        logits = models["source"](random_ids(models["source"], 1, 32)).logits[0].float()
        noise = torch.randn(len(logits), codebook.mean.shape[1])
        rows = list(zip(noise.split(1), logits.split(1), strict=True))

        def invert() -> None:
            for row in rows:
                mixture_rosenblatt_inverse(*row, *codebook)

        times = timed({"TarFlowLM": invert}, arguments)

    yield {"what": "inverse of one position", "TarFlowLM": times["TarFlowLM"] / len(rows)}


MEASURES = {
    measure.__name__: measure for measure in (scoring, memory, generation, training, inverse)
}


def timed(modes: dict[str, Callable], arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each mode, taking turns, after one run of each."""
    for run in modes.values():
        run()

    times = median_times(modes, arguments.rounds, "cpu")
    return {name: 1e3 * seconds for name, seconds in times.items()}


def print_memory(arguments: argparse.Namespace) -> None:
    """Prints what scoring a text adds to the memory of this process."""
    source = make_source(arguments)
    models = {"source": source, "TarFlowLM": convert(source, arguments)}
    model = models[arguments.memory_of]
    input_ids = random_ids(source, 1, arguments.num_tokens)
    with torch.no_grad():
        score(model, input_ids[:, :8])
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before = peak_resident_memory()
        score(model, input_ids)

    print(json.dumps({"bytes": peak_resident_memory() - before}))


def main() -> None:
    arguments = parse_arguments()
    if arguments.memory_of is not None:
        print_memory(arguments)
        return

    source = make_source(arguments)
    models = {"source": source, "TarFlowLM": convert(source, arguments)}
    facts = {
        "name": arguments.name
        or ("random Llama" if arguments.random else source.config.name_or_path),
        "vocab_size": source.config.vocab_size,
        "layers": source.config.num_hidden_layers,
        "width": source.config.hidden_size,
    }

    table = Results("cpu", arguments.output)
    table.title(what=24, batch=5, tokens=6, source=10, TarFlowLM=10, ratio=6)
    for name in arguments.what:
        for row in MEASURES[name](models, arguments):
            row = {"batch": 1, "tokens": 1, "source": None, **row}
            ratio = None if row["source"] is None else row["TarFlowLM"] / row["source"]
            table.row(**row, ratio=ratio, **facts)


if __name__ == "__main__":
    main()
