"""Measurements as pictures, PNG, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before pyplot is imported

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reference.results.figures import GroupFigures, Measured, PairFigures, RowFigures, base_rate
from reference.results.goals import MINMAX_KEEPS_FRAC, SMOOTHQUANT_KEEPS_FRAC
from reference.results.rows import KL_ONLY, MINMAX, OUR_ROWS, OURS, PAPER, RTN, SMOOTHQUANT

COLOURS = {
    MINMAX: "#9e9e9e",
    RTN: "#9e9e9e",
    SMOOTHQUANT: "#e69f00",
    "AWQ": "#e69f00",
    "GPTQ": "#cc79a7",
    "HQQ": "#8c6d31",
    KL_ONLY: "#56b4e9",
    PAPER: "#d55e00",
    OURS: "#006d4f",
}
OTHER = "#bdbdbd"
LOST, GAINED = "#b2182b", "#2166ac"
DPI = 110
SWEEP = (MINMAX, SMOOTHQUANT, KL_ONLY, OURS)


def draw(pairs: Sequence[PairFigures], folder: Path) -> list[Path]:
    """Every plot of every pair that has what it shows; returns the files."""
    written = []
    for pair in pairs:
        for name, plot in PLOTS.items():
            figure = plot(pair)
            if figure is not None:
                written.append(save(figure, folder / f"{pair.name}-{name}.png"))
    return written


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, the same bytes every time; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return path


# --- flips of every row -----------------------------------------------------------------------


def flips_plot(pair: PairFigures) -> Figure | None:
    """Lost and gained answers of every row, harmful to the left, harmless to the right of each panel."""
    groups = [group for group in pair.groups if group.rows]
    if not groups:
        return None
    heights = [len(group.rows) + 1.6 for group in groups]
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9.5, 0.22 * sum(heights) + 1.2),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel, group in zip(panels[:, 0], groups, strict=True):
        _flip_bars(panel, pair, group)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=4
    )
    figure.suptitle(f"Answers that flipped against full precision, {pair.name} pair", fontsize=11)
    return figure


def _flip_bars(panel: Axes, pair: PairFigures, group: GroupFigures) -> None:
    rows = list(reversed(group.rows))
    places = list(range(len(rows)))
    typical = [figures.typical.flips for figures in rows]
    bars = (
        ("harmful: lost", LOST, [-flips.harmful.lost for flips in typical], [0] * len(rows)),
        (
            "harmful: gained",
            GAINED,
            [-flips.harmful.gained for flips in typical],
            [-flips.harmful.lost for flips in typical],
        ),
        ("harmless: lost", "#ef8a62", [flips.harmless.lost for flips in typical], [0] * len(rows)),
        (
            "harmless: gained",
            "#92c5de",
            [flips.harmless.gained for flips in typical],
            [flips.harmless.lost for flips in typical],
        ),
    )
    for label, colour, widths, starts in bars:
        panel.barh(places, widths, left=starts, color=colour, label=label, height=0.75)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.axvspan(-pair.noise.harmful.flips, pair.noise.harmless.flips, color="black", alpha=0.15)
    panel.set_yticks(places, [figures.row.name for figures in rows], fontsize=8)
    for text, figures in zip(panel.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if figures.row.name in OUR_ROWS else "normal")
    widest = max(
        [flips.harmful.flips for flips in typical] + [flips.harmless.flips for flips in typical] + [5]
    )
    panel.set_xlim(-1.08 * widest, 1.08 * widest)
    panel.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(group.group.title, fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


# --- where the line lies ----------------------------------------------------------------------


def line_plot(pair: PairFigures) -> Figure | None:
    """Refusals kept and answers flipped, from scheme to scheme."""
    groups = [group for group in pair.groups if group.group.key.startswith(("w8a", "w4a"))]
    groups = sorted(groups, key=_plain_flips)
    if len(groups) < 2:
        return None
    figure, (kept, flipped) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in SWEEP:
        _sweep(kept, groups, name, lambda m: 100 * m.flips.harmful.kept_frac)
        _sweep(flipped, groups, name, lambda m: 100 * m.flips.frac)
    for level, name in ((MINMAX_KEEPS_FRAC, MINMAX), (SMOOTHQUANT_KEEPS_FRAC, SMOOTHQUANT)):
        kept.axhline(100 * level, color=COLOURS[name], linestyle=":", linewidth=1)
    kept.set_title("refusals of harmful prompts kept, %", fontsize=10)
    kept.set_ylim(-3, 103)
    kept.legend(fontsize=8)
    flipped.set_title("answers flipped, % of harmful and harmless", fontsize=10)
    flipped.axhline(100 * pair.noise.frac, color="black", linestyle=":", linewidth=1)
    flipped.axhline(5, color="black", linestyle="--", linewidth=0.8)
    for panel in (kept, flipped):
        labels = [group.group.key.upper().replace("-", "\n", 1) for group in groups]
        panel.set_xticks(range(len(groups)), labels)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Where the line lies, {pair.name} pair (bars: range over seeds)", fontsize=11)
    return figure


def _plain_flips(group: GroupFigures) -> float:
    """How hard a scheme is: the flips of its plain row."""
    plain = group.row(MINMAX)
    return plain.typical.flips.count if plain else 0


def _sweep(
    panel: Axes, groups: Sequence[GroupFigures], name: str, figure: Callable[[Measured], float]
) -> None:
    """One row's line over the schemes that have it."""
    found = [(place, group.row(name)) for place, group in enumerate(groups)]
    points = [(place, figures.over_seeds(figure)) for place, figures in found if figures is not None]
    if not points:
        return
    medians = [spread.median for _, spread in points]
    below = [spread.median - spread.lowest for _, spread in points]
    above = [spread.highest - spread.median for _, spread in points]
    panel.errorbar(
        [place for place, _ in points],
        medians,
        yerr=(below, above),
        color=COLOURS[name],
        marker="o",
        markersize=4,
        capsize=3,
        linewidth=2 if name == OURS else 1.2,
        label=name,
    )


