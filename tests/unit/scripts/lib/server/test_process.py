import io
import subprocess
import sys

import pytest

from lib.server.process import TorchServeProcess


class ClosedPipe(io.StringIO):
    """As standard output after `serve.py | head` has read enough."""

    def write(self, _text):
        raise BrokenPipeError


def closed_file():
    """As standard output that a test runner has replaced and closed."""
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize(
    "echo", [ClosedPipe(), closed_file(), io.TextIOWrapper(io.BytesIO(), encoding="latin-1")]
)
def test_the_output_is_read_to_its_end_when_nobody_takes_the_copy(project_dir, tmp_path, echo):
    # Java blocks in its next line of log when its output is no longer read.
    server = TorchServeProcess(project_dir / "config.properties", tmp_path, echo=echo)
    command = [
        sys.executable,
        "-c",
        "import sys; sys.stdout.buffer.write(b'\\xe2\\x9c\\x93 first\\nsecond\\n')",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server._process:
        server._read_output()
    assert server.last_output() == "\N{CHECK MARK} first\nsecond"
    assert server._echo is None
