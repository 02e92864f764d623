"""`generate`: noise -> inverse flows -> latents -> tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput, logging

from .inversion_tarflowlm import InverseReport

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
    """What [`TarFlowLMModel.generate`] returns with `return_dict_in_generate` or another `output_...`."""

    sequences: Tensor | None = None  # (B, T)
    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)
    states: tuple[Tensor, ...] | None = None  # h0 (latents), ..., hL (noise), each (B, T, d)
    inverse_reports: list[InverseReport] | None = None  # how each flow was inverted, from the data side


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
        inverse_method: str | Sequence[str] = "auto",
        inverse_window: int | None = None,
        inverse_tolerance: float | None = None,
        capture_step: bool = False,
        output_inverse_report: bool = False,
        **kwargs: Any,
    ) -> Tensor | TarFlowLMGenerateOutput:
        """Samples sequences: draws noise u ~ N(0, I), inverts the flows from the last to the first, decodes.

        Without a prompt, sampling is exact: the tokens follow the model's distribution. With a prompt, the latents of
        the prompt are drawn from q(z | x) and held fixed. Where every flow runs left to right, the continuation then
        follows p(z_new | z_prompt) exactly. Where some flow runs right to left, only the first flow sees the prompt:
        an approximation, about which one warning is given.

        Args:
            inputs (`torch.LongTensor` of shape (B, n), *optional*): Prompt, also accepted as `input_ids`.
            generation_config ([`GenerationConfig`], *optional*): Options; those given as keywords win.
            streamer (*optional*): Receives the prompt, then tokens as the first flow completes them.
            generator ([`torch.Generator`], *optional*): Source of all randomness; the global one by default.
            noise (`torch.Tensor` of shape (B, T, d), *optional*): The noise itself: the same noise gives the same
                tokens. T counts the prompt, whose latents are drawn by the noise there.
            decode ("argmax" or "sample"): How tokens follow from latents: the most likely under p(x | z), the
                default, or a sample of it.
            output_states (`bool`): Also return every flow's state, see [`TarFlowLMGenerateOutput`].
            inverse_method ("auto", "sequential" or "parallel", or a list with one for each flow): How the flows are
                inverted, position after position or many at once. The result is the same up to rounding; "auto" takes
                what is expected to be faster, see `choose_inverse_methods`.
            inverse_window, inverse_tolerance (*optional*): Of the parallel form, see `invert_in_parallel`.
            capture_step (`bool`): On a GPU, take the sequential form's steps by a CUDA graph. Not run on one yet.
            output_inverse_report (`bool`): Also return each flow's [`InverseReport`].
            max_new_tokens, max_length (`int`): Length; by default that which the model was made for,
                `max_position_embeddings`, which is also the most.
            num_return_sequences (`int`): Sequences per prompt.
            temperature (`float`): Standard deviation of the noise, 1 by default.
            do_sample (`bool`): True by default; False puts the noise at its mode, 0.
            eos_token_id, pad_token_id: After the first end-of-sequence token of a sequence comes padding.
            return_dict_in_generate (`bool`): Return a [`TarFlowLMGenerateOutput`].

        Returns:
            Token ids (B, T), prompt included, or a [`TarFlowLMGenerateOutput`].

        Raises:
            ValueError: An unknown option or one out of range, a prompt with padding or with no room behind it, a
                length that is no multiple of the patch size.

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
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask: prompts must have no padding; give prompts of different lengths one by one."
            )
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
        if noise is None:
            prompt = prompt.repeat_interleave(num_return_sequences, 0)
        elif num_return_sequences != 1:
            raise ValueError("noise already says how many sequences there are: leave out num_return_sequences.")
        length = self._length(prompt.shape[1], noise, option("max_new_tokens", None), option("max_length", None))
        shape = (len(prompt), length, self.config.latent_size)
        if noise is None:
            device = home if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device) * temperature
            noise = noise * (1.0 if option("do_sample", True) else 0.0)
        elif noise.shape != shape:
            raise ValueError(f"noise must have shape (B, T, d) = {shape}, not {tuple(noise.shape)}.")

        prefix = None
        if prompt.shape[1]:
            directions = [flow["direction"] for flow in self.config.flows]
            if directions[0] != "left_to_right":
                raise ValueError("A prompt needs a first flow that runs left to right.")
            if "right_to_left" in directions:
                logger.warning_once(
                    "This model has flows that run right to left: continuing a prompt holds it fixed in the first flow "
                    "only, which is an approximation of the model's conditional distribution."
                )
            prefix = self.encode(prompt, noise=noise[:, : prompt.shape[1]])

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
        streams = streamer is not None and self.config.flows[0]["direction"] == "left_to_right"
        flow = self.flow(
            noise.to(home),
            reverse=True,
            prefix=prefix,
            on_position=stream if streams else None,
            inverse_method=inverse_method,
            inverse_window=inverse_window,
            inverse_tolerance=inverse_tolerance,
            capture_step=capture_step,
        )
        if streams:
            new = torch.cat(new_tokens, 1)
        else:
            new = choose(flow.latents[:, prompt.shape[1] :]).to(prompt.device)
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
        if output_states or output_inverse_report or option("return_dict_in_generate", False):
            return TarFlowLMGenerateOutput(
                sequences=sequences,
                latents=flow.latents,
                noise=flow.noise,
                states=flow.states if output_states else None,
                inverse_reports=flow.inverse_reports if output_inverse_report else None,
            )
        return sequences

    def _length(self, prompt_length: int, noise: Tensor | None, max_new_tokens: int | None, max_length: int | None):
        """Tokens of a sequence, prompt included."""
        longest = self.config.max_position_embeddings
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
        if length % self.config.patch_size or prompt_length % self.config.patch_size:
            raise ValueError(
                f"Prompt and whole must be multiples of patch_size, {self.config.patch_size}: "
                f"{prompt_length}, {length}."
            )
        return length


def _is_after_end(tokens: Tensor, eos_token_id: int | list[int] | None) -> Tensor:
    """Where a token (B, n) stands behind its sequence's first end-of-sequence token."""
    if eos_token_id is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    is_end = torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device))
    return (is_end.cumsum(-1) - is_end.int()) > 0
