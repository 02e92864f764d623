"""Coupling heads: from the decoder's output at a position to the coupling of that position.

Each is built from the configuration and its flow's entry, and maps h (B, N, D) and context (B, N,
w), by `task`, to

    "transform":  u (B, N, D) and log_det (B, N);   "log_prob":  log p(h | context) (B, N);   "inverse":  h, of u.

The inverse of a mixture Rosenblatt coupling may be steered, by a `logits_processor` from logits (n,
K) to logits. A new coupling is a function pair in `coupling.py`, a head here, and a line in
`COUPLING_HEADS`.

Shapes: B batch, N positions of size D = P d, w hidden size, K mixture components.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from .codebook import Codebook, Gaussians
from .configuration_tarflowlm import TarFlowLMConfig
from .coupling import (
    affine,
    affine_inverse,
    autoregressive_mixture_cdf_inverse,
    linear_mixture_rosenblatt,
    linear_mixture_rosenblatt_inverse,
    linear_mixture_rosenblatt_log_prob,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_cdf_log_prob,
    mixture_rosenblatt_inverse,
)
from .coupling_torch import AutoregressiveNetwork, autoregressive_mixture_parameters
from .normal import normal_log_prob


def make_decoder(config: TarFlowLMConfig, num_hidden_layers: int) -> PreTrainedModel:
    """The block config's causal decoder, which is fed embeddings: it gets the smallest token table,
    and loses that.
    """
    no_tokens = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    decoder_config = config.decoder_config(num_hidden_layers, **no_tokens)
    decoder_config._attn_implementation = config._attn_implementation
    decoder = AutoModel.from_config(decoder_config)
    decoder.set_input_embeddings(None)

    return decoder


MAX_LOG_SCALE = 10.0
LogitsProcessor = Callable[[Tensor], Tensor]


def _bounded(log_scale: Tensor) -> Tensor:
    """Predicted log scales within the range for which the couplings promise finite results; the
    identity around 0.
    """
    log_scale = log_scale.to(torch.promote_types(log_scale.dtype, torch.float32))
    return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)


class AffineHead(nn.Module):
    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, 2 * config.patch_size * config.latent_size)

    def forward(
        self, h: Tensor, context: Tensor, codebook: Gaussians | None = None, task: str = "transform"
    ):
        loc, log_scale = self.projection(context).chunk(2, -1)
        log_scale = _bounded(log_scale)
        if task == "inverse":
            return affine_inverse(h, loc, log_scale)

        u, log_det = affine(h, loc, log_scale)
        if task == "log_prob":
            return (log_det + normal_log_prob(u)).sum(-1)

        return u, log_det.sum(-1)


def _near_identity(num_components: int) -> Tensor:
    """Biases (3, K) of logits, locations and log scales: locations spread over half a standard
    deviation, scales that make the variance 1. Components that start alike would stay alike for
    ever.
    """
    k = num_components
    loc = 0.5 * torch.special.ndtri((torch.arange(k, dtype=torch.float32) + 0.5) / k)
    log_scale = 0.5 * torch.log(1 - loc.square().mean())
    return torch.stack([torch.zeros(k), loc, log_scale.expand(k)])


class MixtureCDFHead(nn.Linear):
    """Mix-1. The parameters of all D dimensions come from the context alone."""

    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        size, num_components = config.patch_size * config.latent_size, flow["num_components"]
        super().__init__(config.hidden_size, size * 3 * num_components)
        self.size, self.num_components = size, num_components

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        init.copy_(self.bias, _near_identity(self.num_components).flatten().repeat(self.size))

    def forward(
        self, h: Tensor, context: Tensor, codebook: Gaussians | None = None, task: str = "transform"
    ):
        logits, loc, log_scale = (
            super().forward(context).unflatten(-1, (self.size, 3, -1)).unbind(-2)
        )
        parameters = logits, loc, _bounded(log_scale)

        return (
            mixture_cdf_inverse(h, *parameters)
            if task == "inverse"
            else _mixture_cdf(h, parameters, task)
        )


def _mixture_cdf(h: Tensor, parameters: tuple[Tensor, ...], task: str):
    if task == "log_prob":
        return mixture_cdf_log_prob(h, *parameters).sum(-1)
    u, log_det = mixture_cdf(h, *parameters)
    return u, log_det.sum(-1)


class AutoregressiveMixtureCDFHead(nn.Module):
    """Mix-1, dimension-wise autoregressive: the parameters of dimension i come from the context and
    from the dimensions before it, through a hidden layer of its own ([`AutoregressiveNetwork`], in
    float32 or better).
    """

    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        super().__init__()
        self.size = config.patch_size * config.latent_size
        self.num_components = flow["num_components"]
        width = flow["head_hidden_size"]
        hidden = width // 2
        features = min(max(1, width * 9 // 16 // max(1, self.size - 1)), 96)
        self.from_context = nn.Linear(config.hidden_size, self.size * hidden)
        self.features_weight = nn.Parameter(torch.empty(self.size - 1, features, 3))
        self.features_bias = nn.Parameter(torch.empty(self.size - 1, features))
        self.from_features = nn.Parameter(
            torch.empty(hidden, features * (self.size * (self.size - 1) // 2))
        )
        self.output_weight = nn.Parameter(torch.empty(self.size, 3 * self.num_components, hidden))
        self.output_bias = nn.Parameter(torch.empty(self.size, 3 * self.num_components))

    def init_weights(self, std: float) -> None:
        """The last layer begins small, near the identity; those before it at unit gain, for small
        ones learn slowly.
        """
        average_inputs = max(
            1, self.from_features.shape[1] / self.size
        )  # of a dimension, from those before
        init.normal_(self.from_context.weight, std=self.from_context.in_features**-0.5)
        init.normal_(self.features_weight, std=3**-0.5)
        init.normal_(self.from_features, std=average_inputs**-0.5)
        init.normal_(self.output_weight, std=std)
        init.zeros_(self.features_bias)
        init.copy_(
            self.output_bias, _near_identity(self.num_components).flatten().repeat(self.size, 1)
        )

    def forward(
        self, h: Tensor, context: Tensor, codebook: Gaussians | None = None, task: str = "transform"
    ):
        from_context = self.from_context(context).unflatten(-1, (self.size, -1))  # (B, N, D, H)
        dtype = torch.promote_types(from_context.dtype, torch.float32)
        weights = [getattr(self, name).to(dtype) for name in AutoregressiveNetwork._fields[:-1]]
        network = AutoregressiveNetwork._make([*weights, MAX_LOG_SCALE])
        if task == "inverse":
            return autoregressive_mixture_cdf_inverse(h, from_context, network)

        with torch.autocast(h.device.type, enabled=False):
            return _mixture_cdf(
                h, autoregressive_mixture_parameters(h, from_context.to(dtype), network), task
            )


def mixture_cdf_head(config: TarFlowLMConfig, flow: dict[str, Any]) -> nn.Module:
    return (AutoregressiveMixtureCDFHead if flow["autoregressive"] else MixtureCDFHead)(
        config, flow
    )


class PatchDecoder(nn.Module):
    """A light causal decoder over the P tokens of a patch, on top of the flow's own, which runs
    once a patch.

    Its output at token p has read the patch's context, through a projection for each of the P
    places, and the latents of the tokens before p in the patch. The projections bring contexts to
    the size of the embeddings they meet.

    Reference: Yu et al., *MegaByte: Predicting Million-byte Sequences with Multiscale
    Transformers*, NeurIPS 2023, arXiv:2305.07185, whose local model this is.
    """

    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        super().__init__()
        self.decoder = make_decoder(config, flow["patch_head_layers"])
        self.context_projection = nn.Linear(
            config.hidden_size, config.patch_size * config.hidden_size, bias=False
        )
        self.start = nn.Parameter(torch.empty(config.hidden_size))

        if flow["context"] == "posterior":
            self.posterior_top_k = config.posterior_top_k
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        else:
            self.embedding = None
            self.projection = nn.Linear(config.latent_size, config.hidden_size)

    def forward(self, tokens: Tensor, context: Tensor, codebook: Gaussians) -> Tensor:
        """The first n tokens of patches (B, n, d), of context (B, w), to the contexts (B, n + 1, w)
        up to the next.
        """
        if self.embedding is None:
            tokens = self.projection(tokens.to(self.start.dtype))
        else:
            tokens = codebook.posterior_average(
                tokens.unsqueeze(-2), self.embedding, self.posterior_top_k
            )

        start = self.start.expand(len(context), 1, -1)
        inputs = torch.cat([start, tokens.to(start.dtype)], 1)
        contexts = self.context_projection(context).unflatten(
            -1, (-1, context.shape[-1])
        )  # (B, P, w)
        inputs = contexts[:, : inputs.shape[1]] + inputs

        return self.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state


class MixtureRosenblattHead(nn.Module):
    """Mix-d. The context gives each of the P tokens of a position its mixture weights over a
    codebook: the encoder's (tied), or one of the flow's own. Given the context the tokens are
    independent; with a `PatchDecoder` (the flow's `patch_head_layers`) each token's weights also
    see the latents before it in its patch.
    """

    max_logits = (
        2**25
    )  # at once: those of a large vocabulary are made, used and remade in the backward pass

    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_components = flow["num_components"]
        self.patch_decoder = PatchDecoder(config, flow) if flow.get("patch_head_layers") else None
        num_mixtures = config.patch_size if self.patch_decoder is None else 1
        self.projection = MixtureLogits(config.hidden_size, num_mixtures, self.num_components)
        self.codebook = (
            None if flow["tie_codebook"] else Codebook(self.num_components, config.latent_size)
        )

    def forward(
        self,
        h: Tensor,
        context: Tensor,
        codebook: Gaussians | None = None,
        task: str = "transform",
        logits_processor: LogitsProcessor | None = None,
    ):
        components = codebook if self.codebook is None else self.codebook()
        tokens = h.unflatten(-1, (self.patch_size, -1)).flatten(0, 1)  # (B N, P, d)
        context = context.flatten(0, 1)  # (B N, w)

        if self.patch_decoder is None:
            output = self._couple(task, tokens, context, components, logits_processor)
        elif task == "inverse":
            output = tokens[:, :0]
            for p in range(self.patch_size):
                token_context = self.patch_decoder(output, context, codebook)[:, -1:]
                token = self._couple(
                    task, tokens[:, p : p + 1], token_context, components, logits_processor
                )
                output = torch.cat([output, token], 1)
        else:
            output = self._couple(
                task, tokens, self.patch_decoder(tokens[:, :-1], context, codebook), components
            )

        if task == "transform":
            u, log_det = output
            return u.reshape(h.shape), log_det.sum(-1).reshape(h.shape[:-1])

        return (
            output.sum(-1).reshape(h.shape[:-1]) if task == "log_prob" else output.reshape(h.shape)
        )

    def _couple(
        self,
        task: str,
        tokens: Tensor,
        context: Tensor,
        components: Gaussians,
        logits_processor: LogitsProcessor | None = None,
    ):
        """The coupling of tokens (n, p, d), whose weights follow from contexts (n, p, w) or, in
        common, (n, w).
        """
        weights = self.projection()
        is_common = context.ndim < tokens.ndim

        num_logits = tokens.shape[:2].numel() * self.num_components
        if task == "inverse" and (num_logits <= self.max_logits or logits_processor is not None):
            if is_common:
                logits = torch.stack(
                    [F.linear(context, *weights[p]) for p in range(self.patch_size)], 1
                )
            else:
                logits = F.linear(context, *weights[0])

            if logits_processor is not None:
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                logits = logits_processor(logits.flatten(0, -2)).reshape(logits.shape)

            return mixture_rosenblatt_inverse(tokens, logits, *components)

        op = {
            "transform": linear_mixture_rosenblatt,
            "log_prob": linear_mixture_rosenblatt_log_prob,
            "inverse": linear_mixture_rosenblatt_inverse,
        }[task]

        def run(tokens: Tensor, context: Tensor, weights: tuple[Tensor, Tensor]):
            return op(tokens, context, *weights, *components, max_logits=self.max_logits)

        if not is_common:
            return run(tokens, context, weights[0])

        outputs = [run(tokens[:, p], context, weights[p]) for p in range(self.patch_size)]
        if task == "transform":
            return tuple(torch.stack(x, 1) for x in zip(*outputs, strict=True))

        return torch.stack(outputs, 1)


class MixtureLogits(nn.Module):
    """The linear maps from a hidden state to the logits of several mixtures, as [(weight (K, w),
    bias (K,)), ...].

    The couplings multiply by them piece by piece. They are read by calling the module, as those of
    a `Codebook`.
    """

    def __init__(self, hidden_size: int, num_mixtures: int, num_components: int):
        super().__init__()
        self.num_components = num_components
        self.weight = nn.Parameter(torch.empty(num_mixtures * num_components, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_mixtures * num_components))

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        return list(
            zip(*(x.split(self.num_components) for x in (self.weight, self.bias)), strict=True)
        )


COUPLING_HEADS = {
    "affine": AffineHead,
    "mixture_cdf": mixture_cdf_head,
    "mixture_rosenblatt": MixtureRosenblattHead,
}
