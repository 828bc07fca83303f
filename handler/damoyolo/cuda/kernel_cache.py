"""Use the compiled Triton kernels that an archive contains.

Triton looks up kernels by a hash of everything that goes into them, so those compiled for another GPU or by
another version are not found, and are compiled as if the folder were empty.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILED_KERNELS_DIR = "compiled_kernels"
CACHE_VARIABLE = "TRITON_CACHE_DIR"
# These files name the others of a kernel by absolute paths of the machine that compiled it.
_GROUP_PATTERN = "__grp__*"


def use_compiled_kernels(model_dir: Path) -> bool:
    """Make the archive's folder Triton's cache, unless the environment names another; whether it is used.

    Call before the first kernel runs. Missing kernels are compiled into the folder. A folder that is damaged
    or cannot be written is ignored.
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
    """Make a group name the files in its own folder."""
    names = json.loads(group.read_text())["child_paths"]
    here = {name: str(group.with_name(Path(path).name)) for name, path in names.items()}
    if here != names:
        # Replaced atomically, because other workers read the same folder.
        temporary = group.with_name(f".{os.getpid()}-{group.name}")
        temporary.write_text(json.dumps({"child_paths": here}))
        temporary.replace(group)
