"""`--model steered-hf`: lm-eval's Hugging Face model with language neurons steered, and evidence with every score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_steering.architectures import ModelSites
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.files import expand_home
from lm_eval_steering.lmeval.arguments import (
    plan_before_loading,
    read_config,
    refuse_other_name,
    split,
    take_quantization,
)
from lm_eval_steering.lmeval.compat import describe_machine_once
from lm_eval_steering.lmeval.generation import (
    GenerationContext,
    Generator,
    Identifying,
    random_numbers_of_rank,
    unfinished_thoughts,
)
from lm_eval_steering.lmeval.identity import identity_of, refuse_nothing
from lm_eval_steering.lmeval.long_texts import whole_text
from lm_eval_steering.lmeval.requests import (
    BatchSizes,
    ExpectedRows,
    Request,
    ScoringRows,
    begun,
    encode_ahead,
    rounds_of,
)
from lm_eval_steering.lmeval.scoring import LogLikelihood, Scorer, ScoringContext
from lm_eval_steering.lmeval.steered_lm import Answers, SteeredLM
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.attach import Steering, fitting_sites
from lm_eval_steering.steering.compiled import CompiledIntervention


class SteeredHFLM(SteeredLM, HFLM):
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
        # `hf` asks for CUDA by default and fails where there is none.
        rest.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **rest)
        self.steering: Steering | None = None
        self.sizes = BatchSizes()
        self.scorer = Scorer(ours.scoring)
        self.generator = Generator(self._generation_context(), ours.generation)
        self._expected_rows: ExpectedRows | None = None  # of lm-eval's own scoring batches, while it makes them
        self._known_tokens: dict[str, list[int]] = {}  # of strings that lm-eval is about to encode
        self._unsteered: Answers | None = None  # answers of the second pass over the requests in hand
        self._sites = ours.sites
        self._sites_found: dict[str, ModelSites] = {}
        self._attach(neuron_set, plan, ours.targets(), ours.force, ours.prompt)

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

    @property
    def plan(self) -> CompiledIntervention | None:
        """What is done to the model at the moment; None where it is unsteered."""
        return self.steering.plan if self.steering else None

    def _apply(self, neuron_set: NeuronSet | None, plan: CompiledIntervention | None, force: bool) -> None:
        if neuron_set is None or plan is None:
            if self.steering is not None:
                self.steering.detach()
            self.steering = None
            return
        override = self._sites or neuron_set.provenance.sites
        sites = fitting_sites(
            self.model, neuron_set, sites=self._sites, force=force, sketch=self._sketch,
            found=self._sites_found.get(override),
        )  # fmt: skip
        if self.steering is not None and self._sites_found.get(override) is sites:
            self.steering.change(plan)
            return
        if self.steering is not None:
            self.steering.detach()
        self.steering, self._sites_found = Steering(sites, plan).attach(), {override: sites}

    # --- tokens -------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """As lm-eval's, of which many are known ahead."""
        known = None if args or kwargs else self._known_tokens.get(string)
        return super().tok_encode(string, *args, **kwargs) if known is None else list(known)

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

    @property
    def _longest_input(self) -> int:
        return int(self.max_length)

    def _log_likelihoods(self, requests: list[Request], disable_tqdm: bool, override_bs: int | None) -> Answers:
        context = self._scoring_context()
        if not self.scorer.shares(context, requests):
            return self._by_lm_eval(requests, disable_tqdm, override_bs)
        scores = self.scorer.score(
            context, requests, twice=self._scoring_twice, progress=not disable_tqdm and self.rank == 0,
            answered=self._keep_partial,
        )  # fmt: skip
        self._unsteered = scores.unsteered
        return scores.steered

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
                found = super(SteeredLM, self)._loglikelihood_tokens(chosen, disable_tqdm, override_bs)
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

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """lm-eval's; an empty prompt, for which a tokenizer may have no token, is the prefix that evaluation shows."""
        return begun(*super().tok_batch_encode(strings, *args, **kwargs), self.prefix_token_id)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """One batch of generation, with its padding handed to the intervention."""
        mask = generation_kwargs.get("attention_mask")
        real = torch.ones_like(context) if mask is None else mask
        self.prompting.prove(row[kept.bool()].tolist() for row, kept in zip(context, real, strict=True))
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
        with self._encoded_ahead([self._as_sent(whole_text(request)) for request in requests]):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    @contextmanager
    def _encoded_ahead(self, requests: list[Instance]) -> Iterator[None]:
        self._known_tokens = encode_ahead(self.tokenizer, requests, self.prefix_token_id, self.add_bos_token)
        try:
            yield
        finally:
            self._known_tokens = {}

    def _totals(self, requests: list[Instance], disable_tqdm: bool) -> list[float]:
        if self.scorer.setting == "plain" and not self.prompting.active:
            return HFLM.loglikelihood_rolling(self, requests, disable_tqdm=disable_tqdm)
        return super()._totals(requests, disable_tqdm)

    def _with_and_without(self, score: Callable[[], Answers]) -> tuple[Answers, Answers]:
        with self.sizes.of_two_passes():
            self._unsteered = None
            steered = score()
            unsteered, self._unsteered = self._unsteered, None
            if unsteered is None and self.steering is None:
                unsteered = steered
            elif unsteered is None and self.steering is not None:
                self.sizes.replay()
                with self.steering.suspended():
                    unsteered = score()
        return steered, unsteered or ()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """An `IdentifiedText` of each request."""
        with random_numbers_of_rank(self.rank, self.world_size):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @contextmanager
    def _proven(self) -> Iterator[None]:
        """Forward passes inside must edit something, unless there are none, as where every answer is cached."""
        before = self.steering.evidence() if self.steering else None
        yield
        if self.steering is not None and before is not None:
            after = self.steering.evidence()
            forwards, positions = after.forwards - before.forwards, after.positions - before.positions
            refuse_nothing(forwards, positions, after, self.intervention.signature())

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """lm-eval's search, whose forward passes on made-up tokens are no part of the evidence.

        The unsteered pass of rows that are scored twice repeats the batches of the steered one.
        """
        search = super()._detect_batch_size
        with self.steering.suspended() if self.steering else nullcontext():
            return self.sizes.detect(lambda: search(*args, **kwargs))

    def _overflowed(self) -> bool:
        return self.steering is not None and self.steering.overflowed()

    def _keep_partial(self, request: Request, answer: LogLikelihood) -> None:
        if request[0] is not None:
            self.cache_hook.add_partial("loglikelihood", request[0], answer)

    # --- evidence -----------------------------------------------------------------------------------------------

    @cached_property
    def _sketch(self) -> tuple[float, ...]:
        return weights_sketch(self.model)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self, self.identifier.signature(), self.scorer.setting, self.generator.setting)

    @property
    def activation_dtype(self) -> str:
        """Of the activations, as torch calls it."""
        return str(self.model.dtype)

    def _decides(self) -> dict[str, Any]:
        return super()._decides() | {
            "sites": self._sites or (self.neuron_set.provenance.sites if self.neuron_set else "")
        }

    def scoring_report(self) -> dict[str, Any]:
        """How log-likelihoods are computed, as plain data (`Scorer.report`)."""
        return self.scorer.report(self._scoring_context())

    def steering_report(self) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """
        rank = f"{self.rank} of {self.world_size}"
        report = self.steered.report(self.scoring_report(), self.generator.report(), self.steering, rank)
        if self.world_size > 1 and self.draws_per_rank:
            report["few_shot"] = f"per rank, of {self.world_size} processes"
        return self._noted(report)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's record of the model, with ours under `steering`."""
        describe_machine_once()  # which lm-eval is about to do, with git's complaint outside a repository
        return super().get_model_info() | {"steering": self.steering_report()}
