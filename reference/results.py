"""Measures docs/results.md: the reference pair through every scheme and backend, intact and damaged.

    python -m reference.results --data-dir ../shared/data --out docs/results.md

Each row is a whole `holdfast run` with its own bundle; all of them share one work folder, so that the
baseline, the fp32 graph and equal calibrations are made once. Tables hold what the reports hold.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from holdfast.bundle import open_bundle
from holdfast.files import write_text
from holdfast.manifest import StepEntry
from holdfast.pipeline import run
from holdfast.progress import say
from holdfast.recipe import CalibrateConfig, QuantizeConfig, make_recipe
from holdfast.verification import verify_bundle
from reference.damage import damage_bundle

ROOT = Path(__file__).resolve().parent
PLAIN = {"start": "minmax", "smooth_frac": 0.0, "steps": 0}
"""Calibration settings of a quantizer that knows nothing of alignment: min-max ranges, nothing learned."""


@dataclass(frozen=True)
class Variant:
    """One row: a name and the recipe sections that differ from the default."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict)


MAIN = (
    Variant("W8A8 static, ORT", {"quantize": {"scheme": "w8a8"}}),
    Variant("W8A8 static, INC", {"quantize": {"scheme": "w8a8", "backend": "inc"}}),
    Variant("W4 block 32, ORT", {"quantize": {"scheme": "w4"}}),
    Variant("W4 block 32, INC", {"quantize": {"scheme": "w4", "backend": "inc"}}),
    Variant("Wanda 20 % + W8A8, ORT", {"prune": {"method": "wanda", "sparsity_frac": 0.2}}),
)


def _activations(bits: int) -> tuple[Variant, ...]:
    quantize = {"scheme": "w8a8", "activation_bits": bits}
    return (
        Variant(f"W8A{bits}, min-max", {"quantize": quantize, "calibrate": PLAIN}),
        Variant(f"W8A{bits}, SmoothQuant", {"quantize": quantize, "calibrate": {"steps": 0}}),
        Variant(f"W8A{bits}, KL only", {"quantize": quantize, "calibrate": {"loss": "kl"}}),
        Variant(f"W8A{bits}, contrastive", {"quantize": quantize}),
    )


def _pruned(method: str, sparsity: float) -> Variant:
    prune = {"method": method, "sparsity_frac": sparsity}
    return Variant(f"{method} {sparsity:.0%}", {"prune": prune, "quantize": {"scheme": "none"}})


DAMAGED = (
    *_activations(6),
    *_activations(4),
    *_activations(3),
    *(_pruned(method, sparsity) for method in ("magnitude", "wanda") for sparsity in (0.5, 0.7)),
)

COLUMNS = {
    "refusal:refusal": "harmful refused",
    "refusal:harmbench": "HarmBench refused",
    "refusal:xstest-unsafe": "XSTest-unsafe refused",
    "over-refusal:over-refusal": "harmless answered",
    "over-refusal:xstest-safe": "XSTest-safe answered",
    "preference:constitution": "constitution preferred",
    "coherence": "coherent",
}
"""Gated metric -> column."""


@dataclass(frozen=True)
class Row:
    """What one run said."""

    name: str
    report: dict[str, Any]
    steps: dict[str, StepEntry]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        return {metric["metric"]: metric for metric in self.report["verdict"]["metrics"]}

    @property
    def alpha(self) -> str:
        """The push weight that calibration chose; a dash where nothing was learned."""
        learned = self.steps["calibrate"].result if self.steps else {}
        return f"{learned['alpha']:g}" if learned.get("steps") else "-"


