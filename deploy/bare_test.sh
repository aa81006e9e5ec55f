#!/usr/bin/env bash
# What README promises, on a machine that has nothing: a bare Debian with python3, python3-venv, make, git and
# ca-certificates, a user without rights, no compiler, no headers, nobody who reaps orphans (as in a container without
# an init). Takes the files that git tracks, as they lie here. Root only, for the roots it makes:  sudo make bare-test
#
#   BARE_RELEASE=bookworm          or trixie, ... (Debian's name of the release)
#   BARE_USER=root                 the machine's owner types, as in many containers
#   BARE_SHM=64m                   size of /dev/shm, as Docker gives it; else half of the memory
#   BARE_FOLDER="my clone"         the folder's name, with a space for instance
#   BARE_COMMANDS="make demo
#   make test"                     what the user types, a command a line
#   BARE_REUSE=1                   keep the user's caches of pip and uv for the next time; else all is downloaded anew
#
# The network is this machine's, and pip's and uv's settings go along, with the folders that they name (read-only).
set -euo pipefail
cd "$(dirname "$0")/.."
release=${BARE_RELEASE:-bookworm}
user=${BARE_USER:-user}
commands=${BARE_COMMANDS:-$'make demo\nmake test'}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/rft_cluster/bare
base=$cache/$release.tar.gz
packages=python3,python3-venv,make,git,ca-certificates
say() { printf '[bare] %s\n' "$*"; }

if [ "${1:-}" != inside ]; then
  [ "$(id -u)" = 0 ] || { echo "error: a root is made by root: sudo make bare-test" >&2; exit 2; }
  if ! command -v mmdebstrap >/dev/null; then
    say "mmdebstrap, which makes the root"
    apt-get update -qq
    apt-get install -qq -y mmdebstrap debian-archive-keyring
  fi
  mkdir -p "$cache"
  if [ ! -f "$base" ]; then
    say "Debian $release with $packages"
    mmdebstrap --quiet --variant=minbase --include="$packages" "$release" "$base.tmp.tar.gz"
    mv "$base.tmp.tar.gz" "$base"
  fi
  root=$(mktemp -d "$cache/root-XXXXXX")
  trap 'rm -rf --one-file-system "$root"' EXIT
  tar -xzf "$base" -C "$root"
  # In namespaces of its own: whatever is mounted or started there ends with it. Its first process waits for its child
  # alone, so nobody reaps orphans.
  first='import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))'
  unshare --mount --pid --fork --kill-child --propagation private \
    python3 -c "$first" bash deploy/bare_test.sh inside "$root" && status=0 || status=$?
  exit "$status"
fi

root=$2 home=/home/$user
[ "$user" != root ] || home=/root
work=$home/${BARE_FOLDER:-rft_cluster}
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o "mode=1777,size=${BARE_SHM:-50%}" tmpfs "$root/dev/shm"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
[ "$user" = root ] || chroot "$root" useradd --create-home --uid 1000 "$user"
owner=$(chroot "$root" id -u "$user")

# Settings of pip and uv, and what they name.
host_pip() { python3 -m pip "$@" 2>/dev/null || true; }
mapfile -t files < <(host_pip config debug | sed -n 's/^ *\(\/.*\), exists: True$/\1/p'; ls -d /etc/uv ~/.config/uv 2>/dev/null || true)
for file in "${files[@]}"; do
  there=${file/#"$HOME"/$home}
  mkdir -p "$root$(dirname "$there")" && cp -r "$file" "$root$there"
done
mapfile -t settings < <(env | grep -E '^(PIP|UV|SSL)_|^(https?|no|all)_proxy=' | grep -v '^UV_CACHE_DIR=' || true)
named=$(printf '%s\n' "${settings[@]}"; host_pip config list)
for path in $(grep -oE "(=|'|[ ,]|file:/)/[^ ',]*" <<<"${named//file:\/\///}" | sed "s/^[^/]*//" | sort -u); do
  if [ -d "$path" ]; then
    # An index is a folder of links into one beside it.
    [ "$(basename "$path")" = simple ] && path=$(dirname "$path")
    mkdir -p "$root$path" && mount --rbind -o ro "$path" "$root$path"
  elif [ -f "$path" ] && ! [ "$path" -ef "$root$path" ]; then # it may lie in a folder that is there by now
    mkdir -p "$root$(dirname "$path")" && cp -L "$path" "$root$path"
  fi
done
if [ -n "${BARE_REUSE:-}" ]; then
  mkdir -p "$cache/$user-cache" "$root$home/.cache"
  mount --bind "$cache/$user-cache" "$root$home/.cache"
  chown "$owner:$owner" "$root$home/.cache"
fi
mkdir "$root$work"
git ls-files -z | tar --create --null --files-from=- --ignore-failed-read 2>/dev/null | tar --extract -C "$root$work"
chown -R "$owner:$owner" "$root$home" 2>/dev/null || true

as_user() {
  chroot --userspec="$owner:$owner" "$root" /usr/bin/env -i HOME="$home" PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    "${settings[@]}" bash -c "cd '$work' && $1" </dev/null
}
timed() {
  say "$1"
  local start=$SECONDS status=0
  as_user "$1" || status=$?
  say "$1: exit code $status after $((SECONDS - start)) s"
  return "$status"
}

# Set-up names what is missing and the command that brings it: it is typed, as the machine's owner would.
while ! told=$(as_user "make setup" 2>&1); do
  echo "$told"
  cure=$(sed -nE 's/^\[setup\] this machine lacks .*: (sudo )?(apt-get .*)/\2/p' <<<"$told")
  [ -n "$cure" ] && [ "$cure" != "${cured:-}" ] || { say "set-up failed and named no cure"; exit 1; }
  cured=$cure
  say "as set-up says: $cure"
  chroot "$root" /usr/bin/env DEBIAN_FRONTEND=noninteractive bash -c "${cure//sudo /}" >/dev/null
done
echo "$told"
failed=0
while read -r line; do timed "$line" || failed=1; done <<<"$commands"
du -sh "$root$work/.venv" | sed 's/^/[bare] the environment takes /'
exit "$failed"
