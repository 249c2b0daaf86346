"""`--model steered-hf`: lm-eval's Hugging Face model with language neurons steered, and evidence with every score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from lm_eval_steering.architectures import ModelSites
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import DidNotHappenError, InterventionError, SteeringError
from lm_eval_steering.lmeval.arguments import (
    SteeringArguments,
    plan_before_loading,
    read_config,
    refuse_other_name,
    split,
)
from lm_eval_steering.lmeval.cache import DecoratingCacheHook, PartialAnswers, salt
from lm_eval_steering.lmeval.generation import Generator, Identifying, own_random_numbers
from lm_eval_steering.lmeval.identity import identity_of, refuse_nothing, report_of, signature_of
from lm_eval_steering.lmeval.long_texts import joined, of_whole_text, whole_text, windows_of
from lm_eval_steering.lmeval.requests import BatchSizes, RowBook, parts, refuse_stale, wants_twin
from lm_eval_steering.lmeval.scoring import Encoded, GivenRows, Scorer, rolling
from lm_eval_steering.metrics.likelihood import RollingScore, Score
from lm_eval_steering.metrics.output_language import IdentifiedText
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.steering.attach import Steering, fitting_sites
from lm_eval_steering.steering.compiled import CompiledIntervention, compile_intervention
from lm_eval_steering.steering.intervention import Intervention, from_arguments


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
        config = read_config(pretrained, arguments)
        own, rest = split(arguments, HFLM, config)
        neuron_set, plan = plan_before_loading(own, config)
        if neuron_set is not None and isinstance(pretrained, str) and not own.force:
            refuse_other_name(neuron_set, pretrained)
        self.identifier = own.identifier()
        # `hf` asks for CUDA by default and fails where there is none.
        rest.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **rest)
        self.steering: Steering | None = None
        self.sizes = BatchSizes()
        self._partial = PartialAnswers(self)
        self.book: RowBook | GivenRows | None = None  # of the scoring batches in hand
        self.scorer = Scorer(self, own.scoring)
        self.generator = Generator(self, own.generation)
        self._encoded = Encoded(self)
        self._sites = own.sites
        self._found: dict[str, ModelSites] = {}
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
            plan = compile_intervention(intervention, neuron_set, allow_empty)
        elif intervention.steps:
            raise SteeringError("an intervention needs a neuron set")
        self._attach(neuron_set, plan, named or (plan.intervention.steered if plan else ()), force)

    def _attach(
        self, neuron_set: NeuronSet | None, plan: CompiledIntervention | None, targets: tuple[str, ...], force: bool
    ) -> None:
        if neuron_set is None or plan is None:
            if self.steering is not None:
                self.steering.detach()
            self.steering = None
        else:
            override = self._sites or neuron_set.provenance.sites
            sites = fitting_sites(
                self.model, neuron_set, sites=self._sites, force=force, sketch=self._sketch,
                found=self._found.get(override),
            )  # fmt: skip
            if self.steering is not None and self._found.get(override) is sites:
                self.steering.change(plan)
            else:
                if self.steering is not None:
                    self.steering.detach()
                self.steering, self._found = Steering(sites, plan).attach(), {override: sites}
        self.neuron_set, self.targets = neuron_set, targets
        self.fingerprint = self._fingerprint()

    # --- tokens -------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """As lm-eval's, of which many are known ahead."""
        known = None if args or kwargs else self._encoded.get(string)
        return super().tok_encode(string, *args, **kwargs) if known is None else known

    # --- forward passes -----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        windows = [windows_of(request, self.max_length) for request in requests]
        if any(len(parts) > 1 for parts in windows):
            single = [window for parts in windows for window in parts]
            return joined(self._loglikelihood_tokens(single, disable_tqdm, override_bs), windows)
        self._partial.expect(requests)
        if self.scorer.shares(requests):
            shared = zip(self.scorer.score(requests, disable_tqdm), requests, strict=True)
            return [Score(answer, tokens=len(request[2]), targets=self.targets) for answer, request in shared]
        self.scorer.count_plain(len(requests))
        scores: dict[int, Score] = {}
        for numbers in parts(requests):
            own = [requests[number] for number in numbers]
            if scores and self.batch_size == "auto" and override_bs is None:
                override_bs = min(self.batch_sizes.values())  # the search needs many requests, and these are few
            self.book = RowBook(own, self.max_length, self.logits_cache) if self.steering else None
            try:
                answers = super()._loglikelihood_tokens(own, disable_tqdm, override_bs)
            finally:
                self.book = None
            for number, answer, request in zip(numbers, answers, own, strict=True):
                scores[number] = Score(answer, tokens=len(request[2]), targets=self.targets)
        return [scores[number] for number in range(len(requests))]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One scoring batch, with its rows' lengths handed to the intervention."""
        if self.steering is None or not self.steering.active or self.book is None:
            return super()._model_call(inps, *args, **kwargs)
        rows = self.book.take(inps)
        with self._happening(self.steering), self.steering.rows(rows.real, rows.prompt):
            return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch of generation, with its padding handed to the intervention."""
        mask = kwargs.get("attention_mask")
        if self.steering is None or not self.steering.active or mask is None:
            return self.generator(context, *args, **kwargs)
        with self._happening(self.steering), self.steering.rows(mask):
            return self.generator(context, *args, **kwargs)

    @contextmanager
    def _happening(self, steering: Steering) -> Iterator[None]:
        """A forward pass that the hooks do not see is no steered one."""
        before = steering.forwards
        yield
        if steering.forwards == before:
            raise DidNotHappenError(
                "the model ran and the intervention's hooks did not (code compiled before they were attached?)"
            )

    # --- answers ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Score requests; those whose document asks for it a second time, same rows and batches, without steering."""
        refuse_stale(requests, self.targets)
        requests = [whole_text(request) for request in requests]
        twins = [number for number, request in enumerate(requests) if wants_twin(request)]
        others = sorted(set(range(len(requests))) - set(twins))
        scores: dict[int, Score] = {}
        with self._proven(), self._encoded.ahead(requests):
            if others:
                plain = super().loglikelihood([requests[i] for i in others], disable_tqdm=disable_tqdm)
                scores |= dict(zip(others, plain, strict=True))
            if twins:
                both = self._score_twice([requests[i] for i in twins], disable_tqdm)
                scores |= dict(zip(twins, both, strict=True))
        return self._finite([of_whole_text(request, scores[number]) for number, request in enumerate(requests)])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; every token is prompt."""
        with self._proven():
            if self.scorer.setting == "plain":
                scores = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            else:
                scores = rolling(self, requests, disable_tqdm)
        pairs = zip(requests, self._finite(scores), strict=True)
        return [self.rolling_score(request.args[0], score) for request, score in pairs]

    def rolling_score(self, text: str, score: float) -> RollingScore:
        """A whole text's score with its number of tokens, each of which was predicted once."""
        return RollingScore(score, len(self.tok_encode(text)))

    def _score_twice(self, requests: list[Instance], disable_tqdm: bool) -> list[Score]:
        with self.sizes.scoring_twice():
            steered = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            unsteered = self.scorer.take_unsteered()
            if unsteered is None:
                self.sizes.replay()
                with self.steering.suspended() if self.steering else nullcontext():
                    unsteered = super().loglikelihood(requests, disable_tqdm=disable_tqdm) if self.steering else steered
        return [
            Score(score, score.tokens, unsteered=float(twin[0]), targets=self.targets)
            for score, twin in zip(steered, unsteered, strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate, and identify the language of each output."""
        refuse_stale(requests, self.targets)
        self.identifier.refuse_unknown(self.targets)
        with own_random_numbers(self), self._proven(), Identifying(self) as identifying:
            texts = super().generate_until(requests, disable_tqdm=disable_tqdm)
            return [identifying.text(text) for text in self._finite(texts)]

    @contextmanager
    def _proven(self) -> Iterator[None]:
        """Forward passes inside must edit something, unless there are none, as where every answer is cached."""
        before = self.steering.evidence() if self.steering else None
        yield
        if self.steering is not None and before is not None:
            after = self.steering.evidence()
            forwards, positions = after.forwards - before.forwards, after.positions - before.positions
            refuse_nothing(forwards, positions, after, self.intervention.signature())

    def identify(self, text: str) -> IdentifiedText:
        """A text with its language, and the languages that were steered to."""
        return IdentifiedText.of(text, self.identifier, self.targets)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """lm-eval's search, whose forward passes on made-up tokens are no part of the evidence.

        The unsteered pass of rows that are scored twice repeats the batches of the steered one.
        """
        search = super()._detect_batch_size
        with self.steering.suspended() if self.steering else nullcontext():
            return self.sizes.detect(lambda: search(*args, **kwargs))

    def _finite(self, answers: list[Any]) -> list[Any]:
        """The answers, unless activations overflowed while they were made."""
        overflowed = self.steering is not None and self.steering.overflowed()
        numbers = (answer[0] if isinstance(answer, tuple) else answer for answer in answers)
        if overflowed or any(isinstance(number, float) and math.isnan(number) for number in numbers):
            raise InterventionError(
                f"activations overflowed {self.model.dtype} under {self.intervention.signature()}; use a smaller "
                "factor or a wider dtype"
            )
        return answers

    # --- the request cache --------------------------------------------------------------------------------------

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Make `--use_cache` know the intervention; called by lm-eval when a cache is opened."""
        if cache_hook.dbdict is None:
            super().set_cache_hook(cache_hook)
            return
        salt(cache_hook.dbdict, lambda: self.fingerprint)
        super().set_cache_hook(DecoratingCacheHook(cache_hook.dbdict, self._partial))

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
                "sites": self._sites or (self.neuron_set.provenance.sites if self.neuron_set else ""),
            }
        )

    @property
    def signature(self) -> str:
        """Readable form of the fingerprint, meant to be pasted in a paper."""
        return signature_of(self)

    def steering_report(self) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """
        return report_of(self)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's record of the model, with ours under `steering`."""
        return super().get_model_info() | {"steering": self.steering_report()}
