"""Where the tests find their material."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT_DIR = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_dir() -> Path:
    """The project's root."""
    return PROJECT_DIR


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference material: goldens, further weights, evaluation pictures."""
    folder = Path(os.environ.get("DAMOYOLO_SHARED", PROJECT_DIR.parent / "shared"))
    if not (folder / "model").is_dir():
        pytest.skip(f"no reference material in {folder}; set DAMOYOLO_SHARED to its folder")
    return folder
