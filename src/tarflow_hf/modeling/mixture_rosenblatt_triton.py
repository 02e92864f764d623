"""The Rosenblatt coupling of a large mixture as Triton kernels: one pass over the components.

No tensor has the size n K d. With w_k^(i) = logit_k + sum_{j<i} log N(z_j; mu_kj, sigma_k^2), a
position needs only 3 d + 1 logsumexps over the components k: of w^(0), ..., w^(d), and of w_k^(i) +
log Phi(+-t_ki). One kernel makes them; the rest is arithmetic on (n, d) tensors. The backward pass
and the log-density have the same form.

Mathematics and names are those of `coupling_torch.py`. The kernels compute in float32, except for
the weights w of a transform: their squares cancel, and they are float64. The order of every sum is
fixed by the shapes, so results do not vary from run to run.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .coupling_torch import chunks, rosenblatt_inverse_backward
from .normal import log_reversed_hazard, ndtri_exp
from .normal import normal_tails as normal_tails_reference
from .normal_triton import (
    IS_INTERPRETED,
    log1p,
    log_half_erfcx,
    lower_quantile,
    newton_step,
    normal_tails,
)

# Tile sizes: small enough not to spill registers; larger in the interpreter, whose cost is per tile.
BLOCK_ROWS = 16 if IS_INTERPRETED else 8
BLOCK_COMPONENTS = 64
INVERSE_BLOCK_COMPONENTS = 2048
MAX_SPLITS = 32  # programs that share the components of a block of rows
MAX_PARTIAL_SUMS = 2**25  # numbers that the programs of a backward pass leave to be added up
# Arguments that are loop bounds. Triton would make a constant of a size of 1, of another type.
SIZES = ["num_rows", "num_components", "tiles_per_split"]

try:  # everything that needs triton is in here: a checkpoint must load without it
    import triton
    import triton.language as tl

    @triton.jit
    def _log_tails(t, half_square):
        """log Phi(t) and log Phi(-t) for t in float32, in the precision of t^2 / 2."""
        log_factor = log_half_erfcx(tl.abs(t) * 0.7071067811865476)
        small = log_factor - half_square
        large = log1p(-tl.exp(small.to(tl.float32))).to(small.dtype)
        return tl.where(t < 0.0, small, large), tl.where(t < 0.0, large, small)

    @triton.jit
    def _add_exp(peak, total, here, old_shift, new_shift, x):
        """Adds sum_k exp(x_k), x (N, K), to column `here` of the sums exp(peak) total, (N, C).

        `old_shift` and `new_shift` are added to the logarithms of the sums and of x first.
        """
        x_peak = tl.maximum(tl.max(x, 1), -1e30)
        x_total = tl.sum(tl.exp((x - x_peak[:, None]).to(tl.float32)), 1)
        old = peak + old_shift
        new = tl.where(here, x_peak[:, None] + new_shift, -1e30)
        peak = tl.maximum(old, new)
        old_share = tl.exp((old - peak).to(tl.float32))
        new_share = tl.exp((new - peak).to(tl.float32))

        return peak, total * old_share + tl.where(here, x_total[:, None], 0.0) * new_share

    @triton.jit
    def _load_weights(
        logits_ptr, rows, is_row, row_stride, k, is_component, component_stride, dtype: tl.constexpr
    ):
        offsets = (
            rows.to(tl.int64)[:, None] * row_stride + k.to(tl.int64)[None, :] * component_stride
        )
        inside = is_row[:, None] & is_component[None, :]
        return tl.load(logits_ptr + offsets, mask=inside, other=float("-inf")).to(dtype)

    @triton.jit(do_not_specialize=SIZES)
    def _sums_kernel(
        z_ptr, logits_ptr, mean_ptr, log_scale_ptr, inverse_scale_ptr, weight_ptr, cdf_ptr, sf_ptr,
        num_rows, num_components, row_stride, component_stride, tiles_per_split,
        D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TRANSFORM: tl.constexpr,
    ):  # fmt: skip
        # Logsumexps over this split's share of the components: of the weights (splits, n, d + 1), and
        # of both tails (splits, n, d) relative to their weights'. Without TRANSFORM only the weights'
        # first and last. `origin`, the weights' peak, is kept in `dtype`, and everything else is
        # relative to it: the sums may be far from 0, but are not far from the origin.
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        split = tl.program_id(1)
        is_row = rows < num_rows
        column = tl.arange(0, COLUMNS)[None, :]
        dtype = inverse_scale_ptr.dtype.element_ty
        origin = tl.full([BLOCK, COLUMNS], -1e30, dtype)
        total = tl.zeros([BLOCK, COLUMNS], tl.float32)
        peak, cdf_peak, sf_peak, cdf_total, sf_total = origin, origin, origin, total, total

        for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            is_component = k < num_components
            weight = _load_weights(
                logits_ptr, rows, is_row, row_stride, k, is_component, component_stride, dtype
            )
            log_scale = tl.load(log_scale_ptr + k, mask=is_component, other=0.0).to(dtype)[None, :]
            inverse_scale = tl.load(inverse_scale_ptr + k, mask=is_component, other=0.0)[None, :]

            for i in range(D + 1):
                here = column == i
                is_dimension = i < D
                z_at = z_ptr + rows.to(tl.int64) * D + i
                z = tl.load(z_at, mask=is_row & is_dimension, other=0.0).to(dtype)
                mean_at = mean_ptr + i * num_components + k
                mean = tl.load(mean_at, mask=is_component & is_dimension, other=0.0).to(dtype)
                t = (z[:, None] - mean[None, :]) * inverse_scale

                if TRANSFORM or i == 0 or i == D:
                    base = tl.maximum(tl.max(weight, 1), -1e30)[:, None]
                    share = weight - base
                    new_origin = tl.where(here, tl.maximum(origin, base), origin)
                    old_shift = origin - new_origin
                    new_shift = tl.where(here, base - new_origin, 0.0)

                    # Log tails are at most 0. A tile that is 104 below every sum so far adds 0 to
                    # each in float32.
                    least = tl.sum(
                        tl.where(here, tl.minimum(tl.minimum(cdf_peak, sf_peak), peak), 0.0), 1
                    )
                    if tl.max(tl.sum(new_shift, 1) - least, 0) > -104.0:
                        origin = new_origin
                        peak, total = _add_exp(peak, total, here, old_shift, new_shift, share)

                        if TRANSFORM:
                            log_cdf, log_sf = _log_tails(t.to(tl.float32), 0.5 * t * t)
                            cdf_peak, cdf_total = _add_exp(
                                cdf_peak, cdf_total, here, old_shift, new_shift, share + log_cdf
                            )
                            sf_peak, sf_total = _add_exp(
                                sf_peak, sf_total, here, old_shift, new_shift, share + log_sf
                            )

                weight = weight - (0.5 * t * t + log_scale + 0.9189385332046727)

        offsets = (split * num_rows + rows).to(tl.int64)[:, None]
        log_total = peak + tl.log(total).to(dtype)
        tl.store(
            weight_ptr + offsets * (D + 1) + column,
            origin + log_total,
            mask=is_row[:, None] & (column <= D),
        )

        if TRANSFORM:
            inside = is_row[:, None] & (column < D)
            tl.store(
                cdf_ptr + offsets * D + column,
                cdf_peak + (tl.log(cdf_total) - log_total),
                mask=inside,
            )
            tl.store(
                sf_ptr + offsets * D + column, sf_peak + (tl.log(sf_total) - log_total), mask=inside
            )

    @triton.jit(do_not_specialize=SIZES)
    def _backward_kernel(
        z_ptr, logits_ptr, mean_ptr, log_scale_ptr, inverse_scale_ptr,
        weight_sum_ptr, log_tail_ptr, is_lower_ptr, grad_log_prob_ptr, grad_u_slope_ptr, grad_weight_ptr,
        grad_z_ptr, grad_logits_ptr, grad_mean_ptr, grad_log_scale_ptr,
        num_rows, num_components, row_stride, component_stride,
        D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
        TRANSFORM: tl.constexpr, GRAD_LOGITS: tl.constexpr,
    ):  # fmt: skip
        # `rosenblatt_backward` of coupling_torch.py for a tile of rows and components. The tile
        # stores its share of the gradients: of z's in (component blocks, n, d), and of the
        # codebook's in (row blocks, d, K) and (row blocks, K).
        row_block, component_block = tl.program_id(0), tl.program_id(1)
        rows = row_block * BLOCK + tl.arange(0, BLOCK)
        k = component_block * BLOCK_K + tl.arange(0, BLOCK_K)
        is_row, is_component = rows < num_rows, k < num_components
        rows64 = rows.to(tl.int64)
        dtype = inverse_scale_ptr.dtype.element_ty
        logits = _load_weights(
            logits_ptr, rows, is_row, row_stride, k, is_component, component_stride, dtype
        )
        log_scale = tl.load(log_scale_ptr + k, mask=is_component, other=0.0).to(dtype)[None, :]
        inverse_scale = tl.load(inverse_scale_ptr + k, mask=is_component, other=0.0)[None, :]
        scale = 1.0 / tl.where(is_component[None, :], inverse_scale, 1.0).to(tl.float32)
        weight = logits

        for i in range(D):
            z = tl.load(z_ptr + rows64 * D + i, mask=is_row, other=0.0).to(dtype)
            mean_at = mean_ptr + i * num_components + k
            mean = tl.load(mean_at, mask=is_component, other=0.0).to(dtype)
            t = (z[:, None] - mean[None, :]) * inverse_scale
            weight = weight - (0.5 * t * t + log_scale + 0.9189385332046727)

        grad_log_prob = tl.load(grad_log_prob_ptr + rows, mask=is_row, other=0.0)[:, None]
        last = tl.load(weight_sum_ptr + rows64 * (D + 1) + D, mask=is_row, other=0.0)[:, None]
        demand = grad_log_prob * tl.exp(tl.minimum(weight - last, 0.0).to(tl.float32))
        grad_log_scale = tl.zeros([BLOCK_K], tl.float32)

        for step in range(D):
            i = D - 1 - step
            z = tl.load(z_ptr + rows64 * D + i, mask=is_row, other=0.0).to(dtype)
            mean_at = mean_ptr + i * num_components + k
            mean = tl.load(mean_at, mask=is_component, other=0.0).to(dtype)
            t = (z[:, None] - mean[None, :]) * inverse_scale
            t32 = t.to(tl.float32)
            pull = demand * t32 * inverse_scale.to(tl.float32)
            grad_loc = pull
            grad_scale = demand * (t32 * t32 - 1.0)

            if TRANSFORM:
                at = rows64 * D + i
                sum_at = weight_sum_ptr + rows64 * (D + 1) + i
                after = tl.load(sum_at + 1, mask=is_row, other=0.0)[:, None]
                before = tl.load(sum_at, mask=is_row, other=0.0)[:, None]
                log_tail = tl.load(log_tail_ptr + at, mask=is_row, other=0.0)[:, None]
                is_lower = tl.load(is_lower_ptr + at, mask=is_row, other=0)[:, None] != 0
                grad_u_slope = tl.load(grad_u_slope_ptr + at, mask=is_row, other=0.0)[:, None]
                grad_weight = tl.load(grad_weight_ptr + at, mask=is_row, other=0.0)[:, None]

                # A weight is at most their sum, also after rounding: hence the minimum with 0.
                density_share = tl.exp(tl.minimum(weight - after, 0.0).to(tl.float32))
                cdf_loc = -density_share * grad_u_slope
                grad_loc += cdf_loc
                grad_scale += cdf_loc * t32 * scale
                weight = weight + (0.5 * t * t + log_scale + 0.9189385332046727)
                log_cdf, log_sf = _log_tails(t32, 0.5 * t * t)
                share = tl.minimum(weight - before, 0.0)
                tail = tl.where(is_lower, log_cdf, log_sf) - log_tail
                tail_share = tl.exp(tl.minimum(share + tail, 0.0).to(tl.float32))
                demand += grad_weight * (tail_share - tl.exp(share.to(tl.float32)))

            row_share = component_block.to(tl.int64) * num_rows + rows64
            tl.store(grad_z_ptr + row_share * D + i, -tl.sum(pull, 1), mask=is_row)
            column_share = (row_block.to(tl.int64) * D + i) * num_components + k
            tl.store(grad_mean_ptr + column_share, tl.sum(grad_loc, 0), mask=is_component)
            grad_log_scale += tl.sum(grad_scale, 0)

        column_share = row_block.to(tl.int64) * num_components + k
        tl.store(grad_log_scale_ptr + column_share, grad_log_scale, mask=is_component)

        if GRAD_LOGITS:
            first = tl.load(weight_sum_ptr + rows64 * (D + 1), mask=is_row, other=0.0)[:, None]
            grad_logits = demand - grad_log_prob * tl.exp((logits - first).to(tl.float32))
            inside = is_row[:, None] & is_component[None, :]
            offsets = rows64[:, None] * num_components + k[None, :]
            tl.store(grad_logits_ptr + offsets, grad_logits, mask=inside)

    @triton.jit
    def _log_add(peak, total, x):
        """Adds sum_k exp(x_k), x (K,), to the number exp(peak) total."""
        new_peak = tl.maximum(peak, tl.max(x, 0))
        return new_peak, total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), 0)

    # The inverse's helpers work on one position. `weight_ptr` and `index_ptr` (K,) list its active
    # components: their log weights (float64) and which they are.

    @triton.jit
    def _drop_out_of_reach(weight_ptr, index_ptr, count, reach, lane, BLOCK_K: tl.constexpr):
        """Drops components more than `reach` below the largest, which gets the log weight 0.

        In place: a component never moves behind the place where it stood, so nothing is overwritten
        before it has been read. Returns how many are left.
        """
        peak = tl.full([], -1e300, tl.float64)
        for start in range(0, count, BLOCK_K):
            at = start + lane
            weight = tl.load(weight_ptr + at, mask=at < count, other=-1e300)
            peak = tl.maximum(peak, tl.max(weight, 0))

        num_left = 0
        for start in range(0, count, BLOCK_K):
            at = start + lane
            weight = tl.load(weight_ptr + at, mask=at < count, other=float("-inf")) - peak
            k = tl.load(index_ptr + at, mask=at < count, other=0)
            stays = weight >= -reach
            target = num_left + tl.cumsum(stays.to(tl.int32), 0) - 1
            tl.debug_barrier()
            tl.store(weight_ptr + target, weight, mask=stays)
            tl.store(index_ptr + target, k, mask=stays)
            num_left += tl.sum(stays.to(tl.int32), 0)

        tl.debug_barrier()
        return num_left

    @triton.jit
    def _bracket(
        u, weight_ptr, index_ptr, count, mean_ptr, inverse_scale_ptr, lane, BLOCK_K: tl.constexpr
    ):
        """The least, largest and average of the components' own roots; the log of the weights' sum."""
        lower = tl.full([], float("inf"), tl.float32)
        upper = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        mass = tl.full([], 0.0, tl.float32)

        for start in range(0, count, BLOCK_K):
            at = start + lane
            is_active = at < count
            k = tl.load(index_ptr + at, mask=is_active, other=0)
            weight = tl.load(weight_ptr + at, mask=is_active, other=float("-inf"))
            share = tl.exp(weight.to(tl.float32))
            scale = 1.0 / tl.load(inverse_scale_ptr + k).to(tl.float32)
            candidate = tl.load(mean_ptr + k) + scale * u
            lower = tl.minimum(lower, tl.min(tl.where(is_active, candidate, float("inf")), 0))
            upper = tl.maximum(upper, tl.max(tl.where(is_active, candidate, float("-inf")), 0))
            total += tl.sum(share * tl.where(is_active, candidate, 0.0), 0)
            mass += tl.sum(share, 0)

        return lower, upper, total / mass, tl.log(mass)

    @triton.jit
    def _transform(
        x, weight_ptr, index_ptr, count, log_mass, mean_ptr, log_scale_ptr, inverse_scale_ptr,
        lane, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """u(x) = Phi^-1(F(x)) and log du/dx, from the smaller of F and 1 - F."""
        cdf_peak = tl.full([], -1e30, tl.float32)
        cdf_total = tl.full([], 0.0, tl.float32)
        sf_peak, sf_total = cdf_peak, cdf_total
        slope_peak, slope_total = cdf_peak, cdf_total

        for start in range(0, count, BLOCK_K):
            at = start + lane
            is_active = at < count
            k = tl.load(index_ptr + at, mask=is_active, other=0)
            weight = tl.load(weight_ptr + at, mask=is_active, other=float("-inf")).to(tl.float32)
            inverse_scale = tl.load(inverse_scale_ptr + k).to(tl.float32)
            t = (x - tl.load(mean_ptr + k)) * inverse_scale
            log_cdf, log_sf, _cdf_hazard, _sf_hazard = normal_tails(t)
            cdf_peak, cdf_total = _log_add(cdf_peak, cdf_total, weight + log_cdf)
            sf_peak, sf_total = _log_add(sf_peak, sf_total, weight + log_sf)
            density = weight - 0.5 * t * t - 0.9189385332046727 - tl.load(log_scale_ptr + k)
            slope_peak, slope_total = _log_add(slope_peak, slope_total, density)

        log_cdf = cdf_peak + tl.log(cdf_total) - log_mass
        log_sf = sf_peak + tl.log(sf_total) - log_mass
        log_tail = tl.minimum(log_cdf, log_sf)
        quantile = lower_quantile(log_tail)
        _c, _s, hazard, _h = normal_tails(quantile)
        log_slope = (slope_peak - log_mass - log_tail) + tl.log(slope_total) - hazard

        return tl.where(log_cdf <= log_sf, quantile, -quantile), log_slope

    @triton.jit
    def _condition(
        x, weight_ptr, index_ptr, count, mean_ptr, log_scale_ptr, inverse_scale_ptr,
        lane, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Adds log N(x; mu_k, sigma_k^2) + log(2 pi) / 2 to the log weights."""
        for start in range(0, count, BLOCK_K):
            at = start + lane
            is_active = at < count
            k = tl.load(index_ptr + at, mask=is_active, other=0)
            mean = tl.load(mean_ptr + k).to(tl.float64)
            t = (x.to(tl.float64) - mean) * tl.load(inverse_scale_ptr + k)
            weight = tl.load(weight_ptr + at, mask=is_active, other=0.0)
            log_scale = tl.load(log_scale_ptr + k).to(tl.float64)
            tl.store(weight_ptr + at, weight - (0.5 * t * t + log_scale), mask=is_active)

        tl.debug_barrier()

    @triton.jit(do_not_specialize=SIZES)
    def _inverse_kernel(
        u_ptr, logits_ptr, mean_ptr, log_scale_ptr, inverse_scale_ptr, reach_ptr, weight_ptr, index_ptr, z_ptr,
        num_components, row_stride, component_stride, D: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        # One position a program. `weight` and `index` (n, K) are the scratch of the helpers above.
        row = tl.program_id(0).to(tl.int64)
        weight_ptr += row * num_components
        index_ptr += row * num_components
        logits_ptr += row * row_stride
        lane = tl.arange(0, BLOCK_K)
        reach = tl.load(reach_ptr + row)
        count = num_components

        for start in range(0, num_components, BLOCK_K):
            k = start + lane
            offsets = k.to(tl.int64) * component_stride
            logits = tl.load(logits_ptr + offsets, mask=k < count, other=0.0)
            tl.store(weight_ptr + k, logits.to(tl.float64), mask=k < count)
            tl.store(index_ptr + k, k, mask=k < count)

        tl.debug_barrier()
        for i in range(D):
            means = mean_ptr + i * num_components
            count = _drop_out_of_reach(weight_ptr, index_ptr, count, reach, lane, BLOCK_K)

            u = tl.load(u_ptr + row * D + i)
            lower, upper, average, log_mass = _bracket(
                u, weight_ptr, index_ptr, count, means, inverse_scale_ptr, lane, BLOCK_K
            )
            x = tl.minimum(tl.maximum(average, lower), upper)
            tolerance = 1.1920928955078125e-07 * (1.0 + tl.abs(u))
            last_step = upper - lower

            steps = 0
            while steps < 48:
                x_u, log_slope = _transform(
                    x, weight_ptr, index_ptr, count, log_mass, means, log_scale_ptr, inverse_scale_ptr,
                    lane, BLOCK_K,
                )  # fmt: skip
                new_x, lower, upper, last_step, is_root = newton_step(
                    x, x_u - u, log_slope, lower, upper, last_step, tolerance
                )
                x = tl.where(is_root, x, new_x)
                steps = tl.where(is_root, 48, steps + 1)

            tl.store(z_ptr + row * D + i, x)
            _condition(
                x,
                weight_ptr,
                index_ptr,
                count,
                means,
                log_scale_ptr,
                inverse_scale_ptr,
                lane,
                BLOCK_K,
            )

except ImportError:
    triton = None


# ---------------------------------------------------------------------------------------- launchers


def _codebook(mean: Tensor, log_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Means (d, K), log scales (K,) and, in `dtype`, inverse scales (K,), as the kernels read them."""
    return mean.T.contiguous(), log_scale.contiguous(), torch.exp(-log_scale.to(dtype)).contiguous()


class _Sums(NamedTuple):
    """Logsumexps over the components."""

    weight: Tensor  # (n, d + 1)  of w^(0), ..., w^(d); of a log-density only the first and the last
    cdf: Tensor  # (n, d)  of w^(i) + log Phi(t_i), less the weights': log F_i
    sf: Tensor  # (n, d)  of w^(i) + log Phi(-t_i), likewise: log(1 - F_i)


def _sums(z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor, transform: bool) -> _Sums:
    num_rows, (num_components, latent_size) = len(z), mean.shape
    dtype = torch.float64 if transform else torch.float32
    tiles = triton.cdiv(num_components, BLOCK_COMPONENTS)
    tiles_per_split = triton.cdiv(tiles, MAX_SPLITS)
    splits = triton.cdiv(tiles, tiles_per_split)
    shape = (splits, num_rows, latent_size if transform else 0)
    weight = torch.empty(*shape[:2], latent_size + 1, dtype=dtype, device=z.device)
    cdf, sf = (torch.empty(shape, dtype=dtype, device=z.device) for _ in range(2))

    if num_rows:
        with torch.cuda.device_of(z):
            _sums_kernel[triton.cdiv(num_rows, BLOCK_ROWS), splits](
                z, logits, *_codebook(mean, log_scale, dtype), weight, cdf, sf,
                num_rows, num_components, *logits.stride(), tiles_per_split,
                D=latent_size, COLUMNS=triton.next_power_of_2(latent_size + 1), BLOCK=BLOCK_ROWS,
                BLOCK_K=BLOCK_COMPONENTS, TRANSFORM=transform,
            )  # fmt: skip

    share = torch.log_softmax(weight[..., : cdf.shape[-1]], 0)
    return _Sums(
        torch.logsumexp(weight, 0), torch.logsumexp(share + cdf, 0), torch.logsumexp(share + sf, 0)
    )


class _RowGradients(NamedTuple):
    """Numbers of each row that the backward kernel reads: sums of the forward pass, and cotangents."""

    weight_sum: Tensor  # (n, d + 1)
    log_tail: Tensor  # (n, d)  the smaller of log F and log(1 - F)
    is_lower: Tensor  # (n, d)  1 if that is log F
    grad_log_prob: Tensor  # (n,)
    grad_u_slope: Tensor  # (n, d)  the gradient of u, times du/dz
    grad_weight: Tensor  # (n, d)  the gradient of u, over +-h(u)


def _backward(
    z: Tensor,
    logits: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    rows: _RowGradients,
    transform: bool,
    grad_logits: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    num_components, latent_size = mean.shape
    rows = _RowGradients(*(x.contiguous() for x in rows))  # a cotangent may have any strides
    codebook = _codebook(mean, log_scale, rows.weight_sum.dtype)
    grad_z = torch.zeros_like(z)
    grad_mean, grad_log_scale = torch.zeros_like(codebook[0]), torch.zeros_like(codebook[1])
    grad_logits = (
        torch.empty(logits.shape, dtype=logits.dtype, device=z.device) if grad_logits else None
    )
    size = max(1, MAX_PARTIAL_SUMS // (num_components * latent_size)) * BLOCK_ROWS
    component_blocks = triton.cdiv(num_components, BLOCK_COMPONENTS)

    for part in chunks(len(z), size):
        num_rows = len(z[part])
        row_blocks = triton.cdiv(num_rows, BLOCK_ROWS)
        shares = [
            torch.empty(shape, dtype=torch.float32, device=z.device)
            for shape in (
                (component_blocks, num_rows, latent_size),
                (row_blocks, latent_size, num_components),
                (row_blocks, num_components),
            )
        ]

        with torch.cuda.device_of(z):
            _backward_kernel[row_blocks, component_blocks](
                z[part], logits[part], *codebook, *(x[part] for x in rows),
                shares[0], None if grad_logits is None else grad_logits[part], shares[1], shares[2],
                num_rows, num_components, *logits.stride(),
                D=latent_size, BLOCK=BLOCK_ROWS, BLOCK_K=BLOCK_COMPONENTS,
                TRANSFORM=transform, GRAD_LOGITS=grad_logits is not None,
            )  # fmt: skip

        grad_z[part] = shares[0].sum(0)
        grad_mean += shares[1].sum(0)
        grad_log_scale += shares[2].sum(0)

    return grad_z, grad_logits, grad_mean.T, grad_log_scale


class _MixtureRosenblatt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        sums = _sums(z, logits, mean, log_scale, transform=True)
        before, after = sums.weight[:, :-1], sums.weight[:, 1:]
        is_lower = sums.cdf <= sums.sf
        log_tail = torch.where(is_lower, sums.cdf, sums.sf)
        quantile = ndtri_exp(log_tail.float())
        u = torch.where(is_lower, quantile, -quantile)
        hazard = log_reversed_hazard(quantile)

        # log p(z_i | z_<i) - log(tail) - log h(u). du/dz is at most 1 / min_k sigma_k, also after
        # rounding.
        log_slope = ((after - before - log_tail).float() - hazard).clamp(max=-log_scale.amin())
        ctx.save_for_backward(
            z, logits, mean, log_scale, sums.weight, log_tail, is_lower, u, log_slope, hazard
        )

        return u, log_slope.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u, grad_log_det):
        *inputs, weight_sum, log_tail, is_lower, u, log_slope, hazard = ctx.saved_tensors
        # As log du/dz = log p(z) - log phi(u), its gradient is that of log p plus u times that of u.
        grad_u = grad_u + grad_log_det.unsqueeze(-1) * u
        rows = _RowGradients(
            weight_sum, log_tail, is_lower.to(torch.int8), grad_log_det,
            grad_u_slope=grad_u * log_slope.exp(),
            grad_weight=torch.where(is_lower, grad_u, -grad_u) * torch.exp(-hazard),
        )  # fmt: skip
        grad_z, *rest = _backward(
            *inputs, rows, transform=True, grad_logits=ctx.needs_input_grad[1]
        )

        return grad_z + rows.grad_u_slope, *rest


class _MixtureRosenblattLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, logits, mean, log_scale):
        sums = _sums(z, logits, mean, log_scale, transform=False)
        ctx.save_for_backward(z, logits, mean, log_scale, sums.weight)
        return sums.weight[:, -1] - sums.weight[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, weight_sum = ctx.saved_tensors
        nothing = weight_sum[:, :0]
        rows = _RowGradients(weight_sum, nothing, nothing, grad, nothing, nothing)
        return _backward(*inputs, rows, transform=False, grad_logits=ctx.needs_input_grad[1])


class _MixtureRosenblattInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        num_components, latent_size = mean.shape
        z = torch.empty_like(u)

        # A component at least `reach` below the largest, in log weight, is dropped for good. 104 is
        # what float32 can tell from 0, and the second term is the smaller tail at the least likely
        # u_i of the position. So the dropped components hold less than K e^-104 < 1e-35 of the
        # smaller tail, and F and 1 - F are unchanged in float32.
        #
        # In a later dimension a dropped component matters only if z falls where it is e^104 times
        # more likely, compared with the kept ones, than before. Shares are a martingale over u ~
        # N(0, I): one that small exceeds 1e-8 with a probability below d K 1e-37.
        reach = 104.0 - normal_tails_reference(-u.abs().amax(-1)).log_cdf

        if len(u):
            weight = torch.empty(len(u), num_components, dtype=torch.float64, device=u.device)
            index = torch.empty(len(u), num_components, dtype=torch.int32, device=u.device)

            block_k = min(INVERSE_BLOCK_COMPONENTS, triton.next_power_of_2(num_components))

            with torch.cuda.device_of(u):
                _inverse_kernel[len(u),](
                    u, logits, *_codebook(mean, log_scale, torch.float64), reach, weight, index, z,
                    num_components, *logits.stride(), D=latent_size, BLOCK_K=block_k, num_warps=8,
                )  # fmt: skip

        ctx.save_for_backward(z, logits, mean, log_scale)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z):
        # Back substitution needs all components for each row of the Jacobian: no kernel for that.
        inputs = (x.float() for x in ctx.saved_tensors)
        return tuple(rosenblatt_inverse_backward(*inputs, grad_z))


@torch.compiler.disable  # a graph break: a compiler has nothing to do inside a kernel
def mixture_rosenblatt(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    return _MixtureRosenblatt.apply(z.float().contiguous(), logits, mean.float(), log_scale.float())


@torch.compiler.disable
def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattInverse.apply(
        u.float().contiguous(), logits, mean.float(), log_scale.float()
    )


@torch.compiler.disable
def mixture_rosenblatt_log_prob(
    z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattLogProb.apply(
        z.float().contiguous(), logits, mean.float(), log_scale.float()
    )
