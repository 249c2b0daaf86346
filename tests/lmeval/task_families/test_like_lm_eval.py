"""In lm-eval's wording, our tasks make the same requests and get the same scores as lm-eval's own on the same items."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.lmeval.task_families import belebele, include, mlqa, xcopa, xnli, xquad, xwinograd
from tests.lmeval.task_families import squad_metrics
from tests.lmeval.task_families.items import INCLUDE, MLQA

FAMILIES = {"xcopa": xcopa, "xwinograd": xwinograd, "xnli": xnli, "xquad": xquad}
LANGUAGES = [(family, code) for family, module in FAMILIES.items() for code in module.CODES]
LANGUAGES += [("belebele", "eng_Latn"), ("belebele", "deu_Latn")]


@pytest.fixture(autouse=True)
def _squad_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lm-eval's XQuAD imports from transformers, which transformers 5 has no more."""
    if not _has_metrics():
        for name in ("transformers.data.metrics", "transformers.data.metrics.squad_metrics"):
            monkeypatch.setitem(sys.modules, name, squad_metrics)
        monkeypatch.setattr(squad_metrics, "squad_metrics", squad_metrics, raising=False)


def _has_metrics() -> bool:
    try:
        return importlib.util.find_spec("transformers.data.metrics.squad_metrics") is not None
    except ModuleNotFoundError:
        return False


def theirs(name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """lm-eval's own task as its file has it, only the dataset replaced."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent / (
        "include/default" if name.startswith("include") else name.split("_", maxsplit=1)[0]
    )
    (path,) = [path for path in folder.rglob("*.yaml") if f"task: {name}\n" in path.read_text() + "\n"]
    config = load_yaml(path)
    for key in ("dataset_path", "dataset_name", "tag"):
        config.pop(key, None)
    dataset = Dataset.from_list([dict(row) for row in rows])
    config["custom_dataset"] = lambda **_: {"train": dataset, "validation": dataset, "test": dataset}
    return ConfigurableTask(config=config)


def rows_of(folder: Path, path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / path).open(encoding="utf-8")]


def requests(task: Any, limit: int | None = None) -> list[Any]:
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance.arguments for instance in task.instances]


def targets(task: Any) -> list[Any]:
    return [task.doc_to_target(task.eval_docs[number]) for number in range(min(30, len(task.eval_docs)))]


def ours(name: str, manager: Any) -> Any:
    return manager.load([name])["tasks"][name]


def pair(family: str, code: str, folder: Path, manager: Any) -> tuple[Any, Any]:
    """Our task and lm-eval's on the excerpt."""
    short = FAMILIES[family].CODES[code] if family in FAMILIES else code
    split = "validation" if family in ("xnli", "xquad") else "test"
    place = f"xquad/xquad.{short}" if family == "xquad" else f"{family}/{short}"
    rows = [row for row in rows_of(folder, f"{place}/{split}.jsonl") if row.get("sentence", "") is not None]
    other = theirs(f"{family}_{short}", rows)
    assert (other.config.test_split or other.config.validation_split) == split
    return ours(f"steering_{family}_{code}", manager), other


@pytest.mark.parametrize(("family", "code"), LANGUAGES)
def test_the_same_requests(family: str, code: str, excerpts: Path, manager: Any) -> None:
    mine, other = pair(family, code, excerpts, manager)
    found = requests(mine, limit=30)
    assert len(found) >= 30 and found == requests(other, limit=30)
    assert len(mine.eval_docs) == len(other.eval_docs)
    assert targets(mine) == targets(other)


@pytest.mark.parametrize(
    ("family", "code"),
    [("xcopa", "tha_Thai"), ("xwinograd", "jpn_Jpan"), ("xnli", "deu_Latn"), ("belebele", "deu_Latn"),
     ("xquad", "eng_Latn")],
)  # fmt: skip
def test_the_same_scores(family: str, code: str, excerpts: Path, manager: Any, language_model: Any) -> None:
    compare_scores(*pair(family, code, excerpts, manager), language_model, manager, limit=6)


def compare_scores(mine: Any, other: Any, language_model: Any, manager: Any, limit: int) -> None:
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=language_model, tasks=[mine, other], limit=limit, bootstrap_iters=0, task_manager=manager
    )
    metrics = [key for key in found["results"][other.config.task] if "," in key and "stderr" not in key]
    assert metrics
    for metric in metrics:
        assert found["results"][mine.config.task][metric] == found["results"][other.config.task][metric]
    for first, second in zip(*(found["samples"][task.config.task] for task in (mine, other)), strict=True):
        assert first["resps"] == second["resps"]
        assert all(first[metric.split(",")[0]] == second[metric.split(",")[0]] for metric in metrics)


