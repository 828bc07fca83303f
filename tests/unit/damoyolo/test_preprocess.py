from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, ImageTooLargeError, UnsupportedImageError
from damoyolo.preprocess import (
    ImagePreprocessor,
    decode_image,
    resize_on_device,
    scale_factors_xyxy,
)

CONFIG = ServingConfig()
CPU = torch.device("cpu")
INPUT_SIZE_HW = (96, 128)


def make_pixels(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours that no flip or rotation maps onto themselves."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 255 * columns / max(width - 1, 1)
    green = 255 * rows / max(height - 1, 1)
    blue = (red + 2 * green + 40 * seed) / 3 % 256
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def encode(image: Image.Image | NDArray[Any], image_format: str = "PNG", **options: Any) -> bytes:
    encoded = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        encoded, image_format, **options
    )
    return encoded.getvalue()


def png_of_header_only(width: int, height: int) -> bytes:
    """A 1-bit PNG that promises a size and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk
        + struct.pack(">I", len(data) - 4)
        + data
        + struct.pack(">I", zlib.crc32(data))
    )


@pytest.fixture
def preprocessor() -> Iterator[ImagePreprocessor]:
    made = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_a_lossless_format_gives_its_exact_pixels(image_format: str, options: dict[str, Any]) -> None:
    pixels = make_pixels(31, 47)
    decoded = decode_image(encode(pixels, image_format, **options), CONFIG)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"quality": 95}), ("GIF", {})],
)
def test_a_lossy_format_gives_nearly_its_pixels(image_format: str, options: dict[str, Any]) -> None:
    pixels = make_pixels(64, 96)
    decoded = decode_image(encode(pixels, image_format, **options), CONFIG)
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 8


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_decoded(wrap: Callable[[bytes], Any]) -> None:
    pixels = make_pixels(5, 7)
    np.testing.assert_array_equal(decode_image(wrap(encode(pixels)), CONFIG), pixels)


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    grey = make_pixels(32, 32)[:, :, 0]
    decoded = decode_image(encode(grey, "JPEG", quality=95), CONFIG)
    assert decoded.shape == (32, 32, 3)
    assert (decoded[:, :, 0] == decoded[:, :, 1]).all()
    assert np.abs(decoded[:, :, 0].astype(int) - grey).max() < 8


@pytest.mark.parametrize(
    ("ink_cmyk", "colour_rgb"),
    [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 255, 0), (255, 255, 0)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_a_cmyk_jpeg_is_not_inverted(ink_cmyk: tuple[int, ...], colour_rgb: tuple[int, ...]) -> None:
    encoded = encode(Image.new("CMYK", (16, 16), ink_cmyk), "JPEG", quality=95)
    assert b"Adobe" in encoded  # with this marker the inks are stored inverted
    decoded = decode_image(encoded, CONFIG)
    assert np.abs(decoded[8, 8].astype(int) - colour_rgb).max() < 8


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_cut_off(image_format: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(levels, image_format), CONFIG)
    np.testing.assert_array_equal(decoded[0, :, 1], [0, 1, 128, 255])


def test_1_bit_becomes_black_and_white() -> None:
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    decoded = decode_image(encode(bits), CONFIG)
    np.testing.assert_array_equal(decoded[:, :, 2], [[0, 255], [255, 0]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_and_the_colour_below_it_kept(mode: str) -> None:
    opaque = Image.fromarray(make_pixels(8, 8)).convert(mode)
    transparent = opaque.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(
        decode_image(encode(transparent), CONFIG), decode_image(encode(opaque), CONFIG)
    )


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"])
def test_a_palette_with_transparency_gives_its_colours_without_a_warning(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    decoded = decode_image(encode(image, transparency=transparency), CONFIG)
    np.testing.assert_array_equal(decoded[0], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(image_format: str) -> None:
    red, green = Image.new("RGB", (12, 12), (255, 0, 0)), Image.new("RGB", (12, 12), (0, 255, 0))
    encoded = encode(red, image_format, save_all=True, append_images=[green])
    with Image.open(io.BytesIO(encoded)) as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
    decoded = decode_image(encoded, CONFIG)
    assert np.abs(decoded[6, 6].astype(int) - (255, 0, 0)).max() < 8


def test_a_jpeg_with_further_images_behind_it_is_decoded() -> None:
    # Phones write such files (MPO) under the name of a JPEG.
    first, second = Image.fromarray(make_pixels(32, 48)), Image.new("RGB", (32, 48))
    decoded = decode_image(encode(first, "MPO", save_all=True, append_images=[second]), CONFIG)
    assert np.abs(decoded.astype(int) - make_pixels(32, 48)).mean() < 8


def test_a_colour_profile_is_no_hindrance() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = make_pixels(9, 9)
    np.testing.assert_array_equal(decode_image(encode(pixels, icc_profile=profile), CONFIG), pixels)


# ----------------------------------------------------------------------------------------- orientation

# Stored pixels -> what the viewer shows, from the definition of the EXIF tag.
VIEWS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", VIEWS)
@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 95, "subsampling": 0})],
)
def test_every_exif_orientation_is_applied(
    orientation: int, image_format: str, options: dict[str, Any]
) -> None:
    stored = make_pixels(16, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(stored, image_format, exif=exif, **options), CONFIG)
    shown = VIEWS[orientation](stored)
    assert decoded.shape == shown.shape
    tolerance_levels = 8 if image_format == "JPEG" else 0
    assert np.abs(decoded.astype(int) - shown).max() <= tolerance_levels


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00"]
)
def test_broken_exif_data_leave_the_image_upright(exif: bytes) -> None:
    pixels = make_pixels(16, 24)
    decoded = decode_image(encode(pixels, "WEBP", lossless=True, exif=exif), CONFIG)
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_leaves_the_image_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = make_pixels(6, 9)
    np.testing.assert_array_equal(decode_image(encode(pixels, exif=exif), CONFIG), pixels)


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
def test_what_is_no_accepted_image_is_refused_with_the_accepted_formats(encoded: bytes) -> None:
    with pytest.raises(UnsupportedImageError) as caught:
        decode_image(encoded, CONFIG)
    assert "JPEG, PNG, WEBP, BMP, TIFF, GIF" in str(caught.value)
    assert "image_formats" in str(caught.value)
    assert caught.value.status == 415


def test_a_format_outside_the_list_of_the_server_is_refused() -> None:
    config = ServingConfig(image_formats=("JPEG",))
    with pytest.raises(UnsupportedImageError, match="accepted are JPEG "):
        decode_image(encode(make_pixels(8, 8), "PNG"), config)


def test_pixels_of_undefined_range_are_refused() -> None:
    with pytest.raises(UnsupportedImageError, match="mode F"):
        decode_image(encode(Image.new("F", (4, 4), 0.5), "TIFF"), CONFIG)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_an_image_that_ends_early_is_refused_as_corrupt(image_format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = encode(noise, image_format)
    with pytest.raises((CorruptImageError, UnsupportedImageError)) as caught:
        decode_image(encoded[: len(encoded) // 2], CONFIG)
    if image_format in ("JPEG", "PNG", "BMP", "GIF"):
        assert isinstance(caught.value, CorruptImageError)
    assert str(caught.value).isascii()


@pytest.mark.filterwarnings("ignore")  # Pillow's about damaged TIFF directories
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_damaged_bytes_give_pixels_or_an_error_of_ours(
    image_format: str, preprocessor: ImagePreprocessor
) -> None:
    random = np.random.default_rng(1)
    encoded = np.tile(np.frombuffer(encode(make_pixels(24, 24), image_format), dtype=np.uint8), (60, 1))
    for damaged in encoded:
        places = random.integers(0, len(damaged), 6)
        damaged[places] = random.integers(0, 256, 6)
    batch = preprocessor.prepare([damaged.tobytes() for damaged in encoded])
    assert sorted([*batch.slots, *batch.errors]) == list(range(60))
    assert batch.errors
    for error in batch.errors.values():
        assert str(error).isascii()
        assert len(str(error)) < 300


def test_too_many_pixels_are_refused_from_the_header_alone() -> None:
    encoded = png_of_header_only(9000, 9000)
    assert len(encoded) < 100
    with pytest.raises(
        ImageTooLargeError, match=r"9000 x 9000 = 81000000 .*64000000.*max_image_pixels"
    ) as caught:
        decode_image(encoded, CONFIG)
    assert caught.value.status == 413


def test_a_size_that_pillow_warns_about_raises_no_warning() -> None:
    with pytest.raises(ImageTooLargeError, match="max_image_pixels"):
        decode_image(png_of_header_only(10_000, 9_500), CONFIG)
    with pytest.raises(CorruptImageError):  # the server's own limit counts, and is kept here
        decode_image(png_of_header_only(10_000, 9_500), ServingConfig(max_image_pixels=100_000_000))


def test_a_size_beyond_the_limit_of_pillow_is_refused_and_the_limit_stays() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageTooLargeError, match="No setting"):
        decode_image(png_of_header_only(30_000, 30_000), ServingConfig(max_image_pixels=2**31 - 1))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_too_many_bytes_are_refused_with_the_setting() -> None:
    encoded = encode(make_pixels(8, 8))
    assert decode_image(encoded, ServingConfig(max_image_bytes=len(encoded))).shape == (8, 8, 3)
    with pytest.raises(ImageTooLargeError, match=f"{len(encoded)} bytes.*max_image_bytes"):
        decode_image(encoded, ServingConfig(max_image_bytes=len(encoded) - 1))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_extent_is_refused(width: int, height: int) -> None:
    gif = b"GIF89a" + struct.pack("<HH", width, height) + b"\x00\x00\x00,\x00\x00\x00\x00"
    gif += struct.pack("<HH", width, height) + b"\x00\x02\x00;"
    with pytest.raises(UnsupportedImageError):
        decode_image(gif, CONFIG)


def test_a_lack_of_memory_costs_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("damoyolo.preprocess._to_rgb", fail)
    with pytest.raises(ImageTooLargeError, match="memory"):
        decode_image(encode(make_pixels(8, 8)), CONFIG)


def test_decoding_in_many_threads_leaves_the_warning_filters_alone() -> None:
    encoded = encode(make_pixels(24, 24), "JPEG")
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: decode_image(encoded, CONFIG), range(200)))
    assert list(warnings.filters) == filters
    assert all((result == results[0]).all() for result in results)


# ----------------------------------------------------------------------------------------- whole batches


def test_the_batch_keeps_order_and_sizes(preprocessor: ImagePreprocessor) -> None:
    sizes_hw = [(20, 30), (300, 200), (96, 128), (1, 1), (7, 400)]
    colours = [(10 * i, 255 - 10 * i, 7 * i) for i in range(len(sizes_hw))]
    batch = preprocessor.prepare(
        [encode(Image.new("RGB", (w, h), colour)) for (h, w), colour in zip(sizes_hw, colours, strict=True)]
    )
    assert batch.pixels.shape == (5, 3, *INPUT_SIZE_HW)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.image_sizes_hw == sizes_hw
    assert batch.slots == [0, 1, 2, 3, 4]
    assert batch.errors == {}
    for row, colour in zip(batch.pixels, colours, strict=True):
        assert row.flatten(1).unique(dim=1).tolist() == [[level] for level in colour]


def test_a_corrupt_neighbour_costs_only_itself(preprocessor: ImagePreprocessor) -> None:
    good = [encode(make_pixels(40, 50, seed)) for seed in range(3)]
    broken = encode(make_pixels(40, 50), "JPEG")[:300]
    alone = [preprocessor.prepare([encoded]).pixels[0] for encoded in good]
    batch = preprocessor.prepare([b"", good[0], broken, good[1], good[2], png_of_header_only(9000, 9000)])
    assert batch.slots == [1, 3, 4]
    assert {slot: type(error) for slot, error in batch.errors.items()} == {
        0: UnsupportedImageError,
        2: CorruptImageError,
        5: ImageTooLargeError,
    }
    assert len(batch.image_sizes_hw) == 3
    assert torch.equal(batch.pixels, torch.stack(alone))


@pytest.mark.parametrize("encoded_images", [[], [b"bad"], [b"bad", b"", b"worse"]])
def test_an_empty_batch_and_one_of_bad_images_only_work(
    preprocessor: ImagePreprocessor, encoded_images: list[bytes]
) -> None:
    batch = preprocessor.prepare(encoded_images)
    assert batch.pixels.shape == (0, 3, *INPUT_SIZE_HW)
    assert batch.image_sizes_hw == batch.slots == []
    assert list(batch.errors) == list(range(len(encoded_images)))


def test_an_error_that_is_no_fault_of_the_image_is_not_hidden(
    preprocessor: ImagePreprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of the code")

    monkeypatch.setattr("damoyolo.preprocess._resize_into", fail)
    with pytest.raises(ZeroDivisionError):
        preprocessor.prepare([encode(make_pixels(8, 8))])


def test_an_image_of_the_networks_size_is_copied_exactly(preprocessor: ImagePreprocessor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*INPUT_SIZE_HW, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(preprocessor.prepare([encode(pixels)]).pixels[0], expected)
    assert torch.equal(resize_on_device([pixels], INPUT_SIZE_HW, CPU)[0], expected)


def test_both_ways_of_resizing_agree_within_one_level(preprocessor: ImagePreprocessor) -> None:
    random = np.random.default_rng(0)
    images = [
        random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for height, width in [(1, 1), (2, 3), (37, 53), (96, 200), (192, 256), (500, 128), (333, 777)]
    ]
    on_host = preprocessor.prepare([encode(image) for image in images]).pixels
    on_device = resize_on_device(images, INPUT_SIZE_HW, CPU)
    assert on_device.shape == on_host.shape
    assert on_device.is_contiguous(memory_format=torch.channels_last)
    assert (on_device.int() - on_host.int()).abs().max() <= 1


def test_the_way_of_the_gpu_gives_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = [encode(make_pixels(40, 50)), b"bad", encode(make_pixels(200, 100, seed=1))]
    host = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    device = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, torch.device("meta"))
    monkeypatch.setattr(
        "damoyolo.preprocess.resize_on_device",
        lambda images, input_size_hw, _: resize_on_device(images, input_size_hw, CPU),
    )
    for arguments in (encoded, [], [b"bad"]):
        expected = host.prepare(arguments)
        batch = device.prepare(arguments)
        assert batch.slots == expected.slots
        assert batch.image_sizes_hw == expected.image_sizes_hw
        assert {slot: str(error) for slot, error in batch.errors.items()} == {
            slot: str(error) for slot, error in expected.errors.items()
        }
        assert batch.pixels.shape == expected.pixels.shape
        assert ((batch.pixels.int() - expected.pixels.int()).abs() <= 1).all()
    host.close()
    device.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_resizes_as_the_cpu_does(preprocessor: ImagePreprocessor) -> None:
    encoded = [encode(make_pixels(height, width)) for height, width in [(37, 53), (480, 640), (96, 128)]]
    on_gpu = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, torch.device("cuda")).prepare([*encoded, b"bad"])
    assert on_gpu.pixels.is_cuda
    assert list(on_gpu.errors) == [3]
    assert (on_gpu.pixels.cpu().int() - preprocessor.prepare(encoded).pixels.int()).abs().max() <= 1


# ---------------------------------------------------------------------------------------------- geometry


def test_the_scale_factors_undo_the_resizing() -> None:
    sizes_hw = [(480, 640), (1080, 1920), (37, 53)]
    factors = scale_factors_xyxy(sizes_hw, (640, 416))
    assert factors.dtype == torch.float32
    whole_input = torch.tensor([0.0, 0.0, 416.0, 640.0])
    for (height, width), row in zip(sizes_hw, factors, strict=True):
        torch.testing.assert_close(row * whole_input, torch.tensor([0.0, 0.0, width, height]))


def test_no_images_have_no_scale_factors() -> None:
    assert scale_factors_xyxy([], (640, 640)).shape == (0, 4)


def test_a_mark_is_found_where_the_scale_factors_say(preprocessor: ImagePreprocessor) -> None:
    pixels = np.zeros((300, 200, 3), dtype=np.uint8)
    pixels[150:180, 40:80] = 255
    batch = preprocessor.prepare([encode(pixels)])
    rows, columns = torch.nonzero(batch.pixels[0, 0] > 127, as_tuple=True)
    box_xyxy = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    factors = scale_factors_xyxy(batch.image_sizes_hw, INPUT_SIZE_HW)[0]
    # The edges are known to within half an input pixel.
    assert ((box_xyxy * factors - torch.tensor([40, 150, 80, 180])).abs() <= 0.51 * factors).all()


# ------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("input_size_hw", [(640, 640), (416, 416)])
@pytest.mark.parametrize("way", ["host", "device"])
def test_resizing_agrees_with_the_golden_file_within_one_level(
    shared_dir: Path, input_size_hw: tuple[int, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(shared_dir / "model"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import golden  # type: ignore[import-not-found]

    images = golden.preprocess_images()
    if way == "host":
        preprocessor = ImagePreprocessor(CONFIG, input_size_hw, CPU)
        pixels = preprocessor.prepare([encode(image) for image in images]).pixels
        preprocessor.close()
    else:
        pixels = resize_on_device(images, input_size_hw, CPU)
    assert golden.check_preprocess(
        [row[None] for row in pixels],
        shared_dir / "model" / "golden_preprocess.npz",
        size=input_size_hw,
        max_level=1,
    )
