"""Safetensors files of a directory: tensors by name, each with the file it lies in. Needs safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Shards", "read_json"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: FileNotFoundError if there is no such file, ValueError if it holds no JSON object; both name the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint.open: {path} does not exist; expected a directory that holds {path.name}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Checkpoint.open: {path} is no valid JSON ({error}); copy the file again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"Checkpoint.open: {path} holds a {type(value).__name__}; expected a JSON object.")
    return value


class Shards:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json lists.

    Headers are read at once, tensors when asked for; a tensor is a view of the mapped file, so the file must not change
    while tensors of it are alive.

    Raises: FileNotFoundError for a missing file; ValueError for a file that is truncated or no safetensors file, and
        for an index that names a tensor which its file lacks. All name the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        weight_map = self._weight_map()
        for file in dict.fromkeys(weight_map.values()) if weight_map is not None else (SINGLE,):
            handle = self._files[file] = self._open(file)
            held = set(handle.keys())
            self._where.update(dict.fromkeys(held, file))
            absent = [name for name, listed in (weight_map or {}).items() if listed == file and name not in held]
            if absent:
                raise ValueError(
                    f"Checkpoint.open: {path / INDEX} says that tensor {absent[0]} is in {file}, which lacks it (and "
                    f"{len(absent) - 1} more); the index belongs to other files. Copy the checkpoint again."
                )
        self._where.update(weight_map or {})

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor -> file name of a checkpoint in several files, None for one of a single file."""
        if (self.path / SINGLE).is_file():
            return None
        index = self.path / INDEX
        if not index.is_file():
            raise FileNotFoundError(
                f"Checkpoint.open: {self.path} holds neither {SINGLE} nor {INDEX}; expected a directory of safetensors "
                f"files. Convert other files with save_pretrained first."
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise ValueError(f'Checkpoint.open: {index} has no "weight_map" (tensor -> file); copy the file again.')
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(
                    f"Checkpoint.open: {index} puts tensor {name} into {file!r}; expected the name of a file beside "
                    f"the index."
                )
        return dict(weight_map)

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.path / file
        if not path.is_file():
            raise FileNotFoundError(f"Checkpoint.open: {path} is missing, but {self.path / INDEX} lists it; fetch it.")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"Checkpoint.open: {path} ({path.stat().st_size} bytes) is truncated or no safetensors file "
                f"({error}); fetch it again."
            ) from error

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def describe(self, name: str) -> str:
        """Tensor and file, for messages."""
        return f"{name} of {self.path / self._where.get(name, '')}"

    def slice(self, name: str) -> Any:
        """A tensor that is not read yet: get_shape(), get_dtype(), and parts of it by indexing."""
        return self._handle(name).get_slice(name)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._handle(name).get_tensor(name)

    def _handle(self, name: str) -> Any:
        if name not in self._where:
            raise ValueError(
                f"Checkpoint: there is no tensor {name} in {self.path} ({len(self._where)} tensors); see "
                f"Checkpoint.names for those there are."
            )
        return self._files[self._where[name]]
