"""The commands on neuron sets as a user types them; bad input gives one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lm_eval_steering import NeuronSet, resources
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.cli import app
from lm_eval_steering.errors import SteeringError

CODES = "fra_Latn,deu_Latn,tur_Latn"


def run(*arguments: Any) -> str:
    """Output of a command; our errors are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of the demo model."""
    folder = tmp_path_factory.mktemp("recording") / "demo"
    run("record", *about_the_demo(), "--tokens", "1k", "--sentences", "10", "--sentence-means", "--out", folder)
    return folder


def about_the_demo() -> list[Any]:
    corpus = resources.demo_calibration()
    return ["--model", resources.demo_model(), "--corpus", corpus, "--languages", CODES, "--rows", "sentences"]


@pytest.fixture
def neuron_set(recording: Path, tmp_path: Path) -> Path:
    run("select", "--recording", recording, "--rate", "0.05", "--out", tmp_path / "set.safetensors")
    return tmp_path / "set.safetensors"


def test_one_recording_several_rates(recording: Path, tmp_path: Path) -> None:
    output = run(
        "select", "--recording", recording, "--rate", "0.01,0.05", "--out", tmp_path / "set-{rate}.safetensors"
    )
    small, large = (NeuronSet.load(tmp_path / f"set-{rate}.safetensors") for rate in ("0.01", "0.05"))
    assert len(small.union()) < len(large.union())
    assert small.provenance.selection["rate"] == 0.01
    assert f"fra_Latn  {len(small.neurons('fra'))} neurons" in output


@pytest.mark.parametrize("method", [["activated"], ["average-precision", "--top-k", "20"]])
def test_other_methods_from_the_same_recording(recording: Path, method: list[str], tmp_path: Path) -> None:
    run("select", "--recording", recording, "--method", *method, "--out", tmp_path / "set.safetensors")
    assert NeuronSet.load(tmp_path / "set.safetensors").provenance.selection["method"] == method[0]


def test_calibrate_adds_statistics_to_a_set_without(neuron_set: Path, tmp_path: Path) -> None:
    assert NeuronSet.load(neuron_set).calibrated is None
    run(
        "calibrate",
        neuron_set,
        *about_the_demo()[:4],
        "--sentences",
        "10",
        "--out",
        tmp_path / "calibrated.safetensors",
    )
    found = NeuronSet.load(tmp_path / "calibrated.safetensors")
    assert found.calibrated is not None and found.calibrated.languages == tuple(sorted(CODES.split(",")))
    log = json.loads((tmp_path / "calibrated.log.json").read_text())
    assert {"command", "started", "seconds", "platform"} <= set(log)
    assert [step["what"] for step in log["steps"]] == ["load model", "calibrate"]
    assert found.residual == {}


def test_calibrate_measures_hidden_states_where_that_is_asked_for(neuron_set: Path, tmp_path: Path) -> None:
    options = [*about_the_demo()[:4], "--sentences", "5", "--residual"]
    run("calibrate", neuron_set, *options, "--out", tmp_path / "set.safetensors")
    found = NeuronSet.load(tmp_path / "set.safetensors")
    assert {name: table.shape for name, table in found.residual.items()} == dict.fromkeys(("mean", "std"), (6, 192, 3))
    printed = run("inspect", tmp_path / "set.safetensors", "--out", tmp_path / "pictures")
    assert "6 x 192 dimensions in 3 languages: mean std" in printed


def test_set_algebra_random_controls_and_export(neuron_set: Path, tmp_path: Path) -> None:
    found = NeuronSet.load(neuron_set)
    run("neurons", "random", neuron_set, "--seed", "3", "--out", tmp_path / "random.safetensors")
    run("neurons", "union", neuron_set, tmp_path / "random.safetensors", "--out", tmp_path / "union.safetensors")
    run("neurons", "subtract", tmp_path / "union.safetensors", neuron_set, "--out", tmp_path / "rest.safetensors")
    run("neurons", "intersect", tmp_path / "union.safetensors", neuron_set, "--out", tmp_path / "both.safetensors")
    for code in found.languages:
        rest, both = (NeuronSet.load(tmp_path / f"{name}.safetensors").neurons(code) for name in ("rest", "both"))
        assert np.array_equal(rest, NeuronSet.load(tmp_path / "random.safetensors").neurons(code))
        assert np.array_equal(both, found.neurons(code))
    output = run("neurons", "export", neuron_set, "--out", tmp_path / "lists.pth")
    assert ",".join(found.languages) in output
    options = ["--languages", ",".join(found.languages), "--model", resources.demo_model()]
    run("import", tmp_path / "lists.pth", *options, "--out", tmp_path / "again.safetensors")
    assert NeuronSet.load(tmp_path / "again.safetensors").content_hash() == found.content_hash()


@pytest.mark.parametrize("together", [True, False])
def test_counts_of_other_scripts_become_a_recording(recording: Path, tmp_path: Path, together: bool) -> None:
    from lm_eval_steering.neurons.recording import RecordingFolder

    ours = RecordingFolder(recording).load(CODES.split(","))
    records = [
        {"lang": code, "num": int(n), "over_zero": torch.from_numpy(ours.counts[:, :, k].astype(np.int32))}
        for k, (code, n) in enumerate(zip(ours.languages, ours.n_tokens, strict=True))
    ]
    files = [tmp_path / "all.pt"] if together else [tmp_path / f"activation.{k}" for k in range(3)]
    if together:
        torch.save(records, files[0])
    else:
        for file, record in zip(files, records, strict=True):
            torch.save({"n": record["num"], "over_zero": record["over_zero"]}, file)
    run("import", *files, "--languages", CODES, "--model", resources.demo_model(), "--out", tmp_path / "theirs")
    run("select", "--recording", tmp_path / "theirs", "--out", tmp_path / "theirs.safetensors", "--languages", CODES)
    run("select", "--recording", recording, "--out", tmp_path / "ours.safetensors", "--languages", CODES)
    theirs, own = (NeuronSet.load(tmp_path / f"{name}.safetensors") for name in ("theirs", "ours"))
    assert theirs.content_hash() == own.content_hash()


def test_inspect_prints_and_draws(tmp_path: Path) -> None:
    output = run("inspect", "demo", "--out", tmp_path / "pictures")
    assert "fra_Latn" in output and "lape" in output and "\x1b" not in output
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"{name}.{end}" for name in ("entropy", "neurons-by-layer", "overlap") for end in ("png", "svg")]


def corrupt(path: Path) -> Path:
    content = resources.find_neuron_set("demo").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def pickle_with_code(path: Path) -> Path:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (path.with_name("exploded"),)

    torch.save([Bomb()], path)
    return path


def bad_input(folder: Path) -> dict[str, tuple[list[Any], str]]:
    """What is wrong -> (arguments, what the line must say)."""
    text = folder / "text"
    text.mkdir()
    for code in CODES.split(","):
        (text / f"{code}.txt").write_text("eins zwei drei vier fünf sechs sieben acht\n" * 3)
    (text / "ita_Latn.txt").write_text("\n\n")
    (text / "spa_Latn.txt").write_bytes(b"uno dos tres cuatro cinco\nseis \xff\n")
    (text / "por_Latn.jsonl").write_text('{"body": "um"}\n')

    def find(codes: str = CODES, *more: Any) -> list[Any]:
        return ["find", "--model", resources.demo_model(), "--corpus", text, "--languages", codes,
                "--out", folder / "m.safetensors", *more]  # fmt: skip

    calibrate = ["--model", resources.demo_model(), "--corpus", text, "--out", folder / "c.safetensors"]
    importing = ["--languages", "fr", "--model", resources.demo_model(), "--out", folder / "i.safetensors"]
    return {
        "unknown language": (find("fra_Latn,french"), r"unknown language 'french'.*did you mean 'fra_Latn'"),
        "no such file": (find("fra_Latn,nld_Latn"), r"nld_Latn: no file .*nld_Latn\.txt"),
        "empty corpus": (find("fra_Latn,ita_Latn"), r"ita_Latn: .*ita_Latn\.txt is empty"),
        "missing column": (find("fra_Latn,por_Latn"), r"no column 'text', found body; name it with \?column=NAME"),
        "not UTF-8": (find("fra_Latn,spa_Latn"), r"spa_Latn\.txt, line 2: not UTF-8"),
        "rate 0": (find(CODES, "--rate", "0"), r"rate=0\.0: expected a number in \(0, 1\]"),
        "rate above 1": (find(CODES, "--rate", "1.5"), r"rate=1\.5: expected a number in \(0, 1\]"),
        "rate no number": (find(CODES, "--rate", "high"), r"--rate high: expected numbers in \(0, 1\]"),
        "rates in one file": (find(CODES, "--rate", "0.1,0.2"), r"several rates need \{rate\} in the name"),
        "budget of zero": (find(CODES, "--tokens", "0"), r"--tokens 0: expected a number above 0"),
        "budget no number": (find(CODES, "--tokens", "many"), r"--tokens many: expected a number above 0"),
        "batch size": (find(CODES, "--batch-size", "0"), r"--batch-size 0: expected auto, or a number above 0"),
        "one language": (find("fra_Latn"), r"name at least two"),
        "no such model": (["find", "--model", folder / "nowhere", *find()[3:]], r"model '.*nowhere'"),
        "out is a folder": ([*find()[:-1], text], r"expected a file in a folder that can be written"),
        "unknown option": ([*find()[:4], f"{text}?colum=x", *find()[5:]], r"did you mean 'column'"),
        "truncated set": (["inspect", corrupt(folder / "cut.safetensors")], r"not a whole safetensors file"),
        "no such set": (["inspect", "dmo"], r"neuron set 'dmo': no such file; did you mean 'demo'"),
        "set of another model": (["calibrate", of_another_model(folder), *calibrate], r"the neuron set is for other"),
        "pickle with code": (["import", pickle_with_code(folder / "x.pth"), *importing], r"was not opened"),
        "no recording": (
            ["select", "--recording", text, "--out", folder / "s.safetensors"],
            r"a folder without recording\.json",
        ),
    }  # fmt: skip


def of_another_model(folder: Path) -> Path:
    from tests.conftest import make_set

    path = folder / "other.safetensors"
    found = make_set({code: [(0, 1)] for code in CODES.split(",")}, calibrated=False)
    object.__setattr__(found.provenance, "model", "other")
    found.save(path)
    return path


def test_bad_input_is_one_line_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyModel, "model", property(lambda _: pytest.fail("the model was loaded")))
    for what, (arguments, message) in bad_input(tmp_path).items():
        with pytest.raises(SteeringError, match=message) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value), what
    assert not (tmp_path / "exploded").exists()


def test_the_command_prints_the_line_and_exits_with_2(tmp_path: Path) -> None:
    import subprocess
    import sys

    arguments = bad_input(tmp_path)["not UTF-8"][0]
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval_steering", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.count("line 2: not UTF-8") == 1 and "Traceback" not in result.stderr
