"""GPT-2 as a text classifier, in one file that is meant to be read from top to bottom.

    pip install -r requirements.txt
    python gpt_classify.py --train                     # finetune GPT-2 to tell spam from ham
    python gpt_classify.py --predict "You are a winner"
    python gpt_classify.py --train --offline           # a try in under a minute, no download

It implements Sebastian Raschka's "Building A GPT-Style LLM Classifier From Scratch"
(https://magazine.sebastianraschka.com/p/building-a-gpt-style-llm-classifier): take pretrained
GPT-2, replace the head that predicts the next of 50,257 tokens by one that predicts a label, and
finetune. Four ideas organise what follows:

    text -encode-> ids (T,) -frozen blocks, ONCE-> features (T, C) -trained top, every epoch-> label

1. A classifier reads ONE place of the transformer's output. Which one, and what can be seen from
   there, is settled when a text becomes an `Example` (section 6), and never asked again.
2. A frozen block gives the same output for the same text for ever, so it runs once (section 7).
3. The last block needs queries only at the places that are read, mostly one a text (section 3).
4. There is no padding, unless --pad_to asks for it: texts lie end to end in one row of tokens,
   and the attention mask keeps each to itself (section 3). So what flows through the model is
   (T, C), without a batch dimension, and no work goes into filling texts up.

The article's seven questions, and where the file answers each (commands: README.md):

    1. Do all layers need training?         make_classifier, section 6
    2. Why read the last token?             TextEncoder, section 6
    3. How does BERT compare?               GPT.mask, section 3
    4. Should the causal mask go?           GPT.mask, section 3
    5. What does a larger model bring?      SIZES, section 2
    6. What does LoRA bring?                LoRALinear, section 6
    7. Padding or none?                     Row, section 3, and TextEncoder, section 6

One message on its way, with GPT-2 small:

    "You are a winner"                  a text
    [1639, 389, 257, 8464]              ids (4,): GPT-2 knows 50,257 pieces of words, "tokens"
    wte + wpe                           (4, 768): a vector for each token and one for its position
    h[0] ... h[11], ln_f                (4, 768): twelve blocks; each adds to these vectors what the
                                        tokens learn from each other, and from themselves
    the last one, [3]                   (1, 768): the only one that has seen the whole message
    head                                (1, 2): a logit for ham and one for spam; softmax makes
                                        probabilities of them, cross-entropy of these the loss:
                                        0.69 (ln 2) for a guess, 0 for certainty that is right

Readers in a hurry can read sections 3, 6 and 7, which hold all of these ideas, and `train` in
section 9, which puts them together; the rest is files, messages and flags.

Shapes stand in comments: T tokens in a row, N texts in it, Q places that are read, C channels,
K labels, H heads. `args` are the flags of section 10, by their names.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import mmap
import os
import re
import shlex
import signal
import socket
import statistics
import sys
import sysconfig
import tarfile
import textwrap
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# pandas is imported where tables are made: --predict "text" starts 0.7 s sooner without it.

# ------------------------------------------------------------------------------------------------
# 1. What a run says
#
# Results on standard output, all else on standard error; and what the user can mend, in one line.


class Fault(Exception):
    """Something the user can mend. main() prints it as one line, `error: ...`, with status 2."""


def printable(text):
    """A text in one line, without what a terminal would take for a command (escape sequences,
    line ends, changes of the writing direction): those are shown as in Python's source."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def process():
    """(rank, world): the number of this process, and how many there are (under torchrun).

    Everywhere below, text i of a list is the work of process i % world.
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(name, text):
    """A line of a run's report, on standard output; of several processes the first one talks."""
    if process()[0] == 0:
        print(f"{name:<9} {text}".rstrip(), flush=True)


def warn(text):
    """Notes and errors, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A line on the terminal with the share that is done and the time left; none in a pipe."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.shown = what, total, 0, 0.0
        self.start = time.perf_counter()
        self.visible = sys.stderr.isatty() and process()[0] == 0

    def add(self, n):
        self.done += n
        now = time.perf_counter()
        if self.visible and (now - self.shown > 0.1 or self.done >= self.total):
            self.shown = now
            left = (now - self.start) / self.done * (self.total - self.done)
            line = f"{self.what}  {self.done / self.total:4.0%}  {left:,.0f} s left"
            line = line if self.done < self.total else ""
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# 2. Sizes
#
# A GPT-2 is described by five numbers. OpenAI published four sizes of one design: only depth and
# width differ, and a head is 64 wide in all of them. nano is ours, for a try on any machine.


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # the longest text, in tokens: there is one learned vector per position
    vocab_size: int = 50257
    n_layer: int = 12  # blocks
    n_head: int = 12
    n_embd: int = 768  # C, the width of everything that flows between the blocks


SIZES = {
    "gpt2-nano": GPTConfig(n_layer=4, n_head=2, n_embd=128),
    "gpt2-small": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1,558M
}


# ------------------------------------------------------------------------------------------------
# 3. The transformer
#
# Batches are commonly made by filling all texts up to the longest. The 1,494 text messages of the
# article's data set have 31 tokens on average and up to 120: filled up to the longest, three
# quarters of what the model reads would be fillers. So texts are laid end to end instead, and each
# token carries the number of its text and its position there:
#
#     text   0 0 0 0 1 1 2 2 2
#     pos    0 1 2 3 0 1 0 1 2
#     read         ^   ^     ^      the place of each text that the classifier reads
#
# Attention is the only thing in a transformer through which tokens see each other, so a mask there
# is all it takes to keep texts apart. A prediction then depends on its text alone, whatever else
# is in the row. (In the article's main recipe it depends on the fillers too, which users of its
# code reported as a bug: issues 566 and 990 of github.com/rasbt/LLMs-from-scratch.)


@dataclasses.dataclass
class Example:
    """One text as the model gets it: see TextEncoder for how `ids` and `read` are chosen."""

    ids: torch.Tensor  # (T,) int64: the tokens that can be seen from the places that are read
    read: range  # those places; more than one means: the mean over them
    label: int = -1
    causal: bool = True  # a token sees only what stands before it
    # Features, once the frozen blocks have run: (T, C); (1, C) where all blocks are frozen, since
    # then all that is ever needed again is the vector that the head gets.
    x: torch.Tensor | None = None
    depth: int = 0  # how many blocks x has been through


@dataclasses.dataclass
class Row:
    """Examples laid end to end. All index tensors are int64, on the model's device."""

    ids: torch.Tensor  # (T,)
    pos: torch.Tensor  # (T,) position of each token in its text, from 0, as if it were alone
    since: torch.Tensor  # (T,) from which position on it is seen: its own; 0 if it is not causal
    text: torch.Tensor  # (T,) number of the text that it belongs to
    read: torch.Tensor  # (Q,) indexes into the row
    owner: torch.Tensor  # (Q,) the text that each of them is read for
    labels: torch.Tensor  # (N,)
    x: torch.Tensor | None  # (T, C) features if the frozen blocks have run; (N, C) if all have
    depth: int

    @classmethod
    def of(cls, examples, device="cpu"):
        """Lays a list of Example (at least one, all of one depth) end to end."""
        lengths = torch.tensor([len(e.ids) for e in examples])
        starts = lengths.cumsum(0) - lengths  # (N,)
        text = torch.repeat_interleave(lengths)  # 0 0 0 0 1 1 2 2 2
        pos = torch.arange(len(text)) - starts[text]  # 0 1 2 3 0 1 0 1 2
        causal = torch.tensor([e.causal for e in examples])
        read = [torch.tensor(e.read) for e in examples]
        owner = torch.repeat_interleave(torch.tensor([len(r) for r in read]))
        cached = examples[0].x is not None
        return cls(
            ids=torch.cat([e.ids for e in examples]).to(device),
            pos=pos.to(device),
            since=(pos * causal[text]).to(device),
            text=text.to(device),
            read=(torch.cat(read) + starts[owner]).to(device),
            owner=owner.to(device),
            labels=torch.tensor([e.label for e in examples], device=device),
            x=torch.cat([e.x for e in examples]).to(device) if cached else None,
            depth=examples[0].depth,
        )


def pack(examples, budget):
    """Splits examples, in order, into lists of at most `budget` tokens; a longer one goes alone.

    Attention costs the square of a row's length and all else its length; short rows, on the other
    hand, keep the processor waiting for weights. 512 took the least on a CPU (README.md).
    """
    row, size = [], 0
    for example in examples:
        if row and size + len(example.ids) > budget:
            yield row
            row, size = [], 0
        row.append(example)
        size += len(example.ids)
    if row:
        yield row


