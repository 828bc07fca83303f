"""Files made to cost time or memory, and mutations of honest ones: each gives pixels or an error of ours."""

import base64
import io
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from damoyolo.config import ServingConfig
from damoyolo.cuda.jpeg import read_plain_jpeg_header
from damoyolo.decode import decode_image, prepare_decoders
from damoyolo.errors import RequestError
from damoyolo.formats import reduce_image
from damoyolo.preprocess import ImagePreprocessor
from damoyolo.service import DetectionService
from damoyolo.structures import Detections
from damoyolo.time_budget import TimeBudget
from doubles import hostile_images as hostile
from doubles.images import encode, exif, make_pixels

# Small enough that a flood is refused, and that no image takes long.
CONFIG = ServingConfig(
    class_names=("cell",),
    max_image_pixels=1_000_000,
    max_image_parts=2000,
    max_jpeg_scan_pixels=20_000_000,
    max_rle_pixels=100_000,
)
# A core decodes some 100 million pixels per second; the limits allow 1 to 20 million here.
GENEROUS_CPU_S = 5.0


def outcome_of(encoded, config):
    """Shape of the pixels, or the error."""
    try:
        return decode_image(encoded, config).shape
    except RequestError as error:
        return error


def cpu_seconds(function, *arguments):
    start = time.thread_time()
    result = function(*arguments)
    return result, time.thread_time() - start


# -------------------------------------------------------------------------------------------- classes


@pytest.fixture(scope="module")
def hostile_files():
    return list(hostile.hostile_images(128 * 1024))


@pytest.mark.slow
def test_no_hostile_file_takes_long_or_raises_anything_else(hostile_files):
    names = set()
    for name, encoded in hostile_files:
        names.add(name)
        outcome, seconds = cpu_seconds(outcome_of, encoded, CONFIG)
        assert seconds < GENEROUS_CPU_S, name
        if isinstance(outcome, RequestError):
            assert str(outcome).isascii(), name
            assert len(str(outcome)) < 300, name
        else:
            assert outcome[0] * outcome[1] <= CONFIG.max_image_pixels, name
    assert len(names) > 100


@pytest.mark.slow
def test_no_hostile_file_of_full_size_takes_long_with_the_default_settings():
    for name, encoded in hostile.hostile_images(31 * 1024 * 1024):
        _, seconds = cpu_seconds(outcome_of, encoded, ServingConfig())
        # The longest take what an honest image of 64 million pixels takes: 2 s on a 2-core server.
        assert seconds < 10, name


def test_a_reduced_file_is_no_longer_than_the_file(hostile_files):
    for name, encoded in hostile_files:
        try:
            reduced = reduce_image(encoded, CONFIG)
        except RequestError:
            continue
        assert len(reduced.data) <= len(encoded) + 1024, name  # nothing is unpacked
        assert 1 <= reduced.orientation <= 8


def test_nvjpeg_is_never_given_further_scans(hostile_files):
    plain = encode(make_pixels(40, 40), "JPEG")
    assert read_plain_jpeg_header(plain) is not None
    more = plain[:-2] + hostile.segment(0xDA, b"\1\1\0\0\x3f\0") * 3 + b"\xff\xd9"
    assert read_plain_jpeg_header(more) is None
    for name, encoded in hostile_files:
        if "scans" in name or "refinements" in name:
            assert read_plain_jpeg_header(encoded) is None, name


def test_no_library_writes_about_damaged_images(capfd):
    prepare_decoders()
    fax = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    for compression in (3, 4, 5, 7, 8, 32773):
        tags = hostile.tiff_tags(640, 2000, [16], [len(fax)], compression=compression, bits=1)
        outcome_of(hostile.tiff(tags, fax), ServingConfig())
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


# ---------------------------------------------------------------------------------- mutations of files


