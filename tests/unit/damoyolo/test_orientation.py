"""Each EXIF orientation, against the definition of the tag and in every form that the package uses."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from damoyolo.orientation import (
    OrientedImage,
    locate_pixels,
    pillow_transposition,
    read_orientation,
    shown_pixels,
    valid_orientation,
)
from doubles.images import exif, make_pixels

# Stored pixels -> what a viewer shows, from the definition of the EXIF tag.
VIEWS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


def planar(pixels):
    """The same image as three planes in memory."""
    return pixels.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def cut_from_a_larger_one(pixels):
    """The same image with gaps between its rows and pixels."""
    return F.pad(pixels, (0, 1, 1, 4, 2, 1), value=77)[2:-1, 1:-4, :3]


@pytest.mark.parametrize("orientation", VIEWS)
def test_torch_and_pillow_show_what_the_standard_says(orientation):
    stored = make_pixels(3, 5)
    shown = VIEWS[orientation](stored)
    image = OrientedImage(torch.from_numpy(stored), orientation)
    np.testing.assert_array_equal(shown_pixels(image).numpy(), shown)
    assert image.oriented_size_hw == shown.shape[:2]
    transposition = pillow_transposition(orientation)
    assert (transposition is None) == (orientation == 1)
    if transposition is not None:
        np.testing.assert_array_equal(np.asarray(Image.fromarray(stored).transpose(transposition)), shown)


@pytest.mark.parametrize("lay_out", [Tensor.clone, planar, cut_from_a_larger_one])
@pytest.mark.parametrize("orientation", VIEWS)
def test_the_located_pixels_are_the_shown_ones(orientation, lay_out):
    image = OrientedImage(lay_out(torch.from_numpy(make_pixels(3, 5))), orientation)
    table = locate_pixels(image)
    assert (table.height, table.width) == image.oriented_size_hw
    memory = image.pixels.untyped_storage()
    first = table.address - memory.data_ptr()
    found = [
        [
            [
                memory[first + y * table.row_stride + x * table.column_stride + c * table.channel_stride]
                for c in range(3)
            ]
            for x in range(table.width)
        ]
        for y in range(table.height)
    ]
    assert found == shown_pixels(image).tolist()


@pytest.mark.parametrize("value", [0, 9, 65535, -1, None, "6", 6.5])
def test_a_value_that_is_not_defined_is_upright(value):
    assert valid_orientation(value) == 1
    assert [valid_orientation(defined) for defined in VIEWS] == list(VIEWS)


XMP = b'<rdf:Description tiff:Orientation="8"/>'


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("heading", [b"", b"Exif\0\0", b"Exif\0\0Exif\0\0"])
def test_the_orientation_is_read_from_exif_data(byte_order, heading):
    data = exif(6, byte_order).removeprefix(b"Exif\0\0")
    assert read_orientation(heading + data, XMP) == 6
    assert (
        read_orientation(heading + data.replace(b"\x12\1", b"\x13\1").replace(b"\1\x12", b"\1\x13"), XMP) == 8
    )


@pytest.mark.parametrize("data", [None, b"", b"Exif\0\0", b"II*\0", b"II*\0\xff\xff\xff\xff", b"garbage" * 9])
def test_without_exif_data_the_orientation_of_xmp_counts(data):
    assert read_orientation(data, XMP) == 8
    assert read_orientation(data, b"<tiff:Orientation>3</tiff:Orientation>") == 3
    assert read_orientation(data, b'tiff:Orientation="9"') == 1
    assert read_orientation(data, None) == 1


def test_the_end_of_exif_data_that_stop_early_is_not_needed():
    whole = exif(6)
    assert [read_orientation(whole[:length], None) for length in range(len(whole))][-4:] == [6] * 4
