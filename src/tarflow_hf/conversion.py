"""Causal language models to TarFlowLMs of one Mix-d flow, and back: nothing is trained or lost.

A flow next to the data that runs left to right, with the codebook's components and a posterior
context, is a causal language model whose next-token probabilities are the mixture weights:

    log p(z) = sum_t log sum_k pi_k(z_<t) N(z_t; mu_k, sigma_k^2 I),   pi(z_<t) = p(. | x_<t)

Where no two Gaussians of the codebook overlap, a latent says which token it stands for, and minus
the ELBO is the source's cross-entropy. So the source's decoder, its tables and its output
projection become those of the flow, and the codebook is drawn.

The first token follows a start vector: the source's embedding of its beginning-of-sequence token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .data import lost_path
from .modeling.configuration_tarflowlm import TarFlowLMConfig
from .modeling.inversion_tarflowlm import evaluating
from .modeling.modeling_tarflowlm import FlowLayer, TarFlowLMModel
from .modeling.slots_tarflowlm import make_layout, to_positions
from .modeling.vocabulary_tarflowlm import MIN_SEPARATION, closest_distance, draw_means
from .noise import seed_of

SOFT_CAPS = ("final_logit_softcapping", "logit_soft_cap", "output_logit_soft_cap")
DEFAULT_POSITIONS = 2048  # of a source that has no limit
PROBE_TEXT = (
    "The history of the city begins in the twelfth century, when a bridge was built across the "
    "river. Merchants came, and with them a market, a wall and a court of law."
)


@dataclass
class Probe:
    """A source and its conversion on the same tokens, in nats a token."""

    source_nats: float  # the source's cross-entropy
    elbo_nats: float  # minus the model's ELBO
    max_difference: float  # the largest one between next-token log-probabilities
    closest_means: float | None = None  # the distance of the codebook's closest two, in scales

    def __str__(self) -> str:
        parts = [
            f"source {self.source_nats:.6f} nats a token, minus ELBO {self.elbo_nats:.6f}",
            f"log-probabilities differ by at most {self.max_difference:.1e}",
        ]
        if self.closest_means is not None:
            parts.append(f"closest means {self.closest_means:.1f} scales apart")

        return "; ".join(parts)


# --------------------------------------------------------------------------------------------------
# From a causal language model
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def from_causal_lm(
    source: PreTrainedModel | str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    latent_size: int = 16,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    start_token_id: int | None = None,
    log_scale: float = -3.5,
    max_position_embeddings: int | None = None,
    posterior_top_k: int | None = None,
    conditional: bool = False,
    seed: int = 0,
) -> TarFlowLMModel:
    """Returns a causal language model as a TarFlowLM of one Mix-d flow, without training.

    Minus the model's ELBO is the source's cross-entropy of `[start_token_id, *input_ids]`. A probe
    compares the two before the model is returned.

    Args:
        source: A causal language model of the library, or the id or folder of one.
        tokenizer: The source's. It names the beginning-of-sequence token, and the probe then reads
            a text, too. An id or a folder brings its own.
        latent_size: Size d of a token's latent.
        gguf_file: The file of an id or a folder to read, in GGUF's format.
        dtype: The dtype in which an id or a folder is loaded; by default that of its weights, and
            float32 from a GGUF file.
        start_token_id: The token whose embedding is read before the first position. By default the
            beginning-of-sequence token of the tokenizer, the source's config or its generation
            config; where none of them has one, their end-of-sequence token, which stands between
            documents.
        log_scale: Log standard deviation of every Gaussian of the codebook. The means are drawn
            from N(0, I); those that are too close to others are drawn again.
        max_position_embeddings: Longest sequence. By default the source's own, or 2,048.
        posterior_top_k: See `TarFlowLMConfig`.
        conditional: Let the model be told some of the tokens. It is exact with none observed, and
            has to be trained before it fills gaps.
        seed: Of the codebook.

    Returns:
        The model in the source's dtype, with its codebook in float32, in evaluation mode. Tables
        that the source ties are tied. The source is left in the modes that it was in.

    Raises:
        ValueError: If the source is no causal language model with a causal decoder and an output
            projection, it post-processes logits other than by a factor, the codebook overlaps, no
            start token can be found, or the probe shows any other difference.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> source = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1))
        >>> model = from_causal_lm(source.eval(), latent_size=8)
        >>> ids = torch.randint(64, (1, 10))
        >>> with_start = torch.cat([torch.tensor([[source.config.bos_token_id]]), ids], 1)
        >>> loss = source(with_start, labels=with_start).loss
        >>> torch.allclose(model(ids, labels=ids).loss, loss, atol=1e-4)
        True
    """
    # 1. The source, and the token before the first.
    if not isinstance(source, PreTrainedModel):
        source, tokenizer = load_source(source, tokenizer, gguf_file, dtype)

    with evaluating(source):  # and back, also if it is refused
        parts = SourceParts.of(source)
        start = _start_token(source, tokenizer) if start_token_id is None else start_token_id
        if not 0 <= start < len(parts.table):
            raise ValueError(
                f"start_token_id must be in 0, ..., {len(parts.table) - 1}, not {start}."
            )

        _check_causal(source, _random_ids(parts, start, 8))

        # 2. The factors that are taken into tables.
        embedding_factor = _embedding_factor(parts)
        logit_factor = _logit_factor(source, parts, start)

        # 3. The model, and its weights.
        config = TarFlowLMConfig(
            vocab_size=len(parts.table),
            latent_size=latent_size,
            max_position_embeddings=max_position_embeddings or _num_positions(source.config),
            block_config=_block_config(source.config),
            flows=[
                {
                    "coupling": "mixture_rosenblatt",
                    "direction": "left_to_right",
                    "num_hidden_layers": source.config.num_hidden_layers,
                    "projection_bias": parts.bias is not None,
                }
            ],
            conditional=conditional,
            posterior_top_k=posterior_top_k,
            initial_log_scale=log_scale,
            start_token_id=start,
            embedding_scale=embedding_factor / logit_factor if parts.is_tied else embedding_factor,
            tie_word_embeddings=parts.is_tied,
            **_special_tokens(source, tokenizer),
        )
        model = _build(config, source.dtype)
        _copy_weights(model, parts, logit_factor)
        _draw_codebook(model, log_scale, seed)

        # 4. The proof.
        for ids in _probe_ids(source, tokenizer, start, config):
            _check(source, model, ids)

    return model


def load_source(
    source: str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Returns the model of an id or a folder, and its tokenizer if it has one.

    The arguments are those of [`from_causal_lm`].

    Raises:
        FileNotFoundError: If the source is a path that leads nowhere.
        ValueError: If it is no causal language model of the library.
    """
    advice = "Give a folder with a causal language model, or a repository of the Hub."
    if reason := lost_path(str(source), advice):
        raise FileNotFoundError(reason)

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is None:
        config = AutoConfig.from_pretrained(source)
        _check_config(config)

    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError, KeyError):
            tokenizer = None  # the config may name the start token

    default = "auto" if gguf_file is None else torch.float32
    options["dtype"] = default if dtype is None else dtype
    return AutoModelForCausalLM.from_pretrained(source, **options), tokenizer


