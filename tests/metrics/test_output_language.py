from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.metrics import output_language
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.output_language import METRICS, IdentifiedText, forced, output_metrics
from lm_eval_steering.metrics.registered import check_options, lang_expected, lfs, lfs_clean, lpr

FRENCH = "Je ne sais pas ce que tu veux dire par là."
GERMAN = "Ich habe heute leider keine Zeit für dich."
RUSSIAN = "Сегодня утром мы пошли в парк и долго гуляли."


def test_all_metrics_of_one_output() -> None:
    found = output_metrics(RUSSIAN, targets=["rus_Cyrl"], expected="deu_Latn")
    confidence = found.pop("lang_confidence")
    assert isinstance(confidence, float) and 0.5 < confidence <= 1
    assert found == {
        "lfs": 1.0, "lfs_clean": 1.0, "lang_expected": 0.0, "output_language": "rus_Cyrl", "lang_unknown": 0.0,
        "lpr": 0.0, "lpr_skipped": 0.0, "script_share": 0.0, "degenerate": 0.0,
    }  # fmt: skip
    about_target = output_metrics(RUSSIAN, targets=["rus_Cyrl"], expected="deu_Latn", about="target")
    assert {name: about_target[name] for name in ("lpr", "wpr", "lcpr", "script_share")} == {
        "lpr": 1.0, "wpr": 1.0, "lcpr": (1.0, 1.0), "script_share": 1.0,
    }  # fmt: skip


def test_what_is_not_known_is_absent_and_never_zero() -> None:
    always = {"output_language", "lang_confidence", "lang_unknown", "degenerate"}
    assert set(output_metrics(FRENCH)) == always
    assert set(output_metrics(FRENCH, targets=["fra_Latn"])) == always | {
        "lfs",
        "lfs_clean",
        "lpr",
        "lpr_skipped",
        "script_share",
    }
    assert set(output_metrics(RUSSIAN, targets=["rus_Cyrl"])) == set(METRICS) - {"lang_expected", "unfinished"}


def test_clean_success_is_success_of_outputs_that_are_not_degenerate() -> None:
    found = [
        output_metrics(text, targets=["rus_Cyrl"])
        for text in (RUSSIAN, " ".join([RUSSIAN] * 4), GERMAN, " ".join(["мы долго гуляли в парке"] * 4), "")
    ]
    assert [metrics["lfs"] for metrics in found] == [1, 1, 0, 1, 0]
    assert [metrics["degenerate"] for metrics in found] == [0, 1, 0, 1, 1]
    assert [metrics["lfs_clean"] for metrics in found] == [1, 0, 0, 0, 0]
    assert "lfs_clean" not in output_metrics(RUSSIAN)
    assert lfs_clean(["x"], [IdentifiedText.of(RUSSIAN, LanguageIdentifier(), ["rus_Cyrl"])]) == {"lfs_clean": 1.0}


def test_unknown_counts_in_every_denominator() -> None:
    found = output_metrics("", targets=["eng_Latn"], expected="eng_Latn")
    assert found["output_language"] == "unknown" and found["lang_unknown"] == 1.0
    assert found["lfs"] == found["lang_expected"] == found["script_share"] == 0.0
    assert found["degenerate"] == 1.0
    assert "lpr" not in found and found["lpr_skipped"] == 1.0
    digits = output_metrics("1 2 3 4 5", targets=["eng_Latn"])
    assert digits["lfs"] == 0.0 and digits["lpr"] == 0.0


def test_a_language_that_the_identifier_does_not_know_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    output_language._warned.clear()
    with caplog.at_level(logging.WARNING, "lm_eval.steering"):
        found = output_metrics(FRENCH, targets=["kbp_Latn"], expected="kbp_Latn")
    assert not {"lfs", "lang_expected", "lpr", "script_share"} & set(found)
    assert "lid.176.ftz does not know kbp_Latn" in caplog.text
    assert output_metrics(FRENCH, targets=["kbp_Latn", "fra_Latn"])["lfs"] == 1.0


def test_a_text_brings_its_own_targets_and_identifier_through_a_cache() -> None:
    strict = LanguageIdentifier(threshold=1.0, letters=7)
    text = pickle.loads(pickle.dumps(IdentifiedText.of("Paris est belle, non", strict, ["fra_Latn"])))
    assert isinstance(text, IdentifiedText) and text.identifier == strict and text.targets == ("fra_Latn",)
    assert output_metrics(text)["lfs"] == 0.0
    other = output_metrics(text, identifier=LanguageIdentifier(threshold=0.0))
    assert other["output_language"] != "unknown" and "lfs" in other
    assert "lfs" not in output_metrics(text, targets=())


def test_forced_needs_a_text_that_knows_its_target() -> None:
    assert forced(FRENCH) is None
    assert forced(IdentifiedText(FRENCH, "fra_Latn", 0.9)) is None
    assert forced(IdentifiedText(FRENCH, "fra_Latn", 0.9, ["fra_Latn"])) == 1.0
    assert forced(IdentifiedText("", "unknown", 0.1, ["eng_Latn"])) == 0.0


def test_registered_metrics_take_options_and_leave_out_what_they_do_not_know() -> None:
    assert lang_expected(["x"], [GERMAN]) == {}
    assert lang_expected(["x"], [GERMAN], expected="de") == {"lang_expected": 1.0}
    assert lang_expected(["x"], [GERMAN], expected="de", lid_letters=1000) == {"lang_expected": 0.0}
    steered = IdentifiedText.of(GERMAN, LanguageIdentifier(), ["deu_Latn"])
    assert lfs(["x"], [FRENCH]) == {} and lfs(["x"], [steered]) == {"lfs": 1.0}
    assert lpr(["x"], [steered], expected="fr") == {"lpr": 0.0}
    assert lpr(["x"], [steered], expected="fr", about="target") == {"lpr": 1.0}
    assert lpr(["x"], [["a list", "of answers"]], expected="fr") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expectd": "fr"}, "metric lpr: unknown option 'expectd'; did you mean 'expected'"),
        ({"about": "both"}, "metric lpr: about='both': expected expected or target"),
        ({"expected": "french"}, "unknown language 'french'"),
        ({"lid": "glotlib"}, "no name glotlib"),
        ({"lid_threshold": 7}, "lid_threshold=7.0: expected a probability"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        check_options("lpr", options)


def test_about_is_checked_for_callers_from_python_too() -> None:
    with pytest.raises(SteeringError, match="about='lines'"):
        output_metrics(FRENCH, about="lines")


def test_every_metric_says_what_it_is() -> None:
    assert all(len(metric.__doc__ or "") > 40 for metric in METRICS.values())
    docs = (Path(__file__).parents[2] / "docs" / "output-language.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"| `{name}` |" not in docs] == []
