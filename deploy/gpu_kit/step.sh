#!/usr/bin/env bash
# On the GPU machine, after on_device.sh: looks at what is installed there, then runs tiers of gpu_check.
#
#     bash /tmp/kit/step.sh learner              the tier learner; `python -m benchmarks.gpu_check --help` lists them
#     bash /tmp/kit/step.sh generator shared     two tiers
#
#   KIT     the folder that on_device.sh unpacked into (/tmp/kit)
#   OUT     the folder whose contents come back from the machine (KIT/out): a JSON and a log for each tier
#   TORCH   pinned: the project's torch, when its parts are there; else the machine's own
#   LIMIT   seconds for each tier (270); a second call goes on after the last check that is recorded in OUT
#   CHECK   more options of gpu_check, e.g. "--again", or "--device cpu" on a machine without a GPU
set -uo pipefail
kit=${KIT:-/tmp/kit}
out=${OUT:-$kit/out}
mkdir -p "$out" || exit 2
# shellcheck disable=SC1091 # written by on_device.sh
source "$kit/env.sh" "${TORCH:-}"
cd "$KIT_PROJECT" || exit 2
if command -v nvidia-smi >/dev/null; then nvidia-smi -L; fi
df -h /dev/shm | tail -1
failed=0
for tier in "$@"; do
  # shellcheck disable=SC2086 # several options in one variable
  python3 deploy/gpu_kit/installed.py "$tier" &&
    timeout "${LIMIT:-270}" python3 -W ignore -m benchmarks.gpu_check --tier "$tier" --out "$out" ${CHECK:-}
  code=$?
  if [ "$code" = 124 ]; then echo "$tier: over its limit of ${LIMIT:-270} s; $out/$tier.log"; fi
  if [ "$code" != 0 ]; then failed=$code; fi
done
exit "$failed"
