"""`holdfast verify`: rerun the alignment suite of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from holdfast.alignment import answer_suites, assess, load_bundled_suites, load_runs
from holdfast.bundle import ANSWERS, SUITES, Bundle, open_bundle
from holdfast.cli.options import FOLDER, emit, json_option, overwrite_option, threads_option
from holdfast.errors import BundleIntegrityError, ExitCode
from holdfast.evals.report import Details, render_html
from holdfast.files import refuse_existing, write_text
from holdfast.runtime.environment import environment
from holdfast.runtime.session import OnnxLanguageModel


@click.command("verify")
@click.argument("bundle", type=FOLDER)
@click.option("--margin", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Another margin.")
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
    if report is not None:
        refuse_existing(report, overwrite=overwrite)
    opened = open_bundle(bundle)
    config = opened.evaluation
    if margin is not None:
        config = msgspec.structs.replace(config, margin_frac=margin)
    model = OnnxLanguageModel.open(
        bundle, threads=threads, name="artifact (ONNX)", batch_size=config.batch_size
    )
    if model.tokenizer.digest() != opened.manifest.chat_digest:
        raise BundleIntegrityError(
            f"Tokenizer or chat template of {bundle} are not those of the baseline: "
            "make the bundle again with `holdfast run`."
        )
    suites = load_bundled_suites(bundle / SUITES, opened.suite_names)
    candidate = answer_suites(model, suites, config)
    assessment = assess(
        suites,
        load_runs(bundle / ANSWERS, suites, candidate),
        config,
        seed=opened.manifest.seed,
        details=_details(opened, threads),
    )
    lines = assessment.lines()
    if report is not None:
        write_text(report, render_html(assessment.report))
        lines.append(f"report  {report}")
    emit(assessment.report, lines, as_json=as_json)
    context.exit(ExitCode.for_verdict(assessment.verdict.outcome))


def _details(bundle: Bundle, threads: int) -> Details:
    machine = {
        key: ", ".join(value) if isinstance(value, list) else value
        for key, value in environment(threads=threads).items()
    }
    recorded = {
        "outcome": bundle.manifest.verdict,
        "made by": f"holdfast {bundle.manifest.holdfast_version}",
    }
    return Details(
        title=f"{bundle.model_id}, verified on this machine",
        created=None,
        sections={"Environment": machine, "Recorded verdict": recorded},
    )
