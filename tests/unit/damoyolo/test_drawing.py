"""Images with boxes and labels: exact edges, labels that can be read, colours by class."""

import io

import numpy as np
import pytest
from PIL import Image

from damoyolo.drawing import class_colour_rgb, draw_detections
from damoyolo.errors import ImageTooLargeError
from damoyolo.label_text import LabelWriter, text_colour_rgb
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
def test_a_label_at_the_edge_is_whole_and_its_letters_stand_out(drawn_labels, box):
    drawn = decode(draw_detections(GREY, make_detections([box], [0]), CLASS_NAMES, "png", 90))
    ((x1, y1, x2, y2),) = drawn_labels
    bar = drawn[y1:y2, x1:x2]
    assert bar.shape == (y2 - y1, x2 - x1, 3)  # inside the image
    rim = np.concatenate([bar[1, 1:-1], bar[-2, 1:-1], bar[1:-1, 1], bar[1:-1, -2]])
    assert (rim == class_colour_rgb(0)).all()  # no letter reaches the border
    assert (bar[[0, -1]] == text_colour_rgb(class_colour_rgb(0))).all()
    letters = np.abs(bar[1:-1, 1:-1].astype(int) - class_colour_rgb(0)).max(axis=-1) > 100
    assert 40 < letters.sum() < letters.size / 2


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


def test_the_detections_are_not_changed():
    detections = make_detections([[-5, -5, 500, 500]])
    draw_detections(GREY, detections, CLASS_NAMES, "png", 90)
    assert detections.boxes_xyxy.tolist() == [[-5, -5, 500, 500]]


# ---------------------------------------------------------------------------------------------- labels


@pytest.fixture
def drawn_labels(monkeypatch):
    """The bar of each label as x1, y1, x2, y2, in the order of drawing: the best detection last."""
    drawn = []
    write = LabelWriter.write

    def record(writer, draw, corner_xy, name, score, bar_rgb):
        (x, y), (width, height) = corner_xy, writer.bar_size_wh(name, score)
        drawn.append((x, y, x + width, y + height))
        write(writer, draw, corner_xy, name, score, bar_rgb)

    monkeypatch.setattr(LabelWriter, "write", record)
    return drawn


def test_labels_of_equal_boxes_do_not_hide_each_other(drawn_labels):
    image = np.zeros((240, 320, 3), np.uint8)
    detections = make_detections([[100, 80, 200, 160]] * 6, image_size_hw=(240, 320))
    draw_detections(image, detections, CLASS_NAMES, "jpeg", 90)
    assert len(drawn_labels) == 6
    for index, (x1, y1, x2, y2) in enumerate(drawn_labels):
        for left, top, right, bottom in drawn_labels[:index]:
            assert x2 <= left or right <= x1 or y2 <= top or bottom <= y1


def test_the_label_of_the_better_detection_is_on_top_where_both_have_no_room(drawn_labels):
    size_hw = (14, 60)  # room for one bar
    detections = make_detections([[0, 0, 60, 14]] * 2, [0, 1], [0.5, 0.5], image_size_hw=size_hw)
    image = np.zeros((*size_hw, 3), np.uint8)
    both = decode(draw_detections(image, detections, ["cell", "cell"], "png", 90))
    only_first = make_detections([[0, 0, 60, 14]], [0], [0.5], image_size_hw=size_hw)
    first = decode(draw_detections(image, only_first, ["cell"], "png", 90))
    lower, upper, alone = drawn_labels
    assert upper == alone
    assert max(lower[0], upper[0]) < min(lower[2], upper[2])  # they do overlap
    x1, y1, x2, y2 = upper
    assert (both[y1:y2, x1:x2] == first[y1:y2, x1:x2]).all()


def test_a_thousand_detections_are_drawn_alike_every_time():
    random = np.random.default_rng(0)
    corners = random.random((1000, 2)) * (600, 440)
    boxes = np.concatenate([corners, corners + 5 + 35 * random.random((1000, 2))], axis=1)
    detections = make_detections(boxes, random.integers(0, 3, 1000), image_size_hw=(480, 640))
    image = make_pixels(480, 640)
    first, second = (draw_detections(image, detections, CLASS_NAMES, "jpeg", 90) for _ in range(2))
    assert first == second


# ---------------------------------------------------------------------------------------------- colours


def test_classes_have_the_colours_of_the_settings_in_order_and_again_from_the_start():
    colours = ("#12ab34", "#FFFFFF")
    boxes = [[10, 20, 40, 50], [60, 20, 90, 50], [110, 20, 140, 50]]
    detections = make_detections(boxes, [0, 1, 2])
    encoded = draw_detections(GREY, detections, CLASS_NAMES, "png", 90, class_colours=colours)
    drawn = decode(encoded)
    assert drawn[40, [10, 60, 110]].tolist() == [[0x12, 0xAB, 0x34], [255, 255, 255], [0x12, 0xAB, 0x34]]


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
