"""The kernels of `DevicePostprocess` against `postprocess`, which defines their result."""

import dataclasses
import os

import numpy as np
import pytest
import torch

from damoyolo.boxes import class_scores, decode_predictions
from damoyolo.postprocess import nms_per_group, postprocess
from damoyolo.structures import DetectionOptions, RawPredictions

pytest.importorskip("triton")

from damoyolo.cuda.postprocess import DevicePostprocess, _logit_bounds

# The interpreter computes with NumPy, which warns of 0 / 0 and inf - inf; here both are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

needs_cuda = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available(), reason="needs a CUDA device"
)

INPUT_SIZE_HW = (96, 64)
LEVEL_SIZES_HW = ((12, 8), (6, 4), (3, 2))
LARGE_SIZE_HW = (640, 640)
LARGE_LEVEL_SIZES_HW = ((80, 80), (40, 40), (20, 20))
MAX_CANDIDATES = 8192
R = 7
PLAIN = DetectionOptions(score_threshold=0.75, iou_threshold=0.5, max_detections=1000)
MIXED = [
    PLAIN,
    dataclasses.replace(PLAIN, score_threshold=0.85),
    dataclasses.replace(PLAIN, iou_threshold=0.1, max_detections=7),
    dataclasses.replace(PLAIN, class_ids=(1, 4)),
    dataclasses.replace(PLAIN, class_agnostic=True),
    dataclasses.replace(PLAIN, class_ids=()),
]
MIXED_SIZES_HW = [(96, 64), (480, 640), (37, 53), (1080, 1920), (5, 4000), (64, 96)]


def random_predictions(
    device, *, batch_size, num_classes, level_sizes_hw=LEVEL_SIZES_HW, reg_max=R, dtype=torch.float32, seed=0
):
    """Classes and distances as ranges of channels of one channels_last tensor a level."""
    generator = torch.Generator().manual_seed(seed)
    channels = num_classes + 4 * (reg_max + 1)
    merged = [
        torch.randn(batch_size, channels, h, w, generator=generator)
        .to(device, dtype)
        .to(memory_format=torch.channels_last)
        for h, w in level_sizes_hw
    ]
    return RawPredictions(
        tuple(level[:, :num_classes] for level in merged), tuple(level[:, num_classes:] for level in merged)
    )


def blank_predictions(device, *, batch_size, num_classes=1):
    """No candidates above a score of 0.001; all boxes without area."""
    class_logits = [torch.full((batch_size, num_classes, h, w), -9.0) for h, w in LEVEL_SIZES_HW]
    distance_logits = [torch.full((batch_size, 4 * (R + 1), h, w), -torch.inf) for h, w in LEVEL_SIZES_HW]
    for level in distance_logits:
        level[:, :: R + 1] = 0.0
    return RawPredictions(
        tuple(level.to(device) for level in class_logits),
        tuple(level.to(device) for level in distance_logits),
    )


def made_for(raw, **settings):
    class_logits, distance_logits = raw
    return DevicePostprocess(
        len(class_logits[0]),
        class_logits[0].shape[1],
        [(level.shape[2], level.shape[3]) for level in class_logits],
        distance_logits[0].shape[1] // 4 - 1,
        class_logits[0].device,
        **{"max_candidates": MAX_CANDIDATES, "capacity": 128, "max_kept": 100, **settings},
    )


def run(stage, raw, options, sizes_hw=None, input_size_hw=INPUT_SIZE_HW):
    sizes_hw = [input_size_hw] * len(options) if sizes_hw is None else sizes_hw
    stage.set_options(options, sizes_hw, input_size_hw)
    stage.launch(raw)
    if raw.class_logits[0].is_cuda:
        torch.cuda.synchronize()
    return stage.collect(raw, options, sizes_hw, input_size_hw)


def reference(raw, options, sizes_hw=None, input_size_hw=INPUT_SIZE_HW):
    sizes_hw = [input_size_hw] * len(options) if sizes_hw is None else sizes_hw
    first = RawPredictions(*(tuple(level[: len(options)] for level in levels) for levels in raw))
    return postprocess(first, options, sizes_hw, input_size_hw, MAX_CANDIDATES)


def assert_same(got, wanted):
    """The same detections; exponentials and the order of their sums may differ in the last digits."""
    assert len(got) == len(wanted)
    for got_image, wanted_image in zip(got, wanted, strict=True):
        assert got_image.image_size_hw == wanted_image.image_size_hw
        np.testing.assert_array_equal(got_image.class_ids, wanted_image.class_ids)
        np.testing.assert_allclose(got_image.scores, wanted_image.scores, rtol=1e-6, atol=0)
        np.testing.assert_allclose(got_image.boxes_xyxy, wanted_image.boxes_xyxy, rtol=2e-6, atol=1e-3)
        assert got_image.boxes_xyxy.dtype == got_image.scores.dtype == np.float32
        assert got_image.class_ids.dtype == np.int64


