"""Mix-d: a position's tokens go through the Rosenblatt transform of a mixture over a codebook.

Shapes: B batch, N positions of P tokens of size d, w hidden size, K mixture components.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .codebook import Codebook, Gaussians
from .coupling import (
    linear_mixture_rosenblatt,
    linear_mixture_rosenblatt_inverse,
    linear_mixture_rosenblatt_log_prob,
    mixture_rosenblatt,
    mixture_rosenblatt_inverse,
)
from .coupling_head import (
    CouplingHead,
    LogitsProcessor,
    at_least_float32,
    at_least_one,
    true_or_false,
)
from .coupling_linear import with_linear_logits
from .decoder_tarflowlm import make_decoder, run_decoder


class MixtureRosenblattHead(CouplingHead):
    """Mix-d. The context gives each of the P tokens of a position its mixture weights.

    The codebook is the encoder's (tied), or one of the flow's own. Given the context the tokens are
    independent. With a `PatchDecoder` (the flow's `patch_head_layers`) each token's weights also
    see the latents before it in its patch.
    """

    title = "Mix-d (Rosenblatt)"
    options = {
        "num_components": None,
        "tie_codebook": None,
        "patch_head_layers": None,
        "projection_bias": None,
    }
    takes_logits_processor = True

    # At once: those of a large vocabulary are made, used, and made again in the backward pass.
    max_logits = 2**26

    def __init__(self, config: PreTrainedConfig, flow: dict[str, Any]):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_components = flow["num_components"]
        self.patch_decoder = PatchDecoder(config, flow) if flow.get("patch_head_layers") else None
        num_mixtures = config.patch_size if self.patch_decoder is None else 1
        has_bias = flow.get("projection_bias", True)
        sizes = config.hidden_size, num_mixtures, self.num_components
        self.projection = MixtureLogits(*sizes, has_bias)
        self.codebook = None

        if not flow["tie_codebook"]:
            self.codebook = Codebook(self.num_components, config.latent_size)

    def transform(
        self,
        h: Tensor,
        context: Tensor,
        codebook: Gaussians | None,
        logits_processor: LogitsProcessor | None = None,
    ) -> tuple[Tensor, Tensor]:
        op = linear_mixture_rosenblatt
        if logits_processor is not None:
            op = partial(_processed_mixture_rosenblatt, logits_processor)

        u, log_det = self._couple(op, h, context, codebook)
        return u.reshape(h.shape), log_det.sum(-1).reshape(h.shape[:-1])

    def log_prob(self, h: Tensor, context: Tensor, codebook: Gaussians | None) -> Tensor:
        log_prob = self._couple(linear_mixture_rosenblatt_log_prob, h, context, codebook)
        return log_prob.sum(-1).reshape(h.shape[:-1])

    def inverse(
        self,
        u: Tensor,
        context: Tensor,
        codebook: Gaussians | None,
        logits_processor: LogitsProcessor | None = None,
    ) -> Tensor:
        components = codebook if self.codebook is None else self.codebook()
        tokens = u.unflatten(-1, (self.patch_size, -1)).flatten(0, 1)  # (B N, P, d)
        context = context.flatten(0, 1)  # (B N, w)
        if self.patch_decoder is None:
            return self._invert(tokens, context, components, logits_processor).reshape(u.shape)

        found = tokens[:, :0]
        for p in range(self.patch_size):
            token_context = self.patch_decoder(found, context, codebook)[:, -1:]
            token = self._invert(tokens[:, p : p + 1], token_context, components, logits_processor)
            found = torch.cat([found, token], 1)

        return found.reshape(u.shape)

    def _couple(self, op, h: Tensor, context: Tensor, codebook: Gaussians | None):
        """The op on tokens (B N, P, d), all of which are there."""
        components = codebook if self.codebook is None else self.codebook()
        tokens = h.unflatten(-1, (self.patch_size, -1)).flatten(0, 1)
        context = context.flatten(0, 1)
        if self.patch_decoder is not None:
            context = self.patch_decoder(tokens[:, :-1], context, codebook)

        return self._run(op, tokens, context, components)

    def _invert(
        self,
        tokens: Tensor,
        context: Tensor,
        components: Gaussians,
        logits_processor: LogitsProcessor | None,
    ) -> Tensor:
        """The latents of noise (n, p, d), from contexts (n, p, w), or (n, w) common to the tokens.

        Logits that fit are made at once: a step of generation takes as few calls as can be.
        """
        num_logits = tokens.shape[:2].numel() * self.num_components
        if num_logits > self.max_logits and logits_processor is None:
            return self._run(linear_mixture_rosenblatt_inverse, tokens, context, components)

        weights = self.projection()
        if context.ndim < tokens.ndim:
            logits = [F.linear(context, *weights[p]) for p in range(self.patch_size)]
            logits = torch.stack(logits, 1)
        else:
            logits = F.linear(context, *weights[0])

        if logits_processor is not None:
            logits = at_least_float32(logits)
            logits = logits_processor(logits.flatten(0, -2)).reshape(logits.shape)

        return mixture_rosenblatt_inverse(tokens, logits, *components)

    def _run(self, op, tokens: Tensor, context: Tensor, components: Gaussians):
        """The op on tokens (n, p, d) with contexts (n, p, w), or (n, w) common to the tokens."""
        weights = self.projection()
        options = {"max_logits": self.max_logits}
        if context.ndim == tokens.ndim:
            return op(tokens, context, *weights[0], *components, **options)

        outputs = [
            op(tokens[:, p], context, *weights[p], *components, **options)
            for p in range(self.patch_size)
        ]
        if isinstance(outputs[0], tuple):
            return tuple(torch.stack(x, 1) for x in zip(*outputs, strict=True))

        return torch.stack(outputs, 1)

    @classmethod
    def complete(cls, flow: dict[str, Any], index: int, config: PreTrainedConfig) -> None:
        where = f"flows[{index}]"
        flow.setdefault("tie_codebook", index == 0)
        flow.setdefault("num_components", config.vocab_size)

        if true_or_false(f"{where}.tie_codebook", flow["tie_codebook"]):
            if index > 0:
                raise ValueError(
                    f"{where}.tie_codebook must be False: only the first flow's input lives in the codebook's space."
                )
            if flow["num_components"] != config.vocab_size:
                raise ValueError(
                    f"{where}.num_components must be vocab_size, {config.vocab_size}, with a tied codebook, "
                    f"not {flow['num_components']}: leave it out, or set tie_codebook to False."
                )

        at_least_one(f"{where}.num_components", flow["num_components"])
        true_or_false(f"{where}.projection_bias", flow.get("projection_bias", True))
        patch_head_layers = flow.get("patch_head_layers", 0)
        if patch_head_layers != 0:
            at_least_one(f"{where}.patch_head_layers", patch_head_layers)
            if config.patch_size == 1:
                raise ValueError(
                    f"{where}.patch_head_layers must be 0, not {patch_head_layers}: with patch_size 1 no token has "
                    "another before it in its patch."
                )

    @classmethod
    def paper_flops(
        cls, flow: dict[str, Any], width: int, latent_size: int, patch_size: int
    ) -> int:
        return 2 * width * patch_size * flow["num_components"]


def _processed_mixture_rosenblatt(
    logits_processor: LogitsProcessor,
    z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    max_logits: int,
) -> tuple[Tensor, Tensor]:
    """`linear_mixture_rosenblatt` of logits that are processed on the way."""

    def couple(z: Tensor, logits: Tensor, mean: Tensor, log_scale: Tensor):
        processed = logits_processor(at_least_float32(logits))
        return mixture_rosenblatt(z, processed, mean, log_scale)

    rows = z.flatten(0, -2), hidden.flatten(0, -2)
    u, log_det = with_linear_logits(couple, max_logits, *rows, weight, bias, mean, log_scale)
    return u.reshape(z.shape), log_det.reshape(z.shape[:-1])


class PatchDecoder(nn.Module):
    """A light causal decoder over the P tokens of a patch, on top of the flow's own.

    The flow's decoder runs once a patch. This one's output at token p has read the patch's context,
    through a projection for each of the P places, and the latents of the tokens before p in the
    patch. The projections bring contexts to the size of the embeddings they meet.

    References:
        Yu et al., *MegaByte: Predicting Million-byte Sequences with Multiscale Transformers*,
        NeurIPS 2023, arXiv:2305.07185, whose local model this is.
    """

    def __init__(self, config: PreTrainedConfig, flow: dict[str, Any]):
        super().__init__()
        width = config.hidden_size
        self.decoder = make_decoder(config, flow["patch_head_layers"])
        self.context_projection = nn.Linear(width, config.patch_size * width, bias=False)
        self.start = nn.Parameter(torch.empty(width))
        if flow["context"] == "posterior":
            self.posterior_top_k = config.posterior_top_k
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, width))
        else:
            self.embedding = None
            self.projection = nn.Linear(config.latent_size, width)

    def init_weights(self, std: float) -> None:
        init.normal_(self.start, std=std)
        if self.embedding is not None:
            init.normal_(self.embedding, std=std)

    def forward(self, tokens: Tensor, context: Tensor, codebook: Gaussians) -> Tensor:
        """The contexts (n, m + 1, w) of a patch's first m + 1 tokens, from the first m.

        Args:
            tokens: Latents (n, m, d) of the first m tokens of n patches.
            context: The flow's context (n, w) of each patch.
            codebook: The encoder's.
        """
        if self.embedding is None:
            tokens = self.projection(tokens.to(self.start.dtype))
        else:
            tokens = codebook.posterior_average(
                tokens.unsqueeze(-2), self.embedding, self.posterior_top_k
            )

        start = self.start.expand(context.shape[0], 1, -1)
        inputs = torch.cat([start, tokens.to(start.dtype)], 1)
        contexts = self.context_projection(context).unflatten(-1, (-1, context.shape[-1]))
        return run_decoder(self.decoder, contexts[:, : inputs.shape[1]] + inputs)


class MixtureLogits(nn.Module):
    """The linear maps from a hidden state to the logits of several mixtures.

    The couplings multiply by them piece by piece. They are read by calling the module, as those of
    a `Codebook` are; what it returns is `[(weight (K, w), bias (K,)), ...]`.
    """

    def __init__(
        self, hidden_size: int, num_mixtures: int, num_components: int, has_bias: bool = True
    ):
        super().__init__()
        self.num_components = num_components
        num_rows = num_mixtures * num_components
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_rows)) if has_bias else None

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        weights = self.weight.split(self.num_components)
        biases = bias.split(self.num_components)
        return list(zip(weights, biases, strict=True))
