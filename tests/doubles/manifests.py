"""The manifests of deploy/kubernetes as kustomize renders them, and their parts."""

import shutil
import subprocess

import yaml

# Which program builds a kustomization; kubectl has kustomize in it.
KUSTOMIZE = next(
    (command for command in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(command[0])),
    None,
)


def render(folder):
    """The documents of a kustomization, by (kind, name)."""
    built = subprocess.run([*KUSTOMIZE, str(folder)], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    documents = list(yaml.safe_load_all(built.stdout))
    named = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    assert len(named) == len(documents)
    return named


def only(documents, kind):
    """The one document of this kind."""
    (found,) = [document for (each, _), document in documents.items() if each == kind]
    return found


def pod_template(documents):
    """The pod of the Deployment: its metadata and spec."""
    return only(documents, "Deployment")["spec"]["template"]


def container_of(documents):
    """The one container of the pod."""
    (container,) = pod_template(documents)["spec"]["containers"]
    return container


def port_number(container, port):
    """A port of the container by its name, or the number itself."""
    if isinstance(port, int):
        return port
    (number,) = [each["containerPort"] for each in container["ports"] if each["name"] == port]
    return number


def settings_of(text):
    """The settings in the text of a config.properties."""
    lines = [line.strip() for line in text.splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def in_bytes(quantity):
    """A quantity of memory or disk, in binary units."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    return int(quantity[:-2]) * units[quantity[-2:]]
