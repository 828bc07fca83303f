"""Read JSON strictly and in bounded time: no NaN, no name twice, no number or document without an end."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from damoyolo.errors import RequestError

MAX_DIGITS = 64  # of a number; Python takes quadratic time for the digits of an int
# Values and names in a JSON document; a million of them take a second and much memory.
_MAX_ITEMS = 100_000
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def parse_json(content: str | bytes | bytearray | memoryview, what: str, accepted: str) -> Any:
    """Read a document.

    what, accepted: for the error: what is read, and what the client may send.

    Raises:
        RequestError: says what is wrong, and never quotes the content.
    """
    try:
        text = content if isinstance(content, str) else str(content, "utf-8-sig")
        if sum(map(text.count, ",:[{")) > _MAX_ITEMS:
            raise _InvalidJsonError(f"more than {_MAX_ITEMS} values and names")
        return json.loads(
            text,
            object_pairs_hook=_unique_names,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except _InvalidJsonError as error:
        reason = str(error)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except RecursionError:
        reason = "nested too deeply"
    raise RequestError(f"{what} is not valid JSON: {reason}; {accepted}")


def parse_number(text: str) -> int | float | None:
    """The value of a number as JSON has it, None for any other text; Python's own functions accept more."""
    if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text):
        return None
    number: int | float = json.loads(text)
    return number


class _InvalidJsonError(Exception):
    """JSON that Python's reader would accept."""


def _unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _InvalidJsonError("an object has a name twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise _InvalidJsonError(f"{name} is no JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _InvalidJsonError(f"a number of more than {MAX_DIGITS} digits")
    return int(digits)
