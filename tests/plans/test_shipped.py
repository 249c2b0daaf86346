"""Each plan that ships: spelled out for its real model, and run on the demo model with two items per task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lm_eval_steering import languages, resources
from lm_eval_steering.cli import app
from lm_eval_steering.lmeval.task_families.demo import demo_languages
from lm_eval_steering.neurons.neuron_set import SITES, NeuronSet, Provenance, Statistics, union_of
from lm_eval_steering.plans.shipped import describe, family_of, find_plan, shipped_plans, summary_of
from lm_eval_steering.sweep.cells import interventions_of, searches_of, spell_out
from lm_eval_steering.sweep.plan import PlanError, SweepPlan, read_plan
from lm_eval_steering.sweep.plan_tasks import TaskBook
from lm_eval_steering.sweep.run import run_sweep
from tests.conftest import Command
from tests.lmeval.task_families.items import write_everywhere

# Layers and units of the papers' models, and the model's type.
SHAPES = {
    "meta-llama/Llama-2-7b-hf": ("llama", 32, 11008),
    "meta-llama/Llama-3.1-8B": ("llama", 32, 14336),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 32, 14336),
    "meta-llama/Llama-3.2-1B": ("llama", 16, 8192),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 24, 4864),
    "google/gemma-3-270m": ("gemma3_text", 18, 2048),
}
# What each plan asks for: languages, interventions (a factor each), tasks; from the papers and their scripts.
SIZES = {
    "clas-bench-2026-diffmean": (31, 28, 1),
    "clas-bench-2026-lape": (32, 2, 32),
    "clas-bench-2026-prompting": (32, 2, 32),
    "comparison": (4, 7 * 3 + 1, 6),  # seven methods at three damages, and prompting
    "gurgurov-2025-belebele": (21, 1, 21),
    "gurgurov-2025-forcing": (21, 5, 20),
    "gurgurov-2025-stepwise": (11, 11, 1),
    "gurgurov-2025-translation": (21, 1, 20),
    "gurgurov-2025-xnli": (21, 1, 15),
    "gurgurov-2025-xquad": (21, 1, 12),
    "rahmanisa-2025-lss": (15, 6, 15),
    "rahmanisa-2025-tasks": (18, 1, 11 + 6 + 13 + 18 + 17),
    "sae-lape-2025-generation": (15, 4, 1),
    "sae-lape-2025-perplexity": (15, 7, 15),
    "semeval-2027-t1": (10, 6, 10),
    "semeval-2027-t2": (10, 6, 10),
    "semeval-2027-t3": (3, 6, 20),
    "tang-2024-perplexity": (7, 1, 7),
    "tang-2024-steering": (7, None, 7),  # one of its interventions leaves English out
}


def real_set(plan: SweepPlan) -> NeuronSet:
    """A neuron set of the plan's model and languages with every statistic, of two made-up neurons per language.

    English is among them, which a plan may name without steering to it.
    """
    architecture, layers, units = SHAPES[plan.model.pretrained]
    codes = tuple(dict.fromkeys([*plan.languages, "eng_Latn"]))
    rows = {code: np.array([[0, number], [layers - 1, units - 1 - number]]) for number, code in enumerate(codes)}
    union = union_of(list(rows.values()))
    table = np.ones((len(union), len(codes)), dtype=np.float32)
    values = {site: dict.fromkeys(("mean", "median", "max", "token_max"), table) for site in SITES}
    return NeuronSet(
        codes, rows, Provenance(plan.model.pretrained, "", architecture, layers, units),
        Statistics(union, codes, values),
        {"mean": np.random.default_rng(0).normal(size=(layers, 8, len(codes))).astype(np.float32)},
    )  # fmt: skip


def test_every_plan_is_listed_with_what_it_needs(command: Command) -> None:
    assert set(shipped_plans()) == set(SIZES)
    text = describe()
    for name in SIZES:
        summary = summary_of(name)
        assert (f"{name}: {summary.title}" in text and "arXiv" in summary.title) or name.startswith(
            ("semeval", "comparison")
        )
        assert summary.data and all(family_of(task) for task in summary.plan.tasks)
    assert summary_of("clas-bench-2026-prompting").ships and not summary_of("rahmanisa-2025-lss").ships
    assert summary_of("rahmanisa-2025-lss").statistics == ("max", "median")
    assert summary_of("tang-2024-perplexity").statistics == ()
    assert summary_of("clas-bench-2026-diffmean").statistics == ("clas_diffmean of hidden states, with --residual",)
    assert command("plans", "--needs")[1].rstrip("\n") == text
    assert command("plans", "tang-2024-perplexity")[1] == find_plan("tang-2024-perplexity").read_text(encoding="utf-8")


def test_an_unknown_plan_gets_the_nearest(command: Command, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no such file, and no plan.*did you mean 'gurgurov-2025-xquad'"):
        find_plan("gurgurov-2025-xqad")
    code, _, error = command("sweep", "gurgurov-2025-xqad", "--out", tmp_path / "x")
    assert code == 2 and "did you mean 'gurgurov-2025-xquad'" in error
    own = tmp_path / "gurgurov-2025-xquad"
    own.write_text("{}", encoding="utf-8")
    assert find_plan(own) == own


@pytest.mark.parametrize("name", SIZES)
def test_a_plan_is_spelled_out_for_its_real_model(name: str) -> None:
    plan = read_plan(find_plan(name), ["controls.random=0"])
    codes, per_language, tasks = SIZES[name]
    assert len(plan.languages) == codes
    assert all(languages.normalise(code) == code for code in plan.languages)
    spelled = TaskBook(plan).spelled_out(plan.tasks)  # refuses a name that lm-eval does not know
    assert len(spelled) == tasks
    neuron_set = real_set(plan)  # refuses a statistic or language that is not there
    interventions, notes = interventions_of(plan, neuron_set, searches_of(plan, neuron_set))
    expected = {
        "tang-2024-steering": 7 + 6,
        "gurgurov-2025-stepwise": 11,
        None: codes * (per_language or 0),
    }
    assert len(interventions) - 1 == expected.get(name, expected[None])
    assert notes == []


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The excerpts, with items of our own where a data set may not be excerpted."""
    folder = tmp_path_factory.mktemp("data")
    for family in (shared_data / "evaluation").iterdir():
        if family.is_dir() and family.name != "belebele":
            (folder / family.name).symlink_to(family)
    write_everywhere(folder)
    rows = [{"language_code": code, "question": text} for code in _iso_codes() for text in ("Why?", "How? And when?")]
    (folder / "clas_bench").mkdir()
    for code in _clas_languages():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "clas_bench" / f"{code}.train.jsonl").write_text(lines, encoding="utf-8")
    yield folder


