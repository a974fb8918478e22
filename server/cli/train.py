"""`smolora train`, `jobs` and `datasets`: rows to train on, and the jobs that train on them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from adapters.names import DEFAULT_PROJECT
from server.cli.common import (
    INTERRUPTED,
    Commands,
    DetachOption,
    Document,
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
    fail,
    finite,
    given,
    number,
    part_of,
    print_json,
    print_warnings,
    refuse_options_before,
    say,
    show,
    suggestion,
    table_of,
)
from server.system.messages import plural

if TYPE_CHECKING:
    from server.cli.labels import LabelledTexts
    from server.client.client import Client

_WORSE = (
    "If the held-out rows can be learnt from the others, try a lower --learning-rate or fewer --epochs; if each "
    "row is an independent fact, hold none out (--validation 0)."
)
_USE_GATE = " --publish-if improves_base publishes no such version."
_USE_LORA = " Or train an adapter with --method lora."  # full fine-tuning publishes nothing
_POLL_SECONDS = 1.0  # between polls of the job, whose events arrive at every step
_TRAINED_STYLE = "bold green"

group = typer.Typer(cls=Commands, invoke_without_command=True, help="List data sets; upload or delete one.")


@group.callback()
def _list(
    context: typer.Context, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None
) -> None:
    refuse_options_before(context)
    if context.invoked_subcommand is not None:
        return
    with connected(url, api_key) as client:
        found = client.datasets()
    if as_json:
        print_json({"datasets": found})
        return
    table = table_of("data set", "file", "rows", "size", "kinds", "created")
    for dataset in found:
        kinds = ", ".join(f"{count} {kind}" for kind, count in part_of(dataset, "kinds").items() if count)
        size = f"{cast('int', dataset['bytes']) / 1e3:,.1f} kB"
        names = Text(str(dataset["id"])), Text(str(dataset["filename"] or ""))
        table.add_row(*names, f"{dataset['rows']:,}", size, kinds, str(dataset["created_at"]))
    show(table)


@group.command()
def upload(
    path: Annotated[Path, typer.Argument(help="A .jsonl or .csv file.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Upload rows, to train on them more than once. The same rows always have the same id."""
    with connected(url, api_key) as client:
        try:
            dataset = client.upload(path)
        except OSError as error:
            fail(f"{path}: {error.strerror}")
    print_warnings(cast("list[str]", dataset["warnings"]))
    print_json(dataset) if as_json else typer.echo(
        f"{dataset['id']}: {plural(cast('int', dataset['rows']), 'row')}"
    )


