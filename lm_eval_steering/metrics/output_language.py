"""Language of generated text, and whether it is the steered one, or the one that the item expects.

What an output was steered to comes with the text itself. `steered-hf` returns each output as an `IdentifiedText`, a
`str` that knows its identified language and the languages it was steered to. Nothing is stored outside the output, so
two models in one process cannot see each other's target, a cached output keeps its own, and there is nothing to clear.
A filter that makes a new string takes the knowledge away: `lfs` is then left out, with a warning, and never 0.

What an item expects comes with the item (`lmeval.expected_language`): it cannot come with the text, because lm-eval's
cache returns one text for two items with the same prompt.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.metrics import degenerate, pass_rates
from lm_eval_steering.metrics.language_id import UNKNOWN, Identified, LanguageIdentifier, in_language
from lm_eval_steering.metrics.text import script_share

_log = logging.getLogger("lm_eval.steering")
_warned: set[str] = set()

# Value of a metric for one output, as lm-eval's aggregations take it.
Value = float | str | tuple[float, float | None]

EXPECTED, TARGET = "expected", "target"


class IdentifiedText(str):
    """Generated text with its identified language.

    Attributes:
        language: our code, or `unknown`.
        confidence: the identifier's probability for its best guess, 0 to 1.
        targets: codes of the languages steered to; empty where no target is known.
        identifier: what identified it; the default one where that is not known.
        unfinished: whether it is a thought that did not end (`think_end_token` never came), so that there is no answer;
            None for a model that does not think.
    """

    language: str
    confidence: float
    targets: tuple[str, ...]
    identifier: LanguageIdentifier
    unfinished: bool | None

    def __new__(
        cls,
        text: str = "",
        language: str = UNKNOWN,
        confidence: float = 0.0,
        targets: Sequence[str] = (),
        identifier: LanguageIdentifier | None = None,
        unfinished: bool | None = None,
    ) -> Self:
        """A text with what is known about it; one argument alone makes a text of unknown language."""
        made = super().__new__(cls, text)
        made.language, made.confidence, made.targets = language, confidence, tuple(targets)
        made.identifier, made.unfinished = identifier or LanguageIdentifier(), unfinished
        return made

    @classmethod
    def of(
        cls,
        text: str,
        identifier: LanguageIdentifier,
        targets: Sequence[str] = (),
        unfinished: bool | None = None,
    ) -> Self:
        """A text, identified now; a thought that did not end is `unknown`, as no answer has a language."""
        if unfinished:
            return cls(text, UNKNOWN, 0.0, targets, identifier, unfinished)
        (answer,) = identifier.identify([text])
        return cls(text, answer.language, answer.confidence, targets, identifier, unfinished)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            str(self), self.language, self.confidence, self.targets, self.identifier, self.unfinished,
        )  # fmt: skip


@dataclass(frozen=True)
class Output:
    """One output, and everything that its metrics depend on.

    Attributes:
        text: what the model wrote; where its thought did not end, that thought.
        identified: its language.
        identifier: what identified it, and is asked about its lines.
        targets: codes of the languages steered to; empty where none is known.
        expected: code of the language that the item expects; None where it expects none.
        about: whether the metrics that need a wanted language are about the `expected` one (or the targets, where
            nothing is expected) or about the `target`.
        unfinished: whether the thought before the answer did not end; None for a model that does not think.
    """

    text: str
    identified: Identified
    identifier: LanguageIdentifier
    targets: tuple[str, ...] = ()
    expected: str | None = None
    about: str = EXPECTED
    unfinished: bool | None = None

    def __post_init__(self) -> None:
        if self.about not in (EXPECTED, TARGET):
            raise SteeringError(f"about={self.about!r}: expected {EXPECTED} or {TARGET}")

    @classmethod
    def of(
        cls,
        text: str,
        targets: Sequence[str] | None = None,
        expected: str | None = None,
        identifier: LanguageIdentifier | None = None,
        about: str = EXPECTED,
    ) -> Output:
        """An output, with what the text itself knows where an argument is None.

        Args:
            text: plain, or an `IdentifiedText`.
            targets: None takes the text's own.
            expected: code of the language that the item expects.
            identifier: None takes the text's own, or the default one.
            about: see `Output`.
        """
        identified = (
            text if isinstance(text, IdentifiedText) else IdentifiedText.of(text, identifier or LanguageIdentifier())
        )
        if identifier not in (None, identified.identifier):
            identified = IdentifiedText.of(text, identifier, identified.targets, identified.unfinished)
        return cls(
            str(text),
            Identified(identified.language, identified.confidence),
            identified.identifier,
            identified.targets if targets is None else tuple(targets),
            expected,
            about,
            identified.unfinished,
        )

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """Codes of the languages that the output may be in; empty where none is known, or the model knows none."""
        if self.about == EXPECTED and self.expected is not None:
            return self.known((self.expected,))
        return self.known(self.targets)

    def known(self, codes: Sequence[str]) -> tuple[str, ...]:
        """The codes, if the identifier can answer any of them: a share that must be 0 is left out, with a warning."""
        if codes and not any(self.identifier.knows(code) for code in codes):
            name = self.identifier.file.name
            warn_once(f"{name} does not know {'+'.join(codes)}: metrics about that language are left out")
            return ()
        return tuple(codes)

    @property
    def answer(self) -> str:
        """What the model answered: nothing where its thought did not end."""
        return "" if self.unfinished else self.text

    @cached_property
    def degenerate(self) -> bool:
        """Whether what was written says nothing or repeats itself, an unfinished thought too."""
        return degenerate.degenerate(self.text)

    @cached_property
    def passes(self) -> pass_rates.Passes:
        """Line- and word-level judgement, about the wanted languages."""
        return pass_rates.passes(self.answer, self.wanted, self.identifier)


def _is_in(output: Output, codes: Sequence[str]) -> float | None:
    known = output.known(codes)
    return float(any(in_language(output.identified.language, code) for code in known)) if known else None


def forced(text: str) -> float | None:
    """1.0 where the output is in a language it was steered to, else 0.0; None where no target is known.

    `unknown` is not a success and stays in the denominator.
    """
    return _is_in(Output.of(text), text.targets) if isinstance(text, IdentifiedText) else None


def lfs(output: Output) -> float | None:
    """Language forcing success: 1 where the output is identified as a target language; `unknown` is none.

    Source: Gurgurov et al. 2025. The target is the steered language, or `target_language=` in an unsteered run;
    without one the metric is absent.
    """
    return _is_in(output, output.targets)


def lfs_clean(output: Output) -> float | None:
    """1 where the output is identified as a target language and is not degenerate; absent where `lfs` is.

    Source: our own. `lfs` alone is met by one word of the target language over and over; claims are made of this one.
    """
    success = lfs(output)
    return success if not success else float(not output.degenerate)


def lang_expected(output: Output) -> float | None:
    """1 where the output is identified as the language that the item expects; `unknown` is none. Source: our own."""
    return _is_in(output, (output.expected,)) if output.expected is not None else None


def output_language(output: Output) -> str:
    """The identified language, or `unknown`, to be counted by `language_counts`. Source: our own."""
    return output.identified.language


def lang_confidence(output: Output) -> float:
    """The identifier's probability for its best guess, 0 to 1, also where the output is `unknown`. Source: our own."""
    return output.identified.confidence


