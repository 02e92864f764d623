"""The Rosenblatt transform's inverse over a large codebook on a CPU, by active sets.

The reference evaluates every component in every dimension. Here a dimension looks only at those
that can matter. After each one nearly all weights are gone; once a single component is left, z = mu
+ sigma u in all dimensions that remain. Two things are left out:

- **Steps.** A component far from the root counts as a step, its distribution function as 0 or 1.
  Far is beyond `REACH` scales, or 7 + |u| if that is more: the tail at the root changes by less
  than a share of 2e-11 (float64: 3e-18).
- **Drops.** After a dimension, components are dropped whose weights together are at most
  `MAX_DROPPED` of the position's, times the rarest tail Phi(-|u|) still to come. By induction over
  the dimensions the density of the result is at most p(z) / (1 - MAX_DROPPED)^(d - 1). Its
  Kullback-Leibler divergence from p is then at most d MAX_DROPPED: with d = 16 that is 1.5e-11
  nats a token (float64: 9e-19).

Both hold for any codebook. If its components overlap, little can be left out, and what remains is
the exact inverse over all of them.

Everything is mirrored so that u <= 0: the lower tail is then the smaller one at the root. Roots are
found in float64, in float32's case to 1e-8 scales. A z is rounded to its dtype before the weights
of the next dimension are computed from it.

Shapes: n rows, d dimensions, V components in all, K active ones; B intervals.
"""

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .codebook_kept import kept
from .coupling_torch import MixtureRosenblattInverse, chunks, fill_missing
from .coupling_torch import mixture_rosenblatt_inverse as mixture_rosenblatt_inverse_reference
from .normal import FARTHEST, MAX_NOISE, SQRT_2PI, SQRT_HALF

MAX_DROPPED = {torch.float32: 2.0**-40, torch.float64: 2.0**-64}
REACH = {torch.float32: 9.5, torch.float64: 12.0}
# A step of this many scales is the last one: its own error is some 40 times its square.
SMALL_STEP = {torch.float32: 2.0**-16, torch.float64: 2.0**-29}
# A step of this many scales ends the rounds in float32, whose distribution functions are good to
# 1e-6: a round in float64 follows.
COARSE_STEP = 2.0**-9

# There weights are in this unit: small ones are normal numbers, too.
COARSE_UNIT = 2.0**64

MAX_ROUNDS = 60
MIN_DENSITY = 1e-200  # with less at the root the weights would underflow
NUM_BINS = 512
GUESS_REACH = 3.0  # scales between the first guess and the root, at first
# Numbers n K above which a window is laid around the root, and the first rounds are in float32.
MANY = 2**9
# Numbers n K up to which Python's own floats are faster than tensors.
FEW = 2**7
CHUNK_ELEMENTS = 2**19  # n V of the rows that are solved together


# --------------------------------------------------------------------------------------------------
# The codebook, in the order of its first dimension
# --------------------------------------------------------------------------------------------------


class _Bins(NamedTuple):
    """A codebook's components by equal intervals of their first mean."""

    order: Tensor  # (V,)  components by their first mean
    bin_of: Tensor  # (V,)  the interval of each component
    starts: list[int]  # B + 1: the place in `order` where each interval begins
    lowest: float
    width: float
    scale: Tensor  # (V,)  float64
    min_scale: float
    max_scale: float


def make_bins(mean: Tensor, log_scale: Tensor) -> _Bins:
    first = mean[:, 0].double()
    lowest, highest = first.min().item(), first.max().item()
    width = (highest - lowest) / NUM_BINS + 1e-30
    bin_of = ((first - lowest) / width).long().clamp_(0, NUM_BINS - 1)
    counts = torch.bincount(bin_of, minlength=NUM_BINS)
    scale = log_scale.double().exp()

    return _Bins(
        order=bin_of.argsort(),
        bin_of=bin_of,
        starts=[0, *counts.cumsum(0).tolist()],
        lowest=lowest,
        width=width,
        scale=scale,
        min_scale=scale.min().item(),
        max_scale=scale.max().item(),
    )


