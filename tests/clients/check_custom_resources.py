"""Check manifests of KServe and KEDA against models that were generated from their published schemas.

check_custom_resources.py FILE    (YAML documents)

Prints {"versions": ..., "problems": [[what is wrong] of each document]} as JSON.
"""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import kserve.models
import kubernetes.client
import pydantic
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

KSERVE_KINDS = {"InferenceService": "V1beta1InferenceService", "ServingRuntime": "V1alpha1ServingRuntime"}
# Types of Kubernetes in KServe's schema, and in Kubernetes' own client.
LONGER_NAMES = {
    "K8sIoApiAppsV1DeploymentStrategy": "V1DeploymentStrategy",
    "K8sIoApiAutoscalingV2HorizontalPodAutoscalerBehavior": "V2HorizontalPodAutoscalerBehavior",
}
PLAIN = {
    "str": str,
    "int": int,
    "bool": bool,
    "object": object,
    "ResourceQuantity": str,
    "V1beta1MetricQuantity": str,
}


def class_of(name):
    """A model's class, of KServe or of Kubernetes itself."""
    return getattr(kserve.models, name, None) or getattr(kubernetes.client, LONGER_NAMES.get(name, name))


def problems(value, kind, path="$"):
    """What does not fit the type: unknown fields, wrong types, and missing fields."""
    if kind in PLAIN:
        exact = kind == "object" or type(value) is PLAIN[kind]
        return [] if exact else [f"{path}: {value!r} is no {kind}"]
    if inner := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{path}: no list"]
        return [each for i, item in enumerate(value) for each in problems(item, inner[1], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return [f"{path}: no object"]
    if inner := re.fullmatch(r"[Dd]ict[\[(]str, (.*)[\])]", kind):
        return [each for key, item in value.items() for each in problems(item, inner[1], f"{path}.{key}")]
    return object_problems(value, class_of(kind), path)


def object_problems(value, model, path):
    """The same for a model with fields."""
    attributes = {key: name for name, key in model.attribute_map.items()}
    found = [f"{path}: unknown field {key}" for key in value if key not in attributes]
    known = {attributes[key]: item for key, item in value.items() if key in attributes}
    for name, item in known.items():
        found += problems(item, model.openapi_types[name], f"{path}.{model.attribute_map[name]}")
    try:
        model(**known)
    except ValueError as error:  # a required field is missing, or a value is none of those allowed
        found.append(f"{path}: {error}")
    return found


def keda_problems(document):
    """The same for a ScaledObject; its model passes over unknown fields."""
    try:
        model = ScaledObject.model_validate(document)
    except pydantic.ValidationError as error:
        return [str(error)]
    known = json.loads(model.model_dump_json(by_alias=True, exclude_unset=True))
    return [] if known == document else [f"understood was only {known}"]


def main():
    """Print one JSON document."""
    found = []
    for document in yaml.safe_load_all(Path(sys.argv[1]).read_text()):
        kind = document["kind"]
        wrong = keda_problems(document) if kind == "ScaledObject" else problems(document, KSERVE_KINDS[kind])
        found.append(wrong)
    packages = ("kserve", "kubernetes", "cloudcoil.models.keda")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"versions": versions, "problems": found}))


if __name__ == "__main__":
    main()
