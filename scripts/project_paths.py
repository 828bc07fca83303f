"""Where the project lies; importing this makes the handler's package importable from anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT_DIR = Path(__file__).resolve().parents[1]
HANDLER_DIR = PROJECT_DIR / "handler"

if str(HANDLER_DIR) not in sys.path:
    sys.path.insert(0, str(HANDLER_DIR))
