"""The stage table: what is watched, how it adds up, and what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import profile_detector
from damoyolo.config import ServingConfig
from damoyolo.detector import Detector
from damoyolo.model.damoyolo import build_model
from damoyolo.model.variants import VARIANTS
from damoyolo.service import DetectionService
from damoyolo.stage_timing import StageTimer
from profile_detector import (
    CopyTimes,
    NestedObserver,
    Profile,
    StageTime,
    answer_call,
    device_activity,
    device_rows,
    measure_stages,
    nsys_command,
    profile_rows,
    report,
)

CPU = torch.device("cpu")


def staged(time_stage: StageTimer) -> None:
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


def test_a_stage_within_a_stage_is_named_after_both_and_every_observer_sees_it() -> None:
    seen: list[tuple[str, str]] = []

    def observer(who: str) -> StageTimer:
        @contextmanager
        def watch(stage: str) -> Any:
            seen.append((who, stage))
            yield

        return watch

    staged(NestedObserver(observer("x"), observer("y")))
    assert seen == [(who, stage) for stage in ("a", "a/inner", "b") for who in ("x", "y")]


def test_the_stages_are_measured_in_their_order_with_what_lies_inside_and_between() -> None:
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


def test_shares_refer_to_the_whole_and_rates_to_the_batch() -> None:
    rows = {row["stage"]: row for row in profile_rows(MEASURED)}
    assert list(rows) == ["preprocess", "preprocess/decode", "network", "postprocess", "other", "total"]
    assert rows["network"]["share"] == pytest.approx(0.6)
    assert rows["network"]["host_ms"] == 0.5
    assert rows["network"]["images_per_s"] == pytest.approx(4 / 6e-3)
    assert rows["other"]["ms"] == pytest.approx(1.0)
    outer = [row["share"] for name, row in rows.items() if "/" not in name and name != "total"]
    assert sum(outer) == pytest.approx(1.0)


def test_the_device_table_has_copies_network_and_nms() -> None:
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
def test_copies_are_told_from_other_work_by_name(name: str, kind: str) -> None:
    assert device_activity(name) == kind


def test_the_nsys_command_runs_this_script_with_nvtx_and_opens_graphs() -> None:
    command = nsys_command(["--batch-sizes", "32"])
    assert command.startswith("nsys profile -t cuda,nvtx,osrt ")
    assert "--capture-range=cudaProfilerApi" in command
    assert "--cuda-graph-trace=node" in command
    assert command.endswith("python scripts/profile_detector.py --nvtx --batch-sizes 32")


@pytest.fixture(scope="module")
def service() -> DetectionService:
    """A small detector of random weights on the CPU."""
    torch.manual_seed(0)
    config = ServingConfig(variant="T", class_names=("a", "b"), input_size_hw=(64, 64), precision="fp32")
    model = build_model(VARIANTS["T"], 2, folded=True).requires_grad_(False)
    return DetectionService(Detector(model, config, CPU))


def images(project_dir: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((project_dir / "tests/data/smears").glob("*.jpg"))]


def test_every_batch_brings_other_images_and_answers_are_the_services_own(
    service: DetectionService, project_dir: Path
) -> None:
    answer = answer_call(service, images(project_dir), batch_size=2)
    stages, _ = measure_stages(answer, CPU, batches=2)
    assert [stage.name for stage in stages if not stage.is_part] == [
        "parse",
        "preprocess",
        "network",
        "postprocess",
        "respond",
    ]
    with pytest.raises(ValueError, match="refuses one of the images"):
        answer_call(service, [b"no image"], 1)(lambda stage: contextmanager(lambda: iter([None]))())


def test_the_tool_prints_the_table_and_writes_rows_plot_and_trace(
    service: DetectionService,
    project_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(_archive: Path, _device: torch.device, **_serving: Any) -> Detector:
        return service.detector

    monkeypatch.setattr(profile_detector, "load_detector", load)
    monkeypatch.setattr(DetectionService, "close", lambda self: None)  # other tests need the detector
    rows, plot, trace = tmp_path / "rows.json", tmp_path / "p.png", tmp_path / "trace.json"
    command = ["--device", "cpu", "--batch-sizes", "1", "2", "--batches", "2", "--warm-up", "1"]
    command += ["--json", str(rows), "--plot", str(plot), "--trace", str(trace)]
    assert profile_detector.main(command) == 0
    printed = capsys.readouterr().out
    assert "batch 2" in printed
    assert "nsys profile" in printed
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["batch_size"] for row in written} == {1, 2}
    assert {row["table"] for row in written} == {"stages"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"batch", "preprocess", "network", "postprocess"} <= names


@pytest.mark.parametrize("option", [["--nvtx"], ["--memory-snapshot", "x"]])
def test_what_needs_cuda_is_refused_without(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_detector.main(["--device", "cpu", *option])
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_kernels_snapshot_and_nvtx_on_the_device(tmp_path: Path) -> None:
    device = torch.device("cuda")
    host = torch.zeros(2**22).pin_memory()
    weights = torch.zeros((512, 512), device=device)

    def answer(time_stage: Callable[[str], Any]) -> object:
        with time_stage("network"):
            moved = host.to(device, non_blocking=True)
            return (moved[:512] @ weights).cpu()

    answer(profile_detector.no_timing)
    copies = profile_detector.measure_copies(answer, 3)
    assert copies.h2d_ms > copies.d2h_ms > 0
    assert copies.kernels_ms > 0
    profile_detector.write_memory_snapshot(answer, 2, tmp_path / "snapshot.pickle")
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0
    profile_detector.run_with_nvtx(answer, 2)
    profile_detector.write_trace(answer, device, 2, tmp_path / "trace.json")
    assert "Memcpy HtoD" in (tmp_path / "trace.json").read_text()
