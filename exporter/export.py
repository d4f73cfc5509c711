"""A model folder to an ONNX folder for one target: one graph with a KV cache, checked on torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir

from holdfast.chat import ChatTokenizer
from holdfast.errors import ExportError
from holdfast.exporter.architectures import head_is_tied, row_of, why_unfused
from holdfast.exporter.fused import PassReport, fused_graph
from holdfast.exporter.genai import write_genai_config
from holdfast.exporter.graph import GraphLinear
from holdfast.exporter.operators import require_operators
from holdfast.exporter.ort_format import write_ort_format
from holdfast.exporter.parity import Agreement
from holdfast.exporter.plain import write_plain
from holdfast.exporter.proof import prove
from holdfast.exporter.proof_prompts import proof_prompts
from holdfast.exporter.proof_report import Proof, proof_lines, read_proof
from holdfast.exporter.quiet import quiet
from holdfast.exporter.source import SourceModel, copy_tokenizer_files, load_source
from holdfast.exporter.targets import Target, lookup_target
from holdfast.exporter.tracing import pluggable
from holdfast.files import disk_errors, write_json
from holdfast.recipe import ExportConfig

GRAPH = "model.onnx"
EXTERNAL = "model.onnx_data"
REPORT = "export.json"
LARGEST_INLINE_BYTES = 1 << 28  # protobuf holds a second copy of what is inline; it ends at 2 GB
FUSED_OPSET = 18  # the oldest that torch's tracing of today writes
VERSIONED = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
)
# Rotary embeddings whose frequencies depend on the length of the input: tracing freezes one length.
UNTRACEABLE_ROPE = ("dynamic", "longrope")

OnStage = Callable[[str], None]
"""Called with what begins, for example "tracing"; drives progress lines."""


@dataclass(frozen=True)
class GraphForm:
    """How the graph was made.

    Attributes:
        form: `fused` (attention is one operator) or `plain` (Optimum's graph).
        why_plain: why it is not fused; None where it is.
        passes: what each rewrite pass did, in order; empty for a plain graph.
    """

    form: Literal["fused", "plain"]
    why_plain: str | None
    passes: tuple[PassReport, ...]


@dataclass(frozen=True)
class ExportReport:
    """What was exported; `export.json` holds the same.

    Attributes:
        name, revision: hub name and commit of the model; None for a local folder.
        modules: module path -> where the linear layer is in the graph; blocks in order, head last.
        embedding: initializer of the token embedding, read by a Gather.
        tied: whether head and embedding were one parameter in torch. The graph always holds two
            initializers, so that the head can be quantized while the embedding stays as it is.
        proof: the graph against torch, and against itself.
    """

    architecture: str
    name: str | None
    revision: str | None
    target: str
    graph: GraphForm
    opset: int
    graph_bytes: int
    modules: dict[str, GraphLinear]
    embedding: str
    tied: bool
    proof: Proof
    versions: dict[str, str]

    @property
    def parity(self) -> Agreement:
        """The graph against torch on real prompts, position by position."""
        figures = next(check.figures for check in self.proof.checks if check.name == "prefill")
        return Agreement(
            max_abs=figures["max_abs"],
            mean_abs=figures["mean_abs"],
            same_top_frac=figures["same_top_frac"],
            positions=int(figures["positions"]),
        )


def export_model(
    source: Path,
    out: Path,
    config: ExportConfig,
    *,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> ExportReport:
    """Export a model folder to ONNX.

    Writes model.onnx (and model.onnx_data for large models), config.json, the tokenizer files byte for
    byte, genai_config.json for onnxruntime-genai, for `mobile` model.ort with the operators it needs, and
    export.json. The same model gives the same graph, byte for byte, every time.

    Arguments:
        source: a Hugging Face folder; see `load_source`.
        out: an existing, empty folder.
        seed: draws what the proof writes into padding.

    Raises:
        InputError: the source cannot be used; see `load_source`.
        ExportError: the model cannot be traced, the graph is not the model, or the target lacks an
            operator.
        ParityError: a check of the proof failed; see `prove`.
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
    require_empty(out)
    refuse_rope(source.model.config, source.folder)
    stage("tracing")
    target = lookup_target(config.target)
    opset = config.opset or target.opset
    form, modules = _write_graph(source, out, target, opset)
    require_operators(onnx.load(out / GRAPH, load_external_data=False), target.operators)
    copy_tokenizer_files(source.folder, out)
    _check_tokenizer(source, out)
    stage("comparing with torch")
    proof = prove(
        out / GRAPH, source, proof_prompts(source, seed), atol=config.atol, seed=seed, linears=modules
    )
    report = ExportReport(
        architecture=source.architecture,
        **_origin(source),
        target=target.name,
        graph=form,
        opset=opset,
        graph_bytes=graph_bytes(out),
        modules=modules,
        embedding=f"{row_of(source.model).embedding}.weight",
        tied=head_is_tied(source.model),
        proof=proof,
        versions={name: importlib.metadata.version(name) for name in VERSIONED},
    )
    write_json(out / REPORT, dataclasses.asdict(report))
    write_genai_config(out, shared_cache=form.form == "fused")
    if target.ort_format:
        stage("writing ORT format")
        write_ort_format(out, atol=config.atol, seed=seed)
    return report


def report_lines(report: ExportReport) -> list[str]:
    """The report for a person."""
    form = report.graph
    why = "" if form.why_plain is None else f" ({form.why_plain})"
    lines = [
        f"{report.architecture} for {report.target}: {form.form} graph{why}, opset {report.opset}, "
        f"{report.graph_bytes:,} bytes"
    ]
    lines += [f"  {step.name}: {step.rewrites} rewritten{_left(step)}" for step in form.passes]
    prompts = len(report.proof.prompt_tokens)
    lines.append(f"against torch and itself, {prompts} prompts:")
    return lines + [f"  {line}" for line in proof_lines(report.proof)]


def _left(step: PassReport) -> str:
    return f", {step.left} left ({step.why})" if step.left else ""


def graph_bytes(folder: Path) -> int:
    """Size of the graph and its external data."""
    files = (folder / GRAPH, folder / EXTERNAL)
    return sum(path.stat().st_size for path in files if path.is_file())


def read_export(folder: Path) -> ExportReport:
    """The report in `folder`/export.json.

    Raises:
        ExportError: there is none, or it is not one that `export_model` wrote.
    """
    path = folder / REPORT
    if not path.is_file():
        raise ExportError(f"Expected the {REPORT} that `holdfast export` writes in {folder}, found none.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["modules"] = {name: _linear(entry) for name, entry in data["modules"].items()}
        data["proof"] = read_proof(data["proof"])
        passes = tuple(PassReport(**entry) for entry in data["graph"].pop("passes"))
        data["graph"] = GraphForm(**data["graph"], passes=passes)
        return ExportReport(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{path} is not one that this version of `holdfast export` wrote: export the model again."
        ) from error


def _linear(entry: dict[str, Any]) -> GraphLinear:
    columns = entry.pop("columns")
    shape = tuple(entry.pop("shape"))
    return GraphLinear(**entry, shape=shape, columns=None if columns is None else tuple(columns))


def _write_graph(
    source: SourceModel, out: Path, target: Target, opset: int
) -> tuple[GraphForm, dict[str, GraphLinear]]:
    why_plain = _why_plain(source, target)
    if why_plain is not None:
        return GraphForm("plain", why_plain, ()), write_plain(source, out / GRAPH, opset=opset)
    if opset < FUSED_OPSET:
        raise ExportError(
            f"The target {target.name} needs opset {FUSED_OPSET} or newer, found {opset}: leave the opset "
            "to the target, or export with `--target portable`."
        )
    graph = fused_graph(source.model, opset=opset, positions=source.model.config.max_position_embeddings)
    save_graph(graph.model, out)
    with quiet(), disk_errors(out):
        source.model.config.save_pretrained(out)
    return GraphForm("fused", None, graph.passes), graph.modules


def _why_plain(source: SourceModel, target: Target) -> str | None:
    if not target.fused:
        return f"the target {target.name} takes ONNX's own operators alone"
    if not pluggable(source.model):
        return f"{source.architecture} does not call its attention through transformers' interface"
    return why_unfused(source.model)


def save_graph(model: ir.Model, out: Path) -> None:
    """Write model.onnx, its weights once and one at a time; beyond 256 MiB into a file beside it."""
    weights = (value.const_value for value in model.graph.initializers.values())
    large = sum(tensor.nbytes for tensor in weights if tensor is not None) > LARGEST_INLINE_BYTES
    with disk_errors(out):
        ir.save(model, out / GRAPH, external_data=EXTERNAL if large else None)


def _origin(source: SourceModel) -> dict[str, str | None]:
    """Hub name and commit; a local path says nothing to another machine."""
    first = source.origins[0] if source.origins else None
    if first is None or first.revision is None:
        return {"name": None, "revision": None}
    return {"name": first.name, "revision": first.revision}


def _ignore(stage: str) -> None:
    """No progress line is wanted."""


def require_empty(out: Path) -> None:
    """Raise ExportError unless `out` is an existing, empty folder."""
    if not out.is_dir() or any(out.iterdir()):
        raise ExportError(f"Expected an existing, empty folder to export into, found {out}.")


def refuse_rope(config: Any, folder: Path) -> None:
    """Raise ExportError where the rotary embedding of a config changes with the input's length."""
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in UNTRACEABLE_ROPE:
        raise ExportError(
            f"The model in {folder} scales its rotary embedding by `{kind}`, which depends "
            "on the input's length and cannot be traced: use a checkpoint with a fixed scaling."
        )


def _check_tokenizer(source: SourceModel, out: Path) -> None:
    """Template, tokenizer and stop ids are part of what a verdict is about: they may not change."""
    if ChatTokenizer.from_folder(out).digest() != source.tokenizer.digest():
        raise ExportError(
            f"The exported tokenizer differs from the one in {source.folder}: "
            "add `eos_token_id` to its generation_config.json."
        )
