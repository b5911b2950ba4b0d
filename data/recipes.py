"""What is trained, and how: the sizes of models, and the settings of train.py for each of them.

    python train.py --recipe qa1-5 --preset cpu-hours-rmt --out_dir out/five-rmt

Plain data, writes nothing. A preset is a set of sizes. A recipe is a set of settings of train.py,
one set for each kind of model. A flag that is given wins over both.

What the recipes share. LM2 and the RMT take the same stages, but in qa1-5 LM2 has four more, of
qa4 alone. A Llama has nothing that carries facts from segment to segment. So the documents of the
window Llama ("llama") are one segment long. The Llama with full attention ("full") reads each
document as one long segment. Its documents are shorter than LM2's longest, since its cost grows
with the length. The models of a recipe see about equally many tokens, padding included. In qa1-10
they train for equally many minutes. README.md and assets/results.md have the results.
"""

# Sizes

CPU = dict(n_layer=3, mem_blocks=(-1,), rope_theta=1000.0)  # 0.44 M parameters
CPU_HOURS = dict(  # 1.1 M
    n_layer=4, n_head=6, n_embd=96, ffn_dim=256, n_mem_head=6, rope_theta=1000.0
)
GPU = dict(
    n_layer=6, n_embd=256, ffn_dim=448, segment_len=1024, n_slot=64, rope_theta=1000.0
)  # 7.4 M

TEXT = dict(
    n_layer=3,
    n_head=4,
    ffn_dim=176,
    segment_len=64,
    n_slot=32,
    n_mem_head=8,
    mem_blocks=(-1,),
    rope_theta=1000.0,
)  # 0.44 M with the shipped tokenizer

