"""The server benchmark against a stand-in that tells counters and workers as TorchServe does."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lib.load.generator import Load
from lib.server import metrics as server_metrics
from lib.server.metrics import (
    CounterWindow,
    UtilisationSampler,
    describe_model,
    parse_counters,
    scale_workers,
)
from lib.server.process import ServerStartError
from lib.server.served_archive import ServedModel

import benchmark_server
from benchmark_server import LoadPlan, add_limits, best_rate, measure_plan, warnings_about

PAGE = """# HELP batches_total Torchserve prometheus counter metric with unit: Count
# TYPE batches_total counter
batches_total{{ModelName="m",Level="Model",Hostname="h",}} {batches}
batched_requests_total{{ModelName="m",Level="Model",Hostname="h",}} {requests}
batched_requests_total{{ModelName="other",Level="Model",Hostname="h",}} 7.0
stage_seconds_total{{ModelName="m",Level="Model",Stage="network",Hostname="h",}} {network_s}
ts_inference_requests_total{{model_name="m",model_version="default",hostname="h",}} 1.5E3
"""


class StandIn:
    """Answers predictions after 10 ms, and counts them as batches of four."""

    def __init__(self) -> None:
        self.requests = 0
        self.workers = 1
        self.never_ready = False
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(0.01)
                stand_in.requests += 1
                self._send(b'{"detections":[]}')

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    batches = stand_in.requests / 4
                    page = PAGE.format(batches=batches, requests=stand_in.requests, network_s=batches * 0.005)
                    self._send(page.encode())
                    return
                state = "UNLOADING" if stand_in.never_ready else "READY"
                workers = [{"status": state}] * stand_in.workers
                self._send(json.dumps([{"batchSize": 4, "maxBatchDelay": 2, "workers": workers}]).encode())

            def do_PUT(self) -> None:
                stand_in.workers = int(self.path.rpartition("=")[2])
                self._send(b"{}")

            def _send(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hung up is no error of the test."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.served = ServedModel(self.url, self.url, self.url, "m")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(server_metrics, "COUNTERS_LAG_S", 0.0)
    running = StandIn()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.02,))
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()


BASE = Load("", [b"image"], 1, warm_up_s=0.05, duration_s=0.4, timeout_s=5.0, processes=1)


def test_counters_are_those_of_the_model_and_stages_stand_apart() -> None:
    counters = parse_counters(PAGE.format(batches=3.0, requests="1.2E1", network_s=0.5), "m")
    assert counters == {
        "batches_total": 3.0,
        "batched_requests_total": 12.0,
        "stage_seconds_total/network": 0.5,
        "ts_inference_requests_total": 1500.0,
    }


def test_the_plan_gives_a_row_a_load_and_open_loops_at_shares_of_the_best(stand_in: StandIn) -> None:
    seen: list[str] = []
    plan = LoadPlan(BASE, concurrencies=[1, 4], rates_per_s=[30.0], rate_shares=[0.5])
    rows = measure_plan(stand_in.served, plan, lambda row: seen.append(row["load"]))
    best = best_rate(rows)
    assert [row["load"] for row in rows] == seen
    assert seen[:3] == ["closed 1", "closed 4", "open 30/s"]
    assert rows[1]["requests_per_s"] == best > 1.5 * rows[0]["requests_per_s"]
    assert rows[3]["rate_per_s"] == pytest.approx(best / 2)
    assert rows[3]["connections"] == 64
    for row in rows:
        assert row["errors"] == 0
        assert row["mean_batch_size"] == pytest.approx(4)
        assert row["stage_ms"] == {"network": pytest.approx(5)}
        assert row["p50_ms"] >= 10


def test_nothing_counted_is_no_mean_batch_size(stand_in: StandIn) -> None:
    with CounterWindow(stand_in.url, "m") as counters:
        pass
    assert counters.mean_batch_size is None
    assert counters.stage_ms == {}


def test_rows_stand_beside_both_limits_where_these_are_known() -> None:
    closed = {"requests_per_s": 90.0, "rate_per_s": None, "connections": 8}
    unknown = {"requests_per_s": 90.0, "rate_per_s": None, "connections": 9}
    opened = {"requests_per_s": 50.0, "rate_per_s": 50.0, "connections": 8}
    add_limits([closed, unknown, opened], network_per_s=100.0, empty_per_s={8: 900.0})
    assert [row["of_network"] for row in (closed, unknown, opened)] == [0.9, 0.9, 0.5]
    assert [row["of_empty"] for row in (closed, unknown, opened)] == [0.1, None, None]
    add_limits([closed], None, {})
    assert closed["of_network"] is closed["of_empty"] is None


def test_a_busy_generator_and_errors_are_told() -> None:
    calm = {"load": "calm", "generator_busy_share": 0.2, "errors": 0}
    busy = {"load": "busy", "generator_busy_share": 0.97, "errors": 0}
    failed = {
        "load": "failed",
        "generator_busy_share": 0.2,
        "errors": 3,
        "statuses": {"503": 3},
        "connection_errors": {},
        "timeouts": 0,
        "dropped": 0,
    }
    told = warnings_about([calm, busy, failed])
    assert len(told) == 2
    assert "busy: " in told[0]
    assert "97%" in told[0]
    assert "'503': 3" in told[1]


def test_the_best_rate_is_of_closed_loops_without_errors() -> None:
    rows = [
        {"requests_per_s": 5.0, "rate_per_s": None, "errors": 0},
        {"requests_per_s": 9.0, "rate_per_s": None, "errors": 1},
        {"requests_per_s": 9.0, "rate_per_s": 9.0, "errors": 0},
    ]
    assert best_rate(rows) == 5.0
    assert best_rate([]) == 0.0


def test_the_tool_prints_a_table_and_writes_rows_a_plot_and_the_other_tools_input(
    stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, plot, data = tmp_path / "rows.json", tmp_path / "p.png", tmp_path / "data.json"
    command = ["--url", stand_in.url, "--management-url", stand_in.url, "--metrics-url", stand_in.url]
    command += ["--model", "m", "--concurrency", "2", "--rates", "20", "--limit-network", "1000"]
    command += ["--duration", "0.4", "--warm-up", "0.05", "--processes", "1"]
    command += ["--json", str(rows), "--plot", str(plot), "--perf-analyzer", str(data)]
    assert benchmark_server.main(command) == 0
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["load"] for row in written] == ["closed 2", "open 20/s"]
    assert written[0]["of_network"] == pytest.approx(written[0]["requests_per_s"] / 1000)
    assert (written[0]["batch_size"], written[0]["delay_ms"], written[0]["workers"]) == (4, 2, 1)
    assert "torch" in written[0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(data.read_text())["data"]) == 3
    printed = capsys.readouterr().out
    assert "closed 2" in printed
    assert "perf_analyzer -m m" in printed


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = "http://127.0.0.1:1"
    command = ["--url", nobody, "--management-url", nobody, "--metrics-url", nobody, "--concurrency", "1"]
    assert benchmark_server.main(command) == 1
    assert capsys.readouterr().err.startswith("benchmark_server: ")


def test_workers_are_scaled_and_waited_for(stand_in: StandIn) -> None:
    scale_workers(stand_in.url, "m", 3)
    assert describe_model(stand_in.url, "m") == {"batch_size": 4, "delay_ms": 2, "workers": 3}
    stand_in.never_ready = True
    with pytest.raises(ServerStartError, match="UNLOADING"):
        scale_workers(stand_in.url, "m", 2, timeout_s=0.3)


def test_a_busy_core_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_metrics, "SAMPLE_INTERVAL_S", 0.05)
    monkeypatch.setenv("PATH", "")
    if server_metrics.cpu_seconds() is None:
        pytest.skip("this system does not tell CPU times")
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


def test_the_gpu_is_asked_in_the_background_and_only_the_window_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
