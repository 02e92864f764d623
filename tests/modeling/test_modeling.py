"""The model against autodiff, enumeration and quadrature."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.enumeration import enumerate_likelihoods
from helpers.models import PATCH_STACKS, STACKS, flow, make
from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
from tarflow_hf.modeling import coupling
from tarflow_hf.modeling.coupling_heads import COUPLING_HEADS
from tarflow_hf.modeling.mixture_rosenblatt_head import MixtureRosenblattHead
from tarflow_hf.training import recompute_activations


def jacobian(model, z, **options):
    """d noise / d latents of one sequence, (T d, T d)."""
    function = lambda flat: model.flow(flat.reshape(z.shape), **options).noise.flatten()  # noqa: E731
    return torch.autograd.functional.jacobian(function, z.flatten())


@pytest.fixture(params=[*STACKS, *PATCH_STACKS], ids=str)
def flows(request):
    return (STACKS | PATCH_STACKS)[request.param]


@pytest.fixture
def smallest_patch(flows):
    return 2 if any("patch_head_layers" in layer for layer in flows) else 1


@pytest.fixture(params=[1, 2, 3], ids="patch {}".format)
def patch_size(request, smallest_patch):
    if request.param < smallest_patch:
        pytest.skip("a patch of one token has no patch head")
    return request.param


def test_every_coupling_has_a_stack():
    assert {layer["coupling"] for layers in STACKS.values() for layer in layers} == set(
        COUPLING_HEADS
    )


def test_log_det_is_that_of_the_jacobian(flows, patch_size, monkeypatch):
    # Llama's norm computes in float32 whatever the model's dtype, and its rounding would be all
    # that is seen here.
    def norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    model = make(flows, patch_size)
    z = model.encode(torch.randint(5, (1, 6)))
    whole = torch.linalg.slogdet(jacobian(model, z)).logabsdet
    torch.testing.assert_close(model.flow(z).log_det[0], whole, atol=1e-6, rtol=0)

    # Flow by flow, where the blocks on the diagonal are all that counts, and no product of flows is
    # ill-conditioned.
    size, log_det = 2 * patch_size, 0.0

    for num_flows, layer in enumerate(model.flow.layers, 1):
        h = model.flow(z).states[num_flows - 1].reshape(1, -1, size)
        function = lambda flat: layer(flat.reshape(h.shape), model.codebook())[0].flatten()  # noqa: B023, E731
        blocks = (
            torch.autograd.functional.jacobian(function, h.flatten())
            .unflatten(1, (-1, size))
            .unflatten(0, (-1, size))
        )
        log_det += torch.linalg.slogdet(
            torch.stack([blocks[n, :, n] for n in range(len(blocks))])
        ).logabsdet.sum()
        torch.testing.assert_close(
            model.flow(z, num_flows=num_flows).log_det[0], log_det, atol=1e-9, rtol=0
        )


def test_jacobian_of_one_flow_is_block_triangular_in_its_direction(flows, patch_size):
    model = make(flows[:1], patch_size)
    z = model.encode(torch.randint(5, (1, 6)))
    size = patch_size * 2
    blocks = (
        jacobian(model, z).unflatten(1, (-1, size)).unflatten(0, (-1, size)).abs().amax((1, 3))
    )  # (N, N)
    if flows[0]["direction"] == "right_to_left":  # the other two pass the patches left to right
        blocks = blocks.flip(0, 1)

    assert torch.equal(blocks.triu(1), torch.zeros_like(blocks))
    assert (blocks.diagonal() > 0).all()
    if len(blocks) > 1:
        assert blocks.tril(-1).abs().max() > 1e-8  # the context is read


@pytest.mark.parametrize("patch_size", [2, 3])
def test_within_a_patch_the_last_token_comes_first(patch_size):
    """The last token's noise depends on itself and on the patches before it only.

    The flow is dimension-wise autoregressive.
    """
    model = make([flow("mixture_cdf", "right_to_left_within_patch", num_components=2)], patch_size)
    z = model.encode(torch.randint(5, (1, 2 * patch_size)))
    tokens = (
        jacobian(model, z).unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).abs().amax((1, 3))
    )  # (T, T)
    second = tokens[patch_size:, patch_size:]
    assert torch.equal(second > 0, torch.ones_like(second).triu() > 0)
    assert tokens[:patch_size, patch_size:].max() == 0 < tokens[patch_size:, :patch_size].min()


@pytest.mark.parametrize("stack", PATCH_STACKS)
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_a_patch_head_end_to_end(stack, patch_size):
    """Training lowers the loss, and scoring and sampling agree.

    The body still runs once a patch.
    """
    model = make(PATCH_STACKS[stack], patch_size, max_position_embeddings=16)
    input_ids = torch.randint(5, (2, 16))
    noise = torch.randn(2, 16, 2, dtype=torch.float64)
    torch.testing.assert_close(
        model.flow(model.flow(noise, reverse=True).latents).noise, noise, atol=1e-7, rtol=1e-7
    )
    tokens = model.generate(noise=noise)
    assert tokens.shape == (2, 16) and torch.equal(tokens[:1], model.generate(noise=noise[:1]))

    lengths = []
    for layer in model.flow.layers:
        layer.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        )

    optimizer = torch.optim.Adam(
        model.parameters(), lr=0.002
    )  # small enough to descend at every step
    losses = []

    for _ in range(5):
        loss = model(input_ids, labels=input_ids, generator=torch.Generator().manual_seed(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses == sorted(losses, reverse=True)
    assert lengths == [16 // patch_size] * 5 * len(model.flow.layers)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_a_patch_head_sees_the_tokens_before_in_the_patch_and_no_others(patch_size):
    """The Jacobian's blocks are triangular over the tokens of a patch.

    The flow is one of Mix-d, token by token. Without a patch head the blocks are diagonal.
    """
    for layers, is_seen in ((0, False), (1, True)):
        model = make(
            [flow("mixture_rosenblatt", patch_head_layers=layers)],
            patch_size,
            max_position_embeddings=16,
        )
        z = model.encode(torch.randint(5, (1, 2 * patch_size)))
        blocks = (
            jacobian(model, z).unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).abs().amax((1, 3))
        )  # (T, T)
        assert (
            torch.equal(blocks.triu(1), torch.zeros_like(blocks)) and (blocks.diagonal() > 0).all()
        )

        for first in (0, patch_size):
            patch = blocks[first : first + patch_size, first : first + patch_size]
            below = torch.ones_like(patch).tril(-1) > 0
            assert ((patch[below] > 0) == is_seen).all()


def test_within_patches_of_one_token_it_is_left_to_right():
    stacks = [
        [flow("mixture_cdf", direction)]
        for direction in ("left_to_right", "right_to_left_within_patch")
    ]
    z = torch.randn(2, 6, 2, dtype=torch.float64)
    expected, actual = (make(flows).flow(z) for flows in stacks)
    assert torch.equal(actual.noise, expected.noise) and torch.equal(
        actual.log_det, expected.log_det
    )


def test_reverse_undoes_forward(flows, patch_size):
    model = make(flows, patch_size)
    z = model.encode(torch.randint(5, (3, 6)))
    forward = model.flow(z)
    reverse = model.flow(forward.noise, reverse=True)
    assert len(forward.states) == len(reverse.states) == len(flows) + 1
    for there, back in zip(forward.states, reverse.states, strict=True):
        torch.testing.assert_close(back, there, atol=1e-8, rtol=1e-8)

    u = torch.randn(3, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(
        model.flow(model.flow(u, reverse=True).latents).noise, u, atol=1e-8, rtol=1e-8
    )


def test_cached_reverse_equals_recomputing_every_prefix(flows, patch_size):
    """An oracle without a cache asks the forward pass for each position's context.

    It computes every prefix anew.
    """
    model = make(flows, patch_size)
    u = torch.randn(2, 6, 2, dtype=torch.float64)
    h = u.reshape(2, -1, 2 * patch_size)

    for layer in reversed(model.flow.layers):
        own = layer.order(h).arrange(h)
        found = torch.zeros_like(own)

        for n in range(own.shape[1]):
            inputs = layer.inputs(found, model.codebook(), last=n + 1)
            context = layer.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]
            found[:, n : n + 1] = layer.head(
                own[:, n : n + 1], context, model.codebook(), task="inverse"
            )

        h = layer.order(found).rearrange(found)

    torch.testing.assert_close(
        model.flow(u, reverse=True).latents, h.reshape(u.shape), atol=1e-8, rtol=1e-8
    )


def test_telescoped_likelihood_equals_the_sum_of_log_dets(flows, patch_size):
    model = make(flows, patch_size)
    z = model.encode(torch.randint(5, (3, 6)))

    for num_flows in range(1, len(flows) + 1):
        full = model.flow(z, num_flows=num_flows)
        base = torch.distributions.Normal(0.0, 1.0).log_prob(full.noise).sum((1, 2))
        torch.testing.assert_close(full.log_prob, full.log_det + base)
        short = model.flow(z, num_flows=num_flows, output_noise=False)
        assert short.noise is None and len(short.states) == num_flows
        torch.testing.assert_close(short.log_prob, full.log_prob, atol=1e-9, rtol=1e-9)


def test_no_distribution_function_in_the_last_flow_of_a_training_step(monkeypatch):
    from tarflow_hf.modeling import coupling_torch

    calls = []
    original = coupling_torch._transform
    monkeypatch.setattr(
        coupling_torch, "_transform", lambda *a: calls.append(a[0].shape) or original(*a)
    )

    for flows, num_calls in (
        (STACKS["mix-d"], 0),
        (STACKS["mix-1"], 0),
        (STACKS["mix-d, mix-1, mix-1"], 2),
    ):
        calls.clear()
        model = make(flows)
        input_ids = torch.randint(5, (2, 6))
        model(input_ids, labels=input_ids).loss.backward()
        assert (
            len(calls) == num_calls
        )  # once for the Mix-d flow and the first Mix-1 flow, none in the backward pass


def test_a_cut_stack_is_a_model_of_its_own(flows, smallest_patch):
    model = make(flows, smallest_patch)
    z = model.encode(torch.randint(5, (2, 6)))

    for num_flows in range(1, len(flows) + 1):
        alone = make(flows[:num_flows], smallest_patch)
        alone.load_state_dict(
            {k: v for k, v in model.state_dict().items() if k in alone.state_dict()}
        )
        cut, whole = model.flow(z, num_flows=num_flows), alone.flow(z)
        torch.testing.assert_close(cut.log_prob, whole.log_prob)
        torch.testing.assert_close(cut.noise, whole.noise)
        torch.testing.assert_close(model.flow(z).states[num_flows], cut.noise)


def test_padding_changes_nothing(flows, patch_size):
    model = make(flows, patch_size)
    input_ids = torch.randint(5, (3, 12))
    z = model.encode(input_ids)
    lengths = [6, 12, 6]
    mask = torch.tensor([[n < length for n in range(12)] for length in lengths]).long()
    padded_ids, padded_z = (
        input_ids.masked_fill(mask == 0, -100),
        z.masked_fill(mask[..., None] == 0, 1e3),
    )
    padded = model(padded_ids, mask, labels=padded_ids, latents=padded_z, output_noise=True)
    alone = [
        model(input_ids[i : i + 1, :length], latents=z[i : i + 1, :length], output_noise=True)
        for i, length in enumerate(lengths)
    ]

    for name in ("elbo", "reconstruction_log_prob", "prior_log_prob", "posterior_log_prob"):
        torch.testing.assert_close(
            padded[name], torch.cat([out[name] for out in alone]), atol=1e-9, rtol=1e-9
        )

    torch.testing.assert_close(padded.loss, -sum(out.elbo.sum() for out in alone) / sum(lengths))
    for i, length in enumerate(lengths):
        torch.testing.assert_close(
            padded.noise[i, :length], alone[i].noise[0], atol=1e-9, rtol=1e-9
        )
        assert (padded.noise[i, length:] == 0).all()

    back = model.flow(padded.noise, mask, reverse=True).latents
    torch.testing.assert_close(back, z.masked_fill(mask[..., None] == 0, 0), atol=1e-7, rtol=1e-7)


def test_no_gradient_leaves_padding_and_every_parameter_gets_one(flows, smallest_patch):
    model = make(flows, smallest_patch)
    input_ids = torch.randint(5, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    z = model.encode(input_ids).detach().requires_grad_()
    model(input_ids, mask, labels=input_ids, latents=z).loss.backward()
    assert (z.grad[1, 4:] == 0).all() and (z.grad[1, :4] != 0).all()
    model(input_ids, mask, labels=input_ids).loss.backward()

    for name, parameter in model.named_parameters():
        assert (
            parameter.grad is not None
            and parameter.grad.isfinite().all()
            and (parameter.grad != 0).any()
        ), name


def test_terms_of_the_bound(flows, smallest_patch):
    """The terms against their definitions, with torch.distributions."""
    model = make(flows, smallest_patch)
    input_ids = torch.randint(5, (2, 6))
    out = model(input_ids, output_noise=True)
    mean, log_scale = model.codebook()
    gaussian = torch.distributions.Normal(mean, log_scale.exp()[:, None])
    each = gaussian.log_prob(out.latents[..., None, :]).sum(-1)  # (B, T, V)
    posterior = each.gather(-1, input_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(out.posterior_log_prob, posterior.sum(-1))
    torch.testing.assert_close(
        out.reconstruction_log_prob, (posterior - each.logsumexp(-1)).sum(-1)
    )
    torch.testing.assert_close(model.decode(out.latents), each.log_softmax(-1))
    terms = out.reconstruction_log_prob + out.prior_log_prob - out.posterior_log_prob
    torch.testing.assert_close(out.elbo, terms)


ENUMERATED = {
    "mix-d": [flow("mixture_rosenblatt")],
    "mix-d, mix-1": [
        flow("mixture_rosenblatt"),
        flow("mixture_cdf", "right_to_left", num_components=2),
    ],
    "mix-1, affine": [flow("mixture_cdf", num_components=2), flow("affine", "right_to_left")],
}


@pytest.mark.parametrize("name", [*ENUMERATED, *PATCH_STACKS])
def test_likelihoods_of_all_sequences_add_up_to_one(name):
    patch_size = 2 if name in PATCH_STACKS else 1
    model = make(
        (ENUMERATED | PATCH_STACKS)[name],
        patch_size,
        latent_size=1,
        vocab_size=3,
        initial_log_scale=-0.5,
    )
    log_likelihood, elbo = enumerate_likelihoods(model, 2)
    assert sum(map(math.exp, log_likelihood.values())) == pytest.approx(1, abs=1e-4)
    for x, value in elbo.items():
        assert value < log_likelihood[x]


def test_elbo_and_importance_weighted_bound_against_quadrature():
    model = make(ENUMERATED["mix-d, mix-1"], latent_size=1, vocab_size=3, initial_log_scale=-0.5)
    log_likelihood, elbo = enumerate_likelihoods(model, 2)
    x = (0, 2)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.tensor(x).expand(20_000, 2)

    with torch.no_grad():
        samples = model(input_ids, generator=generator).elbo
        error = samples.std() / math.sqrt(len(samples))
        assert abs(samples.mean() - elbo[x]) < 4 * error
        bounds = []

        for num_samples in (1, 4, 32):
            values = model.importance_weighted_bound(
                input_ids[:2000], num_samples=num_samples, generator=generator
            )
            bounds.append((values.mean().item(), values.std().item() / math.sqrt(len(values))))

    for (low, low_error), (high, high_error) in itertools.pairwise(
        [*bounds, (log_likelihood[x], 0.0)]
    ):
        assert low < high + 3 * math.hypot(low_error, high_error)

    gap, first_gap = log_likelihood[x] - bounds[-1][0], log_likelihood[x] - bounds[0][0]
    assert gap < 0.2 * first_gap


def test_sampled_tokens_follow_the_enumerated_distribution():
    """Chi-square of 20,000 samples against the table of all sequences.

    Tokens are decoded by sampling p(x | z).
    """
    from scipy.stats import chisquare

    model = make(ENUMERATED["mix-d, mix-1"], latent_size=1, vocab_size=3, initial_log_scale=-0.5)
    log_likelihood, _ = enumerate_likelihoods(model, 2)
    generator = torch.Generator().manual_seed(1)
    tokens = model.float().generate(
        num_return_sequences=20_000, max_new_tokens=2, decode="sample", generator=generator
    )
    counts = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9)
    expected = np.array(
        [math.exp(log_likelihood[x]) for x in itertools.product(range(3), repeat=2)]
    )
    assert expected.max() / expected.min() > 1.2  # there is something to tell apart
    assert chisquare(counts.numpy(), expected / expected.sum() * 20_000).pvalue > 1e-3


def test_proposition_4_the_limit_is_the_discrete_model():
    """The limit of vanishing scales is the discrete transformer.

    Minus the ELBO of a single tied Mix-d flow becomes the cross-entropy of its mixture weights. The
    posterior context then reads the tokens' own embeddings.
    """
    model = make([flow("mixture_rosenblatt")], latent_size=3, vocab_size=7)
    input_ids = torch.randint(7, (4, 12))
    layer = model.flow.layers[0]
    tokens = torch.cat([layer.start.expand(4, 1, -1), layer.embedding[input_ids[:, :-1]]], 1)
    hidden = layer.decoder(inputs_embeds=tokens).last_hidden_state
    projection = layer.head.projection()[0]
    logits = torch.nn.functional.linear(hidden, *projection)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids)
    gaps = []

    for log_scale in (-1.0, -3.0, -6.0):
        torch.nn.init.constant_(model.codebook.log_scale, log_scale)
        gaps.append((model(input_ids, labels=input_ids).loss - expected).abs().item())

    assert gaps[2] < 1e-9 < gaps[0]

    # At any scale the objective of a token is log sum_k pi_k p(k | z), given the context.
    torch.nn.init.constant_(model.codebook.log_scale, 0.0)
    out = model(input_ids)
    hidden = layer.decoder(
        inputs_embeds=layer.inputs(out.latents, model.codebook())
    ).last_hidden_state
    weights = torch.nn.functional.linear(hidden, *projection).log_softmax(-1)
    torch.testing.assert_close(
        out.elbo, torch.logsumexp(weights + model.decode(out.latents), -1).sum(-1)
    )


# ----------------------------------------------------------------------------- pieces and precision


@pytest.mark.parametrize("patch_size", [1, 3])
def test_top_k_posterior_context(patch_size):
    model = make([flow("mixture_rosenblatt")], vocab_size=9)
    z = torch.randn(2, 5, patch_size, 2, dtype=torch.float64, requires_grad=True)
    table = torch.randn(patch_size * 9, 4, dtype=torch.float64, requires_grad=True)

    for top_k in (9, 3):
        log_prob = model.codebook().log_prob_all(z)
        kept = log_prob >= log_prob.topk(top_k).values[..., -1:]
        weights = torch.softmax(log_prob.masked_fill(~kept, -math.inf), -1)
        expected = sum(weights[:, :, p] @ table[9 * p : 9 * (p + 1)] for p in range(patch_size))
        actual = model.codebook().posterior_average(z, table, top_k)
        torch.testing.assert_close(actual, expected)
        cotangent = torch.randn_like(expected)

        inputs = (z, table, model.codebook.mean, model.codebook.log_scale)
        for a, b in zip(
            torch.autograd.grad(actual, inputs, cotangent),
            torch.autograd.grad(expected, inputs, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("patch_head_layers", [0, 1])
def test_large_vocabulary_in_chunks(monkeypatch, patch_head_layers):
    """Logits are made chunk by chunk, and again in the backward pass.

    That changes no loss and no gradient.
    """

    model = make([flow("mixture_rosenblatt", patch_head_layers=patch_head_layers)], patch_size=2)
    input_ids = torch.randint(5, (3, 8))
    z = model.encode(input_ids).detach()

    def run():
        model.zero_grad()
        out = model(input_ids, labels=input_ids, latents=z, output_noise=True)
        out.loss.backward()
        return [
            out.elbo.detach(),
            out.noise.detach(),
            *(p.grad.clone() for p in model.parameters()),
        ]

    expected = run()
    monkeypatch.setattr(MixtureRosenblattHead, "max_logits", 5 * 2 * 2)
    num_logits, plain = [], coupling.mixture_rosenblatt

    def recorded(z, logits, *args, **options):
        num_logits.append(logits.numel())
        return plain(z, logits, *args, **options)

    monkeypatch.setattr(coupling, "mixture_rosenblatt", recorded)
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b)

    assert max(num_logits) <= 5 * 2 * 2 and len(num_logits) > 2
    u = torch.randn(3, 8, 2, dtype=torch.float64)
    torch.testing.assert_close(
        model.flow(model.flow(u, reverse=True).latents).noise, u, atol=1e-8, rtol=1e-8
    )
    model = make(
        [flow("mixture_rosenblatt", patch_head_layers=patch_head_layers)],
        patch_size=2,
        posterior_top_k=3,
    )
    torch.testing.assert_close(
        model.flow(model.flow(u, reverse=True).latents).noise, u, atol=1e-8, rtol=1e-8
    )


def test_autoregressive_head_has_only_unmasked_weights():
    """The head of Lippe & Gavves has no blocks that a mask would zero."""
    model = make([flow("mixture_cdf", num_components=2, head_hidden_size=32)], latent_size=4)
    head = model.flow.layers[0].head
    features = 32 * 9 // 16 // 3
    assert head.features_weight.shape == (3, features, 3) and head.output_weight.shape == (4, 6, 16)
    assert head.from_features.shape == (16, (1 + 2 + 3) * features)
    one = make([flow("mixture_cdf")], latent_size=1).flow.layers[0].head
    assert (
        one.features_weight.numel() == one.from_features.numel() == 0
        and len(one.output_weight) == 1
    )


def test_couplings_stay_in_float32_under_autocast(flows, smallest_patch):
    model = make(flows, smallest_patch).float()
    input_ids = torch.randint(5, (2, 6))
    z = model.encode(input_ids)
    exact = model(input_ids, latents=z, output_noise=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids, latents=z, output_noise=True)

    assert out.elbo.dtype == out.noise.dtype == out.latents.dtype == torch.float32
    # bfloat16 in the decoder moves the parameters, not the arithmetic of the couplings.
    torch.testing.assert_close(out.elbo, exact.elbo, rtol=0.05, atol=0.3)
    torch.testing.assert_close(out.posterior_log_prob, exact.posterior_log_prob, rtol=0, atol=0)
    model.bfloat16()
    low = model(input_ids, labels=input_ids)
    assert low.loss.dtype == torch.float32 and low.loss.isfinite()
    low.loss.backward()


@pytest.mark.parametrize("block", ["llama", "qwen3", "mistral"])
def test_other_blocks_through_the_same_door(block):
    block_config = {
        "model_type": block,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
    }
    config = TarFlowLMConfig(
        vocab_size=5, latent_size=2, max_position_embeddings=16, block_config=block_config,
        flows=STACKS["mix-d, mix-1, mix-1"],
    )  # fmt: skip
    model = TarFlowLMModel(config).eval()
    assert config.hidden_size == 16 and config.num_attention_heads == 4
    assert {layer.decoder.config.model_type for layer in model.flow.layers} == {block}
    z = model.encode(torch.randint(5, (2, 8)))
    u = model.flow(z).noise
    torch.testing.assert_close(model.flow(u, reverse=True).latents, z, atol=1e-3, rtol=1e-3)
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())


def test_attention_implementation_reaches_the_blocks():
    model = make(STACKS["mix-d"])
    z = model.encode(torch.randint(5, (1, 6)))
    sdpa = model.flow(z).noise
    model.set_attn_implementation("eager")
    assert model.flow.layers[0].decoder.config._attn_implementation == "eager"
    torch.testing.assert_close(model.flow(z).noise, sdpa, atol=1e-7, rtol=1e-7)


def test_gradient_checkpointing_changes_no_gradient():
    model = make(STACKS["mix-d, mix-1, mix-1"]).train()
    input_ids = torch.randint(5, (2, 6))
    z = model.encode(input_ids).detach()
    gradients = []

    for enable in (False, True):
        if enable:
            recompute_activations(model)
        model.zero_grad()
        model(input_ids, labels=input_ids, latents=z).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])

    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_initial_mixture_is_close_to_the_identity_and_its_components_differ():
    model = TarFlowLMModel(
        TarFlowLMConfig(
            vocab_size=5,
            latent_size=3,
            hidden_size=16,
            num_attention_heads=2,
            flows=[flow("mixture_cdf")],
        )
    )
    z = torch.randn(4, 10, 3)
    out = model.flow(z)
    assert (out.noise - z).abs().max() < 0.3
    assert (
        model.flow.layers[0].head.output_bias[0].detach().unflatten(0, (3, 8))[1].diff().min()
        > 0.05
    )


# ---------------------------------------------------------------------------------------- bad input


def test_bad_input():
    model = make(STACKS["mix-d"], patch_size=2)
    ids = torch.randint(5, (2, 6))
    good = torch.ones_like(ids)

    cases = [
        (dict(input_ids=ids + 5), "vocab_size"),
        (dict(input_ids=ids - 5), "vocab_size"),
        (dict(input_ids=ids[:, :5]), "multiple of patch_size"),
        (dict(input_ids=ids[:, :0]), "empty"),
        (dict(input_ids=ids[0]), "shape"),
        (dict(input_ids=ids.float()), "integers"),
        (dict(input_ids=torch.zeros(1, 20, dtype=torch.long)), "max_position_embeddings"),
        (dict(input_ids=ids, attention_mask=good[:, :4]), "attention_mask"),
        (
            dict(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 0]] * 2)),
            "on the left, must be a multiple of patch_size",
        ),
        (dict(input_ids=ids, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]] * 2)), "holes"),
        (
            dict(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)),
            "multiple of patch_size",
        ),
        (dict(input_ids=ids, attention_mask=0 * good), "without any real token"),
        (dict(input_ids=ids, labels=(ids + 1) % 5), "labels"),
        (dict(input_ids=ids, num_flows=0), "num_flows"),
        (dict(input_ids=ids, num_flows=2), "num_flows"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)

    with pytest.raises(ValueError, match="num_samples"):
        model.importance_weighted_bound(ids, num_samples=0)

    with pytest.raises(ValueError, match="vocab_size"):
        model.encode(ids + 5)

    z = torch.zeros(2, 6, 2)
    for wrong in (z[..., :1], torch.zeros(2, 6, 3), z[0], z[..., 0]):
        with pytest.raises(ValueError, match=r"latent_size, 2|shape"):
            model.flow(wrong)
    with pytest.raises(ValueError, match="latent_size, 2"):
        model.decode(z[..., :1])
    for option in ("atention_mask", "inverse_method", "known"):
        with pytest.raises(TypeError, match=f"has no arguments .'{option}'"):
            model.flow(z, **{option: good})
    with pytest.raises(ValueError, match="known and known_mask together"):
        model.flow(z, reverse=True, known=z)


@pytest.mark.parametrize("stack", ["mix-d, mix-1, mix-1", "one of each"])
def test_offloaded_weights(stack):
    """The hooks that bring weights from where they are kept see every use of one."""
    model = make(STACKS[stack], patch_size=2).float()
    input_ids, noise = torch.randint(5, (2, 6)), torch.randn(2, 6, 2)
    z = model.encode(input_ids)

    with torch.no_grad():
        elbo, tokens = model(input_ids, latents=z).elbo, model.generate(noise=noise)
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
        torch.testing.assert_close(offloaded(input_ids, latents=z).elbo, elbo)
        assert torch.equal(offloaded.generate(noise=noise), tokens)


def test_compiled():
    model = make(STACKS["mix-d, mix-1, mix-1"]).float()
    input_ids = torch.randint(5, (2, 6))
    z = model.encode(input_ids)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        compiled(input_ids, latents=z).elbo, model(input_ids, latents=z).elbo
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_a_flow_of_more_tokens_than_there_are_positions_is_refused(reverse):
    """Positions that are learnt, as GPT-2's, end somewhere; an IndexError said nothing of it."""
    blocks = {"model_type": "gpt2", "hidden_size": 16, "num_attention_heads": 2}
    blocks |= {"max_position_embeddings": 8}
    model = make([flow("affine")], block_config=blocks, max_position_embeddings=8)
    noise = torch.zeros(1, 9, model.config.latent_size)
    assert model.flow(noise[:, :8], reverse=reverse).latents.shape == noise[:, :8].shape
    with pytest.raises(ValueError, match="9 tokens is longer than max_position_embeddings, 8"):
        model.flow(noise, reverse=reverse)
