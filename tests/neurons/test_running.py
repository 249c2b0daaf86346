"""Recording and calibration against plain loops over one sentence at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_steering import resources
from lm_eval_steering.architectures import sites_of
from lm_eval_steering.architectures.loading import Bos, LazyModel
from lm_eval_steering.errors import CorpusError, DidNotHappenError, RecordingError, SteeringError
from lm_eval_steering.neurons.calibrate import calibrate
from lm_eval_steering.neurons.find import Method, find_with
from lm_eval_steering.neurons.neuron_set import Statistics
from lm_eval_steering.neurons.recorder import Recorder, Search
from lm_eval_steering.neurons.recording import RecordingFolder
from lm_eval_steering.neurons.rows import TokenRows, sentence_rows
from lm_eval_steering.neurons.running import Batches, ModelRunner, Ranks, Side, count_active, sentence_means
from tests.conftest import UNITS, tiny_model, tiny_tokenizer

ROWS = {
    "fra_Latn": [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5], [9, 9, 3, 4]],
    "deu_Latn": [[20, 21], [22, 23, 24, 25], [30] * 9],
}
NEURONS = np.array([[0, 1], [0, 5], [2, 3]])


def captured(model: torch.nn.Module, row: list[int], units: int = UNITS, bos: int = 0) -> dict[str, torch.Tensor]:
    """site -> (layer, position, unit) of one row after BOS, without padding or batching."""
    found: dict[str, list[torch.Tensor]] = {"activation": [], "product": []}
    handles = []
    for site in sites_of(model).layers:
        handles.append(
            site.activation.register_forward_hook(
                lambda _m, _i, out: found["activation"].append(out.reshape(-1, units))
            )
        )
        handles.append(
            site.down.register_forward_pre_hook(
                lambda _m, inputs: found["product"].append(inputs[0].reshape(-1, units))
            )
        )
    with torch.no_grad():
        model(torch.tensor([[bos, *row]]))
    for handle in handles:
        handle.remove()
    return {site: torch.stack(layers)[:, 1:] for site, layers in found.items()}


def batches(model: Any, rows: list[list[int]], size: int, side: Side = "right", ranks: Ranks | None = None) -> Batches:
    return Batches(TokenRows.of(rows), [0], sites_of(model), size, ranks, side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_counts_equal_a_plain_loop(model: torch.nn.Module, batch_size: int, side: Side) -> None:
    if side == "right" or model.config._attn_implementation != "eager":
        model.double()  # transformers' eager attention gives NaN for left padding in float64 (bloom, gemma2, mpt)
    for rows in ROWS.values():
        found = count_active(sites_of(model), batches(model, rows, batch_size, side))
        expected = sum((captured(model, row)["activation"] > 0).sum(1) for row in rows)
        assert np.array_equal(found, expected.numpy())


def test_shares_of_three_processes_add_up_to_the_whole(model: torch.nn.Module) -> None:
    rows = ROWS["fra_Latn"] + ROWS["deu_Latn"]
    shares = [batches(model, rows, 2, ranks=Ranks(rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 1, 1]
    whole = count_active(sites_of(model), batches(model, rows, 2))
    assert np.array_equal(sum(count_active(sites_of(model), share) for share in shares), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_demo_model_over_real_text(shared_data: Path, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resources.demo_model())
    text = (shared_data / "demo_corpus" / "fra.valid.txt").read_text(encoding="utf-8").splitlines()
    rows = sentence_rows(text[:25], tokenizer, 100)
    model = AutoModelForCausalLM.from_pretrained(resources.demo_model(), dtype=dtype).eval()
    sites = sites_of(model)
    expected = sum(
        (captured(model, row.tolist(), sites.shape.units, tokenizer.bos_token_id)["activation"] > 0).sum(1)
        for row in rows
    ).numpy()
    # In float32 an activation next to zero can change its sign with the shape of the batch.
    allowed = 0 if dtype == torch.float64 else 1e-6 * rows.tokens * expected.size
    for side in ("right", "left"):
        for batch_size in (1, 3, 16):
            found = count_active(sites, Batches(rows, [tokenizer.bos_token_id], sites, batch_size, side=side))
            assert np.abs(found - expected).sum() <= allowed, (side, batch_size)


def test_statistics_equal_a_plain_loop(model: torch.nn.Module) -> None:
    model.double()
    runner = ModelRunner(LazyModel.of(model, tiny_tokenizer()), batch_size=2)
    found = calibrate(runner, {code: TokenRows.of(rows) for code, rows in ROWS.items()}, NEURONS)
    for site in ("activation", "product"):
        for k, rows in enumerate(ROWS.values()):
            units = [captured(model, row)[site][NEURONS[:, 0], :, NEURONS[:, 1]].numpy() for row in rows]
            means = np.array([unit.mean(axis=1) for unit in units])
            ordered = np.sort(means, axis=0)
            expected = {
                "mean": np.concatenate(units, axis=1).mean(axis=1),
                "sentence_mean": means.mean(axis=0),
                "median": ordered[(len(rows) - 1) // 2],
                "max": means.max(axis=0),
                "token_max": np.concatenate(units, axis=1).max(axis=1),
                "p10": np.percentile(means, 10, axis=0),
            }
            for name, values in expected.items():
                assert np.allclose(found.values[site][name][:, k], values, atol=1e-6), (site, name)


class InThreads(Ranks):
    """One of several processes, each a thread here, that gather in memory."""

    def __init__(self, rank: int, meeting: Barrier, values: list[Any]) -> None:
        super().__init__(rank, meeting.parties)
        self.meeting, self.values = meeting, values

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meeting.wait(60)
        gathered = list(self.values)
        self.meeting.wait(60)
        return gathered


def test_statistics_of_three_processes_are_those_of_one() -> None:
    rows = {code: TokenRows.of(rows) for code, rows in ROWS.items()}  # 2 batches for 3 processes: one has none

    models = [LazyModel.of(tiny_model("llama").double(), tiny_tokenizer()) for _ in range(3)]

    def found(ranks: Ranks) -> Statistics:
        return calibrate(ModelRunner(models[ranks.rank], batch_size=2, ranks=ranks), rows, NEURONS)

    meeting, values = Barrier(3), [None] * 3
    with ThreadPoolExecutor(3) as pool:
        of_three = list(pool.map(lambda rank: found(InThreads(rank, meeting, values)), range(3)))
    alone = found(Ranks()).values
    assert "token_max" in alone["activation"]
    for statistics in of_three:
        for site, tables in alone.items():
            assert all(np.array_equal(statistics.values[site][name], table) for name, table in tables.items())


def test_sentence_means_equal_a_plain_loop(model: torch.nn.Module) -> None:
    model.double()
    rows = ROWS["fra_Latn"]
    found = sentence_means(sites_of(model), batches(model, rows, 3))
    expected = np.stack([captured(model, row)["activation"].mean(1).numpy() for row in rows])
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-6)


def test_a_bypassed_activation_is_an_error() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(DidNotHappenError, match=r"layers \[1\]: activations seen 0 times in one forward pass"):
        count_active(sites_of(model), batches(model, ROWS["fra_Latn"], 4))


def test_overflow_is_an_error_and_not_an_inactive_unit() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(DidNotHappenError, match="infinities or NaN"):
        count_active(sites_of(model), batches(model, ROWS["fra_Latn"], 4))
    runner = ModelRunner(LazyModel.of(model, tiny_tokenizer()))
    with pytest.raises(DidNotHappenError, match="fra_Latn: activations hold infinities or NaN"):
        calibrate(runner, {"fra_Latn": TokenRows.of(ROWS["fra_Latn"])}, NEURONS)


def test_nothing_to_record_is_an_error(model: torch.nn.Module) -> None:
    with pytest.raises(CorpusError, match="no tokens"):
        count_active(sites_of(model), batches(model, [[]], 4))


class Adding:
    """The tiny tokenizer without BOS of its own, or with other special tokens before a text."""

    def __init__(self, before: tuple[str, ...] = (), bos: str | None = "<s>", eos: str | None = "<s>") -> None:
        self.tokenizer = tiny_tokenizer()
        pieces = " ".join([*before, "$A"])
        special = [(token, self.tokenizer.convert_tokens_to_ids(token)) for token in before]
        self.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(pieces, special_tokens=special)
        self.tokenizer.bos_token, self.tokenizer.eos_token = bos, eos

    def prefix(self, bos: Bos = "auto") -> tuple[int, ...]:
        return LazyModel.of(tiny_model("llama"), self.tokenizer).prefix(bos)


def test_the_prefix_is_the_one_that_evaluation_shows() -> None:
    assert Adding(("<s>",)).prefix() == (0,)
    assert Adding(("<pad>", "<s>")).prefix() == (1, 0), "what the tokenizer adds itself"
    assert Adding().prefix() == (0,), "a BOS that it does not add is lm-eval's prefix token"
    assert Adding(bos=None).prefix() == (0,), "EOS where there is no BOS, as lm-eval's prefix_token_id"
    assert Adding(bos=None, eos=None).prefix() == ()
    assert Adding(("<pad>", "<s>")).prefix("always") == (0,)
    assert Adding(("<s>",)).prefix("never") == ()
    with pytest.raises(SteeringError, match="bos=always, and the tokenizer has neither BOS nor EOS"):
        Adding(bos=None, eos=None).prefix("always")


@pytest.mark.parametrize("before", [(), ("<s>",)])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_the_prefix_is_that_of_lm_evals_rolling_request(before: tuple[str, ...], bos: str | None) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    seen: list[list[int]] = []
    model, adding = tiny_model("llama"), Adding(before, bos)
    lm = HFLM(model, tokenizer=adding.tokenizer, batch_size=1)
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append([*args, *kwargs.values()][0][0].tolist()), with_kwargs=True
    )
    lm.loglikelihood([Instance("loglikelihood", {}, ("", "w1 w2"), 0)], disable_tqdm=True)
    prefix = adding.prefix()
    assert tuple(seen[0][: len(prefix)]) == prefix


def test_the_recording_and_the_set_name_the_prefix(tmp_path: Path) -> None:
    for number in range(2):
        words = [" ".join(f"w{i + 20 * number}" for i in range(1, 9))] * 3
        (tmp_path / f"{['fra', 'deu'][number]}_Latn.txt").write_text("\n".join(words))
    search = Search(str(tmp_path), ("fra_Latn", "deu_Latn"), rows="sentences")
    counts = {}
    for bos in ("auto", "never"):
        runner = ModelRunner(LazyModel.of(tiny_model("llama"), tiny_tokenizer()), bos=bos)
        recorder = Recorder(runner, search, RecordingFolder(tmp_path / f"recording-{bos}"))
        (found,) = find_with(recorder, Method(rates=(0.2,)))
        expected = ["<s>"] if bos == "auto" else []
        assert found.provenance.corpus["prefix"] == found.provenance.corpus["calibration"]["prefix"] == expected
        counts[bos] = recorder.record().counts
    assert not np.array_equal(counts["auto"], counts["never"]), "the model saw the prefix in neither"
    runner = ModelRunner(LazyModel.of(tiny_model("llama"), tiny_tokenizer()), bos="never")
    with pytest.raises(RecordingError, match=r'corpus\.prefix: \["<s>"\] there, \[\] asked for'):
        Recorder(runner, search, RecordingFolder(tmp_path / "recording-auto")).record()
