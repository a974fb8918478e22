"""The container's files: compose's result with and without a GPU. docker/check builds and runs the images."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
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
"""nginx may also be here."""
needs_nginx = pytest.mark.skipif(
    None in (shutil.which("nginx", path=SBIN), shutil.which("openssl")), reason="needs nginx and openssl"
)
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def compose_command() -> list[str] | None:
    """Return the compose command: docker's plugin, or the standalone program."""
    for command in (["docker", "compose"], ["docker-compose"]):
        program = shutil.which(command[0])
        if program and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def resolved(*files: str, given: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """Return the services as resolved by compose, with all profiles; without compose, as plain YAML.

    `files` extend docker-compose.yml, and `given` is the environment; both need compose.
    """
    command = compose_command()
    if command is None:
        written: Mapping[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        return written
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SMOLORA_")} | dict(
        given or {}
    )
    named = [option for file in ("docker-compose.yml", *files) for option in ("--file", file)]
    words = [*command, *named, "--profile", "gpu", "config", "--format", "json"]
    done = subprocess.run(words, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    found: Mapping[str, Any] = json.loads(done.stdout)["services"]
    return found


@pytest.fixture(scope="module")
def services() -> Mapping[str, Any]:
    return resolved()


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_server_behind_the_proxy_has_no_port_and_needs_keys() -> None:
    services = resolved("docker/proxy/compose.yml")
    server, proxy = services["server"], services["proxy"]
    assert not server.get("ports")
    assert [port["target"] for port in proxy["ports"]] == [8443]
    environment = server["environment"]
    assert environment["SMOLORA_ALLOW_ANONYMOUS"] == "0"
    assert environment["SMOLORA_ROOT_PATH"] == proxy["environment"]["SMOLORA_ROOT_PATH"] == "/smolora"
    assert load(Settings, trusted_proxies=environment["SMOLORA_TRUSTED_PROXIES"]).trusted_proxies


def documented_env_file() -> dict[str, str]:
    """Return the .env file that docs/operations.md writes."""
    ((_, lines),) = re.findall(r"cat > \.env <<(\w+)\n(.*?)\n\1\n", OPERATIONS, re.DOTALL | re.MULTILINE)
    return dict(line.split("=", 1) for line in lines.splitlines())


def test_existing_env_file_is_not_overwritten(tmp_path: Path) -> None:
    """It may contain a server's only key."""
    (written,) = re.findall(r"^\(umask 077;.*?^\)$", OPERATIONS, re.DOTALL | re.MULTILINE)
    command = ["sh", "-c", f"openssl() {{ echo a-key; }}\n{written}"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    made = tmp_path / ".env"
    assert "\nSMOLORA_API_KEYS=a-key\n" in made.read_text()
    assert made.stat().st_mode & 0o777 == 0o600
    made.write_text("SMOLORA_API_KEYS=mine\n")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0
    assert made.read_text() == "SMOLORA_API_KEYS=mine\n"


def test_documented_commands_keep_the_proxys_settings() -> None:
    """A command with files of its own, or in a shell without the exported variables, would recreate the server
    without its settings."""
    variables = documented_env_file()
    files = variables.pop("COMPOSE_FILE").split(":")
    assert files == ["docker-compose.yml", "docker/proxy/compose.yml"]
    written = "".join((ROOT / file).read_text() for file in files)
    assert [name for name in variables if f"${{{name}" not in written] == []
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / file for file in files)]
    assert [page.name for page in pages if re.search(r"docker compose (-f|--file)\b", page.read_text())] == []
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored, "it has the server's key"


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_the_env_file_puts_the_server_behind_the_proxy() -> None:
    variables = documented_env_file()
    files = variables.pop("COMPOSE_FILE").split(":")[1:]
    assert resolved(*files, given=variables | {"SMOLORA_API_KEYS": "k"})["server"]["environment"] == {
        **resolved("docker/proxy/compose.yml")["server"]["environment"],
        "SMOLORA_API_KEYS": "k",
        "SMOLORA_ALLOWED_HOSTS": "localhost",
        "SMOLORA_PUBLIC_URL": "https://localhost:8443/smolora",
    }


def test_proxy_timeouts_match_the_servers() -> None:
    """The comments of the proxy's configuration say so."""
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
    """Check with nginx the configuration that `start` makes in the folder, which also has the certificates."""
    folder.mkdir()
    files = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost", *files]
    subprocess.run(command, capture_output=True, check=True)
    done = start_the_proxy(folder, f'PATH={SBIN}\nexec nginx -t "$@"', stdout)
    if 'unknown directive "http2"' in done.stderr:
        pytest.skip("needs nginx 1.25.1 or newer")
    assert done.returncode == 0, done.stderr
    return done.stderr


def start_the_proxy(folder: Path, script: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """Run `start` with the folder's certificates, and a script instead of nginx, in a session of their own."""
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
def test_proxy_starts_in_a_folder_with_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "certificates & keys | all"
    assert f"configuration file {folder}/nginx.conf test is successful" in look_at_the_proxy(folder)


@needs_nginx
def test_proxy_needs_no_root_folders(tmp_path: Path) -> None:
    """It creates folders at start, and can't write to the distribution's unless root created them before."""
    look_at_the_proxy(tmp_path / "run")
    made = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert made == {"body", "proxy", "fastcgi", "uwsgi", "scgi"}


@needs_nginx
def test_proxy_starts_if_its_output_is_a_socket(tmp_path: Path) -> None:
    """systemd's journal is a socket, which can't be opened by name."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        look_at_the_proxy(tmp_path / "run", theirs.fileno())
    assert (tmp_path / "run" / "access.log").is_fifo()


def test_proxy_log_is_read_despite_signals(tmp_path: Path) -> None:
    """SIGHUP tells nginx to reload certificates, and systemd sends it to all processes of a service. nginx itself
    keeps the pipe open, so without a reader it would block once the pipe is full."""
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
"""Settings with values of the image's own: the volume, the address in the container, the base inside."""
FIXED = {"server": {"workers"}, "server-gpu": {"device"}, "worker": set[str]()}
"""Variables of each service that callers can't change."""


@pytest.mark.parametrize("service", FIXED)
def test_every_setting_is_passed_on(service: str) -> None:
    """A setting's variable is passed on, and nothing else: a new setting needs a line here.

    The worker gets some that it doesn't use.
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
def test_object_store_variables_are_passed_on(service: str) -> None:
    """All variables that docs/settings.md names are passed on, only if they are set, and unchanged."""
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["environment"]
    named = set(re.findall(r"`(AWS_\w+)`", (ROOT / "docs" / "settings.md").read_text()))
    assert len(named) >= 5
    assert {written.get(name, "not passed on") for name in named} == {None}


@pytest.mark.parametrize("service", FIXED)
def test_unset_trace_sampler_stays_unset(service: str) -> None:
    """OpenTelemetry treats an empty value as an unknown sampler's name, of which each process warns."""
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["environment"]
    assert {name: written[name] for name in written if "SAMPLER" in name} == {
        "OTEL_TRACES_SAMPLER": None,
        "OTEL_TRACES_SAMPLER_ARG": None,
    }


def test_native_code_of_the_image_comes_with_the_wheel() -> None:
    """Only the build stage has the C++ compiler, and nothing needed for the wheel is ignored."""
    *_, build, last = DOCKERFILE.split("\nFROM ")
    assert build.index("install --yes --no-install-recommends g++") < build.index("pip wheel")
    assert "g++" not in last
    (files,) = re.findall(r"^COPY (.* setup\.py) \./$", build, re.MULTILINE)
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in (*files.split(), "adapters", "server")} <= set(allowed)


def test_gpu_image_compiles_triton_launchers(services: Mapping[str, Any]) -> None:
    """It has a C compiler and Python's headers, and caches libraries where they may be executed."""
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert re.search(
        r'^RUN \[ "\$TORCH" != torch-cuda \] \\\n.* install --yes .* gcc libc6-dev ', last, re.MULTILINE
    )
    (directory,) = re.findall(r"TRITON_CACHE_DIR=(\S+)", last)
    assert directory.startswith("/data/")
    assert re.search(r"^VOLUME /data$", last, re.MULTILINE)
    (volume,) = services["server-gpu"]["volumes"]
    assert volume == "home-gpu:/data" or (volume["target"], volume["type"]) == ("/data", "volume")


@pytest.mark.skipif(
    shutil.which("gcc") is None or find_spec("triton") is None, reason="needs gcc and the package triton"
)
@pytest.mark.parametrize(
    ("torch_stage", "part", "replacement", "builds"),
    [
        ("torch-cuda", "gcc ", "gcc ", True),
        ("torch-cuda", "gcc ", "false ", False),
        ("torch-cuda", '"-I$headers"', "", False),
        ("torch-cuda", '"-I$nvidia/include"', "", False),
        ("torch-cuda", 'find_spec("triton")', 'find_spec("no_triton")', False),
        ("torch", "gcc ", "false ", True),
    ],
)
def test_gpu_build_fails_without_what_triton_needs(
    torch_stage: str, part: str, replacement: str, builds: bool, tmp_path: Path
) -> None:
    """The build compiles the code with which the installed Triton loads and launches kernels."""
    *_, last = DOCKERFILE.split("\nFROM ")
    (check,) = re.findall(r"^RUN ((?:.*\\\n)+.*driver\.so; })$", last, re.MULTILINE)
    assert last.index("COPY --from=build /opt/venv") < last.index(check)
    assert "|| echo" not in last
    assert part in check
    check = check.replace(part, replacement)
    check = check.replace("/tmp/", f"{tmp_path}/").replace("/opt/venv/bin/python3", sys.executable)
    done = subprocess.run(["sh", "-c", check], env={**os.environ, "TORCH": torch_stage}, check=False)
    assert (done.returncode == 0) is builds
    assert list(tmp_path.iterdir()) == []


def test_image_user_can_read_copied_files() -> None:
    """With any umask of the checkout: files copied from it get modes in the image's build, others have the
    build's."""
    *_, last = DOCKERFILE.split("\nFROM ")
    copied = re.findall(r"^COPY (?!--from)\S+ (\S+)$", last, re.MULTILINE)
    assert copied
    assert copied == re.findall(r"^RUN chmod 0644 (\S+)$", last, re.MULTILINE)


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_setting_reaches_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes through compose and the environment; the address shown is the published one."""
    given = {"PORT": "9123", "MAX_QUEUE": "7", "ALLOW_HUB_ADAPTERS": "1", "NATIVE": "0", "MIN_FREE_BYTES": "1GiB"}
    server = resolved(given={f"SMOLORA_{name}": value for name, value in given.items()})["server"]
    (port,) = server["ports"]
    assert (port["host_ip"], port["target"], port["published"]) == ("127.0.0.1", 8000, "9123")
    for name, value in server["environment"].items():
        if value is not None:  # unset in the container
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
def test_every_container_has_configurable_limits() -> None:
    given = {f"{who}_{what}": "700" for who in ("SERVER", "WORKER", "PROXY") for what in ("PIDS",)}
    given |= {f"{who}_MEMORY": "900m" for who in ("SERVER", "WORKER", "PROXY")} | {"TMP_SIZE": "5m"}
    default, limited = resolved("docker/proxy/compose.yml"), resolved("docker/proxy/compose.yml", given=given)
    assert set(default) == {"server", "server-gpu", "worker", "proxy"}
    for name, service in default.items():
        assert 64 <= int(service["pids_limit"]) <= 512, name
        assert 256 << 20 <= int(service["mem_limit"]) <= 8 << 30, name
        assert int(limited[name]["pids_limit"]) == 700
        assert int(limited[name]["mem_limit"]) == 900 << 20
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        if name != "proxy":
            assert service["tmpfs"] == ["/tmp:size=64m,mode=1777,noexec,nosuid,nodev"]
            assert limited[name]["tmpfs"][0].startswith("/tmp:size=5m,")


@pytest.mark.skipif(compose_command() is None, reason="needs docker compose")
def test_containers_have_time_to_stop() -> None:
    """First requests drain, then the rest is handled; workers finish meanwhile."""
    for name, service in resolved().items():
        seconds = int(service["stop_grace_period"].removesuffix("s"))
        assert seconds > max(DRAIN_SECONDS + HURRY_SECONDS, GRACE_SECONDS) + 5, name


def stages() -> dict[str, str]:
    """Return each named stage of the Dockerfile and its base."""
    return {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}


def test_services_build_their_images(services: Mapping[str, Any]) -> None:
    """Nothing is pulled: `docker compose up server-gpu` alone builds what it runs."""
    for name, service in services.items():
        needed = [name, *service.get("depends_on", ())]
        built = {services[other]["image"] for other in needed if "build" in services[other]}
        assert service["image"] in built, name


def test_gpu_image_is_separate(services: Mapping[str, Any]) -> None:
    server, gpu = services["server"], services["server-gpu"]
    assert gpu["image"] != server["image"]
    assert gpu["build"]["args"]["TORCH"] == "torch-cuda"
    assert "TORCH" not in server["build"].get("args", {})
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["environment"]["SMOLORA_DEVICE"] == "cuda", "without one, a start says so instead of using the CPU"


def test_gpu_server_does_not_restart_without_a_gpu(services: Mapping[str, Any]) -> None:
    assert services["server"]["restart"] == "unless-stopped"
    assert re.fullmatch(r"on-failure:\d", services["server-gpu"]["restart"])


def test_both_torch_stages_lead_to_the_same_build() -> None:
    found = stages()
    assert re.search(r"^ARG TORCH=torch$", DOCKERFILE.split("FROM")[0], re.MULTILINE)
    assert found["build"] == "${TORCH}"
    assert found["torch-cuda"] == "torch"


def test_gpu_image_contains_no_cpu_build(tmp_path: Path) -> None:
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
def test_torch_without_cuda_fails_the_gpu_build_with_a_reason() -> None:
    (check,) = re.findall(r'^RUN (\[ -z "\$\{NEEDS_CUDA.*)$', DOCKERFILE, re.MULTILINE)
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["sh", "-c", check]
    assert subprocess.run(command, env={"PATH": python}, check=False).returncode == 0
    needed = {"PATH": python, "NEEDS_CUDA": "1"}
    found = subprocess.run(command, env=needed, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "has no CUDA here: put a wheel that has into docker/wheels" in found.stderr


@pytest.mark.thorough  # the settings alone are tested above
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_container_without_gpu_reports_it(tmp_path: Path, services: Mapping[str, Any]) -> None:
    """The server runs with the service's settings in a process instead of a container: exit code 1 and one
    line."""
    given = {name: str(value) for name, value in services["server-gpu"]["environment"].items() if value}
    given = {name: value for name, value in given.items() if "$" not in value}
    environment = {**os.environ, **given, "SMOLORA_HOME": str(tmp_path), "SMOLORA_PORT": "0"}
    command = [sys.executable, "-m", "server.cli", "serve"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SMOLORA_DEVICE=cuda: torch" in done.stderr
    assert "finds 0 CUDA devices" in done.stderr
    assert "Traceback" not in done.stderr
