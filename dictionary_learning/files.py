"""Files: writes that survive a crash, JSON, tensors with their checksums.

Whatever is read is read as tensors and plain data, never as code, and a file that is damaged or of another kind is told
in one sentence.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def read_pt(path: Path) -> Any:
    """What `torch.save` wrote, weights only, on the CPU.

    Torch does not look at the checksums in its own files and would let a flipped bit of a weight pass.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage surfaces as any of a dozen types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} is damaged or was not written by torch.save as plain tensors ({reason}); restore it from a copy."
        ) from error


def size_and_sum(path: Path) -> list:
    """[bytes, sha256] of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # the format has no checksum, so one goes into its metadata
    write_atomic(path, lambda tmp: save_file(tensors, tmp, metadata={"sha256": _digest(tensors)}))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            expected = (file.metadata() or {}).get("sha256")
        if expected not in (None, _digest(tensors)):
            raise ValueError("its checksum is wrong")
        return tensors
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); restore it from a copy.") from error
