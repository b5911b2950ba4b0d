"""Released Llamas: their weights, their tokenizers, the scripts that take their folders, and the
memory that they are given.

    python -m pytest tests/test_llama.py -q

No released model is needed. The writers below make folders of a tiny one, in the layout of Hugging
Face and in Meta's. What is expected comes from plain versions of the model and of the tokenizer,
which know nothing of ours.
"""

import base64
import contextlib
import io
import itertools
import json
import math
import os
import random
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import regex
import torch

import babilong_eval
import sample
import train
from data.babilong import Builder
from data.lessons import echo, lesson
from data.llama import fingerprint_of_files, read_tokenizer, tokenizer_of
from data.tokenizer import of_checkpoint
from lm2 import LM2, LM2Config, build_model, graft, load_checkpoint, load_llama, load_model
from test_train import end_of, lines, refused, same_tensors

torch.set_num_threads(1)

# The tiny model

LAYERS, HEADS, KV_HEADS, WIDTH, FFN, VOCAB, CONTEXT = 3, 4, 2, 32, 48, 600, 256
THETA = 500000.0
SCALING = dict(
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
LLAMA3 = dict(SCALING, rope_type="llama3")
# How config.json says where RoPE turns: by name, its fields, and whether the angles are scaled.
ROPES = {
    "plain": (dict(rope_theta=THETA, rope_scaling=None), False),
    "scaled": (dict(rope_theta=THETA, rope_scaling=LLAMA3), True),
    "old name": (dict(rope_theta=THETA, rope_scaling=dict(SCALING, type="llama3")), True),
    "new plain": (dict(rope_parameters=dict(rope_type="default", rope_theta=THETA)), False),
    "new scaled": (dict(rope_parameters=dict(LLAMA3, rope_theta=THETA)), True),
}


def tiny_weights(tied=False, dtype=torch.float32, seed=0):
    """Random weights by Meta's names. The norms' are random, too, so that none is like another."""
    torch.manual_seed(seed)
    cfg = LM2Config(
        vocab_size=VOCAB,
        n_layer=LAYERS,
        n_head=HEADS,
        n_kv_head=KV_HEADS,
        n_embd=WIDTH,
        ffn_dim=FFN,
        n_mem_layer=0,
    )
    weights = {}
    for name, weight in build_model(cfg).state_dict().items():
        random_weight = torch.randn(weight.shape) * 1.5 / math.sqrt(weight.shape[-1])
        if weight.ndim == 1:
            random_weight = 1 + 0.3 * torch.randn(weight.shape)
        weights[name] = random_weight.to(dtype)
    if tied:
        del weights["output.weight"]
    return weights


def to_halves(weight):
    """The rows of a matrix of queries or keys in Hugging Face's order: a head's even rows, then its
    odd ones."""
    heads = weight.split(WIDTH // HEADS)
    return torch.cat([torch.cat((head[0::2], head[1::2])) for head in heads])


def to_hugging_face(weights):
    """Weights by Hugging Face's names and in its order."""
    found = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    if "output.weight" in weights:
        found["lm_head.weight"] = weights["output.weight"]
    for i in range(LAYERS):
        theirs = f"model.layers.{i}"
        ours = f"layers.{i}"
        wq = weights[f"{ours}.attention.wq.weight"]
        wk = weights[f"{ours}.attention.wk.weight"]
        found[f"{theirs}.self_attn.q_proj.weight"] = to_halves(wq)
        found[f"{theirs}.self_attn.k_proj.weight"] = to_halves(wk)
        found[f"{theirs}.self_attn.v_proj.weight"] = weights[f"{ours}.attention.wv.weight"]
        found[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.attention.wo.weight"]
        found[f"{theirs}.mlp.gate_proj.weight"] = weights[f"{ours}.feed_forward.w1.weight"]
        found[f"{theirs}.mlp.up_proj.weight"] = weights[f"{ours}.feed_forward.w3.weight"]
        found[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.feed_forward.w2.weight"]
        found[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.attention_norm.weight"]
        found[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.ffn_norm.weight"]
    return found


def expected_logits(weights, ids, scaled):
    """The logits (T, vocab) in float64, as transformers computes them from Hugging Face's weights:
    channel i of a head is turned with channel i + half, and long waves are slowed down."""
    w = {name: weight.double() for name, weight in weights.items()}
    n = len(ids)
    width = WIDTH // HEADS
    frequency = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaled:
        context = SCALING["original_max_position_embeddings"]
        longest = context / SCALING["low_freq_factor"]
        shortest = context / SCALING["high_freq_factor"]
        for i, wave in enumerate(2 * math.pi / frequency):
            slow = frequency[i] / SCALING["factor"]
            if wave > longest:
                frequency[i] = slow
            elif wave >= shortest:
                between = (context / wave - 1.0) / (4.0 - 1.0)
                frequency[i] = (1 - between) * slow + between * frequency[i]
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # (T, 1, width)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(x):
        half = width // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * angle.cos() + rotated * angle.sin()

    x = w["model.embed_tokens.weight"][ids]
    unseen = torch.ones(n, n).triu(1).bool()
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        h = norm(x, w[f"{block}.input_layernorm.weight"])
        q = turned((h @ w[f"{block}.self_attn.q_proj.weight"].T).view(n, HEADS, width))
        k = turned((h @ w[f"{block}.self_attn.k_proj.weight"].T).view(n, KV_HEADS, width))
        v = (h @ w[f"{block}.self_attn.v_proj.weight"].T).view(n, KV_HEADS, width)
        heads = []
        for head in range(HEADS):
            shared = head * KV_HEADS // HEADS
            scores = q[:, head] @ k[:, shared].T / math.sqrt(width)
            scores[unseen] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, dim=-1) @ w[f"{block}.self_attn.o_proj.weight"].T
        h = norm(x, w[f"{block}.post_attention_layernorm.weight"])
        gate = h @ w[f"{block}.mlp.gate_proj.weight"].T
        up = h @ w[f"{block}.mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"{block}.mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head.T


# The writers

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def as_safetensors(header, content=b"", is_aligned=True):
    """A file in the format safetensors. Its tensors begin at a multiple of 8 bytes, or one byte
    later."""
    text = json.dumps(header).encode()
    n_spaces = -len(text) % 8
    if not is_aligned:
        n_spaces += 1
    text += b" " * n_spaces
    return len(text).to_bytes(8, "little") + text + content


def write_safetensors(path, tensors, is_aligned=True):
    """Write tensors to a file in the format safetensors."""
    header = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, tensor in tensors.items():
        piece = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(content), len(content) + len(piece)]
        shape = list(tensor.shape)
        header[name] = dict(dtype=DTYPES[tensor.dtype], shape=shape, data_offsets=offsets)
        content += piece
    path.write_bytes(as_safetensors(header, content, is_aligned))


def write_json(path, content):
    """Write a file in JSON."""
    path.write_text(json.dumps(content), encoding="utf-8")


def write_hugging_face(folder, weights, layout="one file", rope="scaled", **changes):
    """A folder in Hugging Face's layout, without a tokenizer. changes  of config.json"""
    folder.mkdir(parents=True)
    config = dict(
        model_type="llama",
        vocab_size=VOCAB,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings="output.weight" not in weights,
        bos_token_id=VOCAB - 2,
        eos_token_id=[VOCAB - 1, 5],
        **ROPES[rope][0],
    )
    if layout != "odd header":  # an older release, which says less
        config |= dict(attention_bias=False, mlp_bias=False, head_dim=WIDTH // HEADS)
    write_json(folder / "config.json", config | changes)
    tensors = to_hugging_face(weights)
    if layout != "shards":
        is_aligned = layout != "odd header"
        write_safetensors(folder / "model.safetensors", tensors, is_aligned)
        return folder
    weight_map = {}
    names = sorted(tensors)
    for number in (0, 1):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number::2]}
        write_safetensors(folder / shard, part)
        weight_map |= dict.fromkeys(part, shard)
    write_json(folder / "model.safetensors.index.json", dict(weight_map=weight_map))
    return folder


def write_meta(folder, weights, scaled=True, **changes):
    """A folder in Meta's layout, without a tokenizer. changes  of params.json"""
    folder.mkdir(parents=True)
    params = dict(
        dim=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        norm_eps=1e-5,
        rope_theta=THETA,
        use_scaled_rope=scaled,
    )
    write_json(folder / "params.json", params | changes)
    torch.save(weights | {"rope.freqs": torch.ones(2)}, folder / "consolidated.00.pth")
    return folder


# A plain tokenizer

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
SPLIT = dict(type="Split", pattern=dict(Regex=LLAMA_3), behavior="Isolated", invert=False)
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "digits": dict(
        type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), BYTE_LEVEL]
    ),
    "llama3": dict(type="Sequence", pretokenizers=[SPLIT, dict(BYTE_LEVEL, use_regex=False)]),
}
TEMPLATE = dict(
    type="Sequence", processors=[BYTE_LEVEL, dict(type="TemplateProcessing", single=[], pair=[])]
)


def pieces_of(text, kind):
    """The pieces of a text within which tokens lie."""
    if kind == "llama3":
        return regex.findall(LLAMA_3, text)
    parts = [text]
    if kind == "digits":
        parts = regex.split(r"(\p{N})", text)
    pieces = []
    for part in parts:
        pieces += regex.findall(GPT_2, part)
    return pieces


def merged(parts, pair):
    """The parts with each two neighbours that are this pair joined, from the left."""
    joined = []
    i = 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def single_bytes(text):
    """The bytes of a text, one by one."""
    return [bytes([byte]) for byte in text.encode()]


def learned_merges(text, kind, n=100):
    """The merges that byte-pair encoding learns from a text, in their order."""
    words = [single_bytes(piece) for piece in sorted(set(pieces_of(text, kind)))]
    merges = []
    while len(merges) < n:
        counts = Counter()
        for word in words:
            counts.update(itertools.pairwise(word))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [merged(word, best) for word in words]
    return merges


def plain_tokens(text, kind, merges):
    """The tokens of a text: in each piece the pair that was learned first is joined first."""
    rank = {pair: number for number, pair in enumerate(merges)}
    tokens = []
    for piece in pieces_of(text, kind):
        parts = single_bytes(piece)
        while True:
            known = [pair for pair in itertools.pairwise(parts) if pair in rank]
            if not known:
                break
            parts = merged(parts, min(known, key=rank.get))
        tokens += parts
    return tokens


def visible(token):
    """A token as tokenizer.json writes it: GPT-2's characters for bytes."""
    shown = {}
    for first, last in ("!~", "¡¬", "®ÿ"):
        for code in range(ord(first), ord(last) + 1):
            shown[code] = chr(code)
    n_hidden = 0
    for byte in range(256):
        if byte not in shown:
            shown[byte] = chr(256 + n_hidden)
            n_hidden += 1
    return "".join(shown[byte] for byte in token)


TEXT = """The wheels turned; they'll turn again, and we've seen 12 of 1024 turning there.
  Where's the lamp?\tIt is where it was: in the kitchen, they're there, 3 and 33 and 333!!!

    naïve café, été, Straße, größer; мир и мера, мир; 北京 北京 東京; 🙂🙂 ... ١٢٣ ½ ²
"""
FUZZ = [
    *"ab eT'sre12 \n\t.,!ïéßмр北🙂½²٣\u2003\u00a0\u200d\r\x00",
    "'ll",
    "'VE",
    "  ",
    "\n\n",
    "there",
]


def fuzzed(n=300):
    """Random texts: characters of many scripts, and parts of what was learned from."""
    rng = random.Random(0)
    texts = ["", "<|endoftext|>", TEXT]
    while len(texts) < n:
        parts = rng.choices([*FUZZ, *TEXT.split()], k=rng.randrange(1, 30))
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def merges_of():
    """merges_of(kind) -> the merges for one way to divide a text. They are learned once."""
    found = {}

    def get(kind):
        if kind not in found:
            found[kind] = learned_merges(TEXT, kind)
        return found[kind]

    return get


def vocabulary(merges, n_special_first=0):
    """From token to id. Special tokens take the first ids, and the bytes come in another order."""
    tokens = [bytes([byte]) for byte in reversed(range(256))]
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    return {token: n_special_first + i for i, token in enumerate(tokens)}


def tokenizer_json(kind, merges, ids, as_text=True, template=True):
    """The content of tokenizer.json. as_text  whether a merge is a text or a list of two"""
    pairs = []
    for left, right in merges:
        pair = [visible(left), visible(right)]
        pairs.append(" ".join(pair) if as_text else pair)
    vocab = {visible(token): i for token, i in ids.items()}
    return dict(
        model=dict(type="BPE", vocab=vocab | {"<|endoftext|>": VOCAB - 1}, merges=pairs),
        pre_tokenizer=PRE_TOKENIZERS[kind],
        post_processor=TEMPLATE if template else None,
        normalizer=None,
    )


def rank_file(merges):
    """The content of Llama 3's tokenizer.model."""
    ids = vocabulary(merges)
    rows = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ids.items()]
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def released(tmp_path_factory, merges_of):
    """released(layout) -> a folder with a model and a tokenizer. It must not be changed."""
    found = {}

    def make(layout):
        if layout in found:
            return found[layout]
        folder = tmp_path_factory.mktemp("models") / f"Tiny-{layout.replace(' ', '-')}"
        merges = merges_of("llama3")
        if layout == "meta":
            write_meta(folder, tiny_weights(dtype=torch.bfloat16))
            (folder / "tokenizer.model").write_text(rank_file(merges))
        else:
            has_template = layout != "no template"
            write_hugging_face(folder, tiny_weights(tied=True), layout)
            written = tokenizer_json("llama3", merges, vocabulary(merges), template=has_template)
            write_json(folder / "tokenizer.json", written)
        found[layout] = folder
        return folder

    return make


# Weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout, rope, tied",
    [
        ("one file", "plain", False),
        ("one file", "new scaled", True),
        ("shards", "scaled", True),
        ("shards", "new plain", False),
        ("odd header", "old name", False),
        ("meta", "plain", True),
        ("meta", "scaled", False),
    ],
)
def test_a_folder_gives_the_logits_of_a_plain_llama_in_any_layout(
    tmp_path, layout, rope, tied, dtype
):
    weights = tiny_weights(tied, dtype)
    is_scaled = ROPES[rope][1]
    if layout == "meta":
        write_meta(tmp_path / "m", weights, is_scaled)
    else:
        write_hugging_face(tmp_path / "m", weights, layout, rope)
    model = load_llama(tmp_path / "m")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert model.cfg.kind == "llama"
    ids = torch.randint(VOCAB, (50,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.double()(ids[None])[0][0]
    expected = expected_logits(to_hugging_face(weights), ids, is_scaled)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert expected.std() > 0.3


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="this system does not tell")
@pytest.mark.parametrize("layout", ["one file", "meta"])
def test_weights_stay_in_their_file_which_never_changes(released, layout):
    folder = released(layout)
    (path,) = [*folder.glob("*.safetensors"), *folder.glob("*.pth")]
    before = path.read_bytes()
    model = load_llama(folder)
    addresses = []  # of the parts of memory in which the file is seen
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = line.split()[0].split("-")
            addresses.append((int(first, 16), int(last, 16)))
    for name, p in model.named_parameters():
        is_mapped = any(first <= p.data_ptr() < last for first, last in addresses)
        is_reordered = layout != "meta" and name.endswith((".wq.weight", ".wk.weight"))
        assert is_mapped != is_reordered, name
    with torch.no_grad():
        model.norm.weight.zero_()
    assert path.read_bytes() == before


def test_the_context_is_the_segment_and_metas_depends_on_the_scaling(tmp_path):
    weights = tiny_weights()
    assert load_llama(write_hugging_face(tmp_path / "a", weights)).cfg.segment_len == CONTEXT
    assert load_llama(write_meta(tmp_path / "b", weights, True)).cfg.segment_len == 131072
    assert load_llama(write_meta(tmp_path / "c", weights, False)).cfg.segment_len == 8192


def test_a_wide_llama_of_meta_has_the_scaling_of_llama_3_1(tmp_path):
    cfg = LM2Config(n_layer=1, n_head=32, n_kv_head=1, n_embd=4096, ffn_dim=2, n_mem_layer=0)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LM2(cfg).state_dict().items()}
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    folder = write_meta(tmp_path / "m", weights, dim=4096, n_heads=32, n_kv_heads=1, n_layers=1)
    assert load_llama(folder).cfg.rope_scaling == dict(SCALING, factor=8.0)


