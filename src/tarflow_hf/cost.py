"""FLOPs of a model, the peak speeds of devices, and memory."""

import sys

import torch
from torch import nn
from transformers import PreTrainedModel

from .baseline import flows_of

# Dense FLOPs a second in bf16 or fp16 with float32 sums, by the makers' data sheets; the first name
# that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
}


def forward_flops(model: PreTrainedModel, num_tokens: int) -> list[int]:
    """FLOPs of each flow's matrix products, for one sequence of `num_tokens` tokens.

    A discrete model counts as one flow.

    A multiply-add is two. Attention counts both its products over all pairs, though a causal one
    needs half of them, as is customary. Norms, activations, look-ups and the arithmetic of the
    couplings themselves are not counted, nor is what tells a conditional model the observed tokens.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=10, hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1))
        >>> weights = 4 * 8 * 8 + 3 * 8 * 16 + 10 * 8
        >>> forward_flops(model, 5) == [2 * 5 * weights + 4 * 8 * 5**2]
        True
    """
    flows = flows_of(model)
    if not flows:
        return [2 * num_tokens * _weights(model) + _attention(model.config, num_tokens)]

    patch_size = model.config.patch_size
    positions = num_tokens // model.config.patch_size
    flops = []

    for layer in flows:
        total = 2 * positions * _weights(layer) + _attention(layer.decoder.config, positions)
        if layer.embedding is not None:
            top_k = layer.posterior_top_k or model.config.vocab_size
            total += 2 * num_tokens * min(top_k, model.config.vocab_size) * model.config.hidden_size

        inner = getattr(layer.head, "patch_decoder", None)
        if inner is not None:  # it and the logits run for each token of a patch
            of_tokens = (
                _weights(inner)
                - _weights(inner.context_projection)
                + _weights(layer.head.projection)
            )
            total += 2 * (num_tokens - positions) * of_tokens + positions * _attention(
                inner.decoder.config, patch_size
            )

        flops.append(total)

    return flops


def training_flops(model: PreTrainedModel, num_tokens: int, num_flows: int | None = None) -> int:
    """FLOPs of a training step for one sequence.

    The backward pass has twice as many as the forward pass, in the flows that are trained.

    Recomputed activations do not count: this is what the model needs, not what the machine does.
    """
    total = 0
    parts = flows_of(model)[:num_flows] or [model]

    for part, flops in zip(parts, forward_flops(model, num_tokens), strict=False):
        is_trained = any(parameter.requires_grad for parameter in part.parameters())
        total += (3 if is_trained else 1) * flops

    return total


def _weights(module: nn.Module) -> int:
    """Entries of the matrices that a position is multiplied by.

    Tables, codebooks and stacked biases do not count.

    A matrix counts where it is used, though two modules share it: an output head tied to a token
    table is a product.
    """
    total = 0
    tables = ("embedding", "codebook", "bias")
    for path, part in module.named_modules():
        if not isinstance(part, nn.Embedding):
            names = ((f"{path}.{name}", p) for name, p in part.named_parameters(recurse=False))
            total += sum(
                p.numel()
                for name, p in names
                if p.ndim >= 2 and not any(table in name for table in tables)
            )

    return total


def _attention(config, num_positions: int) -> int:
    """FLOPs of queries by keys and weights by values; 0 for a decoder that has no attention."""
    num_heads = getattr(config, "num_attention_heads", None) or 0
    if num_heads == 0:
        return 0

    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return 4 * config.num_hidden_layers * num_heads * head_size * num_positions**2


def peak_flops(device: torch.device, mixed_precision: str | None) -> float | None:
    """The device's peak in 16-bit floats; None where it is not known, or another precision is used."""
    if device.type != "cuda" or mixed_precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: allocated on a GPU, resident of a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    import resource  # not on Windows

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
