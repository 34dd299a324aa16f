#!/usr/bin/env bash
# Runs a program on every worker of a TPU VM, or of a queued resource, by gcloud.
#
#   ./launch/tpu_vm.sh --name=NAME [options] MODULE --config=... --workdir=gs://BUCKET/RUN
#
# MODULE is train_sft, train_rl or evaluate.  Options:
#   --name=NAME           the TPU VM; with --accelerator the queued resource
#   --zone=Z --project=P  as gcloud takes them
#   --accelerator=v5p-128 queues for it where NAME does not exist, waits, and queues again
#                         when it was preempted; the run goes on from its last checkpoint
#   --slices=N            of this accelerator, data parallel across slices
#   --spot                cheaper, preemptible
#   --runtime=VERSION     the image of the VMs, where the default for the accelerator is old
#   --dry-run             prints what would be executed, and does nothing
#
# The tracked files as they stand are copied to every worker; logs go to WORKDIR/logs.
# WANDB_API_KEY, HF_TOKEN and OPENAI_API_KEY are copied as a file that only you can read.
# Where the connection is lost the run goes on: the same command follows it again.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/job.sh

name= accelerator= slices=1 spot= runtime= where=()
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --runtime=*) runtime=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) break ;;
  esac
  shift
done
take_module "$@"
take_bucket
take_names
check_accelerator
[ -n "$accelerator" ] || [ "$slices" = 1 ] || fail "--slices wants --accelerator"
case "$accelerator" in  # as the cloud names its images, November 2026
  v5litepod-*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
  v5p-*) : "${runtime:=v2-alpha-tpuv5}" ;;
  v6e-*) : "${runtime:=v2-alpha-tpuv6e}" ;;
  tpu7x-*) : "${runtime:=v2-alpha-tpu7-ubuntu2404}" ;;
  "") ;;
  *) [ -n "$runtime" ] || fail "--accelerator=$accelerator wants --runtime=VERSION" ;;
esac

if [ -n "$accelerator" ]; then
  tpu=(gcloud compute tpus queued-resources)
  every=(--node=all --worker=all)
  nodes=(--node-id="$name")
  [ "$slices" = 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
else
  tpu=(gcloud compute tpus tpu-vm)
  every=(--worker=all)
fi

queue() {
  run "${tpu[@]}" create "$name" ${where[@]+"${where[@]}"} "${nodes[@]}" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${spot:+--spot}
}

ask() {  # state: what the queued resource says of itself; nothing where there is none
  state=$("${tpu[@]}" describe "$name" ${where[@]+"${where[@]}"} "--format=value(state.state)" 2>/dev/null) || state=
}

await() {  # until it can be used
  if [ -n "$dry_run" ]; then
    queue
    run "${tpu[@]}" describe "$name" ${where[@]+"${where[@]}"} "--format=value(state.state)"
    return
  fi
  local told=
  while ask; do
    case "$state" in
      ACTIVE) return ;;
      "") queue ;;
      SUSPENDED | FAILED)
        "${tpu[@]}" delete "$name" ${where[@]+"${where[@]}"} --force --quiet
        queue ;;
      *)
        [ "$state" = "$told" ] || echo "$name: $state; waiting"
        told=$state
        sleep "${PIXEL_JAX_POLL:-30}" ;;
    esac
  done
}

find_code
if [ -z "$dry_run" ]; then
  (umask 077; mkdir -p "$box")
  trap 'rm -f "$box/secrets.env"' EXIT
  (umask 077; for s in $(secrets); do printf '%s=%q\n' "$s" "${!s}"; done >"$box/secrets.env")
else
  for s in $(secrets); do echo "# $box/secrets.env: $s=***"; done
fi
run git archive --format=tar.gz --output="$box/code.tar.gz" "$tree"

there=pixel_jax/$tree
remote="mkdir -p $there && tar -xzf code.tar.gz -C $there && cd $there &&"
# The workers of a TPU VM are listed by its metadata server alone: auto asks it.
remote+=" SECRETS=~/secrets.env PIXEL_JAX_DISTRIBUTED=auto EXTRAS=[tpu,gcs] VENV=../venv"
remote+=" exec launch/worker.sh $(quote "$module" "${arguments[@]}")"

while :; do
  [ -z "$accelerator" ] || await
  run "${tpu[@]}" scp "$box/code.tar.gz" "$box/secrets.env" "$name:" ${where[@]+"${where[@]}"} "${every[@]}" &&
    run "${tpu[@]}" ssh "$name" ${where[@]+"${where[@]}"} "${every[@]}" --command="$remote" && code=0 || code=$?
  [ "$code" != 0 ] || break
  [ -n "$accelerator" ] || exit "$code"
  sleep "${PIXEL_JAX_POLL:-30}"  # a machine that is being taken away is ACTIVE a while
  ask
  case "$state $code" in
    "ACTIVE 143") echo "$name: a machine was told to stop; going on" ;;
    "ACTIVE 255") echo "$name: the connection was lost; following again" ;;
    "ACTIVE "*)
      echo "error: the run ended with $code; its logs are in $workdir/logs" >&2
      exit "$code" ;;
    *) echo "$name was taken away (${state:-gone}); queueing again" ;;
  esac
done
[ -n "$dry_run" ] || echo "in $workdir: metrics.jsonl, checkpoints/, logs/"
