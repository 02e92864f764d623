"""The noise of a text: it gives the text back, whatever wrote the text and whatever begins it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers import ROOT
from helpers.causal_lms import tiny_causal_lm
from helpers.models import CAUSAL, PATCH_STACKS, STACKS, flow, make, separated
from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import from_causal_lm
from tarflow_hf.modeling.noise_tarflowlm import sample_decoded

CHECKPOINT = ROOT / "checkpoints" / "python-docs"
EVERY_STACK = STACKS | CAUSAL | PATCH_STACKS


def assert_replays(model, tokens, generator=None):
    """Checks that the noise of tokens gives them back, after every beginning of them."""
    noise = model.noise_of(tokens, generator=generator)
    assert noise.shape == (*tokens.shape, model.config.latent_size)
    assert torch.equal(model.generate(noise=noise), tokens)
    for length in range(0, tokens.shape[1] + 1, model.config.patch_size):
        assert torch.equal(model.generate(tokens[:, :length], noise=noise), tokens), length


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", EVERY_STACK)
def test_noise_gives_its_text_back(stack, patch_size, dtype):
    if stack in PATCH_STACKS and patch_size == 1:
        pytest.skip("has a head for patches")

    model = make(EVERY_STACK[stack], patch_size).to(dtype)
    tokens = torch.randint(5, (3, 12), generator=torch.Generator().manual_seed(1))
    assert_replays(model, tokens)


@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "mix-1, right to left, posterior"])
def test_noise_of_a_conditional_model(stack):
    model = make(STACKS[stack], conditional=True)
    assert_replays(model, torch.randint(5, (3, 12)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text"])
def test_noise_of_a_converted_model(name):
    model = from_causal_lm(tiny_causal_lm(name))
    assert_replays(model, torch.randint(3, 96, (2, 12)))

    # A text may go on behind an end-of-sequence token.
    tokens = torch.randint(96, (2, 12))
    tokens[:, 5] = model.config.eos_token_id
    noise = model.noise_of(tokens)
    assert torch.equal(model.generate(noise=noise), tokens)


def test_noise_of_unlikely_tokens_in_half_precision():
    """Weights that bfloat16 rounds are those of the same pass, forward and back."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = from_causal_lm(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    tokens = torch.randint(300, (2, 64))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0

    codebook = model.codebook()
    noise = model.flow(sample_decoded(codebook, tokens[:1])).noise.detach()
    assert not torch.equal(model.generate(noise=noise), tokens[:1])

    noise = model.noise_of(tokens[:1])
    assert torch.equal(model.generate(noise=noise), tokens[:1])
    assert torch.equal(model.generate(tokens[:1, :20], noise=noise), tokens[:1])

    again = model.generate(noise=model.noise_of(tokens, mask), attention_mask=mask)
    assert torch.equal(again[mask == 1], tokens[mask == 1])


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", EVERY_STACK)
def test_noise_by_steps_is_that_of_the_whole_pass(stack, patch_size):
    if stack in PATCH_STACKS and patch_size == 1:
        pytest.skip("has a head for patches")

    model = make(EVERY_STACK[stack], patch_size)
    latents = torch.randn(3, 12, 2, dtype=torch.float64)
    mask = torch.ones(3, 12)
    mask[1, 8:] = mask[2, :4] = 0
    with torch.no_grad():
        expected = model.flow(latents, mask).noise
        torch.testing.assert_close(model._noise_by_steps(latents, mask), expected)


def test_a_text_as_long_as_the_model_is_its_own_prompt():
    model = make(STACKS["mix-d, mix-1, mix-1"], max_position_embeddings=8)
    assert_replays(model, torch.randint(5, (2, 8)))


def test_only_an_end_token_of_the_call_cuts_what_noise_says():
    model = make(STACKS["mix-d"])
    model.generation_config.eos_token_id = [1, 2]
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0], [3, 2, 1, 0, 4, 3]])
    noise, mask = model.noise_of(tokens), torch.ones(2, 6)
    assert torch.equal(model.generate(noise=noise), tokens)

    cut = model.generate(noise=noise, eos_token_id=[1, 2], pad_token_id=0)
    assert cut.tolist() == [[0, 1], [3, 2]]
    masked = model.generate(noise=noise, attention_mask=mask, eos_token_id=[1, 2], pad_token_id=0)
    assert torch.equal(masked, cut)


