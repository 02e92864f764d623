"""Fixtures of the couplings' tests."""

import pytest
from torch import Tensor

from helpers.couplings import IMPLEMENTATIONS
from tarflow_hf.modeling import coupling, coupling_cpu


@pytest.fixture
def without_numba(monkeypatch):
    """Has "auto" on a CPU take what it takes where numba is not installed."""
    monkeypatch.setattr(coupling_cpu, "AUTO_TAKES_NUMBA", False)


@pytest.fixture
def run(request):
    """Returns a function that calls an op of `coupling` by name.

    The op runs on the implementation's device; arguments and results are on the CPU.
    """
    implementation = getattr(request, "param", "reference")
    device = IMPLEMENTATIONS[implementation]
    if implementation == "triton":
        pytest.importorskip("triton")

    def run(op: str, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        on_device = (x.to(device) for x in tensors)
        out = getattr(coupling, op)(*on_device, implementation=implementation)
        return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()

    run.implementation = implementation
    run.is_slow = implementation == "triton" and device == "cpu"  # Triton's interpreter
    return run
