"""A causal language model as a source: its parts, and the factors by which it multiplies."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..data import lost_path

SOFT_CAPS = ("final_logit_softcapping", "logit_soft_cap", "output_logit_soft_cap")


def load_source(
    source: str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Returns the model of an id or a folder, and its tokenizer if it has one.

    The arguments are those of [`from_causal_lm`].

    Raises:
        FileNotFoundError: If the source is a path that leads nowhere.
        ValueError: If it is no causal language model of the library.
    """
    advice = "Give a folder with a causal language model, or a repository of the Hub."
    if reason := lost_path(str(source), advice):
        raise FileNotFoundError(reason)

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is None:
        config = AutoConfig.from_pretrained(source)
        check_config(config)

    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError, KeyError):
            tokenizer = None  # the config may name the start token

    default = "auto" if gguf_file is None else torch.float32
    options["dtype"] = default if dtype is None else dtype
    return AutoModelForCausalLM.from_pretrained(source, **options), tokenizer


def check_config(config) -> None:
    """Raises a ValueError unless the library has a causal language model of this config."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder-decoder: its tokens depend on another text, which a flow does not "
            "read. Give a decoder-only model."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{config.model_type} is no causal language model of transformers (AutoModelForCausalLM does not know "
            "it): it has no causal decoder. Give a decoder-only model."
        )

    for name, what in (
        ("hidden_size", "it is a model of several parts; give its text model"),
        ("num_attention_heads", "models without attention are not converted"),
    ):
        if not hasattr(config, name):
            raise ValueError(f"The config of {config.model_type} has no {name}: {what}.")


@dataclass
class SourceParts:
    """The parts of a causal language model that a flow is made of."""

    base: PreTrainedModel  # the decoder with the token table
    embed: Any
    table: Tensor  # (V, w), the weight of `embed`
    head: Any
    weight: Tensor  # (V, w), that of the output projection
    bias: Tensor | None  # (V,)

    @property
    def is_tied(self) -> bool:
        return self.table.data_ptr() == self.weight.data_ptr()

    @classmethod
    def of(cls, source: PreTrainedModel) -> "SourceParts":
        """The parts of a source.

        Raises:
            ValueError: If one of them is missing or of another kind.
        """
        name = type(source).__name__
        check_config(source.config)
        base = _base_of(source)
        embed: Any = None
        head: Any = None
        if base is source:
            raise ValueError(f"{name} has no base model apart from its output projection.")

        with suppress(NotImplementedError, AttributeError):
            embed, head = source.get_input_embeddings(), source.get_output_embeddings()

        for part, what in ((embed, "input embeddings"), (head, "output embeddings")):
            if not isinstance(getattr(part, "weight", None), Tensor):
                raise ValueError(
                    f"{name} has no {what} (one matrix with a row for each token): mixture weights are a linear "
                    "map of the decoder's output. Give a model with a language model's head."
                )

        if not all(parameter.is_floating_point() for parameter in source.parameters()):
            raise ValueError(
                f"{name} is quantised: its weights are no matrices to copy. Load it without quantization_config, or "
                "call source.dequantize() first."
            )

        parts = cls(base, embed, embed.weight, head, head.weight, getattr(head, "bias", None))
        parts._check_shapes(name, source.config.hidden_size)
        return parts

    def _check_shapes(self, name: str, hidden_size: int) -> None:
        shapes = tuple(self.table.shape), tuple(self.weight.shape)
        if shapes[0] != shapes[1] or shapes[0][1] != hidden_size:
            raise ValueError(
                f"{name} has input embeddings {shapes[0]} and output embeddings {shapes[1]}, but both must be "
                f"(V, w) with the decoder's width w = {hidden_size}."
            )


def _base_of(source: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a source, or the source itself if it has none apart from its projection."""
    if source.base_model is not source:
        return source.base_model

    kind = MODEL_MAPPING.get(type(source.config), ())
    return next((child for child in source.children() if isinstance(child, kind)), source)


