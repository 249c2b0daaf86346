"""What is printed can be read back, and means the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.errors import InterventionError, SteeringError
from lm_eval_steering.steering.intervention import (
    LIVE,
    PRESETS,
    STATISTICS,
    Intervention,
    Prompt,
    Step,
    build,
    from_arguments,
    parse,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
LANGUAGES = st.lists(st.sampled_from(["fra_Latn", "deu_Latn", "zho_Hans"]), min_size=1, max_size=3, unique=True)
WINDOWS = ["all", "prompt", "generated", "last", "3:10", "-5:", ":", "prompt[-5:]", "generated[:4]"]


@st.composite
def place(draw: Any, value: Any, off: bool) -> dict[str, Any]:
    """Site, layers and what belongs to hidden states alone."""
    layers = st.sampled_from(["0", "0-3+28-31"])
    if value == "clas_diffmean":
        return {"site": "residual", "layers": draw(layers), "source": draw(st.sampled_from(["eng_Latn", "tur_Latn"]))}
    if not off and draw(st.booleans()):
        return {"site": "residual", "layers": draw(layers), "dimensions": draw(st.none() | st.integers(1, 10_000))}
    return {"site": draw(st.sampled_from(["activation", "product"])), "layers": draw(st.none() | layers)}


@st.composite
def steps(draw: Any) -> Step:
    op = draw(st.sampled_from(["scale", "add", "set"]))
    live = st.sampled_from([*LIVE, "live_p05"])
    known = st.sampled_from([*STATISTICS, "p10", "normal"])
    value = draw(st.none() | live) if op == "scale" else draw(st.none() | FINITE | live | known)
    if value == "clas_diffmean":
        op = "add"
    off = value != "clas_diffmean" and draw(st.booleans())
    is_live = isinstance(value, str) and value.startswith("live_")
    return Step(
        op=op,
        languages=["others"] if off and draw(st.booleans()) else draw(LANGUAGES),
        value=value,
        factor=draw(FINITE),
        **draw(place(value, off)),
        positions=draw(st.sampled_from(WINDOWS)),
        scope=draw(st.sampled_from(["token", "sequence"])) if is_live else "token",
        seed=draw(st.integers(0, 2**32 - 1)) if value == "normal" else 0,
        deactivation=off,
        keep_shared=draw(st.booleans()),
    )


@given(st.lists(steps(), max_size=3))
def test_a_signature_reads_back_as_the_same_intervention(chosen: list[Step]) -> None:
    made = Intervention(steps=tuple(chosen))
    assert parse(made.signature()) == made
    assert build(made.model_dump()) == made


@given(
    st.text().filter(lambda text: "{" not in text), st.sampled_from(["fra_Latn", "zho_Hans"]),
    st.sampled_from(["english", "native"]), st.booleans(),
)  # fmt: skip
def test_an_instruction_of_any_text_reads_back(text: str, language: str, names: str, system: bool) -> None:
    prompt = Prompt(instruction=text, language=language, names=names, system=system)
    made = Intervention(prompt=prompt)
    assert parse(made.signature()) == parse(f"{made.signature()}|lid:lid.176.ftz@8f>0.5|fp:12|v:0.1") == made
    assert build(made.model_dump()) == made
    # Whoever splits a signature by hand gets its parts.
    assert ";" not in made.signature() and len(made.signature().split("|")) == 2 + (names == "native") + system
    assert made.signature().isprintable() or not text.isprintable()


def test_an_instruction_is_signed_as_it_is_sent_and_has_one_kind_for_all_languages() -> None:
    french, german = (
        from_arguments({"instruction": 'Write "{language}".', "language": code}) for code in ("fr", "deu_Latn")
    )
    assert french.signature() == r'prompt:"Write \"French\"."|lang:fra_Latn'
    assert french.prompt is not None and german.prompt is not None
    assert french.prompt.kind == german.prompt.kind == 'prompt "Write "{language}"."'
    native = from_arguments({"instruction": "{language}!", "language": "fr", "instruction_names": "native"}).prompt
    assert native is not None and native.kind == 'prompt "{language}!", native names'
    assert french.steered == ("fra_Latn",) and not french.lookahead


def test_interventions_on_neurons_keep_the_fingerprints_that_they_had_before_prompts() -> None:
    assert Intervention().model_dump(mode="json") == {"steps": []}
    assert set(from_arguments({"language": "fra", "op": "scale"}).model_dump(mode="json")) == {"steps"}


@pytest.mark.parametrize(
    "text", ["prompt:French|lang:fra_Latn", 'prompt:"a"', 'prompt:"a"|lang:fra_Latn|op:scale', 'prompt:"a" ; op:scale']
)
def test_a_signature_of_an_instruction_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SteeringError):
        parse(text)


def test_what_a_score_prints_is_read_too() -> None:
    printed = (
        "op:scale|factor:3|lang:fra_Latn|site:activation|layers:all|neurons:1a2b|lid:lid.176.ftz@8f>0.5|fp:12|v:0.1"
    )
    assert parse(printed) == from_arguments({"language": "fr", "op": "scale", "factor": 3})
    assert parse("none|lid:lid.176.ftz@8f|fp:12|v:0.1") == Intervention() == parse("none")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_printed_and_read(preset: str) -> None:
    needed = {"source": "en", "layers": "3+7"} if preset == "clas_diffmean" else {}
    made = from_arguments({"language": "fr", "preset": preset} | needed)
    assert parse(made.signature()) == made
    assert made.lookahead is (preset in {"=max", "+max", "=P10"})


@pytest.mark.parametrize("text", ["op:scale|factr:3|lang:fra_Latn", "scale 3", "op:scale|factor:3"])
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(InterventionError, match=r"signature: cannot read|languages"):
        parse(text)