def _check_config(config) -> None:
    """Raises a ValueError unless the library has a causal language model of this config."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder-decoder: its tokens depend on another text, which a flow does not "
            "read. Give a decoder-only model."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{config.model_type} is no causal language model of transformers (AutoModelForCausalLM does not know "
            "it): it has no causal decoder. Give a decoder-only model."
        )

    for name, what in (
        ("hidden_size", "it is a model of several parts; give its text model"),
        ("num_attention_heads", "a flow's decoder has attention, and a cache of keys and values"),
    ):
        if not hasattr(config, name):
            raise ValueError(f"The config of {config.model_type} has no {name}: {what}.")


@dataclass
class SourceParts:
    """The parts of a causal language model that a flow is made of."""

    base: PreTrainedModel  # the decoder with the token table
    embed: Any
    table: Tensor  # (V, w), the weight of `embed`
    head: Any
    weight: Tensor  # (V, w), that of the output projection
    bias: Tensor | None  # (V,)

    @property
    def is_tied(self) -> bool:
        return self.table.data_ptr() == self.weight.data_ptr()

    @classmethod
    def of(cls, source: PreTrainedModel) -> "SourceParts":
        """The parts of a source.

        Raises:
            ValueError: If one of them is missing or of another kind.
        """
        name = type(source).__name__
        _check_config(source.config)
        base = _base_of(source)
        embed: Any = None
        head: Any = None
        if base is source:
            raise ValueError(f"{name} has no base model apart from its output projection.")

        with suppress(NotImplementedError, AttributeError):
            embed, head = source.get_input_embeddings(), source.get_output_embeddings()

        for part, what in ((embed, "input embeddings"), (head, "output embeddings")):
            if not isinstance(getattr(part, "weight", None), Tensor):
                raise ValueError(
                    f"{name} has no {what} (one matrix with a row for each token): mixture weights are a linear "
                    "map of the decoder's output. Give a model with a language model's head."
                )

        if not all(parameter.is_floating_point() for parameter in source.parameters()):
            raise ValueError(
                f"{name} is quantised: its weights are no matrices to copy. Load it without quantization_config, or "
                "call source.dequantize() first."
            )

        parts = cls(base, embed, embed.weight, head, head.weight, getattr(head, "bias", None))
        parts._check_shapes(name, source.config.hidden_size)
        return parts

    def _check_shapes(self, name: str, hidden_size: int) -> None:
        shapes = tuple(self.table.shape), tuple(self.weight.shape)
        if shapes[0] != shapes[1] or shapes[0][1] != hidden_size:
            raise ValueError(
                f"{name} has input embeddings {shapes[0]} and output embeddings {shapes[1]}, but both must be "
                f"(V, w) with the decoder's width w = {hidden_size}."
            )


def _base_of(source: PreTrainedModel) -> PreTrainedModel:
    """The decoder of a source, or the source itself if it has none apart from its projection."""
    if source.base_model is not source:
        return source.base_model

    kind = MODEL_MAPPING.get(type(source.config), ())
    return next((child for child in source.children() if isinstance(child, kind)), source)


def _start_token(source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The token that the source reads before a text."""
    holders = [tokenizer, source.config, source.generation_config]
    for name in ("bos_token_id", "eos_token_id"):
        for holder in holders:
            found = getattr(holder, name, None)
            found = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(found, int) and 0 <= found < source.config.vocab_size:
                return found

    raise ValueError(
        "The source has no beginning-of-sequence token, and no end-of-sequence token to stand for one: give "
        "start_token_id, the token that it reads before a text."
    )