# --------------------------------------------------------------------------------------------------
# One dimension: F(z) = below + sum_k weight_k Phi((z - loc_k) / scale_k)
# --------------------------------------------------------------------------------------------------

# Maps the z of each row to F(z) and sqrt(2 pi) p(z).
Evaluate = Callable[[list[float]], tuple[list[float], list[float]]]


class _Active(NamedTuple):
    """The active components of n rows. Rows with fewer components are padded with weight 0."""

    index: Tensor  # (n, K)
    weight: Tensor  # (n, K)  float64; with what is below the window they sum to 1
    scale: Tensor  # (n, K)  float64

    def keep(self, is_kept: Tensor) -> tuple["_Active", Tensor]:
        """The components where `is_kept` (n, K), and their places (n, m)."""
        if len(is_kept) == 1:
            at = is_kept[0].nonzero().T
            return _Active(*(x.gather(1, at) for x in self)), at

        place = is_kept.cumsum(-1)
        counts = place[:, -1:]
        size = max(1, int(counts.max()))
        place = torch.where(is_kept, place - 1, size)
        every = torch.arange(is_kept.shape[1]).expand_as(place)
        at = torch.zeros(len(place), size + 1, dtype=torch.long).scatter_(1, place, every)[:, :-1]

        index, weight, scale = (x.gather(1, at) for x in self)
        return _Active(index, weight.mul_(torch.arange(size) < counts), scale), at


class _Mixture(NamedTuple):
    """One dimension of n mirrored rows; a single one has tensors (K,)."""

    weight: Tensor  # (n, K)
    slope_weight: Tensor  # (n, K)  weight_k / scale_k
    loc: Tensor  # (n, K)
    inverse: Tensor  # (n, K)  1 / (scale_k sqrt(2))
    below: list[float]
    unit: float = 1.0  # of the weights

    @classmethod
    def make(cls, active: _Active, loc: Tensor, below: list[float]) -> "_Mixture":
        slope_weight, inverse = active.weight / active.scale, SQRT_HALF / active.scale
        if len(loc) > 1:
            return cls(active.weight, slope_weight, loc, inverse, below)

        return cls(active.weight[0], slope_weight[0], loc[0], inverse[0], below)

    def coarse(self) -> "_Mixture":
        """The same in float32."""
        return _Mixture(
            weight=(self.weight * COARSE_UNIT).float(),
            slope_weight=(self.slope_weight * COARSE_UNIT).float(),
            loc=self.loc.float(),
            inverse=self.inverse.float(),
            below=self.below,
            unit=COARSE_UNIT,
        )

    def _distances(self, z: list[float]) -> Tensor:
        """(loc_k - z) / (scale_k sqrt(2)), no further out than makes a difference."""
        limit = FARTHEST[self.loc.dtype]
        if self.loc.ndim == 1:
            return (self.loc - z[0]).mul_(self.inverse).clamp_(-limit, limit)

        z = torch.tensor(z, dtype=self.loc.dtype).unsqueeze(-1)
        return (self.loc - z).mul_(self.inverse).clamp_(-limit, limit)

    def joint(self, z: list[float]) -> Tensor:
        """sqrt(2 pi) weight_k N(z; loc_k, scale_k), (n, K)."""
        density = torch.exp(self._distances(z).square_().neg_()).mul_(self.slope_weight)
        return density.view(len(self.below), -1)

    def evaluate(self, z: list[float]) -> tuple[list[float], list[float]]:
        """An `Evaluate`."""
        t = self._distances(z)
        tail = torch.erfc(t)
        density = t.square_().neg_().exp_()
        if t.ndim == 1:
            cdf = [tail.dot(self.weight).item()]
            slope = [density.dot(self.slope_weight).item()]
        else:
            cdf = tail.mul_(self.weight).sum(-1).tolist()
            slope = density.mul_(self.slope_weight).sum(-1).tolist()

        half, one = 0.5 / self.unit, 1 / self.unit
        cdf = [b + half * x for b, x in zip(self.below, cdf, strict=True)]
        return cdf, [one * x for x in slope]


