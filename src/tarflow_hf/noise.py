"""Random numbers that follow from what they are for, whatever else is drawn beside them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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


def check_same_space(
    a: TarFlowLMModel,
    b: TarFlowLMModel,
    tokenizer_a: PreTrainedTokenizerBase | None = None,
    tokenizer_b: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raises a ValueError unless two models read the same noise and write the same tokens.

    Noise of one means something to the other if a token has as many numbers in both (`latent_size`),
    they come in the same pieces (`patch_size`), and each token id is the same token, which only
    their tokenizers tell.
    """
    for name in ("vocab_size", "latent_size", "patch_size"):
        sizes = [getattr(model.config, name) for model in (a, b)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Two models that differ in {name}, {sizes[0]} and {sizes[1]}, cannot share noise."
            )

    if tokenizer_a is None or tokenizer_b is None:
        return

    vocabularies = [tokenizer.get_vocab() for tokenizer in (tokenizer_a, tokenizer_b)]
    if vocabularies[0] != vocabularies[1]:
        differing = {*vocabularies[0].items()} ^ {*vocabularies[1].items()}
        tokens = sorted({token for token, _ in differing})
        raise ValueError(
            f"Two models whose vocabularies differ, in {len(tokens)} tokens such as {tokens[:3]}, cannot share noise: "
            "it says other tokens."
        )
