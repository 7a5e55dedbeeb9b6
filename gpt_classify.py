"""GPT-2 as a text classifier, in one file to be read from top to bottom.

    python gpt_classify.py --train --offline              # try it: under a minute, no download
    python gpt_classify.py --train                        # finetune GPT-2 to tell spam from ham
    python gpt_classify.py --predict "You are a winner"

It implements Sebastian Raschka's article "Building A GPT-Style LLM Classifier From Scratch"
(https://magazine.sebastianraschka.com/p/building-a-gpt-style-llm-classifier): take pretrained
GPT-2, replace the head that predicts the next token by one that predicts a label, and finetune.
One message on its way through GPT-2 small:

    "You are a winner"           the text
    [1639, 389, 257, 8464]       ids (4,): numbers of tokens, which are pieces of words
    wte[ids] + wpe[0, 1, 2, 3]   (4, 768): a vector for each token plus one for its position
    h[0] ... h[11], ln_f         (4, 768): twelve blocks; a token collects from earlier tokens
    the last vector              (1, 768): pooling; only this token has seen the whole message
    head                         (1, 2): logits, which are scores for ham and spam; softmax turns
                                 them into probabilities; the loss is -log(the right label's)

Four ideas organize the file:

1. A classifier pools: its head gets the hidden state of one token, or a mean. Which token that is,
   is fixed when a text becomes an Example (section 2).
2. A frozen block gives the same output for the same text in every epoch. So it runs once per text,
   and training uses the cached output, the features (section 3).
3. If the head reads only one token, the last block needs to compute only that one (section 1).
4. Packing replaces padding: texts lie end to end in one row of tokens, and the attention mask
   keeps them apart (section 1). So the model works on (T, C), without a batch dimension.

The article's seven questions, its answers, and where the code is. (Accuracy on 300 test messages;
guessing gets 50%. Each is one run: below about 3.5 points, a difference may well be chance.)

1. Do all layers need training?  Head alone 72.00%, last block 95.00%, last two blocks 98.33%,
                                 all layers 96.67% (make_classifier)
2. Pool the last or the first?   Last token 95.00%, first token 75.00% (Encoder)
3. How does BERT compare?        On movie reviews: GPT-2 91.88%, BERT 90.89% (Block; the file has
                                 RoBERTa, which is BERT's architecture, trained better)
4. Causal mask or none?          With it 95.00%, without it 95.33% (Row.mask)
5. Does size help?               124M 95.00%, 355M 84.67%, 774M 96.67%, 1,558M 98.33% (SIZES; the
                                 article suspects the pretraining of 355M, or these settings)
6. Does LoRA help?               LoRA 96.67%, all layers 96.67% (LoRALinear)
7. Padding or none?              To 120 tokens 95.00%, to 1,024 78.33%, none 98.33% (Row)

Sections 1 to 4 are the lesson: model, classifier, training, evaluation. `train` in section 7 joins
them. The rest is files, data and the command line. Shapes in comments: T tokens in a row, N texts
in it, Q pooled positions, C channels, H heads with D channels each, K labels. Section 9 has `args`
(the flags), `Fault` (an error that the user can fix) and `say` (which prints).
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import mmap
import os
import random
import re
import shlex
import signal
import socket
import sys
import tarfile
import time
import zipfile
from pathlib import Path

# torch's threads wait for each other in a busy loop. On a shared machine, such a loop can occupy
# the core that the other thread needs. So let them sleep after a short loop: beside another busy
# process, an epoch of --offline took 12 s instead of 20 to 90 s; alone, the same (2 cores, EPYC).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# pandas is loaded when it is first used, as in importlib's documentation: --predict needs none.
spec = importlib.util.find_spec("pandas")
spec.loader = importlib.util.LazyLoader(spec.loader)
sys.modules["pandas"] = pd = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pd)

# ------------------------------------------------------------------------------------------------
# 1. The model
#
# GPT-2 reads tokens. Its vocabulary comes from byte pair encoding: start with the 256 bytes, make
# the most frequent pair of neighbors in a large text a new token, and repeat that 50,000 times.
# With <|endoftext|>, which stands between documents, that makes 50,257 tokens.
#
# OpenAI published four sizes of one design. Only depth and width differ; all heads of attention
# have 64 channels. A block has 12 C² weights, 4 C² in attention and 8 C² in the MLP: 7.08M in GPT-2
# small.


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    n_layer: int  # number of blocks
    n_embd: int  # C, the width of the vectors between the blocks
    block_size: int = 1024  # longest text in tokens: there is one learned vector per position
    vocab_size: int = 50257
    causal: bool = True  # a token sees itself and earlier tokens only
    roberta: bool = False  # RoBERTa's architecture instead of GPT-2's: see Block and GPT


ROBERTA = {"block_size": 512, "vocab_size": 50265, "causal": False, "roberta": True}
SIZES = {
    "gpt2-nano": GPTConfig(4, 128, vocab_size=257),  # our own, for any machine; reads bytes
    "gpt2-small": GPTConfig(12, 768),  # 124M parameters
    "gpt2-medium": GPTConfig(24, 1024),  # 355M
    "gpt2-large": GPTConfig(36, 1280),  # 774M
    "gpt2-xl": GPTConfig(48, 1600),  # 1,558M
    "roberta-base": GPTConfig(12, 768, **ROBERTA),  # 124M
    "roberta-large": GPTConfig(24, 1024, **ROBERTA),  # 355M
}


class Attention(nn.Module):
    """Tokens collect information from each other ("Attention Is All You Need", arXiv:1706.03762).

    A token sends out a query. Each token that it sees answers with a key and a value; the better a
    key fits the query, the more of its value is taken: softmax(q k^T / sqrt(D)) v, with D channels
    per head. (Sums of D products grow like sqrt(D), and softmax of large numbers picks just one.)
    Several heads do this side by side, each with its own channels, so they can differ in what they
    look for.
    """

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_embd // 64
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x, mask, pool=slice(None)):
        """x (T, C); mask (T, T) bool, whether token i sees token j -> (Q, C): the output at the
        positions `pool`, by default at all T."""
        # Only the pooled positions need queries; all tokens need keys and values.
        q, k, v = self.c_q(x[pool]), self.c_k(x), self.c_v(x)
        # Divide the channels among the heads: (Q or T, C) -> (1, H, Q or T, D). The 1 is a batch
        # dimension: without one, torch's fused attention is 7 times slower on a CPU.
        q, k, v = (t.view(1, len(t), self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        # The formula, step by step:
        #     scores = q @ k.transpose(2, 3) / math.sqrt(D)           # (1, H, Q, T)
        #     scores = scores.masked_fill(~mask[pool], -math.inf)     # softmax makes this 0
        #     y = scores.softmax(3) @ v                               # (1, H, Q, D)
        # The fused version computes the same without storing the scores:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[pool])
        return self.c_proj(y.transpose(1, 2).flatten(2)[0])  # heads side by side again: (Q, C)


class MLP(nn.Module):
    """Works on each token by itself, (T, C) -> (T, C). Without a non-linearity in between, one
    matrix could replace the two. GELU, x * (share of a normal distribution below x), is a smooth
    max(x, 0); GPT-2 was trained with an approximation of it by tanh."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu = "none" if config.roberta else "tanh"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """Attention, then MLP. Each adds its output to x, so gradients reach the first block directly.

    LayerNorm keeps the numbers in range: it brings a token's vector to mean 0 and variance 1, then
    scales and shifts it: (x - mean(x)) / sqrt(var(x) + 1e-5) * weight + bias. GPT-2 normalizes the
    input of attention and MLP; BERT and RoBERTa normalize the sum. These two also use exact GELU
    and no causal mask.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.roberta = config.roberta

    def forward(self, x, mask, pool=slice(None)):
        """x (T, C) -> (Q, C). block(x, mask, pool) equals block(x, mask)[pool], with less work."""
        x = x.to(self.ln_1.weight.dtype)  # a frozen block may be in bfloat16 (section 2)
        if self.roberta:
            x = self.ln_1(x[pool] + self.attn(x, mask, pool))
            return self.ln_2(x + self.mlp(x))
        x = x[pool] + self.attn(self.ln_1(x), mask, pool)
        return x + self.mlp(self.ln_2(x))


@dataclasses.dataclass
class Example:
    """One text, ready for the model. Encoder (section 2) makes it."""

    ids: torch.Tensor  # (T,) int64: its tokens
    pool: range  # the positions whose hidden states the head gets; if several, their mean
    label: int = -1
    x: torch.Tensor | None = None  # features, once the frozen blocks have run


# Texts differ in length. The usual answer is padding: all texts are filled up to the length of the
# longest. The messages of the article have 31 tokens on average and 120 at most, so three quarters
# of its batches are padding. Here, texts are packed end to end instead:
#
#     text   0 0 0 0 1 1 2 2 2      which text a token belongs to
#     pos    0 1 2 3 0 1 0 1 2      its position in that text
#     pool         ^   ^     ^      the pooled positions: here, the last token of each text
#
# Attention is the only place where tokens see each other, so a mask in attention is enough to keep
# texts apart. A prediction depends on its own text only. (With the article's padding, it also
# changes with the number of padding tokens: issues 566 and 990 of
# github.com/rasbt/LLMs-from-scratch.) The price: attention computes scores between different texts
# and throws them away, so a row should not be too long (--tokens_per_row). For the texts above:
#
#     # . . . . . . . .      mask[i, j]: token i (line) sees token j (column)
#     # # . . . . . . .
#     # # # . . . . . .      text[i] == text[j] and pos[i] >= pos[j]
#     # # # # . . . . .
#     . . . . # . . . .      The first condition packs. The second makes the mask causal: GPT-2
#     . . . . # # . . .      learned to predict the next token, and must not see it. BERT and
#     . . . . . . # . .      RoBERTa learned to fill in missing tokens: they see both sides.
#     . . . . . . # # .
#     . . . . . . # # #


