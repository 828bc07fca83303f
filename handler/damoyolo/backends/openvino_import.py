"""Import OpenVINO's Python package without its telemetry and without its bridge to torch.compile.

Importing this module is enough to switch both off; it does not import the package itself.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

# OpenVINO reports its use over the network from its import on, unless its telemetry package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# TorchServe's base handler imports the bridge, which nothing here uses: it costs seconds at every start of a
# worker and gives a deprecation warning.
sys.modules.setdefault("openvino.torch", None)  # type: ignore[arg-type]
# Without the bridge the base handler warns "OpenVINO is not enabled", although the network may run in it.
logging.getLogger("ts.torch_handler.base_handler").setLevel(logging.ERROR)


def import_openvino() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    import openvino

    return openvino


@functools.cache
def openvino_core() -> Any:
    """The one Core of the process, which is never released.

    A Core's CPU plugin gives the thread that loads it another signal stack, and unmaps that with the Core.
    After two Cores released in the order of their making, or one released in another thread, the first thread
    is left with a stack that is gone: the next signal with a Python handler, of Ctrl-C or SIGTERM, say, ends
    the process with SIGSEGV (OpenVINO 2026.4).

    Raises:
        ImportError: OpenVINO is not installed.
    """
    return import_openvino().Core()