def slug(name: str) -> str:
    """A name as a folder name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def measure(variant: Variant, data_dir: Path, folder: Path) -> Row:
    """Run one variant and read its bundle."""
    say(f"== {variant.name}")
    out = folder / slug(variant.name)
    data = copy.deepcopy(variant.recipe) | {
        "model": str(ROOT / "aligned"),
        "base": str(ROOT / "base"),
        "export": {"target": "portable"},  # the plain graph: what is measured here are schemes, not graphs
        "evaluate": {
            "suites": [
                {"name": "refusal"},
                {"name": "over-refusal"},
                {"name": "constitution"},
                {"name": "xstest", "path": str(data_dir / "xstest_prompts.csv")},
                {"name": "harmbench", "path": str(data_dir / "harmbench_text.csv")},
            ]
        },
    }
    run(make_recipe(data, {}, what=variant.name), out, work=folder / "work", overwrite=True)
    bundle = open_bundle(out)
    return Row(variant.name, bundle.report(), {step.name: step for step in bundle.manifest.steps})


def damaged_row(source: Path, folder: Path, bits: int) -> Row:
    """A good bundle with its weights rounded to `bits` bits, verified like any other."""
    out = folder / f"damaged-{bits}"
    shutil.rmtree(out, ignore_errors=True)
    damage_bundle(source, out, bits=bits)
    return Row(f"W8A8 static, ORT, weights rounded to {bits} bits", verify_bundle(out).report, {})


# --- tables -----------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(rate: dict[str, Any]) -> str:
    """A rate with its 95 % interval."""
    return f"{100 * rate['frac']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def rates_table(rows: Sequence[Row]) -> str:
    """Rates of the aligned model, the base, the fp32 graph and every variant."""
    first = rows[0].metrics
    header = ["", *(f"{name} (n {first[key]['n']})" for key, name in COLUMNS.items())]
    lines = [
        [label, *(percent(first[key][field]) for key in COLUMNS)]
        for label, field in (("aligned, torch fp32", "baseline"), ("fp32 ONNX", "noise_rate"))
    ]
    base = [percent(first[key]["twin"]) if first[key]["twin"] else "-" for key in COLUMNS]
    lines.insert(1, ["base, torch fp32", *base])
    lines += [[row.name, *(percent(row.metrics[key]["candidate"]) for key in COLUMNS)] for row in rows]
    return table(header, lines)


def flips_table(rows: Sequence[Row]) -> str:
    """Answers that flipped against the aligned model, lost/gained, and the verdict."""
    keys = [key for key in COLUMNS if key != "coherence"]
    header = ["lost / gained", *(COLUMNS[key] for key in keys), "all", "alpha", "verdict"]
    lines = []
    for row in rows:
        flips = [row.metrics[key]["paired"] for key in keys]
        total = f"{sum(f['lost'] for f in flips)} / {sum(f['gained'] for f in flips)}"
        cells = [f"{f['lost']} / {f['gained']}" for f in flips]
        lines.append([row.name, *cells, total, row.alpha, row.report["verdict"]["outcome"]])
    return table(header, lines)


def artifact_table(rows: Sequence[Row]) -> str:
    """Bytes, the chosen alpha, and how far the artifact is from its simulation."""
    header = ["", "graph bytes", "of fp32", "alpha", "largest logit difference", "positions within"]
    header += ["same next token", "positions"]
    lines = []
    for row in rows:
        step, learned = row.steps["quantize"].result, row.steps["calibrate"].result
        ratio = step["bytes_after"] / row.steps["reference-export"].result["graph_bytes"]
        agreement = (
            [
                f"{step['simulation_max_abs']:.1e}",
                f"{100 * step['simulation_within_frac']:.2f} %",
                f"{100 * step['simulation_same_top_frac']:.2f} %",
                str(step["simulation_positions"]),
            ]
            if "simulation_max_abs" in step
            else ["-"] * 4
        )
        chosen = f"{learned['alpha']} ({learned['steps']} steps)"
        lines.append([row.name, f"{step['bytes_after']:,}", f"{100 * ratio:.0f} %", chosen, *agreement])
    return table(header, lines)


PAGE = """# Results on the reference pair

Printed by `make results` (`python -m reference.results`). Every row is a whole run with its own bundle;
rates are in percent with Wilson's 95 % interval, judged by the same rules on the same prompts, greedy,
{tokens} tokens. One pair, one seed: a direction, not a law. XSTest and HarmBench (`standard`) were never
trained or calibrated on. The graph is the plain one (`--target portable`) in every row.

## XSTest and HarmBench: reference, base, fp32 ONNX, quantized ONNX

{main_rates}

Flips against the aligned model in torch, prompt by prompt, and the gate's verdict over all these suites
(margin {margin} points, every metric must pass):

{main_flips}

## The artifact is what was simulated

Logits of the torch simulation against those of the artifact, on calibration prompts, at every position.
At {agreement} % of the positions every logit has to be within {atol}, and at {agreement} % the next token
has to be the same; otherwise the run stops. Most positions are equal to the bit; a value on a rounding tie
can get the neighbouring code on one side.

{artifacts}

## What damages this pair, and what repairs it

"min-max" knows nothing of alignment: ranges are the extremes seen, nothing is learned. "SmoothQuant" is
where learning starts. "contrastive" is the default: the bounded loss, with its alpha chosen among {alphas}
on held-out prompts; alpha 0 makes it equal to "KL only". Below 8 bits the graph clips in front of an 8-bit
QuantizeLinear.

{damaged_rates}

{damaged_flips}
"""


def page(main_rows: Sequence[Row], damaged_rows: Sequence[Row]) -> str:
    """docs/results.md."""
    defaults = QuantizeConfig()
    report = main_rows[0].report
    runs = [row for row in main_rows if row.steps]
    return PAGE.format(
        tokens=report["conditions"]["max_new_tokens"],
        main_rates=rates_table(main_rows),
        margin=f"{100 * report['verdict']['margin_frac']:g}",
        main_flips=flips_table(main_rows),
        atol=defaults.atol,
        agreement=f"{100 * defaults.agreement_frac:g}",
        artifacts=artifact_table(runs),
        alphas=", ".join(f"{alpha:g}" for alpha in CalibrateConfig().alphas),
        damaged_rates=rates_table(damaged_rows),
        damaged_flips=flips_table(damaged_rows),
    )


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The page to write.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep bundles and steps here.")
def main(data_dir: Path, out: Path, work: Path | None) -> None:
    """Run every variant and write the page."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        main_rows = [measure(variant, data_dir, folder) for variant in MAIN]
        main_rows.append(damaged_row(folder / slug(MAIN[0].name), folder, bits=2))
        damaged_rows = [measure(variant, data_dir, folder) for variant in DAMAGED]
        text = page(main_rows, damaged_rows)
    write_text(out, text)
    click.echo(text)


if __name__ == "__main__":
    main()
