"""Bits per token, against the bound and the flows' own terms."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.models import PATCH_STACKS, STACKS, make
from tarflow_hf.evaluation import bits_of_pieces, token_bits, what_bits_mean
from tarflow_hf.modeling.normal import normal_log_prob

CASES = [(flows, patch_size) for flows in STACKS.values() for patch_size in (1, 2)]
CASES += [(flows, 2) for flows in PATCH_STACKS.values()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def exact_norm(monkeypatch):
    """Replaces Llama's norm, which computes in float32 whatever the model's dtype.

    Its rounding would hide every other error.
    """

    def norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


@pytest.mark.parametrize(("flows", "patch_size"), CASES)
def test_they_sum_to_the_bound(flows, patch_size):
    model = make(flows, patch_size)
    ids = torch.randint(5, (3, 6))
    bits = token_bits(model, ids, generator=seeded())
    assert bits.shape == ids.shape
    elbo = model(ids, generator=seeded()).elbo
    torch.testing.assert_close(bits.sum(-1) * -math.log(2), elbo, atol=1e-10, rtol=0)
    assert not any(layer.head._forward_hooks for layer in model.flow.layers)

    samples = model(ids.repeat_interleave(4, 0), generator=seeded()).elbo.unflatten(0, (3, 4))
    mean = token_bits(model, ids, 4, seeded()).sum(-1) * -math.log(2)
    torch.testing.assert_close(mean, samples.mean(-1), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("flows", "patch_size"), CASES)
def test_each_position_gets_its_own_terms(flows, patch_size):
    model = make(flows, patch_size)
    ids = torch.randint(5, (1, 4))
    z = model.encode(ids, generator=seeded())
    size = 2 * patch_size
    prior = normal_log_prob(model.flow(z).noise).reshape(-1, size).sum(-1)

    for index, layer in enumerate(model.flow.layers):
        h = model.flow(z).states[index].reshape(1, -1, size)
        function = lambda flat: layer(flat.reshape(h.shape), model.codebook())[0].flatten()  # noqa: B023, E731
        blocks = torch.autograd.functional.jacobian(function, h.flatten()).unflatten(1, (-1, size))
        diagonal = blocks.unflatten(0, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        prior = prior + torch.linalg.slogdet(diagonal).logabsdet

    sums = model.codebook().log_prob_all(z).logsumexp(-1)[0]
    expected = prior.repeat_interleave(patch_size) / patch_size - sums
    bits = token_bits(model, ids, generator=seeded())[0]
    torch.testing.assert_close(bits * -math.log(2), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("flows", "patch_size"), CASES)
def test_what_they_mean(flows, patch_size):
    """A text's beginning has the same bits on its own if no flow runs the other way.

    The same holds for a text's end under flows that run right to left.
    """
    model = make(flows, patch_size)
    directions = {layer["direction"] == "right_to_left" for layer in model.config.flows}
    ids = torch.randint(5, (1, 6))
    z = model.encode(ids)

    def bits(first, last):
        model.encode = lambda ids, generator: z[:, first:last]
        return token_bits(model, ids[:, first:last])

    whole, beginning, end = bits(0, 6), bits(0, 4), bits(2, 6)
    assert torch.allclose(whole[:, :4], beginning, atol=1e-10) == (directions == {False})
    assert torch.allclose(whole[:, 2:], end, atol=1e-10) == (directions == {True})
    meaning = what_bits_mean(model)
    said = {
        "before it" in meaning: {False},
        "after it" in meaning: {True},
        "share" in meaning: {False, True},
    }
    assert said[True] == directions and ("divided" in meaning) == (patch_size > 1)


def test_bad_input():
    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        token_bits(make(STACKS["affine"]), torch.tensor([[1]]), 0)


def test_pieces_are_whole_characters():
    """The first two tokens of a byte-level tokenizer make one letter."""
    vocabulary = {
        "\N{LATIN CAPITAL LETTER A WITH TILDE}": 0,
        "\N{COPYRIGHT SIGN}": 1,
        "Ġx": 2,
        "y": 3,
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="y"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    bits = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert bits_of_pieces(torch.tensor([0, 1, 2, 3, 0]), bits, tokenizer) == [
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", 3.0),
        (" x", 4.0),
        ("y", 8.0),
        ("\N{REPLACEMENT CHARACTER}", 16.0),
    ]
