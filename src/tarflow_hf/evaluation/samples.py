"""What a model's samples are like: generative perplexity, MAUVE, entropy, distinct n-grams,
repetition.

    samples = sample_to_file(model, tokenizer, "samples.jsonl", num_samples=5000)      # goes on where it was stopped
    judge, judge_tokenizer = load_judge("gpt2-large")
    judged = judge_texts([sample.text for sample in samples], judge, judge_tokenizer)  # nats, and features for MAUVE

None of these numbers means anything alone: a text of low entropy, which says the same thing again
and again, has a low generative perplexity. `warnings_of` says so where it is seen.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..baseline import longest_sequence
from ..data import PackedTokens
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from .judge import MAUVE_SCALE, judge_texts, mauve_score
from .likelihood import latent_noise
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
