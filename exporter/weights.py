"""Which weight files a model folder has, and whether they are whole. Pickles are never opened.

Everything here reads headers only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from holdfast.errors import ModelSourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# dtypes that hold nothing but quantized values; other integers also hold masks and positions.
QUANTIZED_DTYPES = ("I8", "F8_", "F6_", "F4")
# Ends of tensor names that only a quantizer writes.
QUANTIZED_NAMES = (
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".weight.absmax", "bitsandbytes, 4 bits"),
    (".weight.quant_map", "bitsandbytes, 4 bits"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "compressed-tensors or fp8"),
    (".weight_scale_inv", "fp8"),
)


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header; `dtype` as the file spells it, for example `BF16`."""

    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path, *, role: str) -> list[Path]:
    """The safetensors files of a model, in order, each whole and in full precision.

    Raises:
        ModelSourceError: none there, pickles or GGUF only, a listed shard missing, a file corrupt or
            cut short, a tensor that is not in the shard that the index names, or tensors that are
            quantized already.
    """
    listed = {SINGLE: set[str]()} if (folder / SINGLE).is_file() else _shards(folder, role)
    for name, tensors in listed.items():
        header = read_header(folder / name)
        _refuse_quantized(folder / name, header)
        absent = sorted(tensors - header.keys())
        if absent:
            raise ModelSourceError(
                f"{folder / INDEX} says that `{absent[0]}` is in {name}, which does not hold it: "
                "copy the whole model."
            )
    return [folder / name for name in listed]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not _has_model(folder)


def refuse_adapter(folder: Path, *, role: str) -> None:
    """Refuse an adapter where a whole model is needed, and one that lies beside a whole model.

    transformers would apply the latter by itself.

    Raises:
        ModelSourceError
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if _has_model(folder):
        raise ModelSourceError(
            f"{folder} holds a PEFT adapter beside a whole {role}: move {ADAPTER_CONFIG} and its weights "
            "to a folder of their own."
        )
    raise ModelSourceError(
        f"{folder} holds a PEFT adapter, not a whole {role}: merge it (`merge_and_unload`) and "
        "save the merged model."
    )


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> dtype and shape of every tensor in a safetensors file, without reading the tensors.

    Raises:
        ModelSourceError: the header is corrupt, or its offsets do not fit the file's length.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {
                name: Tensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelSourceError(
            f"{path} is not a complete safetensors file ({error}): copy it again."
        ) from error


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def _shards(folder: Path, role: str) -> dict[str, set[str]]:
    """File name -> names of the tensors that the index puts there; files in order."""
    index = folder / INDEX
    if not index.is_file():
        raise _no_safetensors(folder, role)
    shards: dict[str, set[str]] = {}
    try:
        for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if not isinstance(name, str):
                raise TypeError(f"no file name for `{tensor}`")
            shards.setdefault(name, set()).add(tensor)
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise ModelSourceError(
            f"{index} is not a readable index of weight files ({error!r}): save the model again."
        ) from error
    if not shards:
        raise ModelSourceError(f"{index} lists no weight file: copy the whole model.")
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelSourceError(
                f"{index} lists the weight file `{name}`, which is not in {folder}: copy the whole model."
            )
    return dict(sorted(shards.items()))


def _no_safetensors(folder: Path, role: str) -> ModelSourceError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return ModelSourceError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code "
            "when opened: convert it to safetensors (`save_pretrained(safe_serialization=True)`)."
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return ModelSourceError(
            f"{folder} holds its weights as GGUF ({ggufs[0]}), made for llama.cpp and mostly quantized: "
            "start from the safetensors checkpoint that it was converted from."
        )
    return ModelSourceError(
        f"Expected {SINGLE} in {folder}, found no weight file: point the {role} at a complete model."
    )


def _refuse_quantized(path: Path, header: dict[str, Tensor]) -> None:
    for name in sorted(header):
        why = _quantized(name, header[name].dtype)
        if why:
            raise ModelSourceError(
                f"{path} holds weights that are quantized already (`{name}`: {why}): "
                "start from the full-precision checkpoint."
            )


def _quantized(name: str, dtype: str) -> str | None:
    """What gives a quantized tensor away; None for any other."""
    for ending, method in QUANTIZED_NAMES:
        if name.endswith(ending):
            return method
    if dtype.startswith(QUANTIZED_DTYPES) or (name.endswith(".weight") and dtype not in FLOATS):
        return f"dtype {dtype}"
    return None
