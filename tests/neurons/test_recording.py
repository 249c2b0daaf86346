"""Recording and calibration against plain loops over one sentence at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

from lm_eval_steering.architectures import sites_of
from lm_eval_steering.errors import CorpusError, DidNotHappenError, SteeringError
from lm_eval_steering.neurons.calibrate import calibrate
from lm_eval_steering.neurons.corpus import packed_rows, read_corpus, rows_hash, sentence_rows
from lm_eval_steering.neurons.find import Search, control_sets, find_neurons
from lm_eval_steering.neurons.observe import added_bos
from lm_eval_steering.neurons.recording import record
from tests.conftest import LAYERS, UNITS, tiny_model, tiny_tokenizer

ROWS = {
    "fra_Latn": [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5], [9, 9, 3, 4]],
    "deu_Latn": [[20, 21], [22, 23, 24, 25], [30] * 9],
}


def captured(model: torch.nn.Module, row: list[int]) -> dict[str, torch.Tensor]:
    """site -> (layer, position, unit) of one row after BOS, without padding or batching."""
    found: dict[str, list[torch.Tensor]] = {"activation": [], "product": []}
    handles = []
    for site in sites_of(model).layers:
        handles.append(
            site.activation.register_forward_hook(
                lambda _m, _i, out: found["activation"].append(out.reshape(-1, UNITS))
            )
        )
        handles.append(
            site.down.register_forward_pre_hook(
                lambda _m, inputs: found["product"].append(inputs[0].reshape(-1, UNITS))
            )
        )
    with torch.no_grad():
        model(torch.tensor([[0, *row]]))
    for handle in handles:
        handle.remove()
    return {site: torch.stack(layers)[:, 1:] for site, layers in found.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_counts_equal_a_plain_loop(model: torch.nn.Module, batch_size: int) -> None:
    model.double()
    found = record(model, tiny_tokenizer(), ROWS, batch_size, progress=False)
    assert found.languages == ("fra_Latn", "deu_Latn")
    assert found.n_tokens.tolist() == [14, 15]
    for k, rows in enumerate(ROWS.values()):
        expected = sum((captured(model, row)["activation"] > 0).sum(1) for row in rows)
        assert np.array_equal(found.counts[:, :, k], expected.numpy())


def test_statistics_equal_a_plain_loop(model: torch.nn.Module) -> None:
    model.double()
    neurons = np.array([[0, 1], [0, 5], [2, 3]])
    found = calibrate(model, tiny_tokenizer(), ROWS, neurons, batch_size=2, progress=False)
    for site in ("activation", "product"):
        for k, rows in enumerate(ROWS.values()):
            units = [captured(model, row)[site][neurons[:, 0], :, neurons[:, 1]].numpy() for row in rows]
            means = np.array([unit.mean(axis=1) for unit in units])
            ordered = np.sort(means, axis=0)
            expected = {
                "mean": np.concatenate(units, axis=1).mean(axis=1),
                "sentence_mean": means.mean(axis=0),
                "median": ordered[(len(rows) - 1) // 2],
                "max": means.max(axis=0),
                "p10": np.percentile(means, 10, axis=0),
            }
            for name, values in expected.items():
                assert np.allclose(found.values[site][name][:, k], values, atol=1e-6), (site, name)


def test_a_bypassed_activation_is_an_error() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(DidNotHappenError, match=r"layers \[1\]: activations seen 0 times in 1 forwards"):
        record(model, tiny_tokenizer(), {"fra_Latn": ROWS["fra_Latn"]}, progress=False)


def test_a_language_without_tokens_is_named(model: torch.nn.Module) -> None:
    with pytest.raises(CorpusError, match="deu_Latn: no tokens"):
        record(model, tiny_tokenizer(), {**ROWS, "deu_Latn": [[]]}, progress=False)


def test_rows_are_packed_or_one_a_sentence() -> None:
    tokenizer = tiny_tokenizer()
    text = ["w0 w1 w2", "w3", "w4 w5 w6 w7"]
    assert packed_rows(text, tokenizer, 3) == [[3, 4, 5], [6, 7, 8], [9, 10]]
    assert packed_rows(text, tokenizer, 3, budget=4) == [[3, 4, 5], [6]]
    assert sentence_rows(text, tokenizer, 3) == [[3, 4, 5], [6], [7, 8, 9]]
    assert sentence_rows(text, tokenizer, 9, at_least=2, at_most=1) == [[3, 4, 5]]
    assert sentence_rows(text, tokenizer, 9, budget=5) == [[3, 4, 5], [6], [7]]


def test_the_hash_of_the_text_depends_on_rows_and_languages() -> None:
    hashes = {rows_hash({"a": [[1, 2]]}), rows_hash({"a": [[1], [2]]}), rows_hash({"b": [[1, 2]]})}
    assert len(hashes) == 3


def test_corpus_errors_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "fra_Latn.txt").write_bytes(b"bonjour\nmal\xff\n")
    with pytest.raises(CorpusError, match=r"fra_Latn\.txt, line 2: not UTF-8"):
        read_corpus(tmp_path, ["fra_Latn"])
    (tmp_path / "deu_Latn.txt").write_text("\n \n")
    with pytest.raises(CorpusError, match=r"deu_Latn: .* is empty"):
        read_corpus(str(tmp_path / "{lang}.txt"), ["deu_Latn"])
    with pytest.raises(CorpusError, match="eng_Latn: no file"):
        read_corpus(tmp_path, ["eng_Latn"])
    with pytest.raises(CorpusError, match="expected a folder"):
        read_corpus(tmp_path / "nowhere", ["eng_Latn"])


def test_find_gives_a_complete_set_with_matched_controls(model: torch.nn.Module, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for code, low in (("fra_Latn", 0), ("deu_Latn", 30)):
        lines = [" ".join(f"w{i}" for i in generator.integers(low, low + 25, size=8)) for _ in range(12)]
        (tmp_path / f"{code}.txt").write_text("\n".join(lines))
    search = Search(str(tmp_path), ("fra_Latn", "deu_Latn"), rate=0.2, rows="sentences")
    found, recording = find_neurons(model, tiny_tokenizer(), search, progress=False)
    again, _ = find_neurons(model, tiny_tokenizer(), search, progress=False)
    assert found.content_hash() == again.content_hash()
    assert recording.n_tokens.tolist() == [96, 96]
    assert found.shape == (LAYERS, UNITS)
    assert len(found.union()) > 0
    (control,) = control_sets(model, tiny_tokenizer(), search, found, [7], progress=False)
    assert control.provenance.selection["matched_to"] == found.content_hash()
    assert control.statistics is not None
    assert np.array_equal(control.statistics.neurons, control.union())
    for code in found.languages:
        assert len(control.neurons(code)) == len(found.neurons(code))


def test_bos_is_shown_where_the_tokenizer_adds_it_and_nowhere_else() -> None:
    tokenizer = tiny_tokenizer()
    assert added_bos(tokenizer) == [0]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert tokenizer.bos_token_id == 0 and added_bos(tokenizer) == []


def test_a_search_that_cannot_be_meant_is_refused(family: str, model: torch.nn.Module, tmp_path: Path) -> None:
    for code in ("fra_Latn", "deu_Latn"):
        (tmp_path / f"{code}.txt").write_text("w1 w2 w3 w4 w5 w6\n")
    with pytest.raises(SteeringError, match="name at least two"):
        Search(str(tmp_path), ("fra_Latn",)).check()
    if family == "bloom":  # places tokens by distance, and its config names no longest text
        return
    with pytest.raises(SteeringError, match="context=100: the model reads at most 63"):
        find_neurons(model, tiny_tokenizer(), Search(str(tmp_path), ("fra_Latn", "deu_Latn"), context=100))
