"""Draw what a KV cache allocates over the length of the context: docs/kv_memory.png.

    pip install 'quantkit[report]'
    python scripts/plot_kv_memory.py [docs/kv_memory.png]

Caches of one layer (8 KV heads of 128 channels) are filled with random tokens; what is drawn is the bytes of all their
tensors, against those of bfloat16 keys and values.
"""

from __future__ import annotations

import sys

import torch

from quantkit.algorithms.kv.registry import parse_kv_spec
from quantkit.runtime.kv_sequence import SequenceCache

HEADS, HEAD_DIM, STEP, LONGEST = 8, 128, 256, 8192
SPECS = ["akvq-vl", "zipcache", "kivi", "akvq-vl:bits=4"]


def sizes(spec: str) -> tuple[list[int], list[int]]:
    """Context lengths, and the bytes of the cache at each."""
    sequence = SequenceCache(parse_kv_spec(spec).layer_policy(0), HEADS, HEAD_DIM, torch.float16, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    lengths, held = [], []
    while sequence.length < LONGEST:
        keys, values = torch.randn(2, HEADS, STEP, HEAD_DIM, generator=generator)
        sequence.append(keys, values, keys[:, None])
        lengths.append(sequence.length)
        held.append(sequence.nbytes)
    return lengths, held


def main(path: str = "docs/kv_memory.png") -> None:
    """Write the picture, and the last ratio of each policy to stdout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    full = 4 * HEADS * HEAD_DIM  # bytes of a token in bfloat16
    for index, spec in enumerate(SPECS):
        lengths, held = sizes(spec)
        ratios = [length * full / size for length, size in zip(lengths, held, strict=True)]
        left.plot(lengths, [size / 2**20 for size in held], label=spec)
        right.plot(lengths, ratios, label=spec)
        print(f"{spec}: {ratios[2000 // STEP]:.2f} times smaller at 2,048 tokens, {ratios[-1]:.2f} at {lengths[-1]:,}")
        if index == 0:
            left.plot(lengths, [length * full / 2**20 for length in lengths], "k--", label="bfloat16")
    left.set(xlabel="tokens", ylabel="MiB of one layer", title="Allocated")
    right.set(xlabel="tokens", ylabel="times smaller than bfloat16", title="Ratio", ylim=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"KV cache of one layer, {HEADS} KV heads of {HEAD_DIM} channels")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
