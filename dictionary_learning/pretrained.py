"""What a model's name stands for: a folder, a model of the Hub or the built-in one, its files and its identity."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .network import is_offline

BUILT_IN = {"tiny-python": Path(__file__).parent / "assets" / "tiny-python"}
OUT_OF_REACH = "the Hub cannot be reached, and the model is neither in the local cache nor a folder here"
N_SAMPLES, SAMPLE_BYTES = 64, 4096  # of a weight file's content, beside its header


class Pretrained:
    """A model's files, wherever they are.

    `options` are what `from_pretrained` of transformers takes beside `source`. Where the Hub cannot be reached they
    say so, and a model of the local cache loads at once.

    A folder that holds a PEFT adapter and no model stands for the adapter's base model, with `adapter`, the folder.
    """

    def __init__(self, name: str, revision: str | None = None, trust_remote_code: bool = False):
        from transformers.utils.hub import resolve_revision

        self.name, self.source = name, str(BUILT_IN.get(name, name))
        self.adapter: Path | None = None
        if (base := _base_of_adapter(Path(self.source))) is not None:
            self.adapter, revision, self.source = Path(self.source), base[1], str(BUILT_IN.get(base[0], base[0]))
        self.is_folder = Path(self.source).is_dir()
        offline = not self.is_folder and _is_repo_id(self.source) and is_offline(name)
        self.options: dict[str, Any] = {
            # resolved once, so that all files are of one commit
            "revision": resolve_revision(self.source, revision, local_files_only=offline),
            "trust_remote_code": trust_remote_code,
            "local_files_only": offline,
        }

    def file(self, filename: str) -> Path | None:
        """The file on this machine, downloaded if need be; None where the model has none of that name."""
        from transformers.utils.hub import cached_file

        found = cached_file(
            self.source,
            filename,
            revision=self.options["revision"],
            local_files_only=self.options["local_files_only"],
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    def one_sentence(self) -> AbstractContextManager[None]:
        return one_sentence(self.name, self.options["local_files_only"])

    def _filenames(self) -> list[str]:
        """All that there are; none where they cannot be listed, for a reason that loading the model will tell."""
        if self.is_folder:
            return [path.name for path in Path(self.source).iterdir()]
        if self.options["local_files_only"]:
            return []
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return HfApi().list_repo_files(self.source, revision=self.options["revision"])
        except (HfHubHTTPError, HFValidationError):
            return []

    def check_kind(self) -> None:
        """Raises ValueError for what is no model of transformers though it is shared like one: adapters and GGUF."""
        is_gguf = self.source.lower().endswith(".gguf")
        with self.one_sentence():
            adapter, config = (None, None) if is_gguf else (self.file("adapter_config.json"), self.file("config.json"))
        if adapter is not None:
            what = "a PEFT adapter (LoRA) lies beside the model" if config else "it is a PEFT adapter (LoRA), no model"
            advice = "download it and name its folder" if config is None else "move it into a folder of its own"
            raise ValueError(f"cannot load {self.name!r}: {what}; {advice}")
        if config is None and (is_gguf or any(name.endswith(".gguf") for name in self._filenames())):
            advice = "name the model that it was converted from, a folder with config.json and safetensors"
            raise ValueError(f"cannot load {self.name!r}: GGUF files cannot be read; {advice}")


def _base_of_adapter(folder: Path) -> tuple[str, str | None] | None:
    """(name, revision) of the model that the PEFT adapter in a folder was trained on; None where there is none."""
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").exists():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"cannot load {str(folder)!r}: its adapter_config.json is damaged ({error})") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"cannot load {str(folder)!r}: its adapter_config.json names no base_model_name_or_path")
    return base, config.get("revision")


def _adapter_files(folder: Path) -> list[Path]:
    files = sorted([folder / "adapter_config.json", *folder.glob("adapter_model.*")])
    if len(files) < 2:
        raise ValueError(f"cannot load {str(folder)!r}: it has no adapter_model.safetensors")
    return files


def needs_extra(package: str, extra: str, what: str) -> None:
    """ValueError that names the extra, where an optional package is missing."""
    if find_spec(package) is None:
        raise ValueError(f"{what} needs {package}: pip install 'dictionary-learning-demo[{extra}]'")


@contextmanager
def one_sentence(name: str, offline: bool = False, doing: str = "load") -> Iterator[None]:
    """Whatever transformers, the Hub or a model's own code raises, as one ValueError that says what to do.

    doing: what cannot be done with the model.
    A want of memory is no fault of the model, and goes on as it is.
    """
    from torch import OutOfMemoryError

    try:
        yield
    except (MemoryError, OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(f"cannot {doing} {name!r}: {_why(error, name, offline).rstrip('.')}") from error


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _why(error: Exception, name: str, offline: bool) -> str:
    from huggingface_hub import errors

    cause, page = error.__cause__, f"https://huggingface.co/{name}"
    if isinstance(cause, errors.GatedRepoError):
        return f"it is gated: accept its licence at {page}, then run `hf auth login`"
    if isinstance(cause, errors.RepositoryNotFoundError | errors.HFValidationError):
        return "it is neither a folder here nor a model on the Hub (if it is private, run `hf auth login`)"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"it has no such revision, see {page}"
    is_lost = isinstance(error, ConnectionError) or isinstance(cause, errors.LocalEntryNotFoundError | ConnectionError)
    if is_lost or (offline and isinstance(error, OSError)):
        return OUT_OF_REACH
    if "trust_remote_code" in str(error):
        return "it runs code of its own: read that first, then pass trust_remote_code to allow it"
    text = " ".join(" ".join(re.split(r"(?<=\.)\s+", str(error))[:2]).split())
    if isinstance(error, OSError | ValueError | ImportError) and text:
        return text
    return f"its own code fails ({type(error).__name__}: {text})"


def model_identity(name: str, revision: str | None = None) -> dict[str, str]:
    """What tells one model from another, for JSON: equal dicts are the same model.

    A folder's are its resolved path and hashes of its config and of its weight files: of each the name, size, header
    (safetensors) and blocks of its content, not all of it. A Hub model's are its id and commit.

    Raises ValueError where the model is not there.
    """
    model = Pretrained(name, revision)
    with model.one_sentence():
        config = model.file("config.json")
    if config is None:
        why = OUT_OF_REACH if model.options["local_files_only"] else "it has no config.json"
        raise ValueError(f"cannot load {name!r}: {why}")
    if model.adapter is not None:
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _adapter_files(model.adapter)}
        base = model_identity(model.source, model.options["revision"])
        content = json.dumps([hashes, {key: value for key, value in base.items() if key != "path"}], sort_keys=True)
        weights = hashlib.sha256(content.encode()).hexdigest()
        return {"path": str(model.adapter.resolve()), "config": hashes["adapter_config.json"], "weights": weights}
    if not model.is_folder:
        from transformers.utils.hub import extract_commit_hash

        commit = extract_commit_hash(config.as_posix(), None)
        assert commit is not None, f"{config} is no file of the Hub's cache"
        return {"id": name, "commit": commit}
    weights = hashlib.sha256()
    for path in sorted([*config.parent.glob("*.safetensors"), *config.parent.glob("*.bin")]):
        weights.update(f"{path.name} {path.stat().st_size} ".encode())
        for sample in _samples(path):
            weights.update(sample)
    hashes = {"config": hashlib.sha256(config.read_bytes()).hexdigest(), "weights": weights.hexdigest()}
    return {"id": name, **hashes} if name in BUILT_IN else {"path": str(config.parent.resolve()), **hashes}


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities (`model_identity`) are those of one model: the same commit, or the same content."""
    keys = ("id", "commit") if "commit" in one and "commit" in other else ("config", "weights")
    return all(key in one and one[key] == other.get(key) for key in keys)


def _samples(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, and blocks evenly spaced over any file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            yield file.read(8 + int.from_bytes(file.read(8), "little"))
        for i in range(N_SAMPLES):
            file.seek(i * size // N_SAMPLES)
            yield file.read(SAMPLE_BYTES)
