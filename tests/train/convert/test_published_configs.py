"""Configs as they are published, with the number of parameters that their models are known to have."""

import json

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
}  # fmt: skip


@pytest.mark.parametrize(("fields", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_it_is_read_and_has_its_parameters(fields, parameters, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert num_params(Source.of(tmp_path).model) == parameters


def test_older_windows_are_those_of_the_family(tmp_path):
    """Gemma 3 by its pattern and its bases of rotary embeddings."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-3-1b-pt"][0]))
    mixers = Source.of(tmp_path).model.layer_mixers
    assert [mixer.window_size for mixer in mixers[:7]] == [512] * 5 + [None, 512]
    assert [mixer.positions.theta for mixer in mixers[4:7]] == [10_000, 1_000_000, 10_000]
