"""CLaS-Bench, with a judge that is a real HTTP server on this machine."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.judge import Judge, JudgeError, judge_samples, mean_relevance, parse_rating
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families import clas_bench
from lm_eval_steering.metrics.relevance import clas_score, harmonic_mean, relevance
from tests.lmeval.task_families.conftest import Evaluate, write_rows

LID176 = {"clas_identifier": "lid.176"}


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint: what it was asked, and what it is to answer (a status, or a text)."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answers: list[int | str] = field(default_factory=list)
    usual: int | str = "It is about the question. Rating: [[2]]"

    def next(self) -> int | str:
        return self.answers.pop(0) if self.answers else self.usual


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            answer = made.usual if isinstance(made.usual, int) else 200
            self.reply(answer if self.path == "/v1/models" else 404, b'{"data": []}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append(body)
            made.headers.append(dict(self.headers))
            answer = made.next()
            if isinstance(answer, int):
                self.reply(answer, b"{}")
            else:
                content = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                self.reply(200 if self.path == "/v1/chat/completions" else 404, json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


# --- the score --------------------------------------------------------------------------------------------------------


def test_a_success_of_less_than_one_per_cent_stays_one() -> None:
    items = [(float(n == 0), 1.0, False) for n in range(200)]
    assert clas_score(items) == pytest.approx(2 * 0.005 / 1.005)
    # The published script takes a rate of 0.5 (per cent) for the fraction 0.5.
    assert clas_score(items) != pytest.approx(harmonic_mean(0.5, 1.0))


def test_the_score_combines_means_and_a_failed_judge_gives_no_number() -> None:
    items = [(1.0, 1.0, False), (0.0, 0.5, False), (1.0, None, False)]
    assert relevance(items) == 0.75
    assert clas_score(items) == pytest.approx(2 * (2 / 3) * 0.75 / (2 / 3 + 0.75))
    assert clas_score([(0.0, 1.0, False)]) == 0
    assert math.isnan(clas_score([*items, (1.0, None, True)])) and math.isnan(relevance([(1.0, None, False)]))


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[2]]", 2), ("Rating: [[1]] or rather Rating: [[0]]", 0), ("<think>[[2]]</think> [[1]]", 1),
        ("<think>[[2]]", 2), ("Rating: 2", None), ("[[3]]", None), ("", None),
    ],
)  # fmt: skip
def test_ratings_are_read_strictly(text: str, rating: int | None) -> None:
    assert parse_rating(text) == rating


# --- the judge --------------------------------------------------------------------------------------------------------


def test_trials_have_a_seed_each_at_temperature_zero(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERING_JUDGE_KEY", "secret")
    endpoint.answers = ["[[2]]", "no idea", "[[1]]"]
    judge = Judge(endpoint.url, "tiny", trials=3, seed=7)
    judge.require()
    ratings = judge.rate("Why?", "Because.", "deu_Latn")
    assert ratings == [2, None, 1] and mean_relevance(ratings) == 0.75
    assert [body["seed"] for body in endpoint.asked] == [7, 8, 9]
    assert {body["temperature"] for body in endpoint.asked} == {0} and endpoint.asked[0]["model"] == "tiny"
    assert "German" in endpoint.asked[0]["messages"][0]["content"]
    assert "Because." in endpoint.asked[0]["messages"][1]["content"]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret" and "secret" not in judge.signature()


def test_nothing_is_rated_zero_without_asking(endpoint: Endpoint) -> None:
    assert Judge(endpoint.url, "tiny", trials=2).rate("Why?", " \n", "deu_Latn") == [0, 0]
    assert endpoint.asked == []


def test_a_busy_endpoint_is_asked_again_and_a_wrong_one_is_not(endpoint: Endpoint) -> None:
    judge = Judge(endpoint.url, "tiny", pause=0.01)
    endpoint.answers = [503, 429]
    assert judge.rate("Why?", "Because.", "deu_Latn") == [2]
    endpoint.answers = [400, "[[2]]"]
    with pytest.raises(JudgeError, match="answers 400 Bad Request"):
        judge.rate("Why?", "Because.", "deu_Latn")
    endpoint.answers, endpoint.usual = [], 500
    with pytest.raises(JudgeError, match="answers 500"):
        judge.rate("Why?", "Because.", "deu_Latn")
    endpoint.usual = 401
    with pytest.raises(JudgeError, match="set STEERING_JUDGE_KEY"):
        judge.require()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_url": "localhost:8000", "judge_model": "m"}, "judge_url='localhost:8000'"),
        ({"judge_url": "http://localhost"}, "judge_model=''"),
        ({"judge_model": "m"}, "expected both"),
        ({"judge_url": "http://localhost", "judge_model": "m", "judge_trials": 0}, "judge_trials=0"),
    ],
)
def test_half_a_judge_is_one_clear_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        Judge.from_settings(settings)
    assert Judge.from_settings({"language": "fra"}) is None


# --- the task ---------------------------------------------------------------------------------------------------------


def test_a_run_with_a_judge_has_all_three_numbers(
    french: SteeredHFLM, evaluate: Evaluate, endpoint: Endpoint, clas_data: Path
) -> None:
    judge = {"judge_url": endpoint.url, "judge_model": "tiny", "judge_trials": 2}
    endpoint.answers = ["[[2]]", "[[1]]"]
    settings = {"language": "fra_Latn", "data_dir": str(clas_data), **LID176, **judge}
    found = evaluate(french, "steering_clas_bench_eng_Latn", tokens=16, **settings)
    scores = found["results"]["steering_clas_bench_eng_Latn"]
    assert scores["clas_relevance,none"] == pytest.approx((0.75 + 1 + 1) / 3)
    success = scores["clas_language,none"]
    assert success > 0 and scores["clas_score,none"] == pytest.approx(
        harmonic_mean(success, scores["clas_relevance,none"])
    )
    assert scores["clas_unrated,none"] == 0 and "lfs,none" in scores
    assert len(endpoint.asked) == 6


def test_a_judge_that_goes_away_leaves_one_error_and_every_generation(
    french: SteeredHFLM, evaluate: Evaluate, endpoint: Endpoint, clas_data: Path, tmp_path: Path, caplog: Any
) -> None:
    endpoint.answers = ["[[2]]", 404]
    judge = {"judge_url": endpoint.url, "judge_model": "gone"}
    settings = {"language": "fra_Latn", "data_dir": str(clas_data), **LID176, **judge}
    with caplog.at_level(logging.ERROR):
        found = evaluate(french, "steering_clas_bench_deu_Latn", tokens=8, **settings)
    assert caplog.text.count("clas_relevance and clas_score are not computed: judge gone at http://127.0.0.1") == 1
    scores = found["results"]["steering_clas_bench_deu_Latn"]
    assert math.isnan(scores["clas_score,none"]) and scores["clas_language,none"] >= 0
    samples = found["samples"]["steering_clas_bench_deu_Latn"]
    assert len(samples) == 3 and all(sample["resps"][0][0] for sample in samples)
    # Later, when it is back, the same samples are judged.
    kept = write_rows(tmp_path / "samples.jsonl", json.loads(json.dumps(samples, default=str)))
    endpoint.answers = []
    late = judge_samples(kept, Judge(endpoint.url, "back"), workers=2)
    assert late["clas_relevance"] == 1 and late["clas_language"] == pytest.approx(scores["clas_language,none"])
    assert len((tmp_path / "samples.judged.jsonl").read_text().splitlines()) == 3


def test_a_judge_that_never_answers_is_an_error_before_anything_is_generated(clas_data: Path) -> None:
    settings = {"language": "fra_Latn", "data_dir": str(clas_data), **LID176}
    with pytest.raises(SteeringError, match=r"judge m at http://127\.0\.0\.1:9/v1 does not answer"):
        clas_bench.documents("eng_Latn", judge_url="http://127.0.0.1:9/v1", judge_model="m", **settings)


def test_the_command_prints_scores_and_one_line_of_error(tmp_path: Path, endpoint: Endpoint) -> None:
    samples = write_rows(
        tmp_path / "samples.jsonl",
        [{"doc": {"question": "Why?", "language": "eng_Latn"}, "filtered_resps": ["Car."], "clas_language": 1.0}],
    )
    command = [sys.executable, "-m", "lm_eval_steering.lmeval.judge", str(samples), "--model", "m", "--url"]
    done = subprocess.run([*command, endpoint.url], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["clas_score"] == 1.0, done.stderr
    failed = subprocess.run([*command, "http://127.0.0.1:9/v1"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "does not answer" in failed.stderr.splitlines()[-1]
    with pytest.raises(SteeringError, match="expected the samples of a steering_clas_bench task"):
        judge_samples(write_rows(tmp_path / "other.jsonl", [{"doc": {}}]), Judge(endpoint.url, "m"))


def test_the_benchmarks_identifier_is_asked_for_by_name(
    clas_data: Path,
) -> None:
    settings = {"language": "fra_Latn", "data_dir": str(clas_data)}
    with pytest.raises(SteeringError, match=r"lid218e.*clas_identifier"):
        clas_bench.documents("eng_Latn", **settings)
    with pytest.raises(SteeringError, match="does not know kmb_Latn"):
        clas_bench.documents("eng_Latn", **settings | {"language": "kmb_Latn"} | LID176)
    with pytest.raises(SteeringError, match="needs one steered language"):
        clas_bench.documents("eng_Latn", data_dir=str(clas_data))


def test_the_variant_asks_in_english(clas_data: Path) -> None:
    settings = {"language": "nob_Latn", "data_dir": str(clas_data), **LID176}
    doc = clas_bench.documents("deu_Latn", "instruction", **settings)["test"][0]
    assert doc["prompt"].startswith("Wie lerne ich kochen? Respond in Norwegian")
    assert doc["expected_language"] == "nob_Latn" and doc["judge"] == ""
    assert clas_bench.documents("deu_Latn", **settings)["test"][0]["prompt"] == "Wie lerne ich kochen?"


@pytest.mark.parametrize(("track", "pairs"), [("t1", 90), ("t2", 100), ("t3", 57)])
def test_a_track_has_the_pairs_of_the_shared_task(track: str, pairs: int) -> None:
    """CLaS at SemEval-2027: ten languages into each other, into ten others, and all twenty into three of them."""
    chosen = clas_bench.VARIANTS[track]
    made = {(source, target) for source in chosen.sources for target in chosen.targets if source != target}
    assert len(made) == pairs
    files = clas_bench.generated_files()
    assert all(Path(f"clas_bench/clas_bench_{source}_{track}.yaml") in files for source in chosen.sources)


def test_a_track_refuses_other_targets_and_leaves_the_diagonal_blank(clas_data: Path, caplog: Any) -> None:
    settings = {"data_dir": str(clas_data), **LID176}
    with pytest.raises(SteeringError, match="track t3 of CLaS-Bench steers to jpn_Jpan, rus_Cyrl, deu_Latn"):
        clas_bench.documents("eng_Latn", "t3", language="fra_Latn", **settings)
    (blank,) = clas_bench.documents("deu_Latn", "t3", language="deu_Latn", **settings)["test"]
    assert clas_bench.metrics(blank, ["-"]) == {} and "no pair deu_Latn-deu_Latn" in caplog.text
    assert len(clas_bench.documents("eng_Latn", "t3", language="deu_Latn", **settings)["test"]) == 3
