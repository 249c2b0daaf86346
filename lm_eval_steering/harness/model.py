"""`--model steered-hf`: lm-eval's Hugging Face model with language neurons steered, and evidence with every score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig

from lm_eval_steering.errors import DidNotHappenError, InterventionError, SteeringError
from lm_eval_steering.fingerprint import fingerprint, weights_sketch
from lm_eval_steering.harness.arguments import SteeringArguments, plan_before_loading, refuse_other_name, split
from lm_eval_steering.harness.cache import DecoratingCacheHook, salt
from lm_eval_steering.harness.identity import identity_of
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.likelihood import MADE_FOR, UNSTEERED_TWIN, Score
from lm_eval_steering.metrics.output_language import IdentifiedText
from lm_eval_steering.neurons.loading import versions
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.attach import Steering, fitting_sites
from lm_eval_steering.steering.intervention import Intervention, from_arguments
from lm_eval_steering.steering.plan import Plan, compile_plan


class SteeredHFLM(HFLM):
    """`HFLM` that applies a stored language-neuron intervention.

    Takes every argument that `hf` takes, and those of `SteeringArguments`. Answers are lm-eval's own types with a
    memory: log-likelihoods are `Score`, generated texts are `IdentifiedText`.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        """Check every argument, load the model as `hf` does, and attach the intervention.

        Raises:
            SteeringError: before the model is loaded, for anything that would make the score wrong.
        """
        config = _read_config(pretrained, arguments)
        own, rest = split(arguments, HFLM, config)
        neuron_set, plan = plan_before_loading(own, config)
        if neuron_set is not None and isinstance(pretrained, str) and not own.force:
            refuse_other_name(neuron_set, pretrained)
        # `hf` asks for CUDA by default and fails where there is none.
        rest.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **rest)
        self.identifier = LanguageIdentifier()
        self.steering: Steering | None = None
        self._twice = False  # while rows are scored with and without the intervention, half answers are not cached
        self._detected: list[int] = []  # batch sizes that lm-eval's search found in the steered pass
        self._replayed: Iterator[int] | None = None  # the same, in the unsteered pass
        self._tokens: dict[tuple[str, ...], int] = {}  # (context, continuation) in hand -> tokens of the latter
        self._sites = own.sites
        self._attach(neuron_set, plan, own.targets(), own.force)

    # --- changing the intervention on a loaded model ------------------------------------------------------------

    def intervene(
        self,
        neuron_set: NeuronSet | None = None,
        *,
        target_language: str | None = None,
        allow_empty: bool = False,
        force: bool = False,
        **arguments: Any,
    ) -> None:
        """Replace the intervention; without arguments the model is unsteered.

        Args:
            neuron_set: of this model.
            target_language: what `lfs` counts where the intervention steers to no language.
            allow_empty: accept a language without neurons.
            force: use a set that was found in other weights.
            **arguments: `language`, `op`, ... as on the command line.

        Raises:
            SteeringError: as on the command line; the intervention that was on stays on.
        """
        named = SteeringArguments(target_language=target_language).targets()
        intervention = from_arguments(arguments)
        plan = None
        if neuron_set is not None:
            plan = compile_plan(intervention, neuron_set, allow_empty)
        elif intervention.steps:
            raise SteeringError("an intervention needs a neuron set")
        self._attach(neuron_set, plan, named or (plan.intervention.steered if plan else ()), force)

    def _attach(self, neuron_set: NeuronSet | None, plan: Plan | None, targets: tuple[str, ...], force: bool) -> None:
        steering = None
        if neuron_set is not None and plan is not None:
            sites = fitting_sites(self.model, neuron_set, sites=self._sites, force=force, sketch=self._sketch)
            steering = Steering(sites, plan)
        if self.steering is not None:
            self.steering.detach()
        self.steering = steering.attach() if steering else None
        self.neuron_set, self.targets = neuron_set, targets
        self.fingerprint = self._fingerprint()

    # --- answers ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[Score]:
        self._tokens = {request[0]: len(request[2]) for request in requests if request[0]}
        answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return [
            Score(answer, tokens=len(request[2]), targets=self.targets)
            for answer, request in zip(answers, requests, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Score requests; those whose document asks for it a second time, same rows and batches, without steering."""
        self._refuse_stale(requests)
        twins = [number for number, request in enumerate(requests) if _wants_twin(request)]
        if not twins:
            return self._finite(super().loglikelihood(requests, disable_tqdm=disable_tqdm))
        others = sorted(set(range(len(requests))) - set(twins))
        scores: dict[int, Score] = {}
        if others:
            plain = super().loglikelihood([requests[i] for i in others], disable_tqdm=disable_tqdm)
            scores |= dict(zip(others, plain, strict=True))
        scores |= dict(zip(twins, self._score_twice([requests[i] for i in twins], disable_tqdm), strict=True))
        return self._finite([scores[number] for number in range(len(requests))])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; every token is prompt."""
        return self._finite(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def _score_twice(self, requests: list[Instance], disable_tqdm: bool) -> list[Score]:
        self._twice, self._detected = True, []
        try:
            steered = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            self._replayed = iter(self._detected)
            with self.steering.suspended() if self.steering else nullcontext():
                unsteered = super().loglikelihood(requests, disable_tqdm=disable_tqdm) if self.steering else steered
        finally:
            self._twice, self._replayed = False, None
        return [
            Score(score, score.tokens, unsteered=float(twin[0]), targets=self.targets)
            for score, twin in zip(steered, unsteered, strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate, and identify the language of each output."""
        self._refuse_stale(requests)
        with self._own_random_numbers():
            texts = self._finite(super().generate_until(requests, disable_tqdm=disable_tqdm))
        return [self._identify(text) for text in texts]

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Each rank's own: lm-eval seeds all alike, and sampled answers to equal prompts would be the same on each."""
        if self.world_size == 1:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(torch.initial_seed() + self.rank)
            yield

    def _identify(self, text: str) -> IdentifiedText:
        (found,) = self.identifier.identify([text])
        return IdentifiedText(text, found.language, found.confidence, self.targets)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """lm-eval's search, whose forward passes on made-up tokens are no part of the evidence.

        The unsteered pass of rows that are scored twice repeats the batches of the steered one.
        """
        if self._replayed is not None:
            return next(self._replayed)
        with self.steering.suspended() if self.steering else nullcontext():
            self._detected.append(super()._detect_batch_size(*args, **kwargs))
        return self._detected[-1]

    def _refuse_stale(self, requests: list[Instance]) -> None:
        """Documents that were made for another target language: lm-eval's `--cache_requests` does not know it."""
        for request in requests:
            made_for = request.doc.get(MADE_FOR) if isinstance(request.doc, dict) else None
            if made_for is not None and set(made_for) != set(self.targets):
                raise SteeringError(
                    f"{request.task_name}: its requests were made for {'+'.join(made_for) or 'no language'}, the model "
                    f"is steered to {'+'.join(self.targets) or 'none'}; run without --cache_requests, and from Python "
                    "give the TaskManager metadata={'target_language': ...}"
                )

    def _finite(self, answers: list[Any]) -> list[Any]:
        """The answers, unless activations overflowed while they were made."""
        if self._overflowed() or any(isinstance(answer, tuple) and math.isnan(answer[0]) for answer in answers):
            raise InterventionError(
                f"activations overflowed {self.model.dtype} under {self.intervention.signature()}; use a smaller "
                "factor or a wider dtype"
            )
        return answers

    def _overflowed(self) -> bool:
        if self.steering is None:
            return False
        evidence = self.steering.evidence()
        return not (evidence.finite and math.isfinite(evidence.largest_change))

    # --- the request cache --------------------------------------------------------------------------------------

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Make `--use_cache` know the intervention; called by lm-eval when a cache is opened."""
        if cache_hook.dbdict is None:
            super().set_cache_hook(cache_hook)
            return
        salt(cache_hook.dbdict, lambda: self.fingerprint)
        super().set_cache_hook(DecoratingCacheHook(cache_hook.dbdict, self._decorate))

    def _decorate(self, kind: str, request: Iterable[Any], answer: Any) -> Any:
        """A partial answer as it would be at the end, or None where it cannot stand alone yet, or must not."""
        if self._overflowed():
            return None
        if kind == "generate_until":
            return self._identify(answer)
        if kind == "loglikelihood":
            if self._twice:
                return None
            return Score(answer, tokens=self._tokens[tuple(request)], targets=self.targets)
        return answer

    # --- evidence -----------------------------------------------------------------------------------------------

    @cached_property
    def _sketch(self) -> tuple[float, ...]:
        return weights_sketch(self.model)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self)

    @property
    def intervention(self) -> Intervention:
        """What is done to the model at the moment; no steps where it is unsteered."""
        return self.steering.plan.intervention if self.steering else Intervention()

    def _fingerprint(self) -> str:
        """SHA-256 over everything that decides a score of this model under the intervention in force."""
        return fingerprint(
            {
                **self._identity,
                "neurons": self.neuron_set.content_hash() if self.neuron_set else None,
                "intervention": self.intervention.model_dump(mode="json"),
                "targets": list(self.targets),
                "sites": self._sites or "",
            }
        )

    @property
    def signature(self) -> str:
        """Readable form of the fingerprint, meant to be pasted in a paper."""
        parts = [self.intervention.signature(), f"lid:{self.identifier.signature()}"]
        if self.neuron_set:
            parts.insert(1, f"neurons:{self.neuron_set.content_hash()[:8]}")
        return "|".join([*parts, f"fp:{self.fingerprint[:8]}", f"v:{versions()['lm-eval-steering']}"])

    def steering_report(self) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """
        report: dict[str, Any] = {
            "signature": self.signature,
            "fingerprint": self.fingerprint,
            "intervention": self.intervention.model_dump(mode="json"),
            "target_languages": list(self.targets),
            "language_identifier": self.identifier.signature(),
            "versions": versions(),
        }
        if self.steering is not None and self.neuron_set is not None:
            evidence = self.steering.evidence()
            if evidence.forwards and evidence.modules and not evidence.positions:
                raise DidNotHappenError(f"{evidence.forwards} forward passes ran and no position was edited")
            report["evidence"] = dataclasses.asdict(evidence) | {
                "shared_neurons": self.steering.plan.shared,
                "rank": f"{self.rank} of {self.world_size}",
            }
            report["neuron_set"] = {
                "sha256": self.neuron_set.content_hash(),
                "languages": list(self.neuron_set.languages),
                **dataclasses.asdict(self.neuron_set.provenance),
            }
        return report

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's record of the model, with ours under `steering`."""
        return super().get_model_info() | {"steering": self.steering_report()}


def _wants_twin(request: Instance) -> bool:
    return isinstance(request.doc, dict) and bool(request.doc.get(UNSTEERED_TWIN))


def _read_config(pretrained: Any, arguments: dict[str, Any]) -> Any:
    """The config of a loaded model, or of one still on disk or on the hub: a few kilobytes."""
    if not isinstance(pretrained, str):
        return pretrained.config
    names = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "gguf_file")
    chosen = {name: arguments[name] for name in names if arguments.get(name)}
    read: Callable[..., Any] = AutoConfig.from_pretrained
    try:
        return read(pretrained, **chosen)
    except (OSError, ValueError) as error:
        raise SteeringError(f"pretrained={pretrained!r}: {str(error).splitlines()[0]}") from error
