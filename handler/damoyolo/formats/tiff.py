"""TIFF: the first directory, reduced to the tags that say how the pixels are stored.

The new directory is appended to the data, so that every offset in it stays valid.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, ImageTooLargeError, UnsupportedImageError
from damoyolo.formats.essential import EssentialImage, PartCount
from damoyolo.orientation import valid_orientation

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0")  # the last is BigTIFF

_WIDTH, _LENGTH, _COMPRESSION, _ORIENTATION = 256, 257, 259, 274
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_SAMPLES, _PLANES = 277, 284
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_PART_TAGS = (_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES)
_JPEGS = (6, 7)
_UNCOMPRESSED = 1
_WEBP = 50001  # every strip may hold 65,536 groups of codes, half a second of work; hardly any file has them
_TILE_BYTES_PER_PIXEL = 8  # four samples of 16 bits
_BYTES_PER_PIXEL = 24  # the strip or tile, of up to 8 bytes per pixel, besides Pillow's image

# Tag -> most values. Bits, compression, colour and fill order; samples; predictor, fax options; colour map;
# extra samples, sample format; JPEG tables; JPEG as of TIFF 6.0; Y'CbCr.
_MAX_VALUES = {
    **dict.fromkeys((_WIDTH, _LENGTH, _COMPRESSION, 262, 266, _SAMPLES, _ROWS_PER_STRIP, _PLANES), 1),
    **dict.fromkeys((292, 293, 317, _TILE_WIDTH, _TILE_LENGTH, 332, 334), 1),
    **dict.fromkeys((258, 338, 339, 529, 530, 531, 532), 16),
    **dict.fromkeys((512, 513, 514, 515, 517, 518, 519, 520, 521), 16),
    320: 3 * 65536,
    347: 65536,
}
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8"}


class _Layout(NamedTuple):
    """Byte order and field sizes of a file."""

    order: str
    entries: str  # their number
    entry: str  # tag, type, number of values, value or its offset
    offset: str  # of a directory
    inline_bytes: int


class _Entry(NamedTuple):
    tag: int
    kind: int
    values: int
    raw: bytes


def reduce_tiff(data: bytes, config: ServingConfig, parts: PartCount) -> EssentialImage | None:
    """The first page without metadata; None without a size.

    Raises:
        ImageTooLargeError: more entries, strips or tiles, larger tiles, or more JPEG scans than allowed.
        UnsupportedImageError: compressed as WebP.
        CorruptImageError: a tag with more values than it can have, or strips that overlap.
    """
    layout = _layout(data)
    entries = _read_entries(data, layout, parts)
    tags = {tag: _integers(data, layout, entry) for tag, entry in entries.items() if tag not in (320, 347)}
    width, height = _first(tags, _WIDTH, 0), _first(tags, _LENGTH, 0)
    if not width or not height:
        return None
    orientation = valid_orientation(_first(tags, _ORIENTATION, 1))
    tile_bytes = 0
    if width * height <= config.max_image_pixels:  # else refused by the caller
        tile_bytes = _require_bounded_work(data, tags, (width, height), config, parts)
    entries.pop(_ORIENTATION, None)
    reduced = _with_directory(data, layout, entries)
    return EssentialImage("TIFF", reduced, (width, height), orientation, _BYTES_PER_PIXEL, tile_bytes)


def _layout(data: bytes) -> _Layout:
    order = "<" if data[:1] == b"I" else ">"
    if data[2:3] == b"+":
        return _Layout(order, order + "Q", order + "HHQ8s", order + "Q", 8)
    return _Layout(order, order + "H", order + "HHI4s", order + "I", 4)


def _read_entries(data: bytes, layout: _Layout, parts: PartCount) -> dict[int, _Entry]:
    """The entries that are kept, each tag once; those of a directory that ends early as far as they go."""
    kept: dict[int, _Entry] = {}
    try:
        (first,) = struct.unpack_from(layout.offset, data, layout.inline_bytes)
        (count,) = struct.unpack_from(layout.entries, data, first)
    except (struct.error, OverflowError):
        return kept
    parts.add(count)
    start = first + struct.calcsize(layout.entries)
    size = struct.calcsize(layout.entry)
    table = data[start : start + count * size]
    for fields in struct.iter_unpack(layout.entry, table[: len(table) // size * size]):
        entry = _Entry(*fields)
        known = entry.tag in _MAX_VALUES or entry.tag in _PART_TAGS or entry.tag == _ORIENTATION
        if not known or entry.tag in kept or entry.kind not in _TYPE_BYTES:
            continue
        if entry.tag in _PART_TAGS:
            parts.require(entry.values)
        elif entry.values > _MAX_VALUES.get(entry.tag, 1):
            raise CorruptImageError(f"TIFF tag {entry.tag} has {entry.values} values, which is too many")
        kept[entry.tag] = entry
    return kept


def _integers(data: bytes, layout: _Layout, entry: _Entry) -> NDArray[np.uint64]:
    """The values of an entry; none if they are no integers or lie outside of the file."""
    kind = _INTEGERS.get(entry.kind)
    if kind is None:
        return np.empty(0, np.uint64)
    size = entry.values * _TYPE_BYTES[entry.kind]
    raw = entry.raw
    if size > layout.inline_bytes:
        (offset,) = struct.unpack(layout.offset, entry.raw)
        raw = data[offset : offset + size]
    if len(raw) < size:
        return np.empty(0, np.uint64)
    return np.frombuffer(raw[:size], layout.order + kind).astype(np.uint64)


def _first(tags: Mapping[int, NDArray[np.uint64]], tag: int, default: int) -> int:
    values = tags.get(tag)
    return default if values is None or not len(values) else int(values[0])


def _require_bounded_work(
    data: bytes,
    tags: Mapping[int, NDArray[np.uint64]],
    size_wh: tuple[int, int],
    config: ServingConfig,
    parts: PartCount,
) -> int:
    """Bound what is decoded by the image, whatever the strips or tiles claim; the bytes of a decoded tile."""
    width, height = size_wh
    planes = _first(tags, _SAMPLES, 1) if _first(tags, _PLANES, 1) == 2 else 1
    tiled = _STRIP_OFFSETS not in tags or _TILE_WIDTH in tags
    unit_width = max(1, _first(tags, _TILE_WIDTH, width)) if tiled else width
    unit_height = _first(tags, _TILE_LENGTH, height) if tiled else _first(tags, _ROWS_PER_STRIP, height)
    unit_height = max(1, unit_height if tiled else min(unit_height, height))
    columns, rows = -(-width // unit_width), -(-height // unit_height)
    parts.add(columns * rows * planes)
    stored = columns * rows * unit_width * unit_height
    if stored > 2 * config.max_image_pixels:
        raise ImageTooLargeError(
            f"the tiles of the TIFF have {stored} pixels for an image of {width} x {height}; at most "
            f"{2 * config.max_image_pixels} are accepted (twice the server setting max_image_pixels)"
        )
    # A strip is at most as large as the image, whose bytes per pixel include it.
    tile_bytes = unit_width * unit_height * _TILE_BYTES_PER_PIXEL if tiled else 0
    compression = _first(tags, _COMPRESSION, _UNCOMPRESSED)
    if compression == _UNCOMPRESSED:
        return tile_bytes
    if compression == _WEBP:
        raise UnsupportedImageError("the TIFF is compressed as WebP, which is not accepted")
    sizes = tags.get(_TILE_BYTES if tiled else _STRIP_BYTES)
    if columns * rows * planes > 1 and (sizes is None or not len(sizes)):
        raise CorruptImageError("the TIFF does not say how long its compressed strips or tiles are")
    # A float cannot overflow, and its rounding does not matter here.
    if sizes is not None and float(sizes.sum(dtype=np.float64)) > 2 * len(data):
        raise CorruptImageError("the strips or tiles of the TIFF have more bytes than its file: they overlap")
    if compression in _JPEGS:
        _require_jpeg_scans(data, columns * rows * planes, unit_width * unit_height, config)
    return tile_bytes


def _require_jpeg_scans(data: bytes, units: int, unit_pixels: int, config: ServingConfig) -> None:
    """Every strip or tile is a JPEG, of one scan in ordinary files."""
    further = max(0, data.count(b"\xff\xda") - units)
    if further * unit_pixels > config.max_jpeg_scan_pixels:
        raise ImageTooLargeError(
            f"the TIFF has {further} further JPEG scans over up to {unit_pixels} pixels; at most "
            f"{config.max_jpeg_scan_pixels} in all are accepted (server setting max_jpeg_scan_pixels)"
        )


def _with_directory(data: bytes, layout: _Layout, entries: Mapping[int, _Entry]) -> bytes:
    """The data with a directory of these entries at the end, which is the only one."""
    place = len(data) + (len(data) & 1)
    table = b"".join(struct.pack(layout.entry, *entries[tag]) for tag in sorted(entries))
    directory = struct.pack(layout.entries, len(entries)) + table + bytes(layout.inline_bytes)
    head = layout.inline_bytes  # the offset of the directory follows as many bytes as it has
    first = struct.pack(layout.offset, place)
    return b"".join((data[:head], first, data[head + len(first) :], bytes(len(data) & 1), directory))
