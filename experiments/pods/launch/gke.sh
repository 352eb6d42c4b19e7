#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as an xpk workload (pip install xpk).
#
#   gke.sh --cluster=NAME --image=IMAGE --flagfile=FILE --workdir=FOLDER [options] [-- FLAGS...]
#
#   --cluster          cluster created by "xpk cluster create"
#   --zone, --project  of the cluster; gcloud's defaults if unset
#   --image            container image of this repository: see the Dockerfile in this folder
#   --flagfile         flagfile in this repository; its line "# topology:" names the slice
#   --workdir          folder that all workers can access: a volume from "xpk storage attach"
#   --workload=NAME    name of the job; flagfile name and date if unset
#   --tpu_type=TYPE    xpk's name of the slice, e.g. v6e-256; taken from the flagfile if unset
#   --num_slices=1     number of slices, linked by the data-center network; see --mesh.across_slices
#   --max_restarts=10  maximum number of restarts after failures or preemptions
#   --grace=300        seconds for saving a checkpoint when preempted
#   --dry_run          print the command without running it
#   -- FLAGS           additional flags of genai_jax.train

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster='' image='' flagfile='' workdir='' workload='' tpu_type='' zone='' project=''
num_slices=1 max_restarts=10 grace=300
options='cluster image flagfile workdir workload tpu_type num_slices max_restarts grace zone project'
parse "$@"

# type_of FLAGFILE: xpk's name of the flagfile's slice; for v4 and v5p it counts cores, two per chip.
type_of() {
  local topology chip shape count=1 size
  topology=$(sed -n 's/^# topology: *//p' "$ROOT/$1")
  [[ -n "$topology" ]] || fail "$1 has no line '# topology:': set --tpu_type"
  chip=${topology%%:*} shape=${topology#*:}
  for size in ${shape//x/ }; do count=$((count * size)); done
  case "$chip" in
    v5e) echo "v5litepod-$count" ;;
    v6e) echo "v6e-$count" ;;
    v4 | v5p) echo "$chip-$((2 * count))" ;;
    *) fail "xpk's name for $topology is not known: set --tpu_type" ;;
  esac
}

need cluster
need image
number num_slices
number max_restarts
number grace
training_command python
shared workdir
[[ -n "$tpu_type" ]] || tpu_type=$(type_of "$flagfile")
if [[ -z "$workload" ]]; then # at most 40 lowercase letters, digits and dashes
  workload=$(basename "$flagfile" .flags | tr 'A-Z_.' 'a-z--')
  workload=${workload:0:24}-$(date +%m%d-%H%M%S)
fi
create=(
  xpk workload create "--cluster=$cluster" "--workload=$workload" "--docker-image=$image"
  "--tpu-type=$tpu_type" "--num-slices=$num_slices" "--max-restarts=$max_restarts"
  "--termination-grace-period-seconds=$grace" "--command=$(quoted "${train[@]}")"
)
[[ -z "$zone" ]] || create+=("--zone=$zone")
[[ -z "$project" ]] || create+=("--project=$project")
program xpk
run "${create[@]}"
