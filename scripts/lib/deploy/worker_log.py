"""Find in the server's log why a worker of a version could not start."""

from __future__ import annotations

import re
from pathlib import Path

# TorchServe writes the first before the traceback of a RuntimeError, and otherwise only the second.
FAILURES = ("Failed to load model", "Backend worker process died")
ENDS = ("Backend worker process died", "s_name_part0=")  # of this process, or the next one's first line
MAX_LINES = 15
MAX_BYTES = 2**20


class LogReader:
    """What the server logs from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = path.stat().st_size if path.is_file() else 0

    def failure(self, model_name: str, version: str) -> str:
        """The end of the traceback with which a worker failed to load the version; "" if there is none."""
        # Each line is: time [level] W-PORT-NAME_VERSION-stdout MODEL_LOG message
        mark = re.compile(rf" W-[0-9]+-{re.escape(f'{model_name}_{version}')}-std(?:out|err) MODEL_LOG (.*)")
        printed = [found[1] for line in self._lines() if (found := mark.search(line))]
        first = next((i for i, text in enumerate(printed) if text.startswith(FAILURES)), None)
        if first is None:
            return ""
        after = printed[first + 1 :]
        end = next((i for i, text in enumerate(after) if text.startswith(ENDS)), len(after))
        return "\n".join([printed[first], *after[max(0, end - MAX_LINES) : end]])

    def _lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                start = self._start if size >= self._start else 0  # a new file has taken its place
                file.seek(max(start, size - MAX_BYTES))
                return file.read().decode(errors="replace").splitlines()
        except OSError:
            return []
