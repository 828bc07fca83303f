"""Write the JSON of a whole batch with NumPy, without a step of Python for each number.

Byte for byte what `response.format_json` writes, which is the reference.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from damoyolo.response import format_json
from damoyolo.structures import Detections

Bytes = NDArray[np.uint8]

# Fills the room that a number does not need; ASCII JSON never contains it.
_GAP = b"\0"
_MIN_IMAGES = 3  # fewer are written faster one by one
_MAX_PIXEL = 65_535  # images with larger coordinates are written one by one


def format_json_each(batch: Sequence[Detections], class_names: Sequence[str]) -> list[bytes]:
    """The text of `format_json` for each image of a batch."""
    sizes_hw = [image.image_size_hw for image in batch]
    counts = [len(image) for image in batch]
    if len(batch) < _MIN_IMAGES or not any(counts) or max(map(max, sizes_hw)) > _MAX_PIXEL:
        return [format_json(image, class_names) for image in batch]
    edges = np.array([(width, height, width, height) for height, width in sizes_hw], dtype=np.float32)
    boxes_xyxy = np.nan_to_num(np.concatenate([image.boxes_xyxy for image in batch]))
    rows = _detection_rows(
        np.concatenate([image.class_ids for image in batch]),
        np.concatenate([image.scores for image in batch]),
        np.minimum(np.maximum(boxes_xyxy, np.float32(0)), np.repeat(edges, counts, axis=0)),
        tuple(class_names),
    )
    text = rows.tobytes()
    texts = []
    end = 0
    for (height, width), count in zip(sizes_hw, counts, strict=True):
        start, end = end, end + count * rows.shape[1]
        # Each row ends in a comma; the last one is dropped.
        detections = text[start:end].translate(None, _GAP)[:-1]
        texts.append(b'{"width":%d,"height":%d,"detections":[%b]}' % (width, height, detections))
    return texts


def prepare_tables(class_names: Sequence[str]) -> None:
    """Build the tables that the first batch would otherwise build."""
    _class_texts(tuple(class_names))
    _number_texts()


def _detection_rows(
    class_ids: NDArray[np.int64],
    scores: NDArray[np.float32],
    boxes_xyxy: NDArray[np.float32],
    class_names: tuple[str, ...],
) -> Bytes:
    """(N, row length): the text of each detection and a comma, with gaps.

    A float32 times 100 or a million is exact in float64, so the rounding is that of the number itself.
    """
    hundredths = np.rint(boxes_xyxy.astype(np.float64) * 100).astype(np.uint32)  # N,4
    pixels = hundredths // np.uint32(100)
    hundredths -= pixels * np.uint32(100)
    millionths = np.rint(np.nan_to_num(scores).astype(np.float64) * 1_000_000).astype(np.uint32)  # N
    thousandths = millionths // np.uint32(1000)
    millionths -= thousandths * np.uint32(1000)
    ones = thousandths // np.uint32(1000)
    thousandths -= ones * np.uint32(1000)

    fields: list[bytes | tuple[Bytes, NDArray[np.integer]]] = [
        (_class_texts(class_names), class_ids),
        (_digit_texts(10), ones),
        b".",
        (_digit_texts(1000), thousandths),
        (_digit_texts(1000), millionths),
        b',"bbox":[',
    ]
    for coordinate, separator in enumerate((b",", b",", b",", b"]},")):
        fields += [
            (_number_texts(), pixels[:, coordinate]),
            b".",
            (_digit_texts(100), hundredths[:, coordinate]),
            separator,
        ]
    lengths = [len(field) if isinstance(field, bytes) else field[0].shape[1] for field in fields]
    rows = np.empty((len(class_ids), sum(lengths)), dtype=np.uint8)
    start = 0
    for field, length in zip(fields, lengths, strict=True):
        part = rows[:, start : start + length]
        part[:] = (
            np.frombuffer(field, np.uint8) if isinstance(field, bytes) else field[0].take(field[1], axis=0)
        )
        start += length
    return rows


@functools.lru_cache(maxsize=8)
def _class_texts(class_names: tuple[str, ...]) -> Bytes:
    """(K, length): the start of a detection of each class, up to its score."""
    return _table(
        [
            f'{{"class_id":{class_id},"label":{json.dumps(name)},"score":'
            for class_id, name in enumerate(class_names)
        ]
    )


@functools.cache
def _digit_texts(count: int) -> Bytes:
    """(count, digits): the numbers below `count`, a power of ten, with leading zeros."""
    digits = len(str(count - 1))
    return _table([f"{number:0{digits}d}" for number in range(count)])


@functools.cache
def _number_texts() -> Bytes:
    """(65536, 5): the whole part of a coordinate."""
    return _table([str(number) for number in range(_MAX_PIXEL + 1)])


def _table(texts: Sequence[str]) -> Bytes:
    longest = max(map(len, texts))
    joined = b"".join(text.encode("ascii").ljust(longest, _GAP) for text in texts)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(texts), longest)
