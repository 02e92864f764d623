"""A watermark in the noise, which leaves the distribution of the text as it is.

Text is written from noise that follows from a key. Over keys that noise is N(0, I), so that the
text has the model's distribution, exactly. Who has the key infers the noise of a text and asks how
much better the key's noise fits it than any other noise does.

1. Evidence. The noise u_t at a token of the text is drawn a few times (q(z | x), flowed forward),
   and each of its dimensions gets a mean M and a variance W. A dimension that tells nothing about
   the token has M = 0 and W = 1. The draws are stratified, a Latin hypercube: few of them say more
   than as many independent ones. The mixture weights are those of the sampling options that
   `detect` is told.
2. One token, one number k of the key's noise, the likelihood ratio

       L_t(k) = sum_c w_c prod_i N(k_i; c M_i, c^2 W_i + 1 - c^2) / N(k_i; 0, 1),

   in which correlations c < 1 stand for contexts that are not quite those of the writer (a prompt
   that is not known, a temperature that is not told). By Neyman and Pearson no statistic of (t, k) has more
   power than the true ratio; it weighs each dimension by what it tells. E log L is the
   information, in nats, that the key has about the token, at most its surprisal -log pi.
3. A text whose beginning is unknown, or that was edited: an average of the products of L_t over
   alignments of the text's tokens with the key's numbers, by the forward algorithm of a hidden
   Markov model. States are places in the key; a token is kept, replaced or inserted, numbers are
   skipped where tokens were deleted. Its start is anywhere: behind a prompt, or inside of the
   marked text.

Given the text, the noise of any other key is N(0, I) and independent of it. So

- the average E of likelihood ratios has mean 1, and P(E >= x) <= 1 / x by Markov's inequality;
- the rank of E among the values of n fresh keys is uniform.

The p-value is the rank's, made continuous by a random number that follows from the key. It is 1 / E
where no fresh key comes near, and without fresh keys where E is above 1e6 (`DECISIVE`). Above
1 / (n + 1) it is exactly uniform; below, P(p <= x) <= x. Both hold whoever wrote the text, for any
length and any search.

References:
    Kirchenbauer et al., *A Watermark for Large Language Models*, ICML 2023, arXiv:2301.10226.
    Kuditipudi et al., *Robust Distortion-free Watermarks for Language Models*, TMLR 2024,
    arXiv:2307.15593, for alignment with a key's sequence and reference keys.
    Christ, Gunn & Zamir, *Undetectable Watermarks for Language Models*, COLT 2024,
    arXiv:2306.09194.
    McKay, Beckman & Conover, *A Comparison of Three Methods for Selecting Values of Input Variables
    in the Analysis of Output from a Computer Code*, Technometrics 21(2), 1979, for Latin hypercubes.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling.coupling_head import at_least_one
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..modeling.normal import ndtri_exp
from .alignment import Alignment
from .evidence import Evidence, read_evidence


@dataclass(frozen=True)
class WatermarkResult:
    """The outcome of [`NoiseWatermark.detect`].

    Under any other key `z_score` is N(0, 1) and `p_value` uniform on (0, 1), up to where the
    reference keys end (1 / 1,024), from where on P(p_value <= x) <= x.

    Attributes:
        z_score: The standard normal quantile of 1 - p_value.
        p_value: The probability of evidence as strong under another key.
        log_p_value: Its logarithm in nats, where that is too small for a float.
        log_likelihood_ratio: log E in nats.
        num_tokens: The number of tokens that were tested.
    """

    z_score: float
    p_value: float
    log_p_value: float
    log_likelihood_ratio: float
    num_tokens: int


class NoiseWatermark:
    """A key whose noise writes marked text, and the test whether a text was written by it.

    `model.generate(prompt, watermark=NoiseWatermark(key))` takes the noise of the new tokens from
    the key: number 0 at the first of them, whatever the prompt, and so on. Rows of a batch that
    begin with the same prompt have numbers of their own, from one stream of the key each.

    The same key and prompt make the same text again; texts of several prompts share their noise.
    Who wants texts that are independent takes a key for each.

    Args:
        key: An integer, a string or bytes. Who has it can detect the mark, and forge it.
        num_streams: The number of rows with the same prompt that can be told apart; `generate`
            refuses more of them, and `detect` searches so many.
        max_offset: The number of tokens that may have been cut off at the beginning of a text.

    Raises:
        ValueError: If a number is below 1, or the key is empty.

    Example:
        >>> from tarflow_hf import TarFlowLMConfig, TarFlowLMModel
        >>> config = TarFlowLMConfig(vocab_size=27, latent_size=4, hidden_size=32, num_attention_heads=4, flows=[
        ...     {"coupling": "mixture_rosenblatt", "direction": "left_to_right", "num_hidden_layers": 1},
        ... ], initial_log_scale=-2.0)
        >>> model = TarFlowLMModel(config).eval()
        >>> tokens = model.generate(max_new_tokens=64, watermark=NoiseWatermark(key=42))
        >>> NoiseWatermark(key=42).detect(model, tokens).p_value < 1e-9
        True
        >>> NoiseWatermark(key=43).detect(model, tokens).p_value < 1e-2
        False
    """

    def __init__(self, key: int | str | bytes, num_streams: int = 8, max_offset: int = 256):
        kind = type(key).__name__.encode()
        self.key = kind + b":" + (key if isinstance(key, bytes) else str(key).encode())
        if not isinstance(key, (int, str, bytes)) or isinstance(key, bool) or key in ("", b""):
            raise ValueError(f"key must be an integer, a string or bytes, not empty: {key!r}.")
        self.num_streams = at_least_one("num_streams", num_streams)
        self.max_offset = at_least_one("max_offset", max_offset)
        self.codebooks: set[bytes] = set()  # of the models that have written with this object

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key=..., num_streams={self.num_streams})"

    # ----------------------------------------------------------------------------------------- noise

    def noise(self, first: int, last: int, latent_size: int, stream: int = 0) -> Tensor:
        """The key's numbers first, ..., last - 1 of a stream, N(0, I), (last - first, d) in float64.

        Each follows from (key, stream, its place) by a hash (SHAKE-256), on any machine. Negative
        places are those of a prompt.

        Raises:
            ValueError: If there is no such stream.
        """
        if not 0 <= stream < self.num_streams:
            raise ValueError(
                f"The watermark has {self.num_streams} streams, one for each text of the same prompt, and no stream "
                f"{stream}: give NoiseWatermark(key, num_streams=...) more of them, there and in detect."
            )

        bits = b"".join(
            self._hash(f"{stream},{place}", 8 * latent_size) for place in range(first, last)
        )
        words = torch.frombuffer(bytearray(bits), dtype=torch.int64) if bits else torch.empty(0)
        uniform = ((words.double() + 2.0**63) / 2.0**64).clamp(2.0**-54, 1 - 2.0**-53)
        return torch.special.ndtri(uniform).reshape(last - first, latent_size)

    def remember(self, model: TarFlowLMModel) -> None:
        """Notes the codebook of a model that writes, for `detect` to compare."""
        self.codebooks.add(_codebook_id(model))

    def _hash(self, words: str, length: int) -> bytes:
        prefix = len(self.key).to_bytes(8, "big") + self.key
        return hashlib.shake_256(prefix + words.encode()).digest(length)

    # ------------------------------------------------------------------------------------- detection

    def detect(
        self,
        model: TarFlowLMModel,
        tokens: Tensor | Sequence[Sequence[int]],
        num_prompt_tokens: int = 0,
        **sampling_options: Any,
    ) -> WatermarkResult:
        """Tests whether the key's noise wrote a text.

        Args:
            model: The model that wrote it, or one near it.
            tokens: The text (1, T), with its prompt if that is known.
            num_prompt_tokens: The number of tokens at the beginning that are a prompt. With 0, a
                prompt in front of the text is searched for.
            sampling_options: Those of `generate` that the text was written with, if that is known:
                `temperature`, `flow_temperatures`, `mixture_temperature`, `top_k`, `top_p`,
                `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`. The p-value is valid whatever
                they are; the right ones give it more power.

        Raises:
            ValueError: If the tokens are not (1, T) of the model's vocabulary, nothing is left
                behind the prompt, the codebook is none of those of the models that wrote with this
                object, an option is unknown, out of range or none that steers this model, or the
                noise that the model infers is not finite.
        """
        if self.codebooks and _codebook_id(model) not in self.codebooks:
            raise ValueError(
                "This watermark wrote with models of another codebook, and noise of one says nothing about another: "
                "detect with the model that wrote, or one that was made from it."
            )

        return self.test(read_evidence(model, tokens, num_prompt_tokens, **sampling_options))

    @torch.no_grad()
    def test(self, evidence: Evidence) -> WatermarkResult:
        """Tests what was inferred from a text, as `detect` does. It needs no model."""
        num_tokens, latent_size = evidence.mean.shape[1:]
        alignment = Alignment(evidence, self.max_offset)
        own = torch.stack(
            [
                self.noise(0, alignment.num_places, latent_size, stream)
                for stream in range(self.num_streams)
            ]
        )
        observed = alignment.log_ratio(own.float().unsqueeze(0)).item()

        # Of key and text: the references of two keys are independent of each other.
        seed = int.from_bytes(self._hash(f"reference,{evidence.seed.hex()}", 7), "big")
        generator = torch.Generator().manual_seed(seed)
        log_p = alignment.log_p_value(observed, self.num_streams, generator)
        log_q = math.log1p(-math.exp(log_p)) if log_p < 0 else -math.inf
        z_score = _quantile(log_p, log_q)
        return WatermarkResult(z_score, math.exp(log_p), log_p, observed, num_tokens)


def _quantile(log_p: float, log_q: float) -> float:
    """The standard normal quantile of q = 1 - p."""
    tail = torch.tensor(min(log_p, log_q), dtype=torch.float64)
    quantile = ndtri_exp(tail).item()
    return -quantile if log_p < log_q else quantile


def _codebook_id(model: TarFlowLMModel) -> bytes:
    """A checksum of a model's codebook."""
    mean, log_scale = (x.detach().float().cpu() for x in model.codebook())
    digest = hashlib.sha256(str(tuple(mean.shape)).encode())
    for x in (mean, log_scale):
        digest.update(x.contiguous().numpy().tobytes())

    return digest.digest()
