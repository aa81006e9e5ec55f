"""What a run needs of this machine and of the cluster that it would join; with a configuration, its model and data.

Each check calls a function that a launch calls, too, so both say the same.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

from rft_cluster.cluster.gpus import check_driver, driver_here
from rft_cluster.cluster.machine import (
    address_here,
    check_machine,
    check_ray_folder,
    memory_here,
    ray_folder,
    shared_memory_note,
)
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import check_home, size
from rft_cluster.common.hardware import native_dtype
from rft_cluster.common.network import address_on, check_own_ports, interface_of
from rft_cluster.config import ClusterSection, Config
from rft_cluster.doctor.finding import Finding, finding_of, warning
from rft_cluster.doctor.packages import EXTRAS, setup_command

GIB = 2**30
FULL = 0.95  # of a disk: from there on Ray refuses to move what does not fit into its object store
# NVIDIA's advice for containers (docker run --shm-size=1g): NCCL and vLLM's workers exchange data there.
LEAST_SHARED = GIB
SCRIPT = Path(__file__).parents[2] / "deploy" / "check_machine.py"


def check_this_machine(device: str, config: Config | None) -> Iterator[Finding]:
    """`device`: "cpu" or "cuda"; a configuration's own."""
    cluster = config.cluster if config else ClusterSection(device=device)
    if (home := finding_of("home", _home)).status == "error":  # nearly all others look for something there
        yield home
        return
    for name, check in (
        ("system", partial(_system, device)),
        ("processor", partial(_processor, device)),
        ("memory", _memory),
        ("gpu", partial(_gpu, device)),
        ("shared memory", partial(_shared_memory, cluster)),
        ("disk", partial(_disk, config)),
        ("network", partial(_network, cluster)),
        ("ray", partial(_ray, cluster, config)),
    ):
        yield finding_of(name, check)
    if config:
        yield from _run(config)


def _home() -> str:
    check_home()
    return str(Path.home())


def _system(device: str) -> str | Finding:
    """Libraries, the compiler for Triton, the processor's instructions: the checks of the set-up."""
    if not SCRIPT.is_file():
        return warning("system", f"not checked: {SCRIPT} is not here; run the doctor where the source is")
    script, extras = _loaded(SCRIPT), [*EXTRAS[device]]
    lacks = script.missing_libraries() + script.missing_compiler(sys.executable, extras)
    if unfit := script.said(lacks, script.unfit_machine(extras)):
        raise UserError(unfit)
    return f"libraries{', compiler' if device == 'cuda' else ''} and instructions are there"


