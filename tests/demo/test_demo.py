"""The demo corpus is what it says, and the demo model is a trained model that is worth quantizing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.demo import corpus, model_path
from quantkit.errors import FileError, RequestError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def train_documents() -> list[corpus.Document]:
    return corpus.named_documents("train")


@pytest.fixture(scope="module")
def held_out_documents() -> list[corpus.Document]:
    return corpus.named_documents("heldout")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/train_demo.py: the measured figures come from its functions, so they are what is tested."""
    spec = importlib.util.spec_from_file_location("train_demo", ROOT / "scripts" / "train_demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module  # dataclasses looks its module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_demo"]


@pytest.fixture(scope="module")
def evaluation_ids(held_out_documents: list[corpus.Document]) -> torch.Tensor:
    """8 windows of 512 tokens spread over the held-out text, int64 [8 * 512]."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    text = "\n\n".join(document.text for document in held_out_documents)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    return windows[:: len(windows) // 8][:8].flatten()


# Corpus


def test_every_document_is_clean_text(
    train_documents: list[corpus.Document], held_out_documents: list[corpus.Document]
) -> None:
    for document in train_documents + held_out_documents:
        assert document.text.strip()
        assert document.text.endswith("\n")
        assert not document.text.endswith("\n\n")
        assert "\0" not in document.text
        assert "\r\n" not in document.text


def test_there_is_enough_text(
    train_documents: list[corpus.Document], held_out_documents: list[corpus.Document]
) -> None:
    core = [d for d in train_documents if corpus._OPTIONAL.isdisjoint(d.name.split("."))]
    core_chars = sum(len(document.text) for document in core)
    held_out_chars = sum(len(document.text) for document in held_out_documents)
    assert core_chars > 6_000_000
    assert 0.05 < held_out_chars / (core_chars + held_out_chars) < 0.10


def test_no_third_party_module_and_no_build_product_is_read(train_documents: list[corpus.Document]) -> None:
    roots = {document.name.split(".")[0] for document in train_documents if document.kind != "topic"}
    assert not roots & {"site-packages", "dist-packages", "torch", "transformers", "pytest", "quantkit", "numpy"}
    assert not [root for root in roots if root.startswith(("_sysconfig", "config-"))]
    # Everything that is importable at all is the standard library's (the rest: test data, build helpers, "this").
    assert len(roots - set(sys.stdlib_module_names) - {"test", "__phello__", "__hello__"}) <= 3


def test_all_held_out_modules_exist_in_this_python(held_out_documents: list[corpus.Document]) -> None:
    assert {document.name for document in held_out_documents} == set(corpus.HELD_OUT)
    assert [d.kind for d in held_out_documents] == sorted(d.kind for d in held_out_documents)  # pages, then sources


def test_held_out_modules_and_their_tests_are_not_trained_on(train_documents: list[corpus.Document]) -> None:
    for document in train_documents:
        if document.kind != "topic":
            parts = document.name.split(".")
            assert parts[0] not in corpus.HELD_OUT
            assert not {f"test_{name}" for name in corpus.HELD_OUT} & set(parts)


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of 150 characters and more, white space collapsed: prose and code that cannot agree by chance."""
    for paragraph in re.split(r"\n[ \t#]*\n", text):
        collapsed = " ".join(paragraph.split())
        if len(collapsed) >= 150:
            yield collapsed


def test_no_held_out_paragraph_is_in_the_training_text(
    train_documents: list[corpus.Document], held_out_documents: list[corpus.Document]
) -> None:
    trained = {paragraph for document in train_documents for paragraph in paragraphs(document.text)}
    held_out = [paragraph for document in held_out_documents for paragraph in paragraphs(document.text)]
    assert len(held_out) > 1000
    assert [paragraph for paragraph in held_out if paragraph in trained] == []


def test_a_calibration_prefix_mixes_kinds_and_modules(train_documents: list[corpus.Document]) -> None:
    assert {document.kind for document in train_documents[:200]} == {"topic", "page", "source"}
    first = train_documents[:60]  # about 250 kB
    assert {document.kind for document in first} >= {"page", "source"}
    assert len({document.name.split(".")[0] for document in first}) >= 20
    assert all(corpus._OPTIONAL.isdisjoint(document.name.split(".")) for document in first)


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def test_the_corpus_is_the_same_in_another_process(train_documents: list[corpus.Document]) -> None:
    code = (
        "import hashlib; from quantkit.demo import corpus; "
        "print(hashlib.sha256('\\0'.join(corpus.documents('train')).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest([document.text for document in train_documents])


def test_pieces_of_a_source_lose_nothing_but_blank_lines() -> None:
    source = "".join(f'def f{i}():\n    """Number {i}."""\n    return {i}\n\n\n' for i in range(500))
    pieces = list(corpus._pieces(source))
    assert len(pieces) > 3
    assert all(piece.startswith("def f") for piece in pieces)
    assert all(len(piece) < corpus._PIECE_CHARS + 100 for piece in pieces)
    assert "".join(pieces).replace("\n", "") == source.replace("\n", "")


def test_a_page_shows_signatures_with_their_docstrings() -> None:
    source = (
        '# comment\n"""About the module."""\n\nclass A(B):\n    """An A."""\n\n'
        '    def m(self, x: int = 1,\n          y="a"):\n        """Do m.\n\n        Twice.\n        """\n\n'
        "    def silent(self):\n        return 1\n"
    )
    assert corpus._page("mod", source) == (
        "Help on module mod:\n\nAbout the module.\n\nclass A(B)\n    An A.\n\n"
        '    def m(self, x: int = 1, y="a")\n        Do m.\n\n        Twice.\n'
    )
    assert corpus._page("mod", "x = 1\n") == ""


def test_unknown_split() -> None:
    message = r"unknown split 'heldotu' of the demo corpus; did you mean 'heldout'\? known: heldout, train"
    with pytest.raises(RequestError, match=message):
        corpus.documents("heldotu")  # type: ignore[arg-type]


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "os.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# \xff\n")  # not UTF-8: left out
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileError, match=r"found the source of 1 standard library modules, the demo corpus needs"):
        corpus.documents("train")


