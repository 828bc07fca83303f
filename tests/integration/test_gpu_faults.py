"""One GPU whose memory another process fills, and on which a kernel fails: what clients see, what comes back.

With DAMOYOLO_TEST_ARCHIVE the tests serve that archive, whose kernels may be compiled.
"""

import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import urllib3

from lib.archive.members import BatchingSetting
from lib.server.gpus import gpu_environment
from lib.server.served_archive import serve_archive

from doubles.images import encode_jpeg, make_pixels
from doubles.real_server import wait_until
from doubles.worker_load import clients, devices_of, record, signed_archive, statuses

WORKERS = 4
RECOVERY_S = 120.0
# Takes all memory of the GPU, in ever smaller pieces, until its input ends. It also takes what others give
# back meanwhile, so that a server cannot recover by luck.
FILLER = """
import select, sys, torch
pieces, sizes = [], [2**28, 2**24, 2**21]
announced = False
while not select.select([sys.stdin], [], [], 0)[0]:
    for size in sizes:
        try:
            while True:
                pieces.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass
    if not announced:
        print("full", flush=True)
        announced = True
    select.select([sys.stdin], [], [], 0.2)
"""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def signing_archive(request, tmp_path_factory):
    """The demo weights in fp16, with workers that sign their answers."""
    given = os.environ.get("DAMOYOLO_TEST_ARCHIVE")
    source = Path(given) if given else request.getfixturevalue("archive").path
    return signed_archive(source, tmp_path_factory.mktemp("signed"), BatchingSetting(32, 1, WORKERS))


@contextmanager
def filled_memory():
    """Another process has all memory of the GPU that was free."""
    command = [sys.executable, "-c", FILLER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as filler:
        try:
            assert filler.stdout.readline() == "full\n"
            yield
        finally:
            filler.stdin.close()
            filler.wait(60)


def used_memory_mib():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout)


def serve_for(seconds, outcomes):
    """Outcomes of requests that were sent within the next seconds."""
    start = time.monotonic()
    time.sleep(seconds)
    return [each for each in list(outcomes) if each.sent_s >= start]


@pytest.mark.parametrize("mps", [False, True], ids=["time_slices", "mps"])
def test_full_memory_and_a_failing_kernel_cost_some_requests_and_not_the_service(
    mps, signing_archive, smears
):
    # Large ones need memory beyond what the recorded graphs hold.
    images = [encoded for encoded, _ in smears.values()] + [encode_jpeg(make_pixels(3000, 4000))]
    with (
        gpu_environment(1, mps) as environment,
        serve_archive(signing_archive, environment) as served,
        clients(served.predictions_url, images) as outcomes,
    ):
        wait_until(lambda: len(devices_of(outcomes)) == WORKERS, "answers of all workers", timeout_s=120)
        check_full_memory(mps, outcomes)
        check_failing_kernel(mps, served.predictions_url, images, outcomes)


def check_full_memory(mps, outcomes):
    before, used_before = serve_for(5, outcomes), used_memory_mib()
    with filled_memory():
        used_full = used_memory_mib()
        during = serve_for(10, outcomes)
    time.sleep(2)  # what was sent to a full GPU is answered
    after, used_after = serve_for(5, outcomes), used_memory_mib()
    record(
        check="memory of the GPU filled by another process",
        mps=mps,
        before=statuses(before),
        during=statuses(during),
        after=statuses(after),
        used_mib={"before": used_before, "full": used_full, "after": used_after},
        workers_lived=len(devices_of(before).keys() & devices_of(after).keys()),
    )
    assert len(before) * len(during) * len(after) > 0
    assert statuses(before).keys() == {"200"}
    assert statuses(during).keys() <= {"200", "507"}
    assert statuses(after).keys() == {"200"}
    assert devices_of(after).keys() == devices_of(before).keys()
    # Each worker may keep what a batch of large images needs, and no more.
    assert used_after - used_before < WORKERS * 2048


def check_failing_kernel(mps, url, images, outcomes):
    workers = set(devices_of(outcomes[-500:]))
    failed_s = time.monotonic()
    with urllib3.PoolManager() as pool:
        answer = pool.request(
            "POST", url, body=images[0], headers={"X-Assert": "1"}, timeout=60.0, retries=False
        )
    assert answer.status in (500, 503, 507)

    def all_answer():
        seen = {each.pid for each in outcomes[-500:] if each.pid and each.sent_s > failed_s + 1}
        return len(seen) == WORKERS and all(each.status == 200 for each in outcomes[-500:])

    while not all_answer() and time.monotonic() < failed_s + RECOVERY_S:
        time.sleep(0.1)
    recovered_s = time.monotonic()
    after = serve_for(3, outcomes)
    during = [each for each in outcomes if failed_s < each.answered_s <= recovered_s]
    good_s = [failed_s, *sorted(each.answered_s for each in during if each.status == 200), recovered_s]
    record(
        check="a kernel fails in one worker",
        mps=mps,
        during=statuses(during),
        after=statuses(after),
        workers_lived=len(workers & set(devices_of(after))),
        longest_gap_ms=1e3 * max(b - a for a, b in itertools.pairwise(good_s)),
        all_workers_answer_s=recovered_s - failed_s,
        answers_by_second=dict(Counter(int(each.answered_s - failed_s) for each in during)),
    )
    assert recovered_s < failed_s + RECOVERY_S
    assert statuses(after).keys() == {"200"}
    assert statuses(during).keys() <= {"200", "500", "503", "507"}  # nothing without an answer
    if not mps:
        assert len(workers & set(devices_of(after))) == WORKERS - 1
