"""Tiny random-weight models of every family, in Hugging Face layout: two to four layers, hidden size 64, head size 32.

Weights are large enough for attention and experts to matter, biases and norms are not left at zero and one. Knows
nothing of engines or interventions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

VOCABULARY = 96

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A configuration of transformers, by class name. without: common settings that it does not take.

    four_bits: its weights are quantised when it is saved. llm: further engine arguments. tolerance: that of its
    log-probabilities.
    """

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    llm: dict[str, Any] = field(default_factory=dict)
    four_bits: bool = False
    tolerance: float = 1e-4

    def build(self) -> Any:
        """The model, float32, in evaluation mode."""
        import transformers

        settings = {key: value for key, value in COMMON.items() if key not in self.without}
        config = getattr(transformers, self.config)(**{**settings, **self.settings})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1 and not name.endswith(("A_log", "dt_bias", ".D", "e_score_correction_bias")):
                    weight += torch.randn(weight.shape, generator=draw) * 0.2
        return model

    def save(self, folder: Path) -> Any:
        """Write the checkpoint and return the model, with the weights that the checkpoint stands for."""
        model = self.build()
        model.save_pretrained(folder)
        if self.four_bits:
            quantise(model, folder)
        return model


GROUP = 32


def quantise(model: Any, folder: Path) -> None:
    """Round the decoder's linear layers to four bits in groups (compressed-tensors), in place and on disk.

    w = scale * q with q in -8..7 and a scale for every 32 inputs. The model keeps scale * q, in float32.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.detach().unflatten(1, (-1, GROUP))
            scale = groups.abs().amax(-1) / 7
            q = (groups / scale[..., None]).round().clamp(-8, 7)
            module.weight.data = (q * scale[..., None]).flatten(1)
            del tensors[f"{name}.weight"]
            tensors[f"{name}.weight_packed"] = pack_to_int32(q.flatten(1).to(torch.int8), 4)
            tensors[f"{name}.weight_scale"] = scale
            tensors[f"{name}.weight_shape"] = torch.tensor(module.weight.shape)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))


HEADS32 = {"head_dim": 32}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES = (
    Family("Llama", "LlamaConfig", {**HEADS32, "attention_bias": True, "mlp_bias": True}),
    # vLLM's kernel for four bits knows half precision only: three digits.
    Family("Llama, 4-bit weights", "LlamaConfig", HEADS32, llm={"dtype": "float16"}, four_bits=True, tolerance=0.02),
    Family("Qwen2", "Qwen2Config", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    Family("Qwen3", "Qwen3Config", HEADS32),
    Family("Qwen3-MoE", "Qwen3MoeConfig", {**HEADS32, **MOE, "norm_topk_prob": True}),
    Family("Mixtral", "MixtralConfig", {**HEADS32, "num_local_experts": 4}),
    Family("Mistral", "MistralConfig", {**HEADS32, "sliding_window": 8}),
    Family(
        "Gemma 2",
        "Gemma2Config",
        {
            **HEADS32,
            "attn_logit_softcapping": None,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {
            **HEADS32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "Falcon 7B",
        "FalconConfig",
        {
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multi_query": True,
            "parallel_attn": True,
            "bias": True,
            "new_decoder_architecture": False,
        },
    ),
    Family(
        "Falcon 40B",
        "FalconConfig",
        {"num_attention_heads": 2, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True},
    ),
    Family(
        "Falcon RW",
        "FalconConfig",
        {
            "num_attention_heads": 2,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "alibi": True,
            "new_decoder_architecture": False,
        },
    ),
    Family("Phi-3", "Phi3Config", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    Family("OLMo 2", "Olmo2Config", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    Family("GPT-NeoX", "GPTNeoXConfig", {"num_attention_heads": 2, "use_parallel_residual": True}),
    Family("OPT", "OPTConfig", {"num_attention_heads": 2, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15}),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        {
            **HEADS32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Family(
        "DeepSeek-V2",
        "DeepseekV2Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "rope_parameters": YARN,
        },
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_parameters": YARN,
        },
    ),
    Family(
        "Cohere",
        "CohereConfig",
        {"logit_scale": 1.0, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    Family(
        "GPT-2",
        "GPT2Config",
        {"n_embd": 64, "n_head": 2, "n_layer": 3, "n_positions": 128},
        without=(
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ),
    ),
    Family("EXAONE 4", "Exaone4Config", {**HEADS32, "sliding_window": 8, "sliding_window_pattern": 2}),
    Family(
        "Granite hybrid",
        "GraniteMoeHybridConfig",
        {
            "num_attention_heads": 2,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "position_embedding_type": "rope",
        },
    ),
    Family(
        "Falcon-H1",
        "FalconH1Config",
        {
            **HEADS32,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_ssm": 128,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "attention_out_multiplier": 0.8,
            "ssm_out_multiplier": 1.2,
        },
    ),
)


def family(name: str) -> Family:
    return next(found for found in FAMILIES if found.name == name)