@dataclasses.dataclass
class Row:
    """Texts packed end to end. Index tensors are int64."""

    ids: torch.Tensor  # (T,)
    text: torch.Tensor  # (T,) text, pos and pool: see the drawing above
    pos: torch.Tensor  # (T,)
    pool: torch.Tensor  # (Q,)
    labels: torch.Tensor  # (N,)
    x: torch.Tensor | None  # features: (T, C), or (N, C), already pooled, if all blocks are frozen

    @classmethod
    def of(cls, examples, device="cpu"):
        """Packs a list of Examples, at least one. Either all of them have features, or none."""
        lengths = torch.tensor([len(e.ids) for e in examples])
        starts = lengths.cumsum(0) - lengths
        text = torch.repeat_interleave(lengths)  # lengths 4, 2, 3 give 0 0 0 0 1 1 2 2 2
        pool = [torch.tensor(e.pool) + start for e, start in zip(examples, starts)]
        return cls(
            ids=torch.cat([e.ids for e in examples]).to(device),
            text=text.to(device),
            pos=(torch.arange(len(text)) - starts[text]).to(device),
            pool=torch.cat(pool).to(device),
            labels=torch.tensor([e.label for e in examples], device=device),
            x=None if examples[0].x is None else torch.cat([e.x for e in examples]),
        )

    def mask(self, causal):
        """(T, T) bool: which token (line) sees which (column)."""
        same = self.text[:, None] == self.text
        return same & (self.pos[:, None] >= self.pos) if causal else same


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019) or RoBERTa
    (arXiv:1907.11692). No dropout: the article sets it to 0, too."""

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        # As nn.Embedding(rows, C), whose random numbers take a second, even without memory (build).
        table = nn.Embedding.from_pretrained
        self.wte = table(torch.empty(config.vocab_size, C), freeze=False)  # which token it is
        self.wpe = table(torch.empty(config.block_size, C), freeze=False)  # where it stands
        self.ln_e = nn.LayerNorm(C) if config.roberta else nn.Identity()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.Identity() if config.roberta else nn.LayerNorm(C)
        self.head = None  # a language model uses the token embedding again, see forward
        self.n_frozen = 0  # number of blocks, from the first, that are not trained

    def trained(self):
        """{name: parameter} of what is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def embed(self, row):
        return self.ln_e(self.wte(row.ids) + self.wpe(row.pos))  # (T, C)

    def hidden(self, row):
        """The plain way: all tokens through all blocks. Row -> hidden states (T, C)."""
        x, mask = self.embed(row), row.mask(self.config.causal)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x.float())

    # The fast way gives the same numbers. It can stop after the frozen blocks, so that their output
    # can be stored. And its last block computes only the pooled positions: if one token in thirty
    # is pooled, that is a fifth of the work.

    def run_blocks(self, x, row, start, stop):
        """Runs the blocks from `start` to `stop` - 1: x (T, C) -> (T, C). After the model's last
        block, x is pooled: (N, C)."""
        mask = row.mask(self.config.causal)
        for block in self.h[start:stop]:
            if block is not self.h[-1]:
                x = block(x, mask)
            else:
                x = self.ln_f(block(x, mask, row.pool).float())  # (Q, C)
                # The mean over the pooled positions of each text. In the drawing, the pooled
                # positions 3, 5 and 8 belong to the texts 0, 1 and 2.
                owner = row.text[row.pool]  # (Q,)
                total = x.new_zeros(len(row.labels), x.shape[1]).index_add(0, owner, x)
                x = total / torch.bincount(owner)[:, None]
        return x

    def forward(self, row):
        """Row -> logits (N, K); before section 2 replaces the head, (N, vocab_size)."""
        if row.x is None:
            x = self.run_blocks(self.embed(row), row, 0, self.config.n_layer)
        else:  # the frozen blocks have run
            x = self.run_blocks(row.x, row, self.n_frozen, self.config.n_layer)
        return x @ self.wte.weight.T if self.head is None else self.head(x)


# ------------------------------------------------------------------------------------------------
# 2. From language model to classifier
#
# First, pooling. GPT-2's mask is causal, so only the last token has seen the whole text. The first
# has seen only itself: the article's 75.00% comes from first words. With --pad_to 6, "You are a
# winner" becomes
#
#     You  are  a  winner  <|endoftext|>  <|endoftext|>
#
#     last       position 5, a padding token: the article's main recipe (without padding: winner)
#     first      position 0, You
#     flexible   position 3, winner: the last real token
#     mean       the mean over positions 0 to 5
#
# The model reads padding tokens like any others, which costs accuracy: in the article, the last
# padding token gives 95.00%, the last real token 98.33% (rows 1 and 16 of its table).


class Encoder:
    """Turns texts into Examples. After that, training need not know how texts are cut, padded or
    pooled.

    `tokenizer` is a tiktoken.Encoding, `to_roberta` maps its ids to RoBERTa's (or is None), `texts`
    are those of training, for --pad_to longest. Raises Fault if a flag asks for too many tokens.
    """

    def __init__(self, config, tokenizer, to_roberta, args, texts=()):
        self.tokenizer, self.to_roberta, self.causal = tokenizer, to_roberta, config.causal
        self.position = args.trainable_token_pos or ("first" if config.roberta else "last")
        self.start, self.end, self.padding = [], [], tokenizer.eot_token
        if config.roberta:
            self.start, self.end, self.padding = [0], [2], 1  # <s> text </s>, and <pad>
        self.max_length, self.pad_to = args.max_length or config.block_size, args.pad_to
        if args.pad_to == "longest":
            self.pad_to = min(self.max_length, max(map(len, self.tokens(texts))))
        if max(self.max_length, self.pad_to) > config.block_size:
            raise Fault(f"this model reads at most {config.block_size} tokens of a text")
        if self.pad_to:
            self.max_length = min(self.max_length, self.pad_to)

    def tokens(self, texts):
        """A list of texts -> a list of id lists, not cut yet."""
        # No GPT-2 token has more than 128 characters, so what is dropped here would be cut anyway.
        texts = [text[: 128 * self.max_length + 1] for text in texts]
        lists = self.tokenizer.encode_ordinary_batch(texts)  # <|endoftext|> is ordinary text
        if self.to_roberta:
            lists = [[self.to_roberta[i] for i in ids] for ids in lists]
        return [self.start + ids + self.end for ids in lists]

    def examples(self, texts, labels):
        """Lists of N texts and N label numbers -> a list of N Examples."""
        lists = self.tokens(texts)
        if cut := sum(len(ids) > self.max_length for ids in lists):
            print(f"note: cut to {self.max_length:,} tokens: {cut:,} texts", file=sys.stderr)
        return list(map(self.example, lists, labels))

    def example(self, ids, label):
        """One of the id lists -> Example."""
        if len(ids) > self.max_length:
            ids = ids[: self.max_length - len(self.end)] + self.end
        real, length = len(ids), max(len(ids), self.pad_to)
        ids = ids + [self.padding] * (length - real)
        pool = {
            "last": range(length - 1, length),
            "first": range(1),
            "flexible": range(real - 1, real),
            "mean": range(length),
        }[self.position]
        # Under the causal mask, what follows the pooled positions is not seen: leave it out.
        return Example(torch.tensor(ids[: pool.stop] if self.causal else ids), pool, label)


# LoRA ("Low-Rank Adaptation of Large Language Models", arXiv:2106.09685) leaves a matrix W as it
# is. It adds to it a trained matrix of rank r, which is the product of two small ones:
#
#     y = W x + b + (alpha / r) B A x        W (out, in) frozen; A (r, in) and B (out, r) trained
#
# For W (768, 768) and r = 8 these are 12,288 numbers instead of 589,824. B starts at zero, so the
# model starts unchanged. A starts random: if both were zero, neither would get a gradient. LoRA
# saves memory, not time: every block trains something, so there are no features to cache.


