"""Trained SAEs on the Hugging Face Hub: the check before training and the upload after it.

The Hub never decides whether a run lives: what cannot be uploaded stays in the run folder, and one command sends it.
"""

import glob
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .files import read_json
from .model_card import model_card

# resume state, W&B's files, caches and unfinished writes; a * also stands for slashes
NOT_UPLOADED = ("resume/*", "wandb/*", ".*", "*/.*", "*__pycache__/*", "*.tmp")
RETRY_SECONDS = (10, 30, 90)


class UploadError(OSError):
    """An upload that did not succeed; the message has the command that repeats it."""


class OtherRunError(ValueError):
    """Under the name of a run, the repo has the folder of another one."""


def check_repo(
    repo_id: str, private: bool = False, *, run_folder: str | Path | None = None, overwrite: bool = False
) -> str | None:
    """Make sure, before training, that its result can be uploaded; creates the model repo if there is none.

    run_folder: what will be uploaded, with its run.json if it has one already. overwrite: as in `upload_run`.
    Returns None, or a sentence if the Hub cannot be reached, which is no reason not to train. Raises ValueError for all
    that waiting does not cure: a wrong name, no login, no permission, a public repo where a private one is asked for,
    another run under the same name.
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
        if run_folder is not None and not overwrite:
            _refuse_another_run(api, Path(run_folder), repo_id)
    except OtherRunError:
        raise
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
    overwrite: bool = False,
    layer: int | None = None,
    retry_seconds: Sequence[float] = RETRY_SECONDS,
) -> str:
    """Upload a run folder, under its name, and its section of the repo's model card; returns the address.

    The folder in the repo is then as the local one: what is not there any more is deleted, in the same commit. With
    `layer` that holds for that layer's SAEs alone, and no card goes: for what is done before the run is.
    What the repo has already is not sent again, so a broken upload goes on where it stopped. Raises UploadError after
    the last retry, and at once where the Hub refuses.
    overwrite: replace the folder of another run of this name, which is refused otherwise (ValueError). Runs are told
    by the "run_id" of their run.json, older ones by its settings; with "overwrite" in it, it was asked for then.
    """
    from huggingface_hub import is_offline_mode

    run_folder = Path(run_folder).resolve()
    if not run_folder.is_dir():
        raise ValueError(f"there is no run folder {run_folder}.")
    for seconds in (*retry_seconds, None):
        try:
            return _upload(run_folder, repo_id, private, overwrite, layer)
        except OtherRunError:
            raise
        except Exception as error:  # whatever it is: the run is safe on disk, and the user must hear how to go on
            if seconds is None or _is_refusal(error) or is_offline_mode():
                command = ["python", "demo.py", "--upload_only", str(run_folder), "--hf_repo_id", repo_id]
                command += ["--private"] * private + ["--overwrite"] * overwrite
                raise UploadError(
                    f"{run_folder.name} could not be uploaded to {repo_id} ({_reason(error)}); "
                    f"this uploads what is missing: {shlex.join(command)}"
                ) from error
            time.sleep(seconds)
    raise AssertionError("the last try has returned or raised")


def _record(run_folder: Path) -> dict[str, Any]:
    return read_json(run_folder / "run.json") if (run_folder / "run.json").is_file() else {}


def _paths_in_repo(api: Any, repo_id: str, folder: str) -> set[str]:
    """The files in a folder of the repo, by their paths within it."""
    paths = (path for path in api.list_repo_files(repo_id) if path.startswith(f"{folder}/"))
    return {path.removeprefix(f"{folder}/") for path in paths}


def _refuse_another_run(api: Any, run_folder: Path, repo_id: str) -> None:
    """Raises OtherRunError where the repo has a folder of this name that is not this run's."""
    record, name = _record(run_folder), run_folder.name
    there = _paths_in_repo(api, repo_id, name)
    if not there or record.get("overwrite"):
        return
    theirs = read_json(api.hf_hub_download(repo_id, f"{name}/run.json")) if "run.json" in there else {}
    ours, others = (known.get("run_id") or known.get("settings") for known in (record, theirs))
    if ours != others:
        raise OtherRunError(
            f"{repo_id} has another run under the name {name}: give --overwrite to replace it, or another repo or name."
        )


def _upload(run_folder: Path, repo_id: str, private: bool, overwrite: bool, layer: int | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if not overwrite:
        _refuse_another_run(api, run_folder, repo_id)
    files = [path.relative_to(run_folder).as_posix() for path in run_folder.rglob("*") if path.is_file()]
    here = set(filter_repo_objects(files, ignore_patterns=list(NOT_UPLOADED)))
    part = "*" if layer is None else f"*_layer_{layer}/*"
    # but not a card that somebody's own README.md has driven into the folder
    gone = _paths_in_repo(api, repo_id, run_folder.name) - here - {"README.md"}
    gone = sorted(filter_repo_objects(gone, allow_patterns=part))
    api.upload_folder(
        repo_id=repo_id,
        folder_path=run_folder,
        path_in_repo=run_folder.name,
        allow_patterns=None if layer is None else [part, "run.json"],
        delete_patterns=[glob.escape(path) for path in gone] or None,
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
