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
   power than the true ratio; it weighs each dimension by what it tells: exp(E log L) is the
   information in nats that the key has of the token, at most the token's surprise -log pi.
3. A text whose beginning is unknown, or that was edited: an average of the products of L_t over
   alignments of the text's tokens with the key's numbers, by the forward algorithm of a hidden
   Markov model. States are places in the key; a token is kept, replaced or inserted, numbers are
   skipped where tokens were deleted. Its start is anywhere: behind a prompt, or inside of the
   marked text.

Given the text, the noise of any other key is N(0, I) and independent of it. So

- the average E of likelihood ratios has mean 1, and P(E >= x) <= 1 / x by Markov's inequality;
- the rank of E among the values of n fresh keys is uniform.

The p-value is the rank's, made continuous by a random number that follows from the key. It is 1 / E
where no fresh key comes near, and without fresh keys where E is above 1e6 (`DECISIVE`). It is exactly
uniform above 1 / (n + 1), and too large, if anything, below, whoever wrote the text, however long it
is, and whatever was searched.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling.evaluation_noise import fixed_noise
from .modeling.generation_options import LIBRARY_WARPERS, GenerationOptions
from .modeling.inversion_tarflowlm import InverseOptions, evaluating
from .modeling.modeling_tarflowlm import TarFlowLMModel
from .modeling.normal import ndtri_exp

# Options of `generate` that say how noise becomes text.
SAMPLING_OPTIONS = (
    *("temperature", "flow_temperatures", "mixture_temperature", "top_k", "top_p"),
    *LIBRARY_WARPERS,
)

# Draws of a text's noise, and how many independent ones each of them may be worth.
NUM_SAMPLES = 4
WORTHS = (1.0, 4.0, 16.0, 64.0, 256.0)

# Farther out lies noise of tokens that the sampling options leave out. No key has it.
FARTHEST = 7.0

# How near the noise that wrote a text may be to what is inferred.
CORRELATIONS = (0.99, 0.85, 0.6, 0.4)

# The numbers of reference keys after each round. The next round runs if fewer than so many of them
# are above.
ROUNDS, FEW = (31, 127, 1023), (8, 2, 0)

# Evidence that needs no reference keys: all of them stay below but for a probability of 1e-3, so that
# P(p <= x) <= x + 1e-9.
DECISIVE = math.log(1e6)

# Ratios that are computed at once.
MAX_RATIOS = 2**23

# The stretch of text by which a stream is chosen.
WINDOW = 16


class Editing(NamedTuple):
    """A way in which a text may have been edited: probabilities of each edit at a token."""

    weight: float
    correlated: tuple[float, ...]  # each of the CORRELATIONS; edits before a token blur its context
    replaced: float
    inserted: float
    deleted: tuple[float, ...]  # one token, two, three before this one
    jumped: float  # any number of them
    ended: float  # what follows is not marked


# Not at all or hardly, by some tenths, and by a third of its tokens. From the shipped checkpoint:
# each about maximises the mean of log L, of texts as they were written, and with 0.1 and 0.3 of
# their tokens replaced.
EDITINGS = (
    Editing(0.6, (0.5, 0.25, 0.2, 0.05), 0.1, 0.002, (0.002, 0.0005, 0.0005), 0.001, 0.002),
    Editing(0.25, (0.1, 0.3, 0.35, 0.25), 0.25, 0.05, (0.05, 0.01, 0.003), 0.002, 0.002),
    Editing(0.15, (0.02, 0.18, 0.35, 0.45), 0.4, 0.15, (0.15, 0.05, 0.02), 0.002, 0.002),
)


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


class Evidence(NamedTuple):
    """The noise that is inferred from a text: Gaussians for each token, for each phase of patches.

    In phase f the patches of the text begin at token f, as they may after its beginning was cut.
    """

    mean: Tensor  # (P, n, d)
    variance: Tensor  # (P, n, d)
    first: int  # the place of the first of these tokens in the text
    seed: bytes  # follows from the text


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
        self.key = key if isinstance(key, bytes) else f"{type(key).__name__}:{key}".encode()
        if not isinstance(key, (int, str, bytes)) or isinstance(key, bool) or key in ("", b""):
            raise ValueError(f"key must be an integer, a string or bytes, not empty: {key!r}.")
        if num_streams < 1 or max_offset < 1:
            raise ValueError(
                f"num_streams and max_offset must be at least 1: {num_streams}, {max_offset}."
            )

        self.num_streams, self.max_offset = num_streams, max_offset
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
        tokens: Tensor,
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
                `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`. The p-value is exact whatever
                they are; the right ones give it more power.

        Raises:
            ValueError: If the tokens are not (1, T) of the model's vocabulary, nothing is left
                behind the prompt, the codebook is none of those of the models that wrote with this
                object, or an option is unknown, out of range or none that steers this model.
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


