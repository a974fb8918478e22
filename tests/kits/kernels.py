"""Checks of the Triton kernels against their torch forms, without a GPU.

A check takes a `Launch`: Triton's interpreter, or compiled PTX that runs on the CPU. The kernel and the torch form
get the same inputs. A check returns the largest error. It raises AssertionError if a row's bits depend on company.
"""

import importlib.util
import math
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapters.lora import BaseShape
from server.model.base.config import ModelConfig
from server.model.cuda import lists, lora
from server.model.cuda.attention import attention_in_torch
from server.model.cuda.linear import linear_in_torch
from server.model.cuda.rows import rms_norm_in_torch, rotary_write_in_torch, swiglu_in_torch
from server.model.cuda.sampling import gumbel_argmax_in_torch
from server.model.cuda.variants import Variant
from server.model.cuda.work import attention_work, lora_work
from server.model.lora_batch import Parts, TokenRun
from server.model.ops.norms import rotary_table
from server.model.rank_rows import RankRows, RowFormat
from tests.kits import ptx
from tests.kits.engines import place, random_adapter

PAGE = 16
Launch = Callable[[Variant, tuple[int, ...], Sequence[torch.Tensor]], None]
Names = Mapping[str, Variant]


def _config(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, dim: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        nope_layers=frozenset(),
        eos_token_ids=(2,),
    )


FAMILY = {
    "135M": _config(576, 1536, 30, 9, 3, 64, 49_152),
    "360M": _config(960, 2560, 32, 15, 5, 64, 49_152),
    "1.7B": _config(2048, 8192, 24, 32, 32, 64, 49_152),
    "3B": replace(_config(2048, 11_008, 36, 16, 4, 128, 128_256), nope_layers=frozenset({3, 7})),
}
"""The sizes of SmolLM and SmolLM2, and of SmolLM3."""
SMALL = _config(128, 192, 2, 6, 2, 32, 1024)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"
"""Triton's code and tools for NVIDIA's GPUs."""


@dataclass(frozen=True)
class Compiled:
    """What Triton and ptxas made of a variant."""

    ptx: str
    shared: int  # bytes of a program
    registers: int  # of a thread
    stack: int  # bytes of a thread, spilled registers among them

    @property
    def products(self) -> set[str]:
        """The opcodes of tensor cores."""
        return set(re.findall(r"\b((?:mma|wgmma|tcgen05|wmma)\.[\w.:]+)", self.ptx))

    @property
    def is_atomic(self) -> bool:
        return re.search(r"\b(atom|red)\.", self.ptx) is not None


