"""Requests of many kinds, with the answers that the same archive gives in process."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.accuracy.agreement import DEFAULT_RULES, Rules, differences
from lib.archive.reader import load_detector

from damoyolo.request import RequestParser
from damoyolo.service import Answer, DetectionService

FORMATS = ("JPEG", "JPEG", "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
SIDES_PX = (64, 2000)
OPTIONS: tuple[dict[str, str], ...] = (
    {},
    {"X-Detect-Score-Threshold": "0.5"},
    {"X-Detect-Max-Detections": "3"},
    {"X-Detect-Classes": "0"},
    {"X-Detect-Class-Agnostic": "true"},
    {"Accept": "image/jpeg"},
    {"X-Detect-Format": "png"},
)
OCTETS = "application/octet-stream"


@dataclass(frozen=True)
class MixedRequest:
    """A request and the answer that it must get; `error` of the answer is None where it succeeds.

    rules: how far an answer with detections may differ. Batches of another size round otherwise.
    """

    body: bytes
    headers: Mapping[str, str]
    expected: Answer
    rules: Rules = DEFAULT_RULES

    def problem_with(self, status: int, content_type: str, body: bytes) -> str:
        """What is wrong with a server's answer, with details in brackets; empty if nothing is."""
        wanted = 200 if self.expected.error is None else self.expected.error.status
        if status != wanted:
            return f"status {status} in place of {wanted}"
        if content_type != self.expected.content_type:
            return f"{content_type} in place of {self.expected.content_type}"
        if content_type != "application/json":
            same = Image.open(io.BytesIO(body)).size == Image.open(io.BytesIO(self.expected.body)).size
            return "" if same else "a drawn image of another size"
        found, expected = json.loads(body), json.loads(self.expected.body)
        if self.expected.error is not None:
            return "" if found == expected else f"other content than in process ({found})"
        details = differences(found["detections"], expected["detections"], self.rules)
        return f"other content than in process ({'; '.join(details)})" if details else ""


def mixed_requests(
    archive: Path, images: Sequence[Path], count: int, bad_share: float, seed: int = 0
) -> list[MixedRequest]:
    """Requests of many sizes, formats and options; a share of them is answered with an error.

    archive: answers each of them in this process. images: what they are made from.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    service = DetectionService(load_detector(archive, device))
    parser = RequestParser(service.detector.config)
    try:
        return [
            MixedRequest(body, headers, *_expected(service, parser, row, headers))
            for body, headers, row in _forms(images, count, bad_share, np.random.default_rng(seed))
        ]
    finally:
        service.close()


def _expected(
    service: DetectionService, parser: RequestParser, row: Mapping[str, Any], headers: Mapping[str, str]
) -> tuple[Answer, Rules]:
    answer = service.answer([row], [headers])[0]
    if answer.error is not None or answer.content_type != "application/json":
        return answer, DEFAULT_RULES
    options = parser.parse(row, headers).options
    size = json.loads(answer.body)
    input_height, input_width = service.detector.input_size_hw
    scale = max(1.0, size["width"] / input_width, size["height"] / input_height)
    return answer, Rules(
        options.score_threshold,
        options.iou_threshold,
        options.max_detections,
        options.class_agnostic,
        box_px=DEFAULT_RULES.box_px * scale,
    )


def _forms(
    images: Sequence[Path], count: int, bad_share: float, random: np.random.Generator
) -> Iterator[tuple[bytes, dict[str, str], dict[str, Any]]]:
    """Body, headers, and the row that TorchServe makes of them."""
    sources = [Image.open(path).convert("RGB") for path in images]
    for index in range(count):
        source = sources[index % len(sources)]
        width, height = (int(side) for side in random.integers(*SIDES_PX, 2))
        stream = io.BytesIO()
        source.resize((width, height)).save(stream, FORMATS[index % len(FORMATS)])
        body = stream.getvalue()
        headers = {"Content-Type": OCTETS, **OPTIONS[int(random.integers(0, len(OPTIONS)))]}
        if index < round(bad_share * count):
            yield (
                body[: len(body) // 3],
                {"Content-Type": OCTETS},
                {"body": bytearray(body[: len(body) // 3])},
            )
        elif index % 10 == 9:
            document = {"image": base64.b64encode(body).decode(), "max_detections": 5}
            yield json.dumps(document).encode(), {"Content-Type": "application/json"}, {"body": document}
        else:
            yield body, headers, {"body": bytearray(body)}
