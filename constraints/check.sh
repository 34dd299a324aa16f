#!/usr/bin/env bash
# Do the pinned versions fit together, and is there a wheel of each, for every Python and
# platform that we name?  Asks the package index by uv; installs nothing.
#
#   ./constraints/check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "error: needs uv: pip install uv" >&2; exit 2; }
export MACOSX_DEPLOYMENT_TARGET=14.0
failed=
for python in 3.11 3.12 3.13 3.14; do
  pins=constraints/py${python/./}.txt
  for platform in x86_64-manylinux_2_31 aarch64-manylinux_2_31 aarch64-apple-darwin; do
    extras="--extra test --extra gcs --extra synthesis --extra demo --extra docs"
    case "$platform" in x86_64-*) extras="$extras --extra tpu" ;; esac
    # promise, of tensorflow-datasets, is pure Python and comes as source only.
    if found=$(uv pip compile pyproject.toml $extras --quiet --no-header --no-annotate \
      --python-version "$python" --python-platform "$platform" --constraint "$pins" \
      --only-binary :all: --no-binary promise 2>&1); then
      loose=$(grep -vxFf "$pins" <<<"$found" | tr "\n" " ") || true
      echo "$python $platform: $(grep -c == <<<"$found") packages${loose:+, not pinned: $loose}"
      [ -z "$loose" ] || failed=1
    else
      echo "$python $platform: $found"; failed=1
    fi
  done
done
[ -z "$failed" ] || exit 1
