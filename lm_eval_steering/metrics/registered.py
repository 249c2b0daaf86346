"""The output-language metrics as lm-eval calls them: `metric: lpr` in a task's list.

lm-eval gives a metric the answer and the reference and nothing else, so what the item expects is added by
`lmeval.expected_language`, which scores our metrics with the document. A task can also name it with the metric:

    metric_list:
      - {metric: lang_expected, expected: fra_Latn}

Options of each metric: `expected`, a code that goes before what the item says; `about`, `lid`, `lid_threshold` and
`lid_letters`, as for `output_metrics` and `LanguageIdentifier`. A text that knows what identified it needs no `lid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_steering.errors import SteeringError, did_you_mean
from lm_eval_steering.languages import normalise
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.output_language import EXPECTED, TARGET, Output, Value, measured, warn_once
from lm_eval_steering.metrics.output_language import METRICS as DEFINITIONS

_LID = ("lid", "lid_threshold", "lid_letters")
OPTIONS = ("expected", "about", *_LID)

_ABSENT = {
    "lfs": "the outputs carry no target language",
    "lfs_clean": "the outputs carry no target language",
    "lang_expected": "the item names no language that it expects",
}
_NO_LANGUAGE = "no language is expected, and none is steered to"


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of a metric that cannot be, before anything is generated.

    Raises:
        SteeringError: naming the metric and the option.
    """
    for option in options:
        if option not in OPTIONS:
            raise SteeringError(f"metric {name}: unknown option {option!r}{did_you_mean(option, OPTIONS)}")
    if options.get("about", EXPECTED) not in (EXPECTED, TARGET):
        raise SteeringError(f"metric {name}: about={options['about']!r}: expected {EXPECTED} or {TARGET}")
    if "expected" in options:
        normalise(str(options["expected"]))
    identifier = _identifier(options)
    if identifier is not None:
        identifier.signature()


def value_of(name: str, text: Any, options: Mapping[str, Any], expected: str | None = None) -> Value | None:
    """One metric of one output; None, and a warning, where it is undefined.

    Args:
        name: of a metric.
        text: what the model wrote, as the task's filter left it.
        options: of the metric in the task's list.
        expected: code of the language that the item expects.
    """
    if not isinstance(text, str):
        warn_once(f"{name} is left out: the task's filter turns an answer into {type(text).__name__}, not a text")
        return None
    option = options.get("expected")
    output = Output.of(
        text,
        expected=normalise(str(option)) if option else expected,
        identifier=_identifier(options),
        about=options.get("about", EXPECTED),
    )
    value = measured(name, output)
    if name == "unfinished":
        return value  # absent for every model that does not think
    if value is None and (name in _ABSENT or not output.wanted):
        warn_once(f"{name} is left out: {_ABSENT.get(name, _NO_LANGUAGE)} (see docs/output-language.md)")
    return value


def _identifier(options: Mapping[str, Any]) -> LanguageIdentifier | None:
    return LanguageIdentifier.from_arguments(options) if options.keys() & set(_LID) else None


class Metric:
    """What lm-eval calls, and `lmeval.expected_language` recognises.

    Attributes:
        name: of the metric, in a task's list and in results.
        higher_is_better: whether more of it is.
        aggregation: name of what makes one value of those of the items.
    """

    def __init__(self, name: str, higher_is_better: bool, aggregation: str = "mean") -> None:
        self.name = self.__name__ = name
        self.higher_is_better, self.aggregation = higher_is_better, aggregation
        self.__doc__ = DEFINITIONS[name].__doc__

    def __call__(self, references: Sequence[Any], predictions: Sequence[Any], **options: Any) -> dict[str, Value]:
        """Value of one output under the metric's name; nothing where it is undefined."""
        value = value_of(self.name, predictions[0], options)
        return {} if value is None else {self.name: value}


# Every metric is declared here and nowhere else: registration reads this table, and a test holds the entry points of
# `pyproject.toml` and the docs against it.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("lfs", True),
        Metric("lfs_clean", True),
        Metric("lang_expected", True),
        Metric("output_language", True, "language_counts"),
        Metric("lang_confidence", True),
        Metric("lang_unknown", False),
        Metric("lpr", True),
        Metric("lpr_skipped", False),
        Metric("wpr", True),
        Metric("lcpr", True, "lcpr"),
        Metric("script_share", True),
        Metric("degenerate", False),
        Metric("unfinished", False),
    )
}


def __getattr__(name: str) -> Metric:
    """The metrics by name, for the entry points in `pyproject.toml`."""
    if name in METRICS:
        return METRICS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
