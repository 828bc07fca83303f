"""The description of the API says what the code says, and is valid OpenAPI."""

import json
import subprocess
import zipfile

import pytest
import yaml

from damoyolo import errors
from damoyolo.config import ServingConfig
from damoyolo.request import OPTION_NAMES
from damoyolo.response import CONTENT_TYPES


@pytest.fixture(scope="module")
def description(project_dir):
    return yaml.safe_load((project_dir / "deploy/front-end/openapi.yaml").read_text())


def test_the_jar_holds_the_description(description, project_dir):
    with zipfile.ZipFile(project_dir / "deploy/front-end/front-end.jar") as jar:
        assert json.loads(jar.read("openapi.json")) == description


def test_every_option_is_described_in_every_place_with_its_default(description):
    schemas = description["components"]["schemas"]
    parameters = description["paths"]["/predictions/{model_name}"]["parameters"][1:]
    headers = {parameter["name"] for parameter in parameters if parameter["in"] == "header"}
    assert headers == {f"X-Detect-{name.replace('_', '-').title()}" for name in OPTION_NAMES}
    assert {parameter["name"] for parameter in parameters if parameter["in"] == "query"} == set(OPTION_NAMES)
    for form, images in (
        ("Form", {"data"}),
        ("ImageDocument", {"image", "data"}),
        ("InstancesDocument", {"instances"}),
    ):
        assert set(schemas[form]["properties"]) - images == set(OPTION_NAMES), form
    config = ServingConfig()
    for name in ("score_threshold", "iou_threshold", "max_detections"):
        assert schemas[name]["default"] == getattr(config, name)
    assert schemas["max_detections"]["maximum"] == config.max_detections_limit
    assert schemas["InstancesDocument"]["properties"]["instances"]["maxItems"] == config.max_instances


def test_every_format_and_its_type_are_described(description):
    assert description["components"]["schemas"]["format"]["enum"] == sorted(
        CONTENT_TYPES, key=description["components"]["schemas"]["format"]["enum"].index
    )
    answers = description["paths"]["/predictions/{model_name}"]["post"]["responses"]["200"]["content"]
    assert set(answers) == set(CONTENT_TYPES.values())


def test_every_status_and_kind_of_error_is_described(description):
    answers = description["paths"]["/predictions/{model_name}"]["post"]["responses"]
    texts = json.dumps(description["components"]["responses"])
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, errors.RequestError):
            assert str(kind.status) in answers
            assert kind.kind in texts


def test_the_description_is_valid_openapi(client_python, description, project_dir, tmp_path):
    (tmp_path / "openapi.json").write_text(json.dumps(description))
    command = [client_python, project_dir / "tests/clients/check_openapi.py", tmp_path / "openapi.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
