"""Tables: one content as text, Markdown and HTML."""

import re
from html import unescape

import pytest

from helpers.pages import HOSTILE, Page
from tarflow_hf.report import Table

HEAD = ["name", "first", "second"]
ROWS = [["a long name", 1, "x"], ["b", 2.5]]


def test_text_is_aligned():
    assert str(Table(HEAD, ROWS)).split("\n") == [
        "name         first  second",
        "a long name      1       x",
        "b              2.5",
    ]
    assert str(Table(HEAD, ROWS, right=())).split("\n")[1:] == [
        "a long name  1      x",
        "b            2.5",
    ]


def test_rows_that_are_printed_one_by_one_are_aligned_too():
    widths = [12, 6, 6]
    whole = Table(HEAD, ROWS).to_text(widths).split("\n")
    one_by_one = [Table(HEAD, [row]).to_text(widths).split("\n")[1] for row in ROWS]
    assert whole == [Table(HEAD, []).to_text(widths), *one_by_one]


@pytest.mark.parametrize("right", [None, (), (0, 2)])
def test_the_three_forms_hold_the_same(right):
    table = Table(HEAD, [*ROWS, *([text, "|", text] for text in HOSTILE[:3])], HOSTILE[0], right)
    expected = [[str(cell) for cell in row] + [""] * (3 - len(row)) for row in (HEAD, *table.rows)]

    lines = table.to_markdown().split("\n")
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    found = [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]
    assert [found[0], *found[2:]] == expected
    is_right = [cell == "--:" for cell in cells[1]]
    assert is_right == [column in ((1, 2) if right is None else right) for column in range(3)]

    html = table.to_html()
    rows = [
        re.findall("<t[hd]( [^>]*)?>(.*?)</t", row) for row in re.findall("<tr>(.*)</tr>", html)
    ]
    assert [[unescape(text) for _, text in row] for row in rows] == expected
    for row in rows[1:]:
        assert ['class="end"' in attributes for attributes, _ in row][1:] == is_right[1:]

    assert {tag for tag, _ in Page(html).tags} == {
        "div", "table", "caption", "thead", "tbody", "tr", "th", "td"
    }  # fmt: skip
