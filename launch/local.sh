#!/usr/bin/env bash
# A fresh machine -> venv, install, tiny world, base skills, SFT, curiosity-driven RL,
# evaluation, report.html.  What stands already is reused; a killed run continues.
#
#   ./launch/local.sh [WORKDIR]           the whole path, at most ten minutes on two cores
#   ./launch/local.sh --trap [WORKDIR]    also draws the learning trap: WORKDIR/trap.svg
#   ./launch/local.sh --full [WORKDIR]    with zooms into selected frames and traces that
#                                         correct themselves; at most 25 minutes
#   ./launch/local.sh --fast [WORKDIR]    a few steps of every stage: does it all run?
set -euo pipefail

fast= full= trap= workdir=
for argument in "$@"; do
  case "$argument" in
    --fast) fast=1 ;;
    --full) full=1 ;;
    --trap) trap=1 ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown option $argument; known: --fast --full --trap" >&2; exit 2 ;;
    *) workdir=$argument ;;
  esac
done
here=$(cd "$(dirname "$0")/.." && pwd)
default=$here/runs/$([ -n "$full" ] && echo full || echo tiny)${fast:+-fast}
workdir=$(realpath -m "${workdir:-$default}")
of=tiny${full:+,full}  # what the configs are asked for

source "$here/launch/install.sh"
export JAX_PLATFORMS=cpu
mkdir -p "$workdir"
started=$SECONDS

stage() {  # stage NAME command...: runs it and says how long it took
  local name=$1 began=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@"
  printf '== %s took %d s\n' "$name" $((SECONDS - began))
}
few=() ; test_few=()
if [ -n "$fast" ]; then
  few=(--config.total_steps=2 --config.eval_every=2 --config.optim.warmup_steps=1)
  test_few=(--config.data.tasks=16)
fi
rl_few=("${few[@]}")
[ -z "$fast" ] || rl_few+=(--config.rl.prompts_per_step=4 --config.eval.tasks=8)

stage "base skills" python -m pixel_jax.train_sft --config=configs/sft.py:$of,base \
  --workdir="$workdir/base" "${few[@]}"
stage "SFT" python -m pixel_jax.train_sft --config=configs/sft.py:$of \
  --workdir="$workdir/sft" --config.init="$workdir/base" "${few[@]}"
stage "RL with curiosity" python -m pixel_jax.train_rl --config=configs/rl.py:$of \
  --workdir="$workdir/rl" --config.init="$workdir/sft" "${rl_few[@]}"
stage "RL without curiosity" python -m pixel_jax.train_rl --config=configs/rl.py:$of \
  --workdir="$workdir/rl_alpha0" --config.init="$workdir/sft" --config.reward.alpha=0.0 \
  "${rl_few[@]}"
stage "evaluation" python -m pixel_jax.evaluate --config=configs/evaluate.py:$of \
  --workdir="$workdir/eval" "${test_few[@]}" \
  --config.policies="BASE=$workdir/base,SFT=$workdir/sft,RL=$workdir/rl,RL alpha=0=$workdir/rl_alpha0"
stage "report" python tools/view.py "$workdir" --out="$workdir/report.html" \
  ${trap:+--figure="$workdir/trap.svg"}
printf '\nAll of it took %d s. Open %s\n' $((SECONDS - started)) "$workdir/report.html"