def rank_p_value(above: int, uniform: float, num_keys: int, num_before: int) -> float:
    """The p-value of a key that has some of n reference keys above it, continuous and uniform.

    The last of the keys were drawn because few of those before, c of m, were above. Before anything
    is seen all ranks r = 0, ..., n are equally likely, and c is hypergeometric given r. So
    P(rank < r, c few) + U P(rank = r, c few) is uniform between 0 and P(c few); a test that ended
    in the round before has the rest.

    Args:
        above: r.
        uniform: U, uniform on (0, 1).
        num_keys: n.
        num_before: m, 0 in the first round.

    Example:
        >>> rank_p_value(3, 0.5, 31, 0) == 3.5 / 32
        True
    """
    few = FEW[ROUNDS.index(num_before)] if num_before else 1
    shares = []
    for rank in range(above + 1):
        ways = sum(
            math.comb(num_before, number) * math.comb(num_keys - num_before, rank - number)
            for number in range(min(few, rank + 1))
        )
        shares.append(ways / math.comb(num_keys, rank) / (num_keys + 1))

    return sum(shares[:-1]) + uniform * shares[-1]


def _codebook_id(model: TarFlowLMModel) -> bytes:
    """A checksum of a model's codebook."""
    mean, log_scale = (x.detach().float().cpu() for x in model.codebook())
    digest = hashlib.sha256(str(tuple(mean.shape)).encode())
    for x in (mean, log_scale):
        digest.update(x.contiguous().numpy().tobytes())

    return digest.digest()


# --------------------------------------------------------------------------------------------------
# What a text says about its noise
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_evidence(
    model: TarFlowLMModel,
    tokens: Tensor,
    num_prompt_tokens: int = 0,
    num_samples: int = NUM_SAMPLES,
    **sampling_options: Any,
) -> Evidence:
    """The noise of a text (1, T) behind its prompt, from some draws. It depends on no key.

    Raises:
        ValueError: If the tokens are not (1, T) of the model's vocabulary, nothing is left, or an
            option is unknown, out of range or none that steers this model.
    """
    if tokens.ndim != 2 or len(tokens) != 1:
        raise ValueError(
            f"A watermark is detected in one text at a time: tokens must be (1, T), not {tuple(tokens.shape)}."
        )
    if not 0 <= num_prompt_tokens < tokens.shape[1]:
        raise ValueError(
            f"num_prompt_tokens must leave something of {tokens.shape[1]} tokens: {num_prompt_tokens}."
        )

    tokens = tokens.to(model.device)
    patch_size, latent_size = model.config.patch_size, model.config.latent_size
    shape = patch_size, tokens.shape[1], latent_size
    mean, variance = torch.zeros(shape), torch.ones(shape)

    for phase in range(patch_size):
        last = phase + (tokens.shape[1] - phase) // patch_size * patch_size
        if last == phase:
            continue

        with sampling(model, sampling_options) as temperature:
            part = tokens[:, phase:last]
            draws = draw_noise(model, part, num_prompt_tokens - phase, num_samples) / temperature

        mean[phase, phase:last], variance[phase, phase:last] = predict(draws.cpu())

    seed = hashlib.sha256(str(tokens.tolist()).encode()).digest()
    mean, variance = mean[:, num_prompt_tokens:], variance[:, num_prompt_tokens:]
    return Evidence(mean, variance, num_prompt_tokens, seed)


