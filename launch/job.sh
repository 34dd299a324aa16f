# Sourced by tpu_vm.sh, gke.sh and slurm.sbatch: the command line, the code that is sent
# and the secrets.  `run` is what a dry run prints instead.

dry_run=
module=           # train_sft, train_rl or evaluate
arguments=()      # of the module
workdir=
SECRETS_KNOWN="WANDB_API_KEY HF_TOKEN OPENAI_API_KEY"

fail() { echo "error: $*" >&2; exit 2; }

quote() {  # its arguments as one line that a shell takes back
  local word line= tick="'\\''"  # the bash of a Mac, 3.2, has no ${word@Q}
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$tick}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

run() {  # runs a command; in a dry run prints it
  if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

take_module() {  # MODULE --config=... --workdir=... [--config.KEY=VALUE ...]
  local word
  case "${1:-}" in
    train_sft | train_rl | evaluate) module=$1 ;;
    *) fail "${1:+unknown option or module $1; }options come first, then train_sft, train_rl or evaluate with its arguments (--help)" ;;
  esac
  shift
  arguments=("$@")
  for word in "$@"; do
    case "$word" in
      --workdir=*) workdir=${word#--workdir=} ;;
      --config=*) config=${word#--config=} ;;
    esac
  done
  [ -n "${config:-}" ] || fail "$module wants --config=configs/NAME.py:SIZE"
  [ -n "$workdir" ] || fail "$module wants --workdir=gs://BUCKET/RUN"
  local file=${config%%:*} kinds
  if [ ! -f "$file" ] && [ ! -f "configs/$file.py" ]; then
    kinds=$(cd configs && printf '%s ' [!_]*.py)
    fail "--config=$config: $PWD has no file $file; there are configs/ ${kinds% }"
  fi
}

check_accelerator() {  # that of a preset for a topology is the one that is asked for
  local word made
  for word in $(printf '%s' "${config#*:}" | tr , ' '); do
    made=$(sed -n "s/^ *\"$word\": Pod(\"\([^\"]*\)\".*/\1/p" configs/pods.py)
    if [ -n "$made" ] && [ -n "$accelerator" ] && [ "$made" != "$accelerator" ]; then
      fail "--accelerator=$accelerator, and $config is laid out for $made"
    fi
  done
}

take_bucket() {  # the workers share no disk
  [[ $workdir == gs://*/* ]] || fail "--workdir=$workdir: the workers share no disk; give gs://BUCKET/RUN"
}

take_names() {  # checks --name and --slices; box: the folder of what is sent
  [[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "--name=$name: lower-case letters, digits and -"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices: a number of slices"
  box=${XDG_CACHE_HOME:-$HOME/.cache}/pixel_jax/$name
}

find_code() {  # tree: the id of the tracked files as they stand, changes included
  local commit
  commit=$(git -c user.name=launch -c user.email=launch stash create 2>/dev/null) || true
  tree=$(git rev-parse --short=12 "${commit:-HEAD}^{tree}") || fail "$PWD is no git checkout: the tracked files are what is sent"
}

secrets() {  # the names of those that are set
  local name
  for name in $SECRETS_KNOWN; do [ -z "${!name:-}" ] || echo "$name"; done
}
