"""`quantkit generate`: text on stdout, one object with --json, the same for the same seed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from cli_runs import Inputs, quantkit


def test_json(packed: Path) -> None:
    done = quantkit("generate", packed, "--prompt", "the fox", "--max-new-tokens", 8, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.json.keys() == {"model", "prompt", "text", "new_tokens", "seconds", "tokens_per_second"}
    assert (done.json["model"], done.json["prompt"]) == (str(packed), "the fox")
    assert 1 <= done.json["new_tokens"] <= 8


def test_text_goes_to_stdout_and_the_speed_to_stderr() -> None:
    """The demo's text is plain, so that streaming and decoding at once must agree to the letter."""
    arguments = ("generate", "demo", "--prompt", "def main():", "--max-new-tokens", 12)
    streamed, whole = quantkit(*arguments), quantkit(*arguments, "--json")
    assert streamed.exit_code == 0
    assert streamed.stdout == whole.json["text"] + "\n"
    assert re.fullmatch(r"12 tokens in \S+ s \(\S+ tokens per second\)\n", streamed.stderr)


def test_a_seed_decides_the_text(packed: Path) -> None:
    def text(*flags: object) -> str:
        arguments = ("generate", packed, "-p", "the", "--max-new-tokens", 16, "--json", *flags)
        return str(quantkit(*arguments).json["text"])

    assert text("--temperature", 1) == text("--temperature", 1, "--seed", 0)
    assert text("--temperature", 1) != text("--temperature", 1, "--seed", 1)
    assert text() == text("--seed", 1)  # the most likely token needs no chance


def test_an_ordinary_model_and_an_empty_prompt(inputs: Inputs) -> None:
    done = quantkit("generate", inputs.model, "--prompt", "", "--max-new-tokens", 4, "--json")
    assert done.exit_code == 0
    assert done.json["prompt"] == ""


def test_the_models_limit(packed: Path) -> None:
    near = quantkit("generate", packed, "--prompt", "a" * 254, "--json")
    assert near.json["new_tokens"] <= 2
    assert near.stderr == "the model's limit is 256 tokens: generating at most 2\n"
    beyond = quantkit("generate", packed, "--prompt", "a" * 256)
    assert beyond.exit_code == 2
    assert beyond.error == "the prompt has 256 tokens, the model's limit is 256; shorten it"


def test_refusals(packed: Path, tmp_path: Path) -> None:
    for arguments, exit_code, message in (
        ((tmp_path / "nowhere",), 1, "no folder"),
        ((packed, "--device", "abacus"), 2, "unknown device 'abacus'"),
        ((packed, "--dtype", "int3"), 2, "unknown dtype 'int3'"),
    ):
        done = quantkit("generate", *arguments, "--prompt", "a")
        assert done.exit_code == exit_code
        assert message in done.error


def test_kv_cache(inputs: Inputs) -> None:
    flags = ("generate", inputs.model, "--prompt", "the quick brown fox " * 6, "--max-new-tokens", 8)
    result = quantkit(*flags, "--kv", "int8:window=8", "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["kv"]["spec"] == "int8:window=8"
    assert made["kv"]["bytes"] > 0
    assert made["new_tokens"] == 8
    plain = quantkit(*flags, "--kv", "int8:window=8")
    assert "KV cache int8:window=8: " in plain.stderr


def test_an_unknown_kv_policy_is_refused(inputs: Inputs) -> None:
    result = quantkit("generate", inputs.model, "--prompt", "a", "--kv", "kiwi")
    assert result.exit_code == 2
    assert "unknown KV policy 'kiwi'; did you mean 'kivi'" in result.stderr


def test_a_packed_model_with_a_packed_cache(packed: Path) -> None:
    flags = ("generate", packed, "--prompt", "the quick brown fox " * 6, "--max-new-tokens", 8)
    result = quantkit(*flags, "--kv", "akvq-vl:window=8", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_step_is_a_graph() -> None:
    """Without a KV policy and sampling; the tokens are those of the decoder, to the end of the text."""
    from quantkit.runtime.graphs import GraphDecoder
    from quantkit.runtime.loading import load, load_tokenizer

    arguments = ("generate", "demo", "--prompt", "def main():", "--max-new-tokens", 40, "--device", "cuda")
    streamed, whole = quantkit(*arguments), quantkit(*arguments, "--json")
    assert streamed.stdout == whole.json["text"] + "\n"
    tokenizer, model = load_tokenizer("demo"), load("demo", device="cuda")
    ids = tokenizer("def main():", return_tensors="pt").input_ids
    found = GraphDecoder(model, 64, fuse=True).generate(ids, 40, model.generation_config.eos_token_id)
    new = found[0, ids.shape[1] :].tolist()
    assert whole.json["new_tokens"] == len(new)
    assert whole.json["text"] == tokenizer.decode(new, skip_special_tokens=True)