# Yields the z at which it asks for F and its derivative over sqrt(2 pi). Returns the root.
Search = Generator[float, tuple[float, float], float]


def _search(u: float, low: float, high: float, start: float, small_step: float) -> Search:
    """The root of one row, NaN if the bracket has none: Newton steps, safeguarded by the bracket.

    y = sqrt(-2 log F) grows almost linearly with z, as the quantile of F does, and has no need of
    it. The residual is the difference of its value at the root and at z, times a factor that makes
    it agree with u(z) - u to first order.

    A step out of the bracket ends at its end. If the root is not on this side of it, it is not
    found; the next time a step leaves the bracket, this is halved.
    """
    tail = _cdf(u)
    log_tail = math.log(tail)
    y_root = math.sqrt(-2 * log_tail)
    factor = y_root * tail * SQRT_2PI * math.exp(0.5 * u * u)

    z = min(max(start, low), high)
    last_step = math.inf
    is_low_seen = is_high_seen = False

    for num_rounds in range(1, MAX_ROUNDS + 1):
        cdf, slope = yield z
        log_cdf = math.log(min(max(cdf, 1e-300), 1 - 1e-16))
        y = math.sqrt(-2 * log_cdf)
        difference = 2 * (log_cdf - log_tail) / (y_root + y)  # of y_root and y
        residual = difference * factor
        is_outside = (z >= high and residual < -1e-9) or (z <= low and residual > 1e-9)
        if is_outside or math.isnan(cdf):
            return math.nan

        if residual <= 0:
            low = z
            is_low_seen = True
        else:
            high = z
            is_high_seen = True

        step = difference * y * cdf * SQRT_2PI / slope if slope > 0 else math.inf
        is_slow = num_rounds > 6 and abs(step) > 0.5 * last_step
        last_step = abs(step)
        if low <= z - step <= high and not is_slow:
            z -= step
            is_done = abs(step) <= small_step
        else:
            z = _safe_step(low, high, residual, is_low_seen, is_high_seen)
            is_done = high - low <= 1e-15 * abs(z) + 1e-300

        if is_done:
            return z

    return math.nan


def _safe_step(
    low: float, high: float, residual: float, is_low_seen: bool, is_high_seen: bool
) -> float:
    """The bracket's end on the root's side, its middle once that end has been seen."""
    if residual <= 0 and not is_high_seen:
        return high
    if residual > 0 and not is_low_seen:
        return low
    return 0.5 * (low + high)


def _roots(searches: list[Search], evaluate: Evaluate) -> list[float]:
    """Returns what the searches return. They are evaluated together until all of them are done."""
    z = [next(search) for search in searches]
    rows = list(range(len(searches)))

    while rows:
        cdf, slope = evaluate(z)
        running = []
        for row in rows:
            try:
                z[row] = searches[row].send((cdf[row], slope[row]))
                running.append(row)
            except StopIteration as end:
                z[row] = end.value

        rows = running

    return z


Bracket = tuple[float, float, float]  # low, high, start


def _solve_dimension(
    mixture: _Mixture, u: list[float], brackets: list[Bracket], dtype: torch.dtype
) -> list[float]:
    """The mirrored roots, NaN where there is none in the bracket."""
    scale = (SQRT_HALF / mixture.inverse).amin(-1).view(-1).tolist()

    def solve(mixture: _Mixture, starts: list[float], small_step: float) -> list[float]:
        searches = [
            _search(x, low, high, start, small_step * s)
            for x, (low, high, _), start, s in zip(u, brackets, starts, scale, strict=True)
        ]
        return _roots(searches, mixture.evaluate)

    starts = [start for _, _, start in brackets]
    if mixture.loc.numel() > MANY:
        coarse = solve(mixture.coarse(), starts, COARSE_STEP)
        pairs = zip(coarse, starts, strict=True)
        starts = [start if math.isnan(root) else root for root, start in pairs]

    return solve(mixture, starts, SMALL_STEP[dtype])


