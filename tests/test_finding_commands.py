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

    fresh = ["--recording", folder / "fresh.recording"]
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
        "no such model": (["find", "--model", folder / "nowhere", *find()[3:]], r"model '.*nowhere': no such folder"),
        "out is a folder": ([*find()[:-1], text], r"expected a file in a folder that can be written"),
        "unknown option": ([*find()[:4], f"{text}?colum=x", *find()[5:]], r"did you mean 'column'"),
        "truncated set": (["inspect", corrupt(folder / "cut.safetensors")], r"not a whole safetensors file"),
        "no such set": (["inspect", "dmo"], r"neuron set 'dmo': no such file.*did you mean 'demo'"),
        "no set near": (["inspect", "xyzzy"], r"neuron set 'xyzzy': no such file.*that ship: .*demo.*gemma-3-270m"),
        "no corpus": ([*find()[:4], folder / "nofolder", *find()[5:], *fresh], r"nofolder does not exist"),
        "no corpus folder": (
            [*find()[:4], folder / "none" / "{lang}.txt", *find()[5:], *fresh], r"none does not exist"
        ),
        "a hub id": ([*find()[:4], "some/dataset", *find()[5:], *fresh], r"does not exist.*hf:some/dataset"),
        "a model's folder": (["doctor", "--model", f"{resources.demo_model()}s"], r"no such folder.*'.*demo-model'"),
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


def test_another_set_under_the_same_name_is_kept(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "set.safetensors"
    select = ["select", "--recording", recording, "--out", out, "--rate"]
    run(*select, "0.01")
    earlier = out.read_bytes()
    assert "kept" not in run(*select, "0.01") and sorted(tmp_path.iterdir()) == [out]
    printed = run(*select, "0.05")
    (kept,) = set(tmp_path.iterdir()) - {out}
    assert kept.read_bytes() == earlier != out.read_bytes() and str(kept) in printed
    # What is made in place is meant to be replaced; other commands that write a set keep what was there.
    run("calibrate", out, *about_the_demo()[:4], "--sentences", "5", "--out", out)
    calibrated = NeuronSet.load(out).content_hash()
    run("neurons", "random", "demo", "--out", out)
    sets = {NeuronSet.load(path).content_hash() for path in tmp_path.glob("*.safetensors")}
    assert calibrated in sets and len(sets) == 3 and len(list(tmp_path.glob("*.log.json"))) == 1


def test_a_selection_that_takes_everything_is_warned_of(recording: Path, tmp_path: Path) -> None:
    select = ["select", "--recording", recording, "--out", tmp_path / "set.safetensors", "--rate"]
    assert "warning" not in run(*select, "0.01")
    assert "eligible neurons were selected" in run(*select, "1")
    assert "warning: " in run("inspect", tmp_path / "set.safetensors")


@pytest.mark.parametrize(
    ("name", "way_on"), [("find", "run the same command again"), ("select", "interrupted"), ("doctor", "interrupted")]
)
def test_an_interrupted_command_says_how_it_goes_on(
    name: str, way_on: str, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LazyModel, "__init__", interrupt)
    monkeypatch.setattr("lm_eval_steering.neurons.find.select", interrupt)
    out = ["--out", tmp_path / "set.safetensors"]
    arguments = {
        "find": [*about_the_demo(), *out], "select": ["--recording", recording, *out], "doctor": about_the_demo()[:2],
    }  # fmt: skip
    result = CliRunner().invoke(app, [name, *map(str, arguments[name])])
    assert result.exit_code == 130 and way_on in result.output
    assert ("again" in result.output) is (name == "find")


def test_where_names_what_it_knows() -> None:
    with pytest.raises(SteeringError, match=r"where 'demo': expected one of demo-model, .*neuron-sets"):
        run("where", "demo")
    assert run("where", "demo-model").strip() == str(resources.demo_model())


def test_lists_of_plans_and_tasks_have_a_line_each() -> None:
    from lm_eval_steering.plans.shipped import shipped_plans

    lines = run("plans").splitlines()
    assert [line.split()[0] for line in lines[: len(shipped_plans())]] == list(shipped_plans())
    assert len(lines) == len(shipped_plans()) + 2 and "languages " in run("plans", "--needs")
    listed = run("tasks").splitlines()
    assert "xcopa: 22 tasks, 11 languages" in listed and max(map(len, listed[:-1])) < 80


def test_an_export_says_that_the_set_is_of_other_weights() -> None:
    """The option that the message names is there in each command that it names."""
    for name in ("doctor", "stepwise", "logit-lens", "export"):
        assert "--force" in run(name, "--help")
