"""A flow above a frozen model, on other text than the model's own: what does it win?

    python benchmarks/study/above.py checkpoints/doyle --output benchmarks/results/stacks.jsonl

The shipped `doyle` is one Mix-d flow, as a converted language model is. Three cases score the same test text:

1. the model as it is;
2. with a right-to-left flow of one layer above it. Only that flow is trained;
3. adapted by LoRA instead, with about as many trained parameters, for the same steps.

A row that is there is not made again, and a run that was stopped goes on.

A frozen first flow hands the flow above the noise of the text. If the model were right about the
text, the noise would be N(0, I), and nothing would be left to win: so the text is another one. By
default it is the Python documentation.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from run import log_of, made_with, scores_of
from torch import nn
from transformers import set_seed

from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import append_flow
from tarflow_hf.data import PYTHON_DOCS, PackedTokens, load_splits
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.training import TrainingConfig, train

FLOW = {
    "coupling": "mixture_cdf",
    "direction": "right_to_left",
    "num_hidden_layers": 1,
    "num_components": 4,
    "head_hidden_size": 32,
}
SETTINGS = ("num_tokens", "num_steps", "batch_size", "learning_rate")
SETTINGS += ("test_sequences", "test_samples")
AS_IT_IS, ABOVE, LORA = "as it is", "a flow above, the model frozen", "LoRA"


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a TarFlowLM")
    parser.add_argument("--dataset", default=PYTHON_DOCS, help="as of examples/train.py")
    parser.add_argument("--num_tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--test_sequences", type=int, default=256)
    parser.add_argument("--test_samples", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/above/above.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs/above"), help="of the checkpoints")
    return parser


def lora_of_equal_size(model: TarFlowLMModel, num_parameters: int) -> tuple[int, int]:
    """The rank at which LoRA on the first flow's decoder trains about as many parameters, and how many."""
    maps = [part for part in model.flow.layers[0].decoder.modules() if isinstance(part, nn.Linear)]
    of_rank_1 = sum(sum(part.weight.shape) for part in maps)
    rank = max(1, round(num_parameters / of_rank_1))
    return rank, rank * of_rank_1


def num_layers_of(model: TarFlowLMModel) -> int:
    return sum(flow["num_hidden_layers"] for flow in model.config.flows)


def training_of(
    case: str, seed: int, model: TarFlowLMModel, rank: int, arguments: argparse.Namespace
) -> TrainingConfig:
    folder = arguments.runs / f"{case.replace(', ', '_').replace(' ', '_')}-{seed}"
    only: dict[str, Any] = {"lora_rank": rank}
    if case == ABOVE:
        only = {"mode": "progressive", "first_flow": len(model.config.flows)}

    return TrainingConfig(
        output_dir=str(folder),
        num_steps=arguments.num_steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=max(1, arguments.num_steps // 10),
        freeze_codebook=True,
        seed=seed,
        log_every=max(1, arguments.num_steps // 50),
        eval_every=max(1, arguments.num_steps // 5),
        eval_sequences=arguments.test_sequences,
        keep_checkpoints=1,
        resume=any(folder.glob("checkpoint-*")),
        **only,
    )


def run(case: str, seed: int, arguments: argparse.Namespace, splits: dict[str, list[str]]) -> dict:
    """Trains a case, or goes on with it; returns its row."""
    set_seed(seed)
    model, tokenizer = load_checkpoint(arguments.checkpoint)
    data = {
        name: PackedTokens(texts, tokenizer, arguments.num_tokens) for name, texts in splits.items()
    }
    size, num_layers = model.num_parameters(), num_layers_of(model)
    append_flow(model, FLOW)
    num_above = model.num_parameters() - size
    rank, num_adapted = lora_of_equal_size(model, num_above)
    if case != ABOVE:
        model, _ = load_checkpoint(arguments.checkpoint)

    log = {}
    if case != AS_IT_IS:
        training = training_of(case, seed, model, rank, arguments)
        model = train(model, data["train"], data["validation"], tokenizer, training)
        log = log_of(Path(training.output_dir))

    return {
        **key_of(case, seed, arguments),
        "parameters": model.num_parameters(),
        "trained_parameters": {AS_IT_IS: 0, ABOVE: num_above, LORA: num_adapted}[case],
        **scores_of(model, data["test"], arguments),
        **log,
        "command": command_of(arguments, seed),
        "num_layers": num_layers,
        "hidden_size": model.config.hidden_size,
        "initializer_range": model.config.initializer_range,
        "optimizer": "adamw",
        "training_tokens": len(data["train"].tokens),
        **made_with(),
    }


def key_of(case: str, seed: int, arguments: argparse.Namespace) -> dict:
    """The fields of a row that tell it from others."""
    source, dataset = Path(arguments.checkpoint).name, Path(arguments.dataset).stem
    key = {"model": f"{source}, {case}", "seed": seed, "dataset": f"{dataset} by {source}"}
    return key | {name: getattr(arguments, name) for name in SETTINGS}


def command_of(arguments: argparse.Namespace, seed: int) -> str:
    """The command of a row, with the options that differ from their defaults."""
    defaults = parser_of_arguments().parse_args([arguments.checkpoint])
    words = [
        word
        for name in ("dataset", *SETTINGS)
        if getattr(arguments, name) != getattr(defaults, name)
        for word in (f"--{name}", str(getattr(arguments, name)))
    ]
    words += ["--seeds", str(seed)]
    return shlex.join(["python", "benchmarks/study/above.py", arguments.checkpoint, *words])


def main():
    arguments = parser_of_arguments().parse_args()
    splits = load_splits(arguments.dataset)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if arguments.output.is_file():
        rows = [json.loads(line) for line in arguments.output.read_text("utf-8").splitlines()]

    for seed in arguments.seeds:
        for case in (AS_IT_IS, ABOVE, LORA):
            key = key_of(case, seed, arguments)
            if any(key.items() <= row.items() for row in rows):
                continue

            row = run(case, seed, arguments, splits)
            print(
                f"{row['model']}, seed {seed}: {row['test_bits_per_character']:.3f} bits",
                flush=True,
            )
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
