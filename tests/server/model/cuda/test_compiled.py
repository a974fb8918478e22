"""What Triton and ptxas make of the kernels, for real GPUs and for every size of SmolLM."""

import shutil
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

from server.model.base.config import ModelConfig
from server.model.cuda.variants import BLOCK_K, variants, why_not
from tests.kits.kernels import ARCHITECTURES, FAMILY, NVIDIA, SMALL, compile_variant

DOT = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
WITHOUT_DOTS = {"attention_combine", "rms_norm", "rotary_write", "swiglu", "gumbel_argmax", "place_lists"}


def quick_on(architecture: int, size: str) -> bool:
    return (architecture, size) in {(80, "135M"), (90, "135M"), (120, "135M")}


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        pytest.param(architecture, size, marks=[] if quick_on(architecture, size) else pytest.mark.thorough)
        for size in FAMILY
        for architecture in ARCHITECTURES
    ],
)
def test_every_kernel_fits_and_uses_one_kind_of_dot(architecture: int, size: str) -> None:
    """Dots of 16 rows are the same instruction on all GPUs, which larger tiles wouldn't be."""
    faults = {}
    for name, variant in variants(FAMILY[size], page=16).items():
        made = compile_variant(variant, architecture)
        dots = set() if name.split(",")[0] in WITHOUT_DOTS else {DOT}
        if made.registers > 128 or made.stack or made.shared > 65_536 or made.products != dots or made.is_atomic:
            faults[name] = (made.registers, made.stack, made.shared, made.products, made.is_atomic)
    assert not faults


@pytest.mark.parametrize("config", [*FAMILY.values(), SMALL])
def test_sizes_fit_the_blocks(config: ModelConfig) -> None:
    """The kernels don't mask what lies beyond these sizes, since nothing does."""
    for name, variant in variants(config, 16).items():
        constants = variant.constants
        if name.startswith(("linear", "lora_shrink")):
            assert constants["K"] % constants["BLOCK_K"] == 0, name
        if name.startswith("linear"):
            assert constants["N"] % constants["BLOCK_N"] == 0, name
        if name.startswith("lora_expand"):
            assert all(constants[start] % constants["BLOCK_N"] == 0 for start in ("OUT", "OUT1", "OUT2")), name


def test_a_row_has_one_order_of_sums_at_any_height() -> None:
    """A block of another size along K would change it."""
    for config in FAMILY.values():
        for variant in variants(config, 16).values():
            assert variant.constants.get("BLOCK_K", BLOCK_K) == BLOCK_K


def test_unsupported_sizes_are_named() -> None:
    assert all(why_not(config) is None for config in FAMILY.values())
    assert why_not(replace(SMALL, hidden_size=96)) == "hidden_size 96 is no multiple of 64"
    assert why_not(replace(SMALL, head_dim=48)) == "q_size 288 is no multiple of 64"
    assert (
        why_not(replace(SMALL, num_kv_heads=3, head_dim=16, num_heads=12)) == "2 · kv_size 96 is no multiple of 64"
    )
    assert why_not(replace(SMALL, num_heads=34 * 2)) == "more than 16 query heads share a key head"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_code_that_launches_kernels_compiles(tmp_path: Path) -> None:
    """Triton compiles it when a GPU first runs a kernel, for which the image has a compiler."""
    include = [f"-I{NVIDIA / 'include'}", f"-I{sysconfig.get_path('include')}"]
    target = tmp_path / "driver.so"
    command = ["gcc", "-shared", "-fPIC", "-w", *include, str(NVIDIA / "driver.c"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 1000
