"""The couplings' speed, memory and share of the memory's bandwidth, measured in one run.

    python benchmarks/couplings.py                                    # on a CPU: small shapes, no kernels
    python benchmarks/couplings.py --output benchmarks/results/couplings.jsonl        # on a GPU: the real ones

Implementations: plain PyTorch (the reference), eager and under torch.compile, and the Triton kernels
(on a GPU). For the log-density over a vocabulary also the nearest that libraries offer, a fused
linear cross-entropy of the same shape. An implementation gets no time if its results differ from the
reference in float64 by more than its precision allows.

GB/s counts what has to move once: arguments and results, and in the backward pass also cotangents
and gradients.
"""

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import Results, copy_bandwidth, seconds
from torch import Tensor

from tarflow_hf.modeling import coupling
from tarflow_hf.modeling.coupling_torch import AutoregressiveNetwork

CHECKED_ROWS = 16
COLUMNS = {
    "op": 22,
    "shape": 34,
    "implementation": 35,
    "difference": 10,
    "forward_ms": 10,
    "backward_ms": 11,
    "peak_MB": 8,
    "GBps": 8,
    "share": 5,
}


@dataclass
class Case:
    """An op at a shape."""

    name: str
    op: Callable  # takes the arguments and `implementation`
    shape: dict[str, int]
    arguments: list[Tensor]
    num_shared: int = 0  # the last arguments, which have no rows
    differentiable: tuple[int, ...] = ()  # arguments that get gradients
    is_compiled: bool = False  # also under torch.compile
    tolerance: float = 2e-5


# ------------------------------------------------------------------------------- what is measured


class Draw:
    """Draws the arguments of the cases, always the same, at small or at real shapes."""

    def __init__(self, device: str, is_full: bool):
        self.device = device
        self.is_full = is_full
        self.half = torch.bfloat16 if is_full else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, device=self.device)
        return (scale * numbers).to(dtype)


def cases(device: str, is_full: bool) -> list[Case]:
    draw = Draw(device, is_full)
    return mixture_cdf_cases(draw) + rosenblatt_cases(draw) + [autoregressive_case(draw)]


def mixture_cdf_cases(draw: Draw) -> list[Case]:
    n, k = (131_072, 64) if draw.is_full else (4_096, 16)
    parameters = (draw.normal(n, k, scale=scale, dtype=draw.half) for scale in (1.0, 1.0, 0.3))
    of = {"shape": {"N": n, "K": k}, "arguments": [draw.normal(n), *parameters]}
    trained = {"differentiable": (0, 1, 2, 3), "is_compiled": True}

    return [
        Case("mixture_cdf", coupling.mixture_cdf, **of, **trained),
        Case("mixture_cdf_log_prob", coupling.mixture_cdf_log_prob, **of, **trained),
        Case("mixture_cdf_inverse", coupling.mixture_cdf_inverse, **of, tolerance=1e-3),
    ]


def rosenblatt_cases(draw: Draw) -> list[Case]:
    n, w, k, d = (8_192, 768, 50_257, 16) if draw.is_full else (64, 64, 2_000, 8)
    z, hidden = draw.normal(n, d), draw.normal(n, w, dtype=draw.half)
    weight = draw.normal(k, w, scale=1 / math.sqrt(w), dtype=draw.half)
    bias = draw.normal(k, scale=0.1)
    codebook = [draw.normal(k, d), draw.normal(k, scale=0.1) - 1]

    # Neither rounds the product with the hidden states to bfloat16. They differ in the order of its
    # sums.
    linear = {
        "shape": {"N": n, "w": w, "V": k, "d": d},
        "arguments": [z, hidden, weight, bias, *codebook],
        "num_shared": 4,
        "differentiable": (0, 1, 2, 3, 4, 5),
        "tolerance": 1e-3,
    }
    uniform = torch.zeros((), device=draw.device).expand(n, k)
    total = {
        "shape": linear["shape"],
        "arguments": [z, uniform, *codebook],
        "num_shared": 2,
        "differentiable": (0, 2, 3),
    }

    n = 64 if draw.is_full else 8
    inverse = {
        "shape": {"N": n, "V": k, "d": d},
        "arguments": [draw.normal(n, d), draw.normal(n, k, scale=2.0), *codebook],
        "num_shared": 2,
        "tolerance": 1e-3,
    }

    return [
        Case("linear log_prob", coupling.linear_mixture_rosenblatt_log_prob, **linear),
        Case("linear transform", coupling.linear_mixture_rosenblatt, **linear),
        Case("decoder's log_total", coupling.mixture_rosenblatt_log_prob, **total),
        Case("inverse", coupling.mixture_rosenblatt_inverse, **inverse),
    ]


