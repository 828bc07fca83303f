"""Answer batches of requests: one answer each, whatever happens to the others of the batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from damoyolo.decode import decode_reduced
from damoyolo.detector import Detector
from damoyolo.drawing import DRAWING_BYTES_PER_PIXEL, draw_detections
from damoyolo.errors import (
    DeviceLostError,
    DeviceMemoryError,
    InternalError,
    RequestError,
)
from damoyolo.failures import Failure, classify, free_cached_memory
from damoyolo.formats import EncodedImage, reduce_image
from damoyolo.inference_answer import (
    BINARY_CONTENT_TYPE,
    JSON_LENGTH_HEADER,
    ModelIdentity,
    TensorRequest,
    format_tensors,
)
from damoyolo.memory_budget import MemoryBudget
from damoyolo.page import CONTENT_TYPE as PAGE_CONTENT_TYPE
from damoyolo.page import asks_for_page, build_page
from damoyolo.request import ImageRequest, RequestParser, asks_for_model_card
from damoyolo.response import CONTENT_TYPES, DrawnFormat, answer_too_large, format_error, is_drawn
from damoyolo.response_batch import format_json_each, prepare_tables
from damoyolo.response_formats import format_answer
from damoyolo.stage_timing import PARSE, RESPOND, StageTimer, no_timing
from damoyolo.structures import DetectionOptions, Detections

logger = logging.getLogger(__name__)

UNNAMED_MODEL = ModelIdentity("damoyolo", "")


@dataclass(frozen=True)
class Answer:
    """What is sent back for one request.

    error: None if it succeeded.
    headers: beside the content type.
    detections: of each image, for a server that sends them in a form of its own, too.
    """

    body: bytes
    content_type: str
    error: RequestError | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    detections: Sequence[Detections] = field(default=(), compare=False)


Outcome = Detections | RequestError
Parsed = ImageRequest | RequestError | Answer


class DetectionService:
    """Answers batches of requests with a detector.

    model_card: JSON that answers a request for the model's description.
    model: for answers that name it.

    Not for several threads at once: one batch at a time.
    """

    def __init__(
        self,
        detector: Detector,
        model_card: bytes = b"{}",
        model: ModelIdentity = UNNAMED_MODEL,
    ) -> None:
        self.detector = detector
        self._model_card = model_card
        self._model = model
        self._parser = RequestParser(detector.config)
        self._page = build_page(detector.config)
        prepare_tables(detector.config.class_names)  # so that no request pays for them
        self._drawing_budget = MemoryBudget(detector.config.max_decode_bytes)  # nothing else decodes then
        self._drawing_pool = ThreadPoolExecutor(thread_name_prefix="draw")

    def answer(
        self,
        rows: Sequence[Mapping[str, Any]],
        headers: Sequence[Mapping[str, Any]],
        time_stage: StageTimer = no_timing,
    ) -> list[Answer]:
        """One answer per row, in the order of the rows, whatever else fails.

        rows: fields of each request. headers: its HTTP headers.
        time_stage: called with the name of each stage; what it returns is entered around that stage.

        Raises:
            DeviceLostError: this process cannot answer any further batch.
        """
        try:
            with self.detector.time_budget.batch():
                return self._answer(rows, headers, time_stage)
        except DeviceLostError:
            raise
        except Exception as error:
            return [self.answer_failure(error, "answering a batch")] * len(rows)

    def _answer(
        self,
        rows: Sequence[Mapping[str, Any]],
        headers: Sequence[Mapping[str, Any]],
        time_stage: StageTimer,
    ) -> list[Answer]:
        with time_stage(PARSE):
            requests = [self._parse(row, head) for row, head in zip(rows, headers, strict=True)]
        readable = [request for request in requests if isinstance(request, ImageRequest)]
        images = [image for request in readable for image in request.images]
        options = [request.options for request in readable for _ in request.images]
        outcomes = iter(self._detect(images, options, time_stage))
        with time_stage(RESPOND):
            return self._respond_to_all(requests, outcomes)

    def answer_failure(self, error: Exception, doing: str) -> Answer:
        """The answer to a request that failed unexpectedly; the log gets the error.

        doing: what failed, for log and client.

        Raises:
            DeviceLostError: this process cannot answer any further batch.
        """
        refusal = self._refusal(error, self._classify(error), doing)
        return Answer(format_error(refusal), CONTENT_TYPES["json"], refusal)

    def _classify(self, error: Exception) -> Failure:
        failure = classify(error, self.detector.device)
        if failure is Failure.DEVICE_LOST:
            raise DeviceLostError(str(error)) from error
        return failure

    def _refusal(self, error: Exception, failure: Failure, doing: str) -> RequestError:
        if failure is Failure.OUT_OF_MEMORY:
            logger.warning("too little free memory: %s", doing, exc_info=error)
            return DeviceMemoryError(f"the server has too little free memory: {doing}")
        logger.error("unexpected failure: %s", doing, exc_info=error)
        return InternalError(f"the server failed; its log has the cause: {doing}")

    def _parse(self, row: Mapping[str, Any], headers: Mapping[str, Any]) -> Parsed:
        try:
            if asks_for_model_card(row, headers):
                return Answer(self._model_card, CONTENT_TYPES["json"])
            if asks_for_page(row, headers):
                return Answer(self._page.body, PAGE_CONTENT_TYPE, headers=self._page.headers)
            return self._parser.parse(row, headers)
        except RequestError as error:
            return error
        except Exception as error:
            return self.answer_failure(error, "reading a request")

    def _detect(
        self, images: list[EncodedImage], options: list[DetectionOptions], time_stage: StageTimer
    ) -> list[Outcome]:
        """Outcome of each image; a batch that fails as a whole is halved until the failing image is alone."""
        if not images:
            return []
        try:
            return self.detector.detect(images, options, time_stage)
        except Exception as error:
            failure = self._classify(error)
            if len(images) == 1:
                return [self._refusal(error, failure, "processing an image")]
        # After the exception is gone, which holds what the failed call had allocated.
        if failure is Failure.OUT_OF_MEMORY:
            logger.warning("a batch of %d needs more memory than is free; halving it", len(images))
            free_cached_memory(self.detector.device)
        half = len(images) // 2
        first = self._detect(images[:half], options[:half], time_stage)
        return first + self._detect(images[half:], options[half:], time_stage)

    def _respond_to_all(self, requests: list[Parsed], outcomes: Iterator[Outcome]) -> list[Answer]:
        jobs: list[tuple[Parsed, list[Outcome]]] = [
            (request, [next(outcomes) for _ in request.images] if isinstance(request, ImageRequest) else [])
            for request in requests
        ]
        # Formatting text holds the interpreter lock, so threads only help where images are drawn.
        if any(isinstance(request, ImageRequest) and is_drawn(request.output_format) for request in requests):
            return list(self._drawing_pool.map(lambda job: self._respond(*job), jobs))
        texts = self._format_together(jobs)
        return [self._respond(*job, text=texts.get(index)) for index, job in enumerate(jobs)]

    def _format_together(self, jobs: Sequence[tuple[Parsed, list[Outcome]]]) -> dict[int, bytes]:
        """The JSON bodies of successful requests of one image, by index of the job."""
        images = {
            index: outcomes[0]
            for index, (request, outcomes) in enumerate(jobs)
            if isinstance(request, ImageRequest)
            and not request.batched
            and request.output_format == "json"
            and isinstance(outcomes[0], Detections)
        }
        try:
            texts = format_json_each(list(images.values()), self.detector.config.class_names)
        except Exception as error:
            # Each is then written by itself, so that only the request that causes the failure has it.
            self.answer_failure(error, "writing the answers of a batch")
            return {}
        return dict(zip(images, texts, strict=True))

    def _respond(self, request: Parsed, outcomes: list[Outcome], text: bytes | None = None) -> Answer:
        """text: the body, if it is already written."""
        if isinstance(request, Answer):
            return request
        try:
            if isinstance(request, RequestError):
                raise request
            return self._format(request, outcomes, text)
        except RequestError as error:
            return Answer(format_error(error), CONTENT_TYPES["json"], error)
        except Exception as error:
            return self.answer_failure(error, "writing an answer")

    def _format(self, request: ImageRequest, outcomes: list[Outcome], text: bytes | None) -> Answer:
        config = self.detector.config
        detections: list[Detections] = []
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, RequestError):
                raise type(outcome)(f"{request.place(index)}: {outcome}") if request.batched else outcome
            detections.append(outcome)
        if request.tensors is not None:
            return self._tensor_answer(request.tensors, detections)
        if is_drawn(request.output_format):
            body = self._draw(request.images[0], detections[0], request.output_format)
        elif text is not None:
            body = text
        else:
            body = format_answer(
                detections,
                config.class_names,
                request.output_format,
                batched=request.batched,
                image_id=request.image_id,
            )
        if len(body) > config.max_response_bytes:
            raise answer_too_large(request.output_format, config.max_response_bytes)
        return Answer(body, CONTENT_TYPES[request.output_format], detections=detections)

    def _draw(self, encoded: EncodedImage, detections: Detections, output_format: DrawnFormat) -> bytes:
        config = self.detector.config
        # Decoded a second time: few requests need it, and the others need not keep their pixels.
        reduced = reduce_image(encoded, config)
        with self._drawing_budget.reserve(reduced.decoding_bytes + DRAWING_BYTES_PER_PIXEL * reduced.pixels):
            self.detector.time_budget.check()  # waiting for the memory takes time too
            return draw_detections(
                decode_reduced(reduced, config),
                detections,
                config.class_names,
                output_format,
                config.jpeg_quality,
                config.max_response_bytes,
                config.class_colours,
            )

    def _tensor_answer(self, request: TensorRequest, detections: Sequence[Detections]) -> Answer:
        config = self.detector.config
        body, json_length = format_tensors(detections, config.class_names, request, self._model)
        if len(body) > config.max_response_bytes:
            raise answer_too_large("json", config.max_response_bytes)
        if json_length is None:
            return Answer(body, CONTENT_TYPES["json"])
        return Answer(body, BINARY_CONTENT_TYPE, headers={JSON_LENGTH_HEADER: str(json_length)})

    def close(self) -> None:
        """End the threads."""
        self._drawing_pool.shutdown()
        self.detector.close()
