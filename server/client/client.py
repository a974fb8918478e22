"""An HTTP client of a running server, for the command line and for scripts.

The client has a method for each operation, which takes and returns plain JSON and blocks until the response is
complete. A method raises ClientError, with a message for users, if the server refuses the request or can't be
reached.
"""

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import httpx

from adapters.names import NAME_RULE, is_name
from server.client.connection import CONNECT_SECONDS, ClientError, Connection, Document, path_of, server_sent

ENDED = frozenset({"succeeded", "failed", "cancelled"})

_SILENCE_SECONDS = 60.0  # the read timeout of event streams, which send keep-alives
_LASTING_SECONDS = 5.0
"""A stream that breaks after this time doesn't count as a failure: some proxies close long responses."""
_PEFT_FILES = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}


class Client(Connection):
    """A client with a method for each operation."""

    def about(self) -> Document:
        """Return the base model's name, and whether it has a chat template."""
        return self.json("GET", "/ready")

    def upload(self, path: Path) -> Document:
        """Upload a JSONL or CSV file of rows, and return the new data set.

        Raise OSError if the file can't be read.
        """
        with path.open("rb") as file:
            return self.json("POST", "/datasets", files={"file": (path.name, file)})

    def train(self, body: Mapping[str, object], dry_run: bool = False) -> Document:
        """Submit a training job and return it. If the response is lost, retry with the same idempotency key."""
        return self._submit("/train", body, {"dry_run": "true"} if dry_run else {})

    def evaluate(self, body: Mapping[str, object]) -> Document:
        """Submit an evaluation and return it, as `train` does."""
        return self._submit("/evaluate", body, {})

    def evaluation(self, job_id: str) -> Document:
        """Return an evaluation, with its findings if it has succeeded."""
        return self.json("GET", path_of("evaluate", job_id))

    def job(self, job_id: str) -> Document:
        """Return a job."""
        return self.json("GET", path_of("train", job_id))

    def report(self, job_id: str) -> Document:
        """Return the report of a job that has succeeded."""
        return self.json("GET", path_of("train", job_id, "report"))

    def jobs(self, status: str | None = None, limit: int = 100) -> list[Document]:
        """Return jobs, newest first."""
        params = {"limit": str(limit)} | ({"status": status} if status else {})
        return self._documents(self.json("GET", "/train", params=params), "jobs")

    def steer(self, job_id: str, move: str) -> Document:
        """Apply `move`, which is `cancel`, `stop`, `pause` or `resume`, to a job. Return the job."""
        return self.json("POST", path_of("train", job_id, move))

    def remove_files(self, job_id: str) -> None:
        """Remove the rows, checkpoints, model and log of a job that has ended."""
        self.nothing("DELETE", path_of("train", job_id))

    def events(self, job_id: str, after: int = 0) -> Iterator[Document]:
        """Yield a job's events as they happen, until the job ends. Broken connections are resumed."""
        last, num_failures = after, 0
        while True:
            try:
                for event in self._stream_events(job_id, last):
                    last, num_failures = cast("int", event["seq"]), 0
                    yield event
                if self.job(job_id)["status"] in ENDED:
                    return
                num_failures = 0
            except ClientError as error:
                if not error.may_pass or num_failures == len(self.retries):
                    raise
                num_failures += 1
            time.sleep(self.retries[max(0, num_failures - 1)])

    def adapters(self, public: bool = False) -> Iterator[Document]:
        """Yield all adapters, sorted by name; or the public ones of all projects.

        An adapter with many versions comes with the newest ones.
        """
        more = {"public": "true"} if public else {}
        after: str | None = ""
        while after is not None:
            page = self.json("GET", "/adapters", params={"limit": "500", "after": after, **more})
            yield from self._documents(page, "adapters")
            after = cast("str | None", page["next"])

    def adapter(self, name: str) -> Document:
        """Return an adapter with its versions.

        If the name has a project, as in `acme/tweets`, look the adapter up in the list of adapters, which has only
        its newest versions.
        """
        if "/" not in name:
            page = newest = self.json("GET", path_of("adapters", name))
            versions = self._documents(newest, "versions")
            while (after := page.get("next")) is not None:
                page = self.json("GET", path_of("adapters", name), params={"after": str(after)})
                versions = [*self._documents(page, "versions"), *versions]
            return {key: value for key, value in newest.items() if key != "next"} | {"versions": versions}
        for more in ({}, {"public": "true"}):
            if found := self._documents(self.json("GET", "/adapters", params={"name": name, **more}), "adapters"):
                return found[0]
        raise ClientError(f"no such adapter: {name}", 404)

    def version(self, name: str, version: int) -> Document:
        """Return a version of an adapter."""
        if "/" not in name:
            return self.json("GET", path_of("adapters", name, str(version)))
        for found in self._documents(self.adapter(name), "versions"):
            if found["version"] == version:
                return found
        raise ClientError(f"no such version: {name}@{version}", 404)

    def delete_adapter(self, name: str, version: int | None = None, force: bool = False) -> None:
        """Delete a version, or an adapter with all its versions.

        With `force`, also delete the aliases that point to what is deleted.
        """
        path, headers = self._place(name, *(() if version is None else (str(version),)))
        self.nothing("DELETE", path, params={"force": "true"} if force else {}, headers=headers)

    def download(self, name: str, version: int, target: Path) -> None:
        """Download a version as a zip. PEFT reads the unpacked folder. Raise OSError if `target` can't be written.

        An ordinary file is written under a temporary name and then renamed. Devices, pipes and the targets of
        symbolic links are written directly.
        """
        path, headers = self._place(name, str(version), "download")
        if target.is_symlink() or (target.exists() and not target.is_file()):
            self._save(path, headers, target)
            return
        part = target.with_name(f"{target.name}.part")
        try:
            self._save(path, headers, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def point(self, name: str, alias: str, version: int) -> Document:
        """Point an alias, or `latest`, at a version, and return the adapter."""
        path, headers = self._place(name, "aliases", alias)
        return self.json("PUT", path, json={"version": version}, headers=headers)

    def unpoint(self, name: str, alias: str) -> None:
        """Remove an alias."""
        path, headers = self._place(name, "aliases", alias)
        self.nothing("DELETE", path, headers=headers)

    def set_visibility(self, name: str, visibility: str) -> None:
        """Make an adapter `public`, so that other projects may use it, or `private`."""
        path, headers = self._place(name, "visibility")
        self.nothing("PUT", path, json={"visibility": visibility}, headers=headers)

    def compose(self, name: str, body: Mapping[str, object]) -> Document:
        """Name a weighted sum of adapters, and return the new version.

        If `body` has a `method`, queue a merge and return its job.
        """
        return self.json("POST", path_of("compositions", _new(name)), json=dict(body))

    def datasets(self) -> list[Document]:
        """Return the data sets, newest first."""
        return self._documents(self.json("GET", "/datasets"), "datasets")

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete a data set that no unfinished job needs."""
        self.nothing("DELETE", path_of("datasets", dataset_id))

    def publish(self, name: str, path: Path) -> Document:
        """Publish the adapter in a folder that PEFT saved, or in a zip of such a folder. Return the version.

        Raise OSError if a file can't be read, and ClientError if only subfolders of the folder have an adapter.
        """
        path_to = path_of("adapters", _new(name))
        with ExitStack() as opened:
            parts = _peft_files(path) if path.is_dir() else {"archive": path}
            files = {field: (file.name, opened.enter_context(file.open("rb"))) for field, file in parts.items()}
            return self.json("POST", path_to, files=files)

    def import_adapter(self, name: str, repo_id: str, revision: str | None = None) -> Document:
        """Make the server publish an adapter from the Hugging Face hub, and return the version."""
        body = {"repo_id": repo_id, "revision": revision}
        return self.json("POST", path_of("adapters", _new(name), "import"), json=body)

    def generate(self, body: Mapping[str, object]) -> Document:
        """Generate text, and return the complete answer."""
        return self.json("POST", "/generate", json=dict(body))

    def compare(self, body: Mapping[str, object]) -> Document:
        """Generate an answer with each of several adapter expressions, and return the answers."""
        return self.json("POST", "/compare", json=dict(body))

    def decide(self, body: Mapping[str, object]) -> Document:
        """Return the answer of POST /decide."""
        return self.json("POST", "/decide", json=dict(body))

    def stream(self, body: Mapping[str, object]) -> Iterator[Document]:
        """Yield the answer's events as they arrive. Raise ClientError if generation fails midway."""
        with self.open("POST", "/generate", json={**body, "stream": True}) as response:
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise self.another_server()
            for name, data in server_sent(response.iter_lines()):
                if data == "[DONE]":
                    return
                document = self.parsed(data)
                if name == "error":
                    raise ClientError(str(document.get("detail")), cast("int", document.get("status")))
                yield document
        raise ClientError("the answer broke off")

    def _submit(self, path: str, body: Mapping[str, object], params: Mapping[str, str]) -> Document:
        headers = {"Idempotency-Key": uuid.uuid4().hex}

        def post() -> Document:
            return self.json("POST", path, json=dict(body), headers=headers, params=dict(params))

        try:
            return post()
        except ClientError as error:
            if error.status is not None or isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
                raise
        return self.again(post)

    def _save(self, path: str, headers: Mapping[str, str], target: Path) -> None:
        with self.open("GET", path, headers=headers) as response, target.open("wb") as file:
            for piece in response.iter_bytes():
                file.write(piece)

    def _place(self, name: str, *parts: str) -> tuple[str, Mapping[str, str]]:
        """Return the URL path of an adapter, followed by `parts`, and the headers to send.

        If the name has a project, a header selects the project.
        """
        project, _, own = name.rpartition("/")
        if project:
            # Raise if the adapter doesn't exist: a server without keys would ignore the unknown project.
            self.adapter(name)
        return path_of("adapters", own, *parts), {"OpenAI-Project": project} if project else {}

    def _documents(self, page: Document, name: str) -> list[Document]:
        try:
            return cast("list[Document]", page[name])
        except (LookupError, TypeError):
            raise self.another_server() from None

    def _stream_events(self, job_id: str, after: int) -> Iterator[Document]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=CONNECT_SECONDS)
        with self.open("GET", path_of("train", job_id, "events"), headers=headers, timeout=timeout) as response:
            opened_at = time.monotonic()
            try:
                for name, data in server_sent(response.iter_lines()):
                    if name != "error":  # after an error the stream ends, and is resumed
                        yield self.parsed(data)
            except httpx.TransportError:
                if time.monotonic() - opened_at < _LASTING_SECONDS:
                    raise


def _peft_files(folder: Path) -> dict[str, Path]:
    """Return the paths of the two files in an adapter's folder, by the form fields in which they are sent.

    Raise ClientError if only subfolders, such as a trainer's checkpoints, have an adapter's config.
    """
    files = {field: folder / name for field, name in _PEFT_FILES.items()}
    config, weights = files["adapter_config"], files["adapter_model"]
    pickled = weights.with_suffix(".bin")
    if not any(path.exists() for path in (config, weights, pickled)):
        within = sorted(found.parent.name for found in folder.glob(f"*/{config.name}"))
        if within:
            raise ClientError(
                f"{folder} has no {config.name}, but folders of it have: give one of {', '.join(within)}"
            )
    if not weights.exists() and pickled.exists():
        files["adapter_model"] = pickled  # the server refuses it, and says how to convert it
    return files


def _new(name: str) -> str:
    """Return the name, or raise ClientError if a new adapter can't have it: a slash would change the path."""
    if not is_name(name):
        raise ClientError(f"name: {NAME_RULE}")
    return name
