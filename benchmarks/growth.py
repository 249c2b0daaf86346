"""How time grows: with the number of options, the length of the context, factors, and languages.

    python -m benchmarks.growth --figure docs/performance.png
    python -m benchmarks.growth --quick --json growth.json

Demo model, float32, batch size 16, ours steered. Options and contexts: one question, against unsteered `hf` on the same
requests in interleaved rounds. Factors and languages: LSS pairs, with and without the intervention, for one factor
after the other (one language after the other, each with other pairs); `hf` would need one pass more than factors.
Factors share the unsteered scores, languages do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.items import Pairs, demo_model, lss, requests_of, rivals, texts
from benchmarks.measure import interleaved, options_of, report

OPTIONS, CONTEXTS, REPEATS = (1, 2, 4, 8), (25, 50, 100, 200), (1, 2, 4)
QUICK = ((1, 4), (25, 100), (1, 4))
LINES = {"hf": ("hf, unsteered", "o--", "#888888"), "ours": ("steered-hf", "o-", "#0a6ebd")}
Table = dict[str, dict[int, float]]  # work -> number -> median of seconds


def question(words: int, options: int) -> Pairs:
    """A context of so many words, and options of six words each."""
    text = " ".join(texts(40)).split()
    return [[(" ".join(text[:words]), " " + " ".join(text[500 + 6 * i : 506 + 6 * i])) for i in range(options)]]


def against_hf(plain: Any, ours: Any, questions: dict[int, Pairs], rounds: int) -> Table:
    """Both models on one question of each size."""
    works: dict[str, Callable[[], Any]] = {}
    for size, items in questions.items():
        requests = requests_of(items)
        works |= {
            f"hf {size}": lambda r=requests: plain.loglikelihood(r, disable_tqdm=True),
            f"ours {size}": lambda r=requests: ours.loglikelihood(r, disable_tqdm=True),
        }
    return _table(interleaved(works, rounds))


def repeated(plain: Any, ours: Any, numbers: Sequence[int], share: bool, pairs: int, rounds: int) -> Table:
    """LSS for so many factors (`share`: on the same pairs), or languages."""
    every = lss(pairs * (1 if share else max(numbers)))

    def asked(turn: int) -> Pairs:
        return every if share else every[turn * pairs : (turn + 1) * pairs]

    def steered(number: int) -> None:
        ours.scorer.forget_baseline()
        for turn in range(number):
            ours.intervene(ours.neuron_set, language="fra_Latn", op="scale", factor=1.5 + turn)
            ours.loglikelihood(requests_of(asked(turn), twice=True), disable_tqdm=True)

    def plain_hf(number: int) -> None:
        passes = [asked(0)] * (number + 1) if share else [asked(turn) for turn in range(number)] * 2
        for items in passes:
            plain.loglikelihood(requests_of(items), disable_tqdm=True)

    works: dict[str, Callable[[], Any]] = {}
    for number in numbers:
        works |= {f"hf {number}": lambda n=number: plain_hf(n), f"ours {number}": lambda n=number: steered(n)}
    return _table(interleaved(works, rounds))


def _table(seconds: dict[str, list[float]]) -> Table:
    table: Table = {"hf": {}, "ours": {}}
    for name, times in seconds.items():
        work, size = name.split()
        table[work][int(size)] = round(statistics.median(times), 4)
    return table


def draw(tables: dict[str, Table], file: Path) -> None:
    """One panel per table."""
    figure, panels = plt.subplots(1, len(tables), figsize=(3.1 * len(tables), 2.9), layout="constrained")
    for panel, (title, table) in zip(panels, tables.items(), strict=True):
        for work, medians in table.items():
            label, style, colour = LINES[work]
            panel.plot(list(medians), list(medians.values()), style, label=label, color=colour)
        panel.set_xlabel(title)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds")
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    options, contexts, numbers = QUICK if arguments.quick else (OPTIONS, CONTEXTS, REPEATS)
    rounds, pairs = (1, 4) if arguments.quick else (3, 8)
    plain, ours = rivals(demo_model)
    tables = {
        "options": against_hf(plain, ours, {size: question(100, size) for size in options}, rounds),
        "words of context, 4 options": against_hf(plain, ours, {size: question(size, 4) for size in contexts}, rounds),
        "factors": repeated(plain, ours, numbers, True, pairs, rounds),
        "languages": repeated(plain, ours, numbers, False, pairs, rounds),
    }
    if arguments.figure:
        draw(tables, arguments.figure)
    report({"seconds": tables}, arguments.json)


if __name__ == "__main__":
    main()
