"""`holdfast inspect`: what a bundle is, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from holdfast.bundle import REPORT_HTML, Bundle, open_bundle
from holdfast.cli.options import FOLDER, emit, json_option
from holdfast.config import encode


@click.command("inspect")
@click.argument("bundle", type=FOLDER)
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Check the files of BUNDLE and show its manifest and recorded verdict."""
    opened = open_bundle(bundle)
    emit(encode(opened.manifest), _lines(opened), as_json=as_json)


def _lines(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    total_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    return [
        f"{bundle.folder}: {len(manifest.files)} files, {total_bytes:,} bytes, all as sealed",
        f"verdict   {manifest.verdict} (when the bundle was made; `holdfast verify` runs it again)",
        f"model     {manifest.model.name} ({len(manifest.model.files)} files, digests in the manifest)",
        f"base      {manifest.base.name} ({manifest.base.kind})",
        f"made by   holdfast {manifest.holdfast_version}, seed {manifest.seed}",
        "steps",
        *(f"  {step.name:<18}{_summary(step.result)}" for step in manifest.steps),
        f"report    {bundle.folder / REPORT_HTML}",
    ]


def _summary(result: dict[str, Any]) -> str:
    """The scalar entries of a step's result on one line."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.items()
        if isinstance(value, str | int | float)
    )
