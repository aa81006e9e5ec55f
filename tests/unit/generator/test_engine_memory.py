"""vLLM's errors about too little memory, and the messages for the user."""

import pytest

from rft_cluster.common.errors import ClusterError, EngineFailed, UserError, WeightTransferError
from rft_cluster.generator.vllm_options import within_memory

# As vLLM 0.32 and torch word it.
SHORT = [
    ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
    ValueError("To serve at least one request with the model's max seq len (4096), (2.0 GiB KV cache is needed"),
    ValueError("Free memory on device (10/24 GiB) is less than desired GPU memory utilization (0.85)"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    AssertionError(
        "Error in memory profiling. Initial free memory 9.0 GiB, current free memory 10.0 GiB. This happens"
    ),
]


def start(error: Exception) -> None:
    with within_memory():
        raise error


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_short_memory_names_what_to_change(error):
    with pytest.raises(UserError, match=r"^a generator is out of memory \(.*generators.kv_cache_gib") as caught:
        start(error)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [EngineFailed, WeightTransferError, ClusterError])
def test_a_generator_that_is_lost_for_want_of_memory_can_still_be_replaced(kind):
    with pytest.raises(kind):
        start(kind("its engine failed (OutOfMemoryError: CUDA out of memory. Tried to allocate"))


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), RuntimeError("shapes differ"), KeyError("KV cache"), AssertionError()]
)
def test_a_defect_stays_one(error):
    with pytest.raises(type(error)):
        start(error)
