"""Train the demo model of rsq-stream from nothing.

Collects the ``.py`` files of one CPython standard library, holds out whole
modules, trains a byte-level BPE tokenizer and a small Llama on the rest, and
writes the checkpoint, the two text slices, their licence and a record of the
run to one folder::

    python benchmarks/train_demo_model.py --output demo --minutes 81

The learning rate follows the larger of the fractions of steps and of minutes
spent, so the schedule ends in full whichever limit comes first.
SIGTERM or Ctrl-C ends the training early and keeps the best weights so far;
``--start FOLDER`` goes on from the weights of an earlier run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import signal
import sysconfig
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM as Model

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")
SLICE_BYTES = 300_000
SEPARATOR = "\n\n"
WINDOW = 512
SEED = 20240311
# Batch counts windows, every: steps between evaluations, patience: evaluations.
LIMITS = {"minutes": 81.0, "steps": 20_000, "every": 500, "patience": 10}
LIMITS |= {"batch": 4, "rate": 4e-3, "warmup": 100, "threads": 2, "seed": SEED}
SOURCES = """# Sources of the demo data

The text slices are whole modules of the CPython {} standard library,
joined by blank lines; the licence is in `LICENSE-PSF.txt`. The model and its
tokenizer were trained on that library's source files, less the held-out
slice, by `benchmarks/train_demo_model.py`. The calibration slice is part of
the training text.
"""
NOTICE = """heldout.txt and calibration.txt are excerpts (whole modules, listed in
SOURCES.md) from the CPython {} standard library.\n
"""


def collect_modules(stdlib: Path) -> dict[str, str]:
    """Read the modules of a standard library: text by relative path, sorted.

    Tests, files generated at build time and the code-page tables under
    ``encodings`` are left out.
    """
    modules = {}
    for path in sorted(stdlib.rglob("*.py"), key=lambda p: p.as_posix()):
        parts = path.relative_to(stdlib).parts
        if any(p in SKIPPED_FOLDERS or p.startswith(SKIPPED_PREFIXES) for p in parts):
            continue
        text = path.read_text(encoding="utf-8")
        table = parts[0] == "encodings" and "decoding_table" in text
        if text.strip() and not table:
            modules["/".join(parts)] = text.strip("\n") + "\n"
    return modules


def choose_slice(modules: dict[str, str], purpose: str) -> list[str]:
    """Choose whole modules of varied kind by a seeded hash of their names.

    Parameters
    ----------
    modules : dict[str, str]
        Text by name.
    purpose : str
        Mixed into the hash, so that each slice has its own order.

    Returns
    -------
    list[str]
        Names in sorted order: at most two of one top-level package, each of
        2 kB to 45 kB, together at most ``SLICE_BYTES`` once joined.
    """
    salted = {f"{SEED}:{purpose}:{name}".encode(): name for name in modules}
    order = sorted(salted, key=lambda salt: hashlib.sha256(salt).digest())
    chosen, total = [], 0
    for name in map(salted.get, order):
        size = len(modules[name].encode()) + len(SEPARATOR)
        package = name.split("/")[0]
        crowded = [other.split("/")[0] for other in chosen].count(package) >= 2
        fits = 2_000 <= size <= 45_000 and total + size <= SLICE_BYTES
        if fits and not crowded:
            chosen.append(name)
            total += size
    return sorted(chosen)


def write(path: Path, value: str | dict) -> None:
    """Write text as it is, or a mapping as indented JSON."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def train_tokenizer(texts: list[str], folder: Path) -> hf.PreTrainedTokenizerBase:
    """Train the byte-level BPE, save it to ``folder`` and load it back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = {"vocab_size": 2048, "special_tokens": ["<s>", "</s>"]}
    options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**options))
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["clean_up_tokenization_spaces"] = False
    write(folder / "tokenizer_config.json", settings)
    return hf.AutoTokenizer.from_pretrained(folder)


def new_model(start: Path | None) -> Model:
    """Load the model at ``start`` in fp32, or build an untrained one."""
    if start:
        return Model.from_pretrained(start, dtype=torch.float32)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    tokens = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 1}
    rest = {"max_position_embeddings": WINDOW, "tie_word_embeddings": True}
    config = hf.LlamaConfig(**shape, **heads, **tokens, **rest, rms_norm_eps=1e-5)
    return Model(config).float()


def save_model(model: Model, folder: Path) -> None:
    """Save the weights rounded to bf16, replacing each file atomically."""
    scratch = folder.with_name(folder.name + ".part")
    copy.deepcopy(model).to(torch.bfloat16).eval().save_pretrained(scratch)
    for path in sorted(scratch.iterdir()):
        path.chmod(0o644)
        os.replace(path, folder / path.name)
    scratch.rmdir()


def windows_of(ids: Tensor) -> Tensor:
    """Cut ids into whole non-overlapping windows; the rest is dropped."""
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def mean_loss(model: Model, windows: Tensor) -> float:
    """Mean next-token loss, in nats, over windows of equal length."""
    total = 0.0
    for batch in windows.split(16):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        total += loss.item() * len(batch)
    return total / len(windows)


def make_optimizers(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the gains."""
    matrices = [p for n, p in model.named_parameters() if "layers" in n and p.dim() > 1]
    inner = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inner]
    scale = "match_rms_adamw"  # so that one rate does for both
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn=scale),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: Model, ids: Tensor, held_out: Tensor, args: Namespace) -> dict:
    """Train: a warm-up, a constant rate, 60 % of linear decay.

    Parameters
    ----------
    model : LlamaForCausalLM
        Trained in place; left with the best weights.
    ids : Tensor
        Training stream: modules, each after a bos token.
    held_out : Tensor
        Windows of the held-out slice.
    args : Namespace
        The command line; each new best goes to its ``output``.

    Returns
    -------
    dict
        Steps, speed and loss history.
    """
    optimizers = make_optimizers(model, args.rate)
    rng = torch.Generator().manual_seed(args.seed)
    best, best_state, misses = math.inf, copy.deepcopy(model.state_dict()), 0
    history, recent, step, ended = [], [], 0, "interrupted"
    start = time.monotonic()
    try:
        while True:
            seconds = time.monotonic() - start
            progress = min(1.0, max(step / args.steps, seconds / 60 / args.minutes))
            if step and (step % args.every == 0 or progress == 1.0):
                entry = {"step": step, "seconds": round(seconds)}
                entry["train_loss"] = round(sum(recent) / max(len(recent), 1), 4)
                entry["held_out_loss"] = round(mean_loss(model, held_out), 4)
                history.append(entry)
                print(json.dumps(entry), flush=True)
                recent, misses = [], misses + 1
                if entry["held_out_loss"] < best:
                    best, misses = entry["held_out_loss"], 0
                    best_state = copy.deepcopy(model.state_dict())
                    save_model(model, args.output / "model")
            if progress == 1.0 or misses >= args.patience:
                ended = "limit" if progress == 1.0 else "early stop"
                break
            rise, fall = (step + 1) / args.warmup, (1.0 - progress) / 0.6
            rate = args.rate * min(1.0, rise, fall)
            for group in (g for made in optimizers for g in made.param_groups):
                group["lr"] = rate
            starts = torch.randint(len(ids) - WINDOW, (args.batch, 1), generator=rng)
            batch = ids[starts + torch.arange(WINDOW)]
            batch[torch.rand(args.batch, generator=rng) < 0.5, 0] = 0
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for made in optimizers:
                made.step()
                made.zero_grad(set_to_none=True)
            recent.append(loss.item())
            step += 1
    except KeyboardInterrupt:
        print("interrupted: keeping the best weights so far", flush=True)
    seconds, tokens = time.monotonic() - start, step * args.batch * WINDOW
    model.load_state_dict(best_state)
    return {
        "ended_by": ended,
        "steps": step,
        "epochs": round(tokens / len(ids), 2),
        "hours": round(seconds / 3600, 3),
        "tokens_per_second": round(tokens / seconds),
        "history": history,
    }


