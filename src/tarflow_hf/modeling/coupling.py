"""The couplings: invertible maps of one position's latents to standard normal noise.

Each op stands next to its inverse. It takes plain tensors with any leading shape, checks them, and
computes in float32 or better: bfloat16 and float16 arguments are cast up, and results are float32
(float64 if any argument is). Gradients flow to every argument, through the inverses too, by the
implicit function theorem. Nothing here runs in low precision under autocast.

`implementation` says what computes:

- "reference" is plain PyTorch, `coupling_torch.py`, and runs anywhere.
- "triton" stands for kernels of the mixture couplings, in float32 on a GPU. The affine coupling has
  nothing to fuse: where kernels can run, PyTorch computes it element by element.
- "auto" takes the kernels for tensors on a GPU if they can run. For the mixture couplings on a CPU
  `coupling_cpu.py` chooses. Otherwise it takes the reference.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425.

    Rosenblatt, *Remarks on a Multivariate Transformation*, Annals of Mathematical Statistics 23(3),
    1952.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .coupling_cpu import mixture_cdf_inverse as mixture_cdf_inverse_cpu
from .coupling_cpu import mixture_rosenblatt as mixture_rosenblatt_cpu
from .coupling_cpu import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_cpu
from .coupling_cpu import mixture_rosenblatt_log_prob as mixture_rosenblatt_log_prob_cpu
from .coupling_linear import with_linear_logits
from .coupling_torch import AutoregressiveNetwork
from .coupling_torch import affine as affine_torch
from .coupling_torch import affine_inverse as affine_inverse_torch
from .coupling_torch import autoregressive_mixture_cdf_inverse as autoregressive_inverse_torch
from .coupling_torch import mixture_cdf as mixture_cdf_torch
from .coupling_torch import mixture_cdf_inverse as mixture_cdf_inverse_torch
from .coupling_torch import mixture_cdf_log_prob as mixture_cdf_log_prob_torch
from .coupling_torch import mixture_rosenblatt as mixture_rosenblatt_torch
from .coupling_torch import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_torch
from .coupling_torch import mixture_rosenblatt_log_prob as mixture_rosenblatt_log_prob_torch
from .mixture_cdf_triton import MAX_COMPONENTS
from .mixture_cdf_triton import autoregressive_mixture_cdf_inverse as autoregressive_inverse_triton
from .mixture_cdf_triton import mixture_cdf as mixture_cdf_triton
from .mixture_cdf_triton import mixture_cdf_inverse as mixture_cdf_inverse_triton
from .mixture_cdf_triton import mixture_cdf_log_prob as mixture_cdf_log_prob_triton
from .mixture_rosenblatt_triton import mixture_rosenblatt as mixture_rosenblatt_triton
from .mixture_rosenblatt_triton import mixture_rosenblatt_inverse as rosenblatt_inverse_triton
from .mixture_rosenblatt_triton import mixture_rosenblatt_log_prob as rosenblatt_log_prob_triton
from .normal_triton import IS_INTERPRETED, triton

# What "auto" does on a GPU. Set it to False to compute everything there in plain PyTorch.
AUTO_TAKES_KERNELS = True


class _Implementations(NamedTuple):
    """The functions that compute one op, on tensors that are checked and broadcast."""

    reference: Callable
    kernel: Callable
    cpu: Callable | None = None  # what "auto" takes on a CPU


# ------------------------------------------------------------------------------------------- affine


def affine(
    z: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Affine coupling, `u = (z - loc) exp(-log_scale)`, element by element.

    Args:
        z: Latents, any shape.
        loc, log_scale: Parameters, broadcastable to the shape of `z`.
        implementation: "auto", "reference" or "triton". All of them compute the same in PyTorch,
            since there is nothing to fuse; "triton" asks in addition that kernels could run.

    Returns:
        `u` and the `log_det` of **each element**, `log du/dz = -log_scale` in nats, both of the
        shape of `z`.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not fit together.
        ValueError: If `implementation` is not one of those above, or is "triton" and cannot run.

    Example:
        >>> affine(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        (tensor([2.]), tensor([-0.]))
    """
    return affine_torch(*_prepare_affine(implementation, z=z, loc=loc, log_scale=log_scale))


