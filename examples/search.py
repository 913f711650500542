"""Find pictures by a sentence.

python examples/search.py MODEL FOLDER "a dog on a beach"
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipkit


def search(model_name: str, folder: str, sentence: str, top: int = 5) -> list[tuple[float, Path]]:
    """The `top` pictures of the folder nearest to the sentence: (cosine, path), best first."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    model = clipkit.load(model_name)
    similarity = model.embed_images(paths) @ model.embed_texts([sentence])[0]  # n
    best = similarity.argsort(descending=True)[:top].tolist()
    return [(float(similarity[i]), paths[i]) for i in best]


if __name__ == "__main__":
    for cosine, path in search(*sys.argv[1:4]):
        print(f"{cosine:.3f}  {path}")