@group.command()
def delete(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As `smolora datasets` lists them.")],
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Delete data sets. Jobs that have ended don't need them."""
    with connected(url, api_key) as client:
        for dataset_id in cast("Sequence[str]", ids):
            client.delete_dataset(dataset_id)
            typer.echo(f"{dataset_id} is deleted")


def jobs(
    job_id: Annotated[str | None, typer.Argument(help="A job. Without it: list jobs.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Watch the job until it ends.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the job.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the job early, and publish its best weights so far.")
    ] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Pause the job until it is resumed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the job.")] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the rows, checkpoints, model and log of a job that has ended.")
    ] = False,
    status: Annotated[
        str | None, typer.Option(help="Only jobs with this status: queued, running, paused, …")
    ] = None,
    limit: Annotated[int, typer.Option(help="Show at most this many.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List training jobs, newest first; or show, watch, pause, resume, stop or cancel one."""
    asked = (("cancel", cancel), ("stop", stop), ("pause", pause), ("resume", resume))
    moves = [name for name, is_set in asked if is_set]
    if len(moves) + delete > 1 or ((moves or follow or delete) and job_id is None):
        raise typer.BadParameter("give a job, and one thing to do with it")
    with connected(url, api_key) as client:
        if job_id is None:
            found = client.jobs(status, limit)
            print_json({"jobs": found}) if as_json else show(_jobs_table(found))
            return
        if delete:
            client.remove_files(job_id)
            typer.echo(f"{job_id}: its rows, checkpoints, model and log are removed; its record stays", err=True)
        job = client.steer(job_id, moves[0]) if moves else client.job(job_id)
        if follow:
            raise typer.Exit(watch(client, job, as_json))
        print_json(job) if as_json else show(_jobs_table([job]))
        if not as_json and job["error"]:
            Console().print(Text(str(job["error"]), style="red"))


def _jobs_table(jobs: Sequence[Document]) -> Table:
    """Return a table of jobs, with their projects unless all are of the default project."""
    projects = [str(job["project"]) for job in jobs]
    shows_project = any(project != DEFAULT_PROJECT for project in projects)
    project_title = ["project"] if shows_project else []
    titles = "name", "status", "steps", "rank", "rate", "loss", "held out", "base's", "adapter"
    table = table_of("job", *project_title, *titles)
    for project, job in zip(projects, jobs, strict=True):
        progress, metrics, config = (part_of(job, name) for name in ("progress", "metrics", "config"))
        adapter = "" if job["adapter"] is None else "{name}@{version}".format(**part_of(job, "adapter"))
        table.add_row(
            Text(str(job["id"])),
            *([Text(project)] if shows_project else []),
            Text(str(job["name"])),
            Text("pausing" if job["pausing"] else _status(job)),
            f"{progress['step']}/{progress['total_steps']}",
            *_rank_and_rate(config),
            number(metrics["train_loss"]),
            number(metrics["eval_loss"]),
            number(metrics["base_eval_loss"]),
            Text(adapter),
        )
    return table


def _status(job: Document) -> str:
    """Return a job's status; of a queued job with its place in the order of turns."""
    return str(job["status"]) + ("" if job["position"] is None else f" ({job['position']})")


def _rank_and_rate(config: Document) -> tuple[str, str]:
    """Return a job's rank and learning rate as texts; a merge has no rate, and full fine-tuning no rank."""
    if "training" not in config:
        return "", ""
    rank = "" if config["method"] == "full" else str(part_of(config, "lora")["rank"])
    return rank, f"{part_of(config, 'training')['learning_rate']:g}"


def _command_to_try(job: Document) -> str:
    """Return the command that suits most of the job's rows, or `generate` if an older job doesn't record that."""
    kinds = cast("dict[str, int]", cast("Document", job["data"] or {}).get("kinds", {}))
    commands = {"messages": "chat", "decision": "decide"}
    return next((commands[kind] for kind in commands if 2 * kinds.get(kind, 0) > sum(kinds.values())), "generate")


def train(
    data: Annotated[str, typer.Argument(help="A .jsonl or .csv file, or a data set's id.")],
    name: Annotated[str, typer.Option(help="The adapter to train: each job adds a version.")],
    text: Annotated[str | None, typer.Option(help="The CSV column of texts to classify; needs --label.")] = None,
    label: Annotated[str | None, typer.Option(help="The CSV column of their labels; needs --text.")] = None,
    instructions: Annotated[
        str | None, typer.Option(help='What to ask about a text. Default: "Which LABEL-COLUMN?"')
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="A share to hold out, a file, or a data set's id. Default: 0.1 from 20 rows up, else 0."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Rows to measure once, at the end: a share, a file, or a data set's id. Default: 0."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="lora or full. Default: lora.")] = None,
    rank: Annotated[int | None, typer.Option(help="Default: 16.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Default: 32 at every rank; 8 with --rslora.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Default: 0.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="all-linear, or comma-separated names. Default: all-linear.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="gaussian, kaiming, pissa or olora. Default: gaussian.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha/√rank.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Default: about 100 steps, 3 to 20 epochs.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 1e-3; full: 3e-5.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per optimizer step. Default: 8.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a row. Default: 512.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant. Default: cosine.")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Default: 0.05.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Default: 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: 0.")] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between evaluations; clearly better weights are kept.")
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: about 30 s.")
    ] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after this many evaluations without a gain.")] = None,
    packing: Annotated[bool, typer.Option(help="Compute several short rows together.")] = True,
    overlong: Annotated[
        str | None, typer.Option(help="auto, truncate, split, drop or refuse. Default: auto.")
    ] = None,
    start_from: Annotated[str | None, typer.Option(help="An adapter to continue, such as tweets@2.")] = None,
    publish_if: Annotated[
        str | None,
        typer.Option(help="always, improves_base, improves_latest or not_worse. Default: always."),
    ] = None,
    publish_metric: Annotated[
        str | None, typer.Option(help="What decides: loss, exact_match, accuracy or brier. Default: loss.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="An alias for the new version.")] = None,
    description: Annotated[str | None, typer.Option(help="For the adapter's card.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and train nothing.")] = False,
    detach: DetachOption = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Train an adapter on rows of prompt and completion, messages, text, or labelled texts of a CSV file.

    The exit code is 0 if the job succeeds, else 1. Interrupting the command leaves the job running.
    """
    modules: str | list[str] | None = target_modules
    if target_modules not in (None, "all-linear"):
        modules = [name.strip() for name in str(target_modules).split(",")]
    lora = given(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=modules,
        init=init,
        use_rslora=rslora or None,
    )
    training = given(
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        schedule=schedule,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        eval_steps=eval_steps,
        checkpoint_steps=checkpoint_steps,
        early_stopping_patience=patience,
        packing=None if packing else False,
        overlong=overlong,
    )
    labelled = _labelled(data, text, label)
    questions = None if labelled is None or label is None else {label: _question(labelled, label, instructions)}
    with connected(url, api_key) as client, uploads(client, keep=not dry_run) as upload_file:
        upload = upload_file if text is None or label is None else labels_uploaded(upload_file, text, label)
        body = given(
            name=name,
            validation=None if validation is None else _held_out(upload, validation, "--validation"),
            test=None if test is None else _held_out(upload, test, "--test"),
            dataset=dataset_of(upload, data),
            questions=questions,
            method=method,
            lora=lora,
            training=training,
            start_from=start_from,
            publish_if=publish_if,
            publish_metric=publish_metric,
            alias=alias,
            description=description,
        )
        answer = client.train(body, dry_run)
        if dry_run:
            print_json(answer) if as_json else _show_dry_run(answer)
        elif detach:
            print_json(answer) if as_json else typer.echo(answer["id"])
        else:
            raise typer.Exit(watch(client, answer, as_json))


def watch(client: "Client", job: Document, as_json: bool) -> int:
    """Wait until a job ends, and show a progress bar unless `as_json`. Return the exit code."""
    try:
        if as_json:
            for _ in client.events(str(job["id"])):
                pass
        else:
            _show_progress(client, job)
    except KeyboardInterrupt:
        follow = suggestion("jobs", str(job["id"]), "--follow", client=client)
        say(f"the job goes on; to watch it again: {follow}")
        return INTERRUPTED
    job = client.job(str(job["id"]))
    print_json(job) if as_json else _show_end(client, job)
    return 0 if job["status"] == "succeeded" else 1


@contextmanager
def uploads(client: "Client", keep: bool) -> Iterator[Callable[[Path], str]]:
    """Yield a function that uploads a file and returns its id. Unless `keep`, delete new data sets at the end."""
    from server.client.connection import ClientError

    before = set[object]() if keep else {dataset["id"] for dataset in client.datasets()}
    uploaded = set[str]()

    def upload(path: Path) -> str:
        try:
            dataset = client.upload(path)
        except ClientError as error:
            if "the first line must name the columns" not in str(error):
                raise
            advice = (
                "to train on labels instead, give --text and --label: the columns of the texts and of their labels"
            )
            raise ClientError(f"{error}\n{advice}", error.status, error.hint) from None
        print_warnings(cast("list[str]", dataset["warnings"]))
        uploaded.add(str(dataset["id"]))
        return str(dataset["id"])

    try:
        yield upload
    finally:
        for dataset_id in () if keep else uploaded - before:
            client.delete_dataset(dataset_id)


def _labelled(data: str, text: str | None, label: str | None) -> "LabelledTexts | None":
    """Read the CSV file `data` if its columns are given, and print notes about it."""
    from server.cli.labels import TableError, read_labelled

    if text is None and label is None:
        return None
    if text is None or label is None:
        raise typer.BadParameter("--text and --label go together", param_hint="--label" if text else "--text")
    try:
        found = read_labelled(Path(data), text, label)
    except TableError as error:
        raise typer.BadParameter(f"{data}: {error}", param_hint="DATA") from None
    except OSError as error:
        raise typer.BadParameter(f"{data}: {error.strerror}", param_hint="DATA") from None
    print_warnings(found.notes)
    return found


def _question(labelled: "LabelledTexts", label: str, instructions: str | None) -> Document:
    from server.cli.labels import TableError

    try:
        return labelled.question(f"Which {label}?" if instructions is None else instructions)
    except TableError as error:
        raise typer.BadParameter(str(error), param_hint="DATA") from None


def labels_uploaded(upload: Callable[[Path], str], text: str, label: str) -> Callable[[Path], str]:
    """Return a function like `upload` that uploads the labelled texts of a CSV file as rows of decisions."""
    from server.cli.labels import TableError, read_labelled

    def upload_labelled(path: Path) -> str:
        try:
            labelled = read_labelled(path, text, label)
        except TableError as error:
            raise typer.BadParameter(f"{path}: {error}") from None
        with TemporaryDirectory() as folder:
            rows = Path(folder) / f"{path.stem}.jsonl"
            labelled.write(rows)
            return upload(rows)

    return upload_labelled


def dataset_of(upload: Callable[[Path], str], data: str, parameter: str = "DATA") -> str:
    """Return `data` if it is a data set's id.

    Otherwise upload the file `data`, and return the new data set's id. An error names the command's `parameter`.
    """
    path = Path(data)
    if data.startswith("ds-") and not path.exists():
        return data
    try:
        return upload(path)
    except OSError as error:
        raise typer.BadParameter(f"{data}: {error.strerror}", param_hint=parameter) from None


def _held_out(upload: Callable[[Path], str], value: str, parameter: str) -> float | str:
    try:
        return finite(float(value), parameter)
    except ValueError:
        return dataset_of(upload, value, parameter)


def _show_progress(client: "Client", job: Document) -> None:
    """Show a progress bar with the losses, and the job's messages above it."""
    console = Console(highlight=False)
    console.print(Text(f"{job['id']}: {job['name']}"))
    if job["data"] is not None:
        console.print(Text(_counts(cast("Document", job["data"]))))
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[news]}", markup=False))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, news=_status(job))
        _update(progress, task, job)
        polled_at = time.monotonic()
        for event in client.events(str(job["id"])):
            is_metrics = event["type"] == "metrics"
            if not is_metrics:
                style = {"error": "red", "warning": "yellow"}.get(str(event["level"]), "")
                progress.console.print(Text(str(event["message"]), style=style))
            if not is_metrics or time.monotonic() - polled_at > _POLL_SECONDS:
                _update(progress, task, client.job(str(job["id"])))
                polled_at = time.monotonic()
            if is_metrics:
                _update_losses(progress, task, cast("Document", event["data"]))


def _counts(data: Document) -> str:
    """Describe in a line how many rows are trained on and held out."""
    rows, held_out = cast("int", data["rows"]), cast("int", data["validation_rows"])
    long = {
        "truncated": cast("int", data["truncated"]) + cast("int", data["validation_truncated"]),
        "split": cast("int", data["split"]),
        "dropped": cast("int", data["dropped"]),
    }
    counts = f"{plural(rows, 'row')} to train on, " + (
        f"{held_out:,} held out" if held_out else "none held out: nothing will say how good the adapter is"
    )
    if tests := cast("int", data.get("test_rows", 0)):
        counts += f", {plural(tests, 'test row')}"
    return "; ".join([counts, *(f"{plural(count, 'row')} {what}" for what, count in long.items() if count)])


def _update(progress: Progress, task: TaskID, job: Document) -> None:
    at = cast("Document", job["progress"])
    parts = [f"{at['tokens_per_second']:,.0f} tokens/s"] if at["tokens_per_second"] else [_status(job)]
    if at["eta_seconds"]:
        parts.append(f"{at['eta_seconds']:,.0f} s left")
    progress.update(task, speed=", ".join(parts), total=cast("float", at["total_steps"]))
    _update_losses(progress, task, {"step": at["step"], **cast("Document", job["metrics"])})


def _update_losses(progress: Progress, task: TaskID, found: Document) -> None:
    fields = progress.tasks[task].fields
    for name in ("train_loss", "eval_loss", "base_eval_loss"):
        if found.get(name) is not None:
            fields[name] = found[name]
    shown = {"loss": "train_loss", "held out": "eval_loss", "base": "base_eval_loss"}
    losses = [f"{title} {fields[name]:.3f}" for title, name in shown.items() if name in fields]
    step = max(progress.tasks[task].completed, cast("float", found.get("step", 0)))
    progress.update(task, completed=step, news="  ".join([*losses, str(fields.get("speed", ""))]))


def _show_end(client: "Client", job: Document) -> None:
    console = Console(highlight=False)
    metrics, progress = cast("Document", job["metrics"]), cast("Document", job["progress"])
    report: Document = {}
    if job["status"] == "succeeded":
        report = client.report(str(job["id"]))
    if report.get("kind") == "evaluate":
        from server.cli.evaluate import show_findings

        show_findings(report)
        return
    if report and job["kind"] == "train" and (kept := _kept(progress, report)):
        console.print(kept)
    if metrics["eval_loss"] is not None:
        base = number(metrics["base_eval_loss"])
        console.print(f"held-out loss {number(metrics['eval_loss'])}, the untouched base's {base}")
    if remembered := _remembered(report):
        console.print(remembered)
    for question, decisions in cast("dict[str, Document]", report.get("decisions") or {}).items():
        console.print(Text(f"{question}: {decisions['summary']}"))
    for name, comparison in cast("dict[str, Document | None]", report.get("comparisons") or {}).items():
        if comparison is not None:
            console.print(Text(str(comparison["summary"]), style=_STYLES.get(str(comparison["verdict"]), "")))
            if name == "base" and comparison["verdict"] == "worse":
                config = cast("Document", job["config"])
                has_gate = config.get("publish_if") != "always"
                advice = _USE_LORA if config.get("method") == "full" else "" if has_gate else _USE_GATE
                console.print(Text(_WORSE + advice, style="bold red"))
    if report.get("test"):
        comparison = cast("Document | None", cast("Document", report["test"])["comparison"])
        if comparison is not None:
            console.print(Text(f"on the test rows: {comparison['summary']}"))
    if job["error"]:
        console.print(Text(str(job["error"]), style="red"))
    elif job["adapter"] is not None:
        adapter = cast("Document", job["adapter"])
        reference = "{name}@{version}".format(**adapter)
        if adapter.get("moves_latest") is False:
            console.print(Text(f"{reference} is published, but latest stays where it was", style="bold red"))
        typer.echo(f"Try: {suggestion(_command_to_try(job), '…', '--adapter', reference, client=client)}")
    elif job["status"] == "succeeded":
        gate = cast("Document", report["gate"])
        console.print(Text(f"No version was published: {gate['reason']}"))


_STYLES = {"better": "green", "worse": "bold red"}


def _remembered(report: Document) -> str:
    """Describe how many answers the model reproduces exactly, of rows that it was trained on and of held-out rows.

    Return "" if nothing was measured.
    """
    parts = []
    if report.get("recall"):
        recall = cast("Document", report["recall"])
        parts.append(f"{cast('Document', recall['num_right'])['tuned']} of {recall['num_rows']} remembered")
    evaluation = cast("Document", report.get("evaluation") or {})
    if asked := cast("int", evaluation.get("num_completions") or 0):
        share = cast("float", cast("Document", evaluation["tuned"])["exact_match"])
        parts.append(f"{round(share * asked)} of {asked} held out")
    return ", ".join(parts)


def _kept(progress: Document, report: Document) -> str:
    """Return a sentence if a job stopped early, or if its result isn't the weights of its last step, else ""."""
    step, total = progress["step"], cast("int", progress["total_steps"])
    kept = report.get("kept_step", step)
    stopped = "" if step == total else f"Stopped early after {step} of {plural(total, 'step')}"
    if kept == step:
        return stopped
    none = f"{stopped}: no" if stopped else "No"
    return f"{none} evaluation was better than step {kept}'s, whose weights are kept"


def _show_dry_run(answer: Document) -> None:
    console = Console(highlight=False)
    data, estimate = cast("Document", answer["data"]), cast("Document", answer["estimate"])
    console.print(_counts(data))
    tokens, trained, steps = (
        cast("int", count) for count in (data["tokens"], data["trained_tokens"], answer["steps"])
    )
    console.print(f"{plural(tokens, 'token')}, of which {trained:,} are trained on")
    seconds, rate = cast("float", estimate["seconds"]), cast("float", estimate["tokens_per_second"])
    training = part_of(part_of(answer, "config"), "training")
    epochs = "" if training["max_steps"] else f" in {plural(cast('int', training['epochs']), 'epoch')}"
    console.print(f"{plural(steps, 'step')}{epochs}: about {seconds:,.0f} s at {rate:,.0f} tokens/s")
    print_warnings(cast("list[str]", answer["warnings"]))
    for row in cast("list[Document]", answer["preview"]):
        text = Text(f"row {row['row']}: ", style="dim")
        for token in cast("list[Document]", row["tokens"]):
            text.append(str(token["text"]), style=_TRAINED_STYLE if token["trained"] else "")
        console.print(text if not row["more"] else text.append(f" … {row['more']} more", style="dim"))
