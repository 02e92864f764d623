"""`generate`: determinism, options, prompts, streaming, and the inputs it refuses."""

import itertools

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from helpers.enumeration import gauss_legendre
from helpers.models import CAUSAL, STACKS, flow, make
from helpers.streaming import Recorder
from tarflow_hf import TarFlowLMModel


@pytest.fixture(scope="module")
def model() -> TarFlowLMModel:
    return make(STACKS["mix-d, mix-1, mix-1"]).float()


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", STACKS)
def test_the_same_noise_gives_the_same_tokens_whatever_the_batch(stack, patch_size):
    model = make(STACKS[stack], patch_size)
    noise = torch.randn(3, 8, 2, dtype=torch.float64)
    tokens = model.generate(noise=noise)
    assert torch.equal(tokens, model.generate(noise=noise))
    assert torch.equal(tokens[1:2], model.generate(noise=noise[1:2]))
    latents = model.flow(noise, reverse=True).latents
    assert torch.equal(tokens, model.decode(latents).argmax(-1))


def test_seeds_and_generators(model):
    def sample(**options):
        return model.generate(num_return_sequences=4, **options)

    set_seed(3)
    first = sample()
    set_seed(3)
    assert torch.equal(first, sample()) and not torch.equal(first, sample())
    a, b = (sample(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    a, b = (sample(generator=torch.Generator().manual_seed(5), decode="sample") for _ in range(2))
    assert torch.equal(a, b)


def test_lengths(model):
    longest = model.config.max_position_embeddings
    assert model.generate().shape == (1, longest)
    assert model.generate(max_new_tokens=7, num_return_sequences=3).shape == (3, 7)
    assert model.generate(max_length=9).shape == (1, 9)
    assert model.generate(generation_config=GenerationConfig(max_new_tokens=5)).shape == (1, 5)
    assert model.generate(max_new_tokens=10 * longest).shape == (1, longest)


def test_temperature_scales_the_noise_and_no_sampling_puts_it_at_its_mode(model):
    def noise(**options):
        generator = torch.Generator().manual_seed(0)
        return model.generate(generator=generator, return_dict_in_generate=True, **options).noise

    torch.testing.assert_close(noise(temperature=0.5), 0.5 * noise())
    assert (noise(do_sample=False) == 0).all()
    model.generation_config.temperature = (
        0.25  # saved with the model, and overridden by what is asked for
    )
    torch.testing.assert_close(noise(), 0.25 * noise(temperature=1.0))
    model.generation_config.temperature = None


def test_states_go_from_the_latents_to_the_noise(model):
    out = model.generate(num_return_sequences=2, output_states=True)
    assert len(out.states) == 4
    torch.testing.assert_close(out.states[0], out.latents)
    torch.testing.assert_close(out.states[-1], out.noise)
    for index, state in enumerate(model.flow(out.latents).states):
        torch.testing.assert_close(state, out.states[index], atol=1e-3, rtol=1e-3)

    assert torch.equal(model.decode(out.states[0]).argmax(-1), out.sequences)


def test_work_is_linear_in_the_length(model):
    """Each position costs one forward of one token through each decoder.

    No prefix is read twice.
    """
    lengths = []
    hooks = [
        layer.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        )
        for layer in model.flow.layers
    ]
    model.generate(max_new_tokens=11, inverse_method="sequential")
    for hook in hooks:
        hook.remove()

    assert lengths == [1] * 11 * 3


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", CAUSAL)
def test_a_prompt_is_exact_where_no_flow_runs_right_to_left(stack, patch_size):
    """Noise behind a prompt gives the tokens that the whole noise would give.

    The latents of the prompt are given.
    """
    model = make(CAUSAL[stack], patch_size)
    z = model.encode(torch.randint(5, (2, 8)))
    u = model.flow(z).noise
    known_mask = torch.arange(8) < torch.tensor([[4], [6]])
    u, known = (
        u.masked_fill(known_mask[..., None], torch.nan),
        z.masked_fill(~known_mask[..., None], torch.nan),
    )
    out = model.flow(u, reverse=True, known=known, known_mask=known_mask)
    torch.testing.assert_close(out.latents, z, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("stack", STACKS)
def test_known_latents_stay_where_they_are(stack):
    model = make(STACKS[stack], patch_size=2)
    z, u = torch.randn(2, 2, 8, 2, dtype=torch.float64)
    known_mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]) == 1
    out = model.flow(u, reverse=True, known=z, known_mask=known_mask).latents
    assert torch.equal(out[known_mask], z[known_mask])

    # In a stack of one flow, whose output is the noise, everything else is as the noise there
    # demands.
    if len(model.flow.layers) == 1:
        torch.testing.assert_close(
            model.flow(out).noise[~known_mask], u[~known_mask], atol=1e-8, rtol=1e-8
        )

    known_mask[0, 0] = False
    with pytest.raises(ValueError, match="whole patches"):
        model.flow(u, reverse=True, known=z, known_mask=known_mask)


