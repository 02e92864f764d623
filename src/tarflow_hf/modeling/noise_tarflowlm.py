"""The noise of a text: the way back from tokens to the noise that makes them.

    tokens x  --q(z | x)-->  latents z  --flows-->  noise u,   and   generate(noise=u) = x

Text comes from noise by a function, so that noise which makes a given text can be drawn, whoever
wrote the text. `noise_of` draws it. A `Replay` compares the text that noise writes by itself with a
prompt.

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
from .generation_layout import Text
from .generation_options import GenerationOptions
from .inversion_tarflowlm import check_finite, evaluating
from .outputs_tarflowlm import FlowOutput
from .slots_tarflowlm import Pieces, make_layout, to_positions, to_tokens

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
        for replay in range(MAX_REPLAYS):
            latents[is_open] = sample_decoded(codebook, ids[is_open], generator)
            with evaluating(self.flow):
                if replay == 0:
                    noise = self.flow(latents, mask).noise
                else:
                    noise = self._noise_by_steps(latents, mask)

            check_finite(noise, "The noise of the text")
            replayed = self.flow(noise, mask, reverse=True).latents
            is_open = (codebook.most_likely_token(replayed) != ids) & is_real
            if not bool(is_open.any()):
                return pieces.scatter(noise)

        places = [int(row.int().argmax()) for row in is_open if bool(row.any())]
        raise ValueError(
            f"No noise was found in {MAX_REPLAYS} draws that gives the text back: the token at real position "
            f"{places[0]} is too unlikely there for a model in {self.dtype}. A wider dtype resolves more, such as "
            "model.float() or model.double()."
        )

    def _noise_by_steps(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """The noise of latents (B, n, d), rounded as the sequential inverse rounds: slow."""
        codebook, patch_size = self.codebook(), self.config.patch_size
        h = to_positions(latents, patch_size)
        layout = make_layout(h, patch_size, mask)
        for layer in self.flow.layers:
            h = layer(h, codebook, layout, task="transform_sequentially")

        return to_tokens(h, patch_size)


class Replay(NamedTuple):
    """The sequences that noise writes by itself, compared with the known tokens."""

    flow: FlowOutput  # of the inverse, up to where every sequence has differed
    agrees: Tensor  # (B, n): known tokens that the noise writes, as all known ones before them
    agrees_wholly: Tensor  # (B,): sequences of which it writes all known tokens

    def override(self, flow: FlowOutput) -> FlowOutput:
        """Another inverse, in which the sequences that agree wholly are replaced by their replay."""
        agrees_wholly = self.agrees_wholly[:, None, None]
        states = tuple(
            torch.where(agrees_wholly, replayed, state)
            for replayed, state in zip(self.flow.states, flow.states, strict=True)
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
    has_methods = hasattr(watermark, "noise") and hasattr(watermark, "remember")
    if isinstance(watermark, type) or not has_methods:
        raise TypeError(
            f"watermark must be a tarflow_hf.watermark.NoiseWatermark, not {watermark!r:.60}."
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
    lengths = text.is_real.sum(-1).tolist()
    num_leading = text.num_leading
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
    open_ = (codebook.most_likely_token(latents) != ids).nonzero().squeeze(-1)

    for spread in (*[1.0] * NUM_ROUNDS, *SPREADS):
        still_open = []
        for places in open_.split(rows) if len(open_) else ():
            index = ids[places].unsqueeze(-1).expand(-1, DRAWS_A_ROUND)
            mean = codebook.mean[index]
            draws = mean + spread * (codebook.sample(index, generator) - mean)

            fits = codebook.most_likely_token(draws) == index
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
