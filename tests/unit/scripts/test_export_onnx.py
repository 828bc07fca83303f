"""The command that exports ONNX files."""

import pytest

from lib.accuracy.parity import Agreement
from lib.cli import ScriptError

import export_onnx


def test_the_command_writes_a_checked_file_or_none(demo_model, tmp_path, capsys, monkeypatch):
    output = tmp_path / "made" / "damoyolo.onnx"
    assert export_onnx.main(["--output", str(output), "--weights", "nowhere.pth"]) == 1
    assert "nowhere.pth is neither a file" in capsys.readouterr().err

    def refuse(*_):
        raise ScriptError("it differs")

    monkeypatch.setattr(export_onnx, "load_network", lambda _: (demo_model, ("a", "b", "c")))
    monkeypatch.setattr("lib.onnx.export.export_onnx", lambda model, path, **_: path.write_bytes(b"nothing"))
    monkeypatch.setattr("lib.onnx.check.sample_batches", lambda *_: [])
    monkeypatch.setattr("lib.onnx.check.check_onnx", refuse)
    assert export_onnx.main(["--output", str(output)]) == 1
    assert "it differs" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []

    monkeypatch.setattr("lib.onnx.check.check_onnx", lambda *_: Agreement(1e-6, 1e-4))
    assert export_onnx.main(["--output", str(output), "--outputs", "boxes"]) == 0
    assert "DAMO-YOLO-S, boxes" in capsys.readouterr().out
    assert output.read_bytes() == b"nothing"


def test_former_options_are_refused_with_their_present_names(capsys):
    for former, present in (("--form", "--outputs"), ("--pictures", "--images")):
        with pytest.raises(SystemExit):
            export_onnx.main(["--output", "x.onnx", former, "value"])
        assert f"{former} is now called {present}" in capsys.readouterr().err
