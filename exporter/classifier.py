"""Reward and preference models, `...ForSequenceClassification`: loaded, exported, compared with torch.

The graph takes `input_ids` and `attention_mask` (and `token_type_ids`, where the model has them), int64
[row, token], and gives `logits`, float32 [row, label]. A row scores the same alone and in a batch,
padded on any side that its table row names.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from holdfast.chat import read_tokenizer
from holdfast.errors import ModelSourceError
from holdfast.exporter.architectures import CLASSIFIER, attention_window, refuse_settings
from holdfast.exporter.batching import positions
from holdfast.exporter.classifiers import ClassifierRow, lookup_classifier
from holdfast.exporter.export import (
    GRAPH,
    REPORT,
    VERSIONED,
    OnStage,
    graph_bytes,
    refuse_rope,
    require_empty,
)
from holdfast.exporter.parity import Agreement, compare_logits, open_session, require_agreement
from holdfast.exporter.plain import optimum_export
from holdfast.exporter.source import check_embedding, copy_tokenizer_files, load_whole
from holdfast.exporter.targets import lookup_target
from holdfast.files import write_json
from holdfast.recipe import ExportConfig

TASK = "text-classification"
PLAIN_TARGET = "portable"  # classifiers have no cache to share, and one form of graph for every target
KEPT_POSITIONS = 2  # RoBERTa's begin behind the padding's id, 1
INPUT_TOKENS = (40, 23, 9)  # neither the rows (2) nor the tokens (16) that Optimum traces with


@dataclass(frozen=True)
class ClassifierSource:
    """A sequence classifier, ready to be exported.

    Attributes:
        model: a transformers model of a supported class; float32, on the CPU, in eval mode, with
            `requires_grad` off.
        folder: where it was read from, and its tokenizer files are copied from.
        row: its row of the table.
        labels: names of the logits, in order.
    """

    model: Any = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    folder: Path
    row: ClassifierRow
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ClassifierReport:
    """What was exported; `export.json` holds the same.

    Attributes:
        kind: "classifier"; tells this export.json from a language model's.
        labels: names of the logits, in order; one label is a reward.
        padding: sides on which rows of a batch may be padded, with `pad_id`.
        parity: the graph on padded batches and on single rows against torch on single rows.
    """

    kind: str
    architecture: str
    opset: int
    graph_bytes: int
    labels: tuple[str, ...]
    padding: tuple[str, ...]
    pad_id: int
    parity: Agreement
    atol: float
    seed: int
    versions: dict[str, str]


def is_classifier(folder: Path) -> bool:
    """Whether config.json names a sequence classifier, supported or not; False where it cannot be read."""
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        return bool(names) and all(str(name).endswith(CLASSIFIER) for name in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def load_classifier(folder: Path) -> ClassifierSource:
    """Load a classifier's folder; float16 and bfloat16 weights become float32.

    Raises:
        ModelSourceError: as `load_source`; or padding that the model cannot tell from text.
        UnsupportedArchitectureError: no row in the table of classifiers.
        TokenizerError: no tokenizer.json.
    """
    model = load_whole(folder, lookup_classifier, role="classifier")
    row = lookup_classifier(type(model).__name__)
    tokenizer = read_tokenizer(folder)
    refuse_settings(row, model.config)
    refuse_rope(model.config, folder)
    check_embedding(tokenizer, folder, model.get_submodule(row.embedding))
    _check_padding(folder, row, model.config, tokenizer, _settings(folder))
    labels = model.config.id2label
    return ClassifierSource(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        row=row,
        labels=tuple(str(labels[index]) for index in range(model.config.num_labels)),
    )


def export_classifier(
    source: Path | ClassifierSource,
    out: Path,
    config: ExportConfig,
    *,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> ClassifierReport:
    """Export a classifier to ONNX through Optimum.

    Writes model.onnx (and model.onnx_data beyond 2 GB), config.json, the tokenizer files byte for
    byte, and export.json.

    Arguments:
        out: an existing, empty folder.
        config: `opset` and `atol` are used; the graph has ONNX's own operators alone, for any target.
        seed: draws the token ids of the parity check.

    Raises:
        InputError: the source cannot be used; see `load_classifier`.
        ExportError: Optimum fails.
        ParityError: a logit differs by more than `config.atol`.
        DiskFullError: no space left.
    """
    source = load_classifier(source) if isinstance(source, Path) else source
    stage = on_stage or (lambda _: None)
    require_empty(out)
    stage("tracing")
    opset = config.opset or lookup_target(PLAIN_TARGET).opset
    with _positions_from_mask(source):
        optimum_export(source.model, out, task=TASK, opset=opset)
    copy_tokenizer_files(source.folder, out)
    stage("comparing with torch")
    agreement = classifier_agreement(out / GRAPH, source, seed=seed)
    require_agreement(agreement, what="The graph and the torch model", atol=config.atol)
    report = ClassifierReport(
        kind="classifier",
        architecture=source.row.name,
        opset=opset,
        graph_bytes=graph_bytes(out),
        labels=source.labels,
        padding=source.row.padding,
        pad_id=source.model.config.pad_token_id,
        parity=agreement,
        atol=config.atol,
        seed=seed,
        versions={name: importlib.metadata.version(name) for name in VERSIONED},
    )
    write_json(out / REPORT, dataclasses.asdict(report))
    return report


def classifier_agreement(
    graph: Path, source: ClassifierSource, *, seed: int, input_tokens: Sequence[int] = INPUT_TOKENS
) -> Agreement:
    """The graph on batches padded on each side, and on each row alone, against torch on each row alone.

    Arguments:
        seed: draws the token ids.
        input_tokens: length of each row; cut where the context would end.

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
        ParityError: as `compare_logits`.
    """
    rows = _rows(source, seed, input_tokens)
    expected = np.concatenate([torch_scores(source.model, row) for row in rows])
    session = open_session(graph)
    pad_id = source.model.config.pad_token_id
    found = [graph_scores(session, rows, pad_id, side) for side in source.row.padding]
    found.append(np.concatenate([graph_scores(session, [row], pad_id, "right") for row in rows]))
    return compare_logits(np.stack([expected] * len(found)), np.stack(found))


@torch.inference_mode()
def torch_scores(model: Any, row: Sequence[int]) -> NDArray[np.float32]:
    """Logits float32 [1, label] of one row without padding."""
    ids = torch.tensor([list(row)])
    scores: NDArray[np.float32] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    return scores


def graph_scores(
    session: ort.InferenceSession, rows: Sequence[Sequence[int]], pad_id: int, side: str
) -> NDArray[np.float32]:
    """Logits float32 [row, label] of a batch padded on one side, `right` or `left`."""
    feeds = {
        "input_ids": _padded(rows, pad_id, side),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0, side),
    }
    feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    wanted = {item.name for item in session.get_inputs()}
    known = {name: value for name, value in feeds.items() if name in wanted}
    scores: NDArray[np.float32] = session.run(["logits"], known)[0]
    return scores


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> NDArray[np.int64]:
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return np.array([[*row, *pad] if side == "right" else [*pad, *row] for row, pad in pairs], np.int64)


def _rows(source: ClassifierSource, seed: int, input_tokens: Sequence[int]) -> list[list[int]]:
    """Random ids without the padding's; rows outgrow a sliding window, where the model has one."""
    config = source.model.config
    generator = torch.Generator().manual_seed(seed)
    window = attention_window(config)
    extra = window + 1 if window < 4096 else 0
    room = config.max_position_embeddings - KEPT_POSITIONS
    usable = [index for index in range(source.tokenizer.get_vocab_size()) if index != config.pad_token_id]
    drawn = [
        torch.randint(len(usable), (min(length + extra, room),), generator=generator).tolist()
        for length in input_tokens
    ]
    return [[usable[index] for index in row] for row in drawn]


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ModelSourceError(f"{path} is not readable JSON ({error}): save it again.") from error
    return value if isinstance(value, dict) else {}


