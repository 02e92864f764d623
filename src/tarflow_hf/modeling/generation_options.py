"""The options of `generate`: one object, which checks itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Options of the library that describe a tokenizer, a cache or a compilation: they change no token.
DESCRIPTIVE = (
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "logits_to_keep",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
)

# The rest of a batch, which callers hand on together with its ids.
REST_OF_BATCH = ("labels",)

# Options of the library that process the logits of the next token by what was written before.
LOGITS_OPTIONS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "renormalize_logits",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
)

# Those of them that read a prompt, if there is one.
REPETITION_OPTIONS = ("no_repeat_ngram_size", "repetition_penalty")

# Those of them that change when a text ends.
END_OPTIONS = (
    "exponential_decay_length_penalty",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
)

# The smallest value of each integer option; None means unset.
LEAST = {
    "num_return_sequences": 1,
    "num_candidates": 1,
    "max_matching_ngram_size": 1,
    "num_assistant_tokens": 1,
    "prompt_lookup_num_tokens": 0,
    "max_new_tokens": 0,
    "max_length": 0,
    "inverse_window": 1,
    "pad_token_id": -1,
}

MOST = 2**63 - 1  # the largest int64

# Warpers of the library's that check their own range.
LIBRARY_WARPERS = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

# Options of the library that end a text.
STOP_OPTIONS = ("max_time", "stop_strings")

# Values with which the library's `generate` leaves an option out, besides None, False, its defaults
# and what is empty.
NEUTRAL = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "length_penalty": 1,
    "min_new_tokens": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": 0,
}


# Options that are no options here, and what there is instead.
INSTEAD = {
    "watermark": "a key is no part of a generation config, with which it would be published; give "
    "generate(..., watermark=tarflow_hf.watermark.NoiseWatermark(key)).",
    "watermarking_config": "the library's watermarks change the probabilities of tokens. "
    "tarflow_hf.watermark.NoiseWatermark marks the noise: generate(..., watermark=NoiseWatermark(key)).",
}


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
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    num_candidates: int = 1
    eos_token_id: int | list[int] | Tensor | None = None
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
    tokenizer: Any = None
    stopping_criteria: Sequence[Callable] = ()
    logits_processor: Sequence[Callable] = ()
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    synced_gpus: bool = False
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = 8
    assistant_model: Any = None
    num_assistant_tokens: int | None = None

    # Those of the library's options that ask for something: LOGITS_OPTIONS and STOP_OPTIONS.
    from_library: dict[str, Any] = field(default_factory=dict)

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
        own = [entry.name for entry in fields(cls) if entry.name != "from_library"]
        names = [*own, *LOGITS_OPTIONS, *STOP_OPTIONS]
        unknown = _unsupported(given, names)
        for source in (config, saved):
            if source is not None:
                unknown += [
                    name for name in _unsupported(source.to_dict(), names) if name not in unknown
                ]

        for name, instead in INSTEAD.items():
            if name in unknown:
                raise ValueError(f"generate does not take {name} here: {instead}")

        if unknown:
            raise ValueError(
                f"generate has no options {unknown}{_near(unknown, names)}; its options are noise, infill_mask, "
                f"generator, streamer, {', '.join(names)}."
            )

        values = {}
        for name in names:
            for value in (given.get(name), getattr(config, name, None), getattr(saved, name, None)):
                if value is not None:
                    values[name] = _plain_integer(value)
                    break

        from_library = {
            name: values[name]
            for name in (*LOGITS_OPTIONS, *STOP_OPTIONS)
            if name in values and not is_neutral(name, values[name])
        }
        return cls(
            **{name: values[name] for name in own if name in values}, from_library=from_library
        )

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_numbers()
        if self.decode not in ("argmax", "sample"):
            raise ValueError(f'decode must be "argmax" or "sample", not {self.decode!r}.')

        methods = self.inverse_method
        methods = [methods] if isinstance(methods, str) else methods
        if not isinstance(methods, (list, tuple)) or not all(type(x) is str for x in methods):
            raise ValueError(f"inverse_method must be a string or a list of them, not {methods!r}.")

        for name in ("stopping_criteria", "logits_processor"):
            functions = getattr(self, name)
            if not isinstance(functions, (list, tuple)) or not all(map(callable, functions)):
                raise ValueError(f"{name} must be a list of functions, not {functions!r}.")

        allowed_tokens = self.prefix_allowed_tokens_fn
        if allowed_tokens is not None and not callable(allowed_tokens):
            raise ValueError(
                f"prefix_allowed_tokens_fn must be a function, not {allowed_tokens!r}."
            )

        if "stop_strings" in self.from_library and self.tokenizer is None:
            raise ValueError(
                "stop_strings are searched in decoded text: give the tokenizer, generate(..., tokenizer=tokenizer)."
            )

        for name, value in self.from_library.items():
            if value is True and name != "renormalize_logits":  # which counts as 1 in the library
                raise ValueError(f"{name} says how much or which, not whether: it cannot be True.")

        self.warpers()  # the library checks the range of its own

    def _check_integers(self) -> None:
        """Raises a ValueError where a count or a token is none."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_integer and least <= value <= MOST):
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}.")

        tokens = self.eos_token_id
        if isinstance(tokens, Tensor):
            tokens = tokens.flatten().tolist()

        several = tokens if isinstance(tokens, (list, tuple)) else [tokens]
        if tokens is not None and not all(type(each) is int and each <= MOST for each in several):
            raise ValueError(
                f"eos_token_id must be an integer or a list of integers, not {self.eos_token_id!r}."
            )

    def _check_numbers(self) -> None:
        """Raises a ValueError where a number is none or out of range."""
        numbers = {
            name: getattr(self, name)
            for name in ("temperature", "mixture_temperature", "top_p", *LIBRARY_WARPERS)
        }
        if self.inverse_tolerance is not None:
            numbers["inverse_tolerance"] = self.inverse_tolerance
        if "max_time" in self.from_library:
            numbers["max_time"] = self.from_library["max_time"]

        temperatures = [] if self.flow_temperatures is None else self.flow_temperatures
        if not isinstance(temperatures, (list, tuple)):
            raise ValueError(f"flow_temperatures must be a list of numbers, not {temperatures!r}.")

        numbers |= {f"flow_temperatures[{i}]": value for i, value in enumerate(temperatures)}
        for name, value in numbers.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, not {value!r}.")

        is_drawn = ("temperature",) if self.do_sample else ()  # else the noise is at its mode
        for name in (*is_drawn, "mixture_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}.")

        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(
                f"top_k must be a positive integer, or 0 for all components, not {self.top_k!r}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    @property
    def returns_dict(self) -> bool:
        return self.output_states or self.output_inverse_report or self.return_dict_in_generate

    @property
    def first_inverse_method(self) -> str:
        """The method of the flow next to the data; "auto" if it is left open."""
        methods = self.inverse_method
        return methods if isinstance(methods, str) else next(iter(methods), "auto")

    @property
    def draft_options(self) -> list[str]:
        """The names of the options that guess tokens ahead."""
        names = ["prompt_lookup_num_tokens"] if self.prompt_lookup_num_tokens else []
        return names if self.assistant_model is None else [*names, "assistant_model"]

    @property
    def end_token_ids(self) -> list[int]:
        """The end-of-sequence tokens, as a list."""
        if self.eos_token_id is None:
            return []

        ids = torch.as_tensor(self.eos_token_id).flatten().tolist()
        return [token for token in ids if token >= 0]  # -1: no token ends a text

    @property
    def logits_options(self) -> list[str]:
        """The names of the options that process the logits of the next token."""
        names = [name for name in LOGITS_OPTIONS if name in self.from_library]
        if len(self.logits_processor):
            names.append("logits_processor")
        if self.prefix_allowed_tokens_fn is not None:
            names.append("prefix_allowed_tokens_fn")

        return names

    @property
    def stop_options(self) -> list[str]:
        """The names of the options that end a text, or keep it from ending, besides its length."""
        names = [name for name in (*END_OPTIONS, *STOP_OPTIONS) if name in self.from_library]
        return [*names, "stopping_criteria"] if len(self.stopping_criteria) else names

    def library_config(self, length: int) -> GenerationConfig:
        """The options that the library's processors and criteria read, for texts of some length."""
        others = {
            name: x for name, x in self.from_library.items() if name not in REPETITION_OPTIONS
        }
        with self.naming_options():
            config = GenerationConfig(**others)

        config.max_length = length
        config.num_beams = config.num_return_sequences = 1
        end_token_ids = self.end_token_ids
        config._eos_token_tensor = torch.tensor(end_token_ids) if end_token_ids else None
        return config

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Makes whatever the library raises for its options a ValueError that names them."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"The library does not take these values of {sorted(self.from_library)}: {error}"
            ) from None

    def processors(self) -> LogitsProcessorList:
        """The processors of one's own, and those that the library warns of without a prompt."""
        processors = LogitsProcessorList(self.logits_processor)
        if size := self.from_library.get("no_repeat_ngram_size"):
            processors.insert(0, NoRepeatNGramLogitsProcessor(size))
        if penalty := self.from_library.get("repetition_penalty"):
            processors.insert(0, RepetitionPenaltyLogitsProcessor(penalty))

        return processors

    def allowed_tokens(self, rows: list[int]) -> Callable[[int, Tensor], list[int]] | None:
        """`prefix_allowed_tokens_fn` for some rows of the batch, which it knows by their numbers."""
        function = self.prefix_allowed_tokens_fn
        if function is None:
            return None

        return lambda index, ids: function(rows[index], ids)

    def warpers(self) -> Callable[[Tensor], Tensor] | None:
        """The library's warpers, in its order, as a map of mixture logits (n, K); None if unused."""
        warpers = LogitsProcessorList()
        if self.mixture_temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.mixture_temperature)))
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p != 0:
            warpers.append(MinPLogitsWarper(self.min_p))
        if self.typical_p != 1:
            warpers.append(TypicalLogitsWarper(self.typical_p))
        if self.epsilon_cutoff != 0:
            warpers.append(EpsilonLogitsWarper(self.epsilon_cutoff))
        if self.eta_cutoff != 0:
            warpers.append(EtaLogitsWarper(self.eta_cutoff))

        return partial(warpers, None) if warpers else None  # whatever tokens came before


