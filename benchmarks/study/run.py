"""A study in the shape of the paper's table: models at equal parameters or FLOPs, data and steps.

    python benchmarks/study/run.py --quick                                       # minutes on a CPU: does it run
    python benchmarks/study/run.py --dataset text8.txt --seeds 0 1 2             # 6 layers of width 64
    python benchmarks/study/run.py --dataset text8.txt --groups models patches
    python benchmarks/study/run.py --dataset text8.txt --num_layers 12 --hidden_size 768 --num_tokens 1024 \\
        --batch_size 32 --mixed_precision bf16                                   # on a GPU

    python benchmarks/study/run.py --dataset ptb:FOLDER --num_tokens 320 --latent_size 8     # by sentence
    python benchmarks/study/run.py --dataset wikitext2:FOLDER --cases discrete "Mix-d, one flow, equal blocks"
    python benchmarks/study/run.py --dataset task:addition --hidden_size 32                  # tasks.py

The cases and their groups stand in `cases.py`. The same command goes on where it stopped: a
finished run is a row of the output file and is not repeated, an unfinished one resumes from its
newest checkpoint. Sizes are made equal by the width of the feed-forward layers (within 3%, or
the run is refused). Every model takes the same number of steps on the same sequences in the same
order; progressive training gives the first flow three fifths of them and shares the rest evenly.
Test text is scored as `tarflow_hf.evaluation` says, by the ELBO and the importance-weighted bound,
and the stack cut after each of its flows; the discrete model's figure is exact. `report.py` makes
tables and a picture.
"""

import argparse
import datetime
import json
import math
import platform
import shlex
import statistics
import time
from pathlib import Path

import torch
import transformers
from cases import CASES, GROUPS, build
from report import tables
from tasks import load_task, optimal_bits, task_of, task_tokenizer
from transformers import PreTrainedModel, set_seed

from tarflow_hf import TarFlowLMModel
from tarflow_hf.baseline import flows_of, patch_size_of
from tarflow_hf.cost import training_flops
from tarflow_hf.data import (
    PYTHON_DOCS,
    PackedTokens,
    SentenceTokens,
    corpus_of,
    is_of_sentences,
    load_splits,
    make_tokenizer,
    sentence_splits,
    special_token_ids,
    vocabulary_size,
)
from tarflow_hf.evaluation import likelihood, score
from tarflow_hf.evaluation.likelihood import batches_of_equal_length, stack_ids
from tarflow_hf.training import TrainingConfig, train
from tarflow_hf.training.config import OPTIMIZERS
from tarflow_hf.training.folder import LOG

SETTINGS = ("dataset", "num_layers", "hidden_size", "num_tokens", "latent_size")
SETTINGS += (
    "num_steps",
    "batch_size",
    "learning_rate",
    "mixed_precision",
    "test_sequences",
    "test_samples",
    "initializer_range",
    "optimizer",
)


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="of cases; default: all")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="in place of groups")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--dataset",
        default=PYTHON_DOCS,
        help="as of examples/train.py, or task:NAME; text without symbols of its own in the 27 characters of text8",
    )
    parser.add_argument("--num_layers", type=int, default=6, help="in all; a multiple of 6")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--latent_size", type=int, default=5)
    parser.add_argument("--num_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--warmup_steps", type=int, help="default: a fortieth of the steps")
    parser.add_argument(
        "--initializer_range",
        type=float,
        default=0.02,
        help="of the weights; narrow models learn faster from larger ones",
    )
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--test_sequences", type=int, default=512)
    parser.add_argument(
        "--test_samples", type=int, default=16, help="of the importance-weighted bound"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study/study.jsonl"), help="rows are appended"
    )
    parser.add_argument(
        "--runs", type=Path, help="of the checkpoints; default: the output's folder"
    )
    parser.add_argument(
        "--quick", action="store_true", help="width 32, 30 steps, few test sequences"
    )

    return parser


def parse_arguments() -> argparse.Namespace:
    parser = parser_of_arguments()
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.hidden_size, arguments.num_tokens, arguments.num_steps = 32, 64, 30
        arguments.test_sequences, arguments.test_samples = 16, 2

    if arguments.num_layers < 6 or arguments.num_layers % 6:
        parser.error(f"num_layers must be a multiple of 6, not {arguments.num_layers}.")

    if arguments.cases is None:
        arguments.cases = [case for group in arguments.groups or GROUPS for case in GROUPS[group]]

    return arguments


