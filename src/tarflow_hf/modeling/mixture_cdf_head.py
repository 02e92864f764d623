"""Mix-1: every dimension goes through the distribution function of a mixture of its own.

Two heads give the parameters. `MixtureCDFHead` takes those of all dimensions from the decoder's
output; in `AutoregressiveMixtureCDFHead` they see the dimensions before it, too.

Shapes: B batch, N positions of size D = P d, w hidden size, K mixture components, H hidden units
and E features of a dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .codebook import Gaussians
from .coupling import (
    autoregressive_mixture_cdf_inverse,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_cdf_log_prob,
)
from .coupling_head import MAX_LOG_SCALE, CouplingHead, at_least_one, bounded, true_or_false
from .coupling_torch import AutoregressiveNetwork, autoregressive_mixture_parameters


class MixtureCDFHead(CouplingHead):
    """Mix-1. The parameters of all D dimensions are a linear map of the decoder's output."""

    title = "Mix-1 (mixture CDF)"
    options = {"num_components": 8, "autoregressive": True, "head_hidden_size": 128}
    is_smooth = True

    @classmethod
    def make(cls, config: PreTrainedConfig, flow: dict[str, Any]) -> CouplingHead:
        head = AutoregressiveMixtureCDFHead if flow["autoregressive"] else MixtureCDFHead
        return head(config, flow)

    def __init__(self, config: PreTrainedConfig, flow: dict[str, Any]):
        super().__init__()
        self.size = config.patch_size * config.latent_size
        self.num_components = flow["num_components"]
        num_parameters = self.size * 3 * self.num_components
        self.weight = nn.Parameter(torch.empty(num_parameters, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(num_parameters))

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        init.copy_(self.bias, _near_identity(self.num_components).flatten().repeat(self.size))

    def start_as_identity(self) -> None:
        init.zeros_(self.weight)

    def transform(self, h: Tensor, context: Tensor, codebook: Gaussians | None):
        u, log_det = mixture_cdf(h, *self._mixture(context))
        return u, log_det.sum(-1)

    def inverse(self, u: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        return mixture_cdf_inverse(u, *self._mixture(context))

    def log_prob(self, h: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        return mixture_cdf_log_prob(h, *self._mixture(context)).sum(-1)

    def _mixture(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and log scales, each (B, N, D, K)."""
        output = F.linear(context, self.weight, self.bias)
        logits, loc, log_scale = output.unflatten(-1, (self.size, 3, -1)).unbind(-2)
        return logits, loc, bounded(log_scale)

    @classmethod
    def complete(cls, flow: dict[str, Any], index: int, config: PreTrainedConfig) -> None:
        super().complete(flow, index, config)
        where = f"flows[{index}]"
        width = at_least_one(f"{where}.head_hidden_size", flow["head_hidden_size"])
        if width < 2:
            raise ValueError(f"{where}.head_hidden_size must be at least 2, not {width}.")

        at_least_one(f"{where}.num_components", flow["num_components"])
        true_or_false(f"{where}.autoregressive", flow["autoregressive"])

    @classmethod
    def paper_flops(
        cls, flow: dict[str, Any], width: int, latent_size: int, patch_size: int
    ) -> int:
        """As the paper counts: with masked matrices as if they were dense.

        With c = P d inputs, E features of each, H / 2 hidden units and o = 3K outputs for each, an
        autoregressive head needs `6E (c - 1)^2 + Hc (w + E (c - 1)) + H c^2 o`.
        """
        size, outputs = patch_size * latent_size, 3 * flow["num_components"]
        if not flow["autoregressive"]:
            return 2 * width * size * outputs

        hidden = flow["head_hidden_size"]
        features = _num_features(hidden, size)
        from_inputs = 6 * features * (size - 1) ** 2
        from_context = hidden * size * (width + features * (size - 1))

        return from_inputs + from_context + hidden * size**2 * outputs


class AutoregressiveMixtureCDFHead(CouplingHead):
    """Mix-1, dimension-wise autoregressive.

    The parameters of dimension i follow from the decoder's output and from the dimensions before i,
    through a hidden layer of its own ([`AutoregressiveNetwork`], in float32 or better).
    """

    title = MixtureCDFHead.title
    is_smooth = True

    def __init__(self, config: PreTrainedConfig, flow: dict[str, Any]):
        super().__init__()
        self.size = config.patch_size * config.latent_size
        self.num_components = flow["num_components"]
        hidden = flow["head_hidden_size"] // 2
        features = _num_features(flow["head_hidden_size"], self.size)
        num_pairs = self.size * (self.size - 1) // 2

        self.from_context = nn.Linear(config.hidden_size, self.size * hidden)
        self.features_weight = nn.Parameter(torch.empty(self.size - 1, features, 3))
        self.features_bias = nn.Parameter(torch.empty(self.size - 1, features))
        self.from_features = nn.Parameter(torch.empty(hidden, features * num_pairs))
        self.output_weight = nn.Parameter(torch.empty(self.size, 3 * self.num_components, hidden))
        self.output_bias = nn.Parameter(torch.empty(self.size, 3 * self.num_components))

    def init_weights(self, std: float) -> None:
        """Starts the last layer small, near the identity; the others at unit gain, to learn fast."""
        average_inputs = max(1, self.from_features.shape[1] / self.size)  # from dimensions before
        init.normal_(self.from_context.weight, std=self.from_context.in_features**-0.5)
        init.normal_(self.features_weight, std=3**-0.5)
        init.normal_(self.from_features, std=average_inputs**-0.5)
        init.normal_(self.output_weight, std=std)
        init.zeros_(self.features_bias)
        bias = _near_identity(self.num_components).flatten().repeat(self.size, 1)
        init.copy_(self.output_bias, bias)

    def start_as_identity(self) -> None:
        init.zeros_(self.output_weight)

    def transform(self, h: Tensor, context: Tensor, codebook: Gaussians | None):
        from_context, network = self._network(context)
        with torch.autocast(h.device.type, enabled=False):
            u, log_det = mixture_cdf(h, *self._mixture(h, from_context, network))

        return u, log_det.sum(-1)

    def inverse(self, u: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        return autoregressive_mixture_cdf_inverse(u, *self._network(context))

    def log_prob(self, h: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        from_context, network = self._network(context)
        with torch.autocast(h.device.type, enabled=False):
            parameters = self._mixture(h, from_context, network)
            return mixture_cdf_log_prob(h, *parameters).sum(-1)

    def _network(self, context: Tensor) -> tuple[Tensor, AutoregressiveNetwork]:
        """The context's share of the hidden units (B, N, D, H), and the network's weights."""
        from_context = self.from_context(context).unflatten(-1, (self.size, -1))
        dtype = torch.promote_types(from_context.dtype, torch.float32)
        weights = [getattr(self, name).to(dtype) for name in AutoregressiveNetwork._fields[:-1]]
        return from_context, AutoregressiveNetwork._make([*weights, MAX_LOG_SCALE])

    def _mixture(
        self, h: Tensor, from_context: Tensor, network: AutoregressiveNetwork
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and log scales, each (B, N, D, K)."""
        from_context = from_context.to(network.output_bias.dtype)
        return autoregressive_mixture_parameters(h, from_context, network)


def _num_features(head_hidden_size: int, size: int) -> int:
    """E of the paper: nine sixteenths of the hidden size, shared out among the dimensions before."""
    return min(max(1, head_hidden_size * 9 // 16 // max(1, size - 1)), 96)


def _near_identity(num_components: int) -> Tensor:
    """Biases (3, K) of logits, locations and log scales.

    The locations spread over half a standard deviation, and the scales make the variance 1.
    Components that start alike would stay alike for ever.
    """
    k = num_components
    loc = 0.5 * torch.special.ndtri((torch.arange(k, dtype=torch.float32) + 0.5) / k)
    log_scale = 0.5 * torch.log(1 - loc.square().mean())
    return torch.stack([torch.zeros(k), loc, log_scale.expand(k)])
