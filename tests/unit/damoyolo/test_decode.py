"""Decoding of every accepted format, and the refusals."""

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from damoyolo.config import ServingConfig
from damoyolo.decode import decode_image, decode_reduced, jpeg_divisor
from damoyolo.errors import CorruptImageError, ImageTooLargeError, RequestError, UnsupportedImageError
from damoyolo.formats import reduce_image
from damoyolo.orientation import OrientedImage, shown_pixels
from doubles.images import encode, make_pixels, png_of_header_only

CONFIG = ServingConfig()
COLOUR_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# ------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("PNG", {"icc_profile": COLOUR_PROFILE}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_a_lossless_format_gives_its_exact_pixels(image_format, options):
    pixels = make_pixels(31, 47)
    decoded = decode_image(encode(pixels, image_format, **options), CONFIG)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"quality": 95}),
        ("GIF", {}),
        # Phones write such files, further images behind the first, under the name of a JPEG.
        ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (64, 96))]}),
    ],
)
def test_a_lossy_format_gives_nearly_its_pixels(image_format, options):
    pixels = make_pixels(64, 96)
    decoded = decode_image(encode(pixels, image_format, **options), CONFIG)
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 8


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_decoded(wrap):
    pixels = make_pixels(5, 7)
    np.testing.assert_array_equal(decode_image(wrap(encode(pixels)), CONFIG), pixels)


def test_a_grey_jpeg_has_three_equal_channels():
    grey = make_pixels(32, 32)[:, :, 0]
    decoded = decode_image(encode(grey, "JPEG", quality=95), CONFIG)
    assert decoded.shape == (32, 32, 3)
    assert (decoded == decoded[:, :, :1]).all()
    assert np.abs(decoded[:, :, 0].astype(int) - grey).max() < 8


@pytest.mark.parametrize(
    ("ink_cmyk", "colour_rgb"),
    [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 255, 0), (255, 255, 0)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_a_cmyk_jpeg_is_not_inverted(ink_cmyk, colour_rgb):
    encoded = encode(Image.new("CMYK", (16, 16), ink_cmyk), "JPEG", quality=95)
    assert b"Adobe" in encoded  # with this marker the inks are stored inverted
    decoded = decode_image(encoded, CONFIG)
    assert np.abs(decoded[8, 8].astype(int) - colour_rgb).max() < 8


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(image_format):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(values, image_format), CONFIG)
    np.testing.assert_array_equal(decoded[0, :, 1], [0, 1, 128, 255])


