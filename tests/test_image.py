"""The container's files: what compose makes of them, with and without a GPU. docker/check builds and runs them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from server.config import Limits, Settings, WorkerSettings, load
from server.jobs.supervisor import GRACE_SECONDS
from server.serve.process import DRAIN_SECONDS, HURRY_SECONDS, KEEP_ALIVE_SECONDS

ROOT = Path(__file__).parent.parent
SBIN = f"{os.defpath}:/usr/sbin"
"""Where nginx may be, too."""
needs_nginx = pytest.mark.skipif(
    None in (shutil.which("nginx", path=SBIN), shutil.which("openssl")), reason="needs nginx and openssl"
)
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def compose_command() -> list[str] | None:
    """What runs compose here: docker's plugin, or the program of its own."""
    for command in (["docker", "compose"], ["docker-compose"]):
        program = shutil.which(command[0])
        if program and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def resolved(*files: str, given: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """The services as compose resolves them, all profiles together; as YAML alone where there is no compose.

    `files` come on top of docker-compose.yml, and `given` is in the environment; both need compose.
    """
    command = compose_command()
    if command is None:
        written: Mapping[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        return written
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SMOLORA_")} | dict(
        given or {}
    )
    named = [option for file in ("docker-compose.yml", *files) for option in ("--file", file)]
    told = [*command, *named, "--profile", "gpu", "config", "--format", "json"]
    done = subprocess.run(told, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    found: Mapping[str, Any] = json.loads(done.stdout)["services"]
    return found


@pytest.fixture(scope="module")
def services() -> Mapping[str, Any]:
    return resolved()


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_behind_the_proxy_the_server_has_no_port_and_asks_for_keys() -> None:
    services = resolved("docker/proxy/compose.yml")
    server, proxy = services["server"], services["proxy"]
    assert not server.get("ports")
    assert [port["target"] for port in proxy["ports"]] == [8443]
    told = server["environment"]
    assert told["SMOLORA_ALLOW_ANONYMOUS"] == "0"
    assert told["SMOLORA_ROOT_PATH"] == proxy["environment"]["SMOLORA_ROOT_PATH"] == "/smolora"
    assert load(Settings, trusted_proxies=told["SMOLORA_TRUSTED_PROXIES"]).trusted_proxies


def told_behind_the_proxy() -> dict[str, str]:
    """The file .env that docs/operations.md has written there."""
    ((_, lines),) = re.findall(r"cat > \.env <<(\w+)\n(.*?)\n\1\n", OPERATIONS, re.DOTALL | re.MULTILINE)
    return dict(line.split("=", 1) for line in lines.splitlines())


def test_the_env_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """It may have a server's only key."""
    (written,) = re.findall(r"^\(umask 077;.*?^\)$", OPERATIONS, re.DOTALL | re.MULTILINE)
    told = ["sh", "-c", f"openssl() {{ echo a-key; }}\n{written}"]
    assert subprocess.run(told, cwd=tmp_path, check=False).returncode == 0
    made = tmp_path / ".env"
    assert "\nSMOLORA_API_KEYS=a-key\n" in made.read_text()
    assert made.stat().st_mode & 0o777 == 0o600
    made.write_text("SMOLORA_API_KEYS=mine\n")
    assert subprocess.run(told, cwd=tmp_path, capture_output=True, check=False).returncode != 0
    assert made.read_text() == "SMOLORA_API_KEYS=mine\n"


def test_behind_the_proxy_every_documented_command_keeps_its_settings() -> None:
    """One that names files by itself, or a shell without what was exported, makes the server anew without them."""
    told = told_behind_the_proxy()
    files = told.pop("COMPOSE_FILE").split(":")
    assert files == ["docker-compose.yml", "docker/proxy/compose.yml"]
    written = "".join((ROOT / file).read_text() for file in files)
    assert [name for name in told if f"${{{name}" not in written] == []
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / file for file in files)]
    assert [page.name for page in pages if re.search(r"docker compose (-f|--file)\b", page.read_text())] == []
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored, "it has the server's key"


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_the_env_file_puts_the_server_behind_the_proxy() -> None:
    told = told_behind_the_proxy()
    files = told.pop("COMPOSE_FILE").split(":")[1:]
    assert resolved(*files, given=told | {"SMOLORA_API_KEYS": "k"})["server"]["environment"] == {
        **resolved("docker/proxy/compose.yml")["server"]["environment"],
        "SMOLORA_API_KEYS": "k",
        "SMOLORA_ALLOWED_HOSTS": "localhost",
        "SMOLORA_PUBLIC_URL": "https://localhost:8443/smolora",
    }


