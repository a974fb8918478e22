"""The systemd unit: valid and locked down by systemd's own check, and consistent with the server's shutdown."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from server.cluster.node import STOP_SECONDS
from server.config import Limits, Settings
from server.jobs.supervisor import GRACE_SECONDS
from server.serve.process import DRAIN_SECONDS, HURRY_SECONDS

UNIT = Path(__file__).parent.parent / "docker" / "systemd" / "smolora.service"
CLUSTER = UNIT.with_name("smolora-cluster.service")
MOST_EXPOSED = 15
"""Upper bound of systemd's exposure score out of 100: the unit has 13, an empty unit 96."""
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


def with_paths(unit: Path, target: Path) -> Path:
    """Return the unit with this environment's paths, in the folder `target`."""
    smolora = Path(sys.executable).with_name("smolora")
    text = unit.read_text()
    assert text.count("/opt/smolora/.venv/bin/smolora") == 1
    (target / unit.name).write_text(text.replace("/opt/smolora/.venv/bin/smolora", str(smolora)))
    return target / unit.name


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    return with_paths(UNIT, tmp_path)


def settings(unit: Path = UNIT) -> Mapping[str, str]:
    """Return the unit's settings by name; of a repeated setting, the last."""
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
def test_unit_is_valid(installed: Path) -> None:
    done = analyze("verify", "--man=no", installed)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_invalid_unit_is_found(installed: Path) -> None:
    installed.write_text(installed.read_text().replace("KillMode=mixed", "KillMode=gently"))
    assert "gently" in analyze("verify", "--man=no", installed).stderr


@needs_systemd
def test_unit_is_sandboxed(installed: Path) -> None:
    security = ("security", "--offline=true", "--no-pager")
    done = analyze(*security, f"--threshold={MOST_EXPOSED}", installed)
    assert done.returncode == 0, done.stdout
    open_one = re.sub(
        r"^(Protect|Restrict|Private|System|Capab).*$", "", installed.read_text(), flags=re.MULTILINE
    )
    installed.write_text(open_one)
    assert analyze(*security, f"--threshold={MOST_EXPOSED}", installed).returncode != 0


def test_unit_allows_time_to_stop() -> None:
    unit = settings()
    assert (unit["KillMode"], unit["KillSignal"]) == ("mixed", "SIGTERM"), "the server tells its workers itself"
    assert int(unit["TimeoutStopSec"]) > max(DRAIN_SECONDS + HURRY_SECONDS, GRACE_SECONDS) + 5
    assert unit["Restart"] == "on-failure"
    assert unit["SuccessExitStatus"] == "143"


def test_unit_waits_until_the_server_is_ready_and_watches_it() -> None:
    unit = settings()
    assert unit["Type"] == "notify"
    assert int(unit["TimeoutStartSec"]) >= 600, "the first start converts the base"
    assert int(unit["WatchdogSec"]) > DRAIN_SECONDS + GRACE_SECONDS, "nothing is sent while workers end"
    assert unit["LimitCORE"] == "0", "the watchdog's SIGABRT would dump keys and prompts"
    assert unit["ExecReload"] == "/bin/kill -USR1 $MAINPID"
    assert "AF_UNIX" in unit["RestrictAddressFamilies"]


def test_unit_limits_cover_the_servers_needs() -> None:
    unit = settings()
    assert int(unit["LimitNOFILE"]) > 4 * Limits().max_connections
    assert f"SMOLORA_HOME={unit['WorkingDirectory']}" in UNIT.read_text()
    assert unit["WorkingDirectory"] == f"/var/lib/{unit['StateDirectory']}"
    named = set(re.findall(r"SMOLORA_([A-Z_]+)=", UNIT.read_text()))
    assert {name.lower() for name in named} <= set(Settings.model_fields)


@needs_systemd
def test_a_clusters_unit_is_valid(tmp_path: Path) -> None:
    done = analyze("verify", "--man=no", with_paths(CLUSTER, tmp_path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_clusters_unit_starts_up_and_lets_it_stop() -> None:
    unit = settings(CLUSTER)
    assert unit["ExecStart"] == "/opt/smolora/.venv/bin/smolora cluster up $CLUSTER_UP"
    assert (unit["KillMode"], unit["KillSignal"], unit["Restart"]) == ("mixed", "SIGTERM", "on-failure")
    assert unit["StartLimitIntervalSec"] == "0", "it waits for the machine where the cluster began"
    assert int(unit["TimeoutStopSec"]) > 45 + STOP_SECONDS
    assert unit["LimitCORE"] == "0"
    assert f"SMOLORA_HOME={unit['WorkingDirectory']}" in CLUSTER.read_text()
