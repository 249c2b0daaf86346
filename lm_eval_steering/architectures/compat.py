"""Private names of torch and transformers that packages use which work without lm-eval.

`lmeval/compat.py` has all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Name -> the public interface that would replace it.
PRIVATE = {
    "_name_or_path": "an argument of save_pretrained that leaves out where a config was read from",
    **dict.fromkeys(
        (
            "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs", "_global_forward_hooks",
        ),
        "a method of modules that lists their hooks",
    ),
}  # fmt: skip
# What a module keeps of its hooks, to be taken out and put back.
HOOKS = tuple(name for name in PRIVATE if name.startswith("_forward"))


def forget_path(config: Any) -> None:
    """Remove from a config the path that it was read from, before it is saved."""
    config.__dict__.pop("_name_or_path", None)


def number_of_hooks(module: nn.Module) -> int:
    """Of hooks before and after a module's forward pass."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def output_is_hooked(module: nn.Module) -> bool:
    """Whether more than one hook reads what a module returns."""
    return len(module._forward_hooks) > 1 or bool(torch.nn.modules.module._global_forward_hooks)
