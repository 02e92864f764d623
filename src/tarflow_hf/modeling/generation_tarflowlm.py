"""`generate`: noise -> inverse flows -> latents -> tokens."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)

# The options of a GenerationConfig that mean something here.
OPTIONS = (
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "do_sample",
    "temperature",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "return_dict_in_generate",
    "use_cache",
)


@dataclass
class TarFlowLMGenerateOutput(ModelOutput):
    """What [`TarFlowLMModel.generate`] returns with `return_dict_in_generate` or `output_states`."""

    sequences: Tensor | None = None  # (B, T)
    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)
    states: tuple[Tensor, ...] | None = None  # h0 (latents), ..., hL (noise), each (B, T, d)


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
        **kwargs: Any,
    ) -> Tensor | TarFlowLMGenerateOutput:
        """Samples sequences: draws noise u ~ N(0, I), inverts the flows from the last to the first, decodes.

        Without a prompt, sampling is exact: the tokens follow the model's distribution. With a prompt, the latents of
        the prompt are drawn from q(z | x) and held fixed. Where every flow runs left to right, the continuation then
        follows p(z_new | z_prompt) exactly. Where some flow runs right to left, only the first flow sees the prompt:
        an approximation, about which one warning is given. Prompts of different lengths may share a batch: each is
        continued as it would be alone.

        Args:
            inputs (`torch.LongTensor` of shape (B, n), *optional*): Prompt, also accepted as `input_ids`.
            attention_mask (`torch.Tensor` of shape (B, n), *optional*): 0 where a prompt has padding, on either side.
                What is returned has it there, too, before the new tokens.
            generation_config ([`GenerationConfig`], *optional*): Options; those given as keywords win.
            streamer (*optional*): Receives the prompt, then tokens as the first flow completes them.
            generator ([`torch.Generator`], *optional*): Source of all randomness; the global one by default.
            noise (`torch.Tensor` of shape (B, T, d), *optional*): The noise itself: the same noise gives the same
                tokens. T counts the prompt, whose latents are drawn by the noise there, and its padding.
            decode ("argmax" or "sample"): How tokens follow from latents: the most likely under p(x | z), the
                default, or a sample of it.
            output_states (`bool`): Also return every flow's state, see [`TarFlowLMGenerateOutput`].
            max_new_tokens, max_length (`int`): Length; by default that which the model was made for,
                `max_position_embeddings`, which is also the most.
            num_return_sequences (`int`): Sequences per prompt.
            temperature (`float`): Standard deviation of the noise, 1 by default.
            do_sample (`bool`): True by default; False puts the noise at its mode, 0.
            eos_token_id, pad_token_id: After the first end-of-sequence token of a sequence comes padding.
            return_dict_in_generate (`bool`): Return a [`TarFlowLMGenerateOutput`].

        Returns:
            Token ids (B, T), prompt included (with its padding, where latents and states are 0), or a
            [`TarFlowLMGenerateOutput`].

        Raises:
            ValueError: An unknown option or one out of range, a prompt with no room behind it, a prompt or a
                continuation whose length is no multiple of the patch size.

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
            shapes = f"{tuple(attention_mask.shape)}, {None if prompt is None else tuple(prompt.shape)}"
            raise ValueError(f"attention_mask must have the shape of the prompt: {shapes}.")
        if unknown := sorted(set(kwargs) - set(OPTIONS)):
            raise ValueError(f"generate has no options {unknown}; its options are {', '.join(OPTIONS)}.")

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
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}.")
        num_return_sequences = option("num_return_sequences", 1)
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be at least 1, not {num_return_sequences}.")

        # Offloaded weights stand on the meta device, and hooks bring the inputs to where the work is done.
        home = torch.device("cpu") if self.device.type == "meta" else self.device
        if prompt is None:
            prompt = torch.empty(1 if noise is None else len(noise), 0, dtype=torch.long, device=home)
        is_known = torch.ones_like(prompt, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        if noise is None:
            prompt, is_known = (x.repeat_interleave(num_return_sequences, 0) for x in (prompt, is_known))
        elif num_return_sequences != 1:
            raise ValueError("noise already says how many sequences there are: leave out num_return_sequences.")
        length = self._length(is_known, noise, option("max_new_tokens", None), option("max_length", None))
        shape = (len(prompt), length, self.config.latent_size)
        if noise is None:
            device = home if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device) * temperature
            noise = noise * (1.0 if option("do_sample", True) else 0.0)
        elif noise.shape != shape:
            raise ValueError(f"noise must have shape (B, T, d) = {shape}, not {tuple(noise.shape)}.")

        # The flows want what is real of a sequence in one piece: its padding goes to the end, wherever it stood.
        num_new = length - prompt.shape[1]
        ids, is_known = F.pad(prompt, (0, num_new)).to(home), is_known.to(home)
        is_real, is_known = F.pad(is_known, (0, num_new), value=True), F.pad(is_known, (0, num_new), value=False)
        pieces = Pieces(is_real)
        ids, is_known, is_real, noise = (pieces.gather(x) for x in (ids, is_known, is_real, noise.to(home)))
        known = {}
        if bool(is_known.any()):
            self._check_prompt()
            latents = self.encode(ids.masked_fill(~is_known, 0), noise=noise)
            known = {"known": latents, "known_mask": is_known}

        new_tokens: list[Tensor] = []

        def choose(latents: Tensor) -> Tensor:
            log_prob = self.decode(latents)
            if decode == "argmax":
                return log_prob.argmax(-1)
            probabilities = log_prob.exp().flatten(0, -2)
            if generator is not None:
                probabilities = probabilities.to(generator.device)
            return torch.multinomial(probabilities, 1, generator=generator).reshape(latents.shape[:-1])

        eos_token_id = option("eos_token_id", None)

        def stream(latents: Tensor) -> None:
            new_tokens.append(choose(latents).to(prompt.device))
            is_after_end = _is_after_end(torch.cat(new_tokens, 1), eos_token_id)[:, -latents.shape[1] :]
            if not bool(is_after_end.all()):
                streamer.put(new_tokens[-1][~is_after_end].cpu())

        if streamer is not None:
            if len(prompt) != 1:
                raise ValueError(f"A streamer takes one sequence at a time, not {len(prompt)}.")
            streamer.put(prompt.cpu())
        # Only a first flow that runs left to right completes the text in the order in which it is read.
        streams = streamer is not None and self.config.flows[0]["direction"] != "right_to_left"
        attention_mask = None if pieces.order is None else is_real
        flow = self.flow(noise, attention_mask, reverse=True, on_position=stream if streams else None, **known)
        states = tuple(map(pieces.scatter, flow.states))
        if streams:
            new = torch.cat(new_tokens, 1)
        else:
            new = choose(states[0][:, prompt.shape[1] :]).to(prompt.device)
        is_after_end = _is_after_end(new, eos_token_id)
        if streamer is not None:
            if not streams:
                streamer.put(new[~is_after_end].cpu())
            streamer.end()
        if bool(is_after_end.any()):
            pad_token_id = option("pad_token_id", None)
            end_token_id = eos_token_id[0] if isinstance(eos_token_id, (list, tuple)) else eos_token_id
            new = new.masked_fill(is_after_end, end_token_id if pad_token_id is None else pad_token_id)
        sequences = torch.cat([prompt, new], 1)
        if output_states or option("return_dict_in_generate", False):
            return TarFlowLMGenerateOutput(sequences, states[0], states[-1], states if output_states else None)
        return sequences

    def _check_prompt(self) -> None:
        """Whether the flows can continue a prompt, and how well."""
        directions = [flow["direction"] for flow in self.config.flows]
        if directions[0] == "right_to_left":
            raise ValueError("A prompt needs a first flow that runs left to right.")
        if "right_to_left" in directions:
            logger.warning_once(
                "This model has flows that run right to left: continuing a prompt holds it fixed in the first flow "
                "only, which is an approximation of the model's conditional distribution."
            )

    def _length(self, is_prompt: Tensor, noise: Tensor | None, max_new_tokens: int | None, max_length: int | None):
        """Tokens of a sequence, prompt and its padding included; prompts are where the mask (B, n) is True."""
        prompt_length, longest = is_prompt.shape[1], self.config.max_position_embeddings
        if prompt_length >= longest:
            raise ValueError(
                f"A prompt of {prompt_length} tokens leaves no room: max_position_embeddings is {longest}."
            )
        if noise is not None:
            length = noise.shape[1]
            if length > longest:
                raise ValueError(f"noise for {length} tokens, but max_position_embeddings is {longest}.")
        elif max_new_tokens is not None:
            length = prompt_length + max_new_tokens
        else:
            length = longest if max_length is None else max_length
        if length > longest:
            logger.warning_once(f"{length} tokens were asked for; the model was made for {longest}, and stops there.")
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


