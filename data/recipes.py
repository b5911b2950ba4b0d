"""What is trained, and how: sizes of models, and the knobs of train.py that a recipe turns for each kind.

    python train.py --recipe qa1-5 --out_dir out/five       # plain data; flags win over it

Writes nothing. A recipe is for LM2 and RMT. A Llama has nothing to carry facts from segment to segment, so
its documents are one segment (window) or whole (full attention), and shorter than LM2's longest. Tokens are
the same, padding included (of qa1-5's last stage 13 % with LM2, 63 with the window Llama, 20 with the full
one, which have 4, 12 and 10 tokens of answers in 1,000), of qa1-10 the minutes. So are learning rates, but of
qa1-5, where LM2 alone gets through the first stages at its own; at half of it all do, LM2 with less qa4.
qa1-10-hours is all ten tasks at the size, and at that lower rate, of qa1-5.

qa1, tried on one or two seeds (leads, not laws), slower or without an end: no curriculum (it never leaves
"some recent room"); no --asides; 4 blocks; 2 blocks of width 64 or 128; 4 heads of width 16; RoPE base
10000 (heads of width 8 have no wave to tell 10 from 50 tokens); steps of 16 or 64 documents; Muon; beta1
.95; no stages of 4 and 10 facts; segments from the start.
qa1-5, what helped: a story is asked whatever any of the tasks can ask of it, and most of more than ten
facts at earlier points too (200 steps of that took a smaller model that had stopped at 82, 58, 42 % of qa2
on 8, 16, 26 facts to 95, 82, 69; three times as many points bring no more in equal time); width 96 in heads
of 16, not 64 in heads of 8 (as good after half the tokens, each 1.8 times as dear); a rate that falls from
half way (at a constant one 12 M tokens brought qa2 nothing); qa4 alone late, when the rate is low (78 to 98
% in 300 steps; early it stood at 87 after 1,500, and qa1 fell from 92 to 60).
qa1-10, what helped: a rate of 5e-4, not 1e-3 or more, at width 256 (assets/results.md); 6 blocks, not 4 (at
width 96 the first stage took 560 steps, not 950). qa4 early is no trouble then, and needs no stages of its
own late. As run now, each of these untried by itself: stories as long as 98 in 100 questions have, not nine
in ten, the stage of 16 x 128, in which a token brings eight times as many answers as in the last, and stages
left at 90, not 85 %.
"""
from lm2 import LM2Config

CPU = dict(n_layer=3, rope_theta=1000.0)  # learns on two CPU cores in minutes
HOURS = dict(n_layer=4, n_head=6, n_kv_head=6, n_embd=96, ffn_dim=256, n_mem_head=6, rope_theta=1000.0)
GPU = dict(n_layer=6, n_embd=256, ffn_dim=448, segment_len=1024, n_slot=64, rope_theta=1000.0)
PRESETS: dict[str, dict] = {
    "cpu": CPU,                                                     # train.py's default
    "cpu-rmt": dict(CPU, n_mem_token=16, ffn_dim=325),              # as many parameters: an RMT,
    "cpu-llama": dict(CPU, n_mem_layer=0, ffn_dim=327),             # a Llama of the same window,
    "cpu-full": dict(CPU, n_mem_layer=0, ffn_dim=327, segment_len=16384),       # and one that sees it all
    "cpu-hours": HOURS,                                             # 1.1 M, for five tasks; and its equals
    "cpu-hours-rmt": dict(HOURS, n_mem_token=4, ffn_dim=481),
    "cpu-hours-llama": dict(HOURS, n_mem_layer=0, ffn_dim=482),
    "cpu-hours-full": dict(HOURS, n_mem_layer=0, ffn_dim=482, segment_len=16384),
    "gpu": GPU,                                                     # 7.4 M, for ten tasks; and its equals
    "gpu-rmt": dict(GPU, n_mem_token=16, ffn_dim=1048),
    "gpu-llama": dict(GPU, n_mem_layer=0, ffn_dim=1048),
    "gpu-full": dict(GPU, n_mem_layer=0, ffn_dim=1048, segment_len=16384),
    "lm2-1.7b": dict(  # paper: Llama-3.2-1B's shape, 2,048 slots in every block, 1.24 B + 0.47 B parameters
        vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, ffn_dim=8192, segment_len=2048,
        n_slot=2048, n_mem_head=32, rope_theta=500000.0, tie_embeddings=True, rope_scaling=dict(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)),
}


def each(stages: str, tasks: str) -> str:
    """The stages, each with the same tasks."""
    return " ".join(f"{stage}@{tasks}" for stage in stages.split())


