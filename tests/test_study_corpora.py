"""The study on the benchmarks' corpora and on synthetic tasks: a smoke version of each."""

import json
import random
import sys

import pytest

from helpers import ROOT
from helpers.scripts import script
from tarflow_hf.data import PackedTokens, SentenceTokens, word_tokenizer

SMALL = ["--hidden_size", "32", "--num_steps", "4", "--batch_size", "4", "--latent_size", "3"]
SMALL += [
    "--test_sequences",
    "12",
    "--test_samples",
    "2",
    "--output",
    "rows.jsonl",
    "--runs",
    "checkpoints",
]
FIELDS = {"dataset", "model", "test_bits_per_character", "test_perplexity", "parameters"}
FIELDS |= {"num_steps", "seed", "machine", "command", "standard_error", "peak_memory_gib"}


@pytest.fixture
def study(monkeypatch, tmp_path, capsys):
    """Runs a script of the study in an empty folder, and returns what it prints."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "study")
    monkeypatch.chdir(tmp_path)

    def run(name, *options):
        return script(
            f"../benchmarks/study/{name}", *options, capsys=capsys, monkeypatch=monkeypatch
        )

    yield run
    for name in ("cases", "page", "report", "results", "tasks"):
        sys.modules.pop(name, None)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_penn_treebank(study, tmp_path):
    (tmp_path / "ptb").mkdir()
    lines = ["mr. <unk> rose N N to $ N", "it fell", "a stock 's index", "no one was n't black"]
    for name in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.{name}.txt").write_text(" \n ".join(3 * lines) + "\n")

    options = ["--dataset", f"ptb:{tmp_path}/ptb", "--num_tokens", "32", *SMALL]
    printed = study("run.py", "--cases", "discrete", "Mix-d", *options)
    discrete, flow = rows_of(tmp_path / "rows.jsonl")
    assert discrete.keys() >= FIELDS and discrete["dataset"] == "ptb"
    assert str(tmp_path) not in json.dumps([discrete, flow]), "a row names no folder of a machine"
    assert "--dataset ptb:FOLDER" in flow["command"] and "--cases Mix-d" in flow["command"]
    assert flow["test_bits_per_character"] <= flow["elbo_bits_per_character"] + 1e-9
    assert len(flow["bits_after_flows"]) == 3 and len(flow["validation_curve"]) == 4
    assert f"{discrete['test_bits_per_character']:.3f}, exact" in printed

    # What is divided by: the characters and the ends of the twelve test sentences.
    num_characters = 3 * sum(len(line) + 1 for line in lines)
    nats = discrete["test_bits_per_character"] * num_characters
    assert 2 * num_characters < nats < 10 * num_characters


def test_wikitext2(study, tmp_path):
    draw = random.Random(0)
    words = [f"word{index}" for index in range(30)]
    for name in ("train", "valid", "test"):
        lines = [" " + " ".join(draw.choices(words, k=9)) + " " for _ in range(40)]
        (tmp_path / f"wiki.{name}.tokens").write_text("\n".join(lines) + "\n")

    options = ["--dataset", f"wikitext2:{tmp_path}", "--num_tokens", "16", *SMALL]
    study("run.py", "--cases", "discrete", "Mix-d, one flow, equal blocks", *options)
    discrete, flow = rows_of(tmp_path / "rows.jsonl")
    assert discrete["dataset"] == flow["dataset"] == "wikitext2"
    assert 15 < discrete["test_perplexity"] < 100 > flow["test_perplexity"] > 15  # V = 32
    train = (tmp_path / "wiki.train.tokens").read_text()
    packed = PackedTokens([train], word_tokenizer([train]), 16)
    assert discrete["training_tokens"] == len(packed.tokens) == 40 * 10


def test_tasks(study, tmp_path, monkeypatch):
    from tasks import SIZES, TASKS, load_task, optimal_bits, task_tokenizer

    for name in SIZES:
        monkeypatch.setitem(SIZES, name, 20)
    lines = {name: load_task(f"task:{name}")["train"][0] for name in TASKS}
    for name in ("addition", "addition-reversed", "sum-in-front"):
        line = lines[name]
        terms, total = line.split("=") if name != "sum-in-front" else reversed(line.split("="))
        total = total[::-1] if name == "addition-reversed" else total
        assert int(total) == sum(map(int, terms.split("+")))

    front, digits = lines["checksum"].split(" ")
    assert int(front) == sum(map(int, digits)) % 10
    assert optimal_bits("task:checksum") * 10 == pytest.approx(7 * 3.321928, rel=1e-6)
    text = SentenceTokens(lines.values(), task_tokenizer())
    assert text.characters.num_lost == 0

    cases = ["Mix-d, right to left", "Mix-d, half right to left, progressive"]
    study("run.py", "--cases", *cases, "--dataset", "task:checksum", "--num_tokens", "16", *SMALL)
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row["model"] for row in rows] == cases
    assert all(row["optimal_bits_per_character"] == optimal_bits("task:checksum") for row in rows)


def test_the_page_of_results(study, tmp_path):
    """Tables by setting, means over seeds, gaps at the seeds that both models have; a picture."""
    pytest.importorskip("matplotlib")
    common = {"num_steps": 4, "batch_size": 4, "hidden_size": 32, "num_layers": 6, "num_tokens": 16}
    common |= {"parameters": 1000, "test_samples": 2, "test_sequences": 12, "standard_error": 0.01}
    common |= {"initializer_range": 0.02, "optimizer": "adamw"}
    common |= {"validation_curve": [(2, 3.0), (4, 2.0)]}

    def row(dataset, model, seed, bits, **fields):
        numbers = {"test_bits_per_character": bits, "elbo_bits_per_character": bits + 0.25}
        names = {"dataset": dataset, "model": model, "seed": seed, "test_perplexity": 100 * bits}
        return {**common, **names, **numbers, **fields}

    cuts = {"bits_after_flows": [2.5, 2.25]}
    files = {
        "ptb": [row("ptb", "discrete", 0, 2.0), row("ptb", "Mix-d", 0, 2.1, **cuts)],
        "wikitext2": [row("wikitext2", "discrete", 0, 3.0)],
        "stacks": [
            row("task:addition", "discrete", seed, 2.0, optimal_bits_per_character=1.5)
            for seed in (0, 1)
        ],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))

    (tmp_path / "page.md").write_text("# Results\n\nText.\n\n")
    for _ in range(2):  # made again, it is the same
        study("results.py", "--rows", ".", "--output", "page.md")

    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Results\n\nText.") and page.count("(page.svg)") == 1
    assert "| Mix-d | 1,000 | 1 | 2.350 | 2.100 | 2 | 0.010 | +5.00% | 2.500, 2.250 |" in page
    assert "| discrete | 1,000 | 2 |  | 2.000 ± 0.000, exact |" in page
    assert "no model can be below 1.500 bits" in page and "300.0, exact" in page
    assert "Dang et al. 2022" in page and (tmp_path / "page.svg").is_file()
