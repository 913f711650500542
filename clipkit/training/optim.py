"""AdamW and Lion with the decay where it belongs, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from clipkit.config import Config
from clipkit.settings import OptimConfig
from clipkit.training.depth import learning_depths
from clipkit.training.lion import Lion


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and convolutions, never norms, biases, logit scale or bias."""
    return parameter.ndim >= 2 and not name.endswith(("log_scale", "bias"))


MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
"""What each `optim.kind` remembers of every parameter."""
BETAS = {"adamw": (0.9, 0.98), "lion": (0.9, 0.99)}
EPS = 1e-6


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the parameters that learn, in one group for each depth, decayed and not decayed.

    A group's `factor` is its share of the learning rate. Raises UserError when layers are wanted and cannot be told.
    """
    depth = learning_depths(model) if config.layer_decay < 1 else {}
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((depth.get(name, 0), decays(name, parameter)), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "factor": config.layer_decay**deep,
        }
        for (deep, decayed), parameters in sorted(found.items(), key=lambda group: (group[0][0], not group[0][1]))
    ]
    betas = config.betas or BETAS[config.kind]
    if config.kind == "lion":
        return Lion(groups, lr=config.lr, betas=betas)
    # The fused kernel is several times faster than the default, on CPU too (docs/log.md).
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps or EPS, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of 0-based optimizer step `step`: linear warm-up, then `optim.schedule`.

    `wsd` is warm-up, stable, decay (MiniCPM, arXiv 2404.06395), with a linear decay.
    """
    warmup = config.optim.warmup // config.batch_size
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    if config.optim.schedule == "constant":
        return config.optim.lr
    if config.optim.schedule == "wsd":
        decay = max(1, round(config.optim.decay * config.steps))
        return config.optim.lr * min(1.0, (config.steps - step) / decay)
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.optim.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Write the rate, times its own factor, into every group; nothing about the schedule needs to be saved."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["factor"]
