"""What `pip install .` installs: the client alone, which needs neither the server nor its packages."""

import json
import re
from importlib.metadata import Distribution

import pytest

from doubles.installed_client import InstalledClient
from doubles.stand_in_server import StandInServer, found

CELL = {"class_id": 1, "label": "RBC", "score": 0.912, "bbox": [1.0, 2.0, 30.5, 40.0]}
USE = """
import json, sys
import numpy as np
from damoyolo_client import Client, as_arrays

with Client(sys.argv[1]) as client:
    answers = [outcome.answer for outcome in client.detect_many([np.zeros((48, 64, 3), np.uint8)] * 3)]
arrays = as_arrays(answers[0])
foreign = {"torch", "lib", "damoyolo", "ts"} & set(sys.modules)
print(json.dumps([len(answers), arrays.boxes_xyxy.tolist(), arrays.labels, sorted(foreign)]))
"""


@pytest.fixture(scope="module")
def installed(project_dir, tmp_path_factory):
    return InstalledClient(project_dir, tmp_path_factory.mktemp("client"))


def test_it_needs_nothing_of_the_server(installed):
    (metadata,) = installed.folder.glob("damoyolo_torchserve-*.dist-info")
    needs = [each for each in Distribution.at(metadata).requires if "extra ==" not in each]
    names = {each.partition(";")[0].strip().partition(">")[0].partition("=")[0] for each in needs}
    assert names == {"certifi", "numpy", "pillow", "requests", "tqdm", "urllib3"}
    assert {path.name for path in installed.folder.iterdir()} == {"bin", "damoyolo_client", metadata.name}


def test_its_python_interface_detects_in_arrays(installed):
    with StandInServer(lambda asked: found(CELL)) as server:
        done = installed.python("-c", USE, server.base_url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [3, [CELL["bbox"]], ["RBC"], []]


def test_the_documented_python_runs(installed, project_dir, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (project_dir / "docs/commands.md").read_text(), re.DOTALL)
    for name in ("image.jpg", "a.jpg", "b.jpg"):
        (installed.folder / name).write_bytes(b"image")
    with StandInServer(lambda asked: found(CELL)) as server:
        done = installed.python("-c", block.replace("http://127.0.0.1:8080", server.base_url))
    assert done.returncode == 0, done.stderr
    assert [line[:14] for line in done.stdout.splitlines()] == ["0 {'width': 64", "1 {'width': 64"]


def test_its_command_is_that_of_the_checkout(installed, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"image")
    results = tmp_path / "found.json"
    with StandInServer(lambda asked: found(CELL)) as server:
        done = installed.detect(tmp_path / "a.jpg", "--url", server.base_url, "--output", results)
    assert done.returncode == 0, done.stderr
    assert "1 images, 0 failed; 1 detections: RBC 1" in done.stdout
    assert json.loads(results.read_text())[0]["category_id"] == 2
