#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a workload of xpk (pip install xpk).
#
#   gke.sh --cluster=NAME --image=IMAGE --flagfile=FILE --workdir=FOLDER [options] [-- FLAGS...]
#
#   --cluster          made by "xpk cluster create"; --zone and --project if they are not gcloud's
#   --image            a container of this repository: see the Dockerfile beside this script
#   --flagfile         in this repository; its line "# topology:" says which slice
#   --workdir          a folder that all workers see: a volume of "xpk storage attach"
#   --workload=NAME    of the job; made of the flagfile's name and the date if unset
#   --tpu_type=TYPE    as xpk calls the slice, e.g. v6e-256; from the flagfile if unset
#   --num_slices=1     linked by the data-center network; see --mesh.across_slices
#   --max_restarts=10  after a failure or a preemption
#   --grace=300        seconds to save a checkpoint when preempted
#   --dry_run          prints the command
#   -- FLAGS           further flags of genai_jax.train

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster='' image='' flagfile='' workdir='' workload='' tpu_type='' zone='' project=''
num_slices=1 max_restarts=10 grace=300
options='cluster image flagfile workdir workload tpu_type num_slices max_restarts grace zone project'
parse "$@"

# The name of the slice that a flagfile was made for; of v4 and v5p it counts cores, two a chip.
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
    *) fail "xpk's name of $topology is not known here: set --tpu_type" ;;
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
if [[ -z "$workload" ]]; then # small letters, digits and dashes, at most 40
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
