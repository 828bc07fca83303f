"""Read the values of a request's options, wherever they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from damoyolo.config import ServingConfig
from damoyolo.errors import InvalidOptionError, quoted
from damoyolo.strict_json import parse_number
from damoyolo.structures import DetectionOptions

# The options of the postprocessing; every protocol has them.
DETECTION_OPTIONS = ("score_threshold", "iou_threshold", "max_detections", "classes", "class_agnostic")

WHITE_SPACE = " \t\r\n"
_BOOL_OF_TEXT = {"true": True, "1": True, "false": False, "0": False}
_MAX_TEXT = 65_536  # characters of an option; a list of a million classes takes seconds


class Text(str):
    """An option from a place without types (form, query, header), unlike a JSON string."""

    __slots__ = ()


class OptionReader:
    """Reads options for a network with the classes, limits and defaults of `config`."""

    def __init__(self, config: ServingConfig) -> None:
        self._defaults = config.default_options()
        self._max_detections_limit = config.max_detections_limit
        self._id_of_class = {name: class_id for class_id, name in enumerate(config.class_names)}

    def read(self, values: Mapping[str, Any]) -> DetectionOptions:
        """The options; those that are not given have the server's defaults.

        values: by name, one of DETECTION_OPTIONS: a JSON value or a `Text`.

        Raises:
            InvalidOptionError: a value is malformed or out of range.
        """
        if not values:  # as most requests
            return self._defaults
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if name in ("score_threshold", "iou_threshold"):
                changes[name] = _number_0_to_1(name, value)
            elif name == "max_detections":
                changes[name] = self._max_detections(value)
            elif name == "class_agnostic":
                changes[name] = parse_bool(name, value)
            else:
                changes["class_ids"] = self._class_ids(value)
        return dataclasses.replace(self._defaults, **changes)

    def _max_detections(self, value: Any) -> int:
        limit = self._max_detections_limit
        return whole_number("max_detections", value, 1, limit, " (server setting max_detections_limit)")

    def _class_ids(self, value: Any) -> tuple[int, ...]:
        require_short("classes", value)  # a JSON string, too
        entries = (
            [entry.strip(WHITE_SPACE) for entry in value.split(",")] if isinstance(value, str) else value
        )
        if not isinstance(entries, list) or not entries or entries == [""]:
            raise InvalidOptionError(
                f"classes is {quoted(value)}; class names or ids are accepted, separated by commas or as a "
                "JSON list; leave it out for all classes"
            )
        return tuple(sorted({self._class_id(entry) for entry in entries}))

    def _class_id(self, entry: Any) -> int:
        """The id of a name, or an id as number or text; a name that looks like a number is a name."""
        last_id = len(self._id_of_class) - 1
        if isinstance(entry, str) and entry in self._id_of_class:
            return self._id_of_class[entry]
        class_id = parse_number(entry) if isinstance(entry, str) else entry
        if isinstance(class_id, int) and not isinstance(class_id, bool) and 0 <= class_id <= last_id:
            return class_id
        names = list(self._id_of_class)
        known = ", ".join(map(quoted, names[:8])) + (", ..." if len(names) > 8 else "")
        raise InvalidOptionError(
            f"classes names {quoted(entry)}; accepted are ids from 0 to {last_id} and class names: {known}"
        )


def require_short(name: str, value: Any) -> None:
    """Refuse a text of an option that would take long to read.

    Raises:
        InvalidOptionError: it is too long.
    """
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise InvalidOptionError(f"{name} has {len(value)} characters; at most {_MAX_TEXT} are accepted")


def parse_bool(name: str, value: Any) -> bool:
    """True or false as JSON, or as a `Text`: true, false, 1, 0.

    Raises:
        InvalidOptionError: anything else.
    """
    truth = _BOOL_OF_TEXT.get(value.lower()) if isinstance(value, Text) else value
    if not isinstance(truth, bool):
        raise InvalidOptionError(f"{name} is {quoted(value)}; true or false is accepted")
    return truth


def whole_number(name: str, value: Any, lowest: int, highest: int, source: str = "") -> int:
    """A whole number as JSON, or as a `Text`.

    source: for the error, where the limit comes from.

    Raises:
        InvalidOptionError: anything else, or a number outside the limits.
    """
    number = parse_number(value) if isinstance(value, Text) else value
    if not isinstance(number, int) or isinstance(number, bool) or not lowest <= number <= highest:
        raise InvalidOptionError(
            f"{name} is {quoted(value)}; a whole number from {lowest} to {highest} is accepted{source}"
        )
    return number


def _number_0_to_1(name: str, value: Any) -> float:
    number = parse_number(value) if isinstance(value, Text) else value
    # The comparison also refuses NaN.
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 1:
        raise InvalidOptionError(f"{name} is {quoted(value)}; a number from 0 to 1 is accepted")
    return float(number)
