"""Embeddings kept on disk by model and content: an evaluation that is made again goes on from them.

    $CLIPKIT_CACHE/embeddings/MODEL/ID.npz      keys [n 16], rows [n d]

MODEL is a hash of the model's weights and description, a key one of a picture's bytes and crop, or of a text. Each file
is written whole, whoever else writes at the same time.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clipkit.data.shards import write_atomic
from clipkit.data.storage import cache_folder
from clipkit.errors import UserError

Array = np.ndarray
KEY = 16
"""Bytes of a key."""
PIECE = 1024
"""Embeddings that a file holds at least, but for the last: what an interrupted call loses at most."""


def fingerprint(model: Any) -> str:
    """Names what the model gives: its weights, description and kind of device, or what it says itself (`fingerprint`).

    Raises UserError for a model that has neither.
    """
    if isinstance(own := getattr(model, "fingerprint", None), str) and own:
        return hashlib.sha256(own.encode()).hexdigest()[: 2 * KEY]
    if not hasattr(model, "state_dict") or not hasattr(model, "spec"):
        raise UserError(
            "embeddings are kept by model, and this one has no `fingerprint`: a text that names its weights"
        )
    from clipkit.model.load import description

    about = json.dumps(description(model), sort_keys=True, default=str)
    return hashlib.sha256(f"{about} {weights_digest(model.state_dict())}".encode()).hexdigest()[: 2 * KEY]


def weights_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of tensors by name, with their types and the kind of device they lie on."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        found.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


def key_of(*parts: bytes) -> bytes:
    """Names content, given in parts."""
    found = hashlib.blake2b(digest_size=KEY)
    for part in parts:
        found.update(len(part).to_bytes(8, "big") + part)
    return found.digest()


class Store:
    """The embeddings of one model. What is added waits until there is a piece of it, or `flush`."""

    def __init__(self, model: Any, folder: Path | None = None):
        self.folder = (folder or cache_folder("embeddings")) / fingerprint(model)
        self._where: dict[bytes, tuple[Path, int]] = {}
        self._waiting: list[tuple[bytes, Array]] = []
        for file in sorted(self.folder.glob("*.npz")):
            for row, key in enumerate(_read(file, "keys")):
                self._where[key.tobytes()] = file, row

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Float[Array, " d"]]:
        """The embeddings that are there."""
        wanted: dict[Path, list[tuple[bytes, int]]] = {}
        for key in dict.fromkeys(keys):
            if key in self._where:
                file, row = self._where[key]
                wanted.setdefault(file, []).append((key, row))
        found: dict[bytes, Array] = {}
        for file, places in wanted.items():
            rows = _read(file, "rows")
            found |= {key: rows[row] for key, row in places}
        return found

    def add(self, keys: Sequence[bytes], rows: Float[Array, "n d"]) -> None:
        """Keep new embeddings."""
        self._waiting += zip(keys, rows, strict=True)
        if len(self._waiting) >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Write down what waits."""
        if not self._waiting:
            return
        keys, rows = zip(*self._waiting, strict=True)
        file, out = self.folder / f"{uuid.uuid4().hex}.npz", io.BytesIO()
        np.savez(out, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY), rows=np.stack(rows))
        write_atomic(file, out.getvalue())
        self._where |= {key: (file, row) for row, key in enumerate(keys)}
        self._waiting = []


def _read(file: Path, name: str) -> Array:
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: not a file of embeddings ({error}); delete it") from None