class Linear(nn.Linear):
    """nn.Linear, x (T, in) -> (T, out), that can be taken apart by its outputs: one matrix makes
    queries, keys and values, and the last block wants the queries of a few tokens alone.

    (Slices of the weight would do, but the gradient of each slice is a whole matrix of zeros but
    for the slice: that took 25 of the 54 ms of a step that trains the last block.)
    """

    def split(self, *sizes):
        """Functions x -> outputs: for the first sizes[0] outputs, for the next sizes[1], ..."""
        parts = zip(self.weight.split(sizes), self.bias.split(sizes))
        return [functools.partial(F.linear, weight=weight, bias=bias) for weight, bias in parts]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values in one
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, read):
        """x (T, C), mask (T, T) bool: who sees whom -> (Q, C), what the places `read` gather.

        Each head: softmax(q k^T / sqrt(C / H)) v. A token's query is compared with the keys of all
        tokens that it sees; the better one fits, the more of that token's value it takes. (Products
        of vectors C / H long are about sqrt(C / H) in size; divided by it, they leave the softmax
        room to weigh, instead of picking one.) "Attention Is All You Need", arXiv:1706.03762.
        """
        C = x.shape[1]
        to_q, to_kv = self.c_attn.split(C, 2 * C)
        q = to_q(x[read])  # (Q, C)
        k, v = to_kv(x).split(C, dim=1)  # (T, C) each
        # A head is a slice of the channels: head h of q is q[:, 64 h : 64 h + 64]. A batch
        # dimension of 1 stands in front, since without it torch takes a path that was 7 times
        # slower (a row of 512 tokens on two CPU cores, torch 2.13).
        q, k, v = (
            t.view(1, -1, self.n_head, C // self.n_head).transpose(1, 2)  # (1, H, Q or T, C/H)
            for t in (q, k, v)
        )
        # A row of the mask is a query, a column a key. (The division is done in there, too.)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[read])  # (1, H, Q, C/H)
        return self.c_proj(y.transpose(1, 2).reshape(-1, C))


class MLP(nn.Module):
    """Each token by itself, (T, C) -> (T, C): two thirds of a block's weights.
    GELU in the approximation that GPT-2 was trained with; the exact one gives other logits."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(x), then + MLP(x): a block adds to x, the "residual stream", which flows from
    the embedding to the head. What it adds is made from x brought to one scale (LayerNorm).

    What is needed of the last block is its output at the places that are read, and nothing else.
    So only they ask there (query, projection, MLP), while every token still answers (key, value):
    the same numbers, for a fifth of the multiplications when one token in thirty is read.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, read=slice(None)):  # (T, C) -> (Q, C); by default Q is T
        x = x[read] + self.attn(self.ln_1(x), mask, read)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), without dropout.

    Names are those of the published weights; the matrices are their transposes. `head` maps what
    is read to logits: for the language model it is the token embedding once more (tied); section 6
    puts another there.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Weights come from a file or from random_weights (section 4), so nothing is drawn here:
        # nn.Embedding(V, C) would, and for that imports torch's compiler, which takes 2 s.
        V, T, C = config.vocab_size, config.block_size, config.n_embd
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)  # what it is
        self.wpe = nn.Embedding.from_pretrained(torch.empty(T, C), freeze=False)  # where it stands
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.wte.weight
        self.dtype = torch.float32  # of matrix products; bfloat16 is asked for by --dtype

    def mask(self, row):
        """(T, T) bool: token i sees token j if both are of one text and j is not after i.

        BERT has no second condition, and reads the first token. To drop it from GPT-2, which learnt
        with it, gave the article 95.33% instead of 95.00% (row 17 of its table, section 9); here
        TextEncoder does so, by examples whose tokens are seen from position 0 on.
        """
        return (row.text[:, None] == row.text) & (row.pos[:, None] >= row.since)

    def hidden(self, row, stop=None):
        """Runs blocks row.depth to stop, and returns x (T, C); or, after the last block, what is
        read of each text, normalised: (N, C). Features that are (N, C) already come back as such.
        """
        n_layer = self.config.n_layer
        stop = n_layer if stop is None else stop
        x = self.wte(row.ids) + self.wpe(row.pos) if row.x is None else row.x
        if row.depth == n_layer:
            return x
        mask = self.mask(row)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for i in range(row.depth, stop):
                x = self.h[i](x, mask, row.read if i == n_layer - 1 else slice(None))
        if stop < n_layer:
            return x
        # Mean over the places of a text; mostly there is one, and this changes nothing.
        total = x.new_zeros(len(row.labels), x.shape[1]).index_add(0, row.owner, self.ln_f(x))
        return total / torch.bincount(row.owner, minlength=len(row.labels))[:, None]

    def forward(self, row):  # -> (N, K), or as a language model (N, vocab_size)
        return self.head(self.hidden(row))


# ------------------------------------------------------------------------------------------------
# 4. Pretrained weights
#
# The published weights lie on the Hugging Face hub as safetensors files: 8 bytes that give the
# length of a header, the header (JSON: name, type, shape and place of each tensor), then nothing
# but the numbers. So reading is a matter of looking at the right bytes, and mapping the file into
# memory instead of reading it means that nothing is copied: 548 MB are "loaded" in milliseconds,
# and come from disk when they are first used. https://huggingface.co/docs/safetensors
#
# A file may come from a stranger. It holds data and no code, and every number of the header is
# checked before it is used. Our own classifiers (section 8) are written in the same format, so
# that one careful reader serves both.

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 1 << 20  # bytes; GPT-2 XL's takes a fifteenth of that


def read_safetensors(path):
    """({name: tensor}, {str: str}): a file's tensors, mapped from it into memory, and metadata.

    Raises Fault if the file is not whole and sound: the tensors must cover its data exactly.
    """

    def check(ok, what):
        if not ok:
            raise Fault(f"{path} is no sound safetensors file: {what}")

    def unique(pairs):
        check(len(dict(pairs)) == len(pairs), "a name stands twice in its header")
        return dict(pairs)

    def sizes(numbers, most):  # a list of a few numbers, none larger than the file
        few = isinstance(numbers, list) and len(numbers) <= most
        return few and all(type(n) is int and 0 <= n <= len(data) for n in numbers)

    check(os.path.getsize(path) >= 8, "it is shorter than 8 bytes")
    with open(path, "rb") as file:  # ACCESS_COPY: who writes to a tensor writes to memory only
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    check(start <= min(len(data), 8 + MAX_HEADER), "its header is longer than can be")
    try:
        header = json.loads(data[8:start].decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        header = None
    check(isinstance(header, dict), "its header is not JSON")
    metadata = header.pop("__metadata__", {})
    check(isinstance(metadata, dict), "its metadata are not JSON")
    tensors, places = {}, []
    for name, entry in header.items():
        check(isinstance(entry, dict), f"{name!r} is not described")
        dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        check(isinstance(dtype, str) and dtype in DTYPES, f"the type of {name!r} is unknown")
        check(sizes(shape, 8), f"the shape of {name!r} cannot be")
        check(sizes(place, 2) and len(place) == 2, f"{name!r} lies outside of it; is it cut short?")
        count, dtype = math.prod(shape), DTYPES[dtype]
        check(place[1] - place[0] == count * dtype.itemsize, f"{name!r} does not fit its shape")
        check(start + place[1] <= len(data), f"it is cut short: {name!r} lies past its end")
        places.append(place)
        if count:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + place[0])
        tensors[name] = flat.view(shape) if count else torch.empty(shape, dtype=dtype)
    places = [[0, 0], *sorted(places), [len(data) - start] * 2]  # between where data begin and end
    whole = all(a[1] == b[0] for a, b in itertools.pairwise(places))
    check(whole, "its tensors overlap or leave gaps")
    return tensors, metadata


@contextlib.contextmanager
def replacing(path):
    """A file, open for writing bytes, that takes the place of `path` at the end, whole or not at
    all: temporary name, flush, fsync, rename. Whatever stops us, the old file is still there."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(path, tensors, metadata):
    """Writes {name: tensor} and {str: str}; the same contents give the same bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        entry = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        header[name] = entry
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


HUB = "https://huggingface.co"  # HF_ENDPOINT names a mirror, as everywhere in that ecosystem
GPT2_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
TIMEOUT = 30  # seconds without a byte, after which a server is given up


def download(url, target, sha256=None, check=lambda path: None):
    """Fetches url to `target`, unless that is there, and returns its path. Raises Fault.

    Nothing gets the target's name that is not whole: the bytes go to a name of their own (so two
    processes may fetch the same file at once), are checked by sha256 and by `check`, and then
    renamed. torch.hub does the transfer, and honours proxies.
    """
    target = Path(target)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{target}.{os.getpid()}.part")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, part, sha256, progress=sys.stderr.isatty())
        check(part)
        os.replace(part, target)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException, Fault) as error:
        reason = str(error).replace(str(part), "what came") or type(error).__name__
        mend = f"try again, or put the file at {target} by hand (--train --offline needs none)"
        raise Fault(f"could not download {url}: {reason}; {mend}") from None
    finally:
        socket.setdefaulttimeout(before)
        part.unlink(missing_ok=True)
    return target


def config_of(tensors):
    """Reads a GPTConfig off the shapes of {name: tensor}. Raises Fault if they are no GPT-2's."""
    try:
        (vocab_size, C), (block_size, _) = tensors["wte.weight"].shape, tensors["wpe.weight"].shape
    except (KeyError, ValueError):
        raise Fault("these are no GPT-2's weights: wte.weight and wpe.weight are missing") from None
    n_layer = 0
    while (name := f"h.{n_layer}.attn.c_attn.weight") in tensors:
        if tensors[name].numel() != 3 * C * C:
            raise Fault(f"the tensor {name} does not fit a width of {C}")
        n_layer += 1
    if C == 0 or C % 64 or n_layer == 0:
        raise Fault(f"no GPT-2 with heads 64 wide has a width of {C} and {n_layer} blocks")
    return GPTConfig(block_size, vocab_size, n_layer, C // 64, C)


def build_gpt(config, weights):
    """A language model around the weights {name: tensor}, which are used in place. Raises Fault
    unless they are those of a GPT of this config."""
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    used = {}
    for name, like in model.state_dict().items():
        used[name] = t = weights.get("wte.weight" if name == "head.weight" else name)
        if t is None:
            raise Fault(f"the tensor {name} is missing")
        if t.shape != like.shape:
            shapes = f"{tuple(t.shape)} where {tuple(like.shape)} is needed"
            raise Fault(f"the tensor {name} has the shape {shapes}")
    model.load_state_dict(used, assign=True)
    model.head.weight = model.wte.weight  # one parameter again, also when the model is moved
    return model


def read_gpt2(path):
    """(config, weights by GPT's own names, float32) of a published GPT-2 file. Raises Fault.

    The names are already GPT's, but for a prefix in some files; the causal mask is stored among
    the weights, and the tied head in some. What is left to do is a transpose: OpenAI's code
    multiplied x W with W (in, out), nn.Linear stores (out, in). It is a view, and costs nothing.
    """
    tensors, _ = read_safetensors(path)
    weights = {}
    for name, t in tensors.items():
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight":
            matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            weights[name] = (t.t() if matrix and t.dim() == 2 else t).float()
    try:
        config = config_of(weights)
        build_gpt(config, weights)  # for its checks of names and shapes
    except Fault as fault:
        raise Fault(f"{path}: {fault}") from None
    return config, weights


def published_gpt2(size, cache_dir):
    """(config, weights) of a size in SIZES, downloaded where that has not been done."""
    if size == "gpt2-nano":
        raise Fault("there are no pretrained weights for gpt2-nano: use --weights random")
    hub, name = os.environ.get("HF_ENDPOINT", HUB).rstrip("/"), size.removesuffix("-small")
    url = f"{hub}/openai-community/{name}/resolve/main/model.safetensors"
    sha256 = GPT2_SHA256 if size == "gpt2-small" else None  # known for that one alone
    path = download(url, Path(cache_dir) / f"{size}.safetensors", sha256, check=read_gpt2)
    config, weights = read_gpt2(path)
    if config != SIZES[size]:
        raise Fault(f"{path} is another GPT-2 than {size}: delete it to download it again")
    return config, weights


def random_weights(config):
    """Weights as the GPT-2 paper draws them: normal(0, 0.02), but c_proj, whose outputs are added
    to the residual stream 2 n_layer times, by 1 / sqrt(2 n_layer) less. From torch's generator."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).named_parameters()}  # the head is wte
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, t in weights.items():
        if name.endswith((".ln_1.weight", ".ln_2.weight")) or name == "ln_f.weight":
            t.fill_(1)
        elif name.endswith("weight"):
            t.normal_(0, 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
    return weights


@torch.no_grad()
def generate(model, ids, n, causal=True):
    """Yields n tokens that continue the list `ids`, the likeliest one each time (greedy).

    The check that weights and mapping are right: a GPT-2 with one matrix the wrong way round
    still runs, and still gives numbers, but it speaks no English. (Each step computes the whole
    text again. Who generates much keeps the keys and values of the tokens before.)
    """
    for _ in range(n):
        ids = ids[-model.config.block_size :]
        last = range(len(ids) - 1, len(ids))
        example = Example(torch.tensor(ids), read=last, causal=causal)
        token = int(model(Row.of([example], model.wte.weight.device)).argmax())
        yield token
        ids = [*ids, token]


# ------------------------------------------------------------------------------------------------
# 5. Data
#
# Everything becomes a table with the columns text and label, in three parts: train, validation
# and test. The article's data are the SMS Spam Collection, 5,574 messages, balanced to 747 of
# each label, shuffled with seed 123, and split 70 / 10 / 20.
#
# pandas reads the tables, a thousand rows at a time, so that a file of any length can be predicted
# in constant memory. It is told to leave the cells as they are: by default it would take the
# message "NA" for a missing one, and "007" for a seven.

SMS_URL = "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip"
SMS_SHA256 = "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3"
IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
KINDS = (".csv", ".tsv", ".jsonl", ".txt")
PARTS = {"train": ["train"], "validation": ["validation", "val", "valid"], "test": ["test"]}
MAX_UNPACKED = 1 << 30  # bytes that are read out of an archive
BAD_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)
BAD_ARCHIVE += (KeyError, RuntimeError)  # no such member; it is encrypted


def read_lines(file, kind):
    """Yields {column: cell} for each line of a binary file of JSON objects or, .txt, of texts."""
    for number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig", newline="\n"), 1):
        if kind == ".txt":
            yield {"text": line.rstrip("\r\n")}
        elif line.strip():
            try:
                yield dict(json.loads(line).items())
            except (AttributeError, RecursionError, ValueError):
                raise Fault(f"line {number} is no JSON object") from None


def read_table(file, name, kind, header=True):
    """Yields the rows of an open binary file as DataFrames of up to 1,000 rows and dtype object.

    kind: .csv, .tsv, .jsonl, .txt, or "uci": .tsv where a quotation mark is just a character.
    Columns without a header are named 0, 1, ... Raises Fault for what is no such table.
    """
    import pandas as pd

    try:
        if kind in (".jsonl", ".txt"):
            rows = read_lines(file, kind)
            if (chunk := list(itertools.islice(rows, 1000))) == []:
                raise pd.errors.EmptyDataError
            while chunk:
                yield pd.DataFrame(chunk, dtype=object)
                chunk = list(itertools.islice(rows, 1000))
        elif kind in (".csv", ".tsv", "uci"):
            how = {"dtype": object, "keep_default_na": False, "header": 0 if header else None}
            how |= {"quoting": csv.QUOTE_NONE if kind == "uci" else csv.QUOTE_MINIMAL}
            how |= {"sep": "," if kind == ".csv" else "\t"}
            with warnings.catch_warnings():  # it only warns of rows with more cells than columns
                warnings.simplefilter("error", pd.errors.ParserWarning)
                yield from pd.read_csv(file, chunksize=1000, index_col=False, **how)
        else:
            raise Fault(f"its name ends in none of {', '.join(KINDS)}: save it as CSV")
    except UnicodeDecodeError:
        raise Fault(f"{name} is not UTF-8: save it as such (in Excel: CSV UTF-8)") from None
    except pd.errors.EmptyDataError:
        raise Fault(f"{name} is empty") from None
    except pd.errors.ParserWarning:
        quotes = "do commas separate cells, and have texts with commas quotation marks?"
        raise Fault(f"{name}, row 1 has more cells than there are columns: {quotes}") from None
    except (Fault, ValueError) as error:
        what = str(error).removeprefix("Error tokenizing data. C error: ")
        raise Fault(f"{name}: {what}") from None


def find_column(frame, args, flag, name):
    """The DataFrame's column that args.text_column or args.label_column names, in any case if
    one alone is like it. Raises Fault."""
    wanted = getattr(args, flag)
    for same in (str, lambda column: str(column).lower()):  # as written; in lower case
        found = [column for column in frame.columns if same(column) == same(wanted)]
        if len(found) == 1:
            return found[0]
    there = f"{name} has the columns {', '.join(map(repr, frame.columns))}, not {wanted!r}"
    raise Fault(f"{there}: give --{flag}, by name, or by position if there is no header")


def read_texts(path, args):
    """A DataFrame of the texts and labels of a file: strings, empty where there is none."""
    import pandas as pd

    # Columns given by position belong to a file with no header.
    header = not (args.text_column.isdigit() and args.label_column.isdigit())
    with open(path, "rb") as file:
        frame = pd.concat([pd.DataFrame(), *read_table(file, path, path.suffix.lower(), header)])
    if frame.empty:
        raise Fault(f"{path} has no rows")
    columns = [find_column(frame, args, flag, path) for flag in ("text_column", "label_column")]
    if columns[0] == columns[1]:
        raise Fault(f"{path}: --text_column and --label_column are the same column")
    text, label = (frame[column] for column in columns)
    types = {type(cell).__name__ for cell in label.dropna()}
    if len(types) > 1 or types & {"dict", "list", "float"}:
        raise Fault(f"{path}: labels must be all strings or all integers, not {sorted(types)}")
    text = [cell if isinstance(cell, str) else "" for cell in text]
    label = ["" if pd.isna(cell) else str(cell).strip() for cell in label]
    return pd.DataFrame({"text": text, "label": label}, dtype=object)


def read_sms(path):
    """The UCI file, or the zip it comes in, of which only the one member that is wanted is read,
    as a stream. The file has no header, and a quotation mark in it is just a character (by the
    rules of CSV, two of the 5,574 messages would be swallowed by others)."""
    import pandas as pd

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            if path.suffix == ".zip":
                file = stack.enter_context(zipfile.ZipFile(file).open("SMSSpamCollection"))
            data = file.read(MAX_UNPACKED + 1)
        except BAD_ARCHIVE as error:
            raise Fault(f"{path} is no sound zip of the SMS Spam Collection: {error}") from None
    if len(data) > MAX_UNPACKED:
        raise Fault(f"{path}: what it unpacks to is too large")
    frame = pd.concat(read_table(io.BytesIO(data), path, "uci", header=False))
    if frame.shape[1] != 2:
        raise Fault(f"{path} is not the SMS Spam Collection: label, tab, message in each line")
    return frame.set_axis(["label", "text"], axis=1)[["text", "label"]]


def read_imdb(path):
    """The 50,000 labelled reviews of the tar file, read as a stream; nothing goes to the disk.
    Their own halves for training and test; a tenth of the first becomes validation."""
    import pandas as pd

    wanted = re.compile(r"aclImdb/(train|test)/(pos|neg)/\d+_\d+\.txt")
    rows, progress = [], Progress("reading reviews", 50_000)
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                match = wanted.fullmatch(member.name) if member.isreg() else None
                if member.offset + member.size > MAX_UNPACKED:
                    raise Fault(f"{path}: what it unpacks to is too large")
                if match:
                    text = archive.extractfile(member).read().decode(errors="replace")
                    rows.append((member.name, text, match[2], match[1]))
                    progress.add(1)
            while stream.read(1 << 20):  # to the end, where the checksum stands
                pass
    except BAD_ARCHIVE as error:
        raise Fault(f"{path} is no sound archive of the IMDb reviews: {error}") from None
    if not rows:
        raise Fault(f"{path} has no reviews")
    rows.sort(reverse=True)  # "train" before "test"
    frame = pd.DataFrame([row[1:] for row in rows], columns=["text", "label", "part"])
    held_out = frame[frame["part"] == "train"].sample(frac=0.1, random_state=123).index
    frame.loc[held_out, "part"] = "validation"
    return frame


def read_stdlib(count=1200):
    """Real texts that lie on every machine with Python: lines of code, and the first paragraphs
    of docstrings, from the standard library's own modules. 15 to 200 characters, no repeats,
    `count` of each; ordered by their sha256, so that the file system has no say in it."""
    import pandas as pd

    found = {"code": set(), "prose": set()}
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for path in Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"):
        source = path.read_text(encoding="utf-8", errors="replace")
        inside = set()  # numbers of the lines that lie inside of long strings
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
                found["prose"].add(" ".join(docstring.split("\n\n")[0].split()))
            if isinstance(node, ast.Constant) and node.end_lineno > node.lineno:
                inside.update(range(node.lineno, node.end_lineno + 1))
        for number, line in enumerate(map(str.strip, source.split("\n")), 1):
            if number not in inside and not line.startswith(("#", '"', "'", 'r"')):
                found["code"].add(line)
    rows = []
    for label, texts in found.items():
        texts = [text for text in texts if 15 <= len(text) <= 200]
        if len(texts) < count:
            raise Fault("the sources of Python's standard library are not on this machine")
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        rows += [(text, label) for text in texts[:count]]
    return pd.DataFrame(rows, columns=["text", "label"])


def is_sms(name):
    return name == "sms" or Path(name).name == "SMSSpamCollection" or name.endswith(".zip")


def read_data(args):
    """What --data names, as a DataFrame: text, label and, where it comes split, part."""
    import pandas as pd

    path, cache = Path(args.data), Path(args.cache_dir)
    if args.data == "imdb":
        return read_imdb(download(IMDB_URL, cache / "aclImdb_v1.tar.gz", IMDB_SHA256))
    if args.data == "stdlib":
        return read_stdlib()
    if args.data == "sms":
        path = download(SMS_URL, cache / "sms.zip", SMS_SHA256)
    if is_sms(args.data):
        return read_sms(path)
    if not path.is_dir():
        return read_texts(path, args)
    frames = []
    for part, stems in PARTS.items():
        files = [p for p in path.iterdir() if p.stem in stems and p.suffix.lower() in KINDS[:3]]
        if len(files) != 1:
            raise Fault(f"{path} has {len(files)} tables named {' or '.join(stems)}: one is needed")
        frames.append(read_texts(files[0], args).assign(part=part))
    return pd.concat(frames)


def fingerprint(frame):
    """sha256 of a DataFrame's contents in their order: are these the same data?"""
    return hashlib.sha256(json.dumps(frame.to_numpy().tolist()).encode()).hexdigest()


def complete(frame):
    """The rows of a DataFrame that have both a text and a label."""
    return frame[(frame["text"].str.strip() != "") & (frame["label"] != "")]


def split_data(everything, args):
    """({part: DataFrame}, labels): cleans, balances and splits what read_data gave, and tells of
    it. The labels are those of training, sorted; a label's index is its number. Raises Fault."""
    import pandas as pd

    notes, frame = [], complete(everything)
    if len(frame) < len(everything):
        notes.append(f"{len(everything) - len(frame):,} rows without text or label are left out")
    if args.dedupe:
        notes.append(f"{frame['text'].duplicated().sum():,} repeated texts are dropped")
        frame = frame.drop_duplicates("text")  # the first one stays; training comes before test
    if frame["label"].nunique() < 2:
        raise Fault(f"{args.data} needs two labels at least, not {sorted(set(frame['label']))}")
    if frame["label"].nunique() > max(len(frame) / 2, 2):
        many = f"{frame['label'].nunique():,} labels in {len(frame):,} rows"
        raise Fault(f"{args.data} has {many}: is --label_column right?")
    training = frame[frame["part"] == "train"] if "part" in frame else frame
    # Drawn as in the article: the rarest label's rows stay in their order, and it makes its split.
    if args.balance and len(training):
        fewest = training["label"].value_counts().min()
        training = pd.concat(
            group.sample(fewest, random_state=123) if len(group) > fewest else group
            for _, group in training.groupby("label", sort=False)
        )
    if "part" in frame:
        parts = {p: training if p == "train" else frame[frame["part"] == p] for p in PARTS}
    else:  # the article's split: shuffled with seed 123, 70% train, 10% validation, the rest test
        shuffled = training.sample(frac=1, random_state=123)
        a, b = int(len(shuffled) * 0.7), int(len(shuffled) * 0.7) + int(len(shuffled) * 0.1)
        parts = {"train": shuffled[:a], "validation": shuffled[a:b], "test": shuffled[b:]}

    found = set(parts["train"]["label"])
    numeric = all(re.fullmatch(r"-?\d+", label) for label in found)
    labels = sorted(found, key=int if numeric else str)
    if len({label.lower() for label in labels}) < len(labels):
        notes.append("some labels differ in nothing but upper and lower case")
    for part, table in parts.items():
        if table.empty:
            raise Fault(f"{args.data}: {len(frame)} texts are too few, none is left for {part}")
        if unseen := set(table["label"]) - found:
            raise Fault(f"{args.data}: {part} has the label {min(unseen)!r}, training has not")
        if missing := found - set(table["label"]):
            notes.append(f"no {part} text has the label {printable(min(missing))!r}")
    if repeats := parts["test"]["text"].isin(parts["train"]["text"]).sum():
        total = f"{repeats:,} of the {len(parts['test']):,} test texts"
        notes.append(f"{total} also occur in training: --dedupe removes such repeats")
    counts = pd.concat(parts.values())["label"].value_counts()
    shown = ", ".join(f"{counts[label]:,} {printable(label)}" for label in labels[:8])
    shown = f"{', balanced' if args.balance else ''} ({shown}{', ...' if len(labels) > 8 else ''})"
    sizes = ", ".join(f"{len(table):,} {part}" for part, table in parts.items())
    say("data", f"{args.data}: {counts.sum():,} texts{shown}: {sizes}")
    for note in notes:
        say("", note)
    return parts, labels


# ------------------------------------------------------------------------------------------------
# 6. From language model to classifier
#
# Three things turn one into the other: a reading position, a new head, and a choice of what is
# trained. The position first. GPT's mask is causal: a token sees what stands before it, so only
# the last one has seen the whole text; the first has seen nothing but itself, and can do no better
# than guess from one word: 75.00% against 95.00% in the article (rows 2 and 1 of its table, which
# is in section 9).
#
# Fillers are `<|endoftext|>` put behind a text until all are equally long, as the article's main
# recipe does. They are read like any other token: the last one is then a filler, which has to look
# back past a hundred of its like. That costs accuracy, 95.00% against 98.33% for the last real
# token (rows 1 and 16), and three quarters of the computing. --pad_to asks for it.

VOCABULARY = {  # where GPT-2's lies, and the files' sha256
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
}
TOKENIZERS = ("gpt2", "bytes")
POSITIONS = ("last", "first", "flexible")


def get_tokenizer(name, cache_dir):
    """A tiktoken.Encoding: gpt2, downloaded where that has not been done; or the 256 bytes."""
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        pieces = {"pat_str": r"[\s\S]", "mergeable_ranks": ranks, "special_tokens": special}
        return tiktoken.Encoding(name, **pieces)
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(cache_dir) / "tiktoken"))
    for url, sha256 in VOCABULARY.items():  # tiktoken looks for files named by the url's sha1
        download(url, Path(folder) / hashlib.sha1(url.encode()).hexdigest(), sha256)
    return tiktoken.get_encoding("gpt2")


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """How texts are cut, filled and read: saved with a classifier. Only here are these asked."""

    tokenizer: tiktoken.Encoding
    max_length: int  # tokens; longer texts are cut
    pad_to: int  # tokens; shorter texts are filled up (0: not)
    position: str  # last visible token, first, or flexible: last real token
    average: bool  # the mean over the visible tokens instead
    causal: bool

    def saved(self):
        """The fields, as JSON can hold them."""
        return {**vars(self), "tokenizer": self.tokenizer.name}

    def tokens(self, texts):
        """A list of token lists, of any length. `<|endoftext|>` in a text is ordinary text."""
        # No GPT-2 token is longer than 128 characters: what is left out here would be cut anyway
        # (and with one character more, what is cut can be counted).
        texts = [text[: 128 * self.max_length + 1] for text in texts]
        return self.tokenizer.encode_ordinary_batch(texts)

    def example(self, tokens, label=-1):
        """The Example of a list of tokens (at least one)."""
        ids = tokens[: self.max_length]
        real = len(ids)
        ids = ids + [self.tokenizer.eot_token] * (self.pad_to - real)
        stop = real if self.position == "flexible" else len(ids)
        if self.position == "first":
            read = range(1)
        else:
            read = range(0 if self.average else stop - 1, stop)
        # Under the causal mask no place that is read sees what comes after: leave that out.
        ids = torch.tensor(ids[: read.stop] if self.causal else ids)
        return Example(ids, read, label, self.causal)


