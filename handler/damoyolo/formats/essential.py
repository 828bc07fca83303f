"""The result of reducing an image file, and the limits that all formats share."""

from __future__ import annotations

from typing import NamedTuple

from damoyolo.config import ServingConfig
from damoyolo.errors import ImageTooLargeError
from damoyolo.orientation import shown_size_hw

# Pillow stores 4 bytes per pixel and as many for the converted image; an array and the copy that is resized
# take 3 each.
DECODED_BYTES_PER_PIXEL = 14


class EssentialImage(NamedTuple):
    """The parts of a file that decoding its first frame needs.

    image_format: as Pillow names it.
    data: a complete file without metadata.
    size_wh: width and height as stored, before the orientation is applied.
    orientation: EXIF orientation 1..8, from EXIF or XMP.
    bytes_per_pixel, fixed_bytes: most memory that decoding takes, for each pixel and besides.
    """

    image_format: str
    data: bytes
    size_wh: tuple[int, int]
    orientation: int = 1
    bytes_per_pixel: int = DECODED_BYTES_PER_PIXEL
    fixed_bytes: int = 0

    @property
    def pixels(self) -> int:
        return self.size_wh[0] * self.size_wh[1]

    @property
    def shown_size_hw(self) -> tuple[int, int]:
        """Height and width as a viewer shows it."""
        width, height = self.size_wh
        return shown_size_hw(height, width, self.orientation)

    @property
    def decoding_bytes(self) -> int:
        """Most memory that decoding and resizing take."""
        return self.pixels * self.bytes_per_pixel + self.fixed_bytes


class PartCount:
    """Counts the parts of one file: segments, chunks, blocks, directory entries, strips, tiles."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def add(self, parts: int = 1) -> None:
        """Count further parts.

        Raises:
            ImageTooLargeError: there are too many.
        """
        self._count += parts
        self.require(self._count)

    def require(self, parts: int) -> None:
        """Refuse what has more parts than are accepted, without counting them.

        Raises:
            ImageTooLargeError: there are too many.
        """
        if parts > self._limit:
            raise ImageTooLargeError(
                f"the file of the image has more than {self._limit} parts (segments, chunks, blocks, strips, "
                "directory entries) that precede or make up its first frame; no more are accepted "
                "(server setting max_image_parts)"
            )


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


def require_size(size_wh: tuple[int, int], config: ServingConfig) -> None:
    """Refuse an image with too many pixels or too long a side.

    Raises:
        ImageTooLargeError: names the size and the setting.
    """
    width, height = size_wh
    if width * height > config.max_image_pixels:
        raise ImageTooLargeError(
            f"the image has {width} x {height} = {width * height} pixels; "
            f"at most {config.max_image_pixels} are accepted (server setting max_image_pixels)"
        )
    if max(width, height) > config.max_image_side:
        raise ImageTooLargeError(
            f"the image is {width} x {height} pixels; sides up to {config.max_image_side} are accepted "
            "(server setting max_image_side)"
        )
