"""Every method of inversion against the sequential one.

`test_modeling.py` holds the sequential one to a loop without a cache.
"""

import itertools

import pytest
import torch
from transformers import MistralConfig

from helpers.models import CAUSAL, STACKS, flow, make
from helpers.streaming import Recorder
from tarflow_hf.modeling.inverse_options import FlowInverse
from tarflow_hf.modeling.inversion_tarflowlm import MAX_GUESS
from tarflow_hf.modeling.slots_tarflowlm import Known

METHODS = {
    "parallel": {"inverse_method": "parallel"},
    "parallel, window 1": {"inverse_method": "parallel", "inverse_window": 1},
    "parallel, window 3": {"inverse_method": "parallel", "inverse_window": 3},
    "captured step": {"inverse_method": "sequential", "capture_step": True},
    "auto": {"inverse_method": "auto"},
}

TOLERANCE = {torch.float32: 32 * 2**-23, torch.float64: 32 * 2**-52}  # of the residual, by default

# Of states, against the sequential inverse. Llama's norm rounds to float32 in a float64 model, too.
ERROR = {torch.float32: 1e-3, torch.float64: 1e-7}


def invert(model, u, **options):
    with torch.no_grad():
        return model.flow(u, reverse=True, **options)


def assert_certified(reports, num_positions, dtype):
    for report in reports:
        assert sum(report.num_final) == num_positions and min(report.num_final) >= 1
        assert report.iterations == len(report.num_final) <= num_positions
        assert 0 <= report.residual <= (TOLERANCE[dtype] if report.method == "parallel" else 0)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stack", STACKS)
def test_every_method_gives_the_sequential_inverse(stack, method, patch_size):
    model = make(STACKS[stack], patch_size)
    u = torch.randn(3, 8, 2, dtype=torch.float64)

    for dtype in (torch.float64, torch.float32):
        model, u = model.to(dtype), u.to(dtype)
        expected = invert(model, u, inverse_method="sequential")
        actual = invert(model, u, **METHODS[method])
        for a, e in zip(actual.states, expected.states, strict=True):
            torch.testing.assert_close(a, e, atol=ERROR[dtype], rtol=ERROR[dtype])

        assert_certified(actual.inverse_reports + expected.inverse_reports, 8 // patch_size, dtype)
        tokens = model.decode(expected.latents).argmax(-1)
        assert torch.equal(tokens, model.generate(noise=u, **METHODS[method]))


def scaled(flows, factor, **options):
    """A model whose contexts depend on the past so much that a guess is worth little."""
    model = make(flows, **options)
    with torch.no_grad():
        for layer in model.flow.layers:
            layer.input_projection.weight.mul_(factor)
            for parameter in layer.head.parameters():
                parameter.mul_(factor)

    return model


@pytest.mark.parametrize("direction", ["left_to_right", "right_to_left"])
@pytest.mark.parametrize("coupling", ["affine", "mixture_cdf"])
def test_a_hard_flow_still_ends_right(coupling, direction):
    model = scaled([flow(coupling, direction)], 5)
    u = torch.randn(2, 18, 2, dtype=torch.float64)
    expected = invert(model, u, inverse_method="sequential")
    actual = invert(model, u, inverse_method="parallel")
    assert (
        actual.inverse_reports[0].iterations >= 8
    )  # an easy flow of this length takes three or four
    assert_certified(actual.inverse_reports, 18, torch.float64)
    torch.testing.assert_close(actual.latents, expected.latents, atol=1e-5, rtol=1e-5)


def test_states_that_no_guess_can_reach_are_found_one_by_one():
    """Only guesses are clamped, no final states.

    Then the parallel form is the sequential one.
    """
    model = make([flow("affine")])
    with torch.no_grad():
        model.flow.layers[0].head.projection.bias[:2] = 30 * MAX_GUESS

    u = torch.randn(2, 10, 2, dtype=torch.float64)
    expected = invert(model, u, inverse_method="sequential")
    actual = invert(model, u, inverse_method="parallel")
    assert actual.inverse_reports[0].num_final == [1] * 10
    torch.testing.assert_close(actual.latents, expected.latents, rtol=1e-7, atol=0)


def test_overflowing_guesses_do_not_reach_the_positions_before_them():
    model = make([flow("affine")])
    with torch.no_grad():
        model.flow.layers[0].head.projection.weight.mul_(1e3)

    u = 1e300 * torch.randn(1, 10, 2, dtype=torch.float64)
    u[:, :5] /= 1e300
    expected = invert(model, u, inverse_method="sequential").latents[:, :5]
    torch.testing.assert_close(invert(model, u, inverse_method="parallel").latents[:, :5], expected)


@pytest.mark.parametrize("window", [None, 4])
def test_final_positions_are_not_computed_again(window):
    """Without a context the first iteration finds all states.

    It makes the first one final, the second iteration the others.
    """
    model = make([flow("affine")])
    layer = model.flow.layers[0]
    with torch.no_grad():
        layer.head.projection.weight.zero_()

    slots = []
    hook = layer.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: slots.append(
            (kwargs["past_key_values"].get_seq_length(), kwargs["inputs_embeds"].shape[1])
        ),
        with_kwargs=True,
    )
    u = torch.randn(2, 16, 2, dtype=torch.float64)
    num_final = (
        invert(model, u, inverse_method="parallel", inverse_window=window)
        .inverse_reports[0]
        .num_final
    )
    hook.remove()
    starts = list(itertools.accumulate(num_final, initial=0))[:-1]
    assert [
        start for start, _ in slots
    ] == starts  # all that is final, and nothing else, is in the cache

    if window is None:
        assert num_final == [1, 15] and slots == [(0, 16), (1, 15)]
    else:
        assert all(length == min(4, 16 - start) for start, length in slots)
        assert sum(length for _, length in slots) <= 3 * 16


