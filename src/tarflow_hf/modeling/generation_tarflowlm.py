"""`generate`: noise -> inverse flows -> latents -> tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    GenerationMode,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput, logging

from .checks_tarflowlm import check_ids
from .inversion_tarflowlm import InverseReport
from .slots_tarflowlm import Pieces

logger = logging.get_logger(__name__)

# The options of a GenerationConfig that mean something here, the library's and some of our own.
OPTIONS = (
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "do_sample",
    "temperature",
    "flow_temperatures",
    "mixture_temperature",
    "top_k",
    "top_p",
    "num_candidates",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "return_dict_in_generate",
    "use_cache",
)


@dataclass
class TarFlowLMGenerateOutput(ModelOutput):
    """What [`TarFlowLMModel.generate`] returns with `return_dict_in_generate` or another
    `output_...`.
    """

    sequences: Tensor | None = None  # (B, T)
    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)
    states: tuple[Tensor, ...] | None = None  # h0 (latents), ..., hL (noise), each (B, T, d)
    inverse_reports: list[InverseReport] | None = (
        None  # how each flow was inverted, from the data side
    )
    elbo: Tensor | None = (
        None  # (B,) nats: with `num_candidates` above 1, the bound by which each was chosen
    )


class TarFlowLMGenerationMixin(GenerationMixin):
    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer=None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        decode: str | None = None,
        output_states: bool = False,
        infill_mask: Tensor | None = None,
        num_flows: int | None = None,
        inverse_method: str | Sequence[str] = "auto",
        inverse_window: int | None = None,
        inverse_tolerance: float | None = None,
        capture_step: bool = False,
        output_inverse_report: bool = False,
        **kwargs: Any,
    ) -> Tensor | TarFlowLMGenerateOutput:
        """Samples sequences: draws noise u ~ N(0, I), inverts the flows from the last to the first,
        decodes.

        With a prompt it continues that; with `infill_mask` it fills gaps in a text. How exact that
        is, and the tests in the repository that show it:

        - Without a prompt, exact: the tokens follow the model's distribution, where `decode`
          samples them
          (`tests/modeling/test_modeling.py::test_sampled_tokens_follow_the_enumerated_distribution`).
        - A prompt, or a gap at the end of a text, where no flow runs right to left: the latents of
          what is known are drawn from q(z | x), and the rest follows p(z_new | z_known) exactly
          (`tests/modeling/test_generation.py::test_a_continuation_follows_its_enumerated_distribution`,
          `tests/modeling/test_generation.py::test_a_prompt_is_exact_where_no_flow_runs_right_to_left`,
          `tests/modeling/test_generation.py::test_a_gap_at_the_end_is_a_prompt`).
        - A prompt, or any gaps, of a conditional model: exact for the distribution p(x_missing |
          x_observed) that it was trained for, and that `model(input_ids, observed_mask=...)` bounds
          (`tests/modeling/test_conditional.py::test_infilled_tokens_follow_the_enumerated_distribution`).
        - Anything else is an approximation, about which one warning is given: what is known is held
          fixed in the first flow only (`test_known_latents_stay_where_they_are`).

        Texts of different lengths may share a batch: each is continued or filled as it would be
        alone (`tests/modeling/test_generation.py::test_prompts_of_different_lengths_share_a_batch`,
        `tests/modeling/test_generation.py::test_an_infill_keeps_every_known_token`).

        Steering is for taste: what `temperature`, `flow_temperatures`, `mixture_temperature`,
        `top_k`, `top_p` and `num_candidates` leave at their defaults is the model's own
        distribution, and what they change is not.

        Args:
            inputs (`torch.LongTensor` of shape (B, n), *optional*): Prompt, or text with gaps, also
                accepted as `input_ids`.
            attention_mask (`torch.Tensor` of shape (B, n), *optional*): 0 where that has padding,
                on either side. What is returned has it there, too, before the new tokens.
            generation_config ([`GenerationConfig`], *optional*): Options; those given as keywords
                win.
            streamer (*optional*): Receives the prompt, then tokens as the first flow completes
                them.
            generator ([`torch.Generator`], *optional*): Source of all randomness; the global one by
                default.
            noise (`torch.Tensor` of shape (B, T, d), *optional*): The noise itself: the same noise
                gives the same tokens. T counts the prompt, whose latents are drawn by the noise
                there, and its padding.
            decode ("argmax" or "sample"): How tokens follow from latents: the most likely under p(x
                | z), the default, or a sample of it.
            infill_mask (`torch.Tensor` of shape (B, T), *optional*): 1 (or True) at the tokens of
                `inputs` to fill in, whatever their ids; all others are held fixed. The text keeps
                its length, and an end-of-sequence token ends nothing.
            output_states (`bool`): Also return every flow's state, see [`TarFlowLMGenerateOutput`].
            num_flows (`int`, *optional*): Invert the first flows only. `noise` is then the state h
                of that flow (of `output_states`, or of `model.flow`), and what is drawn without it
                is a sample of the stack cut there.
            inverse_method ("auto", "sequential" or "parallel", or a list with one for each flow):
                How the flows are inverted, position after position or many at once. The result is
                the same up to rounding
                (`tests/modeling/test_inversion.py::test_every_method_gives_the_sequential_inverse`,
                `tests/modeling/test_inversion.py::test_a_hard_flow_still_ends_right`); "auto" takes what is
                expected to be faster, see `choose_inverse_methods`.
            inverse_window, inverse_tolerance (*optional*): Of the parallel form, see
                `invert_in_parallel`.
            capture_step (`bool`): On a GPU, take the sequential form's steps by a CUDA graph. Not
                run on one yet.
            output_inverse_report (`bool`): Also return each flow's [`InverseReport`].
            max_new_tokens, max_length (`int`): Length; by default that which the model was made
                for, `max_position_embeddings`, which is also the most.
            num_return_sequences (`int`): Sequences per prompt.
            temperature (`float`): Standard deviation of the noise that is drawn, 1 by default.
            flow_temperatures (`list[float]`): One for each inverted flow, from the data side: the
                factor by which the state on its noise side is multiplied before it is inverted. The
                noise enters the last flow alone, so [1, ..., 1, t] is what `temperature=t` is (the
                two multiply); the others scale the states in between, which the flows behind have
                just made.
            mixture_temperature (`float`): Of the mixture weights of every "mixture_rosenblatt"
                flow, which become proportional to their power 1 / mixture_temperature. In a flow
                with the encoder's codebook these are the probabilities of the tokens.
            top_k (`int`), top_p (`float`): In every such flow, only the k components of the largest
                weights, or the fewest that together have the weight p; after the temperature, as in
                the library. 0 and 1, the defaults, leave all of them in.
            num_candidates (`int`): Draw so many for each sequence, as one batch, and return the one
                with the highest evidence lower bound (`model(ids).elbo`) of the whole text, prompt
                and what follows an end-of-sequence token included; in a conditional model that of
                what is new given what is known. The candidates of a sequence share the noise of its
                one-sample estimate.
            do_sample (`bool`): True by default; False puts the noise at its mode, 0.
            eos_token_id, pad_token_id: After the first end-of-sequence token of a sequence comes
                padding.
            return_dict_in_generate (`bool`): Return a [`TarFlowLMGenerateOutput`].

        Returns:
            Token ids (B, T), prompt included (with its padding, where latents and states are 0), or
            a [`TarFlowLMGenerateOutput`].

        Raises:
            ValueError: An unknown option or one out of range, mixture weights steered where no flow
                has them, `num_candidates` with `noise` or a streamer, a prompt with no room behind
                it, a prompt or a continuation whose length is no multiple of the patch size, a gap
                that is not of whole patches, a text without a gap.

        Example:
            >>> from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
            >>> config = TarFlowLMConfig(vocab_size=27, latent_size=2, hidden_size=32, num_attention_heads=4, flows=[
            ...     {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
            ... ])
            >>> model = TarFlowLMModel(config).eval()
            >>> noise = torch.randn(3, 8, 2)
            >>> tokens = model.generate(noise=noise)
            >>> tokens.shape, torch.equal(tokens, model.generate(noise=noise))
            (torch.Size([3, 8]), True)
        """
        input_ids = kwargs.pop("input_ids", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("Give the prompt as inputs or as input_ids, not as both.")

        prompt = inputs if input_ids is None else input_ids
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is not None and (prompt is None or attention_mask.shape != prompt.shape):
            shapes = (
                f"{tuple(attention_mask.shape)}, {None if prompt is None else tuple(prompt.shape)}"
            )
            raise ValueError(f"attention_mask must have the shape of the prompt: {shapes}.")

        if prompt is not None and (prompt.ndim != 2 or prompt.is_floating_point()):
            raise ValueError(
                f"The prompt must be integers of shape (B, n): {prompt.dtype}, {tuple(prompt.shape)}."
            )
        if noise is not None and noise.ndim != 3:
            raise ValueError(f"noise must have shape (B, T, d), not {tuple(noise.shape)}.")
        if unknown := sorted(set(kwargs) - set(OPTIONS)):
            raise ValueError(
                f"generate has no options {unknown}; its options are {', '.join(OPTIONS)}."
            )

        for config in (generation_config, self.generation_config):
            mode = GenerationMode.SAMPLE if config is None else config.get_generation_mode()
            if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
                raise ValueError(
                    f"The generation config asks for {mode.value}, which chooses among distributions of the next "
                    "token. A flow has none: it samples latents, or with do_sample=False takes the noise at its mode."
                )

        def option(name: str, default: Any) -> Any:
            for source in (kwargs.get(name), getattr(generation_config, name, None)):
                if source is not None:
                    return source
            value = getattr(self.generation_config, name, None)
            return default if value is None else value

        decode = option("decode", "argmax") if decode is None else decode
        if decode not in ("argmax", "sample"):
            raise ValueError(f'decode must be "argmax" or "sample", not {decode!r}.')

        temperature = option("temperature", 1.0)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, not {temperature}.")

        num_return_sequences = option("num_return_sequences", 1)
        if not isinstance(num_return_sequences, int) or num_return_sequences < 1:
            raise ValueError(
                f"num_return_sequences must be an integer of at least 1, not {num_return_sequences!r}."
            )

        num_candidates = option("num_candidates", 1)
        if not isinstance(num_candidates, int) or num_candidates < 1:
            raise ValueError(
                f"num_candidates must be an integer of at least 1, not {num_candidates!r}."
            )
        if num_candidates > 1 and noise is not None:
            raise ValueError(
                f"noise already is that of one candidate: leave out num_candidates={num_candidates}."
            )
        if num_candidates > 1 and streamer is not None:
            raise ValueError(
                f"A streamer cannot wait for the best of num_candidates={num_candidates}."
            )

        logits_processor = self._logits_processor(
            option("mixture_temperature", 1.0), option("top_k", 0), option("top_p", 1.0), num_flows
        )

        # Offloaded weights stand on the meta device, and hooks bring the inputs to where the work
        # is done.
        home = torch.device("cpu") if self.device.type == "meta" else self.device

        if prompt is None:
            prompt = torch.empty(
                1 if noise is None else len(noise), 0, dtype=torch.long, device=home
            )

        is_real = (
            torch.ones_like(prompt, dtype=torch.bool)
            if attention_mask is None
            else attention_mask != 0
        )
        if infill_mask is not None:
            self._check_infill(prompt, is_real, infill_mask, kwargs)

        is_known = is_real if infill_mask is None else is_real & (infill_mask == 0)
        if noise is None:
            prompt, is_real, is_known = (
                x.repeat_interleave(num_return_sequences * num_candidates, 0)
                for x in (prompt, is_real, is_known)
            )
        elif num_return_sequences != 1:
            raise ValueError(
                "noise already says how many sequences there are: leave out num_return_sequences."
            )

        length = prompt.shape[1]
        if infill_mask is None:
            length = self._length(
                is_real, noise, option("max_new_tokens", None), option("max_length", None)
            )

        shape = (len(prompt), length, self.config.latent_size)
        if noise is None:
            device = home if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device) * temperature
            noise = noise * (1.0 if option("do_sample", True) else 0.0)
        elif noise.shape != shape:
            raise ValueError(
                f"noise must have shape (B, T, d) = {shape}, not {tuple(noise.shape)}."
            )

        # The flows want what is real of a sequence in one piece: its padding goes to the end,
        # wherever it stood.
        num_new = length - prompt.shape[1]
        text = F.pad(prompt, (0, num_new))
        is_real = F.pad(is_real, (0, num_new), value=True)
        is_known = F.pad(is_known, (0, num_new), value=False)
        is_new = is_real & ~is_known
        first_new = int(is_new.any(0).int().argmax())
        pieces = Pieces(is_real.to(home))
        ids, is_known, is_real, noise = (
            pieces.gather(x.to(home)) for x in (text, is_known, is_real, noise)
        )
        ids = check_ids(ids.masked_fill(~is_known, 0), self.config)
        known = {}

        if bool(is_known.any()):
            by_patch = is_known.unflatten(1, (-1, self.config.patch_size))
            if bool((by_patch.any(-1) != by_patch.all(-1)).any()):
                raise ValueError(
                    f"infill_mask must cover whole patches of patch_size, {self.config.patch_size}, tokens."
                )

            if self.config.conditional:
                known = {"observed_ids": ids, "observed_mask": is_known}
            else:
                self._check_directions(is_known, num_flows, is_prompt=infill_mask is None)
                known = {"known": self.encode(ids, noise=noise), "known_mask": is_known}

        new_tokens: list[Tensor] = []

        def choose(latents: Tensor) -> Tensor:
            log_prob = self.decode(latents)
            if decode == "argmax":
                return log_prob.argmax(-1)

            probabilities = log_prob.exp().flatten(0, -2)
            if generator is not None:
                probabilities = probabilities.to(generator.device)

            return torch.multinomial(probabilities, 1, generator=generator).reshape(
                latents.shape[:-1]
            )

        eos_token_id = option("eos_token_id", None) if infill_mask is None else None

        def stream(latents: Tensor) -> None:
            new_tokens.append(choose(latents).to(prompt.device))
            is_after_end = _is_after_end(torch.cat(new_tokens, 1), eos_token_id)[
                :, -latents.shape[1] :
            ]
            if not bool(is_after_end.all()):
                streamer.put(new_tokens[-1][~is_after_end].cpu())

        if streamer is not None:
            if len(prompt) != 1:
                raise ValueError(f"A streamer takes one sequence at a time, not {len(prompt)}.")
            streamer.put(text[:, :first_new].cpu())

        # Only a first flow that runs left to right completes the text in the order in which it is
        # read.
        is_in_order = self.config.flows[0]["direction"] != "right_to_left" and infill_mask is None
        streams = streamer is not None and is_in_order
        attention_mask = None if pieces.order is None else is_real
        flow = self.flow(
            noise,
            attention_mask,
            reverse=True,
            num_flows=num_flows,
            flow_temperatures=option("flow_temperatures", None),
            logits_processor=logits_processor,
            on_position=stream if streams else None,
            inverse_method=inverse_method,
            inverse_window=inverse_window,
            inverse_tolerance=inverse_tolerance,
            capture_step=capture_step,
            **known,
        )
        states = tuple(map(pieces.scatter, flow.states))

        if streams:
            new = torch.cat(new_tokens, 1)
        else:
            new = choose(states[0][:, first_new:]).to(prompt.device)
            new = torch.where(is_new[:, first_new:], new, text[:, first_new:])

        elbo = None
        if num_candidates > 1:
            ids = pieces.gather(torch.cat([text[:, :first_new], new], 1).to(home))
            observed_mask = known.get("observed_mask")
            elbo = self._common_noise_elbo(
                ids, attention_mask, num_flows, observed_mask, num_candidates, generator
            )
            best = elbo.unflatten(0, (-1, num_candidates)).argmax(-1).cpu()
            best = best + num_candidates * torch.arange(len(best))
            states, (elbo, text, new) = (
                [x[best.to(x.device)] for x in xs] for xs in (states, (elbo, text, new))
            )

        is_after_end = _is_after_end(new, eos_token_id)
        if streamer is not None:
            if not streams:
                streamer.put(new[~is_after_end].cpu())
            streamer.end()

        if bool(is_after_end.any()):
            pad_token_id = option("pad_token_id", None)
            end_token_id = (
                eos_token_id[0] if isinstance(eos_token_id, (list, tuple)) else eos_token_id
            )
            new = new.masked_fill(
                is_after_end, end_token_id if pad_token_id is None else pad_token_id
            )

        sequences = torch.cat([text[:, :first_new], new], 1)
        if output_states or output_inverse_report or option("return_dict_in_generate", False):
            return TarFlowLMGenerateOutput(
                sequences=sequences,
                latents=states[0],
                noise=states[-1],
                states=tuple(states) if output_states else None,
                inverse_reports=flow.inverse_reports if output_inverse_report else None,
                elbo=elbo,
            )

        return sequences

    def _logits_processor(
        self, mixture_temperature: float, top_k: int, top_p: float, num_flows: int | None
    ) -> Callable[[Tensor], Tensor] | None:
        """The library's warpers, in its order, as a map of mixture logits (n, K); None where
        nothing is asked for.
        """
        if not 0 < mixture_temperature < float("inf"):
            raise ValueError(
                f"mixture_temperature must be positive and finite, not {mixture_temperature}."
            )
        if not isinstance(top_k, int) or top_k < 0:
            raise ValueError(
                f"top_k must be a positive integer, or 0 for all components, not {top_k!r}."
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}.")

        warpers = LogitsProcessorList()
        if mixture_temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(mixture_temperature)))

        if top_k > 0:
            warpers.append(TopKLogitsWarper(top_k))

        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))

        if not warpers:
            return None

        layers = self.flow.layers[:num_flows]
        if not any(layer.head.takes_logits_processor for layer in layers):
            couplings = [flow["coupling"] for flow in self.config.flows[:num_flows]]
            raise ValueError(
                f"mixture_temperature, top_k and top_p steer mixture_rosenblatt flows, but the flows are {couplings}."
            )

        return partial(warpers, None)  # whatever tokens came before

    def _common_noise_elbo(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        num_flows: int | None,
        observed_mask: Tensor | None,
        num_candidates: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The bounds of texts (B n, T), (B n,) in nats, from latents drawn by the same noise for n
        in a row.
        """
        if attention_mask is not None:
            ids = ids.masked_fill(~attention_mask, 0)

        shape = (len(ids) // num_candidates, ids.shape[1], self.config.latent_size)
        noise = torch.randn(
            shape, generator=generator, device=ids.device if generator is None else generator.device
        )
        latents = self.encode(ids, noise=noise.repeat_interleave(num_candidates, 0))

        return self(
            ids, attention_mask, latents=latents, num_flows=num_flows, observed_mask=observed_mask
        ).elbo

    def _check_infill(
        self, text: Tensor, is_real: Tensor, infill_mask: Tensor, options: dict[str, Any]
    ) -> None:
        """Whether there is a text (B, T), and something to fill in, in whole patches, in each
        sequence.
        """
        if infill_mask.shape != text.shape or not text.numel():
            shapes = f"{tuple(infill_mask.shape)}, {tuple(text.shape)}"
            raise ValueError(
                f"infill_mask must have the shape (B, T) of the text in input_ids, not empty: {shapes}."
            )

        if not bool(((infill_mask == 0) | (infill_mask == 1)).all()):
            raise ValueError("infill_mask must be boolean, or 0 and 1.")

        for name in ("max_new_tokens", "max_length"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} says nothing with infill_mask, with which a text keeps its length."
                )

        patch_size = self.config.patch_size
        lengths = is_real.sum(-1)
        if text.shape[1] % patch_size or bool((lengths % patch_size).any()):
            raise ValueError(
                f"Texts must be multiples of patch_size, {patch_size}, not {lengths.tolist()} tokens."
            )
        if not bool(((infill_mask == 1) & is_real).any(-1).all()):
            raise ValueError("infill_mask has a sequence with nothing to fill in.")

    def _check_directions(self, is_known: Tensor, num_flows: int | None, is_prompt: bool) -> None:
        """Whether flows that are not conditional can go on from what is known of pieces (B, T), and
        how well.
        """
        directions = [flow["direction"] for flow in self.config.flows[:num_flows]]
        if is_prompt and self.config.flows[0]["direction"] == "right_to_left":
            raise ValueError("A prompt needs a first flow that runs left to right.")

        is_leading = bool((is_known.long().diff(dim=-1) <= 0).all())
        if "right_to_left" in directions or not is_leading:
            logger.warning_once(
                "What is known is held fixed in the first flow only, which is an approximation of the model's "
                "conditional distribution. Exact are the continuation of a prompt where no flow runs right to left, "
                "and anything that a model with conditional=True has been trained for."
            )

    def _length(
        self,
        is_prompt: Tensor,
        noise: Tensor | None,
        max_new_tokens: int | None,
        max_length: int | None,
    ):
        """Tokens of a sequence, prompt and its padding included; prompts are where the mask (B, n)
        is True.
        """
        prompt_length, longest = is_prompt.shape[1], self.config.max_position_embeddings
        if prompt_length >= longest:
            raise ValueError(
                f"A prompt of {prompt_length} tokens leaves no room: max_position_embeddings is {longest}."
            )

        if noise is not None:
            length = noise.shape[1]
            if length > longest:
                raise ValueError(
                    f"noise for {length} tokens, but max_position_embeddings is {longest}."
                )
        elif max_new_tokens is not None:
            length = prompt_length + max_new_tokens
        else:
            length = longest if max_length is None else max_length

        if length > longest:
            logger.warning_once(
                f"{length} tokens were asked for; the model was made for {longest}, and stops there."
            )
            length = longest

        if length <= prompt_length:
            raise ValueError(
                f"Nothing to generate: the prompt has {prompt_length} tokens, the whole would have {length}."
            )

        patch_size = self.config.patch_size
        lengths = is_prompt.sum(-1)
        if (length - prompt_length) % patch_size or bool((lengths % patch_size).any()):
            raise ValueError(
                f"Prompts and what follows them must be multiples of patch_size, {patch_size}, not "
                f"{lengths.tolist()} and {length - prompt_length} tokens."
            )

        return length


def _is_after_end(tokens: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    """Where a token (B, n) stands behind its sequence's first end-of-sequence token."""
    if eos_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    is_end = torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device))
    return (is_end.cumsum(-1) - is_end.int()) > 0