# Tokenizers


@pytest.mark.parametrize("kind, n_special_first", [("gpt2", 0), ("digits", 17), ("llama3", 0)])
def test_tokenizer_json_gives_the_ids_of_plain_byte_pair_encoding(
    tmp_path, merges_of, kind, n_special_first
):
    merges = merges_of(kind)
    ids = vocabulary(merges, n_special_first)
    as_text = kind != "llama3"
    write_json(tmp_path / "tokenizer.json", tokenizer_json(kind, merges, ids, as_text))
    write_json(tmp_path / "config.json", dict(bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1))
    check_tokenizer(read_tokenizer(tmp_path, VOCAB), kind, merges, ids)


def test_a_rank_file_gives_the_ids_of_plain_byte_pair_encoding(tmp_path, merges_of):
    merges = merges_of("llama3")
    ids = vocabulary(merges)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_text(rank_file(merges))
    tokenizer = read_tokenizer(tmp_path, VOCAB)
    assert (tokenizer.bos, tokenizer.eot) == (len(ids), len(ids) + 1)
    check_tokenizer(tokenizer, "llama3", merges, ids)


def check_tokenizer(tokenizer, kind, merges, ids):
    """It gives these ids and the texts again, and so does the one that a checkpoint gives back."""
    content = dict(config=dict(vocab_size=VOCAB), **tokenizer.for_checkpoint())
    carried = of_checkpoint(content, "ckpt.pt")
    assert (carried.bos, carried.eot, carried.n_vocab) == (tokenizer.bos, tokenizer.eot, VOCAB)
    n_bytes = tokenizer.n_bytes()
    for text in fuzzed():
        expected = [ids[token] for token in plain_tokens(text, kind, merges)]
        assert tokenizer.encode(text) == expected, text
        assert carried.encode(text) == expected
        assert tokenizer.decode(expected) == text
        assert n_bytes[expected].sum() == len(text.encode())
    assert n_bytes.shape == (VOCAB,)
    special = [tokenizer.bos, tokenizer.eot]
    assert tokenizer.decode([*special, ids[b"a"], VOCAB - 5]) == "a"
    assert not n_bytes[special].any()


