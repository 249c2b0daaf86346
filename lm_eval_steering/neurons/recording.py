"""A recording: how often each unit is active in each language, kept in a folder that a second run completes.

    recording.json                   the settings that every file in the folder was made with
    tokens/fra_Latn.safetensors      the rows of tokens that the model reads
    counts/fra_Latn.safetensors      how often each unit was active
    partial/fra_Latn.safetensors     the same of the first batches, while a language is recorded
    sentences/fra_Latn.safetensors   means over calibration sentences, where they were asked for

Each file is written when its language is done, and the first batches' counts every 16 batches, so that little is lost
when a run is killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering import files
from lm_eval_steering.errors import RecordingError
from lm_eval_steering.neurons.neuron_set import Provenance
from lm_eval_steering.neurons.rows import TokenRows


@dataclass(frozen=True)
class Recording:
    """What one model did with a corpus.

    Attributes:
        languages: order of the last axis.
        counts: (layer, unit, language) int64, tokens with activation > 0.
        n_tokens: (language,) int64, tokens counted: no padding, no special tokens.
        provenance: of the model and the text.
        sentence_means: per language one (sentence, layer, unit) float32 array; empty where they were not recorded.
    """

    languages: tuple[str, ...]
    counts: NDArray[np.int64]
    n_tokens: NDArray[np.int64]
    provenance: Provenance
    sentence_means: Sequence[NDArray[np.float32]] = ()


@dataclass(frozen=True)
class LanguageText:
    """What is read of one language.

    Attributes:
        rows: to record.
        sentences: to calibrate with, one a row.
        source: what tells the text from another (`corpus.Source.identity`).
    """

    rows: TokenRows
    sentences: TokenRows
    source: Mapping[str, Any]


class RecordingFolder:
    """The files of one model and corpus."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # --- settings -----------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """What the folder was made with; empty for a new one.

        Raises:
            RecordingError: if it is not a recording's.
        """
        file = self.path / "recording.json"
        if not file.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise RecordingError(f"{self.path}: a file, expected the folder of a recording")
            # What a killed process left half written does not count.
            if self.path.is_dir() and any(file.suffix != ".partial" for file in self.path.iterdir()):
                raise RecordingError(f"{self.path}: a folder without recording.json, so not a recording")
            return {}
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordingError(f"{file}: not JSON ({error})") from None
        if not isinstance(settings, dict) or settings.get("format_version") != files.FORMAT_VERSION:
            raise RecordingError(f"{file}: not a recording that this release reads")
        return settings

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that was made with other settings.

        Raises:
            RecordingError: naming each setting with both values.
        """
        stored = _flat(self.settings)
        if stored and "corpus.prefix" in _flat(settings):  # recorded before it was kept: BOS where there is one
            stored.setdefault("corpus.prefix", _flat(settings)["corpus.prefix"])
        wanted = _flat({"format_version": files.FORMAT_VERSION, **json.loads(files.canonical(settings))})
        differing = [name for name in sorted(wanted | stored) if stored and wanted.get(name) != stored.get(name)]
        if differing:
            details = "; ".join(
                f"{name}: {_short(stored.get(name))} there, {_short(wanted.get(name))} asked for" for name in differing
            )
            raise RecordingError(
                f"{self.path} holds a recording with other settings ({details}); give another --recording folder, or "
                "remove this one"
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Check the settings, and keep them where the folder is new."""
        self.check(settings)
        if not self.settings:
            content = {"format_version": files.FORMAT_VERSION, **settings}
            files.write_json(self.path / "recording.json", content, sort_keys=True)

    # --- files of a language ------------------------------------------------------------------------------------

    def has(self, part: str, language: str) -> bool:
        """Whether a language has its `tokens`, `counts` or `sentences`."""
        return self._file(part, language).is_file()

    def languages(self) -> tuple[str, ...]:
        """Those that are recorded."""
        return tuple(sorted(file.stem for file in (self.path / "counts").glob("*.safetensors")))

    def write_tokens(self, language: str, text: LanguageText) -> None:
        """Keep what is read of a language."""
        tensors = {
            "ids": text.rows.ids,
            "lengths": text.rows.lengths,
            "sentence_ids": text.sentences.ids,
            "sentence_lengths": text.sentences.lengths,
        }
        metadata = {"source": text.source, "tokens": text.rows.tokens, "sha256": text.rows.sha256()}
        files.write_tensors(self._file("tokens", language), "text", metadata, tensors)

    def metadata(self, part: str, language: str) -> dict[str, Any]:
        """Metadata of a language's `tokens` or `counts`: how many tokens, of which text; the tensors stay on disk."""
        kind = {"tokens": "text", "counts": "counts"}[part]
        return files.read_metadata(self._file(part, language), kind, RecordingError)

    def text(self, language: str) -> LanguageText:
        """What is read of a language."""
        metadata, tensors = self._read("tokens", language, "text")
        return LanguageText(
            TokenRows(tensors["ids"], tensors["lengths"]),
            TokenRows(tensors["sentence_ids"], tensors["sentence_lengths"]),
            metadata["source"],
        )

    def write_counts(
        self,
        language: str,
        counts: NDArray[np.int64],
        tokens: int,
        text_sha256: str = "",
        weights: Sequence[float] = (),
    ) -> None:
        """Keep the (layer, unit) counts of a language, over how many tokens, of which text, by which weights."""
        metadata = {"tokens": tokens, "sha256": text_sha256, "weights": list(weights)}
        files.write_tensors(self._file("counts", language), "counts", metadata, {"counts": counts})
        self._file("partial", language).unlink(missing_ok=True)

    def write_partial_counts(
        self, language: str, counts: NDArray[np.int64], stretches: int, made_of: Mapping[str, Any]
    ) -> None:
        """Keep the (layer, unit) counts of a language's first stretches of batches."""
        metadata = {"stretches": stretches, "made_of": made_of}
        files.write_tensors(self._file("partial", language), "partial counts", metadata, {"counts": counts})

    def partial_counts(self, language: str, made_of: Mapping[str, Any]) -> tuple[NDArray[np.int64] | None, int]:
        """(layer, unit) counts and the number of stretches that they are of; None and 0 where nothing fits `made_of`.

        Args:
            language: its code.
            made_of: what decides the counts; those of other weights, text or batches are left alone.
        """
        if not self.has("partial", language):
            return None, 0
        try:
            metadata, tensors = self._read("partial", language, "partial counts")
        except RecordingError:  # damaged: counted anew
            return None, 0
        if metadata["made_of"] != json.loads(files.canonical(made_of)):
            return None, 0
        return tensors["counts"], int(metadata["stretches"])

    def write_sentence_means(self, language: str, means: NDArray[np.float32]) -> None:
        """Keep the (sentence, layer, unit) means of a language."""
        files.write_tensors(self._file("sentences", language), "sentence means", {}, {"means": means})

    def check_weights(self, sketch: Sequence[float], name: str) -> None:
        """Refuse to go on with another checkpoint than the one that made what is there.

        Raises:
            RecordingError: naming the language that was recorded with other weights.
        """
        # Exactly: the dtype is one of the settings, so the same weights give the same sketch.
        for language in self.languages():
            recorded = self.metadata("counts", language)["weights"]
            if recorded and sketch and list(recorded) != list(sketch):
                raise RecordingError(
                    f"{self.path}: {language} was recorded with other weights than those of {name}; give another "
                    "--recording folder, or remove this one"
                )

    # --- all of it ----------------------------------------------------------------------------------------------

    def load(self, languages: Sequence[str] = (), with_sentences: bool = False) -> Recording:
        """The recording of some languages, by default of all that are recorded.

        Args:
            languages: codes, in the order that is wanted.
            with_sentences: whether the means over sentences are needed.

        Raises:
            RecordingError: if a language or its sentences are missing, or a file is damaged.
        """
        settings = self.settings
        if not settings:
            raise RecordingError(f"{self.path}: no recording; make one with `lm-eval-steering record`")
        chosen = tuple(languages) or self.languages()
        begun = sorted({file.stem for file in (self.path / "tokens").glob("*.safetensors")} - set(self.languages()))
        if begun and not languages:
            raise RecordingError(
                f"{self.path}: the recording is not finished, {', '.join(begun)} not recorded yet; run the same "
                "`record` again, or name the languages to select among"
            )
        missing = [language for language in chosen if not self.has("counts", language)]
        if missing or not chosen:
            raise RecordingError(
                f"{self.path}: {', '.join(missing) or 'no language'} not recorded; recorded: "
                f"{', '.join(self.languages()) or 'none'}"
            )
        read = [self._read("counts", language, "counts") for language in chosen]
        counts = np.stack([tensors["counts"] for _, tensors in read], axis=2)
        headers = dict(zip(chosen, (metadata for metadata, _ in read), strict=True))
        n_tokens = np.array([header["tokens"] for header in headers.values()], dtype=np.int64)
        means = [self._sentence_means(language) for language in chosen] if with_sentences else []
        return Recording(chosen, counts, n_tokens, _provenance(settings, headers), means)

    def _sentence_means(self, language: str) -> NDArray[np.float32]:
        if not self.has("sentences", language):
            raise RecordingError(
                f"{self.path}: {language} has no means over sentences; record again with --sentence-means, which adds "
                "them to what is there"
            )
        file = self._file("sentences", language)
        files.read_metadata(file, "sentence means", RecordingError)
        return files.memory_map(file, "means")

    def _file(self, part: str, language: str) -> Path:
        return self.path / part / f"{language}.safetensors"

    def _read(self, part: str, language: str, kind: str) -> tuple[dict[str, Any], files.NamedArrays]:
        return files.read_tensors(self._file(part, language), kind, RecordingError)


def _provenance(settings: Mapping[str, Any], headers: Mapping[str, Mapping[str, Any]]) -> Provenance:
    """What is known of the model and the text, from the folder alone."""
    corpus = {name: {code: header[name] for code, header in headers.items()} for name in ("tokens", "sha256")}
    weights: list[float] = next((header["weights"] for header in headers.values()), [])
    return Provenance(**settings["model"], weights=tuple(weights), corpus={**settings["corpus"], **corpus})


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """`{"corpus": {"rows": 1}}` as `{"corpus.rows": 1}`, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    text = files.canonical(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
