"""The description of the processor in reports."""

from dataclasses import replace

import pytest

from benchmarks import machine
from benchmarks.machine import cpu_family, cpu_name
from tests.benchmarks.kit import MACHINE

EPYC = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name", "family"),
    [
        (EPYC, "AMD EPYC", "family 25, model 17"),
        (
            "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n",
            "unknown CPU",
            "",
        ),  # as Linux reports it on ARM
    ],
)
def test_ambiguous_processor_names_include_the_family(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str, name: str, family: str
) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", cpuinfo.splitlines)

    assert (cpu_name(), cpu_family()) == (name, family)


def test_known_family_is_printed() -> None:
    assert str(MACHINE).startswith("A CPU, 2 threads")
    assert str(replace(MACHINE, cpu_family="family 25, model 17")).startswith(
        "A CPU of family 25, model 17, 2 threads"
    )
