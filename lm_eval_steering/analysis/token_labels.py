"""Language and script of single tokens, and the probability mass of each.

A token is a short text: fastText is often unsure of it, and below the identifier's threshold it is `unknown`, which is
a class of its own. The script of its letters needs no identifier, and is surer where languages write differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.metrics.language_id import UNKNOWN, LanguageIdentifier, in_language


class TokenLabels:
    """Labels of a tokenizer's tokens; each token is looked up once, when it is first asked for.

    Attributes:
        languages: names that the numbers of `language` stand for, in the order in which they were met.
        scripts: the same for `script`: ISO 15924 codes, `Zyyy` for tokens without letters.
    """

    def __init__(self, tokenizer: Any, identifier: LanguageIdentifier, vocabulary: int) -> None:
        """Nothing is known yet.

        Args:
            tokenizer: decodes tokens.
            identifier: of their languages.
            vocabulary: width of the model's head, often larger than the tokenizer's vocabulary.
        """
        self._tokenizer, self._identifier = tokenizer, identifier
        self.languages: list[str] = []
        self.scripts: list[str] = []
        self.language = np.full(vocabulary, -1)  # (token,) number in `languages`, -1 for not looked up
        self.script = np.full(vocabulary, -1)

    def learn(self, tokens: NDArray[np.int64]) -> None:
        """Look up tokens that are not known yet."""
        new = np.unique(tokens[self.language[tokens] < 0])
        texts = [self._text(int(token)) for token in new]
        for token, text, found in zip(new, texts, self._identifier.identify(texts), strict=True):
            # A text without a letter has no language, whatever the identifier guesses.
            spoken = found.language if any(map(str.isalpha, text)) else UNKNOWN
            self.language[token] = _number(self.languages, spoken)
            self.script[token] = _number(self.scripts, found.script)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def _text(self, token: int) -> str:
        """Empty for special tokens, ids beyond the tokenizer's vocabulary, and pieces of a character."""
        if token in self._special or token >= len(self._tokenizer):
            return ""
        text = self._tokenizer.decode([token])
        return "" if "\ufffd" in text else text


def _number(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def masses(labels: NDArray[np.int64], probabilities: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """(class,) sums of the probabilities of the tokens of each class; not renormalised.

    Args:
        labels: (token,) number of each token's class.
        probabilities: (token,).
        classes: their number.
    """
    return np.bincount(labels, weights=probabilities, minlength=classes).astype(np.float64)


def by_class(languages: Mapping[str, float], targets: Sequence[str]) -> dict[str, float]:
    """Mass of the target languages, of English, of other languages and of `unknown`.

    Languages are compared at the identifier's grain (`language_id.in_language`). Where English is a target it has
    no class of its own.

    Args:
        languages: code, or `unknown`, -> mass.
        targets: codes.
    """

    def is_one_of(code: str, codes: Sequence[str]) -> bool:
        return any(in_language(code, other) for other in codes)

    english = not is_one_of("eng_Latn", targets)
    found = {"target": 0.0, **({"English": 0.0} if english else {}), "other": 0.0, "unknown": 0.0}
    for code, mass in languages.items():
        if code == UNKNOWN:
            found["unknown"] += mass
        elif is_one_of(code, targets):
            found["target"] += mass
        elif english and is_one_of(code, ["eng_Latn"]):
            found["English"] += mass
        else:
            found["other"] += mass
    return found
