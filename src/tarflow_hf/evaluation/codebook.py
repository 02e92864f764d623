"""The codebook: how well it gives a text back, and how far apart its entries are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..modeling.codebook import Gaussians
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .likelihood import latent_noise, ratio_of_sums

MAX_SCORES = 2**24  # of tokens by entries of the codebook, at once


@dataclass(frozen=True)
class Reconstruction:
    """How well the latents of a text give it back: the most likely token under p(x | z), z ~ q(z |
    x).
    """

    accuracy: float  # share of the tokens that come back
    standard_error: float  # over sequences
    num_tokens: int
    num_text_tokens: int  # different tokens in the text
    num_used_tokens: int  # different tokens that came back: fewer where entries of the codebook have fallen together


@torch.no_grad()
def reconstruction(
    model: TarFlowLMModel,
    sequences: Iterable[dict[str, Tensor]],
    max_sequences: int | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Encodes, decodes, and counts what comes back. With the same seed, by the latents that
    `likelihood` scores.

    Raises:
        ValueError: There is no sequence.
    """
    codebook, correct, num_tokens = model.codebook(), [], []
    in_text, used = (
        torch.zeros(len(codebook.mean), dtype=torch.bool, device=model.device) for _ in range(2)
    )

    for index, sequence in enumerate(islice(sequences, max_sequences)):
        ids = sequence["input_ids"].to(model.device)
        noise = latent_noise(model, len(ids), [(seed, index)])[0, 0]
        count = int(sequence.get("num_tokens", len(ids)))
        ids, latents = ids[:count], codebook.sample(ids, noise=noise)[:count]
        decoded = most_likely_tokens(codebook, latents)
        in_text[ids], used[decoded] = True, True
        correct.append((decoded == ids).sum())
        num_tokens.append(count)

    if not correct:
        raise ValueError("There is no sequence to reconstruct.")

    accuracy, standard_error = ratio_of_sums(torch.stack(correct).cpu(), torch.tensor(num_tokens))
    return Reconstruction(
        accuracy, standard_error, sum(num_tokens), int(in_text.sum()), int(used.sum())
    )


def most_likely_tokens(codebook: Gaussians, latents: Tensor) -> Tensor:
    """argmax_k p(x = k | z): latents (n, d) to ids (n,), a part of them at a time."""
    rows = max(1, MAX_SCORES // len(codebook.mean))
    return torch.cat([codebook.log_prob_all(part).argmax(-1) for part in latents.split(rows)])


@dataclass(frozen=True)
class CodebookState:
    """Where the entries N(mean_k, scale_k^2 I) of a codebook are, and how far apart."""

    num_entries: int
    latent_size: int
    scale_min: float
    scale_mean: float
    scale_max: float
    nearest_distance_min: float  # see `nearest_distances`
    nearest_distance_median: float


@torch.no_grad()
def codebook_state(codebook: Gaussians) -> CodebookState:
    """What a codebook looks like; of a single entry the distances are NaN."""
    scale, distance = codebook.log_scale.exp(), nearest_distances(codebook)
    return CodebookState(
        num_entries=len(scale),
        latent_size=codebook.mean.shape[1],
        scale_min=scale.min().item(),
        scale_mean=scale.mean().item(),
        scale_max=scale.max().item(),
        nearest_distance_min=distance.min().item(),
        nearest_distance_median=distance.median().item(),
    )


def nearest_distances(codebook: Gaussians) -> Tensor:
    """min_{j != k} |mean_j - mean_k| / ((scale_j + scale_k) / 2), (K,): how many scales away the
    nearest entry is.

    At 2 r, two equally scaled entries are taken for each other with probability Phi(-r).

    Example:
        >>> nearest_distances(Gaussians(torch.tensor([[0.0], [3.0], [10.0]]), torch.tensor([1.0, 2.0, 2.0]).log()))
        tensor([2.0000, 2.0000, 3.5000])
    """
    mean, scale = codebook.mean, codebook.log_scale.exp()
    if len(mean) == 1:
        return mean.new_full((1,), math.nan)

    index, nearest = torch.arange(len(mean), device=mean.device), []
    for part in index.split(max(1, MAX_SCORES // len(mean))):
        # By differences, not by products: entries may be much closer to each other than to the
        # origin.
        distance = torch.cdist(mean[part], mean, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance / ((scale[part, None] + scale) / 2)
        nearest.append(distance.masked_fill(part[:, None] == index, math.inf).amin(-1))

    return torch.cat(nearest)
