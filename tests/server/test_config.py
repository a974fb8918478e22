"""Settings: the contract's defaults, the precedence of sources, and one line for each fault."""

import inspect
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import main as cli
from server.config import PREFIX, Settings, WorkerSettings, described, is_loopback, load
from server.config.environment import forget_keys
from server.config.operator_keys import OperatorKeys
from server.errors import StartupError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def test_defaults_are_the_contracts() -> None:
    settings = load(Settings)
    assert str(settings.home) == "data"
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "smollm2-135m-instruct")
    assert (settings.device, settings.dtype) == ("auto", "auto")
    assert (settings.max_num_seqs, settings.max_queue, settings.max_model_len) == (None, 256, None)
    assert (settings.kv_cache_bytes, settings.adapter_cache_bytes) == (None, None)
    assert (settings.api_keys, settings.allow_anonymous, settings.workers) == ((), "0", 1)
    assert (settings.train_share, settings.train_slice) == (0.25, 600)
    assert settings.threads is None


def test_workers_get_the_servers_number_of_threads() -> None:
    for given in (3, None):
        document = load(Settings, threads=given).of_a_worker.to_json()
        assert WorkerSettings.model_validate_json(document).threads == given


def test_environment_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLORA_PORT", "9000")
    monkeypatch.setenv("SMOLORA_API_KEYS", " the-first-of-keys, the-second-of-keys ,,")
    monkeypatch.setenv("SMOLORA_KV_CACHE_BYTES", "2GiB")
    monkeypatch.setenv("SMOLORA_MAX_MODEL_LEN", "")  # as compose passes unset variables
    monkeypatch.setenv("SMOLORA_ALLOW_ANONYMOUS", "1")
    settings = load(Settings, port=None, max_queue=7)
    assert (settings.port, settings.max_queue) == (9000, 7)
    assert settings.api_keys == ("the-first-of-keys", "the-second-of-keys")
    assert settings.kv_cache_bytes == 2 << 30
    assert settings.max_model_len is None
    assert settings.allows_guests
    assert load(Settings, port=1234).port == 1234  # a flag wins


@pytest.mark.parametrize(("given", "share"), [({}, 0.5), ({"workers": 2}, 0.25), ({"train_memory": 0.3}, 0.3)])
def test_workers_share_the_memory_for_training(given: dict[str, float], share: float) -> None:
    found = load(Settings, **given).of_a_worker
    assert found.train_memory == pytest.approx(share)
    assert WorkerSettings.model_validate_json(found.to_json()).train_memory == found.train_memory


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_memory", 1.0),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("port", 70000),
        ("max_num_seqs", 0),
        ("max_queue", -1),
        ("max_model_len", 1),
        ("kv_cache_bytes", "lots"),
        ("api_keys", "with blank"),
        ("workers", -1),
        ("host", "x" * 300),
        ("allow_anonymous", "sometimes"),
    ],
)
def test_a_bad_value_is_one_line_with_both_names(name: str, value: str | int) -> None:
    with pytest.raises(StartupError) as caught:
        load(Settings, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"SMOLORA_{name.upper()} (--{name.replace('_', '-')}): ")
    assert "\n" not in message


@pytest.mark.parametrize("name", sorted(WorkerSettings.model_fields | Settings.model_fields))
def test_a_bad_value_has_a_plain_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a pattern, which doesn't help with a superfluous /, and no terms of Python."""
    for value in ("?", "/", "a/", "https://lora.example.org/", "-1"):
        monkeypatch.setenv(f"{PREFIX}{name.upper()}", value)
        try:
            load(Settings)
        except StartupError as error:
            found = str(error)
            assert not any(word in found for word in ("pattern", "parse", "byte string", "[\\")), found


def test_a_port_set_by_kubernetes_gets_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets it in each pod if a service is called smolora."""
    monkeypatch.setenv("SMOLORA_PORT", "tcp://10.0.171.239:80")
    with pytest.raises(StartupError, match=r"SMOLORA_PORT \(--port\): .* enableServiceLinks: false"):
        load(Settings)


def test_keys_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable file, or one without a valid key, must not allow requests without keys."""
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    monkeypatch.setenv("SMOLORA_API_KEYS", f"@{file}")
    for content, reason in (
        *((b"", "has no keys"), (b"a b-0123456789012345\n", "without blanks"), (b"\xff\xfe", "not text")),
        (b"first-0123456789\nshort-789012345", "needs 16 characters or more"),
    ):
        file.write_bytes(content)
        with pytest.raises(StartupError, match=rf"SMOLORA_API_KEYS \(--api-keys\): .*{reason}"):
            load(Settings)
    file.write_text("first-0123456789\n\n second-0123456789 , third-0123456789\r\n")
    keys = OperatorKeys(load(Settings).api_keys)
    keys.refresh()
    assert keys.secrets == ("first-0123456789", "second-0123456789", "third-0123456789")
    file.unlink()
    with pytest.raises(StartupError, match=f"can't read the file {file}: No such file"):
        load(Settings)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o777])