# A baseline has a wider MLP in place of the memory, so that it has as many parameters.
PRESETS: dict[str, dict] = {
    "cpu": CPU,
    "cpu-rmt": dict(CPU, mem_blocks=(), n_mem_token=16, ffn_dim=225),
    "cpu-rmt-projection": dict(
        CPU, mem_blocks=(), n_mem_token=16, mem_projection=True, ffn_dim=218
    ),
    "cpu-neural": dict(CPU, memory_kind="neural", ffn_dim=188),
    "cpu-llama": dict(CPU, mem_blocks=(), ffn_dim=226),
    "cpu-full": dict(CPU, mem_blocks=(), ffn_dim=226, segment_len=16384),
    "cpu-hours": CPU_HOURS,
    "cpu-hours-rmt": dict(CPU_HOURS, n_mem_token=4, ffn_dim=481),
    "cpu-hours-llama": dict(CPU_HOURS, n_mem_layer=0, ffn_dim=482),
    "cpu-hours-full": dict(CPU_HOURS, n_mem_layer=0, ffn_dim=482, segment_len=16384),
    "gpu": GPU,
    "gpu-rmt": dict(GPU, n_mem_token=16, ffn_dim=1048),
    "gpu-llama": dict(GPU, n_mem_layer=0, ffn_dim=1048),
    "gpu-full": dict(GPU, n_mem_layer=0, ffn_dim=1048, segment_len=16384),
    "text": TEXT,
    "text-rmt": dict(TEXT, mem_blocks=(), n_mem_token=16, ffn_dim=225),
    "text-rmt-projection": dict(
        TEXT, mem_blocks=(), n_mem_token=16, mem_projection=True, ffn_dim=218
    ),
    "text-neural": dict(TEXT, memory_kind="neural", ffn_dim=188),
    "text-llama": dict(TEXT, mem_blocks=(), ffn_dim=226),
    "text-deeper": dict(TEXT, mem_blocks=(), n_layer=4),
    "text-full": dict(TEXT, mem_blocks=(), ffn_dim=226, segment_len=1024),
    # The paper's: the shape of Llama-3.2-1B and 2,048 slots in every block, 1.24 B + 0.47 B.
    "lm2-1.7b": dict(
        vocab_size=128256,
        n_layer=16,
        n_head=32,
        n_kv_head=8,
        n_embd=2048,
        ffn_dim=8192,
        segment_len=2048,
        n_slot=2048,
        n_mem_head=32,
        rope_theta=500000.0,
        tie_embeddings=True,
        rope_scaling=dict(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
}

# The recipe of a preset, where --recipe is not given.
RECIPE_OF: dict[str, str] = {
    "cpu": "qa1",
    "cpu-rmt": "qa1",
    "cpu-rmt-projection": "qa1",
    "cpu-neural": "qa1",
    "cpu-llama": "qa1",
    "cpu-full": "qa1",
    "cpu-hours": "qa1-5",
    "cpu-hours-rmt": "qa1-5",
    "cpu-hours-llama": "qa1-5",
    "cpu-hours-full": "qa1-5",
    "gpu": "qa1-10",
    "gpu-rmt": "qa1-10",
    "gpu-llama": "qa1-10",
    "gpu-full": "qa1-10",
    "text": "text",
    "text-rmt": "text",
    "text-rmt-projection": "text",
    "text-neural": "text",
    "text-llama": "text",
    "text-deeper": "text",
    "text-full": "text",
    "lm2-1.7b": "qa1",
}

# Stages are written as data.lessons.parse_stage reads them: facts:segments[:tokens][@tasks].

NO_EARLY_END = 4_000_000_000  # final_tokens of a run that shall see all of its --tokens


# qa1: minutes on two CPU cores. Whatever is not named here is as train.py's TrainConfig has it.
#
# What was tried on one or two seeds and was slower or never converged (leads, not laws): no
# curriculum (the model never gets beyond "some recent room"); no asides; no stages of 4 and 10
# facts; segments from the start; 4 blocks; 2 blocks of width 64 or 128; 4 heads of width 16; a RoPE
# base of 10000 (heads of width 8 then have no wave that tells 10 tokens from 50); steps of 16 or of
# 64 documents; Muon; beta1 of 0.95.
QA1 = dict(
    preset="cpu",
    short_questions=1,
    # A question at 1k may be about a place that its own segment tells, while the memory still holds
    # the one before. Long documents seldom ask that, so the last stage has more short ones.
    longest=0.25,
    stages=(
        # To look back for a token, and to say what stood behind it.
        "echo",
        # Inside the window, without prose: who is where, and which of two sentences is the latest.
        "2:0",
        "4:0",
        "10:0",
        # The first use of the memory. The segments are short, as this takes many updates of the
        # weights rather than many tokens.
        "4:2:32",
        "4:3:32",
        # More facts, so that slots are overwritten several times.
        "10:4:32",
        "10:8:32",
        # Long documents: to keep what matters and to decline the rest.
        "10:16:64",
        "10:16",
        "10:32",
    ),
)
QA1_LLAMA = dict(
    QA1,
    tokens=6_000_000,  # about as many as LM2's, of whose ten seeds the median is 5.9 M
    final_tokens=NO_EARLY_END,
    stages=("echo", "2:0", "4:0", "10:0", "10:1"),
)
QA1_FULL = dict(
    QA1,
    tokens=6_000_000,
    final_tokens=NO_EARLY_END,
    whole=True,
    table_lengths=("0k", "1k", "2k", "4k"),  # it takes long for longer ones
    table_n=100,
    stages=(
        "echo",
        "2:0",
        "4:0",
        "10:0",
        "10:1:128",
        "10:2:128",
        "10:4:128",
        "10:8:128",
        "10:16:128",
    ),
)


# qa1-5: hours on CPU cores.
#
# What helped. A story is asked whatever any of the tasks can ask of it, and most stories of more
# than ten facts are asked at earlier points, too: after 200 steps of that a smaller model, which
# had stopped at 82, 58 and 42 % of qa2 on 8, 16 and 26 facts, had 95, 82 and 69 %. Three times as
# many points bring nothing more in equal time. Width 96 in heads of 16 is as good as width 64 in
# heads of 8 after half the tokens, each of which costs 1.8 times as much. The learning rate falls
# from half way on: at a constant rate 12 M tokens brought qa2 nothing. qa4 has stages of its own,
# late, when the rate is low: it rose from 78 to 98 % in 300 steps. Early it stood at 87 % after
# 1,500 steps, and qa1 fell from 92 to 60.
#
# Learning rates: LM2 alone gets through the first stages at 1.4e-3. All models do at half of it.

# What is learned slowly comes more often, by being named more often.
FIVE = "qa1,qa2,qa2,qa3,qa3,qa4,qa5,qa5"
FIVE_LATE = "qa1,qa2,qa2,qa3,qa3,qa3,qa3,qa4,qa4,qa4,qa5,qa5,qa5"
QA4_FIRST = "2:0@qa1,qa4,qa4,qa4"  # qa4 knows no movements: its relations are learned apart

QA1_5 = dict(
    preset="cpu-hours",
    tasks=("qa1", "qa2", "qa3", "qa4", "qa5"),
    tokens=90_000_000,
    final_tokens=NO_EARLY_END,
    lr=1.4e-3,
    decay=0.55,
    leave_plain_at=0.93,
    plain=0.4,
    asides=4,
    batch_tokens=8192,
    eval_every=8_000_000,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{FIVE}",
        f"8:0@{FIVE}",
        # The first use of the memory, on the easiest task.
        "4:2:32@qa1",
        "4:3:32@qa1",
        f"8:4:32@{FIVE}",
        f"30:0@{FIVE}",
        f"30:8:64@{FIVE}",
        f"100:16@{FIVE}",
        # qa4 alone: its documents have few answers.
        "2:0@qa4",
        "2:4:32@qa4",
        "2:8:64@qa4",
        "2:16:64@qa4",
        f"100:32@{FIVE_LATE}",
    ),
)
QA1_5_RMT = dict(
    QA1_5,
    lr=7e-4,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{FIVE}",
        f"8:0@{FIVE}",
        "4:2:32@qa1",
        "4:3:32@qa1",
        f"8:4:32@{FIVE}",
        f"30:0@{FIVE}",
        f"30:8:64@{FIVE}",
        f"100:16@{FIVE}",
        f"100:32@{FIVE_LATE}",
    ),
)
QA1_5_LLAMA = dict(
    QA1_5,
    lr=7e-4,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{FIVE}",
        f"8:0@{FIVE}",
        f"30:0@{FIVE}",
        f"30:1@{FIVE}",
        f"100:1@{FIVE_LATE}",
    ),
)
QA1_5_FULL = dict(
    QA1_5,
    lr=7e-4,
    whole=True,
    table_lengths=("0k", "1k", "2k", "4k"),
    table_n=100,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{FIVE}",
        f"8:0@{FIVE}",
        f"30:0@{FIVE}",
        f"30:4:128@{FIVE}",
        f"100:8:128@{FIVE_LATE}",
    ),
)


