"""The outputs of the model and its flows, and the tokens that they count."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .inversion_tarflowlm import InverseReport


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
        make_logits = vars(self).get("_make_logits")
        if make_logits is None:
            raise AttributeError(
                "There are no logits of the next token: only a model that is one mixture_rosenblatt flow, left to "
                "right and with patch_size 1, has them. model.decode(latents) gives log p(x | z)."
            )

        return make_logits()

    def __getitem__(self, key):
        return self.logits if key == "logits" else super().__getitem__(key)


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
    if attention_mask is not None:
        is_hidden = is_hidden & (attention_mask != 0)
    if pad_token_id is not None:
        is_leading = is_hidden.long().cumprod(-1) == 1
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
