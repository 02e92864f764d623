"""The documentation in Python's standard library: a corpus that needs no network."""

import ast
import os
import sysconfig
import warnings
from pathlib import Path

PYTHON_DOCS = "python-docs"


def python_documentation() -> list[str]:
    """The documentation in Python's own standard library: English text on every machine.

    A document is a topic of `pydoc_data.topics` (what `help("while")` prints) or all docstrings of
    one module. Files are parsed, never imported; tests are left out. A docstring that occurs twice
    is kept once, so that held-out text is no copy of training text. The order depends on the files
    alone; they differ from one Python to the next.

    Returns:
        About 700 documents, 2.2 million characters (2.1 million in the 27 symbols of text8).

    Raises:
        FileNotFoundError: if this Python was installed without `pydoc_data` or without the
            library's sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise FileNotFoundError(
            f"{topics} does not exist: this Python was installed without its documentation or its sources. "
            f"Install the full standard library, or train on a text file instead of {PYTHON_DOCS!r}."
        )

    table = next(
        node.value for node in ast.parse(topics.read_bytes()).body if isinstance(node, ast.Assign)
    )
    # A dict is a set that keeps its order.
    documents = list(dict.fromkeys(ast.literal_eval(table).values()))
    seen: set[str] = set()

    for folder, subfolders, files in os.walk(library):
        # In place: this tells os.walk where to go, and in which order.
        excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        subfolders[:] = sorted(set(subfolders) - excluded)

        for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            docstrings = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
            seen.update(docstrings)
            if docstrings:
                documents.append("\n\n".join(docstrings))

    return documents


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a file, in their order; none if Python can't read it."""
    try:
        # Old escape sequences in the library concern nobody here.
        with warnings.catch_warnings(action="ignore"):
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # ValueError: null bytes, or not in the encoding it declares
        return []

    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in nodes if isinstance(node, kinds)]
    nodes.sort(
        key=lambda node: getattr(node, "lineno", 0)
    )  # walked breadth first; a module has no line

    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]
