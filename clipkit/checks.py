"""Combinations of settings that cannot be right, and what the terms of a run look at in its teacher."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.errors import UserError
from clipkit.registry import TERMS

if TYPE_CHECKING:
    from clipkit.config import Config
    from clipkit.settings import DataConfig

ROLES = ("image", "text", "positive_text", "negative_text", "negative_image")
"""What the embeddings of a pair are called."""


def check_split(config: Config, ranks: int) -> None:
    """Raises UserError where `ranks`, and the parts that each encodes its share in, cannot have equal shares."""
    parts = config.engine.accumulate
    if config.batch_size % (ranks * parts):
        each = f" in {parts} parts each (engine.accumulate)" if parts > 1 else ""
        raise UserError(
            f"batch_size: {config.batch_size} pairs cannot be split evenly over {ranks} ranks{each}; "
            "change it or the number of ranks"
        )


def mirror_at_home(config: Config) -> str:
    """What is wrong where the mirror is the run's own checkpoints, whose copies would take the place of what they copy.

    Nothing (empty) for a folder beside them and for other stores' URLs.
    """
    where = re.sub("^(file|local):(//)?", "", config.mirror_url)  # as fsspec reads it
    if not where or "://" in where:
        return ""
    mirror = Path(os.path.realpath(os.path.expanduser(where)))
    own = Path(os.path.realpath(config.run_folder / "checkpoints"))
    if mirror != own and mirror not in own.parents and own not in mirror.parents:
        return ""
    return (
        f"mirror: {config.mirror_url} is, holds or lies in the run's own checkpoints, {own}; copies belong elsewhere: "
        "name another folder or a URL, or none"
    )


def looked_at(term: str) -> dict[str, bool]:
    """The teacher's roles that a term looks at, by name; true for those it cannot do without.

    `needs` holds them as teacher.ROLE, with a ? those it can do without; a plain "teacher" stands for all.
    """
    needs = TERMS.entry(term).needs
    if "teacher" in needs:
        return {role: role in ("image", "text") for role in ROLES}
    named = [need.removeprefix("teacher.") for need in needs if need.startswith("teacher.")]
    return {name.removesuffix("?"): not name.endswith("?") for name in named}


def teacher_roles(config: Config) -> tuple[str, ...]:
    """The roles that the run's teacher encodes: those that a term looks at, of the towers that it has."""
    wanted = {role for term in config.objective for role in looked_at(term)}
    return tuple(role for role in ROLES if role in wanted and _has(config, role))


def _has(config: Config, role: str) -> bool:
    if config.teacher.kind == "precomputed" and role == "negative_image":
        return False  # the shards hold no embeddings of these
    return config.teacher.towers in ("both", "image" if role.endswith("image") else "text")


