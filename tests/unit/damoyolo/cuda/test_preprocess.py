from __future__ import annotations

import io
import logging
import random
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from damoyolo.config import ServingConfig
from damoyolo.cuda import preprocess as device_preprocess
from damoyolo.cuda.preprocess import DevicePreprocessor, JpegHeader, read_plain_jpeg_header
from damoyolo.errors import CorruptImageError, ImageTooLargeError, UnsupportedImageError
from damoyolo.preprocess import ImagePreprocessor, decode_image, resize_on_device

CONFIG = ServingConfig()
CPU = torch.device("cpu")
INPUT_SIZE_HW = (96, 128)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_pixels(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours that no flip or rotation maps onto themselves."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 255 * columns / max(width - 1, 1)
    green = 255 * rows / max(height - 1, 1)
    blue = (red + 2 * green + 40 * seed) / 4
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def encode(image: Image.Image | NDArray[Any], image_format: str = "JPEG", **options: Any) -> bytes:
    encoded = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        encoded, image_format, **options
    )
    return encoded.getvalue()


def exif(orientation: int, byte_order: str = ">") -> bytes:
    """EXIF data whose main directory holds two entries, the second of them the orientation."""
    head = b"MM\0*" if byte_order == ">" else b"II*\0"
    make = struct.pack(byte_order + "HHI4s", 0x010F, 2, 4, b"abc\0")
    tag = struct.pack(byte_order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    directory = struct.pack(byte_order + "IH", 8, 2) + make + tag + bytes(4)
    return b"Exif\0\0" + head + directory


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    """The JPEG with a segment before all others."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + jpeg[2:]


def without_segments(jpeg: bytes, marker: int) -> bytes:
    """The JPEG without the segments of that marker ahead of its scan."""
    position, kept = 2, jpeg[:2]
    while jpeg[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if jpeg[position + 1] != marker:
            kept += jpeg[position:end]
        position = end
    return kept + jpeg[position:]


PIXELS = make_pixels(40, 56)
PLAIN = encode(PIXELS)
FRAME = PLAIN.index(b"\xff\xc0")
SCAN = PLAIN.index(b"\xff\xda")
PLAIN_HEADER = JpegHeader(40, 56, 1)


# ------------------------------------------------------------------------------------------ header scan


@pytest.mark.parametrize(
    "encoded",
    [
        PLAIN,
        bytearray(PLAIN),
        memoryview(PLAIN),
        encode(PIXELS, subsampling="4:4:4"),
        encode(PIXELS, subsampling="4:2:2"),
        encode(PIXELS, subsampling="4:2:0"),
        encode(PIXELS, optimize=True),
        encode(PIXELS, restart_marker_blocks=2),
        encode(PIXELS, quality=1),
        encode(PIXELS, comment="a comment", icc_profile=bytes(100_000), dpi=(72, 72)),
        encode(PIXELS[:, :, 0]),
        with_segment(PLAIN, 0xEE, b"Adobe\0\x64\0\0\0\0\x01"),
        with_segment(PLAIN, 0xEE, b"other"),
        without_segments(PLAIN, 0xE0),
        PLAIN + bytes(16),
        encode(PIXELS, exif=exif(1)),
    ],
)
def test_a_plain_jpeg_is_for_the_device(encoded: Any) -> None:
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
        encode(PIXELS, progressive=True),
        encode(Image.new("CMYK", (16, 16))),
        encode(PIXELS, keep_rgb=True),
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
def test_any_other_bytes_are_for_the_cpu(encoded: Any) -> None:
    assert read_plain_jpeg_header(encoded) is None


@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_read(orientation: int, byte_order: str) -> None:
    encoded = encode(PIXELS, exif=exif(orientation, byte_order))
    assert read_plain_jpeg_header(encoded) == JpegHeader(40, 56, orientation)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(orientation: int) -> None:
    assert read_plain_jpeg_header(encode(PIXELS, exif=exif(orientation))) == PLAIN_HEADER


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    "encoded",
    [
        encode(PIXELS, exif=b"Exif\0\0garbage"),
        encode(PIXELS, exif=b"Exif\0\0"),
        encode(PIXELS, exif=exif(6)[:-8]),
        encode(PIXELS, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        encode(PIXELS, exif=exif(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x04")),
        encode(PIXELS, exif=exif(6).replace(b"\x01\x0f\0\x02", b"\x01\x12\0\x03")),
        with_segment(encode(PIXELS, exif=exif(6)), 0xE1, exif(3)),
        with_segment(PLAIN, 0xE1, XMP),
    ],
)
def test_irregular_data_about_the_orientation_are_for_the_cpu(encoded: bytes) -> None:
    assert read_plain_jpeg_header(encoded) is None


def test_exif_data_come_before_xmp() -> None:
    encoded = with_segment(encode(PIXELS, exif=exif(3)), 0xE1, XMP)
    assert read_plain_jpeg_header(encoded) == JpegHeader(40, 56, 3)
    assert decode_image(encoded, CONFIG).shape == (40, 56, 3)  # Pillow agrees: not turned by 90 degrees


def test_no_damage_makes_the_scan_raise_or_disagree_with_pillow_about_the_size() -> None:
    dice = random.Random(3)
    sources = [PLAIN, encode(PIXELS, exif=exif(6)), encode(PIXELS[:, :, 0], restart_marker_blocks=1)]
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


# ------------------------------------------------------------------- whole batches, with a stand-in decoder


class StandInDecoder:
    """Decodes in place of nvJPEG, on the CPU, with its habit to refuse all for one."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.refused = 0

    def __call__(self, encoded: list[Tensor], device: torch.device) -> list[Tensor]:
        self.batch_sizes.append(len(encoded))
        try:
            images = [
                np.asarray(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")) for data in encoded
            ]
        except OSError as error:
            self.refused += 1
            raise RuntimeError("Error while decoding JPEG images") from error
        return [torch.tensor(image).permute(2, 0, 1).contiguous() for image in images]


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> StandInDecoder:
    stand_in = StandInDecoder()
    monkeypatch.setattr(device_preprocess, "decode_jpegs", stand_in)
    return stand_in


@pytest.fixture
def preprocessor(decoder: StandInDecoder) -> Iterator[DevicePreprocessor]:
    made = DevicePreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    yield made
    made.close()


@pytest.fixture
def plain_preprocessor() -> Iterator[ImagePreprocessor]:
    made = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    yield made
    made.close()


def corrupt_jpeg() -> bytes:
    """A header that the scan takes for plain, and tables that no decoder takes."""
    tables = PLAIN.index(b"\xff\xc4")
    corrupt = PLAIN[: tables + 5] + b"\xff" * 16 + PLAIN[tables + 21 :]
    assert read_plain_jpeg_header(corrupt) == PLAIN_HEADER
    return corrupt


MIXED = [
    encode(make_pixels(40, 56, 1)),
    encode(make_pixels(30, 20, 2), "PNG"),
    encode(make_pixels(300, 200, 3), progressive=True),
    encode(make_pixels(200, 300, 4), exif=exif(6)),
    encode(make_pixels(96, 128, 5)),
    encode(make_pixels(25, 31, 6), "WEBP", lossless=True),
    encode(make_pixels(17, 400, 7)[:, :, 0]),
    encode(Image.new("CMYK", (48, 24), (255, 0, 0, 0))),
]


def test_kinds_go_their_ways_and_the_order_is_kept(
    preprocessor: DevicePreprocessor, plain_preprocessor: ImagePreprocessor, decoder: StandInDecoder
) -> None:
    batch = preprocessor.prepare(MIXED)
    expected = plain_preprocessor.prepare(MIXED)
    assert decoder.batch_sizes == [4]
    assert batch.slots == list(range(8))
    assert batch.image_sizes_hw == expected.image_sizes_hw
    assert batch.errors == {}
    assert batch.pixels.shape == (8, 3, *INPUT_SIZE_HW)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert (batch.pixels.int() - expected.pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_on_the_way_of_the_device(
    preprocessor: DevicePreprocessor,
    plain_preprocessor: ImagePreprocessor,
    decoder: StandInDecoder,
    orientation: int,
) -> None:
    encoded = encode(make_pixels(50, 90), exif=exif(orientation))
    batch, expected = preprocessor.prepare([encoded]), plain_preprocessor.prepare([encoded])
    assert decoder.batch_sizes == [1]
    assert batch.image_sizes_hw == expected.image_sizes_hw
    assert (batch.pixels.int() - expected.pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_decoded_without_being_kept(
    preprocessor: DevicePreprocessor, decoder: StandInDecoder, wrap: Callable[[bytes], Any]
) -> None:
    encoded = wrap(PLAIN)
    assert preprocessor.prepare([encoded]).slots == [0]
    assert decoder.batch_sizes == [1]
    if isinstance(encoded, bytearray):
        encoded.clear()  # raises while a tensor still looks at it


def test_a_corrupt_neighbour_costs_only_itself(
    preprocessor: DevicePreprocessor, decoder: StandInDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    good = [encode(make_pixels(40, 50, seed)) for seed in range(3)]
    alone = [preprocessor.prepare([encoded]).pixels[0] for encoded in good]
    images = [b"", good[0], corrupt_jpeg(), good[1], PLAIN[:-100], good[2], b"%PDF"]
    with caplog.at_level(logging.WARNING):
        batch = preprocessor.prepare(images)
    assert decoder.refused == 1
    assert "refused a batch of 4" in caplog.text
    assert batch.slots == [1, 3, 5]
    assert {slot: type(error) for slot, error in batch.errors.items()} == {
        0: UnsupportedImageError,
        2: CorruptImageError,
        4: CorruptImageError,
        6: UnsupportedImageError,
    }
    assert torch.equal(batch.pixels, torch.stack(alone))


def test_errors_read_as_those_of_the_plain_way(plain_preprocessor: ImagePreprocessor) -> None:
    config = ServingConfig(image_formats=("PNG",), max_image_pixels=2000, max_image_bytes=4000)
    images = [
        PLAIN,
        encode(make_pixels(200, 200), "PNG"),
        bytes(5000),
        corrupt_jpeg(),
        encode(PIXELS, "BMP"),
    ]
    ways = [DevicePreprocessor(config, INPUT_SIZE_HW, CPU), ImagePreprocessor(config, INPUT_SIZE_HW, CPU)]
    found, expected = [
        {slot: (type(error), str(error)) for slot, error in way.prepare(images).errors.items()}
        for way in ways
    ]
    for way in ways:
        way.close()
    assert found == expected
    assert len(found) == 5


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_image_pixels": 40 * 56 - 1}, ImageTooLargeError),
        ({"max_image_bytes": len(PLAIN) - 1}, ImageTooLargeError),
        ({"image_formats": ("PNG",)}, UnsupportedImageError),
        ({"max_image_pixels": 40 * 56, "max_image_bytes": len(PLAIN), "image_formats": ("JPEG",)}, None),
    ],
)
def test_the_limits_hold_on_the_way_of_the_device(
    decoder: StandInDecoder, settings: dict[str, Any], error: type | None
) -> None:
    preprocessor = DevicePreprocessor(ServingConfig(**settings), INPUT_SIZE_HW, CPU)
    batch = preprocessor.prepare([PLAIN])
    preprocessor.close()
    assert [type(found) for found in batch.errors.values()] == ([error] if error else [])
    assert decoder.batch_sizes == ([] if error else [1])


@pytest.mark.parametrize("encoded_images", [[], [b"bad"], [b"bad", b"", corrupt_jpeg()]])
@pytest.mark.parametrize("into_buffer", [False, True])
def test_an_empty_batch_and_one_of_bad_images_only_work(
    preprocessor: DevicePreprocessor, encoded_images: list[bytes], into_buffer: bool
) -> None:
    out = network_input(4) if into_buffer else None
    batch = preprocessor.prepare(encoded_images, out)
    assert batch.pixels.shape == (0, 3, *INPUT_SIZE_HW)
    assert batch.image_sizes_hw == batch.slots == []
    assert sorted(batch.errors) == list(range(len(encoded_images)))


def test_a_decoder_that_finds_another_size_is_not_believed(
    preprocessor: DevicePreprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        device_preprocess,
        "decode_jpegs",
        lambda encoded, _: [torch.zeros(3, 40, 57, dtype=torch.uint8) for _ in encoded],
    )
    batch = preprocessor.prepare([PLAIN])
    assert batch.image_sizes_hw == [(40, 56)]
    assert batch.pixels.any()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_lack_of_memory_and_a_lost_device_are_no_fault_of_the_images(
    preprocessor: DevicePreprocessor, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("of the device")

    monkeypatch.setattr(device_preprocess, "decode_jpegs", fail)
    with pytest.raises(error, match="of the device"):
        preprocessor.prepare([PLAIN])


def test_the_threads_decode_while_the_device_does(
    preprocessor: DevicePreprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_in_thread = threading.Event()

    def decode_in_thread(encoded: Any) -> NDArray[np.uint8]:
        finished_in_thread.set()
        return PIXELS

    def decode_on_device(encoded: list[Tensor], _: torch.device) -> list[Tensor]:
        assert finished_in_thread.wait(10)
        return [torch.zeros(3, 40, 56, dtype=torch.uint8) for _ in encoded]

    monkeypatch.setattr(preprocessor, "_decode", decode_in_thread)
    monkeypatch.setattr(device_preprocess, "decode_jpegs", decode_on_device)
    assert preprocessor.prepare([PLAIN, encode(PIXELS, "PNG")]).slots == [0, 1]


def test_several_threads_may_prepare_at_once(preprocessor: DevicePreprocessor) -> None:
    expected = preprocessor.prepare(MIXED).pixels
    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(preprocessor.prepare, [MIXED] * 12):
            assert torch.equal(batch.pixels, expected)


# ---------------------------------------------------------------------------------------- static buffer


def network_input(batch_size: int, device: torch.device = CPU) -> Tensor:
    """(B, 3, H, W) channels last, every grey level 7."""
    canvas = torch.full((batch_size, *INPUT_SIZE_HW, 3), 7, dtype=torch.uint8, device=device)
    return canvas.permute(0, 3, 1, 2)


def test_pixels_are_written_to_the_first_rows_of_the_buffer(preprocessor: DevicePreprocessor) -> None:
    out = network_input(10)
    batch = preprocessor.prepare([b"bad", *MIXED], out)
    assert batch.slots == list(range(1, 9))
    assert batch.pixels.data_ptr() == out.data_ptr()
    assert batch.pixels.shape == (8, 3, *INPUT_SIZE_HW)
    assert torch.equal(out[:8], preprocessor.prepare(MIXED).pixels)
    assert (out[8:] == 7).all()


@pytest.mark.parametrize(
    "out",
    [network_input(1), network_input(4).contiguous(), network_input(4)[:, :, 1:], network_input(8)[::2]],
)
def test_a_buffer_that_does_not_fit_is_refused(preprocessor: DevicePreprocessor, out: Tensor) -> None:
    with pytest.raises(ValueError, match="channels last"):
        preprocessor.prepare(MIXED[:2], out)


# ------------------------------------------------------------------------------------------------ device


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def on_device(device: torch.device) -> Iterator[DevicePreprocessor]:
    made = DevicePreprocessor(CONFIG, (640, 640), device)
    yield made
    made.close()


@pytest.fixture
def on_cpu() -> Iterator[ImagePreprocessor]:
    made = ImagePreprocessor(CONFIG, (640, 640), CPU)
    yield made
    made.close()


@pytest.fixture
def smears(project_dir: Path) -> list[bytes]:
    encoded = [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))]
    assert len(encoded) == 3
    assert all(read_plain_jpeg_header(image) for image in encoded)
    return encoded


def level_difference(found: Tensor, expected: Tensor) -> Tensor:
    return (found.cpu().int() - expected.cpu().int()).abs().float()


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_decodes_real_images_as_the_cpu_does(
    on_device: DevicePreprocessor,
    on_cpu: ImagePreprocessor,
    smears: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch, expected = on_device.prepare(smears), on_cpu.prepare(smears)
    assert caplog.text == ""
    assert batch.pixels.is_cuda
    assert batch.image_sizes_hw == expected.image_sizes_hw
    assert level_difference(batch.pixels, expected.pixels).mean(dim=(1, 2, 3)).max() < 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"restart_marker_blocks": 3},
        {"optimize": True},
        {"exif": exif(6)},
        {"exif": exif(2)},
        {"grey": True},
        {"size_hw": (1, 1)},
        {"size_hw": (7, 9)},
        {"size_hw": (1080, 1920)},
    ],
    ids=str,
)
def test_a_gpu_decodes_every_plain_kind(
    on_device: DevicePreprocessor,
    on_cpu: ImagePreprocessor,
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pixels = make_pixels(*options.pop("size_hw", (300, 400)))
    encoded = encode(pixels[:, :, 0] if options.pop("grey", False) else pixels, quality=90, **options)
    assert read_plain_jpeg_header(encoded) is not None
    batch, expected = on_device.prepare([encoded] * 3), on_cpu.prepare([encoded] * 3)
    assert caplog.text == ""
    assert batch.image_sizes_hw == expected.image_sizes_hw
    # In the smallest image a repeated chroma value reaches far.
    tolerance_levels = 12 if expected.image_sizes_hw[0] == (7, 9) else 2
    assert level_difference(batch.pixels, expected.pixels).mean() < tolerance_levels
    assert torch.equal(batch.pixels[0], batch.pixels[2])


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_takes_mixed_kinds_and_survives_a_corrupt_one(
    on_device: DevicePreprocessor, on_cpu: ImagePreprocessor, smears: list[bytes]
) -> None:
    images = [*MIXED, corrupt_jpeg(), b"bad", *smears]
    for _ in range(3):  # the decoder must recover from each refusal
        batch, expected = on_device.prepare(images), on_cpu.prepare(images)
        assert batch.slots == expected.slots
        assert {slot: str(error) for slot, error in batch.errors.items()} == {
            slot: str(error) for slot, error in expected.errors.items()
        }
        # Repeated chroma values differ by up to 2 levels on average in the small images of steep colours.
        assert level_difference(batch.pixels, expected.pixels).mean(dim=(1, 2, 3)).max() < 4
        again = on_device.prepare(smears)
        assert again.slots == [0, 1, 2]
        assert level_difference(again.pixels, expected.pixels[-3:]).mean(dim=(1, 2, 3)).max() < 2


@pytest.mark.gpu
@needs_gpu
def test_a_scan_of_noise_costs_a_gpu_nothing_but_that_image(
    on_device: DevicePreprocessor, on_cpu: ImagePreprocessor, smears: list[bytes]
) -> None:
    dice = random.Random(5)
    for _ in range(20):
        damaged = bytearray(smears[0])
        scan = damaged.index(b"\xff\xda")
        for _ in range(200):
            damaged[dice.randrange(scan + 14, len(damaged) - 2)] = dice.randrange(255)
        batch, expected = on_device.prepare([damaged, *smears]), on_cpu.prepare(smears)
        assert batch.slots[-3:] == [1, 2, 3]
        assert level_difference(batch.pixels[-3:], expected.pixels).mean(dim=(1, 2, 3)).max() < 2


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_resizes_as_the_golden_file_says_within_one_level(
    on_device: DevicePreprocessor, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(shared_dir / "model"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import golden  # type: ignore[import-not-found]

    pixels = on_device.prepare([encode(image, "PNG") for image in golden.preprocess_images()]).pixels
    assert golden.check_preprocess(
        [row[None].cpu() for row in pixels],
        shared_dir / "model" / "golden_preprocess.npz",
        size=(640, 640),
        max_level=1,
    )


@pytest.mark.gpu
@needs_gpu
def test_what_the_gpu_has_yet_to_read_is_not_decoded_over(
    on_device: DevicePreprocessor, device: torch.device
) -> None:
    levels = (30, 90, 150, 210)
    colours = [encode(np.full((480, 640, 3), level, dtype=np.uint8)) for level in levels]
    canvases = torch.zeros(4, 8, 640, 640, 3, dtype=torch.uint8, device=device)
    outs = [canvas.permute(0, 3, 1, 2) for canvas in canvases]  # (B, H, W, 3) -> (B, 3, H, W)
    on_device.prepare(colours)  # the decoder and the kernel are set up
    for _ in range(5):
        # The stream is kept busy, so that the resizing of a batch is queued when the next one is decoded
        # (unless the decoder waits for the device by itself, which some versions do).
        torch.cuda._sleep(400_000_000)
        for encoded, out in zip(colours, outs, strict=True):
            on_device.prepare([encoded] * 8, out)
        for out, level in zip(outs, levels, strict=True):
            assert level_difference(out, torch.tensor(level)).max() <= 2


@pytest.mark.gpu
@needs_gpu
def test_memory_of_the_gpu_does_not_grow(
    on_device: DevicePreprocessor, device: torch.device, smears: list[bytes]
) -> None:
    images = [*smears, encode(make_pixels(50, 60), "PNG")] * 8
    out = torch.zeros(32, 640, 640, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    free_bytes = []
    for _ in range(60):
        on_device.prepare(images, out)
        torch.cuda.synchronize(device)
        free_bytes.append(torch.cuda.mem_get_info(device)[0])
    assert free_bytes[-1] >= free_bytes[20] - 2**20


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_resizes_with_the_kernel_as_in_plain_torch(
    on_device: DevicePreprocessor, device: torch.device
) -> None:
    images = [make_pixels(480, 640, 1), make_pixels(31, 900, 2), make_pixels(640, 640, 3)]
    pixels = on_device.prepare([encode(image, "PNG") for image in images]).pixels
    assert level_difference(pixels, resize_on_device(images, (640, 640), device)).max() <= 1
    assert torch.equal(pixels[2].cpu(), torch.tensor(images[2]).permute(2, 0, 1))
