"""A probe of decoders: does one look ahead, and does its cache give what it gives without?

A flow needs both: its Jacobian is triangular only if the decoder is causal, and its inverse runs
the decoder slot by slot. Neither can be read off a configuration's name, so it is measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .decoder_tarflowlm import run_decoder
from .inversion_tarflowlm import evaluating, make_cache

NUM_SLOTS = 4

# Configurations of decoders that have passed.
_passed: set[str] = set()


def check_decoders(decoders: Sequence[PreTrainedModel]) -> None:
    """Raises a ValueError unless all decoders are causal and can be run slot by slot.

    Each configuration is measured once in a process, by three passes of four slots. Decoders
    without weights yet (on the meta device, or partitioned) are passed over.
    """
    for decoder in decoders:
        key = decoder.config.to_json_string()
        parameters = list(decoder.parameters())
        is_there = all(p.device.type != "meta" and p.numel() for p in parameters)
        if key in _passed or not is_there or torch.compiler.is_compiling():
            continue

        _check(decoder)
        _passed.add(key)


@torch.no_grad()
def _check(decoder: PreTrainedModel) -> None:
    name = f"block_config: a decoder of model_type {decoder.config.model_type}"
    with evaluating(decoder), _plain_attention(decoder):
        inputs = _noise(decoder, seed=0)
        half = NUM_SLOTS // 2
        changed = torch.cat([inputs[:, :half], _noise(decoder, seed=1)[:, half:]], 1)

        try:
            whole, other = run_decoder(decoder, inputs), run_decoder(decoder, changed)
        except RuntimeError as error:
            raise ValueError(f"{name} does not run; its sizes may contradict: {error}") from error

        if _differ(whole[:, :half], other[:, :half]):
            raise ValueError(
                f"{name} looks ahead: its output depends on later inputs, so that it is no autoregressive model. "
                "Take a causal architecture, such as llama or qwen3."
            )

        try:
            cache = make_cache(decoder.config, NUM_SLOTS)
            steps = [run_decoder(decoder, x, cache) for x in inputs.split([half, 1, 1], 1)]
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be run slot by slot with a key-value cache, as the inverse of a flow does: {error}"
            ) from error

        if _differ(whole, torch.cat(steps, 1)):
            raise ValueError(
                f"{name} gives something else slot by slot, with its cache, than in one pass. The inverse of a flow "
                "would be wrong. Take another architecture, such as llama or qwen3."
            )


def _noise(decoder: PreTrainedModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, NUM_SLOTS, decoder.config.hidden_size, generator=generator)
    return noise.to(decoder.device, decoder.dtype)


def _differ(a: Tensor, b: Tensor) -> bool:
    """True if the tensors differ by more than rounding, or are not finite."""
    tolerance = 256 * torch.finfo(a.dtype).eps
    scale = a.float().abs().max() + 1e-6
    return not bool((a - b).float().abs().max() <= tolerance * scale)


@contextmanager
def _plain_attention(decoder: nn.Module) -> Iterator[None]:
    """The decoder with an attention that runs on every device and needs no compilation."""
    config = decoder.config
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        config._attn_implementation = "sdpa" if decoder._supports_sdpa else "eager"

    try:
        yield
    finally:
        if config._attn_implementation != implementation:
            config._attn_implementation = implementation
