"""TarFlowLM: a language model in continuous latent space, made of stacked autoregressive flows.

    tokens x  --codebook-->  latents z = h0  --flow 1-->  h1  --flow 2-->  ...  --flow L-->  noise u ~ N(0, I)

A flow walks the positions in one direction. A causal decoder reads the flow's input at the
positions already passed; its output parametrises an invertible coupling of the next one. Training
maps all positions at once; sampling inverts them one after another. Directions alternate over the
stack, which is what gives context from both sides.

Shapes: B batch, T tokens, d latent size of a token, P patch size, N = T / P positions of size
D = P d, w hidden size, V tokens in the vocabulary, K mixture components, L flows.

References:
    Zhang et al., *Flexible Language Modeling in Continuous Space with Transformer-based
    Autoregressive Flows*, NeurIPS 2025, arXiv:2507.00425.
    Zhai et al., *Normalizing Flows are Capable Generative Models*, ICML 2025, arXiv:2412.06329.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.utils import can_return_tuple

from .checks_tarflowlm import (
    check_given,
    check_ids,
    check_labels,
    check_latents,
    check_not_given,
    check_size,
    check_stack_arguments,
)
from .codebook import Codebook, Gaussians
from .configuration_tarflowlm import TarFlowLMConfig
from .coupling_head import at_least_one
from .coupling_heads import COUPLING_HEADS
from .decoder_tarflowlm import FlowDecoder
from .evaluation_noise import fixed_noise
from .generation_tarflowlm import TarFlowLMGenerationMixin
from .inverse_options import FlowInverse, InverseOptions, InverseReport
from .inversion_tarflowlm import evaluating, invert, transform_sequentially
from .normal import normal_log_prob
from .outputs_tarflowlm import FlowOutput, TarFlowLMOutput, mean_loss, observed_by, scored_tokens
from .pretrained_tarflowlm import TarFlowLMPreTrainedModel
from .slots_tarflowlm import (
    Channels,
    Known,
    Layout,
    Order,
    add_observed,
    known_slots,
    make_layout,
    make_order,
    mask_of_patches,
    observe,
    to_positions,
    to_tokens,
    zero_unless,
)

# --------------------------------------------------------------------------------------------------
# One flow
# --------------------------------------------------------------------------------------------------


class FlowLayer(FlowDecoder):
    """One autoregressive flow: a causal decoder over the positions, and a coupling.

    Position n is transformed with parameters that read positions < n in the flow's own order, so
    the Jacobian is block triangular and its log-determinant the sum over positions. `FlowDecoder`
    has the shift (`inputs`) and the decoder (`context`).
    """

    def __init__(self, config: TarFlowLMConfig, index: int):
        flow = config.flows[index]
        super().__init__(config, flow)
        self.head = COUPLING_HEADS[flow["coupling"]].make(config, flow)
        self.direction = flow["direction"]
        self.channels = Channels(
            patch_size=config.patch_size,
            num_shuffles=index if config.patch_size > 1 else 0,
            is_reversed=self.direction == "right_to_left_within_patch",
        )

        # For `choose_inverse_methods`.
        is_shallow = flow["context"] == "latent" and flow["num_hidden_layers"] <= 4
        self.is_shallow = is_shallow and self.head.is_smooth

    def forward(self, h: Tensor, *arguments: Any, task: str = "transform", **options: Any):
        """Runs `transform`, `transform_sequentially` or `invert`, whichever `task` names.

        All go through `forward`, because the hooks of offloading and sharding see calls of `forward` only.
        """
        return getattr(self, task)(h, *arguments, **options)

    def transform(
        self,
        h: Tensor,
        codebook: Gaussians,
        layout: Layout = Layout(),  # noqa: B008
        log_prob_only: bool = False,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Maps positions h (B, N, D) to noise: shift, decode, couple, sum.

        Args:
            h: Input of the flow.
            codebook: The encoder's, as tensors.
            layout: Which positions are variables.
            log_prob_only: Return log p(h) only; no distribution function is computed.

        Returns:
            The noise u (B, N, D), 0 at what is no variable, and log_det (B,) in nats; or log p(h) (B,) in nats.
        """
        order = self.order(h, layout)
        observed = observe(layout, order, self.observed_embedding)
        h = order.arrange(h)

        inputs = self.inputs(h, codebook, observed)  # (B, N, w): slot s reads position s - 1
        context = self.context(inputs, observed)  # (B, N, w)

        if log_prob_only:
            log_prob = self.head(h, context, codebook, task="log_prob")  # (B, N)
            return layout.keep_variables(order.from_slots(log_prob)).sum(-1)

        u, log_det = self.head(h, context, codebook)  # (B, N, D), (B, N)
        log_det = layout.keep_variables(order.from_slots(log_det)).sum(-1)
        return layout.keep_variables(order.rearrange(u)), log_det

    def transform_sequentially(self, h: Tensor, codebook: Gaussians, layout: Layout) -> Tensor:
        """The noise of `transform`, from contexts that are rounded as those of `invert`."""
        order = self.order(h, layout)
        observed = observe(layout, order, self.observed_embedding)
        u = transform_sequentially(self, order.arrange(h), codebook, observed)
        return layout.keep_variables(order.rearrange(u))

    def invert(
        self,
        u: Tensor,
        codebook: Gaussians,
        layout: Layout = Layout(),  # noqa: B008
        known: Known | None = None,
        options: FlowInverse = FlowInverse(),  # noqa: B008
    ) -> tuple[Tensor, InverseReport]:
        """Maps noise u (B, N, D) back to positions, slot by slot: the inverse of `transform`.

        Args:
            u: Output of the flow.
            codebook, layout: As in `transform`.
            known: States that are given at some positions, and come back as they are; the noise is not read there.
            options: The options of this flow; `on_position` gets latents (B, P, d).

        Returns:
            The input h (B, N, D), 0 at what is no variable, and a report.
        """
        order = self.order(u, layout)
        observed = observe(layout, order, self.observed_embedding)
        u = order.arrange(u)

        known = known_slots(known, layout, order, u)
        if known is not None:
            u = u.masked_fill(known.mask.unsqueeze(-1), 0)  # it may be anything there

        options = options.for_slots(order)
        h, report = invert(self, u, codebook, observed, known, options)
        return layout.keep_variables(order.rearrange(h)), report

    def invert_position(
        self, u: Tensor, context: Tensor, codebook: Gaussians, options: FlowInverse
    ) -> Tensor:
        """The states (B, n, D) that the coupling maps to u (B, n, D), from contexts (B, n, w)."""
        processor = {}
        if options.logits_processor is not None:
            processor["logits_processor"] = options.logits_processor

        state = self.head(u, context, codebook, task="inverse", **processor)
        # A search for the inverse can end at a finite state whatever it is given. Noise or a context
        # that is not finite makes NaN of it, which `generate` finds.
        return state + 0 * (u + context.sum(-1, keepdim=True, dtype=state.dtype))

    def order(self, h: Tensor, layout: Layout = Layout()) -> Order:  # noqa: B008
        """The order in which this flow passes the positions of h (B, N, D)."""
        return make_order(self.channels, self.direction == "right_to_left", layout, h)