# LoRA ("Low-Rank Adaptation of Large Language Models", arXiv:2106.09685) leaves a matrix W as it
# is and learns what to add to it, as a product of two thin ones: W x + (alpha / rank) B A x. B
# begins as zero, so the model begins unchanged; A is random, since if both were zero, neither
# would ever get a gradient. For W (2304, 768), rank 8 learns 24,576 numbers instead of 1,769,472.
# Since every block has something that learns, no block's output can be kept: LoRA saves memory and
# disk, not time.


class LoRALinear(Linear):
    """A Linear (in -> out) with A (rank, in) and B (out, rank) beside its frozen weight."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # no memory yet
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def split(self, *sizes):
        def with_update(linear, B):
            return lambda x: linear(x) + self.scale * F.linear(F.linear(x, self.lora_A), B)

        return list(map(with_update, super().split(*sizes), self.lora_B.split(sizes)))

    def forward(self, x):
        return self.split(self.out_features)[0](x)


# What learns besides the head: so many of the last blocks, and ln_f with them (None: everything;
# lora: none of these weights, but what is put beside them).
# The article's accuracies: head alone 72.00%, with the last block 95.00%, with the last two 98.33%,
# all 96.67%, LoRA 96.67% (rows 3, 1, 4, 5, 11).
TRAINED_BLOCKS = {"last_layer": 0, "last_block": 1, "last_two_blocks": 2, "all": None, "lora": 0}


def make_classifier(model, n_labels, trainable, rank=8, alpha=8):
    """Gives a GPT a head for n_labels and freezes what is not to be trained.

    The head is new: nothing that the model has learnt tells of spam, so its logits begin as noise,
    and the loss near ln 2. Draws the head, and LoRA's A, from torch's generator. Trained weights
    get memory of their own, so that training leaves the file they were mapped from alone.
    """
    model.head = nn.Linear(model.config.n_embd, n_labels)
    model.requires_grad_(trainable == "all")
    model.head.requires_grad_(True)
    if blocks := TRAINED_BLOCKS[trainable]:
        for module in (model.ln_f, *model.h[-blocks:]):
            module.requires_grad_(True)
    if trainable == "lora":
        for module in [module for block in model.h for module in (block.attn, block.mlp)]:
            for name, linear in list(module.named_children()):  # a list, as they are replaced
                setattr(module, name, LoRALinear(linear, rank, alpha))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    return model


def frozen_blocks(model):
    """How many of the first blocks do not learn. (The embedding learns only where all do.)"""
    learns = [any(p.requires_grad for p in block.parameters()) for block in model.h]
    return [*learns, True].index(True)


# ------------------------------------------------------------------------------------------------
# 7. Training and evaluation
#
# "Finetune the last block" means that eleven of twelve blocks would compute, in every epoch, for
# every text, exactly what they computed the epoch before. So they run once, and what comes out of
# them stays with the Example. The loop below neither knows nor cares: a Row says how many blocks
# its x has been through, and the model goes on from there.
#
# This holds because nothing in the model is random: there is no dropout (the article sets it to
# 0, too), and so no model.train() or model.eval() to call either.


def free_memory(device):
    """Bytes that can still be allocated on a torch.device; infinite where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024
    return math.inf


