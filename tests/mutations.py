"""What can happen to a file."""

import random
from collections.abc import Iterator


def mutations(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """The file cut short, grown, and with single bits and whole pages changed: 39 of them."""
    for _ in range(6):
        yield content[: rng.randrange(len(content))]
    yield b""
    yield content + b"more"
    yield bytes(len(content))
    for _ in range(25):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield bytes(damaged)
    for _ in range(5):
        start = rng.randrange(len(content))
        yield content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]
