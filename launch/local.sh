#!/usr/bin/env bash
# A fresh machine -> venv, install, tiny world, base skills, SFT, curiosity-driven RL,
# evaluation, report.html.  What stands already is reused; a killed run continues.
#
#   ./launch/local.sh [WORKDIR]           the whole path, at most ten minutes on two cores
#   ./launch/local.sh --trap [WORKDIR]    also draws the learning trap: WORKDIR/trap.svg
#   ./launch/local.sh --full [WORKDIR]    with zooms into selected frames and traces that
#                                         correct themselves; at most 25 minutes
#   ./launch/local.sh --fast [WORKDIR]    a few steps of every stage: does it all run?
#   ./launch/local.sh --processes 2       SFT and RL as 2 or 4 processes, joined as the
#                                         hosts of a pod; again with another number: goes on
#
# SIGTERM (and Ctrl-C) saves; the same command goes on.
set -euo pipefail

fast= full= trap= workdir= processes=1
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) fast=1 ;;
    --full) full=1 ;;
    --trap) trap=1 ;;
    --processes) processes=${2:-}; shift ;;
    --processes=*) processes=${1#*=} ;;
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown option $1; known: --fast --full --trap --processes N" >&2; exit 2 ;;
    *) workdir=$1 ;;
  esac
  [ $# -eq 0 ] || shift
done
case "$processes" in
  1 | 2 | 4) ;;  # the data of the tiny world has four shards
  *) echo "--processes is ${processes:-missing}; expected 1, 2 or 4" >&2; exit 2 ;;
esac
here=$(cd "$(dirname "$0")/.." && pwd)
default=$here/runs/$([ -n "$full" ] && echo full || echo tiny)${fast:+-fast}
workdir=$(realpath -m "${workdir:-$default}")
of=tiny${full:+,full}  # what the configs are asked for

source "$here/launch/install.sh"
export JAX_PLATFORMS=cpu
mkdir -p "$workdir"
started=$SECONDS

# Signals end a wait, not the stage: it is told, and waited for again.
set -m
running= stopping=
trap 'stopping=1; [ -z "$running" ] || kill -TERM "$running" 2>/dev/null || true' TERM INT
stage() {  # stage NAME command...: runs it and says how long it took
  local name=$1 began=$SECONDS code
  shift
  [ -z "$stopping" ] || exit 0
  printf '\n== %s\n' "$name"
  "$@" &
  running=$!
  while :; do
    code=0
    wait "$running" || code=$?
    kill -0 "$running" 2>/dev/null || break
  done
  running=
  [ "$code" = 0 ] || exit "$code"
  if [ -n "$stopping" ]; then
    printf '\nStopped; the same command goes on.\n'
    exit 0
  fi
  printf '== %s took %d s\n' "$name" $((SECONDS - began))
}
train() {  # train MODULE NAME flags...: in as many processes as were asked for
  local module=$1 name=$2
  shift 2
  # One device each; with a single process the same mesh as the config's own.
  set -- python -m "pixel_jax.$module" --workdir="$workdir/$name" "$@" --config.mesh.data=-1
  if [ "$processes" = 1 ]; then
    exec "$@"
  fi
  exec python launch/processes.py "$processes" "$workdir/$name/logs" "$@"
}
few=() ; test_few=()
if [ -n "$fast" ]; then
  few=(--config.total_steps=2 --config.eval_every=2 --config.optim.warmup_steps=1)
  test_few=(--config.data.tasks=16)
fi
rl_few=("${few[@]}")
[ -z "$fast" ] || rl_few+=(--config.rl.prompts_per_step=4 --config.eval.tasks=8)

stage "base skills" train train_sft base --config=configs/sft.py:$of,base "${few[@]}"
stage "SFT" train train_sft sft --config=configs/sft.py:$of \
  --config.init="$workdir/base" "${few[@]}"
stage "RL with curiosity" train train_rl rl --config=configs/rl.py:$of \
  --config.init="$workdir/sft" "${rl_few[@]}"
stage "RL without curiosity" train train_rl rl_alpha0 --config=configs/rl.py:$of \
  --config.init="$workdir/sft" --config.reward.alpha=0.0 "${rl_few[@]}"
stage "evaluation" python -m pixel_jax.evaluate --config=configs/evaluate.py:$of \
  --workdir="$workdir/eval" "${test_few[@]}" \
  --config.policies="BASE=$workdir/base,SFT=$workdir/sft,RL=$workdir/rl,RL alpha=0=$workdir/rl_alpha0"
stage "report" pixel-jax view "$workdir" --out="$workdir/report.html" \
  ${trap:+--figure="$workdir/trap.svg"}
printf '\nAll of it took %d s. Open %s\n' $((SECONDS - started)) "$workdir/report.html"
