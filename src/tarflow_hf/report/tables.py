"""Tables as plain data, and the results of the project as tables."""

import math
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
    """A table whose first column names the rows.

    Attributes:
        head: The names of the columns.
        rows: The cells, which `str` turns into text. The last cells of a row may be missing.
        caption: The title in HTML.
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

    head: Sequence[Any]
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
        """The table as lines of equal columns, with two spaces between them.

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
        """The table for a page of Markdown, without the caption."""
        head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in self.lines()]
        rule = "|".join("--:" if self.is_right(column) else "---" for column in range(len(head)))
        lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]

        return "\n".join([lines[0], f"|{rule}|", *lines[1:]])

    def to_html(self) -> Markup:
        """The table for an HTML page. It scrolls by itself where it is too wide."""
        head, *rows = self.lines()
        right = [column for column in range(len(head)) if self.is_right(column)]
        return render("table.html.j2", caption=self.caption, head=head, rows=rows, right=right)

    __str__ = to_text


# --------------------------------------------------------------------------------------------------
# Likelihood
# --------------------------------------------------------------------------------------------------


def likelihood_table(
    rows: dict[str, Likelihood], characters_per_token: float, tokens_per_word: float | None = None
) -> Table:
    """A row for each likelihood, with the perplexity of a token and, if it is known, of a word.

    Example:
        >>> exact = Likelihood(nats=69.3, num_tokens=100, standard_error=0.01)
        >>> print(likelihood_table({"exact": exact}, 1.0, 5.0))
        100 tokens  nats/token      +-  bits/char  perplexity  per word
        exact           0.6930  0.0100     0.9998       2.000      32.0
    """
    num_tokens = next(iter(rows.values())).num_tokens
    head = [f"{num_tokens:,} tokens", "nats/token", "+-", "bits/char", "perplexity", "per word"]
    cells = [
        (name, *likelihood_cells(row, characters_per_token, tokens_per_word))
        for name, row in rows.items()
    ]

    return Table(head[: len(cells[0])], cells)


def measures_table(evaluation: Evaluation, rows: dict[str, Likelihood]) -> Table:
    """A column for each likelihood of `evaluate_text`: narrow enough for a page on a phone."""
    e = evaluation
    names = [
        "nats per token",
        "its standard error",
        "bits per character",
        "perplexity of a token",
        "perplexity of a word",
    ]
    columns = [
        likelihood_cells(row, e.characters_per_token, e.tokens_per_word) for row in rows.values()
    ]
    caption = f"Likelihood of {e.num_tokens:,} tokens in {e.num_sequences:,} sequences of {e.data}"

    # Without words in the text the last name has no cells.
    return Table(["measure", *rows], list(zip(names, *columns, strict=False)), caption)


def likelihood_cells(
    row: Likelihood, characters_per_token: float, tokens_per_word: float | None
) -> list[str]:
    """Nats per token, their error, bits per character, perplexity of a token, and of a word."""
    cells = [
        f"{row.nats_per_token:.4f}",
        "" if math.isnan(row.standard_error) else f"{row.standard_error:.4f}",  # of one sequence
        f"{row.bits_per_character(characters_per_token):.4f}",
        f"{row.perplexity:.3f}",
    ]
    if tokens_per_word is not None:
        per_word = row.perplexity_per_word(tokens_per_word)
        cells.append(f"{per_word:.1f}" if per_word < 1e7 else f"{per_word:.1e}")

    return cells


def evaluation_text(evaluation: Evaluation, rows: dict[str, Likelihood]) -> str:
    """The results of `evaluate_text` to print: likelihoods, and the codebook of a TarFlowLM."""
    e = evaluation
    lines = [str(likelihood_table(rows, e.characters_per_token, e.tokens_per_word))]

    if e.reconstruction_accuracy is not None:
        lines += [
            f"reconstruction: {e.reconstruction_accuracy:.4%} of the tokens; "
            f"{e.num_used_tokens:,} different ones come back, the text has {e.num_text_tokens:,}",
            f"codebook: {e.codebook_entries:,} entries, d = {e.codebook_latent_size}; "
            f"scales {e.codebook_scale_min:.4g} to {e.codebook_scale_max:.4g}, "
            f"mean {e.codebook_scale_mean:.4g}",
            f"nearest entries: {e.codebook_nearest_distance_min:.3g} scales away at least, "
            f"{e.codebook_nearest_distance_median:.3g} in the median",
        ]

    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def sample_table(evaluation: SampleEvaluation) -> Table:
    """The measures of the samples beside those of the text."""
    e = evaluation
    rows = [
        ("entropy, nats", f"{e.entropy:.3f}", f"{e.text_entropy:.3f}"),
        ("repeated 4-grams", f"{e.repetition_4:.4f}", f"{e.text_repetition_4:.4f}"),
        ("distinct 1-grams", f"{e.distinct_1:.4f}", f"{e.text_distinct_1:.4f}"),
        ("distinct 2-grams", f"{e.distinct_2:.4f}", f"{e.text_distinct_2:.4f}"),
        ("distinct 3-grams", f"{e.distinct_3:.4f}", f"{e.text_distinct_3:.4f}"),
    ]

    if e.judge is None:
        rows.append(("generative perplexity", "not measured", "not measured"))
        rows.append(("MAUVE", "not measured", "not measured"))
    else:
        perplexities = f"{e.generative_perplexity:.2f}", f"{e.text_perplexity:.2f}"
        rows.insert(0, (f"perplexity by {e.judge}", *perplexities))
        rows.append((f"MAUVE, scale {e.mauve_scale:g}", f"{e.mauve:.4f}", "of both"))

    head = [f"{e.num_samples:,} x {e.length:,} tokens", "samples", "text"]
    caption = f"{e.num_samples:,} samples of {e.length:,} tokens, and as many sequences of {e.data}"
    return Table(head, rows, caption)


