"""The Triton kernels against the reference.

Against float64 they may err as much as the reference does, plus a little. They run on a GPU if
there is one, otherwise in Triton's interpreter (see conftest.py). They pass the tests of
`test_couplings.py`, too.
"""

import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from tarflow_hf.modeling import coupling, mixture_cdf_triton, mixture_rosenblatt_triton
from tarflow_hf.modeling.coupling_torch import (
    AutoregressiveNetwork,
    autoregressive_mixture_parameters,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
KINDS = ["mixture_cdf", "mixture_rosenblatt"]
SUFFIXES = ["", "_inverse", "_log_prob"]


def draw(kind, num_rows, num_components, latent_size=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "mixture_cdf":
        shape = (num_rows, num_components)
        tensors = [
            3 * normal(num_rows),
            2 * normal(*shape),
            2 * normal(*shape),
            0.6 * normal(*shape),
        ]
    else:
        codebook = [2 * normal(num_components, latent_size), 0.6 * normal(num_components)]
        tensors = [
            2 * normal(num_rows, latent_size),
            2 * normal(num_rows, num_components),
            *codebook,
        ]

    return [x.to(DEVICE, dtype) for x in tensors]


def run(op, tensors, implementation, wanted=(0, 1, 2, 3)):
    """Returns outputs, and gradients of a fixed random functional to the wanted arguments."""
    leaves = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    out = getattr(coupling, op)(*leaves, implementation=implementation)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in out]
    # Autograd gives a kernel cotangents of any strides.
    cotangents = [x.mT.contiguous().mT if x.dim() == 2 else x for x in cotangents]
    gradients = torch.autograd.grad(
        out, [leaf for leaf in leaves if leaf.requires_grad], cotangents
    )

    return [x.detach() for x in out] + list(gradients)


def error(actual, expected):
    return (
        ((actual.double() - expected).abs() / (1 + expected.abs())).max().item()
        if expected.numel()
        else 0.0
    )


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fills empty tensors with NaN, so that a value that no kernel writes is seen."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args, plain=plain, **options):
            out = plain(*args, **options)
            return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(2**30)

        for module in (mixture_cdf_triton, mixture_rosenblatt_triton):
            monkeypatch.setattr(module.torch, name, poisoned)


SHAPES = [  # kind, N, K, d
    *[
        ("mixture_cdf", n, k, 1)
        for n, k in [(1, 1), (1, 256), (127, 1), (127, 3), (127, 65), (1025, 1), (1025, 5)]
    ],
    *[
        ("mixture_rosenblatt", n, k, d)
        for n, k, d in [(1, 1, 1), (1, 3, 5), (127, 3, 2), (33, 65, 3), (17, 200, 2)]
    ],
    ("mixture_rosenblatt", 1025, 3, 1),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("kind", "num_rows", "num_components", "latent_size"), SHAPES)
def test_as_exact_as_the_reference(kind, suffix, num_rows, num_components, latent_size):
    if suffix == "_inverse" and kind == "mixture_rosenblatt" and DEVICE == "cpu":
        num_rows = min(num_rows, 17)  # a program for each row: slow in the interpreter

    tensors = draw(kind, num_rows, num_components, latent_size, seed=num_rows + num_components)
    exact = run(kind + suffix, [x.double() for x in tensors], "reference")

    # In log_det's gradient terms as large as u^2 cancel: as many last places are lost, in either
    # implementation.
    size = 1 + max(x.square().max() for x in (exact[0], tensors[0])).item() if suffix == "" else 1

    reference, actual = (run(kind + suffix, tensors, name) for name in ("reference", "triton"))
    for expected, r, a in zip(exact, reference, actual, strict=True):
        assert a.shape == expected.shape and a.isfinite().all()
        assert error(a, expected) <= 3 * error(r, expected) + 16 * EPS * size


def test_normal_functions_within_four_units_in_the_last_place():
    """One component of mean 0 and scale 1 is the identity.

    Its tails are those of the normal, on [-30, 30].
    """
    z = torch.linspace(-30, 30, 1201, device=DEVICE)
    zero = torch.zeros(1201, 1, device=DEVICE)
    u, log_det = coupling.mixture_cdf(z, zero, zero, zero, implementation="triton")
    torch.testing.assert_close(u, z, rtol=4 * EPS, atol=4 * EPS)
    assert log_det.abs().max() <= 4 * EPS
    u, log_det = coupling.mixture_rosenblatt(
        z[:, None], zero, zero[:1], zero[0, :1], implementation="triton"
    )
    torch.testing.assert_close(u[:, 0], z, rtol=4 * EPS, atol=4 * EPS)
    assert log_det.abs().max() <= 4 * EPS * 30


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 3), (0, 2)])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_partial_gradients(kind, suffix, wanted):
    tensors = draw(kind, 5, 3)
    whole = run(kind + suffix, tensors, "triton")[-4:]
    some = run(kind + suffix, tensors, "triton", wanted)[-len(wanted) :]
    assert all(torch.equal(gradient, whole[i]) for i, gradient in zip(wanted, some, strict=True))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_every_time(kind, suffix):
    tensors = draw(kind, 3 if suffix == "_inverse" else 20, 9)
    first, again = (run(kind + suffix, tensors, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_non_contiguous_broadcast_and_empty():
    z, logits, loc, log_scale = draw("mixture_cdf", 12, 4)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (z, logits, loc, log_scale)]
    expected = coupling.mixture_cdf(z, logits, loc, log_scale, implementation="triton")
    for a, e in zip(coupling.mixture_cdf(*strided, implementation="triton"), expected, strict=True):
        assert torch.equal(a, e)

    shared = coupling.mixture_cdf(
        z.reshape(3, 4), logits[0], loc[0], log_scale[0], implementation="triton"
    )[0]
    torch.testing.assert_close(
        shared, coupling.mixture_cdf(z.reshape(3, 4), logits[0], loc[0], log_scale[0])[0]
    )
    empty = coupling.mixture_cdf(z[:0], logits[:0], loc[:0], log_scale[:0], implementation="triton")
    assert empty[0].shape == (0,)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_logits_of_any_stride(suffix):
    """The kernels read transposed and expanded logits in place."""
    op = getattr(coupling, "mixture_rosenblatt" + suffix)
    z, logits, mean, log_scale = draw("mixture_rosenblatt", 2, 4)
    for strided in (logits.T.contiguous().T, logits[:1, :1].expand(2, 4), logits[:1].expand(2, 4)):
        tensors = [z, strided, mean, log_scale]
        actual = op(*tensors, implementation="triton")
        tensors[1] = strided.contiguous()
        expected = op(*tensors, implementation="triton")
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    empty = getattr(coupling, "mixture_rosenblatt" + suffix)(
        z[:0], logits[:0], mean, log_scale, implementation="triton"
    )
    assert len(empty[0] if isinstance(empty, tuple) else empty) == 0


def test_a_backward_pass_in_parts(monkeypatch):
    tensors = draw("mixture_rosenblatt", 50, 70)
    whole = run("mixture_rosenblatt", tensors, "triton")
    monkeypatch.setattr(mixture_rosenblatt_triton, "MAX_PARTIAL_SUMS", 1)
    torch.testing.assert_close(
        run("mixture_rosenblatt", tensors, "triton"), whole, rtol=1e-5, atol=1e-6
    )


def test_the_inverse_drops_what_cannot_matter():
    """Components out of reach are dropped, among weights from 1 to e^-300.

    z is that of the whole mixture in float64.
    """
    u, logits, mean, log_scale = draw("mixture_rosenblatt", 12, 130, latent_size=3)
    logits = -300 * torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    u = torch.cat([u[:6], 10 * u[6:]])
    actual = coupling.mixture_rosenblatt_inverse(
        u, logits, mean, log_scale, implementation="triton"
    )
    exact = coupling.mixture_rosenblatt_inverse(*(x.double() for x in (u, logits, mean, log_scale)))
    reference = coupling.mixture_rosenblatt_inverse(
        u, logits, mean, log_scale, implementation="reference"
    )
    assert error(actual, exact) <= 3 * error(reference, exact) + 16 * EPS


def test_bad_codes_among_the_logits():
    """Components that are ruled out have weight 0 and no gradient."""
    tensors = draw("mixture_rosenblatt", 5, 6)
    tensors[1][:, 2:4] = -torch.inf
    actual = run("mixture_rosenblatt", tensors, "triton")
    less = [tensors[0], *(x[[0, 1, 4, 5]] for x in (tensors[1].T, *tensors[2:]))]
    less[1] = less[1].T
    torch.testing.assert_close(actual[:2], run("mixture_rosenblatt", less, "triton")[:2])
    assert not actual[3][:, 2:4].any() and all(x.isfinite().all() for x in actual)


def draw_network(size, num_features, hidden, num_components, num_rows=3):
    """Draws u, from_context and the weights of a dimension-wise autoregressive network."""
    generator = torch.Generator().manual_seed(size)
    triangle = num_features * (size * (size - 1) // 2)
    shapes = [(num_rows, size), (num_rows, size, hidden)]
    shapes += [(size - 1, num_features, 3), (size - 1, num_features), (hidden, triangle)]
    shapes += [(size, 3 * num_components, hidden), (size, 3 * num_components)]
    u, context, *weights = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    weights[2], weights[3] = weights[2] / hidden**0.5, weights[3] / hidden**0.5

    return u, context, weights


@pytest.mark.parametrize(
    "size, num_features, hidden, num_components", [(1, 3, 4, 1), (3, 5, 6, 3), (4, 1, 16, 65)]
)
def test_the_autoregressive_inverse_in_one_launch(size, num_features, hidden, num_components):
    u, context, weights = draw_network(size, num_features, hidden, num_components)

    def invert(implementation, dtype):
        network = AutoregressiveNetwork(*(x.to(dtype) for x in weights), 10.0)
        return coupling.autoregressive_mixture_cdf_inverse(
            u.to(dtype), context.to(dtype), network, implementation=implementation
        )

    exact, reference = (invert("reference", dtype) for dtype in (torch.float64, torch.float32))
    actual = invert("triton", torch.float32)
    assert error(actual, exact) <= 3 * error(reference, exact) + 32 * EPS

    # Dimension by dimension as the parameters of all say at once.
    network = AutoregressiveNetwork(*(x.double() for x in weights), 10.0)
    parameters = autoregressive_mixture_parameters(exact, context.double(), network)
    torch.testing.assert_close(
        coupling.mixture_cdf(exact, *parameters)[0], u.double(), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_the_autoregressive_inverse_of_any_leading_shape(shape):
    u, context, weights = draw_network(3, 5, 6, 3, num_rows=6)
    network = AutoregressiveNetwork(*weights, 10.0)
    num_rows = torch.Size(shape).numel()
    expected, actual = (
        coupling.autoregressive_mixture_cdf_inverse(
            u[:num_rows].reshape(*shape, 3),
            context[:num_rows].reshape(*shape, 3, 6),
            network,
            implementation=implementation,
        )
        for implementation in ("reference", "triton")
    )
    assert actual.shape == expected.shape == (*shape, 3)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_autoregressive_inverse_refuses():
    u, context, weights = draw_network(3, 2, 4, 5)
    for i, name in enumerate(AutoregressiveNetwork._fields[:-1]):
        bad = list(weights)
        bad[i] = bad[i][..., :-1]

        with pytest.raises(ValueError, match=name):
            coupling.autoregressive_mixture_cdf_inverse(
                u, context, AutoregressiveNetwork(*bad, 10.0)
            )

    network = AutoregressiveNetwork(*weights, 10.0)
    with pytest.raises(ValueError, match="u, from_context"):
        coupling.autoregressive_mixture_cdf_inverse(u[:, :2], context, network)

    with pytest.raises(ValueError, match="no gradients"):
        coupling.autoregressive_mixture_cdf_inverse(
            u.requires_grad_(), context, network, implementation="triton"
        )


def test_what_auto_takes(monkeypatch):
    """ "auto" takes the kernels for tensors on a GPU, and the reference on a CPU.

    It takes no kernels if asked for none.
    """

    class OnGPU:
        device, dtype, shape = torch.device("cuda"), torch.float32, (2, 3)

    runs_on_triton = coupling._runs_on_triton
    assert runs_on_triton("auto", OnGPU, OnGPU) and not runs_on_triton("reference", OnGPU, OnGPU)
    assert not runs_on_triton("auto", torch.zeros(2), torch.zeros(2, 3))
    monkeypatch.setattr(coupling, "AUTO_TAKES_KERNELS", False)
    assert not runs_on_triton("auto", OnGPU, OnGPU) and runs_on_triton("triton", OnGPU, OnGPU)


def test_where_the_kernels_cannot_run(monkeypatch):
    tensors = draw("mixture_cdf", 2, 3)
    with pytest.raises(ValueError, match="float64"):
        coupling.mixture_cdf(*(x.double() for x in tensors), implementation="triton")

    with pytest.raises(ValueError, match="at most 256 components, not 257"):
        coupling.mixture_cdf(*draw("mixture_cdf", 2, 257), implementation="triton")

    affine = [tensors[0]] * 3
    with pytest.raises(ValueError, match="float64"):
        coupling.affine(*(x.double() for x in affine), implementation="triton")

    monkeypatch.setattr(coupling, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a GPU, not on cpu"):
        coupling.mixture_cdf(*(x.cpu() for x in tensors), implementation="triton")
    for op in (coupling.affine, coupling.affine_inverse):
        with pytest.raises(ValueError, match="needs tensors on a GPU, not on cpu"):
            op(*(x.cpu() for x in affine), implementation="triton")

    monkeypatch.setattr(coupling, "triton", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        coupling.mixture_rosenblatt(*draw("mixture_rosenblatt", 2, 3), implementation="triton")


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_kernels_compile_for_a_gpu(architecture, tmp_path):
    """The compiler, which needs no GPU, is stricter than the interpreter."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests/helpers/compile_kernels.py"), architecture]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 12


# ----------------------------------------------------------------------------------- on a GPU alone

on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@on_a_gpu
def test_more_than_2_to_the_31_parameters():
    """Offsets are 64 bits wide.

    The last rows come out as they do on their own.
    """
    n, k = 2**25 + 5, 64
    tensors = [
        torch.zeros(n, device=DEVICE),
        *(torch.zeros(n, k, dtype=torch.bfloat16, device=DEVICE) for _ in "123"),
    ]
    tail = draw("mixture_cdf", 9, k)
    for x, y in zip(tensors, tail, strict=True):
        x[-9:] = y

    tail = [x[-9:].clone() for x in tensors]
    for op in ("mixture_cdf_log_prob", "mixture_cdf_inverse"):
        actual, expected = (
            getattr(coupling, op)(*x, implementation="triton") for x in (tensors, tail)
        )
        torch.testing.assert_close(actual[-9:], expected, rtol=0, atol=0)

    del tensors
    n, k = 2**31 // 50_257 + 20, 50_257
    z, logits, mean, log_scale = draw("mixture_rosenblatt", 9, k, latent_size=3)
    many = torch.zeros(n, k, dtype=torch.bfloat16, device=DEVICE)
    many[-9:] = logits
    all_z = torch.cat([torch.zeros(n - 9, 3, device=DEVICE), z])
    actual, expected = (
        coupling.mixture_rosenblatt(*x, mean, log_scale, implementation="triton")[0]
        for x in ((all_z, many), (z, many[-9:]))
    )
    torch.testing.assert_close(actual[-9:], expected, rtol=0, atol=0)


@on_a_gpu
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_the_kernels_also_when_compiled(kind, suffix):
    tensors = draw(kind, 50, 9)
    expected = run(kind + suffix, tensors, "triton")
    for a, e in zip(run(kind + suffix, tensors, "auto"), expected, strict=True):
        assert torch.equal(a, e)

    op = getattr(coupling, kind + suffix)
    with torch.autocast("cuda", torch.bfloat16):
        actual = torch.compile(lambda *x: op(*x))(*tensors)

    actual = actual if isinstance(actual, tuple) else (actual,)
    for a, e in zip(actual, expected, strict=False):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