def test_the_proxys_times_go_with_the_servers() -> None:
    """What the comments of its configuration say of them."""
    text = (ROOT / "docker" / "proxy" / "nginx.conf.template").read_text()
    seconds = {name: int(value) for name, value in re.findall(r"^ *(\w+) (\d+)s;", text, re.MULTILINE)}
    limits = Limits()
    assert seconds["client_header_timeout"] == limits.header_timeout
    assert seconds["client_body_timeout"] == limits.body_timeout
    assert seconds["send_timeout"] == limits.stall_timeout
    assert limits.request_timeout < seconds["proxy_read_timeout"] <= seconds["worker_shutdown_timeout"]
    assert {int(value) for value in re.findall(r" keepalive_timeout (\d+)s;", text)} == {60}
    assert KEEP_ALIVE_SECONDS > 60


def look_at_the_proxy(folder: Path, stdout: int = subprocess.DEVNULL) -> str:
    """What nginx says of the configuration that `start` makes in that folder, which has the certificates, too."""
    folder.mkdir()
    files = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    told = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost", *files]
    subprocess.run(told, capture_output=True, check=True)
    done = start_the_proxy(folder, f'PATH={SBIN}\nexec nginx -t "$@"', stdout)
    if 'unknown directive "http2"' in done.stderr:
        pytest.skip("needs nginx 1.25.1 or newer")
    assert done.returncode == 0, done.stderr
    return done.stderr


def start_the_proxy(folder: Path, script: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """`start` with the folder's certificates, and a script in the place of nginx, in a session of their own."""
    instead = folder / "nginx"
    instead.write_text(f"#!/bin/sh\n{script}\n")
    instead.chmod(0o755)
    given = {"PATH": f"{folder}:{SBIN}", "PROXY_CERTIFICATES": str(folder), "PROXY_RUN": folder.name}
    return subprocess.run(
        [str(ROOT / "docker" / "proxy" / "start")],
        cwd=folder.parent,
        env=given,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,
    )


@needs_nginx
def test_the_proxy_starts_in_a_folder_with_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "certificates & keys | all"
    assert f"configuration file {folder}/nginx.conf test is successful" in look_at_the_proxy(folder)


@needs_nginx
def test_the_proxy_needs_no_place_of_roots(tmp_path: Path) -> None:
    """It makes these as it starts, and can't where the distribution's are, unless root did before."""
    look_at_the_proxy(tmp_path / "run")
    made = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert made == {"body", "proxy", "fastcgi", "uwsgi", "scgi"}


@needs_nginx
def test_the_proxy_starts_where_its_output_is_a_socket(tmp_path: Path) -> None:
    """As systemd's journal is, which nothing can open by its name."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        look_at_the_proxy(tmp_path / "run", theirs.fileno())
    assert (tmp_path / "run" / "access.log").is_fifo()


def test_lines_of_the_proxys_log_are_read_whatever_is_signalled(tmp_path: Path) -> None:
    """SIGHUP is how nginx is told of new certificates, and systemd sends it to all of a service's processes. Nginx
    keeps the pipe open itself, so without a reader it would stand still once that is full.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("privkey.pem", "fullchain.pem"):
        (folder / name).touch()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        start_the_proxy(folder, "trap '' HUP; kill -HUP 0; sleep 0.2; echo a line >&3", theirs.fileno())
        ours.settimeout(20)
        assert ours.recv(100) == b"a line\n"


OF_THE_IMAGE = {"home", "host", "port", "base_dir"}
"""Settings that the image has of its own: the volume, where to listen in the container, the base within."""
FIXED = {"server": {"workers"}, "server-gpu": {"device"}, "worker": set[str]()}
"""What each service is told whatever its caller says."""


@pytest.mark.parametrize("service", FIXED)
def test_every_setting_is_passed_on(service: str) -> None:
    """As the variable of its name, and nothing else is: a new setting is one line there, too.

    The worker gets some that it has no use for.
    """
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["environment"]
    image = set(re.findall(r"\bSMOLORA_(\w+)=", DOCKERFILE))
    assert image == {name.upper() for name in OF_THE_IMAGE}
    kind = WorkerSettings if service == "worker" else Settings
    passed = set(kind.model_fields) - OF_THE_IMAGE
    there = {name.removeprefix("SMOLORA_").lower() for name in written if not name.startswith(("OTEL_", "AWS_"))}
    assert passed <= there <= set(Settings.model_fields) - OF_THE_IMAGE
    for name in passed - FIXED[service]:
        variable = f"SMOLORA_{name.upper()}"
        assert re.fullmatch(rf"\$\{{{variable}(:?-.*)?\}}", str(written[variable])), variable


@pytest.mark.parametrize("service", FIXED)
def test_what_an_object_store_needs_is_passed_on(service: str) -> None:
    """All that docs/settings.md names, as it is set and only where it is."""
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["environment"]
    named = set(re.findall(r"`(AWS_\w+)`", (ROOT / "docs" / "settings.md").read_text()))
    assert len(named) >= 5
    assert {written.get(name, "not passed on") for name in named} == {None}


@pytest.mark.parametrize("service", FIXED)
def test_a_sampler_of_traces_is_none_where_nobody_set_one(service: str) -> None:
    """OpenTelemetry takes an empty one for the name of one that it doesn't know, and each process warns of it."""
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["environment"]
    assert {name: written[name] for name in written if "SAMPLER" in name} == {
        "OTEL_TRACES_SAMPLER": None,
        "OTEL_TRACES_SAMPLER_ARG": None,
    }


def test_the_images_native_code_comes_with_the_wheel() -> None:
    """The compiler is in the build stage alone, and nothing that the wheel is built from is ignored."""
    *_, build, last = DOCKERFILE.split("\nFROM ")
    assert build.index("install --yes --no-install-recommends g++") < build.index("pip wheel")
    assert "apt-get" not in last
    (files,) = re.findall(r"^COPY (.* setup\.py) \./$", build, re.MULTILINE)
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in (*files.split(), "adapters", "server")} <= set(allowed)


