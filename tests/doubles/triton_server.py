"""A real Triton for tests: deploy/triton/serve.py as a process on free ports."""

import contextlib
import importlib.util
import re
import signal
import subprocess
import sys

import psutil
import pytest

from lib.cli import ScriptError

from doubles.real_server import wait_until
from doubles.served_command import still_running

START_S = 180.0
READY_LINE = r"ready: (\S+), (\d+) worker\(s\)\n(http://\S+?)/v2/\S+   gRPC (\S+)   metrics (\S+)\n"


def load_module(project_dir, name):
    """A file of deploy/triton as a module."""
    spec = importlib.util.spec_from_file_location(f"triton_{name}", project_dir / f"deploy/triton/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class TritonCommand:
    """deploy/triton/serve.py, ready."""

    def __init__(self, project_dir, archive, folder, *options):
        self.output = folder / "output.txt"
        command = [
            sys.executable,
            "deploy/triton/serve.py",
            "--archive",
            str(archive),
            "--any-port",
            *options,
        ]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=project_dir, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            wait_until(self._is_ready, "Triton being ready", START_S)
        except BaseException:
            self.stop()
            raise

    def _is_ready(self):
        assert self.process.poll() is None, self.printed()
        found = re.search(READY_LINE, self.printed())
        if found:
            self.model, self.workers, self.url, self.grpc_address, self.metrics_url = found.groups()
        return found

    def printed(self):
        return self.output.read_text()

    def processes(self):
        """Those that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def backend_processes(self):
        return [child for child in self.processes() if child.name() == "triton_python_backend_stub"]

    def stop(self):
        """End it as a service manager does; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def triton_server(project_dir, archive, folder, *options):
    """The server inside the context, ended and checked afterwards; where there is no Triton, a skip."""
    folder.mkdir(exist_ok=True)
    try:
        load_module(project_dir, "program").find_program(folder)
    except ScriptError as error:
        pytest.skip(str(error))
    command = TritonCommand(project_dir, archive, folder, *options)
    started = command.processes()
    try:
        yield command
    finally:
        command.stop()
        assert still_running(started) == []
