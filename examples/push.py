"""Publish a checkpoint on the Hub, with its card; it is loaded back before success is reported.

    hf auth login                                                          # once, with a token that may write
    python examples/push.py runs/demo/model USER/NAME --private
    python examples/push.py runs/demo/model USER/NAME --evaluation evaluation.json --tag v1.0
    python examples/push.py runs/demo/model USER/NAME --print_card         # only shows the card

`examples/evaluate.py --output evaluation.json` writes the results that go onto the card.
"""

import argparse
from pathlib import Path

from tarflow_hf.data import read_json
from tarflow_hf.hub import model_card, publish
from tarflow_hf.loading import load_checkpoint


def parse_arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("checkpoint", help="a folder")
    parser.add_argument("repo_id", help="USER/NAME or ORGANIZATION/NAME")
    parser.add_argument("--recipe", type=Path, help="the recipe it was trained by, for the card")
    parser.add_argument("--evaluation", type=Path, help="results, for the card")
    parser.add_argument("--private", action="store_true", default=None, help="if it is new")
    parser.add_argument("--branch", default="main")
    parser.add_argument("--tag", help="a name for this version")
    parser.add_argument("--print_card", action="store_true", help="show the card only")

    return parser.parse_args()


def main():
    arguments = parse_arguments()
    recipe = read_json(arguments.recipe) if arguments.recipe else None
    evaluation = read_json(arguments.evaluation) if arguments.evaluation else None
    model, tokenizer = load_checkpoint(arguments.checkpoint)
    training, text = None, ""

    if recipe is not None:
        command = f"accelerate launch examples/train.py --recipe {arguments.recipe.stem}"
        training = {**recipe.get("options", {}), "command": command}
        text = recipe.get("description", "")

    names = {"repo_id": arguments.repo_id, "description": text}
    card = model_card(model.config, training, evaluation, **names)
    if arguments.print_card:
        print(card)
        return

    options = {"private": arguments.private, "branch": arguments.branch, "tag": arguments.tag}
    print(publish(model, tokenizer, arguments.repo_id, card=card, **options).commit_url)


if __name__ == "__main__":
    main()
