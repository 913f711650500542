"""Writing tables of tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_table(table: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the rights of any new file here; the library's own can be read by its writer alone."""
    file.touch()
    rights = file.stat().st_mode
    save_file(table, file, metadata=metadata)
    file.chmod(rights)
