# Sourced by the launch scripts: usage, errors, dry runs.
# shellcheck shell=bash disable=SC2034,SC2154 # options are variables of the script that sources it

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
dry_run=0

# The comment at the head of a script is its usage text.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# need NAME: the option --NAME has to be set.
need() {
  [[ -n "${!1}" ]] || fail "--$1 is not set; see $(basename "$0") --help"
}

# number NAME: the option --NAME has to be a whole number of at least 1.
number() {
  [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || fail "--$1=${!1} is not a whole number of at least 1"
}

# shared NAME: the option --NAME has to be a folder that is the same on all machines.
shared() {
  [[ "${!1}" == /* || "${!1}" == *://* ]] ||
    fail "--$1=${!1} is relative: give the absolute path of a folder that all workers see"
}

# program NAME: has to be installed, unless nothing is to be run.
program() {
  ((dry_run)) || command -v "$1" >/dev/null || fail "$1 is not installed"
}

# quoted WORD...: as one line that a shell reads as the same words.
quoted() {
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

# run WORD...: runs a command, or prints it.
run() {
  if ((dry_run)); then quoted "$@"; else "$@"; fi
}

# Options of the form --name=value into variables of the names in `options`; what follows -- into
# the array `flags`.
parse() {
  flags=()
  while (($#)); do
    case "$1" in
      --help | -h) usage; exit 0 ;;
      --dry_run) dry_run=1 ;;
      --) shift; flags=("$@"); return ;;
      --*=*)
        local given=${1%%=*} # not a name that an option has
        given=${given#--}
        [[ " $options " == *" $given "* ]] || fail "--$given is unknown; known: ${options// /, }; flags of the run stand behind --"
        printf -v "$given" '%s' "${1#*=}"
        ;;
      *) fail "$1 is no option: write --name=value, and flags of the run after --" ;;
    esac
    shift
  done
}

# The command that every process of the run executes, into the array `train`.
training_command() {
  need flagfile
  need workdir
  flagfile=${flagfile#"$ROOT/"}
  [[ -f "$ROOT/$flagfile" && "$flagfile" != /* && "/$flagfile/" != */../* ]] ||
    fail "--flagfile=$flagfile: no such file in $ROOT"
  [[ "$workdir" != *://* ]] ||
    fail "--workdir=$workdir: URLs are not read; mount the bucket everywhere and give its folder"
  train=("$1" -m genai_jax.train "--flagfile=$flagfile" "--workdir=$workdir" "${flags[@]}")
}
