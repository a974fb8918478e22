"""Executes PTX on a CPU: what Triton compiled for a GPU, one program (CTA) after the other.

All threads of a CTA run in lockstep, and a register is an array with one number for each thread. Every opcode
with its modifiers and forms of operands is in `FORMS`; `Refused` names whatever isn't, because a misread
instruction would prove nothing. `Fault` reports what a GPU would do silently: an access outside of all buffers or
between CTAs, a register that was never written, or threads that part at a branch.

A tensor-core product is an exact sum, rounded once to fp32; approximations such as `ex2.approx` are exact, too. An
asynchronous copy happens as late as it may: when the program waits for it. Lockstep can't show a missing barrier.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_BASE, _GAP = 1 << 36, 256
_SHARED = "global_smem"
_UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
_MAX_STEPS = 2_000_000


class Refused(NotImplementedError):
    """An instruction that `FORMS` doesn't list, or a form of its operands."""


class Fault(RuntimeError):
    """What a correct program never does."""


@dataclass(frozen=True)
class Operand:
    """An operand. `kind` is "register", "number", "symbol", "vector" or "memory"."""

    kind: str
    name: str = ""
    number: int = 0  # of a number; an address's offset
    parts: "tuple[Operand, ...]" = ()  # of a vector; an address's base


@dataclass(frozen=True)
class Instruction:
    predicate: tuple[str, bool] | None  # the register, and whether it is negated
    opcode: str
    operands: tuple[Operand, ...]
    run: "Callable[[Cta, Sequence[Operand], Array | None], None] | None"  # None: a branch or an end
    text: str


class Memory:
    """Global memory: buffers with gaps between them. A byte belongs to the CTA that wrote it."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.addresses: list[int] = []
        size = _GAP
        for array in arrays:
            self.addresses.append(_BASE + size)
            size += -(-array.nbytes // _GAP) * _GAP + _GAP
        self.bytes = np.full(size, 0xAB, np.uint8)
        self.is_buffer = np.zeros(size, bool)
        self.writer = np.full(size, -1, np.int32)
        for array, address in zip(arrays, self.addresses, strict=True):
            own = slice(address - _BASE, address - _BASE + array.nbytes)
            self.bytes[own], self.is_buffer[own] = array.reshape(-1).view(np.uint8), True

    def read_back(self, arrays: Sequence[Array]) -> None:
        for array, address in zip(arrays, self.addresses, strict=True):
            own = self.bytes[address - _BASE : address - _BASE + array.nbytes]
            array[...] = own.view(array.dtype).reshape(array.shape)

    def places(self, addresses: Array, size: int, cta: int, text: str) -> Array:
        """Return the indices (threads, size) of bytes at the addresses (threads,)."""
        first = addresses.astype(np.int64) - _BASE
        if (first % size).any():
            raise Fault(f"misaligned: {text}")
        if ((first < 0) | (first + size > len(self.bytes))).any():
            raise Fault(f"outside of all buffers: {text}")
        places: Array = first[:, None] + np.arange(size)
        if not self.is_buffer[places].all():
            raise Fault(f"outside of all buffers: {text}")
        writer = self.writer[places]
        if ((writer != -1) & (writer != cta)).any():
            raise Fault(f"another program wrote this: {text}")
        return places


class Program:
    """Parsed PTX with one entry. Every instruction is checked against `FORMS`."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)([^{]*)\{", text, re.DOTALL)
        assert entry is not None, "the PTX has no entry"
        self.parameters = [_name_of(declared) for declared in _split(entry.group(1))]
        threads = re.search(r"\.reqntid\s+(\d+)", entry.group(2))
        assert threads is not None, "the PTX doesn't say how many threads a program has"
        self.num_threads = int(threads.group(1))
        depth, end = 1, entry.end()
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        self.widths: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        for statement in _statements(text[entry.end() : end - 1]):
            self._add(statement)
        for instruction in self.instructions:
            if instruction.opcode.startswith("bra"):
                assert instruction.operands[0].name in self.labels, instruction.text

    def _add(self, statement: str) -> None:
        while (label := re.match(r"([\w$]+)\s*:\s*", statement)) is not None:
            self.labels[label.group(1)] = len(self.instructions)
            statement = statement[label.end() :]
        if declared := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            width = 1 if declared.group(1) == "pred" else int(declared.group(1)[1:])
            for name in _split(declared.group(2)):
                numbered = re.fullmatch(r"(%\w+)<(\d+)>", name)
                names = [f"{numbered.group(1)}{i}" for i in range(int(numbered.group(2)))] if numbered else [name]
                self.widths |= dict.fromkeys(names, width)
            return
        if not statement or re.match(r"\.(loc|pragma|file|section)\b", statement):
            return
        found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.]+)\s*(.*)", statement)
        if found is None:
            raise Refused(statement)
        negated, register, opcode, rest = found.groups()
        operands = tuple(self._operand(operand, statement) for operand in _split(rest))
        forms, run = FORMS.get(opcode, ((), None))
        if not any(_has_form(operands, form) for form in forms):
            raise Refused(f"{opcode}: {statement}")
        predicate = (register, negated == "!") if register else None
        self.instructions.append(Instruction(predicate, opcode, operands, run, statement))

    def _operand(self, text: str, statement: str) -> Operand:
        if text.startswith("{"):
            return Operand("vector", parts=tuple(self._operand(part, statement) for part in _split(text[1:-1])))
        if memory := re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text):
            base = self._operand(memory.group(1), statement)
            return Operand("memory", number=int(memory.group(2) or 0), parts=(base,))
        if text in self.widths or text in _SPECIAL:
            return Operand("register", text)
        if re.fullmatch(r"0[fF][\da-fA-F]{8}", text):
            return Operand("number", number=int(text[2:], 16))
        if re.fullmatch(r"-?(0x[\da-fA-F]+|\d+)U?", text):
            return Operand("number", number=int(text.rstrip("U"), 0))
        if text == _SHARED or text in self.parameters or re.fullmatch(r"\$\w+|_", text):
            return Operand("symbol", text)
        raise Refused(f"operand {text}: {statement}")


