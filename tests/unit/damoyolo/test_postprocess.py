"""Postprocessing against torchvision called image by image and class by class, and against the golden."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision

from damoyolo import postprocess as postprocess_module
from damoyolo.boxes import decode_predictions
from damoyolo.postprocess import nms_per_group, postprocess, select
from damoyolo.structures import DetectionOptions, RawPredictions

INPUT_SIZE_HW = (96, 64)
LEVEL_SIZES_HW = ((12, 8), (6, 4), (3, 2))
NO_LIMIT = 2**31
PLAIN = DetectionOptions(score_threshold=0.4, iou_threshold=0.5, max_detections=1000)


def torchvision_loop(scores, boxes_xyxy, options):
    """The plainest reference: a loop over images and classes, each with an NMS of its own."""
    results = []
    for image_scores, image_boxes, option in zip(scores, boxes_xyxy, options, strict=True):
        above = image_scores > torch.tensor(option.score_threshold)
        if option.class_ids is not None:
            asked_for = torch.zeros(above.shape[1], dtype=torch.bool)
            asked_for[list(option.class_ids)] = True
            above &= asked_for
        anchors, classes = above.nonzero(as_tuple=True)
        candidates, boxes = image_scores[anchors, classes], image_boxes[anchors]
        groups = torch.zeros_like(classes) if option.class_agnostic else classes
        kept = nms_loop(boxes, groups, candidates, torch.full((above.shape[1],), option.iou_threshold))
        kept_rows = kept.nonzero().squeeze(1)
        order = candidates[kept_rows].sort(descending=True, stable=True).indices[: option.max_detections]
        rows = kept_rows[order]
        results.append((boxes[rows], candidates[rows], classes[rows]))
    return results


def nms_loop(boxes_xyxy, group_ids, scores, thresholds):
    kept = torch.zeros(len(boxes_xyxy), dtype=torch.bool)
    for group in sorted(set(group_ids.tolist())):
        rows = (group_ids == group).nonzero().squeeze(1)
        # The threshold as float32: torchvision compares in float64 on a CPU and in float32 on CUDA.
        kept[rows[torchvision.ops.nms(boxes_xyxy[rows], scores[rows], float(thresholds[group]))]] = True
    return kept


def per_image(selection, image_count):
    of_image = [selection.image_ids == image for image in range(image_count)]
    return [(selection.boxes_xyxy[m], selection.scores[m], selection.class_ids[m]) for m in of_image]


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for got_image, wanted_image in zip(got, wanted, strict=True):
        for got_values, wanted_values in zip(got_image, wanted_image, strict=True):
            assert torch.equal(got_values, wanted_values)


def assert_same_detections(got, wanted):
    np.testing.assert_array_equal(got.class_ids, wanted.class_ids)
    np.testing.assert_array_equal(got.scores, wanted.scores)
    np.testing.assert_allclose(got.boxes_xyxy, wanted.boxes_xyxy, rtol=0, atol=1e-4)


def crowd(batch_size, anchor_count, class_count, *, objects=8, seed=0):
    """Decoded predictions with many boxes about each of a few objects, on a canvas of 640 pixels."""
    B, A, K = batch_size, anchor_count, class_count
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    centres = uniform(B, objects, 2) * 640
    sizes = 16 + uniform(B, objects, 2) * 200
    of_object = torch.randint(objects, (B, A, 1), generator=generator).expand(-1, -1, 2)
    size = sizes.gather(1, of_object) * (1 + 0.15 * (uniform(B, A, 2) - 0.5))
    centre = centres.gather(1, of_object) + 0.15 * size * (uniform(B, A, 2) - 0.5)
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=-1)
    return uniform(B, A, K) ** 3, boxes


def random_predictions(*, batch_size=4, seed=0):
    B, K, R = batch_size, 5, 7
    generator = torch.Generator().manual_seed(seed)
    return RawPredictions(
        tuple(torch.randn(B, K, h, w, generator=generator) for h, w in LEVEL_SIZES_HW),
        tuple(torch.randn(B, 4 * (R + 1), h, w, generator=generator) for h, w in LEVEL_SIZES_HW),
    )


def image_of(raw, image):
    return RawPredictions(*(tuple(level[image : image + 1] for level in levels) for levels in raw))


def detect(raw, *options, max_candidates=NO_LIMIT):
    """At the network's own size, so that boxes are not scaled."""
    sizes = [INPUT_SIZE_HW] * len(options)
    return postprocess(raw, options, sizes, INPUT_SIZE_HW, max_candidates)


