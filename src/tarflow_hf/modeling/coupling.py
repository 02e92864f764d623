"""The couplings: invertible maps of one position's latents to standard normal noise, each beside
its inverse.

Every op takes plain tensors with any leading shape, checks them, and computes in float32 or better:
bfloat16 and float16 arguments are cast up, results are float32 (float64 where any argument is).
Gradients flow to every argument, through the inverses too (by the implicit function theorem).
Nothing here runs in low precision under autocast.

`implementation` says who computes: "reference" is plain PyTorch and runs anywhere; "triton" are
kernels of the mixture couplings, float32 on a GPU; "auto" takes the kernels for tensors on a GPU
where they can run, `coupling_newton.py` for the mixtures' inverses in float32 on a CPU, and the
reference otherwise.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425. Rosenblatt, *Remarks on a Multivariate
    Transformation*, Annals of Mathematical Statistics 23(3), 1952.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .coupling_linear import with_linear_logits
from .coupling_newton import mixture_cdf_inverse as mixture_cdf_inverse_newton
from .coupling_newton import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_newton
from .coupling_torch import AutoregressiveNetwork
from .coupling_torch import affine as affine_reference
from .coupling_torch import affine_inverse as affine_inverse_reference
from .coupling_torch import (
    autoregressive_mixture_cdf_inverse as autoregressive_mixture_cdf_inverse_reference,
)
from .coupling_torch import mixture_cdf as mixture_cdf_reference
from .coupling_torch import mixture_cdf_inverse as mixture_cdf_inverse_reference
from .coupling_torch import mixture_cdf_log_prob as mixture_cdf_log_prob_reference
from .coupling_torch import mixture_rosenblatt as mixture_rosenblatt_reference
from .coupling_torch import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_reference
from .coupling_torch import mixture_rosenblatt_log_prob as mixture_rosenblatt_log_prob_reference
from .mixture_cdf_triton import MAX_COMPONENTS
from .mixture_cdf_triton import (
    autoregressive_mixture_cdf_inverse as autoregressive_mixture_cdf_inverse_triton,
)
from .mixture_cdf_triton import mixture_cdf as mixture_cdf_triton
from .mixture_cdf_triton import mixture_cdf_inverse as mixture_cdf_inverse_triton
from .mixture_cdf_triton import mixture_cdf_log_prob as mixture_cdf_log_prob_triton
from .mixture_rosenblatt_triton import mixture_rosenblatt as mixture_rosenblatt_triton
from .mixture_rosenblatt_triton import (
    mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_triton,
)
from .mixture_rosenblatt_triton import (
    mixture_rosenblatt_log_prob as mixture_rosenblatt_log_prob_triton,
)
from .normal_triton import IS_INTERPRETED, triton

# What "auto" does on a GPU. Set to False to compute everything there by the reference.
AUTO_TAKES_KERNELS = True

# ------------------------------------------------------------------------------------------- affine


def affine(
    z: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Affine coupling, ``u = (z - loc) exp(-log_scale)``, element by element.

    Args:
        z: Latents, any shape.
        loc, log_scale: Parameters, broadcastable to the shape of `z`.
        implementation: "auto" or "reference".

    Returns:
        `u` and `log_det` of **each element**, in nats, both of the shape of `z`. `log du/dz` is
        `-log_scale`.

    Raises:
        ValueError: shapes, devices or the implementation do not fit; TypeError: not floating point.

    Example:
        >>> affine(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        (tensor([2.]), tensor([-0.]))
    """
    return affine_reference(*_prepare_affine(implementation, z=z, loc=loc, log_scale=log_scale))


