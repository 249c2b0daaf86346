"""The exported models of a sweep: one plain checkpoint for each intervention that an engine is to run.

Always checkpoints, also where a LoRA could say the same: one form serves every operation, random controls have other
neurons and could not share an adapter's weights anyway, and an engine needs no adapter support, nor a rank that it
accepts, to run them at full speed. The price is the disk: a checkpoint for each intervention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.export.job import MULTIPLE, RECORD, Exported, Job, export_checkpoint
from lm_eval_steering.export.layouts import target_of
from lm_eval_steering.export.verify import Loader
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.progress import Log
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.sweep.cells import Grid, PlannedIntervention, model_arguments
from lm_eval_steering.sweep.plan import PlanError
from lm_eval_steering.sweep.store import Store, StoreError, read_json

_LONGEST = 150  # characters of a readable name
_SHORTEST = 8  # characters of a text in a script without blanks


class Exports:
    """The exports of one grid: where they are, and what is known of them.

    Attributes:
        folder: they are in.
    """

    def __init__(self, grid: Grid, store: Store) -> None:
        self._grid, self._store = grid, store
        self.folder = Path(grid.plan.engine.exports or store.path / "engine" / "exports").absolute()

    def loader(self) -> Loader:
        """How the model is loaded; in the dtype that the engine is to load it in."""
        arguments = model_arguments(self._grid.plan)
        dtype = self._grid.plan.engine.arguments.get("dtype") or arguments.get("dtype") or "auto"
        return Loader(arguments["pretrained"], arguments.get("revision") or "main", str(dtype))

    def refuse(self) -> None:
        """Refuse interventions that weights cannot say; nothing is written and no weights are read.

        Raises:
            PlanError: naming the intervention.
        """
        for planned in self._grid.interventions:
            if planned.is_baseline or planned.control is not None:  # a control takes its intervention's steps
                continue
            job = self._job(planned, self._grid.neuron_set, ())
            try:
                model = Exported(job)
                target_of(model.lazy.config, model.maps(job.plan()), MULTIPLE)
            except SteeringError as error:
                engine = self._grid.plan.engine.name
                raise PlanError(f"engine {engine}: {planned.name} (interventions.{planned.entry}): {error}") from None

    def path(self, planned: PlannedIntervention) -> Path:
        """Folder of one export; its name ends in a hash of everything that decides it."""
        own = self._grid
        mark = fingerprint(
            {
                "model": own.model,
                "neurons": own.neuron_set.content_hash(),
                "intervention": planned.resolved,
                "control": planned.control,
                "calibration": None if planned.control is None else own.calibration,
                "dtype": self.loader().dtype,
            }
        )
        return self.folder / f"{planned.name[:_LONGEST]}--{mark[:16]}"

    def make(self, planned: PlannedIntervention, neurons: NeuronSet, prompts: Sequence[str]) -> str:
        """Write one export, and compare it with the hooks; says how that went.

        Raises:
            VerificationError: if it is not the steered model.
        """
        job = self._job(planned, neurons, prompts)
        said = export_checkpoint(job)[-1]
        verified = said.removeprefix("verified: ") if prompts else None
        record = read_json(job.out / RECORD)
        self._store.keep(self._note(planned), {"export": record, "verified": verified})
        return said if prompts else "not compared with the hooks (engine.verify is 0)"

    def note(self, planned: PlannedIntervention) -> dict[str, Any] | None:
        """What is known of one export: its `steering.json`, and how it was verified; None where it was not made.

        Raises:
            StoreError: if the folder holds another one by now, or is not what this intervention asks for.
        """
        place = self._store.path / self._note(planned)
        if not place.is_file():
            return None
        found, record = read_json(place), self.path(planned) / RECORD
        if record.is_file() and (other := read_json(record)) != found["export"]:
            raise StoreError(
                f"{record}: fingerprint {other.get('fingerprint')}, this sweep exported "
                f"{found['export']['fingerprint']}: the folder was replaced; remove it and {place}"
            )
        return found

    def is_made(self, planned: PlannedIntervention) -> bool:
        """Whether the export can be run."""
        return self.note(planned) is not None and (self.path(planned) / RECORD).is_file()

    def _note(self, planned: PlannedIntervention) -> str:
        return f"engine/notes/{self.path(planned).name}.json"

    def _job(self, planned: PlannedIntervention, neurons: NeuronSet, prompts: Sequence[str]) -> Job:
        plan = self._grid.plan
        return Job(
            self.loader(), neurons, planned.arguments, self.path(planned), plan.allow_empty, plan.force, prompts,
            Log(show=False),
        )  # fmt: skip


def prompts_of(texts: Iterator[str], count: int) -> tuple[str, ...]:
    """The first of some texts that are long enough to be compared on, each once."""
    found: dict[str, None] = {}
    for text in texts:
        if len(found) == count:
            break
        if len(text.split()) > 1 or len(text) > _SHORTEST:
            found[text] = None
    return tuple(found)
