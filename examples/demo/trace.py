"""Watches Adam and SPD while they train.

    python -m examples.demo.trace --out demo_results

trains as the demo does, and scores the test sets after every few steps. It writes `trace.png` (loss
and accuracy out of distribution), `trace.json`, and from SPD's layer reports on the first training
set `layers.png` (all steps) and `report.png` (the last one).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.progress import Progress

import optax_spd
from examples.demo import assets, data, experiment, training
from examples.demo.experiment import Material, Settings, Workbench
from examples.demo.methods import METHODS
from examples.demo.pictures import on_any_page, percent

COMPARED = ("adam", "spd")


def trace(
    name: str, settings: Settings, material: Material, every: int
) -> tuple[dict[str, Any], dict[int, optax_spd.LayerReport]]:
    """One training run: mean losses between scores, accuracies, and layer reports, by step."""
    losses: list[float] = []
    reports: dict[int, optax_spd.LayerReport] = {}
    found: dict[str, Any] = {"steps": [], "loss": [], "ood": [], "distance": []}

    def watch(step: int, loss: float, params: Any, state: Any) -> None:
        losses.append(loss)
        if step % every and step > 1:
            return
        report = optax_spd.layer_report(params, material.start, state)
        reports[step] = report
        embedded = training.embed_all(params["encoder"], material.tests)
        accuracy = [
            training.accuracy(training.logits(params, embedded[domain]), texts.labels)
            for domain, texts in material.tests.items()
        ]
        for key, value in (
            ("steps", step),
            ("loss", float(np.mean(losses))),
            ("ood", float(np.mean(accuracy))),
            ("distance", report.total),
        ):
            found[key].append(value)
        losses.clear()

    recipe = METHODS[name].optimizer
    assert recipe is not None
    tx = experiment.optimizer(recipe, settings.learning_rate, settings.steps)
    batches = list(data.training_batches(material.texts, settings.steps, material.seed))
    training.fit(material.start, tx, batches, lambda: None, watch=watch)
    return found, reports


def curves(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss and accuracy against steps: thick, the mean of the training sets; thin, each of them."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"loss": "training loss", "ood": "mean accuracy out of distribution"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for name, seeds in runs.items():
            method, steps = METHODS[name], seeds[0]["steps"]
            mean = np.mean([seed[key] for seed in seeds], axis=0)
            for seed in seeds if len(seeds) > 1 else ():
                axes.plot(steps, seed[key], color=method.colour, linewidth=1, alpha=0.4)
            axes.plot(steps, mean, color=method.colour, linewidth=3)
            place = int(np.argmax(mean)) if key == "loss" else -1  # where the lines lie apart
            axes.annotate(
                method.label,
                (steps[place], mean[place]),
                (6, 0),
                textcoords="offset points",
                va="bottom" if key == "loss" else "center",
                fontsize=13,
                color=method.colour,
                annotation_clip=False,
            )
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("step", fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[1].yaxis.set_major_formatter(percent)
    return figure


def kernels(report: optax_spd.LayerReport) -> optax_spd.LayerReport:
    """The report without biases, normalisations and tables; short names fit into a picture."""
    rows = [
        row._replace(name=row.name.removeprefix("encoder/").removesuffix("/kernel"))
        for row in report.rows
        if row.name.endswith("/kernel")
    ]
    return report._replace(rows=tuple(rows))


def layers(reports: dict[int, optax_spd.LayerReport]) -> Figure:
    """The layers' deviations, and how often SPD pulled them back, layer by layer and over time."""
    figure = Figure(figsize=(8, 7), layout=ConstrainedLayoutEngine(wspace=0.1))
    left, right = figure.subplots(1, 2)
    optax_spd.plot_layers(reports, "relative_deviation", ax=left)
    optax_spd.plot_layers(reports, "fired_share", ax=right)
    right.set_yticks([])
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints a line a run, and writes pictures and numbers."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo.trace")
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_results"), help="where the results are written")
    add("--seeds", type=int, default=1, help="number of training sets drawn")
    add("--every", type=int, default=8, help="steps between two scores")
    add("--steps", type=int, default=128)
    add("--evaluation", type=int, default=300, help="snippets scored in each test set")
    options = parser.parse_args(arguments)
    settings = Settings(COMPARED, options.seeds, [512], options.steps, 3e-4, experiment.VALIDATION)
    bench = Workbench.load(assets.cache_directory(), print)
    with Progress(disable=True) as progress:
        held_out = experiment.hold_out(settings, bench, progress)
    held_out.tests.pop(data.IN_DISTRIBUTION)
    for domain, texts in held_out.tests.items():
        held_out.tests[domain] = texts.first(options.evaluation)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in COMPARED}
    watched: dict[str, dict[int, optax_spd.LayerReport]] = {}
    for seed in range(options.seeds):
        material = experiment.prepare(bench, held_out, settings.examples[0], seed)
        for name in COMPARED:
            found, reports = trace(name, settings, material, options.every)
            runs[name].append(found)
            watched.setdefault(name, {step: kernels(report) for step, report in reports.items()})
            print(
                f"{METHODS[name].label}, seed {seed}: loss {found['loss'][-1]:.3f}, mean OOD "
                f"{100 * found['ood'][-1]:.1f} (at best {100 * max(found['ood']):.1f})",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "trace.json").write_text(json.dumps(runs, indent=1))
    last = watched["spd"][max(watched["spd"])]
    report = Figure(figsize=(7, 7), layout="constrained")
    optax_spd.plot_report(last, ax=report.add_subplot())
    pictures = {"trace": curves(runs), "layers": layers(watched["spd"]), "report": report}
    for name, figure in pictures.items():
        on_any_page(figure).savefig(options.out / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
