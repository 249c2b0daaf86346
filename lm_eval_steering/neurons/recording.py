"""How often each unit is active in each language: the counts that LAPE is computed from, and sentences' means."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering import files as storage
from lm_eval_steering.architectures import ModelSites
from lm_eval_steering.errors import CorpusError, DidNotHappenError, RecordingError
from lm_eval_steering.neurons.neuron_set import Provenance
from lm_eval_steering.neurons.running import Batch, Batches, Ranks, TokenRows, observing

ProgressCallback = Callable[[int], None]  # called with the number of tokens that were counted

# Elements compared at a time: what stays in a processor's cache, or keeps an accelerator busy.
_BLOCK = {"cpu": 1 << 19}
_LARGE_BLOCK = 1 << 26


@dataclass(frozen=True)
class Recording:
    """What one model did with a corpus.

    Attributes:
        languages: order of the last axis.
        counts: (layer, unit, language) int64, tokens with activation > 0.
        n_tokens: (language,) int64, tokens counted: no padding, no special tokens.
        provenance: of the model and the text.
        sentence_means: one (sentence, layer, unit) float32 array a language, empty where they were not recorded.
    """

    languages: tuple[str, ...]
    counts: NDArray[np.int64]
    n_tokens: NDArray[np.int64]
    provenance: Provenance
    sentence_means: Sequence[NDArray[np.float32]] = ()


class _Counter:
    """Counts on the device, without synchronisation and without a loop over units.

    A comparison written as 0 and 1 into float32, multiplied with the mask of counted positions: exact, because a block
    has far fewer positions than float32 has integers, and several times faster than summing booleans.
    """

    def __init__(self, sites: ModelSites) -> None:
        self.sites = sites
        self.totals: list[torch.Tensor | None] = [None] * sites.shape.layers
        self.buffers: dict[torch.device, torch.Tensor] = {}
        self.batch_counted = torch.zeros(0, 0, dtype=torch.bool)
        self.counted = torch.zeros(0)
        self.finite: torch.Tensor | None = None

    def start(self, batch: Batch) -> None:
        self.batch_counted = batch.counted
        self.counted = batch.counted.reshape(-1).float()

    def see(self, layer: int, units: torch.Tensor) -> None:
        block = self._block(units)
        counted = self.counted.to(units.device)
        total = self.totals[layer]
        if total is None:
            total = self.totals[layer] = torch.zeros(units.shape[-1], dtype=torch.int64, device=units.device)
        for start in range(0, len(units), len(block)):
            part = units[start : start + len(block)]
            active = torch.gt(part, 0, out=block[: len(part)])
            total += (counted[start : start + len(part)] @ active).long()

    def end(self, hidden: torch.Tensor) -> None:
        # Some families leave NaN in padding, which nothing real looks at.
        finite = (hidden.isfinite().all(-1) | ~self.batch_counted.to(hidden.device)).all()
        self.finite = finite if self.finite is None else self.finite & finite

    def _block(self, units: torch.Tensor) -> torch.Tensor:
        if units.device not in self.buffers:
            positions = max(1, _BLOCK.get(units.device.type, _LARGE_BLOCK) // units.shape[-1])
            self.buffers[units.device] = torch.empty(positions, units.shape[-1], device=units.device)
        return self.buffers[units.device]

    def result(self) -> torch.Tensor:
        """(layer, unit) int64 on the CPU; zeros where this process had no batch."""
        shape = self.sites.shape
        zeros = torch.zeros(shape.units, dtype=torch.int64)
        return torch.stack([zeros if total is None else total.cpu() for total in self.totals])


@torch.inference_mode()
def count_active(
    sites: ModelSites, batches: Batches, ranks: Ranks | None = None, progress: ProgressCallback | None = None
) -> NDArray[np.int64]:
    """(layer, unit) number of counted tokens on which each unit's activation is above 0.

    The model runs without its language-model head and without a KV cache.

    Args:
        sites: of the model.
        batches: rows of one language; several processes are dealt different ones.
        ranks: those processes; the counts are of all of them, in each.
        progress: told the number of tokens after each batch.

    Raises:
        CorpusError: if there is nothing to count.
        DidNotHappenError: if a layer was not seen exactly once a forward pass, or the model's states overflow.
    """
    if not sum(map(len, batches.rows)):
        raise CorpusError("no tokens to record")
    ranks = ranks or Ranks()
    counter = _Counter(sites)
    with observing(sites, at_activation=counter.see) as run:
        for batch in batches:
            counter.start(batch)
            counter.end(run(batch))
            if progress is not None:
                progress(batch.tokens)
    if not all(ranks.gather(counter.finite is None or bool(counter.finite))):
        raise DidNotHappenError(
            "the model's hidden states hold infinities or NaN, so its activations cannot be counted; load it in "
            "bfloat16 or float32"
        )
    # Added up on the device that the processes talk over.
    return ranks.add_up(counter.result().to(batches.device)).cpu().numpy()


@torch.inference_mode()
def sentence_means(sites: ModelSites, batches: Batches, ranks: Ranks | None = None) -> NDArray[np.float32]:
    """(sentence, layer, unit) float32 mean activation over each row's tokens, in the order of the rows."""
    own: dict[int, NDArray[np.float32]] = {}
    layers: dict[int, torch.Tensor] = {}
    counted = torch.zeros(0, 0, dtype=torch.bool)

    def see(layer: int, units: torch.Tensor) -> None:
        mask = counted.to(units.device).unsqueeze(-1)
        by_row = torch.where(mask, units.reshape(*counted.shape, -1).float(), 0)
        layers[layer] = (by_row.sum(1) / mask.sum(1)).cpu()

    with observing(sites, at_activation=see) as run:
        for batch in batches:
            counted = batch.counted
            run(batch)
            means = torch.stack([layers[layer] for layer in range(sites.shape.layers)], dim=1).numpy()
            own |= dict(zip(batch.rows.tolist(), means, strict=True))
    everyone = {number: means for part in (ranks or Ranks()).gather(own) for number, means in part.items()}
    return np.stack([everyone[number] for number in range(len(everyone))])


