"""A real server behind the proxy of docker/proxy: its own nginx configuration, TLS and HTTP/2."""

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI

from adapters.peft.files import write
from server.model.base.weights import load_base
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import PATIENCE, ServerProcess, environment, events, free_port
from tests.end_to_end.training_client import wait_until
from tests.server.jobs.merge_kit import sample

START = Path(__file__).parent.parent.parent / "docker" / "proxy" / "start"
PREFIX = "/smolora"
KEY = "a-key-of-the-operator"
PROMPT = "The capital of France is"
BODY_TIMEOUT = 2.0
CANCELLED = 'smolora_requests_total{outcome="cancelled"}'
LONG = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "speculation": "off"}
"""A request that takes far longer than SOON, so that an earlier end is due to the client's disconnect."""
SOON = 10.0


def missing() -> str | None:
    """Return what this machine lacks for these tests."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None or shutil.which("openssl") is None:
        return "needs nginx and openssl: apt-get install nginx openssl"
    output = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=True).stderr
    version = tuple(map(int, re.findall(r"\d+", output)[:3]))
    return None if version >= (1, 25, 1) else f"needs nginx 1.25.1 or newer, this is {output.strip()}"


MISSING = missing()
pytestmark = [pytest.mark.real, pytest.mark.thorough, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


class Proxy:
    """nginx, run as in the container, in front of `server`; `client` is connected to it with the key."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self.certificate = folder / "fullchain.pem"
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        files = ["-keyout", str(folder / "privkey.pem"), "-out", str(self.certificate)]
        words = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "1", *subject, *files]
        subprocess.run(words, capture_output=True, check=True)
        self.port = free_port()
        self.origin = f"https://localhost:{self.port}"
        self.url = f"{self.origin}{PREFIX}"
        self.tls = ssl.create_default_context(cafile=self.certificate)
        self.client = self.client_from("127.0.0.1")
        self._log = folder / "log"
        given = {
            "PROXY_UPSTREAM": f"127.0.0.1:{server.port}",
            "PROXY_LISTEN": f"127.0.0.1:{self.port}",
            "PROXY_CERTIFICATES": str(folder),
            "PROXY_RUN": str(folder),
            "SMOLORA_ROOT_PATH": PREFIX,
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([START], env=environment() | given, stdout=log, stderr=log)
        try:
            wait_until(self._listens, what="nginx")
        except BaseException:
            self.close()
            raise

    def client_from(self, address: str) -> httpx.Client:
        """Return a client of its own, with one of the loopback addresses."""
        transport = httpx.HTTPTransport(verify=self.tls, local_address=address)
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, transport=transport, headers=headers, timeout=PATIENCE)

    def curl(self, path: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run curl over HTTP/2, which httpx doesn't support here."""
        words = self._curl(path, "--http2", *options)
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)

    @contextmanager
    def hanging(self, path: str, *options: str) -> Iterator[None]:
        """Let curl wait for its answer during the block; it disconnects at the end."""
        process = subprocess.Popen(self._curl(path, *options), stdout=subprocess.DEVNULL)
        try:
            yield
            assert process.poll() is None, "it was answered"
        finally:
            process.kill()
            process.wait()

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def close(self) -> None:
        self.client.close()
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)

    def _curl(self, path: str, *options: str) -> list[str]:
        options = ("--cacert", str(self.certificate), "-H", f"Authorization: Bearer {KEY}", *options)
        return ["curl", "--silent", "--noproxy", "*", *options, self.url + path]

    def _listens(self) -> bool:
        assert self._process.poll() is None, self.log()
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionError:
            return False
        return True


