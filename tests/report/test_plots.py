"""The numbers in the pictures."""

import sys

import pytest
import torch

from tarflow_hf.evaluation import measure_evolution


def test_pictures_show_the_numbers():
    pytest.importorskip("matplotlib")
    from tarflow_hf.evaluation import figure_7
    from tarflow_hf.report import plot_evolution, plot_flops

    counts = figure_7(["small"], [1, 2])
    left, right = plot_flops(counts).axes
    assert list(left.lines[0].get_ydata()) == [
        count.paper_ratio for count in counts["small"].values()
    ]
    assert list(right.lines[0].get_ydata()) == [count.ratio for count in counts["small"].values()]
    evolution = measure_evolution([[torch.randn(3, 5, 2) for _ in range(3)]])
    panels = plot_evolution({"text": evolution}, ["left_to_right", "right_to_left"]).axes
    assert list(panels[0].lines[0].get_ydata()) == [statistic.mean for statistic in evolution.norm]
    assert (
        list(panels[3].lines[0].get_xdata()) == [1, 2]
        and "←" in panels[0].get_xticklabels()[2].get_text()
    )


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    from tarflow_hf.report import plot_flops

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_flops({})
