"""The pictures of the README: how a row passes through the network, drawn; report and demo of a run, photographed.

    make pictures       after make quickstart

docs/images/network.png, report.png, demo.png. The last two need a Chromium (Debian: apt install chromium).
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGES = Path(__file__).parent / "images"
INK, FROZEN, TRAINED = "#1d2433", "#dfe4ec", "#2f7de1"
PARTS = {"image": "#f2c14e", "prefix": "#7fb7be", "suffix": "#e07a5f"}  # colours of a row's tokens
# Of the report its beginning and its answers are shown: what stands between them is taken out.
TO_THE_ANSWERS = """() => {
    const heading = document.querySelector("h2");
    while (heading.nextElementSibling.textContent !== "What it answers") heading.nextElementSibling.remove();
    heading.remove();
}"""
ROW = [("image", "image"), ("image", "image"), ("image", "image"), ("prefix", "bos"), ("prefix", "what"),
       ("prefix", "color"), ("prefix", "\\n"), ("suffix", "red"), ("suffix", "eos")]  # fmt: skip


def network() -> None:
    """Image and text become one row of tokens; who sees whom; where adapters are, and where the loss is."""
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 11, "text.color": INK}):
        figure = Figure(figsize=(12.5, 5.4), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        flow, mask = figure.subplots(1, 2, width_ratios=(2.1, 1))
        draw_flow(flow)
        draw_mask(mask)
        figure.savefig(IMAGES / "network.png", dpi=150)


def box(axes: Axes, x: float, y: float, width: float, text: str, below: str = "", adapted: bool = False) -> None:
    """A part of the network; below: in small letters. adapted: LoRA may stand in it."""
    frame = FancyBboxPatch(
        (x, y), width, 1.0, boxstyle="round,pad=0,rounding_size=0.12", facecolor=FROZEN, edgecolor=INK
    )
    axes.add_patch(frame)
    axes.text(x + width / 2, y + (0.62 if below else 0.5), text, ha="center", va="center", weight="bold")
    axes.text(x + width / 2, y + 0.27, below, ha="center", va="center", fontsize=9)
    if adapted:
        axes.add_patch(Rectangle((x + width - 0.62, y + 0.86), 0.56, 0.28, facecolor=TRAINED))
        axes.text(x + width - 0.34, y + 1.0, "LoRA", ha="center", va="center", fontsize=8, color="white", weight="bold")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0})


def draw_flow(axes: Axes) -> None:
    axes.set(xlim=(-0.1, 9.2), ylim=(-0.55, 6.3))
    axes.set_axis_off()
    box(axes, 0.0, 5.0, 1.5, "image", "224 x 224 pixels")
    box(axes, 2.2, 5.0, 2.3, "vision tower", "SigLIP: 256 features", adapted=True)
    box(axes, 5.2, 5.0, 2.3, "connector", "to the decoder's width", adapted=True)
    arrow(axes, (1.5, 5.5), (2.2, 5.5))
    arrow(axes, (4.5, 5.5), (5.2, 5.5))
    axes.plot([7.5, 8.35, 8.35, 1.35, 1.35], [5.5, 5.5, 4.35, 4.35, 4.05], color=INK, linewidth=1.2)
    arrow(axes, (1.35, 4.2), (1.35, 3.9))
    axes.text(4.95, 4.47, "image tokens", ha="center", fontsize=9)
    for place, (part, token) in enumerate(ROW):
        axes.add_patch(Rectangle((place, 3.3), 0.94, 0.55, facecolor=PARTS[part], edgecolor="white"))
        axes.text(place + 0.47, 3.57, token, ha="center", va="center", fontsize=9.5)
    for first, last, text in ((0, 3, "256 in the published model"), (3, 7, "prefix: what is asked"), (7, 9, "suffix")):
        axes.text((first + last) / 2 - 0.03, 3.05, text, ha="center", va="center", fontsize=9)
    arrow(axes, (4.47, 2.85), (4.47, 2.45))
    box(
        axes,
        0.0,
        1.35,
        8.94,
        "decoder",
        "Gemma; its layers are frozen, the adapters beside them are trained",
        adapted=True,
    )
    for place, token in ((6, "red"), (7, "eos")):
        arrow(axes, (place + 0.47, 1.35), (place + 0.47, 0.8))
        axes.text(place + 0.47, 0.58, token, ha="center", va="center", fontsize=11, weight="bold")
    axes.text(6.97, 0.15, "learned: the next token of the suffix, nothing else", ha="center", fontsize=9)
    axes.add_patch(Rectangle((0, -0.05), 0.45, 0.26, facecolor=FROZEN, edgecolor=INK, linewidth=0.8))
    axes.text(0.55, 0.08, "frozen", va="center", fontsize=9)
    axes.add_patch(Rectangle((1.5, -0.05), 0.45, 0.26, facecolor=TRAINED))
    axes.text(2.05, 0.08, "trained, where you ask for it", va="center", fontsize=9)


def draw_mask(axes: Axes) -> None:
    """Row i, column j: whether token i sees token j."""
    size = len(ROW)
    for i, (part, _) in enumerate(ROW):
        for j, (other, _) in enumerate(ROW):
            sees = (part != "suffix" and other != "suffix") or (part == "suffix" and j <= i)
            color = PARTS[other] if sees else "#f6f7f9"
            axes.add_patch(Rectangle((j, size - 1 - i), 0.92, 0.92, facecolor=color))
    labels = [token for _, token in ROW]
    middles = [place + 0.46 for place in range(size)]
    axes.set_xticks(middles, labels, fontsize=9, rotation=60)
    axes.set_yticks(middles, labels[::-1], fontsize=9)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set(xlim=(0, size), ylim=(0, size), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_title("who (row) sees whom (column)", fontsize=11)


def photograph(run: Path) -> None:
    """Report and demo of a run."""
    from playwright.sync_api import sync_playwright

    from tests.browser.conftest import FLAGS, chromium
    from tests.browser.test_demo import free_port, serving

    with sync_playwright() as playwright, TemporaryDirectory() as directory:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        tab = browser.new_page(viewport={"width": 1100, "height": 1180}, color_scheme="light")
        tab.goto((run / "report.html").resolve().as_uri())
        tab.evaluate(TO_THE_ANSWERS)
        tab.screenshot(path=str(IMAGES / "report.png"))
        port = free_port()
        words = [sys.executable, "-m", "finetune", "demo", str(run), "--dtype", "float32", "--port", str(port)]
        with serving(words, Path.cwd(), Path(directory, "said"), port) as url:
            ask(tab, url)


def ask(tab: Page, url: str) -> None:
    """A question of the validation set, its answers, and what they depend on."""
    tab.set_default_timeout(60_000)
    tab.goto(url)
    tab.locator("table tbody tr").nth(2).click()
    tab.locator("#image img").wait_for()
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.locator("#answer-1 .answer").wait_for()
    tab.get_by_role("button", name="Show what the answers depend on").click()
    tab.locator("#map-1 img").wait_for()
    tab.wait_for_timeout(1000)  # for images to fade in
    tab.set_viewport_size({"width": 1100, "height": 810})
    tab.screenshot(path=str(IMAGES / "demo.png"))


if __name__ == "__main__":
    network()
    photograph(Path("runs/quickstart"))
