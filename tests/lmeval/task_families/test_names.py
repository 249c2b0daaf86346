"""Names, languages, tags and groups of our tasks; and which language lm-eval's own tasks are in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError, UnknownLanguageError
from lm_eval_steering.lmeval import listing
from lm_eval_steering.lmeval import task_families as families
from lm_eval_steering.lmeval.evaluated_language import LEFT_OUT, evaluated_language, family_prefixes
from lm_eval_steering.lmeval.task_families import belebele, mlqa, xcopa, xquad
from lm_eval_steering.lmeval.task_families.common import read_task_file
from lm_eval_steering.resources import tasks_folder

OURS = ("xcopa", "xwinograd", "include", "belebele", "xnli", "xquad", "mlqa")
ENTRIES = [entry for entry in listing.task_entries() if entry.family in OURS]
CODE = r"[a-z]{3}_[A-Z][a-z]{3}"
FOLDERS = (
    "xcopa", "xwinograd", "xnli", "xquad", "mlqa", "include", "belebele", "mgsm", "global_mmlu", "okapi", "paws-x",
    "xstorycloze", "tydiqa", "lambada_multilingual", "lambada_multilingual_stablelm",
)  # fmt: skip


def test_the_files_of_these_families_are_exactly_the_generated_ones() -> None:
    modules = families.modules()
    for family in OURS:
        written = {Path(path) for path in modules[family].generated_files()}
        found = {path.relative_to(tasks_folder()) for path in (tasks_folder() / family).glob("*.yaml")}
        assert written <= found
        templates = {f"_{family}{rest}.yaml" for rest in ("", "_natural", "_gurgurov", "_rahmanisa")}
        assert {path.name for path in found - written} <= templates


def test_names_say_family_language_and_wording() -> None:
    for entry in ENTRIES:
        if not entry.group:
            match = re.fullmatch(
                rf"steering_({'|'.join(OURS)})(?:_base_44|_lite_44)?((?:_{CODE})+)(_[a-z_]+)?", entry.name
            )
            assert match, entry.name
            codes = re.findall(CODE, match[2])
            assert list(dict.fromkeys(codes)) == list(entry.languages), entry
            assert entry.variant == "" or entry.name.endswith(f"_{entry.variant}")
            assert all(languages.normalise(code) == code for code in codes)
    singles = [entry for entry in ENTRIES if not entry.group]
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES) and len(singles) > 900


def test_task_files_are_read_as_lm_eval_reads_them() -> None:
    """Ours are read without lm-eval, whose import takes seconds; functions alone differ, which are texts here."""
    from lm_eval.tasks._yaml_loader import load_yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value.rpartition("/")[2] if isinstance(value, str) and "lm_eval_steering." in value else value

    for folder in sorted(path for path in tasks_folder().iterdir() if path.is_dir()):
        files = [path for path in sorted(folder.glob("*.yaml")) if not path.name.startswith("_")]
        for path in (files[0], files[-1], *folder.glob("_*.yaml")):
            assert read_task_file(path) == plain(load_yaml(path, resolve_func=False)), path


def test_no_name_of_ours_is_lm_evals(lm_evals: dict[str, Any], whole: tuple[Any, list[str]]) -> None:
    assert len(lm_evals) > 10_000
    assert not [name for name in lm_evals if name.startswith("steering_")], "the lazy index would not see it"
    assert not [warning for warning in whole[1] if "overrides existing" in warning or "steering" in warning]
    tags = {tag for path in tasks_folder().rglob("*.yaml") for tag in _tags(path)}
    assert not {entry.name for entry in listing.task_entries()} & set(lm_evals)
    assert not tags & set(lm_evals) and all(tag.startswith("steering_") for tag in tags)


def test_ls_and_validate_know_all_of_ours(
    whole: tuple[Any, list[str]], manager: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index that the command makes has them; the commands' own code, on ours alone, takes no half a minute."""
    from lm_eval.__main__ import cli_evaluate

    assert {entry.name for entry in ENTRIES} <= set(whole[0].task_index)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path=None: manager)
    monkeypatch.setattr("sys.argv", ["lm_eval", "ls", "tasks"])
    cli_evaluate()
    listed = set(re.findall(r"^\|(steering_\w+)", capsys.readouterr().out, re.MULTILINE))
    names = {entry.name for entry in ENTRIES}
    assert names <= listed
    some = sorted(entry.name for entry in ENTRIES if entry.group or entry.languages[0] == "deu_Latn")
    monkeypatch.setattr("sys.argv", ["lm_eval", "validate", "--tasks", ",".join(some)])
    cli_evaluate()
    assert "All tasks found and valid" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["lm_eval", "validate", "--tasks", "steering_xcopa_xx"])
    with pytest.raises(SystemExit):
        cli_evaluate()


