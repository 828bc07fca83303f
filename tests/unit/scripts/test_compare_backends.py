"""The command that compares an archive's backend with PyTorch."""

import json

import yaml

from lib.paths import DEMO_WEIGHTS

from compare_backends import main
from damoyolo.detector import SETTINGS_FILE, WEIGHTS_FILE
from damoyolo.model.checkpoint import load_checkpoint, save_packaged

SETTINGS = {
    "class_names": ["Platelets", "RBC", "WBC"],
    "backend": "pytorch",
    "precision": "fp32",
    "input_size_hw": [256, 256],
}


def test_an_archive_passes_and_its_figures_are_written(tmp_path, capsys):
    save_packaged(tmp_path / WEIGHTS_FILE, load_checkpoint(DEMO_WEIGHTS))
    (tmp_path / SETTINGS_FILE).write_text(yaml.safe_dump({"handler": SETTINGS}))
    report = tmp_path / "new" / "report.json"
    command = ["--archive", str(tmp_path), "--device", "cpu", "--batch-sizes", "2"]
    assert main([*command, "--json", str(report)]) == 0
    assert "passed" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert content["failures"] == []
    assert content["parities"][0]["batch_size"] == 2
    assert main([*command, "--score-tolerance", "-1"]) == 1
    assert "score is off by" in capsys.readouterr().err
    assert main([*command, "--voc", str(tmp_path)]) == 1
    assert "no split" in capsys.readouterr().err