@contextmanager
def sampling(model: TarFlowLMModel, sampling_options: dict[str, Any]) -> Iterator[float]:
    """The time in which a model's flows undo what `generate` does with some options.

    Yields:
        The temperature of the noise, which is left to undo.

    Raises:
        ValueError: If an option is unknown, out of range or none that steers this model.
    """
    if unknown := sorted({*sampling_options} - {*SAMPLING_OPTIONS}):
        raise ValueError(
            f"A watermark is detected whatever {unknown} was: the options that count are {', '.join(SAMPLING_OPTIONS)}."
        )

    given = {name: value for name, value in sampling_options.items() if value is not None}
    options = GenerationOptions(**given)
    model._check_options(options, None, None)
    flows = model.flow.layers
    inverse = InverseOptions(
        flow_temperatures=options.flow_temperatures, logits_processor=options.warpers()
    )
    hooks = []
    for flow, each in zip(
        flows, inverse.for_flows(flows, model.codebook().mean, False), strict=True
    ):
        if each.logits_processor is not None:
            process = _GiveProcessor(each.logits_processor)
            hooks.append(flow.head.register_forward_pre_hook(process, with_kwargs=True))
        for flow_temperature in each.flow_temperatures or ():  # one
            hooks.append(flow.register_forward_hook(_DivideOutput(flow_temperature)))

    try:
        yield options.temperature
    finally:
        for hook in hooks:
            hook.remove()


