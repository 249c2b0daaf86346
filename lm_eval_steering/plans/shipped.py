"""Plans of the papers' experiments, which `sweep` takes by name: one YAML file for each, spelled for the paper's model.

The first line of a file says what it is; the lines below it, how its neuron set is made and where the paper's code
differs from its text. What a plan needs is read from the plan itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm_eval_steering.errors import NeuronSetError, did_you_mean
from lm_eval_steering.lmeval.listing import needs
from lm_eval_steering.resources import find_neuron_set, tasks_folder
from lm_eval_steering.steering.intervention import NORMAL, RESIDUAL, from_arguments, is_live
from lm_eval_steering.sweep.plan import InterventionEntry, PlanError, SweepPlan, read_plan

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class PlanSummary:
    """What one plan is and needs.

    Attributes:
        name: that `sweep` takes.
        title: the first line of the file.
        plan: its content.
        statistics: of the activations that its neuron set must hold.
        ships: whether a neuron set of the name in the plan travels with the package.
        data: family of tasks -> what its data need.
    """

    name: str
    title: str
    plan: SweepPlan
    statistics: tuple[str, ...]
    ships: bool
    data: dict[str, str]


def shipped_plans() -> dict[str, Path]:
    """Name -> file of every plan that ships."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_plan(name: str | Path) -> Path:
    """The file of a plan: a path as it is, or the name of a plan that ships.

    Raises:
        PlanError: if it is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped_plans()
    if str(name) in known:
        return known[str(name)]
    raise PlanError(
        f"plan {str(name)!r}: no such file, and no plan of that name ships{did_you_mean(str(name), known)}; "
        "`lm-eval-steering plans` lists them"
    )


def summary_of(name: str) -> PlanSummary:
    """What a plan that ships is and needs."""
    path = find_plan(name)
    plan = read_plan(path)
    title = path.read_text(encoding="utf-8").split("\n", maxsplit=1)[0].removeprefix("#").strip()
    statistics = sorted({value for entry in plan.interventions for value in _statistics(entry, plan.languages[0])})
    tasks = (*plan.tasks, *(plan.then.tasks if plan.then else ()))
    families = {family: needs(family) for task in tasks if (family := family_of(task))}
    return PlanSummary(name, title, plan, tuple(statistics), _ships(plan.neurons), families)


def titles() -> str:
    """One line for every plan: its name and what it is."""
    found = {name: summary_of(name).title for name in shipped_plans()}
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {title}" for name, title in found.items())


def describe() -> str:
    """Every plan with what it needs, as text for a terminal."""
    return "\n\n".join(_text(summary_of(name)) for name in shipped_plans())


def family_of(task: str) -> str | None:
    """The folder under `tasks/` that a task or group of ours belongs to; None for a task of lm-eval's."""
    families = [folder.name for folder in tasks_folder().iterdir() if folder.is_dir()]
    own = [family for family in families if f"{task}_".startswith(f"steering_{family}_")]
    return max(own, key=len, default=None)


def _statistics(entry: InterventionEntry, language: str) -> set[str]:
    """Calibrated statistics that an entry looks up in the neuron set."""
    steps = from_arguments(entry.arguments | ({"language": language} if entry.steers else {})).steps
    named = {(step.value, step.site) for step in steps if isinstance(step.value, str)}
    return {
        f"{value} of hidden states, with --residual" if site == RESIDUAL else value
        for value, site in named
        if value != NORMAL and not is_live(value)
    }


def _ships(neurons: str) -> bool:
    try:
        find_neuron_set(neurons)
    except NeuronSetError:
        return False
    return True


def _text(summary: PlanSummary) -> str:
    plan = summary.plan
    neurons = plan.neurons if summary.ships else f"{plan.neurons}, to be made: `lm-eval-steering plans {summary.name}`"
    lines = [
        f"{summary.name}: {summary.title}",
        f"  model      {plan.model.pretrained}",
        f"  neurons    {neurons}",
        *([f"  statistics {', '.join(summary.statistics)} (find and calibrate)"] if summary.statistics else []),
        f"  languages  {len(plan.languages)}: {' '.join(plan.languages)}",
        *(f"  {family:<10} {needed}" for family, needed in summary.data.items()),
    ]
    return "\n".join(lines)
