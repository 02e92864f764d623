"""The page of results on the benchmarks' corpora: tables and a picture of its rows.

    python benchmarks/study/results.py                        # docs/results.md and docs/results.svg

Reads `ptb.jsonl`, `wikitext2.jsonl` and `stacks.jsonl` in the folder of `--rows`; those that are
not there are left out. Needs matplotlib for the picture. The text before the first table of an
existing page is kept.
"""

import argparse
import json
import statistics
from itertools import groupby
from pathlib import Path

from page import after_flows, gap, pyplot, spread, write_below

from tarflow_hf.report import Table

MARK = "<!-- The tables below are made by benchmarks/study/results.py. -->"
TITLES = {"ptb": "Penn Treebank", "wikitext2": "WikiText-2", "stacks": "Where a stack pays"}

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}

# Bits per character of the test text, under the same protocol.
PUBLISHED = [
    ("bipartite discrete flow (Tran et al. 2019)", 1.38),
    ("AF/SCF (Ziegler & Rush 2019)", 1.46),
    ("IAF/SCF (Ziegler & Rush 2019)", 1.63),
    ("sparse probabilistic circuit (Dang et al. 2022)", 1.35),
]


def read(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def settings(row: dict) -> tuple:
    """The settings that rows must share to be compared."""
    names = ("dataset", "num_steps", "batch_size", "hidden_size", "num_layers", "num_tokens")
    return tuple(row[name] for name in (*names, "initializer_range", "optimizer"))


def by_settings(rows: list[dict]) -> list[tuple[tuple, dict[str, list[dict]]]]:
    """The rows of each setting, the shorter runs first, by model in the order of the file."""
    groups = []
    for key, same in groupby(sorted(rows, key=settings), key=settings):
        models: dict[str, list[dict]] = {}
        for row in same:
            models.setdefault(row["model"], []).append(row)
        groups.append((key, models))

    return groups


def title_of(key: tuple) -> str:
    """The line over a table.

    Example:
        >>> title_of(("ptb", 1200, 16, 64, 6, 320, 0.02, "adamw"))
        '**ptb**: 6 layers of width 64 in all, 1,200 steps of 16 sequences'
    """
    dataset, steps, batch, width, layers, _, initial, optimizer = key
    size = f"{layers} layers of width {width} in all"
    weights = "" if initial == 0.02 else f", initial weights of {initial}"
    by = "" if optimizer == "adamw" else f", {optimizer}"
    return f"**{dataset}**: {size}, {steps:,} steps of {batch} sequences{weights}{by}"


def samples_of(rows: list[dict]) -> str:
    """The samples of the bound, of each run that has another number of them."""
    return ", ".join(str(samples) for samples in dict.fromkeys(row["test_samples"] for row in rows))


def table_of_bits(models: dict[str, list[dict]]) -> str:
    head = ["model", "parameters", "seeds", "bits/char, ELBO", "bits/char, bound", "samples"]
    head += ["standard error", "to the discrete", "ELBO after each flow"]
    cells = []

    for model, rows in models.items():
        is_discrete = model == "discrete"
        bits, elbo = (
            spread([row[f"{name}_bits_per_character"] for row in rows]) for name in ("test", "elbo")
        )
        cells.append((
            model,
            f"{rows[0]['parameters']:,}",
            len(rows),
            "" if is_discrete else elbo,
            f"{bits}, exact" if is_discrete else bits,
            "" if is_discrete else samples_of(rows),
            f"{statistics.mean(row['standard_error'] for row in rows):.3f}",
            "" if is_discrete else gap(rows, models.get("discrete"), "test_bits_per_character"),
            after_flows(rows),
        ))  # fmt: skip

    return Table(head, cells, right=range(1, 8)).to_markdown()


def table_of_words(models: dict[str, list[dict]]) -> str:
    head = ["model", "parameters", "seeds", "test perplexity", "samples", "sequences scored"]
    head += ["to the discrete"]
    cells = []

    for model, rows in models.items():
        is_discrete = model == "discrete"
        perplexity = f"{statistics.mean(row['test_perplexity'] for row in rows):.1f}"
        cells.append((
            model,
            f"{rows[0]['parameters']:,}",
            len(rows),
            f"{perplexity}, exact" if is_discrete else perplexity,
            "" if is_discrete else rows[0]["test_samples"],
            rows[0]["test_sequences"],
            "" if is_discrete else gap(rows, models.get("discrete"), "test_perplexity"),
        ))  # fmt: skip

    return Table(head, cells, right=range(1, len(head))).to_markdown()


def sections(rows: dict[str, list[dict]]) -> list[str]:
    """The tables as Markdown, a section for each file with rows."""
    parts = []
    for name, title in TITLES.items():
        if not rows[name]:
            continue

        parts.append(f"## {title}: rows")
        table = table_of_words if name == "wikitext2" else table_of_bits
        for key, models in by_settings(rows[name]):
            note = title_of(key)
            first = next(iter(models.values()))[0]
            if "optimal_bits_per_character" in first:
                note += f"; no model can be below {first['optimal_bits_per_character']:.3f} bits"

            parts += [note, table(models)]

        if name == "ptb":
            published = Table(["published model", "bits/char"], PUBLISHED)
            parts.append(published.to_markdown())

    return parts


def picture(rows: list[dict], path: Path) -> None:
    """Draws Penn Treebank's widest models: validation curves and test scores, in bits per character.

    Validation reads its first sentences only, the test score all of the test text.
    """
    plt = pyplot("results")
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    rows = [row for row in rows if row.get("validation_curve")]
    widest = max((row["hidden_size"] for row in rows), default=0)
    rows = [row for row in rows if row["hidden_size"] == widest]
    optimizers = sorted({row["optimizer"] for row in rows})
    first = min((row["seed"] for row in rows), default=0)
    for row in rows:
        color = f"C{optimizers.index(row['optimizer'])}"
        steps, bits = zip(*row["validation_curve"], strict=True)
        name = OPTIMIZERS.get(row["optimizer"], row["optimizer"])
        axes.plot(
            [step * row["batch_size"] for step in steps],
            bits,
            color=color,
            linestyle=":" if row["model"] == "discrete" else "-",
            marker=".",
            label=f"{row['model']}, {name}" if row["seed"] == first else None,
        )
        label = "test text" if row is rows[0] else None
        last = row["num_steps"] * row["batch_size"]
        score = row["test_bits_per_character"]
        axes.plot(last, score, "*", color=color, fillstyle="none", markersize=9, label=label)

    for name, bits in PUBLISHED:
        axes.axhline(bits, color="grey", linewidth=0.6)
        place = {"xytext": (4, 1 if bits > 1.36 else -1), "textcoords": "offset points"}
        align = "bottom" if bits > 1.36 else "top"
        axes.annotate(name, (0, bits), fontsize=6, color="grey", va=align, **place)

    axes.set_xlabel("sentences read")
    axes.set_ylabel("bits per character (of flows: ELBO)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    rows = {name: read(arguments.rows / f"{name}.jsonl") for name in TITLES}
    parts = []

    if rows["ptb"]:
        image = arguments.output.with_suffix(".svg")
        picture(rows["ptb"], image)
        parts.append(f"![Validation curves and test scores on Penn Treebank]({image.name})")

    write_below(arguments.output, "Results", MARK, [*parts, *sections(rows)])


if __name__ == "__main__":
    main()
