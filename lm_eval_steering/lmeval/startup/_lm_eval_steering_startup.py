"""Registers lm-eval-steering when lm_eval is imported. Runs at every start of Python, so it imports next to nothing.

lm_eval 0.4.13 discovers no plugins. This finder waits for three of its modules and calls
`lm_eval_steering.lmeval.registration` after each has been executed. Nothing of ours can break lm_eval: any error is
printed and passed over. LM_EVAL_STEERING_NO_STARTUP=1 switches it off.
"""

import sys

_MODULES = {"lm_eval.models", "lm_eval.api.metrics", "lm_eval.tasks.manager"}


class _Loader:
    """The real loader, followed by our registration."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        try:
            from lm_eval_steering.lmeval.registration import on_import

            on_import(module)
        except Exception as error:
            print(f"lm-eval-steering could not register with {module.__name__}: {error!r}", file=sys.stderr)


class _Finder:
    """Wraps the loader of the modules that we wait for; every other import passes by at the cost of one look-up."""

    def find_spec(self, name, path=None, target=None):
        if name not in _MODULES:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def install():
    """Entry of the .pth and .start files; a second call does nothing."""
    import os

    if os.environ.get("LM_EVAL_STEERING_NO_STARTUP"):
        return
    if not any(type(finder).__name__ == "_Finder" and finder.__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
