#!/usr/bin/env bash
# A fresh machine -> venv, install, every test.   ./launch/test.sh [pytest arguments]
set -euo pipefail
EXTRAS="[test]" source "$(dirname "$0")/install.sh"
export JAX_PLATFORMS=cpu
ruff check . && ruff format --check .
lint-imports
python -m pytest "$@"
