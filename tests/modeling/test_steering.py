"""Steering of `generate`: neutral by default, and otherwise exactly as documented."""

import itertools

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from helpers.models import CAUSAL, PATCH_STACKS, STACKS, flow, make
from helpers.streaming import Recorder
from tarflow_hf import TarFlowLMModel
from tarflow_hf.modeling.coupling import mixture_rosenblatt_inverse

NEUTRAL = {
    "temperature": 1.0,
    "flow_temperatures": [1.0, 1.0, 1.0],
    "mixture_temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "num_candidates": 1,
    "num_flows": 3,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    return make(STACKS["mix-d, mix-1, mix-1"]).float()


def sharp(flows, log_scale=-8.0, **options):
    """A model with a separated codebook, so that a latent is a token."""
    model = make(flows, **options)
    with torch.no_grad():
        for codebook in [
            model.codebook,
            *(getattr(layer.head, "codebook", None) for layer in model.flow.layers),
        ]:
            if codebook is not None:
                codebook.log_scale.fill_(log_scale)

    return model


def seeded(model, seed=0, **options):
    return model.generate(
        generator=torch.Generator().manual_seed(seed), output_states=True, **options
    )


@pytest.mark.parametrize("option", NEUTRAL)
@pytest.mark.parametrize("prompt", [None, torch.tensor([[1, 2], [3, 4]])], ids=["free", "prompt"])
def test_neutral_values_change_nothing(model, option, prompt):
    expected = seeded(model, inputs=prompt, num_return_sequences=2)
    for options in (
        {option: NEUTRAL[option]},
        # What a GenerationConfig says counts, too, and a new one asks for nothing: num_flows is
        # none of its fields.
        {
            "generation_config": GenerationConfig(
                **({} if option == "num_flows" else {option: NEUTRAL[option]})
            )
        },
    ):
        actual = seeded(model, inputs=prompt, num_return_sequences=2, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        assert all(map(torch.equal, actual.states, expected.states)) and actual.elbo is None


def test_the_defaults_of_the_library_ask_for_nothing():
    """The library's default top_k does not count as asked for.

    Older versions default to 50, which is an error for flows without mixture weights.
    """
    assert make(STACKS["mix-1"]).generate(
        generation_config=GenerationConfig(max_new_tokens=4)
    ).shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_kept", [1, 2, 5])
@pytest.mark.parametrize("log_scale", [0.0, -7.0])
def test_components_of_no_weight_might_as_well_not_be_there(dtype, num_kept, log_scale):
    """The inverse takes logits of -inf.

    top_k and top_p rely on it.
    """
    generator = torch.Generator().manual_seed(num_kept)
    shapes = (50, 3), (50, 9), (9, 3), (9,)
    u, logits, mean, scale = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes
    )
    u, mean, scale = 2 * u, 4 * mean, log_scale + 0.3 * scale
    is_dropped = torch.arange(9) >= num_kept
    actual = mixture_rosenblatt_inverse(u, logits.masked_fill(is_dropped, -torch.inf), mean, scale)
    kept = logits[:, :num_kept], mean[:num_kept], scale[:num_kept]
    exact = mixture_rosenblatt_inverse(u.double(), *(x.double() for x in kept))

    # As near to the truth as without them, plus rounding.
    error = (mixture_rosenblatt_inverse(u, *kept) - exact).abs().max().item()
    assert (actual - exact).abs().max().item() <= 3 * error + 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"flow_temperatures": [1.0, 1.0, 0.5]}], ids=str
)
def test_the_last_flow_temperature_is_the_temperature(model, options):
    expected = seeded(model)
    actual = seeded(model, **options)
    torch.testing.assert_close(actual.noise, 0.5 * expected.noise, rtol=0, atol=0)
    assert torch.equal(actual.sequences, model.generate(noise=0.5 * expected.noise))


@torch.no_grad()
def test_flow_temperatures_scale_the_state_that_enters_each_inverse():
    model = make(STACKS["mix-d, mix-1, mix-1"])
    temperatures, noise = [0.5, 2.0, 0.8], torch.randn(2, 8, 2, dtype=torch.float64)
    state, scaled = noise, []

    for flows in (3, 2, 1):  # flow by flow, each of them the last one of a stack of its own
        scaled.append(temperatures[flows - 1] * state)
        state = model.flow(scaled[-1], reverse=True, num_flows=flows).states[flows - 1]

    out = model.generate(noise=noise, flow_temperatures=temperatures, output_states=True)
    for actual, expected in zip(out.states, [state, *reversed(scaled)], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-7)


