"""Architectures of language models: which were tested, and with what result.

In: a model's config.json. Out: nothing for a tested architecture, a warning for an untested one;
ConfigError for one that does not work, or that transformers or vLLM does not have.

An entry is what tests/integration/test_architecture_engines.py measured with a random tiny model:
the learner's log-probs against transformers' own forward pass; the engine's against the learner's,
at the start, after a weight sync with LoRA adapters and after one with all weights; several rows in
one batch and one at a time. All float32 on CPU, largest difference below 1e-4 nats.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayhf.config.schema import LearnerConfig, Packing
from rayhf.errors import ConfigError
from rayhf.models.source import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Result for one model type, transformers' `model_type`."""

    engine: str
    """Class name in config.json (`architectures`), by which vLLM chooses its implementation."""
    models: str
    """Well-known models of this type."""
    note: str = ""
    """What is special about it and was tested."""
    refused: str = ""
    """Why it does not work; empty where it does."""
    whole_window: bool = False
    """Works only for sequences that fit the model's sliding window."""
    padded: str = ""
    """Why its rows cannot be packed (learner.packing); empty where they can."""


_MIXTURE = "mixture of experts; LoRA adapts the attention only"
_WINDOW = "sliding window"
_PARTIAL = "partial rotary embedding"
_NO_TREE = "its layers in transformers do not hand the tree of rows through to their attention"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        engine="LlamaForCausalLM", models="Llama 2 and 3, SmolLM2, TinyLlama, DeepSeek-R1-Distill"
    ),
    "qwen2": Architecture(
        engine="Qwen2ForCausalLM", models="Qwen 2 and 2.5", note="tied embeddings, biases"
    ),
    "qwen3": Architecture(engine="Qwen3ForCausalLM", models="Qwen 3", note="tied embeddings"),
    "mistral": Architecture(engine="MistralForCausalLM", models="Mistral 7B, Nemo", note=_WINDOW),
    "ministral3": Architecture(engine="Ministral3ForCausalLM", models="Ministral 3"),
    "gemma": Architecture(engine="GemmaForCausalLM", models="Gemma", note="tied embeddings"),
    "gemma2": Architecture(
        engine="Gemma2ForCausalLM",
        models="Gemma 2",
        note=f"capped logits and attention scores (eager attention), {_WINDOW}",
    ),
    "gemma3_text": Architecture(
        engine="Gemma3ForCausalLM", models="Gemma 3 270M and 1B", note=_WINDOW
    ),
    "phi": Architecture(engine="PhiForCausalLM", models="Phi 1 to 2", note=_PARTIAL),
    "phi3": Architecture(
        engine="Phi3ForCausalLM", models="Phi 3 and 4", note=f"{_WINDOW}, {_PARTIAL}"
    ),
    "granite": Architecture(
        engine="GraniteForCausalLM", models="Granite 3", note="scaled logits, multipliers"
    ),
    "olmo2": Architecture(engine="Olmo2ForCausalLM", models="OLMo 2"),
    "olmo3": Architecture(engine="Olmo3ForCausalLM", models="OLMo 3", note=_WINDOW),
    "smollm3": Architecture(
        engine="SmolLM3ForCausalLM", models="SmolLM3", note="layers without positions"
    ),
    "glm": Architecture(engine="GlmForCausalLM", models="GLM 4 (9B, hf)", note=_PARTIAL),
    "glm4": Architecture(engine="Glm4ForCausalLM", models="GLM 4-0414", note=_PARTIAL),
    "cohere": Architecture(
        engine="CohereForCausalLM", models="Command R", note="scaled logits, tied embeddings"
    ),
    "cohere2": Architecture(
        engine="Cohere2ForCausalLM",
        models="Command R7B and A",
        note="scaled logits; only up to the sliding window, beyond which vLLM attends to one token "
        "more than transformers",
        whole_window=True,
    ),
    "stablelm": Architecture(
        engine="StableLmForCausalLM", models="StableLM 2", note=_PARTIAL, padded=_NO_TREE
    ),
    "starcoder2": Architecture(engine="Starcoder2ForCausalLM", models="StarCoder 2", note=_WINDOW),
    "exaone4": Architecture(engine="Exaone4ForCausalLM", models="EXAONE 4", note=_WINDOW),
    "ernie4_5": Architecture(engine="Ernie4_5ForCausalLM", models="ERNIE 4.5 0.3B"),
    "nemotron": Architecture(
        engine="NemotronForCausalLM", models="Nemotron 4", note=_PARTIAL, padded=_NO_TREE
    ),
    "hunyuan_v1_dense": Architecture(engine="HunYuanDenseV1ForCausalLM", models="Hunyuan dense"),
    "seed_oss": Architecture(engine="SeedOssForCausalLM", models="Seed-OSS"),
    "arcee": Architecture(engine="ArceeForCausalLM", models="AFM 4.5B"),
    "qwen2_moe": Architecture(engine="Qwen2MoeForCausalLM", models="Qwen 1.5 MoE", note=_MIXTURE),
    "qwen3_moe": Architecture(engine="Qwen3MoeForCausalLM", models="Qwen 3 30B-A3B", note=_MIXTURE),
    "mixtral": Architecture(engine="MixtralForCausalLM", models="Mixtral", note=_MIXTURE),
    "olmoe": Architecture(engine="OlmoeForCausalLM", models="OLMoE", note=_MIXTURE),
    "granitemoe": Architecture(
        engine="GraniteMoeForCausalLM", models="Granite 3 MoE", note=f"{_MIXTURE}; scaled logits"
    ),
    "glm4_moe": Architecture(
        engine="Glm4MoeForCausalLM", models="GLM 4.5", note=f"{_MIXTURE}; router bias not trained"
    ),
    "deepseek_v2": Architecture(
        engine="DeepseekV2ForCausalLM",
        models="DeepSeek V2",
        refused="vLLM 0.32's CPU build computes other log-probs than transformers (by 0.7 nats in "
        "the test), and no GPU was there to compare",
    ),
    "deepseek_v3": Architecture(
        engine="DeepseekV3ForCausalLM",
        models="DeepSeek V3, R1",
        refused="vLLM 0.32's CPU build computes other log-probs than transformers (by 0.7 nats in "
        "the test), and no GPU was there to compare",
    ),
    "ernie4_5_moe": Architecture(
        engine="Ernie4_5_MoeForCausalLM",
        models="ERNIE 4.5 21B-A3B",
        refused="vLLM 0.32's CPU build ignores the bias of its router, and no GPU was there to "
        "compare",
    ),
    "gpt_oss": Architecture(
        engine="GptOssForCausalLM",
        models="gpt-oss",
        refused="vLLM 0.32 fails to load new expert weights into a running engine",
    ),
    "gpt_neox": Architecture(
        engine="GPTNeoXForCausalLM",
        models="Pythia",
        refused="vLLM 0.32 computes other log-probs than transformers (by 2 nats in the test)",
    ),
    "opt": Architecture(
        engine="OPTForCausalLM",
        models="OPT",
        refused="its layers are in a decoder within the body, which the learner does not run alone",
    ),
}

