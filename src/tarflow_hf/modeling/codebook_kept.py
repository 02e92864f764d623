"""Tables that follow from a codebook, made once for as long as it stays the same.

They serve the forms of Mix-d for large codebooks on a CPU, `coupling_active.py` and
`coupling_product.py`. A codebook is known by its place in memory and its version, which every
optimiser and every `copy_` changes, and by checksums of all its numbers, which show what is written
to a tensor's `.data` (an average of the weights, say). Inside `assume_codebook_unchanged` that
is checked once.

Shapes: V components of size d.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_CODEBOOKS = 4


class _Entry(NamedTuple):
    mean: Tensor  # kept, so that no other codebook can take its place in memory
    log_scale: Tensor
    state: tuple
    tables: dict[Callable, Any]


_entries: OrderedDict[tuple, _Entry] = OrderedDict()
# The versions of the codebooks, by their places, whose checksums were right inside
# `assume_codebook_unchanged`.
_checked: ContextVar[dict[tuple, tuple] | None] = ContextVar("_checked", default=None)


@contextmanager
def assume_codebook_unchanged() -> Iterator[None]:
    """Checks a codebook's numbers once inside, and then its tensors' versions only.

    Inside, nothing writes to a tensor's `.data`. A step of generation looks at a codebook some five
    times.
    """
    token = _checked.set({})
    try:
        yield
    finally:
        _checked.reset(token)


def kept(make: Callable[[Tensor, Tensor], Any], mean: Tensor, log_scale: Tensor) -> Any:
    """`make(mean, log_scale)`, or its last result if the codebook has not changed since.

    The tables of the last `MAX_CODEBOOKS` codebooks are kept, and these themselves.
    """
    mean, log_scale = mean.detach(), log_scale.detach()
    place = (mean.data_ptr(), log_scale.data_ptr(), mean.shape, mean.stride(), mean.dtype)
    checked = _checked.get()
    versions = _versions(mean, log_scale)

    entry = _entries.get(place)
    is_known = checked is not None and checked.get(place) == versions and -1 not in versions
    if entry is None or not is_known:
        state = *versions, *_checksums(mean), *_checksums(log_scale)
        if entry is None or entry.state != state:
            entry = _Entry(mean, log_scale, state, {})
        if checked is not None:
            checked[place] = versions

    _entries[place] = entry
    _entries.move_to_end(place)
    while len(_entries) > MAX_CODEBOOKS:
        _entries.popitem(last=False)

    if make not in entry.tables:
        entry.tables[make] = make(mean, log_scale)

    return entry.tables[make]


def state_of(x: Tensor) -> tuple:
    """The version of a tensor, and its checksums where that does not say all."""
    versions = _versions(x)
    if _checked.get() is not None and -1 not in versions:
        return versions

    return versions + _checksums(x)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """The versions of tensors; -1 for those of `torch.inference_mode`, which have none."""
    return tuple(-1 if x.is_inference() else x._version for x in tensors)


def _checksums(x: Tensor) -> tuple[int, float]:
    """The sum of the bits as integers, which any single change moves, and a sum that tells order."""
    x = x.contiguous()
    # Words of 64 bits are summed four times as fast.
    is_even = x.dtype == torch.float64 or (x.shape[-1] % 2 == 0 and x.storage_offset() % 2 == 0)
    bits = x.view(torch.int64 if is_even else torch.int32)
    return bits.sum().item(), (_ramp(len(x), x.dtype, x.device) @ x).sum().item()


@lru_cache(maxsize=4)
def _ramp(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(1.0, 2.0, length, dtype=dtype, device=device)
