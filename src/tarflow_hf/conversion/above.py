"""A flow above the last one of a model."""

from typing import Any

import torch
from torch import nn

from ..modeling.codebook import Codebook
from ..modeling.modeling_tarflowlm import FlowLayer, TarFlowLMModel


@torch.no_grad()
def append_flow(model: TarFlowLMModel, flow: dict[str, Any]) -> TarFlowLMModel:
    """Puts another flow above the last one, in place, and returns the model.

    The model stays what it was: `num_flows` cuts the new flow off again. An affine flow begins as the
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
        >>> from tarflow_hf.conversion import from_causal_lm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> source = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1))
        >>> model = from_causal_lm(source.eval(), latent_size=8)
        >>> flow = {"coupling": "mixture_cdf", "direction": "right_to_left", "num_hidden_layers": 1}
        >>> len(append_flow(model, flow).flow.layers)
        2
    """
    config = model.config
    layers = model.flow.layers
    config.flows = [*config.flows, flow]
    layer = FlowLayer(config, len(layers))
    for part in model.modules():
        part._is_hf_initialized = True  # only the new ones are not

    layers.append(layer)
    model.initialize_weights()
    layer.head.start_as_identity()
    _cast_weights(layer.to(model.device), model.dtype)
    layer.train(model.training)
    if config.conditional:
        observed = layers[0].observed_embedding.state_dict()
        layer.observed_embedding.load_state_dict(observed)

    model.check_decoders()
    return model


def _cast_weights(layer: nn.Module, dtype: torch.dtype) -> None:
    """Casts a layer's weights as loading in this dtype does.

    A codebook stays in float32 at least, and so do buffers: the frequencies of rotary embeddings.
    """
    for part in layer.modules():
        is_codebook = isinstance(part, Codebook)
        own = torch.promote_types(dtype, torch.float32) if is_codebook else dtype
        for weight in part.parameters(recurse=False):
            weight.data = weight.data.to(own)
