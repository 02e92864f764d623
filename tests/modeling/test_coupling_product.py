"""Log-densities of large codebooks by matrix products, and the tables that are kept of a codebook."""

import math

import pytest
import torch

from helpers.couplings import CODEBOOKS, draw_mixture, generator, with_gradients
from tarflow_hf.modeling import codebook as codebook_module
from tarflow_hf.modeling import (
    codebook_kept,
    coupling,
    coupling_cpu,
    coupling_product,
    coupling_torch,
)
from tarflow_hf.modeling.codebook import Codebook, Gaussians

pytestmark = pytest.mark.usefixtures("one_thread")


def log_total(z, mean, log_scale):
    return Gaussians(mean, log_scale).log_total(z)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_density_and_gradients_are_the_references(name):
    tensors = draw_mixture(name, 40)
    actual = with_gradients(coupling_cpu.mixture_rosenblatt_log_prob, tensors)
    expected = with_gradients(coupling_torch.mixture_rosenblatt_log_prob, tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_float32_is_no_worse_than_the_reference(name):
    tensors = draw_mixture(name, 40, torch.float32)
    exact = with_gradients(
        coupling_torch.mixture_rosenblatt_log_prob, [x.double() for x in tensors]
    )
    actual, reference = (
        with_gradients(function, tensors)
        for function in (
            coupling_cpu.mixture_rosenblatt_log_prob,
            coupling_torch.mixture_rosenblatt_log_prob,
        )
    )
    for a, r, e in zip(actual, reference, exact, strict=True):
        ours, theirs = (a - e).norm(), (r - e).norm()
        assert ours <= 1.5 * theirs + 1e-7 * e.norm()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_total_over_the_codebook(name):
    z, _, mean, log_scale = draw_mixture(name, 30)

    def plain(z, mean, log_scale):
        t = (z.unsqueeze(1) - mean) * torch.exp(-log_scale).unsqueeze(-1)
        size = mean.shape[1]
        log_prob = -0.5 * t.square().sum(-1) - size * (log_scale + 0.5 * math.log(2 * math.pi))
        return torch.logsumexp(log_prob, -1)

    actual = with_gradients(log_total, (z, mean, log_scale))
    for a, e in zip(actual, with_gradients(plain, (z, mean, log_scale)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_most_likely_components(name):
    z, _, *parameters = draw_mixture(name, 50)
    codebook = Gaussians(*parameters)
    expected = codebook.log_prob_all(z).topk(8).indices
    assert torch.equal(codebook.most_likely(z, 8), expected)
    assert torch.equal(codebook.most_likely(z, 1), expected[:, :1])


def test_blocks_leave_out_no_more_than_is_said():
    """The candidates of a sum have all of it but V e^-MARGIN, and are all of it if they overlap."""
    z, logits, mean, log_scale = draw_mixture("in blocks, separated", 50)
    product = coupling_product.make_product(mean, log_scale)
    joint = coupling_product._joint(product, z, logits, slice(None))
    margin = coupling_product.MARGIN[torch.float32]
    candidates = coupling_product._candidates(joint, margin)
    assert candidates.shape[1] <= 10 * coupling_product.BLOCK

    left_out = joint.logsumexp(-1) - joint.gather(1, candidates).logsumexp(-1)
    assert left_out.abs().max() <= len(mean) * math.exp(-margin) + 1e-14

    _, _, *overlapping = draw_mixture("in blocks, overlapping", 1)
    product = coupling_product.make_product(*overlapping)
    joint = product.log_prob(overlapping[0][:20])
    assert coupling_product._candidates(joint, margin) is None


@pytest.mark.parametrize("log_scale", [-1.0, -3.5, -5.0])
def test_rounding_is_bounded(log_scale):
    mean = 3 + torch.randn(300, 16, generator=generator(2), dtype=torch.float64)
    z = mean[:50] + math.exp(log_scale)
    scales = torch.full((300,), log_scale, dtype=torch.float64)
    product = coupling_product.make_product(mean, scales)
    exact = Gaussians(mean, scales).log_prob_all(z)
    bound = product.rounding(z)
    assert bound < 1e-7
    near = exact > exact.amax(-1, keepdim=True) - 100  # the others are as large as the product
    error = (product.log_prob(z)[:, :300] - exact).abs()
    assert error[near].max() <= bound


def test_scales_too_thin_for_it_are_left_to_the_reference():
    z, logits, mean, log_scale = draw_mixture("separated", 10, torch.float32)
    assert coupling_product.product_of(z, mean, log_scale) is not None
    assert coupling_product.product_of(z, mean, log_scale - 9) is None
    assert coupling_product.product_of(1e6 * z, mean, log_scale) is None
    assert coupling_product.product_of(z * math.nan, mean, log_scale) is None

    far = 1e6 * z
    expected = coupling_torch.mixture_rosenblatt_log_prob(far, logits, mean, log_scale)
    actual = coupling.mixture_rosenblatt_log_prob(far, logits, mean, log_scale)
    assert torch.equal(actual, expected)


def test_small_codebooks_do_without():
    z, _, mean, log_scale = draw_mixture("separated", 5)
    assert coupling_product.product_of(z[:, :2], mean[:30, :2], log_scale[:30]) is None


def test_the_average_has_only_terms_with_weight(monkeypatch):
    """Those left out change the average by less than `top_k` MIN_WEIGHT."""
    z, _, *parameters = draw_mixture("separated", 50)
    codebook, table = Gaussians(*parameters), torch.randn(600, 12, dtype=torch.float64)
    seen = []
    bag = codebook_module.F.embedding_bag
    monkeypatch.setattr(
        codebook_module.F,
        "embedding_bag",
        lambda index, *x, **y: seen.append(index) or bag(index, *x, **y),
    )
    average = codebook.posterior_average(z.unsqueeze(-2), table, 8)
    monkeypatch.setattr(codebook_module, "MIN_WEIGHT", -1.0)
    expected = codebook.posterior_average(z.unsqueeze(-2), table, 8)
    assert seen[0].shape[1] < seen[1].shape[1] == 8
    torch.testing.assert_close(average, expected, rtol=0, atol=8 * 2.0**-40 * table.abs().max())


# -------------------------------------------------------------------------------- tables that are kept


def test_tables_are_made_once_and_again_after_every_change():
    codebook = Codebook(300, 8)
    made = []

    def make(mean, log_scale):
        made.append(mean.clone())
        return len(made)

    assert [codebook_kept.kept(make, *codebook()) for _ in range(3)] == [1, 1, 1]

    codebook.mean.grad = torch.ones_like(codebook.mean)
    torch.optim.SGD([codebook.mean], lr=1e-6).step()
    assert codebook_kept.kept(make, *codebook()) == 2

    codebook.log_scale.data.add_(1e-3)
    assert codebook_kept.kept(make, *codebook()) == 3

    codebook.load_state_dict({name: x + 1 for name, x in codebook.state_dict().items()})
    assert codebook_kept.kept(make, *codebook()) == 4

    codebook.mean.data = codebook.mean.data.clone()
    assert codebook_kept.kept(make, *codebook()) == 5


def test_inside_unchanged_a_codebook_is_summed_once(monkeypatch):
    codebook = Codebook(300, 8)
    sums = []
    count = codebook_kept._checksums
    monkeypatch.setattr(codebook_kept, "_checksums", lambda x: sums.append(x) or count(x))

    def make(mean, log_scale):
        return mean.clone()

    first = codebook_kept.kept(make, *codebook())
    codebook.mean.data.add_(1.0)  # seen by no version
    sums.clear()
    with codebook_kept.assume_codebook_unchanged():
        second = codebook_kept.kept(make, *codebook())
        assert not torch.equal(first, second) and len(sums) == 2
        assert codebook_kept.kept(make, *codebook()) is second and len(sums) == 2
        with torch.no_grad():
            codebook.mean.add_(1.0)
        assert torch.equal(codebook_kept.kept(make, *codebook()), second + 1) and len(sums) == 4

    codebook.mean.data.add_(1.0)
    assert torch.equal(codebook_kept.kept(make, *codebook()), second + 2) and len(sums) == 6
    with torch.inference_mode(), codebook_kept.assume_codebook_unchanged():
        mean, log_scale = (x.clone() for x in codebook())
        table = codebook_kept.kept(make, mean, log_scale)
        mean.add_(1.0)  # tensors of this mode have no version
        assert torch.equal(codebook_kept.kept(make, mean, log_scale), table + 1)


def near_of(z, mean, log_scale):
    return coupling_product.near(z, coupling_product.product_of(z, mean, log_scale))


def test_latents_are_looked_up_once_and_again_when_they_change(monkeypatch):
    z, logits, *parameters = draw_mixture("in blocks, far apart", 40)
    looks = []
    find = coupling_product._find_near
    monkeypatch.setattr(coupling_product, "_find_near", lambda *x: looks.append(x) or find(*x))

    coupling_cpu.mixture_rosenblatt_log_prob(z, logits, *parameters)
    log_total(z.unsqueeze(0).flatten(0, 1), *parameters)
    part = log_total(z[10:25], *parameters)
    Gaussians(*parameters).most_likely(z, 8)
    assert len(looks) == 1
    assert torch.equal(part, log_total(z, *parameters)[10:25])

    before = log_total(z, *parameters)
    z.numpy()[3] += 0.5  # seen by no version
    changed = log_total(z, *parameters)
    assert len(looks) == 2 and (changed != before).nonzero().flatten().tolist() == [3]

    parameters[0].mul_(1.01)
    assert (log_total(z, *parameters) != changed).all()
    assert len(looks) == 3


def test_all_others_are_below_what_is_near():
    z, _, mean, log_scale = draw_mixture("in blocks, far apart", 60)
    found = near_of(z, mean, log_scale)
    every = Gaussians(mean, log_scale).log_prob_all(z)
    inside = found.index.clamp(max=len(mean) - 1)
    assert found.index.shape[1] < len(mean) / 4
    assert (every.scatter(1, inside, -math.inf) <= found.least).all()
    torch.testing.assert_close(
        every.gather(1, inside).amax(-1), found.log_prob.amax(-1), rtol=0, atol=1e-8
    )


def test_logits_may_take_a_component_from_far_away():
    """A logit that is larger than the others by more than `LOGITS_RANGE` and all distances."""
    z, logits, mean, log_scale = draw_mixture("in blocks, far apart", 30)
    logits[:, 17] += 1e5
    assert near_of(z, mean, log_scale) is not None
    actual = with_gradients(coupling_cpu.mixture_rosenblatt_log_prob, [z, logits, mean, log_scale])
    expected = with_gradients(
        coupling_torch.mixture_rosenblatt_log_prob, [z, logits, mean, log_scale]
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-7)


def test_an_overlapping_codebook_has_nothing_near():
    z, _, *parameters = draw_mixture("in blocks, overlapping", 20)
    assert near_of(z, *parameters) is None