def test_a_prompt_comes_back_in_front(model, caplog):
    prompt = torch.randint(5, (2, 4))
    tokens = model.generate(prompt, max_new_tokens=6, num_return_sequences=2)
    assert tokens.shape == (4, 10)
    assert torch.equal(tokens[:, :4], prompt.repeat_interleave(2, 0))
    assert torch.equal(
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))[:, :4], prompt
    )


@pytest.mark.parametrize(("patch_size", "side"), [(1, "left"), (2, "right")])
@pytest.mark.parametrize(
    "stack", [*CAUSAL, "mix-d, mix-1, mix-1", "mix-d, mix-1, mix-1; conditional"]
)
def test_prompts_of_different_lengths_share_a_batch(stack, patch_size, side):
    name, _, conditional = stack.partition("; ")
    model = make((CAUSAL | STACKS)[name], patch_size, conditional=bool(conditional))
    prompts = [torch.randint(5, (length,)) for length in (2, 6, 0, 4)]
    noise = torch.randn(4, 12, 2, dtype=torch.float64)
    padding, width = 99, 6  # an id outside of the vocabulary
    input_ids = torch.full((4, width), padding)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[width - len(prompt) if side == "left" else 0 :][: len(prompt)] = prompt

    mask = (input_ids != padding).long()
    out = model.generate(input_ids, attention_mask=mask, noise=noise, output_states=True)
    assert torch.equal(out.sequences[:, :width], input_ids)

    for n, prompt in enumerate(prompts):
        is_real = torch.cat([mask[n] == 1, torch.ones(6, dtype=torch.bool)])
        alone = model.generate(prompt[None], noise=noise[n : n + 1, is_real], output_states=True)
        assert torch.equal(alone.sequences[0], out.sequences[n, is_real])

        for state, expected in zip(out.states, alone.states, strict=True):
            torch.testing.assert_close(state[n, is_real], expected[0], atol=1e-7, rtol=1e-7)
            assert (state[n, ~is_real] == 0).all()

    # Without a given noise, and with the padding of all rows alike.
    tokens = model.generate(
        input_ids[:1], attention_mask=mask[:1], num_return_sequences=3, max_new_tokens=4
    )
    assert torch.equal(tokens[:, :width], input_ids[:1].expand(3, -1)) and tokens.shape == (3, 10)


@pytest.mark.parametrize(("patch_size", "side"), [(1, "left"), (2, "right")])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "mix-1, right to left, posterior"])
def test_an_infill_keeps_every_known_token(stack, conditional, patch_size, side):
    """Three texts of different lengths are filled in as each would be on its own.

    One of them is all gap.
    """
    model = make(STACKS[stack], patch_size, conditional=conditional)
    noise, ids = torch.randn(3, 8, 2, dtype=torch.float64), torch.randint(5, (3, 8))
    mask = torch.arange(8) < torch.tensor([[8], [4], [6]])
    gaps = (
        torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1, 1]])
        == 1
    )
    if side == "left":
        mask, gaps = mask.flip(1), gaps.flip(1)

    ids[gaps] = 77  # not read
    out = model.generate(
        ids, attention_mask=mask, infill_mask=gaps.long(), noise=noise, return_dict_in_generate=True
    )
    is_new = gaps & mask
    assert torch.equal(out.sequences[~is_new], ids[~is_new]) and (out.sequences[is_new] < 5).all()
    assert torch.equal(out.sequences[is_new], model.decode(out.latents).argmax(-1)[is_new])

    for n in range(3):
        text, gap, u = ids[n : n + 1, mask[n]], gaps[n : n + 1, mask[n]], noise[n : n + 1, mask[n]]
        alone = model.generate(text, infill_mask=gap, noise=u, return_dict_in_generate=True)
        assert torch.equal(alone.sequences[0], out.sequences[n, mask[n]])
        torch.testing.assert_close(alone.latents[0], out.latents[n, mask[n]], atol=1e-7, rtol=1e-7)
        if gap.all():
            assert torch.equal(alone.sequences, model.generate(noise=u))

    several = model.generate(ids, attention_mask=mask, infill_mask=gaps, num_return_sequences=2)
    assert torch.equal(several[::2][~is_new], ids[~is_new]) and torch.equal(
        several[1::2][~is_new], ids[~is_new]
    )


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("name", [*CAUSAL, "conditional"])
def test_a_gap_at_the_end_is_a_prompt(name, patch_size):
    flows = STACKS["mix-d, mix-1, mix-1"] if name == "conditional" else CAUSAL[name]
    model = make(flows, patch_size, conditional=name == "conditional")
    noise, ids = torch.randn(2, 8, 2, dtype=torch.float64), torch.randint(5, (2, 8))
    gap = (torch.arange(8) >= 4).expand(2, -1)
    expected = model.generate(ids[:, :4], noise=noise)
    assert torch.equal(model.generate(ids, infill_mask=gap, noise=noise), expected)


