"""The manifests of deploy/kubernetes and deploy/kserve: valid, and in agreement with the server.

tests/integration/test_kubernetes.py runs the container that they describe.
"""

import copy
import json
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from lib.server.process import DRAIN_TIMES, JAVA_END_S

from doubles.manifests import (
    KUSTOMIZE,
    container_of,
    in_bytes,
    only,
    pod_template,
    port_number,
    render,
    settings_of,
)

pytestmark = pytest.mark.skipif(KUSTOMIZE is None, reason="neither kustomize nor kubectl is installed")

OVERLAYS = ("cpu", "gpu")
# The oldest and the newest release of Kubernetes for which the manifests are checked.
RELEASES = ("1.30", "1.37")
# Kinds that Kubernetes itself does not know: tests/clients/check_custom_resources.py checks them.
CUSTOM_KINDS = {"ScaledObject"}
# `TorchServeProcess.stop` takes so long after the drain to end what is left.
KILLING_S = 15
# Volumes that the Pod Security Standard `restricted` allows, as far as they are used here.
RESTRICTED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected"}


@pytest.fixture(scope="module")
def kubernetes_dir(project_dir):
    return project_dir / "deploy/kubernetes"


@pytest.fixture(scope="module")
def rendered(kubernetes_dir):
    """The documents of both overlays."""
    return {name: render(kubernetes_dir / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def documents(rendered, request):
    """The documents of an overlay; not to be changed."""
    return rendered[request.param]


def properties(documents):
    return settings_of(only(documents, "ConfigMap")["data"]["config.properties"])


@pytest.fixture
def changed(kubernetes_dir, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(kubernetes_dir, tmp_path / "kubernetes")


@pytest.mark.parametrize("release", RELEASES)
def test_every_document_fits_the_schema_of_kubernetes(documents, release):
    checked = [document for (kind, _), document in documents.items() if kind not in CUSTOM_KINDS]
    for document in checked:
        assert kubernetes_validate.validate(document, release, strict=True) == release
    assert len(checked) >= 6


def test_the_check_of_the_schema_finds_a_wrong_name_and_a_wrong_type(rendered):
    good = only(rendered["cpu"], "Deployment")
    for path, key, value in (
        (("spec",), "terminationGracePeriod", 90),
        (("spec", "template", "spec"), "terminationGracePeriodSeconds", "long"),
    ):
        wrong = copy.deepcopy(good)
        inner = wrong
        for step in path:
            inner = inner[step]
        inner[key] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, RELEASES[-1], strict=True)


def test_custom_resources_fit_the_published_schemas(rendered, project_dir, client_python, tmp_path):
    files = sorted((project_dir / "deploy/kserve").glob("*.yaml"))
    documents = [only(rendered["gpu"], "ScaledObject"), *(yaml.safe_load(each.read_text()) for each in files)]
    wrong = [{**each, "spec": {**each["spec"], "nothing": 1}} for each in documents]
    (tmp_path / "documents.yaml").write_text(yaml.safe_dump_all(documents + wrong))
    script = project_dir / "tests/clients/check_custom_resources.py"
    checked = subprocess.run(
        [client_python, script, tmp_path / "documents.yaml"], capture_output=True, text=True, timeout=120
    )
    assert checked.returncode == 0, checked.stderr
    answer = json.loads(checked.stdout)
    assert answer["problems"][: len(documents)] == [[]] * len(documents)
    assert all(answer["problems"][len(documents) :])
    print(answer["versions"])


def test_a_changed_setting_replaces_the_pods(changed, rendered):
    with (changed / "base/config.properties").open("a") as file:
        file.write("job_queue_size=7\n")
    before, after = (pod_template(each) for each in (rendered["cpu"], render(changed / "overlays/cpu")))
    names = [next(v for v in each["spec"]["volumes"] if v["name"] == "config") for each in (before, after)]
    assert names[0] != names[1]


def test_settings_are_those_of_the_container(documents, project_dir):
    assert properties(documents) == settings_of(
        (project_dir / "deploy/container/config.properties").read_text()
    )


def test_only_inference_and_metrics_listen_for_others(documents):
    settings, container = properties(documents), container_of(documents)
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert settings["inference_address"] == f"http://0.0.0.0:{ports['http']}"
    assert settings["metrics_address"] == f"http://0.0.0.0:{ports['metrics']}"
    assert settings["management_address"].startswith("http://127.0.0.1:")
    assert set(ports) == {"http", "metrics"}
    assert not {key for key in settings if key.startswith("grpc") and key.endswith("address")}


def test_the_network_policy_lets_in_inference_and_metrics_and_nothing_out(documents):
    spec = only(documents, "NetworkPolicy")["spec"]
    assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    assert spec["egress"] == []
    allowed = {port["port"]: rule["from"] for rule in spec["ingress"] for port in rule["ports"]}
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert allowed == {"http": [{"namespaceSelector": {}}], "metrics": [monitoring]}


def test_all_select_the_pods_of_the_deployment(documents):
    labels = pod_template(documents)["metadata"]["labels"]
    selectors = [
        only(documents, "Deployment")["spec"]["selector"]["matchLabels"],
        only(documents, "Service")["spec"]["selector"],
        only(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    spread = pod_template(documents)["spec"]["topologySpreadConstraints"]
    selectors += [each["labelSelector"]["matchLabels"] for each in spread]
    assert len(selectors) == 6
    assert all(selector == labels for selector in selectors)


@pytest.mark.parametrize(("overlay", "kind"), [("cpu", "HorizontalPodAutoscaler"), ("gpu", "ScaledObject")])
def test_the_autoscaler_sets_the_replicas_of_the_deployment(rendered, overlay, kind):
    deployment = only(rendered[overlay], "Deployment")
    target = only(rendered[overlay], kind)["spec"]["scaleTargetRef"]
    assert target.get("kind", "Deployment") == "Deployment"
    assert target["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]


def test_the_grace_period_is_longer_than_the_longest_end(documents):
    settings = properties(documents)
    drain_s = sum(float(settings.get(key, default)) for key, default in DRAIN_TIMES.items())
    assert pod_template(documents)["spec"]["terminationGracePeriodSeconds"] > drain_s + JAVA_END_S + KILLING_S
    # Instead of a preStop hook.
    assert float(settings["front_end_drain_delay_s"]) >= 5
    assert "lifecycle" not in container_of(documents)


def test_the_startup_probe_waits_until_the_server_itself_has_given_up(documents, project_dir):
    help_text = (project_dir / "scripts/serve.py").read_text()
    gives_up_s = float(re.search(r'"--timeout".*default=([\d.]+)', help_text)[1])
    deployment, probe = only(documents, "Deployment"), container_of(documents)["startupProbe"]
    patience_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert gives_up_s < patience_s < deployment["spec"]["progressDeadlineSeconds"]


def test_pods_are_allowed_by_the_restricted_security_standard(documents):
    assert_restricted(pod_template(documents)["spec"])
    namespace = only(documents, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {each["metadata"].get("namespace") for each in documents.values() if each is not namespace} == {
        namespace["metadata"]["name"]
    }


def assert_restricted(spec):
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    pod = spec.get("securityContext", {})
    for volume in spec["volumes"]:
        assert set(volume) - {"name"} <= RESTRICTED_VOLUMES
    for container in spec["containers"]:
        security = {**pod, **container["securityContext"]}
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"]) == (10001, 10001)
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True  # more than the standard asks for
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not [port for port in container["ports"] if "hostPort" in port]
    assert spec.get("automountServiceAccountToken", False) is False


def test_what_is_written_has_a_limit_and_disk_for_it(documents):
    volumes = {each["name"]: each for each in pod_template(documents)["spec"]["volumes"]}
    container = container_of(documents)
    written = [mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    limits = [in_bytes(volumes[name]["emptyDir"]["sizeLimit"]) for name in written]
    assert len(limits) == 2
    assert sum(limits) < in_bytes(container["resources"]["requests"]["ephemeral-storage"])


def test_cores_and_memory_are_promised_in_full(documents):
    resources = container_of(documents)["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["requests"]["cpu"].isdigit()  # whole cores: the kubelet can give them to the pod alone


def test_variables_are_those_that_the_container_reads(documents, project_dir):
    start = (project_dir / "deploy/container/start.sh").read_text()
    runtime = yaml.safe_load((project_dir / "deploy/kserve/serving-runtime.yaml").read_text())
    volume = yaml.safe_load(
        (project_dir / "deploy/kubernetes/components/model-volume/volume.yaml").read_text()
    )
    containers = [
        container_of(documents),
        *runtime["spec"]["containers"],
        *volume["spec"]["template"]["spec"]["containers"],
    ]
    names = {variable["name"] for container in containers for variable in container["env"]}
    assert names == {"DAMOYOLO_CONFIG", "DAMOYOLO_MODEL_STORE"}
    for name in names:
        assert f"${{{name}:-" in start


def test_the_overlays_differ_only_where_a_gpu_makes_a_difference(rendered):
    deployments = [copy.deepcopy(only(rendered[name], "Deployment")) for name in OVERLAYS]
    differences = []
    for deployment in deployments:
        spec = deployment["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        differences.append(
            {
                "image": container.pop("image"),
                "args": container.pop("args", None),
                "resources": container.pop("resources"),
                "strategy": deployment["spec"].pop("strategy"),
                "tolerations": spec.pop("tolerations", None),
            }
        )
    assert deployments[0] == deployments[1]
    assert differences[1]["args"] == ["--mps"]
    assert differences[1]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    # A new pod cannot wait for a GPU that an old one keeps.
    assert differences[1]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_the_component_mounts_the_archives_read_only(changed):
    kustomization = changed / "overlays/cpu/kustomization.yaml"
    text = kustomization.read_text()
    kustomization.write_text(text.replace("# components:", "components:"))
    documents = render(changed / "overlays/cpu")
    container = container_of(documents)
    variables = {each["name"]: each["value"] for each in container["env"]}
    mount = next(each for each in container["volumeMounts"] if each["name"] == "models")
    volume = next(each for each in pod_template(documents)["spec"]["volumes"] if each["name"] == "models")
    assert variables["DAMOYOLO_MODEL_STORE"] == mount["mountPath"]
    assert mount["readOnly"] is True
    assert volume["persistentVolumeClaim"] == {"claimName": "damoyolo-models", "readOnly": True}
    assert variables["DAMOYOLO_CONFIG"] == "/etc/damoyolo/config.properties"
    assert kubernetes_validate.validate(only(documents, "Deployment"), RELEASES[-1], strict=True)


def test_kserve_runs_the_same_container(rendered, project_dir):
    runtime = yaml.safe_load((project_dir / "deploy/kserve/serving-runtime.yaml").read_text())["spec"]
    ours, theirs = container_of(rendered["cpu"]), runtime["containers"][0]
    assert theirs["name"] == "kserve-container"
    for key in ("image", "imagePullPolicy", "resources"):
        assert theirs[key] == ours[key]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        expected = copy.deepcopy(ours[probe])
        expected["httpGet"]["port"] = port_number(ours, expected["httpGet"]["port"])
        assert theirs[probe] == expected
    # KServe's Service takes the first port.
    numbers = [[each["containerPort"] for each in container["ports"]] for container in (ours, theirs)]
    assert numbers[0] == numbers[1]
    mounts = [each for each in ours["volumeMounts"] if each["name"] != "config"]
    assert theirs["volumeMounts"] == mounts
    volumes = pod_template(rendered["cpu"])["spec"]["volumes"]
    assert runtime["volumes"] == [each for each in volumes if each["name"] != "config"]
    # KServe would set the port of a container that there is only with Knative.
    scraped = {**runtime["annotations"]}
    assert scraped.pop("serving.kserve.io/enable-prometheus-scraping") == "false"
    assert scraped == pod_template(rendered["cpu"])["metadata"]["annotations"]
    assert scraped["prometheus.io/port"] == str(port_number(ours, "metrics"))
    assert_restricted({"containers": [theirs], "volumes": runtime["volumes"]})


@pytest.mark.parametrize("name", ["inference-service", "inference-service-gpu"])
def test_an_inference_service_asks_for_the_runtime(rendered, project_dir, name):
    folder = project_dir / "deploy/kserve"
    runtime = yaml.safe_load((folder / "serving-runtime.yaml").read_text())
    service = yaml.safe_load((folder / f"{name}.yaml").read_text())
    predictor = service["spec"]["predictor"]
    model, (supported,) = predictor["model"], runtime["spec"]["supportedModelFormats"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] == {key: supported[key] for key in ("name", "version")}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    ours = pod_template(rendered["gpu" if "gpu" in name else "cpu"])["spec"]
    for key in ("terminationGracePeriodSeconds", "automountServiceAccountToken", "enableServiceLinks"):
        assert predictor[key] == ours[key]
    assert predictor["securityContext"]["fsGroup"] == ours["securityContext"]["fsGroup"]


def test_kserve_and_keda_scale_gpus_by_the_same_number(rendered, project_dir):
    predictor = gpu_predictor(project_dir)
    (metric,) = predictor["autoScaling"]["metrics"]
    trigger = only(rendered["gpu"], "ScaledObject")["spec"]["triggers"][0]["metadata"]
    # KServe reads `value` of an external metric, whatever the type, and gives KEDA 0 where it is missing.
    assert metric["external"]["target"] == {"type": "Value", "value": trigger["threshold"]}
    model = predictor["model"]
    container = container_of(rendered["gpu"])
    assert (model["args"], model["resources"]) == (container["args"], container["resources"])


def gpu_predictor(project_dir):
    """KServe's, on GPUs."""
    service = yaml.safe_load((project_dir / "deploy/kserve/inference-service-gpu.yaml").read_text())
    return service["spec"]["predictor"]


def test_each_query_is_for_one_namespace_which_is_scraped(rendered, project_dir):
    namespaces = {}
    triggers = only(rendered["gpu"], "ScaledObject")["spec"]["triggers"]
    (kserve,) = gpu_predictor(project_dir)["autoScaling"]["metrics"]
    queries = [*(each["metadata"]["query"] for each in triggers), kserve["external"]["metric"]["query"]]
    for query in queries:
        namespaces[query] = re.search(r'\{namespace="([^"]+)", model_name="damoyolo"\}', query)[1]
    assert len(namespaces) == 3
    applied = re.search(r"kubectl apply -n (\S+)", (project_dir / "docs/kubernetes.md").read_text())[1]
    ours = only(rendered["gpu"], "Namespace")["metadata"]["name"]
    assert list(namespaces.values()) == [ours, ours, applied]
    (job,) = yaml.safe_load((project_dir / "deploy/kubernetes/prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = job["kubernetes_sd_configs"]
    assert discovery["namespaces"]["names"] == [ours, applied]
