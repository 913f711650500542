"""In tests, every annotated shape is a check."""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a fine float


def check_shapes(*modules: str) -> None:
    """Check the annotations of these modules at every call; to be said before they are first imported."""
    install_import_hook(list(modules), f"{__name__}.checked")