def test_what_is_approximate_is_said_once(monkeypatch):
    from tarflow_hf.modeling.generation_checks import logger

    warnings = []
    monkeypatch.setattr(logger, "warning_once", warnings.append)
    ids, last = torch.randint(5, (1, 8)), torch.arange(8)[None] >= 4
    exact, mixed = make(CAUSAL["left to right"]), make(STACKS["mix-d, mix-1, mix-1"])
    conditional = make(STACKS["mix-d, mix-1, mix-1"], conditional=True)
    exact.generate(ids, max_new_tokens=2)
    exact.generate(ids, infill_mask=last)
    mixed.generate(ids, infill_mask=torch.ones_like(ids))
    conditional.generate(ids, max_new_tokens=2)
    conditional.generate(ids, infill_mask=~last)
    assert not warnings
    exact.generate(ids, infill_mask=~last)
    mixed.generate(ids, infill_mask=last)
    mixed.generate(ids, max_new_tokens=2)
    assert len(warnings) == 3 and all("approximation" in warning for warning in warnings)


def test_a_continuation_follows_its_enumerated_distribution():
    """Continuations of a prompt x follow E_q p(z_new | z), decoded by p(x | z_new).

    The prompt's latents z are drawn from q(z | x), and the expectation is taken by quadrature. Left
    to right, p(z_new | z) = p(z, z_new) / p(z), where p(z) is the model of the first token only.
    """
    from scipy.stats import chisquare

    flows = [flow("mixture_rosenblatt"), flow("mixture_cdf", num_components=2)]
    model = make(flows, latent_size=1, vocab_size=3, seed=1, initial_log_scale=-0.5)
    with torch.no_grad():
        model.flow.layers[0].head.projection.weight.mul_(3)  # so that the prompt matters

    mean, log_scale = model.codebook()
    prompt = 2
    z, q = gauss_legendre(
        32, *(mean[prompt, 0] + sign * 4.5 * log_scale[prompt].exp() for sign in (-1, 1))
    )
    q = q * torch.distributions.Normal(mean[prompt, 0], log_scale[prompt].exp()).log_prob(z).exp()
    nodes, weights = gauss_legendre(60, -8.0, 8.0)
    grid = torch.cartesian_prod(z, nodes, nodes).unsqueeze(-1)

    with torch.no_grad():
        joint = torch.cat(
            [model.flow(part, output_noise=False).log_prob for part in grid.split(2**16)]
        )
        first = model.flow(z.reshape(-1, 1, 1), output_noise=False).log_prob
        decoder = model.decode(nodes.reshape(-1, 1, 1))[:, 0].exp() * weights[:, None]  # (60, V)
        density = (joint.reshape(32, 60, 60) - first[:, None, None]).exp()
        expected = torch.einsum("z,zab,ax,by->xy", q, density, decoder, decoder).flatten()

    assert (
        expected.sum().item() == pytest.approx(1, abs=1e-3)
        and expected.max() / expected.min() > 1.2
    )

    generator = torch.Generator().manual_seed(1)
    tokens = model.float().generate(
        torch.full((20_000, 1), prompt), max_new_tokens=2, decode="sample", generator=generator
    )
    counts = torch.bincount(tokens[:, 1] * 3 + tokens[:, 2], minlength=9)
    assert chisquare(counts.numpy(), (expected / expected.sum() * 20_000).numpy()).pvalue > 1e-3

    # The test would notice a continuation that forgets its prompt.
    free = model.generate(
        num_return_sequences=20_000, max_new_tokens=3, decode="sample", generator=generator
    )
    counts = torch.bincount(free[:, 1] * 3 + free[:, 2], minlength=9)
    assert chisquare(counts.numpy(), (expected / expected.sum() * 20_000).numpy()).pvalue < 1e-6