def affine_inverse(
    u: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of `affine`, `z = loc + exp(log_scale) u`.

    Takes the arguments of `affine` with noise `u` in place of `z`, raises the same errors, and
    returns only `z`.

    Example:
        >>> affine_inverse(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([3.])
    """
    return affine_inverse_torch(*_prepare_affine(implementation, u=u, loc=loc, log_scale=log_scale))


# -------------------------------------------------------------------------------------- mixture CDF


MIXTURE_CDF = _Implementations(reference=mixture_cdf_torch, kernel=mixture_cdf_triton)
MIXTURE_CDF_INVERSE = _Implementations(
    reference=mixture_cdf_inverse_torch,
    kernel=mixture_cdf_inverse_triton,
    cpu=mixture_cdf_inverse_cpu,
)
MIXTURE_CDF_LOG_PROB = _Implementations(
    reference=mixture_cdf_log_prob_torch, kernel=mixture_cdf_log_prob_triton
)


def mixture_cdf(
    z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mixture-CDF coupling ("Mix-1") of scalars, `u = Phi^-1(sum_k pi_k Phi((z - m_k) exp(-s_k)))`.

    Both tails are kept in log space: u neither saturates nor decreases in z.

    Args:
        z: Latents, shape (...).
        logits: Unnormalised log-weights of the K components, shape (..., K); pi = softmax(logits).
        loc, log_scale: Means m_k and log standard deviations s_k, shape (..., K).
        implementation: "auto", "reference" or "triton".

    Returns:
        `u` (...) and `log_det` (...), `log du/dz = log p_mix(z) - log phi(u)` in nats.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not fit together.
        ValueError: If `implementation` is not one of those above, or is "triton" and cannot run.

    Example:
        >>> z, loc = torch.tensor([0.5]), torch.tensor([[-1.0, 1.0]])
        >>> mixture_cdf(z, torch.zeros(1, 2), loc, torch.zeros(1, 2))
        (tensor([0.3078]), tensor([-0.4575]))
    """
    return _run_mixture_cdf(MIXTURE_CDF, implementation, "z", z, logits, loc, log_scale)


def mixture_cdf_inverse(
    u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of `mixture_cdf`, by Newton steps in u that are safeguarded by bisection.

    Takes the arguments of `mixture_cdf` with noise `u` in place of `z`, raises the same errors, and
    returns only `z`.

    The root lies between the minimum and the maximum of `m_k + exp(s_k) u` over k. If u falls into
    a gap between components, dz/du can exceed the dtype's range: it saturates.

    Example:
        >>> u, loc = torch.tensor([0.3078]), torch.tensor([[-1.0, 1.0]])
        >>> mixture_cdf_inverse(u, torch.zeros(1, 2), loc, torch.zeros(1, 2)).round(decimals=3)
        tensor([0.5000])
    """
    z = _run_mixture_cdf(MIXTURE_CDF_INVERSE, implementation, "u", u, logits, loc, log_scale)
    return _with_nan(z, logits + loc + log_scale)


def mixture_cdf_log_prob(
    z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Log-density `log p_mix(z)` (...) in nats, without a distribution function.

    Takes the arguments of `mixture_cdf` and raises the same errors. Equals its `log_det` plus
    `log phi(u)`, which is all that a likelihood needs of the last flow of a stack.

    Example:
        >>> mixture_cdf_log_prob(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([-0.9189])
    """
    return _run_mixture_cdf(MIXTURE_CDF_LOG_PROB, implementation, "z", z, logits, loc, log_scale)


def autoregressive_mixture_cdf_inverse(
    u: Tensor, from_context: Tensor, network: AutoregressiveNetwork, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of the mixture-CDF coupling whose parameters depend on the dimensions before.

    `z_i = mixture_cdf_inverse(u_i; network(from_context_i, z_<i))` for i = 0, ..., D - 1. As a
    kernel all D steps of a position are one launch. It has no gradients: if these are needed,
    "auto" takes the reference.

    Args:
        u: Noise, shape (..., D).
        from_context: The context's part of each dimension's hidden units, shape (..., D, H).
        network: Weights of the dimensions' networks.
        implementation: "auto", "reference" or "triton".

    Returns:
        Latents z (..., D), float32 or better.

    Raises:
        TypeError: If a tensor is not floating point.
        ValueError: If shapes or devices do not fit together.
        ValueError: If `implementation` is not one of those above, or is "triton" and cannot run or
            needs gradients.

    Example:
        >>> from tarflow_hf.modeling.coupling_torch import AutoregressiveNetwork, autoregressive_mixture_parameters
        >>> shapes = {"features_weight": (1, 2, 3), "features_bias": (1, 2), "from_features": (4, 2)}
        >>> shapes |= {"output_weight": (2, 9, 4), "output_bias": (2, 9)}
        >>> weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        >>> network = AutoregressiveNetwork(**weights, max_log_scale=10.0)
        >>> u, from_context = torch.randn(5, 2), torch.randn(5, 2, 4)
        >>> z = autoregressive_mixture_cdf_inverse(u, from_context, network)
        >>> parameters = autoregressive_mixture_parameters(z, from_context, network)
        >>> torch.allclose(mixture_cdf(z, *parameters)[0], u, atol=1e-4)
        True
    """
    tensors = (u, from_context, *network[:-1])
    _check_network(u, from_context, network)

    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if needs_gradients and implementation == "triton":
        raise ValueError(
            'implementation="triton" cannot run: this inverse\'s kernel has no gradients.'
        )

    num_components = network.output_bias.shape[-1] // 3
    takes_kernel = _runs_on_triton(implementation, *tensors, num_components=num_components)
    if takes_kernel and not needs_gradients:
        rows = u.reshape(-1, u.shape[-1]), from_context.reshape(-1, *from_context.shape[-2:])
        return autoregressive_inverse_triton(*rows, network).reshape(u.shape)

    u, from_context, *weights = _cast(*tensors)
    network = AutoregressiveNetwork._make([*weights, network.max_log_scale])
    if _runs_on_cpu(implementation, u):
        invert = mixture_cdf_inverse_cpu
    else:
        invert = mixture_cdf_inverse_torch

    with torch.autocast(u.device.type, enabled=False):
        return autoregressive_inverse_torch(u, from_context, network, invert)


# ------------------------------------------------------------------------------- mixture Rosenblatt


ROSENBLATT = _Implementations(
    reference=mixture_rosenblatt_torch,
    kernel=mixture_rosenblatt_triton,
    cpu=mixture_rosenblatt_cpu,
)
ROSENBLATT_INVERSE = _Implementations(
    reference=mixture_rosenblatt_inverse_torch,
    kernel=rosenblatt_inverse_triton,
    cpu=mixture_rosenblatt_inverse_cpu,
)
ROSENBLATT_LOG_PROB = _Implementations(
    reference=mixture_rosenblatt_log_prob_torch,
    kernel=rosenblatt_log_prob_triton,
    cpu=mixture_rosenblatt_log_prob_cpu,
)


def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rosenblatt coupling ("Mix-d") of d-vectors under a mixture of K isotropic Gaussians.

    With `p(z) = sum_k pi_k N(z; mean_k, exp(log_scale_k)^2 I)`, `u_i = Phi^-1(F(z_i | z_<i))`:
    dimension i is the mixture-CDF coupling with the weights `alpha_k` proportional to
    `pi_k prod_{j<i} N(z_j; mean_kj, exp(log_scale_k)^2)`.

    Args:
        z: Latents, shape (..., d).
        logits: Unnormalised log-weights, shape (..., K); pi = softmax(logits).
        mean: Means of the components, shape (K, d), shared by all positions.
        log_scale: Their log standard deviations, shape (K,).
        implementation: "auto", "reference" or "triton".

    Returns:
        `u` (..., d) and `log_det` (...), `log p(z) - sum_i log phi(u_i)` in nats.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not fit together.
        ValueError: If `implementation` is not one of those above, or is "triton" and cannot run.

    Example:
        >>> u, log_det = mixture_rosenblatt(torch.ones(1, 2), torch.zeros(1, 3), torch.zeros(3, 2), torch.zeros(3))
        >>> u.round(decimals=4), log_det.abs().round(decimals=4)
        (tensor([[1., 1.]]), tensor([0.]))
    """
    return _run_rosenblatt(ROSENBLATT, implementation, "z", z, logits, mean, log_scale)


def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of `mixture_rosenblatt`, solved dimension by dimension.

    Takes the arguments of `mixture_rosenblatt` with noise `u` in place of `z`, raises the same
    errors, and returns only `z` (..., d).

    Example:
        >>> z = mixture_rosenblatt_inverse(torch.ones(1, 2), torch.zeros(1, 3), torch.zeros(3, 2), torch.zeros(3))
        >>> z.round(decimals=4)
        tensor([[1., 1.]])
    """
    z = _run_rosenblatt(ROSENBLATT_INVERSE, implementation, "u", u, logits, mean, log_scale)
    return _with_nan(z, logits.unsqueeze(-2))


def mixture_rosenblatt_log_prob(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Log-density `log p(z)` (...) in nats, without a distribution function.

    Takes the arguments of `mixture_rosenblatt` and raises the same errors.

    Example:
        >>> mixture_rosenblatt_log_prob(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(3, 2), torch.zeros(3))
        tensor([-1.8379])
    """
    return _run_rosenblatt(ROSENBLATT_LOG_PROB, implementation, "z", z, logits, mean, log_scale)


# ----------------------------------------------- mixture Rosenblatt, logits linear in hidden states


def linear_mixture_rosenblatt(
    z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    implementation: str = "auto",
    max_logits: int = 2**26,
) -> tuple[Tensor, Tensor]:
    """`mixture_rosenblatt` with `logits = hidden @ weight.T + bias`, which never exist all at once.

    For mixtures as large as a vocabulary. The logits of some positions are made, used, thrown away,
    and made again for the backward pass. Gradients add up in float32, whatever the dtype of the
    product (autocast's, or that of its factors).

    Args:
        z: Latents, shape (..., d).
        hidden: Hidden states, shape (..., w).
        weight, bias: The projection to logits, shapes (K, w) and (K,).
        mean, log_scale: The components' means and log standard deviations, shapes (K, d) and (K,).
        implementation: "auto", "reference" or "triton".
        max_logits: The number of logits that may exist at once; 2^26 of them take 256 MiB in float32.

    Returns:
        `u` (..., d) and `log_det` (...), in nats.

    Raises:
        TypeError: If a tensor is not floating point.
        ValueError: If shapes or devices do not fit together.
        ValueError: If `implementation` is not one of those above, or is "triton" and cannot run.
        ValueError: If `max_logits` is less than 1.

    Example:
        >>> z, hidden = torch.randn(5, 2), torch.randn(5, 4)
        >>> weight, bias, mean, log_scale = torch.randn(9, 4), torch.zeros(9), torch.randn(9, 2), torch.zeros(9)
        >>> u, log_det = linear_mixture_rosenblatt(z, hidden, weight, bias, mean, log_scale, max_logits=9)
        >>> torch.allclose(u, mixture_rosenblatt(z, hidden @ weight.T, mean, log_scale)[0], atol=1e-5)
        True
    """
    op = partial(mixture_rosenblatt, implementation=implementation)
    return _run_linear(op, max_logits, "z", z, hidden, weight, bias, mean, log_scale)


def linear_mixture_rosenblatt_inverse(
    u: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    implementation: str = "auto",
    max_logits: int = 2**26,
) -> Tensor:
    """Inverse of `linear_mixture_rosenblatt`.

    Takes its arguments with noise `u` in place of `z`, raises the same errors, and returns only `z`
    (..., d).

    Example:
        >>> u, hidden = torch.ones(1, 2), torch.zeros(1, 4)
        >>> weight, bias, mean, log_scale = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 2), torch.zeros(3)
        >>> linear_mixture_rosenblatt_inverse(u, hidden, weight, bias, mean, log_scale).round(decimals=4)
        tensor([[1., 1.]])
    """
    op = partial(mixture_rosenblatt_inverse, implementation=implementation)
    return _run_linear(op, max_logits, "u", u, hidden, weight, bias, mean, log_scale)


def linear_mixture_rosenblatt_log_prob(
    z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    implementation: str = "auto",
    max_logits: int = 2**26,
) -> Tensor:
    """Log-density `log p(z)` (...) in nats, without a distribution function.

    Takes the arguments of `linear_mixture_rosenblatt` and raises the same errors.

    Example:
        >>> z, hidden = torch.zeros(1, 2), torch.zeros(1, 4)
        >>> weight, bias, mean, log_scale = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 2), torch.zeros(3)
        >>> linear_mixture_rosenblatt_log_prob(z, hidden, weight, bias, mean, log_scale)
        tensor([-1.8379])
    """
    op = partial(mixture_rosenblatt_log_prob, implementation=implementation)
    return _run_linear(op, max_logits, "z", z, hidden, weight, bias, mean, log_scale)


# ---------------------------------------------------------------------------------- checked and run


def _prepare_affine(implementation: str, **tensors: Tensor) -> list[Tensor]:
    _check(**tensors)
    _runs_on_triton(implementation, *tensors.values())  # for its errors only
    first, *parameters = _cast(*tensors.values())

    try:
        return [first, *(parameter.expand_as(first) for parameter in parameters)]
    except RuntimeError:
        raise ValueError(
            f"loc and log_scale must broadcast to the first shape of {_shapes(**tensors)}."
        ) from None


def _run_mixture_cdf(
    by: _Implementations,
    implementation: str,
    name: str,
    first: Tensor,
    logits: Tensor,
    loc: Tensor,
    log_scale: Tensor,
):
    """The op of the first tensor, which is z or u; `name` says which."""
    tensors = {name: first, "logits": logits, "loc": loc, "log_scale": log_scale}
    _check(**tensors)

    parameters = [logits, loc, log_scale]
    num_components = {parameter.shape[-1] if parameter.ndim else 0 for parameter in parameters}
    if len(num_components) > 1 or 0 in num_components:
        raise ValueError(
            f"logits, loc and log_scale need the same K >= 1 components: {_shapes(**tensors)}."
        )

    shape = (*first.shape, *num_components)
    try:
        parameters = [parameter.expand(shape) for parameter in parameters]
    except RuntimeError:
        raise ValueError(
            f"logits, loc and log_scale must broadcast to (..., K) = {shape}: {_shapes(**tensors)}."
        ) from None

    return _run(by, implementation, first, *parameters, num_components=shape[-1])


def _run_rosenblatt(
    by: _Implementations,
    implementation: str,
    name: str,
    first: Tensor,
    logits: Tensor,
    mean: Tensor,
    log_scale: Tensor,
):
    """The op of the first tensor, which is z or u; `name` says which."""
    tensors = {name: first, "logits": logits, "mean": mean, "log_scale": log_scale}
    _check(**tensors)

    if first.ndim == 0 or mean.ndim != 2 or 0 in mean.shape or mean.shape[1] != first.shape[-1]:
        raise ValueError(
            f"{name} must be (..., d) and mean (K, d), d >= 1 and K >= 1: {_shapes(**tensors)}."
        )

    num_components, latent_size = mean.shape
    if log_scale.shape != (num_components,) or logits.shape[-1:] != (num_components,):
        raise ValueError(
            f"logits must be (..., K), log_scale (K,), K = {num_components}: {_shapes(**tensors)}."
        )

    leading = first.shape[:-1]
    try:
        logits = logits.expand(*leading, num_components)
    except RuntimeError:
        raise ValueError(
            f"logits must broadcast to (..., K) = {(*leading, num_components)}: {_shapes(**tensors)}."
        ) from None

    first, logits = first.reshape(-1, latent_size), logits.reshape(-1, num_components)
    return _unflatten(_run(by, implementation, first, logits, mean, log_scale), leading)


def _run_linear(
    op: Callable,
    max_logits: int,
    name: str,
    first: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
):
    """The op of the first tensor, which is z or u, and of logits; `name` says which."""
    projection = {"hidden": hidden, "weight": weight, "bias": bias}
    tensors = {name: first, **projection, "mean": mean, "log_scale": log_scale}
    _check(**tensors)

    if max_logits < 1:
        raise ValueError(f"max_logits must be at least 1, not {max_logits}.")

    is_projection = weight.ndim == 2 and bias.shape == weight.shape[:1]
    if not is_projection or mean.ndim != 2 or len(mean) != len(weight):
        raise ValueError(f"weight must be (K, w), bias (K,) and mean (K, d): {_shapes(**tensors)}.")

    leading = first.shape[:-1]
    if hidden.shape != (*leading, weight.shape[1]):
        raise ValueError(
            f"hidden must be (..., w), with the leading shape of the first: {_shapes(**tensors)}."
        )

    first, hidden = first.reshape(-1, first.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    out = with_linear_logits(op, max_logits, first, hidden, weight, bias, mean, log_scale)

    return _unflatten(out, leading)


def _run(by: _Implementations, implementation: str, *tensors: Tensor, num_components: int = 0):
    if _runs_on_triton(implementation, *tensors, num_components=num_components):
        return by.kernel(*tensors)

    tensors = _cast(*tensors)
    if by.cpu is not None and _runs_on_cpu(implementation, tensors[0]):
        return by.cpu(*tensors)

    return by.reference(*tensors)


def _runs_on_triton(implementation: str, *tensors: Tensor, num_components: int = 0) -> bool:
    """True if the kernels should run.

    Raises:
        ValueError: If the implementation is unknown, or the kernels were asked for and cannot run.
    """
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(
            f'implementation must be "auto", "reference" or "triton", not {implementation!r}.'
        )

    reason = None
    device = tensors[0].device
    if triton is None:
        reason = "triton is not installed"
    elif device.type != "cuda" and not IS_INTERPRETED:
        reason = f"it needs tensors on a GPU, not on {device}"
    elif any(tensor.dtype == torch.float64 for tensor in tensors):
        reason = "its kernels are for float32 and less, and a tensor is float64"
    elif num_components > MAX_COMPONENTS:
        reason = f"it takes at most {MAX_COMPONENTS} components, not {num_components}"

    if implementation == "triton" and reason is not None:
        raise ValueError(f'implementation="triton" cannot run: {reason}.')

    if implementation == "auto":
        return AUTO_TAKES_KERNELS and device.type == "cuda" and reason is None
    return implementation == "triton"


def _runs_on_cpu(implementation: str, u: Tensor) -> bool:
    """True if a CPU's own form should take the tensor, which is not for kernels.

    Those forms look at the values, which a graph that is exported does not have.
    """
    is_exported = torch.compiler.is_exporting()
    return implementation == "auto" and u.device.type == "cpu" and not is_exported


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, not {kind}.")

    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"All tensors must be on one device: {devices}.")


def _check_network(u: Tensor, from_context: Tensor, network: AutoregressiveNetwork) -> None:
    weights = network._asdict()
    del weights["max_log_scale"]
    tensors = {"u": u, "from_context": from_context, **weights}
    _check(**tensors)

    size, hidden = from_context.shape[-2:] if from_context.ndim > 1 else (0, 0)
    num_features = network.features_bias.shape[-1]
    outputs = network.output_bias.shape[-1]
    expected = {
        "u": (*from_context.shape[:-2], size),
        "features_weight": (size - 1, num_features, 3),
        "features_bias": (size - 1, num_features),
        "from_features": (hidden, num_features * size * (size - 1) // 2),
        "output_weight": (size, outputs, hidden),
        "output_bias": (size, outputs),
    }

    is_empty = size == 0 or outputs == 0
    fits = all(tensors[name].shape == shape for name, shape in expected.items())
    if is_empty or outputs % 3 or not fits:
        raise ValueError(
            f"u, from_context and the network's weights do not fit together: {_shapes(**tensors)}."
        )


def _with_nan(z: Tensor, parameters: Tensor) -> Tensor:
    """z (...) of an inverse, and NaN where any of its parameters (..., K) is.

    The search for z ends at a finite number whatever it is given. Gradients are not asked: theirs
    are NaN already.
    """
    if z.requires_grad:
        return z

    return torch.add(z, parameters.detach().amax(-1).to(z.dtype), alpha=0)


def _cast(*tensors: Tensor) -> list[Tensor]:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return [tensor.to(torch.float64 if is_double else torch.float32) for tensor in tensors]


def _unflatten(out: Tensor | tuple[Tensor, ...], leading: torch.Size):
    """The results (n, ...) of positions in one row, with the leading shape of the arguments."""
    if isinstance(out, tuple):
        return tuple(x.reshape(leading + x.shape[1:]) for x in out)
    return out.reshape(leading + out.shape[1:])


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
