"""Conditional models: observed tokens as context, against autodiff, an oracle and enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.enumeration import enumerate_likelihoods
from helpers.models import PATCH_STACKS, STACKS, flow, make

CASES = [
    *(
        (STACKS[name], patch_size)
        for name in ("mix-d, mix-1, mix-1", "one of each")
        for patch_size in (1, 2)
    ),
    (STACKS["mix-1, right to left, posterior"], 1),
    (STACKS["mix-d, mix-1 right to left within a patch"], 2),
    (PATCH_STACKS["mix-1, mix-d with patch head"], 2),
]


@pytest.fixture(
    params=CASES,
    ids=lambda case: f"{' '.join(layer['coupling'] for layer in case[0])}, patch {case[1]}",
)
def model(request):
    return make(*request.param, conditional=True)


def masks(patch_size):
    """Observed positions of three sequences of 12 tokens, and the mask of the real ones.

    The rows observe spans, nothing and a prefix.
    """
    observed = torch.tensor(
        [[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1]]
    ).repeat_interleave(2, 1)
    if patch_size == 1:
        observed[0, 6:9] = torch.tensor([0, 1, 1])

    lengths = torch.tensor([12, 8, 6])
    return observed, (torch.arange(12) < lengths[:, None]).long()


def test_log_det_is_that_of_the_jacobian_over_what_is_missing(model, monkeypatch):
    def norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    observed, mask = masks(model.config.patch_size)
    ids = torch.randint(5, (3, 12))
    z = model.encode(ids)
    options = {"attention_mask": mask, "observed_ids": ids, "observed_mask": observed}
    out = model.flow(z, **options)
    is_variable = (mask == 1) & (observed == 0)

    for row in range(3):
        one = {name: x[row : row + 1] for name, x in options.items()}

        def noise(flat):
            latents = z[row : row + 1].masked_scatter(is_variable[row][:, None], flat)  # noqa: B023
            return model.flow(latents, **one).noise[0, is_variable[row]].flatten()  # noqa: B023

        jacobian = torch.autograd.functional.jacobian(noise, z[row, is_variable[row]].flatten())
        torch.testing.assert_close(
            out.log_det[row], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-6, rtol=0
        )
        base = torch.distributions.Normal(0.0, 1.0).log_prob(out.noise[row, is_variable[row]]).sum()
        torch.testing.assert_close(out.log_prob[row], out.log_det[row] + base)

    torch.testing.assert_close(model.flow(z, output_noise=False, **options).log_prob, out.log_prob)


def test_reverse_undoes_forward_and_what_is_observed_has_no_state(model):
    observed, mask = masks(model.config.patch_size)
    ids = torch.randint(5, (3, 12))
    options = {
        "attention_mask": mask,
        "observed_ids": ids.masked_fill(observed == 0, -7),
        "observed_mask": observed,
    }
    forward = model.flow(model.encode(ids), **options)

    reverse = model.flow(forward.noise, reverse=True, **options)
    for there, back in zip(forward.states, reverse.states, strict=True):
        torch.testing.assert_close(back, there, atol=1e-7, rtol=1e-7)
        assert (there[(mask == 0) | (observed == 1)] == 0).all() and (
            there[(mask == 1) & (observed == 0)] != 0
        ).all()

    # The latents of observed tokens are not read, neither way.
    z = forward.latents.masked_fill((observed == 1)[..., None], torch.nan)
    assert torch.equal(model.flow(z, **options).noise, forward.noise)


def test_observed_patches_have_a_table_for_each_place():
    embedding = make([flow("affine")], 2, conditional=True).flow.layers[0].observed_embedding
    table, (first, second) = embedding.embedding.weight, (3, 1)
    expected = table[first] + table[5 + second] + embedding.marker
    torch.testing.assert_close(embedding(torch.tensor([[[first, second]]]))[0, 0], expected)


@pytest.mark.parametrize("direction", ["left_to_right", "right_to_left"])
def test_what_a_decoder_reads(direction):
    """The decoder's input written out for one sequence.

    It has five real positions, of which 1 and 3 are observed, and two of padding.
    """
    model = make([flow("affine", direction)], conditional=True)
    layer = model.flow.layers[0]
    ids, z = torch.randint(5, (1, 7)), torch.randn(1, 7, 2, dtype=torch.float64)

    def embed(n):
        return (
            layer.observed_embedding.embedding.weight[ids[0, n]] + layer.observed_embedding.marker
        )

    read = lambda n: layer.input_projection(z[0, n])  # noqa: E731

    if direction == "left_to_right":
        inputs, position_ids, missing = (
            [embed(1), embed(3), layer.start, read(0), read(2)],
            [1, 3, 0, 2, 4],
            [0, 2, 4],
        )
    else:
        inputs, position_ids, missing = (
            [embed(3), embed(1), layer.start, read(4), read(2)],
            [1, 3, 0, 2, 4],
            [4, 2, 0],
        )

    context = layer.decoder(
        inputs_embeds=torch.stack(inputs)[None],
        position_ids=torch.tensor([position_ids]),
        attention_mask=torch.ones(1, 5),
    ).last_hidden_state[:, 2:]
    expected, log_det = layer.head(z[:, missing], context)
    mask = torch.tensor([[1] * 5 + [0] * 2])
    out = model.flow(z, mask, observed_ids=ids, observed_mask=torch.tensor([[0, 1, 0, 1, 0, 1, 0]]))
    torch.testing.assert_close(out.noise[:, missing], expected)
    torch.testing.assert_close(out.log_det, log_det.sum(-1))


def test_nothing_observed_is_the_unconditional_model(model):
    config = model.config
    plain = make(config.flows, config.patch_size)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "observed" not in k})
    ids, mask = torch.randint(5, (2, 8)), torch.tensor([[1] * 8, [1] * 4 + [0] * 4])
    z = model.encode(ids)
    expected = plain(ids, mask, labels=ids, latents=z, output_noise=True)

    for observed in (None, torch.zeros_like(ids)):
        out = model(ids, mask, labels=ids, latents=z, output_noise=True, observed_mask=observed)
        for name in (
            "loss",
            "elbo",
            "noise",
            "reconstruction_log_prob",
            "prior_log_prob",
            "posterior_log_prob",
        ):
            torch.testing.assert_close(out[name], expected[name], atol=1e-12, rtol=1e-12)


def test_padding_changes_nothing(model):
    observed, mask = masks(model.config.patch_size)
    ids = torch.randint(5, (3, 12))
    z = model.encode(ids)
    is_scored = (mask == 1) & (observed == 0)
    labels = ids.masked_fill(~is_scored, -100)
    observed_or_padding = observed.masked_fill(mask == 0, 1)
    padded = model(
        ids.masked_fill(mask == 0, -100), mask, labels, z, observed_mask=observed_or_padding
    )
    elbos = []

    for row, length in enumerate(mask.sum(-1).tolist()):
        one = slice(row, row + 1), slice(length)
        alone = model(ids[one], latents=z[one], observed_mask=observed[one] == 1)
        elbos.append(alone.elbo)

        for name in ("elbo", "reconstruction_log_prob", "prior_log_prob", "posterior_log_prob"):
            torch.testing.assert_close(
                padded[name][row : row + 1], alone[name], atol=1e-9, rtol=1e-9
            )

    torch.testing.assert_close(padded.loss, -sum(elbos).sum() / is_scored.sum())


def test_terms_are_those_of_the_missing_tokens(model):
    observed, _ = masks(model.config.patch_size)
    ids = torch.randint(5, (3, 12))
    out = model(ids, observed_mask=observed)
    each = model.codebook().log_prob_all(out.latents)
    posterior = each.gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(out.posterior_log_prob, (posterior * (1 - observed)).sum(-1))
    torch.testing.assert_close(
        out.reconstruction_log_prob, ((posterior - each.logsumexp(-1)) * (1 - observed)).sum(-1)
    )
    torch.testing.assert_close(
        out.elbo,
        out.reconstruction_log_prob + out.prior_log_prob - out.posterior_log_prob,
        atol=1e-9,
        rtol=1e-9,
    )


def test_every_observed_token_counts_wherever_it_stands(model):
    """Each observed token changes the prior of the missing ones before and behind it.

    Every parameter gets a gradient.
    """
    observed, _ = masks(model.config.patch_size)
    ids = torch.randint(5, (3, 12))
    z = model.encode(ids).detach()
    prior = model(ids, latents=z, observed_mask=observed).prior_log_prob

    for row, n in observed.nonzero().tolist():
        other = ids.clone()
        other[row, n] = (ids[row, n] + 1) % 5
        change = (model(other, latents=z, observed_mask=observed).prior_log_prob - prior).abs()
        assert change[row] > 1e-9 and change.sum() == change[row]

    model(ids, labels=ids, observed_mask=observed).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


# -------------------------------------------------------------------------------------- enumeration

SMALL = [flow("mixture_rosenblatt"), flow("mixture_cdf", "right_to_left", num_components=2)]
OBSERVED = [{1: 2}, {0: 1}, {2: 0}]


def small_model():
    """A model in which the observed tokens matter.

    Their encoders are apart, and the weights are large.
    """
    model = make(SMALL, latent_size=1, vocab_size=3, initial_log_scale=-0.7, conditional=True)
    with torch.no_grad():
        model.codebook.mean.copy_(torch.tensor([[-1.5], [0.0], [1.5]]))
        for name, parameter in model.flow.layers[0].named_parameters():
            parameter.mul_(4 if parameter.ndim == 2 and "embedding" not in name else 1)

    return model


def completions(observed):
    """Returns all sequences of three tokens with the observed ones, and their mask, (9, 3) each."""
    rows = [
        x
        for x in itertools.product(range(3), repeat=3)
        if all(x[n] == token for n, token in observed.items())
    ]

    return torch.tensor(rows), torch.tensor([[n in observed for n in range(3)]] * len(rows))


@pytest.mark.parametrize("observed", OBSERVED, ids=str)
def test_likelihoods_of_all_completions_add_up_to_one(observed):
    model = small_model()
    log_likelihood, elbo = enumerate_likelihoods(model, 3, points=150, observed=observed)
    assert sum(map(math.exp, log_likelihood.values())) == pytest.approx(1, abs=1e-4)

    # The same of the bounds: ELBOs fall short of 1, many importance samples reach it.
    ids, mask = completions(observed)
    ids, mask = ids.repeat(2000, 1), mask.repeat(2000, 1)

    with torch.no_grad():
        samples = model(
            ids, observed_mask=mask, generator=torch.Generator().manual_seed(0)
        ).elbo.reshape(2000, 9)

    expected = torch.tensor(
        [elbo[x] for x in itertools.product(range(3), repeat=2)], dtype=torch.float64
    )
    assert ((samples.mean(0) - expected).abs() < 4 * samples.std(0) / math.sqrt(2000)).all()
    assert samples.mean(0).exp().sum() < 0.99
    weights = samples.exp().sum(1)
    error = weights.std() / math.sqrt(2000)
    assert abs(weights.mean() - 1) < 4 * error < 0.1


def test_importance_weighted_bound_of_what_is_missing():
    """The bound lies between the ELBO and the likelihood on average.

    With 32 samples it is much closer to the likelihood.
    """
    model, observed = small_model(), {1: 2}
    log_likelihood, elbo = enumerate_likelihoods(model, 3, points=150, observed=observed)
    exact, low = (
        torch.tensor(list(values.values()), dtype=torch.float64)
        for values in (log_likelihood, elbo)
    )
    ids, mask = (x.repeat(300, 1) for x in completions(observed))
    generator = torch.Generator().manual_seed(0)

    with torch.no_grad():
        bound = model.importance_weighted_bound(
            ids, num_samples=32, observed_mask=mask, generator=generator
        )

    mean, error = bound.reshape(300, 9).mean(0), bound.reshape(300, 9).std(0) / math.sqrt(300)
    assert (mean < exact + 3 * error).all() and (
        exact - mean < 0.5 * (exact - low) + 3 * error
    ).all()
    assert (exact - mean).sum() < 0.4 * (exact - low).sum()


@pytest.mark.parametrize("observed", OBSERVED, ids=str)
def test_infilled_tokens_follow_the_enumerated_distribution(observed):
    """Chi-square of 20,000 infills against the table of all completions.

    Tokens are decoded by sampling p(x | z).
    """
    from scipy.stats import chisquare

    model = small_model()
    others = {n: (token + 1) % 3 for n, token in observed.items()}
    tables = [
        enumerate_likelihoods(model, 3, points=150, observed=given)[0].values()
        for given in (observed, others)
    ]
    expected, expected_given_others = (np.exp(list(table)) for table in tables)
    ids, mask = (x[:1] for x in completions(observed))
    tokens = model.float().generate(
        ids.masked_fill(~mask, 99),
        infill_mask=~mask,
        num_return_sequences=20_000,
        decode="sample",
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(tokens[:, mask[0]], ids[:, mask[0]].expand(20_000, -1))
    a, b = tokens[:, ~mask[0]].unbind(-1)
    counts = torch.bincount(a * 3 + b, minlength=9).numpy()
    assert chisquare(counts, expected / expected.sum() * 20_000).pvalue > 1e-3
    assert (
        chisquare(counts, expected_given_others / expected_given_others.sum() * 20_000).pvalue
        < 1e-6
    )


# ----------------------------------------------------------------------------- pieces and bad input


def test_saved_and_loaded_it_is_the_same(tmp_path):
    flows = [
        flow("mixture_rosenblatt", patch_head_layers=1),
        flow("affine", "right_to_left_within_patch"),
    ]
    model = make(flows, 2, conditional=True).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.conditional and loaded.config.flows == model.config.flows
    ids = torch.randint(5, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 0, 0]] * 2)

    with torch.no_grad():
        a, b = (
            m(ids, observed_mask=mask, generator=torch.Generator().manual_seed(0)).elbo
            for m in (model, loaded)
        )

    assert torch.equal(a, b)


def test_offloaded_weights():
    model = make(PATCH_STACKS["mix-1, mix-d with patch head"], 2, conditional=True).float()
    ids, mask = torch.randint(5, (2, 6)), torch.tensor([[0, 0, 1, 1, 0, 0]] * 2)
    z = model.encode(ids)

    with torch.no_grad():
        expected = model(ids, latents=z, observed_mask=mask).elbo
        offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(offloaded(ids, latents=z, observed_mask=mask).elbo, expected)


def test_low_precision_and_other_attention():
    model = make(STACKS["mix-d, mix-1, mix-1"], 2, conditional=True)
    observed, mask = masks(2)
    ids = torch.randint(5, (3, 12))
    options = {"attention_mask": mask, "observed_mask": observed}
    z = model.encode(ids)
    expected = model(ids, latents=z, **options).elbo
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids, latents=z, **options).elbo, expected, atol=1e-5, rtol=0)
    low = model.bfloat16()(ids, labels=ids, **options)
    assert low.loss.dtype == torch.float32 and low.loss.isfinite()
    low.loss.backward()


def test_bad_input():
    model = make(STACKS["mix-d, mix-1, mix-1"], 2, conditional=True)
    ids = torch.randint(5, (2, 6))
    some = torch.tensor([[1, 1, 0, 0, 0, 0]] * 2)

    cases = [
        (dict(observed_mask=some[:, :4]), r"observed_mask must have shape \(2, 6\)"),
        (dict(observed_mask=2 * some), "0 and 1"),
        (dict(observed_mask=some.roll(1, 1)), "whole patches"),
        (dict(observed_mask=torch.ones_like(ids)), "covers a whole sequence"),
        (dict(observed_mask=some, attention_mask=some), "covers a whole sequence"),
        (dict(observed_mask=some, labels=ids.masked_fill(some == 0, -100)), "labels"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)

    z = model.encode(ids)
    with pytest.raises(ValueError, match="observed_ids must be a tensor"):
        model.flow(z, observed_mask=some)

    for wrong in (-ids - 1, ids + 5):
        with pytest.raises(ValueError, match="vocab_size"):
            model.flow(z, observed_ids=wrong, observed_mask=some)

    with pytest.raises(ValueError, match="not both"):
        model.flow(z, reverse=True, known=z, known_mask=some, observed_ids=ids, observed_mask=some)

    with pytest.raises(ValueError, match="conditional=False"):
        make(STACKS["mix-d"], 2)(ids, observed_mask=some)

    model.flow.layers[1].decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 takes a single sequence"):
        model(ids[:1], observed_mask=some[:1])
