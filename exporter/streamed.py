"""A model folder whose weights come into memory one decoder block at a time, and leave it again.

The model is built without its weights; tensors are read from safetensors when a part of it is asked for,
and freed when the part is done with. Results are written the same way, one file for each part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.accelerate import init_empty_weights

from holdfast.chat import ChatTokenizer
from holdfast.errors import ModelSourceError
from holdfast.exporter.architectures import block_paths, head_is_tied, row_of
from holdfast.exporter.layout import conv1d_paths, settle_layout
from holdfast.exporter.quiet import quiet
from holdfast.exporter.source import (
    check_embedding,
    check_streamable,
    copy_tokenizer_files,
    require_finite,
)
from holdfast.exporter.weights import INDEX, read_header, weight_files
from holdfast.files import disk_errors, write_json


class StreamedModel:
    """A causal language model on disk.

    Outside of `block` and `outside` its parameters are on the meta device: shapes without values. Buffers
    that are in no file stay in memory; only GPT-2 and GPT-Neo have any in a block (a causal mask).

    Attributes:
        model: transformers model, layout settled as `load_source` does it, eval mode, no gradients.
        tokenizer: of the same folder.
        folder: where config, weights and tokenizer are.
        blocks: module paths of the decoder blocks.
    """

    def __init__(self, folder: Path, *, role: str = "model") -> None:
        """Build the model from its config; no tensor is read.

        Raises:
            ModelSourceError, UnsupportedArchitectureError, TokenizerError: as `load_source`; and an adapter
                or a config that names Python code, which only a model that is loaded whole can use.
        """
        row = check_streamable(folder, role=role)
        self.folder, self.tokenizer = folder, ChatTokenizer.from_folder(folder)
        self.model: Any = _empty_model(folder, row.name, row.attention)
        self._transposed = {f"{path}.weight" for path in conv1d_paths(self.model, row_of(self.model))}
        settle_layout(self.model)
        self.blocks = block_paths(self.model)
        if not self.blocks:
            raise ModelSourceError(
                f"The model in {folder} has no decoder blocks: use a complete checkpoint."
            )
        check_embedding(
            self.tokenizer.tokenizer, folder, self.model.get_submodule(row_of(self.model).embedding)
        )
        self._tied = f"{row_of(self.model).head}.weight" if head_is_tied(self.model) else None
        self._places = _places(self.model, folder, role, self._tied)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Decoder block number `index`, with its weights in memory inside this block."""
        path = self.blocks[index]
        with self._in_memory([name for name in self._places if name.startswith(f"{path}.")]):
            yield self.model.get_submodule(path)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embedding, last norm, head and what else is in no block are in memory inside this block."""
        with self._in_memory(self.outside_names()):
            yield

    def outside_names(self) -> list[str]:
        """Names of the tensors that belong to no decoder block; a tied head is not among them."""
        return [name for name in self._places if not name.startswith(tuple(f"{b}." for b in self.blocks))]

    def stored(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors in memory, by name, as the checkpoint holds them (GPT-2's linears are [in, out])."""
        state = {name: self.model.get_parameter(name).detach() for name in names}
        return {
            name: (value.T if name in self._transposed else value).contiguous()
            for name, value in state.items()
        }

    def block_names(self, index: int) -> list[str]:
        """Names of the tensors of a decoder block."""
        return [name for name in self._places if name.startswith(f"{self.blocks[index]}.")]

    @contextmanager
    def _in_memory(self, names: Sequence[str]) -> Iterator[None]:
        empty = {name: self.model.get_parameter(name) for name in names}
        try:
            for name in names:
                _set_parameter(self.model, name, self._read(name, empty[name].shape))
            self._tie()
            yield
        finally:
            for name, parameter in empty.items():
                _set_parameter(self.model, name, parameter)
            self._tie()

    def _tie(self) -> None:
        if self._tied is not None:
            embedding = self.model.get_submodule(row_of(self.model).embedding)
            _set_parameter(self.model, self._tied, embedding.weight)

    def _read(self, name: str, shape: torch.Size) -> nn.Parameter:
        """One tensor, float32, in the layout of the model; no file stays mapped."""
        path, stored = self._places[name]
        with safe_open(str(path), framework="pt") as file:
            value = file.get_tensor(stored)
            value = value.T if name in self._transposed else value
            if value.shape != shape:
                raise ModelSourceError(
                    f"{self.folder / 'config.json'} contradicts the weights: `{name}` is "
                    f"{list(value.shape)} in the file and {list(shape)} by the config: use the config that "
                    "belongs to these weights."
                )
            value = torch.empty(shape).copy_(value)
        require_finite(self.folder, name, value)
        return nn.Parameter(value, requires_grad=False)