def test_the_images_user_can_read_what_is_copied_into_it() -> None:
    """Whatever umask the checkout was made under: files from it have their modes there, others the build's."""
    *_, last = DOCKERFILE.split("\nFROM ")
    copied = re.findall(r"^COPY (?!--from)\S+ (\S+)$", last, re.MULTILINE)
    assert copied
    assert copied == re.findall(r"^RUN chmod 0644 (\S+)$", last, re.MULTILINE)


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_a_setting_arrives_and_the_server_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through compose and the environment; and the address that it shows is the published one."""
    given = {"PORT": "9123", "MAX_QUEUE": "7", "ALLOW_HUB_ADAPTERS": "1", "NATIVE": "0", "MIN_FREE_BYTES": "1GiB"}
    server = resolved(given={f"SMOLORA_{name}": value for name, value in given.items()})["server"]
    (port,) = server["ports"]
    assert (port["host_ip"], port["target"], port["published"]) == ("127.0.0.1", 8000, "9123")
    for name, value in server["environment"].items():
        if value is not None:  # which isn't set in the container
            monkeypatch.setenv(name, str(value))
    settings = load(Settings)
    assert (settings.port, settings.public_url) == (8000, "http://127.0.0.1:9123")
    assert (settings.max_queue, settings.min_free_bytes) == (7, 1 << 30)
    gpu = resolved()["server-gpu"]
    (port,) = gpu["ports"]
    assert gpu["environment"]["SMOLORA_PUBLIC_URL"] == f"http://127.0.0.1:{port['published']}"
    proxied = resolved("docker/proxy/compose.yml", given={"PROXY_PORT": "8443"})["server"]
    assert proxied["environment"]["SMOLORA_PUBLIC_URL"] == "https://localhost:8443/smolora"
    assert (settings.allow_hub_adapters, settings.native, settings.workers) == (True, False, 0)


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_every_container_has_limits_that_can_be_set() -> None:
    given = {f"{who}_{what}": "700" for who in ("SERVER", "WORKER", "PROXY") for what in ("PIDS",)}
    given |= {f"{who}_MEMORY": "900m" for who in ("SERVER", "WORKER", "PROXY")} | {"TMP_SIZE": "5m"}
    default, told = resolved("docker/proxy/compose.yml"), resolved("docker/proxy/compose.yml", given=given)
    assert set(default) == {"server", "server-gpu", "worker", "proxy"}
    for name, service in default.items():
        assert 64 <= int(service["pids_limit"]) <= 512, name
        assert 256 << 20 <= int(service["mem_limit"]) <= 8 << 30, name
        assert int(told[name]["pids_limit"]) == 700
        assert int(told[name]["mem_limit"]) == 900 << 20
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        if name != "proxy":
            assert service["tmpfs"] == ["/tmp:size=64m,mode=1777,noexec,nosuid,nodev"]
            assert told[name]["tmpfs"][0].startswith("/tmp:size=5m,")


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_it_may_end_in_its_own_time() -> None:
    """What drains, then what is on its way; workers let go meanwhile."""
    for name, service in resolved().items():
        seconds = int(service["stop_grace_period"].removesuffix("s"))
        assert seconds > max(DRAIN_SECONDS + HURRY_SECONDS, GRACE_SECONDS) + 5, name


def stages() -> dict[str, str]:
    """Each named stage of the Dockerfile, and what it begins with."""
    return {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}


def test_every_image_is_built_by_the_services_that_start_with_it(services: Mapping[str, Any]) -> None:
    """Nothing is pulled: `docker compose up server-gpu` alone builds what it runs."""
    for name, service in services.items():
        needed = [name, *service.get("depends_on", ())]
        built = {services[other]["image"] for other in needed if "build" in services[other]}
        assert service["image"] in built, name


def test_the_gpus_image_is_another_one(services: Mapping[str, Any]) -> None:
    server, gpu = services["server"], services["server-gpu"]
    assert gpu["image"] != server["image"]
    assert gpu["build"]["args"]["TORCH"] == "torch-cuda"
    assert "TORCH" not in server["build"].get("args", {})
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["environment"]["SMOLORA_DEVICE"] == "cuda", "without one, a start says so instead of using the CPU"


def test_without_a_gpu_it_does_not_restart_for_ever(services: Mapping[str, Any]) -> None:
    assert services["server"]["restart"] == "unless-stopped"
    assert re.fullmatch(r"on-failure:\d", services["server-gpu"]["restart"])


def test_both_stages_of_torch_lead_to_the_same_build() -> None:
    found = stages()
    assert re.search(r"^ARG TORCH=torch$", DOCKERFILE.split("FROM")[0], re.MULTILINE)
    assert found["build"] == "${TORCH}"
    assert found["torch-cuda"] == "torch"


def test_no_cpu_build_of_the_house_gets_into_the_gpus_image(tmp_path: Path) -> None:
    (pattern,) = re.findall(r"^RUN rm -f /wheels/(.*)$", DOCKERFILE, re.MULTILINE)
    names = {
        "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl",
        "torch-2.13.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl",
        "triton-3.7.0-cp311-cp311-manylinux_2_28_x86_64.whl",
    }
    for name in names:
        (tmp_path / name).touch()
    subprocess.run(["sh", "-c", f"rm -f {tmp_path}/{pattern}"], check=True)
    assert names - {path.name for path in tmp_path.iterdir()} == {name for name in names if "+cpu" in name}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_ends_the_build_of_the_gpus_image_with_a_reason() -> None:
    (check,) = re.findall(r'^RUN (\[ -z "\$\{NEEDS_CUDA.*)$', DOCKERFILE, re.MULTILINE)
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    told = ["sh", "-c", check]
    assert subprocess.run(told, env={"PATH": python}, check=False).returncode == 0
    needed = {"PATH": python, "NEEDS_CUDA": "1"}
    found = subprocess.run(told, env=needed, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "has no CUDA here: put a wheel that has into docker/wheels" in found.stderr


@pytest.mark.thorough  # the settings alone above
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_container_that_sees_no_gpu_says_so(tmp_path: Path, services: Mapping[str, Any]) -> None:
    """The server with the service's settings, in a process instead of a container: exit code 1 and one line."""
    given = {name: str(value) for name, value in services["server-gpu"]["environment"].items() if value}
    given = {name: value for name, value in given.items() if "$" not in value}
    environment = {**os.environ, **given, "SMOLORA_HOME": str(tmp_path), "SMOLORA_PORT": "0"}
    told = [sys.executable, "-m", "server.cli", "serve"]
    done = subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SMOLORA_DEVICE=cuda: torch" in done.stderr
    assert "finds 0 CUDA devices" in done.stderr
    assert "Traceback" not in done.stderr
