"""The container of deploy/kubernetes: what its manifests name is there, and it is replaced without a loss.

tests/unit/deploy/test_kubernetes.py checks the manifests by themselves. There is no cluster here:
doubles/pod.py does what the kubelet and the container runtime would.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import socket
import threading
import time

import pytest
import requests
import yaml

from doubles.container_image import IMAGE, PACKAGES_VOLUME
from doubles.manifests import KUSTOMIZE, container_of, in_bytes, only, port_number, render, settings_of
from doubles.monitoring import running_prometheus
from doubles.network_namespaces import joined_namespace
from doubles.pod import Endpoints, Pod, missing
from doubles.real_server import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(KUSTOMIZE is None, reason="neither kustomize nor kubectl is installed"),
]

MODEL = "/predictions/damoyolo"
TIMEOUT_S = 60.0
# From SIGTERM until no node sends new connections to the pod any more, at worst.
PROPAGATION_S = 3.0


@pytest.fixture(scope="module", autouse=True)
def pods_can_run():
    if (reason := missing()) != "":
        pytest.skip(reason)


@pytest.fixture(scope="module")
def documents(project_dir):
    """The overlay for CPUs."""
    return render(project_dir / "deploy/kubernetes/overlays/cpu")


@pytest.fixture(scope="module")
def pod(documents, project_dir, archive, tmp_path_factory):
    """A pod of the overlay, started; its end is checked, too."""
    folder = tmp_path_factory.mktemp("pods") / "pod"
    with Pod(documents, project_dir, archive.path, folder).running() as started:
        seconds = started.wait_until_started()
        print(f"the startup probe succeeded after {seconds:.0f} s")
        yield started
        begin = time.monotonic()
        started.terminate()
        assert started.wait_for_end() == 0, started.output()
        print(f"ended {time.monotonic() - begin:.1f} s after SIGTERM")


class Clients:
    """Clients of the Service while entered; half of them keep their connections."""

    def __init__(self, endpoints, image, count=4):
        self.endpoints, self.image = endpoints, image
        self.statuses, self.over = [], threading.Event()
        self.threads = [threading.Thread(target=self._send, args=(n % 2 == 0,)) for n in range(count)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(TIMEOUT_S)

    def _send(self, keep):
        session, url = requests.Session(), None
        while not self.over.is_set():
            url = url or self.endpoints.url(MODEL)
            try:
                answer = session.post(url, data=self.image, timeout=TIMEOUT_S)
            except requests.RequestException as error:
                self.statuses.append(type(error).__name__)
                continue
            self.statuses.append(answer.status_code)
            if not keep or answer.headers.get("Connection") == "close":
                session.close()
                session, url = requests.Session(), None
        session.close()


def test_the_probes_are_answered(pod):
    assert pod.passes("startupProbe")
    assert pod.passes("readinessProbe")
    assert pod.passes("livenessProbe")


def test_the_service_leads_to_inference(pod, documents, smear):
    endpoints = Endpoints(documents)
    endpoints.pods = [pod]
    answer = requests.post(endpoints.url(MODEL), data=smear, timeout=TIMEOUT_S)
    assert answer.status_code == 200
    assert answer.json()["detections"]
    ready = requests.get(endpoints.url("/v2/models/damoyolo/ready"), timeout=TIMEOUT_S)
    assert ready.status_code == 200


def test_nothing_but_inference_and_metrics_is_reachable(pod):
    ports = {each["containerPort"] for each in pod.container["ports"]}
    assert {int(each.rsplit(":", 1)[1]) for each in pod.listening()} == ports
    settings = settings_of(only(pod.documents, "ConfigMap")["data"]["config.properties"])
    management = int(settings["management_address"].rsplit(":", 1)[1])
    for port in (management, 7070, 7071):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((pod.address, port), timeout=10)


def test_what_is_written_is_within_the_limits(pod, smear):
    for _ in range(8):
        assert requests.post(pod.url("http", MODEL), data=smear, timeout=TIMEOUT_S).status_code == 200
    used, memory = pod.used_bytes(), pod.memory_bytes()
    print(f"emptyDirs: {json.dumps(used)} bytes; memory: {memory / 2**20:.0f} MiB")
    # A quarter of the limits is enough for the demo model: the rest is for larger ones.
    assert used["/tmp"] < 2**31 / 4
    assert memory < in_bytes(pod.container["resources"]["requests"]["memory"])
    for sign in ("Read-only file system", "Permission denied", "No space left"):
        assert sign not in pod.output()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_finds_the_pod_and_answers_what_keda_asks(pod, documents, project_dir, smear, tmp_path):
    endpoints = Endpoints(documents)
    endpoints.pods = [pod]
    gpu = render(project_dir / "deploy/kubernetes/overlays/gpu")
    service = yaml.safe_load((project_dir / "deploy/kserve/inference-service-gpu.yaml").read_text())
    queries = [each["metadata"]["query"] for each in only(gpu, "ScaledObject")["spec"]["triggers"]]
    queries += [
        metric["external"]["metric"]["query"]
        for metric in service["spec"]["predictor"]["autoScaling"]["metrics"]
    ]
    with running_prometheus(monitoring_dir(project_dir, pod, tmp_path), tmp_path, None) as prometheus:
        wait_until(lambda: len(prometheus.query("up")) == 2, "both scrapes", 30)
        instance = {"instance": f"{pod.address}:8082", "pod": pod.namespace}
        found = {target["metric"]["namespace"]: target["metric"] for target in prometheus.query("up")}
        assert found == {
            namespace: {"__name__": "up", "job": "damoyolo", "namespace": namespace, **instance}
            for namespace in ("damoyolo", "models")
        }
        for query in queries:
            assert len(prometheus.query(query)) == 1, query
        with Clients(endpoints, smear):
            in_flight = queries[0]
            wait_until(lambda: float(prometheus.query(in_flight)[0]["value"][1]) >= 1, "the load", 60)


def monitoring_dir(project_dir, pod, folder):
    """The scrape job with what Prometheus would learn in a cluster written down.

    That is the pod in the overlay's namespace, and again as KServe would make it, in the example's.
    """
    config = yaml.safe_load((project_dir / "deploy/kubernetes/prometheus.yml").read_text())
    runtime = yaml.safe_load((project_dir / "deploy/kserve/serving-runtime.yaml").read_text())["spec"]
    (job,) = config["scrape_configs"]
    (discovery,) = job.pop("kubernetes_sd_configs")
    assert discovery == {"role": "pod", "namespaces": {"names": ["damoyolo", "models"]}}
    del job["scrape_interval"]
    overlay = discovered(pod, "damoyolo", pod.template["metadata"]["annotations"], pod.container)
    kserve = discovered(pod, "models", runtime["annotations"], runtime["containers"][0])
    job["static_configs"] = overlay + kserve
    written = folder / "monitoring"
    written.mkdir()
    (written / "prometheus.yml").write_text(yaml.safe_dump({"rule_files": [], **config}))
    return written


def discovered(pod, namespace, annotations, container):
    """The targets that Prometheus finds for a pod: one for each port of the container."""
    labels = {
        "__meta_kubernetes_namespace": namespace,
        "__meta_kubernetes_pod_name": pod.namespace,
        **{
            f"__meta_kubernetes_pod_annotation_{re.sub('[^a-zA-Z0-9_]', '_', key)}": value
            for key, value in annotations.items()
        },
    }
    return [
        {
            "targets": [f"{pod.address}:{port['containerPort']}"],
            "labels": {**labels, "__meta_kubernetes_pod_container_port_name": port["name"]},
        }
        for port in container["ports"]
    ]


def test_the_container_for_gpus_says_what_is_missing_without_one(project_dir, archive, tmp_path):
    documents = render(project_dir / "deploy/kubernetes/overlays/gpu")
    if shutil.which("nvidia-cuda-mps-control"):
        pytest.skip("there is a GPU")
    with Pod(documents, project_dir, archive.path, tmp_path / "pod").running() as pod:
        assert pod.process.wait(TIMEOUT_S) == 1
        assert "nvidia-cuda-mps-control" in pod.output()


def test_a_rolling_update_under_load_loses_nothing(documents, project_dir, archive, smear, tmp_path):
    """The update: the archive comes from a volume."""
    changed = shutil.copytree(project_dir / "deploy/kubernetes", tmp_path / "changed")
    overlay = changed / "overlays/cpu/kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("# components:", "components:"))
    old_pod = Pod(documents, project_dir, archive.path, tmp_path / "old")
    new_pod = Pod(render(overlay.parent), project_dir, archive.path, tmp_path / "new")
    endpoints = Endpoints(documents)
    with old_pod.running() as old:
        old.wait_until_started()
        endpoints.pods = [old]
        with Clients(endpoints, smear) as clients, new_pod.running() as new:
            new_s = new.wait_until_started()
            endpoints.pods = [old, new]
            time.sleep(2)
            before = len(clients.statuses)
            begin = time.monotonic()
            old.terminate()
            time.sleep(PROPAGATION_S)
            assert not old.passes("readinessProbe")
            endpoints.pods = [new]
            assert old.wait_for_end() == 0, old.output()
            old_s = time.monotonic() - begin
            time.sleep(2)
            clients.over.set()
            for thread in clients.threads:
                thread.join(TIMEOUT_S)
            new.terminate()
            assert new.wait_for_end() == 0, new.output()
    lost = [status for status in clients.statuses if status != 200]
    print(
        f"{len(clients.statuses)} requests, {len(clients.statuses) - before} of them after SIGTERM; "
        f"the new pod was started after {new_s:.0f} s, the old one ended {old_s:.1f} s after SIGTERM"
    )
    assert lost == []
    assert len(clients.statuses) > before


def for_podman(documents, namespace):
    """The ConfigMap and the Deployment as `podman kube play` takes them: it knows no names of ports.

    The image of the tests gets its Python packages from this machine (doubles/container_image.py).
    """
    kept = copy.deepcopy([only(documents, kind) for kind in ("ConfigMap", "Deployment")])
    kept[1]["metadata"]["name"] = namespace
    spec = kept[1]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        http = container[probe]["httpGet"]
        http["port"] = port_number(container, http["port"])
    del container["ports"]
    container |= {"image": IMAGE, "imagePullPolicy": "Never"}
    source, target, _ = PACKAGES_VOLUME.split(":")
    container["volumeMounts"].append({"name": "packages", "mountPath": target, "readOnly": True})
    spec["volumes"].append({"name": "packages", "hostPath": {"path": source, "type": "Directory"}})
    return yaml.safe_dump_all(kept)


@pytest.fixture
def played(podman, documents, tmp_path):
    """The Deployment's pod, run by Podman: the name of its container, and the pod's."""
    if shutil.which("catatonit") is None:
        pytest.skip("catatonit, which holds a pod of Podman, is not installed")
    # A test machine may not raise the limits that Podman sets by default.
    limits = 'default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]'
    (tmp_path / "containers.conf").write_text(f"[containers]\n{limits}\n")
    name = f"kube{os.getpid()}"
    (tmp_path / "play.yaml").write_text(for_podman(documents, name))
    environment = {**os.environ, "CONTAINERS_CONF": str(tmp_path / "containers.conf")}
    try:
        podman("kube", "play", "--network=none", tmp_path / "play.yaml", env=environment, timeout=120)
        yield f"{name}-pod-0-server", f"{name}-pod-0"
    finally:
        podman("pod", "rm", "--force", "--time=0", f"{name}-pod-0", check=False)


def test_podman_runs_the_deployment(podman, played, documents, smear):
    container, pod = played
    settings = json.loads(podman("inspect", container).stdout)[0]
    with joined_namespace(settings["State"]["Pid"]) as namespace:
        assert_only_inference_and_metrics_answer(namespace.address, smear)
    assert settings["HostConfig"]["ReadonlyRootfs"]
    limits = container_of(documents)["resources"]["limits"]
    assert settings["HostConfig"]["CpuQuota"] == int(limits["cpu"]) * 100_000
    assert settings["HostConfig"]["Memory"] == in_bytes(limits["memory"])
    status = podman("exec", container, "cat", "/proc/self/status").stdout
    fields = dict(line.split(":", 1) for line in status.splitlines())
    values = [fields[key].split()[0] for key in ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")]
    assert values == ["10001", "10001", "0" * 16, "0" * 16, "1", "2"]
    # Written is what the manifest names, and nothing else.
    folders = "/ /opt/damoyolo /etc/damoyolo /var /tmp /var/cache/damoyolo"
    writable = f"for folder in {folders}; do if [ -w $folder ]; then echo $folder; fi; done"
    found = podman("exec", container, "sh", "-c", writable).stdout.split()
    assert found == ["/tmp", "/var/cache/damoyolo"]

    grace_s = only(documents, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    podman("pod", "stop", f"--time={grace_s}", pod, timeout=120)
    assert podman("inspect", "--format={{.State.ExitCode}}", container).stdout.strip() == "0"


def assert_only_inference_and_metrics_answer(address, image):
    wait_until(lambda: status_of(f"http://{address}:8080/v2/health/ready") == 200, "readiness", 120)
    assert status_of(f"http://{address}:8080/v2/health/live") == 200
    assert status_of(f"http://{address}:8082/metrics") == 200
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://{address}:8081/models", timeout=TIMEOUT_S)
    answer = requests.post(f"http://{address}:8080{MODEL}", data=image, timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["detections"] != []) == (200, True)


def status_of(url):
    """The status of an answer; None where nobody listens."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=10).status_code
    return None
