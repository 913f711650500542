"""The procedural default data: a seeded world of coloured shapes, its captions and its tests."""

from clipkit.data.world.build import build_world

__all__ = ["build_world"]