def start_token(source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The token that the source reads before a text."""
    holders = [tokenizer, source.config, source.generation_config]
    for name in ("bos_token_id", "eos_token_id"):
        for holder in holders:
            found = getattr(holder, name, None)
            found = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(found, int) and 0 <= found < source.config.vocab_size:
                return found

    raise ValueError(
        "The source has no beginning-of-sequence token, and no end-of-sequence token to stand for one: give "
        "start_token_id, the token that it reads before a text."
    )


def random_ids(parts: SourceParts, start: int, length: int) -> Tensor:
    """Ids (2, n) that begin with the start token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(parts.table), (2, length), generator=generator)
    ids[:, 0] = start
    return ids.to(parts.table.device)


def check_causal(source: PreTrainedModel, ids: Tensor) -> None:
    """Raises a ValueError if tokens change what was said before them."""
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % source.config.vocab_size
    with explained(f"{type(source).__name__} does not run as a causal language model does"):
        before, after = (source(x, use_cache=False).logits.float() for x in (ids, changed))

    difference = (before - after).abs()
    is_read = difference[:, :-1].max() > rounding(source.dtype) * difference.max()
    if is_read:
        raise ValueError(
            f"{type(source).__name__} is not causal: its logits read tokens behind them. If its config has is_decoder, "
            "set it to True; a model that was trained to read both sides is no source."
        )


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever a foreign model raises becomes a ValueError that begins with these words."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


def measured_embedding_factor(parts: SourceParts) -> float:
    """The c of `embed(ids) = c table[ids]`.

    Raises:
        ValueError: If the input embeddings are no multiple of the table.
    """
    ids = torch.arange(min(64, len(parts.table)), device=parts.table.device)
    inputs, rows = parts.embed(ids).double(), parts.table[ids].double()
    factor = _ratio(inputs, rows, parts.table.dtype)
    if factor is None or factor <= 0:
        raise ValueError(
            f"The input embeddings of {type(parts.base).__name__} are no multiple of their table."
        )

    return _snap(factor, parts.base.config, parts.table.dtype)


def measured_logit_factor(source: PreTrainedModel, parts: SourceParts, start: int) -> float:
    """The c of `logits = c head(hidden)`.

    Raises:
        ValueError: If the source does anything else to its logits.
    """
    longest = getattr(source.config, "max_position_embeddings", None) or 16
    ids = random_ids(parts, start, min(16, longest))
    with explained(f"{type(source).__name__} does not run as a causal language model does"):
        hidden = parts.base(ids, use_cache=False).last_hidden_state
        raw = parts.head(hidden).double()
        logits = source(ids, use_cache=False).logits.double()

    capped = [name for name in SOFT_CAPS if getattr(source.config, name, None)]
    factor = _ratio(logits, raw, parts.table.dtype) if logits.shape == raw.shape else None
    if capped or factor is None or factor <= 0:
        reason = f" ({capped[0]}={getattr(source.config, capped[0])})" if capped else ""
        raise ValueError(
            f"{type(source).__name__} post-processes its logits or its decoder's output{reason} as no output "
            "projection expresses: mixture weights are the softmax of a linear map of the decoder's output. Only a "
            "factor or a bias can be taken in. Give a source without that."
        )

    return _snap(factor, source.config, parts.table.dtype)


def _ratio(value: Tensor, base: Tensor, dtype: torch.dtype) -> float | None:
    """The c of `value = c base`, up to rounding to the dtype; None if there is none."""
    factor = ((value * base).sum() / base.square().sum().clamp_min(1e-300)).item()
    error = (value - factor * base).abs().max()
    is_close = error <= rounding(dtype) * value.abs().max()
    return factor if is_close and math.isfinite(factor) else None


def _snap(factor: float, config, dtype: torch.dtype) -> float:
    """A measured factor without its rounding: 1, or that of a field of the config."""
    candidates = [1.0, math.sqrt(config.hidden_size)]
    for name, value in config.to_dict().items():
        if type(value) in (int, float) and value > 0 and ("scal" in name or "multipl" in name):
            candidates.extend((float(value), 1 / value))

    best = min(candidates, key=lambda candidate: abs(candidate / factor - 1))
    return best if abs(best / factor - 1) <= rounding(dtype) else factor


def rounding(dtype: torch.dtype) -> float:
    return 1e-5 if dtype.itemsize >= 4 else 4 * torch.finfo(dtype).eps
