"""Tables as plain data, and the results of the project as tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from markupsafe import Markup

from ..evaluation import (
    MEASURES,
    NOT_MEASURED,
    Evaluation,
    Evolution,
    FlopCount,
    Likelihood,
    SampleEvaluation,
)
from .page import render


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows. Cells are anything that `str` takes.

    Attributes:
        head: The names of the columns.
        rows: As long as `head`, or shorter: the last cells of a row may be missing.
        caption: For HTML, where each table needs one.
        right: The columns that are aligned to the right; by default all but the first.

    Example:
        >>> table = Table(["name", "size"], [["small", 2], ["a|b < c", 12.5]], caption="Sizes")
        >>> print(table)
        name     size
        small       2
        a|b < c  12.5
        >>> print(table.to_markdown())
        | name | size |
        |---|--:|
        | small | 2 |
        | a\\|b < c | 12.5 |
        >>> print(table.to_html())
        <div class="wide" role="region" aria-label="Sizes" tabindex="0">
        <table>
        <caption>Sizes</caption>
        <thead><tr><th scope="col">name</th><th scope="col" class="end">size</th></tr></thead>
        <tbody>
        <tr><th scope="row">small</th><td class="end">2</td></tr>
        <tr><th scope="row">a|b &lt; c</th><td class="end">12.5</td></tr>
        </tbody>
        </table>
        </div>
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    right: Sequence[int] | None = None

    def is_right(self, column: int) -> bool:
        """True of a column that is aligned to the right."""
        return column > 0 if self.right is None else column in self.right

    def lines(self) -> list[list[str]]:
        """The head and the rows as text, all of the head's length."""
        lines = [[str(cell) for cell in row] for row in (self.head, *self.rows)]
        return [line + [""] * (len(self.head) - len(line)) for line in lines]

    def to_text(self, widths: Sequence[int] = ()) -> str:
        """For a terminal or a log: columns as wide as their longest cell, two spaces between them.

        Args:
            widths: The least width of each column, for rows that are printed one by one.
        """
        lines = self.lines()
        columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
        columns = [max(pair) for pair in zip_longest(columns, widths, fillvalue=0)]

        def padded(line: list[str]) -> str:
            cells = [
                cell.rjust(width) if self.is_right(column) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, columns, strict=True))
            ]
            return "  ".join(cells).rstrip()

        return "\n".join(map(padded, lines))

    def to_markdown(self) -> str:
        """For a page of Markdown, without the caption."""
        head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in self.lines()]
        rule = "|".join("--:" if self.is_right(column) else "---" for column in range(len(head)))
        lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]

        return "\n".join([lines[0], f"|{rule}|", *lines[1:]])

    def to_html(self) -> Markup:
        """For a page of the report: the table scrolls by itself where it is too wide."""
        head, *rows = self.lines()
        right = [column for column in range(len(head)) if self.is_right(column)]
        return render("table.html.j2", caption=self.caption, head=head, rows=rows, right=right)

    __str__ = to_text


def report_table(
    rows: dict[str, Likelihood], characters_per_token: float, tokens_per_word: float | None = None
) -> str:
    """A table to print, one row for each likelihood, with the perplexity per token and (if it can
    be told) per word.

    Example:
        >>> print(report_table({"exact": Likelihood(nats=69.3, num_tokens=100, standard_error=0.01)}, 1.0, 5.0))
        100 tokens             nats/token      +-   bits/char  perplexity    per word
        exact                      0.6930  0.0100      0.9998       2.000        32.0
    """
    num_tokens = f"{next(iter(rows.values())).num_tokens:,} tokens"
    lines = [
        f"{num_tokens:<23}{'nats/token':>10}  {'+-':>6}  {'bits/char':>10}  {'perplexity':>10}"
    ]

    for name, row in rows.items():
        bits = row.bits_per_character(characters_per_token)
        lines.append(
            f"{name:<23}{row.nats_per_token:>10.4f}  {row.standard_error:>6.4f}  {bits:>10.4f}  {row.perplexity:>10.3f}"
        )

    if tokens_per_word is not None:
        lines[0] += f"  {'per word':>10}"
        for index, row in enumerate(rows.values(), 1):
            lines[index] += f"  {row.perplexity_per_word(tokens_per_word):>10.1f}"

    return "\n".join(lines)


def evaluation_table(evaluation: Evaluation, rows: dict[str, Likelihood]) -> str:
    """What `evaluate_text` returns, to print."""
    e, lines = (
        evaluation,
        [report_table(rows, evaluation.characters_per_token, evaluation.tokens_per_word)],
    )
    if e.reconstruction_accuracy is not None:
        lines.append(
            f"reconstruction: {e.reconstruction_accuracy:.4%} of the tokens; of {e.num_text_tokens:,} different ones "
            f"{e.num_used_tokens:,} come back"
        )
        lines.append(
            f"codebook: {e.codebook_entries:,} entries, d = {e.codebook_latent_size}; scales "
            f"{e.codebook_scale_min:.4g} to {e.codebook_scale_max:.4g}, mean {e.codebook_scale_mean:.4g}"
        )
        lines.append(
            f"nearest entries: {e.codebook_nearest_distance_min:.3g} scales away at least, "
            f"{e.codebook_nearest_distance_median:.3g} in the median"
        )

    return "\n".join(lines)


