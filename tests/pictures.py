"""A picture for tests that need some, whatever it shows."""

from __future__ import annotations

import io

from PIL import Image


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


PICTURE = encoded(Image.new("RGB", (4, 4), "red"))
