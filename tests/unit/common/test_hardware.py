import os
import subprocess
import sys
from pathlib import Path

import pytest

from rft_cluster.common import hardware as module
from rft_cluster.common.errors import UserError
from rft_cluster.common.hardware import (
    forget_openmp,
    hardware,
    malloc_environment,
    native_dtype,
    openmp_environment,
    preloaded,
)
from rft_cluster.config import load_config

CPUS = {
    "a laptop": ("processor\t: 0\nflags\t\t: fpu sse2 avx avx2 fma f16c bmi2\n", "float32"),
    "a server without BF16": ("flags\t\t: avx2 avx512f avx512bw avx512vl avx512_vnni\n", "float32"),
    "AMD since Zen 4": ("flags\t\t: avx2 avx512f avx512_bf16\n", "bfloat16"),
    "Intel with AMX": ("flags\t\t: avx2 avx512f amx_bf16 amx_tile\n", "bfloat16"),
    "ARM": ("Features\t: fp asimd sve i8mm bf16\n", "bfloat16"),
    "no such file": ("", "float32"),
}


@pytest.mark.parametrize(("cpuinfo", "dtype"), CPUS.values(), ids=CPUS)
def test_layers_compute_in_bf16_where_the_processor_does(cpuinfo: str, dtype: str):
    assert native_dtype("cpu", cpuinfo) == dtype
    assert native_dtype("cuda", cpuinfo) == "bfloat16"


@pytest.fixture
def laptop(tmp_path, monkeypatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPUS["a laptop"][0])
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")


def test_a_configuration_decides_once_and_has_it_in_its_record(laptop: None):
    assert hardware("cpu").dtype == "float32"
    assert load_config("digits", []).model_dump(mode="json")["cluster"]["dtype"] == "float32"
    assert load_config("digits", ["cluster.dtype=auto"]).cluster.dtype == "float32"
    assert load_config("digits", ["cluster.dtype=bfloat16"]).cluster.dtype == "bfloat16"
    assert load_config("flower102", []).cluster.dtype == "bfloat16"


def test_gpus_compute_in_bf16():
    with pytest.raises(UserError, match=r"cluster\.dtype is float32 but cluster\.device is cuda"):
        load_config("flower102", ["cluster.dtype=float32"])


@pytest.mark.parametrize(
    ("distribution", "attention"),
    [("flash_attn-2.8.3", "flash_attention_2"), ("flash_attn_4-4.0", "sdpa"), (None, "sdpa")],
)
def test_flash_attention_is_known_by_its_distribution(tmp_path, monkeypatch, distribution, attention):
    """flash-attn-4 brings a package of the same name, which transformers refuses as flash_attention_2."""
    if distribution:
        name, _, version = distribution.rpartition("-")
        info = tmp_path / f"{distribution}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert hardware("cuda").attention["vision_config"] == attention
    assert hardware("cpu").attention["vision_config"] == "matrix_or_sdpa"


def test_processes_on_cpus_keep_freed_memory():
    kept = malloc_environment("cpu")
    assert kept["MALLOC_MMAP_MAX_"] == "0" and int(kept["MALLOC_TRIM_THRESHOLD_"]) > 2**60
    assert malloc_environment("cuda") == {}


@pytest.mark.parametrize("folder", ["plain", "with a space"])
def test_a_library_is_loaded_before_all_others(folder, tmp_path):
    library = tmp_path / folder / "libiomp5.so"
    library.parent.mkdir()
    library.symlink_to(Path(sys.prefix) / "lib" / "libiomp5.so")
    loaded = "print(any('libiomp5' in line for line in open('/proc/self/maps')))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", loaded], env=preloaded(library), capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_note_of_the_openmp_runtime_is_removed():
    note = Path(f"/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}")
    note.touch()
    for _ in range(2):  # without one nothing happens
        forget_openmp()
        assert not note.exists()


def with_openmp(script: str) -> str:
    """What a program prints that has Intel's OpenMP runtime without settings. It must succeed within two minutes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}
    environment |= openmp_environment("cpu") | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(not openmp_environment("cpu"), reason="Intel's OpenMP runtime is not installed")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_program_that_is_started_after_a_parallel_loop_keeps_all_cores():
    """As Ray starts its processes: with a function before the program, so by a fork."""
    script = (
        "import os, subprocess, rft_cluster, torch\n"
        "torch.ones(600, 600) @ torch.ones(600, 600)\n"
        "program = ['python3', '-c', 'import os; print(os.sched_getaffinity(0))']\n"
        "print(os.sched_getaffinity(0))\n"
        "print(subprocess.run(program, preexec_fn=lambda: None, capture_output=True, text=True).stdout.strip())\n"
    )
    own, child = with_openmp(script).splitlines()
    assert child == own


@pytest.mark.skipif(not openmp_environment("cpu"), reason="Intel's OpenMP runtime is not installed")
def test_a_forked_child_computes_too():
    """As a user's reward may, with multiprocessing. Without the runtime's own care of forks it would wait for ever."""
    script = (
        "import os, rft_cluster, torch\n"
        "torch.ones(600, 600) @ torch.ones(600, 600)\n"
        "if child := os.fork():\n"
        "    raise SystemExit(os.waitpid(child, 0)[1])\n"
        "torch.ones(600, 600) @ torch.ones(600, 600)\n"
        "os._exit(0)\n"
    )
    with_openmp(script)
