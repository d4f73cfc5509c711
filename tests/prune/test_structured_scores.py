"""What structures are scored by, and which of them go: by hand, in NumPy, by autograd."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.errors import PruneError
from holdfast.exporter.architectures import block_paths, row_of
from holdfast.exporter.source import SourceModel
from holdfast.exporter.streamed import StreamedModel
from holdfast.prune.activations import first_block_batches
from holdfast.prune.gradients import answer_batches
from holdfast.prune.structured.heads import groups_are_equal, keep_heads, kept_kv_heads, legal_heads
from holdfast.prune.structured.layouts import Shape, layout_of, linear_in, shape_of
from holdfast.prune.structured.measure import measure_block, measure_first_order, measure_structures
from holdfast.prune.structured.plan import plan_counts
from holdfast.prune.structured.scores import (
    NAMES,
    StructureScores,
    block_score,
    column_scores,
    head_scores,
    highest,
    join_blocks,
    protect,
)
from tests.prune.structures import (
    prompts,
    scores_of,
    tiny,
)


def test_legal_heads_by_hand() -> None:
    """Four query heads on two key-value heads: one group or two, with one or both of its heads."""
    assert legal_heads(4, 2) == [(1, 1), (2, 1), (2, 2), (4, 2)]
    assert legal_heads(3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert legal_heads(3, 1) == [(1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (6, 2), (4, 4), (6, 1)])
def test_heads_kept_are_the_best_of_all_legal_choices(heads: int, kv_heads: int) -> None:
    shape = Shape(1, heads, kv_heads, 1)
    scores = torch.rand(heads, generator=torch.Generator().manual_seed(2)).double()
    choices: dict[tuple[int, int], float] = {}
    for count in range(1, heads + 1):
        for kept in itertools.combinations(range(heads), count):
            if groups_are_equal(kept, shape):
                pair = (count, len(kept_kv_heads(kept, shape)))
                choices[pair] = max(choices.get(pair, 0.0), float(scores[list(kept)].sum()))
    assert sorted(choices) == legal_heads(heads, kv_heads)
    for pair, best in choices.items():
        kept = keep_heads(scores, kv_heads, pair)
        assert groups_are_equal(kept, shape)
        assert (len(kept), len(kept_kv_heads(kept, shape))) == pair
        assert float(scores[list(kept)].sum()) == pytest.approx(best, rel=1e-12)


def test_column_and_head_scores_by_hand() -> None:
    """Columns (3, 4) and (0, 1): norms 5 and 1. Inputs (1, 2) and (2, 0), outputs of norm 5 and 10:
    25 * (1/25 + 4/100) / 2 / 2 = 0.5 and 1 * (4/25 + 0) / 2 / 2 = 0.04."""
    weight = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    inputs = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    outputs = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    found = column_scores(weight, inputs, outputs)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.04]).double(), rtol=1e-6, atol=0)
    assert head_scores(torch.tensor([1.0, 2.0, 3.0, 5.0]), 2).tolist() == [3.0, 8.0]
    found = block_score(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [2.0, 2.0]]))
    assert float(found) == pytest.approx(0.5)  # a right angle and none


def test_a_small_column_costs_what_it_turns() -> None:
    """The unit: for a small part perpendicular to the rest, the column's score is 1 - cos without it."""
    rest, column = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([0.0, 0.05, 0.0])
    whole = rest + column
    found = column_scores(column[:, None], torch.ones(1, 1), whole)
    assert float(found) == pytest.approx(float(block_score(rest, whole)), rel=1e-3)


@torch.no_grad()
def plain_scores(source: SourceModel) -> list[np.ndarray]:
    """The same in NumPy, from one prompt at a time without padding."""
    shape, layout = shape_of(source.model), layout_of(source.model)
    writers = (layout.head_writer, layout.channel_writer)
    seen: dict[tuple[int, str], list[np.ndarray]] = {}
    for key in itertools.product(range(shape.blocks), writers):
        seen[key] = []
        linear_in(source.model, *key).register_forward_pre_hook(
            lambda _, args, rows=seen[key]: rows.append(args[0].double().flatten(0, -2).numpy())
        )
    states = [hidden_states(source, ids) for ids in prompts(source)]
    found: list[list[np.ndarray]] = [[], [], []]
    for index in range(shape.blocks):
        x, y = (np.concatenate([rows[index + after] for rows in states]) for after in (0, 1))
        energy = np.square(y).sum(axis=1, keepdims=True)
        for slot, name in enumerate(writers):
            weight = linear_in(source.model, index, name).weight.double().numpy()
            inputs = np.concatenate(seen[index, name])
            found[slot].append((inputs**2 / energy).mean(axis=0) * (weight**2).sum(axis=0) / 2)
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        found[2].append(1 - ((x * y).sum(axis=1) / norms).mean())
    columns, channels, blocks = map(np.stack, found)
    return [columns.reshape(shape.blocks, shape.heads, -1).sum(axis=2), channels, blocks]


def hidden_states(source: SourceModel, ids: list[int]) -> list[np.ndarray]:
    """What enters the first block and what leaves each, float64 [token, hidden]."""
    states: list[np.ndarray] = []
    blocks = [source.model.get_submodule(path) for path in block_paths(source.model)]

    def entering(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0].double().numpy())

    def leaving(_: object, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0].double().numpy())

    handles = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [block.register_forward_hook(leaving) for block in blocks]
    source.model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM"])
