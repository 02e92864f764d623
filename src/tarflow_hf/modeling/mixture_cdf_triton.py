"""The mixture-CDF coupling as Triton kernels: one pass over the parameters in each direction.

Mathematics and names are those of `coupling_torch.py`. The kernels compute in float32, whatever the
arguments' dtype, and keep only the arguments for the backward pass. A program handles a tile of
BLOCK scalars with all their K components.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .coupling_torch import AutoregressiveNetwork
from .normal_triton import IS_INTERPRETED, exact_exp, lower_quantile, newton_step, normal_tails

MAX_COMPONENTS = 256  # all components of a scalar must fit into one tile
# Scalars times components (padded to a power of two) of one program. With 512 a thread has 4 and no
# register spills. Triton's interpreter takes as long for a large tile as for a small one.
TILE_ELEMENTS = 4096 if IS_INTERPRETED else 512

try:  # everything that needs triton is in here: a checkpoint must load without it
    import triton
    import triton.language as tl

    @triton.jit
    def log_sum_exp(x):
        peak = tl.max(x, 1)
        return peak + tl.log(tl.sum(tl.exp(x - peak[:, None]), 1))

    @triton.jit
    def _transform(z, log_weight, loc, log_scale):
        """`_transform` of `coupling_torch.py`, for z (N,) and parameters (N, K) with padding.

        Padded components have weight 0.
        """
        t = (z[:, None] - loc) * exact_exp(-log_scale)
        log_cdf_k, log_sf_k, cdf_hazard, sf_hazard = normal_tails(t)
        log_cdf = log_sum_exp(log_weight + log_cdf_k)
        log_sf = log_sum_exp(log_weight + log_sf_k)
        is_lower = log_cdf <= log_sf
        sign = tl.where(is_lower, 1.0, -1.0)
        quantile = lower_quantile(tl.minimum(log_cdf, log_sf))
        log_tail = log_weight + tl.where(is_lower[:, None], log_cdf_k, log_sf_k)

        # The largest is subtracted first, as in log_softmax: the weights are exact relative to it.
        log_tail = log_tail - tl.max(log_tail, 1)[:, None]
        log_tail = log_tail - tl.log(tl.sum(tl.exp(log_tail), 1))[:, None]
        log_slope = log_tail + tl.where(is_lower[:, None], cdf_hazard, sf_hazard) - log_scale
        _c, _s, hazard, _h = normal_tails(quantile)
        log_det = log_sum_exp(log_slope) - hazard

        return sign * quantile, log_det, sign, t, log_tail, log_slope, hazard

    @triton.jit
    def _load_parameters(
        logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K: tl.constexpr, BLOCK_K: tl.constexpr
    ):
        """Log weights, locations and log scales (BLOCK, BLOCK_K) in float32; offsets and their mask."""
        k = tl.arange(0, BLOCK_K)
        inside = (rows < num_rows)[:, None] & (k < K)[None, :]
        offsets = rows[:, None].to(tl.int64) * K + k[None, :]
        logits = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        loc = tl.load(loc_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        log_scale = tl.load(log_scale_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        logits = tl.where((k < K)[None, :], logits, float("-inf"))
        log_weight = logits - tl.max(logits, 1)[:, None]
        log_weight = log_weight - tl.log(tl.sum(tl.exp(log_weight), 1))[:, None]

        return log_weight, loc, log_scale, offsets, inside

    @triton.jit
    def _forward_kernel(
        z_ptr, logits_ptr, loc_ptr, log_scale_ptr, u_ptr, log_det_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
        log_weight, loc, log_scale, _offsets, _inside = _load_parameters(
            logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K, BLOCK_K
        )
        u, log_det, _sign, _t, _log_tail, _log_slope, _hazard = _transform(
            z, log_weight, loc, log_scale
        )
        tl.store(u_ptr + rows, u, mask=rows < num_rows)
        tl.store(log_det_ptr + rows, log_det, mask=rows < num_rows)

    @triton.jit
    def _backward_kernel(
        z_ptr, logits_ptr, loc_ptr, log_scale_ptr, grad_u_ptr, grad_log_det_ptr,
        grad_z_ptr, grad_logits_ptr, grad_loc_ptr, grad_log_scale_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, INVERSE: tl.constexpr,
    ):  # fmt: skip
        # With rho_k = pi_k N(z; m_k, s_k) / p(z), D = du/dz, and r_k the share of component k in the
        # smaller tail:
        #   du/dm_k = -rho_k D,  du/ds_k = -rho_k D (z - m_k),  du/dlogit_k = +-(r_k - pi_k) / h(u).
        # As log D = log p(z) - log phi(u), its gradient is that of log p plus u times that of u.
        #
        # INVERSE: the gradients of z(u), given the gradient g of z in place of u's. From dz = (du -
        # du/dtheta dtheta) / D, that of u is g / D, and the parameters' are those above at -g / D.
        # The product of that with D is -g exactly.
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        is_row = rows < num_rows
        z = tl.load(z_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
        log_weight, loc, log_scale, offsets, inside = _load_parameters(
            logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K, BLOCK_K
        )
        u, log_det, sign, t, log_tail, log_slope, hazard = _transform(z, log_weight, loc, log_scale)
        grad_log_det = tl.load(grad_log_det_ptr + rows, mask=is_row, other=0.0)
        grad_u = tl.load(grad_u_ptr + rows, mask=is_row, other=0.0)

        if INVERSE:
            grad_u_slope = -grad_u
            # `_divide_by_slope` of coupling_torch.py: the cube root of float32's range leaves room
            # for the products below.
            limit = 6.98e12
            grad_u = grad_u * tl.minimum(exact_exp(-log_det), limit)
            grad_u = -tl.minimum(tl.maximum(grad_u, -limit), limit)
        else:
            grad_u = grad_u + grad_log_det * u
            grad_u_slope = grad_u * exact_exp(log_det)

        rho = tl.exp(log_slope - log_sum_exp(log_slope)[:, None])
        weight = tl.exp(log_weight)
        grad_weight = (sign * grad_u * exact_exp(-hazard))[:, None]
        grad_density = grad_log_det[:, None]
        pull = grad_density * rho * t * exact_exp(-log_scale)

        if INVERSE:
            grad_z = -grad_u
        else:
            grad_z = grad_u_slope - tl.sum(tl.where(inside, pull, 0.0), 1)

        grad_logits = grad_weight * (tl.exp(log_tail) - weight) + grad_density * (rho - weight)
        grad_loc = -rho * grad_u_slope[:, None]
        grad_log_scale = grad_loc * t * exact_exp(log_scale) + grad_density * rho * (t * t - 1.0)
        tl.store(grad_z_ptr + rows, grad_z, mask=is_row)
        tl.store(grad_logits_ptr + offsets, grad_logits, mask=inside)
        tl.store(grad_loc_ptr + offsets, grad_loc + pull, mask=inside)
        tl.store(grad_log_scale_ptr + offsets, grad_log_scale, mask=inside)

    @triton.jit
    def _log_prob_kernel(
        z_ptr, logits_ptr, loc_ptr, log_scale_ptr, log_prob_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
        log_weight, loc, log_scale, _offsets, _inside = _load_parameters(
            logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K, BLOCK_K
        )
        t = (z[:, None] - loc) * exact_exp(-log_scale)
        log_prob = log_sum_exp(log_weight - 0.5 * t * t - 0.9189385332046727 - log_scale)
        tl.store(log_prob_ptr + rows, log_prob, mask=rows < num_rows)

    @triton.jit
    def _log_prob_backward_kernel(
        z_ptr, logits_ptr, loc_ptr, log_scale_ptr, grad_ptr,
        grad_z_ptr, grad_logits_ptr, grad_loc_ptr, grad_log_scale_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        # d log p / dz = -sum_k rho_k t_k exp(-s_k),  d log p / dm_k = rho_k t_k exp(-s_k),
        # d log p / ds_k = rho_k (t_k^2 - 1),  d log p / dlogit_k = rho_k - pi_k.
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        is_row = rows < num_rows
        z = tl.load(z_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
        log_weight, loc, log_scale, offsets, inside = _load_parameters(
            logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K, BLOCK_K
        )
        grad = tl.load(grad_ptr + rows, mask=is_row, other=0.0)[:, None]
        t = (z[:, None] - loc) * exact_exp(-log_scale)
        joint = log_weight - 0.5 * t * t - log_scale
        rho = tl.exp(joint - log_sum_exp(joint)[:, None])
        pull = grad * rho * t * exact_exp(-log_scale)
        tl.store(grad_z_ptr + rows, -tl.sum(tl.where(inside, pull, 0.0), 1), mask=is_row)
        tl.store(grad_logits_ptr + offsets, grad * (rho - tl.exp(log_weight)), mask=inside)
        tl.store(grad_loc_ptr + offsets, pull, mask=inside)
        tl.store(grad_log_scale_ptr + offsets, grad * rho * (t * t - 1.0), mask=inside)

    @triton.jit
    def _solve(u, log_weight, loc, log_scale, is_component, is_done):
        """z of u (N,), by at most 48 rounds of `newton_step`."""
        candidates = loc + exact_exp(log_scale) * u[:, None]
        lower = tl.min(tl.where(is_component, candidates, float("inf")), 1)
        upper = tl.max(tl.where(is_component, candidates, float("-inf")), 1)
        x = tl.sum(tl.exp(log_weight) * tl.where(is_component, candidates, 0.0), 1)
        x = tl.minimum(tl.maximum(x, lower), upper)
        tolerance = 1.1920928955078125e-07 * (1.0 + tl.abs(u))
        last_step = upper - lower
        num_left = tl.sum(tl.where(is_done, 0, 1), 0)

        steps = 0
        while (steps < 48) & (num_left > 0):
            x_u, log_det, _sign, _t, _log_tail, _log_slope, _hazard = _transform(
                x, log_weight, loc, log_scale
            )
            new_x, lower, upper, last_step, is_root = newton_step(
                x, x_u - u, log_det, lower, upper, last_step, tolerance
            )
            is_done = is_done | is_root
            x = tl.where(is_done, x, new_x)
            num_left = tl.sum(tl.where(is_done, 0, 1), 0)
            steps += 1

        return x

    @triton.jit
    def _inverse_kernel(
        u_ptr, logits_ptr, loc_ptr, log_scale_ptr, z_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        is_row = rows < num_rows
        u = tl.load(u_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
        log_weight, loc, log_scale, _offsets, _inside = _load_parameters(
            logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K, BLOCK_K
        )
        is_component = (tl.arange(0, BLOCK_K) < K)[None, :]
        z = _solve(u, log_weight, loc, log_scale, is_component, rows >= num_rows)
        tl.store(z_ptr + rows, z, mask=is_row)

    # ---------------------------------------------------- the inverse of an autoregressive network

    @triton.jit
    def _tanh(x):
        # A series near 0, where the exponentials cancel.
        square = x * x
        series = square * (
            0.13333333333333333 + square * (-0.05396825396825397 + square * 0.021869488536155203)
        )
        series = x * (1.0 + square * (-0.3333333333333333 + series))
        e = tl.exp(-2.0 * tl.abs(x))

        return tl.where(square < 0.09, series, tl.where(x < 0.0, -1.0, 1.0) * (1.0 - e) / (1.0 + e))

    @triton.jit
    def _gelu(x):
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))

    @triton.jit
    def _elu(x):
        return tl.where(x > 0.0, x, tl.exp(tl.minimum(x, 0.0)) - 1.0)

    @triton.jit
    def _linear(
        x, weight_ptr, bias_ptr, rows, is_row, columns, is_column, NUM_COLUMNS: tl.constexpr
    ):
        """Some rows of W x + b, x (columns,), in float32."""
        offsets = rows[:, None] * NUM_COLUMNS + columns[None, :]
        inside = is_row[:, None] & is_column[None, :]
        weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)

        return tl.sum(weight * x[None, :], 1) + bias

    @triton.jit
    def _autoregressive_inverse_kernel(
        u_ptr, context_ptr, features_weight_ptr, features_bias_ptr, from_features_ptr, output_weight_ptr,
        output_bias_ptr, z_ptr, max_log_scale,
        D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        # All D steps of one position: hidden units, parameters, the root, the root's features.
        # `features` (BLOCK_D, BLOCK_E) are 0 in dimensions that are not solved yet.
        row = tl.program_id(0).to(tl.int64)
        dims = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        h = tl.arange(0, BLOCK_H)
        k = tl.arange(0, BLOCK_K)
        is_component = k < K
        is_hidden = h < H
        features = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)

        for i in range(D):
            context = context_ptr + (row * D + i) * H
            hidden = tl.load(context + h, mask=is_hidden, other=0.0).to(tl.float32)
            column = E * (i * (i - 1) // 2) + dims[:, None] * E + e[None, :]
            is_past = (dims < i)[:, None] & (e < E)[None, :]
            weight = tl.load(
                from_features_ptr + h[:, None, None] * (E * (D * (D - 1) // 2)) + column[None, :, :],
                mask=is_hidden[:, None, None] & is_past[None, :, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            hidden = _gelu(hidden + tl.sum(tl.sum(weight * features[None, :, :], 2), 1))

            weight_ptr = output_weight_ptr + i * (3 * K * H)
            bias_ptr = output_bias_ptr + i * (3 * K)
            logits = _linear(hidden, weight_ptr, bias_ptr, k, is_component, h, is_hidden, H)
            loc = _linear(hidden, weight_ptr, bias_ptr, K + k, is_component, h, is_hidden, H)
            log_scale = _linear(
                hidden, weight_ptr, bias_ptr, 2 * K + k, is_component, h, is_hidden, H
            )
            log_scale = max_log_scale * _tanh(log_scale / max_log_scale)
            logits = tl.where(is_component, logits, float("-inf"))
            log_weight = logits - tl.max(logits, 0)
            log_weight = log_weight - tl.log(tl.sum(tl.exp(log_weight), 0))

            one = tl.arange(0, 1)
            u = tl.load(u_ptr + row * D + i + one)
            z = _solve(
                u, log_weight[None, :], loc[None, :], log_scale[None, :], is_component[None, :], one > 0
            )  # fmt: skip
            tl.store(z_ptr + row * D + i + one, z)

            if i < D - 1:
                x = tl.sum(z, 0)
                inside = e < E
                at = features_weight_ptr + (i * E + e) * 3
                new = tl.load(features_bias_ptr + i * E + e, mask=inside, other=0.0).to(tl.float32)
                new += tl.load(at, mask=inside, other=0.0).to(tl.float32) * x
                new += tl.load(at + 1, mask=inside, other=0.0).to(tl.float32) * _elu(x)
                new += tl.load(at + 2, mask=inside, other=0.0).to(tl.float32) * _elu(-x)
                features = tl.where((dims == i)[:, None], _gelu(new)[None, :], features)

except ImportError:
    triton = None


# ---------------------------------------------------------------------------------------- launchers


def _launch(kernel, num_rows: int, num_components: int, *tensors: Tensor, **options) -> None:
    if num_rows == 0:
        return

    block_k = triton.next_power_of_2(num_components)
    grid_block = max(1, TILE_ELEMENTS // block_k)
    grid = (triton.cdiv(num_rows, grid_block),)

    # A kernel runs on the current device, which need not be the tensors'.
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *tensors, num_rows, K=num_components, BLOCK=grid_block, BLOCK_K=block_k, **options
        )


def _sizes(z: Tensor, logits: Tensor) -> tuple[int, int]:
    return z.numel(), logits.shape[-1]


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


class _MixtureCDF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        inputs = _contiguous(*inputs)
        ctx.save_for_backward(*inputs)
        u, log_det = (torch.empty_like(inputs[0], dtype=torch.float32) for _ in range(2))
        _launch(_forward_kernel, *_sizes(*inputs[:2]), *inputs, u, log_det)
        return u, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        cotangents = _contiguous(grad_u, grad_log_det)
        _launch(
            _backward_kernel, *_sizes(*inputs[:2]), *inputs, *cotangents, *gradients, INVERSE=False
        )

        return tuple(gradients)


class _MixtureCDFInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        u, *parameters = _contiguous(*inputs)
        z = torch.empty_like(u, dtype=torch.float32)
        _launch(_inverse_kernel, *_sizes(u, parameters[0]), u, *parameters, z)
        ctx.save_for_backward(z, *parameters)
        ctx.dtype = u.dtype

        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z):
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        cotangents = [grad_z.contiguous(), torch.zeros_like(inputs[0])]
        _launch(
            _backward_kernel, *_sizes(*inputs[:2]), *inputs, *cotangents, *gradients, INVERSE=True
        )

        return gradients[0].to(ctx.dtype), *gradients[1:]


class _MixtureCDFLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        inputs = _contiguous(*inputs)
        ctx.save_for_backward(*inputs)
        log_prob = torch.empty_like(inputs[0], dtype=torch.float32)
        _launch(_log_prob_kernel, *_sizes(*inputs[:2]), *inputs, log_prob)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        _launch(
            _log_prob_backward_kernel, *_sizes(*inputs[:2]), *inputs, grad.contiguous(), *gradients
        )

        return tuple(gradients)


@torch.compiler.disable  # a graph break: a compiler has nothing to do inside a kernel
def mixture_cdf(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return _MixtureCDF.apply(z, logits, loc, log_scale)


@torch.compiler.disable
def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFInverse.apply(u, logits, loc, log_scale)


@torch.compiler.disable
def mixture_cdf_log_prob(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFLogProb.apply(z, logits, loc, log_scale)


@torch.compiler.disable
def autoregressive_mixture_cdf_inverse(
    u: Tensor, from_context: Tensor, network: AutoregressiveNetwork
) -> Tensor:
    """z (n, D) of u (n, D) and from_context (n, D, H), without gradients."""
    z = torch.empty_like(u, dtype=torch.float32)
    num_rows, size, hidden_size = from_context.shape
    sizes = {
        "D": size,
        "E": network.features_bias.shape[-1],
        "H": hidden_size,
        "K": network.output_bias.shape[-1] // 3,
    }
    blocks = {f"BLOCK_{name}": triton.next_power_of_2(value) for name, value in sizes.items()}

    if num_rows:
        tensors = _contiguous(u.float(), from_context, *network[:-1])
        with torch.cuda.device_of(u):
            _autoregressive_inverse_kernel[num_rows,](
                *tensors, z, float(network.max_log_scale), **sizes, **blocks
            )

    return z