# --------------------------------------------------------------------------------------------------
# The components near the root
# --------------------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """The components near the root in one dimension, and where the root is sought."""

    active: _Active
    loc: Tensor  # (n, K), mirrored
    below: list[float]  # the weight on the left of the window
    brackets: list[Bracket]
    reach: float  # scales from the bracket to what is left out; infinite if nothing is


def _crossing(histogram: Tensor, u: list[float]) -> tuple[Tensor, list[int]]:
    """Cumulative weights (n, B), and in which bin they reach Phi(u)."""
    total = histogram.cumsum(-1)
    target = torch.tensor([_cdf(x) for x in u], dtype=total.dtype).unsqueeze(-1) * total[:, -1:]
    return total, (total < target).sum(-1).clamp_(max=NUM_BINS - 1).tolist()


def _cdf(u: float) -> float:
    return 0.5 * math.erfc(-u * SQRT_HALF)


class _FirstDimension:
    """The windows of the first dimension, from the codebook's own intervals."""

    def __init__(self, weight: Tensor, mean: Tensor, bins: _Bins, u: list[float], sign: Tensor):
        self.mean, self.bins, self.sign = mean, bins, sign.unsqueeze(-1)
        self.is_mirrored = (sign < 0).tolist()
        self.weight = weight  # (n, V)
        histogram = torch.zeros(len(weight), NUM_BINS, dtype=torch.float64)
        histogram.index_add_(1, bins.bin_of, weight.double())
        if any(self.is_mirrored):
            histogram = torch.where(self.sign < 0, histogram.flip(-1), histogram)

        self.total, self.crossing = _crossing(histogram, u)
        self.span = NUM_BINS * bins.width / bins.max_scale

    def window(self, reach: float, slack: float) -> _Window:
        """The components within `reach` scales of a bracket of `slack` scales around the guess."""
        bins = self.bins
        slack = slack * bins.max_scale + bins.width
        num_bins = math.ceil(min(NUM_BINS, (reach * bins.max_scale + slack) / bins.width))
        below, brackets, indices = [], [], []
        for row, crossing in enumerate(self.crossing):
            first = max(0, crossing - num_bins)
            last = min(NUM_BINS - 1, crossing + num_bins)
            center = bins.lowest + (crossing + 0.5) * bins.width
            below.append(self.total[row, first - 1] / self.total[row, -1] if first else 0.0)
            if self.is_mirrored[row]:
                first, last = NUM_BINS - 1 - last, NUM_BINS - 1 - first
                center = -(bins.lowest + (NUM_BINS - 0.5 - crossing) * bins.width)

            brackets.append((center - slack, center + slack, center))
            indices.append(bins.order[bins.starts[first] : bins.starts[last + 1]])

        index = pad_sequence(indices, batch_first=True)
        weight = self.weight.gather(1, index).double().div_(self.total[:, -1:])
        if len(indices) > 1:
            counts = torch.tensor([len(x) for x in indices]).unsqueeze(-1)
            weight = weight * (torch.arange(index.shape[1]) < counts)

        active = _Active(index, weight, bins.scale[index])
        loc = _column(self.mean, 0, index).mul_(self.sign)
        reach = math.inf if num_bins >= NUM_BINS else reach
        return _Window(active, loc, [float(x) for x in below], brackets, reach)


def _column(mean: Tensor, i: int, index: Tensor) -> Tensor:
    """mean_ki (n, K) in float64 of the components k (n, K)."""
    return mean[:, i].index_select(0, index.flatten()).view(index.shape).double()


