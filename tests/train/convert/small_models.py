"""Configs of small models of `transformers`, with odd sizes, of which `generate.py` makes golden folders: class and options by name."""

from __future__ import annotations

VOCAB = 62

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS_ALONE = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
WITHOUT_INNER = {key: value for key, value in HEADS_ALONE.items() if key != "intermediate_size"}
CHOICE = {"num_experts": 6, "num_experts_per_tok": 3}
EXPERTS = {**CHOICE, "moe_intermediate_size": 12}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
INDEX = {"index_topk": 7, "index_n_heads": 9, "index_head_dim": 6}
GROUPS = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 0,
}
MANY = {
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 8,
    "routed_scaling_factor": 1.5,
}
KIMI = {"linear_head_dim": 5, "linear_num_heads": 4, "linear_conv_kernel_dim": 3}
SHARPER = {"mscale": 0.8, "mscale_all_dim": 0.8}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
DELTA = {  # keys and values of one width, or what transformers saves of OLMo Hybrid would be wrong
    **BASE,
    "num_hidden_layers": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 9,
    "linear_value_head_dim": 3,
    "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
}
STATE_SPACE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "state_size": 5,
    "use_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 8}
LINEAR = "linear_attention"
GRANITE = {"embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.4}
GRANITE_HYBRID = {
    **MAMBA2,
    "num_hidden_layers": 4,
    "layer_types": [LINEAR, "full_attention"] * 2,
    "num_local_experts": 4,
    "intermediate_size": 12,
    "shared_intermediate_size": 28,
}
NEMOTRON_H = {
    **{key: value for key, value in BASE.items() if key != "num_hidden_layers"},
    "head_dim": 6,
    "mamba_num_heads": 6,
    "mamba_head_dim": 5,
    "n_groups": 2,
    "ssm_state_size": 5,
    "chunk_size": 8,
    "use_bias": True,
    "mamba_proj_bias": True,
    "mlp_bias": True,
    "time_step_floor": 0.05,  # time steps above the limit of transformers: see the family
    "n_routed_experts": 4,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20,
    "routed_scaling_factor": 2.5,
}
FALCON_H1 = {
    **BASE,
    **MAMBA2,
    "head_dim": 6,
    "mamba_d_ssm": 30,
    "mamba_d_head": 5,
    "mlp_bias": True,
    "attention_bias": True,
    "mamba_proj_bias": True,
    "projectors_bias": True,
    "key_multiplier": 0.625,
    "attention_in_multiplier": 0.75,
    "attention_out_multiplier": 1.5,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.5,
    "ssm_multipliers": [0.875, 1.125, 0.75, 1.25, 0.5],
    "mlp_multipliers": [1.375, 0.625],
    "embedding_multiplier": 5.5,
    "lm_head_multiplier": 0.3,
}
GEMMA4 = {  # a period and a half, so that repeated layers are stacked
    **BASE,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    "head_dim": 6,
    "global_head_dim": 8,
    "sliding_window": 7,
    "final_logit_softcapping": 3.0,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 90.0, "partial_rotary_factor": 0.5},
    },
}
MODELS = {
    "llama": ("LlamaConfig", {**BASE, "head_dim": 6, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama_tied": ("LlamaConfig", {**BASE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**BASE, "head_dim": 8, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", {**BASE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 10, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3_moe": ("Qwen3MoeConfig", {**BASE, **EXPERTS, "num_hidden_layers": 5, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_moe_tied": (
        "Qwen3MoeConfig",
        {
            **BASE,
            **EXPERTS,
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **HEADS_ALONE,
            **LATENT,
            **GROUPS,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 2,
            "rope_parameters": {**YARN, **SHARPER},
        },
    ),
    "deepseek_v3_tied": (
        "DeepseekV3Config",
        {**BASE, **LATENT, **GROUPS, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"q_lora_rank": None, "rope_interleave": False, "tie_word_embeddings": True},
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            **HEADS_ALONE,
            **LATENT,
            **GROUPS,
            **INDEX,
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
            "rope_parameters": {**YARN, **SHARPER},
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        {**BASE, **LATENT, **GROUPS, **INDEX, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}, "tie_word_embeddings": True},
    ),
    "doge": ("DogeConfig", {**BASE, "head_dim": 6, "keep_window_size": 9, "mlp_bias": True}),
    "doge_tied": (
        "DogeConfig",
        {**BASE, "num_key_value_heads": 6, "keep_window_size": 5, "rope_parameters": YARN, "tie_word_embeddings": True},
    ),
    "deepseek_v2": ("DeepseekV2Config", {**BASE, **LATENT, **GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v2_lite": (
        "DeepseekV2Config",
        {**BASE, **LATENT, **GROUPS, "q_lora_rank": None, "first_k_dense_replace": 1, "num_hidden_layers": 4}
        | {"rope_parameters": {**YARN, **SHARPER}},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {**BASE, **LATENT, **MANY, **KIMI, "num_hidden_layers": 6, "q_lora_rank": None}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        {**BASE, **LATENT, **MANY, "head_dim": 3, "num_hidden_layers": 6, "layer_group_size": 3, "first_k_dense_replace": 1}
        | {"num_expert_group": 2, "topk_group": 1, "num_mtp_layers": 0, "rope_theta": 1e4, "kda_lower_bound": -3.0},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **BASE,
            **CHOICE,
            "intermediate_size": 12,
            "head_dim": 6,
            "sliding_window": 9,
            "num_hidden_layers": 4,
            "rope_parameters": YARN,
        },
    ),
    "mixtral": ("MixtralConfig", {**BASE, **CHOICE, "intermediate_size": 12, "head_dim": 8, "sliding_window": 7}),
    "minimax": (
        "MiniMaxConfig",
        {
            **BASE,
            **CHOICE,
            "intermediate_size": 12,
            "head_dim": 6,
            "num_hidden_layers": 4,
            "block_size": 4,
            "tie_word_embeddings": True,
        }
        | {f"{half}_alpha_factor": 3.5 for half in ("full_attn", "linear_attn", "mlp")}
        | {f"{half}_beta_factor": 0.8 for half in ("full_attn", "linear_attn", "mlp")}
        | {"layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "smollm3": ("SmolLM3Config", {**BASE, "num_hidden_layers": 5, "use_sliding_window": False}),
    "olmo2": ("Olmo2Config", BASE),
    "olmo3": ("Olmo3Config", {**BASE, "num_hidden_layers": 5, "sliding_window": 9}),
    "gemma2": ("Gemma2Config", {**BASE, "head_dim": 6, "sliding_window": 8, "query_pre_attn_scalar": 14}),
    "gemma3_text": ("Gemma3TextConfig", {**BASE, "num_hidden_layers": 7, "head_dim": 6, "sliding_window": 8}),
    "olmo_hybrid": ("OlmoHybridConfig", {**DELTA, "rope_parameters": {"rope_theta": None, "rope_type": "default"}}),
    "olmo_hybrid_turned": ("OlmoHybridConfig", {**DELTA, "num_hidden_layers": 2, "layer_types": DELTA["layer_types"][:2]}),
    "qwen3_5_text": ("Qwen3_5TextConfig", {**DELTA, "head_dim": 8, "linear_value_head_dim": 5, "tie_word_embeddings": True}),
    "diffllama": ("DiffLlamaConfig", {**BASE, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6}),
    "granite_swa": (
        "GraniteSWAConfig",
        {
            **BASE,
            "num_hidden_layers": 6,
            "head_dim": 6,
            "sliding_window": 7,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
        }
        | {"attention_multiplier": 0.3, "logits_scaling": 2.5, "layer_rope_theta": [0, 1e4, 5e3, 1e4, 0, 1e4]},
    ),
    "opt": ("OPTConfig", {**WITHOUT_INNER, "ffn_dim": 40, "num_attention_heads": 4}),
    "opt_bare": ("OPTConfig", {**WITHOUT_INNER, "ffn_dim": 40, "enable_bias": False, "tie_word_embeddings": False}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **{**DELTA, **EXPERTS, "head_dim": 8, "linear_value_head_dim": 5, "num_experts": 3, "num_experts_per_tok": 2},
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [1],
            "num_hidden_layers": 6,
            "layer_types": ["linear_attention", "full_attention"] * 3,
        },
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextConfig",
        {
            **{**DELTA, **EXPERTS, "head_dim": 8, "linear_value_head_dim": 5, "num_experts": 3, "num_experts_per_tok": 2},
            "shared_expert_intermediate_size": 20,
            "num_hidden_layers": 3,
            "layer_types": DELTA["layer_types"][:3],
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**HEADS_ALONE, "hidden_size": 32, "num_attention_heads": 4}),
    "gpt_neox_one_after_the_other": ("GPTNeoXConfig", {**HEADS_ALONE, "use_parallel_residual": False, "rotary_pct": 1.0}),
    "mamba": ("MambaConfig", {**STATE_SPACE, "time_step_rank": 3}),
    "mamba2": ("Mamba2Config", {**STATE_SPACE, "num_heads": 6, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "falcon_mamba": ("FalconMambaConfig", {**STATE_SPACE, "mixer_rms_eps": 1e-4, "use_conv_bias": False}),
    "falcon_h1": ("FalconH1Config", FALCON_H1),
    "falcon_h1_normalised": (
        "FalconH1Config",
        {**FALCON_H1, "mamba_rms_norm": True, "mamba_proj_bias": False, "projectors_bias": False, "tie_word_embeddings": True},
    ),
    "bamba": ("BambaConfig", {**BASE, **MAMBA2, "num_hidden_layers": 5, "attn_layer_indices": [1, 3], "mamba_proj_bias": True}),
    "granite": ("GraniteConfig", {**BASE, **GRANITE, "attention_bias": True, "mlp_bias": True}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {**BASE, **GRANITE, **GRANITE_HYBRID}),
    "granitemoehybrid_dense": (
        "GraniteMoeHybridConfig",
        {**BASE, **GRANITE, **GRANITE_HYBRID, "num_local_experts": 0, "position_embedding_type": "rope", "attention_bias": True},
    ),
    "jamba": (
        "JambaConfig",
        {
            **BASE,
            "num_hidden_layers": 5,
            "intermediate_size": 16,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_offset": 0,
            "num_experts": 4,
            "mamba_d_state": 5,
            "mamba_dt_rank": 3,
            "mamba_proj_bias": True,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {**NEMOTRON_H, "layers_block_type": [LINEAR, "full_attention", "mlp"] * 2 + [LINEAR]},
    ),
    "nemotron_h_experts": (
        "NemotronHConfig",
        {
            **NEMOTRON_H,
            "layers_block_type": [LINEAR, "moe", "full_attention", "moe"] * 2 + [LINEAR, "mlp"],
            "use_conv_bias": False,
            "mlp_bias": False,
            "moe_latent_size": 16,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            **BASE,
            "num_hidden_layers": 5,
            "intermediate_size": 56,
            "block_types": ["recurrent", "attention"],
            "lru_width": 36,
            "attention_window_size": 7,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 3,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4_text_experts": (
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size": 20,
            "intermediate_size": 28,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 8,
        },
    ),
    "gemma4_text_small": (
        "Gemma4TextConfig",
        {
            **GEMMA4,
            "num_hidden_layers": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2
            + ["sliding_attention"] * 2
            + ["full_attention"],
            "hidden_size": 18,
            "intermediate_size": 14,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {
            **BASE,
            "num_hidden_layers": 5,
            "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
            "conv_L_cache": 4,
            "conv_bias": True,
            "block_auto_adjust_ff_dim": False,
        },
    ),
}
