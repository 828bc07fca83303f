"""Read the counters of a served model, and sample how busy the machine is meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families

from lib.server.local_http import direct_session

HTTP_TIMEOUT_S = 10.0
# A worker sends its counters at most once a second; what it holds back follows within another.
COUNTERS_LAG_S = 1.5
SAMPLE_INTERVAL_S = 0.2


def parse_counters(text: str, model_name: str) -> dict[str, float]:
    """The samples of a Prometheus page that belong to a model, without buckets.

    Those of a stage stand apart as `name/stage`; those that differ in another label are added up.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if labels.get("model_name") == model_name and "le" not in labels:
                name = f"{sample.name}/{labels['stage']}" if "stage" in labels else sample.name
                totals[name] += sample.value
    return dict(totals)


def read_counters(metrics_url: str, model_name: str) -> dict[str, float]:
    """The model's present counters; empty where the server has none."""
    with direct_session() as session:
        answer = session.get(f"{metrics_url}/metrics", timeout=HTTP_TIMEOUT_S)
    answer.raise_for_status()
    return parse_counters(answer.text, model_name)


class CounterWindow:
    """The growth of a model's counters inside the context; leaving waits until the handler has sent all."""

    def __init__(self, metrics_url: str, model_name: str) -> None:
        self._source = (metrics_url, model_name)
        self.growth: dict[str, float] = {}

    def __enter__(self) -> CounterWindow:
        self._before = read_counters(*self._source)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            time.sleep(COUNTERS_LAG_S)
            after = read_counters(*self._source)
            self.growth = {name: value - self._before.get(name, 0.0) for name, value in after.items()}

    @property
    def mean_batch_size(self) -> float | None:
        """Requests per batch; None where the model does not count its batches."""
        batches = self.growth.get("damoyolo_batch_size_count", 0.0)
        return self.growth.get("damoyolo_batch_size_sum", 0.0) / batches if batches else None

    @property
    def stage_ms(self) -> dict[str, float]:
        """Mean milliseconds per batch of each stage."""
        batches = self.growth.get("damoyolo_batch_size_count", 0.0)
        prefix = "damoyolo_stage_duration_seconds_sum/"
        return {
            name.removeprefix(prefix): seconds / batches * 1e3
            for name, seconds in self.growth.items()
            if name.startswith(prefix) and batches
        }


def cpu_seconds() -> float | None:
    """CPU time used by this container (else this machine) so far; None where unknown."""
    for path, seconds_per_unit in (
        (Path("/sys/fs/cgroup/cpu.stat"), 1e-6),
        (Path("/sys/fs/cgroup/cpuacct/cpuacct.usage"), 1e-9),
    ):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = path.read_text().removeprefix("usage_usec")
            return int(text.split()[0]) * seconds_per_unit
    return None


class UtilisationSampler:
    """Samples the use of CPU and of the first `gpus` GPUs in the background while inside the context."""

    def __init__(self, gpus: int = 1) -> None:
        self._gpu_indices = ",".join(map(str, range(gpus)))
        self._cpu: list[tuple[float, float]] = []  # time, CPU seconds so far
        self._gpu: list[tuple[float, float]] = []  # time, per cent
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> UtilisationSampler:
        self._threads.append(threading.Thread(target=self._sample_cpu, daemon=True))
        program = shutil.which("nvidia-smi")
        if program is not None:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--id={self._gpu_indices}",
                    "--query-gpu=utilization.gpu",
                    "--format=csv,noheader,nounits",
                    f"--loop-ms={SAMPLE_INTERVAL_S * 1e3:.0f}",
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._threads.append(threading.Thread(target=self._read_gpu, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    def _sample_cpu(self) -> None:
        while True:
            used_s = cpu_seconds()
            if used_s is None:
                return
            self._cpu.append((time.monotonic(), used_s))
            if self._stop.wait(SAMPLE_INTERVAL_S):
                return

    def _read_gpu(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # "[N/A]" on a device without this value
                self._gpu.append((time.monotonic(), float(line)))

    def gpu_percent(self, window_s: tuple[float, float]) -> float | None:
        """Mean share of time in which a kernel ran on a GPU, over all of them; None without a GPU."""
        values = [value for at, value in self._gpu if window_s[0] <= at <= window_s[1]]
        return statistics.fmean(values) if values else None

    def busy_cores(self, window_s: tuple[float, float]) -> float | None:
        """Mean number of busy cores, other processes included; None where unknown."""
        samples = [sample for sample in self._cpu if window_s[0] <= sample[0] <= window_s[1]]
        if len(samples) < 2:
            return None
        (start_s, start_used_s), (end_s, end_used_s) = samples[0], samples[-1]
        return (end_used_s - start_used_s) / (end_s - start_s)
