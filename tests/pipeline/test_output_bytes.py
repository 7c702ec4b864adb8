"""The output of a toy: what transformers makes of it, tensor by tensor."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import is_match
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.grids.integer import IntegerGrid
from rsq_stream.checkpoint.formats._quantization_config import schemes_of
from rsq_stream.checkpoint.formats.compressed_tensors import FORMAT
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import CheckpointError, UnsupportedModelError
from rsq_stream.model.architecture import read_architecture
from rsq_stream.model.families import FAMILIES
from rsq_stream.model.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD
from rsq_stream.output.verify import verify
from rsq_stream.runtime.worker_pool import Pool
from tests.support.entries import family_config
from tests.support.toy import (
    calm,
    contents,
    decoded_state,
    linear_names,
    open_toy,
    read_json,
    run_toy,
    toy_checkpoint,
    toy_windows,
)

Case = tuple[str, dict[str, Any], dict[str, Any]]
G32: dict[str, Any] = {"group_size": 32}
OWN = ("q_proj=4", "*@0=2", "v_proj@1=16", "down_proj=16", "o_proj@1=3g64")
CASES: dict[str, Case] = {
    "llama-g32-rotated": ("llama", {}, G32),
    "llama-g32-zeros-tied": (
        "llama",
        {"tied": True, "mlp": 160},
        G32 | {"symmetric": False, "method": "gptq"},
    ),
    "llama-row-biases-rotated": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tied": True},
        {"group_size": -1, "bits": 5},
    ),
    "mistral-row-zeros-rotated": (
        "mistral",
        {"tied": True, "sliding_window": 7},
        {"group_size": -1, "symmetric": False},
    ),
    "mistral-g32-unrotated": ("mistral", {}, G32 | {"method": "gptq", "bits": 8}),
    "qwen2-g32-zeros-rotated": (
        "qwen2",
        {"mlp": 160},
        G32 | {"symmetric": False, "bits": 2},
    ),
    "qwen2-row-tied": (
        "qwen2",
        {"tied": True},
        {"group_size": -1, "method": "gptq", "bits": 6},
    ),
    "qwen3-g32-tied-rotated": ("qwen3", {"tied": True}, G32 | {"bits": 7}),
    "qwen3-row-zeros": (
        "qwen3",
        {},
        {"group_size": -1, "symmetric": False, "method": "gptq", "bits": 4},
    ),
    "llama-linears-of-their-own": (
        "llama",
        {"tied": True},
        G32 | {"overrides": OWN, "head_bits": 8},
    ),
    "qwen2-rounded-of-their-own": (
        "qwen2",
        {},
        G32 | {"overrides": OWN, "head_bits": 8, "method": "rtn"},
    ),
    "qwen3-rounded": ("qwen3", {}, G32 | {"method": "rtn", "bits": 4}),
}


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with calm():
        yield


def logits(model: Any) -> Tensor:
    token_BT = toy_windows(128, 3, 20, 5).window_BT
    with torch.no_grad():
        result: Tensor = model.eval()(token_BT).logits
    return result


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    """Load an output as anybody would.

    compressed-tensors 0.18 to 0.20 leaves zero points unpacked in the model it
    fills, and so refuses its own format unless it may decode at once. Then
    transformers 5.23 takes the first group's scheme for all linears.
    """
    config = read_json(folder / "config.json")
    schemes = schemes_of(config, read_architecture(config, "here"), "here") or {}
    options = {}
    if any(scheme and not scheme.symmetric for scheme in schemes.values()):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        # It says that the folder has a quantization_config too.
        warnings.simplefilter("ignore", UserWarning)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def plain_model(folder: Path, state: dict[str, Tensor]) -> Any:
    """Return the folder's model without any quantizer, filled with fp32 tensors."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.tie_word_embeddings:
        state = state | {LM_HEAD: state[EMBEDDING]}
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_decode(tmp_path: Path, case: str) -> None:
    family, config, settings = CASES[case]
    source = toy_checkpoint(tmp_path / "toy", family=family, **config)
    output = tmp_path / "out"
    run_toy(source, output, **settings)
    theirs = loaded(output, torch.float32)
    got, expected = logits(theirs), logits(plain_model(output, decoded_state(output)))
    assert (got - expected).abs().max() < 1e-4 * expected.std()
    # The tensors of the file are those of the model, and nothing is left out.
    left = {name for name in open_toy(output).tensors if name.endswith("_packed")}
    kept = {"model.layers.1.self_attn.v_proj"} if "own" in case else set()
    kept |= (
        {f"model.layers.{n}.mlp.down_proj" for n in range(2)}
        if "own" in case
        else set()
    )
    names = {*linear_names(2)} - kept | ({"lm_head"} if "own" in case else set())
    assert left == {f"{name}.weight_packed" for name in names}