def cross_check(config: Config) -> list[str]:
    """What single settings cannot show: combinations that cannot be right."""
    problems = []
    if not config.objective:
        problems.append("objective: needs at least one term")
    for name in config.objective:
        needs = TERMS.entry(name).needs
        if "negative_text" in needs and config.data.negatives == 0:
            problems.append(f"objective.{name} needs data.negatives ≥ 1, got 0")
        if "negative_image" in needs and config.data.negative_images < max(1, config.data.negatives):
            problems.append(
                f"objective.{name} needs data.negative_images: {max(1, config.data.negatives)} (a picture for each of "
                f"data.negatives), got {config.data.negative_images}"
            )
        if "view_image" in needs and config.data.views == 0:
            problems.append(f"objective.{name} needs data.views ≥ 1, got 0")
        if "local_logit" in needs and config.data.cache_image_features:
            problems.append(f"objective.{name} needs patches; data.cache_image_features keeps none of them")
        if "image_aspects" in needs and config.model.heads.aspects.count == 0:
            problems.append(f"objective.{name} needs model.heads.aspects.count ≥ 1, got 0")
        if "bias" in needs and config.model.bias is None:
            problems.append(f"objective.{name} needs model.bias (a number, e.g. -10), got none")
    if config.data.cache_image_features and not config.model.lock_image:
        problems.append("data.cache_image_features needs model.lock_image: true (features of a learning tower change)")
    if config.data.cache_image_features and config.data.augment != "none":
        problems.append("data.cache_image_features needs data.augment: none (each picture is encoded once)")
    if config.data.cache_image_features and config.data.decode != "exact":
        problems.append("data.cache_image_features needs data.decode: exact (each picture is decoded once)")
    if config.adversary.eps and config.model.lock_image:
        problems.append(
            "adversary.eps: a locked image tower learns nothing from moved pictures; model.lock_image: false"
        )
    problems += _check_supervision(config)
    problems += _check_teacher(config) + _check_features(config)
    problems += _check_captions(config.data) + _check_negatives(config) + _check_sources(config.data)
    if config.engine.checkpoint_activations and config.model.lock_image and config.model.lock_text:
        problems.append("engine.checkpoint_activations: both towers are locked, nothing is kept for a backward pass")
    problems += _check_engine(config)
    if config.optim.kind == "lion" and config.optim.eps is not None:
        problems.append("optim.eps: belongs to optim.kind: adamw; lion divides by nothing")
    if config.samples < config.batch_size:
        problems.append(f"samples: {config.samples} is less than one batch ({config.batch_size})")
    if config.evaluate_every and not config.suite:
        problems.append("evaluate_every needs suite: which benchmarks to run")
    problems += _check_stop(config) + _check_places(config)
    return problems


def _check_places(config: Config) -> list[str]:
    """What is wrong with where the run and its copies lie."""
    problems = []
    for setting, place in (("out", config.out), ("mirror", config.mirror)):
        try:
            config.filled(place)
        except (LookupError, ValueError, TypeError, AttributeError):
            problems.append(
                f"{setting}: may hold {{name}} and {{seed}} only (other braces are written {{{{ and }}}}), "
                f'got "{place}"'
            )
    if not problems and (problem := mirror_at_home(config)):
        problems.append(problem)
    return problems


def _check_stop(config: Config) -> list[str]:
    """What is wrong with ending the run early."""
    stop, problems = config.stop, []
    if stop.metric and not config.evaluate_every:
        problems.append("stop.metric needs evaluate_every: samples between two evaluations")
    if stop.most_loss < 1 and stop.metric != "pareto":
        problems.append(f'stop.most_loss: belongs to stop.metric: pareto, got "{stop.metric}"')
    if stop.least and not stop.metric:
        problems.append("stop.least: belongs to stop.metric, which is empty")
    return problems


def _check_engine(config: Config) -> list[str]:
    """What an engine cannot carry out rightly."""
    engine, problems, advice = config.engine, [], "use engine.kind: fsdp"
    if engine.precision == "fp16" and engine.kind == "deepspeed":
        problems.append(
            "engine.precision: fp16 is scaled by deepspeed's own rules, which no checkpoint keeps; use bf16"
        )
    if engine.precision == "fp16" and config.adversary.eps:
        problems.append("engine.precision: fp16 has no numbers for the gradients at pixels of adversary.eps; use bf16")
    if engine.compile:
        problems += [f"engine.compile: {reason}" for reason in _not_to_compile(config)]
    if engine.kind != "deepspeed" and engine.zero_stage != 1:
        problems.append(f"engine.zero_stage: belongs to engine.kind: deepspeed, got {engine.kind}")
    if engine.offload != "none":
        problems += _not_to_offload(config)
    if engine.kind != "deepspeed" or engine.zero_stage < 3:
        return problems
    if config.model.lock_image or config.model.lock_text:
        problems.append(f"engine.zero_stage: 3 divides locked towers, which student and teacher share; {advice}")
    if config.adversary.eps:
        problems.append(
            f"engine.zero_stage: 3 has no weights outside of its forward, adversary.eps needs them; {advice}"
        )
    problems += [
        f"engine.zero_stage: 3 gathers weights for whole towers, objective.{term} reads inside of them; {advice}"
        for term in config.objective
        if "local_logit" in TERMS.entry(term).needs
    ]
    return problems


