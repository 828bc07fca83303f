#!/usr/bin/env bash
# Sets up and runs the tests: style, types, units, and integration against a real TorchServe.
#   ./scripts/test.sh          all but those marked slow
#   ./scripts/test.sh --all    all, as CI does
# Other arguments go to pytest, without style and types: ./scripts/test.sh tests/unit -k postprocess
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_environment.sh
setup_environment requirements.txt requirements-dev.txt
setup_clients
setup_triton_if_possible
case "$*" in
    "") set -- -m "not slow"; check=yes ;;
    --all) set --; check=yes ;;
    *) check=no ;;
esac
if [ "$check" = yes ]; then
    echo "== ruff"
    ruff check .
    ruff format --check .
    echo "== mypy"
    mypy
fi
echo "== pytest"
exec python -m pytest "$@"
