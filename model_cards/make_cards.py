"""Writes the model card of every recipe of a TarFlowLM, from the recipe and, where there is one,
its evaluation.

    PYTHONPATH=src python model_cards/make_cards.py

A recipe that was run to its end has `results/RECIPE.json`, as `examples/evaluate.py --output`
writes it. Without that a card says that there are no weights, and gives no results. The text of all
cards is `src/tarflow_hf/model_card.md`.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from tarflow_hf import TarFlowLMConfig
from tarflow_hf.hub import model_card

FOLDER = Path(__file__).parent
RECIPES = FOLDER.parent / "examples" / "recipes"
VOCABULARY_SIZES = {"text8": 27, "gpt2": 50257}  # of the recipes' tokenizers


def recipe_card(name: str) -> ModelCard | None:
    """The card of a recipe; None of a discrete model's, which is the library's own."""
    recipe = json.loads((RECIPES / f"{name}.json").read_text())
    options = recipe["options"]
    if options.get("model") == "ar":
        return None

    results = FOLDER / "results" / f"{name}.json"
    evaluation = json.loads(results.read_text()) if results.exists() else None
    return model_card(
        TarFlowLMConfig(vocab_size=VOCABULARY_SIZES[options["tokenizer"]], **recipe["config"]),
        {**options, "command": f"accelerate launch examples/train.py --recipe {name}"},
        evaluation,
        repo_id=f"USER/tarflowlm-{name.replace('_', '-')}",
        description=recipe["description"],
        is_trained=evaluation is not None,
    )


def main():
    for path in sorted(RECIPES.glob("*.json")):
        card = recipe_card(path.stem)
        if card is not None:
            card.save(FOLDER / f"{path.stem}.md")


if __name__ == "__main__":
    main()
