"""What every stage of text is: an iterator that can stop in one process and go on in another."""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any


class Stream:
    """An iterator that can stop in one process and go on in another, exactly where it stood.

    `state_dict()` holds the attributes named in `saved`, those that are streams by their own state: plain values that
    JSON or a weights-only `torch.load` can carry. `skipped` counts what was left out so far, by reason.
    """

    saved: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.saved}
        return {
            name: part.state_dict() if isinstance(part, Stream) else copy.deepcopy(part) for name, part in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.saved:
            if isinstance(part := getattr(self, name), Stream):
                part.load_state_dict(state[name])
            else:
                setattr(self, name, copy.deepcopy(state[name]))

    @property
    def skipped(self) -> Counter[str]:
        parts = [getattr(self, name) for name in self.saved]
        return sum((part.skipped for part in parts if isinstance(part, Stream)), Counter())


def is_held_out(key: str) -> bool:
    """Whether the document of this key belongs to the held-out twentieth: a fixed share by hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 20 == 0