def sample_text(evaluation: SampleEvaluation) -> str:
    """The results of `evaluate_samples` to print: the table, and the warnings."""
    lines = [str(sample_table(evaluation))]
    if evaluation.judge is None:
        lines.append(NOT_MEASURED)

    return "\n".join(lines + [f"Warning: {warning}" for warning in evaluation.warnings])


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def stack_table(flows: Sequence[dict[str, Any]]) -> Table:
    """The flows of a configuration, a row for each."""
    rows = [
        (
            number,
            flow["coupling"].replace("_", " "),
            flow["direction"].replace("_", " "),
            flow["num_hidden_layers"],
            f"{flow['num_components']:,}" if "num_components" in flow else "none",
        )
        for number, flow in enumerate(flows, 1)
    ]
    head = ["flow", "coupling", "direction", "layers", "components"]
    return Table(head, rows, "The flows, from the data side to the noise side", right=(3, 4))


def evolution_table(evolution: Evolution) -> Table:
    """All measures of one evolution, a row for each state.

    Example:
        >>> import torch
        >>> from tarflow_hf.evaluation import measure_evolution
        >>> latents, noise = [[3.0, 4.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, -1.0]]
        >>> evolution = measure_evolution([[torch.tensor([latents]), torch.tensor([noise])]])
        >>> print(evolution_table(evolution))
        state             norm          cosine  participation   centre moves
        latents  5.000 ± 0.000   1.000 ± 0.000  0.000 ± 0.000
        flow 1   1.000 ± 0.000  -1.000 ± 0.000  1.000 ± 0.000  5.000 ± 0.000
    """
    columns = [statistics_of(evolution, name) for name in MEASURES]
    head = ["state", "norm", "cosine", "participation", "centre moves"]
    rows = [(state, *(column.get(state, "") for column in columns)) for state in columns[0]]
    return Table(head, rows)


def measure_table(name: str, evolutions: dict[str, Evolution]) -> Table:
    """One of the `MEASURES` of several evolutions, a row for each state."""
    columns = [statistics_of(evolution, name) for evolution in evolutions.values()]
    rows = [(state, *(column[state] for column in columns)) for state in columns[0]]
    title = MEASURES[name]
    return Table(["state", *evolutions], rows, title[0].upper() + title[1:])


def statistics_of(evolution: Evolution, name: str) -> dict[str, str]:
    """Mean and standard deviation of a measure, by the names of the states that have it."""
    statistics = getattr(evolution, name)
    states = ["latents", *(f"flow {number}" for number in range(1, evolution.num_states))]
    first = len(states) - len(statistics)  # nothing has moved at the latents
    cells = [f"{statistic.mean:z.3f} ± {statistic.std:.3f}" for statistic in statistics]
    return dict(zip(states[first:], cells, strict=True))


# --------------------------------------------------------------------------------------------------
# FLOPs
# --------------------------------------------------------------------------------------------------


def flops_table(counts: dict[str, dict[int, FlopCount]]) -> Table:
    """The ratios of `figure_7`: the true ones, and in brackets the paper's.

    Example:
        >>> count = FlopCount(num_tokens=4, flow=20, discrete=80, paper_flow=10, paper_discrete=50)
        >>> print(flops_table({"small": {1: count, 2: count}}))
        patch size              1              2
        small       0.250 (0.200)  0.250 (0.200)
    """
    rows = [
        (size, *(f"{count.ratio:.3f} ({count.paper_ratio:.3f})" for count in row.values()))
        for size, row in counts.items()
    ]
    return Table(["patch size", *next(iter(counts.values()))], rows)


def patch_size_table(counts: dict[int, FlopCount], own: int | None = None) -> Table:
    """The counts of `count_by_patch_size`: FLOPs, and their ratio to the discrete transformer.

    Args:
        own: The patch size that is marked as the model's.

    Example:
        >>> count = FlopCount(num_tokens=4, flow=20, discrete=80, paper_flow=10, paper_discrete=50)
        >>> print(patch_size_table({2: count}))
        patch size  FLOPs per token  ratio, true count  ratio, the paper's
        2                         5              0.250               0.200
    """
    rows = [
        (
            f"{patch_size} (this model)" if patch_size == own else patch_size,
            f"{count.flow_per_token:.4g}",
            f"{count.ratio:.3f}",
            f"{count.paper_ratio:.3f}",
        )
        for patch_size, count in counts.items()
    ]
    head = ["patch size", "FLOPs per token", "ratio, true count", "ratio, the paper's"]
    return Table(head, rows, "FLOPs against those of the discrete transformer")
