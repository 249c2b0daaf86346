"""A sweep's folder as the runner writes it, with scores that are known, and no model behind it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_steering.metrics.likelihood import nats_per_token
from lm_eval_steering.metrics.output_language import language_counts

DATE = "2026-01-01T00-00-00.000000"
LANGUAGES = ("deu_Latn", "fra_Latn", "tha_Thai")
EVIL = "<script>window.harm = 1</script><img src=x onerror='window.harm = 2'> \u202egnp.exe\u202c \u2066end\u2069"
TEXTS = {
    "deu_Latn": "Das Wetter ist heute schön.",
    "fra_Latn": "Il fait beau aujourd'hui.",
    "tha_Thai": "วันนี้อากาศดี",
    "arb_Arab": "الطقس جميل اليوم",
    "tam_Taml": "இன்று வானிலை நன்றாக உள்ளது",
    "zho_Hans": "今天天气很好",
    "unknown": EVIL,
}
BETTER = {
    "acc": True, "lfs": True, "nats_per_token": False, "output_language": True, "degenerate": False, "lss": True,
}  # fmt: skip


class FolderOfCells:
    """Writes cells; every one has the same documents of its task."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "cells").mkdir(parents=True)
        (path / "timings").mkdir()
        (path / "sweep.json").write_text(json.dumps({"format_version": 3, "model": {"name": "made-up"}}))

    def add(
        self, task: str, metrics: dict[str, list[Any]], steered: str = "", factor: float = 0, control: int | None = None,  # noqa: E501
        texts: list[str] | None = None, target: str | None = None, op: str = "scale", documents: str = "document",
        stage: int = 1, prompts: str = "prompt", damage: tuple[float, ...] = (), reached: float | None = None,
    ) -> str:  # fmt: skip
        """One cell; the values of its items by metric. Its name is returned."""
        name = f"{steered}-{op}-x{factor:g}" if steered else "baseline"
        name += "" if control is None else f"-random{control}"
        target = target or steered or None
        key = hashlib.sha256(f"{name} {task} {target}{'' if stage == 1 else stage}".encode()).hexdigest()
        off = op == "deactivate"
        step = {
            "op": "set" if off else op, "languages": [steered], "value": None if op == "scale" else 0.0 if off else 1.0,
            "factor": factor, "site": "activation", "layers": None, "positions": "all", "scope": "token", "seed": 0,
            "deactivation": off,
        }  # fmt: skip
        planned = {
            "name": name, "arguments": {"op": op} if steered else {},
            "languages": [steered] if steered and not off else [],
            "resolved": {"steps": [step] if steered else []}, "entry": 0, "factor": factor or None,
            "control": control, "damage": damage, "reached": reached,
        }  # fmt: skip
        folder = self.path / "cells" / f"{name}--{task}--{key[:10]}"
        samples = [
            self._sample(place, metrics, texts, documents, prompts)
            for place in range(len(next(iter(metrics.values()))))
        ]
        value = {f"{metric},none": _aggregate(values) for metric, values in metrics.items()}
        files = {
            f"results_{DATE}.json": json.dumps({"results": {task: value}}),
            f"samples_{task}_{DATE}.jsonl": "".join(json.dumps(sample) + "\n" for sample in samples),
        }
        said = f"op:{op}|factor:{factor:g}|lang:{steered}|site:activation|layers:all" if steered else "none"
        if off:
            said = f"op:set|value:0|factor:1|deactivate:{steered}|site:activation|layers:all"
        elif steered and op != "scale":
            said = said.replace("|factor", "|value:1|factor")
        cell = {"key": key, "name": folder.name, "intervention": planned, "task": task, "target": target,
                "items": "all", "stage": stage}  # fmt: skip
        facts = {
            "cell": cell, "model": "made-up", "fingerprint": key, "signature": f"{said}|fp:{key[:8]}|v:0",
            "metrics": value, "higher_is_better": {name: BETTER[name] for name in metrics if name in BETTER},
            "n": dict.fromkeys(value, len(samples)),
            "files": {name: {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
                      for name, text in files.items()},
        }  # fmt: skip
        folder.mkdir()
        for file, text in (files | {"cell.json": json.dumps(facts)}).items():
            (folder / file).write_text(text, encoding="utf-8")
        timing = {"cell": folder.name, "task": task, "seconds": 1.5, "tokens": 100, "device": "cpu", "batch_size": "8"}
        (self.path / "timings" / f"{key}.json").write_text(json.dumps(timing))
        return folder.name

    def _sample(
        self, place: int, metrics: dict[str, list[Any]], texts: list[str] | None, documents: str, prompts: str
    ) -> dict[str, Any]:
        answer = texts[place] if texts else [[-1.0, False]]
        own = {metric: values[place] for metric, values in metrics.items()}
        return {
            "doc_id": place, "doc": {"id": place}, "filter": "none", "metrics": list(own), "filtered_resps": [answer],
            "arguments": {"gen_args_0": {"arg_0": f"{prompts} {place}"}},
            "doc_hash": hashlib.sha256(f"{documents} {place}".encode()).hexdigest(), **own,
        }  # fmt: skip


def _aggregate(values: list[Any]) -> Any:
    if isinstance(values[0], str):
        return language_counts(values)
    if isinstance(values[0], list):
        return nats_per_token([tuple(value) for value in values])
    return float(np.mean(values))


def right(share: float, items: int = 40) -> list[float]:
    """The first so many are right."""
    return [1.0] * round(share * items) + [0.0] * (items - round(share * items))


def write_sweep(path: Path) -> Path:
    """Three languages on three tasks of XCOPA at two factors, one cell missing; generated text; perplexity; controls.

    Accuracy of the baseline is 0.5 everywhere; at factor 2 it is 0.7 for self and 0.4 for cross, at factor 4 it is 0.6
    and 0.2. German steered and Thai evaluated is missing at factor 4.
    """
    made = FolderOfCells(path)
    for evaluated in LANGUAGES:
        task = f"steering_xcopa_{evaluated}"
        made.add(task, {"acc": right(0.5)})
        for steered in LANGUAGES:
            for factor, own, other in ((2, 0.7, 0.4), (4, 0.6, 0.2)):
                if (steered, evaluated, factor) != ("deu_Latn", "tha_Thai", 4):
                    made.add(task, {"acc": right(own if steered == evaluated else other)}, steered, factor)
    _write_text(made)
    for steered in ("", *LANGUAGES):
        for factor in (2, 4) if steered else (0,):
            pairs = [[-20.0 - factor - place % 3, 10] for place in range(30)]
            made.add("steering_nats_deu_Latn", {"nats_per_token": pairs}, steered, factor)
    return path


def _write_text(made: FolderOfCells, items: int = 60) -> None:
    """Outputs in many languages; at a factor f the first f * 10 are in the steered language."""
    others = ["arb_Arab", "tam_Taml", "zho_Hans", "unknown"]
    base = ["fra_Latn" if place < 6 else others[place % 4] for place in range(items)]
    made.add("made_up_generation", {"output_language": base}, texts=[f"{TEXTS[label]} {place}" for place, label in
                                                                   enumerate(base)])  # fmt: skip
    for steered in LANGUAGES:
        for factor in (2, 4):
            for control in (None, 0, 1):
                hits = factor * 10 if control is None else control
                labels = [steered if place < hits else others[place % 4] for place in range(items)]
                forced = [float(label == steered) for label in labels]
                texts = [f"{TEXTS[label]} {place}" for place, label in enumerate(labels)]
                made.add(
                    "made_up_generation", {"output_language": labels, "lfs": forced}, steered, factor, control, texts
                )