def test_a_document_begins_with_an_id_only_where_a_template_says_so(released):
    for layout, bos, eot in (
        ("one file", VOCAB - 2, VOCAB - 1),
        ("no template", None, VOCAB - 1),
    ):
        tokenizer = read_tokenizer(released(layout), VOCAB)
        assert (tokenizer.bos, tokenizer.eot) == (bos, eot)


def test_a_byte_that_the_vocabulary_lacks_is_left_out_of_a_text(tmp_path, merges_of):
    ids = vocabulary(merges_of("digits"))
    del ids[b"\x04"]
    write_json(tmp_path / "tokenizer.json", tokenizer_json("digits", merges_of("digits"), ids))
    write_json(tmp_path / "config.json", dict(bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1))
    tokenizer = read_tokenizer(tmp_path, VOCAB)
    content = dict(config=dict(vocab_size=VOCAB), **tokenizer.for_checkpoint())
    for each in (tokenizer, of_checkpoint(content, "ckpt.pt")):
        assert each.encode("Q\x04Z") == [ids[b"Q"], ids[b"Z"]]
        assert each.n_bytes()[ids[b"Q"]] == 1


def test_each_id_that_ends_a_text_ends_an_answer_and_the_first_one_a_document(
    released, tmp_path, monkeypatch
):
    shutil.copytree(released("one file"), tmp_path / "m")
    change_json("config.json", eos_token_id=[VOCAB - 1, 7])(tmp_path / "m")
    model, tokenizer, _ = open_model(tmp_path / "m")
    assert (tokenizer.eot, tokenizer.ends) == (VOCAB - 1, {7, VOCAB - 1})
    word = tokenizer.encode("Q")[0]
    written = iter([word, 7, word])
    monkeypatch.setattr(babilong_eval, "next_tokens", lambda *_: [next(written)])
    prompt = np.array(tokenizer.encode("Where is Mary?"))
    assert babilong_eval.answer(model, tokenizer, [prompt], None) == ["Q"]


