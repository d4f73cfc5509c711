"""Writes docs/architectures.md: `python -m tests.exporter.coverage_table`.

The tables are the cases that the tests run; every refusal is provoked, and its sentence shown as it is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.exporter.architectures import ROWS, Row, why_unfused
from holdfast.exporter.classifier import load_classifier
from holdfast.exporter.classifiers import CLASSIFIERS, ClassifierRow
from holdfast.exporter.export import export_source
from holdfast.exporter.source import load_source
from holdfast.exporter.tracing import pluggable
from tests.exporter.coverage import ATOL, PLAIN, VARIANTS
from tests.tiny import tiny_llama, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
SHOWN_FOLDER = "my-model"
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}

HEAD = f"""# Architectures

<!-- Written by `python -m tests.exporter.coverage_table`; a test fails when it is not up to date. -->

What is named here is tested on tiny random models of the real classes of transformers, and nothing else
is accepted. Each case is exported and compared with torch on a left-padded batch of unequal rows, prefill
and cached steps, and again with torch on every row alone and uncached; no logit may differ by more than
{ATOL:.0e}. Windows are shorter than the prompts. Every linear layer has to be in the graph bit for bit.

`make test` runs these cases (`tests/exporter/test_coverage.py`, `test_classifier.py`).

## Language models
"""

CLASSIFIER_HEAD = """
## Classifiers: reward and preference models

`holdfast export` takes them; the graph gives `logits` [row, label]. A row has to score the same alone and
in a batch, padded on any side that is named here; `export.json` repeats the sides and the padding's id.
GPT-2 and GPT-Neo count positions by column in transformers; in the graph they count them from the
attention mask, so that rows padded on the left score as they do alone.
"""

REFUSED_HEAD = """
## Refused

What cannot be exported exactly ends in one sentence:
"""

FOOT = """
## Worth knowing

- Gemma 2, GPT-2 and GPT-Neo are loaded with transformers' eager attention: its `sdpa` leaves out soft caps
  and GPT-2's scaling by layer without a word.
- Falcon with the new decoder architecture caches a key head for every query head: transformers repeats
  them before it caches them.
- The plain graphs of GPT-2 and GPT-Neo hold a mask of one byte for every pair of positions, in every layer.
- Folding: a calibrated channel scale goes into the norm or the linear in front. Where norms follow (OPT
  350m) or q, k and v are one linear, fewer inputs have such a producer, and the others keep scale 1.

## Adding one

An architecture that Optimum exports is one row:

1. `exporter/architectures.py`: print a tiny model, write down its linears in the order of computation, the
   norm in front of each, and the paths of blocks, embedding and head. Columns with a default are for what
   is unusual. What the exporter would get wrong goes into `refused`, with what to do about it.
2. `tests/tiny.py`: what its config calls the usual fields (`FIELDS`), and what it needs besides (`EXTRA`).
3. `tests/exporter/coverage.py`: its cases. Tied and untied head always; every field of the config that
   changes what is computed; a window shorter than the prompts, where it has one.
4. `pytest tests/exporter/test_architectures.py tests/exporter/test_coverage*.py tests/prune`: the layout,
   the logits, folding, saving, pruning, quantizing. `test_the_reference_attention_leaves_nothing_out` says
   whether `attention` has to be `eager`.
5. `python -m tests.exporter.coverage_table`, and a line in `CHANGELOG.md`.