def _num_positions(config) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else DEFAULT_POSITIONS


def _block_config(config) -> dict[str, Any]:
    """The config of the flow's decoder: the source's, without what says how it was stored."""
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "auto_map"):
        fields.pop(name, None)

    return fields


def _special_tokens(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The ids of the special tokens that `generate` reads."""
    holders = [source.generation_config, source.config, tokenizer]
    tokens = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = [getattr(holder, name, None) for holder in holders]
        tokens[name] = next((value for value in found if value is not None), None)

    return tokens


def _build(config: TarFlowLMConfig, dtype: torch.dtype) -> TarFlowLMModel:
    """A model in this dtype, with its codebook in float32."""
    name = config.block_config.model_type
    with _explained(f"The decoder of {name} cannot be a flow's"):
        model = TarFlowLMModel._from_config(config, dtype=dtype)

    model.codebook.float()
    return model.eval()


def _copy_weights(model: TarFlowLMModel, parts: SourceParts, logit_factor: float) -> None:
    flow = model.flow.layers[0]
    tables = {
        name for name, weight in parts.base.named_parameters() if weight is parts.embed.weight
    }
    state = {name: value for name, value in parts.base.state_dict().items() if name not in tables}
    expected = flow.decoder.state_dict()
    differing = {
        name for name in state.keys() & expected if state[name].shape != expected[name].shape
    }
    differing |= state.keys() ^ expected.keys()
    if differing:
        raise ValueError(
            f"{type(parts.base).__name__} has other weights than the decoder that AutoModel builds from its config, "
            f"without the token table: {sorted(differing)[:5]}. Only such a decoder can be a flow's."
        )

    flow.decoder.load_state_dict(state)
    flow.head.projection.weight.copy_(parts.weight * logit_factor)
    if parts.bias is not None:
        flow.head.projection.bias.copy_(parts.bias * logit_factor)

    if not parts.is_tied:
        flow.embedding.copy_(parts.table)

    if flow.observed_embedding is not None:
        rows = (
            flow.embedding if flow.embedding_scale == 1 else flow.embedding * flow.embedding_scale
        )
        flow.observed_embedding.embedding.weight.copy_(rows)
        flow.observed_embedding.marker.zero_()


def _draw_codebook(model: TarFlowLMModel, log_scale: float, seed: int) -> None:
    codebook = model.codebook
    spacing = MIN_SEPARATION * math.exp(log_scale)
    # Not the seed itself: noise that a user draws by it would have the means' very numbers.
    generator = torch.Generator().manual_seed(seed_of(seed))
    means = draw_means(len(codebook.mean), codebook.mean.shape[1], spacing, generator)
    if means is None:
        num_tokens, latent_size = codebook.mean.shape
        raise ValueError(
            f"The codebook overlaps: latent_size={latent_size} has no room for {num_tokens} means that are "
            f"{MIN_SEPARATION:.0f} scales apart at log_scale={log_scale}. Give a larger latent_size, or a smaller "
            "log_scale."
        )

    codebook.mean.copy_(means)
    codebook.log_scale.fill_(log_scale)


# --------------------------------------------------------------------------------------------------
# Factors: what the source's modules multiply by, measured
# --------------------------------------------------------------------------------------------------


def _embedding_factor(parts: SourceParts) -> float:
    """The c of `embed(ids) = c table[ids]`.

    Raises:
        ValueError: If the input embeddings are no multiple of the table.
    """
    ids = torch.arange(min(64, len(parts.table)), device=parts.table.device)
    inputs, rows = parts.embed(ids).double(), parts.table[ids].double()
    factor = _ratio(inputs, rows, parts.table.dtype)
    if factor is None or factor <= 0:
        raise ValueError(
            f"The input embeddings of {type(parts.base).__name__} are no multiple of their table."
        )

    return _snap(factor, parts.base.config, parts.table.dtype)


def _logit_factor(source: PreTrainedModel, parts: SourceParts, start: int) -> float:
    """The c of `logits = c head(hidden)`.

    Raises:
        ValueError: If the source does anything else to its logits.
    """
    ids = _random_ids(parts, start, 16)
    with _explained(f"{type(source).__name__} does not run as a causal language model does"):
        hidden = parts.base(ids, use_cache=False).last_hidden_state
        raw = parts.head(hidden).double()
        logits = source(ids, use_cache=False).logits.double()

    capped = [name for name in SOFT_CAPS if getattr(source.config, name, None)]
    factor = _ratio(logits, raw, parts.table.dtype) if logits.shape == raw.shape else None
    if capped or factor is None or factor <= 0:
        reason = f" ({capped[0]}={getattr(source.config, capped[0])})" if capped else ""
        raise ValueError(
            f"{type(source).__name__} post-processes its logits or its decoder's output{reason} as no output "
            "projection expresses: mixture weights are the softmax of a linear map of the decoder's output. Only a "
            "factor or a bias can be taken in. Give a source without that."
        )

    return _snap(factor, source.config, parts.table.dtype)


def _ratio(value: Tensor, base: Tensor, dtype: torch.dtype) -> float | None:
    """The c of `value = c base`, up to rounding to the dtype; None if there is none."""
    factor = ((value * base).sum() / base.square().sum().clamp_min(1e-300)).item()
    error = (value - factor * base).abs().max()
    is_close = error <= _rounding(dtype) * value.abs().max()
    return factor if is_close and math.isfinite(factor) else None


def _snap(factor: float, config, dtype: torch.dtype) -> float:
    """A measured factor without its rounding: 1, or that of a field of the config."""
    candidates = [1.0, math.sqrt(config.hidden_size)]
    for name, value in config.to_dict().items():
        if type(value) in (int, float) and value > 0 and ("scal" in name or "multipl" in name):
            candidates.extend((float(value), 1 / value))

    best = min(candidates, key=lambda candidate: abs(candidate / factor - 1))
    return best if abs(best / factor - 1) <= _rounding(dtype) else factor


def _rounding(dtype: torch.dtype) -> float:
    return 1e-5 if dtype.itemsize >= 4 else 4 * torch.finfo(dtype).eps


def _random_ids(parts: SourceParts, start: int, length: int, batch_size: int = 2) -> Tensor:
    """Ids (B, n) that begin with the start token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(parts.table), (batch_size, length), generator=generator)
    ids[:, 0] = start
    return ids.to(parts.table.device)


