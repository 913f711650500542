"""What a run will cost, said before it costs anything: `clipkit plan`.

From what encoding one picture and one text costs (`clipkit.training.cost`), how many of each a step encodes, in which
roles, and how an engine divides weights, gradients and moments among ranks. No picture is read, no weight fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.checks import ROLES, check_split, teacher_roles
from clipkit.config import Config
from clipkit.data import indexing
from clipkit.data.shards import expand
from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.model.towers import blocks
from clipkit.objective import Objective
from clipkit.objective.tables import TILED_FROM
from clipkit.objective.tiled import TILES
from clipkit.settings import DataConfig
from clipkit.training.cost import Cost, encoders, measure, saved_bytes, shapes_only, spec_at, spec_of
from clipkit.training.optim import MOMENTS

FLOAT = 4
"""Bytes of a number in float32, which weights, gradients and moments are."""
BUCKET_BYTES = 500_000_000 * FLOAT
"""Of DeepSpeed's buffer for gradients on their way (its `reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Parameters that DeepSpeed keeps gathered under ZeRO-3 (its `stage3_max_live_parameters`)."""
SMALL, LARGE = (32, 64, 96), (768, 1024, 1280)
"""Pairs that the objective is tried with, for a parabola through them: as matrices, and where it works in tiles."""
IMAGES = ("image", "negative_image", "view_image")


@dataclass(frozen=True)
class Weights:
    """One line of the parameters."""

    part: str
    learning: int
    locked: int
    tensors: int = 0
    """Learning ones."""


