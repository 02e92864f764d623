"""The watermark: exact under every other key, strong under its own, and no change of the text."""

import copy
import itertools
import math

import pytest
import torch
from scipy.stats import chisquare, kstest

from helpers import ROOT
from helpers.enumeration import enumerate_likelihoods
from helpers.models import CAUSAL, STACKS, flow, make, separated
from tarflow_hf import TarFlowLMModel
from tarflow_hf.watermark import (
    Alignment,
    Evidence,
    NoiseWatermark,
    draw_noise,
    predict,
    rank_p_value,
    read_evidence,
    steered,
    stratified_noise,
)
from tarflow_hf.watermark.alignment import CORRELATIONS, EDITINGS, ROUNDS
from tarflow_hf.watermark.evidence import SAMPLING_OPTIONS

CHECKPOINT = ROOT / "checkpoints" / "python-docs"
MIX_D = [flow("mixture_rosenblatt")]


@pytest.fixture(scope="module")
def model():
    """A model of wide distributions, 27 tokens with a latent of 4."""
    return separated(MIX_D, latent_size=4, max_position_embeddings=256)


@pytest.fixture(scope="module")
def text(model):
    """Tokens (1, 12 + 100): a prompt of 12, and what the key 42 writes."""
    prompt = torch.randint(27, (1, 12), generator=torch.Generator().manual_seed(5))
    return model.generate(prompt, max_new_tokens=100, watermark=NoiseWatermark(key=42))


def p_value(model, tokens, num_prompt_tokens=0, **options):
    mark = NoiseWatermark(key=42, **options)
    return mark.detect(model, tokens, num_prompt_tokens=num_prompt_tokens).p_value


# --------------------------------------------------------------------------------------------------
# What the noise is
# --------------------------------------------------------------------------------------------------


def test_noise_follows_from_key_stream_and_place():
    mark = NoiseWatermark(key=42)
    noise = mark.noise(-3, 9, 5)
    assert noise.shape == (12, 5) and noise.dtype == torch.float64
    assert torch.equal(NoiseWatermark(42).noise(-1, 4, 5), noise[2:7])
    for other in (mark.noise(-3, 9, 5, stream=1), NoiseWatermark("42").noise(-3, 9, 5)):
        assert not torch.isclose(other, noise).any()

    # The same on any machine, in any version.
    assert noise[3, :2].tolist() == pytest.approx([-1.210649901249212, -0.5757766337595299])


def test_keys_of_other_types_are_other_keys():
    noises = [NoiseWatermark(key).noise(0, 4, 2) for key in (42, "42", b"42", b"int:42", "int:42")]
    assert all(not torch.equal(a, b) for n, a in enumerate(noises) for b in noises[:n])


