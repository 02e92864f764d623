"""Fill the gaps in a text: each run of underscores stands for as many tokens.

    python examples/infill.py runs/demo/model "the function ________ a list of strings"
    python examples/infill.py USER/NAME "it ____ a ____ of strings" --num_samples 4 --seed 1

Exact with a model that was trained with `conditional: true`; with others an approximation, about
which `generate` warns. Each piece between gaps is tokenized on its own; where a model takes several
tokens a patch, gaps are whole ones.
"""

import argparse
import re

import torch
from transformers import set_seed

from tarflow_hf.data import continued_ids, say_what_is_lost, token_ids
from tarflow_hf.loading import load_checkpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    parser.add_argument("text", help="with gaps: ____")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)

    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if "_" not in arguments.text:
        raise ValueError("The text has no gap: write an underscore for each token that is missing.")

    set_seed(arguments.seed)
    model, tokenizer = load_checkpoint(arguments.checkpoint)

    ids, is_gap = [], []
    for piece in re.findall("_+|[^_]+", arguments.text):
        read = continued_ids if ids else token_ids
        piece_ids = [0] * len(piece) if piece[0] == "_" else read(tokenizer, piece)
        ids += piece_ids
        is_gap += [piece[0] == "_"] * len(piece_ids)

    say_what_is_lost(tokenizer, [arguments.text.replace("_", "")])
    filled = model.generate(
        torch.tensor([ids]),
        infill_mask=torch.tensor([is_gap]),
        num_return_sequences=arguments.num_samples,
    )
    print("\n".join(tokenizer.batch_decode(filled)))


if __name__ == "__main__":
    main()
