"""Relevance of answers by a judge model behind any OpenAI-compatible endpoint (`/chat/completions`).

The scale is that of CLaS-Bench (Gurgurov et al. 2026): 0 unrelated or useless, 1 partly related, 2 related, coherent
and useful; the language of the answer must not count. The wording is ours. The judge is asked at temperature 0, with
one seed a trial, and an answer's rating is the mean of its trials.

    python -m lm_eval_steering.lmeval.judge SAMPLES.jsonl --url http://localhost:8000/v1 --model Qwen/Qwen3-8B

judges the samples that a run with `--log_samples` has left, where no judge was available or it went away.

lm-eval's client of chat completions is not used: it retries requests that are wrong (400, 401), takes an answer
without a chat completion for an empty text, and needs packages that lm-eval does not install.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.files import read_json_lines, write_json_lines
from lm_eval_steering.languages import english_name
from lm_eval_steering.metrics.relevance import clas_score, relevance

KEY = "STEERING_JUDGE_KEY"  # environment variable with the endpoint's key; a key never goes into settings or results
LARGEST = 2
ATTEMPTS = 3
_RATING = re.compile(r"\[\[\s*([0-2])\s*\]\]")
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_INSTRUCTIONS = """You rate answers of a language model. A question was put in {source}; the answer may be in any
language.

Rate only what the answer says, not the language that it says it in:
0 = it has nothing to do with the question, or it is gibberish, endless repetition or otherwise of no use
1 = it has something to do with the question, but is incomplete, partly off the point or of little use
2 = it clearly answers the question and is coherent and useful

Give your reason in one or two sentences. Then end with a line of exactly this form: Rating: [[0]], Rating: [[1]] or
Rating: [[2]]"""


class JudgeError(SteeringError):
    """A judge that does not answer, or answers something else than a chat completion."""


@dataclass(frozen=True)
class Judge:
    """A judge model.

    Attributes:
        url: base of the endpoint, up to `/v1`.
        model: name of the model there.
        trials: how often each answer is rated.
        seed: of the first trial; the next ones count up from it.
        tokens: longest answer of the judge.
        timeout: seconds to wait for one answer.
        pause: seconds before a second attempt; the third waits twice as long.
    """

    url: str
    model: str
    trials: int = 1
    seed: int = 0
    tokens: int = 1024
    timeout: float = 120.0
    pause: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise JudgeError(
                f"judge_url={self.url!r}, judge_model={self.model!r}: expected both, such as http://localhost:8000/v1 "
                "and the name of a model there"
            )
        if not isinstance(self.trials, int) or self.trials < 1:
            raise JudgeError(f"judge_trials={self.trials!r}: expected a whole number above 0")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Judge | None:
        """The judge that `--metadata` names (`judge_url`, `judge_model`, `judge_trials`, ...); None without."""
        names = ("url", "model", "trials", "seed", "tokens", "timeout")
        given = {name: settings[f"judge_{name}"] for name in names if settings.get(f"judge_{name}") is not None}
        return cls(**{"url": "", "model": "", **given}) if given else None

    def signature(self) -> str:
        """`judge:Qwen/Qwen3-8B|trials:3|seed:0|t:0`, for reports."""
        return f"judge:{self.model}|trials:{self.trials}|seed:{self.seed}|t:0"

    def require(self) -> None:
        """Ask the endpoint for its models, before anything is generated.

        Raises:
            JudgeError: if nothing answers there, or it refuses the key.
        """
        try:
            self._open("/models", None, timeout=min(self.timeout, 20.0))
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._error(f"refuses the key ({error.code}); set {KEY}") from error
        except (OSError, ValueError) as error:
            raise self._error(f"does not answer ({_reason(error)})") from error

    def rate(self, question: str, answer: str, source: str) -> list[int | None]:
        """Rating of an answer by each trial, 0 to 2; None where the judge gave none. Nothing at all is rated 0 unasked.

        Args:
            question: as it was put.
            answer: as it was given.
            source: code of the question's language.

        Raises:
            JudgeError: if the judge does not answer.
        """
        if not answer.strip():
            return [0] * self.trials
        messages = [
            {"role": "system", "content": _INSTRUCTIONS.format(source=english_name(source))},
            {"role": "user", "content": f"Question:\n{question}\n\nAnswer:\n{answer}"},
        ]
        return [parse_rating(self._complete(messages, self.seed + trial)) for trial in range(self.trials)]

    def _complete(self, messages: Sequence[Mapping[str, str]], seed: int) -> str:
        body = {
            "model": self.model, "messages": messages, "temperature": 0, "seed": seed, "max_tokens": self.tokens,
        }  # fmt: skip
        reason = ""
        for attempt in range(ATTEMPTS):
            time.sleep(self.pause * attempt)
            try:
                return str(
                    json.loads(self._open("/chat/completions", body, self.timeout))["choices"][0]["message"]["content"]
                )
            except urllib.error.HTTPError as error:
                reason = f"answers {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    break
            except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
                raise self._error(f"answers no chat completion ({error!r})") from error
            except OSError as error:
                reason = f"does not answer ({_reason(error)})"
        raise self._error(reason)

    def _open(self, path: str, body: Mapping[str, Any] | None, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return bytes(response.read())

    def _error(self, what: str) -> JudgeError:
        return JudgeError(
            f"judge {self.model} at {self.url} {what}. What was generated is kept: see that the endpoint runs, then "
            "`python -m lm_eval_steering.lmeval.judge SAMPLES.jsonl --url ... --model ...` on the logged samples"
        )


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", error) or type(error).__name__)


def parse_rating(text: str) -> int | None:
    """The last `[[n]]` of a judge's answer, after its thoughts; None where there is none, never a guess."""
    ratings = _RATING.findall(_THOUGHT.sub("", text))
    return int(ratings[-1]) if ratings else None


