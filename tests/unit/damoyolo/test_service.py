"""Answers of a whole batch, whatever happens to one of its requests."""

import base64
import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from damoyolo.config import ServingConfig
from damoyolo.errors import CorruptImageError, DeviceLostError
from damoyolo.response import CONTENT_TYPES
from damoyolo.service import DetectionService
from damoyolo.structures import Detections
from damoyolo.time_budget import TimeBudget
from doubles.images import encode_jpeg

IMAGE = encode_jpeg(Image.new("RGB", (64, 48), (10, 20, 30)))
POISON = IMAGE + b"poison"
CORRUPT = IMAGE + b"corrupt"


class ScriptedDetector:
    """A detector that finds one object per image and fails on request."""

    def __init__(self, failure=None):
        self.config = ServingConfig(class_names=("cat", "dog"))
        self.device = torch.device("cpu")
        self.failure = failure
        self.batch_sizes = []
        self.time_budget = TimeBudget()

    def detect(self, images, options, time_stage):
        assert len(images) == len(options)
        self.batch_sizes.append(len(images))
        if self.failure is not None and POISON in images:
            raise self.failure
        return [
            CorruptImageError("broken")
            if image == CORRUPT
            else Detections(
                np.array([[1, 2, 30, 40]], np.float32),
                np.array([each.score_threshold], np.float32),
                np.array([1]),
                (48, 64),
            )
            for image, each in zip(images, options, strict=True)
        ]

    def close(self):
        """Nothing is held."""


@pytest.fixture
def services():
    made = []

    def make(failure=None, **settings):
        detector = ScriptedDetector(failure)
        detector.config = ServingConfig.from_mapping({"class_names": ["cat", "dog"], **settings})
        made.append(DetectionService(detector))
        return made[-1]

    yield make
    for service in made:
        service.close()


def fail(*_):
    raise RuntimeError("surprise")


def answer(service, *bodies, **headers):
    heads = {name.replace("_", "-"): value for name, value in headers.items()}
    return service.answer([{"body": bytearray(body)} for body in bodies], [heads] * len(bodies))


def test_every_request_gets_its_own_answer_in_order(services):
    answers = answer(services(), IMAGE, CORRUPT, b"", IMAGE)
    assert [each.error and each.error.kind for each in answers] == [
        None,
        "CorruptImage",
        "MissingImage",
        None,
    ]
    assert all(each.content_type == "application/json" for each in answers)
    assert json.loads(answers[0].body)["detections"][0]["label"] == "dog"
    assert json.loads(answers[1].body) == {"code": 422, "type": "CorruptImage", "message": "broken"}


def test_an_answer_has_the_detections_of_its_images(services):
    good, corrupt, drawn = answer(services(), IMAGE, CORRUPT, IMAGE, accept="image/png")
    assert [len(each.detections) for each in (good, corrupt, drawn)] == [1, 0, 1]
    assert good.detections[0].class_ids.tolist() == [1]


def test_whatever_fails_every_request_has_an_answer(services, monkeypatch):
    service = services()
    monkeypatch.setattr(service, "_respond_to_all", fail)
    assert [each.error.status for each in answer(service, IMAGE, IMAGE)] == [500, 500]


def test_requests_of_a_batch_keep_their_options(services):
    rows = [{"body": bytearray(IMAGE)}] * 3
    heads = [{"X-Detect-Score-Threshold": str(value)} for value in (0.1, 0.5, 0.9)]
    answers = services().answer(rows, heads)
    assert [json.loads(each.body)["detections"][0]["score"] for each in answers] == [0.1, 0.5, 0.9]


