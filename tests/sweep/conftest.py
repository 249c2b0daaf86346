"""A small plan on the demo model with tasks of seven items, one uninterrupted run of it, and processes to kill."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.resources import tasks_folder
from lm_eval_steering.sweep.cells import Grid, spell_out
from lm_eval_steering.sweep.estimate import CellLog
from lm_eval_steering.sweep.merge import merge
from lm_eval_steering.sweep.plan import build_plan
from lm_eval_steering.sweep.runner import Outcome, Shard, SweepRunner
from lm_eval_steering.sweep.store import Store

ITEMS = 7  # odd, so that two processes do not get equally many

# Seven documents of the demo's tasks, and one task that fails while a file says so.
FUNCTIONS = f"""
from pathlib import Path
from lm_eval_steering.lmeval.task_families import demo

def few(made):
    return {{"test": made["test"].select(range({ITEMS}))}}

def lss(**settings):
    return few(demo.lss_documents(**settings))

def continuation(**settings):
    return few(demo.continuation_documents(**settings))

def forcing(**settings):
    return few(demo.forcing_documents(**settings))

def perplexity(**settings):
    return few(demo.perplexity_documents(**settings))

def fragile(document, results):
    broken = Path(__file__).parent / "broken"
    if broken.exists() and broken.read_text() in ("", str(document["id"])):
        raise ArithmeticError("the metric of item %s is not defined" % document["id"])
    return demo.perplexity_metrics(document, results)

def separated(**settings):
    documents = few(demo.perplexity_documents(**settings))["test"]
    return {{"test": documents.map(lambda one: {{"text": one["text"] + "\\u2028\\u2029\\u0085."}})}}

def partial(document, results):
    return {{"even": 1.0}} if document["id"] % 2 == 0 else {{"odd": 0.0}}

def clean(document, results):
    return {{"lfs_clean": float(document["id"] % 2)}}

def nothing_json_knows(values):
    return object()
"""
TASKS = {
    "small_lss": ("_lss", "{base: eng_Latn}", "lss", ""),
    "small_choice": ("_continuation", "{evaluated: deu_Latn, items: report}", "continuation", ""),
    "small_nats": ("_perplexity", "{evaluated: deu_Latn, items: report}", "perplexity", ""),
    "small_forcing": (
        "_prompts",
        "{items: report}",
        "forcing",
        'generation_kwargs: {do_sample: false, max_gen_toks: 5, min_new_tokens: 5, until: ["\\n"]}',
    ),
    "small_fragile": (
        "_perplexity",
        "{evaluated: deu_Latn, items: report}",
        "perplexity",
        "process_results: !function functions.fragile",
    ),
    # Metrics that some documents have, and text with what other readers of lines take for their end.
    "small_partial": (
        "_perplexity",
        "{evaluated: deu_Latn, items: report}",
        "separated",
        "process_results: !function functions.partial\n"
        "metric_list: [{metric: even, aggregation: mean}, {metric: odd, aggregation: mean}]",
    ),
    "small_clean": (
        "_perplexity",
        "{evaluated: deu_Latn, items: report}",
        "perplexity",
        "process_results: !function functions.clean\n"
        "metric_list: [{metric: lfs_clean, aggregation: mean, higher_is_better: true}]",
    ),
    "small_unwritable": (
        "_perplexity",
        "{evaluated: deu_Latn, items: report}",
        "perplexity",
        "process_results: !function functions.partial\n"
        "metric_list: [{metric: even, aggregation: !function functions.nothing_json_knows}, "
        "{metric: odd, aggregation: mean}]",
    ),
}

PLAN: dict[str, Any] = {
    "model": {"pretrained": "demo", "batch_size": 4},
    "neurons": "demo",
    "languages": ["deu_Latn", "tur_Latn"],
    "interventions": [{"op": "add", "value": "mean", "site": "product", "factors": [2, 8]}],
    "controls": {"random": 1, "calibration": "demo", "sentences": 8},
    "tasks": ["small_lss", "small_forcing"],
    "choose": {"metric": "lss", "seed": 2},
    "then": {"tasks": ["small_nats"]},
}
# What nothing is chosen in, and one task is enough.
PLAIN: dict[str, Any] = {
    "model": PLAN["model"],
    "neurons": "demo",
    "languages": ["deu_Latn"],
    "interventions": [{"op": "scale", "factors": [2, 3]}],
    "tasks": ["small_choice"],
}


@pytest.fixture(scope="session", autouse=True)
def ready_to_fork(one_thread: None) -> None:
    """All of these tests may fork."""


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small_tasks")
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, (parent, settings, function, more) in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"include: {tasks_folder() / 'demo' / parent}.yaml\ntask: {name}\ntag: small\n"
            f"custom_dataset: !function functions.{function}\ndataset_kwargs: {settings}\n{more}\n"
        )
    return folder


Spell = Callable[..., Grid]


@pytest.fixture(scope="session")
def spell(task_files: Path) -> Spell:
    """A plan's grid, from plain data and overrides of its keys; None takes a key away."""

    def make(plan: dict[str, Any] = PLAN, **changes: Any) -> Grid:
        whole = plan | {"include_path": [str(task_files)]} | changes
        return spell_out(build_plan({key: value for key, value in whole.items() if value is not None}))

    return make


def run(grid: Grid, out: Path, shard: str | None = None, retry_failed: bool = False, **options: Any) -> Outcome:
    """A run in this process, without a word."""
    part = Shard.parse(shard) if shard else None
    progress = options.pop("progress", None) or CellLog(stream=io.StringIO())
    return SweepRunner(grid, Store(out), part, retry_failed, progress, **options).run()


@pytest.fixture(scope="session")
def grid(spell: Spell) -> Grid:
    return spell()


@pytest.fixture(scope="session")
def finished(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the plan, run through in one go."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(grid, out).exit_code == 0
    return out


@pytest.fixture(scope="session")
def small_run(spell: Spell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "run"
    assert run(spell(PLAIN), out).exit_code == 0
    return out


def merged(folders: list[Path], out: Path) -> dict[str, bytes]:
    """The merged tables that do not tell when and where, byte for byte."""
    merge(folders, out, items=True)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith("timings")}
