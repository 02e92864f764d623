"""TarFlowLM: a language model in continuous latent space, made of stacked transformer
autoregressive flows.

    tokens x  --codebook-->  latents z = h0  --flow 1-->  h1  --flow 2-->  ...  --flow L-->  noise u ~ N(0, I)

A flow walks the positions in one direction. A causal decoder reads the flow's input at the
positions already passed; its output parametrises an invertible coupling of the next one. Training
maps all positions at once; sampling inverts them one after another. Directions alternate over the
stack, which is what gives context from both sides.

Shapes: B batch, T tokens, d latent size of a token, P patch size, N = T / P positions of size D = P
d, w hidden size, V tokens in the vocabulary, K mixture components, L flows.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425. Zhai et al., *Normalizing Flows are
    Capable Generative Models*, ICML 2025, arXiv:2412.06329.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .codebook import Codebook, Gaussians
from .configuration_tarflowlm import TarFlowLMConfig
from .coupling_head import CouplingHead, LogitsProcessor
from .coupling_heads import COUPLING_HEADS
from .decoder_tarflowlm import make_decoder, run_decoder
from .generation_tarflowlm import TarFlowLMGenerationMixin
from .inversion_tarflowlm import (
    InverseReport,
    choose_inverse_methods,
    invert_by_captured_step,
    invert_in_parallel,
    invert_sequentially,
)
from .mixture_rosenblatt_head import MixtureLogits, PatchDecoder
from .normal import normal_log_prob

# --------------------------------------------------------------------------------------------------
# One flow
# --------------------------------------------------------------------------------------------------


class Observed(NamedTuple):
    """What a flow's decoder knows beforehand, in a conditional model: its first slots hold the
    observed positions.
    """

    inputs: Tensor  # (B, N, w) of the slots that hold one
    count: Tensor  # (B, 1, 1) such slots
    position_ids: Tensor  # (B, N): where in the sequence, in the flow's direction, the position of each slot is


class ObservedEmbedding(nn.Module):
    """The ids of observed positions (B, N, P) to decoder inputs (B, N, w): the sum of their
    embeddings, from a table for each of the P places, and a common marker.
    """

    def __init__(self, config: TarFlowLMConfig):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.patch_size * config.vocab_size, config.hidden_size)
        self.marker = nn.Parameter(torch.empty(config.hidden_size))

    def init_weights(self, std: float) -> None:
        init.normal_(self.marker, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[-1], device=ids.device)
        return (
            self.embedding(ids + self.vocab_size * place).sum(-2).to(self.marker.dtype)
            + self.marker
        )


class FlowLayer(nn.Module):
    """One autoregressive flow: a causal decoder over the positions, and a coupling.

    Position n is transformed with parameters that read positions < n in the flow's own order (a
    learned start vector stands before the first), so the Jacobian is block triangular and its
    log-determinant the sum over positions.

    In a conditional model some positions are observed: they are no variables of the flow, but
    context. The decoder reads them first, then passes the missing positions in the flow's
    direction; position ids say where each of them is. A missing position so sees every observed
    one, and plain causal attention is all it takes.
    """

    def __init__(self, config: TarFlowLMConfig, index: int):
        super().__init__()
        flow = config.flows[index]
        self.direction = flow["direction"]
        self.patch_size = config.patch_size

        # Each flow finds the channels of a position shuffled once more, so that later flows mix the
        # tokens of a patch.
        self.num_shuffles = index if config.patch_size > 1 else 0

        if flow["context"] == "posterior":
            self.posterior_top_k = config.posterior_top_k
            # A table for each token of a patch. A projection of embeddings, two small factors,
            # would learn too slowly.
            self.embedding = nn.Parameter(
                torch.empty(config.patch_size * config.vocab_size, config.hidden_size)
            )
            self.input_projection = None
        else:
            self.embedding = None
            self.input_projection = nn.Linear(
                config.patch_size * config.latent_size, config.hidden_size
            )

        self.start = nn.Parameter(torch.empty(config.hidden_size))
        self.decoder = make_decoder(config, flow["num_hidden_layers"])
        self.observed_embedding = ObservedEmbedding(config) if config.conditional else None
        self.head = COUPLING_HEADS[flow["coupling"]].make(config, flow)

        # Whether `inverse_method="auto"` may take the parallel form: see `choose_inverse_methods`.
        self.is_shallow = (
            self.head.is_smooth and flow["context"] == "latent" and flow["num_hidden_layers"] <= 4
        )

    def init_weights(self, std: float) -> None:
        init.normal_(self.start, std=std)
        if self.embedding is not None:
            init.normal_(self.embedding, std=std)

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
        observed_ids: Tensor | None = None,
        inverse_method: str = "sequential",
        inverse_window: int | None = None,
        inverse_tolerance: float | None = None,
        capture_step: bool = False,
        logits_processor: LogitsProcessor | None = None,
    ):
        """Maps positions (B, N, D) to noise, or with `reverse` back.

        Args:
            h: Input of the flow (its output if `reverse`), (B, N, D).
            codebook: The encoder's, as tensors.
            lengths: Number of real positions of each sequence, (B,), where some are padded.
            log_prob_only: Return just log p(h) (B,): no distribution function is computed.
            reverse: Invert, by `inversion_tarflowlm.py`.
            known, known_mask: With `reverse`, the flow's input (B, N, D) where it is known, and
                where that is (B, N): any positions of each sequence. They come back as they are;
                the output there is not read.
            on_position: With `reverse`, called with the latents (B, P, d) of each new position, in
                the flow's order.
            observed_ids: Of a conditional model, the ids (B, N, P) of the observed positions, -1 at
                the missing ones.
            inverse_method: "sequential" or "parallel".
            inverse_window, inverse_tolerance: Of the parallel form, see `invert_in_parallel`.
            capture_step: Take the sequential form's steps by a CUDA graph, see
                `invert_by_captured_step`.
            logits_processor: With `reverse`, from the logits (n, K) of a mixture Rosenblatt
                coupling to other ones.

        Returns:
            Output (B, N, D) and log_det (B,); or log p (B,); or, with `reverse`, the input (B, N,
            D) and an `InverseReport`. 0 at padding and at observed positions, which nothing is
            summed over.
        """
        order, observed = self._order(h, lengths, observed_ids)
        is_variable = _is_variable(h, lengths, observed_ids)
        h = self._arrange(h, order)

        if reverse:
            known, known_mask = self._known_slots(known, known_mask, is_variable, h, order)
            if known_mask is not None:
                h = h.masked_fill(known_mask.unsqueeze(-1), 0)  # what is not read may be anything

            callback = (
                None if on_position is None else lambda state: on_position(self._tokens(state))
            )
            arguments = h, codebook, observed, known, known_mask, callback, logits_processor

            if inverse_method == "parallel":
                h, report = invert_in_parallel(self, *arguments, inverse_window, inverse_tolerance)
            else:
                invert = invert_by_captured_step if capture_step else invert_sequentially
                h, report = invert(self, *arguments)

            return _zero_unless(is_variable, self._rearrange(h, order)), report

        context = self._context(self._inputs(h, codebook, observed=observed), observed)
        if log_prob_only:
            log_prob = self.head(h, context, codebook, task="log_prob")
            return _zero_unless(is_variable, self._to_positions(log_prob, order)).sum(-1)

        u, log_det = self.head(h, context, codebook)
        log_det = _zero_unless(is_variable, self._to_positions(log_det, order)).sum(-1)
        return _zero_unless(is_variable, self._rearrange(u, order)), log_det

    def _context(
        self,
        inputs: Tensor,
        observed: Observed | None = None,
        first: int = 0,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """The decoder's output (B, n, w) at the slots from `first` on, of their inputs; the cache
        holds those before.

        Raises:
            ValueError: Flash attention is asked to handle what is observed in a single sequence.
        """
        options = {}
        if observed is not None:
            if (
                "flash" in self.decoder.config._attn_implementation
                and len(inputs) == 1 < inputs.shape[1]
            ):
                raise ValueError(
                    f"{self.decoder.config._attn_implementation} takes a single sequence whose position ids jump for "
                    'several: with observed tokens give it two or more sequences, or use attn_implementation="sdpa".'
                )

            options["position_ids"] = observed.position_ids[:, first : first + inputs.shape[1]]
            if (
                cache is None
            ):  # or else the library takes a jump in the position ids for the start of another sequence
                options["attention_mask"] = torch.ones(
                    inputs.shape[:2], dtype=torch.bool, device=inputs.device
                )

        return run_decoder(self.decoder, inputs, cache, **options)

    def _inverse(
        self,
        u: Tensor,
        context: Tensor,
        codebook: Gaussians,
        logits_processor: LogitsProcessor | None = None,
    ) -> Tensor:
        """The states (B, n, D) that the coupling maps to u (B, n, D), of contexts (B, n, w)."""
        options = {}
        if logits_processor is not None and self.head.takes_logits_processor:
            options["logits_processor"] = logits_processor
        return self.head(u, context, codebook, task="inverse", **options)

    def _inputs(
        self,
        h: Tensor,
        codebook: Gaussians,
        first: int = 0,
        last: int | None = None,
        observed: Observed | None = None,
    ) -> Tensor:
        """What the decoder reads at the slots first, ..., last - 1, of which slot s predicts
        position s: (B, n, w).

        It is a function of position s - 1 alone (the start vector at slot 0): h (B, N, D), in the
        flow's own order, has to be right at the positions first - 1, ..., last - 2. Slots of
        observed positions read these; the start vector is what the first slot behind them reads.
        """
        last = h.shape[1] if last is None else last
        inputs = [self.start.expand(len(h), 1, -1)] if first == 0 else []
        if last > max(first, 1):
            inputs.append(self._embed(h[:, max(first - 1, 0) : last - 1], codebook))

        inputs = torch.cat(inputs, 1)
        if observed is not None:
            slots = torch.arange(first, last, device=h.device).unsqueeze(-1)  # (n, 1)
            inputs = torch.where(slots == observed.count, self.start, inputs)
            inputs = torch.where(slots < observed.count, observed.inputs[:, first:last], inputs)

        return inputs

    def _embed(self, h: Tensor, codebook: Gaussians) -> Tensor:
        if self.input_projection is not None:
            return self.input_projection(h.to(self.start.dtype)).to(self.start.dtype)

        tokens = h.unflatten(-1, (self.patch_size, -1))
        return codebook.posterior_average(tokens, self.embedding, self.posterior_top_k).to(
            self.start.dtype
        )

    def _arrange(self, h: Tensor, order: Tensor | None = None) -> Tensor:
        """Into the flow's own order of positions and channels: positions (B, N, D) to slots."""
        return self._to_slots(self._shuffle(h), order)

    def _rearrange(self, h: Tensor, order: Tensor | None = None) -> Tensor:
        """Back from `_arrange`."""
        return self._unshuffle(self._to_positions(h, order))

    def _order(
        self, h: Tensor, lengths: Tensor | None, observed_ids: Tensor | None
    ) -> tuple[Tensor | None, Observed | None]:
        """The position that each slot holds, (B, N), where sequences differ in that, and what is
        observed.
        """
        num_positions = h.shape[1]
        if observed_ids is None and (lengths is None or self.direction != "right_to_left"):
            return None, None

        n = torch.arange(num_positions, device=h.device).expand(len(h), -1)
        ends = (
            torch.full((len(h), 1), num_positions, device=h.device)
            if lengths is None
            else lengths.unsqueeze(-1)
        )

        # Where a position is in the flow's direction. Padding stays at the end.
        coordinate = (
            torch.where(n < ends, ends - 1 - n, n) if self.direction == "right_to_left" else n
        )
        if observed_ids is None:
            return coordinate, None  # a reversal is its own inverse

        is_observed = observed_ids[..., 0] >= 0
        order = torch.argsort(
            coordinate + num_positions * torch.where(n < ends, (~is_observed).long(), 2), -1
        )

        return order, Observed(
            inputs=self.observed_embedding(_take(observed_ids.clamp(min=0), order)),
            count=is_observed.sum(-1)[:, None, None],
            position_ids=_take(coordinate, order),
        )

    def _to_slots(self, x: Tensor, order: Tensor | None) -> Tensor:
        """Positions (B, N, ...) in the order in which the flow passes them."""
        if order is not None:
            return _take(x, order)
        return x.flip(1) if self.direction == "right_to_left" else x

    def _to_positions(self, x: Tensor, order: Tensor | None) -> Tensor:
        """Back from `_to_slots`."""
        return self._to_slots(x, None if order is None else order.argsort(-1))

    def _shuffle(self, h: Tensor) -> Tensor:
        """Channels (..., D) in the flow's own order."""
        if self.direction == "right_to_left_within_patch":
            h = h.unflatten(-1, (self.patch_size, -1)).flip(-2).flatten(-2)
        for _ in range(self.num_shuffles):
            h = torch.cat([h[..., 0::2], h[..., 1::2]], -1)
        return h

    def _unshuffle(self, h: Tensor) -> Tensor:
        """Back from `_shuffle`."""
        for _ in range(self.num_shuffles):
            half = (h.shape[-1] + 1) // 2
            unshuffled = torch.empty_like(h)
            unshuffled[..., 0::2], unshuffled[..., 1::2] = h[..., :half], h[..., half:]
            h = unshuffled

        if self.direction == "right_to_left_within_patch":
            h = h.unflatten(-1, (self.patch_size, -1)).flip(-2).flatten(-2)

        return h

    def _known_slots(
        self,
        known: Tensor | None,
        known_mask: Tensor | None,
        is_variable: Tensor | None,
        h: Tensor,
        order: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Known states (B, N, D) and where they are (B, N), in the flow's own order; what is no
        variable is known.
        """
        if is_variable is not None:
            known = torch.zeros_like(h) if known is None else _zero_unless(is_variable, known)
            known_mask = ~is_variable if known_mask is None else known_mask | ~is_variable

        if known is None:
            return None, None

        return self._arrange(known, order), self._to_slots(known_mask, order)

    def _tokens(self, state: Tensor) -> Tensor:
        """One arranged position (B, 1, D) as the latents (B, P, d) of its tokens."""
        return self._unshuffle(state).unflatten(-1, (self.patch_size, -1)).flatten(1, 2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """The positions of x (B, N, ...) that the index (B, N) names."""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand_as(x))


# --------------------------------------------------------------------------------------------------
# The stack
# --------------------------------------------------------------------------------------------------


@dataclass
class FlowOutput(ModelOutput):
    """Output of [`FlowStack`]. `states` are h0 (the latents), ..., hL (the noise), each (B, T, d),
    in that order.
    """

    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)
    log_det: Tensor | None = None  # (B,) nats, summed over positions and dimensions
    log_prob: Tensor | None = None  # (B,) nats, log p(latents)
    states: tuple[Tensor, ...] | None = None
    inverse_reports: list[InverseReport] | None = (
        None  # of each flow from the data side, with `reverse`
    )


class FlowStack(nn.Module):
    """The prior p(z): flows from the data side to the noise side, with the codebook that the first
    may read.
    """

    def __init__(self, config: TarFlowLMConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.layers = nn.ModuleList(FlowLayer(config, index) for index in range(len(config.flows)))

        # Behind the layers, because a model takes its dtype from its first parameter, and this one
        # is always float32.
        self.codebook = Codebook(config.vocab_size, config.latent_size)

    def forward(
        self,
        latents: Tensor,
        attention_mask: Tensor | None = None,
        reverse: bool = False,
        num_flows: int | None = None,
        output_noise: bool = True,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        on_position: Callable[[Tensor], None] | None = None,
        observed_ids: Tensor | None = None,
        observed_mask: Tensor | None = None,
        inverse_method: str | Sequence[str] = "auto",
        inverse_window: int | None = None,
        inverse_tolerance: float | None = None,
        capture_step: bool = False,
        flow_temperatures: Sequence[float] | None = None,
        logits_processor: LogitsProcessor | None = None,
    ) -> FlowOutput:
        """Maps latents to noise, or with `reverse` noise to latents.

        log p(z) = sum_l log|det dh_l/dh_(l-1)| + log N(h_L; 0, I). A mixture coupling's
        log-determinant is log p_mix(h_(l-1)) - log N(h_l; 0, I), so that the last flow's share is
        its log p_mix: without `output_noise` that flow computes no distribution function.

        Args:
            latents: (B, T, d); the noise, with `reverse`.
            attention_mask: (B, T), 1 for real tokens and 0 for padding on the right.
            num_flows: Cut the stack after its first flows; it is a model of its own, with base N(0,
                I).
            output_noise: Whether to compute `noise`, `log_det` and the last of the `states`, or
                `log_prob` alone.
            known, known_mask: With `reverse`, latents (B, T, d) that are held fixed, and where, (B,
                T). Where no flow runs right to left, those before the first unknown one are given
                to every flow, which is exact: the others follow p(z_new | z_known). All others are
                held fixed in the first flow alone.
            on_position: With `reverse`, called with the latents (B, P, d) of each position the
                first flow completes.
            observed_ids, observed_mask: Of a conditional model, token ids (B, T) and where they are
                observed, (B, T). Only the other tokens have latents: the flow is that of
                p(z_missing | x_observed), both ways.
            inverse_method: With `reverse`, "sequential", "parallel" or "auto", for all flows or a
                list with one for each from the data side. All give the same latents up to rounding;
                see `choose_inverse_methods` for what "auto" takes, and `invert_in_parallel` for the
                certificate in `FlowOutput.inverse_reports`.
            inverse_window, inverse_tolerance: Of the parallel form: positions at once, and the
                change of a state that is taken for none; see `invert_in_parallel`.
            capture_step: Take the steps of the sequential form by a CUDA graph.
            flow_temperatures: With `reverse`, a factor for each flow from the data side, by which
                its output is multiplied before it is inverted: the last one is the noise's standard
                deviation. `states` are those multiplied.
            logits_processor: With `reverse`, what makes of the logits (n, K) of every mixture
                Rosenblatt flow other ones, in float32 or better, -inf for components that are left
                out.

        Returns:
            A `FlowOutput`. At padding and at observed tokens, noise and states are 0.

        Raises:
            ValueError: T is no multiple of the patch size, the mask has holes or padding on the
                left, a real length is no multiple of the patch size, a patch is known or observed
                in part, `num_flows` is not in 1, ..., L, `observed_mask` is given to a model that
                is not conditional, or covers a whole sequence; an option of the inverse is unknown
                or out of range, or asks for gradients of the parallel form.
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

        h = self._to_positions(latents.to(torch.promote_types(latents.dtype, torch.float32)))
        if known is not None and observed_mask is not None:
            raise ValueError(
                "Give known_mask or observed_mask, not both: what is observed has no latents."
            )

        observed_ids = (
            None
            if observed_mask is None
            else self._observed(h, lengths, observed_ids, observed_mask)
        )
        h = _zero_unless(_is_variable(h, lengths, observed_ids), h)

        if reverse:
            options = {
                "inverse_window": inverse_window,
                "inverse_tolerance": inverse_tolerance,
                "capture_step": capture_step,
                "logits_processor": logits_processor,
            }
            if flow_temperatures is not None:
                flow_temperatures = _checked_temperatures(flow_temperatures, len(layers))

            known = self._known(layers, known, known_mask)
            return self._invert(
                layers,
                h,
                lengths,
                observed_ids,
                known,
                on_position,
                inverse_method,
                flow_temperatures,
                options,
            )

        return self._transform(layers, h, lengths, observed_ids, output_noise)

    def _transform(
        self, layers: nn.ModuleList, h: Tensor, lengths, observed_ids, output_noise: bool
    ) -> FlowOutput:
        codebook, states, log_det = self.codebook(), [h], 0.0
        for layer in layers if output_noise else layers[:-1]:
            h, layer_log_det = layer(h, codebook, lengths, observed_ids=observed_ids)
            log_det = log_det + layer_log_det
            states.append(h)

        tokens = tuple(map(self._to_tokens, states))
        if not output_noise:
            log_prob = log_det + layers[-1](
                h, codebook, lengths, log_prob_only=True, observed_ids=observed_ids
            )
            return FlowOutput(latents=tokens[0], log_prob=log_prob, states=tokens)

        is_variable = _is_variable(h, lengths, observed_ids)
        log_prob = log_det + _zero_unless(is_variable, normal_log_prob(h).sum(-1)).sum(-1)
        return FlowOutput(tokens[0], tokens[-1], log_det, log_prob, tokens)

    def _invert(
        self,
        layers: nn.ModuleList,
        h: Tensor,
        lengths,
        observed_ids,
        known,
        on_position,
        inverse_method,
        flow_temperatures: list[float] | None,
        options,
    ) -> FlowOutput:
        parameters_need_gradients = any(parameter.requires_grad for parameter in self.parameters())
        is_differentiable = torch.is_grad_enabled() and (
            h.requires_grad or parameters_need_gradients
        )
        methods = choose_inverse_methods(inverse_method, layers, h, is_differentiable)

        if is_differentiable and options["capture_step"]:
            raise ValueError(
                "capture_step=True has no gradients: use torch.no_grad(), or capture_step=False."
            )

        codebook, states, reports = self.codebook(), [], []
        for index in reversed(range(len(layers))):
            h = h if flow_temperatures is None else flow_temperatures[index] * h
            states.append(h)
            h, report = layers[index](
                h,
                codebook,
                lengths,
                reverse=True,
                known=known[index][0],
                known_mask=known[index][1],
                on_position=on_position if index == 0 else None,
                observed_ids=observed_ids,
                inverse_method=methods[index],
                **options,
            )
            reports.append(report)

        states.append(h)
        tokens = tuple(map(self._to_tokens, reversed(states)))
        return FlowOutput(
            latents=tokens[0], noise=tokens[-1], states=tokens, inverse_reports=reports[::-1]
        )

    def _observed(
        self, h: Tensor, lengths: Tensor | None, ids: Tensor | None, mask: Tensor
    ) -> Tensor:
        """Ids (B, N, P) of the observed positions, -1 elsewhere."""
        if self.layers[0].observed_embedding is None:
            raise ValueError(
                "observed_mask needs a conditional model: this one's config has conditional=False, and was trained to "
                "model all tokens."
            )

        shape = (len(h), h.shape[1] * self.patch_size)
        if ids is None or ids.shape != shape or mask.shape != shape:
            shapes = f"{None if ids is None else tuple(ids.shape)}, {tuple(mask.shape)}"
            raise ValueError(
                f"observed_ids and observed_mask must have shape (B, T) = {shape}, not {shapes}."
            )

        _require(((mask == 0) | (mask == 1)).all(), "observed_mask must be boolean, or 0 and 1.")
        mask = _zero_unless(
            _is_variable(h, lengths, None), mask.unflatten(1, (-1, self.patch_size)) == 1
        )  # (B, N, P)
        _require((mask.all(-1) == mask.any(-1)).all(), "observed_mask must cover whole patches.")
        ids = torch.where(mask, ids.unflatten(1, (-1, self.patch_size)), -1)
        vocab_size = self.layers[0].observed_embedding.vocab_size
        is_token = (ids >= 0) & (ids < vocab_size)
        _require(
            (is_token == mask).all(),
            f"observed_ids must be in 0, ..., vocab_size - 1 = {vocab_size - 1}.",
        )
        is_left = _is_variable(h, lengths, ids).any(-1).all()
        _require(is_left, "observed_mask covers a whole sequence: nothing of it is left to model.")

        return ids

    def _known(self, layers: nn.ModuleList, known: Tensor | None, known_mask: Tensor | None):
        """What each flow knows of its input (B, N, D), and where (B, N), when some latents (B, T,
        d) are given.
        """
        if known is None:
            return [(None, None)] * len(layers)

        by_position = known_mask.unflatten(1, (-1, self.patch_size))
        _require(
            (by_position.all(-1) == by_position.any(-1)).all(),
            "known_mask must cover whole patches.",
        )
        mask = by_position.all(-1)
        first = (self._to_positions(known), mask)
        if len(layers) == 1 or any(layer.direction == "right_to_left" for layer in layers):
            return [first] + [(None, None)] * (len(layers) - 1)

        # Left to right, the states of the first positions depend on nothing behind them.
        states = self(
            torch.where(known_mask.unsqueeze(-1), known, 0), num_flows=len(layers) - 1
        ).states[1:]
        leading = mask.long().cumprod(-1).bool()

        return [first] + [(self._to_positions(state), leading) for state in states]

    def _to_positions(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.patch_size)).flatten(2)  # (B, T, d) to (B, N, D)

    def _to_tokens(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.patch_size, -1)).flatten(1, 2)  # (B, N, D) to (B, T, d)


