#!/usr/bin/env bash
# On the GPU machine: takes in the part that this file lies in. Parts come in their order; a repeated one does no harm.
#
#     bash .gpu_kit/1/on_device.sh && bash /tmp/kit/step.sh learner       a tier of gpu_check, see step.sh
#     source /tmp/kit/env.sh                                              the machine's own torch, for commands of your own
#     source /tmp/kit/env.sh pinned                                       the project's torch, when its parts are there
#
#   KIT  the folder to unpack into (/tmp/kit): 8 GB, and it must stay as long as the machine is kept
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kit=${KIT:-/tmp/kit}
mkdir -p "$kit/streams"

unpack() { # a whole stream
  local stream=$1 sum=$2 folder
  case $stream in project*) folder=project ;; torch* | triton*) folder=pinned ;; *) folder=site ;; esac
  echo "$sum  $kit/streams/$stream" | sha256sum --quiet -c
  mkdir -p "$kit/$folder"
  if command -v xz >/dev/null; then
    xz -dc -T0 "$kit/streams/$stream" | tar -x -C "$kit/$folder"
  else
    # Python has had filters since 3.11.4, and warns without one since 3.12.
    python3 -c "import sys, tarfile; filters = {'filter': 'tar'} if hasattr(tarfile, 'tar_filter') else {}
tarfile.open(sys.argv[1], 'r:xz').extractall(sys.argv[2], **filters)" "$kit/streams/$stream" "$kit/$folder"
  fi
  : >"$kit/streams/$stream" && touch "$kit/streams/$stream.done"
}

pids=()
while read -r piece stream start sum; do
  [ -e "$kit/streams/$stream.done" ] && continue
  have=$(stat -c %s "$kit/streams/$stream" 2>/dev/null || echo 0)
  if [ "$have" -lt "$start" ]; then echo "$stream: the part before this one is missing (this is a new machine?)" >&2; exit 1; fi
  if [ "$have" -eq "$start" ]; then cat "$here/$piece" >>"$kit/streams/$stream"; fi
  if [ "$sum" != - ]; then unpack "$stream" "$sum" & pids+=($!); fi
done <"$here/pieces"
for pid in "${pids[@]}"; do wait "$pid"; done

packages=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
if [ -d "$kit/pinned/nvidia" ]; then
  for library in "$packages"/nvidia/*/; do # all but NCCL
    [ -e "$kit/pinned/nvidia/$(basename "$library")" ] || ln -s "${library%/}" "$kit/pinned/nvidia/"
  done
fi
if [ -d "$kit/pinned/triton" ]; then ln -sf "$packages"/triton/backends/nvidia/bin/* "$kit/pinned/triton/backends/nvidia/bin/"; fi
if [ -d "$kit/project/.gpu_kit/tiny" ]; then
  mkdir -p "$HOME/.cache/rft_cluster" && cp -r "$kit/project/.gpu_kit/tiny" "$HOME/.cache/rft_cluster/"
fi
cat >"$kit/env.sh" <<ENV
export KIT_PROJECT=$kit/project PYTHONPATH=$kit/project:$kit/site
if [ "\${1:-}" = pinned ]; then
  export PYTHONPATH=$kit/project:$kit/pinned:$kit/site
  export PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK=1 # cuDNN 9.19 is there, this torch was built with 9.20
fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # a tier starts six processes or more, and each would compile all that it imports: 6 s
ENV
cp "$kit/project/deploy/gpu_kit/step.sh" "$kit/step.sh"
du -sm "$kit"/*/ | sort -rn
