"""The neural-compressor backend: same contract as ONNX Runtime's, and nothing taken on trust."""

import sys
from pathlib import Path

import onnx
import pytest

from holdfast.errors import QuantizationError
from holdfast.exporter.export import read_export
from holdfast.extras import missing_packages
from holdfast.quantize.artifact import quantize_bundle
from holdfast.quantize.backends import inc
from holdfast.quantize.graph import Graph, read_static
from holdfast.quantize.simulate import check_simulation
from tests.quantize.conftest import Case
from tests.quantize.test_artifact import build

if missing_packages("inc"):
    pytest.skip(
        f"the `inc` extra is not installed ({', '.join(missing_packages('inc'))})",
        allow_module_level=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8a8", "w8a4", "w4"])
def test_learned_ranges_reach_the_artifact(
    name: str, cases: dict[str, Case], token_ids: list[list[int]], tmp_path: Path
) -> None:
    case = cases[name]
    out = build(case, tmp_path / "out", backend="inc")
    ranges = case.calibration.record.activation_ranges
    graph = Graph(onnx.load(out / "model.onnx"))
    for path, learned in ranges.items():
        found = read_static(graph, path, read_export(case.exported).modules[path].output)
        assert (float(found.scale), found.zero_point) == (learned.scale, learned.zero_point)
    config = type(case.config)(
        **{n: getattr(case.config, n) for n in case.config.__struct_fields__} | {"backend": "inc"}
    )
    check_simulation(case.source, ranges, out, config, token_ids)


@pytest.mark.slow
def test_no_model_from_fit_is_an_error(cases: dict[str, Case], tmp_path: Path) -> None:
    """Token ids outside the vocabulary: fit() swallows ONNX Runtime's error and returns None."""
    case = cases["w8a8"]
    asked = inc.request(read_export(case.exported).modules, case.config)
    with pytest.raises(QuantizationError, match="neural-compressor gave no quantized model"):
        inc.run_worker(case.exported, tmp_path, asked | {"samples": [[100_000]]}, inc.WORKER)


def worker(tmp_path: Path, body: str) -> list[str]:
    """A worker command that misbehaves."""
    script = tmp_path / "worker.py"
    script.write_text(body, encoding="utf-8")
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "gave no quantized model"),
        ("raise SystemExit('ValueError: broken')", r"gave no quantized model \(ValueError: broken\)"),
        ("open('quantized.onnx', 'wb').write(b'not a graph')", "cannot be read"),
        ("open('quantized.onnx', 'w'); raise ValueError('late')", r"failed \(ValueError: late\)"),
    ],
)
def test_misbehaving_worker_is_an_error(
    body: str, message: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    asked: dict[str, object] = {"out": "quantized.onnx"}
    with pytest.raises(QuantizationError, match=message):
        inc.run_worker(cases["w8a8"].exported, tmp_path, asked, worker(tmp_path, body))


def test_graph_that_does_not_load_is_an_error(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that leaves a dangling input, as neural-compressor did with its default op list."""
    body = """
import onnx
model = onnx.load("model.onnx")
node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
node.input[0] = "nowhere"
onnx.save(model, "quantized.onnx")
"""
    monkeypatch.setattr(inc, "WORKER", worker(tmp_path, body))
    monkeypatch.setattr(inc, "write_ranges", lambda *_: None)
    case, out = cases["w8a8"], tmp_path / "out"
    out.mkdir()
    config = type(case.config)(backend="inc")
    with pytest.raises(QuantizationError, match="a graph that ONNX Runtime refuses"):
        quantize_bundle(case.exported, out, case.calibrated, config)


def test_graph_left_in_float_is_an_error(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "import shutil; shutil.copyfile('model.onnx', 'quantized.onnx')"
    monkeypatch.setattr(inc, "WORKER", worker(tmp_path, body))
    case, out = cases["w8a8"], tmp_path / "out"
    out.mkdir()
    with pytest.raises(QuantizationError, match="left it in full precision"):
        quantize_bundle(case.exported, out, case.calibrated, type(case.config)(backend="inc"))
