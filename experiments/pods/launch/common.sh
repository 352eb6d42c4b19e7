# Sourced by the launch scripts: usage, errors, dry runs.
# shellcheck shell=bash disable=SC2034,SC2154 # options are variables of the sourcing script

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
dry_run=0

# The comment at the top of a script is its usage text.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# need NAME: requires the option --NAME.
need() {
  [[ -n "${!1}" ]] || fail "--$1 is not set; see $(basename "$0") --help"
}

# number NAME: requires the option --NAME to be a whole number of at least 1.
number() {
  [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || fail "--$1=${!1} is not a whole number of at least 1"
}

# shared NAME: requires the option --NAME to be an absolute path, the same on all machines.
shared() {
  [[ "${!1}" == /* || "${!1}" == *://* ]] ||
    fail "--$1=${!1} is relative: give the absolute path of a folder that all workers can access"
}

# program NAME: requires the program to be installed, except in a dry run.
program() {
  ((dry_run)) || command -v "$1" >/dev/null || fail "$1 is not installed"
}

# quoted WORD...: prints the words as one line, quoted for the shell.
quoted() {
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

# run WORD...: runs a command, or prints it.
run() {
  if ((dry_run)); then quoted "$@"; else "$@"; fi
}

# parse WORD...: sets a variable for each option --name=value whose name is in `options`, and the
# array `flags` to the words after --.
parse() {
  flags=()
  while (($#)); do
    case "$1" in
      --help | -h) usage; exit 0 ;;
      --dry_run) dry_run=1 ;;
      --) shift; flags=("$@"); return ;;
      --*=*)
        local given=${1%%=*} # must not be the name of an option
        given=${given#--}
        [[ " $options " == *" $given "* ]] || fail "--$given is unknown; the options are ${options// /, }; flags of the run go after --"
        printf -v "$given" '%s' "${1#*=}"
        ;;
      *) fail "$1 is not an option: write --name=value, and put flags of the run after --" ;;
    esac
    shift
  done
}

# training_command PYTHON: sets the array `train` to the command of every process of the run.
training_command() {
  need flagfile
  need workdir
  flagfile=${flagfile#"$ROOT/"}
  [[ -f "$ROOT/$flagfile" && "$flagfile" != /* && "/$flagfile/" != */../* ]] ||
    fail "--flagfile=$flagfile: no such file in $ROOT"
  [[ "$workdir" != *://* ]] ||
    fail "--workdir=$workdir: URLs are not supported; mount the bucket on all machines and give its path"
  train=("$1" -m genai_jax.train "--flagfile=$flagfile" "--workdir=$workdir" "${flags[@]}")
}
