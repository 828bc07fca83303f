"""Whole batches of mixed kinds: with a decoder in place of nvJPEG on the CPU, and on a GPU."""

import io
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from damoyolo.config import ServingConfig
from damoyolo.cuda import preprocess as device_preprocess
from damoyolo.cuda.jpeg import JpegHeader, read_plain_jpeg_header
from damoyolo.cuda.preprocess import DevicePreprocessor
from damoyolo.errors import CorruptImageError, ImageTooLargeError, UnsupportedImageError
from damoyolo.preprocess import ImagePreprocessor
from damoyolo.time_budget import TimeBudget
from doubles.images import encode, encode_jpeg, exif, make_pixels

CONFIG = ServingConfig()
CPU = torch.device("cpu")
INPUT_SIZE_HW = (96, 128)

PIXELS = make_pixels(40, 56)
PLAIN = encode_jpeg(PIXELS)
_TABLES = PLAIN.index(b"\xff\xc4")
# A plain header, and tables that no decoder accepts.
CORRUPT = PLAIN[: _TABLES + 5] + b"\xff" * 16 + PLAIN[_TABLES + 21 :]


def errors_of(batch):
    return {slot: (type(error), str(error)) for slot, error in batch.errors.items()}


class StandInDecoder:
    """Decodes in place of nvJPEG, on the CPU; refuses a whole batch for one bad image, as that does."""

    def __init__(self):
        self.batch_sizes = []
        self.refused = 0

    def __call__(self, encoded, device):
        self.batch_sizes.append(len(encoded))
        try:
            images = [Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB") for data in encoded]
        except OSError as error:
            self.refused += 1
            raise RuntimeError("Error while decoding JPEG images") from error
        return [torch.tensor(np.asarray(image)).permute(2, 0, 1).contiguous() for image in images]


@pytest.fixture
def decoder(monkeypatch):
    stand_in = StandInDecoder()
    monkeypatch.setattr(device_preprocess, "decode_jpegs", stand_in)
    return stand_in


@pytest.fixture
def preprocessor(decoder):
    made = DevicePreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    yield made
    made.close()


@pytest.fixture
def plain_preprocessor():
    made = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    yield made
    made.close()


MIXED = [
    encode_jpeg(make_pixels(40, 56, 1)),
    encode(make_pixels(30, 20, 2), "PNG"),
    encode_jpeg(make_pixels(300, 200, 3), progressive=True),
    encode_jpeg(make_pixels(200, 300, 4), exif=exif(6)),
    encode_jpeg(make_pixels(96, 128, 5)),
    encode(make_pixels(25, 31, 6), "WEBP", lossless=True),
    encode_jpeg(make_pixels(17, 400, 7)[:, :, 0]),
    encode_jpeg(Image.new("CMYK", (48, 24), (255, 0, 0, 0))),
]


def test_kinds_go_their_ways_and_the_order_is_kept(preprocessor, plain_preprocessor, decoder):
    oriented = [encode_jpeg(make_pixels(50, 90), exif=exif(orientation)) for orientation in range(1, 9)]
    batch = preprocessor.prepare(MIXED + oriented)
    expected = plain_preprocessor.prepare(MIXED + oriented)
    assert decoder.batch_sizes == [4 + 8]
    assert (batch.on_device, expected.on_device) == (4 + 8, 0)
    assert batch.slots == list(range(16))
    assert batch.image_sizes_hw == expected.image_sizes_hw
    assert batch.errors == {}
    assert batch.pixels.shape == (16, 3, *INPUT_SIZE_HW)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert (batch.pixels.int() - expected.pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_decoded_without_being_kept(preprocessor, decoder, wrap):
    encoded = wrap(PLAIN)
    assert preprocessor.prepare([encoded]).slots == [0]
    assert decoder.batch_sizes == [1]
    if isinstance(encoded, bytearray):
        encoded.clear()  # raises while a tensor still looks at it


def test_a_corrupt_neighbour_costs_only_itself(preprocessor, plain_preprocessor, decoder, caplog):
    assert read_plain_jpeg_header(CORRUPT) == JpegHeader(40, 56, 1)
    good = [encode_jpeg(make_pixels(40, 50, seed)) for seed in range(3)]
    alone = [preprocessor.prepare([encoded]).pixels[0] for encoded in good]
    images = [b"", good[0], CORRUPT, good[1], PLAIN[:-100], good[2], b"%PDF"]
    with caplog.at_level(logging.WARNING):
        batch = preprocessor.prepare(images)
    assert decoder.refused == 1
    assert batch.on_device == 0
    assert "refused a batch of 4" in caplog.text
    assert batch.slots == [1, 3, 5]
    assert list(batch.errors) == [0, 2, 4, 6]
    assert isinstance(batch.errors[2], CorruptImageError)
    assert errors_of(batch) == errors_of(plain_preprocessor.prepare(images))
    assert torch.equal(batch.pixels, torch.stack(alone))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_image_pixels": 40 * 56 - 1}, ImageTooLargeError),
        ({"max_image_bytes": len(PLAIN) - 1}, ImageTooLargeError),
        ({"image_formats": ("PNG",)}, UnsupportedImageError),
        ({"max_image_pixels": 40 * 56, "max_image_bytes": len(PLAIN), "image_formats": ("JPEG",)}, None),
    ],
)
def test_the_limits_hold_for_images_decoded_on_the_device(decoder, settings, error):
    config = ServingConfig(**settings)
    on_device = DevicePreprocessor(config, INPUT_SIZE_HW, CPU)
    on_cpu = ImagePreprocessor(config, INPUT_SIZE_HW, CPU)
    batch, expected = on_device.prepare([PLAIN]), on_cpu.prepare([PLAIN])
    on_device.close()
    on_cpu.close()
    assert [type(found) for found in batch.errors.values()] == ([error] if error else [])
    assert errors_of(batch) == errors_of(expected)
    assert decoder.batch_sizes == ([] if error else [1])


