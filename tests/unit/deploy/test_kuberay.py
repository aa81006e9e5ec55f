"""deploy/kuberay against KubeRay's own definitions, strictly: an unknown field is an error.

`rayjob-1.7.0.json.gz` is the schema of RayJob, version v1, of KubeRay 1.7.0's ray.io_rayjobs.yaml (sha256 01a5cf3b...)
without its descriptions. It holds the whole specification of pods, with the one of volume claims in it.
"""

import gzip
import importlib.util
import json
import shlex
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kuberay"
EXAMPLES = ("one_gpu.yaml", "eight_and_eight.yaml")


def strict(schema: Any) -> Any:
    """Kubernetes' dialect as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if key not in ("format", "properties")}
    if "properties" in schema:
        made["properties"] = {name: strict(one) for name, one in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        made["type"] = [schema["type"], "null"]
    return made


@cache
def definition() -> dict[str, Any]:
    schema = strict(json.loads(gzip.decompress((Path(__file__).parent / "rayjob-1.7.0.json.gz").read_bytes())))
    # Kubernetes checks metadata itself.
    kinds = {"name": {"type": "string"}, "labels": {"type": "object", "additionalProperties": {"type": "string"}}}
    schema["properties"]["metadata"] = {"type": "object", "properties": kinds, "additionalProperties": False}
    return schema


def problems(document: Any, schema: dict[str, Any] | None = None) -> list[str]:
    found = jsonschema.Draft7Validator(schema or definition()).iter_errors(document)
    return ["/".join(map(str, error.absolute_path)) + ": " + error.message for error in found]


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(name: str = EXAMPLES[1]) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def worker(job: dict[str, Any]) -> dict[str, Any]:
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_is_what_its_first_line_makes_and_kuberay_knows_every_field(make, capsys, name: str):
    text = (FOLDER / name).read_text()
    made = text.splitlines()[0].removeprefix("# Made by: python deploy/kuberay/make.py ")
    assert make.main(shlex.split(made)) == 0
    assert capsys.readouterr().out == text, f"python deploy/kuberay/make.py {made} > deploy/kuberay/{name}"
    assert problems(example(name)) == []


def change(job: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at `path`; None removes it."""
    job = deepcopy(job)
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
    place: Any = job
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return job


POD = "spec/rayClusterSpec/headGroupSpec/template/spec"
MISTAKES = [
    ("spec/shutdownAfterJobFinish", True, "spec: Additional properties"),
    ("spec/backoffLimit", "3", "spec/backoffLimit: '3' is not of type 'integer'"),
    ("spec/rayClusterSpec/authOptions/mode", "tokens", "authOptions/mode: 'tokens' is not one of"),
    (f"{POD}/terminationGracePeriod", 180, "template/spec: Additional properties"),
    (f"{POD}/containers/0/resources/limit", {"cpu": 2}, "containers/0/resources: Additional properties"),
    (f"{POD}/containers/0/volumeMounts/0/mountPath", None, "'mountPath' is a required property"),
    ("spec/rayClusterSpec/workerGroupSpecs/0/groupName", None, "'groupName' is a required property"),
]


@pytest.mark.parametrize(("path", "value", "said"), MISTAKES, ids=[path.rpartition("/")[2] for path, *_ in MISTAKES])
def test_each_planted_mistake_is_found(path: str, value: Any, said: str):
    [found] = problems(change(example(), path, value))
    assert said in found