class LoRALinear(nn.Linear):
    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # no memory
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in the code of the paper

    def forward(self, x):
        return super().forward(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


# --trainable_layers: how many of the last blocks are trained; if at least one, ln_f too. None: all
# weights, or LoRA's matrices. The head is always trained.
TRAINED_BLOCKS = {"last_layer": 0, "last_block": 1, "last_two_blocks": 2, "all": None, "lora": None}


def make_classifier(model, n_labels, args):
    """Gives a GPT a head for n_labels, freezes what is not trained, moves it to args.device.

    The new head is random, and so are its first answers. Frozen blocks help although they never
    saw a label: training the head alone gives the article 72.00%. Raises Fault.
    """
    n_layer, C = model.config.n_layer, model.config.n_embd
    model.head = nn.Linear(C, n_labels)
    model.requires_grad_(args.trainable_layers == "all")
    model.head.requires_grad_(True)
    if (n_trained := TRAINED_BLOCKS[args.trainable_layers]) is not None:
        model.n_frozen = max(n_layer - n_trained, 0)
        model.h[model.n_frozen :].requires_grad_(True)
        model.ln_f.requires_grad_(n_trained > 0)
    if args.trainable_layers == "lora":
        if args.lora_rank > C:
            raise Fault(f"--lora_rank {args.lora_rank} exceeds the model's width, {C}")
        for module in list(model.modules()):
            if isinstance(module, (Attention, MLP)):
                for name, linear in list(module.named_children()):
                    setattr(module, name, LoRALinear(linear, args.lora_rank, args.lora_alpha))
    for p in model.trained().values():  # they may be views of a file (section 5): train a copy
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    # bfloat16 has 8 bits of precision. That is enough to compute with, and faster on processors
    # that have instructions for it. Trained weights stay in float32: a step changes a weight by
    # less than 8 bits can show, so rounding would undo it.
    if args.dtype == "bfloat16":
        model.h[: model.n_frozen].bfloat16()  # once; autocast would do it again for every row
        if args.device == "cuda":  # there, trained blocks multiply in bfloat16, too
            model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    return model.to(args.device)


# ------------------------------------------------------------------------------------------------
# 3. Training
#
# In short, without files, messages and accidents, `train` (section 7) does this:
#
#     model = make_classifier(build(config, weights), len(labels), args)
#     cache_features(model, train_examples + validation_examples + test_examples, args)
#     optimizer = torch.optim.AdamW(model.trained().values(), lr=5e-5, weight_decay=0.1)
#     for epoch in 1, 2, 3, 4, 5:
#         train_epoch(model, optimizer, train_examples, seed, epoch, args)
#     report("test", probabilities(model, test_examples, args), test_labels, labels)
#
# AdamW ("Decoupled Weight Decay Regularization", arXiv:1711.05101) divides gradients by their usual
# size. So a step moves each weight by about the learning rate. That is small, 5e-5, since GPT-2 is
# to keep most of what it knows. Decoupled: weight decay does not go through that division.
#
# torchrun can start several processes, which share the texts: in `rank, world = process()`, world
# is their number, and rank is which of them this is. For a single process, that is (0, 1).


def pack(examples, budget):
    """Yields the list of Examples in groups, in order. A group has at most `budget` tokens; a
    longer text is a group of its own."""
    group, size = [], 0
    for example in examples:
        if group and size + len(example.ids) > budget:
            yield group
            group, size = [], 0
        group.append(example)
        size += len(example.ids)
    if group:
        yield group


# If only the last of twelve blocks is trained, the other eleven compute the same in every epoch.
# So they run once, and the Examples keep the result: over five epochs, 11 + 5 block passes instead
# of 60. This needs a model without randomness, and without dropout it has none.


@torch.no_grad()
def cache_features(model, examples, args):
    """Stores the frozen blocks' output in each Example: x (T, C), or (1, C) if all are frozen. Not
    with --no_feature_cache, and not if (T, C) would take more than half of the free memory."""
    n, n_layer = model.n_frozen, model.config.n_layer
    for example in examples:
        example.x = None  # another seed's random weights may have left features here
    if n == 0 or args.no_feature_cache:
        return
    free = math.inf
    if args.device == "cuda":
        free = torch.cuda.mem_get_info()[0] / 1e9
    elif Path("/proc/meminfo").exists():
        free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) / 1e6
    tokens = sum(len(e.ids) for e in examples)
    needed = tokens * model.config.n_embd * model.h[0].ln_1.weight.itemsize / 1e9
    if n < n_layer and needed > free / 2:
        sizes = f"features of {needed:.3g} GB, {free:.3g} GB of memory free"
        return say("frozen", f"{n} of {n_layer} blocks, in every epoch: {sizes}")
    start = time.perf_counter()
    for group in progress(list(pack(examples, args.tokens_per_row)), "frozen blocks"):
        row = Row.of(group, args.device)
        x = model.run_blocks(model.embed(row), row, 0, n)
        lengths = [len(e.ids) if n < n_layer else 1 for e in group]
        for example, features in zip(group, x.split(lengths)):
            example.x = features
    texts = f"{len(examples):,} texts ({tokens:,} tokens)"
    seconds = time.perf_counter() - start
    say("frozen", f"{n} of {n_layer} blocks, once for all {texts}   {seconds:.1f} s")


def train_epoch(model, optimizer, examples, seed, epoch, args):
    """One pass over the training Examples. Returns their mean (loss, accuracy), measured on each
    text just before the model learns from it. Raises Fault if the loss is not finite."""
    rank, world = process()
    order = random.Random(f"{seed}, epoch {epoch}").sample(range(len(examples)), len(examples))
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    total = torch.zeros(2, device=args.device)  # sum of the losses, number of right answers
    for i, batch in enumerate(progress(batches, f"epoch {epoch}/{args.num_epochs}")):
        # The learning rate falls linearly to 0 over the run, so that training settles: with a
        # constant rate, the last few batches decide the result. The rate follows from the number
        # of the step, so a resumed run continues exactly.
        progress_made = (epoch - 1 + i / len(batches)) / args.num_epochs  # from 0 to 1
        factor = 1 - progress_made if args.lr_schedule == "linear" else 1
        optimizer.param_groups[0]["lr"] = args.learning_rate * factor
        optimizer.zero_grad()
        # If a batch were one row, this would do:
        #     F.cross_entropy(model(row), row.labels).backward()
        # backward() adds to the gradients. So a batch can be many rows, one at a time in memory, if
        # each adds the sum of its texts' losses divided by the size of the batch. (A mean of the
        # rows' means would give more weight to texts in rows with few others.)
        mine = [examples[j] for j in batch if j % world == rank]
        for group in pack(mine, args.tokens_per_row):
            row = Row.of(group, args.device)
            logits = model(row).float()
            loss = F.cross_entropy(logits, row.labels, reduction="sum")
            (loss / len(batch)).backward()
            total += torch.stack([loss.detach(), (logits.argmax(1) == row.labels).sum()])
        if world > 1:
            for p in model.trained().values():
                p.grad = add_up(torch.zeros_like(p) if p.grad is None else p.grad)
        optimizer.step()
    loss, accuracy = (add_up(total) / len(examples)).tolist()
    if not math.isfinite(loss):
        raise Fault("the loss is not a finite number: try a smaller --learning_rate")
    return loss, accuracy


@torch.no_grad()
def probabilities(model, examples, args):
    """A list of N Examples -> (N, K) float32 on the CPU: the probability of each label."""
    rank, world = process()
    found = torch.zeros(len(examples), model.head.out_features)
    mine = [found[:0]]
    for group in progress(list(pack(examples[rank::world], args.tokens_per_row)), "predicting"):
        mine.append(model(Row.of(group, args.device)).float().softmax(1).cpu())
    found[rank::world] = torch.cat(mine)  # every world-th text; the others' are 0 here
    return add_up(found).cpu()


# ------------------------------------------------------------------------------------------------
# 4. Evaluation
#
# A result needs its uncertainty, and something to compare it with. A bag of words is hard to beat
# where single words give the label away ("prize", "claim"): a few texts are enough to learn that.


def score(probs, true):
    """(N, K) probabilities and N true label numbers -> (mean loss, accuracy)."""
    loss = F.nll_loss(probs.clamp_min(1e-30).log(), true).item()
    return loss, (probs.argmax(1) == true).double().mean().item()


def interval(accuracy, n):
    """(low, high): 95% Wilson score interval of an accuracy on n texts, where the accuracy on all
    such texts plausibly lies. It makes sense even at 100%, or for two texts. (Wilson, 1927)"""
    z2 = 1.96**2
    half = math.sqrt(z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n * n)))
    return tuple((accuracy + z2 / (2 * n) + side) / (1 + z2 / n) for side in (-half, half))


def report(name, probs, true, labels):
    """Prints the accuracy and, for each label, precision (how many of the texts classified as this
    label have it), recall (how many of the texts with this label are classified as it), F1 (the
    harmonic mean of the two), and how its texts were classified. Returns a list of N numbers, 1 for
    a text that is classified correctly, else 0."""
    loss, accuracy = score(probs, true)
    pairs = torch.bincount(true * len(labels) + probs.argmax(1), minlength=len(labels) ** 2)
    confusion = pairs.view(len(labels), -1)
    right, texts, given = confusion.diag(), confusion.sum(1), confusion.sum(0)
    table = pd.DataFrame(index=list(map(printable, labels)))
    table["precision"], table["recall"] = (right / given).tolist(), (right / texts).tolist()
    table["F1"] = (2 * right / (given + texts)).tolist()
    macro, (low, high) = f"macro F1 {table['F1'].mean():.1%}", interval(accuracy, len(true))
    around = f"(95% interval {low:.1%} to {high:.1%}, {len(true):,} texts)"
    say(name, f"accuracy {accuracy:.2%} {around}, {macro}, loss {loss:.3f}")
    table = table.map(lambda share: "-" if math.isnan(share) else f"{share:.1%}")
    table["texts"] = texts.tolist()
    for j, label in enumerate(table.index if len(labels) <= 8 else ()):
        table[f"as {label}"] = confusion[:, j].tolist()
    say("", *table.to_string().split("\n"))
    return (probs.argmax(1) == true).long().tolist()


