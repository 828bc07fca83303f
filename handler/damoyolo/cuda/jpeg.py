"""Decode JPEGs with nvJPEG, and tell from the header which ones it decodes like Pillow."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import ExifTags
from torch import Tensor
from torchvision.io import ImageReadMode  # importing it registers the operator used below

from damoyolo.formats import EncodedImage
from damoyolo.orientation import shown_size_hw, valid_orientation

_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
_BASELINE_FRAME = 0xC0
_HUFFMAN_TABLES = 0xC4
_START_OF_SCAN = 0xDA
_QUANTIZATION_TABLES = 0xDB
_EXIF_OR_XMP = 0xE1
_ADOBE = 0xEE
_REQUIRED = frozenset((_BASELINE_FRAME, _HUFFMAN_TABLES, _QUANTIZATION_TABLES, _START_OF_SCAN))
# Restart interval, other application data, comment: nothing in them changes how pixels are decoded.
_HARMLESS = frozenset((0xDD, 0xE0, *range(0xE2, 0xEE), 0xEF, 0xFE))
_ACCEPTED = _REQUIRED | _HARMLESS | {_EXIF_OR_XMP, _ADOBE}
# Bytes of padding tolerated after the end of the image.
_MAX_PADDING = 32
# Bounds the work on a header of nothing but tiny segments.
_MAX_SEGMENTS = 100

_SEGMENT = struct.Struct(">BBH")  # 0xFF, marker, length including these two bytes
_FRAME = struct.Struct(">BHHB")  # bits per sample, height, width, components
# Number and sampling factors (horizontal, vertical) of Y, Cb and Cr in 4:4:4, 4:2:2 and 4:2:0.
_COLOUR_LAYOUTS = frozenset((1, luma, 2, 0x11, 3, 0x11) for luma in (0x11, 0x21, 0x22))
_GREY_SAMPLING = 0x11
_ORIENTATION = int(ExifTags.Base.Orientation)
_SHORT = 3  # EXIF's type of 16-bit integers

_Segments = dict[int, list[memoryview]]  # marker -> contents of its segments


class JpegHeader(NamedTuple):
    """Size in pixels as stored, and EXIF orientation 1..8."""

    height: int
    width: int
    orientation: int

    @property
    def shown_size_hw(self) -> tuple[int, int]:
        """Height and width as a viewer shows it."""
        return shown_size_hw(self.height, self.width, self.orientation)


class _NotPlainError(Exception):
    """The header is unusual or broken."""


def read_plain_jpeg_header(encoded: EncodedImage) -> JpegHeader | None:
    """The header of a JPEG that nvJPEG surely decodes to the image that Pillow shows; None for all else.

    Accepted: baseline, Huffman-coded, 8 bits, one interleaved scan, grey or Y'CbCr in 4:4:4, 4:2:2 or 4:2:0,
    complete to its end marker, nothing unusual between the segments. Never raises, whatever the bytes.
    """
    try:
        segments = _read_segments(memoryview(encoded).cast("B"))
        height, width = _read_size_hw(segments)
        return JpegHeader(height, width, _read_orientation(segments[_EXIF_OR_XMP]))
    # The data end early, or (TypeError) are a memoryview with gaps.
    except (_NotPlainError, struct.error, IndexError, TypeError):
        return None


def _read_segments(data: memoryview) -> _Segments:
    """The segments up to the start of the scan, all of known kinds."""
    _require(bytes(data[:2]) == _START_OF_IMAGE and _END_OF_IMAGE in bytes(data[-_MAX_PADDING:]))
    segments: _Segments = defaultdict(list)
    position = 2
    for _ in range(_MAX_SEGMENTS):
        prefix, marker, length = _SEGMENT.unpack_from(data, position)
        if prefix != 0xFF or length < 2 or marker not in _ACCEPTED:
            break
        end = position + 2 + length
        segments[marker].append(data[position + 4 : end])
        position = end
        if marker == _START_OF_SCAN:
            _require(segments.keys() >= _REQUIRED)
            _require(not _has_scan_marker(data[end:]))
            return segments
    raise _NotPlainError


def _has_scan_marker(data: memoryview) -> bool:
    """Whether a further scan follows, which would cost time; entropy-coded data never look like one.

    NumPy takes a quarter of the time of a search in bytes (32 KB: 7 us against 28), as 0xFF is frequent.
    """
    values = np.frombuffer(data, np.uint8)
    return bool(((values[:-1] == 0xFF) & (values[1:] == _START_OF_SCAN)).any())


def _read_size_hw(segments: _Segments) -> tuple[int, int]:
    # A second frame could smuggle in another size.
    _require(len(segments[_BASELINE_FRAME]) == 1)
    (frame,) = segments[_BASELINE_FRAME]
    bits, height, width, components = _FRAME.unpack_from(frame)
    _require(bits == 8 and height > 0 and width > 0)
    layout = frame[_FRAME.size :]
    if components == 1:
        _require(len(layout) == 3 and layout[1] == _GREY_SAMPLING)
    else:
        _require(components == 3 and len(layout) == 9)
        _require((*layout[0:2], *layout[3:5], *layout[6:8]) in _COLOUR_LAYOUTS)
        # Any other transform says that the components are stored as R, G, B.
        _require(all(adobe[11] == 1 for adobe in segments[_ADOBE] if bytes(adobe[:5]) == b"Adobe"))
    _require(segments[_START_OF_SCAN][0][0] == components)  # one scan holds them all
    return height, width


def _read_orientation(app1_segments: Sequence[memoryview]) -> int:
    if not app1_segments:
        return 1
    exif: list[bytes] = []
    xmp: list[bytes] = []
    for content in map(bytes, app1_segments):
        (exif if content.startswith(b"Exif\0\0") else xmp).append(content)
    _require(len(exif) <= 1)  # Pillow joins several such segments
    value = _read_exif_orientation(exif[0][6:]) if exif else 0
    # Without a value in EXIF, Pillow takes the one in XMP.
    _require(value != 0 or not any(b"Orientation" in content for content in xmp))
    return valid_orientation(value)


def _read_exif_orientation(tiff: bytes) -> int:
    """Orientation of the main image in EXIF data; 0 if there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise _NotPlainError
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    table = tiff[directory + 2 : directory + 2 + 12 * entries]
    _require(len(table) == 12 * entries)
    found = [entry for entry in struct.iter_unpack(order + "HHIHxx", table) if entry[0] == _ORIENTATION]
    if not found:
        return 0
    (_, kind, count, value), *others = found
    _require(kind == _SHORT and count == 1 and not others)
    return int(value)


def _require(condition: bool) -> None:
    if not condition:
        raise _NotPlainError


def decode_jpegs(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs with nvJPEG, in hardware where there is some; returns when all are decoded.

    encoded: bytes of each image, uint8 on the CPU.

    Returns:
        (3, h, w) uint8 R, G, B on the device for each, in memory of the current stream.

    Raises:
        RuntimeError: one of them cannot be decoded; it does not say which.
    """
    # This is torchvision.io.decode_jpeg without its warning at each call (since 0.29).
    return cast(list[Tensor], torch.ops.image.decode_jpegs_cuda(encoded, ImageReadMode.RGB.value, device))
