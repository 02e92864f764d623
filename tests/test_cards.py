"""Model cards: the metadata, the code on them, and the committed ones.

No number on a card comes from nowhere.
"""

import json
import re
import runpy

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import tarflow_hf
from helpers import ROOT
from helpers.checkpoints import MIX_1, MIX_D, WITHIN_PATCH, make
from helpers.local_hub import card_errors
from helpers.models import flow
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.hub import model_card
from tarflow_hf.training import save_model

RECIPES = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROOT / "examples" / "recipes").glob("*.json"))
}

CARDS = {path.stem: path for path in (ROOT / "model_cards").glob("*.md")}
RESULTS = {path.stem for path in (ROOT / "model_cards" / "results").glob("*.json")}

EVALUATION = {
    "command": "python examples/evaluate.py runs/demo/model --data held-out.txt --output evaluation.json",
    "date": "2026-01-02",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "data": "held-out.txt",
    "elbo_nats_per_token": 1.40625,
    "elbo_standard_error": 0.0234,
    "perplexity_per_word": None,
    "num_tokens": 16384,
    "bits_per_character": 2.0288,
    "seconds": 77,
}


@pytest.fixture(scope="module")
def model():
    return make(flows=[MIX_D, MIX_1])


def test_the_evaluation_becomes_the_table_and_the_model_index(model):
    card = model_card(model.config, {"dataset": "afmck/text8"}, EVALUATION, repo_id="USER/mine")
    assert list(card_errors(str(card))) == []
    again = ModelCard(str(card)).data
    assert {result.metric_type: result.metric_value for result in again.eval_results} == {
        "elbo_nats_per_token": 1.40625,
        "bits_per_character": 2.0288,
    }
    assert (again.model_name, again.library_name, again.pipeline_tag) == (
        "mine",
        "transformers",
        "text-generation",
    )
    assert again.datasets == ["afmck/text8"] and again.license == "apache-2.0"

    for part in [
        "1.406 ± 0.023",
        "| 16,384 |",
        "| 2.029 |",
        EVALUATION["command"],
        "2026-01-02",
        "torch 2.13.0, transformers 5.23.0",
    ]:
        assert part in card.text

    assert "77" not in card.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"command": None}, "needs its command"),
        ({"date": ""}, "needs its date"),
        (
            {"bits_per_character": float("nan")},
            "bits_per_character must be a finite number, not nan",
        ),
        ({"bits_per_character": "low"}, "must be a finite number, not 'low'"),
    ],
)
def test_an_evaluation_that_backs_nothing_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model_card(model.config, evaluation={**EVALUATION, **change})


def test_results_need_figures(model):
    with pytest.raises(ValueError, match="none of the figures"):
        model_card(model.config, evaluation={"command": "x", "date": "y", "seconds": 3})


@pytest.mark.parametrize(
    "training, expected, absent",
    [
        ({}, "was not recorded", "Data:"),
        (
            {"dataset": "python-docs", "tokenizer": "text8"},
            "inside Python's standard library",
            "datasets:",
        ),
        ({"dataset": "texts/my.txt"}, "Data: `my.txt`", "texts/"),
        ({"num_steps": 7, "stage_steps": [5, 2]}, "| steps of each stage | [5, 2] |", "| steps |"),
        (
            {"num_steps": 7, "ema_decay": None, "command": "make train"},
            "```bash\nmake train\n```",
            "decay of averaged",
        ),
    ],
)
def test_training_is_told_as_it_was(model, training, expected, absent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "my.txt").write_text("text")
    card = str(model_card(model.config, training))
    assert expected in card and absent not in card and "None |" not in card


@pytest.mark.parametrize(
    "options, prompts",
    [
        ({"flows": [MIX_D, MIX_1]}, "by an approximation"),
        ({"flows": [MIX_D], "patch_size": 2}, "continues a prompt exactly"),
        ({"flows": [flow("affine", WITHIN_PATCH)], "patch_size": 4}, "continues a prompt exactly"),
        ({"flows": [MIX_D, MIX_1], "conditional": True}, "made to be told some of the tokens"),
    ],
    ids=["flows", "patches", "within patches", "conditional"],
)
def test_the_code_on_a_card_runs(tmp_path, capsys, options, prompts):
    model = make(**options)
    save_model(model, character_tokenizer(), tmp_path / "model")
    card = str(model_card(model.config, repo_id="USER/mine"))
    assert prompts in card and f"{model.num_parameters():,} parameters" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    namespace = {}
    exec(code.replace('"USER/mine"', repr(str(tmp_path / "model"))), namespace)
    assert namespace["tokens"].shape == (2, 16) and "nats per token" in capsys.readouterr().out
    assert namespace["nats"].item() > 0


@pytest.fixture(scope="module")
def recipe_card():
    return runpy.run_path(str(ROOT / "model_cards" / "make_cards.py"))["recipe_card"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_card_that_the_hub_takes(recipe_card, recipe):
    """It is made when the model is published, with figures where there is an evaluation."""
    card = recipe_card(recipe)
    if RECIPES[recipe]["options"].get("model") == "ar" or "conversion" in RECIPES[recipe]:
        assert card is None
        return

    assert list(card_errors(str(card))) == []
    assert f"--recipe {recipe}\n" in str(card) and RECIPES[recipe]["description"] in str(card)
    assert ("model-index" in str(card)) is (recipe in RESULTS)
    assert ("None are on record." in str(card)) is (recipe not in RESULTS)


def test_committed_cards_are_those_of_models_that_exist(recipe_card):
    """`python model_cards/make_cards.py` writes them."""
    assert set(CARDS) == RESULTS and "python_docs" in RESULTS
    for name, path in CARDS.items():
        assert path.read_text() == str(recipe_card(name))


def test_a_shipped_checkpoint_has_its_card():
    for path in (ROOT / "checkpoints").iterdir():
        card = (path / "README.md").read_text()
        assert card == CARDS[path.name.replace("-", "_")].read_text()

        config = TarFlowLMConfig.from_pretrained(path)
        recipe = RECIPES[path.name.replace("-", "_")]["config"]
        assert {name: getattr(config, name) for name in recipe if name != "flows"} == {
            name: value for name, value in recipe.items() if name != "flows"
        }
        with torch.device("meta"):
            num_parameters = TarFlowLMModel(config).num_parameters()
        assert f"\n{num_parameters:,} parameters" in card


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == tarflow_hf.__version__ and citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    card = (ROOT / "src" / "tarflow_hf" / "model_card.md").read_text()
    assert paper["title"] in card
    assert all(
        f"{author['family-names']}, {author['given-names']}" in card for author in paper["authors"]
    )
