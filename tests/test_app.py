"""The demo page without a browser: the functions behind its buttons, and its Space's files."""

import re
from runpy import run_path

import pytest
from huggingface_hub import metadata_load
from huggingface_hub.utils import filter_repo_objects

from helpers import ROOT
from helpers.models import STACKS, separated
from helpers.pages import written
from tarflow_hf.data import character_tokenizer

gradio = pytest.importorskip("gradio", minversion="6")


@pytest.fixture(scope="module")
def app():
    return run_path(str(ROOT / "examples" / "app.py"))


def endpoints(blocks):
    """Returns {name: (function, components of its inputs)} of the public functions."""
    return {
        f.api_name: (f.fn, [type(x).__name__ for x in f.inputs])
        for f in blocks.fns.values()
        if f.api_visibility == "public"
    }


@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "affine"])
def test_the_buttons(app, stack):
    blocks = app["page"](separated(STACKS[stack]), character_tokenizer(), "a name")
    calls = endpoints(blocks)
    assert set(calls) == {"write", "score", "edit"}
    write, inputs = calls["write"]
    assert inputs == ["Textbox", "Slider", "Slider", "Number"] + ["Slider"] * 3
    (answer,) = write(TEXT, 8, 1, None, 1, 1, 2)  # None: the box of the seed is empty
    assert written(answer).startswith(TEXT)
    *parts, answer = write(TEXT, 8, 1, None, 1, 1, 1)
    assert parts and all('class="guess"' in part for part in parts) and "Likelihood" in answer
    assert '<p class="message" role="alert">' in list(write("a" * 40, 8, 1, None, 1, 1, 1))[-1]
    assert "Likelihood" in calls["score"][0](TEXT) and "dropped" not in calls["score"][0](TEXT)
    said = (
        "1 of 8 characters of your text (12.5%) are dropped by the tokenizer, such as &#39;!&#39;."
    )
    for answer in (calls["score"][0]("The fox!"), calls["edit"][0]("The fox!", "fox", 4, 1, 0)):
        assert answer.startswith(f'<p class="note">{said}</p>')
    assert said in list(write("The fox!", 8, 1, None, 1, 1, 2))[-1]
    assert "Before" in calls["edit"][0](TEXT, "fox", 4, 1, 0)
    shown = [
        x.visible
        for x in blocks.blocks.values()
        if "mixture weights" in str(getattr(x, "label", ""))
    ]
    assert shown == [stack != "affine"] * 2


def test_errors_are_messages(app):
    calls = endpoints(app["page"](separated(STACKS["mix-d"]), character_tokenizer(), "a name"))
    assert calls["score"][0]("a" * 40) == (
        '<p class="message" role="alert">The text has 40 tokens, and there is room for 32: make it shorter.</p>'
    )
    hostile = app["friendly"](lambda: int("<script>"))()
    assert "&lt;script&gt;" in hostile and "<script>" not in hostile


def test_a_selection_fills_the_part(app):
    event = lambda value, index: gradio.SelectData(None, {"value": value, "index": index})  # noqa: E731
    assert app["selected"](event("fox", [4, 7])) == ("fox", 4)
    assert app["selected"](event("", [4, 4])) == (gradio.skip(), gradio.skip())


def test_the_space():
    space = ROOT / "spaces"
    metadata = metadata_load(space / "README.md")
    assert (
        metadata["sdk"] == "gradio"
        and metadata["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    )
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {metadata["colorFrom"], metadata["colorTo"]} <= colors and len(
        metadata["short_description"]
    ) <= 60
    uploads = dict(
        re.findall(
            r"^hf upload USER/SPACE (\S+) (\S+)", (space / "README.md").read_text(), re.MULTILINE
        )
    )
    assert all((ROOT / source).exists() for source in uploads)
    assert set(uploads.values()) == {"tarflow_hf", metadata["app_file"], "."}
    assert {
        re.split("[>=<]", line)[0]
        for line in (space / "requirements.txt").read_text().splitlines()[1:]
    } == {
        "torch",
        "transformers",
    }


def test_pages_are_uploaded_to_the_space_with_the_code():
    (upload,) = re.findall(
        "^hf upload USER/SPACE src/tarflow_hf .*", (ROOT / "spaces/README.md").read_text(), re.M
    )
    patterns = re.findall(r'--include "(.*?)"', upload)
    source = ROOT / "src/tarflow_hf"
    needed = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    needed |= {str(path.relative_to(source)) for path in source.rglob("templates/**/*.*")}
    assert {"report/demo.py", "report/templates/style.css"} < needed
    assert set(filter_repo_objects(needed, allow_patterns=patterns)) == needed


TEXT = "the fox is red"
