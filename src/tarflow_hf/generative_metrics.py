"""What a model's samples are like: generative perplexity, MAUVE, entropy, distinct n-grams,
repetition.

    samples = sample_to_file(model, tokenizer, "samples.jsonl", num_samples=5000)      # goes on where it was stopped
    judge, judge_tokenizer = load_judge("gpt2-large")
    judged = judge_texts([sample.text for sample in samples], judge, judge_tokenizer)  # nats, and features for MAUVE

None of these numbers means anything alone: a text of low entropy, which says the same thing again
and again, has a low generative perplexity. `warnings_of` says so where it is seen.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .data import PackedTokens
from .evaluation import latent_noise, longest_sequence, ratio_of_sums
from .modeling.modeling_tarflowlm import TarFlowLMModel
from .provenance import Provenance, weights_checksum

JUDGE = "openai-community/gpt2-large"
NUM_SAMPLES = 5000  # the paper's protocol, as the judge and the scale
MAUVE_SCALE = 5.0
READABLE = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
BY_JUDGE = (
    "judge",
    "generative_perplexity",
    "generative_nats_per_token",
    "generative_standard_error",
    "text_perplexity",
    "mauve",
    "mauve_scale",
)
NOT_MEASURED = "Generative perplexity and MAUVE were not measured: there was no judge."

# --------------------------------------------------------------------------------------------------
# Of the tokens alone
# --------------------------------------------------------------------------------------------------


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Nats of the distribution of the tokens within one sequence.

    Example:
        >>> round(unigram_entropy([1, 1, 2, 2]), 4), unigram_entropy([7, 7, 7])
        (0.6931, 0.0)
    """
    if len(tokens) == 0:
        raise ValueError("A sequence without tokens has no entropy.")
    _, counts = np.unique(np.asarray(tokens), return_counts=True)
    share = counts / len(tokens)
    return abs(float(-(share * np.log(share)).sum()))  # abs: no -0.0


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens.

    Example:
        >>> ngrams([1, 2, 3], 2)
        [(1, 2), (2, 3)]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}.")
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct_n(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of all sequences (Li et al., 2016). It falls
    with their number.

    Raises:
        ValueError: No sequence has n tokens.

    Example:
        >>> distinct_n([[1, 2, 1], [1, 2, 3]], 2)  # 12, 21, 12, 23
        0.75
    """
    found, total = set(), 0
    for tokens in sequences:
        grams = ngrams(tokens, n)
        found.update(grams)
        total += len(grams)

    if not total:
        raise ValueError(f"There is no sequence of at least n = {n} tokens.")

    return len(found) / total


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a sequence's n-grams that have occurred in it before (Welleck et al., 2020); 0 where
    it has none.

    Example:
        >>> repetition([1, 2, 1, 2, 1], n=2)  # 12, 21, 12, 21
        0.5
    """
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class TokenStatistics:
    """Of token sequences, samples or text, in numbers that need no judge."""

    num_sequences: int
    entropy: float  # nats, the mean of `unigram_entropy`
    entropy_std: float  # over the sequences
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetition_4: float  # the mean of `repetition`


def token_statistics(sequences: Sequence[Sequence[int]]) -> TokenStatistics:
    """
    Raises:
        ValueError: There is no sequence, or one is empty; or all are shorter than three tokens.
    """
    if not sequences:
        raise ValueError("There is no sequence to describe.")

    entropy = np.array([unigram_entropy(tokens) for tokens in sequences])
    return TokenStatistics(
        num_sequences=len(sequences),
        entropy=entropy.mean().item(),
        entropy_std=entropy.std().item(),
        distinct_1=distinct_n(sequences, 1),
        distinct_2=distinct_n(sequences, 2),
        distinct_3=distinct_n(sequences, 3),
        repetition_4=float(np.mean([repetition(tokens, 4) for tokens in sequences])),
    )


# --------------------------------------------------------------------------------------------------
# By a judge
# --------------------------------------------------------------------------------------------------


def load_judge(
    name: str | os.PathLike = JUDGE, device: torch.device | str = "cpu", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model with its tokenizer, a folder or a repository of the Hub; options of
    `from_pretrained`.

    Raises:
        ValueError: It gives no logits of tokens, or the tokenizer is not the model's.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    judge = AutoModelForCausalLM.from_pretrained(name, **options).to(device).eval()
    check_judge(judge, tokenizer)
    return judge, tokenizer


def check_judge(judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where a model can't judge, or reads another tokenizer's tokens."""
    if judge.get_output_embeddings() is None or judge.base_model is judge:
        raise ValueError(
            f"A judge needs logits for the next token, which {type(judge).__name__} has not: take a causal language "
            "model such as gpt2-large."
        )

    size, num_tokens = judge.get_input_embeddings().num_embeddings, len(tokenizer)
    if num_tokens > size:
        raise ValueError(
            f"The tokenizer has {num_tokens} tokens, the judge embeddings for {size}: it is another model's tokenizer."
        )


@dataclass(frozen=True)
class Judgement:
    """What a judge says of n texts. A text's first token is not scored, as nothing stands before
    it.
    """

    nats: Tensor  # (n,) of each text
    num_tokens: Tensor  # (n,) that are scored
    features: Tensor  # (n, width): the judge's last hidden state at a text's last token, for MAUVE
    num_truncated: int  # texts that were longer than the judge could read

    @property
    def nats_per_token(self) -> float:
        return ratio_of_sums(self.nats, self.num_tokens)[0]

    @property
    def standard_error(self) -> float:
        """Of `nats_per_token`, over the texts."""
        return ratio_of_sums(self.nats, self.num_tokens)[1]

    @property
    def perplexity(self) -> float:
        """The generative perplexity: exp of the nats per token of all texts together."""
        return math.exp(self.nats_per_token)


@torch.no_grad()
def judge_texts(
    texts: Sequence[str],
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    max_length: int = 1024,
    progress: bool = False,
) -> Judgement:
    """Reads texts with a judge, whose own tokenizer cuts them into tokens. Of longer ones the first
    `max_length` (or as many as the judge can read) count.

    Raises:
        ValueError: There is no text, one has fewer than two of the judge's tokens, the model can't
            judge, or its answer is not finite.
    """
    check_judge(judge, tokenizer)
    if not texts:
        raise ValueError("There is no text to judge.")

    longest = min(max_length, getattr(judge.config, "max_position_embeddings", None) or max_length)
    if longest < 2:
        raise ValueError(
            f"max_length must be at least 2, not {max_length}: a text's first token is not scored."
        )

    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) < 2:
            raise ValueError(
                f"A text of {len(ids)} tokens can't be judged: {text!r} (the first is not scored)."
            )

    num_truncated = sum(len(ids) > longest for ids in encoded)
    encoded = [torch.tensor(ids[:longest]) for ids in encoded]

    states: list[Tensor] = []
    hook = judge.base_model.register_forward_hook(
        lambda *arguments: states.append(arguments[-1][0])
    )
    nats, features = [], []

    try:
        starts = range(0, len(encoded), batch_size)
        for start in tqdm(starts, desc="judging", unit="batch", disable=not progress, leave=False):
            ids = encoded[start : start + batch_size]
            lengths = torch.tensor([len(row) for row in ids], device=judge.device)
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(judge.device)  # (B, T)
            mask = torch.arange(ids.shape[1], device=judge.device) < lengths[:, None]
            logits = (
                judge(input_ids=ids, attention_mask=mask.long(), use_cache=False)
                .logits[:, :-1]
                .float()
            )
            loss = F.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )  # (B, T - 1)
            nats.append(loss.masked_fill(~mask[:, 1:], 0).cpu().double().sum(-1))
            features.append(states.pop()[torch.arange(len(ids)), lengths - 1].float().cpu())
    finally:
        hook.remove()

    nats, num_tokens = torch.cat(nats), torch.tensor([len(row) - 1 for row in encoded])
    if not bool(nats.isfinite().all()):
        raise ValueError(
            f"The judge's nats are not finite for {int((~nats.isfinite()).sum())} texts."
        )

    return Judgement(nats, num_tokens, torch.cat(features), num_truncated)


def mauve_score(
    text_features: Tensor,
    sample_features: Tensor,
    scale: float = MAUVE_SCALE,
    num_buckets: int | None = None,
) -> float:
    """MAUVE (Pillutla et al., 2021) of features (n, width) and (m, width), between 0 and 1 (alike),
    by `mauve-text`.

    It depends on n and m, the judge, the scale and the number of buckets (a tenth of the smaller by
    default): compare only what agrees in all of them.

    Raises:
        ImportError: There is no `mauve-text`.
        ValueError: Features are of different widths, not finite, or fewer than 2.
    """
    for name, features in (("text_features", text_features), ("sample_features", sample_features)):
        if features.ndim != 2 or len(features) < 2 or not bool(features.isfinite().all()):
            raise ValueError(
                f"{name} must be (n, width) with n of at least 2, finite, not {tuple(features.shape)}."
            )

    if text_features.shape[1] != sample_features.shape[1]:
        widths = f"{text_features.shape[1]} and {sample_features.shape[1]}"
        raise ValueError(f"The features have widths {widths}: they are not of the same judge.")

    try:
        import mauve
    except ImportError as error:
        raise ImportError("MAUVE needs its library: `pip install mauve-text`.") from error

    result = mauve.compute_mauve(
        p_features=text_features.numpy(),
        q_features=sample_features.numpy(),
        mauve_scaling_factor=scale,
        num_buckets="auto" if num_buckets is None else num_buckets,
    )

    return float(result.mauve)


# --------------------------------------------------------------------------------------------------
# Samples, kept in a file
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    input_ids: list[int]
    text: str


def sample_to_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    num_samples: int = NUM_SAMPLES,
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> list[Sample]:
    """Draws samples of equal length, and keeps them in a file, one JSON object a line behind one
    that says how they were drawn. Where the file holds some already, only the others are drawn; a
    line that was cut short is drawn again.

    A sample of a TarFlowLM follows from the seed and from which one it is, whatever the batches. No
    token ends a sample: texts are cut from a stream of documents in training, too. Special tokens
    are left out of its `text`.

    Args:
        length: In tokens; the longest that the model takes by default.
        options: Of `generate`, such as `temperature` and `top_p`.

    Raises:
        ValueError: The file holds samples that were drawn otherwise, or `num_samples` is not
            positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}.")

    is_flow = isinstance(model, TarFlowLMModel)
    length = longest_sequence(model) if length is None else length
    header = {
        "weights_sha256": weights_checksum(model),
        "length": length,
        "seed": seed,
        "options": options,
    }
    if not is_flow:
        header["batch_size"] = batch_size  # the library draws a batch's samples together

    path = Path(path)
    samples = read_samples(path, header)
    if not is_flow:
        samples = samples[: len(samples) // batch_size * batch_size]

    lines = [json.dumps(header)] + [json.dumps(vars(sample)) for sample in samples]
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("".join(f"{line}\n" for line in lines))
    aside.replace(path)

    model.eval()
    bar = tqdm(
        total=num_samples, initial=len(samples), desc="sampling", disable=not progress, leave=False
    )
    with bar, path.open("a") as file:
        while len(samples) < num_samples:
            end = len(samples) + batch_size
            indices = range(len(samples), min(end, num_samples) if is_flow else end)
            for row in draw(model, indices, length, seed, options).tolist():
                text = tokenizer.decode(row, **READABLE)
                samples.append(Sample(row, text))
                file.write(json.dumps(vars(samples[-1])) + "\n")

            file.flush()
            bar.update(len(indices))

    return samples[:num_samples]


@torch.no_grad()
def draw(
    model: PreTrainedModel, indices: range, length: int, seed: int, options: dict[str, Any]
) -> Tensor:
    """The samples of some numbers, (B, T)."""
    if isinstance(model, TarFlowLMModel):
        noise = latent_noise(model, length, [(seed, index) for index in indices])[0]
        temperature = options.get("temperature", 1.0)
        return model.generate(
            noise=temperature * noise, **{"eos_token_id": -1, **options}
        )  # no token ends a sample

    start = torch.full((len(indices), 1), model.config.bos_token_id, device=model.device)
    with torch.random.fork_rng():  # the library takes no generator
        torch.manual_seed(
            int(np.random.SeedSequence([seed, indices[0]]).generate_state(1, np.uint64)[0])
        )

        # No token ends a sample here either, and the one that begins a sequence is none of a text.
        common = {
            "eos_token_id": None,
            "pad_token_id": 0,
            "suppress_tokens": [model.config.bos_token_id],
        }
        defaults = {"do_sample": True, "top_k": 0, "max_new_tokens": length}

        return model.generate(start, **{**defaults, **common, **options})[:, 1:]


def read_samples(path: str | os.PathLike, header: dict[str, Any] | None = None) -> list[Sample]:
    """The whole lines of a file of samples; none where there is no file.

    Raises:
        ValueError: It is no such file, or its samples were not drawn as the `header` says.
    """
    path = Path(path)
    if not path.exists():
        return []

    lines = path.read_text().split("\n")[
        :-1
    ]  # behind the last line break is what a killed run has begun

    try:
        found, *samples = (json.loads(line) for line in lines)
        samples = [Sample(**sample) for sample in samples]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no file of samples: {error}") from error

    if header is not None:
        header = json.loads(json.dumps(header))
        differing = sorted(
            key for key in set(header) | set(found) if header.get(key) != found.get(key)
        )
        if differing:
            changes = "; ".join(
                f"{key} was {found.get(key)!r} and is {header.get(key)!r}" for key in differing
            )
            raise ValueError(
                f"{path} holds samples that were drawn otherwise: {changes}. Give another file."
            )

    return samples


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleEvaluation(Provenance):
    """What `examples/evaluate_samples.py --output` writes: the fields of `Provenance`, then these,
    flat.

    `data` is the text that the samples are compared with, in as many sequences of the same length.

    Attributes:
        num_samples, length, seed, generate_options: How the samples were drawn.
        judge: The model that read them, and the text. Null without one, as all that follows up to
            `mauve_scale`.
        generative_perplexity: Of the samples; `generative_nats_per_token` with its
            `generative_standard_error`.
        text_perplexity: Of the text, by the same judge.
        mauve, mauve_scale: Of samples and text.
        entropy, entropy_std, distinct_1, distinct_2, distinct_3, repetition_4: See
            `TokenStatistics`; in the model's own tokens.
        text_entropy, text_entropy_std, text_distinct_1, text_distinct_2, text_distinct_3,
            text_repetition_4: The same of the text.
        warnings: See `warnings_of`.
    """

    num_samples: int
    length: int
    seed: int
    generate_options: dict[str, Any]
    judge: str | None
    generative_perplexity: float | None
    generative_nats_per_token: float | None
    generative_standard_error: float | None
    text_perplexity: float | None
    mauve: float | None
    mauve_scale: float | None
    entropy: float
    entropy_std: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetition_4: float
    text_entropy: float
    text_entropy_std: float
    text_distinct_1: float
    text_distinct_2: float
    text_distinct_3: float
    text_repetition_4: float
    warnings: list[str]


def warnings_of(
    samples: TokenStatistics,
    text: TokenStatistics,
    perplexity: float | None,
    text_perplexity: float | None,
    options: dict[str, Any],
) -> list[str]:
    """In which ways the metrics flatter, or can't be compared. Without a judge the perplexities are
    None.

    Example:
        >>> text = TokenStatistics(5000, entropy=5.4, entropy_std=0.2, distinct_1=0.1, distinct_2=0.4, distinct_3=0.8,
        ...                        repetition_4=0.01)
        >>> warnings_of(text, text, 20.0, 20.0, {})
        []
    """
    found = []
    if samples.entropy < text.entropy - text.entropy_std:
        found.append(
            f"The samples' entropy, {samples.entropy:.2f} nats, is more than a standard deviation below the text's, "
            f"{text.entropy:.2f} ± {text.entropy_std:.2f}: they repeat themselves, which lowers generative perplexity."
        )

    if samples.repetition_4 > 0.05 + 2 * text.repetition_4:
        found.append(
            f"{samples.repetition_4:.1%} of a sample's 4-grams have occurred in it before, {text.repetition_4:.1%} of "
            "the text's: generative perplexity is lowered by that."
        )

    if perplexity is not None and text_perplexity is not None and perplexity < text_perplexity:
        found.append(
            f"The judge finds the samples, at {perplexity:.1f}, likelier than the text, at {text_perplexity:.1f}: "
            "lower is no longer better."
        )

    if steered := {name: value for name, value in options.items() if name != "decode"}:
        found.append(
            f"The samples are steered ({steered}): they follow another distribution than the model's, and trade "
            "diversity for generative perplexity."
        )

    if perplexity is not None and samples.num_sequences < NUM_SAMPLES:
        found.append(
            f"{samples.num_sequences:,} samples, where {NUM_SAMPLES:,} are customary: MAUVE depends on their number."
        )

    return found


def reference_sequences(text: PackedTokens, num_sequences: int) -> list[list[int]]:
    """So many blocks of a text, spread evenly over it.

    Raises:
        ValueError: It has not so many.
    """
    if not 1 <= num_sequences <= len(text):
        raise ValueError(
            f"The text has {len(text)} sequences of {text.sequence_length} tokens, fewer than the {num_sequences} "
            "samples it is to be compared with: give more text, or ask for fewer or shorter samples."
        )

    return [
        text[index * len(text) // num_sequences]["input_ids"].tolist()
        for index in range(num_sequences)
    ]


def evaluate_samples(
    samples: Sequence[Sample],
    text: PackedTokens,
    tokenizer: PreTrainedTokenizerBase,
    judge: PreTrainedModel | None,
    judge_tokenizer: PreTrainedTokenizerBase | None,
    provenance: dict[str, Any],
    seed: int = 0,
    generate_options: dict[str, Any] | None = None,
    mauve_scale: float = MAUVE_SCALE,
    batch_size: int = 8,
    progress: bool = False,
) -> SampleEvaluation:
    """Everything that `SampleEvaluation` says of samples, beside text in blocks of their length.

    Args:
        text: Held-out text, packed by the model's `tokenizer` into sequences of the samples'
            length.
        judge: By `load_judge`; None leaves out generative perplexity and MAUVE.
        provenance: The fields of `Provenance`, by `provenance_of`.
    """
    references = reference_sequences(text, len(samples))
    own, of_text = (
        token_statistics([sample.input_ids for sample in samples]),
        token_statistics(references),
    )
    generate_options = generate_options or {}
    by_judge = dict.fromkeys(BY_JUDGE)

    if judge is not None:
        reference_texts = [tokenizer.decode(ids, **READABLE) for ids in references]
        judged, judged_text = (
            judge_texts(texts, judge, judge_tokenizer, batch_size, progress=progress)
            for texts in ([sample.text for sample in samples], reference_texts)
        )
        by_judge = {
            "judge": judge.name_or_path,
            "generative_perplexity": judged.perplexity,
            "generative_nats_per_token": judged.nats_per_token,
            "generative_standard_error": judged.standard_error,
            "text_perplexity": judged_text.perplexity,
            "mauve": mauve_score(judged_text.features, judged.features, mauve_scale),
            "mauve_scale": mauve_scale,
        }

    perplexities = by_judge["generative_perplexity"], by_judge["text_perplexity"]
    statistics = {name: value for name, value in vars(own).items() if name != "num_sequences"}
    statistics |= {
        f"text_{name}": value for name, value in vars(of_text).items() if name != "num_sequences"
    }

    return SampleEvaluation(
        **provenance,
        num_samples=len(samples),
        length=text.sequence_length,
        seed=seed,
        generate_options=generate_options,
        **by_judge,
        **statistics,
        warnings=warnings_of(own, of_text, *perplexities, generate_options),
    )


def sample_rows(evaluation: SampleEvaluation) -> list[tuple[str, str, str]]:
    """What is measured, of the samples, of the text; what was not measured, or is of both, is left
    empty.
    """
    e = evaluation
    rows = [
        ("entropy, nats", f"{e.entropy:.3f}", f"{e.text_entropy:.3f}"),
        ("repeated 4-grams", f"{e.repetition_4:.4f}", f"{e.text_repetition_4:.4f}"),
        ("distinct 1-grams", f"{e.distinct_1:.4f}", f"{e.text_distinct_1:.4f}"),
        ("distinct 2-grams", f"{e.distinct_2:.4f}", f"{e.text_distinct_2:.4f}"),
        ("distinct 3-grams", f"{e.distinct_3:.4f}", f"{e.text_distinct_3:.4f}"),
    ]

    if e.judge is not None:
        perplexities = f"{e.generative_perplexity:.2f}", f"{e.text_perplexity:.2f}"
        rows.insert(0, (f"perplexity by {e.judge}", *perplexities))
        rows.append((f"MAUVE, scale {e.mauve_scale:g}", f"{e.mauve:.4f}", ""))

    return rows


def sample_table(evaluation: SampleEvaluation) -> str:
    """To print: samples beside the text, and the warnings."""
    rows = [
        (f"{evaluation.num_samples:,} x {evaluation.length:,} tokens", "samples", "text"),
        *sample_rows(evaluation),
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:<{width}}  {own:>9}  {text:>9}".rstrip() for name, own, text in rows]
    if evaluation.judge is None:
        lines.append(NOT_MEASURED)

    return "\n".join(lines + [f"Warning: {warning}" for warning in evaluation.warnings])