@pytest.mark.parametrize(
    ("prefix", "score_threshold", "iou_threshold"), [("", 0.05, 0.7), ("nano_", 0.03, 0.65)]
)
def test_the_golden_boxes_are_kept_in_the_golden_order(
    golden, shared_dir, prefix, score_threshold, iou_threshold
):
    scores, boxes = map(torch.from_numpy, golden.postprocess_case())
    option = DetectionOptions(score_threshold, iou_threshold, max_detections=500)
    results = per_image(select(scores, boxes, [option] * 2, NO_LIMIT), 2)
    assert golden.check_postprocess(results, prefix=prefix, atol=0)
    with np.load(shared_dir / "model" / "golden_postprocess.npz") as stored:
        for image, result in enumerate(results):
            for name, values in zip(("boxes", "scores", "labels"), result, strict=True):
                np.testing.assert_array_equal(values.numpy(), stored[f"{prefix}{name}_{image}"])


def test_the_golden_boxes_are_scaled_to_the_original_image(golden, shared_dir):
    scores, boxes = map(torch.from_numpy, golden.postprocess_case())
    selection = select(scores, boxes, [DetectionOptions(0.05, 0.7, 500)] * 2, NO_LIMIT)
    with np.load(shared_dir / "model" / "golden_postprocess.npz") as stored:
        sizes_wh = [stored[f"original_size_{image}"].tolist() for image in range(2)]
        sizes_hw = [(height, width) for width, height in sizes_wh]
        for image, got in enumerate(postprocess_module._per_image(selection, sizes_hw, (640, 640))):
            wanted = stored[f"boxes_original_{image}"]
            np.testing.assert_allclose(got.boxes_xyxy, wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("class_count", [1, 3, 80])
@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.45, 0.7, 1.0])
def test_the_choice_equals_torchvision_class_by_class(class_count, iou_threshold):
    scores, boxes = crowd(batch_size=3, anchor_count=400, class_count=class_count, seed=class_count)
    options = [DetectionOptions(0.5, iou_threshold, 10**6)] * 3
    assert_same(
        per_image(select(scores, boxes, options, NO_LIMIT), 3), torchvision_loop(scores, boxes, options)
    )


def test_64_images_of_80_classes_with_options_of_their_own_equal_torchvision_class_by_class():
    scores, boxes = crowd(batch_size=64, anchor_count=100, class_count=80)
    options = [
        DetectionOptions(0.8, 0.01 * image, 10**6, class_agnostic=image % 4 == 0) for image in range(64)
    ]
    assert_same(
        per_image(select(scores, boxes, options, NO_LIMIT), 64), torchvision_loop(scores, boxes, options)
    )


def test_the_last_class_of_64_images_keeps_what_an_offset_in_float32_would_lose():
    # The offset of group 64 * 80 - 1 leaves float32 a grid of a quarter pixel: an IoU of 0.488 becomes 0.5.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.88]])
    scores = torch.tensor([0.9, 0.8])
    group = 64 * 80 - 1
    moved = boxes + torch.tensor(group * 641.0)
    assert torchvision.ops.nms(moved, scores, 0.495).tolist() == [0]
    kept = nms_per_group(boxes, torch.full((2,), group), torch.full((64 * 80,), 0.495))
    assert kept.tolist() == [True, True]


def test_groups_may_be_mixed_unequal_and_empty():
    scores, boxes = crowd(batch_size=1, anchor_count=1500, class_count=1, objects=30)
    best_first = scores[0, :, 0].sort(descending=True)
    boxes = boxes[0][best_first.indices]
    groups = torch.randint(3, (1500,), generator=torch.Generator().manual_seed(0)) * 2  # 1, 3, 5 are empty
    groups[7] = 6  # alone in its group
    thresholds = torch.tensor([0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 0.5])
    kept = nms_per_group(boxes, groups, thresholds)
    assert kept[7]
    assert torch.equal(kept, nms_loop(boxes, groups, best_first.values, thresholds))


