"""Whether the Hub answers, asked once before work that would otherwise try for a minute."""

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
