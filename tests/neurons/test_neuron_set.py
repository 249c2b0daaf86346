from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm_eval_steering import files
from lm_eval_steering.errors import NeuronSetError, UnknownLanguageError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.resources import find_neuron_set
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


def test_an_absent_statistic_is_named_with_those_that_are_there() -> None:
    found = make_set(PAIRS).calibrated
    assert found is not None
    with pytest.raises(NeuronSetError, match=r"'token_max' at site 'activation' is not.*known: mean,.*p10.*calibrate"):
        found.lookup(np.array([[0, 1]]), "deu_Latn", "activation", "token_max")
    with pytest.raises(NeuronSetError, match="no calibrated statistics"):
        found.lookup(np.array([[1, 1]]), "deu_Latn", "activation", "mean")


# --- format versions ----------------------------------------------------------------------------------------------


def version_of(path: Path) -> int:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return json.loads(header["lm_eval_steering"])["format_version"]


def test_the_demo_set_of_version_1_keeps_its_checksum(tmp_path: Path) -> None:
    shipped = find_neuron_set("demo")
    found = NeuronSet.load(shipped)
    assert version_of(shipped) == 1
    assert found.content_hash() == "2fbab4f9074ec5f2614ec6579927fc786ee81f4d4dd61c849e1fc58c782ed735"
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == shipped.read_bytes()


def test_widths_by_layer_and_a_residual_stream_are_version_2(tmp_path: Path) -> None:
    narrow = make_set(PAIRS)
    means = np.arange(3 * 5 * 3, dtype=np.float32).reshape(3, 5, 3)
    wide = replace(narrow, provenance=replace(narrow.provenance, units=48, widths=(24, 24, 48)))
    both = replace(wide, residual={"mean": means})
    for number, neuron_set in enumerate((narrow, wide, both)):
        path = tmp_path / f"{number}.safetensors"
        neuron_set.save(path)
        loaded = NeuronSet.load(path)
        assert version_of(path) == (1 if neuron_set is narrow else 2)
        assert loaded.content_hash() == neuron_set.content_hash()
        assert loaded.provenance == neuron_set.provenance
    assert len({neuron_set.content_hash() for neuron_set in (narrow, wide, both)}) == 3
    assert np.array_equal(NeuronSet.load(tmp_path / "2.safetensors").residual["mean"], means)
    with pytest.raises(NeuronSetError, match=r"unit 30\) is out of range for 3 layers of 24 to 48 units"):
        replace(wide, assignments={**wide.assignments, "fra_Latn": np.array([[1, 30]])})
    replace(wide, assignments={**wide.assignments, "fra_Latn": np.array([[2, 30]])})
    with pytest.raises(NeuronSetError, match=r"3 layers of 24 to 48 units.* with 3 layers of 48 units"):
        wide.check_model(3, 48, "llama")
    wide.check_model(3, 48, "llama", widths=(24, 24, 48))
    with pytest.raises(NeuronSetError, match="residual 'mean' of shape"):
        replace(wide, residual={"mean": means[:2]})


def test_a_compact_file_holds_the_same_set_in_version_3(tmp_path: Path) -> None:
    plain = make_set(PAIRS)
    large = replace(
        plain,
        provenance=replace(plain.provenance, units=100_000),
        assignments={**plain.assignments, "fra_Latn": np.array([[0, 1], [2, 70_000]])},
        calibrated=None,
    )
    for number, neuron_set in enumerate((plain, large)):
        paths = [tmp_path / f"{number}-{compact}.safetensors" for compact in (False, True)]
        for path, compact in zip(paths, (False, True), strict=True):
            neuron_set.save(path, compact)
        first, second = map(NeuronSet.load, paths)
        assert [version_of(path) for path in paths] == [1, 3]
        assert first.content_hash() == second.content_hash() == neuron_set.content_hash()
        assert second.neurons("fra_Latn").dtype == np.int64
        assert np.array_equal(first.neurons("fra_Latn"), second.neurons("fra_Latn"))
        assert paths[1].stat().st_size < paths[0].stat().st_size
        second.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == paths[0].read_bytes()


def test_compact_neurons_in_an_older_version_are_refused(tmp_path: Path) -> None:
    plain = make_set(PAIRS, calibrated=False)
    plain.save(tmp_path / "compact.safetensors", compact=True)
    metadata, tensors = files.read_tensors(tmp_path / "compact.safetensors", "neuron set", NeuronSetError, 3)
    del metadata["format_version"], metadata["kind"]
    files.write_tensors(tmp_path / "old.safetensors", "neuron set", metadata, tensors, version=1)
    with pytest.raises(NeuronSetError, match="does not match its own checksum"):
        NeuronSet.load(tmp_path / "old.safetensors")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "newer.safetensors"
    files.write_tensors(path, "neuron set", {}, {}, version=4)
    with pytest.raises(NeuronSetError, match="format version 4, this release reads 1 to 3"):
        NeuronSet.load(path)