# --------------------------------------------------------------------------------------------------
# The options of generation
# --------------------------------------------------------------------------------------------------

# Those that mean the same here.
SHARED_OPTIONS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_new_tokens",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
SAMPLING_OPTIONS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generation_config_of(source: PreTrainedModel) -> GenerationConfig:
    """The source's generation config, as far as a flow's `generate` has its options.

    The source's temperature is that of the next token's distribution, so it becomes
    `mixture_temperature`. Options of sampling come along only if the source samples: there is no
    greedy choice here.
    """
    theirs = source.generation_config
    options = {name: getattr(theirs, name, None) for name in SHARED_OPTIONS}
    if theirs.do_sample:
        options |= {name: getattr(theirs, name, None) for name in SAMPLING_OPTIONS}
        options["mixture_temperature"] = theirs.temperature

    given = {name: value for name, value in options.items() if value is not None}
    config = GenerationConfig(do_sample=True, temperature=1.0, **given)
    config._from_model_config = False
    return config


def adopt(
    model: TarFlowLMModel, source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Gives a converted model its source's options of generation, by `generation_config_of`.

    The tokenizer is told not to write the start token, which the model reads anyway.
    """
    model.generation_config = generation_config_of(source)
    if tokenizer is not None and tokenizer("a").input_ids[:1] == [model.config.start_token_id]:
        tokenizer.add_bos_token = False


# --------------------------------------------------------------------------------------------------
# Flows above
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def append_flow(model: TarFlowLMModel, flow: dict[str, Any]) -> TarFlowLMModel:
    """Puts another flow above the last one, in place, and returns the model.

    What the model was stays: `num_flows` cuts the new flow off again. An affine flow begins as the
    identity, and a Mix-1 flow within hundredths of a nat a token of it, so that the likelihood
    stays; a Mix-d flow begins as a mixture that knows nothing. In a conditional model the new flow
    reads observed tokens as the first one does at that time.

    Args:
        model: Any TarFlowLM, converted or trained.
        flow: The new flow, as an entry of `TarFlowLMConfig.flows`. Its decoder is as wide as the
            others.

    Raises:
        ValueError: If an option of the flow is out of range, or for a first flow only.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> source = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1))
        >>> model = from_causal_lm(source.eval(), latent_size=8)
        >>> flow = {"coupling": "mixture_cdf", "direction": "right_to_left", "num_hidden_layers": 1}
        >>> len(append_flow(model, flow).flow.layers)
        2
    """
    config, layers = model.config, model.flow.layers
    config.flows = [*config.flows, flow]
    layer = FlowLayer(config, len(layers))
    for part in model.modules():
        part._is_hf_initialized = True  # only the new ones are not

    layers.append(layer)
    model.initialize_weights()
    layer.head.start_as_identity()
    layer.to(model.device, model.dtype)
    layer.train(model.training)
    if config.conditional:
        observed = layers[0].observed_embedding.state_dict()
        layer.observed_embedding.load_state_dict(observed)

    model.check_decoders()
    return model


# --------------------------------------------------------------------------------------------------
# The probe
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def probe(source: PreTrainedModel, model: TarFlowLMModel, input_ids: Tensor) -> Probe:
    """Compares a source with its conversion on tokens (B, T), the start token not among them."""
    found = _compare(source, model, input_ids)
    codebook = model.codebook()
    found.closest_means = closest_distance(codebook.mean) / codebook.log_scale.max().exp().item()
    return found


def _compare(source: PreTrainedModel, model: TarFlowLMModel, input_ids: Tensor) -> Probe:
    """A probe without the look at the codebook, which takes seconds if it is large."""
    start = torch.full_like(input_ids[:, :1], model.config.start_token_id)
    with_start = torch.cat([start, input_ids], 1)
    expected = source(with_start, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    log_prob = expected.gather(-1, input_ids.unsqueeze(-1))
    difference = (next_token_log_probs(model, input_ids) - expected).abs()
    generator = torch.Generator(input_ids.device).manual_seed(0)
    elbo = model(input_ids, generator=generator).elbo

    return Probe(
        source_nats=-log_prob.mean().item(),
        elbo_nats=-elbo.sum().item() / input_ids.numel(),
        max_difference=difference.max().item(),
    )


def next_token_log_probs(
    model: TarFlowLMModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """The log-probability (B, T, V) in nats of each token, given those before it in ids (B, T).

    Entry t is that of token t; at padding, where the mask (B, T) is 0, it means nothing. These are
    the mixture weights of the first flow: the model's next-token distribution if it is the only
    flow, and its codebook does not overlap.

    Raises:
        ValueError: If the first flow has no mixture weights of tokens, or runs right to left.
    """
    first = model.config.flows[0]
    if (
        first["coupling"] != "mixture_rosenblatt"
        or not first["tie_codebook"]
        or first["direction"] != "left_to_right"
        or model.config.patch_size > 1
    ):
        raise ValueError(
            "The next token has probabilities only where the first flow is mixture_rosenblatt with tie_codebook, runs "
            f"left_to_right, and takes one token at a time: {first}, patch_size {model.config.patch_size}."
        )

    flow, codebook = model.flow.layers[0], model.codebook()
    h = to_positions(codebook.sample(input_ids, noise=torch.zeros((), device=input_ids.device)), 1)
    order = flow.order(h, make_layout(h, 1, attention_mask))
    context = flow.context(flow.inputs(order.arrange(h), codebook))
    (weight, bias), *_ = flow.head.projection()

    return order.from_slots(F.linear(context, weight, bias).float().log_softmax(-1))


def _probe_ids(
    source: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    start: int,
    config: TarFlowLMConfig,
) -> list[Tensor]:
    """Random ids, and those of a text if there is a tokenizer, without the start token."""
    parts = SourceParts.of(source)
    longest = min(32, config.max_position_embeddings)
    ids = [_random_ids(parts, start, longest + 1)[:, 1:]]
    if tokenizer is not None:
        text = tokenizer(PROBE_TEXT, return_tensors="pt").input_ids[:, :longest]
        text = text[:, 1:] if text.numel() and text[0, 0] == start else text
        if text.numel() and int(text.max()) < config.vocab_size:
            ids.append(text.to(source.device))

    return ids


def _check(source: PreTrainedModel, model: TarFlowLMModel, ids: Tensor) -> None:
    """Raises a ValueError that says where the model and its source part."""
    name = type(source).__name__
    with _explained(f"The decoder of {name} does not run on input embeddings"):
        found = _compare(source, model, ids)

    is_exact = source.dtype.itemsize >= 4
    tolerance = 1e-3 if is_exact else 0.25
    if not found.max_difference <= tolerance:
        raise ValueError(
            f"{name} is not expressed by its decoder on input embeddings and a linear output projection: {found}. Its "
            "base model reads more of a token than its embedding, or its config does not say all of it."
        )

    if not abs(found.elbo_nats - found.source_nats) <= (1e-4 if is_exact else 0.02):
        raise ValueError(
            f"The codebook overlaps: {found}. Give a larger latent_size, or a smaller log_scale."
        )

    _check_steps(name, model, ids[:1, :4])


def _check_causal(source: PreTrainedModel, ids: Tensor) -> None:
    """Raises a ValueError if tokens change what was said before them."""
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % source.config.vocab_size
    with _explained(f"{type(source).__name__} does not run as a causal language model does"):
        before, after = (source(x, use_cache=False).logits.float() for x in (ids, changed))

    difference = (before - after).abs()
    is_read = difference[:, :-1].max() > _rounding(source.dtype) * difference.max()
    if is_read:
        raise ValueError(
            f"{type(source).__name__} is not causal: its logits read tokens behind them. If its config has is_decoder, "
            "set it to True; a model that was trained to read both sides is no source."
        )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever a foreign model raises becomes a ValueError that begins with these words."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


def _check_steps(name: str, model: TarFlowLMModel, ids: Tensor) -> None:
    """Raises a ValueError unless step by step, with the decoder's cache, all is as at once."""
    with _explained(f"The decoder of {name} does not take a cache of keys and values"):
        generator = torch.Generator(ids.device).manual_seed(0)
        noise = model.flow(model.encode(ids, generator)).noise
        tokens = model.flow(noise, reverse=True, inverse_method="sequential").latents
        is_same = torch.equal(model.decode(tokens).argmax(-1), ids)

    if not is_same:
        raise ValueError(
            f"The decoder of {name} gives another output step by step, with its cache, than at once."
        )