def _has_form(operands: Sequence[Operand], form: str) -> bool:
    """Return whether operands have a form: a letter each, with a vector's in brackets."""
    letters = ""
    for operand in operands:
        if operand.kind == "vector":
            kinds = {part.kind if part.name != "_" else "blank" for part in operand.parts}
            letters += f"({'_' if 'blank' in kinds else 'r'}{len(operand.parts)})"
            if kinds - {"register", "blank"}:
                return False
        elif operand.kind == "memory":
            base = operand.parts[0]
            letters += "m" if base.kind == "register" else "h" if base.name == _SHARED else "a"
        elif operand.kind == "symbol":
            letters += "h" if operand.name == _SHARED else "l"
        elif operand.name in _SPECIAL:
            letters += "x"
        else:
            letters += operand.kind[0]  # r or n
    return letters == form


_SPECIAL = frozenset(f"%{kind}.{axis}" for kind in ("tid", "ctaid", "nctaid") for axis in "xyz")


class Cta:
    """One program's state: its registers, and its shared memory."""

    def __init__(
        self, program: Program, memory: Memory, place: tuple[int, int], grid: tuple[int, int], num_shared: int
    ) -> None:
        self.program, self.memory, self.num_threads = program, memory, program.num_threads
        self.index = place[0] + grid[0] * place[1]
        addresses = [*memory.addresses, *[0] * (len(program.parameters) - len(memory.addresses))]
        self.parameters = dict(zip(program.parameters, addresses, strict=True))
        self.shared = np.full(num_shared, 0xCD, np.uint8)
        self.registers: dict[str, Array] = {}
        self.copies: list[list[tuple[Array, Array]]] = [[]]  # groups of copies to shared memory: (places, bytes)
        self.text = ""
        threads = np.arange(self.num_threads, dtype=np.uint32)
        self.special = {"%tid.x": threads, "%tid.y": threads * 0, "%tid.z": threads * 0}
        for axis, at, size in zip("xyz", (*place, 0), (*grid, 1), strict=True):
            self.special[f"%ctaid.{axis}"] = threads * 0 + np.uint32(at)
            self.special[f"%nctaid.{axis}"] = threads * 0 + np.uint32(size)

    def get(self, operand: Operand, kind: str, *, may_be_unwritten: bool = False) -> Array:
        """Return a number for each thread, in a type of PTX such as s32, f32 or pred.

        The compiler packs a part of a register that nothing uses from a register that nothing wrote.
        """
        width, dtype = _type(kind)
        if operand.kind == "number":
            value: Array = np.full(self.num_threads, operand.number & ((1 << width) - 1), _UNSIGNED[width])
        elif operand.kind == "symbol":
            value = np.zeros(self.num_threads, np.uint32)  # shared memory begins at 0
        elif operand.name in self.special:
            value = self.special[operand.name]
        elif operand.name in self.registers:
            value = self.registers[operand.name]
        elif may_be_unwritten:
            value = np.full(self.num_threads, 0xBADBADBADBADBADB & ((1 << width) - 1), _UNSIGNED[width])
        else:
            raise Fault(f"{operand.name} was never written: {self.text}")
        if value.dtype != _UNSIGNED[width]:
            raise Refused(f"{operand.name} doesn't have {width} bits: {self.text}")
        return value.view(dtype) if dtype != value.dtype else value

    def put(self, operand: Operand, value: Array, mask: Array | None) -> None:
        if operand.name == "_":
            return
        width = self.program.widths[operand.name]
        if value.dtype.itemsize * 8 != width and not (width == 1 and value.dtype == bool):
            raise Refused(f"{operand.name} doesn't have {value.dtype.itemsize * 8} bits: {self.text}")
        value = np.ascontiguousarray(value).view(_UNSIGNED[width])
        if mask is not None:
            old = self.registers.get(operand.name)
            value = np.where(mask, value, np.zeros_like(value) if old is None else old)
        self.registers[operand.name] = value

    def address(self, operand: Operand) -> Array:
        base = operand.parts[0]
        width = self.program.widths.get(base.name, 32)
        return self.get(base, f"u{width}").astype(np.int64) + operand.number

    def bytes_at(self, space: str, addresses: Array, size: int) -> tuple[Array, Array]:
        """Return a memory and the indices (threads, size) of the bytes at these addresses."""
        if space == "global":
            return self.memory.bytes, self.memory.places(addresses, size, self.index, self.text)
        if (addresses % size).any():
            raise Fault(f"misaligned: {self.text}")
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > len(self.shared)):
            raise Fault(f"outside of shared memory: {self.text}")
        return self.shared, addresses[:, None] + np.arange(size)

    def run(self) -> int:
        """Return how many instructions ran."""
        counter = steps = 0
        while counter < len(self.program.instructions):
            instruction = self.program.instructions[counter]
            self.text, mask, counter, steps = instruction.text, None, counter + 1, steps + 1
            if steps > _MAX_STEPS:
                raise Fault("no end in sight")
            if instruction.predicate is not None:
                name, negated = instruction.predicate
                mask = self.get(Operand("register", name), "pred") ^ negated
                if not mask.any():
                    continue
                mask = None if mask.all() else mask
            if instruction.run is not None:
                instruction.run(self, instruction.operands, mask)
            elif mask is not None:
                raise Fault(f"threads part: {self.text}")
            elif instruction.opcode == "ret":
                break
            else:
                counter = self.program.labels[instruction.operands[0].name]
        if any(self.copies):
            raise Fault("copies to shared memory were never waited for")
        return steps