class _LaterDimension:
    """The windows of a dimension whose active components are known."""

    def __init__(self, active: _Active, loc: Tensor, u: list[float]):
        self.active, self.loc = active, loc
        low, high = loc.aminmax(dim=-1, keepdim=True)
        width = ((high - low) / NUM_BINS).clamp_(min=1e-30)
        place = ((loc - low) / width).long().clamp_(max=NUM_BINS - 1)
        histogram = torch.zeros(len(loc), NUM_BINS, dtype=torch.float64)
        histogram.scatter_add_(1, place, active.weight)

        _, crossing = _crossing(histogram, u)
        self.max_scale = active.scale.max().item()
        self.low = [x + y * self.max_scale for x, y in zip(low[:, 0].tolist(), u, strict=True)]
        self.high = high[:, 0].tolist()
        widths = width[:, 0].tolist()
        self.center = [
            x + (c + 0.5) * w for x, c, w in zip(low[:, 0].tolist(), crossing, widths, strict=True)
        ]
        self.width = max(widths)
        self.span = NUM_BINS * self.width / self.max_scale

    def window(self, reach: float, slack: float) -> _Window:
        """As in the first dimension."""
        rows = list(zip(self.low, self.high, self.center, strict=True))
        slack = slack * self.max_scale + self.width
        distance = reach * self.max_scale + slack
        if self.loc.shape[1] <= MANY or 4 * distance > NUM_BINS * self.width:
            return _Window(self.active, self.loc, [0.0] * len(rows), rows, math.inf)

        difference = self.loc - torch.tensor(self.center, dtype=self.loc.dtype).unsqueeze(-1)
        active, at = self.active.keep(difference.abs() <= distance)
        below = self.active.weight.mul(difference < -distance).sum(-1).tolist()
        brackets = [
            (max(low, center - slack), min(high, center + slack), center)
            for low, high, center in rows
        ]

        return _Window(active, self.loc.gather(1, at), below, brackets, reach)


def _solve_windows(
    dimension: _FirstDimension | _LaterDimension,
    u: list[float],
    rarest: list[float],
    min_scale: float,
    dtype: torch.dtype,
) -> tuple[_Active, list[float]]:
    """The components with their weights after this dimension, and the mirrored roots.

    The first window is as wide as it mostly has to be, the last one is the whole codebook. A window
    will do if the roots are in its bracket, and if what it leaves out is too far from that to have
    more than `rarest` of the weight.
    """
    reach = max(REACH[dtype], 7.0 - min(u))
    everything = dimension.span + 40.0
    for sizes in ((reach, GUESS_REACH), (2 * reach, reach), (everything, everything)):
        window = dimension.window(*sizes)
        mixture = _Mixture.make(window.active, window.loc, window.below)
        roots = _solve_dimension(mixture, u, window.brackets, dtype)
        joint = mixture.joint([_round(z, dtype) for z in roots])
        total = joint.sum(-1, keepdim=True).clamp_(min=MIN_DENSITY)
        left_out = math.exp(-0.5 * min(window.reach, 40.0) ** 2) / min_scale
        densities = total[:, 0].tolist()
        limits = zip(rarest, densities, strict=True)
        is_wide = window.reach == math.inf or all(left_out <= share * x for share, x in limits)
        if is_wide and not any(math.isnan(z) for z in roots):
            break

    # Less than MIN_DENSITY has underflowed: the row is not found.
    pairs = zip(roots, densities, strict=True)
    roots = [z if density > MIN_DENSITY else math.nan for z, density in pairs]
    return window.active._replace(weight=joint / total), roots


def _largest(active: _Active, rarest: list[float]) -> _Active:
    """The components that have more than `rarest` of a row's weight, shared among all dropped."""
    threshold = torch.tensor(rarest, dtype=torch.float64).unsqueeze(-1) / active.weight.shape[1]
    is_kept = active.weight > threshold
    is_worth_it = len(is_kept) == 1 or 4 * int(is_kept.sum(-1).max()) < 3 * is_kept.shape[1]
    return active.keep(is_kept)[0] if is_worth_it else active


# --------------------------------------------------------------------------------------------------
# Few components: Python's own floats
# --------------------------------------------------------------------------------------------------


