#!/usr/bin/env bash
# A fresh machine -> venv, install, every test.   ./launch/test.sh [pytest arguments]
set -euo pipefail
EXTRAS="[test]" source "$(dirname "$0")/install.sh"
export JAX_PLATFORMS=cpu
ruff check . && ruff format --check .
lint-imports
# A file stays with one worker, whose fixtures it shares.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
