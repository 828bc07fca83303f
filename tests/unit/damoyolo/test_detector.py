"""The detector of the demo weights: stages in order, an error per image, batch equals single."""

import contextlib
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from damoyolo.detector import WEIGHTS_FILE, Detector
from damoyolo.errors import ConfigError, CorruptImageError
from damoyolo.pipeline import CPU_BATCH_SIZE, EagerPipeline
from damoyolo.preprocess import PreparedBatch
from damoyolo.structures import Detections, RawPredictions, Work
from damoyolo.time_budget import TimeBudget


@pytest.fixture(scope="module")
def detector(demo_archive_dir):
    detector = Detector.from_archive_dir(demo_archive_dir)
    yield detector
    detector.close()


def assert_equal(found, expected, score_tolerance, box_tolerance_px):
    assert isinstance(found, Detections)
    assert isinstance(expected, Detections)
    assert found.image_size_hw == expected.image_size_hw
    assert len(found) == len(expected) > 0
    # Nearly equal scores may change places.
    orders = [np.lexsort((each.boxes_xyxy[:, 0], each.class_ids)) for each in (found, expected)]
    np.testing.assert_array_equal(found.class_ids[orders[0]], expected.class_ids[orders[1]])
    np.testing.assert_allclose(found.scores[orders[0]], expected.scores[orders[1]], atol=score_tolerance)
    np.testing.assert_allclose(
        found.boxes_xyxy[orders[0]], expected.boxes_xyxy[orders[1]], atol=box_tolerance_px
    )


def test_a_batch_equals_its_images_alone_and_a_corrupt_neighbour_costs_only_itself(detector, smears):
    options = detector.config.default_options()
    batch = [smears[0], smears[1][:4000], smears[1], b"", smears[2]]
    outcomes = detector.detect(batch, [options] * 5)
    assert isinstance(outcomes[1], CorruptImageError)
    assert outcomes[3].__class__.__name__ == "UnsupportedImageError"
    for slot, image in ((0, smears[0]), (2, smears[1]), (4, smears[2])):
        assert_equal(outcomes[slot], detector.detect([image], [options])[0], 1e-5, 1e-2)


def test_work_is_counted_until_it_is_read_and_a_failed_call_counts_nothing(detector, smears, monkeypatch):
    detector.read_work()
    options = detector.config.default_options()
    found = sum(len(detector.detect([image], [options])[0]) for image in smears[:2])
    detector.detect([b"no image"], [options])
    with monkeypatch.context() as patch:
        patch.setattr(detector.pipeline, "start", _fail)
        with pytest.raises(RuntimeError):
            detector.detect(smears[:1], [options])
    assert detector.read_work() == Work(cpu_images=2, detections=found)
    assert detector.read_work() == Work()


def _fail(*_):
    raise RuntimeError("out of memory")


def test_a_batch_of_bad_images_only_and_an_empty_one_are_answered(detector):
    options = detector.config.default_options()
    assert len(detector.detect([b"x", b"y"], [options] * 2)) == 2
    assert detector.detect([], []) == []


def test_the_stages_run_in_order_and_without_images_only_the_first(detector, smears):
    seen = []

    @contextlib.contextmanager
    def time_stage(stage):
        seen.append(stage)
        yield

    options = [detector.config.default_options()]
    detector.detect(smears[:1], options, time_stage)
    detector.detect([b"x"], options, time_stage)
    assert seen == ["preprocess", "network", "postprocess", "preprocess"]


def test_warming_up_runs_every_batch_size(detector, monkeypatch):
    seen = []
    pipeline = detector.pipeline
    assert isinstance(pipeline, EagerPipeline)
    backend = pipeline.backend
    monkeypatch.setattr(pipeline, "backend", lambda pixels: seen.append(len(pixels)) or backend(pixels))
    detector.warm_up((1, 2))
    assert seen == [1, 2]


def test_settings_that_do_not_fit_the_weights_are_refused(demo_archive_dir, demo_settings):
    for change in ({"class_names": ["one"]}, {"variant": "T"}):
        with pytest.raises(ConfigError, match="rebuild the archive"):
            Detector.from_settings(
                {**demo_settings, **change}, demo_archive_dir / WEIGHTS_FILE, torch.device("cpu")
            )


class FakePipeline:
    """Takes four images; predicts the first byte of each, which the next call overwrites."""

    max_batch_size = 4

    def __init__(self):
        self.result = torch.zeros(4)

    def network_call(self, pixels):
        def replay():
            self.result[: len(pixels)] = pixels[:, 0, 0, 0].float()
            return RawPredictions((self.result[: len(pixels)],), (self.result[: len(pixels)],))

        return replay


def raw_predictions(pipeline, *values):
    """Of images filled with these values."""
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    detector = SimpleNamespace(pipeline=pipeline)
    return Detector.raw_predictions(detector, pixels)


def test_later_calls_leave_raw_predictions_alone():
    pipeline = FakePipeline()
    first = raw_predictions(pipeline, 7, 8, 9)
    second = raw_predictions(pipeline, 1)
    assert [first.class_logits[0].tolist(), first.distance_logits[0].tolist()] == [[7, 8, 9]] * 2
    assert second.class_logits[0].tolist() == [1]


