"""Workers on several GPUs: where TorchServe puts them, what they answer, and what losing one GPU's costs.

The first tests need no GPU: `nvidia-smi` is a stand-in that shows two, and the handler does nothing. The
others need two. With DAMOYOLO_TEST_ARCHIVE they serve that archive, whose kernels may be compiled, and with
DAMOYOLO_TEST_RESULTS they append what they saw to that file.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import urllib3
import yaml

from lib.archive.members import BatchingSetting, copy_archive, empty_archive, read_settings
from lib.server.gpus import gpu_environment
from lib.server.served_archive import serve_archive, serve_with_setting

import benchmark_server
from damoyolo.config import SETTINGS_FILE
from doubles.real_server import wait_until
from doubles.worker_load import CLIENTS, clients, devices_of, record, send, signed_archive, statuses

TWO_GPUS = """#!/bin/sh
case "$*" in
  *--query-gpu=index*) printf 'index\\n0\\n1\\n' ;;
  *memory.used*) printf 'gpu [%%], memory [%%], memory.used [MiB]\\n0 %%, 0 %%, 0 MiB\\n' ;;
esac
"""
WORKERS_PER_GPU = 2
# ---- without a GPU -----------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A machine on which nvidia-smi and PyTorch show two GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(TWO_GPUS)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def idle_archive(archive, tmp_path):
    """An archive whose handler does nothing."""
    idle = empty_archive(archive.path, tmp_path, BatchingSetting(4, 1, 1), answer_bytes=100)
    settings = {**read_settings(idle), "handler": {}}
    (tmp_path / "idle").mkdir()
    return copy_archive(
        idle, tmp_path / "idle" / idle.name, {SETTINGS_FILE: yaml.safe_dump(settings).encode()}
    )


@pytest.mark.slow
def test_workers_stay_evenly_spread_when_their_number_changes(two_gpus, idle_archive):
    with serve_with_setting(idle_archive, BatchingSetting(4, 1, 4)) as served:
        for workers in (4, 6, 2, 4):
            served.scale(workers)
            assert served.batching()["workers_per_gpu"] == {"0": workers // 2, "1": workers // 2}


@pytest.mark.slow
def test_the_benchmark_gives_each_gpu_the_same_workers_and_load(two_gpus, idle_archive, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    command = ["--archive", str(idle_archive), "--gpus", "1", "2", "--workers", "2", "--concurrency", "3"]
    command += [
        "--limit-empty",
        "--duration",
        "1",
        "--warm-up",
        "0.5",
        "--processes",
        "1",
        "--jsonl",
        str(rows),
    ]
    assert benchmark_server.main(command) == 0
    measured = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["load"] for row in measured] == ["closed 3", "closed 6", "empty, closed 3", "empty, closed 6"]
    for row, gpus in zip(measured, [1, 2, 1, 2], strict=True):
        assert row["gpus"] == gpus
        assert row["workers_per_gpu"] == {str(gpu): 2 for gpu in range(gpus)}
        assert row["errors"] == 0
    out = capsys.readouterr().out
    assert "note:" not in out
    heading, *lines = out[out.index("\nGPUs ") + 1 :].splitlines()
    assert heading.endswith("of empty  of 1 GPU")
    assert lines[0].endswith("  1.00")
    assert lines[1].split()[-2].endswith("%")


# ---- with two GPUs -----------------------------------------------------------------------------------------


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def signing_archive(request, tmp_path_factory):
    """The demo weights in fp16, with two workers per GPU that sign their answers."""
    given = os.environ.get("DAMOYOLO_TEST_ARCHIVE")
    source = Path(given) if given else request.getfixturevalue("archive").path
    workers = WORKERS_PER_GPU * torch.cuda.device_count()
    return signed_archive(source, tmp_path_factory.mktemp("signed"), BatchingSetting(64, 1, workers))


def assert_similar(body, expected):
    """The same detections to within rounding: cuDNN chooses its kernels in each worker by itself."""
    found, wanted = (json.loads(each)["detections"] for each in (body, expected))
    for these, others in ((found, wanted), (wanted, found)):
        for detection in these:
            near = [
                other
                for other in others
                if other["class_id"] == detection["class_id"]
                and max(abs(a - b) for a, b in zip(other["bbox"], detection["bbox"], strict=True)) <= 1.5
                and abs(other["score"] - detection["score"]) <= 0.02
            ]
            assert near or detection["score"] <= 0.25 + 0.02, detection


@pytest.mark.gpu
@pytest.mark.slow
@needs_two_gpus
@pytest.mark.parametrize("mps", [False, True], ids=["time_slices", "mps"])
def test_every_worker_answers_alike_and_one_gpu_s_can_die_while_the_others_serve(
    mps, signing_archive, smears
):
    images = [encoded for encoded, _ in smears.values()]
    gpus = torch.cuda.device_count()
    with gpu_environment(None, mps) as environment, serve_archive(signing_archive, environment) as served:
        assert served.batching()["workers_per_gpu"] in (
            {},
            {str(gpu): WORKERS_PER_GPU for gpu in range(gpus)},
        )
        devices = check_answers(served.predictions_url, images, mps)
        assert Counter(devices.values()) == {f"cuda:{gpu}": WORKERS_PER_GPU for gpu in range(gpus)}
        kill_workers_under_load(served.predictions_url, images, devices, mps)


def check_answers(url, images, mps):
    """Every worker answers every image, alone in its batch; returns process -> device of the workers."""
    bodies = defaultdict(dict)  # image -> process -> body
    devices, expected_workers = {}, WORKERS_PER_GPU * torch.cuda.device_count()
    pool = urllib3.PoolManager()
    for _ in range(40 * expected_workers):  # idle workers take turns, so a few rounds do
        for index, image in enumerate(images):
            outcome = send(pool, url, image)
            assert outcome.status == 200, outcome
            devices[outcome.pid] = outcome.device
            bodies[index][outcome.pid] = outcome.body
        if all(len(bodies[index]) == expected_workers for index in range(len(images))):
            break
    pool.clear()
    assert [len(bodies[index]) for index in range(len(images))] == [expected_workers] * len(images)
    distinct = [len(set(of_workers.values())) for of_workers in bodies.values()]
    record(check="answers", mps=mps, workers=devices, images=len(images), distinct_bodies_per_image=distinct)
    for of_workers in bodies.values():
        first, *others = of_workers.values()
        for body in others:
            assert_similar(body, first)
    return devices


def kill_workers_under_load(url, images, devices, mps):
    """Kill all workers of the last GPU under load, wait for its new ones, and record what clients saw."""
    lost_gpu = f"cuda:{torch.cuda.device_count() - 1}"
    victims = [pid for pid, device in devices.items() if device == lost_gpu]
    with clients(url, images) as outcomes:
        wait_until(lambda: len(outcomes) > 20 * CLIENTS, "load", timeout_s=60)
        killed_s = time.monotonic()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

        def are_replaced():
            seen = devices_of(outcomes[-20 * CLIENTS :])
            return list(seen.values()).count(lost_gpu) == len(victims) and not seen.keys() & set(victims)

        wait_until(are_replaced, f"answers of new workers on {lost_gpu}", timeout_s=180)
        recovered_s = time.monotonic()
        enough = len(outcomes) + 20 * CLIENTS
        wait_until(lambda: len(outcomes) >= enough, "load afterwards", timeout_s=60)
    seen = summarise(outcomes, killed_s, recovered_s, lost_gpu, devices)
    record(check="workers of one GPU killed", mps=mps, killed=len(victims), **seen)
    # What the dead workers had may fail; everything else, before and after, is answered.
    assert seen["statuses_before"].keys() == {"200"}
    assert seen["statuses_after_recovery"].keys() == {"200"}
    assert seen["lost"] == 0
    assert seen["others_during_outage"] > 0
    if not mps:  # a killed client of MPS may take others of its service with it
        # A batch of each dead worker at most, which may hold a request of every client.
        assert seen["not_200"] <= len(victims) * CLIENTS
        assert seen["survivors"] == seen["others"]


def summarise(outcomes, killed_s, recovered_s, lost_gpu, devices):
    """What clients saw, from two seconds before the workers died on."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.answered_s)
    others = {pid for pid, device in devices.items() if device != lost_gpu}
    during = [each for each in ordered if killed_s < each.answered_s <= recovered_s]
    good_s = [killed_s, *(each.answered_s for each in during if each.status == 200), recovered_s]
    first_new_s = next(
        (each.answered_s for each in during if each.device == lost_gpu and each.pid not in devices),
        recovered_s,
    )

    after = [each for each in ordered if each.sent_s > recovered_s]
    before = [each for each in ordered if each.answered_s <= killed_s]
    latencies_ms = sorted(1e3 * (each.answered_s - each.sent_s) for each in during)
    return {
        "clients": CLIENTS,
        "statuses_before": statuses(before),
        "statuses_during": statuses(during),
        "statuses_after_recovery": statuses(after),
        "not_200": sum(each.status != 200 for each in ordered),
        "lost": sum(not isinstance(each.status, int) for each in ordered),
        "longest_gap_of_good_answers_ms": 1e3 * max(b - a for a, b in itertools.pairwise(good_s)),
        "slowest_answer_during_ms": latencies_ms[-1] if latencies_ms else None,
        "first_answer_of_a_new_worker_s": first_new_s - killed_s,
        "all_new_workers_answer_s": recovered_s - killed_s,
        "others_during_outage": sum(each.device != lost_gpu and each.status == 200 for each in during),
        "answers_by_gpu_during": dict(Counter(str(each.device) for each in during if each.status == 200)),
        "others": len(others),
        "survivors": len(others & {each.pid for each in after}),
        "rate_before_per_s": len(before) / max(1e-3, killed_s - ordered[0].sent_s),
        "rate_after_per_s": len(after) / max(1e-3, ordered[-1].answered_s - recovered_s),
    }
