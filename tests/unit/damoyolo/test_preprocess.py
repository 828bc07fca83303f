"""Batches for a CPU and for a device, and the scale factors that undo the resizing."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, ImageTooLargeError, UnsupportedImageError
from damoyolo.preprocess import ImagePreprocessor, scale_factors_xyxy
from damoyolo.time_budget import TimeBudget
from doubles.images import encode, exif, make_pixels, png_of_header_only

CONFIG = ServingConfig()
CPU = torch.device("cpu")
INPUT_SIZE_HW = (96, 128)


class UploadingPreprocessor(ImagePreprocessor):
    """Prepares batches as for a GPU without nvJPEG, on the CPU."""

    def prepare(self, encoded_images, out=None):
        return self._prepare_on_device(encoded_images, out)


@pytest.fixture
def on_cpu():
    made = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    yield made
    made.close()


@pytest.fixture(params=[ImagePreprocessor, UploadingPreprocessor])
def preprocessor(request):
    """Both ways to prepare a batch."""
    made = request.param(CONFIG, INPUT_SIZE_HW, CPU)
    yield made
    made.close()


@pytest.mark.parametrize("module", ["decode", "orientation", "preprocess", "request", "response", "service"])
def test_the_plain_path_does_not_import_the_one_of_cuda(project_dir, module):
    assert "damoyolo.cuda" not in (project_dir / f"handler/damoyolo/{module}.py").read_text()


def test_the_batch_keeps_order_and_sizes(preprocessor):
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
        assert row.flatten(1).unique(dim=1).tolist() == [[value] for value in colour]


def test_a_corrupt_neighbour_costs_only_itself(preprocessor):
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
    assert batch.image_sizes_hw == [(40, 50)] * 3
    assert torch.equal(batch.pixels, torch.stack(alone))


@pytest.mark.parametrize("encoded_images", [[], [b"bad"], [b"bad", b"", b"worse"]])
def test_an_empty_batch_and_one_of_bad_images_only_work(preprocessor, encoded_images):
    batch = preprocessor.prepare(encoded_images)
    assert batch.pixels.shape == (0, 3, *INPUT_SIZE_HW)
    assert batch.image_sizes_hw == batch.slots == []
    assert list(batch.errors) == list(range(len(encoded_images)))


def test_an_error_that_is_not_about_the_image_is_not_hidden(preprocessor, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("damoyolo.preprocess.reduce_image", fail)
    with pytest.raises(ZeroDivisionError):
        preprocessor.prepare([encode(make_pixels(8, 8))])


def test_an_image_of_the_networks_size_is_copied_exactly(preprocessor):
    pixels = np.random.default_rng(0).integers(0, 256, (*INPUT_SIZE_HW, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(preprocessor.prepare([encode(pixels)]).pixels[0], expected)


@pytest.mark.parametrize("kind", [ImagePreprocessor, UploadingPreprocessor])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored_hw", [(192, 256), (384, 512), (194, 258), (193, 257), (768, 1024)])
def test_an_image_decoded_in_part_keeps_its_size_and_every_place(kind, orientation, stored_hw):
    encoded = encode(make_pixels(*stored_hw), "JPEG", quality=95, subsampling=0, exif=exif(orientation))
    in_full, in_part = (
        kind(ServingConfig(scaled_jpeg_decoding=share), INPUT_SIZE_HW, CPU) for share in (0.0, 0.7)
    )
    expected, found = in_full.prepare([encoded]), in_part.prepare([encoded])
    in_full.close()
    in_part.close()
    assert found.image_sizes_hw == expected.image_sizes_hw
    # The colours are linear in the place: one column of the network's input is 2 of 255 wide.
    assert (found.pixels.int() - expected.pixels.int()).abs().max() <= 5


def test_both_ways_of_resizing_agree_within_one(on_cpu):
    random = np.random.default_rng(0)
    encoded = [
        encode(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in [(1, 1), (2, 3), (37, 53), (96, 200), (192, 256), (500, 128), (333, 777)]
    ]
    uploading = UploadingPreprocessor(CONFIG, INPUT_SIZE_HW, CPU)
    out = torch.full((9, *INPUT_SIZE_HW, 3), 7, dtype=torch.uint8).permute(0, 3, 1, 2)
    pixels = uploading.prepare(encoded, out).pixels
    uploading.close()
    assert pixels.data_ptr() == out.data_ptr()
    assert (out[7:] == 7).all()
    assert (pixels.int() - on_cpu.prepare(encoded).pixels.int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_resizes_as_the_cpu_does(on_cpu):
    encoded = [encode(make_pixels(height, width)) for height, width in [(37, 53), (480, 640), (96, 128)]]
    on_gpu = ImagePreprocessor(CONFIG, INPUT_SIZE_HW, torch.device("cuda")).prepare([*encoded, b"bad"])
    assert on_gpu.pixels.is_cuda
    assert list(on_gpu.errors) == [3]
    assert (on_gpu.pixels.cpu().int() - on_cpu.prepare(encoded).pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("input_size_hw", [(640, 640), (416, 416)])
@pytest.mark.parametrize("kind", [ImagePreprocessor, UploadingPreprocessor])
def test_resizing_agrees_with_the_golden_file_within_one(golden, model_dir, input_size_hw, kind):
    preprocessor = kind(CONFIG, input_size_hw, CPU)
    encoded = [encode(image, compress_level=1) for image in golden.preprocess_images()]
    pixels = preprocessor.prepare(encoded).pixels
    preprocessor.close()
    assert golden.check_preprocess(
        [row[None] for row in pixels],
        model_dir / "golden_preprocess.npz",
        size=input_size_hw,
        max_level=1,
    )


# ---------------------------------------------------------------------------------------------- geometry


def test_the_scale_factors_undo_the_resizing():
    sizes_hw = [(480, 640), (1080, 1920), (37, 53)]
    factors = scale_factors_xyxy(sizes_hw, (640, 416))
    assert factors.dtype == np.float32
    expected = [(width / 416, height / 640) * 2 for height, width in sizes_hw]
    np.testing.assert_array_equal(factors, np.array(expected, dtype=np.float32))


def test_no_images_have_no_scale_factors():
    assert scale_factors_xyxy([], (640, 640)).shape == (0, 4)


def test_a_mark_is_found_where_the_scale_factors_say(preprocessor):
    pixels = np.zeros((300, 200, 3), dtype=np.uint8)
    pixels[150:180, 40:80] = 255
    batch = preprocessor.prepare([encode(pixels)])
    rows, columns = np.nonzero(batch.pixels[0, 0].numpy() > 127)
    box_xyxy = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    factors = scale_factors_xyxy(batch.image_sizes_hw, INPUT_SIZE_HW)[0]
    # The edges are known to within half an input pixel.
    assert (np.abs(box_xyxy * factors - [40, 150, 80, 180]) <= 0.51 * factors).all()


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", [ImagePreprocessor, UploadingPreprocessor])
def test_a_small_budget_of_memory_changes_neither_pixels_nor_order(kind):
    images = [encode(make_pixels(20 + 7 * i, 300 - 9 * i, i), "PNG") for i in range(9)]
    images[4] = b"bad"
    results = []
    for budget_bytes in (1, 400_000, 2**31):
        preprocessor = kind(
            ServingConfig(max_decode_bytes=budget_bytes, decode_threads=4), INPUT_SIZE_HW, CPU
        )
        results.append(preprocessor.prepare(images))
        preprocessor.close()
    for batch in results:
        assert batch.slots == [0, 1, 2, 3, 5, 6, 7, 8]
        assert batch.image_sizes_hw == results[-1].image_sizes_hw
        assert list(batch.errors) == [4]
        assert torch.equal(batch.pixels, results[-1].pixels)


def test_images_are_decoded_at_the_same_time_only_as_far_as_the_budget_goes(monkeypatch):
    running = []
    most = []

    def decode_slowly(*_):
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return np.zeros((50, 50, 3), np.uint8)

    monkeypatch.setattr("damoyolo.preprocess.decode_reduced", decode_slowly)
    encoded = encode(make_pixels(50, 50), "PNG")
    needed = 20 * 50 * 50 + 3 * 50 * INPUT_SIZE_HW[1]  # 20 bytes per pixel of PNG; the widened image
    config = ServingConfig(max_decode_bytes=2 * needed, decode_threads=8)
    preprocessor = ImagePreprocessor(config, INPUT_SIZE_HW, CPU)
    assert preprocessor.prepare([encoded] * 12).slots == list(range(12))
    preprocessor.close()
    assert max(most) <= 2


def test_a_lack_of_memory_is_not_blamed_on_an_image(on_cpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("damoyolo.preprocess._resize_into", fail)
    for _ in range(3):  # the bytes of the budget are given back
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            on_cpu.prepare([encode(make_pixels(8, 8))])


@pytest.mark.parametrize("kind", [ImagePreprocessor, UploadingPreprocessor])
@pytest.mark.parametrize("limit_s", [0, 10])
def test_images_that_are_not_begun_in_time_get_503_and_those_before_succeed(kind, limit_s, monkeypatch):
    seconds = [0.0]

    def decode(*_):
        seconds[0] += 6
        return np.zeros((50, 50, 3), np.uint8)

    monkeypatch.setattr("damoyolo.preprocess.decode_reduced", decode)
    budget = TimeBudget(limit_s, lambda: seconds[0])
    preprocessor = kind(ServingConfig(decode_threads=1), INPUT_SIZE_HW, CPU, budget)
    images = [encode(make_pixels(50, 50), "PNG")] * 4
    with budget.batch():
        batch = preprocessor.prepare(images)
    after = preprocessor.prepare(images)  # in no batch
    preprocessor.close()
    assert batch.slots == ([0, 1] if limit_s else [0, 1, 2, 3])
    assert {slot: error.status for slot, error in batch.errors.items()} == (
        {2: 503, 3: 503} if limit_s else {}
    )
    assert after.slots == [0, 1, 2, 3]
