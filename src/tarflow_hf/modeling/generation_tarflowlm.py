"""`generate`: noise -> inverse flows -> latents -> tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput, logging

from .checks_tarflowlm import check_ids
from .generation_options import GenerationOptions
from .inversion_tarflowlm import InverseReport
from .slots_tarflowlm import Pieces

logger = logging.get_logger(__name__)


@dataclass
class TarFlowLMGenerateOutput(ModelOutput):
    """Output of [`TarFlowLMModel.generate`] with `return_dict_in_generate` or an `output_...`."""

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


@dataclass
class Text:
    """The tokens of a batch, known and new.

    The flows want the real tokens of a sequence in one piece, its padding at the end, wherever it
    was: `pieces` takes sequences (B, T, ...) there and back.
    """

    tokens: Tensor  # (B, T): the prompt, or the text with gaps, and 0 at new tokens behind it
    is_new: Tensor  # (B, T): True at tokens to write
    first_new: int  # the first of these in any sequence
    pieces: Pieces
    ids: Tensor  # pieces (B, n): known tokens, and 0
    is_known: Tensor  # pieces (B, n)
    is_real: Tensor  # pieces (B, n)
    is_infill: bool  # gaps are filled, and the text keeps its length

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask (B, n) of the pieces; None if nothing is padded."""
        return None if self.pieces.order is None else self.is_real

    def select(self, rows: Tensor) -> None:
        """Keeps some of the sequences, as far as they are read behind the flows."""
        rows = rows.to(self.tokens.device)
        self.tokens, self.is_new = self.tokens[rows], self.is_new[rows]


class Streaming:
    """Hands a streamer the prompt, then tokens as the first flow completes them.

    Only a first flow that runs left to right completes the text in the order in which it is read;
    otherwise all tokens come at the end.
    """

    def __init__(
        self,
        streamer,
        text: Text,
        choose_tokens: Callable[[Tensor], Tensor],
        end_token_ids: list[int],
        is_in_order: bool,
    ):
        if len(text.tokens) != 1:
            raise ValueError(f"A streamer takes one sequence at a time, not {len(text.tokens)}.")

        self.streamer, self.choose_tokens = streamer, choose_tokens
        self.end_token_ids, self.is_in_order = end_token_ids, is_in_order
        self.new_tokens: list[Tensor] = []
        streamer.put(text.tokens[:, : text.first_new].cpu())

    def put(self, latents: Tensor) -> None:
        """Takes the latents (1, P, d) of the next position."""
        self.new_tokens.append(self.choose_tokens(latents))
        is_after_end = _is_after_end(self.tokens(), self.end_token_ids)[:, -latents.shape[1] :]
        if not bool(is_after_end.all()):
            self.streamer.put(self.new_tokens[-1][~is_after_end].cpu())

    def tokens(self) -> Tensor:
        """All new tokens so far, (1, n)."""
        return torch.cat(self.new_tokens, 1)

    def end(self, new: Tensor) -> None:
        """Ends the stream; new (1, n) are all new tokens."""
        if not self.is_in_order:
            self.streamer.put(new[~_is_after_end(new, self.end_token_ids)].cpu())

        self.streamer.end()