def _loaded(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _processor(device: str) -> str:
    cores = os.cpu_count() or 1
    dtype = native_dtype("cpu")
    how = f", computes in {dtype}" + ("" if dtype == "bfloat16" else ", as it has no BF16 instructions")
    return f"{cores} core{'s' * (cores > 1)}{how if device == 'cpu' else ''}"


def _memory() -> str:
    import psutil

    return f"{memory_here() / GIB:.1f} GiB, {psutil.virtual_memory().available / GIB:.1f} of them free"


def _gpu(device: str) -> str | Finding:
    try:
        driver = driver_here()
    except UserError as error:
        if device == "cpu":
            return warning("gpu", f"none is needed: this environment is for CPUs. But {error}")
        raise
    if device == "cpu":
        if driver and driver.gpus:
            text = f"{len(driver.gpus)} x {driver.gpus[0].name} is not used by this environment, which is for CPUs: "
            return warning("gpu", text + setup_command("cuda"))
        return "none here, and none needed: this environment is for CPUs"
    check_driver("this machine", driver)
    assert driver
    if not driver.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(f"none is visible: CUDA_VISIBLE_DEVICES is {visible!r}. Unset it, or name GPUs that there are")
    cards = [
        f"{gpu.name}{'' if gpu.memory == sys.maxsize else f' with {gpu.memory / GIB:.1f} GiB'}, compute capability "
        f"{gpu.capability[0]}.{gpu.capability[1]}"
        for gpu in driver.gpus
    ]
    counted = "; ".join(f"{cards.count(card)} x {card}" for card in dict.fromkeys(cards))
    return f"{counted}; driver {driver.version}, CUDA up to {driver.cuda // 1000}.{driver.cuda % 1000 // 10}"


def _shared_memory(cluster: ClusterSection) -> str | Finding:
    if note := shared_memory_note(cluster):
        return warning("shared memory", note.removeprefix("note: "))
    whole = shutil.disk_usage("/dev/shm").total
    if cluster.device == "cuda" and whole < LEAST_SHARED:
        text = f"/dev/shm has {size(whole)}: NCCL and vLLM's workers need more: start the container with --shm-size=1g"
        return warning("shared memory", text)
    return f"/dev/shm has {size(whole)}"


def _disk(config: Config | None) -> str | Finding:
    """Of the runs and of Ray."""
    disks: dict[int, tuple[Path, int, int]] = {}
    for folder in (config.run_folder if config else Path("runs"), Path(ray_folder())):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        usage = shutil.disk_usage(there)
        disks.setdefault(there.stat().st_dev, (folder, usage.used, usage.free))
    told = ", ".join(f"{size(free)} free for {folder}" for folder, _, free in disks.values())
    if any(free < (1 - FULL) * (used + free) for _, used, free in disks.values()):
        full = f"{100 * FULL:.0f} %"
        return warning("disk", f"{told}: over {full} are used, and Ray writes no more to such a disk. Free some space")
    return told


def _network(cluster: ClusterSection) -> str:
    if cluster.interface:
        interface, address = cluster.interface, address_on(cluster.interface)
    else:
        address = address_here()
        interface = interface_of(address)
    check_own_ports(address)
    met = "Ray, gloo and NCCL meet" if cluster.device == "cuda" else "Ray and gloo meet"
    return f"{address} ({interface}), where {met} other hosts; a port that is opened there is reached"


def _ray(cluster: ClusterSection, config: Config | None) -> str:
    from rft_cluster.cluster.start import check_cluster, describe_cluster

    check_ray_folder(cluster)
    if not cluster.joins:
        return f"a run starts it here, in {ray_folder()} (neither RAY_ADDRESS nor cluster.address is set)"
    return check_cluster(config) if config else describe_cluster(cluster)


# With a configuration


def _run(config: Config) -> Iterator[Finding]:
    for name, check in (
        ("run", partial(_folder_and_trackers, config)),
        ("plan", partial(_plan, config)),
        ("model", partial(_model, config)),
        ("data", partial(_data, config)),
    ):
        yield finding_of(name, check)


def _folder_and_trackers(config: Config) -> str:
    from rft_cluster.run.preflight import check_deadlines, check_run_folder, check_unread
    from rft_cluster.tracking.start import check_tracking

    check_deadlines(config)
    check_run_folder(config)
    check_unread(config)
    check_tracking(config)
    return f"{config.run_folder} can be written"


def _plan(config: Config) -> str | Finding:
    if note := check_machine(config):
        return warning("plan", note.removeprefix("note: "))
    where = "its nodes are asked above" if config.cluster.joins else "this machine has them"
    return (
        f"{config.learners.count} learners and {config.generators.count} generators on {config.cluster.device}: {where}"
    )


def _model(config: Config) -> str:
    from rft_cluster.model.folder import read_shapes
    from rft_cluster.model.hub import check_files
    from rft_cluster.plan.check import check_memory
    from rft_cluster.run.preflight import check_disk, check_paths

    model = check_paths(config, config.model.path)
    if model is None:
        return "tiny: it is built here when it is first used, in a minute"
    check_memory(config, read_shapes(model.folder))
    disk = check_disk(config, check_files(model, config.max_model_tokens))
    return f"{model.note or model.folder}; {disk}"


def _data(config: Config) -> str | Finding:
    from rft_cluster.data.official import size_to_download
    from rft_cluster.run.planned import archive_is_missing
    from rft_cluster.run.task import prepare_run

    if archive_is_missing(config):
        return warning("data", f"the run first downloads the official Flower102 archive, {size_to_download()}")
    task = prepare_run(config)
    also = f"; also tested: {task.also.dataset.described()}" if task.also else ""
    return f"{task.dataset.described()}{also}"
