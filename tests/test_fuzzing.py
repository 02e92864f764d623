"""Any configuration, batch and call: the right result, by an invariant, or an error of our own.

The normal suite takes the same few examples each time; `make fuzz` takes new ones.
"""

import math

import pytest
import torch
from hypothesis import strategies as st

from helpers.checkpoints import assert_same_state
from helpers.fuzzing import (
    COUNT,
    NUM_EXAMPLES,
    answer,
    batches,
    draw_model,
    fuzz,
    has_whole_rows,
    masks,
    real_of,
)
from helpers.models import STACKS, make
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.evaluation import token_bits

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"atol": 1e-8, "rtol": 1e-8}


@pytest.fixture(autouse=True)
def many_results():
    """At least a sixth of a test's calls have a result; of new examples, whose share varies, a twentieth."""
    COUNT.clear()
    yield
    if not NUM_EXAMPLES:
        assert COUNT["results"] >= COUNT["calls"] / 6, COUNT
    elif COUNT["calls"] >= 40:
        assert COUNT["results"] >= COUNT["calls"] / 20, COUNT


def draws(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def is_good_batch(model, ids, mask):
    """True if `forward` has to take the batch."""
    config, is_real = model.config, real_of(mask, ids)
    is_length = 0 < ids.shape[1] <= config.max_position_embeddings
    if not is_length or ids.shape[1] % config.patch_size:
        return False

    known = ids[is_real]
    return has_whole_rows(is_real, config.patch_size) and bool(
        ((known >= 0) & (known < config.vocab_size)).all()
    )


def is_good_observation(model, observed, is_real):
    if not model.config.conditional:
        return False

    patches = (observed.bool() | ~is_real).unflatten(1, (-1, model.config.patch_size))
    is_whole = bool((patches.any(-1) == patches.all(-1)).all())
    return is_whole and bool((is_real & ~observed.bool()).any(-1).all())


# -------------------------------------------------------------------------------------- likelihood


@fuzz(120, st.data())
def test_forward(data):
    model = draw_model(data)
    ids, mask = data.draw(batches(model))
    is_real = real_of(mask, ids)
    observed = None
    if data.draw(st.booleans()):
        observed = data.draw(masks(*ids.shape)) * is_real

    num_flows = data.draw(st.sampled_from([None, 1, len(model.flow.layers), 4]))
    latents = draws((*ids.shape, model.config.latent_size), 1)
    latents = latents * data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    latents[~is_real] = data.draw(st.sampled_from([0.0, math.nan, math.inf]))
    options = {"num_flows": num_flows, "output_noise": data.draw(st.booleans())}
    out, error = answer(
        model, ids, mask, labels=ids, latents=latents, observed_mask=observed, **options
    )
    is_good = is_good_batch(model, ids, mask) and num_flows != 4
    if is_good and observed is not None:
        is_good = is_good_observation(model, observed, is_real)

    assert (error is None) == is_good, error
    if error is not None:
        return

    assert out.elbo.isfinite().all()
    parts = out.reconstruction_log_prob + out.prior_log_prob - out.posterior_log_prob
    torch.testing.assert_close(out.elbo, parts, **CLOSE)
    is_scored = is_real if observed is None else is_real & (observed == 0)
    torch.testing.assert_close(out.loss, -out.elbo.sum() / is_scored.sum(), **CLOSE)
    for row, places in enumerate(is_real):
        alone = {"latents": latents[row, places][None], **options}
        if observed is not None:
            alone["observed_mask"] = observed[row, places][None]

        one = model(ids[row, places][None], **alone)
        torch.testing.assert_close(one.elbo[0], out.elbo[row], **CLOSE)
        if out.noise is not None:
            torch.testing.assert_close(one.noise[0], out.noise[row, places], **CLOSE)
            assert (out.noise[row, ~places] == 0).all()


@fuzz(60, st.data())
@torch.no_grad()
def test_scores(data):
    """A seedless score is a row's own, whatever stands beside it, and tokens' bits add up to it."""
    model = draw_model(data)
    ids, mask = data.draw(batches(model))
    bound, error = answer(model.importance_weighted_bound, ids, mask, num_samples=2)
    assert (error is None) == is_good_batch(model, ids, mask), error
    if error is not None:
        return

    for row, places in enumerate(real_of(mask, ids)):
        alone = ids[row, places][None]
        one = model.importance_weighted_bound(alone, num_samples=2)
        torch.testing.assert_close(one[0], bound[row], **CLOSE)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        bits = token_bits(model, alone, generator=generators[0])
        elbo = model(alone, generator=generators[1]).elbo
        torch.testing.assert_close(bits.sum(-1), -elbo / math.log(2), **CLOSE)


@fuzz(60, st.data())
@torch.no_grad()
def test_flows_and_back(data):
    """The inverse of noise has that noise again, drawn or made of given latents.

    Between components, where the density is 1e-13, rounding of the noise moves latents by 1e-3:
    there the noise says how good an inverse is, and the latents do not.
    """
    model = draw_model(data)
    ids, mask = data.draw(batches(model))
    patch_size = model.config.patch_size
    longest = model.config.max_position_embeddings
    if ids.shape[1] > longest:
        with pytest.raises(ValueError, match="longer than max_position_embeddings"):
            model.flow(torch.zeros(*ids.shape, model.config.latent_size), mask)

    is_whole = ids.shape[1] % patch_size == 0 and has_whole_rows(real_of(mask, ids), patch_size)
    if ids.shape[1] > longest or not is_whole:
        mask, ids = None, torch.zeros(2, longest, dtype=torch.long)

    scale = data.draw(st.sampled_from([0.0, 0.1, 1.0, 8.0]))
    start = scale * draws((*ids.shape, model.config.latent_size), 2)
    start = start * real_of(mask, ids).unsqueeze(-1)
    method = data.draw(st.sampled_from(["auto", "sequential", "parallel"]))
    options = {"num_flows": data.draw(st.integers(1, len(model.flow.layers)))}
    is_mamba = model.config.block_config.model_type == "mamba"  # which computes in float32 inside
    tolerance = 1e-5 if is_mamba else 1e-8
    for noise in (model.flow(start, mask, **options).noise, start):
        back = model.flow(noise, mask, reverse=True, inverse_method=method, **options)
        again = model.flow(back.latents, mask, **options).noise
        torch.testing.assert_close(again, noise, atol=tolerance, rtol=tolerance)


# -------------------------------------------------------------------------------------- generation


@fuzz(100, st.data())
def test_generate(data):
    """Padding and neighbours change no token, known ones stay, and both inverses agree."""
    model = draw_model(data)
    config = model.config
    ids, mask = data.draw(batches(model))
    is_real = real_of(mask, ids)
    gaps = data.draw(masks(*ids.shape)) if data.draw(st.booleans()) else None
    num_new = 0 if gaps is not None else data.draw(st.integers(0, config.max_position_embeddings))
    noise = draws((len(ids), ids.shape[1] + num_new, config.latent_size), 3)
    options = {
        "num_flows": data.draw(st.sampled_from([None, 1])),
        "inverse_method": data.draw(st.sampled_from(["auto", "sequential", "parallel"])),
    }
    tokens, error = answer(
        model.generate, ids, attention_mask=mask, noise=noise, infill_mask=gaps, **options
    )
    if error is not None:
        return

    assert tokens.shape == noise.shape[:2]
    is_known = is_real if gaps is None else is_real & (gaps == 0)
    assert torch.equal(tokens[:, : ids.shape[1]][is_known], ids[is_known])
    is_text = torch.cat([is_real, is_real.new_ones(len(ids), num_new)], 1)
    written = tokens[is_text]
    assert ((written >= 0) & (written < config.vocab_size)).all()
    other = "parallel" if options["inverse_method"] == "sequential" else "sequential"
    for row, places in enumerate(is_real):
        alone = {"noise": noise[row, is_text[row]][None], **options, "inverse_method": other}
        if gaps is not None:
            alone["infill_mask"] = gaps[row, places][None]

        one = model.generate(ids[row, places][None], **alone)
        assert torch.equal(one[0], tokens[row, is_text[row]])


NUMBERS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.floats(), st.sampled_from(["", "3", [], [1], {}])
)  # fmt: skip
OPTIONS = (
    "max_new_tokens", "max_length", "num_return_sequences", "do_sample", "temperature",
    "flow_temperatures", "mixture_temperature", "top_k", "top_p", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "num_candidates", "eos_token_id", "pad_token_id", "decode",
    "num_flows", "inverse_method", "inverse_window", "inverse_tolerance", "stop_strings",
    "max_time", "bad_words_ids", "repetition_penalty", "min_new_tokens", "no_repeat_ngram_size",
    "suppress_tokens", "prompt_lookup_num_tokens", "num_assistant_tokens", "infill_mask",
    "attention_mask", "noise", "streamer", "tokenizer", "num_beams", "seed", "generator",
)  # fmt: skip


