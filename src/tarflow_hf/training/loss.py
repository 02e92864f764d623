"""The loss of a batch, and the randomness that it takes: masks and the latents' noise."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    extract_model_from_parallel,
)
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from ..baseline import prepend_start
from ..modeling.modeling_tarflowlm import TarFlowLMModel

Generators: TypeAlias = (
    torch.Generator | Sequence[torch.Generator]
)  # one for all sequences of a batch, or one for each


def compute_loss(
    model: torch.nn.Module,
    input_ids: Tensor,
    generator: Generators | None = None,
    num_flows: int | None = None,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """Nats per token of a batch (B, T): minus the ELBO of a TarFlowLM, the cross-entropy of a
    discrete model.

    Of a conditional TarFlowLM they are nats per missing token, given those that
    `draw_observed_mask` observes.

    Args:
        generator: Source of the latents' noise. With one for each sequence, what a sequence draws
            does not depend on the others beside it.
        num_flows: Of the stack cut after its first flows.
        num_tokens: What the nats of a TarFlowLM are divided by, in place of the number of tokens
            that they are of.
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(bare, TarFlowLMModel):
        options = {"num_flows": num_flows}
        if bare.config.conditional:
            device = input_ids.device if generator is None else _device(generator)
            mask = draw_observed_mask(input_ids.shape, bare.config.patch_size, generator, device)
            options["observed_mask"] = mask.to(input_ids.device)

        if isinstance(generator, Sequence):
            size = input_ids.shape[1], bare.config.latent_size
            options["latent_noise"] = torch.stack(
                [torch.randn(size, generator=g, device=g.device) for g in generator]
            )
        else:
            options["generator"] = generator

        output = model(input_ids=input_ids, labels=input_ids, **options)
        return output.loss if num_tokens is None else -output.elbo.sum() / num_tokens

    inputs = prepend_start(bare, input_ids)
    return model(input_ids=inputs, labels=inputs, use_cache=False).loss


def _device(generator: Generators) -> torch.device:
    return generator[0].device if isinstance(generator, Sequence) else generator.device


def draw_observed_mask(
    shape: tuple[int, int],
    patch_size: int = 1,
    generator: Generators | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens (B, T) a conditional model is told in training: whole patches, of each sequence
    on its own.

    With a probability of one third each: nothing; a prefix, all lengths from one position to all
    but one alike; spans, of which a share r is observed, with a cut between two positions with
    probability c, where r and c are drawn from U(0, 1). Where that would observe everything,
    nothing is observed.

    Args:
        shape: (B, T), T a multiple of `patch_size`.
        generator: Source of the randomness, on `device`, or one for each sequence; the global one
            by default.

    Returns:
        Boolean mask (B, T), True where observed.

    Example:
        >>> draw_observed_mask((3, 12), 2, torch.Generator().manual_seed(5)).int()
        tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    num_sequences, num_positions = shape[0], shape[1] // patch_size

    def uniform(num_columns: int) -> Tensor:
        if isinstance(generator, Sequence):
            return torch.stack(
                [torch.rand(num_columns, generator=g, device=g.device) for g in generator]
            )
        return torch.rand(num_sequences, num_columns, generator=generator, device=device)

    kind, share, cut, length = uniform(4).split(1, -1)
    position = torch.arange(num_positions, device=kind.device)
    prefix = position < 1 + (length * (num_positions - 1)).long()
    span = (uniform(num_positions) < cut).cumsum(-1).clamp(max=num_positions - 1)
    spans = (uniform(num_positions) < share).gather(-1, span)
    observed = torch.where(kind < 1 / 3, False, torch.where(kind < 2 / 3, prefix, spans))
    observed = observed & ~observed.all(-1, keepdim=True)

    return observed.repeat_interleave(patch_size, -1)


class RowNoise:
    """A generator for each sequence of a step, seeded by run, step and the sequence's place in the
    step's batch.

    So a resumed run draws what the uninterrupted one did, and neither the number of processes nor
    that of the parts in which a step is computed changes what a sequence draws.
    """

    def __init__(self, seed: int, num_rows: int, first_row: int, device: torch.device):
        self.seed, self.first_row = seed, first_row
        self.generators = [torch.Generator(device) for _ in range(num_rows)]

    def at(self, step: int, first_row: int) -> list[torch.Generator]:
        """Of the sequences that follow the `first_row` of this process in the step."""
        for row, generator in enumerate(self.generators, self.first_row + first_row):
            seed = np.random.SeedSequence([self.seed, step, row]).generate_state(1, np.uint64)[0]
            generator.manual_seed(int(seed))
        return self.generators


def mean_missing_tokens(
    model: PreTrainedModel,
    noise: RowNoise,
    step: int,
    num_tokens: int,
    num_parts: int,
    accelerator: Accelerator,
) -> Tensor:
    """The missing tokens in a part of a conditional model's step, on average over its parts and the
    processes.

    Every part's nats are divided by it, so that the step's loss is the mean over all of its missing
    tokens.
    """
    count = torch.zeros((), device=accelerator.device)
    rows = len(noise.generators)

    for part in range(num_parts):
        generators = noise.at(step, part * rows * accelerator.num_processes)
        count += (
            ~draw_observed_mask((rows, num_tokens), model.config.patch_size, generators)
        ).sum()

    return accelerator.reduce(count, "mean") / num_parts
