"""TarFlowLMConfig: the shape of a TarFlowLM, which checks itself."""

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .coupling_head import at_least_one, number_between, true_or_false
from .coupling_heads import COUPLING_HEADS

DIRECTIONS = ("left_to_right", "right_to_left", "right_to_left_within_patch")
CONTEXTS = ("latent", "posterior")

# The options of a flow with any coupling; those of each coupling are its head's.
FLOW_OPTIONS = ("coupling", "direction", "num_hidden_layers", "context")

# Fields that follow from block_config where that is given.
DECODER_FIELDS = ("hidden_size", "num_attention_heads", "intermediate_size")

# Keywords of a rotary embedding that a decoder's configuration takes, and keeps in `rope_parameters`.
ROTARY_KEYWORDS = ("rope_theta", "rope_scaling")

# Fields that are checked together.
CHECKED_FIELDS = (
    "vocab_size",
    "latent_size",
    "patch_size",
    "max_position_embeddings",
    *DECODER_FIELDS,
    "flows",
    "block_config",
    "conditional",
    "posterior_top_k",
    "initializer_range",
    "initial_log_scale",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "start_token_id",
    "embedding_scale",
    "tie_word_embeddings",
)


class TarFlowLMConfig(PreTrainedConfig):
    """Configuration of a [`TarFlowLMModel`].

    Args:
        vocab_size (`int`, defaults to 50257): Number of tokens V.
        latent_size (`int`, defaults to 16): Size d of the latent vector of one token.
        patch_size (`int`, defaults to 1): Tokens P that a flow handles at once, as one position of
            size P d.
        max_position_embeddings (`int`, defaults to 1024): Longest sequence, in tokens.
        hidden_size, num_attention_heads, intermediate_size (`int`, *optional*): Width, heads and
            feed-forward width of the default decoder block, Llama's: 768, 12 and 8/3 of the width,
            rounded up to a multiple of 32.
        flows (`list[dict]`, *optional*): The stack, from the data side to the noise side. Each flow
            has

            - `coupling`: "affine", "mixture_cdf" (Mix-1) or "mixture_rosenblatt" (Mix-d);
            - `direction`: "left_to_right", "right_to_left" or "right_to_left_within_patch", which
              takes the tokens of a patch in reverse but passes the patches left to right;
            - `num_hidden_layers`: depth of its decoder;
            - `context`: what its decoder reads, "latent" (a projection of the latents) or
              "posterior" (a learned embedding averaged under p(token | latent); first flow only,
              and its default if the codebook is tied);
            - `num_components`: of a mixture; 8 for "mixture_cdf", the vocabulary for
              "mixture_rosenblatt";
            - `autoregressive` ("mixture_cdf", default True): each dimension's parameters see the
              dimensions before it, through a head of width `head_hidden_size` (default 128);
            - `tie_codebook` ("mixture_rosenblatt"): use the encoder's codebook; the default in the
              first flow, and impossible in the others, whose input does not live in the codebook's
              space;
            - `patch_head_layers` ("mixture_rosenblatt", default 0): depth of a second decoder, over
              the tokens of each patch. A token's mixture weights then see the latents before it in
              its patch, too; without it the tokens of a patch are independent given the patches
              before. Half of `num_hidden_layers` is a good depth;
            - `projection_bias` ("mixture_rosenblatt", default True): give the projection to mixture
              weights a bias.

            A coupling of one's own brings its own options, see `CouplingHead`.
        block_config (`PreTrainedConfig` or `dict` with a `model_type`, *optional*): Full
            configuration of the flows' decoder, of any causal architecture of the library. Its
            depth is set per flow, its vocabulary is not used.
        conditional (`bool`, defaults to False): True if the model may be told some of the tokens
            (`observed_mask`), which then enter every flow as context. Prompts and infilling are
            exact once it has been trained so.
        posterior_top_k (`int`, *optional*): Number of tokens that the "posterior" context averages
            over (the most likely ones, renormalised). Default: all of them up to a vocabulary of
            256, 8 beyond.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        initial_log_scale (`float`, defaults to -1): Initial log standard deviation of the codebook.
            Its means are drawn from N(0, I).
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): Special tokens, for
            `generate`.
        start_token_id (`int`, *optional*): The token whose embedding stands before the first
            position of a first flow with a "posterior" context. By default that is a learned
            vector.
        embedding_scale (`float`, defaults to 1): The factor by which that flow multiplies its
            embeddings.
        tie_word_embeddings (`bool`, defaults to False): True if the first flow's embeddings are
            also the weight of its projection to mixture weights.

    Raises:
        ValueError: If a field contradicts itself or another one; the message names it, its value
            and what is allowed. If a keyword is one of the decoder's, or close to a field's name.

    Example:
        >>> config = TarFlowLMConfig(vocab_size=27, latent_size=5, hidden_size=64, num_attention_heads=4, flows=[
        ...     {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 4},
        ...     {"coupling": "mixture_cdf", "direction": "right_to_left", "num_hidden_layers": 1},
        ... ])
        >>> config.flows[0]["context"], config.flows[1]["num_components"], config.block_config.model_type
        ('posterior', 8, 'llama')
        >>> TarFlowLMConfig(latent_size=0)
        Traceback (most recent call last):
        ValueError: latent_size must be an integer of at least 1, not 0.
    """

    model_type = "tarflowlm"
    sub_configs = {"block_config": AutoConfig}
    # The library's `Trainer` takes what is left as predictions: the bound of each sequence.
    keys_to_ignore_at_inference = [
        "reconstruction_log_prob",
        "prior_log_prob",
        "posterior_log_prob",
        "latents",
        "noise",
        "hidden_states",
    ]

    def __init__(
        self,
        vocab_size: int = 50257,
        latent_size: int = 16,
        patch_size: int = 1,
        max_position_embeddings: int = 1024,
        hidden_size: int | None = None,
        num_attention_heads: int | None = None,
        intermediate_size: int | None = None,
        flows: list[dict[str, Any]] | None = None,
        block_config: PreTrainedConfig | dict[str, Any] | None = None,
        conditional: bool = False,
        posterior_top_k: int | None = None,
        initializer_range: float = 0.02,
        initial_log_scale: float = -1.0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        start_token_id: int | None = None,
        embedding_scale: float = 1.0,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vocab_size = at_least_one("vocab_size", vocab_size)
        self.latent_size = at_least_one("latent_size", latent_size)
        self.patch_size = at_least_one("patch_size", patch_size)

        self.max_position_embeddings = at_least_one(
            "max_position_embeddings", max_position_embeddings
        )
        if self.max_position_embeddings % self.patch_size:
            raise ValueError(
                f"max_position_embeddings must be a multiple of patch_size: {max_position_embeddings}, {patch_size}."
            )
        self.conditional = true_or_false("conditional", conditional)
        self.posterior_top_k = posterior_top_k
        if posterior_top_k is None:
            self.posterior_top_k = _default_top_k(self.vocab_size)
        else:
            at_least_one("posterior_top_k", posterior_top_k)

        self.initializer_range = number_between("initializer_range", initializer_range, 0, 10)
        self.initial_log_scale = number_between("initial_log_scale", initial_log_scale, -40, 40)
        self.bos_token_id = _token_id("bos_token_id", bos_token_id)
        self.eos_token_id = _token_id("eos_token_id", eos_token_id, may_be_several=True)
        self.pad_token_id = _token_id("pad_token_id", pad_token_id)
        self.start_token_id = start_token_id
        self.embedding_scale = embedding_scale
        self.tie_word_embeddings = true_or_false("tie_word_embeddings", tie_word_embeddings)

        sizes = hidden_size, num_attention_heads, intermediate_size
        self.block_config = _read_block(
            self._default_block(*sizes) if block_config is None else block_config
        )
        _check_agreement(self.block_config, *sizes)
        self._check_positions()
        self.hidden_size = self.block_config.hidden_size
        self.num_attention_heads = getattr(self.block_config, "num_attention_heads", None)
        self.intermediate_size = getattr(self.block_config, "intermediate_size", None)

        flows = _default_flows() if flows is None else flows
        if not isinstance(flows, (list, tuple)) or not flows:
            raise ValueError(f"flows must be a list of at least one flow, not {flows!r}.")

        # The last one: from here on `__setattr__` checks fields that change.
        self.flows = [self._flow(index, flow) for index, flow in enumerate(flows)]
        self._check_embeddings()
        if "transformers_version" not in kwargs:  # not saved ones, whose library may be another
            self._check_keywords(kwargs)

        kwargs.setdefault("auto_map", {
            "AutoConfig": "configuration_tarflowlm.TarFlowLMConfig",
            "AutoModel": "modeling_tarflowlm.TarFlowLMModel",
            "AutoModelForCausalLM": "modeling_tarflowlm.TarFlowLMModel",
        })  # fmt: skip
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The configuration of saved fields, as in the library.

        Raises:
            ValueError: If they are no fields, or those of another architecture.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"A configuration is an object of fields, not {config_dict!r:.80}.")

        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"The configuration is that of a {model_type!r:.80}, not of a {cls.model_type}. Load it by "
                "AutoModelForCausalLM; from_causal_lm makes a flow of a causal language model."
            )

        return super().from_dict(config_dict, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers of the whole stack. `patch_head_layers` do not count."""
        return sum(flow["num_hidden_layers"] for flow in self.flows)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        if "flows" not in vars(self) or value != self.num_hidden_layers:
            raise ValueError(
                "num_hidden_layers is the sum over the flows: set the num_hidden_layers of each flow in flows."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field; one that others follow from, or contradict, makes or checks them anew.

        Raises:
            ValueError: If the value is out of range or contradicts another field.
        """
        is_complete = "flows" in vars(self)
        before = vars(self).get(name)
        is_same = type(before) is type(value) and before == value
        if name not in CHECKED_FIELDS or not is_complete or is_same:
            super().__setattr__(name, value)
            return

        fields = {}
        if name == "vocab_size":
            fields |= self._without_vocabulary()
        if (
            name in ("max_position_embeddings", "patch_size")
            and isinstance(value, int)
            and value > 0
        ):
            sizes = {"max_position_embeddings": self.max_position_embeddings}
            sizes |= {"patch_size": self.patch_size, name: value}
            fields["block_config"] = self._block_of_length(**sizes)

        self._change(**fields | {name: value})

    def validate(self) -> None:
        """Checks all fields anew, for those that were changed in place, and completes new flows.

        A model that is made does so, and the library when it saves.

        Raises:
            ValueError: If a field contradicts itself or another one.
        """
        super().validate()
        self._change()

    def _change(self, **changes: Any) -> None:
        """Takes the fields of a configuration that is made of the present ones and the changes."""
        fields = {key: vars(self)[key] for key in CHECKED_FIELDS}
        for key in DECODER_FIELDS:  # they follow from block_config
            fields.pop(key)

        checked = type(self)(**fields | changes)
        for key in CHECKED_FIELDS:
            super().__setattr__(key, vars(checked)[key])

    def _without_vocabulary(self) -> dict[str, Any]:
        """The fields that follow from vocab_size, without what followed from the present one."""
        flows = [dict(flow) for flow in self.flows]
        for flow in flows:
            is_mixture = flow["coupling"] == "mixture_rosenblatt"
            if is_mixture and flow["num_components"] == self.vocab_size:
                del flow["num_components"]

        default = _default_top_k(self.vocab_size)
        top_k = None if self.posterior_top_k == default else self.posterior_top_k
        return {"flows": flows, "posterior_top_k": top_k}

    def _block_of_length(self, max_position_embeddings: int, patch_size: int) -> dict[str, Any]:
        """The block config, with room for more tokens if it counts them."""
        fields = self.block_config.to_dict()
        positions = round_up(max_position_embeddings, patch_size) // patch_size
        if (fields.get("max_position_embeddings") or positions) < positions:
            fields["max_position_embeddings"] = positions

        return fields

    @property
    def has_token_logits(self) -> bool:
        """True if the first flow predicts token after token by mixture weights of the vocabulary."""
        first = self.flows[0]
        return (
            first["coupling"] == "mixture_rosenblatt"
            and first["tie_codebook"]
            and first["direction"] != "right_to_left"
            and self.patch_size == 1
        )

    def decoder_config(self, num_hidden_layers: int, **changes: Any) -> PreTrainedConfig:
        """The block config at another depth, with other changes of its fields."""
        fields = self.block_config.to_dict()
        for name in ("model_type", "dtype", "transformers_version"):
            fields.pop(name, None)

        depth = getattr(self.block_config, "num_hidden_layers", None)
        if num_hidden_layers != depth:
            fields = _at_depth(fields, depth, num_hidden_layers)

        fields |= {"num_hidden_layers": num_hidden_layers, **changes}
        return CONFIG_MAPPING[self.block_config.model_type](**fields)

    def _default_block(
        self,
        hidden_size: int | None,
        num_attention_heads: int | None,
        intermediate_size: int | None,
    ) -> dict[str, Any]:
        """The fields of Llama's configuration, in the sizes that are given."""
        hidden_size = at_least_one("hidden_size", 768 if hidden_size is None else hidden_size)
        num_attention_heads = 12 if num_attention_heads is None else num_attention_heads
        at_least_one("num_attention_heads", num_attention_heads)
        if intermediate_size is None:
            intermediate_size = round_up(8 * hidden_size, 3 * 32) // 3
        else:
            at_least_one("intermediate_size", intermediate_size)

        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads: {hidden_size}, {num_attention_heads}."
            )

        return {
            "model_type": "llama",
            "hidden_size": hidden_size,
            "num_attention_heads": num_attention_heads,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": self.max_position_embeddings // self.patch_size,
            "initializer_range": self.initializer_range,
        }

    def _check_positions(self) -> None:
        """Raises a ValueError if the block counts positions, and has too few of them."""
        positions = getattr(self.block_config, "max_position_embeddings", None)
        is_limit = isinstance(positions, int) and positions > 0
        if is_limit and positions * self.patch_size < self.max_position_embeddings:
            raise ValueError(
                f"block_config.max_position_embeddings is {positions}, fewer than the "
                f"{self.max_position_embeddings // self.patch_size} positions of max_position_embeddings / patch_size."
            )

    def _check_keywords(self, keywords: Iterable[str]) -> None:
        """Raises a ValueError for a field of the block's, and for one that is close to an own.

        Others are kept, as the library keeps what it does not know.
        """
        own = [name for name in inspect.signature(type(self)).parameters if name != "kwargs"]
        for name in keywords:
            is_rotary = name in ROTARY_KEYWORDS
            is_librarys = (
                hasattr(type(self), name) or name == "use_cache"
            )  # which changes no number
            if name.startswith("_") or (is_librarys and not is_rotary):
                continue

            if is_rotary or hasattr(self.block_config, name):
                raise ValueError(
                    f"{name} is a field of the decoder's configuration: give it in block_config, a dict with a "
                    "model_type, or a configuration."
                )

            near = get_close_matches(name, own, n=1, cutoff=0.75)
            if near and not name.endswith("_token_id"):  # the library has others
                raise ValueError(f"TarFlowLMConfig has no field {name}: did you mean {near[0]}?")

    def _check_embeddings(self) -> None:
        """Raises a ValueError where an option of the first flow's embeddings meets none of them."""
        first = self.flows[0]
        start = self.start_token_id
        if start is not None and not (type(start) is int and 0 <= start < self.vocab_size):
            raise ValueError(
                f"start_token_id must be in 0, ..., vocab_size - 1 = {self.vocab_size - 1}, not {start!r}."
            )

        scale = self.embedding_scale
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or not 0 < scale < float("inf"):
            raise ValueError(f"embedding_scale must be positive and finite, not {scale!r}.")

        is_used = start is not None or scale != 1 or self.tie_word_embeddings
        if is_used and (first["context"] != "posterior" or self.patch_size > 1):
            raise ValueError(
                "start_token_id, embedding_scale and tie_word_embeddings need a first flow of context posterior, "
                f"and patch_size 1: {first['context']}, {self.patch_size}."
            )

        if self.tie_word_embeddings and not first.get("tie_codebook"):
            raise ValueError(
                "tie_word_embeddings needs a first flow of mixture_rosenblatt with tie_codebook: its projection "
                "has a row for each token."
            )

    def _flow(self, index: int, flow: dict[str, Any]) -> dict[str, Any]:
        """One flow's entry, checked, with its defaults filled in."""
        where = f"flows[{index}]"
        if not isinstance(flow, dict):
            raise ValueError(f"{where} must be a dict, not {flow!r}.")

        flow = dict(flow)
        for name, allowed in (("coupling", COUPLING_HEADS), ("direction", DIRECTIONS)):
            if flow.get(name) not in tuple(allowed):
                raise ValueError(
                    f"{where}.{name} must be one of {', '.join(allowed)}, not {flow.get(name)!r}."
                )

        coupling = flow["coupling"]
        head = COUPLING_HEADS[coupling]
        allowed = (*FLOW_OPTIONS, *head.options)
        if unknown := sorted(set(flow) - set(allowed)):
            raise ValueError(
                f"{where} has unknown options {unknown}: a flow of {coupling} takes {', '.join(allowed)}."
            )

        at_least_one(f"{where}.num_hidden_layers", flow.get("num_hidden_layers"))
        head.complete(flow, index, self)

        flow.setdefault("context", "posterior" if flow.get("tie_codebook") else "latent")
        if flow["context"] not in CONTEXTS:
            raise ValueError(
                f"{where}.context must be one of {', '.join(CONTEXTS)}, not {flow['context']!r}."
            )
        if flow["context"] == "posterior" and index > 0:
            raise ValueError(
                f"{where}.context must be latent: only the first flow's input has a posterior over tokens."
            )

        return flow


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is no less than the number."""
    return -(-number // multiple) * multiple


def _default_top_k(vocab_size: int) -> int | None:
    """The number of tokens that the "posterior" context averages over; None for all of them."""
    return 8 if vocab_size > 256 else None


def _at_depth(fields: dict[str, Any], depth: int | None, new_depth: int) -> dict[str, Any]:
    """A decoder's fields, without what states the kind of each of so many layers.

    The library makes `layer_types` anew. A flow of fewer layers keeps the beginning of the other
    lists, since some architectures have a list for their default depth only.
    """
    changed = {}
    for name, value in fields.items():
        is_of_layers = isinstance(value, (list, tuple)) and len(value) == depth
        if name == "layer_types" or (is_of_layers and new_depth > depth):
            continue

        changed[name] = value[:new_depth] if is_of_layers else value

    if layers := fields.get("per_layer_config"):
        changed["per_layer_config"] = {
            number: layer for number, layer in layers.items() if int(number) < new_depth
        }

    return changed


def _read_block(block_config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """The decoder's configuration, if it is that of one stack of layers.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(block_config, dict):
        block_config = dict(block_config)
        model_type = block_config.pop("model_type", None)
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"block_config needs the model_type of an architecture of transformers, not {model_type!r}."
            )

        try:
            block_config = CONFIG_MAPPING[model_type](**block_config)
        except Exception as error:
            raise ValueError(f"block_config is no {model_type!r}: {error}") from None
    elif not isinstance(block_config, PreTrainedConfig):
        raise ValueError(
            f"block_config must be a configuration or a dict, not {type(block_config).__name__}."
        )

    _check_decoder(block_config)
    _limit_experts(block_config)
    return block_config