def test_nothing_but_padding_after_the_end(model):
    generator = torch.Generator().manual_seed(0)
    free = model.generate(num_return_sequences=16, generator=generator)
    tokens = model.generate(
        num_return_sequences=16,
        generator=generator.manual_seed(0),
        eos_token_id=[2, 3],
        pad_token_id=1,
    )
    some_end = False

    for row, free_row in zip(tokens.tolist(), free.tolist(), strict=True):
        end = next((i for i, token in enumerate(free_row) if token in (2, 3)), len(row))
        assert row[: end + 1] == free_row[: end + 1] and set(row[end + 1 :]) <= {1}
        some_end |= end + 1 < len(row)

    assert some_end


@pytest.mark.parametrize("decode", ["argmax", "sample"])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "mix-1, right to left, posterior"])
def test_streamed_tokens_are_those_returned(stack, patch_size, decode):
    model = make(STACKS[stack], patch_size)
    for eos_token_id in (None, 2):
        streamer = Recorder()
        tokens = model.generate(
            streamer=streamer, decode=decode, eos_token_id=eos_token_id, pad_token_id=0
        )[0].tolist()
        streamed = list(itertools.chain(*streamer.parts))
        assert streamer.ended and streamed == tokens[: len(streamed)]
        assert len(streamed) == len(tokens) or streamed[-1] == eos_token_id
        if stack.startswith("mix-d") and eos_token_id is None:
            assert max(map(len, streamer.parts)) == patch_size  # as they come


@pytest.mark.parametrize("conditional", [False, True])
def test_streamed_prompts_and_gaps(conditional):
    model = make(STACKS["mix-d, mix-1, mix-1"], 2, conditional=conditional)
    ids, mask = torch.randint(5, (1, 6)), torch.tensor([[0, 0, 1, 1, 1, 1]])
    streamer = Recorder()
    tokens = model.generate(ids, attention_mask=mask, streamer=streamer, max_new_tokens=6)[
        0
    ].tolist()
    assert streamer.parts[0] == ids[0].tolist() and list(itertools.chain(*streamer.parts)) == tokens
    assert [len(part) for part in streamer.parts[1:]] == [2, 2, 2]
    streamer = Recorder()
    tokens = model.generate(
        ids, infill_mask=mask.roll(-2, 1), streamer=streamer, eos_token_id=[0, 1, 2, 3, 4]
    )
    assert streamer.parts[0] == [] and list(itertools.chain(*streamer.parts)) == tokens[0].tolist()
    assert torch.equal(tokens[:, 4:], ids[:, 4:])


def test_text_streamer(capsys):
    from tarflow_hf.data import character_tokenizer

    tokenizer = character_tokenizer()
    model = make(STACKS["mix-d"], vocab_size=27)
    tokens = model.generate(streamer=TextStreamer(tokenizer), max_new_tokens=12)
    assert capsys.readouterr().out.strip("\n") == tokenizer.decode(tokens[0])


