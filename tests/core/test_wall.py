"""The wall between device and workshop, seen at run time and by the import contract."""

import subprocess
import sys

import pytest

WORKSHOP = ("torch", "transformers", "optimum", "onnx", "neural_compressor", "safetensors")
DEVICE_MODULES = (
    "holdfast.alignment",
    "holdfast.bundle",
    "holdfast.cli",
    "holdfast.cli.bench_command",
    "holdfast.cli.inspect_command",
    "holdfast.cli.serve_command",
    "holdfast.cli.suites_command",
    "holdfast.cli.verify_command",
    "holdfast.evals.gate",
    "holdfast.evals.report",
    "holdfast.evals.run",
    "holdfast.evals.suites",
    "holdfast.runtime.bench",
    "holdfast.runtime.generate",
    "holdfast.runtime.server",
    "holdfast.runtime.session",
    "holdfast.verification",
)
BLOCK = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {workshop!r} or name.startswith(
            ("holdfast.exporter", "holdfast.quantize", "holdfast.prune", "holdfast.pipeline")
        ):
            raise ImportError(f"the device has no {{name}}")
        return None

sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
print("all imported")
"""


def test_the_device_side_imports_without_the_workshop() -> None:
    code = BLOCK.format(workshop=WORKSHOP, modules=DEVICE_MODULES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all imported"


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_loads_neither_runtime_nor_workshop(argument: str) -> None:
    code = (
        "import sys; from holdfast.cli import run_cli; run_cli([sys.argv[1]]); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'onnxruntime', 'onnx', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")