@pytest.mark.parametrize(
    ("num_classes", "score_threshold", "dtype"),
    [(5, 0.75, torch.float32), (5, 0.75, torch.bfloat16), (80, 0.95, torch.float16)],
)
def test_each_image_gets_what_the_reference_gives_it(kernel_device, num_classes, score_threshold, dtype):
    raw = random_predictions(kernel_device, batch_size=7, num_classes=num_classes, dtype=dtype)
    options = [
        dataclasses.replace(option, score_threshold=max(score_threshold, option.score_threshold))
        for option in MIXED
    ]
    stage = made_for(raw)
    got = run(stage, raw, options, MIXED_SIZES_HW)
    assert stage.overflowed(len(options)) == []
    assert [len(detections) > 0 for detections in got] == [True] * 5 + [False]
    assert_same(got, reference(raw, options, MIXED_SIZES_HW))


def test_any_strides_will_do(kernel_device):
    merged = random_predictions(kernel_device, batch_size=2, num_classes=3)
    contiguous = RawPredictions(*(tuple(level.contiguous() for level in levels) for levels in merged))
    shifted = RawPredictions(
        *(
            tuple(torch.nn.functional.pad(level, (1, 2, 1, 0))[:, :, 1:, 1:-2] for level in levels)
            for levels in merged
        )
    )
    wanted = reference(merged, [PLAIN] * 2)
    for raw in (contiguous, shifted):
        assert_same(run(made_for(raw), raw, [PLAIN] * 2), wanted)


def test_images_that_outgrow_the_buffers_get_the_same_result(kernel_device):
    raw = random_predictions(kernel_device, batch_size=5, num_classes=5)
    many = dataclasses.replace(PLAIN, score_threshold=0.5)
    few = dataclasses.replace(PLAIN, score_threshold=0.9)
    options = [few, many, PLAIN, dataclasses.replace(PLAIN, max_detections=20)]
    wanted = reference(raw, options)
    stage = made_for(raw, max_kept=len(wanted[2]) - 1)
    got = run(stage, raw, options)
    assert stage.overflowed(4) == [1, 2]  # too many candidates; too many detections
    assert_same(got, wanted)
    assert len(got[3]) == 20


def test_an_image_may_fill_the_buffers_to_the_last_place(kernel_device):
    raw = random_predictions(kernel_device, batch_size=1, num_classes=5)
    scores = class_scores(raw.class_logits).flatten().sort(descending=True).values
    for count, overflowed in ((64, []), (65, [0])):
        threshold = float((scores[count - 1] + scores[count]) / 2)
        option = dataclasses.replace(PLAIN, score_threshold=threshold, iou_threshold=1.0)
        for stage in (made_for(raw, capacity=64), made_for(raw, max_kept=64)):
            got = run(stage, raw, [option])
            assert stage.overflowed(1) == overflowed
            assert len(got[0]) == count
            assert_same(got, reference(raw, [option]))


def test_only_the_best_candidates_enter_nms_as_in_the_reference(kernel_device):
    raw = random_predictions(kernel_device, batch_size=1, num_classes=5)
    stage = made_for(raw, max_candidates=10)
    got = run(stage, raw, [PLAIN])
    assert stage.overflowed(1) == [0]
    assert_same(got, postprocess(raw, [PLAIN], [INPUT_SIZE_HW], INPUT_SIZE_HW, 10))


def test_equal_scores_come_in_the_order_of_anchors_and_classes(kernel_device):
    raw = blank_predictions(kernel_device, batch_size=2, num_classes=2)
    for level in raw.class_logits:
        level.fill_(1.0)
    option = dataclasses.replace(PLAIN, score_threshold=0.5, max_detections=200)
    got = run(made_for(raw, capacity=256, max_kept=200), raw, [option] * 2)
    assert_same(got, reference(raw, [option] * 2))
    for detections in got:
        np.testing.assert_array_equal(detections.class_ids, np.arange(200) % 2)
        np.testing.assert_array_equal(detections.boxes_xyxy[:16:2, 0], np.arange(8) * 8)


def test_a_long_chain_of_boxes_that_decide_over_each_other_is_settled_exactly(kernel_device):
    # A box reaches over the next cell and half of nothing more: each suppresses the next one alone.
    raw = blank_predictions(kernel_device, batch_size=1)
    logits, distances = raw.class_logits[0], raw.distance_logits[0]
    logits[0, 0] = torch.linspace(4, 2, 12 * 8).reshape(12, 8)
    distances[:] = -torch.inf
    for side, distance in enumerate((0, 0, 2, 1)):
        distances[:, side * (R + 1) + distance] = 0.0
    (detections,) = run(made_for(raw), raw, [dataclasses.replace(PLAIN, iou_threshold=0.3)])
    np.testing.assert_array_equal(detections.boxes_xyxy[:, 0], np.tile([0, 16, 32, 48], 12))


