#!/usr/bin/env bash
# On the GPU machine, after on_device.sh: one step's checks, each with a limit of its own. Logs go to $OUT.
#
#     bash /tmp/kit/step.sh learner       varlen attention, and three updates of the tiny model in each variant
#     bash /tmp/kit/step.sh engine        the engine alone: log-probabilities, sleep, wake
#     bash /tmp/kit/step.sh demo          the digits through Ray, CUDA IPC and sleep mode
#     bash /tmp/kit/step.sh shapes        the 2B model's shapes: memory and seconds of learner and engine
#
#   KIT     the folder that on_device.sh unpacked into (/tmp/kit)
#   OUT     the folder whose contents come back from the machine (KIT/out)
#   TORCH   pinned: the project's torch, when its parts are there; else the machine's own
#   SCALE   multiplies the limits (1), for a slower machine or a shorter stay
set -uo pipefail
kit=${KIT:-/tmp/kit}
out=${OUT:-$kit/out}
mkdir -p "$out"
# shellcheck disable=SC1091 # written by on_device.sh
source "$kit/env.sh" "${TORCH:-}"
cd "$KIT_PROJECT" || exit 2
failed=0

limited() { # limited SECONDS LOG COMMAND...: its output goes to the log as well
  local seconds=$1 log=$2
  seconds=$(python3 -c "print(max(1, round($seconds * ${SCALE:-1})))")
  timeout "$seconds" "${@:3}" 2>&1 | tee "$out/$log" | grep -v INFO
  local code=${PIPESTATUS[0]}
  if [ "$code" != 0 ]; then
    echo "$log: exit code $code$([ "$code" = 124 ] && echo " (over its limit of $seconds s)")"
    failed=1
  fi
}

case ${1:-} in
  learner)
    nvidia-smi -L && df -h /dev/shm | tail -1
    limited 120 learner-attention.log python3 -W ignore .gpu_kit_checks/learner.py attention
    limited 120 learner-tiny.log python3 -W ignore .gpu_kit_checks/learner.py tiny
    ;;
  engine) limited 150 engine.log python3 -W ignore .gpu_kit_checks/engine.py tiny ;;
  demo)
    limited 240 demo.log python3 -m rft_cluster.launch --config digits cluster.device=cuda \
      generators.gpus=0.5 generators.cpus=4 generators.gpu_memory=0.3 \
      learners.count=1 learners.gpus=0.5 learners.cpus=4 run.folder="$kit/runs" run.name=gpu
    cp "$kit"/runs/gpu/*.jsonl "$out" || failed=1
    ;;
  shapes)
    limited 230 learner-shapes.log python3 -W ignore .gpu_kit_checks/learner.py shapes "$kit/2b"
    limited 150 engine-shapes.log python3 -W ignore .gpu_kit_checks/engine.py shapes "$kit/2b"
    ;;
  *)
    sed -n '2,/^set /p' "$0" | sed '$d' >&2
    exit 2
    ;;
esac
exit "$failed"
