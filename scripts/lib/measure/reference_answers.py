"""What servers of an archive have to answer, and the rate of its network, from a process of its own."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.accuracy.agreement import Rules, differences
from lib.accuracy.tolerances import TOLERANCES
from lib.archive.members import BatchingSetting
from lib.measure.request_forms import Answer, RequestForm


@dataclass(frozen=True)
class Reference:
    """The answers to some images.

    network_per_s: images/s of the network alone at the batch size. precision: in which the archive computes.
    texts: JSON of each image alone, from the archive as it is served.
    expected: detections of each image from PyTorch in float32.
    """

    network_per_s: float
    precision: str
    texts: Sequence[bytes]
    expected: Sequence[Sequence[Mapping[str, Any]]]

    def check(self, answers: Sequence[Answer], form: RequestForm) -> dict[str, Any]:
        """How many answers are the archive's byte for byte, and where detections are not as expected.

        answers: one for each image.
        """
        tolerances = TOLERANCES[form.tolerances or self.precision]
        rules = Rules(form.lowest_score, score=tolerances.score, box_px=tolerances.box_px)
        texts = [form.json_of(answer) for answer in answers]
        wrong = [
            f"image {index}: {difference}"
            for index, (text, expected) in enumerate(zip(texts, self.expected, strict=True))
            for difference in differences(
                form.detections(text), [each for each in expected if each["score"] > form.lowest_score], rules
            )
        ]
        equal = sum(text == own for text, own in zip(texts, self.texts, strict=True))
        return {"checked": len(texts), "equal": equal, "wrong": wrong}


def read_reference(
    archive: Path, images: Sequence[bytes], setting: BatchingSetting, device: str
) -> Reference:
    """The reference for these images; the process that computes it has ended, and its memory is free."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_read_reference, archive, list(images), setting, device).result()


def _read_reference(archive: Path, images: list[bytes], setting: BatchingSetting, device: str) -> Reference:
    import torch

    from lib.archive.reader import load_detector
    from lib.measure.calls import batch_seconds

    from damoyolo.service import DetectionService

    place = torch.device(device)
    plain = DetectionService(load_detector(archive, place, backend="pytorch", precision="fp32"))
    expected = [json.loads(_answer(plain, image))["detections"] for image in images]
    plain.close()
    served = DetectionService(load_detector(archive, place, **setting.serving_settings()))
    texts = [_answer(served, image) for image in images]
    network_s = batch_seconds(served.detector, images, setting.batch_size)[0]
    served.close()
    precision = served.detector.pipeline.precision
    return Reference(setting.batch_size / network_s, precision, texts, expected)


def _answer(service: Any, image: bytes) -> bytes:
    (answer,) = service.answer([{"body": image}], [{}])
    if answer.error is not None:
        raise answer.error
    return bytes(answer.body)
