"""Labels that can be read in an image of any size and are never cut off."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from damoyolo.label_text import LabelWriter, text_colour_rgb


def one_label(name, size_wh):
    """Text, bar's width and height, and font size of a label with the score 0.90; None if it has no room."""
    writer = LabelWriter([name], ["0.90"], size_wh)
    bar_wh = writer.bar_size_wh(name, "0.90")
    return None if bar_wh is None else (writer.text(name, "0.90"), bar_wh, writer.font_px)


# 10 px of a font are the least that reads well, where the whole image is shown on 1024 px.
@pytest.mark.parametrize("size_wh", [(640, 480), (1920, 1080), (2100, 700), (6000, 2000), (8000, 6000)])
def test_letters_can_be_read_when_the_whole_image_is_shown(size_wh):
    text, (_, bar_height), font_px = one_label("Platelets", size_wh)
    assert text == "Platelets 0.90"
    assert font_px * 1024 / max(size_wh) > 10
    assert bar_height < size_wh[1] / 10


@pytest.mark.parametrize(
    ("size_wh", "name", "expected"),
    [
        ((64, 64), "RBC", "RBC 0.90"),
        ((64, 64), "Platelets", "Platelets 0.90"),
        ((64, 64), "a very long name of a class", r"a very \w*… 0\.90"),
        ((30, 300), "Platelets", r"(\w{1,2}… )?0\.90"),
        ((640, 480), "x" * 200, r"x{30,60}… 0\.90"),
    ],
)
def test_a_label_too_wide_is_made_smaller_then_abbreviated_and_never_cut_off(size_wh, name, expected):
    text, bar_wh, font_px = one_label(name, size_wh)
    assert re.fullmatch(expected, text)
    assert bar_wh[0] <= size_wh[0]
    assert bar_wh[1] <= size_wh[1]
    assert font_px >= 9


@pytest.mark.parametrize("size_wh", [(1, 1), (2, 3), (300, 8), (8, 300)])
def test_where_no_label_fits_there_is_none(size_wh):
    assert one_label("cell", size_wh) is None


def test_all_labels_of_an_image_have_one_font():
    writer = LabelWriter(["RBC", "a very long name of a class"], ["0.50", "1.00"], (64, 64))
    assert writer.font_px == 9
    heights = {writer.bar_size_wh(name, "0.50")[1] for name in ("RBC", "a very long name of a class")}
    assert max(heights) - min(heights) <= 4  # letters below the line


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Zelle größer", "Zelle grosser"),
        ("Érythrocyte", "Erythrocyte"),
        ("Öl, œuf, smørbrød", "Ol, oeuf, smorbrod"),
        ("Łódź, Đakovo, ılık, Þórður", "Lodz, Dakovo, ilik, Thordur"),  # noqa: RUF001
        ("5–10 µm × 2", "5-10 um x 2"),  # noqa: RUF001
        ("", ""),
    ],
)
def test_letters_are_written_as_those_that_the_font_has(name, written):
    assert one_label(name, (640, 480))[0] == f"{written} 0.90".lstrip()
    font = ImageFont.load_default(24)
    empty_box = bytes(font.getmask("\ue123"))
    for letter in written:
        assert bytes(font.getmask(letter)) != empty_box, letter


def test_other_scripts_and_symbols_are_kept_though_the_font_lacks_them():
    assert one_label("細胞 한 €", (640, 480))[0] == "細胞 한 € 0.90"


def test_a_very_long_name_takes_no_longer_than_one_that_just_fills_its_room():
    measured = []
    real = ImageFont.FreeTypeFont.getbbox
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ImageFont.FreeTypeFont,
            "getbbox",
            lambda font, text, *rest: measured.append(len(text)) or real(font, text, *rest),
        )
        names = ["abcdefghij" * 500 + str(number) for number in range(50)]
        LabelWriter(names, ["0.90"], (640, 480))
        LabelWriter([f"{letter}{'x' * 5000}" for letter in "abcdefgh"], ["0.90"], (640, 480))
    assert max(measured) <= 65
    assert len(measured) <= 2 + 2 * (
        1 + 8
    )  # the scores, in two sizes, and names that differ in what is shown


def test_letters_lie_inside_their_bar_whatever_they_are():
    names = ["gjpqy", "ÅÉ|§", "細胞", " ", "...", "a\nb"]
    writer = LabelWriter(names, ["0.90"], (640, 480))
    for name in names:
        width, height = writer.bar_size_wh(name, "0.90")
        image = Image.new("RGB", (width + 20, height + 20), "red")
        writer.write(ImageDraw.Draw(image), (10, 10), name, "0.90", (0, 0, 255))
        pixels = np.asarray(image)
        bar = pixels[10:-10, 10:-10]
        assert (pixels == (255, 0, 0)).all(axis=-1).sum() == pixels[..., 0].size - bar[..., 0].size
        rim = np.concatenate([bar[1, 1:-1], bar[-2, 1:-1], bar[1:-1, 1], bar[1:-1, -2]])
        assert (rim == (0, 0, 255)).all()  # between the letters and the border


def relative_luminance(rgb):
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    shares = np.array(rgb) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_letters_have_the_contrast_that_the_web_asks_for_on_every_colour():
    steps = range(0, 256, 15)
    for bar in itertools.product(steps, steps, steps):
        dark, light = sorted(map(relative_luminance, (bar, text_colour_rgb(bar))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, bar
