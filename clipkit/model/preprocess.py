"""How the image tower of a config wants its pictures, without building the tower."""

from __future__ import annotations

from clipkit.data.decode import Preprocess
from clipkit.settings import ImageTower, ModelConfig


def preprocess_of(config: ModelConfig) -> Preprocess:
    """What `build(config).preprocess` is; of an open_clip name no weights are fetched for it."""
    if not config.name:
        return own_preprocess(config.image)
    from clipkit.model.names import preprocess_of_name  # open_clip: seconds

    return preprocess_of_name(config.name)


def own_preprocess(image: ImageTower) -> Preprocess:
    """Of a tower of one's own making."""
    return Preprocess(image.size, image.mean, image.std, image.resize)
