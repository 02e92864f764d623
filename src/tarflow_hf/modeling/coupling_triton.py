"""The mixture-CDF coupling as Triton kernels: one pass over the parameters forward, one backward, nothing stored.

The mathematics, and the names, are those of `coupling_reference.py`; float32 inside, whatever the arguments' dtype.
A program handles a tile of BLOCK scalars with all their K components. Without a GPU the kernels run in Triton's
interpreter (TRITON_INTERPRET=1), for tests.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_COMPONENTS = 256  # of a mixture: they must fit into one tile
TILE_ELEMENTS = 4096  # scalars times components (padded to a power of two) of one program

try:  # everything that needs triton stands in here: a checkpoint must load where there is none
    import triton
    import triton.language as tl

    # ------------------------------------------------------------------------------------ the normal, in log space

    @triton.jit
    def _log1p(x):
        # Exact in the last places where x is small: log(u) x / (u - 1) with u = 1 + x as rounded (Kahan).
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))

    @triton.jit
    def _log_half_erfcx(a):
        """log(erfcx(a) / 2), a >= 0, to 2 units in the last place of erfcx.

        (1 + 2 a) erfcx(a) is smooth in t = (a - 2) / (a + 2), which maps [0, inf) to [-1, 1): a Chebyshev fit of degree
        12, written as a polynomial. The idea is that of Shepherd & Laframboise, Mathematics of Computation 36, 1981.
        """
        t = (a - 2.0) / (a + 2.0)
        p = -2.025598951149732e-05 * t + 6.336945807561278e-05
        p = p * t + 0.00022157155035529286
        p = p * t - 0.0003579204494599253
        p = p * t - 0.001464070868678391
        p = p * t + 0.0012174105504527688
        p = p * t + 0.008724607527256012
        p = p * t - 0.008018963038921356
        p = p * t - 0.05422026664018631
        p = p * t + 0.16404946148395538
        p = p * t - 0.1660303771495819
        p = p * t - 0.0927637591958046
        p = p * t + 1.2769783735275269
        return tl.log(0.5 * p / (1.0 + 2.0 * a))

    @triton.jit
    def _normal_tails(x):
        """log Phi(x), log Phi(-x), log h(x), log h(-x), with h = phi / Phi: `normal_tails` of `normal.py`."""
        log_sqrt_2pi = 0.9189385332046727
        half_square = 0.5 * x * x
        log_factor = _log_half_erfcx(tl.abs(x) * 0.7071067811865476)
        small = log_factor - half_square
        large = _log1p(-tl.exp(small))
        small_hazard = -log_sqrt_2pi - log_factor
        large_hazard = -log_sqrt_2pi - half_square - large
        is_negative = x < 0.0
        return (
            tl.where(is_negative, small, large),
            tl.where(is_negative, large, small),
            tl.where(is_negative, small_hazard, large_hazard),
            tl.where(is_negative, large_hazard, small_hazard),
        )

    @triton.jit
    def _lower_quantile(log_p):
        """Phi^-1(exp(log_p)) for log_p at most log(1/2), as `ndtri_exp` of `normal.py`."""
        w = -2.0 * log_p
        x = -tl.sqrt(tl.maximum(w - tl.log(w) - 1.8378770664093453, 0.0))
        for _ in tl.static_range(4):
            log_cdf, _log_sf, hazard, _sf_hazard = _normal_tails(x)
            x = x - (log_cdf - log_p) * tl.exp(-hazard)
        return x

    # ------------------------------------------------------------------------------------------------ the coupling

    @triton.jit
    def _log_sum_exp(x):
        peak = tl.max(x, 1)
        return peak + tl.log(tl.sum(tl.exp(x - peak[:, None]), 1))

    @triton.jit
    def _transform(z, log_weight, loc, log_scale):
        """`_transform` of the reference, for z (N,) and parameters (N, K); absent components have weight 0."""
        t = (z[:, None] - loc) * tl.exp(-log_scale)
        log_cdf_k, log_sf_k, cdf_hazard, sf_hazard = _normal_tails(t)
        log_cdf = _log_sum_exp(log_weight + log_cdf_k)
        log_sf = _log_sum_exp(log_weight + log_sf_k)
        is_lower = log_cdf <= log_sf
        sign = tl.where(is_lower, 1.0, -1.0)
        quantile = _lower_quantile(tl.minimum(log_cdf, log_sf))
        log_tail = log_weight + tl.where(is_lower[:, None], log_cdf_k, log_sf_k)
        # As log_softmax does it: the largest is subtracted first, so that the weights are exact relative to it.
        log_tail = log_tail - tl.max(log_tail, 1)[:, None]
        log_tail = log_tail - tl.log(tl.sum(tl.exp(log_tail), 1))[:, None]
        log_slope = log_tail + tl.where(is_lower[:, None], cdf_hazard, sf_hazard) - log_scale
        _c, _s, hazard, _h = _normal_tails(quantile)
        log_det = _log_sum_exp(log_slope) - hazard
        return sign * quantile, log_det, sign, t, log_tail, log_slope, hazard

    @triton.jit
    def _load_parameters(logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K: tl.constexpr, BLOCK_K: tl.constexpr):
        """Log weights, locations, log scales (BLOCK, BLOCK_K) in float32, and where they are in the tensors."""
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
        u, log_det, _sign, _t, _log_tail, _log_slope, _hazard = _transform(z, log_weight, loc, log_scale)
        tl.store(u_ptr + rows, u, mask=rows < num_rows)
        tl.store(log_det_ptr + rows, log_det, mask=rows < num_rows)

    @triton.jit
    def _backward_kernel(
        z_ptr, logits_ptr, loc_ptr, log_scale_ptr, grad_u_ptr, grad_log_det_ptr,
        grad_z_ptr, grad_logits_ptr, grad_loc_ptr, grad_log_scale_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, INVERSE: tl.constexpr,
    ):  # fmt: skip
        # With rho_k = pi_k N(z; m_k, s_k) / p(z), D = du/dz, r_k the share of component k in the smaller tail:
        #   du/dz = D,  du/dm_k = -rho_k D,  du/ds_k = -rho_k D (z - m_k),  du/dlogit_k = +-(r_k - pi_k) / h(u),
        # and log D = log p(z) - log phi(u), so that its gradient is that of log p plus u times that of u.
        # INVERSE: of z(u), given the gradient g of z in place of u's. dz = (du - du/dtheta dtheta) / D: the parameters'
        # gradients are those above at -g / D, whose product with D is -g exactly; g / D itself is that of u.
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
            limit = 6.98e12  # the cube root of float32's range, as in the reference: room for the products below
            grad_u = -tl.minimum(tl.maximum(grad_u * tl.minimum(tl.exp(-log_det), limit), -limit), limit)
        else:
            grad_u = grad_u + grad_log_det * u
            grad_u_slope = grad_u * tl.exp(log_det)
        rho = tl.exp(log_slope - _log_sum_exp(log_slope)[:, None])
        weight = tl.exp(log_weight)
        grad_weight = (sign * grad_u * tl.exp(-hazard))[:, None]
        grad_density = grad_log_det[:, None]
        pull = grad_density * rho * t * tl.exp(-log_scale)
        if INVERSE:
            grad_z = -grad_u
        else:
            grad_z = grad_u_slope - tl.sum(tl.where(inside, pull, 0.0), 1)
        grad_logits = grad_weight * (tl.exp(log_tail) - weight) + grad_density * (rho - weight)
        grad_loc = -rho * grad_u_slope[:, None]
        grad_log_scale = grad_loc * t * tl.exp(log_scale) + grad_density * rho * (t * t - 1.0)
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
        t = (z[:, None] - loc) * tl.exp(-log_scale)
        log_prob = _log_sum_exp(log_weight - 0.5 * t * t - 0.9189385332046727 - log_scale)
        tl.store(log_prob_ptr + rows, log_prob, mask=rows < num_rows)

    @triton.jit
    def _log_prob_backward_kernel(
        z_ptr, logits_ptr, loc_ptr, log_scale_ptr, grad_ptr,
        grad_z_ptr, grad_logits_ptr, grad_loc_ptr, grad_log_scale_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        # d log p / dz = -sum_k rho_k t_k exp(-s_k), / dm_k = rho_k t_k exp(-s_k), / ds_k = rho_k (t_k^2 - 1),
        # / dlogit_k = rho_k - pi_k.
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        is_row = rows < num_rows
        z = tl.load(z_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
        log_weight, loc, log_scale, offsets, inside = _load_parameters(
            logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K, BLOCK_K
        )
        grad = tl.load(grad_ptr + rows, mask=is_row, other=0.0)[:, None]
        t = (z[:, None] - loc) * tl.exp(-log_scale)
        joint = log_weight - 0.5 * t * t - log_scale
        rho = tl.exp(joint - _log_sum_exp(joint)[:, None])
        pull = grad * rho * t * tl.exp(-log_scale)
        tl.store(grad_z_ptr + rows, -tl.sum(tl.where(inside, pull, 0.0), 1), mask=is_row)
        tl.store(grad_logits_ptr + offsets, grad * (rho - tl.exp(log_weight)), mask=inside)
        tl.store(grad_loc_ptr + offsets, pull, mask=inside)
        tl.store(grad_log_scale_ptr + offsets, grad * rho * (t * t - 1.0), mask=inside)

    @triton.jit
    def _inverse_kernel(
        u_ptr, logits_ptr, loc_ptr, log_scale_ptr, z_ptr, num_rows,
        K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        # `find_root` of `normal.py`, whose comments say why each step is as it is; the whole solve in one launch.
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        is_row = rows < num_rows
        u = tl.load(u_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
        log_weight, loc, log_scale, _offsets, _inside = _load_parameters(
            logits_ptr, loc_ptr, log_scale_ptr, rows, num_rows, K, BLOCK_K
        )
        is_component = (tl.arange(0, BLOCK_K) < K)[None, :]
        candidates = loc + tl.exp(log_scale) * u[:, None]
        lower = tl.min(tl.where(is_component, candidates, float("inf")), 1)
        upper = tl.max(tl.where(is_component, candidates, float("-inf")), 1)
        x = tl.sum(tl.exp(log_weight) * candidates, 1)
        x = tl.minimum(tl.maximum(x, lower), upper)
        eps = 1.1920928955078125e-07
        tolerance = eps * (1.0 + tl.abs(u))
        last_step = upper - lower
        is_done = rows >= num_rows
        num_left = BLOCK
        steps = 0
        while (steps < 48) & (num_left > 0):
            x_u, log_det, _sign, _t, _log_tail, _log_slope, _hazard = _transform(x, log_weight, loc, log_scale)
            value = x_u - u
            lower = tl.where(value <= 0.0, x, lower)
            upper = tl.where(value >= 0.0, x, upper)
            spacing = eps * tl.abs(x)
            is_done = is_done | (tl.abs(value) <= tolerance) | (upper - lower <= spacing)
            step = -value * tl.exp(-log_det)
            crossing = tl.where(value > 0.0, -spacing, spacing)
            newton = x + tl.where(tl.abs(step) < spacing, crossing, step)
            is_good = (newton >= lower) & (newton <= upper) & (2.0 * tl.abs(step) <= last_step)
            new_x = tl.where(is_good, newton, lower + 0.5 * (upper - lower))
            last_step = tl.where(is_good, tl.abs(step), upper - lower)
            x = tl.where(is_done, x, new_x)
            num_left = tl.sum(tl.where(is_done, 0, 1), 0)
            steps += 1
        tl.store(z_ptr + rows, x, mask=is_row)

except ImportError:
    triton = None


# ----------------------------------------------------------------------------------------------------------- launchers


def why_not(*tensors: Tensor) -> str | None:
    """Why the kernels cannot run on latents and parameters like these, or None where they can."""
    num_components = tensors[-1].shape[-1]
    if triton is None:
        return "triton is not installed"
    if not tensors[0].is_cuda and type(_forward_kernel).__name__ != "InterpretedFunction":
        return f"it needs tensors on a GPU, not on {tensors[0].device}"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "it computes in float32, and a tensor is float64"
    if num_components > MAX_COMPONENTS:
        return f"it takes at most {MAX_COMPONENTS} components, not {num_components}"
    return None


def _launch(kernel, num_rows: int, num_components: int, *tensors: Tensor, **options) -> None:
    if num_rows == 0:
        return
    block_k = triton.next_power_of_2(num_components)
    grid_block = max(1, TILE_ELEMENTS // block_k)
    grid = (triton.cdiv(num_rows, grid_block),)
    kernel[grid](*tensors, num_rows, K=num_components, BLOCK=grid_block, BLOCK_K=block_k, **options)


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
        _launch(_backward_kernel, *_sizes(*inputs[:2]), *inputs, *cotangents, *gradients, INVERSE=False)
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
        _launch(_backward_kernel, *_sizes(*inputs[:2]), *inputs, *cotangents, *gradients, INVERSE=True)
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
        _launch(_log_prob_backward_kernel, *_sizes(*inputs[:2]), *inputs, grad.contiguous(), *gradients)
        return tuple(gradients)


def mixture_cdf(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return _MixtureCDF.apply(z, logits, loc, log_scale)


def mixture_cdf_inverse(u: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFInverse.apply(u, logits, loc, log_scale)


def mixture_cdf_log_prob(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return _MixtureCDFLogProb.apply(z, logits, loc, log_scale)
