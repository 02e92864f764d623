"""The README and the pages: their Python runs, their commands and the things they name exist."""

import json
import re
import runpy
import sys

import pytest

from helpers import ROOT
from tarflow_hf.modeling.coupling_heads import COUPLING_HEADS

TOUR = ROOT / "docs" / "tour.ipynb"
README = (ROOT / "README.md").read_text()
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


PAGES_WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


# --------------------------------------------------------------------------------------------------
# Python
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The current directory: what the pages read of the repository, and room for what they write."""
    for name in ("checkpoints", "examples", "metrics"):
        (tmp_path / name).symlink_to(ROOT / name)

    monkeypatch.chdir(tmp_path)
    known = dict(COUPLING_HEADS)
    yield
    COUPLING_HEADS.clear()  # a page adds a coupling
    COUPLING_HEADS.update(known)


def test_pages_have_python():
    assert {"README.md", "docs/index.md", "docs/sampling.md"} <= set(PAGES_WITH_PYTHON)


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON)
def test_every_python_block(page, tree):
    """The blocks of a page run one after the other. One that cannot says so in its first line."""
    namespace = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        code = compile(block, f"{page}, block {number}", "exec")
        if not block.startswith("# Not run by the tests: "):
            exec(code, namespace)


@pytest.fixture(scope="module")
def notebook():
    """The functions of docs/notebook.py."""
    return runpy.run_path(str(ROOT / "docs" / "notebook.py"))


def test_the_tour_runs(notebook, tree, capsys):
    pytest.importorskip("matplotlib")
    tour = json.loads(TOUR.read_text())
    notebook["run"](tour)
    outputs = [output for cell in tour["cells"] for output in cell.get("outputs", [])]
    printed = "".join("".join(output.get("text", [])) for output in outputs)

    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert "0.98  the function returns a list of strings" in printed
    assert any(
        "the function returns a list of strings" in "".join(output["data"].get("text/plain", []))
        for output in outputs
        if "data" in output
    )


def test_the_tour_is_committed_with_its_outputs():
    text = TOUR.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells) and len(text) < 300_000
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text)


def test_a_notebook_keeps_what_its_cells_show(notebook):
    pytest.importorskip("matplotlib")
    sources = [
        "a = 2\nprint(a)\na + 1",
        "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1))",
        "a",
    ]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    notebook["run"](page := {"cells": [{"cell_type": "markdown", "source": ["# A"]}, *cells]})
    assert [[sorted(output) for output in cell["outputs"]] for cell in cells] == [
        [["name", "output_type", "text"], ["data", "execution_count", "metadata", "output_type"]],
        [["data", "metadata", "output_type"]],
        [["data", "execution_count", "metadata", "output_type"]],
    ]
    markdown = notebook["to_markdown"](page)
    assert markdown.startswith("# A\n\n```python\na = 2\n") and "```text\n3\n```" in markdown
    assert "](data:image/png;base64," in markdown


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------


def scripts_and_options(page: str) -> list[tuple[str, set[str]]]:
    """The scripts that a page's commands start, each with the options it is given."""
    text = (ROOT / page).read_text()
    commands = "\n".join([*blocks(page, "bash"), *re.findall(r"`([^`\n]+)`", text)])
    found = []

    for line in commands.splitlines():
        script = re.search(r"(?:examples|benchmarks)/[\w/]+\.py", line)
        if script:
            arguments = line[script.end() :].partition("#")[0]
            found.append((script[0], set(re.findall(r"--(\w+)", arguments))))

    return found


def options_of(script: str) -> set[str]:
    """The words of a script, and for those that take them the fields of its dataclasses."""
    from transformers import TrainingArguments

    from tarflow_hf.training import TrainingConfig

    text = (ROOT / script).read_text()
    options = set(re.findall(r"\w+", text))
    for dataclass in (TrainingConfig, TrainingArguments):
        if dataclass.__name__ in text:
            options |= set(dataclass.__dataclass_fields__)

    return options


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_command_exists(page):
    for script, options in scripts_and_options(page):
        assert options <= options_of(script), script


