"""Charts as SVG to be put into a page: text in the page's colour, the same bytes for the same data."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from finetune.evaluation.calibration import Bin

INK = "#010203"  # stands for the page's text colour
GREY, COLORS = "#8a94a6", ("#2f7de1", "#e08a1e", "#3aa76d", "#b0569c", "#d1495b", "#5b8e7d", "#7a5cd1")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "charts",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
Series = tuple[Sequence[float], Sequence[float]]  # steps and values


def curves(lines: Mapping[str, Series], label: str) -> str:
    """A figure over the steps, one line a name."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(4.6, 2.4)
        for name, (steps, values) in lines.items():
            marker = "o" if len(steps) < 20 else ""
            axes.plot(steps, values, color=color_of(name, list(lines)), linewidth=1.6, marker=marker, markersize=3)
        axes.set_xlabel("step")
        axes.locator_params("x", integer=True)
        axes.set_title(textwrap.fill(label, 48), loc="left", fontsize=10)
        axes.grid(axis="y", alpha=0.2)
        if len(lines) > 1:
            axes.legend(axes.get_lines(), list(lines), frameon=False, fontsize=8)  # also a name that begins with "_"
        return to_svg(figure, f"{label} over steps")


def bars(
    groups: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, tuple[float, float]],
    label: str,
    highest: float | None = 100,
) -> str:
    """Figures side by side: `groups` by what is scored, then by arm; intervals of arms where there is one group.

    highest: where the axis ends; None: where the figures and intervals do.
    """
    shown = [value for group in groups.values() for value in group.values()] + [end for _, end in intervals.values()]
    most = highest or max([*shown, 1.0])
    arms = list(dict.fromkeys(arm for group in groups.values() for arm in group))
    below = textwrap.wrap(label, 70)  # of a mixture it names each source
    height = 0.9 + 0.24 * sum(len(group) + 0.6 for group in groups.values()) + 0.17 * (len(below) - 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(6.4, height)
        row, ticks = 0.0, []
        for group in groups.values():
            ticks.append(row + (len(group) - 1) / 2)
            for arm, value in group.items():
                axes.barh(row, value, height=0.86, color=color_of(arm, arms))
                low, high = intervals.get(arm, (value, value)) if len(groups) == 1 else (value, value)
                if high > low:
                    axes.plot([low, high], [row, row], color=INK, linewidth=1.2)
                axes.text(max(value, high) + most / 100, row, f"{value:.1f}", va="center", fontsize=9)
                row += 1
            row += 0.6
        axes.set_yticks(ticks if len(groups) > 1 else range(len(arms)), list(groups) if len(groups) > 1 else arms)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * most)
        if highest:
            axes.set_xticks([highest * quarter / 4 for quarter in range(5)])
        axes.set_xlabel("\n".join(below))
        if len(groups) > 1:
            handles = [Patch(color=color_of(arm, arms), label=arm) for arm in arms]
            figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside upper left", ncols=len(arms))
        return to_svg(figure, label)


def reliability(arms: Mapping[str, Sequence[Bin]], label: str) -> str:
    """A reliability diagram: of each arm's bins the accuracy over the confidence, in percent, a larger point for more
    answers; on the dashed diagonal both are equal.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(4.6, 3.6)
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle="--", alpha=0.5)
        for name, bins in arms.items():
            color, total = color_of(name, list(arms)), sum(of.answers for of in bins)
            confidences, accuracies = [100 * of.confidence for of in bins], [100 * of.accuracy for of in bins]
            axes.plot(confidences, accuracies, color=color, linewidth=1.2)
            axes.scatter(confidences, accuracies, [8 + 150 * of.answers / total for of in bins], color=color, alpha=0.7)
        axes.set_xlim(0, 102)
        axes.set_ylim(0, 102)
        axes.set_xlabel("confidence, percent")
        axes.set_title(label, loc="left", fontsize=10)
        axes.grid(alpha=0.2)
        axes.legend([Patch(color=color_of(name, list(arms))) for name in arms], list(arms), frameon=False, fontsize=8)
        return to_svg(figure, f"{label} over confidence")


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def color_of(name: str, names: Sequence[str]) -> str:
    """Grey for the base, a colour of its own for each of the others, in their order."""
    others = [other for other in names if other != "base"]
    return GREY if name == "base" else COLORS[others.index(name) % len(COLORS)]


def to_svg(figure: Figure, title: str) -> str:
    """An <svg> element that scales with its column."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
