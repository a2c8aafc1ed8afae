"""Tensors of a checkpoint file: safetensors, their shards' index, or torch.save's file read with weights_only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from initperf.core.checks import FLOATS, check, fail


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The float tensors of a checkpoint, by name. Runs no code of the file. Raises if it is none, or holds none."""
    check(path.is_file(), "a checkpoint", f"{path}, which is not a file")
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        found = {name: tensor for shard in shards for name, tensor in read_tensors(path.parent / shard).items()}
    else:
        found = dict(_tensors(_load(path)))
    check(bool(found), f"tensors in {path}", "a file without any")
    return found


def _shards(path: Path) -> list[str]:
    """File names in an index as transformers writes it: {"weight_map": {parameter: file}}."""
    try:
        files = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        inside = all(Path(name).name == name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f'an index of shards with a "weight_map" in {path}', f"{type(error).__name__}: {error}")
    check(inside, f"names of files beside {path} in its weight_map", files)
    return files


def _load(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        not_safetensors = error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        _refuse(path, not_safetensors, str(error))


def _refuse(path: Path, not_safetensors: Exception, refused: str) -> NoReturn:
    """In one line; torch's own message is a page."""
    if "Unsupported global" in refused:
        what = refused.split("GLOBAL ", 1)[-1].split(" ", 1)[0]
        fail(
            f"tensors only in {path}, such as torch.save(model.state_dict(), path) writes",
            f"an object of {what}, which is not loaded, since loading it can run any code",
        )
    reason = "no torch checkpoint either" if path.suffix == ".safetensors" else refused.partition("\n")[0]
    fail(f"a safetensors file or a torch checkpoint of tensors in {path}", f"{not_safetensors}; {reason}")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The float tensors of nested mappings; where there is a `state_dict` or `model` among other things, only that."""
    if isinstance(value, Tensor):
        if value.dtype in FLOATS:
            yield name, value
        return
    if isinstance(value, Mapping):
        inner = next(
            (key for key in ("state_dict", "model", "model_state_dict") if isinstance(value.get(key), Mapping)), None
        )
        if inner is not None:
            yield from _tensors(value[inner], name)
            return
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))