def test_a_key_file_that_others_may_open_is_refused(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except a container's secret, whose mode the container can't choose."""
    file = tmp_path / "keys"
    file.write_text("first-0123456789")
    file.chmod(mode)
    with pytest.raises(
        StartupError, match=rf"\(mode {mode:o}\): chmod 600 {file}, or mount it under /run/secrets"
    ):
        load(Settings, api_keys=f"@{file}")
    monkeypatch.setattr("server.config.operator_keys._SECRETS", tmp_path)
    assert load(Settings, api_keys=f"@{file}").api_keys == (f"@{file}",)


@pytest.mark.parametrize("keys", ["a", "fifteen-letters", "first-0123456789,a", ("a",)])
def test_an_operators_key_has_16_characters(keys: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a key needs 16 characters or more: make one with openssl rand"):
        Settings.model_validate({"api_keys": keys})


@pytest.mark.parametrize("value", [",", " ", ", ,"])
def test_a_list_of_commas_is_refused_as_keys(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As "$FIRST,$SECOND" if neither is set."""
    monkeypatch.setenv("SMOLORA_API_KEYS", value)
    with pytest.raises(StartupError, match=r"SMOLORA_API_KEYS \(--api-keys\): has no keys"):
        load(Settings)


def test_no_child_gets_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLORA_API_KEYS", "one")
    monkeypatch.setenv("SMOLORA_API_KEY", "one")
    monkeypatch.setenv("SMOLORA_PORT", "1")
    forget_keys()
    assert [name for name in os.environ if name.startswith("SMOLORA_")] == ["SMOLORA_PORT"]


def test_the_databases_password_is_passed_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No document for workers, dump, error or printed text contains it."""
    url = "postgresql://me:hunter2@host/db"
    monkeypatch.setenv("SMOLORA_DATABASE_URL", url)
    settings = load(Settings)
    assert settings.database == url
    documents = (settings.of_a_worker.to_json(), str(settings.model_dump(mode="json")))
    assert not any("database_url" in document for document in documents)
    assert not any("hunter2" in text for text in (*documents, str(settings), repr(settings)))
    with pytest.raises(StartupError, match=r"SMOLORA_DATABASE_URL \(--database-url\): must be like") as caught:
        load(Settings, database_url="mysql://me:hunter2@host/db")
    assert "hunter2" not in str(caught.value)
    forget_keys()
    read = WorkerSettings.model_validate_json(documents[0])
    assert read.database == url, "workers find it in their environment"


def test_keys_never_show_in_the_error() -> None:
    with pytest.raises(StartupError) as caught:
        load(Settings, api_keys="very secret", port=-1)
    assert "very" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)


def test_every_setting_is_a_flag() -> None:
    assert set(inspect.signature(cli.serve).parameters) == set(Settings.model_fields)


def test_docs_settings_has_the_generated_table() -> None:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name in sorted(Settings.model_fields):
        meaning, default = described(Settings, name)
        rows.append(f"| `SMOLORA_{name.upper()}` | {default or 'none'} | {meaning} |".replace("*", "\\*"))
    table = "\n".join(rows)
    page = (Path(__file__).parent.parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    assert table in page, f"docs/settings.md needs this table:\n{table}"


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert "serve" in result.output


def test_a_public_address_is_one_that_clients_can_open() -> None:
    for url in ("https://lora.example.org/lora", "http://127.0.0.1:8000", "http://[::1]:80"):
        assert load(Settings, public_url=url).public_url == url
    for url in ("lora.example.org", "ftp://x", "https://", "https://a/?b", "https://a b", "https://a/"):
        with pytest.raises(StartupError, match=r"SMOLORA_PUBLIC_URL \(--public-url\)"):
            load(Settings, public_url=url)
