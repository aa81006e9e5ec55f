#!/usr/bin/env bash
# Builds deploy/docker/Dockerfile for CPUs without Docker, and runs four steps of the demo in the image, as its user and
# without a network. Root only, on Debian; called by `make image`. With Docker: see the head of the Dockerfile.
#
#   IMAGE_RUN="python -m rft_cluster.launch ..."   another command in the image
#
# The network of the build is this machine's, and pip's settings go along, with the folders that they name (read-only).
# Everything is kept in one folder of the user's cache; to remove it: buildah unmount --all, then the folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=${IMAGE_RUN:-python -m rft_cluster.launch --config digits schedule.steps=4 optimizer.warmup_steps=1 run.folder=/runs}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/rft_cluster/image
base=localhost/debian:bookworm image=localhost/rft_cluster:cpu
say() { printf '[image] %s\n' "$*"; }
buildah() { command buildah --root "$cache/storage" --runroot "$cache/running" "$@"; }

[ "$(id -u)" = 0 ] || { echo "error: containers are built by root here: sudo make image" >&2; exit 2; }
if ! { command -v buildah && command -v mmdebstrap && command -v ip; } >/dev/null; then
  say "packages that build it"
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends buildah mmdebstrap debian-archive-keyring iproute2
fi
mkdir -p "$cache"
if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  say "a base: Debian's smallest root"
  mmdebstrap --quiet --variant=minbase --include=ca-certificates bookworm "$cache/root.tar"
  container=$(buildah from scratch)
  tar -xf "$cache/root.tar" -C "$(buildah mount "$container")"
  buildah commit --quiet --rm "$container" "$base" >/dev/null
  rm "$cache/root.tar"
fi

# Settings of pip, and what they name, for each RUN.
mounts=()
mapfile -t settings < <(python3 -m pip config debug 2>/dev/null | sed -n 's/^ *\(\/.*\), exists: True$/\1/p')
for file in "${settings[@]}"; do mounts+=(--volume "$file:$file:ro"); done
named=$(cat "${settings[@]}" /dev/null; env | grep '^PIP_' || true)
for path in $(grep -oE "(=|'|[ ,]|file:/)/[^ ',]*" <<<"${named//file:\/\///}" | sed "s/^[^/]*//; s|^//|/|" | sort -u); do
  [ "$(basename "$path")" = simple ] && path=$(dirname "$path") # an index is a folder of links into one beside it
  [ -e "$path" ] && mounts+=(--volume "$path:$path:ro")
done
start=$SECONDS
say "the image"
buildah build --layers --isolation chroot --network host --file deploy/docker/Dockerfile --tag "$image" \
  --build-arg BASE="$base" "${mounts[@]}" .
say "built after $((SECONDS - start)) s: $(buildah images --format '{{.Size}}' "$image")"

container=$(buildah from "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
start=$SECONDS
say "as user 1000, without a network: $run"
export -f buildah
export cache container run
# shellcheck disable=SC2016 # expanded inside
unshare --net --mount --pid --fork --kill-child --mount-proc bash -c 'set -e
  ip link set lo up
  mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
  buildah run --isolation chroot "$container" -- bash -c "id; $run"'
say "that took $((SECONDS - start)) s"
