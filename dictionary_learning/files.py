"""Files: writes that survive a crash, JSON, tensors with their checksums.

Whatever is read is read as tensors and plain data, never as code, and a file that is damaged or of another kind is told
in one sentence.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_atomic(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Whatever happens meanwhile, `path` holds either all of its old content or all of the new.

    `content` is the bytes, or a function that writes them to the path it is given.  OSError if they cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")  # one name a file, so that what a kill left is overwritten
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        if isinstance(content, bytes):
            tmp.write_bytes(content)
        else:
            content(tmp)
            tmp.chmod(mode)  # safetensors makes files that only their owner can read
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise errors of their own
        reason = next((e for e in (error, error.__context__) if isinstance(e, OSError)), error)
        raise OSError(f"{path} could not be written ({reason}); what it held before is untouched.") from error
    finally:
        tmp.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null in their place."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, (json.dumps(finite(value), indent=4, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}; restore it from a copy.")
    return value


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Add a line.  A kill can cut the last line short; readers leave such a line out."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(finite(row), allow_nan=False) + "\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of all complete lines; none if there is no such file."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} holds a line that is not valid JSON ({error}); delete that line.") from error


def rewind_jsonl(path: str | Path, step: int) -> None:
    """Keep the rows of the steps before `step`: what a run that resumes there has already said."""
    rows = [row for row in read_jsonl(path) if row["step"] < step]
    if Path(path).exists():
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def size_and_sum(path: Path) -> list:
    """[bytes, sha256] of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # the format has no checksum, so one goes into its metadata
    write_atomic(path, lambda tmp: save_file(tensors, tmp, metadata={"sha256": _digest(tensors)}))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, plain data only; ValueError if there is none."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML ({_line(error)}); restore it from a copy.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a YAML mapping, not {type(value).__name__}; restore it from a copy.")
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _leaves(content: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dicts hold, by dotted names.  No function within a function: its cycle would keep files mapped."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class TensorFile:
    """The tensors of a .safetensors, .npz or torch.save file, each read when it is asked for, floats as float32.

    Large float32 tensors are mapped.  All others are copied, those of half precision piece by piece and from a file
    opened anew for each, as the pages that were read stay in memory until it is closed: reading all tensors takes no
    more memory than they have in float32.  What torch.save nested has dotted names ("ae.b_dec").

    values: what stands in a torch.save file beside the tensors.  unread: the names that nobody has asked for.
    ValueError for damage, and for what is no such file.
    """

    MAPPED = 2**26  # entries; a smaller tensor is copied, so that nothing that happens to its file can reach it
    PIECE = 2**24  # entries

    def __init__(self, path: str | Path):
        self.path, self.values, self.names, self._read = Path(path), {}, set[str](), set[str]()
        with self._told():
            if self.path.suffix == ".safetensors":
                with safe_open(self.path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
                    checksum = (file.metadata() or {}).get("sha256")
                if checksum is not None and checksum != _digest(tensors):
                    raise ValueError("its checksum is wrong")
                self.names = set(tensors)
            elif self.path.suffix == ".npz":
                with (
                    open(self.path, "rb") as raw,
                    np.load(raw, allow_pickle=False) as file,
                ):  # numpy leaves it open if damaged
                    self.names = set(file.files)
            else:
                # torch does not look at the checksums in its own files and would let a flipped bit of a weight pass
                with zipfile.ZipFile(self.path) as file:
                    damaged = file.testzip()
                if damaged is not None:
                    raise ValueError(f"the checksum of {damaged} is wrong")
                self.names = set(self._unpickled(self.values))

    @property
    def unread(self) -> set[str]:
        return self.names - self._read

    def read(self, name: str) -> Tensor:
        self._read.add(name)
        with self._told():
            tensor = self._open(name)
            if not tensor.is_floating_point():
                return tensor.clone()
            if tensor.dtype == torch.float32:
                return tensor if self.path.suffix == ".npz" or tensor.numel() >= self.MAPPED else tensor.clone()
            if tensor.numel() <= self.PIECE or self.path.suffix == ".npz":
                return tensor.float()
            whole, rows = torch.empty(tensor.shape), max(1, self.PIECE // tensor[0].numel())
            for start in range(0, len(whole), rows):
                del tensor
                tensor = self._open(name)
                whole[start : start + rows] = tensor[start : start + rows]
            return whole

    def turned(self, name: str) -> Tensor:
        """A matrix, its rows as columns."""
        matrix = self.read(name)
        if matrix.ndim != 2:
            raise ValueError(f"its {name} has {matrix.ndim} dimensions, not the 2 of a matrix")
        return matrix.T

    def _open(self, name: str) -> Tensor:
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name)
        if self.path.suffix == ".npz":
            with open(self.path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                return torch.from_numpy(file[name])
        return self._unpickled({})[name]

    def _unpickled(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """Names to tensors; what is none goes into `values`."""
        content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds no tensors by name but a {type(content).__name__}")
        tensors: dict[str, Tensor] = {}
        for name, value in _leaves(content):
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
            else:
                values[name] = value
        return tensors

    @contextmanager
    def _told(self) -> Iterator[None]:
        kind = {".safetensors": "not a safetensors file", ".npz": "not a file of numpy.savez"}
        kinds = kind.get(self.path.suffix, "was not written by torch.save as plain tensors")
        try:
            yield
        except Exception as error:  # damage surfaces as any of a dozen types
            raise ValueError(f"{self.path} is damaged or {kinds} ({_line(error)}); restore it from a copy.") from error
