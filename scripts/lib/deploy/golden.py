"""Check a served version on golden images: it answers what its archive computes, and finds known objects.

The archive's own weights, run in this process by PyTorch in float32, tell whether the server runs the archive
correctly: backend, precision, device, batches. Known objects tell whether it is the right archive.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import requests

from lib.accuracy import agreement
from lib.accuracy.agreement import Rules, overlap
from lib.accuracy.tolerances import TOLERANCES, Tolerances
from lib.cli import ScriptError
from lib.server.local_http import direct_session

from damoyolo_client.answers import HttpAnswer, answer_error, detection_result

if TYPE_CHECKING:
    from damoyolo.structures import Detections

# Sent with each request, so that the answers do not depend on the archive's defaults.
SCORE_THRESHOLD = 0.4
IOU_THRESHOLD = 0.45
MAX_DETECTIONS = 300
# With them the demo weights find 55 of the 61 cells of the sample images and 6 others (S; Ns: 56 and 4).
# Weights with the classes in another order, or that are not trained, find almost none.
FOUND_IOU = 0.5
MIN_FOUND = 0.8  # of the known objects
MIN_KNOWN = 0.8  # of the detections
# A GPU decodes and resizes to pixels that differ by up to 1 from those of a CPU. With noise of that size on
# every pixel, scores of the demo weights changed by up to 0.08 (S; Ns 0.02) and boxes by 0.8 px.
PIXEL_SCORE = 0.2
PIXEL_BOX_PX = 2.0
ROUNDS = 3  # times that the images of all workers' full batches are sent

Box = tuple[float, float, float, float]


class KnownObject(NamedTuple):
    """An object in an image; box_xyxy in pixels."""

    label: str
    box_xyxy: Box


@dataclass(frozen=True)
class GoldenImage:
    """An encoded image, and the objects in it; None where they are not known."""

    name: str
    encoded: bytes
    objects: tuple[KnownObject, ...] | None


@dataclass(frozen=True)
class Expectation:
    """What an archive detects in an image in float32. input_scale: image pixels per pixel of the input."""

    image: GoldenImage
    found: Detections
    input_scale: float


@dataclass(frozen=True)
class Golden:
    """What a version has to answer; class_names and max_detections are those of its archive."""

    class_names: tuple[str, ...]
    max_detections: int
    expectations: tuple[Expectation, ...]


def read_golden_images(folder: Path) -> list[GoldenImage]:
    """The JPEG and PNG files of a folder, and the objects in each where NAME.json beside it lists them.

    The list has [label, x1, y1, x2, y2] for each object, in pixels.

    Raises:
        ScriptError: there is none, or a list has another form.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ScriptError(f"--golden is {folder}, which holds no *.jpg and no *.png")
    return [GoldenImage(path.name, path.read_bytes(), _objects(path.with_suffix(".json"))) for path in paths]


def _objects(path: Path) -> tuple[KnownObject, ...] | None:
    if not path.is_file():
        return None
    try:
        return tuple(
            KnownObject(str(label), (float(x1), float(y1), float(x2), float(y2)))
            for label, x1, y1, x2, y2 in json.loads(path.read_text())
        )
    except (ValueError, TypeError) as error:
        raise ScriptError(f"{path} is no list of [label, x1, y1, x2, y2]: {error}") from error


def compute_golden(archive: Path, images: Sequence[GoldenImage]) -> Golden:
    """What the archive detects in the images in float32, by PyTorch on the CPU.

    Raises:
        ScriptError, DamoYoloError: the archive does not load, the images show nothing of it, or it does not
            find the known objects.
    """
    import torch

    from lib.archive.reader import load_detector

    from damoyolo.structures import DetectionOptions, Detections

    plain = {"backend": "pytorch", "precision": "fp32", "cuda_graphs": False, "warmup_batch_sizes": []}
    detector = load_detector(archive, torch.device("cpu"), **plain)
    try:
        most = min(MAX_DETECTIONS, detector.config.max_detections_limit)
        options = DetectionOptions(SCORE_THRESHOLD, IOU_THRESHOLD, most)
        expectations = []
        for image in images:
            (found,) = detector.detect([image.encoded], [options])
            if not isinstance(found, Detections):
                raise ScriptError(f"golden image {image.name}: {found}")
            sides = zip(found.image_size_hw, detector.input_size_hw, strict=True)
            expectations.append(Expectation(image, found, max(side / to for side, to in sides)))
    finally:
        detector.close()
    golden = Golden(detector.config.class_names, most, tuple(expectations))
    _require_proof(golden)
    return golden


def _require_proof(golden: Golden) -> None:
    """Refuse images that show nothing of the archive, and an archive that does not find what they show."""
    labels = {each.label for it in golden.expectations for each in it.image.objects or ()}
    if strange := sorted(labels - set(golden.class_names)):
        raise ScriptError(
            f"the golden images show {', '.join(strange)}, the archive's classes are "
            f"{', '.join(golden.class_names)}; for an archive with other classes --golden takes a folder of "
            "images with their objects"
        )
    if not any(len(each.found) for each in golden.expectations):
        raise ScriptError(
            f"the archive detects nothing above {SCORE_THRESHOLD} in the {len(golden.expectations)} golden "
            "images; --golden takes a folder of images with objects"
        )
    known = [
        (each.image.objects, as_answer(each.found, golden.class_names))
        for each in golden.expectations
        if each.image.objects is not None
    ]
    hits = sum(count_found(objects, answer) for objects, answer in known)
    total, found = (sum(map(len, side)) for side in zip(*known, strict=True)) if known else (0, 0)
    if hits < MIN_FOUND * total or hits < MIN_KNOWN * found:
        raise ScriptError(
            f"the archive finds {hits} of {total} known objects of the golden images and {found - hits} "
            f"others; accepted are at least {MIN_FOUND:.0%} found and at most {1 - MIN_KNOWN:.0%} others. "
            "Are weights and class names the right ones?"
        )


