"""A study in the shape of the paper's table: models at equal parameters or FLOPs, data and steps.

    python benchmarks/study/run.py --quick                                       # minutes on a CPU: does it run
    python benchmarks/study/run.py --dataset text8.txt --seeds 0 1 2             # 6 layers of width 64
    python benchmarks/study/run.py --dataset text8.txt --groups models patches
    python benchmarks/study/run.py --dataset text8.txt --num_layers 12 --hidden_size 768 --num_tokens 1024 \\
        --batch_size 32 --mixed_precision bf16                                   # on a GPU

The cases and their groups stand in `cases.py`. The same command goes on where it stopped: a
finished run is a row of the output file and is not repeated, an unfinished one resumes from its
newest checkpoint. What is equal is made so by the width of the feed-forward layers (within 3%, or
the run is refused). Every model takes the same number of steps on the same sequences in the same
order; progressive training gives the first flow three fifths of them and shares the rest evenly.
Test text is scored as `tarflow_hf.evaluation` says, by the ELBO and the importance-weighted bound,
and the stack cut after each of its flows; the discrete model's figure is exact. `report.py` makes
tables and a picture.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from cases import CASES, GROUPS, build
from report import tables
from transformers import PreTrainedModel, set_seed

from tarflow_hf import TarFlowLMModel
from tarflow_hf.baseline import flows_of
from tarflow_hf.cost import training_flops
from tarflow_hf.data import PYTHON_DOCS, PackedTokens, character_tokenizer, load_splits
from tarflow_hf.evaluation import likelihood
from tarflow_hf.training import TrainingConfig, train

SETTINGS = ("dataset", "num_layers", "hidden_size", "num_tokens", "latent_size")
SETTINGS += (
    "num_steps",
    "batch_size",
    "learning_rate",
    "mixed_precision",
    "test_sequences",
    "test_samples",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="of cases; default: all")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="in place of groups")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--dataset",
        default=PYTHON_DOCS,
        help="as of examples/train.py, in the 27 characters of text8",
    )
    parser.add_argument("--num_layers", type=int, default=6, help="in all; a multiple of 6")
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--latent_size", type=int, default=5)
    parser.add_argument("--num_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--test_sequences", type=int, default=512)
    parser.add_argument(
        "--test_samples", type=int, default=16, help="of the importance-weighted bound"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study/study.jsonl"), help="rows are appended"
    )
    parser.add_argument(
        "--quick", action="store_true", help="width 32, 30 steps, few test sequences"
    )

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


def run(
    case: str, seed: int, arguments: argparse.Namespace, data: dict[str, PackedTokens], tokenizer
) -> dict:
    """Trains a case, goes on with it, or finds it done; returns its row."""
    set_seed(seed)
    config = {
        "vocab_size": len(tokenizer),
        "latent_size": arguments.latent_size,
        "max_position_embeddings": arguments.num_tokens,
        "hidden_size": arguments.hidden_size,
        "num_attention_heads": max(1, arguments.hidden_size // 32),
    }
    model = build(case, arguments.num_layers, config)
    settings = "-".join(str(getattr(arguments, name)).replace("/", "_") for name in SETTINGS)
    folder = arguments.output.parent / settings / f"{case.replace(', ', '_')}-{seed}"
    mode = CASES[case].mode
    training = TrainingConfig(
        output_dir=str(folder),
        num_steps=arguments.num_steps,
        mode=mode,
        stage_steps=stage_steps(mode, model, arguments.num_steps),
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=max(1, arguments.num_steps // 40),
        mixed_precision=arguments.mixed_precision,
        seed=seed,
        log_every=max(1, arguments.num_steps // 50),
        eval_sequences=min(64, arguments.test_sequences),
        save_every=max(1, arguments.num_steps // 5),
        keep_checkpoints=1,
        resume=any(folder.glob("checkpoint-*")),
    )
    model = train(model, data["train"], data["validation"], tokenizer, training)
    entries = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [entry for entry in entries if "loss" in entry]
    model.requires_grad_(True)

    return {
        "case": case,
        "seed": seed,
        "parameters": model.num_parameters(),
        "training_flops_per_token": training_flops(model, arguments.num_tokens)
        / arguments.num_tokens,
        **score(model, data["test"], arguments),
        "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in steps),
        "curve": [(entry["step"], round(entry["bits_per_character"], 4)) for entry in steps],
        **{name: getattr(arguments, name) for name in SETTINGS},
        "training_tokens": len(data["train"].tokens),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def score(model: PreTrainedModel, test: PackedTokens, arguments: argparse.Namespace) -> dict:
    """Scores the test text, in bits per character.

    All figures are from the same sequences and the same draws of the latents. `bits_after_flows`
    belong to the stack cut after each of its flows. `reconstruction_bits` are those of the tokens
    given their latents: the cost of the codebook's overlapping Gaussians.
    """
    start = time.perf_counter()
    options = {"max_sequences": arguments.test_sequences}

    def bits(result) -> float:
        return result.bits_per_character(test.characters_per_token)

    whole = likelihood(model, test, **options)
    scores = {
        "elbo_bits_per_character": bits(whole),
        "bound_bits_per_character": bits(whole),
        "standard_error": whole.standard_error * bits(whole) / whole.nats_per_token,
    }

    if flows_of(model):
        cuts = range(1, len(model.config.flows))
        scores["bits_after_flows"] = [
            bits(likelihood(model, test, num_flows=cut, **options)) for cut in cuts
        ]
        scores["bits_after_flows"].append(scores["elbo_bits_per_character"])
        bound = likelihood(model, test, num_samples=arguments.test_samples, **options)
        scores["bound_bits_per_character"] = bits(bound)
        scores["reconstruction_bits"] = reconstruction_bits(model, test, arguments.test_sequences)

    return {**scores, "seconds_of_scoring": time.perf_counter() - start}


@torch.no_grad()
def reconstruction_bits(model: TarFlowLMModel, test: PackedTokens, num_sequences: int) -> float:
    sequences = [test[index]["input_ids"] for index in range(min(num_sequences, len(test)))]
    input_ids = torch.stack(sequences).to(model.device)
    latents = model.encode(input_ids, generator=torch.Generator(model.device).manual_seed(0))
    log_prob = model.decode(latents).gather(-1, input_ids.unsqueeze(-1))

    return (
        -log_prob.double().mean().item()
        / torch.tensor(2.0).log().item()
        / test.characters_per_token
    )


def finished(arguments: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """The rows of the output file that these settings have made, by case and seed."""
    if not arguments.output.is_file():
        return {}
    rows = [json.loads(line) for line in arguments.output.read_text(encoding="utf-8").splitlines()]
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    return {(row["case"], row["seed"]): row for row in rows if settings.items() <= row.items()}


def main():
    arguments = parse_arguments()
    tokenizer = character_tokenizer()
    splits = load_splits(arguments.dataset)
    data = {
        name: PackedTokens(texts, tokenizer, arguments.num_tokens) for name, texts in splits.items()
    }
    rows = finished(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)

    for seed in arguments.seeds:
        for case in arguments.cases:
            if (case, seed) in rows:
                continue

            print(f"{case}, seed {seed}", flush=True)
            rows[case, seed] = run(case, seed, arguments, data, tokenizer)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[case, seed]) + "\n")

    print(tables([rows[case, seed] for case in arguments.cases for seed in arguments.seeds]))


if __name__ == "__main__":
    main()
