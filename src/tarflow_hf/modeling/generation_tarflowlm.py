"""`generate`: noise -> inverse flows -> latents -> tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from .checks_tarflowlm import check_generator
from .codebook_kept import assume_codebook_unchanged
from .drafts_tarflowlm import make_drafts
from .generation_checks import (
    check_directions,
    check_infill,
    check_options,
    check_sources,
    check_states,
    check_text,
    check_weights,
)
from .generation_layout import Prompt, Text, lay_out, read_prompt
from .generation_options import GenerationOptions, beside_noise
from .generation_writing import (
    ChooseTokens,
    RowGroup,
    TextEnds,
    TokenWriter,
    guess_shower,
)
from .inverse_options import InverseReport
from .inversion_tarflowlm import evaluating
from .noise_tarflowlm import (
    NoiseMixin,
    Replay,
    Watermark,
    check_watermark,
    keyed_noise,
)
from .outputs_tarflowlm import FlowOutput
from .slots_tarflowlm import take


@dataclass
class TarFlowLMGenerateOutput(ModelOutput):
    """Output of [`TarFlowLMModel.generate`] with `return_dict_in_generate` or an `output_...`."""

    sequences: Tensor | None = None  # (B, T)
    latents: Tensor | None = None  # (B, T, d)
    # (B, T, d); at known tokens, the noise of their latents' sample of q(z | x)
    noise: Tensor | None = None
    states: tuple[Tensor, ...] | None = None  # h0 (latents), ..., hL (noise), each (B, T, d)
    # The inversion of each flow, from the data side
    inverse_reports: list[InverseReport] | None = None
    # (B,) nats: with `num_candidates` above 1, the bound by which each was chosen
    elbo: Tensor | None = None
    # (B,): the new tokens of each text over the first flow's passes until it ended
    tokens_per_forward: Tensor | None = None


class TarFlowLMGenerationMixin(NoiseMixin, GenerationMixin):
    """`generate`, and its steps in the order in which they are taken."""

    @torch.no_grad()
    @assume_codebook_unchanged()
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

        With a prompt it continues that; with `infill_mask` it fills gaps in a text:

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
                Drafts change no token. A pass takes as many as pay, by how many were right. The
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
        prompt = read_prompt(inputs, noise, infill_mask, kwargs, self.config, self._home)
        options = self._resolve_options(kwargs, generation_config, noise, prompt)
        check_watermark(watermark, noise, options)
        check_options(options, self)
        check_sources(options, noise, streamer)
        check_weights(self.flow, options.num_flows)
        if prompt.is_infill:
            check_infill(prompt, kwargs, generation_config, self.config.patch_size)

        # 2. Where tokens are known, and where new ones go.
        text = lay_out(prompt, noise, options, self.config, self._home)
        check_text(text, options, streamer, self._runs_in_order)

        # 3. The noise, and what decides between tokens.
        is_given = noise is not None
        noise = self._draw_noise(text, noise, options, generator, watermark)
        choose_tokens = self._token_choice(text, options, generator)

        # 4. Known tokens condition the flows, unless given noise writes them by itself.
        replay = self._replay(text, noise, choose_tokens, options) if is_given else None
        known = self._condition(text, noise, options, replay)

        # 5. The inverse of the flows, from the last to the first.
        ends = self._text_ends(text, options)
        writer = self._writer(text, options, choose_tokens, ends, streamer, replay)
        flow = self._flow_back(text, noise, known, options, replay, writer, streamer)
        check_states(flow.states, self.config)
        states = tuple(map(text.pieces.scatter, flow.states))

        # 6. Latents to tokens.
        tokens = self._read_tokens(text, flow.latents, choose_tokens, writer)
        is_kept = None if ends is None else self._is_kept(text, tokens, ends, writer)
        per_forward = self._tokens_per_forward(text, is_kept, ends, flow.inverse_reports[0])

        # 7. The best of several candidates.
        elbo = None
        is_new = text.is_new
        if options.num_candidates > 1:
            elbo, best = self._choose_best(text, tokens, known, options, generator)
            tokens, is_new, is_kept, *states = _take_rows(best, tokens, is_new, is_kept, *states)
            per_forward = per_forward[best]

        # 8. Padding behind the end of a sequence.
        sequences = _pad(tokens, is_new, is_kept, text.first_new, options)
        if streamer is not None:
            _end_stream(streamer, sequences[:, text.first_new :], writer)

        if not options.returns_dict:
            return sequences

        return TarFlowLMGenerateOutput(
            sequences=sequences,
            latents=states[0],
            noise=states[-1],
            states=tuple(states) if options.output_states else None,
            inverse_reports=flow.inverse_reports if options.output_inverse_report else None,
            elbo=elbo,
            tokens_per_forward=per_forward,
        )

    @property
    def _home(self) -> torch.device:
        """The device of the work. Offloaded weights are on the meta device; hooks bring inputs."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def _resolve_options(
        self,
        kwargs: dict[str, Any],
        config: GenerationConfig | None,
        noise: Tensor | None,
        prompt: Prompt,
    ) -> GenerationOptions:
        if noise is not None:
            num_prompt = 0 if prompt.is_gap is not None else prompt.ids.shape[1]
            kwargs = beside_noise(kwargs, config, noise.shape[1], num_prompt)

        return GenerationOptions.resolve(kwargs, config, self.generation_config)

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

    def _replay(
        self, text: Text, noise: Tensor, choose_tokens: ChooseTokens, options: GenerationOptions
    ) -> Replay | None:
        """The sequences that the noise (B, n, d) of the pieces writes without any known token.

        The inverse stops as soon as every sequence with a known token has differed from it. None if
        nothing is known, or if the logits are processed, which depends on the known tokens.
        """
        if not bool(text.is_known.any()) or options.logits_options:
            return None

        tokens = torch.full_like(text.ids, -1)
        has_known = text.is_known.any(-1)
        num_read, has_stopped = 0, False

        def read(latents: Tensor) -> bool:
            nonlocal num_read, has_stopped
            places = torch.arange(num_read, num_read + latents.shape[1], device=latents.device)
            tokens[:, places] = choose_tokens(latents, places.expand(len(latents), -1), None)
            num_read += latents.shape[1]
            differs = (tokens != text.ids)[:, :num_read] & text.is_known[:, :num_read]
            has_stopped = bool((differs.any(-1) | ~has_known).all())
            return has_stopped

        on_position = read if self._runs_in_order else None
        flow = self._invert_flows(text, noise, {}, options, on_position=on_position)
        if on_position is None:
            places = torch.arange(text.ids.shape[1], device=noise.device)
            tokens = choose_tokens(flow.latents, places.expand(len(noise), -1), None)

        agrees = ((tokens == text.ids) | ~text.is_known).long().cumprod(-1).bool()
        agrees_wholly = agrees.all(-1) & (not has_stopped)
        return Replay(flow, agrees & text.is_known, agrees_wholly)

    def _condition(
        self, text: Text, noise: Tensor, options: GenerationOptions, replay: Replay | None
    ) -> dict[str, Tensor]:
        """The arguments by which the flows are told what is known."""
        if not bool(text.is_known.any()) or (
            replay is not None and bool(replay.agrees_wholly.all())
        ):
            return {}

        by_patch = text.is_known.unflatten(1, (-1, self.config.patch_size))
        if bool((by_patch.any(-1) != by_patch.all(-1)).any()):
            raise ValueError(
                f"infill_mask must cover whole patches of patch_size, {self.config.patch_size}, tokens."
            )

        if self.config.conditional:
            return {"observed_ids": text.ids, "observed_mask": text.is_known}

        check_directions(text, self.config, options.num_flows)
        latents = self.encode(text.ids, noise=noise)
        if replay is not None:
            latents = torch.where(replay.agrees.unsqueeze(-1), replay.flow.latents, latents)

        return {"known": latents, "known_mask": text.is_known}

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
                tokens = self.codebook().most_likely_token(latents)
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
        replay: Replay | None,
    ) -> TokenWriter | None:
        """The writer of tokens while the first flow is inverted; None if nobody waits for them.

        Texts that the noise writes by itself are there already, and nobody waits.
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
        if replay is not None and bool(replay.agrees_wholly.any()):
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
        orders = order.tolist()
        num_leading = text.num_leading
        members: dict[tuple, list[int]] = {}
        for row, key in enumerate(zip(num_leading, map(tuple, orders), strict=True)):
            members.setdefault(key, []).append(row)

        groups = []
        for (prompt_length, places), rows in members.items():
            num_new = int(text.is_missing[rows[0]].sum())
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
        replay: Replay | None,
        writer: TokenWriter | None,
        streamer,
    ) -> FlowOutput:
        """The inverse of the flows, told what is known, or the replay of the noise."""
        if replay is not None and bool(replay.agrees_wholly.all()):
            return replay.flow

        codebook = self.codebook()
        flow = self._invert_flows(
            text,
            noise,
            known,
            options,
            on_position=None if writer is None else writer.put,
            token_processor=writer.process if options.logits_options else None,
            on_guess=guess_shower(text, codebook.most_likely_token, streamer, writer),
            drafts=make_drafts(options, writer, self),
        )
        return flow if replay is None else replay.override(flow)

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


def _end_stream(streamer, tokens: Tensor, writer: TokenWriter | None) -> None:
    """Ends a stream, after the new tokens (1, n) if no writer has handed them on."""
    if writer is None or writer.streamer is None:
        streamer.put(tokens.cpu())

    streamer.end()


def _pad(
    tokens: Tensor,
    is_new: Tensor,
    is_kept: Tensor | None,
    first_new: int,
    options: GenerationOptions,
) -> Tensor:
    """Tokens (B, T) with padding behind each text's end, cut where the last of them ends."""
    if is_kept is None:
        return tokens

    ids = [options.pad_token_id, *options.end_token_ids]
    ids += [getattr(options.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    pad_token_id = next((token for token in ids if token is not None), None)
    if pad_token_id is not None:
        tokens = tokens.masked_fill(~is_kept, pad_token_id)

    used = (is_kept & is_new).any(0).nonzero().flatten().tolist()
    return tokens[:, : max(first_new, used[-1] + 1 if used else 0)]


def _take_rows(rows: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Some of the sequences of each tensor (B, ...)."""
    return [None if each is None else each[rows.to(each.device)] for each in tensors]
