"""Resizing of a whole batch of decoded images into the network's input, EXIF orientation included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from damoyolo.cuda.kernels import triton_is_installed

# What a viewer does to the stored image for an EXIF orientation (EXIF 2.32, tag 0x0112): reverse the rows,
# reverse the columns, then exchange rows and columns.
_ROWS_REVERSED = frozenset((3, 4, 6, 7))
_COLUMNS_REVERSED = frozenset((2, 3, 7, 8))
_TRANSPOSED = frozenset((5, 6, 7, 8))


class OrientedImage(NamedTuple):
    """A decoded image as it lies in the file.

    pixels: (h, w, 3) uint8 R, G, B with any strides, so planes permuted to the end fit too.
    orientation: EXIF orientation, 1..8; 1 is upright.
    """

    pixels: Tensor
    orientation: int = 1

    @property
    def oriented_size_hw(self) -> tuple[int, int]:
        """Height and width as a viewer shows it."""
        height, width, _ = self.pixels.shape
        return (width, height) if self.orientation in _TRANSPOSED else (height, width)


class PixelTable(NamedTuple):
    """Where to find the shown pixels of an image: channel c of (y, x) is the byte at
    address + y * row_stride + x * column_stride + c * channel_stride; strides may be negative."""

    address: int
    height: int
    width: int
    row_stride: int
    column_stride: int
    channel_stride: int


def resize_images(images: Sequence[OrientedImage], out: Tensor) -> None:
    """Resize every image to the size of `out`, as a viewer shows it; a device is not waited for.

    Bilinear, half-pixel centres, edges clamped, no antialiasing, aspect ratio not kept, rounded to the
    nearest grey level; an image of the same size is copied exactly.

    images: B images of any sizes on the device of `out`; they must stay alive until the current stream
        has passed this point, which the caching allocator sees to for memory of that stream only.
    out: (B, H, W, 3) uint8, contiguous; overwritten.
    """
    if not images:
        return
    if out.is_cuda and triton_is_installed():
        from damoyolo.cuda.kernels import resize_triton

        resize_triton.resize_images([locate_pixels(image) for image in images], out)
    else:
        resize_images_reference(images, out)


def resize_images_reference(images: Sequence[OrientedImage], out: Tensor) -> None:
    """The same in plain torch, image by image; the kernel stays within one grey level of it."""
    for image, target in zip(images, out, strict=True):
        source = shown_pixels(image)
        if source.shape == target.shape:
            target.copy_(source)
            continue
        levels = F.interpolate(
            source.permute(2, 0, 1)[None].float(),  # (h, w, 3) -> (1, 3, h, w)
            size=(target.shape[0], target.shape[1]),
            mode="bilinear",
            align_corners=False,
        )
        target.copy_(levels[0].round_().permute(1, 2, 0))  # (1, 3, H, W) -> (H, W, 3)


def shown_pixels(image: OrientedImage) -> Tensor:
    """(h, w, 3) as a viewer shows it; the image's own memory where orientation allows."""
    pixels, orientation = image
    reversed_axes = [
        axis for axis, reverse in enumerate((_ROWS_REVERSED, _COLUMNS_REVERSED)) if orientation in reverse
    ]
    if reversed_axes:
        pixels = pixels.flip(reversed_axes)
    return pixels.transpose(0, 1) if orientation in _TRANSPOSED else pixels


def locate_pixels(image: OrientedImage) -> PixelTable:
    """Addresses that show the image upright without moving a byte."""
    pixels, orientation = image
    height, width, _ = pixels.shape
    row_stride, column_stride, channel_stride = pixels.stride()
    address = pixels.data_ptr()
    if orientation in _ROWS_REVERSED:
        address += (height - 1) * row_stride
        row_stride = -row_stride
    if orientation in _COLUMNS_REVERSED:
        address += (width - 1) * column_stride
        column_stride = -column_stride
    if orientation in _TRANSPOSED:
        height, width = width, height
        row_stride, column_stride = column_stride, row_stride
    return PixelTable(address, height, width, row_stride, column_stride, channel_stride)
