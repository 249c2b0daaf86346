"""What steering costs inside vLLM, compiled: steered over plain engines, and `steered-vllm` over `steered-hf`.

    python -m benchmarks.vllm                 # in an environment with vLLM: scripts/vllm_cpu_environment, or a GPU's
    python -m benchmarks.vllm --module        # the steered modules alone
    python -m benchmarks.vllm --quick --json vllm.json

On a CPU a random Llama of 8 layers in float32; on a GPU one of 8B shape in bfloat16, with CUDA graphs. Rounds are
interleaved; ratios are medians over them. `again` is a second plain engine: its ratio shows the noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import interleaved, interval, options_of, ratio, report
from benchmarks.models import LARGE, SMALL
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance
from lm_eval_steering.vllm.activation import SiteEdit, SteeredActivation
from lm_eval_steering.vllm.hidden_states import Returns, SteeredHiddenStates

VOCABULARY, STEERED = 8192, 32  # every 32nd unit is steered
INTERVENTION: dict[str, Any] = {"language": "fra_Latn", "op": "scale", "factor": 1.5}


def write_model(folder: Path, shape: dict[str, int]) -> NeuronSet:
    """A random Llama with a word-level tokenizer, and a neuron set of it."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, num_key_value_heads=8, **shape)
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        model = LlamaForCausalLM(config)
    (model.bfloat16() if gpu else model).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    layers, units = shape["num_hidden_layers"], shape["intermediate_size"]
    rows = torch.cartesian_prod(torch.arange(layers), torch.arange(0, units, STEERED)).numpy()
    return NeuronSet(("fra_Latn",), {"fra_Latn": rows}, Provenance("made up", "", "llama", layers, units), None)


def text(number: int, length: int) -> str:
    generator = torch.Generator().manual_seed(number)
    return " ".join(f"w{int(each)}" for each in torch.randint(3, VOCABULARY, (length,), generator=generator))


def generating(prompts: int, tokens: int) -> list[Instance]:
    settings = {"until": [], "do_sample": False, "max_gen_toks": tokens, "min_new_tokens": tokens}
    return [Instance("generate_until", {}, (text(number, 32), settings), number) for number in range(prompts)]


def generating_plain(prompts: int, tokens: int) -> list[Instance]:
    settings = {"until": [], "do_sample": False, "max_gen_toks": tokens, "min_tokens": tokens}
    return [Instance("generate_until", {}, (text(number, 32), settings), number) for number in range(prompts)]


def scoring(prompts: int) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (text(number, 96), " " + text(1000 + number, 32)), number)
        for number in range(prompts)
    ]


def engines(options: argparse.Namespace) -> dict[str, Any]:
    """Steered over plain engines, and over `steered-hf`."""
    from lm_eval.models.vllm_causallms import VLLM

    from lm_eval_steering.lmeval.model import SteeredHFLM
    from lm_eval_steering.vllm.model import SteeredVLLM

    gpu = torch.cuda.is_available()
    prompts, tokens = (16, 16) if options.quick else (64, 64)
    with tempfile.TemporaryDirectory() as folder:
        neurons = write_model(Path(folder), LARGE if gpu and not options.quick else SMALL)
        share = {"gpu_memory_utilization": 0.28} if gpu else {}
        arguments = {"max_model_len": 512, "dtype": "bfloat16" if gpu else "float32", "enable_prefix_caching": False}
        arguments["batch_size"] = "auto"  # lm-eval's default sends one request at a time
        # One process for each engine: idle, it waits and takes no time.
        arguments |= {"distributed_executor_backend": "uni", **share}
        lms = {"plain": VLLM(folder, **arguments), "again": VLLM(folder, **arguments)}
        steered = lms["steered"] = SteeredVLLM(
            folder, **arguments, steered_units=64 if not gpu else 512, steered_residual=False
        )
        steered.intervene(neurons, **INTERVENTION)
        hooks = SteeredHFLM(folder, dtype=arguments["dtype"], batch_size=prompts, max_length=512)
        hooks.intervene(neurons, **INTERVENTION)
        results: dict[str, Any] = {"prompts": prompts, "tokens": tokens, "engine": steered.steering.report()}
        works: dict[str, dict[str, Callable[[], Any]]] = {
            "generation": {
                name: lambda lm=lm, name=name: lm.generate_until(
                    (generating_plain if name in ("plain", "again") else generating)(prompts, tokens), True
                )
                for name, lm in [*lms.items(), ("steered-hf", hooks)]
            },
            "scoring": {
                name: lambda lm=lm: lm.loglikelihood(scoring(prompts), True)
                for name, lm in [*lms.items(), ("steered-hf", hooks)]
            },
        }
        for job, own in works.items():
            seconds = interleaved(own, 1 if options.quick else options.rounds)
            results[job] = {
                "seconds": {name: statistics.median(each) for name, each in seconds.items()},
                "steered over plain": ratio(seconds, "steered", "plain"),
                "again over plain": ratio(seconds, "again", "plain"),
                "steered-hf over steered-vllm": ratio(seconds, "steered-hf", "steered"),
            }
            if not options.quick:
                results[job]["95 % of steered over plain"] = interval(seconds, "steered", "plain")
        evidence = steered.steering.evidence()
        results["evidence"] = {"positions": evidence.positions, "asked": evidence.asked}
    return results


