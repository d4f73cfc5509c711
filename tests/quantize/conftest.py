"""One tiny aligned and one unaligned model, calibrated and exported once for the whole folder."""

from pathlib import Path

import pytest

from holdfast.exporter.export import export_model
from holdfast.exporter.source import SourceModel, load_source
from holdfast.quantize.calibrate import Calibration, calibrate
from holdfast.quantize.prompts.draw import CalibrationPrompt, load_calibration
from holdfast.quantize.prompts.sequences import chat_prompts
from holdfast.recipe import CalibrateConfig, ExportConfig, QuantizeConfig, TargetName
from tests.tiny import tiny_llama

SHORT = CalibrateConfig(samples=24, steps=3, batch_size=8, alphas=(0.3,), response_tokens=4, top_k=50)


@pytest.fixture(scope="session")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return load_source(tiny_llama(tmp_path_factory.mktemp("aligned"), seed=0))


@pytest.fixture(scope="session")
def negative(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return load_source(tiny_llama(tmp_path_factory.mktemp("negative"), seed=1))


@pytest.fixture(scope="session")
def prompts() -> list[CalibrationPrompt]:
    return load_calibration("builtin", SHORT.samples, seed=0)


@pytest.fixture(scope="session")
def token_ids(aligned: SourceModel, prompts: list[CalibrationPrompt]) -> list[list[int]]:
    return chat_prompts(aligned.tokenizer, [prompt.prompt for prompt in prompts[:12]])


class Case:
    """A calibrated, exported tiny model."""

    def __init__(self, calibration: Calibration, config: QuantizeConfig, folder: Path) -> None:
        self.calibration, self.config = calibration, config
        self.calibrated, self.exported = folder / "calibrated", folder / "exported"
        self.exported.mkdir(parents=True)
        calibration.save(self.calibrated)
        export_model(self.calibrated, self.exported, ExportConfig())
        self.source = load_source(self.calibrated)


@pytest.fixture(scope="session")
def cases(
    aligned: SourceModel,
    negative: SourceModel,
    prompts: list[CalibrationPrompt],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    """Scheme name -> case: `w8a8`, `w8a4` and `w4`."""
    configs = {
        "w8a8": QuantizeConfig(atol=1e-3, agreement_frac=0.98),
        "w8a4": QuantizeConfig(scheme="w8a4", atol=1e-3, agreement_frac=0.98),
        "w4": QuantizeConfig(scheme="w4", block_size=16, atol=0.05, agreement_frac=0.98),
    }
    made = {}
    for name, config in configs.items():
        calibration = calibrate(aligned, negative.model, SHORT, config, prompts=prompts, seed=0)
        made[name] = Case(calibration, config, tmp_path_factory.mktemp(name))
    return made


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("checkpoint"), seed=3)


@pytest.fixture(scope="session")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a graph of ONNX's own operators."""
    return exported(checkpoint, tmp_path_factory.mktemp("plain"), "portable")


@pytest.fixture(scope="session")
def fused(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with attention as one operator."""
    return exported(checkpoint, tmp_path_factory.mktemp("fused"), "cpu-x86")


def exported(checkpoint: Path, out: Path, target: TargetName) -> Path:
    export_model(checkpoint, out, ExportConfig(target=target))
    return out
