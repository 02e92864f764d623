"""The likelihood of gaps: a pretrained body that learnt to fill them, one from scratch, and left to right.

    python benchmarks/infilling.py --dataset wikitext2 --output benchmarks/results/infilling.jsonl

A discrete causal model is trained on the text first. It is then converted with `conditional=True`
and trained for gaps, and so is the same model as it was before its pretraining. The runs:

    left_to_right          the discrete model, after its pretraining
    left_to_right_longer   the same, trained on for as long as the others are for gaps
    converted              converted from left_to_right, then trained for gaps
    converted_lora         the same, its body by LoRA only (needs PEFT)
    scratch                converted before any training, then trained for as many steps
    scratch_longer         the same, for the steps of pretraining, too

A row is a run and a kind of gap: one gap of so many tokens, at a random place of each test sequence,
or `half`, many gaps that are half of the sequence in the mean. Its nats are those of a token of the
gap: minus the ELBO given all other tokens, the mean of the samples; left to right the exact nats,
given the tokens before. The error is the standard error over the sequences; `gain` is the paired
difference to left_to_right_longer. Rows of kind `curve` are those of one gap length at checkpoints.

A run that has ended is not repeated, one that was stopped goes on: they lie in --runs. `--dataset`
takes what examples/train.py takes.
"""

import argparse
import math
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from measure import Results
from safetensors.torch import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.baseline import is_discrete, prepend_start
from tarflow_hf.conversion import from_causal_lm
from tarflow_hf.data import PYTHON_DOCS, PackedTokens, load_splits
from tarflow_hf.evaluation import elbo_samples, latent_noise, ratio_of_sums
from tarflow_hf.training import TrainingConfig, add_lora, discrete_baseline, merge_lora, train
from tarflow_hf.training.folder import LOG

