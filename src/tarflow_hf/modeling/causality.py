"""A probe of decoders: does one look ahead, and does its cache give what it gives without?

A flow needs a causal decoder: only then is its Jacobian triangular. Its inverse runs the decoder
slot by slot, with the decoder's cache if that is right, and else over all slots anew. None of this
can be read off a configuration's name, so it is measured.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .decoder_tarflowlm import run_decoder
from .inversion_tarflowlm import evaluating, make_cache

logger = logging.get_logger(__name__)

NUM_SLOTS = 4

# The uses of the cache that give what a decoder gives without, for each configuration.
_measured: dict[str, tuple[bool, bool]] = {}


def check_decoders(decoders: Sequence[PreTrainedModel], longest: int) -> None:
    """Raises a ValueError unless all decoders are causal, and notes how their caches can be used.

    A decoder's `takes_steps` is True if it can be run slot by slot with its cache, and `takes_crops`
    if the last slots can be taken out of a cache again. Each configuration is measured once in a
    process, by a few passes of four slots. Decoders without weights yet (on the meta device, or
    partitioned) are passed over.

    Args:
        decoders: The decoders of a stack of flows.
        longest: The most slots that they are run on.
    """
    for decoder in decoders:
        _check_rope(decoder.config, longest)
        key = decoder.config.to_json_string()
        is_there = all(p.device.type != "meta" and p.numel() for p in decoder.parameters())
        if not is_there or torch.compiler.is_compiling():
            continue

        if key not in _measured:
            _measured[key] = _measure(decoder)

        decoder.takes_steps, decoder.takes_crops = _measured[key]


def longest_of_one_rope(config: PreTrainedConfig) -> int | None:
    """The most slots for which a decoder's rotary embeddings do not depend on their number.

    Some change the frequencies of all positions as soon as a sequence is longer than that, and then
    the first positions depend on how many follow. None if there is no such length.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    lengths = []
    for each in by_layer:
        if each.get("rope_type") == "longrope":
            lengths.append(each["original_max_position_embeddings"])
        elif each.get("rope_type") == "dynamic":
            lengths.append(config.max_position_embeddings)

    return min(lengths, default=None)


def _check_rope(config: PreTrainedConfig, longest: int) -> None:
    """Raises a ValueError if rotary embeddings change with the number of slots."""
    limit = longest_of_one_rope(config)
    if limit is not None and longest > limit:
        raise ValueError(
            f"block_config: the rotary embeddings of {config.model_type} change for all positions beyond {limit} "
            f"slots, so that it looks ahead there: max_position_embeddings must be at most {limit}, not {longest}."
        )


@torch.no_grad()
def _measure(decoder: PreTrainedModel) -> tuple[bool, bool]:
    """Returns `takes_steps` and `takes_crops`.

    Raises:
        ValueError: If the decoder does not run, or looks ahead.
    """
    name = f"block_config: a decoder of model_type {decoder.config.model_type}"
    decoder.takes_steps = decoder.takes_crops = True  # until it is known
    with evaluating(decoder), _plain_attention(decoder):
        inputs = _noise(decoder, seed=0)
        half = NUM_SLOTS // 2
        guess = _noise(decoder, seed=1)[:, half:]

        try:
            whole = run_decoder(decoder, inputs)
            other = run_decoder(decoder, torch.cat([inputs[:, :half], guess], 1))
        except Exception as error:  # each architecture has its own
            raise ValueError(
                f"{name} does not run; its sizes may contradict: {error}. Else take another architecture, such as "
                "llama or qwen3."
            ) from error

        if _differ(whole[:, :half], other[:, :half]):
            raise ValueError(
                f"{name} looks ahead: its output depends on later inputs, so that it is no autoregressive model. "
                "Take a causal architecture, such as llama or qwen3."
            )

        def by_steps() -> Tensor:
            cache = make_cache(decoder, NUM_SLOTS)
            steps = inputs.split([half, 1, 1], 1)
            return torch.cat([run_decoder(decoder, x, cache) for x in steps], 1)

        def by_guesses() -> Tensor:
            cache = make_cache(decoder)
            first = run_decoder(decoder, inputs[:, :half], cache)
            run_decoder(decoder, guess, cache)
            cache.crop(half - NUM_SLOTS)
            return torch.cat([first, run_decoder(decoder, inputs[:, half:], cache)], 1)

        takes_steps, takes_crops = _gives(whole, by_steps), _gives(whole, by_guesses)

    if not takes_steps:
        logger.warning_once(
            f"{name} has no cache that gives slot by slot what it gives in one pass. Generation reads all slots "
            "again at every step, and so gets slower with the length. Attention with keys and values, as in llama or "
            "qwen3, does not."
        )

    return takes_steps, takes_crops


def _gives(expected: Tensor, run: Callable[[], Tensor]) -> bool:
    """True if a run gives what is expected, up to rounding."""
    try:
        return not _differ(expected, run())
    except Exception:  # a cache that is not its own: each architecture has its own error
        return False


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