def main() -> None:
    """Collect, train, measure and write everything."""
    parser = ArgumentParser(description="Train the rsq-stream demo model.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, default=sysconfig.get_path("stdlib"))
    parser.add_argument("--cpython", default=platform.python_version())
    parser.add_argument("--start", type=Path, help="model folder to go on from")
    for name, value in LIMITS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    out, folder = args.output, args.output / "model"
    folder.mkdir(parents=True, exist_ok=True)

    modules = collect_modules(args.stdlib)
    slices = {"heldout": choose_slice(modules, "held-out")}
    training = {k: v for k, v in modules.items() if k not in slices["heldout"]}
    slices["calibration"] = choose_slice(training, "calibration")
    texts = {k: SEPARATOR.join(modules[n] for n in v) for k, v in slices.items()}
    sources = SOURCES.format(args.cpython)
    for name, text in texts.items():
        write(out / f"{name}.txt", text)
        sources += f"\n## {name}.txt\n\n" + "".join(f"- `{n}`\n" for n in slices[name])
    write(out / "SOURCES.md", sources)
    licence = (args.stdlib / "LICENSE.txt").read_text(encoding="utf-8")
    write(out / "LICENSE-PSF.txt", NOTICE.format(args.cpython) + licence)
    tokenizer = train_tokenizer(list(training.values()), folder)
    stream = [i for t in training.values() for i in (0, *tokenizer.encode(t))]
    ids = torch.tensor(stream)
    held_out = windows_of(torch.tensor(tokenizer.encode(texts["heldout"])))
    model = new_model(args.start)
    record = {
        "cpython": args.cpython,
        "torch": torch.__version__,
        "settings": {name: getattr(args, name) for name in LIMITS},
        "train_modules": len(training),
        "train_bytes": sum(len(t.encode()) for t in training.values()),
        "train_tokens": len(ids),
        "slice_bytes": {k: len(v.encode()) for k, v in texts.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(record), flush=True)
    run = train(model, ids, held_out, args)
    losses = {"held_out_fp32": mean_loss(model, held_out)}
    save_model(model, folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses["held_out_bf16"] = mean_loss(model, held_out)
    sample = windows_of(ids)[:: len(ids) // held_out.numel()][: len(held_out)]
    losses["train_bf16"] = mean_loss(model, sample)
    prompt = torch.tensor([[0, *tokenizer.encode("import os\n\n\ndef")]])
    output = model.eval().generate(prompt, max_new_tokens=200, do_sample=False)
    lines = tokenizer.decode(output[0], skip_special_tokens=True).splitlines()
    record["loss"] = {name: round(loss, 5) for name, loss in losses.items()}
    record["perplexity"] = {k: round(math.exp(v), 4) for k, v in losses.items()}
    record["greedy_sample"] = lines[:10]
    write(out / "training.json", record | run)
    print(json.dumps(record["perplexity"]), flush=True)


if __name__ == "__main__":
    main()
