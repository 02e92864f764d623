"""What samples are like: statistics of tokens by hand, a judge against its own loss, samples kept
in a file.
"""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import entropy
from test_modeling import STACKS, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tarflow_hf.checkpointing import save_model
from tarflow_hf.data import PackedTokens, character_tokenizer
from tarflow_hf.generative_metrics import (
    SampleEvaluation,
    TokenStatistics,
    check_judge,
    distinct_n,
    judge_texts,
    load_judge,
    mauve_score,
    ngrams,
    read_samples,
    reference_sequences,
    repetition,
    sample_to_file,
    token_statistics,
    unigram_entropy,
    warnings_of,
)
from tarflow_hf.training import discrete_baseline

ROOT = Path(__file__).parents[1]
TEXTS = ["the fox", "a text of another length", "ab", "the fox jumps over the dog"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A random GPT-2 that reads bytes, 24 at once, in a folder of its own; no token pads."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    config = GPT2Config(
        vocab_size=256, n_positions=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3
    )
    config.bos_token_id = config.eos_token_id = None
    folder = tmp_path_factory.mktemp("judge")
    save_model(
        GPT2LMHeadModel(config), PreTrainedTokenizerFast(tokenizer_object=backend), folder / "judge"
    )

    return folder / "judge"


@pytest.fixture(scope="module")
def loaded(judge):
    return load_judge(judge)


@pytest.fixture(scope="module")
def flow():
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27).float()


# ---------------------------------------------------------------------------------- of tokens alone


def test_entropy_is_scipys_and_does_not_see_the_order():
    torch.manual_seed(0)
    tokens = torch.randint(9, (50,))
    expected = entropy(torch.bincount(tokens).numpy())
    for order in (tokens, tokens.flip(0), tokens.sort().values):
        assert unigram_entropy(order.tolist()) == pytest.approx(expected)

    assert (
        unigram_entropy(list(range(8))) == pytest.approx(math.log(8)) and unigram_entropy([3]) == 0
    )
    with pytest.raises(ValueError, match="without tokens"):
        unigram_entropy([])


@pytest.mark.parametrize(
    ("sequences", "n", "distinct"),
    [
        ([[1, 1, 1, 1]], 1, 1 / 4),
        ([[1, 2], [1, 2], [3]], 2, 1 / 2),
        ([[1, 2, 3]], 3, 1),
        ([[1, 2], [2, 1]], 1, 1 / 2),
    ],
)
def test_distinct_by_hand(sequences, n, distinct):
    assert distinct_n(sequences, n) == distinct == distinct_n(sequences[::-1], n)


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [([1] * 6, 2, 4 / 5), ([1, 2, 3], 2, 0), ([1, 2], 4, 0), ([1, 2, 3, 1, 2, 3], 3, 1 / 4)],
)
def test_repetition_by_hand(tokens, n, share):
    assert repetition(tokens, n) == pytest.approx(share)


