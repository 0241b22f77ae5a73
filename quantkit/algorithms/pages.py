"""What the manual says about each method: one block of text per method, and one table of measured figures.

``quantkit methods NAME`` shows it, and ``python scripts/method_pages.py`` writes docs/methods/NAME.md from it. A method
in the registry without a page here is an error that the tests find.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The text of a method's page: plain sentences, shown on a terminal as they are. Line breaks do not count."""

    authors: str  # of the paper, with its title and year; or whose method it is
    what: str
    when: str
    cost: str
    limits: str
    settings: tuple[str, ...]  # recipe fields that matter for it, beside bits, group_size and symmetric


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured row: perplexity on held-out documentation and on WikiText-2 of the packed model.

    llama-28m, 32 x 1024 calibration tokens, 32 windows of 1024 tokens; docs/results.md has hardware and versions.
    """

    method: str
    settings: str  # beyond --method and --bits
    bits: str  # and group size
    bpw: float  # stored bits per weight
    docs: float
    wiki: float | None
    reference: str = "-"  # other people's code on the same model and data: perplexity on the first text


UNQUANTIZED = Figure("", "", "16", 16, 5.336, 71.19)

FIGURES: tuple[Figure, ...] = (
    Figure("rtn", "", "2 g128", 2.141, 67.39, 671.8, "67.58"),
    Figure("gptq", "", "3 g128", 3.148, 5.785, 78.37, "6.136 (llm-compressor)"),
    Figure("gptq", "", "2 g128", 2.141, 8.302, 118.6, "11.91 (best released toolkit)"),
    Figure("gptq", "grid=minmax", "2 g128", 2.141, 35.79, 392.1, "34.96 (authors)"),
    Figure("gptq", "grid=minmax", "3 g128", 3.148, 6.213, 89.46, "6.194 (authors)"),
    Figure("gptq", "", "2 per row", 2.030, 8.932, 121.1, "9.474 (GPTQ, searched scales)"),
    Figure("gptq", "transform=hadamard", "2 g128", 2.141, 8.378, 109.72),
    Figure("gptq", "transform=hadamard, rotate_values=true", "2 g128", 2.141, 8.090, 111.80),
    Figure("refined", "", "2 g128", 2.140, 7.182, 92.69, "8.639 (quick experiment)"),
    Figure("refined", "allocator=uniform", "2 g128", 2.141, 7.440, 103.7, "8.639 (quick experiment)"),
    Figure("boa", "", "2 per row", 2.030, 8.647, 124.1, "9.430 (authors)"),
    Figure("turboboa", "", "2 per row", 2.030, 8.279, 116.4, "8.714 (authors)"),
    Figure("slim", "", "2 g128", 2.169, 12.42, 175.2, "13.65 (authors)"),
    Figure("slim", "", "3 g128", 3.148, 5.961, 82.97, "6.445 (authors)"),
    Figure("slim", "grid=hessian", "2 g128", 2.144, 8.276, 117.2),
    Figure("ptq161", "", "1.6", 1.703, 11.15, 162.1, "23.06 (authors, 1.712 bpw)"),
    Figure("littlebit", "refine=qat, lr=3e-4, also_train=all, 378 steps", "1.0", 1.000, 12.70, 132.3),
    Figure("littlebit", "refine=qat, lr=4e-4, also_train=all, 376 steps", "0.8", 0.800, 14.41, 144.7),
    Figure("littlebit", "refine=qat, lr=5e-4, 373 steps", "0.55", 0.550, 19.51, 182.5),
    Figure("littlebit", "refine=qat, lr=2e-3, also_train=all, 401 steps", "0.3", 0.300, 42.23, 332.6),
    Figure("littlebit", "refine=qat, lr=4e-3, also_train=all, 608 steps", "0.1", 0.100, 112.1, 701.5),
    Figure("layerwise", "", "2.5 g128", 2.644, 6.581, 87.6),
    Figure("layerwise", "allocator=zd", "2.5 g128", 2.644, 6.466, 81.9),
    Figure("layerwise", "allocator=random, five draws, the best", "2.5 g128", 2.644, 6.56, 88.7),
    Figure("luq", "lo=2, hi=3", "2.5 g128", 2.644, 6.803, 90.7),
    Figure("luq", "", "2.5 g128", 2.644, 7.597, 105.6),
)

_GPTQ = ("grid", "damping", "act_order", "sequential", "correction", "refine", "transform", "rotate_values")
_BUDGET = ("bpw", "lo", "hi", "granularity", "tie", "reverse", "solver", "grid", "transform", "rotate_values")
BOA_SETTINGS = (
    "row_damping",
    "block_v",
    "v_row_factor",
    "qk_metric",
    "center_keys",
    "row_order",
    "joint_rows",
    "late_grids",
)
TRAINING_SETTINGS = (
    "steps",
    "batch",
    "accumulate",
    "lr",
    "intermediate",
    "also_train",
    "train_samples",
    "check_every",
    "patience",
)

PAGES: dict[str, Page] = {
    "rtn": Page(
        authors="the oldest method of the field",
        what="""
            Each weight goes to the nearest level of its group's grid, which spans the smallest to the largest weight.
            No data is read and no error is compensated.
        """,
        when="""
            At 8 bits, and often at 4. It is the fastest method and needs no calibration text; it is the baseline that
            every other one has to beat. Below 4 bits take another method.
        """,
        cost="No pass over data; one block in memory.",
        limits="""
            At 2 bits the model is unusable. Scales that are searched (`--set grid=mse`, or `grid=hessian`, which
            needs data) help.
        """,
        settings=("grid", "transform", "rotate_values"),
    ),
    "gptq": Page(
        authors="Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, accurate post-training quantization, 2022",
        what="""
            Weights are rounded one input column at a time. The error of each column is made up for in the columns
            that are still to come, as the second derivatives of the layer's output error say (the Hessian of its
            inputs on calibration text). Below 4 bits, scales and zeros are searched with the same Hessian instead of
            spanning the range: that is ours, and it matters most at 2 bits.
        """,
        when="""
            At 3 and 4 bits, and whenever a run has to be short. `refined` is GPTQ with more rounds, for fewer bits.
        """,
        cost="""
            One pass over the calibration text, and O(in^3 + out in^2) per linear: 58 s for 28 M parameters on 2 CPU
            cores.
        """,
        limits="""
            The calibration text decides: results at 2 bits move by about 10 % between texts. Use text of the kind
            that the model is for, and 32 sequences or more.
        """,
        settings=_GPTQ,
    ),
    "refined": Page(
        authors="ours, from published parts: GPTAQ (arXiv:2504.02692), QuantEase (arXiv:2309.01885)",
        what="""
            GPTQ with five additions. Each linear gets the width, and groups or one scale per row, that lower the error
            of its block's output most per byte, within the bytes of uniform widths. It aims half way between the
            weights and what would best repair the outputs that the quantized blocks before have changed. It quantizes a
            block in stages, each on the inputs that the stages before leave. It visits important column groups first.
            At the end it re-fits scales and revisits codes, in turn.
        """,
        when="The default below 4 bits when no method is named. Take `gptq` where time matters more.",
        cost="""
            A float model runs beside the quantized one, and the calibration text runs through a block once per stage:
            time and memory of several passes instead of one; a pass of the original model decides the widths.
        """,
        limits="""
            Aiming all the way (`correction=1`) overfits small calibration sets. Linears that engines fuse get different
            widths unless `--set tie=true`.
        """,
        settings=("tie", *_GPTQ),
    ),
    "slim": Page(
        authors="Huang et al.: SliM-LLM, salience-driven mixed-precision quantization, ICML 2025",
        what="""
            Inside each linear, groups of input columns that matter more get one bit more, and as many others one bit
            less, so that the average stays. Scales are searched between 0.9 and 1.1 of the range, with salient
            elements weighted. The codes come from GPTQ.
        """,
        when="""
            At 2 and 3 bits, to repeat the paper. With `--set grid=hessian` it is level with `gptq` at the same bytes:
            searched scales leave the widths little to gain.
        """,
        cost="1.8 times `gptq`: 104 s for 28 M parameters on 2 CPU cores.",
        limits="""
            2 to 7 bits, asymmetric grids, and it needs groups. Mixed widths are stored at their real size; the zeros
            of 1-bit groups are float16, so `bpw` is a little above that of uniform widths.
        """,
        settings=("criterion", *_GPTQ),
    ),
    "boa": Page(
        authors="Kim, Kim, Cho, Lee, Kim, Jeon: BoA, attention-aware post-training quantization, ICML 2025",
        what="""
            GPTQ counts the error of each linear's own output. BoA counts what attention makes of it: query and key
            weights are rounded for the attention that they give, value weights for what is mixed and projected
            afterwards. So errors are made up for across the rows of a head, too. All other linears are rounded by
            GPTQ.
        """,
        when="At 2 and 3 bits, on models with ordinary attention; also as `solver=boa` under every allocator and grid.",
        cost="""
            GPTQ's, and O(out in head_dim) more for queries, keys and values, whose rows wait for each other in
            blocks. `python benchmarks/bench_boa.py` measures a block on your machine.
        """,
        limits="""
            Where a block's attention is not recognized (a bias on the logits, latent attention), a note says so and
            GPTQ quantizes all of that block. With little calibration text it overfits: `damping` holds it back.
        """,
        settings=(*BOA_SETTINGS, *_GPTQ),
    ),
    "turboboa": Page(
        authors="the authors of BoA: TurboBoA, ICLR 2026",
        what="""
            BoA with three changes: rows of a block are quantized together, scales are fitted late, on rows that are
            corrected already, and the target contains a part of the error of the blocks before. At the end scales are
            re-fitted and codes revisited, across the rows of a head.
        """,
        when="Instead of `boa` at 2 bits in groups; with one scale per row the two are level.",
        cost="""
            Rows taken together save steps, the refinement costs more than that: about 1.6 times `boa` on a model of
            28 M parameters. A float model runs beside the quantized one.
        """,
        limits="Those of `boa`.",
        settings=("row_damping", "joint_rows", "late_grids", "qk_metric", "block_v", *_GPTQ),
    ),
    "ptq161": Page(
        authors="Zhao et al.: PTQ1.61, extremely low-bit post-training quantization, ACL 2025",
        what="""
            Input channels are either salient, for all rows of a linear, and keep codes of a few bits, or every weight
            of theirs becomes a sign, with a scale and a mean of its row and a scale of its column. `bits` is the
            average of both: 1.6 is three fifths of the channels at 2 bits, or a fifth at 4, as in the paper
            (`salient_bits=4`). The paper keeps the signs of the weights and
            trains the scales of each block by gradients. Here signs are chosen with compensation, as GPTQ chooses
            codes, salient channels come last and absorb what signs got wrong, and scales are exact least squares;
            training can follow (`block_steps`).
        """,
        when="""
            Between 1 and 2 bits, where grids of integers have nothing to offer. From 2 bits on, `refined` is better.
        """,
        cost="""
            Several times `gptq`, as signs are tried under several scales. A step of `block_steps` is a forward and a
            backward of one block on one sequence; the float model's hidden states are kept beside.
        """,
        limits="""
            One scale of each kind per row: no groups, no symmetric grids, no allocators over it. The vectors count:
            1.6 bits of codes are 1.71 stored in layers that are 512 wide, 1.62 in layers of 4096. Training scales on
            a GPU can differ in the last digits from run to run, as its backward passes do.
        """,
        settings=(
            "salient_bits",
            "salience",
            "compensate",
            "refine",
            "correction",
            "sequential",
            "damping",
            "grid",
            "block_steps",
            "block_lr",
            "block_scales",
            "block_angular",
            "transform",
        ),
    ),
    "littlebit": Page(
        authors="Lee, Kim, You, Kim: LittleBit, ultra low-bit quantization via latent factorization, NeurIPS 2025",
        what="""
            A weight becomes the product of two matrices of signs with a scale per row, per latent rank and per column;
            a second such product (the residual path) approximates what is left. The rank of every linear is solved
            from the bits, which count everything that is stored. `refine=none` is the paper's start alone.
            `refine=signs` (ours, the default) re-fits signs and scales in turn to the layer's inputs, without
            gradients. `refine=qat` goes on from there with the paper's way: the factors of the whole model are trained
            by distillation from the float model, on calibration text.
        """,
        when="""
            Below 1.5 bits, and alone below 1. `--bits 0.55 --set refine=qat`, on a GPU and with as much text as there
            is (`train_samples`). Without training it keeps little of the model. Training still gains when the defaults
            end: give `steps` the time that there is.
        """,
        cost="""
            `refine=signs`: one pass over the data, seconds per linear. `refine=qat`: training of the whole model, on
            several GPUs with `accelerate launch -m quantkit quantize ...`; beside the float model 16 bytes for each
            sign. It keeps a checkpoint and goes on from it when the same command is repeated. The figures: 1,200
            sequences of 1,024 tokens, steps of 8 of them, 135 s each on a GPU with much other load.
        """,
        limits="""
            Small layers cannot reach few bits: their scales take 16 (1 / rows + 1 / columns) bits per weight alone. A
            target that is out of reach is refused with the least that is possible. Embeddings and head dominate the
            file; `also_train=all` trains them, at their 16 bits, and was no better at 0.55 bits in a short run.
        """,
        settings=("refine", *TRAINING_SETTINGS, "paths", "sign_rounds", "damping", "transform"),
    ),
    "layerwise": Page(
        authors="Dumitru et al.: Layer-wise quantization beyond integer-bit levels, 2024",
        what="""
            Blocks are ranked by how much they change what passes through them (LIM: minus the cosine between input
            and output). From the top of the ranking on, blocks get the higher of two widths, as far as the budget in
            bytes reaches; the others get the lower one. The codes come from GPTQ, or from the solver of your choice.
        """,
        when="""
            For budgets between whole numbers: `--bits 2.5`, or `--bpw 2.8` stored bits. `--set allocator=zd` ranks by
            the weights alone, needs no pass over data, and was better on the model that we measured.
        """,
        cost="That of the solver; for LIM one pass of the original model over the calibration text.",
        limits="""
            The unit is a block: with 8 blocks a step is 0.126 bits; `granularity=linear` (with `zd` or `error`) meets
            a budget closely. Do not expect it to reach the upper neighbour. More: docs/allocators.md.
        """,
        settings=("allocator", *_BUDGET, "two_sided"),
    ),
    "luq": Page(
        authors="Bhatnagar, Xu, Tan, Ahuja: LUQ, layerwise ultra-low-bit quantization, TMLR 2026",
        what="""
            Blocks whose output activations fall into few clusters (low entropy) get 2 bits, the others 4; any average
            between. The paper's setting is vision-language models, with pictures among the calibration data.
        """,
        when="""
            To repeat the paper, with pictures in the calibration set. On a small text model and on a small
            vision-language model it was no better than a random choice of blocks, and there its reverse was better.
        """,
        cost="That of the solver, one pass of the original model, and a clustering of 4096 tokens per block.",
        limits="""
            On a small model the ranking changes with the calibration text. Widths that are two bits apart did worse
            than neighbours at the same average. More: docs/allocators.md.
        """,
        settings=("entropy", *_BUDGET),
    ),
    "casp": Page(
        authors="Gholami, Akbari, Cannons, Zhang: CASP, compression by attention sparsity, CVPR 2025",
        what="""
            Query and key projections become products of two low-rank factors, the best ones for the calibration
            inputs. The bytes that this saves go to the blocks whose errors change the predictions most. Only blocks
            where it pays get factors; `--set factor_all=true` gives them to all, as the paper does.
        """,
        when="""
            For vision-language models near 2 bits: on a small trained one 2.2 bits halve the KL divergence of GPTQ's 2
            bits, mostly by where the bits go. The run measures the paper's condition (sparse attention over image
            tokens that resemble each other) and says when it does not hold; that it holds is not enough.
        """,
        cost="Twice that of the solver, as losses are measured first, and some SVDs per query and key projection.",
        limits="""
            With factors in all blocks that model lost 14 points of its answers. Models whose queries and keys are one
            linear with the values are refused. Keys with fewer heads than queries get factors of their own and save
            little. Compare with `--set keep_ratio=1`, the same allocation without factors: docs/results.md.
        """,
        settings=("keep_ratio", "factor_all", "qk_bits", "base", "tokens", *_BUDGET),
    ),
}
