"""Outputs of a locked image tower, computed once and read from disk ever after (LiT, arXiv 2111.07991)."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from clipkit import distributed
from clipkit.data.decode import decode
from clipkit.data.features import FeatureStore
from clipkit.data.members import Unreadable, picture_bytes
from clipkit.data.shards import Index, cache_folder
from clipkit.model.dual_encoder import DualEncoder

CHUNK = 128


def cached_features(model: DualEncoder, index: Index, device: torch.device) -> FeatureStore:
    """The locked tower's feature of every sample of the index, from the cache folder or computed into it.

    The cache is keyed by the data, the tower's weights and its preprocessing. Each rank encodes its own part.
    """
    sheet = _identity(model, index)
    name = hashlib.sha256(repr(sorted(sheet.items())).encode()).hexdigest()[:16]
    store = FeatureStore(cache_folder("features") / f"{name}.npy", job=str(distributed.gather_objects(os.getpid())[0]))
    found = distributed.gather_objects(store.matches(sheet))
    if not all(found):
        _compute(model, index, store, device)
        if distributed.is_main():
            store.commit(sheet)
        distributed.barrier()
    return store


def _identity(model: DualEncoder, index: Index) -> dict[str, Any]:
    weights = hashlib.sha256()
    for tensor in model.image_tower.state_dict().values():
        weights.update(tensor.detach().cpu().numpy().tobytes())
    return {
        "data": index.fingerprint,
        "weights": weights.hexdigest(),
        "preprocess": model.preprocess.to_dict()
        | {"mean": list(model.preprocess.mean), "std": list(model.preprocess.std)},
    }


def _compute(model: DualEncoder, index: Index, store: FeatureStore, device: torch.device) -> None:
    tower = model.eval().to(device)
    chunks = [range(i, min(i + CHUNK, len(index))) for i in range(0, len(index), CHUNK)]
    mine = chunks[distributed.rank() :: distributed.world_size()]
    if distributed.is_main():
        probe = torch.zeros(1, 3, model.preprocess.size, model.preprocess.size, dtype=torch.uint8, device=device)
        with torch.inference_mode():
            store.create(len(index), tower.image_features(probe).shape[1])
    distributed.barrier()
    rows: Any = store.attach()
    console = Console(stderr=True)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for ids in track(mine, "encoding pictures", console=console, disable=not distributed.is_main()):
            pictures = list(pool.map(lambda id: _picture(model, index, id), ids))
            readable = [p for p in pictures if p is not None]
            rows[ids.start : ids.stop] = np.nan
            if readable:
                kept = np.array([p is not None for p in pictures])
                features = tower.image_features(torch.stack(readable).to(device))
                rows[np.arange(ids.start, ids.stop)[kept]] = features.float().cpu().numpy()
    rows.flush()
    distributed.barrier()
    model.train()


def _picture(model: DualEncoder, index: Index, id: int) -> Tensor | None:
    """Pixels, or None for a picture that cannot be read (the loader applies `data.on_error` when it meets it)."""
    try:
        return decode(picture_bytes(index.read(id))[1], model.preprocess)
    except Unreadable:
        return None
