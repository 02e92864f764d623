"""Samples of a model, kept in a file, and their evaluation compared with text.

    sampling = Sampling(num_samples=5000)
    samples = sample_to_file(model, tokenizer, "samples.jsonl", sampling)  # resumes
    judge = Judge(*load_judge("gpt2-large"))
    evaluation = evaluate_samples(samples, text, tokenizer, judge, provenance, sampling)

None of these numbers means anything by itself. A text of low entropy, which says the same thing
again and again, has a low generative perplexity. `warnings_of` says so if it is seen.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..baseline import is_discrete, longest_sequence, sample_discrete
from ..data import PackedTokens
from ..noise import latent_noise
from .judge import Judge, mauve_score
from .provenance import Provenance, weights_checksum
from .token_statistics import TokenStatistics, token_statistics

NUM_SAMPLES = 5000  # the paper's protocol, as the judge and the scale
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


@dataclass(frozen=True)
class Sample:
    input_ids: list[int]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The options of drawing samples.

    Attributes:
        num_samples: Number of samples; 5,000 in the paper's protocol.
        length: Tokens of each sample; by default the longest that the model takes.
        seed: A sample of a TarFlowLM follows from it and from the sample's number, whatever the
            batches.
        generate_options: Options of `generate`, such as `temperature` and `top_p`.
        batch_size: Samples at once.
        progress: Shows a bar.

    Raises:
        ValueError: If `num_samples`, `batch_size` or `length` is not positive.
    """

    num_samples: int = NUM_SAMPLES
    length: int | None = None
    seed: int = 0
    generate_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    progress: bool = False

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

        if self.length is not None and self.length < 1:
            raise ValueError(
                f"length must be at least 1, or None for the longest, not {self.length}."
            )

    def length_for(self, model: PreTrainedModel) -> int:
        """The length of a sample of this model."""
        return longest_sequence(model) if self.length is None else self.length


def sample_to_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    sampling: Sampling,
) -> list[Sample]:
    """Draws samples of equal length, and keeps them in a file.

    The file has one JSON object a line; the first one says how the samples were drawn. Samples
    that the file already holds are not drawn again, except a line that was cut short.

    No token ends a sample: in training, too, texts are cut from a stream of documents. Special
    tokens are left out of its `text`.

    Raises:
        ValueError: If the file holds samples that were drawn otherwise.
    """
    # The library draws a discrete model's samples a batch at a time, and only as a whole.
    is_whole = is_discrete(model)
    header = _header(model, sampling)
    path = Path(path)
    samples = read_samples(path, header)
    if is_whole:
        samples = samples[: len(samples) // sampling.batch_size * sampling.batch_size]

    lines = [json.dumps(header)] + [json.dumps(vars(sample)) for sample in samples]
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    aside.replace(path)

    model.eval()
    with path.open("a", encoding="utf-8") as file, _bar(sampling, len(samples)) as bar:
        while len(samples) < sampling.num_samples:
            end = len(samples) + sampling.batch_size
            end = end if is_whole else min(end, sampling.num_samples)
            indices = range(len(samples), end)

            for row in draw(model, indices, sampling).tolist():
                samples.append(Sample(row, tokenizer.decode(row, **READABLE)))
                file.write(json.dumps(vars(samples[-1])) + "\n")

            file.flush()
            bar.update(len(indices))

    return samples[: sampling.num_samples]


def _header(model: PreTrainedModel, sampling: Sampling) -> dict[str, Any]:
    header = {
        "weights_sha256": weights_checksum(model),
        "length": sampling.length_for(model),
        "seed": sampling.seed,
        "options": sampling.generate_options,
    }
    return header | ({"batch_size": sampling.batch_size} if is_discrete(model) else {})


def _bar(sampling: Sampling, num_drawn: int) -> tqdm:
    return tqdm(
        total=sampling.num_samples,
        initial=num_drawn,
        desc="sampling",
        disable=not sampling.progress,
        leave=False,
    )


@torch.no_grad()
def draw(model: PreTrainedModel, indices: range, sampling: Sampling) -> Tensor:
    """Draws the samples (B, T) with B numbers."""
    length, seed = sampling.length_for(model), sampling.seed
    options = dict(sampling.generate_options)

    if is_discrete(model):
        return sample_discrete(model, len(indices), length, (seed, indices[0]), **options)

    noise = latent_noise(model, length, [(seed, index) for index in indices])[0]
    temperature = options.pop("temperature", 1.0)
    return model.generate(noise=temperature * noise, **options)


def read_samples(path: str | os.PathLike, header: dict[str, Any] | None = None) -> list[Sample]:
    """Reads the whole lines of a file of samples; none if there is no file.

    Args:
        header: The first line that the file must have.

    Raises:
        ValueError: If it is no such file, or if its samples were not drawn as the `header` says.
    """
    path = Path(path)
    if not path.exists():
        return []

    # Text behind the last line break was begun by a run that was killed.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]

    entries: list[Any] = []
    try:
        for line in lines:
            entry = json.loads(line)
            entries.append(Sample(**entry) if entries else dict(entry))

        found, *samples = entries
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of samples: line {len(entries) + 1}: {error}. Give another file, or move this one away."
        ) from None

    if header is not None:
        _check_header(path, found, header)

    return samples