def _honest_files():
    pixels = make_pixels(24, 32)
    image = Image.fromarray(pixels)
    made = [
        encode(image.copy(), "JPEG", exif=exif(6)),
        encode(image.copy(), "JPEG", progressive=True, comment=b"abc"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image.copy(), "PNG", exif=exif(3)),
        encode(image.quantize(16), "PNG", transparency=1),
        encode(image.copy(), "WEBP", lossless=True, exif=exif(8)),
        encode(image.copy(), "WEBP", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
        encode(image.copy(), "BMP"),
        hostile.bmp(8, 4, 8, 1, b"\x08\1\0\0" * 4 + b"\0\1"),
        encode(image.copy(), "TIFF", exif=exif(5)),
        encode(image.copy(), "TIFF", compression="tiff_lzw"),
        encode(image.copy(), "TIFF", compression="jpeg"),
        encode(image.convert("1"), "TIFF", compression="group4"),
        encode(image.copy(), "TIFF", big_tiff=True),
        encode(image.copy(), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
    ]
    return [bytes(file) for file in made]


HONEST = _honest_files()
LARGE_NUMBERS = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", bytes(4))


@st.composite
def mutated_files(draw):
    """An honest file with bytes changed, cut out, repeated or put in, most of them near the start."""
    data = bytearray(draw(st.sampled_from(HONEST)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)) | st.integers(0, min(64, len(data))))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(("change", "cut", "repeat", "insert", "large number")))
        if kind == "change":
            data[at : at + 1] = bytes((draw(st.integers(0, 255)),))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = bytes(data[at : at + length]) * draw(st.integers(1, 200))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        else:
            data[at : at + 4] = draw(
                st.sampled_from((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", bytes(4)))
            )
    return bytes(data)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(mutated_files())
def test_a_mutated_file_gives_pixels_or_an_error_of_ours(encoded):
    outcome, seconds = cpu_seconds(outcome_of, encoded, CONFIG)
    assert seconds < GENEROUS_CPU_S
    if isinstance(outcome, RequestError):
        assert 400 <= outcome.status < 500
        assert len(str(outcome)) < 300
    else:
        height, width, channels = outcome
        assert height * width <= CONFIG.max_image_pixels
        assert channels == 3
        assert height * width == reduce_image(encoded, CONFIG).pixels


class DecodingDetector:
    """Decodes as a detector does, and finds nothing."""

    config = CONFIG
    device = torch.device("cpu")
    time_budget = TimeBudget()

    def __init__(self):
        self.preprocessor = ImagePreprocessor(CONFIG, (64, 64), self.device)

    def detect(self, images, options, time_stage):
        batch = self.preprocessor.prepare(images)
        found = {
            slot: Detections(
                np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64), size
            )
            for slot, size in zip(batch.slots, batch.image_sizes_hw, strict=True)
        }
        return [(found | batch.errors)[slot] for slot in range(len(images))]

    def close(self):
        self.preprocessor.close()


@pytest.fixture(scope="module")
def service():
    made = DetectionService(DecodingDetector())
    yield made
    made.close()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(mutated_files(), min_size=1, max_size=3), st.sampled_from(("", "image/png", "image/jpeg")))
def test_mutated_files_cost_no_neighbour_its_answer(service, files, accept):
    good = encode(make_pixels(24, 32), "PNG")
    rows = [{"body": bytearray(good)}, *({"body": bytearray(file)} for file in files)]
    first, *others = service.answer(rows, [{}, *([{"Accept": accept}] * len(files))])
    assert json.loads(first.body) == {"width": 32, "height": 24, "detections": []}
    for other in others:
        assert other.error is None or 400 <= other.error.status < 500
        if other.error is None and accept:
            with Image.open(io.BytesIO(other.body)) as drawn:
                assert drawn.format == accept.partition("/")[2].upper()


def test_hostile_files_cost_no_neighbour_its_answer(service, hostile_files):
    good = {"body": bytearray(encode(make_pixels(24, 32), "PNG"))}
    for name, encoded in hostile_files:
        first, bad, last = service.answer([good, {"body": bytearray(encoded)}, good], [{}] * 3)
        assert first.error is last.error is None, name
        assert bad.error is None or 400 <= bad.error.status < 500, name


def test_the_images_of_one_request_share_a_limit_of_pixels(service):
    large = base64.b64encode(encode(Image.new("1", (1000, 1000)), "PNG")).decode()
    config = ServingConfig(class_names=("cell",), max_instances_pixels=2_000_000)
    detector = DecodingDetector()
    detector.config = config
    limited = DetectionService(detector)
    bodies = [{"body": {"instances": [{"b64": large}] * count}} for count in (1, 2, 3)]
    answers = limited.answer(bodies, [{}] * 3)
    limited.close()
    assert [answer.error and answer.error.status for answer in answers] == [None, None, 413]
    assert "3000000 pixels" in str(answers[2].error)
    assert "max_instances_pixels" in str(answers[2].error)


def test_drawing_waits_for_memory_and_keeps_the_order():
    detector = DecodingDetector()
    detector.config = ServingConfig(class_names=("cell",), max_decode_bytes=1)
    one_at_a_time = DetectionService(detector)
    rows = [{"body": bytearray(encode(make_pixels(10 + i, 30), "PNG"))} for i in range(8)]
    answers = one_at_a_time.answer(rows, [{"Accept": "image/png"}] * 8)
    one_at_a_time.close()
    sizes = [Image.open(io.BytesIO(answer.body)).size for answer in answers]
    assert sizes == [(30, 10 + i) for i in range(8)]
