"""The table of couplings and implementations that the tests run through.

A new coupling or size is one line of `CASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

# Every implementation is held to every test of a dtype that it computes in. name: where it runs
# "auto" on a CPU: what `coupling_cpu.py` chooses.
IMPLEMENTATIONS = {
    "reference": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",
    "auto": "cpu",
}

DTYPES = {
    "reference": [torch.float32, torch.float64],
    "triton": [torch.float32],
    "auto": [torch.float32],
}


@dataclass(frozen=True)
class Case:
    """A coupling and its size.

    `components` is the K of a mixture, `latent_size` the d of a coupling of whole vectors.
    """

    kind: str
    components: int = 1
    latent_size: int | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        return {
            "affine": ("loc", "log_scale"),
            "mixture_cdf": ("logits", "loc", "log_scale"),
            "mixture_rosenblatt": ("logits", "mean", "log_scale"),
        }[self.kind]

    def shapes(self, leading: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of z and of the parameters."""
        k, d = self.components, self.latent_size
        return {
            "affine": (leading,) * 3,
            "mixture_cdf": (leading, *((*leading, k),) * 3),
            "mixture_rosenblatt": ((*leading, d or 1), (*leading, k), (k, d or 1), (k,)),
        }[self.kind]

    @property
    def directions(self) -> tuple[str, ...]:
        return ("", "_inverse") if self.kind == "affine" else ("", "_inverse", "_log_prob")


CASES = {
    "affine": Case("affine"),
    "cdf, K=1": Case("mixture_cdf", 1),
    "cdf, K=2": Case("mixture_cdf", 2),
    "cdf, K=7": Case("mixture_cdf", 7),
    "rosenblatt, K=1, d=2": Case("mixture_rosenblatt", 1, 2),
    "rosenblatt, K=3, d=1": Case("mixture_rosenblatt", 3, 1),
    "rosenblatt, K=2, d=3": Case("mixture_rosenblatt", 2, 3),
    "rosenblatt, K=7, d=4": Case("mixture_rosenblatt", 7, 4),
}

# For tests of several dtypes; a test that says nothing is one of the reference, in float64.
every_implementation = pytest.mark.parametrize(
    ("run", "dtype"),
    [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes],
    indirect=["run"],
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(case: Case, leading=(4,), dtype=torch.float64, seed=0, hardness=0.0) -> list[Tensor]:
    """Draws z and parameters.

    With `hardness` 0 the parts of the mixture overlap; with 1 they are far apart, thin and
    unlikely.
    """
    random = generator(seed)
    scales = {"logits": 10.0, "loc": 30.0, "mean": 30.0, "log_scale": 4.0}
    out = [3 * torch.randn(case.shapes(leading)[0], generator=random, dtype=torch.float64)]

    for name, shape in zip(case.parameters, case.shapes(leading)[1:], strict=True):
        spread = scales[name] ** hardness * (0.5 if name == "log_scale" else 1)
        out.append(spread * torch.randn(shape, generator=random, dtype=torch.float64))

    return [x.to(dtype) for x in out]


# Large codebooks by name: components, dimensions, log scale, spread of the log scales.
CODEBOOKS = {
    "overlapping": (600, 8, 0.0, 0.3),
    "separated": (600, 8, -3.0, 0.3),
    "in blocks, separated": (5_000, 6, -3.0, 0.3),
    "in blocks, overlapping": (4_500, 3, 0.0, 0.3),
    "in blocks, far apart": (5_000, 16, -3.0, 0.1),
}


def draw_mixture(name: str, num_rows: int, dtype=torch.float64, seed=0) -> list[Tensor]:
    """Draws z, logits, mean and log scale of a mixture over a codebook, and z from its components."""
    num_components, size, log_scale, spread = CODEBOOKS[name]
    random = generator(seed)
    mean = torch.randn(num_components, size, generator=random, dtype=dtype)
    jitter = torch.randn(num_components, generator=random, dtype=dtype)
    log_scale = log_scale + spread * jitter
    index = torch.randint(num_components, (num_rows,), generator=random)
    noise = torch.randn(num_rows, size, generator=random, dtype=dtype)
    logits = 3 * torch.randn(num_rows, num_components, generator=random, dtype=dtype)
    z = mean[index] + log_scale[index].exp().unsqueeze(-1) * noise

    return [z, logits, mean, log_scale]


def with_gradients(function: Callable, tensors: list[Tensor], seed=1) -> list[Tensor]:
    """The results of a function, and the gradients of its arguments at random cotangents."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = generator(seed)
    cotangents = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in outputs]
    cotangents = [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)]

    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, tensors, cotangents)]
