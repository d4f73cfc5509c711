"""Which weight files a model folder has, and whether they are whole. Pickles are never opened."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from holdfast.errors import ModelSourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(folder: Path, *, role: str) -> list[Path]:
    """The safetensors files of a model, in order, each with a readable header and full length.

    Raises:
        ModelSourceError: none there, pickles only, a listed shard missing, a file cut short, or an
            adapter instead of a model.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelSourceError(
            f"{folder} holds a PEFT adapter, not a whole {role}: merge it (`merge_and_unload`) and "
            "save the merged model."
        )
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else _shards(folder, role)
    for path in files:
        _check_whole(path)
    return files


def _shards(folder: Path, role: str) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        raise _no_safetensors(folder, role)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise ModelSourceError(
            f"{index} is not a readable index of weight files ({error!r}): save the model again."
        ) from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelSourceError(
                f"{index} lists the weight file `{name}`, which is not in {folder}: copy the whole model."
            )
    return [folder / name for name in names]


def _no_safetensors(folder: Path, role: str) -> ModelSourceError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelSourceError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code "
            "when opened: convert it to safetensors (`save_pretrained(safe_serialization=True)`)."
        )
    return ModelSourceError(
        f"Expected {SINGLE} in {folder}, found no weight file: point the {role} at a complete model."
    )


def _check_whole(path: Path) -> None:
    """Reads the header; safetensors compares its offsets with the file's length."""
    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelSourceError(
            f"{path} is not a complete safetensors file ({error}): copy it again."
        ) from error
