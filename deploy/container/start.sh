#!/usr/bin/env bash
# The container's entry point: serves until SIGTERM, then answers what was accepted. Arguments go to scripts/serve.py.
#   DAMOYOLO_CONFIG       settings of the server
#   DAMOYOLO_MODEL_STORE  folder of the archives; read only is enough
#   DAMOYOLO_LOG_DIR      folder of the logs, of at most 150 MB, which is made; what is logged is also printed
# Writes below /tmp, $HOME and the folder of the logs only.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Another user (docker run --user), or a read-only disk without a volume there: on a GPU, Triton then compiles at each
# start.
if [ ! -w "${HOME:-}" ]; then export HOME=/tmp; fi
# As process 1, tini waits for processes whose parent has ended, which serve.py would leave as zombies; it passes on
# signals and the exit code. -s: it does so as another process, too (Kubernetes' shareProcessNamespace).
exec tini -s -- .venv/bin/python scripts/serve.py \
    --ts-config "${DAMOYOLO_CONFIG:-deploy/container/config.properties}" \
    --model-store "${DAMOYOLO_MODEL_STORE:-model_store}" \
    --log-dir "${DAMOYOLO_LOG_DIR:-/tmp/damoyolo-logs}" "$@"
