"""How far two sets of logits are apart, and a decoder graph and a torch model run on the same tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
# Logits that are compared at once in float64: 32 MB.
CHUNK_VALUES = 1 << 22
QUIET = 4  # ONNX Runtime's FATAL


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


@dataclass(frozen=True)
class Divergence(Agreement):
    """Two sets of logits for the same positions, and how far their distributions are apart.

    Attributes:
        mean_kl_nats: mean over the positions of KL(first || second), of the next-token distributions.
        max_kl_nats: the largest.
    """

    mean_kl_nats: float
    max_kl_nats: float


def compare_distributions(a: Logits, b: Logits) -> Divergence:
    """Compare logits [..., vocabulary] of equal shape, a few positions at a time.

    Raises:
        ParityError: as `compare_logits`.
    """
    if a.shape != b.shape or a.ndim < 2 or a.size == 0:
        compare_logits(a, b)  # says which
    rows = max(1, CHUNK_VALUES // a.shape[-1])
    flat_a, flat_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return pooled(
        [
            _divergence(flat_a[start : start + rows], flat_b[start : start + rows])
            for start in range(0, len(flat_a), rows)
        ]
    )


def pooled(parts: Sequence[Divergence]) -> Divergence:
    """One comparison of all the positions of several.

    Raises:
        ParityError: no comparison at all.
    """
    if not parts:
        raise ParityError("Expected at least one position to compare, found none.")
    count = sum(part.positions for part in parts)

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.positions for part in parts) / count)

    return Divergence(
        max_abs=max(part.max_abs for part in parts),
        mean_abs=mean("mean_abs"),
        same_top_frac=mean("same_top_frac"),
        positions=count,
        mean_kl_nats=mean("mean_kl_nats"),
        max_kl_nats=max(part.max_kl_nats for part in parts),
    )


def kl_divergence(a: Logits, b: Logits) -> NDArray[np.float64]:
    """KL(softmax(a) || softmax(b)) in nats, float64 [position], of logits [position, vocabulary].

    Where two distributions differ by rounding only, the sum cancels to a few units in the last place
    of 1 on either side of 0; it is never less than 0 by definition, and never returned as less.
    """
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    nats: NDArray[np.float64] = np.einsum("ij,ij->i", np.exp(log_a), log_a - log_b)
    return np.maximum(nats, 0.0)


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def _divergence(a: Logits, b: Logits) -> Divergence:
    agreement = compare_logits(a, b)
    kl = kl_divergence(a, b)
    return Divergence(**asdict(agreement), mean_kl_nats=float(kl.mean()), max_kl_nats=float(kl.max()))


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
        seen += ids.shape[1]
        found.append(torch_step(source.model, ids, mask[:, :seen], cache))
    logits: Logits = torch.cat(found, dim=1).numpy()
    return logits


def _graph_logits(graph: Path, steps: list[Tensor], mask: Tensor) -> Logits:
    """Logits float32 [row, token, vocabulary] of the graph, its own cache fed back to it."""
    decoder = open_decoder(graph)
    cache = decoder.empty_cache(mask.shape[0])
    found, seen = [], 0
    for ids in steps:
        seen += ids.shape[1]
        logits, cache = decoder.step(ids, mask[:, :seen], cache)
        found.append(logits)
    return np.concatenate(found, axis=1)


def torch_step(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    """One forward pass of a transformers model; `cache` takes the new tokens in.

    Arguments:
        ids: the new tokens, int64 [row, new].
        mask: 1 where there is a token, int64 [row, past + new].
        cache: a transformers cache, or None to compute without one.

    Returns:
        logits float32 [row, new, vocabulary].
    """
    wanted: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        wanted["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        **wanted,
    ).logits
    return logits


Cache = dict[str, NDArray[Any]]
"""`past_key_values.N.key|value` -> float32 [row, kv heads, past, head size]."""


@dataclass(frozen=True)
class GraphDecoder:
    """An open decoder graph; what it takes and gives was read from the session.

    Attributes:
        inputs: names of the inputs that it has to be given.
        outputs: names of its outputs, in order.
        keep: type and shape of `logits_to_keep`, where the graph can give the last logits alone.
    """

    session: ort.InferenceSession
    path: Path
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    keep: tuple[str, tuple[int, ...]] | None

    def empty_cache(self, rows: int) -> Cache:
        """The cache before the first token."""
        return empty_cache(self.session, rows=rows)

    def step(
        self, ids: Tensor, mask: Tensor, cache: Cache, *, keep: int | None = None
    ) -> tuple[Logits, Cache]:
        """One run of the graph.

        Arguments:
            ids: the new tokens, int64 [row, new].
            mask: 1 where there is a token, int64 [row, past + new].
            cache: what the run before gave, or `empty_cache`.
            keep: ask for the logits of that many last tokens; None leaves the graph's default.

        Returns:
            logits float32 [row, new, vocabulary], and the cache with the new tokens in it.

        Raises:
            ExecutionError: ONNX Runtime failed.
        """
        outputs = self.values(ids, mask, cache, self.outputs, keep=keep)
        past = {
            name.replace("present", "past_key_values", 1): value
            for name, value in outputs.items()
            if name.startswith("present")
        }
        return outputs["logits"], past

    def values(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: Cache,
        wanted: Sequence[str],
        *,
        keep: int | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The outputs called `wanted`; see `step`."""
        offered = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask)[:, -ids.shape[1] :],
        }
        feeds: dict[str, NDArray[Any]] = {
            name: value.numpy() for name, value in offered.items() if name in self.inputs
        }
        if keep is not None and self.keep is not None:
            feeds["logits_to_keep"] = np.full(self.keep[1], keep, dtype=KEEP_TYPES[self.keep[0]])
        try:
            found = self.session.run(list(wanted), feeds | cache)
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            past = mask.shape[1] - ids.shape[1]
            raise ExecutionError(
                f"ONNX Runtime failed while running {self.path} with {ids.shape[0]} rows of {ids.shape[1]} "
                f"new and {past} cached tokens: {_first_line(error)}"
            ) from error
        return dict(zip(wanted, found, strict=True))


