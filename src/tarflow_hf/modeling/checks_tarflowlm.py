"""Checks of what the model is given. Each raises a ValueError that says what is allowed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def check_length(length: int, patch_size: int, longest: int) -> None:
    """Raises a ValueError unless the length is a positive multiple of the patch size, up to `longest`."""
    if length > longest:
        raise ValueError(
            f"A sequence of {length} tokens is longer than max_position_embeddings, {longest}. Cut it, or score its "
            "parts one by one."
        )
    if length % patch_size or length == 0:
        raise ValueError(
            f"The sequence length must be a positive multiple of patch_size: {length}, {patch_size}."
        )


def check_size(latents: Tensor, latent_size: int) -> None:
    """Raises a ValueError unless the latents have the shape (..., d)."""
    check_is_tensor("latents", latents)
    if latents.ndim == 0 or latents.shape[-1] != latent_size:
        raise ValueError(
            f"The last dimension of the latents must be latent_size, {latent_size}: {tuple(latents.shape)}."
        )


def check_latents(latents: Tensor, latent_size: int, patch_size: int, longest: int) -> None:
    """Raises a ValueError unless the latents, or the noise, have the shape (B, T, d) with T in range."""
    check_size(latents, latent_size)
    if latents.ndim != 3:
        raise ValueError(
            f"Latents and noise must have shape (B, T, d), not {tuple(latents.shape)}."
        )
    if latents.shape[0] == 0:
        raise ValueError(f"Latents and noise must not be empty: {tuple(latents.shape)}.")

    check_length(latents.shape[1], patch_size, longest)


def check_mask(attention_mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless the mask has the shape (B, T)."""
    check_is_tensor("attention_mask", attention_mask)
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have shape (B, T) = {tuple(shape)}, not {tuple(attention_mask.shape)}."
        )


def require(condition: Tensor, message: str) -> None:
    """Raises a ValueError unless the condition holds; on an accelerator it asserts asynchronously."""
    if torch.compiler.is_compiling():
        return

    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message)
    elif condition.device.type != "meta":
        torch._assert_async(condition, message)


def check_ids(
    input_ids: Tensor,
    config: PreTrainedConfig,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Checks ids (B, T), and replaces those at padding, which may be anything, by 0.

    Returns:
        The ids as int64.

    Raises:
        ValueError: If they are no integers of this shape, too many, no multiple of the patch size,
            or outside the vocabulary, or if positions do not count them from 0.
    """
    check_is_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or input_ids.numel() == 0 or not is_integer(input_ids):
        raise ValueError(
            f"input_ids must be integers of shape (B, T), not empty: {input_ids.dtype}, {tuple(input_ids.shape)}."
        )

    check_length(input_ids.shape[1], config.patch_size, config.max_position_embeddings)
    input_ids = input_ids.long()
    if attention_mask is not None:
        check_mask(attention_mask, input_ids.shape)
        input_ids = input_ids.masked_fill(attention_mask == 0, 0)

    require(
        ((input_ids >= 0) & (input_ids < config.vocab_size)).all(),
        f"input_ids must be in 0, ..., vocab_size - 1 = {config.vocab_size - 1}. For a tokenizer of more tokens call "
        "model.resize_token_embeddings(len(tokenizer)), and train these.",
    )
    check_positions(position_ids, input_ids, attention_mask)
    return input_ids


def check_labels(
    labels: Tensor, input_ids: Tensor, is_scored: Tensor | None, pad_token_id: int | None = None
) -> None:
    """Raises a ValueError unless the labels are the ids (B, T) at all tokens that are scored.

    A collator may write -100 at every token that has the padding token's id. Such a label counts as
    equal to the id.
    """
    is_label = labels == input_ids
    if pad_token_id is not None:
        is_label = is_label | ((labels == -100) & (input_ids == pad_token_id))

    require(
        (is_label if is_scored is None else is_label | ~is_scored).all(),
        "labels must equal input_ids at every real token, because the bound is that of whole sequences: give "
        "labels=input_ids, or set config.pad_token_id if a collator writes -100 wherever that token stands. A model "
        "with conditional=True can leave out a prompt: its -100 are what is observed.",
    )


def check_positions(
    position_ids: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None
) -> None:
    """Raises a ValueError unless the positions (B, T) count real tokens from 0."""
    if position_ids is None:
        return

    check_is_tensor("position_ids", position_ids)
    if position_ids.shape[-1:] != input_ids.shape[-1:]:
        raise ValueError(
            f"position_ids must have shape (B, T) = {tuple(input_ids.shape)}, not {tuple(position_ids.shape)}."
        )

    expected = torch.arange(position_ids.shape[-1], device=position_ids.device)
    is_counted = position_ids == expected
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        is_real = attention_mask != 0
        is_counted = (position_ids == is_real.cumsum(-1) - 1) | ~is_real

    require(
        is_counted.all(),
        "position_ids must count the tokens of each sequence from 0, as the model does without them. Sequences that "
        "are packed into one row cannot be told apart: give each a row of its own, with an attention_mask.",
    )


OF_TOKENS = ("labels", "observed_mask", "known_mask")  # the others have a latent for each token


def check_given(shape: tuple[int, int], latent_size: int, **given: Tensor | None) -> None:
    """Raises a ValueError unless each argument is None, or a tensor of its shape.

    Args:
        shape: (B, T) of the tokens beside which it stands.
    """
    for name, value in given.items():
        if value is None:
            continue

        check_is_tensor(name, value)
        expected = tuple(shape) if name in OF_TOKENS else (*shape, latent_size)
        if value.shape != expected:
            raise ValueError(f"{name} must have shape {expected}, not {tuple(value.shape)}.")


def check_is_tensor(name: str, value: Any) -> None:
    """Raises a ValueError unless the value is a tensor; the message begins with the name."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(value).__name__}: {value!r:.40}.")