# --------------------------------------------------------------------------------------------------
# The stack
# --------------------------------------------------------------------------------------------------


class FlowStack(nn.Module):
    """The prior p(z): flows from the data side to the noise side, and the encoder's codebook."""

    def __init__(self, config: TarFlowLMConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.longest = config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self.is_conditional = config.conditional
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
        observed_ids: Tensor | None = None,
        observed_mask: Tensor | None = None,
        codebook: Gaussians | None = None,
        **inverse_options: Any,
    ) -> FlowOutput:
        """Maps latents to noise, or with `reverse` noise to latents.

        log p(z) = sum_l log|det dh_l/dh_(l-1)| + log N(h_L; 0, I). A mixture coupling's log-determinant is
        log p_mix(h_(l-1)) - log N(h_l; 0, I), so that the last flow's share is its log p_mix: without
        `output_noise` that flow computes no distribution function.

        Args:
            latents: (B, T, d); the noise, with `reverse`.
            attention_mask: (B, T), 1 for real tokens and 0 for padding, on the right or the left.
            num_flows: Cut the stack after its first flows; it is a model of its own, with base N(0, I).
            output_noise: Compute `noise`, `log_det` and the last of the `states`, not `log_prob` only.
            known, known_mask: With `reverse`, latents (B, T, d) that are held fixed, and where, (B, T). If no flow
                runs right to left, those before the first unknown one are given to every flow, which is exact: the
                others follow p(z_new | z_known). All others are held fixed in the first flow only.
            observed_ids, observed_mask: In a conditional model, token ids (B, T) and where they are observed, (B, T).
                Only the other tokens have latents: the flow is that of p(z_missing | x_observed), both ways.
            codebook: The codebook's tensors, if they have been read already.
            inverse_options: With `reverse`, the fields of [`InverseOptions`].

        Returns:
            A `FlowOutput`. At padding and at observed tokens, noise and states are 0.

        Raises:
            ValueError: If latents or masks have another shape, T or a real length is no multiple of the patch size, T
                too long, a mask has holes, a patch is known, observed or padding in part, `num_flows` is not in 1, ...,
                L, `observed_mask` covers a whole sequence or the model is not conditional, or an option of the inverse
                is out of range.
            TypeError: If options of the inverse are given without `reverse`.
        """
        codebook = self.codebook() if codebook is None else codebook
        check_latents(latents, codebook.mean.shape[-1], self.patch_size, self.longest)
        of_inverse = {"known": known, "known_mask": known_mask, **inverse_options}
        check_stack_arguments(num_flows, self, reverse, of_inverse, observed_mask)

        layers = self.layers[:num_flows]
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        h = to_positions(latents, self.patch_size)

        layout = make_layout(h, self.patch_size, attention_mask)
        if observed_mask is not None:
            observed = observed_ids, observed_mask, self.patch_size, self.vocab_size
            layout = add_observed(layout, h, *observed)

        h = layout.keep_variables(h)
        if not reverse:
            return self._transform(layers, h, codebook, layout, output_noise)

        check_given(latents.shape[:2], latents.shape[2], known=known, known_mask=known_mask)
        known = self._known(layers, codebook, layout, known, known_mask)
        return self._invert(layers, h, codebook, layout, known, InverseOptions(**inverse_options))

    def _transform(
        self,
        layers: Sequence[FlowLayer],
        h: Tensor,
        codebook: Gaussians,
        layout: Layout,
        output_noise: bool = True,
    ) -> FlowOutput:
        states, log_det = [h], 0.0
        for layer in layers if output_noise else layers[:-1]:
            h, layer_log_det = layer(h, codebook, layout)
            log_det = log_det + layer_log_det
            states.append(h)

        tokens = tuple(to_tokens(state, self.patch_size) for state in states)
        if not output_noise:
            log_prob = log_det + layers[-1](h, codebook, layout, log_prob_only=True)
            return FlowOutput(latents=tokens[0], log_prob=log_prob, states=tokens)

        log_prob = log_det + layout.keep_variables(normal_log_prob(h).sum(-1)).sum(-1)
        return FlowOutput(tokens[0], tokens[-1], log_det, log_prob, tokens)

    def _invert(
        self,
        layers: Sequence[FlowLayer],
        h: Tensor,
        codebook: Gaussians,
        layout: Layout,
        known: list[Known | None],
        inverse: InverseOptions,
    ) -> FlowOutput:
        needs_gradients = h.requires_grad or any(p.requires_grad for p in self.parameters())
        is_differentiable = torch.is_grad_enabled() and needs_gradients
        options = inverse.for_flows(layers, h, is_differentiable)

        states, reports = [], []
        for index in reversed(range(len(layers))):
            h = h if options[index].temperature == 1 else options[index].temperature * h
            states.append(h)
            inverse.show(h, self.patch_size)
            with evaluating(layers[index]):
                h, report = layers[index](
                    h, codebook, layout, known[index], options[index], task="invert"
                )

            reports.append(report)

        states.append(h)
        tokens = tuple(to_tokens(state, self.patch_size) for state in reversed(states))
        return FlowOutput(
            latents=tokens[0], noise=tokens[-1], states=tokens, inverse_reports=reports[::-1]
        )

    def _known(
        self,
        layers: Sequence[FlowLayer],
        codebook: Gaussians,
        layout: Layout,
        known: Tensor | None,
        known_mask: Tensor | None,
    ) -> list[Known | None]:
        """Returns the known part of each flow's input, if some latents (B, T, d) are given."""
        if known is None:
            return [None] * len(layers)

        mask = mask_of_patches("known_mask", known_mask, self.patch_size)
        h = to_positions(known, self.patch_size)
        if len(layers) == 1 or any(layer.direction == "right_to_left" for layer in layers):
            return [Known(h, mask)] + [None] * (len(layers) - 1)

        # Left to right, the states of the first positions depend on nothing behind them.
        h = zero_unless(mask, h)
        leading = (~layout.keep_variables(~mask)).long().cumprod(-1).bool()
        with evaluating(self):
            states = self._transform(layers[:-1], h, codebook, layout).states[1:]

        states = [to_positions(state, self.patch_size) for state in states]
        return [Known(h, mask)] + [Known(state, leading) for state in states]


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class TarFlowLMModel(TarFlowLMPreTrainedModel, TarFlowLMGenerationMixin, GenerationMixin):
    """A language model that flows: tokens to latents by a codebook, latents to noise by flows.

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
        # Set explicitly: `pipeline` has its own default temperature for models that set none.
        self.generation_config.update(do_sample=True, temperature=1.0)
        # Otherwise saving forgets the options that are this model's own.
        self.generation_config._from_model_config = False
        self.post_init()
        self.check_decoders()

    @property
    def codebook(self) -> Codebook:
        return self.flow.codebook

    @can_return_tuple
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
        num_items_in_batch: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        **not_given: None,
    ) -> TarFlowLMOutput:
        """The evidence lower bound of each sequence, from one sample of its latents.

        With `observed_mask`, in a conditional model, it bounds log p(x_missing | x_observed), and
        all terms are those of the missing tokens.

        Args:
            input_ids: Token ids (B, T), T a multiple of the patch size.
            attention_mask: (B, T), 1 for real tokens and 0 for padding, on the right or the left.
            labels: Asks for the loss: `input_ids`, where padding and observed tokens may be -100.
                In a conditional model without an `observed_mask`, the real tokens of label -100 are the observed ones:
                a prompt, for example. A collator that masks by the id of padding may hide real tokens of the same id
                (an end token): behind the beginning of a sequence they count as real. No other token can be left out
                of the bound, which is that of whole sequences.
            latents: Latents (B, T, d) to take instead of a sample of q(z | x).
            generator: Source of the sample's noise.
            num_flows: Score the stack cut after its first flows.
            output_noise: Compute `noise` too, which the likelihood does not need.
            observed_mask: In a conditional model, 1 (or True) at the tokens that are given, (B, T),
                whole patches.
            latent_noise: The N(0, I) noise (B, T, d) of the sample of q(z | x), in place of the generator's. Without
                any of `latents`, `generator` and `latent_noise`, a model in training draws it from the global
                generator. In eval mode a row's noise follows from its tokens: equal weights give equal losses.
            num_items_in_batch: The number of labels other than -100 in all batches of an
                optimiser's step, by which `Trainer` asks to divide.
            position_ids: Taken if they count the real tokens of each sequence from 0, as the model does.
            output_hidden_states: Return the states of the flows as `hidden_states`.
            use_cache, not_given: Taken, and without effect. Wrappers such as PEFT's hand arguments
                to every model that are None or False (`inputs_embeds=None`).

        Returns:
            [`TarFlowLMOutput`], a tuple with `return_dict=False`. The loss is the mean over the missing tokens.

        Raises:
            ValueError: If ids are outside the vocabulary, labels are not the ids, a sequence is
                empty, too long or no multiple of the patch size, a mask has holes, `observed_mask`
                covers parts of patches or a whole sequence, or is given to a model that is not
                conditional, or positions are not counted from 0.
            TypeError: If another argument is given, and is neither None nor False.
        """
        check_not_given(not_given)
        self._leave_no_trace()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        # 1. Which tokens are scored.
        input_ids = check_ids(input_ids, self.config, attention_mask, position_ids)
        given = {"labels": labels, "observed_mask": observed_mask, "latents": latents}
        check_given(input_ids.shape, self.config.latent_size, **given, latent_noise=latent_noise)
        if labels is not None and observed_mask is None and self.config.conditional:
            observed_mask = observed_by(labels, input_ids, attention_mask, self.config.pad_token_id)

        is_scored = scored_tokens(attention_mask, observed_mask)
        if labels is not None:
            check_labels(labels, input_ids, is_scored, self.config.pad_token_id)

        # 2. Tokens to latents.
        codebook = self.codebook()
        if latents is None:
            if latent_noise is None and generator is None and not self.training:
                latent_noise = fixed_noise(input_ids, self.config.latent_size, attention_mask)

            latents = codebook.sample(input_ids, generator, latent_noise)

        # 3. Latents to noise.
        flow = self.flow(
            latents,
            attention_mask,
            num_flows=num_flows,
            output_noise=output_noise or output_hidden_states,
            observed_ids=input_ids,
            observed_mask=observed_mask,
            codebook=codebook,
        )

        # 4. The bound. log p(x | z) - log q(z | x) is minus the sum over the codebook, whatever x is.
        posterior = zero_unless(is_scored, codebook.log_prob(latents, input_ids)).sum(-1)
        difference = -zero_unless(is_scored, codebook.log_total(latents)).sum(-1)
        elbo = flow.log_prob + difference
        if self.config.conditional and observed_mask is None and torch.is_grad_enabled():
            elbo = elbo + self._zero_of_unused()

        output = TarFlowLMOutput(
            loss=mean_loss(elbo, labels, is_scored, num_items_in_batch),
            elbo=elbo,
            reconstruction_log_prob=difference + posterior,
            prior_log_prob=flow.log_prob,
            posterior_log_prob=posterior,
            latents=latents,
            noise=flow.noise,
            hidden_states=flow.states if output_hidden_states else None,
        )
        if observed_mask is None and not torch.compiler.is_compiling():
            output._make_logits = self._logits_maker(latents, codebook, num_flows, attention_mask)
        if labels is None and num_items_in_batch is not None:  # `Trainer` has taken them away
            output.keep_label_logits(input_ids, is_scored, self.config.vocab_size)

        return output

    def encode(
        self,
        input_ids: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, T, d) drawn from q(z | x), by noise (B, T, d) that is drawn or given."""
        ids = check_ids(input_ids, self.config)
        check_given(ids.shape, self.config.latent_size, noise=noise)
        return self.codebook().sample(ids, generator, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """log p(x | z) in nats, normalised over the vocabulary: (B, T, d) to (B, T, V)."""
        check_size(latents, self.config.latent_size)
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

        With `observed_mask`, in a conditional model, it bounds log p(x_missing | x_observed).

        S = `num_samples` independent samples of the latents; with S = 1 it is the ELBO. Its
        expectation rises with S towards log p(x) (Burda et al., *Importance Weighted Autoencoders*,
        ICLR 2016, arXiv:1509.00519).

        Raises:
            ValueError: If `num_samples` is below 1, or `forward` refuses an argument.
        """
        at_least_one("num_samples", num_samples)
        input_ids = check_ids(input_ids, self.config, attention_mask)
        options = {"generator": generator, "num_flows": num_flows, "observed_mask": observed_mask}
        samples = []
        for index in range(num_samples):
            if generator is None and not self.training:
                sizes = self.config.latent_size, attention_mask, index
                options["latent_noise"] = fixed_noise(input_ids, *sizes)

            samples.append(self(input_ids, attention_mask, **options).elbo)

        return torch.logsumexp(torch.stack(samples), 0) - math.log(num_samples)


__all__ = ["TarFlowLMModel", "TarFlowLMPreTrainedModel"]
