"""Two models, one noise: where their texts part, and how their scores differ.

Common random numbers. Both models write from the same noise and are scored with the same latent
noise. The difference that is left is the models', so that far fewer texts tell whether a
quantisation, another dtype or an adapter has changed a model.

References:
    Glasserman & Yao, *Some Guidelines and Guarantees for Common Random Numbers*, Management Science
    38 (1992).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modeling.checks_tarflowlm import is_integer
from ..modeling.coupling_head import at_least_one
from ..modeling.inversion_tarflowlm import evaluating
from ..modeling.modeling_tarflowlm import TarFlowLMModel
from ..noise import check_same_space

TOKENS_ONLY = {  # whatever a saved config asks for
    "return_dict_in_generate": False,
    "output_states": False,
    "output_inverse_report": False,
}


@dataclass(frozen=True)
class Comparison:
    """Texts of n noises by models A and B, and the scores of n texts under both.

    Attributes:
        written: Token ids (n, T) by A, and by B from the same noise.
        scores: Bits a token (n,) under A and under B, by the evidence bound, in float64.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        >>> bits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> found = Comparison((ids, ids.masked_fill(ids == 6, 0)), (bits, bits + 0.5))
        >>> found.common.tolist(), found.is_same.tolist(), found.rate
        ([3, 2, 3], [True, False, True], 0.1111111111111111)
        >>> found.difference, found.standard_error, round(found.unpaired_standard_error, 3)
        (0.5, 0.0, 0.816)
    """

    written: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]

    @property
    def common(self) -> Tensor:
        """The number of tokens (n,) in front of the first that differs."""
        a, b = self.written
        return (a == b).long().cumprod(-1).sum(-1)

    @property
    def is_same(self) -> Tensor:
        """True of the texts (n,) that do not differ."""
        return self.common == self.written[0].shape[1]

    @property
    def rate(self) -> float:
        """The share of tokens behind a common beginning at which the texts part."""
        parted = int((~self.is_same).sum())
        return parted / (int(self.common.sum()) + parted)

    @property
    def difference(self) -> float:
        """The mean of the scores, B minus A, in bits a token."""
        a, b = self.scores
        return (b - a).mean().item()

    @property
    def standard_error(self) -> float:
        """The difference's standard error over texts."""
        a, b = self.scores
        return ((b - a).var() / len(a)).sqrt().item()

    @property
    def unpaired_standard_error(self) -> float:
        """The standard error of two runs with noise and texts of their own.

        Unpaired runs need (this / `standard_error`)^2 times as many texts for the same precision.
        """
        a, b = self.scores
        return ((a.var() + b.var()) / len(a)).sqrt().item()


@torch.no_grad()
def compare(
    a: TarFlowLMModel,
    b: TarFlowLMModel,
    num_texts: int = 32,
    num_tokens: int = 64,
    texts: Tensor | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Comparison:
    """Compares two models of the same vocabulary and latents, in evaluation mode.

    Args:
        num_texts, num_tokens: Noises that both write from, and tokens of each, rounded down to
            whole patches.
        texts: Token ids (m, T) that both score; by default what A writes.
        batch_size: Texts at once.
        seed: Decides all noise.

    Raises:
        ValueError: If the models' latent spaces or vocabularies differ, there are fewer than two
            texts, which have no standard error, texts are no token ids, or a number is too small.

    Example:
        >>> from tarflow_hf.loading import load_checkpoint
        >>> model, _ = load_checkpoint("checkpoints/python-docs")
        >>> found = compare(model, model, num_texts=4, num_tokens=8)
        >>> int(found.is_same.sum()), found.difference
        (4, 0.0)
    """
    for model in (a, b):  # a checkpoint's own class will do, and one that PEFT has wrapped
        if getattr(getattr(model, "config", None), "model_type", None) != "tarflowlm":
            raise ValueError(f"compare takes two TarFlowLMModel, not {type(model).__name__}.")

    check_same_space(a, b)
    at_least_one("num_texts", num_texts)
    at_least_one("num_tokens", num_tokens)
    at_least_one("batch_size", batch_size)
    patch_size = a.config.patch_size
    if num_tokens < patch_size:
        raise ValueError(
            f"num_tokens must be a patch of {patch_size} tokens at least, not {num_tokens}."
        )
    if texts is not None:
        _check_texts(texts)

    if (given := num_texts if texts is None else len(texts)) < 2:
        raise ValueError(
            f"A standard error takes at least two texts, not {given}: give more of them, or shorter ones."
        )

    generator = torch.Generator().manual_seed(seed)
    length = num_tokens // patch_size * patch_size
    noise = torch.randn(num_texts, length, a.config.latent_size, generator=generator)

    def write(model: TarFlowLMModel) -> Tensor:
        parts = [part.to(model.device) for part in noise.split(batch_size)]
        return torch.cat([model.generate(noise=part, **TOKENS_ONLY).cpu() for part in parts])

    written = write(a), write(b)
    scored = written[0] if texts is None else texts

    def score(model: TarFlowLMModel) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        parts = scored.split(batch_size)
        with evaluating(model):
            elbo = [model(part.to(model.device), generator=generator).elbo.cpu() for part in parts]

        return -torch.cat(elbo).double() / scored.shape[1] / math.log(2)

    return Comparison(written, (score(a), score(b)))


def _check_texts(texts: Tensor) -> None:
    """Raises a ValueError unless they are token ids (m, T)."""
    kind = type(texts).__name__
    if isinstance(texts, Tensor):
        kind = f"{texts.dtype}, {tuple(texts.shape)}"
        if texts.ndim == 2 and texts.numel() > 0 and is_integer(texts):
            return

    raise ValueError(
        f"texts must be token ids, a tensor (m, T) of integers, as a tokenizer makes of strings, not {kind}."
    )


@torch.no_grad()
def round_to_int8(model: nn.Module) -> None:
    """Rounds the weights of all linear layers in place to 255 steps, a scale for each row.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.27, 0.104]])
        >>> round_to_int8(layer)
        >>> layer.weight.data
        tensor([[1.2700, 0.1000]])
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            module.weight.copy_((module.weight / scale).round() * scale)
