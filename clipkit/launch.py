"""What starts a run on a machine, several, a SLURM or a Kubernetes cluster: a command line, or a manifest.

The scripts and manifests themselves lie in `launch/`, in a checkout or inside the wheel.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from clipkit import config as configuration
from clipkit.checks import check_split
from clipkit.config import Config
from clipkit.errors import UserError, did_you_mean

RENDEZVOUS_PORT = "29400"
NAME_LENGTH = 50
"""Of what is made on Kubernetes: pods put `-worker-63`, or five digits, behind it, and 63 letters are the most."""


@dataclass(frozen=True)
class Request:
    """What was asked for; what a place has no use for is None or empty."""

    config: str
    settings: tuple[str, ...] = ()
    nodes: int | None = None
    gpus: int | None = None
    """Ranks a node, one a GPU; 0: one, without a GPU."""
    resume: bool = False
    address: str | None = None
    hostfile: Path | None = None
    image: str | None = None
    sbatch: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """What `clipkit train` is given."""
        return [self.config, *self.settings, *(["--resume"] if self.resume else [])]

    @property
    def ranks(self) -> int | None:
        """Of a node, where that is known beforehand."""
        return None if self.gpus is None else max(self.gpus, 1)


@dataclass(frozen=True)
class Command:
    """A command line with the variables that are set for it."""

    variables: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.words)])

    def run(self, place: str) -> None:
        """Becomes the command, so that signals reach it. Raises UserError where its program is not installed."""
        _require(self.words[0], place)
        os.execvpe(self.words[0], self.words, os.environ | self.variables)


@dataclass(frozen=True)
class Manifest:
    """YAML documents for a cluster."""

    text: str

    def __str__(self) -> str:
        return self.text.rstrip("\n")

    def run(self, place: str) -> None:
        """Gives it to the cluster that kubectl knows. Raises UserError with what kubectl says against it."""
        _require("kubectl", place)
        done = subprocess.run(
            ["kubectl", "create", "--filename", "-"], input=self.text, text=True, stderr=subprocess.PIPE
        )
        if done.returncode:
            raise UserError(f"--on {place}: kubectl create: {done.stderr.strip()}")


def folder() -> Path:
    """Where scripts and manifests lie: inside the installed wheel, or beside the package in a checkout."""
    return next(path for path in configuration.data_folders("launch") if path.is_dir())


def plan(place: str, request: Request) -> Command | Manifest:
    """What starts the run at `place`, checked. Raises UserError for a place that cannot be served."""
    if place not in PLACES:
        raise UserError(f"--on {place}: no such place{did_you_mean(place, PLACES)}")
    allowed, make = PLACES[place]
    for option in ("address", "hostfile", "image", "sbatch"):
        if getattr(request, option) and option != allowed:
            where = " or ".join(name for name, (own, _) in PLACES.items() if own == option)
            raise UserError(f"--{option}: belongs to --on {where}, not {place}")
    return make(request)


def _checked(request: Request, settings: Sequence[str] | None = None, ranks: int | None = None) -> Config:
    """The config, whose batches the ranks can share out: so many in all, else as many as were asked for, if any were.

    Raises UserError before anything is started or queued.
    """
    config = configuration.load(request.config, list(request.settings if settings is None else settings))
    if ranks is None and request.ranks:
        ranks = (request.nodes or 1) * request.ranks
    if ranks:
        check_split(config, ranks)
    return config


def _script(name: str, request: Request, *options: str, **variables: str) -> Command:
    python = os.environ.get("PYTHON") or sys.executable
    words = ["bash", str(folder() / name), *options, *request.words]
    return Command(variables | {"PYTHON": python}, words)


def local(request: Request) -> Command:
    """All ranks on this machine."""
    if (request.nodes or 1) > 1:
        raise UserError(f"--nodes {request.nodes}: --on local is this machine alone; take torchrun, slurm or k8s")
    _checked(request, ranks=request.ranks or _gpus_here())
    return _script("local.sh", request, *_count(request))


def torchrun(request: Request) -> Command:
    """One node's part; the same line is run on each."""
    _checked(request)
    nodes = request.nodes or 1
    host, _, port = (request.address or os.environ.get("MASTER_ADDR", "")).partition(":")
    if nodes > 1 and not host:
        raise UserError(f"--nodes {nodes}: name one of them, where all meet: --address HOST, or MASTER_ADDR=HOST")
    if port and not port.isdigit():
        raise UserError(f"--address {request.address}: is written HOST or HOST:PORT")
    variables = {"NNODES": str(nodes)}
    if host:
        variables |= {"MASTER_ADDR": host, "MASTER_PORT": port or os.environ.get("MASTER_PORT", RENDEZVOUS_PORT)}
    if request.ranks:
        variables["NPROC"] = str(request.ranks)
    return _script("torchrun.sh", request, **variables)


