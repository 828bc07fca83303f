"""Send images to a running server; the command of the client package, which also installs it as damoyolo-detect."""

from __future__ import annotations

import sys

from damoyolo_client.detect import main

if __name__ == "__main__":
    sys.exit(main())