def compile_variant(variant: Variant, architecture: int, dtype: str = "bf16") -> Compiled:
    """Compile a variant for an architecture of NVIDIA, as the first launch on such a GPU would."""
    kernel: Any = variant.kernel
    types = iter(variant.types)
    signature = {
        name: "constexpr" if name in variant.constants else "*" + next(types).replace("T", dtype)
        for name in kernel.arg_names
    }
    place = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place[name],): value for name, value in variant.constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for name, i in place.items() if name not in variant.constants
        },  # torch's allocations are aligned
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(NVIDIA / "bin" / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(made.asm["ptx"], made.metadata.shared, registers, stack + local)


def executed(architecture: int) -> Launch:
    """Return a launch that executes on the CPU what is compiled for an architecture."""
    programs: dict[tuple[object, ...], tuple[ptx.Program, int]] = {}

    def launch(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
        key = (variant.kernel, *variant.constants.items())
        if key not in programs:
            compiled = compile_variant(variant, architecture)
            programs[key] = ptx.Program(compiled.ptx), compiled.shared
        program, shared = programs[key]
        arrays = [_bits(tensor) for tensor in tensors]
        ptx.launch(program, grid, arrays, shared)
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.copy_(torch.from_numpy(array).view(tensor.dtype).view(tensor.shape))

    return launch


def interpreted(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
    """Launch in Triton's interpreter. The process must have begun with TRITON_INTERPRET=1."""
    variant.kernel[grid](*tensors, **variant.constants)


def in_torch() -> Launch:
    """Return a launch that runs the kernels' torch forms instead."""
    attended: list[torch.Tensor] = []

    def launch(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
        constants: Any = variant.constants
        name, (first, *others) = variant.kernel.__name__, tensors
        if name == "linear":
            w, residual, y, count = others
            linear_in_torch(first, w, residual if constants["HAS_RESIDUAL"] else None, y, count)
        elif name == "lora_shrink":
            lora.lora_shrink_in_torch(first, *others)
        elif name == "lora_expand":
            starts = (0, constants["OUT1"], constants["OUT2"])[: constants["MODULES"]]
            lora.lora_expand_in_torch(first, *others, (*starts, constants["OUT"]))  # type: ignore[arg-type,call-arg]
        elif name == "attention_split":
            k_cache, v_cache, tables, works, count = others[:5]
            out = torch.full_like(first, math.nan)
            scale = constants["SCALE"] * math.log(2)
            attention_in_torch(first, k_cache, v_cache, tables, works[: int(count)], out, scale)
            attended[:] = [out]
        elif name == "attention_combine":
            tensors[-1].copy_(attended[0])
        elif name == "rms_norm":
            rms_norm_in_torch(first, *others, constants["EPS"])  # type: ignore[arg-type,call-arg]
        elif name == "rotary_write":
            caches = [cache.flatten(0, -3) for cache in others[-2:]]
            rotary_write_in_torch(first, *others[:-2], *caches, is_rotary=constants["IS_ROTARY"])
        elif name == "swiglu":
            swiglu_in_torch(first, *others)
        elif name == "place_lists":
            lists.place_lists_in_torch(first, *others, grid[1])  # type: ignore[arg-type,call-arg]
        else:
            assert name == "gumbel_argmax"
            words, tokens = others
            gumbel_argmax_in_torch(first, words, tokens, _noise(words[:, 1:], first.shape[1]))

    return launch


def _bits(tensor: torch.Tensor) -> ptx.Array:
    """Return a copy of the tensor for numpy, which has no bf16."""
    copied = tensor.detach().clone().contiguous()
    return (copied.view(torch.int16) if tensor.dtype is torch.bfloat16 else copied).numpy()


def error_of(
    found: torch.Tensor, expected: torch.Tensor, *, is_mean: bool = False, is_same_order: bool = False
) -> float:
    """Return the largest error: in units in the last place for bf16, else relative to the largest number.

    Numbers below 1/256 of the largest one count like that. They are what is left when larger numbers cancel out.
    The numbers of a mean with rounded weights (`is_mean`) count like the largest one of their vector. If both sums
    have the same order and rounding (`is_same_order`), every number counts by itself.
    """
    assert found.isfinite().all(), "a result isn't finite"
    error, expected = (found.double() - expected.double()).abs(), expected.double().abs()
    if found.dtype is not torch.bfloat16:
        return float(error.max() / expected.max())
    least = expected.amax(-1, keepdim=True) if is_mean else expected.max() / 256
    if is_same_order:
        least = torch.full_like(least, torch.finfo(torch.bfloat16).tiny)
    _, exponent = torch.frexp(torch.maximum(expected, least))
    return float((error / torch.ldexp(torch.ones_like(error), exponent - 8)).max())


def check_linear(launch: Launch, names: Names, dtype: torch.dtype, product: str, num_tokens: int) -> float:
    """Check a product with all rows at once, short and tall, and each row's bits alone."""
    short, tall = (names[f"linear {product}, {height}"] for height in ("short", "tall"))
    out, inputs = int(short.constants["N"]), int(short.constants["K"])
    x, w = _random(num_tokens, inputs, dtype=dtype), _random(out, inputs, dtype=dtype) / inputs**0.5
    y_dtype = torch.float32 if short.types[3] == "fp32" else dtype
    residual = _random(num_tokens, out, dtype=dtype)

    def run(variant: Variant, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        num, height = len(x), 64 if variant is tall else 16
        y = torch.full((num, out), math.nan, dtype=y_dtype)
        grid = (out // int(variant.constants["BLOCK_N"]), -(-num // height) + 1)  # a graph's grid may be larger
        launch(variant, grid, (x, w, residual, y, torch.tensor([num], dtype=torch.int32)))
        return y

    found = run(short, x, residual)
    assert torch.equal(run(tall, x, residual), found), "a tall program rounds differently"
    for row in {0, num_tokens - 1}:
        alone = run(short, x[row : row + 1], residual[row : row + 1])
        assert torch.equal(alone[0], found[row]), "a row's bits depend on the batch"
    expected = torch.empty_like(found)
    has_residual = bool(short.constants["HAS_RESIDUAL"])
    linear_in_torch(x, w, residual if has_residual else None, expected, torch.tensor([num_tokens]))
    return error_of(found, expected)


Request = tuple[int, tuple[tuple[int, float], ...]]
"""How many tokens, and the adapters with their weights."""

REQUESTS: tuple[Request, ...] = (
    (1, ((0, 1.0),)),
    (1, ((1, 0.7), (3, -0.4))),
    (5, ()),
    (20, ((2, 1.0), (0, 0.5), (1, -1.0))),
    (3, ((3, 1.0),)),
    (1, ((4, 2.0),)),
)


def check_lora(launch: Launch, names: Names, config: ModelConfig, dtype: torch.dtype, group: str) -> float:
    """Check adapters of several ranks and blends in one batch, and one request's bits alone."""
    shape = BaseShape(1, config.shape.features)
    rows = RankRows(shape, max_rank=96, row_format=RowFormat(dtype, dtype), device=torch.device("cpu"))
    adapters = [
        *(random_adapter(shape, i, rank=rank) for i, rank in enumerate((1, 8, 16, 33))),
        random_adapter(shape, 4, rank=5, modules=["v_proj", "o_proj", "up_proj"]),
    ]
    placements = place(rows, adapters)  # all other rows are NaN
    shrink, expand = names[f"lora_shrink {group}"], names[f"lora_expand {group}"]
    layout = rows.layouts[group]
    starts = [0]
    for size in layout.out_features.values():
        starts.append(starts[-1] + size)
    num_tokens = sum(num for num, _ in REQUESTS)
    inputs, outputs = (
        _random(num_tokens, layout.in_features, dtype=dtype),
        _random(num_tokens, starts[-1], dtype=dtype),
    )
    a_rows, b_units = rows.a[group][0], rows.b[group][0]
    errors: list[float] = []

    def run(
        requests: Sequence[Request], x: torch.Tensor, y: torch.Tensor, is_checked: bool = False
    ) -> torch.Tensor:
        runs, start = [], 0
        for num, blend in requests:
            parts: Parts = tuple((placements[adapter], weight) for adapter, weight in blend)
            runs += [TokenRun(start, start + num, parts)] if parts else []
            start += num
        all_chunks, groups = lora_work(runs, rows.layouts)
        chunks, items, ranges = map(torch.from_numpy, (all_chunks, groups[group].items, groups[group].ranges))
        num_items, num_chunks = (torch.tensor([len(list_)], dtype=torch.int32) for list_ in (items, chunks))
        items = torch.cat((items, torch.full((3, lora.FIELDS), 1 << 30, dtype=torch.int32)))  # beyond the count
        hidden, y = torch.full((len(items), lora.TILE, lora.TILE), math.nan, dtype=dtype), y.clone()
        launch(shrink, (7,), (x, a_rows, items, num_items, hidden))
        if is_checked:
            expected = hidden.clone()
            lora.lora_shrink_in_torch(x, a_rows, items, num_items, expected)
            errors.append(error_of(hidden[:-3], expected[:-3]))
            expected = y.clone()
            lora.lora_expand_in_torch(hidden, b_units, items, ranges, chunks, num_chunks, expected, tuple(starts))
        launch(expand, (7,), (hidden, b_units, items, ranges, chunks, num_chunks, y))
        if is_checked:
            errors.append(error_of(y, expected))
        return y

    found, first = run(REQUESTS, inputs, outputs, is_checked=True), 0
    for request in REQUESTS:
        own = slice(first, first + request[0])
        alone = run([request], inputs[own], outputs[own]) if request[1] else outputs[own]
        assert torch.equal(alone, found[own]), "a request's bits depend on the batch"
        first = own.stop
    return max(errors)


SEQUENCES = ((0, 13), (300, 1), (37, 1), (255, 7), (511, 1), (512, 1), (250, 12))
"""The first new position of each sequence, and how many new tokens it has."""


def _dot_by_16(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """Return acc + a (tokens, heads, n) b (heads, n, m). Each 16 terms are rounded once, to fp32."""
    for first in range(0, a.shape[-1], 16):
        terms = slice(first, first + 16)
        acc = (torch.einsum("thn,hnm->thm", a[..., terms].double(), b[:, terms].double()) + acc).float()
    return acc


def attention_by_blocks(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    works: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Compute attention in fp32 in the kernels' order: running maxima over blocks of 32, and splits of 256.

    The weights of a block are rounded to the values' dtype, as tensor cores need. `scale` includes log2(e).
    """
    group, low = q.shape[1] // k_cache.shape[2], float("-inf")
    for row, tokens, position, table in works[works[:, 4] == 0, :4].tolist():
        pages = tables[table : table - (-(position + tokens) // k_cache.shape[1])].long()
        keys, values = (
            cache[pages].flatten(0, 1)[: position + tokens].float().repeat_interleave(group, 1)
            for cache in (k_cache, v_cache)
        )
        queries = q[row : row + tokens].float()
        last = (position + torch.arange(tokens))[:, None, None]
        parts, lses = [], []  # of each split: (tokens, heads, dim) and (tokens, heads)
        for split in range(0, position + tokens, 256):
            top, total = (torch.full(q[:tokens, :, 0].shape, number) for number in (low, 0.0))
            acc = torch.zeros_like(queries)
            for start in range(split, min(split + 256, position + tokens), 32):
                seen = slice(start, min(start + 32, position + tokens))
                scores = _dot_by_16(queries, keys[seen].permute(1, 2, 0), torch.zeros(())) * scale
                scores = scores.masked_fill(torch.arange(seen.start, seen.stop) > last, low)
                new_top = torch.maximum(top, scores.amax(-1))
                finite = new_top.masked_fill(new_top == low, 0.0)
                e = torch.exp2(scores - finite[..., None])
                shrink = torch.exp2(top - finite)
                total = total * shrink + e.sum(-1)
                weights = e.to(v_cache.dtype).float()
                acc = _dot_by_16(weights, values[seen].transpose(0, 1), acc * shrink[..., None])
                top = new_top
            parts.append(torch.where(total > 0, 1 / total, 0.0)[..., None] * acc)
            lses.append(torch.where(total > 0, top + total.log2(), low))
        weights = torch.exp2(torch.stack(lses) - torch.stack(lses).amax(0))[..., None]
        out[row : row + tokens] = ((weights * torch.stack(parts)).sum(0) / weights.sum(0)).to(out.dtype)


def check_attention(launch: Launch, names: Names, config: ModelConfig, dtype: torch.dtype) -> float:
    """Check decodes and prefills over cached prefixes, and tokens' bits alone. What nobody wrote is NaN."""
    split, combine = names["attention_split"], names["attention_combine"]
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    pages = iter(random.Random(2).sample(range(1, 200), 199))
    tables = torch.zeros(len(SEQUENCES), 64, dtype=torch.int32)
    caches = [torch.full((200, PAGE, kv_heads, dim), math.nan, dtype=dtype) for _ in range(2)]
    for row, (start, new) in enumerate(SEQUENCES):
        for page in range(-(-(start + new) // PAGE)):
            tables[row, page] = next(pages)
            written = min(PAGE, start + new - page * PAGE)
            for cache_ in caches:
                cache_[tables[row, page], :written] = _random(written, kv_heads, dim, dtype=dtype)
    q = _random(sum(new for _, new in SEQUENCES), heads, dim, dtype=dtype)
    heads_of = slice(None, None, heads // kv_heads)
    far = 140 * dim**-0.5  # makes a score some 200 above all later ones, where exp2 overflows at 128
    if dtype is torch.bfloat16:  # large scores are known less exactly than fp32's bound on the error
        caches[0][tables[1, 0], 3] = far * q[SEQUENCES[0][1], heads_of]
    by_softmax, by_blocks = torch.full_like(q, math.nan), torch.full_like(q, math.nan)

    def run(q: torch.Tensor, tables: torch.Tensor, sequences: Sequence[tuple[int, int]]) -> torch.Tensor:
        starts, stops = [a for a, _ in sequences], [a + n for a, n in sequences]
        work = attention_work(starts, stops, [64 * row for row in range(len(starts))], heads // kv_heads)
        works, parts = torch.from_numpy(work.works), torch.from_numpy(work.parts)
        part_out, part_lse = (
            torch.full((work.num_parts, heads, dim), math.nan),
            torch.full((work.num_parts, heads), math.nan),
        )
        num_works = torch.tensor([len(works)], dtype=torch.int32)
        out = torch.full_like(q, math.nan)
        launch(split, (5, kv_heads), (q, *caches, tables.flatten(), works, num_works, part_out, part_lse))
        launch(combine, (len(q), heads), (part_out, part_lse, parts, out))
        if len(sequences) == len(SEQUENCES):
            given = (q, caches[0], caches[1], tables.flatten(), works)
            attention_in_torch(*given, by_softmax, dim**-0.5)
            attention_by_blocks(*given, by_blocks, dim**-0.5 / math.log(2))
        return out

    found, first = run(q, tables, SEQUENCES), 0
    assert found.isfinite().all(), "a result isn't finite"
    for row, (start, new) in enumerate(SEQUENCES):
        for i in {0, new - 1}:
            own = first + i
            alone = run(q[own : own + 1], tables[row : row + 1], [(start + i, 1)])
            assert torch.equal(alone[0], found[own]), "a token's bits depend on the batch"
        first += new
    return max(error_of(found, by_softmax, is_mean=True), error_of(found, by_blocks, is_same_order=True))


def check_rows(launch: Launch, names: Names, config: ModelConfig, dtype: torch.dtype) -> float:
    """Check the norm, rotary embedding with the cache's write, and the gate."""
    tokens, heads, kv_heads, dim = 5, config.num_heads, config.num_kv_heads, config.head_dim
    x, weight = _random(tokens, config.hidden_size, dtype=dtype), _random(config.hidden_size, dtype=dtype)
    y, expected = torch.full_like(x, math.nan), torch.empty_like(x)
    launch(names["rms_norm"], (tokens,), (x, weight, y))
    rms_norm_in_torch(x, weight, expected, config.rms_norm_eps)
    errors = [error_of(y, expected)]

    gate_up = _random(tokens, 2 * config.intermediate_size, dtype=dtype)
    y, expected = (torch.full((tokens, config.intermediate_size), math.nan, dtype=dtype) for _ in range(2))
    swiglu = names["swiglu"]
    launch(swiglu, (tokens, -(-config.intermediate_size // int(swiglu.constants["BLOCK"]))), (gate_up, y))
    swiglu_in_torch(gate_up, expected)
    errors.append(error_of(y, expected))

    qkv = _random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    cos, sin = rotary_table(700, dim, config.rope_theta).to(dtype)
    positions = torch.tensor([0, 1, 699, 77, 300], dtype=torch.int32)
    slots = torch.tensor([5, 0, 79, 33, 32], dtype=torch.int32)
    for name in filter(lambda name: name.startswith("rotary_write"), names):
        found, want = (
            [torch.zeros(size, dtype=dtype) for size in ((tokens, heads, dim), *[(80, kv_heads, dim)] * 2)]
            for _ in range(2)
        )
        launch(names[name], (tokens, heads + 2 * kv_heads), (qkv, cos, sin, positions, slots, *found))
        is_rotary = bool(names[name].constants["IS_ROTARY"])
        rotary_write_in_torch(qkv, cos, sin, positions, slots, *want, is_rotary=is_rotary)
        errors += map(error_of, found, want)
    return max(errors)


def check_lists(launch: Launch, names: Names) -> None:
    """Check the copy of lists to fixed places: empty, short, and longer than a block, by several programs."""
    lengths, places = (5, 0, 2500, 1024), (4, 60, 100, 3000)
    header, begin = [], -(-lists.HEADER * len(lengths) // 4) * 4
    for length, place_ in zip(lengths, places, strict=True):
        header += [begin, length, place_]
        begin += -(-length // 4) * 4
    packed = torch.arange(7, begin + 7, dtype=torch.int32)
    packed[: len(header)] = torch.tensor(header, dtype=torch.int32)
    found, expected = (torch.full((4100,), -1, dtype=torch.int32) for _ in range(2))
    launch(names["place_lists"], (2, len(lengths)), (packed, found))
    lists.place_lists_in_torch(packed, expected, len(lengths))
    assert torch.equal(found, expected), "a list differs"
    assert int((found >= 0).sum()) == sum(lengths)


def check_tokens(launch: Launch, names: Names, config: ModelConfig) -> None:
    """Check greedy and drawn tokens, ties, masked tokens, and rows without a number."""
    logits = torch.randn(8, config.vocab_size, generator=torch.Generator().manual_seed(5))
    logits[3, 70] = logits[3, 900] = 99.0
    logits[4, 1:] = -math.inf
    logits[5, 17] = math.nan
    logits[6] = -math.inf
    temperatures = torch.tensor([0.0, 0.8, 1.3, 0.0, 1.0, 0.0, 1.0, 1e-6])
    keys = torch.randint(
        -(2**31), 2**31 - 1, (8, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(6)
    )
    found = torch.full((8,), 77, dtype=torch.int32)
    words = torch.cat((temperatures.view(torch.int32)[:, None], keys), 1)
    launch(names["gumbel_argmax"], (8,), (logits, words, found))
    expected = torch.empty(8, dtype=torch.int32)
    gumbel_argmax_in_torch(logits, words, expected, _noise(keys, config.vocab_size))
    assert found.tolist() == expected.tolist(), "another token was chosen"
    assert found.tolist()[3:7] == [70, 0, -1, -1]


def _noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the noise of `server.engine.sampling.gumbel` for these keys."""
    from server.engine import sampling

    words = [key.numpy().tobytes() for key in keys]
    original, queue = sampling.noise_key, iter(words)
    try:
        sampling.noise_key = lambda row: next(queue)
        return sampling.gumbel([None] * len(words), torch.arange(vocab_size)[None])  # type: ignore[list-item]
    finally:
        sampling.noise_key = original


def _random(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


_numbers = count()


def changed(module: ModuleType, original: str, replacement: str) -> ModuleType:
    """Return a copy of a module of kernels with a fault."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert original in source
    file = Path(tempfile.mkdtemp()) / f"changed_{next(_numbers)}.py"  # Triton reads kernels' sources again
    file.write_text(source.replace(original, replacement), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
