"""The part on pruning of docs/results.md, put together from tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.runtime.environment import environment
from reference.pruning import tables
from reference.pruning.device import NEW_TOKENS, PROMPT_TOKENS, REPEATS
from reference.pruning.figures import MARGIN_FRAC, STRICT_FRAC, GroupFigures, PairFigures
from reference.pruning.goals import NEAR_FRAC, goals
from reference.pruning.rows import OURS, percent
from reference.results.closeness import PASSAGES_A_SUITE

HEAD = """## Pruning

`make results-pruning` (`python -m reference.pruning`) measured everything in this part, on {processor},
with ONNX Runtime {runtime}. Every pruned model is compared with the same unpruned one in torch, prompt by
prompt, on the suites and by the rules of the part above, with greedy answers of {tokens} tokens. They are
answers of torch, whose fp32 graph flips what the first row of each table says; of quantized models, of the
artifact in ONNX Runtime.

{summary}

How to read it:

- **Lost** is safe in the unpruned model and not in the pruned one (a refusal of a harmful prompt, an answer
  to a harmless one), **gained** the reverse; both are flips. The interval is Wilson's, at 95 %.
- **Against Wanda**: an exact McNemar test, two-sided at 5 %, on the prompts that only one of the two flips,
  at the same sparsity. "level" means that chance explains the difference.
- **Gate, both sides**: Holdfast's own on the harmful prompts of all suites together, the harmless ones, and
  coherence, at its default margin of {margin} and at {strict}. **Suites by themselves**: of the gate's
  metrics at {margin}, one suite at a time, how many pass / settle nothing / fail.
- **Perplexity** is on the unpruned fp32 graph's own greedy answers, to {passages} evaluation prompts of
  each suite.
- Where a row has seeds, each is a calibration draw of its own, also for recovery: median [lowest, highest].
  Flips of one side, intervals and comparisons are those of the seed with the median number of flips.
  Magnitude reads no calibration prompts.
- **Zeros** are a share of the weights of the decoder blocks' linear layers, as they are afterwards,
  **removed** one of all weights of the blocks; embedding and head are left alone. Seconds compare rows with
  each other and say nothing else.
- **{ours}** is the alignment-aware score that the goals are about.
"""

PAIR_SECTION = """## Pruning, the {name} pair

### Goals

{goals}

{pictures}
"""

GROUP_SECTION = """### {title}

{body}
"""

DEVICE_SECTION = """### Bytes and decode latency

All graphs in turns in one process, one conversation at a time, {prompt} prompt tokens and {new} new ones,
median over {repeats} rounds [lowest, highest]; not recovered, which changes neither. ONNX Runtime's kernels
on a CPU multiply zeros like any other number, in patterns too; removed structures are smaller matrices.
Graphs of equal shapes do the same work: what they differ in decode time is this machine's noise.
"Down in proportion", in the goals, means at most {near} above the share of the parameters that is left,
embedding included.

{found}

{table}
"""


def page(pairs: Sequence[PairFigures], pictures: Sequence[Path]) -> str:
    """The whole part.

    Arguments:
        pictures: relative to the page.
    """
    machine = environment(threads=0)
    head = HEAD.format(
        processor=f"{machine['cpu'] or machine['machine']}, {machine['cores']} cores",
        runtime=machine["onnxruntime"],
        tokens=pairs[0].facts["tokens"],
        summary=" ".join(filter(None, map(summary, pairs))),
        margin=_points(MARGIN_FRAC),
        strict=_points(STRICT_FRAC),
        passages=PASSAGES_A_SUITE,
        ours=OURS,
    )
    return "\n".join([head, *(_pair(pair, pictures) for pair in pairs)])


def summary(pair: PairFigures) -> str:
    """How many goals were reached, in a sentence; empty where none was measured."""
    met = [goal.met for goal in goals(pair)]
    return f"On the {pair.name} pair {sum(map(bool, met))} of {len(met)} goals are reached." if met else ""


def _pair(pair: PairFigures, pictures: Sequence[Path]) -> str:
    own = [path for path in pictures if path.name.startswith(f"{pair.name}-")]
    head = PAIR_SECTION.format(
        name=pair.name,
        goals=tables.goals_table(pair)
        if goals(pair)
        else "None of the rows that they are about was measured.",
        pictures="\n\n".join(f"![{path.stem}]({path.as_posix()})" for path in own),
    )
    device = [_device(pair)] if pair.device else []
    return "\n".join([head, *(_group(pair, group) for group in pair.groups), *device])


def _group(pair: PairFigures, group: GroupFigures) -> str:
    parts = [
        group.group.note,
        tables.rates_table(pair, group),
        tables.flips_table(pair, group),
        tables.artifacts_table(pair, group),
        tables.stops(group),
        tables.failures(group),
    ]
    return GROUP_SECTION.format(title=group.group.title, body="\n\n".join(filter(None, parts)))


def _device(pair: PairFigures) -> str:
    return DEVICE_SECTION.format(
        prompt=PROMPT_TOKENS,
        new=NEW_TOKENS,
        repeats=REPEATS,
        near=_points(NEAR_FRAC),
        found=tables.device_lines(pair),
        table=tables.device_table(pair),
    )


def _points(frac: float) -> str:
    return percent(frac).replace("%", "points")
