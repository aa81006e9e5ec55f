"""A Ray that is started here leaves no process and no temporary file, however the driver ends.

What is killed cannot clean up: vLLM and Ray's dashboard leave files, Ray's agents wait a minute for a server that is
gone, and a frozen actor does not see that its node is. So Ray and the actors get a temporary folder of their own. It
marks them: a shell waits for the end of the driver, ends what still has the folder in its environment, and removes it.
The notes of Intel's OpenMP runtime about processes that were killed while they imported torch go as well (see
`hardware.forget_openmp`): of dead processes nobody needs them, whoever's they were.
"""

import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL

GRACE = 4  # seconds for processes to end by themselves
# Arguments: the folder, and GRACE. Its input ends with the driver.
CLEAN = """
ours() { grep -lszFx -e "TMPDIR=$0" /proc/[0-9]*/environ | tr -dc '0-9\\n'; }
read -r _
for _ in $(seq "$1"); do [ "$(ours)" ] || break; sleep 1; done
kill -KILL $(ours)
for note in /dev/shm/__KMP_REGISTERED_LIB_*_"$(id -u)"; do
  pid=${note#*_LIB_}
  [ -e "/proc/${pid%_*}" ] || rm -f -- "$note"
done
for _ in 1 2 3 4 5; do rm -rf -- "$0" && exit; sleep 1; done
"""
CACHE = Path("~/.cache/rft_cluster/torchinductor")  # what torch compiles, for later runs


@contextmanager
def without_leftovers() -> Iterator[None]:
    """The context in which to start Ray."""
    # So short that Ray's sockets can be there, too.
    parent = os.path.abspath(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    os.makedirs(parent, exist_ok=True)
    folder = Path(parent, f"rft_cluster_{secrets.token_hex(4)}")
    _clean_at_the_end(folder)  # first: a signal, or the end of the driver, may fall between any two lines
    folder.mkdir(mode=0o700)
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(CACHE.expanduser()))
    # Without SPT_NOENV the titles that Ray gives processes would overwrite parts of their environment, and the mark.
    own = {"RAY_TMPDIR": parent, "TMPDIR": str(folder), "SPT_NOENV": "1"}
    with _environment(own | {"TORCHINDUCTOR_CACHE_DIR": cache}):
        yield


def _clean_at_the_end(folder: Path) -> None:
    """Have a folder and the processes that it marks removed when this process has ended."""
    read, _ = os.pipe()  # the end to write is inherited by no child and never closed here: it closes with this process
    command = ["/bin/sh", "-c", CLEAN, str(folder), str(GRACE)]
    # In a session of its own: Ctrl-C, and the signal of a terminal that closes, are for the driver.
    subprocess.Popen(command, stdin=read, stdout=DEVNULL, stderr=DEVNULL, cwd="/", start_new_session=True)
    os.close(read)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