@pytest.mark.parametrize("method", ["sequential", "parallel", "captured step"])
def test_caches_grow_linearly(method):
    """The caches hold the keys and values of each position once, and nothing else.

    Measured by the memory that they hold at most.
    """
    model = make([flow("affine")], max_position_embeddings=64)
    options = METHODS.get(method, {"inverse_method": method})
    layer, sizes = model.flow.layers[0], {}

    def largest_cache(num_positions):
        num_bytes = []

        def measure(module, args, kwargs, output):
            layers = kwargs["past_key_values"].layers
            num_bytes.append(
                sum(x.untyped_storage().nbytes() for y in layers for x in (y.keys, y.values))
            )

        hook = layer.decoder.register_forward_hook(measure, with_kwargs=True)
        invert(model, torch.randn(3, num_positions, 2, dtype=torch.float64), **options)
        hook.remove()
        return max(num_bytes)

    sizes = {n: largest_cache(n) for n in (16, 32, 64)}
    config = layer.decoder.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert sizes == {n: 2 * 8 * 3 * n * width * config.num_hidden_layers for n in sizes}


@pytest.mark.parametrize(
    "options", [{}, *(METHODS[name] for name in METHODS if name != "auto")], ids=str
)
@pytest.mark.parametrize("direction", ["left_to_right", "right_to_left"])
@pytest.mark.parametrize("coupling", ["affine", "mixture_cdf", "mixture_rosenblatt"])
def test_known_positions_are_kept_and_the_others_follow_from_them(coupling, direction, options):
    """Any positions of each sequence may be known, and their noise is not read.

    The forward pass gives the noise of the others back.
    """
    layer = (model := make([flow(coupling, direction)])).flow.layers[0]
    u, known = torch.randn(2, 3, 9, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 0, 1], [1] * 9]).bool()

    with torch.no_grad():
        h, report = layer(
            u.masked_fill(mask[..., None], torch.nan),
            model.codebook(),
            known=Known(known, mask),
            options=FlowInverse(**{x.removeprefix("inverse_"): options[x] for x in options}),
            task="invert",
        )
        again, _ = layer(h, model.codebook())

    assert torch.equal(h[mask], known[mask])
    assert sum(report.num_final) == 9
    torch.testing.assert_close(again[~mask], u[~mask], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "one of each"])
def test_padding(stack, method):
    model = make(STACKS[stack])
    u = torch.randn(2, 12, 2, dtype=torch.float64)
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    latents = invert(model, u, attention_mask=mask, **METHODS[method]).latents
    alone = invert(model, u[1:, :7], inverse_method="sequential").latents
    torch.testing.assert_close(latents[1:, :7], alone, atol=1e-7, rtol=1e-7)
    assert not latents[1, 7:].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_sliding_window(method):
    block = MistralConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        sliding_window=4,
    )
    model = make([flow("mixture_cdf"), flow("affine", "right_to_left")], block_config=block)
    u = torch.randn(2, 18, 2, dtype=torch.float64)
    expected = invert(model, u, inverse_method="sequential").latents
    torch.testing.assert_close(
        invert(model, u, **METHODS[method]).latents, expected, atol=1e-7, rtol=1e-7
    )


