"""An unaligned twin without a base checkpoint: the refusal direction is taken out of the weights.

Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717:
`r = mean(h | harmful) - mean(h | harmless)` at one of the last template tokens of one layer, normalised;
`W' = W - r r^T W` for everything that writes into the residual stream. The twin is a reference in memory:
it is never written out, exported or served, and it is accepted only where its refusals really fell.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import CalibrationError
from holdfast.evals.judge import label_answer
from holdfast.exporter.architectures import block_paths, present, row_of
from holdfast.exporter.batching import keep_logits, length_batches, pad_left, positions
from holdfast.exporter.source import SourceModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.prompts.draw import CalibrationPrompt
from holdfast.quantize.prompts.sequences import chat_prompts

LAYER_SHARE = 0.8  # directions of later layers steer the output too directly (section 2.3)
MOST_POSITIONS = 5
LARGEST_KL_NATS = 0.1
LEAST_DROP_FRAC = 0.5  # of the refusal rate before
LEAST_REFUSAL_RATE = 0.2  # below it there is no refusal to ablate
ANSWER_TOKENS = 24
PROMPTS_A_SIDE = 64
BATCH_SIZE = 32


@dataclass(frozen=True)
class Direction:
    """A candidate refusal direction.

    Attributes:
        layer: index of the decoder block whose output it was measured at.
        position: token of the prompt, from the end: -1 is the last.
        vector: float32 [hidden], of unit length.
    """

    layer: int
    position: int
    vector: Tensor = field(repr=False)


@dataclass(frozen=True)
class AblatedTwin:
    """The accepted twin.

    Attributes:
        model: transformers model; same tokenizer as the aligned one.
        layer, position: where its direction was measured.
        refusal_rate_before, refusal_rate_after: on harmful prompts that the direction was not
            measured on.
        divergence: mean KL of the next token from the aligned model on harmless prompts, nats.
        prompts: harmful prompts behind the two rates.
    """

    model: Any = field(repr=False)
    layer: int
    position: int
    refusal_rate_before: float
    refusal_rate_after: float
    divergence: float
    prompts: int

    def record(self) -> dict[str, Any]:
        """Everything but the model, as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}


def make_twin(aligned: SourceModel, prompts: Sequence[CalibrationPrompt]) -> AblatedTwin:
    """Ablate the refusal direction that lowers refusals most, with KL on harmless prompts <= 0.1.

    Directions are measured on one half of the prompts and chosen on the other.

    Arguments:
        prompts: calibration prompts of all three kinds, in the seeded order of `load_calibration`.

    Raises:
        CalibrationError: the aligned model hardly refuses, or no direction makes it stop.
    """
    harmful = _encoded(aligned, prompts, "harmful")
    harmless = _encoded(aligned, prompts, "neutral") + _encoded(aligned, prompts, "borderline")
    neutral = _encoded(aligned, prompts, "neutral")
    if min(len(harmful), len(neutral)) < 2:
        raise CalibrationError("Ablating a twin needs at least two harmful and two neutral prompts.")
    judged, calm = harmful[1::2], neutral[1::2]
    before = refusal_rate(aligned, judged)
    if before < LEAST_REFUSAL_RATE:
        raise CalibrationError(
            f"The aligned model refuses {before:.0%} of the harmful calibration prompts, too few to "
            "find a refusal direction: give its unaligned parent as `base`."
        )
    directions = refusal_directions(aligned, harmful[::2], harmless[::2])
    twin, best = _best_twin(aligned, directions, judged, calm)
    if best is None or best[0] > (1.0 - LEAST_DROP_FRAC) * before:
        found = "none stayed near the model" if best is None else f"the best left {best[0]:.0%}"
        raise CalibrationError(
            f"No ablated direction brings the refusal rate of {before:.0%} down by half ({found}): "
            "give the unaligned parent as `base`."
        )
    after, divergence, direction = best
    return AblatedTwin(twin, direction.layer, direction.position, before, after, divergence, len(judged))


def refusal_directions(
    source: SourceModel, harmful: Sequence[list[int]], harmless: Sequence[list[int]]
) -> list[Direction]:
    """Difference of means for every layer below 0.8 L and every shared template token at the end.

    Arguments:
        harmful, harmless: token ids of chat prompts.
    """
    count = min(MOST_POSITIONS, shared_suffix([*harmful, *harmless]))
    layers = max(1, math.ceil(LAYER_SHARE * len(block_paths(source.model))) - 1)
    gap = _mean_states(source, harmful, count) - _mean_states(source, harmless, count)
    return [
        Direction(layer, position - count, nn.functional.normalize(gap[layer, position], dim=0))
        for layer in range(layers)
        for position in range(count)
        if float(gap[layer, position].norm()) > 0.0
    ]