RUNS = (
    "left_to_right",
    "left_to_right_longer",
    "converted",
    "converted_lora",
    "scratch",
    "scratch_longer",
)
REFERENCE = "left_to_right_longer"
END = "<|end|>"
Gap = int | str  # a length, or "half"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=PYTHON_DOCS)
    parser.add_argument("--vocab_size", type=int, default=1000, help="of a BPE, made of the text")
    parser.add_argument("--length", type=int, default=64, help="of a sequence, in tokens")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latent_size", type=int, default=16)
    parser.add_argument("--pretrain_steps", type=int, default=1500)
    parser.add_argument("--gap_steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--gaps", nargs="+", default=["1", "4", "16", "half"])
    parser.add_argument("--curve_gap", default="4", help="the gap of the curves")
    parser.add_argument("--curve_points", type=int, default=8, help="checkpoints of --gap_steps")
    parser.add_argument("--test_sequences", type=int, default=512)
    parser.add_argument("--num_samples", type=int, default=4, help="of the ELBO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS, help="runs to train")
    parser.add_argument("--train_only", action="store_true", help="leave the rows for later")
    parser.add_argument("--runs", type=Path, default=Path("runs/infilling"), help="a folder")
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")
    arguments = parser.parse_args()
    arguments.gaps = [gap if gap == "half" else int(gap) for gap in arguments.gaps]

    return arguments


# --------------------------------------------------------------------------------------------------
# The text
# --------------------------------------------------------------------------------------------------


def make_tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerFast:
    """A BPE over bytes, made of the training text at the first call."""
    folder = arguments.runs / "tokenizer"
    if folder.exists():
        return AutoTokenizer.from_pretrained(folder)

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(load_splits(arguments.dataset)["train"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer.save_pretrained(folder)

    return tokenizer


def make_data(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> dict[str, PackedTokens]:
    splits = load_splits(arguments.dataset)
    return {
        name: PackedTokens(documents, tokenizer, arguments.length)
        for name, documents in splits.items()
    }


# --------------------------------------------------------------------------------------------------
# The models
# --------------------------------------------------------------------------------------------------


def make_source(arguments: argparse.Namespace, vocab_size: int) -> PreTrainedModel:
    """A discrete causal model of random weights."""
    set_seed(arguments.seed)
    config = TarFlowLMConfig(
        vocab_size=vocab_size,
        latent_size=arguments.latent_size,
        max_position_embeddings=arguments.length,
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.hidden_size // 32 or 1,
        flows=[
            {
                "coupling": "mixture_rosenblatt",
                "direction": "left_to_right",
                "num_hidden_layers": arguments.layers,
            }
        ],
    )
    return discrete_baseline(config)


def start_of(name: str, arguments: argparse.Namespace, vocab_size: int) -> PreTrainedModel:
    """The model that a run begins with."""
    is_random = name == "left_to_right" or name.startswith("scratch")
    source = make_source(arguments, vocab_size) if is_random else load("left_to_right", arguments)
    if name.startswith("left_to_right"):
        return source

    options = {"conditional": True, "max_position_embeddings": arguments.length}
    return from_causal_lm(source.eval(), latent_size=arguments.latent_size, **options)


def config_of(name: str, arguments: argparse.Namespace) -> TrainingConfig:
    gaps, before = arguments.gap_steps, arguments.pretrain_steps
    steps = {"left_to_right": before, "scratch_longer": before + gaps}.get(name, gaps)
    every = max(1, gaps // arguments.curve_points)
    is_curve = not name.startswith("left_to_right")

    return TrainingConfig(
        output_dir=str(arguments.runs / name),
        num_steps=steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        freeze_codebook=is_curve,
        lora_rank=arguments.lora_rank if name == "converted_lora" else 0,
        seed=arguments.seed,
        save_every=every if is_curve else 0,
        save_minutes=2.0,
        keep_checkpoints=10**6 if is_curve else 1,
        resume=(arguments.runs / name / LOG).exists(),
    )


def run_training(
    name: str,
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast,
    data: dict[str, PackedTokens],
) -> None:
    """Trains a run, or goes on with it, unless it has ended."""
    config = config_of(name, arguments)
    if (Path(config.output_dir) / "model").exists():
        return

    AcceleratorState._reset_state(reset_partial_state=True)
    model = start_of(name, arguments, len(tokenizer))
    print(f"{name}: {config.num_steps} steps, {model.num_parameters():,} parameters", flush=True)
    begin = time.perf_counter()
    train(model, data["train"], data["validation"], tokenizer, config)
    print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


def load(name: str, arguments: argparse.Namespace) -> PreTrainedModel:
    """The model that a run has ended with."""
    kind = AutoModelForCausalLM if name.startswith("left_to_right") else TarFlowLMModel
    return kind.from_pretrained(arguments.runs / name / "model").eval()


def checkpoints(
    name: str, arguments: argparse.Namespace, vocab_size: int
) -> Iterator[tuple[int, PreTrainedModel]]:
    """The steps of a run and its model there, from its beginning on."""
    config = config_of(name, arguments)
    start = start_of(name, arguments, vocab_size).eval()
    yield 0, start

    folders = Path(config.output_dir).glob("checkpoint-*")
    for step in sorted(int(folder.name.split("-")[1]) for folder in folders):
        if step % config.save_every == 0 or step == config.num_steps:
            model = deepcopy(start)
            add_lora(model, config)
            load_model(model, Path(config.output_dir) / f"checkpoint-{step}" / "model.safetensors")
            merge_lora(model)
            yield step, model.eval()


# --------------------------------------------------------------------------------------------------
# Gaps
# --------------------------------------------------------------------------------------------------


def draw_gaps(gap: Gap, shape: tuple[int, int], seed: int) -> Tensor:
    """True in the gaps of sequences (B, T): one at a random place, with tokens on both sides.

    With `half`, spans of five tokens in the mean are missing or not by the toss of a coin.
    """
    generator = torch.Generator().manual_seed(seed)
    num_sequences, length = shape
    if gap == "half":
        span = (torch.rand(shape, generator=generator) < 0.2).cumsum(-1).clamp(max=length - 1)
        missing = (torch.rand(shape, generator=generator) < 0.5).gather(-1, span)
        missing[:, length // 2] |= ~missing.any(-1)
        missing[:, 0] &= ~missing.all(-1)
        return missing

    first = torch.randint(1, length - gap, (num_sequences, 1), generator=generator)
    position = torch.arange(length)
    return (position >= first) & (position < first + gap)


@torch.no_grad()
def gap_nats(
    model: PreTrainedModel, ids: Tensor, missing: Tensor, arguments: argparse.Namespace
) -> Tensor:
    """The nats (S, B) of the gaps of ids (B, T): minus the ELBO by each of S samples.

    A discrete model reads the tokens before each token of a gap, and is exact: S is 1.
    """
    nats = []
    for first in range(0, len(ids), 64):
        batch, is_missing = ids[first : first + 64], missing[first : first + 64]
        if is_discrete(model):
            logits = model(input_ids=prepend_start(model, batch), use_cache=False).logits[:, :-1]
            log_prob = logits.log_softmax(-1).gather(-1, batch.unsqueeze(-1)).squeeze(-1)
            nats.append(-(log_prob * is_missing).sum(-1).unsqueeze(0))
            continue

        seeds = [(arguments.seed, first + row) for row in range(len(batch))]
        noise = latent_noise(model, batch.shape[1], seeds, arguments.num_samples)
        nats.append(-elbo_samples(model, batch, noise, observed_mask=~is_missing))

    return torch.cat(nats, 1).double()


def test_ids(data: PackedTokens, arguments: argparse.Namespace) -> Tensor:
    num_sequences = min(arguments.test_sequences, len(data))
    every = len(data) // num_sequences  # from the whole text
    return torch.stack([data[every * index]["input_ids"] for index in range(num_sequences)])


def rows_of_gap(
    gap: Gap, trained: dict[str, PreTrainedModel], ids: Tensor, arguments: argparse.Namespace
) -> Iterator[dict]:
    """A row for each model, of the same gaps."""
    missing = draw_gaps(gap, tuple(ids.shape), arguments.seed)
    count = missing.sum(-1)
    nats = {name: gap_nats(model, ids, missing, arguments) for name, model in trained.items()}

    for name, of_samples in nats.items():
        mean, error = ratio_of_sums(of_samples.mean(0), count)
        row = {"kind": "gap", "run": name, "gap": gap, "nats": mean, "bits": mean / math.log(2)}
        row |= {"error": error, "tokens": int(count.sum()), "samples": len(of_samples)}
        row["of_samples"] = [ratio_of_sums(one, count)[0] for one in of_samples]
        if REFERENCE in nats:
            difference = nats[REFERENCE].mean(0) - of_samples.mean(0)
            row["gain"], row["gain_error"] = ratio_of_sums(difference, count)

        yield row


def rows_of_curve(
    name: str, ids: Tensor, arguments: argparse.Namespace, vocab_size: int
) -> Iterator[dict]:
    gap = arguments.curve_gap if arguments.curve_gap == "half" else int(arguments.curve_gap)
    missing = draw_gaps(gap, tuple(ids.shape), arguments.seed)
    once = argparse.Namespace(**{**vars(arguments), "num_samples": 1})

    for step, model in checkpoints(name, arguments, vocab_size):
        mean, error = ratio_of_sums(gap_nats(model, ids, missing, once)[0], missing.sum(-1))
        row = {"kind": "curve", "run": name, "gap": gap, "step": step, "nats": mean}
        yield row | {"bits": mean / math.log(2), "error": error}


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bar()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(arguments)
    data = make_data(arguments, tokenizer)
    print(f"{len(data['train'].tokens):,} training tokens", flush=True)
    for name in arguments.only:
        run_training(name, arguments, tokenizer, data)

    if arguments.train_only:
        return

    ids = test_ids(data["test"], arguments)
    ended = [name for name in RUNS if (arguments.runs / name / "model").exists()]
    trained = {name: load(name, arguments) for name in ended}
    facts = {
        name: getattr(arguments, name)
        for name in (
            "vocab_size", "length", "hidden_size", "layers", "batch_size", "pretrain_steps", "gap_steps"
        )
    }  # fmt: skip

    table = Results("cpu", arguments.output)
    table.title(run=22, gap=5, nats=7, bits=7, error=7, gain=7, gain_error=10)
    for gap in arguments.gaps:
        for row in rows_of_gap(gap, trained, ids, arguments):
            table.row(**{"gain": None, "gain_error": None, **row}, **facts)

    table.title(run=22, gap=5, step=6, nats=7, error=7)
    for name in (name for name in ended if not name.startswith("left_to_right")):
        for row in rows_of_curve(name, ids, arguments, len(tokenizer)):
            table.row(**row, **facts)


if __name__ == "__main__":
    main()