def baselines(texts, true, n_labels):
    """What is possible without a GPT, from {part: list of texts} and {part: list of label numbers}:
    {name: (N,) float64, 1 for each of the N test texts that it classifies correctly} of always the
    commonest label in training, and of a bag of words.

    The bag of words is a logistic regression on the set of words in a text, with an L2 penalty of
    1e-4. Nothing in it is random.
    """
    words, bags = {}, {}
    labels = {part: torch.tensor(true[part]) for part in true}
    for part in ("train", "test"):  # "" is in every text, so its weight is the bias
        words[part] = [{"", *re.findall(r"\w+", text)} for text in texts[part]]
    number = {word: i for i, word in enumerate(sorted(set().union(*words["train"])))}
    for part, sets in words.items():  # the words of all texts, end to end, and where a text starts
        ids = [sorted(number[word] for word in found if word in number) for found in sets]
        starts = torch.tensor([0, *map(len, ids)]).cumsum(0)[:-1]
        bags[part] = torch.tensor(list(itertools.chain(*ids))), starts
    model = nn.EmbeddingBag(len(number), n_labels, mode="sum")  # adds up the weights of the words
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(*bags["train"]), labels["train"])
        (loss + 1e-4 * model.weight.square().sum()).backward()
        optimizer.step()
    answers = {"commonest label": labels["train"].mode().values}
    answers["bag of words"] = model(*bags["test"]).argmax(1)
    return {name: (answer == labels["test"]).double() for name, answer in answers.items()}


def verdict(right, simple):
    """A line that compares a classifier with the best of the `baselines`. (N,) tensors: 1 for a
    text that is classified correctly, or the mean of that over seeds. Both saw the same texts, so
    only those count that one of the two alone gets right. If chance decides about these, McNemar's
    test (1947) says "not distinguishable" 19 times in 20, or more often."""
    name, other = max(simple.items(), key=lambda item: item[1].mean())
    ours, theirs = (right * (1 - other)).sum(), (other * (1 - right)).sum()
    certain = abs(ours - theirs) - 1 > 1.96 * math.sqrt(ours + theirs)
    word = ("above" if ours > theirs else "below") if certain else "not distinguishable from"
    counts = f"only this model gets {ours:.0f} texts right, only the baseline {theirs:.0f}"
    return f"{word} the {name} ({other.mean():.1%}): {counts}"


# ------------------------------------------------------------------------------------------------
# 5. Pretrained weights
#
# Weights are published as safetensors files: 8 bytes with the length of a header; the header, JSON
# with name, type, shape and place of each tensor; then the numbers. The file is mapped into memory:
# 548 MB "load" in milliseconds, and come from disk when first used. It holds data, no code; a
# damaged one mostly raises an error, which `blame` turns into a Fault.
# https://huggingface.co/docs/safetensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
BEGINNING = b'{"__metadata__": {"gpt_classify": '  # of the header of a file of this tool


