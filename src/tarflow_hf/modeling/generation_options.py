"""The options of `generate`: one object, which checks itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Fields of a GenerationConfig that describe a tokenizer or a cache, and ask for nothing.
DESCRIPTIVE = ("bos_token_id", "transformers_version", "use_cache")


@dataclass(frozen=True)
class GenerationOptions:
    """The options of [`TarFlowLMModel.generate`], which documents each of them.

    Raises:
        ValueError: If an option is out of range; the message names it and its value.

    Example:
        >>> GenerationOptions(temperature=0.0)
        Traceback (most recent call last):
        ValueError: temperature must be positive and finite, not 0.0.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    num_return_sequences: int = 1
    do_sample: bool = True
    temperature: float = 1.0
    flow_temperatures: Sequence[float] | None = None
    mixture_temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_candidates: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decode: str = "argmax"
    num_flows: int | None = None
    inverse_method: str | Sequence[str] = "auto"
    inverse_window: int | None = None
    inverse_tolerance: float | None = None
    capture_step: bool = False
    output_states: bool = False
    output_inverse_report: bool = False
    return_dict_in_generate: bool = False

    @classmethod
    def resolve(
        cls, given: dict[str, Any], config: GenerationConfig | None, saved: GenerationConfig
    ) -> "GenerationOptions":
        """The options that are given; those of a config; those saved with the model; the defaults.

        Args:
            given: Keyword arguments. None counts as not given.
            config: The call's generation config.
            saved: The model's.

        Raises:
            ValueError: If an option is unknown or out of range, or if anything is asked for that a
                flow does not have.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(
            name
            for name, value in given.items()
            if name not in names and not _is_neutral(name, value)
        )
        for source in (config, saved):
            _check_mode(source)
            unknown.extend(sorted(set(_unsupported(source, names)) - set(unknown)))

        if unknown:
            raise ValueError(
                f"generate has no options {unknown}; its options are {', '.join(names)}."
            )

        values = {}
        for name in names:
            for value in (given.get(name), getattr(config, name, None), getattr(saved, name, None)):
                if value is not None:
                    values[name] = value
                    break

        return cls(**values)

    def __post_init__(self) -> None:
        if self.decode not in ("argmax", "sample"):
            raise ValueError(f'decode must be "argmax" or "sample", not {self.decode!r}.')

        for name in ("temperature", "mixture_temperature"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, not {value}.")

        for name in ("num_return_sequences", "num_candidates"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")

        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(
                f"top_k must be a positive integer, or 0 for all components, not {self.top_k!r}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    @property
    def returns_dict(self) -> bool:
        return self.output_states or self.output_inverse_report or self.return_dict_in_generate

    @property
    def end_token_ids(self) -> list[int]:
        """The end-of-sequence tokens, as a list."""
        if self.eos_token_id is None:
            return []

        return torch.as_tensor(self.eos_token_id).flatten().tolist()

    def logits_processor(self) -> Callable[[Tensor], Tensor] | None:
        """The library's warpers, in its order, as a map of mixture logits (n, K); None if unused."""
        warpers = LogitsProcessorList()
        if self.mixture_temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.mixture_temperature)))
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))

        return partial(warpers, None) if warpers else None  # whatever tokens came before


def _check_mode(config: GenerationConfig | None) -> None:
    mode = GenerationMode.SAMPLE if config is None else config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"The generation config asks for {mode.value}, which chooses among distributions of the next "
            "token. A flow has none: it samples latents, or with do_sample=False takes the noise at its mode."
        )


def _unsupported(config: GenerationConfig | None, names: Sequence[str]) -> list[str]:
    """The fields of a config that ask for something else than these options."""
    if config is None:
        return []

    return [
        name
        for name, value in config.to_dict().items()
        if name not in (*names, *DESCRIPTIVE)
        and not name.startswith("_")
        and not _is_neutral(name, value)
    ]


def _is_neutral(name: str, value: Any) -> bool:
    """True if the library's own `generate` would do the same without this option."""
    defaults = GenerationConfig._get_default_generation_params()
    return value is None or value is False or (name in defaults and value == defaults[name])