def tensors_of(*images, **more):
    inputs = [
        {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": list(map(base64_of, images))}
    ]
    return json.dumps({"inputs": inputs, **more}).encode()


def base64_of(image):
    return base64.b64encode(image).decode()


def test_protocols_share_a_batch_and_each_gets_its_own_answer(services):
    plain, failing = tensors_of(IMAGE, IMAGE, id="a"), tensors_of(IMAGE, CORRUPT)
    instances = json.dumps({"instances": [{"b64": base64_of(IMAGE)}]}).encode()
    binary = tensors_of(IMAGE, parameters={"binary_data_output": True, "score_threshold": 0.75})
    service = services()
    answers = answer(service, IMAGE, plain, instances, b"", failing, binary, tensors_of())
    assert service.detector.batch_sizes == [1 + 2 + 1 + 2 + 1]
    assert [each.error.status if each.error else 200 for each in answers] == [
        200,
        200,
        200,
        400,
        422,
        200,
        400,
    ]
    assert json.loads(answers[0].body)["detections"][0]["label"] == "dog"
    tensors = json.loads(answers[1].body)
    assert (tensors["model_name"], tensors["id"]) == ("damoyolo", "a")
    assert [output["data"] for output in tensors["outputs"]] == [
        [1, 1],
        [1, 2, 30, 40] * 2,
        [0.25] * 2,
        [1, 1],
        ["dog"] * 2,
    ]
    assert len(json.loads(answers[2].body)["predictions"]) == 1
    assert json.loads(answers[4].body)["message"] == "inputs[0].data[1]: broken"
    length = int(answers[5].headers["Inference-Header-Content-Length"])
    assert answers[5].content_type == "application/octet-stream"
    assert answers[5].body[length:].endswith(b"\x03\0\0\0dog")
    assert np.float32(0.75).tobytes() in answers[5].body[length:]
    assert all(not each.headers for index, each in enumerate(answers) if index != 5)


def test_tensors_larger_than_the_server_sends_are_refused(services):
    (refused,) = answer(services(max_response_bytes=200), tensors_of(IMAGE))
    assert "max_detections" in str(refused.error)
    assert refused.error.status == 413


def test_only_bad_requests_do_not_reach_the_detector(services):
    service = services()
    assert [each.error is not None for each in answer(service, b"", b"")] == [True, True]
    assert service.detector.batch_sizes == []


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (RuntimeError("surprise"), 500),
        (torch.OutOfMemoryError("CUDA out of memory"), 507),
        (MemoryError(), 507),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), 507),
    ],
)
def test_a_batch_that_fails_as_a_whole_is_halved_until_the_failing_image_is_alone(
    services, failure, status, caplog
):
    service = services(failure)
    answers = answer(service, IMAGE, IMAGE, POISON, IMAGE, IMAGE)
    assert [each.error.status if each.error else 200 for each in answers] == [200, 200, status, 200, 200]
    assert "surprise" not in str(json.loads(answers[2].body))
    assert service.detector.batch_sizes == [5, 2, 3, 1, 2]
    assert caplog.records


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError, torch.OutOfMemoryError, ValueError])
def test_a_lost_device_is_not_the_failure_of_one_request(services, monkeypatch, error):
    monkeypatch.setattr("damoyolo.failures.is_alive", lambda _: False)
    with pytest.raises(DeviceLostError):
        answer(services(error("CUDA error: illegal address")), IMAGE, POISON)


@pytest.mark.parametrize("place", ["format_json_each", "draw_detections", "RequestParser.parse"])
def test_a_lost_device_is_noticed_wherever_it_surfaces(services, monkeypatch, place):
    monkeypatch.setattr("damoyolo.failures.is_alive", lambda _: False)
    monkeypatch.setattr(f"damoyolo.service.{place}", fail)
    rows = [{"body": bytearray(IMAGE)}] * 2
    with pytest.raises(DeviceLostError):
        services().answer(rows, [{"Accept": "image/png"}, {}] if place == "draw_detections" else [{}, {}])


def test_memory_given_back_makes_room_for_the_halves(services, monkeypatch):
    freed = []
    monkeypatch.setattr("damoyolo.service.free_cached_memory", freed.append)
    answer(services(MemoryError()), IMAGE, POISON, IMAGE)
    answer(services(RuntimeError("surprise")), IMAGE, POISON, IMAGE)
    assert freed == [torch.device("cpu")] * 2  # the batches of 3 and of 2


def test_the_question_for_the_model_card_is_answered_beside_images(services):
    service = DetectionService(services().detector, model_card=b'{"variant":"S"}')
    rows = [
        {"body": bytearray(IMAGE)},
        {},
        {"body": bytearray()},
        {"body": bytearray(IMAGE)},
    ]
    describe = {"describe": "True"}
    answers = service.answer(rows, [{}, describe, describe, describe])
    service.close()
    assert [each.error for each in answers] == [None] * 4
    assert [each.body == b'{"variant":"S"}' for each in answers] == [False, True, True, False]


def test_instances_share_the_batch_and_come_back_together(services):
    encoded = [{"b64": base64.b64encode(image).decode()} for image in (IMAGE, CORRUPT)]
    service = services()
    row = {"body": {"instances": [encoded[0], encoded[0]]}}
    (good,) = service.answer([row], [{}])
    assert len(json.loads(good.body)["predictions"]) == 2
    bad, neighbour = service.answer([{"body": {"instances": encoded}}, {"body": bytearray(IMAGE)}], [{}, {}])
    assert bad.error is not None
    assert bad.error.status == 422
    assert "instances[1]" in str(bad.error)
    assert neighbour.error is None


