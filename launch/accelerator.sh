#!/usr/bin/env bash
# Measures a GPU or TPU that is at hand for minutes and reaches no network: docs/gpu.md.
#
#   ./launch/accelerator.sh pack          here: wheels of ours and of what such a machine
#                                         lacks, for its Python (3.12), into .accelerator
#   ./launch/accelerator.sh run DIR [...]
#                                         there: pixel-jax bench accelerator --out=DIR
#                                         [--budget=540] [--size=full|tiny] [--only=CASE,...]
#
# There nothing is installed for others: the wheels are unpacked into a folder of their own
# beside the packages of PYTHON (python3).  Pack again after a change of the code.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=$root/.accelerator
LACKS="ml-collections annotated-types rapidfuzz grain array-record portpicker importlib_resources"

case "${1:-}" in
  pack)
    cd "$root"
    python=${PYTHON:-python3}
    rm -rf "$wheels" && mkdir -p "$wheels"
    # shellcheck disable=SC2086 # several names
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" \
      --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
      --platform manylinux_2_17_x86_64 --constraint constraints/py312.txt $LACKS
    rm -rf build # of an earlier wheel: what is no more there would come along
    "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$wheels" .
    du -sh "$wheels" && ls "$wheels"
    ;;
  run)
    [ -n "${2:-}" ] || { echo "error: run wants a folder for the report: $0 run DIR" >&2; exit 2; }
    out=$(mkdir -p "$2" && cd "$2" && pwd)
    shift 2
    python=${PYTHON:-python3}
    compgen -G "$wheels/pixel_jax-*.whl" >/dev/null ||
      { echo "error: $wheels holds no wheels; where there is a network: $0 pack" >&2; exit 2; }
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
      --root-user-action=ignore --target "$site" "$wheels"/*.whl
    cd "$site" # the repository's own folder would hide the wheel
    PYTHONPATH=$site "$python" -m pixel_jax bench accelerator --out="$out" "$@"
    ;;
  -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
