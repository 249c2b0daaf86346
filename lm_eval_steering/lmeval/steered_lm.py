"""What `steered-hf` and `steered-vllm` share: one intervention at a time, and answers that know what they are of."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM

from lm_eval_steering.errors import InterventionError, SteeringError
from lm_eval_steering.lmeval.arguments import SteeringArguments
from lm_eval_steering.lmeval.cache import CompletingCacheHook, salt
from lm_eval_steering.lmeval.chat_template import TemplateNotes
from lm_eval_steering.lmeval.generation import Identifying
from lm_eval_steering.lmeval.identity import Steered
from lm_eval_steering.lmeval.long_texts import in_windows, joined, of_whole_text, parts_of, whole_text
from lm_eval_steering.lmeval.prompting import END, AskedKeys, Prompting
from lm_eval_steering.lmeval.requests import Request, needs_unsteered_score, refuse_stale, windows_of
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.metrics.likelihood import RollingScore, Score
from lm_eval_steering.metrics.output_language import IdentifiedText
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.steering.compiled import CompiledIntervention, compile_intervention
from lm_eval_steering.steering.intervention import Intervention, Prompt, from_arguments

Answers = Sequence[Any]  # of lm-eval's own type or of ours, one for each request


class SteeredLM(TemplateLM):
    """The part of a steered model that does not depend on what runs it.

    It stands before lm-eval's own class, so `super()` is that class: `class SteeredHFLM(SteeredLM, HFLM)`. Answers are
    lm-eval's own types with a memory: log-likelihoods are `Score`, generated texts are `IdentifiedText`.

    Attributes:
        identifier: of the language of outputs.
        neuron_set: whose neurons are edited; None where the model is unsteered.
        targets: codes of the languages whose share `lfs` counts.
        prompting: the instruction in front of prompts, if any.
        fingerprint: hash over everything that decides a score under the intervention in force.
    """

    identifier: LanguageIdentifier
    neuron_set: NeuronSet | None
    targets: tuple[str, ...]
    prompting: Prompting
    fingerprint: str

    _scoring_twice = False  # while rows are scored with and without the intervention
    _continuation_lengths: dict[tuple[str, str], int]  # of the requests in hand, in tokens

    # --- what differs between the engines -----------------------------------------------------------------------

    @property
    @abstractmethod
    def plan(self) -> CompiledIntervention | None:
        """What is done to the model at the moment; None where it is unsteered."""

    @property
    @abstractmethod
    def activation_dtype(self) -> str:
        """Of the activations, as torch calls it."""

    @property
    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Parts of the fingerprint that no intervention changes."""

    @property
    @abstractmethod
    def _longest_input(self) -> int:
        """Number of tokens that one request may have."""

    @abstractmethod
    def _apply(self, neuron_set: NeuronSet | None, plan: CompiledIntervention | None, force: bool) -> None:
        """Put an intervention in force, or none; on an error the one that was on stays on."""

    @abstractmethod
    def _overflowed(self) -> bool:
        """Whether activations were not finite after an edit."""

    @abstractmethod
    def _log_likelihoods(self, requests: list[Request], disable_tqdm: bool, override_bs: int | None) -> Answers:
        """Of requests that fit the model."""

    @abstractmethod
    def _with_and_without(self, score: Callable[[], Answers]) -> tuple[Answers, Answers]:
        """Answers under the intervention, and without it of the same rows in the same batches.

        Args:
            score: scores the requests in hand as the model is at the moment.
        """

    @abstractmethod
    def steering_report(self) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """

    @contextmanager
    def _proven(self) -> Iterator[None]:
        """Around the work for some requests: afterwards it is known that they were edited."""
        yield

    # --- changing the intervention ------------------------------------------------------------------------------

    def intervene(
        self,
        neuron_set: NeuronSet | None = None,
        *,
        target_language: str | None = None,
        allow_empty: bool = False,
        force: bool = False,
        **arguments: Any,
    ) -> None:
        """Replace the intervention; without arguments the model is unsteered. Nothing is loaded or compiled anew.

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
            intervention = plan.intervention
        elif intervention.steps:
            raise SteeringError("an intervention needs a neuron set")
        self._attach(neuron_set, plan, named or intervention.steered, force, intervention.prompt)

    def _attach(
        self,
        neuron_set: NeuronSet | None,
        plan: CompiledIntervention | None,
        targets: tuple[str, ...],
        force: bool,
        prompt: Prompt | None,
    ) -> None:
        tokenizer: Any = self.tokenizer
        prompting = Prompting(prompt, tokenizer, str(tokenizer.decode([self.prefix_token_id])))
        self._apply(neuron_set, plan, force)
        self.neuron_set, self.targets, self.prompting = neuron_set, targets, prompting
        self.fingerprint = fingerprint(self._decides())

    # --- answers ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """A `Score` of each request; where its document asks for it, with the one of the same row without steering."""
        refuse_stale(requests, self.targets)
        requests = [whole_text(request) for request in requests]
        self.template_notes.scored(request.args[0] for request in requests)
        twice = [index for index, request in enumerate(requests) if needs_unsteered_score(request)]
        once = sorted(set(range(len(requests))) - set(twice))
        scores: dict[int, Any] = {}
        with self._proven(), self.prompting.proven(requests):
            if once:
                steered = super().loglikelihood([requests[index] for index in once], disable_tqdm=disable_tqdm)
                scores |= dict(zip(once, steered, strict=True))
            if twice:
                both = self._score_twice([requests[index] for index in twice], disable_tqdm)
                scores |= dict(zip(twice, both, strict=True))
        return self._finite([of_whole_text(request, scores[index]) for index, request in enumerate(requests)])

    def _score_twice(self, requests: list[Instance], disable_tqdm: bool) -> list[Score]:
        parents = super().loglikelihood

        def score() -> Answers:
            return parents(requests, disable_tqdm=disable_tqdm)

        self._scoring_twice = True
        try:
            if self.prompting.active:  # other prompts, hence other rows
                steered = score()
                with self.prompting.suspended():
                    unsteered: Answers = score()
            else:
                steered, unsteered = self._with_and_without(score)
        finally:
            self._scoring_twice = False
        return [
            Score(score, score.tokens, unsteered=float(without[0]), targets=self.targets)
            for score, without in zip(steered, unsteered, strict=True)
        ]

    def _loglikelihood_tokens(  # type: ignore[override]  # as `HFLM`, which narrows `TemplateLM`
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        return self._scored([self._with_instruction(request) for request in requests], disable_tqdm, override_bs)

    def _scored(self, requests: list[Request], disable_tqdm: bool, override_bs: int | None = None) -> list[Any]:
        """A `Score` of each request, of the tokens that are sent."""
        windows = [in_windows(request, self._longest_input) for request in requests]
        if any(len(parts) > 1 for parts in windows):
            single = [window for parts in windows for window in parts]
            return joined(self._scored(single, disable_tqdm, override_bs), windows)
        self.prompting.prove(self._fed_context(request) for request in requests)
        self._continuation_lengths = {request[0]: len(request[2]) for request in requests if request[0]}
        answers = self._log_likelihoods(list(requests), disable_tqdm, override_bs)
        return [
            Score(answer, tokens=len(request[2]), targets=self.targets)
            for answer, request in zip(answers, requests, strict=True)
        ]

    def log_likelihoods(self, requests: Sequence[Request]) -> list[Any]:
        """A `Score` of each request that is tokenised already."""
        return self._scored(list(requests), disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """A `RollingScore` of each whole text after one prefix token; every token is prompt."""
        with self._proven(), self.prompting.proven(requests):
            totals = self._totals(requests, disable_tqdm)
        pairs = zip(requests, self._finite(totals), strict=True)
        return [self._rolling_score(request.args[0], total) for request, total in pairs]

    def _totals(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
        """Summed log-probability of each text, in nats: the windows of all texts are one list of requests."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        answers = iter(self._scored([each for of_text in windows for each in of_text], disable_tqdm))
        totals = []
        for text, of_text in zip(texts, windows, strict=True):
            totals.append(sum(next(answers)[0] for _ in of_text))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _windows(self, text: str) -> list[Request]:
        """A whole text in lm-eval's windows, or in those that all begin with the instruction."""
        tokens = self._text_tokens(text)
        if not self.prompting.active:
            return windows_of(tokens, self.prefix_token_id, self._longest_input)
        return [(None, *part) for part in parts_of(self._instruction_tokens, tokens, self._longest_input)]

    def _text_tokens(self, text: str) -> list[int]:
        """Tokens of a whole text; after an instruction without those that a tokenizer puts in front."""
        return list(self.tok_encode(text, **({"add_special_tokens": False} if self.prompting.active else {})))

    def _rolling_score(self, text: str, score: float) -> RollingScore:
        """A whole text's score with its number of tokens, each of which was predicted once."""
        return RollingScore(score, len(self._text_tokens(text)))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """An `IdentifiedText` of each request."""
        refuse_stale(requests, self.targets)
        self.identifier.refuse_unknown(self.targets)
        hook: CacheHook = self.cache_hook
        sent = [self._as_sent(request) for request in requests]
        asked = {one.args[0]: other.args[0] for one, other in zip(sent, requests, strict=True)}
        keys = AskedKeys(hook, asked) if self.prompting.active else hook
        with self._proven(), self.prompting.proven(requests), Identifying(self.identify, keys) as identifying:
            self.cache_hook = identifying
            try:
                texts = super().generate_until(sent, disable_tqdm=disable_tqdm)  # type: ignore[safe-super]
            finally:
                self.cache_hook = hook
            return [identifying.text(text) for text in self._finite(texts)]

    def identify(self, text: str, unfinished: bool | None = None) -> IdentifiedText:
        """A text with its language, and the languages that were steered to; a thought that did not end has none."""
        return IdentifiedText.of(text, self.identifier, self.targets, unfinished)

    def _finite(self, answers: Sequence[Any]) -> list[Any]:
        """The answers, unless activations overflowed while they were made."""
        numbers = (answer[0] if isinstance(answer, tuple) else answer for answer in answers)
        if self._overflowed() or any(isinstance(number, float) and math.isnan(number) for number in numbers):
            raise InterventionError(
                f"activations overflowed {self.activation_dtype} under {self.intervention.signature()}; use a smaller "
                "factor or a wider dtype"
            )
        return list(answers)

    # --- the instruction of an intervention by prompting --------------------------------------------------------

    def _as_sent(self, request: Instance) -> Instance:
        """A request with the instruction in its prompt; one without a prompt gets it in its tokens alone."""
        context, *rest = request.args
        if not self.prompting.active or (not context.strip() and request.request_type != "generate_until"):
            return request
        return replace(request, arguments=(self.prompting.with_instruction(context), *rest))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's, of the prompt as it is sent."""
        if not self.prompting.active:
            return super()._encode_pair(context, continuation)
        if not context.strip():  # the newline after the instruction is no part of the continuation
            return self._instruction_tokens, list(self.tok_encode(context + continuation, add_special_tokens=False))
        return super()._encode_pair(self.prompting.with_instruction(context), continuation)

    def _with_instruction(self, request: Request) -> Request:
        """A request without a prompt has the instruction for one, after the token that it had."""
        key, context, continuation = request
        if not self.prompting.active or key is None or key[0] != "" or len(context) != 1:
            return request
        return key, self._instruction_tokens, continuation

    @property
    def _instruction_tokens(self) -> list[int]:
        """The token that texts begin with, the instruction, and the newline after it."""
        instruction = self.tok_encode(self.prompting.instruction + END, add_special_tokens=False)
        return [self.prefix_token_id, *instruction]

    def _fed_context(self, request: Request) -> list[int]:
        """Tokens of the context that are left where a request is cut to fit the model."""
        _, context, continuation = request
        read = len(context) + (len(continuation) - 1 if self.backend == "causal" else 0)
        return context[max(read - self._longest_input, 0) :]

    # --- what a chat template makes of prompts ------------------------------------------------------------------

    @cached_property
    def template_notes(self) -> TemplateNotes:
        """What the chat template did to the prompts of the evaluation in hand."""
        return TemplateNotes()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval's; an instruction that the template leaves out is noted."""
        render = super().apply_chat_template
        prompt = str(render(chat_history, add_generation_prompt))
        self.template_notes.rendered(chat_history, prompt)
        self.prompting.render(chat_history, prompt, lambda messages: str(render(messages, add_generation_prompt)))
        return prompt

    def _noted(self, report: dict[str, Any]) -> dict[str, Any]:
        """A report with the number of prompts with an instruction, and with what the chat template did, if anything."""
        notes = self.template_notes.notes()
        if evidence := self.prompting.evidence():
            report = {**report, "evidence": evidence | {"rank": f"{self.rank} of {self.world_size}"}}
        return {**report, "notes": notes} if notes else report

    # --- the request cache --------------------------------------------------------------------------------------

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Make `--use_cache` know the intervention; called by lm-eval when a cache is opened."""
        if cache_hook.dbdict is None:
            super().set_cache_hook(cache_hook)
            return
        salt(cache_hook.dbdict, lambda: self.fingerprint)
        super().set_cache_hook(CompletingCacheHook(cache_hook.dbdict, self._completed))

    def _completed(self, kind: str, request: Iterable[Any], answer: Any) -> Any:
        """A partial answer as it is returned at the end; None where it cannot stand alone yet, or must not."""
        if (kind == "loglikelihood" and self._scoring_twice) or self._overflowed():
            return None
        if kind == "loglikelihood":
            context, continuation = request
            return Score(answer, tokens=self._continuation_lengths[context, continuation], targets=self.targets)
        if kind == "loglikelihood_rolling":
            (text,) = request
            return self._rolling_score(text, answer)
        return answer

    # --- what scores are of -------------------------------------------------------------------------------------

    @property
    def intervention(self) -> Intervention:
        """What is done to the model at the moment; no steps where it is unsteered."""
        return self.plan.intervention if self.plan else Intervention(prompt=self.prompting.prompt)

    def _decides(self) -> dict[str, Any]:
        """Everything that decides a score of this model under the intervention in force."""
        return {
            **self._identity,
            "neurons": self.neuron_set.content_hash() if self.neuron_set else None,
            "intervention": self.intervention.model_dump(mode="json"),
            "targets": list(self.targets),
        }

    @property
    def steered(self) -> Steered:
        """What a score is of at the moment, beside the model."""
        return Steered(self.intervention, self.neuron_set, self.fingerprint, self.identifier.signature(), self.targets)

    @property
    def signature(self) -> str:
        """Readable form of the fingerprint, meant to be pasted in a paper."""
        return self.steered.signature