def test_the_claim_is_a_claim_that_all_nodes_write_to():
    pods = definition()["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]["headGroupSpec"]
    volume = pods["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    schema = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    claim = yaml.safe_load((FOLDER / "claim.yaml").read_text())
    assert problems(claim["spec"], schema) == []
    assert problems({**claim["spec"], "accessMode": []}, schema)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (example()["spec"]["rayClusterSpec"]["headGroupSpec"], worker(example())):
        [runs] = [volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "runs"]
        assert runs["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_a_node_that_is_taken_away_has_time_to_leave():
    """Kubernetes must not kill it while Ray drains it, nor Ray a driver that saves."""
    variables = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["env_vars"]
    for group in (example()["spec"]["rayClusterSpec"]["headGroupSpec"], worker(example())):
        pod = group["template"]["spec"]
        environment = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) < drain < pod["terminationGracePeriodSeconds"]
        assert environment.items() >= variables.items()


def test_a_head_whose_node_does_not_answer_is_given_up_before_kuberay_gives_up_the_run():
    """KubeRay 1.7.0 waits for 300 s, as Kubernetes does without these."""
    head = example()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    for toleration, reason in zip(head["tolerations"], ("unreachable", "not-ready"), strict=True):
        assert toleration["key"] == f"node.kubernetes.io/{reason}"
        assert (toleration["operator"], toleration["effect"]) == ("Exists", "NoExecute")
        assert toleration["tolerationSeconds"] == 30
    assert [one["key"] for one in worker(example())["template"]["spec"]["tolerations"]] == ["nvidia.com/gpu"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_driver_waits_for_all_nodes_with_what_is_in_the_image(name: str):
    """Its head may be a new one, which the workers have not joined yet."""
    job = example(name)
    python, script, nodes, *driver = job["spec"]["entrypoint"].split()
    assert (python, int(nodes)) == ("python", 1 + worker(job)["replicas"])
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    assert "\nWORKDIR /app\n" in dockerfile and "\nCOPY deploy deploy\n" in dockerfile
    assert (ROOT / Path(script).relative_to("/app")).is_file()
    assert driver[:3] == ["python", "-m", "rft_cluster.launch"] and "--resume=auto" in driver


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_image_that_was_built_anew_under_its_tag_is_pulled(name: str):
    """Else a node goes on with the one it has: Kubernetes does so for every tag but `latest`."""
    for group in (example(name)["spec"]["rayClusterSpec"]["headGroupSpec"], worker(example(name))):
        assert [one["imagePullPolicy"] for one in group["template"]["spec"]["containers"]] == ["Always"]


def test_ray_is_the_one_of_the_package_and_of_the_image():
    ray = example()["spec"]["rayClusterSpec"]["rayVersion"]
    assert f'"ray[default]>={ray},' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["flower102"], {"cpu": "34", "memory": "256Gi", "nvidia.com/gpu": "8"}),
        (["flower102", "--nodes", "3"], {"cpu": "14", "memory": "96Gi", "nvidia.com/gpu": "3"}),
        (["flower102_1gpu"], {"cpu": "10", "memory": "86Gi", "nvidia.com/gpu": "1"}),
        (["flower102_24gb"], {"cpu": "10", "memory": "42Gi", "nvidia.com/gpu": "1"}),
        (["digits_gpu"], {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "1"}),
        (["digits"], {"cpu": "4", "memory": "32Gi"}),
    ],
)
def test_nodes_are_as_large_as_the_run_needs(make, capsys, words: list[str], size: dict[str, str]):
    assert make.main(words) == 0
    job = yaml.safe_load(capsys.readouterr().out)
    assert problems(job) == []
    pod = worker(job)["template"]["spec"]
    assert pod["containers"][0]["resources"] == {"limits": size, "requests": size}
    assert pod["containers"][0]["image"].endswith("gpu" if "nvidia.com/gpu" in size else "cpu")
    assert ("tolerations" in pod) == ("nvidia.com/gpu" in size)


def test_a_queue_is_a_label(make, capsys):
    assert make.main(["flower102", "--kueue", "a-team"]) == 0
    job = yaml.safe_load(capsys.readouterr().out)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "a-team"}
    assert job["spec"]["shutdownAfterJobFinishes"], "Kueue asks for it"
    assert make.main(["flower102", "--volcano", "a-team"]) == 0
    assert "volcano.sh/queue-name: a-team" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flower102", f"run.name={'a' * 48}"], "at most 47"),
        (["flower102", "run.name=8-gpus"], "the first of a-z"),
        (["flower102", "--kueue", "a b"], "no name of a queue"),
        (["flower102", "data.path=$HOME/photos"], "a shell would take"),
        (["flower102", "--nodes", "9"], "has 8 actors"),
        (["flower102", "learner.count=8"], "learners"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_here(make, capsys, words: list[str], said: str):
    assert make.main(words) == 2
    told = capsys.readouterr()
    assert said in told.err and told.out == ""
