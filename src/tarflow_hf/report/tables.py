"""Tables as plain data, and the results of the project as tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from markupsafe import Markup

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