def test_1_bit_becomes_black_and_white():
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    decoded = decode_image(encode(bits), CONFIG)
    np.testing.assert_array_equal(decoded[:, :, 2], [[0, 255], [255, 0]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_and_the_colour_below_it_kept(mode):
    opaque = Image.fromarray(make_pixels(8, 8)).convert(mode)
    transparent = opaque.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(
        decode_image(encode(transparent), CONFIG), decode_image(encode(opaque), CONFIG)
    )


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"])
def test_a_palette_with_transparency_gives_its_colours_without_a_warning(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    decoded = decode_image(encode(image, transparency=transparency), CONFIG)
    np.testing.assert_array_equal(decoded[0], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "WEBP"])
def test_the_first_of_several_frames_is_taken(image_format):
    red, green = Image.new("RGB", (12, 12), (255, 0, 0)), Image.new("RGB", (12, 12), (0, 255, 0))
    encoded = encode(red, image_format, save_all=True, append_images=[green])
    with Image.open(io.BytesIO(encoded)) as opened:
        assert opened.n_frames == 2
    decoded = decode_image(encoded, CONFIG)
    assert np.abs(decoded[6, 6].astype(int) - (255, 0, 0)).max() < 8


# ----------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(
    ("size_hw", "least_hw", "divisor"),
    [
        ((1080, 1920), None, 1),
        ((1080, 1920), (640, 640), 1),
        ((1080, 1920), (512, 512), 2),
        ((1280, 1280), (640, 640), 2),
        ((2160, 3840), (512, 512), 4),
        ((8000, 8000), (640, 640), 8),
        ((1279, 1280), (320, 320), 1),  # a side that is no multiple
        ((1282, 1284), (320, 320), 2),
        ((100, 100), (640, 640), 1),
    ],
)
def test_sides_are_divided_as_far_as_they_are_multiples_and_long_enough(size_hw, least_hw, divisor):
    assert jpeg_divisor(size_hw, least_hw) == divisor


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_decoded_in_part_is_the_image_at_half_its_size(orientation, options):
    stored = make_pixels(64, 96)
    encoded = encode(stored, "JPEG", quality=95, exif=exif_of(orientation), **options)
    shown = shown_pixels(OrientedImage(torch.from_numpy(stored), orientation)).numpy().astype(float)
    half = shown.reshape(shown.shape[0] // 2, 2, shown.shape[1] // 2, 2, 3).mean((1, 3))
    decoded = decode_reduced(reduce_image(encoded, CONFIG), CONFIG, (32, 32))
    assert decoded.shape == half.shape
    assert np.abs(decoded - half).max() <= 8


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_are_decoded_in_part_too(mode):
    encoded = encode(Image.fromarray(make_pixels(64, 96)).convert(mode), "JPEG")
    assert decode_reduced(reduce_image(encoded, CONFIG), CONFIG, (32, 32)).shape == (32, 48, 3)


def test_other_formats_are_decoded_in_full():
    encoded = encode(make_pixels(64, 96), "PNG")
    assert decode_reduced(reduce_image(encoded, CONFIG), CONFIG, (32, 32)).shape == (64, 96, 3)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 95, "subsampling": 0})],
)
def test_every_exif_orientation_is_applied(orientation, image_format, options):
    stored = make_pixels(16, 40)
    decoded = decode_image(encode(stored, image_format, exif=exif_of(orientation), **options), CONFIG)
    shown = shown_pixels(OrientedImage(torch.from_numpy(stored), orientation)).numpy()
    assert decoded.shape == shown.shape
    tolerance = 8 if image_format == "JPEG" else 0
    assert np.abs(decoded.astype(int) - shown).max() <= tolerance


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00",
        *map(exif_of, (0, 9, 65535)),
    ],
)
def test_broken_or_undefined_orientations_leave_the_image_upright(exif):
    pixels = make_pixels(16, 24)
    decoded = decode_image(encode(pixels, "WEBP", lossless=True, exif=exif), CONFIG)
    np.testing.assert_array_equal(decoded, pixels)


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"x",
        b"no image at all",
        b"%PDF-1.7\n",
        b"<svg/>",
        encode(make_pixels(8, 8), "PPM"),
        b"\xff\xd8",
    ],
)
def test_other_data_are_refused_with_the_accepted_formats(encoded):
    with pytest.raises(UnsupportedImageError) as caught:
        decode_image(encoded, CONFIG)
    assert "JPEG, PNG, WEBP, BMP, TIFF, GIF" in str(caught.value)
    assert "image_formats" in str(caught.value)
    assert caught.value.status == 415


def test_a_format_outside_the_list_of_the_server_is_refused():
    config = ServingConfig(image_formats=("JPEG",))
    with pytest.raises(UnsupportedImageError, match="accepted are JPEG "):
        decode_image(encode(make_pixels(8, 8), "PNG"), config)