@torch.no_grad()
def run_frozen(model, examples, args):
    """Runs the frozen blocks on a list of examples and leaves with each what comes out: x (T, C),
    or (1, C) where all blocks are frozen; nothing, if that took more than half the free memory."""
    depth, (n_layer, C) = frozen_blocks(model), (model.config.n_layer, model.config.n_embd)
    if depth == 0 or args.no_feature_cache:
        return
    name = f"{depth} of {n_layer} blocks"

    def length(example):
        return 1 if depth == n_layer else len(example.ids)

    size, room = 4 * C * sum(map(length, examples)) / 1e9, free_memory(args.device) / 2e9
    if size > room:
        why = f"their output takes {size:.3g} GB, half of the free memory is {room:.3g} GB"
        return say("frozen", f"{name}, in every epoch: {why}")
    start, progress = time.perf_counter(), Progress("frozen blocks", len(examples))
    for group in pack(examples, args.tokens_per_row):
        x = model.hidden(Row.of(group, args.device), depth)
        for example, features in zip(group, x.split(list(map(length, group)))):
            example.x, example.depth = features, depth
        progress.add(len(group))
    counts = f"{len(examples):,} texts ({sum(len(e.ids) for e in examples):,} tokens)"
    say("frozen", f"{name}, once for all {counts}   {time.perf_counter() - start:.1f} s")


def add_up(t):
    """The sum of the tensors that all processes have; every one of them gets it."""
    if dist.is_initialized():
        t = t.cuda() if dist.get_backend() == "nccl" else t
        dist.all_reduce(t)
    return t


@torch.no_grad()
def probabilities(model, examples, args, progress=None):
    """(N, K) float32 on the CPU: what the model gives each label. Several processes share the
    work, and each of them gets all of it."""
    rank, world = process()
    found, done = torch.zeros(len(examples), model.head.out_features), rank
    for group in pack(examples[rank::world], args.tokens_per_row):
        stop = done + world * len(group)
        logits = model(Row.of(group, args.device))
        found[done:stop:world], done = logits.float().softmax(1).cpu(), stop
        if progress:
            progress.add(len(group))
    return add_up(found).cpu()