@contextlib.contextmanager
def blame(what):
    """Turns any error in its body into a Fault that says `what` is wrong, with the reason."""
    try:
        yield
    except (Fault, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise Fault(f"{what} ({reason})") from error


def read_safetensors(path):
    """A safetensors file -> ({name: tensor}, {str: str} metadata). Raises Fault."""
    with open(path, "rb") as file, blame(f"{path} is not a complete safetensors file"):
        # COPY: whatever is done to the tensors, the file stays as it is.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        start = 8 + int.from_bytes(data[:8], "little")
        header, tensors = json.loads(bytes(data[8:start])), {}
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            t = torch.frombuffer(data[start:][begin:end], dtype=DTYPES[entry["dtype"]])
            if len(t) != math.prod(entry["shape"]):
                raise ValueError(f"is it cut short? {name} does not fit its shape")
            tensors[name] = t.view(entry["shape"])
    return tensors, metadata


@contextlib.contextmanager
def replacing(path):
    """Opens a file for writing bytes. It gets the name `path` once it is complete and on disk."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(path, tensors, info):
    """Writes {name: tensor}, and as metadata `info`, which must be such that JSON can hold it."""
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    header = {"__metadata__": {"gpt_classify": json.dumps(info)}}
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        entry = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
        header[name] = entry
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the numbers start at a multiple of 8
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            file.write(t.detach().cpu().reshape(-1).view(torch.uint8).numpy())


# What may be downloaded. The variable TORCH_HOME moves the folder, HF_ENDPOINT names another hub.
CACHE = Path(torch.hub.get_dir()) / "gpt_classify"
GPT2_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
ROBERTA_URL = "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/dict.txt"
ROBERTA_SHA256 = "2c31c5b236661067fe8626775eb995ef5fe808ac87d2ad4a6ddbef68550f5cc6"
BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SMS_URL = "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip"
SMS_SHA256 = "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3"
IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"


def download(url, path, sha256, instead):
    """The path of a file, downloaded if it is not there. torch.hub gives it this name only once its
    sha256 is right (None: we do not know it). Raises Fault."""
    way_out = f"try again, put it at {path}, {instead}, or see --offline"
    with blame(f"could not download {url}: {way_out}"):
        if not path.exists():
            socket.setdefaulttimeout(30)  # seconds that a server may be silent
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256, sys.stderr.isatty())
    return path


# GPT-2's tensors have the names of our GPT, but OpenAI's code computes x W with W (in, out), where
# nn.Linear stores (out, in), and c_attn is c_q, c_k and c_v in one. RoBERTa has other names:

ROBERTA_NAMES = """
    roberta.encoder.layer h           roberta.embeddings.word_embeddings wte
    attention.self.query attn.c_q     roberta.embeddings.position_embeddings wpe
    attention.self.key attn.c_k       roberta.embeddings.LayerNorm ln_e
    attention.self.value attn.c_v     attention.output.dense attn.c_proj
    intermediate.dense mlp.c_fc       attention.output.LayerNorm ln_1
    output.dense mlp.c_proj           output.LayerNorm ln_2
"""


def read_checkpoint(path):
    """A GPT-2 or RoBERTa file -> (GPTConfig, {name in our GPT: float32 tensor}). Raises Fault."""
    tensors, metadata = read_safetensors(path)
    if "gpt_classify" in metadata:
        raise Fault(f"{path} is a classifier; --weights takes a checkpoint of GPT-2 or RoBERTa")
    roberta, weights = any(name.startswith("roberta.") for name in tensors), {}
    with blame(f"{path} is not a checkpoint of GPT-2 or RoBERTa"):
        for name, t in tensors.items():
            if roberta:
                for theirs, ours in re.findall(r"(\S+) (\S+)", ROBERTA_NAMES):
                    name = name.replace(theirs, ours)
            elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                t = t.T
            weights[name.removeprefix("transformer.")] = t.float()  # a prefix of some files
        for name in [name for name in weights if "c_attn" in name]:
            for c, part in zip(("c_q", "c_k", "c_v"), weights.pop(name).chunk(3)):
                weights[name.replace("c_attn", c)] = part
        if roberta:  # positions count from 2, and all tokens are of type 0: wpe can hold both
            types = weights["roberta.embeddings.token_type_embeddings.weight"]
            weights["wpe.weight"] = weights["wpe.weight"][2:] + types[0]
        config = config_of(weights)
        build(config, weights)  # for its checks
    return config, weights


def config_of(weights, causal=True):
    """Reads a GPTConfig off {name in our GPT: tensor}. Raises KeyError, ValueError."""
    (vocab_size, C), (block_size, _) = weights["wte.weight"].shape, weights["wpe.weight"].shape
    n_layer = sum(name.endswith("attn.c_q.weight") for name in weights)
    if C % 64 or n_layer == 0:
        raise ValueError(f"{n_layer} blocks of width {C}, but heads have 64 channels")
    roberta = "ln_e.weight" in weights
    return GPTConfig(n_layer, C, block_size, vocab_size, causal and not roberta, roberta)


def build(config, weights=None):
    """A GPT around {name: tensor}, used in place. None: random ones as for GPT-2, normal with
    standard deviation 0.02, and the two c_proj of a block, which are added to x, scaled down by
    sqrt(2 n_layer). Raises KeyError, RuntimeError."""
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    if weights is None:
        weights = {}
        for name, p in model.named_parameters():
            weights[name] = torch.zeros(p.shape) if "bias" in name else torch.ones(p.shape)
            if "bias" not in name and "ln_" not in name:
                std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
                weights[name].normal_(0, std)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    return model


def starting_point(args):
    """(GPTConfig, weights) that a run starts from: published weights, those of a file, or None if
    they are to be random. Raises Fault."""
    size, path = args.model_size, args.weights
    if args.weights == "pretrained":
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        owner = "FacebookAI" if SIZES[size].roberta else "openai-community"
        url = f"{hub}/{owner}/{size.removesuffix('-small')}/resolve/main/model.safetensors"
        sha256 = GPT2_SHA256 if size == "gpt2-small" else None
        path = download(url, CACHE / f"{size}.safetensors", sha256, "name a file with --weights")
    config, weights = (SIZES[size], None) if path == "random" else read_checkpoint(path)
    if config != SIZES.get(size, config):
        raise Fault(f"{path} is not {size}: leave out --model_size, or choose other --weights")
    causal = config.causal and not args.disable_causal_mask
    return dataclasses.replace(config, causal=causal), weights


def get_tokenizer(vocab_size):
    """(tiktoken.Encoding, to_roberta) for Encoder. A vocabulary of 257 is the bytes and one end of
    text, one of 50,265 RoBERTa's: GPT-2's tokens with other numbers. Raises Fault."""
    if vocab_size == 257:
        ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        how = {"pat_str": r"[\s\S]", "mergeable_ranks": ranks, "special_tokens": special}
        return tiktoken.Encoding("bytes", **how), None
    if vocab_size < 50257:
        raise Fault(f"there is no tokenizer for a vocabulary of {vocab_size:,} tokens")
    folder = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE / "tiktoken")))
    for url in (f"{BPE_URL}vocab.bpe", f"{BPE_URL}encoder.json"):
        # Under the name that tiktoken gives it. tiktoken itself waits for a silent server forever.
        path = folder / hashlib.sha1(url.encode()).hexdigest()
        download(url, path, None, "set TIKTOKEN_CACHE_DIR")
    with blame(f"no GPT-2 vocabulary in {folder}: set TIKTOKEN_CACHE_DIR to another folder"):
        tokenizer = tiktoken.get_encoding("gpt2")
    if vocab_size != ROBERTA["vocab_size"]:
        return tokenizer, None
    path = CACHE / "roberta-dict.txt"
    download(ROBERTA_URL, path, ROBERTA_SHA256, "use a GPT-2 model")
    # A line holds GPT-2's number of a token, and a count. The token of the first line has RoBERTa's
    # number 4, the next one 5, and so on; 0 to 3 are <s>, <pad>, </s> and <unk>.
    words = [line.split()[0] for line in path.read_text().splitlines()]
    return tokenizer, {int(word): i for i, word in enumerate(words, 4) if word.isdigit()}


# ------------------------------------------------------------------------------------------------
# 6. Data
#
# Everything becomes a DataFrame with the columns text and label, in the parts train, validation and
# test. pandas must leave cells as they are: by default it takes the text "NA" for a missing one
# and the label "007" for the number 7.

PARTS = {"train": "train", "validation": "validation val valid dev", "test": "test"}
KINDS = (".csv", ".tsv", ".jsonl")


def read_table(path):
    """Yields a csv, tsv or jsonl file as DataFrames of up to 1,000 rows, dtype object, since a file
    may not fit in memory. Raises Fault."""
    kind = Path(path).suffix.lower()
    if kind not in KINDS:
        raise Fault(f"{path} is not a table: its name must end in {' or '.join(KINDS)}")
    what = blame(f"{path} cannot be read as {kind[1:]} in UTF-8")
    with open(path, encoding="utf-8-sig", newline="") as file, what:
        if kind == ".jsonl":
            lines = filter(str.strip, file)
            while chunk := list(itertools.islice(lines, 1000)):
                yield pd.DataFrame(map(json.loads, chunk), dtype=object)
            return
        header, separator = file.readline(), "," if kind == ".csv" else "\t"
        for other in ",;\t" if separator not in header else "":
            if other in header:
                way_out = "name it .tsv" if other == "\t" else f"save it with {separator!r}"
                raise Fault(f"{path} seems to separate cells by {other!r}: {way_out}")
        file.seek(0)
        how = {"sep": separator, "dtype": object, "keep_default_na": False, "chunksize": 1000}
        for frame in pd.read_csv(file, **how):
            if type(frame.index) is not pd.RangeIndex:  # pandas took first cells for row names
                raise ValueError("its rows have more cells than its header")
            yield frame


def find_column(frame, wanted, flag, path):
    """The DataFrame's column with that name, if need be in upper or lower case."""
    same = [name for name in frame if name == wanted]
    found = same or [name for name in frame if str(name).lower() == wanted.lower()]
    if len(found) != 1:
        there = ", ".join(map(repr, frame))
        raise Fault(f"{path} has the columns {there}, not {wanted!r}: name yours with --{flag}")
    return found[0]


def read_texts(path, args):
    """A table -> DataFrame of text and label, as strings; empty ones if there is none."""
    frame = pd.concat([pd.DataFrame(), *read_table(path)], ignore_index=True)
    if frame.empty:
        raise Fault(f"{path} has no rows")
    text = frame[find_column(frame, args.text_column, "text_column", path)]
    label = frame[find_column(frame, args.label_column, "label_column", path)]
    text = text.map(lambda cell: cell if isinstance(cell, str) else "")
    label = label.where(label.notna(), "").map(lambda cell: str(cell).strip())
    return pd.DataFrame({"text": text, "label": label}, dtype=object)


def read_stdlib(count=1200):
    """Texts that are on every machine with Python, from its standard library: assignments ("code")
    and first paragraphs of docstrings ("prose"). 30 to 200 characters, `count` of each."""
    found, documented = {"code": set(), "prose": set()}, (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in Path(os.__file__).parent.glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, documented):
                paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                found["prose"].add(" ".join(paragraph.split()))
            elif isinstance(node, ast.Assign):
                found["code"].add(ast.unparse(node))
    rows = []
    for label, texts in found.items():
        texts = sorted(text for text in texts if 30 <= len(text) <= 200 and "\n" not in text)
        if len(texts) < count:
            raise Fault("the sources of Python's standard library are not on this machine")
        rows += [(text, label) for text in random.Random(123).sample(texts, count)]
    return pd.DataFrame(rows, columns=["text", "label"])


def is_sms(name):
    return name == "sms" or Path(name).name == "SMSSpamCollection"


def read_data(args):
    """What --data names, as a DataFrame of text, label and, if it comes split, part. Rows without
    text or label are left out. Raises Fault."""
    path, instead = Path(args.data), "name a file of your own with --data"
    if is_sms(args.data):  # label, tab, message; a quotation mark is an ordinary character
        with blame(f"{args.data} is not the SMS Spam Collection"):
            if args.data == "sms":
                archive = zipfile.ZipFile(download(SMS_URL, CACHE / "sms.zip", SMS_SHA256, instead))
                path = archive.open("SMSSpamCollection")
            how = {"sep": "\t", "quoting": csv.QUOTE_NONE, "dtype": object}
            frame = pd.read_csv(path, names=["label", "text"], keep_default_na=False, **how)
            frame = frame.fillna("")
    elif args.data == "imdb":  # 50,000 movie reviews; their test half stays the test part
        rows, path = [], download(IMDB_URL, CACHE / "imdb.tar.gz", IMDB_SHA256, instead)
        with blame(f"{path} is damaged: delete it"), tarfile.open(path) as archive:
            for member in archive:
                if match := re.fullmatch(r"aclImdb/(train|test)/(pos|neg)/.*", member.name):
                    rows.append((*match.groups(), archive.extractfile(member).read().decode()))
        frame = pd.DataFrame(sorted(rows), columns=["part", "label", "text"])
        validation = frame[frame["part"] == "train"].sample(frac=0.1, random_state=123).index
        frame.loc[validation, "part"] = "validation"
    elif args.data == "stdlib":
        frame = read_stdlib()
    elif path.is_dir():
        tables = []
        for part, stems in PARTS.items():
            stems = stems.split()
            files = [f for f in path.iterdir() if f.stem in stems and f.suffix.lower() in KINDS]
            if len(files) != 1:
                names = " or ".join(stems)
                raise Fault(f"{path} needs one table named {names}, and has {len(files)}")
            tables.append(read_texts(files[0], args).assign(part=part))
        frame = pd.concat(tables, ignore_index=True)
    else:
        frame = read_texts(path, args)
    keep = (frame["text"].str.strip() != "") & (frame["label"] != "")
    if not keep.all():
        say("data", f"{(~keep).sum():,} rows without text or label are left out")
    return frame[keep]


def split_data(frame, args):
    """A DataFrame from read_data -> ({part: DataFrame}, labels), with a report. The labels are
    those of training, sorted; a label's index is its number. Raises Fault."""
    notes = []
    if args.dedupe:
        notes.append(f"{frame['text'].duplicated().sum():,} repeats are dropped")
        frame = frame.drop_duplicates("text")
    given = frame[frame["part"] != "train"] if "part" in frame else frame[:0]
    frame = frame.drop(given.index)
    found = set(frame["label"])
    labels = sorted(found)
    if all(map(str.isdecimal, found)):
        labels.sort(key=int)
    if len(labels) < 2:
        raise Fault(f"{args.data} needs at least two labels, not {labels}: see --label_column")
    if args.balance:  # drawn as in the article
        groups = [group for _, group in frame.groupby("label", sort=False)]
        n = min(map(len, groups))
        frame = pd.concat(g.sample(n, random_state=123) if len(g) > n else g for g in groups)
    if "part" not in frame:  # shuffle; then 70% train, 10% validation, 20% test
        frame, n = frame.sample(frac=1, random_state=123), len(frame)
        if is_sms(args.data):  # as in the article
            place = pd.Series(range(1, n + 1), frame.index)
            train, validation = int(n * 0.7), int(n * 0.7) + int(n * 0.1)
        else:  # stratified: label by label
            groups = frame.groupby("label")["label"]
            place = (groups.cumcount() + 0.5) / groups.transform("size")
            train, validation = 0.7, 0.8
        part = place.map(lambda p: list(PARTS)[(p > train) + (p > validation)])
        frame = frame.assign(part=part)
    frame = pd.concat([frame, given])
    parts = {part: frame[frame["part"] == part] for part in PARTS}
    for part, table in parts.items():
        if table.empty:
            few = f"{len(frame):,} texts with {len(labels):,} labels leave none for {part}"
            raise Fault(f"{args.data}: {few}: 10 of each are enough; or see --label_column")
        if unknown := set(table["label"]) - found:
            raise Fault(f"{args.data}: {part} has the label {min(unknown)!r}, training has not")
        if missing := found - set(table["label"]):
            notes.append(f"no {part} text has the label {min(missing)}")
    if repeats := parts["test"]["text"].isin(parts["train"]["text"]).sum():
        total = f"{repeats:,} of the {len(parts['test']):,} test texts"
        notes.append(f"{total} also occur in training: --dedupe drops repeats")
    counts = frame["label"].value_counts()
    shown = ", ".join(f"{counts[label]:,} {label}" for label in labels[:8])
    shown = ("balanced, " if args.balance else "") + shown + (", ..." if len(labels) > 8 else "")
    sizes = ", ".join(f"{len(table):,} {part}" for part, table in parts.items())
    say("data", f"{args.data}: {len(frame):,} texts ({shown}): {sizes}", *notes)
    return parts, labels


# ------------------------------------------------------------------------------------------------
# 7. A run from beginning to end
#
# After each epoch, a run saves what it needs to continue: trained weights, AdamW's averages, and
# its results so far. There is no random state to save, since the order of the texts follows from
# seed and epoch. So a run may be killed at any moment after its first epoch: on the same machine,
# --resume leads to the same classifier file, bit for bit.


def fit(model, optimizer, examples, seed, done, args):
    """The epochs of one seed, from done["epoch"] on. The result is that of the last one, as in the
    article: with 149 validation texts, the best of five epochs would be the luckiest one."""
    true = torch.tensor([e.label for e in examples["validation"]])
    for epoch in range(done["epoch"] + 1, args.num_epochs + 1):
        start = time.perf_counter()
        train = train_epoch(model, optimizer, examples["train"], seed, epoch, args)
        validation = score(probabilities(model, examples["validation"], args), true)
        seconds = time.perf_counter() - start
        entry = {"seed": seed, "epoch": epoch, "examples_seen": epoch * len(examples["train"])}
        entry |= dict(zip(("train_loss", "train_accuracy"), train))
        entry |= dict(zip(("validation_loss", "validation_accuracy"), validation))
        done["history"].append(entry | {"seconds": seconds})
        done["epoch"] = epoch
        if args.classifier:
            state = optimizer.state_dict()["state"].items()
            averages = {f"{i} {name}": t for i, tensors in state for name, t in tensors.items()}
            write_safetensors(f"{args.classifier}.resume", model.trained() | averages, done)
        if args.log:
            with replacing(args.log) as file:
                pd.DataFrame(done["history"]).to_csv(file, index=False, float_format="%.6g")
        shown = f"train {train[1]:6.1%}   validation {validation[1]:6.1%}   {seconds:.1f} s"
        say(f"epoch {epoch}/{args.num_epochs}", f"loss {train[0]:.3f}   {shown}")


def restore(tensors, model, optimizer):
    """Puts the tensors that `fit` saved back into a model and its optimizer."""
    model.load_state_dict({name: tensors[name] for name in model.trained()}, strict=False)
    state, averages = {}, ("step", "exp_avg", "exp_avg_sq")
    for i in range(len(model.trained())):
        state[i] = {name: tensors[f"{i} {name}"].clone() for name in averages}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def hashes(texts):
    """A list of N texts -> (N,) int64: 64 bits of the hash of each."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])


def plot(path, history):
    """Draws loss and accuracy over the epochs; of several seeds, the mean."""
    pairs = [(f"train_{what}", f"validation_{what}") for what in ("loss", "accuracy")]
    how = {"subplots": pairs, "layout": (1, 2), "figsize": (10, 4), "style": ".-"}
    axes = pd.DataFrame(history).groupby("epoch").mean().plot(y=[*pairs[0], *pairs[1]], **how)
    with replacing(path) as file:
        axes[0, 0].figure.savefig(file, format=Path(path).suffix[1:])


def train(args):
    """--train: read, encode, finetune, report, save. Returns a row for a table of results."""
    check_outputs(args)
    began, unfinished = time.perf_counter(), Path(f"{args.classifier}.resume")
    rank, world = process()
    if rank > 0:  # only the first process writes files
        args.classifier = args.log = args.plot = None
    config, weights = starting_point(args)  # what has to be downloaded comes first
    tokenizer, to_roberta = get_tokenizer(config.vocab_size)
    parts, labels = split_data(read_data(args), args)

    texts = {part: df["text"].tolist() for part, df in parts.items()}
    true = {part: list(map(labels.index, df["label"])) for part, df in parts.items()}
    encoder = Encoder(config, tokenizer, to_roberta, args, texts["train"])
    examples = {part: encoder.examples(texts[part], true[part]) for part in parts}
    simple = baselines(texts, true, len(labels))
    commonest, bag = (right.mean().item() for right in simple.values())
    say("baseline", f"always the commonest label {commonest:.1%}; bag of words {bag:.1%} (test)")

    flags = {flag: value for flag, value in vars(args).items() if flag not in NO_EFFECT}
    flags["data with sha256"] = hashlib.sha256(json.dumps([texts, true]).encode()).hexdigest()
    done = {"flags": flags, "epoch": 0, "history": [], "right": []}
    tensors = None
    if args.resume:
        if not unfinished.exists():
            raise Fault(f"there is no unfinished run {unfinished}: leave out --resume")
        tensors, metadata = read_safetensors(unfinished)
        with blame(f"{unfinished} is not an unfinished run"):
            saved = json.loads(metadata["gpt_classify"])
            done["epoch"] = int(saved["epoch"])
            done["history"], done["right"] = list(saved["history"]), list(saved["right"])
            for flag, now in flags.items():
                if (before := saved["flags"][flag]) != now:
                    raise Fault(f"the unfinished run had --{flag} {before}, not {now}")
            seed = args.seed[len(done["right"])]
            say("resumed", f"after epoch {done['epoch']} of seed {seed}")

    # A seed decides the head, random weights and the order of texts; the split is always the same.
    # So the deviation over seeds measures luck in training. The 95% interval of an accuracy
    # measures luck in the choice of the test texts.
    for n, seed in enumerate(args.seed[len(done["right"]) :]):
        torch.manual_seed(seed)
        model = build(config, weights)
        base = model.state_dict()
        model = make_classifier(model, len(labels), args)
        n_all = sum(p.numel() for p in model.parameters()) / 1e6
        n_trained = sum(p.numel() for p in model.trained().values()) / 1e6
        if n == 0:
            shown = f"{args.model_size or 'checkpoint'}, {args.weights}, {n_all:,.1f}M parameters"
            dtype = f"; frozen blocks in {args.dtype}" if model.n_frozen else ""
            say("model", f"{shown}, {n_trained:,.2f}M trained ({args.trainable_layers}){dtype}")
        if n == 0 or weights is None:  # features of the same weights serve all seeds
            cache_features(model, [e for part in parts for e in examples[part][rank::world]], args)
        how = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(model.trained().values(), **how)
        if tensors:
            with blame(f"{unfinished} is not an unfinished run of this model"):
                restore(tensors, model, optimizer)
            tensors = None
        fit(model, optimizer, examples, seed, done, args)
        probs = probabilities(model, examples["test"], args)  # once: nothing is chosen by it
        name = "test" if len(args.seed) == 1 else f"seed {seed}"
        done["right"].append(report(name, probs, torch.tensor(true["test"]), labels))
        done["epoch"] = 0
        if args.classifier and seed == args.seed[0]:
            kept = model.trained() if args.weights == "pretrained" else base | model.trained()
            info = {"labels": labels, "flags": flags | {"pad_to": encoder.pad_to}}
            seen = {"training_texts": hashes(texts["train"])}
            write_safetensors(args.classifier, kept | seen, info)

    right = torch.tensor(done["right"], dtype=torch.float64)  # (seeds, test texts)
    mean, sd = right.mean().item(), pd.Series(right.mean(1).tolist()).std()  # of one seed: nan
    low, high = interval(mean, right.shape[1])
    if len(args.seed) > 1:
        around = f"standard deviation over the seeds {sd:.2%}; for the choice of test texts, 95%"
        say("test", f"mean accuracy {mean:.2%} ({around} interval {low:.1%} to {high:.1%})")
    say("verdict", verdict(right.mean(0), simple))
    if low <= commonest:
        better = "not clearly better than the commonest label"
        say("", f"{better}: if training accuracy is low, too, try more --num_epochs")
    if args.plot:
        plot(args.plot, done["history"])
    seconds = time.perf_counter() - began
    if args.classifier:
        unfinished.unlink()
        size = f"{os.path.getsize(args.classifier) / 1e6:,.1f} MB"
        say("saved", f"{args.classifier} (seed {args.seed[0]}, {size}), {seconds:.0f} s in all")
        command = ["--classifier", args.classifier, "--predict", texts["test"][0][:50].strip(" -")]
        say("try", f"python {os.path.relpath(__file__)} {shlex.join(command)}")
    row = {"trained": n_trained, "test": mean, "sd": sd, "low": low, "high": high}
    return row | {"bag_of_words": bag, "seeds": len(args.seed), "seconds": round(seconds, 1)}


# The article's experiments: its test accuracy in %, what a row shows, and flags on top of ARTICLE
# (github.com/rasbt/LLMs-from-scratch, folder ch06/02_bonus_additional-experiments). Row 15 there
# accumulates the gradients of 8 batches of 1, which here is a batch of 8. Row 18 is row 1, since
# --ignore_index does not reach the training loop there. Its LoRA multiplies by alpha, where the
# paper and this file multiply by alpha / rank.

ARTICLE = "--pad_to longest --lr_schedule constant"
EXPERIMENTS = """
95.00 | main recipe |
75.00 | first token | --trainable_token_pos first
72.00 | last layer | --trainable_layers last_layer
98.33 | last two blocks | --trainable_layers last_two_blocks
96.67 | all layers | --trainable_layers all
84.67 | gpt2-medium | --model_size gpt2-medium
96.67 | gpt2-large | --model_size gpt2-large
98.33 | gpt2-xl | --model_size gpt2-xl
98.67 | gpt2-xl, all layers | --model_size gpt2-xl --trainable_layers all
93.67 | random weights | --weights random --trainable_layers all
96.67 | LoRA | --trainable_layers lora --lora_rank 16 --lora_alpha 256
98.33 | gpt2-xl, LoRA | --model_size gpt2-xl --trainable_layers lora --lora_rank 16 --lora_alpha 128
78.33 | padded to 1,024 | --pad_to 1024
98.00 | no padding, batch of 1 | --pad_to 0 --batch_size 1
98.33 | no padding, batch of 8 | --pad_to 0
98.33 | last real token | --trainable_token_pos flexible
95.33 | no causal mask | --disable_causal_mask
95.00 | ignore_index |
96.33 | mean of all tokens | --trainable_token_pos mean
""".strip().split("\n")


def experiments(args, argv):
    """--experiment: runs rows of that table; flags in argv win over a row's. Prints a table of the
    results. Returns the exit status."""
    rows, status = [], 0
    for number in args.experiment:
        accuracy, what, flags = map(str.strip, EXPERIMENTS[number - 1].split("|"))
        flags = [*ARTICLE.split(), *flags.split(), *argv]  # of two of a kind, the last one counts
        say("row", f"{number}: {what} ({shlex.join(flags)})")
        row = {"row": number, "what": what, "article": float(accuracy) / 100}
        try:
            rows.append(row | train(parse(flags)))
        except (Fault, torch.OutOfMemoryError) as fault:  # the other rows can still run
            print(f"error: row {number}: {printable(fault)}", file=sys.stderr)
            status = 2
    if rows:
        table = pd.DataFrame(rows).to_string(index=False, na_rep="-", float_format="{:.4f}".format)
        say("table", "test accuracy, sd over seeds, 95% interval (low, high)", *table.split("\n"))
    return status


# ------------------------------------------------------------------------------------------------
# 8. Using a classifier


class Classifier:
    """The classifier in the file args.classifier. Raises Fault if it is not one."""

    def __init__(self, args):
        if not Path(args.classifier).exists():
            raise Fault(f"there is no classifier {args.classifier}: train one with --train")
        tensors, metadata = read_safetensors(args.classifier)
        with blame(f"{args.classifier} is not a classifier of this tool"):
            info = json.loads(metadata["gpt_classify"])
            here = {flag: getattr(args, flag) for flag in ("device", "dtype", "tokens_per_row")}
            self.labels, self.flags = info["labels"], argparse.Namespace(**info["flags"] | here)
            self.training_texts = set(tensors.pop("training_texts").tolist())
            if self.flags.weights == "pretrained":
                config, weights = starting_point(self.flags)
            else:
                weights, config = tensors, config_of(tensors, not self.flags.disable_causal_mask)
            self.encoder = Encoder(config, *get_tokenizer(config.vocab_size), self.flags)
            self.model = make_classifier(build(config, weights), len(self.labels), self.flags)
            tensors = {name: tensors[name] for name in self.model.trained()}
            self.model.load_state_dict(tensors, strict=False)
            self.encoder.examples(["a"], [-1])  # what is wrong with these flags shows here

    def __call__(self, texts):
        """A list of N texts -> (N, K) probabilities."""
        examples = self.encoder.examples([text or " " for text in texts], [-1] * len(texts))
        return probabilities(self.model, examples, self.flags)

    def answers(self, texts):
        """[(label, probability)], as strings; empty ones for a text without content."""
        best = zip(texts, *(t.tolist() for t in self(texts).max(1)))
        return [(self.labels[i], f"{p:.4f}") if text.strip() else ("", "") for text, p, i in best]


def predict(args):
    """--predict: label, probability and text, separated by tabs, a line for each text."""
    classifier, texts = Classifier(args), args.predict
    if texts in ([], ["-"]):
        if sys.stdin.isatty():
            print("type a text and press Enter; Ctrl-D ends", file=sys.stderr)
        texts = (line.decode(errors="replace").rstrip("\r\n") for line in sys.stdin.buffer)
    for text in texts:
        [(label, probability)] = classifier.answers([text])
        print(printable(label), probability, printable(text), sep="\t", flush=True)


def predict_file(args):
    """--predict_file: the rows of a table with two more columns, as CSV. 1,000 rows at a time."""
    path, show = args.predict_file, printable if sys.stdout.isatty() else str
    classifier, chunks = Classifier(args), read_table(path)
    first = next(chunks, pd.DataFrame())
    name = args.text_column or classifier.flags.text_column
    column, added = find_column(first, name, "text_column", path), []
    for name in ("label", "probability"):
        while name in first:
            name = f"predicted_{name}"
        added.append(name)
    for n, chunk in enumerate(itertools.chain([first], chunks)):
        if late := set(chunk) - set(first):
            raise Fault(f"{path}: the column {min(late)!r} is not in the first 1,000 rows")
        chunk = chunk.reindex(columns=first.columns)
        answers = classifier.answers([t if isinstance(t, str) else "" for t in chunk[column]])
        answers = pd.DataFrame(answers, chunk.index, added, dtype=object)
        table = pd.concat([chunk, answers], axis=1)
        table = table.where(table.notna(), "").rename(columns=show)
        table = table.map(lambda cell: show(cell if isinstance(cell, str) else json.dumps(cell)))
        # All cells are quoted: before Python 3.13, csv forgets to quote a lone carriage return.
        table.to_csv(sys.stdout, index=False, header=n == 0, quoting=csv.QUOTE_ALL)
        sys.stdout.flush()


@torch.no_grad()
def trace(args):
    """--trace: what a classifier believes after each token. One forward pass is enough: under the
    causal mask, a token's hidden state is that of a text which ends there."""
    classifier = Classifier(args)
    encoder, names = classifier.encoder, list(map(printable, classifier.labels))
    if not encoder.causal or encoder.position == "first" or encoder.pad_to:
        raise Fault("--trace needs a causal model that does not pool at the first token or padding")
    (example,) = encoder.examples([args.trace or " "], [-1])
    hidden = classifier.model.hidden(Row.of([example], args.device))  # (T, C)
    if encoder.position == "mean":
        hidden = hidden.cumsum(0) / torch.ones_like(hidden).cumsum(0)
    probs = classifier.model.head(hidden).float().softmax(1).cpu()
    for token, p in zip(example.ids.tolist(), probs):
        piece = encoder.tokenizer.decode_single_token_bytes(token)
        text = printable(piece.decode(errors="replace"))
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            belief = int(200 * p[probs[-1].argmax()])  # in the label that wins in the end
            text = f"\x1b[48;2;{belief};80;{200 - belief};38;2;255;255;255m{text}\x1b[0m"
        print(f"{names[p.argmax()]:{max(map(len, names))}}  {float(p.max()):6.1%}  {text}")


def evaluate(args):
    """--evaluate: reports on labeled texts, without those that the classifier was trained on."""
    classifier = Classifier(args)
    for flag in ("data", "text_column", "label_column"):  # by default, those of its training
        setattr(args, flag, getattr(args, flag) or getattr(classifier.flags, flag))
    frame = read_data(args)
    new = [h not in classifier.training_texts for h in hashes(frame["text"]).tolist()]
    frame = frame[new]
    seen = f"{new.count(False):,} left out: the classifier was trained on them"
    say("data", f"{args.data}: {sum(new):,} texts; {seen}")
    if frame.empty:
        raise Fault(f"{args.data} has no labeled text that is new to the classifier")
    if unknown := set(frame["label"]) - set(classifier.labels):
        raise Fault(f"{args.data} has the label {min(unknown)!r}, which the classifier has not")
    true = torch.tensor(list(map(classifier.labels.index, frame["label"])))
    texts = frame["text"].tolist()
    probs = classifier(texts)
    report("test", probs, true, classifier.labels)
    best, given = probs.max(1)
    wrong = [i for i in best.argsort(descending=True, stable=True).tolist() if given[i] != true[i]]
    say("mistakes", f"{len(wrong):,}{', the most confident first:' if wrong else ''}")
    for i in wrong[:10]:
        label, answer = classifier.labels[true[i]], classifier.labels[given[i]]
        say("", f"{label}, classified as {answer} with {best[i]:.1%}: {texts[i][:200]}")


@torch.no_grad()
def generate(args):
    """--generate: continues a text with the language model, with the likeliest token each time.
    If the result is English, weights and mapping are right: one transposed matrix gives nonsense.
    (Each step computes the whole text again. To generate much, one keeps earlier keys and values.)
    """
    config, weights = starting_point(args)
    if not config.causal:
        raise Fault("--generate needs a causal model: no other predicts the next token")
    if weights is None:
        print("note: random weights write random text", file=sys.stderr)
    torch.manual_seed(args.seed[0])
    model, (tokenizer, _) = build(config, weights).to(args.device), get_tokenizer(config.vocab_size)
    ids = tokenizer.encode_ordinary(args.generate) or [tokenizer.eot_token]
    for _ in range(args.max_new_tokens):
        window = ids[-config.block_size :]
        example = Example(torch.tensor(window), pool=range(len(window) - 1, len(window)))
        token = int(model(Row.of([example], args.device)).argmax())
        if token == tokenizer.eot_token:
            break
        ids.append(token)
    print("\n".join(map(printable, tokenizer.decode(ids).split("\n"))))


# ------------------------------------------------------------------------------------------------
# 9. Messages and the command line


class Fault(Exception):
    """An error that the user can fix. main() prints it in one line and exits with status 2."""


def printable(text):
    """One line that is safe on a terminal: control characters (escape sequences, line ends, changes
    of the writing direction) are shown as in Python source."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def process():
    """(rank, world): see section 3. Without torchrun, (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(name, *lines):
    """Prints lines of the report. Of several processes, only the first one does."""
    for line in lines if process()[0] == 0 else ():
        print(f"{name:<9} {printable(line)}".rstrip(), flush=True)
        name = ""


def progress(things, what):
    """Yields the items of a list, and shows on a terminal how much is done and the time left."""
    start, visible = time.perf_counter(), sys.stderr.isatty() and process()[0] == 0
    for done, thing in enumerate(things, 1):
        yield thing
        if visible:
            left = (time.perf_counter() - start) / done * (len(things) - done)
            line = f"{what}  {done / len(things):4.0%}  {left:,.0f} s left" if left else ""
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def add_up(t):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        t = t.cuda() if dist.get_backend() == "nccl" else t
        dist.all_reduce(t)
    return t


ACTIONS = (train, predict, predict_file, trace, evaluate, generate)
# Flags without effect on the result of training: a run may be resumed with others of these.
NO_EFFECT = {action.__name__ for action in ACTIONS} | {"max_new_tokens", "experiment", "offline"}
NO_EFFECT |= {"resume", "log", "plot", "classifier"}
OFFLINE = "--data stdlib --model_size gpt2-nano --trainable_layers all --trainable_token_pos mean"
OFFLINE += " --learning_rate 1e-3 --num_epochs 3"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        word = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        near = difflib.get_close_matches(word, self._option_string_actions, 1, 0.75)
        raise Fault(message + (f": do you mean {near[0]}?" if near else " (see --help)"))


def make_parser():
    parser = Parser(
        usage="%(prog)s ACTION [FLAGS]",
        description="Turns GPT-2 into a text classifier, and uses it. Defaults in parentheses.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=80),
        allow_abbrev=False,
    )
    switch = {"action": "store_true"}
    group = parser.add_argument_group("actions").add_mutually_exclusive_group()
    add = group.add_argument
    add("--train", **switch, help="finetune, report, save")
    add("--predict", nargs="*", metavar="TEXT", help="classify texts; -: lines of standard input")
    add("--predict_file", metavar="FILE", help="classify the rows of a table; writes CSV")
    add("--trace", metavar="TEXT", help="what the model believes after each token")
    add("--evaluate", **switch, help="report on --data, without texts of training")
    add("--generate", metavar="TEXT", help="continue TEXT with the language model")

    add = parser.add_argument_group("data").add_argument
    add("--data", help="sms, imdb, stdlib, a csv, tsv, jsonl, a folder (sms)")
    add("--text_column", metavar="NAME", help="(text, or that of training)")
    add("--label_column", metavar="NAME", help="(label, or that of training)")
    add("--balance", action=argparse.BooleanOptionalAction, help="as many of each label (for sms)")
    add("--dedupe", **switch, help="drop repeated texts before splitting")
    add("--max_length", metavar="N", type=int, help="cut texts to N tokens (model's limit)")
    add("--pad_to", metavar="N", default="0", help="pad or cut to N tokens, or longest (0: none)")

    add = parser.add_argument_group("model").add_argument
    short = {"type": lambda name: name.split(" ")[0]}  # the article says "gpt2-small (124M)"
    sizes = "gpt2-nano, -small, -medium, -large, -xl, roberta-base, -large (gpt2-small)"
    add("--model_size", **short, choices=SIZES, metavar="SIZE", help=sizes)
    add("--weights", help="pretrained, random, or a file (pretrained; nano: random)")
    add("--disable_causal_mask", **switch, help="every token sees every other")
    positions = ("last", "first", "flexible", "mean")
    add("--trainable_token_pos", choices=positions, help="pooling (last; RoBERTa: first)")
    add("--trainable_layers", choices=TRAINED_BLOCKS, default="last_block", help="(last_block)")
    add("--lora_rank", metavar="R", type=int, default=8, help="(8)")
    add("--lora_alpha", metavar="A", type=float, default=8.0, help="LoRA is scaled by A / R (8)")

    add = parser.add_argument_group("training").add_argument
    rows = {"choices": range(1, len(EXPERIMENTS) + 1), "metavar": "N"}
    add("--experiment", nargs="+", type=int, **rows, help="rows 1 to 19 of the article's table")
    add("--offline", **switch, help="no download: tiny model, texts of this machine")
    add("--num_epochs", metavar="N", type=int, default=5, help="(5)")
    add("--batch_size", metavar="N", type=int, default=8, help="(8)")
    add("--learning_rate", metavar="R", type=float, default=5e-5, help="(5e-5)")
    add("--lr_schedule", choices=("linear", "constant"), default="linear", help="(linear, to 0)")
    add("--weight_decay", metavar="D", type=float, default=0.1, help="(0.1)")
    add("--seed", metavar="S", nargs="+", type=int, default=[123], help="one or several (123)")
    add("--resume", **switch, help="continue after the last finished epoch")
    add("--log", metavar="CSV", help="write loss and accuracy of each epoch")
    add("--plot", metavar="FILE", help="draw them (needs matplotlib)")

    add = parser.add_argument_group("running").add_argument
    add("--tokens_per_row", metavar="N", type=int, help="of packed rows (CPU 384, else 2048)")
    add("--no_feature_cache", **switch, help="run the frozen blocks in every epoch")
    add("--device", choices=("cuda", "mps", "cpu"), help="(the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of frozen blocks; on CUDA, of all")
    add("--max_new_tokens", metavar="N", type=int, default=25, help="of --generate (25)")
    add("--classifier", metavar="FILE", help="(classifier.safetensors)")
    return parser


def parse(argv):
    """The flags, checked, and with what depends on the machine filled in. Raises Fault."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.offline:
        args = parser.parse_args([*OFFLINE.split(), *argv])
    for flag in ("offline", "experiment", "resume", "log", "plot"):
        if getattr(args, flag) and not args.train:
            raise Fault(f"--{flag} goes with --train")
    if len(args.experiment or ()) < 2:
        args.classifier = args.classifier or "classifier.safetensors"
    elif args.classifier or args.resume or args.log or args.plot:
        raise Fault("several rows save nothing: --classifier, --resume, --log, --plot go with one")
    for flag, value in vars(args).items():
        low = 1 if type(value) is int else 0
        if type(value) in (int, float) and not low <= value < math.inf:
            raise Fault(f"--{flag} {value} is not a number of at least {low}")
    if args.pad_to != "longest":
        if not args.pad_to.isdecimal():
            raise Fault(f"--pad_to {args.pad_to} is neither a number of tokens nor longest")
        args.pad_to = int(args.pad_to)
    if args.plot:
        with blame("--plot needs matplotlib (pip install matplotlib) and a name like curves.png"):
            from matplotlib.figure import Figure

            Figure().savefig(os.devnull, format=Path(args.plot).suffix[1:])
    args.weights = args.weights or ("random" if args.model_size == "gpt2-nano" else "pretrained")
    if args.weights in ("pretrained", "random"):
        args.model_size = args.model_size or "gpt2-small"
    if args.train:  # other actions know these from the classifier
        args.data = args.data or "sms"
        args.text_column = args.text_column or "text"
        args.label_column = args.label_column or "label"
    if args.balance is None:
        args.balance = is_sms(args.data or "")
    best = torch.accelerator.current_accelerator(check_available=True)
    args.device = args.device or (best.type if best else "cpu")
    with blame(f"--device {args.device} does not work on this machine"):
        torch.empty(0, device=args.device)
    if args.dtype is None:
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if args.device == "cpu" else {}
        cuda = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        many = args.train or args.predict_file or args.evaluate  # else, converting takes longer
        args.dtype = "bfloat16" if many and (cuda or cpu.get("avx512_bf16")) else "float32"
    args.tokens_per_row = args.tokens_per_row or (384 if args.device == "cpu" else 2048)
    return args


def check_outputs(args):
    """Raises Fault if --train could not write its files, or would destroy something: a file that it
    reads, another one of its own, or one that this tool did not write."""
    tables = [f for f in Path(args.data).glob("*") if f.stem in " ".join(PARTS.values()).split()]
    taken = {Path(name).resolve() for name in (args.data, args.weights, *tables)}
    outputs = [(args.log, b"seed,epoch,"), (args.plot, b"")]  # with how our files begin
    outputs += [(args.classifier, BEGINNING), (f"{args.classifier}.resume", BEGINNING)]
    for name, beginning in outputs:
        if not name or not args.classifier:  # several rows of --experiment write nothing
            continue
        path = Path(name).resolve()
        there = path.exists()
        if path in taken:
            raise Fault(f"{name} is read or written by this run already: choose another name")
        taken.add(path)
        targets = [path.parent, path] if there else [path.parent]
        if (there and not path.is_file()) or not all(os.access(t, os.W_OK) for t in targets):
            raise Fault(f"{name} cannot be written: choose another name or folder")
        if there and beginning not in path.open("rb").read(99):
            raise Fault(f"{name} was not written by this tool, and is not replaced: choose another")
        if there and not args.resume:
            say("note", f"{name} will be replaced")


def main(argv):
    """Runs one action. Returns the exit status: 0; 2 after a fault; 130 if interrupted; 141 if the
    reader of our output went away."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    args = None
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        args = parse(argv)
        actions = [f for f in ACTIONS if getattr(args, f.__name__) not in (None, False)]
        if not actions:
            raise Fault(f"name an action: --{', --'.join(f.__name__ for f in ACTIONS)}")
        if args.train and "LOCAL_RANK" in os.environ:  # started by torchrun
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.experiment:
            return experiments(args, argv)
        actions[0](args)
        return 0
    except KeyboardInterrupt:
        again = ": the same command with --resume continues after the last epoch"
        resumable = args and args.train and Path(f"{args.classifier}.resume").exists()
        print("\nstopped" + (again if resumable else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except (Fault, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a mistake of ours
        message = " ".join(str(error).split()) or "out of memory"
        print("error:", printable(message), file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
