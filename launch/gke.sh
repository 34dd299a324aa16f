#!/usr/bin/env bash
# Runs a program on TPU slices of a GKE cluster, by XPK (pip install xpk, 1.16 or later).
#
#   ./launch/gke.sh --name=NAME --cluster=C --accelerator=v5p-128 [options] \
#     MODULE --config=... --workdir=gs://BUCKET/RUN
#
# MODULE is train_sft, train_rl or evaluate.  Options:
#   --name=NAME           of the workload
#   --cluster=C           made by `xpk cluster create`
#   --zone=Z --project=P  as xpk takes them
#   --accelerator=TYPE    as docs/pods.md names it
#   --slices=N            of this accelerator, data parallel across slices
#   --image=IMAGE         with Python 3.11 or 3.12; python:3.12
#   --dry-run             prints what would be executed, and does nothing
#
# XPK adds the tracked files as they stand to the image.  A workload that was preempted is
# started again and goes on from its last checkpoint; logs go to WORKDIR/logs too.
# WANDB_API_KEY, HF_TOKEN and OPENAI_API_KEY go by name, never on a command line, but into
# the workload's manifest: who may read pods of the cluster can read them, and
# `xpk --dry-run` prints them.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/job.sh

name= cluster= accelerator= slices=1 image=python:3.12 where=()
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,23s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) break ;;
  esac
  shift
done
take_module "$@"
take_bucket
take_names
[ -n "$cluster" ] || fail "--cluster=NAME is missing: xpk cluster list"
[ -n "$accelerator" ] || fail "--accelerator=TYPE is missing, such as v5p-128"
check_accelerator

find_code
[ -n "$dry_run" ] || { rm -rf "$box"; mkdir -p "$box/code"; }
run git archive --output="$box/code.tar" "$tree"
run tar -xf "$box/code.tar" -C "$box/code"
# Names without values: xpk takes those from this environment.
if [ -n "$dry_run" ]; then
  for s in $(secrets); do echo "# $box/env: $s"; done
else
  secrets >"$box/env"
fi
# exec: xpk sends SIGTERM to the shell that its command begins with, and that must be ours.
# One container a host, as everywhere: on tpu7x xpk would start two.
run xpk workload create --workload="$name" --cluster="$cluster" ${where[@]+"${where[@]}"} \
  --tpu-type="$accelerator" --num-slices="$slices" --no-use-parallel-containers \
  --base-docker-image="$image" --script-dir="$box/code" --env-file="$box/env" \
  --max-restarts=1000 --termination-grace-period-seconds=600 \
  --command="export EXTRAS=[tpu,gcs]; exec launch/worker.sh $(quote "$module" "${arguments[@]}")"
[ -n "$dry_run" ] || echo "in $workdir: metrics.jsonl, checkpoints/, logs/"
