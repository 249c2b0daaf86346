"""SQuAD 1.1's scores (Rajpurkar et al. 2016), written out plainly: the module of transformers that lm-eval's XQuAD
imports is gone since transformers 5."""

from __future__ import annotations

import re
import string
from collections import Counter


def normalize_answer(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split())


def compute_exact(gold: str, prediction: str) -> int:
    return int(normalize_answer(gold) == normalize_answer(prediction))


def compute_f1(gold: str, prediction: str) -> float:
    right, said = normalize_answer(gold).split(), normalize_answer(prediction).split()
    same = sum((Counter(right) & Counter(said)).values())
    if not right or not said:
        return int(right == said)
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(said), 1.0 * same / len(right)
    return (2 * precision * recall) / (precision + recall)
