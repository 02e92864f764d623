"""Positions and slots: which positions of a batch are variables, and in what order a flow passes them.

A *position* is a patch of P tokens; positions are counted in the order of the text. A *slot* is a
place in the order in which one flow passes the positions: observed ones first, then those that it
models, in its direction, padding last. A position is a *variable* of the flows if it is neither
padding nor observed. *Known* latents are variables whose value is held fixed.

Shapes: B batch, T tokens, d latent size of a token, P patch size, N = T / P positions of size
D = P d, w hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .checks_tarflowlm import check_is_tensor, check_mask, is_integer, require

# --------------------------------------------------------------------------------------------------
# Which positions are variables
# --------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Which positions of a batch the flows model. Made once a batch, the same for every flow."""

    lengths: Tensor | None = None  # (B,) real positions of each sequence; None if all are real
    observed_ids: Tensor | None = None  # (B, N, P) ids of observed positions, -1 at the others
    is_variable: Tensor | None = None  # (B, N), False at padding and observed; None if all are
    first: Tensor | None = None  # (B,) the first real position; None if it is 0 in all sequences

    def keep_variables(self, x: Tensor) -> Tensor:
        """x (B, N, ...) at the variables, and 0 elsewhere."""
        return zero_unless(self.is_variable, x)


class Known(NamedTuple):
    """States that are held fixed while a flow is inverted."""

    states: Tensor  # (B, N, D), read where the mask is True only
    mask: Tensor  # (B, N)

    def hold(self, states: Tensor, first: int) -> Tensor:
        """States (B, n, D) at the positions from `first` on, the known ones in place of others."""
        positions = slice(first, first + states.shape[1])
        return torch.where(self.mask[:, positions, None], self.states[:, positions], states)


def make_layout(h: Tensor, patch_size: int, attention_mask: Tensor | None = None) -> Layout:
    """The layout of positions h (B, N, D) with a padding mask (B, T).

    Raises:
        ValueError: If the mask has another shape or holes, or if a sequence has no real token, no
            whole number of real patches, or padding on the left that is none.
    """
    if attention_mask is None:
        return Layout()

    check_mask(attention_mask, (h.shape[0], h.shape[1] * patch_size))
    mask = attention_mask != 0
    lengths = mask.sum(-1)
    first = mask.int().argmax(-1)
    place = torch.arange(mask.shape[1], device=mask.device) - first.unsqueeze(-1)
    is_whole = mask == ((place >= 0) & (place < lengths.unsqueeze(-1)))
    require(
        is_whole.all(),
        "attention_mask has holes: padding has to stand on the right or on the left of a sequence.",
    )
    require((lengths > 0).all(), "attention_mask has a sequence without any real token.")
    require(
        ((lengths % patch_size == 0) & (first % patch_size == 0)).all(),
        f"Every real length, and padding on the left, must be a multiple of patch_size, {patch_size}.",
    )

    is_real = mask.unflatten(1, (-1, patch_size))[..., 0]
    lengths, first = lengths // patch_size, first // patch_size
    # Without padding on the left the order is simpler, if one may look.
    may_look = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if may_look and not bool(first.any()):
        first = None

    return Layout(lengths, None, is_real, first)


def mask_of_patches(name: str, mask: Tensor, patch_size: int) -> Tensor:
    """The mask (B, N) of patches that a mask (B, T) of tokens covers.

    Raises:
        ValueError: If it is no mask, or covers parts of patches.
    """
    require(((mask == 0) | (mask == 1)).all(), f"{name} must be boolean, or 0 and 1.")
    by_patch = (mask == 1).unflatten(1, (-1, patch_size))
    whole = by_patch.all(-1)
    require((whole == by_patch.any(-1)).all(), f"{name} must cover whole patches.")
    return whole