def _check_header(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Checks that samples were drawn as expected.

    Raises:
        ValueError: If not. The message says what differs.
    """
    expected = json.loads(json.dumps(expected))
    differing = sorted(
        key for key in set(expected) | set(found) if expected.get(key) != found.get(key)
    )
    if differing:
        changes = "; ".join(
            f"{key} was {found.get(key)!r} and is {expected.get(key)!r}" for key in differing
        )
        raise ValueError(
            f"{path} holds samples that were drawn otherwise: {changes}. Give another file."
        )


@dataclass(frozen=True, kw_only=True)
class SampleEvaluation(Provenance):
    """The result of `examples/evaluate_samples.py --output`: flat, as `Evaluation`.

    The fields are those of `Provenance`, then these. `data` is the text that the samples are
    compared with: as many sequences of the same length.

    Attributes:
        num_samples, length, seed, generate_options: The settings by which the samples were drawn.
        judge: The model that read them, and the text. Null without one, as all that follows up to
            `mauve_scale`.
        generative_perplexity: The perplexity of the samples; the exponential of `generative_nats_per_token`.
        generative_nats_per_token, generative_standard_error: The samples' nats per token under
            the judge, and their standard error.
        text_perplexity: The perplexity of the text, by the same judge.
        mauve, mauve_scale: MAUVE of samples and text, and its scale.
        entropy, entropy_std, distinct_1, distinct_2, distinct_3, repetition_4: Statistics of the
            samples in the model's own tokens, see `TokenStatistics`.
        text_entropy, text_entropy_std, text_distinct_1, text_distinct_2, text_distinct_3,
            text_repetition_4: The same statistics of the text.
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
    """Sentences that say in which ways the metrics flatter, or can't be compared.

    Without a judge the perplexities are None.

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
    """Blocks of a text, spread evenly over it.

    Raises:
        ValueError: If the text has fewer.
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
    judge: Judge | None,
    provenance: dict[str, Any],
    sampling: Sampling,
) -> SampleEvaluation:
    """Compares samples with text in blocks of their length.

    Args:
        text: Held-out text, packed by the model's `tokenizer` into sequences of the samples'
            length.
        judge: None leaves out generative perplexity and MAUVE.
        provenance: The fields of `Provenance`, by `provenance_of`.
        sampling: The settings by which the samples were drawn.
    """
    references = reference_sequences(text, len(samples))
    own = token_statistics([sample.input_ids for sample in samples])
    of_text = token_statistics(references)

    by_judge = dict.fromkeys(BY_JUDGE)
    if judge is not None:
        reference_texts = [tokenizer.decode(ids, **READABLE) for ids in references]
        by_judge = _judge_fields(judge, [sample.text for sample in samples], reference_texts)

    statistics = asdict(own) | {f"text_{name}": value for name, value in asdict(of_text).items()}
    for name in ("num_sequences", "text_num_sequences"):
        del statistics[name]

    perplexities = by_judge["generative_perplexity"], by_judge["text_perplexity"]
    return SampleEvaluation(
        **provenance,
        num_samples=len(samples),
        length=text.sequence_length,
        seed=sampling.seed,
        generate_options=sampling.generate_options,
        **by_judge,
        **statistics,
        warnings=warnings_of(own, of_text, *perplexities, sampling.generate_options),
    )


def _judge_fields(judge: Judge, texts: list[str], reference_texts: list[str]) -> dict[str, Any]:
    """The fields `BY_JUDGE` of the samples' texts, and of those that they are compared with."""
    of_samples, of_text = judge.read(texts), judge.read(reference_texts)
    return {
        "judge": judge.model.name_or_path,
        "generative_perplexity": of_samples.perplexity,
        "generative_nats_per_token": of_samples.nats_per_token,
        "generative_standard_error": of_samples.standard_error,
        "text_perplexity": of_text.perplexity,
        "mauve": mauve_score(of_text.features, of_samples.features, judge.mauve_scale),
        "mauve_scale": judge.mauve_scale,
    }
