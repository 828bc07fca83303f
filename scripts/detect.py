"""Send images to a running server; `pip install .` installs the same command as damoyolo-detect."""

from __future__ import annotations

import sys

from damoyolo_client.detect import main

if __name__ == "__main__":
    sys.exit(main())
