"""Every architecture through pruning, calibration, export and static quantization, tiny and random."""

from pathlib import Path

import pytest

from holdfast.exporter.architectures import ROWS, linear_modules
from holdfast.exporter.export import export_model
from holdfast.exporter.source import load_source
from holdfast.prune.apply import prune_model
from holdfast.quantize.artifact.write import quantize_bundle
from holdfast.quantize.calibrate import calibrate
from holdfast.quantize.prompts.draw import load_calibration
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.quantize.simulate import check_simulation
from holdfast.recipe import PruneConfig, QuantizeConfig
from tests.exporter.coverage import PLAIN, VARIANTS
from tests.quantize.conftest import SHORT
from tests.tiny import tiny_model

# Beside each row's first case: where blocks are wired differently, or linears lie outside of them.
UNUSUAL = [
    ("OPTForCausalLM", "norms behind, narrower embedding (350m)"),
    ("FalconForCausalLM", "new decoder architecture (40b)"),
    ("FalconForCausalLM", "ALiBi (rw)"),
]
CASES = [*((name, next(iter(VARIANTS[name]))) for name in ROWS), *UNUSUAL]
# A value on a tie between two codes may get either, and the rest of its row sees it: one row of the eight.
W8A8 = QuantizeConfig(atol=1e-3, agreement_frac=0.85)


@pytest.mark.parametrize(("architecture", "label"), CASES)
def test_the_artifact_computes_what_the_simulation_does(
    architecture: str, label: str, tmp_path: Path
) -> None:
    settings = {**VARIANTS[architecture][label], "max_position_embeddings": 256}
    aligned, negative = (
        load_source(tiny_model(tmp_path / str(seed), architecture, seed=seed, **settings))
        for seed in range(2)
    )
    prompts = load_calibration("builtin", SHORT.samples, seed=0)
    ids = chat_prompts(aligned.tokenizer, [prompt.prompt for prompt in prompts[:8]])
    pruned = prune_model(aligned, ids, PruneConfig(method="wanda", sparsity_frac=0.25))
    assert pruned.reached_frac == pytest.approx(0.25, abs=0.01)
    calibration = calibrate(aligned, negative.model, SHORT, W8A8, prompts=prompts, seed=0)
    calibrated, exported, out = (tmp_path / name for name in ("calibrated", "exported", "out"))
    calibration.save(calibrated)
    exported.mkdir()
    export_model(calibrated, exported, PLAIN)
    out.mkdir()
    quantize_bundle(exported, out, calibrated, W8A8)
    ranges = calibration.record.activation_ranges
    assert set(ranges) == set(linear_modules(aligned.model))
    check_simulation(load_source(calibrated), calibration.decisions(W8A8), out, W8A8, ids)
