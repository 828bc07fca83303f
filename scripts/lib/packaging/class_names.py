"""Class names: read from a file, or the defaults of known weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lib.cli import ScriptError
from lib.images import require_file
from lib.paths import DEMO_WEIGHTS

from damoyolo.coco_categories import COCO_CLASS_NAMES

MAX_NAME = 200
DEMO_CLASS_NAMES = ("Platelets", "RBC", "WBC")


def default_class_names(weights: Path) -> tuple[str, ...]:
    """The class names of weights for which none are given: the demo's for the demo weights, else COCO's."""
    return DEMO_CLASS_NAMES if weights.resolve() == DEMO_WEIGHTS.resolve() else COCO_CLASS_NAMES


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names of a text file (one per line) or a JSON file (a list, or an object of index to name).

    Raises:
        ScriptError: the file cannot be read, or has another form.
    """
    try:
        if path.exists():
            require_file(path)
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return check_class_names([line.strip() for line in text.split("\n") if line.strip()])
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[str(index)] for index in range(len(content))]
        if not isinstance(content, list):
            raise TypeError(f"found a {type(content).__name__}")
        if any(isinstance(name, list | dict | bool | None) for name in content):
            raise TypeError("found an entry that is no name")
        return check_class_names(list(map(str, content)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ScriptError(
            f"{path} gives no class names ({type(error).__name__}: {error}); accepted is a text file "
            'with one name per line, or JSON: a list of names, or an object {"0": name, "1": name, ...}'
        ) from error


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, which have to be printable: they go into answers, headers and tables.

    Raises:
        ScriptError: a name is not, or is there twice; there are none.
    """
    if not names:
        raise ScriptError("there are no class names; every class needs one")
    for name in names:
        if not name or not name.isprintable() or len(name) > MAX_NAME:
            raise ScriptError(
                f"a class is called {name[:MAX_NAME]!r}; accepted are 1 to {MAX_NAME} printable characters"
            )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ScriptError(f"two classes are called {', '.join(twice)}; every class needs its own name")
    return tuple(names)
