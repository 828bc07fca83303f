"""Everything works on the second GPU while the first is the current one, and gives the same there."""

import json

import pytest
import torch

import evaluate
from damoyolo.cuda.kernels.epilogue import add_bias_and_activate
from damoyolo.cuda.kernels.pointwise import pointwise_conv
from damoyolo.cuda.kernels.pooling import pyramid_max_pool
from damoyolo.cuda.kernels.resize import resize_images
from damoyolo.cuda.kernels.stem import focus_stem
from damoyolo.detector import WEIGHTS_FILE, Detector
from damoyolo.orientation import OrientedImage
from damoyolo.stage_timing import StageClock
from doubles.answers import assert_same_detections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
# cuDNN times its kernels on each device by itself; another choice rounds fp16 sums differently.
SCORE_TOLERANCE, BOX_TOLERANCE_PX = 0.02, 1.5


@pytest.fixture(autouse=True)
def _first_device_stays_current():
    torch.cuda.set_device(FIRST)
    yield
    assert torch.cuda.current_device() == 0


def open_detector(settings, folder, device, **changes):
    settings = {**settings, "precision": "fp16", "graph_batch_sizes": [1, 4], **changes}
    return Detector.from_settings(settings, folder / WEIGHTS_FILE, device)


def random(*shape, device):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return values.to(device, torch.float16, memory_format=memory_format)


def random_pixels(*shape, device):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(device, torch.uint8)


def resized(device):
    out = torch.zeros((1, 32, 32, 3), dtype=torch.uint8, device=device)
    resize_images([OrientedImage(random_pixels(20, 30, 3, device=device), 6)], out)
    return out


OPERATIONS = {
    "epilogue": lambda device: add_bias_and_activate(
        random(2, 64, 9, 11, device=device), random(64, device=device), "silu"
    ),
    "pointwise": lambda device: pointwise_conv(
        [random(2, 32, 8, 8, device=device)], random(64, 32, device=device), random(64, device=device), "relu"
    )[0],
    "pooling": lambda device: pyramid_max_pool(random(2, 64, 9, 11, device=device)),
    "stem": lambda device: focus_stem(
        random_pixels(2, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last),
        random(32, 3, 6, 6, device=device),
        random(32, device=device),
        None,
        None,
        torch.float16,
    ),
    "resize": resized,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kernel_gives_the_same_on_both_devices(name):
    first, second = (OPERATIONS[name](device) for device in (FIRST, SECOND))
    torch.cuda.synchronize(SECOND)
    assert second.device == SECOND
    assert torch.equal(first.cpu(), second.cpu())
    assert bool(first.any())


@pytest.mark.parametrize("changes", [{}, {"cuda_graphs": False}, {"gpu_jpeg_decoding": False}])
def test_a_detector_finds_the_same_on_both_devices(changes, demo_settings, demo_archive_dir, smears):
    detectors = [open_detector(demo_settings, demo_archive_dir, each, **changes) for each in (FIRST, SECOND)]
    options = [detectors[0].config.default_options()] * 5
    batch = [smears[index % 3] for index in range(5)]  # cut up, and padded
    pixels = [detector.preprocessor.prepare(batch[:4]).pixels.cpu() for detector in detectors]
    assert torch.equal(*pixels)
    clock = StageClock(SECOND)
    expected = detectors[0].detect(batch, options)
    allocated = torch.cuda.memory_allocated(FIRST)
    found = detectors[1].detect(batch, options, clock)
    assert torch.cuda.memory_allocated(FIRST) <= allocated
    for one, other in zip(expected, found, strict=True):
        assert len(one) > 10
        answer = {
            "width": other.image_size_hw[1],
            "height": other.image_size_hw[0],
            "detections": [
                {"class_id": class_id, "score": score, "bbox": box}
                for class_id, score, box in zip(
                    other.class_ids.tolist(), other.scores.tolist(), other.boxes_xyxy.tolist(), strict=True
                )
            ],
        }
        assert_same_detections(answer, one, SCORE_TOLERANCE, BOX_TOLERANCE_PX)
    seconds = clock.read_seconds()
    # Shorter than a replay takes, were the events on the other device's stream.
    assert seconds["network"] > 1e-4
    for detector in detectors:
        detector.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and its imports
def test_the_evaluation_gives_the_same_on_both_devices(
    project_dir, demo_settings, demo_archive_dir, tmp_path
):
    pytest.importorskip("pycocotools")
    names = demo_settings["class_names"]
    folder = project_dir / "tests/data/smears"
    paths = sorted(folder.glob("*.jpg"))
    content = {
        "images": [{"id": index, "file_name": path.name} for index, path in enumerate(paths)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
        "annotations": [
            {"image_id": index, "category_id": names.index(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for index, path in enumerate(paths)
            for label, x1, y1, x2, y2 in json.loads(path.with_suffix(".json").read_text())
        ],
    }
    (tmp_path / "smears.json").write_text(json.dumps(content))
    command = ["--coco", str(tmp_path / "smears.json"), "--images", str(folder), "--precision", "fp16"]
    command += ["--archive", str(demo_archive_dir), "--jsonl", str(tmp_path / "rows.json")]
    for device in ("cuda:0", "cuda:1"):
        assert evaluate.main([*command, "--device", device]) == 0
    first, second = map(json.loads, (tmp_path / "rows.json").read_text().splitlines())
    assert second["device"].startswith("cuda:1")
    # Of some 50 objects, one that crosses the score threshold moves AP by no more than 1/50.
    assert abs(first["ap"] - second["ap"]) <= 0.02
