"""The graphs that are compared, made once into a work folder from one checkpoint.

    python -m benchmarks.build --size 125m --work FOLDER

Optimum's export is the plain graph that Holdfast writes for the target `portable`: the same call, with the
weights named. Both 4-bit graphs of ours come from one quantizer, so that only the graph differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx

from benchmarks.decoding import Plan
from benchmarks.models import SHAPES, checkpoint
from holdfast.exporter.export import REPORT, export_model
from holdfast.files import atomic_folder, write_json
from holdfast.progress import say
from holdfast.quantize.artifact.write import quantize_bundle
from holdfast.recipe import ExportConfig, QuantizeConfig
from holdfast.runtime.external_data import graph_files

SHARING = "GroupQueryAttention"
"""The attention operator that writes its present behind its past in one buffer."""

GENAI = "onnxruntime-genai"


@dataclass(frozen=True)
class Recipe:
    """How a graph is made here.

    Attributes:
        maker: whose graph it is.
        config: an export, or the quantization of what `source` names.
    """

    name: str
    maker: str
    scheme: str
    config: ExportConfig | QuantizeConfig
    source: str = ""


W4 = QuantizeConfig(scheme="w4", block_size=32, accuracy_level=4)
RECIPES = (
    Recipe("optimum-fp32", "Optimum", "fp32", ExportConfig(target="portable")),
    Recipe("holdfast-fp32", "Holdfast", "fp32", ExportConfig(target="cpu-x86")),
    Recipe("holdfast-w8a8", "Holdfast", "W8A8", QuantizeConfig(scheme="w8a8"), "holdfast-fp32"),
    Recipe("optimum-w4", "Optimum", "W4", W4, "optimum-fp32"),
    Recipe("holdfast-w4", "Holdfast", "W4", W4, "holdfast-fp32"),
)


@dataclass(frozen=True)
class Graph:
    """A graph on disk.

    Attributes:
        maker: whose graph it is.
        scheme: fp32, W8A8 or W4.
        file_bytes: with its external data.
        producer: what the file names as its writer.
    """

    maker: str
    scheme: str
    plan: Plan
    file_bytes: int
    producer: str


def make(recipe: Recipe, source: Path, work: Path) -> Path:
    """The folder of a recipe's graph; made if it is not there.

    Arguments:
        source: the checkpoint.
    """
    folder = work / recipe.name
    if not folder.is_dir():
        say(f"making {recipe.name}")
        with atomic_folder(folder) as out:
            if isinstance(recipe.config, ExportConfig):
                export_model(source, out, recipe.config)
                _allow_own_operators(out)
            else:
                quantize_bundle(work / recipe.source, out, None, recipe.config)
    return folder


def _allow_own_operators(folder: Path) -> None:
    """Optimum's plain graph runs in ONNX Runtime here, so its weights may be MatMulNBits."""
    path = folder / REPORT
    report = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, report | {"target": "cpu-x86"})


def describe(folder: Path, config: dict[str, Any], maker: str, scheme: str, threads: int) -> Graph:
    """A graph folder as something to run.

    Arguments:
        config: the checkpoint's config.json.
    """
    files = graph_files(folder)
    model = onnx.load(files[0], load_external_data=False)
    heads = config["num_attention_heads"]
    plan = Plan(
        graph=str(files[0]),
        shared=shares_cache(model.graph),
        vocabulary=config["vocab_size"],
        kv_heads=config["num_key_value_heads"],
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        threads=threads,
    )
    producer = f"{model.producer_name} {model.producer_version}".strip()
    return Graph(maker, scheme, plan, sum(path.stat().st_size for path in files), producer)


def shares_cache(graph: Any) -> bool:
    """Whether every present cache is written by the operator that can write it into the past's buffer."""
    writers = {name: node.op_type for node in graph.node for name in node.output}
    present = [value.name for value in graph.output if value.name != "logits"]
    return all(writers.get(name) == SHARING for name in present)


def make_apart(recipe: Recipe, size: str, work: Path, given: Path | None) -> int:
    """`make` in a process of its own, whose memory is then free again; its exit status."""
    if (work_folders(size, work, given)[1] / recipe.name).is_dir():
        return 0
    command = ["--size", size, "--work", str(work), "--only", recipe.name]
    command += [] if given is None else ["--checkpoint", str(given)]
    return subprocess.run([sys.executable, "-m", "benchmarks.build", *command], check=False).returncode


def graphs_of(
    size: str, work: Path, given: Path | None, threads: int, genai: dict[str, Path | None]
) -> tuple[list[Graph], dict[str, str]]:
    """All graphs, Optimum's fp32 graph first, and why others are missing.

    Arguments:
        given: a checkpoint to start from, instead of the one of that size.
        genai: scheme -> folder that onnxruntime-genai's model builder wrote, or None.
    """
    source, folder = work_folders(size, work, given)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    graphs, missing = [], {}
    for recipe in RECIPES:
        status = make_apart(recipe, size, work, given)
        if status:
            missing[f"{recipe.maker}, {recipe.scheme}"] = (
                f"making the graph ended with exit status {status}"
            )
        else:
            graphs.append(describe(folder / recipe.name, config, recipe.maker, recipe.scheme, threads))
    for scheme, built in genai.items():
        if built is None:
            missing[f"{GENAI}, {scheme}"] = "no folder of its model builder was given"
        else:
            graphs.append(describe(built, config, GENAI, scheme, threads))
    schemes = ["fp32", "W8A8", "W4"]
    return sorted(graphs, key=lambda graph: schemes.index(graph.scheme)), missing


def work_folders(size: str, work: Path, given: Path | None) -> tuple[Path, Path]:
    """The checkpoint and the folder of its graphs; a given checkpoint has graphs of its own."""
    source = given or checkpoint(size, work / size / "checkpoint")
    key = "graphs" if given is None else f"graphs-of-{given.resolve().name}"
    return source, work / size / key


def size_options(command: Any) -> Any:
    """The options that every script has."""
    options: Sequence[Any] = (
        click.option("--size", type=click.Choice(list(SHAPES)), required=True),
        click.option(
            "--work", type=click.Path(path_type=Path), required=True, help="Graphs are kept here."
        ),
        click.option(
            "--checkpoint",
            "given",
            type=click.Path(path_type=Path, exists=True),
            help="Start from this checkpoint of that size instead of making one.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@size_options
@click.option("--only", type=click.Choice([recipe.name for recipe in RECIPES]), help="Make this one only.")
def main(size: str, work: Path, given: Path | None, only: str | None) -> None:
    """Make the checkpoint and the graphs that are not there yet."""
    source, folder = work_folders(size, work, given)
    for recipe in RECIPES:
        if only in (None, recipe.name):
            click.echo(make(recipe, source, folder))


if __name__ == "__main__":
    main()