def test_lessons_begin_with_the_begin_of_text_and_stay_in_their_segments(released, folder):
    tokenizer = read_tokenizer(released("one file"), VOCAB)
    builder = Builder(tokenizer, "train", folder=str(folder))
    rng = random.Random(0)
    for _ in range(20):
        document = lesson(builder, ["qa1"], 4, (1990, 2000), rng)
        assert document.ids[0] == tokenizer.bos
        assert len(document.ids) <= 2000
        assert list(document.ids).count(tokenizer.bos) == 1
    listed = echo(tokenizer, rng)
    assert listed.ids[0] == tokenizer.bos
    start, stop = listed.answers[0]
    first = list(listed.ids).index(listed.ids[start])
    assert list(listed.ids[first : first + stop - start]) == list(listed.ids[start:stop])


# Scripts


def open_model(path):
    """The model of a path, its tokenizer and what the checkpoint holds, as the scripts open it."""
    model, content = load_model(path)
    return model, tokenizer_of(content, path, model.cfg.vocab_size), content


def say(capsys, *argv):
    """What sample.py prints."""
    capsys.readouterr()
    sample.main([str(argument) for argument in argv])
    return capsys.readouterr().out


def continuation(model, tokenizer, text, n):
    """What a model says behind a text and the id that begins a document, as sample.py prints it."""
    ids = tokenizer.encode(text)
    if tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    said = model.generate(torch.tensor([ids]), n)[0, len(ids) :].tolist()
    if tokenizer.eot in said:
        said = said[: said.index(tokenizer.eot)]
    return tokenizer.decode(said) + "\n"


@pytest.mark.parametrize("layout", ["shards", "no template", "meta"])
def test_sample_continues_a_text_as_it_stands(released, capsys, layout):
    folder = released(layout)
    model, tokenizer, content = open_model(folder)
    assert content == {}
    text = "The  wheels\n\tturned; 12"
    expected = continuation(model, tokenizer, text, 12)
    assert say(capsys, "--ckpt", folder, "--prompt", text, "--max_new_tokens", 12) == expected


def test_no_output_is_written_among_the_files_of_a_model(released, capsys):
    folder = released("one file")
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    for main, flag in ((sample.main, "--save_state"), (babilong_eval.main, "--out")):
        argv = ["--ckpt", folder, flag, weights]
        if main is sample.main:
            argv += ["--prompt", "Mary"]
        assert "among a model's files" in refused(capsys, main, *argv)
    assert weights.read_bytes() == before


def test_babilong_is_asked_of_folders_which_give_the_models_their_names(
    released, folder, capsys, tmp_path
):
    flags = "--template --tasks qa1 --lengths 0k --n 2 --memory on --max_tokens 4 --device cpu"
    out = tmp_path / "answers.jsonl"
    models = [str(released("one file")), str(released("meta"))]
    babilong_eval.main(
        ["--ckpt", *models, *flags.split(), "--background", str(folder), "--out", str(out)]
    )
    rows = [row for row in lines(out) if "output" in row]
    assert Counter(row["model"] for row in rows) == {"Tiny-one-file": 2, "Tiny-meta": 2}
    assert "Tiny-meta" in capsys.readouterr().out


def test_a_fingerprint_changes_with_a_file_of_the_folder(released, tmp_path):
    shutil.copytree(released("shards"), tmp_path / "m")
    before = fingerprint_of_files(tmp_path / "m")
    assert fingerprint_of_files(tmp_path / "m") == before
    shard = next((tmp_path / "m").glob("*-00002.safetensors"))
    os.utime(shard, ns=(1, 1))
    after = fingerprint_of_files(tmp_path / "m")
    assert after != before
    (tmp_path / "m" / "predictions.jsonl").write_text("")  # is no file of a model
    assert fingerprint_of_files(tmp_path / "m") == after


# The memory that a Llama is given


def with_memory(llama, **sizes):
    """The sizes of a Llama in segments of 16 tokens, with a memory."""
    without = asdict(llama.cfg)
    for name in ("n_mem_layer", "mem_blocks"):
        del without[name]
    return LM2Config(**without | dict(segment_len=16, n_slot=4, n_mem_head=2) | sizes)