def mean_relevance(ratings: Sequence[int | None]) -> float | None:
    """Ratings as a share of the largest, 0 to 1, over the trials that gave one."""
    given = [rating for rating in ratings if rating is not None]
    return sum(given) / len(given) / LARGEST if given else None


# --- samples of an earlier run ----------------------------------------------------------------------------------------


def judge_samples(path: Path, judge: Judge, workers: int = 8) -> dict[str, Any]:
    """Rate the logged samples of a CLaS-Bench task, and write them with their ratings to `*.judged.jsonl` beside.

    Raises:
        SteeringError: for another file, or a judge that does not answer; a partial result is never written.
    """
    samples = list(read_json_lines(path))
    if not samples or not all("clas_language" in sample for sample in samples):
        raise SteeringError(f"{path}: expected the samples of a steering_clas_bench task (--log_samples)")
    judge.require()

    def rated(sample: Mapping[str, Any]) -> dict[str, Any]:
        document = sample["doc"]
        ratings = judge.rate(document["question"], sample["filtered_resps"][0], document["language"])
        return {**sample, "clas_ratings": ratings, "clas_relevance": mean_relevance(ratings)}

    with ThreadPoolExecutor(workers) as pool:
        judged = list(pool.map(rated, samples))
    out = path.with_suffix(".judged.jsonl")
    write_json_lines(out, judged)
    items = [(sample["clas_language"], sample["clas_relevance"], False) for sample in judged]
    return {
        "clas_language": sum(item[0] for item in items) / len(items),
        "clas_relevance": relevance(items),
        "clas_score": clas_score(items),
        "clas_unrated": sum(item[1] is None for item in items) / len(items),
        "judge": asdict(judge),
        "samples": str(out),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the samples of an earlier run, and print the scores as JSON."""
    parser = argparse.ArgumentParser(prog="python -m lm_eval_steering.lmeval.judge", description=__doc__)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args(arguments)
    try:
        judge = Judge(options.url, options.model, options.trials, options.seed)
        print(json.dumps(judge_samples(options.samples, judge, options.workers), indent=2))
    except (SteeringError, OSError) as error:
        print(f"lm-eval-steering: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
