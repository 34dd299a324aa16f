#!/usr/bin/env bash
# What each worker of a pod runs, whoever starts it (tpu_vm.sh, gke.sh, slurm.sbatch):
# installs, runs the program, and keeps its output in WORKDIR/logs.
#
#   EXTRAS=[tpu,gcs] launch/worker.sh train_rl --config=... --workdir=gs://bucket/run
#
# SECRETS names a file of NAME=value lines: it is read, removed and never shown.
# Exit code: the program's; 143 after a SIGTERM.  The program saves and ends with 0 then,
# which a scheduler would take for the end of the run.
# Started twice for one workdir on one machine, the second follows the first.
set -euo pipefail
cd "$(dirname "$0")/.."

module=$1; shift
for word in "$@"; do
  case "$word" in --workdir=*) workdir=${word#--workdir=} ;; esac
done
: "${workdir:?--workdir=... is missing}"
if [ -f "${SECRETS:-}" ]; then
  set -a; source "$SECRETS"; set +a
  rm -f "$SECRETS"
fi

# ---- One run for a workdir and a machine ----------------------------------------------
state=${TMPDIR:-/tmp}/pixel_jax-$(id -u)/$(printf %s "$workdir" | cksum | cut -d" " -f1)
mkdir -p "$state" && chmod 700 "$state"
log=$state/log
exec 9>"$state/lock"
if ! flock --nonblock 9; then
  echo "This run is under way here; following it."
  tail --lines=20 --pid="$(cat "$state/pid")" --follow=name "$log" || true
  flock 9
  exit "$(cat "$state/code")"
fi
echo 1 >"$state/code"

# ---- Python ---------------------------------------------------------------------------
if ! command -v uv >/dev/null; then  # gets a Python where there is none that fits: the
  python3 -m pip install --quiet --user uv || true  # images of TPU VMs have Python 3.10
  export PATH="$PATH:$HOME/.local/bin"
fi
EXTRAS=${EXTRAS:-} source launch/install.sh

# ---- Who the others are -----------------------------------------------------------------
# TPUs know it from the metadata server or from GKE.  Of SLURM jax would take one GPU a
# process (its SLURM_LOCALID), and there is one process a node: all of its GPUs are named.
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")  # a line each
  export JAX_COORDINATOR_ADDRESS=${nodes%%$'\n'*}:$((61440 + SLURM_JOB_ID % 4096))
  export JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID
  export JAX_LOCAL_DEVICE_IDS
  JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((${SLURM_GPUS_ON_NODE:?ask for GPUs: --gpus-per-node} - 1)))
fi
# Of a GPU jax takes 75 % unless told.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}

# ---- Run --------------------------------------------------------------------------------
name=$(hostname)-$(date -u +%Y%m%dT%H%M%S).log
keep_log() {
  python - "$log" "$workdir/logs/$name" <<'PY' || echo "the log could not be written to $workdir/logs" >&2
import sys
from etils import epath
source, target = epath.Path(sys.argv[1]), epath.Path(sys.argv[2])
target.parent.mkdir(parents=True, exist_ok=True)
target.write_bytes(source.read_bytes())
PY
}
: >"$log"
# Into a file, not a pipe: the program must outlive whoever reads its output.
PYTHONUNBUFFERED=1 python -m "pixel_jax.$module" "$@" >>"$log" 2>&1 9>&- &
program=$!
echo "$program" >"$state/pid"
told= code=0
trap 'told=1; kill -TERM "$program" 2>/dev/null || true' TERM INT
trap '' HUP PIPE
tail --lines=+1 --pid="$program" --follow=name "$log" 9>&- &
teller=$!
# Every minute: what was said last before a machine dies is worth having.
while sleep 60; do keep_log; done >/dev/null 2>&1 9>&- &
keeper=$!

while :; do  # a signal ends `wait` early
  wait "$program" && code=0 || code=$?
  kill -0 "$program" 2>/dev/null || break
done
kill "$keeper" 2>/dev/null || true
wait "$teller" 2>/dev/null || true
[ -z "$told" ] || { echo "Told to stop: the program ended with $code." | tee -a "$log" || true; code=143; }
echo "$code" >"$state/code"
keep_log
exit "$code"
