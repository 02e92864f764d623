"""The proof of a conversion: a model and its source on the same tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.configuration_tarflowlm import TarFlowLMConfig
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..modeling.slots_tarflowlm import make_layout, to_positions
from ..modeling.vocabulary_tarflowlm import closest_distance
from .source import SourceParts, explained, random_ids

PROBE_TEXT = (
    "The history of the city begins in the twelfth century, when a bridge was built across the "
    "river. Merchants came, and with them a market, a wall and a court of law."
)


@dataclass
class Probe:
    """A source and its conversion on the same tokens, in nats a token."""

    source_nats: float  # the source's cross-entropy
    elbo_nats: float  # minus the model's ELBO
    max_difference: float  # the largest one between next-token log-probabilities
    closest_means: float | None = None  # the distance of the codebook's closest two, in scales

    def __str__(self) -> str:
        parts = [
            f"source {self.source_nats:.6f} nats a token, minus ELBO {self.elbo_nats:.6f}",
            f"log-probabilities differ by at most {self.max_difference:.1e}",
        ]
        if self.closest_means is not None:
            parts.append(f"closest means {self.closest_means:.1f} scales apart")

        return "; ".join(parts)


@torch.no_grad()
def probe(source: PreTrainedModel, model: TarFlowLMModel, input_ids: Tensor) -> Probe:
    """Compares a source with its conversion on tokens (B, T), the start token not among them."""
    found = _compare(source, model, input_ids)
    codebook = model.codebook()
    found.closest_means = closest_distance(codebook.mean) / codebook.log_scale.max().exp().item()
    return found


def _compare(source: PreTrainedModel, model: TarFlowLMModel, input_ids: Tensor) -> Probe:
    """A probe without the look at the codebook, which takes seconds if it is large."""
    start = torch.full_like(input_ids[:, :1], model.config.start_token_id)
    before = torch.cat([start, input_ids[:, :-1]], 1)
    expected = source(before, use_cache=False).logits.float().log_softmax(-1)
    log_prob = expected.gather(-1, input_ids.unsqueeze(-1))
    difference = (next_token_log_probs(model, input_ids) - expected).abs()
    generator = torch.Generator(input_ids.device).manual_seed(0)
    elbo = model(input_ids, generator=generator).elbo

    return Probe(
        source_nats=-log_prob.mean().item(),
        elbo_nats=-elbo.sum().item() / input_ids.numel(),
        max_difference=difference.max().item(),
    )


def next_token_log_probs(
    model: TarFlowLMModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """The log-probability (B, T, V) in nats of each token, given those before it in ids (B, T).

    Entry t is that of token t; at padding, where the mask (B, T) is 0, it means nothing. These are
    the mixture weights of the first flow: the model's next-token distribution if it is the only
    flow, and its codebook does not overlap.

    Raises:
        ValueError: If the first flow has no mixture weights of tokens, or runs right to left.
    """
    if not model.config.has_token_logits:
        raise ValueError(
            "The next token has probabilities only where the first flow is mixture_rosenblatt with tie_codebook, runs "
            f"left_to_right, and takes one token at a time: {model.config.flows[0]}, patch_size "
            f"{model.config.patch_size}."
        )

    flow = model.flow.layers[0]
    codebook = model.codebook()
    h = to_positions(codebook.sample(input_ids, noise=torch.zeros((), device=input_ids.device)), 1)
    order = flow.order(h, make_layout(h, 1, attention_mask))
    context = flow.context(flow.inputs(order.arrange(h), codebook))
    (weight, bias), *_ = flow.head.projection()

    return order.from_slots(F.linear(context, weight, bias).float().log_softmax(-1))


def probe_ids(
    source: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    start: int,
    config: TarFlowLMConfig,
) -> list[Tensor]:
    """Random ids, and those of a text if there is a tokenizer, without the start token."""
    parts = SourceParts.of(source)
    longest = min(32, config.max_position_embeddings)
    ids = [random_ids(parts, start, longest + 1)[:, 1:]]
    if tokenizer is not None:
        text = tokenizer(PROBE_TEXT, return_tensors="pt").input_ids[:, :longest]
        text = text[:, 1:] if text.numel() and text[0, 0] == start else text
        if text.numel() and int(text.max()) < config.vocab_size:
            ids.append(text.to(source.device))

    return ids


def prove(source: PreTrainedModel, model: TarFlowLMModel, ids: Tensor) -> None:
    """Raises a ValueError that says where the model and its source part."""
    name = type(source).__name__
    with explained(f"The decoder of {name} does not run on input embeddings"):
        found = _compare(source, model, ids)

    is_exact = source.dtype.itemsize >= 4
    tolerance = 1e-3 if is_exact else 0.25
    if not found.max_difference <= tolerance:
        raise ValueError(
            f"{name} is not expressed by its decoder on input embeddings and a linear output projection: {found}. Its "
            "base model reads more of a token than its embedding, or its config does not say all of it."
        )

    if not abs(found.elbo_nats - found.source_nats) <= (1e-4 if is_exact else 0.02):
        raise ValueError(
            f"The codebook overlaps: {found}. Give a larger latent_size, or a smaller log_scale."
        )

    _check_steps(name, model, ids[:1, :4])


def _check_steps(name: str, model: TarFlowLMModel, ids: Tensor) -> None:
    """Raises a ValueError unless step by step, with the decoder's cache, all is as at once."""
    with explained(f"The decoder of {name} does not take a cache of keys and values"):
        generator = torch.Generator(ids.device).manual_seed(0)
        noise = model.flow(model.encode(ids, generator)).noise
        tokens = model.flow(noise, reverse=True, inverse_method="sequential").latents
        is_same = torch.equal(model.decode(tokens).argmax(-1), ids)

    if not is_same:
        raise ValueError(
            f"The decoder of {name} gives another output step by step, with its cache, than at once."
        )
