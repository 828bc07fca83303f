"""Clients that record every answer and the worker that gave it, for tests that end workers under load.

With DAMOYOLO_TEST_RESULTS tests append what they saw to that file, a line of JSON each.
"""

import json
import os
import threading
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import urllib3
import yaml

from lib.archive.members import MANIFEST_FILE, archive_with_setting, copy_archive, read_settings

from damoyolo.config import SETTINGS_FILE

# Adds a header with the worker's process and device to each answer. A request with the header X-Assert makes
# a kernel fail in the way that a wrong index does.
SIGNING_HANDLER = """
import os

import torch

from damoyolo_handler import DamoYoloHandler as PlainHandler


class SigningHandler(PlainHandler):
    def handle(self, data, context):
        device = self.service.detector.device
        if any("X-Assert" in context.get_all_request_header(index) for index in range(len(data))):
            torch.zeros(1, device=device)[torch.tensor([7], device=device)]
        bodies = super().handle(data, context)
        worker = f"{os.getpid()} {device}"
        for index in range(len(bodies)):
            context.set_response_header(index, "X-Worker", worker)
        return bodies
"""
CLIENTS = 32
# A client without an answer for this long counts it as lost.
TIMEOUT_S = 30.0


def record(**values):
    """Append what was seen to the file of results, if one is wanted."""
    print(json.dumps(values))
    if path := os.environ.get("DAMOYOLO_TEST_RESULTS"):
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")


@dataclass(frozen=True)
class Outcome:
    """One request: when it was sent and answered, its status or error, and the worker that answered."""

    sent_s: float
    answered_s: float
    status: object
    pid: int | None
    device: str | None
    body: bytes


def send(pool, url, image):
    sent_s = time.monotonic()
    try:
        answer = pool.request("POST", url, body=image, timeout=TIMEOUT_S, retries=False)
    except urllib3.exceptions.HTTPError as error:
        return Outcome(sent_s, time.monotonic(), type(error).__name__, None, None, b"")
    pid, _, device = answer.headers.get("X-Worker", "").partition(" ")
    return Outcome(
        sent_s, time.monotonic(), answer.status, int(pid) if pid else None, device or None, answer.data
    )


@contextmanager
def clients(url, images):
    """CLIENTS threads that send one request after another; yields the growing list of outcomes."""
    outcomes, stopped = [], threading.Event()
    pool = urllib3.PoolManager(maxsize=CLIENTS, block=False)

    def run(number):
        while not stopped.is_set():
            outcomes.append(send(pool, url, images[number % len(images)]))
            if outcomes[-1].status != 200:
                time.sleep(0.02)  # a server that refuses at once is not called in a tight loop

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        stopped.set()
        for thread in threads:
            thread.join(2 * TIMEOUT_S)
        pool.clear()


def devices_of(outcomes):
    """Process -> device, of the workers that signed an answer."""
    return {outcome.pid: outcome.device for outcome in list(outcomes) if outcome.pid is not None}


def statuses(outcomes):
    """Number of outcomes by status or error."""
    return {str(status): count for status, count in Counter(each.status for each in outcomes).items()}


def signed_archive(source, folder, setting):
    """The demo weights of an archive in fp16 with this batching, whose workers sign their answers."""
    batched = archive_with_setting(source, folder, setting)
    settings = read_settings(batched)
    settings["handler"] |= {"precision": "fp16", "backend": "auto"}
    with zipfile.ZipFile(batched) as opened:
        manifest = json.loads(opened.read(MANIFEST_FILE))
    manifest["model"]["handler"] = "signing_handler.py"
    (folder / "store").mkdir()
    replaced = {
        MANIFEST_FILE: json.dumps(manifest).encode(),
        SETTINGS_FILE: yaml.safe_dump(settings).encode(),
        "signing_handler.py": SIGNING_HANDLER.encode(),
    }
    return copy_archive(batched, folder / "store" / source.name, replaced)
