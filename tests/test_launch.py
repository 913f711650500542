"""What `clipkit launch` would start, and what it starts; manifests against facts of the Kubernetes API."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit import config as configuration
from clipkit import launch
from tests.launch import schema
from tests.typed import run, well, wrong

SCRIPTS = Path(__file__).parents[1] / "launch"
IMAGE = "registry.example/clipkit:1"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHON", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def line(*words: str) -> str:
    """The dry run, with the scripts' folder and the interpreter left out."""
    printed = well("launch", *words, "--dry-run").rstrip("\n")
    return printed.replace(f"PYTHON={sys.executable} ", "").replace(f"{SCRIPTS}/", "").replace(str(SCRIPTS), "HERE")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("debug", "bash local.sh debug"),
        ("debug --gpus 2 seed=1 --resume", "bash local.sh -n 2 debug seed=1 --resume"),
        ("debug --gpus 0", "bash local.sh -n 1 debug"),
        ("debug --on torchrun", "NNODES=1 bash torchrun.sh debug"),
        (
            "debug --on torchrun --nodes 2 --gpus 8 --address node1",
            "NNODES=2 MASTER_ADDR=node1 MASTER_PORT=29400 NPROC=8 bash torchrun.sh debug",
        ),
        (
            "debug --on torchrun --nodes 2 --address node1:7000 --resume",
            "NNODES=2 MASTER_ADDR=node1 MASTER_PORT=7000 bash torchrun.sh debug --resume",
        ),
        ("debug --on deepspeed", "bash deepspeed.sh debug"),
        ("debug --on deepspeed --gpus 4", "bash deepspeed.sh -n 4 debug"),
        (
            "debug --on slurm --nodes 4 --gpus 8 --sbatch --time=24:00:00 --sbatch --array=0-2 seed={array}",
            "CLIPKIT_LAUNCH=HERE sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 --array=0-2 "
            "slurm.sh debug 'seed={array}'",
        ),
        ("debug --on slurm --gpus 0", "CLIPKIT_LAUNCH=HERE sbatch --nodes=1 --ntasks-per-node=1 slurm.sh debug"),
    ],
)
def test_a_dry_run_prints_the_command_line(words: str, expected: str) -> None:
    assert line(*words.split()) == expected


def test_the_masters_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert "MASTER_ADDR=node7 MASTER_PORT=1234 bash" in line("debug", "--on", "torchrun", "--nodes", "2")


def test_a_hostfile_says_which_nodes(tmp_path: Path) -> None:
    hosts = tmp_path / "my hosts"
    hosts.write_text("# two\nnode1 slots=8\n\nnode2 slots=8 # the other\n")
    expected = f"bash deepspeed.sh -H '{hosts}' debug"
    assert line("debug", "--on", "deepspeed", "--hostfile", str(hosts)) == expected
    assert line("debug", "--on", "deepspeed", "--hostfile", str(hosts), "--nodes", "2", "--gpus", "8") == expected
    few = wrong("launch", "debug", "--on", "deepspeed", "--hostfile", hosts, "--nodes", "3", "--dry-run")
    assert "has 2 hosts, --nodes says 3" in few
    assert "node1 has 8 slots, --gpus says 4" in wrong(
        "launch", "debug", "--on", "deepspeed", "--hostfile", hosts, "--gpus", "4"
    )
    hosts.write_text("node1 slots=1\nnode2 slots=1\nnode3 slots=1\n")
    assert "batch_size: 32 pairs cannot be split evenly over 3 ranks" in wrong(
        "launch", "debug", "--on", "deepspeed", "--hostfile", hosts, "--dry-run"
    )
    hosts.write_text("node1 8\n")
    assert "line 1: is written `HOST slots=GPUS`, found 'node1 8'" in wrong(
        "launch", "debug", "--on", "deepspeed", "--hostfile", hosts
    )


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("node1 slots=4", "line 2: names node1 again; give it one line with all its slots"),
        ("node2 slots=0", "line 2: node2 has 0 slots; give it 1 or more, or no line"),
    ],
)
def test_a_hostfile_that_cannot_be_followed(second: str, said: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"node1 slots=4\n{second}\n")
    assert said in wrong("launch", "debug", "--on", "deepspeed", "--hostfile", hosts, "--dry-run")


