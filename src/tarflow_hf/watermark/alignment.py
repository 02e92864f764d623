"""The likelihood ratio of a key, over alignments of a text with the key's numbers, and its p-value."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .evidence import Evidence

# How near the noise that wrote a text may be to what is inferred.
CORRELATIONS = (0.99, 0.85, 0.6, 0.4)

# The numbers of reference keys after each round. The next round runs if fewer than so many of them
# are above.
ROUNDS, FEW = (31, 127, 1023), (8, 2, 0)

# Evidence that needs no reference keys: all of them stay below but for a probability of 1e-3, so that
# P(p <= x) <= x + 1e-9.
DECISIVE = math.log(1e6)

# Ratios that are computed at once.
MAX_RATIOS = 2**23

# The stretch of text by which a stream is chosen.
WINDOW = 16


class Editing(NamedTuple):
    """A way in which a text may have been edited: probabilities of each edit at a token."""

    weight: float
    correlated: tuple[float, ...]  # each of the CORRELATIONS; edits before a token blur its context
    replaced: float
    inserted: float
    deleted: tuple[float, ...]  # one token, two, three before this one
    jumped: float  # any number of them
    ended: float  # what follows is not marked


# Not at all or hardly, by some tenths, and by a third of its tokens. From the shipped checkpoint:
# each about maximises the mean of log L, of texts as they were written, and with 0.1 and 0.3 of
# their tokens replaced.
EDITINGS = (
    Editing(0.6, (0.5, 0.25, 0.2, 0.05), 0.1, 0.002, (0.002, 0.0005, 0.0005), 0.001, 0.002),
    Editing(0.25, (0.1, 0.3, 0.35, 0.25), 0.25, 0.05, (0.05, 0.01, 0.003), 0.002, 0.002),
    Editing(0.15, (0.02, 0.18, 0.35, 0.45), 0.4, 0.15, (0.15, 0.05, 0.02), 0.002, 0.002),
)


class Alignment:
    """The average of likelihood ratios over alignments of a text with a key's numbers.

    Args:
        evidence: The evidence of the text, by `read_evidence`.
        max_offset: The number of the key's numbers that may lie before the text.
    """

    def __init__(self, evidence: Evidence, max_offset: int):
        self.patch_size, num_tokens, self.latent_size = evidence.mean.shape
        self.num_tokens = num_tokens
        self.first = evidence.first
        self.num_places = max_offset + num_tokens + num_tokens // 2 + 1

        forms = [_quadratic_form(evidence, correlation) for correlation in CORRELATIONS]
        self.forms = tuple(torch.cat(each) for each in zip(*forms, strict=True))
        self.rough_form = _quadratic_form(evidence, 0.85)

        # Half of the weight is on a text that begins with the first number; the rest on one whose
        # beginning was cut off, or that stands behind a prompt.
        place = torch.arange(self.num_places)
        cut = (place <= max_offset) / (place + 1.0)
        behind = (torch.arange(num_tokens) > 0) / (torch.arange(num_tokens) + 1.0)
        self.begin = 0.25 * cut / cut.sum()
        self.begin[0] += 0.5
        self.start = (0.25 * behind / behind.sum().clamp(min=0.5)).tolist()

    def log_p_value(self, observed: float, num_streams: int, generator: torch.Generator) -> float:
        """Returns log p in nats for a key with evidence log E, by up to 1,023 reference keys."""
        if observed > DECISIVE:
            return -observed

        uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        num_keys, above = 0, 0
        for total, few in zip(ROUNDS, FEW, strict=True):
            shape = total - num_keys, num_streams, self.num_places, self.latent_size
            above += int((self.log_ratio_of_fresh(shape, generator) > observed).sum())
            num_before, num_keys = num_keys, total
            if above >= few:
                break

        log_p = math.log(rank_p_value(above, uniform, num_keys, num_before))
        return log_p if above else min(-math.log(num_keys + 1), -observed)

    def log_ratio_of_fresh(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """log E of fresh keys, of noise (num_keys, num_streams, num_places, d)."""
        noise = torch.randn(shape, generator=generator)
        rows = max(1, MAX_RATIOS // (shape[1] * self.num_tokens * self.num_places))
        return torch.cat([self.log_ratio(part) for part in noise.split(rows)])

    def log_ratio(self, noise: Tensor) -> Tensor:
        """log E of keys, (num_keys,) in nats, of their noise (num_keys, num_streams, num_places, d).

        The first stream of a key counts, and the one of the others that fits some stretch of text
        best. Leaving out the rest only makes E smaller.
        """
        num_keys, num_streams = noise.shape[:2]
        weight = 1 / (torch.arange(num_streams) + 1.0)
        log_weight = (weight / weight.sum()).log()
        streams = torch.zeros(num_keys, 1, dtype=torch.long)
        if num_streams > 1:
            best = 1 + self._fit(noise[:, 1:]).argmax(-1, keepdim=True)
            streams = torch.cat([streams, best], -1)

        noise = noise.gather(1, streams[..., None, None].expand(-1, -1, *noise.shape[2:]))
        log_ratios = self._quadratic(noise.flatten(0, 1), self.forms, len(CORRELATIONS))
        ratios = log_ratios.clamp_(max=60.0).exp_()
        log_average = self._forward(ratios).reshape(streams.shape)
        return torch.logsumexp(log_average + log_weight[streams], -1)

    def _fit(self, noise: Tensor) -> Tensor:
        """The fit (...) of streams (..., J, d) to the stretch of the text that they fit best."""
        ratios = self._quadratic(noise.flatten(0, -3), self.rough_form, 1).squeeze(1)
        ratios = ratios.clamp_(-2.0, 6.0)

        # Row t moves by t, so that stretches of text and key stand in columns.
        diagonals = F.pad(ratios.flatten(1), (0, self.num_tokens))
        diagonals = diagonals.unflatten(1, (self.num_tokens, -1))
        sums = F.pad(diagonals.cumsum(1), (0, 0, 1, 0))
        window = min(WINDOW, self.num_tokens)
        fit = (sums[:, window:] - sums[:, :-window]).amax((1, 2))
        return fit.reshape(noise.shape[:-2])

    def _quadratic(self, noise: Tensor, form: tuple[Tensor, Tensor], count: int) -> Tensor:
        """The log ratios (g, count, n, J) of numbers (g, J, d), by some quadratic forms."""
        features = torch.cat([noise, noise.square()], -1)
        ratios = torch.baddbmm(form[1], form[0].expand(len(noise), -1, -1), features.mT)
        return self._of_phase(ratios.unflatten(1, (count, self.patch_size, -1)))

    def _of_phase(self, ratios: Tensor) -> Tensor:
        """Those (g, C, n, J) of the ratios (g, C, P, n, J) whose phase is that of their number.

        Number j was written at place j mod P of a patch.
        """
        if self.patch_size == 1:
            return ratios.squeeze(2)

        token = torch.arange(self.num_tokens).unsqueeze(-1) + self.first
        phase = (token - torch.arange(self.num_places)) % self.patch_size  # (n, J)
        return ratios.gather(2, phase.expand(*ratios.shape[:2], 1, -1, -1)).squeeze(2)

    def _forward(self, ratios: Tensor) -> Tensor:
        """log of the average over alignments, (g,), of the ratios (g, C, n, J) of tokens and numbers.

        The state (g, e, J) is the weight of all alignments in which number j stands at token t or
        was the last before it, for each way of editing. No alignment uses a number twice.
        """
        weight, correlated, replaced, inserted, deleted, jumped, ended = (
            torch.tensor(column) for column in zip(*EDITINGS, strict=True)
        )
        kept = 1 - inserted - deleted.sum(-1) - jumped - ended
        moves = torch.cat([kept.unsqueeze(-1), deleted], -1)
        moves = moves.unsqueeze(-1).unbind(1)  # of one number, two, ...: (e, 1) each
        inserted, jumped = inserted.unsqueeze(-1), jumped.unsqueeze(-1) / self.num_places

        is_kept = (1 - replaced).unsqueeze(-1) * correlated
        ratios = (is_kept @ ratios.flatten(2)).unflatten(-1, ratios.shape[2:])
        ratios = ratios.add_(replaced[:, None, None]).unbind(2)  # (g, e, J) for each token

        # In front of the state lie zeros, from which numbers move to the first places.
        shape = len(ratios[0]), len(EDITINGS)
        padded = torch.zeros(*shape, len(moves) + self.num_places)
        state = padded[..., len(moves) :]
        state.copy_(ratios[0] * self.begin)
        behind, total, log_scale = torch.zeros(3, *shape)

        for t in range(self.num_tokens):
            if t > 0:
                behind = behind + ended * total
                moved = padded[..., len(moves) - 1 : -1].cumsum(-1).mul_(jumped)
                for step, move in enumerate(moves, start=1):
                    moved.addcmul_(move, padded[..., len(moves) - step :][..., : self.num_places])

                moved[..., 0] += self.start[t] * torch.exp(-log_scale)
                state.mul_(inserted).addcmul_(ratios[t], moved)

            scale = state.sum(-1).clamp(min=1e-30)
            state.div_(scale.unsqueeze(-1))
            total, behind = state.sum(-1), behind / scale
            log_scale = log_scale + scale.log()

        log_average = torch.log(total + behind) + log_scale
        return torch.logsumexp(log_average + weight.log(), -1)


def _quadratic_form(evidence: Evidence, correlation: float) -> tuple[Tensor, Tensor]:
    """log L of a correlation, as a form (P n, 2 d) of [k, k^2] and a constant (P n, 1)."""
    mean = correlation * evidence.mean
    variance = correlation**2 * evidence.variance + 1 - correlation**2
    form = torch.cat([mean / variance, 0.5 - 0.5 / variance], -1)
    logs = variance.log() + mean.square() / variance
    constant = -0.5 * logs.sum(-1, keepdim=True)
    return form.flatten(0, 1), constant.flatten(0, 1)


def rank_p_value(above: int, uniform: float, num_keys: int, num_before: int) -> float:
    """The p-value of a key that has some of n reference keys above it, continuous and uniform.

    The last of the keys were drawn because few of those before, c of m, were above. Before anything
    is seen all ranks r = 0, ..., n are equally likely, and c is hypergeometric given r. So
    P(rank < r, c few) + U P(rank = r, c few) is uniform between 0 and P(c few); a test that ended
    in the round before has the rest.

    Args:
        above: r.
        uniform: U, uniform on (0, 1).
        num_keys: n.
        num_before: m, 0 in the first round.

    Example:
        >>> rank_p_value(3, 0.5, 31, 0) == 3.5 / 32
        True
    """
    few = FEW[ROUNDS.index(num_before)] if num_before else 1
    shares = []
    for rank in range(above + 1):
        ways = sum(
            math.comb(num_before, number) * math.comb(num_keys - num_before, rank - number)
            for number in range(min(few, rank + 1))
        )
        shares.append(ways / math.comb(num_keys, rank) / (num_keys + 1))

    return sum(shares[:-1]) + uniform * shares[-1]
