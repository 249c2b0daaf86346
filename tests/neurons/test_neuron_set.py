from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm_eval_steering.errors import NeuronSetError, UnknownLanguageError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import make_set

PAIRS = {"fra_Latn": [(0, 1), (2, 3)], "deu_Latn": [(0, 1), (1, 7)], "tur_Latn": []}


def test_a_set_survives_its_file(tmp_path: Path) -> None:
    original = make_set(PAIRS)
    original.save(tmp_path / "a.safetensors")
    found = NeuronSet.load(tmp_path / "a.safetensors")
    assert found.languages == original.languages
    assert found.provenance == original.provenance
    assert found.content_hash() == original.content_hash()
    for code in PAIRS:
        assert np.array_equal(found.neurons(code), original.neurons(code))
    assert np.array_equal(found.overlap(), [[2, 1, 0], [1, 2, 0], [0, 0, 0]])


def test_the_same_set_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_set(PAIRS).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_statistics_decide_the_content_hash() -> None:
    assert make_set(PAIRS, seed=0).content_hash() != make_set(PAIRS, seed=1).content_hash()


def test_any_code_of_a_language_finds_its_neurons() -> None:
    assert np.array_equal(make_set(PAIRS).neurons("fr"), [[0, 1], [2, 3]])
    with pytest.raises(UnknownLanguageError, match=r"'spa' \(spa_Latn\) is not in the neuron set"):
        make_set(PAIRS).neurons("spa")


@pytest.mark.parametrize("kept", [0, 4, 100, 400])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    make_set(PAIRS).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(NeuronSetError, match=r"cut\.safetensors: not a whole safetensors file"):
        NeuronSet.load(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weights": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(NeuronSetError, match="not a neuron set"):
        NeuronSet.load(tmp_path / "other.safetensors")
    with pytest.raises(NeuronSetError, match="no such file"):
        NeuronSet.load(tmp_path / "missing.safetensors")


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_set(PAIRS).save(path)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["__metadata__"]
    tensors = load_file(path)
    tensors["neurons/fra_Latn"] = np.array([[0, 1], [2, 4]])
    save_file(tensors, path, metadata=header)
    with pytest.raises(NeuronSetError, match="does not match its own checksum"):
        NeuronSet.load(path)


def test_neurons_out_of_range_unsorted_or_double_are_refused() -> None:
    good = make_set(PAIRS)
    for rows, message in (
        ([[0, 24]], "unit 24.*out of range for 3 layers of 24 units"),
        ([[3, 0]], "layer 3"),
        ([[1, 0], [0, 0]], "sorted"),
        ([[1, 0], [1, 0]], "distinct"),
    ):
        with pytest.raises(NeuronSetError, match=message):
            replace(good, assignments={**good.assignments, "fra_Latn": np.array(rows)})


def test_a_set_of_another_model_is_refused() -> None:
    with pytest.raises(NeuronSetError, match=r"3 layers of 24 units.*the model is qwen2 with 3 layers of 32 units"):
        make_set(PAIRS).check_model(3, 32, "qwen2")


def test_statistics_are_looked_up_by_neuron_and_language() -> None:
    found = make_set(PAIRS).calibrated
    assert found is not None
    table = found.values["product"]["mean"]
    rows = [[0, 1], [2, 3]]
    own = found.lookup(np.array(rows), "deu_Latn", "product", "mean")
    assert np.array_equal(own, table[[0, 2], 1])
    other = (table[[0, 2], 0].astype(float) + table[[0, 2], 2]) / 2
    assert np.allclose(found.lookup(np.array(rows), "deu_Latn", "product", "diffmean"), table[[0, 2], 1] - other)


def test_a_language_has_the_statistics_of_its_own_neurons() -> None:
    found = make_set(PAIRS)
    assert found.calibrated is not None
    for site in ("activation", "product"):
        expected = found.calibrated.lookup(found.neurons("deu_Latn"), "deu_Latn", site, "median")
        assert np.array_equal(found.statistics("de", "median", site), expected)
    assert len(found.statistics("deu_Latn")) == len(found.neurons("deu_Latn"))
    with pytest.raises(NeuronSetError, match="holds no statistics; `lm-eval-steering calibrate`"):
        make_set(PAIRS, calibrated=False).statistics("deu_Latn")
    with pytest.raises(NeuronSetError, match=r"has statistics of .*, not of spa_Latn"):
        found.calibrated.lookup(np.array([[0, 1]]), "spa_Latn", "activation", "mean")


def test_an_absent_statistic_is_named_with_the_closest() -> None:
    found = make_set(PAIRS).calibrated
    assert found is not None
    with pytest.raises(NeuronSetError, match=r"statistic 'p11' at site 'activation' is not.*did you mean 'p10'"):
        found.lookup(np.array([[0, 1]]), "deu_Latn", "activation", "p11")
    with pytest.raises(NeuronSetError, match="no calibrated statistics"):
        found.lookup(np.array([[1, 1]]), "deu_Latn", "activation", "mean")
