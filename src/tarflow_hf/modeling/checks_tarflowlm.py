"""Checks of what the model is given. Each raises a ValueError that says what is allowed."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def check_length(length: int, patch_size: int) -> None:
    """Raises a ValueError unless the length is a positive multiple of the patch size."""
    if length % patch_size or length == 0:
        raise ValueError(
            f"The sequence length must be a positive multiple of patch_size: {length}, {patch_size}."
        )


def check_mask(attention_mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless the mask has the shape (B, T)."""
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have shape (B, T) = {tuple(shape)}, not {tuple(attention_mask.shape)}."
        )


def require(condition: Tensor, message: str) -> None:
    """Raises where looking at the data is free; an accelerator asserts, and nobody waits for it."""
    if torch.compiler.is_compiling():
        return

    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message)
    elif condition.device.type != "meta":
        torch._assert_async(condition, message)


def check_ids(
    input_ids: Tensor, config: PreTrainedConfig, attention_mask: Tensor | None = None
) -> Tensor:
    """Checks ids (B, T), and replaces those at padding, which may be anything, by 0.

    Raises:
        ValueError: If they are no integers of this shape, too many, no multiple of the patch size,
            or outside the vocabulary.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers of shape (B, T), not empty: {input_ids.dtype}, {tuple(input_ids.shape)}."
        )
    if input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"A sequence of {input_ids.shape[1]} tokens is longer than max_position_embeddings, "
            f"{config.max_position_embeddings}."
        )

    check_length(input_ids.shape[1], config.patch_size)
    if attention_mask is not None:
        check_mask(attention_mask, input_ids.shape)
        input_ids = input_ids.masked_fill(attention_mask == 0, 0)

    require(
        ((input_ids >= 0) & (input_ids < config.vocab_size)).all(),
        f"input_ids must be in 0, ..., vocab_size - 1 = {config.vocab_size - 1}.",
    )
    return input_ids


def check_labels(labels: Tensor, input_ids: Tensor, is_scored: Tensor | None) -> None:
    """Raises a ValueError unless the labels are the ids (B, T) at all tokens that are scored."""
    is_label = labels == input_ids
    require(
        (is_label if is_scored is None else is_label | ~is_scored).all(),
        "labels must equal input_ids at every real token, because the bound is that of whole sequences: give "
        "labels=input_ids, or give a collator that writes -100 a padding token of its own.",
    )