def test_bad_input(model):
    prompt = torch.zeros(1, 4, dtype=torch.long)
    longest = model.config.max_position_embeddings

    cases = [
        (dict(temprature=0.5), r"no options \['temprature'\] \(did you mean temperature\?\)"),
        (dict(num_beams=4), r"no options \['num_beams'\]; its"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(temperature=-1.0), "temperature must be positive"),
        (dict(temperature=float("nan")), "temperature must be positive and finite, not nan"),
        (dict(temperature=float("inf")), "temperature must be positive and finite, not inf"),
        (
            dict(num_return_sequences=0),
            "num_return_sequences must be an integer of at least 1, not 0",
        ),
        (
            dict(num_return_sequences=1.5),
            "num_return_sequences must be an integer of at least 1, not 1.5",
        ),
        (dict(inputs=prompt[0]), r"shape \(B, n\): torch.int64, \(4,\)"),
        (dict(inputs=prompt.float()), r"integers of shape \(B, n\): torch.float32"),
        (dict(noise=torch.zeros(8, 2)), r"noise must have shape \(B, T, d\), not \(8, 2\)"),
        (dict(decode="greedy"), "decode must be"),
        (dict(inputs=prompt, input_ids=prompt), "not as both"),
        (dict(inputs=prompt, max_new_tokens=0), "Nothing to generate"),
        (dict(inputs=prompt, max_length=4), "Nothing to generate"),
        (dict(inputs=prompt.repeat(1, longest)), "leaves no room"),
        (dict(inputs=prompt + 9), "vocab_size"),
        (
            dict(inputs=prompt, attention_mask=torch.ones(1, 5)),
            r"shape of the prompt: \(1, 5\), \(1, 4\)",
        ),
        (dict(attention_mask=torch.ones(1, 5)), "shape of the prompt"),
        (dict(noise=torch.zeros(1, 8, 3)), "noise must have shape"),
        (dict(infill_mask=torch.ones(1, 4)), r"shape \(B, T\) of the text"),
        (dict(inputs=prompt, infill_mask=torch.ones(1, 5)), r"shape \(B, T\) of the text"),
        (dict(inputs=prompt, infill_mask=2 * torch.ones(1, 4)), "boolean, or 0 and 1"),
        (dict(inputs=prompt, infill_mask=torch.zeros(1, 4)), "nothing to fill in"),
        (dict(inputs=prompt, infill_mask=prompt == 0, attention_mask=prompt), "nothing to fill in"),
        (
            dict(inputs=prompt, infill_mask=prompt == 0, max_new_tokens=3),
            "max_new_tokens says nothing",
        ),
        (dict(inputs=prompt + 9, infill_mask=torch.tensor([[0, 0, 0, 1]])), "vocab_size"),
        (
            dict(inputs=prompt.repeat(1, longest), infill_mask=torch.ones(1, 4 * longest)),
            "max_position_embeddings",
        ),
        (dict(noise=torch.zeros(1, longest + 1, 2)), "max_position_embeddings"),
        (dict(streamer=Recorder(), num_return_sequences=2), "one sequence"),
        (dict(inputs=prompt == 0), r"integers of shape \(B, n\): torch.bool"),
        (dict(inputs=prompt, position_ids=prompt), "position_ids must count"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(**arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": 4}, "max_new_tokens is 8: leave out"),
        ({"max_length": 4}, "max_length is 8: leave out"),
        ({"temperature": 0.5}, "temperature is 1: leave out"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_what_contradicts_noise(model, option, message):
    noise = torch.zeros(1, 8, 2)
    with pytest.raises(ValueError, match=message):
        model.generate(noise=noise, **option)

    same = {"max_new_tokens": 8, "temperature": 1.0, "do_sample": False}  # nothing is drawn
    assert torch.equal(model.generate(noise=noise, **same), model.generate(noise=noise))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_prompts_of_every_integer_type(model, dtype):
    prompt = torch.tensor([[3, 0, 4]])
    options = {"max_new_tokens": 4, "eos_token_id": 1, "pad_token_id": 0}
    expected = model.generate(prompt, generator=torch.Generator().manual_seed(0), **options)
    tokens = model.generate(prompt.to(dtype), generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(tokens, expected) and tokens.dtype == torch.int64
    assert torch.equal(model(prompt.to(dtype)).elbo, model(prompt).elbo)


def test_what_changes_no_token_is_taken(model):
    """NumPy's integers, and options of the library that any causal language model takes."""
    prompt = torch.zeros(1, 4, dtype=torch.long)

    def tokens(**options):
        return model.generate(prompt, generator=torch.Generator().manual_seed(0), **options)

    expected = tokens(max_new_tokens=6, eos_token_id=1, pad_token_id=0)
    same = tokens(
        max_new_tokens=np.int64(6), eos_token_id=np.int64(1), pad_token_id=np.int64(0),
        position_ids=torch.arange(4)[None], cache_implementation="dynamic", disable_compile=True,
        trust_remote_code=True, logits_to_keep=1,
    )  # fmt: skip
    assert torch.equal(same, expected)

    greedy = tokens(max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens(max_new_tokens=6, do_sample=False, temperature=0.0), greedy)


def test_lengths_that_do_not_fit():
    prompt = torch.zeros(1, 4, dtype=torch.long)
    pairs = make(STACKS["mix-d"], 2)
    with pytest.raises(ValueError, match="multiples of patch_size"):
        pairs.generate(max_new_tokens=5)

    with pytest.raises(ValueError, match=r"multiples of patch_size, 2, not \[3\] and 2 tokens"):
        pairs.generate(prompt, attention_mask=torch.tensor([[0, 1, 1, 1]]), max_new_tokens=2)

    with pytest.raises(ValueError, match="whole patches"):
        pairs.generate(prompt, infill_mask=torch.tensor([[0, 1, 1, 1]]))

    with pytest.raises(ValueError, match=r"multiples of patch_size, 2, not \[3\] tokens"):
        pairs.generate(prompt, infill_mask=prompt == 0, attention_mask=torch.tensor([[0, 1, 1, 1]]))

    with pytest.raises(ValueError, match="left to right"):
        make(STACKS["affine, right to left"]).generate(prompt)
