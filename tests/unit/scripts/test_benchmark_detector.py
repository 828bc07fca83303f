"""The ladder of techniques, on as much of it as a CPU can climb and on a small image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.measure.ablation import FUSIONS_IN_ORDER, AblationStep, ablation_steps, flop_per_image
from lib.measure.timing import format_table
from lib.paths import DEMO_WEIGHTS

import benchmark_detector
from benchmark_detector import LADDER_COLUMNS, measure_ablation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """(2, 3, 64, 96) uint8."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator)


def test_every_rung_stands_beside_float32(pixels: torch.Tensor) -> None:
    rows = measure_ablation(ablation_steps(DEMO_WEIGHTS, 3, CPU, compile_too=False), pixels)
    by_name = {row["rung"]: row for row in rows}
    assert by_name["float32"]["score_difference"] == 0
    assert by_name["+ folding"]["score_difference"] < 1e-4
    assert 1e-6 < by_name["bf16, folded"]["score_difference"] < 0.2
    for row in rows:
        assert row["ms"] > 0
        assert row["images_per_s"] == pytest.approx(2 / row["ms"] * 1e3)
    table = format_table(rows, LADDER_COLUMNS)
    assert all(name in table for name in by_name)


def test_operations_are_those_of_the_network_and_its_classes() -> None:
    """37.8 GFLOP are published for S with the 80 classes of COCO; the demo has 3."""
    head = sum(2 * 9 * channels * side**2 for channels, side in ((128, 80), (256, 40), (512, 20)))
    assert flop_per_image(DEMO_WEIGHTS, 3) == pytest.approx(37.8e9 - 77 * head, rel=0.01)


def test_a_rung_that_runs_out_of_memory_does_not_end_the_ladder(pixels: torch.Tensor) -> None:
    def greedy() -> object:
        raise torch.OutOfMemoryError("no memory")

    ablation = ablation_steps(DEMO_WEIGHTS, 3, CPU, compile_too=False)[:1]
    rows = measure_ablation([*ablation, AblationStep("greedy", greedy)], pixels)  # type: ignore[arg-type]
    assert rows[1]["failure"] == "out of memory"
    assert "ms" in rows[0]
    assert "ms" not in rows[1]
    assert "greedy" in format_table(rows, LADDER_COLUMNS)


def test_the_ladder_of_a_gpu_adds_every_rewrite_once() -> None:
    names = [step.name for step in ablation_steps(DEMO_WEIGHTS, 3, torch.device("cuda"), compile_too=True)]
    assert len(names) == len(set(names))
    for fuse in FUSIONS_IN_ORDER:
        assert f"+ {fuse.replace('_', ' ')}" in names


def test_a_folder_without_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_detector.main(["--images", str(tmp_path)]) == 1
    assert "no *.jpg" in capsys.readouterr().err
