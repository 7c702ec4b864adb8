"""Streamed perplexity, divergence and samples against transformers' own."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rsq_stream.checkpoint import source
from rsq_stream.checkpoint.model_reader import ModelReader
from rsq_stream.errors import (
    CalibrationError,
    CheckpointError,
    NumericalError,
    UnsupportedModelError,
)
from rsq_stream.evaluation import perplexity
from rsq_stream.evaluation.generation import greedy_sample
from rsq_stream.evaluation.perplexity import evaluate, evaluation_windows
from rsq_stream.evaluation.token_losses import TokenLosses
from rsq_stream.events import StageStarted
from rsq_stream.model.families import FAMILIES
from tests.support.entries import family_config
from tests.support.toy import (
    Recorder,
    calm,
    open_toy,
    run_toy,
    toy_checkpoint,
    toy_tokenizer,
    toy_windows,
)

WINDOWS = toy_windows(128, 7, 33, 3).window_BT


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    with calm():
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "toy"
    toy_tokenizer(toy_checkpoint(folder))
    toy_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(toy: Path) -> Path:
    run_toy(toy, toy.with_name("quantized"), bits=4)
    return toy.with_name("quantized")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a unit, seven tokens and 32 words a tile of logits: all split."""
    monkeypatch.setattr(perplexity, "_UNIT_TOKENS", 66)
    monkeypatch.setattr(perplexity, "_LOGIT_TOKENS", 7)
    monkeypatch.setattr(source, "CHUNK_BYTES", 1)  # 32 rows of the head at a time


def little_memory(monkeypatch: pytest.MonkeyPatch, available: int = 0) -> None:
    memory = SimpleNamespace(available=available)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)


def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_probabilities(folder: Path, window_BT: Tensor) -> Tensor:
    """Return what transformers predicts for each next token, ``[B, T - 1, V]``."""
    with torch.no_grad():
        logits_BTV: Tensor = transformers_model(folder)(window_BT).logits
    return logits_BTV[:, :-1].double().log_softmax(-1)