def is_integer(values: Tensor) -> bool:
    """True if the tensor is of an integer type."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def check_generator(generator: torch.Generator | None) -> None:
    """Raises a ValueError unless the generator is one, or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, not {generator!r:.40}.")


def check_not_given(options: dict[str, Any]) -> None:
    """Raises a TypeError if arguments that the model does not have ask for something.

    `logits_to_keep=0` keeps all, and the `token_type_ids` of a tokenizer for pairs say nothing of a
    single text.
    """
    unknown = sorted(name for name, value in options.items() if not _asks_for_nothing(name, value))
    if unknown:
        hint = ""
        if "inputs_embeds" in unknown:
            hint = " It reads ids and draws their latents, which can be given as latents=..."
        if "cu_seq_lens_q" in unknown:
            hint = (
                " Sequences that share a row cannot be told apart: give each a row, or with TRL take "
                'packing_strategy="wrapped".'
            )

        raise TypeError(f"TarFlowLMModel.forward() has no arguments {unknown}.{hint}")


def _asks_for_nothing(name: str, value: Any) -> bool:
    if name == "token_type_ids" and isinstance(value, Tensor):
        return not bool(value.any())

    return value is None or value is False or (name == "logits_to_keep" and value == 0)


def check_num_flows(num_flows: int | None, num_layers: int) -> None:
    """Raises a ValueError unless a stack of so many layers can be cut there."""
    is_number = type(num_flows) is int and 1 <= num_flows <= num_layers
    if num_flows is not None and not is_number:
        raise ValueError(f"num_flows must be in 1, ..., {num_layers}, not {num_flows!r}.")


def check_stack_arguments(
    num_flows: int | None,
    stack: Any,
    reverse: bool,
    of_inverse: Mapping[str, Any],
    observed_mask: Tensor | None,
) -> None:
    """Checks where a stack is cut, and that what is given has a meaning for it.

    Raises:
        ValueError: If `num_flows` is out of range, or masks contradict each other or the stack.
        TypeError: If arguments of the inverse are given to the way to noise.
    """
    check_num_flows(num_flows, len(stack.layers))
    given = sorted(name for name, value in of_inverse.items() if value is not None)
    if given and not reverse:
        raise TypeError(f"Without reverse=True a stack of flows has no arguments {given}.")

    known, known_mask = of_inverse["known"], of_inverse["known_mask"]
    if (known is None) != (known_mask is None):
        raise ValueError("Give known and known_mask together: the latents, and where they are.")
    if known is not None and observed_mask is not None:
        raise ValueError(
            "Give known_mask or observed_mask, not both: what is observed has no latents."
        )
    if observed_mask is not None and not stack.is_conditional:
        raise ValueError(
            "observed_mask needs a conditional model: this one's config has conditional=False, and was trained to "
            "model all tokens."
        )