@pytest.mark.parametrize(
    "kind, blocks",
    [("lm2", ()), ("lm2", (0,)), ("lm2", (-1,)), ("lm2", None), ("neural", (0,)), ("neural", None)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_memory_changes_no_bit_of_the_logits_in_the_first_segment(
    tmp_path, kind, blocks, dtype
):
    llama = load_llama(write_hugging_face(tmp_path / "m", tiny_weights(dtype=dtype)))
    model = graft(llama, with_memory(llama, memory_kind=kind, mem_blocks=blocks))
    n_blocks = LAYERS if blocks is None else len(blocks)
    assert sum(block.memory is not None for block in model.layers) == n_blocks
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    llama.float()
    with torch.no_grad():
        for n_tokens in (1, 5, 16):
            ids = torch.randint(VOCAB, (2, n_tokens))
            assert torch.equal(model(ids)[0], llama(ids)[0])


@pytest.mark.parametrize(
    "change", [dict(rope_theta=1e4), dict(n_layer=4), dict(tie_embeddings=True), dict(ffn_dim=50)]
)
def test_a_memory_for_a_llama_of_other_sizes_is_refused(released, change):
    llama = load_llama(released("meta"))
    with pytest.raises(ValueError, match=next(iter(change))):
        graft(llama, with_memory(llama, **change))


SMALL_STEPS = (
    "--segment_len 16 --n_slot 4 --n_mem_head 2 --recipe text --stages text:64 --batch_size 2 "
    "--batch_tokens 128 --accumulate 1 --tokens 384 --lr 1e-3 --device cpu --threads 1"
)


@pytest.fixture(scope="module")
def give_memory(released, tmp_path_factory):
    """give_memory(flags ...) takes three steps from a released Llama -> the folder of the run, and
    what it printed. With --resume in the flags it goes on with the run in out."""
    texts = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"{number}{TEXT}" * 6, encoding="utf-8")

    def run(flags, out=None):
        argv = ["--resume"]
        if out is None:
            out = tmp_path_factory.mktemp("grafted") / "run"
            init = str(released("shards"))
            argv = [*SMALL_STEPS.split(), "--init", init, "--text", str(texts)]
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(train, "LOG_EVERY", 1)
            patch.setattr(train, "WARMUP_STEPS", 1)
            patch.setattr(train, "SAMPLE_TOKENS", 4)
            patch.setattr(train, "LARGE", 0)
            train.main([*argv, "--out_dir", str(out), *flags.split()])
        return out, printed.getvalue()

    return run


@pytest.mark.parametrize(
    "flags",
    [
        "--train all --n_mem_layer 3",
        "--train memory --mem_blocks -1",
        "--train memory --mem_blocks 0 --memory_kind neural",
    ],
)
def test_three_steps_move_every_tensor_of_the_memory_and_only_those_that_are_trained(
    released, give_memory, capsys, flags
):
    out, printed = give_memory(flags)
    assert "a step takes about" in printed
    model, content = load_checkpoint(out / "ckpt.pt")
    assert content["progress"]["step"] == 3
    assert model.cfg.segment_len == 16
    torch.manual_seed(0)
    before = graft(load_llama(released("shards")), model.cfg).state_dict()
    for name, weight in model.state_dict().items():
        is_trained = ".memory." in name or "--train all" in flags
        assert torch.equal(weight, before[name]) != is_trained, name
    tokenizer = of_checkpoint(content, out)
    expected = continuation(model, tokenizer, "The  wheels\n\tturned; 12", 8)
    argv = ["--ckpt", out / "ckpt.pt", "--prompt", "The  wheels\n\tturned; 12"]
    assert say(capsys, *argv, "--max_new_tokens", 8) == expected


def test_a_run_from_a_llama_that_was_cut_short_goes_on_to_the_same_end(give_memory):
    flags = "--train memory --mem_blocks 0 -1"
    straight, _ = give_memory(flags)
    cut, _ = give_memory(f"{flags} --minutes 0")
    assert load_checkpoint(cut / "ckpt.pt")[1]["progress"]["step"] < 3
    give_memory("--minutes 100", out=cut)
    assert same_tensors(end_of(cut), end_of(straight))


def test_a_llama_learns_the_stories_of_the_default_recipe_in_its_own_tokens(
    released, folder, tmp_path, capsys
):
    flags = (
        "--mem_blocks 0 --segment_len 64 --n_slot 4 --n_mem_head 2 --stages 2:0 --tokens 2000 "
        "--batch_size 2 --accumulate 1 --table_lengths 0k --table_n 1 --eval_n 1 --device cpu"
    )
    argv = [*flags.split(), "--background", str(folder), "--out_dir", str(tmp_path / "run")]
    train.main([*argv, "--init", str(released("meta")), "--threads", "1"])
    assert "learning rate 0.0001" in capsys.readouterr().out
    _, tokenizer, content = open_model(tmp_path / "run" / "ckpt.pt")
    assert content["progress"]["step"] > 0
    again = train.read_flags(["--init", str(tmp_path / "run" / "ckpt.pt"), "--out_dir", "out/no"])
    assert again.cfg.lr == 1e-4  # as low as at its first start
    assert tokenizer.for_checkpoint() == read_tokenizer(released("meta"), VOCAB).for_checkpoint()
    assert len(lines(tmp_path / "run" / "table.jsonl")) == 2


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--n_embd 64 --mem_blocks 0", "n_embd"),
        ("--n_kv_head 4 --mem_blocks 0", "n_kv_head"),
        ("--preset cpu --mem_blocks 0", "preset"),
        ("--recipe text --tokenizer bytes --mem_blocks 0", "tokenizer"),
        ("--recipe text --n_mem_layer 0 --train memory", "--train memory"),
        ("--recipe text --mem_blocks 7", "mem_blocks 7"),
        ("--recipe text --mem_blocks 0 --train heads", "heads"),
    ],
)
def test_what_a_llama_has_by_itself_is_no_flag(
    released, capsys, monkeypatch, tmp_path, flags, named
):
    monkeypatch.setattr(train, "train", None)  # no step is taken
    out = tmp_path / "run"
    argv = [*flags.split(), "--init", released("meta"), "--out_dir", out, "--device", "cpu"]
    assert named in refused(capsys, train.main, *argv)
    assert not out.exists()


