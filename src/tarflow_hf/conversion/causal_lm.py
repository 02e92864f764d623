"""Causal language models to TarFlowLMs of one Mix-d flow, and back: nothing is trained or lost.

A flow next to the data that runs left to right, with the codebook's components and a posterior
context, is a causal language model whose next-token probabilities are the mixture weights:

    log p(z) = sum_t log sum_k pi_k(z_<t) N(z_t; mu_k, sigma_k^2 I),   pi(z_<t) = p(. | x_<t)

If no two Gaussians of the codebook overlap, a latent says which token it stands for, and minus the
ELBO is the source's cross-entropy. So the source's decoder, its tables and its output
projection become those of the flow, and the codebook is drawn.

The first token follows a start vector: the source's embedding of its beginning-of-sequence token.
"""

import math
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..modeling.causality import longest_of_one_rope
from ..modeling.configuration_tarflowlm import TarFlowLMConfig
from ..modeling.inversion_tarflowlm import evaluating
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..modeling.vocabulary_tarflowlm import MIN_SEPARATION, closest_distance, draw_means
from ..noise import seed_of
from .proof import probe_ids, prove
from .source import (
    SourceParts,
    check_causal,
    explained,
    load_source,
    measured_embedding_factor,
    measured_logit_factor,
    random_ids,
    start_token,
)

logger = logging.get_logger(__name__)

DEFAULT_POSITIONS = 2048  # of a source that has no limit


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
        max_position_embeddings: The longest sequence. By default the source's own (as far as its
            rotary embeddings do not change with the length), or 2,048.
        posterior_top_k: See `TarFlowLMConfig`.
        conditional: Let the model be told some of the tokens. It is exact with none observed, and
            has to be trained before it fills gaps.
        seed: The seed of the codebook.

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
    if isinstance(source, (str, PathLike)):
        source, tokenizer = load_source(source, tokenizer, gguf_file, dtype)
    elif not isinstance(source, PreTrainedModel):
        raise ValueError(
            f"source must be a causal language model, or the id or folder of one, not {source!r:.60}."
        )
    elif gguf_file is not None or dtype is not None:
        raise ValueError(
            f"gguf_file and dtype say how an id or a folder is loaded; {type(source).__name__} is loaded already."
        )

    with evaluating(source):  # and back, also if it is refused
        parts = SourceParts.of(source)
        start = start_token(source, tokenizer) if start_token_id is None else start_token_id
        if not isinstance(start, int) or not 0 <= start < len(parts.table):
            raise ValueError(
                f"start_token_id must be in 0, ..., {len(parts.table) - 1}, not {start!r}."
            )

        check_causal(source, random_ids(parts, start, 8))

        # 2. The factors that are taken into tables.
        embedding_factor = measured_embedding_factor(parts)
        logit_factor = measured_logit_factor(source, parts, start)

        # 3. The model, and its weights.
        num_positions = max_position_embeddings
        if num_positions is None:
            num_positions = _num_positions(source.config)

        config = TarFlowLMConfig(
            vocab_size=len(parts.table),
            latent_size=latent_size,
            max_position_embeddings=num_positions,
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
        for ids in probe_ids(source, tokenizer, start, config):
            prove(source, model, ids)

    return model


def _num_positions(config) -> int:
    """The source's longest sequence, as far as its positions do not depend on the length."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        positions = DEFAULT_POSITIONS

    limit = longest_of_one_rope(config)
    if limit is None or limit > positions:
        return positions

    longest = limit - 1  # the source reads a start token, too
    logger.warning_once(
        f"Beyond {limit} tokens the rotary embeddings of {config.model_type} change for all positions, which a flow "
        f"cannot do: max_position_embeddings becomes {longest}."
    )
    return longest


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
    with explained(f"The decoder of {name} cannot be a flow's"):
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

    _check_buffers(parts.base, flow.decoder)
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


def _check_buffers(base: nn.Module, decoder: nn.Module) -> None:
    """Raises a ValueError if buffers, such as a rotary embedding's, are not those of the config.

    `source.half()` rounds them, loading with `dtype=torch.float16` does not.
    """
    own = dict(decoder.named_buffers())
    for name, buffer in base.named_buffers():
        expected = own.get(name)
        if expected is None or not buffer.is_floating_point() or buffer.shape != expected.shape:
            continue

        if not torch.allclose(buffer.double().cpu(), expected.double().cpu(), rtol=1e-5, atol=0):
            raise ValueError(
                f"The buffer {name} of {type(base).__name__} is not what its config makes: {buffer.dtype} rounds it. "
                "Load the source with dtype=..., which leaves buffers alone, in place of .half() or .to(...)."
            )


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
    config = model.config
    flow = model.flow.layers[0]
    dtype = flow.embedding.dtype
    lm = AutoModelForCausalLM.from_config(_causal_config(config), dtype=dtype).eval()
    parts = SourceParts.of(lm)
    base = parts.base
    state = flow.decoder.state_dict()
    names = set(base.load_state_dict(state, strict=False).missing_keys)
    missing = {name for name in names if base.get_parameter(name) is not parts.table}
    if missing:
        raise ValueError(
            f"{type(lm).__name__} has weights that the flow has not: {sorted(missing)[:5]}."
        )

    # The factors of a model of this class, measured with weights that are still its own.
    logit_factor = measured_logit_factor(lm, parts, config.start_token_id)
    embedding_factor = measured_embedding_factor(parts)
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
