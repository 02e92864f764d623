"""A self-contained HTML page about a checkpoint: nothing is loaded, no script runs, light or dark
as the reader has it.

Each section makes its part from plain results (an `Evaluation`, a `SampleEvaluation`, passes,
evolutions, FLOPs), with the same digits as the command prints that stands beside it:

    sections = [likelihood_section(evaluation, rows, command), ...]
    page = report_page("Report", "What it is.", sections)

`examples/report.py` measures what it needs, and knows the commands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from .passes import PAGE_STYLE, PASSES_STYLE


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    name: str  # its id: unique in a page, letters and hyphens
    title: str  # plain text
    body: str  # HTML, headings from h3 on


REPORT_STYLE = """\
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.0625rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
a { color: inherit; text-underline-offset: .2em; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: start; font-weight: 600; padding-bottom: .25rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { text-align: start; font-weight: 400; }
thead th { font-weight: 600; border-bottom: 2px solid var(--line); }
th:first-child { padding-inline-start: 0; }
td:only-of-type { overflow-wrap: anywhere; }
.command { margin: 1rem 0; font-size: .8125rem; color: var(--quiet); }
.command p { margin: 0 0 .25rem; }
pre { margin: 0; padding: .5rem .75rem; border: 1px solid var(--line); border-radius: .25rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; color: var(--ink); }
code { font-family: ui-monospace, monospace; }
code span { white-space: nowrap; }
.sample { margin: 0; font: .9375rem/1.6 ui-monospace, monospace; white-space: break-spaces; }
.warning { border-inline-start: 4px solid currentColor; padding-inline-start: .75rem; }
.passes { margin-top: .5rem; }
figure { margin: 1rem 0; min-width: 0; }
figure.single { max-width: 30rem; }
figure .wide { margin: .25rem 0 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg { fill: currentColor; font-family: system-ui, sans-serif; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media (max-width: 30rem) { th, td { padding-inline: .3rem; } }
@media print { nav { display: none; } h2, h3, h4, caption { break-after: avoid; } svg, tr { break-inside: avoid; } }
"""

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p>$summary</p>
<nav aria-label="Contents">
<ul>
$contents
</ul>
</nav>
$sections
</main>
</body>
</html>
""")


def report_page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The whole page; `title` and `summary` are plain text.

    Raises:
        ValueError: Two sections have the same name.
    """
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise ValueError(f"Two sections have the same name: {names}.")

    return PAGE.substitute(
        title=escape(title),
        style=PAGE_STYLE + PASSES_STYLE + REPORT_STYLE,
        summary=escape(summary),
        contents="\n".join(
            f'<li><a href="#{section.name}">{escape(section.title)}</a></li>'
            for section in sections
        ),
        sections="\n".join(
            f'<section aria-labelledby="{section.name}">\n<h2 id="{section.name}">{escape(section.title)}</h2>\n'
            f"{section.body}\n</section>"
            for section in sections
        ),
    )
