"""What is printed can be read back, and means the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.steering.intervention import (
    LIVE,
    PRESETS,
    STATISTICS,
    Intervention,
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
