"""What the task families share: item names, the papers' languages, metrics of generated text, and task files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import yaml

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.expected_language import expected_language, options_of
from lm_eval_steering.lmeval.long_texts import TOO_LONG, WholeTextScore
from lm_eval_steering.lmeval.sources import as_dataset
from lm_eval_steering.metrics.likelihood import Score
from lm_eval_steering.metrics.output_language import output_metrics

# --- Names of items in data sets without ids

_DIGITS = 16


def text_id(text: str) -> str:
    """Sixteen digits of SHA-256: the same for an item in each part and wording of a data set, in whatever order."""
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
# Andrylie et al. 2025 (SAE-LAPE), 15 languages.
ANDRYLIE = (
    "eng_Latn", "deu_Latn", "fra_Latn", "ita_Latn", "por_Latn", "hin_Deva", "spa_Latn", "tha_Thai", "bul_Cyrl",
    "rus_Cyrl", "tur_Latn", "vie_Latn", "jpn_Jpan", "kor_Hang", "zho_Hans",
)  # fmt: skip
# Tang et al. 2024, the 7 of mVicuna.
MVICUNA = ("eng_Latn", "spa_Latn", "fra_Latn", "ind_Latn", "jpn_Jpan", "vie_Latn", "zho_Hans")

ALL = tuple(sorted({*GURGUROV, *CLAS_BENCH, *RAHMANISA, *ANDRYLIE}))


# --- Metrics of the language of generated text, the same for every family that generates


def language_metrics(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Every output-language metric that is defined for an answer (`docs/output-language.md`).

    The document names the language that it expects, and which language the metrics of one are about
    (`lmeval.expected_language`). A template that calls this lists all of `output_language.METRICS`.
    """
    return dict(output_metrics(results[0], expected=expected_language(document, None), **options_of(document, {})))


# Of a short answer, the metrics that a few words can have: line and word pass rates need lines of five tokens and say
# nothing about a span. `lm-eval-steering rescore` computes any of them from the samples.

LISTED = (
    "lfs", "lfs_clean", "lang_expected", "lang_confidence", "lang_unknown", "degenerate", "unfinished",
    "output_language",
)  # fmt: skip


def answer_language(text: str, expected: str | None = None) -> dict[str, Any]:
    """The metrics that a template lists; `expected` where the answer is to be in the language of the item."""
    return {name: value for name, value in output_metrics(text, expected=expected).items() if name in LISTED}


# --- Perplexity: log P(text | BOS), each token once, BOS never
#
# A log-likelihood with an empty context, not lm-eval's rolling request: with a tokenizer that adds BOS that one scores
# BOS given BOS too, and counts it as a token.

CONTEXT = 2048  # tokens, where a model's context is not known; lm-eval's assumption too