def _check_padding(
    folder: Path, row: ClassifierRow, config: Any, tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    """A padded row has to score as it does alone: model and tokenizer must mean the same padding."""
    if config.pad_token_id is None:
        raise ModelSourceError(
            f"{folder / 'config.json'} names no `pad_token_id`, and without one {row.name} cannot tell the "
            "text of a padded row from its padding: add the tokenizer's."
        )
    pad = settings.get("pad_token")
    text = pad.get("content") if isinstance(pad, dict) else pad
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if found is not None and found != config.pad_token_id:
        raise ModelSourceError(
            f"The tokenizer in {folder} pads with id {found} (`{text}`) and config.json names "
            f"`pad_token_id` {config.pad_token_id}: make the two agree."
        )
    side = settings.get("padding_side", "right")
    if side not in row.padding:
        raise ModelSourceError(
            f"The tokenizer in {folder} pads on the {side}, and {row.name} can only be padded on the "
            f"{' or '.join(row.padding)}: correct `padding_side` in tokenizer_config.json."
        )


@contextmanager
def _positions_from_mask(source: ClassifierSource) -> Iterator[None]:
    """Inside, a model with learned positions counts them from the attention mask.

    By itself it counts columns, and a row padded on the left would score differently.
    """
    model, own = source.model, type(source.model)
    if not source.row.learned_positions:
        yield
        return

    signature = inspect.signature(own.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.arguments["position_ids"] = positions(given.arguments["attention_mask"])
        return own.forward(*given.args, **given.kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {"forward": forward, "__module__": own.__module__}  # Optimum reads name and module
    model.__class__ = type(own.__name__, (own,), members)
    try:
        yield
    finally:
        model.__class__ = own
