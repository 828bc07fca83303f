"""The network with one technique after another, as far as a CPU can run it, on a small image."""

import functools

import pytest
import torch

from lib.measure import ablation
from lib.measure.ablation import (
    FUSIONS_IN_ORDER,
    AblationStep,
    ablation_steps,
    flop_per_image,
    measure_ablation,
)
from lib.measure.timing import format_table, interleaved_medians_s
from lib.paths import DEMO_WEIGHTS

from benchmark_detector import ABLATION_COLUMNS

CPU = torch.device("cpu")


def test_every_step_is_compared_with_float32_and_running_out_of_memory_does_not_end_the_run(monkeypatch):
    briefly = functools.partial(interleaved_medians_s, rounds=1, slice_s=0.01)
    monkeypatch.setattr(ablation, "interleaved_medians_s", briefly)

    def greedy():
        raise torch.OutOfMemoryError("no memory")

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator)
    steps = ablation_steps(DEMO_WEIGHTS, 3, CPU, compile_too=False)
    steps.insert(1, AblationStep("greedy", greedy))
    rows = measure_ablation(steps, pixels)
    by_name = {row["step"]: row for row in rows}
    assert list(by_name) == ["float32", "greedy", "+ folding", "AMP (bf16), folded", "bf16, folded"]
    assert by_name["float32"]["score_difference"] == 0
    assert by_name["+ folding"]["score_difference"] < 1e-4
    assert 1e-6 < by_name["bf16, folded"]["score_difference"] < 0.2
    failed = by_name.pop("greedy")
    assert failed["failure"] == "out of memory"
    assert "ms" not in failed
    for row in by_name.values():
        assert row["images_per_s"] == pytest.approx(2 / row["ms"] * 1e3)
    table = format_table(rows, ABLATION_COLUMNS)
    assert all(step.name in table for step in steps)


def test_operations_are_those_of_the_network_and_its_classes():
    """37.8 GFLOP are published for S with the 80 classes of COCO; the demo has 3."""
    head = sum(2 * 9 * channels * side**2 for channels, side in ((128, 80), (256, 40), (512, 20)))
    assert flop_per_image(DEMO_WEIGHTS, 3) == pytest.approx(37.8e9 - 77 * head, rel=0.01)


def test_the_steps_for_a_gpu_add_every_fusion_once():
    names = [step.name for step in ablation_steps(DEMO_WEIGHTS, 3, torch.device("cuda"), compile_too=True)]
    assert len(names) == len(set(names))
    for fusion in FUSIONS_IN_ORDER:
        assert f"+ {fusion.replace('_', ' ')}" in names
