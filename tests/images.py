"""An encoded image, for tests that need a valid one."""

from __future__ import annotations

import io

from PIL import Image


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


IMAGE = encoded(Image.new("RGB", (4, 4), "red"))
