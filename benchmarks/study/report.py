"""Tables and a plot of the study's rows.

    python benchmarks/study/report.py benchmarks/results/study.jsonl --output docs/study.md    # and docs/study.svg
"""

import argparse
import json
import statistics
from pathlib import Path

from cases import GROUPS

HEADER = "| model | parameters | FLOPs a character, of the discrete | seeds | bits/char (ELBO) | bits/char (importance-weighted) | to the discrete |"  # noqa: E501


def tables(rows: list[dict]) -> str:
    """Markdown, a table for each group that rows are there for: means over the seeds, and their standard deviation."""
    by_case = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    discrete = by_case.get("discrete")
    parts = []
    for group, cases in GROUPS.items():
        lines = [line(case, by_case[case], discrete) for case in cases if case in by_case]
        if lines:
            parts.append("\n".join([f"**{group}**\n", HEADER, "|---|---|---|---|---|---|---|", *lines]))
    return "\n\n".join(parts)


def line(case: str, rows: list[dict], discrete: list[dict] | None) -> str:
    """Of one case. The gap to the discrete model is of seeds that both have."""
    elbo, bound = (spread([row[f"{name}_bits_per_character"] for row in rows]) for name in ("elbo", "bound"))
    flops, gap = "", ""
    if discrete is not None:
        flops = f"{rows[0]['training_flops_per_token'] / discrete[0]['training_flops_per_token']:.2f}"
        exact = {row["seed"]: row["bound_bits_per_character"] for row in discrete}
        gaps = [row["bound_bits_per_character"] / exact[row["seed"]] - 1 for row in rows if row["seed"] in exact]
        gap = f"{100 * statistics.mean(gaps):+.1f}%" if gaps else ""
    if case == "discrete":
        elbo, bound, gap = f"{elbo}, exact", "", ""
    return f"| {case} | {rows[0]['parameters']:,} | {flops} | {len(rows)} | {elbo} | {bound} | {gap} |"


def spread(values: list[float]) -> str:
    """Mean and standard deviation.

    Example:
        >>> spread([4.0, 4.2]), spread([4.0])
        ('4.100 ± 0.141', '4.000')
    """
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
