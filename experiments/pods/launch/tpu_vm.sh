#!/usr/bin/env bash
# Trains on all workers of a TPU VM slice that exists, by gcloud's ssh.
#
#   tpu_vm.sh --name=TPU --zone=ZONE --flagfile=FILE --workdir=FOLDER [options] [-- FLAGS...]
#
#   --action=all       copy, setup, train; or one of copy, setup, train, follow, stop
#   --name, --zone     of the slice; --project if it is not gcloud's own
#   --flagfile         in this repository
#   --workdir          a folder that all workers see: a Filestore or a bucket mounted everywhere
#   --repository=URL   the workers clone this; without it they get the files that git knows here
#   --revision=NAME    of the repository: branch, tag or commit
#   --dry_run          prints the commands
#   -- FLAGS           further flags of genai_jax.train, the same on every worker
#
# The exit codes of all workers are printed, and the largest is this script's. The connection may be
# lost: training goes on, --action=follow shows it again, --action=stop saves a checkpoint and ends
# it. The same command goes on from the last checkpoint. A slice is made, e.g., by
#   gcloud compute tpus queued-resources create NAME --node-id=TPU --zone=ZONE \
#     --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e

set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=all name='' zone='' project='' flagfile='' workdir='' repository='' revision=''
options='action name zone project flagfile workdir repository revision'
THERE=genai_jax # the repository's folder on a worker
WORKER=$THERE/experiments/pods/launch/worker.sh
parse "$@"

# on_all WORD...: the same command on every worker, and their exit codes.
on_all() {
  local remote log codes
  remote="$(quoted "$@"); code=\$?; echo \"\$(hostname): exit code \$code\"; exit \$code"
  local ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$remote")
  if ((dry_run)); then quoted "${ssh[@]}"; return; fi
  log=$(mktemp)
  "${ssh[@]}" 2>&1 | tee "$log" || true # the codes below say more
  codes=$(sed -n 's/.*: exit code \([0-9][0-9]*\)\r\{0,1\}$/\1/p' "$log" | sort -n)
  rm -f "$log"
  [[ -n "$codes" ]] || { echo "error: no worker answered: $1" >&2; exit 1; }
  echo "exit codes of $(wc -l <<<"$codes") worker(s): $(uniq -c <<<"$codes" |
    awk '{printf "%s%s x %s", sep, $1, $2; sep = ", "}')" >&2
  local largest=${codes##*$'\n'}
  ((largest == 0)) || exit "$largest"
}

copy() {
  if [[ -n "$repository" ]]; then
    local from wanted update
    from=$(quoted "$repository") wanted=$(quoted "${revision:-HEAD}")
    update="[ -d $THERE/.git ] || git clone --quiet $from $THERE"
    update+=" && cd $THERE && git fetch --quiet $from $wanted && git checkout --quiet FETCH_HEAD"
    on_all bash -c "$update"
    return
  fi
  local archive root
  archive=$(mktemp --dry-run --suffix=.tar.gz) root=$(quoted "$ROOT")
  run bash -c "git -C $root ls-files -z | tar -C $root --null --files-from=- -czf $archive"
  run gcloud compute tpus tpu-vm scp "$archive" "$name:$THERE.tar.gz" "${where[@]}" --worker=all
  run rm -f "$archive"
  on_all bash -c "mkdir -p $THERE && tar -C $THERE -xzf $THERE.tar.gz"
}

train_on_all() {
  training_command python
  shared workdir
  on_all bash "$WORKER" train "${train[@]:3}"
}

need name
need zone
[[ -z "$revision" || -n "$repository" ]] || fail "--revision=$revision needs --repository"
where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
program gcloud
case "$action" in
  all) training_command python; shared workdir; copy; on_all bash "$WORKER" setup; train_on_all ;;
  copy) copy ;;
  train) train_on_all ;;
  setup | follow | stop) on_all bash "$WORKER" "$action" ;;
  *) fail "--action=$action is none of all, copy, setup, train, follow, stop" ;;
esac