# --------------------------------------------------------------------------------------------------
# Back to a causal language model
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def to_causal_lm(model: TarFlowLMModel) -> PreTrainedModel:
    """Returns the causal language model whose next-token probabilities are the mixture weights.

    It is a plain model of the library, of the class that the config of the flow's decoder names, in
    evaluation mode. After the start token it gives the probabilities of `next_token_log_probs`.

    Args:
        model: A model of one Mix-d flow, converted by [`from_causal_lm`] and trained on or not, or
            made alike.

    Raises:
        ValueError: If no causal language model gives the model's distribution: it has flows above
            the first, patches, a conditional or right-to-left flow, a codebook that overlaps, a
            learned start vector or a bias that the class has no place for.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> source = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1))
        >>> back = to_causal_lm(from_causal_lm(source.eval(), latent_size=8))
        >>> ids = torch.randint(64, (1, 10))
        >>> torch.allclose(back(ids).logits, source(ids).logits, atol=1e-4)
        True
    """
    _check_one_causal_flow(model)
    config, flow = model.config, model.flow.layers[0]
    dtype = flow.embedding.dtype
    lm = AutoModelForCausalLM.from_config(_causal_config(config), dtype=dtype).eval()
    parts = SourceParts.of(lm)
    base, state = parts.base, flow.decoder.state_dict()
    names = set(base.load_state_dict(state, strict=False).missing_keys)
    missing = {name for name in names if base.get_parameter(name) is not parts.table}
    if missing:
        raise ValueError(
            f"{type(lm).__name__} has weights that the flow has not: {sorted(missing)[:5]}."
        )

    # The factors of a model of this class, measured with weights that are still its own.
    logit_factor = _logit_factor(lm, parts, config.start_token_id)
    embedding_factor = _embedding_factor(parts)
    parts.weight.copy_(flow.head.projection.weight / logit_factor)
    if not config.tie_word_embeddings:
        parts.table.copy_(flow.embedding * (config.embedding_scale / embedding_factor))

    bias = flow.head.projection.bias
    if parts.bias is not None:
        parts.bias.copy_(0 if bias is None else bias / logit_factor)
    elif bias is not None and not torch.allclose(bias, bias.mean(), rtol=0, atol=1e-6):
        raise ValueError(
            f"{type(lm).__name__} has no bias for its logits, but the flow's projection has one: no such model exists."
        )

    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(lm.generation_config, name, getattr(config, name))

    return lm