@pytest.mark.parametrize("place", ["local", "deepspeed"])
def test_the_gpus_here_share_the_batch_out(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without --gpus the scripts start one rank a GPU."""
    lists = tmp_path / "nvidia-smi"
    lists.write_text("#!/bin/sh\necho GPU 0\necho GPU 1\necho GPU 2\n")
    lists.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = wrong("launch", "debug", "--on", place, "--dry-run")
    assert "batch_size: 32 pairs cannot be split evenly over 3 ranks" in said
    assert line("debug", "--on", place, "batch_size=33").endswith("debug batch_size=33")


def test_values_with_spaces_and_quotes_arrive_as_they_were(tmp_path: Path) -> None:
    awkward = """name=it's "a" $HOME; run"""
    interpreter = tmp_path / "my python"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    interpreter.chmod(0o755)
    printed = well("launch", "debug", awkward, "--dry-run").replace(sys.executable, shlex.quote(str(interpreter)))
    arrived = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True).stdout.splitlines()
    assert arrived[-2:] == ["debug", awkward]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("debug --on slrum", "--on slrum: no such place; did you mean slurm?"),
        ("debug sed=7", "sed: no such setting; did you mean seed?"),
        ("nothing", "nothing: no such file"),
        ("debug --nodes 2", "--nodes 2: --on local is this machine alone"),
        ("debug --on torchrun --nodes 2", "--nodes 2: name one of them, where all meet: --address HOST"),
        ("debug --on torchrun --nodes 2 --address a:b", "--address a:b: is written HOST or HOST:PORT"),
        ("debug --on deepspeed --nodes 2", "--nodes 2: name them: --hostfile FILE"),
        ("debug --on deepspeed --hostfile nothing", "nothing: no such hostfile"),
        (
            "debug --gpus 3",
            "batch_size: 32 pairs cannot be split evenly over 3 ranks; change it or the number of ranks",
        ),
        ("debug --gpus 8 engine.accumulate=8", "over 8 ranks in 8 parts each (engine.accumulate)"),
        ("debug --on slurm", "--on slurm: say how many GPUs a node has: --gpus N"),
        ("debug --on slurm --gpus 1 seed={arr}", "seed: should be a whole number"),
        ("debug --on k8s --gpus 8", "--on k8s: name the container image that holds clipkit: --image IMAGE"),
        ("debug --on k8s --gpus 1 --image a seed={array}", "seed: should be a whole number"),
        ("debug --on pytorchjob --gpus 8 --image a", "a single pod needs no PyTorchJob; take --on k8s"),
        ("debug --image a", "--image: belongs to --on k8s or pytorchjob, not local"),
        ("debug --on k8s --sbatch --time=1", "--sbatch: belongs to --on slurm, not k8s"),
    ],
)
def test_what_cannot_be_started_is_refused(words: str, said: str) -> None:
    assert said in wrong("launch", *words.split(), "--dry-run")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--on slurm: sbatch is not installed here; --dry-run prints" in wrong(
        *("launch", "debug", "--on", "slurm", "--gpus", "8")
    )
    assert "--on k8s: kubectl is not installed here" in wrong(
        *("launch", "debug", "--on", "k8s", "--gpus", "8", "--image", IMAGE)
    )


def test_a_command_takes_the_place_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: calls.append(call))
    monkeypatch.setenv("PYTHON", "mine")
    well("launch", "debug", "--on", "torchrun", "--gpus", "2")
    ((program, words, variables),) = calls
    assert program == "bash" and words == ["bash", str(SCRIPTS / "torchrun.sh"), "debug"]
    assert (variables["PYTHON"], variables["NPROC"], variables["NNODES"]) == ("mine", "2", "1")
    assert variables["PATH"] == os.environ["PATH"]


def test_kubectl_gets_the_manifest_and_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/manifest\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ("launch", "debug", "--on", "k8s", "--gpus", "1", "--image", IMAGE)
    well(*words)
    assert (tmp_path / "words").read_text() == "create --filename -\n"
    assert (tmp_path / "manifest").read_text().rstrip("\n") == well(*words, "--dry-run").rstrip("\n")
    kubectl.write_text("#!/bin/sh\necho no cluster >&2\nexit 1\n")
    assert wrong(*words) == "--on k8s: kubectl create: no cluster\n"


def test_scripts_and_manifests_are_in_the_wheel() -> None:
    project = (SCRIPTS.parent / "pyproject.toml").read_text()
    assert '"launch" = "clipkit/_data/launch"' in project.partition("force-include]")[2].partition("\n\n")[0]
    assert launch.folder() == SCRIPTS
    assert {f"{place}.sh" for place in ("local", "torchrun", "deepspeed", "slurm")} <= set(os.listdir(SCRIPTS))


def test_the_installed_scripts_are_found_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(configuration, "data_folders", lambda folder: [tmp_path, SCRIPTS])
    assert launch.folder() == tmp_path


