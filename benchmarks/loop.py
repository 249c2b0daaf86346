"""Scoring against the loop of published scripts: hooks registered for each item, one option a forward pass.

    python -m benchmarks.loop                # the demo model, and a random Llama with a vocabulary of 128k
    python -m benchmarks.loop --quick --json loop.json

The loop is written again here: for each item it registers a hook on the activation of every steered layer, encodes
context and option, runs the model on one row, takes log_softmax over all logits and sums the continuation's, and
removes the hooks. Interleaved rounds; the median of the ratios in each round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.items import (
    SHAPES,
    Pairs,
    demo_model,
    large_vocabulary_model,
    requests_of,
    rivals,
    rolling_of,
    sentences,
    texts,
)
from benchmarks.measure import interleaved, options_of, ratio, report

ITEMS = {"xcopa": 60, "options": 12, "lss": 80, "xwinograd": 60}
ROLLING = {"rolling, sentences": (sentences, 80), "rolling, paragraphs": (texts, 16)}
LIMITS = {"xcopa": 0.5, "options": 0.5, "lss": 0.5, "xwinograd": 0.8, **dict.fromkeys(ROLLING, 0.8)}
LIMITS_LARGE = {"xcopa": 0.3, "options": 0.3, "lss": 0.3}


class Loop:
    """One row a forward pass, as the scripts do it."""

    def __init__(self, ours: Any, model: Any) -> None:
        self._encode, self._windows = ours._encode_pair, ours.tok_encode
        self._model = model
        steps = ours.neuron_set.neurons("fra_Latn")
        self._units = {int(layer): torch.tensor(steps[steps[:, 0] == layer, 1]) for layer in set(steps[:, 0])}
        self._factor = 1.5

    def _hooks(self) -> list[Any]:
        def steer(units: torch.Tensor) -> Callable[..., torch.Tensor]:
            def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
                output[..., units] *= self._factor
                return output

            return hook

        layers = self._model.model.layers
        return [layers[layer].mlp.act_fn.register_forward_hook(steer(units)) for layer, units in self._units.items()]

    @torch.no_grad()
    def _row(self, tokens: list[int], number: int) -> float:
        logits = self._model(torch.tensor([tokens[:-1]])).logits
        chosen = torch.log_softmax(logits, -1)[0, -number:]
        return float(chosen.gather(1, torch.tensor(tokens[-number:]).unsqueeze(1)).sum())

    def options(self, items: Pairs) -> list[float]:
        """Scores of all options of all items."""
        scores = []
        for item in items:
            handles = self._hooks()
            for context, continuation in item:
                before, after = self._encode(context, continuation)
                scores.append(self._row(before + after, len(after)))
            for handle in handles:
                handle.remove()
        return scores

    def rolling(self, wholes: list[str]) -> list[float]:
        """Likelihoods of whole texts, each in one window."""
        scores = []
        for text in wholes:
            handles = self._hooks()
            tokens = self._windows(text)
            scores.append(self._row([0, *tokens], len(tokens)))
            for handle in handles:
                handle.remove()
        return scores


def measured(build: Callable[[], Any], shapes: list[str], share: float, rounds: int) -> dict[str, Any]:
    """Seconds and ratios of every shape, and the largest difference of scores in nats."""
    _, ours = rivals(build)
    loop = Loop(ours, build())
    results = {}
    for name in shapes:
        if name in ROLLING:
            wholes, number = ROLLING[name]
            whole = wholes(max(4, int(number * share)))
            requests = rolling_of(whole)
            works: dict[str, Callable[[], Any]] = {
                "loop": lambda w=whole: loop.rolling(w),
                "ours": lambda r=requests: ours.loglikelihood_rolling(r, disable_tqdm=True),
            }
        else:
            items = SHAPES[name](max(2, int(ITEMS[name] * share)))
            requests = requests_of(items)
            works = {
                "loop": lambda i=items: loop.options(i),
                "ours": lambda r=requests: [s[0] for s in ours.loglikelihood(r, disable_tqdm=True)],
            }
        seconds = interleaved(works, rounds)
        pairs = zip(works["loop"](), works["ours"](), strict=True)
        results[name] = {
            "seconds": {work: round(statistics.median(times), 4) for work, times in seconds.items()},
            "ratio": round(ratio(seconds, "ours", "loop"), 3),
            "difference": max(abs(a - b) for a, b in pairs),
        }
    return results


def main() -> None:
    options = options_of(__doc__).parse_args()
    share, rounds = (0.4, 3) if options.quick else (1.0, 7)
    demo = measured(demo_model, [*ITEMS, *ROLLING], share, rounds)
    result: dict[str, Any] = {"demo": demo, "limits": LIMITS}
    if not options.quick:
        result["vocabulary of 128k"] = measured(large_vocabulary_model, list(LIMITS_LARGE), 0.2, 5)
        result["limits with 128k"] = LIMITS_LARGE
    report(result, options.json)


if __name__ == "__main__":
    main()
