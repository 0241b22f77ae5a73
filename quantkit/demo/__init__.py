"""The embedded demo model: a small trained Llama and its tokenizer, so that everything can be tried offline.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(quantkit.demo.model_path())

What it is. A Llama of 3.9 million parameters in bfloat16 (7.88 MB): 6 blocks, hidden 256, intermediate 512, 4 heads,
2 key/value heads, context 1024, tied embeddings, and a byte-level BPE of 1536 tokens. Nine tenths of its parameters are
in the blocks' linear layers, and every ``in_features`` is a multiple of 128.

How it was trained. ``python scripts/train_demo.py --compile`` on the standard library of CPython 3.13.0
(`quantkit.demo.corpus`: 31 MB, 10.6 million tokens), 20 epochs, under three minutes on one H200. It writes code and
docstrings that look right for a line or two; it knows nothing. It is here because its weights were trained long enough
to have something to lose.

What it measures. Perplexity on the held-out modules of the same CPython (joined by blank lines, no special tokens, 592
consecutive windows of 512 tokens, float32 arithmetic, mean over windows):

    unigram  bigram  |  model  |  rounded to nearest, groups of 128: 4 bits  3 bits  2 bits
      556.4    84.4  |   9.56  |                                       9.99   12.06   63.38

Other Python versions have slightly other texts in the same modules, and hence slightly other figures.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from quantkit.errors import FileError

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder of the demo model, in the Hugging Face layout; it works from a checkout and from an installed wheel.

    Raises:
        FileError: quantkit was installed without the model's files.
    """
    folder = Path(str(resources.files("quantkit.demo"))) / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileError(f"{folder}: the demo model is missing from this installation; reinstall quantkit")
    return folder
