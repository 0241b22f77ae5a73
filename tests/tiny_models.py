"""Small random models of the real transformers classes, with a byte-level tokenizer, saved to a folder in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HIDDEN, INTERMEDIATE, N_BLOCKS, MAX_POSITION = 64, 128, 2, 256
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0 to 3; the 256 bytes follow
VOCAB = 288

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITION,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": INTERMEDIATE, "num_key_value_heads": 2}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 16}
_SLIDING: dict[str, Any] = {"sliding_window": 64, "query_pre_attn_scalar": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, **_SLIDING},
    "gemma3": {**_GEMMA, **_SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _GROUPED,
    "opt": {**_COMMON, "ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN},
    "gpt_neox": {**_COMMON, "intermediate_size": INTERMEDIATE},
    "qwen3_moe": {**_GROUPED, **_MOE, "head_dim": 16},
}
# Not in FAMILIES: no test needs it for every family
_EXTRA = {
    "deepseek_v3": {
        **_COMMON,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "mixtral": _GROUPED,
    "olmoe": {**_COMMON, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}


def tiny_model(
    family: str, folder: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Save a random model of two blocks and its tokenizer under ``folder``.

    Args:
        family: a key of `FAMILIES`.
        folder: where the model folder is made, named after family and seed.
        seed: of the weights; the global generator is left as it was.
        dtype: of the stored weights.
        settings: further config fields, such as ``tie_word_embeddings=True``.

    Returns:
        The model folder: config, safetensors, tokenizer.
    """
    path = folder / f"{family}-{seed}"
    build(family, seed, **settings).to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def build(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """The model of `tiny_model` in memory, float32, in evaluation mode."""
    config = CONFIG_MAPPING[_MODEL_TYPES.get(family, family)](**{**(FAMILIES | _EXTRA)[family], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            _randomize(parameter.data)
    return model


def build_llava(seed: int = 0) -> PreTrainedModel:
    """A vision-language model: two CLIP blocks, a projector and two llama blocks; 28 x 28 images are four tokens."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=LlamaConfig(**_GROUPED),
        image_token_index=270,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            _randomize(parameter.data)
    return model


def _randomize(weight: torch.Tensor) -> None:
    """Scale of trained networks: unit gain per matrix with a few large columns, norms and biases off their defaults."""
    if weight.ndim == 1:
        weight.add_(0.1 * torch.randn_like(weight))
        return
    in_features = weight.shape[-1]
    columns = torch.ones(in_features)
    columns[torch.randperm(in_features)[:2]] = 4.0
    weight.copy_(torch.randn_like(weight) * columns / in_features**0.5)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 4 to 259, after the four special tokens; no special token is added to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=MAX_POSITION,
    )
