"""What gpt_classify.py promises, a fact a test. To be read after it.

    pytest                      everything, a few minutes on two cores
    pytest -k "future or row"   what the names say

Nothing here needs the network. What needs GPT-2's vocabulary or the SMS Spam Collection looks for
them in ../shared/data and skips where that is not; what compares with the `transformers` library,
draws with matplotlib, or searches with hypothesis skips where those are not installed.
"""

import argparse
import contextlib
import csv
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import gpt_classify as g

SCRIPT = Path(g.__file__).resolve()
SHARED = SCRIPT.parent.parent / "shared" / "data"
needs_sms = pytest.mark.skipif(
    not (SHARED / "SMSSpamCollection").exists(), reason="needs ../shared/data/SMSSpamCollection"
)
needs_gpt2_tokens = pytest.mark.skipif(
    not (SHARED / "tiktoken").exists(), reason="needs GPT-2's vocabulary in ../shared/data/tiktoken"
)
TINY = g.GPTConfig(block_size=64, vocab_size=257, n_layer=3, n_head=2, n_embd=128)
QUICK = "--tokenizer bytes --num_epochs 5 --learning_rate 1e-3 --device cpu"


# Help for the tests ------------------------------------------------------------------------------


def arrays(config=TINY, seed=0):
    """Random numbers under the names and in the shapes of a published GPT-2 file: (in, out)."""
    torch.manual_seed(seed)
    V, P, C = config.vocab_size, config.block_size, config.n_embd
    shapes = {"wte.weight": (V, C), "wpe.weight": (P, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.ln_{k}.{what}": (C,) for k in (1, 2) for what in ("weight", "bias")}
        for name, n_in, n_out in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, 4 * C),
            ("mlp.c_proj", 4 * C, C),
        ):
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
    norms = (".ln_1.weight", ".ln_2.weight", "ln_f.weight")  # around 1, so that GELU is bent
    return {
        name: torch.randn(shape) * 0.08 + name.endswith(norms) for name, shape in shapes.items()
    }


def write_checkpoint(path, tensors):
    """A safetensors file by its specification, with nothing of the tool's own code."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.bool: "BOOL", torch.float16: "F16"}[t.dtype]
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": place}
        data += raw
    head = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(head)) + head + data)
    return Path(path)


def reference_logits(w, ids, n_head, causal=True):
    """Language model logits (T, V) of one text, from raw arrays, in float64: GPT-2 by the book."""
    w = {name: t.double() for name, t in w.items()}
    T, C = len(ids), w["wte.weight"].shape[1]

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    for i in range(sum(name.endswith("c_attn.bias") for name in w)):
        h = f"h.{i}"
        qkv = norm(x, f"{h}.ln_1") @ w[f"{h}.attn.c_attn.weight"] + w[f"{h}.attn.c_attn.bias"]
        q, k, v = (part.reshape(T, n_head, -1).permute(1, 0, 2) for part in qkv.split(C, 1))
        scores = q @ k.transpose(1, 2) / math.sqrt(C // n_head)
        if causal:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).permute(1, 0, 2).reshape(T, C)
        x = x + y @ w[f"{h}.attn.c_proj.weight"] + w[f"{h}.attn.c_proj.bias"]
        u = norm(x, f"{h}.ln_2") @ w[f"{h}.mlp.c_fc.weight"] + w[f"{h}.mlp.c_fc.bias"]
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ w[f"{h}.mlp.c_proj.weight"] + w[f"{h}.mlp.c_proj.bias"]
    return norm(x, "ln_f") @ w["wte.weight"].T


def every_place(ids, causal=True):
    """A row of one text in which every token is read for itself."""
    everywhere = torch.arange(len(ids))
    row = g.Row.of([g.Example(torch.tensor(ids), range(len(ids)), causal=causal)])
    row.read = row.owner = everywhere
    row.labels = torch.arange(len(ids))
    return row


def tiny_model(tmp_path, config=TINY):
    path = write_checkpoint(tmp_path / "gpt2.safetensors", arrays(config))
    return g.build_gpt(*g.read_gpt2(path))


def settings(**changes):
    """The flags that the training functions look at."""
    defaults = {"batch_size": 4, "accumulation_steps": 1, "ignore_index": -100}
    defaults |= {"tokens_per_row": 64, "device": torch.device("cpu"), "no_feature_cache": False}
    return argparse.Namespace(**(defaults | changes))


class Silent:
    def add(self, n):
        pass


def learnt(name, t):
    """A parameter without the biases of the keys. These change no attention, since softmax does
    not care what is added to all scores; their gradient is zero but for rounding, of which AdamW,
    that divides a gradient by its size, makes steps as large as any."""
    C = t.shape[0] // 3
    return torch.cat([t[:C], t[2 * C :]]) if name.endswith("c_attn.bias") else t


def random_texts(n=20, seed=1, longest=30):
    """n examples of random length, read at the last token, with labels 0 and 1 in turn."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, longest) for _ in range(n)]
    ids = [torch.tensor([draw.randrange(256) for _ in range(size)]) for size in sizes]
    return [g.Example(t, range(len(t) - 1, len(t)), i % 2) for i, t in enumerate(ids)]


def write_texts(path, n=60, labels=("good", "poor"), header=("text", "label")):
    """A csv file of short texts whose label shows in a word."""
    rows = [(f"thing number {i} is {labels[i % len(labels)]}", i) for i in range(n)]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows((text, labels[i % len(labels)]) for text, i in rows)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Runs main() in this process: run("--train", ...) -> (status, output, errors)."""

    def run(*argv):
        capsys.readouterr()
        status = g.main([str(a) for a in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def trained(run, here):
    """A classifier trained on a few texts with a tiny checkpoint; its folder is the current one."""
    write_checkpoint("gpt2.safetensors", arrays())
    write_texts("texts.csv")
    train = ["--train", "--data", "texts.csv", "--weights", "gpt2.safetensors", *QUICK.split()]
    status, out, _ = run(*train)
    assert status == 0
    return argparse.Namespace(out=out, train=train)


def command(*argv, **options):
    """Runs the real command in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([sys.executable, SCRIPT, *map(str, argv)], check=False, **options)


# The transformer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_the_loaded_model_gives_the_logits_of_a_forward_pass_by_the_book(tmp_path, causal):
    path = write_checkpoint(tmp_path / "gpt2.safetensors", arrays())
    model = g.build_gpt(*g.read_gpt2(path))
    ids = torch.randint(0, 257, (40,)).tolist()
    with torch.no_grad():
        ours = model(every_place(ids, causal))
    torch.testing.assert_close(
        ours.double(), reference_logits(arrays(), ids, 2, causal), atol=1e-4, rtol=0
    )


