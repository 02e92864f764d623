"""The texts of a call of `generate`: which tokens are known, and where new ones go.

Shapes: B batch, n tokens of a prompt or of the pieces, T tokens of the sequences.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .checks_tarflowlm import check_ids, check_is_tensor, check_positions, is_integer
from .configuration_tarflowlm import TarFlowLMConfig
from .generation_options import GenerationOptions
from .slots_tarflowlm import Pieces

logger = logging.get_logger(__name__)


class Prompt(NamedTuple):
    """The texts that are given to `generate`, to be continued or filled."""

    ids: Tensor  # (B, n)
    is_real: Tensor  # (B, n): False at padding
    is_gap: Tensor | None  # (B, n): not 0 where new tokens go; None: they go behind the prompt
    is_infill: bool  # the gaps are those of an `infill_mask`


@dataclass
class Text:
    """The tokens of a batch, known and new.

    The flows want the real tokens of a sequence in one piece, its padding at the end, wherever it
    was: `pieces` takes sequences (B, T, ...) there and back.
    """

    tokens: Tensor  # (B, T): the prompt, or the text with gaps, and 0 at new tokens behind it
    is_new: Tensor  # (B, T): True at tokens to write
    first_new: int  # the first of these in any sequence
    pieces: Pieces
    ids: Tensor  # pieces (B, n): known tokens, and 0
    is_known: Tensor  # pieces (B, n)
    is_real: Tensor  # pieces (B, n)
    is_infill: bool  # gaps are filled, and the text keeps its length

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask (B, n) of the pieces; None if nothing is padded."""
        return None if self.pieces.order is None else self.is_real

    @property
    def num_leading(self) -> list[int]:
        """The number of known tokens in front of the first new one, of each sequence."""
        return self.is_known.long().cumprod(-1).sum(-1).tolist()

    @property
    def is_missing(self) -> Tensor:
        """True at the new tokens of the pieces, (B, n)."""
        return self.is_real & ~self.is_known


def read_prompt(
    inputs: Tensor | None,
    noise: Tensor | None,
    infill_mask: Tensor | None,
    kwargs: dict[str, Any],
    config: TarFlowLMConfig,
    device: torch.device,
) -> Prompt:
    """Takes the prompt out of the arguments of `generate`.

    Without one it is (B, 0). Noise (B, T, d) with an attention mask (B, T) and nothing else is all
    gap.

    Args:
        inputs, noise, infill_mask: Arguments of `generate`.
        kwargs: Its others, from which `input_ids`, `attention_mask` and `position_ids` are removed.
        config: The model's.
        device: The device of a prompt that is not given.

    Raises:
        ValueError: If an argument has another type or shape.
    """
    input_ids = kwargs.pop("input_ids", None)
    if input_ids is not None and inputs is not None:
        raise ValueError("Give the prompt as inputs or as input_ids, not as both.")

    prompt = inputs if input_ids is None else input_ids
    attention_mask = kwargs.pop("attention_mask", None)
    position_ids = kwargs.pop("position_ids", None)
    given = {"inputs": prompt, "attention_mask": attention_mask}
    for name, value in (given | {"noise": noise, "infill_mask": infill_mask}).items():
        if value is not None:
            check_is_tensor(name, value)

    if noise is not None and noise.ndim != 3:
        raise ValueError(f"noise must have shape (B, T, d), not {tuple(noise.shape)}.")

    is_gap = infill_mask
    if prompt is None and noise is not None and attention_mask is not None:
        prompt = attention_mask.new_full(noise.shape[:2], config.pad_token_id or 0).long()
        is_gap = torch.ones_like(prompt)

    if attention_mask is not None and (prompt is None or attention_mask.shape != prompt.shape):
        shape = None if prompt is None else tuple(prompt.shape)
        raise ValueError(
            f"attention_mask must have the shape of the prompt: {tuple(attention_mask.shape)}, {shape}."
        )

    if prompt is None:
        batch_size = 1 if noise is None else len(noise)
        prompt = torch.empty(batch_size, 0, dtype=torch.long, device=device)

    is_empty = (
        prompt.ndim == 2 and prompt.shape[1] == 0
    )  # a tokenizer makes floats of an empty text
    if prompt.ndim != 2 or not (is_integer(prompt) or is_empty):
        raise ValueError(
            f"The prompt must be integers of shape (B, n): {prompt.dtype}, {tuple(prompt.shape)}."
        )

    check_positions(position_ids, prompt, attention_mask)
    is_real = torch.ones_like(prompt, dtype=torch.bool)
    if attention_mask is not None:
        is_real = attention_mask != 0

    return Prompt(prompt.long(), is_real, is_gap, infill_mask is not None)