def as_answer(found: Detections, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Detections in the form in which the server answers them; boxes clipped to the image."""
    height, width = found.image_size_hw
    return [
        {"label": class_names[class_id], "score": score, "bbox": box}
        for class_id, score, box in zip(
            found.class_ids.tolist(),
            found.scores.tolist(),
            found.boxes_xyxy.clip(0, [width, height, width, height]).tolist(),
            strict=True,
        )
    ]


def count_found(objects: Sequence[KnownObject], answer: Sequence[Mapping[str, Any]]) -> int:
    """How many objects have a detection of their class that overlaps them, each its own."""
    left = list(answer)
    hits = 0
    for each in objects:
        same = [found for found in left if found["label"] == each.label]
        best = max(same, key=lambda found: overlap(each.box_xyxy, found["bbox"]), default=None)
        if best is not None and overlap(each.box_xyxy, best["bbox"]) >= FOUND_IOU:
            left.remove(best)
            hits += 1
    return hits


def tolerances_of(card: Mapping[str, Any]) -> Tolerances:
    """How far a version's answers may differ from float32, by the precision and device of its model card."""
    base = TOLERANCES.get(str(card.get("precision")), TOLERANCES["bf16"])
    if not str(card.get("device", "")).startswith("cuda"):
        return base
    return Tolerances(base.score + PIXEL_SCORE, base.box_px + PIXEL_BOX_PX, base.logit_noise, base.ap)


def differences(
    answer: Mapping[str, Any],
    expected: Expectation,
    class_names: Sequence[str],
    allowed: Tolerances,
    max_detections: int = MAX_DETECTIONS,
) -> list[str]:
    """Where an answer differs from the expectation by more than allowed (see lib.accuracy.agreement)."""
    height, width = expected.found.image_size_hw
    if (answer.get("width"), answer.get("height")) != (width, height):
        return [f"a size of {answer.get('width')}x{answer.get('height')} instead of {width}x{height}"]
    rules = Rules(
        SCORE_THRESHOLD,
        IOU_THRESHOLD,
        max_detections,
        score=allowed.score,
        box_px=allowed.box_px * expected.input_scale,
    )
    return agreement.differences(answer["detections"], as_answer(expected.found, class_names), rules)


def check_served(
    url: str,
    golden: Golden,
    allowed: Tolerances,
    in_flight: int,
    token: str | None,
    timeout_s: float,
) -> int:
    """Send the golden images to a version and compare every answer; returns how many requests were sent.

    url: that names the version. in_flight: requests at a time, enough for full batches of all workers.

    Raises:
        ScriptError: an answer is an error or differs.
    """
    requests_each = [golden.expectations[i % len(golden.expectations)] for i in range(ROUNDS * in_flight)]
    stopped = threading.Event()

    def check(expected: Expectation) -> None:
        if stopped.is_set():
            return
        answer = _post(url, expected.image, golden.max_detections, token, timeout_s)
        if problems := differences(answer, expected, golden.class_names, allowed, golden.max_detections):
            raise ScriptError(
                f"{url} answers {expected.image.name} not as its archive does in float32: "
                f"{'; '.join(problems[:5])} (tolerances: score {allowed.score:g}, box {allowed.box_px:g} px "
                "of the network's input)"
            )

    with ThreadPoolExecutor(in_flight) as pool:
        try:
            for _ in pool.map(check, requests_each):
                pass
        finally:
            stopped.set()  # after an error or Ctrl-C, what has not been sent yet is not sent
    return len(requests_each)


def _post(
    url: str, image: GoldenImage, max_detections: int, token: str | None, timeout_s: float
) -> dict[str, Any]:
    """The answer for one image.

    Raises:
        ScriptError: it is an error, or none came.
    """
    headers = {
        "Content-Type": "application/octet-stream",
        "X-Detect-Format": "json",
        "X-Detect-Score-Threshold": str(SCORE_THRESHOLD),
        "X-Detect-Iou-Threshold": str(IOU_THRESHOLD),
        "X-Detect-Max-Detections": str(max_detections),
    }
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    started = time.monotonic()
    try:
        with direct_session() as session:
            response = session.post(
                url, data=image.encoded, headers=headers, timeout=timeout_s, allow_redirects=False
            )
    except requests.RequestException as error:
        raise ScriptError(
            f"no answer from {url} to {image.name} after {time.monotonic() - started:.1f} s: {error}"
        ) from error
    answer = HttpAnswer(response.status_code, response.reason, response.headers, response.content)
    if answer.status != 200:
        raise ScriptError(f"{url}, golden image {image.name}: {answer_error(answer, len(image.encoded))}")
    return detection_result(answer)
