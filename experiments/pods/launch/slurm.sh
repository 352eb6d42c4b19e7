#!/usr/bin/env bash
# Trains on NVIDIA GPUs of a SLURM cluster by submitting slurm.sbatch. The repository and its .venv
# (pip install -e ".[cuda,text]") have to be on a file system that all nodes can access.
#
#   slurm.sh --nodes=N --flagfile=FILE --workdir=FOLDER [options] [-- FLAGS...]
#
#   --nodes            number of nodes
#   --gpus_per_node=8  number of GPUs per node
#   --processes=gpu    one process per GPU; or "node": one process per node, with all of its GPUs
#   --flagfile         flagfile in this repository
#   --workdir          folder that all nodes can access
#   --time=24:00:00    time limit; ten minutes earlier, the job saves a checkpoint and is requeued
#   --partition, --account, --qos    passed on to sbatch
#   --python=.venv/bin/python        path relative to the repository, or absolute
#   --dry_run          print the command without running it
#   -- FLAGS           additional flags of genai_jax.train
#
# The processes find each other through SLURM's environment variables. When preempted, at the time
# limit, or after "scancel --signal=TERM JOB", the job saves a checkpoint, is requeued and resumes by
# itself; "scancel JOB" ends it.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes='' gpus_per_node=8 processes=gpu flagfile='' workdir='' time=24:00:00 python=.venv/bin/python
# shellcheck disable=SC2034 # read through their names
partition='' account='' qos=''
options='nodes gpus_per_node processes flagfile workdir time partition account qos python'
parse "$@"

need nodes
number nodes
number gpus_per_node
training_command "$python"
case "$processes" in
  gpu) tasks=$gpus_per_node ;;
  node) tasks=1 ;;
  *) fail "--processes=$processes is not one of gpu, node" ;;
esac
submit=(
  sbatch "--job-name=$(basename "$flagfile" .flags)" "--chdir=$ROOT" "--nodes=$nodes"
  "--gpus-per-node=$gpus_per_node" "--ntasks-per-node=$tasks" "--time=$time"
)
for option in partition account qos; do
  [[ -z "${!option}" ]] || submit+=("--$option=${!option}")
done
program sbatch
run "${submit[@]}" "$ROOT/experiments/pods/launch/slurm.sbatch" "${train[@]}"
