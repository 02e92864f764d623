"""The library's causal decoders, as the flows use them: fed embeddings, with a cache or without."""

from torch import Tensor
from transformers import AutoModel, Cache, PreTrainedConfig, PreTrainedModel, __version__

# The name of a decoder's argument that holds its cache: `past_key_values` until transformers 5.24.
CACHE_ARGUMENT = (
    "cache" if tuple(map(int, __version__.split(".")[:2])) >= (5, 24) else "past_key_values"
)


def make_decoder(config: PreTrainedConfig, num_hidden_layers: int) -> PreTrainedModel:
    """Returns the block config's causal decoder at some depth, without a token table.

    The library builds none without a table: it gets the smallest one, and loses that.
    """
    no_tokens = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    decoder_config = config.decoder_config(num_hidden_layers, **no_tokens)
    decoder_config._attn_implementation = config._attn_implementation
    decoder = AutoModel.from_config(decoder_config)
    decoder.set_input_embeddings(None)

    return decoder


def run_decoder(
    decoder: PreTrainedModel, inputs: Tensor, cache: Cache | None = None, **options: Tensor
) -> Tensor:
    """The decoder's output (B, n, w) of inputs (B, n, w), behind the slots that the cache holds."""
    if cache is not None:
        options[CACHE_ARGUMENT] = cache

    return decoder(inputs_embeds=inputs, use_cache=cache is not None, **options).last_hidden_state