class Shared(dict):
    """Models that are made once."""

    def __missing__(self, name):
        self[name] = make(STACKS[name])
        return self[name]


SHARED = Shared()


@fuzz(150, st.data())
def test_options_of_generate(data):
    """Any value of any option: tokens of the vocabulary, or an error of our own."""
    model = SHARED[data.draw(st.sampled_from(["mix-d", "mix-1", "mix-d, mix-1, mix-1"]))]
    options = data.draw(st.dictionaries(st.sampled_from(OPTIONS), NUMBERS, min_size=1, max_size=3))
    prompt = torch.tensor([[1, 2], [3, 4]])[: data.draw(st.integers(1, 2))]
    tokens, error = answer(model.generate, prompt, **options)
    if error is None:
        tokens = tokens if isinstance(tokens, torch.Tensor) else tokens.sequences
        assert ((tokens >= 0) & (tokens < 5)).all() or "pad_token_id" in options


@fuzz(40, st.data())
def test_noise_of_a_text_gives_it_back(data):
    model = draw_model(data)
    ids, mask = data.draw(batches(model))
    noise, error = answer(model.noise_of, ids, mask, generator=torch.Generator().manual_seed(0))
    if error is not None:
        return

    options = {} if mask is None else {"attention_mask": mask}
    tokens = model.generate(noise=noise, **options)
    assert torch.equal(tokens[real_of(mask, ids)], ids[real_of(mask, ids)])