def test_a_decoder_in_bfloat16():
    model = make([flow("affine"), flow("mixture_cdf", "right_to_left")]).float()
    for layer in model.flow.layers:
        layer.bfloat16()

    u = torch.randn(2, 18, 2)
    actual, expected = (
        invert(model, u, inverse_method=method) for method in ("parallel", "sequential")
    )
    for report in actual.inverse_reports:
        assert sum(report.num_final) == 18 and report.residual <= 2**-7 / 4

    torch.testing.assert_close(actual.latents, expected.latents, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stack", ["affine, right to left", "mix-1", "mix-d", "one of each"])
def test_gradients_are_those_of_recomputing_every_prefix(stack, patch_size):
    model = make(STACKS[stack], patch_size)
    u = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    h = u.reshape(2, -1, 2 * patch_size)

    for layer in reversed(model.flow.layers):
        own = layer.order(h).arrange(h)
        found = torch.zeros_like(own)

        for n in range(own.shape[1]):
            inputs = layer.inputs(found, model.codebook(), last=n + 1)
            context = layer.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]
            state = layer.head(own[:, n : n + 1], context, model.codebook(), task="inverse")
            found = torch.cat([found[:, :n], state, found[:, n + 1 :]], 1)

        h = layer.order(found).rearrange(found)

    cotangent = torch.randn_like(u)
    tensors = [u, *model.flow.parameters()]

    latents = model.flow(u, reverse=True).latents
    for a, e in zip(
        *(
            torch.autograd.grad(
                x.reshape(u.shape), tensors, cotangent, allow_unused=True, materialize_grads=True
            )
            for x in (latents, h)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-6)


def test_what_auto_takes():
    flows = [
        flow("mixture_rosenblatt"),
        flow("mixture_cdf", "right_to_left", num_components=2),
        flow("affine"),
        flow("affine") | {"num_hidden_layers": 5},
    ]
    model = make(flows)
    u = torch.randn(1, 6, 2, dtype=torch.float64)

    def methods(u, **options):
        return [report.method for report in model.flow(u, reverse=True, **options).inverse_reports]

    assert methods(u) == ["sequential"] * 4  # gradients
    with torch.no_grad():
        assert methods(u) == ["sequential", "parallel", "parallel", "sequential"]
        assert methods(u.expand(16, -1, -1)) == methods(u)
        assert methods(u.expand(17, -1, -1)) == ["sequential"] * 4
        assert methods(u, inverse_method=["parallel", "sequential", "auto", "auto"]) == [
            "parallel",
            "sequential",
            "parallel",
            "sequential",
        ]
        assert methods(u, num_flows=2, inverse_method=["auto", "auto"]) == [
            "sequential",
            "parallel",
        ]


@pytest.mark.parametrize("method", METHODS)
def test_prompts_and_streams(method):
    model = make(CAUSAL["left to right"])
    prompt = torch.randint(5, (1, 4))
    noise = torch.randn(1, 12, 2, dtype=torch.float64)
    streamer = Recorder()
    expected = model.generate(prompt, noise=noise, inverse_method="sequential")
    out = model.generate(
        prompt, noise=noise, streamer=streamer, output_inverse_report=True, **METHODS[method]
    )
    assert torch.equal(out.sequences, expected)
    assert list(itertools.chain(*streamer.parts)) == expected[0].tolist()
    assert len(streamer.parts) == 9  # the prompt, then position by position
    assert len(out.inverse_reports) == 3 and all(
        sum(report.num_final) == 12 for report in out.inverse_reports
    )
    assert model.generate(noise=noise, return_dict_in_generate=True).inverse_reports is None


@pytest.mark.parametrize("method", METHODS)
def test_what_is_observed(method):
    """The slots of a conditional model differ from sequence to sequence.

    Observed positions come first, and are known to be 0.
    """
    model = make(STACKS["mix-d, mix-1, mix-1"], conditional=True)
    ids, mask = torch.randint(5, (3, 10)), torch.rand(3, 10) < torch.tensor([[0.0], [0.4], [0.8]])
    mask[:, 3] = False
    u = torch.randn(3, 10, 2, dtype=torch.float64)

    with torch.no_grad():
        expected = model.flow(
            u, reverse=True, observed_ids=ids, observed_mask=mask, inverse_method="sequential"
        )

        if METHODS[method].get("capture_step"):
            with pytest.raises(ValueError, match="observed tokens"):
                model.flow(u, reverse=True, observed_ids=ids, observed_mask=mask, **METHODS[method])
            return

        actual = model.flow(
            u, reverse=True, observed_ids=ids, observed_mask=mask, **METHODS[method]
        )

    torch.testing.assert_close(actual.latents, expected.latents, rtol=1e-9, atol=1e-9)
    assert not actual.latents[mask].any()


def test_bad_options():
    model = make(CAUSAL["left to right"])
    u = torch.randn(1, 6, 2, dtype=torch.float64)

    for options, message in [
        (
            {"inverse_method": "jacobi"},
            "inverse_method must be one of auto, sequential, parallel, not 'jacobi'",
        ),
        ({"inverse_method": ["auto", "auto"]}, "2 entries for 3 flows"),
        (
            {"inverse_method": "parallel", "inverse_window": 0},
            "inverse_window must be an integer of at least 1, not 0",
        ),
        (
            {"inverse_method": "parallel", "inverse_tolerance": -1.0},
            "inverse_tolerance must not be negative",
        ),
    ]:
        for call in (lambda **o: invert(model, u, **o), lambda **o: model.generate(noise=u, **o)):
            with pytest.raises(ValueError, match=message):
                call(**options)

    for options in ({"inverse_method": "parallel"}, {"capture_step": True}):
        with pytest.raises(ValueError, match="has no gradients"):
            model.flow(u, reverse=True, **options)
