"""Make the RayJob of a run: python deploy/kuberay/make.py CONFIG [section.key=value ...] | kubectl apply -f -

Checks the configuration and how its actors fit onto the nodes, as a launch does, and prints deploy/kuberay/base.yaml
with name, command, GPUs, CPUs and memory filled in. docs/deploy.md says what the cluster must have.
"""

import argparse
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from rft_cluster.cluster.placement import NodeResources, bundles, needed, place
from rft_cluster.common.errors import NoRoom, UserError, check_range, exit_code
from rft_cluster.config import Config, load_config

BASE = Path(__file__).parent / "base.yaml"
LONGEST_NAME = 47  # of a RayJob: KubeRay appends to it for its clusters, pods and services
GRACE = 70  # seconds to save, of RAY_JOB_STOP_WAIT_TIME_S
WHEN_READY = "/app/deploy/when_ready.py"  # in the image, see deploy/docker/Dockerfile
NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
QUEUE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
QUEUES = {"kueue": "kueue.x-k8s.io/queue-name", "volcano": "volcano.sh/queue-name"}
RAY_ITSELF = 2  # CPUs of a node for Ray's own processes
# GiB of a worker for each GPU, and of a worker without GPUs (estimated, never measured). Beside one GPU more is needed
# while the learners' state is saved, in two copies: so much more for a 2B model, that the second copy fits into Ray's
# object store; and for one with LoRA. A larger model needs more.
MEMORY, SAVING, SAVING_LORA = 32, 54, 10
# Ray takes 30 % of a node's memory for its object store, which needs as much room in /dev/shm.
SHARED_MEMORY = 0.375


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/kuberay/make.py", description=__doc__)
    parser.add_argument("config", help="a name in configs/, or a file that has the same path in the image")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the config")
    parser.add_argument("--nodes", type=int, default=1, help="worker pods, one on each machine (1)")
    parser.add_argument("--image", help="with this code and its packages (rft_cluster:gpu, or :cpu for a run on CPUs)")
    parser.add_argument("--name", default="", help="of the RayJob (run.name)")
    for scheduler, label in QUEUES.items():
        parser.add_argument(f"--{scheduler}", metavar="QUEUE", help=f"the label {label}")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_intermixed_args(words)
    return exit_code(lambda: print(manifest(options, words), end=""))


def manifest(options: argparse.Namespace, words: list[str]) -> str:
    """The RayJob as YAML, with the command that made it in the first line.

    Raises:
        UserError: the configuration is wrong, its actors do not fit onto the nodes, or a name is none for Kubernetes.
    """
    check_range("--nodes", options.nodes, 1, 10_000)
    config = load_config(options.config, options.overrides)
    job = json.loads(json.dumps(yaml.safe_load(BASE.read_text())))  # no part of it is shared
    job["metadata"]["name"] = job_name(options.name or config.run.name)
    job["metadata"]["labels"] = queue_labels(vars(options))
    job["spec"]["entrypoint"] = entrypoint(options.config, options.overrides, options.nodes)
    cluster = job["spec"]["rayClusterSpec"]
    [worker] = cluster["workerGroupSpecs"]
    worker |= dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), options.nodes)
    cpus, gpus = node_size(config, options.nodes)
    image = options.image or f"rft_cluster:{'gpu' if gpus else 'cpu'}"
    for group in (cluster["headGroupSpec"], worker):
        group["template"]["spec"]["containers"][0]["image"] = image
    fill_worker(worker["template"]["spec"], cpus, gpus, saving_of(config) if gpus else 0)
    made = f"# Made by: python deploy/kuberay/make.py {shlex.join(words)}\n"
    return made + yaml.safe_dump(job, sort_keys=False, width=120)


def job_name(wanted: str) -> str:
    name = re.sub(r"[._]", "-", wanted.lower())
    if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        raise UserError(
            f"{name} is no name for a RayJob: at most {LONGEST_NAME} of a-z, 0-9 and -, the first of a-z, the last no "
            f"-. Set another by --name"
        )
    return name


def queue_labels(options: dict[str, Any]) -> dict[str, str]:
    labels = {label: options[scheduler] for scheduler, label in QUEUES.items() if options[scheduler] is not None}
    for queue in labels.values():
        if not QUEUE.fullmatch(queue):
            raise UserError(f"{queue!r} is no name of a queue: at most 63 of a-z, 0-9, - and .")
    return labels


def entrypoint(config: str, overrides: list[str], workers: int) -> str:
    """The driver's command, which a shell in the submitter's pod reads, and another one on the head.

    It waits for all nodes: the driver is submitted again to a head that was lost, before the workers have found that.
    """
    for word in (config, *overrides):
        if shlex.quote(word) != word:
            raise UserError(
                f"{word} has a character that a shell would take for its own, and it passes two of them: set this "
                f"value in a file that is in the image"
            )
    fixed = ["--resume=auto", "run.folder=/runs", "cluster.address=auto", f"cluster.grace_seconds={GRACE}"]
    ready = f"python {WHEN_READY} {workers + 1}"  # the head is a node, too
    return " ".join([ready, "python -m rft_cluster.launch --config", config, *fixed, *overrides])


def node_size(config: Config, nodes: int) -> tuple[int, int]:
    """(CPUs, GPUs) of the smallest equal nodes that hold the run.

    Raises:
        UserError: there are more nodes than actors.
        NoRoom: the GPUs of an actor are on no node together.
    """
    if nodes > len(bundles(config)):
        raise UserError(f"--nodes is {nodes}: the run has {len(bundles(config))} actors that need a node")
    cpus, gpus = (math.ceil(total / nodes) for total in needed(config))
    while True:
        try:
            place(config, [NodeResources(str(i), f"node {i}", cpus, gpus) for i in range(nodes)])
            return cpus, gpus
        except NoRoom:
            if cpus >= needed(config)[0]:
                raise
            cpus += 1


def saving_of(config: Config) -> int:
    """GiB beyond `MEMORY` that a worker with one GPU needs."""
    if config.model.path == "tiny":
        return 0
    return SAVING_LORA if config.model.lora else SAVING


def fill_worker(pod: dict[str, Any], cpus: int, gpus: int, saving: int) -> None:
    memory = max(MEMORY * gpus, MEMORY + saving)
    size = {"cpu": str(cpus + RAY_ITSELF), "memory": f"{memory}Gi"}
    if gpus:
        size["nvidia.com/gpu"] = str(gpus)
    else:
        del pod["tolerations"]
    pod["containers"][0]["resources"] = {"limits": size, "requests": dict(size)}
    [shared_memory] = [volume for volume in pod["volumes"] if volume["name"] == "shared-memory"]
    shared_memory["emptyDir"]["sizeLimit"] = f"{math.ceil(SHARED_MEMORY * memory)}Gi"


if __name__ == "__main__":
    sys.exit(main())
