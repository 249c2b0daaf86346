"""Other people's files, read with care, and neuron sets written for their scripts.

The layout of neuron sets that Tang et al. 2024, Gurgurov et al. 2025, CLaS-Bench 2026 and Rahmanisa et al. 2025 share
is `torch.save` of `list[language][layer]` of tensors of unit indices. It names neither languages nor model, so both
must be given. Two dictionaries name the languages: that of kinit-sk's language-neuron-detection, whose
`selected_indices_by_language` of the MLP is read, and that of SAE-LAPE's neurons (not of its features).
Recordings are `{"n": tokens, "over_zero": (layer, unit)}`,
with the number of tokens under `n`, `num` or `total_tokens` (NJUNLP), one file per language, or a list of these.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.errors import NeuronSetError, UnknownLanguageError
from lm_eval_steering.languages import from_english_name, normalise
from lm_eval_steering.neurons.neuron_set import Neurons, NeuronSet, Provenance
from lm_eval_steering.neurons.recording import RecordingFolder


def import_lists(
    path: str | Path, languages: Sequence[str], provenance: Provenance, dictionary: str | Path | None = None
) -> NeuronSet:
    """Read a list-of-lists file. Nothing in it is executed: it is unpickled with `weights_only`.

    Args:
        path: the file.
        languages: any codes, in the order of the file.
        provenance: model, architecture and shape that the indices belong to.
        dictionary: the language dictionary that lang-task-neuron saves beside its sets, to check the order against.

    Raises:
        NeuronSetError: if the file holds code or something else, or languages, layers or indices do not fit.
    """
    lists = _load(path)
    codes = tuple(normalise(code) for code in languages)
    if isinstance(lists, dict):
        lists = _from_dictionary(path, lists, codes)
    if not isinstance(lists, list) or not all(isinstance(layers, list) for layers in lists):
        raise NeuronSetError(f"{path}: expected list[language][layer] of tensors, got {type(lists).__name__}")
    if len(lists) != len(codes):
        raise NeuronSetError(f"{path}: {len(lists)} lists of neurons for {len(codes)} languages ({', '.join(codes)})")
    if dictionary is not None:
        _check_dictionary(dictionary, codes)
    for code, layers in zip(codes, lists, strict=True):
        if len(layers) != provenance.layers:
            raise NeuronSetError(f"{path}: {len(layers)} layers for {code}, the model has {provenance.layers}")
    return NeuronSet(codes, dict(zip(codes, map(_rows, lists), strict=True)), provenance)


def _from_dictionary(path: str | Path, content: Mapping[Any, Any], codes: Sequence[str]) -> list[Any]:
    """list[language][layer] in the order of the codes, from the two dictionaries that are known."""
    if "sae_features" in content:
        raise NeuronSetError(
            f"{path}: features of sparse autoencoders (SAE-LAPE), which are directions of the hidden states and no MLP "
            "units; of SAE-LAPE's files those with neurons can be imported"
        )
    if "final_indice" in content and "features_info" in content:
        by_name: Mapping[str, Any] = dict(zip(content["features_info"], content["final_indice"], strict=True))
    elif "results" in content:
        by_name = _of_mlp(path, content["results"])
    else:
        raise NeuronSetError(
            f"{path}: expected list[language][layer], or a dictionary of kinit-sk or SAE-LAPE, got one with the keys "
            f"{', '.join(map(str, content))}"
        )
    by_code = {_code_of(str(name)): layers for name, layers in by_name.items()}
    if set(by_code) != set(codes):
        raise NeuronSetError(
            f"{path}: its languages are {', '.join(by_code)}; the languages given are {', '.join(codes)}"
        )
    return [list(by_code[code]) for code in codes]


def _of_mlp(path: str | Path, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """language -> list[layer] of kinit-sk's MLP neurons; those of attention are no MLP units and stay behind."""
    names = [name for name in results if str(name).startswith("mlp_")]
    if len(names) != 1:
        raise NeuronSetError(f"{path}: expected one result of the MLP, got {', '.join(map(str, results)) or 'none'}")
    selected: Mapping[str, Any] = results[names[0]]["selected_indices_by_language"]
    return selected


def _code_of(name: str) -> str:
    """Code of a language that a file names by a code or in English."""
    try:
        return normalise(name)
    except UnknownLanguageError:
        return from_english_name(name)


def export_lists(neuron_set: NeuronSet, path: str | Path) -> None:
    """Write `list[language][layer]` of sorted int64 tensors, in the order of the set's languages."""
    lists = [
        [torch.from_numpy(neurons[neurons[:, 0] == layer, 1].copy()) for layer in range(neuron_set.provenance.layers)]
        for neurons in (neuron_set.assignments[code] for code in neuron_set.languages)
    ]
    torch.save(lists, path)


