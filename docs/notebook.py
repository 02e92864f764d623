"""Runs a notebook in this process, and turns one into Markdown for the site.

    python docs/notebook.py docs/tour.ipynb      # runs it, and writes its outputs into it

Needs matplotlib, and nothing of Jupyter.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> None:
    """Executes the code cells one after the other, and replaces their outputs in place.

    An output is what a cell prints, the value of its last line, and the figures of pyplot that it
    draws.
    """
    import matplotlib

    matplotlib.use("Agg")
    namespace: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

    for number, cell in enumerate(cells, 1):
        cell["execution_count"] = number
        cell["outputs"] = run_cell("".join(cell["source"]), namespace, number)


def run_cell(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The outputs of one cell, in the notebook format."""
    import matplotlib.pyplot as plt

    body = ast.parse(source, f"cell {number}")
    last = None
    if body.body and isinstance(body.body[-1], ast.Expr):
        last = ast.Expression(body.body.pop().value)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(body, f"cell {number}", "exec"), namespace)
        value = None if last is None else eval(compile(last, f"cell {number}", "eval"), namespace)

    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines_of(text)})

    if value is not None and not plt.get_fignums():  # the line that draws has a value, too
        data = {"text/plain": lines_of(repr(value))}
        result = {"output_type": "execute_result", "execution_count": number}
        outputs.append({**result, "data": data, "metadata": {}})

    for figure_number in plt.get_fignums():
        image = io.BytesIO()
        plt.figure(figure_number).savefig(image, format="png", dpi=80, metadata={"Software": None})
        data = {"image/png": base64.b64encode(image.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})

    plt.close("all")
    return outputs


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def to_markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook and their outputs as a page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue

        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![A figure](data:image/png;base64,{data['image/png']})")
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")

    return "\n\n".join(parts)


def main():
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    run(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
