"""The image of deploy/container: built from its Dockerfile and run read only, as docs/container.md says."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch

from lib.archive.reader import load_detector

from damoyolo.structures import DetectionOptions
from doubles.answers import assert_same_detections
from doubles.container_image import IMAGE, RESTRICTED, TMP
from doubles.network_namespaces import joined_namespace
from doubles.real_server import wait_until

pytestmark = pytest.mark.slow
PROJECT = "/opt/damoyolo"
START_TIMEOUT_S = 180.0
# A bf16 server and another batch: as in doubles/answers.py.
BF16_TOLERANCES = {"score_tolerance": 2e-2, "box_tolerance_px": 2.0}


class Container:
    """A container of the image, in a network namespace with an address for this machine."""

    def __init__(self, podman, host, options, arguments=()):
        self.podman = podman
        self.url = f"http://{host}:8080"
        self.host = host
        self.id = podman("run", "--detach", *RESTRICTED, *options, IMAGE, *arguments).stdout.split()[-1]

    def __enter__(self):
        wait_until(lambda: self.health().returncode == 0, "readiness", START_TIMEOUT_S)
        return self

    def __exit__(self, *_):
        self.podman("rm", "--force", "--time=0", self.id, check=False)

    def health(self, *arguments):
        """The HEALTHCHECK's command, inside."""
        assert self.state("Running") == "true", self.log()
        return self.run(f"{PROJECT}/deploy/container/health.sh", *arguments)

    def run(self, *command):
        return self.podman("exec", self.id, *command, check=False)

    def shell(self, script):
        return self.run("bash", "-c", script).stdout

    def state(self, field):
        return self.podman("inspect", f"--format={{{{.State.{field}}}}}", self.id).stdout.strip()

    def log(self):
        done = self.podman("logs", self.id)
        return done.stdout + done.stderr

    def post(self, image):
        return requests.post(f"{self.url}/predictions/damoyolo", data=image, timeout=60)

    def signal_workers(self, name):
        """Send its workers a signal, such as STOP."""
        found = "grep -q model_service_worke[r] $each/cmdline"  # not this shell itself
        self.shell(f"for each in /proc/[0-9]*; do if {found}; then kill -{name} ${{each#/proc/}}; fi; done")

    def terminate(self):
        self.podman("kill", "--signal=TERM", self.id)

    def wait_for_end(self):
        """The exit code."""
        wait_until(lambda: self.state("Running") == "false", "the end", 90.0)
        return int(self.state("ExitCode"))


@pytest.fixture(scope="module")
def network():
    """A network namespace: the argument for `podman run`, and its address."""
    with joined_namespace() as namespace:
        yield f"--network=ns:/run/netns/{namespace.name}", namespace.address


@pytest.fixture(scope="module")
def container(podman, network):
    """As a newcomer runs it, read only and with nothing writable but /tmp."""
    option, host = network
    with Container(podman, host, [TMP, option]) as container:
        yield container


def detect(detector, image):
    options = DetectionOptions(score_threshold=0.25, iou_threshold=0.45, max_detections=300)
    return detector.detect([image], [options])[0]


def is_open(host, port):
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except ConnectionRefusedError:
        return False


def test_the_build_found_every_pin_and_kept_the_builder_s_packages_out(podman, container):
    assert "Successfully tagged" in podman.built
    assert "Collecting" not in podman.built  # no package but those of this environment
    inspected = json.loads(podman("image", "inspect", IMAGE).stdout)[0]
    image = inspected["Config"]
    assert image["User"] == "10001:10001"
    assert image["StopSignal"] in ("SIGTERM", "15")
    assert inspected["Healthcheck"]["Test"] == ["CMD", f"{PROJECT}/deploy/container/health.sh"]
    assert image["Labels"]["org.opencontainers.image.title"] == "DAMO-YOLO on TorchServe (cuda)"
    assert (
        container.shell("ls /usr/lib/python3.11/ensurepip 2>&1; ls .venv/bin/pip* 2>&1").count("No such") == 2
    )
    assert container.shell("ls").split() == [
        "LICENSE",
        "NOTICE",
        "deploy",
        "handler",
        "model_store",
        "scripts",
    ]


