"""From text to a recording: read the text, run the model over what is missing, keep each language when it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from lm_eval_steering import files
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import CorpusError, RecordingError, SteeringError
from lm_eval_steering.neurons.calibrate import PERCENTILES
from lm_eval_steering.neurons.corpus import Corpus, TextSource
from lm_eval_steering.neurons.recording import LanguageText, Recording, RecordingFolder
from lm_eval_steering.neurons.rows import SENTENCES, TokenRows, calibration_rows, lines_of, packed_rows, sentence_rows
from lm_eval_steering.neurons.running import CONTEXT, ModelRunner, count_active, sentence_means, tokens_per_second
from lm_eval_steering.progress import readable_seconds

_BATCHES_PER_CHECKPOINT = 16  # of each process: a batch takes seconds, on CPU and on an accelerator alike


@dataclass(frozen=True)
class Search:
    """What text to look at, and how.

    Attributes:
        corpus: where the text is (`neurons.corpus`).
        languages: codes of the form fra_Latn.
        tokens: budget per language; all of the text by default.
        rows: `packed` windows of the context length, or one row per line (`sentences`).
        context: tokens per row; the smaller of 2,048 and the model's own length by default.
        calibration_corpus: where the sentences to calibrate with are; by default the lines of `corpus`.
        sentences: their number per language.
        percentiles: which `pNN` of the neurons to keep.
        residual: whether the hidden states are measured too, for site=residual.
    """

    corpus: str
    languages: tuple[str, ...]
    tokens: int | None = None
    rows: Literal["packed", "sentences"] = "packed"
    context: int | None = None
    calibration_corpus: str | None = None
    sentences: int = SENTENCES
    percentiles: tuple[int, ...] = PERCENTILES
    residual: bool = False

    def __post_init__(self) -> None:
        if not self.languages:
            raise SteeringError("no languages: name them as in fra_Latn,ind_Latn")
        if self.tokens is not None and self.tokens <= 0:
            raise CorpusError(f"a budget of {self.tokens} tokens: expected a number above 0")
        if self.sentences <= 0:
            raise CorpusError(f"{self.sentences} calibration sentences: expected a number above 0")
        if wrong := [p for p in self.percentiles if not 0 < p < 100]:
            raise SteeringError(f"percentile {wrong[0]}: expected whole numbers from 1 to 99")
        self.corpora()

    def corpora(self) -> tuple[Corpus, Corpus]:
        """To record, and to calibrate with."""
        recorded = Corpus.parse(self.corpus)
        return recorded, Corpus.parse(self.calibration_corpus) if self.calibration_corpus else recorded

    def length(self, model: LazyModel) -> int:
        """Tokens per row after BOS.

        Raises:
            SteeringError: if the model cannot read as many.
        """
        longest = model.context
        if self.context is not None and longest is not None and self.context > longest:
            raise SteeringError(f"context={self.context}: the model reads at most {longest} tokens and BOS")
        return self.context or min(CONTEXT, longest or CONTEXT)

    def calibration_texts(self, model: LazyModel) -> dict[str, TokenRows]:
        """The sentences to calibrate with, of each language.

        Raises:
            CorpusError: if a language has none.
        """
        corpus, length = self.corpora()[1], self.length(model)
        return {
            code: calibration_rows(corpus.source(code).documents(), code, model.tokenizer, length, self.sentences)
            for code in self.languages
        }


class Recorder:
    """One search in one model, with its recording in one folder.

    Attributes:
        runner: the model, loaded when its weights are first needed, and how it is run.
        search: what text to look at.
        folder: of the recording; only what is missing in it is done.
    """

    def __init__(self, runner: ModelRunner, search: Search, folder: RecordingFolder) -> None:
        self.runner, self.search, self.folder = runner, search, folder
        self.model, self.ranks, self.log = runner.model, runner.ranks, runner.log
        self._prepared = False

    # --- the text -----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Everything that decides what is recorded, in values that JSON can hold."""
        recorded, calibrating = self.search.corpora()
        return {
            "model": self.model.description(),
            "corpus": {
                "source": recorded.name,
                "calibration_source": calibrating.name,
                "rows": self.search.rows,
                "context": self.search.length(self.model),
                "budget": self.search.tokens,
                "calibration_sentences": self.search.sentences,
                "prefix": self.runner.prefix_texts,
            },
        }

    def prepare(self) -> None:
        """Read and tokenise the text of every language that is not there yet; the model is not loaded.

        Raises:
            RecordingError: if the folder was made with other settings, or other text.
            CorpusError: if the text of a language is missing, empty or cannot be read.
        """
        if not self._prepared:
            self.ranks.after_first(self._prepare)
            self._warn_of_short_texts()
            self._prepared = True

    def _prepare(self) -> None:
        settings = self.settings()
        self.folder.check(settings)
        recorded, calibrating = self.search.corpora()
        identities = {
            language: json.loads(
                files.canonical({"recorded": recorded.identity(language), "calibrated": calibrating.identity(language)})
            )
            for language in self.search.languages
        }
        for language, identity in identities.items():
            self._check_text(language, identity)
        missing = [language for language in identities if not self.folder.has("tokens", language)]
        sources = {language: (recorded.source(language), calibrating.source(language)) for language in missing}
        self.folder.begin(settings)
        self._say_reused("text", missing)
        if missing:
            with self.log.bar("reading text", len(missing), "language") as bar:
                for language, source in sources.items():
                    self.folder.write_tokens(language, self._read(language, *source, identities[language]))
                    self._check_text(language, identities[language])
                    self.log.note("source", language=language, **source[0].identity())
                    bar.update(1)
        self._refuse_equal_texts()

    def _say_reused(self, what: str, missing: Sequence[str]) -> None:
        """Name the languages of which the folder holds something already."""
        if kept := [language for language in self.search.languages if language not in missing]:
            self.log.say(f"{what} of {', '.join(kept)}: reused from {self.folder.path}")

    def _check_text(self, language: str, identity: Mapping[str, Any]) -> None:
        """Refuse a language whose text has changed since it was read, or was counted."""
        if not self.folder.has("tokens", language):
            return
        stored = self.folder.metadata("tokens", language)
        counted = self.folder.metadata("counts", language) if self.folder.has("counts", language) else stored
        if stored["source"] != identity or stored["sha256"] != counted["sha256"]:
            raise RecordingError(
                f"{self.folder.path}: the text of {language} has changed since it was read; give another --recording "
                "folder, or remove this one"
            )

    def _refuse_equal_texts(self) -> None:
        """Two languages with the same text, to the token, are one text under two names."""
        seen: dict[str, str] = {}
        for language in self.search.languages:
            other = seen.setdefault(self.folder.metadata("tokens", language)["sha256"], language)
            if other != language:
                raise CorpusError(f"{other} and {language} have the same text: the corpus does not tell them apart")

    def _read(
        self, language: str, recorded: TextSource, calibrating: TextSource, identity: Mapping[str, Any]
    ) -> LanguageText:
        length, tokenizer = self.search.length(self.model), self.model.tokenizer
        if self.search.rows == "packed":
            rows = packed_rows(recorded.documents(), tokenizer, length, self.search.tokens)
        else:
            rows = sentence_rows(lines_of(recorded.documents()), tokenizer, length, budget=self.search.tokens)
        if not rows.tokens:
            raise CorpusError(f"corpus for {language}: no tokens in it")
        sentences = calibration_rows(calibrating.documents(), language, tokenizer, length, self.search.sentences)
        return LanguageText(rows, sentences, identity)

    def _warn_of_short_texts(self) -> None:
        budget = self.search.tokens
        available = {language: self.folder.metadata("tokens", language)["tokens"] for language in self.search.languages}
        short = {language: tokens for language, tokens in available.items() if budget is not None and tokens < budget}
        if short:
            names = ", ".join(f"{language} ({tokens:,})" for language, tokens in short.items())
            self.log.say(f"warning: less text than the budget of {budget:,} tokens in {names}")
        self.log.note("text", tokens=available)

    # --- recording ----------------------------------------------------------------------------------------------

    def record(self, with_sentences: bool = False) -> Recording:
        """Record every language that is not there yet; the model is loaded only if there is one.

        Args:
            with_sentences: keep each calibration sentence's means of all units too, for `activated` and
                `average-precision`.

        Raises:
            RecordingError: if the folder was made with other settings, text or weights.
            CorpusError: if the text of a language is missing, empty or cannot be read.
        """
        self.prepare()
        languages = self.search.languages
        to_count = [language for language in languages if not self.folder.has("counts", language)]
        to_average = [
            language for language in languages if with_sentences and not self.folder.has("sentences", language)
        ]
        self._say_reused("counts", to_count)
        if with_sentences:
            self._say_reused("sentence means", to_average)
        if to_count or to_average:
            self.runner.load()
            self.folder.check_weights(self.model.sketch, self.model.name)
        if to_count:
            self._count(to_count)
        if to_average:
            self._average(to_average)
        self.ranks.gather(None)  # until the first process has written the last file
        return self.folder.load(languages, with_sentences)

    def sentences(self) -> dict[str, TokenRows]:
        """The sentences to calibrate with, of each language."""
        self.prepare()
        return {language: self.folder.text(language).sentences for language in self.search.languages}

    def _count(self, languages: Sequence[str]) -> None:
        tokens = {language: self.folder.metadata("tokens", language)["tokens"] for language in languages}
        self._estimate(languages[0], sum(tokens.values()))
        with self.log.bar("recording", sum(tokens.values()), "tok") as overall:
            for language in languages:
                facts = {
                    "language": language,
                    "tokens": tokens[language],
                    "batch_size": self.runner.fitting_batch_size,
                    "processes": self.ranks.size,
                }
                with self.log.timed("record", **facts), self.log.bar(language, tokens[language], "tok", level=1) as bar:
                    self._count_one(language, (overall, bar))

    def _estimate(self, language: str, total: int) -> None:
        """Say how long it will take, from a short warm-up."""
        batches = self.runner.batches(self.folder.text(language).rows)
        speed = tokens_per_second(self.model.sites, batches) * self.ranks.size
        self.log.say(
            f"recording {total:,} tokens: about {readable_seconds(total / speed)} ({speed:,.0f} tokens/s, "
            f"{self.runner.fitting_batch_size} rows per batch)"
        )

    def _count_one(self, language: str, bars: Sequence[tqdm[Any]]) -> None:
        def progress(tokens: int) -> None:
            for bar in bars:  # each process counts its share, and all are about equally far
                bar.update(tokens * self.ranks.size)

        rows = self.folder.text(language).rows
        # Another batch size may count an activation next to 0 otherwise, so what it began is not gone on with.
        made_of = {
            "sha256": rows.sha256(),
            "weights": list(self.model.sketch),
            "batch_size": self.runner.fitting_batch_size,
            "processes": self.ranks.size,
        }
        counts, done = self.folder.partial_counts(language, made_of)
        stretches = self.runner.batches(rows).stretches(_BATCHES_PER_CHECKPOINT)
        counted_before = sum(stretch.tokens for stretch in stretches[:done])
        if done:
            self.log.say(f"{language}: goes on after {counted_before * self.ranks.size:,} tokens counted before")
        for bar in bars:
            bar.update(counted_before)
        for number, stretch in enumerate(stretches[done:], done + 1):
            counted = count_active(self.model.sites, stretch, self.ranks, progress)
            counts = counted if counts is None else counts + counted
            if self.ranks.first and number < len(stretches):
                self.folder.write_partial_counts(language, counts, number, made_of)
        if self.ranks.first and counts is not None:
            self.folder.write_counts(language, counts, rows.tokens, rows.sha256(), self.model.sketch)

    def _average(self, languages: Sequence[str]) -> None:
        with self.log.bar("averaging sentences", len(languages), "language") as bar:
            for language in languages:
                batches = self.runner.batches(self.folder.text(language).sentences)
                means = sentence_means(self.model.sites, batches, self.ranks)
                if self.ranks.first:
                    self.folder.write_sentence_means(language, means)
                bar.update(1)