def test_a_long_chain_of_boxes_that_suppress_one_another_is_resolved_exactly():
    # Each box suppresses only the next one, so that every second stays.
    left = torch.arange(200.0)
    boxes = torch.stack((left, torch.zeros(200), left + 2.5, torch.ones(200)), dim=1)
    kept = nms_per_group(boxes, torch.zeros(200, dtype=torch.int64), torch.tensor([0.4]))
    assert kept.tolist() == [True, False] * 100


def test_each_image_of_a_batch_gets_what_it_would_get_alone():
    raw = random_predictions(batch_size=6)
    options = [
        PLAIN,
        dataclasses.replace(PLAIN, score_threshold=0.7),
        dataclasses.replace(PLAIN, iou_threshold=0.1, max_detections=7),
        dataclasses.replace(PLAIN, class_ids=(1, 4)),
        dataclasses.replace(PLAIN, class_agnostic=True),
        dataclasses.replace(PLAIN, class_ids=(0, 2), class_agnostic=True, max_detections=3),
    ]
    sizes = [(96, 64), (480, 640), (37, 53), (1080, 1920), (5, 4000), (64, 96)]
    together = postprocess(raw, options, sizes, INPUT_SIZE_HW, NO_LIMIT)
    assert [len(detections) for detections in together][2:] != [0] * 4
    for image, detections in enumerate(together):
        (alone,) = postprocess(
            image_of(raw, image), [options[image]], [sizes[image]], INPUT_SIZE_HW, NO_LIMIT
        )
        assert detections.image_size_hw == sizes[image]
        np.testing.assert_array_equal(detections.class_ids, alone.class_ids)
        np.testing.assert_array_equal(detections.scores, alone.scores)
        np.testing.assert_allclose(detections.boxes_xyxy, alone.boxes_xyxy, rtol=1e-6, atol=1e-3)


def test_decoding_only_the_candidates_equals_decoding_everything():
    raw = random_predictions()
    options = [PLAIN, dataclasses.replace(PLAIN, class_agnostic=True), PLAIN, PLAIN]
    scores, boxes = decode_predictions(raw)
    for got, (wanted_boxes, wanted_scores, wanted_classes) in zip(
        detect(raw, *options), torchvision_loop(scores, boxes, options), strict=True
    ):
        assert len(got) > 5
        np.testing.assert_array_equal(got.scores, wanted_scores.numpy())
        np.testing.assert_array_equal(got.class_ids, wanted_classes.numpy())
        np.testing.assert_allclose(got.boxes_xyxy, wanted_boxes.numpy(), rtol=0, atol=1e-4)


def test_options_of_an_image_are_obeyed():
    raw = random_predictions(batch_size=1)
    (everything,) = detect(raw, PLAIN)
    (few,) = detect(raw, dataclasses.replace(PLAIN, max_detections=4))
    np.testing.assert_array_equal(few.scores, everything.scores[:4])
    (filtered,) = detect(raw, dataclasses.replace(PLAIN, class_ids=(3, 1)))
    np.testing.assert_array_equal(filtered.scores, everything.scores[np.isin(everything.class_ids, (1, 3))])
    (agnostic,) = detect(raw, dataclasses.replace(PLAIN, class_agnostic=True))
    assert len(agnostic) < len(everything)
    assert (np.diff(everything.scores) <= 0).all()


def test_a_score_equal_to_the_threshold_is_no_candidate():
    threshold = torch.tensor(0.05)
    steps = [torch.nextafter(threshold, torch.tensor(end)) for end in (0.0, 1.0)]
    scores = torch.stack((steps[0], threshold, steps[1])).reshape(1, 3, 1)
    boxes = torch.tensor([[0.0, 0, 1, 1], [2, 0, 3, 1], [4, 0, 5, 1]])[None]
    selection = select(scores, boxes, [DetectionOptions(0.05, 0.5, 10)], NO_LIMIT)
    assert selection.boxes_xyxy[:, 0].tolist() == [4]


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
def test_an_iou_equal_to_the_threshold_suppresses_nothing(iou_threshold):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10 * iou_threshold]])
    groups, thresholds = torch.zeros(2, dtype=torch.int64), torch.tensor([iou_threshold])
    assert nms_per_group(boxes, groups, thresholds).all()
    boxes[1, 3] += 0.01
    assert nms_per_group(boxes, groups, thresholds).tolist() == [True, False]


