"""The couplings against plain autograd and themselves.

A new coupling or size is one line of `CASES`.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from helpers.couplings import CASES, IMPLEMENTATIONS, Case, draw, every_implementation, generator
from tarflow_hf.modeling import coupling, coupling_naive, coupling_torch
from tarflow_hf.modeling.normal import normal_log_prob

pytestmark = pytest.mark.usefixtures("one_thread")

ODD_CASES = {
    **CASES,
    "cdf, K=65": Case("mixture_cdf", 65),
    "rosenblatt, K=65, d=2": Case("mixture_rosenblatt", 65, 2),
}

OPS = [(name, suffix) for name, case in CASES.items() for suffix in case.directions]
ODD_OPS = [(name, suffix) for name, case in ODD_CASES.items() for suffix in case.directions]


def wild(
    shape: tuple[int, ...], limit: float, dtype: torch.dtype, random: torch.Generator
) -> Tensor:
    """Draws magnitudes log-uniform from 1e-8 to `limit`, of both signs.

    A third are exactly 0 or +-limit.
    """
    uniform = torch.rand(shape, generator=random, dtype=torch.float64)
    magnitude = 10 ** (-8 + (8 + math.log10(limit)) * uniform)
    corner = torch.randint(12, shape, generator=random)
    magnitude = torch.where(corner < 3, limit, torch.where(corner == 3, 0.0, magnitude))
    return (magnitude * (2 * torch.randint(2, shape, generator=random) - 1)).to(dtype)


def draw_wild(case: Case, count: int, dtype: torch.dtype, seed: int, limit=1e4) -> list[Tensor]:
    """Draws from the whole domain, often at its corners.

    |z|, |logits| and |loc| go up to 1e4; log_scale is in [-10, 10].
    """
    random = generator(seed)
    limits = {"logits": 1e4, "loc": 1e4, "mean": 1e4, "log_scale": 10.0}
    shapes = case.shapes((count,))
    out = [wild(shapes[0], limit, dtype, random)]
    for name, shape in zip(case.parameters, shapes[1:], strict=True):
        out.append(wild(shape, limits[name], dtype, random))

    if seed % 3 == 0:  # ties: all components of one scale, of one weight
        out[-1] = out[-1][..., :1].expand_as(out[-1]).clone() if case.components > 1 else out[-1]
        out[1] = out[1][..., :1].expand_as(out[1]).clone() if case.components > 1 else out[1]

    return out


def with_gradients(
    run, op: str, tensors: list[Tensor], seed=0, cotangents=None
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns outputs, and the gradients of all arguments for random cotangents."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = run(op, *tensors)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    random = generator(seed)
    cotangents = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, tensors, cotangents)

    return [x.detach() for x in outputs], list(gradients)


# ----------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("name", CASES)
def test_against_plain_autograd(run, name):
    """Outputs and hand-derived gradients of u and log_det.

    Compared with autograd through the specification.
    """
    case = CASES[name]
    tensors = [x.requires_grad_() for x in draw(case, (50,), seed=1)]
    tensors[0] = (0.5 * tensors[0]).detach().requires_grad_()

    specification = getattr(coupling_naive, case.kind)
    expected, actual = specification(*tensors), run(case.kind, *tensors)
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
        cotangent = torch.randn(e.shape, generator=generator(2), dtype=e.dtype)

        gradients = (
            torch.autograd.grad(x, tensors, cotangent, retain_graph=True, allow_unused=True)
            for x in (a, e)
        )
        for tensor, a_grad, e_grad in zip(tensors, *gradients, strict=True):
            a_grad, e_grad = (
                torch.zeros_like(tensor) if x is None else x for x in (a_grad, e_grad)
            )
            torch.testing.assert_close(a_grad, e_grad, rtol=1e-7, atol=1e-8)


@every_implementation
@pytest.mark.parametrize("name", CASES)
def test_every_implementation_is_the_specification(run, name, dtype):
    """u, log_det, log-density and inverse against the paper's equations in float64.

    The equations round where Phi(u) is near 1, which costs them digits in the tails: the latents
    stay within some three scales. The tolerance is what float32 arguments and outputs round.
    """
    case = CASES[name]
    z, *parameters = draw(case, (10 if run.is_slow else 50,), dtype, seed=4)
    z = 0.5 * z
    u, log_det = getattr(coupling_naive, case.kind)(*(x.double() for x in (z, *parameters)))
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-5, "atol": 2e-5}

    actual = run(case.kind, z, *parameters)
    torch.testing.assert_close(actual[0].double(), u, **tolerance)
    torch.testing.assert_close(actual[1].double(), log_det, **tolerance)

    # A rounded u moves z by dz/du: the inverse is compared where it is back in u.
    back = run(case.kind + "_inverse", u.to(dtype), *parameters).double()
    again, _ = getattr(coupling_naive, case.kind)(back, *(x.double() for x in parameters))
    torch.testing.assert_close(again, u, **tolerance)

    if "_log_prob" in case.directions:
        log_phi = normal_log_prob(u)
        log_prob = log_det + (log_phi if case.latent_size is None else log_phi.sum(-1))
        actual = run(case.kind + "_log_prob", z, *parameters)
        torch.testing.assert_close(actual.double(), log_prob, **tolerance)


def test_the_autoregressive_form_is_the_specification():
    """u, log_det and inverse, with parameters from a network that reads the dimensions before."""
    random = generator(6)
    size, num_features, hidden, components = 4, 2, 6, 3
    shapes = {
        "features_weight": (size - 1, num_features, 3),
        "features_bias": (size - 1, num_features),
        "from_features": (hidden, num_features * size * (size - 1) // 2),
        "output_weight": (size, 3 * components, hidden),
        "output_bias": (size, 3 * components),
    }
    z, context, *weights = (
        0.5 * torch.randn(shape, generator=random, dtype=torch.float64)
        for shape in ((20, size), (20, size, hidden), *shapes.values())
    )
    network = coupling_torch.AutoregressiveNetwork(*weights, max_log_scale=10.0)

    def parameters(i: int, before: Tensor) -> list[Tensor]:
        # What the network should not read is NaN.
        known = torch.cat([before, torch.full_like(z[:, i:], torch.nan)], -1)
        every = coupling_torch.autoregressive_mixture_parameters(known, context, network)
        return [x[:, i] for x in every]

    u, log_det = coupling_naive.autoregressive_mixture_cdf(z, parameters)
    every = coupling_torch.autoregressive_mixture_parameters(z, context, network)
    actual, actual_log_det = coupling.mixture_cdf(z, *every)
    torch.testing.assert_close(actual, u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual_log_det.sum(-1), log_det, rtol=1e-9, atol=1e-9)

    back = coupling.autoregressive_mixture_cdf_inverse(u, context, network)
    torch.testing.assert_close(back, z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_jacobian(run, name):
    """log_det is that of the autodiff Jacobian, which is lower triangular.

    The inverse's Jacobian is its inverse.
    """
    case = CASES[name]
    z, *parameters = draw(case, (4,), seed=3)
    u, log_det = run(case.kind, z, *parameters)
    d = z[0].numel()
    across = jacobian(lambda z: run(case.kind, z, *parameters)[0], z).reshape(4, d, 4, d)
    back = jacobian(lambda u: run(case.kind + "_inverse", u, *parameters), u).reshape(4, d, 4, d)
    specification = getattr(coupling_naive, case.kind)
    plain = jacobian(lambda z: specification(z, *parameters)[0], z).reshape(4, d, 4, d)

    for i, j in itertools.product(range(4), repeat=2):
        if i != j:  # no position sees another
            assert not across[i, :, j].any() and not back[i, :, j].any()
            continue

        forward, inverse = across[i, :, i], back[i, :, i]
        torch.testing.assert_close(forward, plain[i, :, i], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(forward, forward.tril(), rtol=0, atol=0)
        torch.testing.assert_close(forward.det().log(), log_det[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            inverse @ forward, torch.eye(d, dtype=z.dtype), rtol=0, atol=1e-8
        )


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "_log_prob" in case.directions]
)
def test_log_prob_is_log_det_plus_base(run, name):
    case = CASES[name]
    z, *parameters = draw(case, (100,), seed=4)
    u, log_det = run(case.kind, z, *parameters)
    base = normal_log_prob(u) if u.ndim == 1 else normal_log_prob(u).sum(-1)
    torch.testing.assert_close(
        run(case.kind + "_log_prob", z, *parameters), log_det + base, rtol=1e-12, atol=1e-12
    )


def test_no_element_keeps_the_others_waiting(monkeypatch):
    """No element hops over its root until bisection ends that.

    On a CPU a batch is as slow as its slowest element.
    """
    num_steps = []
    find_root = coupling_torch.find_root

    def counting(function, *arguments, **options):
        values = []
        root = find_root(lambda x: values.append(x) or function(x), *arguments, **options)
        num_steps.append(len(values))
        return root

    monkeypatch.setattr(coupling_torch, "find_root", counting)
    for seed in range(5):
        u, *parameters = draw(CASES["cdf, K=7"], (4000,), torch.float32, seed)
        coupling.mixture_cdf_inverse(u / 3, *parameters, implementation="reference")

    assert max(num_steps) <= 24 and sum(num_steps) / len(num_steps) <= 18


@every_implementation
@pytest.mark.parametrize("name", CASES)
def test_round_trips(run, name, dtype):
    """Both ways, within the rounding of u and z.

    The rounding is |J^-1| (eps (1 + |u|) + |J| eps |z|) in z, and |J| times it in u.
    """
    case, eps, n = CASES[name], torch.finfo(dtype).eps, 6 if run.is_slow else 30
    z, *parameters = draw(case, (n,), dtype, seed=5, hardness=0.3)
    u, _ = run(case.kind, z, *parameters)
    back = run(case.kind + "_inverse", u, *parameters)
    again, _ = run(case.kind, back, *parameters)
    d = z[0].numel()
    in_double = [x.double() for x in parameters]
    slope = jacobian(lambda z: getattr(coupling, case.kind)(z, *in_double)[0], z.double())
    slope = slope.reshape(n, d, n, d)[range(n), :, range(n)]
    u, z, back, again = (x.double().reshape(n, d, 1) for x in (u, z, back, again))
    u_rounding = 2 * eps * (1 + u.abs() + slope.abs() @ z.abs())
    z_error = torch.linalg.inv(slope).abs() @ u_rounding
    assert ((back - z).abs() <= z_error).all()
    assert ((again - u).abs() <= u_rounding + slope.abs() @ z_error).all()


@pytest.mark.parametrize("run", IMPLEMENTATIONS, indirect=True)
def test_inverse_finds_components_thinner_than_the_spacing_of_floats(run):
    """A component narrower than the spacing of floats shows its slope at one number only.

    The search must not end where it does not see the slope.
    """
    loc = torch.tensor([9900.0, 10000.0, 10100.0]).expand(4, 3)
    u = torch.tensor([-1.0, 1.0, -8.0, 8.0])
    z = run("mixture_cdf_inverse", u, torch.zeros(4, 3), loc, torch.full((4, 3), -10.0))
    torch.testing.assert_close(
        z, torch.tensor([9900.0, 10100.0, 9900.0, 10100.0]), rtol=1e-6, atol=0
    )


@every_implementation
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.kind == "mixture_cdf"]
)
def test_inverse_is_bracketed_over_the_whole_domain(run, name, dtype):
    """u lies between the transforms of z's neighbours, whatever the mixture."""
    case, info = CASES[name], torch.finfo(dtype)
    count, rounds = (40, 2) if run.is_slow else (300, 6)
    for seed in range(rounds):
        u, *parameters = draw_wild(case, count, dtype, seed, limit=30)
        z = run("mixture_cdf_inverse", u, *parameters)
        candidates = parameters[1] + torch.exp(parameters[2]) * u[:, None]
        width = 2 * info.eps * z.abs() + 2 * info.eps**2 * (
            candidates.amax(-1) - candidates.amin(-1)
        )
        lower, upper = (run("mixture_cdf", z + sign * width, *parameters)[0] for sign in (-1, 1))
        rounding = 4 * info.eps * (1 + u.abs())
        assert (lower <= u + rounding).all() and (u <= upper + rounding).all()


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("name", "suffix"), OPS)
def test_gradcheck_of_every_subset_of_arguments(run, name, suffix):
    case = CASES[name]
    tensors = draw(case, (2,), seed=8)
    for pattern in itertools.product([False, True], repeat=len(tensors)):
        if any(pattern):
            inputs = [
                x.clone().requires_grad_(needed) for x, needed in zip(tensors, pattern, strict=True)
            ]
            fast = not all(pattern)
            assert torch.autograd.gradcheck(
                lambda *x: run(case.kind + suffix, *x), inputs, fast_mode=fast
            )

    outputs = run(case.kind + suffix, *tensors)
    assert not any(x.requires_grad for x in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("leading", [(), (1,), (127,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(("name", "suffix"), ODD_OPS)
def test_odd_shapes(run, name, suffix, leading):
    case = ODD_CASES[name]
    tensors = [x.requires_grad_() for x in draw(case, leading, seed=9)]
    outputs, gradients = with_gradients(run, case.kind + suffix, tensors)
    per_position = leading if suffix == "_log_prob" else tensors[0].shape
    assert [x.shape for x in outputs] == [per_position, leading][: len(outputs)]
    assert [x.shape for x in gradients] == [x.shape for x in tensors]

    if math.prod(leading):
        assert torch.autograd.gradcheck(
            lambda *x: run(case.kind + suffix, *x), tensors, fast_mode=True
        )
    else:
        assert not any(x.any() for x in gradients)


BROADCASTS = {  # shapes of z (2, 3, ...) and the parameters: what the documentation lets pass
    "affine": ((2, 3), (), (3,)),
    "mixture_cdf": ((2, 3), (5,), (3, 5), (2, 1, 5)),
    "mixture_rosenblatt": ((2, 3, 4), (3, 5), (5, 4), (5,)),
}


@pytest.mark.parametrize("suffix", ["", "_inverse", "_log_prob"])
@pytest.mark.parametrize("kind", BROADCASTS)
def test_broadcasting(run, kind, suffix):
    case = Case(kind, 5, 4)
    if suffix not in case.directions:
        return

    random = generator(10)
    tensors = [
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in BROADCASTS[kind]
    ]
    full = [x.expand(shape).clone() for x, shape in zip(tensors, case.shapes((2, 3)), strict=True)]
    outputs, gradients = with_gradients(run, kind + suffix, tensors)
    full_outputs, full_gradients = with_gradients(run, kind + suffix, full)
    torch.testing.assert_close(outputs, full_outputs)
    for tensor, gradient, full_gradient in zip(tensors, gradients, full_gradients, strict=True):
        torch.testing.assert_close(gradient, full_gradient.sum_to_size(tensor.shape))


@pytest.mark.parametrize(("name", "suffix"), OPS)
def test_strided_inputs(run, name, suffix):
    case = CASES[name]
    tensors = draw(case, (3, 4), seed=11)
    strided = [torch.stack([x.mT if x.ndim > 1 else x] * 2, -1)[..., 0] for x in tensors]
    strided = [x.mT if x.ndim > 1 else x for x in strided]
    assert not any(x.is_contiguous() for x in strided if x.numel() > 1)
    torch.testing.assert_close(
        with_gradients(run, case.kind + suffix, strided),
        with_gradients(run, case.kind + suffix, tensors),
    )


# ----------------------------------------------------------------------------------------- extremes


@every_implementation
@pytest.mark.parametrize(("name", "suffix"), OPS)
def test_extremes_are_finite(run, name, suffix, dtype):
    """Outputs and gradients are finite over the whole domain, corners included.

    The inverse is finite for |u| up to 30, and up to 1e4.
    """
    case = CASES[name]
    count, rounds = (40, 40) if case.kind == "mixture_rosenblatt" else (400, 6)
    if run.is_slow:
        count, rounds = (4, 2) if suffix == "_inverse" else (40, 2)

    for seed in range(rounds):
        limit = 30 if suffix == "_inverse" and seed % 2 else 1e4
        tensors = draw_wild(case, count, dtype, seed, limit)
        outputs, gradients = with_gradients(run, case.kind + suffix, tensors, seed)
        for what, x in zip(("output", "log_det"), outputs, strict=False):
            assert x.isfinite().all(), (seed, what)

        for what, x in zip(("latents", *case.parameters), gradients, strict=True):
            assert x.isfinite().all(), (seed, what)


@every_implementation
@pytest.mark.parametrize("log_scale", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize(("name", "suffix"), [op for op in OPS if CASES[op[0]].components > 1])
def test_gaps_are_finite(run, name, suffix, log_scale, dtype):
    """Between far components of equal weight, du/dz underflows in every dimension at once.

    dz/du overflows there.
    """
    case = CASES[name]
    for gap in (1, 12, 1e9) if run.is_slow else (1, 5, 8, 12, 20, 60, 1e3, 1e9):
        tensors = [torch.zeros(shape, dtype=dtype) for shape in case.shapes((3,))]
        half = min(gap * math.exp(log_scale), 1e4)
        tensors[2] += half * torch.linspace(-1, 1, case.components, dtype=dtype).reshape(
            (-1, 1) if case.kind == "mixture_rosenblatt" else (-1,)
        )
        tensors[3] += log_scale
        tensors[0][1], tensors[0][2] = 1e-3 * half, -1e-6
        for x in itertools.chain(*with_gradients(run, case.kind + suffix, tensors)):
            assert x.isfinite().all(), gap


# ------------------------------------------------------------------------------------- monotonicity

MIXTURES = {  # logits, loc, log_scale
    "overlapping": ([0.0, 1.0, -1.0], [-1.0, 0.5, 3.0], [0.0, -0.5, 0.7]),
    "staircase": ([0.0] * 9, [-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0], [-6.0] * 9),
    "two far": ([0.0, 0.0], [-20.0, 20.0], [-2.0, -2.0]),
    "spike in a plain": ([0.0, -3.0], [0.0, 1.0], [2.0, -8.0]),
    "one": ([0.0], [0.3], [0.0]),
}


@pytest.mark.parametrize("run", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("name", MIXTURES)
def test_u_never_decreases(run, name):
    """u is monotone along a dense grid, and float by float where formulas change.

    They change at the median, where the tails change places, and at |t| = 1.06.
    """
    logits, loc, log_scale = (torch.tensor(x) for x in MIXTURES[name])
    median = run("mixture_cdf_inverse", torch.zeros(1), logits, loc, log_scale)
    switch = loc[0] + torch.exp(log_scale[0]) * 1.0606602

    eps = torch.finfo(torch.float32).eps
    for center, radius in (
        (median, 60.0),
        (median, 1e-3),
        (median, 1000 * eps * (1 + abs(median.item()))),
        (switch, 1e-4),
    ):
        steps = torch.linspace(-1, 1, 4_001 if run.is_slow else 20_001, dtype=torch.float64)
        z = (center.double() + radius * steps).float().unique()
        u, _ = run("mixture_cdf", z, logits, loc, log_scale)

        # Two values may differ by the errors of both: the kernels' are within 4 units in the last
        # place each.
        units = 8 if run.implementation == "triton" else 4
        assert (u.cummax(0).values - u <= units * eps * (1 + u.abs())).all()

    far = run(
        "mixture_cdf", torch.tensor([-1e4, -1e3, -100.0, 100.0, 1e3, 1e4]), logits, loc, log_scale
    )[0]
    assert (far.diff() > 0).all()  # no saturation


# --------------------------------------------------------------------- precision, chunks, compiling


@pytest.mark.parametrize("run", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "suffix"), OPS)
def test_low_precision_is_cast_up(run, name, suffix, dtype):
    case = CASES[name]
    tensors = draw(case, (5,), dtype, seed=12)
    outputs, gradients = with_gradients(run, case.kind + suffix, tensors)
    full_outputs, full_gradients = with_gradients(
        run, case.kind + suffix, [x.float() for x in tensors]
    )
    assert all(x.dtype == torch.float32 for x in outputs) and all(
        x.dtype == dtype for x in gradients
    )
    torch.testing.assert_close(outputs, full_outputs, rtol=0, atol=0)
    rounding = torch.finfo(dtype).eps if run.is_slow else 0  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(
        gradients, [x.to(dtype) for x in full_gradients], rtol=rounding, atol=rounding
    )


@pytest.mark.parametrize(("name", "suffix"), OPS)
def test_one_double_makes_all_double(run, name, suffix):
    case = CASES[name]
    tensors = draw(case, (5,), torch.float32, seed=13)
    tensors[-1] = tensors[-1].double()
    outputs, gradients = with_gradients(run, case.kind + suffix, tensors)
    full_outputs, _ = with_gradients(run, case.kind + suffix, [x.double() for x in tensors])
    assert [x.dtype for x in gradients] == [x.dtype for x in tensors]
    torch.testing.assert_close(outputs, full_outputs, rtol=0, atol=0)


@pytest.mark.parametrize("run", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize(("name", "suffix"), OPS)
def test_autocast_changes_nothing(run, name, suffix):
    case = CASES[name]
    tensors = draw(case, (5,), torch.float32, seed=14)
    plain = with_gradients(run, case.kind + suffix, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = with_gradients(run, case.kind + suffix, tensors)

    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("kept_elements", [0, 2**10])
@pytest.mark.parametrize("chunk_elements", [1, 7 * 3 * 5, 2**17])
@pytest.mark.parametrize("suffix", ["", "_inverse", "_log_prob"])
def test_chunks_and_what_is_kept_change_nothing(monkeypatch, suffix, chunk_elements, kept_elements):
    def run(op, *tensors):
        return getattr(coupling, op)(*tensors, implementation="reference")

    tensors = draw(Case("mixture_rosenblatt", 7, 3), (4, 4), seed=15)
    whole = with_gradients(run, "mixture_rosenblatt" + suffix, tensors)
    monkeypatch.setattr(coupling_torch, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(coupling_torch, "KEPT_ELEMENTS", kept_elements)
    in_chunks = with_gradients(run, "mixture_rosenblatt" + suffix, tensors)
    torch.testing.assert_close(in_chunks, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("suffix", ["", "_inverse", "_log_prob"])
@pytest.mark.parametrize("name", ["affine", "cdf, K=2", "rosenblatt, K=2, d=3"])
def test_compiled(run, name, suffix):
    case = CASES[name]
    if suffix not in case.directions:
        return

    tensors = draw(case, (4,), seed=16)
    compiled = torch.compile(run, backend="eager")
    torch.testing.assert_close(
        with_gradients(compiled, case.kind + suffix, tensors),
        with_gradients(run, case.kind + suffix, tensors),
    )


# ------------------------------------------------------------------ logits linear in a hidden state


def draw_linear(dtype=torch.float64) -> list[Tensor]:
    """Draws z, hidden, weight, bias, mean and log_scale."""
    z, _, mean, log_scale = draw(Case("mixture_rosenblatt", 7, 3), (2, 2), seed=17)
    random = generator(18)
    shapes = ((2, 2, 4), (7, 4), (7,))
    hidden, weight, bias = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes
    )

    return [x.to(dtype) for x in (z, hidden, weight, bias, mean, log_scale)]


@pytest.mark.parametrize("max_logits", [1, 3 * 7, 2**25])
@pytest.mark.parametrize("suffix", ["", "_inverse", "_log_prob"])
@every_implementation
def test_linear_logits(run, dtype, suffix, max_logits):
    tensors = draw_linear(dtype)

    def linear(op, *tensors):
        implementation = run.implementation
        tensors = [x.to(IMPLEMENTATIONS[implementation]) for x in tensors]
        out = getattr(coupling, op)(*tensors, implementation=implementation, max_logits=max_logits)
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    def plain(op, z, hidden, weight, bias, mean, log_scale):
        return run(op, z, hidden @ weight.T + bias, mean, log_scale)

    actual = with_gradients(linear, "linear_mixture_rosenblatt" + suffix, tensors)
    expected = with_gradients(plain, "mixture_rosenblatt" + suffix, tensors)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4 if suffix == "_inverse" else 2e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_linear_logits_accumulate_in_float32():
    """Under bfloat16 autocast the weights' gradient is that of the cast factors.

    It does not depend on the number of parts that it comes in.
    """
    random = generator(19)
    n, w, k = 4096, 4, 5
    z, hidden = torch.randn(n, 2, generator=random), 1 + 0.1 * torch.randn(n, w, generator=random)
    mean, log_scale = torch.randn(k, 2, generator=random), torch.zeros(k)
    weight = torch.randn(k, w, generator=random).bfloat16().float().requires_grad_()
    hidden = hidden.bfloat16().float()
    exact = coupling.mixture_rosenblatt_log_prob(z, hidden @ weight.T, mean, log_scale).sum()
    (expected,) = torch.autograd.grad(exact, weight)

    with torch.autocast("cpu", torch.bfloat16):
        log_prob = coupling.linear_mixture_rosenblatt_log_prob(
            z, hidden, weight, torch.zeros(k), mean, log_scale, max_logits=16 * k
        )

    (actual,) = torch.autograd.grad(log_prob.sum(), weight)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0.5)


@pytest.mark.parametrize(
    "name, shape", [("hidden", (2, 4)), ("weight", (6, 4)), ("weight", (7, 3)), ("bias", (7, 1))]
)
def test_linear_logits_that_do_not_fit(name, shape):
    names = ["z", "hidden", "weight", "bias", "mean", "log_scale"]
    tensors = dict(zip(names, draw_linear(), strict=True)) | {name: torch.zeros(shape)}

    for op in ("linear_mixture_rosenblatt", "linear_mixture_rosenblatt_log_prob"):
        with pytest.raises(ValueError, match=name):
            getattr(coupling, op)(**tensors)

    with pytest.raises(ValueError, match="max_logits must be at least 1, not 0"):
        coupling.linear_mixture_rosenblatt(*draw_linear(), max_logits=0)


# ------------------------------------------------------------------------------ a vocabulary's size

VOCABULARY = """
import time, torch
def peak():  # GiB, the largest resident size so far; getrusage would begin with that of the parent
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) / 2**20
before = peak()
from tarflow_hf.modeling import coupling
K, d = 50257, 16
mean = torch.randn(K, d, requires_grad=True)
log_scale = (0.5 + 0.1 * torch.randn(K)).requires_grad_()
logits = torch.randn(256, K, requires_grad=True)
z = torch.randn(256, d)
def check(op, latents, backward=True):
    n, start = len(latents), time.perf_counter()
    out = getattr(coupling, op)(latents, logits[:n], mean, log_scale)
    out = out if isinstance(out, tuple) else (out,)
    middle = time.perf_counter()
    gradients = torch.autograd.grad([x.sum() for x in out], [logits, mean, log_scale]) if backward else ()
    end = time.perf_counter()
    assert all(x.isfinite().all() for x in (*out, *gradients))
    print(f"{op}, {n}: {middle - start:.1f} s, backward {end - middle:.1f} s, peak {peak() - before:.2f} GiB")
    return [x.detach() for x in out]
(log_prob,) = check("mixture_rosenblatt_log_prob", z)
u, log_det = check("mixture_rosenblatt", z[:64], backward=False)
torch.testing.assert_close(log_det - 0.5 * u.square().sum(-1) - 8 * 1.8378770664093453, log_prob[:64])
check("mixture_rosenblatt", z[:16])
(back,) = check("mixture_rosenblatt_inverse", u[:4])
torch.testing.assert_close(back, z[:4], rtol=1e-5, atol=1e-5)
assert peak() - before < 0.7, peak() - before
"""


def test_a_large_vocabulary_fits_into_memory():
    """256 positions over K = 50,257 and d = 16 stay within 0.7 GiB, inputs included.

    The limit counts all that a process grows by after `import torch`. It leaves room for a few tensors
    of (256, K) beside the logits and their gradient, and none for one of (256, K, d): 0.8 GiB.
    u, its gradient and the inverse go through one position at a time, too, here on fewer of them.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_WAIT_POLICY": "passive",
    }
    result = subprocess.run(
        [sys.executable, "-c", VOCABULARY], env=environment, capture_output=True, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


# ---------------------------------------------------------------------------------------- bad input

AFFINE = {"z": (3,), "loc": (3,), "log_scale": (3,)}
CDF = {"z": (3,), "logits": (3, 2), "loc": (3, 2), "log_scale": (3, 2)}
ROSENBLATT = {"z": (3, 4), "logits": (3, 2), "mean": (2, 4), "log_scale": (2,)}

BAD_INPUT = {  # name: op, arguments (a shape, or the thing itself), error, what its message must name
    "loc of another size": ("affine", {**AFFINE, "loc": (4,)}, ValueError, "loc"),
    "loc with more dimensions": ("affine", {**AFFINE, "loc": (1, 3)}, ValueError, "loc"),
    "components differ": ("mixture_cdf", {**CDF, "loc": (3, 5)}, ValueError, "loc"),
    "one component for all": ("mixture_cdf", {**CDF, "log_scale": (3, 1)}, ValueError, "log_scale"),
    "no components": (
        "mixture_cdf",
        {**CDF, "logits": (3, 0), "loc": (3, 0), "log_scale": (3, 0)},
        ValueError,
        "K >= 1",
    ),
    "logits a scalar": ("mixture_cdf", {**CDF, "logits": ()}, ValueError, "logits"),
    "positions differ": ("mixture_cdf", {**CDF, "logits": (5, 2)}, ValueError, "logits"),
    "more positions than z": ("mixture_cdf", {**CDF, "logits": (2, 3, 2)}, ValueError, "logits"),
    "vectors of another size": (
        "mixture_rosenblatt",
        {**ROSENBLATT, "z": (3, 5)},
        ValueError,
        "mean",
    ),
    "z a scalar": ("mixture_rosenblatt", {**ROSENBLATT, "z": ()}, ValueError, "z must"),
    "mean of each position": (
        "mixture_rosenblatt",
        {**ROSENBLATT, "mean": (3, 2, 4)},
        ValueError,
        "mean",
    ),
    "no codes": (
        "mixture_rosenblatt",
        {**ROSENBLATT, "logits": (3, 0), "mean": (0, 4), "log_scale": (0,)},
        ValueError,
        "K >= 1",
    ),
    "no dimensions": (
        "mixture_rosenblatt",
        {**ROSENBLATT, "z": (3, 0), "mean": (2, 0)},
        ValueError,
        "d >= 1",
    ),
    "logits of other codes": (
        "mixture_rosenblatt",
        {**ROSENBLATT, "logits": (3, 5)},
        ValueError,
        "logits",
    ),
    "log_scale of each dimension": (
        "mixture_rosenblatt",
        {**ROSENBLATT, "log_scale": (2, 4)},
        ValueError,
        "log_scale",
    ),
    "logits of other positions": (
        "mixture_rosenblatt",
        {**ROSENBLATT, "logits": (5, 2)},
        ValueError,
        "logits",
    ),
}


for _op, _arguments in (
    ("affine", AFFINE),
    ("mixture_cdf", CDF),
    ("mixture_rosenblatt", ROSENBLATT),
):
    for _name, _shape in _arguments.items():
        for _kind, _value, _error in (
            ("an integer", torch.zeros(_shape, dtype=torch.long), TypeError),
            ("complex", torch.zeros(_shape, dtype=torch.complex64), TypeError),
            ("a list", [0.0], TypeError),
            ("on another device", torch.zeros(_shape, device="meta"), ValueError),
        ):
            BAD_INPUT[f"{_op}: {_name} {_kind}"] = (
                _op,
                {**_arguments, _name: _value},
                _error,
                _name,
            )


@pytest.mark.parametrize("suffix", ["", "_inverse", "_log_prob"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, suffix):
    op, arguments, error, message = BAD_INPUT[name]
    if op + suffix == "affine_log_prob":
        return

    arguments = {
        name: torch.zeros(x) if isinstance(x, tuple) else x for name, x in arguments.items()
    }

    if suffix == "_inverse":
        arguments = {{"z": "u"}.get(name, name): x for name, x in arguments.items()}
        message = {"z": "u", "z must": "u must"}.get(message, message)

    with pytest.raises(error, match=message):
        getattr(coupling, op + suffix)(**arguments)


@pytest.mark.parametrize(("name", "suffix"), OPS)
def test_unknown_implementation(name, suffix):
    case = CASES[name]
    with pytest.raises(ValueError, match="not 'fast'"):
        getattr(coupling, case.kind + suffix)(*draw(case), implementation="fast")

    torch.testing.assert_close(
        getattr(coupling, case.kind + suffix)(*draw(case), implementation="auto"),
        getattr(coupling, case.kind + suffix)(*draw(case)),
    )


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", ["logits", "loc", "log_scale"])
def test_nan_in_a_parameter_is_nan_in_the_inverse(name, implementation):
    u = torch.randn(2)
    parameters = {key: torch.zeros(2, 3) for key in ("logits", "loc", "log_scale")}
    parameters[name][1, 2] = torch.nan
    z = coupling.mixture_cdf_inverse(u, **parameters, implementation=implementation)
    assert z.isnan().tolist() == [False, True]

    logits = parameters["logits"]
    z = coupling.mixture_rosenblatt_inverse(
        u[:, None].expand(2, 4),
        logits,
        torch.zeros(3, 4),
        torch.zeros(3),
        implementation=implementation,
    )
    assert z.isnan().any(-1).tolist() == [False, name == "logits"]
