"""Options that several commands share, and how a command prints its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.errors import UsageError
from holdfast.files import to_json
from holdfast.recipe import (
    CALIBRATION_METHODS,
    KV_CACHES,
    LOSSES,
    TARGETS,
    CalibrateConfig,
    ExportConfig,
    PruneConfig,
    QuantizeConfig,
)

if TYPE_CHECKING:
    from holdfast.exporter.source import SourceModel

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what --out names.")
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Intra-op threads; 0 leaves the choice to the runtime.",
)
target_option = click.option(
    "--target",
    type=click.Choice(TARGETS),
    default=ExportConfig().target,
    show_default=True,
    help="Where the graph is to run; `portable` uses ONNX's own operators alone.",
)
kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHES),
    default=QuantizeConfig().kv_cache,
    show_default=True,
    help="Type of the keys and values that decoding keeps.",
)
calibration_data_option = click.option(
    "--calibration-data",
    default="builtin",
    show_default=True,
    help="`builtin`, or a JSONL file with prompt and kind (harmful, borderline, neutral).",
)
base_option = click.option(
    "--base", default="ablate", show_default=True, help="Folder or hub name of the base, or `ablate`."
)
samples_option = click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=CalibrateConfig().samples,
    show_default=True,
    help="Calibration prompts.",
)
loss_option = click.option("--loss", type=click.Choice(LOSSES), help="Calibration loss.")
alphas_option = click.option(
    "--alpha", "alphas", type=float, multiple=True, help="Push weight to try; repeatable."
)
safety_weight_option = click.option(
    "--lambda",
    "safety_weight",
    type=click.FloatRange(min=0.0),
    default=PruneConfig().safety_weight,
    show_default=True,
    help="Weight of safety against utility.",
)
block_size_option = click.option(
    "--block-size",
    type=int,
    default=QuantizeConfig().block_size,
    show_default=True,
    help="Weights that share a scale, where weights are in blocks: 16, 32, 64 or 128.",
)


def out_option(what: str) -> Callable[[Command], Command]:
    """The required `--out` of a command that writes one folder."""
    return click.option("--out", type=FOLDER, required=True, help=f"Folder for {what}.")


def source_options(command: Command) -> Command:
    """`--revision`, `--trust-remote-code` and `--adapter-base`, for a MODEL that may be a hub name."""
    for option in (
        click.option(
            "--adapter-base",
            metavar="MODEL",
            help="Folder or hub name of an adapter's base, if not the one that adapter_config.json names.",
        ),
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Accept a config with `auto_map`; its code runs where transformers has no such class.",
        ),
        click.option("--revision", help="Branch, tag or commit of a hub name; the commit is recorded."),
    ):
        command = option(command)
    return command


def load_model(
    name: str, *, revision: str | None, trust_remote_code: bool, adapter_base: str | None
) -> SourceModel:
    """The model behind the MODEL argument and `source_options`; needs the `export` extra."""
    from holdfast.exporter.hub import resolve_source
    from holdfast.exporter.source import load_source

    source = resolve_source(name, revision, trust_remote_code=trust_remote_code)
    return load_source(source, trust_remote_code=trust_remote_code, base_of_adapter=adapter_base)


scheme_option = click.option(
    "--scheme",
    metavar="SCHEME",
    default=QuantizeConfig().scheme,
    show_default=True,
    help="w8a8 ... w8a2, w4a8 (static activations), w8, w4, w2 (weights alone) or none.",
)
method_option = click.option(
    "--method",
    type=click.Choice(CALIBRATION_METHODS),
    default=CalibrateConfig().method,
    show_default=True,
    help="How ranges and codes are decided; all but contrastive and qat know nothing of alignment.",
)


def quantization_options(command: Command) -> Command:
    """What decides the format of every linear, as the recipe has it."""
    for option in (
        click.option(
            "--exclude", multiple=True, metavar="PATTERN", help="Module paths left in fp32; repeatable."
        ),
        click.option(
            "--mixed",
            multiple=True,
            metavar="PATTERN=SCHEME",
            help="Module paths with another scheme; repeatable, the last match wins.",
        ),
        click.option(
            "--per-tensor",
            is_flag=True,
            help="One scale for each static 8-bit weight, not one a channel.",
        ),
        click.option("--signed-activations", is_flag=True, help="int8 activations (S8S8), symmetric."),
        click.option("--symmetric-activations", is_flag=True, help="Static ranges centred on 0."),
        click.option("--asymmetric-weights", is_flag=True, help="Zero points for weights in blocks."),
        block_size_option,
        scheme_option,
    ):
        command = option(command)
    return command


def quantization_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of `quantization_options` as a recipe's `quantize` section.

    Raises:
        UsageError: nothing before or after an equals sign.
    """
    mixed = {}
    for text in flags["mixed"]:
        pattern, _, scheme = text.rpartition("=")
        if not pattern or not scheme:
            raise UsageError(f"--mixed expects PATTERN=SCHEME, got {text!r}.")
        mixed[pattern] = scheme
    return {
        "scheme": flags["scheme"],
        "mixed": mixed,
        "exclude": list(flags["exclude"]),
        "block_size": flags["block_size"],
        "symmetric_weights": not flags["asymmetric_weights"],
        "symmetric_activations": flags["symmetric_activations"],
        "signed_activations": flags["signed_activations"],
        "per_channel": not flags["per_tensor"],
    }


def emit(result: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print a command's result on stdout: JSON for machines, lines for people."""
    click.echo(to_json(result).rstrip("\n") if as_json else "\n".join(lines))
