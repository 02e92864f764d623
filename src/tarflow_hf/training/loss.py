"""The loss of a batch, and what it draws: the latents' noise, and the tokens that are observed."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedModel

from ..baseline import is_discrete, prepend_start
from ..noise import seed_of

# One for all sequences of a batch, or one for each.
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


class StepDraws(NamedTuple):
    """The random part of the loss of some sequences (B, T).

    Attributes:
        observed_mask: The tokens (B, T) that a conditional model is told; None for other models.
        latent_noise: The N(0, I) noise (B, T, d) of the latents; None leaves it to the model.
    """

    observed_mask: Tensor | None = None
    latent_noise: Tensor | None = None

    def cut(self, length: int) -> "StepDraws":
        """The draws of the first `length` tokens of each sequence."""
        return StepDraws(*(None if draw is None else draw[:, :length] for draw in self))


def draw_step(
    model: PreTrainedModel, shape: tuple[int, int], generator: Generators | None = None
) -> StepDraws:
    """Draws what the loss of sequences of some shape needs: first the mask, then the noise.

    Args:
        model: Not wrapped. A discrete model needs nothing.
        shape: (B, T), T a multiple of the patch size.
        generator: Source of the randomness. With one for each sequence, what a sequence draws does
            not depend on the others. By default the global one.
    """
    if is_discrete(model):
        return StepDraws()

    config = model.config
    mask = draw_observed_mask(shape, config.patch_size, generator) if config.conditional else None
    size = shape[1], config.latent_size

    if generator is None:
        noise = None
    elif isinstance(generator, Sequence):
        noise = torch.stack([torch.randn(size, generator=g, device=g.device) for g in generator])
    else:
        noise = torch.randn(shape[0], *size, generator=generator, device=generator.device)

    return StepDraws(mask, noise)


def draw_observed_mask(
    shape: tuple[int, int], patch_size: int = 1, generator: Generators | None = None
) -> Tensor:
    """Draws the tokens (B, T) that a conditional model is told in training.

    Each sequence observes whole patches, with a probability of one third each

    - nothing;
    - a prefix, whose length is uniform between one position and all but one;
    - spans, of which a share r is observed. Two positions are cut apart with probability c; r and c
      are drawn from U(0, 1).

    A sequence that would be observed as a whole observes nothing.

    Args:
        shape: (B, T), T a multiple of `patch_size`.
        generator: Source of the randomness, or one for each sequence. By default the global one.

    Returns:
        Boolean mask (B, T), True where observed, on the generator's device.

    Example:
        >>> draw_observed_mask((3, 12), 2, torch.Generator().manual_seed(5)).int()
        tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    num_sequences = shape[0]
    num_positions = shape[1] // patch_size

    def uniform(num_columns: int) -> Tensor:
        if isinstance(generator, Sequence):
            return torch.stack(
                [torch.rand(num_columns, generator=g, device=g.device) for g in generator]
            )

        device = None if generator is None else generator.device
        return torch.rand(num_sequences, num_columns, generator=generator, device=device)

    kind, share, cut, length = uniform(4).split(1, -1)
    position = torch.arange(num_positions, device=kind.device)
    prefix = position < 1 + (length * (num_positions - 1)).long()

    span = (uniform(num_positions) < cut).cumsum(-1).clamp(max=num_positions - 1)
    spans = (uniform(num_positions) < share).gather(-1, span)

    observed = torch.where(kind < 1 / 3, False, torch.where(kind < 2 / 3, prefix, spans))
    observed = observed & ~observed.all(-1, keepdim=True)

    return observed.repeat_interleave(patch_size, -1)


def compute_loss(
    model: torch.nn.Module,
    input_ids: Tensor,
    draws: StepDraws | None = None,
    num_flows: int | None = None,
    num_tokens: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Nats per token of a batch (B, T): -ELBO of a TarFlowLM, the cross-entropy of a discrete model.

    Those of a conditional TarFlowLM are nats per missing token, given the observed ones.

    Args:
        model: Also one that is wrapped for training.
        draws: By `draw_step`, which is called by default.
        num_flows: Cuts the stack after its first flows.
        num_tokens: Divides the nats, in place of the number of the (missing) tokens.
        attention_mask: 1 for real tokens and 0 for padding on the right, (B, T).
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if is_discrete(bare):
        inputs = prepend_start(bare, input_ids)
        labels = inputs
        options = {}
        if attention_mask is not None:  # no real token sees the padding on its right
            labels = prepend_start(bare, input_ids.masked_fill(attention_mask == 0, -100))
        if num_tokens is not None:
            options["num_items_in_batch"] = num_tokens

        return model(input_ids=inputs, labels=labels, use_cache=False, **options).loss

    mask, noise = draw_step(bare, input_ids.shape) if draws is None else draws
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=input_ids,
        observed_mask=None if mask is None else mask.to(input_ids.device),
        latent_noise=noise,
        num_flows=num_flows,
    )

    return output.loss if num_tokens is None else -output.elbo.sum() / num_tokens


def mean_missing_tokens(parts: Sequence[StepDraws], accelerator: Accelerator) -> Tensor | None:
    """The missing tokens in a part of a conditional model's step; None for other models.

    It is the mean over the step's parts and the processes. Divided by it, the parts' nats make a
    loss that is the mean over all missing tokens of the step.
    """
    masks = [draws.observed_mask for draws in parts if draws.observed_mask is not None]
    if not masks:
        return None

    count = torch.zeros((), device=accelerator.device)
    for mask in masks:
        count += (~mask).sum()

    return accelerator.reduce(count, "mean") / len(parts)


class RowNoise:
    """A generator for each sequence of a step.

    It is seeded by the run, the step and the sequence's place in the step's batch. So a resumed run
    draws what the uninterrupted one did, and what a sequence draws depends neither on the number of
    processes nor on that of the parts in which a step is computed.
    """

    def __init__(self, seed: int, num_rows: int, first_row: int, device: torch.device):
        self.seed, self.first_row = seed, first_row
        self.generators = [torch.Generator(device) for _ in range(num_rows)]

    def at(self, step: int, first_row: int) -> list[torch.Generator]:
        """The generators of the sequences that follow this process's `first_row` in the step.

        They are the same objects in every call.
        """
        for row, generator in enumerate(self.generators, self.first_row + first_row):
            generator.manual_seed(seed_of(self.seed, step, row))
        return self.generators
