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
# The same command again goes on with a run that was stopped or lost. `ray job stop ID` leaves it 75 s to save.
#
# The job's driver runs on the head node and reserves nothing there: a head of two cores holds a run of two CPUs, and one
# without GPUs will do. (Never --entrypoint-num-cpus: with it Ray places the driver on any node, a spot machine too.)
# Tokens: `ray get-auth-token --generate` once, then RAY_AUTH_MODE=token for `ray start` and here.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?usage: deploy/submit.sh CONFIG [section.key=value ...]}
shift
# The Ray of this folder, which has its Python beside it; else whichever is active. Another Ray may come first on PATH.
[ ! -x .venv/bin/ray ] || PATH=$PWD/.venv/bin:$PATH
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
# shellcheck disable=SC2088 # the home folder of the cluster, not of this machine
runs=${RFT_RUNS:-'~/rft_runs'}
# What the dashboard shows beside the job. A mistake in the configuration ends here, before the upload.
metadata=$(python deploy/job_metadata.py "$config" "$@")
python deploy/upload.py
# Of the 75 s that a job has when it is stopped (deploy/runtime_env.yaml).
# shellcheck disable=SC2086 # several options in one variable
exec ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml --metadata-json "$metadata" ${RFT_SUBMIT:-} -- \
  python -m rft_cluster.launch --config "$config" --resume=auto run.folder="$runs" cluster.address=auto \
  cluster.grace_seconds=70 "$@"