def test_dropout_changes_no_text_of_given_noise():
    model = make(CAUSAL["left to right"])
    for layer in model.flow.layers:
        for block in layer.decoder.layers:
            block.self_attn.attention_dropout = 0.5

    prompt, noise = torch.randint(5, (1, 6)), torch.randn(1, 12, 2, dtype=torch.float64)
    tokens = model.eval().generate(prompt, noise=noise)
    model.train()
    for _ in range(4):
        assert torch.equal(model.generate(prompt, noise=noise), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_replays_thousands_of_tokens(dtype):
    """Texts of the checkpoint, and tokens at random, which it finds all but impossible."""
    model = TarFlowLMModel.from_pretrained(CHECKPOINT, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    own = model.generate(max_new_tokens=200, num_return_sequences=7, generator=generator)
    random = torch.randint(27, (3, 200), generator=generator)

    for tokens in (own, random):
        noise = model.noise_of(tokens, generator=generator)
        out = model.generate(noise=noise, return_dict_in_generate=True)
        assert torch.equal(out.sequences, tokens)

        # How near rounding came to another token: none of them is a tie.
        best = model.decode(out.latents).topk(2).values
        assert ((best[..., 0] - best[..., 1]) < 1e-3).sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stack", ["left to right", "mix-d, mix-1, mix-1", "affine, right to left"])
def test_noise_of_a_padded_batch(stack, side):
    model = make(EVERY_STACK[stack])
    tokens = torch.randint(5, (3, 12))
    mask = torch.arange(12) < torch.tensor([[12], [7], [10]])
    mask = mask.flip(1) if side == "left" else mask
    tokens[~mask] = 99  # not read
    noise = model.noise_of(tokens, attention_mask=mask.long())
    assert (noise[~mask] == 0).all()

    again = model.generate(noise=noise, attention_mask=mask)
    assert torch.equal(again[mask], tokens[mask]) and (again[~mask] == 0).all()
    for length in range(5, 13) if side == "left" else (12,):
        prompt, prompt_mask = tokens[:, :length], mask[:, :length]
        again = model.generate(prompt, attention_mask=prompt_mask, noise=noise)
        assert torch.equal(again, tokens)

    for row in range(3):
        alone = noise[row : row + 1, mask[row]]
        assert torch.equal(model.generate(noise=alone)[0], tokens[row, mask[row]])


def test_rows_that_are_said_and_rows_that_are_not_share_a_batch():
    model = make(STACKS["mix-d, mix-1, mix-1"], conditional=True)
    tokens = torch.randint(5, (3, 12))
    noise = model.noise_of(tokens)
    prompts = tokens[:, :6].clone()
    prompts[1, 2] = (prompts[1, 2] + 1) % 5
    together = model.generate(prompts, noise=noise, return_dict_in_generate=True)
    assert torch.equal(together.sequences[::2], tokens[::2])
    for row in range(3):
        one = slice(row, row + 1)
        alone = model.generate(prompts[one], noise=noise[one], return_dict_in_generate=True)
        assert torch.equal(alone.sequences, together.sequences[one])
        torch.testing.assert_close(alone.latents, together.latents[one])


def test_another_prompt_keeps_the_latents_up_to_where_it_differs():
    model = make(CAUSAL["left to right"])
    tokens = torch.randint(5, (2, 12))
    noise = model.noise_of(tokens)
    free = model.generate(noise=noise, return_dict_in_generate=True).latents
    prompt = tokens[:, :6].clone()
    prompt[:, 4] = (prompt[:, 4] + 1) % 5
    out = model.generate(prompt, noise=noise, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, :6], prompt)
    assert torch.equal(out.latents[:, :4], free[:, :4])
    expected = model.encode(prompt, noise=noise[:, :6])
    assert torch.equal(out.latents[:, 4:6], expected[:, 4:])


def test_noise_is_a_draw_from_the_posterior():
    """Noise of texts of the model is standard normal, and another draw is another."""
    model = separated([flow("mixture_rosenblatt")])
    generator = torch.Generator().manual_seed(1)
    tokens = model.generate(max_new_tokens=32, num_return_sequences=100, generator=generator)
    generator = torch.Generator().manual_seed(0)
    noise = model.noise_of(tokens, generator=generator)
    again = model.noise_of(tokens, generator=generator)
    assert not torch.isclose(noise, again).all(-1).any()
    repeated = model.noise_of(tokens, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise, repeated)

    from scipy.stats import kstest

    for i in range(2):
        assert kstest(noise[..., i].flatten(), "norm").pvalue > 1e-3


def test_latents_are_drawn_until_they_decode():
    """The draws have the density of q(z | x) in the region of x, and nothing outside."""
    model = make(STACKS["mix-d"], latent_size=1, vocab_size=4)
    codebook = model.codebook()
    ids = torch.arange(4).repeat(4000)
    latents = sample_decoded(codebook, ids)
    assert torch.equal(codebook.most_likely_token(latents), ids)

    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64).unsqueeze(-1)
    for token in range(4):
        index = torch.tensor(token).expand(len(grid))
        weight = codebook.log_prob(grid, index).exp() * (codebook.most_likely_token(grid) == token)
        expected = (weight @ grid) / weight.sum()
        deviation = (weight @ (grid - expected).square() / weight.sum()).sqrt()
        actual = latents[ids == token].mean()
        assert abs(actual - expected) < 4 * deviation / 4000**0.5


def test_what_has_no_noise_is_said():
    model = make(STACKS["mix-d"])
    with torch.no_grad():  # the first token is hidden under the second
        model.codebook.mean[0] = model.codebook.mean[1]
        model.codebook.log_scale[1] = model.codebook.log_scale[0]

    tokens = torch.randint(1, 5, (2, 8))
    model.noise_of(torch.where(tokens == 1, 2, tokens))
    with pytest.raises(ValueError, match=r"No latent decodes to the tokens \[1\]"):
        model.noise_of(tokens.clamp(max=1))
    with pytest.raises(ValueError, match="vocab_size"):
        model.noise_of(tokens + 5)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model.noise_of(tokens, attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="noise must have shape"):
        model.generate(tokens, noise=torch.randn(2, 8, 3, dtype=torch.float64))


def test_a_token_too_unlikely_for_the_precision_is_named():
    model = make(STACKS["mix-d"], latent_size=1)
    with torch.no_grad():
        model.codebook.mean.copy_(torch.arange(5.0).unsqueeze(-1))
        model.codebook.log_scale.fill_(-4.0)
        model.flow.layers[0].head.projection.bias[1:3] = -60.0

    # Both lie between two likely ones: no number tells how far the distribution function is there.
    tokens = torch.tensor([[0, 3, 4, 1, 0, 3, 2, 3]])
    with pytest.raises(ValueError, match=r"real position [36] is too unlikely"):
        model.noise_of(tokens)
