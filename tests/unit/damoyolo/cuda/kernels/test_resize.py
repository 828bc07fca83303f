"""Resizing of whole batches: the kernel against `resize_reference`."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from damoyolo.cuda.kernels.resize import resize_images
from damoyolo.orientation import OrientedImage, locate_pixels
from damoyolo.preprocess import resize_reference

SIZES_HW = [(1, 1), (1, 9), (2, 3), (37, 53), (24, 40), (96, 200), (131, 24)]


def noise(height, width, seed=0):
    """(h, w, 3) uint8, interleaved."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def planar(pixels):
    """The same image as three planes in memory."""
    return pixels.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def test_the_reference_runs_on_a_cpu():
    images = [OrientedImage(noise(*size_hw)) for size_hw in SIZES_HW]
    out, expected = torch.zeros(2, len(SIZES_HW), 24, 40, 3, dtype=torch.uint8)
    resize_images(images, out)
    resize_reference(images, expected)
    assert torch.equal(out, expected)
    assert out.any()


def test_no_images_are_no_work():
    resize_images([], torch.empty(0, 24, 40, 3, dtype=torch.uint8))


def cut_from_a_larger_one(pixels):
    """The same image with gaps between its rows and pixels."""
    return F.pad(pixels, (0, 1, 1, 4, 2, 1), value=77)[2:-1, 1:-4, :3]


@pytest.mark.parametrize("lay_out", [Tensor.clone, planar, cut_from_a_larger_one])
def test_the_kernel_stays_within_one_of_the_reference(kernel_device, lay_out):
    images = [
        OrientedImage(lay_out(noise(*size_hw, seed).to(kernel_device)), 1 + seed)
        for seed, size_hw in enumerate(SIZES_HW)
    ]
    out, expected = torch.zeros(2, len(SIZES_HW), 24, 40, 3, dtype=torch.uint8, device=kernel_device)
    run_kernel(images, out)
    resize_reference(images, expected)
    difference = (out.int() - expected.int()).abs()
    assert difference.max() <= 1
    # Only a value of exactly one half may go to the other neighbour.
    assert difference.float().mean() < 0.02


def test_the_kernel_copies_an_image_of_the_same_size_exactly(kernel_device):
    pixels = [noise(24, 40).to(kernel_device), planar(noise(24, 40, 1).to(kernel_device))]
    out = torch.zeros(2, 24, 40, 3, dtype=torch.uint8, device=kernel_device)
    run_kernel([OrientedImage(pixels[0]), OrientedImage(pixels[1], 3)], out)
    assert torch.equal(out[0], pixels[0])
    assert torch.equal(out[1], pixels[1].flip(0, 1))


def test_the_kernel_writes_its_rows_and_no_others(kernel_device):
    out = torch.full((3, 24, 40, 3), 9, dtype=torch.uint8, device=kernel_device)
    run_kernel(
        [OrientedImage(torch.full((50, 60, 3), 200, dtype=torch.uint8, device=kernel_device))], out[1:2]
    )
    assert (out[1] == 200).all()
    assert (out[[0, 2]] == 9).all()


def test_the_kernel_refuses_memory_that_it_would_misread(kernel_device):
    image = OrientedImage(noise(5, 5).to(kernel_device))
    out = torch.zeros(1, 3, 24, 40, dtype=torch.uint8, device=kernel_device)
    with pytest.raises(ValueError, match="do not fit"):
        run_kernel([image], out.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="2 images do not fit"):
        run_kernel([image, image], torch.zeros(1, 24, 40, 3, dtype=torch.uint8, device=kernel_device))


def run_kernel(images, out):
    from damoyolo.cuda.kernels import resize_triton

    resize_triton.resize_images([locate_pixels(image) for image in images], out)