# manifests


def manifest(place: str, *words: str) -> dict[str, dict[str, Any]]:
    """The documents of a dry run, by kind."""
    printed = well("launch", "debug", "--on", place, "--image", IMAGE, *words, "--dry-run")
    assert "${" not in printed
    documents = list(yaml.safe_load_all(printed))
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents}


FIELDS = {
    "Job": {
        *("completionMode", "completions", "parallelism", "backoffLimitPerIndex", "maxFailedIndexes"),
        *("podReplacementPolicy", "podFailurePolicy", "template"),
    },
    "PyTorchJob": {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"},
    "Service": {"clusterIP", "publishNotReadyAddresses", "selector", "ports"},
    "pod": {"subdomain", "restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"},
    "container": {"name", "image", "workingDir", "command", "env", "ports", "resources", "volumeMounts"},
}
"""Those of the API's that are used, so that a misspelt one is seen."""


def check_names(document: dict[str, Any]) -> None:
    """Names are DNS labels that leave room for what controllers put behind them; label values are short words."""
    metadata = document["metadata"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?", metadata["name"])
    for value in metadata["labels"].values():
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)


def check_pod(template: dict[str, Any], gpus: int) -> dict[str, Any]:
    """A pod template's facts; returns its one container."""
    pod = template["spec"]
    assert set(pod) <= FIELDS["pod"]
    (container,) = pod["containers"]
    assert set(container) <= FIELDS["container"] and container["image"] == IMAGE
    assert all(isinstance(word, str) for word in container["command"])
    names = [variable["name"] for variable in container["env"]]
    assert len(set(names)) == len(names)
    for variable in container["env"]:
        assert len(variable) == 2 and isinstance(variable.get("value", ""), str)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert all(len(volume) == 2 for volume in volumes.values())  # a name and one source
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert len(mounts) == len(container["volumeMounts"]) == len(volumes)
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    for path, claim in {"/workspace/data": "clipkit-data", "/workspace/runs": "clipkit-runs"}.items():
        assert mounts[path]["persistentVolumeClaim"]["claimName"] == claim
    assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] or 0) < pod["terminationGracePeriodSeconds"]
    return container


def check_command(documents: dict[str, dict[str, Any]], container: dict[str, Any], tmp_path: Path) -> str:
    """What a pod's command starts, with the config that travels in the manifest."""
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["config"]
    (key,) = documents["ConfigMap"]["data"]
    (tmp_path / key).write_text(documents["ConfigMap"]["data"][key])
    program, *words = (word.replace(f"{mounted}/", f"{tmp_path}/") for word in container["command"])
    assert program == "clipkit"
    return well(*words, "--dry-run")


def check_rule(rule: dict[str, Any], containers: set[str]) -> None:
    """A rule of a pod failure policy asks one thing; exit codes are sorted, each once, and never 0."""
    assert rule["action"] in {"Ignore", "FailJob", "FailIndex", "Count"} and len(rule) == 2
    for condition in rule.get("onPodConditions", []):
        assert condition == {"type": "DisruptionTarget", "status": "True"}
    if codes := rule.get("onExitCodes"):
        assert set(codes) == {"containerName", "operator", "values"} and codes["operator"] == "In"
        assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
        assert codes["containerName"] in containers


