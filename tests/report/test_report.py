"""The report is a whole page, with the numbers of its commands.

It is readable without eyes and without a network.
"""

import itertools
import re
import runpy
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from helpers.models import STACKS, make
from tarflow_hf.data import character_tokenizer, held_out_documents, load_splits, sources
from tarflow_hf.evaluation import Sample, SampleEvaluation, provenance_of
from tarflow_hf.report import Section, Table, report_page, samples_section
from tarflow_hf.training import save_model

pytest.importorskip("matplotlib")

VOID = {"meta", "br"}
NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\u202e\x00\x1b[31m\u2067"

TEXT = (
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm light of the sun "
    * 6
)


class Page(HTMLParser):
    """A page's elements in their order, each [tag, attributes, text inside].

    Asserts that every element ends in its place.
    """

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for element in self.open:
            element[2] += text

    def of(self, *tags):
        return [element for element in self.elements if element[0] in tags]

    def texts(self, *tags):
        return [text for _, _, text in self.of(*tags)]


def check(page: str) -> Page:
    """Returns the page, after the checks that every report must pass."""
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>\n") and parsed.elements[0][:2] == [
        "html",
        {"lang": "en"},
    ]
    levels = [int(tag[1]) for tag, *_ in parsed.of("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    inner = re.findall(r"url\(#([^)]*)\)", page)

    for (
        _,
        attributes,
        _,
    ) in parsed.elements:  # nothing is loaded, and every reference leads somewhere
        assert not {"src", "srcset", "data", "action"} & set(attributes)
        for name in ("href", "xlink:href"):
            inner += [attributes[name].removeprefix("#")] if name in attributes else []
            assert attributes.get(name, "#").startswith("#")

        inner += attributes.get("aria-labelledby", "").split()
        assert not any(name.startswith("on") for name in attributes)

    assert set(inner) <= set(ids)
    assert not {"script", "link", "img", "iframe", "object", "metadata"} & {
        tag for tag, *_ in parsed.elements
    }
    assert (
        page.count("url(") == page.count("url(#")
        and "@import" not in page
        and "<style" not in page.split("</head>")[1]
    )
    assert "prefers-color-scheme: dark" in page and "#000000" not in page.split("</head>")[1]

    for start in re.split(r"(?=<table>)", page)[1:]:
        cells = Page(start[: start.index("</table>") + 8])
        assert cells.elements[1][0] == "caption" and cells.elements[1][2]
        assert {attributes.get("scope") for _, attributes, _ in cells.of("th")} == {"col", "row"}

    for start in re.split(r"(?=<svg )", page)[1:]:
        svg = Page(start[: start.index("</svg>") + 6])
        (_, attributes, _), title, description = svg.elements[:3]
        assert attributes["role"] == "img" and (title[0], description[0]) == ("title", "desc")
        assert attributes["aria-labelledby"] == f"{title[1]['id']} {description[1]['id']}"
        assert title[2] and re.search(r"\d", description[2])

    return parsed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints and a text."""
    path = tmp_path_factory.mktemp("report")
    model = make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27, noise=0.3).float()
    save_model(model, character_tokenizer(), path / "flow")
    save_model(data_free_baseline(model), character_tokenizer(), path / "discrete")
    (path / "text.txt").write_text(TEXT)

    return path


def data_free_baseline(model):
    from tarflow_hf.training import discrete_baseline

    torch.manual_seed(0)
    return discrete_baseline(model.config)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def script(name, *words):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return script


OPTIONS = [
    "--data",
    "text.txt",
    "--max_sequences",
    5,
    "--bound_samples",
    2,
    "--num_samples",
    4,
    "--device",
    "cpu",
]


def commands(page: Page) -> dict[str, list[str]]:
    words = [shlex.split(text) for text in page.texts("code")]
    return {words[1].removeprefix("examples/"): words[2:] for words in words}


def test_a_report_and_its_commands_agree(run, folder):
    run("report.py", "flow", *OPTIONS, "--show_samples", 2, "--show_passes", 1)
    page = check((folder / "report.html").read_text())
    found = commands(page)
    names = [
        "evaluate.py",
        "evaluate_samples.py",
        "show_passes.py",
        "latent_evolution.py",
        "flops.py",
        "report.py",
    ]
    assert sorted(Path(name).name for name in found) == sorted(names)
    rows = [row.strip("\n") for row in page.texts("tr")]
    cells = {
        cell
        for row in re.findall("<tr>.*?</tr>", (folder / "report.html").read_text())
        for cell in Page(row).texts("td")
    }
    assert len(page.of("svg")) == 5 and len(page.of("table")) == 12 and len(rows) > 40

    printed = run("evaluate.py", *found["evaluate.py"])
    for line in printed.splitlines()[
        1:3
    ]:  # the two bounds: everything the table of the command has
        numbers = re.split(r"\s{2,}", line)[1:]
        assert len(numbers) == 5 and set(numbers) <= cells

    assert re.search(r"reconstruction: (\S+)", printed)[1] in cells
    assert set(re.search(r"scales (\S+) to (\S+), mean (\S+)", printed).groups()) <= cells

    printed = run("evaluate_samples.py", *found["evaluate_samples.py"])
    for line in printed.splitlines()[1:8]:
        assert set(re.split(r"\s{2,}", line)[1:]) <= cells

    assert "entropy" in printed.splitlines()[1] and "were not measured" in printed.splitlines()[8]
    assert "not measured" in cells
    warnings = [
        text for _, attributes, text in page.of("p") if attributes.get("class") == "warning"
    ]
    assert printed.splitlines()[9:] == warnings
    samples = (folder / "report-samples.jsonl").read_text()
    shown = [text for _, attributes, text in page.of("p") if attributes.get("class") == "sample"]
    assert len(shown) == 2 and all(f'"text": "{text}"' in samples for text in shown)

    printed = run("latent_evolution.py", *found["latent_evolution.py"])
    pairs = re.findall(r"\S+ ± \S+", printed)
    assert len(pairs) == 2 * (4 * 4 - 1) and set(pairs) <= cells
    printed = run("flops.py", *found["flops.py"])
    assert all(set(line.split()[1:]) <= cells for line in printed.splitlines()[-2:])

    passes = [text for _, attributes, text in page.of("p") if attributes.get("class") == "text"]
    printed = run("show_passes.py", *found["show_passes.py"])  # the last: the beginning of the text
    assert re.sub(r"[\[\]]", "", printed).split("\n")[1::3] == passes[-4:]
    assert TEXT[:18] in found["show_passes.py"]


def test_a_discrete_model_has_no_flow_sections(run, folder):
    run("report.py", "discrete", *OPTIONS, "--output", "discrete.html")
    page = check((folder / "discrete.html").read_text())
    assert page.texts("h2") == ["The model", "Likelihood of held-out text", "Samples", "Origin"]
    assert "exact" in page.texts("thead")[1] and not page.of("svg")
    assert page.texts("main")[0].count("upper bound") == 0
    printed = run("evaluate.py", *commands(page)["evaluate.py"])
    assert set(re.split(r"\s{2,}", printed.splitlines()[1])[1:]) <= set(page.texts("td"))


def test_hostile_text_stays_text(folder):
    model = make(STACKS["affine"])
    numbers = dict.fromkeys(
        ("entropy", "entropy_std", "distinct_1", "distinct_2", "distinct_3", "repetition_4"), 0.5
    )
    evaluation = SampleEvaluation(
        **{**provenance_of(model, HOSTILE, None), "data": HOSTILE},
        **dict(
            num_samples=1,
            length=3,
            seed=0,
            generate_options={},
            judge=HOSTILE,
            mauve=0.5,
            mauve_scale=5.0,
        ),
        **dict(
            generative_perplexity=2.0, generative_nats_per_token=1.0, generative_standard_error=None
        ),
        **dict(text_perplexity=2.0, warnings=[HOSTILE]),
        **numbers,
        **{f"text_{name}": value for name, value in numbers.items()},
    )
    section = samples_section(
        evaluation, [Sample([1], HOSTILE)], f"python x --text {shlex.quote(HOSTILE)}"
    )
    whole = report_page(HOSTILE, HOSTILE, [section, Section("hostile", HOSTILE, HOSTILE)])
    assert not NOT_PRINTABLE.search(whole)
    page = check(whole)
    for tag in ("title", "h1", "caption", "code"):
        assert "<script>alert(1)</script><img" in page.texts(tag)[0]

    shown = [text for _, attributes, text in page.of("p") if attributes.get("class") == "sample"]
    assert shown == [NOT_PRINTABLE.sub("\N{REPLACEMENT CHARACTER}", HOSTILE)]
    with pytest.raises(ValueError, match="the same name"):
        report_page("a", "b", [section, Section("samples", "c", "")])

    assert "&lt;" in Table(["<", "<"], [["<", "<"]], "<").to_html()
    assert "&lt;" in report_page("a", "b", [Section("d", "c", "<b>")])  # a body that is no Markup


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flow", "--data", "missing.txt"], "There is no file or folder missing.txt"),
        ([".", "--data", "text.txt"], "^. is no checkpoint: it has no config.json"),
        (["nowhere/at/all", "--data", "text.txt"], "nowhere/at/all"),
        (["flow", *OPTIONS, "--num_samples", 999], "fewer than the 999 samples"),
    ],
    ids=["no data", "no model", "no folder", "too short"],
)
def test_what_is_missing_is_said(run, words, message, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "datasets", None
    )  # which takes long to import, and would ask the Hub
    with pytest.raises((ValueError, OSError, ImportError), match=message):
        run("report.py", *words)


def test_a_corpus_is_held_out_text_by_its_test_split(run, folder, monkeypatch, tmp_path):
    documents = [f"document {number} is about the fox and the dog" for number in range(400)]
    monkeypatch.setattr(sources, "python_documentation", lambda: documents)
    held_out = held_out_documents("python-docs")
    assert held_out == load_splits("python-docs")["test"] and 15 < len(held_out) < 25
    assert held_out_documents(str(folder / "text.txt")) == [TEXT]
    model = make(STACKS["affine"])
    origin = provenance_of(model, "here", "python-docs", held_out)
    assert (
        origin["data"] == "python-docs"
        and origin["data_sha256"] != provenance_of(model, "", "python-docs", ["a"])["data_sha256"]
    )
    printed = run(
        "evaluate.py", "flow", "--data", "python-docs", "--num_samples", 1, "--device", "cpu"
    )
    total = len(character_tokenizer()(" ".join(held_out)).input_ids)
    assert printed.startswith(f"{total:,} tokens")
