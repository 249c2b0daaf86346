"""The demo: find the neurons of the small model that ships, steer it, and compare, through lm-eval's own evaluator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lm_eval_steering import resources
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.demo import picture, tables
from lm_eval_steering.demo.figures import FACTORS, Figures
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.languages import choose
from lm_eval_steering.lmeval.compat import be_quiet, describe_machine_once
from lm_eval_steering.lmeval.registration import register_all
from lm_eval_steering.lmeval.task_families.demo import demo_languages
from lm_eval_steering.neurons.find import Method, control_sets, find_neurons
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.neurons.recorder import Recorder, Search
from lm_eval_steering.neurons.recording import RecordingFolder
from lm_eval_steering.neurons.runner import ModelRunner

LANGUAGES = ("deu_Latn", "spa_Latn", "tur_Latn", "jpn_Jpan")
STEERING = {"op": "add", "value": "mean", "site": "product"}  # what steers the demo model best
RATE = 0.05
DEACTIVATION_CONTROLS = 3  # matched random sets that are deactivated too


class Evaluator:
    """lm-eval's `simple_evaluate` on one loaded model, whose result files are kept."""

    def __init__(self, lm: Any, out: Path, progress: Progress, total: int) -> None:
        self.lm, self.out, self.progress = lm, out, progress
        self.task = progress.add_task("evaluating", total=total)

    def __call__(
        self, name: str, target: str, tasks: Sequence[str], neuron_set: NeuronSet | None = None, **intervention: Any
    ) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
        """(task -> metric -> value, task -> samples) of one intervention; nothing given is the unsteered model."""
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager

        self.progress.update(self.task, description=name)
        self.lm.intervene(neuron_set, target_language=target, **intervention)
        folder = str(resources.tasks_folder() / "demo")  # an index of all tasks takes a second each time
        manager = TaskManager(include_defaults=False, include_path=folder, metadata={"target_language": target})
        results = simple_evaluate(
            model=self.lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        samples = results.pop("samples")
        tracker = EvaluationTracker(output_path=str(self.out / name))
        tracker.general_config_tracker.model_name_sanitized = "demo"
        tracker.save_results_aggregated(results, samples)
        for task in tasks:
            tracker.save_results_samples(task, samples[task])
        self.progress.advance(self.task)
        cleaned = {
            task: {key.removesuffix(",none"): value for key, value in metrics.items()}
            for task, metrics in results["results"].items()
        }
        return cleaned, samples


def steered_languages(text: str | None) -> tuple[str, ...]:
    """Codes from `all`, a list joined by commas, or the default four.

    Raises:
        SteeringError: for an unknown code, or fewer than two.
    """
    available = demo_languages()
    if text in (None, "all"):
        return LANGUAGES if text is None else available
    chosen = tuple(dict.fromkeys(choose(code, available, "the demo") for code in str(text).split(",")))
    if len(chosen) < 2:
        raise SteeringError("the demo compares languages: name at least two")
    return chosen


def run_demo(out: Path, languages: Sequence[str] = LANGUAGES, controls: int = 3) -> Figures:
    """Find, steer, compare, print, draw; everything lands in `out`.

    Args:
        out: folder for the neuron set, lm-eval's result files, `figures.json`, `tables.txt` and `demo.png`.
        languages: the demo's languages to steer and to evaluate, at least two.
        controls: number of matched random sets.
    """
    console = Console(record=True)
    be_quiet()
    register_all()
    describe_machine_once()
    out.mkdir(parents=True, exist_ok=True)
    lm, neuron_set, randoms = _prepare(console, out, controls)
    figures = Figures(tuple(languages))
    figures.neurons = {code: len(neuron_set.neurons(code)) for code in languages}
    total = 1 + len(languages) * (4 + len(FACTORS) + controls + min(controls, DEACTIVATION_CONTROLS) - 1)
    with _progress(console) as progress:
        measure(Evaluator(lm, out / "lm_eval", progress, total), figures, neuron_set, randoms)
    (out / "figures.json").write_text(json.dumps(asdict(figures), indent=1, ensure_ascii=False) + "\n")
    picture.draw(figures, out / "demo.png")
    console.export_text()  # what was printed so far is not part of the tables
    tables.show(figures, console)
    (out / "tables.txt").write_text(console.export_text(), encoding="utf-8")
    console.print(f"\nresults, samples and the picture are in {out}/ (demo.png, tables.txt, figures.json, lm_eval/)")
    return figures


def _prepare(console: Console, out: Path, controls: int) -> tuple[Any, NeuronSet, list[NeuronSet]]:
    from lm_eval_steering.lmeval.model import SteeredHFLM

    lm = SteeredHFLM(str(resources.demo_model()), batch_size=32)
    for method in ("loglikelihood", "generate_until"):  # one bar of our own instead of dozens of lm-eval's
        setattr(lm, method, partial(getattr(lm, method), disable_tqdm=True))
    console.print("finding the language neurons of the demo model (record, select, calibrate) ...")
    with TemporaryDirectory() as recording:
        search = Search(str(resources.demo_calibration()), demo_languages(), rows="sentences")
        runner = ModelRunner(LazyModel.of(lm.model, lm.tokenizer), batch_size=32)
        recorder = Recorder(runner, search, RecordingFolder(recording))
        (neuron_set,) = find_neurons(recorder, Method(rates=(RATE,)))
        neuron_set.save(out / "neurons.safetensors")
        randoms = control_sets(neuron_set, recorder, range(controls))
    sizes = " ".join(f"{code}:{len(neuron_set.neurons(code))}" for code in neuron_set.languages)
    console.print(f"{len(neuron_set.union())} neurons  {sizes}", soft_wrap=True)
    return lm, neuron_set, randoms


def measure(evaluate: Evaluator, figures: Figures, neuron_set: NeuronSet, randoms: Sequence[NeuronSet]) -> None:
    """Fill in all figures: baseline, deactivation, five factors, and the chosen one against matched random sets."""
    nats_tasks = [f"steering_demo_perplexity_{code}" for code in figures.languages]
    results, _ = evaluate("baseline", figures.languages[0], nats_tasks)
    figures.baseline_nats = _nats(results)
    for code in figures.languages:
        results, _ = evaluate(f"{code}-deactivated", code, nats_tasks, neuron_set, deactivate=code)
        figures.deactivated_nats[code] = _nats(results)
        figures.deactivated_control_nats[code] = [
            _nats(evaluate(f"{code}-deactivated-random{i}", code, nats_tasks, randoms[i], deactivate=code)[0])
            for i in range(min(len(randoms), DEACTIVATION_CONTROLS))
        ]
        _choose(evaluate, figures, code, neuron_set, nats_tasks)
        _report(evaluate, figures, code, neuron_set, randoms)


def _choose(evaluate: Evaluator, figures: Figures, code: str, neuron_set: NeuronSet, nats_tasks: list[str]) -> None:
    """Every factor, and the one with the largest share of outputs in the language (the smallest of equals)."""
    figures.lfs_choose[code], figures.amplified_nats[code] = {}, {}
    for factor in figures.factors:
        tasks = ["steering_demo_forcing_choose", *nats_tasks]
        results, _ = evaluate(f"{code}-x{factor:g}", code, tasks, neuron_set, language=code, factor=factor, **STEERING)
        figures.lfs_choose[code][factor] = results["steering_demo_forcing_choose"]["lfs"]
        figures.amplified_nats[code][factor] = _nats(results)
    figures.chosen[code] = max(figures.factors, key=lambda factor: (figures.lfs_choose[code][factor], -factor))


def _report(
    evaluate: Evaluator, figures: Figures, code: str, neuron_set: NeuronSet, randoms: Sequence[NeuronSet]
) -> None:
    """The chosen factor on other prompts, beside the unsteered model and matched random sets."""
    generation = ["steering_demo_forcing", "steering_demo_open"]
    bases = [base for base in figures.languages if base != code]
    tasks = [*generation, *(f"steering_demo_lss_{base}" for base in bases)]
    arguments = {"language": code, "factor": figures.chosen[code], **STEERING}
    before, samples_before = evaluate(f"{code}-baseline", code, generation)
    after, samples_after = evaluate(f"{code}-chosen", code, tasks, neuron_set, **arguments)
    figures.lfs[code] = _both(before, after, "steering_demo_forcing")
    figures.lfs_open[code] = _both(before, after, "steering_demo_open")
    figures.lss[code] = {base: after[f"steering_demo_lss_{base}"]["lss"] for base in bases}
    figures.outputs[code] = _example(samples_before, samples_after)
    controls = [
        evaluate(f"{code}-chosen-random{i}", code, tasks, control, **arguments)[0] for i, control in enumerate(randoms)
    ]
    figures.lfs_control[code] = [result["steering_demo_forcing"]["lfs"] for result in controls]
    figures.lfs_open_control[code] = [result["steering_demo_open"]["lfs"] for result in controls]
    figures.lss_control[code] = {
        base: [result[f"steering_demo_lss_{base}"]["lss"] for result in controls] for base in bases
    }


def _both(before: Mapping[str, Any], after: Mapping[str, Any], task: str) -> dict[str, float]:
    return {"baseline": before[task]["lfs"], "steered": after[task]["lfs"]}


def _nats(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    prefix = "steering_demo_perplexity_"
    return {
        task.removeprefix(prefix): metrics["nats_per_token"]
        for task, metrics in results.items()
        if task.startswith(prefix)
    }


def _example(before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> tuple[str, str, str]:
    """The first prompt in a spaced Latin language, what the model said to it, and what it says steered."""
    task = "steering_demo_forcing"
    place = next((i for i, s in enumerate(before[task]) if s["doc"]["language"].endswith("_Latn")), 0)
    answers = [str(samples[task][place]["filtered_resps"][0]).strip() for samples in (before, after)]
    return str(before[task][place]["doc"]["prompt"]), answers[0], answers[1]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
