"""Shared by the study's two pages: cells of their tables, their text, and how pictures look."""

import statistics
from pathlib import Path


def spread(values: list[float]) -> str:
    """Mean and standard deviation.

    Example:
        >>> spread([4.0, 4.2]), spread([4.0])
        ('4.100 ± 0.141', '4.000')
    """
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def gap(rows: list[dict], discrete: list[dict] | None, name: str, digits: int = 2) -> str:
    """The mean difference to the discrete model, at the seeds that both have."""
    exact = {row["seed"]: row[name] for row in discrete or []}
    gaps = [row[name] / exact[row["seed"]] - 1 for row in rows if row["seed"] in exact]
    return f"{100 * statistics.mean(gaps):+.{digits}f}%" if gaps else ""


def after_flows(rows: list[dict]) -> str:
    """The mean bits of the stack cut after each of its flows, where there are several."""
    cuts = rows[0].get("bits_after_flows", [])
    if len(cuts) < 2:
        return ""

    after = zip(*(row["bits_after_flows"] for row in rows), strict=True)
    return ", ".join(f"{statistics.mean(values):.3f}" for values in after)


def write_below(path: Path, title: str, mark: str, parts: list[str]) -> None:
    """Writes a page's parts below a mark. The text above it is kept; a new page has its title there."""
    before = f"# {title}\n\n"
    if path.is_file():
        before = path.read_text(encoding="utf-8").partition(mark)[0]

    path.write_text("\n\n".join([f"{before}{mark}", *parts]) + "\n", encoding="utf-8")


def pyplot(salt: str):
    """matplotlib's pyplot, set up so that the same rows make the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": salt, "font.size": 9, "font.family": "DejaVu Sans"})
    import matplotlib.pyplot

    return matplotlib.pyplot