class Metrics:
    """What (N, K) probabilities (not logits: processes exchange these) and N true label numbers
    say."""

    def __init__(self, probs, true):
        true, n_labels = torch.as_tensor(true), probs.shape[1]
        self.loss = F.nll_loss(probs.clamp_min(1e-30).log(), true).item()
        pairs = true * n_labels + probs.argmax(1)
        self.confusion = torch.bincount(pairs, minlength=n_labels**2).view(n_labels, n_labels)
        self.n, self.accuracy = len(true), self.confusion.trace().item() / len(true)
        # n texts are a sample of all there could be, and their accuracy p is about this far from
        # the accuracy on all: sqrt(p (1 - p) / n). With 95% on 300 texts, 1.3 points.
        self.standard_error = math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    def report(self, name, labels):
        """Says accuracy, and for each label: precision (how many of those it was given have it),
        recall (how many of those that have it were given it), F1 (the harmonic mean of the two)
        and its number of texts; then what was taken for what."""
        import pandas as pd

        error = f"standard error {self.standard_error:.2%} on {self.n:,} texts"
        say(name, f"accuracy {self.accuracy:.2%} ({error}), loss {self.loss:.3f}")
        hit, true, found = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        names = [printable(label) for label in labels]
        table = pd.DataFrame(index=names)
        table["precision"] = (hit / found.clamp_min(1)).tolist()
        table["recall"] = (hit / true.clamp_min(1)).tolist()
        table["F1"] = (2 * hit / (found + true).clamp_min(1)).tolist()
        table = table.map("{:.1%}".format).assign(texts=true.tolist())
        taken = pd.DataFrame(self.confusion.tolist(), names, [f"taken for {n}" for n in names])
        if len(names) > 10:  # too wide: the largest numbers instead, but for what is right
            taken = taken.stack().drop([(n, f"taken for {n}") for n in names]).nlargest(10)
        for line in f"{table.to_string()}\n{taken.to_string()}".split("\n"):
            say("", line)


def measure(model, examples, args):
    """The Metrics of a model on labelled examples."""
    return Metrics(probabilities(model, examples, args), [example.label for example in examples])


def baselines(tokens, targets, n_labels, vocabulary):
    """Test accuracies that any classifier has to beat: (commonest label, bag of words).

    tokens and targets are {part: lists}. The second is a logistic regression, L2 1e-4, on which
    tokens a text has, whatever their order. It begins with zeros: there is no chance in it.
    """

    def bag(texts):  # (ids, starts): the tokens of each text, every one once, end to end
        sets = [sorted(set(text)) for text in texts]
        starts = torch.tensor([0, *map(len, sets[:-1])]).cumsum(0)
        return torch.tensor(list(itertools.chain(*sets))), starts

    def logits(ids, starts):  # for each text, the sum of the weights of its tokens: (N, K)
        return F.embedding_bag(ids, weight, starts, mode="sum") + bias

    def closure():  # what LBFGS calls, as often as it likes
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(*train), labels) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    weight = torch.zeros(vocabulary, n_labels, requires_grad=True)
    bias = torch.zeros(n_labels, requires_grad=True)
    train, labels = bag(tokens["train"]), torch.tensor(targets["train"])
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    found = Metrics(logits(*bag(tokens["test"])).detach().softmax(1), targets["test"])
    return targets["test"].count(int(labels.mode()[0])) / found.n, found.accuracy


def train_epoch(model, optimizer, examples, order, args, progress):
    """One pass over the examples in the order (N,). Returns (loss, accuracy), means over the
    epoch, measured on each text just before the step that learns from it (so in the first epoch
    they are often worse than validation: early texts met a model that knew nothing). A text with
    the label --ignore_index counts as one without loss."""
    rank, world = process()
    trained = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(2, device=args.device)  # loss, right answers
    for batch in order.split(args.batch_size * args.accumulation_steps):
        counted = sum(examples[i].label != args.ignore_index for i in batch)
        mine = [examples[i] for i in batch if i % world == rank]
        optimizer.zero_grad()
        # The loss of a text is -log of the probability that the model gives to its label. A batch
        # is as many rows as it needs. Each adds its share of the batch's mean loss, and gradients
        # add up by themselves: exactly the batch's gradient, in the memory of one row. (A mean of
        # the rows' means would weigh a text in a short row more.) So accumulation is nothing but
        # a larger batch, whatever is left over at the end.
        for group in pack(mine, args.tokens_per_row):
            row = Row.of(group, args.device)
            logits = model(row).float()
            how = {"reduction": "sum", "ignore_index": args.ignore_index}
            loss = F.cross_entropy(logits, row.labels, **how)
            (loss / max(counted, 1)).backward()
            # detach: or every row's intermediate results would be kept until the epoch ends.
            total += torch.stack([loss.detach(), (logits.argmax(1) == row.labels).sum()])
        if world > 1:  # under torchrun each process has been over its own texts
            for p in trained:
                p.grad = add_up(torch.zeros_like(p) if p.grad is None else p.grad)
        optimizer.step()
        progress.add(len(batch))
    loss, accuracy = (add_up(total) / len(order)).tolist()
    if not math.isfinite(loss):
        raise Fault("the loss is not a number any more: try a smaller --learning_rate")
    return loss, accuracy


# ------------------------------------------------------------------------------------------------
# 8. Saving and prediction
#
# A classifier is one safetensors file, with labels, TextEncoder, flags and metrics as JSON in its
# metadata. Where training began with published weights, only those that differ are in it: 28 MB
# instead of 500.


def to_device(model, args):
    """Moves a model to --device, and sets how it computes there."""
    model.dtype = getattr(torch, args.dtype)
    for block in model.h if args.compile else ():
        block.compile(dynamic=True)  # rows differ in length
    return model.to(args.device)


def save_classifier(path, model, info):
    """Writes info (JSON), and the weights that the published model info["base"] does not have."""
    everything = info["base"] is None
    tensors = {n: p for n, p in model.named_parameters() if everything or p.requires_grad}
    write_safetensors(path, tensors, {"gpt_classify": json.dumps(info)})


@dataclasses.dataclass
class Classifier:
    model: GPT
    encoder: TextEncoder
    labels: list
    settings: dict  # the flags of its training
    args: argparse.Namespace  # those of now

    def probabilities_of(self, texts, progress=None):
        """(N, K) for N texts, with zeros for those without content; and how many were cut."""
        full = [i for i, text in enumerate(texts) if text.strip()]
        tokens = self.encoder.tokens([texts[i] for i in full])
        probs = torch.zeros(len(texts), len(self.labels))
        if full:
            examples = list(map(self.encoder.example, tokens))
            probs[full] = probabilities(self.model, examples, self.args, progress)
        return probs, sum(len(t) > self.encoder.max_length for t in tokens)

    def predict(self, texts):
        """[(label, probability)], as strings, empty for texts without content."""
        probs, cut = self.probabilities_of(texts)
        if cut:
            warn(f"note: cut to {self.encoder.max_length:,} tokens: {cut:,} texts")
        best = zip(*(t.tolist() for t in probs.max(1)))  # probability 0: a text without content
        return [(self.labels[i], f"{p:.4f}") if p else ("", "") for p, i in best]


def load_classifier(args):
    """The Classifier in the file --classifier. It is data: nothing in it is run. Raises Fault."""
    path = Path(args.classifier)
    if not path.is_file():
        raise Fault(f"there is no classifier {path}: train one with --train")

    def need(ok):  # whatever does not fit ends in the one fault below
        if not ok:
            raise ValueError

    tensors, metadata = read_safetensors(path)
    try:
        info = json.loads(metadata["gpt_classify"])
        labels, base, alpha = info["labels"], info["base"], info["lora_alpha"]
        fields, settings = dict(info["encoder"]), dict(info["settings"])
        need(base in {None, *SIZES} and all(isinstance(label, str) for label in labels))
        need(fields["position"] in POSITIONS and fields["tokenizer"] in TOKENIZERS)
        need(isinstance(fields["causal"], bool))
        need(len(labels) == len(tensors["head.weight"]) == len(tensors["head.bias"]))
        fields["tokenizer"] = get_tokenizer(fields["tokenizer"], args.cache_dir)
        encoder = TextEncoder(**fields)
        if base:
            config, weights = published_gpt2(base, args.cache_dir)
        else:
            weights = {name: t for name, t in tensors.items() if name != "head.weight"}
            config = config_of(weights)
        need(1 <= encoder.max_length <= config.block_size >= encoder.pad_to >= 0)
        need(encoder.tokenizer.n_vocab <= config.vocab_size)
        rank = 1 if alpha is None else len(tensors["h.0.attn.c_attn.lora_A"])
        need(rank <= config.n_embd)
        trainable = "last_layer" if alpha is None else "lora"
        model = make_classifier(build_gpt(config, weights), len(labels), trainable, rank, alpha)
        expected = model.state_dict()
        need(all(expected[name].shape == t.shape for name, t in tensors.items()))
        need(all(t.dtype == torch.float32 for t in tensors.values()))
        need(base or expected.keys() == tensors.keys())
        model.load_state_dict(tensors, strict=False, assign=True)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise Fault(f"{path} is no sound classifier of this tool: train one with --train") from None
    return Classifier(to_device(model, args), encoder, labels, settings, args)


def predict(args):
    """--predict: label, probability and text, a line each, separated by tabs."""
    classifier = load_classifier(args)

    def answer(texts):
        for text, (label, probability) in zip(texts, classifier.predict(texts)):
            print(printable(label), probability, printable(text), sep="\t", flush=True)

    if args.predict and args.predict != ["-"]:
        return answer(args.predict)
    if sys.stdin.isatty():
        warn("type a text and press Enter; Ctrl-D ends")
    for line in sys.stdin.buffer:
        answer([line.decode(errors="replace").rstrip("\r\n")])


def predict_file(args):
    """--predict_file: the rows of a file, in order, with two columns added, as CSV. In constant
    memory, a thousand rows at a time, each of which is written as soon as it is known."""
    import pandas as pd

    source, output = Path(args.predict_file), args.output
    standard = args.predict_file == "-"
    if output and source.exists() and Path(output).exists() and source.samefile(output):
        raise Fault("--output is the file that is being read")
    kind = ".csv" if standard else source.suffix.lower()
    if kind == ".txt":
        args.text_column = "text"
    shown = printable if sys.stdout.isatty() and not output else str

    def cell(content):  # what JSON made of it as JSON again, what is missing as nothing
        return shown(content if isinstance(content, str) else json.dumps(content))

    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if standard else stack.enter_context(open(source, "rb"))
        name, done = "standard input" if standard else source, 0
        chunks = read_table(file, name, kind, header=not args.text_column.isdigit())
        stack.enter_context(contextlib.closing(chunks))  # before the file is
        first = next(chunks)
        column = find_column(first, args, "text_column", name)
        taken = {str(column).lower() for column in first}
        added = [f"predicted_{c}" if c in taken else c for c in ("label", "probability")]
        classifier, out = load_classifier(args), sys.stdout
        if output:  # only now, since opening empties it
            how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
            out = stack.enter_context(open(output, "w", **how))
        for chunk in itertools.chain([first], chunks):
            if new := set(chunk) - set(first):
                raise Fault(f"{name}: the column {min(new)!r} is missing in the first 1,000 rows")
            answers = classifier.predict([t if isinstance(t, str) else "" for t in chunk[column]])
            chunk = chunk.astype(object).where(chunk.notna(), "").map(cell)
            table = chunk.reindex(columns=first.columns).rename(columns=shown)
            answers = pd.DataFrame(answers, table.index, added, dtype=object)
            table = pd.concat([table, answers], axis=1)
            # All quoted: the csv module of Python before 3.13 forgets to, at carriage returns.
            table.to_csv(out, index=False, header=done == 0, quoting=csv.QUOTE_ALL)
            out.flush()
            done += len(chunk)
            if sys.stderr.isatty():
                print(f"\r{done:,} rows ", end="", file=sys.stderr, flush=True)


