"""Model folders in: judged, loaded in float32 and complete, or refused in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

from holdfast.chat import TOKENIZER_FILES, ChatTokenizer
from holdfast.errors import ModelSourceError, UsageError, VocabularyMismatchError
from holdfast.exporter.adapter import Adapter, adapter_files, merge_adapter, read_adapter
from holdfast.exporter.architectures import SourceRow, block_paths, linear_modules, lookup
from holdfast.exporter.config_safety import read_config, read_object
from holdfast.exporter.hub import ResolvedSource, resolve_source
from holdfast.exporter.layout import settle_layout, stored_state
from holdfast.exporter.quiet import quiet
from holdfast.exporter.weights import (
    ADAPTER_CONFIG,
    INDEX,
    is_adapter,
    read_header,
    refuse_adapter,
    weight_files,
)
from holdfast.files import disk_errors, sha256_file

ADAPTER_BASE = "base model of the adapter"

FindRow = Callable[[str], SourceRow]
"""Class name to the row of a table; raises UnsupportedArchitectureError."""


@dataclass(frozen=True)
class SourceModel:
    """A causal language model, ready to be compressed.

    Attributes:
        model: a transformers model of a supported class; float32, on the CPU, in eval mode, with
            `requires_grad` off.
        folder: where its tokenizer files are, and are copied from; the model's own folder, except
            that an adapter without a tokenizer has its base's.
        architecture: class name, a key of the architecture table.
        origins: what it was read from; for an adapter, the adapter and then its base.
    """

    model: Any = field(repr=False)
    tokenizer: ChatTokenizer = field(repr=False)
    folder: Path
    architecture: str
    origins: tuple[ResolvedSource, ...] = ()


def load_source(
    source: Path | ResolvedSource,
    *,
    role: str = "model",
    trust_remote_code: bool = False,
    base_of_adapter: str | None = None,
) -> SourceModel:
    """Load a model folder; float16 and bfloat16 weights become float32.

    A folder with a PEFT adapter instead of a model gives its base with the adapter merged in; the
    tokenizer is the adapter's, or the base's where it has none.

    Arguments:
        source: a folder, or what `resolve_source` made of a hub name.
        role: what messages call it, for example "base model".
        trust_remote_code: accept a config whose `auto_map` names Python files of its folder. They
            run only for an architecture of the table that transformers has no class for; a class of
            transformers' own is preferred always, and none of the folder's code runs then. An
            adapter's base is trusted along with it.
        base_of_adapter: folder or hub name of the adapter's base, instead of the one that
            adapter_config.json names.

    Raises:
        ModelSourceError: not a folder; config unsafe, broken or of other weights; weights pickled,
            quantized, corrupt, missing or not finite; an adapter that cannot be merged.
        UnsupportedArchitectureError: no row in the table.
        TokenizerError: no tokenizer.json or no chat template.
        MissingExtraError: an adapter, and peft is not installed.
        UsageError: a base for something that is no adapter.
    """
    checked = _check(source, role, trust_remote_code, base_of_adapter)
    return _load(checked, ChatTokenizer.from_folder(checked.tokenizer_folder))


def load_base(
    source: Path | ResolvedSource,
    aligned: SourceModel,
    *,
    trust_remote_code: bool = False,
    base_of_adapter: str | None = None,
) -> SourceModel:
    """Load the unaligned parent of `aligned`; it answers in the aligned model's chat template.

    A pre-trained base often has no template of its own.

    Raises:
        VocabularyMismatchError: the two do not share tokens, ids and the width of the logits.
        ModelSourceError, UnsupportedArchitectureError, TokenizerError, MissingExtraError: as
            `load_source`.
    """
    checked = _check(source, "base model", trust_remote_code, base_of_adapter)
    tokenizer = ChatTokenizer.from_folder(checked.tokenizer_folder, template=aligned.tokenizer.template)
    check_same_vocabulary(aligned.tokenizer, tokenizer)
    base = _load(checked, tokenizer)
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


def source_digests(source: Path | SourceModel) -> dict[str, str]:
    """File name -> SHA-256 of every file that defines the model: config, weights, tokenizer, code.

    For a loaded adapter the files of its base are there as well, as `base/<file name>`; an adapter's
    folder alone gives the adapter's files.

    Raises:
        ModelSourceError: the weights are missing, corrupt or cut short.
    """
    if isinstance(source, Path):
        return _folder_digests(source)
    first, *bases = source.origins or (ResolvedSource(source.folder, str(source.folder)),)
    digests = _folder_digests(first.folder)
    for base in bases:
        digests |= {f"base/{name}": value for name, value in _folder_digests(base.folder).items()}
    return digests


def save_source(source: SourceModel, out: Path) -> None:
    """Write the model as it is now, in float32 safetensors, with its tokenizer files, into `out`.

    The tokenizer files are copied byte for byte. `load_source` gives the weights back bit for bit.

    Raises:
        DiskFullError: no space left.
    """
    out.mkdir(parents=True, exist_ok=True)
    with quiet(), disk_errors(out):
        source.model.save_pretrained(out, state_dict=stored_state(source.model), safe_serialization=True)
    copy_tokenizer_files(source.folder, out)


def copy_tokenizer_files(folder: Path, out: Path) -> None:
    """Copy what `ChatTokenizer` reads, byte for byte, from `folder` to `out`."""
    with disk_errors(out):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file() and folder.resolve() != out.resolve():
                shutil.copyfile(folder / name, out / name)


def _folder_digests(folder: Path) -> dict[str, str]:
    adapter = is_adapter(folder)
    weights = adapter_files(folder) if adapter else weight_files(folder, role="model")
    names = ["config.json", INDEX, *TOKENIZER_FILES]
    paths = [folder / name for name in names] + weights + _code_files(folder)
    return {path.name: sha256_file(path) for path in sorted(set(paths)) if path.is_file()}


def _code_files(folder: Path) -> list[Path]:
    """Python files, where the config names any."""
    config = folder / "config.json"
    named = config.is_file() and "auto_map" in read_object(config)
    return list(folder.glob("*.py")) if named else []


@dataclass(frozen=True)
class _Checked:
    """A source that was judged by everything but its weights' values.

    Attributes:
        whole: folder of config.json and weights; the base, for an adapter.
        config: the object in config.json.
        origins: as in `SourceModel`.
    """

    whole: Path
    config: dict[str, Any]
    row: SourceRow
    origins: tuple[ResolvedSource, ...]
    adapter: Adapter | None = None
    trust_remote_code: bool = False

    @property
    def tokenizer_folder(self) -> Path:
        own = self.adapter is not None and (self.adapter.folder / "tokenizer.json").is_file()
        return self.adapter.folder if self.adapter is not None and own else self.whole


def _check(
    source: Path | ResolvedSource, role: str, trust_remote_code: bool, base_of_adapter: str | None
) -> _Checked:
    origin = ResolvedSource(source, str(source)) if isinstance(source, Path) else source
    _require_folder(origin.folder, role)
    if not is_adapter(origin.folder):
        if base_of_adapter is not None:
            raise UsageError(
                f"{origin.folder} is no adapter, and was given the base {base_of_adapter}: "
                "leave out --adapter-base."
            )
        return _check_whole(origin, role, trust_remote_code)
    adapter = read_adapter(origin.folder)
    base = _base_of(adapter, base_of_adapter, trust_remote_code)
    _require_folder(base.folder, ADAPTER_BASE)
    whole = _check_whole(base, ADAPTER_BASE, trust_remote_code)
    return replace(whole, adapter=adapter, origins=(origin, base))


def _base_of(adapter: Adapter, given: str | None, trust_remote_code: bool) -> ResolvedSource:
    name = given or adapter.base
    if name is None:
        raise ModelSourceError(
            f"{adapter.folder / ADAPTER_CONFIG} names no `base_model_name_or_path`: "
            "give the model that the adapter was trained on with --adapter-base."
        )
    revision = None if given or Path(name).exists() else adapter.base_revision
    try:
        return resolve_source(name, revision, role=ADAPTER_BASE, trust_remote_code=trust_remote_code)
    except ModelSourceError as error:
        if given:
            raise
        raise ModelSourceError(
            f"The base that {adapter.folder / ADAPTER_CONFIG} names cannot be used, give another with "
            f"--adapter-base: {error}"
        ) from error


def _require_folder(folder: Path, role: str) -> None:
    if not folder.exists():
        raise ModelSourceError(
            f"The {role} folder {folder} does not exist: give the path of a downloaded Hugging Face model."
        )
    if not folder.is_dir():
        raise ModelSourceError(
            f"The {role} {folder} is a file: give the folder that holds config.json and the weights."
        )


def load_whole(folder: Path, find: FindRow, *, role: str) -> Any:
    """The model of a folder, of any architecture that `find` knows, under all checks of `load_source`.

    It is float32, on the CPU, in eval mode, with `requires_grad` off. The tokenizer is not looked at.

    Arguments:
        find: class name -> row; raises UnsupportedArchitectureError.

    Raises:
        ModelSourceError, UnsupportedArchitectureError: as `load_source`.
    """
    _require_folder(folder, role)
    checked = _check_whole(ResolvedSource(folder, str(folder)), role, False, find)
    return _complete_model(checked).eval().requires_grad_(False)


def check_streamable(folder: Path, *, role: str) -> SourceRow:
    """The row of a folder whose weights can be read part by part, under all checks of `load_source`.

    Raises:
        ModelSourceError, UnsupportedArchitectureError: as `load_source`; an adapter, or a class that
            transformers does not have.
    """
    _require_folder(folder, role)
    checked = _check_whole(ResolvedSource(folder, str(folder)), role, False)
    _model_class(checked)
    return checked.row


def _check_whole(
    origin: ResolvedSource, role: str, trust_remote_code: bool, find: FindRow = lookup
) -> _Checked:
    """Everything that can be refused before a weight is read."""
    folder = origin.folder
    refuse_adapter(folder, role=role)
    config = read_config(folder, role=role, trust_remote_code=trust_remote_code)
    row = find(_architecture(folder, config))
    if config.get("model_type") != row.model_type:
        raise ModelSourceError(
            f"{folder / 'config.json'} says `model_type` {config.get('model_type')!r}, and "
            f"{row.name} needs {row.model_type!r}: correct the config."
        )
    weight_files(folder, role=role)
    return _Checked(folder, config, row, (origin,), trust_remote_code=trust_remote_code)


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelSourceError(
            f"{folder / 'config.json'} should name one class in `architectures`, found {names!r}: "
            'add for example ["LlamaForCausalLM"].'
        )
    return names[0]


def _load(checked: _Checked, tokenizer: ChatTokenizer) -> SourceModel:
    model = _complete_model(checked)
    if checked.adapter is not None:
        model = merge_adapter(model, checked.adapter)
        tokenizer = _settle_stop_tokens(model, tokenizer)
    settle_layout(model)
    linear_modules(model)  # the layout that the table promises
    if not block_paths(model):
        raise ModelSourceError(
            f"The model in {checked.whole} has no decoder blocks: use a complete checkpoint."
        )
    check_embedding(tokenizer.tokenizer, tokenizer.source, model.get_submodule(checked.row.embedding))
    model.eval().requires_grad_(False)
    return SourceModel(
        model=model,
        tokenizer=tokenizer,
        folder=checked.tokenizer_folder,
        architecture=checked.row.name,
        origins=checked.origins,
    )


def _complete_model(checked: _Checked) -> Any:
    """The model of a whole folder, every parameter read from its weights and finite."""
    model, report = _from_pretrained(checked)
    _check_shapes(checked, model, report)
    _check_complete(checked.whole, checked.row, report)
    _check_finite(checked.whole, model)
    return model


def _from_pretrained(checked: _Checked) -> tuple[Any, dict[str, Any]]:
    """Local safetensors only; tensors are cast one by one, so that the peak is the float32 model."""
    folder, row = checked.whole, checked.row
    model_class = _model_class(checked)
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=row.attention,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported, and refused by `_check_shapes`
                output_loading_info=True,
                **_remote_code(checked),
            )
    except Exception as error:  # transformers lets through whatever a bad config field provokes
        reason = str(error).strip().splitlines()
        raise ModelSourceError(
            f"transformers could not load the {row.name} in {folder} "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'}): "
            "check that config.json belongs to these weights."
        ) from error
    if type(model).__name__ != row.name:
        raise ModelSourceError(
            f"The code in {folder} gives a {type(model).__name__} for {row.name}: correct its `auto_map`."
        )
    if model_class is not transformers.AutoModelForCausalLM:
        vars(model.config).pop("auto_map", None)  # what is saved names no code that did not run
    return model, report


def _model_class(checked: _Checked) -> Any:
    """The class of the table, never the one that a config asks for, unless only the folder has it."""
    own = getattr(transformers, checked.row.name, None)
    if own is None and not _remote_code(checked):
        raise ModelSourceError(
            f"transformers has no class {checked.row.name}, and {checked.whole} brings no code that may "
            "run: use a checkpoint with an `auto_map`, and allow it with --trust-remote-code."
        )
    return own or transformers.AutoModelForCausalLM


def _remote_code(checked: _Checked) -> dict[str, bool]:
    """What is passed on to transformers so that the folder's own code may run; mostly nothing."""
    foreign = not hasattr(transformers, checked.row.name)
    wanted = foreign and checked.trust_remote_code and "auto_map" in checked.config
    return {"trust_remote_code": True} if wanted else {}


