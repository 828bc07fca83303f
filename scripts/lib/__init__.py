"""Code shared by the commands. Importing it makes the package `damoyolo` importable.

The handler's folder goes to the end of the search path: a process that runs the modules of an unpacked
archive puts that archive first, and must not get those of the checkout.
"""

import sys
from pathlib import Path

HANDLER_DIR = Path(__file__).resolve().parents[2] / "handler"

if str(HANDLER_DIR) not in sys.path:
    sys.path.append(str(HANDLER_DIR))
