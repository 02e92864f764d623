"""The couplings against mpmath, plain autograd and themselves. A new coupling or size is one line of `CASES`."""

import itertools
import math
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import mpmath
import pytest
import torch
from mpmath import mpf
from test_normal import exact_log_ndtr, exact_log_prob, exact_ndtri_exp
from torch import Tensor
from torch.autograd.functional import jacobian

from tarflow_hf.modeling import coupling, coupling_reference
from tarflow_hf.modeling.normal import normal_log_prob

# Every implementation is held to every test. name: where it runs
IMPLEMENTATIONS = {"reference": "cpu"}


@dataclass(frozen=True)
class Case:
    """A coupling and its size: `components` K of the mixture; `latent_size` d of a coupling of whole vectors."""

    kind: str
    components: int = 1
    latent_size: int | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        return {
            "affine": ("loc", "log_scale"),
            "mixture_cdf": ("logits", "loc", "log_scale"),
            "mixture_rosenblatt": ("logits", "mean", "log_scale"),
        }[self.kind]

    def shapes(self, leading: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of z and of the parameters."""
        k, d = self.components, self.latent_size
        return {
            "affine": (leading,) * 3,
            "mixture_cdf": (leading, *((*leading, k),) * 3),
            "mixture_rosenblatt": ((*leading, d or 1), (*leading, k), (k, d or 1), (k,)),
        }[self.kind]

    @property
    def directions(self) -> tuple[str, ...]:
        return ("", "_inverse") if self.kind == "affine" else ("", "_inverse", "_log_prob")


CASES = {
    "affine": Case("affine"),
    "cdf, K=1": Case("mixture_cdf", 1),
    "cdf, K=2": Case("mixture_cdf", 2),
    "cdf, K=7": Case("mixture_cdf", 7),
    "rosenblatt, K=1, d=2": Case("mixture_rosenblatt", 1, 2),
    "rosenblatt, K=3, d=1": Case("mixture_rosenblatt", 3, 1),
    "rosenblatt, K=2, d=3": Case("mixture_rosenblatt", 2, 3),
    "rosenblatt, K=7, d=4": Case("mixture_rosenblatt", 7, 4),
}
ODD_CASES = {
    **CASES,
    "cdf, K=65": Case("mixture_cdf", 65),
    "rosenblatt, K=65, d=2": Case("mixture_rosenblatt", 65, 2),
}
OPS = [(name, suffix) for name, case in CASES.items() for suffix in case.directions]
ODD_OPS = [(name, suffix) for name, case in ODD_CASES.items() for suffix in case.directions]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request):
    """Calls an op of `coupling` by name on the implementation's device; arguments and results are on the CPU."""
    device = IMPLEMENTATIONS[request.param]

    def run(op: str, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = getattr(coupling, op)(*(x.to(device) for x in tensors), implementation=request.param)
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    return run


# --------------------------------------------------------------------------------------------------------------- inputs


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(case: Case, leading=(4,), dtype=torch.float64, seed=0, hardness=0.0) -> list[Tensor]:
    """z and parameters. `hardness` 0 is a mixture whose parts overlap, 1 one of far, thin and unlikely parts."""
    random = generator(seed)
    scales = {"logits": 10.0, "loc": 30.0, "mean": 30.0, "log_scale": 4.0}
    out = [3 * torch.randn(case.shapes(leading)[0], generator=random, dtype=torch.float64)]
    for name, shape in zip(case.parameters, case.shapes(leading)[1:], strict=True):
        spread = scales[name] ** hardness * (0.5 if name == "log_scale" else 1)
        out.append(spread * torch.randn(shape, generator=random, dtype=torch.float64))
    return [x.to(dtype) for x in out]


def wild(shape: tuple[int, ...], limit: float, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Magnitudes log-uniform from 1e-8 to `limit`, of both signs; a third are exactly 0 or +-limit."""
    uniform = torch.rand(shape, generator=random, dtype=torch.float64)
    magnitude = 10 ** (-8 + (8 + math.log10(limit)) * uniform)
    corner = torch.randint(12, shape, generator=random)
    magnitude = torch.where(corner < 3, limit, torch.where(corner == 3, 0.0, magnitude))
    return (magnitude * (2 * torch.randint(2, shape, generator=random) - 1)).to(dtype)


def draw_wild(case: Case, count: int, dtype: torch.dtype, seed: int, limit=1e4) -> list[Tensor]:
    """The whole domain: |z|, |logits|, |loc| up to 1e4 and log_scale in [-10, 10], often at the corners."""
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


def with_gradients(run, op: str, tensors: list[Tensor], seed=0, cotangents=None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all arguments for random cotangents."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = run(op, *tensors)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    random = generator(seed)
    cotangents = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, tensors, cotangents)
    return [x.detach() for x in outputs], list(gradients)


# ------------------------------------------------------------------- the same mathematics, exactly and by plain autograd


def exact_log_softmax(logits: list[float]) -> list[mpf]:
    logits = [mpf(x) for x in logits]
    log_sum = mpmath.log(sum(mpmath.exp(x - max(logits)) for x in logits)) + max(logits)
    return [x - log_sum for x in logits]


def exact_scalar(z, log_weight, loc, log_scale) -> tuple[mpf, mpf, list[mpf]]:
    """u, log du/dz and the components' log(pi_k N(z; m_k, s_k)) of one scalar under a mixture."""
    t = [(mpf(z) - mpf(m)) * mpmath.exp(-mpf(s)) for m, s in zip(loc, log_scale, strict=True)]
    cdf, sf = (
        sum(mpmath.exp(w + exact_log_ndtr(sign * x)) for w, x in zip(log_weight, t, strict=True)) for sign in (1, -1)
    )
    log_tail = mpmath.log(min(cdf, sf))
    guess = -float(mpmath.sqrt(-2 * log_tail))
    u = exact_ndtri_exp(log_tail, guess) * (1 if cdf <= sf else -1)
    log_joint = [w + exact_log_prob(x) - mpf(s) for w, x, s in zip(log_weight, t, log_scale, strict=True)]
    return u, mpmath.log(sum(map(mpmath.exp, log_joint))) - exact_log_prob(u), log_joint


def exact(case: Case, z, *parameters) -> tuple[list[mpf], list[mpf]]:
    """u of one position and log du_i/dz_i of each dimension, in 50 digits, of inputs taken as they are."""
    if case.kind == "affine":
        loc, log_scale = parameters
        return [(mpf(z) - mpf(loc)) * mpmath.exp(-mpf(log_scale))], [-mpf(log_scale)]
    logits, loc, log_scale = parameters
    log_weight, u, log_slope = exact_log_softmax(logits), [], []
    columns = [(z, loc)] if case.kind == "mixture_cdf" else zip(z, zip(*loc, strict=True), strict=True)
    for z_i, loc_i in columns:
        u_i, log_slope_i, log_joint = exact_scalar(z_i, log_weight, loc_i, log_scale)
        log_weight = exact_log_softmax(log_joint)
        u.append(u_i)
        log_slope.append(log_slope_i)
    return u, log_slope


def position(case: Case, tensors: list[Tensor], i: int) -> list:
    """Arguments of position i as Python numbers; the Rosenblatt coupling's components are shared by all."""
    shared = 2 if case.kind == "mixture_rosenblatt" else 0
    return [x.tolist() if n >= len(tensors) - shared else x[i].tolist() for n, x in enumerate(tensors)]


def naive(case: Case, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas as they stand in a book: exact in float64 as long as nothing is far in a tail."""
    if case.kind == "affine":
        loc, log_scale = parameters
        return (z - loc) / log_scale.exp(), -log_scale
    logits, loc, log_scale = parameters
    weight, us, log_det = logits.softmax(-1), [], 0
    vector = case.kind == "mixture_rosenblatt"
    for i in range(z.shape[-1] if vector else 1):
        z_i, loc_i = (z[..., i], loc[:, i]) if vector else (z, loc)
        t = (z_i[..., None] - loc_i) / log_scale.exp()
        u = torch.special.ndtri((weight * torch.special.ndtr(t)).sum(-1))
        joint = weight * torch.exp(normal_log_prob(t)) / log_scale.exp()
        log_det = log_det + joint.sum(-1).log() - normal_log_prob(u)
        weight = joint / joint.sum(-1, keepdim=True)
        us.append(u)
    return torch.stack(us, -1) if vector else us[0], log_det


# -------------------------------------------------------------------------------------------------------------- accuracy

# Errors of u relative to 1 + |u|. The contract is 1e-6 and 1e-11; float64 is held to what it reaches.
U_ERROR = {torch.float32: 1e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("hardness", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_mpmath(run, name, dtype, hardness):
    """u, log_det, log_prob and the inverse, for u from -30 to 30 in every dimension."""
    case, count = CASES[name], 10
    eps = torch.finfo(dtype).eps
    u_asked, *parameters = draw(case, (count,), dtype, seed=7, hardness=hardness)
    u_asked = (60 * torch.rand(u_asked.shape, generator=generator(1)) - 30).to(dtype)
    if u_asked.ndim == 2:
        u_asked[: count // 2, :-1] /= 20  # a tail after a moderate beginning
    z = run(case.kind + "_inverse", u_asked, *parameters)
    u, log_det = run(case.kind, z, *parameters)
    log_prob = run(case.kind + "_log_prob", z, *parameters) if "_log_prob" in case.directions else None
    assert u.dtype == log_det.dtype == z.dtype == dtype
    for i in range(count):
        expected_u, expected_slope = exact(case, *position(case, [z, *parameters], i))
        actual_u, actual_z, asked = ([x[i]] if x.ndim == 1 else list(x[i]) for x in (u, z, u_asked))
        for j, (a, e) in enumerate(zip(actual_u, expected_u, strict=True)):
            assert abs(a.item() - e) <= U_ERROR[dtype] * (1 + abs(e)), (i, j)
            # The inverse can do no better than z's own rounding.
            slack = 2 * eps * (1 + abs(e) + abs(actual_z[j].item()) * mpmath.exp(expected_slope[j]))
            assert abs(asked[j].item() - e) <= slack, (i, j)
        # log p is made of squares, each as exact as dtype allows: u^2/2 or (z - m)^2/2s^2, and of log-weights.
        square = sum(e * e for e in expected_u)
        expected = sum(expected_slope)
        assert abs(log_det[i].item() - expected) <= 8 * eps * (len(expected_u) + square + abs(expected)), i
        if log_prob is not None:
            expected += sum(map(exact_log_prob, expected_u))
            size = len(expected_u) + square + abs(expected) + parameters[0].abs().max().item()
            assert abs(log_prob[i].item() - expected) <= 8 * eps * size, i


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_past_far_from_every_component(run, dtype):
    """30 scales from all components their log-densities are -450 and almost equal: later weights hang on the rest."""
    case, count = Case("mixture_rosenblatt", 7, 3), 10
    random = generator(0)
    logits, mean = torch.randn(count, 7, generator=random), 0.1 * torch.randn(7, 3, generator=random)
    mean[:, -1] *= 20
    log_scale = 0.003 * torch.randn(7, generator=random)
    parameters = [x.to(dtype) for x in (logits, mean, log_scale)]
    u_asked = (60 * torch.rand(count, 3, generator=random) - 30).to(dtype)
    u_asked[:, -1] /= 10
    z = run("mixture_rosenblatt_inverse", u_asked, *parameters)
    u, _ = run("mixture_rosenblatt", z, *parameters)
    for i in range(count):
        for a, e in zip(u[i].tolist(), exact(case, *position(case, [z, *parameters], i))[0], strict=True):
            assert abs(a - e) <= U_ERROR[dtype] * (1 + abs(e)), i


@pytest.mark.parametrize("name", CASES)
def test_against_plain_autograd(run, name):
    """Outputs, and hand-derived gradients of u and log_det, against autograd through the naive formulas."""
    case = CASES[name]
    tensors = [x.requires_grad_() for x in draw(case, (50,), seed=1)]
    tensors[0] = (0.5 * tensors[0]).detach().requires_grad_()
    expected, actual = naive(case, *tensors), run(case.kind, *tensors)
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
        cotangent = torch.randn(e.shape, generator=generator(2), dtype=e.dtype)
        gradients = (torch.autograd.grad(x, tensors, cotangent, retain_graph=True, allow_unused=True) for x in (a, e))
        for parameter, a_grad, e_grad in zip(("z", *case.parameters), *gradients, strict=True):
            e_grad = torch.zeros_like(a_grad) if e_grad is None else e_grad
            a_grad = torch.zeros_like(e_grad) if a_grad is None else a_grad
            torch.testing.assert_close(a_grad, e_grad, rtol=1e-7, atol=1e-8, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_jacobian(run, name):
    """log_det is that of the autodiff Jacobian, which is lower triangular; the inverse's Jacobian is its inverse."""
    case = CASES[name]
    z, *parameters = draw(case, (4,), seed=3)
    u, log_det = run(case.kind, z, *parameters)
    d = z[0].numel()
    across = jacobian(lambda z: run(case.kind, z, *parameters)[0], z).reshape(4, d, 4, d)
    back = jacobian(lambda u: run(case.kind + "_inverse", u, *parameters), u).reshape(4, d, 4, d)
    plain = jacobian(lambda z: naive(case, z, *parameters)[0], z).reshape(4, d, 4, d)
    for i, j in itertools.product(range(4), repeat=2):
        if i != j:  # no position sees another
            assert not across[i, :, j].any() and not back[i, :, j].any()
            continue
        forward, inverse = across[i, :, i], back[i, :, i]
        torch.testing.assert_close(forward, plain[i, :, i], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(forward, forward.tril(), rtol=0, atol=0)
        torch.testing.assert_close(forward.det().log(), log_det[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(inverse @ forward, torch.eye(d, dtype=z.dtype), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "_log_prob" in case.directions])
def test_log_prob_is_log_det_plus_base(run, name):
    case = CASES[name]
    z, *parameters = draw(case, (100,), seed=4)
    u, log_det = run(case.kind, z, *parameters)
    base = normal_log_prob(u) if u.ndim == 1 else normal_log_prob(u).sum(-1)
    torch.testing.assert_close(run(case.kind + "_log_prob", z, *parameters), log_det + base, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hardness", [0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_round_trips(run, name, hardness, dtype):
    """Both ways, to what the rounding of u and z allows: |J^-1| (eps (1 + |u|) + |J| eps |z|), the same in u."""
    case, eps = CASES[name], torch.finfo(dtype).eps
    z, *parameters = draw(case, (30,), dtype, seed=5, hardness=hardness)
    u, _ = run(case.kind, z, *parameters)
    back = run(case.kind + "_inverse", u, *parameters)
    again, _ = run(case.kind, back, *parameters)
    d = z[0].numel()
    exact_z, *exact_parameters = (x.double() for x in (z, *parameters))
    diagonal = torch.arange(30)
    slope = jacobian(lambda z: run(case.kind, z, *exact_parameters)[0], exact_z).reshape(30, d, 30, d)
    slope = slope[diagonal, :, diagonal].abs()
    rounding = (eps * (1 + u.abs())).double().reshape(30, d) + (slope @ (eps * exact_z.abs()).reshape(30, d, 1))[..., 0]
    inverse_slope = torch.linalg.inv(
        jacobian(lambda z: run(case.kind, z, *exact_parameters)[0], exact_z).reshape(30, d, 30, d)[
            diagonal, :, diagonal
        ]
    ).abs()
    well = (inverse_slope.amax((-1, -2)) < 1e3) if hardness else torch.ones(30, dtype=torch.bool)
    assert well.sum() > 5
    bound = 4 * (inverse_slope @ rounding[..., None])[..., 0]
    assert ((back - z).reshape(30, d).abs() <= bound)[well].all()
    assert ((again - u).reshape(30, d).abs() <= 4 * (slope @ bound[..., None])[..., 0])[well].all()
