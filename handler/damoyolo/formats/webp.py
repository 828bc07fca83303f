"""WebP: the image, or the first frame of an animation."""

from __future__ import annotations

import struct

from damoyolo.config import ServingConfig
from damoyolo.formats.essential import EssentialImage, PartCount
from damoyolo.orientation import read_orientation

SIGNATURES = (b"RIFF",)

_CHUNK = struct.Struct("<4sI")
_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # colour profile, EXIF, XMP
_BYTES_PER_PIXEL = 26  # two canvases, a copy, Pillow's image and what follows from it
# A lossless image has at most 65,536 groups of codes, each for 16 pixels or more and coded in more than 2
# bytes; its tables take 5 kB (measured: 330 MB for 580 kB of file).
_MAX_CODE_GROUPS, _PIXELS_PER_GROUP, _BYTES_PER_GROUP, _GROUP_TABLE_BYTES = 65536, 16, 2, 6000


def reduce_webp(data: bytes, config: ServingConfig, parts: PartCount) -> EssentialImage | None:
    """The still image or the first frame, on the canvas of the file; None without a size.

    Raises:
        ImageTooLargeError: more chunks than the setting allows.
    """
    if data[8:12] != b"WEBP":
        return None
    kept: dict[bytes, bytes] = {}
    metadata: dict[bytes, bytes] = {}
    position = 12
    while position + 8 <= len(data):
        parts.add()
        kind, length = _CHUNK.unpack_from(data, position)
        end = position + 8 + length + (length & 1)
        if kind in (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"):
            kept.setdefault(kind, data[position:end])
        elif kind in (b"EXIF", b"XMP "):
            metadata.setdefault(kind, data[position + 8 : position + 8 + length])
        position = end
    if (size_wh := _size_wh(kept)) is None:
        return None
    extended = kept.get(b"VP8X", b"")
    if len(extended) > 8:
        kept[b"VP8X"] = extended[:8] + bytes((extended[8] & ~_METADATA_FLAGS,)) + extended[9:]
    order = (b"VP8X", b"ANIM", b"ANMF") if b"ANMF" in kept else (b"VP8X", b"ALPH", b"VP8 ", b"VP8L")
    chunks = b"".join(kept[kind] for kind in order if kind in kept)
    file = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    orientation = read_orientation(metadata.get(b"EXIF"), metadata.get(b"XMP "))
    lossy = kept.keys() <= {b"VP8X", b"VP8 "}
    tables = 0 if lossy else _table_bytes(file, size_wh)
    return EssentialImage("WEBP", file, size_wh, orientation, _BYTES_PER_PIXEL, tables)


def _table_bytes(file: bytes, size_wh: tuple[int, int]) -> int:
    """Most memory for the codes of a lossless image or of a lossless transparency."""
    pixels = size_wh[0] * size_wh[1]
    groups = min(_MAX_CODE_GROUPS, pixels // _PIXELS_PER_GROUP, len(file) // _BYTES_PER_GROUP)
    return groups * _GROUP_TABLE_BYTES


def _size_wh(chunks: dict[bytes, bytes]) -> tuple[int, int] | None:
    """Of the canvas, else of the image."""
    if len(extended := chunks.get(b"VP8X", b"")) >= 18:
        return int.from_bytes(extended[12:15], "little") + 1, int.from_bytes(extended[15:18], "little") + 1
    if len(lossy := chunks.get(b"VP8 ", b"")) >= 18:
        width, height = struct.unpack_from("<HH", lossy, 14)
        return width & 0x3FFF, height & 0x3FFF
    if len(lossless := chunks.get(b"VP8L", b"")) >= 13:
        bits = int.from_bytes(lossless[9:13], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None