class _FewMixture(NamedTuple):
    """`_Mixture` of one row in plain numbers, the components by their location."""

    # loc, 1 / (scale sqrt(2)), weight, weight / scale
    components: list[tuple[float, float, float, float]]

    def guess(self, u: float) -> float:
        """The root if the components were far apart."""
        rest = _cdf(u)
        for component in self.components:
            loc, inverse, weight, _ = component
            if rest < weight:
                break
            rest -= weight

        # Tukey's lambda distribution is a rough normal one.
        share = min(max(rest / weight, 0.0), 1.0)
        return loc + 4.91 * (share**0.14 - (1 - share) ** 0.14) * SQRT_HALF / inverse

    def bracket(self, u: float) -> tuple[float, float]:
        """The least and the greatest of the components' own roots."""
        roots = [loc + u * SQRT_HALF / inverse for loc, inverse, *_ in self.components]
        return min(roots), max(roots)

    def evaluate(self, z: list[float]) -> tuple[list[float], list[float]]:
        """An `Evaluate`."""
        (z,) = z
        cdf, slope = 0.0, 0.0
        for loc, inverse, weight, slope_weight in self.components:
            t = (loc - z) * inverse
            if t < 27.0:  # else both are 0
                cdf += weight * math.erfc(t)
                slope += slope_weight * math.exp(-t * t)

        return [0.5 * cdf], [slope]


def _round(z: float, dtype: torch.dtype) -> float:
    """The nearest number of the dtype."""
    if dtype == torch.float64 or not math.isfinite(z):
        return z

    mantissa, exponent = math.frexp(z)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def _solve_few(
    components: list[tuple[int, float, float]],
    means: list[list[float]],
    u: list[float],
    is_mirrored: list[bool],
    rarest: list[float],
    dtype: torch.dtype,
) -> tuple[list[float], int]:
    """The z of some last dimensions of one row, until a single component is left; and which one.

    Args:
        components: Index, weight and scale of each.
        means: The means of each in those dimensions.
        u: The mirrored noise there.
        is_mirrored: In which of the dimensions.
        rarest: The share of the weight that may be dropped after each.
        dtype: That of the result.
    """
    if not components:  # the row is lost already
        return [math.nan] * len(u), 0

    z = []
    for i, u_i in enumerate(u):
        if len(components) == 1:
            break

        sign = -1.0 if is_mirrored[i] else 1.0
        rows = [
            (sign * mean[i], SQRT_HALF / scale, weight, weight / scale)
            for (_, weight, scale), mean in zip(components, means, strict=True)
        ]
        mixture = _FewMixture(sorted(rows))
        small_step = SMALL_STEP[dtype] * min(scale for *_, scale in components)
        search = _search(u_i, *mixture.bracket(u_i), mixture.guess(u_i), small_step)
        (root,) = _roots([search], mixture.evaluate)
        root = _round(root, dtype)
        z.append(sign * root)

        joint = [x * math.exp(-(((loc - root) * inverse) ** 2)) for loc, inverse, _, x in rows]
        total = sum(joint)
        if not total > MIN_DENSITY:
            return [*z[:-1], math.nan], 0  # lost: the reference finds it

        threshold = rarest[i] * total / len(joint)
        kept = [k for k, x in enumerate(joint) if x > threshold]
        means = [means[k] for k in kept]
        components = [(components[k][0], joint[k] / total, components[k][2]) for k in kept]

    return z, components[0][0]


# --------------------------------------------------------------------------------------------------
# All dimensions
# --------------------------------------------------------------------------------------------------