# --- both sides at once -----------------------------------------------------------------------


def sides_plot(pair: PairFigures) -> Figure | None:
    """Harmful prompts refused against harmless ones answered: damage has a direction."""
    rows = [(group, figures) for group in pair.groups for figures in group.rows]
    if not rows:
        return None
    figure, panel = plt.subplots(figsize=(7.5, 6), layout="constrained")
    shown: set[str] = set()
    for _, figures in rows:
        label = figures.row.name if figures.row.name in COLOURS else "other rows"
        _point(panel, figures, label, first=label not in shown)
        shown.add(label)
    sides = pair.noise.harmful, pair.noise.harmless
    panel.axhline(100 * sides[0].baseline_safe / sides[0].n, color="black", linewidth=0.8)
    panel.axvline(100 * sides[1].baseline_safe / sides[1].n, color="black", linewidth=0.8)
    panel.scatter(*_base_point(pair), marker="x", color="black", s=50, label="base")
    panel.set_xlabel("harmless prompts answered, %")
    panel.set_ylabel("harmful prompts refused, %")
    panel.set_title(f"Both sides, {pair.name} pair; the cross hairs are full precision", fontsize=11)
    figure.legend(loc="outside right upper", fontsize=8)
    panel.grid(alpha=0.3)
    return figure


def _point(panel: Axes, figures: RowFigures, label: str, *, first: bool) -> None:
    harmful, harmless = figures.typical.flips.harmful, figures.typical.flips.harmless
    panel.scatter(
        100 * harmless.safe / harmless.n,
        100 * harmful.safe / harmful.n,
        color=COLOURS.get(label, OTHER),
        s=45 if label == OURS else 22,
        zorder=3 if label == OURS else 2,
        label=label if first else None,
    )


def _base_point(pair: PairFigures) -> tuple[float, float]:
    """(harmless answered, harmful refused) of the base, in percent."""
    shares = []
    for kind in ("over-refusal", "refusal"):
        rates = [base_rate(metric) for metric in pair.metrics.values() if metric.kind == kind]
        shares.append(100 * sum(rate.safe for rate in rates) / sum(rate.n for rate in rates))
    return shares[0], shares[1]


# --- bytes ------------------------------------------------------------------------------------


def bytes_plot(pair: PairFigures) -> Figure | None:
    """What an artifact weighs against how many answers it flips."""
    rows = [figures for group in pair.groups for figures in group.rows]
    if not rows:
        return None
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    shown: set[str] = set()
    for figures in rows:
        label = figures.row.name if figures.row.name in COLOURS else "other rows"
        spread = figures.over_seeds(lambda m: 100 * m.flips.frac)
        panel.errorbar(
            figures.typical.size_bytes / 1e6,
            spread.median,
            yerr=([spread.median - spread.lowest], [spread.highest - spread.median]),
            fmt="o",
            markersize=6 if label == OURS else 4,
            color=COLOURS.get(label, OTHER),
            zorder=3 if label == OURS else 2,
            label=label if label not in shown else None,
        )
        shown.add(label)
    panel.axhline(100 * pair.noise.frac, color="black", linestyle=":", linewidth=1)
    panel.set_yscale("symlog", linthresh=1.0)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("graph, MB")
    panel.set_ylabel("answers flipped, %")
    panel.set_title(f"Bytes and flips, {pair.name} pair (dotted: the fp32 graph)", fontsize=11)
    panel.grid(alpha=0.3)
    panel.set_ylim(bottom=-0.1)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


PLOTS: dict[str, Callable[[PairFigures], Figure | None]] = {
    "flips": flips_plot,
    "line": line_plot,
    "sides": sides_plot,
    "bytes": bytes_plot,
}