def _tags(path: Path) -> list[str]:
    found = re.search(r"^tag: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    value = yaml.safe_load(found[1]) if found else []
    return value if isinstance(value, list) else [value]


def test_a_language_tag_runs_every_family_in_its_default_wording(manager: Any) -> None:
    assert manager.task_index["steering_deu_Latn"].tags >= {
        "steering_belebele_deu_Latn", "steering_include_base_44_deu_Latn", "steering_include_lite_44_deu_Latn",
        "steering_mlqa_deu_Latn_deu_Latn", "steering_xnli_deu_Latn", "steering_xquad_deu_Latn",
    }  # fmt: skip


def test_the_documentation_names_every_family_and_how_many_languages_ours_have() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1]: row.split("|")[2] for row in page.splitlines() if row.startswith("| `")}
    for family in {entry.family for entry in listing.task_entries()}:
        (languages_cell,) = {cell for names, cell in rows.items() if f"`{family}" in names and "..." not in names}
        codes = {code for entry in ENTRIES if entry.family == family for code in entry.languages}
        assert family not in OURS or str(len(codes)) in languages_cell, family


def test_groups_average_over_their_own_tasks(manager: Any) -> None:
    singles = {entry.name for entry in ENTRIES if not entry.group}
    in_groups: set[str] = set()
    for entry in ENTRIES:
        if entry.group:
            config = manager.task_index[entry.name].cfg
            assert set(config["task"]) <= singles and config["aggregate_metric_list"]
            in_groups |= set(config["task"])
    assert in_groups == singles


def test_our_own_tasks_evaluate_the_language_they_are_named_after() -> None:
    for entry in ENTRIES:
        expected = entry.languages[0] if len(entry.languages) == 1 else None
        assert evaluated_language(entry.name) == expected, entry


def test_every_multilingual_task_of_lm_eval_has_a_language_or_two(lm_evals: dict[str, Any]) -> None:
    root = Path(lm_eval.tasks.__file__).parent
    names = {
        name: entry for name, entry in lm_evals.items()
        if entry.yaml_path and entry.yaml_path.relative_to(root).parts[0] in FOLDERS
    }  # fmt: skip
    assert len(names) > 3800
    for name, entry in names.items():
        found = evaluated_language(name)
        if re.fullmatch(r"mlqa_(..)_(?!\1)..", name) or (entry.kind.name == "GROUP" and name in {"pawsx", *FOLDERS}):
            assert found is None, name  # two languages, or all of them
        else:
            assert found is not None and name.startswith(family_prefixes()), name
            assert _agrees(found, entry.cfg.get("dataset_name")), (name, found)


def _agrees(found: str, config: Any) -> bool:
    """lm-eval's configuration name says the same language, where it is a code or a language's English name."""
    parts = re.findall(rf"{CODE}|[A-Za-z]+", str(config or ""))
    names = {"Bengali": "ben_Beng", "Tagalog": "tgl_Latn", "jp": "jpn_Jpan", "North": "mkd_Cyrl", "qu": "quy_Latn"}
    codes = {part: names.get(part) or _code(part) for part in parts}
    known = {code for code in codes.values() if code}
    return not known or any(languages.same_language(found, code) for code in known)


