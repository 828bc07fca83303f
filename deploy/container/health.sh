#!/usr/bin/env bash
# Whether the server in this container is ready; `health.sh live`: whether it needs no restart. Exit code 0 or 1.
# Asks the port of inference that the settings name, and prints what it answers (docs/front-end.md#health).
set -euo pipefail
cd "$(dirname "$0")/../.."
config=${DAMOYOLO_CONFIG:-deploy/container/config.properties}
port=$(sed -n 's/^ *inference_address *=.*:\([0-9]\+\)[ \r]*$/\1/p' "$config")
# Python's own client: the image has no curl. -I, -S: nothing of the environment, a start in some 20 ms.
exec python3 -I -S - "http://127.0.0.1:${port:-8080}/v2/health/${1:-ready}" <<'PYTHON'
import sys
import urllib.error
import urllib.request

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    print(direct.open(sys.argv[1], timeout=8).read().decode())
except urllib.error.HTTPError as error:  # 503, with the reason
    sys.exit(error.read().decode())
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")
PYTHON
