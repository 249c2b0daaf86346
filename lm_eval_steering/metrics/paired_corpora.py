"""Is a difference of BLEU or chrF++ more than chance? sacreBLEU's own paired test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_steering.metrics.statistics import RESAMPLES


@dataclass(frozen=True)
class CorpusComparison:
    """One system against the baseline by sacreBLEU's paired bootstrap (Koehn 2004).

    Attributes:
        baseline: score.
        score: of the system.
        p_value: of no difference.
        signature: sacreBLEU's, with the number of resamples and the seed.
    """

    baseline: float
    score: float
    p_value: float
    signature: str


def compare_corpora(
    metric: Any,
    baseline: Sequence[str],
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    resamples: int = RESAMPLES,
) -> dict[str, CorpusComparison]:
    """sacreBLEU's `--paired-bs` for several systems; its seed is that of the command (`SACREBLEU_SEED`, or 12345).

    Args:
        metric: a fresh `sacrebleu.metrics.BLEU` or `CHRF`, made with `references=[references]`.
        baseline: its hypotheses.
        systems: name -> hypotheses.
        references: one for each hypothesis.
        resamples: number of bootstrap resamples.
    """
    import logging

    from sacrebleu.significance import PairedTest

    logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it announces every resampling
    named: list[tuple[str, Sequence[str]]] = [("baseline", list(baseline)), *systems.items()]
    test = PairedTest(named, {"metric": metric}, [list(references)], test_type="bs", n_samples=resamples)
    signatures, results = test()
    (key,) = (key for key in results if key != "System")
    scored: list[Any] = results[key]  # its stubs also allow names here, which stand only under "System"
    first, *others = scored
    said = str(signatures[key])
    return {
        name: CorpusComparison(float(first.score), float(own.score), float(own.p_value), said)
        for name, own in zip(systems, others, strict=True)
    }