def affine_inverse(
    u: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of `affine`, ``z = loc + exp(log_scale) u``; same arguments with `u` for `z`, returns
    z alone.

    Example:
        >>> affine_inverse(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([3.])
    """
    return affine_inverse_reference(
        *_prepare_affine(implementation, u=u, loc=loc, log_scale=log_scale)
    )


# -------------------------------------------------------------------------------------- mixture CDF


def mixture_cdf(
    z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mixture-CDF coupling ("Mix-1") of scalars, ``u = Phi^-1(sum_k pi_k Phi((z - m_k)
    exp(-s_k)))``.

    Both tails are kept in log space: u neither saturates nor decreases in z.

    Args:
        z: Latents, shape (...).
        logits: Unnormalised log-weights of the K components, shape (..., K); pi = softmax(logits).
        loc, log_scale: Means m_k and log standard deviations s_k, shape (..., K).
        implementation: "auto", "reference" or "triton".

    Returns:
        `u` (...) and `log_det` (...) = ``log du/dz = log p_mix(z) - log phi(u)``, in nats.

    Raises:
        ValueError: shapes, devices or the implementation do not fit; TypeError: not floating point.

    Example:
        >>> z, loc = torch.tensor([0.5]), torch.tensor([[-1.0, 1.0]])
        >>> mixture_cdf(z, torch.zeros(1, 2), loc, torch.zeros(1, 2))
        (tensor([0.3078]), tensor([-0.4575]))
    """
    tensors = {"z": z, "logits": logits, "loc": loc, "log_scale": log_scale}
    return _run_mixture_cdf(implementation, mixture_cdf_reference, mixture_cdf_triton, **tensors)


def mixture_cdf_inverse(
    u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of `mixture_cdf`; same arguments with `u` for `z`, returns z alone.

    The root lies between ``min_k(m_k + exp(s_k) u)`` and the maximum; it is found by Newton steps
    in u, safeguarded by bisection. Where u falls into a gap between components, dz/du can exceed
    the dtype's range: it saturates.

    Example:
        >>> u, loc = torch.tensor([0.3078]), torch.tensor([[-1.0, 1.0]])
        >>> mixture_cdf_inverse(u, torch.zeros(1, 2), loc, torch.zeros(1, 2)).round(decimals=3)
        tensor([0.5000])
    """
    tensors = {"u": u, "logits": logits, "loc": loc, "log_scale": log_scale}
    who = mixture_cdf_inverse_reference, mixture_cdf_inverse_triton, mixture_cdf_inverse_newton
    return _run_mixture_cdf(implementation, *who, **tensors)


def mixture_cdf_log_prob(
    z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Log-density ``log p_mix(z)`` (...) in nats, of the arguments of `mixture_cdf`. No
    distribution function.

    Equals `log_det` of `mixture_cdf` plus ``log phi(u)``: all that the last flow of a stack is
    asked for.

    Example:
        >>> mixture_cdf_log_prob(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([-0.9189])
    """
    tensors = {"z": z, "logits": logits, "loc": loc, "log_scale": log_scale}
    return _run_mixture_cdf(
        implementation, mixture_cdf_log_prob_reference, mixture_cdf_log_prob_triton, **tensors
    )


def autoregressive_mixture_cdf_inverse(
    u: Tensor, from_context: Tensor, network: AutoregressiveNetwork, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of the mixture-CDF coupling where dimension i's parameters depend on the dimensions
    before it.

    ``z_i = mixture_cdf_inverse(u_i; network(from_context_i, z_<i))`` for i = 0, ..., D - 1. As
    kernels all D steps of a position are one launch; they have no gradients, and where these are
    asked for "auto" takes the reference.

    Args:
        u: Noise, shape (..., D).
        from_context: What the context adds to the hidden units of each dimension, shape (..., D,
            H).
        network: Weights of the dimensions' networks.
        implementation: "auto", "reference" or "triton".

    Returns:
        Latents z (..., D), float32 or better.

    Raises:
        ValueError: shapes, devices or the implementation do not fit; TypeError: not floating point.

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
    weights = dict(zip(network._fields[:-1], network[:-1], strict=True))
    tensors = {"u": u, "from_context": from_context, **weights}
    _check(**tensors)
    size, hidden = from_context.shape[-2:] if from_context.ndim > 1 else (0, 0)
    num_features, outputs = network.features_bias.shape[-1], network.output_bias.shape[-1]

    expected = {
        "u": (*from_context.shape[:-2], size),
        "features_weight": (size - 1, num_features, 3),
        "features_bias": (size - 1, num_features),
        "from_features": (hidden, num_features * size * (size - 1) // 2),
        "output_weight": (size, outputs, hidden),
        "output_bias": (size, outputs),
    }
    if (
        size == 0
        or outputs == 0
        or outputs % 3
        or any(tensors[name].shape != x for name, x in expected.items())
    ):
        raise ValueError(
            f"u, from_context and the network's weights do not fit together: {_shapes(**tensors)}."
        )

    out_of_one = network.output_bias[0].unflatten(
        0, (3, -1)
    )  # whose last dimension is the components

    is_differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in tensors.values()
    )
    if is_differentiable and implementation == "triton":
        raise ValueError(
            'implementation="triton" cannot run: this inverse\'s kernel has no gradients.'
        )

    who = "reference" if is_differentiable and implementation == "auto" else implementation
    if _runs_on_triton(
        who, u, out_of_one, from_context, *network[:-1], max_components=MAX_COMPONENTS
    ):
        out = autoregressive_mixture_cdf_inverse_triton(
            u.reshape(-1, size), from_context.flatten(0, -3), network
        )
        return out.reshape(u.shape)

    u, from_context, *weights = _cast(u, from_context, *network[:-1])
    network = AutoregressiveNetwork._make([*weights, network.max_log_scale])
    invert = (
        mixture_cdf_inverse_newton
        if _runs_newton(implementation, u)
        else mixture_cdf_inverse_reference
    )
    with torch.autocast(u.device.type, enabled=False):
        return autoregressive_mixture_cdf_inverse_reference(u, from_context, network, invert)


# ------------------------------------------------------------------------------- mixture Rosenblatt


def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rosenblatt coupling ("Mix-d") of d-vectors under ``p(z) = sum_k pi_k N(z; mean_k,
    exp(log_scale_k)^2 I)``.

    ``u_i = Phi^-1(F(z_i | z_<i))``: dimension i is the mixture-CDF coupling with the weights
    ``alpha_k proportional to pi_k prod_{j<i} N(z_j; mean_kj, exp(log_scale_k)^2)``.

    Args:
        z: Latents, shape (..., d).
        logits: Unnormalised log-weights, shape (..., K); pi = softmax(logits).
        mean: Means of the components, shape (K, d), shared by all positions.
        log_scale: Their log standard deviations, shape (K,).
        implementation: "auto", "reference" or "triton".

    Returns:
        `u` (..., d) and `log_det` (...) = ``log p(z) - sum_i log phi(u_i)``, in nats.

    Raises:
        ValueError: shapes, devices or the implementation do not fit; TypeError: not floating point.

    Example:
        >>> u, log_det = mixture_rosenblatt(torch.ones(1, 2), torch.zeros(1, 3), torch.zeros(3, 2), torch.zeros(3))
        >>> u.round(decimals=4), log_det.abs().round(decimals=4)
        (tensor([[1., 1.]]), tensor([0.]))
    """
    tensors = {"z": z, "logits": logits, "mean": mean, "log_scale": log_scale}
    return _run_rosenblatt(
        implementation, mixture_rosenblatt_reference, mixture_rosenblatt_triton, **tensors
    )


def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Inverse of `mixture_rosenblatt`, solved dimension by dimension; `u` for `z`, returns z (...,
    d) alone.

    Example:
        >>> z = mixture_rosenblatt_inverse(torch.ones(1, 2), torch.zeros(1, 3), torch.zeros(3, 2), torch.zeros(3))
        >>> z.round(decimals=4)
        tensor([[1., 1.]])
    """
    tensors = {"u": u, "logits": logits, "mean": mean, "log_scale": log_scale}
    who = (
        mixture_rosenblatt_inverse_reference,
        mixture_rosenblatt_inverse_triton,
        mixture_rosenblatt_inverse_newton,
    )

    return _run_rosenblatt(implementation, *who, **tensors)


def mixture_rosenblatt_log_prob(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, *, implementation: str = "auto"
) -> Tensor:
    """Log-density ``log p(z)`` (...) in nats, of the arguments of `mixture_rosenblatt`. No
    distribution function.

    Example:
        >>> mixture_rosenblatt_log_prob(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(3, 2), torch.zeros(3))
        tensor([-1.8379])
    """
    tensors = {"z": z, "logits": logits, "mean": mean, "log_scale": log_scale}
    return _run_rosenblatt(
        implementation,
        mixture_rosenblatt_log_prob_reference,
        mixture_rosenblatt_log_prob_triton,
        **tensors,
    )


# --------------------------------------- mixture Rosenblatt, with logits that are linear in a state


def linear_mixture_rosenblatt(
    z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    implementation: str = "auto",
    max_logits: int = 2**25,
) -> tuple[Tensor, Tensor]:
    """`mixture_rosenblatt` with ``logits = hidden @ weight.T + bias``, which never exist all at
    once.

    For mixtures as large as a vocabulary: the logits of some positions are made, used, thrown away,
    and made again for the backward pass. Their gradients add up in float32, whatever the dtype of
    the product (autocast's, or that of its factors).

    Args:
        z: Latents, shape (..., d).
        hidden: Hidden states, shape (..., w).
        weight, bias: Of the output projection, shapes (K, w) and (K,).
        mean, log_scale: Of the components, shapes (K, d) and (K,).
        implementation: "auto", "reference" or "triton".
        max_logits: How many logits may exist at once; 2^25 of them take 128 MiB in float32.

    Returns:
        `u` (..., d) and `log_det` (...), in nats.

    Raises:
        ValueError: shapes, devices or the implementation do not fit; TypeError: not floating point.

    Example:
        >>> z, hidden = torch.randn(5, 2), torch.randn(5, 4)
        >>> weight, bias, mean, log_scale = torch.randn(9, 4), torch.zeros(9), torch.randn(9, 2), torch.zeros(9)
        >>> u, log_det = linear_mixture_rosenblatt(z, hidden, weight, bias, mean, log_scale, max_logits=9)
        >>> torch.allclose(u, mixture_rosenblatt(z, hidden @ weight.T, mean, log_scale)[0], atol=1e-5)
        True
    """
    coupling = partial(mixture_rosenblatt, implementation=implementation)
    return _run_linear(
        coupling,
        max_logits,
        z=z,
        hidden=hidden,
        weight=weight,
        bias=bias,
        mean=mean,
        log_scale=log_scale,
    )


def linear_mixture_rosenblatt_inverse(
    u: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    implementation: str = "auto",
    max_logits: int = 2**25,
) -> Tensor:
    """Inverse of `linear_mixture_rosenblatt`; `u` for `z`, returns z (..., d) alone.

    Example:
        >>> u, hidden = torch.ones(1, 2), torch.zeros(1, 4)
        >>> weight, bias, mean, log_scale = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 2), torch.zeros(3)
        >>> linear_mixture_rosenblatt_inverse(u, hidden, weight, bias, mean, log_scale).round(decimals=4)
        tensor([[1., 1.]])
    """
    coupling = partial(mixture_rosenblatt_inverse, implementation=implementation)
    return _run_linear(
        coupling,
        max_logits,
        u=u,
        hidden=hidden,
        weight=weight,
        bias=bias,
        mean=mean,
        log_scale=log_scale,
    )


def linear_mixture_rosenblatt_log_prob(
    z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    implementation: str = "auto",
    max_logits: int = 2**25,
) -> Tensor:
    """Log-density ``log p(z)`` (...) in nats, of the arguments of `linear_mixture_rosenblatt`.

    Example:
        >>> z, hidden = torch.zeros(1, 2), torch.zeros(1, 4)
        >>> weight, bias, mean, log_scale = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 2), torch.zeros(3)
        >>> linear_mixture_rosenblatt_log_prob(z, hidden, weight, bias, mean, log_scale)
        tensor([-1.8379])
    """
    coupling = partial(mixture_rosenblatt_log_prob, implementation=implementation)
    return _run_linear(
        coupling,
        max_logits,
        z=z,
        hidden=hidden,
        weight=weight,
        bias=bias,
        mean=mean,
        log_scale=log_scale,
    )


# ------------------------------------------------------------------------- what the ops above check


def _runs_on_triton(
    implementation: str, *tensors: Tensor, max_components: int | None = None
) -> bool:
    """Whether the kernels compute, for parameters whose last dimension is the components; or an
    error, if told to.
    """
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(
            f'implementation must be "auto", "reference" or "triton", not {implementation!r}.'
        )

    reason = None
    device, num_components = tensors[0].device, tensors[1].shape[-1]

    if triton is None:
        reason = "triton is not installed"
    elif device.type != "cuda" and not IS_INTERPRETED:
        reason = f"it needs tensors on a GPU, not on {device}"
    elif any(tensor.dtype == torch.float64 for tensor in tensors):
        reason = "its kernels are for float32 and less, and a tensor is float64"
    elif max_components is not None and num_components > max_components:
        reason = f"it takes at most {max_components} components, not {num_components}"

    if implementation == "triton" and reason is not None:
        raise ValueError(f'implementation="triton" cannot run: {reason}.')

    return implementation == "triton" or (
        implementation == "auto" and AUTO_TAKES_KERNELS and device.type == "cuda" and reason is None
    )


def _runs_newton(implementation: str, u: Tensor) -> bool:
    """Whether the inverse of u, cast already, is that of `coupling_newton.py`; where no kernels
    run.
    """
    return implementation == "auto" and u.device.type == "cpu" and u.dtype == torch.float32


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, not {kind}.")

    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"All tensors must be on one device: {devices}.")


def _cast(*tensors: Tensor) -> list[Tensor]:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return [tensor.to(torch.float64 if is_double else torch.float32) for tensor in tensors]


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def _prepare_affine(implementation: str, **tensors: Tensor) -> list[Tensor]:
    if implementation not in ("auto", "reference"):
        raise ValueError(
            f'The affine coupling has no kernels: implementation is "auto" or "reference", not {implementation!r}.'
        )

    _check(**tensors)
    first, *parameters = _cast(*tensors.values())

    try:
        return [first, *(parameter.expand_as(first) for parameter in parameters)]
    except RuntimeError:
        raise ValueError(
            f"loc and log_scale must broadcast to the first shape of {_shapes(**tensors)}."
        ) from None


def _run_mixture_cdf(
    implementation: str,
    reference: Callable,
    kernel: Callable,
    newton: Callable | None = None,
    **tensors: Tensor,
):
    _check(**tensors)
    first, *parameters = tensors.values()

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

    if _runs_on_triton(implementation, first, *parameters, max_components=MAX_COMPONENTS):
        return kernel(first, *parameters)

    tensors = _cast(first, *parameters)
    if newton is not None and _runs_newton(implementation, tensors[0]):
        return newton(*tensors)

    return reference(*tensors)


def _run_rosenblatt(
    implementation: str,
    reference: Callable,
    kernel: Callable,
    newton: Callable | None = None,
    **tensors: Tensor,
):
    """Checks, then computes on positions in one row, (n, d) and (n, K), and gives back the leading
    shape.
    """
    name = next(iter(tensors))  # z or u
    _check(**tensors)

    first, logits, mean, log_scale = tensors.values()
    if first.ndim == 0 or mean.ndim != 2 or 0 in mean.shape or mean.shape[1] != first.shape[-1]:
        raise ValueError(
            f"{name} must be (..., d) and mean (K, d), d >= 1 and K >= 1: {_shapes(**tensors)}."
        )

    num_components, latent_size = mean.shape
    if (
        log_scale.shape != (num_components,)
        or logits.ndim == 0
        or logits.shape[-1] != num_components
    ):
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

    run = kernel
    if not _runs_on_triton(implementation, *tensors.values()):
        first, logits, mean, log_scale = _cast(first, logits, mean, log_scale)
        run = newton if newton is not None and _runs_newton(implementation, first) else reference

    out = run(first.reshape(-1, latent_size), logits.reshape(-1, num_components), mean, log_scale)
    if isinstance(out, tuple):
        return tuple(x.reshape(leading + x.shape[1:]) for x in out)

    return out.reshape(leading + out.shape[1:])


def _run_linear(coupling: Callable, max_logits: int, **tensors: Tensor):
    """Checks, then computes on positions in one row, (n, d) and (n, w), and gives back the leading
    shape.
    """
    _check(**tensors)
    first, hidden, weight, bias, mean, log_scale = tensors.values()
    if max_logits < 1:
        raise ValueError(f"max_logits must be at least 1, not {max_logits}.")
    if (
        weight.ndim != 2
        or bias.shape != weight.shape[:1]
        or mean.ndim != 2
        or len(mean) != len(weight)
    ):
        raise ValueError(f"weight must be (K, w), bias (K,) and mean (K, d): {_shapes(**tensors)}.")

    if (
        hidden.ndim == 0
        or hidden.shape[-1] != weight.shape[1]
        or hidden.shape[:-1] != first.shape[:-1]
    ):
        raise ValueError(
            f"hidden must be (..., w), with the leading shape of the first: {_shapes(**tensors)}."
        )

    leading = first.shape[:-1]
    first, hidden = first.reshape(-1, first.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    out = with_linear_logits(coupling, first, hidden, weight, bias, mean, log_scale, max_logits)
    if isinstance(out, tuple):
        return tuple(x.reshape(leading + x.shape[1:]) for x in out)

    return out.reshape(leading + out.shape[1:])
