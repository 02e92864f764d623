"""Evaluation that leaves no trace: noise without a generator, and a seed that is taken back."""

import math

import torch
from torch import Tensor

# Odd constants of SplitMix64, as signed integers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def fixed_noise(
    input_ids: Tensor, latent_size: int, attention_mask: Tensor | None = None, index: int = 0
) -> Tensor:
    """Noise (B, T, d) in float32 that depends on each row's real tokens and the index only.

    A row has the same noise in any batch, with any padding before or behind it, on any device, and
    no generator is touched. Every number is a hash of (the row's tokens, the index, its place), as
    u in (-1, 1), and sqrt(2) erfinv(u).

    Args:
        input_ids: Token ids (B, T).
        latent_size: d.
        attention_mask: (B, T), 0 at padding.
        index: Numbers the samples of a row.

    References:
        Steele, Lea & Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014, for the
        mixing function.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [1, 2, 0]])
        >>> noise = fixed_noise(ids, 2, torch.tensor([[1, 1, 1], [1, 1, 0]]))
        >>> torch.equal(fixed_noise(ids[1:, :2], 2), noise[1:, :2])
        True
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    if attention_mask is not None:
        first = (attention_mask != 0).int().argmax(-1, keepdim=True)
        place = place - first  # (B, T)

    words = _mix(input_ids.long() * GOLDEN + _mix(place + 1))
    if attention_mask is not None:
        words = words.masked_fill(attention_mask == 0, 0)

    row = _mix(words.sum(-1) + _mix(place.new_tensor(index + 1)))  # (B,)
    entry = place.unsqueeze(-1) * latent_size + torch.arange(latent_size, device=place.device)
    bits = _mix(row[:, None, None] + (entry + 1) * GOLDEN)

    u = (2 * _shifted(bits, 41) + 1 - 2**23).float() / 2**23  # odd multiples of 2^-23, exactly
    return math.sqrt(2) * torch.erfinv(u)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on 64-bit integers."""
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier

    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, shift: int) -> Tensor:
    """x shifted to the right, with zeros coming in."""
    return (x >> shift) & (2 ** (64 - shift) - 1)


def drew_one_seed(state: Tensor) -> bool:
    """True if since some state the global generator has drawn what a loop over a `DataLoader` draws."""
    generator = torch.Generator()
    generator.set_state(state)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # as a DataLoader does
    return torch.equal(generator.get_state(), torch.get_rng_state())
