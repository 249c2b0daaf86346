"""The whole way from text to a neuron set: resumed, refused, in several processes, by every method."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_eval_steering import resources
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.cli import app
from lm_eval_steering.errors import CorpusError, DidNotHappenError, NeuronSetError, RecordingError, SteeringError
from lm_eval_steering.neurons.calibrate import calibrated
from lm_eval_steering.neurons.find import Method, control_sets, find_neurons, find_with, random_set, select
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.neurons.recorder import Recorder, Search
from lm_eval_steering.neurons.recording import RecordingFolder
from lm_eval_steering.neurons.running import ModelRunner
from tests.commands import ended, forked
from tests.conftest import LAYERS, UNITS, tiny_model, tiny_tokenizer

LANGUAGES = ("fra_Latn", "deu_Latn", "tur_Latn")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, code in enumerate(LANGUAGES):
        lines = [" ".join(f"w{i + 15 * number}" for i in generator.integers(0, 25, size=8)) for _ in range(12)]
        (folder / f"{code}.txt").write_text("\n".join(lines))
    return folder


def recorder_of(
    text: Path, folder: Path, model: Any = None, languages: tuple[str, ...] = LANGUAGES, **search: Any
) -> Recorder:
    lazy = LazyModel.of(model or tiny_model("llama"), tiny_tokenizer())
    return Recorder(ModelRunner(lazy, batch_size=4), Search(str(text), languages, **search), RecordingFolder(folder))


def test_a_set_is_complete_and_the_same_each_time(model: torch.nn.Module, text: Path, tmp_path: Path) -> None:
    method = Method(rates=(0.2,))
    (found,) = find_with(recorder_of(text, tmp_path / "a", model, rows="sentences"), method)
    (again,) = find_with(recorder_of(text, tmp_path / "b", model, rows="sentences"), method)
    for name, neuron_set in (("a", found), ("b", again)):
        neuron_set.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert NeuronSet.load(tmp_path / "a.safetensors").content_hash() == found.content_hash()
    assert found.shape == (LAYERS, UNITS)
    assert 0 < len(found.union()) <= round(0.2 * LAYERS * UNITS)
    provenance = found.provenance
    assert provenance.corpus["tokens"] == dict.fromkeys(LANGUAGES, 96)
    assert provenance.corpus["source"] == "text" and len(provenance.corpus["sha256"]["fra_Latn"]) == 64
    assert provenance.corpus["calibration"]["sentences"] == dict.fromkeys(LANGUAGES, 12)
    assert provenance.selection["method"] == "lape" and len(provenance.tokenizer) == 64
    assert str(tmp_path) not in json.dumps(provenance.corpus), "a path of this machine in an artefact"


def test_random_controls_match_and_are_calibrated_on_the_same_text(text: Path, tmp_path: Path) -> None:
    recorder = recorder_of(text, tmp_path / "a")
    (found,) = find_with(recorder, Method(rates=(0.2,)))
    (control,) = control_sets(found, recorder, [7])
    assert control.provenance.selection["matched_to"] == found.content_hash()
    assert control.provenance.corpus["calibration"] == found.provenance.corpus["calibration"]
    assert control.calibrated is not None
    assert np.array_equal(control.calibrated.neurons, control.union())
    for code in found.languages:
        assert len(control.neurons(code)) == len(found.neurons(code))
    # The verb that calibrates on its own gives the same values.
    (alone,) = calibrated([random_set(found, 7)], recorder.runner, recorder.sentences(), "text")
    assert alone.content_hash() == control.content_hash()


def test_hidden_states_are_measured_only_where_that_is_asked_for(text: Path, tmp_path: Path) -> None:
    method = Method(rates=(0.2,))
    (plain,) = find_with(recorder_of(text, tmp_path / "a"), method)
    recorder = recorder_of(text, tmp_path / "a", residual=True)
    (found,) = find_with(recorder, method)
    assert plain.residual == {} and "residual" not in plain.provenance.corpus
    assert {name: table.shape for name, table in found.residual.items()} == dict.fromkeys(
        ("mean", "std"), (LAYERS, 16, len(LANGUAGES))
    )
    assert found.provenance.corpus["residual"] == found.provenance.corpus["calibration"]
    assert replace(found, residual={}).content_hash() == plain.content_hash() != found.content_hash()
    found.save(tmp_path / "set.safetensors")
    assert NeuronSet.load(tmp_path / "set.safetensors").content_hash() == found.content_hash()
    # A control needs no text for them, and calibrating its neurons leaves them as they were drawn.
    (control,) = control_sets(found, recorder, [7])
    assert np.array_equal(control.residual["mean"], random_set(found, 7).residual["mean"])
    assert not np.allclose(control.residual["mean"], found.residual["mean"])
    with pytest.raises(NeuronSetError, match=r"--residual on a random control: .* random directions"):
        calibrated([control], recorder.runner, recorder.sentences(), "text", residual=True)


def test_one_recording_serves_every_selection(text: Path, tmp_path: Path) -> None:
    recorder = recorder_of(text, tmp_path / "a")
    recording = recorder.record(with_sentences=True)
    small, large = select(recording, Method(rates=(0.05, 0.3)))
    for code in LANGUAGES:
        assert {tuple(row) for row in small.neurons(code)} <= {tuple(row) for row in large.neurons(code)}
    (activated,) = select(recording, Method("activated"))
    means = [recording.sentence_means[k] for k in range(3)]
    assert np.array_equal(activated.neurons("deu"), np.argwhere((means[1] > 0).all(axis=0)))
    (precise,) = select(recording, Method("average-precision", top_k=5))
    assert [len(precise.neurons(code)) for code in LANGUAGES] == [5, 5, 5]
    part = RecordingFolder(tmp_path / "a").load(["tur_Latn", "fra_Latn"])
    assert np.array_equal(part.counts, recording.counts[:, :, [2, 0]])


def test_the_function_finds_what_the_command_finds(text: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    method, recording = Method(rates=(0.2,)), tmp_path / "recording"
    (found,) = find_neurons(
        tmp_path / "model", text, ["fr", "deu", "tur_Latn"], recording, method, batch_size=4, show_progress=False
    )
    found.save(tmp_path / "function.safetensors")
    command = ["find", "--model", tmp_path / "model", "--corpus", text, "--languages", ",".join(LANGUAGES)]
    command += ["--rate", "0.2", "--batch-size", "4", "--out", tmp_path / "command.safetensors"]
    app(list(map(str, command)), standalone_mode=False)
    assert (tmp_path / "function.safetensors").read_bytes() == (tmp_path / "command.safetensors").read_bytes()
    (selected,) = select(recording, method)
    assert all(np.array_equal(selected.neurons(code), found.neurons(code)) for code in LANGUAGES)


def test_only_what_is_missing_is_done(text: Path, tmp_path: Path) -> None:
    recorder_of(text, tmp_path / "a", languages=LANGUAGES[:2]).record()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a" / "counts").iterdir()}
    whole = recorder_of(text, tmp_path / "a").record()
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a" / "counts").iterdir()}
    assert {name: after[name] for name in before} == before and len(after) == 3
    assert np.array_equal(whole.counts, recorder_of(text, tmp_path / "b").record().counts)
    broken = tiny_model("llama")
    broken.forward = broken.model.forward = None  # everything is there: the model is not run
    assert np.array_equal(recorder_of(text, tmp_path / "a", broken).record().counts, whole.counts)
    assert recorder_of(text, tmp_path / "a").record(with_sentences=True).sentence_means[0].shape == (12, LAYERS, UNITS)


def test_other_settings_text_or_weights_are_refused(text: Path, tmp_path: Path) -> None:
    recorder_of(text, tmp_path / "a", tokens=50).record()
    with pytest.raises(RecordingError, match=r"other settings \(corpus\.budget: 50 there, 60 asked for\)"):
        recorder_of(text, tmp_path / "a", tokens=60).record()
    with pytest.raises(RecordingError, match=r'model\.architecture: "llama" there, "gpt2" asked for'):
        recorder_of(text, tmp_path / "a", tiny_model("gpt2"), tokens=50).record()
    (tmp_path / "a" / "counts" / "tur_Latn.safetensors").unlink()
    torch.manual_seed(1)
    tuned = tiny_model("llama")
    for parameter in tuned.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(RecordingError, match="deu_Latn was recorded with other weights"):
        recorder_of(text, tmp_path / "a", tuned, tokens=50).record()
    (text / "deu_Latn.txt").write_text("w1 w2 w3 w4 w5 w6")
    with pytest.raises(RecordingError, match="the text of deu_Latn has changed"):
        recorder_of(text, tmp_path / "a", tokens=50).record()
    (tmp_path / "a" / "tokens" / "deu_Latn.safetensors").unlink()  # counted from another text than would be read now
    with pytest.raises(RecordingError, match="the text of deu_Latn has changed"):
        recorder_of(text, tmp_path / "a", tokens=50).record()


def test_a_small_change_of_the_weights_or_of_bos_is_another_model(text: Path, tmp_path: Path) -> None:
    recorder_of(text, tmp_path / "a", languages=LANGUAGES[:2]).record()
    tuned = tiny_model("llama")
    for parameter in tuned.parameters():
        parameter.data.mul_(1.003)
    with pytest.raises(RecordingError, match="was recorded with other weights"):
        recorder_of(text, tmp_path / "a", tuned).record()
    other = recorder_of(text, tmp_path / "a")
    other.model.tokenizer.bos_token = None
    with pytest.raises(RecordingError, match=r"model\.tokenizer"):
        other.record()


def test_an_unfinished_recording_is_not_selected_from_by_default(text: Path, tmp_path: Path) -> None:
    recorder_of(text, tmp_path / "a").record()
    (tmp_path / "a" / "counts" / "tur_Latn.safetensors").unlink()
    (tmp_path / "a" / "counts" / "tur_Latn.safetensors.7.partial").touch()
    with pytest.raises(RecordingError, match="not finished, tur_Latn not recorded yet"):
        RecordingFolder(tmp_path / "a").load()
    assert RecordingFolder(tmp_path / "a").load(LANGUAGES[:2]).languages == LANGUAGES[:2]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recording.json.7.partial").touch()  # killed before it began
    recorder_of(text, tmp_path / "b").record()


def test_one_text_for_two_languages_is_refused(text: Path, tmp_path: Path) -> None:
    (text / "tur_Latn.txt").write_text((text / "deu_Latn.txt").read_text())
    with pytest.raises(CorpusError, match="deu_Latn and tur_Latn have the same text"):
        recorder_of(text, tmp_path / "a").record()


def test_special_tokens_that_a_text_spells_out_are_not_counted(text: Path, tmp_path: Path) -> None:
    clean = recorder_of(text, tmp_path / "a", rows="sentences").record()
    for file in text.iterdir():
        file.write_text(file.read_text().replace("\n", " <s>\n"))
    spelled = recorder_of(text, tmp_path / "b", rows="sentences").record()
    assert 0 not in RecordingFolder(tmp_path / "b").text("fra_Latn").rows.ids
    assert (spelled.n_tokens >= clean.n_tokens).all()


def test_damaged_files_are_refused(text: Path, tmp_path: Path) -> None:
    recorder_of(text, tmp_path / "a").record()
    file = tmp_path / "a" / "counts" / "deu_Latn.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RecordingError, match=r"deu_Latn\.safetensors: not a whole safetensors file"):
        RecordingFolder(tmp_path / "a").load()
    with pytest.raises(RecordingError, match=r"ita_Latn not recorded; recorded: deu_Latn, fra_Latn, tur_Latn"):
        RecordingFolder(tmp_path / "a").load(["ita_Latn"])
    with pytest.raises(RecordingError, match=r"no means over sentences; record again with --sentence-means"):
        RecordingFolder(tmp_path / "a").load(["fra_Latn", "tur_Latn"], with_sentences=True)
    with pytest.raises(RecordingError, match="no recording; make one with"):
        RecordingFolder(tmp_path / "nowhere").load()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(RecordingError, match=r"a folder without recording\.json"):
        recorder_of(text, tmp_path / "other").record()


def test_a_model_that_overflows_leaves_nothing_behind(text: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(DidNotHappenError, match="infinities or NaN"):
        recorder_of(text, tmp_path / "a", model).record()
    assert RecordingFolder(tmp_path / "a").languages() == ()


def test_what_cannot_be_meant_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="name at least two"):
        find_with(recorder_of(text, tmp_path / "a", languages=("fra_Latn",)))
    with pytest.raises(SteeringError, match="context=100: the model reads at most 63"):
        recorder_of(text, tmp_path / "a", context=100).record()
    with pytest.raises(CorpusError, match="a budget of 0 tokens"):
        recorder_of(text, tmp_path / "a", tokens=0)
    (text / "tur_Latn.txt").write_text("w1 w2")
    with pytest.raises(CorpusError, match="tur_Latn: no line of at least 5 tokens"):
        recorder_of(text, tmp_path / "a").record()
    assert not (tmp_path / "a" / "counts").exists()
    with pytest.raises(SteeringError, match="top-k, bottom-k and threshold belong to the other methods"):
        Method("lape", top_k=3)
    with pytest.raises(NeuronSetError, match=r"the neuron set is for .* the model is gpt2"):
        (found,) = find_with(recorder_of(text, tmp_path / "b", languages=LANGUAGES[:2]), Method(rates=(0.2,)))
        calibrated([found], recorder_of(text, tmp_path / "c", tiny_model("gpt2")).runner, {}, "text")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lm_eval_steering", *map(str, arguments)]


def find_arguments(out: Path) -> list[str | Path]:
    codes = "fra_Latn,deu_Latn,tur_Latn,jpn_Jpan"
    return ["--model", resources.demo_model(), "--corpus", resources.demo_calibration(), "--languages", codes,
            "--rows", "sentences", "--batch-size", "4", "--rate", "0.05", "--out", out]  # fmt: skip


def in_this_process(*arguments: str | Path) -> int:
    app([str(argument) for argument in arguments], standalone_mode=False)
    return 0


@pytest.mark.usefixtures("one_thread")
def test_a_language_that_was_begun_goes_on_where_it_was(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval_steering.neurons.recorder._BATCHES_PER_CHECKPOINT", 1)
    whole = recorder_of(text, tmp_path / "whole", rows="sentences").record()
    assert not list((tmp_path / "whole" / "partial").iterdir())

    passes = []

    def dying_after(number: int) -> torch.nn.Module:
        model = tiny_model("llama")

        def count(*_: Any) -> None:
            passes.append(1)
            if len(passes) > number:
                raise KeyboardInterrupt

        model.model.register_forward_pre_hook(count)
        return model

    # One pass to measure the speed, twice; of the first language's three batches two.
    with pytest.raises(KeyboardInterrupt):
        recorder_of(text, tmp_path / "killed", dying_after(4), rows="sentences").record()
    assert [file.stem for file in (tmp_path / "killed" / "partial").iterdir()] == [LANGUAGES[0]]
    passes.clear()
    again = recorder_of(text, tmp_path / "killed", dying_after(1000), rows="sentences").record()
    assert np.array_equal(again.counts, whole.counts)
    assert len(passes) == 2 + 1 + 3 + 3

    # Batches of another size are another computation: nothing of it is taken over.
    passes.clear()
    with pytest.raises(KeyboardInterrupt):
        recorder_of(text, tmp_path / "other", dying_after(4), rows="sentences").record()
    passes.clear()
    other = recorder_of(text, tmp_path / "other", dying_after(1000), rows="sentences")
    other.runner.batch_size = 6
    assert np.array_equal(other.record().counts, whole.counts) and len(passes) == 2 + 2 + 2 + 2


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole" / "m.safetensors", tmp_path / "killed" / "m.safetensors"
    in_this_process("find", *find_arguments(whole))
    process = forked(lambda: in_this_process("find", *find_arguments(killed)))
    counts = tmp_path / "killed" / "m.recording" / "counts"
    deadline = time.monotonic() + 120
    while len(list(counts.glob("*.safetensors"))) < 2:  # the third language is being recorded
        assert os.waitpid(process, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    assert not killed.exists()
    done = {file: file.stat().st_mtime_ns for file in counts.glob("*.safetensors")}
    in_this_process("find", *find_arguments(killed))
    assert killed.read_bytes() == whole.read_bytes()
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in done.items()), "a finished language was done again"


@pytest.mark.usefixtures("one_thread")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    shared = ["record", *find_arguments(tmp_path)[:-4], "--sentence-means", "--sentences", "20", "--tokens", "1500"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    in_this_process(*shared, "--out", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--redirects", "3"]
    launch += ["--log-dir", str(tmp_path / "logs")]
    subprocess.run(
        [*launch, *command(*shared, "--out", tmp_path / "two")[1:]], check=True, capture_output=True, env=environment
    )
    printed = {file.parent.name: file.read_text() for file in (tmp_path / "logs").rglob("stdout.log")}
    assert sorted(printed) == ["0", "1"] and "wrote" in printed["0"] and not printed["1"], "not two processes at work"
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 12  # tokens, counts and sentences of four languages
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    log = json.loads((tmp_path / "two" / "record.log.json").read_text())
    assert {step["processes"] for step in log["steps"] if step["what"] == "record"} == {2}


def test_a_mistake_ends_every_process_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    arguments = ["record", "--model", resources.demo_model(), "--corpus", tmp_path / "text", "--languages", "fr,de"]
    done = subprocess.run(
        [*launch, *command(*arguments, "--out", tmp_path / "out")[1:]],
        check=False, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "corpus for fra_Latn: no file" in done.stderr


def test_a_second_run_names_what_it_reuses(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed_by(languages: tuple[str, ...]) -> str:
        recorder = recorder_of(text, tmp_path / "a", languages=languages)
        recorder.log.show = True
        recorder.record()
        return capsys.readouterr().err

    assert "reading text" in (first := printed_by(LANGUAGES[:2])) and "reused" not in first
    second = printed_by(LANGUAGES)
    for what in ("text", "counts"):
        assert f"{what} of {', '.join(LANGUAGES[:2])}: reused from {tmp_path / 'a'}" in second
    third = printed_by(LANGUAGES)
    assert f"counts of {', '.join(LANGUAGES)}: reused" in third and "reading text" not in third
