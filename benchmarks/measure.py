"""Shared by the benchmarks: timing in turns, memory, provenance, and tables kept as rows."""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tarflow_hf import TarFlowLMModel
from tarflow_hf.conversion import from_causal_lm, load_source
from tarflow_hf.modeling.coupling_cpu import AUTO_TAKES_NUMBA
from tarflow_hf.modeling.coupling_numba import numba
from tarflow_hf.report import Table


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall-clock time of one run, on a GPU until it has finished."""
    if device != "cpu":
        torch.cuda.synchronize()

    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()

    return time.perf_counter() - start


def median_times(
    modes: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, float]:
    """Seconds of each mode, the modes taking turns."""
    times = {name: [] for name in modes}
    for _ in range(repeats):
        for name, run in modes.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy within the device's memory, reads and writes counted.

    This is the ceiling for an operation that streams its data.
    """
    source = torch.zeros(2**28 if device != "cpu" else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    run = lambda: target.copy_(source)  # noqa: E731
    run()
    return 2 * source.nbytes / median_times({"copy": run}, 10, device)["copy"]


def output_of_own_process(script: str, *arguments: str) -> dict:
    """The JSON in the last line that a script prints, run in a process with its own memory.

    Raises:
        RuntimeError: If it fails; the message has the end of its errors.
    """
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} has failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_resident_memory() -> int:
    """The largest resident size of this process in bytes, on Linux.

    (`getrusage` begins with its parent's.)
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def load_and_convert(
    source: str, gguf_file: str | None = None
) -> tuple[PreTrainedModel, TarFlowLMModel, PreTrainedTokenizerBase]:
    """A causal language model, the TarFlowLM it is converted to, and their tokenizer."""
    language_model, tokenizer = load_source(source, gguf_file=gguf_file)
    language_model.eval()
    return language_model, from_causal_lm(language_model, tokenizer), tokenizer


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else f"CPU, {platform.machine()}"


def facts(device: str) -> dict[str, str | int | None]:
    """The machine, the time and the versions of a measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numba": numba.__version__ if AUTO_TAKES_NUMBA else None,
    }


class Results:
    """Prints rows as they are measured and appends them to a file.

    In the file each row has the device, the date and the versions, too.
    """

    def __init__(self, device: str, output: Path | None):
        self.output = output
        self.facts = facts(device)
        print(", ".join(f"{name} {value}" for name, value in self.facts.items()))

    def title(self, **widths: int) -> None:
        """Begins a table with these columns."""
        self.head, self.widths = list(widths), list(widths.values())
        print("\n" + Table(self.head, []).to_text(self.widths))

    def row(self, **values) -> None:
        """Prints the columns of the title, and keeps all values. None is what was not measured."""
        cells = [as_text(values[name]) for name in self.head]
        print(Table(self.head, [cells]).to_text(self.widths).split("\n")[1], flush=True)

        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.facts, **values}) + "\n")


def as_text(value: object) -> str:
    """A value as it is printed.

    Example:
        >>> as_text(1234.5), as_text(8), as_text(None)
        ('1,234.50', '8', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
