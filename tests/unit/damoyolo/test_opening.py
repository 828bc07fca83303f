"""A worker's service opened from an unpacked archive, as every server's worker does it."""

import json

import pytest
import torch

from damoyolo.config import ServingConfig
from damoyolo.cores import usable_cores
from damoyolo.inference_answer import ModelIdentity
from damoyolo.opening import MANIFEST_FILE, open_service, read_identity, share_machine
from doubles.images import encode_jpeg, make_pixels
from doubles.tiny_archive import write_tiny_archive


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = write_tiny_archive(tmp_path_factory.mktemp("archive") / "tiny")
    (folder / "MAR-INF").mkdir()
    manifest = {"model": {"modelName": "cells", "modelVersion": "1.5"}}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(autouse=True)
def threads():
    """Opening sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cuda_sync", "workers", "blocking"),
    [
        ("auto", 8, False),
        ("auto", 9, True),
        ("blocking", 1, True),
        ("spin", 16, False),
    ],
)
def test_workers_sleep_while_waiting_if_others_need_the_cores(monkeypatch, cuda_sync, workers, blocking):
    calls = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("damoyolo.opening.enable_blocking_sync", lambda _: calls.append("blocking sync"))
    monkeypatch.setattr("torch.cuda.set_device", lambda _: calls.append("set device"))
    share_machine(torch.device("cuda", 0), ServingConfig(cuda_sync=cuda_sync), workers)
    # Before the context exists, which takes its flags when it is created.
    assert calls == (["blocking sync", "set device"] if blocking else ["set device"])


def test_without_further_words_the_archive_says_how_it_is_served(model_dir):
    service = open_service(model_dir, torch.device("cpu"), workers=1)
    try:
        answer, card = service.answer(
            [{"body": encode_jpeg(make_pixels(48, 64))}, {}], [{}, {"describe": "True"}]
        )
    finally:
        service.close()
    assert answer.error is None
    assert json.loads(answer.body)["width"] == 64
    assert json.loads(card.body)["versions"]["archive"] == "1.5"
    assert service.detector.config.max_batch_seconds == 40.0  # a third of TorchServe's 120 s
    assert torch.get_num_threads() == usable_cores()


def test_the_server_may_say_more_than_the_archive(model_dir):
    settings = json.loads((model_dir / "model-config.yaml").read_text())
    service = open_service(
        model_dir,
        torch.device("cpu"),
        workers=1000,
        settings={**settings, "responseTimeout": 30},
        model=ModelIdentity("cells", "2"),
        max_response_bytes=2,
    )
    try:
        row = {"body": encode_jpeg(make_pixels(48, 64)), "format": "coco", "score_threshold": "1"}
        answer, drawn, card = service.answer(
            [row, {**row, "format": "png"}, {}], [{}, {}, {"describe": "True"}]
        )
    finally:
        service.close()
    assert (answer.error, answer.body) == (None, b"[]")
    assert drawn.error.status == 413
    assert "more than 2 bytes" in str(drawn.error)
    assert json.loads(card.body)["versions"]["archive"] == "2"
    assert service.detector.config.max_batch_seconds == 10.0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("changes", "warmed"),
    [
        ({"batchSize": 1}, (1,)),
        ({"batchSize": 4}, (1, 2)),
        ({"batchSize": 4, "handler": {"warmup_batch_sizes": [3]}}, (3,)),
    ],
)
def test_what_batches_need_is_ready_before_the_first_one(model_dir, monkeypatch, changes, warmed):
    runs = []
    monkeypatch.setattr("damoyolo.detector.Detector.warm_up", lambda _, sizes: runs.append(tuple(sizes)))
    settings = json.loads((model_dir / "model-config.yaml").read_text())
    handler = {**settings.get("handler", {}), **changes.get("handler", {})}
    service = open_service(
        model_dir, torch.device("cpu"), workers=1, settings={**settings, **changes, "handler": handler}
    )
    service.close()
    assert runs == [warmed]


def test_the_manifest_names_the_model(model_dir):
    assert read_identity(model_dir) == ("cells", "1.5")
