#!/usr/bin/env bash
# A fresh machine -> venv, install, SFT from the tiny base that ships with the package,
# curiosity-driven RL beside RL without curiosity, evaluation, report.html.  What stands
# already is reused; a killed run continues.
#
#   ./launch/local.sh [WORKDIR]           the whole path on two cores
#   ./launch/local.sh --scratch [WORKDIR] trains the base, too
#   ./launch/local.sh --trap [WORKDIR]    also draws the learning trap: WORKDIR/trap.svg
#   ./launch/local.sh --full [WORKDIR]    with zooms into selected frames and traces that
#                                         correct themselves, from a base of its own
#   ./launch/local.sh --fast [WORKDIR]    a few steps of every stage: does it all run?
#   ./launch/local.sh --processes 2       SFT and RL as 2 or 4 processes, joined as the
#                                         hosts of a pod; again with another number: goes on
#
# SIGTERM (and Ctrl-C) saves; the same command goes on.
set -euo pipefail

fast= full= scratch= trap= workdir= processes=1
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) fast=1 ;;
    --full) full=1 ;;
    --scratch) scratch=1 ;;
    --trap) trap=1 ;;
    --processes) processes=${2:-}; shift ;;
    --processes=*) processes=${1#*=} ;;
    -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown option $1; known: --fast --full --scratch --trap --processes N" >&2; exit 2 ;;
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
workdir=${workdir:-$default}
case "$workdir" in /*) ;; *) workdir=$PWD/$workdir ;; esac  # install.sh goes elsewhere
of=tiny${full:+,full}  # what the configs are asked for

source "$here/launch/install.sh"
export JAX_PLATFORMS=cpu
mkdir -p "$workdir"
started=$SECONDS
cores=$(python -c 'import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')

# Signals end a wait, not the stage: it is told, and waited for again.
set -m
running= stopping=
tell() { local pid; for pid in $running; do kill -TERM "$pid" 2>/dev/null || true; done; }
trap 'stopping=1; tell' TERM INT
stage() {  # stage NAME command...: runs it and says how long it took
  local name=$1
  shift
  begin "$name"
  "$@" &
  running=$!
  finish "$name"
}
beside() {  # beside NAME function function: both at once, their lines marked
  local name=$1 each
  shift
  begin "$name"
  for each in "$@"; do
    "$each" > >(marked "$each") 2>&1 &
    running="$running $!"
  done
  finish "$name"
}
marked() {  # marked NAME: line by line; Debian's awk would wait for 4 KB of them
  local line
  while IFS= read -r line; do printf '%s: %s\n' "$1" "$line"; done
}
begin() {
  [ -z "$stopping" ] || exit 0
  printf '\n== %s\n' "$1"
  began=$SECONDS
}
finish() {  # finish NAME: waits for all of $running; if one fails, the others are stopped
  local pid left code failed=0
  while [ -n "$running" ]; do
    sleep 0.5 &
    wait $! || true  # a signal ends this wait
    left=
    for pid in $running; do
      if kill -0 "$pid" 2>/dev/null; then
        left="$left $pid"
        continue
      fi
      code=0
      wait "$pid" || code=$?
      [ "$code" = 0 ] || [ "$failed" != 0 ] || { failed=$code; tell; }
    done
    running=$left
  done
  [ "$failed" = 0 ] || exit "$failed"
  if [ -n "$stopping" ]; then
    printf '\nStopped; the same command goes on.\n'
    exit 0
  fi
  printf '== %s took %d s\n' "$1" $((SECONDS - began))
  printf '%d\t%s\n' $((SECONDS - began)) "$1" >>"$workdir/times.tsv"
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
evaluate() {  # evaluate flags...: each of two processes plays half of the questions
  set -- python -m pixel_jax.evaluate --workdir="$workdir/eval" "$@"
  if [ "$cores" -lt 2 ]; then
    exec "$@"
  fi
  exec python launch/processes.py 2 "$workdir/eval/logs" "$@"
}
few=() ; test_few=()
if [ -n "$fast" ]; then
  few=(--config.total_steps=2 --config.eval_every=2 --config.optim.warmup_steps=1)
  test_few=(--config.data.tasks=16)
fi
rl_few=(${few[@]+"${few[@]}"})
[ -z "$fast" ] || rl_few+=(--config.rl.prompts_per_step=4 --config.eval.tasks=8)

base=tiny_base  # the one in the package
if [ -n "$scratch$full" ]; then
  base=$workdir/base
  stage "base skills" train train_sft base --config=configs/sft.py:$of,base ${few[@]+"${few[@]}"}
fi
stage "SFT" train train_sft sft --config=configs/sft.py:$of \
  --config.init="$base" ${few[@]+"${few[@]}"}
rl() { train train_rl "$1" --config=configs/rl.py:$of --config.init="$workdir/sft" \
  --config.reward.alpha="$2" ${rl_few[@]+"${rl_few[@]}"}; }
curiosity() { rl rl 0.5; }
alpha_0() {  # behind the first step of the other arm, whose programs it takes from the cache
  trap 'exit 0' TERM
  while [ ! -s "$workdir/rl/metrics.jsonl" ]; do sleep 0.5; done
  trap - TERM
  rl rl_alpha0 0.0
}
if [ "$processes" = 1 ] && [ "$cores" -ge 2 ]; then
  beside "RL with curiosity and without" curiosity alpha_0
else
  stage "RL with curiosity" curiosity
  stage "RL without curiosity" alpha_0
fi
stage "evaluation" evaluate --config=configs/evaluate.py:$of ${test_few[@]+"${test_few[@]}"} \
  --config.policies="BASE=$base,SFT=$workdir/sft,RL=$workdir/rl,RL alpha=0=$workdir/rl_alpha0"
stage "report" pixel-jax view "$workdir" --out="$workdir/report.html" \
  ${trap:+--figure="$workdir/trap.svg"}
printf '\nAll of it took %d s. Open %s\n' $((SECONDS - started)) "$workdir/report.html"