def test_an_answer_that_the_server_could_not_send_is_refused(services):
    (refused,) = answer(services(max_response_bytes=500), IMAGE, Accept="image/png")
    assert refused.error is not None
    assert refused.error.status == 413
    assert "max_response_bytes" in str(refused.error)
    assert "json smaller" in str(refused.error)


def test_drawn_and_plain_answers_share_a_batch(services):
    rows = [{"body": bytearray(IMAGE)}] * 3
    answers = services().answer(rows, [{"Accept": "image/jpeg"}, {}, {"X-Detect-Format": "png"}])
    assert [each.content_type for each in answers] == ["image/jpeg", "application/json", "image/png"]
    assert answers[0].body[:2] == b"\xff\xd8"
    assert answers[2].body[:4] == b"\x89PNG"


def test_every_format_shares_a_batch_with_the_others(services):
    formats = ["json", "coco", "arrays", "supervision", "yolo", "json", "json"]
    rows = [{"body": bytearray(IMAGE)}] * len(formats)
    heads = [{"X-Detect-Format": name, "X-Detect-Image-Id": "5"} for name in formats]
    service = services()
    answers = service.answer(rows, heads)
    assert [each.error for each in answers] == [None] * len(formats)
    assert service.detector.batch_sizes == [len(formats)]
    assert [each.content_type for each in answers] == [CONTENT_TYPES[name] for name in formats]
    json_answer, coco, arrays, supervision, yolo, *others = [each.body for each in answers]
    assert [json_answer] * 2 == others
    assert json.loads(json_answer)["detections"][0]["bbox"] == [1, 2, 30, 40]
    assert json.loads(coco) == [{"image_id": 5, "category_id": 2, "bbox": [1, 2, 29, 38], "score": 0.25}]
    assert json.loads(arrays)["boxes"] == [[1, 2, 30, 40]]
    assert json.loads(supervision)["predictions"][0]["x"] == 15.5
    assert yolo == b"1 0.242188 0.437500 0.453125 0.791667 0.250000\n"
    alone = [service.answer([row], [head])[0] for row, head in zip(rows, heads, strict=True)]
    assert alone == answers


def test_boxes_are_drawn_in_the_colours_of_the_settings(services):
    service = services(class_colours=["#ff0000", "#0000ff"])
    (drawn,) = answer(service, IMAGE, Accept="image/png")
    pixels = np.asarray(Image.open(io.BytesIO(drawn.body)))
    assert pixels[30, 1].tolist() == [0, 0, 255]  # a dog


def test_a_failure_to_write_one_answer_costs_only_that_answer(services, monkeypatch):
    monkeypatch.setattr("damoyolo.service.draw_detections", fail)
    drawn, plain = services().answer([{"body": bytearray(IMAGE)}] * 2, [{"Accept": "image/png"}, {}])
    assert drawn.error is not None
    assert drawn.error.status == 500
    assert plain.error is None


def test_a_failure_to_write_a_batch_costs_no_request_its_answer(services, monkeypatch):
    together = answer(services(), IMAGE, IMAGE, IMAGE)
    monkeypatch.setattr("damoyolo.service.format_json_each", fail)
    assert answer(services(), IMAGE, IMAGE, IMAGE) == together


def test_every_stage_is_timed(services):
    seen = []

    @contextlib.contextmanager
    def time_stage(stage):
        seen.append(stage)
        yield

    services().answer([{"body": bytearray(IMAGE)}], [{}], time_stage)
    assert seen == ["parse", "respond"]


def test_images_that_are_not_drawn_in_time_get_503_and_neighbours_their_answers(services, monkeypatch):
    seconds = [0.0]
    service = services()
    service.detector.time_budget = TimeBudget(5, lambda: seconds[0])

    def decode(*_):
        seconds[0] += 3
        return np.zeros((48, 64, 3), np.uint8)

    monkeypatch.setattr("damoyolo.service.decode_reduced", decode)
    service._drawing_pool.shutdown()
    service._drawing_pool = ThreadPoolExecutor(1)
    rows = [{"body": bytearray(IMAGE)}] * 4
    for _ in range(2):  # each batch has its own time
        answers = service.answer(rows, [{"Accept": "image/png"}] * 3 + [{}])
        assert [each.error and (each.error.status, each.error.kind) for each in answers] == [
            None,
            None,
            (503, "BatchTime"),
            None,
        ]
    assert "longer than 5 s" in str(answers[2].error)
    assert "max_batch_seconds" in str(answers[2].error)
    assert json.loads(answers[2].body)["code"] == 503
