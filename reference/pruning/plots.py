"""Measurements as pictures, PNG, in the style of `reference.results.plots`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from reference.pruning.device import DENSE, PATTERN, STRUCTURED, ZEROS, DeviceFigures
from reference.pruning.figures import Figure, GroupFigures, PairFigures, RowFigures
from reference.pruning.rows import OURS, SCORES
from reference.pruning.tables import DEVICE_SHARES
from reference.results.plots import save

Line = Literal["-", "--"]
COLOURS = {
    "magnitude": "#9e9e9e",
    "wanda": "#e69f00",
    "sparsegpt": "#cc79a7",
    "snip": "#8c6d31",
    "combined": "#d55e00",
    "set-difference": "#56b4e9",
}
OUR_COLOUR = "#006d4f"
KINDS = {ZEROS: ("#e69f00", "o"), PATTERN: ("#cc79a7", "s"), STRUCTURED: ("#006d4f", "D")}
FORMS: dict[str, Line] = {"fp32": "-", "W8A8": "--"}


def colour(score: str) -> str:
    return OUR_COLOUR if score == OURS else COLOURS.get(score, "#bdbdbd")


def draw(pairs: Sequence[PairFigures], folder: Path) -> list[Path]:
    """Every plot of every pair that has what it shows; returns the files."""
    drawn = [
        (folder / f"{pair.name}-pruning-{name}.png", figure)
        for pair in pairs
        for name, plot in PLOTS.items()
        if (figure := plot(pair)) is not None
    ]
    return [save(figure, path) for path, figure in drawn]


# --- against sparsity -------------------------------------------------------------------------


def flips_plot(pair: PairFigures) -> Drawing | None:
    """Answers that flip, score by score."""

    def flipped(panel: Axes) -> None:
        _curves(panel, pair, lambda m: 100 * m.flips.frac, 100 * pair.unpruned.flips.frac)
        panel.set_title("answers flipped, % of harmful and harmless", fontsize=10)
        panel.set_ylim(bottom=0)

    return _against_sparsity(pair, "Flips against the unpruned model", [flipped])


def rates_plot(pair: PairFigures) -> Drawing | None:
    """Both rates: damage has a direction."""
    before = pair.unpruned

    def refused(panel: Axes) -> None:
        _curves(panel, pair, lambda m: 100 * m.judged.refused_frac, 100 * before.refused_frac)
        panel.set_title("harmful prompts refused, %", fontsize=10)

    def over_refused(panel: Axes) -> None:
        _curves(panel, pair, lambda m: 100 * m.judged.over_refused_frac, 100 * before.over_refused_frac)
        panel.set_title("harmless prompts not answered, %", fontsize=10)

    return _against_sparsity(pair, "Refusal and over-refusal", [refused, over_refused])


def perplexity_plot(pair: PairFigures) -> Drawing | None:
    """Perplexity, score by score."""

    def surprise(panel: Axes) -> None:
        _curves(panel, pair, lambda m: m.perplexity, pair.perplexity)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        panel.tick_params(axis="y", which="both", labelsize=8)
        panel.set_title("perplexity on the unpruned model's answers", fontsize=10)

    return _against_sparsity(pair, "Perplexity", [surprise])


def _against_sparsity(
    pair: PairFigures, title: str, panels: Sequence[Callable[[Axes], None]]
) -> Drawing | None:
    """A figure of panels over sparsity; None where fewer than two sparsities were measured."""
    groups = _groups(pair)
    if len({figures.row.sparsity_frac for group in groups for figures in group.rows}) < 2:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.8 + 5.2 * len(panels), 4.6), squeeze=False, layout="constrained"
    )
    for panel, fill in zip(axes[0], panels, strict=True):
        fill(panel)
        panel.set_xlabel("weights set to zero, %")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=_legend(groups), loc="outside right center", fontsize=8)
    figure.suptitle(f"{title}, {pair.name} pair (bars: range over seeds)", fontsize=11)
    return figure


def _groups(pair: PairFigures) -> list[GroupFigures]:
    return [group for key in STYLES if (group := pair.group(key)) is not None]


STYLES: dict[str, tuple[Line, str, float]] = {
    "unstructured": ("-", "o", 1.0),
    "recovered": ("--", "^", 0.8),
}
"""Group -> line, marker and opacity."""


def _curves(panel: Axes, pair: PairFigures, figure: Figure, unpruned: float) -> None:
    """A line a score and group; dotted: the unpruned model."""
    panel.axhline(unpruned, color="black", linestyle=":", linewidth=1)
    for group in _groups(pair):
        for score in SCORES:
            rows = [figures for figures in group.rows if figures.row.kind == score.name]
            if rows:
                _curve(panel, rows, figure, score.name, group.group.key, unpruned)


def _curve(
    panel: Axes, rows: Sequence[RowFigures], figure: Figure, score: str, key: str, unpruned: float
) -> None:
    """A score's line, from the unpruned model on where nothing was recovered; bars where it has seeds."""
    line, marker, alpha = STYLES[key]
    spreads = [figures.over_seeds(figure) for figures in rows]
    places = [100 * figures.row.sparsity_frac + _aside(score) for figures in rows]
    starts = ([0.0], [unpruned]) if key == "unstructured" else ([], [])
    width, order = (2.0, 3) if score == OURS else (1.2, 2)
    panel.plot(
        [*starts[0], *places],
        [*starts[1], *(spread.median for spread in spreads)],
        color=colour(score),
        linestyle=line,
        marker=marker,
        markersize=4,
        alpha=alpha,
        linewidth=width,
        zorder=order,
    )
    for place, spread in zip(places, spreads, strict=True):
        if not spread.single:
            ends = ([spread.median - spread.lowest], [spread.highest - spread.median])
            panel.errorbar(
                [place], [spread.median], yerr=ends, color=colour(score), capsize=3, zorder=order
            )