def test_of_equal_scores_the_earlier_anchor_is_the_better_one():
    # Many more equal scores than an unstable sort leaves in order; every box suppresses the next.
    left = torch.arange(2000.0)
    boxes = torch.stack((left, torch.zeros(2000), left + 2.5, torch.ones(2000)), dim=1)[None]
    option = DetectionOptions(0.1, 0.4, 10**6)
    selection = select(torch.full((1, 2000, 1), 0.5), boxes, [option], NO_LIMIT)
    assert torch.equal(selection.boxes_xyxy[:, 0], left[::2])


def test_equal_scores_come_in_the_order_of_anchors_and_classes():
    left = torch.arange(40.0) * 10
    boxes = torch.stack((left, torch.zeros(40), left + 5, torch.ones(40)), dim=1)
    scores = torch.full((2, 40, 3), 0.5)
    selection = select(scores, boxes.expand(2, -1, -1), [DetectionOptions(0.1, 0.5, 100)] * 2, NO_LIMIT)
    flat_ids = torch.arange(100)
    for image_boxes, _, class_ids in per_image(selection, 2):
        assert torch.equal(class_ids, flat_ids % 3)
        assert torch.equal(image_boxes[:, 0], flat_ids.div(3, rounding_mode="floor") * 10.0)


def test_of_identical_boxes_only_the_best_of_each_class_stays():
    scores = torch.rand(1, 500, 3, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([5.0, 5, 50, 60]).expand(1, 500, 4)
    selection = select(scores, boxes, [DetectionOptions(0.1, 0.5, 100)], NO_LIMIT)
    assert torch.equal(selection.scores, scores[0].amax(dim=0).sort(descending=True).values)


@pytest.mark.parametrize("max_candidates", [1, 50, 1199, 1200, 5000])
def test_only_the_best_candidates_of_each_image_enter_nms(max_candidates):
    scores, boxes = crowd(batch_size=3, anchor_count=400, class_count=3)
    scores = (scores * 50).round() / 50  # many ties
    scores[1] *= 0.2  # an image with weaker candidates is not crowded out by its neighbours
    options = [DetectionOptions(0.0, 0.5, 10**6)] * 3
    bounded = scores.clone().flatten(1)
    order = bounded.sort(dim=1, descending=True, stable=True).indices
    bounded.scatter_(1, order[:, max_candidates:], 0.0)
    got = per_image(select(scores, boxes, options, max_candidates), 3)
    assert_same(got, torchvision_loop(bounded.reshape(scores.shape), boxes, options))


def test_boxes_are_scaled_to_the_image_and_not_clipped():
    R = 7
    class_logits = [torch.full((2, 1, h, w), -9.0) for h, w in LEVEL_SIZES_HW]
    distance_logits = [torch.full((2, 4 * (R + 1), h, w), -torch.inf) for h, w in LEVEL_SIZES_HW]
    class_logits[1][:, 0, 2, 1] = 9.0  # stride 16: the point (16, 32)
    for side, distance in enumerate((2, 1, 3, 4)):
        distance_logits[1][:, side * (R + 1) + distance] = 0.0
    raw = RawPredictions(tuple(class_logits), tuple(distance_logits))
    wide, tall = postprocess(raw, [PLAIN] * 2, [(48, 128), (960, 64)], INPUT_SIZE_HW, NO_LIMIT)
    assert wide.boxes_xyxy.tolist() == [[-16 * 2, 16 / 2, 64 * 2, 96 / 2]]
    assert tall.boxes_xyxy.tolist() == [[-16, 16 * 10, 64, 96 * 10]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_give_float32_results(dtype):
    raw = random_predictions()
    half = RawPredictions(*(tuple(level.to(dtype) for level in levels) for levels in raw))
    widened = RawPredictions(*(tuple(level.float() for level in levels) for levels in half))
    for got, wanted in zip(detect(half, *[PLAIN] * 4), detect(widened, *[PLAIN] * 4), strict=True):
        assert got.scores.dtype == got.boxes_xyxy.dtype == np.float32
        assert_same_detections(got, wanted)


@pytest.mark.parametrize(("dtype", "score_error"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_predictions_give_nearly_the_same_best_detection(dtype, score_error):
    raw = random_predictions()
    half = RawPredictions(*(tuple(level.to(dtype) for level in levels) for levels in raw))
    option = dataclasses.replace(PLAIN, max_detections=1)
    for got, wanted in zip(detect(half, *[option] * 4), detect(raw, *[option] * 4), strict=True):
        np.testing.assert_allclose(got.scores, wanted.scores, rtol=0, atol=score_error)
        np.testing.assert_allclose(got.boxes_xyxy, wanted.boxes_xyxy, rtol=0, atol=1.0)


def test_autocast_and_inference_mode_change_nothing():
    raw = random_predictions()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = detect(raw, *[PLAIN] * 4)
    for got, wanted in zip(under_autocast, detect(raw, *[PLAIN] * 4), strict=True):
        assert_same_detections(got, wanted)


def test_an_image_with_broken_numbers_costs_its_neighbour_nothing():
    raw = random_predictions(batch_size=2)
    (healthy,) = detect(image_of(raw, 1), PLAIN)
    raw.class_logits[0][0, 0] = torch.nan
    raw.class_logits[1][0, 1] = torch.inf
    raw.class_logits[2][0, 2] = -torch.inf
    raw.distance_logits[0][0, 3] = torch.nan
    raw.distance_logits[1][0, 5] = torch.inf
    raw.distance_logits[2][0] = -torch.inf
    broken, neighbour = detect(raw, PLAIN, PLAIN)
    assert np.isfinite(broken.scores).all()
    assert np.isfinite(broken.boxes_xyxy).all()
    assert_same_detections(neighbour, healthy)


def test_a_score_that_is_no_number_is_no_candidate():
    scores = torch.tensor([torch.nan, 0.6]).reshape(1, 2, 1)
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]])[None]
    assert select(scores, boxes, [PLAIN], NO_LIMIT).scores.tolist() == pytest.approx([0.6])


def test_boxes_that_are_not_finite_are_left_out_and_suppress_nothing():
    infinite, nan = torch.inf, torch.nan
    boxes = torch.tensor(
        [[-infinite, 0, infinite, 9], [nan, 0, 9, 9], [0, 0, infinite, infinite], [0, 0, 9, 9]]
    )[None]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6]).reshape(1, 4, 1)
    selection = select(scores, boxes, [dataclasses.replace(PLAIN, iou_threshold=0.0)], NO_LIMIT)
    assert selection.boxes_xyxy.tolist() == [[0, 0, 9, 9]]


