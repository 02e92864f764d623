"""The noise that is inferred from a text: some draws of it, and a Gaussian for each number."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modeling.evaluation_noise import fixed_noise
from ..modeling.generation_checks import check_options
from ..modeling.generation_options import LIBRARY_WARPERS, GenerationOptions
from ..modeling.inverse_options import InverseOptions
from ..modeling.inversion_tarflowlm import evaluating
from ..modeling.modeling_tarflowlm import TarFlowLMModel

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


class Evidence(NamedTuple):
    """The noise that is inferred from a text: Gaussians for each token, for each phase of patches.

    In phase f the patches of the text begin at token f, as they may after its beginning was cut.
    """

    mean: Tensor  # (P, n, d)
    variance: Tensor  # (P, n, d)
    first: int  # the place of the first of these tokens in the text
    seed: bytes  # follows from the text


@torch.no_grad()
def read_evidence(
    model: TarFlowLMModel,
    tokens: Tensor | Sequence[Sequence[int]],
    num_prompt_tokens: int = 0,
    num_samples: int = NUM_SAMPLES,
    **sampling_options: Any,
) -> Evidence:
    """The noise of a text (1, T) behind its prompt, from some draws. It depends on no key.

    Raises:
        ValueError: If the tokens are not (1, T) of the model's vocabulary, nothing is left, an
            option is unknown, out of range or none that steers this model, or the noise that the
            model infers is not finite.
    """
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"tokens must be ids, a tensor or lists of shape (1, T), not {tokens!r:.40}."
        ) from None

    if tokens.ndim != 2 or len(tokens) != 1:
        raise ValueError(
            f"A watermark is detected in one text at a time: tokens must be (1, T), not {tuple(tokens.shape)}."
        )

    is_number = type(num_prompt_tokens) is int
    if not is_number or not 0 <= num_prompt_tokens < tokens.shape[1]:
        raise ValueError(
            f"num_prompt_tokens must be an integer that leaves something of {tokens.shape[1]} tokens, not "
            f"{num_prompt_tokens!r}."
        )

    tokens = tokens.to(model.device)
    patch_size, latent_size = model.config.patch_size, model.config.latent_size
    shape = patch_size, tokens.shape[1], latent_size
    mean, variance = torch.zeros(shape), torch.ones(shape)

    for phase in range(patch_size):
        last = phase + (tokens.shape[1] - phase) // patch_size * patch_size
        if last == phase:
            continue

        given = model, tokens[:, phase:last], num_prompt_tokens - phase, num_samples
        with steered(model, sampling_options) as temperature:
            draws = draw_noise(*given) / temperature

        # A token that the options leave out may have no finite noise; without them it has some.
        if not draws.isfinite().all() and not draw_noise(*given).isfinite().all():
            raise ValueError(
                "The model infers noise that is not finite from this text: look at its weights and its dtype."
            )

        mean[phase, phase:last], variance[phase, phase:last] = predict(draws.cpu())

    seed = hashlib.sha256(str(tokens.tolist()).encode()).digest()
    mean, variance = mean[:, num_prompt_tokens:], variance[:, num_prompt_tokens:]
    return Evidence(mean, variance, num_prompt_tokens, seed)


@contextmanager
def steered(model: TarFlowLMModel, sampling_options: dict[str, Any]) -> Iterator[float]:
    """Steers the forward flows as `generate` steers the inverse, so that they undo what it does.

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
    check_options(options, model)
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
        if each.temperature != 1:
            hooks.append(flow.register_forward_hook(_DivideOutput(each.temperature)))

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
    """Draws (S, T, d) of the noise of a text (1, T), the same ones every time.

    A conditional model is given the whole patches of the prompt, but for the text's last one.
    """
    epsilon = stratified_noise(tokens, model.config.latent_size, num_samples)
    ids = tokens.expand(num_samples, -1)
    latents = model.encode(ids, noise=epsilon)

    patch_size = model.config.patch_size
    num_tokens = tokens.shape[1]
    num_observed = min(num_prompt_tokens // patch_size * patch_size, num_tokens - patch_size)
    observed = {}
    if model.config.conditional and num_observed > 0:
        place = torch.arange(num_tokens, device=tokens.device)
        mask = (place < num_observed).expand(num_samples, -1)
        observed = {"observed_ids": ids, "observed_mask": mask}

    with evaluating(model.flow):
        return model.flow(latents, **observed).noise.float()


def stratified_noise(tokens: Tensor, latent_size: int, num_samples: int) -> Tensor:
    """Noise (S, T, d) for the latents of a text (1, T), a Latin hypercube that follows from the text.

    Each number takes S quantiles of N(0, 1), of mean 0 and variance 1, in an order of its own. A
    function that is nearly monotone in one of the numbers is averaged over them with a small error.

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
    the whole. v is taken from a grid: half of the weight is on v = 1, a number that the text says
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
    num_draws = len(draws)
    center = draws.mean(0)
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
    weight = weigh(worth).softmax(0)
    of_mean = grid / (num_draws * worth)
    of_center = 1 - grid + of_mean
    shrinkage = (1 - grid) / of_center
    means, variances = shrinkage * center, grid + shrinkage * of_mean
    mean = (weight * means).sum(0)
    variance = (weight * (variances + means.square())).sum(0) - mean.square()
    return mean.where(is_possible, 0), variance.where(is_possible, 1)
