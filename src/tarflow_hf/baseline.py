"""The discrete baseline: the library's own causal model, as deep and wide as the flows."""

import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from .modeling.configuration_tarflowlm import TarFlowLMConfig
from .modeling.modeling_tarflowlm import TarFlowLMModel


def discrete_baseline(config: TarFlowLMConfig) -> PreTrainedModel:
    """The library's own causal model with the flows' block config, as deep as the whole stack.

    Its vocabulary has one entry more, the beginning-of-sequence token that stands before the first
    one (and that the flows' start vectors correspond to), so that both models score the same
    tokens.
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


def prepend_start(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Ids (B, T) behind the discrete model's beginning-of-sequence token, (B, T + 1)."""
    return F.pad(input_ids, (1, 0), value=model.config.bos_token_id)


def longest_sequence(model: PreTrainedModel) -> int:
    """In tokens; a discrete model spends one position on its beginning-of-sequence token."""
    return model.config.max_position_embeddings - (not isinstance(model, TarFlowLMModel))
