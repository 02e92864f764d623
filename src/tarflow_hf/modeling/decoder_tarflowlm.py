"""The decoder of a flow: the shift, and a causal decoder of the library, which is fed embeddings.

Shapes: B batch, N positions of P tokens and size D = P d, n some of the slots, w hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers import initialization as init

from .codebook import Gaussians
from .slots_tarflowlm import Observed, ObservedEmbedding

# The name of a decoder's argument that holds its cache: `past_key_values` until transformers 5.24.
CACHE_ARGUMENT = (
    "cache" if tuple(map(int, __version__.split(".")[:2])) >= (5, 24) else "past_key_values"
)


def make_decoder(config: PreTrainedConfig, num_hidden_layers: int) -> PreTrainedModel:
    """Returns the block config's causal decoder at some depth, without a token table.

    The library builds none without a table: it gets the smallest one, of token 0 only, and loses
    that. A decoder that does not know the default attention, "sdpa", has "eager".
    """
    one_token = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    decoder_config = config.decoder_config(num_hidden_layers, **one_token)
    implementation = config._attn_implementation
    if implementation == "sdpa" and not _knows_sdpa(decoder_config):
        implementation = "eager"

    decoder_config._attn_implementation = implementation
    decoder = AutoModel.from_config(decoder_config)
    decoder.set_input_embeddings(None)

    return decoder


def _knows_sdpa(config: PreTrainedConfig) -> bool:
    model_class = MODEL_MAPPING.get(type(config), None)
    return getattr(model_class, "_supports_sdpa", True)


def run_decoder(
    decoder: PreTrainedModel,
    inputs: Tensor,
    cache: Cache | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The decoder's output (B, n, w) of inputs (B, n, w), behind the slots that the cache holds.

    Args:
        decoder: The decoder of a flow.
        inputs: The slots' inputs.
        cache: Keys and values of the slots before; these here are added.
        position_ids: The place (B, n) of each slot, if that is not its number.

    Raises:
        ValueError: If flash attention is asked for place numbers in a batch of one.
    """
    options = {}
    if cache is not None:
        options[CACHE_ARGUMENT] = cache

    if position_ids is not None:
        implementation = decoder.config._attn_implementation
        if "flash" in implementation and len(inputs) == 1 < inputs.shape[1]:
            raise ValueError(
                f"{implementation} takes a single sequence whose position ids jump for several: with observed "
                'tokens give it two or more sequences, or use attn_implementation="sdpa".'
            )

        options["position_ids"] = position_ids
        if cache is None:
            # Without a mask the library takes a jump in the position ids for the start of another
            # sequence.
            mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
            options["attention_mask"] = mask

    output = decoder(inputs_embeds=inputs, use_cache=cache is not None, **options)
    return output.last_hidden_state


class FlowDecoder(nn.Module):
    """The part of a flow that reads positions: position n is predicted from those before it.

    The decoder reads either a projection of the latents, or, in the flow next to the data, an
    embedding averaged under p(token | latent). A start vector stands before the first position: a
    learned one, or the embedding of the config's `start_token_id`.

    In a conditional model some positions are observed: they are no variables of the flow, but
    context. The decoder reads them first, then passes the missing positions in the flow's
    direction; position ids say where each of them is. A missing position so sees every observed
    one, and plain causal attention is all it takes.
    """

    def __init__(self, config: PreTrainedConfig, flow: dict[str, Any]):
        super().__init__()
        self.patch_size = config.patch_size
        self.embedding, self.input_projection = None, None
        if flow["context"] == "posterior":
            self.posterior_top_k = config.posterior_top_k
            self.start_token_id = config.start_token_id
            self.embedding_scale = config.embedding_scale
            # A table for each token of a patch: a projection of embeddings, two small factors,
            # would learn too slowly.
            num_entries = config.patch_size * config.vocab_size
            self.embedding = nn.Parameter(torch.empty(num_entries, config.hidden_size))
        else:
            size = config.patch_size * config.latent_size
            self.input_projection = nn.Linear(size, config.hidden_size)

        self.start = None
        if self.embedding is None or self.start_token_id is None:
            self.start = nn.Parameter(torch.empty(config.hidden_size))

        self.decoder = make_decoder(config, flow["num_hidden_layers"])
        self.observed_embedding = ObservedEmbedding(config) if config.conditional else None

    def init_weights(self, std: float) -> None:
        if self.start is not None:
            init.normal_(self.start, std=std)
        if self.embedding is not None:
            init.normal_(self.embedding, std=std)

    def inputs(
        self,
        h: Tensor,
        codebook: Gaussians,
        observed: Observed | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """The decoder's inputs (B, n, w) at the slots first, ..., last - 1: the shift.

        Slot s predicts position s, and reads position s - 1 only (slot 0 the start vector). So h
        (B, N, D), in the flow's own order, has to be right at the positions first - 1, ...,
        last - 2. Slots of observed positions read these; the first slot behind them reads the
        start vector.
        """
        last = h.shape[1] if last is None else last
        start = self.start_vector()
        inputs = [start.expand(len(h), 1, -1)] if first == 0 else []
        if last > max(first, 1):
            inputs.append(self._embed(h[:, max(first - 1, 0) : last - 1], codebook))

        inputs = torch.cat(inputs, 1)
        if observed is not None:
            slots = torch.arange(first, last, device=h.device).unsqueeze(-1)  # (n, 1)
            inputs = torch.where(slots == observed.count, start, inputs)
            inputs = torch.where(slots < observed.count, observed.inputs[:, first:last], inputs)

        return inputs

    def start_vector(self) -> Tensor:
        """The vector (w,) that the decoder reads before the first position."""
        if self.start is not None:
            return self.start

        return self._scaled(self.embedding[self.start_token_id])

    def context(
        self,
        inputs: Tensor,
        observed: Observed | None = None,
        first: int = 0,
        cache: Cache | None = None,
    ) -> Tensor:
        """The decoder's output (B, n, w) of inputs at the slots from `first` on.

        The cache holds the slots before.
        """
        position_ids = None
        if observed is not None:
            position_ids = observed.position_ids[:, first : first + inputs.shape[1]]

        return run_decoder(self.decoder, inputs, cache, position_ids)

    def _embed(self, h: Tensor, codebook: Gaussians) -> Tensor:
        """Decoder inputs (B, n, w) of positions h (B, n, D)."""
        if self.input_projection is not None:
            return self.input_projection(h.to(self.start.dtype)).to(self.start.dtype)

        tokens = h.unflatten(-1, (self.patch_size, -1))
        average = codebook.posterior_average(tokens, self.embedding, self.posterior_top_k)
        return self._scaled(average.to(self.embedding.dtype))

    def _scaled(self, embeddings: Tensor) -> Tensor:
        """The embeddings times the config's `embedding_scale`, rounded to their dtype first.

        The library's own embeddings that scale round so, too.
        """
        if self.embedding_scale == 1:
            return embeddings

        return embeddings * embeddings.new_full((), self.embedding_scale)
