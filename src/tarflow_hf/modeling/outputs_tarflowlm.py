"""The outputs of the model and its flows, and the tokens that they count."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput, logging

from .inverse_options import InverseReport

logger = logging.get_logger(__name__)


@dataclass
class FlowOutput(ModelOutput):
    """Output of [`FlowStack`]. `states` are h0 (the latents), ..., hL (the noise), each (B, T, d)."""

    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)
    log_det: Tensor | None = None  # (B,) nats, summed over positions and dimensions
    log_prob: Tensor | None = None  # (B,) nats, log p(latents)
    states: tuple[Tensor, ...] | None = None
    inverse_reports: list[InverseReport] | None = None  # of each flow from the data side


@dataclass
class TarFlowLMOutput(ModelOutput):
    """Output of [`TarFlowLMModel`], in nats: elbo = reconstruction + prior - posterior."""

    loss: Tensor | None = None  # scalar, -elbo per real token
    elbo: Tensor | None = None  # (B,)
    reconstruction_log_prob: Tensor | None = None  # (B,) log p(x | z)
    prior_log_prob: Tensor | None = None  # (B,) log p(z)
    posterior_log_prob: Tensor | None = None  # (B,) log q(z | x)
    latents: Tensor | None = None  # (B, T, d)
    noise: Tensor | None = None  # (B, T, d)
    hidden_states: tuple[Tensor, ...] | None = None  # each flow's state, (B, T, d), if asked for

    @property
    def logits(self) -> Tensor:
        """The log-weights (B, T, V) of each next token, given the latents of those before it.

        They are computed when they are read. Only a model that is one Mix-d flow which runs left to
        right, with the encoder's codebook and patch size 1, has any.
        """
        if (logits := vars(self).get("_logits")) is not None:  # out of a pickle
            return logits

        make_logits = vars(self).get("_make_logits")
        if make_logits is None:
            raise AttributeError(
                "There are no logits of the next token: only a model that is one mixture_rosenblatt flow, left to "
                "right and with patch_size 1, has them. model.decode(latents) gives log p(x | z)."
            )

        return make_logits()

    @property
    def last_hidden_state(self) -> Tensor:
        """There is none: the distribution of a token is that of a stack, not of one linear map.

        Raises:
            AttributeError: Always; it says how TRL's trainers take the model's own loss.
        """
        raise AttributeError(
            "There are no last hidden states from which the next token follows: the loss is the model's own. For TRL's "
            "SFTTrainer, in a subclass: compute_loss = transformers.Trainer.compute_loss."
        )

    def keep_label_logits(self, *arguments: Any) -> None:
        """Makes `label_logits` of the bound and the other arguments, if `["logits"]` is read."""
        self._make_label_logits = partial(label_logits, self.elbo, *arguments)

    def __reduce__(self):
        """The parts of a pickle: `logits` are in it as a tensor, since their maker is the model."""
        make, arguments, state, *items = super().__reduce__()
        if state.get("_make_logits") is not None:
            state = {**state, "_logits": self.logits, "_make_logits": None}

        return make, arguments, state, *items

    def __getitem__(self, key):
        if key != "logits":
            return super().__getitem__(key)

        make_logits = vars(self).get("_make_label_logits")
        return self.logits if make_logits is None else make_logits()


def label_logits(
    elbo: Tensor, input_ids: Tensor, is_scored: Tensor | None, vocab_size: int
) -> Tensor:
    """Log-probabilities (B, T, V) at each token, for the loss that `Trainer` computes from labels.

    With `label_smoothing_factor` it takes the labels away from the model and smooths `logits`. The
    bound says what a whole sequence is worth: each of its n scored tokens gets its geometric mean,
    p = exp(elbo / n), and the other tokens share 1 - p evenly. So the loss without smoothing is the
    model's own, and smoothing pulls p away from 1.

    Args:
        elbo: The bound (B,) in nats.
        input_ids: The tokens (B, T).
        is_scored: The tokens that it counts, (B, T); None if all.
        vocab_size: V.
    """
    logger.warning_once(
        'outputs["logits"] are made of the bound, for label_smoothing_factor: each token has the same share of it. '
        "For a loss of your own read outputs.elbo, or outputs.logits where the model has any."
    )
    num_tokens = input_ids.shape[1] if is_scored is None else is_scored.sum(-1)
    log_prob = (elbo / num_tokens).clamp(max=-1e-6)
    log_rest = torch.log(-torch.expm1(log_prob)) - math.log(max(1, vocab_size - 1))

    shape = *input_ids.shape, 1
    log_prob, log_rest = (x[:, None, None].expand(shape) for x in (log_prob, log_rest))
    logits = log_rest.expand(*input_ids.shape, vocab_size)
    return logits.scatter(-1, input_ids.unsqueeze(-1), log_prob)


def scored_tokens(attention_mask: Tensor | None, observed_mask: Tensor | None) -> Tensor | None:
    """True at the tokens (B, T) that are neither padding nor observed; None if all are."""
    if observed_mask is None:
        return None if attention_mask is None else attention_mask != 0

    is_missing = observed_mask == 0
    return is_missing if attention_mask is None else is_missing & (attention_mask != 0)


def observed_by(
    labels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None
) -> Tensor | None:
    """The observed tokens (B, T) that labels of -100 mean; None if they are the ids themselves."""
    if labels is input_ids or labels.shape != input_ids.shape:
        return None

    is_hidden = labels == -100
    is_leading = is_hidden.long().cumprod(-1) == 1
    if attention_mask is not None:
        is_real = attention_mask != 0
        is_leading = (is_hidden | ~is_real).long().cumprod(-1) == 1
        is_hidden = is_hidden & is_real
    if pad_token_id is not None:
        is_hidden = is_hidden & (is_leading | (input_ids != pad_token_id))

    return is_hidden


def mean_loss(
    elbo: Tensor,
    labels: Tensor | None,
    is_scored: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor | None:
    """The mean of -elbo (B,) over scored tokens, or a batch's share of it; None without labels."""
    if labels is None:
        return None

    loss = -elbo.sum() / (labels.numel() if is_scored is None else is_scored.sum())
    if num_items_in_batch is None:
        return loss

    # Scored tokens without a label, and labels that are not scored, count as the others do.
    return loss * (labels != -100).sum() / num_items_in_batch
