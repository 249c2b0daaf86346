"""Private names of lm-eval, transformers and sacreBLEU stand in `compat.py` alone, and mean there what we expect."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.model import CacheHook, CachingLM, TemplateLM
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sacrebleu.metrics import BLEU, CHRF
from transformers import CompileConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import lm_eval_steering
from lm_eval_steering.architectures import compat as of_architectures
from lm_eval_steering.architectures.loading import commit_of
from lm_eval_steering.lmeval import compat
from lm_eval_steering.metrics import compat as of_metrics
from lm_eval_steering.resources import tasks_folder
from tests.conftest import tiny_model, tiny_tokenizer

PACKAGE = Path(lm_eval_steering.__file__).parent
LIBRARIES = {"lm_eval", "transformers", "sacrebleu"}
# Beside the start-up file, which imports nothing.
ALLOWED = {Path("lmeval/compat.py"), Path("architectures/compat.py"), Path("metrics/compat.py")}
SUBCLASSES = {
    Path("lmeval/steered_lm.py"), Path("lmeval/model.py"), Path("sweep/sweep_model.py"), Path("sweep/sweep_engine.py"),
    Path("vllm/model.py"),
}  # fmt: skip
INHERITED = ("self", "super()", "super(SteeredLM, self)")
PRIVATE = compat.PRIVATE.keys() | of_architectures.PRIVATE.keys() | of_metrics.PRIVATE.keys()
FILES = [
    path.relative_to(PACKAGE)
    for path in sorted(PACKAGE.rglob("*.py"))
    if "startup" not in path.parts and path.relative_to(PACKAGE) not in ALLOWED
]
TASK = "steering_demo_continuation_fra_Latn"


def violations(source: str, path: Path) -> list[str]:  # noqa: PLR0912  # one branch a rule
    """What a module does that only `compat.py` may do."""
    tree, found = ast.parse(source), []
    imported: set[str] = set()  # names that are bound to the packages or parts of them
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in LIBRARIES:
            imported |= {alias.asname or alias.name for alias in node.names}
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            found += [f"imports {name}" for name in names if name.startswith("_") and not name.startswith("__")]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    imported.add(alias.asname or alias.name.split(".")[0])
                    found += [f"imports {name}" for name in alias.name.split(".") if name.startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            inherited = isinstance(node.value, ast.Call | ast.Name) and ast.unparse(node.value) in INHERITED
            if node.attr in PRIVATE and not (node.attr not in compat.PRIVATE and inherited):
                found.append(f"uses {node.attr}")
            if node.attr in compat.OVERRIDDEN and not (inherited and path in SUBCLASSES):
                found.append(f"calls {node.attr}")
            if node.attr == "__class__" and isinstance(node.ctx, ast.Store):
                found.append("assigns a class")
            if isinstance(node.ctx, ast.Store) and ast.unparse(node.value).split(".")[0] in imported:
                found.append(f"assigns {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in PRIVATE:
            found.append(f"names {node.value!r}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            if ast.unparse(node.args[0]).split(".")[0] in imported:
                found.append(f"sets an attribute of {ast.unparse(node.args[0])}")
        elif isinstance(node, ast.FunctionDef) and node.name in compat.OVERRIDDEN and path not in SUBCLASSES:
            found.append(f"overrides {node.name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_private_name_stands_elsewhere(path: Path) -> None:
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "source",
    [
        "task._instances = None", "getattr(config, '_attn_implementation')", "from lm_eval.tasks import _index",
        "from lm_eval.tasks._yaml_loader import load_yaml", "from sacrebleu.metrics.bleu import _TOKENIZERS",
        "import transformers._x", "database.__class__ = Salted",
        "from lm_eval.api.task import ConfigurableTask\nConfigurableTask.process_results = x",
        "from lm_eval import evaluator\nsetattr(evaluator, name, x)", "lm._model_call(x)", "config._name_or_path",
        "import lm_eval.tasks as tasks\ntasks.TaskManager.__init__ = x",
    ],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert violations(source, Path("x.py"))


# --- contracts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), compat.OVERRIDDEN.items())
def test_what_we_override_is_called_as_we_expect(name: str, parameters: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(getattr(HFLM, name)).parameters)
    assert found == parameters, f"lm-eval changed HFLM.{name} to take {found}: change SteeredHFLM and compat.OVERRIDDEN"


def test_every_listed_name_is_in_the_installed_releases() -> None:
    task = inspect.getsource(inspect.getmodule(ConfigurableTask))  # type: ignore[arg-type]
    for name in ("_instances", "_metric_fn_list", "_metric_fn_kwargs"):
        assert f"self.{name}" in task, f"lm-eval's tasks have no {name} any more: change compat.py"
    for name in of_metrics.PRIVATE:
        for metric in (BLEU, CHRF):
            assert callable(getattr(metric, name, None)), f"sacreBLEU's {metric.__name__} has no {name} any more"
    config = PretrainedConfig()
    for name in ("_attn_implementation", "_name_or_path"):
        assert hasattr(config, name), f"transformers' configs have no {name} any more: change compat.py"
    assert hasattr(PreTrainedModel, "_can_compile_fullgraph"), "transformers' models do not say what can be compiled"
    assert hasattr(CompileConfig(), "_compile_all_devices"), "transformers compiles on CPU by another setting"
    assert "_decode" in vars(PreTrainedTokenizerFast) or hasattr(PreTrainedTokenizerFast, "_decode")
    assert hasattr(GenerationConfig(), "cache_implementation")


def test_tasks_are_scored_and_released() -> None:
    manager = TaskManager(include_path=str(tasks_folder() / "demo"), include_defaults=False)
    (task,) = manager.load([TASK])["tasks"].values()
    metrics = compat.metrics_of(task)
    assert metrics and all(callable(metric) and isinstance(options, dict) for metric, options in metrics.values())
    rest = compat.without_metrics(task, metrics)
    assert compat.metrics_of(rest) == {} and compat.metrics_of(task) == metrics
    task.build_all_requests(limit=2)
    assert task.instances
    compat.release_requests(task)
    assert not task.instances, "lm-eval keeps a task's requests elsewhere"


def test_the_manager_gets_our_folder_before_the_users(tmp_path: Path) -> None:
    class Manager:
        def __init__(self, verbosity: Any = None, include_path: Any = None, include_defaults: bool = True) -> None:
            self.include_path = include_path

    expected = list(inspect.signature(TaskManager.__init__).parameters)
    assert expected[:4] == ["self", "verbosity", "include_path", "include_defaults"], "lm-eval changed TaskManager"
    for _ in range(2):
        compat.add_task_folder(Manager, tmp_path)
    assert Manager().include_path == [tmp_path]
    assert Manager(None, "mine").include_path == [tmp_path, "mine"]
    assert Manager(include_path=["a", "b"]).include_path == [tmp_path, "a", "b"]
    assert Manager(include_path="mine", include_defaults=False).include_path == "mine"


def test_lm_eval_gathers_samples_and_then_values() -> None:
    class Two(get_model("dummy")):  # type: ignore[misc]
        """The first of two processes, of which the other one does the same."""

        world_size = 2
        gathered: list[Any]

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.stack([tensor, tensor])

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
            self.gathered.append(obj)
            return [obj, obj]

    lm = Two()
    lm.gathered = []
    lm._device = torch.device("cpu")
    manager = TaskManager(include_path=str(tasks_folder() / "demo"), include_defaults=False)
    evaluator.simple_evaluate(lm, tasks=[TASK], task_manager=manager, limit=2, bootstrap_iters=0)
    kinds = tuple("samples" if isinstance(obj[TASK], list) else "values" for obj in lm.gathered)
    assert kinds == compat.GATHERED, "lm-eval exchanges samples and values in another order: change compat.GATHERED"


def test_lm_eval_feeds_and_encodes_as_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model, so that the copies are compared with what lm-eval does."""
    lm = HFLM(tiny_model("llama"), tokenizer=tiny_tokenizer(), batch_size=1, max_length=8)
    fed: list[list[int]] = []
    encoded: list[str] = []
    call, encode = HFLM._model_call, HFLM.tok_encode
    monkeypatch.setattr(HFLM, "_model_call", lambda self, inps: (fed.append(inps[0].tolist()), call(self, inps))[1])
    monkeypatch.setattr(
        HFLM, "tok_encode", lambda self, text, **more: (encoded.append(text), encode(self, text, **more))[1]
    )
    pairs = [("w1 w2 ", "w3"), ("w1", " w2 w4"), ("w5 " * 12, "w6 w7"), ("w1 w2", " w9")]
    requests = [((context, text), *lm._encode_pair(context, text)) for context, text in pairs]
    assert set(encoded) == set(compat.strings_to_encode(pairs)), "lm-eval encodes other strings"
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = [compat.fed_to_model(request[1], request[2], 8) for request in compat.in_scoring_order(requests, True)]
    assert fed == expected, "lm-eval feeds its model other tokens, or in another order"
    assert issubclass(HFLM, TemplateLM)


