"""Which language an item expects its answer to be in, and our metrics scored with the item in hand.

The item's own word goes first: its document's `expected_language`. Else the task's metadata speaks for all its items:
`expected_language`, or `evaluated_language` where that is one language. Nothing is guessed from names. A document's
`about_language` says what the metrics of a wanted language are about, as `about` does beside a metric.

lm-eval 0.4.13 calls a registered metric without the document, and for items with several references turns every value
into 0 or 1. `score_ours` therefore takes our metrics out of its hands, for the tasks that list them and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_steering.languages import normalise
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
        said = document[EXPECTED_LANGUAGE]
    elif isinstance(metadata, Mapping):
        said = metadata.get(EXPECTED_LANGUAGE) or metadata.get(EVALUATED_LANGUAGE)
    else:
        said = None
    if isinstance(said, list | tuple):
        said = said[0] if len(said) == 1 else None
    return normalise(str(said)) if said and "+" not in str(said) else None


def options_of(document: Any, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a metric for one item: what stands beside it in the task's list, and what its document says."""
    about = document.get(ABOUT_LANGUAGE) if isinstance(document, Mapping) else None
    return ({"about": about} if about else {}) | dict(beside)


def score_ours(task_class: Any) -> None:
    """Make lm-eval's class of YAML tasks check our metrics before generation, and score them with the document."""
    if getattr(task_class.process_results, "_lm_eval_steering", False):
        return
    score, build = task_class.process_results, task_class.build_all_requests

    def process_results(self: Any, doc: Any, results: Any) -> Any:
        ours = _ours(self)
        if not ours:
            return score(self, doc, results)
        listed = self._metric_fn_list
        self._metric_fn_list = {name: metric for name, metric in listed.items() if name not in ours}
        try:
            found = score(self, doc, results)
        finally:
            self._metric_fn_list = listed
        expected = expected_language(doc, self.config.metadata)
        values = {
            name: value_of(name, results[0], options_of(doc, options), expected) for name, options in ours.items()
        }
        return found | {name: value for name, value in values.items() if value is not None}

    def build_all_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        built = build(self, *args, **kwargs)
        ours = _ours(self)
        for name, options in ours.items():
            check_options(name, options)
        for instance in self.instances if ours else ():
            expected_language(instance.doc, self.config.metadata)
            check_options(self.config.task, options_of(instance.doc, {}))
        return built

    process_results._lm_eval_steering = True  # type: ignore[attr-defined]
    task_class.process_results, task_class.build_all_requests = process_results, build_all_requests


def _ours(task: Any) -> dict[str, dict[str, Any]]:
    """Name -> options of our metrics in a task's list; none where the task scores its items itself."""
    if task.OUTPUT_TYPE != "generate_until" or callable(task.config.process_results):
        return {}
    return {
        name: task._metric_fn_kwargs[name]
        for name, metric in task._metric_fn_list.items()
        if isinstance(metric, Metric)
    }