def test_an_image_gets_the_answer_of_the_same_archive_elsewhere(podman, container, smear, tmp_path):
    podman("cp", f"{container.id}:{PROJECT}/model_store/damoyolo.mar", tmp_path / "damoyolo.mar")
    detector = load_detector(tmp_path / "damoyolo.mar", torch.device("cpu"))
    answer = container.post(smear)
    assert answer.status_code == 200
    assert_same_detections(answer.json(), detect(detector, smear), **BF16_TOLERANCES)
    assert container.post(b"no image").status_code == 415


def test_predictions_and_metrics_are_reachable_and_management_and_grpc_are_not(container):
    reachable = [port for port in (7070, 7071, 8080, 8081, 8082) if is_open(container.host, port)]
    assert reachable == [8080, 8082]
    for port in reachable:
        for path in ("/models", "/models/damoyolo", "/workflows"):
            answer = requests.get(f"http://{container.host}:{port}{path}", timeout=60)
            assert answer.status_code in (404, 405), f"{port}{path}: {answer.text}"
    assert "damoyolo_" in requests.get(f"http://{container.host}:8082/metrics", timeout=60).text
    # Inside, management answers on 127.0.0.1.
    inside = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8081/models', timeout=9).read())"
    assert "damoyolo.mar" in container.run("python3", "-c", inside).stdout


def test_health_says_ready_and_live_and_why_not(container):
    assert json.loads(container.health().stdout) == {"ready": True}
    assert json.loads(container.health("live").stdout) == {"live": True}
    wrong = container.run(
        "env", "DAMOYOLO_CONFIG=/dev/null", f"{PROJECT}/deploy/container/health.sh", "nothing"
    )
    assert wrong.returncode == 1
    assert wrong.stderr


def test_the_processes_have_no_rights_and_can_write_nothing_else(container):
    status = container.shell("cat /proc/[0-9]*/status")
    assert set(re.findall(r"(?m)^Uid:\t(.*)", status)) == {"\t".join(["10001"] * 4)}
    assert set(re.findall(r"(?m)^Cap(?:Eff|Prm|Bnd|Inh|Amb):\t(.*)", status)) == {"0" * 16}
    assert set(re.findall(r"(?m)^NoNewPrivs:\t(.*)", status)) == {"1"}
    find = "find / -xdev \\( -type f -o -type d \\) -writable 2>/dev/null"
    assert container.shell(find).split() == ["/tmp"]
    # Nor would it without --read-only: all is root's.
    assert container.shell("find / -xdev -user damoyolo 2>/dev/null").split() == ["/var/cache/damoyolo"]


def test_process_1_passes_on_nothing_but_signals_and_leaves_no_zombies(container):
    assert container.shell("tr '\\0' ' ' </proc/1/cmdline").startswith(
        "tini -s -- .venv/bin/python scripts/serve.py"
    )
    container.shell("(sleep 0.2 &) ; true")  # its parent ends before it does
    time.sleep(1.0)
    states = re.findall(r"(?m)^State:\t(.)", container.shell("cat /proc/[0-9]*/status 2>/dev/null"))
    assert "Z" not in states


def test_memory_that_processes_share_is_not_used(container):
    assert container.shell("ls -A /dev/shm") == ""


@pytest.fixture
def readable(tmp_path):
    """A folder that the container's user can read; a folder of pytest is for its own alone."""
    folder = tmp_path / "readable"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


def copied(source, folder):
    target = folder / source.name
    target.write_bytes(source.read_bytes())
    target.chmod(0o644)
    return target