def test_the_request_cache_writes_through_functions_that_can_be_given(tmp_path: Path) -> None:
    lm = HFLM(tiny_model("llama"), tokenizer=tiny_tokenizer())
    database = CachingLM(lm, str(tmp_path / "cache.db")).dbdict
    database.encode_key = lambda key: f"salted {key}"
    database["a"] = 1
    assert "a" in database and database["a"] == 1 and list(database.keys()) == ["salted a"]
    assert CacheHook(None).dbdict is None


def test_arguments_of_from_pretrained_are_those_that_transformers_reads() -> None:
    known = compat.from_pretrained_arguments()
    # Used by lm-eval's `hf` or in transformers' documentation of from_pretrained.
    used = {
        "attn_implementation", "cache_dir", "code_revision", "config", "device_map", "force_download",
        "ignore_mismatched_sizes", "key_mapping", "load_in_4bit", "load_in_8bit", "local_files_only", "max_memory",
        "offload_buffers", "offload_folder", "proxies", "quantization_config", "state_dict", "token", "torch_dtype",
        "tp_size", "use_kernels", "use_safetensors", "variant", "weights_only", "experts_implementation",
        "bnb_4bit_compute_dtype", "generation_config", "adapter_kwargs", "output_loading_info",
    }  # fmt: skip
    assert used <= known, f"transformers does not read {sorted(used - known)} as it did: change compat.py"
    assert not {"factr", "langauge", "neurons"} & known


