"""The command that builds archives: which options reach the builder, and how it fails."""

import pytest

from lib.packaging.builder import ArchiveReport, ArchiveRequest

import build_archive


def test_options_become_a_request_and_what_is_not_given_stays_the_default(tmp_path, monkeypatch, capsys):
    requests = []

    def build(request):
        requests.append(request)
        (tmp_path / "x.mar").write_bytes(b" " * 1_500_000)
        return ArchiveReport(tmp_path / "x.mar", "ab12", "T", 2, 3)

    monkeypatch.setattr("lib.packaging.builder.build_archive", build)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    options = ["--weights", "mine.pth", "--class-names", str(tmp_path / "names.txt"), "--workers", "2"]
    options += ["--input-size", "320", "640", "--score-threshold", "0", "--output-dir", str(tmp_path)]
    assert build_archive.main(options) == 0
    assert requests == [
        ArchiveRequest(
            weights="mine.pth",
            class_names=("one", "two"),
            output_dir=tmp_path,
            model_settings={"minWorkers": 2, "maxWorkers": 2},
            serving={"input_size_hw": [320, 640], "score_threshold": 0.0},
        )
    ]
    out = capsys.readouterr().out
    assert "x.mar: DAMO-YOLO-T, 2 classes, 1.5 MB\ncontent SHA-256 ab12\n" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "nowhere.pth"], "nowhere.pth is neither a file"),
        (["--class-names", "nowhere.txt"], "nowhere.txt gives no class names"),
        (["--variant", "XL"], "XL"),
        (["--version", "1\n2"], r"--version is '1\n2'"),
        (["--version", ""], "--version is ''"),
        (["--model", "../x"], "--model is '../x'"),
    ],
)
def test_the_command_says_what_is_wrong_and_fails(tmp_path, capsys, options, message):
    assert build_archive.main([*options, "--output-dir", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
