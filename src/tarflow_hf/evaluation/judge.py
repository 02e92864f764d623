"""Samples as a judge reads them: generative perplexity and MAUVE."""

import math
import os
from collections.abc import Sequence
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

from .likelihood import ratio_of_sums

JUDGE = "openai-community/gpt2-large"
MAUVE_SCALE = 5.0


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