def test_raw_predictions_of_more_images_than_the_pipeline_takes_come_from_several_calls():
    assert raw_predictions(FakePipeline(), 1, 2, 3, 4, 5).class_logits[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("precision", "score_tolerance", "box_tolerance_px"),
    # Float32 too: nvJPEG repeats the pixels of the colour planes where the CPU's decoder blends them.
    [("fp32", 0.02, 1.0), ("tf32", 0.02, 1.0), ("amp", 0.02, 1.0), ("fp16", 0.02, 1.0), ("bf16", 0.05, 5.0)],
)
def test_a_gpu_finds_what_the_cpu_finds(
    demo_archive_dir, detector, smears, precision, score_tolerance, box_tolerance_px
):
    options = [detector.config.default_options()] * len(smears)
    on_gpu = Detector.from_archive_dir(demo_archive_dir, "cuda", precision)
    expected = detector.detect(smears, options)
    for found, wanted in zip(on_gpu.detect(smears, options), expected, strict=True):
        assert_equal(found, wanted, score_tolerance, box_tolerance_px)
    on_gpu.close()


def test_a_cuda_device_that_is_not_there_is_refused_with_the_number_of_those_that_are(
    demo_archive_dir, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device is cuda:1; CUDA devices found: 1"):
        Detector.from_archive_dir(demo_archive_dir, "cuda:1")


class RecordedParts:
    """A preprocessor and a pipeline of two images at a time, which note what is done when."""

    max_batch_size = 2
    pixels = None

    def __init__(self):
        self.done = []

    def prepare(self, images, out):
        self.done.append(f"prepare {images}")
        if "fails" in images:
            raise RuntimeError("out of memory")
        bad = {slot: "error" for slot, image in enumerate(images) if image == "bad"}
        slots = [slot for slot in range(len(images)) if slot not in bad]
        return PreparedBatch([images[slot] for slot in slots], [(1, 1)] * len(slots), slots, bad)

    def start(self, pixels, options, sizes, time_stage):
        self.done.append(f"start {pixels}")

        def finish():
            self.done.append(f"finish {pixels}")
            return [f"{image} {option}" for image, option in zip(pixels, options, strict=True)]

        return finish


def detect_in_parts(parts, images, time_budget=None):
    detector = SimpleNamespace(
        pipeline=parts, preprocessor=parts, time_budget=time_budget or TimeBudget(), _work=Work()
    )
    detector._start_batch = functools.partial(Detector._start_batch, detector)
    return Detector.detect(detector, images, list(range(len(images))))


def test_the_next_part_is_prepared_while_one_is_computed():
    parts = RecordedParts()
    assert detect_in_parts(parts, ["a", "b", "bad", "c", "bad"]) == ["a 0", "b 1", "error", "c 3", "error"]
    assert parts.done == [
        "prepare ['a', 'b']",
        "start ['a', 'b']",
        "prepare ['bad', 'c']",
        "finish ['a', 'b']",
        "start ['c']",
        "prepare ['bad']",
        "finish ['c']",
    ]


def test_a_part_is_finished_although_the_next_cannot_be_prepared():
    parts = RecordedParts()
    with pytest.raises(RuntimeError, match="out of memory"):
        detect_in_parts(parts, ["a", "b", "fails"])
    assert parts.done[-1] == "finish ['a', 'b']"


def test_parts_that_the_network_has_not_begun_in_time_get_503_and_those_before_are_finished():
    seconds = [0.0]
    budget = TimeBudget(10, lambda: seconds[0])

    class SlowParts(RecordedParts):
        def prepare(self, images, out):
            seconds[0] += 6
            return super().prepare(images, out)

    parts = SlowParts()
    with budget.batch():
        outcomes = detect_in_parts(parts, ["a", "b", "c", "bad", "d"], budget)
    assert outcomes[:2] == ["a 0", "b 1"]
    assert outcomes[3] == "error"
    assert [outcomes[slot].status for slot in (2, 4)] == [503, 503]
    assert [done for done in parts.done if done.startswith("start")] == ["start ['a', 'b']"]


def test_the_first_part_goes_to_the_network_however_long_its_images_took():
    seconds = [0.0]
    budget = TimeBudget(10, lambda: seconds[0])
    with budget.batch():
        seconds[0] = 20
        assert detect_in_parts(RecordedParts(), ["a", "bad"], budget) == ["a 0", "error"]


def test_a_cpu_gets_many_images_in_several_calls(detector, smears, monkeypatch):
    seen = []
    backend = detector.pipeline.backend
    monkeypatch.setattr(
        detector.pipeline, "backend", lambda pixels: seen.append(len(pixels)) or backend(pixels)
    )
    count = CPU_BATCH_SIZE + 1
    outcomes = detector.detect(
        [b"bad", *smears[:1] * count], [detector.config.default_options()] * (count + 1)
    )
    assert seen == [CPU_BATCH_SIZE - 1, 2]
    assert isinstance(outcomes[-1], Detections)


def test_a_command_has_no_limit_of_time(detector):
    assert detector.time_budget.limit_s == 0
    assert detector.pipeline.max_batch_size == CPU_BATCH_SIZE
