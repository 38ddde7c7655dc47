"""Configs as they are published, with the number of parameters that their models are known to have."""

import json
import math

import pytest

from plait.models.lm import num_params
from plait.train.convert.fitting import Source

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

KIMI_LAYERS = {
    "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
    "head_dim": 128,
    "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
    "num_heads": 32,
    "short_conv_kernel_size": 4,
}
DEEPSEEK_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}

GEMMA4_ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}


def config(model_type, hidden, inner, layers, heads, kv_heads, vocab, **more):
    """The usual fields."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def gemma4(hidden, inner, layers, heads, kv_heads, period, **more):
    """Those of the language model in a config of Gemma 4, of whose layers every `period`th sees all."""
    kinds = ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)]
    usual = {"attention_bias": False, "attention_k_eq_v": False, "dtype": "bfloat16", "enable_moe_block": False,
             "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
             "hidden_size_per_layer_input": 0, "layer_types": kinds, "max_position_embeddings": 131072,
             "moe_intermediate_size": None, "num_experts": None, "num_global_key_value_heads": None, "num_kv_shared_layers": 0,
             "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_parameters": GEMMA4_ROPE, "sliding_window": 512,
             "tie_word_embeddings": True, "top_k_experts": None, "use_bidirectional_attention": None,
             "use_double_wide_mlp": False, "vocab_size_per_layer_input": 262144}  # fmt: skip
    text = config("gemma4_text", hidden, inner, layers, heads, kv_heads, 262144, **{**usual, **more})
    return {"model_type": "gemma4", "tie_word_embeddings": True, "text_config": text}


PUBLISHED = {
    "SmolLM2-135M": (
        config("llama", 576, 1536, 30, 9, 3, 49152, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=100000, is_llama_config=True,
               rope_interleaved=False, rope_scaling=None, pretraining_tp=1, attention_bias=False, mlp_bias=False,
               tie_word_embeddings=True, max_position_embeddings=8192),
        134_515_008,
    ),
    "Llama-3.2-1B": (
        config("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0,
               rope_scaling=LLAMA3, pretraining_tp=1, tie_word_embeddings=True, max_position_embeddings=131072),
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        config("mistral", 4096, 14336, 32, 32, 8, 32000, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0,
               sliding_window=4096, tie_word_embeddings=False, max_position_embeddings=32768),
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        config("qwen2", 896, 4864, 24, 14, 2, 151936, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0,
               sliding_window=32768, use_sliding_window=False, max_window_layers=24, use_mrope=False, tie_word_embeddings=True,
               max_position_embeddings=32768),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        config("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000,
               rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=28, attention_bias=False,
               tie_word_embeddings=True, max_position_embeddings=40960),
        596_049_920,
    ),
    "Qwen3-30B-A3B": (
        config("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, head_dim=128, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0,
               rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=48, attention_bias=False,
               decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
               num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.001, tie_word_embeddings=False,
               max_position_embeddings=40960),
        30_532_122_624,
    ),
    "DeepSeek-V3": (
        config("deepseek_v3", 7168, 18432, 61, 128, 128, 129280, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000,
               rope_scaling={**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, aux_loss_alpha=0.001, ep_size=1,
               first_k_dense_replace=3, kv_lora_rank=512, moe_intermediate_size=2048, moe_layer_freq=1, n_group=8,
               n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1,
               pretraining_tp=1, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=2.5,
               scoring_func="sigmoid", seq_aux=True, topk_group=4, topk_method="noaux_tc", v_head_dim=128, attention_bias=False,
               tie_word_embeddings=False, max_position_embeddings=163840),
        671_026_404_352,  # and 14,848 balancing biases, which no gradient moves
    ),
    "DeepSeek-V3.2": (
        config("deepseek_v32", 7168, 18432, 61, 128, 128, 129280, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000,
               rope_scaling={**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, ep_size=1, first_k_dense_replace=3,
               index_head_dim=128, index_n_heads=64, index_topk=2048, kv_lora_rank=512, moe_intermediate_size=2048,
               moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8,
               num_nextn_predict_layers=1, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
               routed_scaling_factor=2.5, scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc", v_head_dim=128,
               attention_bias=False, tie_word_embeddings=False, max_position_embeddings=163840),
        671_026_404_352 + 61 * (1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64),  # an indexer beside each layer of V3
    ),
    "DeepSeek-V2-Lite": (
        config("deepseek_v2", 2048, 10944, 27, 16, 16, 102400, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000,
               rope_scaling={**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, aux_loss_alpha=0.001, ep_size=1,
               first_k_dense_replace=1, kv_lora_rank=512, moe_intermediate_size=1408, moe_layer_freq=1, n_group=1,
               n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6, pretraining_tp=1,
               q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, routed_scaling_factor=1.0, scoring_func="softmax",
               seq_aux=True, topk_group=1, topk_method="greedy", v_head_dim=128, attention_bias=False, tie_word_embeddings=False,
               max_position_embeddings=163840),
        15_706_484_224,
    ),
    "Kimi-Linear-48B-A3B": (
        config("kimi_linear", 2304, 9216, 27, 32, 32, 163840, head_dim=72, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0,
               rope_scaling=None, first_k_dense_replace=1, kv_lora_rank=512, linear_attn_config=KIMI_LAYERS, mla_use_nope=True,
               model_max_length=1048576, moe_intermediate_size=1024, moe_layer_freq=1, moe_renormalize=True,
               moe_router_activation_func="sigmoid", num_expert_group=1, num_experts=256, num_experts_per_token=8,
               num_nextn_predict_layers=0, num_shared_experts=1, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64,
               routed_scaling_factor=2.446, tie_word_embeddings=False, topk_group=1, use_grouped_topk=True, v_head_dim=128),
        49_122_675_072,  # and 6,656 balancing biases, which no gradient moves
    ),
    "gpt-oss-20b": (
        config("gpt_oss", 2880, 2880, 24, 64, 8, 201088, head_dim=64, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=150000,
               rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                             "rope_type": "yarn", "truncate": False}, attention_bias=True, experts_per_token=4,
               initial_context_length=4096, layer_types=["sliding_attention", "full_attention"] * 12, num_experts_per_tok=4,
               num_local_experts=32, output_router_logits=False, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0,
               tie_word_embeddings=False, max_position_embeddings=131072),
        20_914_757_184,
    ),
    "Mixtral-8x7B-v0.1": (
        config("mixtral", 4096, 14336, 32, 32, 8, 32000, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1000000.0,
               sliding_window=None, num_experts_per_tok=2, num_local_experts=8, output_router_logits=False,
               router_aux_loss_coef=0.02, tie_word_embeddings=False, max_position_embeddings=32768),
        46_702_792_704,
    ),
    "MiniMax-Text-01": (
        config("minimax", 6144, 9216, 80, 64, 8, 200064, head_dim=128, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000000,
               rotary_dim=64, block_size=256, layer_types=(["linear_attention"] * 7 + ["full_attention"]) * 10,
               full_attn_alpha_factor=3.5565588200778455, full_attn_beta_factor=1.0, linear_attn_alpha_factor=3.5565588200778455,
               linear_attn_beta_factor=1.0, mlp_alpha_factor=3.5565588200778455, mlp_beta_factor=1.0, num_experts_per_tok=2,
               num_local_experts=32, output_router_logits=False, postnorm=True, router_aux_loss_coef=0.001,
               router_jitter_noise=0.0, shared_intermediate_size=0, shared_moe_mode="sigmoid", sliding_window=None,
               tie_word_embeddings=False, max_position_embeddings=10240000),
        456_089_655_296,
    ),
    "SmolLM3-3B": (
        config("smollm3", 2048, 11008, 36, 16, 4, 128256, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=5000000.0,
               rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=28, no_rope_layer_interval=4,
               layer_types=["full_attention"] * 36, no_rope_layers=[1, 1, 1, 0] * 9, pretraining_tp=2, attention_bias=False,
               mlp_bias=False, tie_word_embeddings=True, max_position_embeddings=65536),
        3_075_098_624,
    ),
    "OLMo-2-0425-1B": (
        config("olmo2", 2048, 8192, 16, 16, 16, 100352, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=500000,
               rope_scaling=None, attention_bias=False, tie_word_embeddings=False, max_position_embeddings=4096),
        1_484_916_736,
    ),
    "gemma-2-2b": (
        config("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256, hidden_act="gelu_pytorch_tanh",
               hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096,
               attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256, cache_implementation="hybrid",
               attention_bias=False, max_position_embeddings=8192),
        2_614_341_888,
    ),
    "gemma-3-1b-pt": (
        config("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
               rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None, sliding_window=512, sliding_window_pattern=6,
               query_pre_attn_scalar=256, cache_implementation="hybrid", attn_logit_softcapping=None, final_logit_softcapping=None,
               attention_bias=False, max_position_embeddings=32768),
        999_885_952,
    ),
    "pythia-70m": (
        {key: value for key, value in config("gpt_neox", 512, 2048, 6, 8, 8, 50304, hidden_act="gelu", layer_norm_eps=1e-5,
         rotary_emb_base=10000, rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False,
         max_position_embeddings=2048).items() if key != "num_key_value_heads"},
        70_426_624,
    ),
    "Olmo-Hybrid-7B": (
        config("olmo_hybrid", 3840, 11008, 32, 30, 30, 100352, hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False,
               layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 8, linear_num_key_heads=30, linear_num_value_heads=30,
               linear_key_head_dim=96, linear_value_head_dim=192, linear_a_log_min=0.0, linear_a_log_max=16.0, linear_dt_min=0.001,
               linear_dt_max=0.1, linear_dt_init_floor=0.0001, linear_conv_kernel_dim=4, linear_allow_neg_eigval=True,
               rope_parameters={"rope_theta": None, "rope_type": "default"}, max_position_embeddings=65536),
        7_430_870_688,
    ),
    "Qwen3.5-0.8B": (
        {"model_type": "qwen3_5", "tie_word_embeddings": True, "vision_config": {"depth": 12}, "image_token_id": 248056,
         "text_config": config("qwen3_5_text", 1024, 3584, 24, 8, 2, 248320, head_dim=256, hidden_act="silu", rms_norm_eps=1e-6,
               attention_bias=False, attn_output_gate=True, full_attention_interval=4, mlp_only_layers=[], linear_conv_kernel_dim=4,
               linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=16,
               mamba_ssm_dtype="float32", mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, partial_rotary_factor=0.25,
               layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 6, max_position_embeddings=262144,
               rope_parameters={"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                                "rope_theta": 10000000, "partial_rotary_factor": 0.25})},
        752_393_024,
    ),
    "opt-125m": (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "_remove_final_layer_norm": False, "activation_dropout": 0.0,
         "activation_function": "relu", "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1,
         "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0,
         "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>",
         "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
         "word_embed_proj_dim": 768},
        125_239_296,
    ),
    "Qwen3-Next-80B-A3B": (
        config("qwen3_next", 2048, 5120, 48, 16, 2, 151936, head_dim=256, hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False,
               decoder_sparse_step=1, full_attention_interval=4, linear_conv_kernel_dim=4, linear_key_head_dim=128,
               linear_num_key_heads=16, linear_num_value_heads=32, linear_value_head_dim=128, mlp_only_layers=[],
               moe_intermediate_size=512, norm_topk_prob=True, num_experts=512, num_experts_per_tok=10, output_router_logits=False,
               partial_rotary_factor=0.25, rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.001,
               shared_expert_intermediate_size=512, use_sliding_window=False, max_position_embeddings=262144),
        79_674_391_296,
    ),
    "Qwen3.5-35B-A3B": (
        {"model_type": "qwen3_5_moe", "tie_word_embeddings": False,
         "text_config": config("qwen3_5_moe_text", 2048, None, 40, 16, 2, 248320, head_dim=256, hidden_act="silu", rms_norm_eps=1e-6,
               attention_bias=False, attn_output_gate=True, full_attention_interval=4, linear_conv_kernel_dim=4,
               linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32, linear_value_head_dim=128,
               layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 10, mamba_ssm_dtype="float32", mlp_only_layers=[],
               moe_intermediate_size=512, mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, num_experts=256,
               num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.001, shared_expert_intermediate_size=512,
               max_position_embeddings=262144,
               rope_parameters={"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                                "rope_theta": 10000000, "partial_rotary_factor": 0.25})},
        34_660_610_688,
    ),
    "gpt2": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1,
         "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768,
         "n_head": 12, "n_layer": 12, "n_positions": 1024, "summary_activation": None, "summary_first_dropout": 0.1,
         "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
         "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257},
        124_439_808,
    ),
    "mamba-130m-hf": (
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
         "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
         "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-5, "n_layer": 24, "num_hidden_layers": 24,
         "pad_token_id": 0, "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False, "residual_in_fp32": True,
         "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
         "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32",
         "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280},
        129_135_360,
    ),
    "falcon-mamba-7b": (
        {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
         "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1,
         "intermediate_size": 8192, "layer_norm_epsilon": 1e-5, "num_hidden_layers": 64, "pad_token_id": 11,
         "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 16, "tie_word_embeddings": False,
         "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
         "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True,
         "use_conv_bias": True, "vocab_size": 65024, "mixer_rms_eps": 1e-6},
        7_272_665_088,
    ),
    "Mamba-Codestral-7B-v0.1": (
        {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4,
         "eos_token_id": 0, "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1,
         "intermediate_size": 8192, "layer_norm_epsilon": 1e-5, "n_groups": 8, "norm_before_gate": True, "num_heads": 128,
         "num_hidden_layers": 64, "pad_token_id": 0, "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True,
         "state_size": 128, "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
         "time_step_limit": [0.0, math.inf], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
         "time_step_scale": 1.0, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_conv_bias": True,
         "vocab_size": 32768},
        7_285_403_648,
    ),
    "LFM2-1.2B": (
        {"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True, "block_dim": 2048,
         "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256,
         "block_norm_eps": 1e-5, "block_out_init_scale": 1.0, "block_use_swiglu": True, "block_use_xavier_init": True,
         "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048, "conv_dim_out": 2048,
         "conv_use_xavier_init": True, "eos_token_id": 7, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048,
         "initializer_range": 0.02, "max_position_embeddings": 128000, "norm_eps": 1e-5, "num_attention_heads": 32, "num_heads": 32,
         "num_hidden_layers": 16, "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
         "use_cache": True, "use_pos_enc": True, "vocab_size": 65536},
        1_170_340_608,
    ),
    "Falcon-H1-0.5B-Base": (
        config("falcon_h1", 1024, 2048, 36, 8, 2, 32784, head_dim=64, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=100000000000.0,
               rope_scaling=None, attention_bias=False, attention_in_multiplier=1.0, attention_out_multiplier=0.9375,
               attn_layer_indices=None, embedding_multiplier=5.656854249492381, key_multiplier=0.39062499999999994,
               lm_head_multiplier=0.0390625, mamba_chunk_size=128, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64,
               mamba_d_ssm=1536, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=24, mamba_norm_before_gate=False,
               mamba_proj_bias=False, mamba_rms_norm=False, mamba_use_mlp=True, mlp_bias=False, mlp_expansion_factor=8,
               mlp_multipliers=[0.8838834764831844, 0.5859375], num_logits_to_keep=1, projectors_bias=False, ssm_in_multiplier=1.25,
               ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
               ssm_out_multiplier=0.23570226039551587, tie_word_embeddings=False, max_position_embeddings=16384),
        521_411_104,
    ),
    "Bamba-9B": (
        config("bamba", 4096, 14336, 32, 32, 8, 128256, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
               attn_layer_indices=[9, 18, 27], attn_rotary_emb=64, attention_bias=False, mamba_chunk_size=256, mamba_conv_bias=True,
               mamba_d_conv=4, mamba_d_head=64, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128,
               mamba_proj_bias=False, mlp_bias=False, num_logits_to_keep=1, tie_word_embeddings=False,
               max_position_embeddings=262144),
        9_780_235_392,
    ),
    "granite-3.1-2b-base": (
        config("granite", 2048, 8192, 40, 32, 8, 49155, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=5000000.0,
               rope_scaling=None, attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0,
               residual_multiplier=0.22, mlp_bias=False, tie_word_embeddings=True, max_position_embeddings=131072),
        2_533_531_648,
    ),
    "granite-4.0-h-tiny": (
        config("granitemoehybrid", 1536, 512, 40, 12, 4, 100352, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000,
               rope_scaling=None, attention_bias=False, attention_multiplier=0.0078125, embedding_multiplier=12, init_method="mup",
               layer_types=[{5: "attention", 15: "attention", 25: "attention", 35: "attention"}.get(i, "mamba") for i in range(40)],
               logits_scaling=6, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64, mamba_d_state=128,
               mamba_expand=2, mamba_n_groups=1, mamba_n_heads=48, mamba_proj_bias=False, normalization_function="rmsnorm",
               num_experts_per_tok=6, num_local_experts=64, output_router_logits=False, position_embedding_type="nope",
               residual_multiplier=0.22, router_aux_loss_coef=0.01, shared_intermediate_size=1024, tie_word_embeddings=True,
               max_position_embeddings=131072),
        6_939_037_248,
    ),
    "granite-4.0-micro": (
        config("granitemoehybrid", 2560, 8192, 40, 40, 8, 100352, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000000,
               rope_scaling=None, attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12, init_method="mup",
               layer_types=["attention"] * 40, logits_scaling=10, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4,
               mamba_d_head=64, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=80, mamba_proj_bias=False,
               normalization_function="rmsnorm", num_experts_per_tok=0, num_local_experts=0, output_router_logits=False,
               position_embedding_type="rope", residual_multiplier=0.22, router_aux_loss_coef=0.01, shared_intermediate_size=8192,
               tie_word_embeddings=True, max_position_embeddings=131072),
        3_402_836_480,
    ),
    "Nemotron-H-8B-Base-8K": (
        {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "attention_head_dim": 128, "auto_map": {}, "bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4, "eos_token_id": 2,
         "expand": 2, "hidden_dropout": 0.0, "hidden_size": 4096,
         "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "initializer_range": 0.02,
         "intermediate_size": 21504, "layer_norm_epsilon": 1e-5, "mamba_head_dim": 64, "mamba_hidden_act": "silu",
         "mamba_num_heads": 128, "mamba_proj_bias": False, "max_position_embeddings": 8192, "mlp_bias": False,
         "mlp_hidden_act": "relu2", "n_groups": 8, "num_attention_heads": 32, "num_hidden_layers": 52, "num_key_value_heads": 8,
         "num_logits_to_keep": 1, "pad_token_id": 0, "rescale_prenorm_residual": True, "residual_in_fp32": False,
         "rms_norm_eps": 1e-5, "sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False,
         "time_step_floor": 0.0001, "time_step_limit": [0.0, math.inf], "time_step_max": 0.1, "time_step_min": 0.001,
         "time_step_rank": 256, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_conv_bias": True,
         "use_mamba_kernels": True, "vocab_size": 131072},
        8_100_852_736,
    ),
    "NVIDIA-Nemotron-3-Nano-30B-A3B": (
        {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "chunk_size": 128, "conv_kernel": 4, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688,
         "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "intermediate_size": 1856,
         "layer_norm_epsilon": 1e-5, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64,
         "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "mlp_bias": False,
         "mlp_hidden_act": "relu2", "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_group": 1,
         "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_eps": 1e-5, "norm_topk_prob": True,
         "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 52, "num_key_value_heads": 2,
         "num_logits_to_keep": 1, "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True, "residual_in_fp32": False,
         "rope_theta": 10000, "routed_scaling_factor": 2.5, "sliding_window": None, "ssm_state_size": 128,
         "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_limit": [0.0, math.inf], "time_step_max": 0.1,
         "time_step_min": 0.001, "topk_group": 1, "use_bias": False, "use_cache": True, "use_conv_bias": True,
         "use_mamba_kernels": True, "vocab_size": 131072},
        31_577_940_288 - 23 * 128,  # without the balancing biases
    ),
    "Jamba-v0.1": (
        config("jamba", 4096, 14336, 32, 32, 8, 65536, hidden_act="silu", rms_norm_eps=1e-6, attn_layer_offset=4, attn_layer_period=8,
               calc_logits_for_entire_prompt=False, expert_layer_offset=1, expert_layer_period=2, mamba_conv_bias=True,
               mamba_d_conv=4, mamba_d_state=16, mamba_dt_rank=256, mamba_expand=2, mamba_inner_layernorms=True,
               mamba_proj_bias=False, num_experts=16, num_experts_per_tok=2, output_router_logits=False,
               router_aux_loss_coef=0.001, sliding_window=None, n_ctx=262144, tie_word_embeddings=False, use_mamba_kernels=True),
        51_570_323_328,
    ),
    "hgrn2-1.3B-100B": (  # 24 layers of 51,386,368, two embeddings, bounds and a norm
        config("hgrn2", 2048, None, 24, None, None, 32000, attn_mode="chunk", num_heads=16, expand_ratio=128, use_short_conv=False,
               conv_size=4, use_lower_bound=True, hidden_ratio=4, hidden_act="swish", elementwise_affine=True, norm_eps=1e-6,
               max_position_embeddings=2048, fuse_cross_entropy=True, tie_word_embeddings=False),
        1_364_396_032,
    ),
    "rwkv7-191M-world": (  # and the first layer's weights that it does not use
        config("rwkv7", 768, 3072, 12, None, None, 65536, attn=None, attn_mode="chunk", head_dim=64, num_heads=None,
               decay_low_rank_dim=64, gate_low_rank_dim=128, a_low_rank_dim=64, v_low_rank_dim=32, hidden_act="sqrelu",
               hidden_ratio=4.0, norm_first=True, norm_bias=True, norm_eps=1e-5, fuse_norm=False, fuse_cross_entropy=True,
               value_dim=[768] * 12, tie_word_embeddings=False),
        191_034_624 + (2 * 32 + 1) * 768,
    ),
    "recurrentgemma-2b": (
        config("recurrent_gemma", 2560, 15360, 26, 10, 1, 256000, head_dim=256, hidden_activation="gelu_pytorch_tanh",
               rms_norm_eps=1e-6, rope_theta=10000.0, partial_rotary_factor=0.5, attention_bias=False, attention_window_size=2048,
               _block_types=["recurrent", "recurrent", "attention"], block_types=["recurrent", "recurrent", "attention"],
               conv1d_width=4, embeddings_scale_by_sqrt_dim=True, final_w_init_variance_scale=0.07692307692307693,
               logits_soft_cap=30.0, lru_width=2560, w_init_variance_scale=0.01),
        2_682_862_080,
    ),
    "gemma-4-31B": (
        gemma4(5376, 21504, 60, 32, 16, 6, attention_k_eq_v=True, num_global_key_value_heads=4, sliding_window=1024,
               max_position_embeddings=262144, use_bidirectional_attention="vision"),
        30_697_345_340,
    ),
    "gemma-4-26B-A4B": (
        gemma4(2816, 2112, 30, 16, 8, 6, attention_k_eq_v=True, num_global_key_value_heads=2, sliding_window=1024,
               max_position_embeddings=262144, use_bidirectional_attention="vision", enable_moe_block=True, num_experts=128,
               top_k_experts=8, moe_intermediate_size=704),
        25_233_141_790,
    ),
    "gemma-4-E4B": (
        gemma4(2560, 10240, 42, 8, 2, 6, hidden_size_per_layer_input=256, num_kv_shared_layers=18),
        7_463_013_418,
    ),
    "gemma-4-E2B": (
        gemma4(1536, 6144, 35, 8, 1, 5, hidden_size_per_layer_input=256, num_kv_shared_layers=20, use_double_wide_mlp=True),
        4_628_569_379,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_it_is_read_and_has_its_parameters(fields, parameters, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert num_params(Source.of(tmp_path).model) == parameters


def test_layers_of_gemma_4_share_keys_and_values_and_stay_what_they_are(tmp_path):
    """The last of each kind before the readers is what they read."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-4-E2B"][0]))
    model = Source.of(tmp_path).model
    window, whole = "softmax/window", "softmax"
    own = [*[window] * 4, whole] * 2 + [*[window] * 3, "softmax/window_write", "softmax/write"]
    assert model.layers == (*own, *[*["softmax/window_read"] * 4, "softmax/read"] * 4)
    assert [model.channel_mixer_of(name).hidden_dim for name in model.layers] == [6144] * 15 + [12288] * 20


def test_older_windows_are_those_of_the_family(tmp_path):
    """Gemma 3 by its pattern and its bases of rotary embeddings."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-3-1b-pt"][0]))
    mixers = Source.of(tmp_path).model.layer_mixers
    assert [mixer.window_size for mixer in mixers[:7]] == [512] * 5 + [None, 512]
    assert [mixer.positions.theta for mixer in mixers[4:7]] == [10_000, 1_000_000, 10_000]
