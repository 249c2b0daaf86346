"""What half precision does to log-likelihoods, and to the steered-minus-unsteered differences that users report.

    python -m benchmarks.half_precision --model MODEL --neurons SET --language fra_Latn
    python -m benchmarks.half_precision --quick --json half.json      # the demo model and random neurons

Every method scores the same requests, steered and unsteered. They are compared with lm-eval's own code in float32 at
batch size 1: the mean and the largest absolute difference of a request's summed log-likelihood in nats, and the same of
steered minus unsteered, with 95 % bootstrap intervals over the items; then the share of items whose chosen option, or
whose sign of LSS's shift, is another one than in float32.

Methods: `hf, 1` and `hf, N`: lm-eval's own code (`scoring=plain`) at those batch sizes, as `--model hf`; `packed, N`:
ours. `hf, 1, wide softmax` is `softmax_dtype=float32`, an argument of `hf`.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray
from transformers import AutoTokenizer

from benchmarks.items import DEMO, SHAPES, checkpoint, requests_of
from benchmarks.measure import options_of, report
from benchmarks.models import random_set
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.neurons.neuron_set import NeuronSet

ITEMS = {"xcopa": 60, "belebele": 12, "lss": 80}
QUICK = {"xcopa": 10, "belebele": 2, "lss": 12}
BATCHES = {"xcopa": 16, "belebele": 4, "lss": 16}  # of Belebele fewer: logits of 262k at every position
RESAMPLES = 2000
Scores = NDArray[np.float64]  # (item, option) summed log-likelihoods, in nats


def scores(lm: SteeredHFLM, requests: Sequence[Instance], options: int) -> dict[str, Scores]:
    """Steered and unsteered scores."""
    assert lm.steering is not None
    steered = lm.loglikelihood(list(requests), disable_tqdm=True)
    with lm.steering.suspended():
        unsteered = lm.loglikelihood(list(requests), disable_tqdm=True)
    return {
        name: np.array([answer[0] for answer in answers]).reshape(-1, options)
        for name, answers in (("steered", steered), ("unsteered", unsteered))
    }


def of_model(
    build: Callable[[], Any], folder: str, intervene: Callable[[SteeredHFLM], None], items: dict[str, int],
    methods: Sequence[str],
) -> dict[str, dict[str, dict[str, Scores]]]:  # fmt: skip
    """Shape -> method -> scores, of one loaded model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build()
    by_shape: dict[str, dict[str, dict[str, Scores]]] = {shape: {} for shape in items}
    for method in methods:
        for shape, number in items.items():
            pairs = SHAPES[shape](number)
            arguments: dict[str, Any] = {"batch_size": BATCHES[shape] if "N" in method else 1}
            if method.startswith("hf"):
                arguments["scoring"] = "plain"
            if "wide softmax" in method:
                arguments["softmax_dtype"] = "float32"
            lm = SteeredHFLM(model, tokenizer=tokenizer, **arguments)
            intervene(lm)
            by_shape[shape][method] = scores(lm, requests_of(pairs), len(pairs[0]))
            lm.intervene(None)
            del lm
            gc.collect()
    return by_shape


def errors(values: Scores) -> dict[str, Any]:
    """Mean absolute difference with its interval over items, the largest, and the mean with its sign; in nats."""
    absolute = np.abs(values).mean(axis=1)
    drawn = np.random.default_rng(0).integers(0, len(absolute), (RESAMPLES, len(absolute)))
    low, high = np.quantile(absolute[drawn].mean(axis=1), (0.025, 0.975))
    return {
        "mean": round(float(absolute.mean()), 5), "interval": [round(float(low), 5), round(float(high), 5)],
        "largest": round(float(np.abs(values).max()), 5), "signed": round(float(values.mean()), 5),
    }  # fmt: skip


