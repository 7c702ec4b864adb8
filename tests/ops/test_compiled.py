"""Kernels compile for all supported architectures, and cubins are kept safely."""

import re
from pathlib import Path

import pytest

from rsq_stream.errors import KernelError
from rsq_stream.ops.cuda import cubin_cache, nvrtc
from rsq_stream.ops.cuda.cubin_cache import Kernel, cubin, source_of

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings, which are absent")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SIZES: dict[str, list[tuple[str, ...]]] = {
    "clip_search": [("CHUNKS=3",), ("CHUNKS=3", "TABLE")],
    "column_sums": [()],
    "column_sums_bf16": [("PAD=64",), ("PAD=128",), ("PAD=256",)],
    "descent": [("CHUNKS=4",), ("CHUNKS=4", "TABLE")],
    "hadamard": [
        ("LOG=7", "DENSE=1", "ROWS=16", "SIGNS=0"),
        ("LOG=13", "DENSE=1", "ROWS=1", "SIGNS=0"),
        ("LOG=10", "DENSE=28", "ROWS=1", f"SIGNS={','.join(['5ull'] * 28)}", "BF16"),
    ],
    "pack": [("BITS=3",)],
    "e8p": [()],
    "two_terms": [(), ("BF16",)],
    "column_sweep": [("CHUNKS=4",), ("CHUNKS=4", "TABLE")],
}
"""What a run uses, by source."""
ELF = b"\x7fELF"
EM_CUDA = 190


def functions(source: str) -> list[str]:
    pattern = r'extern "C" __global__[^(]*(?:\([^)]*\))?\s(\w+)\('
    return re.findall(pattern, source_of(source))


def test_every_source_is_compiled_here() -> None:
    folder = Path(__file__).resolve().parents[2] / "kernels"
    assert {path.stem for path in folder.glob("*.cu")} == set(SIZES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SIZES)
def test_it_compiles(source: str, architecture: str) -> None:
    assert functions(source)
    for defines in SIZES[source]:
        text = source_of(source)
        made = nvrtc.compile_cubin(source, text, defines, architecture)
        assert made.startswith(ELF)
        assert int.from_bytes(made[18:20], "little") == EM_CUDA
        for function in functions(source):
            assert f".text.{function}\0".encode() in made


def test_offsets_do_not_fit_32_bits() -> None:
    """No kernel takes a size or a stride as an int: see kernels/README.md."""
    for source in SIZES:
        for _, arguments in re.findall(
            r"__global__[^(]*(?:\([^)]*\))?\s(\w+)\(([^)]*)\)", source_of(source)
        ):
            assert not re.search(
                r"\b(int|short|unsigned) (?!char|\*)", arguments.replace("\n", " ")
            )


def test_a_source_that_does_not_compile_names_the_line() -> None:
    with pytest.raises(
        KernelError, match=r"^odd.cu does not compile for sm_90 with A=1"
    ):
        nvrtc.compile_cubin(
            "odd", "__global__ void f() { missing; }", ("A=1",), "sm_90"
        )


def test_a_cubin_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_cubin(*given: object) -> bytes:
        compiled.append(given)
        return nvrtc.compile_cubin(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(cubin_cache, "compile_cubin", compile_cubin)
    kernel = Kernel("pack", "pack", ("BITS=3",))
    first = cubin(kernel, "sm_90", tmp_path)
    assert cubin(kernel, "sm_90", tmp_path) == first
    assert len(compiled) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("pack-")
    # Another size, architecture or compiler is another file.
    cubin(Kernel("pack", "pack", ("BITS=2",)), "sm_90", tmp_path)
    cubin(kernel, "sm_80", tmp_path)
    monkeypatch.setattr(cubin_cache, "compiler_version", lambda: "99.0")
    cubin(kernel, "sm_90", tmp_path)
    assert len(compiled) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_cubin_is_made_anew(tmp_path: Path, damage: str) -> None:
    kernel = Kernel("pack", "unpack", ("BITS=4",))
    first = cubin(kernel, "sm_90", tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    path.write_bytes({"cut": content[:99], "flipped": flipped, "empty": b""}[damage])
    assert cubin(kernel, "sm_90", tmp_path) == first
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    made = cubin(Kernel("pack", "pack", ("BITS=3",)), "sm_90", tmp_path / "file" / "x")
    assert made.startswith(ELF)


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cubin_cache.cache_folder() == Path("/somewhere/rsq-stream/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cubin_cache.cache_folder() == Path.home() / ".cache/rsq-stream/kernels"