def test_the_loaded_model_gives_the_logits_of_the_transformers_library(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the transformers library")
    w = arrays()
    sizes = {"n_positions": 64, "n_embd": 128, "n_layer": 3, "n_head": 2, "vocab_size": 257}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    left = theirs.transformer.load_state_dict(w, strict=False)
    assert not left.unexpected_keys
    model = tiny_model(tmp_path)
    ids = torch.randint(0, 257, (50,)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(model(every_place(ids)), expected, atol=1e-4, rtol=0)


def test_a_prefix_mask_buffers_and_a_tied_head_in_a_checkpoint_change_nothing(tmp_path):
    plain = arrays()
    odd = {f"transformer.{name}": t for name, t in plain.items()}
    for i in range(3):
        odd[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        odd[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    odd["lm_head.weight"] = plain["wte.weight"]
    config, weights = g.read_gpt2(write_checkpoint(tmp_path / "odd.safetensors", odd))
    expected_config, expected = g.read_gpt2(write_checkpoint(tmp_path / "plain.st", plain))
    assert config == expected_config == TINY
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_half_precision_checkpoints_are_read_as_float32(tmp_path):
    half = {name: t.half() for name, t in arrays().items()}
    _, weights = g.read_gpt2(write_checkpoint(tmp_path / "half.safetensors", half))
    assert all(t.dtype == torch.float32 for t in weights.values())
    assert torch.equal(weights["wte.weight"], half["wte.weight"].float())


@pytest.mark.parametrize(
    ("size", "blocks", "width", "heads", "parameters"),
    [
        ("gpt2-small", 12, 768, 12, 124_439_808),
        ("gpt2-medium", 24, 1024, 16, 354_823_168),
        ("gpt2-large", 36, 1280, 20, 774_030_080),
        ("gpt2-xl", 48, 1600, 25, 1_557_611_200),
    ],
)
def test_every_published_size_has_the_published_shape(size, blocks, width, heads, parameters):
    with torch.device("meta"):
        model = g.GPT(g.SIZES[size])
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (
        blocks,
        width,
        heads,
    )
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.h[0].attn.c_attn.weight.shape == (3 * width, width)
    assert g.config_of(model.state_dict()) == g.SIZES[size]


def test_a_causal_model_cannot_see_the_future_and_without_the_mask_it_can(tmp_path):
    ids = torch.randint(0, 257, (20,)).tolist()
    changed = [*ids[:-1], (ids[-1] + 1) % 257]
    model = tiny_model(tmp_path)
    for causal in (True, False):
        with torch.no_grad():
            before, after = (model(every_place(text, causal)) for text in (ids, changed))
        same = torch.allclose(before[:-1], after[:-1], atol=1e-6)
        assert same == causal
        assert not torch.allclose(before[-1], after[-1], atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_texts_in_one_row_do_not_see_each_other(tmp_path, causal):
    model = tiny_model(tmp_path)
    texts = [g.dataclasses.replace(text, causal=causal) for text in random_texts(12)]
    with torch.no_grad():
        alone = torch.cat([model(g.Row.of([text])) for text in texts])
        together = model(g.Row.of(texts))
        backwards = model(g.Row.of(texts[::-1])).flip(0)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(backwards, alone, atol=2e-5, rtol=0)


def test_predictions_do_not_depend_on_the_budget_of_a_row(tmp_path):
    model = g.make_classifier(tiny_model(tmp_path), 2, "last_layer")
    texts = random_texts(30)
    expected = g.probabilities(model, texts, settings(tokens_per_row=1))
    for budget in (40, 100, 10_000):
        found = g.probabilities(model, texts, settings(tokens_per_row=budget))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_rows_keep_to_their_budget_and_lose_no_text():
    texts = random_texts(50)
    rows = list(g.pack(texts, 64))
    assert [id(e) for row in rows for e in row] == [id(e) for e in texts]
    assert max(sum(len(e.ids) for e in row) for row in rows) <= 64
    assert len(list(g.pack(texts, 5))) >= sum(len(e.ids) > 5 for e in texts)


@pytest.mark.parametrize("read", ["first", "last", "flexible", "mean"])
def test_one_query_per_text_in_the_last_block_changes_no_logit_and_no_gradient(tmp_path, read):
    torch.manual_seed(0)
    model = g.make_classifier(tiny_model(tmp_path), 2, "last_block")
    places = {"first": lambda n: range(1), "last": lambda n: range(n - 1, n)}
    places |= {"flexible": lambda n: range(n // 2, n // 2 + 1), "mean": lambda n: range(n)}
    texts = [g.Example(e.ids, places[read](len(e.ids)), e.label) for e in random_texts(6)]
    row = g.Row.of(texts)
    F.cross_entropy(model(row), row.labels).backward()
    logits, grads = model(row), [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    # The plain way: all queries in all blocks, and only then what is read.
    x, mask = model.wte(row.ids) + model.wpe(row.pos), model.mask(row)
    for block in model.h:
        x = block(x, mask)
    x = model.ln_f(x)
    starts = torch.tensor([len(e.ids) for e in texts]).cumsum(0) - len(texts[0].ids)
    starts = [0, *torch.tensor([len(e.ids) for e in texts]).cumsum(0)[:-1].tolist()]
    picked = [x[s + e.read.start : s + e.read.stop].mean(0) for s, e in zip(starts, texts)]
    plain = model.head(torch.stack(picked))
    F.cross_entropy(plain, row.labels).backward()
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=0)
    for grad, p in zip(grads, (p for p in model.parameters() if p.requires_grad)):
        torch.testing.assert_close(grad, p.grad, atol=1e-5, rtol=1e-4)


def test_generation_is_greedy(tmp_path):
    model, ids = tiny_model(tmp_path), [3, 1, 4, 1, 5]
    expected = list(ids)
    for _ in range(6):
        expected.append(int(reference_logits(arrays(), expected, 2)[-1].argmax()))
    assert list(g.generate(model, ids, 6)) == expected[5:]


def test_generation_goes_on_past_what_the_model_can_see(tmp_path):
    assert len(list(g.generate(tiny_model(tmp_path), [1] * 60, 10))) == 10


def test_random_weights_are_drawn_as_gpt2s_were():
    torch.manual_seed(0)
    w = g.random_weights(g.SIZES["gpt2-nano"])
    assert w["wte.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert w["h.1.attn.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert w["h.1.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert w["h.1.mlp.c_fc.bias"].abs().max() == 0
    assert w["ln_f.weight"].min() == w["h.3.ln_2.weight"].min() == 1


# From language model to classifier ----------------------------------------------------------------


def encoder(**changes):
    fields = {"tokenizer": g.get_tokenizer("bytes", ""), "max_length": 10, "pad_to": 0}
    fields |= {"position": "last", "average": False, "causal": True}
    return g.TextEncoder(**(fields | changes))


@pytest.mark.parametrize(
    ("how", "ids", "read"),
    [
        ({}, "abc", range(2, 3)),
        ({"position": "first"}, "a", range(1)),  # what cannot be seen from there is left out
        ({"position": "first", "causal": False}, "abc", range(1)),
        ({"position": "flexible"}, "abc", range(2, 3)),
        ({"average": True}, "abc", range(3)),
        ({"pad_to": 5}, "abc..", range(4, 5)),
        ({"pad_to": 5, "position": "flexible"}, "abc", range(2, 3)),
        ({"pad_to": 5, "position": "flexible", "causal": False}, "abc..", range(2, 3)),
        ({"pad_to": 5, "average": True}, "abc..", range(5)),
        ({"pad_to": 5, "average": True, "position": "flexible"}, "abc", range(3)),
        ({"max_length": 2}, "ab", range(1, 2)),
    ],
)
def test_what_is_seen_and_read_of_a_text(how, ids, read):
    example = encoder(**how).example([97, 98, 99])
    assert example.ids.tolist() == [256 if c == "." else ord(c) for c in ids]
    assert example.read == read


def test_leaving_out_what_cannot_be_seen_changes_nothing(tmp_path):
    model = tiny_model(tmp_path)
    for how in ({"position": "first"}, {"pad_to": 20, "position": "flexible"}):
        short, (tokens,) = encoder(**how), encoder().tokens(["some text"])
        whole = g.dataclasses.replace(short, causal=False).example(tokens)
        full, cut = g.dataclasses.replace(whole, causal=True), short.example(tokens)
        assert len(cut.ids) < len(full.ids)
        with torch.no_grad():
            a, b = model(g.Row.of([cut])), model(g.Row.of([full]))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_filler_in_a_users_text_is_ordinary_text():
    (tokens,) = encoder(max_length=99).tokens(["<|endoftext|>"])
    assert tokens == list(b"<|endoftext|>")


@needs_gpt2_tokens
def test_very_long_texts_are_cut_before_they_are_split_into_tokens():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    e = encoder(tokenizer=g.get_tokenizer("gpt2", ""), max_length=1024)
    for text in ("word " * 2_000_000, " " * 2_000_000, "€" * 2_000_000):
        (tokens,) = e.tokens([text])
        assert len(tokens) > 1024
        assert tokens[:1024] == e.tokenizer.encode_ordinary(text[:200_000])[:1024]


MOVED = {
    "last_layer": ["head."],
    "last_block": ["head.", "ln_f.", "h.2."],
    "last_two_blocks": ["head.", "ln_f.", "h.1.", "h.2."],
    "all": [""],
    "lora": ["head.", "lora_"],
}


@pytest.mark.parametrize("trainable", MOVED)
def test_each_choice_of_trainable_layers_moves_exactly_what_it_names(tmp_path, trainable):
    torch.manual_seed(0)
    model = g.make_classifier(tiny_model(tmp_path), 2, trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=True)
    texts = random_texts(16)
    for _ in range(2):  # LoRA's A moves from the second step on, once B is no longer zero
        g.train_epoch(model, optimizer, texts, torch.arange(16), settings(), Silent())
    for name, p in model.named_parameters():
        named = any(
            part in name if part == "lora_" else name.startswith(part) for part in MOVED[trainable]
        )
        assert torch.equal(p, before[name]) != named, name


def test_training_leaves_the_checkpoint_file_alone(tmp_path):
    path = write_checkpoint(tmp_path / "gpt2.safetensors", arrays())
    before = path.read_bytes()
    _, weights = g.read_gpt2(path)
    model = g.make_classifier(g.build_gpt(TINY, weights), 2, "all")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    g.train_epoch(model, optimizer, random_texts(8), torch.arange(8), settings(), Silent())
    assert path.read_bytes() == before
    assert torch.equal(weights["wte.weight"], arrays()["wte.weight"])


def test_lora_begins_as_the_model_itself_and_can_be_merged_into_it(tmp_path):
    texts = random_texts(6)
    torch.manual_seed(0)
    plain = g.make_classifier(tiny_model(tmp_path), 2, "last_layer")
    torch.manual_seed(0)
    lora = g.make_classifier(tiny_model(tmp_path), 2, "lora", rank=4, alpha=12)
    with torch.no_grad():
        lora.head.load_state_dict(plain.head.state_dict())
        torch.testing.assert_close(lora(g.Row.of(texts)), plain(g.Row.of(texts)))
        layers = [(n, m) for n, m in lora.named_modules() if isinstance(m, g.LoRALinear)]
        assert len(layers) == 4 * TINY.n_layer
        for name, layer in layers:
            layer.lora_B.normal_()
            merged = layer.weight + 12 / 4 * layer.lora_B @ layer.lora_A  # alpha / rank
            plain.get_submodule(name).weight.copy_(merged)
        changed = lora(g.Row.of(texts))
        torch.testing.assert_close(changed, plain(g.Row.of(texts)), atol=1e-3, rtol=1e-3)


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["last_layer", "last_block", "last_two_blocks"])
@pytest.mark.parametrize("read", ["last", "mean"])
def test_frozen_blocks_once_or_in_every_epoch_give_the_same_losses_and_weights(
    tmp_path, trainable, read
):
    outcomes = []
    for cache in (True, False):
        torch.manual_seed(0)
        model = g.make_classifier(tiny_model(tmp_path), 2, trainable)
        texts = random_texts(20)
        if read == "mean":
            texts = [g.Example(e.ids, range(len(e.ids)), e.label) for e in texts]
        g.run_frozen(model, texts, settings(no_feature_cache=not cache))
        assert all((e.x is not None) == cache for e in texts)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
        order = torch.arange(20)
        losses = [
            g.train_epoch(model, optimizer, texts, order, settings(), Silent())[0] for _ in range(3)
        ]
        outcomes.append((losses, [learnt(n, p.detach()) for n, p in model.named_parameters()]))
    (losses, weights), (plain_losses, plain_weights) = outcomes
    assert losses == pytest.approx(plain_losses, abs=1e-4)
    for a, b in zip(weights, plain_weights):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_last_layer_keeps_one_vector_per_text(tmp_path):
    model, texts = g.make_classifier(tiny_model(tmp_path), 2, "last_layer"), random_texts(5)
    g.run_frozen(model, texts, settings())
    assert [e.x.shape for e in texts] == [(1, 128)] * 5


def test_features_that_do_not_fit_are_not_kept_and_it_is_said(tmp_path, monkeypatch, capsys):
    model, texts = g.make_classifier(tiny_model(tmp_path), 2, "last_block"), random_texts(5)
    monkeypatch.setattr(g, "free_memory", lambda device: 1000)
    g.run_frozen(model, texts, settings())
    assert all(e.x is None for e in texts)
    assert "2 of 3 blocks, in every epoch" in capsys.readouterr().out


def gradients(model, texts, **changes):
    """The gradients of one step over all texts."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0)
    g.train_epoch(model, optimizer, texts, torch.arange(len(texts)), settings(**changes), Silent())
    return [p.grad.clone() for p in trained]


def test_a_batch_in_many_rows_has_the_gradient_of_the_batch_in_one(tmp_path):
    torch.manual_seed(0)
    model = g.make_classifier(tiny_model(tmp_path), 2, "all")
    texts = random_texts(13)
    one = gradients(model, texts, batch_size=13, tokens_per_row=10_000)
    row = g.Row.of(texts)
    model.zero_grad()
    F.cross_entropy(model(row), row.labels).backward()
    for a, p in zip(one, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
    for a, b in zip(one, gradients(model, texts, batch_size=13, tokens_per_row=8)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_accumulated_batches_have_the_gradient_of_the_large_one_also_if_the_last_is_short(tmp_path):
    torch.manual_seed(0)
    model = g.make_classifier(tiny_model(tmp_path), 2, "last_block")
    texts = random_texts(7)  # three batches, of 3, 3 and 1
    large = gradients(model, texts, batch_size=7)
    for a, b in zip(large, gradients(model, texts, batch_size=3, accumulation_steps=3)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_no_row_in_training_is_longer_than_the_budget_whatever_the_batch(tmp_path, monkeypatch):
    sizes, of = [], g.Row.of
    monkeypatch.setattr(g.Row, "of", lambda *a: sizes.append(of(*a)) or sizes[-1])
    model = g.make_classifier(tiny_model(tmp_path), 2, "all")
    gradients(model, random_texts(40), batch_size=40, tokens_per_row=60)
    assert len(sizes) > 5
    assert max(len(row.ids) for row in sizes) <= 60


def test_texts_with_the_ignored_label_teach_nothing(tmp_path):
    torch.manual_seed(0)
    model = g.make_classifier(tiny_model(tmp_path), 2, "last_block")
    texts = random_texts(8)
    ignoring = gradients(model, texts, batch_size=8, ignore_index=1)
    without = gradients(model, [e for e in texts if e.label == 0], batch_size=8)
    for a, b in zip(ignoring, without):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_bfloat16_and_compile_do_what_float32_does(tmp_path):
    torch.manual_seed(0)
    model = g.make_classifier(tiny_model(tmp_path), 2, "last_block")
    texts = random_texts(6)
    exact = g.probabilities(model, texts, settings())
    g.to_device(model, argparse.Namespace(dtype="bfloat16", compile=False, device="cpu"))
    rough = g.probabilities(model, texts, settings())
    assert 0 < (rough - exact).abs().max() < 0.05


def test_metrics_are_those_of_the_textbook():
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    m = g.Metrics(probs, [0, 0, 1, 1])
    assert m.accuracy == 0.75
    assert m.confusion.tolist() == [[2, 0], [1, 1]]
    assert m.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert m.loss == pytest.approx(-sum(map(math.log, (0.9, 0.8, 0.7, 0.4))) / 4)


def test_the_report_shows_precision_recall_f1_and_what_was_confused(capsys):
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    g.Metrics(probs, [0, 0, 1, 1]).report("test", ["ham", "spam"])
    out = capsys.readouterr().out.split("\n")
    assert out[0].startswith("test      accuracy 75.00% (standard error 21.65% on 4 texts)")
    assert out[2].split() == ["ham", "66.7%", "100.0%", "80.0%", "2"]
    assert out[3].split() == ["spam", "100.0%", "50.0%", "66.7%", "2"]
    assert out[5].split() == ["ham", "2", "0"]
    assert out[6].split() == ["spam", "1", "1"]


def test_the_baselines_are_the_commonest_label_and_a_bag_of_words():
    train = [[1, 2], [1, 3], [4, 2], [4, 3]] * 5
    numbers = {"train": [0, 0, 1, 1] * 5, "test": [1, 0, 0, 0]}
    commonest, bag = g.baselines(
        {"train": train, "test": [[4], [1, 5], [2, 1], [9, 1, 1]]}, numbers, 2, 10
    )
    assert (commonest, bag) == (0.75, 1.0)


# Data ---------------------------------------------------------------------------------------------


def data_flags(data, **changes):
    defaults = {"data": str(data), "cache_dir": "", "text_column": "text", "label_column": "label"}
    return argparse.Namespace(
        **(defaults | {"balance": g.is_sms(str(data)), "dedupe": False} | changes)
    )


@needs_sms
def test_the_messages_are_read_as_the_data_set_defines_them():
    frame = g.read_data(data_flags(SHARED / "SMSSpamCollection"))
    assert len(frame) == 5574
    assert frame["label"].value_counts().to_dict() == {"ham": 4827, "spam": 747}
    assert frame["text"].str.startswith('"').any()  # a quotation mark is just a character


@needs_sms
def test_the_messages_are_balanced_and_split_as_in_the_article(capsys):
    args = data_flags(SHARED / "SMSSpamCollection")
    parts, labels = g.split_data(g.read_data(args), args)
    assert labels == ["ham", "spam"]
    assert [len(t) for t in parts.values()] == [1045, 149, 300]
    # The article's own lines of pandas:
    frame = g.read_data(args)
    spam = frame[frame["label"] == "spam"]
    ham = frame[frame["label"] == "ham"].sample(len(spam), random_state=123)
    expected = pd.concat([ham, spam]).sample(frac=1, random_state=123)
    assert pd.concat(parts.values())["text"].tolist() == expected["text"].tolist()
    assert "of the 300 test texts also occur in training" in capsys.readouterr().out


@needs_sms
@needs_gpt2_tokens
def test_a_bag_of_words_is_a_hard_baseline_on_the_messages(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    args = data_flags(SHARED / "SMSSpamCollection")
    parts, labels = g.split_data(g.read_data(args), args)
    e = encoder(tokenizer=g.get_tokenizer("gpt2", ""), max_length=1024)
    tokens = {part: e.tokens(t["text"].tolist()) for part, t in parts.items()}
    numbers = {part: [labels.index(label) for label in t["label"]] for part, t in parts.items()}
    _, bag = g.baselines(tokens, numbers, 2, 50257)
    assert 0.94 < bag < 0.98


def test_the_zip_of_the_messages_is_read_without_unpacking_it(here):
    with zipfile.ZipFile("sms.zip", "w") as archive:
        archive.writestr("../../outside", "harm")
        archive.writestr("/absolute", "harm")
        archive.writestr("SMSSpamCollection", 'ham\tsay "hi\nspam\twin "now\n')
    frame = g.read_data(data_flags("sms.zip"))
    assert frame.values.tolist() == [['say "hi', "ham"], ['win "now', "spam"]]
    assert os.listdir() == ["sms.zip"]


def test_a_zip_that_unpacks_to_more_than_it_should_is_refused(here, monkeypatch):
    monkeypatch.setattr(g, "MAX_UNPACKED", 1 << 20)
    with zipfile.ZipFile("sms.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("SMSSpamCollection", b"\0" * (1 << 24))
    with pytest.raises(g.Fault, match="too large"):
        g.read_data(data_flags("sms.zip"))


def imdb(path, extra=()):
    """An archive like that of the IMDb reviews, with more members in it that nobody wants."""
    with tarfile.open(path, "w:gz") as archive:
        for part, label, n in itertools.product(("train", "test"), ("pos", "neg"), range(20)):
            raw = f"a {label} film, number {n} of {part}".encode()
            info = tarfile.TarInfo(f"aclImdb/{part}/{label}/{n}_7.txt")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
        for info in extra:
            archive.addfile(info, io.BytesIO(b"x" * info.size))


def test_the_reviews_keep_their_own_test_half(here, capsys):
    link = tarfile.TarInfo("aclImdb/train/pos/99_9.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    unwanted = [link]
    for name in ("/etc/harm", "../harm", "aclImdb/train/unsup/0_0.txt", "aclImdb/README"):
        info = tarfile.TarInfo(name)
        info.size = 3
        unwanted.append(info)
    imdb("aclImdb_v1.tar.gz", unwanted)
    args = data_flags("imdb", cache_dir=here)
    parts, labels = g.split_data(g.read_data(args), args)
    assert labels == ["neg", "pos"]
    assert [len(t) for t in parts.values()] == [36, 4, 40]
    assert all("of test" in text for text in parts["test"]["text"])
    assert not any("of test" in text for text in parts["train"]["text"])
    assert os.listdir() == ["aclImdb_v1.tar.gz"]


def test_an_archive_cut_short_is_an_error(here):
    imdb("aclImdb_v1.tar.gz")
    raw = Path("aclImdb_v1.tar.gz").read_bytes()
    Path("aclImdb_v1.tar.gz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(g.Fault, match="no sound archive"):
        g.read_data(data_flags("imdb", cache_dir=here))


def test_an_archive_that_unpacks_to_more_than_it_should_is_refused(here, monkeypatch):
    monkeypatch.setattr(g, "MAX_UNPACKED", 1 << 20)
    large = tarfile.TarInfo("aclImdb/train/pos/1_9.txt")
    large.size = 1 << 20
    imdb("aclImdb_v1.tar.gz", [large])
    with pytest.raises(g.Fault, match="too large"):
        g.read_data(data_flags("imdb", cache_dir=here))


def test_the_standard_library_gives_two_kinds_of_text_and_always_the_same():
    frame, again = g.read_stdlib(), g.read_stdlib()
    assert frame.equals(again)
    assert frame["label"].value_counts().to_dict() == {"code": 1200, "prose": 1200}
    assert not frame["text"].duplicated().any()
    assert frame["text"].str.len().between(15, 200).all()


TABLES = {
    "plain.csv": b"text,label\nhello,a\n",
    "case.csv": b"ID,Label,TEXT\n1,a,hello\n",
    "mark.csv": b"\xef\xbb\xbftext,label\nhello,a\n",
    "windows.csv": b"text,label\r\nhello,a\r\n",
    "blank.csv": b"text,label\n\nhello,a\n\n",
    "tabs.tsv": b"label\ttext\na\thello\n",
    "json.jsonl": b'{"text": "hello", "label": "a"}\n\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind_are_read(here, name):
    Path(name).write_bytes(TABLES[name])
    assert g.read_data(data_flags(name)).values.tolist() == [["hello", "a"]]


def test_cells_are_never_taken_for_numbers_or_for_missing(here):
    Path("t.csv").write_text('text,label\nNA,007\nnull,1\n"two\nlines, ""quoted""",1\n')
    rows = g.read_data(data_flags("t.csv")).values.tolist()
    assert rows == [["NA", "007"], ["null", "1"], ['two\nlines, "quoted"', "1"]]


def test_a_file_without_a_header_is_read_by_positions(here):
    Path("t.csv").write_text("x,hello,a\ny,bye,b\n")
    args = data_flags("t.csv", text_column="1", label_column="2")
    assert g.read_data(args).values.tolist() == [["hello", "a"], ["bye", "b"]]


def test_a_folder_keeps_its_own_split(here, capsys):
    for name, n in (("train.csv", 20), ("val.csv", 4), ("test.csv", 6)):
        write_texts(name, n)
    args = data_flags(here)
    parts, _ = g.split_data(g.read_data(args), args)
    assert {part: len(t) for part, t in parts.items()} == {"train": 20, "validation": 4, "test": 6}


def test_labels_that_differ_in_case_alone_are_told(here, capsys):
    Path("t.csv").write_text("text,label\n" + "x,good\ny,Good\nz,bad\n" * 20)
    g.split_data(g.read_data(data_flags("t.csv")), data_flags("t.csv"))
    assert "differ in nothing but upper and lower case" in capsys.readouterr().out


def test_integer_labels_are_numbers_in_order(here, capsys):
    rows = [json.dumps({"text": f"text {i}", "label": i % 12}) for i in range(60)]
    Path("t.jsonl").write_text("\n".join(rows))
    args = data_flags("t.jsonl")
    _, labels = g.split_data(g.read_data(args), args)
    assert labels == [str(i) for i in range(12)]
    assert "has the label" in capsys.readouterr().out  # some label is missing from a small part


def test_repeats_are_told_and_dropped_on_request(here, capsys):
    Path("t.csv").write_text("text,label\n" + "same,a\nother,b\n" * 20 + "third,a\nfourth,b\n" * 20)
    args = data_flags("t.csv")
    g.split_data(g.read_data(args), args)
    assert "16 of the 16 test texts also occur in training" in capsys.readouterr().out
    args.dedupe = True
    with pytest.raises(g.Fault, match="too few"):
        g.split_data(g.read_data(args), args)


def test_rows_without_a_text_are_left_out_and_counted(here, capsys):
    write_texts("t.csv", 30)
    with open("t.csv", "a") as file:
        file.write(",good\n   ,bad\nlabelless,\nshort\n")
    args = data_flags("t.csv", balance=True)
    parts, _ = g.split_data(g.read_data(args), args)
    assert sum(map(len, parts.values())) == 30
    assert "4 rows without text or label are left out" in capsys.readouterr().out


# Downloads ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(answer):
    """An HTTP server on 127.0.0.1; answer(handler) writes what it likes. Yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def serving(body, announced=None, status=200):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(announced or len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.fixture
def tiny_hub(here, monkeypatch):
    """Makes a hub of a body: gpt2-small is TINY there, and HF_ENDPOINT leads to it."""
    monkeypatch.setitem(g.SIZES, "gpt2-small", TINY)
    body = write_checkpoint("served", arrays()).read_bytes()
    monkeypatch.setattr(g, "GPT2_SHA256", hashlib.sha256(body).hexdigest())
    os.remove("served")
    return body


def test_published_weights_are_downloaded_checked_mapped_and_kept(here, monkeypatch, tiny_hub):
    paths = []
    with server(lambda h: (paths.append(h.path), serving(tiny_hub)(h))) as address:
        monkeypatch.setenv("HF_ENDPOINT", address + "/")
        config, weights = g.published_gpt2("gpt2-small", here / "cache")
        g.published_gpt2("gpt2-small", here / "cache")
    assert paths == ["/openai-community/gpt2/resolve/main/model.safetensors"]  # once
    assert os.listdir("cache") == ["gpt2-small.safetensors"]
    with torch.no_grad():
        logits = g.build_gpt(config, weights)(every_place([1, 2, 3]))
    expected = reference_logits(arrays(), [1, 2, 3], 2)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("harm", ["cut", "corrupt", "absent", "refused", "cut in the structure"])
def test_a_download_that_fails_says_where_and_leaves_nothing(here, monkeypatch, tiny_hub, harm):
    body, half = tiny_hub, tiny_hub[: len(tiny_hub) // 2]
    answers = {
        "cut": serving(half, announced=len(body)),
        "corrupt": serving(body[:-1] + bytes([body[-1] ^ 1])),
        "absent": serving(b"no", status=404),
        "refused": serving(b""),
        "cut in the structure": serving(half),
    }
    if harm == "cut in the structure":
        monkeypatch.setattr(g, "GPT2_SHA256", None)
    with server(answers[harm]) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        if harm != "refused":
            with pytest.raises(g.Fault, match="could not download http.*by hand.*--offline"):
                g.published_gpt2("gpt2-small", here / "cache")
    if harm == "refused":
        with pytest.raises(g.Fault, match="could not download"):
            g.published_gpt2("gpt2-small", here / "cache")
    assert os.listdir("cache") == []


def test_a_server_that_hangs_is_given_up(here, monkeypatch, tiny_hub):
    monkeypatch.setattr(g, "TIMEOUT", 0.5)

    def hang(handler):
        serving(tiny_hub[:1000], announced=len(tiny_hub))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(tiny_hub)))
        handler.end_headers()
        handler.wfile.write(tiny_hub[:1000])
        handler.wfile.flush()
        time.sleep(5)

    with server(hang) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        start = time.monotonic()
        with pytest.raises(g.Fault, match="timed out"):
            g.published_gpt2("gpt2-small", here / "cache")
        assert time.monotonic() - start < 4
    assert socket.getdefaulttimeout() is None
    assert os.listdir("cache") == []


def test_two_processes_that_download_the_same_file_do_not_disturb_each_other(here):
    body = os.urandom(3_000_000)

    def slowly(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for i in range(0, len(body), 300_000):
            handler.wfile.write(body[i : i + 300_000])
            time.sleep(0.05)

    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpt_classify as g; "
    code += f"g.download(sys.argv[1], 'file', {hashlib.sha256(body).hexdigest()!r})"
    with server(slowly) as address:
        both = [subprocess.Popen([sys.executable, "-c", code, address]) for _ in range(2)]
        assert [process.wait(60) for process in both] == [0, 0]
    assert Path("file").read_bytes() == body
    assert os.listdir() == ["file"]


@needs_gpt2_tokens
def test_the_vocabulary_is_downloaded_to_where_tiktoken_looks(here, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    files = {path.name: path.read_bytes() for path in (SHARED / "tiktoken").iterdir()}
    places = {hashlib.sha1(url.encode()).hexdigest(): url for url in g.VOCABULARY}
    assert places.keys() == files.keys()
    fetched = []

    def download(url, target, sha256):
        assert hashlib.sha256(files[target.name]).hexdigest() == sha256
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files[target.name])
        fetched.append(url)

    monkeypatch.setattr(g, "download", download)
    assert g.get_tokenizer("gpt2", "cache").encode_ordinary("Hello world") == [15496, 995]
    assert sorted(fetched) == sorted(g.VOCABULARY)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")  # get_tokenizer has set it


# The command --------------------------------------------------------------------------------------


def test_training_reports_and_saves(trained):
    lines = trained.out.split("\n")
    assert (
        lines[0]
        == "data      texts.csv: 60 texts (30 good, 30 poor): 42 train, 6 validation, 12 test"
    )
    assert lines[1].startswith("baseline  always the commonest label 58.3%; bag of bytes 100.0%")
    assert "GPT-2, gpt2.safetensors, 0.6M parameters; training last_block: 0.20M" in trained.out
    assert "frozen    2 of 3 blocks, once for all 60 texts" in trained.out
    assert "epoch 5/5 loss" in trained.out
    assert "saved     classifier.safetensors" in trained.out
    assert sorted(os.listdir()) == ["classifier.safetensors", "gpt2.safetensors", "texts.csv"]


def test_the_baseline_sees_no_more_of_a_text_than_the_model(trained, run):
    out = run(*trained.train, "--max_length", 4)[1]  # all texts begin alike
    assert "cut to 4 tokens: 60 texts" in out
    assert "bag of bytes 100.0%" not in out
    assert "not clearly above the baselines" in out


def test_the_same_flags_give_the_same_file_and_another_seed_another(trained, run):
    before = Path("classifier.safetensors").read_bytes()
    run(*trained.train)
    assert Path("classifier.safetensors").read_bytes() == before
    run(*trained.train, "--seed", 7)
    assert Path("classifier.safetensors").read_bytes() != before


def test_several_seeds_share_the_features_and_save_the_first(trained, run):
    before = g.read_safetensors("classifier.safetensors")[0]
    status, out, _ = run(*trained.train, "--seeds", 3)
    assert status == 0
    assert out.count("frozen ") == 1
    assert [f"seed {n}" in out for n in (123, 124, 125, 126)] == [True, True, True, False]
    assert "over 3 seeds; the test set's standard error" in out
    after = g.read_safetensors("classifier.safetensors")[0]
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_seed_among_seeds_is_the_seed_alone(trained, run):
    _, series, _ = run(*trained.train, "--seeds", 2)
    _, alone, _ = run(*trained.train, "--seed", 124)
    losses = [line.split()[3] for line in (series + alone).split("\n") if line.startswith("epoch")]
    assert losses[5:10] == losses[10:15] != losses[0:5]


@pytest.mark.parametrize(
    "flags",
    ["", "--trainable_layers all", "--trainable_layers lora --lora_rank 4", "--pad_to longest",
     "--disable_causal_mask --average_embeddings", "--weights random --model_size gpt2-nano"],
)  # fmt: skip
def test_a_saved_classifier_predicts_as_it_did_before_saving(trained, run, monkeypatch, flags):
    seen, probabilities = {}, g.probabilities

    def spy(model, examples, args, progress=None):
        seen["probs"] = probabilities(model, examples, args, progress)
        return seen["probs"]

    monkeypatch.setattr(g, "probabilities", spy)
    assert run(*trained.train, *flags.split())[0] == 0
    before = seen["probs"]  # of the test texts, the last thing that training looks at
    assert run("--evaluate", "--data", "texts.csv", "--device", "cpu")[0] == 0
    torch.testing.assert_close(seen["probs"], before, atol=1e-5, rtol=0)


def test_only_what_differs_from_the_published_weights_is_saved(run, monkeypatch, tiny_hub, here):
    bytes_only = encoder().tokenizer
    monkeypatch.setattr(g, "get_tokenizer", lambda name, cache_dir: bytes_only)
    write_texts("texts.csv")
    with server(serving(tiny_hub)) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        train = ["--train", "--data", "texts.csv", "--cache_dir", "cache", "--num_epochs", 1]
        assert run(*train)[0] == 0
    tensors, _ = g.read_safetensors("classifier.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"head", "ln_f", "h"}
    assert all(name.startswith("h.2.") for name in tensors if name.startswith("h."))
    status, out, _ = run("--predict", "a good thing", "--cache_dir", "cache")
    assert (status, out.split("\t")[2]) == (0, "a good thing\n")


def test_prediction_prints_label_probability_and_text(trained, run):
    texts = ["thing number 77 is good", "thing number 88 is poor", " "]
    status, out, _ = run("--predict", *texts)
    rows = [line.split("\t") for line in out.rstrip("\n").split("\n")]
    assert status == 0
    assert [row[0] for row in rows] == ["good", "poor", ""]
    assert all(0.5 <= float(row[1]) <= 1 for row in rows[:2])
    assert [row[2] for row in rows] == texts


@pytest.mark.parametrize("argv", [["--predict", "-"], ["--predict"]])
def test_lines_of_standard_input_are_predicted_as_they_come(trained, argv):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for text in (b"this is a good thing\n", b"\xff not utf-8\r\n", b"\n", b"the last, bad"):
        process.stdin.write(text)
        if text.endswith(b"\n"):
            process.stdin.flush()
            answer = process.stdout.readline()  # before the next text is there
            assert answer.count(b"\t") == 2
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.endswith(b"the last, bad\n")) == (0, True)


def test_a_predicted_file_has_all_rows_and_columns_in_order(trained, run):
    rows = [
        [f"{i}", f"thing {i} is {'good' if i % 3 else 'poor'}", 'x, "y"\nz' if i % 2 else "a\rb"]
        for i in range(2500)
    ]
    rows[7][1] = ""
    with open("in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "TEXT", "note"], *rows])
    assert run("--predict_file", "in.csv", "--output", "out.csv")[0] == 0
    with open("out.csv", newline="") as file:
        found = list(csv.reader(file))
    assert found[0] == ["id", "TEXT", "note", "label", "probability"]
    assert [row[:3] for row in found[1:]] == rows
    assert found[8][3:] == ["", ""]
    assert {row[3] for row in found[1:]} == {"good", "poor", ""}


@pytest.mark.parametrize(
    ("name", "content", "header"),
    [
        ("in.txt", "a good one\n\na bad one\n", "text,label,probability"),
        ("in.tsv", "text\tlabel\na\tb\nc\td\ne\tf\n", "text,label,predicted_label,probability"),
        ("in.jsonl", '{"text": "a", "n": 1.5}\n' * 3, "text,n,label,probability"),
    ],
)
def test_files_of_every_kind_are_predicted(trained, run, name, content, header):
    Path(name).write_text(content)
    status, out, _ = run("--predict_file", name)
    lines = list(csv.reader(io.StringIO(out)))
    assert (status, ",".join(lines[0]), len(lines)) == (0, header, 4)


def test_a_file_is_predicted_from_standard_input(trained):
    result = command("--predict_file", "-", input="text\na good thing\nbad\n")
    assert result.returncode == 0
    rows = csv.reader(io.StringIO(result.stdout))
    assert [row[0] for row in rows] == ["text", "a good thing", "bad"]


@pytest.mark.parametrize(("name", "header"), [("in.txt", ""), ("in.csv", "text\n")])
def test_a_file_of_any_length_is_predicted_a_thousand_rows_at_a_time(
    trained, run, monkeypatch, name, header
):
    sizes, predict = [], g.Classifier.predict
    monkeypatch.setattr(
        g.Classifier,
        "predict",
        lambda self, texts: sizes.append(len(texts)) or predict(self, texts),
    )
    Path(name).write_text(header + "good\n" * 3456)
    assert run("--predict_file", name)[0] == 0
    assert sizes == [1000, 1000, 1000, 456]


def test_a_table_without_rows_gives_one_without_rows(trained, run):
    Path("in.csv").write_text("id,text,predicted_label\n")
    status, out, _ = run("--predict_file", "in.csv")
    assert (status, out) == (0, '"id","text","predicted_label","label","probability"\n')


def test_a_column_that_comes_too_late_is_not_lost_in_silence(trained, run):
    Path("in.jsonl").write_text('{"text": "a"}\n' * 1000 + '{"text": "a", "id": 3}\n')
    status, _, err = run("--predict_file", "in.jsonl")
    assert (status, "the column 'id' is missing in the first 1,000 rows" in err) == (2, True)


def test_a_fault_half_way_keeps_the_rows_before_it(trained, run):
    Path("in.csv").write_text("text\n" + "good\n" * 1500 + "one,cell too many\n")
    Path("out.csv").write_text("old")
    status, _, err = run("--predict_file", "in.csv", "--output", "out.csv")
    assert (status, "in line 1502, saw 2" in err) == (2, True)
    assert len(Path("out.csv").read_text().split("\n")) == 1 + 1000 + 1


def test_a_trace_tells_for_each_token_what_a_text_that_ends_there_would_get(trained, run):
    text = "this is a good thing"
    _, out, _ = run("--trace", text)
    rows = [line.split() for line in out.strip("\n").split("\n")]
    assert len(rows) == len(text)
    prefixes = [text[: i + 1] for i in range(len(text))]
    _, out, _ = run("--predict", *prefixes)
    for row, line in zip(rows, out.strip("\n").split("\n")):
        label, p, _ = line.split("\t")
        assert row[0] == label
        assert float(row[1].rstrip("%")) / 100 == pytest.approx(float(p), abs=1e-3)


def test_a_trace_is_shaded_on_a_terminal_unless_no_color_is_set(trained, run, monkeypatch):
    assert "\x1b" not in run("--trace", "good")[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[48;2;" in run("--trace", "good")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("--trace", "good")[1]


@pytest.mark.parametrize(
    "flags",
    ["--disable_causal_mask", "--average_embeddings", "--trainable_token_pos first", "--pad_to 40"],
)
def test_what_has_no_opinion_after_each_token_is_not_traced(trained, run, flags):
    run(*trained.train, *flags.split())
    status, _, err = run("--trace", "good")
    assert (status, err.count("\n"), "has an opinion after each token" in err) == (2, 1, True)


def test_evaluation_takes_the_test_part_of_what_was_learnt_and_all_of_the_rest(trained, run):
    _, out, _ = run("--evaluate", "--data", "texts.csv")
    assert "the test part, 12 texts" in out
    assert run("--evaluate")[1] == out  # no --data: that of training
    write_texts("new.csv", 8)
    _, out, _ = run("--evaluate", "--data", "new.csv")
    assert "all rows, 8 texts" in out


def test_evaluation_lists_the_most_confident_mistakes(trained, run):
    Path("new.csv").write_text(
        "text,label\n"
        + "thing number 9 is good,good\n" * 3
        + "\x1b[31m thing number 8 is good,poor\n"
    )
    _, out, _ = run("--evaluate", "--data", "new.csv")
    assert "mistakes  1; the most confident:" in out
    assert "poor taken for good" in out
    assert "\\x1b[31m thing number 8 is good" in out


def test_terminal_escapes_reach_no_terminal(trained, run, monkeypatch):
    text = "\x1b]0;title\x07 \x9b31m \u202e good \r\n"
    for argv in (["--predict", text], ["--trace", text]):
        out = run(*argv)[1]
        assert not set("\x1b\x07\x9b\u202e\r") & set(out), argv
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Path("in.jsonl").write_text(json.dumps({"text": text}))
    assert "\x1b" not in run("--predict_file", "in.jsonl")[1]


def test_labels_with_terminal_escapes_are_shown_without_them(run, here):
    write_checkpoint("gpt2.safetensors", arrays())
    write_texts("texts.csv", labels=("go\x1b[31mod", "poor"))
    train = f"--train --data texts.csv --weights gpt2.safetensors {QUICK}"
    assert "\x1b" not in run(*train.split())[1]
    assert "\x1b" not in run("--predict", "a good thing")[1]


def test_the_log_and_the_curves_hold_every_epoch(trained, run):
    status, _, err = run(*trained.train, "--log", "log.csv")
    log = pd.read_csv("log.csv")
    assert status == 0, err
    assert log["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert log["examples_seen"].tolist() == [42, 84, 126, 168, 210]
    assert log[["train_loss", "validation_loss", "seconds"]].gt(0).all(axis=None)
    assert log[["train_accuracy", "validation_accuracy"]].stack().between(0, 1).all()


def test_curves_are_drawn(trained, run):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert run(*trained.train, "--plot", "curves.png")[0] == 0
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_told_before_the_run(trained, run, monkeypatch):
    monkeypatch.setattr(g.importlib.util, "find_spec", lambda name: None)
    status, out, err = run(*trained.train, "--plot", "curves.png")
    assert (status, out, "pip install matplotlib" in err) == (2, "", True)


def test_generation_prints_the_text_and_its_continuation(run, here):
    write_checkpoint("gpt2.safetensors", arrays())
    flags = ["--weights", "gpt2.safetensors", "--tokenizer", "bytes", "--max_new_tokens", 3]
    status, out, _ = run("--generate", "Every effort", *flags)
    ids = list(b"Every effort")
    for _ in range(3):
        ids.append(int(reference_logits(arrays(), ids, 2)[-1].argmax()))
    expected = g.printable(bytes(i for i in ids if i < 256).decode(errors="replace"))
    assert (status, g.printable(out.rstrip("\n"))) == (0, expected)


def test_every_default_is_the_articles():
    args = g.parse(["--train"])
    assert (args.trainable_layers, args.trainable_token_pos) == ("last_block", "last")
    assert (args.num_epochs, args.batch_size, args.learning_rate) == (5, 8, 5e-5)
    assert (args.weight_decay, args.seed, args.pad_to) == (0.1, 123, None)
    assert g.parse(["--train", "--model_size", "gpt2-small (124M)"]).model_size == "gpt2-small"


def test_flags_win_over_offline_and_over_a_row(here, monkeypatch):
    args = g.parse(["--train", "--offline", "--num_epochs", "9"])
    assert (args.data, args.model_size, args.num_epochs) == ("stdlib", "gpt2-nano", 9)
    seen = []
    monkeypatch.setattr(g, "train", lambda args: seen.append(args) or {})
    with contextlib.suppress(KeyError):
        g.experiments([9], ["--train", "--experiment", "9", "--model_size", "gpt2-nano"])
    assert (seen[0].model_size, seen[0].trainable_layers) == ("gpt2-nano", "all")


# The article's nineteen ---------------------------------------------------------------------------


def test_all_nineteen_rows_run_and_are_kept_as_they_finish(trained, run):
    train = ["--train", "--data", "texts.csv", "--weights", "gpt2.safetensors", *QUICK.split()]
    status, out, _ = run(*train, "--num_epochs", 1, "--experiment", *range(1, 20))
    assert status == 0
    table = pd.read_csv("experiments.csv")
    assert table["row"].tolist() == list(range(1, 20))
    assert table["article"].tolist()[:3] == [0.95, 0.75, 0.72]
    assert table["here"].between(0, 1).all()
    trainable = dict(zip(table["row"], table["trainable"]))
    assert trainable[3] == 2 * 128 + 2
    assert trainable[3] < trainable[1] < trainable[4] < trainable[5] == trainable[9]
    assert trainable[11] == trainable[3] + 3 * 16 * (128 * 4 + 128 * 2 + 128 * 5 * 2)
    assert "main recipe" in out.split("table")[1]


def test_a_series_goes_on_after_a_row_that_cannot_run(trained, run, monkeypatch):
    real = g.train

    def fail_once(args):
        if args.average_embeddings:
            raise g.Fault("no memory")
        return real(args)

    monkeypatch.setattr(g, "train", fail_once)
    status, _, err = run(*trained.train, "--experiment", 18, 19, 16)
    assert (status, "error: row 19: no memory" in err) == (2, True)
    assert pd.read_csv("experiments.csv")["row"].tolist() == [18, 16]


# Nothing lost -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """A folder with a tiny checkpoint, texts and a classifier, made by the real command."""
    folder = tmp_path_factory.mktemp("kit")
    write_checkpoint(folder / "gpt2.safetensors", arrays())
    write_texts(folder / "texts.csv")
    flags = f"--train --data texts.csv --weights gpt2.safetensors {QUICK}".split()
    result = command(*flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


LONG_RUN = [
    "--train",
    "--data",
    "long.csv",
    "--weights",
    "random",
    "--model_size",
    "gpt2-nano",
    "--tokenizer",
    "bytes",
    "--trainable_layers",
    "last_two_blocks",
    "--num_epochs",
    "5",
    "--device",
    "cpu",
]


def start_and_read_until(word, *argv):
    """Starts the command and returns its process once it has printed the word (or has ended)."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith(word):
            break
    return process


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_file(here):
    """GPT_CLASSIFY_KILLS=20 kills it more often than the default 4 times."""
    write_texts("long.csv", 600)
    assert command(*LONG_RUN).returncode == 0
    expected = Path("classifier.safetensors").read_bytes()
    os.remove("classifier.safetensors")
    kills, draw = int(os.environ.get("GPT_CLASSIFY_KILLS", "4")), random.Random(0)
    words = ["baseline", "model", "frozen", "epoch 1", "epoch 2", "epoch 4", "epoch 5"]
    unfinished = Path("classifier.safetensors.resume")
    for n in range(kills):
        resume = ["--resume"] if unfinished.exists() else []
        process = start_and_read_until(words[(n * 3 + 2) % len(words)], *LONG_RUN, *resume)
        time.sleep(draw.choice([0, 0.01, 0.05, draw.random()]))
        process.kill()
        process.communicate()
        if unfinished.exists():
            g.read_safetensors(unfinished)  # whole, at any moment
        elif process.returncode == 0:  # it was too quick for us: once more from the beginning
            os.remove("classifier.safetensors")
    result = command(*LONG_RUN, *["--resume"] * unfinished.exists())
    assert result.returncode == 0, result.stderr
    assert Path("classifier.safetensors").read_bytes() == expected
    assert sorted(os.listdir()) == ["classifier.safetensors", "long.csv"]


def stop_after(epoch, monkeypatch):
    """Lets a run in this process be interrupted after that many epochs."""
    real = g.Journal.save

    def save(self, model, optimizer):
        real(self, model, optimizer)
        if self.history[-1]["epoch"] == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(g.Journal, "save", save)


@pytest.mark.parametrize(
    "flags", ["", "--seeds 2", "--trainable_layers lora --weight_decay 0.3", "--experiment 16"]
)
def test_resuming_goes_on_to_the_same_file_and_log(trained, run, monkeypatch, flags):
    run(*trained.train, *flags.split(), "--log", "expected.csv")
    expected = Path("classifier.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        status, _, err = run(*trained.train, *flags.split())
    assert (status, "--resume goes on after the last finished epoch" in err) == (130, True)
    status, out, _ = run(*trained.train, *flags.split(), "--resume", "--log", "log.csv")
    assert (status, "resumed   after epoch 3 of seed 123" in out) == (0, True)
    assert Path("classifier.safetensors").read_bytes() == expected
    logs = [pd.read_csv(name).drop(columns="seconds") for name in ("log.csv", "expected.csv")]
    assert logs[0].equals(logs[1])
    assert not Path("classifier.safetensors.resume").exists()


def test_other_settings_are_not_resumed_and_named(trained, run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        run(*trained.train)
    status, _, err = run(*trained.train, "--resume", "--batch_size", 3, "--seed", 5)
    assert status == 2
    assert "--batch_size 8, now 3" in err
    assert "--seed 123, now 5" in err
    with open("texts.csv", "a") as file:
        file.write("one more is good,good\n")
    status, _, err = run(*trained.train, "--resume")
    assert (status, "fingerprint" in err) == (2, True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(here, number, status):
    write_texts("long.csv", 600)
    process = start_and_read_until("epoch 1", *LONG_RUN)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.strip() == (
        "stopped: the same command with --resume goes on after the last finished epoch"
    )


def safetensors(header, data=b"", size=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if size is None else size) + head + data


def entry(shape=(2,), place=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


UNSOUND = {
    "empty": b"",
    "short": b"1234567",
    "a header longer than the file": safetensors({}, size=1 << 62),
    "a header longer than can be": safetensors(b" " * (2 << 20)),
    "no JSON": safetensors(b"{nonsense"),
    "a list": safetensors([1, 2]),
    "deep nesting": safetensors(b"[" * 100_000),
    "not UTF-8": safetensors(b"\xff\xfe\xff"),
    "a name twice": safetensors(
        f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry(place=(8, 16)))}}}'.encode(),
        bytes(16),
    ),
    "a name twice, at one place": safetensors(
        f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(), bytes(8)
    ),
    "no description": safetensors({"a": 3}),
    "an unknown type": safetensors({"a": entry(dtype="F33")}, bytes(8)),
    "a type that is a list": safetensors({"a": entry(dtype=[])}, bytes(8)),
    "a negative size": safetensors({"a": entry(shape=(-2,))}, bytes(8)),
    "a size that is true": safetensors({"a": entry(shape=(True, 2))}, bytes(8)),
    "a huge product": safetensors({"a": entry(shape=(400,) * 8)}, bytes(400)),
    "too many sizes": safetensors({"a": entry(shape=(1,) * 100_000)}, bytes(8)),
    "three offsets": safetensors({"a": entry(place=(0, 4, 8))}, bytes(8)),
    "offsets backwards": safetensors({"a": entry(place=(8, 0))}, bytes(8)),
    "past the end": safetensors({"a": entry(place=(0, 8))}, bytes(4)),
    "another size than the shape": safetensors({"a": entry(shape=(3,))}, bytes(8)),
    "an overlap": safetensors({"a": entry(), "b": entry(place=(4, 12))}, bytes(12)),
    "a gap": safetensors({"a": entry(), "b": entry(place=(12, 20))}, bytes(20)),
    "bytes left over": safetensors({"a": entry()}, bytes(9)),
    "metadata that are none": safetensors({"__metadata__": 3}),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_safetensors_file_is_a_fault(here, name):
    Path("x.safetensors").write_bytes(UNSOUND[name])
    with pytest.raises(g.Fault, match="x.safetensors is no sound safetensors file"):
        g.read_safetensors("x.safetensors")


def test_what_is_written_is_read_again(here):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7.0), "c": torch.empty(0, 2)}
    tensors |= {"d": torch.randn(4, 6).t(), "e": torch.arange(3), "f": torch.tensor([True])}
    g.write_safetensors("x", tensors, {"k": "v é"})
    found, metadata = g.read_safetensors("x")
    assert metadata == {"k": "v é"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) for name, t in tensors.items())


def test_the_safetensors_library_reads_what_is_written(here):
    library = pytest.importorskip("safetensors.torch", reason="needs the safetensors library")
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).half()}
    g.write_safetensors("x", tensors, {"k": "v"})
    assert all(torch.equal(t, tensors[name]) for name, t in library.load_file("x").items())


def mutated(raw, draw):
    """Some bytes of a file changed, most of them in its header, or the file cut or lengthened."""
    raw = bytearray(raw)
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        where = draw.randrange(len(raw) if draw.random() < 0.1 else header)
        kind = draw.randrange(5)
        if kind == 0:
            raw[where] = draw.randrange(256)
        elif kind == 1:
            raw[where] = draw.choice(b'0123456789-,:[]{}"eE. ')
        elif kind == 2:
            del raw[where : where + draw.choice([1, 1, 7, 1000])]
        elif kind == 3:
            raw[where:where] = draw.choice([b"9", b"0", b"-", b"[", b"null", b"1e9", b"\0" * 100])
        else:
            raw = raw[: max(where, 1)] if draw.random() < 0.2 else raw + b"x"
        header = min(header, len(raw))
    return bytes(raw)


def test_mutated_files_are_read_or_refused_and_nothing_else(here, kit, capsys):
    """GPT_CLASSIFY_MUTATIONS=10000 tries more than the default 300 of each kind."""
    small = g.GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=64)
    write_checkpoint("gpt2.safetensors", arrays(small))
    write_texts("texts.csv", 20)
    flags = f"--train --data texts.csv --weights gpt2.safetensors {QUICK} --num_epochs 1"
    assert g.main(flags.split()) == 0
    args = g.parse(["--predict"])
    readers = {
        "gpt2.safetensors": lambda: g.read_gpt2("mutated"),
        "classifier.safetensors": lambda: g.load_classifier(args).predict(["a text"]),
    }
    args.classifier, draw = "mutated", random.Random(0)
    for name, read in readers.items():
        raw, refused = Path(name).read_bytes(), 0
        for _ in range(int(os.environ.get("GPT_CLASSIFY_MUTATIONS", "300"))):
            Path("mutated").write_bytes(mutated(raw, draw))
            try:
                read()
            except g.Fault as fault:
                assert "\n" not in str(fault)
                refused += 1
        assert refused > 100


def test_no_header_makes_the_reader_do_anything_but_refuse(here):
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
    st = hypothesis.strategies
    numbers = st.integers(-3, 40) | st.integers() | st.booleans() | st.none() | st.floats()
    entries = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from([*g.DTYPES, "X", 3]),
            "shape": st.lists(numbers, max_size=4) | numbers,
            "data_offsets": st.lists(numbers, max_size=3) | numbers,
        },
    )
    headers = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | numbers)

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(headers, st.integers(0, 40))
    def check(header, n):
        Path("x").write_bytes(safetensors(header, bytes(n)))
        with contextlib.suppress(g.Fault):
            tensors, _ = g.read_safetensors("x")
            assert sum(t.numel() * t.element_size() for t in tensors.values()) == n

    check()


