"""Every kind of image becomes upright, opaque RGB; every broken one an error that names it."""

import errno
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data.image_check import unusable
from data.images import FORMATS, MAX_PIXELS, check_header, image_size, images_in, open_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photograph(size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Noise: no two corners, rows or columns alike."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_an_image_is_the_same_by_path_bytes_dataset_value_and_pil(tmp_path: Path) -> None:
    original = photograph()
    path = tmp_path / "a.png"
    original.save(path)
    sources: list[Any] = [str(path), path, path.read_bytes(), {"path": str(path), "bytes": None}]
    sources += [{"path": None, "bytes": path.read_bytes()}, {"path": "gone.png", "bytes": path.read_bytes()}, original]
    for source in sources:
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert opened.tobytes() == original.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_upright_once(orientation: int, form: str) -> None:
    """The oracle is Pillow's own exif_transpose on the raw pixels; opening the result again changes nothing."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = encoded(photograph(), form, exif=exif, **lossless)
    expected = photograph()
    expected.getexif()[ExifTags.Base.Orientation] = orientation
    expected = ImageOps.exif_transpose(expected)
    opened = open_image(content)
    assert opened.size == image_size(content) == ((40, 24) if orientation <= 4 else (24, 40))
    assert opened.tobytes() == expected.tobytes()
    assert open_image(opened).tobytes() == expected.tobytes()


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow opens none")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_opened_and_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    plain = Image.new("RGB", (40, 24), RED)
    plain.paste(Image.new("RGB", (20, 24), BLUE))
    content = encoded(plain, "AVIF", exif=exif, quality=100, subsampling="4:4:4")
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    expected = ImageOps.exif_transpose(plain)
    opened = open_image(content)
    assert opened.size == expected.size
    difference = np.asarray(opened).astype(int) - np.asarray(expected)
    assert abs(difference).mean() < 4


@pytest.mark.parametrize("compressed", [True, False])
def test_a_png_may_carry_megabytes_of_metadata(compressed: bool) -> None:
    """Those of image editors and generators do; Pillow by itself refuses a text or profile of more than 1 MB."""
    texts = PngInfo()
    texts.add_text("parameters", "x" * 3_000_000, zip=compressed)
    texts.add_itxt("XML:com.adobe.xmp", "y" * 2_000_000, zip=compressed)
    profile = np.random.default_rng(0).bytes(2_000_000)
    content = encoded(photograph(), "PNG", pnginfo=texts, icc_profile=profile)
    check_header(content)
    assert open_image(content).tobytes() == photograph().tobytes()


def test_a_garbled_exif_block_leaves_the_image_as_it_is() -> None:
    content = encoded(photograph(), "PNG", exif=b"Exif\x00\x00nonsense")
    assert open_image(content).tobytes() == photograph().tobytes()


def palette(transparency: bytes | int | None) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return encoded(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


def two_pixels(mode: str, first: Any, second: Any, form: str, **options: Any) -> bytes:
    image = Image.new(mode, (2, 1), first)
    image.putpixel((1, 0), second)
    return encoded(image, form, **options)


@pytest.mark.parametrize(
    ("content", "left", "right"),
    [
        (palette(None), RED, BLUE),
        (palette(1), RED, WHITE),
        (palette(b"\xff\x80"), RED, (127, 127, 255)),
        (two_pixels("RGB", RED, BLUE, "PNG", transparency=BLUE), RED, WHITE),
        (two_pixels("L", 10, 200, "PNG", transparency=200), (10, 10, 10), WHITE),
        (two_pixels("RGBA", (255, 0, 0, 255), (255, 0, 0, 0), "PNG"), RED, WHITE),
        (two_pixels("RGBA", (0, 0, 0, 128), (0, 0, 255, 255), "PNG"), (127, 127, 127), BLUE),
        (two_pixels("LA", (40, 255), (40, 0), "PNG"), (40, 40, 40), WHITE),
        (two_pixels("L", 7, 250, "PNG"), (7, 7, 7), (250, 250, 250)),
        (two_pixels("1", 0, 1, "PNG"), (0, 0, 0), WHITE),
        (two_pixels("I;16", 0, 65535, "PNG"), (0, 0, 0), WHITE),
        (two_pixels("I;16", 32896, 256, "PNG"), (128, 128, 128), (1, 1, 1)),
        (two_pixels("I;16", 4112, 300, "PNG", transparency=300), (16, 16, 16), WHITE),
        (two_pixels("I;16", 4112, 65535, "TIFF"), (16, 16, 16), WHITE),
        (two_pixels("I", 4112, 65535, "PPM"), (16, 16, 16), WHITE),
        (two_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 255), "TIFF"), RED, (0, 0, 0)),
    ],
    ids=lambda value: "image" if isinstance(value, bytes) else str(value),
)
def test_every_mode_becomes_opaque_rgb(content: bytes, left: tuple[int, int, int], right: tuple[int, int, int]) -> None:
    opened = open_image(content)
    assert opened.mode == "RGB"
    assert [opened.getpixel((0, 0)), opened.getpixel((1, 0))] == [left, right]


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    content = encoded(Image.new("CMYK", (16, 16), (255, 0, 255, 0)), "JPEG", quality=100)
    assert np.abs(np.asarray(open_image(content)).astype(int) - np.array(GREEN)).max() <= 4


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **lossless)
    assert open_image(content).getcolors() == [(64, RED)]


def bomb() -> bytes:
    """A GIF of 44 bytes whose header says 65,535 x 65,535."""
    content = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


def header_above_the_limit() -> bytes:
    """Too large for us, yet below the size that Pillow itself refuses; there are no pixels behind the header."""
    content = encoded(Image.new("RGB", (1, 1)), "BMP")
    return content[:18] + struct.pack("<ii", 10_000, MAX_PIXELS // 10_000 + 1) + content[26:]


def empty_header() -> bytes:
    content = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    content[6:8] = b"\x00\x00"  # width of the screen, then of the frame
    frame = content.index(b",\x00\x00\x00\x00\x01\x00\x01\x00")
    content[frame + 5 : frame + 7] = b"\x00\x00"
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bomb, "exceeds limit"),
        (header_above_the_limit, "not 1 to 89,478,485"),
        (empty_header, "cannot identify|0 x"),
        (lambda: encoded(photograph(), "PNG")[:-200], "truncated"),
        (lambda: encoded(photograph(), "JPEG")[:-100], "truncated"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(50), "cannot be used"),
        (lambda: b"<svg/>", "cannot identify"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (lambda: b"", "cannot identify"),
        (lambda: encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point"),
        (lambda: two_pixels("I", -5, 70000, "TIFF"), "16 bits"),
    ],
)
def test_what_cannot_be_opened_is_an_error_with_its_name(
    make: Callable[[], bytes], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "street.img"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=rf"(?s)street\.img.*({reason})"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_headers_tell_size_and_kind_and_no_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncated, floats = encoded(photograph(), "PNG")[:-200], encoded(Image.new("F", (2, 2)), "TIFF")
    broken = [bomb(), header_above_the_limit(), empty_header(), floats, b""]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    check_header(truncated)
    for content in broken:
        path = tmp_path / "street.img"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"street\.img cannot be used"):
            check_header(path)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (1, 1))
    monkeypatch.setattr(Image.Image, "size", (30_000, 30_000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="30000 x 30000 pixels, not 1 to"):
        open_image(image)


def test_missing_files_and_wrong_sources_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jpg does not exist; correct its path"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="directory"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        open_image(Image.new("RGB", (0, 5)))
    for source in ({"path": None, "bytes": None}, 7, ""):
        with pytest.raises(ValueError, match="expected a path, bytes"):
            open_image(source)  # type: ignore[arg-type]


def test_the_source_image_is_left_alone() -> None:
    source = photograph()
    open_image(source).paste(RED, (0, 0, 40, 24))
    assert source.tobytes() == photograph().tobytes()


@pytest.mark.parametrize("kind", ["header", "pixels", "data set"])
def test_a_machine_without_handles_or_memory_is_not_an_invalid_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Such an error is raised as it is: as one of the image's it would skip good records."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)

    def exhausted(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", exhausted)
    look = {"header": check_header, "pixels": open_image, "data set": lambda p: unusable([str(p)], tmp_path)}[kind]
    with pytest.raises(OSError, match="Too many open files"):
        look(path)


def test_the_images_of_a_directory_are_known_by_their_suffix(tmp_path: Path) -> None:
    """Of every kind that is opened, and of no other that Pillow knows."""
    suffixes = ["jpg", "JPEG", "png", "gif", "webp", "tif", "tiff", "bmp", "ppm", "jp2", "eps", "pdf", "wmf", "txt", ""]
    for suffix in suffixes:
        (tmp_path / f"image.{suffix}").touch()
    found = [path.name.removeprefix("image.") for path in images_in(tmp_path)]
    assert found == sorted(suffixes[:10])
    with pytest.raises(ValueError, match=r"/nowhere cannot be read: No such file"):
        images_in(tmp_path / "nowhere")
