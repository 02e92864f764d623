"""The benchmarks and the study, at reduced size."""

import hashlib
import json
import re
import runpy
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, logging

from helpers import ROOT
from helpers.causal_lms import tiny_causal_lm
from helpers.scripts import script
from helpers.training import TEXT
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.data import character_tokenizer
from tarflow_hf.training import save_model

BOOK = """Before it
*** START OF THIS PROJECT GUTENBERG EBOOK X ***

Produced by Nobody

{}

End of the Project Gutenberg EBook

*** END OF THIS PROJECT GUTENBERG EBOOK X ***
After it
"""


def benchmark(name: str, *arguments: str, capsys, monkeypatch) -> str:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script, which finds its neighbours
    return script(f"../benchmarks/{name}", *arguments, capsys=capsys, monkeypatch=monkeypatch)


def test_benchmark_of_couplings(tmp_path, capsys, monkeypatch):
    options = ["--only", "linear log_prob", "--seconds", "0", "--device", "cpu"]
    options += ["--output", str(tmp_path / "rows.jsonl")]
    benchmark("couplings.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    ours, *libraries = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert ours["implementation"] == "eager" and float(ours["difference"]) <= 1e-3
    assert ours["share"] == pytest.approx(ours["GBps"] / ours["copy_GBps"])
    assert ours["backward_ms"] > 0
    assert libraries and {row["op"] for row in libraries} == {"(cross-entropy)"}
    assert {row["shape"] for row in libraries} == {ours["shape"]}


@pytest.mark.parametrize("assistant", ["int8", "bfloat16"])
def test_benchmark_of_drafts(assistant, tmp_path, capsys, monkeypatch):
    tiny_causal_lm("llama", max_position_embeddings=512).save_pretrained(tmp_path / "source")
    character_tokenizer().save_pretrained(tmp_path / "source")
    options = ["--texts", "edit", "--rounds", "1", "--new_tokens", "6"]
    options += [
        "--drafts",
        "prompt lookup",
        "assistant",
        "--assistant",
        assistant,
        "--output",
        str(tmp_path / "rows.jsonl"),
    ]
    folder = str(tmp_path / "source")
    benchmark("drafts.py", folder, *options, capsys=capsys, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    agreement = rows.pop(0)
    assert 0 <= agreement["independent"] <= 1 - agreement["distance"] <= 1
    assert agreement["common"] > 0.5  # one token in 80 is the most likely
    assert [(row["model"], row["drafts"]) for row in rows] == 2 * [
        (model, drafts)
        for model in ("TarFlowLM", "source")
        for drafts in ("prompt lookup", assistant)
    ]
    assert [row["temperature"] for row in rows] == 4 * [0.0] + 4 * [0.3]
    for row in rows:
        assert row["speedup"] > 0 and row["cpu_speedup"] > 0 and 0 < row["new_tokens"] <= 6
        assert row["model"] == "source" or row["changed"] == 0


def test_benchmark_of_watermarks(tmp_path, capsys, monkeypatch):
    tiny_causal_lm("llama", max_position_embeddings=512).save_pretrained(tmp_path / "source")
    character_tokenizer().save_pretrained(tmp_path / "source")
    output = tmp_path / "rows.jsonl"
    options = ["--num_texts", "3", "--lengths", "8", "40", "--edited_length", "40"]
    options += ["--max_offset", "4", "--temperatures", "1", "--output", str(output)]
    folder = str(tmp_path / "source")
    benchmark("watermark.py", folder, *options, capsys=capsys, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in output.read_text().splitlines()]

    # The mark of green lists costs likelihood, and no mark costs nothing.
    costs = {row["mark"]: row["cost"] for row in rows if row["kind"] == "likelihood"}
    assert costs["none"] == pytest.approx(0, abs=1e-5) and costs["WatermarkingConfig"] > 1e-3
    nats = {row["mark"]: row["nats"] for row in rows if row["kind"] == "likelihood"}
    assert len(nats) == 4 and all(3.5 < value < 5.5 for value in nats.values())

    rows = [row for row in rows if row["kind"] == "power"]
    assert len(rows) == 3 * (2 + 9) and {row["texts"] for row in rows} == {3}
    for mark in ("NoiseWatermark", "WatermarkingConfig", "SynthID-Text"):
        short, long, *edits = (row["median"] for row in rows if row["mark"] == mark)
        assert long < short < 0 and long < -3 and max(edits) <= 0

    output.unlink()
    options += ["--checkpoint", str(ROOT / "checkpoints" / "python-docs"), "--temperatures", "0.7"]
    benchmark("watermark.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["mark"] for row in rows} == {"NoiseWatermark", "NoiseWatermark, untold"}
    assert len(rows) == 2 * (2 + 9) and max(rows[1]["median"], rows[12]["median"]) < -3


def test_benchmark_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # whose measure.py it imports
    run = partial(benchmark, "training.py", capsys=capsys, monkeypatch=monkeypatch)
    printed = run(
        "--quick", "--batch_size", "1", "--stage", "2", "--output", str(tmp_path / "rows.jsonl")
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["TarFlowLM", "Llama"] and {
        row["layers"] for row in rows
    } == {5}

    for row in rows:
        assert (
            row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
            and len(row["seconds_of_rounds"]) == 3
        )

    ratio = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    assert f"tokens/s of TarFlowLM / Llama: {ratio:.3f}" in printed
    with pytest.raises(ValueError, match=r"must be in 1, ..., 3, not 4"):
        run("--quick", "--num_flows", "4")


def test_benchmark_of_scoring(tmp_path, capsys, monkeypatch):
    """`--scoring` times the closing table; `--parts` says which operators the time goes to."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    output = str(tmp_path / "rows.jsonl")
    options = ("--quick", "--scoring", "1", "--num_flows", "1", "--parts", "--output", output)
    printed = benchmark("training.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    flow, library = [json.loads(line) for line in Path(output).read_text().splitlines()]

    assert flow["scoring"] == library["scoring"] == 1 and flow["num_tokens"] == 128
    flops, flops_of_library = (row["flops_per_second"] * row["seconds"] for row in (flow, library))
    assert 14 < flops / flops_of_library < 18  # sixteen samples are as many passes
    coupling = [name for name in flow["parts"] if name.startswith("_MixtureRosenblatt")]
    assert coupling and not set(coupling) & set(library["parts"]) and "mm" in flow["parts"]
    assert 0.3 < sum(flow["parts"].values()) / 1000 / flow["seconds"] < 30
    assert "| operator, ms | TarFlowLM | Llama | difference |" in printed


def test_benchmark_of_noise(tmp_path, capsys, monkeypatch):
    """Texts come back from their noise, and it keeps more of them than other noise does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--data", str(tmp_path / "text.txt"), "--num_texts", "6", "--num_tokens", "16"]
    options += ["--begin", "4", "--output", str(tmp_path / "rows.jsonl")]
    checkpoint = str(ROOT / "checkpoints" / "python-docs")
    benchmark("noise.py", checkpoint, *options, capsys=capsys, monkeypatch=monkeypatch)

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    replay, *changed = [row for row in rows if row["kind"] == "counterfactual"]
    assert replay["changed"] == 0 and replay["texts"] == 6 and replay["model"] == "python-docs"
    assert len(changed) == 3 and all(row["fresh"] < row["kept"] < 1 for row in changed)
    assert all(0 <= row["first"] <= 12 for row in changed)

    rounded, halved = [row for row in rows if row["kind"] == "compare"]
    for row in (rounded, halved):
        assert 0 < row["error"] < row["unpaired"] and abs(row["difference"]) < 0.1 < row["bits"]


def test_memory_of_a_training_step(monkeypatch):
    """A step takes at least its weights, gradients and AdamW's two moments.

    At most it adds the activations of one sequence.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from measure import output_of_own_process

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    options = ["--quick", "--memory_of", "Llama", "--batch_size", "1"]
    memory = output_of_own_process(str(ROOT / "benchmarks/training.py"), *options)["bytes"]
    assert 4 * 4 * 1_213_056 < memory < 2**28


def test_benchmark_of_generation(tmp_path, capsys, monkeypatch):
    options = [
        "--num_tokens",
        "8",
        "--batch_sizes",
        "1",
        "--patch_sizes",
        "1",
        "2",
        "--hidden_size",
        "32",
    ]
    options += [
        "--patch_steps",
        "2",
        "--train_steps",
        "0",
        "--repeats",
        "1",
        "--log_scale",
        "-1",
        "--parts",
        "--output",
        str(tmp_path / "rows.jsonl"),
    ]
    benchmark("generation.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    modes = ["sequential", "parallel", "auto", "cached loop", "without a cache"]
    parts = [row for row in rows if "part" in row]
    whole, patches = rows[:11], rows[11 + len(parts) :]
    assert [(row["mode"], row["patch"]) for row in whole] == [
        ("transformers, Llama", 1), *((mode, patch) for patch in (1, 2) for mode in modes)
    ]  # fmt: skip
    for row in whole:
        assert row["ratio"] == pytest.approx(whole[0]["seconds"] / row["seconds"])

    assert sum(row["share"] for row in parts) == pytest.approx(1)
    assert {row["part"] for row in parts} >= {"inputs", "decoder", "coupling", "the rest"}
    assert all(0 < row["share"] < 1 for row in parts)
    assert [(row["patch"], row["head_layers"]) for row in patches] == [(1, 0), (2, 0), (2, 1)]
    assert all(3 < row["bits"] < 10 and row["speedup"] > 0 for row in patches)


def test_benchmark_of_real_models(tmp_path, capsys, monkeypatch):
    size = ["--random", "--layers", "1", "--hidden_size", "32", "--vocab_size", "300"]
    size += ["--latent_size", "8", "--num_tokens", "12", "--new_tokens", "3", "--batch_sizes", "2"]
    size += ["--train_shape", "2", "6", "--rounds", "1", "--output", str(tmp_path / "rows.jsonl")]
    what = ["--what", "scoring", "generation", "training", "inverse"]
    benchmark("real.py", *size, *what, capsys=capsys, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    steered = ["generation", "generation top_k 50", "generation top_p 0.9"]
    expected = ["scoring", *steered, "training step", "inverse of one position"]
    assert [row["what"] for row in rows] == expected
    for row in rows[:-1]:
        assert row["ratio"] == pytest.approx(row["TarFlowLM"] / row["source"])


def test_benchmark_of_infilling(tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    (tmp_path / "text.txt").write_text(TEXT * 30)
    size = ["--vocab_size", "270", "--length", "12", "--hidden_size", "32", "--layers", "1"]
    size += ["--pretrain_steps", "3", "--gap_steps", "2", "--batch_size", "2"]
    size += ["--gaps", "3", "half", "--curve_gap", "3", "--curve_points", "2"]
    size += ["--test_sequences", "4", "--num_samples", "2", "--runs", str(tmp_path / "runs")]
    size += ["--dataset", str(tmp_path / "text.txt"), "--output", str(tmp_path / "rows.jsonl")]
    run = partial(benchmark, "infilling.py", *size, capsys=capsys, monkeypatch=monkeypatch)
    assert "scratch: 2 steps" in run("--train_only", "--only", "scratch")
    assert "scratch: 2 steps" not in run()

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    gaps = {(row["run"], row["gap"]): row for row in rows if row["kind"] == "gap"}
    runs = ["left_to_right", "left_to_right_longer", "converted", "converted_lora"]
    runs += ["scratch", "scratch_longer"]
    assert list(gaps) == [(name, gap) for gap in (3, "half") for name in runs]
    for (name, gap), row in gaps.items():
        is_exact = name.startswith("left_to_right")
        assert len(row["of_samples"]) == row["samples"] == (1 if is_exact else 2)
        assert row["nats"] == pytest.approx(sum(row["of_samples"]) / row["samples"])
        assert row["gain"] == pytest.approx(
            gaps["left_to_right_longer", gap]["nats"] - row["nats"], abs=1e-6
        )

    assert gaps["converted", 3]["tokens"] == 4 * 3
    curve = [row for row in rows if row["kind"] == "curve" and row["run"] == "converted"]
    assert [row["step"] for row in curve] == [0, 1, 2]
    assert curve[-1]["nats"] == pytest.approx(gaps["converted", 3]["nats"], abs=1e-3)


def test_gaps_lie_inside_their_sequences(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    draw_gaps = runpy.run_path(str(ROOT / "benchmarks" / "infilling.py"))["draw_gaps"]
    one = draw_gaps(4, (200, 10), 0)
    assert (one.sum(-1) == 4).all() and not one[:, 0].any() and not one[:, -1].any()
    assert (one.int().diff(dim=-1).abs().sum(-1) == 2).all()  # in one piece
    assert one[:, 1].any() and one[:, -2].any()

    half = draw_gaps("half", (500, 40), 0)
    assert 0.45 < half.float().mean() < 0.55
    assert half.any(-1).all() and not half.all(-1).any()


@pytest.fixture
def study(monkeypatch):
    """Lets the folder's modules import each other, as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "study")
    yield
    for name in ("cases", "page", "report", "run"):
        sys.modules.pop(name, None)


def test_the_study_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch, study):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 3)
    options = ["--dataset", "text.txt", "--hidden_size", "32", "--num_tokens", "32"]
    options += [
        "--num_steps",
        "6",
        "--batch_size",
        "4",
        "--test_sequences",
        "4",
        "--test_samples",
        "2",
    ]
    run = partial(benchmark, "study/run.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    first = run("--cases", "discrete", "--output", "rows.jsonl")
    assert first.splitlines()[-1].startswith("| discrete |") and ", exact |" in first
    cases = ["discrete", "affine", "Mix-d, deep, progressive", "patch 2, equal FLOPs"]
    printed = run("--cases", *cases, "--output", "rows.jsonl")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == cases and "discrete, seed" not in printed
    assert first.splitlines()[-1].split("|")[5] in printed

    for row, equal in zip(rows, ["parameters"] * 3 + ["training_flops_per_token"], strict=True):
        assert row[equal] == pytest.approx(rows[0][equal], rel=0.03)
        assert (
            f"| {row['model']} | {row['parameters']:,} |" in printed
            and f"{row['elbo_bits_per_character']:.3f}" in printed
        )

    # The stack of a progressive run, cut after its flows: the whole is the last.
    assert (
        len(rows[2]["bits_after_flows"]) == 3
        and rows[2]["bits_after_flows"][-1] == rows[2]["elbo_bits_per_character"]
    )

    pytest.importorskip("matplotlib")
    Path("page.md").write_text("# What it says\n\nText.\n\n")

    for _ in range(2):  # made again, it is the same
        script(
            "../benchmarks/study/report.py",
            "rows.jsonl",
            "--output",
            "page.md",
            capsys=capsys,
            monkeypatch=monkeypatch,
        )

    page = Path("page.md").read_text()
    assert (
        page.startswith("# What it says") and page.count("### Models") == 1 and "(page.svg)" in page
    )
    assert Path("page.svg").read_text().count("<svg ") == 1


def test_every_case_of_the_study_is_as_large_as_the_discrete_model(study):
    from cases import CASES, build

    fields = {"vocab_size": 27, "latent_size": 5, "max_position_embeddings": 64, "hidden_size": 64}
    for case in CASES:  # a case that can't be brought within 3% raises
        assert build(case, 6, {**fields, "num_attention_heads": 2}).num_parameters() > 0


def test_a_flow_above_a_frozen_model(tmp_path, capsys, monkeypatch, study):
    """The first flow is what it was: cut there, the stack has the bits of the model as it is."""
    tokenizer = character_tokenizer()
    flow = {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1}
    sizes = {"latent_size": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = TarFlowLMConfig(vocab_size=27, max_position_embeddings=32, flows=[flow], **sizes)
    save_model(TarFlowLMModel(config), tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 3)

    options = ["--dataset", str(tmp_path / "text.txt"), "--num_tokens", "32", "--num_steps", "4"]
    options += ["--batch_size", "4", "--test_sequences", "4", "--test_samples", "2"]
    options += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "rows.jsonl")]
    folder = str(tmp_path / "model")
    for _ in range(2):  # a row that is there is not made again
        benchmark("study/above.py", folder, *options, capsys=capsys, monkeypatch=monkeypatch)

    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    plain, above, adapted = rows
    assert above["bits_after_flows"][0] == pytest.approx(plain["bits_after_flows"][0], rel=1e-2)
    assert above["parameters"] == plain["parameters"] + above["trained_parameters"]
    assert adapted["parameters"] == plain["parameters"]
    assert plain["trained_parameters"] == 0 < adapted["trained_parameters"]
    assert adapted["test_bits_per_character"] != plain["test_bits_per_character"]


def test_architectures_are_exact_or_refused(tmp_path, capsys, monkeypatch):
    page, verbosity = tmp_path / "architectures.md", logging.get_verbosity()
    options = ["--only", "bloom", "gemma2", "llama", "--output", str(page)]
    threads = torch.get_num_threads()
    benchmark("architectures.py", *options, capsys=capsys, monkeypatch=monkeypatch)
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)

    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", page.read_text(), re.MULTILINE)
    assert rows == [("bloom", "exact"), ("gemma2", "refused"), ("llama", "exact")]
    text = " ".join(page.read_text().split())
    assert "2 are exact, 1 are refused, none fails, 0 were not tried" in text


def test_benchmark_of_serving(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    options = ["--clients", "1", "3", "--requests", "4", "--tokens", "3", "--rounds", "1"]
    options += ["--memory_after", "2", "6", "--output", str(tmp_path / "rows.jsonl")]
    folder = str(ROOT / "checkpoints" / "python-docs")
    benchmark("serving.py", folder, *options, capsys=capsys, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    *load, trouble, before, after = rows
    assert [row["clients"] for row in load] == [1, 3]
    assert all(row["changed"] == 0 and row["requests_per_second"] > 0 for row in load)
    assert trouble["wrong_statuses"] == {} and trouble["changed"] == 0 and trouble["is_alive"]
    assert trouble["bad_requests"] == 9 and trouble["cut_off"] == 4
    assert after["resident_bytes"] < 1.05 * before["resident_bytes"]


def test_texts_are_made_from_their_sources(tmp_path, capsys, monkeypatch):
    """A changed download is an error; a book is held out in part; tags go."""
    texts = runpy.run_path(str(ROOT / "benchmarks" / "texts.py"))
    source = tmp_path / "source"
    paragraphs = [f"Part {index},\r\nwith a _stress_." for index in range(100)]
    book = BOOK.format("\r\n\r\n".join(paragraphs)).encode()
    (source / "X_7" / "abc").mkdir(parents=True)
    (source / "X_7" / "abc" / "7.txt").write_bytes(book)
    for name, files in {
        "brown": {"brown/ca02": "b/nn ,/,", "brown/ca01": "a/at 1/2/cd", "brown/cats": "x"},
        "movie_reviews": {"movie_reviews/neg/c.txt": "bad .", "movie_reviews/pos/c.txt": "caf\xe9"},
    }.items():
        with zipfile.ZipFile(source / f"{name}.zip", "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text.encode("latin-1"))

    def sum_of(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    values = {
        "BOOKS_FROM": f"{source.as_uri()}/",
        "NLTK": f"{source.as_uri()}/",
        "BOOKS": [texts["Book"]("X_7", "abc", hashlib.sha256(book).hexdigest())],
        "BROWN": sum_of(source / "brown.zip"),
        "REVIEWS": sum_of(source / "movie_reviews.zip"),
    }
    for name, value in values.items():
        monkeypatch.setitem(texts["main"].__globals__, name, value)

    def make(text):
        monkeypatch.setattr(sys, "argv", ["texts.py", text, str(tmp_path / text)])
        texts["main"]()
        return tmp_path / text

    folder = make("doyle")
    lines = {path.stem: path.read_text().splitlines() for path in folder.glob("*.txt")}
    assert lines["train"] == [f"Part {index}, with a stress." for index in range(96)]
    assert lines["validation"] == [f"Part {index}, with a stress." for index in (96, 97)]
    assert lines["test"] == [f"Part {index}, with a stress." for index in (98, 99)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.decode(tokenizer("Part 1, a stress.\n").input_ids) == "Part 1, a stress.\n"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert make("brown-and-reviews").read_text() == "a 1\nb ,bad .\ncaf\xe9"

    monkeypatch.setitem(texts["main"].__globals__, "BROWN", "0" * 64)
    with pytest.raises(ValueError, match=r"brown\.zip has changed"):
        make("brown-and-reviews")