def decided(job: dict[str, Any], code: int) -> str:
    """What becomes of a pod that ended with `code`: the first rule that fits, else it counts."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", []):
            return rule["action"]
    return "Count"


def test_the_job_is_as_kubernetes_wants_it(tmp_path: Path) -> None:
    documents = manifest("k8s", "--nodes", "4", "--gpus", "2", "name=My Run_1")
    kinds = {"ConfigMap": "v1", "Service": "v1", "Job": "batch/v1"}
    assert {kind: document["apiVersion"] for kind, document in documents.items()} == kinds
    for document in documents.values():
        check_names(document)
        assert document["metadata"]["name"] == "clipkit-my-run-1"
    job, service = documents["Job"]["spec"], documents["Service"]["spec"]
    assert set(job) == FIELDS["Job"] and set(service) == FIELDS["Service"]
    template = job["template"]
    container = check_pod(template, gpus=2)
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == 4
    assert template["spec"]["restartPolicy"] == "Never"  # a failure policy and a limit an index ask for it
    assert job["podReplacementPolicy"] == "Failed" and job["maxFailedIndexes"] <= job["completions"]
    for rule in job["podFailurePolicy"]["rules"]:
        check_rule(rule, {container["name"]})
    # The pods' names: service selects them, and they name the service as their subdomain.
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"] is True
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == documents["Service"]["metadata"]["name"]
    started = check_command(documents, container, tmp_path)
    assert "NNODES=4 MASTER_ADDR=clipkit-my-run-1-0.clipkit-my-run-1 MASTER_PORT=29400 NPROC=2 " in started
    assert started.rstrip().endswith("config.yaml --resume") and service["ports"][0]["port"] == 29400


@pytest.mark.parametrize("place", ["k8s", "pytorchjob"])
def test_every_field_is_one_of_the_api(place: str) -> None:
    for document in manifest(place, "--nodes", "2", "--gpus", "8").values():
        schema.check(document)


@pytest.mark.parametrize("place", ["k8s", "pytorchjob"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda container: container.update(workDir="/"), "no such field: workDir"),
        (lambda container: container.update(command="clipkit"), "command: 'clipkit' is a str"),
        (lambda container: container.pop("name"), "`name`, must not be `None`"),
        (lambda container: container["env"].append({"name": "A", "value": 1}), "value: 1 is a int"),
    ],
)
def test_what_the_api_would_refuse_is_seen(place: str, spoil: Callable[[dict[str, Any]], None], said: str) -> None:
    documents = manifest(place, "--nodes", "2", "--gpus", "8")
    kind = "Job" if place == "k8s" else "PyTorchJob"
    spec = documents[kind]["spec"]
    replica = spec if place == "k8s" else spec["pytorchReplicaSpecs"]["Worker"]
    spoil(replica["template"]["spec"]["containers"][0])
    with pytest.raises(ValueError, match=said):
        schema.check(documents[kind])


@pytest.mark.parametrize(("requeue", "shown"), [(75, [75, 143]), (200, [143, 200]), (143, [143]), (2, [2, 143])])
def test_a_run_that_was_stopped_begins_again(requeue: int, shown: list[int]) -> None:
    job = manifest("k8s", "--gpus", "1", f"guard.requeue_code={requeue}")["Job"]
    assert [decided(job, code) for code in (requeue, 143, 1, 137)] == ["Ignore", "Ignore", "Count", "Count"]
    assert job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == shown
    assert requeue == 2 or decided(job, 2) == "FailJob"  # the user's mistake


def test_the_pytorchjob_is_as_kubeflow_wants_it(tmp_path: Path) -> None:
    documents = manifest("pytorchjob", "--nodes", "4", "--gpus", "8")
    assert set(documents) == {"ConfigMap", "PyTorchJob"}
    for document in documents.values():
        check_names(document)
    job = documents["PyTorchJob"]
    spec = job["spec"]
    assert job["apiVersion"] == "kubeflow.org/v1" and set(spec) == FIELDS["PyTorchJob"]
    assert spec["nprocPerNode"] == "8" and set(spec["runPolicy"]) <= {"backoffLimit", "cleanPodPolicy"}
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 3}
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"} and replica["restartPolicy"] == "OnFailure"
        assert "restartPolicy" not in replica["template"]["spec"]  # the operator would overwrite it
        container = check_pod(replica["template"], gpus=8)
        assert container["name"] == "pytorch"
        started = check_command(documents, container, tmp_path)
        assert "NNODES=4 MASTER_ADDR=clipkit-debug-master-0 MASTER_PORT=29400 NPROC=8 " in started


def test_the_config_travels_whole(tmp_path: Path) -> None:
    settings = ['name="it\'s: #1"', "seed=3", "roots={a: 'b c'}"]
    documents = manifest("k8s", "--gpus", "0", *settings)
    (tmp_path / "config.yaml").write_text(documents["ConfigMap"]["data"]["config.yaml"])
    assert configuration.load(tmp_path / "config.yaml") == configuration.load("debug", settings)
    assert documents["Job"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 0


@pytest.mark.parametrize("name", ["true", "1e5", "-", "Ein_Lauf.2", "x" * 80, "y" * 41 + "-z"])
def test_every_run_has_a_name_that_kubernetes_takes(name: str) -> None:
    for document in manifest("k8s", "--gpus", "1", f"name='{name}'").values():
        check_names(document)


def test_help_teaches_by_examples_that_are_right() -> None:
    examples = re.findall(r"^  clipkit (launch .*)$", well("launch", "--help"), re.MULTILINE)
    assert len(examples) >= 6
    for example in examples:
        words = shlex.split(re.split(r"   |>", example)[0])
        if "--hostfile" not in words:
            assert run(*words, "--dry-run").status == 0, example