def trace(args):
    """--trace: what a causal classifier believes after each token, in one forward pass."""
    classifier = load_classifier(args)
    encoder, names = classifier.encoder, list(map(printable, classifier.labels))
    if not args.trace.strip():
        raise Fault("there is no text to trace")
    tokens = encoder.tokens([args.trace])[0]
    if len(tokens) > encoder.max_length:
        warn(f"note: cut to {encoder.max_length:,} tokens")
    example, n = encoder.example(tokens), min(len(tokens), encoder.max_length)
    if not example.causal or example.read != range(n - 1, n):
        raise Fault(
            "only a causal classifier that reads a text's last token has an opinion after each "
            "token: this one sees both ways, or reads the first token, the mean, or a filler"
        )
    # All places are read, each as if the text ended there: thanks to the causal mask, it does.
    # (A model that sees both ways would need one pass for each.)
    row = Row.of([example], args.device)
    everywhere = torch.arange(n, device=args.device)
    with torch.no_grad():
        row = dataclasses.replace(row, read=everywhere, owner=everywhere, labels=everywhere)
        probs = classifier.model(row).float().softmax(1).cpu()
    shaded = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for token, p, belief in zip(example.ids.tolist(), probs, probs[:, probs[-1].argmax()]):
        text = encoder.tokenizer.decode_single_token_bytes(token).decode(errors="replace")
        text, label, p = printable(text), names[p.argmax()], float(p.max())
        if shaded:  # from blue to orange: how sure it is of the label that wins in the end
            ends = (40, 200), (80, 90), (200, 20)  # red, green, blue at 0% and at 100%
            red, green, blue = (int(a + (b - a) * belief) for a, b in ends)
            text = f"\x1b[48;2;{red};{green};{blue};38;2;255;255;255m{text}\x1b[0m"
        print(f"{label:{max(map(len, names))}}  {p:6.1%}  {text}")


def evaluate(args):
    """--evaluate: a saved classifier on labelled data, and its most confident mistakes."""
    classifier = load_classifier(args)
    settings = classifier.settings
    if args.data is None:
        for flag in ("data", "text_column", "label_column"):
            setattr(args, flag, str(settings.get(flag)))
    frame, which = read_data(args), "all rows"
    if fingerprint(frame) == settings.get("fingerprint"):  # not the texts that it learnt from
        args.balance, args.dedupe = settings.get("balance"), settings.get("dedupe")
        frame, which = split_data(frame, args)[0]["test"], "the test part"
    elif "part" in frame:
        frame, which = frame[frame["part"] == "test"], "the test part"
    frame = complete(frame)
    if frame.empty:
        raise Fault(f"{args.data} has no labelled text")
    if unseen := set(frame["label"]) - set(classifier.labels):
        known = ", ".join(map(repr, classifier.labels))
        raise Fault(f"{args.data}: training did not see the label {min(unseen)!r}, but {known}")
    texts, true = frame["text"].tolist(), list(map(classifier.labels.index, frame["label"]))
    probs, cut = classifier.probabilities_of(texts, Progress("evaluating", len(texts)))
    metrics = Metrics(probs, true)
    say("data", f"{args.data}: {which}, {len(texts):,} texts{f', {cut:,} cut' if cut else ''}")
    metrics.report("evaluated", classifier.labels)
    best, found = probs.max(1)
    wrong = [i for i in best.argsort(descending=True, stable=True).tolist() if found[i] != true[i]]
    say("mistakes", f"{len(wrong):,}; the most confident:" if wrong else "none")
    for i in wrong[:10]:
        label, taken = (printable(classifier.labels[n]) for n in (true[i], found[i]))
        say("", f"{label} taken for {taken}, {best[i]:.1%}: {printable(texts[i][:200])}")


# ------------------------------------------------------------------------------------------------
# 9. A run from beginning to end, and the article's nineteen
#
# One run on 300 test texts says little: with 95% right, the standard error is 1.3 points, and a
# second seed gives another figure. So a result comes with its standard error, with a standard
# deviation over --seeds, and beside what can be had without a GPT: guessing the commonest label,
# and a bag of words, which on the article's own data gets 95.7% where its main recipe gets 95.00%.
#
# First where a run begins (weights, and what an interrupted one has done), then the run itself.


def check_memory(config, args):
    """Raises Fault if a model is likely not to fit: 4 bytes for each parameter and, where all are
    trained, 12 more (the gradient, and AdamW's two averages)."""
    C = config.n_embd
    total = config.n_layer * 12 * C * C + (config.vocab_size + config.block_size) * C
    needed = total * (16 if args.train and args.trainable_layers == "all" else 4) / 1e9
    free = free_memory(args.device) / 1e9
    if needed > free:
        raise Fault(
            f"{args.model_size} needs about {needed:.1f} GB of memory, {free:.1f} GB are free: "
            f"try a smaller --model_size or fewer --trainable_layers"
        )


def starting_point(args):
    """(config, weights) to begin with; weights is None where each seed draws its own."""
    size = args.model_size
    if args.weights == "pretrained":
        if args.tokenizer != "gpt2":
            raise Fault("pretrained weights know GPT-2's tokens only: use --tokenizer gpt2")
        check_memory(SIZES[size], args)
        return published_gpt2(size, args.cache_dir)
    vocabulary = get_tokenizer(args.tokenizer, args.cache_dir).n_vocab
    config, weights = dataclasses.replace(SIZES[size], vocab_size=vocabulary), None
    if args.weights != "random":
        config, weights = read_gpt2(args.weights)
    if vocabulary > config.vocab_size:
        known = f"{args.weights} knows {config.vocab_size:,} tokens"
        raise Fault(f"{known}, --tokenizer {args.tokenizer} has {vocabulary:,}")
    check_memory(config, args)
    return config, weights


def speak(args):
    """--generate: the language model itself, before its head is thrown away."""
    config, weights = starting_point(args)
    torch.manual_seed(args.seed)
    model = to_device(build_gpt(config, weights or random_weights(config)), args)
    tokenizer = get_tokenizer(args.tokenizer, args.cache_dir)
    if not (ids := tokenizer.encode_ordinary(args.generate)):
        raise Fault("--generate needs a text to go on from")
    new = generate(model, ids, args.max_new_tokens, not args.disable_causal_mask)
    ids += itertools.takewhile(lambda token: token != tokenizer.eot_token, new)
    print("\n".join(map(printable, tokenizer.decode(ids).split("\n"))))


class Journal:
    """What a run has done so far, in memory and in the file that --resume goes on from: weights
    that learn, the optimiser's averages, settings, metrics. There is no random state in it, since
    the order of the texts in all epochs follows from the seed.

    It is written after each epoch, whole or not at all, so a run may be killed at any moment.
    When the run has finished, it goes.
    """

    def __init__(self, args, settings):
        self.path = Path(f"{args.classifier}.resume") if args.classifier else None
        self.settings, self.seed, self.history, self.results = settings, args.seed, [], []
        self.tensors = {}
        if args.resume:
            self.load()
        elif self.path and self.path.exists():
            warn(f"note: {self.path}, left by an unfinished run, will be written over")

    def load(self):
        self.tensors, metadata = read_safetensors(self.path)
        try:
            info = json.loads(metadata["gpt_classify"])
            before = {key: info["settings"].get(key) for key in self.settings}
            self.seed, self.history, self.results = info["seed"], info["history"], info["results"]
            if not isinstance(self.seed, int) or not isinstance(self.history[-1]["epoch"], int):
                raise TypeError
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise Fault(f"{self.path} is no unfinished run of this tool") from None
        if before != self.settings:
            other = [k for k, v in self.settings.items() if v != before[k]]
            other = ", ".join(f"--{k} {before[k]}, now {self.settings[k]}" for k in other)
            raise Fault(f"the unfinished run had other settings: {other}")

    def save(self, model, optimizer):
        if self.path is None or process()[0] > 0:
            return
        tensors = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                tensors[name] = p
                tensors |= {f"{key}/{name}": t for key, t in optimizer.state[p].items()}
        info = {key: getattr(self, key) for key in ("settings", "seed", "history", "results")}
        write_safetensors(self.path, tensors, {"gpt_classify": json.dumps(info)})

    def restore(self, model, optimizer):
        """Puts a model and its optimiser where they were, and returns how many epochs are done."""
        if not self.tensors:
            return 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        states = {}
        try:
            for i, (name, p) in enumerate(trained.items()):
                p.data.copy_(self.tensors[name].view(p.shape))
                states[i] = {"step": self.tensors[f"step/{name}"].clone()}
                for key in ("exp_avg", "exp_avg_sq"):
                    states[i][key] = self.tensors[f"{key}/{name}"].view(p.shape).clone()
        except (KeyError, RuntimeError):
            raise Fault(f"{self.path} does not fit this model") from None
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        self.tensors = {}
        return self.history[-1]["epoch"]


def make_encoder(config, args, texts):
    """The TextEncoder that the flags ask for; texts are those of training. Raises Fault."""
    tokenizer = get_tokenizer(args.tokenizer, args.cache_dir)
    limit = args.max_length or config.block_size
    if args.pad_to == "longest":
        pad_to = min(limit, max(map(len, tokenizer.encode_ordinary_batch(texts))))
    else:
        pad_to = config.block_size if args.pad_to == "model" else int(args.pad_to or 0)
    if max(limit, pad_to) > config.block_size:
        flags = "--max_length and --pad_to cannot be more"
        raise Fault(f"this model reads {config.block_size} tokens: {flags}")
    # With fillers all texts have one length: what is longer is cut, as in the article's code.
    limit, position = min(limit, pad_to or limit), args.trainable_token_pos
    average, causal = args.average_embeddings, not args.disable_causal_mask
    return TextEncoder(tokenizer, limit, pad_to, position, average, causal)


