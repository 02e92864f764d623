"""Random numbers that follow from what they are for, whatever else is drawn beside them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .modeling.modeling_tarflowlm import TarFlowLMModel


def seed_of(*words: int) -> int:
    """A seed of 64 bits that follows from some non-negative integers, such as a run's and a step's.

    Seeds of different words are independent of each other (`numpy.random.SeedSequence`).

    Example:
        >>> seed_of(0, 1) == seed_of(0, 1) != seed_of(1, 0)
        True
    """
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def latent_noise(
    model: TarFlowLMModel, length: int, seeds: Sequence[Sequence[int]], num_samples: int = 1
) -> Tensor:
    """N(0, I) noise (S, B, T, d) for the latents of B sequences of T tokens.

    Args:
        model: Its latent size is d, and the noise is drawn on its device.
        length: T, in tokens.
        seeds: The words of `seed_of` for each of the B sequences.
        num_samples: S.
    """
    shape = num_samples, length, model.config.latent_size
    rows = []

    for words in seeds:
        generator = torch.Generator(model.device).manual_seed(seed_of(*words))
        rows.append(torch.randn(shape, generator=generator, device=model.device))

    return torch.stack(rows, 1)
