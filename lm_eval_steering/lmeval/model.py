"""`--model steered-hf`: lm-eval's Hugging Face model with language neurons steered, and evidence with every score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from lm_eval_steering.architectures import ModelSites
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import DidNotHappenError, InterventionError, SteeringError
from lm_eval_steering.files import expand_home
from lm_eval_steering.lmeval.arguments import (
    SteeringArguments,
    plan_before_loading,
    read_config,
    refuse_other_name,
    split,
    take_quantization,
)
from lm_eval_steering.lmeval.cache import CompletingCacheHook, salt
from lm_eval_steering.lmeval.chat_template import TemplateNotes
from lm_eval_steering.lmeval.compat import describe_machine_once
from lm_eval_steering.lmeval.generation import (
    GenerationContext,
    Generator,
    Identifying,
    random_numbers_of_rank,
    unfinished_thoughts,
)
from lm_eval_steering.lmeval.identity import Steered, identity_of, refuse_nothing
from lm_eval_steering.lmeval.long_texts import in_windows, joined, of_whole_text, whole_text
from lm_eval_steering.lmeval.requests import (
    BatchSizes,
    ExpectedRows,
    Request,
    ScoringRows,
    encode_ahead,
    needs_unsteered_score,
    refuse_stale,
    rounds_of,
    windows_of,
)
from lm_eval_steering.lmeval.scoring import LogLikelihood, Scorer, ScoringContext
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

    # Whether several processes draw few-shot examples each from a stream of its own, as lm-eval does.
    draws_per_rank = True

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        """Check every argument, load the model as `hf` does, and attach the intervention.

        Raises:
            SteeringError: before the model is loaded, for anything that would make the score wrong.
        """
        pretrained, arguments = expand_home(pretrained), {key: expand_home(value) for key, value in arguments.items()}
        config = read_config(pretrained, arguments)
        ours, rest = split(arguments, HFLM, config)
        neuron_set, plan = plan_before_loading(ours, config)
        if neuron_set is not None and isinstance(pretrained, str) and not ours.force:
            refuse_other_name(neuron_set, pretrained)
        self.identifier = ours.identifier()
        self._quantization = take_quantization(rest, config)
        self.template_notes = TemplateNotes()
        # `hf` asks for CUDA by default and fails where there is none.
        rest.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **rest)
        self.steering: Steering | None = None
        self.sizes = BatchSizes()
        self.scorer = Scorer(ours.scoring)
        self.generator = Generator(self._generation_context(), ours.generation)
        self._expected_rows: ExpectedRows | None = None  # of lm-eval's own scoring batches, while it makes them
        self._known_tokens: dict[str, list[int]] = {}  # of strings that lm-eval is about to encode
        self._continuation_lengths: dict[tuple[str, str], int] = {}  # of the requests in hand, in tokens
        self._unsteered: list[LogLikelihood] | None = None  # answers of the second pass over the requests in hand
        self._sites = ours.sites
        self._sites_found: dict[str, ModelSites] = {}
        self._attach(neuron_set, plan, ours.targets(), ours.force)

    def _create_model(self, pretrained: str, *args: Any, **arguments: Any) -> None:
        """As lm-eval's, with the quantisation that was asked for before that of the checkpoint.

        Raises:
            SteeringError: if it cannot be loaded so, in the words of the library that says so.
        """
        if self._quantization is not None:
            arguments["quantization_config"] = self._quantization
        try:
            super()._create_model(pretrained, *args, **arguments)
        except (OSError, ValueError, ImportError) as error:
            adapter = f", peft={arguments['peft']!r}" if arguments.get("peft") else ""
            raise SteeringError(f"pretrained={pretrained!r}{adapter}: {str(error).strip().splitlines()[0]}") from error

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
                found=self._sites_found.get(override),
            )  # fmt: skip
            if self.steering is not None and self._sites_found.get(override) is sites:
                self.steering.change(plan)
            else:
                if self.steering is not None:
                    self.steering.detach()
                self.steering, self._sites_found = Steering(sites, plan).attach(), {override: sites}
        self.neuron_set, self.targets = neuron_set, targets
        self.fingerprint = self._fingerprint()

    # --- tokens -------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """As lm-eval's, of which many are known ahead."""
        known = None if args or kwargs else self._known_tokens.get(string)
        return super().tok_encode(string, *args, **kwargs) if known is None else list(known)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval's; an instruction that the template leaves out is noted."""
        prompt = super().apply_chat_template(chat_history, add_generation_prompt)
        self.template_notes.rendered(chat_history, prompt)
        return prompt

    # --- forward passes -----------------------------------------------------------------------------------------

    def forward_pass(self, tokens: torch.Tensor, rows: ScoringRows | None, inputs: dict[str, Any]) -> torch.Tensor:
        """One forward pass of the scorer, under the intervention in force.

        Args:
            tokens: (row, position) token ids, padded on the right.
            rows: their lengths; None where the intervention is suspended.
            inputs: further arguments of the model.

        Returns:
            Logits (row, position, vocabulary).
        """
        mixed = self._mixed_precision
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            if rows is None:
                return self.model(tokens, **inputs).logits
            with self._steered(rows.real, rows.prompt):
                return self.model(tokens, **inputs).logits

    @property
    def _mixed_precision(self) -> torch.dtype | None:
        return cast(torch.dtype | None, self.mixed_precision_dtype)  # `hf` turns names into dtypes

    def _scoring_context(self) -> ScoringContext:
        return ScoringContext(
            model=self.model,
            forward=self.forward_pass,
            steering=self.steering,
            backend=self.backend,
            device=self.device,
            dtype=self._mixed_precision or self.model.dtype,
            max_length=self.max_length,
            batch_size=int(cast(int, self.max_batch_size if self.batch_size == "auto" else self.batch_size)),
        )

    def _generation_context(self) -> GenerationContext:
        return GenerationContext(
            model=self.model,
            tokenizer=self.tokenizer,
            backend=self.backend,
            device=self.device,
            mixed_precision_dtype=self._mixed_precision,
            end_token_id=self.eot_token_id,
            think_end_token=self.think_end_token,
        )

    def _loglikelihood_tokens(  # type: ignore[override]  # as `HFLM`, which narrows `TemplateLM`
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        windows = [in_windows(request, self.max_length) for request in requests]
        if any(len(parts) > 1 for parts in windows):
            single = [window for parts in windows for window in parts]
            return joined(self._loglikelihood_tokens(single, disable_tqdm, override_bs), windows)
        self._continuation_lengths = {request[0]: len(request[2]) for request in requests if request[0]}
        context = self._scoring_context()
        if self.scorer.shares(context, requests):
            scores = self.scorer.score(
                context, requests, twice=self.sizes.twice, progress=not disable_tqdm and self.rank == 0,
                answered=self._keep_partial,
            )  # fmt: skip
            self._unsteered = scores.unsteered
            answers: list[Any] = scores.steered
        else:
            answers = self._by_lm_eval(requests, disable_tqdm, override_bs)
        return [
            Score(answer, tokens=len(request[2]), targets=self.targets)
            for answer, request in zip(answers, requests, strict=True)
        ]

    def _by_lm_eval(self, requests: list[Any], disable_tqdm: bool, override_bs: int | None) -> list[Any]:
        """Answers of lm-eval's own code, in its batches and forward passes."""
        self.scorer.count_plain(len(requests))
        answers: dict[int, Any] = {}
        for indices in rounds_of(requests):
            chosen = [requests[index] for index in indices]
            if answers and self.batch_size == "auto" and override_bs is None:
                override_bs = min(self.batch_sizes.values())  # the search needs many requests, and these are few
            self._expected_rows = ExpectedRows(chosen, self.max_length, self.logits_cache) if self.steering else None
            try:
                found = super()._loglikelihood_tokens(chosen, disable_tqdm, override_bs)
            finally:
                self._expected_rows = None
            answers |= dict(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One of lm-eval's own scoring batches, with its rows' lengths handed to the intervention."""
        if self.steering is None or not self.steering.active or self._expected_rows is None:
            return super()._model_call(inps, attn_mask, labels)
        rows = self._expected_rows.take(inps)
        with self._steered(rows.real, rows.prompt):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """One batch of generation, with its padding handed to the intervention."""
        mask = generation_kwargs.get("attention_mask")
        plain = super()._model_generate
        with nullcontext() if mask is None else self._steered(mask):
            texts = self.generator(self._generation_context(), plain, context, max_length, stop, **generation_kwargs)
        if self.think_end_token is not None and isinstance(self.cache_hook, Identifying):
            prompt = context.shape[1] if self.backend == "causal" else 0
            rows = unfinished_thoughts(
                texts, prompt, self.think_end_token, lambda row: str(self.tok_decode(cast(Any, row)))
            )
            self.cache_hook.unfinished(rows)
        return texts

    @contextmanager
    def _steered(self, real: torch.Tensor, prompt: torch.Tensor | None = None) -> Iterator[None]:
        """Inside, forward passes are of these rows; one that the hooks do not see is no steered one.

        Args:
            real: (row, position) bool, False for pads.
            prompt: (row,) number of prompt tokens; None where all are.
        """
        steering = self.steering
        if steering is None or not steering.active:
            yield
            return
        before = steering.forwards
        with steering.rows(real) if prompt is None else steering.rows(real, prompt):
            yield
        if steering.forwards == before:
            raise DidNotHappenError(
                "the model ran and the intervention's hooks did not (code compiled before they were attached?)"
            )

    # --- answers ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """A `Score` of each request; where its document asks for it, with the one of the same row without steering."""
        refuse_stale(requests, self.targets)
        requests = [whole_text(request) for request in requests]
        self.template_notes.scored(request.args[0] for request in requests)
        twice = [index for index, request in enumerate(requests) if needs_unsteered_score(request)]
        once = sorted(set(range(len(requests))) - set(twice))
        scores: dict[int, Score] = {}
        with self._proven(), self._encoded_ahead(requests):
            if once:
                steered = super().loglikelihood([requests[i] for i in once], disable_tqdm=disable_tqdm)
                scores |= dict(zip(once, cast(list[Score], steered), strict=True))
            if twice:
                both = self._score_twice([requests[i] for i in twice], disable_tqdm)
                scores |= dict(zip(twice, both, strict=True))
        return self._finite([of_whole_text(request, scores[index]) for index, request in enumerate(requests)])

    @contextmanager
    def _encoded_ahead(self, requests: list[Instance]) -> Iterator[None]:
        self._known_tokens = encode_ahead(self.tokenizer, requests, self.prefix_token_id, self.add_bos_token)
        try:
            yield
        finally:
            self._known_tokens = {}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; every token is prompt."""
        with self._proven():
            if self.scorer.setting == "plain":
                scores = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            else:
                scores = self._rolling([request.args[0] for request in requests], disable_tqdm)
        pairs = zip(requests, self._finite(scores), strict=True)
        return [self._rolling_score(request.args[0], score) for request, score in pairs]

    def _rolling(self, texts: list[str], disable_tqdm: bool) -> list[float]:
        """Summed log-probability of each text, in nats: the windows of all texts are one list of requests."""
        windows = [windows_of(self.tok_encode(text), self.prefix_token_id, self.max_length) for text in texts]
        answers = iter(self._loglikelihood_tokens([each for of_text in windows for each in of_text], disable_tqdm))
        totals = []
        for text, of_text in zip(texts, windows, strict=True):
            totals.append(sum(next(answers)[0] for _ in of_text))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _rolling_score(self, text: str, score: float) -> RollingScore:
        """A whole text's score with its number of tokens, each of which was predicted once."""
        return RollingScore(score, len(self.tok_encode(text)))

    def _score_twice(self, requests: list[Instance], disable_tqdm: bool) -> list[Score]:
        with self.sizes.scoring_twice():
            self._unsteered = None
            steered = cast(list[Score], super().loglikelihood(requests, disable_tqdm=disable_tqdm))
            unsteered: Sequence[LogLikelihood] | None = self._unsteered
            self._unsteered = None
            if unsteered is None and self.steering is None:
                unsteered = steered
            elif unsteered is None and self.steering is not None:
                self.sizes.replay()
                with self.steering.suspended():
                    unsteered = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return [
            Score(score, score.tokens, unsteered=float(without[0]), targets=self.targets)
            for score, without in zip(steered, unsteered or (), strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate, and identify the language of each output."""
        refuse_stale(requests, self.targets)
        self.identifier.refuse_unknown(self.targets)
        hook: CacheHook = self.cache_hook
        identifying = Identifying(self.identify, hook)
        with random_numbers_of_rank(self.rank, self.world_size), self._proven(), identifying:
            self.cache_hook = identifying
            try:
                texts = super().generate_until(requests, disable_tqdm=disable_tqdm)
            finally:
                self.cache_hook = hook
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

    def identify(self, text: str, unfinished: bool | None = None) -> IdentifiedText:
        """A text with its language, and the languages that were steered to; a thought that did not end has none."""
        return IdentifiedText.of(text, self.identifier, self.targets, unfinished)

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
        super().set_cache_hook(CompletingCacheHook(cache_hook.dbdict, self._completed))

    def _keep_partial(self, request: Request, answer: LogLikelihood) -> None:
        if request[0] is not None:
            self.cache_hook.add_partial("loglikelihood", request[0], answer)

    def _completed(self, kind: str, request: Iterable[Any], answer: Any) -> Any:
        """A partial answer as it is returned at the end; None where it cannot stand alone yet, or must not."""
        if kind == "loglikelihood" and self.sizes.twice:
            return None
        if self.steering is not None and self.steering.overflowed():
            return None
        if kind == "loglikelihood":
            context, continuation = request
            return Score(answer, tokens=self._continuation_lengths[context, continuation], targets=self.targets)
        if kind == "loglikelihood_rolling":
            (text,) = request
            return self._rolling_score(text, answer)
        return answer

    # --- evidence -----------------------------------------------------------------------------------------------

    @cached_property
    def _sketch(self) -> tuple[float, ...]:
        return weights_sketch(self.model)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self, self.identifier.signature(), self.scorer.setting, self.generator.setting)

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

    def _what_is_scored(self) -> Steered:
        return Steered(self.intervention, self.neuron_set, self.fingerprint, self.identifier.signature(), self.targets)

    @property
    def signature(self) -> str:
        """Readable form of the fingerprint, meant to be pasted in a paper."""
        return self._what_is_scored().signature

    def scoring_report(self) -> dict[str, Any]:
        """How log-likelihoods are computed, as plain data (`Scorer.report`)."""
        return self.scorer.report(self._scoring_context())

    def steering_report(self) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """
        rank = f"{self.rank} of {self.world_size}"
        report = self._what_is_scored().report(self.scoring_report(), self.generator.report(), self.steering, rank)
        if self.world_size > 1 and self.draws_per_rank:
            report["few_shot"] = f"per rank, of {self.world_size} processes"
        if notes := self.template_notes.notes():
            report["notes"] = notes
        return report

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's record of the model, with ours under `steering`."""
        describe_machine_once()  # which lm-eval is about to do, with git's complaint outside a repository
        return super().get_model_info() | {"steering": self.steering_report()}
