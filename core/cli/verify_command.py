"""`holdfast verify`: rerun the alignment suite of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.cli.options import FOLDER, emit, json_option, overwrite_option, threads_option
from holdfast.errors import ExitCode
from holdfast.files import refuse_existing, write_text


@click.command("verify")
@click.argument("bundle", type=FOLDER)
@click.option(
    "--margin",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Non-inferiority margin as a fraction.  [default: the bundle's]",
)
@click.option("--report", type=FOLDER, help="Write the report of this verification here (HTML).")
@threads_option
@overwrite_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    bundle: Path,
    margin: float | None,
    report: Path | None,
    threads: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Check the files of BUNDLE, then run its alignment suite again in ONNX Runtime.

    The answers are compared, prompt by prompt, with the full-precision baseline in the bundle.
    """
    from holdfast.evals.report import render_html
    from holdfast.verification import verify_bundle

    if report is not None:
        refuse_existing(report, overwrite=overwrite)
    assessment = verify_bundle(bundle, threads=threads, margin_frac=margin)
    lines = assessment.lines()
    if report is not None:
        write_text(report, render_html(assessment.report))
        lines.append(f"report  {report}")
    emit(assessment.report, lines, as_json=as_json)
    context.exit(ExitCode.for_verdict(assessment.verdict.outcome))