def test_statistics_of_bad_sequences():
    statistics = token_statistics([[1, 1, 2, 2], [1, 2, 3, 4]])
    assert statistics.entropy == pytest.approx(1.5 * math.log(2)) and statistics.distinct_1 == 0.5
    assert statistics.entropy_std == pytest.approx(0.5 * math.log(2))

    for sequences, message in (
        ([], "no sequence"),
        ([[1], []], "without tokens"),
        ([[1, 2]], "at least n = 3 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            token_statistics(sequences)

    with pytest.raises(ValueError, match="n must be at least 1"):
        ngrams([1, 2], 0)


# ------------------------------------------------------------------------------------------ a judge


def test_perplexity_is_that_of_the_judges_own_loss(loaded):
    judge, tokenizer = loaded
    judged = judge_texts(TEXTS, judge, tokenizer, batch_size=3)

    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :24]
        with torch.no_grad():
            out = judge(ids, labels=ids, output_hidden_states=True)

        assert judged.num_tokens[row] == ids.shape[1] - 1
        assert judged.nats[row].item() == pytest.approx(
            out.loss.item() * (ids.shape[1] - 1), rel=1e-5
        )
        torch.testing.assert_close(judged.features[row], out.hidden_states[-1][0, -1])

    assert judged.num_truncated == 1
    assert judged.perplexity == pytest.approx(math.exp(judged.nats.sum() / judged.num_tokens.sum()))


def test_neither_batches_nor_order_change_a_judgement(loaded):
    expected = judge_texts(TEXTS, *loaded)
    for batch_size in (1, 2):
        judged = judge_texts(TEXTS[::-1], *loaded, batch_size=batch_size)
        torch.testing.assert_close(judged.nats.flip(0), expected.nats)
        torch.testing.assert_close(judged.features.flip(0), expected.features)

    assert not loaded[0].base_model._forward_hooks  # nothing is left behind
    short = judge_texts(TEXTS, *loaded, max_length=5)
    assert short.num_tokens.tolist() == [4, 4, 1, 4] and short.num_truncated == 3


def test_who_cannot_judge_and_what_cannot_be_judged(loaded, flow):
    judge, tokenizer = loaded
    for texts, message in (
        ([], "no text"),
        (["ab", "a"], "text of 1 tokens .* 'a'"),
        ([""], "text of 0 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            judge_texts(texts, judge, tokenizer)

    with pytest.raises(ValueError, match="max_length must be at least 2"):
        judge_texts(TEXTS, judge, tokenizer, max_length=1)

    with pytest.raises(ValueError, match="logits for the next token, which TarFlowLMModel has not"):
        check_judge(flow, character_tokenizer())

    other = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(
        ValueError, match=r"256 tokens, the judge embeddings for 100: .* another model's"
    ):
        judge_texts(TEXTS, other, tokenizer)

    broken = GPT2LMHeadModel(judge.config)
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite for 4 texts"):
        judge_texts(TEXTS, broken, tokenizer)


def test_mauve():
    pytest.importorskip("mauve")
    torch.manual_seed(0)
    text, alike, other = torch.randn(200, 4) + 5, torch.randn(200, 4) + 5, torch.randn(200, 4) - 5
    near, far = mauve_score(text, alike, num_buckets=5), mauve_score(text, other, num_buckets=5)
    assert near > 0.9 and far < 0.05
    assert mauve_score(text, other + 4, num_buckets=5, scale=0.1) > mauve_score(
        text, other + 4, num_buckets=5
    )

    for features, message in (
        (torch.randn(3, 5), "widths 4 and 5"),
        (torch.randn(1, 4), "at least 2"),
        (torch.full((3, 4), math.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            mauve_score(text, features)


def test_without_mauve_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match="pip install mauve-text"):
        mauve_score(torch.randn(5, 2), torch.randn(5, 2))


# ------------------------------------------------------------------------------------- kept samples


@pytest.mark.parametrize("kind", ["flow", "discrete"])
def test_a_stopped_run_goes_on(flow, tmp_path, kind):
    """The same samples as in one go (whatever the batches of a TarFlowLM), also behind half a line."""
    model, tokenizer = flow, character_tokenizer()
    if kind == "discrete":
        model = discrete_baseline(flow.config)

    options = {"length": 8, "temperature": 0.9, "seed": 3}
    expected = sample_to_file(model, tokenizer, tmp_path / "whole", 10, batch_size=4, **options)
    assert len(expected) == 10 and {len(sample.input_ids) for sample in expected} == {8}
    assert max(token for sample in expected for token in sample.input_ids) < 27
    model.generation_config.eos_token_id = expected[0].input_ids[0]  # ends nothing
    assert (
        sample_to_file(model, tokenizer, tmp_path / "ending", 10, batch_size=4, **options)
        == expected
    )
    assert expected[0].text == tokenizer.decode(expected[0].input_ids)
    assert len({sample.text for sample in expected}) == 10

    path = tmp_path / "stopped"
    first = sample_to_file(model, tokenizer, path, 5, batch_size=4, **options)
    path.write_text(path.read_text() + '{"input_ids": [1, 2')
    again = sample_to_file(
        model, tokenizer, path, 10, batch_size=4 if kind == "discrete" else 3, **options
    )
    assert first == expected[:5] and again == expected
    assert read_samples(path)[:10] == expected and list(tmp_path.glob(".*")) == []
    content = path.read_text()
    assert (
        sample_to_file(model, tokenizer, path, 10, batch_size=4, **options) == expected
    )  # nothing is drawn
    assert path.read_text() == content

    with pytest.raises(
        ValueError,
        match=r"drawn otherwise: options was \{'temperature': 0.9\} and is \{'temperature",
    ):
        sample_to_file(model, tokenizer, path, 12, batch_size=4, **{**options, "temperature": 0.5})

    with pytest.raises(ValueError, match="drawn otherwise: seed was 3 and is 0"):
        sample_to_file(model, tokenizer, path, 12, batch_size=4, **{**options, "seed": 0})

    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        sample_to_file(model, tokenizer, path, 0)


def test_another_file_is_left_alone(flow, tmp_path):
    (tmp_path / "text.txt").write_text("something else\n")
    with pytest.raises(ValueError, match=r"text.txt is no file of samples"):
        sample_to_file(flow, character_tokenizer(), tmp_path / "text.txt", 2)
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
