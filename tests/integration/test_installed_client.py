"""The installed client and a real server."""

import json

import pytest
from pycocotools.coco import COCO

from doubles.installed_client import InstalledClient

USE = """
import json, sys
import numpy as np
from PIL import Image
from damoyolo_client import Client, as_arrays

with Client(sys.argv[1]) as client, Image.open(sys.argv[2]) as image:
    from_file = as_arrays(client.detect(sys.argv[2]))
    from_array = as_arrays(client.detect(np.asarray(image.convert("RGB"))))
print(json.dumps([from_file.boxes_xyxy.tolist(), from_array.boxes_xyxy.tolist()]))
"""


@pytest.fixture(scope="module")
def installed(project_dir, tmp_path_factory):
    return InstalledClient(project_dir, tmp_path_factory.mktemp("client"))


def test_the_command_writes_results_that_pycocotools_loads(server, installed, project_dir, tmp_path):
    smears, results = project_dir / "tests/data/smears", tmp_path / "results.json"
    options = ["--url", server.inference_url, "--output", results, "--coco", smears / "annotations.json"]
    done = installed.detect(smears, *options, "--output-dir", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    assert "3 images, 0 failed" in done.stdout
    loaded = COCO(str(smears / "annotations.json")).loadRes(str(results))
    assert set(loaded.getImgIds()) == {3, 4, 7}
    assert len(list((tmp_path / "drawn").iterdir())) == 3


def test_a_file_and_its_pixels_give_the_same_detections(server, installed, project_dir):
    smear = project_dir / "tests/data/smears/smear_3.jpg"
    done = installed.python("-c", USE, server.inference_url, str(smear))
    assert done.returncode == 0, done.stderr
    from_file, from_array = json.loads(done.stdout)
    assert len(from_file) == len(from_array) > 10