KEEP_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


def open_decoder(graph: Path, *, lean: bool = False) -> GraphDecoder:
    """A decoder graph, ready to run; see `open_session`.

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
    """
    return decoder_of(open_session(graph, lean=lean), graph)


def decoder_of(session: ort.InferenceSession, graph: Path) -> GraphDecoder:
    """An open session as a decoder; `graph` names it in messages."""
    optional = {item.name: item for item in session.get_overridable_initializers()}
    keep = optional.get("logits_to_keep")
    return GraphDecoder(
        session=session,
        path=graph,
        inputs=frozenset(item.name for item in session.get_inputs()),
        outputs=tuple(item.name for item in session.get_outputs()),
        keep=None if keep is None else (keep.type, tuple(keep.shape)),
    )


def open_session(graph: Path, *, lean: bool = False) -> ort.InferenceSession:
    """The graph on ONNX Runtime's CPU provider; what goes wrong is raised, and not printed as well.

    Arguments:
        lean: leave the weights as they are in the file instead of packing them anew for the kernels.
            External data then stays mapped from the disk: 34 MB of a graph of 500 MB are memory of the
            process, not 416 MB. A prefill takes 1.4 times as long, a decoding step as long as before.

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
    """
    return load_session(str(graph), graph, session_options(lean=lean))


def session_options(*, lean: bool = False) -> ort.SessionOptions:
    """How graphs are opened for a comparison; see `open_session`."""
    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    # torch shares the cores: threads that spin between two runs made the whole comparison 8 times as long
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def load_session(model: str | bytes, graph: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """`model`, a path or the bytes of a graph, on the CPU; `graph` names it in messages.

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
    """
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise ExecutionError(f"ONNX Runtime cannot load {graph}: {_first_line(error)}") from error


def empty_cache(session: ort.InferenceSession, *, rows: int) -> Cache:
    """Feeds for an empty KV cache: float32 [rows, kv heads, 0, head size] for every past input."""
    return {
        item.name: np.zeros((rows, item.shape[1], 0, item.shape[3]), dtype=np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