@pytest.mark.parametrize(("code", "domain"), [(code, row["domain"]) for code, rows in INCLUDE.items() for row in rows])
def test_include_by_domain(code: str, domain: str, own_data: Path, manager: Any) -> None:
    key = include.domain_key(domain)
    mine = ours(f"steering_include_base_44_{code}_{key}", manager)
    other = theirs(f"include_base_44_{include.CODES[code].lower()}_{key}", INCLUDE[code])
    assert requests(mine) == requests(other) != []
    assert targets(mine) == targets(other)


def test_include_all_domains_together(own_data: Path, manager: Any, language_model: Any) -> None:
    mine = ours("steering_include_base_44_fra_Latn", manager)
    domains = sorted({include.domain_key(row["domain"]) for row in INCLUDE["fra_Latn"]})
    others = [theirs(f"include_base_44_french_{domain}", INCLUDE["fra_Latn"]) for domain in domains]
    assert sorted(map(str, requests(mine))) == sorted(str(each) for other in others for each in requests(other))
    stem = ours("steering_include_base_44_fra_Latn_stem", manager)
    compare_scores(stem, theirs("include_base_44_french_stem", INCLUDE["fra_Latn"]), language_model, manager, limit=4)


@pytest.mark.parametrize("pair_of", sorted(MLQA))
def test_mlqa(pair_of: str, own_data: Path, manager: Any, language_model: Any) -> None:
    codes = [mlqa.CODES[code] for code in pair_of.split("-")]
    mine = ours(f"steering_mlqa_{pair_of.replace('-', '_')}", manager)
    other = theirs("_".join(["mlqa", *codes]), MLQA[pair_of])
    assert requests(mine) == requests(other) != []
    compare_scores(mine, other, language_model, manager, limit=2)


ANSWERS = ("", "the {}", "{}.", "«{}»", "die {} und DER {}", "el {}", "ال{}", "x{}y", "{} {}", "...", " {}, abc 1820\n")


def answers_to(reference: str) -> list[str]:
    half = reference[: max(1, len(reference) // 2)]
    return [shape.replace("{}", text) for shape in ANSWERS for text in (reference, reference.upper(), half)]


@pytest.mark.parametrize("code", ["eng_Latn", "zho_Hans", "tha_Thai", "arb_Arab"])
def test_xquad_scores_any_answer_alike(code: str, excerpts: Path, manager: Any) -> None:
    mine, other = pair("xquad", code, excerpts, manager)
    seen = set()
    for first, second in zip(mine.eval_docs.select(range(8)), other.eval_docs.select(range(8)), strict=True):
        for answer in answers_to(first["references"][0]):
            scores = other.process_results(second, [answer])
            found = mine.process_results(first, [answer])
            assert {name: found[name] for name in scores} == scores, answer
            seen.add(found["f1"])
    assert {0.0, 1.0} < seen


@pytest.mark.parametrize("context", list(mlqa.CODES))
def test_mlqa_scores_any_answer_alike(context: str) -> None:
    references = {"de": "der alten Brücke", "en": "the Old Bridge", "es": "los puentes", "zh": "城市abc的北边",
                  "vi": "của những cây cầu", "ar": "الجسر القديم", "hi": "पुराना पुल।"}  # fmt: skip
    code = mlqa.CODES[context]
    row = MLQA["deu_Latn-eng_Latn"][0] | {"answers": {"text": [references[code], "."], "answer_start": [0, 0]}}
    other = theirs(f"mlqa_{code}_{code}", [row])
    document = {"references": row["answers"]["text"], "expected_language": context}
    for answer in answers_to(references[code]):
        scores = other.process_results(other.eval_docs[0], [answer])
        found = mlqa.metrics(document, [answer])
        assert {name: found[name] for name in scores} == scores, answer


def test_belebele_covers_lm_evals_languages() -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "belebele"
    assert sorted(path.stem.removeprefix("belebele_") for path in folder.glob("belebele_*.yaml")) == sorted(
        belebele.CODES
    )
