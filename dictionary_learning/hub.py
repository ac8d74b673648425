"""Trained SAEs on the Hugging Face Hub: the check before training and the upload after it.

The Hub never decides whether a run lives: what cannot be uploaded stays in the run folder, and one command sends it.
"""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .model_card import model_card

# resume state, W&B's files, caches and unfinished writes; a * also stands for slashes
NOT_UPLOADED = ("resume/*", "wandb/*", ".*", "*/.*", "*__pycache__/*", "*.tmp")
RETRY_SECONDS = (10, 30, 90)


class UploadError(OSError):
    """An upload that did not succeed; the message has the command that repeats it."""


def check_repo(repo_id: str, private: bool = False) -> str | None:
    """Make sure, before training, that its result can be uploaded; creates the model repo if there is none.

    Returns None, or a sentence if the Hub cannot be reached, which is no reason not to train. Raises ValueError for all
    that waiting does not cure: a wrong name, no login, no permission, a public repo where a private one is asked for.
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the name of a repo: {_reason(error)}") from error
    if "/" not in repo_id:
        raise ValueError(f"the repo must be named in full, as in USER/{repo_id}.")
    if is_offline_mode():
        return f"HF_HUB_OFFLINE is set, so {repo_id} was not checked, and the upload will have to be made later."
    api = HfApi()
    advice = "log in with `hf auth login`, or set HF_TOKEN to a valid token"
    try:
        user = api.whoami()["name"]
        advice = f"{user} needs a token with write permission there, made at {api.endpoint}/settings/tokens"
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.auth_check(repo_id, write=True)
        is_private = api.repo_info(repo_id).private
    except LocalTokenNotFoundError as error:
        raise ValueError(f"cannot upload to {repo_id} without a login: {advice}.") from error
    except Exception as error:  # the HTTP client's own errors differ between versions of huggingface_hub
        if _is_refusal(error):
            raise ValueError(f"cannot upload to {repo_id}: {advice} ({_reason(error)}).") from error
        return f"the Hub cannot be reached to check {repo_id} ({_reason(error)}); the upload is tried after the run."
    if private and not is_private:
        raise ValueError(f"{repo_id} is a public repo: make it private in its settings, or leave out --private.")
    return None


def upload_run(
    run_folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    layer: int | None = None,
    retry_seconds: Sequence[float] = RETRY_SECONDS,
) -> str:
    """Upload a run folder, under its name, and its section of the repo's model card; returns the address.

    With `layer` only that layer's SAEs go, and no card: for what is done before the run is. What the repo has already
    is not sent again, so a broken upload goes on where it stopped. Raises UploadError after the last retry, and at once
    where the Hub refuses.
    """
    from huggingface_hub import is_offline_mode

    run_folder = Path(run_folder).resolve()
    if not run_folder.is_dir():
        raise ValueError(f"there is no run folder {run_folder}.")
    for seconds in (*retry_seconds, None):
        try:
            return _upload(run_folder, repo_id, private, layer)
        except Exception as error:  # whatever it is: the run is safe on disk, and the user must hear how to go on
            if seconds is None or _is_refusal(error) or is_offline_mode():
                command = ["python", "demo.py", "--upload_only", str(run_folder), "--hf_repo_id", repo_id]
                command += ["--private"] * private
                raise UploadError(
                    f"{run_folder.name} could not be uploaded to {repo_id} ({_reason(error)}); "
                    f"this uploads what is missing: {shlex.join(command)}"
                ) from error
            time.sleep(seconds)
    raise AssertionError("the last try has returned or raised")


def _upload(run_folder: Path, repo_id: str, private: bool, layer: int | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=run_folder,
        path_in_repo=run_folder.name,
        allow_patterns=None if layer is None else [f"resid_post_layer_{layer}/*", "run.json"],
        ignore_patterns=list(NOT_UPLOADED),
        commit_message=f"Upload {run_folder.name}" + ("" if layer is None else f", layer {layer}"),
    )
    if layer is None:
        try:
            present = Path(api.hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
        except RemoteEntryNotFoundError:  # and not its parent, which a broken connection raises too
            present = ""
        card, path = model_card(run_folder, repo_id, present), "README.md"
        if card is None:  # a README that somebody wrote stays
            card, path = model_card(run_folder, repo_id, at_root=False), f"{run_folder.name}/README.md"
        assert card is not None
        api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=card.encode(),
            path_in_repo=path,
            commit_message=f"Model card of {run_folder.name}",
        )
    return f"{api.endpoint}/{repo_id}/tree/main/{quote(run_folder.name)}"


def _is_refusal(error: Exception) -> bool:
    """Whether the Hub has answered, and will answer the same again."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in (408, 409, 412, 423, 429)


def _reason(error: Exception) -> str:
    """The error in one line, without the user's token should the error quote it."""
    from huggingface_hub import get_token

    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    token = get_token()
    return text.replace(token, "***") if token else text
