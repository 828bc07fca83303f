"""The commands of README.md, run as printed in a fresh clone.

They run in one bash session in the order of the page; only ./scripts/test.sh is left out, because it would
run this test. The commands name port 8080. Bubblewrap gives the session a loopback interface of its own, so
that they run unchanged whatever else listens on this machine, and whatever they leave behind ends with it.
Without it they run only if the ports are free, else the tests are skipped.

The environment is the one that ./scripts/test.sh made here: to install it again would take minutes and a
network.
"""

import hashlib
import json
import re
import shutil
import subprocess

import pytest

from lib.accuracy.tolerances import TOLERANCES
from lib.server.process import is_listening

PORTS = (7070, 7071, 8080, 8081, 8082)
LEFT_OUT = "./scripts/test.sh"
# Not tracked, or of no use in a clone; where the project is no git checkout, the rest is copied.
UNTRACKED = shutil.ignore_patterns(
    ".git", ".venv*", "*_cache", "__pycache__", "logs", "output", "*.mar", "*.onnx", "*.egg-info"
)
SANDBOX = (
    "bwrap",
    "--dev-bind",
    "/",
    "/",
    "--unshare-net",
    "--unshare-pid",
    "--proc",
    "/proc",
    "--die-with-parent",
)
# The command that fails is named. A server that the page starts has to have ended by the end of the page.
SESSION = """
set -e -o pipefail
trap 'echo "failed: $BASH_COMMAND" >&2' ERR
{commands}
wait
"""


def blocks(document, language):
    """The contents of the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def clone(project_dir, tmp_path_factory):
    """A fresh clone with the environment of this checkout."""
    if not installed(project_dir):
        pytest.skip("no .venv with the pinned packages: ./scripts/test.sh makes it")
    folder = tmp_path_factory.mktemp("readme") / "clone"
    cloned = subprocess.run(
        ["git", "clone", "--quiet", "--no-hardlinks", str(project_dir), str(folder)], check=False, timeout=120
    )
    if cloned.returncode != 0:
        shutil.copytree(project_dir, folder, ignore=UNTRACKED, dirs_exist_ok=True)
    for name in (".venv", ".venv-clients"):
        (folder / name).symlink_to((project_dir / name).resolve())
    return folder


def installed(project_dir):
    """Whether demo.sh would install nothing into the environment of this checkout."""
    for name in ("requirements.txt", "requirements-dev.txt"):
        stamp = project_dir / ".venv" / f"{name}.installed"
        digest = hashlib.sha256((project_dir / name).read_bytes()).hexdigest()
        if not stamp.exists() or not stamp.read_text().startswith(digest):
            return False
    return True


def sandbox():
    """The words before `bash` that give a session ports of its own; none where the ordinary ones are free."""
    if (
        shutil.which(SANDBOX[0])
        and subprocess.run([*SANDBOX, "true"], check=False, timeout=60).returncode == 0
    ):
        return SANDBOX
    taken = [port for port in PORTS if is_listening(port)]
    if taken:
        pytest.skip(f"no usable bwrap, and something listens on {taken}, which the README's commands use")
    return ()


@pytest.fixture(scope="module")
def session(clone):
    """The finished session of all commands."""
    commands = "".join(block for block in blocks(clone / "README.md", "bash") if block.strip() != LEFT_OUT)
    return subprocess.run(
        [*sandbox(), "bash", "-c", SESSION.format(commands=commands)],
        cwd=clone,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


def from_left_to_right(answer):
    """The detections in an order that does not depend on nearly equal scores."""
    return sorted(answer["detections"], key=lambda found: found["bbox"][0])


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_the_order_printed(session, clone):
    printed = "".join(blocks(clone / "README.md", "bash")).splitlines()
    assert LEFT_OUT in printed  # the one that is not run
    assert session.returncode == 0, f"{session.stdout[-4000:]}\n{session.stderr[-4000:]}"
    assert (clone / "output/smear_3_detected.jpg").stat().st_size > 10_000


@pytest.mark.slow
def test_the_answer_in_the_readme_is_the_one_that_its_request_gets(session, clone):
    (printed,) = (json.loads(block) for block in blocks(clone / "README.md", "json"))
    # The answer ends without a line feed, so that the next command's output follows on its line.
    start = session.stdout.index('{"width":')
    answer, _ = json.JSONDecoder().raw_decode(session.stdout, start)
    # The page was written on a CPU with bfloat16, which another machine may not have.
    tolerances = TOLERANCES["bf16"]
    assert (answer["width"], answer["height"]) == (printed["width"], printed["height"])
    pairs = zip(from_left_to_right(answer), from_left_to_right(printed), strict=True)
    for found, expected in pairs:
        assert found["label"] == expected["label"]
        assert found["score"] == pytest.approx(expected["score"], abs=tolerances.score)
        assert found["bbox"] == pytest.approx(expected["bbox"], abs=tolerances.box_px)
