"""The couplings' speed, memory and share of the memory's bandwidth, side by side in one run.

    python benchmarks/couplings.py                                    # on a CPU: small shapes, no kernels
    python benchmarks/couplings.py --output benchmarks/results/couplings.jsonl        # on a GPU: the real ones

Implementations: the reference in eager PyTorch, the same under torch.compile, the Triton kernels
(on a GPU), and for the log-density over a vocabulary what libraries offer nearest to it, a fused
linear cross-entropy of the same shape. An implementation whose results differ from the reference in
float64 by more than its precision allows gets no time.

GB/s counts what has to move once: arguments and results, for the backward pass also cotangents and
gradients.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Results, copy_bandwidth, seconds
from torch import Tensor

from tarflow_hf.modeling import coupling
from tarflow_hf.modeling.coupling_torch import AutoregressiveNetwork

CHECKED_ROWS = 16


@dataclass
class Case:
    """An op at a shape."""

    name: str
    shape: dict[str, int]
    arguments: list[Tensor]
    op: Callable  # of the arguments and `implementation`
    num_shared: int  # of the arguments, the last ones, which are not of rows
    differentiable: tuple[int, ...]  # arguments that get gradients
    is_compiled: bool = False  # whether torch.compile of the reference takes part
    tolerance: float = 2e-5


def cases(device: str, is_full: bool) -> list[Case]:
    generator = torch.Generator(device).manual_seed(0)
    half = torch.bfloat16 if is_full else torch.float32

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    n, k = (131_072, 64) if is_full else (4_096, 16)
    mixture = [normal(n), *(normal(n, k, scale=scale, dtype=half) for scale in (1.0, 1.0, 0.3))]
    shape = {"N": n, "K": k}
    found = [
        Case(
            "mixture_cdf", shape, mixture, coupling.mixture_cdf, 0, (0, 1, 2, 3), is_compiled=True
        ),
        Case(
            "mixture_cdf_log_prob",
            shape,
            mixture,
            coupling.mixture_cdf_log_prob,
            0,
            (0, 1, 2, 3),
            True,
        ),
        Case(
            "mixture_cdf_inverse",
            shape,
            mixture,
            coupling.mixture_cdf_inverse,
            0,
            (),
            tolerance=1e-3,
        ),
    ]

    n, w, k, d = (8_192, 768, 50_257, 16) if is_full else (64, 64, 2_000, 8)
    z, hidden = normal(n, d), normal(n, w, dtype=half)
    output = [normal(k, w, scale=1 / math.sqrt(w), dtype=half), normal(k, scale=0.1)]
    codebook = [normal(k, d), normal(k, scale=0.1) - 1]
    linear, shape = [z, hidden, *output, *codebook], {"N": n, "w": w, "V": k, "d": d}
    every = (0, 1, 2, 3, 4, 5)

    # The product with the hidden states is rounded to bfloat16 in neither: what differs is the
    # order of its sums.
    found += [
        Case(
            "linear log_prob",
            shape,
            linear,
            coupling.linear_mixture_rosenblatt_log_prob,
            4,
            every,
            tolerance=1e-3,
        ),
        Case(
            "linear transform",
            shape,
            linear,
            coupling.linear_mixture_rosenblatt,
            4,
            every,
            tolerance=1e-3,
        ),
    ]
    uniform = torch.zeros((), device=device).expand(n, k)
    total = [z, uniform, *codebook]
    found.append(
        Case(
            "decoder's log_total", shape, total, coupling.mixture_rosenblatt_log_prob, 2, (0, 2, 3)
        )
    )

    n = 64 if is_full else 8
    inverse = [normal(n, d), normal(n, k, scale=2.0), *codebook]
    shape = {"N": n, "V": k, "d": d}
    found.append(
        Case("inverse", shape, inverse, coupling.mixture_rosenblatt_inverse, 2, (), tolerance=1e-3)
    )

    size, k, h = (16, 64, 64) if is_full else (8, 8, 16)
    e = 2 * h * 9 // 16 // (size - 1)
    shapes = [
        (size - 1, e, 3),
        (size - 1, e),
        (h, e * size * (size - 1) // 2),
        (size, 3 * k, h),
        (size, 3 * k),
    ]
    weights = [normal(*x, scale=0.2) for x in shapes]
    head = [normal(n, size), normal(n, size, h), *weights]
    shape = {"N": n, "D": size, "K": k, "H": h}
    found.append(
        Case("autoregressive inverse", shape, head, autoregressive_inverse, 5, (), tolerance=1e-3)
    )

    return found


def autoregressive_inverse(
    u: Tensor, context: Tensor, *weights: Tensor, implementation: str
) -> Tensor:
    network = AutoregressiveNetwork(*weights, max_log_scale=10.0)
    return coupling.autoregressive_mixture_cdf_inverse(
        u, context, network, implementation=implementation
    )


def cross_entropies(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Fused linear cross-entropies (n,) of (hidden, weight, bias, target), by library, where they
    are installed.
    """
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


# ------------------------------------------------------------------------------------ how it is run


