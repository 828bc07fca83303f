"""Decode encoded images with Pillow, within the server's limits."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, ImageTooLargeError, RequestError, UnsupportedImageError
from damoyolo.orientation import pillow_transposition, valid_orientation

EncodedImage = bytes | bytearray | memoryview

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
        ImageTooLargeError: more bytes or pixels than `config.max_image_bytes`, `config.max_image_pixels`.
        CorruptImageError: the header can be read, the pixels cannot.
    """
    require_image_bytes(len(encoded), config)
    try:
        with _open(encoded, config) as opened:
            _require_image_pixels(opened, config)
            opened.load()
            transposition = pillow_transposition(_exif_orientation(opened))
            image = _to_rgb(opened)
            if transposition is not None:
                image = image.transpose(transposition)
            return np.asarray(image)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"the image has too many pixels: {_reason(error)} No setting of the server lifts this limit."
        ) from error
    except MemoryError as error:
        raise ImageTooLargeError(
            "there is not enough memory to decode the image; "
            "the server settings max_image_pixels and decode_threads bound what decoding needs"
        ) from error
    # On malformed bytes Pillow's readers raise nearly any exception: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, EOFError, IndexError, KeyError, TypeError, OverflowError ...
    except Exception as error:
        raise CorruptImageError(f"the image cannot be decoded: {_reason(error)}") from error


def require_image_bytes(size_bytes: int, config: ServingConfig) -> None:
    """Refuse an encoded image that is too large.

    Raises:
        ImageTooLargeError: names the size and the setting.
    """
    if size_bytes > config.max_image_bytes:
        raise ImageTooLargeError(
            f"the image has {size_bytes} bytes; at most {config.max_image_bytes} are accepted "
            "(server setting max_image_bytes)"
        )


def _open(encoded: EncodedImage, config: ServingConfig) -> ImageFile.ImageFile:
    """Read the header only."""
    try:
        with _warnings_ignored():
            return Image.open(io.BytesIO(encoded), formats=config.image_formats)
    except UnidentifiedImageError as error:
        raise UnsupportedImageError(
            "the data are no image of an accepted format, or its header is broken; "
            f"accepted are {', '.join(config.image_formats)} (server setting image_formats)"
        ) from error


def _require_image_pixels(image: Image.Image, config: ServingConfig) -> None:
    width, height = image.size
    if width * height > config.max_image_pixels:
        raise ImageTooLargeError(
            f"the image has {width} x {height} = {width * height} pixels; "
            f"at most {config.max_image_pixels} are accepted (server setting max_image_pixels)"
        )


def _exif_orientation(image: Image.Image) -> int:
    """1..8; needs the loaded image, because a PNG may carry EXIF data after the pixels."""
    try:
        with _warnings_ignored():
            return valid_orientation(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # viewers show an image with broken EXIF data upright
        return 1


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