class Budget:
    """The costs of `config` on `gpus` ranks, memory per GPU. Raises UserError where the batch cannot be split so."""

    def __init__(self, config: Config, gpus: int):
        self.config, self.gpus = config, gpus
        self.rows = self.pairs_of(config.batch_size) // gpus
        check_split(config, gpus)
        model = config.model
        self.spec, self.scalars = spec_of(model)
        self.locks = (model.lock_image, model.lock_text)
        with shapes_only("cpu"):
            described = encoders(self.spec)
        self.size, self.context = described.size, described.context
        self.cost = measure(
            self.spec, config.engine.precision, locks=self.locks, recompute=config.engine.checkpoint_activations
        )
        self.teacher_roles = teacher_roles(config) if config.teacher.kind in ("ema", "frozen") else ()
        self._parabolas: dict[bool, Any] = {}

    def pairs_of(self, batch_size: int) -> int:
        """Rows of a global batch: alternates bring as many again."""
        return batch_size * (2 if self.config.data.alternates else 1)

    # parameters

    @cached_property
    def weights(self) -> list[Weights]:
        """The student's, by tower."""
        with shapes_only("cpu"):
            model = encoders(self.spec, lock_image=self.locks[0], lock_text=self.locks[1])
        modules = {"image tower": model.image, "image head": model.image_head, "text tower": model.text}
        modules |= {f"head: {name}": head for name, head in model.heads.items()}
        lines = [_counted(part, module) for part, module in modules.items() if list(module.parameters())]
        return [*lines, Weights("scale and bias", self.scalars, 0, self.scalars)]

    @cached_property
    def buffers(self) -> int:
        """Bytes of the student's buffers, such as running statistics."""
        with shapes_only("cpu"):
            model = encoders(self.spec)
            return sum(b.nbytes for m in (model.image, model.image_head, model.text) for b in m.buffers())

    @property
    def learning(self) -> int:
        """Parameters that learn."""
        return sum(line.learning for line in self.weights)

    @cached_property
    def teacher_weights(self) -> int:
        """Parameters of the teacher's own: not those of locked towers, which it shares, nor of towers it leaves out."""
        teacher = self.config.teacher
        if teacher.kind not in ("ema", "frozen"):
            return 0
        spec, scalars = spec_at(teacher.start) if teacher.start else (self.spec, self.scalars)
        with shapes_only("cpu"):
            model = encoders(spec)
        shared = (False, False) if teacher.start else self.locks
        roles = self.teacher_roles
        images = not roles or bool({"image", "negative_image"} & set(roles))
        words = not roles or any(role.endswith("text") for role in roles)
        owned = [module for name, module in model.heads.items() if teacher.start or name not in ("tags", "aspects")]
        owned += [model.image] if images and not shared[0] else []
        owned += [model.image_head] if images else []
        owned += [model.text] if words and not shared[1] else []
        return scalars + sum(p.numel() for module in owned for p in module.parameters())

    # work

    def counts(self, role: str) -> int:
        """Pictures or texts that a pair brings in `role`."""
        data = self.config.data
        given = {
            "negative_text": data.negatives,
            "positive_text": data.positives,
            "negative_image": data.negative_images,
            "view_image": data.views,
        }
        return given.get(role, 1)

    @cached_property
    def flops(self) -> list[tuple[str, int, float, float]]:
        """(what, how many a pair, FLOPs forward, FLOPs backward) a pair, for every role that is encoded and why."""
        config, lines = self.config, []
        for role in (*ROLES, "view_image"):
            if (count := self.counts(role)) and not (role == "image" and config.data.cache_image_features):
                cost = self.cost_of(role)
                lines.append((role, count, count * cost.forward, count * cost.backward))
        if config.engine.accumulate > 1:
            # The trunk's features of a locked tower are made once and shared.
            again = [line for line in lines if not (line[0] == "image" and self.locks[0])]
            lines.append(("again, in parts", sum(n for _, n, _, _ in again), sum(f for _, _, f, _ in again), 0.0))
        if config.adversary.eps:
            image, steps = self.cost["image"], config.adversary.steps
            forward = steps * image.forward + self.cost["text"].forward
            lines.append(("adversary", steps, forward, steps * image.attack))
        return lines + [(f"teacher: {role}", n, forward, 0.0) for role, n, forward in self._teacher_passes()]

    def _teacher_passes(self) -> Iterator[tuple[str, int, float]]:
        config = self.config
        cost = self.cost if not config.teacher.start else measure(spec_at(config.teacher.start)[0])
        for role in self.teacher_roles:
            shared = role == "image" and self.locks[0] and not config.teacher.start  # it gets the student's features
            if (count := self.counts(role)) and not shared:
                yield role, count, count * cost["image" if role in IMAGES else "text"].forward

    def cost_of(self, role: str) -> Cost:
        """Of one picture or text in `role`."""
        return self.cost["image" if role in IMAGES else "text"]

    @property
    def flops_a_sample(self) -> float:
        """All of them, forward and backward."""
        return self.pairs_of(1) * sum(forward + backward for _, _, forward, backward in self.flops)

    # memory

    def memory(self, rows: int | None = None) -> dict[str, int]:
        """Bytes on each GPU by part at the fullest moment of a step, with `rows` pairs there, else the config's."""
        config, learning = self.config, self.learning
        rows = rows or self.rows
        stage = {"ddp": 0, "fsdp": 3, "deepspeed": config.engine.zero_stage}[config.engine.kind]
        locked = sum(line.locked for line in self.weights)
        roles, working, again = self._roles(), 0.0, 0.0
        parts: dict[str, float] = {
            "weights": sharded(learning * FLOAT, self.gpus, stage >= 3) + locked * FLOAT + self.buffers,
            "gradients": sharded(learning * FLOAT, self.gpus, stage >= 2),
            "optimizer moments": sharded(self._moments(), self.gpus, stage >= 1),
            "teacher": sharded(self.teacher_weights * FLOAT, self.gpus, config.engine.kind == "fsdp"),
        } | self._on_their_way()
        if config.engine.offload != "none":
            del parts["optimizer moments"]
        if config.engine.offload == "all":
            parts["weights"] -= sharded(learning * FLOAT, self.gpus, True)
        if config.engine.kind == "deepspeed" and stage and config.engine.offload == "none":
            parts["weights' part for the optimizer"] = sharded(learning * FLOAT, self.gpus, True)
        if config.engine.precision != "fp32":
            parts["weights in half precision"] = sum(cost.casts for cost in self.cost.values())
        part = rows / config.engine.accumulate
        for tower in ("image", "text"):
            encoded = sum(n for role, n in roles.items() if (role in IMAGES) == (tower == "image"))
            parts[f"activations: {tower}"] = part * encoded * self.cost[tower].saved
            working = max(working, part * encoded * self.cost[tower].working)
            again = max(again, part * encoded * self.cost[tower].block)
        if config.engine.checkpoint_activations:
            parts["activations: a block again"] = again
        parts["working memory"] = working
        pixels = sum(n for role, n in roles.items() if role in IMAGES) * 3 * self.size**2
        parts["batch"] = rows * pixels
        return {name: round(size) for name, size in (parts | self._objective(rows * self.gpus)).items()}

    def _on_their_way(self) -> dict[str, float]:
        """What an engine holds in full for a while of what it divides or sums."""
        if self.config.engine.kind == "deepspeed":
            found: dict[str, float] = {"gradients on their way": BUCKET_BYTES}
            if self.config.engine.zero_stage == 3:
                found["weights gathered"] = min(self.learning, LIVE) * FLOAT
            return found
        if self.config.engine.kind == "ddp":
            return {"gradients on their way": self.learning * FLOAT} if self.gpus > 1 else {}  # a copy in its buckets
        rest, block = self._gathered
        # Of blocks the one at work and the next; of the larger group the gradients, and a copy to send.
        return {
            "weights gathered": (rest + 2 * block) * FLOAT,
            "gradients on their way": 2 * max(rest, block) * FLOAT,
        }

    @cached_property
    def _gathered(self) -> tuple[int, int]:
        """Learning parameters outside of blocks, which FSDP gathers at once, and of the largest block."""
        with shapes_only("cpu"):
            model = encoders(self.spec, lock_image=self.locks[0], lock_text=self.locks[1])
            every = [block for tower in (model.image, model.text) for block in blocks(tower)]
            sizes = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in every]
        return self.learning - sum(sizes), max(sizes, default=0)

    def _roles(self) -> dict[str, int]:
        cached = self.config.data.cache_image_features
        return {role: self.counts(role) for role in (*ROLES, "view_image") if not (role == "image" and cached)}

    def _moments(self) -> int:
        """Bytes of the optimizer's state: moments of each parameter, and AdamW's number of steps of each tensor."""
        kind = self.config.optim.kind
        steps = sum(line.tensors for line in self.weights) if kind == "adamw" else 0
        return (self.learning * len(MOMENTS[kind]) + steps) * FLOAT

    def _objective(self, pairs: int) -> dict[str, float]:
        """Of all ranks' embeddings with their gradient, and of what the terms make of them."""
        roles = sum(self.counts(role) for role in (*ROLES, "view_image"))
        table = pairs * self.spec["embed_dim"] * FLOAT
        teacher = sum(self.counts(role) for role in self.teacher_roles)
        tiled = pairs**2 >= TILED_FROM
        found = float(np.polyval(self._parabola(tiled), pairs))
        if tiled:  # a tile, what is made of it, and a copy
            found += 3 * FLOAT * min(TILES["gpu"][0], pairs) * min(TILES["gpu"][1], pairs)
        return {"embeddings of all ranks": table * (2 * roles + teacher), "logits of the terms": max(0.0, found)}

    def _parabola(self, tiled: bool) -> Any:
        """Bytes that autograd keeps of the terms, as a polynomial of the number of pairs."""
        if tiled not in self._parabolas:
            sizes = LARGE if tiled else SMALL
            self._parabolas[tiled] = np.polyfit(sizes, [self.objective_bytes(n) for n in sizes], 2)
        return self._parabolas[tiled]

    def objective_bytes(self, pairs: int) -> int:
        """What autograd keeps of the terms over random embeddings of so many pairs."""
        config, words = self.config, self.spec.get("heads", {}).get("tags", {}).get("words", ())
        z = _embeddings(self, pairs, (*ROLES, "view_image"))
        scale = nn.Module()
        scale.leaves = nn.ParameterList([nn.Parameter(x) for x in z.leaves().values()])
        for name, leaf in zip(z.leaves(), scale.leaves):
            setattr(z, name, leaf)
        z.relevance, z.label = torch.ones(pairs), torch.arange(pairs) % 10
        if words:
            z.tags = torch.rand(pairs, len(words)) < 0.01
        if config.teacher.kind != "none":
            roles = self.teacher_roles or teacher_roles(config)
            z.teacher = _embeddings(self, pairs, roles) if roles else None
        return saved_bytes(lambda: Objective(config.objective)(z), scale)

    def largest(self, memory: float) -> int:
        """The most pairs on each GPU that fit into `memory` bytes, a multiple of engine.accumulate; 0 if none do."""
        parts = self.config.engine.accumulate

        def fits(n: int) -> bool:
            return sum(self.memory(n * parts).values()) <= memory

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * parts