@pytest.fixture(scope="module")
def server(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess(
        tmp_path_factory.mktemp("home"),
        KEY,
        model=base_dir,
        api_keys=KEY,
        allowed_hosts="localhost,127.0.0.1",
        root_path=PREFIX,
        trusted_proxies="127.0.0.1",
        body_timeout=BODY_TIMEOUT,
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def proxy(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path_factory.mktemp("proxy"), server)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def adapter(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of an upload of ten megabytes, by field name."""
    directory = tmp_path_factory.mktemp("adapter")
    write(directory, sample(load_base(base_dir).config.shape, 1, rank=8))
    found = {"adapter_config": directory / CONFIG, "adapter_model": directory / WEIGHTS}
    assert found["adapter_model"].stat().st_size > 8 << 20
    return found


def test_ready_over_http_2(proxy: Proxy) -> None:
    done = proxy.curl("/ready", "--write-out", " %{http_version} %{http_code}")
    assert done.stdout.endswith("} 2 200"), done
    assert proxy.client.get("/ready").json()["status"] == "ready"
    others = {proxy.client.get(f"{proxy.origin}{path}").status_code for path in ("/ready", "/etc/hostname")}
    assert others == {404}, "what has no prefix isn't smolora's"


def test_only_tls_is_accepted(proxy: Proxy) -> None:
    assert httpx.get(f"http://127.0.0.1:{proxy.port}{PREFIX}/ready").status_code == 400


def test_generate(proxy: Proxy, server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    answer = proxy.client.post("/generate", json=body)
    assert answer.json()["choices"][0]["text"] == server.text(PROMPT, max_tokens=8)
    nobody = proxy.client.post("/generate", json=body, headers={"Authorization": "Bearer another"})
    assert (nobody.status_code, nobody.headers["content-type"]) == (401, "application/problem+json")


def test_events_arrive_one_by_one(proxy: Proxy, server: ServerProcess) -> None:
    """The server is never far ahead of the events that have arrived."""
    total = "smolora_generated_tokens_total"
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 48, "ignore_eos": True, "temperature": 0}
    for _ in range(10):  # on a busy machine this process may be late
        before = server.counts()[total]
        behind = []
        with proxy.client.stream("POST", "/generate", json=body) as response:
            for number, _ in enumerate(events(response.iter_lines()), start=1):
                if number in (1, 16, 32):
                    behind.append(server.metrics()[total] - before - number)
        assert len(behind) == 3
        if max(behind) < 12:
            break
    assert max(behind) < 12, behind


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("http", [1, 2])
def test_disconnect_ends_the_generation(proxy: Proxy, server: ServerProcess, http: int, is_streamed: bool) -> None:
    server.wait_until_idle()
    before = server.counts().get(CANCELLED, 0.0)
    body = {**LONG, "stream": is_streamed}
    if http == 1 and is_streamed:
        with proxy.client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()  # kept: httpx disconnects if it is dropped
            next(lines)
            server.wait_for(requests_running=1)
    else:
        data = httpx.Request("POST", proxy.url, json=body).content.decode()
        with proxy.hanging("/generate", "--http2" if http == 2 else "--http1.1", "--json", data):
            server.wait_for(requests_running=1)

    def has_ended() -> bool:
        found = server.metrics()
        return found["smolora_requests_running"] == 0 and found.get(CANCELLED) == before + 1

    wait_until(has_ended, SOON, "its end")


def test_upload(proxy: Proxy, adapter: dict[str, Path]) -> None:
    files = {field: (path.name, path.read_bytes()) for field, path in adapter.items()}
    first = proxy.client.post("/adapters/own", files=files)
    assert first.status_code == 201, first.text
    assert proxy.client.get(f"{proxy.origin}{first.headers['location']}").json() == first.json()
    parts = [option for field, path in adapter.items() for option in ("--form", f"{field}=@{path}")]
    second = proxy.curl("/adapters/other", *parts, "--write-out", " %{http_version} %{http_code}")
    assert second.stdout.endswith(" 2 201"), second
    answer = proxy.client.post("/generate", json={"prompt": PROMPT, "adapter": "own+other*0.5", "max_tokens": 2})
    assert {part["name"] for part in answer.json()["adapters"]} == {"own", "other"}
    assert proxy.client.get("/adapters/own/1/download").headers["content-type"] == "application/zip"


def test_body_is_not_buffered_by_the_proxy(proxy: Proxy) -> None:
    """The server refuses it in its own format, long before nginx would."""
    lines = (
        f"POST {PREFIX}/datasets HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {KEY}",
        "Content-Type: multipart/form-data; boundary=x",
        "Content-Length: 1000000",
    )
    plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=BODY_TIMEOUT + SOON)
    with proxy.tls.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(("\r\n".join((*lines, "", "")) + "--x\r\n").encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_server_limits_the_size_of_bodies(proxy: Proxy) -> None:
    answer = proxy.client.post("/generate", json={"prompt": "a" * (3 << 20)})
    assert answer.status_code == 413
    assert "2097152 bytes" in answer.json()["detail"]


def test_links_go_through_the_proxy(proxy: Proxy) -> None:
    client, origin = proxy.client, proxy.origin
    rows = b'{"prompt": "a", "completion": "b"}\n' * 2
    stored = client.post("/datasets", files={"file": ("rows.jsonl", rows)})
    assert client.get(f"{origin}{stored.headers['location']}").json()["id"] == stored.json()["id"]
    queued = client.post("/train", json={"name": "j", "data": [{"text": "a"}] * 2})
    job = f"{origin}{queued.headers['location']}"
    assert client.post(f"{job}/cancel").status_code == 200
    first = client.get(f"{job}/events", params={"limit": 1})
    following = client.get(f"{origin}{first.links['next']['url']}")
    assert following.json()[0]["seq"] == first.json()[0]["seq"] + 1

    (at,) = client.get("/openapi.json").json()["servers"]
    assert client.get(f"{origin}{at['url']}/ready").status_code == 200
    page = client.get("/docs").text
    found = set(re.findall(rf"['\"]({PREFIX}/[^'\"]+)['\"]", page))
    assert len(found) >= 4, page
    assert {client.get(f"{origin}{path}").status_code for path in found} == {200}
    assert client.get(proxy.url).headers["location"] == f"{PREFIX}/"
    front = client.get(f"{proxy.url}/")
    files = {urljoin(f"{proxy.url}/", path) for path in re.findall(r'(?:src|href)="([^"]+)"', front.text)}
    assert len(files) > 10
    assert {client.get(file).status_code for file in files} == {200}


def test_client_address_comes_from_the_proxy(proxy: Proxy, server: ServerProcess) -> None:
    """The client's address is taken from the proxy that the settings name, and from no other sender."""

    def logged(client: httpx.Client, request_id: str) -> str:
        headers = {"X-Forwarded-For": "203.0.113.9", "Forwarded": "for=203.0.113.9", "X-Request-Id": request_id}
        with client:
            assert client.get("/adapters", headers=headers | server.headers).status_code == 200
        line = re.compile(rf"request={request_id} .* client=(.*)\n")
        wait_until(lambda: bool(line.search(server.log())), what="the log's line")
        return str(line.findall(server.log())[0])

    def directly_from(address: str) -> httpx.Client:
        return httpx.Client(base_url=server.url, transport=httpx.HTTPTransport(local_address=address))

    assert logged(proxy.client_from("127.0.0.3"), "by-proxy") == "127.0.0.3"
    own_line = re.compile(r' 127\.0\.0\.3 "GET /smolora/adapters" 200 [\d.]+ s request=by-proxy\n')
    wait_until(lambda: bool(own_line.search(proxy.log())), what="nginx's line")
    assert logged(directly_from("127.0.0.2"), "by-another") == "127.0.0.2"
    assert logged(directly_from("127.0.0.1"), "by-the-trusted") == "203.0.113.9"


def test_unknown_hosts_and_origins(proxy: Proxy) -> None:
    def status(**headers: str) -> int:
        return proxy.client.get("/adapters", headers=headers).status_code

    assert status(host="lora.example.org") == 403
    assert status(host="lora.example.org", **{"X-Forwarded-Host": "localhost"}) == 403
    assert status(origin=proxy.origin) == 200, "the page of /docs"
    assert status(origin="https://localhost") == 403, "another port is another site"
    assert status(origin="https://lora.example.org") == 403


def test_openai_client(proxy: Proxy) -> None:
    session = DefaultHttpxClient(verify=proxy.tls)
    with OpenAI(base_url=f"{proxy.url}/v1", api_key=KEY, http_client=session, timeout=PATIENCE) as client:
        model = client.models.list().data[0].id
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=16,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The capital of France is Paris."
