"""Which language an item expects its answer to be in, and our metrics scored with the item in hand.

Its document's `expected_language` goes first. Else the task's metadata holds for all its items:
`expected_language`, or `evaluated_language` where that is one language. Nothing is guessed from names. A document's
`about_language` says what the metrics of a wanted language are about, as `about` does beside a metric.

lm-eval 0.4.13 calls a registered metric without the document, and for items with several references turns every value
into 0 or 1. So our metrics are scored here (`compat.score_with_documents`), for the tasks that list them and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_steering.languages import normalise
from lm_eval_steering.lmeval.compat import metrics_of
from lm_eval_steering.metrics.registered import Metric, check_options, value_of

EXPECTED_LANGUAGE = "expected_language"
EVALUATED_LANGUAGE = "evaluated_language"
ABOUT_LANGUAGE = "about_language"


def expected_language(document: Any, metadata: Any) -> str | None:
    """Code of the language that an item expects; None where nothing says so, or several languages are evaluated.

    Raises:
        UnknownLanguageError: if what is said is no language.
    """
    if isinstance(document, Mapping) and EXPECTED_LANGUAGE in document:
        named = document[EXPECTED_LANGUAGE]
    elif isinstance(metadata, Mapping):
        named = metadata.get(EXPECTED_LANGUAGE) or metadata.get(EVALUATED_LANGUAGE)
    else:
        named = None
    if isinstance(named, list | tuple):
        named = named[0] if len(named) == 1 else None
    return normalise(str(named)) if named and "+" not in str(named) else None


def options_of(document: Any, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a metric for one item: what stands beside it in the task's list, and what its document says."""
    about = document.get(ABOUT_LANGUAGE) if isinstance(document, Mapping) else None
    return ({"about": about} if about else {}) | dict(beside)


def values_with_document(task: Any, document: Any, results: Any) -> tuple[set[str], dict[str, Any]]:
    """Names of our metrics in a task's list, and their values for one item; those that are undefined have none.

    Args:
        task: of lm-eval.
        document: of the item.
        results: the answers to its requests, as the task's filter left them.
    """
    ours = _ours(task)
    if not ours:
        return set(), {}
    expected = expected_language(document, task.config.metadata)
    values = {
        name: value_of(name, results[0], options_of(document, options), expected) for name, options in ours.items()
    }
    return set(ours), {name: value for name, value in values.items() if value is not None}


def check_task(task: Any) -> None:
    """Refuse options of our metrics, and documents, that cannot be, before anything is generated.

    Raises:
        SteeringError: naming the metric and the option.
    """
    ours = _ours(task)
    for name, options in ours.items():
        check_options(name, options)
    for instance in task.instances if ours else ():
        expected_language(instance.doc, task.config.metadata)
        check_options(task.config.task, options_of(instance.doc, {}))


def _ours(task: Any) -> dict[str, dict[str, Any]]:
    """Name -> options of our metrics in a task's list; none where the task scores its items itself."""
    if task.OUTPUT_TYPE != "generate_until" or callable(task.config.process_results):
        return {}
    return {name: options for name, (metric, options) in metrics_of(task).items() if isinstance(metric, Metric)}
