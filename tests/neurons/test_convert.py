"""Other people's files: the published sets where they are at hand, and everything that can be wrong with one."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import NeuronSetError, UnknownLanguageError
from lm_eval_steering.neurons.convert import export_lists, import_lists, import_recordings
from lm_eval_steering.neurons.neuron_set import Provenance
from lm_eval_steering.neurons.recording import RecordingFolder
from tests.conftest import CONFIGS, SHARED, make_set

TANG = ("en", "zh", "fr", "es", "vi", "id", "ja")
CLAS = (
    "en", "ar", "bo", "da", "de", "es", "fr", "hi", "it", "ja", "ko", "mt", "nl", "no", "pl", "pt", "ru", "sv", "tr",
    "zh", "sk", "el", "kk", "sw", "ka", "uk", "fa", "th", "id", "vi", "cs", "ro",
)  # fmt: skip
TINY = Provenance("tiny", "", "llama", 3, 24)
PAIRS = {"fra_Latn": [(0, 1), (2, 3)], "deu_Latn": [(0, 1), (1, 7)], "tur_Latn": []}


def published() -> dict[str, Any]:
    path = SHARED / "golden" / "repo1_published_sets.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@pytest.mark.parametrize("name", sorted(published()) or ["absent"])
def test_the_sets_of_tang_et_al_keep_their_counts(name: str, shared_data: Path, tmp_path: Path) -> None:
    golden = published()[name]
    path = shared_data / "published_neuron_sets" / "rucaibox" / f"{name}.neuron.pth"
    own = Provenance(name, "", "llama", golden["layers"][0], golden["intermediate"])
    found = import_lists(path, TANG[: golden["languages"]], own)
    assert [len(found.assignments[code]) for code in found.languages] == golden["per_language"]
    assert len(found.union()) == golden["distinct"] == round(0.01 * own.layers * own.units)
    overlap = golden["overlap"]
    assert found.overlap().tolist() == (json.loads(overlap) if isinstance(overlap, str) else overlap)
    export_lists(found, tmp_path / "again.pth")
    theirs, ours = (torch.load(file, weights_only=True) for file in (path, tmp_path / "again.pth"))
    assert all(torch.equal(a, b) for x, y in zip(theirs, ours, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", ["llama-1", "llama-5", "aya-1"])
def test_the_masks_of_clas_bench_are_read(name: str, shared_data: Path) -> None:
    path = shared_data / "published_neuron_sets" / "clas-bench" / name
    found = import_lists(path, CLAS, Provenance(name, "", "llama", 32, 14336))
    rate = 0.05 if name.endswith("5") else 0.01
    assert len(found.languages) == 32
    assert len(found.union()) == round(rate * 32 * 14336)


def test_a_set_survives_export_and_import(tmp_path: Path) -> None:
    original = make_set(PAIRS, calibrated=False)
    export_lists(original, tmp_path / "lists.pth")
    torch.save({0: "fr", 1: "de", 2: "tr"}, tmp_path / "dictionary")
    found = import_lists(tmp_path / "lists.pth", ["fr", "de", "tr"], TINY, tmp_path / "dictionary")
    assert found.content_hash() == original.content_hash()


def by_layer(pairs: list[tuple[int, int]]) -> list[list[int]]:
    return [[unit for layer, unit in pairs if layer == number] for number in range(3)]


def test_the_dictionary_of_kinit_sk_is_read(tmp_path: Path) -> None:
    selected = {"de": by_layer(PAIRS["deu_Latn"]), "fr": by_layer(PAIRS["fra_Latn"]), "tr": by_layer([])}
    results = {
        "mlp_over_threshold_rate": {"selected_mask": torch.zeros(3, 3, 24), "selected_indices_by_language": selected},
        "attn_q_proj_over_threshold_rate": {"selected_indices_by_language": {code: [[1], [], []] for code in selected}},
    }
    torch.save({"method": "LAPE", "languages": ["fr"], "params": {}, "results": results}, tmp_path / "lape.pt")
    found = import_lists(tmp_path / "lape.pt", ["fr", "de", "tr"], TINY)
    assert found.content_hash() == make_set(PAIRS, calibrated=False).content_hash()
    with pytest.raises(NeuronSetError, match="its languages are deu_Latn, fra_Latn, tur_Latn; the languages given are"):
        import_lists(tmp_path / "lape.pt", ["fr", "de"], TINY)
    del results["mlp_over_threshold_rate"]
    torch.save({"results": results}, tmp_path / "attention.pt")
    with pytest.raises(NeuronSetError, match="expected one result of the MLP, got attn_q_proj_over_threshold_rate"):
        import_lists(tmp_path / "attention.pt", ["fr", "de", "tr"], TINY)


def test_neurons_of_sae_lape_are_read_and_its_features_refused(tmp_path: Path) -> None:
    lists = [[torch.tensor(units).long() for units in by_layer(PAIRS[code])] for code in ("fra_Latn", "deu_Latn")]
    content = {
        "final_indice": lists,
        "sorted_lang": ["French", "German"],
        "features_info": {"French": {}, "German": {}},
    }
    torch.save(content, tmp_path / "lape_neurons.pt")
    found = import_lists(tmp_path / "lape_neurons.pt", ["de", "fr"], TINY)
    assert found.neurons("fra").tolist() == [list(pair) for pair in PAIRS["fra_Latn"]]
    assert found.neurons("deu").tolist() == [list(pair) for pair in PAIRS["deu_Latn"]]
    torch.save(content | {"sae_features": [torch.zeros(2, 4)]}, tmp_path / "lape_all.pt")
    with pytest.raises(NeuronSetError, match=r"features of sparse autoencoders .* no MLP units"):
        import_lists(tmp_path / "lape_all.pt", ["de", "fr"], TINY)
    torch.save({"something": 1}, tmp_path / "other.pt")
    with pytest.raises(NeuronSetError, match="got one with the keys something"):
        import_lists(tmp_path / "other.pt", ["de", "fr"], TINY)


def test_counts_of_njunlp_are_read(tmp_path: Path) -> None:
    maker = {"model": "tiny", "revision": "", "architecture": "llama", "layers": 3, "units": 24}
    active = torch.ones(3, 24, dtype=torch.int32)
    torch.save({"total_tokens": 7, "over_zero": active}, tmp_path / "counts.pt")
    folder = RecordingFolder(tmp_path / "recording")
    import_recordings([tmp_path / "counts.pt"], ["fr"], maker, folder)
    assert folder.load().n_tokens.tolist() == [7] and folder.load().counts.sum() == 3 * 24


def test_floating_point_indices_are_understood(tmp_path: Path) -> None:
    torch.save([[torch.tensor([3.0, 1.0]), torch.tensor([]), torch.tensor([])]], tmp_path / "floats")
    found = import_lists(tmp_path / "floats", ["fr"], TINY)
    assert np.array_equal(found.neurons("fr"), [[0, 1], [0, 3]])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lists.pth"
    export_lists(make_set(PAIRS), path)
    with pytest.raises(NeuronSetError, match=r"3 lists of neurons for 2 languages \(fra_Latn, deu_Latn\)"):
        import_lists(path, ["fr", "de"], TINY)
    with pytest.raises(NeuronSetError, match="3 layers for fra_Latn, the model has 4"):
        import_lists(path, ["fr", "de", "tr"], replace(TINY, layers=4))
    with pytest.raises(NeuronSetError, match="out of range for 3 layers of 5 units"):
        import_lists(path, ["fr", "de", "tr"], replace(TINY, units=5))
    with pytest.raises(UnknownLanguageError):
        import_lists(path, ["fr", "de", "xx"], TINY)
    torch.save({0: "fr", 1: "tr", 2: "de"}, tmp_path / "dictionary")
    with pytest.raises(NeuronSetError, match="the dictionary has fra_Latn, tur_Latn, deu_Latn"):
        import_lists(path, ["fr", "de", "tr"], TINY, tmp_path / "dictionary")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    with pytest.raises(NeuronSetError, match=r"expected list.*got Tensor"):
        import_lists(tmp_path / "tensor", ["fr"], TINY)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:100])
    with pytest.raises(NeuronSetError, match=r"cut short|not opened"):
        import_lists(tmp_path / "cut", ["fr"], TINY)


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    for name, write in (("bomb.pth", torch.save), ("bomb.pkl", lambda x, p: p.write_bytes(pickle.dumps(x)))):
        write([Bomb()], tmp_path / name)
        with pytest.raises(NeuronSetError, match="holds code or unknown objects and was not opened"):
            import_lists(tmp_path / name, ["fr"], TINY)
    assert not (tmp_path / "exploded").exists()


def test_the_models_shape_comes_from_its_config(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **CONFIGS["llama"]).save_pretrained(tmp_path / "maker")
    found = LazyModel(str(tmp_path / "maker")).maker()
    expected = {"model": "maker", "architecture": "llama", "layers": 3, "units": 24, "activation_function": "silu"}
    assert {name: found[name] for name in expected} == expected


def test_counts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    maker = {"model": "tiny", "revision": "", "architecture": "llama", "layers": 3, "units": 24}
    folder = RecordingFolder(tmp_path / "recording")

    def refused(record: Any, message: str, languages: tuple[str, ...] = ("fr",)) -> None:
        torch.save(record, tmp_path / "counts.pt")
        with pytest.raises(NeuronSetError, match=message):
            import_recordings([tmp_path / "counts.pt"], languages, maker, folder)
        assert not folder.path.exists()

    active = torch.ones(3, 24, dtype=torch.int32)
    refused({"n": 5, "over_zero": active}, r"1 recordings for 2 languages \(fra_Latn, deu_Latn\)", ("fr", "de"))
    refused({"n": 5, "over_zero": active[:2]}, r"counts of shape \(2, 24\), the model has 3 layers of 24 units")
    refused({"n": 0, "over_zero": active}, r"active on more tokens \(1\) than were counted \(0\)")
    refused([{"lang": "de", "num": 5, "over_zero": active}], "the recording is of de, .* at its position is fra_Latn")
    refused([1], r'expected \{"n", "over_zero"\}')


@pytest.mark.parametrize("indices", [torch.tensor([True, False]), torch.tensor([1.7]), None, {}])
def test_what_are_no_indices_is_refused(tmp_path: Path, indices: Any) -> None:
    torch.save([[indices, torch.tensor([]), torch.tensor([])]], tmp_path / "lists")
    with pytest.raises(NeuronSetError, match=r"layer 0: indices: expected (whole )?numbers, got"):
        import_lists(tmp_path / "lists", ["fr"], TINY)