# --------------------------------------------------------------------------------------------------
# Names and links
# --------------------------------------------------------------------------------------------------

PLACES = (
    "",
    "src/tarflow_hf",
    "src/tarflow_hf/modeling",
    "examples",
    "examples/accelerate",
    "benchmarks",
    "tests",
    "docs",
)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text()
    code = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w./-]+\.(?:cff|md|py|toml|yaml))`", text))
    named |= set(
        re.findall(
            r"\b(?:examples|benchmarks|src|tests)/[\w./-]+\.(?:json|py|yaml)\b", "".join(code)
        )
    )

    missing = [
        name for name in named if not any((ROOT / place / name).exists() for place in PLACES)
    ]
    assert not missing
    assert page != "docs/training.md" or len(named) > 5


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", (ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_test_that_is_named_exists():
    """A promise in a docstring or on a page names the test that shows it."""
    texts = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    texts += [(ROOT / page).read_text() for page in PAGES]
    named = {name for text in texts for name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)}
    assert len(named) >= 10

    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), (path, test)


def test_every_recipe_is_on_the_page_of_training():
    page = (ROOT / "docs" / "training.md").read_text()
    recipes = {path.stem for path in (ROOT / "examples" / "recipes").glob("*.json")}
    assert recipes <= set(re.findall(r"`(\w+)`", page))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 9500
    assert "make train" in README and "make test" in README


# --------------------------------------------------------------------------------------------------
# The site
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conf():
    path = list(sys.path)
    yield runpy.run_path(str(ROOT / "docs" / "conf.py"))
    sys.path[:] = path


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("log|det| is 2 * x", r"log\|det\| is 2 \* x"),
        ("`a|b * c_` and ``d_``", "`a|b * c_` and ``d_``"),
        ("all `Flow`s of output_...", r"all `Flow`\ s of output\_..."),
        ("*A title*, **loud**, [`Pass`]", "*A title*, **loud**, `Pass`"),
    ],
)
def test_docstrings_are_plain_text(conf, text, escaped):
    assert conf["escape"](text) == escaped


def test_formulas_tables_and_doctests_of_docstrings_are_shown_as_they_stand(conf):
    lines = [
        "A sum,",
        "",
        "    y = |x| * 2",
        "",
        "| a | b |",
        "",
        "Returns:",
        "    `y`: not a type.",
        "",
        "Example:",
        "    >>> a * b",
        "    6",
    ]
    conf["plain_docstring"](None, "function", "f", None, None, lines)
    assert lines == [
        "A sum,",
        "",
        "::",
        "",
        "    y = |x| * 2",
        "",
        "::",
        "",
        "    | a | b |",
        "",
        "Returns:",
        "    : `y`: not a type.",
        "",
        "Example:",
        "    >>> a * b",
        "    6",
        "",
    ]


def test_a_formula_in_a_list_belongs_to_its_item(conf):
    lines = ["1. One.", "2. The ratio", "", "       y = a / b", "", "   of two.", "", "10. Ten."]
    conf["plain_docstring"](None, "function", "f", None, None, lines)
    assert lines == [
        "1. One.",
        "2. The ratio",
        "",
        "   ::",
        "",
        "       y = a / b",
        "",
        "   of two.",
        "",
        "10. Ten.",
        "",
    ]


def test_every_page_is_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    contents = set(re.findall(r"^(\w+)$", index, re.MULTILINE))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} | {TOUR.stem}
    assert pages <= contents


def test_figures_are_those_that_the_code_draws(tmp_path, monkeypatch, capsys):
    """Not to the byte, which depends on fonts."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["figures.py", "--output", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "figures.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    committed = {path.name for path in (ROOT / "docs" / "images").iterdir()}

    assert drawn == committed and len(drawn) >= 4
    for name in drawn:
        size = (tmp_path / name).stat().st_size
        assert 0.7 < size / (ROOT / "docs" / "images" / name).stat().st_size < 1.4
