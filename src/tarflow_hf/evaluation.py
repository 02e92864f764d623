"""Evaluation on text: bounds on its likelihood, how well the codebook gives it back; also of the
discrete baseline.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .data import PackedTokens
from .modeling.codebook import Gaussians
from .modeling.modeling_tarflowlm import TarFlowLMModel
from .provenance import Provenance

MAX_SCORES = 2**24  # of tokens by entries of the codebook, at once

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


def prepend_start(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Ids (B, T) behind the discrete model's beginning-of-sequence token, (B, T + 1)."""
    return F.pad(input_ids, (1, 0), value=model.config.bos_token_id)


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
    """What a table of `report_table` says of a model: of a TarFlowLM the ELBO and the bound with
    `num_samples` samples.

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


def report_table(
    rows: dict[str, Likelihood], characters_per_token: float, tokens_per_word: float | None = None
) -> str:
    """A table to print, one row for each likelihood, with the perplexity per token and (if it can
    be told) per word.

    Example:
        >>> print(report_table({"exact": Likelihood(nats=69.3, num_tokens=100, standard_error=0.01)}, 1.0, 5.0))
        100 tokens             nats/token      +-   bits/char  perplexity    per word
        exact                      0.6930  0.0100      0.9998       2.000        32.0
    """
    num_tokens = f"{next(iter(rows.values())).num_tokens:,} tokens"
    lines = [
        f"{num_tokens:<23}{'nats/token':>10}  {'+-':>6}  {'bits/char':>10}  {'perplexity':>10}"
    ]

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


def longest_sequence(model: PreTrainedModel) -> int:
    """In tokens; a discrete model spends one position on its beginning-of-sequence token."""
    return model.config.max_position_embeddings - (not isinstance(model, TarFlowLMModel))


# --------------------------------------------------------------------------------------------------
# The codebook
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluation(Provenance):
    """What `examples/evaluate.py --output` writes: the fields of `Provenance`, then these. All are
    flat, none is left out; what does not apply is null.

    Attributes:
        num_tokens, num_sequences: That were scored.
        sequence_length: The longest sequence, in tokens.
        characters_per_token: Of the whole text, by which bits per token are divided.
        tokens_per_word: Of the whole text; a word is what stands between spaces.
        seed: Of the latents.
        num_flows: The stack was cut after these; null: all. Null of a discrete model.
        num_samples: S of the importance-weighted bound. Null of a discrete model, whose figures are
            exact.
        is_upper_bound: True of a TarFlowLM: what follows, up to `perplexity_per_word`, is at least
            the true figure.
        nats_per_token, standard_error: By the importance-weighted bound, or exact; with the
            standard error over the sequences, which is also that of the two below if multiplied as
            they are.
        bits_per_token, bits_per_character, perplexity, perplexity_per_word: The same, otherwise
            expressed.
        elbo_nats_per_token, elbo_standard_error, elbo_bits_per_character, elbo_perplexity: By minus
            the ELBO. Null of a discrete model, as all below.
        reconstruction_accuracy, reconstruction_standard_error: See `Reconstruction`.
        num_text_tokens, num_used_tokens: The same.
        codebook_entries, codebook_latent_size: K and d.
        codebook_scale_min, codebook_scale_mean, codebook_scale_max: Of the standard deviations.
        codebook_nearest_distance_min, codebook_nearest_distance_median: See `nearest_distances`.
    """

    num_tokens: int
    num_sequences: int
    sequence_length: int
    characters_per_token: float
    tokens_per_word: float | None
    seed: int
    num_flows: int | None
    num_samples: int | None
    is_upper_bound: bool
    nats_per_token: float
    standard_error: float | None
    bits_per_token: float
    bits_per_character: float
    perplexity: float
    perplexity_per_word: float | None
    elbo_nats_per_token: float | None = None
    elbo_standard_error: float | None = None
    elbo_bits_per_character: float | None = None
    elbo_perplexity: float | None = None
    reconstruction_accuracy: float | None = None
    reconstruction_standard_error: float | None = None
    num_text_tokens: int | None = None
    num_used_tokens: int | None = None
    codebook_entries: int | None = None
    codebook_latent_size: int | None = None
    codebook_scale_min: float | None = None
    codebook_scale_mean: float | None = None
    codebook_scale_max: float | None = None
    codebook_nearest_distance_min: float | None = None
    codebook_nearest_distance_median: float | None = None


def evaluate_text(
    model: PreTrainedModel,
    text: PackedTokens,
    provenance: dict,
    num_samples: int = 16,
    batch_size: int = 16,
    max_sequences: int | None = None,
    num_flows: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Evaluation, dict[str, Likelihood]]:
    """Everything that `Evaluation` says of a model and all tokens of a text, and the likelihoods in
    it.

    Args:
        model: A TarFlowLM or a discrete causal model with a `bos_token_id`.
        text: Whose tokens are scored in sequences as long as the model takes, whatever
            `text.sequence_length` is.
        provenance: The fields of `Provenance`, by `provenance_of`.

    Raises:
        ValueError: `num_flows` is given for a discrete model.
    """
    is_flow = isinstance(model, TarFlowLMModel)
    if num_flows is not None and not is_flow:
        raise ValueError("num_flows can't be given: this is a discrete model.")

    length = longest_sequence(model)
    sequences = cut_text(text.tokens, length, model.config.patch_size if is_flow else 1)[
        :max_sequences
    ]
    options = {"batch_size": batch_size, "seed": seed, "progress": progress, "num_flows": num_flows}
    rows = likelihoods(model, sequences, num_samples, **options)
    best = list(rows.values())[-1]
    fields: dict[str, Any] = {
        "num_tokens": best.num_tokens,
        "num_sequences": len(sequences),
        "sequence_length": length,
        "characters_per_token": text.characters_per_token,
        "tokens_per_word": text.tokens_per_word,
        "seed": seed,
        "num_flows": num_flows,
        "num_samples": num_samples if is_flow else None,
        "is_upper_bound": is_flow,
        "nats_per_token": best.nats_per_token,
        "standard_error": best.standard_error,
        "bits_per_token": best.bits_per_token,
        "bits_per_character": best.bits_per_character(text.characters_per_token),
        "perplexity": best.perplexity,
        "perplexity_per_word": text.tokens_per_word
        and best.perplexity_per_word(text.tokens_per_word),
    }

    if is_flow:
        elbo, given_back = rows[ONE_SAMPLE], reconstruction(model, sequences, seed=seed)
        fields |= {
            "elbo_nats_per_token": elbo.nats_per_token,
            "elbo_standard_error": elbo.standard_error,
            "elbo_bits_per_character": elbo.bits_per_character(text.characters_per_token),
            "elbo_perplexity": elbo.perplexity,
            "reconstruction_accuracy": given_back.accuracy,
            "reconstruction_standard_error": given_back.standard_error,
            "num_text_tokens": given_back.num_text_tokens,
            "num_used_tokens": given_back.num_used_tokens,
        }
        state = vars(codebook_state(model.codebook()))
        fields["codebook_entries"] = state.pop("num_entries")
        fields |= {f"codebook_{name}": value for name, value in state.items()}

    return Evaluation(**provenance, **fields), rows


def evaluation_table(evaluation: Evaluation, rows: dict[str, Likelihood]) -> str:
    """What `evaluate_text` returns, to print."""
    e, lines = (
        evaluation,
        [report_table(rows, evaluation.characters_per_token, evaluation.tokens_per_word)],
    )
    if e.reconstruction_accuracy is not None:
        lines.append(
            f"reconstruction: {e.reconstruction_accuracy:.4%} of the tokens; of {e.num_text_tokens:,} different ones "
            f"{e.num_used_tokens:,} come back"
        )
        lines.append(
            f"codebook: {e.codebook_entries:,} entries, d = {e.codebook_latent_size}; scales "
            f"{e.codebook_scale_min:.4g} to {e.codebook_scale_max:.4g}, mean {e.codebook_scale_mean:.4g}"
        )
        lines.append(
            f"nearest entries: {e.codebook_nearest_distance_min:.3g} scales away at least, "
            f"{e.codebook_nearest_distance_median:.3g} in the median"
        )

    return "\n".join(lines)
