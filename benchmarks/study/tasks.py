"""Synthetic text whose order is not left to right: what comes first follows from what comes later.

splits = load_task("task:addition")       # {"train": lines, "validation": lines, "test": lines}
tokenizer = task_tokenizer()
optimal_bits("task:addition")             # bits per character that no model can be below

- `addition`: "123+456=0579". The first digit of the sum needs the carries of all digits behind it.
- `addition-reversed`: "123+456=9750", the same with the least significant digit first, as carries
  go: what the harder one is compared with.
- `sum-in-front`: "0579=123+456", which gives the sum before what is added.
- `checksum`: "7 4031825", in front the sum of the digits modulo 10.
"""

import math
import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from tarflow_hf.data import symbol_tokenizer

SYMBOLS = " 0123456789+="
SIZES = {"train": 60_000, "validation": 512, "test": 2_000}


def addition(draw: random.Random) -> str:
    a, b = draw.randrange(1000), draw.randrange(1000)
    return f"{a:03}+{b:03}={a + b:04}"


def addition_reversed(draw: random.Random) -> str:
    terms, total = addition(draw).split("=")
    return f"{terms}={total[::-1]}"


def sum_in_front(draw: random.Random) -> str:
    terms, total = addition(draw).split("=")
    return f"{total}={terms}"


def checksum(draw: random.Random) -> str:
    digits = [draw.randrange(10) for _ in range(7)]
    return f"{sum(digits) % 10} {''.join(map(str, digits))}"


# A line, and its entropy in bits.
TASKS: dict[str, tuple[Callable[[random.Random], str], float]] = {
    "addition": (addition, 6 * math.log2(10)),
    "addition-reversed": (addition_reversed, 6 * math.log2(10)),
    "sum-in-front": (sum_in_front, 6 * math.log2(10)),
    "checksum": (checksum, 7 * math.log2(10)),
}


def task_of(source: str) -> str | None:
    """The task that a source such as "task:addition" names; None of other sources."""
    kind, _, name = source.partition(":")
    return name if kind == "task" and name in TASKS else None


def load_task(source: str) -> dict[str, list[str]]:
    """The lines of each split, always the same.

    A line may stand in two splits by chance: of a million sums 6% are trained on.
    """
    make, _ = TASKS[task_of(source)]
    splits = {}
    for split, size in SIZES.items():
        draw = random.Random(f"{source} {split}")
        splits[split] = [make(draw) for _ in range(size)]

    return splits


def task_tokenizer() -> PreTrainedTokenizerFast:
    return symbol_tokenizer(SYMBOLS)


def optimal_bits(source: str) -> float:
    """The entropy of a line, by its characters and its end: no model has fewer bits.

    Example:
        >>> round(optimal_bits("task:addition"), 3)  # six digits of 3.32 bits, 13 symbols
        1.533
    """
    make, entropy = TASKS[task_of(source)]
    return entropy / (len(make(random.Random(0))) + 1)
