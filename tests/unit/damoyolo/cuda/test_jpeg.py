"""Which JPEG headers are left to nvJPEG, and what is read from them."""

import io
import random
import struct
import warnings

import pytest
from PIL import Image

from damoyolo.config import ServingConfig
from damoyolo.cuda.jpeg import JpegHeader, read_plain_jpeg_header
from damoyolo.decode import decode_image
from doubles.images import encode, encode_jpeg, exif, make_pixels


def with_segment(jpeg, marker, payload):
    """The JPEG with a segment before all others."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + jpeg[2:]


def without_segments(jpeg, marker):
    """The JPEG without the segments of that marker ahead of its scan."""
    position, kept = 2, jpeg[:2]
    while jpeg[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if jpeg[position + 1] != marker:
            kept += jpeg[position:end]
        position = end
    return kept + jpeg[position:]


PIXELS = make_pixels(40, 56)
PLAIN = encode_jpeg(PIXELS)
FRAME = PLAIN.index(b"\xff\xc0")
SCAN = PLAIN.index(b"\xff\xda")
PLAIN_HEADER = JpegHeader(40, 56, 1)


@pytest.mark.parametrize(
    "encoded",
    [
        PLAIN,
        bytearray(PLAIN),
        memoryview(PLAIN),
        encode_jpeg(PIXELS, subsampling="4:4:4"),
        encode_jpeg(PIXELS, subsampling="4:2:2"),
        encode_jpeg(PIXELS, subsampling="4:2:0"),
        encode_jpeg(PIXELS, optimize=True),
        encode_jpeg(PIXELS, restart_marker_blocks=2),
        encode_jpeg(PIXELS, quality=1),
        encode_jpeg(PIXELS, comment="a comment", icc_profile=bytes(100_000), dpi=(72, 72)),
        encode_jpeg(PIXELS[:, :, 0]),
        with_segment(PLAIN, 0xEE, b"Adobe\0\x64\0\0\0\0\x01"),
        with_segment(PLAIN, 0xEE, b"other"),
        without_segments(PLAIN, 0xE0),
        PLAIN + bytes(16),
        encode_jpeg(PIXELS, exif=exif(1)),
    ],
)
def test_a_plain_jpeg_is_for_the_device(encoded):
    assert read_plain_jpeg_header(encoded) == PLAIN_HEADER


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        PLAIN[:2],
        PLAIN[:-1],
        PLAIN[:FRAME],
        PLAIN[: len(PLAIN) // 2],
        PLAIN + bytes(1000),
        b"\0" + PLAIN,
        PLAIN[:SCAN] + b"\xff\xd9",
        PLAIN[:FRAME] + b"garbage" * 20 + b"\xff\xd9",
        encode(PIXELS, "PNG"),
        encode(PIXELS, "WEBP"),
        encode_jpeg(PIXELS, progressive=True),
        encode_jpeg(Image.new("CMYK", (16, 16))),
        encode_jpeg(PIXELS, keep_rgb=True),
        with_segment(PLAIN, 0xEE, b"Adobe\0\x64\0\0\0\0\0"),
        with_segment(PLAIN, 0xEE, b"Adobe\0\x64\0\0\0\0\x02"),
        PLAIN[: FRAME + 4] + b"\x0c" + PLAIN[FRAME + 5 :],  # 12 bits
        PLAIN[: FRAME + 5] + b"\0\0" + PLAIN[FRAME + 7 :],  # no height
        PLAIN[: FRAME + 7] + b"\0\0" + PLAIN[FRAME + 9 :],  # no width
        PLAIN[: FRAME + 11] + b"\x41" + PLAIN[FRAME + 12 :],  # 4:1:1
        PLAIN[: FRAME + 1] + b"\xc1" + PLAIN[FRAME + 2 :],  # extended
        PLAIN[: FRAME + 1] + b"\xc9" + PLAIN[FRAME + 2 :],  # arithmetic coding
        PLAIN[: SCAN + 4] + b"\x01" + PLAIN[SCAN + 5 :],  # the first scan of several
        PLAIN[:SCAN] + PLAIN[FRAME : FRAME + 19] + PLAIN[SCAN:],  # two frames
        without_segments(PLAIN, 0xC4),
        without_segments(PLAIN, 0xDB),
        with_segment(PLAIN, 0xD8, b""),
        with_segment(PLAIN, 0xDC, b"\0\x10"),
        PLAIN[:2] + b"\xff\xfe\0\2" * 1000 + PLAIN[2:],
        memoryview(PLAIN * 2)[::2],
    ],
)
def test_any_other_bytes_are_for_the_cpu(encoded):
    assert read_plain_jpeg_header(encoded) is None


@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_read(orientation, byte_order):
    encoded = encode_jpeg(PIXELS, exif=exif(orientation, byte_order))
    assert read_plain_jpeg_header(encoded) == JpegHeader(40, 56, orientation)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(orientation):
    assert read_plain_jpeg_header(encode_jpeg(PIXELS, exif=exif(orientation))) == PLAIN_HEADER


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    "encoded",
    [
        encode_jpeg(PIXELS, exif=b"Exif\0\0garbage"),
        encode_jpeg(PIXELS, exif=b"Exif\0\0"),
        encode_jpeg(PIXELS, exif=exif(6)[:-8]),
        encode_jpeg(PIXELS, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        encode_jpeg(PIXELS, exif=exif(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x04")),
        encode_jpeg(PIXELS, exif=exif(6).replace(b"\x01\x0f\0\x02", b"\x01\x12\0\x03")),
        with_segment(encode_jpeg(PIXELS, exif=exif(6)), 0xE1, exif(3)),
        with_segment(PLAIN, 0xE1, XMP),
    ],
)
def test_irregular_data_about_the_orientation_are_for_the_cpu(encoded):
    assert read_plain_jpeg_header(encoded) is None


def test_exif_data_come_before_xmp():
    encoded = with_segment(encode_jpeg(PIXELS, exif=exif(3)), 0xE1, XMP)
    assert read_plain_jpeg_header(encoded) == JpegHeader(40, 56, 3)
    assert decode_image(encoded, ServingConfig()).shape == (
        40,
        56,
        3,
    )  # Pillow agrees: not turned by 90 degrees


def test_no_damage_makes_reading_raise_or_disagree_with_pillow_about_the_size():
    dice = random.Random(3)
    sources = [
        PLAIN,
        encode_jpeg(PIXELS, exif=exif(6)),
        encode_jpeg(PIXELS[:, :, 0], restart_marker_blocks=1),
    ]
    accepted = 0
    for round_number in range(6000):
        damaged = bytearray(sources[round_number % len(sources)])
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(min(len(damaged), 700))] = dice.choice((0, 0xFF, dice.randrange(256)))
        if dice.random() < 0.2:
            del damaged[dice.randrange(len(damaged)) :]
        header = read_plain_jpeg_header(damaged)
        if header is None:
            continue
        accepted += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(io.BytesIO(damaged), formats=["JPEG"]) as opened:
                    assert opened.size == (header.width, header.height)
            except OSError:  # nvJPEG refuses it too, or decodes what it finds
                continue
    assert accepted > 500
