"""Answer batches of requests: one answer each, whatever happens to the others of the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from damoyolo.decode import decode_reduced
from damoyolo.detector import Detector
from damoyolo.errors import (
    DeviceLostError,
    DeviceMemoryError,
    ImageTooLargeError,
    InternalError,
    RequestError,
)
from damoyolo.formats import EncodedImage, reduce_image
from damoyolo.memory_budget import MemoryBudget
from damoyolo.request import ImageRequest, RequestParser
from damoyolo.response import (
    CONTENT_TYPES,
    DRAWING_BYTES_PER_PIXEL,
    draw_detections,
    format_error,
    format_json,
    format_json_predictions,
)
from damoyolo.response_batch import format_json_each, prepare_tables
from damoyolo.stage_timing import PARSE, RESPOND, StageTimer, no_timing
from damoyolo.structures import DetectionOptions, Detections

logger = logging.getLogger(__name__)

Outcome = Detections | RequestError


@dataclass(frozen=True)
class Answer:
    """What is sent back for one request; `error` is None if it succeeded."""

    body: bytes
    content_type: str
    error: RequestError | None = None


class DetectionService:
    """Answers batches of requests with a detector.

    Not for several threads at once: one batch at a time.
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self._parser = RequestParser(detector.config)
        prepare_tables(detector.config.class_names)  # so that no request pays for them
        self._drawing_budget = MemoryBudget(detector.config.max_decode_bytes)  # nothing else decodes then
        self._drawing_pool = ThreadPoolExecutor(thread_name_prefix="draw")

    def answer(
        self,
        rows: Sequence[Mapping[str, Any]],
        headers: Sequence[Mapping[str, Any]],
        time_stage: StageTimer = no_timing,
    ) -> list[Answer]:
        """One answer per row, in the order of the rows.

        rows: fields of each request. headers: its HTTP headers.
        time_stage: called with the name of each stage; what it returns is entered around that stage.

        Raises:
            DeviceLostError: this process cannot answer any further batch.
        """
        with time_stage(PARSE):
            requests = [self._parse(row, head) for row, head in zip(rows, headers, strict=True)]
        readable = [request for request in requests if isinstance(request, ImageRequest)]
        images = [image for request in readable for image in request.images]
        options = [request.options for request in readable for _ in request.images]
        outcomes = iter(self._detect(images, options, time_stage))
        with time_stage(RESPOND):
            return self._respond_to_all(requests, outcomes)

    def _parse(self, row: Mapping[str, Any], headers: Mapping[str, Any]) -> ImageRequest | RequestError:
        try:
            return self._parser.parse(row, headers)
        except RequestError as error:
            return error
        except Exception:
            logger.exception("unexpected failure while reading a request")
            return InternalError("the server failed to read this request; its log has the cause")

    def _detect(
        self, images: list[EncodedImage], options: list[DetectionOptions], time_stage: StageTimer
    ) -> list[Outcome]:
        """Outcome of each image; a batch that fails as a whole is halved until the failing image is alone."""
        if not images:
            return []
        try:
            return self.detector.detect(images, options, time_stage)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise DeviceLostError(str(error)) from error
            out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if len(images) == 1:
                logger.exception("failure on a single image")
                if out_of_memory:
                    return [DeviceMemoryError("too little free memory on the device for this image")]
                return [InternalError("the server failed on this image; its log has the cause")]
            logger.warning("a batch of %d failed (%s); halving it", len(images), type(error).__name__)
            if out_of_memory and self.detector.device.type == "cuda":
                torch.cuda.empty_cache()
        half = len(images) // 2
        first = self._detect(images[:half], options[:half], time_stage)
        return first + self._detect(images[half:], options[half:], time_stage)

    def _respond_to_all(
        self, requests: list[ImageRequest | RequestError], outcomes: Iterator[Outcome]
    ) -> list[Answer]:
        jobs: list[tuple[ImageRequest | RequestError, list[Outcome]]] = [
            (request, [] if isinstance(request, RequestError) else [next(outcomes) for _ in request.images])
            for request in requests
        ]
        # Formatting JSON holds the interpreter lock, so threads only help where images are drawn.
        if any(isinstance(request, ImageRequest) and request.output_format != "json" for request in requests):
            return list(self._drawing_pool.map(lambda job: self._respond(*job), jobs))
        texts = self._format_together(jobs)
        return [self._respond(*job, text=texts.get(index)) for index, job in enumerate(jobs)]

    def _format_together(
        self, jobs: Sequence[tuple[ImageRequest | RequestError, list[Outcome]]]
    ) -> dict[int, bytes]:
        """The JSON bodies of successful requests of one image, by index of the job."""
        images = {
            index: outcomes[0]
            for index, (request, outcomes) in enumerate(jobs)
            if isinstance(request, ImageRequest)
            and not request.batched
            and isinstance(outcomes[0], Detections)
        }
        try:
            texts = format_json_each(list(images.values()), self.detector.config.class_names)
        except Exception:
            # Each is then written by itself, so that only the request that causes the failure has it.
            logger.exception("unexpected failure while writing the answers of a batch")
            return {}
        return dict(zip(images, texts, strict=True))

    def _respond(
        self, request: ImageRequest | RequestError, outcomes: list[Outcome], text: bytes | None = None
    ) -> Answer:
        """text: the body, if it is already written."""
        try:
            if isinstance(request, RequestError):
                raise request
            return self._format(request, outcomes, text)
        except RequestError as error:
            return Answer(format_error(error), CONTENT_TYPES["json"], error)
        except Exception:
            logger.exception("unexpected failure while writing an answer")
            internal = InternalError("the server failed to write this answer; its log has the cause")
            return Answer(format_error(internal), CONTENT_TYPES["json"], internal)

    def _format(self, request: ImageRequest, outcomes: list[Outcome], text: bytes | None) -> Answer:
        config = self.detector.config
        detections: list[Detections] = []
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, RequestError):
                raise type(outcome)(f"instances[{index}]: {outcome}") if request.batched else outcome
            detections.append(outcome)
        if request.output_format != "json":
            # Decoded a second time: few requests need it, and the others need not keep their pixels.
            reduced = reduce_image(request.images[0], config)
            with self._drawing_budget.reserve(
                reduced.decoding_bytes + DRAWING_BYTES_PER_PIXEL * reduced.pixels
            ):
                image = decode_reduced(reduced, config)
                body = draw_detections(
                    image, detections[0], config.class_names, request.output_format, config.jpeg_quality
                )
        elif text is not None:
            body = text
        elif request.batched:
            body = format_json_predictions(detections, config.class_names)
        else:
            body = format_json(detections[0], config.class_names)
        if len(body) > config.max_response_bytes:
            raise ImageTooLargeError(
                f"the answer as {request.output_format} has {len(body)} bytes; at most "
                f"{config.max_response_bytes} are sent (server setting max_response_bytes); "
                "format jpeg is smaller than png, and json smaller than both"
            )
        return Answer(body, CONTENT_TYPES[request.output_format])

    def close(self) -> None:
        """End the threads."""
        self._drawing_pool.shutdown()
        self.detector.close()
