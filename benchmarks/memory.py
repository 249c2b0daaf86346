"""Peak memory above the loaded model while options are scored: ours, steered, and lm-eval's `--model hf`, unsteered.

    python -m benchmarks.memory              # a random Llama with a vocabulary of 128k
    python -m benchmarks.memory --quick --json memory.json
    python -m benchmarks.memory --model MODEL --dtype bfloat16       # a checkpoint

Each of the two runs in its own process. On CPU the peak is that of the resident set after the model was
loaded (`VmHWM` or `getrusage`, after one item to warm up and a reset where the system offers one) less the resident
set before scoring; on a GPU it is that of torch's allocator.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.items import DEMO, SHAPES, checkpoint, large_vocabulary_model, requests_of, rivals
from benchmarks.measure import options_of, report

ITEMS = {"xcopa": 20, "options": 3, "belebele": 4}
QUICK = {"xcopa": 8}
LIMIT = 0.4
NAMES = ("hf", "ours")


def peak_of(name: str, options: argparse.Namespace) -> int:
    """MB above the loaded model, in this process."""
    build = checkpoint(options.model, options.dtype) if options.model else large_vocabulary_model
    shape, number = options.shape, options.items
    lm = rivals(build, options.batch_size, only=name, folder=options.model or DEMO)[NAMES.index(name)]
    requests = requests_of(SHAPES[shape](number))
    lm.loglikelihood(requests[:1], disable_tqdm=True)
    before = _reset()
    lm.loglikelihood(requests, disable_tqdm=True)
    return (_peak() - before) >> 20


def _reset() -> int:
    """Bytes in use; the peak starts again from there where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # `getrusage` begins with what the process that started this one had
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks(items: Mapping[str, int], arguments: Sequence[str] = ()) -> dict[str, Any]:
    """MB of both and their ratio, by shape; `arguments` are those of this command."""
    results: dict[str, Any] = {}
    for shape, number in items.items():
        command = [sys.executable, "-m", "benchmarks.memory", "--shape", shape, "--items", str(number),
                   *arguments, "--peak"]  # fmt: skip
        of_shape: dict[str, Any] = {
            name: int(subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True).stdout)
            for name in NAMES
        }
        results[shape] = of_shape | {"ratio": round(of_shape["ours"] / of_shape["hf"], 3)}
    return results


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="xcopa", help=argparse.SUPPRESS)
    parser.add_argument("--items", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--dtype", default="float32", help="of its weights")
    parser.add_argument("--batch-size", type=int, default=16, help="of both sides")
    options = parser.parse_args()
    if options.peak:
        print(peak_of(options.peak, options))
        return
    arguments = ["--model", str(options.model), "--dtype", options.dtype] if options.model else []
    found = peaks(QUICK if options.quick else ITEMS, [*arguments, "--batch-size", str(options.batch_size)])
    report({"MB above the loaded model": found, "limit": LIMIT}, options.json)


if __name__ == "__main__":
    main()
