"""The executor of PTX itself: what it refuses, and the faults that it reports."""

import numpy as np
import pytest

from tests.kits.ptx import Fault, Program, Refused, launch

HEAD = """.visible .entry f(.param .u64 .ptr .global .align 16 f_param_0)
.reqntid 32
{
.reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
ld.param.b64 %rd1, [f_param_0];
mov.u32 %r1, %tid.x;
mul.wide.s32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
"""


def run(body: str, shared: int = 64, grid: tuple[int, ...] = (1,), size: int = 32) -> list[int]:
    """Return 32 numbers that 32 threads begin with as 0, 10, 20 … and may change."""
    numbers = np.arange(size, dtype=np.int32) * 10
    launch(Program(HEAD + body + "\nret;\n}"), grid, [numbers], shared)
    return [int(number) for number in numbers]


def test_a_program_runs() -> None:
    body = "ld.global.b32 {%r2}, [%rd3 + 0]; add.s32 %r3, %r2, %r1; st.global.b32 [%rd3 + 0], {%r3};"
    assert run(body) == [11 * i for i in range(32)]


@pytest.mark.parametrize(
    "statement",
    [
        "add.s32.sat %r2, %r1, %r1",
        "add.sat.s32 %r2, %r1, %r1",
        "add.rz.f32 %r2, %r1, %r1",
        "frob.b32 %r2, %r1",
        "ld.global.nc.b32 {%r2}, [%rd3 + 0]",
        "ld.global.v8.b32 {%r2}, [%rd3 + 0]",
        "atom.global.add.s32 %r2, [%rd3], %r1",
        "red.global.add.s32 [%rd3], %r1",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r2}, %rd1, %rd2",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r2}, {%r2}, {%r2}, {%r2}",
    ],
)
def test_unlisted_opcodes_and_modifiers_are_refused_by_name(statement: str) -> None:
    with pytest.raises(Refused, match=statement.split()[0]):
        run(statement + ";")


@pytest.mark.parametrize(
    "statement",
    [
        "add.s32 %r2, 5, %r1",
        "add.s32 %r2, %r1",
        "mov.b32 %r2, {%rs1, %rs2, %rs3, %rs1}",
        "ld.global.b32 %r2, [%rd3 + 0]",
        "ld.global.b32 {%r2}, [global_smem]",
        "shfl.sync.bfly.b32 %r2|%p1, %r1, 4, 31, -1",
        "setp.eq.s32 %p1|%p2, %r1, 0",
        "add.s32 %r2, %r1, %laneid",
        "bar.sync 0, 64",
    ],
)
def test_unlisted_forms_of_operands_are_refused(statement: str) -> None:
    with pytest.raises(Refused, match=r"\w"):
        run(statement + ";")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("ld.global.b32 {%r2}, [%rd3 + 4];", "outside of all buffers"),
        ("st.global.b32 [%rd3 + -4], {%r1};", "outside of all buffers"),
        ("ld.global.b32 {%r2}, [%rd3 + 2];", "misaligned"),
        ("st.shared.b32 [%r1 + 64], %r1;", "misaligned|outside of shared memory"),
        ("add.s32 %r2, %r9, 1;", "%r9 was never written"),
        ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L__BB0_1;\n$L__BB0_1:\n", "threads part"),
        ("$L__BB0_1:\nbra.uni $L__BB0_1;", "no end in sight"),
    ],
)
def test_faults_are_reported(body: str, says: str) -> None:
    with pytest.raises(Fault, match=says):
        run(body)


def test_registers_have_their_declared_width() -> None:
    with pytest.raises(Refused, match="doesn't have"):
        run("add.s64 %rd4, %rd1, %r1;")


def test_programs_that_write_the_same_place_are_reported() -> None:
    with pytest.raises(Fault, match="another program wrote this"):
        run("st.global.b32 [%rd3 + 0], {%r1};", grid=(2,))


def test_an_asynchronous_copy_is_late_until_it_is_waited_for() -> None:
    begin = "shl.b32 %r4, %r1, 2; mov.b32 %r5, 4; cp.async.ca.shared.global [%r4 + 0], [%rd3 + 0], 0x4, %r5;"
    end = "ld.shared.b32 %r2, [%r4]; st.global.b32 [%rd3 + 0], {%r2};"
    waits = "cp.async.commit_group ; cp.async.wait_group 0; bar.sync 0;"
    assert run(begin + waits + end, shared=128) == [10 * i for i in range(32)]
    early = begin + "cp.async.commit_group ; cp.async.wait_group 1;" + end + "cp.async.wait_group 0;"
    assert set(run(early, shared=128)) == {int(np.uint32(0xCDCDCDCD).view(np.int32))}
    with pytest.raises(Fault, match="never waited for"):
        run(begin, shared=128)


def test_a_bf16_product_of_a_tensor_core() -> None:
    """Fragments have the layout of the PTX ISA: the identity times a matrix is the matrix."""
    body = """
    shr.u32 %r2, %r1, 2; and.b32 %r3, %r1, 3; shl.b32 %r3, %r3, 1;
    setp.eq.s32 %p1, %r2, %r3; selp.b32 %r4, 0x3F80, 0, %p1; add.s32 %r3, %r3, 1;
    setp.eq.s32 %p1, %r2, %r3; selp.b32 %r5, 0x3F800000, %r4, %p1;
    mov.b32 %r6, 0; mov.b32 %r10, 0f00000000;
    and.b32 %r7, %r1, 3; shl.b32 %r7, %r7, 1; shl.b32 %r8, %r7, 0;
    cvt.rn.f32.s32 %r7, %r2; cvt.rn.bf16x2.f32 %r9, %r7, %r7;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r11, %r12, %r13, %r14 }, { %r5, %r6, %r6, %r5 },
      { %r9, %r9 }, { %r10, %r10, %r10, %r10 };
    st.global.v4.b32 [%rd5 + 0], { %r11, %r12, %r13, %r14 };"""
    body = "shl.b32 %r15, %r1, 4; mul.wide.s32 %rd4, %r15, 1; add.s64 %rd5, %rd1, %rd4;" + body
    found = np.array(run(body, size=128), np.int32).view(np.float32).reshape(32, 4)
    column = np.arange(32)[:, None] % 4 * 2 + np.array([0, 1, 0, 1])
    assert (found == column).all()
