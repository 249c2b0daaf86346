"""`lm-eval-steering`: one thin function a verb. Heavy libraries are imported by the verb that needs them."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lm_eval_steering.errors import DidNotHappenError, SteeringError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Evaluate language models while their language-specific neurons are steered.",
)


class Place(StrEnum):
    """What `where` can name."""

    DEMO_MODEL = "demo-model"
    DEMO_NEURONS = "demo-neurons"
    DEMO_LANGUAGES = "demo-languages"
    DEMO_TASK = "demo-task"
    TASKS = "tasks"
    NEURON_SETS = "neuron-sets"


class Rows(StrEnum):
    """How text is cut into rows."""

    PACKED = "packed"
    SENTENCES = "sentences"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def run(context: typer.Context) -> None:
    """Evaluate: the same as `lm_eval ...`, with our model, metrics and tasks registered without a start-up file."""
    from lm_eval_steering.harness.registration import register_all

    register_all()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()


@app.command()
def find(
    model: Annotated[str, typer.Option(help="Hub id or folder of a causal language model.")],
    corpus: Annotated[str, typer.Option(help="Folder of LANGUAGE.txt files, or a path with {lang} in it.")],
    languages: Annotated[str, typer.Option(help="Codes joined by commas, such as fra_Latn,ind_Latn.")],
    out: Annotated[Path, typer.Option(help="Neuron set to write, a .safetensors file.")],
    rate: Annotated[float, typer.Option(help="Share of all neurons that LAPE selects.")] = 0.01,
    tokens: Annotated[int | None, typer.Option(help="Budget for each language; all of the text by default.")] = None,
    rows: Annotated[Rows, typer.Option(help="Packed windows of the context length, or one row a line.")] = Rows.PACKED,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens a row.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a forward pass.")] = 16,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; a GPU by default where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto takes the checkpoint's.")] = "auto",
) -> None:
    """Find the language neurons of a model: record activations, select by LAPE, calibrate."""
    from lm_eval_steering.errors import CorpusError, NeuronSetError
    from lm_eval_steering.languages import normalise
    from lm_eval_steering.neurons.find import Search, find_neurons, load_model

    codes = tuple(dict.fromkeys(normalise(code) for code in languages.split(",")))
    search = Search(corpus, codes, rate, tokens, rows.value, context, batch_size=batch_size)
    if tokens is not None and tokens <= 0:
        raise CorpusError(f"--tokens {tokens}: expected a budget above 0")
    search.check()
    if out.is_dir() or not os.access(out.parent if out.parent.is_dir() else Path(), os.W_OK):
        raise NeuronSetError(f"--out {out}: expected a file in a folder that can be written")
    loaded, tokenizer = load_model(model, revision, dtype, device)
    neuron_set, _ = find_neurons(loaded, tokenizer, search)
    neuron_set.save(out)
    for code in codes:
        typer.echo(f"{code}  {len(neuron_set.neurons(code))} neurons")
    typer.echo(f"wrote {out}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="torch.save of list[language][layer] of unit indices.")],
    languages: Annotated[str, typer.Option(help="Codes joined by commas, in the order of the file.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the model that the indices belong to.")],
    out: Annotated[Path, typer.Option(help="Neuron set to write, a .safetensors file.")],
    dictionary: Annotated[Path | None, typer.Option(help="Language dictionary of lang-task-neuron, to check.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
) -> None:
    """Turn other people's neuron lists into a neuron set. Only the model's config is read; nothing is executed."""
    from lm_eval_steering.neurons.convert import import_lists
    from lm_eval_steering.neurons.find import model_provenance

    neuron_set = import_lists(file, languages.split(","), model_provenance(model, revision, file.name), dictionary)
    neuron_set.save(out)
    for code in neuron_set.languages:
        typer.echo(f"{code}  {len(neuron_set.neurons(code))} neurons")
    typer.echo(f"wrote {out}; it holds no statistics, so value= takes numbers only")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, table and picture.")] = Path("demo-results"),
    languages: Annotated[str | None, typer.Option(help="Codes joined by commas, or all; four by default.")] = None,
    controls: Annotated[int, typer.Option(min=1, help="Number of matched random sets.")] = 3,
) -> None:
    """Find, steer and compare on the small model that ships: offline, on a CPU, in under three minutes."""
    os.environ["TQDM_DISABLE"] = "1"  # read by tqdm once, when it is imported
    from lm_eval_steering.demo.run import run_demo, steered_languages

    run_demo(out, steered_languages(languages), controls)


@app.command()
def where(name: Annotated[Place, typer.Argument(help="What to look up.")]) -> None:
    """Print a path or names, for people and scripts."""
    from lm_eval_steering import resources

    if name is Place.DEMO_LANGUAGES:
        from lm_eval_steering.harness.tasks import demo_languages

        typer.echo("\n".join(demo_languages()))
        return
    answers = {
        Place.DEMO_MODEL: resources.demo_model,
        Place.DEMO_NEURONS: lambda: resources.find_neuron_set("demo"),
        Place.DEMO_TASK: lambda: "steering_demo_continuation_fra_Latn",
        Place.TASKS: resources.tasks_folder,
        Place.NEURON_SETS: resources.neuron_sets_folder,
    }
    typer.echo(answers[name]())


def main() -> None:
    """Entry point: our own errors are one line and exit code 2."""
    try:
        app()
    except (SteeringError, DidNotHappenError) as error:
        from lm_eval_steering.harness.registration import debugging, one_line

        if debugging():
            raise
        typer.echo(one_line(error), err=True)
        sys.exit(2)