class Pieces:
    """Sequences with padding anywhere, (B, T, ...), and their real tokens in one piece, padding at the end.

    Example:
        >>> pieces = Pieces(torch.tensor([[False, True, True], [True, False, False]]))
        >>> pieces.gather(torch.tensor([[0, 1, 2], [3, 0, 0]]))
        tensor([[1, 2],
                [3, 0]])
        >>> pieces.scatter(torch.tensor([[1, 2], [3, 0]]))
        tensor([[0, 1, 2],
                [3, 0, 0]])
    """

    def __init__(self, is_real: Tensor):
        self.order = None  # (B, T): where the tokens of the pieces stand; None where nothing is padded
        if not bool(is_real.all()):
            self.order = (~is_real).int().argsort(dim=-1, stable=True)
            self.width, self.length = int(is_real.sum(-1).max()), is_real.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """Sequences (B, T, ...) to pieces (B, longest, ...)."""
        return x if self.order is None else self._take(x, self.order)[:, : self.width]

    def scatter(self, x: Tensor) -> Tensor:
        """Back to sequences, with 0 at padding (where pieces have it)."""
        if self.order is None:
            return x
        x = torch.cat([x, x.new_zeros(len(x), self.length - self.width, *x.shape[2:])], 1)
        return self._take(x, self.order.argsort(-1))

    def _take(self, x: Tensor, index: Tensor) -> Tensor:
        index = index.to(x.device).reshape(*index.shape, *[1] * (x.ndim - 2))
        return x.gather(1, index.expand_as(x))


def _is_after_end(tokens: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    """Where a token (B, n) stands behind its sequence's first end-of-sequence token."""
    if eos_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    is_end = torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device))
    return (is_end.cumsum(-1) - is_end.int()) > 0
