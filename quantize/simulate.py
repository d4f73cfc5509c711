"""The torch simulation of the artifact, and how closely the artifact follows it on the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from holdfast.errors import ParityError
from holdfast.exporter.architectures import linear_modules, row_of
from holdfast.exporter.batching import pad_left, positions
from holdfast.exporter.parity import (
    Agreement,
    compare_logits,
    empty_cache,
    open_session,
)
from holdfast.exporter.source import SourceModel
from holdfast.quantize.artifact.embedding import fake_quantize_embedding
from holdfast.quantize.decisions import Decisions
from holdfast.quantize.fakequant import (
    activation_codes,
    fake_quantize,
    fake_quantize_rows_int8,
    round_weight,
)
from holdfast.quantize.formats import FLOAT_BITS, INT8_COMPUTE, Format, compute_level
from holdfast.quantize.record import ActivationRange
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.recipe import QuantizeConfig
from holdfast.runtime.external_data import graph_files


@dataclass(frozen=True)
class SimulationAgreement(Agreement):
    """`Agreement`, and the share of positions where every logit is within the tolerance.

    Attributes:
        within_frac: 0 to 1.
    """

    within_frac: float


class SimulatedLinear(nn.Module):
    """A linear as the artifact computes it: quantized weight, quantized input, float32 product."""

    def __init__(
        self,
        linear: nn.Linear,
        form: Format,
        learned: ActivationRange | None,
        codes: WeightCodes | None,
        config: QuantizeConfig,
    ) -> None:
        super().__init__()
        self.bias, self.form, self.learned = linear.bias, form, learned
        codes = codes or round_weight(linear.weight.detach(), form)
        # float zero points make the kernel compute in float32 at any level; so do 2 bits in blocks of 16
        floats = codes.zero_points is not None and codes.zero_points.is_floating_point()
        floats = floats or (form.weight_bits, form.block_size) == (2, 16)
        level = compute_level(form, config)
        self.int8_inside = form.in_blocks and level == INT8_COMPUTE and not floats
        self.weight = codes.dequantized()

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(self.quantized_input(values), self.weight, self.bias)

    def quantized_input(self, values: Tensor) -> Tensor:
        """What the product reads, float32 [..., in]."""
        if self.learned is not None and self.form.activation_bits is not None:
            scale = torch.tensor(self.learned.scale, dtype=torch.float32)
            zero_point = torch.tensor(float(self.learned.zero_point))
            ends = activation_codes(self.form.activation_bits, signed=self.form.signed_activations)
            values = fake_quantize(values, scale, zero_point, *ends)
        return fake_quantize_rows_int8(values, self.form.block_size) if self.int8_inside else values


@contextmanager
def simulate(model: Any, decided: Decisions, config: QuantizeConfig) -> Iterator[None]:
    """The torch model computes as the artifact does, inside this block.

    Arguments:
        model: transformers model of the calibrated source (scales folded).
        decided: formats, ranges and codes; a linear without codes is rounded to nearest.
    """
    linears = linear_modules(model)
    table = row_of(model).embedding
    embedding = model.get_submodule(table)
    if decided.formats and config.embedding_bits != FLOAT_BITS:
        model.set_submodule(table, _rounded_embedding(embedding, config))
    for path, form in decided.formats.items():
        simulated = SimulatedLinear(
            linears[path], form, decided.ranges.get(path), decided.codes.get(path), config
        )
        model.set_submodule(path, simulated)
    try:
        yield
    finally:
        model.set_submodule(table, embedding)
        for path in decided.formats:
            model.set_submodule(path, linears[path])


def _rounded_embedding(embedding: nn.Embedding, config: QuantizeConfig) -> nn.Embedding:
    """A copy with a table of its own: a tied head keeps the other."""
    rounded = copy.copy(embedding)
    rounded._parameters = dict(embedding._parameters)
    table = fake_quantize_embedding(embedding.weight.detach(), config.embedding_bits, config.block_size)
    rounded.weight = nn.Parameter(table, requires_grad=False)
    return rounded


def check_simulation(
    source: SourceModel,
    decided: Decisions,
    artifact: Path,
    config: QuantizeConfig,
    prompts: Sequence[Sequence[int]],
) -> SimulationAgreement:
    """Simulation against artifact, at every position of the prompts.

    Arguments:
        source: the calibrated model.
        artifact: the quantized folder.
        prompts: token ids.

    A value within one float32 rounding error of a tie may get the neighbouring code on one of the two
    sides, which is a whole quantization step; so the tolerance holds for a share of the positions.

    Raises:
        ParityError: at less than `config.agreement_frac` of the positions all logits are within
            `config.atol`, or the next token is the same.
    """
    with simulate(source.model, decided, config):
        expected = torch_logits(source, prompts)
    found = graph_logits(graph_files(artifact)[0], prompts, pad_id=source.tokenizer.pad_id)
    agreement = simulation_agreement(expected, found, atol=tolerance(decided, config))
    require_simulation(agreement, config)
    return agreement


def tolerance(decided: Decisions, config: QuantizeConfig) -> float:
    """`config.atol`, doubled for every bit that the narrowest activations have less than 8.

    What is left between simulation and artifact are values on rounding ties, one step of the codes apart.
    """
    bits = [form.activation_bits for form in decided.formats.values() if form.activation_bits is not None]
    return config.atol * float(2 ** (8 - min(bits, default=8)))


def simulation_agreement(
    expected: NDArray[np.float32], found: NDArray[np.float32], *, atol: float
) -> SimulationAgreement:
    """Compare logits [positions, V] of both sides."""
    plain = compare_logits(expected, found)
    within = np.abs(expected - found).max(axis=-1) <= atol
    return SimulationAgreement(**asdict(plain), within_frac=float(within.mean()))


def require_simulation(agreement: SimulationAgreement, config: QuantizeConfig) -> None:
    """Raise ParityError unless both shares reach `config.agreement_frac`."""
    if min(agreement.within_frac, agreement.same_top_frac) < config.agreement_frac:
        raise ParityError(
            f"The simulation and the artifact agree within {config.atol:g} at "
            f"{agreement.within_frac:.1%} of {agreement.positions} positions and choose the same token "
            f"at {agreement.same_top_frac:.1%}, and {config.agreement_frac:.1%} is needed: quantize "
            "again from the calibrated model, or raise `quantize.atol` if the logits are just larger."
        )


@torch.inference_mode()
def torch_logits(
    source: SourceModel, prompts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> NDArray[np.float32]:
    """Logits at every token of the prompts, one after another, float32 [tokens, V]."""
    found = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = pad_left(prompts[start : start + batch_size], source.tokenizer.pad_id)
        output = source.model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        found.append(output.logits[mask.bool()].numpy())
    return np.concatenate(found)


def graph_logits(
    graph: Path, prompts: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 16
) -> NDArray[np.float32]:
    """The same of an ONNX graph, float32 [tokens, V].

    Raises:
        ExecutionError: ONNX Runtime refuses the graph.
    """
    session = open_session(graph)
    wanted = {item.name for item in session.get_inputs()}
    found = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = pad_left(prompts[start : start + batch_size], pad_id)
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        if "position_ids" in wanted:
            feeds["position_ids"] = positions(mask).numpy()
        feeds |= empty_cache(session, rows=len(ids))
        found.append(session.run(["logits"], feeds)[0][mask.bool().numpy()])
    return np.concatenate(found)
