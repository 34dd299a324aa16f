#!/usr/bin/env bash
# A fresh machine -> venv, install, lint, walls between rooms, tests.
#
#   ./launch/test.sh            the tests that prove each promise once, within ten minutes
#   ./launch/test.sh --all      the rest, too: needs torch, takes an hour
#   ./launch/test.sh ... -k engine tests/test_pack.py     what follows is pytest's
#
# WORKERS (2) is how many processes test at once; PYTHON and VENV are those of install.sh.
set -euo pipefail

all=
case "${1:-}" in
  -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
  --all) all=1; shift ;;
esac
export EXTRAS="[test]"
if [ -n "$all" ]; then
  EXTRAS="[test,parity,tpu,docs]"
else
  # A test's programs run once: LLVM's optimization costs more than it gives.  With --all,
  # or XLA_FLAGS= before the command, they are compiled as in training.
  export XLA_FLAGS=${XLA_FLAGS---xla_backend_optimization_level=0}
fi
source "$(dirname "$0")/install.sh"
export JAX_PLATFORMS=cpu
ruff check . && ruff format --check .
lint-imports
[ -n "$all" ] || set -- -m "not slow" "$@"
# A file stays with one worker, whose fixtures it shares.
python -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
