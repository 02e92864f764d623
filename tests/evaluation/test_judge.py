"""Generative perplexity and MAUVE under a judge."""

import math
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.models import STACKS, make
from tarflow_hf.data import character_tokenizer
from tarflow_hf.evaluation import check_judge, judge_texts, load_judge, mauve_score

TEXTS = ["the fox", "a text of another length", "ab", "the fox jumps over the dog"]


@pytest.fixture(scope="module")
def loaded(judge):
    return load_judge(judge)


@pytest.fixture(scope="module")
def flow():
    return make(STACKS["mix-d, mix-1, mix-1"], vocab_size=27).float()


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
