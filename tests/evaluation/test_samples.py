"""Samples: kept in a file, resumed, and evaluated as a command."""

import json
import runpy
import sys
from dataclasses import replace

import pytest

from helpers import ROOT
from helpers.models import STACKS, make
from tarflow_hf.data import PackedTokens, character_tokenizer
from tarflow_hf.evaluation import (
    SampleEvaluation,
    Sampling,
    TokenStatistics,
    judge_texts,
    load_judge,
    read_samples,
    reference_sequences,
    sample_to_file,
    token_statistics,
    warnings_of,
)
from tarflow_hf.training import discrete_baseline, save_model


@pytest.fixture(scope="module")
def flow():
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27).float()


# ------------------------------------------------------------------------------------- kept samples


@pytest.mark.parametrize("kind", ["flow", "discrete"])
def test_a_stopped_run_goes_on(flow, tmp_path, kind):
    """A resumed run draws the samples of an uninterrupted one.

    It does so with other batches of a TarFlowLM, and behind a line that was cut off.
    """
    model, tokenizer = flow, character_tokenizer()
    if kind == "discrete":
        model = discrete_baseline(flow.config)

    sampling = Sampling(
        num_samples=10, length=8, seed=3, generate_options={"temperature": 0.9}, batch_size=4
    )
    expected = sample_to_file(model, tokenizer, tmp_path / "whole", sampling)
    assert len(expected) == 10 and {len(sample.input_ids) for sample in expected} == {8}
    assert max(token for sample in expected for token in sample.input_ids) < 27
    model.generation_config.eos_token_id = expected[0].input_ids[0]  # ends nothing
    assert sample_to_file(model, tokenizer, tmp_path / "ending", sampling) == expected
    assert expected[0].text == tokenizer.decode(expected[0].input_ids)
    assert len({sample.text for sample in expected}) == 10

    path = tmp_path / "stopped"
    first = sample_to_file(model, tokenizer, path, replace(sampling, num_samples=5))
    path.write_text(path.read_text() + '{"input_ids": [1, 2')
    batch_size = 4 if kind == "discrete" else 3
    again = sample_to_file(model, tokenizer, path, replace(sampling, batch_size=batch_size))
    assert first == expected[:5] and again == expected
    assert read_samples(path)[:10] == expected and list(tmp_path.glob(".*")) == []
    content = path.read_text()
    assert sample_to_file(model, tokenizer, path, sampling) == expected  # nothing is drawn
    assert path.read_text() == content

    with pytest.raises(
        ValueError,
        match=r"drawn otherwise: options was \{'temperature': 0.9\} and is \{'temperature",
    ):
        colder = replace(sampling, num_samples=12, generate_options={"temperature": 0.5})
        sample_to_file(model, tokenizer, path, colder)

    with pytest.raises(ValueError, match="drawn otherwise: seed was 3 and is 0"):
        sample_to_file(model, tokenizer, path, replace(sampling, num_samples=12, seed=0))


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "length"])
def test_numbers_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Sampling(**{name: 0})


def test_another_file_is_left_alone(flow, tmp_path):
    (tmp_path / "text.txt").write_text("something else\n")
    with pytest.raises(ValueError, match=r"text.txt is no file of samples"):
        sample_to_file(flow, character_tokenizer(), tmp_path / "text.txt", Sampling(num_samples=2))
    assert (tmp_path / "text.txt").read_text() == "something else\n"


# ---------------------------------------------------------------------------------------- all of it


def test_references_are_spread_over_the_text():
    text = PackedTokens(["abcdefghij" * 2], character_tokenizer(), 2)
    assert reference_sequences(text, 5) == [[1, 2], [5, 6], [9, 10], [3, 4], [7, 8]]
    with pytest.raises(ValueError, match="10 sequences of 2 tokens, fewer than the 11 samples"):
        reference_sequences(text, 11)


def test_warnings():
    text = TokenStatistics(5000, 5.4, 0.2, 0.1, 0.4, 0.8, 0.01)

    def found(perplexity=20.0, options=None, **changes):
        return warnings_of(
            TokenStatistics(**{**vars(text), **changes}), text, perplexity, 15.0, options or {}
        )

    assert found() == [] == found(entropy=5.25)
    cases = {
        "entropy, 5.10 nats": found(entropy=5.1),
        "30.0% of a sample's 4-grams": found(repetition_4=0.3),
        "lower is no longer better": found(perplexity=14.0),
        "steered": found(options={"top_p": 0.9}),
        "100 samples, where 5,000": found(num_sequences=100),
    }
    for words, (warning,) in cases.items():
        assert words in warning


def test_the_script_and_its_json(flow, judge, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mauve")
    save_model(flow, character_tokenizer(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog again " * 20)
    command = [
        tmp_path / "model",
        "--data",
        tmp_path / "text.txt",
        "--judge",
        judge,
        "--num_samples",
        24,
    ]
    command += [
        "--length",
        12,
        "--samples",
        tmp_path / "samples.jsonl",
        "--top_p",
        0.9,
        "--device",
        "cpu",
    ]
    command += ["--output", tmp_path / "samples.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate_samples.py", *map(str, command)])
    runpy.run_path(str(ROOT / "examples" / "evaluate_samples.py"), run_name="__main__")
    printed = capsys.readouterr().out
    found = SampleEvaluation.from_json((tmp_path / "samples.json").read_text())

    samples = read_samples(tmp_path / "samples.jsonl")
    assert len(samples) == found.num_samples == 24 and found.length == 12
    judged = judge_texts([sample.text for sample in samples], *load_judge(judge))
    assert found.generative_perplexity == pytest.approx(judged.perplexity)
    assert found.generative_standard_error == pytest.approx(judged.standard_error)
    assert found.entropy == pytest.approx(
        token_statistics([sample.input_ids for sample in samples]).entropy
    )
    text = PackedTokens([(tmp_path / "text.txt").read_text()], character_tokenizer(), 12)
    references = reference_sequences(text, 24)
    assert found.text_entropy == pytest.approx(token_statistics(references).entropy)
    assert (
        0 <= found.mauve <= 1
        and found.generate_options == {"top_p": 0.9}
        and found.judge == str(judge)
    )
    assert any("steered" in warning for warning in found.warnings) and printed.count(
        "Warning: "
    ) == len(found.warnings)
    assert f"{found.generative_perplexity:.2f}" in printed and "MAUVE, scale 5" in printed
    header = json.loads((tmp_path / "samples.jsonl").read_text().split("\n")[0])
    assert header["weights_sha256"] == found.weights_sha256
