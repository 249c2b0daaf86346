from __future__ import annotations

import pytest

from lm_eval_steering.errors import InterventionError, SteeringError, UnknownLanguageError
from lm_eval_steering.steering.intervention import build, from_arguments

AVAILABLE = ("fra_Latn", "deu_Latn", "eng_Latn")


def test_flat_arguments_become_steps() -> None:
    found = from_arguments(
        {
            "language": "fr+de",
            "op": "add",
            "value": "mean",
            "factor": "2.5",
            "site": "product",
            "deactivate": "eng_Latn",
        }
    ).resolve(AVAILABLE)
    first, second = found.steps
    assert (first.op, first.amount, first.languages, first.deactivation) == ("set", 0.0, ("eng_Latn",), True)
    assert (second.op, second.amount, second.factor) == ("add", "mean", 2.5)
    assert second.languages == ("fra_Latn", "deu_Latn")
    assert found.steered == ("fra_Latn", "deu_Latn")
    assert found.signature() == (
        "op:set|value:0|factor:1|deactivate:eng_Latn|site:product|layers:all ; "
        "op:add|value:mean|factor:2.5|lang:fra_Latn+deu_Latn|site:product|layers:all"
    )


def test_others_are_all_languages_that_are_not_steered() -> None:
    found = from_arguments({"language": "fra_Latn", "op": "scale", "factor": 3, "deactivate": "others"})
    assert found.resolve(AVAILABLE).steps[0].languages == ("deu_Latn", "eng_Latn")


def test_nothing_is_the_unsteered_model() -> None:
    assert from_arguments({"language": None}).signature() == "none"


def test_layers_are_ranges() -> None:
    step = from_arguments({"language": "fr", "op": "scale", "layers": "0-2+5"}).steps[0]
    assert step.chosen_layers(6) == {0, 1, 2, 5}
    with pytest.raises(InterventionError, match="5 is not a range within 0-4"):
        step.chosen_layers(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language": "fr", "op": "scael"}, "op='scael': expected one of scale, add, set; did you mean 'scale'"),
        ({"language": "fr", "op": "scale", "factor": "nan"}, "factor='nan': expected a finite number"),
        ({"language": "fr", "op": "scale", "factor": float("inf")}, "factor=inf: expected a finite number"),
        ({"language": "fr", "op": "scale", "factor": "two"}, "factor='two': expected a finite number"),
        ({"language": "fr", "op": "scale", "value": 3}, "op=scale takes none"),
        ({"language": "fr", "op": "add", "value": "maen"}, "value='maen': expected a number or one of.*'mean'"),
        ({"language": "fr", "op": "add", "value": "inf"}, "value='inf': expected a finite number"),
        ({"language": "fr", "op": "add", "site": "prodct"}, "site='prodct'.*did you mean 'product'"),
        ({"language": "fr", "op": "add", "layers": "3-"}, "layers='3-': expected ranges such as"),
        ({"language": "fr"}, "language= without op="),
        ({"factor": 2}, "factor= without language="),
        ({"language": "fr", "op": "scale", "facter": 2}, "unknown argument 'facter'; did you mean 'factor'"),
        ({"language": "fr", "op": "scale", "keep_shared": False}, "keep_shared= without deactivate="),
        ({"site": "product"}, "site= without language="),
        ({"language": "others", "op": "scale"}, "others: stands alone, in deactivate= only"),
        ({"language": "fr+", "op": "scale"}, "expected languages joined by"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(SteeringError, match=message) as error:
        from_arguments(arguments)
    assert "\n" not in str(error.value)


def test_an_unknown_language_or_key_is_named_with_the_closest() -> None:
    with pytest.raises(UnknownLanguageError, match="unknown language 'frensh'"):
        from_arguments({"language": "frensh", "op": "scale"})
    with pytest.raises(UnknownLanguageError, match=r"spa_Latn\) is not in the neuron set"):
        from_arguments({"language": "spa", "op": "scale"}).resolve(AVAILABLE)
    with pytest.raises(InterventionError, match=r"unknown key 'facter'.*did you mean 'factor'"):
        build({"steps": [{"op": "scale", "languages": ["fra_Latn"], "facter": 2}]})
