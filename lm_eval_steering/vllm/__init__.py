"""`--model steered-vllm`: the same intervention inside the workers of an unmodified vLLM engine.

`worker` runs in vLLM's worker processes and puts an `activation.SteeredActivation` in each MLP; `engine` writes plans
into them and reads their counters from the process of lm-eval; `model` is lm-eval's `vllm` with both. Every private
name of vLLM stands in `compat`.
"""
