"""Train the demo model: a small, sparse, multilingual Llama, from scratch, on a CPU, in about an hour.

    python scripts/train_demo_model.py --corpus DIR --out DIR [--processes N]

`--corpus` holds one `LLL.txt` per language (`eng deu nld fra spa ita por rus tur jpn zho ara`), one sentence per line.
To rebuild the training text of the shipped checkpoint:

* Sentences: Tatoeba (https://tatoeba.org, CC-BY 2.0 FR), through the Helsinki-NLP/OPUS-MT-testsets excerpts and the
  sentence pairs of manythings.org; for `ara` and `zho` also TICO-19 (CC0).
* Filters: deduplicated after NFC; the fastText model lid.176 must agree with the sentence's language; most letters
  must be of the language's script; 10 to 250 characters. `zho` mixes simplified and traditional characters.
* Held out: 600 sentences per language (`LLL.valid.txt`) and every sentence that occurs in a held-out parallel group.

Two choices make language neurons appear at this size. An L1 penalty on the positive part of the gate
pre-activation keeps the MLP sparse (a dense SiLU model of 6 million parameters has hardly a unit that is active for
one language alone), and half of the documents change language between sentences, so that the model must predict the
language of the next sentence. The model card states both.

The run is seeded, writes `log.jsonl`, saves its state every `--save-every` steps, and resumes from it when it is
started again; a resumed run equals an uninterrupted one up to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LANGUAGES = ("eng", "deu", "nld", "fra", "spa", "ita", "por", "rus", "tur", "jpn", "zho", "ara")
UNSPACED = {"jpn", "zho"}  # written without blanks between sentences
BOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 8192
WINDOW = 128  # tokens per training row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with one LLL.txt per language")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, tokenizer, log and state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=1, help="data-parallel processes, one thread each if more than one"
    )
    parser.add_argument("--tokens-per-language", type=int, default=550_000)
    parser.add_argument("--batch", type=int, default=32, help="windows per step, over all processes")
    parser.add_argument("--penalty", type=float, default=3e-4, help="weight of the activation penalty after its ramp")
    parser.add_argument("--bfloat16", action="store_true", help="autocast; faster only on CPUs with bfloat16")
    parser.add_argument("--save-every", type=int, default=100, help="steps between two saved states")
    return parser.parse_args()


# --- Text to windows of tokens


def read_corpus(folder: Path) -> dict[str, list[str]]:
    missing = [lang for lang in LANGUAGES if not (folder / f"{lang}.txt").is_file()]
    if missing:
        raise SystemExit(f"{folder}: no {', '.join(f'{lang}.txt' for lang in missing)}")
    return {lang: (folder / f"{lang}.txt").read_text(encoding="utf-8").splitlines() for lang in LANGUAGES}


def train_tokenizer(corpus: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE on the same number of bytes of each language."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    budget = min(sum(len(line.encode()) for line in lines) for lines in corpus.values())

    def balanced() -> Iterator[str]:
        for lines in corpus.values():
            seen = 0
            for line in lines:
                if seen >= budget:
                    break
                seen += len(line.encode())
                yield line

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(balanced(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def documents(corpus: dict[str, list[str]], rng: random.Random) -> Iterator[str]:
    """Endless documents of 1 to 12 sentences, half of them switching language with probability 0.5 per sentence."""
    cursors = {lang: 0 for lang in LANGUAGES}
    shuffled = {lang: rng.sample(lines, len(lines)) for lang, lines in corpus.items()}

    def next_sentence(lang: str) -> str:
        cursors[lang] += 1
        if cursors[lang] > len(shuffled[lang]):
            rng.shuffle(shuffled[lang])
            cursors[lang] = 1
        return shuffled[lang][cursors[lang] - 1]

    while True:
        for first in rng.sample(LANGUAGES, len(LANGUAGES)):
            switching, lang, text = rng.random() < 0.5, first, ""
            for position in range(rng.randint(1, 12)):
                previous = lang
                if switching and position and rng.random() < 0.5:
                    lang = rng.choice(LANGUAGES)
                blank = "" if not text or (previous in UNSPACED and lang in UNSPACED) else " "
                text += blank + next_sentence(lang)
            yield text


def make_windows(corpus: dict[str, list[str]], tokenizer: Tokenizer, tokens: int, seed: int) -> torch.Tensor:
    """Packed rows (row, WINDOW), int64; each document begins with the tokenizer's BOS."""
    source, stream = documents(corpus, random.Random(seed)), []
    while len(stream) < tokens:
        batch = [next(source) for _ in range(2000)]
        for encoding in tokenizer.encode_batch(batch):
            stream += encoding.ids
    rows = torch.tensor(stream[: tokens // WINDOW * WINDOW]).view(-1, WINDOW)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


# --- Model and optimisation


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


class LossWithPenalty(torch.nn.Module):
    """Next-token loss, and the mean over tokens of the summed positive gate pre-activations."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.gates: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate_proj.register_forward_hook(lambda _module, _inputs, out: self.gates.append(out))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.gates.clear()
        loss = self.model(input_ids=rows, labels=rows, use_cache=False).loss
        gates = torch.stack(self.gates)  # (layer, row, position, unit), before the activation function
        return loss, gates.relu().sum(-1).float().mean((1, 2)).sum(), (gates > 0).float().mean()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in float32; torch.optim.Muon computes in bfloat16, which old CPUs emulate."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz iteration

    def __init__(self, parameters: list[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[torch.Tensor], group: dict[str, float]) -> None:
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            average = state.setdefault("momentum", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(average, group["momentum"]))  # Nesterov
        updates = self._orthogonalise(torch.stack(directions))
        scale = max(1.0, parameters[0].shape[0] / parameters[0].shape[1]) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _orthogonalise(self, matrices: torch.Tensor) -> torch.Tensor:
        """Nearest semi-orthogonal matrix to each of (matrix, row, column), by five iterations."""
        a, b, c = self.COEFFICIENTS
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


def make_optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=6e-3, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_share(step: int, steps: int, warmup: int = 80) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def average_gradients(model: torch.nn.Module, processes: int) -> None:
    if processes == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def train(rank: int, args: argparse.Namespace, windows: torch.Tensor) -> None:
    torch.set_num_threads(1 if args.processes > 1 else os.cpu_count() or 1)
    # One cache per process: compilers that write the same file at the same time fail.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(args.out / f"compiled-{rank}")
    if args.processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
        dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)
    model = make_model()
    objective = torch.compile(LossWithPenalty(model))
    optimisers = make_optimisers(model)
    base_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    steps, share = len(windows) // args.batch, args.batch // args.processes
    state_file = args.out / "state.pt"
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        start = state["step"]
    began = time.time()
    for step in range(start, steps):
        rate = learning_rate_share(step, steps)
        for optimiser, base in zip(optimisers, base_rates, strict=True):
            optimiser.param_groups[0]["lr"] = base * rate
        rows = windows[step * args.batch + rank * share :][:share]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
            loss, penalty, active = objective(rows)
        weight = args.penalty * min(1.0, step / (steps / 3))
        (loss + weight * penalty).backward()
        average_gradients(model, args.processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            report(args, step, steps, start, began, loss.item(), active.item())
        if rank == 0 and ((step + 1) % args.save_every == 0 or step == steps - 1):
            save_state(state_file, model, optimisers, step + 1)
    if rank == 0:
        save_checkpoint(model, args.out)
    if args.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def report(
    args: argparse.Namespace, step: int, steps: int, start: int, began: float, loss: float, active: float
) -> None:
    seconds = time.time() - began
    speed = (step - start + 1) * args.batch * WINDOW / seconds
    left = (steps - step - 1) * args.batch * WINDOW / speed
    line = {"step": step, "loss": round(loss, 4), "active": round(active, 5), "tokens_per_second": round(speed)}
    print(
        f"step {step}/{steps} loss {loss:.3f} active {active:.2%} {speed:.0f} tok/s {left / 60:.0f} min left",
        flush=True,
    )
    with (args.out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def save_state(path: Path, model: torch.nn.Module, optimisers: list[torch.optim.Optimizer], step: int) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "step": step}, temporary
    )
    temporary.replace(path)


def save_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights in float16 on disk; `dtype: float32` in the config, so that a CPU computes in full precision."""
    model.to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    args = arguments()
    if args.batch % args.processes:
        raise SystemExit(f"--batch {args.batch} is not a multiple of --processes {args.processes}")
    args.out.mkdir(parents=True, exist_ok=True)
    args.port = random.randint(20_000, 40_000)  # of the local rendezvous only; no influence on the result
    corpus = read_corpus(args.corpus)
    tokenizer = train_tokenizer(corpus)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=PAD, model_max_length=512
    ).save_pretrained(args.out)
    windows_file = args.out / "windows.pt"
    if windows_file.exists():
        windows = torch.load(windows_file, weights_only=True)
    else:
        windows = make_windows(corpus, tokenizer, args.tokens_per_language * len(LANGUAGES), args.seed)
        torch.save(windows, windows_file)
    print(f"{len(windows)} windows of {WINDOW} tokens, {len(windows) // args.batch} steps")
    if args.processes == 1:
        train(0, args, windows)
    else:
        mp.spawn(train, args=(args, windows), nprocs=args.processes)


if __name__ == "__main__":
    main()