@pytest.mark.parametrize("iou_threshold", [0.0, 0.25, 1.0])
def test_an_iou_equal_to_the_threshold_suppresses_nothing(kernel_device, iou_threshold):
    raw = blank_predictions(kernel_device, batch_size=1)
    logits, distances = raw.class_logits[2], raw.distance_logits[2]
    logits[0, 0, 0, 0], logits[0, 0, 0, 1] = 3.0, 2.0
    distances[:] = -torch.inf
    for side, distance in enumerate((2, 1, 3, 1)):  # from -64 to 96 and from -32 to 128: 4 / 6
        distances[0, side * (R + 1) + distance] = 0.0
    (kept,) = run(made_for(raw), raw, [dataclasses.replace(PLAIN, iou_threshold=iou_threshold)])
    assert len(kept) == (2 if iou_threshold == 1.0 else 1)
    equal = float(np.float32(4) / np.float32(6))
    (kept,) = run(made_for(raw), raw, [dataclasses.replace(PLAIN, iou_threshold=equal)])
    assert len(kept) == 2
    below = float(np.nextafter(np.float32(equal), np.float32(0)))
    (kept,) = run(made_for(raw), raw, [dataclasses.replace(PLAIN, iou_threshold=below)])
    assert len(kept) == 1


def test_a_score_equal_to_the_threshold_is_no_candidate(kernel_device):
    raw = blank_predictions(kernel_device, batch_size=4)
    for level in raw.class_logits:
        level.fill_(-torch.inf)
    raw.class_logits[0][:, 0, 0, 0] = 0.0  # a score of exactly 0.5
    raw.class_logits[1][:, 0, 0, 0] = torch.inf  # of exactly 1
    half = np.float32(0.5)
    thresholds = [0.5, float(np.nextafter(half, np.float32(0))), 1.0, 0.0]
    options = [dataclasses.replace(PLAIN, score_threshold=threshold) for threshold in thresholds]
    scores = [detections.scores.tolist() for detections in run(made_for(raw), raw, options)]
    assert scores == [[1.0], [1.0, 0.5], [], [1.0, 0.5]]


def test_the_bound_on_logits_excludes_no_score_above_the_threshold():
    generator = np.random.default_rng(0)
    logits = np.concatenate((generator.uniform(-80, 20, 10_000), generator.normal(0, 3, 10_000)))
    scores = torch.from_numpy(logits.astype(np.float32)).sigmoid().numpy()
    just_below = np.nextafter(scores, np.float32(0))
    assert (logits.astype(np.float32) > _logit_bounds(just_below)).all()
    # and is of use: what is clearly below the threshold does not pass
    assert (logits.astype(np.float32) - 1e-3 < _logit_bounds(just_below))[scores < 0.99].all()


def test_broken_numbers_are_left_out_and_cost_a_neighbour_nothing(kernel_device):
    raw = random_predictions(kernel_device, batch_size=2, num_classes=5)
    raw.class_logits[0][0, 0] = torch.nan
    raw.class_logits[1][0, 1] = torch.inf
    raw.class_logits[2][0, 2] = -torch.inf
    raw.distance_logits[0][0, 3] = torch.nan
    raw.distance_logits[1][0, 5, 3:] = torch.inf
    raw.distance_logits[2][0] = -torch.inf
    got = run(made_for(raw), raw, [PLAIN] * 2)
    assert len(got[0]) > 0
    assert np.isfinite(got[0].boxes_xyxy).all()
    assert_same(got, reference(raw, [PLAIN] * 2))


def test_a_batch_leaves_nothing_behind_for_the_next(kernel_device):
    raw = random_predictions(kernel_device, batch_size=3, num_classes=5)
    stage = made_for(raw)
    before = run(stage, raw, [PLAIN] * 3)
    kept_copy = [detections.boxes_xyxy.copy() for detections in before]
    other = random_predictions(kernel_device, batch_size=3, num_classes=5, seed=1)
    few = [dataclasses.replace(PLAIN, score_threshold=0.85, class_agnostic=True)] * 2
    assert_same(run(stage, other, few), reference(other, few))
    assert run(stage, raw, []) == []
    for detections, boxes in zip(before, kept_copy, strict=True):
        np.testing.assert_array_equal(detections.boxes_xyxy, boxes)


