#!/usr/bin/env bash
# Trains on NVIDIA GPUs of a SLURM cluster: submits slurm.sbatch, from a repository with its .venv
# (pip install -e ".[cuda,text]") on a file system that all nodes see.
#
#   slurm.sh --nodes=N --flagfile=FILE --workdir=FOLDER [options] [-- FLAGS...]
#
#   --nodes            of the job
#   --gpus_per_node=8
#   --processes=gpu    one process a GPU; or "node": one process a node, with all GPUs of it
#   --flagfile         in this repository
#   --workdir          a folder that all nodes see
#   --time=24:00:00    limit; ten minutes before it a checkpoint is saved and the job queued again
#   --partition, --account, --qos
#   --python=.venv/bin/python   relative to the repository, or absolute
#   --dry_run          prints the command
#   -- FLAGS           further flags of genai_jax.train
#
# The processes find each other by SLURM's environment. After a preemption, at its limit, or after
# "scancel --signal=TERM JOB" the job saves a checkpoint, is queued again and goes on by itself;
# "scancel JOB" ends it.

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes='' gpus_per_node=8 processes=gpu flagfile='' workdir='' time=24:00:00 python=.venv/bin/python
# shellcheck disable=SC2034 # read by their names
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
  *) fail "--processes=$processes is none of gpu, node" ;;
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
