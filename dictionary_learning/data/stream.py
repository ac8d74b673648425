"""What every stage of text is: an iterator that can stop in one process and go on in another."""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any


class Stream:
    """An iterator that can stop in one process and go on in another, exactly where it stood.

    `state_dict()` holds the attributes named in `saved`, those that are streams (or lists of them) by their own state:
    plain values that JSON or a weights-only `torch.load` can carry. `skipped` counts what was left out so far, by
    reason, of `n_read` rows; `notes` are sentences on what is read; `end` says what has ended, once something has.
    """

    saved: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {name: _state_of(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where the state says. What an older version did not save is as at the start."""
        for name in filter(state.__contains__, self.saved):
            if streams := _streams_in(part := getattr(self, name)):
                states = state[name] if isinstance(part, list) else [state[name]]
                for stream, its_state in zip(streams, states, strict=True):
                    stream.load_state_dict(its_state)
            else:
                setattr(self, name, copy.deepcopy(state[name]))

    @property
    def parts(self) -> list["Stream"]:
        """The streams that this one reads."""
        return [stream for name in self.saved for stream in _streams_in(getattr(self, name))]

    @property
    def skipped(self) -> Counter[str]:
        return sum((part.skipped for part in self.parts), Counter())

    @property
    def n_read(self) -> int:
        return sum(part.n_read for part in self.parts)

    @property
    def notes(self) -> list[str]:
        return [note for part in self.parts for note in part.notes]

    @property
    def end(self) -> str:
        return next((part.end for part in self.parts if part.end), "")


def _streams_in(value: Any) -> list[Stream]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Stream)]


def _state_of(value: Any) -> Any:
    if streams := _streams_in(value):
        states = [stream.state_dict() for stream in streams]
        return states if isinstance(value, list) else states[0]
    return copy.deepcopy(value)


def skipped_sentence(skipped: Counter[str], n_read: int) -> str:
    """What was left out of the text, "" for nothing; it begins with "warning" where it is above one row in ten."""
    if not skipped.total():
        return ""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in skipped.most_common())
    sentence = f"{skipped.total():,} of {n_read:,} rows of the text were skipped: {reasons}"
    return f"warning: {sentence}" if 10 * skipped.total() > n_read else sentence


def is_held_out(key: str) -> bool:
    """Whether the document of this key belongs to the held-out twentieth: a fixed share by hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 20 == 0
