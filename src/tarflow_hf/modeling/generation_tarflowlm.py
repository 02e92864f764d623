"""`generate`: noise -> inverse flows -> latents -> tokens."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput, logging

from .checks_tarflowlm import (
    check_generator,
    check_ids,
    check_is_tensor,
    check_num_flows,
    check_positions,
    is_integer,
)
from .codebook_kept import unchanged
from .drafts_tarflowlm import check_drafts, make_drafts
from .generation_options import GenerationOptions, beside_noise
from .generation_writing import (
    ChooseTokens,
    RowGroup,
    Text,
    TextEnds,
    TokenWriter,
    guess_shower,
)
from .inversion_tarflowlm import InverseReport, check_finite, evaluating
from .noise_tarflowlm import NoiseMixin, Said, Watermark, check_watermark, keyed_noise, most_likely
from .outputs_tarflowlm import FlowOutput
from .slots_tarflowlm import Pieces, take

logger = logging.get_logger(__name__)


@dataclass
class TarFlowLMGenerateOutput(ModelOutput):
    """Output of [`TarFlowLMModel.generate`] with `return_dict_in_generate` or an `output_...`."""

    sequences: Tensor | None = None  # (B, T)
    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = (
        None  # (B, T, d); at known tokens, that of their latents' sample of q(z | x)
    )
    states: tuple[Tensor, ...] | None = None  # h0 (latents), ..., hL (noise), each (B, T, d)
    inverse_reports: list[InverseReport] | None = (
        None  # how each flow was inverted, from the data side
    )
    elbo: Tensor | None = (
        None  # (B,) nats: with `num_candidates` above 1, the bound by which each was chosen
    )
    tokens_per_forward: Tensor | None = (
        None  # (B,) new tokens of each text over the first flow's passes until it ended
    )


class TarFlowLMGenerationMixin(NoiseMixin, GenerationMixin):
    @torch.no_grad()
    @unchanged()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer=None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        infill_mask: Tensor | None = None,
        watermark: Watermark | None = None,
        **kwargs: Any,
    ) -> Tensor | TarFlowLMGenerateOutput:
        """Samples sequences: draws noise u ~ N(0, I), inverts the flows, decodes.

        With a prompt it continues that; with `infill_mask` it fills gaps in a text. How exact that is:

        - Without a prompt, exact: the tokens follow the model's distribution, if `decode` samples
          them.
        - A prompt, or a gap at the end of a text, if no flow runs right to left: the latents of the
          known tokens are drawn from q(z | x), and the rest follows p(z_new | z_known) exactly.
        - A prompt, or any gaps, in a conditional model: exact for the distribution
          p(x_missing | x_observed) that it was trained for, and that
          `model(input_ids, observed_mask=...)` bounds.
        - Anything else is an approximation, about which one warning is given: the known latents are
          held fixed in the first flow only.

        Texts of different lengths may share a batch: each is continued or filled as it would be
        alone.

        At their defaults `temperature`, `flow_temperatures`, `mixture_temperature`, `top_k`,
        `top_p` and `num_candidates` leave the model's distribution as it is; any other value
        departs from it.

        Args:
            inputs (`torch.LongTensor` of shape (B, n), *optional*): Prompt, or text with gaps, also
                accepted as `input_ids`.
            attention_mask (`torch.Tensor` of shape (B, n), *optional*): 0 where that has padding,
                on either side. The returned tokens have it there, too.
            generation_config ([`GenerationConfig`], *optional*): Options; those given as keywords
                win.
            streamer (*optional*): Receives the prompt, then tokens as the first flow completes
                them. If it has a `put_draft`, as the library's `TextDiffusionStreamer`, that gets
                guesses of the tokens behind: each flow's output, each pass of a parallel inverse of
                the first flow, and drafts.
            generator ([`torch.Generator`], *optional*): Source of all randomness; the global one by
                default.
            noise (`torch.Tensor` of shape (B, T, d), *optional*): The noise itself: the same noise
                gives the same tokens. T counts the prompt and its padding. As long as the first
                tokens of the prompt are those that this noise would write without a prompt, they
                keep the latents that it gives them. The latents of later prompt tokens are samples
                of q(z | x), made with the noise at their places. So noise continues its own text
                after any beginning of it (see `noise_of`). All T tokens are written: only an
                `eos_token_id` of this call ends a text before. An `attention_mask` (B, T) without a
                prompt says where the texts are.
            watermark ([`NoiseWatermark`], *optional*): Takes the noise of new tokens from a key, by
                which the text can be detected. Over keys the distribution of the text is the same.
            decode ("argmax" or "sample"): Take the most likely tokens under p(x | z), the default,
                or a sample.
            infill_mask (`torch.Tensor` of shape (B, T), *optional*): 1 (or True) at the tokens of
                `inputs` to fill in, whatever their ids; all others are held fixed. The text keeps
                its length, and an end-of-sequence token ends nothing.
            output_states (`bool`): Also return every flow's state, see [`TarFlowLMGenerateOutput`].
            num_flows (`int`, *optional*): Invert the first flows only. `noise` is then the state h
                of that flow (of `output_states`, or of `model.flow`), and what is drawn without it
                is a sample of the stack cut there.
            inverse_method ("auto", "sequential" or "parallel", or a list with one for each flow):
                Inverts the flows position after position, or many positions at once. The result is
                the same up to rounding; "auto" takes the one that is expected to be faster, see
                `choose_inverse_methods`.
            inverse_window, inverse_tolerance (*optional*): See [`InverseOptions`].
            capture_step (`bool`): On a GPU, take the sequential form's steps by a CUDA graph. Not
                run on one yet.
            output_inverse_report (`bool`): Also return each flow's [`InverseReport`].
            max_new_tokens, max_length (`int`): The length; by default that which the model was made
                for, `max_position_embeddings`, which is also the most.
            num_return_sequences (`int`): Sequences per prompt.
            temperature (`float`): Standard deviation of the noise that is drawn, 1 by default.
            flow_temperatures (`list[float]`): One for each inverted flow, from the data side: the
                factor by which the state on its noise side is multiplied before it is inverted. The
                noise enters the last flow alone, so [1, ..., 1, t] is what `temperature=t` is (the
                two multiply); the others scale the states in between, which the flows behind have
                just made.
            mixture_temperature (`float`): The temperature of the mixture weights of every
                "mixture_rosenblatt" flow: they become proportional to their power
                1 / mixture_temperature. In a flow
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
            eos_token_id (`int`, `list[int]` or `torch.Tensor`), pad_token_id: After the first
                end-of-sequence token of a sequence comes padding. When all have ended, a first flow
                that runs left to right stops. -1 ends nothing.
            stop_strings (`str` or `list[str]`), tokenizer: Strings that end a text, and the
                tokenizer that decodes it. As in the library, a text ends with the token that
                completes one.
            stopping_criteria, max_time: As in the library.
            bad_words_ids, repetition_penalty, min_new_tokens, logits_processor, ...: The library's
                processors of the logits of the next token. They process the mixture weights of a
                first flow that has one component for each token and runs left to right, and a token
                that they forbid is not decoded either. `LOGITS_OPTIONS` lists them.
            min_p, typical_p, epsilon_cutoff, eta_cutoff (`float`): As `top_p`.
            prompt_lookup_num_tokens (`int`): Guess up to so many tokens ahead, by what followed the
                last ones where they stood before, and verify them in one pass of the first flow.
                Drafts change no token. How many a pass takes follows from how many were right. The
                first flow has to run left to right.
            assistant_model ([`PreTrainedModel`]): Guess tokens by a smaller model of the same
                vocabulary, a causal language model or a TarFlowLM, that is given the same noise.
            num_assistant_tokens (`int`): At most so many at a time; by default what the assistant's
                generation config says, or 20.
            max_matching_ngram_size (`int`): The number of last tokens that are looked for, 8 by
                default, and then fewer. (The library's default is 2.)
            synced_gpus (`bool`): All positions are computed, wherever the texts end.
            return_dict_in_generate (`bool`): Return a [`TarFlowLMGenerateOutput`].

        Returns:
            Token ids (B, T), prompt included (with its padding, where latents and states are 0), or
            a [`TarFlowLMGenerateOutput`]. They are cut where the last text ends. States are not:
            those of the latents are 0 behind the position at which the work stopped.

        Raises:
            ValueError: If an option is unknown or out of range (as a keyword, in a generation config or
                saved with the model), mixture weights are steered though no flow has any, the
                logits of the next token are processed though the first flow has none,
                `num_candidates` meets `noise` or a streamer, an option contradicts the noise, a
                `watermark` meets `noise` or has no noise to mark, a prompt leaves no room, a prompt
                or a continuation is no multiple of the patch size, a gap is not of whole patches,
                or a text has no gap.

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
        # 1. What is asked for.
        check_generator(generator)
        is_infill = infill_mask is not None
        prompt, is_real, infill_mask = self._read_prompt(inputs, noise, infill_mask, kwargs)
        options = self._resolve_options(kwargs, generation_config, noise, prompt)
        check_watermark(watermark, noise, options)
        self._check_options(options, noise, streamer)
        self._check_weights(options.num_flows)
        if is_infill:
            self._check_infill(prompt, is_real, infill_mask, kwargs)

        # 2. Where tokens are known, and where new ones go.
        text = self._lay_out(prompt, is_real, infill_mask, noise, options, is_infill)
        self._check_text(text, options, streamer)

        # 3. The noise, and what decides between tokens.
        given, noise = noise, self._draw_noise(text, noise, options, generator, watermark)
        choose_tokens = self._token_choice(text, options, generator)

        # 4. What is known conditions the flows, as far as the noise does not say it by itself.
        said = None if given is None else self._say(text, noise, choose_tokens, options)
        known = self._condition(text, noise, options, said)

        # 5. The inverse of the flows, from the last to the first.
        ends = self._text_ends(text, options)
        writer = self._writer(text, options, choose_tokens, ends, streamer, said)
        flow = self._flow_back(text, noise, known, options, said, writer, streamer)
        self._check_states(flow.states)
        states = tuple(map(text.pieces.scatter, flow.states))

        # 6. Latents to tokens.
        tokens = self._read_tokens(text, flow.latents, choose_tokens, writer)
        is_kept = None if ends is None else self._is_kept(text, tokens, ends, writer)
        per_forward = self._tokens_per_forward(text, is_kept, ends, flow.inverse_reports[0])

        # 7. The best of several candidates.
        elbo = None
        if options.num_candidates > 1:
            elbo, best = self._choose_best(text, tokens, known, options, generator)
            text.select(best)
            tokens, is_kept, states = _take_rows(best, tokens, is_kept, states)
            per_forward = per_forward[best]

        # 8. Padding behind the end of a sequence.
        sequences = tokens if is_kept is None else self._pad(text, tokens, is_kept, options)
        if streamer is not None:
            is_written = writer is not None and writer.streamer is not None
            _end_stream(streamer, sequences[:, text.first_new :], is_written)

        if not options.returns_dict:
            return sequences

        return TarFlowLMGenerateOutput(
            sequences=sequences,
            latents=states[0],
            noise=states[-1],
            states=states if options.output_states else None,
            inverse_reports=flow.inverse_reports if options.output_inverse_report else None,
            elbo=elbo,
            tokens_per_forward=per_forward,
        )

    @property
    def _home(self) -> torch.device:
        """The device of the work. Offloaded weights are on the meta device; hooks bring inputs."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def _read_prompt(
        self,
        inputs: Tensor | None,
        noise: Tensor | None,
        infill_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes the prompt (B, n) out of the arguments, where it is real, and where it has gaps.

        None is (B, 0). Noise (B, T, d) with a mask (B, T) and nothing else is all gap.
        """
        input_ids = kwargs.pop("input_ids", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("Give the prompt as inputs or as input_ids, not as both.")

        prompt = inputs if input_ids is None else input_ids
        attention_mask = kwargs.pop("attention_mask", None)
        position_ids = kwargs.pop("position_ids", None)
        given = {"inputs": prompt, "attention_mask": attention_mask}
        for name, value in (given | {"noise": noise, "infill_mask": infill_mask}).items():
            if value is not None:
                check_is_tensor(name, value)

        if prompt is not None and prompt.ndim == 2 and prompt.shape[1] == 0:
            prompt = prompt.long()  # a tokenizer makes numbers of an empty text
        if prompt is None and noise is not None and attention_mask is not None:
            prompt = attention_mask.new_full(noise.shape[:2], self.config.pad_token_id or 0).long()
            infill_mask = torch.ones_like(prompt)

        if attention_mask is not None and (prompt is None or attention_mask.shape != prompt.shape):
            shape = None if prompt is None else tuple(prompt.shape)
            raise ValueError(
                f"attention_mask must have the shape of the prompt: {tuple(attention_mask.shape)}, {shape}."
            )
        if prompt is not None and (prompt.ndim != 2 or not is_integer(prompt)):
            raise ValueError(
                f"The prompt must be integers of shape (B, n): {prompt.dtype}, {tuple(prompt.shape)}."
            )
        if prompt is not None:
            check_positions(position_ids, prompt, attention_mask)
        if noise is not None and noise.ndim != 3:
            raise ValueError(f"noise must have shape (B, T, d), not {tuple(noise.shape)}.")

        if prompt is None:
            batch_size = 1 if noise is None else len(noise)
            prompt = torch.empty(batch_size, 0, dtype=torch.long, device=self._home)

        prompt = prompt.long()
        if attention_mask is None:
            return prompt, torch.ones_like(prompt, dtype=torch.bool), infill_mask

        return prompt, attention_mask != 0, infill_mask

    def _resolve_options(
        self,
        kwargs: dict[str, Any],
        config: GenerationConfig | None,
        noise: Tensor | None,
        prompt: Tensor,
    ) -> GenerationOptions:
        if noise is not None:
            kwargs = beside_noise(kwargs, config, noise.shape[1], prompt.shape[1])

        return GenerationOptions.resolve(kwargs, config, self.generation_config)

    def _check_options(self, options: GenerationOptions, noise: Tensor | None, streamer) -> None:
        """Raises a ValueError where options contradict this model, the noise or a streamer."""
        check_num_flows(options.num_flows, len(self.flow.layers))
        layers = self.flow.layers[: options.num_flows]
        takes_processor = any(layer.head.takes_logits_processor for layer in layers)
        couplings = [flow["coupling"] for flow in self.config.flows[: options.num_flows]]
        if options.warpers() is not None and not takes_processor:
            raise ValueError(
                f"mixture_temperature, top_k and top_p (min_p, typical_p, epsilon_cutoff, eta_cutoff) steer "
                f"mixture_rosenblatt flows, but the flows are {couplings}."
            )

        first = self.config.flows[0]
        if options.logits_options and not self.config.has_token_logits:
            raise ValueError(
                f"{', '.join(options.logits_options)} process the logits of the next token. They need a first flow "
                "that has them: mixture_rosenblatt with the encoder's codebook, left to right, patch_size 1. The first "
                f"flow is {first['coupling']}, {first['direction']}, and patch_size is {self.config.patch_size}."
            )

        if options.draft_options:
            check_drafts(options, self.config)

        if streamer is not None and not hasattr(streamer, "put"):
            raise ValueError(f"streamer must have the methods put and end, not be {streamer!r}.")

        num_candidates = options.num_candidates
        if num_candidates > 1 and noise is not None:
            raise ValueError(
                f"noise already is that of one candidate: leave out num_candidates={num_candidates}."
            )
        if num_candidates > 1 and streamer is not None:
            raise ValueError(
                f"A streamer cannot wait for the best of num_candidates={num_candidates}."
            )
        if noise is not None and options.num_return_sequences != 1:
            raise ValueError(
                "noise already says how many sequences there are: leave out num_return_sequences."
            )

    def _lay_out(
        self,
        prompt: Tensor,
        is_real: Tensor,
        infill_mask: Tensor | None,
        noise: Tensor | None,
        options: GenerationOptions,
        is_infill: bool,
    ) -> Text:
        """The text of each sequence to write, with known tokens and room for new ones."""
        is_known = is_real if infill_mask is None else is_real & (infill_mask == 0)
        if noise is None:
            num_copies = options.num_return_sequences * options.num_candidates
            prompt, is_real, is_known = (
                x.repeat_interleave(num_copies, 0) for x in (prompt, is_real, is_known)
            )

        num_new = 0
        if infill_mask is None:
            num_new = self._length(is_real, noise, options) - prompt.shape[1]

        tokens = F.pad(prompt, (0, num_new))
        is_real = F.pad(is_real, (0, num_new), value=True)
        is_known = F.pad(is_known, (0, num_new), value=False)
        is_new = is_real & ~is_known

        home = self._home
        pieces = Pieces(is_real.to(home))
        ids, is_known, is_real = (pieces.gather(x.to(home)) for x in (tokens, is_known, is_real))
        ids = check_ids(ids.masked_fill(~is_known, 0), self.config)
        first_new = int(is_new.any(0).int().argmax()) if bool(is_new.any()) else tokens.shape[1]
        return Text(tokens, is_new, first_new, pieces, ids, is_known, is_real, is_infill)

    def _draw_noise(
        self,
        text: Text,
        noise: Tensor | None,
        options: GenerationOptions,
        generator: torch.Generator | None,
        watermark: Watermark | None,
    ) -> Tensor:
        """The noise of the pieces (B, n, d): the given one (B, T, d), a draw, or a key's."""
        if watermark is not None:
            watermark.remember(self)
            noise = keyed_noise(watermark, text, self.config.latent_size)
            dtype = torch.promote_types(self.codebook().mean.dtype, torch.float32)
            return noise.to(self._home, dtype) * options.temperature

        shape = (*text.tokens.shape, self.config.latent_size)
        if noise is None:
            device = self._home if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device) * options.temperature
            noise = noise * (1.0 if options.do_sample else 0.0)
        elif noise.shape != shape:
            raise ValueError(
                f"noise must have shape (B, T, d) = {shape}, not {tuple(noise.shape)}."
            )
        elif not bool(noise.isfinite().all()):
            position = int((~noise.isfinite()).any(-1).any(0).int().argmax())
            raise ValueError(f"noise is not finite, first at position {position}.")

        return text.pieces.gather(noise.to(self._home))

    def _condition(
        self, text: Text, noise: Tensor, options: GenerationOptions, said: Said | None
    ) -> dict[str, Tensor]:
        """The arguments by which the flows are told what is known."""
        if not bool(text.is_known.any()) or (said is not None and bool(said.is_whole.all())):
            return {}

        by_patch = text.is_known.unflatten(1, (-1, self.config.patch_size))
        if bool((by_patch.any(-1) != by_patch.all(-1)).any()):
            raise ValueError(
                f"infill_mask must cover whole patches of patch_size, {self.config.patch_size}, tokens."
            )

        if self.config.conditional:
            return {"observed_ids": text.ids, "observed_mask": text.is_known}

        self._check_directions(text, options.num_flows)
        latents = self.encode(text.ids, noise=noise)
        if said is not None:
            latents = torch.where(said.is_said.unsqueeze(-1), said.flow.latents, latents)

        return {"known": latents, "known_mask": text.is_known}

    def _check_text(self, text: Text, options: GenerationOptions, streamer) -> None:
        """Raises a ValueError where options contradict the texts that are to be written."""
        if streamer is not None and len(text.tokens) != 1:
            raise ValueError(f"A streamer takes one sequence at a time, not {len(text.tokens)}.")
        if text.is_infill and options.stop_options:
            raise ValueError(
                f"{', '.join(options.stop_options)} end a text, but with infill_mask it keeps its length."
            )

        methods = options.inverse_method
        method = methods if isinstance(methods, str) else next(iter(methods), "auto")
        if options.logits_options and (method == "parallel" or options.capture_step):
            raise ValueError(
                f"{', '.join(options.logits_options)} read what was written before: leave out "
                'capture_step, and inverse_method="parallel" of the first flow.'
            )

        is_in_time = self._runs_in_order and options.num_candidates == 1 and not options.synced_gpus
        if "max_time" in options.from_library and not is_in_time:
            raise ValueError(
                "max_time stops a first flow that runs left to right, without num_candidates and synced_gpus; "
                "others have no text until they are done."
            )

    @property
    def _runs_in_order(self) -> bool:
        """True if the first flow completes the tokens in the order in which they are read."""
        return self.config.flows[0]["direction"] != "right_to_left"

    def _token_choice(
        self, text: Text, options: GenerationOptions, generator: torch.Generator | None
    ) -> ChooseTokens:
        """The map from latents to tokens: the most likely ones, or a sample of p(x | z).

        The sample's uniform numbers are drawn now, one for each token of the sequences: where the
        work stops, and in how many steps it is done, changes no token.
        """
        uniform = None
        if options.decode == "sample":
            device = self._home if generator is None else generator.device
            uniform = torch.rand(text.tokens.shape, generator=generator, device=device)
            uniform = text.pieces.gather(uniform.to(self._home))

        def choose_tokens(latents: Tensor, places: Tensor, is_forbidden: Tensor | None) -> Tensor:
            if uniform is None:
                tokens = self.codebook().most_likely(latents, 1).squeeze(-1)
                if is_forbidden is None or not bool(is_forbidden.gather(1, tokens).any()):
                    return tokens

            log_prob = self.decode(latents)
            if is_forbidden is not None:
                log_prob = log_prob.masked_fill(is_forbidden.unsqueeze(1), -torch.inf)
            if uniform is None:
                return log_prob.argmax(-1)

            cumulative = log_prob.exp().cumsum(-1)
            threshold = take(uniform, places).unsqueeze(-1) * cumulative[..., -1:]
            tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
            return tokens.clamp(max=self.config.vocab_size - 1)

        return choose_tokens

    def _text_ends(self, text: Text, options: GenerationOptions) -> TextEnds | None:
        """The ends of the texts, by the library's criteria; None if nothing ends them."""
        if text.is_infill:
            return None

        config = options.library_config(text.tokens.shape[1])
        config.max_length = None
        with options.naming_options():
            criteria = self._get_stopping_criteria(
                config, StoppingCriteriaList(options.stopping_criteria), options.tokenizer
            )

        return TextEnds(text, criteria) if criteria else None

    def _writer(
        self,
        text: Text,
        options: GenerationOptions,
        choose_tokens: ChooseTokens,
        ends: TextEnds | None,
        streamer,
        said: Said | None,
    ) -> TokenWriter | None:
        """The writer of tokens while the first flow is inverted; None if nobody waits for them.

        Texts that the noise says by itself are there already, and nobody waits.
        """
        if streamer is not None:
            streamer.put(text.tokens[:, : text.first_new].cpu())

        if text.is_infill:
            streamer = None
        if options.num_candidates > 1 or options.synced_gpus:
            ends = None

        is_waited_for = options.logits_options or streamer is not None or ends is not None
        is_waited_for = is_waited_for or options.draft_options
        if not self._runs_in_order or not is_waited_for:
            return None
        if said is not None and bool(said.is_whole.any()):
            return None

        # Observed tokens come first, then the missing ones from left to right, padding last.
        order = torch.where(text.is_known, 0, torch.where(text.is_real, 1, 2))
        if not self.config.conditional:
            order = torch.zeros_like(order)

        order = order.argsort(dim=-1, stable=True)
        groups = self._row_groups(text, order, options) if options.logits_options else []
        return TokenWriter(text, order, choose_tokens, ends, groups, streamer)

    def _row_groups(self, text: Text, order: Tensor, options: GenerationOptions) -> list[RowGroup]:
        """The sequences with the library's logits processors, which count from the prompt's end."""
        orders, num_leading = order.tolist(), text.num_leading
        members: dict[tuple, list[int]] = {}
        for row, key in enumerate(zip(num_leading, map(tuple, orders), strict=True)):
            members.setdefault(key, []).append(row)

        groups = []
        for (prompt_length, places), rows in members.items():
            num_new = int((text.is_real & ~text.is_known)[rows[0]].sum())
            with options.naming_options():
                process = self._get_logits_processor(
                    options.library_config(prompt_length + num_new),
                    input_ids_seq_length=prompt_length,
                    prefix_allowed_tokens_fn=options.allowed_tokens(rows),
                    logits_processor=options.processors(),
                    device=self._home,
                )

            groups.append(RowGroup(torch.tensor(rows), list(places), process))

        return groups

    def _flow_back(
        self,
        text: Text,
        noise: Tensor,
        known: dict[str, Tensor],
        options: GenerationOptions,
        said: Said | None,
        writer: TokenWriter | None,
        streamer,
    ) -> FlowOutput:
        """The inverse of the flows, told what is known, or as the noise says it by itself."""
        if said is not None and bool(said.is_whole.all()):
            return said.flow

        codebook = self.codebook()
        flow = self._invert_flows(
            text,
            noise,
            known,
            options,
            on_position=None if writer is None else writer.put,
            token_processor=writer.process if options.logits_options else None,
            on_guess=guess_shower(text, partial(most_likely, codebook), streamer, writer),
            drafts=make_drafts(options, writer, self),
        )
        return flow if said is None else said.prevail(flow)

    def _invert_flows(
        self,
        text: Text,
        noise: Tensor,
        known: dict[str, Tensor],
        options: GenerationOptions,
        **callbacks: Any,
    ) -> FlowOutput:
        return self.flow(
            noise,
            text.attention_mask,
            reverse=True,
            num_flows=options.num_flows,
            flow_temperatures=options.flow_temperatures,
            logits_processor=options.warpers(),
            inverse_method=options.inverse_method,
            inverse_window=options.inverse_window,
            inverse_tolerance=options.inverse_tolerance,
            capture_step=options.capture_step,
            **known,
            **callbacks,
        )

    def _check_weights(self, num_flows: int | None) -> None:
        """Raises a ValueError if a weight that decides on states or tokens is not finite.

        A search for the inverse would hide it. Weights that are not at hand (offloaded, quantised)
        are passed over.
        """
        parts = {"flow.codebook": self.flow.codebook}
        for index, layer in enumerate(self.flow.layers[:num_flows]):
            parts[f"flow.layers.{index}.head"] = layer.head

        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                is_plain = parameter.is_floating_point() and type(parameter.data) is Tensor
                is_at_hand = is_plain and parameter.device.type != "meta"
                if is_at_hand and not bool(parameter.sum(dtype=torch.float32).isfinite()):
                    raise ValueError(f"{part}.{name} has a weight that is not finite.")

    def _check_states(self, states: tuple[Tensor, ...]) -> None:
        """Raises a ValueError if a flow's state (B, n, d) is not finite, naming the first of them."""
        for index in reversed(range(len(states) - 1)):
            is_reversed = self.config.flows[index]["direction"] == "right_to_left"
            what = f"The inverse of flow {index} (flow.layers.{index})"
            check_finite(states[index], what, is_reversed)

    def _read_tokens(
        self,
        text: Text,
        latents: Tensor,
        choose_tokens: ChooseTokens,
        writer: TokenWriter | None,
    ) -> Tensor:
        """The tokens (B, T) of the sequences, from the pieces' latents (B, n, d) or the writer."""
        if writer is not None:
            tokens = writer.tokens
        else:
            num_known = int(text.is_known.all(0).long().cumprod(0).sum())
            places = torch.arange(num_known, latents.shape[1], device=latents.device)
            places = places.expand(len(latents), -1)
            new = choose_tokens(latents[:, num_known:], places, None)
            tokens = torch.cat([text.ids[:, :num_known], new], 1)

        tokens = text.pieces.scatter(tokens).to(text.tokens.device)
        return torch.where(text.is_new, tokens, text.tokens)

    def _is_kept(
        self, text: Text, tokens: Tensor, ends: TextEnds, writer: TokenWriter | None
    ) -> Tensor:
        """True at the tokens (B, T) of the sequences that are not behind their end."""
        if writer is None or writer.ends is None:
            ends.read_all(text.pieces.gather(tokens))

        place = torch.arange(text.ids.shape[1], device=ends.ends.device)
        is_kept = text.pieces.scatter(place < ends.ends.unsqueeze(-1)).to(text.tokens.device)
        return is_kept | ~text.is_new

    def _tokens_per_forward(
        self, text: Text, is_kept: Tensor | None, ends: TextEnds | None, report: InverseReport
    ) -> Tensor:
        """The new tokens of each text that stay, over the first flow's passes until its end, (B,)."""
        num_new = (text.is_new if is_kept is None else text.is_new & is_kept).sum(-1).cpu()
        num_final = torch.tensor(report.num_final) * self.config.patch_size
        begins = (num_final.cumsum(0) - num_final)[-report.iterations :]
        if ends is None or not self._runs_in_order:
            return num_new / max(1, len(begins))

        num_passes = (begins < ends.ends.cpu().unsqueeze(-1)).sum(-1)
        return num_new / num_passes.clamp(min=1)

    def _pad(
        self, text: Text, tokens: Tensor, is_kept: Tensor, options: GenerationOptions
    ) -> Tensor:
        """Tokens (B, T) with padding behind each text's end, cut where the last of them ends."""
        ids = options.pad_token_id, *options.end_token_ids
        for name in ("pad_token_id", "eos_token_id"):
            ids = *ids, getattr(options.tokenizer, name, None)

        pad_token_id = next((token for token in ids if token is not None), None)
        if pad_token_id is not None:
            tokens = tokens.masked_fill(~is_kept, pad_token_id)

        used = (is_kept & text.is_new).any(0).nonzero().flatten().tolist()
        return tokens[:, : max([text.first_new, *(place + 1 for place in used)])]

    def _choose_best(
        self,
        text: Text,
        tokens: Tensor,
        known: dict[str, Tensor],
        options: GenerationOptions,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """The highest of the candidates' bounds, (B,) in nats, and which candidates have it.

        The candidates of a sequence are consecutive rows. Their bounds are from latents that are
        drawn by the same noise.
        """
        num_candidates = options.num_candidates
        ids = text.pieces.gather(tokens.to(self._home))
        attention_mask = text.attention_mask
        if attention_mask is not None:
            ids = ids.masked_fill(~attention_mask, 0)

        shape = (len(ids) // num_candidates, ids.shape[1], self.config.latent_size)
        device = ids.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=device)
        latents = self.encode(ids, noise=noise.repeat_interleave(num_candidates, 0))

        with evaluating(self):
            elbo = self(
                ids,
                attention_mask,
                latents=latents,
                num_flows=options.num_flows,
                observed_mask=known.get("observed_mask"),
            ).elbo

        best = elbo.unflatten(0, (-1, num_candidates)).argmax(-1).cpu()
        best = best + num_candidates * torch.arange(len(best))
        return elbo[best.to(elbo.device)], best

    def _check_infill(
        self, text: Tensor, is_real: Tensor, infill_mask: Tensor, options: dict[str, Any]
    ) -> None:
        """Raises a ValueError unless each text (B, T) has a gap, and all are of whole patches."""
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

    def _check_directions(self, text: Text, num_flows: int | None) -> None:
        """Warns once if the flows go on from what is known only approximately.

        Raises:
            ValueError: If there is a prompt, and the first flow runs right to left.
        """
        directions = [flow["direction"] for flow in self.config.flows[:num_flows]]
        if not text.is_infill and directions[0] == "right_to_left":
            raise ValueError("A prompt needs a first flow that runs left to right.")

        is_leading = bool((text.is_known.long().diff(dim=-1) <= 0).all())
        if "right_to_left" in directions or not is_leading:
            logger.warning_once(
                "The known tokens are held fixed in the first flow only: an approximation of the model's "
                "conditional distribution. Nothing is wrong with the text. Where its distribution matters, exact "
                "are the continuation of a prompt if no flow runs right to left, and everything that a model with "
                "conditional=True has been trained for."
            )

    def _length(self, is_prompt: Tensor, noise: Tensor | None, options: GenerationOptions) -> int:
        """The number of tokens of a sequence, with its prompt (B, n), and the prompt's padding."""
        prompt_length, longest = is_prompt.shape[1], self.config.max_position_embeddings
        if prompt_length > longest or (prompt_length == longest and noise is None):
            raise ValueError(
                f"A prompt of {prompt_length} tokens leaves no room: max_position_embeddings is {longest}."
            )

        if noise is not None:
            length = noise.shape[1]
            if length > longest:
                raise ValueError(
                    f"noise for {length} tokens, but max_position_embeddings is {longest}."
                )
        elif options.max_new_tokens is not None:
            length = prompt_length + options.max_new_tokens
        else:
            length = longest if options.max_length is None else options.max_length

        if length > longest:
            logger.warning_once(
                f"{length} tokens were asked for; the model was made for {longest}, and stops there."
            )
            length = longest

        if length < prompt_length or (length == prompt_length and noise is None):
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


def _end_stream(streamer, tokens: Tensor, is_written: bool) -> None:
    """Ends a stream, after the new tokens (1, n) where nobody has written them."""
    if not is_written:
        streamer.put(tokens.cpu())

    streamer.end()


def _take_rows(
    rows: Tensor, tokens: Tensor, is_kept: Tensor | None, states: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Some of the sequences."""
    if is_kept is not None:
        is_kept = is_kept[rows.to(is_kept.device)]

    states = tuple(state[rows.to(state.device)] for state in states)
    return tokens[rows.to(tokens.device)], is_kept, states
