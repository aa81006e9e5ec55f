#!/usr/bin/env bash
# Submits a run to a Ray cluster as a job:
#
#   deploy/submit.sh flower102 [section.key=value ...]
#
#   RAY_API_SERVER_ADDRESS  the cluster's dashboard, e.g. http://127.0.0.1:8265 (the default; reach a remote one
#                           through ssh -L 8265:127.0.0.1:8265 HEAD: it stays on loopback there)
#   RFT_RUNS                absolute folder for runs on the cluster, on a disk that outlives the job (~/rft_runs there);
#                           with several nodes one that all of them see
#   RFT_SUBMIT              more options for `ray job submit`, e.g. "--no-wait --submission-id mine"
#
# The same command again goes on with a run that was stopped or lost. `ray job stop ID` leaves it 70 s to save;
# cluster.grace_seconds=300 among the words makes that 300, and Ray's patience with it.
#
# The job's driver runs on the head node and reserves nothing there: a head of two cores holds a run of two CPUs, and one
# without GPUs will do. (Never --entrypoint-num-cpus: with it Ray places the driver on any node, a spot machine too.)
# Tokens: `(umask 077; ray get-auth-token --generate)` once, then RAY_AUTH_MODE=token for `ray start` and here.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?usage: deploy/submit.sh CONFIG [section.key=value ...]}
shift
# The Ray of this folder, which has its Python beside it; else whichever is active. Another Ray may come first on PATH.
[ ! -x .venv/bin/ray ] || PATH=$PWD/.venv/bin:$PATH
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
refuse() {
  echo "error: $*" >&2
  exit 2
}
# shellcheck disable=SC2088 # the home folder of the cluster, not of this machine
runs=${RFT_RUNS:-'~/rft_runs'} named=RFT_RUNS grace=70
for word in "$@"; do
  case $word in
    run.folder=*) runs=${word#*=} named=run.folder ;;
    cluster.grace_seconds=*) grace=${word#*=} ;;
  esac
done
# A relative one would be in the copy of this folder that Ray unpacks under /tmp/ray, and each upload has another.
[[ $runs == [/~]* ]] || refuse "$named is $runs: a changed upload would not find its runs there; begin it with / or ~"
[[ $grace =~ ^[1-9][0-9]{0,5}$ ]] || refuse "cluster.grace_seconds is $grace: give a whole number of seconds, at least 1"
# What the dashboard shows beside the job. A mistake in the configuration ends here, before the upload.
metadata=$(python deploy/job_metadata.py "$config" "$@")
python deploy/upload.py
# Ray kills a job so long after it was told to stop. A little more than the run's own limit, so that it ends by itself.
runtime_env=$(sed "s/^\( *RAY_JOB_STOP_WAIT_TIME_S:\) .*/\1 \"$((grace + 5))\"/" deploy/runtime_env.yaml)
# shellcheck disable=SC2086 # several options in one variable
exec ray job submit --working-dir . --runtime-env <(echo "$runtime_env") --metadata-json "$metadata" ${RFT_SUBMIT:-} -- \
  python -m rft_cluster.launch --config "$config" --resume=auto run.folder="$runs" cluster.address=auto \
  cluster.grace_seconds="$grace" "$@"
