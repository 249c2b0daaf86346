"""Tasks of sampled texts in which each item has a random seed of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask


class SampledTask(ConfigurableTask):
    """A task whose documents name the seed of their sample: an argument of their generation, as vLLM takes it too.

    Requests of different arguments share no batch and no entry of the request cache.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Args: config: of the task's file; lm-eval leaves the name of this class in it."""
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any) -> Any:
        """lm-eval's requests, each with the document's seed."""
        requests = super().construct_requests(doc, ctx, **kwargs)
        for request in requests if isinstance(requests, list) else [requests]:
            request.arguments[1]["seed"] = int(doc["seed"])
        return requests