class ShardWriter:
    """A model folder written part by part, as `load_source` and `StreamedModel` read it.

    Arguments:
        out: an empty folder.
        parts: how many files there will be.
    """

    def __init__(self, out: Path, parts: int) -> None:
        self.out, self.parts = out, parts
        self._map: dict[str, str] = {}
        self._bytes = 0
        self._written = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write one part.

        Raises:
            DiskFullError: no space left.
        """
        self._written += 1
        name = f"model-{self._written:05d}-of-{self.parts:05d}.safetensors"
        with disk_errors(self.out):
            save_file(tensors, self.out / name, metadata={"format": "pt"})
        self._map |= dict.fromkeys(tensors, name)
        self._bytes += sum(value.nbytes for value in tensors.values())

    def finish(self, source: StreamedModel) -> None:
        """Write the index, the config and the tokenizer's files; all parts have to be there."""
        assert self._written == self.parts
        write_json(self.out / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": self._map})
        config = source.model.config
        config.architectures, config.dtype = [type(source.model).__name__], torch.float32
        with quiet(), disk_errors(self.out):
            config.save_pretrained(self.out)
            if source.model.generation_config is not None:
                source.model.generation_config.save_pretrained(self.out)
        copy_tokenizer_files(source.folder, self.out)


def _empty_model(folder: Path, name: str, attention: str) -> Any:
    """A model without weights; buffers have their values."""
    model_class = getattr(transformers, name)
    try:
        with quiet(), init_empty_weights():
            config = model_class.config_class.from_pretrained(folder, local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32
            )
    except Exception as error:  # transformers lets through whatever a bad config field provokes
        reason = str(error).strip().splitlines()
        raise ModelSourceError(
            f"transformers could not build the {name} of {folder / 'config.json'} ({type(error).__name__}: "
            f"{reason[0] if reason else 'no message'}): correct the config."
        ) from error
    model.tie_weights()  # every parameter became one of its own
    return model.eval().requires_grad_(False)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def _places(model: Any, folder: Path, role: str, tied: str | None) -> dict[str, tuple[Path, str]]:
    """Tensor of the model -> (file, name in it); base models leave the class's prefix out.

    Raises:
        ModelSourceError: a tensor is missing or unknown.
    """
    wanted = [name for name, _ in model.named_parameters(remove_duplicate=False) if name != tied]
    found = {stored: path for path in weight_files(folder, role=role) for stored in read_header(path)}
    prefix = f"{model.base_model_prefix}."
    places = {}
    for name in wanted:
        stored = name if name in found else name.removeprefix(prefix)
        if stored not in found:
            raise _incomplete(folder, model, "lack", name)
        places[name] = (found[stored], stored)
    used = {stored for _, stored in places.values()} | {tied}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    for stored in found:
        if stored not in used and not any(re.search(pattern, stored) for pattern in ignored):
            raise _incomplete(folder, model, "have", stored)
    return places


def _incomplete(folder: Path, model: Any, why: str, name: str) -> ModelSourceError:
    return ModelSourceError(
        f"The weights in {folder} {why} tensors that {type(model).__name__} "
        f"{'needs' if why == 'lack' else 'does not know'} (the first is `{name}`): "
        "use the complete checkpoint of that architecture."
    )