@pytest.mark.parametrize("encoded_images", [[], [b"bad"], [b"bad", b"", CORRUPT]])
@pytest.mark.parametrize("into_buffer", [False, True])
def test_an_empty_batch_and_one_of_bad_images_only_work(preprocessor, encoded_images, into_buffer):
    out = network_input(4) if into_buffer else None
    batch = preprocessor.prepare(encoded_images, out)
    assert batch.pixels.shape == (0, 3, *INPUT_SIZE_HW)
    assert batch.image_sizes_hw == batch.slots == []
    assert sorted(batch.errors) == list(range(len(encoded_images)))


def test_a_result_of_another_size_than_the_header_says_is_not_used(preprocessor, monkeypatch):
    wrong = torch.zeros(3, 40, 57, dtype=torch.uint8)
    monkeypatch.setattr(device_preprocess, "decode_jpegs", lambda *_: [wrong])
    batch = preprocessor.prepare([PLAIN])
    assert batch.image_sizes_hw == [(40, 56)]
    assert batch.pixels.any()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_lack_of_memory_and_a_lost_device_are_not_blamed_on_the_images(preprocessor, monkeypatch, error):
    def fail(*_):
        raise error("of the device")

    monkeypatch.setattr(device_preprocess, "decode_jpegs", fail)
    monkeypatch.setattr("damoyolo.failures.is_alive", lambda _: error is torch.OutOfMemoryError)
    with pytest.raises(error, match="of the device"):
        preprocessor.prepare([PLAIN])


def test_the_threads_decode_while_the_device_does(preprocessor, monkeypatch):
    finished_in_thread = threading.Event()

    def decode_in_thread(encoded):
        finished_in_thread.set()
        return PIXELS

    def decode_on_device(encoded, _):
        assert finished_in_thread.wait(10)
        return [torch.zeros(3, 40, 56, dtype=torch.uint8) for _ in encoded]

    monkeypatch.setattr(preprocessor, "_decode", decode_in_thread)
    monkeypatch.setattr(device_preprocess, "decode_jpegs", decode_on_device)
    assert preprocessor.prepare([PLAIN, encode(PIXELS, "PNG")]).slots == [0, 1]


