"""Heads, channels and blocks removed for real: the same logits where nothing was lost, and refusals."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from holdfast.chat import user
from holdfast.errors import PruneError
from holdfast.exporter.architectures import ROWS, block_paths, row_of
from holdfast.exporter.export import export_source
from holdfast.exporter.source import SourceModel, load_source, save_source
from holdfast.exporter.streamed import StreamedModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.files import to_json
from holdfast.prune.activations import first_block_batches
from holdfast.prune.gradients import answer_batches
from holdfast.prune.structured.heads import groups_are_equal, keep_heads, kept_kv_heads, legal_heads
from holdfast.prune.structured.layouts import LAYOUTS, Shape, layout_of, linear_in, shape_of
from holdfast.prune.structured.measure import measure_block, measure_first_order, measure_structures
from holdfast.prune.structured.plan import Kind, StructuredPlan, plan_counts, plan_structured
from holdfast.prune.structured.remove import model_size, remove, report_removed
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
from holdfast.recipe import ExportConfig
from tests.tiny import LINES, tiny_model

WITH_HEADS = sorted(name for name, layout in LAYOUTS.items() if layout.head_readers)
# Windows shorter than the prompts and blocks of different kinds, so that a block in the wrong place shows.
MIXED = {
    "Gemma2ForCausalLM": {"sliding_window": 4},
    "Gemma3ForCausalLM": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] + ["sliding_attention"] * 2,
    },
    "GPTNeoForCausalLM": {"window_size": 4, "attention_types": [[["global", "local"], 2]]},
    "Qwen3ForCausalLM": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
}


def tiny(folder: Path, architecture: str = "LlamaForCausalLM", **settings: object) -> SourceModel:
    return load_source(tiny_model(folder / "model", architecture, **settings))


def four_blocks(folder: Path, architecture: str) -> SourceModel:
    return tiny(folder, architecture, num_hidden_layers=4, **MIXED.get(architecture, {}))


def prompts(source: SourceModel) -> list[list[int]]:
    return [source.tokenizer.encode_chat(user(line)) for line in LINES]


def scores_of(source: SourceModel) -> StructureScores:
    return measure_structures(source, prompts(source), batch_size=4)


@torch.no_grad()
def logits(source: SourceModel) -> Tensor:
    ids = torch.tensor([prompts(source)[0]])
    result: Tensor = source.model(ids, use_cache=False).logits
    return result


def some_plan(source: SourceModel, **counts: int) -> StructuredPlan:
    """A plan of random scores: which ones go differs from block to block."""
    shape, draw = shape_of(source.model), torch.Generator().manual_seed(5)
    sizes = ((shape.blocks, shape.heads), (shape.blocks, shape.channels), (shape.blocks,))
    scores = StructureScores(*(torch.rand(size, generator=draw).double() for size in sizes))
    return plan_counts(source, scores, **counts)


def silence(source: SourceModel, plan: StructuredPlan) -> None:
    """What the plan removes writes nothing any more."""
    layout, shape = layout_of(source.model), shape_of(source.model)
    for index, heads, channels in zip(plan.blocks, plan.heads, plan.channels, strict=True):
        attention = linear_in(source.model, index, layout.head_writer).weight
        for head in set(range(shape.heads)) - set(heads):
            attention.reshape(len(attention), shape.heads, -1)[:, head] = 0.0
        gone = sorted(set(range(shape.channels)) - set(channels))
        linear_in(source.model, index, layout.channel_writer).weight[:, gone] = 0.0
    for index in set(range(shape.blocks)) - set(plan.blocks):
        for name in row_of(source.model).writers:
            for parameter in linear_in(source.model, index, name).parameters():
                parameter.zero_()


def test_every_architecture_has_a_layout() -> None:
    assert set(LAYOUTS) == set(ROWS)


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_silent_structures_leave_without_a_trace(tmp_path: Path, architecture: str) -> None:
    """Blocks, channels and, where a config can say it, heads at once; cached answers are the same."""
    source = four_blocks(tmp_path, architecture)
    heads = 2 if layout_of(source.model).head_readers else None
    counts = {"channels": 24, "blocks": 3} | ({} if heads is None else {"heads": heads})
    plan = some_plan(source, **counts)
    assert len(set(plan.channels)) == 3
    silence(source, plan)
    expected, before = logits(source), {k: v.clone() for k, v in source.model.state_dict().items()}
    smaller = remove(source, plan)
    torch.testing.assert_close(logits(smaller), expected, rtol=0, atol=1e-5)
    found = shape_of(smaller.model)
    assert (found.blocks, found.channels, found.heads) == (3, 24, heads or 4)
    assert all(torch.equal(value, before[name]) for name, value in source.model.state_dict().items())
    answers = [
        TorchLanguageModel(model.model, model.tokenizer, "").generate(prompts(source)[:3], max_new_tokens=6)
        for model in (source, smaller)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("architecture", WITH_HEADS)
@pytest.mark.parametrize("left", [(6, 3), (4, 4), (1, 1)])
def test_silent_heads_on_any_legal_groups(tmp_path: Path, architecture: str, left: tuple[int, int]) -> None:
    settings = {"hidden_size": 64} if architecture == "Phi3ForCausalLM" else {}
    source = tiny(tmp_path, architecture, num_attention_heads=8, num_key_value_heads=4, **settings)
    draw = torch.Generator().manual_seed(1)
    heads = tuple(keep_heads(torch.rand(8, generator=draw).double(), 4, left) for _ in range(2))
    plan = StructuredPlan((0, 1), heads, (tuple(range(64)),) * 2)
    silence(source, plan)
    smaller = remove(source, plan)
    torch.testing.assert_close(logits(smaller), logits(source), rtol=0, atol=1e-5)
    config = smaller.model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == left
    assert config.head_dim == (8 if architecture == "Phi3ForCausalLM" else 16)


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_what_is_saved_loads_as_an_ordinary_model(tmp_path: Path, architecture: str) -> None:
    source = four_blocks(tmp_path, architecture)
    counts = {"heads": 2} if layout_of(source.model).head_readers else {}
    smaller = remove(source, some_plan(source, channels=40, blocks=2, **counts))
    save_source(smaller, tmp_path / "smaller")
    assert torch.equal(logits(load_source(tmp_path / "smaller")), logits(smaller))
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "smaller", dtype=torch.float32, attn_implementation=row_of(source.model).attention
    )
    assert type(plain) is type(source.model)
    other = dataclasses.replace(smaller, model=plain.eval())
    torch.testing.assert_close(logits(other), logits(smaller), rtol=0, atol=1e-4)
    assert not (logits(smaller) - logits(source)).abs().max() < 0.1


def test_untied_heads_and_generation_settings_stay(tmp_path: Path) -> None:
    source = tiny(tmp_path, tie_word_embeddings=False)
    smaller = remove(source, some_plan(source, channels=32)).model
    assert smaller.lm_head.weight is not smaller.model.embed_tokens.weight
    assert torch.equal(smaller.lm_head.weight, source.model.lm_head.weight)
    assert smaller.generation_config.to_dict() == source.model.generation_config.to_dict()
    assert not smaller.training
    assert not any(parameter.requires_grad for parameter in smaller.parameters())


def test_nothing_is_shared_with_the_source(tmp_path: Path) -> None:
    """Recovery trains the smaller model, with the source as its reference."""
    source = tiny(tmp_path)
    smaller = remove(source, some_plan(source))
    expected = logits(source)
    for parameter in smaller.model.parameters():
        parameter.add_(1.0)
    smaller.model.generation_config.max_new_tokens = 7
    assert torch.equal(logits(source), expected)
    assert source.model.generation_config.max_new_tokens != 7


def test_the_exported_graph_is_smaller_and_proved(tmp_path: Path) -> None:
    source = tiny(tmp_path, num_hidden_layers=3)
    smaller = remove(source, some_plan(source, heads=2, channels=32, blocks=2))
    reports = []
    for name, model in (("before", source), ("after", smaller)):
        (tmp_path / name).mkdir()
        reports.append(export_source(model, tmp_path / name, ExportConfig(atol=2e-5)))
    before, after = reports
    assert after.graph.form == "fused"
    lost = model_size(source.model).bytes - model_size(smaller.model).bytes
    assert before.graph_bytes - after.graph_bytes >= lost
    assert "model.layers.2.mlp.up_proj" not in after.modules
    assert after.modules["model.layers.1.mlp.down_proj"].shape == (32, 32)


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


ALL = ("heads", "channels", "blocks")


@pytest.mark.parametrize(
    ("kinds", "frac", "within"),
    [
        (("heads",), 0.25, 0.1),
        (("channels",), 0.1, 0.03),
        (("channels",), 0.25, 0.03),
        (("blocks",), 0.25, 1 / 6),
        (("blocks",), 0.7, 1 / 6),
        *((ALL, frac, 0.03) for frac in (0.1, 0.25, 0.5, 0.7)),
    ],
)
def test_the_share_reached(tmp_path: Path, kinds: tuple[Kind, ...], frac: float, within: float) -> None:
    """Eight heads on four, 100 channels, six blocks: never more than asked, and near it."""
    settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 100}
    source = tiny(tmp_path, "Qwen2ForCausalLM", num_hidden_layers=6, **settings)
    draw = torch.Generator().manual_seed(3)
    sizes = ((6, 8), (6, 100), (6,))
    scores = StructureScores(*(torch.rand(size, generator=draw).double() for size in sizes))
    plan = plan_structured(source, scores, sparsity_frac=frac, kinds=kinds, channel_multiple=8)
    smaller = remove(source, plan)
    report = report_removed(source, smaller, plan)
    assert report.asked_frac == frac
    assert frac - within < report.reached_frac <= frac + 1e-9
    left = shape_of(smaller.model)
    assert left.blocks == 6 or "blocks" in kinds
    assert left.heads == 8 or "heads" in kinds
    assert left.channels == 100 or ("channels" in kinds and left.channels % 8 == 0)
    assert len(report.removed_blocks) == 6 - left.blocks
    assert report.after.bytes == 4 * report.after.parameters
    assert report.before.parameters - report.after.parameters == (
        report.before.block_parameters - report.after.block_parameters
    )


def test_nothing_asked_removes_nothing(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    plan = plan_structured(source, scores_of(source), sparsity_frac=0.0, kinds=("channels",))
    smaller = remove(source, plan)
    assert torch.equal(logits(smaller), logits(source))
    assert report_removed(source, smaller, plan).reached_frac == 0.0


def test_the_cheaper_kind_goes(tmp_path: Path) -> None:
    """A block is 4 heads of 2048 weights, 64 channels of 96 and 64 in norms. Of 30 %, two heads take 28.4 %
    and 40 channels 26.7 %, near enough to each other for the scores to decide."""
    source = tiny(tmp_path, num_attention_heads=4, num_key_value_heads=4)
    scores = scores_of(source)
    request = {"sparsity_frac": 0.3, "kinds": ("heads", "channels"), "channel_multiple": 8}
    cheap_heads = dataclasses.replace(scores, heads=scores.heads * 1e-6)
    plan = plan_structured(source, cheap_heads, **request)
    assert (len(plan.heads[0]), len(plan.channels[0])) == (2, 64)
    cheap_channels = dataclasses.replace(scores, channels=scores.channels * 1e-6)
    plan = plan_structured(source, cheap_channels, **request)
    assert (len(plan.heads[0]), len(plan.channels[0])) == (4, 24)


def test_the_record_is_plain_data(tmp_path: Path) -> None:
    source = tiny(tmp_path, num_hidden_layers=3)
    plan = StructuredPlan((0, 2), ((0, 2), (2, 3)), (tuple(range(62)), tuple(range(2, 64))))
    with pytest.raises(PruneError, match="as many heads and channels"):
        remove(source, plan)
    plan = dataclasses.replace(plan, heads=((0, 1), (2, 3)))
    report = report_removed(source, remove(source, plan), plan)
    record = json.loads(to_json(dataclasses.asdict(report)))
    assert record["removed_blocks"] == [1]
    assert record["removed"] == {
        "0": {"heads": [2, 3], "kv_heads": [1], "channels": [62, 63]},
        "2": {"heads": [0, 1], "kv_heads": [0], "channels": [0, 1]},
    }
    assert record["before"]["blocks"] == 3 and record["after"]["blocks"] == 2
    assert record["after"]["head_dim"] == 16
    # one block: q and o 2 * 64 * 32, k and v 2 * 32 * 32, MLP 3 * 64 * 32, norms 2 * 32
    assert record["before"]["block_parameters"] == 3 * (4096 + 2048 + 6144 + 64)
    assert record["after"]["block_parameters"] == 2 * (2048 + 1024 + 3 * 62 * 32 + 64)
    assert record["reached_frac"] == pytest.approx(1 - 18176 / 37056)


@pytest.mark.parametrize(
    ("architecture", "counts", "message"),
    [
        (
            "GPT2LMHeadModel",
            {"heads": 3},
            "GPT2LMHeadModel makes a head hidden size / heads wide, so that its config cannot say 3 of 4 "
            "heads: all 4 have to stay, remove channels or blocks.",
        ),
        (
            "LlamaForCausalLM",
            {"heads": 3},
            "This LlamaForCausalLM has 4 query heads on 2 key-value heads and cannot keep 3: each "
            "key-value head needs the same number, so keep 1, 2, 4.",
        ),
        (
            "LlamaForCausalLM",
            {"heads": 0},
            "This LlamaForCausalLM has 4 query heads on 2 key-value heads and cannot keep 0: each "
            "key-value head needs the same number, so keep 1, 2, 4.",
        ),
        (
            "LlamaForCausalLM",
            {"channels": 0},
            "A block of this LlamaForCausalLM has 64 FFN channels and cannot keep 0: keep 1 to 64.",
        ),
        (
            "OPTForCausalLM",
            {"blocks": 0},
            "This OPTForCausalLM has 2 decoder blocks and cannot keep 0: keep 1 to 2.",
        ),
    ],
)
def test_counts_that_cannot_be(
    tmp_path: Path, architecture: str, counts: dict[str, int], message: str
) -> None:
    source = tiny(tmp_path, architecture)
    with pytest.raises(PruneError) as caught:
        some_plan(source, **counts)
    assert str(caught.value) == message


@pytest.mark.parametrize("architecture", sorted(set(LAYOUTS) - set(WITH_HEADS)))
def test_heads_tied_to_the_hidden_size_are_refused(tmp_path: Path, architecture: str) -> None:
    source = tiny(tmp_path, architecture)
    with pytest.raises(PruneError, match=f"{architecture} makes a head hidden size / heads wide"):
        plan_structured(source, scores_of(source), sparsity_frac=0.25, kinds=("heads", "channels"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"sparsity_frac": 1.0, "kinds": ("channels",)},
            "The share of weights to remove should be at least 0 and below 1, found 1.0: 0.25 removes a "
            "quarter of the decoder blocks' weights.",
        ),
        (
            {"sparsity_frac": -0.1, "kinds": ("channels",)},
            "The share of weights to remove should be at least 0 and below 1, found -0.1: 0.25 removes a "
            "quarter of the decoder blocks' weights.",
        ),
        (
            {"sparsity_frac": math.nan, "kinds": ("channels",)},
            "The share of weights to remove should be at least 0 and below 1, found nan: 0.25 removes a "
            "quarter of the decoder blocks' weights.",
        ),
        (
            {"sparsity_frac": 0.5, "kinds": ("channels",)},
            "Removing channels takes at most 24.9% of the decoder blocks' weights of this "
            "LlamaForCausalLM, because something of every layer has to stay, and 50.0% was asked: "
            "ask for less, or remove other structures as well.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ("blocks",)},
            "10.0% of the decoder blocks' weights is less than the smallest step in which this "
            "LlamaForCausalLM can lose blocks: ask for more, or allow smaller structures.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ()},
            "Expected one or more of heads, channels, blocks to remove, found nothing.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ("rows",)},
            "Expected one or more of heads, channels, blocks to remove, found rows.",
        ),
        (
            {"sparsity_frac": 0.1, "kinds": ("channels",), "channel_multiple": 0},
            "The multiple of FFN channels should be at least 1, found 0.",
        ),
    ],
)
def test_requests_that_cannot_be(tmp_path: Path, request_: dict[str, object], message: str) -> None:
    source = tiny(tmp_path)
    with pytest.raises(PruneError) as caught:
        plan_structured(source, scores_of(source), **request_)
    assert str(caught.value) == message


def test_plans_that_cannot_be(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    channels = (tuple(range(64)),) * 2
    with pytest.raises(PruneError) as caught:
        remove(source, StructuredPlan((0, 1), ((0, 1, 2), (0, 1, 2)), channels))
    assert "cannot keep 3" in str(caught.value)
    source = tiny(tmp_path / "wider", num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(PruneError) as caught:
        remove(source, StructuredPlan((0, 1), ((0, 1, 3, 4), (0, 1, 2, 3)), channels))
    assert str(caught.value) == (
        "A plan leaves block 1 of this LlamaForCausalLM the query heads 0, 1, 2, 3, which are not equally "
        "many for each of its 2 key-value heads: remove whole groups, or the same number from each."
    )


def test_a_config_that_checks_itself(tmp_path: Path) -> None:
    """Phi-3 compares the factors of its rotary embedding with hidden size / heads."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    source = tiny(tmp_path, "Phi3ForCausalLM", rope_scaling=scaling, original_max_position_embeddings=64)
    with pytest.raises(PruneError) as caught:
        remove(source, some_plan(source, heads=2))
    assert str(caught.value) == (
        "transformers' config of this Phi3ForCausalLM cannot say what the plan leaves (`rope_scaling`'s "
        "short_factor field must have length 16, got 8): remove other structures."
    )
    assert shape_of(remove(source, some_plan(source, channels=32)).model).channels == 32


def test_blocks_that_depend_on_their_index_stay(tmp_path: Path) -> None:
    source = tiny(tmp_path, "GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PruneError) as caught:
        plan_structured(source, scores_of(source), sparsity_frac=0.5, kinds=("blocks",))
    assert str(caught.value) == (
        "This GPT2LMHeadModel has `scale_attn_by_inverse_layer_idx` set to True, so that a block computes "
        "something else at another index and 1 of 2 blocks cannot be kept: remove channels instead."
    )


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
