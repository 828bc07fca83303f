"""Read EXIF orientations; apply them to tensors, Pillow images, and the addresses that a kernel reads."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, NamedTuple

from PIL.Image import Transpose

if TYPE_CHECKING:
    from torch import Tensor


class _View(NamedTuple):
    """How a viewer shows stored pixels.

    reversed_axes: 0 reverses the rows, 1 the columns.
    transposed: rows and columns are exchanged afterwards.
    pillow: the same in one step of Pillow; None for an upright image.
    """

    reversed_axes: tuple[int, ...]
    transposed: bool
    pillow: Transpose | None


_VIEWS = {  # EXIF 2.32, tag 0x0112
    1: _View((), False, None),
    2: _View((1,), False, Transpose.FLIP_LEFT_RIGHT),
    3: _View((0, 1), False, Transpose.ROTATE_180),
    4: _View((0,), False, Transpose.FLIP_TOP_BOTTOM),
    5: _View((), True, Transpose.TRANSPOSE),
    6: _View((0,), True, Transpose.ROTATE_270),
    7: _View((0, 1), True, Transpose.TRANSVERSE),
    8: _View((1,), True, Transpose.ROTATE_90),
}

_ORIENTATION = 0x0112
_INTEGER_OF_TYPE = {3: "H", 4: "I", 8: "h", 9: "i"}  # the integer types of EXIF with more than one byte
_EXIF_HEADING = re.compile(rb"^(Exif\0\0){1,2}")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def valid_orientation(value: object) -> int:
    """The value of an EXIF orientation tag; 1, upright, for one that is not defined, as viewers do."""
    return value if isinstance(value, int) and value in _VIEWS else 1


def read_orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """1..8, from the main directory of EXIF data, else from XMP, else 1. Never raises.

    Only this value is read: libraries that read all of the data can be kept busy for long.

    exif: with or without the heading of six bytes that begins with Exif.
    """
    value = _exif_orientation(exif) if exif else None
    if value is None and xmp and (found := _XMP_ORIENTATION.search(xmp)):
        value = int(found[1])
    return valid_orientation(value)


def _exif_orientation(exif: bytes) -> int | None:
    """The tag of the main directory, as far as the data go; None if there is none."""
    tiff = _EXIF_HEADING.sub(b"", exif)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack(order + "H", tiff[directory : directory + 2].ljust(2, b"\0"))
    table = tiff[directory + 2 : directory + 2 + 12 * entries]
    for tag, kind, count, value in struct.iter_unpack(order + "HHI4s", table[: len(table) // 12 * 12]):
        if tag == _ORIENTATION and kind in _INTEGER_OF_TYPE and count == 1:
            format_char = order + _INTEGER_OF_TYPE[kind]
            return int(struct.unpack_from(format_char, value)[0])
    return None


def shown_size_hw(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Height and width as a viewer shows an image that is stored with this size and orientation 1..8."""
    return (width, height) if _VIEWS[orientation].transposed else (height, width)


def pillow_transposition(orientation: int) -> Transpose | None:
    """What `Image.transpose` takes for an orientation 1..8; None for an upright image."""
    return _VIEWS[orientation].pillow


class OrientedImage(NamedTuple):
    """A decoded image as stored in its file.

    pixels: (h, w, 3) uint8 R, G, B with any strides, so permuted planes fit too.
    orientation: EXIF orientation, 1..8; 1 is upright.
    """

    pixels: Tensor
    orientation: int = 1

    @property
    def oriented_size_hw(self) -> tuple[int, int]:
        """Height and width as a viewer shows it."""
        height, width, _ = self.pixels.shape
        return shown_size_hw(height, width, self.orientation)


class PixelTable(NamedTuple):
    """Where to find the shown pixels of an image: channel c of (y, x) is the byte at
    address + y * row_stride + x * column_stride + c * channel_stride; strides may be negative."""

    address: int
    height: int
    width: int
    row_stride: int
    column_stride: int
    channel_stride: int


def shown_pixels(image: OrientedImage) -> Tensor:
    """(h, w, 3) as a viewer shows it; shares the image's memory unless an axis is reversed."""
    view = _VIEWS[image.orientation]
    pixels = image.pixels.flip(view.reversed_axes) if view.reversed_axes else image.pixels
    return pixels.transpose(0, 1) if view.transposed else pixels


def locate_pixels(image: OrientedImage) -> PixelTable:
    """The addresses that show the image upright without moving a byte."""
    view = _VIEWS[image.orientation]
    *sides, _ = image.pixels.shape  # height, width
    *strides, channel_stride = image.pixels.stride()
    address = image.pixels.data_ptr()
    for axis in view.reversed_axes:
        address += (sides[axis] - 1) * strides[axis]
        strides[axis] = -strides[axis]
    if view.transposed:
        sides.reverse()
        strides.reverse()
    return PixelTable(address, sides[0], sides[1], strides[0], strides[1], channel_stride)
