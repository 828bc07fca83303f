"""PNG: header, palette, transparency and pixels of the default image."""

from __future__ import annotations

import struct
import zlib

from damoyolo.config import ServingConfig
from damoyolo.formats.essential import EssentialImage, PartCount
from damoyolo.orientation import read_orientation

SIGNATURES = (b"\x89PNG\r\n\x1a\n",)

_CHUNK = struct.Struct(">I4s")  # length, kind; a checksum of four bytes follows the content
_KEPT = (b"IHDR", b"PLTE", b"tRNS")
_END = _CHUNK.pack(0, b"IEND") + struct.pack(">I", zlib.crc32(b"IEND"))
_XMP_KEY = b"XML:com.adobe.xmp\0"
_RAW_EXIF_KEY = b"Raw profile type exif\0"  # written by ImageMagick
_MAX_METADATA_BYTES = 1024 * 1024  # Pillow's limit of a text
_BYTES_PER_PIXEL = 20  # 16-bit grey is scaled in 32 bits


def reduce_png(data: bytes, config: ServingConfig, parts: PartCount) -> EssentialImage | None:
    """The default image, without animation, text and profiles; None without a header.

    Raises:
        ImageTooLargeError: more chunks than the setting allows.
    """
    kept: list[bytes] = [data[:8]]
    pixels: list[memoryview] = []
    metadata: dict[str, bytes] = {}
    header = b""
    view = memoryview(data)
    position = 8
    while position + 8 <= len(data):
        parts.add()
        length, kind = _CHUNK.unpack_from(data, position)
        end = position + 12 + length
        if kind == b"IDAT":
            pixels.append(view[position + 8 : end - 4])
        elif kind == b"IEND" or not kind.isalpha():
            break
        elif kind in _KEPT and not pixels:
            kept.append(data[position:end])
            header = header or data[position + 8 : end - 4]
        elif length <= _MAX_METADATA_BYTES:
            _collect(kind, data[position + 8 : end - 4], metadata)
        position = end
    if len(header) < 13:
        return None
    if pixels:  # Pillow does not compare the checksum of image data
        kept += [_CHUNK.pack(sum(map(len, pixels)), b"IDAT"), *map(bytes, pixels), bytes(4), _END]
    orientation = read_orientation(metadata.get("exif") or metadata.get("raw"), metadata.get("xmp"))
    width, height = struct.unpack_from(">II", header)
    return EssentialImage("PNG", b"".join(kept), (width, height), orientation, _BYTES_PER_PIXEL)


def _collect(kind: bytes, content: bytes, metadata: dict[str, bytes]) -> None:
    """Remember the first EXIF data and XMP of a file."""
    if kind == b"eXIf":
        metadata.setdefault("exif", content)
    elif kind == b"iTXt" and content.startswith(_XMP_KEY + b"\0"):  # not compressed
        metadata.setdefault("xmp", content[len(_XMP_KEY) :])
    elif kind in (b"tEXt", b"zTXt") and content.startswith(_RAW_EXIF_KEY) and "raw" not in metadata:
        metadata["raw"] = _raw_profile(content[len(_RAW_EXIF_KEY) :], kind == b"zTXt")


def _raw_profile(text: bytes, compressed: bool) -> bytes:
    """The data of a profile in hexadecimal, below three lines of heading; empty if it is broken."""
    try:
        if compressed:
            text = zlib.decompressobj().decompress(text[1:], _MAX_METADATA_BYTES)
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (ValueError, zlib.error):
        return b""