def import_recordings(
    paths: Sequence[str | Path], languages: Sequence[str], model: Mapping[str, Any], folder: RecordingFolder
) -> None:
    """Read counts of other scripts into a recording, which `select` can use.

    Args:
        paths: one file a language, or one file with the list of all.
        languages: any codes, in the order of the files or of the list.
        model: fields of a provenance: model, architecture, layers, units.
        folder: a new recording.

    Raises:
        NeuronSetError: if a file holds code or something else, or languages and shapes do not fit.
        RecordingError: if the folder holds another recording.
    """
    records = [record for path in paths for record in _records(path)]
    codes = tuple(normalise(code) for code in languages)
    if len(set(codes)) != len(codes):
        raise NeuronSetError(f"languages {', '.join(languages)}: expected each once")
    if len(records) != len(codes):
        raise NeuronSetError(f"{paths[0]}: {len(records)} recordings for {len(codes)} languages ({', '.join(codes)})")
    counts = [
        _counts(record, code, (model["layers"], model["units"])) for record, code in zip(records, codes, strict=True)
    ]
    folder.begin({"model": dict(model), "corpus": {"source": f"imported from {Path(paths[0]).name}"}})
    for code, (tokens, active) in zip(codes, counts, strict=True):
        folder.write_counts(code, active, tokens)


def holds_recording(path: str | Path) -> bool:
    """Whether a file holds counts rather than lists of neurons."""
    content = _load(path)
    first = content[0] if isinstance(content, list) and content else content
    return isinstance(first, dict) and "over_zero" in first


def _records(path: str | Path) -> list[Mapping[str, Any]]:
    content = _load(path)
    records = content if isinstance(content, list) else [content]
    if not all(isinstance(record, dict) and "over_zero" in record for record in records):
        raise NeuronSetError(f'{path}: expected {{"n", "over_zero"}} or a list of them, got {type(content).__name__}')
    return records


def _counts(record: Mapping[str, Any], code: str, shape: tuple[int, int]) -> tuple[int, NDArray[np.int64]]:
    """(tokens, (layer, unit) counts) of one language, checked."""
    if "lang" in record and normalise(str(record["lang"])) != code:
        raise NeuronSetError(f"the recording is of {record['lang']}, the language given at its position is {code}")
    name = next((name for name in ("n", "num", "total_tokens") if name in record), None)
    if name is None:
        raise NeuronSetError(f"{code}: no number of tokens with over_zero, got {', '.join(map(str, record))}")
    tokens = int(record[name])
    active = _whole(record["over_zero"], f"{code}: counts")
    if active.shape != shape:
        raise NeuronSetError(
            f"{code}: counts of shape {active.shape}, the model has {shape[0]} layers of {shape[1]} units"
        )
    if (active < 0).any() or (active > tokens).any():
        raise NeuronSetError(f"{code}: a unit is active on more tokens ({active.max()}) than were counted ({tokens})")
    return tokens, active


def _rows(layers: Sequence[torch.Tensor]) -> Neurons:
    """Sorted (layer, unit) rows; indices may be floating-point, as lang-task-neuron stores some."""
    parts = [np.zeros((0, 2), dtype=np.int64)]
    for layer, units in enumerate(layers):
        indices = np.unique(_whole(units, f"layer {layer}: indices"))
        parts.append(np.column_stack([np.full(len(indices), layer), indices]).astype(np.int64))
    return np.concatenate(parts)


def _whole(values: Any, what: str) -> NDArray[np.int64]:
    """Whole numbers; a mask of booleans or a fraction would be read as other neurons than were meant."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise NeuronSetError(f"{what}: expected numbers, got {type(values).__name__}") from None
    if tensor.dtype == torch.bool or (tensor.is_floating_point() and not torch.equal(tensor, tensor.round())):
        raise NeuronSetError(f"{what}: expected whole numbers, got {tensor.dtype} with other values")
    return tensor.long().numpy()


def _check_dictionary(path: str | Path, codes: Sequence[str]) -> None:
    content = _load(path)
    if not isinstance(content, dict):
        raise NeuronSetError(f"{path}: expected a dictionary from index to language, got {type(content).__name__}")
    order = tuple(normalise(str(content[index])) for index in sorted(content))
    if order != tuple(codes):
        raise NeuronSetError(
            f"{path}: the dictionary has {', '.join(order)}; the languages given are {', '.join(codes)}"
        )


def _load(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise NeuronSetError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise NeuronSetError(f"{path}: the file holds code or unknown objects and was not opened") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise NeuronSetError(f"{path}: not a file of torch.save, or cut short ({str(error).splitlines()[0]})") from None
