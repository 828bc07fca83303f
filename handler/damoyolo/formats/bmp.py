"""BMP: nothing to leave out, but Pillow decodes run lengths in Python, so their work is bounded."""

from __future__ import annotations

import struct

from damoyolo.config import ServingConfig
from damoyolo.errors import ImageTooLargeError
from damoyolo.formats.essential import EssentialImage, PartCount

SIGNATURES = (b"BM",)

_OLD_HEADER_BYTES = 12
_RUN_LENGTHS = (1, 2)
_MAX_HEADER_BYTES = 2**18 + 1024  # with a palette of 65,536 colours


def reduce_bmp(data: bytes, config: ServingConfig, parts: PartCount) -> EssentialImage | None:
    """The file as it is; None without a size.

    Raises:
        ImageTooLargeError: it is coded in run lengths and larger than the setting allows.
    """
    if len(data) < 14 + 20:
        return None
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == _OLD_HEADER_BYTES:
        width, height = struct.unpack_from("<HH", data, 18)
        return EssentialImage("BMP", data, (width, height))
    width, height, _, _, compression = struct.unpack_from("<IIHHI", data, 18)
    if data[25] == 0xFF:  # a negative height: rows from top to bottom
        height = 2**32 - height
    if compression in _RUN_LENGTHS:
        work = max(width * height, len(data) - _MAX_HEADER_BYTES)
        if work > config.max_rle_pixels:
            raise ImageTooLargeError(
                f"the BMP is coded in run lengths and has {width} x {height} pixels in {len(data)} bytes; "
                f"at most {config.max_rle_pixels} pixels and bytes are accepted in this coding "
                "(server setting max_rle_pixels)"
            )
    return EssentialImage("BMP", data, (width, height))
