"""Resizing of whole batches: the kernel against the plain form, and what both must do with an orientation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from damoyolo.cuda.kernels.resize import (
    OrientedImage,
    locate_pixels,
    resize_images,
    resize_images_reference,
    shown_pixels,
)

SIZES_HW = [(1, 1), (1, 9), (2, 3), (37, 53), (24, 40), (96, 200), (131, 24)]


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """(h, w, 3) uint8, interleaved."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def planar(pixels: Tensor) -> Tensor:
    """The same image as three planes in memory."""
    return pixels.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def inside_a_larger_one(pixels: Tensor) -> Tensor:
    """The same image cut from a larger one, so that its rows have gaps."""
    height, width, _ = pixels.shape
    larger = pixels.new_full((height + 3, width + 5, 4), 77)
    larger[2:-1, 1:-4, :3] = pixels
    return larger[2:-1, 1:-4, :3]


@pytest.mark.parametrize("lay_out", [Tensor.clone, planar, inside_a_larger_one])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_located_pixels_are_the_shown_ones(orientation: int, lay_out: object) -> None:
    image = OrientedImage(lay_out(noise(3, 5)), orientation)  # type: ignore[operator]
    shown = shown_pixels(image)
    assert tuple(shown.shape[:2]) == image.oriented_size_hw == ((3, 5) if orientation < 5 else (5, 3))
    table = locate_pixels(image)
    assert (table.height, table.width) == image.oriented_size_hw
    memory = image.pixels.untyped_storage()
    first = table.address - memory.data_ptr()
    found = [
        [
            [memory[first + y * table.row_stride + x * table.column_stride + c * table.channel_stride]]
            for c in range(3)
        ]
        for y in range(table.height)
        for x in range(table.width)
    ]
    assert torch.equal(torch.tensor(found).reshape(shown.shape), shown.long())


def test_on_a_cpu_the_plain_form_answers() -> None:
    images = [OrientedImage(noise(*size_hw)) for size_hw in SIZES_HW]
    out, expected = torch.zeros(2, len(SIZES_HW), 24, 40, 3, dtype=torch.uint8)
    resize_images(images, out)
    resize_images_reference(images, expected)
    assert torch.equal(out, expected)
    assert out.any()


def test_no_images_are_no_work() -> None:
    resize_images([], torch.empty(0, 24, 40, 3, dtype=torch.uint8))


@pytest.mark.parametrize("lay_out", [Tensor.clone, planar, inside_a_larger_one])
def test_the_kernel_stays_within_one_level_of_the_plain_form(
    kernel_device: torch.device, lay_out: object
) -> None:
    images = [
        OrientedImage(lay_out(noise(*size_hw, seed).to(kernel_device)), 1 + seed)  # type: ignore[operator]
        for seed, size_hw in enumerate(SIZES_HW)
    ]
    out, expected = torch.zeros(2, len(SIZES_HW), 24, 40, 3, dtype=torch.uint8, device=kernel_device)
    run_kernel(images, out)
    resize_images_reference(images, expected)
    difference = (out.int() - expected.int()).abs()
    assert difference.max() <= 1
    # Only a value of exactly one half may go to the other neighbour.
    assert difference.float().mean() < 0.02


def test_the_kernel_copies_an_image_of_the_same_size_exactly(kernel_device: torch.device) -> None:
    pixels = [noise(24, 40).to(kernel_device), planar(noise(24, 40, 1).to(kernel_device))]
    out = torch.zeros(2, 24, 40, 3, dtype=torch.uint8, device=kernel_device)
    run_kernel([OrientedImage(pixels[0]), OrientedImage(pixels[1], 3)], out)
    assert torch.equal(out[0], pixels[0])
    assert torch.equal(out[1], pixels[1].flip(0, 1))


def test_the_kernel_writes_its_rows_and_no_others(kernel_device: torch.device) -> None:
    out = torch.full((3, 24, 40, 3), 9, dtype=torch.uint8, device=kernel_device)
    run_kernel(
        [OrientedImage(torch.full((50, 60, 3), 200, dtype=torch.uint8, device=kernel_device))], out[1:2]
    )
    assert (out[1] == 200).all()
    assert (out[[0, 2]] == 9).all()


def test_the_kernel_refuses_memory_that_it_would_misread(kernel_device: torch.device) -> None:
    image = OrientedImage(noise(5, 5).to(kernel_device))
    out = torch.zeros(1, 3, 24, 40, dtype=torch.uint8, device=kernel_device)
    with pytest.raises(ValueError, match="do not fit"):
        run_kernel([image], out.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="2 images do not fit"):
        run_kernel([image, image], torch.zeros(1, 24, 40, 3, dtype=torch.uint8, device=kernel_device))


def run_kernel(images: list[OrientedImage], out: Tensor) -> None:
    from damoyolo.cuda.kernels import resize_triton

    resize_triton.resize_images([locate_pixels(image) for image in images], out)