# Classes for which both vLLM 0.32 and transformers have a causal language model; a test compares.
ENGINE_CLASSES = frozenset(
    """
    AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BloomForCausalLM
    Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM CwmForCausalLM DbrxForCausalLM
    DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
    Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM
    FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM
    GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
    Gemma3nForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM
    Glm4MoeLiteForCausalLM GlmForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM
    GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
    GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM HYV3ForCausalLM
    HYV4ForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
    HyperCLOVAXForCausalLM InklingForCausalLM Jais2ForCausalLM JambaForCausalLM
    KimiLinearForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM
    Llama4ForCausalLM LlamaForCausalLM LongcatFlashForCausalLM Mamba2ForCausalLM
    MambaForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM
    MiniMaxM2ForCausalLM Ministral3ForCausalLM MistralForCausalLM MixtralForCausalLM
    NemotronForCausalLM NemotronHForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM
    OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM Phi3ForCausalLM PhiForCausalLM
    Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM
    Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen4ExpForCausalLM
    SeedOssForCausalLM SmolLM3ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM
    VaultGemmaForCausalLM Zamba2ForCausalLM
    """.split()  # noqa: SIM905 (a list of strings would take a line for each)
)


def check_architecture(config: ModelConfig, *, key: str, max_length: int | None) -> str | None:
    """Return a warning for an architecture that was not tested, None for a tested one.

    `max_length`: longest sequence in tokens. Raises ConfigError where the model does not work.
    """
    model_type = config.get("model_type")
    entry = ARCHITECTURES.get(str(model_type))
    if entry is None:
        return _check_untested(config, key=key)
    if entry.refused:
        raise ConfigError(f"{key}: {model_type} models do not work: {entry.refused}")
    window = config.get("sliding_window")
    if entry.whole_window and window and (max_length is None or max_length > window):
        raise ConfigError(
            f"{key}: {model_type} models work only within their sliding window, beyond which vLLM "
            f"attends to one token more than transformers; expected policy.max_length of at most "
            f"{window}, got {max_length}"
        )
    return None


