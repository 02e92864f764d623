"""TarFlowLM: a language model in continuous latent space, made of stacked transformer autoregressive flows.

    tokens x  --codebook-->  latents z = h0  --flow 1-->  h1  --flow 2-->  ...  --flow L-->  noise u ~ N(0, I)

A flow walks the positions in one direction. A causal decoder reads the flow's input at the positions already passed;
its output parametrises an invertible coupling of the next one. Training maps all positions at once; sampling inverts
them one after another. Directions alternate over the stack, which is what gives context from both sides.

Shapes: B batch, T tokens, d latent size of a token, P patch size, N = T / P positions of size D = P d, w hidden size,
V tokens in the vocabulary, K mixture components, L flows.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based Autoregressive Flows*,
    NeurIPS 2025, arXiv:2507.00425.
    Zhai et al., *Normalizing Flows are Capable Generative Models*, ICML 2025, arXiv:2412.06329.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .codebook import Codebook, Gaussians
from .configuration_tarflowlm import TarFlowLMConfig
from .coupling import (
    affine,
    affine_inverse,
    mixture_cdf,
    mixture_cdf_inverse,
    mixture_cdf_log_prob,
    mixture_rosenblatt,
    mixture_rosenblatt_inverse,
    mixture_rosenblatt_log_prob,
)
from .generation_tarflowlm import TarFlowLMGenerationMixin
from .inversion_tarflowlm import (
    InverseReport,
    choose_inverse_methods,
    invert_by_captured_step,
    invert_in_parallel,
    invert_sequentially,
)
from .normal import normal_log_prob

# --------------------------------------------------------------------------------------------------------------------
# Coupling heads: from the decoder's output at a position to the coupling of that position.
# Each maps h (B, N, D) and context (B, N, w), by `task`, to
#   "transform":  u (B, N, D) and log_det (B, N);   "log_prob":  log p(h | context) (B, N);   "inverse":  h, of u.
# --------------------------------------------------------------------------------------------------------------------


MAX_LOG_SCALE = 10.0


def _bounded(log_scale: Tensor) -> Tensor:
    """Predicted log scales within the range for which the couplings promise finite results; the identity around 0."""
    log_scale = log_scale.to(torch.promote_types(log_scale.dtype, torch.float32))
    return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)


class AffineHead(nn.Module):
    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, 2 * config.patch_size * config.latent_size)

    def forward(self, h: Tensor, context: Tensor, codebook: Gaussians | None = None, task: str = "transform"):
        loc, log_scale = self.projection(context).chunk(2, -1)
        log_scale = _bounded(log_scale)
        if task == "inverse":
            return affine_inverse(h, loc, log_scale)
        u, log_det = affine(h, loc, log_scale)
        if task == "log_prob":
            return (log_det + normal_log_prob(u)).sum(-1)
        return u, log_det.sum(-1)


class MixtureCDFParameters(nn.Linear):
    """Logits, locations and log scales of K-component mixtures for one dimension, or several, (..., dimensions, K)."""

    def __init__(self, input_size: int, num_components: int, num_dimensions: int = 1):
        super().__init__(input_size, num_dimensions * 3 * num_components)
        self.num_components = num_components
        self.num_dimensions = num_dimensions

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, loc, log_scale = super().forward(x).unflatten(-1, (self.num_dimensions, 3, -1)).unbind(-2)
        return logits, loc, _bounded(log_scale)

    def init_bias(self) -> Tensor:
        """Near the identity: locations spread over half a standard deviation, scales that make the variance 1.

        Components that start alike would stay alike for ever.
        """
        k = self.num_components
        loc = 0.5 * torch.special.ndtri((torch.arange(k, dtype=torch.float32) + 0.5) / k)
        log_scale = 0.5 * torch.log(1 - loc.square().mean())
        return torch.cat([torch.zeros(k), loc, log_scale.expand(k)]).repeat(self.num_dimensions)


class MixtureCDFHead(nn.Module):
    """Mix-1. The parameters of all D dimensions come from the context alone or, dimension-wise autoregressive, those
    of dimension i from the context and the dimensions before it.

    The autoregressive head is that of Lippe & Gavves, *Categorical Normalizing Flows via Continuous Transformations*,
    ICLR 2021, arXiv:2006.09790, without its masked weights: dimension i has a hidden layer of its own that reads the
    context and the features of the dimensions j < i.
    """

    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        super().__init__()
        self.size = config.patch_size * config.latent_size
        self.autoregressive = flow["autoregressive"]
        num_components = flow["num_components"]
        if not self.autoregressive:
            self.output = MixtureCDFParameters(config.hidden_size, num_components, self.size)
            return
        width = flow["head_hidden_size"]
        hidden = width // 2
        features = min(max(1, width * 9 // 16 // max(1, self.size - 1)), 96)
        self.from_context = nn.Linear(config.hidden_size, self.size * hidden)
        self.features = nn.ModuleList(nn.Linear(3, features) for _ in range(self.size - 1))
        self.from_features = nn.ModuleList(nn.Linear(i * features, hidden, bias=False) for i in range(1, self.size))
        self.output = nn.ModuleList(MixtureCDFParameters(hidden, num_components) for _ in range(self.size))

    def forward(self, h: Tensor, context: Tensor, codebook: Gaussians | None = None, task: str = "transform"):
        if task == "inverse":
            return self._invert(h, context)
        if self.autoregressive:
            from_context = self._from_context(context)
            features = [self._features(i, x) for i, x in enumerate(h.unbind(-1)[:-1])]
            each = [self._parameters_of(i, from_context, features) for i in range(self.size)]
            parameters = [torch.cat(parts, -2) for parts in zip(*each, strict=True)]
        else:
            parameters = self.output(context)
        if task == "log_prob":
            return mixture_cdf_log_prob(h, *parameters).sum(-1)
        u, log_det = mixture_cdf(h, *parameters)
        return u, log_det.sum(-1)

    def _invert(self, u: Tensor, context: Tensor) -> Tensor:
        if not self.autoregressive:
            return mixture_cdf_inverse(u, *self.output(context))
        from_context = self._from_context(context)
        features, h = [], []
        for i in range(self.size):
            h.append(mixture_cdf_inverse(u[..., i : i + 1], *self._parameters_of(i, from_context, features)))
            if i < self.size - 1:
                features.append(self._features(i, h[-1].squeeze(-1)))
        return torch.cat(h, -1)

    def _from_context(self, context: Tensor) -> tuple[Tensor, ...]:
        return self.from_context(context).chunk(self.size, -1)  # D times (B, N, H / 2)

    def _features(self, i: int, x: Tensor) -> Tensor:
        inputs = torch.stack([x, F.elu(x), F.elu(-x)], -1)
        return F.gelu(self.features[i](inputs.to(self.features[i].weight.dtype)))  # (B, N, E)

    def _parameters_of(self, i: int, from_context: tuple[Tensor, ...], features: list[Tensor]):
        hidden = from_context[i]
        if i > 0:
            hidden = hidden + self.from_features[i - 1](torch.cat(features[:i], -1))
        return self.output[i](F.gelu(hidden))  # three of (B, N, 1, K)


class MixtureRosenblattHead(nn.Module):
    """Mix-d. The context gives each of the P tokens of a position its mixture weights over a codebook: the encoder's
    (tied), or one of the flow's own.
    """

    # Positions times components handled at once: the logits of a large vocabulary are made, used and remade in the
    # backward pass, so many rows at a time.
    max_logits = 2**25

    def __init__(self, config: TarFlowLMConfig, flow: dict[str, Any]):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_components = flow["num_components"]
        self.projection = nn.Linear(config.hidden_size, config.patch_size * self.num_components)
        self.codebook = None if flow["tie_codebook"] else Codebook(self.num_components, config.latent_size)

    def forward(self, h: Tensor, context: Tensor, codebook: Gaussians | None = None, task: str = "transform"):
        mean, log_scale = codebook if self.codebook is None else self.codebook()
        run = {
            "transform": mixture_rosenblatt,
            "log_prob": mixture_rosenblatt_log_prob,
            "inverse": mixture_rosenblatt_inverse,
        }[task]

        def apply(tokens: Tensor, context: Tensor):
            logits = self.projection(context).unflatten(-1, (self.patch_size, self.num_components))
            return run(tokens, logits, mean, log_scale)

        tokens = h.unflatten(-1, (self.patch_size, -1)).flatten(0, 1)  # (B N, P, d)
        rows = max(1, self.max_logits // (self.patch_size * self.num_components))
        chunks = list(zip(tokens.split(rows), context.flatten(0, 1).split(rows), strict=True))
        if len(chunks) == 1:
            outputs = [apply(*chunks[0])]
        else:
            outputs = [checkpoint(apply, *chunk, use_reentrant=False) for chunk in chunks]
        if task == "transform":
            u, log_det = (torch.cat(parts) for parts in zip(*outputs, strict=True))
            return u.reshape(h.shape), log_det.sum(-1).reshape(h.shape[:-1])
        output = torch.cat(outputs)
        return output.sum(-1).reshape(h.shape[:-1]) if task == "log_prob" else output.reshape(h.shape)


COUPLING_HEADS = {
    "affine": AffineHead,
    "mixture_cdf": MixtureCDFHead,
    "mixture_rosenblatt": MixtureRosenblattHead,
}


# --------------------------------------------------------------------------------------------------------------------
# One flow
# --------------------------------------------------------------------------------------------------------------------


class FlowLayer(nn.Module):
    """One autoregressive flow: a causal decoder over the positions, and a coupling.

    Position n is transformed with parameters that read positions < n in the flow's own order (a learned start vector
    stands before the first), so the Jacobian is block triangular and its log-determinant the sum over positions.
    """

    def __init__(self, config: TarFlowLMConfig, index: int):
        super().__init__()
        flow = config.flows[index]
        self.direction = flow["direction"]
        self.patch_size = config.patch_size
        # Each flow finds the channels of a position shuffled once more, so that later flows mix the tokens of a patch.
        self.num_shuffles = index if config.patch_size > 1 else 0
        if flow["context"] == "posterior":
            self.posterior_top_k = config.posterior_top_k
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            input_size = config.patch_size * config.hidden_size if config.patch_size > 1 else None
        else:
            self.embedding = None
            input_size = config.patch_size * config.latent_size
        self.input_projection = None if input_size is None else nn.Linear(input_size, config.hidden_size)
        self.start = nn.Parameter(torch.empty(config.hidden_size))
        # The decoder is fed embeddings: it gets the smallest token table, and loses that.
        no_tokens = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        decoder_config = config.decoder_config(flow["num_hidden_layers"], **no_tokens)
        decoder_config._attn_implementation = config._attn_implementation
        self.decoder = AutoModel.from_config(decoder_config)
        self.decoder.set_input_embeddings(None)
        self.head = COUPLING_HEADS[flow["coupling"]](config, flow)
        # Whether `inverse_method="auto"` may take the parallel form: see `choose_inverse_methods`.
        self.is_shallow = (
            flow["coupling"] != "mixture_rosenblatt" and flow["context"] == "latent" and flow["num_hidden_layers"] <= 4
        )

    def forward(
        self,
        h: Tensor,
        codebook: Gaussians,
        lengths: Tensor | None = None,
        log_prob_only: bool = False,
        reverse: bool = False,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        on_position: Callable[[Tensor], None] | None = None,
        inverse_method: str = "sequential",
        inverse_window: int | None = None,
        inverse_tolerance: float | None = None,
        capture_step: bool = False,
    ):
        """Maps positions (B, N, D) to noise, or with `reverse` back.

        Args:
            h: Input of the flow (its output if `reverse`), (B, N, D).
            codebook: The encoder's, as tensors.
            lengths: Number of real positions of each sequence, (B,), where some are padded.
            log_prob_only: Return just log p(h) (B,): no distribution function is computed.
            reverse: Invert, by `inversion_tarflowlm.py`.
            known, known_mask: With `reverse`, the flow's input (B, N, D) where it is known, and where that is (B, N):
                any positions of each sequence. They come back as they are; the output there is not read.
            on_position: With `reverse`, called with the latents (B, P, d) of each new position, in the flow's order.
            inverse_method: "sequential" or "parallel".
            inverse_window, inverse_tolerance: Of the parallel form, see `invert_in_parallel`.
            capture_step: Take the sequential form's steps by a CUDA graph, see `invert_by_captured_step`.

        Returns:
            Output (B, N, D) and log_det (B,); or log p (B,); or, with `reverse`, the input (B, N, D) and an
            `InverseReport`. 0 at padding.
        """
        h = self._arrange(h, lengths)
        if reverse:
            known, known_mask = self._arrange_known(known, known_mask, h, lengths)
            if known_mask is not None:
                h = h.masked_fill(known_mask.unsqueeze(-1), 0)  # what is not read may be anything
            arguments = h, codebook, known, known_mask
            callback = None if on_position is None else lambda state: on_position(self._tokens(state))
            if inverse_method == "parallel":
                h, report = invert_in_parallel(self, *arguments, callback, inverse_window, inverse_tolerance)
            else:
                invert = invert_by_captured_step if capture_step else invert_sequentially
                h, report = invert(self, *arguments, callback)
            return self._rearrange(h, lengths), report
        context = self.decoder(inputs_embeds=self._inputs(h, codebook), use_cache=False).last_hidden_state
        if log_prob_only:
            return _sum_real(self.head(h, context, codebook, task="log_prob"), lengths)
        u, log_det = self.head(h, context, codebook)
        return self._rearrange(u, lengths), _sum_real(log_det, lengths)

    def _inputs(self, h: Tensor, codebook: Gaussians, first: int = 0, last: int | None = None) -> Tensor:
        """What the decoder reads in its slots first, ..., last - 1, (B, last - first, w); by default in all N.

        Slot s predicts position s. Its input is a function of the arranged state h[:, s - 1] alone, the start vector
        in slot 0; so h (B, N, D) need be right only at the positions first - 1, ..., last - 2.
        """
        last = h.shape[1] if last is None else last
        if first > 0:
            return self._embed(h[:, first - 1 : last - 1], codebook)
        start = self.start.expand(len(h), 1, -1)
        return start if last == 1 else torch.cat([start, self._embed(h[:, : last - 1], codebook)], 1)

    def _embed(self, h: Tensor, codebook: Gaussians) -> Tensor:
        if self.embedding is not None:
            tokens = h.unflatten(-1, (self.patch_size, -1))
            h = codebook.posterior_average(tokens, self.embedding, self.posterior_top_k).flatten(-2)
        h = h.to(self.start.dtype)
        return h if self.input_projection is None else self.input_projection(h).to(self.start.dtype)

    def _arrange(self, h: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Into the flow's own order of positions and channels."""
        for _ in range(self.num_shuffles):
            h = torch.cat([h[..., 0::2], h[..., 1::2]], -1)
        return _flip(h, lengths) if self.direction == "right_to_left" else h

    def _rearrange(self, h: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Back from `_arrange`, with 0 at padding."""
        h = _flip(h, lengths) if self.direction == "right_to_left" else h
        for _ in range(self.num_shuffles):
            half = (h.shape[-1] + 1) // 2
            unshuffled = torch.empty_like(h)
            unshuffled[..., 0::2], unshuffled[..., 1::2] = h[..., :half], h[..., half:]
            h = unshuffled
        return _zero_padding(h, lengths)

    def _arrange_known(self, known: Tensor | None, known_mask: Tensor | None, h: Tensor, lengths: Tensor | None):
        """Known states (B, N, D) and their mask (B, N) in the flow's own order; padding is known to be 0."""
        if known is not None:
            known = self._arrange(known, lengths)
            if self.direction == "right_to_left":
                known_mask = _flip(known_mask.unsqueeze(-1), lengths).squeeze(-1)
        if lengths is not None:
            is_padding = torch.arange(h.shape[1], device=h.device) >= lengths[:, None]
            known = torch.zeros_like(h) if known is None else _zero_padding(known, lengths)
            known_mask = is_padding if known_mask is None else known_mask | is_padding
        return known, known_mask

    def _tokens(self, state: Tensor) -> Tensor:
        """One arranged position (B, 1, D) as the latents (B, P, d) of its tokens."""
        return self._rearrange(state).unflatten(-1, (self.patch_size, -1)).flatten(1, 2)


def _flip(h: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses the real positions of each sequence and leaves its padding at the end. Its own inverse."""
    if lengths is None:
        return h.flip(1)
    n = torch.arange(h.shape[1], device=h.device)
    index = torch.where(n < lengths[:, None], lengths[:, None] - 1 - n, n)
    return h.gather(1, index.unsqueeze(-1).expand_as(h))


# --------------------------------------------------------------------------------------------------------------------
# The stack
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class FlowOutput(ModelOutput):
    """Output of [`FlowStack`]. `states` are h0 (the latents), ..., hL (the noise), each (B, T, d), in that order."""

    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)
    log_det: Tensor | None = None  # (B,) nats, summed over positions and dimensions
    log_prob: Tensor | None = None  # (B,) nats, log p(latents)
    states: tuple[Tensor, ...] | None = None
    inverse_reports: list[InverseReport] | None = None  # of each flow from the data side, with `reverse`


class FlowStack(nn.Module):
    """The prior p(z): flows from the data side to the noise side, with the codebook that the first may read."""

    def __init__(self, config: TarFlowLMConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.layers = nn.ModuleList(FlowLayer(config, index) for index in range(len(config.flows)))
        # Behind the layers, because a model takes its dtype from its first parameter, and this one is always float32.
        self.codebook = Codebook(config.vocab_size, config.latent_size)

    def forward(
        self,
        latents: Tensor,
        attention_mask: Tensor | None = None,
        reverse: bool = False,
        num_flows: int | None = None,
        output_noise: bool = True,
        prefix: Tensor | None = None,
        on_position: Callable[[Tensor], None] | None = None,
        inverse_method: str | Sequence[str] = "auto",
        inverse_window: int | None = None,
        inverse_tolerance: float | None = None,
        capture_step: bool = False,
    ) -> FlowOutput:
        """Maps latents to noise, or with `reverse` noise to latents.

        log p(z) = sum_l log|det dh_l/dh_(l-1)| + log N(h_L; 0, I). A mixture coupling's log-determinant is
        log p_mix(h_(l-1)) - log N(h_l; 0, I), so that the last flow's share is its log p_mix: without `output_noise`
        that flow computes no distribution function.

        Args:
            latents: (B, T, d); the noise, with `reverse`.
            attention_mask: (B, T), 1 for real tokens and 0 for padding on the right.
            num_flows: Cut the stack after its first flows; it is a model of its own, with base N(0, I).
            output_noise: Whether to compute `noise`, `log_det` and the last of the `states`, or `log_prob` alone.
            prefix: With `reverse`, known latents (B, n, d) of the first tokens. Exact where every flow runs left to
                right; otherwise held fixed in the first flow alone.
            on_position: With `reverse`, called with the latents (B, P, d) of each position the first flow completes.
            inverse_method: With `reverse`, "sequential", "parallel" or "auto", for all flows or a list with one for
                each from the data side. All give the same latents up to rounding; see `choose_inverse_methods` for
                what "auto" takes, and `invert_in_parallel` for the certificate in `FlowOutput.inverse_reports`.
            inverse_window, inverse_tolerance: Of the parallel form: positions at once, and the change of a state that
                is taken for none; see `invert_in_parallel`.
            capture_step: Take the steps of the sequential form by a CUDA graph.

        Returns:
            A `FlowOutput`. At padding, noise and states are 0.

        Raises:
            ValueError: T is no multiple of the patch size, the mask has holes or padding on the left, or a real length
                is no multiple of the patch size, `num_flows` is not in 1, ..., L, or an option of the inverse is
                unknown or out of range, or asks for gradients of the parallel form.
        """
        length = latents.shape[1]
        if length % self.patch_size or length == 0:
            raise ValueError(
                f"The sequence length must be a positive multiple of patch_size: {length}, {self.patch_size}."
            )
        if num_flows is not None and not 1 <= num_flows <= len(self.layers):
            raise ValueError(f"num_flows must be in 1, ..., {len(self.layers)}, not {num_flows}.")
        layers = self.layers[:num_flows]
        lengths = None
        if attention_mask is not None:
            lengths = _real_lengths(attention_mask, latents.shape[:2], self.patch_size)
        h = latents.to(torch.promote_types(latents.dtype, torch.float32))
        h = _zero_padding(self._to_positions(h), lengths)
        if reverse:
            return self._invert(
                layers,
                h,
                lengths,
                prefix,
                on_position,
                inverse_method,
                inverse_window=inverse_window,
                inverse_tolerance=inverse_tolerance,
                capture_step=capture_step,
            )
        return self._transform(layers, h, lengths, output_noise)

    def _transform(self, layers: nn.ModuleList, h: Tensor, lengths: Tensor | None, output_noise: bool) -> FlowOutput:
        codebook, states, log_det = self.codebook(), [h], 0.0
        for layer in layers if output_noise else layers[:-1]:
            h, layer_log_det = layer(h, codebook, lengths)
            log_det = log_det + layer_log_det
            states.append(h)
        tokens = tuple(map(self._to_tokens, states))
        if not output_noise:
            log_prob = log_det + layers[-1](h, codebook, lengths, log_prob_only=True)
            return FlowOutput(latents=tokens[0], log_prob=log_prob, states=tokens)
        log_prob = log_det + _sum_real(normal_log_prob(h).sum(-1), lengths)
        return FlowOutput(tokens[0], tokens[-1], log_det, log_prob, tokens)

    def _invert(
        self,
        layers: nn.ModuleList,
        h: Tensor,
        lengths: Tensor | None,
        prefix: Tensor | None,
        on_position: Callable[[Tensor], None] | None,
        inverse_method: str | Sequence[str],
        **options: Any,
    ) -> FlowOutput:
        parameters_need_gradients = any(parameter.requires_grad for parameter in self.parameters())
        is_differentiable = torch.is_grad_enabled() and (h.requires_grad or parameters_need_gradients)
        methods = choose_inverse_methods(inverse_method, layers, h, is_differentiable)
        if is_differentiable and options["capture_step"]:
            raise ValueError("capture_step=True has no gradients: use torch.no_grad(), or capture_step=False.")
        known = self._known(layers, prefix, h)
        codebook, states, reports = self.codebook(), [h], []
        for index in reversed(range(len(layers))):
            h, report = layers[index](
                h,
                codebook,
                lengths,
                reverse=True,
                known=known[index][0],
                known_mask=known[index][1],
                on_position=on_position if index == 0 else None,
                inverse_method=methods[index],
                **options,
            )
            states.append(h)
            reports.append(report)
        tokens = tuple(map(self._to_tokens, reversed(states)))
        return FlowOutput(latents=tokens[0], noise=tokens[-1], states=tokens, inverse_reports=reports[::-1])

    def _known(self, layers: nn.ModuleList, prefix: Tensor | None, h: Tensor):
        """What each flow knows of its input (B, N, D), and where (B, N), given the latents of the first tokens."""
        nothing = [(None, None)] * (len(layers) - 1)
        if prefix is None:
            return [(None, None), *nothing]
        num_known = prefix.shape[1] // self.patch_size
        mask = torch.arange(h.shape[1], device=h.device) < num_known

        def padded(state: Tensor) -> tuple[Tensor, Tensor]:
            state = F.pad(self._to_positions(state).to(h.dtype), (0, 0, 0, h.shape[1] - num_known))
            return state, mask.expand(len(h), -1)

        if any(layer.direction != "left_to_right" for layer in layers):
            return [padded(prefix), *nothing]
        # Left to right, the states of the first tokens depend on nothing behind them.
        return list(map(padded, self(prefix, num_flows=len(layers)).states[:-1]))

    def _to_positions(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.patch_size)).flatten(2)  # (B, T, d) to (B, N, D)

    def _to_tokens(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.patch_size, -1)).flatten(1, 2)  # (B, N, D) to (B, T, d)


def _zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Positions (B, N, ...) with 0 behind the real ones."""
    if lengths is None:
        return x
    is_padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(is_padding.reshape(*is_padding.shape, *[1] * (x.ndim - 2)), 0)


def _sum_real(per_position: Tensor, lengths: Tensor | None) -> Tensor:
    """Sum over the real positions, (B, N) to (B,)."""
    return _zero_padding(per_position, lengths).sum(-1)


def _require(condition: Tensor, message: str) -> None:
    """Raises where looking at the data is free; on an accelerator asserts without waiting for it."""
    if torch.compiler.is_compiling():
        return
    if condition.device.type == "cpu":
        if not bool(condition):
            raise ValueError(message)
    elif condition.device.type != "meta":
        torch._assert_async(condition, message)


def _real_lengths(attention_mask: Tensor, shape: torch.Size, patch_size: int) -> Tensor:
    """The number of real positions of each sequence, (B,), from a right-padding mask (B, T)."""
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask must have shape (B, T) = {tuple(shape)}, not {tuple(attention_mask.shape)}.")
    mask = attention_mask != 0
    lengths = mask.sum(-1)
    is_right_padded = (mask == (torch.arange(shape[1], device=mask.device) < lengths[:, None])).all()
    _require(is_right_padded, "attention_mask has holes or padding on the left: only right padding is possible.")
    _require((lengths > 0).all(), "attention_mask has a sequence without any real token.")
    _require((lengths % patch_size == 0).all(), f"Every real length must be a multiple of patch_size, {patch_size}.")
    return lengths // patch_size


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class TarFlowLMOutput(ModelOutput):
    """Output of [`TarFlowLMModel`]; everything in nats, and elbo = reconstruction + prior - posterior."""

    loss: Tensor | None = None  # scalar, -elbo per real token
    elbo: Tensor | None = None  # (B,)
    reconstruction_log_prob: Tensor | None = None  # (B,) log p(x | z)
    prior_log_prob: Tensor | None = None  # (B,) log p(z)
    posterior_log_prob: Tensor | None = None  # (B,) log q(z | x)
    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)


class TarFlowLMPreTrainedModel(PreTrainedModel):
    """What the library needs to know about the model: its parts, their initialisation, and how it loads."""

    config_class = TarFlowLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over this batch's real tokens; Trainer averages the batches
    _no_split_modules = ["FlowLayer"]
    _keep_in_fp32_modules_strict = ["codebook"]  # its scales are far finer than bfloat16's steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs):
        """As in the library, but a checkpoint that does not fit the model is an error, not a warning.

        With `output_loading_info` the caller gets the library's report, and judges.

        Raises:
            ValueError: Weights are missing, left over, or of another shape; the message names them.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        kinds = ["missing_keys", "unexpected_keys"] + ([] if ignore_mismatched_sizes else ["mismatched_keys"])
        faults = [f"{kind} {sorted(map(str, info[kind]))}" for kind in kinds if info[kind]]
        if faults and not output_loading_info:
            raise ValueError(f"The checkpoint {args[0] if args else ''} does not fit the model: {'; '.join(faults)}.")
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Codebook):
            init.normal_(module.mean)
            init.constant_(module.log_scale, self.config.initial_log_scale)
        elif isinstance(module, FlowLayer):
            init.normal_(module.start, std=self.config.initializer_range)
            if module.embedding is not None:
                init.normal_(module.embedding, std=self.config.initializer_range)
        elif isinstance(module, MixtureCDFParameters):
            init.copy_(module.bias, module.init_bias())


class TarFlowLMModel(TarFlowLMPreTrainedModel, TarFlowLMGenerationMixin, GenerationMixin):
    """A language model that flows: tokens to latents by a codebook, latents to noise by a stack of flows.

    `model.flow` is the stack, `model.codebook` the encoder and decoder. `generate` inverts the stack.

    Example:
        >>> import torch
        >>> config = TarFlowLMConfig(vocab_size=27, latent_size=2, hidden_size=32, num_attention_heads=4, flows=[
        ...     {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
        ...     {"coupling": "mixture_cdf", "direction": "right_to_left", "num_hidden_layers": 1},
        ... ])
        >>> model = TarFlowLMModel(config)
        >>> input_ids = torch.randint(27, (2, 10))
        >>> out = model(input_ids, labels=input_ids)
        >>> torch.allclose(out.loss, -out.elbo.sum() / 20)
        True
        >>> z = model.encode(input_ids)
        >>> u = model.flow(z).noise
        >>> torch.allclose(model.flow(u, reverse=True).latents, z, atol=1e-3)
        True
    """

    def __init__(self, config: TarFlowLMConfig):
        super().__init__(config)
        self.flow = FlowStack(config)
        # Said outright, because `pipeline` samples at another temperature where a model has no opinion.
        self.generation_config.update(do_sample=True, temperature=1.0)
        self.post_init()

    @property
    def codebook(self) -> Codebook:
        return self.flow.codebook

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_flows: int | None = None,
        output_noise: bool = False,
    ) -> TarFlowLMOutput:
        """The evidence lower bound of each sequence, from one sample of its latents.

        Args:
            input_ids: Token ids (B, T), T a multiple of the patch size.
            attention_mask: (B, T), 1 for real tokens and 0 for padding on the right.
            labels: Asks for the loss: `input_ids`, where padding may be -100. The bound is that of whole sequences,
                so no real token can be left out of it.
            latents: Latents (B, T, d) to take instead of a sample of q(z | x).
            generator: Source of the sample's noise.
            num_flows: Score the stack cut after its first flows.
            output_noise: Compute `noise` too, which the likelihood does not need.

        Returns:
            [`TarFlowLMOutput`].

        Raises:
            ValueError: Ids outside the vocabulary, labels other than the ids, an empty or too long sequence, a length
                that is no multiple of the patch size, or a mask that is not right padding.
        """
        input_ids = self._check_ids(input_ids, attention_mask)
        if labels is not None:
            is_real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            _require(
                ((labels == input_ids) | (is_real == 0)).all(),
                "labels must equal input_ids at every real token, because the bound is that of whole sequences: give "
                "labels=input_ids, or give a collator that writes -100 a padding token of its own.",
            )
        if latents is None:
            latents = self.codebook().sample(input_ids, generator)
        flow = self.flow(latents, attention_mask, num_flows=num_flows, output_noise=output_noise)

        def total(per_token: Tensor) -> Tensor:
            return (per_token if attention_mask is None else per_token.masked_fill(attention_mask == 0, 0)).sum(-1)

        posterior_log_prob = total(self.codebook().log_prob(latents, input_ids))
        # log p(x | z) - log q(z | x) is the same for all x: no term of the bound but the sum over the codebook.
        reconstruction_minus_posterior = -total(self.codebook().log_total(latents))
        elbo = flow.log_prob + reconstruction_minus_posterior
        loss = None
        if labels is not None:
            num_tokens = input_ids.numel() if attention_mask is None else attention_mask.sum()
            loss = -elbo.sum() / num_tokens
        return TarFlowLMOutput(
            loss=loss,
            elbo=elbo,
            reconstruction_log_prob=reconstruction_minus_posterior + posterior_log_prob,
            prior_log_prob=flow.log_prob,
            posterior_log_prob=posterior_log_prob,
            latents=latents,
            noise=flow.noise,
        )

    def encode(
        self, input_ids: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A sample of q(z | x), reparametrised: ids (B, T) to latents (B, T, d), of the given N(0, I) noise if any."""
        return self.codebook().sample(self._check_ids(input_ids), generator, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """log p(x | z) in nats, normalised over the vocabulary: latents (B, T, d) to (B, T, V)."""
        return torch.log_softmax(self.codebook().log_prob_all(latents), -1)

    def importance_weighted_bound(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_samples: int = 16,
        generator: torch.Generator | None = None,
        num_flows: int | None = None,
    ) -> Tensor:
        """The bound log((1 / S) sum_s exp(elbo_s)) <= log p(x) of each sequence, (B,) in nats.

        S = `num_samples` independent samples of the latents; with S = 1 it is the ELBO. Its expectation rises with S
        towards log p(x) (Burda et al., *Importance Weighted Autoencoders*, ICLR 2016, arXiv:1509.00519).
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}.")
        samples = [
            self(input_ids, attention_mask, generator=generator, num_flows=num_flows).elbo for _ in range(num_samples)
        ]
        return torch.logsumexp(torch.stack(samples), 0) - math.log(num_samples)

    def _check_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Checks ids (B, T), and replaces those at padding, which may be anything, by 0."""
        if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers of shape (B, T), not empty: {input_ids.dtype}, {tuple(input_ids.shape)}."
            )
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"A sequence of {input_ids.shape[1]} tokens is longer than max_position_embeddings, "
                f"{self.config.max_position_embeddings}."
            )
        if input_ids.shape[1] % self.config.patch_size:
            raise ValueError(
                f"The sequence length must be a multiple of patch_size: {input_ids.shape[1]}, {self.config.patch_size}."
            )
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask must have the shape of input_ids: {tuple(attention_mask.shape)}, "
                    f"{tuple(input_ids.shape)}."
                )
            input_ids = input_ids.masked_fill(attention_mask == 0, 0)
        _require(
            ((input_ids >= 0) & (input_ids < self.config.vocab_size)).all(),
            f"input_ids must be in 0, ..., vocab_size - 1 = {self.config.vocab_size - 1}.",
        )
        return input_ids


__all__ = ["TarFlowLMModel", "TarFlowLMPreTrainedModel"]