def _code(part: str) -> str | None:
    by_name = {languages.english_name(code): code for code in families.include.CODES}
    try:
        return by_name.get(part) or languages.normalise(part)
    except UnknownLanguageError:
        return None


# Whose words look like codes: "and", "law" and "no" are languages too.
NOT_MULTILINGUAL = {
    "agieval", "arabic_leaderboard_complete", "arabic_leaderboard_light", "bigbench", "evalita_llm", "kmmlu",
    "leaderboard", "libra", "score", "uncheatable_eval", "zhoblimp",
}  # fmt: skip


def is_code(text: str) -> bool:
    try:
        return bool(languages.normalise(text))
    except SteeringError:
        return False


def test_every_multilingual_folder_of_lm_eval_is_known_or_left_out_by_name() -> None:
    """Read from lm-eval's task files: names that hold at least four language codes of two or three letters."""
    root = Path(lm_eval.tasks.__file__).parent
    name_line = re.compile(r"""^(?:task|group):\s*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)
    folders: dict[str, set[str]] = {}
    for path in root.rglob("*.yaml"):
        names = name_line.findall(path.read_text(encoding="utf-8", errors="ignore"))
        folders.setdefault(path.relative_to(root).parts[0], set()).update(names)
    ending = re.compile(r"_([a-z]{2,3})(?:_[a-z_]*)?$")
    endings = {folder: {match[1] for match in map(ending.search, names) if match} for folder, names in folders.items()}
    multilingual = {folder for folder, words in endings.items() if sum(map(is_code, words)) >= 4}
    assert multilingual >= {"afrixnli", "mmlu_prox", "mgsm", "xcopa", "multiblimp"}
    unknown = {folder for folder in multilingual if not any(map(evaluated_language, folders[folder]))}
    assert unknown <= {*LEFT_OUT, *NOT_MULTILINGUAL}, "a family for the table, or for LEFT_OUT"
    assert set(folders) >= set(LEFT_OUT), "lm-eval has no such folder any more"


# Tasks of known folders that have no evaluated language, by what their names hold: two languages, a translation into
# English, or a language that has no code of ours (Vai; the Classical Sanskrit of `cls_deva`).
WITHOUT_LANGUAGE = re.compile(r"mlqa_|_flores_|_translate_|phrases_|_vai(_|$)|_cls_deva")


def test_in_a_known_folder_every_task_has_its_language_or_a_reason() -> None:
    root = Path(lm_eval.tasks.__file__).parent
    name_line = re.compile(r"""^task:\s*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)
    folders: dict[str, set[str]] = {}
    for path in root.rglob("*.yaml"):
        names = name_line.findall(path.read_text(encoding="utf-8", errors="ignore"))
        folders.setdefault(path.relative_to(root).parts[0], set()).update(names)
    known = {folder: names for folder, names in folders.items() if any(map(evaluated_language, names))}
    assert set(known) >= {
        "global_piqa", "multiblimp", "mmlu_prox", "afrixnli", "afrimmlu", "afrimgsm", "arc_mt", "xnli_eu", "turblimp",
        "basque_bench", "catalan_bench", "galician_bench", "spanish_bench",
    }  # fmt: skip
    lost = {name for names in known.values() for name in names if not evaluated_language(name)}
    assert {name for name in lost if not WITHOUT_LANGUAGE.search(name)} == set()


