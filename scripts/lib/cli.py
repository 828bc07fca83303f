"""Types of command-line arguments that the scripts share; each refuses with what it accepts."""

from __future__ import annotations

import argparse
import math


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a whole number from 1 up")
    return int(text)


def positive_seconds(text: str) -> float:
    """A finite duration above 0, in seconds."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a number of seconds above 0")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, both included."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is a number from 0 to 1")
    return value


def name_list(text: str) -> tuple[str, ...]:
    """Names separated by commas, without the blanks around them."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted are names separated by single commas")
    return names


def size_wh(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    width, separator, height = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted is WIDTHxHEIGHT, say 1920x1080")
    return positive_int(width), positive_int(height)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # outside every range