def fit(model, optimizer, examples, journal, args):
    """The epochs of one seed, with a line and an entry in the journal after each.

    A loss that falls on training texts while it rises on those of validation is a model that
    learns its texts by heart. All epochs are run all the same, and the last one is kept, as in
    the article: among five epochs, 149 validation texts would mostly choose by chance.
    """
    import pandas as pd

    generator, n = torch.Generator().manual_seed(journal.seed), len(examples["train"])
    # All at once, so that a resumed run gets the orders that it would have had.
    orders = [torch.randperm(n, generator=generator) for _ in range(args.num_epochs)]
    if done := journal.restore(model, optimizer):
        say("resumed", f"after epoch {done} of seed {journal.seed}")
    for epoch, order in enumerate(orders[done:], done + 1):
        start, name = time.perf_counter(), f"epoch {epoch}/{args.num_epochs}"
        progress = Progress(name, n)
        loss, accuracy = train_epoch(model, optimizer, examples["train"], order, args, progress)
        validation = measure(model, examples["validation"], args)
        seconds = time.perf_counter() - start
        shown = f"train {accuracy:6.1%}   validation {validation.accuracy:6.1%}"
        entry = {"seed": journal.seed, "epoch": epoch, "examples_seen": epoch * n}
        entry |= {"train_loss": loss, "validation_loss": validation.loss}
        entry |= {"train_accuracy": accuracy, "validation_accuracy": validation.accuracy}
        journal.history.append(entry | {"seconds": round(seconds, 3)})
        journal.save(model, optimizer)
        if args.log and process()[0] == 0:
            with replacing(args.log) as file:
                pd.DataFrame(journal.history).to_csv(file, index=False, float_format="%.6g")
        # Said only now that the journal is on disk: an epoch that is printed is not lost.
        say(name, f"loss {loss:.3f}   {shown}   {seconds:.1f} s")


def plot(path, history):
    """Loss and accuracy against epochs (means over the seeds), examples seen on a second axis."""
    import matplotlib
    import pandas as pd

    matplotlib.use("Agg")
    table = pd.DataFrame(history).groupby("epoch").mean()
    n = table["examples_seen"].iloc[0]
    pairs = [(f"train_{what}", f"validation_{what}") for what in ("loss", "accuracy")]
    shape = {"subplots": pairs, "layout": (1, 2), "figsize": (10, 4), "style": ".-"}
    axes = table.plot(y=[*pairs[0], *pairs[1]], **shape).ravel()
    for ax, what in zip(axes, ("loss", "accuracy")):
        ax.set_ylabel(what)
        ax.locator_params(axis="x", integer=True)
        second = ax.secondary_xaxis("top", functions=(lambda x: x * n, lambda x: x / n))
        second.set_xlabel("examples seen")
    axes[0].figure.tight_layout()
    with replacing(path) as file:
        axes[0].figure.savefig(file, format=Path(path).suffix[1:], dpi=120)


DEFAULT_CLASSIFIER = "classifier.safetensors"
# Flags that leave the result as it is: runs that differ in these alone are the same run.
INERT = {"resume", "log", "plot", "output", "classifier", "cache_dir", "experiment", "offline"}
INERT |= {"train", "predict", "predict_file", "trace", "evaluate", "generate", "max_new_tokens"}


def train(args):
    """--train: read, encode, cache, finetune, report, save. Returns a row for a table."""
    began = time.perf_counter()
    first = process()[0] == 0  # of several processes, one talks and writes

    frame = read_data(args)
    parts, labels = split_data(frame, args)
    config, weights = starting_point(args)
    if args.trainable_layers == "lora" and args.lora_rank > config.n_embd:
        raise Fault(f"--lora_rank {args.lora_rank} is above the model's width, {config.n_embd}")
    encoder = make_encoder(config, args, parts["train"]["text"].tolist())
    tokens = {part: encoder.tokens(table["text"].tolist()) for part, table in parts.items()}
    targets = {part: list(map(labels.index, table["label"])) for part, table in parts.items()}
    if cut := sum(len(t) > encoder.max_length for part in tokens.values() for t in part):
        say("", f"cut to {encoder.max_length:,} tokens: {cut:,} texts")
    tokens = {part: [t[: encoder.max_length] for t in tokens[part]] for part in parts}
    commonest, bag = baselines(tokens, targets, len(labels), config.vocab_size)
    bag_of = "bag of words" if args.tokenizer == "gpt2" else "bag of bytes"
    say("baseline", f"always the commonest label {commonest:.1%}; {bag_of} {bag:.1%} (test)")

    settings = {key: value for key, value in vars(args).items() if key not in INERT}
    settings |= {"device": args.device.type, "fingerprint": fingerprint(frame)}
    journal, examples = Journal(args, settings), None
    # Each seed draws its own head and order of texts; the split stays. So the deviation over seeds
    # says what chance does in training, and the standard error what it does in choosing the test.
    for seed in range(journal.seed, args.seed + args.seeds):
        journal.seed = seed
        torch.manual_seed(seed)
        model = build_gpt(config, weights or random_weights(config))
        lora = args.lora_rank, args.lora_alpha
        to_device(make_classifier(model, len(labels), args.trainable_layers, *lora), args)
        trained = [p for p in model.parameters() if p.requires_grad]
        # Features belong to the weights: the seeds share them, unless each seed draws its own.
        if examples is None or weights is None:
            total, learns = (sum(p.numel() for p in ps) for ps in (model.parameters(), trained))
            size = args.model_size if args.weights in ("pretrained", "random") else "GPT-2"
            shown = f"{args.trainable_layers}: {learns / 1e6:,.2f}M"
            total = f"{total / 1e6:,.1f}M parameters"
            say("model", f"{size}, {args.weights}, {total}; training {shown}")
            examples = {p: list(map(encoder.example, tokens[p], targets[p])) for p in parts}
            rank, world = process()
            mine = [example for part in examples.values() for example in part[rank::world]]
            run_frozen(model, mine, args)
        # AdamW ("Decoupled Weight Decay Regularization", arXiv:1711.05101) divides each weight's
        # gradient by its usual size: every weight moves by about the learning rate a step, which
        # is small here, 5e-5 as in the article, since most of what GPT-2 knows is to stay.
        rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        optimizer = torch.optim.AdamW(trained, fused=True, **rates)
        fit(model, optimizer, examples, journal, args)
        metrics = measure(model, examples["test"], args)  # once; nothing is chosen by it
        metrics.report("test" if args.seeds == 1 else f"seed {seed}", labels)
        journal.results.append(metrics.accuracy)
        if args.classifier and first and seed == args.seed:
            info = {"labels": labels, "encoder": encoder.saved(), "settings": settings}
            info["base"] = args.model_size if args.weights == "pretrained" else None
            info["lora_alpha"] = args.lora_alpha if args.trainable_layers == "lora" else None
            info["metrics"] = {"test": metrics.accuracy, "bag_of_words": bag}
            save_classifier(args.classifier, model, info)
    mean = sum(journal.results) / args.seeds
    deviation = statistics.stdev(journal.results) if args.seeds > 1 else math.nan
    if args.seeds > 1:
        error = f"the test set's standard error is {metrics.standard_error:.2%}"
        spread = f"standard deviation {deviation:.2%} over {args.seeds} seeds"
        say("test", f"accuracy {mean:.2%}, {spread}; {error}")
    if mean < max(commonest, bag) + metrics.standard_error:
        say("", "not clearly above the baselines: more texts, or more --num_epochs, may help")
    if args.plot and first:
        plot(args.plot, journal.history)
    seconds = time.perf_counter() - began
    if args.classifier and first:
        journal.path.unlink()
        size = f"{os.path.getsize(args.classifier) / 1e6:,.1f} MB"
        say("saved", f"{args.classifier} ({size}), {seconds:.1f} s in all")
        text = printable(textwrap.shorten(parts["test"]["text"].iloc[0], 50, placeholder=""))
        flags = ["--predict", text or "some text", "--classifier", args.classifier]
        flags = flags[: 2 if args.classifier == DEFAULT_CLASSIFIER else 4]
        say("try", f"python {os.path.relpath(__file__)} {shlex.join(flags)}")
    row = {"trainable": learns, "here": mean, "sd": deviation, "se": metrics.standard_error}
    return row | {"bag_of_words": bag, "seeds": args.seeds, "seconds": round(seconds, 1)}


# The article's table: accuracy in % on training, validation and test texts, minutes on an A100;
# github.com/rasbt/LLMs-from-scratch, ch06/02_bonus_additional-experiments. The flags are this
# tool's. (LoRA: its code multiplies by alpha where this one, like the paper, takes alpha / rank.)
TABLE = """
 1 |  96.63  99.33  95.00 | 0.28 | main recipe | --pad_to longest
 2 |  78.46  80.54  75.00 | 0.28 | first token | --pad_to longest --trainable_token_pos first
 3 |  78.65  79.87  72.00 | 0.25 | last layer only | --pad_to longest --trainable_layers last_layer
 4 |  98.85  98.66  98.33 | 0.33 | last two blocks | --pad_to longest \
     --trainable_layers last_two_blocks
 5 |  99.62  96.64  96.67 | 0.69 | all layers | --pad_to longest --trainable_layers all
 6 |  87.50  91.28  84.67 | 0.75 | gpt2-medium | --pad_to longest --model_size gpt2-medium
 7 |  99.52  98.66  96.67 | 1.50 | gpt2-large | --pad_to longest --model_size gpt2-large
 8 |  99.81  99.81  98.33 | 2.83 | gpt2-xl | --pad_to longest --model_size gpt2-xl
 9 | 100.00  98.66  98.67 | 8.12 | gpt2-xl, all layers | --pad_to longest --model_size gpt2-xl \
     --trainable_layers all
10 | 100.00  96.64  93.67 | 0.69 | random weights, all layers | --pad_to longest --weights random \
     --trainable_layers all
11 | 100.00  97.32  96.67 | 0.75 | LoRA | --pad_to longest --trainable_layers lora \
     --lora_rank 16 --lora_alpha 256
12 | 100.00  98.66  98.33 | 5.79 | gpt2-xl, LoRA | --pad_to longest --trainable_layers lora \
     --lora_rank 16 --lora_alpha 128 --model_size gpt2-xl
13 |  83.08  87.92  78.33 | 2.46 | filled up to 1,024 tokens | --pad_to model
14 | 100.00  98.66  98.00 | 1.75 | no fillers, batches of 1 | --batch_size 1
15 |  99.33  98.66  98.33 | 1.70 | no fillers, 8 x 1 accumulated | --batch_size 1 \
     --accumulation_steps 8
16 |  99.42  98.66  98.33 | 0.30 | last real token | --pad_to longest --trainable_token_pos flexible
17 |  99.23  98.66  95.33 | 0.29 | no causal mask | --pad_to longest --disable_causal_mask
18 |  96.63  99.33  95.00 | 0.28 | ignore_index 50256 | --pad_to longest --ignore_index 50256
19 |  97.79  99.33  96.33 | 0.32 | mean of all embeddings | --pad_to longest --average_embeddings
"""
EXPERIMENTS = {}  # number: (what it shows, flags, published test accuracy)
for line in TABLE.strip().split("\n"):
    number, accuracies, _, what, flags = line.split("|")
    EXPERIMENTS[int(number)] = what.strip(), flags.split(), float(accuracies.split()[2])


