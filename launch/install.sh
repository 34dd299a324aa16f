# Sourced by the launchers: a venv beside the code with the pinned dependencies.
#   EXTRAS="[test]" source launch/install.sh
# PYTHON chooses the interpreter (3.11 to 3.14); VENV the folder.  Installing again is
# skipped while pyproject.toml and the constraint file are unchanged.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fits() {  # whether "$1" is a Python we are tested on, with venv (Debian packs it apart)
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    if fits "$PYTHON"; then echo "$PYTHON"; return; fi
    echo "error: PYTHON=$PYTHON is no Python 3.11, 3.12, 3.13 or 3.14 with venv" >&2
    return 1
  fi
  for candidate in python3.11 python3 python3.12 python3.13 python3.14; do
    if fits "$candidate"; then echo "$candidate"; return; fi
  done
  if command -v uv >/dev/null; then
    uv python install --quiet 3.12 && uv python find 3.12 && return
  fi
  echo "error: no Python 3.11 to 3.14 with venv was found.  Get one by \`pip install uv && uv python install 3.12\`, or name one: PYTHON=/path/to/python3.12 $0" >&2
  return 1
}

VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-}
python=$(find_python)
version=$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
stamp="$VENV/.installed-$version-$(cat pyproject.toml "constraints/$version.txt" | cksum | cut -d' ' -f1)"
stamp="$stamp${EXTRAS//[^a-z]/-}"
if [ -x "$VENV/bin/python" ] && ! "$VENV/bin/python" -c "import sys; sys.exit('py%d%d' % sys.version_info[:2] != '$version')"; then
  echo "error: $VENV holds another Python than $python; name another folder: VENV=.venv-$version $0" >&2
  exit 1
fi
if ! compgen -G "$stamp*" >/dev/null; then
  started=$SECONDS
  echo "Installing pixel_jax$EXTRAS into $VENV (Python ${version#py}, pinned by constraints/$version.txt) ..."
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  what=(--editable ".$EXTRAS" --constraint "constraints/$version.txt")
  # uv takes a fifth of pip's time.  It knows neither pip.conf nor local builds of torch,
  # whose default has gigabytes of CUDA; where it fails, pip may still succeed.
  case "$EXTRAS" in *parity*) uv=false ;; *) uv=$(command -v uv || true) ;; esac
  if [ -z "$uv" ]; then
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv && uv=$VENV/bin/uv || uv=false
  fi
  "$uv" pip install --quiet --python "$VENV/bin/python" "${what[@]}" ||
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${what[@]}"
  touch "$stamp"
  echo "Installed in $((SECONDS - started)) s."
fi
case "$VENV" in /*) ;; *) VENV=$PWD/$VENV ;; esac
export PATH="$VENV/bin:$PATH"
# XLA gives its buffers back after every call.  With huge pages that costs 3,000 page
# faults a step of base training instead of 55,000, and a step takes 14 % less time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