# Model


def test_size_and_files() -> None:
    files = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["model.safetensors"] <= 8_000_000
    assert sum(files.values()) < 9_000_000


def test_config_is_quantizable_and_names_no_path() -> None:
    config = json.loads((model_path() / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert "_name_or_path" not in config
    for key in ("hidden_size", "intermediate_size"):
        assert config[key] % 128 == 0
    assert config["num_attention_heads"] * config["head_dim"] % 128 == 0
    for path in model_path().glob("*config.json"):
        assert not re.search(r'"[^"]*/(?:root|home|tmp|work|Users)/', path.read_text())


def test_tokenizer_round_trips_and_adds_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 1024
    text = "  def f(x):\n\treturn x ** 2  # naïve — 数\r\n\n\n !"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert not {0, 1, 2} & set(ids)
    assert tokenizer("<s>").input_ids == [1]


def test_loads_offline_in_its_own_dtype_and_generates() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_935_488
    prompt = tokenizer("<s>import os\nimport ", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0]).startswith("<s>import os\nimport ")


@pytest.mark.slow
def test_perplexity_is_far_below_the_bigrams_and_two_bits_break_it(
    script: ModuleType, evaluation_ids: torch.Tensor, train_documents: list[corpus.Document]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    ppl = math.exp(script.window_nll(model, evaluation_ids).mean().item())

    # One megabyte instead of thirty: this bigram is weaker than the documented one (84), hence a factor of 5, not 8.
    text = "\n\n".join(document.text for document in train_documents[:250])
    counts = script.bigram_counts(torch.tensor(tokenizer(text).input_ids), model.config.vocab_size)
    bigram_ppl = math.exp(script.bigram_nll(counts, evaluation_ids, discount=0.8))
    unigram_ppl = math.exp(script.unigram_nll(counts, evaluation_ids, added=1.0))
    # 9.5 on the whole text; the mean of 8 windows scatters by 0.40 / sqrt(8) = 0.14 nats: three times that, exp(0.42).
    assert 9.5 / 1.53 < ppl < 9.5 * 1.53
    assert bigram_ppl > 5 * ppl
    assert unigram_ppl > 3 * bigram_ppl

    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = script.round_to_nearest(layer.weight.data, bits=2)
    assert math.exp(script.window_nll(model, evaluation_ids).mean().item()) > 3 * ppl


# Measurements of the script


def test_bigram_probabilities_sum_to_one(script: ModuleType) -> None:
    vocab_size = 11
    ids = torch.randint(vocab_size, (300,), generator=torch.Generator().manual_seed(0))
    ids[ids == 4] = 5  # token 4 is never seen: its row backs off to the continuation frequencies alone
    counts = script.bigram_counts(ids, vocab_size)
    assert int(counts.sum()) == 299

    def nll_of_alternating(first: int, second: int) -> float:
        """A window of 512 tokens: the pair (first, second) 256 times, (second, first) 255 times."""
        window = torch.tensor([first, second] * 256)
        return 511 * float(script.bigram_nll(counts, window, discount=0.75))

    for previous in (0, 4):
        total = 0.0
        for following in range(vocab_size):
            forward, backward = nll_of_alternating(previous, following), nll_of_alternating(following, previous)
            # forward = 256 a + 255 b and backward = 255 a + 256 b; a, the wanted pair's NLL, by Cramer's rule.
            total += math.exp(-(256 * forward - 255 * backward) / 511)
        assert total == pytest.approx(1.0, abs=1e-3)  # float32 means, multiplied by 511


def test_round_to_nearest_keeps_to_half_a_scale_and_to_its_levels(script: ModuleType) -> None:
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        rounded = script.round_to_nearest(weight, bits)
        groups, original = rounded.view(5, 2, 128), weight.view(5, 2, 128)
        low, high = original.amin(-1, keepdim=True).clamp(max=0), original.amax(-1, keepdim=True).clamp(min=0)
        scales = (high - low) / (2**bits - 1)
        # Half a scale from rounding the code; half a scale more at the ends, from rounding the zero.
        assert bool(((groups - original).abs() <= scales * 1.0001).all())
        assert all(len(group.unique()) <= 2**bits for row in groups for group in row)
