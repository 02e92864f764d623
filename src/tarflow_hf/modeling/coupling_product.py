"""A large codebook's log-densities on a CPU, by one matrix product in float64.

    log N(z; mu_k, sigma_k^2 I) = [z, |z|^2, 1] . [mu_k / s, -1 / (2 s), c_k],   s = sigma_k^2,
    c_k = -|mu_k|^2 / (2 s) - d log sigma_k - d log sqrt(2 pi)

That is a tenth of the time of V d differences. It cancels, and so is exact to
`_rounding`, 2^-52 (d + 3) (|z| + |mu|)^2 / sigma^2 nats: 3e-10 with scales of 0.03, d = 16 and |z|
around 4. If that exceeds `MAX_ROUNDING`, the reference computes.

Sums over the codebook look at blocks of components. Blocks whose largest term is e^-MARGIN of the
largest of all are left out, which changes a logarithm by less than V e^-MARGIN nats: 3e-13 with V =
49,152 (float64: 1e-27). If too many are left, as with a codebook that overlaps, all terms count.

A forward pass asks for the same latents several times: for the context's posterior, the density
under the flow, and the total over the codebook. The components near each latent are looked up once
(`near`). They are so many that logits of a usual range take none from outside in; where they could,
which is tested, all are looked at.

Shapes: n rows, V components of size d, C candidates.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .codebook_kept import kept, state_of
from .coupling_torch import chunks
from .normal import LOG_SQRT_2PI, MIN_LOG_WEIGHT

MAX_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-9}
MARGIN = {torch.float32: 40.0, torch.float64: 73.0}
# The components near a latent are within this more of the largest log N_k(z), in nats: logits may
# differ by as much.
LOGITS_RANGE = 120.0
MIN_NEAR = 8  # blocks of them at least
# Numbers V d from which on this form is taken.
MIN_CODEBOOK = 2**11
BLOCK = 32
MIN_BLOCKED = 2**10  # components from which on blocks are looked at
CHUNK_ELEMENTS = 2**18  # n V at once, but at least 32 rows
# Terms n V that are kept for the backward pass, 16 MiB in float32; more are made again there. Those
# of candidates are always kept.
MAX_KEPT = 2**22


class Product(NamedTuple):
    """The factor of a codebook, in float64, padded to whole blocks of components."""

    factor: Tensor  # (d + 2, V')  of [z, |z|^2, 1]; the last row is -inf at the padding
    center: Tensor  # (d,)  subtracted from latents and means
    radius: float  # the largest |mu|
    inverse_scale: float  # the largest 1 / sigma

    def log_prob(self, z: Tensor) -> Tensor:
        """log N_k(z) in float64, (n, V') of z (n, d)."""
        z = z.double() - self.center
        ones = torch.ones_like(z[:, :1])  # `addmm` would copy the bias to all rows first
        return torch.cat([z, z.square().sum(-1, keepdim=True), ones], 1) @ self.factor

    def rounding(self, z: Tensor) -> float:
        """A bound on the error of `log_prob` in nats; NaN if a number is not finite."""
        size = (z.double() - self.center).square().sum(-1).max().item() if len(z) else 0.0
        reach = (math.sqrt(size) + self.radius) * self.inverse_scale
        return 2.0**-52 * (z.shape[1] + 3) * reach * reach


def make_product(mean: Tensor, log_scale: Tensor) -> Product:
    mean, log_scale = mean.double(), log_scale.double()
    center = mean.mean(0)
    mean = mean - center
    inverse = torch.exp(-2 * log_scale)
    square = mean.square().sum(-1)
    bias = -0.5 * square * inverse - mean.shape[1] * (log_scale + LOG_SQRT_2PI)
    factor = torch.cat([(mean * inverse.unsqueeze(-1)).T, -0.5 * inverse.unsqueeze(0)])

    padding = -len(mean) % BLOCK
    bias = F.pad(bias, (0, padding), value=-math.inf)
    return Product(
        factor=torch.cat([F.pad(factor, (0, padding)), bias.unsqueeze(0)]),
        center=center,
        radius=square.max().sqrt().item(),
        inverse_scale=inverse.max().sqrt().item(),
    )


def product_of(z: Tensor, mean: Tensor, log_scale: Tensor) -> Product | None:
    """The codebook's factor, if its product is exact enough at these latents (n, d)."""
    is_meant = z.device.type == "cpu" and mean.numel() >= MIN_CODEBOOK
    if not is_meant or torch.compiler.is_compiling():
        return None

    product = kept(make_product, mean, log_scale)
    return product if product.rounding(z) <= MAX_ROUNDING[z.dtype] else None


# --------------------------------------------------------------------------------------------------
# Sums over the codebook
# --------------------------------------------------------------------------------------------------


def _row_chunks(num_rows: int, num_components: int):
    return chunks(num_rows, max(32, CHUNK_ELEMENTS // num_components))


def _candidates(joint: Tensor, margin: float) -> Tensor | None:
    """The components (n, C) that count in a sum of exp(joint), joint (n, V'); None for all."""
    num_components = joint.shape[1]
    if num_components < MIN_BLOCKED:
        return None

    largest = joint.unflatten(1, (-1, BLOCK)).amax(-1)
    count = (largest > largest.amax(-1, keepdim=True) - margin).sum(-1).max().item()
    if 4 * BLOCK * count > num_components:
        return None

    return _members(largest.topk(count).indices)


def _members(blocks: Tensor) -> Tensor:
    """The components (n, m BLOCK) of blocks (n, m)."""
    return (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(1)


def _shifted_exp(joint: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(joint) over its largest, in the dtype and held above e^-80, and the largest joint (n, 1)."""
    peak = joint.amax(-1, keepdim=True)
    return (joint - peak).to(dtype).clamp_(min=MIN_LOG_WEIGHT).exp_(), peak


class _Near(NamedTuple):
    """The components near each of n latents, those of the nearest block first."""

    z: Tensor  # (n, d)  kept, so that no other latents can take its place in memory
    state: tuple
    product: Product
    index: Tensor | None  # (n, C)  None if the codebook overlaps: too many
    log_prob: Tensor | None  # (n, C)  float64
    least: Tensor | None  # (n, 1)  all others are below

    def knows(self, z: Tensor, product: Product) -> bool:
        """True of the latents as they were, and of a slice of their rows."""
        offset = z.data_ptr() - self.z.data_ptr()
        size = self.z.element_size() * self.z.shape[1]
        is_inside = 0 <= offset <= size * (len(self.z) - len(z)) and offset % size == 0
        is_kind = z.dtype == self.z.dtype and z.shape[1] == self.z.shape[1]
        return is_inside and is_kind and self.product is product and self.state == state_of(self.z)

    def rows(self, start: int, count: int) -> "_Near":
        if self.index is None:
            return self
        rows = slice(start, start + count)
        own = (x[rows] for x in (self.index, self.log_prob, self.least))
        return _Near(self.z[rows], self.state, self.product, *own)


_last: _Near | None = None


def near(z: Tensor, product: Product) -> _Near | None:
    """The components near latents (n, d), found once for as long as these stay the same.

    None if the codebook overlaps, or is small.
    """
    global _last
    if product.factor.shape[1] < MIN_BLOCKED or len(z) == 0:
        return None

    z = z.detach().contiguous()
    last = _last
    if last is None or not last.knows(z, product):
        last = _last = _find_near(z, product)

    start = (z.data_ptr() - last.z.data_ptr()) // (z.element_size() * z.shape[1])
    found = last.rows(start, len(z))
    return None if found.index is None else found


def _find_near(z: Tensor, product: Product) -> _Near:
    num_components = product.factor.shape[1]
    state = state_of(z)
    margin = MARGIN[z.dtype] + LOGITS_RANGE
    found = []
    for rows in _row_chunks(len(z), num_components):
        log_prob = product.log_prob(z[rows])
        largest = log_prob.unflatten(1, (-1, BLOCK)).amax(-1)
        least = largest.amax(-1, keepdim=True) - margin
        count = max(MIN_NEAR, int((largest > least).sum(-1).max()))
        if 4 * BLOCK * count > num_components:
            return _Near(z, state, product, None, None, None)

        index = _members(largest.topk(count).indices)
        found.append((index, log_prob.gather(1, index), least))

    width = max(index.shape[1] for index, _, _ in found)
    pad = [width - index.shape[1] for index, _, _ in found]
    index = torch.cat([F.pad(x[0], (0, p)) for x, p in zip(found, pad, strict=True)])
    log_prob = torch.cat(
        [F.pad(x[1], (0, p), value=-math.inf) for x, p in zip(found, pad, strict=True)]
    )
    return _Near(z, state, product, index, log_prob, torch.cat([x[2] for x in found]))


def nearest(z: Tensor, product: Product, count: int) -> Tensor:
    """The `count` components of the largest log N_k(z), in their order: (n, count) of z (n, d)."""
    found = near(z, product) if count <= MIN_NEAR else None
    if found is not None:
        return found.index.gather(1, found.log_prob.topk(count).indices)

    parts = _row_chunks(len(z), product.factor.shape[1])
    return torch.cat([product.log_prob(z[rows]).topk(count).indices for rows in parts])


# --------------------------------------------------------------------------------------------------
# log p(z) and log sum_k N_k(z)
# --------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums over rows of the gradients, all in float64."""

    mean: Tensor  # (V, d)
    log_scale: Tensor  # (V,)


class _LogTotal(torch.autograd.Function):
    """log sum_k exp(logits_k) N_k(z), less log sum_k exp(logits_k) where there are logits."""

    @staticmethod
    def forward(ctx, product, z, logits, mean, log_scale):
        ctx.save_for_backward(z, logits, mean, log_scale)
        ctx.product, ctx.rows, ctx.candidates, ctx.terms = product, [], [], []
        total = z.new_empty(len(z))
        keeps = any(ctx.needs_input_grad)
        is_small = len(z) * len(mean) <= MAX_KEPT
        found = near(z, product)

        # Without logits only the near components are looked at.
        is_light = found is not None and logits is None
        num_components = found.index.shape[1] if is_light else len(mean)

        for rows in _row_chunks(len(z), num_components):
            counted = None
            if found is not None:
                counted = _near_joint(found.rows(rows.start, len(z[rows])), logits, rows)
            if counted is None:
                counted = _blocked_joint(product, z[rows], logits, rows)

            joint, candidates = counted
            terms, peak = _shifted_exp(joint, z.dtype)
            if keeps:
                ctx.rows.append(rows)
                ctx.candidates.append(candidates)
                ctx.terms.append(terms if candidates is not None or is_small else None)

            sums = terms.sum(-1, dtype=torch.float64).log_() + peak.squeeze(-1)
            if logits is not None:
                # Faster than the library's logsumexp.
                first = logits[rows, :1]
                sums -= (first - torch.log_softmax(logits[rows], -1)[:, :1]).squeeze(-1)

            total[rows] = sums

        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, logits, mean, log_scale = ctx.saved_tensors
        needs_logits = ctx.needs_input_grad[2]
        grad_z = torch.empty_like(z)
        grad_logits = torch.empty_like(logits) if needs_logits else None
        sums = _Sums(torch.zeros_like(mean).double(), torch.zeros_like(log_scale).double())
        moments = None

        for rows, candidates, terms in zip(ctx.rows, ctx.candidates, ctx.terms, strict=True):
            if terms is None:
                terms, _ = _shifted_exp(_joint(ctx.product, z[rows], logits, rows), z.dtype)

            weight = terms * (grad[rows].unsqueeze(-1) / terms.sum(-1, keepdim=True))
            if candidates is None:
                moments = moments or _Moments.of(mean, log_scale)
                grad_z[rows] = moments.add(weight, z[rows])
            else:
                components = mean, log_scale
                grad_z[rows] = _add_candidates(sums, weight, candidates, z[rows], *components)

            if needs_logits:
                prior = torch.softmax(logits[rows], -1).mul_(-grad[rows].unsqueeze(-1))
                if candidates is None:
                    grad_logits[rows] = prior.add_(weight[:, : len(mean)])
                else:
                    inside = candidates < len(mean)
                    places = candidates.clamp(max=len(mean) - 1)
                    grad_logits[rows] = prior.scatter_add_(1, places, weight * inside)

        if moments is not None:
            moments.add_to(sums)

        return None, grad_z, grad_logits, sums.mean.to(mean.dtype), sums.log_scale.to(mean.dtype)


def _near_joint(found: _Near, logits: Tensor | None, rows: slice) -> tuple[Tensor, Tensor] | None:
    """The joint (n, C) of the near components that count, and these; None if others could, too."""
    joint, least = found.log_prob, found.least
    if logits is not None:
        places = found.index.clamp(max=logits.shape[1] - 1)
        joint = joint + logits[rows].gather(1, places)
        least = least + logits[rows].amax(-1, keepdim=True)

    largest = joint.unflatten(1, (-1, BLOCK)).amax(-1)
    counted_from = largest.amax(-1, keepdim=True) - MARGIN[found.z.dtype]
    if not bool((least <= counted_from).all()):
        return None

    width = BLOCK * (1 + int((largest > counted_from).any(0).nonzero().max()))
    return joint[:, :width], found.index[:, :width]


def _blocked_joint(
    product: Product, z: Tensor, logits: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """The joint (n, C) of the components that count, and these; or (n, V') of all, and None."""
    joint = _joint(product, z, logits, rows)
    candidates = _candidates(joint, MARGIN[z.dtype])
    return (joint if candidates is None else joint.gather(1, candidates)), candidates


def _joint(product: Product, z: Tensor, logits: Tensor | None, rows: slice) -> Tensor:
    """logits_k + log N_k(z), (n, V') in float64."""
    joint = product.log_prob(z)
    if logits is not None:
        joint[:, : logits.shape[1]] += logits[rows]
    return joint


class _Moments(NamedTuple):
    """The gradients of sum_nk weight_nk log N_k(z_n) by matrix products, from all components.

    Those of the components follow from sums over the rows, so that a chunk of rows costs no work of
    the codebook's size but its products. The weights are held constant.
    """

    mean: Tensor  # (V, d)  float64, from the center
    factor: Tensor  # (V, d + 1)  [mu_k, 1] / sigma_k^2
    center: Tensor  # (d,)
    sums: Tensor  # (V, d + 2)  sum_n weight_nk [z, |z|^2, 1]

    @classmethod
    def of(cls, mean: Tensor, log_scale: Tensor) -> "_Moments":
        center = mean.double().mean(0)
        mean = mean.double() - center
        inverse = torch.exp(-2 * log_scale.double()).unsqueeze(-1)
        factor = torch.cat([mean * inverse, inverse], 1)
        return cls(mean, factor, center, mean.new_zeros(len(mean), mean.shape[1] + 2))

    def add(self, weight: Tensor, z: Tensor) -> Tensor:
        """Adds rows with weights (n, V'); returns the gradient of their z (n, d)."""
        z = z.double() - self.center
        weight = weight[:, : len(self.mean)].double()
        square = z.square().sum(-1, keepdim=True)
        self.sums.addmm_(weight.T, torch.cat([z, square, torch.ones_like(square)], 1))
        by_row = weight @ self.factor

        return by_row[:, :-1] - z * by_row[:, -1:]

    def add_to(self, to: _Sums) -> None:
        latent_size = self.mean.shape[1]
        inverse = self.factor[:, -1:]
        first, second, count = self.sums.split([latent_size, 1, 1], 1)
        to.mean.add_(inverse * (first - self.mean * count))
        spread = second - 2 * (self.mean * first).sum(-1, keepdim=True)
        spread = spread + self.mean.square().sum(-1, keepdim=True) * count
        to.log_scale.add_((inverse * spread - latent_size * count).squeeze(-1))


def _add_candidates(
    sums: _Sums, weight: Tensor, candidates: Tensor, z: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    """Adds the gradients of sum_nk weight_nk log N_k(z_n), from the differences; returns that of z.

    weight (n, C) is of some components, and held constant.
    """
    # Padding has weight 0.
    candidates = candidates.clamp(max=len(mean) - 1)
    inverse = torch.exp(-log_scale)[candidates].unsqueeze(-1)
    t = (z.unsqueeze(1) - mean[candidates]) * inverse  # (n, C, d)
    pull = weight.unsqueeze(-1) * t * inverse

    index = candidates.flatten()
    sums.mean.index_add_(0, index, pull.flatten(0, 1).double())
    spread = weight * (t.square().sum(-1) - mean.shape[1])
    sums.log_scale.index_add_(0, index, spread.flatten().double())

    return -pull.sum(1)


def mixture_rosenblatt_log_prob(
    product: Product, z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    """log p(z) in nats, (n,) of z (n, d), by the codebook's `product_of` z."""
    return _LogTotal.apply(product, z, logits, mean, log_scale)


def log_total(product: Product, z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log sum_k N_k(z) in nats, (n,) of z (n, d), by the codebook's `product_of` z."""
    return _LogTotal.apply(product, z, None, mean, log_scale)
