"""Print the text that every flow's state decodes to, from noise to final text, with changes marked.

    python examples/show_passes.py runs/demo/model
    python examples/show_passes.py runs/demo/model --prompt "the function returns" --html passes.html
    python examples/show_passes.py runs/demo/model --text "a text of your own, and the noise it goes to"

In a terminal changes are in reverse video, elsewhere in brackets.
"""

import argparse
import sys
from pathlib import Path

import torch

from tarflow_hf.loading import load_checkpoint
from tarflow_hf.report import SEED, draw_passes, few_changes, passes_page, passes_text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder, or a repository of the Hub")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--prompt", default="", help="text to continue")
    start.add_argument(
        "--text",
        default="",
        help="show how this text comes from its own noise, instead of a sample",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, help="default: as long as the model was made for"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="standard deviation of the noise"
    )
    parser.add_argument("--html", type=Path, help="write a page here, too")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    return parser.parse_args()


def main():
    arguments = parse_arguments()
    model, tokenizer = load_checkpoint(arguments.checkpoint, arguments.device)

    options = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    passes = draw_passes(
        model, tokenizer, arguments.text, arguments.prompt, arguments.seed, **options
    )

    print(passes_text(passes, tokenizer, color=sys.stdout.isatty()))
    if note := few_changes(passes):
        print(f"\n{note}")

    if arguments.html is not None:
        arguments.html.write_text(
            passes_page(passes, tokenizer, f"From noise to text: {arguments.checkpoint}"),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
