"""Resize a whole batch of decoded images into the network's input, EXIF orientation included."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from damoyolo.cuda.kernels import triton_is_installed
from damoyolo.orientation import OrientedImage, locate_pixels
from damoyolo.preprocess import resize_reference


def resize_images(images: Sequence[OrientedImage], out: Tensor) -> None:
    """Resize every image to the size of `out`, as a viewer shows it, without waiting for the device.

    Bilinear, half-pixel centres, edges clamped, no antialiasing, aspect ratio not kept, rounded to the
    nearest uint8; an image of the same size is copied exactly. The kernel stays within 1 of
    `preprocess.resize_reference`, which takes its place where it cannot run.

    images: B images of any sizes on the device of `out`; they must stay alive until the current stream
        has passed this point, which the caching allocator ensures for memory of that stream only.
    out: (B, H, W, 3) uint8, contiguous; overwritten.
    """
    if not images:
        return
    if out.is_cuda and triton_is_installed():
        from damoyolo.cuda.kernels import resize_triton

        resize_triton.resize_images([locate_pixels(image) for image in images], out)
    else:
        resize_reference(images, out)
