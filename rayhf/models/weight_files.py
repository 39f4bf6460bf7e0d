"""The weight files of a model directory: which they are, what their headers say, a fingerprint.

In: a Hugging Face directory with safetensors weights. Out: the files that transformers and vLLM
both read, names and shapes of their tensors, and a hash of every file that decides what the model
computes. Headers are read, and a few kilobytes of each tensor; no weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayhf.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""Files of a model directory besides weights and config.json."""
SETTINGS = ("config.json", *COMPANIONS)
"""Files besides the weights that decide what a model reads and computes."""
_LFS = b"version https://git-lfs"
_MAX_HEADER = 100 << 20
"""Limit of the safetensors format on a header, in bytes."""
_BLOCK = 4096
"""Bytes that are hashed at the start, the middle and the end of each tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int


def read_json_object(file: Path, *, key: str) -> dict[str, Any]:
    """Return the content of a JSON file. Raises ConfigError where it is not an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {file} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: {file} holds {type(content).__name__}, expected a JSON object")
    return content


def weight_files(path: Path, *, key: str) -> list[Path]:
    """Return the directory's weight files: one file, or the shards that its index names.

    Raises ConfigError where there are none, where a shard is missing, and where transformers and
    vLLM would read different files.
    """
    found = sorted(file for file in path.glob("*.safetensors") if file.name != ADAPTER)
    if not found:
        only_adapter = (path / ADAPTER).is_file()
        raise ConfigError(
            f"{key}: {path} holds a LoRA adapter without its model; merge it into the model "
            "(peft: merge_and_unload) and name that directory"
            if only_adapter
            else f"{key}: {path} has no *.safetensors weights; other formats are not read"
        )
    if (path / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{key}: {path} has {ADAPTER_CONFIG} beside whole weights: transformers would add that "
            "adapter and vLLM would not; remove it, or merge the adapter into the weights"
        )
    if not (path / INDEX).is_file():
        return [_single(found, path, key=key)]
    shards = sorted(set(_weight_map(path / INDEX, key=key).values()))
    if (path / SINGLE).is_file() and SINGLE not in shards:
        raise ConfigError(
            f"{key}: {path} has {SINGLE} and {INDEX}: transformers would read the one, vLLM the "
            "other; remove the one that is not the model"
        )
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        raise ConfigError(
            f"{key}: {path} lacks {missing[0]}, one of the {len(shards)} weight files that {INDEX} "
            "names; download or copy it again"
        )
    return [path / name for name in shards]


def _weight_map(file: Path, *, key: str) -> dict[str, str]:
    """Return the file of each tensor, as an index says."""
    files = read_json_object(file, key=key).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"{key}: {file} has no weight_map; expected tensor names and their files")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{key}: {file} names the file {name!r}; expected names beside it")
    return files


def _single(found: list[Path], path: Path, *, key: str) -> Path:
    """Return the only weight file of a directory without an index."""
    if len(found) == 1 and found[0].name == SINGLE:
        return found[0]
    if len(found) == 1:
        raise ConfigError(f"{key}: {path} has {found[0].name}; expected {SINGLE}")
    if SINGLE not in {file.name for file in found}:
        raise ConfigError(
            f"{key}: {path} has {len(found)} weight files and no {INDEX}, which says what is in "
            "which; save the model again with save_pretrained()"
        )
    other = next(file for file in found if file.name != SINGLE)
    shared = sorted(read_header(path / SINGLE, key=key).keys() & read_header(other, key=key).keys())
    what = f"with the same tensors ({shared[0]} and others)" if shared else "with other tensors"
    raise ConfigError(
        f"{key}: {path} has {other.name} beside {SINGLE}, {what}: vLLM would read both and "
        f"transformers only {SINGLE}; move {other.name} elsewhere"
    )


def read_header(file: Path, *, key: str) -> dict[str, StoredTensor]:
    """Return a safetensors file's tensors by name.

    Raises ConfigError for another kind of file and for one that ends too early.
    """
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            if len(first) == 8 and _LFS.startswith(first):
                raise ConfigError(
                    f"{key}: {file} is a git-lfs pointer, not the weights; run `git lfs pull` in "
                    f"{file.parent}"
                )
            length = int.from_bytes(first, "little")
            header = stream.read(length) if length <= _MAX_HEADER else b""
        size = file.stat().st_size
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read ({error.strerror or error})") from None
    try:
        entries = json.loads(header)
        tensors = {
            name: _stored_tensor(entry, start=8 + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{key}: {file} is not a safetensors file, or is cut off") from None
    expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if size < expected:
        raise ConfigError(
            f"{key}: {file} is cut off: it has {size:,} bytes, its header needs {expected:,}; "
            "download or copy it again"
        )
    return tensors


def _stored_tensor(entry: Mapping[str, Any], *, start: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    return StoredTensor(tuple(map(int, entry["shape"])), start + int(first), start + int(last))


def stored_shapes(path: Path, *, key: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a directory's tensors by name. Raises ConfigError as weight_files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path, key=key):
        for name, tensor in read_header(file, key=key).items():
            if name in shapes:
                raise ConfigError(f"{key}: {path} has the tensor {name} in two files")
            shapes[name] = tensor.shape
    return shapes


def fingerprints(path: Path, *, key: str) -> Mapping[str, str]:
    """Return a hash of each file that decides what the model computes, by name.

    Of weights, the header and three blocks of each tensor are hashed: training changes all of them,
    and a model of 140 GB takes a second.
    """
    weights = weight_files(path, key=key)
    settings = {
        file
        for pattern in SETTINGS
        for file in path.glob(pattern)
        if file.is_file() and file not in weights
    }
    hashes = {file.name: _hash([file.read_bytes()]) for file in sorted(settings)}
    hashes |= {file.name: _hash(_samples(file, key=key)) for file in weights}
    return hashes


def _samples(file: Path, *, key: str) -> Iterator[bytes]:
    tensors = read_header(file, key=key)
    yield repr(sorted(tensors.items())).encode()
    with file.open("rb") as stream:
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
            last = max(tensor.start, tensor.end - _BLOCK)
            for position in sorted({tensor.start, (tensor.start + last) // 2, last}):
                stream.seek(position)
                yield stream.read(min(_BLOCK, tensor.end - position))


def _hash(parts: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
