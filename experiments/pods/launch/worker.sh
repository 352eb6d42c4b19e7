#!/usr/bin/env bash
# Run by tpu_vm.sh on every worker of a slice, in the worker's copy of the repository:
#
#   worker.sh setup            creates .venv with the packages for TPUs
#   worker.sh train FLAGS...   starts or resumes training, shows its output, exits with its exit code
#   worker.sh follow           shows the output of training that is already running
#   worker.sh stop             makes training save a checkpoint and exit
#
# Training continues if the connection is lost; its output is in train.log.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

running() {
  [[ -f train.pid ]] && kill -0 "$(cat train.pid)" 2>/dev/null
}

setup() {
  # The system's Python may be older than 3.11; uv installs its own.
  python3 -m pip install --quiet --user --upgrade uv
  [[ -x .venv/bin/python ]] || python3 -m uv venv --quiet --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[tpu,text]"
}

train() {
  if running; then
    echo "error: training is already running as process $(cat train.pid): follow or stop it" >&2
    exit 2
  fi
  rm -f train.code train.pid
  # In a new session, which outlives this one.
  # shellcheck disable=SC2016
  setsid bash -c '
    "$@" & echo $! >train.pid
    code=0; wait $! || code=$?
    echo $code >train.code
  ' train .venv/bin/python -m genai_jax.train "$@" </dev/null >train.log 2>&1 &
  until [[ -f train.pid ]]; do sleep 0.1; done
  follow
}

follow() {
  [[ -f train.pid ]] || { echo "error: no training was started here" >&2; exit 2; }
  tail --pid="$(cat train.pid)" --lines=+1 --follow train.log
  until [[ -f train.code ]]; do sleep 0.1; done
  exit "$(cat train.code)"
}

stop() {
  if running; then kill -TERM "$(cat train.pid)"; fi
}

case "${1:-}" in
  setup | train | follow | stop) "$@" ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