@pytest.mark.parametrize(
    "options", [{"num_streams": 1.5}, {"num_streams": 0}, {"max_offset": None}]
)
def test_numbers_of_streams_and_offsets(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer of at least 1"):
        NoiseWatermark(1, **options)


def test_noise_of_keys_is_standard_normal():
    noise = torch.stack([NoiseWatermark(key).noise(0, 10, 4) for key in range(500)])
    assert kstest(noise.flatten(), "norm").pvalue > 1e-3
    products = torch.corrcoef(noise.flatten(1).T) - torch.eye(40)
    assert products.abs().max() < 5 / 500**0.5


def test_the_distribution_of_the_text_is_the_models_over_keys():
    """All texts of two tokens, against their enumerated probabilities."""
    model = make(MIX_D, latent_size=1, vocab_size=3, seed=1, initial_log_scale=-0.5)
    with torch.no_grad():
        model.flow.layers[0].head.projection.weight.mul_(3)

    log_likelihood, _ = enumerate_likelihoods(model, 2)
    expected = torch.tensor([log_likelihood[x] for x in itertools.product(range(3), repeat=2)])

    noise = torch.stack([NoiseWatermark(key).noise(0, 2, 1) for key in range(20_000)])
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate(noise=noise, decode="sample", generator=generator)
    counts = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9)
    frequencies = expected.exp() / expected.exp().sum()
    assert frequencies.max() / frequencies.min() > 1.5
    assert chisquare(counts.numpy(), (frequencies * 20_000).numpy()).pvalue > 1e-3

    # `watermark` takes this very noise.
    for key in range(3):
        marked = model.generate(max_new_tokens=2, watermark=NoiseWatermark(key))
        assert torch.equal(marked, model.generate(noise=noise[key : key + 1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_marked_as_each_would_be_alone(model, side):
    mark = NoiseWatermark(key=1)
    prompts, mask = torch.randint(27, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, :4] = 0
    mask = mask if side == "left" else mask.flip(1)
    together = model.generate(prompts, attention_mask=mask, max_new_tokens=8, watermark=mark)
    for row in range(3):
        prompt = prompts[row : row + 1, mask[row] == 1]
        alone = model.generate(prompt, max_new_tokens=8, watermark=mark)
        assert torch.equal(together[row, 6:], alone[0, prompt.shape[1] :])


def test_copies_of_a_prompt_have_streams_of_their_own(model):
    mark = NoiseWatermark(key=3, num_streams=4)
    prompt = torch.randint(27, (1, 4))
    tokens = model.generate(prompt, max_new_tokens=40, num_return_sequences=4, watermark=mark)
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    assert all(mark.detect(model, row[None]).p_value < 1e-6 for row in tokens)
    with pytest.raises(ValueError, match=r"4 streams.*no stream 4"):
        model.generate(prompt, max_new_tokens=8, num_return_sequences=5, watermark=mark)


# --------------------------------------------------------------------------------------------------
# Exactness
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_streams", "options"),
    [
        (0, 2, {}),
        (12, 8, {}),
        (0, 2, {"mixture_temperature": 0.7}),
        (12, 2, {"top_k": 3, "temperature": 0.8}),
    ],
)
def test_p_values_of_wrong_keys_are_uniform(model, text, num_prompt_tokens, num_streams, options):
    """Whatever `detect` is told, right or not: this text was written at temperature 1."""
    first = 0 if num_prompt_tokens else 6
    evidence = read_evidence(model, text[:, first:22], num_prompt_tokens, **options)
    marks = [NoiseWatermark(key, num_streams, max_offset=8) for key in range(1000, 2000)]
    results = [mark.test(evidence) for mark in marks]
    assert kstest([each.p_value for each in results], "uniform").pvalue > 1e-3
    assert kstest([each.z_score for each in results], "norm").pvalue > 1e-3


def test_ranks_in_rounds_are_uniform():
    """A key's value among those of reference keys, where the rounds end early."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4000, 1 + ROUNDS[-1], generator=generator)
    uniform = torch.rand(4000, generator=generator).tolist()
    p_values = []

    for own, others, u in zip(values[:, 0], values[:, 1:], uniform, strict=True):
        above, before = [int((others[:n] > own).sum()) for n in ROUNDS], (0, *ROUNDS)
        last = 0 if above[0] >= 8 else 1 if above[1] >= 2 else 2
        p_values.append(rank_p_value(above[last], u, ROUNDS[last], before[last]))

    assert kstest(p_values, "uniform").pvalue > 1e-3
    smallest = [p for p in p_values if p < 2 / 128]
    assert kstest(smallest, "uniform", (0, 2 / 128)).pvalue > 1e-3


def test_likelihood_ratios_have_mean_one():
    """The average over fresh keys of a text that says much, in each phase of its patches."""
    torch.manual_seed(0)
    mean, variance = 0.4 * torch.randn(2, 5, 2), torch.full((2, 5, 2), 0.7)
    alignment = Alignment(Evidence(mean, variance, 3, b""), max_offset=4)
    noise = torch.randn(200_000, 1, alignment.num_places, 2)
    ratios = torch.cat([alignment.log_ratio(part) for part in noise.split(20_000)]).exp()
    error = ratios.std() / len(ratios) ** 0.5
    # Alignments that leave the key's numbers behind are counted as 0.
    assert 0.95 < ratios.mean() < 1 + 4 * error


def continuations(editing, e, t, j):
    """The sum over what may follow token t at number j, of ratios e (n, J)."""
    num_tokens, num_places = e.shape
    if t == num_tokens - 1:
        return 1.0

    kept = 1 - editing.inserted - sum(editing.deleted) - editing.jumped - editing.ended
    total = editing.ended + editing.inserted * continuations(editing, e, t + 1, j)
    for place in range(j + 1, num_places):
        moves = (0.0, kept, *editing.deleted)
        step = place - j
        move = (moves[step] if step < len(moves) else 0.0) + editing.jumped / num_places
        total = total + move * e[t + 1, place] * continuations(editing, e, t + 1, place)

    return total


def test_the_likelihood_ratio_sums_over_all_alignments():
    """Against all paths of a text of three tokens, one after another."""
    torch.manual_seed(1)
    evidence = Evidence(torch.randn(1, 3, 2), torch.rand(1, 3, 2), 0, b"")
    alignment = Alignment(evidence, max_offset=2)
    noise = torch.randn(1, 1, alignment.num_places, 2)

    log_l = torch.zeros(len(CORRELATIONS), 3, alignment.num_places)
    for c, correlation in enumerate(CORRELATIONS):
        mean = correlation * evidence.mean[0].unsqueeze(1)
        variance = correlation**2 * (evidence.variance[0].unsqueeze(1) - 1) + 1
        own, other = (
            torch.distributions.Normal(*sizes).log_prob(noise[0])
            for sizes in ((mean, variance.sqrt()), (0.0, 1.0))
        )
        log_l[c] = (own - other).sum(-1)

    total = 0.0
    for editing in EDITINGS:
        mixed = torch.einsum("c,ctj->tj", torch.tensor(editing.correlated), log_l.exp())
        e = editing.replaced + (1 - editing.replaced) * mixed
        for j in range(alignment.num_places):
            path = e[0, j] * continuations(editing, e, 0, j)
            total = total + editing.weight * alignment.begin[j] * path

        for t in (1, 2):
            path = e[t, 0] * continuations(editing, e, t, 0)
            total = total + editing.weight * alignment.start[t] * path

    assert alignment.log_ratio(noise).item() == pytest.approx(math.log(total), abs=1e-4)
    weights = [sum(editing.correlated) for editing in EDITINGS]
    assert weights == pytest.approx([1, 1, 1]) and sum(x.weight for x in EDITINGS) == 1
    assert alignment.begin.sum() + sum(alignment.start) == pytest.approx(1)


# --------------------------------------------------------------------------------------------------
# Power
# --------------------------------------------------------------------------------------------------


def test_a_key_finds_its_text(model, text):
    known = NoiseWatermark(42).detect(model, text, num_prompt_tokens=12)
    assert known.p_value < 1e-12 and known.z_score > 7 and known.num_tokens == 100
    assert known.p_value == pytest.approx(math.exp(known.log_p_value))
    assert NoiseWatermark(42).detect(model, text, num_prompt_tokens=12) == known
    assert p_value(model, text) < 1e-12  # the prompt is not known
    assert p_value(model, text[:, 12:]) < 1e-12  # nor given
    assert p_value(model, text[:, 60:]) < 1e-9  # cut off at the beginning
    assert p_value(model, text[:, :50]) < 1e-9  # and at the end
    assert p_value(model, text[:, 12:], num_streams=1, max_offset=1) < 1e-12


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("edit", ["replaced", "deleted", "inserted"])
def test_edits_leave_the_mark(model, text, edit, rate):
    generator = torch.Generator().manual_seed(7)
    is_edited = torch.rand(text.shape[1], generator=generator) < rate
    others = torch.randint(27, text.shape, generator=generator)
    if edit == "replaced":
        edited = torch.where(is_edited, others, text)
    elif edit == "deleted":
        edited = text[:, ~is_edited]
    else:
        both = torch.stack([others, text], -1).flatten(1)
        edited = both[:, torch.stack([is_edited, torch.ones_like(is_edited)], -1).flatten()]

    assert p_value(model, edited, max_offset=32) < (1e-6 if rate < 0.3 else 1e-3)
    assert NoiseWatermark(key=43, max_offset=32).detect(model, edited).p_value > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"top_k": 8}, {"top_p": 0.8}, {"mixture_temperature": 0.7}, {"temperature": 0.8}],
)
def test_sampling_options_leave_the_mark(model, options):
    mark = NoiseWatermark(key=42)
    tokens = model.generate(max_new_tokens=120, watermark=mark, **options)
    told, untold = mark.detect(model, tokens, **options), mark.detect(model, tokens)
    assert told.p_value < 1e-6 and untold.p_value < 1e-6
    assert told.log_likelihood_ratio > untold.log_likelihood_ratio


STEERED = {
    **{name: (name, {"mixture_temperature": 0.6, "top_k": 4}) for name in ("mix-d", "mix-d, mix-1, mix-1")},
    "top_p": ("mix-d, mix-1, mix-1", {"top_p": 0.9, "temperature": 0.7}),
    "the noise": ("mix-1, right to left, posterior", {"temperature": 0.7}),
}  # fmt: skip


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("case", STEERED)
def test_flows_undo_what_generate_does(case, patch_size):
    """The noise comes back from the latents, under the options that made them."""
    stack, options = STEERED[case]
    model = make((STACKS | CAUSAL)[stack], patch_size)
    temperatures = [0.9, 0.8, 0.7][: len(model.config.flows)]
    noise = torch.randn(2, 8, 2, dtype=torch.float64)
    for more in ({}, {"flow_temperatures": temperatures}):
        steps = {name: x for name, x in (options | more).items() if name != "temperature"}
        scaled = noise * options.get("temperature", 1.0)
        latents = model.generate(noise=scaled, output_states=True, **steps).latents
        with steered(model, options | more) as temperature, torch.no_grad():
            found = model.flow(latents).noise / temperature

        torch.testing.assert_close(found, noise, atol=1e-6, rtol=1e-6)
        with torch.no_grad():  # and nothing of it is left behind
            assert not torch.allclose(model.flow(latents).noise, noise, atol=1e-2)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize(
    "stack", ["mix-d, mix-1, mix-1", "mix-1, right to left, posterior", "left to right"]
)
def test_stacks_and_patches_leave_the_mark(stack, patch_size):
    flows = (STACKS | CAUSAL)[stack]
    model = separated(flows, patch_size=patch_size, latent_size=4, max_position_embeddings=128)
    mark = NoiseWatermark(key=42)
    tokens = model.generate(max_new_tokens=100, watermark=mark)
    assert mark.detect(model, tokens).p_value < 1e-6
    assert mark.detect(model, tokens[:, 17:]).p_value < 1e-6  # not at the beginning of a patch
    assert NoiseWatermark(key=43).detect(model, tokens).p_value > 1e-3


def test_the_shipped_checkpoint_is_marked():
    model = TarFlowLMModel.from_pretrained(CHECKPOINT)
    mark = NoiseWatermark(key=42)
    tokens = model.generate(max_new_tokens=100, watermark=mark)
    assert mark.detect(model, tokens).p_value < 1e-6


def test_conditional_models_leave_the_mark():
    model = separated(MIX_D, latent_size=4, conditional=True, max_position_embeddings=128)
    mark = NoiseWatermark(key=42)
    prompt = torch.randint(27, (1, 10))
    tokens = model.generate(prompt, max_new_tokens=80, watermark=mark)
    assert mark.detect(model, tokens, num_prompt_tokens=10).p_value < 1e-9


@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 3, 10, 81])
def test_a_conditional_model_of_patches_knows_any_prompt(num_prompt_tokens):
    """In each phase, the whole patches of the prompt: what is inferred behind it is theirs."""
    options = {"latent_size": 4, "conditional": True, "max_position_embeddings": 128}
    model = separated(MIX_D, patch_size=2, **options)
    mark = NoiseWatermark(key=42)
    prompt = torch.randint(27, (1, 10), generator=torch.Generator().manual_seed(5))
    tokens = model.generate(prompt, max_new_tokens=72, watermark=mark)
    result = mark.detect(model, tokens, num_prompt_tokens=num_prompt_tokens)
    assert result.num_tokens == 82 - num_prompt_tokens and 0 < result.p_value < 1
    assert result.p_value < 1e-6 or num_prompt_tokens == 81

    evidence = read_evidence(model, tokens, num_prompt_tokens)
    for phase in range(2):
        num_observed = min((num_prompt_tokens - phase) // 2 * 2, 80 - 2 * phase)
        part = tokens[:, phase : 82 - phase]
        draws = draw_noise(model, part, num_observed, 4)
        expected = predict(draws)[0][num_prompt_tokens - phase :]
        torch.testing.assert_close(evidence.mean[phase, : len(expected)], expected)


@pytest.mark.parametrize("worth", [1.0, 16.0])
def test_the_prediction_is_that_of_a_variance_that_is_not_known(worth):
    """Against the integral over the mean of the draws, on a grid, for each variance."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    means, draws = (
        0.7 * torch.randn(4, 6, generator=generator),
        torch.randn(4, 4, 6, generator=generator),
    )
    draws = means + spread.unsqueeze(-1) * draws  # (S, 4, 6)
    center = draws.mean(0)
    squares = (draws - center).square().sum(0)

    m = torch.linspace(-6, 6, 40_001, dtype=torch.float64).reshape(-1, 1, 1)
    moments = torch.zeros(3, *draws.shape[1:], dtype=torch.float64)  # of the next draw: 1, x, x^2
    for v in (1.0, 0.6, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4):
        # The draws' mean, as of S w independent ones, and how they lie around it.
        of_mean = torch.distributions.Normal(m, (v / (4 * worth)) ** 0.5).log_prob(center).exp()
        weight = of_mean * v**-1.5 * (-squares / (2 * v)).exp()
        if v < 1:
            prior = torch.distributions.Normal(0, (1 - v) ** 0.5).log_prob(m).exp()
            weight = weight * prior * 0.5 / 7 * 12 / 40_000
        else:
            weight = 0.5 * weight * (m.abs() < 1e-9)

        each = [weight, weight * m, weight * (m.square() + v)]
        moments += torch.stack([x.sum(0) for x in each])

    expected_mean = moments[1] / moments[0]
    mean, variance = predict(draws, (worth,))
    assert torch.allclose(mean, expected_mean, atol=1e-6)
    assert torch.allclose(variance, moments[2] / moments[0] - expected_mean.square(), atol=1e-6)
    # Draws that agree say where the next one lies, independent draws that differ do not.
    assert variance[3].max() < 0.1 and (worth > 1 or variance[0].median() > 0.8)


def test_independent_draws_are_worth_one_and_stratified_ones_more():
    """The likeliest worth is chosen; draws that no key makes say nothing."""
    draws = torch.randn(4, 500, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(9, (1, 500), generator=torch.Generator().manual_seed(1))
    strata = stratified_noise(tokens, 8, 4)
    assert strata.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(strata.square().mean(0), torch.ones(500, 8))
    assert torch.corrcoef(strata.flatten(1)[:, ::7].T[:200])[0, 1:].abs().mean() < 0.8

    for kind, worth in ((draws, 1.0), (strata, 256.0)):
        mean, variance = predict(kind)
        torch.testing.assert_close((mean, variance), predict(kind, (worth,)))

    draws[0, 3, 2], draws[1, 4, 1] = 31.0, torch.nan
    mean, variance = predict(draws)
    assert [mean[3, 2], variance[3, 2], mean[4, 1], variance[4, 1]] == [0, 1, 0, 1]


# --------------------------------------------------------------------------------------------------
# What cannot be
# --------------------------------------------------------------------------------------------------


def test_what_cannot_be_marked_or_detected_is_said(model, text):
    from transformers import GenerationConfig, WatermarkingConfig

    mark, noise = NoiseWatermark(key=42), torch.randn(1, 8, 4)
    for error, message, options in (
        (ValueError, "not both", {"noise": noise, "watermark": mark}),
        (ValueError, "do_sample=False", {"watermark": mark, "do_sample": False}),
        (TypeError, "NoiseWatermark, not 42", {"watermark": 42}),
        (ValueError, "NoiseWatermark", {"watermarking_config": WatermarkingConfig()}),
        (
            ValueError,
            "NoiseWatermark",
            {"generation_config": GenerationConfig(watermarking_config=WatermarkingConfig())},
        ),
        (ValueError, "published", {"generation_config": GenerationConfig(watermark=mark)}),
    ):
        with pytest.raises(error, match=message):
            model.generate(**{"max_new_tokens": 8, **options})

    for message, tokens, num_prompt_tokens in (
        ("one text at a time", text.expand(2, -1), 0),
        ("must be an integer that leaves something of 112 tokens, not 112", text, 112),
        ("must be an integer that leaves something of 112 tokens, not 1.0", text, 1.0),
        ("vocab_size", text + 27, 0),
        (r"tokens must be \(1, T\), not \(3,\)", [1, 2, 3], 0),
        ("tokens must be ids", [["a", "b"]], 0),
    ):
        with pytest.raises(ValueError, match=message):
            mark.detect(model, tokens, num_prompt_tokens)

    for message, options in (
        (r"whatever \['seed'\] was", {"seed": 3}),
        ("top_p must be above 0", {"top_p": 0.0}),
        ("flow_temperatures has 2 entries for 1 flows", {"flow_temperatures": [1.0, 0.5]}),
    ):
        with pytest.raises(ValueError, match=message):
            mark.detect(model, text, **options)
    with pytest.raises(ValueError, match="steer mixture_rosenblatt flows"):
        mark.detect(make([flow("affine")]), text[:, :4] % 5, mixture_temperature=0.7)

    assert mark.detect(model, text.tolist()) == mark.detect(model, text)
    everything = dict.fromkeys(SAMPLING_OPTIONS)  # None is as left out
    assert mark.detect(model, text, **everything) == mark.detect(model, text)

    for key in ("", b"", 1.5, True):
        with pytest.raises(ValueError, match="key must be"):
            NoiseWatermark(key)
    with pytest.raises(ValueError, match="at least 1"):
        NoiseWatermark(1, num_streams=0)

    other = separated(MIX_D, latent_size=4, seed=1, max_position_embeddings=256)
    model.generate(max_new_tokens=2, watermark=mark)
    with pytest.raises(ValueError, match="another codebook"):
        mark.detect(other, text)
    assert repr(mark) == "NoiseWatermark(key=..., num_streams=8)"


@pytest.mark.parametrize("part", ["codebook", "flow.layers.0.decoder", "flow.layers.0.head"])
def test_a_model_whose_weights_are_not_finite_detects_nothing(model, text, part):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.get_submodule(part).parameters()).fill_(torch.nan)

    for options in ({}, {"top_k": 3}):
        with pytest.raises(ValueError, match="noise that is not finite"):
            NoiseWatermark(42).detect(broken, text, **options)


def test_tokens_that_the_options_leave_out_are_no_fault(model, text):
    """One of all 27 tokens is kept, and the text is another."""
    evidence = read_evidence(model, text[:, :40], top_k=1)
    assert (evidence.variance == 1).any() and evidence.mean.isfinite().all()