def test_boxes_without_area_suppress_nothing():
    boxes = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]])[None]
    scores = torch.tensor([0.9, 0.8, 0.7]).reshape(1, 3, 1)
    selection = select(scores, boxes, [dataclasses.replace(PLAIN, iou_threshold=0.0)], NO_LIMIT)
    assert len(selection.scores) == 3


@pytest.mark.parametrize(
    "option",
    [dataclasses.replace(PLAIN, score_threshold=1.0), dataclasses.replace(PLAIN, class_ids=())],
    ids=["no score high enough", "no class requested"],
)
def test_an_image_without_candidates_has_no_detections(option):
    raw = random_predictions(batch_size=3)
    empty, full, also_empty = detect(raw, option, PLAIN, option)
    for detections in (empty, also_empty):
        assert detections.boxes_xyxy.shape == (0, 4)
        assert detections.class_ids.dtype == np.int64
        assert len(detections) == 0
    assert len(full) > 0
    assert [len(detections) for detections in detect(raw, option, option, option)] == [0, 0, 0]


def test_an_empty_batch_gives_an_empty_list():
    assert detect(random_predictions(batch_size=0)) == []


def test_options_and_sizes_must_be_one_per_image():
    raw = random_predictions(batch_size=2)
    with pytest.raises(ValueError, match="1 options for 2 images"):
        postprocess(raw, [PLAIN], [INPUT_SIZE_HW] * 2, INPUT_SIZE_HW, NO_LIMIT)
    with pytest.raises(ValueError, match="3 image sizes for 2 images"):
        postprocess(raw, [PLAIN] * 2, [INPUT_SIZE_HW] * 3, INPUT_SIZE_HW, NO_LIMIT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_makes_the_same_choice_as_the_cpu():
    scores, boxes = crowd(batch_size=8, anchor_count=1000, class_count=80)
    options = [DetectionOptions(0.5, 0.5, 10**6)] * 8
    on_cuda = select(scores.cuda(), boxes.cuda(), options, 16384)
    on_cpu = select(scores, boxes, options, 16384)
    for got, wanted in zip(on_cuda, on_cpu, strict=True):
        assert torch.equal(got.cpu(), wanted)
