"""The site's configuration. `make docs` builds the pages of this folder into build/docs."""

import json
import os
import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml
from myst_parser.parsers.sphinx_ import MystParser

os.environ.setdefault("TRITON_INTERPRET", "1")  # or the kernels' modules want a GPU
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "docs"))

import notebook  # noqa: E402

import tarflow_hf  # noqa: E402

project = "tarflow_hf"
version = release = tarflow_hf.__version__
author = "The tarflow_hf contributors"
copyright = author  # a name that Sphinx prescribes

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_*"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "tarflow_hf"
html_theme_options = {"navigation_with_keys": True}
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

# --------------------------------------------------------------------------------------------------
# The API, out of the docstrings
# --------------------------------------------------------------------------------------------------

default_role = "py:obj"  # a name in single backticks is code, and a link where it is one of ours
autosummary_generate = True
autosummary_ignore_module_all = True
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch and transformers are written otherwise
autodoc_typehints = "none"  # the signature has them
autodoc_default_options = {"members": True, "ignore-module-all": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# What stays as it is: code in backticks, emphasis, bold.
MARKUP = re.compile(
    r"(``.+?``|`[^`]+`|(?<![\w*])(\*\*?)[^*\s](?:[^*]*[^*\s])?\2(?![\w*]))", re.DOTALL
)


def escape(text: str) -> str:
    r"""Plain text for reStructuredText, in which `log|det|`, `a * b` and `output_...` mean more.

    Example:
        >>> print(escape("log|det| of all `Flow`s, output_... and *a title*"))
        log\|det\| of all `Flow`\ s, output\_... and *a title*
    """
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", text)  # the library's form of a link
    parts, end = [], 0

    for match in MARKUP.finditer(text):
        parts += [escape_plain(text[end : match.start()]), match[0]]
        end = match.end()
        if text[end : end + 1].isalnum():  # markup ends at the end of a word
            parts.append("\\ ")

    return "".join([*parts, escape_plain(text[end:])])


def escape_plain(text: str) -> str:
    return re.sub(r"[\\|*]|_(?!\w)", r"\\\g<0>", text)


def indent_of(line: str) -> int:
    """The column at which the text of a line begins, behind the mark of a list's item."""
    return re.match(r"\s*([-*] +|\d+\. +)?", line).end()


def split_blocks(lines: list[str]) -> list[list[str]]:
    """The lines between blank ones."""
    return [text.split("\n") for text in re.split(r"\n(?:\s*\n)+", "\n".join(lines).strip("\n"))]


def begin_sentence(block: list[str]) -> None:
    """Marks what "Returns:" is followed by as a sentence, or its first colon would end a type."""
    for n, line in enumerate(block[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            start = indent_of(block[n + 1])
            block[n + 1] = " " * start + ": " + block[n + 1][start:]


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: single backticks for code, lists, and the sections of Google.

    A block that is indented under a blank line is code or a formula. It is shown as it stands, and
    so are tables and doctests. All other text is escaped.
    """
    text: list[str] = []
    depth = 0  # of the last line of text

    for block in split_blocks(lines):
        is_list = re.match(r"\s*([-*]|\d+\.) ", block[0]) is not None
        is_table = block[0].lstrip().startswith("|")

        if is_table or (text and not is_list and indent_of(block[0]) > depth):
            text += [" " * depth + "::", ""]
            text += ["    " * is_table + line for line in block] + [""]
            continue

        begin_sentence(block)
        doctest = next((n for n, line in enumerate(block) if ">>>" in line), len(block))
        text += [*escape("\n".join(block[:doctest])).split("\n"), *block[doctest:], ""]
        depth = indent_of(block[-1])

    lines[:] = text


# --------------------------------------------------------------------------------------------------
# Notebooks
# --------------------------------------------------------------------------------------------------


class NotebookParser(MystParser):
    """Reads a notebook as a page, with the outputs that are stored in it."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document) -> None:
        super().parse(notebook.to_markdown(json.loads(inputstring)), document)


# --------------------------------------------------------------------------------------------------
# Formulas
# --------------------------------------------------------------------------------------------------


def visit_math(translator, node) -> None:
    """Writes a formula as MathML, which needs neither a script nor a network."""
    is_block = node.tagname == "math_block"
    formula = latex2mathml.tex2mathml(node.astext(), as_block=is_block)
    translator.body.append(f'<div class="math">{formula}</div>' if is_block else formula)
    raise SkipNode


def setup(app) -> None:
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", plain_docstring, priority=100)
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
