"""Matched random neuron sets of a sweep: drawn by seed, measured on text once, and kept in the sweep's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons.calibrate import calibrated
from lm_eval_steering.neurons.find import random_set
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.neurons.recorder import Search
from lm_eval_steering.neurons.running import ModelRunner, Ranks
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.sweep.cells import Grid, calibration_source
from lm_eval_steering.sweep.locks import locked
from lm_eval_steering.sweep.store import Store


class ControlSets:
    """The control sets of one grid, made when they are first asked for."""

    def __init__(self, grid: Grid, store: Store, ranks: Ranks) -> None:
        self._grid, self._ranks = grid, ranks
        self._folder = store.path / "controls"
        self._sets: dict[int, NeuronSet] = {}

    def __call__(self, seed: int, lm: Any) -> NeuronSet:
        """The control of one seed; all of them are measured in one pass, by one runner."""
        if not self._sets:
            self._make(lm)
        return self._sets[seed]

    @property
    def are_measured(self) -> bool:
        """Whether no model is needed to make them: they are in the folder, or are not measured at all."""
        return self._grid.calibration is None or all(path.is_file() for path in self._paths(self._draws()))

    def _draws(self) -> list[NeuronSet]:
        return [random_set(self._grid.neuron_set, seed) for seed in range(self._grid.plan.controls.random)]

    def _paths(self, draws: list[NeuronSet]) -> list[Path]:
        text = fingerprint(self._grid.calibration or {})[:10]
        return [
            self._folder / f"random{n}-{draw.content_hash()[:10]}-{text}.safetensors" for n, draw in enumerate(draws)
        ]

    def _make(self, lm: Any) -> None:
        draws = self._draws()
        if self._grid.calibration is None:
            self._sets = dict(enumerate(draws))
            return
        paths = self._paths(draws)
        self._ranks.after_first(lambda: self._measure_or_refuse(draws, paths, lm))
        self._sets = {number: NeuronSet.load(path) for number, path in enumerate(paths)}

    def _measure_or_refuse(self, draws: list[NeuronSet], paths: list[Path], lm: Any) -> None:
        """With every error as one that `after_first` passes to the processes that wait."""
        try:
            self._measure(draws, paths, lm)
        except SteeringError:
            raise
        except Exception as error:
            raise SteeringError(f"controls.random: their text could not be measured: {error!r}") from error

    def _measure(self, draws: list[NeuronSet], paths: list[Path], lm: Any) -> None:
        with locked(self._folder / "controls.lock", wait=True):
            if not all(path.is_file() for path in paths):
                for path, measured in zip(paths, self._measured(draws, lm), strict=True):
                    measured.save(path)

    def _measured(self, draws: list[NeuronSet], lm: Any) -> list[NeuronSet]:
        controls, languages = self._grid.plan.controls, self._grid.neuron_set.languages
        search = Search(calibration_source(self._grid.plan), languages, rows="sentences", sentences=controls.sentences)
        # Rows of fixed number: a detected batch size would make the statistics depend on the machine's memory.
        runner = ModelRunner(LazyModel.of(lm.model, lm.tokenizer), batch_size=16)
        lm.intervene(None)
        return calibrated(draws, runner, search.calibration_texts(runner.model), search.corpora()[1].name)
