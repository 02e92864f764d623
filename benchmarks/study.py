"""The paper's table in shape: affine, Mix-1, Mix-d and the discrete transformer at equal parameters, data and steps.

    python benchmarks/study.py --quick                                          # minutes on a CPU: does it run
    python benchmarks/study.py --dataset text8.txt --seeds 0 1 2                # 12 layers of width 128
    python benchmarks/study.py --dataset text8.txt --hidden_size 768 --batch_size 64 --mixed_precision bf16
    python benchmarks/study.py --cases discrete "Mix-d, deep" --num_steps 5000

The same command goes on where it stopped: a finished run is a row of the output file and is not repeated, an unfinished
one resumes from its newest checkpoint. Parameters are made equal by the width of the feed-forward layers (within 3%,
or the run is refused). Every model takes the same number of steps on the same sequences in the same order; progressive
training gives the first flow three fifths of them and shares the rest evenly. Test text is scored as
`tarflow_hf.evaluation` says, by the ELBO and the importance-weighted bound; the discrete model's figure is exact.
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
from transformers import PreTrainedModel, set_seed

from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import PYTHON_DOCS, PackedTokens, character_tokenizer, load_splits
from tarflow_hf.evaluation import likelihood
from tarflow_hf.training import TrainingConfig, discrete_baseline, train

DIRECTIONS = ("left_to_right", "right_to_left")
SETTINGS = ("dataset", "num_layers", "hidden_size", "num_tokens", "latent_size", "num_components")
SETTINGS += ("num_steps", "batch_size", "learning_rate", "mixed_precision", "test_sequences", "test_samples")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dataset", default=PYTHON_DOCS, help="as of examples/train.py, in the 27 characters of text8")
    parser.add_argument("--num_layers", type=int, default=12, help="in all; a multiple of 6")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--latent_size", type=int, default=5)
    parser.add_argument("--num_components", type=int, default=4, help="of the Mix-1 flows; of the first one 27")
    parser.add_argument("--num_steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--test_sequences", type=int, default=256)
    parser.add_argument("--test_samples", type=int, default=16, help="of the importance-weighted bound")
    parser.add_argument("--output", type=Path, default=Path("runs/study/study.jsonl"), help="rows are appended")
    parser.add_argument("--quick", action="store_true", help="6 layers of width 32, 30 steps, few test sequences")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_layers, arguments.hidden_size, arguments.num_tokens, arguments.num_steps = 6, 32, 64, 30
        arguments.test_sequences, arguments.test_samples = 16, 2
    if arguments.num_layers < 6 or arguments.num_layers % 6:
        parser.error(f"num_layers must be a multiple of 6, not {arguments.num_layers}.")
    return arguments


# ------------------------------------------------------------------------------------------------------------ the cases


def stack(first: dict, depths: list[int], num_components: int) -> list[dict]:
    """Flows of these depths in alternating directions: the first one as given, Mix-1 above it."""
    flows = [{"coupling": "mixture_cdf", "num_components": num_components, "head_hidden_size": 32} for _ in depths]
    flows[0] = first
    return [
        {**flow, "direction": DIRECTIONS[index % 2], "num_hidden_layers": depth}
        for index, (flow, depth) in enumerate(zip(flows, depths, strict=True))
    ]


def affine(layers: int, components: int) -> list[dict]:
    return [
        {"coupling": "affine", "direction": DIRECTIONS[index % 2], "num_hidden_layers": layers // 6}
        for index in range(6)
    ]


def mix_1(layers: int, components: int) -> list[dict]:
    first = {"coupling": "mixture_cdf", "num_components": 27, "head_hidden_size": 32}
    return stack(first, papers_depths(layers), components)


def mix_d(layers: int, components: int) -> list[dict]:
    return stack({"coupling": "mixture_rosenblatt", "context": "latent"}, papers_depths(layers), components)


def mix_d_deep(layers: int, components: int) -> list[dict]:
    return stack({"coupling": "mixture_rosenblatt"}, [layers - 2, 1, 1], components)


def mix_d_alone(layers: int, components: int) -> list[dict]:
    return stack({"coupling": "mixture_rosenblatt"}, [layers], components)


def papers_depths(layers: int) -> list[int]:
    """2 + 2 + 8 of the paper's 12 layers, from the data side."""
    return [layers // 6, layers // 6, layers - 2 * (layers // 6)]


CASES = {  # name: (flows, mode); the discrete model has the layers of any
    "discrete": (mix_d_alone, "joint"),
    "affine": (affine, "joint"),
    "affine, progressive": (affine, "progressive"),
    "Mix-1": (mix_1, "joint"),
    "Mix-1, progressive": (mix_1, "progressive"),
    "Mix-d": (mix_d, "joint"),
    "Mix-d, progressive": (mix_d, "progressive"),
    "Mix-d, deep": (mix_d_deep, "joint"),
    "Mix-d, deep, progressive": (mix_d_deep, "progressive"),
    "Mix-d, one flow": (mix_d_alone, "joint"),
}


def build(case: str, arguments: argparse.Namespace, vocab_size: int) -> PreTrainedModel:
    """The model of a case, as large as the discrete one.

    Raises:
        ValueError: Its number of parameters can't be brought within 3%.
    """
    flows, _ = CASES[case]

    def make(intermediate_size: int | None, discrete: bool) -> PreTrainedModel:
        config = TarFlowLMConfig(
            vocab_size=vocab_size,
            latent_size=arguments.latent_size,
            max_position_embeddings=arguments.num_tokens,
            hidden_size=arguments.hidden_size,
            num_attention_heads=max(1, arguments.hidden_size // 32),
            intermediate_size=intermediate_size,
            flows=flows(arguments.num_layers, arguments.num_components),
        )
        return discrete_baseline(config) if discrete else TarFlowLMModel(config)

    discrete = make(None, True)
    if case == "discrete":
        return discrete
    size, target = discrete.config.intermediate_size, discrete.num_parameters()
    excess = make(size, False).num_parameters() - target
    of_a_unit = 3 * arguments.hidden_size * arguments.num_layers  # gate, up and down, in every layer
    model = make(max(1, size - round(excess / of_a_unit)), False)
    if abs(model.num_parameters() / target - 1) > 0.03:
        raise ValueError(f"{case} has {model.num_parameters():,} parameters, the discrete model {target:,}.")
    return model


# ------------------------------------------------------------------------------------------------------------- the runs


def stage_steps(mode: str, model: PreTrainedModel, num_steps: int) -> list[int] | None:
    """Three fifths of the steps for the first flow, the rest evenly for the others."""
    if mode == "joint":
        return None
    others = len(model.config.flows) - 1
    steps = [num_steps * 2 // 5 // others] * others
    return [num_steps - sum(steps), *steps]


def run(case: str, seed: int, arguments: argparse.Namespace, data: dict[str, PackedTokens], tokenizer) -> dict:
    """Trains a case, goes on with it, or finds it done; returns its row."""
    set_seed(seed)
    model = build(case, arguments, len(tokenizer))
    mode = CASES[case][1]
    settings = "-".join(str(getattr(arguments, name)).replace("/", "_") for name in SETTINGS)
    folder = arguments.output.parent / settings / f"{case.replace(', ', '_')}-{seed}"
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
        log_every=max(1, arguments.num_steps // 100),
        eval_sequences=min(64, arguments.test_sequences),
        save_every=max(1, arguments.num_steps // 5),
        keep_checkpoints=1,
        resume=any(folder.glob("checkpoint-*")),
    )
    model = train(model, data["train"], data["validation"], tokenizer, training)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    start = time.perf_counter()
    options = {"max_sequences": arguments.test_sequences}
    elbo = likelihood(model, data["test"], **options)
    samples = arguments.test_samples if isinstance(model, TarFlowLMModel) else 1
    bound = likelihood(model, data["test"], num_samples=samples, **options)
    characters = data["test"].characters_per_token
    return {
        "case": case,
        "seed": seed,
        "parameters": model.num_parameters(),
        "elbo_bits_per_character": elbo.bits_per_character(characters),
        "bound_bits_per_character": bound.bits_per_character(characters),
        "standard_error": elbo.standard_error * elbo.bits_per_character(characters) / elbo.nats_per_token,
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in entries if "loss" in e),
        "seconds_of_scoring": time.perf_counter() - start,
        **{name: getattr(arguments, name) for name in SETTINGS},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def finished(arguments: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """The rows of the output file that these settings have made, by case and seed."""
    if not arguments.output.is_file():
        return {}
    rows = [json.loads(line) for line in arguments.output.read_text().splitlines()]
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    return {(row["case"], row["seed"]): row for row in rows if settings.items() <= row.items()}


def table(rows: list[dict]) -> str:
    """Markdown: a line for each case, means over its seeds, and their standard deviation where there are several.

    Example:
        >>> row = {"case": "affine", "parameters": 10, "elbo_bits_per_character": 4.0, "bound_bits_per_character": 3.9}
        >>> print(table([row, {**row, "elbo_bits_per_character": 4.2}]))
        | model | parameters | seeds | bits/char (ELBO) | bits/char (importance-weighted) |
        |---|---|---|---|---|
        | affine | 10 | 2 | 4.100 ± 0.141 | 3.900 ± 0.000 |
    """
    lines = [
        "| model | parameters | seeds | bits/char (ELBO) | bits/char (importance-weighted) |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        cells = []
        for name in ("elbo_bits_per_character", "bound_bits_per_character"):
            values = [row[name] for row in own]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        if case == "discrete":
            cells = [f"{cells[0]}, exact", ""]
        lines.append(f"| {case} | {own[0]['parameters']:,} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    arguments = parse_arguments()
    tokenizer = character_tokenizer()
    splits = load_splits(arguments.dataset)
    data = {name: PackedTokens(texts, tokenizer, arguments.num_tokens) for name, texts in splits.items()}
    rows = finished(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for case in arguments.cases:
            if (case, seed) in rows:
                continue
            print(f"{case}, seed {seed}", flush=True)
            rows[case, seed] = run(case, seed, arguments, data, tokenizer)
            with arguments.output.open("a") as file:
                file.write(json.dumps(rows[case, seed]) + "\n")
    chosen = [rows[case, seed] for case in arguments.cases for seed in arguments.seeds]
    amount = f"{len(data['train'].tokens):,} training characters, {arguments.num_steps} steps of {arguments.batch_size}"
    sizes = f"{arguments.num_tokens}, {arguments.num_layers} layers of width {arguments.hidden_size}"
    print(f"\n{amount} x {sizes}\n\n{table(chosen)}")


if __name__ == "__main__":
    main()
