"""What is packed comes back, bit for bit, here and in compressed-tensors."""

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.gptq.solver import Solution
from rsq_stream.algorithm.grids.integer import IntegerGrid, decode
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats._quantization_config import schemes_of
from rsq_stream.checkpoint.formats.compressed_tensors import FORMAT
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import KernelError, UnsupportedModelError
from rsq_stream.model.architecture import read_architecture
from rsq_stream.ops.pack import pack, pack_naive, packed_words, unpack, unpack_naive
from rsq_stream.runtime.worker_pool import Pool
from tests.config.test_quantization_plan import plan
from tests.support.toy import linear_names

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_bits = pytest.mark.parametrize("bits", range(2, 9))
each_storage = pytest.mark.parametrize(
    "storage", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "b16", "f16"]
)
each_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "zero"])

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 63,
}


def stream_of(codes: list[int], bits: int) -> bytes:
    """The naive twin: code i is shifted i times ``bits`` up in one whole number."""
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    return number.to_bytes(4 * -(-len(codes) * bits // 32), "little")


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(2, 8))
    codes = st.integers(0, 2**bits - 1)
    width = draw(st.integers(1, 140))
    row = st.lists(codes, min_size=width, max_size=width)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(rows_of_codes())
def test_unpack_undoes_pack_and_the_words_are_the_stream(drawn):
    bits, rows = drawn
    code_OI = torch.tensor(rows, dtype=torch.uint8)
    word_OW = pack(code_OI, bits)
    assert word_OW.dtype == torch.int32
    assert word_OW.shape == (len(rows), packed_words(len(rows[0]), bits))
    for words, codes in zip(word_OW, rows, strict=True):
        assert words.numpy().astype("<i4").tobytes() == stream_of(codes, bits)
    assert torch.equal(unpack(word_OW, bits, len(rows[0])), code_OI)
    assert torch.equal(pack_naive(code_OI, bits), word_OW)
    assert torch.equal(unpack_naive(word_OW, bits, len(rows[0])), code_OI)


@pytest.mark.parametrize(("codes", "words"), [(33, 3), (33, 5), (1, 0)])
def test_unpack_refuses_rows_of_another_length(codes, words):
    with pytest.raises(KernelError, match=rf"^unpack: {codes} codes of 3 bits are"):
        unpack(torch.zeros(2, words, dtype=torch.int32), 3, codes)


def random_codes(rows: int, width: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + width)
    shape = (rows, width)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@each_bits
@pytest.mark.parametrize("width", [1, 31, 32, 33, 63, 137, 172])
def test_pack_of_whole_ranges(width, bits, device):
    for code_OI in (
        random_codes(63, width, bits),
        torch.full((2, width), 2**bits - 1, dtype=torch.uint8),  # the sign bit is set
        torch.zeros(1, width, dtype=torch.uint8),
    ):
        word_OW = pack(code_OI.to(device), bits)
        row = code_OI[0].tolist()
        assert word_OW[0].cpu().numpy().astype("<i4").tobytes() == stream_of(row, bits)
        assert torch.equal(unpack(word_OW, bits, width).cpu(), code_OI)


def test_pack_of_the_example():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 2).tolist() == [[57]]


def compressed_tensors() -> Any:
    return pytest.importorskip("compressed_tensors.compressors.pack_quantized")


@each_bits
@pytest.mark.parametrize("width", [1, 63, 137, 172, 256])
def test_pack_is_that_of_compressed_tensors(width, bits):
    code_OI = random_codes(5, width, bits)
    signed_OI = (code_OI.int() - 2 ** (bits - 1)).to(torch.int8)
    theirs_OW = compressed_tensors().pack_to_int32(signed_OI, bits)
    assert torch.equal(pack(code_OI, bits), theirs_OW)


def solution(
    shape: tuple[int, int], scheme: Scheme, storage: torch.dtype
) -> tuple[Solution, IntegerGrid]:
    generator = torch.Generator().manual_seed(sum(shape))
    weight_OI = torch.randn(shape, generator=generator) + 0.3
    signed = scheme.symmetric
    grid = IntegerGrid(
        bits=scheme.bits,
        symmetric=scheme.symmetric,
        signed_scales=signed,
        clip_steps=4,
        storage_type=storage,
    )
    return round_to_nearest(
        weight_OI, grid, scheme.group_size, tile_rows=50, pool=Pool(1)
    ), grid