def _clas_languages() -> tuple[str, ...]:
    return read_plan(find_plan("clas-bench-2026-lape")).languages


def _iso_codes() -> list[str]:
    return [languages.spellings(code)[0] for code in _clas_languages()]


# What the demo set does not hold or the machine does not have: name -> further overrides.
FOR_THE_DEMO: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (name for name in SIZES if name.startswith(("clas", "semeval")) and name != "clas-bench-2026-diffmean"),
        ("metadata.clas_identifier=lid.176", "apply_chat_template=false"),
    ),
    "clas-bench-2026-diffmean": (
        "metadata.clas_identifier=lid.176",
        "apply_chat_template=false",
        "interventions=[{preset: clas_diffmean, source: eng_Latn, layers: 2, factors: [2.5, 5]}]",
    ),
    "comparison": (
        "interventions=[{op: scale, factors: {damage: [0.1]}}, "
        "{op: add, value: diffmean, site: residual, layers: 2, factors: {damage: [0.1]}}, "
        "{preset: clas_diffmean, source: eng_Latn, layers: 2, factors: {damage: [0.1], max_factor: 4096}}, "
        "{prompt: {instruction: 'Answer in {language}.'}}]",
        "controls={random: 1, calibration: demo, sentences: 3}",
        "damage={text: demo, sentences: 3}",
    ),
    "gurgurov-2025-xnli": ("metadata.split=validation",),
    "gurgurov-2025-stepwise": ("interventions=[{deactivate: eng_Latn}, {deactivate: eng_Latn+fra_Latn}]",),
    "tang-2024-steering": ("interventions.1.languages=[fra_Latn]",),
}


