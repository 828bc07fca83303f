"""Write what a command found as a file of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON; makes the folder.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot express.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