def _name_of(declared: str) -> str:
    found = re.fullmatch(r"\.param \.u64(?: \.ptr \.global \.align \d+)? ([\w$]+)", " ".join(declared.split()))
    if found is None:
        raise Refused(f"parameter {declared}")
    return found.group(1)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [part for part in map(str.strip, parts) if part]


def _statements(body: str) -> list[str]:
    """Split at semicolons and at lines that are only a directive; scopes' brackets are dropped."""
    statements, current, depth = [], "", 0
    for line in body.splitlines():
        if re.match(r"\s*\.(loc|pragma|file|section)\b", line) or (
            not depth and re.fullmatch(r"\s*[{}]\s*", line)
        ):
            continue
        for c in line + " ":
            opens_scope = c == "{" and not current.strip()
            closes_scope = c == "}" and not depth and not current.strip()
            if opens_scope or closes_scope:
                continue
            depth += (c == "{") - (c == "}")
            if c == ";":
                statements.append(" ".join(current.split()))
                current = ""
            else:
                current += c
    statements.append(" ".join(current.split()))
    return statements


@cache
def _type(kind: str) -> tuple[int, np.dtype[Any]]:
    """Return the width of a type of PTX, and numpy's type."""
    if kind == "pred":
        return 1, np.dtype(bool)
    width = int(kind[1:])
    letter = {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]]
    return width, np.dtype(f"{letter}{width // 8}")


