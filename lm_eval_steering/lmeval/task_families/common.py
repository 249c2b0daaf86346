"""A task's file decides what the task is.

lm-eval gives a `custom_dataset` function one bag of keywords: the file's metadata, overridden by the model arguments
and by `--metadata`. Without a check, `--metadata '{"evaluated": "tur_Latn"}'` would run Turkish under an Italian name,
and the model argument `variant=fp16` would choose a wording.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.compat import load_task_file
from lm_eval_steering.lmeval.expected_language import expected_language, options_of
from lm_eval_steering.metrics.output_language import output_metrics

# --- Names of items whose data set gives them none

_DIGITS = 16


def text_id(text: str) -> str:
    """Sixteen digits of SHA-256: the same item in each part and wording of a data set, whatever its place there."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:_DIGITS]


# --- Which languages the papers cover, in FLORES codes and in their order

# Gurgurov et al. 2025 (language arithmetics), 21 languages.
GURGUROV = (
    "bod_Tibt", "mlt_Latn", "ita_Latn", "spa_Latn", "deu_Latn", "jpn_Jpan", "arb_Arab", "zho_Hans", "afr_Latn",
    "nld_Latn", "fra_Latn", "por_Latn", "rus_Cyrl", "kor_Hang", "hin_Deva", "tur_Latn", "pol_Latn", "swe_Latn",
    "dan_Latn", "nob_Latn", "eng_Latn",
)  # fmt: skip
# Gurgurov et al. 2026 (CLaS-Bench), 32 languages.
CLAS_BENCH = (
    "eng_Latn", "arb_Arab", "bod_Tibt", "dan_Latn", "deu_Latn", "spa_Latn", "fra_Latn", "hin_Deva", "ita_Latn",
    "jpn_Jpan", "kor_Hang", "mlt_Latn", "nld_Latn", "nob_Latn", "pol_Latn", "por_Latn", "rus_Cyrl", "swe_Latn",
    "tur_Latn", "zho_Hans", "slk_Latn", "ell_Grek", "kaz_Cyrl", "swh_Latn", "kat_Geor", "ukr_Cyrl", "pes_Arab",
    "tha_Thai", "ind_Latn", "vie_Latn", "ces_Latn", "ron_Latn",
)  # fmt: skip
# The shared task on it, CLaS at SemEval-2027: the first ten are asked in each track, the others in the third.
CLAS_HIGH = (
    "arb_Arab", "deu_Latn", "eng_Latn", "spa_Latn", "fra_Latn", "jpn_Jpan", "zho_Hans", "rus_Cyrl", "hin_Deva",
    "kor_Hang",
)  # fmt: skip
CLAS_LOW = (
    "ces_Latn", "ell_Grek", "pes_Arab", "vie_Latn", "ukr_Cyrl", "mlt_Latn", "nob_Latn", "swh_Latn", "tha_Thai",
    "tur_Latn",
)  # fmt: skip
# Rahmanisa et al. 2025 (amplification), 18 languages.
RAHMANISA = (
    "eng_Latn", "nld_Latn", "ind_Latn", "zsm_Latn", "vie_Latn", "jpn_Jpan", "zho_Hans", "fra_Latn", "por_Latn",
    "rus_Cyrl", "est_Latn", "hat_Latn", "ita_Latn", "quy_Latn", "swh_Latn", "tam_Taml", "tha_Thai", "tur_Latn",
)  # fmt: skip
# The 15 of those 18 that MLAMA-dod-185 has.
MLAMA = tuple(code for code in RAHMANISA if code not in ("hat_Latn", "quy_Latn", "swh_Latn"))
# Tang et al. 2024, the 7 of mVicuna.
MVICUNA = ("eng_Latn", "spa_Latn", "fra_Latn", "ind_Latn", "jpn_Jpan", "vie_Latn", "zho_Hans")

ALL = tuple(sorted({*GURGUROV, *CLAS_BENCH, *RAHMANISA}))


# --- Metrics of the language of generated text, the same for every family that generates


def language_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Every output-language metric that is defined for an answer (`docs/output-language.md`).

    The document says what language it expects, and what the metrics of a wanted language are about
    (`lmeval.expected_language`). A template that calls this lists all of `output_language.METRICS`.
    """
    return dict(output_metrics(results[0], expected=expected_language(document, None), **options_of(document, {})))


# --- The language of a short generated answer: those of the output-language metrics that a few words can have
#
# Line and word pass rates need lines of five tokens and say nothing about a span; `lm-eval-steering rescore` computes
# any of them from the samples.

LISTED = ("lfs", "lang_expected", "lang_confidence", "lang_unknown", "degenerate", "output_language")


def answer_language(text: str, expected: str | None = None) -> dict[str, Any]:
    """The metrics that a template lists; `expected` where the answer is to be in the language of the item."""
    return {name: value for name, value in output_metrics(text, expected=expected).items() if name in LISTED}


Documents = Callable[..., dict[str, Any]]


def keeps_to_its_file(documents: Documents) -> Documents:
    """A dataset function whose named parameters come from the task's file alone; all else is a setting.

    Raises:
        SteeringError: if a model argument or `--metadata` says something else than the file does.
    """
    parameters = signature(documents).parameters.values()
    names = [each.name for each in parameters if each.kind is not Parameter.VAR_KEYWORD]

    @wraps(documents)
    def checked(*args: Any, **settings: Any) -> dict[str, Any]:
        path = Path(str(settings.get("config_source", "")))
        if path.is_file():  # else it is called from Python
            own = _own(path)
            for name in [name for name in names if name in settings]:
                if name not in own:
                    del settings[name]
                elif settings[name] != own[name]:
                    raise SteeringError(
                        f"{path.stem}: {name} is {own[name]!r} in the task's file and {settings[name]!r} in --metadata "
                        "or the model arguments; leave it out there, or take another task"
                    )
        return documents(*args, **settings)

    return checked


def is_other_wording(variant: str, other: str) -> bool:
    """Whether a task has its family's other wording, of two.

    Raises:
        SteeringError: if it names a third.
    """
    if variant not in ("", other):
        raise SteeringError(f"variant={variant!r}: expected {other!r}, or none for lm-eval's wording")
    return variant == other


def _own(path: Path) -> dict[str, Any]:
    config = load_task_file(path)
    return {**(config.get("metadata") or {}), **(config.get("dataset_kwargs") or {})}
