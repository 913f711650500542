"""A hard-negative training step with four negatives and an EMA teacher, against its peers, in one run.

    released     DeGLA's arrangement: all texts padded to 77, through student and teacher; the teacher's weights moved
                 one by one; default AdamW
    clipkit      the loop's own parts: texts cut to the batch's longest, fused AdamW, one lerp
    plain        open_clip's CLIP step: no negatives, no teacher, 77 tokens

python perf/step.py [BATCH] [ROUNDS]      prints, and writes perf/results/step.json (seconds a step, medians)
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from startup import processor
from torch import Tensor

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.data.tokenize import Tokenizer
from clipkit.model.dual_encoder import build
from clipkit.model.teacher import Teacher
from clipkit.objective import objective
from clipkit.training.engine import Engine
from clipkit.training.optim import build_optimizer

RESULT = Path(__file__).parent / "results" / "step.json"
NEGATIVES, SIZE, CONTEXT = 4, 224, 77
TERMS = {"infonce": {}, "igc": {"weight": 0.1}, "tgc": {"weight": 0.1}, "distill": {"weight": 0.005}}
WORDS = "a the two young brown dog man woman runs jumps through over green grass red ball while wearing shirt"
Step = Callable[[], object]


def texts(count: int) -> list[str]:
    """Sentences of 7 to 15 words, 13 tokens on average with begin and end, as Flickr's and COCO's are."""
    draw, words = np.random.default_rng(0), WORDS.split()
    return [" ".join(draw.choice(words, draw.integers(7, 16))) for _ in range(count)]


def released(name: str, pixels: Tensor, captions: list[str]) -> Step:
    """DeGLA's released step (scripts/train_DeGLA.sh), with the own negatives in both local contrasts."""
    student = open_clip.create_model(name).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    tokens, n = open_clip.tokenize(captions, context_length=CONTEXT), len(pixels)
    labels = torch.arange(n)

    def encode(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)  # type: ignore[operator]

    def step() -> None:
        image, text = encode(student)
        with torch.no_grad():
            image_t, text_t = encode(teacher)
        scale, own, hard = student.logit_scale.exp(), text[:n], text[n:].unflatten(0, (n, NEGATIVES))  # type: ignore[operator]
        loss = (F.cross_entropy(scale * image @ text.T, labels) + F.cross_entropy(scale * own @ image.T, labels)) / 2
        local = scale * torch.cat([(image * own).sum(1, keepdim=True), (image[:, None] * hard).sum(2)], 1)
        grounded = 10 * torch.cat([(own * text_t[:n]).sum(1, keepdim=True), (own[:, None] * hard).sum(2)], 1)
        first = torch.zeros(n, dtype=torch.long)
        loss = loss + 0.1 * F.cross_entropy(local, first) + 0.1 * F.cross_entropy(grounded, first)
        loss = loss + 0.005 * ((image - image_t).square().sum() + (text - text_t).square().sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters()):
                mine.data.mul_(0.9996).add_(theirs.data, alpha=1 - 0.9996)

    return step


def plain(name: str, pixels: Tensor, captions: list[str]) -> Step:
    """open_clip's own step of CLIP."""
    model, n = open_clip.create_model(name).train(), len(pixels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tokens, loss_of = open_clip.tokenize(captions[:n], context_length=CONTEXT), open_clip.ClipLoss()

    def step() -> None:
        image, text, scale = model(pixels, tokens)
        loss_of(image, text, scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def clipkit_step(name: str, pixels: Tensor, captions: list[str]) -> Step:
    """What the training loop does between two batches."""
    n = len(pixels)
    tree = {"batch_size": n, "samples": 8000 * n, "model": {"name": name}, "teacher": {"kind": "ema"}}
    tree |= {"data": {"negatives": NEGATIVES}, "objective": TERMS, "optim": {"lr": 1e-6}}
    config = configuration.validate(tree)
    engine, model = Engine(config), build(config.model).train()
    teacher = Teacher(model, config.teacher, config.steps)
    engine.prepare(model, build_optimizer(model, config.optim))
    tokens = Tokenizer()(captions)
    batch = Batch(
        text=tokens[:n],
        id=torch.arange(n),
        group=torch.arange(n),
        image=pixels.mul(64).add(128).clamp(0, 255).to(torch.uint8),
        negative_text=tokens[n:].unflatten(0, (n, NEGATIVES)),
        valid=torch.ones(n, NEGATIVES, dtype=torch.bool),
    )

    def step() -> None:
        z = engine.embed(batch)
        z.teacher = teacher.embed(batch)
        engine.backward(objective(z.world(), config.objective)[0])
        engine.clip()
        engine.update()
        teacher.update(engine.bare)

    return step


def difference(name: str, captions: list[str]) -> float:
    """Largest difference between features of texts cut to their length and padded to 77."""
    model = build(configuration.validate({"model": {"name": name}}).model).eval()
    tokens = Tokenizer()(captions)
    with torch.no_grad():
        padded = F.normalize(model.text_tower(F.pad(tokens, (0, CONTEXT - tokens.shape[1]))), dim=-1)
        return float((model.encode_text(tokens) - padded).abs().max())


def measure(name: str, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds a step of each, taken in turn."""
    torch.manual_seed(0)
    pixels, captions = torch.randn(batch, 3, SIZE, SIZE), texts(batch * (1 + NEGATIVES))
    found: dict[str, list[float]] = {}
    # One model at a time in memory, and the rounds around all of them: drift of the machine meets them alike.
    for _ in range(rounds):
        for make in (released, clipkit_step, plain):
            step = make(name, pixels, captions)
            step()
            began = time.perf_counter()
            step()
            found.setdefault(make.__name__, []).append(time.perf_counter() - began)
    medians = {who: statistics.median(values) for who, values in found.items()}
    return {
        "released_s": round(medians["released"], 3),
        "clipkit_s": round(medians["clipkit_step"], 3),
        "plain_s": round(medians["plain"], 3),
        "released/clipkit": round(medians["released"] / medians["clipkit_step"], 2),
        "clipkit/plain": round(medians["clipkit_step"] / medians["plain"], 2),
        "largest difference of a trimmed feature": difference(name, captions),
    }


def main(batch: int = 16, rounds: int = 3) -> None:
    """Measure, print, write."""
    rows = {name: measure(name, batch, rounds) for name in ("ViT-S-32", "ViT-B-32")}
    for name, row in rows.items():
        print(f"{name:10}" + "".join(f"{column} {value}   " for column, value in row.items()))
    result = {
        "date": str(date.today()),
        "hardware": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
        "batch": batch,
        "negatives": NEGATIVES,
        "rounds": rounds,
        "seconds a step": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
