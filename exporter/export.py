"""A model folder to an ONNX folder through Optimum: one graph with a KV cache, checked on torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from optimum.exporters.onnx import onnx_export_from_model

from holdfast.chat import ChatTokenizer
from holdfast.errors import ExportError
from holdfast.exporter.architectures import head_is_tied, linear_modules, row_of
from holdfast.exporter.graph import GraphLinear, map_linears, name_weights
from holdfast.exporter.parity import Agreement, graph_agreement, require_agreement
from holdfast.exporter.quiet import quiet
from holdfast.exporter.source import SourceModel, copy_tokenizer_files, load_source
from holdfast.files import disk_errors, write_json
from holdfast.recipe import ExportConfig

GRAPH = "model.onnx"
EXTERNAL = "model.onnx_data"
REPORT = "export.json"
TASK = "text-generation-with-past"
VERSIONED = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime")
# Rotary embeddings whose frequencies depend on the length of the input: tracing freezes one length.
UNTRACEABLE_ROPE = ("dynamic", "longrope")

OnStage = Callable[[str], None]
"""Called with what begins, for example "tracing"; drives progress lines."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported; `export.json` holds the same.

    Attributes:
        modules: module path -> where the linear layer is in the graph; blocks in order, head last.
        embedding: initializer of the token embedding, read by a Gather.
        tied: whether head and embedding were one parameter in torch. The graph always holds two
            initializers, so that the head can be quantized while the embedding stays as it is.
        parity: the graph against torch, prefill and cached steps.
    """

    architecture: str
    opset: int
    graph_bytes: int
    modules: dict[str, GraphLinear]
    embedding: str
    tied: bool
    parity: Agreement
    atol: float
    seed: int
    versions: dict[str, str]


def export_model(
    source: Path,
    out: Path,
    config: ExportConfig,
    *,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> ExportReport:
    """Export a model folder to ONNX.

    Writes model.onnx (and model.onnx_data beyond 2 GB), config.json, the tokenizer files byte for
    byte, and export.json. The same model gives the same graph, byte for byte, every time.

    Arguments:
        source: a Hugging Face folder; see `load_source`.
        out: an existing, empty folder.
        seed: draws the token ids of the parity check.

    Raises:
        InputError: the source cannot be used; see `load_source`.
        ExportError: Optimum fails, or the graph is not the model.
        ParityError: the logits differ by more than `config.atol`.
        DiskFullError: no space left.
    """
    return export_source(load_source(source), out, config, seed=seed, on_stage=on_stage)


def export_source(
    source: SourceModel,
    out: Path,
    config: ExportConfig,
    *,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> ExportReport:
    """`export_model` for a model that is already loaded; its weights are left as they are."""
    stage = on_stage or _ignore
    _check_request(source, out)
    stage("tracing")
    _trace(source, out, config.opset)
    stage("checking the weights")
    modules = _settle_graph(source, out)
    copy_tokenizer_files(source.folder, out)
    _check_tokenizer(source, out)
    stage("comparing with torch")
    agreement = graph_agreement(out / GRAPH, source, seed=seed)
    require_agreement(agreement, what="The graph and the torch model", atol=config.atol)
    report = _report(source, out, config, modules, agreement, seed)
    write_json(out / REPORT, dataclasses.asdict(report))
    return report


def read_export(folder: Path) -> ExportReport:
    """The report in `folder`/export.json.

    Raises:
        ExportError: there is none, or it is not one that `export_model` wrote.
    """
    path = folder / REPORT
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["modules"] = {
            name: GraphLinear(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in data["modules"].items()
        }
        data["parity"] = Agreement(**data["parity"])
        return ExportReport(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"Expected the {REPORT} that `holdfast export` writes in {folder} ({error!r}): "
            "export the model again."
        ) from error


def _ignore(stage: str) -> None:
    """No progress line is wanted."""


def _check_request(source: SourceModel, out: Path) -> None:
    if not out.is_dir() or any(out.iterdir()):
        raise ExportError(f"Expected an existing, empty folder to export into, found {out}.")
    scaling = getattr(source.model.config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in UNTRACEABLE_ROPE:
        raise ExportError(
            f"The model in {source.folder} scales its rotary embedding by `{kind}`, which depends "
            "on the input's length and cannot be traced: use a checkpoint with a fixed scaling."
        )


def _trace(source: SourceModel, out: Path, opset: int) -> None:
    """Optimum's export of the loaded model, without its post-processing.

    The post-processing would merge head and embedding where `accelerate` is installed and
    leave them apart elsewhere; without it the graph is the same everywhere.
    """
    name = source.model.config._name_or_path
    with tempfile.TemporaryDirectory() as nothing, disk_errors(out), torch.random.fork_rng([]):
        source.model.config._name_or_path = nothing  # no tokenizer there to load and rewrite
        try:
            with quiet():
                onnx_export_from_model(
                    model=source.model,
                    output=out,
                    task=TASK,
                    opset=opset,
                    do_validation=False,
                    no_post_process=True,
                )
        except OSError:
            raise
        except Exception as error:  # torch and Optimum raise whatever the tracing ran into
            reason = str(error).strip().splitlines()
            raise ExportError(
                f"Optimum could not export the {source.architecture} at opset {opset} "
                f"({type(error).__name__}: {reason[0] if reason else 'no message'})."
            ) from error
        finally:
            source.model.config._name_or_path = name


def _settle_graph(source: SourceModel, out: Path) -> dict[str, GraphLinear]:
    """Name the weights, prove them, and write the graph back; external data stays where it is."""
    linears = linear_modules(source.model)
    model = onnx.load(out / GRAPH, load_external_data=False)
    name_weights(model.graph, list(linears))
    modules = map_linears(model.graph, linears, out)
    embedding = _embedding_name(source)
    if embedding not in {tensor.name for tensor in model.graph.initializer}:
        raise ExportError(f"The graph has no initializer `{embedding}` for the token embedding.")
    with disk_errors(out):
        onnx.save(model, out / GRAPH)
    return modules


def _embedding_name(source: SourceModel) -> str:
    return f"{row_of(source.model).embedding}.weight"


def _check_tokenizer(source: SourceModel, out: Path) -> None:
    """Template, tokenizer and stop ids are part of what a verdict is about: they may not change."""
    if ChatTokenizer.from_folder(out).digest() != source.tokenizer.digest():
        raise ExportError(
            f"The exported tokenizer differs from the one in {source.folder}: "
            "add `eos_token_id` to its generation_config.json."
        )


def _report(
    source: SourceModel,
    out: Path,
    config: ExportConfig,
    modules: dict[str, GraphLinear],
    parity: Agreement,
    seed: int,
) -> ExportReport:
    files = [path for path in (out / GRAPH, out / EXTERNAL) if path.is_file()]
    return ExportReport(
        architecture=source.architecture,
        opset=config.opset,
        graph_bytes=sum(path.stat().st_size for path in files),
        modules=modules,
        embedding=_embedding_name(source),
        tied=head_is_tied(source.model),
        parity=parity,
        atol=config.atol,
        seed=seed,
        versions={name: importlib.metadata.version(name) for name in VERSIONED},
    )
