"""Bounds on the likelihood of text under a TarFlowLM; the exact one under a discrete model."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..baseline import prepend_start
from ..modeling.modeling_tarflowlm import TarFlowLMModel

ONE_SAMPLE = "bound, 1 sample"
WHAT_IS_SCORED = (
    "Every token counts, the first of a sequence too. Nothing reaches over the cut between two sequences: a sequence's "
    "first tokens are scored without the text before them, so longer sequences score better. No window slides."
)


@dataclass(frozen=True)
class Likelihood:
    """Nats of some text under a model: an upper bound for a TarFlowLM, exact for a discrete model.

    Example:
        >>> likelihood = Likelihood(nats=69.3, num_tokens=100, standard_error=0.01)
        >>> round(likelihood.bits_per_token, 3), round(likelihood.perplexity, 3)
        (1.0, 2.0)
    """

    nats: float  # in all
    num_tokens: int
    standard_error: float  # of nats_per_token: over sequences, which holds for text like this one

    @classmethod
    def of_sequences(cls, nats: Tensor, num_tokens: Tensor) -> "Likelihood":
        """Of n sequences: their nats (n,) and numbers of tokens (n,)."""
        rate, standard_error = ratio_of_sums(nats, num_tokens)
        return cls(rate * int(num_tokens.sum()), int(num_tokens.sum()), standard_error)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        return _exp(self.nats_per_token)

    def bits_per_character(self, characters_per_token: float) -> float:
        return self.bits_per_token / characters_per_token

    def perplexity_per_word(self, tokens_per_word: float) -> float:
        return _exp(self.nats_per_token * tokens_per_word)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # where math.exp raises


def negative_log_likelihood(
    model: PreTrainedModel,
    input_ids: Tensor,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    num_flows: int | None = None,
) -> Tensor:
    """Nats of each sequence, (B,), of ids (B, T): all T tokens count, the first one too.

    Of a TarFlowLM, or of its stack cut after `num_flows`, minus its bound with `num_samples`
    samples of the latents (1: the ELBO). A discrete model reads its beginning-of-sequence token
    first, and is exact.
    """
    if isinstance(model, TarFlowLMModel):
        return -model.importance_weighted_bound(
            input_ids, num_samples=num_samples, generator=generator, num_flows=num_flows
        )

    inputs = prepend_start(model, input_ids)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]  # (B, T, V)
    return F.cross_entropy(logits.float().transpose(1, 2), input_ids, reduction="none").sum(-1)


def ratio_of_sums(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """sum of values (n,) / sum of weights (n,), and its standard error: NaN of a single one.

    Example:
        >>> ratio_of_sums(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))
        (2.0, 0.7071067811865476)
    """
    values, weights = values.double(), weights.double()
    ratio = values.sum() / weights.sum()
    # Of the deviations from the common ratio.
    deviation = (values - ratio * weights).square().sum().sqrt() / weights.sum()
    return ratio.item(), deviation.item() if len(values) > 1 else math.nan


def likelihoods(
    model: PreTrainedModel, sequences: Iterable[dict[str, Tensor]], num_samples: int, **options
) -> dict[str, Likelihood]:
    """The likelihoods that are reported for a model, by name.

    A TarFlowLM has the ELBO and the bound with `num_samples` samples, a discrete model the exact one.

    Both come from the same samples. Options as for `likelihood`.
    """
    if not isinstance(model, TarFlowLMModel):
        return {"exact": likelihood(model, sequences, **options)}

    nats, num_tokens = score(model, sequences, num_samples=num_samples, **options)
    rows = {ONE_SAMPLE: Likelihood.of_sequences(nats.mean(0), num_tokens)}

    if num_samples > 1:
        rows[f"bound, {num_samples} samples"] = Likelihood.of_sequences(
            -log_mean_exp(-nats), num_tokens
        )

    return rows


def likelihood(
    model: PreTrainedModel,
    sequences: Iterable[dict[str, Tensor]],
    batch_size: int = 16,
    num_samples: int = 1,
    max_sequences: int | None = None,
    seed: int = 0,
    progress: bool = False,
    num_flows: int | None = None,
) -> Likelihood:
    """Likelihood of text that is cut into sequences, each scored on its own from its first token
    on.

    Nothing reaches over a cut, so the first tokens of a sequence are scored with little context.
    Sequences of equal length that follow each other share a batch. A sequence's latents follow from
    the seed and from which one it is: neither the size of the batches nor the sequences behind it
    change them.

    Args:
        model: A TarFlowLM or a discrete causal model with a `bos_token_id`. Left in evaluation
            mode.
        sequences: Each `{"input_ids": (T,)}`, as of `PackedTokens` or `cut_text`.
        num_samples: Samples S of the importance-weighted bound.
        max_sequences: Score the first ones only.
        num_flows: Score the stack cut after its first flows, a model of its own.

    Raises:
        ValueError: There is no sequence, or a bound is not finite.
    """
    nats, num_tokens = score(
        model, sequences, batch_size, num_samples, max_sequences, seed, progress, num_flows
    )
    return Likelihood.of_sequences(-log_mean_exp(-nats), num_tokens)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    sequences: Iterable[dict[str, Tensor]],
    batch_size: int = 16,
    num_samples: int = 1,
    max_sequences: int | None = None,
    seed: int = 0,
    progress: bool = False,
    num_flows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Nats (S, n) of n sequences by each of S samples of their latents, and their numbers of tokens
    (n,); see `likelihood`. Of a discrete model S is 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}.")

    model.eval()
    nats, num_tokens = [], []

    batches = batches_of_equal_length(islice(sequences, max_sequences), batch_size)
    for batch in tqdm(batches, desc="scoring", unit="batch", disable=not progress, leave=False):
        ids = torch.stack([sequence["input_ids"] for sequence in batch]).to(model.device)
        nats.append(
            score_batch(model, ids, len(num_tokens), num_samples, seed, num_flows).cpu().double()
        )
        num_tokens.extend(int(sequence.get("num_tokens", ids.shape[1])) for sequence in batch)

    if not nats:
        raise ValueError("There is no sequence to score.")

    nats = torch.cat(nats, 1)
    if not bool(nats.isfinite().all()):
        index = int((~nats.isfinite()).any(0).int().argmax())
        raise ValueError(
            f"The likelihood of sequence {index} is {nats[:, index].tolist()}: are the weights finite?"
        )

    return nats, torch.tensor(num_tokens)


def score_batch(
    model: PreTrainedModel,
    input_ids: Tensor,
    first: int,
    num_samples: int = 1,
    seed: int = 0,
    num_flows: int | None = None,
) -> Tensor:
    """What `score` says of its sequences `first`, `first` + 1, ..., whose ids are (B, T): (S, B)."""
    if not isinstance(model, TarFlowLMModel):
        return negative_log_likelihood(model, input_ids).unsqueeze(0)
    seeds = [(seed, first + row) for row in range(len(input_ids))]
    noise = latent_noise(model, input_ids.shape[1], seeds, num_samples)
    return -elbo_samples(model, input_ids, noise, num_flows=num_flows)


def latent_noise(
    model: TarFlowLMModel, length: int, seeds: Sequence[Sequence[int]], num_samples: int = 1
) -> Tensor:
    """N(0, I) noise (S, B, T, d) for the latents of B sequences of T tokens, each from a seed of
    its own.
    """
    rows = []
    for seed in seeds:
        state = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        generator = torch.Generator(model.device).manual_seed(state)
        shape = (num_samples, length, model.config.latent_size)
        rows.append(torch.randn(shape, generator=generator, device=model.device))

    return torch.stack(rows, 1)


def elbo_samples(model: TarFlowLMModel, input_ids: Tensor, noise: Tensor, **options) -> Tensor:
    """The ELBO (S, B) of ids (B, T) by the latents of each noise (S, B, T, d); options of the
    model's forward pass.
    """
    return torch.stack([model(input_ids, latent_noise=sample, **options).elbo for sample in noise])


def log_mean_exp(values: Tensor) -> Tensor:
    """log((1 / S) sum_s exp(values_s)), (S, ...) to (...): of ELBOs, the importance-weighted bound."""
    return torch.logsumexp(values, 0) - math.log(len(values))


def batches_of_equal_length(
    sequences: Iterable[dict[str, Tensor]], batch_size: int
) -> Iterator[list[dict[str, Tensor]]]:
    """Lists of at most `batch_size` sequences that follow each other and are equally long."""
    batch: list[dict[str, Tensor]] = []
    for sequence in sequences:
        if batch and (
            len(batch) == batch_size or len(sequence["input_ids"]) != len(batch[0]["input_ids"])
        ):
            yield batch
            batch = []

        batch.append(sequence)

    if batch:
        yield batch


def cut_text(tokens: Tensor, length: int, patch_size: int = 1) -> list[dict[str, Tensor | int]]:
    """All of some tokens (N,) as sequences of `length` tokens, the last of which may be shorter.

    Where that is no multiple of the patch size, its last token is repeated until it is: p(text and
    more) <= p(text), so a bound on the longer one is a bound. `num_tokens` are those of the text.

    Example:
        >>> cut_text(torch.tensor([5, 6, 7, 8, 9]), length=4, patch_size=2)
        [{'input_ids': tensor([5, 6, 7, 8]), 'num_tokens': 4}, {'input_ids': tensor([9, 9]), 'num_tokens': 1}]
    """
    sequences = []
    for ids in tokens.long().split(length) if len(tokens) else []:
        missing = -len(ids) % patch_size
        sequences.append(
            {"input_ids": torch.cat([ids, ids[-1:].expand(missing)]), "num_tokens": len(ids)}
        )

    return sequences
