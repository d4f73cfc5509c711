"""How far two sets of logits are apart, and whether a graph computes what torch does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from holdfast.errors import ExecutionError, ParityError
from holdfast.exporter.batching import pad_left, positions
from holdfast.exporter.source import SourceModel

Logits = NDArray[np.floating[Any]]

# Three rows, two of them left-padded: neither the rows (2) nor the tokens (16) that Optimum traces with,
# so that a size frozen by the tracing shows.
PROMPT_TOKENS = (40, 23, 9)
DECODE_STEPS = 4


@dataclass(frozen=True)
class Agreement:
    """Two sets of logits for the same positions.

    Attributes:
        max_abs: largest absolute difference over all positions and the whole vocabulary.
        mean_abs: mean absolute difference.
        same_top_frac: share of positions with the same most likely token.
        positions: token positions compared.
    """

    max_abs: float
    mean_abs: float
    same_top_frac: float
    positions: int


def compare_logits(a: Logits, b: Logits) -> Agreement:
    """Compare logits [..., vocabulary] of equal shape.

    Raises:
        ParityError: unequal shapes, no position at all, or a value that is not finite.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ParityError(f"Expected two sets of logits of one shape, found {a.shape} and {b.shape}.")
    if a.size == 0:
        raise ParityError("Expected at least one position to compare, found none.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ParityError(
            "The logits hold NaN or infinity: check the weights of the model, or use another opset."
        )
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return Agreement(
        max_abs=float(gap.max()),
        mean_abs=float(gap.mean()),
        same_top_frac=float(np.mean(a.argmax(-1) == b.argmax(-1))),
        positions=int(np.prod(a.shape[:-1])),
    )


def require_agreement(agreement: Agreement, *, what: str, atol: float, same_top_frac: float = 0.0) -> None:
    """Raise ParityError when `what` differs by more than `atol`, or picks too many other tokens.

    Arguments:
        what: names both sides, for example "The graph and the torch model".
        atol: largest absolute logit difference that passes.
        same_top_frac: smallest share of equal most likely tokens that passes.
    """
    if agreement.max_abs > atol:
        raise ParityError(
            f"{what} differ by up to {agreement.max_abs:.3g} in a logit, and {atol:.3g} is "
            "allowed: look for what the tracing lost, or raise `atol` if the difference is rounding."
        )
    if agreement.same_top_frac < same_top_frac:
        raise ParityError(
            f"{what} choose the same token at {agreement.same_top_frac:.1%} of "
            f"{agreement.positions} positions, and {same_top_frac:.1%} is needed."
        )


def graph_agreement(
    graph: Path, source: SourceModel, *, seed: int, prompt_tokens: Sequence[int] = PROMPT_TOKENS
) -> Agreement:
    """Run the graph and the torch model on the same ids: left-padded prefill, then cached steps.

    Token ids are drawn at random from the tokenizer's vocabulary; every position that is not
    padding is compared. Prompts outgrow a sliding attention window, where the model has one.

    Arguments:
        seed: draws the ids.
        prompt_tokens: length of each row; cut where the context would end.

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
        ParityError: as `compare_logits`.
    """
    steps, mask = _token_steps(source, seed, prompt_tokens)
    expected = _torch_logits(source, steps, mask)
    found = _graph_logits(graph, steps, mask)
    shown = mask.bool().numpy()
    return compare_logits(expected[shown], found[shown])


def _token_steps(
    source: SourceModel, seed: int, prompt_tokens: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Ids of the prefill and of each step, int64 [row, tokens], and the mask over all of them."""
    generator = torch.Generator().manual_seed(seed)
    window = getattr(source.model.config, "sliding_window", None) or 0
    extra = window + 1 if 0 < window < 4096 else 0
    room = source.model.config.max_position_embeddings - DECODE_STEPS
    lengths = [min(length + extra, room) for length in prompt_tokens]
    size = source.tokenizer.vocabulary_size
    rows = [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]
    ids, mask = pad_left(rows, source.tokenizer.pad_id)
    more = torch.randint(size, (len(rows), DECODE_STEPS), generator=generator)
    steps = [ids, *(more[:, step : step + 1] for step in range(DECODE_STEPS))]
    return steps, torch.cat([mask, torch.ones_like(more)], dim=1)


@torch.inference_mode()
def _torch_logits(source: SourceModel, steps: list[Tensor], mask: Tensor) -> Logits:
    """Logits float32 [row, token, vocabulary] of the cached torch model."""
    cache = DynamicCache(config=source.model.config)
    found, seen = [], 0
    for ids in steps:
        start, seen = seen, seen + ids.shape[1]
        output = source.model(
            input_ids=ids,
            attention_mask=mask[:, :seen],
            position_ids=positions(mask[:, :seen])[:, start:],
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.logits)
    logits: Logits = torch.cat(found, dim=1).numpy()
    return logits


def _graph_logits(graph: Path, steps: list[Tensor], mask: Tensor) -> Logits:
    """Logits float32 [row, token, vocabulary] of the graph, its own cache fed back to it."""
    session = open_session(graph)
    feeds = empty_cache(session, rows=mask.shape[0])
    wanted = {item.name for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    found, seen = [], 0
    for ids in steps:
        start, seen = seen, seen + ids.shape[1]
        feeds |= {"input_ids": ids.numpy(), "attention_mask": mask[:, :seen].numpy()}
        if "position_ids" in wanted:
            feeds["position_ids"] = positions(mask[:, :seen])[:, start:].numpy()
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        found.append(outputs["logits"])
        feeds = {
            name.replace("present", "past_key_values"): value
            for name, value in outputs.items()
            if name != "logits"
        }
    return np.concatenate(found, axis=1)


def open_session(graph: Path) -> ort.InferenceSession:
    """The graph on ONNX Runtime's CPU provider, its log kept to errors.

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise ExecutionError(f"ONNX Runtime cannot load {graph}: {_first_line(error)}") from error


def empty_cache(session: ort.InferenceSession, *, rows: int) -> dict[str, NDArray[Any]]:
    """Feeds for an empty KV cache: float32 [rows, kv heads, 0, head size] for every past input."""
    return {
        item.name: np.zeros((rows, item.shape[1], 0, item.shape[3]), dtype=np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