def stage_steps(mode: str, model: PreTrainedModel, num_steps: int) -> list[int] | None:
    """Three fifths of the steps for the first flow, the rest evenly for the others."""
    if mode == "joint":
        return None
    others = len(model.config.flows) - 1
    steps = [num_steps * 2 // 5 // others] * others
    return [num_steps - sum(steps), *steps]


class Data:
    """A corpus, its tokenizer, and its splits as a model takes them."""

    def __init__(self, arguments: argparse.Namespace):
        source = self.source = arguments.dataset
        self.is_task = task_of(source) is not None
        self.splits = load_task(source) if self.is_task else load_splits(source)
        self.tokenizer = task_tokenizer() if self.is_task else make_tokenizer(None, source)
        self.num_tokens, self._made = arguments.num_tokens, {}

    def of(self, patch_size: int) -> dict[str, PackedTokens | SentenceTokens]:
        """The splits, made once for each patch size where sequences are sentences."""
        has_sentences = self.is_task or is_of_sentences(self.source)
        key = patch_size if has_sentences else None
        if key not in self._made:
            if has_sentences:
                made = sentence_splits(self.splits, self.tokenizer, patch_size)
            else:
                made = {
                    name: PackedTokens(texts, self.tokenizer, self.num_tokens)
                    for name, texts in self.splits.items()
                }
            self._made[key] = made

        return self._made[key]


def run(case: str, seed: int, arguments: argparse.Namespace, corpus: Data) -> dict:
    """Trains a case, goes on with it, or finds it done; returns its row."""
    set_seed(seed)
    model = build(case, arguments.num_layers, config_of(arguments, corpus))
    data = corpus.of(patch_size_of(model))
    training = training_of(case, seed, arguments, model)
    model = train(model, data["train"], data["validation"], corpus.tokenizer, training)

    return {
        "model": case,
        "seed": seed,
        "parameters": model.num_parameters(),
        "training_flops_per_token": training_flops(model, arguments.num_tokens)
        / arguments.num_tokens,
        **scores_of(model, data["test"], arguments),
        **({"optimal_bits_per_character": optimal_bits(corpus.source)} if corpus.is_task else {}),
        **log_of(Path(training.output_dir)),
        "command": command_of(arguments, case, seed),
        **settings_of(arguments),
        "training_tokens": len(data["train"].tokens),
        **made_with(),
    }


def config_of(arguments: argparse.Namespace, corpus: Data) -> dict:
    """The fields of the configuration that all cases share."""
    config = {
        "vocab_size": vocabulary_size(corpus.tokenizer),
        "latent_size": arguments.latent_size,
        "max_position_embeddings": arguments.num_tokens,
        "hidden_size": arguments.hidden_size,
        "num_attention_heads": max(1, arguments.hidden_size // 32),
        "initializer_range": arguments.initializer_range,
    }
    return config | special_token_ids(corpus.tokenizer, config["vocab_size"])


def training_of(
    case: str, seed: int, arguments: argparse.Namespace, model: PreTrainedModel
) -> TrainingConfig:
    settings = "-".join(str(value).replace("/", "_") for value in settings_of(arguments).values())
    runs = arguments.runs or arguments.output.parent
    folder = runs / settings / f"{case.replace(', ', '_')}-{seed}"
    mode = CASES[case].mode
    return TrainingConfig(
        output_dir=str(folder),
        num_steps=arguments.num_steps,
        mode=mode,
        stage_steps=stage_steps(mode, model, arguments.num_steps),
        batch_size=arguments.batch_size,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps or max(1, arguments.num_steps // 40),
        mixed_precision=arguments.mixed_precision,
        seed=seed,
        log_every=max(1, arguments.num_steps // 50),
        eval_every=max(1, arguments.num_steps // 5),
        eval_sequences=min(512, arguments.test_sequences),
        save_every=max(1, arguments.num_steps // 5),
        keep_checkpoints=1,
        resume=any(folder.glob("checkpoint-*")),
    )


def log_of(folder: Path) -> dict:
    """The speed, the memory and the curves of a run, from its log."""
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    steps = [entry for entry in entries if "loss" in entry]
    return {
        "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in steps),
        "peak_memory_gib": max(entry["peak_memory_gib"] for entry in steps),
        "curve": [(entry["step"], round(entry["bits_per_character"], 4)) for entry in steps],
        "validation_curve": [
            (entry["step"], round(entry["validation_bits_per_character"], 4))
            for entry in entries
            if "validation_loss" in entry
        ],
    }


def settings_of(arguments: argparse.Namespace) -> dict:
    """The settings of a row; a corpus in a folder goes by its name."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if corpus_of(arguments.dataset) is not None:
        settings["dataset"] = arguments.dataset.partition(":")[0]

    return settings


def command_of(arguments: argparse.Namespace, case: str, seed: int) -> str:
    """The command of a row, with the options that differ from their defaults."""
    settings = settings_of(arguments)
    if corpus_of(arguments.dataset) is not None:
        settings["dataset"] += ":FOLDER"

    settings |= {"warmup_steps": arguments.warmup_steps, "cases": case, "seeds": seed}
    defaults = parser_of_arguments().parse_args([])
    words = [
        word
        for name, value in settings.items()
        if value != getattr(defaults, name) and value is not None
        for word in (f"--{name}", str(value))
    ]
    return shlex.join(["python", "benchmarks/study/run.py", *words])


def made_with() -> dict:
    """The machine of a row, its date and the versions."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()

    return f"CPU, {platform.machine()}"


def scores_of(
    model: PreTrainedModel, test: PackedTokens | SentenceTokens, arguments: argparse.Namespace
) -> dict:
    """Scores the test text, in bits per character.

    All figures are from the same sequences and the same draws of the latents: the ELBO is the mean
    over the samples of the bound. `test_...` are the bound's, or exact. `bits_after_flows`
    belong to the stack cut after each of its flows. `reconstruction_bits` are those of the tokens
    given their latents: the cost of the codebook's overlapping Gaussians.
    """
    start = time.perf_counter()
    sequences = test.first(arguments.test_sequences)
    found = score(model, sequences, num_samples=arguments.test_samples)
    elbo, best = found.one_sample, found.best

    def bits(result) -> float:
        return result.bits_per_character(test.characters_per_token)

    scores = {
        "elbo_bits_per_character": bits(elbo),
        "test_bits_per_character": bits(best),
        "test_perplexity": best.perplexity,
        "standard_error": best.standard_error * bits(best) / best.nats_per_token,
    }

    if flows_of(model):
        cuts = range(1, len(model.config.flows))
        cut_bits = [bits(likelihood(model, sequences, num_flows=cut)) for cut in cuts]
        scores["bits_after_flows"] = [*cut_bits, bits(elbo)]
        scores["reconstruction_bits"] = reconstruction_bits(model, sequences, test)

    return {**scores, "seconds_of_scoring": time.perf_counter() - start}


@torch.no_grad()
def reconstruction_bits(
    model: TarFlowLMModel, sequences: list[dict], test: PackedTokens | SentenceTokens
) -> float:
    nats, num_tokens = 0.0, 0
    generator = torch.Generator(model.device).manual_seed(0)
    codebook = model.codebook()
    for batch in batches_of_equal_length(sequences, 16):
        input_ids = stack_ids(batch).to(model.device)
        latents = model.encode(input_ids, generator=generator)
        log_prob = codebook.log_prob(latents, input_ids) - codebook.log_total(latents)
        nats -= log_prob.double().sum().item()
        num_tokens += input_ids.numel()

    return nats / num_tokens / math.log(2) / test.characters_per_token


def finished(arguments: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """The rows of the output file that these settings have made, by case and seed."""
    if not arguments.output.is_file():
        return {}
    rows = [json.loads(line) for line in arguments.output.read_text(encoding="utf-8").splitlines()]
    settings = settings_of(arguments)
    return {(row["model"], row["seed"]): row for row in rows if settings.items() <= row.items()}


def main():
    arguments = parse_arguments()
    corpus = Data(arguments)
    rows = finished(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)

    for seed in arguments.seeds:
        for case in arguments.cases:
            if (case, seed) in rows:
                continue

            print(f"{case}, seed {seed}", flush=True)
            rows[case, seed] = run(case, seed, arguments, corpus)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[case, seed]) + "\n")

    print(tables([rows[case, seed] for case in arguments.cases for seed in arguments.seeds]))


if __name__ == "__main__":
    main()
