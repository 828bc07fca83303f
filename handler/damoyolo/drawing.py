"""Draw detections on their image: boxes, and labels that do not hide each other where there is room."""

from __future__ import annotations

import colorsys
import io
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from damoyolo.errors import ImageTooLargeError
from damoyolo.label_layout import place_labels
from damoyolo.label_text import LabelWriter, Rgb
from damoyolo.response import DrawnFormat, answer_too_large, clipped_boxes_xyxy
from damoyolo.structures import Detections

# Memory of `draw_detections` besides the image: the canvas, and at most as much for the encoded image.
DRAWING_BYTES_PER_PIXEL = 8

_GOLDEN_RATIO = 0.618034  # steps of it around the colour circle separate neighbouring classes
_JPEG_MAX_SIDE = 65_500  # pixels; libjpeg's limit


def draw_detections(
    image: NDArray[np.uint8],
    detections: Detections,
    class_names: Sequence[str],
    output_format: DrawnFormat,
    jpeg_quality: int,
    max_bytes: int = sys.maxsize,
    class_colours: Sequence[str] = (),
) -> bytes:
    """The image with boxes and labels, encoded; best detection on top, one colour per class.

    Lines and letters scale with the image. No label is cut off (`LabelWriter`); where not even a score fits
    there is none.

    Args:
        image: (h, w, 3) uint8 R, G, B, the image that `detections` refers to; not changed.
        jpeg_quality: 1..95, for output format "jpeg".
        max_bytes: encoding ends when the file becomes larger: it takes most of the time.
        class_colours: as in `ServingConfig`.

    Raises:
        ImageTooLargeError: a side is longer than JPEG can hold, or the file has more than `max_bytes`.
    """
    height, width = image.shape[:2]
    if output_format == "jpeg" and max(height, width) > _JPEG_MAX_SIDE:
        raise ImageTooLargeError(
            f"the image is {width} x {height} pixels and a JPEG has at most {_JPEG_MAX_SIDE} per side; "
            "request format json or png"
        )
    canvas = Image.fromarray(image)
    if len(detections):
        draw = ImageDraw.Draw(canvas)
        boxes_xyxy = clipped_boxes_xyxy(detections)
        colours = [class_colour_rgb(class_id, class_colours) for class_id in detections.class_ids.tolist()]
        names = [class_names[class_id] for class_id in detections.class_ids.tolist()]
        scores = [f"{score:.2f}" for score in detections.scores.tolist()]
        _draw_boxes(draw, boxes_xyxy, colours, (width, height))
        # After all boxes, so that no line crosses a label.
        _draw_labels(draw, boxes_xyxy, list(zip(names, scores, colours, strict=True)), (width, height))
    encoded = _BoundedFile(output_format, max_bytes)
    if output_format == "jpeg":
        canvas.save(encoded, "JPEG", quality=jpeg_quality)
    else:
        canvas.save(encoded, "PNG", compress_level=1)  # 1080p: 0.16 s, against 1.1 s at the default level 6
    return encoded.getvalue()


def class_colour_rgb(class_id: int, class_colours: Sequence[str] = ()) -> Rgb:
    """The colour of a class, red, green, blue 0..255: the same in every image.

    class_colours: as in `ServingConfig`, "#RRGGBB" each.
    """
    if class_colours:
        red, green, blue = bytes.fromhex(class_colours[class_id % len(class_colours)][1:])
        return red, green, blue
    shares = colorsys.hsv_to_rgb(class_id * _GOLDEN_RATIO % 1.0, 0.85, 0.95)
    return round(255 * shares[0]), round(255 * shares[1]), round(255 * shares[2])


def _draw_boxes(
    draw: ImageDraw.ImageDraw,
    boxes_xyxy: NDArray[np.float32],
    colours: Sequence[Rgb],
    image_size_wh: tuple[int, int],
) -> None:
    width, height = image_size_wh
    line_width = max(2, round(math.sqrt(width * height) / 300))
    inside = np.minimum(boxes_xyxy, np.array([width - 1, height - 1] * 2, np.float32)).tolist()
    for corners, colour_rgb in zip(inside[::-1], colours[::-1], strict=True):
        draw.rectangle(corners, outline=colour_rgb, width=line_width)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    boxes_xyxy: NDArray[np.float32],
    labels: Sequence[tuple[str, str, Rgb]],
    image_size_wh: tuple[int, int],
) -> None:
    """labels: name, score and colour of each box."""
    writer = LabelWriter({name for name, _, _ in labels}, {score for _, score, _ in labels}, image_size_wh)
    sizes_wh = [writer.bar_size_wh(name, score) for name, score, _ in labels]
    shown = [index for index, size_wh in enumerate(sizes_wh) if size_wh is not None]
    shown_sizes_wh = np.array([sizes_wh[index] for index in shown], dtype=np.int64).reshape(-1, 2)
    corners_xy = place_labels(shown_sizes_wh, boxes_xyxy[shown], boxes_xyxy, image_size_wh).tolist()
    for index, (x, y) in zip(shown[::-1], corners_xy[::-1], strict=True):
        writer.write(draw, (x, y), *labels[index])


class _BoundedFile(io.BytesIO):
    """A file in memory that refuses to grow beyond a limit."""

    def __init__(self, output_format: DrawnFormat, max_bytes: int) -> None:
        super().__init__()
        self._output_format = output_format
        self._max_bytes = max_bytes

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self._max_bytes:
            raise answer_too_large(self._output_format, self._max_bytes)
        return super().write(data)
