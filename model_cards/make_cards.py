"""Writes the model cards of the models that exist, each from its recipe and its evaluation.

    PYTHONPATH=src python model_cards/make_cards.py

A recipe that was run to its end has `results/RECIPE.json`, as `examples/evaluate.py --output`
writes it. The card of any other model is made when it is published: `examples/train.py
--push_to_hub`, `examples/push.py`. The text of all cards is `src/tarflow_hf/model_card.md`.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from tarflow_hf import TarFlowLMConfig
from tarflow_hf.hub import model_card

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
RECIPES = FOLDER.parent / "examples" / "recipes"
# Of the recipes' tokenizers, or of the data that bring one.
VOCABULARY_SIZES = {
    "text8": 27,
    "gpt2": 50257,
    "python-docs": 27,
    "ptb": 50,
    "doyle/tokenizer": 1024,
}


def recipe_card(name: str) -> ModelCard | None:
    """The card of a recipe's model.

    A discrete model has none: it is the library's own. Neither has a recipe that starts from any
    other model: its card names that one, when it is saved.
    """
    recipe = json.loads((RECIPES / f"{name}.json").read_text(encoding="utf-8"))
    options = recipe["options"]
    if options.get("model") == "ar" or "conversion" in recipe:
        return None

    tokenizer = options.get("tokenizer") or options["dataset"].partition(":")[0]
    results = RESULTS / f"{name}.json"
    evaluation = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    return model_card(
        TarFlowLMConfig(vocab_size=VOCABULARY_SIZES[tokenizer], **recipe["config"]),
        {**options, "command": f"accelerate launch examples/train.py --recipe {name}"},
        evaluation,
        repo_id=f"USER/tarflowlm-{name.replace('_', '-')}",
        description=recipe["description"],
    )


def main():
    for results in sorted(RESULTS.glob("*.json")):
        recipe_card(results.stem).save(FOLDER / f"{results.stem}.md")


if __name__ == "__main__":
    main()