def lang_unknown(output: Output) -> float:
    """1 where the language is `unknown`: a doubtful guess, too few letters, another script, or no answer at all.

    Source: our own.
    """
    return float(output.identified.language == UNKNOWN)


def lpr(output: Output) -> float | None:
    """Line-level pass rate: 1 where every line of five tokens or more is in the wanted language (`pass_rates`).

    Source: Marchisio et al. 2024. An output without such a line is left out, as there; `lpr_skipped` counts those.
    """
    return _number(output.passes.lines) if output.wanted else None


def lpr_skipped(output: Output) -> float | None:
    """1 where `lpr` leaves the output out, because no line has five tokens. Source: our own, so that it shows."""
    return float(output.passes.lines is None) if output.wanted else None


def wpr(output: Output) -> float | None:
    """Word-level pass rate: of the outputs that pass by their lines, 1 where no English word is in them.

    Source: Marchisio et al. 2024. Absent for outputs that fail by their lines, and for languages in Latin letters. The
    standard error takes the number of outputs that passed by their lines as given.
    """
    return _number(output.passes.words) if output.wanted else None


def lcpr(output: Output) -> tuple[float, float | None] | None:
    """Language confusion pass rate, the harmonic mean of LPR and WPR, from both judgements of each output.

    Source: Marchisio et al. 2024. Defined over all outputs only, so lm-eval gives no standard error for it.
    """
    if not output.wanted or output.passes.lines is None or not pass_rates.has_word_rate(output.wanted):
        return None
    return float(output.passes.lines), _number(output.passes.words)


