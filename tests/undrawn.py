"""Reports without their charts: to draw them takes as long as to train the small run that they show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from unittest import mock

from matplotlib.figure import Figure

from finetune.report import charts


@contextmanager
def undrawn_charts() -> Iterator[None]:
    """Figures are made of the data, as they are otherwise, but not drawn: an image with a title stands for each."""
    with mock.patch.object(charts, "to_svg", undrawn):
        yield


def undrawn(_figure: Figure, title: str) -> str:
    return f"<svg><title>{escape(title)}</title></svg>"