def solve(u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """z (n, d) of u (n, d), and in which rows (n,) it was found.

    Args:
        u: Noise, float32 or float64.
        logits: Log-weights of the components (n, V).
        mean, log_scale: The codebook, (V, d) and (V,).
    """
    is_valid = (u.abs() <= MAX_NOISE).all(-1)  # False for NaN
    bins = kept(make_bins, mean, log_scale)
    if not math.isfinite(bins.lowest + bins.width + bins.max_scale):
        return torch.full_like(u, math.nan), torch.zeros_like(is_valid)

    u = torch.where(is_valid.unsqueeze(-1), u, 0.0)
    sign = torch.where(u > 0, -1.0, 1.0).double()
    noise = (-u.abs()).double().T.tolist()  # d lists of n
    rarest = _rarest(noise, MAX_DROPPED[u.dtype])
    z = torch.empty_like(u)
    weight = torch.exp(logits - logits.amax(-1, keepdim=True))
    active = _positive(weight, bins)

    i = 0
    while i < u.shape[1] and not _are_few(active):
        if active is None:
            dimension = _FirstDimension(weight, mean, bins, noise[0], sign[:, 0])
        else:
            loc = _column(mean, i, active.index).mul_(sign[:, i : i + 1])
            dimension = _LaterDimension(active, loc, noise[i])

        active, roots = _solve_windows(dimension, noise[i], rarest[i], bins.min_scale, u.dtype)
        z[:, i] = torch.tensor(roots, dtype=torch.float64) * sign[:, i]
        active = _largest(active, rarest[i])
        i += 1

    if i < u.shape[1]:
        z[:, i:] = _finish(active, mean, bins.scale, u, noise, rarest, i)

    return z, z.isfinite().all(-1) & is_valid


def _are_few(active: _Active | None) -> bool:
    """True of components that Python's own floats are meant for; None are all of the codebook."""
    return active is not None and active.index.numel() <= max(FEW, len(active.index))


def _positive(weight: Tensor, bins: _Bins) -> _Active | None:
    """The components that have any weight, if these are few: of steered mixtures."""
    is_positive = weight > 0
    if 8 * int(is_positive.sum(-1).max()) > weight.shape[1]:
        return None

    weight = weight.double()
    weight = weight / weight.sum(-1, keepdim=True)
    every = torch.arange(weight.shape[1]).expand_as(weight)
    return _Active(every, weight, bins.scale.expand_as(weight)).keep(is_positive)[0]


def _finish(
    active: _Active,
    mean: Tensor,
    scale: Tensor,
    u: Tensor,
    noise: list[list[float]],
    rarest: list[list[float]],
    first: int,
) -> Tensor:
    """z in the dimensions from `first` on, (n, d - first), by `_solve_few`."""
    rows = zip(*(x.tolist() for x in (*active, mean[active.index, first:])), strict=True)
    size = u.shape[1] - first
    found, ends, last = [], [], []
    for row, (index, weight, scales, means) in enumerate(rows):
        kept = [k for k, x in enumerate(weight) if x > 0]
        z, component = _solve_few(
            [(index[k], weight[k], scales[k]) for k in kept],
            [means[k] for k in kept],
            [x[row] for x in noise[first:]],
            [x > 0 for x in u[row, first:].tolist()],
            [x[row] for x in rarest[first:]],
            u.dtype,
        )
        found.append(z + [0.0] * (size - len(z)))
        ends.append(len(z))
        last.append(component)

    # One component is left in the dimensions behind.
    component = torch.tensor(last)
    rest = mean[component, first:] + scale[component].unsqueeze(-1) * u[:, first:]
    is_found = torch.arange(size) < torch.tensor(ends).unsqueeze(-1)
    return torch.where(is_found, torch.tensor(found, dtype=torch.float64), rest.double()).to(
        u.dtype
    )


def _rarest(noise: list[list[float]], max_dropped: float) -> list[list[float]]:
    """The share of a row's weight that may be dropped after each dimension: d lists of n.

    It is `max_dropped` of the rarest tail in the dimensions behind.
    """
    shares = [[max_dropped] * len(noise[0])]
    for row in reversed(noise[1:]):
        shares.append([min(x, max_dropped * _cdf(u)) for x, u in zip(shares[-1], row, strict=True)])

    return shares[::-1]


class _MixtureRosenblattActive(MixtureRosenblattInverse):
    @staticmethod
    def forward(ctx, u, logits, mean, log_scale):
        z = torch.empty_like(u)
        is_found = torch.empty(len(u), dtype=torch.bool)
        for rows in chunks(len(u), CHUNK_ELEMENTS // len(mean)):
            z[rows], is_found[rows] = solve(u[rows], logits[rows], mean, log_scale)

        reference = partial(mixture_rosenblatt_inverse_reference, mean=mean, log_scale=log_scale)
        fill_missing(z, is_found, reference, u, logits)
        ctx.save_for_backward(z, logits, mean, log_scale)
        return z


def mixture_rosenblatt_inverse(
    u: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor
) -> Tensor:
    return _MixtureRosenblattActive.apply(u, logits, mean, log_scale)