@each_storage
@each_symmetry
@each_bits
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size"),
    [(1, 64, 32), (63, 172, -1), (137, 128, 64)],
    ids=lambda number: str(number),
)
def test_a_linear_comes_back(outputs, inputs, group_size, bits, symmetric, storage):
    scheme = Scheme(bits, group_size, symmetric)
    found, _ = solution((outputs, inputs), scheme, storage)
    stored = FORMAT.encode("x", found, scheme, storage)
    announced = FORMAT.tensors("x", (outputs, inputs), scheme, storage)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in announced} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()
    }
    assert all(tensor.is_contiguous() for tensor in stored.values())
    weight_OI = FORMAT.decode(stored.__getitem__, "x", scheme)
    expected_OI = decode(found.code_OI, found.scale_OG, found.zero_OG, storage)
    assert torch.equal(weight_OI, expected_OI)
    assert torch.equal(weight_OI, weight_OI.to(storage).float())
    if not symmetric:
        assert len(found.zero_OG.unique()) > 1 or outputs == 1


ARCHITECTURE = read_architecture(CONFIG, "config.json")


@each_storage
@each_symmetry
@each_bits
@pytest.mark.parametrize("group_size", [32, -1])
def test_compressed_tensors_decodes_the_same(group_size, bits, symmetric, storage):
    theirs = compressed_tensors()
    made = plan(bits=bits, group_size=group_size, symmetric=symmetric)
    config = FORMAT.quantization_config(made, ARCHITECTURE)
    arguments = config["config_groups"]["group_0"]["weights"]
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    their_scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**arguments)
    )
    scheme = made.scheme("x", 96)
    assert scheme is not None
    found, _ = solution((63, 96), scheme, storage)
    stored = FORMAT.encode("x", found, scheme, storage)
    local = {name.removeprefix("x."): tensor for name, tensor in stored.items()}
    compressor = theirs.PackedQuantizationCompressor
    their_OI = compressor.decompress(local, their_scheme)["weight"]
    our_OI = FORMAT.decode(stored.__getitem__, "x", scheme)
    assert their_OI.dtype == storage
    assert torch.equal(their_OI.float(), our_OI)


@each_symmetry
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("mlp", [172, 256])
def test_schemes_undo_the_config(mlp, bits, group_size, symmetric):
    """Inputs that the group does not divide get one scale a row."""
    architecture = read_architecture(CONFIG | {"intermediate_size": mlp}, "there")
    made = plan(bits=bits, group_size=group_size, symmetric=symmetric)
    config = FORMAT.quantization_config(made, architecture)
    schemes = schemes_of({"quantization_config": config}, architecture, "there")
    assert schemes is not None
    assert schemes.pop("lm_head") is None
    assert sorted(schemes) == sorted(linear_names(architecture.blocks))
    for name, scheme in schemes.items():
        inputs = architecture.linear_inputs()[name.split(".", 3)[-1]]
        divides = group_size != -1 and inputs % group_size == 0
        expected = Scheme(bits, group_size if divides else -1, symmetric)
        assert scheme == expected
        assert expected.groups(inputs) == (inputs // group_size if divides else 1)
        assert targets(config, name) == [scheme]


def targets(config: dict[str, Any], name: str) -> list[Scheme]:
    """The schemes that a loader finds for a linear, by the meaning of targets."""
    return [
        Scheme(w["num_bits"], w["group_size"] or -1, w["symmetric"])
        for group in config["config_groups"].values()
        for target in group["targets"]
        if target == "Linear" or re.match(target.removeprefix("re:"), name)
        for w in [group["weights"]]
    ]


def test_no_quantization_config_is_no_scheme():
    assert schemes_of(CONFIG, ARCHITECTURE, "there") is None


FOREIGN: dict[str, dict[str, Any]] = {
    "another-format": {"format": "float-quantized"},
    "no-groups": {"config_groups": {}},
    "groups-none": {"config_groups": None},
    "groups-list": {"config_groups": [1]},
    "no-weights": {"config_groups": {"group_0": {"targets": ["Linear"]}}},
    "weights-none": {"weights": None},
    "other-targets": {"targets": ["re:.*mlp.*"]},
    "one-bit": {"num_bits": 1},
    "nine-bits": {"num_bits": 9},
    "no-bits": {"num_bits": None},
    "words": {"num_bits": "many"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_configs_are_refused(name):
    config = copy.deepcopy(
        FORMAT.quantization_config(plan(group_size=-1), ARCHITECTURE)
    )
    group = config["config_groups"]["group_0"]
    for key, value in FOREIGN[name].items():
        for place in (config, group, group["weights"]):
            if key in place:
                place[key] = value
                break
    with pytest.raises(UnsupportedModelError) as caught:
        schemes_of({"quantization_config": config}, ARCHITECTURE, "there")
    known = "pack-quantized"
    if name == "another-format":
        known = " or ".join(stored.config_name for stored in FORMATS.values())
    assert str(caught.value) == (
        f"there: its quantization_config is not {known} of the linears of its"
        " blocks, as this tool writes it"
    )


@pytest.mark.parametrize("config", [{}, {"quant_method": "gptq", "bits": 4}])
def test_configs_of_other_methods_are_refused(config):
    with pytest.raises(UnsupportedModelError, match="is not pack-quantized"):
        schemes_of({"quantization_config": config}, ARCHITECTURE, "there")