def shared_suffix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens at the end that all prompts share: what the template adds after the user's text."""
    shortest = min(map(len, prompts))
    for length in range(1, shortest + 1):
        if len({prompt[-length] for prompt in prompts}) > 1:
            return max(1, length - 1)
    return shortest


@torch.no_grad()
def ablate_direction(model: nn.Module, vector: Tensor) -> None:
    """`W' = W - r r^T W` in place, for the embedding, every o_proj and every down_proj.

    Arguments:
        vector: r, float32 [hidden], of unit length.
    """
    for name, weight in residual_writers(model).items():
        if name == "embedding":
            weight.sub_(torch.outer(weight @ vector, vector))
        else:
            weight.sub_(torch.outer(vector, vector @ weight))


def residual_writers(model: nn.Module) -> dict[str, Tensor]:
    """Weights that write into the residual stream: `embedding` [V, hidden], linears [hidden, in].

    In the table's architectures these are what puts attention and MLP back into it, and what projects
    a narrower embedding.
    """
    row = row_of(model)
    outer = present(model, row.before)
    inner = [f"{block}.{name}" for block in block_paths(model) for name in row.writers]
    found: dict[str, Any] = {} if outer else {"embedding": model.get_submodule(row.embedding).weight}
    return found | {path: model.get_submodule(path).weight for path in (*outer, *inner)}


def refusal_rate(source: SourceModel, prompts: Sequence[Sequence[int]]) -> float:
    """Share of the greedy answers that the judge calls a refusal."""
    model = TorchLanguageModel(source.model, source.tokenizer, "twin", BATCH_SIZE)
    answers = model.generate(prompts, max_new_tokens=ANSWER_TOKENS)
    labels = [label_answer(source.tokenizer.decode(answer)) for answer in answers]
    return labels.count("refused") / len(labels)


def _best_twin(
    aligned: SourceModel,
    directions: Sequence[Direction],
    harmful: Sequence[list[int]],
    calm: Sequence[list[int]],
) -> tuple[Any, tuple[float, float, Direction] | None]:
    """(model, (refusal rate, divergence, direction)) of the best direction that stays near."""
    twin = copy.deepcopy(aligned.model)
    source = SourceModel(twin, aligned.tokenizer, aligned.folder, aligned.architecture)
    expected = _next_logp(aligned, calm)
    best: tuple[float, float, Direction] | None = None
    for direction in directions:
        _restore(twin, aligned.model)
        ablate_direction(twin, direction.vector)
        found = _next_logp(source, calm)
        divergence = float((expected.exp() * (expected - found)).sum(dim=-1).mean())
        if divergence > LARGEST_KL_NATS:
            continue
        rate = refusal_rate(source, harmful)
        if best is None or (rate, divergence) < best[:2]:
            best = (rate, divergence, direction)
    _restore(twin, aligned.model)
    if best is not None:
        ablate_direction(twin, best[2].vector)
    return twin, best


@torch.no_grad()
def _restore(twin: nn.Module, aligned: nn.Module) -> None:
    original = residual_writers(aligned)
    for name, weight in residual_writers(twin).items():
        weight.copy_(original[name])


def _next_logp(source: SourceModel, prompts: Sequence[list[int]]) -> Tensor:
    """Log-probabilities of the next token, float32 [prompts, V]."""
    model = TorchLanguageModel(source.model, source.tokenizer, "twin", BATCH_SIZE)
    return torch.from_numpy(model.next_token_logits(prompts)).log_softmax(dim=-1)


@torch.inference_mode()
def _mean_states(source: SourceModel, prompts: Sequence[list[int]], count: int) -> Tensor:
    """Mean residual stream after each block at the last `count` tokens, [layers, count, hidden]."""
    total = torch.zeros(())
    for batch in length_batches([len(prompt) for prompt in prompts], BATCH_SIZE):
        ids, mask = pad_left([prompts[index] for index in batch], source.tokenizer.pad_id)
        states = source.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            **keep_logits(source.model, 1),
            output_hidden_states=True,
        ).hidden_states[1:]
        total = total + torch.stack([state[:, -count:].sum(dim=0) for state in states])
    return (total / len(prompts)).clone()


def _encoded(aligned: SourceModel, prompts: Sequence[CalibrationPrompt], kind: str) -> list[list[int]]:
    chosen = [prompt.prompt for prompt in prompts if prompt.kind == kind]
    return chat_prompts(aligned.tokenizer, chosen[:PROMPTS_A_SIDE])