def autoregressive_case(draw: Draw) -> Case:
    n = 64 if draw.is_full else 8
    size, k, h = (16, 64, 64) if draw.is_full else (8, 8, 16)
    e = 2 * h * 9 // 16 // (size - 1)
    shapes = [
        (size - 1, e, 3),
        (size - 1, e),
        (h, e * size * (size - 1) // 2),
        (size, 3 * k, h),
        (size, 3 * k),
    ]
    weights = [draw.normal(*shape, scale=0.2) for shape in shapes]

    return Case(
        "autoregressive inverse",
        autoregressive_inverse,
        shape={"N": n, "D": size, "K": k, "H": h},
        arguments=[draw.normal(n, size), draw.normal(n, size, h), *weights],
        num_shared=len(weights),
        tolerance=1e-3,
    )


def autoregressive_inverse(
    u: Tensor, context: Tensor, *weights: Tensor, implementation: str
) -> Tensor:
    network = AutoregressiveNetwork(*weights, max_log_scale=10.0)
    return coupling.autoregressive_mixture_cdf_inverse(
        u, context, network, implementation=implementation
    )


def cross_entropies(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Linear cross-entropies of (hidden, weight, bias, target), by library, if it is installed."""
    found = {
        "library: linear, then cross_entropy": lambda h, w, b, t: F.cross_entropy(
            F.linear(h, w, b.to(h.dtype)), t
        )
    }

    if hasattr(F, "linear_cross_entropy"):
        options = getattr(torch.nn, "LinearCrossEntropyOptions", lambda: None)()
        found["library: torch linear_cross_entropy"] = lambda h, w, b, t: F.linear_cross_entropy(
            h, w, t, linear_bias=b.to(h.dtype), options=options
        )

    if device != "cpu" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["library: Liger"] = lambda h, w, b, t: liger_fused_linear_cross_entropy(
            h, w, t, b.to(h.dtype)
        )

    if device != "cpu" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["library: Cut Cross-Entropy"] = lambda h, w, b, t: linear_cross_entropy(
            h, w, t, bias=b.to(h.dtype)
        )

    return found


# --------------------------------------------------------------------------------- how it is measured


def implementations(case: Case, device: str) -> dict[str, Callable]:
    found = {"eager": partial(case.op, implementation="reference")}
    if case.is_compiled:
        found["torch.compile"] = torch.compile(found["eager"])
    if device != "cpu":
        found["triton"] = partial(case.op, implementation="triton")

    return found


def difference(case: Case, run: Callable) -> float:
    """The largest difference from the reference in float64, relative to 1 + its value.

    Over the first CHECKED_ROWS rows.
    """
    num_with_rows = len(case.arguments) - case.num_shared
    with_rows = case.arguments[:num_with_rows]
    arguments = [x[:CHECKED_ROWS] for x in with_rows] + case.arguments[num_with_rows:]

    expected = case.op(*(x.double() for x in arguments), implementation="reference")
    actual = run(*arguments)
    if not isinstance(expected, tuple):
        expected, actual = (expected,), (actual,)

    differences = [
        (a.double() - e).abs() / (1 + e.abs()) for a, e in zip(actual, expected, strict=True)
    ]
    return max(x.max().nan_to_num(math.inf).item() for x in differences)


class Cost(NamedTuple):
    forward_ms: float
    backward_ms: float | None  # None without gradients
    peak_MB: float | None  # beyond what was there before; None on a CPU


def measure(
    run: Callable,
    arguments: list[Tensor],
    differentiable: tuple[int, ...],
    device: str,
    budget: float,
) -> Cost:
    """Medians over some `budget` seconds for each of the forward pass and both passes."""
    leaves = [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(arguments)]
    targets = [leaf for leaf in leaves if leaf.requires_grad]

    def forward():
        with torch.no_grad():
            return run(*leaves)

    def both():
        out = run(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(out, targets, [torch.ones_like(x) for x in out])

    def median_ms(step: Callable) -> float:
        step()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()

        first = seconds(step, device)
        repeats = min(20, int(budget / max(first, 1e-6)))
        times = [first, *(seconds(step, device) for _ in range(repeats))]

        return 1e3 * statistics.median_high(times)

    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    forward_ms = median_ms(forward)
    backward_ms = median_ms(both) - forward_ms if targets else None
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if device != "cpu" else None

    return Cost(forward_ms, backward_ms, peak)


def num_bytes(case: Case) -> tuple[int, int]:
    """Bytes that the forward and the backward pass must move: arguments and results, once."""
    # An expanded tensor is read as it is stored.
    arguments = sum(x.untyped_storage().nbytes() for x in case.arguments)
    results = case.arguments[0].nbytes
    gradients = sum(case.arguments[i].nbytes for i in case.differentiable)

    return arguments + 2 * results, arguments + 2 * results + gradients


def case_row(
    case: Case, implementation: str, run: Callable, device: str, budget: float, ceiling: float
) -> dict:
    """The row of one implementation; without times if its results differ."""
    row = {
        **dict.fromkeys(COLUMNS),
        "op": case.name,
        "shape": as_shape(case),
        "implementation": implementation,
        "dtype": as_dtype(case.arguments[1]),
        "copy_GBps": ceiling / 1e9,
    }
    error = difference(case, run)
    row["difference"] = f"{error:.0e}"
    if not error <= case.tolerance:
        row["implementation"] += ": DIFFERS"
        return row

    cost = measure(run, case.arguments, case.differentiable, device, budget)
    forward_bytes, backward_bytes = num_bytes(case)
    if cost.backward_ms is None:
        speed = 1e3 * forward_bytes / cost.forward_ms
    else:
        speed = 1e3 * (forward_bytes + backward_bytes) / (cost.forward_ms + cost.backward_ms)

    return {
        **row,
        **cost._asdict(),
        "GBps": speed / 1e9,
        "share": speed / ceiling,
        "forward_GBps": forward_bytes / cost.forward_ms / 1e6,
    }


def cross_entropy_rows(case: Case, device: str, budget: float) -> list[dict]:
    """The rows of libraries' cross-entropies, at the shape of this case of `linear_...`."""
    _, hidden, weight, bias, *_ = case.arguments
    target = torch.randint(len(weight), (len(hidden),), device=device)
    rows = []

    for library, run in cross_entropies(device).items():
        row = {
            **dict.fromkeys(COLUMNS),
            "op": "(cross-entropy)",
            "shape": as_shape(case),
            "implementation": library,
            "dtype": as_dtype(hidden),
        }
        cost = measure(run, [hidden, weight, bias, target], (0, 1), device, budget)
        rows.append(row | cost._asdict())

    return rows


def as_shape(case: Case) -> str:
    return " ".join(f"{name}={value}" for name, value in case.shape.items())


def as_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the real shapes on a CPU, too")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement, about")
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    device, budget = arguments.device, arguments.seconds
    results = Results(device, arguments.output)
    ceiling = copy_bandwidth(device)
    print(f"Copy bandwidth: {ceiling / 1e9:,.1f} GB/s")
    results.title(**COLUMNS)

    for case in cases(device, is_full=arguments.full or device != "cpu"):
        if arguments.only not in case.name:
            continue

        for name, run in implementations(case, device).items():
            results.row(**case_row(case, name, run, device, budget, ceiling))

        if case.name == "linear log_prob":
            for row in cross_entropy_rows(case, device, budget):
                results.row(**row)


if __name__ == "__main__":
    main()
