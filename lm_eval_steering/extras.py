"""What is installed only on request: the extras of pyproject.toml, and the one line that names one that is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from lm_eval_steering.errors import SteeringError

# Extra -> the modules that it installs and that we import. `all` is what the README installs.
EXTRAS = {
    "report": ("matplotlib", "pandas", "scipy", "jinja2"),
    "slurm": ("submitit",),
    "words": ("jieba", "fugashi", "unidic_lite"),
}


class MissingExtraError(SteeringError):
    """A command needs libraries that come with an extra, and they are not installed."""


def require(extra: str, what: str) -> None:
    """Refuse, before any work is done, what needs an extra that is not installed.

    Args:
        extra: of `EXTRAS`.
        what: needs it, such as `lm-eval-steering report`.

    Raises:
        MissingExtraError: naming the extra, the missing libraries and the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if name not in sys.modules and find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}, which the extra {extra!r} installs: "
            f'pip install "lm-eval-steering[{extra}]"'
        )


def extra_of(module: str) -> str | None:
    """Name of the extra that installs a module; None where none of ours does."""
    return next((extra for extra, modules in EXTRAS.items() if module.split(".", maxsplit=1)[0] in modules), None)