def first_flow_logits(model, latents):
    """The mixture logits (B, T, V) of a tied Mix-d flow at its own latents.

    They are the logits that a discrete transformer would give.
    """
    layer, codebook = model.flow.layers[0], model.codebook()
    context = layer.context(layer.inputs(latents, codebook))
    return torch.nn.functional.linear(context, *layer.head.projection()[0])


@pytest.mark.parametrize("inverse_method", ["sequential", "parallel"])
@pytest.mark.parametrize("stack", ["mix-d", "mix-d, mix-1, mix-1"])
def test_the_top_component_makes_the_flow_next_to_the_data_greedy(stack, inverse_method):
    model = sharp(STACKS[stack], vocab_size=9)
    out = model.generate(
        num_return_sequences=4, top_k=1, inverse_method=inverse_method, output_states=True
    )
    with torch.no_grad():
        logits = first_flow_logits(model, out.latents)

    assert torch.equal(out.sequences, logits.argmax(-1))
    assert not torch.equal(out.sequences, model.generate(noise=out.noise))
    assert torch.equal(out.sequences, model.generate(noise=out.noise, top_p=1e-6))
    captured = model.generate(
        noise=out.noise.double(), top_k=1, inverse_method="sequential", capture_step=True
    )
    assert torch.equal(out.sequences, captured)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda p: p),
        ({"mixture_temperature": 0.5}, lambda p: p**2),
        ({"mixture_temperature": 2}, lambda p: p**0.5),
        ({"top_k": 3}, lambda p: p * (p >= p.sort().values[-3])),
        # Those before which, from the largest on, there is less than 0.6.
        ({"top_p": 0.6}, lambda p: p * ((p > p[:, None]) * p).sum(1).lt(0.6)),
        (
            {"top_p": 0.6, "mixture_temperature": 0.5},
            lambda p: p**2 * ((p > p[:, None]) * p**2).sum(1).lt(0.6 * p.square().sum()),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_tokens_follow_the_steered_weights(options, expected):
    model = sharp([flow("mixture_rosenblatt")], latent_size=1, vocab_size=6, seed=3)
    with torch.no_grad():
        model.flow.layers[0].head.projection.bias.copy_(
            torch.tensor([1.0, 0.2, -0.6, 0.6, -2.0, 0.0])
        )
        p = first_flow_logits(model, torch.zeros(1, 1, 1, dtype=torch.float64))[0, 0].softmax(-1)

    tokens = seeded(model, max_new_tokens=1, num_return_sequences=20_000, **options).sequences[:, 0]
    q = expected(p) / expected(p).sum()
    counts = torch.bincount(tokens, minlength=6)
    assert (counts[q == 0] == 0).all()
    if options:
        assert chisquare(counts[p > 0].numpy(), (p * 20_000).numpy()).pvalue < 1e-6

    assert chisquare(counts[q > 0].numpy(), (q[q > 0] * 20_000).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("stack", [*PATCH_STACKS, "mix-d, own codebook", "one of each", "mix-d"])
def test_every_rosenblatt_flow_is_steered(stack):
    """With one component left, a flow forgets its noise.

    Tied or not, and with any head.
    """
    flows = (PATCH_STACKS | STACKS)[stack]
    model = sharp(flows, patch_size=2, log_scale=-12.0)
    noise = torch.randn(8, 8, 2, dtype=torch.float64)

    for index in range(len(flows)):
        for options in (
            {},
            {"logits_processor": lambda x: x.masked_fill(x < x.amax(-1, keepdim=True), -torch.inf)},
        ):
            with torch.no_grad():
                out = model.flow(noise, reverse=True, num_flows=index + 1, **options).states[index]
            forgets = flows[index]["coupling"] == "mixture_rosenblatt" and bool(options)
            assert ((out - out[:1]).abs().max() < 1e-3) == forgets


def test_a_conditional_model_is_steered_behind_its_prompt():
    model = sharp(STACKS["mix-d, mix-1, mix-1"], conditional=True)
    prompt = torch.randint(5, (2, 4))
    out = [
        model.generate(prompt, top_k=1, max_new_tokens=4, num_return_sequences=4) for _ in range(2)
    ]
    assert torch.equal(out[0][:, :4], prompt.repeat_interleave(4, 0))
    assert torch.equal(
        out[0], out[1]
    )  # no flow's noise but the first's matters for a left-to-right argmax


@pytest.mark.parametrize("case", ["free", "prompts", "infill", "conditional", "cut"])
def test_the_best_candidate_has_the_highest_bound(case):
    model = make(STACKS["mix-d, mix-1, mix-1"] if case != "prompts" else CAUSAL["left to right"], 2,
                 conditional=case == "conditional")  # fmt: skip
    options, num_new = {"max_new_tokens": 8}, 8

    if case in ("prompts", "conditional"):
        prompt = torch.tensor(
            [[99, 99, 1, 2], [3, 4, 0, 1]]
        )  # padded by an id outside of the vocabulary
        options |= {"inputs": prompt, "attention_mask": (prompt != 99).long()}

    if case == "infill":
        options = {
            "inputs": torch.randint(5, (2, 8)),
            "infill_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]] * 2),
        }

    if case == "cut":
        options["num_flows"] = 1

    out = seeded(model, num_return_sequences=2, num_candidates=5, **options)
    # The same draws by hand: all candidates, then the noise of their bounds.
    generator = torch.Generator().manual_seed(0)
    every = model.generate(
        num_return_sequences=10, generator=generator, output_states=True, **options
    )
    ids, mask, observed = every.sequences, None, None

    if case in ("prompts", "conditional"):
        # As right-padded texts: the first prompt's padding goes to the end.
        is_real = torch.cat(
            [options["attention_mask"], torch.ones(2, num_new, dtype=torch.long)], 1
        )
        is_real = is_real.repeat_interleave(10, 0)
        order = is_real.argsort(dim=-1, descending=True, stable=True)
        ids, mask = ids.gather(1, order) % 99, is_real.gather(1, order)
        observed = (
            (torch.arange(12) < mask.sum(-1, keepdim=True) - num_new)
            if case == "conditional"
            else None
        )

    noise = torch.randn(len(ids) // 5, ids.shape[1], 2, generator=generator).repeat_interleave(5, 0)
    latents = model.encode(ids, noise=noise)

    with torch.no_grad():
        cut = options.get("num_flows")
        elbo = model(ids, mask, latents=latents, observed_mask=observed, num_flows=cut).elbo

    best = elbo.reshape(-1, 5).argmax(-1) + 5 * torch.arange(len(elbo) // 5)
    torch.testing.assert_close(out.elbo, elbo.reshape(-1, 5).amax(-1))
    assert torch.equal(out.sequences, every.sequences[best]) and len(set((best % 5).tolist())) > 1
    for actual, state in zip(out.states, every.states, strict=True):
        torch.testing.assert_close(actual, state[best], atol=1e-7, rtol=1e-7)


def test_more_candidates_are_better():
    model = sharp([flow("mixture_rosenblatt")], vocab_size=9, log_scale=-3.0)
    with torch.no_grad():
        model.flow.layers[0].head.projection.bias.mul_(20)
        few, many = (
            model.importance_weighted_bound(
                seeded(model, num_return_sequences=50, num_candidates=n).sequences
            )
            for n in (1, 8)
        )

    assert many.mean() > few.mean() + 2 * (many.var() / 50 + few.var() / 50).sqrt()


@pytest.mark.parametrize("num_flows", [1, 2, 3])
def test_the_state_of_any_flow_gives_the_text_back(num_flows):
    """An edit that changes nothing gives the text back.

    An edit of some positions leaves the earlier positions of every flow as they are.
    """
    model = make(CAUSAL["left to right"])
    latents = model.encode(torch.randint(5, (4, 10)))
    state = model.flow(latents, num_flows=num_flows).noise
    expected = model.decode(latents).argmax(-1)
    out = model.generate(noise=state, num_flows=num_flows, output_states=True)
    assert torch.equal(out.sequences, expected) and len(out.states) == num_flows + 1
    torch.testing.assert_close(out.latents, latents, atol=1e-7, rtol=1e-7)
    state[:, 6:] = torch.randn(4, 4, 2)
    edited = model.generate(noise=state, num_flows=num_flows)
    assert torch.equal(edited[:, :6], expected[:, :6]) and not torch.equal(edited, expected)


def test_the_stack_cut_is_a_model_of_its_own(model):
    prompt = torch.tensor([[1, 2]])
    out = seeded(
        model, inputs=prompt, num_flows=1, flow_temperatures=[0.5], inverse_method=["sequential"]
    )
    assert len(out.states) == 2 and torch.equal(out.sequences[:, :2], prompt)
    torch.testing.assert_close(
        model.flow(out.latents, num_flows=1).noise[:, 2:], out.noise[:, 2:], atol=1e-4, rtol=0
    )


def test_streamed_tokens_are_steered(model):
    streamer = Recorder()
    tokens = model.generate(streamer=streamer, top_k=1, flow_temperatures=[0.5, 1.0, 1.0])
    assert list(itertools.chain(*streamer.parts)) == tokens[0].tolist()


@pytest.mark.parametrize(
    "name", ["flow_temperatures", "mixture_temperature", "top_k", "num_candidates"]
)
def test_steering_is_saved_with_the_model(tmp_path, name):
    model = make(STACKS["mix-d"])
    value = {
        "flow_temperatures": [0.5],
        "mixture_temperature": 0.5,
        "top_k": 1,
        "num_candidates": 4,
    }[name]
    expected = seeded(model, num_return_sequences=4, **{name: value})
    assert not torch.equal(expected.sequences, seeded(model, num_return_sequences=4).sequences)

    # A new one: of one made from the model's config the library drops the fields that it does not
    # know.
    model.generation_config = GenerationConfig(do_sample=True, **{name: value})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).double()
    assert torch.equal(expected.sequences, seeded(loaded, num_return_sequences=4).sequences)

    # What is asked for wins over what is saved.
    neutral = [1.0] if name == "flow_temperatures" else NEUTRAL[name]
    actual = seeded(loaded, num_return_sequences=4, **{name: neutral})
    assert torch.equal(
        actual.sequences, seeded(make(STACKS["mix-d"]), num_return_sequences=4).sequences
    )


def test_bad_input(model):
    noise = torch.zeros(1, 8, 2)
    cases = [
        (dict(flow_temperatures=[1.0]), "flow_temperatures has 1 entries for 3 flows"),
        (
            dict(flow_temperatures=[1.0, 1.0], num_flows=1),
            "flow_temperatures has 2 entries for 1 flows",
        ),
        (dict(flow_temperatures=[1.0, 0.0, 1.0]), "flow_temperatures must be positive"),
        (dict(flow_temperatures=[1.0, float("nan"), 1.0]), "flow_temperatures must be positive"),
        (dict(mixture_temperature=0), "mixture_temperature must be positive"),
        (dict(mixture_temperature=float("inf")), "mixture_temperature must be positive and finite"),
        (dict(top_k=-1), "top_k must be a positive integer"),
        (dict(top_k=2.5), "top_k must be a positive integer"),
        (dict(top_p=0.0), "top_p must be above 0"),
        (dict(top_p=1.5), "top_p must be above 0"),
        (dict(num_candidates=0), "num_candidates must be an integer of at least 1, not 0"),
        (dict(num_candidates=1.5), "num_candidates must be an integer"),
        (dict(num_candidates=2, noise=noise), "leave out num_candidates=2"),
        (dict(num_candidates=2, streamer=Recorder()), "num_candidates=2"),
        (dict(num_flows=0), r"num_flows must be in 1, ..., 3, not 0"),
        (
            dict(num_flows=4, inputs=torch.zeros(1, 2, dtype=torch.long)),
            r"num_flows must be in 1, ..., 3, not 4",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(**arguments)

    for options in ({"top_k": 1}, {"top_p": 0.5}, {"mixture_temperature": 0.5}):
        with pytest.raises(ValueError, match="steer mixture_rosenblatt flows"):
            make(STACKS["mix-1"]).generate(**options)


def test_options_are_saved_with_the_model(tmp_path):
    model = make(STACKS["mix-d"])
    model.generation_config.num_candidates = 3
    model.generation_config.decode = "sample"
    model.save_pretrained(tmp_path)
    loaded = TarFlowLMModel.from_pretrained(tmp_path).generation_config
    assert (loaded.num_candidates, loaded.decode, loaded.do_sample) == (3, "sample", True)