def rows_of(case: Case, count: int) -> list[Tensor]:
    num_rows = len(case.arguments) - case.num_shared
    return [x[:count] if i < num_rows else x for i, x in enumerate(case.arguments)]


def difference(case: Case, run: Callable) -> float:
    """The largest difference from the reference in float64, relative to 1 + its value, over some
    rows.
    """
    arguments = rows_of(case, CHECKED_ROWS)
    expected = case.op(*(x.double() for x in arguments), implementation="reference")
    actual = run(*arguments)
    if not isinstance(expected, tuple):
        expected, actual = (expected,), (actual,)

    pairs = zip(actual, expected, strict=True)
    return max(
        ((a.double() - e).abs() / (1 + e.abs())).max().nan_to_num(math.inf).item() for a, e in pairs
    )


def measure(
    run: Callable,
    arguments: list[Tensor],
    differentiable: tuple[int, ...],
    device: str,
    budget: float,
):
    """Milliseconds of the forward pass and of the backward pass, and the peak memory in MB beyond
    what was there.
    """
    leaves = [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(arguments)]
    targets = [leaf for leaf in leaves if leaf.requires_grad]

    def forward():
        with torch.no_grad():
            return run(*leaves)

    def both():
        out = run(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(out, targets, [torch.ones_like(x) for x in out])

    def median(step: Callable) -> float:
        step()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()

        first = seconds(step, device)
        times = sorted(
            [first]
            + [seconds(step, device) for _ in range(min(20, int(budget / max(first, 1e-6))))]
        )

        return 1e3 * times[len(times) // 2]

    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    forward_ms = median(forward)
    both_ms = median(both) if targets else None
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if device != "cpu" else None

    return forward_ms, None if both_ms is None else both_ms - forward_ms, peak


def num_bytes(case: Case) -> tuple[int, int]:
    """Bytes that the forward and the backward pass must move: arguments and results, once."""
    arguments = sum(
        x.untyped_storage().nbytes() for x in case.arguments
    )  # an expanded tensor is read as it is stored
    results = sum(x.nbytes for x in case.arguments[:1])
    gradients = sum(case.arguments[i].nbytes for i in case.differentiable)

    return arguments + 2 * results, arguments + 2 * results + gradients


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the real shapes on a CPU, too")
    parser.add_argument("--only", help="ops whose name contains this")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="spent on each measurement, about"
    )
    parser.add_argument("--output", type=Path, help="file to append the rows to, as JSON lines")
    arguments = parser.parse_args()
    device, is_full = arguments.device, arguments.full or arguments.device != "cpu"
    table = Results(device, arguments.output)
    ceiling = copy_bandwidth(device)
    print(f"Copy bandwidth: {ceiling / 1e9:,.1f} GB/s")
    table.title(
        op=22,
        shape=34,
        implementation=35,
        difference=10,
        forward_ms=10,
        backward_ms=11,
        peak_MB=8,
        GBps=8,
        share=5,
    )

    for case in cases(device, is_full):
        if arguments.only and arguments.only not in case.name:
            continue

        runs = {"eager": partial(case.op, implementation="reference")}
        if case.is_compiled:
            runs["torch.compile"] = torch.compile(runs["eager"])

        if device != "cpu":
            runs["triton"] = partial(case.op, implementation="triton")

        shape = " ".join(f"{name}={value}" for name, value in case.shape.items())
        for name, run in runs.items():
            row = {
                "op": case.name,
                "shape": shape,
                "implementation": name,
                "copy_GBps": ceiling / 1e9,
            }
            row |= dict.fromkeys(("forward_ms", "backward_ms", "peak_MB", "GBps", "share"))
            row["dtype"] = str(case.arguments[1].dtype).removeprefix("torch.")
            error = difference(case, run)
            row["difference"] = f"{error:.0e}"

            if error <= case.tolerance:
                forward_ms, backward_ms, peak = measure(
                    run, case.arguments, case.differentiable, device, arguments.seconds
                )
                forward_bytes, backward_bytes = num_bytes(case)
                moved = forward_bytes + (0 if backward_ms is None else backward_bytes)
                speed = moved / (1e-3 * (forward_ms + (backward_ms or 0.0)))
                row |= {"forward_ms": forward_ms, "backward_ms": backward_ms, "peak_MB": peak}
                row |= {
                    "GBps": speed / 1e9,
                    "share": speed / ceiling,
                    "forward_GBps": forward_bytes / forward_ms / 1e6,
                }
            else:
                row["implementation"] += ": DIFFERS"

            table.row(**row)

        if case.name == "linear log_prob":
            _, hidden, weight, bias, *_ = case.arguments
            target = torch.randint(len(weight), (len(hidden),), device=device)

            for name, run in cross_entropies(device).items():
                times = measure(
                    run, [hidden, weight, bias, target], (0, 1), device, arguments.seconds
                )
                row = {
                    "op": "(cross-entropy)",
                    "shape": shape,
                    "implementation": name,
                    "difference": None,
                }
                row |= dict(zip(("forward_ms", "backward_ms", "peak_MB"), times, strict=True))
                table.row(
                    **row, dtype=str(hidden.dtype).removeprefix("torch."), GBps=None, share=None
                )


if __name__ == "__main__":
    main()
