"""The detector as a model of Triton's Python backend: requests of a batch in, one response per request out.

build_repository.py puts this file into a model repository, beside `archive/`, the unpacked archive.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

ARCHIVE = Path(__file__).resolve().with_name("archive")
sys.path.insert(0, str(ARCHIVE))

import numpy as np
import torch

from damoyolo.errors import DeviceLostError, InvalidOptionError, RequestError, quoted
from damoyolo.inference_answer import OUTPUT_TENSORS, ModelIdentity
from damoyolo.opening import open_service, read_identity
from damoyolo.request import OPTION_NAMES
from damoyolo.response import CONTENT_TYPES, format_error
from damoyolo.service import Answer
from damoyolo.worker_log import protect_log

logger = logging.getLogger(__name__)


class TritonPythonModel:
    """Serves the archive; every request of a batch succeeds or fails on its own.

    input `image`: BYTES (N, 1), encoded images.
    output `answer`: BYTES (N, 1), for each image the body that TorchServe would send.
    outputs of the Open Inference Protocol, for M detections in all N images: `counts` INT64 (N, 1), `boxes`
    FP32 (M, 4), `scores` FP32 (M, 1), `class_ids` INT64 (M, 1), `labels` BYTES (M, 1).
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the network and warm it up; Triton calls it before the model is ready."""
        logging.basicConfig(level=logging.WARNING)
        on_gpu = args["model_instance_kind"] == "GPU"
        device = torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")
        groups = json.loads(args["model_config"])["instance_group"]
        workers = sum(group["count"] * max(1, len(group["gpus"])) for group in groups)
        model = ModelIdentity(args["model_name"], read_identity(ARCHIVE).version)
        self.service = open_service(ARCHIVE, device, workers=workers, model=model)
        protect_log()
        backend = self.service.detector.pipeline
        print(f"the network runs in {backend.name}, {backend.precision}, on {device}", flush=True)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in their order."""
        try:
            return self._execute(requests)
        except DeviceLostError:
            # Every later CUDA call of this process would fail too; serve.py ends a server that lost one.
            logger.critical("the device is lost; ending this process", exc_info=True)
            logging.shutdown()
            os._exit(1)

    def _execute(self, requests: Sequence[Any]) -> list[Any]:
        read = [self._read(request) for request in requests]
        rows = [row for rows in read if not isinstance(rows, Answer) for row in rows]
        answers = iter(self.service.answer(rows, [{}] * len(rows)))
        return [
            self._respond(request, [rows] if isinstance(rows, Answer) else [next(answers) for _ in rows])
            for request, rows in zip(requests, read, strict=True)
        ]

    def _read(self, request: Any) -> list[dict[str, Any]] | Answer:
        """The rows of a request, or the answer to one that cannot be read."""
        try:
            return _read_rows(request)
        except RequestError as error:
            return _refusal(error)
        except Exception as error:
            return self.service.answer_failure(error, "reading a request")

    def _respond(self, request: Any, answers: list[Answer]) -> Any:
        """The response to a request; what goes wrong here would else fail all requests of the batch."""
        for index, answer in enumerate(map(_of_one_image, answers)):
            if answer.error:
                return _error_response(answer, index if len(answers) > 1 else None)
        try:
            return self._tensors(request, answers)
        except Exception as error:
            return _error_response(self.service.answer_failure(error, "writing an answer"), None)

    def _tensors(self, request: Any, answers: list[Answer]) -> Any:
        asked = request.requested_output_names()
        detections = [found for answer in answers for found in answer.detections]
        bodies = np.array([[answer.body] for answer in answers], dtype=object)
        tensors = [pb_utils.Tensor("answer", bodies)] if "answer" in asked else []
        for name, (_, tensor_of) in OUTPUT_TENSORS.items():
            if name in asked:
                values = tensor_of(detections, self.service.detector.config.class_names)
                tensors.append(
                    pb_utils.Tensor(name, values.reshape(len(values), 4 if name == "boxes" else 1))
                )
        return pb_utils.InferenceResponse(tensors)

    def finalize(self) -> None:
        """End the threads; Triton calls it when the model is unloaded."""
        self.service.close()


def _read_rows(request: Any) -> list[dict[str, Any]]:
    """A row for each image: options are fields beside it, as in a form.

    Raises:
        InvalidOptionError: a parameter is no option; in a row, `body` or `model_name` would pass for a field.
    """
    images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().ravel()
    parameters = json.loads(request.parameters() or "{}")
    is_base64 = parameters.get("content_type") == "base64" and bool(parameters.pop("content_type"))
    for name in parameters:
        if name not in OPTION_NAMES:
            raise InvalidOptionError(
                f"unknown field {quoted(name)}; known options are {', '.join(OPTION_NAMES)}"
            )
    options = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()
    }
    if is_base64:
        return [{"body": {"image": image.decode("latin-1")}, **options} for image in images]
    return [{"body": image, **options} for image in images]


def _of_one_image(answer: Answer) -> Answer:
    """The answer, or an error: an element may be JSON of several images, or of a request for tensors."""
    if answer.error or len(answer.detections) == 1:
        return answer
    return _refusal(
        RequestError(
            "an element of the tensor is JSON of several images, or of a request for tensors; accepted for "
            'each element is one image: the encoded image, or {"image": "..."} with its base64'
        )
    )


def _refusal(error: RequestError) -> Answer:
    return Answer(format_error(error), CONTENT_TYPES["json"], error)


def _error_response(answer: Answer, index: int | None) -> Any:
    """The JSON of the error as Triton's message; Triton has three of the statuses.

    index: of the image in a request of several.
    """
    error = answer.error
    assert error is not None
    body = answer.body if index is None else format_error(type(error)(f"inputs[0].data[{index}]: {error}"))
    code = pb_utils.TritonError.INVALID_ARG if error.status < 500 else pb_utils.TritonError.INTERNAL
    code = pb_utils.TritonError.UNAVAILABLE if error.status == 503 else code
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(body.decode("ascii"), code))