# qa1-10: 18 minutes of one GPU.
#
# What helped: a learning rate of 5e-4, not 1e-3 or more, at width 256 (assets/results.md), and 6
# blocks, not 4 (at width 96 the first stage took 560 steps, not 950). qa4 early is no trouble then,
# and needs no stages of its own late. Each of these was not tried by itself: stories as long as 98
# in 100 questions need, not nine in ten; the stage of 16 x 128, in which a token brings eight times
# as many answers as in the last one; and stages that are left at 90 %, not at 85.

TEN_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10")
TEN = "qa1,qa2,qa2,qa3,qa3,qa4,qa4,qa5,qa5,qa6,qa7,qa7,qa8,qa9,qa10"
TEN_LATE = "qa1,qa2,qa2,qa3,qa3,qa3,qa3,qa4,qa4,qa5,qa5,qa5,qa6,qa7,qa7,qa8,qa8,qa9,qa10"

QA1_10 = dict(
    preset="gpu",
    tasks=TEN_TASKS,
    tokens=4_000_000_000,  # the minutes end it first
    final_tokens=NO_EARLY_END,
    total_minutes=18.0,
    lr=5e-4,
    decay=0.5,
    leave_at=0.9,
    leave_plain_at=0.91,
    stage_steps=1200,
    usual=0.98,
    plain=0.3,
    asides=4,
    batch_size=64,
    batch_tokens=98_304,
    accumulate=1,
    compile=True,
    workers=5,
    eval_every=150_000_000,
    eval_n=8,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{TEN}",
        f"8:0@{TEN}",
        "4:2:32@qa1",
        "4:3:32@qa1",
        f"8:4:32@{TEN}",
        f"30:0@{TEN}",
        f"110:0@{TEN}",
        f"30:8:64@{TEN}",
        f"150:16:128@{TEN_LATE}",
        f"150:8:512@{TEN_LATE}",
        f"150:16@{TEN_LATE}",
    ),
)
QA1_10_LLAMA = dict(
    QA1_10,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{TEN}",
        f"8:0@{TEN}",
        f"30:0@{TEN}",
        f"110:0@{TEN}",
        f"150:1@{TEN_LATE}",
    ),
)
QA1_10_FULL = dict(
    QA1_10,
    whole=True,
    table_lengths=("0k", "1k", "2k", "4k"),
    table_n=100,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{TEN}",
        f"8:0@{TEN}",
        f"30:0@{TEN}",
        f"110:0@{TEN}",
        f"30:8:64@{TEN}",
        f"150:8:512@{TEN_LATE}",
    ),
)