def without_local_data(plan: SweepPlan) -> tuple[list[str], list[str]]:
    """Names of the plan's single tasks that have their rows here, and of those that have not."""
    from lm_eval_steering.errors import SteeringError

    book = TaskBook(plan)
    there, absent = [], []
    for name in book.spelled_out(plan.tasks):
        try:
            for code in plan.languages:
                book.why_undefined(name, code)  # loads what the task has for a steered language
            book.task(name, plan.languages[-1])
        except SteeringError as error:
            assert "no rows for" in str(error), error
            absent.append(name)
        else:
            there.append(name)
    return there, absent


@pytest.fixture(scope="module")
def demo_set_with_everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set measured anew: the one that ships has neither `token_max` nor hidden states."""
    path = tmp_path_factory.mktemp("measured") / "demo.safetensors"
    model, text = resources.demo_model(), resources.demo_calibration()
    words = ["calibrate", "demo", "--model", model, "--corpus", text, "--sentences", 3, "--residual", "--out", path]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize("name", SIZES)
def test_a_plan_runs_on_the_demo_model(
    name: str, data: Path, tmp_path: Path, one_thread: None, request: pytest.FixtureRequest
) -> None:
    real = read_plan(find_plan(name))
    measured = any(each == "token_max" or "hidden states" in each for each in summary_of(name).statistics)
    neurons = request.getfixturevalue("demo_set_with_everything") if measured else "demo"
    codes = [code for code in real.languages if code in demo_languages()][:2]
    metadata = {**real.metadata, "data_dir": str(data), "samples": 2, "bleu_tokenizer": "char"}
    overrides = [
        "model={pretrained: demo, batch_size: 8}", f"neurons={neurons}", f"languages=[{', '.join(codes)}]",
        f"metadata={json.dumps(metadata)}", "limit=2", "bootstrap_iters=2",
        "gen_kwargs={max_gen_toks: 4}", *FOR_THE_DEMO.get(name, ()),
    ]  # fmt: skip
    plan = read_plan(find_plan(name), overrides)
    there, absent = without_local_data(plan)
    if name == "rahmanisa-2025-lss":  # MLAMA-dod-185 is on the hub alone
        assert there == [] and len(absent) == 15
        there = ["steering_lss_eng_Latn"]
    assert there, "no task of this plan has local data"
    assert absent == [] or name in ("rahmanisa-2025-lss", "rahmanisa-2025-tasks", *TRANSLATING), absent
    # Two tasks in the languages of the demo model stand for all of them.
    some = sorted(there, key=lambda task: not any(code in task for code in codes))[:2]
    plan = read_plan(find_plan(name), [*overrides, f"tasks=[{', '.join(some)}]"])
    grid = spell_out(plan)
    outcome = run_sweep(grid, tmp_path / "out", None, False)
    assert outcome.exit_code == 0 and outcome.failed == [] and outcome.done == outcome.ran > 0


TRANSLATING = ("gurgurov-2025-translation", "sae-lape-2025-perplexity", "tang-2024-perplexity")


def test_the_command_takes_a_name_and_a_limit(data: Path, tmp_path: Path, command: Command) -> None:
    words: list[Any] = [
        "sweep", "tang-2024-perplexity", "--out", tmp_path / "out", "--limit", 2, "--dry-run",
        "--set", "model={pretrained: demo}", "--set", "neurons=demo", "--set", "languages=[fra_Latn, spa_Latn]",
        "--set", f"metadata={{data_dir: {data}}}", "--set", "tasks=[steering_flores_fra_Latn_perplexity]",
    ]  # fmt: skip
    code, out, error = command(*words)
    assert code == 0, error
    assert "3 cells" in out
