"""Folders and files of the project."""

from __future__ import annotations

from lib import HANDLER_DIR as HANDLER_DIR

PROJECT_DIR = HANDLER_DIR.parent
MODEL_STORE = PROJECT_DIR / "model_store"
DEMO_ARCHIVE = MODEL_STORE / "damoyolo.mar"
DEMO_WEIGHTS = MODEL_STORE / "weights" / "damoyolo_s_bccd.pth"
SAMPLE_IMAGES = PROJECT_DIR / "tests" / "data" / "smears"
