"""scripts/serve.py as a process, always at the same ports, for tests that disturb it."""

import signal
import subprocess
import sys

import psutil
import requests

from doubles.real_server import config_with_free_ports, ports_in_use, wait_until


class ServedCommand:
    """scripts/serve.py with the archives of a folder, where it also keeps its settings and what it prints."""

    def __init__(self, project_dir, folder, *options):
        self.project_dir = project_dir
        self.folder = folder
        self.config, self.addresses = config_with_free_ports(project_dir, folder)
        self.url = f"{self.addresses[0]}/predictions/damoyolo"
        self.ready_file = folder / "ready"
        self.options = options
        self.process = None

    def start(self, output=None, **environment):
        """Returns when the server is ready. output: its standard output and error, in place of a file."""
        self.ready_file.unlink(missing_ok=True)
        command = [sys.executable, "scripts/serve.py", "--ts-config", str(self.config), *self.options]
        command += ["--model-store", str(self.folder), "--ready-file", str(self.ready_file)]
        with (self.folder / "output.txt").open("a") as file:
            self.process = subprocess.Popen(
                command,
                cwd=self.project_dir,
                env=environment or None,
                stdout=output or file,
                stderr=subprocess.STDOUT,
            )
        wait_until(self.is_ready, "the server being ready")

    def is_ready(self):
        assert self.process.poll() is None, self.printed()
        return self.ready_file.exists() and bool(self.ready_file.read_text())

    def printed(self):
        return (self.folder / "output.txt").read_text()

    def processes(self):
        """Those that serve.py has started, Java and workers included."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def java(self):
        (java,) = (process for process in self.processes() if process.name() == "java")
        return java

    def worker_pid(self):
        model = requests.get(f"{self.addresses[1]}/models/damoyolo", timeout=60).json()[0]
        return model["workers"][0]["pid"]

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        """End it as a service manager does; the exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        code = self.process.wait(120)
        assert not ports_in_use(self.addresses)
        return code


def still_running(processes):
    """Those that have not ended; one whose parent does not ask how it ended has."""
    return [
        process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]
