"""OpenVINO's Python package, as it is to be imported: without reports over the network, without ballast.

Importing this module is enough; it does not import the package itself.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

# It reports its use over the network, from its import on, unless the package that does so cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# TorchServe's base handler imports its bridge for torch.compile, which nothing here uses: seconds at every
# start of a worker, and a warning of deprecation.
sys.modules.setdefault("openvino.torch", None)  # type: ignore[arg-type]
# It then warns "OpenVINO is not enabled", meaning that bridge, while the network may run in OpenVINO.
logging.getLogger("ts.torch_handler.base_handler").setLevel(logging.ERROR)


def import_openvino() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    import openvino

    return openvino
