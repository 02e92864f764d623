"""The change of a sequence's states from flow to flow.

Measured are their size, their likeness, their dimensions and their centre.

evolution_of_text(model, sequences), evolution_of_samples(model, 64)  ->  Evolution  ->  plots.plot_evolution
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..noise import latent_noise
from .likelihood import batches_of_equal_length, stack_ids, with_progress

MEASURES = {
    "norm": "mean norm of the states",
    "cosine": "mean cosine of two states",
    "participation_ratio": "participation ratio",
    "centroid_movement": "movement of the centre",
}


@dataclass(frozen=True)
class Statistic:
    """The mean and the spread of a number over sequences."""

    mean: float
    std: float  # of these sequences, not an estimate for others; 0 for a single one


@dataclass(frozen=True)
class Evolution:
    """Measures of the states h0 (the latents), ..., hL (the noise), over sequences.

    `dataclasses.asdict` makes plain data of it.
    """

    num_sequences: int
    num_tokens: int  # of the longest sequence
    latent_size: int
    norm: list[Statistic]  # L + 1 of them, as for all but the last measure
    cosine: list[Statistic]
    participation_ratio: list[Statistic]  # between 1 and the latent size; 0 where nothing varies
    centroid_movement: list[Statistic]  # L: what each flow moves

    @property
    def num_states(self) -> int:
        return len(self.norm)


def measure_state(state: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Measures one state (B, T, d) in each sequence, (B,), in float64 on the CPU.

    Args:
        mask: (B, T), True for a token; by default all are.

    Returns:
        - `norm`: the mean L2 norm of the tokens' states;
        - `cosine`: the mean cosine over all pairs of tokens, 1 for a single token;
        - `participation_ratio`: (sum of lambda)^2 / sum of lambda^2 over the eigenvalues of the
          tokens' covariance: the number of directions in which they vary; 0 if they do not, such
          as a single token;
        - `centroid`: their mean (B, d).

    Raises:
        ValueError: If the state is not (B, T, d), has no token in some sequence, or is not finite.

    Example:
        >>> square = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])
        >>> {name: value.tolist() for name, value in measure_state(square).items()}  # cosines 0, 0, 0, 0, -1, -1
        {'norm': [1.0], 'cosine': [-0.3333333333333333], 'participation_ratio': [2.0], 'centroid': [[0.0, 0.0]]}
    """
    if state.ndim != 3:
        raise ValueError(f"A state must be of shape (B, T, d), not {tuple(state.shape)}.")

    state = state.detach().cpu()
    is_real = torch.ones(state.shape[:2], dtype=torch.bool) if mask is None else mask.cpu() != 0

    count = is_real.sum(-1)
    if is_real.shape != state.shape[:2] or not state.numel() or not bool((count > 0).all()):
        raise ValueError(
            f"Every sequence needs a token: the state has shape {tuple(state.shape)}, tokens {count}."
        )

    state = state.double().masked_fill(~is_real.unsqueeze(-1), 0)
    if not bool(state.isfinite().all()):
        raise ValueError(
            f"The state is not finite in {int((~state.isfinite()).any(-1).sum())} tokens."
        )

    t = count.unsqueeze(-1)  # (B, 1)
    centroid = state.sum(1) / t

    # sum over pairs of cos = (|sum of directions|^2 - sum of their squares) / 2
    direction = F.normalize(state, dim=-1)
    pairs = direction.sum(1).square().sum(-1) - direction.square().sum((1, 2))
    cosine = torch.where(count > 1, pairs / (count * (count - 1)).clamp(min=1), 1.0)
    centred = (state - centroid.unsqueeze(1)).masked_fill(~is_real.unsqueeze(-1), 0)
    covariance = (
        centred.mT @ centred / t.unsqueeze(-1)
    )  # (B, d, d): its trace is the sum of eigenvalues, and so on
    trace, trace_of_square = (
        covariance.diagonal(dim1=1, dim2=2).sum(-1),
        covariance.square().sum((1, 2)),
    )
    ratio = torch.where(trace_of_square > 0, trace.square() / trace_of_square, 0.0)

    return {
        "norm": state.norm(dim=-1).sum(-1) / count,
        "cosine": cosine,
        "participation_ratio": ratio,
        "centroid": centroid,
    }


def measure_evolution(batches: Iterable[Sequence[Tensor]]) -> Evolution:
    """The evolution over batches, each with its states h0, ..., hL of shape (B, T, d).

    Raises:
        ValueError: There is no batch, or batches differ in their number of states; or see
            `measure_state`.
    """
    values = {}
    num_sequences = 0
    num_tokens = 0
    latent_size = 0
    for states in batches:
        centroid = None
        for level, state in enumerate(states):
            try:
                measured = measure_state(state)
            except ValueError as error:
                raise ValueError(f"State {level} of {len(states) - 1}: {error}") from None

            movement = None if centroid is None else (measured["centroid"] - centroid).norm(dim=-1)
            centroid = measured.pop("centroid")
            if movement is not None:
                measured["centroid_movement"] = movement

            for name, value in measured.items():
                values.setdefault(name, {}).setdefault(level, []).append(value)

        num_sequences += len(states[0])
        num_tokens = max(num_tokens, states[0].shape[1])
        latent_size = states[0].shape[2]

    if not num_sequences:
        raise ValueError("There is no sequence to measure.")

    statistics = {
        name: [
            Statistic(x.mean().item(), x.std(correction=0).item())
            for x in (torch.cat(parts) for parts in values.get(name, {}).values())
        ]
        for name in MEASURES
    }

    return Evolution(num_sequences, num_tokens, latent_size, **statistics)


@torch.no_grad()
def evolution_of_text(
    model: TarFlowLMModel,
    sequences: Iterable[dict[str, Tensor]],
    batch_size: int = 16,
    max_sequences: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evolution:
    """Measures a text's latents on their way to noise.

    Args:
        sequences: Each `{"input_ids": (T,)}`, as for `evaluation.likelihood`.
    """
    model.eval()

    def states():
        index = 0
        batches = batches_of_equal_length(islice(sequences, max_sequences), batch_size)
        for batch in with_progress(batches, sequences, max_sequences, "encoding", progress):
            ids = stack_ids(batch).to(model.device)
            noise = latent_noise(
                model, ids.shape[1], [(seed, index + row) for row in range(len(batch))]
            )[0]
            index += len(batch)
            yield model.flow(model.encode(ids, noise=noise)).states

    return measure_evolution(states())


@torch.no_grad()
def evolution_of_samples(
    model: TarFlowLMModel,
    num_sequences: int,
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    **options,
) -> Evolution:
    """Measures noise on its way to latents, as `generate` makes them.

    Args:
        length: In tokens; by default `max_position_embeddings`.
        options: Those of `generate`.
    """
    model.eval()
    length = model.config.max_position_embeddings if length is None else length

    def states():
        starts = range(0, num_sequences, batch_size)
        for start in tqdm(starts, desc="sampling", unit="batch", disable=not progress, leave=False):
            seeds = [
                (seed, index) for index in range(start, min(start + batch_size, num_sequences))
            ]
            yield model.generate(
                noise=latent_noise(model, length, seeds)[0], output_states=True, **options
            ).states

    return measure_evolution(states())
