"""The noise of a text: the way back from tokens to the noise that makes them.

    tokens x  --q(z | x)-->  latents z  --flows-->  noise u,   and   generate(noise=u) = x

Text comes from noise by a function, so that noise which makes a given text can be drawn, whoever
wrote the text. `noise_of` draws it. `Said` is what noise says by itself, beside a text that is
given as a prompt.

Shapes: B batch, T tokens of the sequences, n of the pieces, d latent size, V tokens in the
vocabulary.

References:
    Oberst & Sontag, *Counterfactual Off-Policy Evaluation with Gumbel-Max Structural Causal
    Models*, ICML 2019, arXiv:1905.05824, for noise that is drawn given what was seen.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import GenerationMixin

from .checks_tarflowlm import check_ids
from .codebook import Gaussians
from .generation_options import GenerationOptions
from .generation_writing import ChooseTokens, Text
from .inversion_tarflowlm import check_finite, evaluating
from .outputs_tarflowlm import FlowOutput
from .slots_tarflowlm import Pieces

# Draws of a latent until it decodes to its token: this many rounds of this many.
NUM_ROUNDS, DRAWS_A_ROUND = 16, 64

# After those, draws nearer and nearer to the mean.
SPREADS = (0.5, 0.25, 0.125, 0.0625, 0.0)

# Draws of noise until its text is the one that was asked for.
MAX_REPLAYS = 16


class NoiseMixin(GenerationMixin):
    @torch.no_grad()
    def noise_of(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw of the noise that made a text: u with `generate(noise=u)` equal to the text.

        The latents are drawn from the encoder's q(z | x), given that each decodes to its token, and
        flow forward to the noise, u = f(z). If the codebook does not overlap, that is q(z | x)
        itself. The draw is then replayed: what comes back has been seen to give the text again, in
        the model's own precision. A latent so close to the edge of its token's region that rounding
        moves it over is drawn again.

        `generate(tokens[:, :n], noise=u)` gives the text back as well, for every n, whatever the
        directions of the flows.

        The noise is that of the model's own distribution. If the saved generation config steers it
        (`top_k`, `mixture_temperature`, ...), give `generate` the neutral values.

        Args:
            tokens: Token ids (B, T), whatever wrote them.
            attention_mask: (B, T), 0 at padding, on either side.
            generator: Source of the draw; the global one by default.

        Returns:
            The noise (B, T, d), 0 at padding.

        Raises:
            ValueError: If ids or lengths are not the model's, if the codebook decodes no latent to
                one of the tokens, or if a token is too unlikely for any noise of the model's
                precision to make it.

        Example:
            >>> from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
            >>> config = TarFlowLMConfig(vocab_size=27, latent_size=2, hidden_size=32, num_attention_heads=4, flows=[
            ...     {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
            ... ])
            >>> model = TarFlowLMModel(config).eval()
            >>> tokens = torch.randint(27, (2, 8))
            >>> noise = model.noise_of(tokens)
            >>> noise.shape, torch.equal(model.generate(noise=noise), tokens)
            (torch.Size([2, 8, 2]), True)
            >>> torch.equal(model.generate(tokens[:, :3], noise=noise), tokens)
            True
        """
        ids = check_ids(tokens, self.config, attention_mask)
        is_real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            is_real = attention_mask.to(ids.device) != 0

        pieces = Pieces(is_real.to(self._home))
        ids, is_real = pieces.gather(ids.to(self._home)), pieces.gather(is_real.to(self._home))
        mask = None if pieces.order is None else is_real

        codebook = self.codebook()
        latents = codebook.mean.new_zeros(*ids.shape, self.config.latent_size)
        is_open = is_real
        for _ in range(MAX_REPLAYS):
            latents[is_open] = sample_decoded(codebook, ids[is_open], generator)
            with evaluating(self.flow):
                noise = self.flow(latents, mask).noise

            check_finite(noise, "The noise of the text")
            replayed = self.flow(noise, mask, reverse=True).latents
            is_open = (most_likely(codebook, replayed) != ids) & is_real
            if not bool(is_open.any()):
                return pieces.scatter(noise)

        places = [int(row.int().argmax()) for row in is_open if bool(row.any())]
        raise ValueError(
            f"No noise in {latents.dtype} was found in {MAX_REPLAYS} draws that gives the text back: the token at "
            f"real position {places[0]} is too unlikely there. A model in torch.float64 resolves more."
        )

    def _say(
        self, text: Text, noise: Tensor, choose_tokens: ChooseTokens, options: GenerationOptions
    ) -> "Said | None":
        """The sequences that the noise (B, n, d) of the pieces says without any known token.

        The inverse stops as soon as every sequence with a known token has said another one. None if
        nothing is known, or if the logits are processed, which noise alone knows nothing of.
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

        is_said = ((tokens == text.ids) | ~text.is_known).long().cumprod(-1).bool()
        is_whole = is_said.all(-1) & (not has_stopped)
        return Said(flow, is_said & text.is_known, is_whole)


class Said(NamedTuple):
    """The sequences that noise says by itself, beside what is known of them."""

    flow: FlowOutput  # of the inverse, up to where all of them had differed
    is_said: Tensor  # (B, n): known tokens that the noise says, with all known ones before them
    is_whole: Tensor  # (B,): sequences of which it says all that is known

    def prevail(self, flow: FlowOutput) -> FlowOutput:
        """The inverse in which sequences that the noise says as a whole are as it says them."""
        is_whole = self.is_whole[:, None, None]
        states = tuple(
            torch.where(is_whole, said, state)
            for said, state in zip(self.flow.states, flow.states, strict=True)
        )
        return FlowOutput(
            latents=states[0], noise=states[-1], states=states, inverse_reports=flow.inverse_reports
        )


class Watermark(Protocol):
    """A source of noise that follows from a key: `tarflow_hf.watermark.NoiseWatermark`."""

    def noise(self, first: int, last: int, latent_size: int, stream: int = 0) -> Tensor:
        """Numbers first, ..., last - 1 of a stream, (last - first, d); below 0 for a prompt."""

    def remember(self, model: Any) -> None:
        """Notes the model that is going to write."""


def check_watermark(
    watermark: Watermark | None, noise: Tensor | None, options: GenerationOptions
) -> None:
    """Raises an error where a watermark is none, or has no noise to mark."""
    if watermark is None:
        return
    if not (hasattr(watermark, "noise") and hasattr(watermark, "remember")):
        raise TypeError(
            f"watermark must be a tarflow_hf.watermark.NoiseWatermark, not {type(watermark).__name__}."
        )
    if noise is not None:
        raise ValueError("Give noise or a watermark, which makes noise of its own, not both.")
    if not options.do_sample:
        raise ValueError("A watermark is in the noise, and do_sample=False leaves none.")


def keyed_noise(watermark: Watermark, text: Text, latent_size: int) -> Tensor:
    """The noise (B, n, d) of the pieces by a watermark: number 0 at each row's first new token.

    Rows that begin with the same known tokens have the key's streams one after another.
    """
    num_seen: dict[tuple[int, ...], int] = {}
    rows = []
    lengths, num_leading = text.is_real.sum(-1).tolist(), text.num_leading
    for ids, length, first in zip(text.ids.tolist(), lengths, num_leading, strict=True):
        stream = num_seen.get(tuple(ids[:first]), 0)
        num_seen[tuple(ids[:first])] = stream + 1
        row = watermark.noise(-first, length - first, latent_size, stream)
        rows.append(F.pad(row, (0, 0, 0, text.ids.shape[1] - length)))

    return torch.stack(rows)


def sample_decoded(
    codebook: Gaussians, ids: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Samples of q(z | x), given that x is the most likely token under p(x | z).

    Rejection sampling. After a thousand failed draws the latent is drawn nearer to the token's mean.

    Args:
        codebook: The encoder's.
        ids: Token ids x (n,).
        generator: Source of the draws.

    Returns:
        Latents (n, d).

    Raises:
        ValueError: If no draw decodes to its token.

    Example:
        >>> codebook = Gaussians(torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
        >>> z = sample_decoded(codebook, torch.tensor([0, 0, 1, 1]))
        >>> (z < 0).squeeze(-1).tolist()
        [True, True, False, False]
    """
    latents = codebook.sample(ids, generator)
    rows = max(1, 2**24 // (DRAWS_A_ROUND * len(codebook.mean)))
    open_ = (most_likely(codebook, latents) != ids).nonzero().squeeze(-1)

    for spread in (*[1.0] * NUM_ROUNDS, *SPREADS):
        still_open = []
        for places in open_.split(rows) if len(open_) else ():
            index = ids[places].unsqueeze(-1).expand(-1, DRAWS_A_ROUND)
            mean = codebook.mean[index]
            draws = mean + spread * (codebook.sample(index, generator) - mean)

            fits = most_likely(codebook, draws) == index
            first = fits.int().argmax(-1)  # 0 if none fits
            found = draws[torch.arange(len(places), device=draws.device), first]
            latents[places] = torch.where(fits.any(-1, keepdim=True), found, latents[places])
            still_open.append(places[~fits.any(-1)])

        open_ = torch.cat(still_open) if still_open else open_

    if len(open_):
        lost = ids[open_].unique().tolist()
        raise ValueError(
            f"No latent decodes to the tokens {lost[:10]}: even at their means another token of the codebook is more "
            "likely. A trained codebook has no such tokens."
        )

    return latents


def most_likely(codebook: Gaussians, latents: Tensor) -> Tensor:
    """The most likely token (...) under p(x | z), of latents z (..., d)."""
    return codebook.most_likely(latents, 1).squeeze(-1)