def add_observed(
    layout: Layout, h: Tensor, ids: Tensor | None, mask: Tensor, patch_size: int, vocab_size: int
) -> Layout:
    """The layout in which some tokens are observed: given to the flows, not modelled.

    Args:
        layout: The layout without.
        h: The positions (B, N, D).
        ids: Token ids (B, T); those that are not observed are not read.
        mask: 1 or True at the observed tokens, (B, T).

    Raises:
        ValueError: If the shapes differ, the mask is no mask, covers parts of patches or a whole
            sequence, or if an observed id is outside the vocabulary.
    """
    shape = (h.shape[0], h.shape[1] * patch_size)
    for name, value in (("observed_ids", ids), ("observed_mask", mask)):
        check_is_tensor(name, value)

    if ids.shape != shape or mask.shape != shape:
        shapes = f"{tuple(ids.shape)}, {tuple(mask.shape)}"
        raise ValueError(
            f"observed_ids and observed_mask must have shape (B, T) = {shape}, not {shapes}."
        )

    if not is_integer(ids):
        raise ValueError(f"observed_ids must be token ids, integers, not {ids.dtype}.")

    require(((mask == 0) | (mask == 1)).all(), "observed_mask must be boolean, or 0 and 1.")
    mask = mask.unflatten(1, (-1, patch_size)) == 1  # (B, N, P)
    mask = layout.keep_variables(mask)
    require((mask.all(-1) == mask.any(-1)).all(), "observed_mask must cover whole patches.")

    ids = torch.where(mask, ids.long().unflatten(1, (-1, patch_size)), -1)
    is_token = (ids >= 0) & (ids < vocab_size)
    require(
        (is_token == mask).all(),
        f"observed_ids must be in 0, ..., vocab_size - 1 = {vocab_size - 1}.",
    )

    is_variable = ids[..., 0] < 0
    if layout.is_variable is not None:
        is_variable = is_variable & layout.is_variable

    require(
        is_variable.any(-1).all(),
        "observed_mask covers a whole sequence: nothing of it is left to model.",
    )
    return Layout(layout.lengths, ids, is_variable, layout.first)


# --------------------------------------------------------------------------------------------------
# In what order a flow passes them
# --------------------------------------------------------------------------------------------------


class Channels(NamedTuple):
    """The order in which a flow takes the D channels of a position.

    Each flow finds them shuffled once more than the one before, even ones first, so that later
    flows mix the tokens of a patch.
    """

    patch_size: int
    num_shuffles: int
    is_reversed: bool  # the tokens of a patch

    def shuffle(self, h: Tensor) -> Tensor:
        """Channels (..., D) to the flow's own order."""
        h = self._reverse(h)
        for _ in range(self.num_shuffles):
            h = torch.cat([h[..., 0::2], h[..., 1::2]], -1)

        return h

    def unshuffle(self, h: Tensor) -> Tensor:
        """Channels (..., D) in the flow's own order back: the inverse of `shuffle`."""
        for _ in range(self.num_shuffles):
            half = (h.shape[-1] + 1) // 2
            unshuffled = torch.empty_like(h)
            unshuffled[..., 0::2], unshuffled[..., 1::2] = h[..., :half], h[..., half:]
            h = unshuffled

        return self._reverse(h)

    def _reverse(self, h: Tensor) -> Tensor:
        if not self.is_reversed:
            return h

        return h.unflatten(-1, (self.patch_size, -1)).flip(-2).flatten(-2)


