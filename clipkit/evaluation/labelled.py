"""Pictures with a class each: folders or tars of class folders. Axes: n pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from clipkit.data.members import PICTURES, Unreadable
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.roots import Roots

Array = np.ndarray


@dataclass
class Labelled:
    """Pictures by something that `open` takes, their classes' numbers, and the classes' names."""

    items: list[Any]
    labels: Int[Array, " n"]
    classes: list[str]
    open: Callable[[Any], Image.Image]

    def only(self, chosen: Int[Array, " m"]) -> Labelled:
        """These pictures of it."""
        return Labelled([self.items[n] for n in chosen], self.labels[chosen], self.classes, self.open)

    def renumbered(self, classes: list[str], where: str) -> Labelled:
        """The same pictures under the numbers of `classes`. Raises UserError for a class that is not among them."""
        number = {name: n for n, name in enumerate(classes)}
        if strange := [name for name in self.classes if name not in number]:
            raise UserError(
                f"{where}: class {strange[0]} is not among the training classes{did_you_mean(strange[0], number)}"
            )
        places = np.array([number[name] for name in self.classes])
        return Labelled(self.items, places[self.labels], classes, self.open)


def read_labelled(place: str) -> Labelled:
    """`place`: a folder or tar of class folders. Raises UserError where there are no two classes."""
    paths, load = _pictures(place)
    items, names = [], []
    for path in paths:
        name, slash, _ = path.removeprefix("./").partition("/")
        if slash:
            items.append(path)
            names.append(name)
    classes = sorted(set(names))
    if len(classes) < 2:
        raise UserError(f"{place}: should hold class folders with pictures, found {classes or 'none'}")

    return Labelled(items, np.unique(np.array(names), return_inverse=True)[1], classes, load)


def read_unlabelled(place: str) -> Labelled:
    """All pictures of a folder or tar, whatever folders they lie in, as of one class. Raises UserError for none."""
    paths, load = _pictures(place)
    if not paths:
        raise UserError(f"{place}: holds no picture ({', '.join(PICTURES)})")
    return Labelled(paths, np.zeros(len(paths), dtype=int), ["any"], load)


def _pictures(place: str) -> tuple[list[str], Callable[[str], Image.Image]]:
    """The paths of a place's pictures and what opens them."""
    roots = Roots({"here": place})
    paths = [path for path in roots.paths("here") if path.rpartition(".")[2].lower() in PICTURES]

    def load(path: str) -> Image.Image:
        from clipkit.data.decode import read_picture

        try:
            return read_picture(roots.read("here", path))
        except Unreadable as error:
            raise UserError(f"cannot read picture {place}/{path}: {error}") from None

    return paths, load
