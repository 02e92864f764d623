"""The codebook: how well it gives a text back, and how far apart its entries are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..modeling.codebook import MAX_SCORES, Gaussians
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..noise import latent_noise
from .likelihood import num_tokens_of, ratio_of_sums


@dataclass(frozen=True)
class Reconstruction:
    """The most likely tokens under p(x | z), z ~ q(z | x), compared with the text x.

    Attributes:
        accuracy: The share of the tokens that come back.
        standard_error: The standard error of the accuracy, over the sequences.
        num_tokens: The number of tokens in the text.
        num_text_tokens: The number of different tokens in the text.
        num_used_tokens: The number of different tokens that came back. It is smaller if entries of
            the codebook have fallen together.
    """

    accuracy: float
    standard_error: float
    num_tokens: int
    num_text_tokens: int
    num_used_tokens: int


@torch.no_grad()
def reconstruction(
    model: TarFlowLMModel,
    sequences: Iterable[dict[str, Tensor]],
    max_sequences: int | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Encodes and decodes a text, and counts the tokens that come back.

    With the seed of `likelihood` it decodes the latents that are scored there.

    Raises:
        ValueError: If there is no sequence.
    """
    codebook = model.codebook()
    correct, num_tokens = [], []
    in_text = torch.zeros(len(codebook.mean), dtype=torch.bool, device=model.device)
    used = torch.zeros_like(in_text)

    for index, sequence in enumerate(islice(sequences, max_sequences)):
        ids = sequence["input_ids"].to(model.device)
        noise = latent_noise(model, len(ids), [(seed, index)])[0, 0]
        latents = codebook.sample(ids, noise=noise)

        count = num_tokens_of(sequence)
        ids, latents = ids[:count], latents[:count]
        decoded = codebook.most_likely_token(latents)

        in_text[ids] = True
        used[decoded] = True
        correct.append((decoded == ids).sum())
        num_tokens.append(count)

    if not correct:
        raise ValueError("There is no sequence to reconstruct.")

    accuracy, standard_error = ratio_of_sums(torch.stack(correct).cpu(), torch.tensor(num_tokens))
    return Reconstruction(
        accuracy, standard_error, sum(num_tokens), int(in_text.sum()), int(used.sum())
    )


@dataclass(frozen=True)
class CodebookState:
    """The entries N(mean_k, scale_k^2 I) of a codebook: their size, and their `nearest_distances`."""

    num_entries: int
    latent_size: int
    scale_min: float
    scale_mean: float
    scale_max: float
    nearest_distance_min: float
    nearest_distance_median: float


@torch.no_grad()
def codebook_state(codebook: Gaussians) -> CodebookState:
    """Measures a codebook. The distances of a single entry are NaN."""
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
    """The distance of each entry's nearest neighbour, in scales, (K,).

        min_{j != k} |mean_j - mean_k| / ((scale_j + scale_k) / 2)

    At a distance of 2 r, two entries of equal scale are taken for each other with probability
    Phi(-r).

    Example:
        >>> nearest_distances(Gaussians(torch.tensor([[0.0], [3.0], [10.0]]), torch.tensor([1.0, 2.0, 2.0]).log()))
        tensor([2.0000, 2.0000, 3.5000])
    """
    mean, scale = codebook.mean, codebook.log_scale.exp()
    if len(mean) == 1:
        return mean.new_full((1,), math.nan)

    index = torch.arange(len(mean), device=mean.device)
    nearest = []

    for part in index.split(max(1, MAX_SCORES // len(mean))):
        # By differences, not by products: entries may be much closer to each other than to the
        # origin.
        distance = torch.cdist(mean[part], mean, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance / ((scale[part, None] + scale) / 2)
        nearest.append(distance.masked_fill(part[:, None] == index, math.inf).amin(-1))

    return torch.cat(nearest)
