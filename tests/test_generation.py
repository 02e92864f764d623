"""generate: determinism, options, prompts, streaming, and what it refuses."""

import itertools

import pytest
import torch
from test_modeling import STACKS, flow, make
from transformers import GenerationConfig, TextStreamer, set_seed

from tarflow_hf import TarFlowLMModel

LEFT_TO_RIGHT = [flow("mixture_rosenblatt"), flow("mixture_cdf", num_components=2), flow("affine")]


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
    model.generation_config.temperature = 0.25  # saved with the model, and overridden by what is asked for
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
    """Each position costs one forward of one token through each decoder: no prefix is read twice."""
    lengths = []
    hooks = [
        layer.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        for layer in model.flow.layers
    ]
    model.generate(max_new_tokens=11, inverse_method="sequential")
    for hook in hooks:
        hook.remove()
    assert lengths == [1] * 11 * 3


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_prompt_is_exact_where_all_flows_run_left_to_right(patch_size):
    """Given the prompt's latents, noise behind the prompt gives what the whole noise of that prompt would give."""
    model = make(LEFT_TO_RIGHT, patch_size)
    z = model.encode(torch.randint(5, (2, 8)))
    u = model.flow(z).noise
    u = torch.cat([torch.full_like(u[:, :4], torch.nan), u[:, 4:]], 1)  # the noise at the prompt is not read
    torch.testing.assert_close(model.flow(u, reverse=True, prefix=z[:, :4]).latents, z, atol=1e-7, rtol=1e-7)


def test_a_prompt_comes_back_in_front(model, caplog):
    prompt = torch.randint(5, (2, 4))
    tokens = model.generate(prompt, max_new_tokens=6, num_return_sequences=2)
    assert tokens.shape == (4, 10)
    assert torch.equal(tokens[:, :4], prompt.repeat_interleave(2, 0))
    assert torch.equal(model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))[:, :4], prompt)


def test_nothing_but_padding_after_the_end(model):
    generator = torch.Generator().manual_seed(0)
    free = model.generate(num_return_sequences=16, generator=generator)
    tokens = model.generate(
        num_return_sequences=16, generator=generator.manual_seed(0), eos_token_id=[2, 3], pad_token_id=1
    )
    some_end = False
    for row, free_row in zip(tokens.tolist(), free.tolist(), strict=True):
        end = next((i for i, token in enumerate(free_row) if token in (2, 3)), len(row))
        assert row[: end + 1] == free_row[: end + 1] and set(row[end + 1 :]) <= {1}
        some_end |= end + 1 < len(row)
    assert some_end


class Recorder:
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("decode", ["argmax", "sample"])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "mix-1, right to left, posterior"])
def test_streamed_tokens_are_those_returned(stack, patch_size, decode):
    model = make(STACKS[stack], patch_size)
    for eos_token_id in (None, 2):
        streamer = Recorder()
        tokens = model.generate(streamer=streamer, decode=decode, eos_token_id=eos_token_id, pad_token_id=0)[0].tolist()
        streamed = list(itertools.chain(*streamer.parts))
        assert streamer.ended and streamed == tokens[: len(streamed)]
        assert len(streamed) == len(tokens) or streamed[-1] == eos_token_id
        if stack.startswith("mix-d") and eos_token_id is None:
            assert max(map(len, streamer.parts)) == patch_size  # as they come


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
        (dict(temprature=0.5), r"no options \['temprature'\]"),
        (dict(num_beams=4), r"no options \['num_beams'\]"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(temperature=-1.0), "temperature must be positive"),
        (dict(num_return_sequences=0), "num_return_sequences"),
        (dict(decode="greedy"), "decode must be"),
        (dict(inputs=prompt, input_ids=prompt), "not as both"),
        (dict(inputs=prompt, max_new_tokens=0), "Nothing to generate"),
        (dict(inputs=prompt, max_length=4), "Nothing to generate"),
        (dict(inputs=prompt.repeat(1, longest)), "leaves no room"),
        (dict(inputs=prompt + 9), "vocab_size"),
        (dict(inputs=prompt, attention_mask=torch.tensor([[0, 1, 1, 1]])), "padding"),
        (dict(noise=torch.zeros(1, 8, 3)), "noise must have shape"),
        (dict(noise=torch.zeros(1, longest + 1, 2)), "max_position_embeddings"),
        (dict(noise=torch.zeros(1, 8, 2), num_return_sequences=2), "num_return_sequences"),
        (dict(streamer=Recorder(), num_return_sequences=2), "one sequence"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(**arguments)
    with pytest.raises(ValueError, match="multiples of patch_size"):
        make(STACKS["mix-d"], 2).generate(max_new_tokens=5)
    with pytest.raises(ValueError, match="left to right"):
        make(STACKS["affine, right to left"]).generate(prompt)