class _GiveProcessor:
    """Hands a processor of logits on to a coupling head, before its `forward`."""

    def __init__(self, logits_processor: Any):
        self.option = {"logits_processor": logits_processor}

    def __call__(self, head: Any, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        return arguments, options | self.option


class _DivideOutput:
    """Divides the state that comes out of a flow by its temperature."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, flow: Any, arguments: tuple, output: tuple) -> tuple:
        return output[0] / self.temperature, *output[1:]


def draw_noise(
    model: TarFlowLMModel, tokens: Tensor, num_prompt_tokens: int, num_samples: int
) -> Tensor:
    """Draws (S, T, d) of the noise of a text (1, T), the same ones every time."""
    epsilon = stratified_noise(tokens, model.config.latent_size, num_samples)
    ids = tokens.expand(num_samples, -1)
    latents = model.encode(ids, noise=epsilon)

    observed = {}
    if model.config.conditional and num_prompt_tokens > 0:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        mask = (place < num_prompt_tokens).expand(num_samples, -1)
        observed = {"observed_ids": ids, "observed_mask": mask}

    with evaluating(model.flow):
        return model.flow(latents, **observed).noise.float()


def stratified_noise(tokens: Tensor, latent_size: int, num_samples: int) -> Tensor:
    """Noise (S, T, d) for the latents of a text (1, T), a Latin hypercube that follows from the text.

    Each number takes S quantiles of N(0, 1), of mean 0 and variance 1, in an order of its own. A
    function that is nearly monotone in one of the numbers has a mean over them that is hardly off.

    Example:
        >>> noise = stratified_noise(torch.tensor([[3, 1, 2]]), 2, 4)
        >>> noise.sort(0).values[:, 0, 0]
        tensor([-1.3629, -0.3775,  0.3775,  1.3629])
    """
    levels = torch.special.ndtri((torch.arange(num_samples) + 0.5) / num_samples)
    levels = levels / levels.square().mean().sqrt()
    draws = [fixed_noise(tokens, latent_size, index=index) for index in range(num_samples)]
    return levels.to(tokens.device)[torch.cat(draws).argsort(0)]


def predict(draws: Tensor, worths: tuple[float, ...] = WORTHS) -> tuple[Tensor, Tensor]:
    """The mean and the variance of the next draw, given some draws (S, ...) of each number.

    A number has the variance v around a mean m ~ N(0, 1 - v) of its own, so that it is N(0, 1) on
    the whole. Of v a grid is taken: half of the weight is on v = 1, a number that the text says
    nothing about. The mean of S draws is off by v / (S w), where a stratified draw is worth w
    independent ones; w is the one of `worths` under which all the draws together are the likeliest.

    Draws that no key can have made say nothing.

    Example:
        >>> mean, variance = predict(torch.tensor([[0.5, -1.2], [0.5, 0.9], [0.51, 0.1], [0.49, 1.9]]))
        >>> (abs(mean[0] - 0.5) < 0.01, variance[0] < 0.01, variance[1] > 0.8)
        (tensor(True), tensor(True), tensor(True))
    """
    grid = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4])
    prior = torch.tensor([0.5, *[0.5 / 7] * 7])
    grid, log_prior = (x.reshape(-1, *[1] * (draws.ndim - 1)) for x in (grid, prior.log()))

    is_possible = (draws.abs() < FARTHEST).all(0)  # not NaN either
    draws = draws.where(is_possible, 0)
    num_draws, center = len(draws), draws.mean(0)
    spread = (draws - center).square().sum(0)

    def weigh(worth: float) -> Tensor:
        """log p(draws, v) of each number, for each v of the grid, up to a constant."""
        of_center = 1 - grid + grid / (num_draws * worth)  # the variance of the draws' mean
        return log_prior - 0.5 * (
            (num_draws - 1) * grid.log()
            + spread / grid
            + of_center.log()
            + center.square() / of_center
        )

    worth = max(worths, key=lambda each: weigh(each).logsumexp(0)[is_possible].sum().item())
    weight, of_mean = weigh(worth).softmax(0), grid / (num_draws * worth)
    of_center = 1 - grid + of_mean
    shrinkage = (1 - grid) / of_center
    means, variances = shrinkage * center, grid + shrinkage * of_mean
    mean = (weight * means).sum(0)
    variance = (weight * (variances + means.square())).sum(0) - mean.square()
    return mean.where(is_possible, 0), variance.where(is_possible, 1)


# --------------------------------------------------------------------------------------------------
# The likelihood ratio of a key
# --------------------------------------------------------------------------------------------------


class Alignment:
    """The average of likelihood ratios over alignments of a text with a key's numbers.

    Args:
        evidence: That of the text.
        max_offset: The number of the key's numbers that may lie before the text.
    """

    def __init__(self, evidence: Evidence, max_offset: int):
        self.patch_size, num_tokens, self.latent_size = evidence.mean.shape
        self.num_tokens, self.first = num_tokens, evidence.first
        self.num_places = max_offset + num_tokens + num_tokens // 2 + 1

        forms = [_quadratic_form(evidence, correlation) for correlation in CORRELATIONS]
        self.forms = tuple(torch.cat(each) for each in zip(*forms, strict=True))
        self.rough_form = _quadratic_form(evidence, 0.85)

        # Half of the weight is on a text that begins with the first number; the rest on one whose
        # beginning was cut off, or that stands behind a prompt.
        place = torch.arange(self.num_places)
        cut = (place <= max_offset) / (place + 1.0)
        behind = (torch.arange(num_tokens) > 0) / (torch.arange(num_tokens) + 1.0)
        self.begin = 0.25 * cut / cut.sum()
        self.begin[0] += 0.5
        self.start = (0.25 * behind / behind.sum().clamp(min=0.5)).tolist()

    def log_p_value(self, observed: float, num_streams: int, generator: torch.Generator) -> float:
        """log p of the evidence log E of a key, by as many reference keys as it takes."""
        if observed > DECISIVE:
            return -observed

        uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        num_keys, above = 0, 0
        for total, few in zip(ROUNDS, FEW, strict=True):
            shape = total - num_keys, num_streams, self.num_places, self.latent_size
            above += int((self.log_ratio_of_fresh(shape, generator) > observed).sum())
            num_before, num_keys = num_keys, total
            if above >= few:
                break

        log_p = math.log(rank_p_value(above, uniform, num_keys, num_before))
        return log_p if above else min(-math.log(num_keys + 1), -observed)

    def log_ratio_of_fresh(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """log E of fresh keys, of noise (num_keys, num_streams, num_places, d)."""
        noise = torch.randn(shape, generator=generator)
        rows = max(1, MAX_RATIOS // (shape[1] * self.num_tokens * self.num_places))
        return torch.cat([self.log_ratio(part) for part in noise.split(rows)])

    def log_ratio(self, noise: Tensor) -> Tensor:
        """log E of keys, (num_keys,) in nats, of their noise (num_keys, num_streams, num_places, d).

        Of a key's streams the first counts, and that of the others which fits best in some stretch
        of text. To leave the others out makes E smaller only.
        """
        num_keys, num_streams = noise.shape[:2]
        weight = 1 / (torch.arange(num_streams) + 1.0)
        log_weight = (weight / weight.sum()).log()
        streams = torch.zeros(num_keys, 1, dtype=torch.long)
        if num_streams > 1:
            best = 1 + self._fit(noise[:, 1:]).argmax(-1, keepdim=True)
            streams = torch.cat([streams, best], -1)

        noise = noise.gather(1, streams[..., None, None].expand(-1, -1, *noise.shape[2:]))
        log_ratios = self._quadratic(noise.flatten(0, 1), self.forms, len(CORRELATIONS))
        ratios = log_ratios.clamp_(max=60.0).exp_()
        log_average = self._forward(ratios).reshape(streams.shape)
        return torch.logsumexp(log_average + log_weight[streams], -1)

    def _fit(self, noise: Tensor) -> Tensor:
        """The fit (...) of streams (..., J, d) to the stretch of the text that they fit best."""
        ratios = self._quadratic(noise.flatten(0, -3), self.rough_form, 1).squeeze(1)
        ratios = ratios.clamp_(-2.0, 6.0)

        # Row t moves by t, so that stretches of text and key stand in columns.
        diagonals = F.pad(ratios.flatten(1), (0, self.num_tokens))
        diagonals = diagonals.unflatten(1, (self.num_tokens, -1))
        sums = F.pad(diagonals.cumsum(1), (0, 0, 1, 0))
        window = min(WINDOW, self.num_tokens)
        fit = (sums[:, window:] - sums[:, :-window]).amax((1, 2))
        return fit.reshape(noise.shape[:-2])

    def _quadratic(self, noise: Tensor, form: tuple[Tensor, Tensor], count: int) -> Tensor:
        """The log ratios (g, count, n, J) of numbers (g, J, d), by some quadratic forms."""
        features = torch.cat([noise, noise.square()], -1)
        ratios = torch.baddbmm(form[1], form[0].expand(len(noise), -1, -1), features.mT)
        return self._of_phase(ratios.unflatten(1, (count, self.patch_size, -1)))

    def _of_phase(self, ratios: Tensor) -> Tensor:
        """Those (g, C, n, J) of the ratios (g, C, P, n, J) whose phase is that of their number.

        Number j was written at place j mod P of a patch.
        """
        if self.patch_size == 1:
            return ratios.squeeze(2)

        token = torch.arange(self.num_tokens).unsqueeze(-1) + self.first
        phase = (token - torch.arange(self.num_places)) % self.patch_size  # (n, J)
        return ratios.gather(2, phase.expand(*ratios.shape[:2], 1, -1, -1)).squeeze(2)

    def _forward(self, ratios: Tensor) -> Tensor:
        """log of the average over alignments, (g,), of the ratios (g, C, n, J) of tokens and numbers.

        The state (g, e, J) is the weight of all alignments in which number j stands at token t or
        was the last before it, for each way of editing. No alignment uses a number twice.
        """
        weight, correlated, replaced, inserted, deleted, jumped, ended = (
            torch.tensor(column) for column in zip(*EDITINGS, strict=True)
        )
        kept = 1 - inserted - deleted.sum(-1) - jumped - ended
        moves = torch.cat([kept.unsqueeze(-1), deleted], -1)
        moves = moves.unsqueeze(-1).unbind(1)  # of one number, two, ...: (e, 1) each
        inserted, jumped = inserted.unsqueeze(-1), jumped.unsqueeze(-1) / self.num_places

        is_kept = (1 - replaced).unsqueeze(-1) * correlated
        ratios = (is_kept @ ratios.flatten(2)).unflatten(-1, ratios.shape[2:])
        ratios = ratios.add_(replaced[:, None, None]).unbind(2)  # (g, e, J) for each token

        # In front of the state lie zeros, from which numbers move to the first places.
        shape = len(ratios[0]), len(EDITINGS)
        padded = torch.zeros(*shape, len(moves) + self.num_places)
        state = padded[..., len(moves) :]
        state.copy_(ratios[0] * self.begin)
        behind, total, log_scale = torch.zeros(3, *shape)

        for t in range(self.num_tokens):
            if t > 0:
                behind = behind + ended * total
                moved = padded[..., len(moves) - 1 : -1].cumsum(-1).mul_(jumped)
                for step, move in enumerate(moves, start=1):
                    moved.addcmul_(move, padded[..., len(moves) - step :][..., : self.num_places])

                moved[..., 0] += self.start[t] * torch.exp(-log_scale)
                state.mul_(inserted).addcmul_(ratios[t], moved)

            scale = state.sum(-1).clamp(min=1e-30)
            state.div_(scale.unsqueeze(-1))
            total, behind = state.sum(-1), behind / scale
            log_scale = log_scale + scale.log()

        log_average = torch.log(total + behind) + log_scale
        return torch.logsumexp(log_average + weight.log(), -1)


def _quadratic_form(evidence: Evidence, correlation: float) -> tuple[Tensor, Tensor]:
    """log L of a correlation, as a form (P n, 2 d) of [k, k^2] and a constant (P n, 1)."""
    mean = correlation * evidence.mean
    variance = correlation**2 * evidence.variance + 1 - correlation**2
    form = torch.cat([mean / variance, 0.5 - 0.5 / variance], -1)
    logs = variance.log() + mean.square() / variance
    constant = -0.5 * logs.sum(-1, keepdim=True)
    return form.flatten(0, 1), constant.flatten(0, 1)
