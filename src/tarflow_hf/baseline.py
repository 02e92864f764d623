"""The discrete baseline, a causal model of the library, and what it has in common with a TarFlowLM.

Training, evaluation and cost take either model. They ask here for what differs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .modeling.configuration_tarflowlm import TarFlowLMConfig
from .modeling.modeling_tarflowlm import TarFlowLMModel
from .noise import seed_of


def discrete_baseline(config: TarFlowLMConfig) -> PreTrainedModel:
    """The library's own causal model with the flows' block config, as deep as the whole stack.

    Its vocabulary has one entry more: the beginning-of-sequence token. It stands before the first
    token, as the flows' start vectors do, so that both models score the same tokens.
    """
    baseline_config = config.decoder_config(
        config.num_hidden_layers,
        vocab_size=config.vocab_size + 1,
        max_position_embeddings=config.max_position_embeddings + 1,
        bos_token_id=config.vocab_size,
        eos_token_id=None,
        pad_token_id=None,
    )

    return AutoModelForCausalLM.from_config(baseline_config)


# --------------------------------------------------------------------------------------------------
# Either model
# --------------------------------------------------------------------------------------------------


def is_discrete(model: PreTrainedModel) -> bool:
    """True of a causal model of the library, False of a TarFlowLM."""
    return not isinstance(model, TarFlowLMModel)


def flows_of(model: PreTrainedModel) -> list[nn.Module]:
    """The flows, from the latents to the noise; a discrete model has none."""
    return [] if is_discrete(model) else list(model.flow.layers)


def patch_size_of(model: PreTrainedModel) -> int:
    """The number of tokens in a patch; 1 for a discrete model."""
    return 1 if is_discrete(model) else model.config.patch_size


def longest_sequence(model: PreTrainedModel) -> int:
    """The number of tokens in the longest sequence that a model takes.

    A discrete model spends one position on its beginning-of-sequence token.
    """
    longest = model.config.max_position_embeddings
    return longest - 1 if is_discrete(model) else longest


def text_vocab_size(model: PreTrainedModel) -> int:
    """The number of tokens that a text can have; a discrete model has its first one besides."""
    vocab_size = model.config.vocab_size
    return vocab_size - 1 if is_discrete(model) else vocab_size


# --------------------------------------------------------------------------------------------------
# The discrete model
# --------------------------------------------------------------------------------------------------


def prepend_start(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Ids (B, T) behind the discrete model's beginning-of-sequence token, (B, T + 1)."""
    return F.pad(input_ids, (1, 0), value=model.config.bos_token_id)


def negative_log_likelihood(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """-log p(x) of each sequence under a discrete model, exact: ids (B, T) to nats (B,).

    All T tokens count, the first one too.
    """
    inputs = prepend_start(model, input_ids)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]  # (B, T, V)
    return F.cross_entropy(logits.float().transpose(1, 2), input_ids, reduction="none").sum(-1)


@torch.no_grad()
def sample_discrete(
    model: PreTrainedModel, num_samples: int, length: int, seed: tuple[int, ...], **options: Any
) -> Tensor:
    """Samples (B, T) of a discrete model, B = `num_samples`, T = `length`.

    No token ends a sample, and the beginning-of-sequence token is not part of one.

    Args:
        seed: The words of `seed_of`. All samples are drawn together from it.
        options: Options of the library's `generate`.
    """
    start = torch.full((num_samples, 1), model.config.bos_token_id, device=model.device)
    defaults = {"do_sample": True, "top_k": 0, "max_new_tokens": length}
    common = {
        "eos_token_id": None,
        "pad_token_id": 0,
        "suppress_tokens": [model.config.bos_token_id],
    }

    with torch.random.fork_rng():  # the library takes no generator
        torch.manual_seed(seed_of(*seed))
        return model.generate(start, **{**defaults, **common, **options})[:, 1:]
