"""Every picture and every text of a run is embedded once, whatever number of benchmarks ask for it.

All ranks take part: each embeds its share of what is new, then everybody holds all of it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clipkit.data.members import Unreadable
from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Picture
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.store import Store, key_of

Array = np.ndarray
Item = TypeVar("Item")


class Model(Protocol):
    """All that evaluation asks of a model; rows need not have unit length.

    `scale` is used where there is one, and `texts_at_once` where the model makes batches of texts itself.
    """

    def embed_images(self, images: list[Any], /) -> Any:
        """PIL pictures -> n d."""
        ...

    def embed_texts(self, texts: list[str], /) -> Any:
        """Strings -> n d."""
        ...


class Embedder:
    """Memoises embeddings by picture identity and by string. fp32, unit length.

    `batch_size` is what the model is given at once, a rank; pictures are decoded by `threads` ahead of it. With a
    `store` what the disk holds is not embedded again, and what is new goes there as it is made.
    """

    def __init__(
        self,
        model: Model,
        roots: Roots,
        *,
        batch_size: int = 64,
        threads: int = 4,
        progress: bool = False,
        store: Store | None = None,
    ):
        self.model, self.roots, self.batch_size, self.threads = model, roots, batch_size, threads
        self.progress, self.store = progress, store
        self._pictures: dict[Picture, Array] = {}
        self._texts: dict[str, Array] = {}

    def pictures(self, pictures: Sequence[Picture]) -> Float[Array, "n d"]:
        """Embeddings of pictures. Raises UserError naming a picture that cannot be read."""
        new = sorted(set(pictures) - self._pictures.keys(), key=repr)
        self._fill(self._pictures, new, "pictures", self._encode_pictures, self._picture_keys)
        return np.stack([self._pictures[p] for p in pictures])

    def texts(self, texts: Sequence[str]) -> Float[Array, "n d"]:
        """Embeddings of texts, encoded longest first so that batches hold texts of like length."""
        new = sorted(set(texts) - self._texts.keys(), key=lambda text: (-len(text), text))
        self._fill(self._texts, new, "texts", self._encode_texts, _text_keys)
        return np.stack([self._texts[t] for t in texts])

    def open(self, picture: Picture) -> Image.Image:
        """The picture in RGB, cropped to its bbox (black outside, as PIL does), then changed as it says."""
        from clipkit.data.decode import read_picture

        try:
            image = read_picture(self.roots.read(picture.src, picture.path))
        except Unreadable as error:
            raise UserError(f"cannot read picture {picture.src}:{picture.path}: {error}") from None
        if picture.bbox is not None:
            x, y, width, height = picture.bbox
            image = image.crop((x, y, x + width, y + height))  # type: ignore[arg-type]
        if picture.change:
            from clipkit.evaluation.robustness.corruptions import changed

            image = changed(image, picture.change, picture.path)
        return image

    def _fill(
        self,
        table: dict[Item, Array],
        new: list[Item],
        what: str,
        encode: Callable[[list[Item]], Iterator[Array]],
        keys: Callable[[list[Item]], list[bytes]],
    ) -> None:
        from clipkit.distributed import gather_objects, rank, world_size

        if not new:
            return
        mine, rows, problem = new[rank() :: world_size()], None, ""
        try:
            rows = self._kept(mine, what, encode, keys) if self.store else self._made(mine, what, encode)
        except UserError as error:
            problem = str(error)
        # Errors travel too: a rank that leaves alone would let the others wait for the timeout.
        shares = gather_objects((rows, problem))
        for number, (rows, found) in enumerate(shares):
            if found:
                raise UserError(found)
            if rows is not None:
                table.update(zip(new[number :: len(shares)], rows, strict=True))

    def _made(self, items: list[Item], what: str, encode: Callable[[list[Item]], Iterator[Array]]) -> Array | None:
        parts = list(watched(encode(items), len(items), f"embedding {what}", self.progress))
        return np.concatenate(parts) if parts else None

    def _kept(
        self,
        items: list[Item],
        what: str,
        encode: Callable[[list[Item]], Iterator[Array]],
        keys: Callable[[list[Item]], list[bytes]],
    ) -> Array | None:
        """As `_made`, with what the store holds, and for it; the same content is embedded once."""
        assert self.store
        names = keys(items)
        found = self.store.find(names)
        fresh = {name: item for name, item in zip(names, items, strict=True) if name not in found}
        waiting, at = list(fresh), 0
        try:
            for part in watched(encode(list(fresh.values())), len(fresh), f"embedding {what}", self.progress):
                some = waiting[at : at + len(part)]
                self.store.add(some, part)
                found |= dict(zip(some, part, strict=True))
                at += len(part)
        finally:
            self.store.flush()
        return np.stack([found[name] for name in names]) if names else None

    def _picture_keys(self, pictures: list[Picture]) -> list[bytes]:
        def key(picture: Picture) -> bytes:
            about = [repr(picture.bbox).encode()]
            if picture.change:  # drawn from the picture's name as well
                about += [picture.change.encode(), picture.path.encode(errors="surrogatepass")]
            return key_of(b"picture", self.roots.read(picture.src, picture.path), *about)

        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(key, pictures))

    def _encode_pictures(self, pictures: list[Picture]) -> Iterator[Array]:
        return encode_pictures(self.model, pictures, self.open, self.batch_size, self.threads)

    def _encode_texts(self, texts: list[str]) -> Iterator[Array]:
        # A model that sorts texts by their tokens can do so the better the more it is given.
        at_once = getattr(self.model, "texts_at_once", 4 * self.batch_size)
        for batch in _batches(texts, at_once):
            yield _unit(self.model.embed_texts(batch), len(batch), "texts")


def _text_keys(texts: list[str]) -> list[bytes]:
    return [key_of(b"text", text.encode(errors="surrogatepass")) for text in texts]


def encode_pictures(
    model: Model, items: Iterable[Item], load: Callable[[Item], Image.Image], batch_size: int, threads: int = 4
) -> Iterator[Float[Array, "n d"]]:
    """Unit embeddings batch by batch; a few threads load pictures ahead of the model."""
    with ThreadPoolExecutor(threads) as pool:
        for images in _ahead(pool, load, items, batch_size):
            yield _unit(model.embed_images(images), len(images), "pictures")


def _unit(rows: Any, n: int, what: str) -> Float[Array, "n d"]:
    """fp32 rows of unit length, whatever array type the model returned."""
    rows = rows.detach().float().cpu().numpy() if hasattr(rows, "detach") else np.asarray(rows)
    rows = rows.astype(np.float32)
    if rows.ndim != 2 or len(rows) != n:
        raise UserError(f"the model should give one embedding a row for {n} {what}, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(1)).sum())
        raise UserError(f"the model gave embeddings that are not finite for {bad} of {n} {what}")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    waiting = iter(items)
    while batch := list(islice(waiting, size)):
        yield batch


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Item], Image.Image], items: Iterable[Item], size: int
) -> Iterator[list[Image.Image]]:
    """Loaded batches; two more are always on their way."""
    waiting: deque[list[Future[Image.Image]]] = deque()
    for batch in _batches(items, size):
        waiting.append([pool.submit(load, item) for item in batch])
        if len(waiting) > 2:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def watched(parts: Iterable[Array], total: int | None, title: str, show: bool) -> Iterator[Array]:
    """The parts, with a bar and (where a total is known) the time left on the terminal of the first rank."""
    from clipkit.distributed import is_main

    if not (show and is_main() and sys.stderr.isatty()):
        yield from parts
        return
    from rich.console import Console

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        for part in parts:
            yield part
            bar.advance(task, len(part))