class Harm:
    """A pickle of this makes a file when it is loaded by somebody careless."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


# Each: the flags, files to make first, and what the error says. {kit} is the folder of `kit`.
T = "--train --weights {kit}/gpt2.safetensors --tokenizer bytes --data "
TEXTS = T + "{kit}/texts.csv "
USE = " --classifier {kit}/classifier.safetensors"
ROWS = b"text,label\n" + b"x,a\ny,b\n" * 20
FAULTS = {
    "no action": ("", {}, "one of the arguments --train"),
    "two actions": ("--train --evaluate", {}, "not allowed with argument"),
    "an unknown flag": ("--train --colour red", {}, "unrecognized arguments: --colour red"),
    "no server": ("--train --data {kit}/texts.csv", {}, "could not download http://127.0.0.1:9/"),
    "weights that are missing": (
        "--train --data {kit}/texts.csv --weights x",
        {},
        "x: No such file",
    ),
    "weights cut short": (
        "--generate x --weights w",
        {"w": safetensors({"a": entry()}, bytes(4))},
        "cut short",
    ),
    "a header that lies": ("--generate x --weights w", {"w": b"\xff" * 20}, "longer than can be"),
    "no GPT-2": ("--generate x --weights w", {"w": safetensors({})}, "no GPT-2's weights"),
    "a tensor that is missing": ("--generate x --weights lacking", {}, "ln_f.bias is missing"),
    "a tensor of another shape": ("--generate x --weights odd", {}, "ln_f.bias has the shape (3,)"),
    "no data": (T + "nowhere.csv", {}, "nowhere.csv: No such file"),
    "an empty file": (T + "t.csv", {"t.csv": b""}, "t.csv is empty"),
    "an empty list of texts": ("--predict_file t.txt" + USE, {"t.txt": b""}, "t.txt is empty"),
    "no rows": (T + "t.csv", {"t.csv": b"text,label\n"}, "t.csv has no rows"),
    "not UTF-8": (T + "t.csv", {"t.csv": ROWS + b"\xe9,a\n"}, "t.csv is not UTF-8"),
    "UTF-16": (T + "t.csv", {"t.csv": "text,label".encode("utf-16")}, "t.csv is not UTF-8"),
    "texts that are not UTF-8": ("--predict_file t.txt" + USE, {"t.txt": b"\xe9"}, "is not UTF-8"),
    "other columns": (
        T + "t.csv",
        {"t.csv": b"message,kind\nx,a\n"},
        "has the columns 'message', 'kind', not 'text': give --text_column",
    ),
    "columns that differ in case": (
        T + "t.csv",
        {"t.csv": b"Text,TEXT,label\nx,y,a\n"},
        "has the columns 'Text', 'TEXT', 'label', not 'text'",
    ),
    "a row too long": (T + "t.csv", {"t.csv": ROWS + b"x,a,b\n"}, "in line 42, saw 3"),
    "a first row too long": (
        T + "t.csv",
        {"t.csv": b"text,label\nx,a,b\n"},
        "row 1 has more cells",
    ),
    "text for label": (
        T + "t.csv",
        {"t.csv": b"text,label\n" + b"".join(b"x,%d\n" % i for i in range(40))},
        "40 labels in 40 rows: is --label_column right?",
    ),
    "one column for both": (
        T + "t.csv --label_column text",
        {"t.csv": ROWS},
        "are the same column",
    ),
    "an open quote": (T + "t.csv", {"t.csv": ROWS + b'"x,a\n'}, "EOF inside string"),
    "no JSON": (
        T + "t.jsonl",
        {"t.jsonl": b'{"text": "x", "label": "a"}\n[3]\n'},
        "t.jsonl: line 2 is no JSON object",
    ),
    "mixed labels": (
        T + "t.jsonl",
        {"t.jsonl": b'{"text": "x", "label": 1}\n{"text": "y", "label": "a"}\n'},
        "all strings or all integers",
    ),
    "one label": (T + "t.csv", {"t.csv": b"text,label\n" + b"x,a\n" * 20}, "two labels at least"),
    "too few texts": (T + "t.csv", {"t.csv": b"text,label\nx,a\ny,b\n"}, "2 texts are too few"),
    "an unknown kind of file": (T + "t.pdf", {"t.pdf": b"x"}, "ends in none of .csv"),
    "a folder without a test file": (
        T + ".",
        {"train.csv": ROWS, "val.csv": ROWS},
        "0 tables named test",
    ),
    "a split without rows": (
        T + ".",
        {"train.csv": ROWS, "val.csv": ROWS, "test.csv": b"text,label\n"},
        "test.csv has no rows",
    ),
    "a test label that training lacks": (
        T + ".",
        {"train.csv": ROWS, "val.csv": ROWS, "test.csv": ROWS + b"x,c\n"},
        "test has the label 'c', training has not",
    ),
    "a zip that is none": (T + "x.zip", {"x.zip": b"PK\3\4"}, "no sound zip"),
    "a label that training did not see": (
        "--evaluate --data t.csv" + USE,
        {"t.csv": ROWS},
        "training did not see the label 'a'",
    ),
    "no classifier": ("--predict x", {}, "no classifier classifier.safetensors: train one"),
    "a classifier cut short": (
        "--predict x --classifier c",
        {"c": safetensors({"a": entry()}, bytes(7))},
        "cut short",
    ),
    "a classifier of somebody else": (
        "--predict x --classifier {kit}/gpt2.safetensors",
        {},
        "no sound classifier of this tool",
    ),
    "a pickle that would run code": (
        "--predict x --classifier c",
        {"c": pickle.dumps(Harm())},
        "no sound safetensors file",
    ),
    "no rank": (TEXTS + "--trainable_layers lora --lora_rank 0", {}, "0 is not a number from 1 on"),
    "too high a rank": (
        TEXTS + "--trainable_layers lora --lora_rank 129",
        {},
        "--lora_rank 129 is above the model's width, 128",
    ),
    "the mean of the first": (
        TEXTS + "--average_embeddings --trainable_token_pos first",
        {},
        "--average_embeddings reads all tokens",
    ),
    "no length to fill up to": (TEXTS + "--pad_to 0", {}, "neither longest, nor model"),
    "too long to fill up to": (TEXTS + "--pad_to 65", {}, "this model reads 64 tokens"),
    "too long texts": (TEXTS + "--max_length 65", {}, "this model reads 64 tokens"),
    "an empty batch": (TEXTS + "--batch_size 0", {}, "0 is not a number from 1 on"),
    "no learning rate": (TEXTS + "--learning_rate nan", {}, "nan is not a number from 0 on"),
    "a learning rate that destroys": (
        TEXTS + "--learning_rate 1e30",
        {},
        "smaller --learning_rate",
    ),
    "bytes for GPT-2": (
        "--train --data {kit}/texts.csv --tokenizer bytes",
        {},
        "GPT-2's tokens only",
    ),
    "a pretrained nano": (
        "--train --data {kit}/texts.csv --model_size gpt2-nano",
        {},
        "no pretrained weights for gpt2-nano",
    ),
    "an unknown size": (TEXTS + "--model_size gpt3", {}, "invalid choice: 'gpt3'"),
    "an unknown row": ("--train --experiment 3 20", {}, "invalid choice: 20"),
    "a series to resume": ("--train --experiment 3 4 --resume", {}, "for one run"),
    "nothing to resume": (TEXTS + "--resume", {}, "nothing to resume"),
    "offline prediction": ("--predict x --offline", {}, "--offline goes with --train"),
    "no such device": (
        "--train --device " + ("mps" if torch.cuda.is_available() else "cuda"),
        {},
        "--device",
    ),
    "a folder that is not there": (TEXTS + "--classifier no/where", {}, "no such folder"),
    "an output that is not there": (
        "--predict_file {kit}/texts.csv --output no/where.csv" + USE,
        {},
        "no/where.csv: there is no such folder",
    ),
    "an output that is the input": (
        "--predict_file t.csv --output t.csv" + USE,
        {"t.csv": b"text\nx\n"},
        "is the file that is being read",
    ),
    "nothing to trace": ("--trace= " + USE, {}, "there is no text to trace"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_one_line_status_2_and_leaves_nothing_behind(here, kit, name):
    flags, files, message = FAULTS[name]
    for path, content in files.items():
        Path(path).write_bytes(content)
    if "lacking" in flags or "odd" in flags:
        tensors = arrays()
        tensors["ln_f.bias"] = torch.zeros(3)
        if "lacking" in flags:
            del tensors["ln_f.bias"]
        write_checkpoint(flags.split()[-1], tensors)
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    cache = ["--cache_dir", str(here.parent / "cache")]
    result = command(*flags.format(kit=kit).split(), *cache, env=environment)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_a_cell_of_ten_megabytes_is_cut(trained, run):
    Path("t.csv").write_text("text\n" + "good " * 2_000_000 + "\nlast\n")
    status, out, err = run("--predict_file", "t.csv", "--output", "o.csv")
    assert (status, out, err) == (0, "", "note: cut to 64 tokens: 1 texts\n")
    assert Path("o.csv").stat().st_size > 10_000_000


def test_a_model_that_cannot_fit_is_told_before_it_is_built(run, here, monkeypatch):
    write_texts("texts.csv")
    monkeypatch.setattr(g, "free_memory", lambda device: 1e6)
    flags = "--train --data texts.csv --weights random --model_size gpt2-xl --tokenizer bytes"
    status, _, err = run(*flags.split())
    assert (status, "gpt2-xl needs about" in err) == (2, True)


def test_a_full_disk_is_a_fault_and_leaves_nothing_behind(here, kit):
    disk = here / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        (disk / "classifier").write_text("old")
        flags = TEXTS.format(kit=kit).split()
        result = command(*flags, "--classifier", disk / "classifier")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "No space left on device" in result.stderr
        assert os.listdir(disk) == ["classifier"]
        assert (disk / "classifier").read_text() == "old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_reader_that_goes_away_is_told_in_one_line(here, kit):
    Path("t.txt").write_text("good\n" * 20_000)
    pipe = f"{sys.executable} {SCRIPT} --predict_file t.txt {USE.format(kit=kit)} | head -n 1"
    result = subprocess.run(
        ["bash", "-c", f"{pipe}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, '"text","label","probability"\n')
    assert result.stderr == "error: standard output was closed before everything was written\n"


# Several processes --------------------------------------------------------------------------------

RANKS = """
import os, sys
sys.path.insert(0, {folder!r})
import gpt_classify as g
import torch
seen, real = {{}}, g.Journal.save
g.Journal.save = lambda self, model, optimizer: (
    real(self, model, optimizer), seen.update(history=self.history, weights=model.state_dict())
)
status = g.main(sys.argv[1:])
torch.save(seen, f"rank{{os.environ['RANK']}}.pt")
sys.exit(status)
"""


@pytest.mark.parametrize("flags", ["", "--trainable_layers all --batch_size 1"])
def test_two_processes_learn_what_one_does(here, kit, flags):
    Path("ranks.py").write_text(RANKS.format(folder=str(SCRIPT.parent)))
    train = [*TEXTS.format(kit=kit).split(), *QUICK.split(), *flags.split()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "ranks.py", *train, "--classifier", "two"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("data ") == 1  # one of the two talks
    first, second = (torch.load(f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(t, second["weights"][name]) for name, t in first["weights"].items())
    assert command(*train, "--classifier", "one", "--log", "one.csv").returncode == 0
    one = pd.read_csv("one.csv")
    assert [h["examples_seen"] for h in first["history"]] == one["examples_seen"].tolist()
    assert [h["train_loss"] for h in first["history"]] == pytest.approx(
        one["train_loss"].tolist(), abs=1e-3
    )
    ours, theirs = (g.read_safetensors(name)[0] for name in ("one", "two"))
    for name, t in ours.items():
        ours_t, theirs_t = learnt(name, t), learnt(name, theirs[name])
        torch.testing.assert_close(ours_t, theirs_t, atol=2e-3, rtol=1e-2)