@fuzz(20, st.data())
def test_drafts_change_no_token(data):
    model = draw_model(data, is_causal=True)
    length = model.config.max_position_embeddings
    prompt = torch.zeros(2, model.config.patch_size, dtype=torch.long)
    noise = draws((2, length, model.config.latent_size), 4)
    plain = model.generate(prompt, noise=noise, inverse_method="sequential")
    number = data.draw(st.integers(1, 6))
    drafted, error = answer(model.generate, prompt, noise=noise, prompt_lookup_num_tokens=number)
    assert error is not None or torch.equal(drafted, plain)


# --------------------------------------------------------------------------------- configurations

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=2), st.just({}), st.just({"model_type": "llama"}),
)  # fmt: skip
FIELDS = (
    "vocab_size", "latent_size", "patch_size", "max_position_embeddings", "hidden_size",
    "num_attention_heads", "intermediate_size", "flows", "block_config", "conditional",
    "posterior_top_k", "initializer_range", "initial_log_scale", "bos_token_id", "eos_token_id",
    "pad_token_id", "start_token_id", "embedding_scale", "tie_word_embeddings",
)  # fmt: skip
FLOW_FIELDS = (
    "coupling", "direction", "num_hidden_layers", "context", "num_components", "autoregressive",
    "head_hidden_size", "tie_codebook", "patch_head_layers", "projection_bias", "unknown",
)  # fmt: skip
COUPLINGS = ["affine", "mixture_cdf", "mixture_rosenblatt"]


@fuzz(150, st.data())
def test_fields_of_a_configuration(data):
    """Any value of any field: a model that scores and writes, or an error of our own."""
    entry = {"coupling": data.draw(st.sampled_from(COUPLINGS)), "direction": "left_to_right"}
    entry["num_hidden_layers"] = 1
    if data.draw(st.booleans()):
        entry |= data.draw(st.dictionaries(st.sampled_from(FLOW_FIELDS), VALUES, max_size=2))

    fields = {"vocab_size": 5, "latent_size": 2, "hidden_size": 16, "num_attention_heads": 2}
    fields |= {"max_position_embeddings": 6, "flows": [entry]}
    fields |= data.draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
    config, error = answer(TarFlowLMConfig, **fields)
    if error is not None:
        return

    assert TarFlowLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    model, error = answer(TarFlowLMModel, config)
    if error is not None:
        return

    ids = torch.zeros(1, config.patch_size, dtype=torch.long)
    out, error = answer(model.eval(), ids)
    assert error is not None or out.elbo.isfinite().all()
    answer(model.generate, max_new_tokens=config.patch_size)