def lay_out(
    prompt: Prompt,
    noise: Tensor | None,
    options: GenerationOptions,
    config: TarFlowLMConfig,
    device: torch.device,
) -> Text:
    """The text of each sequence to write, with known tokens and room for new ones."""
    tokens, is_real, is_known = prompt.ids, prompt.is_real, prompt.is_real
    if prompt.is_gap is not None:
        is_known = is_real & (prompt.is_gap == 0)

    if noise is None:
        num_copies = options.num_return_sequences * options.num_candidates
        tokens, is_real, is_known = (
            x.repeat_interleave(num_copies, 0) for x in (tokens, is_real, is_known)
        )

    num_new = 0
    if prompt.is_gap is None:
        num_new = text_length(is_real, noise, options, config) - tokens.shape[1]

    tokens = F.pad(tokens, (0, num_new))
    is_real = F.pad(is_real, (0, num_new), value=True)
    is_known = F.pad(is_known, (0, num_new), value=False)
    is_new = is_real & ~is_known

    pieces = Pieces(is_real.to(device))
    ids, known_pieces, real_pieces = (
        pieces.gather(x.to(device)) for x in (tokens, is_known, is_real)
    )
    is_any_new = bool(is_new.any())
    return Text(
        tokens=tokens,
        is_new=is_new,
        first_new=int(is_new.any(0).int().argmax()) if is_any_new else tokens.shape[1],
        pieces=pieces,
        ids=check_ids(ids.masked_fill(~known_pieces, 0), config),
        is_known=known_pieces,
        is_real=real_pieces,
        is_infill=prompt.is_infill,
    )


def text_length(
    is_prompt: Tensor, noise: Tensor | None, options: GenerationOptions, config: TarFlowLMConfig
) -> int:
    """The number of tokens of a sequence, with its prompt (B, n), and the prompt's padding."""
    prompt_length = is_prompt.shape[1]
    longest = config.max_position_embeddings
    if prompt_length > longest or (prompt_length == longest and noise is None):
        raise ValueError(
            f"A prompt of {prompt_length} tokens leaves no room: max_position_embeddings is {longest}."
        )

    if noise is not None:
        length = noise.shape[1]
        if length > longest:
            raise ValueError(
                f"noise for {length} tokens, but max_position_embeddings is {longest}."
            )
    elif options.max_new_tokens is not None:
        length = prompt_length + options.max_new_tokens
    else:
        length = longest if options.max_length is None else options.max_length

    if length > longest:
        logger.warning_once(
            f"{length} tokens were asked for; the model was made for {longest}, and stops there."
        )
        length = longest

    if length < prompt_length or (length == prompt_length and noise is None):
        raise ValueError(
            f"Nothing to generate: the prompt has {prompt_length} tokens, the whole would have {length}."
        )

    patch_size = config.patch_size
    lengths = is_prompt.sum(-1)
    if (length - prompt_length) % patch_size or bool((lengths % patch_size).any()):
        raise ValueError(
            f"Prompts and what follows them must be multiples of patch_size, {patch_size}, not "
            f"{lengths.tolist()} and {length - prompt_length} tokens."
        )

    return length