def their_weights(output: Path) -> dict[str, Tensor]:
    """Decode an output linear by linear with compressed-tensors itself."""
    checkpoint = open_toy(output)
    made = QuantizationConfig.model_validate(checkpoint.config["quantization_config"])
    weights = {}
    for name in linear_names(2):
        stored = {
            tensor.rpartition(".")[2]: checkpoint.read(tensor)
            for tensor in checkpoint.tensors
            if tensor.startswith(f"{name}.weight_")
        }
        (scheme,) = [
            scheme
            for scheme in made.config_groups.values()
            if is_match(name, torch.nn.Linear(1, 1), scheme.targets)
        ]
        decoded = PackedQuantizationCompressor.decompress(stored, scheme)
        weights[f"{name}.weight"] = decoded["weight"]
    return weights


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_decodes_what_we_decode(
    tmp_path: Path, bits: int, symmetric: bool
) -> None:
    # 172 inputs are no multiple of 32: two schemes in one model.
    source = toy_checkpoint(tmp_path / "toy", dtype=torch.bfloat16)
    run_toy(source, tmp_path / "out", method="rtn", bits=bits, symmetric=symmetric)
    ours, theirs = decoded_state(tmp_path / "out"), their_weights(tmp_path / "out")
    assert len(theirs) == 14
    for name, weight_OI in theirs.items():
        assert weight_OI.dtype == torch.bfloat16
        assert torch.equal(weight_OI.float(), ours[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["rsq", "gptq"])
def test_many_bits_give_the_source_back(
    tmp_path: Path, family: str, method: str
) -> None:
    tied = method == "rsq"
    config = family_config(family) | {"tied": tied}
    source = toy_checkpoint(tmp_path / "toy", family=family, **config)
    output = tmp_path / "out"
    run_toy(source, output, method=method, bits=8)
    checkpoint = open_toy(source)
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    before = logits(plain_model(source, state))
    after = logits(plain_model(output, decoded_state(output)))
    signal, noise = before.square().mean(), (after - before).square().mean()
    assert 10 * torch.log10(signal / noise) > 30


@pytest.mark.parametrize("family", FAMILIES)
def test_rotate_alone_gives_the_source_back(tmp_path: Path, family: str) -> None:
    config = family_config(family) | {"tied": True}
    source = toy_checkpoint(tmp_path / "toy", family=family, **config)
    summary = run_toy(source, tmp_path / "out", method="rotate")
    assert summary.records == ()
    assert not verify(tmp_path / "out", open_toy(source)).problems
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    before = logits(loaded(source, torch.float32))
    after = logits(loaded(tmp_path / "out", torch.float32))
    assert (after - before).abs().max() < 1e-4 * before.std()
    embedding = [open_toy(f).read(EMBEDDING) for f in (source, tmp_path / "out")]
    assert not torch.equal(*embedding)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unrotated_tensors_are_copied(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    source = toy_checkpoint(tmp_path / "toy", family="qwen3", dtype=dtype, tied=tied)
    run_toy(source, tmp_path / "out", method="gptq")
    before, after = open_toy(source), open_toy(tmp_path / "out")
    weights = {f"{name}.weight" for name in linear_names(2)}
    copied = before.tensors.keys() - weights
    assert {EMBEDDING, FINAL_NORM, "model.layers.1.self_attn.q_norm.weight"} <= copied
    for name in copied:
        raw = [checkpoint.read(name) for checkpoint in (before, after)]
        assert raw[0].dtype == raw[1].dtype == dtype
        assert torch.equal(raw[0].view(torch.uint8), raw[1].view(torch.uint8))
    assert (LM_HEAD in after.tensors) == (not tied)
    assert after.config["tie_word_embeddings"] == tied


def test_a_rotation_unties_the_head_and_empties_the_norms(tmp_path: Path) -> None:
    source = toy_checkpoint(tmp_path / "toy", tied=True)
    run_toy(source, tmp_path / "out")
    after = open_toy(tmp_path / "out")
    assert after.config["tie_word_embeddings"] is False
    norms = [name for name in after.tensors if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(after.read(name), torch.ones(96)) for name in norms)
    before_VD, gain_D = (
        open_toy(source).read(EMBEDDING),
        open_toy(source).read(norms[-1]),
    )
    embedding_VD, head_VD = after.read(EMBEDDING), after.read(LM_HEAD)
    expected_VV = (before_VD * gain_D) @ before_VD.T
    assert torch.allclose(head_VD @ embedding_VD.T, expected_VV, atol=1e-4)
    assert not torch.allclose(embedding_VD, before_VD, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sixteen_bit_sources_stay_sixteen_bit(
    tmp_path: Path, dtype: torch.dtype, symmetric: bool
) -> None:
    source = toy_checkpoint(tmp_path / "toy", dtype=dtype)
    run_toy(source, tmp_path / "out", symmetric=symmetric)
    checkpoint = open_toy(tmp_path / "out")
    for name, entry in checkpoint.tensors.items():
        kind = name.rpartition("_")[2]
        whole = {"packed": torch.int32, "point": torch.int32, "shape": torch.int64}
        assert entry.dtype == whole.get(kind, dtype)
    state = decoded_state(tmp_path / "out")
    for name in linear_names(2):
        weight_OI = state[f"{name}.weight"]
        assert torch.equal(weight_OI, weight_OI.to(dtype).float())
    if symmetric:
        theirs = loaded(tmp_path / "out", dtype)
        assert logits(theirs).dtype == dtype
        for name in linear_names(2):
            weight_OI = theirs.get_submodule(name).weight
            assert torch.equal(weight_OI.float(), state[f"{name}.weight"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_rounding(tmp_path: Path, symmetric: bool) -> None:
    source = toy_checkpoint(tmp_path / "toy")
    run_toy(source, tmp_path / "out", method="rtn", symmetric=symmetric)
    state, checkpoint = decoded_state(tmp_path / "out"), open_toy(source)
    grid = IntegerGrid(
        bits=3,
        symmetric=symmetric,
        signed_scales=symmetric,
        clip_steps=10,
        storage_type=torch.float32,
    )
    for name in linear_names(2):
        weight_OI = checkpoint.read(f"{name}.weight")
        group = -1 if weight_OI.shape[1] % 32 else 32
        made = round_to_nearest(weight_OI, grid, group, tile_rows=1000, pool=Pool(1))
        grouped = (made.code_OI.shape[0], made.scale_OG.shape[1], -1)
        whole_OGC = made.code_OI.reshape(grouped).float() - made.zero_OG[:, :, None]
        decoded_OI = (whole_OGC * made.scale_OG[:, :, None]).flatten(1)
        assert torch.equal(state[f"{name}.weight"], decoded_OI)


def test_the_config_says_what_is_where(tmp_path: Path) -> None:
    source = toy_checkpoint(tmp_path / "toy", shards=3)
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    (source / "pytorch_model.bin").write_bytes(b"not ours")
    run_toy(source, tmp_path / "out", symmetric=False, group_size=64)
    files = contents(tmp_path / "out")
    assert files["tokenizer_config.json"] == b'{"a": 1}'
    assert "pytorch_model.bin" not in files
    config = read_json(tmp_path / "out" / "config.json")
    kept = {k: v for k, v in config.items() if k != "quantization_config"}
    assert kept == read_json(source / "config.json")
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    schemes = schemes_of(config, read_architecture(config, "here"), "here")
    assert schemes is not None
    # 96 and 172 are no multiples of 64, so every linear falls back to whole rows.
    assert {made.group_size for made in schemes.values() if made} == {-1}
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    tensors = open_toy(tmp_path / "out").tensors
    assert index["weight_map"] == {name: e.shard for name, e in tensors.items()}
    total = sum(entry.size_bytes for entry in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    source = toy_checkpoint(tmp_path / "toy")
    run_toy(source, tmp_path / "out", method="rtn")
    with pytest.raises(UnsupportedModelError, match=r"out: is quantized already; give"):
        run_toy(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    checkpoint = open_toy(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no tensor named absent\.weight_shape"):
        FORMAT.decode(checkpoint.read, "absent", Scheme(3, -1, symmetric=True))