def _checked_temperatures(temperatures: Sequence[float], num_flows: int) -> list[float]:
    temperatures = list(temperatures)
    if len(temperatures) != num_flows:
        raise ValueError(
            f"flow_temperatures has {len(temperatures)} entries for {num_flows} flows: {temperatures}."
        )
    if not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"flow_temperatures must be positive and finite, not {temperatures}.")

    return temperatures


def _is_variable(h: Tensor, lengths: Tensor | None, observed_ids: Tensor | None) -> Tensor | None:
    """Where positions (B, N) are neither padding nor observed; None where none is."""
    if lengths is None and observed_ids is None:
        return None

    is_variable = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    if lengths is not None:
        is_variable = torch.arange(h.shape[1], device=h.device) < lengths.unsqueeze(-1)

    return is_variable if observed_ids is None else is_variable & (observed_ids[..., 0] < 0)


def _zero_unless(mask: Tensor | None, x: Tensor) -> Tensor:
    """x (B, N, ...) where the mask (B, N) is True, 0 elsewhere; without a mask, x."""
    return x if mask is None else x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), 0)


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
        raise ValueError(
            f"attention_mask must have shape (B, T) = {tuple(shape)}, not {tuple(attention_mask.shape)}."
        )

    mask = attention_mask != 0
    lengths = mask.sum(-1)
    is_right_padded = (
        mask == (torch.arange(shape[1], device=mask.device) < lengths[:, None])
    ).all()
    _require(
        is_right_padded,
        "attention_mask has holes or padding on the left: only right padding is possible.",
    )
    _require((lengths > 0).all(), "attention_mask has a sequence without any real token.")
    _require(
        (lengths % patch_size == 0).all(),
        f"Every real length must be a multiple of patch_size, {patch_size}.",
    )

    return lengths // patch_size


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


