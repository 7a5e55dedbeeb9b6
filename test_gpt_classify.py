"""What gpt_classify.py promises, a fact a test, in the order of that file. Read it after that file.

    pytest                      everything, in about two minutes on two cores
    pytest -k "row or future"   what the names say

Nothing here needs the network. Tests with `real` in their names need GPT-2's vocabulary, RoBERTa's
or the SMS Spam Collection, and skip where these have not been downloaded; others skip without
transformers, safetensors or matplotlib.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
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
VOCABULARY = Path(os.environ.get("TIKTOKEN_CACHE_DIR", g.CACHE / "tiktoken"))
TINY = g.GPTConfig(3, 128, block_size=64, vocab_size=257)
TINY_ROBERTA = g.GPTConfig(3, 128, 62, 257, causal=False, roberta=True)


def needs(*paths):
    reason = "needs a download: run `python gpt_classify.py --train` once, with a network"
    return pytest.mark.skipif(not all(path.exists() for path in paths), reason=reason)


# Help for the tests ------------------------------------------------------------------------------


def draw_weights(config):
    """{name in our GPT: random numbers}; matrices are (out, in), LayerNorms around 1."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in g.GPT(config).named_parameters()}
    ones = [name for name in shapes if "ln_" in name and "weight" in name]
    return {name: torch.randn(shape) * 0.08 + (name in ones) for name, shape in shapes.items()}


def gpt2_file(config=TINY):
    """{name: tensor} as in a published GPT-2 file: matrices are (in, out); q, k and v are one."""
    w = draw_weights(config)
    for name in [name for name in w if "c_q" in name]:
        parts = [w.pop(name.replace("c_q", c)) for c in ("c_q", "c_k", "c_v")]
        w[name.replace("c_q", "c_attn")] = torch.cat(parts)
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: t.T if name.endswith(matrices) else t for name, t in w.items()}


def roberta_file():
    """{name: tensor} as in a published RoBERTa file: with two more positions, and a token type."""
    w, names = draw_weights(TINY_ROBERTA), g.ROBERTA_NAMES.split()
    w["wpe.weight"] = F.pad(w["wpe.weight"], (0, 0, 2, 0), value=7.0)
    for theirs, ours in zip(names[::2], names[1::2]):
        w = {re.sub(rf"\b{ours}\.", f"{theirs}.", name): t for name, t in w.items()}
    w["roberta.embeddings.token_type_embeddings.weight"] = torch.full((1, 128), 0.1)
    return w | {"lm_head.bias": torch.zeros(257)}


def write_checkpoint(path, tensors):
    """A safetensors file, written by the specification with nothing of the tool's own code."""
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


def by_the_book(ids, roberta=False, causal=True):
    """Hidden states (T, C) of one text, formula by formula, in float64."""
    w = {name: t.double() for name, t in draw_weights(TINY_ROBERTA if roberta else TINY).items()}
    T = len(ids)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x, name):
        q, k, v = (linear(x, f"{name}.c_{c}").view(T, 2, 64).transpose(0, 1) for c in "qkv")
        scores = q @ k.transpose(1, 2) / 8
        if causal:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return linear((scores.softmax(2) @ v).transpose(0, 1).reshape(T, 128), f"{name}.c_proj")

    def mlp(x, name):
        x = linear(x, f"{name}.c_fc")
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        gelu = x / 2 * (1 + (torch.erf(x / math.sqrt(2)) if roberta else tanh))
        return linear(gelu, f"{name}.c_proj")

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    x = norm(x + 0.1, "ln_e") if roberta else x
    for h in ("h.0", "h.1", "h.2"):
        if roberta:
            x = norm(x + attention(x, f"{h}.attn"), f"{h}.ln_1")
            x = norm(x + mlp(x, f"{h}.mlp"), f"{h}.ln_2")
        else:
            x = x + attention(norm(x, f"{h}.ln_1"), f"{h}.attn")
            x = x + mlp(norm(x, f"{h}.ln_2"), f"{h}.mlp")
    return x if roberta else norm(x, "ln_f")


def example(ids, pool=None, label=-1):
    return g.Example(torch.as_tensor(ids), pool or range(len(ids) - 1, len(ids)), label)


def random_texts(n=20):
    """n Examples of up to 30 tokens, pooled at the last, with labels 0 and 1 in turn."""
    draw = random.Random(1)
    ids = [[draw.randrange(256) for _ in range(draw.randint(1, 30))] for _ in range(n)]
    return [example(ids[i], None, i % 2) for i in range(n)]


def tiny_model(folder, roberta=False, **changes):
    path = write_checkpoint(folder / "checkpoint", roberta_file() if roberta else gpt2_file())
    config, weights = g.read_checkpoint(path)
    return g.build(g.dataclasses.replace(config, **changes), weights)


HERE = ["--device", "cpu", "--dtype", "float32"]


def settings(**changes):
    """The flags that model and training look at."""
    flags = vars(g.parse(["--train", *HERE])) | {"batch_size": 4, "tokens_per_row": 64}
    return argparse.Namespace(**flags | changes)


def tiny_classifier(folder, trainable="last_block", **changes):
    model, flags = tiny_model(folder), settings(trainable_layers=trainable, **changes)
    torch.manual_seed(0)
    return g.make_classifier(model, 2, flags)