@pytest.mark.parametrize(
    ("task", "code"),
    [
        ("teca", "cat_Latn"), ("xnli_va", "cat_Latn"), ("galcola", "glg_Latn"), ("escola", "spa_Latn"),
        ("phrases_ca-va", None), ("french_bench_fquadv2", "fra_Latn"),
        ("xcopa_id", "ind_Latn"), ("xwinograd_jp", "jpn_Jpan"), ("include_base_44_north_macedonian_stem", "mkd_Cyrl"),
        ("mgsm_en_cot_sw", "swh_Latn"), ("global_mmlu_full_ms_anatomy", "zsm_Latn"), ("m_mmlu_nb", "nob_Latn"),
        ("truthfulqa_fr_mc2", "fra_Latn"), ("mlqa_de_de", "deu_Latn"), ("belebele_zho_Hant", "zho_Hant"),
        ("steering_demo_continuation_fra_Latn", "fra_Latn"), ("steering_flores_eng_Latn_deu_Latn", None),
        ("mlqa_de_en", None), ("xcopa", None), ("arc_easy", None), ("arc_challenge", None), ("hellaswag", None),
        ("truthfulqa_mc1", None), ("mmlu_anatomy", None), ("xnli_eu_native", "eus_Latn"),
        ("xcopa_xx", None), ("paws_x", None),
        ("steering_xcopa", None), ("", None), ("global_piqa_parallel_cloze_cmn_hant", "zho_Hant"),
        ("global_piqa_nonparallel_generation_spa_latn_mexi", "spa_Latn"), ("global_piqa_cloze", None),
        ("multiblimp_fra", "fra_Latn"), ("multiblimp_fra_x", None), ("mmlu_prox_lite_sw_math", "swh_Latn"),
        ("mmmlu_pt_br_stem", "por_Latn"), ("mmmlu", None), ("afrixnli_en_direct_orm", "gaz_Latn"),
        ("afrixnli_translate_ewe_prompt_1", None), ("afrimmlu_direct_swa_prompt_2", "swh_Latn"),
        ("afrimgsm_cot_zul_prompt_5", "zul_Latn"), ("afrimgsm_cot_translate_zul_prompt_5", None),
        ("arc_challenge_mt_is", "isl_Latn"), ("turblimp_passives", "tur_Latn"), ("truthfulqa-multi_gen_gl", "glg_Latn"),
        ("paws_es_spanish_bench", "spa_Latn"), ("catalan_bench_flores_ca-en", None), ("arc_ca_easy", "cat_Latn"),
    ],
)  # fmt: skip
def test_never_a_guess(task: str, code: str | None) -> None:
    assert evaluated_language(task) == code


def test_the_user_says_the_language_of_other_tasks() -> None:
    assert evaluated_language("arc_easy", {"arc_easy": "en"}) == "eng_Latn"
    assert evaluated_language("xcopa_id", {"xcopa_id": "id", "arc_easy": "en"}) == "ind_Latn"
    assert evaluated_language("mlqa_de_en", {"mlqa_de_en": "deu"}) == "deu_Latn"
    assert evaluated_language("arc_challenge", {"arc_easy": "en"}) is None
    with pytest.raises(SteeringError, match="the items of xcopa_id are in ind_Latn"):
        evaluated_language("xcopa_id", {"xcopa_id": "fr"})
    with pytest.raises(UnknownLanguageError, match="did you mean 'deu_Latn'"):
        evaluated_language("arc_easy", {"arc_easy": "German"})


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        (xcopa.source, "ita_Lat", "XCOPA is not in ita_Lat; did you mean ita_Latn?"),
        (xcopa.source, "it", "XCOPA is not in it; did you mean ita_Latn?"),
        (xquad.source, "ita_Latn", "XQuAD is not in ita_Latn; its languages: arb_Arab, deu_Latn, ell_Grek"),
        (belebele.source, "arb_Hebr", "Belebele is not in arb_Hebr; did you mean"),
        (mlqa.source, "deu_Latn-French", "unknown language 'French'"),
    ],
)
def test_an_unknown_language_gets_the_nearest(source: Any, text: str, message: str) -> None:
    with pytest.raises(SteeringError) as caught:
        source(text)
    assert str(caught.value).startswith(message)
