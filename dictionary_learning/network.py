"""Whether the Hub answers, asked once before work that would otherwise try for a minute."""

import sys
from functools import cache

SECONDS = 3.0


def hub_is_reachable() -> bool:
    """One request without retries: False offline, and where the Hub does not answer or fails (5xx).

    The libraries of the Hub try five times with growing pauses, for every file, before they look into the local cache.
    """
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils import get_session

    if is_offline_mode():
        return False
    try:
        return get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code < 500
    except Exception:  # the HTTP client's own errors differ between versions of huggingface_hub
        return False


def is_offline(name: str) -> bool:
    """Whether what has this name on the Hub can only be looked for in the local cache; that is told."""
    offline = not hub_is_reachable()
    if offline:
        _say_offline(name)
    return offline


@cache
def _say_offline(name: str) -> None:
    """Once for each name, as files of the cache may be older than those of the Hub."""
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        sys.stderr.write(f"the Hub cannot be reached: {name} is looked for in the local cache\n")