@pytest.mark.parametrize("trained, segment_len", [("all", 64), ("all", 512), ("memory", 64)])
def test_the_memory_that_a_step_takes_is_counted_as_autograd_keeps_it(trained, segment_len):
    cfg = LM2Config(
        vocab_size=300,
        n_layer=3,
        n_head=4,
        n_kv_head=2,
        n_embd=128,
        ffn_dim=256,
        segment_len=segment_len,
    )
    model = LM2(cfg)
    for name, p in model.named_parameters():
        p.requires_grad = trained == "all" or ".memory." in name
    settings = dict(recipe="text", tasks=(), stages=("text:512",), batch_tokens=512)
    fixed, activations = train.bytes_of_step(model, train.TrainConfig(**settings))

    total = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert fixed == 4 * total + 3 * 4 * n_trained

    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(300, (1, 512))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, loss, _ = model(ids, ids)
    expected = sum(kept[address].nbytes() for address in kept if address not in weights)
    expected += 2 * logits.numel() * logits.itemsize  # for the gradient of the logits
    assert activations == pytest.approx(expected, rel=0.1)


# What cannot be read


def change_json(name, **changes):
    """A damage: other values in a file of JSON. None takes a value out."""

    def damage(folder):
        content = json.loads((folder / name).read_text()) | changes
        write_json(
            folder / name, {key: value for key, value in content.items() if value is not None}
        )

    return damage


def change_header(name, **changes):
    """A damage: other values for one tensor in the header of the file of weights."""

    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header[name] |= changes
        path.write_bytes(as_safetensors(header, content[start:]))

    return damage


def change_weights(name, weight):
    """A damage: another tensor under a name, or none."""

    def damage(folder):
        tensors = to_hugging_face(tiny_weights(tied=True))
        tensors[name] = weight
        if weight is None:
            del tensors[name]
        write_safetensors(folder / "model.safetensors", tensors)

    return damage


def without(name):
    """A damage: a file is missing."""
    return lambda folder: (folder / name).unlink()


