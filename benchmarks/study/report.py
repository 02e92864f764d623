"""Tables and a picture of the study's rows.

    python benchmarks/study/report.py benchmarks/results/study.jsonl --output docs/study.md    # and docs/study.svg

Needs matplotlib for the picture. The text before the first table of an existing page is kept.
"""

import argparse
import json
import statistics
from pathlib import Path

from cases import GROUPS
from page import after_flows, gap, pyplot, spread, write_below

from tarflow_hf.report import Table

MARK = "<!-- The tables below are made by benchmarks/study/report.py. -->"
COLUMNS = [
    "model",
    "parameters",
    "FLOPs, discrete = 1",
    "seeds",
    "bits/char, ELBO",
    "bits/char, 16 samples",
    "to the discrete",
    "ELBO after each flow",
]


def tables(rows: list[dict]) -> str:
    """The tables as Markdown: one for each group with rows, in which a line is a case."""
    by_case = {}
    for row in rows:
        by_case.setdefault(row["model"], []).append(row)

    discrete = by_case.get("discrete")
    parts = []

    for group, cases in GROUPS.items():
        cells = [cells_of(case, by_case[case], discrete) for case in cases if case in by_case]
        if cells:
            table = Table(COLUMNS, cells, right=range(1, len(COLUMNS) - 1))
            parts.append(f"### {group.capitalize()}\n\n{table.to_markdown()}")

    return "\n\n".join(parts)


def by_steps(rows: list[dict]) -> dict[int, list[dict]]:
    """The rows by the length of their runs, the shortest first: only equal lengths compare."""
    return {
        steps: [row for row in rows if row["num_steps"] == steps]
        for steps in sorted({row["num_steps"] for row in rows})
    }


def cells_of(case: str, rows: list[dict], discrete: list[dict] | None) -> tuple:
    """The row of a case: means over its seeds, and with several seeds their standard deviation.

    The gap to the discrete model is of the importance-weighted bound, at the seeds that both have.
    It is left out where one of the two lacks them.
    """
    elbo, bound = (
        spread([row[f"{name}_bits_per_character"] for row in rows]) for name in ("elbo", "test")
    )
    to_discrete = gap(rows, discrete, "test_bits_per_character", digits=1)
    flops = ""

    if discrete is not None:
        ratio = rows[0]["training_flops_per_token"] / discrete[0]["training_flops_per_token"]
        flops = f"{ratio:.2f}"

    if case == "discrete":
        elbo, bound, to_discrete = f"{elbo}, exact", "", ""

    size = f"{rows[0]['parameters']:,}"
    return case, size, flops, len(rows), elbo, bound, to_discrete, after_flows(rows)


def picture(rows: list[dict], path: Path) -> None:
    """Draws every run's bound, a line for each case, beside the training curves.

    The curves are those of the models at their first seed.
    """
    plt = pyplot("study")
    names = list(dict.fromkeys(case for cases in GROUPS.values() for case in cases))
    names = [name for name in names if any(row["model"] == name for row in rows)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.28 * len(names)), layout="constrained"
    )

    for row in rows:
        is_discrete = row["model"] == "discrete"
        place = row["test_bits_per_character"], names.index(row["model"])
        left.plot(
            *place,
            "D" if is_discrete else "o",
            color="black" if is_discrete else "C0",
            alpha=0.7,
            markersize=5,
        )

    exact = [row["test_bits_per_character"] for row in rows if row["model"] == "discrete"]
    if exact:
        left.axvline(statistics.mean(exact), color="black", linewidth=0.8, linestyle=":")

    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("bits per character of the test text (a dot is a run)")
    left.grid(axis="x", alpha=0.3)
    first = min(row["seed"] for row in rows)

    for row in rows:
        if row["model"] in GROUPS["models"] and row["seed"] == first:
            style = {"color": "black", "linestyle": ":"} if row["model"] == "discrete" else {}
            right.plot(*zip(*row["curve"], strict=True), label=row["model"], linewidth=1.4, **style)

    right.set_ylim(top=4.5)
    right.set_xlabel("step")
    right.set_ylabel("training loss, bits per character")
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/study.md"))
    arguments = parser.parse_args()
    rows = [json.loads(text) for text in arguments.rows.read_text(encoding="utf-8").splitlines()]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    image = arguments.output.with_suffix(".svg")
    lengths = by_steps(rows)
    picture(next(iter(lengths.values())), image)
    sections = [
        f"## {steps:,} steps\n\n{tables(of_length)}" for steps, of_length in lengths.items()
    ]
    steps = next(iter(lengths))
    shown = f"![Bits per character of every run of {steps:,} steps, and the training curves]({image.name})"
    write_below(arguments.output, "The study", MARK, [shown, *sections])


if __name__ == "__main__":
    main()
