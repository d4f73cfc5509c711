"""The plain graph: Optimum's export of a causal language model, its weights named and proved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from optimum.exporters.onnx import onnx_export_from_model

from holdfast.errors import ExportError
from holdfast.exporter.architectures import linear_modules, row_of
from holdfast.exporter.graph import GraphLinear, map_linears, name_weights, restore_scopes
from holdfast.exporter.optimum_config import onnx_configs
from holdfast.exporter.quiet import quiet
from holdfast.exporter.source import SourceModel
from holdfast.files import disk_errors

TASK = "text-generation-with-past"


def write_plain(source: SourceModel, graph: Path, *, opset: int) -> dict[str, GraphLinear]:
    """Write Optimum's graph to the path `graph`, beyond 2 GB with its weights in a file beside it.

    Raises:
        ExportError: Optimum fails, or a weight of the graph is not the model's.
    """
    configs = onnx_configs(source.model)
    optimum_export(source.model, graph.parent, task=TASK, opset=opset, configs=configs)
    return _settle_graph(source, graph)


def optimum_export(
    model: Any, out: Path, *, task: str, opset: int, configs: dict[str, Any] | None = None
) -> None:
    """Optimum's export of a loaded model into a folder, without its validation and post-processing.

    The post-processing would merge head and embedding where `accelerate` is installed and
    leave them apart elsewhere; without it the graph is the same everywhere.

    Arguments:
        task: as Optimum names it.
        configs: Optimum's `custom_onnx_configs`.

    Raises:
        ExportError: Optimum fails.
        DiskFullError: no space left.
    """
    name = model.config._name_or_path
    with tempfile.TemporaryDirectory() as nothing, disk_errors(out), torch.random.fork_rng([]):
        model.config._name_or_path = nothing  # no tokenizer there to load and rewrite
        try:
            with quiet():
                onnx_export_from_model(
                    model=model,
                    output=out,
                    task=task,
                    opset=opset,
                    do_validation=False,
                    no_post_process=True,
                    custom_onnx_configs=configs,
                )
        except OSError:
            raise
        except Exception as error:  # torch and Optimum raise whatever the tracing ran into
            reason = str(error).strip().splitlines()
            raise ExportError(
                f"Optimum could not export the {type(model).__name__} at opset {opset} "
                f"({type(error).__name__}: {reason[0] if reason else 'no message'})."
            ) from error
        finally:
            model.config._name_or_path = name


def _settle_graph(source: SourceModel, graph: Path) -> dict[str, GraphLinear]:
    """Name the weights, prove them, and write the graph back; external data stays where it is."""
    linears = linear_modules(source.model)
    model = onnx.load(graph, load_external_data=False)
    restore_scopes(model.graph, row_of(source.model).scopes)
    name_weights(model.graph, list(linears))
    modules = map_linears(model.graph, linears, graph.parent)
    embedding = f"{row_of(source.model).embedding}.weight"
    if embedding not in {tensor.name for tensor in model.graph.initializer}:
        raise ExportError(f"The graph has no initializer `{embedding}` for the token embedding.")
    with disk_errors(graph.parent):
        onnx.save(model, graph)
    return modules