@fuzz(12, st.data())
def test_saved_and_loaded(tmp_path_factory, data):
    model = draw_model(data)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    loaded = TarFlowLMModel.from_pretrained(folder).eval()
    config = model.config
    assert loaded.config.flows == config.flows
    noise = draws((2, config.max_position_embeddings, config.latent_size), 5)
    assert torch.equal(loaded.generate(noise=noise), model.generate(noise=noise))
    ids = torch.zeros(2, config.patch_size, dtype=torch.long)
    # Bit for bit the same weights; how they lie in memory moves the last digits of a sum.
    assert_same_state(loaded.state_dict(), model.state_dict())
    torch.testing.assert_close(loaded(ids).elbo, model(ids).elbo, atol=1e-11, rtol=1e-12)


# -------------------------------------------------------------------------------- what was found

IDS = torch.tensor([[1, 2], [3, 4]])
EMPTY = torch.zeros(1, 0, dtype=torch.long)
FOUND = {
    "max_new_tokens": 1.5,
    "num_flows": False,
    "inverse_method": False,
    "inverse_tolerance": "3",
    "flow_temperatures": False,
    "top_k": True,
    "top_p": "3",
    "eos_token_id": "a",
    "pad_token_id": [],
    "suppress_tokens": 9,
    "begin_suppress_tokens": "3",
    "no_repeat_ngram_size": True,
    "max_time": "3",
    "streamer": True,
    "noise": True,
    "generator": 3,
}
FOUND_FIELDS = {
    "intermediate_size": 2.5,
    "initializer_range": None,
    "initial_log_scale": math.nan,
    "eos_token_id": "a",
    "pad_token_id": [],
    "block_config": {"model_type": ["llama"]},
}
FOUND_IN_FORWARD = {
    "attention_mask": True,
    "labels": [1],
    "observed_mask": 1,
    "latents": torch.zeros(2, 2),
    "latent_noise": torch.zeros(1, 2, 2),
    "position_ids": torch.tensor(1),
    "generator": 3,
}


@pytest.mark.parametrize("name", FOUND)
def test_an_option_of_a_wrong_kind_is_named(name):
    with pytest.raises(ValueError, match=name):
        SHARED["mix-d"].generate(IDS[:1], **{name: FOUND[name]})


@pytest.mark.parametrize("name", FOUND_FIELDS)
def test_a_field_of_a_wrong_kind_is_named(name):
    flow = {"coupling": "affine", "direction": "left_to_right", "num_hidden_layers": 1}
    fields = {"hidden_size": 16, "num_attention_heads": 2, "flows": [flow]}
    if name == "block_config":
        fields = {"flows": [flow]}

    with pytest.raises(ValueError, match=name):
        TarFlowLMConfig(**fields, **{name: FOUND_FIELDS[name]})


@pytest.mark.parametrize("name", FOUND_IN_FORWARD)
def test_an_argument_of_a_wrong_kind_is_named(name):
    with pytest.raises(ValueError, match=name):
        SHARED["mix-d"](IDS, **{name: FOUND_IN_FORWARD[name]})


def test_a_coupling_and_a_width_of_a_wrong_kind_are_named():
    for name, value in (("coupling", []), ("head_hidden_size", "a"), ("head_hidden_size", 1)):
        flow = {"coupling": "mixture_cdf", "direction": "left_to_right", "num_hidden_layers": 1}
        with pytest.raises(ValueError, match=name):
            TarFlowLMConfig(flows=[flow | {name: value}])


def test_a_bound_of_nothing():
    with pytest.raises(ValueError, match="not empty"):
        SHARED["mix-d"].importance_weighted_bound(EMPTY, EMPTY)
