"""Reduce an encoded image to what decoding needs, and refuse files whose decoding would cost too much.

Pillow and the libraries below it read everything that a file holds: comments, profiles, further frames and
directories, thousands of scans. A small file can keep them busy for minutes. So each format has a function
here that walks the structure of a file without decoding it, in time bounded by `max_image_parts`, and copies
what the first frame needs. Only that copy is decoded.
"""

from __future__ import annotations

import struct

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, UnsupportedImageError
from damoyolo.formats import bmp, gif, jpeg, png, tiff, webp
from damoyolo.formats.essential import EssentialImage, PartCount, require_image_bytes, require_size

NO_IMAGE = (
    "the data are no image of an accepted format, or its header is broken; "
    "accepted are {} (server setting image_formats)"
)

EncodedImage = bytes | bytearray | memoryview

_READERS = {
    "JPEG": (jpeg.SIGNATURES, jpeg.reduce_jpeg),
    "PNG": (png.SIGNATURES, png.reduce_png),
    "GIF": (gif.SIGNATURES, gif.reduce_gif),
    "WEBP": (webp.SIGNATURES, webp.reduce_webp),
    "BMP": (bmp.SIGNATURES, bmp.reduce_bmp),
    "TIFF": (tiff.SIGNATURES, tiff.reduce_tiff),
}


def reduce_image(encoded: EncodedImage, config: ServingConfig) -> EssentialImage:
    """What decoding needs of an encoded image of an accepted format.

    A damaged file gives what could be read; its decoder then reports the damage.

    Raises:
        UnsupportedImageError: not a file of a format in `config.image_formats`, or no size in its header.
        ImageTooLargeError: more bytes, pixels, parts, scans or longer sides than the settings allow.
        CorruptImageError: values that no file of this format has.
    """
    require_image_bytes(len(encoded), config)
    data = bytes(encoded)
    for name in config.image_formats:
        signatures, reduce = _READERS[name]
        if data.startswith(signatures):
            try:
                image = reduce(data, config, PartCount(config.max_image_parts))
            except (IndexError, ValueError, OverflowError, struct.error) as error:
                raise CorruptImageError(f"the structure of the {name} file is broken") from error
            if image is None:
                break
            require_size(image.size_wh, config)
            return image
    raise UnsupportedImageError(NO_IMAGE.format(", ".join(config.image_formats)))


def begins_like_image(data: bytes) -> bool:
    """Whether the data begin with the signature of a known format."""
    return any(data.startswith(signatures) for signatures, _ in _READERS.values())