def experiments(rows, argv):
    """--experiment: runs rows of the article's table. Flags given in argv win over a row's.

    Each row that is finished is appended to experiments.csv at once. Returns an exit status.
    """
    import pandas as pd

    done, status, path = [], 0, Path("experiments.csv")
    for number in rows:
        what, flags, published = EXPERIMENTS[number]
        args = parse([*flags, *argv])
        args.classifier = args.classifier if len(rows) == 1 else None  # a series is for its table
        say("row", f"{number}: {what} ({' '.join(flags)})")
        try:
            row = {"row": number, "what": what, "article": published / 100} | train(args)
        except (Fault, torch.OutOfMemoryError) as fault:  # the other rows can still run
            warn(f"error: row {number}: {printable(fault)}")
            status = 2
            continue
        done.append(row)
        if process()[0] == 0:
            pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)
    if done:
        table = pd.DataFrame(done).drop(columns=["bag_of_words", "seeds"]).set_index("row")
        percent = dict.fromkeys(("article", "here", "sd", "se"), "{:.2%}".format)
        say("table", "test accuracies, by the article and here; sd over seeds, se of the test set")
        for line in table.to_string(formatters=percent, na_rep="", justify="left").split("\n"):
            say("", line)
    return status


# ------------------------------------------------------------------------------------------------
# 10. The command line

OFFLINE = (
    "--data stdlib --model_size gpt2-nano --weights random --tokenizer bytes "
    "--trainable_layers all --learning_rate 1e-3 --num_epochs 3"
)
ACTIONS = {
    "train": train,
    "predict": predict,
    "predict_file": predict_file,
    "trace": trace,
    "evaluate": evaluate,
    "generate": speak,
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(f"{message} (--help explains the flags)")


def at_least(convert, low):
    """An argparse type: a finite number not below `low`."""

    def number(text):
        value = convert(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return value

    return number


def make_parser():
    parser = Parser(
        description="Turn GPT-2 into a text classifier, and use it.",
        epilog="This file is written to be read, from top to bottom.",
        allow_abbrev=False,
    )

    positive = at_least(int, 1)

    def flag(name, text, **how):  # in the group of the moment; without `how`, takes no value
        text += "" if how.get("default") is None else " (default: %(default)s)"
        group.add_argument(f"--{name}", help=text, **(how or {"action": "store_true"}))

    group = parser.add_argument_group("what to do (one of these)")
    group = group.add_mutually_exclusive_group(required=True)
    flag("train", "finetune, report, save")
    texts = "label and probability of each TEXT (-: of each line of standard input; none: typed)"
    flag("predict", texts, nargs="*", metavar="TEXT")
    rows = "the rows of a csv, tsv, jsonl or txt (a text a line) with label and probability added"
    flag("predict_file", f"{rows}, as CSV (-: csv from standard input)", metavar="FILE")
    flag("trace", "what the model believes after each token", metavar="TEXT")
    flag("evaluate", "metrics of a classifier on --data (none: the test part of its own)")
    flag("generate", "continue TEXT with the language model, greedily", metavar="TEXT")

    group = parser.add_argument_group("data")
    data = "sms, imdb, stdlib, or a path: csv, tsv, jsonl; a folder with train, validation and test"
    flag("data", f"{data} files; SMSSpamCollection or its zip (default: sms)", metavar="DATA")
    column = "name in any case; or position, from 0, in files with no header"
    flag("text_column", column, default="text")
    flag("label_column", column, default="label")
    balance = "as many texts of each label as of the rarest (default: for sms only)"
    flag("balance", balance, action=argparse.BooleanOptionalAction)
    flag("dedupe", "drop repeated texts before splitting")
    length = "cut texts to this many tokens (default: what the model reads)"
    flag("max_length", length, type=positive, metavar="TOKENS")
    filled = "fillers up to longest (training text), model (1,024), or a number (default: none)"
    flag("pad_to", filled, metavar="LENGTH")

    group = parser.add_argument_group("model")
    size = {"type": lambda name: name.split(" ")[0], "choices": SIZES, "default": "gpt2-small"}
    flag("model_size", 'the article\'s spelling "gpt2-small (124M)" is understood', **size)
    flag("weights", "pretrained, random, or a GPT-2 safetensors file", default="pretrained")
    flag("tokenizer", "bytes needs no download", choices=TOKENIZERS, default="gpt2")
    flag("disable_causal_mask", "every token sees every other")
    place = "the token that the head reads; flexible: the last that is no filler"
    flag("trainable_token_pos", place, choices=POSITIONS, default="last")
    flag("average_embeddings", "read the mean over all tokens")

    group = parser.add_argument_group("training")
    rows = "run these rows, 1 to 19, of the article's table; flags given beside it win"
    flag("experiment", rows, nargs="+", type=int, choices=EXPERIMENTS, metavar="N")
    flag("offline", f"nothing is downloaded: unless given, {OFFLINE}")
    learns = "what learns besides the new head"
    flag("trainable_layers", learns, choices=TRAINED_BLOCKS, default="last_block")
    flag("lora_rank", "the inner width of LoRA's B A", type=positive, default=8)
    flag("lora_alpha", "LoRA adds alpha / rank times B A", type=at_least(float, 0), default=8.0)
    flag("num_epochs", "times that each training text is seen", type=positive, default=5)
    flag("batch_size", "texts per batch", type=positive, default=8)
    flag("accumulation_steps", "batches per step", type=positive, default=1)
    flag("learning_rate", "of AdamW", type=at_least(float, 0), default=5e-5)
    flag("weight_decay", "of AdamW, on all that is trained", type=at_least(float, 0), default=0.1)
    flag("ignore_index", "number of a label that is not learnt from", type=int, default=-100)
    drawn = "of the head, of random weights and of the order of texts"
    flag("seed", drawn, type=at_least(int, 0), default=123)
    runs = "runs, from --seed on, for a mean and a standard deviation"
    flag("seeds", runs, type=positive, default=1)
    flag("resume", "go on after the last finished epoch")
    flag("log", "write losses and accuracies of each epoch", metavar="CSV")
    flag("plot", "draw them (needs matplotlib)", metavar="PICTURE")

    group = parser.add_argument_group("how it runs, and files")
    budget = "how many the model sees at a time, of short texts (default: CPU 512, else 2048)"
    flag("tokens_per_row", budget, type=positive, metavar="TOKENS")
    flag("no_feature_cache", "run frozen blocks in every epoch")
    flag("device", "(default: the best there is)", choices=("cuda", "mps", "cpu"))
    dtype = "of matrix products (default: bfloat16 on CUDA that has it, else float32)"
    flag("dtype", dtype, choices=("float32", "bfloat16"))
    flag("compile", "compile the blocks with torch.compile")
    flag("max_new_tokens", "of --generate", type=positive, default=25)
    written = {"default": DEFAULT_CLASSIFIER, "metavar": "FILE"}
    flag("classifier", "what training writes and prediction reads", **written)
    flag("output", "of --predict_file (default: standard output)", metavar="CSV")
    cache = os.path.join(torch.hub.get_dir(), "gpt_classify")
    flag("cache_dir", "where downloads stay", default=cache)
    return parser


def parse(argv):
    """Flags, checked against each other; what depends on the machine is filled in."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.offline:
        args = parser.parse_args([*OFFLINE.split(), *argv])
    for flag in ("offline", "experiment", "resume", "log", "plot"):
        if getattr(args, flag) and not args.train:
            raise Fault(f"--{flag} goes with --train")
    if args.output and not args.predict_file:
        raise Fault("--output goes with --predict_file")
    if args.average_embeddings and args.trainable_token_pos == "first":
        raise Fault("--average_embeddings reads all tokens, --trainable_token_pos first only one")
    n = args.pad_to
    if n not in (None, "longest", "model") and not (n.isdecimal() and int(n)):
        raise Fault(f"--pad_to {n} is neither longest, nor model, nor a number of tokens")
    if len(args.experiment or ()) > 1 and (args.resume or args.log or args.plot):
        raise Fault("--resume, --log and --plot are for one run, not for a series of rows")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf", ".jpg"):
        raise Fault(f"--plot {args.plot}: the name must end in .png, .svg, .pdf or .jpg")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise Fault("--plot needs matplotlib: pip install matplotlib")
    if args.resume and not Path(f"{args.classifier}.resume").exists():
        raise Fault(f"there is nothing to resume: {args.classifier}.resume does not exist")
    for name in (args.output, *((args.classifier, args.log, args.plot) if args.train else ())):
        if name and not Path(name).absolute().parent.is_dir():
            raise Fault(f"{name}: there is no such folder")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    device = args.device or ("cuda" if cuda else "mps" if mps else "cpu")
    if not {"cuda": cuda, "mps": mps, "cpu": True}[device]:
        raise Fault(f"--device {device}: there is none that torch can use on this machine")
    if args.data is None and not args.evaluate:
        args.data = "sms"
    if args.balance is None:
        args.balance = args.data is not None and is_sms(args.data)
    if args.dtype is None:
        fast = device == "cuda" and torch.cuda.is_bf16_supported()
        args.dtype = "bfloat16" if fast else "float32"
    if args.tokens_per_row is None:
        args.tokens_per_row = 512 if device == "cpu" else 2048
    index = os.environ.get("LOCAL_RANK", "0")  # torchrun's number of this process
    args.device = torch.device(f"cuda:{index}" if device == "cuda" else device)
    return args


def main(argv=None):
    """Runs one action. Returns an exit status: 0; 2 after a fault; 130 or 143 if interrupted."""

    def terminate(*_):  # SIGTERM ends a run just as Ctrl-C does, but for its status
        raise KeyboardInterrupt(143)

    argv, args = sys.argv[1:] if argv is None else argv, None
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        args = parse(argv)
        if args.train and "LOCAL_RANK" in os.environ:  # started by torchrun
            if args.device.type == "cuda":
                torch.cuda.set_device(args.device)
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        if args.experiment:
            return experiments(args.experiment, argv)
        action = next(name for name in ACTIONS if getattr(args, name) not in (None, False))
        ACTIONS[action](args)
        return 0
    except KeyboardInterrupt as stop:
        again = ""
        if args and args.train:
            again = ": the same command starts again; what is saved is whole"
            if Path(f"{args.classifier}.resume").exists() and len(args.experiment or []) < 2:
                again = ": the same command with --resume goes on after the last finished epoch"
        warn(f"\nstopped{again}")
        return stop.args[0] if stop.args else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        message = "standard output was closed before everything was written"
    except Fault as fault:
        message = str(fault)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = where + (error.strerror or str(error))
    except (MemoryError, RuntimeError) as error:
        wording = re.search("(out of|not enough|allocate) memory", str(error))
        if not (wording or isinstance(error, MemoryError)):
            raise
        message = "out of memory: try a smaller --model_size or --tokens_per_row"
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    warn("error: " + printable(" ".join(message.split())))
    return 2


if __name__ == "__main__":
    sys.exit(main())