def _aside(score: str) -> float:
    """Points of sparsity that a score is moved aside, so that bars at one sparsity can be told apart."""
    names = [one.name for one in SCORES]
    return 0.4 * (names.index(score) - (len(names) - 1) / 2)


def _legend(groups: Sequence[GroupFigures]) -> list[Line2D]:
    """Scores by colour, then recovery by line."""
    there = {figures.row.kind for group in groups for figures in group.rows}
    scores = [
        Line2D(
            [], [], color=colour(score.name), linewidth=2 if score.name == OURS else 1.2, label=score.name
        )
        for score in SCORES
        if score.name in there
    ]
    labels = {"unstructured": "as pruned", "recovered": "recovered"}
    lines = [
        Line2D(
            [],
            [],
            color="black",
            linestyle=STYLES[key][0],
            marker=STYLES[key][1],
            markersize=4,
            label=label,
        )
        for key, label in labels.items()
        if any(group.group.key == key for group in groups)
    ]
    return [*scores, *lines, Line2D([], [], color="black", linestyle=":", label="unpruned")]


# --- on a device ------------------------------------------------------------------------------


def device_plot(pair: PairFigures) -> Drawing | None:
    """Bytes and decode time: zeros against structures that are gone."""
    if not pair.device:
        return None
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    for panel, (title, share) in zip(panels, DEVICE_SHARES.items(), strict=True):
        for form in dict.fromkeys(graph.form for graph in pair.device):
            for kind in KINDS:
                _shares(panel, pair, form, kind, share)
        panel.axhline(100, color="black", linestyle=":", linewidth=1)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("blocks' weights that are zero or gone, %")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"Pruned graphs, % of the unpruned one of their form, {pair.name} pair", fontsize=11)
    return figure


def _shares(
    panel: Axes,
    pair: PairFigures,
    form: str,
    kind: str,
    share: Callable[[DeviceFigures, DeviceFigures], float],
) -> None:
    """One kind of graph in one form, from the unpruned graph on."""
    dense = next(graph for graph in pair.device if (graph.kind, graph.form) == (DENSE, form))
    graphs = [graph for graph in pair.device if (graph.kind, graph.form) == (kind, form)]
    starts = [] if kind == PATTERN else [dense]
    tint, marker = KINDS[kind]
    panel.plot(
        [100 * graph.sparsity_frac for graph in (*starts, *graphs)],
        [100 * share(graph, dense) for graph in (*starts, *graphs)],
        color=tint,
        marker=marker,
        markersize=5,
        linestyle=FORMS[form],
        fillstyle="full" if form == "fp32" else "none",
        label=f"{kind}, {form}",
    )


PLOTS: dict[str, Callable[[PairFigures], Drawing | None]] = {
    "flips": flips_plot,
    "rates": rates_plot,
    "perplexity": perplexity_plot,
    "device": device_plot,
}