FIRST, CARRY = "2:0@qa1 4:0@qa1 2:0@qa1,qa4,qa4,qa4", "4:2:32@qa1 4:3:32@qa1"
FIVE = "qa1,qa2,qa2,qa3,qa3,qa4,qa5,qa5"                    # what is learned slowly comes twice as often
RELATIONS = "2:0@qa4 2:4:32@qa4 2:8:64@qa4 2:16:64@qa4"     # its documents have few answers: late, alone
FIVE_STAGES = f"{FIRST} {each('4:0 8:0', FIVE)} {CARRY} {each('8:4:32 30:0 30:8:64 100:16', FIVE)}"
LATE = "qa1,qa2,qa2,qa3,qa3,qa3,qa3,qa4,qa4,qa4,qa5,qa5,qa5"
TEN_TASKS = " ".join(f"qa{i}" for i in range(1, 11))
TEN = "qa1,qa2,qa2,qa3,qa3,qa4,qa4,qa5,qa5,qa6,qa7,qa7,qa8,qa9,qa10"
TEN_FIRST = f"{FIRST} {each('4:0 8:0', TEN)} {CARRY}"
TEN_LATE = "qa1,qa2,qa2,qa3,qa3,qa3,qa3,qa4,qa4,qa5,qa5,qa5,qa6,qa7,qa7,qa8,qa8,qa9,qa10"
WHOLE = dict(whole=True, table_lengths="0k 1k 2k 4k", table_n=100)     # its long documents take long
ALL = dict(final_tokens=4_000_000_000)  # a Llama's few stages end early, and its tokens shall be as many
QA1 = ALL | dict(tokens=8_000_000)      # as LM2's, of whose three seeds this is the median
CPU_HOURS = dict(preset="cpu-hours", decay=0.55, leave_plain_at=0.93, plain=0.4, asides=4, batch_tokens=8192,
                 eval_every=8_000_000, **ALL)

RECIPES: dict[str, dict[str, dict]] = {     # recipe -> {"": its knobs, a kind of model: what it changes}
    "qa1": {            # minutes on two CPU cores: train.py's defaults
        "": dict(preset="cpu"),
        "llama": dict(stages="2:0 4:0 10:0 10:1", **QA1),
        "full": dict(stages="2:0 4:0 10:0 10:1:128 10:2:128 10:4:128 10:8:128 10:16:128", **WHOLE, **QA1)},
    "qa1-5": {          # hours
        "": CPU_HOURS | dict(tasks="qa1 qa2 qa3 qa4 qa5", tokens=90_000_000, lr=1.4e-3,
                             stages=f"{FIVE_STAGES} {RELATIONS} 100:32@{LATE}"),
        "rmt": dict(lr=7e-4, stages=f"{FIVE_STAGES} 100:32@{LATE}"),
        "llama": dict(lr=7e-4, stages=f"{FIRST} {each('4:0 8:0 30:0 30:1', FIVE)} 100:1@{LATE}"),
        "full": dict(lr=7e-4, stages=f"{FIRST} {each('4:0 8:0 30:0 30:4:128', FIVE)} 100:8:128@{LATE}",
                     **WHOLE)},
    "qa1-10-hours": {   # hours, all ten: qa1-5's knobs, fewer tokens and shorter documents
        "": CPU_HOURS | dict(tasks=TEN_TASKS, tokens=60_000_000, lr=7e-4, stage_steps=1000, table_n=100,
                             table_lengths="0k 1k 2k 4k 8k",
                             stages=f"{TEN_FIRST} {each('8:4:32 30:0 30:8:64', TEN)} 100:16@{TEN_LATE}"),
        "llama": dict(stages=f"{FIRST} {each('4:0 8:0 30:0 30:1', TEN)} 100:1@{TEN_LATE}"),
        "full": dict(stages=f"{FIRST} {each('4:0 8:0 30:0 30:4:128', TEN)} 100:8:128@{TEN_LATE}", **WHOLE)},
    "qa1-10": {         # 18 minutes of one GPU
        "": dict(preset="gpu", tasks=TEN_TASKS, tokens=4_000_000_000, **ALL,
                 total_minutes=18.0, decay=0.5, lr=5e-4, leave_at=0.9, leave_plain_at=0.91, stage_steps=1200,
                 usual=0.98, plain=0.3, asides=4, batch_size=64, batch_tokens=98_304, accumulate=1,
                 compile=True, workers=5, eval_every=150_000_000, eval_n=8,
                 stages=f"{TEN_FIRST} {each('8:4:32 30:0 110:0 30:8:64', TEN)} "
                        + each("150:16:128 150:8:512 150:16", TEN_LATE)),
        "llama": dict(stages=f"{FIRST} {each('4:0 8:0 30:0 110:0', TEN)} 150:1@{TEN_LATE}"),
        "full": dict(stages=f"{FIRST} {each('4:0 8:0 30:0 110:0 30:8:64', TEN)} 150:8:512@{TEN_LATE}",
                     **WHOLE)},
}


def knobs(recipe: str | None, preset: str | None, sizes: dict) -> dict:
    """What a recipe (None: the one that the preset is made for), and in it the kind of model that preset and
    `sizes` make, changes in TrainConfig's defaults; ValueError for an unknown recipe."""
    name = preset or ""
    recipe = recipe or ("qa1-10" if name.startswith("gpu") else
                        "qa1-5" if name.startswith("cpu-hours") else "qa1")
    if recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe!r} is unknown: choose from {', '.join(RECIPES)}")
    made = dict(recipe=recipe) | RECIPES[recipe][""]
    if preset and preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is unknown: choose from {', '.join(PRESETS)}")
    made["preset"] = preset = preset or made["preset"]
    cfg = LM2Config(**PRESETS[preset] | sizes)
    kind = "full" if cfg.kind == "llama" and cfg.segment_len >= 4096 else cfg.kind     # it sees them whole
    made |= RECIPES[recipe].get(kind, {})
    if cfg.segment_len < 512 and "stages" in made:      # where 512 are too many it takes segments of its own
        made["stages"] = made["stages"].replace(":512@", "@")
    return made
