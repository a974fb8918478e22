"""bf16: the compiled programs, executed on the CPU, against torch's results that were accumulated in fp32."""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from server.model.cuda import attention, linear, lists, lora, rows, sampling
from server.model.cuda.variants import Variant, variants
from server.model.rank_rows import GROUPS
from tests.kits import kernels as kit
from tests.kits.kernels import ARCHITECTURES, FAMILY, PAGE, SMALL, Launch, executed
from tests.kits.ptx import Fault

BF16 = torch.bfloat16
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
QUICK = (90,)


@pytest.fixture(
    scope="module",
    params=[pytest.param(a, marks=[] if a in QUICK else pytest.mark.thorough) for a in ARCHITECTURES],
)
def launch(request: pytest.FixtureRequest) -> Launch:
    """Return a launch for each architecture."""
    return executed(request.param)


SMALL_NAMES = variants(SMALL, PAGE)


@pytest.mark.parametrize("product", PRODUCTS)
def test_products(launch: Launch, product: str) -> None:
    """A row has the same bits alone, in a batch, and in a tall program."""
    assert kit.check_linear(launch, SMALL_NAMES, BF16, product, 19) <= (1e-6 if product == "head" else 1)


@pytest.mark.parametrize("group", GROUPS)
def test_adapters_and_blends(launch: Launch, group: str) -> None:
    assert kit.check_lora(launch, SMALL_NAMES, SMALL, BF16, group) <= 1


def test_attention(launch: Launch) -> None:
    """Blocks without an owner, and positions that nobody wrote, are NaN."""
    assert kit.check_attention(launch, SMALL_NAMES, SMALL, BF16) <= 1


def test_rows_by_themselves(launch: Launch) -> None:
    assert kit.check_rows(launch, SMALL_NAMES, SMALL, BF16) <= 1


def test_lists(launch: Launch) -> None:
    kit.check_lists(launch, SMALL_NAMES)


def test_tokens(launch: Launch) -> None:
    kit.check_tokens(launch, SMALL_NAMES, SMALL)


@pytest.mark.thorough
@pytest.mark.parametrize(("size", "architecture"), [("135M", 80), ("360M", 86), ("1.7B", 90), ("3B", 100)])
def test_sizes_of_the_family(size: str, architecture: int) -> None:
    """Attention with groups of 3, 1 and 4, and heads of 64 and 128; products as long as they get."""
    config, launch = FAMILY[size], executed(architecture)
    names = variants(config, PAGE)
    assert kit.check_attention(launch, names, config, BF16) <= 1
    assert kit.check_rows(launch, names, config, BF16) <= 1
    kit.check_tokens(launch, names, config)
    assert kit.check_linear(launch, names, BF16, "o", 3) <= 1
    if size == "135M":
        assert kit.check_linear(launch, names, BF16, "down", 37) <= 1
        assert kit.check_lora(launch, names, config, BF16, "qkv") <= 1


@dataclass(frozen=True)
class Planted:
    """A fault in a module of kernels: the source, its replacement, and how the check of the module finds it."""

    module: ModuleType
    original: str
    replacement: str
    found: str  # a regular expression
    error: type[Exception] = AssertionError


NOT_FINITE, OFF, COMPANY = "isn't finite", "units in the last place off", "bits depend on the batch"
FAULTS = {
    "no mask of tokens": Planted(
        linear,
        "mask=rows[:, None] < M, other=0.0)\n    return",
        "mask=None)\n    return",
        r"outside of all buffers: cp\.async",
        Fault,
    ),
    "tokens of the next chunk": Planted(
        lora,
        "mask=m[:, None] < tokens, other=0.0)\n            a =",
        "mask=m[:, None] < 16, other=0.0)\n            a =",
        r"outside of all buffers: cp\.async",
        Fault,
    ),
    "no mask of ranks in shrink": Planted(lora, "mask=m[None, :] < rank", "mask=m[None, :] < 16", NOT_FINITE),
    "no mask of ranks in expand": Planted(
        lora, "mask=m[:, None] < rank,\n", "mask=m[:, None] < 16,\n", NOT_FINITE
    ),
    "no mask of values": Planted(
        attention,
        "mask=exists[:, None], other=0.0)\n            acc",
        "mask=p[:, None] >= 0, other=0.0)\n            acc",
        NOT_FINITE,
    ),
    "no causal mask": Planted(
        attention,
        "live[:, None] & (p[None, :] <= (position + token)[:, None])",
        "live[:, None] & exists[None, :]",
        COMPANY,
    ),
    "a wrong running maximum": Planted(attention, "top = new_top", "top = tl.max(scores, 1)", OFF),
    "a part that isn't rescaled": Planted(attention, "acc * shrink[:, None], input", "acc, input", OFF),
    "weights that are cut off instead of rounded": Planted(
        attention,
        "e.to(values.dtype)",
        "(e.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True).to(values.dtype)",
        OFF,
    ),
    "parts that are joined without weights": Planted(attention, "acc += weight * tl.load", "acc += tl.load", OFF),
    "another epsilon": Planted(rows, "/ D + EPS", "/ D + 0.1", OFF),
    "sines of the wrong sign": Planted(rows, "sin + position * DIM + half + d", "sin + position * DIM + d", OFF),
    "words of the next list": Planted(
        lists,
        "lists + place + i, words, mask=i < num_words",
        "lists + place + i, words",
        "another program wrote this: st",
        Fault,
    ),
    "noise of another token": Planted(
        sampling, "h = t.to(tl.uint32) ^ key0", "h = (t + 1).to(tl.uint32) ^ key0", "another token"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    planted = FAULTS[fault]
    broken = kit.changed(planted.module, planted.original, planted.replacement)
    names = {name: _of(broken, variant) for name, variant in SMALL_NAMES.items()}
    with pytest.raises(planted.error, match=planted.found):
        check(planted.module, executed(90), names)


def check(module: ModuleType, launch: Launch, names: kit.Names) -> None:
    error = 0.0
    if module is linear:
        error = kit.check_linear(launch, names, BF16, "o", 19)
    elif module is lora:
        error = kit.check_lora(launch, names, SMALL, BF16, "qkv")
    elif module is attention:
        error = kit.check_attention(launch, names, SMALL, BF16)
    elif module is rows:
        error = kit.check_rows(launch, names, SMALL, BF16)
    elif module is lists:
        kit.check_lists(launch, names)
    else:
        kit.check_tokens(launch, names, SMALL)
    assert error <= 1, f"{error} units in the last place off"


def _of(module: ModuleType, variant: Variant) -> Variant:
    """Return the variant with the module's kernel of the same name, if it has one."""
    name = variant.kernel.__name__
    return Variant(
        getattr(module, name, variant.kernel),
        variant.types,
        variant.constants,
        variant.num_warps,
        variant.num_stages,
    )
