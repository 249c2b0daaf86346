"""The user error matrix: each wrong argument, and what the message says. The docs' table is held to this one."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.arguments import split
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import from_arguments
from tests.conftest import make_set, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "interventions.md"
SET = make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5)], "tur_Latn": []})
NAMES = (
    "mean, median, max, token_max, diffmean, sentence_mean, clas_diffmean, pNN, live_max, live_mean, live_median, "
    "live_min, live_std, live_iqr, live_mad, live_pNN, normal"
)
FORMS = "all, prompt, generated, last, a window such as 3:10, or a window of a part such as prompt[-5:]"
PRESETS = (
    "p_max, p_median, =max, +max, =0, =P10, additive, replacement, diffmean, clas_diffmean, deactivate, set_max, "
    "add_max, set_0, set_p10, or =, + or * with a number or a live statistic such as +std"
)
# Written with a neuron set of fra_Latn, deu_Latn and tur_Latn (which has no neurons) in a model of three layers.
MATRIX = [
    (
        "language=frensh,op=scale",
        "unknown language 'frensh': expected a code such as fra_Latn, fra or fr; did you mean 'fra_Latn'?",
    ),
    (
        "language=spa,op=scale",
        "language 'spa_Latn' (spa_Latn) is not in the neuron set, which has fra_Latn, deu_Latn, tur_Latn",
    ),
    (
        "language=tur,op=scale",
        "tur_Latn has no neurons in the neuron set; allow_empty=true to go on",
    ),
    (
        "language=fra+,op=scale",
        "language='fra+': expected languages joined by +, such as fra_Latn+ind_Latn",
    ),
    (
        "language=others,op=scale",
        "others: stands alone, in deactivate= only; name the languages to steer",
    ),
    (
        "language=fra",
        "language= without op=: expected op=scale, op=add or op=set, or a preset=",
    ),
    (
        "language=fra,op=scael",
        "op='scael': expected one of scale, add, set; did you mean 'scale' or 'set'?",
    ),
    (
        "language=fra,op=scale,factor=nan",
        "factor=nan: expected a finite number",
    ),
    (
        "language=fra,op=scale,facter=3",
        "unknown model argument 'facter'; did you mean 'factor' or 'layers' or 'deactivate'?",
    ),
    (
        "language=fra,op=scale,value=2",
        "value=2.0: op=scale takes none but a live_ statistic; use factor=",
    ),
    (
        "language=fra,op=add,value=maen",
        f"value='maen': expected a number or one of {NAMES}; did you mean 'mean' or 'median' or 'max'?",
    ),
    (
        "language=fra,op=add,value=inf",
        "value=inf: expected a finite number",
    ),
    (
        "language=fra,op=add,value=live_maximum",
        f"value='live_maximum': expected a number or one of {NAMES}; did you mean 'live_max' or "
        "'live_min' or 'live_mad'?",
    ),
    (
        "language=fra,op=add,value=p75",
        "statistic 'p75' at site 'activation' is not in the neuron set; known: mean, sentence_mean, "
        "median, max, p10, diffmean; `lm-eval-steering calibrate` measures it",
    ),
    (
        "language=fra,op=add,value=token_max",
        "statistic 'token_max' at site 'activation' is not in the neuron set; known: mean, sentence_mean, "
        "median, max, p10, diffmean; `lm-eval-steering calibrate` measures it",
    ),
    (
        "language=fra,op=add,value=1e30,factor=1e30",
        "the intervention's factors and values overflow float32; use smaller ones",
    ),
    (
        "language=fra,op=add,site=prodct",
        "site='prodct': expected one of activation, product, residual; did you mean 'product'?",
    ),
    (
        "language=fra,op=add,site=residual",
        "site=residual without layers=: say after which decoder layers the hidden states are edited, such as layers=14 "
        "or layers=12-16 (what is added at several layers adds up)",
    ),
    (
        "language=fra,op=add,site=residual,layers=1",
        "site=residual: the neuron set holds no statistics of hidden states; add them with `lm-eval-steering calibrate "
        "SET --residual --model MODEL --corpus CORPUS --out SET`",
    ),
    (
        "language=fra,op=add,dimensions=400",
        "dimensions=400: only site=residual has dimensions; leave it out",
    ),
    (
        "language=fra,preset=clas_diffmean,layers=1",
        "value=clas_diffmean without source=: say which language to steer away from",
    ),
    (
        "language=fra,op=add,source=eng",
        "source='eng': it applies to preset=clas_diffmean, and there is none",
    ),
    (
        "deactivate=fra,site=residual,layers=1",
        "deactivate= at site=residual: a dimension of the hidden states belongs to no language alone; steer away with "
        "op=add,value=diffmean,factor=-1, or write the steps in a file (intervention=) to silence neurons at another "
        "site",
    ),
    (
        "language=fra,op=add,layers=3-",
        "layers='3-': expected ranges such as 0-3+28-31",
    ),
    (
        "language=fra,op=add,layers=1-9",
        "layers='1-9': 1-9 is not a range within 0-2",
    ),
    (
        "language=fra,op=scale,layers=1",
        "fra_Latn has no neurons in layers 1 in the neuron set; allow_empty=true to go on",
    ),
    (
        "language=fra,op=add,positions=first",
        f"positions='first': expected {FORMS}",
    ),
    (
        "language=fra,op=add,positions=5",
        f"positions=5: expected {FORMS}; in a YAML file write it in quotes",
    ),
    (
        "language=fra,op=add,positions=5:3",
        "positions='5:3': an empty window; it goes from its first position up to, not with, the second",
    ),
    (
        "language=fra,op=add,positions=generated[-2:]",
        "positions='generated[-2:]': the end of what is generated is not known, so its bounds count from 0",
    ),
    (
        "language=fra,op=add,scope=sequence",
        "scope='sequence': it applies to a live_ statistic as value= or deactivate_to=, and there is none",
    ),
    (
        "language=fra,op=add,value=live_max,scope=sentence",
        "scope='sentence': expected one of token, sequence; did you mean 'sequence'?",
    ),
    (
        "language=fra,op=add,seed=3",
        "seed=3: it applies to value=normal, or deactivate_to=random or noise, and there is none",
    ),
    (
        "language=fra,op=add,value=normal,seed=-1",
        "seed=-1: expected a whole number from 0 to 4294967295",
    ),
    (
        "language=fra,preset=pmax",
        f"preset='pmax': expected one of {PRESETS}; did you mean 'p_max' or '=max' or '+max'?",
    ),
    (
        "language=fra,preset=+2",
        f"preset=2: expected one of {PRESETS}; a sign before a number needs quotes: '+2'",
    ),
    (
        "language=fra,preset=p_max,op=set",
        "op= conflicts with preset=p_max, which sets it: leave one of the two out",
    ),
    (
        "language=fra,preset=deactivate,factor=2",
        "factor= conflicts with preset=deactivate, which sets the language's neurons to 0",
    ),
    (
        "preset=p_max",
        "preset=p_max without language=: say whose neurons, such as language=fra_Latn",
    ),
    (
        "factor=2",
        "factor= without language=: say whose neurons, such as language=fra_Latn",
    ),
    (
        "site=product",
        "site= without language= or deactivate=: nothing to intervene on",
    ),
    (
        "deactivate_to=0",
        "deactivate_to= without deactivate=: say whose neurons, such as deactivate=eng_Latn",
    ),
    (
        "deactivate=fra,deactivate_to=negat",
        f"deactivate_to='negat': expected a number or one of {NAMES}, negate, mask, random, noise; did "
        "you mean 'negate'?",
    ),
    (
        "deactivate=deu,language=fra+deu,op=scale",
        "deactivating deu_Latn would do nothing: the steering step uses all its neurons; allow_empty=true to go on",
    ),
    (
        "deactivate=others,language=fra+deu+tur,op=scale",
        "deactivate=others: every language of the neuron set is steered to",
    ),
    (
        "language=fra,op=scale,keep_shared=False",
        "keep_shared= without deactivate=: it says what a deactivation leaves out",
    ),
    (
        "deactivate=deu,keep_shared=perhaps",
        "keep_shared='perhaps': expected True or False",
    ),
    (
        "intervention=nowhere.yaml",
        "intervention=nowhere.yaml: No such file or directory",
    ),
    (
        "intervention=steps.yaml,factor=2",
        "factor= conflicts with intervention=, which holds every step: write it there",
    ),
    (
        "language=fra,op=scale,tp_plan=auto",
        "tp_plan='auto': tensor parallelism splits every layer's units over devices, which steering "
        "cannot follow; use parallelize=True, which keeps layers whole, or one process a device",
    ),
    (
        "language=fra,op=scale,allow_empty=perhaps",
        "allow_empty='perhaps': expected True or False",
    ),
]


def message(written: str) -> str:
    with pytest.raises(SteeringError) as error:
        own, _ = split({"neurons": "set"} | simple_parse_args_string(written), HFLM, tiny_model("llama").config)
        own.targets()
        compile_intervention(from_arguments(own.steps()), SET, own.allow_empty)
    return str(error.value)


@pytest.mark.parametrize(("written", "expected"), MATRIX)
def test_each_mistake_has_its_message(written: str, expected: str) -> None:
    assert message(written) == expected


def test_the_docs_say_the_same() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Error messages")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == table(), "python -m tests.lmeval.test_errors prints the table"


def table() -> list[str]:
    return [f"| `{written}` | {expected.replace('|', chr(92) + '|')} |" for written, expected in MATRIX]


FILES = [
    ("- language: fra\n  op: scale\n  facter: 3\n", "step 1: unknown key 'facter'; did you mean 'factor'"),
    ("- {language: fra, op: scale}\n- {op: scael, language: fra}\n", "step 2: op='scael': expected one of"),
    ("- {language: fra, op: set, positions: 3:10}\n", "step 1: positions=190: expected .* write it in quotes"),
    ("- {language: no, op: scale}\n", "step 1: language=False: expected codes .* write no in quotes"),
    ("- {site: product}\n", "step 1: site= without language="),
    ("- {}\n", "step 1: neither language nor deactivate"),
    ("- language: fra\n  op: scale\n  op: set\n", "not a YAML file: the key 'op' is written twice"),
    ("language: fra\nop: scale\n", "expected a list of steps"),
    ("- fra\n", "step 1: expected a mapping such as language: fra_Latn, found 'fra'"),
    ("- [", "not a YAML file"),
    ("", "expected a list of steps"),
    ("- {deactivate: deu, site: product}\n- {language: deu, op: add}\n", "reaches activation first; write that step"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_mistakes_in_a_file_say_in_which_step(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.yaml"
    path.write_text(text)
    with pytest.raises(SteeringError, match=expected) as error:
        intervention = from_arguments({"intervention": str(path)})
        turned = {"keep_shared": False}  # or the deactivation would leave out what is steered
        compile_intervention(
            intervention.model_copy(update={"steps": tuple(s.model_copy(update=turned) for s in intervention.steps)}),
            SET,
        )
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    print("\n".join(table()))
