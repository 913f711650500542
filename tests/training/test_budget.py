"""What `clipkit plan` says, against what really is."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.model import dual_encoder
from clipkit.model.dual_encoder import build
from clipkit.model.teacher import Teacher
from clipkit.settings import DataConfig, TeacherConfig
from clipkit.training import budget as budget_module
from clipkit.training.budget import Budget, pairs_indexed
from clipkit.training.cost import measure, spec_of
from clipkit.training.optim import build_optimizer
from tests.training.conftest import degla_tree
from tests.typed import well, wrong

KNOWN: dict[str, Any] = {}
VIT = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8}


@pytest.fixture(autouse=True)
def looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every description is measured once in all tests, where a budget asks for it."""

    def known(spec: Any, precision: str = "fp32", locks: Any = (False, False), recompute: bool = False) -> Any:
        key = json.dumps([spec, precision, locks, recompute])
        if key not in KNOWN:
            KNOWN[key] = measure(spec, precision, locks=locks, recompute=recompute)
        return KNOWN[key]

    monkeypatch.setattr(budget_module, "measure", known)


def config_of(**settings: Any) -> configuration.Config:
    tree = degla_tree("nowhere/x.tar", Path("nowhere"))
    tree["model"]["image"] = {"cfg": VIT, "size": 32}
    return configuration.validate(configuration._merge(tree, settings))


