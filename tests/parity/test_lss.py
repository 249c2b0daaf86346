"""LSS against the published matrix (Rahmanisa et al. 2025), end to end: rows in a file, our task, its evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lm_eval_steering.languages import normalise
from lm_eval_steering.lmeval import registration
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families.demo import lss_metrics
from lm_eval_steering.metrics.likelihood import MADE_FOR, NEEDS_UNSTEERED_SCORE, Score, preference_shift
from lm_eval_steering.resources import tasks_folder
from tests.conftest import make_set, tiny_model, tiny_tokenizer

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "lss_matrix.json").read_text())
LANGUAGES: list[str] = GOLDEN["langs"]
registration.register_all()


class Table(LM):
    """Answers from the published table of log-probabilities, with and without the intervention for one language."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return [self.score(*request.args) for request in requests]

    def score(self, prompt: str, continuation: str) -> Score:
        assert continuation.startswith(" ")
        table, index = GOLDEN["logprob_table"], GOLDEN["target_index_of_lang"][self.target]
        steered, unsteered = (table.get(f"{row}|{prompt}|{continuation[1:]}", -9.0) for row in (index, None))
        return Score((steered, False), 1, unsteered=unsteered, targets=(normalise(self.target),))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "mlama").mkdir()
    for base in LANGUAGES:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GOLDEN["rows"][base])
        (folder / "mlama" / f"{base}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize("target", LANGUAGES)
def test_the_matrix_is_the_published_one_and_its_diagonal_is_blank(target: str, rows: Path) -> None:
    settings = {"language": target, "data_dir": str(rows)}
    manager = TaskManager(include_path=str(tasks_folder() / "lss"), include_defaults=False, metadata=settings)
    names = {base: f"steering_lss_{normalise(base)}_mlama_paper" for base in LANGUAGES}
    found = lm_eval.simple_evaluate(Table(target), tasks=list(names.values()), task_manager=manager)["results"]
    published = dict(zip(GOLDEN["matrix"]["lang"], GOLDEN["matrix"][f"intv_{normalise(target)}"], strict=True))
    for base, name in names.items():
        if base == target:
            assert published[base] == 0
            assert not [key for key in found[name] if key.startswith("lss")]
        else:
            assert found[name]["lss,none"] == pytest.approx(published[base])


@pytest.mark.parametrize(("steered", "baseline", "expected"), GOLDEN["eval_dod_examples"])
def test_ties_do_not_count(steered: list[float], baseline: list[float], expected: float) -> None:
    document = {"choices": [" a", " b"], MADE_FOR: ["fra_Latn"]}
    base = Score((0.0, False), 1, 0.0, ["fra_Latn"])
    moved = [
        lss_metrics(document, (base, Score((with_, False), 1, without, ["fra_Latn"])))["lss"]
        for with_, without in zip(steered, baseline, strict=True)
    ]
    assert fmean(moved) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scoring", ["shared", "plain"])
@pytest.mark.parametrize(
    "identity", [{"op": "scale"}, {"op": "add", "value": 0.0}, {"op": "add", "value": "mean", "factor": 0.0}]
)
def test_an_identity_in_bfloat16_has_lss_0_exactly(identity: dict[str, Any], scoring: str) -> None:
    lm = SteeredHFLM(tiny_model("llama").bfloat16(), tokenizer=tiny_tokenizer(), batch_size=3, scoring=scoring)
    neurons = make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)]})
    pairs = [
        (" ".join(f"w{n + k}" for k in range(n % 4 + 1)), (f" w{n + 7} w{n}", f" w{2 * n + 3}")) for n in range(12)
    ]
    requests = [
        Instance("loglikelihood", {NEEDS_UNSTEERED_SCORE: True}, (prompt, answer), number)
        for number, (prompt, answer) in enumerate((prompt, answer) for prompt, both in pairs for answer in both)
    ]
    for arguments in ({"op": "add", "value": 3.0}, identity):  # the unsteered scores of the first are used again
        lm.intervene(neurons, language="fra_Latn", **arguments)
        scores = lm.loglikelihood(requests)
    shifts = [preference_shift(base, target) for base, target in zip(scores[::2], scores[1::2], strict=True)]
    assert shifts == [0.0] * len(pairs)
