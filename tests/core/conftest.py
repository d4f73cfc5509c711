"""A tiny random pair, and settings under which a whole run takes seconds."""

from pathlib import Path

import pytest

from holdfast.cli import run_cli
from tests.tiny import tiny_model

QUICK_YAML = (
    "calibrate: {samples: 18, steps: 1, alphas: [0.1], response_tokens: 3, top_k: 20, batch_size: 6}\n"
    "quantize: {agreement_frac: 0.9, atol: 1.0}\n"
    "evaluate: {limit: 6, max_new_tokens: 4}\n"
)


def long_llama(folder: Path, *, seed: int) -> Path:
    """A tiny Llama whose context holds the suites' prompts in its short tokens."""
    return tiny_model(folder, "LlamaForCausalLM", seed=seed, max_position_embeddings=512)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random "aligned" model and a random "base" with the same vocabulary."""
    root = tmp_path_factory.mktemp("pair")
    return long_llama(root / "aligned", seed=0), long_llama(root / "base", seed=1)


def write_recipe(path: Path, pair: tuple[Path, Path], more: str = "") -> Path:
    """A quick recipe for the tiny pair."""
    path.write_text(f"model: {pair[0]}\nbase: {pair[1]}\n{QUICK_YAML}{more}")
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny pair; its verdict is not PASS."""
    root = tmp_path_factory.mktemp("bundle")
    recipe = write_recipe(root / "r.yaml", tiny_pair)
    assert run_cli(["run", str(recipe), "--out", str(root / "bundle")]) in (3, 4)
    return root / "bundle"