class Plain(nn.Module):
    """silu(gate) * up."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(token, 2 * unit) -> (token, unit)."""
        half = inputs.shape[-1] // 2
        return functional.silu(inputs[..., :half]) * inputs[..., half:]


class Norm(nn.Module):
    """What a layer of Llama begins with: the sum of the two parts, and its norm."""

    def forward(self, parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Two of (token, dimension) -> (token, dimension)."""
        whole = parts[0] + parts[1]
        return functional.rms_norm(whole, whole.shape[-1:])


def module_alone(options: argparse.Namespace) -> dict[str, Any]:
    """The modules alone, compiled, each with the linear layer after it, whose cost it is to be compared with."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    shape = LARGE if gpu else SMALL
    width, dimensions = shape["intermediate_size"], shape["hidden_size"]
    units = torch.arange(0, width, STEERED)
    rooms = {"steered": len(units), "steered, room for all units": width}
    mlp, layers = {}, {}
    for tokens in (16, 64, 512):
        real = torch.full((1,), tokens, dtype=torch.int64, device=device)

        def linear(inputs: int) -> nn.Linear:
            return nn.Linear(inputs, dimensions, bias=False, device=device, dtype=dtype)

        modules: dict[str, nn.Module] = {"plain": Plain()}
        for name, room in rooms.items():
            modules[name] = module = SteeredActivation(Plain(), width, room, functional.silu, real)
            module.write([scaled(units)])
        down = linear(width)
        whole = {name: nn.Sequential(module, down) for name, module in modules.items()}
        mlp[f"{tokens} tokens"] = compared(whole, torch.randn(tokens, 2 * width, device=device, dtype=dtype), options)
        steered = SteeredHiddenStates(Returns.PARTS, dimensions, real)
        steered.write([scaled(torch.arange(dimensions))])
        after = linear(dimensions)
        whole = {"plain": nn.Sequential(Norm(), after), "steered": nn.Sequential(steered, Norm(), after)}
        parts = torch.randn(2, tokens, dimensions, device=device, dtype=dtype)
        layers[f"{tokens} tokens"] = compared(whole, (parts[0], parts[1]), options)
    return {"width": width, "steered": len(units), "mlp": mlp, "dimensions": dimensions, "hidden states": layers}


def scaled(units: torch.Tensor) -> SiteEdit:
    count = len(units)
    return SiteEdit(0, units, torch.full((count,), 1.5), torch.zeros(count), torch.zeros(count, dtype=torch.bool))


def compared(modules: dict[str, nn.Module], inputs: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of each module, compiled, and those of the others over `plain`."""

    def many(module: Any) -> None:
        with torch.inference_mode():
            for _ in range(50):
                module(inputs)

    compiled = {name: torch.compile(module) for name, module in modules.items()}
    seconds = interleaved(
        {name: lambda module=module: many(module) for name, module in compiled.items()},
        3 if options.quick else options.rounds,
    )
    return {
        "microseconds a layer": {name: statistics.median(each) / 50 * 1e6 for name, each in seconds.items()},
        **{f"{name} over plain": ratio(seconds, name, "plain") for name in modules if name != "plain"},
    }


def main() -> int:
    parser = options_of(__doc__)
    parser.add_argument("--module", action="store_true", help="the steered module alone")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    report(module_alone(options) if options.module else engines(options), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