def test_what_does_not_fit_is_refused(kernel_device):
    raw = random_predictions(kernel_device, batch_size=2, num_classes=5)
    stage = made_for(raw)
    with pytest.raises(ValueError, match="3 options"):
        stage.set_options([PLAIN] * 3, [INPUT_SIZE_HW] * 3, INPUT_SIZE_HW)
    with pytest.raises(ValueError, match="1 options and 2 image sizes"):
        stage.set_options([PLAIN], [INPUT_SIZE_HW] * 2, INPUT_SIZE_HW)
    with pytest.raises(ValueError, match="have shapes"):
        stage.launch(random_predictions(kernel_device, batch_size=1, num_classes=5))
    with pytest.raises(ValueError, match="power of two"):
        made_for(raw, capacity=100)


def test_classes_beyond_the_first_word_of_bits_can_be_requested(kernel_device):
    raw = random_predictions(kernel_device, batch_size=2, num_classes=70)
    options = [
        dataclasses.replace(PLAIN, score_threshold=0.7, class_ids=ids) for ids in ((31, 63), (0, 32, 64, 69))
    ]
    got = run(made_for(raw), raw, options)
    assert set(got[0].class_ids) == {31, 63}
    assert set(got[1].class_ids) == {0, 32, 64, 69}
    assert_same(got, reference(raw, options))


def thresholds_of_1000(raw):
    """Scores that a little fewer than 1000 of each image are above, by more than the error of a sigmoid."""
    scores = class_scores(raw.class_logits).flatten(1)
    return [float(value) * (1 + 1e-6) for value in scores.topk(1001, dim=1).values[:, -1]]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("iou_threshold", [0.1, 0.45, 0.7])
def test_of_1000_candidates_the_reference_keeps_the_same_of_the_same_boxes(iou_threshold):
    raw = random_predictions(
        torch.device("cuda"),
        batch_size=32,
        num_classes=80,
        level_sizes_hw=LARGE_LEVEL_SIZES_HW,
        reg_max=16,
        dtype=torch.float16,
    )
    options = [
        DetectionOptions(threshold, iou_threshold, 1000, class_agnostic=image % 2 == 0)
        for image, threshold in enumerate(thresholds_of_1000(raw))
    ]
    stage = made_for(raw, capacity=1024, max_kept=1000)
    got = run(stage, raw, options, input_size_hw=LARGE_SIZE_HW)
    assert stage.overflowed(32) == []
    scores, boxes = decode_predictions(raw)
    for image, option in enumerate(options):
        above = scores[image] > option.score_threshold
        count = int(above.sum())
        assert 900 < count <= 1000
        assert int(stage._counts[image]) == count
        anchors, classes = above.nonzero(as_tuple=True)
        order = scores[image][anchors, classes].sort(descending=True, stable=True).indices
        candidates = stage._boxes[image, :, :count].T.contiguous()
        candidate_scores = stage._scores[image, :count]
        candidate_ids = stage._class_ids[image, :count].long()
        torch.testing.assert_close(
            candidate_scores, scores[image][anchors, classes][order], rtol=1e-6, atol=0
        )
        assert torch.equal(candidate_ids, classes[order])
        torch.testing.assert_close(candidates, boxes[image][anchors[order]], rtol=2e-6, atol=1e-3)
        candidates, candidate_ids = candidates.cpu(), candidate_ids.cpu()
        group_ids = torch.zeros_like(candidate_ids) if option.class_agnostic else candidate_ids
        kept = nms_per_group(candidates, group_ids, torch.full((80,), iou_threshold))
        np.testing.assert_array_equal(got[image].boxes_xyxy, candidates[kept].numpy())
        np.testing.assert_array_equal(got[image].class_ids, candidate_ids[kept].numpy())


@pytest.mark.gpu
@needs_cuda
def test_a_replayed_graph_obeys_the_options_and_predictions_of_its_time():
    def fill(static, seed):
        fresh = random_predictions(torch.device("cuda"), batch_size=6, num_classes=5, seed=seed)
        for static_levels, levels in zip(static, fresh, strict=True):
            for static_level, level in zip(static_levels, levels, strict=True):
                static_level.copy_(level)

    raw = random_predictions(torch.device("cuda"), batch_size=6, num_classes=5)
    stage = made_for(raw)
    run(stage, raw, MIXED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stage.launch(raw)
    for seed, options in ((1, MIXED), (2, MIXED[::-1]), (3, MIXED[:2]), (4, [*MIXED[:5], MIXED[0]])):
        fill(raw, seed)
        sizes = MIXED_SIZES_HW[: len(options)]
        stage.set_options(options, sizes, INPUT_SIZE_HW)
        graph.replay()
        torch.cuda.synchronize()
        got = stage.collect(raw, options, sizes, INPUT_SIZE_HW)
        assert_same(got, reference(raw, options, sizes))
