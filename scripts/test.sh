#!/usr/bin/env bash
# Sets up and runs all tests: style, types, units, and integration against a real TorchServe.
# Arguments go to pytest, say: ./scripts/test.sh tests/unit -k postprocess
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_environment.sh
setup_environment requirements.txt requirements-dev.txt
if [ $# -eq 0 ]; then
    echo "== ruff"
    ruff check .
    ruff format --check .
    echo "== mypy"
    mypy
fi
echo "== pytest"
exec python -m pytest "$@"