def _check_shapes(checked: _Checked, model: Any, report: dict[str, Any]) -> None:
    names = sorted(report["mismatched_keys"])
    if names:
        wanted = _by(model.state_dict()[names[0]].shape)
        found = _by(_shape_in_files(checked.whole, names[0]))
        raise ModelSourceError(
            f"{checked.whole / 'config.json'} contradicts the weights: `{names[0]}` is {found} in the file "
            f"and {wanted} by the config (one of {len(names)} that differ): "
            "use the config that belongs to these weights."
        )


def _shape_in_files(folder: Path, name: str) -> tuple[int, ...]:
    """Shape of a tensor on disk, where its name may have one prefix more or less."""
    for path in weight_files(folder, role="model"):
        for stored, tensor in read_header(path).items():
            if stored == name or stored.endswith(f".{name}") or name.endswith(f".{stored}"):
                return tensor.shape
    return ()


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape) or "missing"


def _check_complete(folder: Path, row: SourceRow, report: dict[str, Any]) -> None:
    """Missing tensors would be random, unexpected ones silently dropped: neither is that model."""
    for kind, why in (("missing_keys", "lack"), ("unexpected_keys", "have")):
        names = sorted(report[kind])
        if names:
            raise ModelSourceError(
                f"The weights in {folder} {why} {len(names)} tensors that {row.name} "
                f"{'needs' if why == 'lack' else 'does not know'} (the first is `{names[0]}`): "
                "use the complete checkpoint of that architecture."
            )