def sample_rows(evaluation: SampleEvaluation) -> list[tuple[str, str, str]]:
    """What is measured, of the samples, of the text; what was not measured, or is of both, is left
    empty.
    """
    e = evaluation
    rows = [
        ("entropy, nats", f"{e.entropy:.3f}", f"{e.text_entropy:.3f}"),
        ("repeated 4-grams", f"{e.repetition_4:.4f}", f"{e.text_repetition_4:.4f}"),
        ("distinct 1-grams", f"{e.distinct_1:.4f}", f"{e.text_distinct_1:.4f}"),
        ("distinct 2-grams", f"{e.distinct_2:.4f}", f"{e.text_distinct_2:.4f}"),
        ("distinct 3-grams", f"{e.distinct_3:.4f}", f"{e.text_distinct_3:.4f}"),
    ]

    if e.judge is not None:
        perplexities = f"{e.generative_perplexity:.2f}", f"{e.text_perplexity:.2f}"
        rows.insert(0, (f"perplexity by {e.judge}", *perplexities))
        rows.append((f"MAUVE, scale {e.mauve_scale:g}", f"{e.mauve:.4f}", ""))

    return rows


def sample_table(evaluation: SampleEvaluation) -> str:
    """To print: samples beside the text, and the warnings."""
    rows = [
        (f"{evaluation.num_samples:,} x {evaluation.length:,} tokens", "samples", "text"),
        *sample_rows(evaluation),
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:<{width}}  {own:>9}  {text:>9}".rstrip() for name, own, text in rows]
    if evaluation.judge is None:
        lines.append(NOT_MEASURED)

    return "\n".join(lines + [f"Warning: {warning}" for warning in evaluation.warnings])


def evolution_table(evolution: Evolution) -> str:
    """To print, a line for each state.

    Example:
        >>> import torch
        >>> from tarflow_hf.evaluation import measure_evolution
        >>> states = [torch.tensor([[[3.0, 4.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 1.0], [0.0, -1.0]]])]
        >>> print(evolution_table(measure_evolution([states])))
        state                 norm           cosine    participation     centre moves
        latents      5.000 ± 0.000    1.000 ± 0.000    0.000 ± 0.000
        flow 1       1.000 ± 0.000   -1.000 ± 0.000    1.000 ± 0.000    5.000 ± 0.000
    """
    names = ("norm", "cosine", "participation", "centre moves")
    lines = ["state    " + "".join(f"{name:>17}" for name in names)]

    for level in range(evolution.num_states):
        cells = [
            getattr(evolution, name)[level - (name == "centroid_movement")]
            for name in MEASURES
            if level or name != "centroid_movement"
        ]
        name = f"flow {level}" if level else "latents"
        lines.append(
            f"{name:<9}" + "".join(f"  {f'{cell.mean:.3f} ± {cell.std:.3f}':>15}" for cell in cells)
        )

    return "\n".join(lines)


def flops_table(counts: dict[str, dict[int, FlopCount]]) -> str:
    """The ratios of `figure_7` to print: true, and in brackets the paper's.

    Example:
        >>> count = FlopCount(num_tokens=4, flow=20, discrete=80, paper_flow=10, paper_discrete=50)
        >>> print(flops_table({"small": {1: count, 2: count}}))
        patch size           1              2
        small      0.250 (0.200)  0.250 (0.200)
    """
    patch_sizes = next(iter(counts.values()))
    lines = ["patch size" + "".join(f"{patch_size:>12}   " for patch_size in patch_sizes).rstrip()]

    for size, row in counts.items():
        cells = (f"{count.ratio:.3f} ({count.paper_ratio:.3f})" for count in row.values())
        lines.append(f"{size:<9}" + "".join(f"  {cell}" for cell in cells))

    return "\n".join(lines)


def patch_size_rows(counts: dict[int, FlopCount]) -> list[tuple[str, str, str, str]]:
    """Of `count_by_patch_size`: patch size, FLOPs a token, their ratio to the discrete transformer,
    by the paper.
    """
    return [
        (
            str(patch_size),
            f"{count.flow_per_token:.4g}",
            f"{count.ratio:.3f}",
            f"{count.paper_ratio:.3f}",
        )
        for patch_size, count in counts.items()
    ]


def patch_size_table(counts: dict[int, FlopCount]) -> str:
    """The counts of `count_by_patch_size` to print.

    Example:
        >>> count = FlopCount(num_tokens=4, flow=20, discrete=80, paper_flow=10, paper_discrete=50)
        >>> print(patch_size_table({2: count}))
        patch size  FLOPs/token   ratio  by the paper
        2                     5   0.250         0.200
    """
    rows = [("patch size", "FLOPs/token", "ratio", "by the paper"), *patch_size_rows(counts)]
    return "\n".join(
        f"{size:<10}  {flops:>11}  {ratio:>6}  {paper:>12}" for size, flops, ratio, paper in rows
    )
