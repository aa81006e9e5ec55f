#!/usr/bin/env bash
# Builds what a GPU machine without network needs to run the tiers of gpu_check, in parts of a chosen size.
#
#     bash deploy/gpu_kit/build.sh        in the root of a checkout, whose HEAD is taken; parts in .gpu_kit/1, 2, ...
#
#   LAYERS    what to bring: learner ray vllm torch (all). The tier learner needs the first, the others the first three
#   PART_MIB  the largest part in MiB (60)
#   WORK      where downloads and packed streams are kept: remove it to build anew
#
# Needs git, pip, unzip, xz; about 8 GB of disk, under 2 GB without the torch layer.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(git rev-parse --show-toplevel)
work=${WORK:-${TMPDIR:-/tmp}/gpu_kit_build}
parts=$root/.gpu_kit
part_mib=${PART_MIB:-60}
layers=${LAYERS:-learner ray vllm torch}

platforms=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
for glibc in 39 35 34 31 28 27 26 24 18 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done

unpack() { # every wheel of a layer, checked
  rm -rf "$work/fresh" && mkdir -p "$work/wheels/$1" "$work/fresh"
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --find-links "$work/wheels/$1" -d "$work/fresh" -r "$here/pins/$1.txt"
  rm -rf "$work/wheels/$1" && mv "$work/fresh" "$work/wheels/$1" # what is not pinned any more stays behind
  rm -rf "$work/tree/$1" && mkdir -p "$work/tree/$1"
  for wheel in "$work/wheels/$1"/*.whl; do
    unzip -tq "$wheel" >/dev/null || { echo "broken: $wheel" >&2; exit 1; }
    unzip -qo "$wheel" -d "$work/tree/$1"
  done
  echo "$1: $(du -cBM "$work/wheels/$1"/*.whl | tail -1 | cut -f1) of wheels, all whole"
}

prune() { # what no run on one Hopper GPU reads
  cd "$work/tree/$1"
  find . -name '*.pyi' -delete
  case $1 in
    vllm)
      rm -rf vllm/vllm-rs vllm/benchmarks vllm/third_party/deep_gemm/*.so vllm/third_party/deep_gemm/include \
        vllm/third_party/fmha_sm100/cutlass vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/_moe_C_stable_libtorch.abi3.so \
        vllm/_flashmla_C.abi3.so vllm/_flashmla_extension_C.abi3.so vllm/_flashkda_C.abi3.so vllm/_deepselect_C.abi3.so \
        vllm/_qutlass_C.abi3.so vllm/entrypoints/serve/instrumentator/static
      find . -name '*.h' -o -name '*.hpp' -o -name '*.cuh' -o -name '*.a' | xargs -r rm -f ;;
    ray) rm -rf ray/jars ray/rllib ray/cpp ray/dashboard/client/build/static/js/*.map ;;
    torch)
      rm -rf torch/include torch/share torch/test torch/bin/protoc* torch/lib/*.a nvidia/nccl/include \
        triton/backends/amd/lib triton/backends/nvidia/lib/cupti triton/_C/libproton.so triton/instrumentation \
        triton/plugins triton/FileCheck
      find triton/backends/nvidia/bin -type f -delete ;; # the machine's own are linked in their place
  esac
  find . \( -name '*.so' -o -name '*.so.[0-9]*' -o -name raylet -o -name gcs_server \) -type f -size +1000k -print0 |
    xargs -0 -r python3 "$here/thin.py"
  cd - >/dev/null
}

stream() { # stream NAME FOLDER TAR-ARGUMENTS...
  echo "packing $1"
  tar -C "$2" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - "${@:3}" | xz -T2 "-${XZ_LEVEL:-1}" >"$work/$1.tmp"
  mv "$work/$1.tmp" "$work/streams/$1.tar.xz"
}

mkdir -p "$work/streams" "$work/tree"
order=(project.tar.xz)
project=$work/tree/project
rm -rf "$project" && mkdir -p "$project/.gpu_kit"
git -C "$root" archive HEAD | tar -x -C "$project"
git -C "$root" describe --always --dirty >"$project/COMMIT"
for model in $(grep -l '"images": 1097' "$HOME"/.cache/rft_cluster/tiny/*/tiny.json 2>/dev/null); do # the digits': saves a minute there
  mkdir -p "$project/.gpu_kit/tiny" && cp -r "$(dirname "$model")" "$project/.gpu_kit/tiny/"
done
stream project "$project" .
for layer in $layers; do # what an earlier run packed is taken as it is, unless the pins have changed
  if [ "$layer" = torch ]; then # in three, which are unpacked at the same time
    streams=(torch torch_cpu triton)
  else
    streams=("$layer")
  fi
  case $layer in vllm | torch) order+=(--) ;; esac # each in parts of its own
  order+=("${streams[@]/%/.tar.xz}")
  [ "$work/streams/${streams[-1]}.tar.xz" -nt "$here/pins/$layer.txt" ] && continue
  unpack "$layer"
  prune "$layer"
  if [ "$layer" = torch ]; then
    stream torch "$work/tree/torch" --exclude=./torch/lib/libtorch_cpu.so --exclude=./triton .
    stream torch_cpu "$work/tree/torch" torch/lib/libtorch_cpu.so
    stream triton "$work/tree/torch" triton
  else
    stream "$layer" "$work/tree/$layer" .
  fi
done
rm -rf "$parts" && mkdir "$parts"
(cd "$work/streams" && python3 "$here/parts.py" "$parts" "$part_mib" "${order[@]}")
for part in "$parts"/*/; do cp "$here/on_device.sh" "$part"; done