def _from_bf16(bits: Array) -> Array:
    wide: Array = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def _to_bf16(value: Array) -> Array:
    """Round to the nearest, to even if there are two."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _flush(value: Array) -> Array:
    """Replace numbers below the smallest normal one by zero, as `.ftz` does."""
    zero = np.copysign(np.zeros_like(value), value)
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, zero, value)


Run = Callable[[Cta, Sequence[Operand], Array | None], None]
FORMS: dict[str, tuple[tuple[str, ...], Run | None]] = {
    "bra": (("l",), None),
    "bra.uni": (("l",), None),
    "ret": (("",), None),
}
"""Each opcode, the forms of its operands, and what it does. A form has a letter for each operand: r a register, n
a number, x a special register, h shared memory's symbol, l a label, m an address in a register, a a parameter's,
(r2) a vector of two registers, (_2) one of which only one register is written."""


def _list(opcode: str, forms: str, run: Run) -> None:
    assert opcode not in FORMS
    FORMS[opcode] = (tuple(forms.split()), run)


def _map(opcode: str, forms: str, kind: str, function: Callable[..., Array], *, result: str | None = None) -> None:
    """List an instruction that computes its first operand from the others, all of one type."""

    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        value = function(*(cta.get(operand, kind) for operand in operands[1:]))
        cta.put(operands[0], value.astype(_type(result or kind)[1], copy=False), mask)

    _list(opcode, forms, run)


def _fma(a: Array, b: Array, c: Array) -> Array:
    fused: Array = (a.astype(np.float64) * b + c).astype(np.float32)  # the product is exact in fp64
    return fused


def _shift(kind: str, direction: str) -> Callable[[Array, Array], Array]:
    width = _type(kind)[0]

    def shift(value: Array, amount: Array) -> Array:
        count = np.minimum(amount.astype(np.int64), width - 1).astype(value.dtype)
        found = value << count if direction == "l" else value >> count
        is_sign = direction == "r" and kind[0] == "s"
        kept: Array = found if is_sign else np.where(amount.astype(np.int64) >= width, value.dtype.type(0), found)
        return kept

    return shift


def _shift_of(opcode: str, kind: str, direction: str) -> None:
    shift = _shift(kind, direction)

    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        cta.put(operands[0], shift(cta.get(operands[1], kind), cta.get(operands[2], "u32")), mask)

    _list(opcode, "rrn rrr", run)


def _wide(kind: str, function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the function over operands of twice the width."""
    double = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{_type(kind)[0] // 4}")
    return lambda *values: function(*(value.astype(double) for value in values))


for _t in ("s16", "s32", "s64"):
    _map(f"add.{_t}", "rrr rrn", _t, np.add)
for _t in ("s16", "s32"):
    _map(f"sub.{_t}", "rrr", _t, np.subtract)
for _t in ("s16", "s32", "s64"):
    _map(f"mul.lo.{_t}", "rrn rrr", _t, np.multiply)
_map("mad.lo.s32", "rrnr rrrr", "s32", lambda a, b, c: a * b + c)
_map("mad.lo.s64", "rrnr rrnn", "s64", lambda a, b, c: a * b + c)
_map("mul.hi.u16", "rrn", "u16", lambda a, b: _wide("u16", np.multiply)(a, b) >> np.uint32(16))
_map("mul.hi.s32", "rrn rrr", "s32", lambda a, b: _wide("s32", np.multiply)(a, b) >> np.int64(32))
for _t, _w in (("s32", "s64"), ("u32", "u64")):
    _map(f"mul.wide.{_t}", "rrn", _t, _wide(_t, np.multiply), result=_w)


def _mad_wide(kind: str) -> Run:
    wide = f"{kind[0]}64"

    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        value = _wide(kind, np.multiply)(*(cta.get(operand, kind) for operand in operands[1:3]))
        cta.put(operands[0], value + cta.get(operands[3], wide), mask)

    return run


for _t in ("s32", "u32"):
    _list(f"mad.wide.{_t}", "rrnr rrrr", _mad_wide(_t))
_map("neg.s32", "rr", "s32", np.negative)
for _t in ("s32", "u32"):
    _map(f"min.{_t}", "rrr rrn", _t, np.minimum)
_map("max.s32", "rrr rrn", "s32", np.maximum)
for _t in ("b16", "b32", "b64", "pred"):
    _map(f"and.{_t}", "rrr rrn", _t, np.bitwise_and)
    _map(f"or.{_t}", "rrr rrn", _t, np.bitwise_or)
    _map(f"xor.{_t}", "rrr rrn", _t, np.bitwise_xor)
    _map(f"not.{_t}", "rr", _t, np.invert)
for _t in ("b16", "b32", "b64"):
    _shift_of(f"shl.{_t}", _t, "l")
for _t in ("u16", "u32", "s32", "u64", "s64"):
    _shift_of(f"shr.{_t}", _t, "r")


def _extract_bits(kind: str) -> Callable[[Array, Array, Array], Array]:
    def extract(value: Array, first: Array, length: Array) -> Array:
        ones = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
        bits = (value.view(np.uint32).astype(np.uint64) >> first.astype(np.uint64)) & ones
        if kind[0] == "s":  # the highest bit is the sign
            is_negative = bits >> (length.astype(np.uint64) - np.uint64(1)) & np.uint64(1) == 1
            bits = np.where(is_negative, bits | ~ones, bits)
        return bits.astype(np.uint32)

    return extract


for _t in ("s32", "u32"):
    _map(f"bfe.{_t}", "rrnn", _t, _extract_bits(_t), result="u32")


def _permute(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
    low, high = (cta.get(operand, "b32", may_be_unwritten=True) for operand in operands[1:3])
    selector = cta.get(operands[3], "b32")
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    found = np.zeros(len(both), np.uint64)
    for i in range(4):
        select = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (select & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        found |= np.where(select & np.uint64(8), sign, byte) << np.uint64(8 * i)
    cta.put(operands[0], found.astype(np.uint32), mask)


_list("prmt.b32", "rrnn rrrn", _permute)
_map("popc.b32", "rr", "u32", lambda a: np.unpackbits(a.view(np.uint8)).reshape(len(a), 32).sum(1))

_map("add.f32", "rrr rrn", "f32", np.add)
_map("sub.f32", "rrr", "f32", np.subtract)
_map("mul.f32", "rrr rrn", "f32", np.multiply)
_map("fma.rn.f32", "rrrr rrrn rrnr rrnn", "f32", _fma)
_map("fma.rn.ftz.f32", "rrrr rrrn rrnr rrnn", "f32", lambda a, b, c: _flush(_fma(_flush(a), _flush(b), _flush(c))))
_map("max.f32", "rrr rrrr rrn", "f32", lambda *values: np.fmax.reduce(values))
_map("neg.f32", "rr", "f32", np.negative)
_map("abs.f32", "rr", "f32", np.abs)
for _name in ("full", "approx"):
    _map(f"div.{_name}.f32", "rrr rnr rrn", "f32", np.divide)
_map("ex2.approx.f32", "rr", "f32", np.exp2)
_map("ex2.approx.ftz.f32", "rr", "f32", lambda a: _flush(np.exp2(_flush(a))))
_map("lg2.approx.f32", "rr", "f32", np.log2)
_map("lg2.approx.ftz.f32", "rr", "f32", lambda a: np.log2(_flush(a)))
_map("rsqrt.approx.f32", "rr", "f32", lambda a: 1 / np.sqrt(a))
_map("rsqrt.approx.ftz.f32", "rr", "f32", lambda a: _flush(1 / np.sqrt(_flush(a))))


def _pairs(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the function over two fp32 numbers in each 64-bit register."""
    return lambda *values: np.ascontiguousarray(function(*(v.view(np.float32) for v in values)), np.float32).view(
        "u8"
    )


_map("add.f32x2", "rrr", "u64", _pairs(np.add))
_map("sub.f32x2", "rrr", "u64", _pairs(np.subtract))
_map("mul.f32x2", "rrr", "u64", _pairs(np.multiply))
_map("fma.rn.f32x2", "rrrr", "u64", _pairs(_fma))


def _mixed(num_bf16: int, function: Callable[..., Array]) -> Run:
    """Compute in fp32 from bf16 operands and a last fp32 one (sm_100)."""

    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        halves = [_from_bf16(cta.get(operand, "b16")) for operand in operands[1 : 1 + num_bf16]]
        cta.put(operands[0], function(*halves, cta.get(operands[-1], "f32")), mask)

    return run


_list("add.rn.f32.bf16", "rrr", _mixed(1, np.add))
_list("sub.rn.f32.bf16", "rrr", _mixed(1, np.subtract))
_list("fma.rn.f32.bf16", "rrrr", _mixed(2, _fma))

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
for _name, _t in product(_COMPARE, ("s32", "u32", "s64", "u64")):
    _map(f"setp.{_name}.{_t}", "rrr rrn", _t, _COMPARE[_name], result="pred")
for _name, _t in product(("eq", "ne"), ("b16", "b32", "b64")):
    _map(f"setp.{_name}.{_t}", "rrr rrn", _t, _COMPARE[_name], result="pred")


def _compare_floats(name: str, if_nan: bool) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), if_nan, _COMPARE[name](a, b))


for _name in _COMPARE:
    _map(f"setp.{_name}.f32", "rrr rrn", "f32", _compare_floats(_name, False), result="pred")
    _map(f"setp.{_name}u.f32", "rrr rrn", "f32", _compare_floats(_name, True), result="pred")
_map("setp.nan.f32", "rrr", "f32", lambda a, b: np.isnan(a) | np.isnan(b), result="pred")


def _select(kind: str) -> Run:
    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        chosen = cta.get(operands[3], "pred")
        cta.put(operands[0], np.where(chosen, cta.get(operands[1], kind), cta.get(operands[2], kind)), mask)

    return run


for _t in ("b16", "b32", "b64", "f32"):
    _list(f"selp.{_t}", "rnnr rnrr rrnr rrrr", _select(_t))


def _convert(to: str, source: str) -> Run:
    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        cta.put(operands[0], cta.get(operands[1], source).astype(_type(to)[1]), mask)

    return run


for _to, _t in (("s64", "s32"), ("u16", "u32"), ("u32", "u16"), ("u32", "u64"), ("u64", "u32")):
    _list(f"cvt.{_to}.{_t}", "rr", _convert(_to, _t))
for _t in ("s32", "u32"):
    _list(f"cvt.rn.f32.{_t}", "rr", _convert("f32", _t))


def _pack_bf16(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
    high, low = (_to_bf16(cta.get(operand, "f32")).astype(np.uint32) for operand in operands[1:])
    cta.put(operands[0], high << np.uint32(16) | low, mask)


_list("cvt.f32.bf16", "rr", lambda cta, ops, mask: cta.put(ops[0], _from_bf16(cta.get(ops[1], "b16")), mask))
_list("cvt.rn.bf16.f32", "rr", lambda cta, ops, mask: cta.put(ops[0], _to_bf16(cta.get(ops[1], "f32")), mask))
_list("cvt.rn.bf16x2.f32", "rrr", _pack_bf16)


def _move(kind: str) -> Run:
    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        target, source = operands
        width = _type(kind)[0]
        if target.kind == "vector":
            value, part = cta.get(source, kind), width // len(target.parts)
            for i, register in enumerate(target.parts):
                shifted = value >> value.dtype.type(i * part)
                cta.put(register, shifted.astype(_UNSIGNED[part]), mask)
        elif source.kind == "vector":
            part = width // len(source.parts)
            value = np.zeros(cta.num_threads, _UNSIGNED[width])
            for i, register in enumerate(source.parts):
                value |= cta.get(register, f"b{part}", may_be_unwritten=True).astype(
                    value.dtype
                ) << value.dtype.type(i * part)
            cta.put(target, value, mask)
        else:
            cta.put(target, cta.get(source, kind), mask)

    return run


for _t in ("b16", "b32", "b64", "pred"):
    _list(f"mov.{_t}", "rr rn rh r(r2) (r2)r (_2)r" if _t in ("b32", "b64") else "rr rn", _move(_t))
_list("mov.u16", "rr rn", _move("u16"))
_list("mov.u32", "rr rn rx", _move("u32"))


def _load_parameter(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
    address = cta.parameters[operands[1].parts[0].name]
    cta.put(operands[0], np.full(cta.num_threads, address, np.uint64), mask)


_list("ld.param.b64", "ra", _load_parameter)


def _load(space: str, kind: str) -> Run:
    size = _type(kind)[0] // 8

    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        target, source = operands
        registers = target.parts or (target,)
        who = np.arange(cta.num_threads) if mask is None else np.flatnonzero(mask)
        memory, places = cta.bytes_at(space, cta.address(source)[who], size * len(registers))
        found = np.zeros((cta.num_threads, size * len(registers)), np.uint8)
        found[who] = memory[places]
        for register, values in zip(registers, found.view(_type(kind)[1]).T, strict=True):
            cta.put(register, values, mask)

    return run


def _store(space: str, kind: str) -> Run:
    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        target, source = operands
        registers = source.parts or (source,)
        values = np.stack([cta.get(register, kind) for register in registers], axis=1).view(np.uint8)
        who = np.arange(cta.num_threads) if mask is None else np.flatnonzero(mask)
        memory, places = cta.bytes_at(space, cta.address(target)[who], values.shape[1])
        memory[places] = values[who]
        if space == "global":
            cta.memory.writer[places] = cta.index

    return run


for _t, _n in product(("b16", "b32", "b64"), (1, 2, 4)):
    _v = "" if _n == 1 else f".v{_n}"
    _list(f"ld.global{_v}.{_t}", f"(r{_n})m", _load("global", _t))
    _list(f"st.global{_v}.{_t}", f"m(r{_n})", _store("global", _t))
    _list(f"ld.shared{_v}.{_t}", f"(r{_n})m" if _n > 1 else "rm rh", _load("shared", _t))
    _list(f"st.shared{_v}.{_t}", f"m(r{_n})" if _n > 1 else "mr hr", _store("shared", _t))


def _copy(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
    """Copy to shared memory as many bytes as the last operand says; the rest is zero."""
    target, source, size = operands[0], operands[1], operands[2].number
    num_bytes = cta.get(operands[3], "u32") if len(operands) > 3 else np.full(cta.num_threads, size, np.uint32)
    active = np.ones(cta.num_threads, bool) if mask is None else mask
    if not np.isin(num_bytes[active], (0, size)).all():
        raise Refused(f"a part of a copy: {cta.text}")
    values = np.zeros((cta.num_threads, size), np.uint8)
    reads = active & (num_bytes > 0)
    memory, places = cta.bytes_at("global", cta.address(source)[reads], size)
    values[reads] = memory[places]
    _, to = cta.bytes_at("shared", cta.address(target)[active], size)
    cta.shared[to] = 0xCD  # until it is waited for
    cta.copies[-1].append((to, values[active]))


def _wait(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
    open_group = cta.copies.pop()
    num_done = max(0, len(cta.copies) - operands[0].number)
    for group in cta.copies[:num_done]:
        for places, values in group:
            cta.shared[places] = values
    cta.copies = [*cta.copies[num_done:], open_group]


for _kind in ("ca", "cg"):
    _list(f"cp.async.{_kind}.shared.global", "mmnr mmn", _copy)
_list("cp.async.commit_group", "", lambda cta, ops, mask: cta.copies.append([]))
FORMS["cp.async.commit_group"] = (("",), FORMS["cp.async.commit_group"][1])
_list("cp.async.wait_group", "n", _wait)
_list("bar.sync", "n", lambda cta, ops, mask: None)  # threads are in lockstep


def _shuffle(kind: str) -> Run:
    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        if mask is not None or (operands[3].number, operands[4].number) != (31, -1):
            raise Refused(f"part of a warp: {cta.text}")
        thread, by = np.arange(cta.num_threads), cta.get(operands[2], "u32").astype(np.int64)
        lane = thread % 32 ^ by if kind == "bfly" else by % 32
        cta.put(operands[0], cta.get(operands[1], "b32")[thread // 32 * 32 + lane], None)

    return run


_list("shfl.sync.bfly.b32", "rrnnn", _shuffle("bfly"))
_list("shfl.sync.idx.b32", "rrrnn", _shuffle("idx"))


def _reduce(kind: str, function: Callable[[Array], Array]) -> Run:
    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        if mask is not None or (cta.get(operands[2], "s32") != -1).any():
            raise Refused(f"part of a warp: {cta.text}")
        cta.put(operands[0], np.repeat(function(cta.get(operands[1], kind).reshape(-1, 32)), 32), None)

    return run


for _t in ("s32", "u32"):
    _list(f"redux.sync.min.{_t}", "rrr", _reduce(_t, lambda warps: warps.min(1)))
_list("redux.sync.add.s32", "rrr", _reduce("s32", lambda warps: warps.sum(1, dtype=np.int32)))
_list("redux.sync.max.f32", "rrr", _reduce("f32", lambda warps: np.fmax.reduce(warps, 1)))


def _matrices(cta: Cta, address: Operand, i: int) -> Array:
    """Return the shared bytes (warps, 8, 8) of 16-bit numbers whose rows' addresses lanes 8 i to 8 i + 7 have."""
    rows = cta.address(address).reshape(-1, 32)[:, 8 * i : 8 * i + 8]
    _, places = cta.bytes_at("shared", rows.reshape(-1), 16)
    return places.reshape(-1, 8, 8, 2)


def _load_matrices(is_transposed: bool) -> Run:
    lane = np.arange(32)

    def run(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
        if mask is not None:
            raise Refused(f"part of a warp: {cta.text}")
        for i, register in enumerate(operands[0].parts):
            matrix = np.ascontiguousarray(cta.shared[_matrices(cta, operands[1], i)]).view(np.uint16)[..., 0]
            matrix = matrix.swapaxes(1, 2) if is_transposed else matrix
            low, high = (matrix[:, lane // 4, lane % 4 * 2 + j].astype(np.uint32) for j in (0, 1))
            cta.put(register, (low | high << np.uint32(16)).reshape(-1), None)

    return run


def _store_matrices(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
    if mask is not None:
        raise Refused(f"part of a warp: {cta.text}")
    lane = np.arange(32)
    for i, register in enumerate(operands[1].parts):
        values = cta.get(register, "b32").reshape(-1, 32)
        matrix = np.zeros((len(values), 8, 8), np.uint16)
        matrix[:, lane // 4, lane % 4 * 2] = values.astype(np.uint16)
        matrix[:, lane // 4, lane % 4 * 2 + 1] = (values >> np.uint32(16)).astype(np.uint16)
        cta.shared[_matrices(cta, operands[0], i)] = matrix.view(np.uint8).reshape(-1, 8, 8, 2)


for _n in (1, 2, 4):
    _list(f"ldmatrix.sync.aligned.m8n8.x{_n}.shared.b16", f"(r{_n})m", _load_matrices(False))
    _list(f"ldmatrix.sync.aligned.m8n8.x{_n}.trans.shared.b16", f"(r{_n})m", _load_matrices(True))
    _list(f"stmatrix.sync.aligned.m8n8.x{_n}.shared.b16", f"m(r{_n})", _store_matrices)


_row, _pair = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4 * 2
_i, _j = np.arange(8) // 2, np.arange(8) % 2  # a register, and its low or high half
_A_ROW, _A_COLUMN = _row + 8 * (_i % 2), _pair + _j + 8 * (_i // 2)  # (lanes, 8)
_B_ROW, _B_COLUMN = (_pair + _j + 8 * _i)[:, :4], np.broadcast_to(_row, (32, 4))
_C_ROW, _C_COLUMN = _row + 8 * _i, _pair + _j
_C_ROW, _C_COLUMN = _C_ROW[:, :4], _C_COLUMN[:, :4]


def _multiply_matrices(cta: Cta, operands: Sequence[Operand], mask: Array | None) -> None:
    """D (16, 8) = A (16, 16) B (16, 8) + C, for each warp; PTX ISA, "Matrix Fragments for mma.m16n8k16"."""
    if mask is not None:
        raise Refused(f"part of a warp: {cta.text}")
    numbers = [
        _from_bf16(np.stack([cta.get(register, "b32") for register in operands[i].parts], axis=1).view(np.uint16))
        for i in (1, 2)
    ]  # (threads, 2 · registers)
    a, b = np.zeros((cta.num_threads // 32, 16, 16)), np.zeros((cta.num_threads // 32, 16, 8))
    a[:, _A_ROW, _A_COLUMN] = numbers[0].reshape(-1, 32, 8)
    b[:, _B_ROW, _B_COLUMN] = numbers[1].reshape(-1, 32, 4)
    c = np.stack([cta.get(register, "f32") for register in operands[3].parts], axis=1).reshape(-1, 32, 4)
    d = ((a @ b)[:, _C_ROW, _C_COLUMN] + c).astype(np.float32).reshape(-1, 4)
    for i, register in enumerate(operands[0].parts):
        cta.put(register, np.ascontiguousarray(d[:, i]), None)


_list("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "(r4)(r4)(r2)(r4)", _multiply_matrices)


def launch(program: Program, grid: tuple[int, ...], arrays: Sequence[Array], num_shared: int) -> int:
    """Run a grid of programs over buffers, which are changed in place. Return how many instructions ran.

    Parameters that Triton adds for scratch memory, after the kernel's own, are null.
    """
    memory, steps = Memory(arrays), 0
    width, height = (*grid, 1)[:2]
    with np.errstate(all="ignore"):
        for y, x in product(range(height), range(width)):
            steps += Cta(program, memory, (x, y), (width, height), num_shared).run()
    memory.read_back(arrays)
    return steps
