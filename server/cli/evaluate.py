"""`smolora evaluate`: adapters measured on the same rows, in a table with intervals."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.text import Text

from server.cli.common import (
    INTERRUPTED,
    DetachOption,
    Document,
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
    each_alone,
    fail,
    given,
    print_json,
    say,
    show,
    suggestion,
    table_of,
)
from server.cli.train import dataset_of, labels_uploaded, uploads

if TYPE_CHECKING:
    from server.client.client import Client


def evaluate(
    data: Annotated[list[str], typer.Argument(help=".jsonl or .csv files, or data sets' ids.")],
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter", "-a", help="Such as base or tweets@3. Repeat it to compare others with the first."
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="loss, token_accuracy, exact_match, json_valid, accuracy or brier. May be given more than "
            "once. Default: those that fit the rows."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most rows of each data set. Default: 200.")] = None,
    text: Annotated[str | None, typer.Option(help="The CSV column of texts to classify; needs --label.")] = None,
    label: Annotated[str | None, typer.Option(help="The CSV column of their labels; needs --text.")] = None,
    detach: DetachOption = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Measure adapters on the same rows, and compare each with the first.

    The exit code is 0 if the job succeeds, else 1. Interrupting the command leaves the job running.
    """
    if (text is None) != (label is None):
        raise typer.BadParameter("--text and --label go together", param_hint="--label" if text else "--text")
    each_alone(adapter)
    with connected(url, api_key) as client, uploads(client, keep=True) as upload_file:
        upload = upload_file if text is None or label is None else labels_uploaded(upload_file, text, label)
        datasets = {dataset_of(upload, one): one for one in data}
        body = given(adapters=adapter, datasets=list(datasets), metrics=metric or None, limit=limit)
        job: Document = client.evaluate(body)
        if not detach:
            job = _ended(client, str(job["id"]), as_json)
        if as_json:
            print_json(job)
        elif detach:
            typer.echo(job["id"])
        elif job["status"] == "succeeded":
            show_findings(job, datasets)
        if not detach and job["status"] != "succeeded":
            fail(f"{job['id']}: {job['error'] or job['status']}")


def _ended(client: "Client", job_id: str, as_json: bool) -> Document:
    """Wait until the evaluation ends, and return it."""
    try:
        for event in client.events(job_id):
            if not as_json:
                say(f"{job_id}: {event['message']}")
    except KeyboardInterrupt:
        say(f"the job goes on; to watch it again: {suggestion('jobs', job_id, '--follow', client=client)}")
        raise typer.Exit(INTERRUPTED) from None
    return client.evaluation(job_id)


def show_findings(found: Document, names: Document = MappingProxyType({})) -> None:
    """Print a table of an evaluation's findings. `names` has other names for data sets, by their ids."""
    differences = {
        (one["dataset"], one["metric"], one["to"]): one for one in cast("Sequence[Document]", found["differences"])
    }
    table = table_of(
        "data set", "metric", "adapter", "value", "95 % interval", "rows", "difference", "95 % interval", "flips"
    )
    for result in cast("Sequence[Document]", found["results"]):
        dataset = str(result["dataset"])
        difference = differences.get((dataset, result["metric"], result["adapter"]))
        table.add_row(
            Text(str(names.get(dataset, dataset))),
            str(result["metric"]),
            Text(str(result["adapter"])),
            f"{result['value']:.4f}",
            _interval(result, ".4f"),
            str(result["n"]),
            *(("", "", "") if difference is None else _difference(difference)),
        )
    show(table)


def _difference(found: Document) -> tuple[str, str, str]:
    flips = f"{found['gained']} gained, {found['lost']} lost" if "gained" in found else ""
    return f"{found['difference']:+.4f}", _interval(found, "+.4f"), flips


def _interval(found: Document, form: str) -> str:
    low, high = found["low"], found["high"]
    return "too few rows" if low is None else f"{low:{form}} to {high:{form}}"