def _causal_config(config: TarFlowLMConfig):
    """The config of the flow's decoder as that of a whole model."""
    changes = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        changes[name] = getattr(config, name)

    return config.decoder_config(config.flows[0]["num_hidden_layers"], **changes)


def _check_one_causal_flow(model: TarFlowLMModel) -> None:
    config = model.config
    first = config.flows[0]
    reasons = {
        "flows above the first": len(config.flows) > 1,
        "patches of several tokens": config.patch_size > 1,
        "context on both sides (conditional=True)": config.conditional,
        "a first flow of another coupling than mixture_rosenblatt": first["coupling"]
        != "mixture_rosenblatt",
        "a codebook of the flow's own": first.get("tie_codebook") is False,
        "a first flow that does not run left to right": first["direction"] != "left_to_right",
        "a decoder that reads latents, not tokens": first["context"] != "posterior",
        "a learned start vector, which is no token's embedding": config.start_token_id is None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"No causal language model has this model's distribution: it has {', and '.join(found)}."
        )

    scale = model.codebook().log_scale.max().exp().item()
    distance = closest_distance(model.codebook().mean) / scale
    if distance < MIN_SEPARATION:
        raise ValueError(
            f"No causal language model has this model's distribution: its codebook overlaps (closest means "
            f"{distance:.1f} scales apart), so that a latent does not say which token it stands for."
        )


__all__ = [
    "Probe",
    "from_causal_lm",
    "generation_config_of",
    "load_source",
    "next_token_log_probs",
    "probe",
    "to_causal_lm",
]
