"""Measure the states of a sequence from flow to flow, on a text and on samples.

    python examples/latent_evolution.py runs/demo/model --data my.txt
    python examples/latent_evolution.py runs/demo/model --data my.txt --figure evolution.svg --output evolution.json

For each state: the mean norm, the mean cosine of two tokens, the participation ratio (in how many
directions they vary) and how far the flow has moved their centre; mean and standard deviation over
the sequences.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from tarflow_hf.baseline import is_discrete
from tarflow_hf.data import PackedTokens, held_out_documents, output_file
from tarflow_hf.evaluation import (
    cut_text,
    evolution_of_samples,
    evolution_of_text,
    provenance_of,
)
from tarflow_hf.loading import load_checkpoint
from tarflow_hf.report import evolution_table, plot_evolution


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument(
        "--data",
        required=True,
        help="a file of text or documents, or python-docs or a dataset: its test split",
    )
    parser.add_argument("--text_column", default="text", help="of a file of documents or a dataset")
    parser.add_argument("--num_sequences", type=int, default=64, help="of the text, and samples")
    parser.add_argument("--length", type=int, help="of a sequence, in tokens; default: the model's")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=output_file, help="write the measures here, as JSON")
    parser.add_argument("--figure", type=Path, help="draw them here: .svg, .png or .pdf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    return parser.parse_args()


def main():
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.device)
    if is_discrete(model):
        raise ValueError(f"{arguments.checkpoint} has no flows: it is a {type(model).__name__}.")

    length = arguments.length or model.config.max_position_embeddings
    documents = held_out_documents(arguments.data, arguments.text_column)
    tokens = PackedTokens(documents, tokenizer, length).tokens
    sequences = cut_text(tokens[: len(tokens) // length * length], length)

    options = {"batch_size": arguments.batch_size, "seed": arguments.seed, "progress": True}
    evolutions = {
        "text": evolution_of_text(
            model, sequences, max_sequences=arguments.num_sequences, **options
        ),
        "samples": evolution_of_samples(model, arguments.num_sequences, length, **options),
    }
    for name, evolution in evolutions.items():
        print(
            f"{name}: {evolution.num_sequences} sequences of {length} tokens\n{evolution_table(evolution)}\n"
        )

    if arguments.output is not None:
        origin = provenance_of(model, arguments.checkpoint, arguments.data, documents)
        measures = {name: asdict(evolution) for name, evolution in evolutions.items()}
        arguments.output.write_text(
            json.dumps(origin | measures, indent=2) + "\n", encoding="utf-8"
        )

    if arguments.figure is not None:
        directions = [flow["direction"] for flow in model.config.flows]
        plot_evolution(evolutions, directions).savefig(arguments.figure)


if __name__ == "__main__":
    main()
