"""Errors, exit codes and renamed options of the commands."""

import subprocess
import sys

import pytest

from lib.cli import ScriptError, command_parser, printable, run_command

from damoyolo.errors import ConfigError


def parser():
    made = command_parser("What it does.", {"--pictures": "--images"})
    made.prog = "some_command.py"
    made.add_argument("--images", nargs="+")
    return made


@pytest.mark.parametrize("error", [ScriptError("why"), ConfigError("why"), FileNotFoundError("why")])
def test_an_expected_error_is_one_line_and_exit_code_1(error, capsys):
    def command(_arguments):
        raise error

    assert run_command(command, parser(), []) == 1
    assert capsys.readouterr().err == "some_command: why\n"


def test_what_a_terminal_would_obey_is_shown_as_escape_sequences(capsys):
    assert printable("Blutzelle ß") == "Blutzelle ß"
    assert printable("a\x1b[2J\r\nb\x9b\u202e\udcff") == r"a\x1b[2J\r\nb\x9b\u202e\udcff"
    assert len(printable("a" * 10_000_000)) < 3000

    def command(_arguments):
        raise ScriptError("two\nlines \x1b]0;title\x07")

    assert run_command(command, parser(), []) == 1
    assert capsys.readouterr().err == "some_command: two\nlines \\x1b]0;title\\x07\n"


@pytest.mark.parametrize("package", ["pycocotools", "onnx.helper"])
def test_a_missing_extra_package_is_one_line_with_what_installs_it(capsys, package):
    def command(_arguments):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    assert run_command(command, parser(), []) == 1
    err = capsys.readouterr().err
    assert package in err
    assert "pip install -r requirements-dev.txt" in err
    assert err.count("\n") == 1


def test_an_option_whose_package_is_missing_is_refused_before_the_work(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = parser()
    made.add_argument("--plot")
    assert run_command(lambda _: pytest.fail("worked"), made, ["--plot", "x.png"]) == 1
    assert "--plot needs the package matplotlib" in capsys.readouterr().err


def test_a_folder_in_place_of_a_file_is_refused_before_the_work(tmp_path, capsys):
    made = parser()
    made.add_argument("--output")
    assert run_command(lambda _: pytest.fail("worked"), made, ["--output", str(tmp_path)]) == 1
    assert "which is a folder; accepted is a file" in capsys.readouterr().err


def test_the_folder_of_a_file_is_made_before_the_work(tmp_path):
    made = parser()
    made.add_argument("--plot")
    file = tmp_path / "new" / "plot.png"
    assert run_command(lambda _: file.write_bytes(b""), made, ["--plot", str(file)]) == 0


def test_a_plot_of_an_unknown_kind_is_refused_before_the_work(capsys):
    made = parser()
    made.add_argument("--plot")
    assert run_command(lambda _: pytest.fail("worked"), made, ["--plot", "x.foo"]) == 1
    assert "accepted are files that end in .png" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_a_command_quietly(project_dir):
    code = (
        "import sys, lib.cli as c; p = c.command_parser('x')\n"
        "def f(_):\n while True: print('line' * 1000)\n"
        "sys.exit(c.run_command(f, p, []))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=project_dir / "scripts", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(100)
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_an_interrupt_is_one_line_and_exit_code_130(capsys):
    def command(_arguments):
        raise KeyboardInterrupt

    assert run_command(command, parser(), []) == 130
    assert capsys.readouterr().err == "some_command: interrupted\n"


def test_an_unexpected_error_keeps_its_traceback():
    def command(_arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command, parser(), [])


def test_the_exit_code_of_the_command_is_passed_on():
    assert run_command(lambda arguments: len(arguments.images), parser(), ["--images", "a", "b"]) == 2
    assert run_command(lambda _: None, parser(), []) == 0


def test_a_renamed_option_is_refused_with_its_present_name(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda _: None, parser(), ["--pictures", "folder"])
    assert exit_info.value.code == 2
    assert "--pictures is now called --images" in capsys.readouterr().err
    assert "--pictures" not in parser().format_help()


def test_parsing_a_command_line_needs_no_torch(project_dir):
    code = "import sys; import lib.cli, damoyolo.config; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=project_dir / "scripts", timeout=60).returncode == 0
    )
