from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lm_eval_steering.architectures.loading import tokenizer_sha256
from lm_eval_steering.architectures.weights import difference, same_weights, weights_digest, weights_sketch
from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.provenance import fingerprint
from tests.conftest import make_set, tiny_model, tiny_tokenizer


def test_the_digest_knows_the_weights_and_nothing_else(family: str) -> None:
    assert weights_digest(tiny_model(family)) == weights_digest(tiny_model(family))
    changed = tiny_model(family)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    assert weights_digest(changed) != weights_digest(tiny_model(family))


def test_a_sketch_knows_a_checkpoint_in_every_dtype_and_no_other(family: str) -> None:
    plain = weights_sketch(tiny_model(family))
    # Apertus has parameters of one value, which is drawn once where a larger tensor gives several.
    assert len(plain) >= (190 if family == "apertus" else 200)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert same_weights(plain, weights_sketch(tiny_model(family).to(dtype)))
    tuned = tiny_model(family)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.03 * parameter.std() * torch.randn_like(parameter))
    assert not same_weights(plain, weights_sketch(tuned))
    assert not same_weights(plain, plain[:-1])


def test_a_sketch_of_many_tensors_does_not_look_at_their_first_values_alone() -> None:
    def many(fill: float) -> torch.nn.Module:
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(torch.nn.Linear(5, 5, bias=False) for _ in range(300))
        with torch.no_grad():
            for layer in layers:
                layer.weight.view(-1)[1:] += fill
        return layers

    assert same_weights(weights_sketch(many(0.0)), weights_sketch(many(0.0)))
    assert not same_weights(weights_sketch(many(0.0)), weights_sketch(many(0.5)))


def test_the_refusal_of_a_quantised_copy_says_that_force_is_reasonable_and_of_another_model_does_not() -> None:
    model = tiny_model("llama")
    original = weights_sketch(model)
    neurons = make_set({"fra_Latn": [(0, 1)]})
    neurons = replace(neurons, provenance=replace(neurons.provenance, weights=original))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # sixteen values, spaced evenly over a row
                step = (parameter.amax(1, keepdim=True) - parameter.amin(1, keepdim=True)) / 15
                parameter.copy_((parameter / step).round() * step)
    copy = weights_sketch(model)
    share, apart = difference(original, copy)
    assert share > 0.3 and apart < 0.2
    with pytest.raises(NeuronSetError, match=rf"{share:.0%} of {len(copy)}.*quantised copy.*force=true is reasonable"):
        neurons.check_weights(copy, "the copy")

    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    stranger = weights_sketch(model)
    assert difference(original, stranger)[1] > 0.9
    with pytest.raises(NeuronSetError, match="force=true") as refused:
        neurons.check_weights(stranger, "the stranger")
    assert "reasonable" not in str(refused.value)


def test_a_set_of_names_has_one_fingerprint_in_every_process() -> None:
    code = (
        "from lm_eval_steering.provenance import fingerprint;"
        "print(fingerprint({'modules': {'q_proj', 'k_proj', 'v_proj', 'up_proj', 'down_proj'}}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("3", "4")
    }
    assert len(found) == 1


def test_a_tokenizers_hash_is_over_its_rules_and_not_over_how_it_last_padded_or_cut() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_sha256(tokenizer)
    tokenizer(["w1", "w1 w2 w3"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.padding is not None  # what `to_str` holds from now on
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.add_tokens(["w999"])
    assert tokenizer_sha256(tokenizer) != before
    other = tiny_tokenizer()
    other.bos_token = "<pad>"
    assert tokenizer_sha256(other) != before


def test_fingerprints_do_not_depend_on_the_order_of_parts() -> None:
    assert (
        fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1}) != fingerprint({"a": 1, "b": [2, 1]})
    )