def text_documents(texts: Iterable[tuple[Any, str]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """(id, text) of whole texts, and `requested`, what is asked for; `too_long` where that is the beginning alone.

    `steered-hf` scores too long texts in windows (`lmeval.long_texts`); elsewhere they are left out and counted.
    """
    limit = _context_length(settings)

    def too_long(text: str) -> bool:
        # No tokenizer makes more tokens than bytes, so most texts need none.
        return len(text.encode()) > limit and _tokens(text, settings) > limit

    def document(id_: Any, text: str) -> dict[str, Any]:
        long = too_long(text)
        beginning = text.encode()[:limit].decode(errors="ignore")
        return {"id": id_, "text": text, "requested": beginning if long else text, TOO_LONG: long}

    return as_dataset(document(id_, text) for id_, text in texts)


def _context_length(settings: Mapping[str, Any]) -> int:
    """Of the model in the model arguments, as lm-eval's `hf` finds it."""
    if settings.get("max_length"):
        return int(settings["max_length"])
    config = _from_pretrained("AutoConfig", settings)
    lengths = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    return next((length for length in lengths if isinstance(length, int)), CONTEXT)


def _tokens(text: str, settings: Mapping[str, Any]) -> int:
    """Number of tokens of a text; of its bytes where there is no tokenizer to ask."""
    tokenizer = _from_pretrained("AutoTokenizer", settings)
    return len(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else len(text.encode())


def _from_pretrained(kind: str, settings: Mapping[str, Any]) -> Any:
    """What transformers has under the name in the model arguments; None where there is none, or nothing under it."""
    name = (settings.get("tokenizer") if kind == "AutoTokenizer" else None) or settings.get("pretrained")
    if not isinstance(name, str):
        return None
    return _loaded(kind, name, str(settings.get("revision") or "main"), bool(settings.get("trust_remote_code")))


@cache
def _loaded(kind: str, name: str, revision: str, trust_remote_code: bool) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # the model's own loader will say why
        return None


def perplexity_metrics(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """Log-likelihood per byte, per character and, with `steered-hf`, per token.

    Tokens differ between languages and tokenizers; bits per byte and per character compare across tokenizers, and
    neither of them across scripts: a Thai character is three bytes. Compare a language with itself, steered and not.
    """
    (score,) = results
    text, total = document["text"], float(score[0])
    if document[TOO_LONG] and not isinstance(score, WholeTextScore):
        return {"left_out": 1.0}
    metrics: dict[str, Any] = {
        "bits_per_byte": (total, len(text.encode())),
        "byte_perplexity": (total, len(text.encode())),
        "bits_per_character": (total, len(text)),
    }
    if isinstance(score, Score):
        return metrics | dict.fromkeys(("token_perplexity", "nats_per_token"), (total, score.tokens))
    return metrics | {"left_out": 0.0}


# --- A task's file decides what the task is
#
# lm-eval gives a `custom_dataset` function the file's metadata, overridden by the model arguments and by `--metadata`.
# Without a check, `--metadata '{"evaluated": "tur_Latn"}'` would run Turkish under an Italian name, and the model
# argument `variant=fp16` would choose a wording.

Documents = Callable[..., dict[str, Any]]


def keeps_to_its_file(documents: Documents) -> Documents:
    """A dataset function whose named parameters come from the task's file alone; all else is a setting.

    Raises:
        SteeringError: if a model argument or `--metadata` differs from the file.
    """
    parameters = signature(documents).parameters.values()
    names = [each.name for each in parameters if each.kind is not Parameter.VAR_KEYWORD]

    @wraps(documents)
    def checked(*args: Any, **settings: Any) -> dict[str, Any]:
        path = Path(str(settings.get("config_source", "")))
        if path.is_file():  # else it is called from Python
            written = _written_in(path)
            for name in [name for name in names if name in settings]:
                if name not in written:
                    del settings[name]
                elif settings[name] != written[name]:
                    raise SteeringError(
                        f"{path.stem}: {name} is {written[name]!r} in the task's file and {settings[name]!r} in "
                        "--metadata or the model arguments; leave it out there, or take another task"
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


def _written_in(path: Path) -> dict[str, Any]:
    """What a task's file gives its dataset function."""
    config = read_task_file(path)
    return {**(config.get("metadata") or {}), **(config.get("dataset_kwargs") or {})}


# --- Task files, read without lm-eval: its import takes seconds, and its reader is private


class _TaskFileLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads `!function a.b` as the text `a.b`: nothing of a task is imported."""


_TaskFileLoader.add_multi_constructor("!function", lambda loader, suffix, node: str(node.value))


def read_task_file(path: Path) -> dict[str, Any]:
    """A task file with what it includes: later files win over earlier ones, the file itself over all, as in lm-eval.

    Functions are text. A test compares it with lm-eval's reader.
    """
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskFileLoader)
    includes = config.pop("include", [])
    included: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        included |= _template(path.parent / name)
    return included | config


@cache
def _template(path: Path) -> dict[str, Any]:
    return read_task_file(path)
