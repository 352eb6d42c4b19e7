#!/usr/bin/env bash
# Trains on all workers of an existing TPU VM slice, through gcloud's ssh.
#
#   tpu_vm.sh --name=TPU --zone=ZONE --flagfile=FILE --workdir=FOLDER [options] [-- FLAGS...]
#
#   --action=all       all (copy, setup, train), or one of copy, setup, train, follow, stop
#   --name, --zone     of the slice; --project if it differs from gcloud's default
#   --flagfile         flagfile in this repository
#   --workdir          folder that all workers can access: Filestore or a bucket mounted on all
#   --repository=URL   repository for the workers to clone; if unset, they get the tracked files here
#   --revision=NAME    branch, tag or commit of the repository
#   --dry_run          print the commands without running them
#   -- FLAGS           additional flags of genai_jax.train, the same on every worker
#
# The script prints the exit codes of all workers and exits with the largest. If the connection is
# lost, training continues: --action=follow shows its output again, and --action=stop makes it save a
# checkpoint and exit. Running the same command again resumes from the last checkpoint. To create a
# slice, for example:
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

# on_all WORD...: runs a command on every worker and prints their exit codes.
on_all() {
  local remote log codes
  remote="$(quoted "$@"); code=\$?; echo \"\$(hostname): exit code \$code\"; exit \$code"
  local ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$remote")
  if ((dry_run)); then quoted "${ssh[@]}"; return; fi
  log=$(mktemp)
  "${ssh[@]}" 2>&1 | tee "$log" || true # the codes below are more precise
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
  *) fail "--action=$action is not one of all, copy, setup, train, follow, stop" ;;
esac
