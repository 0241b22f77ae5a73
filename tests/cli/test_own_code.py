"""A model whose architecture is code in its own folder: refused until trusted, then it goes through every verb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import Inputs, quantkit

TRUST = "--trust-remote-code"
REFUSAL = "the model comes with code of its own; read it, then pass --trust-remote-code (trust_remote_code=True)"
CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model of `inputs` under a type that transformers does not know."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(inputs.model, tmp_path / "own")
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(CODE)
    return folder


def test_every_verb_asks_for_trust_and_works_with_it(own: Path, inputs: Inputs, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    quantize = ("quantize", own, *inputs.flags, "--method", "rtn", "-o", packed)
    evaluate = ("eval", packed, "--reference", own, "--data", inputs.text, "--seq-len", 32, "--limit", 2, "--json")
    generate = ("generate", packed, "--prompt", "the fox", "--max-new-tokens", 4, "--json")
    assert REFUSAL in quantkit(*quantize).error
    assert quantkit(*quantize, TRUST).exit_code == 0
    assert REFUSAL in quantkit(*evaluate).error
    (text,) = quantkit(*evaluate, TRUST).json["perplexity"].values()
    assert REFUSAL in quantkit(*generate).error
    assert quantkit(*generate, TRUST).json["new_tokens"] >= 1
    plain = tmp_path / "plain"
    assert quantkit("quantize", inputs.model, *inputs.flags, "--method", "rtn", "-o", plain).exit_code == 0
    (same,) = quantkit("eval", plain, *evaluate[2:3], inputs.model, *evaluate[4:]).json["perplexity"].values()
    assert text == same