def test_several_threads_may_prepare_at_once(preprocessor):
    expected = preprocessor.prepare(MIXED).pixels
    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(preprocessor.prepare, [MIXED] * 12):
            assert torch.equal(batch.pixels, expected)


def test_after_the_time_of_a_batch_neither_decoder_begins_an_image(decoder):
    seconds = [0.0]
    budget = TimeBudget(10, lambda: seconds[0])
    preprocessor = DevicePreprocessor(CONFIG, INPUT_SIZE_HW, CPU, budget)
    with budget.batch():
        assert preprocessor.prepare(MIXED).errors == {}
        decoder.batch_sizes.clear()
        seconds[0] = 10.0
        batch = preprocessor.prepare([*MIXED, b"bad"])
    preprocessor.close()
    assert decoder.batch_sizes == []
    assert batch.slots == []
    assert [error.status for error in batch.errors.values()] == [503] * len(MIXED) + [415]


def test_images_that_do_not_fit_the_memory_together_are_prepared_one_after_the_other(preprocessor, decoder):
    expected = preprocessor.prepare(MIXED)
    decoder.batch_sizes.clear()
    one_by_one = DevicePreprocessor(ServingConfig(max_decode_bytes=1), INPUT_SIZE_HW, CPU)
    batch = one_by_one.prepare([*MIXED, b"bad"], network_input(9))
    one_by_one.close()
    assert decoder.batch_sizes == [1, 1, 1, 1]
    assert batch.slots == expected.slots
    assert list(batch.errors) == [len(MIXED)]
    assert batch.image_sizes_hw == expected.image_sizes_hw
    assert torch.equal(batch.pixels, expected.pixels)


# ---------------------------------------------------------------------------------------- static buffer


def network_input(batch_size):
    """(B, 3, H, W) channels last, every value 7."""
    canvas = torch.full((batch_size, *INPUT_SIZE_HW, 3), 7, dtype=torch.uint8)
    return canvas.permute(0, 3, 1, 2)


def test_pixels_are_written_to_the_first_rows_of_the_buffer(preprocessor):
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
def test_a_buffer_that_does_not_fit_is_refused(preprocessor, out):
    with pytest.raises(ValueError, match="channels last"):
        preprocessor.prepare(MIXED[:2], out)


# ------------------------------------------------------------------------------------------------ device


NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=[pytest.param("cuda", marks=NEEDS_GPU)])
def device(request):
    """The current GPU; marks each test that uses it."""
    return torch.device(request.param, torch.cuda.current_device())


@pytest.fixture
def on_device(device):
    made = DevicePreprocessor(CONFIG, (640, 640), device)
    yield made
    made.close()


@pytest.fixture
def on_cpu():
    made = ImagePreprocessor(CONFIG, (640, 640), CPU)
    yield made
    made.close()


@pytest.fixture
def smears(project_dir):
    encoded = [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))]
    assert len(encoded) == 3
    assert all(read_plain_jpeg_header(image) for image in encoded)
    return encoded


def difference(found, expected):
    return (found.cpu().int() - expected.cpu().int()).abs().float()


def test_a_gpu_decodes_real_images_as_the_cpu_does(on_device, on_cpu, smears, caplog):
    batch, expected = on_device.prepare(smears), on_cpu.prepare(smears)
    assert caplog.text == ""
    assert batch.pixels.is_cuda
    assert batch.image_sizes_hw == expected.image_sizes_hw
    assert difference(batch.pixels, expected.pixels).mean(dim=(1, 2, 3)).max() < 2


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
def test_a_gpu_decodes_every_plain_kind(on_device, on_cpu, options, caplog):
    pixels = make_pixels(*options.pop("size_hw", (300, 400)))
    encoded = encode_jpeg(pixels[:, :, 0] if options.pop("grey", False) else pixels, quality=90, **options)
    assert read_plain_jpeg_header(encoded) is not None
    batch, expected = on_device.prepare([encoded] * 3), on_cpu.prepare([encoded] * 3)
    assert caplog.text == ""
    assert batch.image_sizes_hw == expected.image_sizes_hw
    # In the smallest images a repeated chroma value covers much.
    tolerance = 12 if expected.image_sizes_hw[0] == (7, 9) else 2
    assert difference(batch.pixels, expected.pixels).mean() < tolerance
    assert torch.equal(batch.pixels[0], batch.pixels[2])