def _not_to_offload(config: Config) -> list[str]:
    """Why nothing, or less, can be kept on the host."""
    engine, path = config.engine, "engine.offload"
    if engine.kind != "deepspeed":
        return [f"{path}: belongs to engine.kind: deepspeed, got {engine.kind}"]
    if engine.zero_stage == 0:
        return [f"{path}: {engine.offload} moves what ranks divide, zero_stage: 0 divides nothing; use 1, 2 or 3"]
    if engine.offload == "all" and engine.zero_stage < 3:
        return [
            f"{path}: all moves divided weights, zero_stage: {engine.zero_stage} keeps them whole on every rank; use "
            "zero_stage: 3, or offload: optimizer"
        ]
    return []


def _not_to_compile(config: Config) -> list[str]:
    """Why compiled towers would not be what the run needs."""
    engine, problems = config.engine, []
    if engine.kind == "fsdp" or (engine.kind == "deepspeed" and engine.zero_stage == 3):
        problems.append("fsdp and zero_stage: 3 gather weights inside of towers; use ddp or zero_stage: 2")
    if engine.accumulate > 1:
        problems.append(
            "compiled dropout need not draw the same in both passes of engine.accumulate; use accumulate: 1"
        )
    if engine.checkpoint_activations:
        problems.append("decides by itself what is computed again; use checkpoint_activations: false")
    return problems + [
        f"objective.{term} reads inside of towers, past what is compiled; leave one of the two out"
        for term in config.objective
        if "local_logit" in TERMS.entry(term).needs
    ]


def _check_teacher(config: Config) -> list[str]:
    """What is wrong with the teacher, and between it and the terms."""
    teacher, problems = config.teacher, []
    for term in config.objective:
        roles = looked_at(term)
        if roles and teacher.kind == "none":
            problems.append(f"objective.{term} needs teacher.kind: ema, frozen or precomputed, got none")
        elif lacking := [role for role, needed in roles.items() if needed and not _has(config, role)]:
            problems.append(f"objective.{term} needs the teacher's {lacking[0]}; teacher.towers is {teacher.towers}")
    if teacher.towers != "both" and not problems and not teacher_roles(config):
        problems.append(f"teacher.towers: {teacher.towers}, but no term of the objective looks at it")
    if teacher.half_life is not None and teacher.half_life_samples is not None:
        problems.append("teacher.half_life_samples: stands instead of teacher.half_life, both are given")
    if teacher.kind in ("frozen", "precomputed"):
        problems += [
            f"teacher.{name}: belongs to teacher.kind: ema, got {teacher.kind}"
            for name in ("half_life", "half_life_samples", "warmup")
            if getattr(teacher, name)
        ]
    if teacher.start and teacher.kind != "frozen":
        problems.append(f"teacher.start: belongs to teacher.kind: frozen, got {teacher.kind}")
    if teacher.start and config.data.cache_image_features and "image" in teacher_roles(config):
        problems.append("teacher.start: this teacher needs the pictures; switch data.cache_image_features off")
    if (teacher.kind == "precomputed") != bool(config.data.teacher_features):
        problems.append("teacher.kind: precomputed and data.teacher_features (the set it reads) belong together")
    return problems


def _check_features(config: Config) -> list[str]:
    """What is wrong between stored features of texts and the tower that reads them, and with positives."""
    text, problems = config.model.text, []
    if bool(text.features) != bool(config.data.text_features):
        problems.append("model.text.features (a width) and data.text_features (a set in the shards) belong together")
    if text.features:
        problems += [
            f"model.text.{name}: belongs to a transformer on tokens; with features there is only layers"
            for name in ("width", "heads", "dropout")
            if getattr(text, name) != type(text).model_fields[name].default
        ]
    elif text.embedder:
        problems.append("model.text.embedder: belongs to model.text.features")
    problems += [
        f"objective.{term} needs data.positives ≥ 1, got 0"
        for term in config.objective
        if "positive_text" in TERMS.entry(term).needs and not config.data.positives
    ]
    return problems


