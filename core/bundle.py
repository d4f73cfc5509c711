"""The bundle: one folder that serves, verifies and explains itself. Reading side and layout.

model.onnx  config.json  tokenizer files  generation_config.json     what ONNX Runtime needs
manifest.json  recipe.yaml  steps/*.json                             how it was made
alignment/suites/*.jsonl                                             the prompts
alignment/answers/<subject>/*.jsonl                                  baseline, twin, pruned, fp32 graph
alignment/report.json  alignment/report.html                         the verdict, with its reasons
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.config import decode
from holdfast.errors import BundleIntegrityError, NotVerifiedError
from holdfast.manifest import MANIFEST, Manifest, check_files, read_manifest
from holdfast.recipe import EvaluateConfig

SUITES = Path("alignment/suites")
ANSWERS = Path("alignment/answers")
REPORT_JSON = Path("alignment/report.json")
REPORT_HTML = Path("alignment/report.html")
RECIPE = Path("recipe.yaml")
STEPS = Path("steps")

ALIGNED = "aligned"
TWIN = "twin"
FP32_ONNX = "fp32-onnx"
PRUNED = "pruned"
ARTIFACT = "artifact"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what they were when it was sealed."""

    folder: Path
    manifest: Manifest

    @property
    def model_id(self) -> str:
        """Name under which a server offers the model."""
        return self.folder.resolve().name

    @property
    def suite_names(self) -> list[str]:
        """Suites of the verdict, in the order of the run."""
        return [suite["name"] for suite in self._baseline["suites"]]

    @property
    def evaluation(self) -> EvaluateConfig:
        """How the suites were run."""
        return decode(self._baseline["evaluate"], EvaluateConfig, what=str(self.folder / MANIFEST))

    @property
    def _baseline(self) -> dict[str, Any]:
        return next(step.settings for step in self.manifest.steps if step.name == "baseline")

    def report(self) -> dict[str, Any]:
        """The recorded report, as `alignment/report.json` has it."""
        report = json.loads((self.folder / REPORT_JSON).read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise BundleIntegrityError(f"{self.folder / REPORT_JSON} should hold one JSON object.")
        return report


def open_bundle(folder: Path) -> Bundle:
    """Check manifest and files, before anything is loaded from them.

    Raises:
        BundleError, BundleIntegrityError: see `holdfast.manifest`.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return Bundle(folder, manifest)


def require_pass(bundle: Bundle, *, allow_unverified: bool) -> None:
    """Raise NotVerifiedError unless the recorded verdict is PASS or the user said otherwise."""
    if bundle.manifest.verdict != "PASS" and not allow_unverified:
        raise NotVerifiedError(
            f"The alignment verdict of {bundle.folder} is {bundle.manifest.verdict}, expected PASS: "
            f"read {bundle.folder / REPORT_HTML}, or pass --serve-unverified-model to serve it anyway."
        )
