"""Read this first: one plain loop carries shards through the dual encoder and the objective to a checkpoint."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch

from clipkit import config as configuration
from clipkit import distributed
from clipkit.checks import teacher_roles
from clipkit.config import Config
from clipkit.data.features import FeatureStore
from clipkit.data.loader import Loader
from clipkit.data.mixture import Mixture, open_data
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
from clipkit.errors import Stopped, UserError
from clipkit.evaluation.run import check_suite, evaluate
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.teacher import Teacher
from clipkit.negatives.online import online
from clipkit.objective import Objective
from clipkit.training.alarm import Alarm
from clipkit.training.checkpoint import Checkpoints, prune, whole_checkpoints
from clipkit.training.engine import Engine, engine_for
from clipkit.training.features import cached_features
from clipkit.training.guard import Guard
from clipkit.training.log import RunLog
from clipkit.training.mirror import Mirror
from clipkit.training.optim import build_optimizer, learning_rate, set_learning_rate
from clipkit.training.stopping import Stopping


def train(config: Config, *, resume: bool = False) -> Path:
    """Carry out the run; returns its folder. Killed at any step and resumed, it ends as if never killed.

    Raises Stopped when SIGTERM or SIGUSR1 ended it early, saved.
    """
    engine = engine_for(config)
    resume = any(distributed.gather_objects(resume))  # a node that joins does not know that the run has begun
    folder = _open_run(config, resume)
    with Alarm():
        mirror = Mirror(config) if config.mirror and distributed.is_main() else None
        if mirror and not resume:
            mirror.begin()
        last, over = _train(config, engine, folder, mirror, resume)
        engine.close()
    if mirror:
        mirror.close()
        prune(folder, config)  # what was being copied when its time had come
    if not over:
        raise Stopped(f"{folder}: stopped after step {last}, saved; go on with --resume", config.guard.requeue_code)
    return folder


def _train(config: Config, engine: Engine, folder: Path, mirror: Mirror | None, resume: bool) -> tuple[int, bool]:
    """The run itself; returns the last step, which is saved, and whether the run is over."""
    _seed(config.seed)
    index, plan = open_data(config)
    model = build(config.model)
    teacher = None if config.teacher.kind == "none" else Teacher.of(model, config)
    features = cached_features(model, index, engine.device) if config.data.cache_image_features else None
    engine.prepare(model, build_optimizer(model, config.optim))
    if teacher:
        engine.host(teacher)
    objective = Objective(config.objective)
    if "local_logit" in objective.needs:
        model.compare_locally()  # the teacher, a copy, does not
    guard = Guard(config.guard, config.save_minutes)
    checkpoints = Checkpoints(folder, config, plan, engine, teacher, objective, guard, mirror)
    start = checkpoints.restore() if resume else 0
    loader = _loader(config, index, plan, model, features)
    stopping = Stopping(config, folder, start) if config.stop.metric else None
    if distributed.is_main():
        _write_config(config, folder)
    last = start
    with guard, checkpoints, RunLog(folder, config, start) as log:
        if stopping and not stopping.knows(start):
            _evaluate(config, engine, folder, log, stopping, start)
        end = start if stopping and stopping.enough else config.steps
        for step, batch in zip(range(start, end), loader.steps(start, end), strict=True):
            log.waited()
            set_learning_rate(engine.optimizer, learning_rate(step, config))
            batch = batch.to(engine.device)
            with engine.autocast():
                if engine.bare.image_locked:
                    batch = engine.bare.with_image_features(batch)  # student and teacher share one pass
                z = engine.embed(batch)
                if teacher:
                    z.teacher = teacher.embed(batch, engine.parts)
            loss, terms = objective(z.world(), at=z if log.due(step + 1) else None)
            engine.backward(loss)
            checkpoints.settle()
            norm = engine.clip()
            last, usual = step + 1, guard.usual[0]
            if guard.passes(norm, loss, excused=engine.excuses(loss)):  # one answer on all ranks
                engine.update()
                if teacher:
                    with engine.student():
                        teacher.update(engine.bare, last)
            else:
                engine.skip()
                objective.undo()
                log.skip(last, loss.detach(), terms, norm, batch, index)
            if guard.spiked:
                log.spike(last, loss.detach(), terms, norm, batch, index, usual)
            log.step(last, loss.detach(), terms, objective.pulls, norm, z, batch, guard.skipped)
            if guard.exhausted:
                log.roll_back(last, checkpoints.roll_back())
            if guard.stopping:
                break
            due = _due(last, config.save_every, config) or (guard.save_due and last < config.steps)
            if due and guard.sound:
                checkpoints.save(last)
            if _due(last, config.evaluate_every, config):
                _evaluate(config, engine, folder, log, stopping, last)
            if stopping and stopping.enough:
                break
        if start < last:
            checkpoints.save(last)
        checkpoints.finish()
        if config.evaluate_every and last == config.steps and not (guard.stopping or (stopping or log).knows(last)):
            _evaluate(config, engine, folder, log, stopping, last)
    return last, last == config.steps or bool(stopping and stopping.enough)


def _open_run(config: Config, resume: bool) -> Path:
    """The run folder. Refuses to write over another run, and what would end this one hours later."""
    folder = config.run_folder
    begun = bool(whole_checkpoints(folder)) or (folder / "metrics.jsonl").is_file()
    if begun and not resume:
        raise UserError(f"{folder}: holds a run already; continue it with --resume, or choose another name= or out=")
    if not config.data.train and not config.data.sources:
        raise UserError("data.train: names no shards; set it to tar files or globs")
    if config.evaluate_every:
        check_suite(config.suite, config.roots)
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from None
    return folder


def _write_config(config: Config, folder: Path) -> None:
    """The resolved config, when nothing speaks against it any more: a resume that is refused leaves the run's own."""
    part = folder / "config.tmp"
    try:
        part.write_text(configuration.dump(config))
        os.replace(part, folder / "config.yaml")
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: the run cannot be written there: {error.strerror}; choose another name= or out=")


def _seed(seed: int) -> None:
    """The same start on every rank; everything about the data is seeded by the plan and the sample ids."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _loader(
    config: Config, index: Index, plan: Plan | Mixture, model: DualEncoder, features: FeatureStore | None
) -> Loader:
    return Loader(
        index,
        plan,
        data=config.data,
        preprocess=model.preprocess,
        tokenizer=model.tokenizer,
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
        features=features,
        teacher_roles=teacher_roles(config),
        online=online(config),
        steps=config.steps,
    )


def _due(step: int, every_samples: int, config: Config) -> bool:
    """Whether this step crosses a multiple of `every_samples` (the last one is the caller's matter)."""
    if not every_samples or step >= config.steps:
        return False
    return step * config.batch_size // every_samples > (step - 1) * config.batch_size // every_samples


def _evaluate(config: Config, engine: Engine, folder: Path, log: RunLog, stopping: Stopping | None, step: int) -> None:
    """Write down the suite's headline numbers; the results lie in the run's results/. Every rank takes part."""
    model = engine.whole_model()
    results = evaluate(
        model, suite=config.suite, roots=config.roots, out=folder / "results", model_name=config.name, show=False
    )
    if stopping:
        stopping.judge(step, results, model)
    log.evaluation(step, {result.benchmark: result.score.value for result in results})