A classifier is a row of `exporter/classifiers.py` and is tested by being there.
"""


def graph_forms(architecture: str) -> tuple[str, ...]:
    """Names of the graphs that are tested of an architecture: what its first variant gives."""
    with tempfile.TemporaryDirectory() as folder:
        settings = next(iter(VARIANTS[architecture].values()))
        model = load_source(tiny_model(Path(folder), architecture, **settings)).model
    return ("fused", "plain") if pluggable(model) and why_unfused(model) is None else ("plain",)


def render() -> str:
    """The page."""
    return "".join(
        (
            HEAD,
            _table(
                ("architecture", "`model_type`", "tested", "scales fold into", "graphs"),
                map(_row, ROWS.values()),
            ),
            CLASSIFIER_HEAD,
            _table(
                ("architecture", "`model_type`", "the head reads", "padded on the"),
                map(_classifier_row, CLASSIFIERS.values()),
            ),
            REFUSED_HEAD,
            _refusals(),
            FOOT,
        )
    )


def _table(names: tuple[str, ...], rows: Any) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.model_type,
        "; ".join(VARIANTS[row.name]),
        ", ".join([*_norms(row), *(producer.rpartition(".")[2] for producer, _ in row.up_down)]),
        ", ".join(graph_forms(row.name)),
    )


def _norms(row: Row) -> list[str]:
    groups = [row.norm_groups, *(variant.norm_groups for variant in row.variants)]
    return list(dict.fromkeys(norm for group in groups for norm, _ in group if norm is not None))


def _classifier_row(row: ClassifierRow) -> tuple[str, ...]:
    reads = "last token that is not padding" if row.decoder else "first token, or all of them"
    return row.name, row.model_type, reads, " or ".join(row.padding)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _unknown(folder: Path) -> None:
    _edit(tiny_llama(folder) / "config.json", architectures=["BloomForCausalLM"])
    load_source(folder)


def _unknown_classifier(folder: Path) -> None:
    tiny_model(folder, "BertForSequenceClassification")
    _edit(folder / "config.json", architectures=["AlbertForSequenceClassification"])
    load_classifier(folder)


def _loaded(architecture: str, **settings: Any) -> Callable[[Path], None]:
    return lambda folder: void(load_source(tiny_model(folder, architecture, **settings)))


def _exported(architecture: str, **settings: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        out = folder.parent / "out"
        out.mkdir()
        export_source(load_source(tiny_model(folder, architecture, **settings)), out, PLAIN)

    return run


def _classifier(
    architecture: str, config: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None
) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tiny_model(folder, architecture)
        _edit(folder / "config.json", **(config or {}))
        _edit(folder / "tokenizer_config.json", **(tokenizer or {}))
        load_classifier(folder)

    return run


def void(_: object) -> None:
    """What a refusal would have returned."""


REFUSALS: dict[str, Callable[[Path], None]] = {
    "an architecture without a row": _unknown,
    "a classifier without a row": _unknown_classifier,
    "a classifier where a language model is needed": _loaded("LlamaForSequenceClassification"),
    "a rotary embedding that changes with the length": _exported(
        "LlamaForCausalLM", rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "Phi-3 with a long context (128k)": _exported(
        "Phi3ForCausalLM", rope_scaling=LONGROPE, original_max_position_embeddings=64
    ),
    "Gemma 3 made an encoder": _loaded("Gemma3ForCausalLM", use_bidirectional_attention=True),
    "GPT-2 as the decoder of an encoder": _loaded("GPT2LMHeadModel", add_cross_attention=True),
    "Falcon, new architecture without parallel attention": _loaded(
        "FalconForCausalLM", new_decoder_architecture=True, parallel_attn=False
    ),
    "Falcon, old architecture with two norms": _loaded("FalconForCausalLM", num_ln_in_parallel_attn=2),
    "a decoder's classifier without a padding token": _classifier(
        "LlamaForSequenceClassification", config={"pad_token_id": None}
    ),
    "a classifier whose tokenizer pads with another token": _classifier(
        "LlamaForSequenceClassification", config={"pad_token_id": 3}
    ),
    "an encoder's classifier padded on the left": _classifier(
        "BertForSequenceClassification", tokenizer={"padding_side": "left"}
    ),
}


def refusal(provoke: Callable[[Path], None]) -> str:
    """The sentence that a refusal ends in; the folder is shown as `my-model`."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / SHOWN_FOLDER
        try:
            provoke(model)
        except HoldfastError as error:
            return str(error).replace(str(model), SHOWN_FOLDER)
    raise AssertionError("expected a refusal, and nothing was refused")


def _refusals() -> str:
    return "\n" + "".join(f"- {what}: “{refusal(provoke)}”\n" for what, provoke in REFUSALS.items())


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
