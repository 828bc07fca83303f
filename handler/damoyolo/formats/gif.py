"""GIF: the screen, its palette and the first frame."""

from __future__ import annotations

import re
import struct

from damoyolo.config import ServingConfig
from damoyolo.formats.essential import EssentialImage, PartCount

SIGNATURES = (b"GIF87a", b"GIF89a")

_BLOCK = re.compile(rb"[!,;]")  # extension, frame, end
_SCREEN_BYTES = 13
_GRAPHIC_CONTROL = 0xF9


def reduce_gif(data: bytes, config: ServingConfig, parts: PartCount) -> EssentialImage | None:
    """The first frame with the graphic control before it; None without a frame.

    Raises:
        ImageTooLargeError: more blocks before the frame than the setting allows.
    """
    if len(data) < _SCREEN_BYTES:
        return None
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = head = _SCREEN_BYTES + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = b""
    while (found := _BLOCK.search(data, position)) is not None:
        start = found.start()
        parts.add()
        if found[0] == b";":
            return None
        if found[0] == b",":
            if len(data) < start + 10:
                return None
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, start + 1)
            size_wh = (max(width, left + frame_width), max(height, top + frame_height))
            return EssentialImage("GIF", data[:head] + control + data[start:], size_wh)
        position = _skip_blocks(data, start + 2, parts)
        if data[start + 1 : start + 2] == bytes((_GRAPHIC_CONTROL,)):
            control = data[start:position]
    return None


def _skip_blocks(data: bytes, position: int, parts: PartCount) -> int:
    """The position after a sequence of blocks, which ends with an empty one."""
    while position < len(data):
        parts.add()
        size = data[position]
        position += 1 + size
        if size == 0:
            break
    return position