@torch.inference_mode()
def tokens_per_second(sites: ModelSites, batches: Batches) -> float:
    """Speed of the recording, from a short warm-up: one batch, the second time that it runs."""
    counter = _Counter(sites)
    batch = batches.build(batches.plan[0])
    seconds = 0.0
    with observing(sites, at_activation=counter.see) as run:
        for _ in range(2):
            start = time.perf_counter()
            counter.start(batch)
            counter.end(run(batch))
            counter.result()  # waits for the device
            seconds = time.perf_counter() - start
    return batch.tokens / seconds


def batch_size_that_fits(sites: ModelSites, build: Callable[[int], Batches]) -> int:
    """Largest power of two up to 256 at which a batch can be recorded; 16 on a CPU, which more rows do not speed up.

    Args:
        sites: of the model.
        build: batches of the longest rows, for a batch size.
    """
    if next(sites.decoder.parameters()).device.type == "cpu":
        return 16
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    for batch_size in (256, 128, 64, 32, 16, 8, 4, 2):
        try:
            tokens_per_second(sites, build(batch_size))
            return batch_size
        except Exception as error:  # the library knows the texts of every backend's out-of-memory error
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
    return 1


# --- A recording on disk: one file a language, written at once when the language is done, so that nothing is lost
#
# recording.json the settings that every file in the folder was made with tokens/fra_Latn.safetensors the rows of
# tokens that the model reads counts/fra_Latn.safetensors how often each unit was active sentences/fra_Latn.safetensors
# means over calibration sentences, where they were asked for


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
            # What a killed process left half written is nothing.
            if self.path.exists() and not self.path.is_dir():
                raise RecordingError(f"{self.path}: a file, expected the folder of a recording")
            if self.path.is_dir() and any(file.suffix != ".partial" for file in self.path.iterdir()):
                raise RecordingError(f"{self.path}: a folder without recording.json, so not a recording")
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordingError(f"{file}: not JSON ({error})") from None
        if not isinstance(found, dict) or found.get("format_version") != storage.FORMAT_VERSION:
            raise RecordingError(f"{file}: not a recording that this release reads")
        return found

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that was made with other settings.

        Raises:
            RecordingError: naming each setting with both values.
        """
        there = _flat(self.settings)
        wanted = _flat({"format_version": storage.FORMAT_VERSION, **json.loads(storage.canonical(settings))})
        differing = [name for name in sorted(wanted | there) if there and wanted.get(name) != there.get(name)]
        if differing:
            details = "; ".join(
                f"{name}: {_short(there.get(name))} there, {_short(wanted.get(name))} asked for" for name in differing
            )
            raise RecordingError(
                f"{self.path} holds a recording with other settings ({details}); give another --recording folder, or "
                "remove this one"
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Check the settings, and keep them where the folder is new."""
        self.check(settings)
        if not self.settings:
            text = json.dumps({"format_version": storage.FORMAT_VERSION, **settings}, indent=1, sort_keys=True)
            storage.write_bytes(self.path / "recording.json", (text + "\n").encode())

    # --- files of a language ------------------------------------------------------------------------------------

    def has(self, part: str, language: str) -> bool:
        """Whether a language has its `tokens`, `counts` or `sentences`."""
        return self._file(part, language).is_file()

    def languages(self) -> tuple[str, ...]:
        """Those that are recorded."""
        return tuple(sorted(file.stem for file in (self.path / "counts").glob("*.safetensors")))

    def write_text(self, language: str, text: LanguageText) -> None:
        """Keep what is read of a language."""
        tensors = {
            "ids": text.rows.ids,
            "lengths": text.rows.lengths,
            "sentence_ids": text.sentences.ids,
            "sentence_lengths": text.sentences.lengths,
        }
        metadata = {"source": text.source, "tokens": text.rows.tokens, "sha256": text.rows.sha256()}
        storage.write(self._file("tokens", language), "text", metadata, tensors)

    def about(self, part: str, language: str) -> dict[str, Any]:
        """Metadata of a language's `tokens` or `counts`: how many tokens, of which text; they are not read."""
        kind = {"tokens": "text", "counts": "counts"}[part]
        return storage.read_metadata(self._file(part, language), kind, RecordingError)

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
        storage.write(self._file("counts", language), "counts", metadata, {"counts": counts})

    def write_sentence_means(self, language: str, means: NDArray[np.float32]) -> None:
        """Keep the (sentence, layer, unit) means of a language."""
        storage.write(self._file("sentences", language), "sentence means", {}, {"means": means})

    def check_weights(self, sketch: Sequence[float], name: str) -> None:
        """Refuse to go on with another checkpoint than the one that made what is there.

        Raises:
            RecordingError: naming the language that was recorded with other weights.
        """
        # Exactly: the dtype is one of the settings, so the same weights give the same sketch.
        for language in self.languages():
            there = self.about("counts", language)["weights"]
            if there and sketch and list(there) != list(sketch):
                raise RecordingError(
                    f"{self.path}: {language} was recorded with other weights than those of {name}; give another "
                    "--recording folder, or remove this one"
                )

    # --- all of it ----------------------------------------------------------------------------------------------

    def load(self, languages: Sequence[str] = (), with_sentences: bool = False) -> Recording:
        """The recording of some languages, all that are there by default.

        Args:
            languages: codes, in the order that is wanted.
            with_sentences: whether the means over sentences are needed.

        Raises:
            RecordingError: if a language or its sentences are not there, or a file is damaged.
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
                f"{self.path}: {', '.join(missing) or 'no language'} not recorded; there: "
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
        storage.read_metadata(file, "sentence means", RecordingError)
        return storage.memory_map(file, "means")

    def _file(self, part: str, language: str) -> Path:
        return self.path / part / f"{language}.safetensors"

    def _read(self, part: str, language: str, kind: str) -> tuple[dict[str, Any], storage.NamedArrays]:
        return storage.read(self._file(part, language), kind, RecordingError)


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
    text = storage.canonical(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