def loss_of(log_BTV: Tensor, window_BT: Tensor) -> float:
    return float(-log_BTV.gather(2, window_BT[:, 1:, None]).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, family_config(family)) for family in FAMILIES),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {"tied": True}),
    ],
)
@pytest.mark.usefixtures("small_units")
def test_a_source_has_the_loss_that_transformers_gives_it(
    tmp_path: Path, family: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = toy_checkpoint(tmp_path / "toy", family=family, dtype=dtype, **config)
    made = evaluate(open_toy(folder), WINDOWS)
    expected = loss_of(log_probabilities(folder, WINDOWS), WINDOWS)
    assert made.loss == pytest.approx(expected, rel=1e-5)
    assert made.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (made.windows, made.tokens) == (7, 7 * 32)
    assert made.kl_divergence is made.against_perplexity is None


def test_a_quantized_folder_has_the_loss_that_transformers_gives_it(
    quantized: Path,
) -> None:
    made = evaluate(open_toy(quantized), WINDOWS)
    expected = loss_of(log_probabilities(quantized, WINDOWS), WINDOWS)
    assert made.loss == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_diverge_from_itself(toy: Path) -> None:
    made = evaluate(open_toy(toy), WINDOWS, against=open_toy(toy))
    assert made.kl_divergence == 0
    assert made.against_perplexity == made.perplexity


@pytest.mark.usefixtures("small_units")
def test_divergence_from_the_source(toy: Path, quantized: Path) -> None:
    made = evaluate(open_toy(quantized), WINDOWS, against=open_toy(toy))
    source_BTV = log_probabilities(toy, WINDOWS)
    model_BTV = log_probabilities(quantized, WINDOWS)
    apart_BTV = source_BTV.exp() * (source_BTV - model_BTV)
    expected = float(apart_BTV.sum(-1).mean())
    assert made.kl_divergence == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3
    source_loss = loss_of(source_BTV, WINDOWS)
    assert made.against_perplexity == pytest.approx(math.exp(source_loss), rel=1e-5)
    assert made.loss == pytest.approx(loss_of(model_BTV, WINDOWS), rel=1e-5)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("units", [0, 1, 4])
def test_memory_and_workers_change_no_bit(
    toy: Path,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    units: int,
    workers: int,
) -> None:
    models: dict[str, Any] = {"against": open_toy(toy)}
    expected = evaluate(open_toy(quantized), WINDOWS, **models)
    little_memory(monkeypatch, 4 * units * 2 * 33 * 96 * 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = evaluate(open_toy(quantized), WINDOWS, workers=workers, **models)
    assert (made.loss, made.kl_divergence) == (expected.loss, expected.kl_divergence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tile", [1, 5, 50])
def test_losses_and_divergence_are_those_of_the_whole_vocabulary(tile: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_MLV = 9 * torch.randn(2, 20, 50, generator=generator)
    logits_MLV[:, 3] -= 200  # far below 0, and one far above all others
    logits_MLV[0, 4, 49] += 300
    target_L = torch.randint(0, 50, (20,), generator=generator)
    made = TokenLosses(target_L, 2)
    for first in range(0, 50, tile):
        for rows in (slice(0, 7), slice(7, 99)):
            parts = logits_MLV[:, rows, first : first + tile]
            made.take_in(rows, first, list(parts))
    losses, apart = made.sums()
    log_MLV = logits_MLV.double().log_softmax(-1)
    index_ML1 = target_L.expand(2, -1)[..., None]
    assert losses == pytest.approx((-log_MLV.gather(2, index_ML1)).sum((1, 2)).tolist())
    expected = (log_MLV[1].exp() * (log_MLV[1] - log_MLV[0])).sum()
    assert apart == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"head_bits": 3, "symmetric": False},
        {"head_bits": 4, "grid": "nf"},
        {"method": "rotate", "bits": 4},
    ],
    ids=["asymmetric", "nf", "kept"],
)
def test_rows_of_the_head_are_those_of_the_whole(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = toy_checkpoint(tmp_path / "toy", vocabulary=137)
    run_toy(folder, tmp_path / "out", **{"method": "rtn", **settings})
    reader = ModelReader(open_toy(tmp_path / "out"), torch.device("cpu"))
    rows = [reader.head_rows(first, 64) for first in range(0, 137, 64)]
    assert [len(part) for part in rows] == [64, 64, 9]
    assert torch.equal(torch.cat(rows), reader.head())


def test_what_it_says_while_it_works(toy: Path) -> None:
    recorder = Recorder()
    evaluate(open_toy(toy), WINDOWS, listener=recorder)
    stages = [event for event in recorder.events if isinstance(event, StageStarted)]
    assert [(event.block, event.stage) for event in stages] == [
        (0, "forward"),
        (1, "forward"),
    ]


def test_vocabularies_must_go_together(toy: Path, tmp_path: Path) -> None:
    other = toy_checkpoint(tmp_path / "other", vocabulary=64)
    message = r"toy: vocabularies of \[64, 128\] and a largest token of \d+ do not go"
    with pytest.raises(UnsupportedModelError, match=message):
        evaluate(open_toy(toy), WINDOWS, against=open_toy(other))
    message = r"other: vocabularies of \[64\] and a largest token of 64 do not go"
    with pytest.raises(UnsupportedModelError, match=message):
        evaluate(open_toy(other), torch.tensor([[1, 64]]))


def test_activations_that_are_not_finite_are_located(tmp_path: Path) -> None:
    folder = toy_checkpoint(tmp_path / "toy", shards=1)
    shard = open_toy(folder)
    entry = shard.entry("model.layers.1.input_layernorm.weight")
    header = int.from_bytes((folder / entry.shard).read_bytes()[:8], "little")
    with (folder / entry.shard).open("r+b") as file:
        file.seek(8 + header + entry.offset)
        file.write(torch.tensor(torch.nan).numpy().tobytes())
    message = r"^block 1, forward, sequence 0, token 0: the activations hold NaN"
    with pytest.raises(NumericalError, match=message):
        evaluate(open_toy(folder), WINDOWS)


def _windows(text: str, length: int, **options: Any) -> list[list[int]]:
    chosen = {"bos": False, "max_windows": None, "where": "text.txt"} | options
    tokenizer = chosen.pop("tokenizer", None) or toy_tokenizer()
    rows: list[list[int]] = evaluation_windows(
        text, tokenizer, length, **chosen
    ).tolist()
    return rows


def test_windows_do_not_overlap() -> None:
    a, b, c, d, e = map(ord, "abcde")
    assert _windows("abcde", 2) == [[a, b], [c, d]]
    assert _windows("abcde", 2, max_windows=1) == [[a, b]]
    assert _windows("abcde", 5, max_windows=9) == [[a, b, c, d, e]]
    assert _windows("abcde", 3, bos=True) == [[2, a, b], [2, c, d]]
    assert _windows("abcde", 6, bos=True) == [[2, a, b, c, d, e]]


def test_a_text_that_is_too_short_is_refused() -> None:
    message = r"^text.txt: 3 tokens, but one window needs 4; give more text or a small"
    with pytest.raises(CalibrationError, match=message):
        _windows("abc", 4)
    with pytest.raises(CalibrationError, match=message):
        _windows("abc", 5, bos=True)
    tokenizer = toy_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(CalibrationError, match=r"has no BOS token; use --no-bos$"):
        _windows("abc", 2, bos=True, tokenizer=tokenizer)


def generated(folder: Path, prompt: str, tokens: int) -> str:
    """Let transformers continue a prompt greedily."""
    tokenizer = toy_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = transformers_model(folder).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("which", ["toy", "quantized"])
@pytest.mark.parametrize("available", [0, 10**9], ids=["read-again", "kept"])
def test_greedy_samples_are_those_of_transformers(
    toy: Path,
    quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    available: int,
) -> None:
    folder = {"toy": toy, "quantized": quantized}[which]
    expected = generated(folder, "Once upon", 12)
    little_memory(monkeypatch, available)
    assert greedy_sample(open_toy(folder), "Once upon", 12) == expected
    assert expected.startswith("Once upon")
    assert greedy_sample(open_toy(folder), "Once upon", 0) == "Once upon"


@pytest.mark.usefixtures("small_units")
def test_a_sample_never_has_the_whole_head(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room for it: 32 rows of 128 at a time, again for each token."""
    little_memory(monkeypatch)
    read: list[int] = []
    rows = ModelReader.head_rows

    def head_rows(reader: ModelReader, first: int, count: int) -> Tensor:
        read.append(first)
        found = rows(reader, first, count)
        assert len(found) == 32
        return found

    monkeypatch.setattr(ModelReader, "head_rows", head_rows)
    monkeypatch.delattr(ModelReader, "head")
    greedy_sample(open_toy(toy), "ab", 2)
    assert read == 2 * [0, 32, 64, 96]


def test_a_sample_ends_at_the_end_of_text(toy: Path, tmp_path: Path) -> None:
    whole = greedy_sample(open_toy(toy), "ab", 8)
    last = next(char for char in whole[4:] if char not in "ab")
    folder = Path(shutil.copytree(toy, tmp_path / "toy"))
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = last
    tokenizer.save_pretrained(folder)
    assert greedy_sample(open_toy(folder), "ab", 8) == whole[: whole.index(last)]


def test_a_damaged_quantized_folder_is_refused(quantized: Path) -> None:
    checkpoint = open_toy(quantized)
    checkpoint.config["intermediate_size"] = 100
    with pytest.raises(CheckpointError, match=r"decodes to \[172, 96\], but config"):
        evaluate(checkpoint, WINDOWS)
    checkpoint.config["quantization_config"]["format"] = "int-quantized"
    with pytest.raises(UnsupportedModelError, match=r"quantization_config is not pack"):
        evaluate(checkpoint, WINDOWS)
