"""The folder of an archive in which it carries its Triton kernels, compiled for a kind of GPU.

Triton looks kernels up by the hash of all that goes into them, so what was compiled for another GPU, or by
another version, is not found and compiled as if nothing were there.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILED_KERNELS_DIR = "compiled_kernels"
CACHE_VARIABLE = "TRITON_CACHE_DIR"
# Names the files of a kernel by absolute paths, which are those of the machine that compiled it.
_GROUP_PATTERN = "__grp__*"


def use_compiled_kernels(model_dir: Path) -> bool:
    """Have Triton look into the archive's folder first; whether there is one, and nobody set another cache.

    Call before the first kernel is asked for. What is missing there is compiled into it. A folder that is
    damaged or cannot be written is left out of account.
    """
    folder = model_dir / COMPILED_KERNELS_DIR
    if not folder.is_dir() or CACHE_VARIABLE in os.environ:
        return False
    try:
        for group in folder.rglob(_GROUP_PATTERN):
            _relocate(group)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        logger.warning(
            "the compiled kernels of the archive are not used: %s: %s", type(error).__name__, error
        )
        return False
    os.environ[CACHE_VARIABLE] = str(folder)
    return True


def _relocate(group: Path) -> None:
    """Let a group name the files beside it."""
    names = json.loads(group.read_text())["child_paths"]
    here = {name: str(group.with_name(Path(path).name)) for name, path in names.items()}
    if here != names:
        # In one step: other workers read the same folder.
        beside = group.with_name(f".{os.getpid()}-{group.name}")
        beside.write_text(json.dumps({"child_paths": here}))
        beside.replace(group)
