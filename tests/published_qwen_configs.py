"""config.json of full-size Qwen-VL models, with the keys that the published ones have."""

QWEN = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "rms_norm_eps": 1e-06, "use_cache": True, "vocab_size": 151936, "bos_token_id": 151643,
    "eos_token_id": 151645, "max_position_embeddings": 128000,
}  # fmt: skip
QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN2_5_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2,
}  # fmt: skip
QWEN2_5_TOWER = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
    "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
    "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN2_TOWER = {
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
    "hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}  # fmt: skip
QWEN3_ROPE = {
    "attention_bias": False, "head_dim": 128, "max_position_embeddings": 262144,
    "rope_scaling": {
        "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
    },
}  # fmt: skip
QWEN3_2B = QWEN3_ROPE | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8,
}  # fmt: skip
QWEN3_8B = QWEN3_ROPE | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8,
}  # fmt: skip
QWEN3_32B = QWEN3_ROPE | {
    "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64,
    "num_hidden_layers": 64, "num_key_value_heads": 8,
}  # fmt: skip
QWEN3_2B_TOWER = {
    "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024, "in_channels": 3, "intermediate_size": 4096, "model_type": "qwen3_vl",
    "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN3_8B_TOWER = QWEN3_2B_TOWER | {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "out_hidden_size": 4096,
}
QWEN3_5_TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
    "bos_token_id": 248044, "dtype": "bfloat16", "eos_token_id": 248044,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
    "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "num_key_value_heads": 4, "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06, "use_cache": True, "vocab_size": 248320,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
}  # fmt: skip
QWEN3_5_27B = {
    "hidden_size": 5120, "intermediate_size": 17408, "linear_num_value_heads": 48,
    "num_attention_heads": 24, "num_hidden_layers": 64,
}  # fmt: skip
QWEN3_5_4B = {
    "hidden_size": 2560, "intermediate_size": 9216, "linear_num_value_heads": 32,
    "num_attention_heads": 16, "num_hidden_layers": 32,
}  # fmt: skip


def qwen(model, text, vision, *, tied):
    """Return the config.json of a Qwen-VL; older ones have the decoder's keys on top."""
    ids = {
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }  # fmt: skip
    common = {
        "architectures": [f"{model}ForConditionalGeneration"], "tie_word_embeddings": tied, **ids,
    }  # fmt: skip
    if model == "Qwen3VL":
        text = QWEN | {"model_type": "qwen3_vl_text", "rope_theta": 5000000} | text
        return common | {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    kind = {"Qwen2_5_VL": "qwen2_5_vl", "Qwen2VL": "qwen2_vl"}[model]
    sliding = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
    flat = QWEN | {"model_type": kind, "rope_theta": 1000000.0, "rope_scaling": rope} | sliding
    return flat | common | {"vision_config": vision} | text


def qwen3_5(text, tower=QWEN3_8B_TOWER, *, tied=False):
    """Return the config.json of Qwen3.5-* and later ones."""
    kinds = [*["linear_attention"] * 3, "full_attention"] * (text["num_hidden_layers"] // 4)
    own = {"layer_types": kinds, "tie_word_embeddings": tied}
    vision = {
        "deepstack_visual_indexes": [], "model_type": "qwen3_5",
        "out_hidden_size": text["hidden_size"],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056,
        "model_type": "qwen3_5", "text_config": QWEN3_5_TEXT | own | text,
        "tie_word_embeddings": tied, "video_token_id": 248057, "vision_config": tower | vision,
        "vision_end_token_id": 248054, "vision_start_token_id": 248053,
    }  # fmt: skip
