"""The tokens of a batch, written one position after another as the first flow completes them.

The library's logits processors and stopping criteria read what was written so far. All of this is
about texts whose real tokens are in one piece (`Pieces`), so that each sequence of a batch is
written as it would be alone.

Shapes: B batch, T tokens of the sequences, n of the pieces, P patch size, d latent size, V tokens
in the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks_tarflowlm import check_is_tensor
from .generation_layout import Text
from .inversion_tarflowlm import check_finite
from .slots_tarflowlm import take

# Latents (B, m, d), their places (B, m) in the pieces, tokens (B, V) that are forbidden there or
# None -> tokens (B, m)
ChooseTokens = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def processed(process: Callable, before: Tensor, logits: Tensor) -> Tensor:
    """Returns what logits processors make of logits (B, V) behind ids (B, n).

    Raises:
        ValueError: If that is no tensor of their shape, or they name a token that does not exist.
    """
    try:
        made = process(before, logits)
    except IndexError as error:
        raise ValueError(
            f"An option or a logits processor names a token outside 0, ..., {logits.shape[-1] - 1}: {error}."
        ) from error

    check_is_tensor("What a logits processor returns", made)
    if made.shape != logits.shape:
        raise ValueError(
            f"A logits processor must return logits of the shape {tuple(logits.shape)} that it is given, not "
            f"{tuple(made.shape)}."
        )

    return made.to(logits.dtype)


class TextEnds:
    """The ends of the texts of a batch, by the library's stopping criteria.

    Args:
        text: The batch. Only new tokens end a text.
        criteria: Maps ids (B, m) and None to True where a text ends with its last token, (B,).
    """

    def __init__(self, text: Text, criteria: Callable[[Tensor, None], Tensor]):
        self.criteria = criteria
        self.is_new = text.is_missing
        self.lengths = text.is_real.sum(-1)
        self.ends = self.lengths.clone()  # (B,): the number of tokens that stay
        self.has_ended = torch.zeros_like(self.ends, dtype=torch.bool)

    def read(self, tokens: Tensor, place: int) -> None:
        """Reads the tokens (B, n) up to a place, which is the last that was written."""
        is_end = self.criteria(tokens[:, : place + 1], None) & self.is_new[:, place]
        is_end = is_end & ~self.has_ended
        self.ends = torch.where(is_end, place + 1, self.ends)
        self.has_ended = self.has_ended | is_end

    def read_all(self, tokens: Tensor) -> None:
        """Reads whole texts (B, n)."""
        for place in range(tokens.shape[1]):
            self.read(tokens, place)

    def are_all_reached(self, num_tokens: int) -> bool:
        """True if no text goes on behind the first tokens."""
        return bool((self.has_ended | (self.lengths <= num_tokens)).all())


class RowGroup(NamedTuple):
    """Sequences that are written in step: they have as many known tokens in front."""

    rows: Tensor  # (b,)
    order: list[int]  # the places in the pieces, as the first flow passes them
    process: Callable[[Tensor, Tensor], Tensor]  # ids (b, m), logits (b, V) -> logits (b, V)


class TokenWriter:
    """Writes tokens as the first flow completes their latents, and says when it may stop.

    Args:
        text: The tokens that are known, and where new ones go.
        order: The places in the pieces, (B, n), as the first flow passes them.
        choose_tokens: Decodes latents.
        ends: Ends the work when all texts have ended, if given.
        groups: The sequences with their logits processors; none if there are none.
        streamer: Receives new tokens, if given.
    """

    def __init__(
        self,
        text: Text,
        order: Tensor,
        choose_tokens: ChooseTokens,
        ends: TextEnds | None = None,
        groups: Sequence[RowGroup] = (),
        streamer=None,
    ):
        self.order, self.choose_tokens, self.ends = order, choose_tokens, ends
        self.groups, self.streamer = groups, streamer
        self.tokens = text.ids.clone()  # pieces (B, n)
        self.is_new = text.is_missing
        self.is_forbidden: list[Tensor] = []  # (B, V) at each of the next tokens
        self.drafted = self.tokens[:, :0]  # (B, m): guesses of the next tokens

        # What is known to all sequences in front, the flow passes over.
        is_passed = take(~self.is_new, order).all(0)
        self.num_passed = int(is_passed.long().cumprod(0).sum())

    def process(self, logits: Tensor) -> Tensor:
        """The logits of the next token, processed by what each sequence has before it.

        Args:
            logits: The logits of the next token (B, V), or with guesses of the next m - 1 tokens those of the
                next m, (B m, V).
        """
        by_token = logits.unflatten(0, (len(self.tokens), -1))
        made = by_token.clone()
        tokens = self.tokens
        for step in range(by_token.shape[1]):
            last = self.num_passed + step
            if step:
                places = self.order[:, last - 1, None]
                guess = self.drafted[:, step - 1, None]
                guess = torch.where(take(self.is_new, places), guess, take(tokens, places))
                tokens = tokens.scatter(1, places, guess)

            for rows, order, process in self.groups:
                rows = rows.to(logits.device)
                before = tokens[rows, : order[last]]
                made[rows, step] = processed(process, before, by_token[rows, step])

        self.is_forbidden = list((made == -torch.inf).unbind(1))
        return made.flatten(0, 1)

    def put_draft(self, tokens: Tensor) -> None:
        """Shows guesses (B, m) of the next tokens to a streamer that takes them."""
        if tokens.shape[1] and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(tokens[:1].cpu())

    def put(self, latents: Tensor) -> bool:
        """Takes the latents (B, P, d) of the next position; returns True if all texts ended."""
        first = self.num_passed
        last = self.num_passed = first + latents.shape[1]

        if self.ends is not None or self.streamer is not None:  # they wait for tokens anyway
            check_finite(latents, f"The latent of token {first}, of the first flow's inverse,")

        places = self.order[:, first:last]
        is_forbidden = self.is_forbidden.pop(0) if self.is_forbidden else None
        new = self.choose_tokens(latents, places, is_forbidden)
        new = torch.where(take(self.is_new, places), new, take(self.tokens, places))
        self.tokens.scatter_(1, places, new)

        had_ended = self.ends is not None and bool(self.ends.has_ended.all())
        if self.ends is not None:
            for place in range(first, last):
                self.ends.read(self.tokens, place)

        if self.streamer is not None and not had_ended:
            end = last if self.ends is None else min(last, int(self.ends.ends[0]))
            self.streamer.put(self.tokens[0, first:end].cpu())

        return self.ends is not None and self.ends.are_all_reached(last)


def guess_shower(
    text: Text,
    most_likely: Callable[[Tensor], Tensor],
    streamer,
    writer: TokenWriter | None,
) -> Callable[[Tensor], None] | None:
    """A function that shows a guess of all latents to a streamer, if that has `put_draft`.

    The streamer gets all tokens behind those that it has, (1, m), as from the library's diffusion
    models.

    Args:
        text: The text of one sequence.
        most_likely: Latents (1, n, d) of the pieces to tokens (1, n).
        streamer: Receives them; may be None.
        writer: Writes tokens to the streamer as they become final, if given.
    """
    if not hasattr(streamer, "put_draft"):
        return None

    is_written = writer is not None and writer.streamer is not None

    def show(latents: Tensor) -> None:
        tokens = torch.where(text.is_known, text.ids, most_likely(latents))
        if is_written:
            tokens = tokens[:, writer.num_passed :]
        else:
            tokens = text.pieces.scatter(tokens)[:, text.first_new :]

        streamer.put_draft(tokens.cpu())

    return show
