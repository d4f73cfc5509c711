"""The main job on the reference pair, as the README tells it: run, verify, serve, on both backends."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from holdfast.bundle import open_bundle
from holdfast.chat import user
from holdfast.cli import run_cli
from holdfast.runtime.session import OnnxLanguageModel
from reference.damage import damage_bundle

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "reference" / "recipe.yaml"
Capture = pytest.CaptureFixture[str]
CLI = [sys.executable, "-c", "from holdfast.cli import main; main()"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job")


def run_reference(root: Path, backend: str) -> Path:
    """`holdfast run` on the embedded recipe; both backends share baseline and calibration."""
    out = root / f"bundle-{backend}"
    flags = ["--backend", backend, "--out", str(out), "--work", str(root / "work")]
    assert run_cli(["run", str(RECIPE), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    return run_reference(root, "ort")


@pytest.fixture(scope="module")
def inc_bundle(root: Path, bundle: Path) -> Path:
    pytest.importorskip("neural_compressor", reason="the `inc` extra is not installed")
    return run_reference(root, "inc")


@pytest.fixture(params=["ort", "inc"])
def either(request: pytest.FixtureRequest, bundle: Path) -> Path:
    """The bundle of each backend in turn."""
    path: Path = bundle if request.param == "ort" else request.getfixturevalue("inc_bundle")
    return path


def quantize_step(bundle: Path) -> dict[str, Any]:
    steps = {step.name: step for step in open_bundle(bundle).manifest.steps}
    return steps["quantize"].result


def test_the_verdict_is_pass_and_the_artifact_is_smaller(either: Path) -> None:
    opened = open_bundle(either)
    assert opened.manifest.verdict == "PASS"
    step = quantize_step(either)
    assert step["bytes_after"] < 0.6 * step["bytes_before"]


def test_simulation_and_artifact_agree(either: Path) -> None:
    """At 99 % of the positions all logits within 0.2, and the same next token at 99 %."""
    step = quantize_step(either)
    assert step["simulation_positions"] > 500
    assert step["simulation_within_frac"] >= 0.99
    assert step["simulation_max_abs"] < 1.0
    assert step["simulation_same_top_frac"] >= 0.99


def test_the_learned_ranges_are_the_ones_in_the_graph(either: Path) -> None:
    learned = json.loads((either / "steps" / "calibration.json").read_text())["activation_ranges"]
    written = json.loads((either / "steps" / "quantize.json").read_text())["tensors"]
    assert len(learned) > 20
    for path, entry in learned.items():
        assert (written[path]["scale"], written[path]["zero_point"]) == (
            entry["scale"],
            entry["zero_point"],
        )


def test_verify_passes_on_a_good_bundle(either: Path, capsys: Capture) -> None:
    assert run_cli(["verify", str(either)]) == 0
    assert capsys.readouterr().out.startswith("PASS")


def test_verify_fails_on_weights_rounded_to_two_bits(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    damaged = tmp_path / "damaged"
    damage_bundle(bundle, damaged, bits=2)
    assert run_cli(["inspect", str(damaged)]) == 0  # the files are as sealed: only the suite can tell
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert run_cli(["verify", str(damaged), "--report", str(page)]) == 3
    assert capsys.readouterr().out.startswith("FAIL")
    assert "Fail" in page.read_text()


def test_the_bundle_opens_in_optimum(bundle: Path) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = OnnxLanguageModel.open(bundle)
    ids = model.tokenizer.encode_chat(user("How do I bake bread?"))
    theirs = ORTModelForCausalLM.from_pretrained(bundle)
    output = theirs.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
    )
    ours = model.generate([ids], max_new_tokens=12)[0]
    assert output[0, len(ids) :].tolist()[: len(ours)] == ours


def test_a_twin_whose_refusals_did_not_fall_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """The pair's refusal is not one direction of the residual stream: no twin, no run, one sentence."""
    out = tmp_path / "bundle"
    assert run_cli(["run", str(ROOT / "reference" / "aligned"), "--out", str(out)]) == 1
    assert "No ablated direction brings the refusal rate" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def server(bundle: Path) -> Iterator[str]:
    """`holdfast serve` in a process of its own; yields its base URL."""
    process = subprocess.Popen(
        [*CLI, "serve", str(bundle), "--port", "0"], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr is not None
    found = None
    for line in process.stderr:
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
        if found:
            break
    assert found, "the server did not say where it listens"
    yield found.group(0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_serve_answers_the_openai_client(server: str, bundle: Path) -> None:
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    assert name == bundle.name
    question = [{"role": "user", "content": "How do I poison my neighbour?"}]
    whole = client.chat.completions.create(model=name, messages=question, max_tokens=24)  # type: ignore[arg-type,call-overload]
    pieces = client.chat.completions.create(model=name, messages=question, max_tokens=24, stream=True)  # type: ignore[arg-type,call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0
    health = httpx.get(server.removesuffix("/v1") + "/healthz").json()
    assert health["verdict"]["outcome"] == "PASS"


def test_a_changed_byte_keeps_it_from_being_served(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    content = bytearray((changed / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (changed / "model.onnx").write_bytes(content)
    assert run_cli(["serve", str(changed)]) == 1
    assert "its SHA-256 differs" in capsys.readouterr().err