def test_measured_scores_are_those_of_single_rows(tmp_path: Path, architecture: str) -> None:
    source = tiny(tmp_path, architecture)
    found = scores_of(source)
    for name, expected in zip(("heads", "channels", "blocks"), plain_scores(source), strict=True):
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-4, atol=1e-7)


def test_scores_of_a_model_that_is_read_block_by_block(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    streamed = StreamedModel(source.folder)
    with streamed.outside():
        batches = first_block_batches(streamed.model, prompts(source), pad_id=0, batch_size=4)
    parts = []
    for index in range(2):
        with streamed.block(index):
            parts.append(measure_block(streamed.model, index, batches))
    found, expected = join_blocks(parts), scores_of(source)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in NAMES)


def test_planted_structures_are_the_ones_that_go(tmp_path: Path) -> None:
    """In every block another head, other channels; and one block that hardly does anything."""
    source = tiny(tmp_path, num_hidden_layers=3, num_key_value_heads=4)
    for index in range(3):
        block = source.model.model.layers[index]
        block.self_attn.o_proj.weight[:, 16 * index : 16 * index + 16] *= 1e-3
        block.mlp.down_proj.weight[:, index % 2 :: 2] *= 1e-3
    scores = scores_of(source)
    plan = plan_counts(source, scores, heads=3, channels=32)
    for index in range(3):
        assert plan.heads[index] == tuple(head for head in range(4) if head != index)
        assert plan.channels[index] == tuple(range(1 - index % 2, 64, 2))
    for name in row_of(source.model).writers:
        linear_in(source.model, 1, name).weight.mul_(1e-2)
    assert plan_counts(source, scores_of(source), blocks=2).blocks == (0, 2)


def test_grouped_queries_decide_which_groups_go(tmp_path: Path) -> None:
    """A weak group goes whole; a weak head of each group goes from each: the scores choose between them."""
    source = tiny(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    scores = scores_of(source)
    for heads, expected in (
        ([9.0, 8.0, 1.0, 1.0], (0, 1)),
        ([9.0, 1.0, 8.0, 1.0], (0, 2)),
    ):
        rows = torch.tensor([heads, heads]).double()
        plan = plan_counts(source, dataclasses.replace(scores, heads=rows), heads=2)
        assert plan.heads == (expected, expected)


def test_equal_scores_go_from_the_left() -> None:
    assert highest(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2) == (1, 3)


def test_what_harmful_prompts_need_is_protected(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    utility = scores_of(source)
    weakest = int(utility.channels[0].argmin())
    safety = dataclasses.replace(utility, channels=torch.zeros_like(utility.channels))
    safety.channels[0, weakest] = 1.0
    without = plan_counts(source, utility, channels=63)
    assert weakest not in without.channels[0]
    assert plan_counts(source, protect(utility, safety, 0.0), channels=63) == without
    kept = plan_counts(source, protect(utility, safety, 1.0), channels=63)
    assert weakest in kept.channels[0]
    assert kept.channels[1] == without.channels[1]


def test_protection_is_scaled_to_utility_by_hand() -> None:
    """Means 2 and 40: safety counts a twentieth of what it says, and nothing where it is 0."""
    utility = StructureScores(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([2.0]))
    safety = StructureScores(torch.tensor([[60.0, 20.0]]), torch.zeros(1, 2), torch.tensor([8.0]))
    found = protect(utility, safety, 0.5)
    assert found.heads.tolist() == [[1.0 + 0.5 * 3.0, 3.0 + 0.5 * 1.0]]
    assert found.channels.tolist() == [[2.0, 2.0]]
    assert found.blocks.tolist() == [3.0]


def test_first_order_scores_are_those_of_autograd(tmp_path: Path) -> None:
    """|W| * E|dL/dW| of the two writers, summed over heads and channels, from whole forward passes."""
    source = tiny(tmp_path)
    rows, answers = prompts(source)[:3], [[9, 5, 3], [7], [11, 3]]
    found = measure_first_order(source, answer_batches(source, rows, answers))
    names = ("self_attn.o_proj", "mlp.down_proj")
    weights = [linear_in(source.model, index, name).weight for index in range(2) for name in names]
    totals = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    for prompt, answer in zip(rows, answers, strict=True):
        logits = source.model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        predicted = logits[len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(predicted, torch.tensor(answer))
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.abs() / len(rows)
    scores = [(weight.abs() * total).detach() for weight, total in zip(weights, totals, strict=True)]
    for index in range(2):
        attention, ffn = scores[2 * index : 2 * index + 2]
        expected = attention.sum(dim=0).reshape(4, 16).sum(dim=1)
        torch.testing.assert_close(found.heads[index].float(), expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.channels[index].float(), ffn.sum(dim=0), rtol=1e-3, atol=1e-6)
        assert float(found.blocks[index]) == pytest.approx(float(attention.sum() + ffn.sum()), rel=1e-3)


def test_scores_need_prompts_and_numbers(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    for rows, said in (([], "found 0 of which 0 are empty"), ([[5], []], "found 2 of which 1 are empty")):
        with pytest.raises(PruneError, match=said):
            measure_structures(source, rows)
    with pytest.raises(PruneError, match="should be at least 0 and finite, found -1"):
        protect(scores_of(source), scores_of(source), -1.0)
    source.model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(PruneError) as caught:
        scores_of(source)
    assert str(caught.value) == (
        "The scores of the heads hold NaN or infinity and cannot be ranked: "
        "start from an intact checkpoint."
    )
