"""Self-contained HTML pages from templates.

They load nothing and run no script, and are light or dark as the reader prefers.

Each section of a report is made from plain results (an `Evaluation`, a `SampleEvaluation`, passes,
evolutions, FLOPs) and shows the same digits as the command that it quotes:

    sections = [likelihood_section(evaluation, rows, command), ...]
    page = report_page("Report", "What it is.", sections)

`examples/report.py` measures what the sections need and knows the commands.

The templates are in `templates/`, with one style sheet. A template escapes every value that it
inserts, unless the value is `Markup`. Only `render` makes `Markup`, and `plots.inline_svg` of what
matplotlib has written.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

# Control characters other than tab and newline, and bidirectional overrides.
NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

STYLE_SHEET = Path(__file__).parent / "templates" / "style.css"


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    name: str  # the id: unique in a page, letters and hyphens
    title: str
    body: Markup  # with headings from h3 on


def printable(text: str) -> str:
    """Replaces control characters and those that reorder text.

    Example:
        >>> printable("a\\x1b[31m b")
        'a�[31m b'
    """
    return NOT_PRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def split_options(command: str) -> list[str]:
    """Splits a command line at its options' names: every second piece is one.

    Example:
        >>> split_options("python a.py --size 3 --seed 1")
        ['python a.py ', '--size', ' 3 ', '--seed', ' 1']
    """
    return re.split(r"(?<= )(--\w+)", command)


def _shown(value: object) -> object:
    """A template's value as it is shown: all text that is no `Markup` is printable."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("tarflow_hf.report"),
    autoescape=True,
    finalize=_shown,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters.update(split_options=split_options)


def render(template: str, **values: object) -> Markup:
    """Renders a template of `templates/`.

    Values are made printable and escaped, unless they are `Markup`.

    Raises:
        UndefinedError: If the template reads a value that is not given.

    Example:
        >>> render("demo/message.html.j2", message="a < b")
        Markup('<p class="message" role="alert">a &lt; b</p>')
    """
    return Markup(ENVIRONMENT.get_template(template).render(values))


def report_page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The whole page; `title` and `summary` are plain text.

    Raises:
        ValueError: If two sections have the same name.
    """
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise ValueError(f"Two sections have the same name: {names}.")

    page = render("report.html.j2", title=title, summary=summary, sections=sections)
    return str(page)
