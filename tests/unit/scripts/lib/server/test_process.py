import io
import subprocess
import sys

from lib.server.process import TorchServeProcess


class ClosedPipe(io.StringIO):
    """As standard output after `serve.py | head` has read enough."""

    def write(self, _text):
        raise BrokenPipeError


def test_the_output_is_read_to_its_end_when_nobody_takes_the_copy(project_dir, tmp_path):
    # Java blocks in its next line of log when its output is no longer read.
    server = TorchServeProcess(project_dir / "config.properties", tmp_path, echo=ClosedPipe())
    command = [sys.executable, "-c", "print('first'); print('second')"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server._process:
        server._read_output()
    assert server.last_output() == "first\nsecond"
