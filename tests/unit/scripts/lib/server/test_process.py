import os
import subprocess
import sys

from lib.server.dropping_output import DroppingOutput
from lib.server.process import TorchServeProcess


def test_the_output_is_read_to_its_end_when_nobody_takes_the_copy(project_dir, tmp_path):
    # Java blocks in its next line of log when its output is no longer read.
    reading, writing = os.pipe()
    os.close(reading)
    command = [
        sys.executable,
        "-c",
        "import sys; sys.stdout.buffer.write(b'\\xe2\\x9c\\x93 first\\nsecond\\n')",
    ]
    with open(writing, "w") as broken:
        echo = DroppingOutput(broken)
        server = TorchServeProcess(project_dir / "config.properties", tmp_path, echo=echo)
        with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server._process:
            server._read_output()
        echo.flush()
    assert server.last_output() == "\N{CHECK MARK} first\nsecond"


def test_the_front_end_has_its_time_to_drain(project_dir, tmp_path):
    config = project_dir / "config.properties"
    times = {"front_end_drain_delay_s": "2", "front_end_drain_grace_s": "40"}
    assert TorchServeProcess(config, tmp_path, overrides=times)._drain_s() == 42
