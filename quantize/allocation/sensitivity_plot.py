"""Sensitivity by layer as a picture; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from holdfast.files import disk_errors
from holdfast.quantize.allocation.sensitivity import Sensitivity
from holdfast.quantize.allocation.units import Unit

AIMS = {"safety": "Safety: harmful prompts", "utility": "Utility: harmless prompts"}
COLOURS = {"weights": "#2a6f97", "activations": "#e07a3f"}
PANEL_INCHES = (4.6, 2.3)


def layers_of(units: Sequence[Unit]) -> dict[str, list[str]]:
    """Layer's label -> names of its units, in order; outside of the blocks a unit is a layer of its own."""
    layers: dict[str, list[str]] = {}
    for unit in units:
        label = unit.name.rpartition(".")[2] if unit.block is None else str(unit.block)
        layers.setdefault(label, []).append(unit.name)
    return layers


def by_layer(
    units: Sequence[Unit], found: Sequence[Sensitivity], scheme: str, aim: str, part: str
) -> dict[str, float]:
    """Layer's label -> nats, summed over its units."""
    known = {entry.unit: entry for entry in found if entry.scheme == scheme}
    return {
        label: sum(getattr(getattr(known[name], aim), part) for name in names)
        for label, names in layers_of(units).items()
    }


def plot_sensitivity(units: Sequence[Unit], found: Sequence[Sensitivity], path: Path) -> None:
    """One panel for each scheme and aim: nats by layer on a logarithmic axis, weights beside activations.

    Arguments:
        path: .png, .svg or .pdf.
    """
    schemes = list(dict.fromkeys(entry.scheme for entry in found))
    size = (2 * PANEL_INCHES[0], PANEL_INCHES[1] * len(schemes) + 0.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(schemes), 2, sharex=True, sharey=True, squeeze=False)
    for row, scheme in zip(axes, schemes, strict=True):
        for axis, aim in zip(row, AIMS, strict=True):
            _panel(axis, units, found, scheme, aim)
        row[0].set_ylabel(f"{scheme}\nKL, nats")
    for axis, title in zip(axes[0], AIMS.values(), strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    with disk_errors(path):
        figure.savefig(path)


def _panel(axis: Any, units: Sequence[Unit], found: Sequence[Sensitivity], scheme: str, aim: str) -> None:
    width = 0.4
    for offset, (part, colour) in zip((-width / 2, width / 2), COLOURS.items(), strict=True):
        values = by_layer(units, found, scheme, aim, part)
        places = [index + offset for index in range(len(values))]
        axis.bar(places, list(values.values()), width, color=colour, label=part)
    labels = list(layers_of(units))
    ticks = [*range(0, len(labels) - 1, max(1, len(labels) // 16)), len(labels) - 1]
    axis.set_xticks(ticks, [labels[tick] for tick in ticks], fontsize=8)
    axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
