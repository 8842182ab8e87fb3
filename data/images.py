"""The one place that opens an image: every kind becomes upright, opaque 8-bit RGB, or an error.

The header's size is checked before a pixel is decoded, the first frame counts, transparency is laid on white, 16-bit
grey is scaled to 8 bits (not clipped), every other mode becomes RGB, and the image is turned as its EXIF orientation
says. Not here: colour management (the reference processors ignore ICC profiles too), resizing (data/processor.py).
"""

import errno
import functools
import io
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError, features

MAX_PIXELS = 89_478_485  # 268 MB once decoded; from here on Pillow suspects a decompression bomb
MAX_METADATA = 2**28  # bytes of texts and colour profile in a PNG, once decompressed; Pillow's own limit is 1 MB each
# Pillow would also hand EPS and WMF to other programs; a data set has no business starting one.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")
if "avif" in features.modules and features.check("avif"):  # from Pillow 11.3 on, where its library was built in
    FORMATS += ("AVIF",)
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {number: Image.Transpose[turn] for number, turn in enumerate(TURNS.split(), start=2)}  # EXIF 2.32, tag 0x0112
SIDEWAYS = range(5, 9)  # orientations that swap width and height

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

T = TypeVar("T")
ImageSource = str | PathLike[str] | bytes | Mapping[str, str | bytes | None] | Image.Image


def open_image(source: ImageSource) -> Image.Image:
    """A new RGB image from a path, encoded bytes, a `datasets.Image(decode=False)` value or a PIL image.

    Raises:
        ValueError: naming the image, if it is missing, broken, truncated, empty, too large, or of 32-bit numbers.
    """
    return _opened(source, _upright_rgb)


def check_header(source: ImageSource) -> None:
    """Raises ValueError as `open_image` does, for what the header shows: no pixel is decoded."""
    _opened(source, _require_usable)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height that `open_image` gives; only what lies on its side is decoded. ValueError as there."""
    return _opened(source, _upright_size)


def suffix_of(source: ImageSource) -> str:
    """Of a file with such an image: .jpeg, .png and so on. ValueError as `check_header` has it."""
    kind = _opened(source, lambda image: str(image.format))
    return ".jp2" if kind == "JPEG2000" else f".{kind.lower()}"


def _opened(source: ImageSource, use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of the opened image, or the one kind of error."""
    name, file = _locate(source)
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_METADATA  # read at each chunk
    try:
        if isinstance(file, Image.Image):
            return use(file)
        with Image.open(file, formats=FORMATS) as image:
            return use(image)
    except Exception as error:  # decoders raise all kinds of errors on broken files
        if is_exhausted(error):
            raise
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{name} does not exist; correct its path, or leave it out") from error
        # Of bytes Pillow would name the object that holds them.
        said = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else str(error)
        fix = f"give a whole 8-bit one of at most {MAX_PIXELS:,} pixels ({', '.join(FORMATS)}), or leave it out"
        raise ValueError(f"{name} cannot be used: {said}; {fix}") from error


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of image files, such as .jpg, in lower case."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def is_image_name(name: str) -> bool:
    """Whether a file's name has the suffix of an image, such as .jpg, .JPG or .png."""
    return os.path.splitext(name)[1].lower() in suffixes()


def images_in(directory: Path) -> list[Path]:
    """The image files in a directory, sorted by name: those with a suffix of FORMATS, such as .jpg, .JPG or .png.
    Hidden files, other files and directories within are left out.

    Raises:
        ValueError: there is none, or the directory cannot be read.
    """
    try:
        files = sorted(path for path in directory.iterdir() if is_image_name(path.name) and path.is_file())
    except OSError as error:
        raise ValueError(f"the folder {directory} cannot be read: {error.strerror}") from error
    found = [path for path in files if not path.name.startswith(".")]
    if not found:
        raise ValueError(
            f"the folder {directory} has no image: looked for files with the suffix {', '.join(sorted(suffixes()))}, "
            "not in folders within; give a folder that has some, or image files"
        )
    return found


def is_exhausted(error: Exception) -> bool:
    """Whether an error says that the machine has run out of memory or file handles: nothing is wrong with the image."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in EXHAUSTED)


def _locate(source: object) -> tuple[str, Path | io.BytesIO | Image.Image]:
    """What to call the image in errors, and where its content is: in the bytes where a value has both."""
    if isinstance(source, Image.Image):
        return f"the {source.mode} image given", source
    value = source if isinstance(source, Mapping) else {"bytes" if isinstance(source, bytes) else "path": source}
    path, content = value.get("path"), value.get("bytes")
    if isinstance(content, bytes):
        return f"image {path}" if path else f"image of {len(content):,} bytes", io.BytesIO(content)
    if isinstance(path, str | PathLike) and str(path):
        return f"image {path}", Path(path)
    raise ValueError(f"expected a path, bytes, a PIL image or {{path, bytes}} with one of them, got {source!r:.200}")


def _require_usable(image: Image.Image) -> None:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, not 1 to {MAX_PIXELS:,}")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    _require_usable(image)
    if _orientation(image) not in SIDEWAYS:
        return image.size
    image.load()  # Pillow turns TIFF itself, before or when it decodes, by version
    width, height = image.size
    return (height, width) if _orientation(image) in SIDEWAYS else (width, height)


def _upright_rgb(image: Image.Image) -> Image.Image:
    _require_usable(image)
    rgb = _rgb(image)
    orientation = _orientation(image)
    upright = rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
    upright.info.clear()  # or opening the result again would turn it again
    return upright


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation: int | None = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a garbled EXIF block says nothing about the pixels: show them as they are, like every viewer
        return None
    return orientation


def _rgb(image: Image.Image) -> Image.Image:
    """A new RGB image, transparency on white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey16(image)
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _grey16(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits: Pillow's own conversion clips at 255."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"grey levels {levels.min()} to {levels.max()} do not fit into 16 bits")
    grey = (levels * 255 + 32767) // 65535
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
