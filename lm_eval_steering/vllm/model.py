"""`--model steered-vllm`: lm-eval's vLLM model with language neurons steered inside, and evidence with scores.

The promises are those of `steered-hf`: arguments are checked before the engine starts, answers are lm-eval's own types
with a memory, and an intervention that did not take place is an error.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook

from lm_eval_steering.architectures import model_type_of, shape_of
from lm_eval_steering.errors import InterventionError, SteeringError
from lm_eval_steering.lmeval.arguments import (
    SteeringArguments,
    plan_before_loading,
    read_config,
    refuse_other_name,
)
from lm_eval_steering.lmeval.cache import CompletingCacheHook, salt
from lm_eval_steering.lmeval.generation import Identifying
from lm_eval_steering.lmeval.identity import Steered
from lm_eval_steering.lmeval.long_texts import in_windows, joined, of_whole_text, whole_text
from lm_eval_steering.lmeval.requests import needs_unsteered_score, refuse_stale, windows_of
from lm_eval_steering.metrics.likelihood import RollingScore, Score
from lm_eval_steering.metrics.output_language import IdentifiedText
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.steering.compiled import CompiledIntervention, compile_intervention
from lm_eval_steering.steering.intervention import Intervention, from_arguments
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.arguments import for_vllm, refuse_what_hooks_do, split, with_worker
from lm_eval_steering.vllm.engine import SteeredEngine
from lm_eval_steering.vllm.layers import refuse_unknown
from lm_eval_steering.vllm.report import identity_of, report_of
from lm_eval_steering.vllm.weights import checkpoint_weights, refuse_other_weights

RELEASE = compat.release()  # before lm-eval's module, which fails without vLLM in a less clear way

from lm_eval.models.vllm_causallms import VLLM  # noqa: E402

WORKER = "lm_eval_steering.vllm.worker.SteeredWorker"


class SteeredVLLM(VLLM):
    """`VLLM` whose workers apply a stored language-neuron intervention.

    Takes every argument that `vllm` takes, and those of `SteeringArguments`. Answers are lm-eval's own types with a
    memory: log-likelihoods are `Score`, generated texts are `IdentifiedText`.
    """

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        """Check every argument, start the engine as `vllm` does with our worker, and write the intervention.

        Raises:
            SteeringError: before the engine starts, for anything that would make the score wrong.
        """
        compat.warn_if_untested(RELEASE)
        own, rest = split(arguments, VLLM, compat.engine_arguments())
        config = read_config(pretrained, arguments)
        neuron_set, plan = plan_before_loading(own, config)
        refuse_unknown(model_type_of(config))
        refuse_what_hooks_do(plan)
        self.identifier = own.identifier()
        self.adapter = rest.get("lora_local_path")
        self.weights = checkpoint_weights(pretrained, rest)
        self._shape, self._model_type, self._pretrained = shape_of(config), model_type_of(config), pretrained
        if neuron_set is not None and not own.force:
            refuse_other_name(neuron_set, pretrained)
            refuse_other_weights(neuron_set, self.weights, pretrained, self.adapter)
        super().__init__(pretrained, **with_worker(rest, WORKER))
        self.steering = SteeredEngine(self.model, self._shape)
        self._scoring_twice = False  # while rows are scored with and without the intervention
        self._continuation_lengths: dict[tuple[str, str], int] = {}  # of the requests in hand, in tokens
        self._drawn: Counter[tuple[int, ...]] = Counter()
        self.scored = self.generated = 0
        self._write(neuron_set, plan, own.targets())

    # --- changing the intervention on a running engine ----------------------------------------------------------

    def intervene(
        self,
        neuron_set: NeuronSet | None = None,
        *,
        target_language: str | None = None,
        allow_empty: bool = False,
        force: bool = False,
        **arguments: Any,
    ) -> None:
        """Replace the intervention; without arguments the model is unsteered. Nothing is compiled or captured anew.

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
            refuse_what_hooks_do(plan)
            neuron_set.check_model(self._shape.layers, self._shape.units, self._model_type, force)
            if not force:
                refuse_other_weights(neuron_set, self.weights, self._pretrained, self.adapter)
        elif intervention.steps:
            raise SteeringError("an intervention needs a neuron set")
        self._write(neuron_set, plan, named or (plan.intervention.steered if plan else ()))

    def _write(self, neuron_set: NeuronSet | None, plan: CompiledIntervention | None, targets: tuple[str, ...]) -> None:
        self.steering.write(plan)
        self.neuron_set, self.targets = neuron_set, targets
        self.fingerprint = self._fingerprint()

    # --- the engine at work -------------------------------------------------------------------------------------

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        """Outputs of some requests, of which it is proven that they were steered."""
        for tokens, sampling in zip(requests, sampling_params or (), strict=False):
            # Else a text depends on what was sampled before it in the same engine.
            if sampling.temperature and sampling.seed is None:
                sampling.seed = self._seed(tuple(tokens))
        outputs = super()._model_generate(requests, generate, sampling_params)
        self.steering.prove(outputs)
        return outputs

    def _seed(self, tokens: tuple[int, ...]) -> int:
        """Of a prompt's random numbers: another one each time that it is drawn from, the same ones in each run."""
        number = self._drawn[tokens]
        self._drawn[tokens] += 1
        text = f"{self.model_args['seed']} {number} {tokens}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    @staticmethod
    def modify_gen_kwargs(
        gen_kwargs: dict[str, Any], eos: str | list[str] | None = None, default_max_gen_toks: int = 256
    ) -> tuple[dict[str, Any], list[str], int]:
        """As lm-eval's, with the names of transformers translated."""
        ours = for_vllm(gen_kwargs, compat.sampling_arguments())
        return VLLM.modify_gen_kwargs(ours, eos=eos, default_max_gen_toks=default_max_gen_toks)

    # --- answers ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(  # type: ignore[override, unused-ignore]  # as `VLLM`, which narrows `TemplateLM`
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[Any]:
        # vLLM reads the last token too and makes one more.
        windows = [in_windows(request, self.max_length - 2) for request in requests]
        if any(len(parts) > 1 for parts in windows):
            single = [window for parts in windows for window in parts]
            return joined(self._loglikelihood_tokens(single, disable_tqdm), windows)
        self._continuation_lengths = {request[0]: len(request[2]) for request in requests if request[0]}
        answers = super()._loglikelihood_tokens(list(requests), disable_tqdm)
        self.scored += len(requests)
        return [
            Score(answer, tokens=len(request[2]), targets=self.targets)
            for answer, request in zip(answers, requests, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """A `Score` of each request; where its document asks for it, with the one of the same row without steering."""
        refuse_stale(requests, self.targets)
        requests = [whole_text(request) for request in requests]
        twice = [index for index, request in enumerate(requests) if needs_unsteered_score(request)]
        once = sorted(set(range(len(requests))) - set(twice))
        scores: dict[int, Any] = {}
        if once:
            steered = super().loglikelihood([requests[i] for i in once], disable_tqdm=disable_tqdm)
            scores |= dict(zip(once, steered, strict=True))
        if twice:
            both = self._score_twice([requests[i] for i in twice], disable_tqdm)
            scores |= dict(zip(twice, both, strict=True))
        return self._finite([of_whole_text(request, scores[index]) for index, request in enumerate(requests)])

    def _score_twice(self, requests: list[Instance], disable_tqdm: bool) -> list[Score]:
        self._scoring_twice = True
        try:
            steered: list[Any] = list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))
            unsteered = steered
            if self.steering.plan is not None:
                with self.steering.suspended():
                    unsteered = list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))
        finally:
            self._scoring_twice = False
        return [
            Score(score, score.tokens, unsteered=float(without[0]), targets=self.targets)
            for score, without in zip(steered, unsteered, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts after one prefix token, the windows of all texts as one list of requests."""
        texts = [request.args[0] for request in requests]
        # vLLM reads the last token too and makes one more.
        windows = [windows_of(self.tok_encode(text), self.prefix_token_id, self.max_length - 2) for text in texts]
        answers = iter(self._loglikelihood_tokens([each for of_text in windows for each in of_text], disable_tqdm))
        totals = []
        for text, of_text in zip(texts, windows, strict=True):
            totals.append(sum(next(answers)[0] for _ in of_text))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return [self._rolling_score(text, total) for text, total in zip(texts, self._finite(totals), strict=True)]

    def _rolling_score(self, text: str, score: float) -> RollingScore:
        """A whole text's score with its number of tokens, each of which was predicted once."""
        return RollingScore(score, len(self.tok_encode(text)))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate, and identify the language of each output."""
        refuse_stale(requests, self.targets)
        self.identifier.refuse_unknown(self.targets)
        self._drawn.clear()
        hook: CacheHook = self.cache_hook
        with Identifying(self.identify, hook) as identifying:
            self.cache_hook = identifying
            try:
                texts = super().generate_until(requests, disable_tqdm=disable_tqdm)
            finally:
                self.cache_hook = hook
            self.generated += len(texts)
            return [identifying.text(text) for text in self._finite(texts)]

    def identify(self, text: str) -> IdentifiedText:
        """A text with its language, and the languages that were steered to."""
        return IdentifiedText.of(text, self.identifier, self.targets)

    def _finite(self, answers: Sequence[Any]) -> list[Any]:
        """The answers, unless activations overflowed while they were made."""
        numbers = (answer[0] if isinstance(answer, tuple) else answer for answer in answers)
        if self.steering.overflowed() or any(isinstance(one, float) and math.isnan(one) for one in numbers):
            raise InterventionError(
                f"activations overflowed {self.dtype} under {self.intervention.signature()}; use a smaller factor or "
                "value, or dtype=bfloat16 or float32"
            )
        return list(answers)

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
        if (kind == "loglikelihood" and self._scoring_twice) or self.steering.overflowed():
            return None
        if kind == "loglikelihood":
            context, continuation = request
            return Score(answer, tokens=self._continuation_lengths[context, continuation], targets=self.targets)
        if kind == "loglikelihood_rolling":
            (text,) = request
            return self._rolling_score(text, answer)
        return answer

    # --- evidence -----------------------------------------------------------------------------------------------

    @property
    def intervention(self) -> Intervention:
        """What is done to the model at the moment; no steps where it is unsteered."""
        return self.steering.plan.intervention if self.steering.plan else Intervention()

    @property
    def dtype(self) -> str:
        """Of the activations, as torch calls it."""
        return str(compat.model_config(self.model).dtype)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self)

    def _fingerprint(self) -> str:
        """SHA-256 over everything that decides a score of this model under the intervention in force."""
        return fingerprint(
            {
                **self._identity,
                "neurons": self.neuron_set.content_hash() if self.neuron_set else None,
                "intervention": self.intervention.model_dump(mode="json"),
                "targets": list(self.targets),
            }
        )

    @property
    def _steered(self) -> Steered:
        return Steered(self.intervention, self.neuron_set, self.fingerprint, self.identifier.signature(), self.targets)

    @property
    def signature(self) -> str:
        """Readable form of the fingerprint, meant to be pasted in a paper."""
        return self._steered.signature

    def steering_report(self) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """
        return report_of(self, self._steered)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's record of the model, with ours under `steering`."""
        return {"model_dtype": self.dtype, "steering": self.steering_report()}