def config_beside(podman, folder):
    """The container's settings for a second one in its network: other ports, and no delay at the end."""
    options = [*RESTRICTED, "--network=none", "--entrypoint=cat"]
    text = podman("run", "--rm", *options, IMAGE, "deploy/container/config.properties").stdout
    path = folder / "config.properties"
    text, changed = re.subn(r"(?m)^front_end_drain_delay_s=.*$", "front_end_drain_delay_s=0", text)
    assert changed == 1
    path.write_text(
        re.sub(r"(_address=.*):80(\d\d)", r"\1:90\2", text)
        + "grpc_inference_port=9070\ngrpc_management_port=9071\n"
    )
    path.chmod(0o644)
    return path


def test_own_settings_and_store_are_served_and_sigterm_answers_what_was_accepted(
    podman, network, archive, detector, smear, readable
):
    option, host = network
    user = "--user=4321:4321"  # without a name
    copied(archive.path, readable)
    config = config_beside(podman, readable)
    mounts = [f"--volume={readable}:/models:ro", "--env=DAMOYOLO_MODEL_STORE=/models"]
    mounts += [
        f"--volume={config}:/etc/damoyolo.properties:ro",
        "--env=DAMOYOLO_CONFIG=/etc/damoyolo.properties",
    ]
    with Container(podman, host, [TMP.replace("exec", "noexec"), option, user, *mounts]) as container:
        container.url = f"http://{host}:9080"
        # The store's own archive, in float32.
        assert_same_detections(container.post(smear).json(), detect(detector, smear))
        assert_what_was_accepted_is_answered_after_sigterm(container, smear)
        assert container.wait_for_end() == 0
        assert "SIGTERM, answering what was accepted" in container.log()


def assert_what_was_accepted_is_answered_after_sigterm(container, image):
    """Its port of inference is 9080, and its drain begins at once."""

    def in_flight():
        metrics = requests.get(f"http://{container.host}:9082/metrics", timeout=60).text
        return float(re.search(r"(?m)^damoyolo_requests_in_flight\{.*\} (\S+)$", metrics)[1])

    container.signal_workers("STOP")
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(container.post, image) for _ in range(24)]
        try:
            wait_until(lambda: in_flight() == 24, "24 requests in flight", 60.0)
            container.terminate()
            wait_until(lambda: container.post(image).status_code == 503, "the drain", 20.0)
            assert not any(answer.done() for answer in answers)
        finally:
            container.signal_workers("CONT")
    assert [answer.result().status_code for answer in answers] == [200] * 24


def test_nothing_is_written_outside_the_folders_that_are_meant_for_it(podman):
    # By a user who could, on a disk that could be; Podman compares it with the image.
    options = [each for each in RESTRICTED if not each.startswith("--read-only")] + ["--user=0:0"]
    identifier = podman("run", "--detach", *options, "--network=none", IMAGE).stdout.split()[-1]
    try:
        health = [f"{PROJECT}/deploy/container/health.sh"]
        wait_until(lambda: podman("exec", identifier, *health, check=False).returncode == 0, "readiness", 180)
        changed = {line.split()[1] for line in podman("diff", identifier).stdout.splitlines()}
    finally:
        podman("rm", "--force", "--time=0", identifier, check=False)
    mounted = ("/host-site-packages", "/etc", "/run", "/proc", "/sys", "/dev", "/var/run")
    written = {path for path in changed if not path.startswith(("/tmp", "/var/cache/damoyolo", *mounted))}
    assert written <= {"/var", "/var/cache"}  # the folders above


def test_a_store_without_the_archive_ends_the_container_with_the_reason(podman, readable):
    options = ["--network=none", TMP, f"--volume={readable}:/models:ro", "--env=DAMOYOLO_MODEL_STORE=/models"]
    done = podman("run", "--rm", *RESTRICTED, *options, IMAGE, check=False)
    assert done.returncode == 1
    assert "/models/damoyolo.mar does not exist" in done.stdout + done.stderr


def test_the_worker_takes_the_threads_that_the_container_s_limit_allows(podman):
    code = "from damoyolo.cores import usable_cores; print(usable_cores())"
    options = ["--network=none", "--cpus=1", "--entrypoint=python", "--env=PYTHONPATH=handler"]
    assert podman("run", "--rm", *RESTRICTED, *options, IMAGE, "-c", code).stdout.strip() == "1"
