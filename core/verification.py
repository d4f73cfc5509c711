"""Verifying a bundle where it is: files, then the alignment suite again, against its own baseline."""

from __future__ import annotations

from pathlib import Path

import msgspec

from holdfast.alignment import Assessment, answer_suites, assess, load_bundled_suites, load_runs
from holdfast.bundle import ANSWERS, SUITES, Bundle, open_bundle
from holdfast.errors import BundleIntegrityError
from holdfast.evals.report import Details
from holdfast.runtime.environment import environment_rows
from holdfast.runtime.session import OnnxLanguageModel


def verify_bundle(folder: Path, *, threads: int = 0, margin_frac: float | None = None) -> Assessment:
    """Check every file of a bundle, run its suites on this machine, and compare with its baseline.

    Arguments:
        margin_frac: non-inferiority margin; None takes the bundle's own.

    Raises:
        BundleIntegrityError: a file changed, or the tokenizer is not the baseline's.
        ExecutionError: ONNX Runtime refuses the graph.
    """
    bundle = open_bundle(folder)
    config = bundle.evaluation
    if margin_frac is not None:
        config = msgspec.structs.replace(config, margin_frac=margin_frac)
    model = OnnxLanguageModel.open(
        folder, threads=threads, name="artifact (ONNX)", batch_size=config.batch_size
    )
    if model.tokenizer.digest() != bundle.manifest.chat_digest:
        raise BundleIntegrityError(
            f"Tokenizer or chat template of {folder} are not those of the baseline: "
            "make the bundle again with `holdfast run`."
        )
    suites = load_bundled_suites(folder / SUITES, bundle.suite_names)
    runs = load_runs(folder / ANSWERS, suites, answer_suites(model, suites, config))
    return assess(suites, runs, config, seed=bundle.manifest.seed, details=_details(bundle, threads))


def _details(bundle: Bundle, threads: int) -> Details:
    manifest = bundle.manifest
    recorded = {"outcome": manifest.verdict, "made by": f"holdfast {manifest.holdfast_version}"}
    return Details(
        title=f"{bundle.model_id}, verified on this machine",
        created=None,
        sections={"Environment": environment_rows(threads=threads), "Recorded verdict": recorded},
    )
