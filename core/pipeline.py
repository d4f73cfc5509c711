"""The run: from an aligned model to a verified bundle, in resumable steps.

    baseline -> prune -> calibrate -> export -> quantize -> evaluate -> bundle

Wiring only: each step's algorithm lives in its own package. This module is workshop side (it
imports torch through them); the device never loads it.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from holdfast import __version__
from holdfast.alignment import answer_suites, judge_answers
from holdfast.bundle import (
    ALIGNED,
    ANSWERS,
    ARTIFACT,
    FP32_ONNX,
    RECIPE,
    STEPS,
    SUITES,
    TWIN,
)
from holdfast.config import encode
from holdfast.evals.run import SuiteAnswers, read_answers
from holdfast.evals.suites import Suite, load_suites, write_suite
from holdfast.exporter.export import export_model
from holdfast.exporter.source import SourceModel, load_base, load_source, save_source, source_digests
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.files import atomic_folder, refuse_existing, write_json, write_text
from holdfast.manifest import SCHEMA_VERSION, Manifest, ModelEntry, StepEntry, seal
from holdfast.progress import bar
from holdfast.prune.apply import prune_model
from holdfast.quantize.prompts import CalibrationPrompt, load_calibration, refuse_leakage
from holdfast.recipe import Recipe, recipe_yaml
from holdfast.runtime.session import OnnxLanguageModel
from holdfast.steps import StepResult, StepRunner

ABLATE = "ablate"
STEP_NAMES = (
    "baseline",
    "reference-export",
    "prune",
    "calibrate",
    "export",
    "quantize",
    "evaluate",
)
