"""Every command and file that the documents name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PROJECT_DIR = Path(__file__).resolve().parents[2]
DOCUMENTS = [PROJECT_DIR / "README.md", *sorted((PROJECT_DIR / "docs").glob("*.md"))]


def shell_commands(document: Path) -> list[str]:
    """The commands in the shell blocks of a document, continued lines joined."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def script_calls() -> list[tuple[str, str, list[str]]]:
    calls = []
    for document in DOCUMENTS:
        for command in shell_commands(document):
            words = shlex.split(command, comments=True)
            for index, word in enumerate(words):
                if re.fullmatch(r"(\./)?scripts/\w+\.(py|sh)", word):
                    options = [each.split("=")[0] for each in words[index + 1 :] if each.startswith("--")]
                    calls.append((document.name, word.removeprefix("./"), options))
    return calls


@cache
def help_text(script: str) -> str:
    result = subprocess.run(
        [sys.executable, str(PROJECT_DIR / script), "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("document", "script", "options"), script_calls())
def test_a_documented_command_exists_with_its_options(document: str, script: str, options: list[str]) -> None:
    assert (PROJECT_DIR / script).is_file(), f"{document} names {script}"
    if script.endswith(".sh"):
        text = (PROJECT_DIR / script).read_text()
        assert all(option in text for option in options)
    else:
        for option in options:
            assert option in help_text(script), f"{document}: {script} has no {option}"


def test_the_documents_hold_commands_at_all() -> None:
    scripts = {script for _, script, _ in script_calls()}
    assert {"scripts/demo.sh", "scripts/test.sh", "scripts/build_archive.py", "scripts/serve.py"} <= scripts


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_link_to_a_file_of_the_project_leads_there(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