def degenerate_output(output: Output) -> float:
    """1 where the output says nothing or repeats itself (`degenerate.degenerate` has the rule). Source: our own."""
    return float(output.degenerate)


def unfinished(output: Output) -> float | None:
    """1 where the model's thought did not end, so that there is no answer; absent without `think_end_token`.

    Source: our own. lm-eval takes the whole thought for the answer then; no language is identified in it.
    """
    return _number(output.unfinished)


def script_share_of(output: Output) -> float | None:
    """Share of letters in the script of the wanted language, 0 to 1; an output without letters has 0.

    Source: our own, over Unicode's property Script. Of several wanted languages the best one counts.
    """
    shares = [script_share(output.answer, code.split("_")[1]) for code in output.wanted]
    return max(shares) if shares else None


def _number(passed: bool | None) -> float | None:
    return None if passed is None else float(passed)


METRICS: Mapping[str, Callable[[Output], Value | None]] = {
    "lfs": lfs,
    "lfs_clean": lfs_clean,
    "lang_expected": lang_expected,
    "output_language": output_language,
    "lang_confidence": lang_confidence,
    "lang_unknown": lang_unknown,
    "lpr": lpr,
    "lpr_skipped": lpr_skipped,
    "wpr": wpr,
    "lcpr": lcpr,
    "script_share": script_share_of,
    "degenerate": degenerate_output,
    "unfinished": unfinished,
}


def output_metrics(
    text: str,
    *,
    targets: Sequence[str] | None = None,
    expected: str | None = None,
    identifier: LanguageIdentifier | None = None,
    about: str = EXPECTED,
) -> dict[str, Value]:
    """All metrics of one output that are defined for it.

    Every value is a number for lm-eval's `mean`, but `output_language` (for `language_counts`) and `lcpr` (a pair, for
    the aggregation `lcpr`).

    Args:
        text: what the model wrote; an `IdentifiedText` brings its identifier and targets along.
        targets: codes of the languages steered to; None takes the text's own.
        expected: code of the language that the item expects; None leaves `lang_expected` out.
        identifier: None takes the text's own, or the default one.
        about: what `lpr`, `wpr`, `lcpr` and `script_share` are about: `expected` (or the targets, where the item
            expects none) or `target`.

    Raises:
        SteeringError: if `about` is something else, or the identifier's model is missing.
    """
    output = Output.of(text, targets, expected, identifier, about)
    values = {name: measured(name, output) for name in METRICS}
    return {name: value for name, value in values.items() if value is not None}


def measured(name: str, output: Output) -> Value | None:
    """One metric of an output; None where it is undefined.

    Raises:
        SteeringError: naming the metric, whatever went wrong in it.
    """
    try:
        return METRICS[name](output)
    except SteeringError:
        raise
    except Exception as error:
        raise SteeringError(f"metric {name} failed on the output {str(output.text)[:60]!r}: {error!r}") from error


def language_counts(labels: Sequence[str]) -> str:
    """Aggregation of identified languages: `fra_Latn:31 eng_Latn:7 unknown:2`, most frequent first."""
    ordered = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))
    return " ".join(f"{label}:{count}" for label, count in ordered)


def warn_once(message: str) -> None:
    """Log a warning, once a process."""
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)
