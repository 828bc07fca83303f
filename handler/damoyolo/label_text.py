"""Write the labels of an image: in one font, none larger than its room, each name and score rendered once."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Bounds = tuple[int, int, int, int]  # left, top, right, bottom of the letters of a text at 0, 0

_FONT_SHARE = 1 / 46  # of the geometric mean of the image's sides: 12 px at 640 x 480
_FONT_MIN_PX = 11  # at the least where there is room for it
_FONT_SMALLEST_PX = 9  # below this, letters run together
_LABEL_MAX_EM = 20  # the longest label in font sizes: about 40 letters
_MOST_LETTERS = 64  # of a name; more have no room in the longest label, unless all are as narrow as i
_KEPT_TEXTS = 8192  # whose sizes are kept for the next images; a few MB, as texts are that short
_KEPT = 128  # rendered names that are kept: under 2 bytes per pixel of a large image, if all are that long
# In place of letters that the font lacks and that are no letter with an accent.
_SIMILAR = str.maketrans(
    {"ß": "ss", "ẞ": "SS", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D"}
    | {"æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "þ": "th", "Þ": "Th", "\u0131": "i", "\u00d7": "x"}
    | dict.fromkeys("\u00b5\u03bc", "u")  # the sign for micro, and the Greek letter
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")  # dashes, and the sign for minus
)


class _Letters(NamedTuple):
    """A rendered text.

    mask: mode "L", no larger than the letters. top: of the mask below the top of the line.
    """

    mask: Image.Image
    top: int


class LabelWriter:
    """Writes labels of name and score into one image.

    names, scores: all that will be written, at least one of each.

    In an image too narrow for a label, the font of all becomes smaller, then the name is abbreviated, then
    left out. Pillow's built-in font has little more than ASCII: letters are written without accents or as
    similar ones (`_SIMILAR`), other scripts and symbols as empty boxes.
    """

    def __init__(self, names: Iterable[str], scores: Iterable[str], image_size_wh: tuple[int, int]) -> None:
        width, height = image_size_wh
        plain = {name: _writable(name) for name in names}
        scores = list(scores)
        most = round(_FONT_SHARE * math.sqrt(width * height))
        font_px = max(_FONT_MIN_PX, min(most, min(width, height) // 8))
        self._room_wh = min(width, _LABEL_MAX_EM * font_px), height
        self._use_font(font_px)
        longest = max(plain.values(), key=functools.partial(_length, font_px))
        widest = _text_width(font_px, longest) + self._score_width(scores)
        if widest > self._room_wh[0]:
            smallest = max(_FONT_SMALLEST_PX, font_px * 2 // 3)
            self._use_font(max(smallest, min(font_px, int(font_px * self._room_wh[0] / widest))))
        room_px = self._room_wh[0] - self._score_width(scores)
        self._shown_names = {name: _abbreviated(self.font_px, room_px, text) for name, text in plain.items()}

    def text(self, name: str, score: str) -> str:
        """The label as it is written."""
        return f"{self._shown_names[name]} {score}".lstrip()

    def bar_size_wh(self, name: str, score: str) -> tuple[int, int] | None:
        """Width and height of the label's bar in pixels; None if there is no room for it."""
        shown = self._shown_names[name]
        bounds = [_bounds(self.font_px, text) for text in ([shown, score] if shown else [score])]
        width = sum(max(1, right - left) for left, _, right, _ in bounds) + (len(bounds) - 1) * self._gap
        height = max(max(bottom, top + 1) for _, top, _, bottom in bounds) - min(
            top for _, top, _, _ in bounds
        )
        size_wh = width + 2 * self._margin, height + 2 * self._margin
        fits = size_wh[0] <= self._room_wh[0] and size_wh[1] <= self._room_wh[1]
        return size_wh if fits else None

    def write(
        self, draw: ImageDraw.ImageDraw, corner_xy: tuple[int, int], name: str, score: str, bar_rgb: Rgb
    ) -> None:
        """Write text on a filled bar; a border in the text's colour separates bars that touch.

        corner_xy: upper left corner of the bar.
        """
        size_wh = self.bar_size_wh(name, score)
        assert size_wh is not None
        x, y = corner_xy
        text_rgb = text_colour_rgb(bar_rgb)
        bar = (x, y, x + size_wh[0] - 1, y + size_wh[1] - 1)
        draw.rectangle(bar, fill=bar_rgb, outline=text_rgb, width=max(1, self._margin // 3))
        letters = self._letters(name, score)
        x, y = x + self._margin, y + self._margin - min(each.top for each in letters)
        for each in letters:
            draw.bitmap((x, y + each.top), each.mask, fill=text_rgb)
            x += each.mask.width + self._gap

    def _use_font(self, size_px: int) -> None:
        self.font_px = size_px
        self._margin = max(2, round(size_px / 6))  # between the letters and the edge of the bar
        self._gap = math.ceil(_font(size_px).getlength(" "))
        render = functools.partial(_rendered, size_px)
        self._name_letters = functools.lru_cache(_KEPT)(render)
        self._score_letters = functools.lru_cache(_KEPT)(render)

    def _letters(self, name: str, score: str) -> tuple[_Letters, ...]:
        shown = self._shown_names[name]
        return (*([self._name_letters(shown)] if shown else []), self._score_letters(score))

    def _score_width(self, scores: Iterable[str]) -> int:
        """What a label is wider than its name."""
        return max(_text_width(self.font_px, score) for score in scores) + self._gap + 2 * self._margin


def text_colour_rgb(bar_rgb: Rgb) -> Rgb:
    """Black or white, whichever is easier to read on a bar of this colour: a contrast of 4.5 or more.

    By the relative luminance of https://www.w3.org/TR/WCAG22/#dfn-relative-luminance.
    """
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (value / 255 for value in bar_rgb)
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    # The contrasts are (luminance + 0.05) / 0.05 with black and 1.05 / (luminance + 0.05) with white.
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


@functools.lru_cache(_KEPT_TEXTS)
def _bounds(font_px: int, text: str) -> Bounds:
    left, top, right, bottom = _font(font_px).getbbox(text)
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _text_width(font_px: int, text: str) -> int:
    left, _, right, _ = _bounds(font_px, text)
    return right - left


@functools.lru_cache(_KEPT_TEXTS)
def _abbreviated(font_px: int, room_px: int, name: str) -> str:
    """The name, or as much of it as fits: "Plat…"; empty if not even a letter does."""
    if _length(font_px, name) <= room_px and _text_width(font_px, name) <= room_px:
        return name
    ends = list(itertools.accumulate(_advance(font_px, letter) for letter in name))
    fitting = bisect.bisect_right(ends, room_px - _advance(font_px, "…"))
    while fitting and _text_width(font_px, name[:fitting] + "…") > room_px:
        fitting -= 1
    return name[:fitting] + "…" if fitting else ""


def _length(font_px: int, text: str) -> float:
    """About the width of a text: without what the font adds or takes between letters. Fast."""
    return sum(_advance(font_px, letter) for letter in text)


@functools.lru_cache(_KEPT_TEXTS)
def _advance(font_px: int, letter: str) -> float:
    return _font(font_px).getlength(letter)


def _rendered(font_px: int, text: str) -> _Letters:
    left, top, right, bottom = _bounds(font_px, text)
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=_font(font_px))
    return _Letters(mask, top)


@functools.lru_cache(_KEPT_TEXTS)
def _writable(name: str) -> str:
    """As much of the name as can be shown, in letters that the font has where there are such."""
    text = _without_accents(name[: _MOST_LETTERS + 1].translate(_SIMILAR))
    return text[:_MOST_LETTERS] + "…" if len(text) > _MOST_LETTERS else text


def _without_accents(name: str) -> str:
    bases = (
        "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
        for letter in name
    )
    return "".join(base if base.isascii() else letter for base, letter in zip(bases, name, strict=True))


@functools.lru_cache(maxsize=64)
def _font(size_px: int) -> Font:
    return ImageFont.load_default(size_px)
