"""Samples as a judge reads them: generative perplexity and MAUVE."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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

from ..data import lost_path
from .likelihood import ratio_of_sums

JUDGE = "openai-community/gpt2-large"
MAUVE_SCALE = 5.0


def load_judge(
    name: str | os.PathLike = JUDGE, device: torch.device | str = "cpu", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model with its tokenizer.

    Args:
        name: A folder, or a repository of the Hub.
        options: Options of `from_pretrained`.

    Raises:
        FileNotFoundError: If the name is a path that leads nowhere.
        ValueError: If it gives no logits of tokens, or if the tokenizer is not the model's.
    """
    advice = "Give a folder with a causal language model, or a repository of the Hub."
    if reason := lost_path(str(name), advice):
        raise FileNotFoundError(reason)

    tokenizer = AutoTokenizer.from_pretrained(name)
    judge = AutoModelForCausalLM.from_pretrained(name, **options).to(device).eval()
    check_judge(judge, tokenizer)
    return judge, tokenizer


def check_judge(judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a model can judge, and that it reads the tokenizer's tokens.

    Raises:
        ValueError: If not.
    """
    if judge.get_output_embeddings() is None or judge.base_model is judge:
        raise ValueError(
            f"A judge needs logits for the next token, which {type(judge).__name__} has not: take "
            "a causal language model such as gpt2-large."
        )

    size, num_tokens = judge.get_input_embeddings().num_embeddings, len(tokenizer)
    if num_tokens > size:
        raise ValueError(
            f"The tokenizer has {num_tokens} tokens, the judge embeddings for {size}: it is another "
            "model's tokenizer."
        )


@dataclass(frozen=True)
class Judge:
    """A causal language model that reads samples, and how it does.

    Attributes:
        model, tokenizer: By `load_judge`.
        batch_size: Texts at once.
        mauve_scale: The scale of `mauve_score`.
        progress: Shows a bar.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 8
    mauve_scale: float = MAUVE_SCALE
    progress: bool = False

    def read(self, texts: Sequence[str]) -> "Judgement":
        return judge_texts(
            texts, self.model, self.tokenizer, self.batch_size, progress=self.progress
        )


@dataclass(frozen=True)
class Judgement:
    """A judge's view of n texts. A text's first token is not scored: nothing stands before it.

    Attributes:
        nats: The nats (n,) of each text.
        num_tokens: The number (n,) of its tokens that are scored.
        features: The judge's last hidden state at a text's last token, (n, width), for MAUVE.
        num_truncated: The number of texts that were longer than the judge could read.
    """

    nats: Tensor
    num_tokens: Tensor
    features: Tensor
    num_truncated: int

    @property
    def nats_per_token(self) -> float:
        return ratio_of_sums(self.nats, self.num_tokens)[0]

    @property
    def standard_error(self) -> float:
        """The standard error of `nats_per_token`, over the texts."""
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
    """Reads texts with a judge, whose own tokenizer cuts them into tokens.

    Args:
        max_length: The number of tokens at which longer texts are cut; at most as many as the judge
            can read.

    Raises:
        ValueError: If there is no text, if one has fewer than two of the judge's tokens, if the
            model can't judge, or if its answer is not finite.
    """
    check_judge(judge, tokenizer)
    encoded, num_truncated = _encode(texts, judge, tokenizer, max_length)
    nats, features = [], []

    with _last_states(judge) as states:
        starts = range(0, len(encoded), batch_size)
        for start in tqdm(starts, desc="judging", unit="batch", disable=not progress, leave=False):
            ids = encoded[start : start + batch_size]
            lengths = torch.tensor([len(row) for row in ids], device=judge.device)
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(judge.device)  # (B, T)
            nats.append(_nats_of_rows(judge, ids, lengths))
            features.append(states.pop()[torch.arange(len(ids)), lengths - 1].float().cpu())

    nats = torch.cat(nats)
    if not bool(nats.isfinite().all()):
        raise ValueError(
            f"The judge's nats are not finite for {int((~nats.isfinite()).sum())} texts."
        )

    num_tokens = torch.tensor([len(row) - 1 for row in encoded])
    return Judgement(nats, num_tokens, torch.cat(features), num_truncated)


def _encode(
    texts: Sequence[str],
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[Tensor], int]:
    """The ids of each text, cut to what the judge reads, and how many were cut."""
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
    return [torch.tensor(ids[:longest]) for ids in encoded], num_truncated


@contextmanager
def _last_states(judge: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects the judge's last hidden states (B, T, width) of each forward pass."""
    states: list[Tensor] = []
    hook = judge.base_model.register_forward_hook(
        lambda module, arguments, output: states.append(output[0])
    )
    try:
        yield states
    finally:
        hook.remove()


def _nats_of_rows(judge: PreTrainedModel, ids: Tensor, lengths: Tensor) -> Tensor:
    """The nats (B,) of ids (B, T) behind the first one, where each row has its length (B,)."""
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    output = judge(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    logits = output.logits[:, :-1].float()
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T - 1)
    return loss.masked_fill(~mask[:, 1:], 0).cpu().double().sum(-1)


def mauve_score(
    text_features: Tensor,
    sample_features: Tensor,
    scale: float = MAUVE_SCALE,
    num_buckets: int | None = None,
) -> float:
    """MAUVE of features (n, width) and (m, width), between 0 and 1 (alike), by `mauve-text`.

    It depends on n, m, the judge, the scale and the number of buckets. Compare only figures that
    agree in all of them.

    Args:
        num_buckets: By default a tenth of the smaller of n and m.

    Raises:
        ImportError: If there is no `mauve-text`.
        ValueError: If features are of different widths, not finite, or fewer than 2.

    References:
        Pillutla et al., *MAUVE: Measuring the Gap Between Neural Text and Human Text*, 2021,
        arXiv:2102.01454.
    """
    for name, features in (("text_features", text_features), ("sample_features", sample_features)):
        if features.ndim != 2 or len(features) < 2 or not bool(features.isfinite().all()):
            raise ValueError(
                f"{name} must be (n, width) with n of at least 2, finite, "
                f"not {tuple(features.shape)}."
            )

    if text_features.shape[1] != sample_features.shape[1]:
        widths = f"{text_features.shape[1]} and {sample_features.shape[1]}"
        raise ValueError(f"The features have widths {widths}: they are not of the same judge.")

    try:
        import mauve
    except ImportError as error:
        raise ImportError(f"MAUVE needs its library: `pip install mauve-text` ({error}).") from None

    result = mauve.compute_mauve(
        p_features=text_features.numpy(),
        q_features=sample_features.numpy(),
        mauve_scaling_factor=scale,
        num_buckets="auto" if num_buckets is None else num_buckets,
    )

    return float(result.mauve)
