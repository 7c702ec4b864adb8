"""Runs with --grid nf and e8p: the folder, its loader, resume, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rsq_stream
import rsq_stream.demo
from rsq_stream.algorithm.gptq.rtn import round_to_nearest
from rsq_stream.algorithm.gptq.solver import decoded
from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.grids.e8p import LatticeGrid
from rsq_stream.algorithm.grids.nf import NormalFloat, normal_values
from rsq_stream.checkpoint.formats._quantization_config import schemes_of
from rsq_stream.checkpoint.formats.rsq_stream_grid import FORMAT
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.config.schemes import Scheme
from rsq_stream.errors import CheckpointError, UnsupportedModelError, UsageError
from rsq_stream.evaluation.perplexity import evaluate
from rsq_stream.model.architecture import read_architecture
from rsq_stream.ops.e8p_codebook import codeword_digits, digit_values
from rsq_stream.ops.pack import unpack
from rsq_stream.output.verify import verify
from rsq_stream.planning.validate import require_valid_grid
from rsq_stream.runtime.worker_pool import Pool
from tests.config.test_quantization_plan import plan
from tests.pipeline.test_repair import RUN as SMALL_RUN
from tests.pipeline.test_repair import flip, goes_on, place_of, stopped
from tests.pipeline.test_resume import SMALL
from tests.support.cli_runs import Run
from tests.support.entries import grid_settings
from tests.support.toy import (
    calm,
    contents,
    decoded_state,
    linear_names,
    open_toy,
    plan_toy,
    read_json,
    run_toy,
    toy_checkpoint,
    toy_windows,
)

SETTINGS: dict[str, dict[str, Any]] = {
    name: grid_settings(name) for name, grid in GRIDS.items() if FORMAT.stores(grid)
}
RUN: dict[str, Any] = SMALL_RUN | {"sweeps": 1, "refit": True}
WINDOWS = toy_windows(64, 6, 33, 3).window_BT


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with calm():
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grids") / "toy"
    sizes = SMALL | {"mlp": 64}
    return toy_checkpoint(folder, **sizes, straddle=False, dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=SETTINGS)
def made(request: pytest.FixtureRequest, toy: Path) -> tuple[str, Path]:
    output = toy.with_name(f"out-{request.param}")
    run_toy(toy, output, **RUN, **SETTINGS[request.param])
    return request.param, output


def test_the_folder_is_sound_and_says_what_it_is(
    made: tuple[str, Path], toy: Path
) -> None:
    grid, output = made
    found = verify(output, open_toy(toy))
    assert found.problems == []
    assert list(found.weight_errors) == linear_names(2)
    assert all(0 < error < 1 for error in found.weight_errors.values())
    config = read_json(output / "config.json")["quantization_config"]
    assert config["quant_method"] is None
    assert (config["format"], config["grid"]) == ("rsq-stream-grid", grid)
    manifest = read_json(output / "rsq_stream.json")
    assert manifest["plan"]["output_format"] == "rsq-stream-grid"
    assert "rsq_stream.load_model" in (output / "README.md").read_text()
    assert "compressed-tensors" not in (output / "README.md").read_text()


def test_the_planned_size_is_the_size(made: tuple[str, Path], toy: Path) -> None:
    grid, output = made
    bits = read_json(output / "rsq_stream.json")["bits_per_weight"]
    stored = {
        name: tensor
        for shard in output.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    source = sum(entry.size_bytes // 2 for entry in open_toy(toy).tensors.values())
    total = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())
    assert bits == pytest.approx(8 * total / source, rel=1e-12)
    packed = stored["model.layers.0.mlp.down_proj.weight_packed"]
    scale = stored["model.layers.0.mlp.down_proj.weight_scale"]
    if grid == "e8p":
        assert (packed.dtype, packed.shape) == (torch.int16, (32, 64 // 8))
        assert scale.shape == (32, 1)
    if grid == "nf":
        assert (packed.dtype, packed.shape) == (torch.int32, (32, 64 * 3 // 32))
        assert scale.shape == (32, 2)


def test_transformers_refuses_the_folder(made: tuple[str, Path]) -> None:
    """Of an unknown method it would only warn, and answer with random weights."""
    with pytest.raises(ValueError, match="has no `quant_method` attribute"):
        AutoModelForCausalLM.from_pretrained(made[1])


def test_the_loader_gives_what_eval_sees(made: tuple[str, Path]) -> None:
    _, output = made
    model = rsq_stream.load_model(output)
    assert model.dtype == torch.bfloat16
    state, expected = model.state_dict(), decoded_state(output)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        # Decoded weights are exact in the model's type.
        assert torch.equal(state[name].float(), tensor.float()), name
    whole = rsq_stream.load_model(output, dtype=torch.float32)
    with torch.no_grad():
        log_BTV = whole(WINDOWS).logits[:, :-1].double().log_softmax(-1)
    loss = -log_BTV.gather(2, WINDOWS[:, 1:, None].long()).mean()
    assert evaluate(open_toy(output), WINDOWS).loss == pytest.approx(
        float(loss), rel=1e-5
    )


def test_the_loader_takes_any_output(toy: Path, tmp_path: Path) -> None:
    run_toy(toy, tmp_path / "integers", method="rtn")
    for folder in (tmp_path / "integers", toy):
        state = rsq_stream.load_model(folder).state_dict()
        expected = decoded_state(folder) if folder != toy else None
        assert expected is None or state.keys() == expected.keys()
        for name, tensor in (expected or {}).items():
            assert torch.equal(state[name].float(), tensor.float()), name
    with pytest.raises(AttributeError, match="no attribute 'load_models'"):
        rsq_stream.load_models  # noqa: B018


def test_the_solver_beats_rounding(made: tuple[str, Path]) -> None:
    linears = read_json(made[1] / "rsq_stream.json")["linears"]
    assert [one["name"] for one in linears] == linear_names(2)
    assert all(one["relative_error"] < one["rounding_error"] for one in linears)
    assert all(one["bits"] == SETTINGS[made[0]]["bits"] for one in linears)


@pytest.mark.parametrize(("block", "stage"), [(0, "mlp in"), (1, "outputs")])
def test_a_run_that_was_stopped_gives_the_same_bytes(
    made: tuple[str, Path], toy: Path, tmp_path: Path, block: int, stage: str
) -> None:
    grid, whole = made
    settings = RUN | SETTINGS[grid]
    stopped(toy, tmp_path / "out", block, stage, **settings)
    other = {"in_flight": 1, "resident_units": 0}
    settings |= {"execution": other, "options": {"workers": 2}}
    run_toy(toy, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(whole)


def test_damaged_codes_are_solved_again(
    made: tuple[str, Path], toy: Path, tmp_path: Path
) -> None:
    grid, whole = made
    settings = RUN | SETTINGS[grid]
    stopped(toy, tmp_path / "out", 1, "mlp in", **settings)
    (partial,) = (tmp_path / "out").glob("*.partial")
    flip(partial, place_of(partial, "model.layers.1.self_attn.o_proj.weight_packed"))
    (notice,) = goes_on(toy, tmp_path / "out", **settings)
    assert "o_proj.weight_packed is not what was written" in notice
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [Scheme(b, 32, True, "nf") for b in range(2, 9)])
def test_nf_comes_back_from_disk(scheme: Scheme, storage: torch.dtype) -> None:
    weight_OI = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    grid = NormalFloat(
        bits=scheme.bits,
        symmetric=True,
        signed_scales=True,
        clip_steps=20,
        storage_type=storage,
    )
    found = round_to_nearest(weight_OI, grid, 32, tile_rows=4, pool=Pool(1))
    stored = FORMAT.encode("x", found, scheme, storage)
    back_OI = FORMAT.decode(stored.__getitem__, "x", scheme)
    assert torch.equal(back_OI, decoded(found, grid))
    code_OI = unpack(stored["x.weight_packed"], scheme.bits, 96).long()
    value_OI = normal_values(scheme.bits)[code_OI]
    scale_OI = stored["x.weight_scale"].float().repeat_interleave(32, 1)
    assert torch.equal(back_OI, (value_OI * scale_OI).to(storage).float())


def test_e8p_comes_back_from_disk() -> None:
    scheme = Scheme(2, -1, True, "e8p")
    weight_OI = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    grid = LatticeGrid(
        bits=2,
        symmetric=True,
        signed_scales=False,
        clip_steps=80,
        storage_type=torch.bfloat16,
    )
    found = round_to_nearest(weight_OI, grid, -1, tile_rows=4, pool=Pool(1))
    stored = FORMAT.encode("x", found, scheme, torch.bfloat16)
    back_OI = FORMAT.decode(stored.__getitem__, "x", scheme)
    assert torch.equal(back_OI, decoded(found, grid))
    index_ON = stored["x.weight_packed"].long() % (1 << 16)
    value_OI = digit_values()[codeword_digits()[index_ON].long()].flatten(1)
    scale_O1 = stored["x.weight_scale"].float()
    assert torch.equal(back_OI, (value_OI * scale_O1).bfloat16().float())


@pytest.mark.parametrize("grid", SETTINGS)
@pytest.mark.parametrize(
    ("tensor", "changed"),
    [
        ("weight_shape", torch.tensor([32, 1 << 40])),
        ("weight_shape", torch.tensor([32, -64])),
        ("weight_shape", torch.tensor([32, 72])),
        ("weight_shape", torch.tensor([32])),
        ("weight_packed", torch.zeros(32, 3, dtype=torch.int32)),
        ("weight_packed", torch.zeros(32, 8, dtype=torch.int8)),
        ("weight_scale", torch.zeros(32, 5, dtype=torch.bfloat16)),
        ("weight_scale", torch.zeros(32, 1, dtype=torch.int32)),
    ],
)
def test_numbers_from_disk_are_checked(
    toy: Path, tmp_path: Path, grid: str, tensor: str, changed: torch.Tensor
) -> None:
    output = toy.with_name(f"rounded-{grid}")
    if not output.exists():
        run_toy(
            toy, output, method="rtn", **SMALL_RUN | {"propagate": 0.0} | SETTINGS[grid]
        )
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    (shard,) = copy.glob("*.safetensors")
    tensors = load_file(shard)
    tensors[f"model.layers.0.mlp.down_proj.{tensor}"] = changed
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"down_proj: its tensors do not fit"):
        rsq_stream.load_model(copy)


def test_the_config_comes_back_and_nothing_else_does(toy: Path) -> None:
    checkpoint = open_toy(toy)
    architecture = read_architecture(checkpoint.config, "there")
    for settings in SETTINGS.values():
        kept = ["v_proj@1=16"]
        made, _ = plan_toy(toy, **settings, overrides=tuple(kept))
        config = json.loads(json.dumps(FORMAT.quantization_config(made, architecture)))
        schemes = schemes_of({"quantization_config": config}, architecture, "there")
        assert schemes is not None
        names = linear_names(2)
        for name in names:
            inputs = architecture.linear_inputs()[name.split(".", 3)[3]]
            assert schemes[name] == made.scheme(name, inputs)
        assert schemes["model.layers.1.self_attn.v_proj"] is None
        for key, value in (("grid", "e7p"), ("grid", "integer"), ("format", "x")):
            with pytest.raises(UnsupportedModelError, match="there: its quantization"):
                schemes_of(
                    {"quantization_config": config | {key: value}},
                    architecture,
                    "there",
                )
    config["grid"] = "e8p"
    group = config["config_groups"]["group_0"]
    for weights in (
        {"num_bits": 3, "group_size": None},
        {"num_bits": 2, "group_size": 32},
    ):
        changed = {"group_0": group | {"weights": weights}}
        config["config_groups"] = changed
        with pytest.raises(UnsupportedModelError, match="there: its quantization"):
            schemes_of({"quantization_config": config}, architecture, "there")


E8P: dict[str, Any] = {
    "grid": "e8p",
    "bits": 2,
    "group_size": -1,
    "signed_scales": False,
}
NF: dict[str, Any] = {"grid": "nf"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": "nf4"}, "--grid must be one of e8p, integer, nf, not nf4"),
        (
            NF | {"symmetric": False},
            "--asymmetric: there are no zero points with --grid nf",
        ),
        (
            NF | {"method": "rotate"},
            "--method rotate quantizes nothing: leave --grid out",
        ),
        (E8P | {"bits": 3}, "--bits must be 2 with --grid e8p, not 3"),
        (E8P | {"group_size": 64}, "--group-size must be -1 with --grid e8p, not 64"),
        (E8P | {"signed_scales": True}, "--signed-scales must be off with --grid e8p"),
        (E8P | {"act_order": True}, "--act-order must be off with --grid e8p, not on"),
        (
            E8P | {"clip_exponent": 2.4},
            "--clip-exponent must be 2 with --grid e8p, not 2.4",
        ),
        (E8P | {"overrides": ("a=4",)}, "--override must be PATTERN=16 with --grid"),
        (E8P | {"tile_columns": 20}, "tiles must be a multiple of 8 columns with"),
    ],
)
def test_what_a_grid_cannot_do_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        require_valid_grid(plan(**changes))
    assert str(caught.value).startswith(message)


def test_plans_with_a_grid() -> None:
    made: QuantizationPlan = plan(**E8P, overrides=("a=16",))
    assert made.scheme("b", 64) == Scheme(2, -1, True, "e8p")
    assert made.scheme("a", 64) is None
    assert plan(grid="nf", act_order=True).scheme("b", 96) == Scheme(3, -1, True, "nf")


def test_inputs_that_eight_does_not_divide_are_named(tmp_path: Path) -> None:
    toy = toy_checkpoint(tmp_path / "toy", mlp=172)
    message = (
        r"--grid e8p takes inputs by eights, and model\.layers\.0\.mlp\.down_proj has"
        r' 172; keep it with --override "down_proj=16"'
    )
    with pytest.raises(UsageError, match=message):
        run_toy(toy, tmp_path / "out", **SETTINGS["e8p"], method="rtn")
    assert not (tmp_path / "out").exists()
    run_toy(
        toy,
        tmp_path / "out",
        **SETTINGS["e8p"],
        method="rtn",
        overrides=("down_proj=16",),
    )
    assert verify(tmp_path / "out", open_toy(toy)).problems == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bpw", "7.9"], "--bpw chooses among integers: leave --grid e8p out"),
        (["--signed-scales"], "--signed-scales: --grid e8p is its own mirror"),
        (["--head-bits", "8"], "--override must be PATTERN=16 with --grid e8p"),
        (["--bits", "4"], "--bits must be 2 with --grid e8p, not 4"),
        (["--asymmetric"], "--asymmetric: there are no zero points with --grid e8p"),
    ],
)
def test_the_command_line_refuses(run: Run, options: list[str], message: str) -> None:
    model = str(rsq_stream.demo.MODEL)
    given = ["--bits", "2"] if not {"--bits", "--bpw"} & set(options) else []
    code, out, err = run(
        "plan", model, "--grid", "e8p", "--group-size", "-1", *given, *options
    )
    assert (code, out) == (1, "")
    assert message in err


def test_the_command_line_says_what_it_does(run: Run, made: tuple[str, Path]) -> None:
    grid, output = made
    words = f"{SETTINGS[grid]['bits']} bits, {GRIDS[grid].title}"
    known = {"nf": "3 bits, NormalFloat", "e8p": "2 bits, E8P lattice"}
    assert words == known.get(grid, words)
    code, out, _ = run("inspect", output)
    assert code == 0
    assert words in out
    assert "rsq-stream-grid" in out
