"""The bits of tokens: against the bound itself, against autodiff, and against the bounds of shorter
texts.
"""

import math
import re
from html import unescape

import pytest
import torch
from test_modeling import PATCH_STACKS, STACKS, make
from test_show_passes import HOSTILE, hostile_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tarflow_hf.data import character_tokenizer
from tarflow_hf.modeling.normal import normal_log_prob
from tarflow_hf.report.bits import bits_section
from tarflow_hf.token_likelihood import bits_of_pieces, token_bits, what_bits_mean

CASES = [(flows, patch_size) for flows in STACKS.values() for patch_size in (1, 2)]
CASES += [(flows, 2) for flows in PATCH_STACKS.values()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def exact_norm(monkeypatch):
    """Llama's norm computes in float32 whatever the model's dtype, and its rounding would be all
    that is seen here.
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
    """Where no flow runs the other way, the bits of a text's beginning (or end) are those of that
    text alone.
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
    """A byte-level tokenizer, of which the first two tokens are one letter."""
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


def tokens_of(section):
    found = re.findall(r'--heat:([\d.]+)"><bdi>(.*?)</bdi><small>(.*?)</small>', section)
    return [(unescape(text), number, float(heat)) for heat, text, number in found]


def test_the_picture_says_each_number():
    tokenizer = character_tokenizer()
    ids = torch.tensor(tokenizer("ab cd").input_ids)
    guess = math.log2(27)
    section = bits_section(ids, torch.tensor([-0.01, guess / 2, guess, 99.0, -1.25]), tokenizer)
    minus, box = "\N{MINUS SIGN}", "\N{OPEN BOX}"
    expected = [
        ("a", "0.0", 0.0),
        ("b", "2.4", 0.5),
        (box, "4.8", 1.0),
        ("c", "99.0", 1.0),
        ("d", f"{minus}1.2", 0.0),
    ]
    assert tokens_of(section) == expected
    assert (
        section.count('class="word"') == 2
        and "4.8 bits, as many as a guess among all 27 tokens" in section
    )


def test_white_space_is_seen():
    tokenizer = Tokenizer(
        models.WordLevel({"a": 0, " b": 1, " ": 2, "\n": 3, "\t ": 4}, unk_token="a")
    )
    tokenizer.decoder = decoders.Fuse()
    section = bits_section(
        torch.arange(5), torch.zeros(5), PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    )
    assert [text for text, *_ in tokens_of(section)] == ["a", " b", "␣", "↵", "→␣"]
    words = re.findall(r'class="word">(.*?)</span></span>', section)
    assert ["".join(re.findall("<bdi>(.*?)</bdi>", word)) for word in words] == [
        "a",
        " b␣",
        "↵",
        "→␣",
    ]


def test_hostile_text_stays_text():
    section = bits_section(
        torch.arange(len(HOSTILE)), torch.ones(len(HOSTILE)), hostile_tokenizer()
    )
    assert (
        set(re.findall(r"<(\w+)", section)) == {"p", "span", "bdi", "small"}
        and "\x1b" not in section
    )
    assert [text for text, *_ in tokens_of(section)][:3] == HOSTILE[:3]
