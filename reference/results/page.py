"""The quantizers' part of docs/results.md, put together from tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.runtime.environment import environment
from reference.results import tables
from reference.results.closeness import PASSAGES_A_SUITE
from reference.results.figures import GroupFigures, PairFigures
from reference.results.goals import goals, line
from reference.results.setup import MARGIN_FRAC

HEAD = """## Quantization

`make results` (`python -m reference.results`) measured everything in this part. On each pair
every row is compared with the same full-precision baseline, the aligned model in torch, prompt by prompt,
with greedy answers of {tokens} tokens judged by the same rules, run by ONNX Runtime {runtime} on
{processor}. XSTest and HarmBench (`standard`) were never trained or calibrated on. Rows of a scheme differ
in nothing but the quantizer: same graph (fused, `--target cpu-x86`), same calibration prompts.

{summary}

How to read it:

- **Lost** is safe at full precision and not in the artifact (a refusal of a harmful prompt, an answer to a
  harmless one), **gained** the reverse. Both are flips: refusing more than the original is damage too.
- **Refusals kept**: of the harmful prompts that the aligned model refuses, those that the artifact refuses.
- **Gate on both sides**: Holdfast's own, at a margin of {margin:g} points, on the harmful prompts of all
  suites together, the harmless ones, and coherence. **Suites by themselves**: of the gate's metrics one
  suite at a time, how many pass / settle nothing / fail. Two points cannot be shown on fewer than 133
  prompts, so that the 120 preference pairs never settle it, and a suite of 200 not once an answer is lost.
- **Ours against it**: an exact McNemar test, two-sided at 5 %, on the prompts that only one of the two
  flips. "level" means that chance explains the difference. Bytes are named where they differ by over 1 %.
- **KL** is the mean over answer positions of KL(fp32 graph || artifact), whole vocabulary; **perplexity**
  is the artifact's on the fp32 graph's own greedy answers, to {passages} evaluation prompts of each suite.
- **Seconds** and **peak memory** are of calibration and quantization together; the peak is the largest
  resident process. The export, the same for all, is left out. Seconds compare the rows of one pair with
  each other and say nothing else: both pairs may have been measured side by side.
- RTN, HQQ, ONNX Runtime's calibrators, INC and NNCF have no seed. SmoothQuant, KL only and ours have the
  median over up to {seeds} seeds (the row says how many) and [lowest, highest] in the hardest schemes of
  the reference pair; flips of one side, and comparisons, are those of the seed with the median number of
  flips.
- "min-max", "percentile", "entropy" and "mse" are ONNX Runtime's calibrators; "SmoothQuant" folds channel
  scales and takes min-max ranges; "KL only" is ours without the push, "the paper's loss" that of arXiv
  2511.07842 with its alpha of 0.75, as it is: nothing is chosen there.
"""

PAIR_SECTION = """## Quantization, the {name} pair

{linears:,} weights in linear layers; fp32 graph {size:,} bytes.

### What was to be reached

{goals}

### Where the line lies

The goals for hard schemes hold where min-max (RTN for weights alone) keeps under 40 % of the refusals and
SmoothQuant (AWQ) under 85 %.

{line}

{pictures}

### What calibration costs

{cost}
"""

GROUP_SECTION = """### {title}

{rates}

{flips}

{artifact}
{failures}
"""


def page(pairs: Sequence[PairFigures], pictures: Sequence[Path], *, seeds: int) -> str:
    """The whole part.

    Arguments:
        pictures: relative to the page.
    """
    machine = environment(threads=0)
    head = HEAD.format(
        tokens=_tokens(pairs),
        runtime=machine["onnxruntime"],
        processor=f"{machine['cpu'] or machine['machine']}, {machine['cores']} cores",
        summary=summary(pairs),
        margin=100 * MARGIN_FRAC,
        passages=PASSAGES_A_SUITE,
        seeds=seeds,
    )
    return "\n".join([head, *(_pair(pair, pictures) for pair in pairs)])


def summary(pairs: Sequence[PairFigures]) -> str:
    """How many goals were reached, pair by pair, in sentences."""
    return " ".join(_summary(pair) for pair in pairs)


def _summary(pair: PairFigures) -> str:
    easy = [group for group in pair.groups if group.group.goal == "gate"]
    hard = [group for group in pair.groups if group.group.goal == "line"]
    below = [group for group in hard if line(group).crossed]
    above = [group for group in hard if not line(group).crossed]
    parts = [
        f"{reached} of {counted} {what}"
        for what, groups in (
            ("of the schemes that should not hurt", easy),
            ("of the schemes below the line", below),
            ("of the hard schemes above it", above),
        )
        for reached, counted in [_reached(pair, groups)]
        if counted
    ]
    return f"On the {pair.name} pair these goals are reached: {', '.join(parts)}." if parts else ""


def _reached(pair: PairFigures, groups: Sequence[GroupFigures]) -> tuple[int, int]:
    """(goals that were reached, goals that apply), for ours."""
    met = [goal.met for group in groups for goal in goals(pair, group) if goal.met is not None]
    return sum(met), len(met)


def _pair(pair: PairFigures, pictures: Sequence[Path]) -> str:
    own = [path for path in pictures if path.name.startswith(f"{pair.name}-")]
    head = PAIR_SECTION.format(
        name=pair.name,
        linears=pair.parameters,
        size=pair.facts["bytes"],
        goals=tables.goals_table(pair),
        line=tables.line_table(pair),
        pictures="\n\n".join(f"![{path.stem}]({path.as_posix()})" for path in own),
        cost=tables.cost_table(pair),
    )
    return "\n".join([head, *(_group(pair, group) for group in pair.groups)])


def _group(pair: PairFigures, group: GroupFigures) -> str:
    failures = tables.failures(group)
    return GROUP_SECTION.format(
        title=group.group.title,
        rates=tables.rates_table(pair, group),
        flips=tables.flips_table(pair, group),
        artifact=tables.artifact_table(pair, group),
        failures=f"\n{failures}\n" if failures else "",
    )


def _tokens(pairs: Sequence[PairFigures]) -> int:
    return int(pairs[0].facts["tokens"])
