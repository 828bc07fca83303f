"""Draw detections on their image: boxes, and labels that do not hide each other where there is room."""

from __future__ import annotations

import colorsys
import functools
import io
import math
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from damoyolo.errors import ImageTooLargeError
from damoyolo.label_layout import place_labels
from damoyolo.response import DrawnFormat, answer_too_large, clipped_boxes_xyxy
from damoyolo.structures import Detections

# Memory of `draw_detections` besides the image: the canvas, and at most as much for the encoded image.
DRAWING_BYTES_PER_PIXEL = 8

_GOLDEN_RATIO = 0.618034  # steps of it around the colour circle separate neighbouring classes
_JPEG_MAX_SIDE = 65_500  # pixels; libjpeg's limit
_FONT_SHARE = 1 / 46  # of the geometric mean of the image's sides: 12 px at 640 x 480
_FONT_MIN_PX = 11  # at the least where there is room for it
_FONT_SMALLEST_PX = 9  # below this, letters run together
_LABEL_MAX_SHARE = 0.5  # of the image's width that a label takes at most,
_LABEL_MAX_EM = 16  # unless it is no longer than this many times its font size: about 30 letters
_EQUAL_CONTRAST = math.sqrt(1.05 * 0.05) - 0.05  # luminance of a bar on which black and white do equally well

Rgb = tuple[int, int, int]
Measure = Callable[[str], tuple[float, float, float, float]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Label(NamedTuple):
    """A label that fits into the image.

    bar_wh: size of its bar in pixels. text_offset_xy: where in the bar the text is drawn.
    """

    text: str
    bar_wh: tuple[int, int]
    text_offset_xy: tuple[float, float]
    colour_rgb: Rgb


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

    Lines and font scale with the image. No label is cut off: in an image too narrow for it the font becomes
    smaller, then the name is abbreviated ("Plat… 0.87"), and where nothing fits there is no label. Pillow's
    built-in font has little more than ASCII: letters are drawn without accents, other scripts as empty boxes.

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
        _draw_boxes(draw, boxes_xyxy, colours, (width, height))
        texts = [
            (_without_accents(class_names[class_id]), f"{score:.2f}")
            for class_id, score in zip(detections.class_ids.tolist(), detections.scores.tolist(), strict=True)
        ]
        _draw_labels(draw, boxes_xyxy, texts, colours, (width, height))
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


def text_colour_rgb(bar_rgb: Rgb) -> Rgb:
    """Black or white, whichever is easier to read on a bar of this colour: a contrast of 4.5 or more.

    By the relative luminance of https://www.w3.org/TR/WCAG22/#dfn-relative-luminance.
    """
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (value / 255 for value in bar_rgb)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > _EQUAL_CONTRAST else (255, 255, 255)


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
    texts: Sequence[tuple[str, str]],
    colours: Sequence[Rgb],
    image_size_wh: tuple[int, int],
) -> None:
    """Draw each label that fits; after all boxes, so that no line crosses a label.

    texts: name and score of each box.
    """
    width, height = image_size_wh
    font_px = max(_FONT_MIN_PX, min(round(_FONT_SHARE * math.sqrt(width * height)), min(width, height) // 8))
    margin = _margin(font_px)
    measure = _text_measure(draw, _font(font_px))
    widest = max(right - left for left, _, right, _ in {measure(" ".join(pair)) for pair in set(texts)})
    room = min(width, max(int(_LABEL_MAX_SHARE * width), _LABEL_MAX_EM * font_px))
    if widest + 2 * margin > room:
        smallest = max(_FONT_SMALLEST_PX, font_px * 2 // 3)
        font_px = max(smallest, min(font_px, int(font_px * (room - 2 * margin) / widest)))
        margin = _margin(font_px)
        measure = _text_measure(draw, _font(font_px))
    labels = [
        _fitted_label(*text, measure, margin, colour_rgb, (room, height))
        for text, colour_rgb in zip(texts, colours, strict=True)
    ]
    shown = [index for index, label in enumerate(labels) if label is not None]
    fitting = [label for label in labels if label is not None]
    sizes_wh = np.array([label.bar_wh for label in fitting], dtype=np.int64).reshape(-1, 2)
    corners_xy = place_labels(sizes_wh, boxes_xyxy[shown], boxes_xyxy, image_size_wh).tolist()
    for label, corner_xy in zip(fitting[::-1], corners_xy[::-1], strict=True):
        _draw_label(draw, corner_xy, label, _font(font_px), max(1, font_px // 16))


@functools.lru_cache(maxsize=1024)
def _without_accents(name: str) -> str:
    bases = (
        "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
        for letter in name
    )
    return "".join(base if base.isascii() else letter for base, letter in zip(bases, name, strict=True))


def _margin(font_px: int) -> int:
    """Between the text and the edge of its bar, in pixels."""
    return max(2, round(font_px / 6))


def _text_measure(draw: ImageDraw.ImageDraw, font: Font) -> Measure:
    """A function of a text: left, top, right, bottom of its letters if drawn at 0, 0. Most texts repeat."""

    @functools.cache
    def measure(text: str) -> tuple[float, float, float, float]:
        return draw.textbbox((0, 0), text, font=font)

    return measure


def _fitted_label(
    name: str,
    score: str,
    measure: Measure,
    margin: int,
    colour_rgb: Rgb,
    room_wh: tuple[int, int],
) -> _Label | None:
    """The longest label that fits into the room: name and score, the name abbreviated, the score alone."""

    def label_of(text: str) -> _Label | None:
        left, top, right, bottom = measure(text)
        bar_wh = math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin
        if bar_wh[0] > room_wh[0] or bar_wh[1] > room_wh[1]:
            return None
        return _Label(text, bar_wh, (margin - left, margin - top), colour_rgb)

    label = label_of(f"{name} {score}")
    if label is not None:
        return label
    fitting, too_long = 0, len(name)  # letters of the name; bisected, as a name may be long
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if label_of(f"{name[:middle]}… {score}") is None:
            too_long = middle
        else:
            fitting = middle
    return label_of(f"{name[:fitting]}… {score}" if fitting else score)


def _draw_label(
    draw: ImageDraw.ImageDraw, corner_xy: tuple[int, int], label: _Label, font: Font, border_px: int
) -> None:
    """Draw text on a filled bar; a border in the text's colour separates bars that touch."""
    (x, y), (bar_width, bar_height) = corner_xy, label.bar_wh
    text_rgb = text_colour_rgb(label.colour_rgb)
    draw.rectangle(
        (x, y, x + bar_width - 1, y + bar_height - 1),
        fill=label.colour_rgb,
        outline=text_rgb,
        width=border_px,
    )
    draw.text(
        (x + label.text_offset_xy[0], y + label.text_offset_xy[1]), label.text, fill=text_rgb, font=font
    )


@functools.lru_cache(maxsize=64)
def _font(size_px: int) -> Font:
    return ImageFont.load_default(size_px)


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
