"""The device that a command was asked to use."""

from __future__ import annotations

import re

import torch

from lib.cli import ScriptError


def open_device(name: str | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:index`; None takes a GPU if there is one.

    Raises:
        ScriptError: it is something else, or is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise ScriptError(f"--device is {name!r}; accepted are cpu, cuda and cuda:index")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and int(match[1] or 0) >= count:
        raise ScriptError(f"--device is {name}, but PyTorch finds {count} CUDA devices")
    return torch.device(name)
