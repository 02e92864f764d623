"""Bounds on the likelihood of text, against enumeration and cases by hand."""

import math

import pytest
import torch
from scipy.special import logsumexp
from transformers import set_seed

from helpers.enumeration import enumerate_likelihoods
from helpers.evaluation import TEXT
from helpers.models import STACKS, make
from helpers.training import config
from tarflow_hf import TarFlowLMModel
from tarflow_hf.data import PackedTokens, character_tokenizer
from tarflow_hf.evaluation import cut_text, likelihood, log_mean_exp, score
from tarflow_hf.training import discrete_baseline


@pytest.mark.parametrize("kind", ["flow", "discrete"])
def test_neither_batches_nor_what_follows_change_a_score(flow, sequences, kind):
    model = flow if kind == "flow" else discrete_baseline(flow.config)
    samples = 3 if kind == "flow" else 1
    whole = score(model, sequences, batch_size=16, num_samples=samples)
    expected = whole.nats
    assert expected.shape == (samples, len(sequences)) and whole.num_tokens.sum() == len(TEXT)

    for options in ({"batch_size": 1}, {"batch_size": 5, "max_sequences": 7}):
        scores = score(model, sequences, num_samples=samples, **options).nats
        torch.testing.assert_close(scores, expected[:, : scores.shape[1]], rtol=1e-5, atol=1e-4)

    if kind == "flow":
        assert (expected[0] != expected[1]).all()
        other = score(model, sequences, num_samples=samples, seed=1).nats
        assert (other != expected).all()
    else:  # nothing is drawn, so the order is free
        scores = score(model, sequences[::-1]).nats
        torch.testing.assert_close(scores.flip(1), expected, rtol=1e-5, atol=1e-4)


def test_both_bounds_come_from_the_same_samples(flow, sequences):
    scores = score(flow, sequences, num_samples=4)
    nats, num_tokens = scores.nats, scores.num_tokens
    elbo, bound = scores.rows().values()
    assert (
        elbo.nats == pytest.approx(nats.mean(0).sum().item())
        and elbo.num_tokens == num_tokens.sum()
    )
    expected = -(logsumexp(-nats.numpy(), axis=0) - math.log(4)).sum()
    assert bound.nats == pytest.approx(expected) and bound.nats < elbo.nats
    assert bound == likelihood(flow, sequences, num_samples=4)
    rate = (
        nats.mean(0) / num_tokens
    )  # of equally long sequences it is the standard error of a mean, but for n - 1
    full = num_tokens == 18
    equally_long = [s for s in sequences if len(s["input_ids"]) == 18]
    alone = score(flow, equally_long, num_samples=4).one_sample
    n = int(full.sum())
    assert alone.standard_error == pytest.approx(
        rate[full].std().item() / math.sqrt(n) * math.sqrt((n - 1) / n)
    )


def test_the_bound_reaches_the_enumerated_likelihood():
    model = make(STACKS["mix-d"], vocab_size=3, latent_size=1)
    exact, elbo = enumerate_likelihoods(model, 2, points=150)

    for x in ((0, 0), (2, 1)):
        sequence = [{"input_ids": torch.tensor(x)}]
        samples = -score(model, sequence * 300, batch_size=300, num_samples=40).nats
        one, many = samples[0], log_mean_exp(samples)
        assert one.mean().item() == pytest.approx(
            elbo[x], abs=5 * one.std().item() / math.sqrt(300)
        )
        assert elbo[x] < many.mean() < exact[x] + 0.01 and exact[x] - many.mean() < 0.2 * (
            exact[x] - elbo[x]
        )


def test_what_fills_a_patch_keeps_the_bound_one():
    """A text of one token in patches of two is filled up.

    Its probability is the sum over all tokens that may follow.
    """
    model = make(STACKS["mix-d"], patch_size=2, vocab_size=3, latent_size=1)
    exact, _ = enumerate_likelihoods(model, 2, points=150)

    for token in range(3):
        sequences = cut_text(torch.tensor([token]), 18, patch_size=2)
        result = likelihood(model, sequences, num_samples=200)
        assert result.num_tokens == 1
        assert result.nats > -math.log(sum(math.exp(exact[token, other]) for other in range(3)))
        assert result.nats == pytest.approx(-exact[token, token], abs=0.2)

    assert cut_text(torch.tensor([], dtype=torch.long), 18, 2) == []


def test_bad_input(flow, sequences):
    with pytest.raises(ValueError, match="no sequence"):
        likelihood(flow, [])

    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        likelihood(flow, sequences, num_samples=0)

    broken = make(STACKS["affine"], vocab_size=27)
    broken.codebook.mean.data[3] = math.nan

    with pytest.raises(
        ValueError, match=r"likelihood of sequence 0 is .*nan.*are the weights finite"
    ):
        likelihood(broken, sequences)


def test_likelihood_of_text():
    set_seed(0)
    data = PackedTokens([TEXT], character_tokenizer(), 16)
    model = TarFlowLMModel(config())
    sequences = [data[i] for i in range(10)] + [{"input_ids": data[10]["input_ids"][:5]}]
    result = likelihood(model, sequences, batch_size=4)
    assert result.num_tokens == 165
    repeated = likelihood(model, sequences, batch_size=4)
    assert result == repeated != likelihood(model, sequences, batch_size=4, seed=1)
    nats = torch.tensor(
        [likelihood(model, [s], seed=i).nats_per_token for i, s in enumerate(sequences)]
    )
    assert abs(result.nats_per_token - nats.mean()) < 4 * result.standard_error + 0.05
    baseline = discrete_baseline(config()).eval()
    each = [likelihood(baseline, [s]).nats for s in sequences]
    assert likelihood(baseline, sequences, batch_size=4).nats == pytest.approx(sum(each), rel=1e-5)
    with pytest.raises(ValueError, match="no sequence"):
        likelihood(model, [])
