"""The likelihood of text: bounds under a TarFlowLM, exact under a discrete model.

score(model, sequences, num_samples=16)  ->  `Scores`  ->  `Likelihood`
"""

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..baseline import flows_of, is_discrete, negative_log_likelihood
from ..data import PackedTokens, SentenceTokens
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..noise import latent_noise

if TYPE_CHECKING:
    from accelerate import Accelerator

ONE_SAMPLE = "bound, 1 sample"
WHAT_IS_SCORED = (
    "Every token counts, the first of a sequence too. Nothing reaches over the cut between two sequences: a sequence's "
    "first tokens are scored without the text before them, so longer sequences score better. Sequences do not overlap."
)


@dataclass(frozen=True)
class Likelihood:
    """The nats of a text: an upper bound under a TarFlowLM, exact under a discrete model.

    Attributes:
        nats: The sum over all sequences.
        num_tokens: The number of all tokens.
        standard_error: The standard error of `nats_per_token`, over the sequences; it holds for text
            like this one.

    Example:
        >>> likelihood = Likelihood(nats=69.3, num_tokens=100, standard_error=0.01)
        >>> round(likelihood.bits_per_token, 3), round(likelihood.perplexity, 3)
        (1.0, 2.0)
    """

    nats: float
    num_tokens: int
    standard_error: float

    @classmethod
    def of_sequences(cls, nats: Tensor, num_tokens: Tensor) -> "Likelihood":
        """From the nats (n,) and the numbers of tokens (n,) of n sequences."""
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


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The options of `score`.

    Attributes:
        num_samples: Samples S of the importance-weighted bound. A discrete model is exact: it takes
            none.
        num_flows: Scores the stack cut after its first flows, a model of its own. By default all.
        seed: The latents of a sequence follow from it and from the sequence's number. Neither the
            size of the batches nor the sequences behind it change them.
        max_sequences: Scores the first ones only. By default all.
        batch_size: Sequences at once. Those of equal length that follow each other share a batch.
        progress: Shows a bar.

    Raises:
        ValueError: If `num_samples`, `batch_size` or `max_sequences` is not positive.
    """

    num_samples: int = 1
    num_flows: int | None = None
    seed: int = 0
    max_sequences: int | None = None
    batch_size: int = 16
    progress: bool = False

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

        if self.max_sequences is not None and self.max_sequences < 1:
            raise ValueError(
                f"max_sequences must be at least 1, or None for all, not {self.max_sequences}."
            )


@dataclass(frozen=True)
class Scores:
    """The nats of n sequences, by each of S samples of their latents.

    Attributes:
        nats: (S, n), minus the ELBO of one sample; the exact nats (1, n) of a discrete model.
        num_tokens: (n,)
        is_exact: True of a discrete model.
    """

    nats: Tensor
    num_tokens: Tensor
    is_exact: bool

    @property
    def best(self) -> Likelihood:
        """The importance-weighted bound with all samples; exact of a discrete model."""
        return Likelihood.of_sequences(-log_mean_exp(-self.nats), self.num_tokens)

    @property
    def one_sample(self) -> Likelihood:
        """Minus the ELBO, the mean over the samples; exact of a discrete model."""
        return Likelihood.of_sequences(self.nats.mean(0), self.num_tokens)

    def rows(self) -> dict[str, Likelihood]:
        """The rows of a table of this model, the best one last."""
        if self.is_exact:
            return {"exact": self.best}

        rows = {ONE_SAMPLE: self.one_sample}
        if len(self.nats) > 1:
            rows[f"bound, {len(self.nats)} samples"] = self.best

        return rows


def likelihood(
    model: PreTrainedModel, sequences: Iterable[dict[str, Tensor]], **options: Any
) -> Likelihood:
    """The likelihood of text that is cut into sequences: `score(...).best`."""
    return score(model, sequences, **options).best


@torch.no_grad()
def score(model: PreTrainedModel, sequences: Iterable[dict[str, Tensor]], **options: Any) -> Scores:
    """Scores text that is cut into sequences, each on its own from its first token on.

    Nothing reaches over a cut, so the first tokens of a sequence are scored with little context.

    Args:
        model: A TarFlowLM, or a discrete causal model with a `bos_token_id`. It is left in
            evaluation mode.
        sequences: Each `{"input_ids": (T,)}`, as those of `PackedTokens` or `cut_text`, or as those
            of `SentenceTokens`.
        options: The fields of `Scoring`.

    Raises:
        ValueError: If there is no sequence, or if a bound is not finite.
    """
    scoring = Scoring(**options)
    model.eval()
    nats, num_tokens = [], []

    batches = batches_of_equal_length(islice(sequences, scoring.max_sequences), scoring.batch_size)
    for batch in with_progress(
        batches, sequences, scoring.max_sequences, "scoring", scoring.progress
    ):
        ids = stack_ids(batch).to(model.device)
        batch_nats = score_batch(model, ids, len(num_tokens), scoring).cpu().double()
        nats.append(batch_nats + nats_of_lengths(model, batch, scoring.num_flows))
        num_tokens.extend(num_tokens_of(sequence) for sequence in batch)

    if not nats:
        raise ValueError("There is no sequence to score.")

    scores = Scores(torch.cat(nats, 1), torch.tensor(num_tokens), is_discrete(model))
    _check_finite(scores.nats)
    return scores


@torch.no_grad()
def validate(
    model: PreTrainedModel,
    data: PackedTokens | SentenceTokens,
    max_sequences: int,
    accelerator: "Accelerator",
    num_flows: int | None = None,
    batch_size: int = 16,
) -> Likelihood:
    """Returns the `likelihood` of the first sequences. The processes share the batches.

    Every process runs equally many forward passes, which sharded weights need. If the batches do
    not divide evenly, some processes score the last one again, and the result is dropped.
    """
    model.eval()
    scoring = Scoring(num_flows=num_flows)
    sequences = data.first(max_sequences)
    num_tokens = torch.tensor([num_tokens_of(sequence) for sequence in sequences])
    batches = list(batches_of_equal_length(sequences, batch_size))
    starts = [0, *accumulate(len(batch) for batch in batches)]
    nats = torch.zeros(len(sequences), dtype=torch.float64, device=accelerator.device)

    first = accelerator.process_index
    for index in range(first, first + len(batches), accelerator.num_processes):
        number = min(index, len(batches) - 1)
        ids = stack_ids(batches[number]).to(accelerator.device)
        scores = score_batch(model, ids, starts[number], scoring)
        if index < len(batches):
            lengths = nats_of_lengths(model, batches[number], num_flows).to(nats.device)
            nats[starts[number] : starts[number + 1]] = scores[0].double() + lengths

    nats = accelerator.reduce(nats, "sum").cpu()
    return Likelihood.of_sequences(nats, num_tokens)


def nats_of_lengths(
    model: PreTrainedModel, batch: list[dict[str, Any]], num_flows: int | None = None
) -> Tensor:
    """The nats (B,) that the lengths of sentences cost under a model that begins at the end; else 0.

    Raises:
        ValueError: If they do cost, and the sentences were made without the training sentences.
    """
    is_sentence = [sequence.get("ends", False) for sequence in batch]
    begins_at_the_end = any(
        flow.direction == "right_to_left" for flow in flows_of(model)[:num_flows]
    )
    if not (begins_at_the_end and any(is_sentence)):
        return torch.zeros(len(batch), dtype=torch.float64)

    if any("length_nats" not in sequence for sequence in batch):
        raise ValueError(
            "A stack with a right-to-left flow knows where a sentence ends: give SentenceTokens the training "
            "sentences, by whose lengths the length is scored."
        )

    return torch.tensor([sequence["length_nats"] for sequence in batch], dtype=torch.float64)


def with_progress(
    batches: Iterable[list], sequences: Iterable, most: int | None, name: str, is_shown: bool
) -> Iterator[list]:
    """Yields the batches, with a bar that counts sequences; its total is known if theirs is."""
    total = len(sequences) if isinstance(sequences, Sized) else None
    if total is not None and most is not None:
        total = min(total, most)

    with tqdm(total=total, desc=name, unit="sequence", disable=not is_shown, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _check_finite(nats: Tensor) -> None:
    is_finite = nats.isfinite().all(0)
    if not bool(is_finite.all()):
        index = int((~is_finite).int().argmax())
        raise ValueError(
            f"The likelihood of sequence {index} is {nats[:, index].tolist()}: are the weights finite?"
        )


def score_batch(
    model: PreTrainedModel, input_ids: Tensor, first: int, scoring: Scoring | None = None
) -> Tensor:
    """The nats (S, B) of ids (B, T), the sequences `first`, `first` + 1, ... of `score`.

    S is 1 for a discrete model.
    """
    if is_discrete(model):
        return negative_log_likelihood(model, input_ids).unsqueeze(0)

    scoring = Scoring() if scoring is None else scoring
    seeds = [(scoring.seed, first + row) for row in range(len(input_ids))]
    noise = latent_noise(model, input_ids.shape[1], seeds, scoring.num_samples)
    return -elbo_samples(model, input_ids, noise, num_flows=scoring.num_flows)


def elbo_samples(model: TarFlowLMModel, input_ids: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """The ELBO (S, B) of ids (B, T) by the latents of each noise (S, B, T, d).

    Args:
        options: Options of the model's forward pass.
    """
    return torch.stack([model(input_ids, latent_noise=sample, **options).elbo for sample in noise])


def log_mean_exp(values: Tensor) -> Tensor:
    """log((1 / S) sum_s exp(values_s)), (S, ...) to (...); the bound from the ELBOs of S samples."""
    return torch.logsumexp(values, 0) - math.log(len(values))


# --------------------------------------------------------------------------------------------------
# Sequences
# --------------------------------------------------------------------------------------------------


def batches_of_equal_length(
    sequences: Iterable[dict[str, Tensor]], batch_size: int
) -> Iterator[list[dict[str, Tensor]]]:
    """Yields lists of at most `batch_size` equally long sequences that follow each other."""
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


def stack_ids(batch: list[dict[str, Tensor]]) -> Tensor:
    """The ids (B, T) of equally long sequences."""
    return torch.stack([sequence["input_ids"] for sequence in batch])


def num_tokens_of(sequence: dict[str, Tensor]) -> int:
    """The tokens that count: `num_tokens` where some only fill the sequence up, else all."""
    return int(sequence.get("num_tokens", len(sequence["input_ids"])))


def cut_text(tokens: Tensor, length: int, patch_size: int = 1) -> list[dict[str, Tensor | int]]:
    """Cuts tokens (N,) into sequences of `length` tokens; the last one may be shorter.

    If that is no multiple of the patch size, its last token is repeated until it is. Since p(text
    and more) <= p(text), a bound on the longer text bounds the shorter one. `num_tokens` counts the
    text only.

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
