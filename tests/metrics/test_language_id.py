from __future__ import annotations

from pathlib import Path

import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.harness.tasks import demo_languages, sentence
from lm_eval_steering.languages import same_language
from lm_eval_steering.metrics.language_id import UNKNOWN, Identified, LanguageIdentifier
from lm_eval_steering.metrics.likelihood import nats_per_token, token_perplexity
from lm_eval_steering.metrics.output_language import language_counts


def test_the_offline_default_is_the_published_file() -> None:
    identifier = LanguageIdentifier()
    assert identifier.file.name == "lid.176.ftz"
    assert identifier.sha256 == "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
    assert identifier.signature() == "lid.176.ftz@8f3472cf>0.5"


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "123 456", "😀😀", "?!...", "\x00\x07"])
def test_text_without_words_is_unknown_not_english(text: str) -> None:
    (found,) = LanguageIdentifier().identify([text])
    assert found.language == UNKNOWN
    assert found.confidence < 0.5


def test_newlines_and_control_characters_do_not_matter() -> None:
    text = "Das ist ein schöner Tag und wir gehen in den Park."
    plain, broken = LanguageIdentifier().identify([text, text.replace(" ", "\n \x00")])
    assert plain.language == broken.language == "deu_Latn"


def test_the_threshold_decides_between_a_guess_and_unknown() -> None:
    text = ["Ja no OK"]
    (low,), (high,) = (LanguageIdentifier(threshold=t).identify(text) for t in (0.0, 0.99))
    assert low.language != UNKNOWN and high == Identified(UNKNOWN, low.confidence)


@pytest.mark.parametrize("language", demo_languages())
def test_the_demos_sentences_are_in_their_languages(language: str) -> None:
    found = LanguageIdentifier().identify(sentence(number, language) for number in range(60))
    assert sum(same_language(item.language, language) for item in found if item.language != UNKNOWN) == 60


def test_a_missing_model_file_is_named() -> None:
    with pytest.raises(SteeringError, match=r"no model file nowhere\.bin"):
        LanguageIdentifier(Path("nowhere.bin")).identify(["a"])


def test_aggregations() -> None:
    assert language_counts(["fra_Latn", "unknown", "fra_Latn", "deu_Latn"]) == "fra_Latn:2 deu_Latn:1 unknown:1"
    items = [(-2.0, 1), (-4.0, 2)]
    assert nats_per_token(items) == 2.0
    assert token_perplexity(items) == pytest.approx(7.389056)
