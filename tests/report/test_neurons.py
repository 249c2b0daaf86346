"""What `inspect` prints and draws: the right numbers, for empty languages too, and the same bytes each time."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lm_eval_steering.analysis import neuron_figures as neuron_pictures
from lm_eval_steering.analysis.inspect import (
    describe,
    distinct_by_layer,
    entropy_distribution,
    jaccard,
    language_rows,
    layer_counts,
    multiplicity,
    warning_of,
)
from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import LAYERS, UNITS, make_set

# Three layers of 24 units. (0, 5) lies in three languages, (1, 7) in two, and Turkish has none.
HAND_MADE: dict[str, list[tuple[int, int]]] = {
    "spa_Latn": [(0, 5), (1, 7), (2, 3), (2, 4)], "deu_Latn": [(0, 5), (1, 7)], "fra_Latn": [(0, 5)], "tur_Latn": [],
}  # fmt: skip
NAMES = {"neurons-by-layer", "overlap"}


@pytest.fixture
def hand_made() -> NeuronSet:
    return make_set(HAND_MADE)


def with_selection(found: NeuronSet, **numbers: Any) -> NeuronSet:
    return replace(found, provenance=replace(found.provenance, selection={"method": "lape", "rate": 0.05} | numbers))


def with_entropy(found: NeuronSet, threshold: float | None = 0.5) -> NeuronSet:
    edges = np.linspace(0, np.log(len(found.languages)), 65).tolist()
    return with_selection(
        found, entropy_histogram={"edges": edges, "counts": list(range(64))}, entropy_threshold=threshold
    )  # fmt: skip


# --- numbers --------------------------------------------------------------------------------------------------------


def test_layer_counts(hand_made: NeuronSet) -> None:
    assert layer_counts(hand_made).tolist() == [[1, 1, 2], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert distinct_by_layer(hand_made).tolist() == [1, 1, 2]


def test_multiplicity_goes_with_the_union(hand_made: NeuronSet) -> None:
    pairs = zip(map(tuple, hand_made.union().tolist()), multiplicity(hand_made).tolist(), strict=True)
    assert dict(pairs) == {(0, 5): 3, (1, 7): 2, (2, 3): 1, (2, 4): 1}


def test_jaccard_of_nothing_over_nothing_is_no_number(hand_made: NeuronSet) -> None:
    found = jaccard(hand_made.overlap())
    expected = [[1, 2 / 4, 1 / 4, 0], [2 / 4, 1, 1 / 2, 0], [1 / 4, 1 / 2, 1, 0], [0, 0, 0, np.nan]]
    np.testing.assert_array_equal(found, expected)


def test_language_rows(hand_made: NeuronSet) -> None:
    rows = language_rows(hand_made)
    assert [(r.code, r.neurons, r.exclusive, r.shared) for r in rows] == [
        ("spa_Latn", 4, 2, 2), ("deu_Latn", 2, 0, 2), ("fra_Latn", 1, 0, 1), ("tur_Latn", 0, 0, 0),
    ]  # fmt: skip
    assert rows[0].share == 4 / (LAYERS * UNITS)
    assert {row.tokens for row in rows} == {None}


@pytest.mark.parametrize("seed", range(3))
def test_rows_agree_with_plain_sets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    drawn = {
        code: sorted({(int(n) // UNITS, int(n) % UNITS) for n in generator.integers(0, LAYERS * UNITS, 20)})
        for code in ("eng_Latn", "fra_Latn", "jpn_Jpan", "rus_Cyrl")
    }
    found = make_set(drawn, calibrated=False)
    for row in language_rows(found):
        others = {n for code, own in drawn.items() if code != row.code for n in own}
        assert row.exclusive == len(set(drawn[row.code]) - others)
        assert row.shared == len(set(drawn[row.code]) & others)


def test_a_set_without_any_neuron_is_described_and_drawn(tmp_path: Path) -> None:
    empty = make_set({"fra_Latn": [], "tur_Latn": []}, calibrated=False)
    assert layer_counts(empty).tolist() == [[0] * LAYERS] * 2
    assert "0 neurons (0.000% of all)" in describe(empty)
    assert len(neuron_pictures.draw(empty, tmp_path)) == 4


# --- text -----------------------------------------------------------------------------------------------------------


def line(text: str, start: str) -> list[str]:
    return next(found for found in text.splitlines() if found.startswith(start)).split()


def test_the_text_holds_the_numbers(hand_made: NeuronSet) -> None:
    text = describe(hand_made)
    assert line(text, "spa_Latn") == ["spa_Latn", "Spanish", "4", "5.556%", "2", "2"]
    assert line(text, "tur_Latn") == ["tur_Latn", "Turkish", "0", "0.000%", "0", "0"]
    assert line(text, "distinct")[1:3] == ["4", "neurons"]
    assert [line(text, f"in {n} language")[3] for n in (1, 2, 3)] == ["2", "1", "1"]
    assert "most similar    spa_Latn deu_Latn  2 shared, Jaccard 0.500" in text
    assert hand_made.content_hash() in text
    assert "activation and product: max mean median p10 sentence_mean" in text


def test_the_text_has_the_whole_provenance(hand_made: NeuronSet) -> None:
    corpus = {
        "source": "wiki", "rows": "packed", "sha256": "a" * 64,
        "calibration": {
            "source": "lines", "sha256": dict.fromkeys(HAND_MADE, "b" * 64),
            "sentences": dict(zip(HAND_MADE, (100, 100, 90, 100), strict=True)),
        },
        "tokens": dict(zip(HAND_MADE, (1234567, 2, 3, 4), strict=True)),
    }  # fmt: skip
    selection = {"method": "lape", "rate": 0.01}
    own = replace(
        hand_made.provenance, model="org/model", revision="c" * 40, selection=selection, corpus=corpus,
        versions={"torch": "2.13.0"},
    )  # fmt: skip
    text = describe(replace(hand_made, provenance=own))
    sentences = "90 to 100 sentences per language from lines"
    for part in ("org/model", "c" * 40, "a" * 64, "b" * 64, "lape, rate 0.01", "torch 2.13.0", sentences):
        assert part in text
    assert line(text, "layers x units")[3:] == ["3", "x", "24", "=", "72"]
    assert line(text, "spa_Latn")[-1] == "1,234,567"


def test_a_hash_for_each_language_has_a_line_for_each(hand_made: NeuronSet) -> None:
    corpus = {"sha256": {code: f"{place}" * 64 for place, code in enumerate(HAND_MADE)}}
    text = describe(replace(hand_made, provenance=replace(hand_made.provenance, corpus=corpus)))
    assert line(text, "  deu_Latn") == ["deu_Latn", "1" * 64]
    assert max(map(len, text.splitlines())) <= 80


def test_no_line_with_a_hash_is_wider_than_a_terminal_and_nothing_is_coloured(hand_made: NeuronSet) -> None:
    text = describe(hand_made)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_set_without_entropies_is_marked_as_such(hand_made: NeuronSet) -> None:
    assert "entropy         not in this set (method lape), so it is not drawn" in describe(with_selection(hand_made))
    assert "statistics      none" in describe(make_set(HAND_MADE, calibrated=False))


def test_the_text_has_the_threshold_and_not_the_histogram(hand_made: NeuronSet) -> None:
    text = describe(with_entropy(hand_made))
    assert "4 of 2,016 eligible neurons selected, up to 0.5000 nats" in text
    assert "edges" not in text


def test_the_number_that_the_selection_tells_goes_before_the_size_of_the_set(hand_made: NeuronSet) -> None:
    numbers = dict(with_entropy(hand_made).provenance.selection) | {"selected": 7}
    assert "7 of 2,016 eligible neurons selected" in describe(with_selection(hand_made, **numbers))


def test_a_set_made_of_others_names_them_and_their_selection(hand_made: NeuronSet) -> None:
    source = with_entropy(hand_made).provenance.selection
    text = describe(with_selection(hand_made, method="intersection", of=[{"sha256": "d" * 64, "selection": source}]))
    assert line(text, "selection")[1] == "intersection,"
    assert line(text, "  of") == ["of", "d" * 64]
    assert "lape, rate 0.05" in text and "edges" not in text


def test_a_histogram_that_is_none_is_refused(hand_made: NeuronSet) -> None:
    for histogram in ({"edges": [0, 1], "counts": [1, 2]}, {"counts": [1]}, [1, 2]):
        with pytest.raises(NeuronSetError, match="entropy_histogram"):
            entropy_distribution(with_selection(hand_made, entropy_histogram=histogram))


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropies", [False, True])
def test_pictures_are_written_in_both_formats(hand_made: NeuronSet, tmp_path: Path, entropies: bool) -> None:
    found = with_entropy(hand_made) if entropies else hand_made
    written = neuron_pictures.draw(found, tmp_path / "new" / "folder")
    names = NAMES | ({"entropy"} if entropies else set())
    assert {path.name for path in written} == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(p.name for p in written)
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.info["dpi"][0] == pytest.approx(200, abs=0.1)
        else:
            assert ET.parse(path).getroot().tag.endswith("svg")


def test_the_same_set_gives_the_same_bytes_in_another_process(hand_made: NeuronSet, tmp_path: Path) -> None:
    found = with_entropy(hand_made)
    found.save(tmp_path / "set.safetensors")
    written = neuron_pictures.draw(found, tmp_path / "here")
    code = (
        "import sys, matplotlib; matplotlib.rcParams['font.size'] = 20\n"
        "from lm_eval_steering.neurons.neuron_set import NeuronSet\n"
        "from lm_eval_steering.analysis.neuron_figures import draw\n"
        "draw(NeuronSet.load(sys.argv[1]), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "set.safetensors", tmp_path / "there"], check=True)
    for path in written:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_the_matrices_are_ordered_by_family_and_blank_where_there_is_no_number(hand_made: NeuronSet) -> None:
    counts, index = neuron_pictures.overlap(hand_made).axes
    order = ["deu_Latn", "fra_Latn", "spa_Latn", "tur_Latn"]
    for axes in (counts, index):
        assert [label.get_text() for label in axes.get_yticklabels()] == order
        assert [label.get_text() for label in axes.get_xticklabels()] == order
    shown = [text.get_text() for text in counts.texts]
    assert shown == ["2", "1", "2", "0", "1", "1", "1", "0", "2", "1", "4", "0", "0", "0", "0", "0"]
    relatives = ["Germanic", "Romance", "Turkic", "Indo-European"]
    shown = [text.get_text() for text in index.texts]
    assert shown == ["1", ".50", ".50", "0", ".50", "1", ".25", "0", ".50", ".25", "1", "0", "0", "0", "0", *relatives]


def test_layers_are_drawn_with_zeros_for_an_empty_language(hand_made: NeuronSet) -> None:
    figure = neuron_pictures.by_layer(hand_made)
    heat = figure.axes[0]
    assert [label.get_text() for label in heat.get_yticklabels()][-1] == "tur_Latn"
    assert [text.get_text() for text in heat.texts][:12] == [*"110", *"100", *"112", *"000"]


@pytest.mark.parametrize("languages", [2, 16, 17, 50])
def test_nothing_sticks_out_of_the_picture(languages: int) -> None:
    from lm_eval_steering.languages import _BRANCH_OF

    codes = [f"{code}_Latn" for code in sorted(_BRANCH_OF) if code not in {"prs", "tgl"}][:languages]
    found = make_set({code: [(place % LAYERS, place % UNITS)] for place, code in enumerate(codes)}, calibrated=False)
    for figure in (neuron_pictures.by_layer(found), neuron_pictures.overlap(found)):
        renderer = figure.canvas.get_renderer()
        box, whole = figure.get_tightbbox(renderer), figure.bbox_inches
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
        assert whole.width <= 7.2 + 1e-9


def test_the_entropy_picture_names_threshold_and_number(hand_made: NeuronSet) -> None:
    for threshold in (0.5, None):
        distribution = entropy_distribution(with_entropy(hand_made, threshold))
        assert distribution is not None
        figure = neuron_pictures.entropy(distribution, 4)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        expected = ["selected: 4", "threshold: 0.500 nats"] if threshold else []
        assert labels == ["eligible: 2,016", *expected]


def test_neurons_of_every_language_are_warned_of(hand_made: NeuronSet) -> None:
    all_languages = make_set({code: [(0, 5), (1, 7)] for code in HAND_MADE} | {"fra_Latn": [(0, 5), (1, 7), (2, 3)]})
    warning = warning_of(with_entropy(all_languages))
    assert warning is not None and "67% of the neurons belong to every language" in warning
    assert "--rate" in warning and "--tokens" in warning and "eligible" not in warning
    nearly_equal = warning_of(with_entropy(hand_made, threshold=float(np.log(4))))
    assert nearly_equal is not None and "1.3863 of at most 1.3863 nats" in nearly_equal
    exhausted = warning_of(with_selection(
        hand_made, entropy_histogram={"edges": [0.0, 1.0], "counts": [521]}, entropy_threshold=1.0, selected=410
    ))  # fmt: skip
    assert exhausted is not None and "410 of 521 eligible neurons" in exhausted and "nats" not in exhausted
    text = describe(with_entropy(all_languages))
    assert "warning: 67%" in text and max(map(len, text.splitlines())) <= 80


def test_sets_that_tell_languages_apart_get_no_warning(hand_made: NeuronSet) -> None:
    assert warning_of(with_entropy(hand_made)) is None
    assert warning_of(with_entropy(hand_made, threshold=None)) is None
    for name in ("demo", "gemma-3-270m-q4km-lape-5", "llama-3.1-8b-instruct-lape-1"):
        assert warning_of(NeuronSet.load(name)) is None


def test_languages_and_layers_come_first_and_hashes_last() -> None:
    text = describe(NeuronSet.load("demo"))
    order = ["code ", "layers x units", "by layer", "statistics", "model ", "text sha256", "content sha256"]
    places = [f"\n{text}".index(f"\n{start}") for start in order]
    assert places == sorted(places)
    assert text.splitlines()[0].startswith("code ") and text.splitlines()[-1].startswith("content sha256")
    assert line(text, "by layer")[2:] == ["15", "18", "67", "46", "79", "82"]