def write_texts(path, n=60, labels=("good", "poor"), start="text,label"):
    """A csv file of short texts whose label shows in a word."""
    rows = [f"thing number {i} is {labels[i % 2]},{labels[i % 2]}" for i in range(n)]
    Path(path).write_text("\n".join([start, *rows, ""]))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and an empty folder of downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(g, "CACHE", tmp_path.parent / f"{tmp_path.name} cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Runs main() in this process: run("--train", ...) -> (status, output, errors)."""

    def run(*argv):
        capsys.readouterr()
        status = g.main([str(a) for a in argv])
        return status, *capsys.readouterr()

    return run


TRAIN = ["--train", "--data", "texts.csv", "--weights", "gpt2.safetensors"]
TRAIN += ["--learning_rate", "1e-3", *HERE]


@pytest.fixture
def trained(run):
    """A classifier, trained on a few texts with a tiny checkpoint; the output of its training."""
    write_checkpoint("gpt2.safetensors", gpt2_file())
    write_texts("texts.csv")
    status, out, err = run(*TRAIN)
    assert status == 0, err
    return out


def tensors_of(path):
    return g.read_safetensors(path)[0]


def assert_same(a, b, tolerance=1e-5):
    """Two trained models are the same but for rounding. AdamW divides a gradient by its size, so it
    makes a full step of one that is nothing but rounding: single numbers may differ (their mean is
    compared), and all biases of keys (softmax ignores what is added to all scores)."""
    assert a.keys() == b.keys()
    for name in [name for name in a if not name.endswith("c_k.bias")]:
        assert (a[name] - b[name]).double().abs().mean() < tolerance, name


def command(*argv, **options):
    """Runs the real command in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([sys.executable, SCRIPT, *map(str, argv)], check=False, **options)


# 1. The model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "not causal", "roberta"])
def test_the_model_computes_what_the_book_says_also_for_many_texts_in_a_row(tmp_path, kind):
    texts, causal, roberta = random_texts(6), kind == "causal", kind == "roberta"
    model = tiny_model(tmp_path, roberta, causal=causal)
    expected = [by_the_book(e.ids, roberta, causal) for e in texts]
    ours = model.hidden(g.Row.of(texts)).double()
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-4, rtol=0)
    logits = torch.stack([hidden[-1] for hidden in expected]) @ model.wte.weight.T.double()
    torch.testing.assert_close(model(g.Row.of(texts)).double(), logits, atol=1e-4, rtol=0)


def test_both_give_what_the_transformers_library_gives(tmp_path):
    library = pytest.importorskip("transformers", reason="needs the transformers library")
    ids = torch.randint(3, 257, (50,))  # 1 is padding to RoBERTa, and has no position there
    sizes = {"n_positions": 64, "n_embd": 128, "n_layer": 3, "n_head": 2, "vocab_size": 257}
    gpt2 = library.GPT2LMHeadModel(library.GPT2Config(**sizes)).eval()
    assert not gpt2.transformer.load_state_dict(gpt2_file(), strict=False).unexpected_keys
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 512, "max_position_embeddings": 64, "type_vocab_size": 1}
    sizes |= {"vocab_size": 257, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
    roberta = library.RobertaModel(library.RobertaConfig(**sizes), add_pooling_layer=False).eval()
    theirs = {name.removeprefix("roberta."): t for name, t in roberta_file().items()}
    assert not roberta.load_state_dict(theirs, strict=False).missing_keys
    row = g.Row.of([example(ids)])
    with torch.no_grad():
        ours = tiny_model(tmp_path)(row)[0]
        torch.testing.assert_close(ours, gpt2(ids[None]).logits[0, -1], atol=1e-4, rtol=0)
        ours = tiny_model(tmp_path, roberta=True).hidden(row)
        torch.testing.assert_close(ours, roberta(ids[None])[0][0], atol=1e-4, rtol=0)


def test_a_causal_model_cannot_see_the_future_and_without_the_mask_it_can(tmp_path):
    ids = torch.randint(0, 257, (20,))
    changed = torch.cat([ids[:-1], (ids[-1:] + 1) % 257])
    for causal in (True, False):
        model = tiny_model(tmp_path, causal=causal)
        with torch.no_grad():
            before, after = (model.hidden(g.Row.of([example(text)])) for text in (ids, changed))
        assert torch.allclose(before[:-1], after[:-1], atol=1e-6) == causal
        assert not torch.allclose(before[-1], after[-1], atol=1e-3)


@pytest.mark.parametrize("kind", ["causal", "not causal", "roberta"])
def test_texts_in_one_row_do_not_see_each_other(tmp_path, kind):
    model = tiny_model(tmp_path, kind == "roberta", causal=kind == "causal")
    texts = random_texts(12)
    with torch.no_grad():
        alone = torch.cat([model(g.Row.of([text])) for text in texts])
        together, backwards = model(g.Row.of(texts)), model(g.Row.of(texts[::-1])).flip(0)
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=0)
    torch.testing.assert_close(backwards, alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("pool", ["first", "last", "middle", "mean"])
def test_one_query_per_text_in_the_last_block_changes_no_logit_and_no_gradient(tmp_path, pool):
    model, texts = tiny_classifier(tmp_path), random_texts(6)
    for e in texts:
        n = len(e.ids)
        ends = {"first": (0, 1), "last": (n - 1, n), "middle": (n // 2, n // 2 + 1), "mean": (0, n)}
        e.pool = range(*ends[pool])
    row, outcomes = g.Row.of(texts), []
    # The plain way: all queries in all blocks, and pooling afterwards.
    hidden = model.hidden(row).split([len(e.ids) for e in texts])
    plain = model.head(torch.stack([h[list(e.pool)].mean(0) for h, e in zip(hidden, texts)]))
    for logits in (model(row), plain):
        model.zero_grad()
        F.cross_entropy(logits, row.labels).backward()
        outcomes.append([logits, *(p.grad.clone() for p in model.trained().values())])
    for fast, plain in zip(*outcomes):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


PARAMETERS = {"gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
PARAMETERS |= {"gpt2-xl": 1_557_611_200, "roberta-base": 124_055_040 - 3 * 768}  # see roberta_file


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_published_size_has_the_published_number_of_parameters(size):
    with torch.device("meta"):
        model = g.GPT(g.SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    assert g.config_of(model.state_dict()) == g.SIZES[size]


# 2. From language model to classifier -------------------------------------------------------------


def encode(text, config=TINY, **flags):
    flags = {"max_length": 10, "pad_to": 0, "trainable_token_pos": None} | flags
    encoder = g.Encoder(config, *g.get_tokenizer(257), argparse.Namespace(**flags))
    return encoder.examples([text], [1])[0]


POOLED = """
last 0 causal abc 2 3
first 0 causal a 0 1
first 0 - abc 0 1
flexible 0 causal abc 2 3
mean 0 causal abc 0 3
last 5 causal abc.. 4 5
flexible 5 causal abc 2 3
flexible 5 - abc.. 2 3
mean 5 causal abc.. 0 5
last 2 causal ab 1 2
"""


@pytest.mark.parametrize("line", POOLED.strip().split("\n"))
def test_what_the_pooled_position_of_abc_is_and_what_it_sees(line):
    pos, pad_to, causal, ids, start, stop = line.split()
    config = g.dataclasses.replace(TINY, causal=causal == "causal")
    found = encode("abc", config, trainable_token_pos=pos, pad_to=int(pad_to))
    assert found.ids.tolist() == [256 if c == "." else ord(c) for c in ids]
    assert (found.pool, found.label) == (range(int(start), int(stop)), 1)


def test_roberta_reads_its_own_start_end_and_padding_and_pools_at_the_start():
    found = encode("ab", TINY_ROBERTA, pad_to=7)
    assert (found.ids.tolist(), found.pool) == ([0, 97, 98, 2, 1, 1, 1], range(1))
    assert encode("abcdef", TINY_ROBERTA, max_length=4).ids.tolist() == [0, 97, 98, 2]


def test_an_end_of_text_in_a_text_is_ordinary_text():
    assert encode("<|endoftext|>", max_length=20).ids.tolist() == list(b"<|endoftext|>")


@needs(VOCABULARY)
def test_very_long_texts_are_cut_before_they_become_real_tokens(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    flags = argparse.Namespace(max_length=None, pad_to=0, trainable_token_pos=None)
    e = g.Encoder(g.SIZES["gpt2-small"], *g.get_tokenizer(50257), flags)
    for text in ("word " * 2_000_000, " " * 2_000_000, "€" * 2_000_000):
        (ids,) = e.tokens([text])
        assert len(ids) < 400_000
        assert ids[:1024] == e.tokenizer.encode_ordinary(text[:200_000])[:1024]


MOVED = {"last_layer": "head", "last_block": r"head|ln_f|h\.2", "all": ""}
MOVED |= {"last_two_blocks": r"head|ln_f|h\.[12]", "lora": "head|.*lora_"}


@pytest.mark.parametrize("trainable", MOVED)
def test_each_choice_of_trainable_layers_moves_exactly_what_it_names(tmp_path, trainable):
    model, texts = tiny_classifier(tmp_path, trainable), random_texts(16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.trained().values(), weight_decay=0.1)
    for epoch in (1, 2):  # LoRA's A moves from the second step on, once B is no longer zero
        g.train_epoch(model, optimizer, texts, 0, epoch, settings(learning_rate=1e-2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != bool(re.match(MOVED[trainable], name)), name


def test_lora_begins_as_the_model_itself_and_can_be_merged_into_it(tmp_path):
    row, plain = g.Row.of(random_texts(6)), tiny_classifier(tmp_path, "last_layer")
    lora = tiny_classifier(tmp_path, "lora", lora_rank=4, lora_alpha=12)
    with torch.no_grad():
        lora.head.load_state_dict(plain.head.state_dict())
        torch.testing.assert_close(lora(row), plain(row))
        layers = [(n, m) for n, m in lora.named_modules() if isinstance(m, g.LoRALinear)]
        assert len(layers) == 6 * TINY.n_layer
        for name, layer in layers:
            layer.lora_B.normal_()
            merged = layer.weight + 12 / 4 * layer.lora_B @ layer.lora_A  # alpha / rank
            plain.get_submodule(name).weight.copy_(merged)
        torch.testing.assert_close(lora(row), plain(row), atol=1e-3, rtol=1e-3)


# 3. Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("trainable", ["last_layer", "last_block", "last_two_blocks"])
def test_frozen_blocks_once_or_in_every_epoch_is_the_same(trained, run, trainable, pool):
    flags = [*TRAIN, "--trainable_layers", trainable, "--trainable_token_pos", pool]
    assert "once for all 60 texts" in run(*flags)[1]
    expected = tensors_of("classifier.safetensors")
    assert "once for all" not in run(*flags, "--no_feature_cache")[1]
    assert_same(tensors_of("classifier.safetensors"), expected)


def test_features_that_do_not_fit_are_not_cached_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    model, texts = tiny_classifier(tmp_path), random_texts(5)
    g.cache_features(model, texts, settings())
    monkeypatch.setattr(g.Path, "exists", lambda path: True)
    monkeypatch.setattr(g.Path, "read_text", lambda path: "MemAvailable:       10 kB")
    g.cache_features(model, texts, settings())
    assert all(e.x is None for e in texts)  # nor are those of other weights kept
    assert "2 of 3 blocks, in every epoch" in capsys.readouterr().out


def gradients(model, texts, budget):
    """The gradients of one step over all texts."""
    flags = settings(batch_size=len(texts), tokens_per_row=budget, learning_rate=0.0)
    g.train_epoch(model, torch.optim.SGD(model.trained().values()), texts, 0, 1, flags)
    return [p.grad.clone() for p in model.trained().values()]


def test_a_batch_in_many_rows_has_the_gradient_of_the_batch_in_one(tmp_path, monkeypatch):
    model, texts, rows = tiny_classifier(tmp_path, "all"), random_texts(13), []
    one, row = gradients(model, texts, 10_000), g.Row.of(texts)
    model.zero_grad()
    F.cross_entropy(model(row), row.labels).backward()
    for a, p in zip(one, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
    of = g.Row.of
    monkeypatch.setattr(g.Row, "of", lambda *a: rows.append(of(*a)) or rows[-1])
    for a, b in zip(one, gradients(model, texts, 40)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    assert len(rows) > 4
    assert max(len(row.ids) for row in rows) <= 40  # so memory does not depend on the batch


def test_the_learning_rate_falls_to_zero_over_the_run_or_is_constant(tmp_path):
    model, texts = tiny_classifier(tmp_path), random_texts(8)
    for schedule, expected in (("linear", [1, 3 / 4, 1 / 2, 1 / 4]), ("constant", [1] * 4)):
        optimizer, steps = torch.optim.SGD(model.trained().values()), []
        optimizer.register_step_pre_hook(lambda o, *_, s=steps: s.append(o.param_groups[0]["lr"]))
        flags = settings(num_epochs=2, learning_rate=1.0, lr_schedule=schedule)
        for epoch in (1, 2):
            g.train_epoch(model, optimizer, texts, 0, epoch, flags)
        assert steps == pytest.approx(expected)


def test_an_epoch_sees_every_text_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    model, texts, seen = tiny_classifier(tmp_path), random_texts(10), []
    monkeypatch.setattr(g, "pack", lambda batch, budget: seen.extend(map(id, batch)) or [])
    for epoch in (1, 2):
        optimizer = torch.optim.SGD(model.trained().values())
        g.train_epoch(model, optimizer, texts, 0, epoch, settings())
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(map(id, texts))
    assert seen[:10] != seen[10:]


def test_frozen_blocks_compute_in_bfloat16_and_the_rest_stays_float32(trained, run):
    answers, saved = [], []
    for dtype in ("float32", "bfloat16"):
        assert f"frozen blocks in {dtype}" in run(*TRAIN, "--dtype", dtype)[1]
        answers.append(run("--predict", "a good thing", *HERE, "--dtype", dtype)[1].split("\t"))
        saved.append(tensors_of("classifier.safetensors"))
        assert saved[-1].pop("training_texts").dtype == torch.int64
        assert {t.dtype for t in saved[-1].values()} == {torch.float32}
    assert float(answers[0][1]) == pytest.approx(float(answers[1][1]), abs=0.05)
    assert not torch.equal(saved[0]["h.2.mlp.c_fc.weight"], saved[1]["h.2.mlp.c_fc.weight"])


# 4. Evaluation ------------------------------------------------------------------------------------


def test_the_report_shows_wilsons_interval_precision_recall_f1_and_what_was_confused(capsys):
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert g.report("test", probs, torch.tensor([0, 0, 1, 1]), ["ham", "spam"]) == [1, 1, 1, 0]
    out = capsys.readouterr().out.split("\n")
    loss = -sum(map(math.log, (0.9, 0.8, 0.7, 0.4))) / 4
    expected = "test      accuracy 75.00% (95% interval 30.1% to 95.4%, 4 texts), macro F1 73.3%"
    assert out[0] == f"{expected}, loss {loss:.3f}"
    assert out[2].split() == ["ham", "66.7%", "100.0%", "80.0%", "2", "2", "0"]
    assert out[3].split() == ["spam", "100.0%", "50.0%", "66.7%", "2", "1", "1"]
    assert g.interval(0.0, 2) == pytest.approx((0, 0.6576), abs=1e-4)
    assert g.interval(1.0, 300) == pytest.approx((0.9874, 1), abs=1e-4)


def test_the_baselines_are_the_commonest_label_and_a_bag_of_words():
    train = ["cheap prize", "cheap visit", "dear prize", "dear visit"] * 5
    texts = {"train": train, "test": ["dear me", "cheap!", "prize cheap", "unknown cheap cheap"]}
    true = {"train": [0, 0, 1, 1] * 5, "test": [1, 0, 0, 0]}
    found = g.baselines(texts, true, 2)
    assert found["commonest label"].tolist() == [0, 1, 1, 1]
    assert found["bag of words"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(6, 0, "above"), (5, 0, "not"), (14, 6, "not"), (24, 6, "above"), (3, 13, "below")],
)
def test_the_verdict_is_mcnemars_test_of_the_texts_that_only_one_gets_right(ours, theirs, verdict):
    both = torch.ones(50).double()
    right = torch.cat([both, torch.tensor([1.0] * ours + [0.0] * theirs)])
    bag = torch.cat([both, torch.tensor([0.0] * ours + [1.0] * theirs)])
    line = g.verdict(right, {"commonest label": bag * 0, "bag of words": bag})
    assert re.match(rf"{verdict}( distinguishable from)? the bag of words \(", line)
    assert line.endswith(f"only this model gets {ours} texts right, only the baseline {theirs}")


# 5. Pretrained weights ----------------------------------------------------------------------------


def test_prefixes_masks_a_tied_head_and_half_precision_in_a_checkpoint_change_nothing(here):
    plain = {name: t.half() for name, t in gpt2_file().items()}
    odd = {f"transformer.{name}": t for name, t in plain.items()}
    for i in range(3):
        odd[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        odd[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor([-1e4])
    odd["lm_head.weight"] = odd["transformer.wte.weight"]
    config, weights = g.read_checkpoint(write_checkpoint("odd", odd))
    assert config == TINY
    found = g.build(config, weights).state_dict()
    plain = {name: t.float() for name, t in plain.items()}
    expected = g.build(*g.read_checkpoint(write_checkpoint("plain", plain))).state_dict()
    assert all(torch.equal(t, found[name]) for name, t in expected.items())


def test_random_weights_are_drawn_as_in_the_paper():
    torch.manual_seed(0)
    w = g.build(g.SIZES["gpt2-nano"]).state_dict()
    assert w["wte.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert w["h.1.attn.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert w["h.1.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert w["h.1.mlp.c_fc.bias"].abs().max() == 0
    assert w["ln_f.weight"].min() == w["h.3.ln_2.weight"].min() == 1


@needs(VOCABULARY, g.CACHE / "roberta-dict.txt")
def test_roberta_reads_the_real_ids_of_the_transformers_library(monkeypatch):
    library = pytest.importorskip("transformers", reason="needs the transformers library")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    encoding, table = g.get_tokenizer(50265)
    letters, ids = bytes_to_unicode(), {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for i, number in table.items():
        if i < 50256:
            ids["".join(letters[b] for b in encoding.decode_single_token_bytes(i))] = number
    lines = (VOCABULARY / hashlib.sha1(f"{g.BPE_URL}vocab.bpe".encode()).hexdigest()).read_text()
    merges = [tuple(line.split()) for line in lines.split("\n")[1:-1]]
    theirs = library.RobertaTokenizer(ids | {"<mask>": 50264}, merges)
    flags = argparse.Namespace(max_length=None, pad_to=0, trainable_token_pos=None)
    ours = g.Encoder(g.SIZES["roberta-base"], encoding, table, flags)
    texts = ["You are a winner", "Ünïcode  and £100 cash!!", "a\nb", "don't", "  lead", "42 🎉"]
    if (g.CACHE / "sms.zip").exists():
        texts += read("sms")["text"].tolist()[:500]
    assert ours.tokens(texts) == [theirs(text)["input_ids"] for text in texts]


def test_what_is_written_is_read_again_also_by_the_safetensors_library(here):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7.0), "c": torch.randn(4, 6).t()}
    tensors |= {"d": torch.arange(3), "e": torch.randn(5).half()}
    g.write_safetensors("x", tensors, {"k": "v é"})
    found, metadata = g.read_safetensors("x")
    assert json.loads(metadata["gpt_classify"]) == {"k": "v é"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    library = pytest.importorskip("safetensors.torch", reason="needs the safetensors library")
    assert all(torch.equal(t, tensors[name]) for name, t in library.load_file("x").items())


@contextlib.contextmanager
def server(body, announced=0, status=200, hangs=0):
    """A web server on 127.0.0.1 that always answers the same. Yields its address, and a list of
    the paths that it is asked for. `announced`: bytes that it promises and does not send."""
    asked = []
    head = f"HTTP/1.0 {status} -\r\nContent-Length: {len(body) + announced}\r\n\r\n".encode()

    def answer():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                asked.append(connection.recv(65536).split()[1].decode())
                connection.sendall(head + body)
                time.sleep(hangs)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked


@pytest.fixture
def hub(here, monkeypatch):
    """Makes gpt2-small and roberta-base tiny; returns the former's file, whose sha256 is known."""
    monkeypatch.setitem(g.SIZES, "gpt2-small", TINY)
    monkeypatch.setitem(g.SIZES, "roberta-base", TINY_ROBERTA)
    body = write_checkpoint("served", gpt2_file()).read_bytes()
    monkeypatch.setattr(g, "GPT2_SHA256", hashlib.sha256(body).hexdigest())
    os.remove("served")
    return body


def test_weights_are_downloaded_once_and_only_what_was_trained_is_saved(run, monkeypatch, hub):
    write_texts("texts.csv")
    with server(hub) as (address, paths):
        monkeypatch.setenv("HF_ENDPOINT", address + "/")
        assert run("--train", "--data", "texts.csv", *HERE)[0] == 0
        status, out, _ = run("--predict", "a good thing")
    assert (status, out.split("\t")[2]) == (0, "a good thing\n")
    assert paths == ["/openai-community/gpt2/resolve/main/model.safetensors"]
    assert os.listdir(g.CACHE) == ["gpt2-small.safetensors"]
    names = "|".join(tensors_of("classifier.safetensors").keys() - {"training_texts"})
    assert re.fullmatch(r"((head|ln_f|h\.2\.[\w.]+)\.(weight|bias)\|?)+", names)


def test_roberta_is_trained_saved_and_used_like_gpt2(run, monkeypatch, hub):
    write_texts("texts.csv")
    train = ["--train", "--data", "texts.csv", "--model_size", "roberta-base", *HERE]
    with server(write_checkpoint("r", roberta_file()).read_bytes()) as (address, paths):
        monkeypatch.setenv("HF_ENDPOINT", address)
        status, out, err = run(*train, "--learning_rate", 1e-3)
        assert (status, err, "verdict" in out) == (0, "", True)
    assert paths == ["/FacebookAI/roberta-base/resolve/main/model.safetensors"]
    status, out, _ = run("--predict", "thing number 77 is poor", *HERE)
    assert (status, out.split("\t")[2]) == (0, "thing number 77 is poor\n")
    assert "--trace needs a causal model" in run("--trace", "x")[2]
    assert "--generate needs a causal model" in run("--generate", "x", *train[3:5])[2]
    assert run(*train, "--weights", "r", "--trainable_layers", "lora", "--num_epochs", 1)[0] == 0
    assert "r is not gpt2-small" in run(*train, "--weights", "r", "--model_size", "gpt2-small")[2]


HARM = {  # what the server does, and what the error says
    "cut": ({"announced": 1}, "invalid hash value"),
    "corrupt": ({}, "invalid hash value"),
    "absent": ({"status": 404}, "HTTP Error 404"),
    "hanging": ({"announced": 1, "hangs": 3}, "timed out"),
    "refused": (None, "Connection refused"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_download_that_fails_says_what_helps_and_leaves_nothing(run, monkeypatch, hub, harm):
    timeout, (how, reason) = socket.setdefaulttimeout, HARM[harm]
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: timeout(0.5))
    with contextlib.ExitStack() as stack:
        address = "http://127.0.0.1:9"
        if how is not None:
            body = hub[:-1] + bytes([hub[-1] ^ 1])
            address, _ = stack.enter_context(server(body, **how))
        monkeypatch.setenv("HF_ENDPOINT", address)
        status, _, err = run("--train")
    timeout(None)
    assert (status, err.count("\n"), reason in err) == (2, 1, True), err
    assert err.startswith(f"error: could not download {address}/openai-community/gpt2/")
    assert "name a file with --weights" in err
    assert "--offline" in err
    assert os.listdir(g.CACHE) == []


# 6. Data ------------------------------------------------------------------------------------------


def read(data):
    return g.read_data(g.parse(["--train", "--data", str(data)]))


def split(data, *flags):
    args = g.parse(["--train", "--data", str(data), *flags])
    return g.split_data(g.read_data(args), args)


@needs(g.CACHE / "sms.zip")
def test_the_real_messages_are_balanced_and_split_as_in_the_article(capsys):
    frame = read("sms")
    assert frame["label"].value_counts().to_dict() == {"ham": 4827, "spam": 747}
    assert frame["text"].str.startswith('"').any()  # a quotation mark is an ordinary character
    parts, labels = split("sms")
    assert labels == ["ham", "spam"]
    assert [len(t) for t in parts.values()] == [1045, 149, 300]
    # The article's own lines of pandas:
    spam = frame[frame["label"] == "spam"]
    ham = frame[frame["label"] == "ham"].sample(len(spam), random_state=123)
    expected = pd.concat([ham, spam]).sample(frac=1, random_state=123)
    assert pd.concat(parts.values())["text"].tolist() == expected["text"].tolist()
    assert "36 of the 300 test texts also occur in training" in capsys.readouterr().out
    texts = {part: t["text"].tolist() for part, t in parts.items()}
    true = {part: list(map(labels.index, t["label"])) for part, t in parts.items()}
    found = [right.mean().item() for right in g.baselines(texts, true, 2).values()]
    assert found == pytest.approx([0.497, 0.957], abs=0.005)


def test_archives_are_read_without_unpacking_them_and_the_reviews_keep_their_test_half(here):
    g.CACHE.mkdir()
    with zipfile.ZipFile(g.CACHE / "sms.zip", "w") as archive:
        archive.writestr("../../outside", "harm")
        archive.writestr("SMSSpamCollection", 'ham\tsay "hi\nspam\twin "now\n')
    assert read("sms").to_numpy().tolist() == [["ham", 'say "hi'], ["spam", 'win "now']]
    pairs = [(part, label) for part in ("train", "test") for label in ("pos", "neg")]
    names = [f"aclImdb/{part}/{label}/{n}_7.txt" for part, label in pairs for n in range(20)]
    with tarfile.open(g.CACHE / "imdb.tar.gz", "w:gz") as archive:
        for name in [*names, "/etc/harm", "aclImdb/train/unsup/0_0.txt", "aclImdb/README"]:
            raw, info = f"a film of {name}".encode(), tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    parts, labels = split("imdb")
    assert (labels, [len(t) for t in parts.values()]) == (["neg", "pos"], [36, 4, 40])
    assert [t["text"].str.contains("/test/").mean() for t in parts.values()] == [0, 0, 1]
    assert os.listdir() == []


def test_the_standard_library_gives_two_kinds_of_text_and_always_the_same():
    frame = read("stdlib")
    assert frame.equals(read("stdlib"))
    assert frame["label"].value_counts().to_dict() == {"code": 1200, "prose": 1200}
    assert not frame["text"].duplicated().any()
    assert frame["text"].str.len().between(30, 200).all()


TABLES = {  # file: content, texts and labels
    "case.csv": (b"ID,Label,TEXT\n1,a,hello\n", "hello a"),
    "mark.csv": (b"\xef\xbb\xbftext,label\r\nhello,a\r\n", "hello a"),
    "blank.csv": (b"text,label\n\nhello,a\n\n", "hello a"),
    "tabs.tsv": (b"label\ttext\na\thello\n", "hello a"),
    "lone.jsonl": (b'{"text": "\\ud800", "label": "a"}', "\ud800 a"),
    "json.jsonl": (b'{"text": "hello", "label": 7}\n\n', "hello 7"),
    "mark.jsonl": (b'\xef\xbb\xbf{"text": "hello", "label": "a"}', "hello a"),
    "missing.csv": (b"text,label\nNA,007\nnull,None\n", "NA 007 null None"),
    "quotes.csv": (b'text,label\n"two\nlines, ""quoted""",1\n', 'two\nlines, "quoted" 1'),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind_are_read_and_their_cells_stay_as_they_are(here, name):
    content, cells = TABLES[name]
    Path(name).write_bytes(content)
    assert " ".join(read(name).to_numpy().flatten()) == cells


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_a_folder_keeps_its_own_split(here, name):
    for part, n in (("train", 20), (name, 4), ("test", 6)):
        write_texts(f"{part}.csv", n)
    assert [len(t) for t in split(here)[0].values()] == [20, 4, 6]


def test_a_table_is_split_within_each_label_and_integer_labels_are_numbers_in_order(here):
    rows = [json.dumps({"text": f"text {i}", "label": 10 if i < 10 else 9}) for i in range(200)]
    Path("t.jsonl").write_text("\n".join(rows))
    parts, labels = split("t.jsonl")
    counts = [table["label"].value_counts().to_dict() for table in parts.values()]
    assert counts == [{"9": 133, "10": 7}, {"9": 19, "10": 1}, {"9": 38, "10": 2}]
    assert labels == ["9", "10"]
    assert [len(t) for t in split("t.jsonl", "--balance")[0].values()] == [14, 2, 4]


def test_repeats_and_rows_without_text_or_label_are_counted_and_left_out(here, capsys):
    Path("t.csv").write_text("text,label\n" + "same,a\nother,b\n" * 20 + "third,a\nfourth,b\n" * 20)
    split("t.csv")
    assert "16 of the 16 test texts also occur in training" in capsys.readouterr().out
    with pytest.raises(g.Fault, match="4 texts with 2 labels leave none for"):
        split("t.csv", "--dedupe")
    write_texts("t.csv", 30)
    with open("t.csv", "a") as file:
        file.write(",good\n   ,bad\nlabelless,\nshort\n")
    assert sum(map(len, split("t.csv")[0].values())) == 30
    assert "4 rows without text or label are left out" in capsys.readouterr().out


# 7. A run from beginning to end -------------------------------------------------------------------


def test_training_reports_saves_and_suggests_a_command_that_works(trained, run):
    lines = trained.split("\n")
    sizes = "42 train, 6 validation, 12 test"
    assert lines[0] == f"data      texts.csv: 60 texts (30 good, 30 poor): {sizes}"
    assert lines[1] == "baseline  always the commonest label 50.0%; bag of words 100.0% (test)"
    model = "checkpoint, gpt2.safetensors, 0.6M parameters, 0.20M trained (last_block)"
    assert lines[2] == f"model     {model}; frozen blocks in float32"
    assert lines[3].startswith("frozen    2 of 3 blocks, once for all 60 texts")
    assert lines[8].startswith("epoch 5/5 loss")
    assert "saved     classifier.safetensors (seed 123, " in trained
    assert sorted(os.listdir()) == ["classifier.safetensors", "gpt2.safetensors", "texts.csv"]
    flags, text = trained.split(" --classifier ")[1].strip().split(" --predict ")
    assert run("--classifier", flags, "--predict", text.strip("'"))[0] == 0


def losses(out):
    return [line.split()[3] for line in out.split("\n") if line.startswith("epoch")]


def test_the_same_flags_give_the_same_file_and_several_seeds_save_the_first(trained, run):
    before = Path("classifier.safetensors").read_bytes()
    run(*TRAIN)
    assert Path("classifier.safetensors").read_bytes() == before
    alone = losses(run(*TRAIN, "--seed", 7)[1])
    assert Path("classifier.safetensors").read_bytes() != before
    status, out, _ = run(*TRAIN, "--seed", 123, 7)
    assert (status, out.count("once for all")) == (0, 1)
    assert ("seed 123 " in out, "seed 7 " in out, "(seed 123, " in out) == (True, True, True)
    assert "standard deviation" in out
    assert losses(out) == losses(trained) + alone
    assert losses(trained) != alone
    random_weights = ["--model_size", "gpt2-nano", "--seed", 1, 2, "--num_epochs", 1, *HERE]
    out = run("--train", "--data", "texts.csv", *random_weights)[1]
    assert out.count("once for all") == 2  # other weights have other features


def test_the_log_and_the_curves_hold_every_epoch(trained, run):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert run(*TRAIN, "--log", "log.csv", "--plot", "curves.png")[0] == 0
    log = pd.read_csv("log.csv")
    assert log["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert log["examples_seen"].tolist() == [42, 84, 126, 168, 210]
    assert log[["train_loss", "validation_loss", "seconds"]].gt(0).all(axis=None)
    assert log[["train_accuracy", "validation_accuracy"]].stack().between(0, 1).all()
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


def test_all_nineteen_rows_run_and_their_results_are_one_table(run):
    write_texts("texts.csv", 40)
    flags = ["--data", "texts.csv", "--model_size", "gpt2-nano", "--weights", "random", *HERE]
    status, out, _ = run("--train", "--num_epochs", 1, *flags, "--experiment", *range(1, 20))
    assert (status, os.listdir()) == (0, ["texts.csv"])
    assert (
        "(--pad_to longest --lr_schedule constant --trainable_layers all --train --num_epochs"
        in out
    )
    rows = re.findall(r"^ +(\d+) .*? 0\.\d{4} +([\d.]+) ", out.split("\ntable ")[1], re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 20))
    size = [float(trained) for _, trained in rows]
    assert size[2] == pytest.approx((2 * 128 + 2) / 1e6, abs=1e-4)
    assert size[2] < size[0] < size[3] < size[4] == size[8]
    assert size[10] == pytest.approx((258 + 4 * 16 * (8 * 128 + 2 * 5 * 128)) / 1e6, abs=1e-4)


def test_a_series_goes_on_after_a_row_that_cannot_run(trained, run):
    status, out, err = run(*TRAIN, "--experiment", 18, 6, 16)
    assert (status, "error: row 6: gpt2.safetensors is not gpt2-medium" in err) == (2, True)
    assert re.findall(r"^ +(\d+) ", out.split("table ")[1], re.MULTILINE) == ["18", "16"]


LONG = "--train --data long.csv --model_size gpt2-nano --trainable_layers last_two_blocks"
LONG = [*LONG.split(), *HERE]


def start_and_read_until(word, *argv):
    """Starts the command; returns its process once it has printed a line with that start."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, SCRIPT, *argv], **pipes)
    for line in process.stdout:
        if line.startswith(word):
            break
    return process


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_file(here):
    """GPT_CLASSIFY_KILLS=24 kills it more often than the default 3 times."""
    write_texts("long.csv", 600)
    assert command(*LONG).returncode == 0
    expected = Path("classifier.safetensors").read_bytes()
    os.remove("classifier.safetensors")
    kills, draw = int(os.environ.get("GPT_CLASSIFY_KILLS", "3")), random.Random(0)
    words = ["baseline", "model", "frozen", "epoch 1", "epoch 2", "epoch 4", "epoch 5"]
    unfinished = Path("classifier.safetensors.resume")
    for n in range(kills):
        resume = ["--resume"] if unfinished.exists() else []
        process = start_and_read_until(words[(n * 3 + 3) % len(words)], *LONG, *resume)
        time.sleep(draw.choice([0, 0.01, 0.05, draw.random()]))
        process.kill()
        process.communicate()
        if unfinished.exists():
            g.read_safetensors(unfinished)  # complete, at any moment
        elif process.returncode == 0:  # it was finished already: once more from the beginning
            os.remove("classifier.safetensors")
    result = command(*LONG, *["--resume"] * unfinished.exists())
    assert result.returncode == 0, result.stderr
    assert Path("classifier.safetensors").read_bytes() == expected
    assert sorted(os.listdir()) == ["classifier.safetensors", "long.csv"]


def interrupted(run, monkeypatch, epoch, *flags):
    """A run in this process that is interrupted after that many epochs."""
    real = g.write_safetensors

    def write(path, tensors, info):
        real(path, tensors, info)
        if info.get("epoch") == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(g, "write_safetensors", write)
        return run(*TRAIN, *flags)


@pytest.mark.parametrize("flags", ["", "--seed 5 6", "--trainable_layers lora", "--experiment 16"])
def test_resuming_goes_on_to_the_same_file_and_log(trained, run, monkeypatch, flags):
    flags = flags.split()
    run(*TRAIN, *flags, "--log", "expected.csv")
    expected = Path("classifier.safetensors").read_bytes()
    status, _, err = interrupted(run, monkeypatch, 3, *flags)
    assert (status, "--resume continues after the last epoch" in err) == (130, True)
    assert "had --batch_size 8, not 3" in run(*TRAIN, *flags, "--resume", "--batch_size", 3)[2]
    status, out, _ = run(*TRAIN, *flags, "--resume", "--log", "log.csv")
    assert (status, "resumed   after epoch 3 of seed" in out) == (0, True)
    assert Path("classifier.safetensors").read_bytes() == expected
    logs = [pd.read_csv(name).drop(columns="seconds") for name in ("log.csv", "expected.csv")]
    assert logs[0].equals(logs[1])
    assert not Path("classifier.safetensors.resume").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_continue(here, number):
    write_texts("long.csv", 600)
    process = start_and_read_until("epoch 1", *LONG)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    how = "stopped: the same command with --resume continues after the last epoch"
    assert (process.returncode, err.strip()) == (130, how)


def test_a_full_disk_is_a_fault_and_leaves_nothing_behind(trained, run):
    resource = pytest.importorskip("resource", reason="needs Linux or macOS")
    before = Path("classifier.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        for name in ("classifier.safetensors", "new"):
            status, _, err = run(*TRAIN, "--classifier", name)
            assert (status, err.count("\n"), "File too large" in err) == (2, 1, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir()) == ["classifier.safetensors", "gpt2.safetensors", "texts.csv"]
    assert Path("classifier.safetensors").read_bytes() == before


@pytest.mark.parametrize("flags", ["", "--trainable_layers all --batch_size 1"])
def test_two_processes_learn_what_one_does(trained, run, flags):
    flags = [*TRAIN, *flags.split()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = [*torchrun, "--", SCRIPT, *flags, "--classifier", "two", "--log", "two.csv"]
    result = subprocess.run(two, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("data ") == 1  # one of the two talks
    assert run(*flags, "--classifier", "one", "--log", "one.csv")[0] == 0
    logs = [pd.read_csv(name).drop(columns="seconds") for name in ("one.csv", "two.csv")]
    pd.testing.assert_frame_equal(*logs, atol=1e-3)
    assert_same(tensors_of("two"), tensors_of("one"), 1e-4)


# 8. Using a classifier ----------------------------------------------------------------------------

LIKE = [
    "--trainable_layers last_block",
    "--trainable_layers all",
    "--trainable_layers lora --lora_rank 4",
    "--pad_to longest",
    "--disable_causal_mask --trainable_token_pos mean",
    "--weights random --model_size gpt2-nano",
]


@pytest.mark.parametrize("flags", LIKE)
def test_a_saved_classifier_predicts_as_it_did_before_saving(trained, run, monkeypatch, flags):
    seen, real, checkpoint = [], g.probabilities, Path("gpt2.safetensors").read_bytes()
    monkeypatch.setattr(g, "probabilities", lambda *args: seen.append(real(*args)) or seen[-1])
    assert run(*TRAIN, *flags.split())[0] == 0
    before = seen[-1]  # of the test texts, the last thing that training looks at
    split("texts.csv")[0]["test"].to_csv("test.csv", index=False)
    assert run("--evaluate", "--data", "test.csv", *HERE)[0] == 0
    torch.testing.assert_close(seen[-1], before, atol=1e-5, rtol=0)
    assert Path("gpt2.safetensors").read_bytes() == checkpoint  # training works on a copy


def test_prediction_prints_label_probability_and_text(trained, run):
    texts = ["thing number 77 is good", "thing number 88 is poor", " ", ""]
    status, out, _ = run("--predict", *texts)
    rows = [line.split("\t") for line in out.rstrip("\n").split("\n")]
    assert (status, [row[0] for row in rows]) == (0, ["good", "poor", "", ""])
    assert all(0.5 <= float(row[1]) <= 1 for row in rows[:2])
    assert [row[2] for row in rows] == texts


@pytest.mark.parametrize("argv", [["--predict", "-"], ["--predict"]])
def test_lines_of_standard_input_are_predicted_as_they_come(trained, argv):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, SCRIPT, *argv], **pipes)
    for text in (b"this is a good thing\n", b"\xff not utf-8\r\n", b"\n"):
        process.stdin.write(text)
        process.stdin.flush()
        assert process.stdout.readline().count(b"\t") == 2  # before the next text is there
    out, _ = process.communicate(b"the last, bad", timeout=60)
    assert (process.returncode, out.endswith(b"the last, bad\n")) == (0, True)


def test_a_predicted_file_has_all_rows_and_columns_in_order_whatever_the_rows_length(trained, run):
    rows = [[str(i), f"thing {i} is {i % 3}", ("a\rb", 'x, "y"\nz')[i % 2]] for i in range(1500)]
    rows[7][1], rows[8][1] = "", "good " * 20_000
    with open("in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "TEXT", "note"], *rows])
    found = []
    for budget in (1, 5000):
        status, out, err = run("--predict_file", "in.csv", "--tokens_per_row", budget, *HERE)
        assert (status, err) == (0, "note: cut to 64 tokens: 1 texts\n")
        found.append(list(csv.reader(io.StringIO(out, newline=""))))
    assert found[0][0] == ["id", "TEXT", "note", "label", "probability"]
    assert [row[:3] for row in found[0][1:]] == rows
    assert found[0][8][3:] == ["", ""]
    for a, b in zip(found[0][1:], found[1][1:]):
        assert float(a[4] or 0) == pytest.approx(float(b[4] or 0), abs=2e-4)


PREDICTED = {  # file: header of the output, its beginning, rows, and a last one that is a fault
    "in.tsv": ("text,label,predicted_label,probability", "text\tlabel\n", "good\tb\n", "a\tb\tc\n"),
    "in.csv": ("id,text,label,probability", "id,text\n", "1,good\n", "1,one,too many\n"),
    "in.jsonl": ("text,n,label,probability", "", '{"text": "good", "n": 1.5}\n', '{"id": 3}\n'),
    "IN.JSONL": ("text,label,probability", "", '{"text": "good"}\n', "3]\n"),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_tables_are_predicted_a_thousand_rows_at_a_time(trained, run, monkeypatch, name):
    sizes, real = [], g.Classifier.answers
    monkeypatch.setattr(g.Classifier, "answers", lambda c, t: sizes.append(len(t)) or real(c, t))
    header, start, row, fault = PREDICTED[name]
    Path(name).write_text(start + row * 2456)
    status, out, _ = run("--predict_file", name)
    assert (status, out.count("\n"), sizes) == (0, 2457, [1000, 1000, 456])
    assert out.split("\n")[0].replace('"', "") == header  # no name twice
    with open(name, "a") as file:  # a fault in the last thousand keeps the ones before
        file.write(fault)
    status, out, err = run("--predict_file", name)
    assert (status, out.count("\n"), err.count("\n")) == (2, 2001, 1), err


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_trace_tells_what_a_text_that_ends_there_gets(trained, run, monkeypatch, pool):
    run(*TRAIN, "--trainable_token_pos", pool)
    text = "this is a good thing"
    rows = [line.split() for line in run("--trace", text, *HERE)[1].strip("\n").split("\n")]
    assert len(rows) == len(text)
    _, out, _ = run("--predict", *(text[: i + 1] for i in range(len(text))), *HERE)
    for row, line in zip(rows, out.strip("\n").split("\n")):
        label, p, _ = line.split("\t")
        assert (row[0], float(row[1][:-1]) / 100) == (label, pytest.approx(float(p), abs=1e-3))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("--trace", text)[1].count("\x1b[48;2;") == len(text)


def test_evaluation_leaves_out_texts_of_training_and_lists_mistakes(trained, run):
    with open("texts.csv", "a") as file:
        file.write("a new one is good,good\n\x1b[31m thing number 1 is good,poor\n")
    _, out, _ = run("--evaluate", "--data", "texts.csv")
    assert out.startswith("data      texts.csv: 20 texts; 42 left out")
    assert "mistakes  1, the most confident first:" in out
    assert re.search(r"poor, classified as good with [\d.]+%: \\x1b\[31m thing number 1", out)
    assert run("--evaluate")[1] == out  # by default, the data of training
    write_texts("texts.csv")
    split("texts.csv")[0]["train"].to_csv("train.csv", index=False)
    assert "has no labeled text that is new" in run("--evaluate", "--data", "train.csv")[2]


def test_terminal_escapes_reach_no_terminal(run, here, monkeypatch):
    write_checkpoint("gpt2.safetensors", gpt2_file())
    write_texts("texts.csv", labels=("go\x1b[31mod", "poor"))
    text = "\x1b]0;title\x07 \x9b31m \u202e good \r\n"
    for argv in (TRAIN, ["--predict", text], ["--trace", text], ["--evaluate"]):
        out = run(*argv)[1]
        assert not set("\x1b\x07\x9b\u202e\r") & set(out), argv
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Path("in.jsonl").write_text(json.dumps({"text": text, "a\x1bb": 1}))
    assert "\x1b" not in run("--predict_file", "in.jsonl")[1]


def test_generation_is_greedy_and_goes_on_past_what_the_model_can_see(run):
    write_checkpoint("w", gpt2_file())
    status, out, _ = run("--generate", "Every effort", "--weights", "w", "--max_new_tokens", 3)
    ids, wte = list(b"Every effort"), gpt2_file()["wte.weight"].double()
    for _ in range(3):
        ids.append(int((wte @ by_the_book(ids)[-1]).argmax()))
    assert (status, out) == (0, g.printable(bytes(ids).decode(errors="replace")) + "\n")
    assert run("--generate", "x" * 60, "--weights", "w", "--max_new_tokens", 10)[0] == 0
    assert "note: random weights" in run("--generate", "x", "--model_size", "gpt2-nano")[2]


def mutated(raw, draw):
    """Some bytes of a file changed, most of them in its header, or the file cut or lengthened."""
    raw, header = bytearray(raw), 8 + int.from_bytes(raw[:8], "little")
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        where = draw.randrange(len(raw) if draw.random() < 0.1 else min(header, len(raw)))
        new = draw.choice([b"9", b"0", b"-", b"[", b"null", b"1e9", b"\0" * 100, b'"', b",", b"}"])
        kind = draw.randrange(5)
        if kind == 0:
            raw[where] = draw.randrange(256)
        elif kind == 1:
            raw = raw[: max(where, 1)] if draw.random() < 0.2 else raw + b"x"
        else:  # replaced, deleted or inserted
            raw[where : where + (0, 1, 1, 7, 1000)[draw.randrange(5)]] = new if kind > 2 else b""
    return bytes(raw)


MUTATED = {
    "gpt2.safetensors": ["--generate", "x", "--max_new_tokens", "1", "--weights", "m"],
    "classifier.safetensors": ["--predict", "a text", "--classifier", "m"],
    "unfinished": [*TRAIN, "--num_epochs", "2", "--resume", "--classifier", "c"],
}


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_files_are_read_or_refused_and_nothing_else(run, monkeypatch, name):
    """GPT_CLASSIFY_MUTATIONS=10000 tries more than the default 60 of each kind."""
    write_checkpoint("gpt2.safetensors", gpt2_file(g.GPTConfig(1, 64, 40, 257)))
    write_texts("texts.csv", 20)
    interrupted(run, monkeypatch, 1, "--num_epochs", 2)
    os.rename("classifier.safetensors.resume", "unfinished")
    assert run(*TRAIN, "--num_epochs", 2)[0] == 0
    raw, draw, refused = Path(name).read_bytes(), random.Random(0), 0
    mutations = int(os.environ.get("GPT_CLASSIFY_MUTATIONS", "60"))
    for _ in range(mutations):
        Path("c.resume" if name == "unfinished" else "m").write_bytes(mutated(raw, draw))
        status, _, err = run(*MUTATED[name])
        assert (status, err[:7], err.count("\n")) in ((0, "", 0), (2, "error: ", 1)), err
        refused += status == 2
    assert refused > mutations / 5


# 9. The command line ------------------------------------------------------------------------------


def test_every_default_is_the_articles_but_the_schedule_and_flags_win_over_offline():
    args = g.parse(["--train"])
    assert (args.trainable_layers, args.num_epochs, args.batch_size) == ("last_block", 5, 8)
    assert (args.learning_rate, args.weight_decay, args.seed) == (5e-5, 0.1, [123])
    assert (args.pad_to, args.lr_schedule, args.data) == (0, "linear", "sms")
    assert g.parse(["--train", "--model_size", "gpt2-small (124M)"]).model_size == "gpt2-small"
    args = g.parse(["--train", "--offline", "--num_epochs", "9"])
    assert (args.data, args.model_size, args.num_epochs) == ("stdlib", "gpt2-nano", 9)


def test_help_fits_on_two_screens(capsys):
    with pytest.raises(SystemExit):
        g.parse(["--help"])
    lines = capsys.readouterr().out.split("\n")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 2 * 40


def test_a_reader_that_goes_away_ends_a_run_silently(trained):
    Path("t.csv").write_text("text\n" + "good\n" * 20_000)
    pipe = f"{sys.executable} {SCRIPT} --predict_file t.csv | head -n 1"
    shell = ["bash", "-c", f"{pipe}; exit ${{PIPESTATUS[0]}}"]
    result = subprocess.run(shell, capture_output=True, text=True, check=False)
    expected = (141, '"text","label","probability"\n', "")
    assert (result.returncode, result.stdout, result.stderr) == expected


# Flags, what the error says, and the content of the files t.csv, t.tsv and t.jsonl.
FAULTS = r"""
| name an action: --train, --predict,
--train --evaluate | not allowed with argument
--trian | unrecognized arguments: --trian: do you mean --train?
--train --colour red | unrecognized arguments: --colour red
--train | could not download http://127.0.0.1:9/openai-community/gpt2/
--train --model_size roberta-base | could not download http://127.0.0.1:9/FacebookAI/roberta-base/
--train --model_size gpt3 | invalid choice: 'gpt3'
--train --weights nowhere | No such file or directory: 'nowhere'
--train --device mps | --device mps does not work on this machine
--train --experiment 3 20 | invalid choice: 20
--train --experiment 3 4 --resume | several rows save nothing
--predict x --offline | --offline goes with --train
--generate x --weights notes | notes is not a complete safetensors file
--generate x --weights t.csv | t.csv is not a complete safetensors file |
--generate x --weights t.csv | 'wte.weight' is missing | \xff\xff\xff\xff\xff\xff\xff\x3f{}
--generate x --weights t.csv | complete safetensors file | \x03\0\0\0\0\0\0\0\xff\xfe\xff
--generate x --weights t.csv | (is it cut short? a | HEAD"shape":[3],"data_offsets":[0,8]}}
--generate x --weights t.csv | (is it cut short? a | HEAD"shape":[4],"data_offsets":[0,16]}}
--generate x --weights t.csv | short? | HEAD"shape":[4294967296,4294967297],"data_offsets":[0,8]}}
--generate x --weights lacking | lacking is not a checkpoint of GPT-2 or RoBERTa ('ln_f.bias' is
--generate x --weights odd | size mismatch for ln_f.bias
--generate x --weights narrow | heads have 64 channels
--generate x --weights classifier.safetensors | is a classifier; --weights takes a checkpoint
--predict x --classifier nowhere | there is no classifier nowhere: train one with --train
--predict x --classifier notes | notes is not a complete safetensors file
--predict x --classifier gpt2.safetensors | gpt2.safetensors is not a classifier of this tool
--predict_file t.csv | t.csv cannot be read as csv |
--evaluate --data t.csv | has the label 'c', which the classifier has not | text,label\nx,c\n
TRAIN nowhere.csv | No such file or directory: 'nowhere.csv'
TRAIN x.pdf | x.pdf is not a table: its name must end in .csv or .tsv or .jsonl
TRAIN t.csv | t.csv cannot be read as csv |
TRAIN t.csv | t.csv has no rows | text,label\n
TRAIN t.csv | t.csv cannot be read as csv in UTF-8 | text,label\n\xe9,a\n
TRAIN t.csv | has the columns 'message', 'kind', not 'text': name yours with | message,kind\nx,a\n
TRAIN t.csv | has the columns 'Text', 'TEXT', 'label', not 'text' | Text,TEXT,label\nx,y,a\n
TRAIN t.csv | in line 4, saw 3 | text,label\nx,a\n\nx,a,b\n
TRAIN t.csv | rows have more cells than its header | text,label\nx,a,b\n
TRAIN t.csv | EOF inside string | text,label\n"x,a\n
TRAIN t.csv | seems to separate cells by ';': save it with ',' | text;label\nx, y;a\n
TRAIN t.csv | seems to separate cells by '\t': name it .tsv | text\tlabel\nx\ta\n
TRAIN t.tsv | seems to separate cells by ',': save it with '\t' | text,label\nx,a\n
TRAIN t.jsonl | t.jsonl cannot be read as jsonl | {"text": "x", "label": "a"}\n[3]\n
TRAIN t.csv | needs at least two labels, not ['a'] | text,label\nx,a\ny,a\n
TRAIN t.csv | 3 texts with 3 labels leave none for validation: 10 of | text,label\nx,a\ny,b\nz,c\n
TRAIN folder | needs one table named test, and has 0
TRAIN unseen | test has the label 'c', training has not
TRAIN texts.csv --trainable_layers lora --lora_rank 0 | --lora_rank 0 is not a number of at least 1
TRAIN texts.csv --trainable_layers lora --lora_rank 129 | exceeds the model's width, 128
TRAIN texts.csv --pad_to -5 | --pad_to -5 is neither a number of tokens nor longest
TRAIN texts.csv --pad_to 65 | this model reads at most 64 tokens
TRAIN texts.csv --learning_rate nan | --learning_rate nan is not a number of at least 0
TRAIN texts.csv --learning_rate 1e30 | try a smaller --learning_rate
TRAIN texts.csv --resume | there is no unfinished run classifier.safetensors.resume
TRAIN texts.csv --plot x.xyz | --plot needs matplotlib
TRAIN texts.csv --log ./folder/../texts.csv | texts.csv is read or written by this run already
TRAIN texts.csv --classifier texts.csv | texts.csv is read or written by this run already
TRAIN texts.csv --classifier gpt2.safetensors | gpt2.safetensors is read or written by this run
TRAIN folder --classifier folder/val.csv | folder/val.csv is read or written by this run
TRAIN texts.csv --log c.resume --classifier c | c.resume is read or written by this run already
TRAIN texts.csv --classifier folder | folder cannot be written
TRAIN texts.csv --log no/where.csv | no/where.csv cannot be written
TRAIN texts.csv --log /dev/null | /dev/null cannot be written
TRAIN texts.csv --classifier notes | notes was not written by this tool, and is not replaced
TRAIN texts.csv --log notes | notes was not written by this tool, and is not replaced
TRAIN texts.csv --log c --classifier c | c is read or written by this run already
"""


@pytest.mark.parametrize("line", FAULTS.strip().split("\n"))
def test_every_fault_is_one_line_status_2_and_leaves_everything_as_it_was(trained, run, here, line):
    flags, message, *content = (part.strip(" ") for part in line.split("|"))
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        raw = "".join(content).encode().decode("unicode_escape").encode("latin1")
        if raw.startswith(b"HEAD"):  # of a safetensors file with 8 bytes of numbers
            raw = raw.replace(b"HEAD", b'{"a":{"dtype":"F32",') + bytes(8)
            raw = struct.pack("<Q", len(raw) - 8) + raw
        Path(name).write_bytes(raw)
    for name in ("folder/train", "folder/val", "unseen/train", "unseen/val", "unseen/test"):
        Path(name).parent.mkdir(exist_ok=True)
        last = "c" if name == "unseen/test" else "b"
        Path(f"{name}.csv").write_text(f"text,label\nx,a\ny,{last}\n")
    Path("notes").write_text("mine")
    Path("x.pdf").touch()
    tensors = gpt2_file() | {"ln_f.bias": torch.zeros(3)}
    write_checkpoint("odd", tensors)
    write_checkpoint("narrow", gpt2_file(g.GPTConfig(1, 60, 8, 257)))
    write_checkpoint("lacking", {n: t for n, t in tensors.items() if n != "ln_f.bias"})
    flags = flags.replace("TRAIN", "--train --weights gpt2.safetensors --data").split()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    status, _, err = run(*flags)
    assert (status, err[:7], err.count("\n"), message in err) == (2, "error: ", 1, True)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
