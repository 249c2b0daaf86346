"""Models that think, and templates: what is missing from an answer or a prompt is counted and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.lmeval.chat_template import opened_thought
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.metrics.language_id import UNKNOWN
from lm_eval_steering.metrics.output_language import IdentifiedText, Output, output_metrics
from lm_eval_steering.report.read import read_results
from tests.conftest import tiny_model, tiny_tokenizer
from tests.lmeval.generation.test_ways import PROMPTS, loaded, requests, texts

FRENCH = "Le train ne circule pas aujourd'hui, nous prenons donc le bus pour aller en ville."


def raw_words() -> list[list[str]]:
    """What the model generates for each prompt, thought and all."""
    return [text.split() for text in texts(loaded(HFLM), requests([]))]


@pytest.mark.parametrize("as_token", [True, False])
def test_a_thought_that_does_not_end_is_unfinished_and_of_no_language(as_token: bool) -> None:
    words = raw_words()
    counts = {word: sum(word in row for row in words) for row in words for word in row}
    end = next(word for word, count in counts.items() if 0 < count < len(PROMPTS))  # some thoughts end, some do not
    arguments = {"think_end_token": int(end[1:]) + 3 if as_token else end}  # as in tiny_tokenizer
    lm = loaded(batch_size=3, **arguments)
    answers = lm.generate_until(requests([]), disable_tqdm=True)
    assert list(map(str, answers)) == texts(loaded(HFLM, **arguments), requests([]))  # lm-eval's answers stay
    assert [answer.unfinished for answer in answers] == [end not in row for row in words]
    assert all(answer.language == UNKNOWN for answer in answers if answer.unfinished)
    assert all(answer.unfinished is None for answer in loaded().generate_until(requests([]), disable_tqdm=True))


def test_the_request_cache_knows_it_too(tmp_path: Path) -> None:
    lm = loaded(think_end_token="w999")
    first = CachingLM(lm, str(tmp_path / "cache.db")).generate_until(requests([]))
    again = CachingLM(lm, str(tmp_path / "cache.db")).generate_until(requests([]))
    assert [answer.unfinished for answer in first] == [answer.unfinished for answer in again] == [True] * len(PROMPTS)


def test_an_unfinished_thought_counts_for_no_metric_of_the_answer() -> None:
    lm = loaded(think_end_token="w999", target_language="fra_Latn")
    thought, answer = (output_metrics(lm.identify(FRENCH, how), expected="fra_Latn") for how in (True, False))
    assert answer["lfs"] == answer["lfs_clean"] == answer["lang_expected"] == answer["lpr"] == 1
    assert answer["unfinished"] == 0 and thought["unfinished"] == 1
    assert thought["lfs"] == thought["lfs_clean"] == thought["lang_expected"] == thought["script_share"] == 0
    assert thought["lang_unknown"] == thought["lpr_skipped"] == 1 and "lpr" not in thought
    assert "unfinished" not in output_metrics(lm.identify(FRENCH), expected="fra_Latn")  # a model that does not think
    assert thought["degenerate"] == answer["degenerate"] == 0  # about what was written, whatever it is
    assert Output.of(IdentifiedText(FRENCH, unfinished=True)).answer == ""


@pytest.mark.parametrize(
    ("context", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>"), ("[/INST][THINK]", "[THINK]"),
        ("answer: <thought>", "<thought>"), ("<|begin_of_thought|>\n\n", "<|begin_of_thought|>"),
        ("<think>\n\n</think>\n\n", ""), ("I think", ""), ("", ""),
    ],
)  # fmt: skip
def test_a_prompt_that_opens_a_thought_is_recognised(context: str, mark: str) -> None:
    assert opened_thought(context) == mark


REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
)
IGNORING = "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }} {% endfor %}"
KEEPING = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
THINKING = KEEPING + "{% if add_generation_prompt %}<think>\n{% endif %}"
YAML = """task: template_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["w1", "w2"]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize(
    ("template", "notes"),
    [
        (REFUSING, ["dropped: the chat template leaves the system instruction"]),
        (IGNORING, ["dropped: the chat template leaves the system instruction"]),
        (KEEPING, []),
        (THINKING, ["4 of 4 scored prompts end in <think>"]),
    ],
)
def test_what_a_template_does_to_prompts_stands_in_the_results_and_in_a_report(
    tmp_path: Path, template: str, notes: list[str]
) -> None:
    (tmp_path / "items.jsonl").write_text('{"question": "w3 w4"}\n{"question": "w5"}\n')
    (tmp_path / "template_choice.yaml").write_text(YAML.format(folder=tmp_path))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    lm = SteeredHFLM(tiny_model("llama"), tokenizer=tokenizer, batch_size=2, max_length=64)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(
        model=lm, tasks=["template_choice"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0,
        system_instruction="w7 w8",
    )  # fmt: skip
    assert results is not None
    found = results["config"]["steering"].get("notes", [])
    assert len(found) == len(notes) and all(one in other for one, other in zip(notes, found, strict=True))
    kept: dict[str, Any] = {
        key: results[key] for key in ("results", "configs", "n-shot", "higher_is_better", "n-samples")
    }
    kept["config"] = {"model_args": {"pretrained": "tiny"}, "steering": results["config"]["steering"]}
    file = tmp_path / "results_2026-01-01T00-00-00.json"
    file.write_text(json.dumps(kept, default=str))
    reported = "\n".join(read_results(file).facts.notes)
    assert all(note in reported for note in notes)


def test_thinking_without_its_end_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)  # no weights
    with pytest.raises(InterventionError, match=r"enable_thinking=True without think_end_token=.*</think>"):
        SteeredHFLM(str(tmp_path), enable_thinking=True)
