"""Images with boxes and labels: exact edges, labels that can be read, colours by class."""

import io

import numpy as np
import pytest
from PIL import Image

from damoyolo.drawing import class_colour_rgb, draw_detections, text_colour_rgb
from damoyolo.errors import ImageTooLargeError
from damoyolo.response import CONTENT_TYPES
from doubles.detections import make_detections
from doubles.images import make_pixels

CLASS_NAMES = ("cell", 'a "quoted", name', "Zelle größer 細胞")
GREY = np.full((120, 200, 3), 128, dtype=np.uint8)


def decode(encoded):
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
def test_a_drawn_image_has_the_format_and_size_asked_for(output_format):
    encoded = draw_detections(GREY, make_detections([[50, 40, 150, 100]]), CLASS_NAMES, output_format, 90)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.format == output_format.upper()
        assert image.size == (200, 120)
        assert Image.MIME[image.format] == CONTENT_TYPES[output_format]


def test_a_box_is_drawn_at_its_edges_and_nowhere_else():
    drawn = decode(draw_detections(GREY, make_detections([[50, 40, 150, 100]], [0]), CLASS_NAMES, "png", 90))
    changed = (drawn != 128).any(axis=-1)
    assert changed[40:101, [50, 150]].all()
    assert changed[[40, 100], 50:151].all()
    assert not changed[45:95, 55:145].any()
    assert not changed[:, 155:].any()
    assert not changed[105:].any()
    assert (drawn[70, 50] == class_colour_rgb(0)).all()
    assert changed[20:40, 50:80].any()  # the label


def test_an_image_without_detections_is_not_changed():
    assert (decode(draw_detections(GREY, make_detections([]), CLASS_NAMES, "png", 90)) == GREY).all()
    assert (GREY == 128).all()


@pytest.mark.parametrize(
    "box", [[0, 0, 200, 120], [150, 0, 200, 10], [199, 119, 200, 120], [-9, -9, 300, 300]]
)
def test_boxes_and_labels_at_the_edge_stay_readable(box):
    drawn = decode(draw_detections(GREY, make_detections([box], [0]), CLASS_NAMES, "png", 90))
    rows, columns = np.nonzero((drawn == class_colour_rgb(0)).all(axis=-1))
    first_row, first_column = rows.min(), columns.min()
    label = drawn[first_row : first_row + 12, first_column : first_column + 50].astype(float)
    assert label.size > 12 * 45 * 3
    luma = label @ (0.299, 0.587, 0.114)
    assert np.ptp(luma) > 100  # letters stand out from the bar
    assert 60 < ((label - class_colour_rgb(0)) != 0).any(axis=-1).sum() < luma.size / 2


@pytest.mark.parametrize("size_hw", [(1, 1), (3, 2), (20, 400), (1500, 30)])
def test_any_size_of_image_can_be_drawn_on(size_hw):
    height, width = size_hw
    detections = make_detections([[0, 0, width, height], [0.4, 0.4, 0.6, 0.6]], [2, 1], image_size_hw=size_hw)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    assert decode(draw_detections(image, detections, CLASS_NAMES, "jpeg", 90)).shape == image.shape


def test_a_read_only_image_is_drawn_on_a_copy():
    image = np.zeros((60, 60, 3), dtype=np.uint8)
    image.flags.writeable = False
    detections = make_detections([[5, 30, 50, 50]], image_size_hw=(60, 60))
    assert decode(draw_detections(image, detections, CLASS_NAMES, "png", 90)).any()
    assert not image.any()


def test_lines_and_labels_grow_with_the_image():
    def changed_share(scale):
        image = np.full((120 * scale, 200 * scale, 3), 128, dtype=np.uint8)
        box = [40 * scale, 60 * scale, 150 * scale, 110 * scale]
        detections = make_detections([box], image_size_hw=image.shape[:2])
        drawn = decode(draw_detections(image, detections, CLASS_NAMES, "png", 90))
        return float((drawn != 128).any(axis=-1).mean())

    assert 0.7 < changed_share(12) / changed_share(6) < 1.4


def test_an_image_too_long_for_jpeg_is_refused_with_a_way_out():
    image = np.zeros((1, 70_000, 3), dtype=np.uint8)
    detections = make_detections([], image_size_hw=(1, 70_000))
    with pytest.raises(ImageTooLargeError, match="json or png"):
        draw_detections(image, detections, CLASS_NAMES, "jpeg", 90)
    assert draw_detections(image, detections, CLASS_NAMES, "png", 90).startswith(b"\x89PNG")


def test_quality_changes_the_size_of_a_jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    detections = make_detections([], image_size_hw=(60, 60))
    sizes = [len(draw_detections(noise, detections, CLASS_NAMES, "jpeg", quality)) for quality in (20, 90)]
    assert sizes[0] < sizes[1]


def test_every_class_keeps_its_own_colour():
    colours = [class_colour_rgb(class_id) for class_id in range(80)]
    assert len(set(colours)) == 80
    neighbours = np.abs(np.diff(np.array(colours), axis=0)).sum(axis=1)
    assert neighbours.min() > 100


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
def test_a_file_that_becomes_too_large_is_not_written_to_its_end(output_format):
    image = make_pixels(200, 300)
    arguments = (image, make_detections([]), CLASS_NAMES, output_format, 90)
    size = len(draw_detections(*arguments))
    assert len(draw_detections(*arguments, size)) == size
    with pytest.raises(ImageTooLargeError, match=f"more than {size - 1} bytes"):
        draw_detections(*arguments, size - 1)
