"""Decode encoded images with Pillow, within the server's limits."""

from __future__ import annotations

import ctypes
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, _imaging

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, ImageTooLargeError, RequestError, UnsupportedImageError
from damoyolo.formats import NO_IMAGE, EncodedImage, reduce_image
from damoyolo.formats.essential import EssentialImage
from damoyolo.orientation import pillow_transposition

# Pillow allocates large images in such blocks. Larger than malloc's greatest threshold for memory of its own
# (32 MiB), they return to the system when an image ends; smaller ones stay with each thread.
_BLOCK_BYTES = 64 * 1024 * 1024
# Images beyond are copied in strips; smaller ones at once, which is faster (1920x1080: 8 ms against 20 ms).
_STRIP_PIXELS = 2**23

# Warning filters belong to the whole process: one thread at a time may change them.
_warning_filters_lock = threading.Lock()


def decode_image(encoded: EncodedImage, config: ServingConfig) -> NDArray[np.uint8]:
    """Decode one image as a viewer shows it: EXIF orientation applied, first of several frames.

    Transparency is dropped, not blended, as upstream's `convert("RGB")` does; 16-bit grey is scaled to 8
    bits; CMYK, palette, grey and 1-bit images become RGB.

    Returns:
        (h, w, 3) uint8 R, G, B; may be read-only.

    Raises:
        UnsupportedImageError: not an image of a format in `config.image_formats`.
        ImageTooLargeError: more bytes, pixels, parts or scans than the settings allow.
        CorruptImageError: the header can be read, the pixels cannot.
        MemoryError: this says nothing about the image.
    """
    return decode_reduced(reduce_image(encoded, config), config)


def decode_reduced(
    image: EssentialImage, config: ServingConfig, least_hw: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Decode what `reduce_image` made of an image; see `decode_image`.

    least_hw: height and width that are enough: the result may be the image at 1/2, 1/4 or 1/8 of its size.
    """
    try:
        divisor = jpeg_divisor(image.shown_size_hw, least_hw) if image.image_format == "JPEG" else 1
        return _to_array(_read_pixels(image, config, divisor))
    except (RequestError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"the image has too many pixels: {_reason(error)} No setting of the server lifts this limit."
        ) from error
    # On malformed bytes Pillow's readers raise nearly any exception: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, EOFError, IndexError, KeyError, TypeError, OverflowError ...
    except Exception as error:
        raise CorruptImageError(f"the image cannot be decoded: {_reason(error)}") from error


def jpeg_divisor(size_hw: tuple[int, int], least_hw: tuple[float, float] | None) -> int:
    """1, 2, 4 or 8: by how much a JPEG's sides can be divided while it is decoded, and still be long enough.

    Only sides that are multiples are divided, so that pixel (y, x) of the result always covers the pixels
    from (divisor * y, divisor * x) on, whatever the orientation; libjpeg would pad an incomplete last one.

    size_hw: of the image, as a viewer shows it. least_hw: the lengths that are enough; None for its own.
    """
    if least_hw is None:
        return 1
    sides = list(zip(size_hw, least_hw, strict=True))
    return next(
        divisor
        for divisor in (8, 4, 2, 1)
        if divisor == 1 or all(side % divisor == 0 and side // divisor >= least for side, least in sides)
    )


def prepare_decoders() -> None:
    """Load the readers of all formats, and let no library write about what clients send.

    Pillow logs, and libtiff prints a line per damaged row; an image that cannot be decoded still raises.
    Affects the whole process.
    """
    Image.init()
    _imaging.set_block_size(_BLOCK_BYTES)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for path in _mapped_files("libtiff"):
        library = ctypes.CDLL(path)  # the one that is loaded already
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def _mapped_files(name: str) -> set[str]:
    try:
        with open("/proc/self/maps") as maps:
            return {path for line in maps if name in (path := line[73:].rstrip("\n")).rpartition("/")[2]}
    except OSError:  # not on Linux: the lines stay
        return set()


def _read_pixels(image: EssentialImage, config: ServingConfig, divisor: int) -> Image.Image:
    """The decoded image, upright, with the sides of a JPEG divided."""
    with _open(image, config) as opened:
        if opened.size != image.size_wh:
            raise CorruptImageError(
                f"the image says in one place that it has {image.size_wh[0]} x {image.size_wh[1]} pixels and "
                f"in another {opened.size[0]} x {opened.size[1]}"
            )
        if divisor > 1:
            opened.draft(None, (image.size_wh[0] // divisor, image.size_wh[1] // divisor))
        opened.load()
        pixels = _to_rgb(opened)
        transposition = pillow_transposition(image.orientation)
        if transposition is not None:
            pixels = pixels.transpose(transposition)
        return pixels


def _open(image: EssentialImage, config: ServingConfig) -> ImageFile.ImageFile:
    """Read the header only."""
    try:
        with _warnings_ignored():
            return Image.open(io.BytesIO(image.data), formats=[image.image_format])
    except UnidentifiedImageError as error:
        raise UnsupportedImageError(NO_IMAGE.format(", ".join(config.image_formats))) from error


def _to_array(image: Image.Image) -> NDArray[np.uint8]:
    """(h, w, 3); large images in strips, because Pillow needs the size of the result a second time."""
    width, height = image.size
    if width * height <= _STRIP_PIXELS:
        return np.asarray(image)
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // 8 // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # convert() would clip everything above 255
        values = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnsupportedImageError(
            f"the image has signed or 32-bit pixels (Pillow mode {image.mode}), of undefined range; "
            "accepted are images of 1, 8 or 16 bits per channel"
        )
    image.info.pop("transparency", None)  # dropped anyway; convert() warns about some forms of it
    return image.convert("RGB")


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    """Silence Pillow's warnings about what a client sent; the limits are enforced here."""
    with _warning_filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    """The text of a foreign error, ASCII and bounded, because it may quote the client's data."""
    return ascii(str(error) or type(error).__name__)[1:-1][:160]
