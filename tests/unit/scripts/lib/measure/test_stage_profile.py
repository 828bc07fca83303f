"""The stage table: what is measured and how it adds up."""

import time
from contextlib import contextmanager

import pytest
import torch

from lib.archive.reader import load_detector
from lib.cli import ScriptError
from lib.images import read_images
from lib.measure.stage_profile import (
    CopyTimes,
    NestedStageTimer,
    Profile,
    StageTime,
    answer_call,
    device_activity,
    device_rows,
    measure_copies,
    measure_stages,
    report,
    stage_rows,
)
from lib.measure.traces import nsys_command, run_with_nvtx, write_memory_snapshot, write_trace
from lib.paths import SAMPLE_IMAGES

from damoyolo.service import DetectionService
from damoyolo.stage_timing import no_timing
from doubles.tiny_archive import write_tiny_archive

CPU = torch.device("cpu")


def staged(time_stage):
    """Two stages, of which the first has a part."""
    with time_stage("a"):
        time.sleep(0.01)
        with time_stage("inner"):
            time.sleep(0.02)
    with time_stage("b"):
        time.sleep(0.005)
    time.sleep(0.01)


MEASURED = Profile(
    4,
    [
        StageTime("preprocess", 2.0, 2.5),
        StageTime("preprocess/decode", 1.5, 1.6),
        StageTime("network", 6.0, 0.5),
        StageTime("postprocess", 1.0, 7.0),
    ],
    total_ms=10.0,
    cpu_decode_ms=3.0,
    copies=CopyTimes(h2d_ms=0.5, d2h_ms=0.2, kernels_ms=7.0),
)


def test_a_stage_within_a_stage_is_named_after_both_for_every_timer():
    seen = []

    def timer(who):
        @contextmanager
        def watch(stage):
            seen.append((who, stage))
            yield

        return watch

    staged(NestedStageTimer(timer("x"), timer("y")))
    assert seen == [(who, stage) for stage in ("a", "a/inner", "b") for who in ("x", "y")]


def test_stages_are_measured_in_order_with_their_parts_and_the_time_between_them():
    stages, total_ms = measure_stages(staged, CPU, batches=3)
    times_ms = {stage.name: stage.device_ms for stage in stages}
    assert list(times_ms) == ["a", "a/inner", "b"]
    assert times_ms["a"] >= 30 > times_ms["a/inner"] >= 20
    assert 5 <= times_ms["b"] < 20
    assert total_ms >= 45
    measured = Profile(1, stages, total_ms, 0.0, None)
    assert measured.bars().keys() == {"a", "b", "other"}
    assert sum(measured.bars().values()) == pytest.approx(total_ms)
    assert measured.bars()["other"] >= 9


def test_shares_refer_to_the_whole_and_rates_to_the_batch():
    rows = {row["stage"]: row for row in stage_rows(MEASURED)}
    assert list(rows) == ["preprocess", "preprocess/decode", "network", "postprocess", "other", "total"]
    assert rows["network"]["share"] == pytest.approx(0.6)
    assert rows["network"]["host_ms"] == 0.5
    assert rows["network"]["images_per_s"] == pytest.approx(4 / 6e-3)
    assert rows["other"]["ms"] == pytest.approx(1.0)
    outer = [row["share"] for name, row in rows.items() if "/" not in name and name != "total"]
    assert sum(outer) == pytest.approx(1.0)


def test_the_device_table_has_copies_network_and_nms():
    rows = {row["stage"]: row["ms"] for row in device_rows(MEASURED)}
    assert rows == {"H2D": 0.5, "compute": 6.0, "D2H": 0.2, "NMS": 0.8}
    assert sum(row["share"] for row in device_rows(MEASURED)) == pytest.approx(1.0)
    text = report(MEASURED)
    assert "busy for 77%" in text
    assert device_rows(Profile(1, [], 1.0, 0.0, None)) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "h2d"),
        ("Memcpy DtoH (Device -> Pinned)", "d2h"),
        ("Memcpy DtoD (Device -> Device)", "kernels"),
        ("Memset (Device)", "kernels"),
        ("sm90_xmma_fprop_implicit_gemm", "kernels"),
    ],
)
def test_copies_are_told_from_other_work_by_name(name, kind):
    assert device_activity(name) == kind


def test_every_batch_has_other_images_and_the_stages_are_those_of_the_service(tmp_path):
    detector = load_detector(write_tiny_archive(tmp_path / "archive"), CPU)
    service = DetectionService(detector)
    try:
        stages, _ = measure_stages(answer_call(service, read_images(SAMPLE_IMAGES), 2), CPU, batches=2)
        assert [stage.name for stage in stages if not stage.is_part] == [
            "parse",
            "preprocess",
            "network",
            "postprocess",
            "respond",
        ]
        with pytest.raises(ScriptError, match="refuses one of the images"):
            answer_call(service, [b"no image"], 1)(no_timing)
    finally:
        service.close()


def test_the_nsys_command_runs_the_command_with_nvtx_and_shows_the_nodes_of_graphs():
    command = nsys_command(["--batch-sizes", "32"])
    assert command.startswith("nsys profile -t cuda,nvtx,osrt ")
    assert "--capture-range=cudaProfilerApi" in command
    assert "--cuda-graph-trace=node" in command
    assert command.endswith("python scripts/profile_detector.py --nvtx --batch-sizes 32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_kernels_snapshot_and_nvtx_on_the_device(tmp_path):
    device = torch.device("cuda")
    host = torch.zeros(2**22).pin_memory()
    weights = torch.zeros((512, 512), device=device)

    def answer(time_stage):
        with time_stage("network"):
            moved = host.to(device, non_blocking=True)
            return (moved[:512] @ weights).cpu()

    answer(no_timing)
    copies = measure_copies(answer, 3)
    assert copies.h2d_ms > copies.d2h_ms > 0
    assert copies.kernels_ms > 0
    write_memory_snapshot(answer, 2, tmp_path / "snapshot.pickle")
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0
    run_with_nvtx(answer, device, 2)
    write_trace(answer, device, 2, tmp_path / "trace.json")
    assert "Memcpy HtoD" in (tmp_path / "trace.json").read_text()