def _check_agreement(
    block_config: PreTrainedConfig,
    hidden_size: int | None,
    num_attention_heads: int | None,
    intermediate_size: int | None,
) -> None:
    """Raises a ValueError if a size that is given is another one in the block config."""
    sizes = hidden_size, num_attention_heads, intermediate_size
    for name, value in zip(DECODER_FIELDS, sizes, strict=True):
        if value is not None and value != getattr(block_config, name, value):
            raise ValueError(
                f"{name} is {value}, but {getattr(block_config, name)} in block_config: leave it out, or agree."
            )


def _check_decoder(block_config: PreTrainedConfig) -> None:
    """Raises a ValueError unless it describes one stack of layers of one width."""
    has_width = isinstance(getattr(block_config, "hidden_size", None), int)
    is_whole = block_config.get_text_config() is block_config
    if not has_width or not is_whole or getattr(block_config, "is_encoder_decoder", False):
        raise ValueError(
            f"block_config: {block_config.model_type} is a model of several parts, such as an encoder and a decoder. "
            "Give its text model, or take a decoder-only architecture, such as llama or qwen3."
        )


def _limit_experts(block_config: PreTrainedConfig) -> None:
    """Lets a token have no more experts than there are: a small number meets a default of several."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    counts = [getattr(block_config, name, None) for name in names]
    counts = [count for count in counts if isinstance(count, int) and count > 0]
    taken = getattr(block_config, "num_experts_per_tok", None)
    if counts and isinstance(taken, int):
        block_config.num_experts_per_tok = min(taken, *counts)


def _token_id(name: str, value: Any, may_be_several: bool = False) -> int | list[int] | None:
    """Returns the value if it is None, an integer or, where there may be several, a list of them.

    Raises:
        ValueError: If it is not; the message begins with the name.
    """
    ids = value if may_be_several and isinstance(value, (list, tuple)) else [value]
    if value is None or (ids and all(type(each) is int for each in ids)):
        return value

    several = ", a list of integers" if may_be_several else ""
    raise ValueError(f"{name} must be an integer{several} or None, not {value!r}.")


def _default_flows() -> list[dict[str, Any]]:
    # Twelve layers in all, most of them next to the data.
    return [
        {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 10},
        {
            "coupling": "mixture_cdf",
            "direction": "right_to_left",
            "num_hidden_layers": 1,
            "num_components": 64,
        },
        {
            "coupling": "mixture_cdf",
            "direction": "left_to_right",
            "num_hidden_layers": 1,
            "num_components": 64,
        },
    ]


__all__ = ["TarFlowLMConfig"]
