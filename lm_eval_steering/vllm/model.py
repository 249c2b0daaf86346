"""`--model steered-vllm`: lm-eval's vLLM model with language neurons steered inside, and evidence with scores.

The promises are those of `steered-hf`: arguments are checked before the engine starts, answers are lm-eval's own types
with a memory, and an intervention that did not take place is an error.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance

from lm_eval_steering.architectures import model_type_of, shape_of
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.arguments import (
    plan_before_loading,
    read_config,
    refuse_other_name,
)
from lm_eval_steering.lmeval.generation import Identifying
from lm_eval_steering.lmeval.requests import Request
from lm_eval_steering.lmeval.steered_lm import Answers, SteeredLM
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.compiled import CompiledIntervention
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.arguments import (
    CAPACITY,
    DRIVER,
    HIDDEN_STATES,
    capacity_of,
    edits_hidden_states,
    for_vllm,
    refuse_what_hooks_do,
    split,
    with_worker,
)
from lm_eval_steering.vllm.engine import SteeredEngine
from lm_eval_steering.vllm.layers import refuse_unknown
from lm_eval_steering.vllm.report import identity_of, report_of
from lm_eval_steering.vllm.weights import checkpoint_weights, refuse_other_weights

RELEASE = compat.release()  # before lm-eval's module, whose error without vLLM is less clear

from lm_eval.models.vllm_causallms import VLLM  # noqa: E402

WORKER = "lm_eval_steering.vllm.worker.SteeredWorker"


class SteeredVLLM(SteeredLM, VLLM):
    """`VLLM` whose workers apply a stored language-neuron intervention.

    Takes every argument that `vllm` takes, those of `SteeringArguments`, `steered_units` (`arguments.capacity_of`) and
    `steered_residual` (`arguments.edits_hidden_states`). Answers are lm-eval's own types with a memory:
    log-likelihoods are `Score`, generated texts are `IdentifiedText`.
    """

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        """Check every argument, start the engine as `vllm` does with our worker, and write the intervention.

        Raises:
            SteeringError: before the engine starts, for anything that would make the score wrong; or if it does not
                start.
        """
        compat.warn_if_untested(RELEASE)
        ours, rest = split(arguments, VLLM, compat.engine_arguments())
        config = read_config(pretrained, arguments)
        neuron_set, plan = plan_before_loading(ours, config)
        refuse_unknown(model_type_of(config))
        refuse_what_hooks_do(plan)
        self.identifier = ours.identifier()
        self.adapter = rest.get("lora_local_path")
        self.weights = checkpoint_weights(pretrained, rest)
        self._shape, self._model_type, self._pretrained = shape_of(config), model_type_of(config), pretrained
        if neuron_set is not None and not ours.force:
            refuse_other_name(neuron_set, pretrained)
            refuse_other_weights(neuron_set, self.weights, pretrained, self.adapter)
        capacity = capacity_of(rest.get(CAPACITY), neuron_set, self._shape.units)
        residual = edits_hidden_states(rest.get(HIDDEN_STATES), neuron_set)
        os.environ[DRIVER] = f"{socket.gethostname()} {os.getpid()}"
        arguments = with_worker(rest, WORKER, capacity, residual)
        try:
            super().__init__(pretrained, **arguments)
        except SteeringError:
            raise
        except Exception as error:  # vLLM's own errors differ by what failed and in which process
            raise compat.did_not_start(error) from error
        self.steering = SteeredEngine(self.model, self._shape)
        self._drawn: Counter[tuple[int, ...]] = Counter()
        self.scored = self.generated = 0
        self._attach(neuron_set, plan, ours.targets(), ours.force, ours.prompt)

    # --- changing the intervention on a running engine ----------------------------------------------------------

    @property
    def plan(self) -> CompiledIntervention | None:
        """What is done to the model at the moment; None where it is unsteered."""
        return self.steering.plan

    def _apply(self, neuron_set: NeuronSet | None, plan: CompiledIntervention | None, force: bool) -> None:
        refuse_what_hooks_do(plan)
        if neuron_set is not None:
            neuron_set.check_model(self._shape.layers, self._shape.units, self._model_type, force)
            if not force:
                refuse_other_weights(neuron_set, self.weights, self._pretrained, self.adapter)
        self.steering.write(plan)

    # --- the engine at work -------------------------------------------------------------------------------------

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        """Outputs of some requests, of which it is proven that they were steered."""
        if generate:
            self.prompting.prove(requests)
        if not generate or sampling_params is None:
            sampling_params = compat.scoring_parameters()
        else:
            for tokens, sampling in zip(requests, sampling_params, strict=True):
                # Else a text depends on what was sampled before it in the same engine.
                if sampling.temperature and sampling.seed is None:
                    sampling.seed = self._seed(tuple(tokens))
        outputs = self.model.generate(
            [{"prompt_token_ids": tokens} for tokens in requests],
            sampling_params=sampling_params,
            # Where bars are disabled, vLLM 0.32.0 divides by the time that one has run, which is 0.
            use_tqdm=self.batch_size == "auto" and not os.environ.get("TQDM_DISABLE"),
            lora_request=self.lora_request,
        )
        self.steering.prove(outputs)
        if generate and self.think_end_token is not None and isinstance(self.cache_hook, Identifying):
            self.cache_hook.unfinished(self.think_end_token not in output.outputs[0].text for output in outputs)
        return outputs

    def outputs(self, prompts: list[list[int]], sampling: list[Any]) -> Any:
        """vLLM's outputs of some prompts, of which it is proven that they were steered."""
        return self._model_generate(prompts, generate=True, sampling_params=sampling)

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

    @property
    def _longest_input(self) -> int:
        """vLLM reads the last token too and makes one more."""
        return int(self.max_length) - 2

    def _log_likelihoods(self, requests: list[Request], disable_tqdm: bool, override_bs: int | None) -> Answers:
        self.scored += len(requests)
        return super(SteeredLM, self)._loglikelihood_tokens(requests, disable_tqdm)

    def _with_and_without(self, score: Callable[[], Answers]) -> tuple[Answers, Answers]:
        if self.steering.plan is None:
            unsteered = score()
            return unsteered, unsteered
        batch_size = self.batch_size
        if compat.batches_matter():
            # The engine makes batches of what has arrived by then, other ones in each pass: one request at a time, or
            # differences of rounding would be taken for a shift.
            self.batch_size = 1
        try:
            steered = score()
            with self.steering.suspended():
                return steered, score()
        finally:
            self.batch_size = batch_size

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """An `IdentifiedText` of each request."""
        self._drawn.clear()
        self.generated += len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _overflowed(self) -> bool:
        return self.steering.overflowed()

    # --- evidence -----------------------------------------------------------------------------------------------

    @property
    def activation_dtype(self) -> str:
        """Of the activations, as torch calls it."""
        return str(compat.model_config(self.model).dtype)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self)

    def steering_report(self) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """
        return self._noted(report_of(self, self.steered))

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's record of the model, with ours under `steering`."""
        return {"model_dtype": self.activation_dtype, "steering": self.steering_report()}