def beside_noise(
    given: dict[str, Any], config: GenerationConfig | None, num_tokens: int, num_prompt_tokens: int
) -> dict[str, Any]:
    """The options of a call that gives the noise of a whole text.

    Noise has a length and a scale, and it says all of its tokens: a saved end-of-sequence token
    does not cut them.

    Args:
        given: Keyword arguments.
        config: The call's generation config.
        num_tokens: T, of the noise.
        num_prompt_tokens: The number of them in the prompt.

    Raises:
        ValueError: If an option, as a keyword or in the call's config, contradicts the noise.
    """
    expected = {
        "max_new_tokens": num_tokens - num_prompt_tokens,
        "max_length": num_tokens,
        "temperature": 1,
    }
    for name, value in expected.items():
        asked = asked_for(name, given, config)
        if asked is not None and asked != value:
            raise ValueError(
                f"noise is given, and with it {name} is {value}: leave out {name}={asked!r}."
            )

    ends = given.get("eos_token_id"), getattr(config, "eos_token_id", None)
    return given if any(end is not None for end in ends) else given | {"eos_token_id": -1}


def asked_for(name: str, given: dict[str, Any], config: GenerationConfig | None) -> Any:
    """The value of an option that a call asks for, as a keyword or in its config; None if it does not.

    A config has a value of every option: one at the library's default asks for nothing.
    """
    if given.get(name) is not None:
        return given[name]

    value = getattr(config, name, None)
    return None if is_neutral(name, value) else value


def _plain_integer(value: Any) -> Any:
    """A NumPy integer as Python's own."""
    is_other = hasattr(value, "__index__") and not isinstance(value, (int, Tensor))
    return int(value) if is_other else value


def _near(unknown: Sequence[str], names: Sequence[str]) -> str:
    """A question that names the options nearest to unknown ones; empty if none is near."""
    near = [each for name in unknown for each in get_close_matches(name, names, n=1, cutoff=0.8)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _unsupported(options: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The names, sorted, of options that ask for something else than some names."""
    return sorted(
        name
        for name, value in options.items()
        if name not in (*names, *DESCRIPTIVE, *REST_OF_BATCH)
        and not name.startswith("_")
        and not is_neutral(name, value)
    )


def is_neutral(name: str, value: Any) -> bool:
    """True if the library's own `generate` would do the same without this option."""
    if value is None or value is False:
        return True
    if isinstance(value, (list, tuple, dict, str)):
        return len(value) == 0 or value == _library_default(name)

    return value == _library_default(name) or value == NEUTRAL.get(name)


def _library_default(name: str) -> Any:
    return GenerationConfig._get_default_generation_params().get(name)
