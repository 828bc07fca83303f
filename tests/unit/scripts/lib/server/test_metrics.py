import sys
import time

import pytest

from lib.server import metrics
from lib.server.metrics import UtilisationSampler, parse_counters

from doubles.stand_in_server import METRICS_PAGE


def test_counters_are_those_of_the_model_and_stages_stand_apart():
    counters = parse_counters(METRICS_PAGE.format(batches=3.0, requests="1.2E1", network_s=0.5), "m")
    assert counters == {
        "damoyolo_batch_size_count": 3.0,
        "damoyolo_batch_size_sum": 12.0,
        "damoyolo_stage_duration_seconds_sum/network": 0.5,
        "ts_inference_requests_total": 1500.0,
    }


def test_a_busy_core_is_seen(monkeypatch):
    monkeypatch.setattr(metrics, "SAMPLE_INTERVAL_S", 0.05)
    monkeypatch.setenv("PATH", "")
    if metrics.cpu_seconds() is None:
        pytest.skip("CPU times are unknown on this system")
    with UtilisationSampler() as sampler:
        started = time.monotonic()
        while time.monotonic() - started < 0.5:
            pass
        window_s = (started, time.monotonic())
    busy = sampler.busy_cores(window_s)
    assert busy is not None
    assert busy > 0.5
    assert sampler.gpu_percent(window_s) is None
    assert sampler.busy_cores((0.0, 0.0)) is None


def test_the_gpu_is_sampled_in_the_background_and_only_the_window_counts(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport time\nprint('[N/A]')\n"
        "while True:\n    print(50, flush=True); time.sleep(0.02)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with UtilisationSampler() as sampler:
        time.sleep(0.5)
        end_s = time.monotonic()
    assert sampler.gpu_percent((0.0, end_s)) == 50
    assert sampler.gpu_percent((0.0, 1.0)) is None
