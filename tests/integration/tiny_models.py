"""A tiny random model of each architecture of rayhf/models/architectures.py.

Hidden size 64, two layers, heads of 32 (the smallest size that vLLM's CPU kernels have). Settings
that other models lack are switched on: windows shorter than the test's prompts, capped and scaled
logits, multipliers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engines import END, MAX_LENGTH, TURN, save_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

VOCABULARY = 96
"""More than the tokenizer's tokens."""
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": END,
}
WINDOW = {"sliding_window": 32}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
    "head_dim": "unset",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": MIXTURE,
    "mistral": WINDOW,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": WINDOW
    | {
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text": WINDOW
    | {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24},
    "phi3": WINDOW | {"partial_rotary_factor": 0.5},
    "granite": {
        "logits_scaling": 3.0,
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.1,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm": {"partial_rotary_factor": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": WINDOW
    | {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": WINDOW,
    "exaone4": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {},
    "nemotron": {"partial_rotary_factor": 0.5},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "olmo3": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "arcee": {},
    "ministral3": {},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 64},
    "olmoe": MIXTURE,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"topk_method": "noaux_tc"},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
}


def save_tiny_model(model_type: str, directory: Path, **overrides: Any) -> PreTrainedModel:
    """Write a random float32 model with a tokenizer, and return it."""
    torch.manual_seed(0)
    settings = BASE | SETTINGS[model_type] | overrides
    config = CONFIG_MAPPING[model_type](**{k: v for k, v in settings.items() if v != "unset"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Norms and biases start at 1 and 0, where a mistake in their order would not show.
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.generation_config = GenerationConfig(eos_token_id=[END, TURN])
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model
