"""Pictures of plain results.

Each function returns a matplotlib figure: `figure.savefig("name.svg")`, or .png, .pdf.
"""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from ..evaluation import MEASURES, Evolution
from .page import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..evaluation import FlopCount

# Okabe and Ito's, which colour-blind readers can tell apart, too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, that belongs to no window.

    Raises:
        ImportError: If there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"Pictures need matplotlib: `pip install matplotlib` ({error})."
        ) from None

    return Figure(figsize=(width, height), layout="constrained")


def plot_flops(counts: "dict[str, dict[int, FlopCount]]") -> "Figure":
    """The paper's Figure 7: FLOPs over those of the discrete transformer, by patch size.

    The left half is by the paper's count, the right half by the true one.

    Args:
        counts: The result of `figure_7`.
    """
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2, sharey=True)

    for axes, name, title in (
        (left, "paper_ratio", "by the paper's count"),
        (right, "ratio", "by the true count"),
    ):
        for index, (size, row) in enumerate(counts.items()):
            ratios = [getattr(count, name) for count in row.values()]
            axes.plot(
                list(row),
                ratios,
                label=f"GPT-2 {size}",
                color=COLORS[index % 6],
                marker=MARKERS[index % 6],
            )

        axes.axhline(1, color="#888888", linewidth=1, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="patch size (tokens)", title=title)
        axes.set_xticks(list(row), [str(patch_size) for patch_size in row], minor=False)
        set_ratio_ticks(axes)
        axes.grid(alpha=0.3)

    left.set_ylabel("FLOPs, TarFlowLM / discrete")
    left.legend(frameon=False)

    return figure


def plot_evolution(evolutions: dict[str, Evolution], directions: Sequence[str] = ()) -> "Figure":
    """The four measures of every flow's states: mean and standard deviation over the sequences.

    Args:
        evolutions: The evolutions by their labels, such as "text" and "samples".
        directions: The direction of each flow, shown as an arrow.
    """
    figure = new_figure(10, 6)
    for axes, name in zip(figure.subplots(2, 2).flat, MEASURES, strict=True):
        draw_measure(axes, name, evolutions, directions)

    figure.axes[0].legend(frameon=False)
    return figure


def plot_measure(
    name: str, evolutions: dict[str, Evolution], directions: Sequence[str] = ()
) -> "Figure":
    """One of the `MEASURES`, drawn as `plot_evolution` draws it."""
    figure = new_figure(4.8, 3.2)
    axes = figure.subplots()
    draw_measure(axes, name, evolutions, directions)
    axes.legend(frameon=False)
    return figure


def draw_measure(
    axes: "Axes", name: str, evolutions: dict[str, Evolution], directions: Sequence[str]
) -> None:
    """Draws one of the `MEASURES` with its axes."""
    for index, (label, evolution) in enumerate(evolutions.items()):
        statistics = getattr(evolution, name)
        first = evolution.num_states - len(statistics)  # nothing has moved at the latents
        # Shifted, so that evolutions that agree stand side by side.
        x = [level + 0.08 * index for level in range(first, evolution.num_states)]
        mean = [statistic.mean for statistic in statistics]
        std = [statistic.std for statistic in statistics]
        color, marker = COLORS[index % 6], MARKERS[index % 6]
        axes.errorbar(x, mean, std, label=label, color=color, marker=marker, capsize=3)

    last = evolution.num_states - 1
    names = ["latents"] + [f"flow {number}" for number in range(1, last + 1)]
    for number, direction in enumerate(directions, 1):
        names[number] += {"left_to_right": "\n→", "right_to_left": "\n←"}.get(direction, "\n⇆")

    axes.set_xticks(range(last + 1), names)
    axes.set(title=MEASURES[name], xlim=(-0.3, last + 0.3))
    axes.grid(alpha=0.3)


def plot_patch_sizes(counts: "dict[int, FlopCount]") -> "Figure":
    """FLOPs over those of the discrete transformer, by patch size and by both counts.

    Args:
        counts: The result of `count_by_patch_size`.
    """
    figure = new_figure(4.8, 3.2)
    axes = figure.subplots()

    for index, (name, label) in enumerate(
        (("ratio", "true count"), ("paper_ratio", "the paper's count"))
    ):
        ratios = [getattr(count, name) for count in counts.values()]
        axes.plot(list(counts), ratios, label=label, color=COLORS[index], marker=MARKERS[index])

    axes.axhline(1, color="#888888", linewidth=1, linestyle="--", label="discrete transformer")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="patch size (tokens)",
        ylabel="FLOPs, TarFlowLM / discrete",
    )
    axes.set_xticks(list(counts), [str(patch_size) for patch_size in counts])
    set_ratio_ticks(axes)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)

    return figure


def set_ratio_ticks(axes: "Axes") -> None:
    """Puts round numbers on a logarithmic axis of ratios."""
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def inline_svg(figure: "Figure", name: str, title: str, description: str) -> Markup:
    """A figure as an element of a page, in the page's colours.

    Args:
        name: Unique in the page: all ids in the picture begin with it.
        title: The subject, in a few words.
        description: The content, for readers who do not see it.
    """
    import matplotlib

    content = io.StringIO()
    # Text stays text, and the same picture has the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})

    svg = content.getvalue()
    width, height = re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0]

    inside = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")].strip()
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, flags=re.DOTALL)
    inside = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inside, flags=re.DOTALL)
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", inside)
    inside = re.sub(r"font-family: [^;\"]*;?", "", inside).replace("#000000", "currentColor")

    return render(
        "svg.html.j2",
        name=name,
        title=title,
        description=description,
        width=width,
        height=height,
        content=Markup(inside),
    )