class Order(NamedTuple):
    """The order in which a flow passes the positions: slot s holds position `index[:, s]`.

    Each method stands beside its inverse.
    """

    channels: Channels
    is_reversed: bool  # without an index, for all sequences alike
    index: Tensor | None = None  # (B, N) where sequences differ
    coordinate: Tensor | None = None  # (B, N) where each position is in the flow's direction

    def arrange(self, h: Tensor) -> Tensor:
        """Positions (B, N, D) in the flow's own order of positions and channels."""
        return self.to_slots(self.channels.shuffle(h))

    def rearrange(self, h: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return self.channels.unshuffle(self.from_slots(h))

    def to_slots(self, x: Tensor) -> Tensor:
        """Positions x (B, N, ...) to slots."""
        if self.index is not None:
            return take(x, self.index)

        return x.flip(1) if self.is_reversed else x

    def from_slots(self, x: Tensor) -> Tensor:
        """Slots x (B, N, ...) to positions: the inverse of `to_slots`."""
        if self.index is not None:
            return take(x, self.index.argsort(-1))

        return x.flip(1) if self.is_reversed else x


def make_order(channels: Channels, is_reversed: bool, layout: Layout, h: Tensor) -> Order:
    """The order of a flow over the positions of h (B, N, D), which runs backwards if reversed."""
    is_shifted = layout.first is not None
    is_padded = layout.lengths is not None
    if layout.observed_ids is None and not is_shifted and not (is_padded and is_reversed):
        return Order(channels, is_reversed)

    num_positions = h.shape[1]
    n = torch.arange(num_positions, device=h.device).expand(h.shape[0], -1)
    ends = torch.full((h.shape[0], 1), num_positions, device=h.device)
    if is_padded:
        ends = layout.lengths.unsqueeze(-1)
    if is_shifted:
        # Counted from the first real position; padding on the left comes behind all of them.
        n = (n - layout.first.unsqueeze(-1)) % num_positions

    # Padding stays at the end.
    coordinate = torch.where(n < ends, ends - 1 - n, n) if is_reversed else n
    if layout.observed_ids is None:
        index = coordinate.argsort(-1) if is_shifted else coordinate
        return Order(channels, is_reversed, index, coordinate)

    is_missing = (layout.observed_ids[..., 0] < 0).long()
    group = torch.where(n < ends, is_missing, 2)  # observed, missing, padding
    index = torch.argsort(coordinate + num_positions * group, -1)
    return Order(channels, is_reversed, index, coordinate)


def known_slots(known: Known | None, layout: Layout, order: Order, u: Tensor) -> Known | None:
    """Known states in the flow's own order. Padding and observed positions count as known."""
    if layout.is_variable is not None:
        states = torch.zeros_like(u)
        mask = ~layout.is_variable
        if known is not None:
            states, mask = layout.keep_variables(known.states), known.mask | mask

        known = Known(states, mask)

    if known is None:
        return None

    return Known(order.arrange(known.states), order.to_slots(known.mask))


# --------------------------------------------------------------------------------------------------
# What a conditional model observes
# --------------------------------------------------------------------------------------------------


class Observed(NamedTuple):
    """The observed positions, in the first slots of a flow's decoder."""

    inputs: Tensor  # (B, N, w) of the slots that hold one
    count: Tensor  # (B, 1, 1) such slots
    position_ids: Tensor  # (B, N), the rank of each slot's position in the flow's direction


def observe(layout: Layout, order: Order, embedding: nn.Module | None) -> Observed | None:
    """The observed positions, as the decoder of a flow with this order reads them."""
    if layout.observed_ids is None:
        return None

    return Observed(
        inputs=embedding(take(layout.observed_ids.clamp(min=0), order.index)),
        count=(layout.observed_ids[..., 0] >= 0).sum(-1)[:, None, None],
        position_ids=take(order.coordinate, order.index),
    )


class ObservedEmbedding(nn.Module):
    """Decoder inputs of observed positions: the sum of their tokens' embeddings, and a marker.

    There is a table for each of the P places of a patch.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.patch_size * config.vocab_size, config.hidden_size)
        self.marker = nn.Parameter(torch.empty(config.hidden_size))

    def init_weights(self, std: float) -> None:
        init.normal_(self.marker, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, N, P) to inputs (B, N, w)."""
        place = torch.arange(ids.shape[-1], device=ids.device)
        embeddings = self.embedding(ids + self.vocab_size * place)
        return embeddings.sum(-2).to(self.marker.dtype) + self.marker


# --------------------------------------------------------------------------------------------------
# Tokens, positions, pieces
# --------------------------------------------------------------------------------------------------


class Pieces:
    """Sequences with padding anywhere, and their real tokens in one piece, padding at the end.

    Args:
        is_real: False at padding, (B, T).

    Example:
        >>> pieces = Pieces(torch.tensor([[False, True, True], [True, False, False]]))
        >>> pieces.gather(torch.tensor([[0, 1, 2], [3, 0, 0]]))
        tensor([[1, 2],
                [3, 0]])
        >>> pieces.scatter(torch.tensor([[1, 2], [3, 0]]))
        tensor([[0, 1, 2],
                [3, 0, 0]])
    """

    def __init__(self, is_real: Tensor):
        self.order = None  # (B, T): where the tokens of the pieces are; None if nothing is padded
        if not bool(is_real.all()):
            self.order = (~is_real).int().argsort(dim=-1, stable=True)
            self.width = int(is_real.sum(-1).max())
            self.length = is_real.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """Sequences (B, T, ...) to pieces (B, longest, ...)."""
        return x if self.order is None else take(x, self.order)[:, : self.width]

    def scatter(self, x: Tensor) -> Tensor:
        """Pieces (B, longest, ...) to sequences, with 0 at padding, where pieces have it too."""
        if self.order is None:
            return x

        x = torch.cat([x, x.new_zeros(len(x), self.length - self.width, *x.shape[2:])], 1)
        return take(x, self.order.argsort(-1))


def to_positions(x: Tensor, patch_size: int) -> Tensor:
    """Tokens (..., T, d) to positions (..., N, P d)."""
    return x.unflatten(-2, (-1, patch_size)).flatten(-2)


def to_tokens(h: Tensor, patch_size: int) -> Tensor:
    """Positions (..., N, P d) to tokens (..., T, d): the inverse of `to_positions`."""
    return h.unflatten(-1, (patch_size, -1)).flatten(-3, -2)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The entries of x (B, N, ...) that the index (B, M) names, (B, M, ...)."""
    index = index.to(x.device).reshape(*index.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))


def zero_unless(mask: Tensor | None, x: Tensor) -> Tensor:
    """x (B, N, ...) where the mask (B, N) is True, 0 elsewhere; without a mask, x."""
    return x if mask is None else x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), 0)
