"""Tables and a picture of the study's rows.

    python benchmarks/study/report.py benchmarks/results/study.jsonl --output docs/study.md    # and docs/study.svg

Needs matplotlib for the picture. The text before the first table of an existing page is kept.
"""

import argparse
import json
import statistics
from pathlib import Path

from cases import GROUPS

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
        by_case.setdefault(row["case"], []).append(row)

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
        spread([row[f"{name}_bits_per_character"] for row in rows]) for name in ("elbo", "bound")
    )
    flops, gap, cuts = "", "", ""

    if discrete is not None:
        flops = (
            f"{rows[0]['training_flops_per_token'] / discrete[0]['training_flops_per_token']:.2f}"
        )
        exact = {row["seed"]: row["bound_bits_per_character"] for row in discrete}
        gaps = [
            row["bound_bits_per_character"] / exact[row["seed"]] - 1
            for row in rows
            if row["seed"] in exact
        ]
        gap = f"{100 * statistics.mean(gaps):+.1f}%" if gaps else ""

    if case == "discrete":
        elbo, bound, gap = f"{elbo}, exact", "", ""
    elif len(rows[0]["bits_after_flows"]) > 1:
        after = zip(*(row["bits_after_flows"] for row in rows), strict=True)
        cuts = ", ".join(f"{statistics.mean(values):.3f}" for values in after)

    return case, f"{rows[0]['parameters']:,}", flops, len(rows), elbo, bound, gap, cuts


def spread(values: list[float]) -> str:
    """Mean and standard deviation.

    Example:
        >>> spread([4.0, 4.2]), spread([4.0])
        ('4.100 ± 0.141', '4.000')
    """
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def picture(rows: list[dict], path: Path) -> None:
    """Draws every run's bound, a line for each case, beside the training curves.

    The curves are those of the models at their first seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "study", "font.size": 9, "font.family": "DejaVu Sans"}
    )
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(case for cases in GROUPS.values() for case in cases))
    names = [name for name in names if any(row["case"] == name for row in rows)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.28 * len(names)), layout="constrained"
    )

    for row in rows:
        is_discrete = row["case"] == "discrete"
        place = row["bound_bits_per_character"], names.index(row["case"])
        left.plot(
            *place,
            "D" if is_discrete else "o",
            color="black" if is_discrete else "C0",
            alpha=0.7,
            markersize=5,
        )

    exact = [row["bound_bits_per_character"] for row in rows if row["case"] == "discrete"]
    if exact:
        left.axvline(statistics.mean(exact), color="black", linewidth=0.8, linestyle=":")

    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("bits per character of the test text (a dot is a run)")
    left.grid(axis="x", alpha=0.3)
    first = min(row["seed"] for row in rows)

    for row in rows:
        if row["case"] in GROUPS["models"] and row["seed"] == first:
            style = {"color": "black", "linestyle": ":"} if row["case"] == "discrete" else {}
            right.plot(*zip(*row["curve"], strict=True), label=row["case"], linewidth=1.4, **style)

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
    before = (
        arguments.output.read_text(encoding="utf-8").partition(MARK)[0]
        if arguments.output.is_file()
        else "# The study\n\n"
    )
    image = arguments.output.with_suffix(".svg")
    lengths = by_steps(rows)
    picture(next(iter(lengths.values())), image)
    sections = [
        f"## {steps:,} steps\n\n{tables(of_length)}" for steps, of_length in lengths.items()
    ]
    steps = next(iter(lengths))
    shown = f"![Bits per character of every run of {steps:,} steps, and the training curves]({image.name})"
    arguments.output.write_text(
        "\n\n".join([f"{before}{MARK}", shown, *sections]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
