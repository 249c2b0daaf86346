"""Memory and time of an export: a random Llama, built shard by shard and exported in its own process.

    python -m benchmarks.export              # 8 layers of hidden size 4096 (Llama-3.1-8B's), 3.6 GB in bfloat16
    python -m benchmarks.export --quick --json export.json

Prints the size of the largest file that was written, seconds, and two peaks above the memory of the process
before the export: private memory (sampled every 5 ms; Linux), and resident memory, which includes the pages of the
model's files that were read and that the system can free.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.measure import options_of, report
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance

LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
QUICK = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 8}
VOCABULARY, CHOSEN = 8192, 40  # chosen units a layer

# Run in its own process, so that the peak is that of the export.
_EXPORT = """
import resource, sys, threading, time
from pathlib import Path
from lm_eval_steering.export.job import Job, export_checkpoint
from lm_eval_steering.export.source import skeleton_of
from lm_eval_steering.export.verify import Loader
from lm_eval_steering.progress import Log
from lm_eval_steering.neurons.neuron_set import NeuronSet
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
seen = []
def watch():
    while True:
        seen.append(private())
        time.sleep(0.005)
model, neurons, out, shard = sys.argv[1:]
arguments = {"language": "fra_Latn", "op": "add", "value": 2.0}
job = Job(Loader(model), NeuronSet.load(neurons), arguments, Path(out), log=Log(show=False))
skeleton_of(job.loader.model().config)
before, start = resident(), private()
threading.Thread(target=watch, daemon=True).start()
export_checkpoint(job, 128, int(shard))
print(max(seen) - start, resident() - before)
"""


def build(folder: Path, shape: dict[str, int], layers: int) -> int:
    """Write a random Llama, one file per layer and one for the rest, and its neurons; returns the weights' bytes."""
    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=VOCABULARY, dtype="bfloat16", bos_token_id=0)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    file_of: dict[str, str] = {}
    size = 0
    for layer in [*range(layers), None]:
        here = [name for name in shapes if (f".layers.{layer}." in name if layer is not None else "layers" not in name)]
        tensors = {name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16) for name in here}
        save_file(tensors, folder / f"model-{layer}.safetensors", metadata={"format": "pt"})
        file_of |= dict.fromkeys(here, f"model-{layer}.safetensors")
        size += sum(tensor.numel() * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    neurons = np.array([(layer, unit) for layer in range(layers) for unit in range(CHOSEN)], dtype=np.int64)
    provenance = Provenance("synthetic", "", "llama", layers, shape["intermediate_size"])
    NeuronSet(("fra_Latn",), {"fra_Latn": neurons}, provenance).save(folder / "neurons.safetensors")
    return size


def measure(work: Path, shape: dict[str, int], layers: int, shard_bytes: int) -> dict[str, Any]:
    """Build, export, and say what it took; bytes and seconds."""
    model, out = work / "model", work / "out"
    model.mkdir()
    size = build(model, shape, layers)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, model, model / "neurons.safetensors", out, str(shard_bytes)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    private, resident = map(int, done.stdout.split()[-2:])
    return {
        "bytes": size,
        "largest_file": max(path.stat().st_size for path in out.glob("*.safetensors")),
        "peak_private": private,
        "peak_resident": resident,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    options = options_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = measure(Path(work), QUICK, 4, 10**8) if options.quick else measure(Path(work), LARGE, 8, 10**9)
    report(results, options.json)


if __name__ == "__main__":
    main()