def _check_sources(data: DataConfig) -> list[str]:
    """What is wrong between several sources of data."""
    weighted = [name for name, source in data.sources.items() if source.weight is not None]
    problems = []
    if data.sources and data.train:
        problems.append("data.sources: stands instead of data.train, both are given")
    if weighted and len(weighted) < len(data.sources):
        without = [name for name in data.sources if name not in weighted]
        problems.append(f"data.sources: give every source a weight, or none; without: {', '.join(without)}")
    problems += [
        f"data.sources.{name}.epochs: weights already say how often it is read"
        for name in weighted
        if "epochs" in data.sources[name].model_fields_set
    ]
    return problems


def _check_supervision(config: Config) -> list[str]:
    """Tags and labels, where a term needs them."""
    data, words = config.data, config.model.heads.tags.vocabulary
    problems = []
    if words and data.tags and words != data.tags:
        problems.append(f"model.heads.tags.vocabulary: should be the file of data.tags, {data.tags}, got {words}")
    for name, settings in config.objective.items():
        needs = TERMS.entry(name).needs
        if "tag_logits" in needs and not (data.tags and words):
            lacking = " and ".join(
                f for f, x in (("data.tags", data.tags), ("model.heads.tags.vocabulary", words)) if not x
            )
            problems.append(f"objective.{name} needs {lacking} (words: clipkit shards tags), got none")
        by_label = settings.get("positives") == "label" or settings.get("mask_same_label")
        if ("label" in needs or by_label) and not data.labels:
            problems.append(f"objective.{name} needs data.labels: true, got false")
    return problems


WEIGHED = ("infonce", "igc", "tgc")
"""Terms that negatives' weights act in."""


def _check_negatives(config: Config) -> list[str]:
    """What is wrong with the choice and the weights of negatives."""
    data, problems = config.data, []
    named = {
        "negative_policy": data.negative_policy != "uniform",
        "negative_weights": data.negative_weights,
        "online_negatives": bool(data.online_negatives),
    }
    if not data.negatives:
        problems += [f"data.{name}: needs data.negatives ≥ 1, got 0" for name, given in named.items() if given]
    if data.negative_policy == "hardest" and data.online_negatives:
        problems.append("data.online_negatives: have no score to choose the hardest by; data.negative_policy: uniform")
    if data.negative_weights and not set(WEIGHED) & set(config.objective):
        problems.append(f"data.negative_weights: act in {', '.join(WEIGHED)}; the objective has none of these")
    if data.online_negatives and data.text_features:
        problems.append("data.online_negatives: have no stored features for data.text_features")
    if data.online_negatives and data.teacher_features and "negative_text" in teacher_roles(config):
        problems.append("data.online_negatives: have no stored embeddings for data.teacher_features")
    return problems


def _check_captions(data: DataConfig) -> list[str]:
    """What is wrong with the choice of captions and pictures of negatives."""
    problems = []
    if data.negative_images > data.negatives:
        problems.append(
            f"data.negative_images: {data.negative_images} pictures of {data.negatives} negatives; raise data.negatives"
        )
    if data.negative_images and data.cache_image_features:
        problems.append("data.negative_images: cannot be read beside data.cache_image_features")
    if data.views and data.cache_image_features:
        problems.append("data.views: cannot be read beside data.cache_image_features")
    if data.caption_kinds and not any(data.caption_kinds.values()):
        problems.append("data.caption_kinds: no kind has a chance above 0")
    if data.caption_kinds and data.caption == "all":
        problems += [
            f"data.caption_kinds.{name}: with data.caption: all every kind has its turn; should be 1, got {chance}"
            for name, chance in data.caption_kinds.items()
            if chance not in (0, 1)
        ]
    return problems