def deepspeed(request: Request) -> Command:
    """This machine, or all hosts of a hostfile."""
    settings = ["engine.kind=deepspeed", *request.settings]  # in the script's order
    if request.hostfile is None:
        if (request.nodes or 1) > 1:
            raise UserError(f"--nodes {request.nodes}: name them: --hostfile FILE, with a line `HOST slots=GPUS` each")
        _checked(request, settings, request.ranks or _gpus_here())
        return _script("deepspeed.sh", request, *_count(request))
    hosts = _hosts(request.hostfile)
    if request.nodes is not None and request.nodes != len(hosts):
        raise UserError(f"{request.hostfile}: has {len(hosts)} hosts, --nodes says {request.nodes}")
    if different := [host for host, slots in hosts.items() if request.ranks not in (None, slots)]:
        raise UserError(
            f"{request.hostfile}: {different[0]} has {hosts[different[0]]} slots, --gpus says {request.gpus}"
        )
    _checked(request, settings, sum(hosts.values()))
    return _script("deepspeed.sh", request, "-H", str(request.hostfile))


def slurm(request: Request) -> Command:
    """A job: one task a rank."""
    gpus, ranks = _gpus(request, "slurm")
    _checked(request, [item.replace("{array}", "0") for item in request.settings])
    options = [f"--nodes={request.nodes or 1}", f"--ntasks-per-node={ranks}"]
    if gpus:
        options.append(f"--gpus-per-node={gpus}")  # by node, so that every rank sees all of its node's
    script = folder() / "slurm.sh"
    variables = {"CLIPKIT_LAUNCH": str(script.parent), "PYTHON": os.environ.get("PYTHON") or sys.executable}
    # The script itself goes on from the newest checkpoint: SLURM starts it anew after every interruption.
    return Command(variables, ["sbatch", *options, *request.sbatch, str(script), request.config, *request.settings])


def k8s(request: Request) -> Manifest:
    """An Indexed Job: one pod a node."""
    return _manifest("k8s", request)


def pytorchjob(request: Request) -> Manifest:
    """A PyTorchJob of Kubeflow: one pod a node."""
    if (request.nodes or 1) < 2:
        raise UserError("--nodes 1: a single pod needs no PyTorchJob; take --on k8s")
    return _manifest("pytorchjob", request)


PLACES: dict[str, tuple[str | None, Callable[[Request], Command | Manifest]]] = {
    "local": (None, local),
    "torchrun": ("address", torchrun),
    "deepspeed": ("hostfile", deepspeed),
    "slurm": ("sbatch", slurm),
    "k8s": ("image", k8s),
    "pytorchjob": ("image", pytorchjob),
}
"""Place → the one option that only it understands, and what plans a run there."""


def _count(request: Request) -> Sequence[str]:
    return ("-n", str(request.ranks)) if request.ranks else ()


def _gpus_here() -> int:
    """Of this machine, 1 where there are none: the ranks that the scripts start by themselves, counted as they do."""
    if not shutil.which("nvidia-smi"):
        return 1
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return max(len(listed.stdout.splitlines()), 1)


def _gpus(request: Request, place: str) -> tuple[int, int]:
    if request.gpus is None or request.ranks is None:
        raise UserError(f"--on {place}: say how many GPUs a node has: --gpus N (0: one process a node, without GPU)")
    return request.gpus, request.ranks


def _hosts(file: Path) -> dict[str, int]:
    """Host → slots of a DeepSpeed hostfile. Raises UserError for one that its launcher could not follow."""
    if not file.is_file():
        raise UserError(f"{file}: no such hostfile")
    hosts: dict[str, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not found:
            raise UserError(f"{file}, line {number}: is written `HOST slots=GPUS`, found {text!r}")
        if found[1] in hosts:
            raise UserError(f"{file}, line {number}: names {found[1]} again; give it one line with all its slots")
        if int(found[2]) < 1:
            raise UserError(f"{file}, line {number}: {found[1]} has {found[2]} slots; give it 1 or more, or no line")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"{file}: names no host; a line is written `HOST slots=GPUS`")
    return hosts


def _manifest(template: str, request: Request) -> Manifest:
    """The template with the run's own values; the checked config travels inside, with all its settings."""
    gpus, ranks = _gpus(request, template)
    config = _checked(request)
    if not request.image:
        raise UserError(f"--on {template}: name the container image that holds clipkit: --image IMAGE")
    nodes = request.nodes or 1
    block = "|-\n" + "".join(f"    {line}\n" for line in configuration.dump(config).splitlines())
    text = Template((folder() / f"{template}.yaml").read_text()).substitute(
        name=_name(config),
        config=block.rstrip("\n"),
        image=yaml.safe_dump(request.image, default_style='"', width=10_000).strip(),
        nodes=nodes,
        workers=nodes - 1,
        gpus=gpus,
        ranks=ranks,
        backoff=6 * nodes,
        requeue=sorted({config.guard.requeue_code, 143}),  # the API wants them in order, and each once
    )
    return Manifest(text)


def _name(config: Config) -> str:
    """From the run folder's last name, as Kubernetes wants names: letters, digits and hyphens, a letter first."""
    own = re.sub(r"[^a-z0-9]+", "-", f"clipkit {config.run_folder.name.lower()}")
    return own[:NAME_LENGTH].strip("-")


def _require(program: str, place: str) -> None:
    if not shutil.which(program):
        raise UserError(f"--on {place}: {program} is not installed here; --dry-run prints what it would be given")
