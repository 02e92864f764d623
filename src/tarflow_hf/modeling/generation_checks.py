"""Checks of what `generate` is asked for, in the order in which they are made.

Each raises a ValueError that says what is allowed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging

from .checks_tarflowlm import check_num_flows
from .configuration_tarflowlm import TarFlowLMConfig
from .drafts_tarflowlm import check_drafts
from .generation_layout import Prompt, Text
from .generation_options import GenerationOptions, asked_for
from .inversion_tarflowlm import check_finite
from .pretrained_tarflowlm import TarFlowLMPreTrainedModel

logger = logging.get_logger(__name__)


def check_options(options: GenerationOptions, model: TarFlowLMPreTrainedModel) -> None:
    """Raises a ValueError where options contradict a model."""
    check_num_flows(options.num_flows, len(model.flow.layers))
    layers = model.flow.layers[: options.num_flows]
    takes_processor = any(layer.head.takes_logits_processor for layer in layers)
    couplings = [flow["coupling"] for flow in model.config.flows[: options.num_flows]]
    if options.warpers() is not None and not takes_processor:
        raise ValueError(
            f"mixture_temperature, top_k and top_p (min_p, typical_p, epsilon_cutoff, eta_cutoff) steer "
            f"mixture_rosenblatt flows, but the flows are {couplings}."
        )

    first = model.config.flows[0]
    if options.logits_options and not model.config.has_token_logits:
        raise ValueError(
            f"{', '.join(options.logits_options)} process the logits of the next token. They need a first flow "
            "that has them: mixture_rosenblatt with the encoder's codebook, left to right, patch_size 1. The first "
            f"flow is {first['coupling']}, {first['direction']}, and patch_size is {model.config.patch_size}."
        )

    if options.draft_options:
        check_drafts(options, model.config)


def check_sources(options: GenerationOptions, noise: Tensor | None, streamer) -> None:
    """Raises a ValueError where options contradict the noise or a streamer."""
    if streamer is not None and not hasattr(streamer, "put"):
        raise ValueError(f"streamer must have the methods put and end, not be {streamer!r}.")

    num_candidates = options.num_candidates
    if num_candidates > 1 and noise is not None:
        raise ValueError(
            f"noise already is that of one candidate: leave out num_candidates={num_candidates}."
        )
    if num_candidates > 1 and streamer is not None:
        raise ValueError(f"A streamer cannot wait for the best of num_candidates={num_candidates}.")
    if noise is not None and options.num_return_sequences != 1:
        raise ValueError(
            "noise already says how many sequences there are: leave out num_return_sequences."
        )


def check_weights(flow: nn.Module, num_flows: int | None) -> None:
    """Raises a ValueError if a weight that decides on states or tokens is not finite.

    A search for the inverse would hide it. Weights that are not at hand (offloaded, quantised)
    are passed over.
    """
    parts = {"flow.codebook": flow.codebook}
    for index, layer in enumerate(flow.layers[:num_flows]):
        parts[f"flow.layers.{index}.head"] = layer.head

    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            is_plain = parameter.is_floating_point() and type(parameter.data) is Tensor
            is_at_hand = is_plain and parameter.device.type != "meta"
            if is_at_hand and not bool(parameter.sum(dtype=torch.float32).isfinite()):
                raise ValueError(f"{part}.{name} has a weight that is not finite.")


def check_infill(
    prompt: Prompt, given: dict[str, Any], config: GenerationConfig | None, patch_size: int
) -> None:
    """Raises a ValueError unless each text (B, T) has a gap, and all are of whole patches."""
    text, is_real, infill_mask = prompt.ids, prompt.is_real, prompt.is_gap
    if infill_mask.shape != text.shape or not text.numel():
        shapes = f"{tuple(infill_mask.shape)}, {tuple(text.shape)}"
        raise ValueError(
            f"infill_mask must have the shape (B, T) of the text in input_ids, not empty: {shapes}."
        )

    if not bool(((infill_mask == 0) | (infill_mask == 1)).all()):
        raise ValueError("infill_mask must be boolean, or 0 and 1.")

    for name in ("max_new_tokens", "max_length"):
        if asked_for(name, given, config) is not None:
            raise ValueError(
                f"{name} says nothing with infill_mask, with which a text keeps its length."
            )

    lengths = is_real.sum(-1)
    if text.shape[1] % patch_size or bool((lengths % patch_size).any()):
        raise ValueError(
            f"Texts must be multiples of patch_size, {patch_size}, not {lengths.tolist()} tokens."
        )
    if not bool(((infill_mask == 1) & is_real).any(-1).all()):
        raise ValueError("infill_mask has a sequence with nothing to fill in.")


def check_text(text: Text, options: GenerationOptions, streamer, runs_in_order: bool) -> None:
    """Raises a ValueError where options contradict the texts that are to be written."""
    if streamer is not None and len(text.tokens) != 1:
        raise ValueError(f"A streamer takes one sequence at a time, not {len(text.tokens)}.")
    if text.is_infill and options.stop_options:
        raise ValueError(
            f"{', '.join(options.stop_options)} end a text, but with infill_mask it keeps its length."
        )

    is_parallel = options.first_inverse_method == "parallel"
    if options.logits_options and (is_parallel or options.capture_step):
        raise ValueError(
            f"{', '.join(options.logits_options)} read what was written before: leave out "
            'capture_step, and inverse_method="parallel" of the first flow.'
        )

    is_in_time = runs_in_order and options.num_candidates == 1 and not options.synced_gpus
    if "max_time" in options.from_library and not is_in_time:
        raise ValueError(
            "max_time stops a first flow that runs left to right, without num_candidates and synced_gpus; "
            "others have no text until they are done."
        )


def check_directions(text: Text, config: TarFlowLMConfig, num_flows: int | None) -> None:
    """Warns once if the flows go on from what is known only approximately.

    Raises:
        ValueError: If there is a prompt, and the first flow runs right to left.
    """
    directions = [flow["direction"] for flow in config.flows[:num_flows]]
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


def check_states(states: tuple[Tensor, ...], config: TarFlowLMConfig) -> None:
    """Raises a ValueError if a flow's state (B, n, d) is not finite, naming the first of them."""
    for index in reversed(range(len(states) - 1)):
        is_reversed = config.flows[index]["direction"] == "right_to_left"
        what = f"The inverse of flow {index} (flow.layers.{index})"
        check_finite(states[index], what, is_reversed)
