"""Model folders in: judged, loaded in float32 and complete, or refused in one sentence."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from holdfast.chat import TOKENIZER_FILES, ChatTokenizer
from holdfast.errors import ModelSourceError, VocabularyMismatchError
from holdfast.exporter.architectures import Row, block_paths, linear_modules, lookup
from holdfast.exporter.config_safety import read_config
from holdfast.exporter.quiet import quiet
from holdfast.exporter.weights import INDEX, weight_files
from holdfast.files import disk_errors, sha256_file


@dataclass(frozen=True)
class SourceModel:
    """A causal language model, ready to be compressed.

    Attributes:
        model: a transformers model of a supported class; float32, on the CPU, in eval mode, with
            `requires_grad` off.
        folder: where it was read from; its tokenizer files are copied from there.
        architecture: class name, a key of the architecture table.
    """

    model: Any = field(repr=False)
    tokenizer: ChatTokenizer = field(repr=False)
    folder: Path
    architecture: str


def load_source(folder: Path, *, role: str = "model") -> SourceModel:
    """Load a model folder; float16 and bfloat16 weights become float32.

    Arguments:
        role: what messages call it, for example "base model".

    Raises:
        ModelSourceError: not a folder, unsafe or broken config, pickled, truncated or missing
            weights.
        UnsupportedArchitectureError: no row in the table.
        TokenizerError: no tokenizer.json or no chat template.
    """
    row = _check_folder(folder, role)
    tokenizer = ChatTokenizer.from_folder(folder)
    return _load(folder, row, tokenizer)


def load_base(folder: Path, aligned: SourceModel) -> SourceModel:
    """Load the unaligned parent of `aligned`; it answers in the aligned model's chat template.

    A pre-trained base often has no template of its own.

    Raises:
        VocabularyMismatchError: the two do not share tokens, ids and the width of the logits.
        ModelSourceError, UnsupportedArchitectureError, TokenizerError: as `load_source`.
    """
    row = _check_folder(folder, "base model")
    tokenizer = ChatTokenizer.from_folder(folder, template=aligned.tokenizer.template)
    check_same_vocabulary(aligned.tokenizer, tokenizer)
    base = _load(folder, row, tokenizer)
    widths = (aligned.model.config.vocab_size, base.model.config.vocab_size)
    if widths[0] != widths[1]:
        raise VocabularyMismatchError(
            f"The aligned model gives {widths[0]} logits and the base {widths[1]}: "
            "use the parent that the aligned model was trained from."
        )
    return base


def check_same_vocabulary(aligned: ChatTokenizer, base: ChatTokenizer) -> None:
    """Refuse two tokenizers that map any token text to different ids.

    Raises:
        VocabularyMismatchError
    """
    if aligned.vocabulary_digest() == base.vocabulary_digest():
        return
    ours = set(aligned.tokenizer.get_vocab(with_added_tokens=True).items())
    theirs = set(base.tokenizer.get_vocab(with_added_tokens=True).items())
    raise VocabularyMismatchError(
        f"The aligned model in {aligned.source} and the base in {base.source} do not share "
        f"a vocabulary ({len(ours)} and {len(theirs)} tokens, "
        f"{len(ours & theirs)} of them with equal ids): use the parent that the aligned model "
        "was trained from."
    )


def source_digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of every file that defines the model: config, weights, tokenizer.

    Raises:
        ModelSourceError: the weights are missing or cut short.
    """
    names = ["config.json", INDEX, *TOKENIZER_FILES]
    paths = [folder / name for name in names] + weight_files(folder, role="model")
    return {path.name: sha256_file(path) for path in sorted(set(paths)) if path.is_file()}


def save_source(source: SourceModel, out: Path) -> None:
    """Write the model as it is now, in float32 safetensors, with its tokenizer files, into `out`.

    The tokenizer files are copied byte for byte. `load_source` gives the weights back bit for bit.

    Raises:
        DiskFullError: no space left.
    """
    out.mkdir(parents=True, exist_ok=True)
    with quiet(), disk_errors(out):
        source.model.save_pretrained(out, safe_serialization=True)
    copy_tokenizer_files(source.folder, out)


def copy_tokenizer_files(folder: Path, out: Path) -> None:
    """Copy what `ChatTokenizer` reads, byte for byte, from `folder` to `out`."""
    with disk_errors(out):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file() and folder.resolve() != out.resolve():
                shutil.copyfile(folder / name, out / name)


def _check_folder(folder: Path, role: str) -> Row:
    """Everything that can be refused before a weight is read."""
    if not folder.exists():
        raise ModelSourceError(
            f"The {role} folder {folder} does not exist: give the path of a downloaded Hugging Face model."
        )
    if not folder.is_dir():
        raise ModelSourceError(
            f"The {role} {folder} is a file: give the folder that holds config.json and the weights."
        )
    config = read_config(folder, role=role)
    row = lookup(_architecture(folder, config))
    if config.get("model_type") != row.model_type:
        raise ModelSourceError(
            f"{folder / 'config.json'} says `model_type` {config.get('model_type')!r}, and "
            f"{row.name} needs {row.model_type!r}: correct the config."
        )
    weight_files(folder, role=role)
    return row


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelSourceError(
            f"{folder / 'config.json'} should name one class in `architectures`, found {names!r}: "
            'add for example ["LlamaForCausalLM"].'
        )
    return names[0]


def _load(folder: Path, row: Row, tokenizer: ChatTokenizer) -> SourceModel:
    model, report = _from_pretrained(folder, row)
    _check_complete(folder, row, report)
    linear_modules(model)  # the layout that the table promises
    if not block_paths(model):
        raise ModelSourceError(f"The model in {folder} has no decoder blocks: use a complete checkpoint.")
    _check_embedding(folder, tokenizer, model.get_submodule(row.embedding))
    model.eval().requires_grad_(False)
    return SourceModel(model=model, tokenizer=tokenizer, folder=folder, architecture=row.name)


def _from_pretrained(folder: Path, row: Row) -> tuple[Any, dict[str, Any]]:
    """The class of the table, never the one that a config asks for; local safetensors only."""
    model_class = getattr(transformers, row.name)
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers lets through whatever a bad config field provokes
        reason = str(error).strip().splitlines()
        raise ModelSourceError(
            f"transformers could not load the {row.name} in {folder} "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'}): "
            "check that config.json belongs to these weights."
        ) from error
    return model, report


def _check_complete(folder: Path, row: Row, report: dict[str, Any]) -> None:
    """Missing tensors would be random, unexpected ones silently dropped: neither is that model."""
    for kind, why in (("missing_keys", "lack"), ("unexpected_keys", "have")):
        names = sorted(report[kind])
        if names:
            raise ModelSourceError(
                f"The weights in {folder} {why} {len(names)} tensors that {row.name} "
                f"{'needs' if why == 'lack' else 'does not know'} (the first is `{names[0]}`): "
                "use the complete checkpoint of that architecture."
            )


def _check_embedding(folder: Path, tokenizer: ChatTokenizer, embedding: nn.Module) -> None:
    rows = embedding.get_parameter("weight").shape[0]
    largest = max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= rows:
        raise ModelSourceError(
            f"The tokenizer in {folder} gives ids up to {largest} and the model embeds {rows} "
            "tokens: use the tokenizer that the model was trained with."
        )