def sharded(size: float, gpus: int, divided: bool) -> float:
    """Bytes on each GPU of what all hold, or of what is divided among them."""
    return -(-size // gpus) if divided else size


def pairs_indexed(data: DataConfig) -> int | None:
    """Pairs of the training data, if all its shards are files that are indexed already; nothing is read for it."""
    patterns = [*data.train, *(pattern for source in data.sources.values() for pattern in source.train)]
    if not patterns or any("://" in pattern or pattern.startswith("pipe:") for pattern in patterns):
        return None
    try:
        found = list(indexing.known(expand(patterns)))
    except UserError:
        return None
    return sum(summary.count for summary in found if summary) if all(found) else None


def _counted(part: str, module: nn.Module) -> Weights:
    learning = [p.numel() for p in module.parameters() if p.requires_grad]
    locked = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    return Weights(part, sum(learning), locked, len(learning))


def _embeddings(budget: Budget, pairs: int, roles: Sequence[str]) -> Embeddings:
    """Random ones, in every role that the run has."""
    width, words = budget.spec["embed_dim"], budget.spec.get("heads", {}).get("tags", {}).get("words", ())

    def table(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, width), dim=-1)

    tables: dict[str, Any] = {"image": None, "text": None}
    for role in roles:
        if count := budget.counts(role):
            tables[role] = table(pairs) if role in ("image", "text") else table(pairs, count)
    if words and "view_image" in roles:
        tables["tag_logits"] = torch.randn(pairs, len(words))
    if (aspects := budget.config.model.heads.aspects).count and "view_image" in roles:
        tables |= {
            f"{tower}_aspects": torch.randn(pairs, aspects.count, 2, aspects.width) for tower in ("image", "text")
        }
    if "view_image" in roles:
        tables |= {"local_logit": torch.randn(pairs), "scale": torch.full((1,), 14.0), "bias": torch.full((1,), -10.0)}
        if budget.config.data.negatives:
            tables["negative_local_logit"] = torch.randn(pairs, budget.config.data.negatives)
    return Embeddings(**tables)
