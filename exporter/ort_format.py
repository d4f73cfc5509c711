"""model.onnx to ORT format for reduced builds of ONNX Runtime, with the list of operators they need.

Optimizations are applied now ("Fixed"), as onnxruntime's `convert_onnx_models_to_ort` does: a reduced build
has no optimizer. So the file holds ONNX Runtime's own fused operators and needs an ONNX Runtime that is not
older than the one that wrote it; the format itself (version 6) is read from 1.16 on.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from holdfast.errors import ExportError
from holdfast.exporter.ort_resolver import in_order
from holdfast.exporter.parity import Agreement, compare_logits, open_session, require_agreement
from holdfast.files import disk_errors, write_bytes, write_text
from holdfast.runtime.external_data import MODEL_FILE, graph_files
from holdfast.runtime.graph import positions
from holdfast.runtime.padding import left_pad

ORT_FILE = "model.ort"
OPERATORS_FILE = "required_operators.config"
LARGEST_BYTES = 1 << 31  # FlatBuffers has 32-bit offsets; ONNX Runtime 1.31 fails and leaves an empty file
# For convolutions on x86-64 only; a file with its operators does not load on ARM.
NOT_PORTABLE = ["NchwcTransformer"]
PROMPT_TOKENS = (23, 9)
DECODE_STEPS = 3


@dataclass(frozen=True)
class OrtFormatReport:
    """What was written.

    Attributes:
        graph_bytes: size of model.ort.
        onnxruntime: version that wrote the file, the oldest that is sure to read it.
        arm: whether the int8 choices are those for ARM.
        operators: lines of the operator list, `domain;version;operators with their types`.
        parity: model.ort against model.onnx, prefill and cached steps, on this machine.
    """

    graph_bytes: int
    onnxruntime: str
    arm: bool
    operators: tuple[str, ...]
    parity: Agreement


def write_ort_format(folder: Path, *, atol: float, arm: bool = True, seed: int = 0) -> OrtFormatReport:
    """Write model.ort and required_operators.config beside the model.onnx of `folder`.

    The same graph and the same ONNX Runtime give the same bytes, but for padding in rare cases (see
    `ort_resolver`). `required_operators.config` is what ONNX Runtime's build takes with
    `--include_ops_by_config` and `--enable_reduced_operator_type_support`.

    Arguments:
        folder: an exported folder or a bundle; its graph in Optimum's layout.
        atol: largest absolute logit difference between both files that passes.
        arm: keep int8 where ARM computes with it (onnxruntime's `--target_platform arm`).
        seed: draws the token ids of the comparison.

    Raises:
        ExecutionError: no model.onnx, or ONNX Runtime refuses what it wrote.
        ExportError: the weights are too large for the format, or ONNX Runtime cannot convert the graph.
        ParityError: the two files differ.
        DiskFullError: no space left.
    """
    _require_room(folder)
    write_bytes(folder / ORT_FILE, in_order(_converted(folder / MODEL_FILE, arm)))
    operators = required_operators(folder / ORT_FILE)
    write_text(folder / OPERATORS_FILE, _listing(operators))
    agreement = _agreement(folder, seed)
    require_agreement(agreement, what=f"{ORT_FILE} and {MODEL_FILE}", atol=atol)
    return OrtFormatReport(
        graph_bytes=(folder / ORT_FILE).stat().st_size,
        onnxruntime=ort.__version__,
        arm=arm,
        operators=operators,
        parity=agreement,
    )


def required_operators(ort_file: Path) -> tuple[str, ...]:
    """Operators and types that a build needs for an ORT-format file, one line a domain and version.

    Raises:
        ExportError: not an ORT-format file.
    """
    with tempfile.TemporaryDirectory() as folder, _own_logging():
        from onnxruntime.tools.ort_format_model import create_config_from_models

        listing = Path(folder) / OPERATORS_FILE
        try:
            create_config_from_models([ort_file], listing, True)
        except Exception as error:  # whatever the reader of the format runs into
            raise ExportError(
                f"{ort_file} is not a file in ORT format ({error}): convert it again."
            ) from error
        lines = listing.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def _require_room(folder: Path) -> None:
    size = sum(path.stat().st_size for path in graph_files(folder))
    if size >= LARGEST_BYTES:
        raise ExportError(
            f"Expected a graph below {LARGEST_BYTES >> 30} GiB, which is all that ORT format holds, found "
            f"{size / 2**30:.1f} GiB in {folder}: quantize the model, or deploy model.onnx."
        )


def _converted(graph: Path, arm: bool) -> bytes:
    """The optimized graph in ORT format, as ONNX Runtime saves it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1" if arm else "0")
    with tempfile.TemporaryDirectory() as folder, disk_errors(graph.parent):
        options.optimized_model_filepath = str(Path(folder) / ORT_FILE)
        try:
            ort.InferenceSession(
                str(graph),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=NOT_PORTABLE,
            )
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise ExportError(
                f"ONNX Runtime {ort.__version__} could not convert {graph} to ORT format "
                f"({' '.join(str(error).split())}): deploy model.onnx instead."
            ) from error
        return (Path(folder) / ORT_FILE).read_bytes()


def _listing(operators: tuple[str, ...]) -> str:
    head = f"# Operators of {ORT_FILE}, written by ONNX Runtime {ort.__version__}"
    return "\n".join((head, *operators)) + "\n"


def _agreement(folder: Path, seed: int) -> Agreement:
    """Both files on the same ids, wherever neither sees padding."""
    onnx_file, ort_file = (open_session(folder / name) for name in (MODEL_FILE, ORT_FILE))
    ids, mask = _token_ids(onnx_file, seed)
    shown = mask.astype(bool)
    return compare_logits(*(_logits(s, ids, mask)[shown] for s in (onnx_file, ort_file)))


def _token_ids(session: ort.InferenceSession, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask [row, prompt and steps], drawn from the whole vocabulary, left-padded."""
    logits = next(node for node in session.get_outputs() if node.name == "logits")
    generator = np.random.default_rng(seed)
    lengths = [length + DECODE_STEPS for length in PROMPT_TOKENS]
    return left_pad([generator.integers(logits.shape[-1], size=n).tolist() for n in lengths], 0)


def _logits(
    session: ort.InferenceSession, ids: NDArray[np.int64], mask: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Logits float32 [row, token, vocabulary]: a prefill, then the last tokens one by one."""
    names = [node.name for node in session.get_outputs()]
    wanted = {node.name: node for node in session.get_inputs()}
    cache = {
        name: np.zeros((len(ids), node.shape[1], 0, node.shape[3]), np.float32)
        for name, node in wanted.items()
        if name.startswith("past_key_values.")
    }
    found, start = [], 0
    for end in range(ids.shape[1] - DECODE_STEPS, ids.shape[1] + 1):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions(mask[:, :end])[:, start:],
        }
        outputs = dict(
            zip(
                names,
                session.run(None, {k: v for k, v in feeds.items() if k in wanted} | cache),
                strict=True,
            )
        )
        found.append(outputs.pop("logits"))
        cache = {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}
        start = end
    return np.concatenate(found, axis=1)


@contextmanager
def _own_logging() -> Iterator[None]:
    """onnxruntime.tools configures the root logger when it is imported, and narrates; undone here."""
    handlers, disabled = logging.root.handlers[:], logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers
