"""All commands have one scheme of options: one name, one meaning."""

import argparse
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib.cli import DEFAULT_URL

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
FORMER = {"--inference-url", "--draw", "--report", "--write", "--model-name", "--pictures"}
VALUE_NAMES = {
    "--output": "FILE",
    "--json": "FILE",
    "--jsonl": "FILE",
    "--plot": "FILE",
    "--results": "FILE",
    "--output-dir": "DIR",
    "--url": "URL",
    "--management-url": "URL",
    "--metrics-url": "URL",
}
HEAVY = {"torch", "matplotlib", "requests", "urllib3", "PIL", "pycocotools", "onnx", "tqdm"}


def parser_of(command):
    module = "damoyolo_client.detect" if command == "detect" else command
    return importlib.import_module(module)._parser()


def actions_of(parser):
    """Those of a parser and of its sub-commands, without options that are only there to be refused."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions_of(each)
        elif action.help != argparse.SUPPRESS:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_means_the_same_in_every_command(command):
    for action in actions_of(parser_of(command)):
        assert not FORMER & set(action.option_strings)
        for option in set(action.option_strings) & VALUE_NAMES.keys():
            assert action.metavar == VALUE_NAMES[option], option
        if "--url" in action.option_strings:
            assert action.default in (None, DEFAULT_URL)
            assert "inference port" in action.help
        if "--model" in action.option_strings:
            assert action.default == "damoyolo"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_is_printed(command):
    assert re.search(r"\bPrints\b|\bprint\b", parser_of(command).format_help())


def test_no_help_needs_a_heavy_package():
    """So that it appears at once; a fresh interpreter builds every parser."""
    code = (
        f"import importlib, sys\nfor name in {COMMANDS}:\n"
        " module = importlib.import_module('damoyolo_client.detect' if name == 'detect' else name)\n"
        " module._parser().format_help()\n"
        f"print(*({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("\n", "", 0)


@pytest.mark.parametrize(
    ("command", "former", "present"),
    [
        ("detect", ["--draw", "x"], "--output-dir"),
        ("detect", ["--jsonl", "x"], "--output"),
        ("evaluate", ["--json", "x"], "--jsonl"),
        ("soak_server", ["--inference-url", "x"], "--url"),
        ("fuzz_server", ["--inference-url", "x"], "--url"),
        ("benchmark_server", ["--json", "x"], "--jsonl"),
        ("tune", ["--write", "x"], "--output"),
        ("build_archive", ["--model-name", "x"], "--model"),
        ("quantize", ["--report", "x"], "--json"),
        ("compare_backends", ["--report", "x"], "--json"),
    ],
)
def test_a_former_name_is_refused_with_its_present_one(command, former, present, capsys):
    with pytest.raises(SystemExit):
        parser_of(command).parse_args(former)
    assert f"{former[0]} is now called {present}" in capsys.readouterr().err


def test_a_former_name_of_a_sub_command_is_refused_too(capsys):
    with pytest.raises(SystemExit):
        parser_of("deploy").parse_args(["scale", "2", "--inference-url", "x"])
    assert "is now called --url" in capsys.readouterr().err


def test_the_documentation_names_every_command():
    document = (SCRIPTS.parent / "docs/commands.md").read_text()
    assert [command for command in COMMANDS if f"`{command}.py`" not in document] == []


def test_every_command_has_a_description():
    for command in COMMANDS:
        assert ast.get_docstring(ast.parse((SCRIPTS / f"{command}.py").read_text()))
