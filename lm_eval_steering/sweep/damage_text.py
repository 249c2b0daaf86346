"""The text that damage is measured on: of the steered language, in no task of the plan, and beyond calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from lm_eval_steering import resources
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import CorpusError
from lm_eval_steering.lmeval.expected_language import EVALUATED_LANGUAGE
from lm_eval_steering.lmeval.task_families.common import perplexity_metrics, text_documents
from lm_eval_steering.metrics.likelihood import MADE_FOR
from lm_eval_steering.neurons.corpus import Corpus
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.neurons.rows import SHORTEST, TokenRow, TokenRows, lines_of, tokenised
from lm_eval_steering.sweep.plan import DamagePart, PlanError

TASK, METRIC = "steering_damage", "nats_per_token"
_LISTED = ("bits_per_byte", "token_perplexity", METRIC, "left_out")
_FEWEST = 10  # lines, below which a damage says nothing
_SHORTEST_TEXT = 12  # characters from which an item's text inside a line makes that line the item's


class DamageText:
    """Lines of each language that damage is measured on."""

    def __init__(
        self,
        part: DamagePart,
        neuron_set: NeuronSet,
        calibration: str | None,
        calibration_sentences: int,
        model: Mapping[str, Any],
    ) -> None:
        """Nothing is read yet.

        Args:
            part: `damage` of the plan.
            neuron_set: of the plan.
            calibration: text that measures the plan's random controls, if it names one.
            calibration_sentences: number of its lines that do.
            model: arguments of the model class, for the tokenizer.
        """
        self._part, self._set, self._model = part, neuron_set, model
        self._controls = (calibration, calibration_sentences)
        keys = ("revision", "trust_remote_code")
        self._lazy = LazyModel(str(model["pretrained"]), **{key: model[key] for key in keys if key in model})

    def lines(self, language: str, items: Iterable[str]) -> list[str]:
        """The lines of a language.

        Args:
            language: code.
            items: every text in the documents of the plan's tasks; a line that holds one, or is part of one, is left
                out.

        Raises:
            PlanError: if the plan names no text and that of the neuron set is not at hand, or too few lines are left.
            CorpusError: if the text cannot be read.
        """
        texts = [text for text in items if len(text) >= _SHORTEST_TEXT]
        everything = "\n".join(texts)

        def is_an_item(line: str) -> bool:
            return line in everything or any(text in line for text in texts)

        corpus, used = self._source(language)
        lines = (
            line
            for number, (line, _) in enumerate(self._long_enough(corpus, language))
            if number >= used and not is_an_item(line)
        )
        found = list(islice(dict.fromkeys(lines), self._part.sentences))
        if len(found) < min(_FEWEST, self._part.sentences):
            raise PlanError(
                f"damage.text: {corpus.name} has {len(found)} lines of {language} beyond calibration and the plan's "
                f"items, expected {min(_FEWEST, self._part.sentences)} at least; name a text with more"
            )
        return found

    def _source(self, language: str) -> tuple[Corpus, int]:
        """The text, and how many of its lines of at least 5 tokens were used to calibrate."""
        calibration, sentences = self._controls
        if self._part.text is not None:
            corpus = Corpus.parse(_spelled_out(self._part.text))
            of_controls = calibration is not None and Corpus.parse(_spelled_out(calibration)) == corpus
            return corpus, max(self._calibrated_on(corpus, language), sentences if of_controls else 0)
        for named in dict.fromkeys([*([calibration] if calibration else []), "demo"]):
            corpus = Corpus.parse(_spelled_out(named))
            if used := self._calibrated_on(corpus, language):
                return corpus, max(used, sentences if named == calibration else 0)
        calibrated = self._set.provenance.corpus.get("calibration", {}).get("source")
        raise PlanError(
            "damage.text is missing: factors: {damage: ...} needs text of the steered languages that no task shares; "
            f"the neuron set was calibrated on {calibrated or 'no text'!r}, which neither controls.calibration nor "
            f"`demo` is for {language}; name one, damage: {{text: CORPUS}} (docs/corpora.md)"
        )

    def _calibrated_on(self, corpus: Corpus, language: str) -> int:
        """Number of the text's lines that the neuron set was calibrated on; 0 where it was calibrated on another."""
        provenance = self._set.provenance.corpus
        calibration = provenance.get("calibration") or {}
        number, expected = (calibration.get(key, {}).get(language) for key in ("sentences", "sha256"))
        if not number:
            return 0
        length = int(provenance.get("context") or 1 << 30)
        try:
            rows = [row[:length] for _, row in islice(self._long_enough(corpus, language), number)]
        except CorpusError:
            return 0
        return number if TokenRows.of(rows).sha256() == expected else 0

    def _long_enough(self, corpus: Corpus, language: str) -> Iterator[tuple[str, TokenRow]]:
        """Lines of at least 5 tokens, which calibration takes the first of, with their tokens."""
        lines = lines_of(corpus.source(language).documents())
        while chunk := list(islice(lines, 256)):
            for line, row in zip(chunk, tokenised(chunk, self._lazy.tokenizer), strict=True):
                if len(row) >= SHORTEST:
                    yield line, row


def _spelled_out(text: str) -> str:
    return str(resources.demo_calibration()) if text == "demo" else text


def task_of(lines: Sequence[str], language: str, model: Mapping[str, Any]) -> Any:
    """lm-eval's task of the text: log P(line | BOS), as in our perplexity tasks.

    Args:
        lines: of `DamageText.lines`.
        language: of the lines, which is steered.
        model: arguments of the model class, for its context length.
    """
    from lm_eval.api.task import ConfigurableTask

    documents = text_documents(enumerate(lines), model)
    documents = {name: table.map(lambda _: {MADE_FOR: [language]}) for name, table in documents.items()}

    def metrics(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        return {name: value for name, value in perplexity_metrics(document, results).items() if name in _LISTED}

    aggregations = {"left_out": "mean"}
    return ConfigurableTask(
        config={
            "task": TASK,
            "custom_dataset": lambda **_: documents,
            "output_type": "loglikelihood",
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": "",
            "doc_to_target": "{{requested}}",
            "target_delimiter": "",
            "process_results": metrics,
            "metric_list": [
                {"metric": name, "aggregation": aggregations.get(name, name), "higher_is_better": False}
                for name in _LISTED
            ],
            "metadata": {"version": 1.0, EVALUATED_LANGUAGE: language},
        }
    )


def texts_of(documents: Iterable[Any]) -> Iterator[str]:
    """Every text in some documents, however deep."""
    for part in documents:
        if isinstance(part, str):
            yield part.strip()
        elif isinstance(part, Mapping):
            yield from texts_of(part.values())
        elif isinstance(part, list | tuple):
            yield from texts_of(part)