class TarFlowLMGenerationMixin(GenerationMixin):
    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer=None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        infill_mask: Tensor | None = None,
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
            ValueError: If an option is unknown or out of range (as a keyword, in a generation
                config or saved with the model), mixture weights are steered though no flow has any,
                `num_candidates` meets `noise` or a streamer, a prompt leaves no room, a prompt or a
                continuation is no multiple of the patch size, a gap is not of whole patches, or a
                text has no gap.

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
        prompt, is_real = self._read_prompt(inputs, noise, kwargs)
        options = GenerationOptions.resolve(kwargs, generation_config, self.generation_config)
        self._check_options(options, noise, streamer)
        if infill_mask is not None:
            self._check_infill(prompt, is_real, infill_mask, kwargs)

        # 2. Where tokens are known, and where new ones go.
        text = self._lay_out(prompt, is_real, infill_mask, noise, options)

        # 3. The noise.
        noise = self._draw_noise(text, noise, options, generator)

        # 4. What is known conditions the flows.
        known = self._condition(text, noise, options)

        # 5. The inverse of the flows, from the last to the first.
        def choose_tokens(latents: Tensor) -> Tensor:
            return self._choose_tokens(latents, options.decode, generator).to(text.tokens.device)

        end_token_ids = [] if text.is_infill else options.end_token_ids
        streaming = self._start_stream(streamer, text, choose_tokens, end_token_ids)
        flow = self._invert_flows(text, noise, known, options, streaming)
        states = tuple(map(text.pieces.scatter, flow.states))

        # 6. Latents to tokens.
        if streaming is not None and streaming.is_in_order:
            new = streaming.tokens()
        else:
            new = choose_tokens(states[0][:, text.first_new :])
            is_new = text.is_new[:, text.first_new :]
            new = torch.where(is_new, new, text.tokens[:, text.first_new :])

        # 7. The best of several candidates.
        elbo = None
        if options.num_candidates > 1:
            elbo, best = self._choose_best(text, new, known, options, generator)
            text.select(best)
            new = new[best.to(new.device)]
            states = tuple(state[best.to(state.device)] for state in states)

        # 8. Padding behind the end of a sequence.
        if streaming is not None:
            streaming.end(new)

        new = _pad_after_end(new, end_token_ids, options.pad_token_id)
        sequences = torch.cat([text.tokens[:, : text.first_new], new], 1)
        if not options.returns_dict:
            return sequences

        return TarFlowLMGenerateOutput(
            sequences=sequences,
            latents=states[0],
            noise=states[-1],
            states=states if options.output_states else None,
            inverse_reports=flow.inverse_reports if options.output_inverse_report else None,
            elbo=elbo,
        )

    @property
    def _home(self) -> torch.device:
        """The device of the work. Offloaded weights are on the meta device; hooks bring inputs."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def _read_prompt(
        self, inputs: Tensor | None, noise: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Takes the prompt (B, n) out of the arguments, and where it is real; none is (B, 0)."""
        input_ids = kwargs.pop("input_ids", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("Give the prompt as inputs or as input_ids, not as both.")

        prompt = inputs if input_ids is None else input_ids
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is not None and (prompt is None or attention_mask.shape != prompt.shape):
            shape = None if prompt is None else tuple(prompt.shape)
            raise ValueError(
                f"attention_mask must have the shape of the prompt: {tuple(attention_mask.shape)}, {shape}."
            )
        if prompt is not None and (prompt.ndim != 2 or prompt.is_floating_point()):
            raise ValueError(
                f"The prompt must be integers of shape (B, n): {prompt.dtype}, {tuple(prompt.shape)}."
            )
        if noise is not None and noise.ndim != 3:
            raise ValueError(f"noise must have shape (B, T, d), not {tuple(noise.shape)}.")

        if prompt is None:
            batch_size = 1 if noise is None else len(noise)
            prompt = torch.empty(batch_size, 0, dtype=torch.long, device=self._home)

        if attention_mask is None:
            return prompt, torch.ones_like(prompt, dtype=torch.bool)

        return prompt, attention_mask != 0

    def _check_options(self, options: GenerationOptions, noise: Tensor | None, streamer) -> None:
        """Raises a ValueError where options contradict this model, the noise or a streamer."""
        layers = self.flow.layers[: options.num_flows]
        takes_processor = any(layer.head.takes_logits_processor for layer in layers)
        if options.logits_processor() is not None and not takes_processor:
            couplings = [flow["coupling"] for flow in self.config.flows[: options.num_flows]]
            raise ValueError(
                f"mixture_temperature, top_k and top_p steer mixture_rosenblatt flows, but the flows are {couplings}."
            )

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
        first_new = int(is_new.any(0).int().argmax())
        is_infill = infill_mask is not None
        return Text(tokens, is_new, first_new, pieces, ids, is_known, is_real, is_infill)

    def _draw_noise(
        self,
        text: Text,
        noise: Tensor | None,
        options: GenerationOptions,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The noise of the pieces (B, n, d): the given one (B, T, d), or a draw."""
        shape = (*text.tokens.shape, self.config.latent_size)
        if noise is None:
            device = self._home if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device) * options.temperature
            noise = noise * (1.0 if options.do_sample else 0.0)
        elif noise.shape != shape:
            raise ValueError(
                f"noise must have shape (B, T, d) = {shape}, not {tuple(noise.shape)}."
            )

        return text.pieces.gather(noise.to(self._home))

    def _condition(
        self, text: Text, noise: Tensor, options: GenerationOptions
    ) -> dict[str, Tensor]:
        """The arguments by which the flows are told what is known."""
        if not bool(text.is_known.any()):
            return {}

        by_patch = text.is_known.unflatten(1, (-1, self.config.patch_size))
        if bool((by_patch.any(-1) != by_patch.all(-1)).any()):
            raise ValueError(
                f"infill_mask must cover whole patches of patch_size, {self.config.patch_size}, tokens."
            )

        if self.config.conditional:
            return {"observed_ids": text.ids, "observed_mask": text.is_known}

        self._check_directions(text, options.num_flows)
        return {"known": self.encode(text.ids, noise=noise), "known_mask": text.is_known}

    def _start_stream(
        self,
        streamer,
        text: Text,
        choose_tokens: Callable[[Tensor], Tensor],
        end_token_ids: list[int],
    ) -> Streaming | None:
        if streamer is None:
            return None

        is_in_order = not text.is_infill and self.config.flows[0]["direction"] != "right_to_left"
        return Streaming(streamer, text, choose_tokens, end_token_ids, is_in_order)

    def _invert_flows(
        self,
        text: Text,
        noise: Tensor,
        known: dict[str, Tensor],
        options: GenerationOptions,
        streaming: Streaming | None,
    ) -> ModelOutput:
        streams = streaming is not None and streaming.is_in_order
        return self.flow(
            noise,
            text.attention_mask,
            reverse=True,
            num_flows=options.num_flows,
            flow_temperatures=options.flow_temperatures,
            logits_processor=options.logits_processor(),
            on_position=streaming.put if streams else None,
            inverse_method=options.inverse_method,
            inverse_window=options.inverse_window,
            inverse_tolerance=options.inverse_tolerance,
            capture_step=options.capture_step,
            **known,
        )

    def _choose_tokens(
        self, latents: Tensor, decode: str, generator: torch.Generator | None
    ) -> Tensor:
        """Latents (B, n, d) to tokens (B, n): the most likely ones, or a sample."""
        log_prob = self.decode(latents)
        if decode == "argmax":
            return log_prob.argmax(-1)

        probabilities = log_prob.exp().flatten(0, -2)
        if generator is not None:
            probabilities = probabilities.to(generator.device)

        tokens = torch.multinomial(probabilities, 1, generator=generator)
        return tokens.reshape(latents.shape[:-1])

    def _choose_best(
        self,
        text: Text,
        new: Tensor,
        known: dict[str, Tensor],
        options: GenerationOptions,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """The highest of the candidates' bounds, (B,) in nats, and which candidates have it.

        The candidates of a sequence are consecutive rows. Their bounds are from latents that are
        drawn by the same noise.
        """
        num_candidates = options.num_candidates
        tokens = torch.cat([text.tokens[:, : text.first_new], new], 1)
        ids = text.pieces.gather(tokens.to(self._home))
        attention_mask = text.attention_mask
        if attention_mask is not None:
            ids = ids.masked_fill(~attention_mask, 0)

        shape = (len(ids) // num_candidates, ids.shape[1], self.config.latent_size)
        device = ids.device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=device)
        latents = self.encode(ids, noise=noise.repeat_interleave(num_candidates, 0))

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
                "conditional distribution. Exact are the continuation of a prompt if no flow runs right to left, "
                "and everything that a model with conditional=True has been trained for."
            )

    def _length(self, is_prompt: Tensor, noise: Tensor | None, options: GenerationOptions) -> int:
        """The number of tokens of a sequence, with its prompt (B, n), and the prompt's padding."""
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
        elif options.max_new_tokens is not None:
            length = prompt_length + options.max_new_tokens
        else:
            length = longest if options.max_length is None else options.max_length

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


def _is_after_end(tokens: Tensor, end_token_ids: list[int]) -> Tensor:
    """True at tokens (B, n) behind their sequence's first end-of-sequence token."""
    if not end_token_ids:
        return torch.zeros_like(tokens, dtype=torch.bool)

    is_end = torch.isin(tokens, torch.as_tensor(end_token_ids, device=tokens.device))
    return (is_end.cumsum(-1) - is_end.int()) > 0


def _pad_after_end(tokens: Tensor, end_token_ids: list[int], pad_token_id: int | None) -> Tensor:
    """Tokens (B, n) with padding, or the end-of-sequence token again, behind the first such one."""
    is_after_end = _is_after_end(tokens, end_token_ids)
    if not bool(is_after_end.any()):
        return tokens

    return tokens.masked_fill(
        is_after_end, end_token_ids[0] if pad_token_id is None else pad_token_id
    )
