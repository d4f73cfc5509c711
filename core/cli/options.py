"""Options that several commands share, and how a command prints its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from holdfast.files import to_json
from holdfast.recipe import KV_CACHES, TARGETS, ExportConfig, QuantizeConfig

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


def quantization_options(command: Command) -> Command:
    """`--scheme`, `--activation-bits`, `--block-size` and `--exclude`, as the recipe has them."""
    defaults = QuantizeConfig()
    for option in (
        click.option(
            "--exclude", multiple=True, metavar="PATTERN", help="Module paths left in fp32; repeatable."
        ),
        click.option(
            "--block-size",
            type=int,
            default=defaults.block_size,
            show_default=True,
            help="Weights that share a scale, for w4: 16, 32, 64 or 128.",
        ),
        click.option(
            "--activation-bits",
            type=click.IntRange(2, 8),
            default=defaults.activation_bits,
            show_default=True,
            help="Width of static activations, for w8a8.",
        ),
        click.option(
            "--scheme",
            type=click.Choice(["w8a8", "w4", "none"]),
            default=defaults.scheme,
            show_default=True,
            help="Quantization scheme.",
        ),
    ):
        command = option(command)
    return command


def emit(result: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print a command's result on stdout: JSON for machines, lines for people."""
    click.echo(to_json(result).rstrip("\n") if as_json else "\n".join(lines))
