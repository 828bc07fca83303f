"""JPEG: the tables, the frame header and the scans, whose number is bounded."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, ImageTooLargeError
from damoyolo.formats.essential import DECODED_BYTES_PER_PIXEL, EssentialImage, PartCount
from damoyolo.orientation import read_orientation

SIGNATURES = (b"\xff\xd8\xff",)

# Markers that are never part of entropy-coded data; a byte of 0 or a restart marker may follow 0xFF there.
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_MARKER_AFTER_SCAN = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_RESTARTS = range(0xD0, 0xD8)
_START, _END, _SCAN, _QUANTIZATION = 0xD8, 0xD9, 0xDA, 0xDB
_EXIF_OR_XMP = 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))
_ARITHMETIC = range(0xC9, 0xD0)
_TABLES = frozenset((0xC4, 0xCC, _QUANTIZATION, 0xDC, 0xDD))  # Huffman, arithmetic, ..., lines, restarts
_COLOUR_HINTS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}  # libjpeg finds the colour space by them
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
# An arithmetic decoder has work for every coefficient, even of a scan without data (measured: 8 times).
_ARITHMETIC_WEIGHT = 8
_TABLE_BYTES = 65
_TABLE_WEIGHT = 8  # Pillow unpacks quantization tables in Python


def reduce_jpeg(data: bytes, config: ServingConfig, parts: PartCount) -> EssentialImage | None:
    """The first image without application data and comments; None if no frame header comes before a scan.

    Raises:
        CorruptImageError: more than one frame header.
        ImageTooLargeError: more parts, or pixels times scans, than the settings allow.
    """
    kept: list[bytes | memoryview] = [data[:2]]
    exif: list[bytes] = []
    xmp: bytes | None = None
    frame = b""
    scans = 1
    frame_marker = 0
    for marker, start, end in _segments(data, parts):
        content = data[start + 4 : end]
        if marker in _FRAMES:
            if frame:
                raise CorruptImageError("the JPEG has two frame headers")
            frame_marker, frame = marker, content
        elif marker == _QUANTIZATION:
            parts.add(_TABLE_WEIGHT * (len(content) // _TABLE_BYTES))
        elif marker == _EXIF_OR_XMP:
            if content.startswith(b"Exif\0\0"):
                exif.append(content[6:])
            elif content.startswith(_XMP):
                xmp = content[len(_XMP) :]
        if marker == _SCAN:
            kept.append(memoryview(data)[start:])
            if frame_marker not in _SEQUENTIAL or content[:1] != frame[5:6]:
                scans = _count_scans(data, end, parts)
            break
        if marker in _FRAMES or marker in _TABLES or _is_colour_hint(marker, content):
            kept.append(data[start:end])
    if len(frame) < 6:
        return None
    height, width = struct.unpack_from(">HH", frame, 1)
    _require_scans(scans, frame_marker, width * height, config)
    coefficients = 0 if scans == 1 and frame_marker in _SEQUENTIAL else 2 * frame[5]  # bytes per pixel
    return EssentialImage(
        "JPEG",
        b"".join(kept),
        (width, height),
        read_orientation(b"".join(exif[:16]) if exif else None, xmp),
        DECODED_BYTES_PER_PIXEL + coefficients,
    )


def _is_colour_hint(marker: int, content: bytes) -> bool:
    return marker in _COLOUR_HINTS and content.startswith(_COLOUR_HINTS[marker])


def _segments(data: bytes, parts: PartCount) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan header, or to what ends the file."""
    position = 2
    while (found := _MARKER.search(data, position)) is not None:
        parts.add()
        marker = found[1][0]
        start = found.start()
        if marker in _RESTARTS:
            position = start + 2
            continue
        if marker < 0xC0 or marker in (_START, _END) or len(data) < start + 4:
            return
        position = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        yield marker, start, position


def _count_scans(data: bytes, position: int, parts: PartCount) -> int:
    """Scans up to the end of the image; `position` is in the data of the first."""
    scans = 1
    while (found := _MARKER_AFTER_SCAN.search(data, position)) is not None:
        parts.add()
        marker = found[1][0]
        start = found.start()
        if marker == _END:
            break
        scans += marker == _SCAN
        length = 0 if marker == _START else int.from_bytes(data[start + 2 : start + 4], "big")
        position = start + 2 + length
    return scans


def _require_scans(scans: int, frame_marker: int, pixels: int, config: ServingConfig) -> None:
    weight = _ARITHMETIC_WEIGHT if frame_marker in _ARITHMETIC else 1
    work = scans * weight * pixels
    if scans * weight > 1 and work > config.max_jpeg_scan_pixels:
        coding = f" of {weight} times the work (arithmetic coding)" if weight > 1 else ""
        raise ImageTooLargeError(
            f"the JPEG has {scans} scans{coding} over {pixels} pixels = {work}; at most "
            f"{config.max_jpeg_scan_pixels} are accepted (server setting max_jpeg_scan_pixels)"
        )
