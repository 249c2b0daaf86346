"""CPU seconds to identify 100,000 short texts, and how often short words are identified wrongly.

    python -m benchmarks.language_id
    python -m benchmarks.language_id --lid glotlid --texts 10000

Texts are the demo's sentences; words are theirs too, in the languages that put blanks between words. `wrong` is the
share of wrong guesses among those above the threshold, by number of letters, which has no minimum here. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any

from lm_eval_steering.lmeval.task_families.demo import demo_languages, sentence
from lm_eval_steering.lmeval.task_families.parallel import unspaced
from lm_eval_steering.metrics.language_id import DEFAULT, UNKNOWN, LanguageIdentifier, in_language
from lm_eval_steering.metrics.text import scripts

SENTENCES = range(60)
LONGEST = 8  # letters


def speed(identifier: LanguageIdentifier, number: int, rounds: int) -> dict[str, Any]:
    sentences = [sentence(n, code) for code in demo_languages() for n in SENTENCES]
    texts = (sentences * (number // len(sentences) + 1))[:number]
    identifier.identify(sentences)
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        identifier.identify(texts)
        seconds.append(time.process_time() - start)
    return {
        "texts": number,
        "characters_a_text": round(sum(map(len, texts)) / number, 1),
        "seconds": [round(value, 2) for value in seconds],
        "median_seconds": round(statistics.median(seconds), 2),
    }


def short_words(identifier: LanguageIdentifier) -> dict[int, dict[str, Any]]:
    right: dict[int, list[bool]] = defaultdict(list)
    words: dict[int, int] = defaultdict(int)
    for code in (code for code in demo_languages() if not unspaced(code)):
        text = [word for number in SENTENCES for word in sentence(number, code).split()]
        for word, identified in zip(text, identifier.identify(text), strict=True):
            length = scripts(word).total()
            words[length] += 1
            if identified.language != UNKNOWN:
                right[length].append(in_language(identified.language, code))
    return {
        length: {"words": words[length], "wrong": round(1 - statistics.mean(right[length]), 3)}
        for length in range(1, LONGEST)
        if right[length]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lid", default=DEFAULT)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    identifier = LanguageIdentifier.named(options.lid)
    result = {
        "identifier": identifier.signature(),
        **speed(identifier, options.texts, options.rounds),
        "short_words": short_words(LanguageIdentifier.named(options.lid, letters=0)),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
