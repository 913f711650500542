"""Rule negatives made while reading: the same functions as `negatives make`, drawn anew each epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipkit.config import Config
from clipkit.data.members import Sheet
from clipkit.data.seeds import bits, shuffled
from clipkit.errors import UserError, did_you_mean
from clipkit.negatives.make import Recipe, negatives
from clipkit.registry import RULES


@dataclass(frozen=True)
class OnlineRules:
    """`count` negatives of a caption, of as many kinds as offer one, by (seed, epoch, id) alone."""

    kinds: tuple[str, ...]
    count: int
    seed: int

    def __call__(self, sheet: Sheet, caption: int, id: int, epoch: int) -> list[dict[str, Any]]:
        """{"text", "kind", "source", "seed"} each, as they would lie in a shard."""
        siblings = sheet.captions[:caption] + sheet.captions[caption + 1 :]
        seed = int(bits(1, self.seed, "online", epoch, id)[0] >> 1)
        found: list[dict[str, Any]] = []
        for per_kind in range(1, self.count + 1):  # a second of a kind only where kinds are too few
            for turn in shuffled(len(self.kinds), self.seed, "online kinds", epoch, id):
                recipe = Recipe((self.kinds[turn],), per_kind, seed)
                known = {negative["text"] for negative in found}
                made = negatives(sheet.captions[caption], recipe, siblings)
                found += [negative for negative in made if negative["text"] not in known]
                if len(found) >= self.count:
                    return found[: self.count]
        return found


def online(config: Config) -> OnlineRules | None:
    """What `data.online_negatives` asks for. Raises UserError for a kind that no rule makes."""
    kinds = tuple(config.data.online_negatives)
    for kind in kinds:
        if kind not in RULES:
            raise UserError(f"data.online_negatives: no rule makes {kind}{did_you_mean(kind, RULES)}")
    return OnlineRules(kinds, config.data.negatives, config.seed) if kinds else None
