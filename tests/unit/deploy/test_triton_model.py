"""deploy/triton/model.py without a Triton: what a real one cannot be made to do."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from damoyolo.errors import (
    BatchTimeError,
    CorruptImageError,
    DeviceLostError,
    DeviceMemoryError,
    InternalError,
)
from damoyolo.inference_answer import ModelIdentity
from damoyolo.response import format_error
from damoyolo.service import Answer
from damoyolo.structures import Detections
from doubles.triton_server import load_module

CLASS_NAMES = ("a", "b")
OUTPUTS = ("answer", "counts", "boxes", "scores", "class_ids", "labels")


class StandInError(SimpleNamespace):
    """TritonError."""

    INVALID_ARG, UNAVAILABLE, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message, code):
        super().__init__(message=message, code=code)


@pytest.fixture
def model(project_dir, monkeypatch):
    """The module, with a stand-in for the library that only the backend's processes have."""
    library = ModuleType("triton_python_backend_utils")
    library.Tensor = lambda name, values: (name, values)
    library.InferenceResponse = lambda tensors=(), error=None: SimpleNamespace(tensors=tensors, error=error)
    library.TritonError = StandInError
    library.get_input_tensor_by_name = lambda request, name: request.tensors[name]
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load_module(project_dir, "model")


def request(*images, parameters="", outputs=("answer",)):
    tensor = np.array(images, dtype=object).reshape(len(images), 1)
    return SimpleNamespace(
        tensors={"image": SimpleNamespace(as_numpy=lambda: tensor)},
        parameters=lambda: parameters,
        requested_output_names=lambda: set(outputs),
    )


NOTHING = Detections(np.zeros((0, 4), "f4"), np.zeros(0, "f4"), np.zeros(0, "i8"), (4, 4))


def good(body=b"{}", images=1):
    return Answer(body, "", detections=(NOTHING,) * images)


def serving(model, answer):
    """A model whose service answers with a function of rows."""
    made = model.TritonPythonModel()
    detector = SimpleNamespace(config=SimpleNamespace(class_names=CLASS_NAMES))
    made.service = SimpleNamespace(
        answer=lambda rows, _: answer(rows),
        detector=detector,
        answer_failure=lambda error, doing: failed(InternalError(f"{doing}: {error}")),
    )
    return made


def failed(error):
    return Answer(format_error(error), "application/json", error)


def test_requests_of_a_batch_are_answered_together_and_apart(model):
    seen = []

    def answer(rows):
        seen.append(rows)
        return [failed(CorruptImageError("x")) if row["body"] == b"bad" else good() for row in rows]

    requests = [
        request(b"1", b"2", parameters='{"score_threshold":0.5,"class_agnostic":true,"classes":"a"}'),
        request(b"3", b"bad"),
        request(b"bad"),
        request(b"4"),
    ]
    first, second, third, fourth = serving(model, answer).execute(requests)
    options = {"score_threshold": "0.5", "class_agnostic": "true", "classes": "a"}
    (rows,) = seen
    assert rows[:3] == [{"body": b"1", **options}, {"body": b"2", **options}, {"body": b"3"}]
    assert first.tensors[0][1].tolist() == [[b"{}"], [b"{}"]]
    assert json.loads(second.error.message)["message"] == "inputs[0].data[1]: x"
    assert json.loads(third.error.message) == {"code": 422, "type": "CorruptImage", "message": "x"}
    assert fourth.error is None


@pytest.mark.parametrize("images", [0, 2])
def test_an_element_that_is_no_single_image_fails_alone(model, images):
    def answer(rows):
        return [good(images=images if row["body"] == b"bad" else 1) for row in rows]

    requests = [
        request(b"1", outputs=OUTPUTS),
        request(b"bad", outputs=OUTPUTS),
        request(b"2", b"bad"),
        request(b"3"),
    ]
    first, second, third, fourth = serving(model, answer).execute(requests)
    assert dict(first.tensors)["counts"].tolist() == [[0]]
    assert dict(first.tensors)["boxes"].shape == (0, 4)
    assert second.error.code == third.error.code == "INVALID_ARG"
    assert "an element of the tensor is JSON of several images" in json.loads(second.error.message)["message"]
    assert json.loads(third.error.message)["message"].startswith("inputs[0].data[1]: an element")
    assert fourth.tensors[0][1].tolist() == [[b"{}"]]


@pytest.mark.parametrize("name", ["body", "data", "model_name", "treshold"])
def test_a_parameter_that_is_no_option_is_refused_alone(model, name):
    seen = []

    def answer(rows):
        seen.extend(rows)
        return [good() for _ in rows]

    requests = [request(b"1", parameters=json.dumps({name: "x"})), request(b"2")]
    first, second = serving(model, answer).execute(requests)
    assert json.loads(first.error.message)["message"].startswith(f"unknown field '{name}'; known options are")
    assert second.error is None
    assert seen == [{"body": b"2"}]


def test_what_fails_unexpectedly_fails_one_request(model, monkeypatch):
    def labels(found, names):
        raise ValueError("oops")

    monkeypatch.setitem(model.OUTPUT_TENSORS, "labels", ("BYTES", labels))
    requests = [
        request(b"1", parameters="{broken"),
        request(b"2", outputs=["labels"]),
        request(b"3"),
    ]
    first, second, third = serving(model, lambda rows: [good() for _ in rows]).execute(requests)
    assert json.loads(first.error.message)["message"].startswith("reading a request: ")
    assert json.loads(second.error.message)["message"] == "writing an answer: oops"
    assert third.error is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptImageError, "INVALID_ARG"),
        (BatchTimeError, "UNAVAILABLE"),
        (InternalError, "INTERNAL"),
        (DeviceMemoryError, "INTERNAL"),
    ],
)
def test_an_error_has_the_nearest_of_tritons_codes(model, error, code):
    (response,) = serving(model, lambda rows: [failed(error("x"))]).execute([request(b"1")])
    assert response.error.code == code


def test_a_lost_device_ends_the_process(model, monkeypatch):
    class ProcessEnded(BaseException):
        """In place of the end of the process."""

    def end(code):
        assert code == 1
        raise ProcessEnded

    def answer(rows):
        raise DeviceLostError("gone")

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    with pytest.raises(ProcessEnded):
        serving(model, answer).execute([request(b"1")])


@pytest.mark.parametrize(
    ("kind", "gpus", "device", "workers"),
    [("CPU", [], "cpu", 3), ("GPU", [0, 1], "cuda:1", 6)],
)
def test_the_service_is_opened_on_the_device_of_the_instance(model, monkeypatch, kind, gpus, device, workers):
    opened = []
    pipeline = SimpleNamespace(name="pytorch", precision="fp32")

    def open_service(folder, device, **options):
        opened.append((folder.name, str(device), options))
        return SimpleNamespace(detector=SimpleNamespace(pipeline=pipeline))

    monkeypatch.setattr(model, "open_service", open_service)
    monkeypatch.setattr(model, "read_identity", lambda _: ModelIdentity("in the manifest", "2.0"))
    monkeypatch.setattr(model, "protect_log", lambda: None)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    config = {"instance_group": [{"count": 3, "gpus": gpus}]}
    args = {"model_name": "cells", "model_instance_kind": kind, "model_instance_device_id": "1"}
    model.TritonPythonModel().initialize({**args, "model_config": json.dumps(config)})
    expected = {"workers": workers, "model": ModelIdentity("cells", "2.0")}
    assert opened == [("archive", device, expected)]
