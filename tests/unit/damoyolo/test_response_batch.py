import json

import numpy as np
import pytest

from damoyolo.response import format_json
from damoyolo.response_batch import format_json_each
from damoyolo.structures import Detections

CLASS_NAMES = ("cell", 'a "quoted", name', "Zelle größer 細胞", "")


def random_detections(generator, count, image_size_hw=(480, 640)):
    height, width = image_size_hw
    boxes = generator.uniform(-0.2, 1.2, (count, 4)) * [width, height, width, height]
    return Detections(
        boxes_xyxy=boxes.astype(np.float32),
        scores=generator.random(count, dtype=np.float32),
        class_ids=generator.integers(0, len(CLASS_NAMES), count),
        image_size_hw=image_size_hw,
    )


def one_by_one(batch):
    return [format_json(image, CLASS_NAMES) for image in batch]


@pytest.mark.parametrize("images", [0, 1, 2, 3, 8, 33])
def test_a_batch_is_written_as_its_images_are(images):
    generator = np.random.default_rng(images)
    batch = [random_detections(generator, int(generator.integers(0, 60))) for _ in range(images)]
    texts = format_json_each(batch, CLASS_NAMES)
    assert texts == one_by_one(batch)
    assert all(json.loads(text)["width"] == 640 for text in texts)


def test_images_without_detections_stand_between_others():
    generator = np.random.default_rng(1)
    batch = [random_detections(generator, count) for count in (0, 3, 0, 0, 1, 0)]
    assert format_json_each(batch, CLASS_NAMES) == one_by_one(batch)
    empty = [random_detections(generator, 0) for _ in range(4)]
    assert format_json_each(empty, CLASS_NAMES) == one_by_one(empty)


@pytest.mark.parametrize("side", [1, 32, 65_535, 65_536, 1_000_000])
def test_sides_of_any_length_are_written(side):
    generator = np.random.default_rng(side)
    batch = [random_detections(generator, 20, size) for size in ((side, 50), (50, side), (7, 7))]
    assert format_json_each(batch, CLASS_NAMES) == one_by_one(batch)


def edge_values():
    ties = np.array([0.125, 0.375, 0.5, 1.125, 99.995, 99.999, 639.995, 0.005, 0.004999])
    return np.concatenate([ties, np.nextafter(ties, 0), [0, 640, 1e-9, 639.99997]]).astype(np.float32)


def test_numbers_between_two_decimals_are_rounded_the_same_way():
    values = edge_values()
    scores = np.array([0, 1, 0.5, 0.1234565, 0.9999995, 0.99999994, 5e-7, 1.5e-6, 1e-12], dtype=np.float32)
    count = len(values)
    image = Detections(
        boxes_xyxy=np.repeat(values[:, None], 4, axis=1),
        scores=np.resize(scores, count),
        class_ids=np.arange(count) % len(CLASS_NAMES),
        image_size_hw=(640, 640),
    )
    assert format_json_each([image] * 3, CLASS_NAMES) == one_by_one([image] * 3)


def test_numbers_that_are_not_finite_become_json():
    odd = np.array([np.nan, np.inf, -np.inf, 5.0], dtype=np.float32)
    image = Detections(
        np.tile(odd, (2, 1)), np.array([np.nan, 0.5], np.float32), np.zeros(2, int), (480, 640)
    )
    texts = format_json_each([image] * 3, CLASS_NAMES)
    assert texts == one_by_one([image] * 3)
    json.loads(texts[0])
