"""Python's reading of the native code's header equals a compiler's."""

import ctypes
import re
from pathlib import Path

import pytest

from server.model.native import abi
from server.model.native.abi import columns, enum_names, packing, parse_fields
from server.model.native.build import SOURCE
from tests.kits.native import give_up
from tests.server.model.native.build import compilers, run

HEADER = (SOURCE / "seam/abi.h").read_text()
STRUCTURES = [
    found for found in vars(abi).values() if isinstance(found, type) and issubclass(found, ctypes.Structure)
]
C_TYPES = {ctypes.c_int64: "int64_t", ctypes.c_double: "double"}
ENUMS = {
    "Group": ("qkv", "o", "gate_up", "down"),
    "LayerTensor": ("input_norm", "qkv", "o", "post_norm", "gate_up", "down"),
    "WeightType": ("bf16", "q4_1", "q8_0"),
    "Status": ("ok", "no_memory", "invalid", "failed"),
    "Phase": abi.PHASES,
    "TrainPhase": abi.TRAIN_PHASES,
}
CONSTANTS = {"kTile": abi.TILE, "kRowUnit": abi.ROW_UNIT, "kMaxGroup": abi.MAX_GROUP, "kPositions": abi.POSITIONS}


def test_every_struct_is_declared() -> None:
    assert [structure.__name__ for structure in STRUCTURES] == re.findall(r"^struct (\w+)", HEADER, re.MULTILINE)


@pytest.mark.parametrize("enum", ENUMS)
def test_names_of_enumerators(enum: str) -> None:
    assert enum_names(enum) == ENUMS[enum]


def test_every_enum_is_tested() -> None:
    assert sorted(ENUMS) == sorted(re.findall(r"^enum (\w+)", HEADER, re.MULTILINE))


def test_a_compiler_reads_the_same(tmp_path: Path) -> None:
    """Types, offsets, sizes, constants and enumerators are compared."""
    checks = [f"{name} == {value}" for name, value in CONSTANTS.items()]
    for structure in STRUCTURES:
        name = structure.__name__
        checks.append(f"sizeof({name}) == {ctypes.sizeof(structure)}")
        for field, field_type, *_ in structure._fields_:
            declared = f"decltype({name}::{field})"
            checks.append(f"offsetof({name}, {field}) == {getattr(structure, field).offset}")
            if field_type is ctypes.c_void_p:
                checks.append(f"std::is_pointer_v<{declared}>")
            else:
                checks.append(f"std::is_same_v<{declared}, {C_TYPES[field_type]}>")
    for names in re.findall(r"^enum \w+ {(.*?)}", re.sub("//.*", "", HEADER), re.MULTILINE | re.DOTALL):
        checks += [f"{name} == {place}" for place, name in enumerate(re.findall(r"\w+", names))]
    assert len(checks) > 250
    if not compilers():
        give_up("there is no compiler")
    unit = tmp_path / "checks.cpp"
    asserts = "".join(f"static_assert({check});\n" for check in checks)
    unit.write_text(f'#include <type_traits>\n#include "seam/abi.h"\n{asserts}')
    run([compilers()[0], "-std=c++20", f"-I{SOURCE}", "-fsyntax-only", str(unit)])


@pytest.mark.parametrize("declaration", ["int32_t a;", "float a;", "const bf16 *a, b;", "BaseSizes sizes;"])
def test_fields_of_other_sizes_are_refused(declaration: str) -> None:
    with pytest.raises(KeyError):
        parse_fields(declaration)


def test_missing_declarations_are_an_error() -> None:
    with pytest.raises(LookupError, match="enum Phases"):
        enum_names("Phases")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed_numbers_are_the_structure(structure: type[ctypes.Structure]) -> None:
    numbers = [7 + place for place in range(columns(structure))]
    assert packing(structure).pack(*numbers) == bytes(structure(*numbers))
