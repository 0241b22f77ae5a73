"""The first call of the README: the embedded model, quantized, loaded and written with, by the public names alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.runtime.loading import load_tokenizer


@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = quantkit.quantize("demo", method="gptq", bits=4, n_samples=8, seq_len=64)
    assert result.output == Path("demo-gptq-4b")
    assert [path.name for path in tmp_path.iterdir()] == ["demo-gptq-4b"]
    assert result.size_bytes < result.original_bytes
    # a trained network's inputs are far from isotropic: its outputs err less than its weights would by rounding
    assert max(module.relative_error for module in result.modules) < 0.2
    assert "# quantkit demo, gptq, 4 bits" in (result.output / "README.md").read_text()
    model, tokenizer = quantkit.load(result.output, verify=True), load_tokenizer(result.output)
    prompt = torch.tensor([tokenizer("def main(", add_special_tokens=False)["input_ids"]])
    written = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert written.shape[0] == 1
    assert prompt.shape[1] < written.shape[1] <= prompt.shape[1] + 8