def compared(shape: str, truth: dict[str, Scores], measured: dict[str, Scores]) -> dict[str, Any]:
    """One method against float32."""
    shift, expected = (each["steered"] - each["unsteered"] for each in (measured, truth))
    rows: dict[str, Any] = {
        "log-likelihoods": errors(measured["unsteered"] - truth["unsteered"]),
        "steered minus unsteered": errors(shift - expected),
    }
    if shape == "lss":  # the second option is the steered language's
        ours, theirs = (each[:, 1] - each[:, 0] for each in (shift, expected))
        rows["LSS"] = {"here": round(float((ours > 0).mean()), 4), "float32": round(float((theirs > 0).mean()), 4)}
        rows["other sign"] = round(float(((ours > 0) != (theirs > 0)).mean()), 4)
    else:
        rows["other choice"] = {
            name: round(float((measured[name].argmax(1) != truth[name].argmax(1)).mean()), 4) for name in measured
        }
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as the table of docs/half-precision.md."""
    lines = [
        "| shape | scored by | against | log-likelihoods, nats: mean, largest | steered minus unsteered | "
        "other choice or sign |",
        "|---|---|---|---|---|---|",
    ]

    def said(values: dict[str, Any]) -> str:
        low, high = values["interval"]
        return f"{values['mean']:.3f} [{low:.3f}, {high:.3f}], {values['largest']:.2f}"

    for shape in result["items"]:
        size = result[shape]["batch size N"]
        for method, rows in result[shape].items():
            if not isinstance(rows, dict) or "log-likelihoods" not in rows:
                continue
            scored, _, rival = method.partition(" against ")
            scored = f"{'' if 'float32' in scored else result['dtype'] + ': '}{scored}".replace(", N", f", {size}")
            if "other sign" in rows:
                other = f"{rows['other sign']:.1%} (LSS {rows['LSS']['here']:.3f}, {rows['LSS']['float32']:.3f})"
            else:
                other = f"{rows['other choice']['unsteered']:.1%}, steered {rows['other choice']['steered']:.1%}"
            against = f"{result['dtype']}: {rival}" if rival else "float32: hf, 1"
            lines.append(
                f"| {shape} | {scored} | {against} | {said(rows['log-likelihoods'])} | "
                f"{said(rows['steered minus unsteered'])} | {other} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--table-of", type=Path, help="print the table of a result that was written by --json")
    parser.add_argument("--model", default=str(DEMO), help="folder of a checkpoint")
    parser.add_argument("--neurons", type=Path, help="neuron set; random neurons by default")
    parser.add_argument("--language", default="fra_Latn", help="steered language")
    parser.add_argument("--factor", type=float, default=1.0, help="of add mean at product; of random neurons' scale")
    parser.add_argument("--dtype", default="bfloat16", help="the half precision")
    options: argparse.Namespace = parser.parse_args()
    if options.table_of is not None:
        print(table(json.loads(options.table_of.read_text())))
        return
    items = QUICK if options.quick else ITEMS

    def intervene(lm: SteeredHFLM) -> None:
        if options.neurons is None:
            lm.intervene(random_set(lm.model), language="fra_Latn", op="scale", factor=1 + options.factor)
            return
        lm.intervene(
            NeuronSet.load(options.neurons), language=options.language, op="add", value="mean", site="product",
            factor=options.factor, force=True,
        )  # fmt: skip

    def of(dtype: str, *methods: str) -> dict[str, dict[str, dict[str, Scores]]]:
        by_shape = of_model(checkpoint(options.model, dtype), options.model, intervene, items, methods)
        gc.collect()
        return by_shape

    wide = of("float32", "hf, 1", "packed, N")
    half = of(options.dtype, "hf, 1", "hf, 1, wide softmax", "hf, N", "packed, N")
    result: dict[str, Any] = {"model": Path(options.model).name, "dtype": options.dtype, "items": items}
    for shape in items:
        truth = wide[shape]["hf, 1"]
        result[shape] = {
            "batch size N": BATCHES[shape],
            "float32: packed, N": compared(shape, truth, wide[shape]["packed, N"]),
            **{method: compared(shape, truth, measured) for method, measured in half[shape].items()},
            "hf, N against hf, 1": compared(shape, half[shape]["hf, 1"], half[shape]["hf, N"]),
            "packed, N against hf, 1": compared(shape, half[shape]["hf, 1"], half[shape]["packed, N"]),
            "steered minus unsteered in float32": errors(truth["steered"] - truth["unsteered"]),
        }
    report(result, options.json)
    print(table(result))


if __name__ == "__main__":
    main()