# qa1-10-hours: all ten tasks on CPU cores, at the sizes and the lower rate of qa1-5, with fewer
# tokens and shorter documents.
QA1_10_HOURS = dict(
    QA1_5,
    tasks=TEN_TASKS,
    tokens=60_000_000,
    lr=7e-4,
    stage_steps=1000,
    table_lengths=("0k", "1k", "2k", "4k", "8k"),
    table_n=100,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{TEN}",
        f"8:0@{TEN}",
        "4:2:32@qa1",
        "4:3:32@qa1",
        f"8:4:32@{TEN}",
        f"30:0@{TEN}",
        f"30:8:64@{TEN}",
        f"100:16@{TEN_LATE}",
    ),
)
QA1_10_HOURS_LLAMA = dict(
    QA1_10_HOURS,
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{TEN}",
        f"8:0@{TEN}",
        f"30:0@{TEN}",
        f"30:1@{TEN}",
        f"100:1@{TEN_LATE}",
    ),
)
QA1_10_HOURS_FULL = dict(
    QA1_10_HOURS,
    whole=True,
    table_lengths=("0k", "1k", "2k", "4k"),
    stages=(
        "2:0@qa1",
        "4:0@qa1",
        QA4_FIRST,
        f"4:0@{TEN}",
        f"8:0@{TEN}",
        f"30:0@{TEN}",
        f"30:4:128@{TEN}",
        f"100:8:128@{TEN_LATE}",
    ),
)


# text: plain text, minutes on two CPU cores.
TEXT_RUN = dict(
    preset="text",
    tasks=(),
    tokenizer="learned",
    tokens=12_000_000,
    final_tokens=NO_EARLY_END,
    lr=2e-3,
    decay=0.4,
    gate_lr=5.0,
    # Small steps: with 8,192 tokens in each, the loss after 6 M tokens is 0.14 bits a byte higher.
    batch_tokens=1024,
    eval_every=2_000_000,
    stages=("text:1024",),  # windows of 1,024 tokens
)

# recipe -> kind of model -> its settings
RECIPES: dict[str, dict[str, dict]] = {
    "qa1": dict(lm2=QA1, rmt=QA1, llama=QA1_LLAMA, full=QA1_FULL),
    "qa1-5": dict(lm2=QA1_5, rmt=QA1_5_RMT, llama=QA1_5_LLAMA, full=QA1_5_FULL),
    "qa1-10-hours": dict(
        lm2=QA1_10_HOURS, rmt=QA1_10_HOURS, llama=QA1_10_HOURS_LLAMA, full=QA1_10_HOURS_FULL
    ),
    "text": dict(lm2=TEXT_RUN, rmt=TEXT_RUN, llama=TEXT_RUN, full=TEXT_RUN),
    "qa1-10": dict(lm2=QA1_10, rmt=QA1_10, llama=QA1_10_LLAMA, full=QA1_10_FULL),
}