def kept_by(model: Any, rows: int, precision: str) -> int:
    """Bytes that a real forward keeps: distinct memories, the model's own left out."""
    context = model.tokenizer.context_length
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 100, (rows, context))
    own = {x.data_ptr() for x in model.parameters()}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory
        return x

    ids = torch.arange(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            z = model(Batch(image=pixels, text=tokens, id=ids, group=ids))
    assert z.image.requires_grad
    return sum(memory.nbytes() for memory in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_of_a_real_step(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_encoder, "_attention", lambda device: nullcontext())  # fused, as on GPUs
    config = config_of(model={"text": {"width": 64}})
    cost = measure(spec_of(config.model)[0], precision, device="cpu")
    real = kept_by(build(config.model), 16, precision)
    said = sum(16 * one.saved + one.casts for one in cost.values())
    assert said == pytest.approx(real, rel=0.1)


DEEP = {"image": {"cfg": VIT | {"layers": 6}, "size": 32}, "text": {"width": 64, "layers": 6}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_that_are_computed_again_keep_what_enters_them(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_encoder, "_attention", lambda device: nullcontext())
    config = config_of(model=DEEP, engine={"checkpoint_activations": True})
    cost = measure(spec_of(config.model)[0], precision, recompute=True, device="cpu")
    model = build(config.model)
    model.recompute()
    real = kept_by(model, 16, precision)
    assert sum(16 * one.saved for one in cost.values()) == pytest.approx(real, rel=0.15)
    plain = measure(spec_of(config.model)[0], precision, device="cpu")
    for name, one in cost.items():
        assert one.saved < 0.4 * plain[name].saved and 0.9 < one.block * 6 / (plain[name].saved - one.saved) < 1.5
        assert one.forward == plain[name].forward and 1.3 < one.backward / plain[name].backward < 1.55


class Live(TorchDispatchMode):
    """Notes the most bytes of memory that are alive at once of all that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                memory = x.untyped_storage()
                self.alive.setdefault(memory._cdata, (StorageWeakRef(memory), memory.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("recompute", [False, True])
def test_the_fullest_moment_is_that_of_a_real_step(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations, the block at work and the largest operation, beside gradients: measured, forward and backward."""
    monkeypatch.setattr(dual_encoder, "_attention", lambda device: nullcontext())
    config = config_of(model=DEEP, engine={"checkpoint_activations": recompute})
    config = config.model_copy(update={"objective": {"infonce": {}}, "teacher": TeacherConfig(), "data": DataConfig()})
    model, rows, ids = build(config.model).train(), 64, torch.arange(64)
    if recompute:
        model.recompute()
    batch = Batch(
        image=torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8),
        text=torch.randint(1, 100, (rows, model.tokenizer.context_length)),
        id=ids,
        group=ids,
    )
    with Live() as live:
        z = model(batch)
        (z.image @ z.text.T).logsumexp(1).mean().backward()
    said = Budget(config, 1).memory(rows)
    named = [size for part, size in said.items() if part.startswith("activations")]
    # The largest gradient, of the token embedding, comes when most activations are gone: an upper bound.
    assert 1.0 <= (sum(named) + said["working memory"] + said["gradients"]) / live.most < 1.25


def test_a_gpus_attention_keeps_what_the_fused_one_keeps_here() -> None:
    spec = spec_of(config_of().model)[0]
    here = measure(spec, "fp32", device="cpu")
    there = measure(spec, "fp32", device="cuda") if torch.backends.cuda.is_built() else here
    for name in here:
        assert there[name].saved == pytest.approx(here[name].saved, rel=0.02)


def test_flops_are_those_counted_by_hand() -> None:
    """Of a ViT of 2 layers, width 64, 16 patches and a class token: two FLOPs a multiply-add."""
    cost = measure(spec_of(config_of().model)[0])["image"]
    tokens, width = 17, 64
    block = 12 * tokens * width**2 + 2 * tokens**2 * width  # projections and MLP; scores and their use
    patches = 2 * 16 * 3 * 8 * 8 * width
    forward = patches + 2 * (2 * block + width * 16)
    assert cost.forward == pytest.approx(forward, rel=0.01)
    # Pixels need no gradient; some releases of torch count it all the same.
    assert cost.backward in (pytest.approx(2 * forward - patches, rel=0.01), pytest.approx(2 * forward, rel=0.01))


@pytest.mark.parametrize(
    "model", [{}, {"lock_image": True, "heads": {"image": True}}, {"lock_text": True, "bias": -10.0}]
)
def test_parameters_moments_and_teacher_are_exact(model: dict[str, Any]) -> None:
    config = config_of(model=model)
    budget, real = Budget(config, 1), build(config.model)
    learning = [p for p in real.parameters() if p.requires_grad]
    assert budget.learning == sum(p.numel() for p in learning)
    assert sum(line.locked for line in budget.weights) == sum(
        p.numel() for p in real.parameters() if not p.requires_grad
    )
    state = Teacher.of(real, config).state()
    names = {name for name, _ in real.named_parameters()}
    assert budget.teacher_weights == sum(x.numel() for name, x in state.items() if name in names)
    optimizer = build_optimizer(real, config.optim)
    for p in learning:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert budget.memory()["optimizer moments"] == moments


def test_engines_divide_what_they_divide() -> None:
    alone = Budget(config_of(), 4).memory()
    none, one, two, three = (
        Budget(config_of(engine={"kind": "deepspeed", "zero_stage": stage}), 4).memory() for stage in range(4)
    )
    assert one["optimizer moments"] == two["optimizer moments"] == -(-alone["optimizer moments"] // 4)
    assert one["gradients"] == alone["gradients"] and two["gradients"] == -(-alone["gradients"] // 4)
    assert alone["gradients on their way"] == alone["gradients"]
    assert none["optimizer moments"] == alone["optimizer moments"] and none["weights"] == two["weights"]
    assert three["weights"] == pytest.approx(two["weights"] / 4, rel=0.01) and three["teacher"] == two["teacher"]
    assert three["weights gathered"] == alone["gradients"]


def test_fsdp_divides_all_that_learns_and_gathers_block_by_block() -> None:
    config, locked = config_of(engine={"kind": "fsdp"}), {"lock_image": True}
    alone, parts = Budget(config_of(), 4).memory(), Budget(config, 4).memory()
    for name in ("weights", "gradients", "optimizer moments", "teacher"):
        assert parts[name] == pytest.approx(alone[name] / 4, rel=0.01), name
    budget = Budget(config, 4)
    rest, block = budget._gathered
    assert block == 12 * 64**2 + 13 * 64 and rest + 2 * block + 12 * 32**2 + 13 * 32 == budget.learning
    whole = sum(line.locked for line in Budget(config_of(model=locked), 4).weights) * 4
    held = Budget(config_of(engine={"kind": "fsdp"}, model=locked), 4).memory()
    assert held["weights"] > whole and held["teacher"] < alone["teacher"] / 4


def test_roles_accumulation_and_teacher_are_counted() -> None:
    plain = {role: (n, there, back) for role, n, there, back in Budget(config_of(), 1).flops}
    assert plain["negative_text"][0] == 2 and plain["negative_text"][1] == 2 * plain["text"][1]
    assert plain["teacher: text"][1:] == (plain["text"][1], 0.0)
    parts = Budget(config_of(engine={"accumulate": 2}), 1)
    again = {role: there for role, _, there, _ in parts.flops}["again, in parts"]
    assert again == sum(plain[role][1] for role in ("image", "text", "negative_text"))
    whole = Budget(config_of(), 1).memory()["activations: text"]
    assert parts.memory()["activations: text"] == whole // 2


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    budget = Budget(config_of(), 2)
    memory = 2 * sum(budget.memory().values())
    rows = budget.largest(memory)
    assert sum(budget.memory(rows).values()) <= memory < sum(budget.memory(rows + 1).values())
    assert budget.largest(1.0) == 0


def test_bytes_of_terms_grow_as_they_do() -> None:
    budget = Budget(config_of(), 1)
    assert budget._objective(160)["logits of the terms"] == pytest.approx(budget.objective_bytes(160), rel=0.02)


def test_the_command(tiny_shards: str, tmp_path: Path) -> None:
    words = ("plan", "debug", "--gpus", "4", "--memory", "1", "--tflops", "10")
    said = well(*words, "data.train=[nowhere/x.tar]", "--json", tmp_path / "plan.json")
    assert "not known: the shards are not here" in said and "upper bound" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["steps"] == 20 and found["epochs"] is None and found["fits"]
    assert found["time_s"] == pytest.approx(found["flops_a_sample"] * 640 / (4 * 10e12 * 0.3))
    assert "cannot be split evenly over 5 ranks" in wrong("plan", "debug", "--gpus", "5")
    assert "--memory: should be a finite number, found inf" in wrong("plan", "debug", "--memory", "inf")


def test_epochs_are_known_where_shards_are_indexed(tiny_shards: str) -> None:
    from clipkit.data.shards import Index

    Index.load(tiny_shards)
    assert pairs_indexed(DataConfig(train=[tiny_shards])) == 48
