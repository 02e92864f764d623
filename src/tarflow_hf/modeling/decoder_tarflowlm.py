"""The decoder of a flow: the shift, and a causal decoder of the library, which is fed embeddings.

Shapes: B batch, N positions of P tokens and size D = P d, n some of the slots, w hidden size.
"""

import inspect
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

NO_TABLE = (
    "A TarFlowLM has no table of token embeddings, which prompts and single tokens that are trained need: it draws "
    "latents, and its decoders read these."
)


def make_decoder(config: PreTrainedConfig, num_hidden_layers: int) -> PreTrainedModel:
    """Returns the block config's causal decoder at some depth, without a token table.

    The library builds none without a table: it gets the smallest one, of token 0 only, and loses
    that. A decoder that does not know the default attention, "sdpa", has "eager".

    Raises:
        ValueError: If the library makes no such decoder of the block config.
    """
    has_padding = isinstance(getattr(config.block_config, "pad_token_id", None), int)
    one_token: dict[str, Any] = {"vocab_size": 1, "bos_token_id": 0, "eos_token_id": 0}
    one_token["pad_token_id"] = 0 if has_padding else None
    try:
        decoder_config = config.decoder_config(num_hidden_layers, **one_token)
        implementation = config._attn_implementation
        if implementation == "sdpa" and not _knows_sdpa(decoder_config):
            implementation = "eager"

        decoder_config._attn_implementation = implementation
        decoder = AutoModel.from_config(decoder_config)
        decoder.set_input_embeddings(None)

        # State space models have a name of their own.
        parameters = inspect.signature(decoder.forward).parameters
        is_named = "cache_params" in parameters
        decoder.cache_argument = "cache_params" if is_named else CACHE_ARGUMENT
    except Exception as error:  # each architecture has its own
        raise ValueError(
            f"block_config: {config.block_config.model_type} makes no decoder: {error}. Its sizes may contradict; "
            "else take another architecture, such as llama or qwen3."
        ) from error

    return decoder


def _knows_sdpa(config: PreTrainedConfig) -> bool:
    model_class = MODEL_MAPPING.get(type(config), None)
    return getattr(model_class, "_supports_sdpa", True)


class InputCache:
    """The inputs of all slots so far, for a decoder whose own cache cannot be used.

    The decoder reads all of them again at every step: slow, but right for every causal decoder.
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None  # (B, slots, w)
        self.position_ids: Tensor | None = None  # (B, slots)

    def add(self, inputs: Tensor, position_ids: Tensor | None) -> None:
        """Takes the inputs (B, n, w) of the next slots, and their places (B, n) if given."""
        if self.inputs is not None:
            inputs = torch.cat([self.inputs, inputs], 1)
        if position_ids is not None and self.position_ids is not None:
            position_ids = torch.cat([self.position_ids, position_ids], 1)

        self.inputs, self.position_ids = inputs, position_ids

    def crop(self, num_slots: int) -> None:
        """Forgets the last slots; their number is given as a negative one, as to the library's."""
        self.inputs = self.inputs[:, :num_slots]
        if self.position_ids is not None:
            self.position_ids = self.position_ids[:, :num_slots]


def run_decoder(
    decoder: PreTrainedModel,
    inputs: Tensor,
    cache: Cache | InputCache | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The decoder's output (B, n, w) of inputs (B, n, w), behind the slots that the cache holds.

    Args:
        decoder: The decoder of a flow.
        inputs: The slots' inputs.
        cache: That of the slots before; these here are added.
        position_ids: The place (B, n) of each slot, if that is not its number.

    Raises:
        ValueError: If flash attention is asked for place numbers in a batch of one.
    """
    if isinstance(cache, InputCache):
        cache.add(inputs, position_ids)
        output = run_decoder(decoder, cache.inputs, None, cache.position_ids)
        return output[:, -inputs.shape[1] :]

    options = {}
    if cache is not None:
        options[decoder.cache_argument] = cache

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


class InputEmbedding(nn.Module):
    """The inputs (B, n, w) of a flow's decoder on their way to it.

    Hooks of the library on a model's token embeddings act here: NEFTune's noise falls on what
    is read, and not on the latents that are scored.

    References:
        Jain et al., *NEFTune: Noisy Embeddings Improve Instruction Finetuning*, ICLR 2024,
        arXiv:2310.05914.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codebook: list[nn.Module] = []  # in a list, and so no part of this module

    @property
    def weight(self) -> nn.Parameter:
        """The codebook's means, (V, d), by the name of a token table's weight."""
        return self.codebook[0].weight

    def __getattr__(self, name: str):
        if name == "in_features":  # PEFT's trainable tokens read it
            raise AttributeError(f"{NO_TABLE} Train all weights, or take LoRA of linear maps.")

        return super().__getattr__(name)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


class FlowDecoder(nn.Module):
    """The part of a flow that reads positions: position n is predicted from those before it.

    The decoder reads either a projection of the latents, or, in the flow next to the data, an
    embedding averaged under p(token | latent). A start vector stands before the first position: a
    learned one, or the embedding of the config's `start_token_id`.

    In a conditional model some positions are observed: they are no variables of the flow, but
    context. The decoder reads them first, then passes the missing positions in the flow's
    direction; position ids say where each of them is. So plain causal attention lets a
    missing position see every observed one.
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

        self.input_embedding = InputEmbedding()
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
        if torch.compiler.is_exporting():
            # A slice of N - 1 positions would fix that N is above 2.
            slots = torch.arange(last, device=h.device).unsqueeze(-1)  # (N, 1)
            before = self._embed(h, codebook).index_select(1, (slots - 1).clamp(min=0).squeeze(-1))
            inputs = torch.where(slots == 0, start, before)
        else:
            parts = [start.expand(h.shape[0], 1, -1)] if first == 0 else []
            if last > max(first, 1):
                is_whole = first == 0 and last == h.shape[1]
                # All positions where the coupling reads them, too: it then finds what is near them.
                before = h if is_whole else h[:, max(first - 1, 0) : last - 1]
                parts.append(self._embed(before, codebook)[:, : last - max(first, 1)])

            inputs = torch.cat(parts, 1)

        inputs = self.input_embedding(inputs)
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