def _check_finite(folder: Path, model: nn.Module) -> None:
    """NaN or infinity in one weight spreads to every logit, and no comparison would notice."""
    for name, parameter in model.named_parameters():
        require_finite(folder, name, parameter.detach())


def require_finite(folder: Path, name: str, value: torch.Tensor) -> None:
    """Raise ModelSourceError where a tensor of `folder` holds NaN or infinity."""
    low, high = torch.aminmax(value)  # NaN goes through; no mask of the tensor's size
    if not (low.isfinite() and high.isfinite()):
        raise ModelSourceError(
            f"`{name}` in {folder} has values that are not finite: use a checkpoint whose training did "
            "not diverge, or copy it again."
        )


def _settle_stop_tokens(model: Any, tokenizer: ChatTokenizer) -> ChatTokenizer:
    """An adapter's answers end at its tokenizer's stop tokens and at its base's.

    An adapter's folder seldom has a generation_config.json; where it has one, that alone decides.
    The merged model's configs are brought into line, so that saved folders agree with them.
    """
    settings = model.generation_config
    if settings is None:  # a class that generates nothing
        return tokenizer
    if not (tokenizer.source / "generation_config.json").is_file():
        ids = [*tokenizer.eos_ids, *_ids(settings.eos_token_id)]
        tokenizer = replace(tokenizer, eos_ids=tuple(dict.fromkeys(ids)))
    settings.eos_token_id = list(tokenizer.eos_ids)
    model.config.eos_token_id = list(tokenizer.eos_ids)
    return tokenizer


def _ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [int(value)]


def check_embedding(tokenizer: Tokenizer, folder: Path, embedding: nn.Module) -> None:
    """Raise ModelSourceError where the tokenizer of `folder` gives ids that have no embedding."""
    rows = embedding.get_parameter("weight").shape[0]
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= rows:
        raise ModelSourceError(
            f"The tokenizer in {folder} gives ids up to {largest} and the model embeds {rows} "
            "tokens: use the tokenizer that the model was trained with."
        )