def test_a_gpu_takes_mixed_kinds_and_survives_a_corrupt_one(on_device, on_cpu, smears):
    images = [*MIXED, CORRUPT, b"bad", *smears]
    for _ in range(3):  # the decoder must recover from each refusal
        batch, expected = on_device.prepare(images), on_cpu.prepare(images)
        assert batch.slots == expected.slots
        assert errors_of(batch) == errors_of(expected)
        # Repeated chroma values differ by up to 2 on average in small images of steep gradients.
        assert difference(batch.pixels, expected.pixels).mean(dim=(1, 2, 3)).max() < 4
        again = on_device.prepare(smears)
        assert again.slots == [0, 1, 2]
        assert difference(again.pixels, expected.pixels[-3:]).mean(dim=(1, 2, 3)).max() < 2


def test_a_scan_of_noise_costs_a_gpu_nothing_but_that_image(on_device, on_cpu, smears):
    dice = random.Random(5)
    for _ in range(20):
        damaged = bytearray(smears[0])
        scan = damaged.index(b"\xff\xda")
        for _ in range(200):
            damaged[dice.randrange(scan + 14, len(damaged) - 2)] = dice.randrange(255)
        batch, expected = on_device.prepare([damaged, *smears]), on_cpu.prepare(smears)
        assert batch.slots[-3:] == [1, 2, 3]
        assert difference(batch.pixels[-3:], expected.pixels).mean(dim=(1, 2, 3)).max() < 2


def test_a_gpu_resizes_as_the_golden_file_says_within_one(on_device, golden, model_dir):
    pixels = on_device.prepare([encode(image) for image in golden.preprocess_images()]).pixels
    assert golden.check_preprocess(
        [row[None].cpu() for row in pixels],
        model_dir / "golden_preprocess.npz",
        size=(640, 640),
        max_level=1,
    )


def test_what_the_gpu_has_yet_to_read_is_not_decoded_over(on_device, device):
    values = (30, 90, 150, 210)
    colours = [encode_jpeg(np.full((480, 640, 3), value, dtype=np.uint8)) for value in values]
    canvases = torch.zeros(4, 8, 640, 640, 3, dtype=torch.uint8, device=device)
    outs = [canvas.permute(0, 3, 1, 2) for canvas in canvases]  # (B, H, W, 3) -> (B, 3, H, W)
    on_device.prepare(colours)  # set up the decoder and the kernel
    for _ in range(5):
        # The stream is kept busy, so that the resizing of a batch is queued when the next one is decoded
        # (unless the decoder waits for the device by itself, which some versions do).
        torch.cuda._sleep(400_000_000)
        for encoded, out in zip(colours, outs, strict=True):
            on_device.prepare([encoded] * 8, out)
        for out, value in zip(outs, values, strict=True):
            assert difference(out, torch.tensor(value)).max() <= 2


def test_memory_of_the_gpu_does_not_grow(on_device, device, smears):
    images = [*smears, encode(make_pixels(50, 60), "PNG")] * 8
    out = torch.zeros(32, 640, 640, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    free_bytes = []
    for _ in range(60):
        on_device.prepare(images, out)
        torch.cuda.synchronize(device)
        free_bytes.append(torch.cuda.mem_get_info(device)[0])
    assert free_bytes[-1] >= free_bytes[20] - 2**20


def test_groups_that_follow_each_other_on_a_device_give_the_pixels_of_one_batch(on_device, device, smears):
    expected = on_device.prepare([*MIXED, *smears])
    one_by_one = DevicePreprocessor(ServingConfig(max_decode_bytes=1), (640, 640), device)
    for _ in range(20):  # memory of an earlier group is used again by a later one
        batch = one_by_one.prepare([*MIXED, *smears])
        assert batch.image_sizes_hw == expected.image_sizes_hw
        # nvJPEG chooses its way by the size of its batch.
        assert (batch.pixels.int() - expected.pixels.int()).abs().max() <= 2
    one_by_one.close()