def test_pixels_of_undefined_range_are_refused():
    with pytest.raises(UnsupportedImageError, match="mode F"):
        decode_image(encode(Image.new("F", (4, 4), 0.5), "TIFF"), CONFIG)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_an_image_that_ends_early_is_refused_as_corrupt(image_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = encode(noise, image_format)
    with pytest.raises((CorruptImageError, UnsupportedImageError)) as caught:
        decode_image(encoded[: len(encoded) // 2], CONFIG)
    if image_format in ("JPEG", "PNG", "BMP", "GIF"):
        assert isinstance(caught.value, CorruptImageError)
    assert str(caught.value).isascii()


@pytest.mark.filterwarnings("ignore")  # Pillow's about damaged TIFF directories
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_damaged_bytes_give_pixels_or_an_error_of_ours(image_format):
    random = np.random.default_rng(1)
    encoded = np.frombuffer(encode(make_pixels(24, 24), image_format), dtype=np.uint8)
    errors = []
    for _ in range(60):
        damaged = encoded.copy()
        damaged[random.integers(0, len(damaged), 6)] = random.integers(0, 256, 6)
        try:
            assert decode_image(damaged.tobytes(), CONFIG).ndim == 3
        except RequestError as error:
            errors.append(str(error))
    assert errors
    assert all(text.isascii() and len(text) < 300 for text in errors)


def test_too_many_pixels_are_refused_from_the_header_alone():
    encoded = png_of_header_only(9000, 9000)
    assert len(encoded) < 100
    with pytest.raises(
        ImageTooLargeError, match=r"9000 x 9000 = 81000000 .*64000000.*max_image_pixels"
    ) as caught:
        decode_image(encoded, CONFIG)
    assert caught.value.status == 413


def test_a_size_that_pillow_warns_about_raises_no_warning():
    with pytest.raises(ImageTooLargeError, match="max_image_pixels"):
        decode_image(png_of_header_only(10_000, 9_500), CONFIG)
    with pytest.raises(CorruptImageError):  # within the server's limit, which is the one that counts
        decode_image(png_of_header_only(10_000, 9_500), ServingConfig(max_image_pixels=100_000_000))


def test_a_size_beyond_the_limit_of_pillow_is_refused_and_the_limit_stays():
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageTooLargeError, match="No setting"):
        decode_image(png_of_header_only(30_000, 30_000), ServingConfig(max_image_pixels=2**31 - 1))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_too_many_bytes_are_refused_with_the_setting():
    encoded = encode(make_pixels(8, 8))
    assert decode_image(encoded, ServingConfig(max_image_bytes=len(encoded))).shape == (8, 8, 3)
    with pytest.raises(ImageTooLargeError, match=f"{len(encoded)} bytes.*max_image_bytes"):
        decode_image(encoded, ServingConfig(max_image_bytes=len(encoded) - 1))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_extent_is_refused(width, height):
    gif = b"GIF89a" + struct.pack("<HH", width, height) + b"\x00\x00\x00,\x00\x00\x00\x00"
    gif += struct.pack("<HH", width, height) + b"\x00\x02\x00;"
    with pytest.raises(UnsupportedImageError):
        decode_image(gif, CONFIG)


def test_a_lack_of_memory_is_no_fault_of_the_image(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("damoyolo.decode._to_rgb", fail)
    with pytest.raises(MemoryError):  # the service answers 507
        decode_image(encode(make_pixels(8, 8)), CONFIG)


def test_a_large_image_is_copied_in_strips_without_a_seam(monkeypatch):
    pixels = make_pixels(101, 77)
    monkeypatch.setattr("damoyolo.decode._STRIP_PIXELS", 8 * 1000)  # strips of 12 rows, the last of 5
    np.testing.assert_array_equal(decode_image(encode(pixels, "BMP"), CONFIG), pixels)
    monkeypatch.setattr("damoyolo.decode._STRIP_PIXELS", 8)
    np.testing.assert_array_equal(
        decode_image(encode(pixels, "PNG", exif=exif_of(6)), CONFIG)[:, ::-1].swapaxes(0, 1), pixels
    )


def test_decoding_in_many_threads_leaves_the_warning_filters_alone():
    encoded = encode(make_pixels(24, 24), "JPEG")
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: decode_image(encoded, CONFIG), range(200)))
    assert list(warnings.filters) == filters
    assert all((result == results[0]).all() for result in results)
