"""Evaluation: bounds on the likelihood of text, for a TarFlowLM and for the discrete baseline beside it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .modeling.modeling_tarflowlm import TarFlowLMModel

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

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    def bits_per_character(self, characters_per_token: float) -> float:
        return self.bits_per_token / characters_per_token

    def perplexity_per_word(self, tokens_per_word: float) -> float:
        return math.exp(self.nats_per_token * tokens_per_word)


def negative_log_likelihood(
    model: PreTrainedModel,
    input_ids: Tensor,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    num_flows: int | None = None,
) -> Tensor:
    """Nats of each sequence, (B,), of ids (B, T): all T tokens count, the first one too.

    Of a TarFlowLM, or of its stack cut after `num_flows`, minus its bound with `num_samples` samples of the latents (1:
    the ELBO). A discrete model reads its
    beginning-of-sequence token first, and is exact.
    """
    if isinstance(model, TarFlowLMModel):
        return -model.importance_weighted_bound(
            input_ids, num_samples=num_samples, generator=generator, num_flows=num_flows
        )
    inputs = prepend_start(model, input_ids)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]  # (B, T, V)
    return F.cross_entropy(logits.float().transpose(1, 2), input_ids, reduction="none").sum(-1)


def prepend_start(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Ids (B, T) behind the discrete model's beginning-of-sequence token, (B, T + 1)."""
    return F.pad(input_ids, (1, 0), value=model.config.bos_token_id)


def likelihoods(
    model: PreTrainedModel, sequences: Iterable[dict[str, Tensor]], num_samples: int, **options
) -> dict[str, Likelihood]:
    """What a table of `report_table` says of a model: of a TarFlowLM the ELBO and the bound with `num_samples` samples.

    `sequences` are read once for each; options as for `likelihood`.
    """
    if not isinstance(model, TarFlowLMModel):
        return {"exact": likelihood(model, sequences, **options)}
    return {
        f"bound, {samples} sample{'s' * (samples > 1)}": likelihood(model, sequences, num_samples=samples, **options)
        for samples in dict.fromkeys((1, num_samples))
    }


def report_table(rows: dict[str, Likelihood], characters_per_token: float, tokens_per_word: float | None = None) -> str:
    """A table to print, one row for each likelihood, with the perplexity per token and (if it can be told) per word.

    Example:
        >>> print(report_table({"exact": Likelihood(nats=69.3, num_tokens=100, standard_error=0.01)}, 1.0, 5.0))
        100 tokens             nats/token      +-   bits/char  perplexity    per word
        exact                      0.6930  0.0100      0.9998       2.000        32.0
    """
    num_tokens = f"{next(iter(rows.values())).num_tokens:,} tokens"
    lines = [f"{num_tokens:<23}{'nats/token':>10}  {'+-':>6}  {'bits/char':>10}  {'perplexity':>10}"]
    for name, row in rows.items():
        bits = row.bits_per_character(characters_per_token)
        lines.append(
            f"{name:<23}{row.nats_per_token:>10.4f}  {row.standard_error:>6.4f}  {bits:>10.4f}  {row.perplexity:>10.3f}"
        )
    if tokens_per_word is not None:
        lines[0] += f"  {'per word':>10}"
        for index, row in enumerate(rows.values(), 1):
            lines[index] += f"  {row.perplexity_per_word(tokens_per_word):>10.1f}"
    return "\n".join(lines)


@torch.no_grad()
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
    """Likelihood of text that is cut into sequences, each scored on its own from its first token on.

    Nothing reaches over a cut, so the first tokens of a sequence are scored with little context. Sequences of equal
    length share a batch. The same seed draws the same latents.

    Args:
        model: A TarFlowLM or a discrete causal model with a `bos_token_id`. Left in evaluation mode.
        sequences: Each `{"input_ids": (T,)}`, as of `PackedTokens`.
        num_samples: Samples S of the importance-weighted bound.
        max_sequences: Score the first ones only.
        num_flows: Score the stack cut after its first flows, a model of its own.

    Raises:
        ValueError: There is no sequence.
    """
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    nats, lengths = [], []
    ids = (sequence["input_ids"] for sequence in islice(sequences, max_sequences))
    for batch in tqdm(_batches(ids, batch_size), desc="scoring", unit="batch", disable=not progress, leave=False):
        scores = negative_log_likelihood(model, batch.to(model.device), num_samples, generator, num_flows)
        nats.append(scores.double().cpu())
        lengths.extend([batch.shape[1]] * len(batch))
    if not nats:
        raise ValueError("There is no sequence to score.")
    nats, lengths = torch.cat(nats), torch.tensor(lengths, dtype=torch.float64)
    rate = nats.sum() / lengths.sum()
    # Standard error of a ratio of sums: of the sequences' deviations from the common rate.
    deviation = (nats - rate * lengths).square().sum().sqrt() / lengths.sum()
    return Likelihood(nats.sum().item(), int(lengths.sum()), deviation.item() if len(nats) > 1 else math.nan)


def _batches(ids: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    for sequence in ids:
        if batch and (len(batch) == batch_size or len(sequence) != len(batch[0])):
            yield torch.stack(batch)
            batch = []
        batch.append(sequence)
    if batch:
        yield torch.stack(batch)
