"""Models, prompts and plans that the tests of structured pruning share."""

from pathlib import Path

import torch
from torch import Tensor

from holdfast.chat import user
from holdfast.exporter.architectures import row_of
from holdfast.exporter.source import SourceModel, load_source
from holdfast.prune.structured.layouts import LAYOUTS, layout_of, linear_in, shape_of
from holdfast.prune.structured.measure import measure_structures
from holdfast.prune.structured.plan import StructuredPlan, plan_counts
from holdfast.prune.structured.scores import (
    StructureScores,
)
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
