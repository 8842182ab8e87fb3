"""Images as they stand in a page that needs nothing from outside."""

import base64
import io

from PIL import Image


def data_uri(image: Image.Image, form: str, quality: int) -> str:
    """An image as a data URI. form: JPEG or PNG; quality: of JPEG, 1 to 95."""
    buffer = io.BytesIO()
    image.save(buffer, form, quality=quality, optimize=True)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