def test_attention_static_cache_and_decoding_of_real_models() -> None:
    model = tiny_model("llama")
    assert compat.attention_implementation(model.config) == "sdpa" and compat.takes_static_cache(model)
    assert not compat.takes_static_cache(tiny_model("mpt"))
    assert compat.decodes_by_backend(tiny_tokenizer())
    assert compat.compile_config("cpu").mode == "default"


def test_the_machine_is_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import collect_env

    for module, name in ((collect_env, "get_pretty_env_info"), (evaluator, "get_git_commit_hash")):
        assert callable(getattr(module, name, None)), f"{module.__name__} has no {name} any more: change compat.py"
        asked: list[str] = []
        monkeypatch.setattr(module, name, lambda asked=asked: (asked.append("x"), "described")[1])
        compat.describe_machine_once()
        assert [getattr(module, name)() for _ in range(2)] == ["described"] * 2 and len(asked) == 1


def test_the_commit_of_a_model_is_where_the_hub_keeps_it(tmp_path: Path) -> None:
    commit, repository = "c" * 40, tmp_path / "models--maker--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    assert commit_of("maker/model", cache_dir=str(tmp_path)) == commit
    assert commit_of("maker/model", commit, str(tmp_path)) == commit
    assert commit_of("maker/model", "other", str(tmp_path)) == commit_of(str(tmp_path)) == ""
