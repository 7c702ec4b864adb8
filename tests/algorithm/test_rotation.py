"""Rotations are orthogonal, and nothing but name, size and seed decides them."""

import pytest
import torch
from torch import Tensor

from rsq_stream.algorithm.rotation.rotation import (
    Rotation,
    make_rotation,
    rotation_name,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TINY = 1e-7

NAMES = {
    1: "hadamard-1",
    63: "orthogonal-63",
    96: "hadamard-96",
    137: "orthogonal-137",
    160: "hadamard-160",
    172: "orthogonal-172",
    192: "hadamard-192",
    2752: "block-hadamard-64",
    3584: "hadamard-3584",
    4099: "block-hadamard-1",
    7552: "block-hadamard-128",
    25600: "hadamard-25600",
}
# Small enough for a product with the whole matrix; one block-diagonal of each kind.
ROTATIONS = [
    ("hadamard-1", 1),
    ("orthogonal-63", 63),
    ("hadamard-96", 96),
    ("orthogonal-137", 137),
    ("hadamard-160", 160),
    ("block-hadamard-4", 172),
    ("block-hadamard-20", 100),
    ("block-hadamard-1", 137),
]
each_rotation = pytest.mark.parametrize(("name", "size"), ROTATIONS)


def matrix_of(rotation: Rotation) -> Tensor:
    return rotation.apply(torch.eye(rotation.size, dtype=torch.float64))


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("size", NAMES)
def test_name(size):
    assert rotation_name(size) == NAMES[size]


@each_rotation
def test_is_orthogonal(name, size):
    q_NN = matrix_of(make_rotation(name, size, seed=3))
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(q_NN @ q_NN.T, eye, rtol=0, atol=1e-13)


@each_rotation
def test_keeps_to_its_name(name, size):
    rotation = make_rotation(name, size, seed=3)
    kind, _, order = name.rpartition("-")
    assert (rotation.name, rotation.size) == (name, size)
    assert rotation.order == (0 if kind == "orthogonal" else int(order))
    q_NN = matrix_of(rotation)
    if kind == "orthogonal":
        # Spread like a random direction, and mixing every input into every output.
        assert bool((q_NN != 0).all())
        return
    run = torch.arange(size) // int(order)
    inside = run[:, None] == run
    assert bool((q_NN[~inside] == 0).all())
    expected = torch.full_like(q_NN, int(order) ** -0.5)[inside]
    torch.testing.assert_close(q_NN[inside].abs(), expected, rtol=1e-15, atol=0)
    assert set(rotation.signs_N.tolist()) <= {-1, 1}
    if size > 1:
        assert len(set(rotation.signs_N.tolist())) == 2


@each_rotation
def test_only_the_seed_decides(name, size):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = matrix_of(make_rotation(name, size, seed=3))
        torch.manual_seed(2)
        torch.rand(7)
        second = matrix_of(make_rotation(name, size, seed=3))
    assert torch.equal(first, second)
    if size > 1:
        other = matrix_of(make_rotation(name, size, seed=4))
        assert not torch.equal(first, other)


def test_making_one_leaves_the_global_generator():
    before = torch.random.get_rng_state()
    make_rotation("orthogonal-63", 63, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_spread_over_all_signs():
    """Every input is negated by about half of the seeds."""
    signs = [make_rotation("hadamard-96", 96, seed).signs_N for seed in range(200)]
    assert float(torch.stack(signs).mean(0).abs().max()) < 0.4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 63, 137])
@each_rotation
def test_apply_keeps_to_the_budget(name, size, rows, device):
    rotation = make_rotation(name, size, seed=5)
    q_NN, x_LN = matrix_of(rotation), random(rows, size)
    exact_LN = x_LN @ q_NN
    single_LN = x_LN.float().to(device)
    found_LN = rotation.apply(single_LN)
    assert found_LN.dtype == torch.float32
    naive = rms((single_LN @ q_NN.float().to(device)).cpu() - exact_LN)
    assert rms(found_LN.cpu() - exact_LN) <= 2 * naive + TINY
    assert rms(found_LN.cpu().norm(dim=1) - x_LN.norm(dim=1)) <= 1e-6 * size**0.5


@pytest.mark.parametrize("device", DEVICES)
@each_rotation
def test_apply_to_outputs_is_the_transpose(name, size, device):
    rotation, weight_NI = make_rotation(name, size, seed=5), random(size, 63)
    found_NI = rotation.apply_to_outputs(weight_NI.to(device)).cpu()
    expected_NI = matrix_of(rotation).T @ weight_NI
    assert found_NI.is_contiguous()
    torch.testing.assert_close(found_NI, expected_NI, rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [1, 2, 7])
@pytest.mark.parametrize(("name", "size"), [("hadamard-16", 16), ("orthogonal-26", 26)])
def test_apply_per_head_turns_each_head_by_itself(name, size, heads, device):
    rotation, x_LN = make_rotation(name, size, seed=5), random(63, heads * size)
    found_LN = rotation.apply_per_head(x_LN.to(device)).cpu()
    eye = torch.eye(heads, dtype=torch.float64)
    expected_LN = x_LN @ torch.kron(eye, matrix_of(rotation))
    assert found_LN.shape == x_LN.shape
    torch.testing.assert_close(found_LN, expected_LN, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_values_come_back_through_the_output(seed):
    """o undoes what v did: x R (W R)^T = x W^T."""
    rotation = make_rotation(rotation_name(24), 24, seed)
    value_LN, weight_ON = random(63, 72), random(137, 72)
    turned_LO = rotation.apply_per_head(value_LN) @ rotation.apply_per_head(weight_ON).T
    torch.testing.assert_close(turned_LO, value_LN @ weight_ON.T, rtol=0, atol=1e-12)