def written(name, content):
    """A damage: a file of other bytes."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    """A damage: the last 100 bytes of a file are missing."""

    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-100])

    return damage


def change_tokenizer(**changes):
    """A damage: other values in the model of tokenizer.json."""

    def damage(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"] |= changes
        write_json(folder / "tokenizer.json", content)

    return damage


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def hostile_pickle(folder):
    """A damage: a pickle that would run code."""
    torch.save({"norm.weight": Hostile(folder / "ran")}, folder / "consolidated.00.pth")


NORM = "model.norm.weight"
NORM_BYTES = WIDTH * 4
TEN_GB = (10 * 10**9).to_bytes(8, "little")
SECOND = "model-00002-of-00002.safetensors"

DAMAGES = {
    # the folder, what is done to it, and what the message says
    "no config": ("one file", without("config.json"), "config.json"),
    "no weights": ("one file", without("model.safetensors"), "model.safetensors"),
    "no tokenizer": ("one file", without("tokenizer.json"), "no tokenizer.json"),
    "no shard": ("shards", without(SECOND), SECOND),
    "a cut shard": ("shards", cut(SECOND), "outside the file"),
    "a broken index": ("shards", written("model.safetensors.index.json", b"{}"), "weight_map"),
    "an empty file": ("one file", written("model.safetensors", b""), "cut short"),
    "10 GB of header": ("one file", written("model.safetensors", TEN_GB + b"{}"), "cut short"),
    "no JSON": ("one file", written("model.safetensors", bytes([2, *[0] * 7]) + b"{!"), "header"),
    "a list": ("one file", written("model.safetensors", bytes([2, *[0] * 7]) + b"[]"), "header"),
    "no offsets": ("one file", change_header(NORM, data_offsets=None), NORM),
    "outside": ("one file", change_header(NORM, data_offsets=[10**9, 10**9 + NORM_BYTES]), NORM),
    "too few bytes": ("one file", change_header(NORM, data_offsets=[0, NORM_BYTES - 4]), NORM),
    "half a number": ("one file", change_header(NORM, data_offsets=[0, NORM_BYTES - 1]), NORM),
    "backwards": ("one file", change_header(NORM, data_offsets=[NORM_BYTES, 0]), NORM),
    "unknown dtype": ("one file", change_header(NORM, dtype="F8_E4M3"), "F8_E4M3"),
    "another shape": ("one file", change_weights(NORM, torch.ones(16)), "norm.weight"),
    "a name missing": ("one file", change_weights(NORM, None), "norm.weight"),
    "a name left over": ("one file", change_weights("extra", torch.ones(2)), "extra"),
    "config without a key": (
        "one file",
        change_json("config.json", hidden_size=None),
        "hidden_size",
    ),
    "a list as config": ("one file", written("config.json", b"[1]"), "config.json"),
    "config cut short": ("one file", cut("config.json"), "config.json"),
    "a text as a size": ("one file", change_json("config.json", num_hidden_layers="x"), "'str'"),
    "no heads": (
        "one file",
        change_json("config.json", num_attention_heads=0, head_dim=None),
        "n_head is 0",
    ),
    "biases": ("one file", change_json("config.json", attention_bias=True), "attention_bias"),
    "biases of the MLP": ("one file", change_json("config.json", mlp_bias=True), "mlp_bias"),
    "another activation": ("one file", change_json("config.json", hidden_act="gelu"), "gelu"),
    "another model": ("one file", change_json("config.json", model_type="granite"), "granite"),
    "wider heads": ("one file", change_json("config.json", head_dim=16), "head_dim 16"),
    "unknown RoPE": (
        "one file",
        change_json("config.json", rope_scaling=dict(SCALING, rope_type="yarn")),
        "yarn",
    ),
    "RoPE without a key": (
        "one file",
        change_json("config.json", rope_scaling=dict(rope_type="llama3", factor=8.0)),
        "low_freq_factor",
    ),
    "no params": ("meta", without("params.json"), "params.json"),
    "no pth": ("meta", without("consolidated.00.pth"), "consolidated.00.pth"),
    "no rank file": ("meta", without("tokenizer.model"), "no tokenizer.model"),
    "params cut short": ("meta", cut("params.json"), "params.json"),
    "params without a key": ("meta", change_json("params.json", dim=None), "dim"),
    "pth cut short": ("meta", cut("consolidated.00.pth"), "consolidated.00.pth"),
    "code": ("meta", hostile_pickle, "consolidated.00.pth"),
    "SentencePiece": ("meta", written("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\xff"), "no text"),
    "a rank left out": ("meta", written("tokenizer.model", b"AA== 0\nAQ== 2\n"), "rank 1"),
    "bytes for the unknown": ("one file", change_tokenizer(byte_fallback=True), "byte-level"),
    "no BPE": ("one file", change_tokenizer(type="Unigram"), "byte-level"),
    "a token without an id": ("one file", change_tokenizer(vocab={}), "is missing"),
    "a merge of nothing": ("one file", change_tokenizer(merges=["a"]), "tokenizer.json"),
    "no pre_tokenizer": ("one file", change_json("tokenizer.json", pre_tokenizer=None), "None"),
    "unknown pre_tokenizer": (
        "one file",
        change_json("tokenizer.json", pre_tokenizer=dict(type="Metaspace")),
        "Metaspace",
    ),
    "a space in front": (
        "one file",
        change_json("tokenizer.json", pre_tokenizer=dict(BYTE_LEVEL, add_prefix_space=True)),
        "space",
    ),
    "a normalizer": (
        "one file",
        change_json("tokenizer.json", normalizer=dict(type="NFC")),
        "normalizer",
    ),
    "no end": ("one file", change_json("config.json", eos_token_id=None), "eos_token_id"),
    "no end in a list": ("one file", change_json("config.json", eos_token_id=[]), "tokenizer"),
    "an id too large": ("one file", change_json("config.json", bos_token_id=VOCAB), "ids"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_cannot_be_read_is_told_in_one_line_with_a_mend(
    released, capsys, tmp_path, name
):
    layout, damage, said = DAMAGES[name]
    folder = tmp_path / "m"
    shutil.copytree(released(layout), folder)
    damage(folder)
    err = refused(capsys, sample.main, "--ckpt", folder, "--prompt", "a", "--device", "cpu")
    assert str(folder) in err
    assert said in err.replace(str(folder), "")
    assert "fetch" in err
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("main", [train.main, babilong_eval.main])
def test_the_other_scripts_tell_it_in_one_line_too(released, capsys, tmp_path, main):
    shutil.copytree(released("shards"), tmp_path / "m")
    (tmp_path / "m" / SECOND).unlink()
    flag = "--init" if main is train.main else "--ckpt"
    argv = [flag, tmp_path / "m", "--device", "cpu"]
    if main is train.main:
        argv += ["--out_dir", tmp_path / "run"]
    assert SECOND in refused(capsys, main, *argv)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/none .*fetch"):
        load_llama(tmp_path / "none")
