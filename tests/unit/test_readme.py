"""The documents name commands, options, links and files that exist."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PROJECT_DIR = Path(__file__).resolve().parents[2]
README, README_ZH = PROJECT_DIR / "README.md", PROJECT_DIR / "README.zh-CN.md"
CHANGELOG = PROJECT_DIR / "CHANGELOG.md"  # names commands and files of former versions
ARCHITECTURE = PROJECT_DIR / "docs/architecture.md"
DOCUMENTS = [
    *(PROJECT_DIR / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")),
    PROJECT_DIR / "model_store/weights/README.md",
    *sorted((PROJECT_DIR / "docs").glob("*.md")),
]
CREATED = (".venv/", "output/", "logs/", "model_store/damoyolo.mar")
CODE_SUFFIXES = ("md", "properties", "py", "sh", "toml", "txt", "xml", "yaml")


def relative(path):
    """The path from the project's root."""
    return path.relative_to(PROJECT_DIR).as_posix()


def fenced_blocks(document, languages):
    """The contents of a document's fenced code blocks in one of the languages, joined by |."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


def shell_commands(document):
    """The words of each command in the shell blocks of a document, continued lines joined."""
    text = "\n".join(fenced_blocks(document, "bash|sh|console")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def script_calls():
    """Document, script and options of each documented call of a script."""
    calls = []
    for document in DOCUMENTS:
        for words in shell_commands(document):
            for index, word in enumerate(words):
                if re.fullmatch(r"(\./)?scripts/\w+\.(py|sh)", word):
                    options = [each.split("=")[0] for each in words[index + 1 :] if each.startswith("--")]
                    calls.append((relative(document), word.removeprefix("./"), options))
    return calls


def named_files(document):
    """Files of the repository that a document names: in backticks, or as an argument in a shell block."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    quoted = [span for span in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[\w./-]+", span)]
    arguments = [word for words in shell_commands(document) for word in words]
    folders = [path.name for path in PROJECT_DIR.iterdir() if path.is_dir()]
    paths = {
        word
        for word in (*quoted, *arguments)
        if word.removeprefix("./").split("/")[0] in folders and "/" in word.removeprefix("./")
    }
    bare_names = {span for span in quoted if re.fullmatch(rf"[\w.-]+\.({'|'.join(CODE_SUFFIXES)})", span)}
    return {name for name in paths | bare_names if not name.startswith(CREATED)}


@cache
def help_text(script):
    result = subprocess.run(
        [sys.executable, str(PROJECT_DIR / script), "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@cache
def file_names():
    """Names of all files in the folders that hold code, and at the top."""
    folders = ("handler", "scripts", "tests", "deploy", "docs")
    nested = (path for folder in folders for path in (PROJECT_DIR / folder).rglob("*"))
    return {path.name for path in (*PROJECT_DIR.iterdir(), *nested)}


@pytest.mark.parametrize(("document", "script", "options"), script_calls())
def test_a_documented_command_exists_with_its_options(document, script, options):
    assert (PROJECT_DIR / script).is_file(), f"{document} names {script}"
    text = (PROJECT_DIR / script).read_text() if script.endswith(".sh") else help_text(script)
    for option in options:
        assert re.search(rf"{option}\b(?!-)", text), f"{document}: {script} has no {option}"


def test_the_documents_hold_commands_at_all():
    scripts = {script for _, script, _ in script_calls()}
    assert {"scripts/demo.sh", "scripts/test.sh", "scripts/build_archive.py", "scripts/serve.py"} <= scripts


@pytest.mark.parametrize("document", [*DOCUMENTS, CHANGELOG], ids=relative)
def test_a_link_to_a_file_of_the_project_leads_there(document):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{relative(document)} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_a_file_that_a_document_names_exists(document):
    for name in sorted(named_files(document)):
        found = (PROJECT_DIR / name).exists() if "/" in name else name in file_names()
        assert found, f"{relative(document)} names {name}"


def test_the_first_page_is_short_and_its_pictures_are_small():
    text = README.read_text()
    assert len(text.split()) <= 1500
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures[0] in "".join(text.splitlines()[:6])
    for picture in pictures:
        assert (PROJECT_DIR / picture).stat().st_size < 150_000, picture


def test_both_languages_have_the_same_commands_answers_links_and_figures():
    english, chinese = README.read_text(), README_ZH.read_text()
    assert fenced_blocks(README, "bash|json") == fenced_blocks(README_ZH, "bash|json")
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) for text in (english, chinese)]
    assert links[0] - links[1] == {"README.zh-CN.md"}
    assert links[1] - links[0] == {"README.md"}
    # Rates, shares, versions, addresses; whole numbers may be words in one of the languages.
    figures = [sorted(re.findall(r"\d+(?:[.,]\d+)+", text)) for text in (english, chinese)]
    assert figures[0] == figures[1]


def listed_files(tree):
    """Paths of a tree that is drawn by two spaces per level; a line may name several files, by commas."""
    paths = set()
    folders = []
    for line in tree.splitlines():
        indent, names = re.fullmatch(r"( *)([^\s,]+(?:, [^\s,]+)*).*", line).groups()
        folders = folders[: len(indent) // 2]
        for name in names.split(", "):
            paths.add("".join(folders) + name)
        if names.endswith("/"):
            folders.append(names)
    return paths


def test_the_architecture_lists_every_module_of_the_handler_and_every_folder_of_lib():
    (tree,) = (block for block in fenced_blocks(ARCHITECTURE, "") if block.startswith("handler/\n"))
    modules = (PROJECT_DIR / "handler").rglob("*.py")
    shared = (PROJECT_DIR / "scripts/lib").glob("*")
    expected = {relative(path) for path in modules if path.name != "__init__.py"}
    for path in shared:
        if (path / "__init__.py").is_file():
            expected.add(f"{relative(path)}/")
        elif path.suffix == ".py" and path.name != "__init__.py":
            expected.add(relative(path))
    listed = listed_files(tree)
    assert expected - listed == set(), "not listed"
    assert {path for path in listed if not (PROJECT_DIR / path).exists()} == set(), "listed, but not there"
