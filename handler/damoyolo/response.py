"""Write an answer: compact JSON, or the image with boxes and labels drawn on it."""

from __future__ import annotations

import colorsys
import functools
import io
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from damoyolo.errors import ImageTooLargeError, RequestError
from damoyolo.structures import Detections

OutputFormat = Literal["json", "jpeg", "png"]
CONTENT_TYPES: dict[OutputFormat, str] = {
    "json": "application/json",
    "jpeg": "image/jpeg",
    "png": "image/png",
}

# Formatting by hand takes half the time of json.dumps (300 detections: 0.5 ms against 1.0 ms per image).
# 6 decimals are enough for float32 scores, 2 for boxes in pixels.
_DETECTION_JSON = '{"class_id":%d,"label":%s,"score":%.6f,"bbox":[%.2f,%.2f,%.2f,%.2f]}'

# Memory of `draw_detections` besides the image: the canvas, and at most as much for the encoded image.
DRAWING_BYTES_PER_PIXEL = 8

_GOLDEN_RATIO = 0.618034  # steps of it around the colour circle separate neighbouring classes
_JPEG_MAX_SIDE = 65_500  # pixels; libjpeg's limit


def format_json(detections: Detections, class_names: Sequence[str]) -> bytes:
    """One image's detections as compact ASCII JSON, in the order given.

    `{"width", "height", "detections": [{"class_id", "label", "score", "bbox": [x1, y1, x2, y2]}]}`; boxes in
    pixels of the original image, clipped to it, 2 decimals; scores 6 decimals. A number that is not finite
    becomes 0 or the nearest edge, so that the text is always valid JSON.
    """
    return _json_text(detections, class_names).encode("ascii")


def format_json_predictions(batch: Iterable[Detections], class_names: Sequence[str]) -> bytes:
    """The answer to a request of several images: `{"predictions": [...]}`, each as in `format_json`."""
    texts = [_json_text(detections, class_names) for detections in batch]
    return f'{{"predictions":[{",".join(texts)}]}}'.encode("ascii")


def format_error(error: RequestError) -> bytes:
    """`{"code", "type", "message"}` as ASCII JSON, in the form of TorchServe's own errors."""
    body = {"code": error.status, "type": error.kind, "message": str(error)}
    return json.dumps(body, separators=(",", ":")).encode("ascii")


def draw_detections(
    image: NDArray[np.uint8],
    detections: Detections,
    class_names: Sequence[str],
    output_format: Literal["jpeg", "png"],
    jpeg_quality: int,
    max_bytes: int = sys.maxsize,
) -> bytes:
    """The image with boxes and labels, encoded; best detection on top, one colour per class.

    Lines and font scale with the image. Letters missing from Pillow's built-in font (it covers Latin)
    appear as empty boxes.

    Args:
        image: (h, w, 3) uint8 R, G, B, the image that `detections` refers to; not changed.
        jpeg_quality: 1..95, for output format "jpeg".
        max_bytes: encoding ends when the file becomes larger: it takes most of the time.

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
    draw = ImageDraw.Draw(canvas)
    shorter_side = min(height, width)
    line_width = max(2, round(shorter_side / 300))
    font = _font(max(11, round(shorter_side / 40)))
    drawn = list(
        zip(
            clipped_boxes_xyxy(detections).tolist(),
            detections.class_ids.tolist(),
            detections.scores.tolist(),
            strict=True,
        )
    )[::-1]
    for (x1, y1, x2, y2), class_id, _ in drawn:
        corners = (min(x1, width - 1), min(y1, height - 1), min(x2, width - 1), min(y2, height - 1))
        draw.rectangle(corners, outline=class_colour_rgb(class_id), width=line_width)
    for (x1, y1, _, _), class_id, score in drawn:  # after all boxes, so that no line crosses a label
        label = f"{class_names[class_id]} {score:.2f}"
        _draw_label(draw, (x1, y1), label, font, class_colour_rgb(class_id), (width, height))
    encoded = _BoundedFile(output_format, max_bytes)
    if output_format == "jpeg":
        canvas.save(encoded, "JPEG", quality=jpeg_quality)
    else:
        canvas.save(encoded, "PNG", compress_level=1)  # 1080p: 0.16 s, against 1.1 s at the default level 6
    return encoded.getvalue()


def answer_too_large(output_format: OutputFormat, max_bytes: int) -> ImageTooLargeError:
    """The error of an answer of more than `max_bytes`."""
    return ImageTooLargeError(
        f"the answer as {output_format} has more than {max_bytes} bytes, the most that are sent (settings "
        "max_response_bytes of the archive and max_response_size of the server); format jpeg is smaller than "
        "png, and json smaller than both"
    )


class _BoundedFile(io.BytesIO):
    """A file in memory that refuses to grow beyond a limit."""

    def __init__(self, output_format: OutputFormat, max_bytes: int) -> None:
        super().__init__()
        self._output_format = output_format
        self._max_bytes = max_bytes

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > self._max_bytes:
            raise answer_too_large(self._output_format, self._max_bytes)
        return super().write(data)


def class_colour_rgb(class_id: int) -> tuple[int, int, int]:
    """The colour of a class, red, green, blue 0..255: the same in every image."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * _GOLDEN_RATIO % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _json_text(detections: Detections, class_names: Sequence[str]) -> str:
    height, width = detections.image_size_hw
    label_texts = _label_texts(tuple(class_names))
    items = [
        _DETECTION_JSON % (class_id, label_texts[class_id], score, *box)
        for class_id, score, box in zip(
            detections.class_ids.tolist(),
            np.nan_to_num(detections.scores).tolist(),
            clipped_boxes_xyxy(detections).tolist(),
            strict=True,
        )
    ]
    return f'{{"width":{width},"height":{height},"detections":[{",".join(items)}]}}'


@functools.lru_cache(maxsize=8)
def _label_texts(class_names: tuple[str, ...]) -> list[str]:
    return [json.dumps(name) for name in class_names]


def clipped_boxes_xyxy(detections: Detections) -> NDArray[np.float32]:
    """(N, 4) finite, clipped to the image, whose edges the network's boxes may cross."""
    height, width = detections.image_size_hw
    edges = np.array([width, height, width, height], dtype=np.float32)
    return np.clip(np.nan_to_num(detections.boxes_xyxy), np.float32(0), edges)


@functools.lru_cache(maxsize=64)
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    corner_xy: tuple[float, float],
    label: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour_rgb: tuple[int, int, int],
    image_size_wh: tuple[int, int],
) -> None:
    """Draw text on a filled bar above the box's upper left corner, moved inside the image."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    margin = max(1, round((bottom - top) / 5))
    bar_width, bar_height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(corner_xy[0], image_size_wh[0] - bar_width))
    y = max(0, min(corner_xy[1] - bar_height, image_size_wh[1] - bar_height))
    draw.rectangle((x, y, x + bar_width - 1, y + bar_height - 1), fill=colour_rgb)
    red, green, blue = colour_rgb
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    text_rgb = (0, 0, 0) if luma > 128 else (255, 255, 255)
    draw.text((x + margin - left, y + margin - top), label, fill=text_rgb, font=font)