@dataclass
class TarFlowLMOutput(ModelOutput):
    """Output of [`TarFlowLMModel`]; everything in nats, and elbo = reconstruction + prior -
    posterior.
    """

    loss: Tensor | None = None  # scalar, -elbo per real token
    elbo: Tensor | None = None  # (B,)
    reconstruction_log_prob: Tensor | None = None  # (B,) log p(x | z)
    prior_log_prob: Tensor | None = None  # (B,) log p(z)
    posterior_log_prob: Tensor | None = None  # (B,) log q(z | x)
    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)


class TarFlowLMPreTrainedModel(PreTrainedModel):
    """What the library needs to know about the model: its parts, their initialisation, and how it
    loads.
    """

    config_class = TarFlowLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = (
        False  # the loss is a mean over this batch's real tokens; Trainer averages the batches
    )
    _no_split_modules = ["FlowLayer"]
    _keep_in_fp32_modules_strict = ["codebook"]  # its scales are far finer than bfloat16's steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As in the library, but a checkpoint that does not fit the model is an error, not a
        warning.

        With `output_loading_info` the caller gets the library's report, and judges.

        Raises:
            ValueError: Weights are missing, left over, or of another shape; the message names them.
        """
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        kinds = ["missing_keys", "unexpected_keys"] + (
            [] if ignore_mismatched_sizes else ["mismatched_keys"]
        )

        faults = [f"{kind} {sorted(map(str, info[kind]))}" for kind in kinds if info[kind]]
        if faults and not output_loading_info:
            raise ValueError(
                f"The checkpoint {args[0] if args else ''} does not fit the model: {'; '.join(faults)}."
            )

        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Codebook):
            init.normal_(module.mean)
            init.constant_(module.log_scale, self.config.initial_log_scale)
        elif isinstance(
            module, (FlowLayer, ObservedEmbedding, CouplingHead, PatchDecoder, MixtureLogits)
        ):
            module.init_weights(self.config.initializer_range)


class TarFlowLMModel(TarFlowLMPreTrainedModel, TarFlowLMGenerationMixin, GenerationMixin):
    """A language model that flows: tokens to latents by a codebook, latents to noise by a stack of
    flows.

    `model.flow` is the stack, `model.codebook` the encoder and decoder. `generate` inverts the
    stack.

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

        # Said outright, because `pipeline` samples at another temperature where a model has no
        # opinion.
        self.generation_config.update(do_sample=True, temperature=1.0)
        self.generation_config._from_model_config = (
            False  # or else saving forgets the options that are our own
        )
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
        observed_mask: Tensor | None = None,
        latent_noise: Tensor | None = None,
        **not_given: None,
    ) -> TarFlowLMOutput:
        """The evidence lower bound of each sequence, from one sample of its latents.

        With `observed_mask`, of a conditional model, it bounds log p(x_missing | x_observed), and
        all terms are those of the missing tokens.

        Args:
            input_ids: Token ids (B, T), T a multiple of the patch size.
            attention_mask: (B, T), 1 for real tokens and 0 for padding on the right.
            labels: Asks for the loss: `input_ids`, where padding and observed tokens may be -100.
                The bound is that of whole sequences, so no other token can be left out of it.
            latents: Latents (B, T, d) to take instead of a sample of q(z | x).
            generator: Source of the sample's noise.
            num_flows: Score the stack cut after its first flows.
            output_noise: Compute `noise` too, which the likelihood does not need.
            observed_mask: Of a conditional model, 1 (or True) at the tokens that are given, (B, T),
                whole patches.
            latent_noise: The N(0, I) noise (B, T, d) of the sample of q(z | x), in place of the
                generator's.
            not_given: What wrappers such as PEFT's hand to every model (`inputs_embeds=None`,
                `return_dict=None`).

        Returns:
            [`TarFlowLMOutput`]. The loss is the mean over the missing tokens.

        Raises:
            ValueError: Ids outside the vocabulary, labels other than the ids, an empty or too long
                sequence, a length that is no multiple of the patch size, a mask that is not right
                padding, an `observed_mask` that covers parts of patches or a whole sequence, or
                that the model is not conditional for.
            TypeError: Another argument is given, and is not None.
        """
        if unknown := sorted(name for name, value in not_given.items() if value is not None):
            raise TypeError(f"TarFlowLMModel.forward() has no arguments {unknown}.")

        input_ids = self._check_ids(input_ids, attention_mask)
        if latents is None:
            latents = self.codebook().sample(input_ids, generator, latent_noise)

        flow = self.flow(
            latents,
            attention_mask,
            num_flows=num_flows,
            output_noise=output_noise,
            observed_ids=input_ids,
            observed_mask=observed_mask,
        )
        is_scored = None if attention_mask is None else attention_mask != 0

        if observed_mask is not None:
            is_scored = (
                observed_mask == 0 if is_scored is None else is_scored & (observed_mask == 0)
            )

        if labels is not None:
            is_label = labels == input_ids
            _require(
                (is_label if is_scored is None else is_label | ~is_scored).all(),
                "labels must equal input_ids at every real token, because the bound is that of whole sequences: give "
                "labels=input_ids, or give a collator that writes -100 a padding token of its own.",
            )

        def total(per_token: Tensor) -> Tensor:
            return _zero_unless(is_scored, per_token).sum(-1)

        posterior_log_prob = total(self.codebook().log_prob(latents, input_ids))
        # log p(x | z) - log q(z | x) is the same for all x: no term of the bound but the sum over
        # the codebook.
        reconstruction_minus_posterior = -total(self.codebook().log_total(latents))
        elbo = flow.log_prob + reconstruction_minus_posterior
        loss = None

        if labels is not None:
            num_tokens = input_ids.numel() if is_scored is None else is_scored.sum()
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

    def resize_token_embeddings(self, *args, **kwargs):
        """Not possible: the latents of the tokens share one space, which the flows have been
        trained for.
        """
        raise NotImplementedError(
            "A trained vocabulary is fixed: its codebook is what the flows model. Make a TarFlowLMConfig with another "
            "vocab_size, and train it."
        )

    def encode(
        self,
        input_ids: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """A sample of q(z | x), reparametrised: ids (B, T) to latents (B, T, d), of the given N(0,
        I) noise if any.
        """
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
        observed_mask: Tensor | None = None,
    ) -> Tensor:
        """The bound log((1 / S) sum_s exp(elbo_s)) <= log p(x) of each sequence, (B,) in nats.

        With `observed_mask`, of a conditional model, it bounds log p(x_missing | x_observed).

        S = `num_samples` independent samples of the latents; with S = 1 it is the ELBO. Its
        expectation rises with S towards log p(x) (Burda et al., *Importance Weighted Autoencoders*,
        ICLR 2016, arXiv:1509.00519).
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}.")
        options = {"generator": generator, "num_flows": num_flows, "observed_mask": observed_mask}
        samples = [self(input_ids, attention_mask, **options).elbo for _ in range(num_samples)]
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