def why_padded(model_type: str | None, learner: LearnerConfig) -> str | None:
    """Return why rows of this model cannot be packed; None where they can."""
    if learner.attention != "sdpa":
        return f"learner.attention={learner.attention} has no mask for them"
    entry = ARCHITECTURES.get(str(model_type))
    if entry is None:
        return f"{model_type} models are not tested with packed rows"
    return f"{model_type}: {entry.padded}" if entry.padded else None


def packing_of(model_type: str | None, learner: LearnerConfig) -> Packing:
    """Return how rows of this model are fed; "auto" packs them where it can."""
    if learner.packing != "auto":
        return learner.packing
    return "off" if why_padded(model_type, learner) else "tree"


def check_packing(config: ModelConfig, learner: LearnerConfig, *, key: str) -> str:
    """Return a line about how the model's rows are fed.

    Raises ConfigError where learner.packing asks for what the model cannot do.
    """
    model_type = config.get("model_type")
    reason = why_padded(model_type, learner)
    packing = packing_of(model_type, learner)
    if packing != "off" and reason:
        raise ConfigError(
            f"learner.packing is {packing}, but rows of {key} cannot be packed ({reason}); "
            "expected auto or off"
        )
    if packing == "off":
        return f"{key}: padded rows ({reason or 'learner.packing=off'})"
    shared = "packed, shared prefixes once" if packing == "tree" else "packed, every row whole"
    return f"{key}: rows {shared}"


def can_be_critic(model_type: str | None) -> bool:
    """Return whether transformers has the model with a value for every token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    )

    return model_type in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES


def check_critic(config: ModelConfig, *, key: str) -> None:
    """Raise ConfigError for a model that cannot be a critic."""
    model_type = config.get("model_type")
    if not can_be_critic(model_type):
        raise ConfigError(
            f"{key}: transformers has no token classifier of model_type {model_type!r}, which a "
            "critic is; set learner.critic_model to a model that has one and the same tokenizer, "
            "or use an algorithm without a critic, such as grpo"
        )


def _check_untested(config: ModelConfig, *, key: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    tested = ", ".join(name for name, entry in ARCHITECTURES.items() if not entry.refused)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"{key}: transformers has no causal language model of model_type {model_type!r}; "
            f"expected one of {tested}"
        )
    classes = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    if classes[0].endswith("ForConditionalGeneration"):
        raise ConfigError(
            f"{key}: {classes[0]} ({model_type}) reads images or sound, which rayhf does not; "
            f"expected a text model, one of {tested}"
        )
    if classes[0] not in ENGINE_CLASSES:
        raise ConfigError(
            f"{key}: vLLM has no {classes[0]} ({model_type}); expected one of {tested}"
        )
    return (
        f"{key}: {model_type} models are not tested with rayhf (docs/architectures.md); the first "
        "weight sync compares learner and engine"
    )
