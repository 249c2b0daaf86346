"""Corpus BLEU and chrF++ by sacreBLEU, with the tokenizer that suits the target language and the signature.

Both are corpus scores (Papineni et al. 2002; Popović 2017; Post 2018): never a mean over sentences or batches, which
depends on the batch size and on sentence lengths. Each value comes with sacreBLEU's signature and with the half width
of its 95 % interval over 1,000 bootstrap resamples (Koehn 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.metrics.statistics import corpus_half_width

NO_BLEU = "none"
RESAMPLES = 1000
# FLORES codes whose text sacreBLEU's 13a would take for one word a sentence.
_BY_LANGUAGE = {"jpn_Jpan": "ja-mecab", "kor_Hang": "ko-mecab"}
_BY_SCRIPT = {
    "Hans": "zh", "Hant": "zh", "Jpan": "ja-mecab",
    **dict.fromkeys(("Thai", "Laoo", "Khmr", "Mymr", "Tibt"), "flores200"),
}  # fmt: skip
_HOW = {
    "ja-mecab": "pip install 'sacrebleu[ja]'",
    "ko-mecab": "pip install 'sacrebleu[ko]'",
    "flores200": "pip install sentencepiece, and the file flores200sacrebleuspm in {folder}",
}
_SPM_FILES = {"flores200": "flores200sacrebleuspm", "flores101": "sacrebleu_tokenizer_spm.model"}
TranslatedItem = tuple[str, str, str]  # tokenizer, reference, hypothesis


def bleu_tokenizer(target: str) -> str:
    """sacreBLEU's tokenizer for a target language: `zh`, `ja-mecab`, `ko-mecab`, `flores200` or `13a`."""
    return _BY_LANGUAGE.get(target) or _BY_SCRIPT.get(target.split("_")[1], "13a")


def require_tokenizer(name: str, target: str) -> None:
    """Refuse a tokenizer that cannot work here: another one would give a number of another meaning.

    Raises:
        SteeringError: naming what is missing, how to get it, and how to go on without it.
    """
    from sacrebleu.metrics import BLEU

    if name == NO_BLEU:
        return
    if name not in BLEU.TOKENIZERS:
        known = ", ".join([NO_BLEU, *sorted(BLEU.TOKENIZERS)])
        raise SteeringError(f"bleu_tokenizer={name!r}: expected one of {known}")
    try:
        _refuse_absent_file(name)
        _bleu(name)
    except (ImportError, RuntimeError, OSError, SteeringError) as error:
        detail = str(error).strip().splitlines()[0]
        how = _HOW.get(name, "").format(folder=_models_folder())
        raise SteeringError(
            f"BLEU into {target} needs sacreBLEU's tokenizer {name}, which is not available here ({detail})"
            f'{": " + how if how else ""}; or --metadata \'{{"bleu_tokenizer": "char"}}\' (characters), '
            'or "none" for chrF++ alone'
        ) from error


def _models_folder() -> Path:
    from sacrebleu.utils import SACREBLEU_DIR

    return Path(SACREBLEU_DIR) / "models"


def _refuse_absent_file(name: str) -> None:
    """sacreBLEU would download the file in the middle of a run, after everything has been generated."""
    if name in _SPM_FILES and not (path := _models_folder() / _SPM_FILES[name]).is_file():
        raise SteeringError(f"no file {path}")


@cache
def _bleu(tokenizer: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(word_order=2)


def _tokenizer_of(items: Sequence[TranslatedItem]) -> str:
    names = {tokenizer for tokenizer, _, _ in items}
    if len(names) != 1:
        raise SteeringError(f"one corpus, several BLEU tokenizers: {', '.join(sorted(names))}")
    return names.pop()


def _score(metric: Any, items: Sequence[TranslatedItem]) -> Any:
    references, hypotheses = [item[1] for item in items], [item[2] for item in items]
    return metric.corpus_score(hypotheses, [references])


def corpus_bleu(items: Sequence[TranslatedItem]) -> float:
    """Aggregation: BLEU of all hypotheses as one corpus, 0 to 100."""
    return float(_score(_bleu(_tokenizer_of(items)), items).score)


def corpus_chrf(items: Sequence[TranslatedItem]) -> float:
    """Aggregation: chrF++ (character 6-grams, word bigrams, beta 2) of all hypotheses as one corpus, 0 to 100."""
    return float(_score(_chrf(), items).score)


def bleu_interval(items: Sequence[TranslatedItem]) -> float:
    """Aggregation: half width of BLEU's 95 % bootstrap interval; NaN for one sentence, which has none."""
    return _half_width(_bleu(_tokenizer_of(items)), items)


def chrf_interval(items: Sequence[TranslatedItem]) -> float:
    """Aggregation: half width of chrF++'s 95 % bootstrap interval."""
    return _half_width(_chrf(), items)


def _half_width(metric: Any, items: Sequence[TranslatedItem]) -> float:
    references, hypotheses = [item[1] for item in items], [item[2] for item in items]
    return corpus_half_width(metric, hypotheses, references, RESAMPLES)


def bleu_signature(items: Sequence[TranslatedItem]) -> str:
    """Aggregation: sacreBLEU's signature of the BLEU above: references, case, tokenizer, smoothing, version."""
    return _signature(_bleu(_tokenizer_of(items)), items)


def chrf_signature(items: Sequence[TranslatedItem]) -> str:
    """Aggregation: sacreBLEU's signature of the chrF++ above."""
    return _signature(_chrf(), items)


def _signature(metric: Any, items: Sequence[TranslatedItem]) -> str:
    _score(metric, items[:1])  # the number of references is known only once something was scored
    return str(metric.get_signature())
