"""launch: the same training, on many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipkit.commands.arguments import ConfigFile, Settings


def launch(
    config: ConfigFile,
    settings: Settings = None,
    place: Annotated[
        str, typer.Option("--on", metavar="PLACE", help="local, torchrun, deepspeed, slurm, k8s or pytorchjob.")
    ] = "local",
    nodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Machines; default 1, with --hostfile its hosts.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, metavar="G", help="Ranks a node, one a GPU; 0: one, on the CPU. Default: all GPUs here."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="torchrun: the node where all meet. Default: $MASTER_ADDR."),
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="deepspeed: the nodes, a line `HOST slots=GPUS` each.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="slurm: one more option of sbatch; several times.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="k8s, pytorchjob: the container image that holds clipkit.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; slurm and Kubernetes always do.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and start nothing.")] = False,
) -> None:
    """Start a training on many processes.

    On this machine, several, SLURM or Kubernetes; the config is checked first. Settings are those of clipkit train.
    With --dry-run the command line or the manifest is printed, to be read, edited and used by hand.

    \b
    clipkit launch degla                                            every GPU here
    clipkit launch debug --gpus 2                                   two ranks, on CPUs too
    clipkit launch degla --on torchrun --nodes 2 --address node1    the same line on both
    clipkit launch degla --on deepspeed --hostfile hosts engine.zero_stage=2
    clipkit launch degla --on slurm --nodes 4 --gpus 8 --sbatch --time=24:00:00
    clipkit launch degla --on slurm --gpus 1 --sbatch --array=0-2 seed={array} out='runs/{name}_{seed}'
    clipkit launch degla --on k8s --nodes 2 --gpus 8 --image registry/clipkit:1
    clipkit launch degla --on k8s --nodes 2 --gpus 8 --image registry/clipkit:1 --dry-run > job.yaml
    """
    from clipkit.launch import Request, plan

    request = Request(
        config,
        tuple(settings or ()),
        nodes=nodes,
        gpus=gpus,
        resume=resume,
        address=address,
        hostfile=hostfile,
        image=image,
        sbatch=tuple(sbatch or ()),
    )
    made = plan(place, request)
    if dry_run:
        print(made)
    else:
        made.run(place)
