"""config.json of full-size models of 2024 and later whose decoder is like Llama."""

SO400M_27 = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14,
}  # fmt: skip
PIXTRAL_TOWER = {
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540,
    "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16,
    "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
}  # fmt: skip
MISTRAL_SMALL_24B = {
    "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
    "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "torch_dtype": "bfloat16", "vision_feature_layer": -1,
    "text_config": {
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 32768,
        "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072,
    },
    "vision_config": PIXTRAL_TOWER,
}  # fmt: skip
MINISTRAL_8B = MISTRAL_SMALL_24B | {
    "text_config": {
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 32,
        "num_hidden_layers": 34, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn",
        },
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 131072,
    },
}  # fmt: skip
MINISTRAL_3B = MINISTRAL_8B | {
    "tie_word_embeddings": True,
    "text_config": MINISTRAL_8B["text_config"] | {
        "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
PIXTRAL_12B = {
    "architectures": ["LlavaForConditionalGeneration"], "image_seq_length": 1,
    "image_token_index": 10, "model_type": "llava", "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu", "torch_dtype": "bfloat16", "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "text_config": {
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336,
        "is_composition": True, "max_position_embeddings": 1024000, "model_type": "mistral",
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072,
    },
    "vision_config": PIXTRAL_TOWER | {"hidden_act": "gelu", "image_size": 1024, "patch_size": 16},
}  # fmt: skip
SMOLVLM2_2B = {
    "architectures": ["SmolVLMForConditionalGeneration"], "image_token_id": 49190,
    "model_type": "smolvlm", "pad_token_id": 2, "scale_factor": 3, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "text_config": {
        "architectures": ["VLlama3ForCausalLM"], "head_dim": 64, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32,
        "pad_token_id": 2, "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_theta": 130000,
        "tie_word_embeddings": False, "vocab_size": 49280,
    },
    "vision_config": SO400M_27 | {
        "image_size": 384, "model_type": "smolvlm_vision", "use_base_siglip": False,
    },
}  # fmt: skip
IDEFICS3_8B = {
    "architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": 128257,
    "model_type": "idefics3", "scale_factor": 2, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pad_token_id": 128002, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "vocab_size": 128259,
    },
    "vision_config": SO400M_27 | {"image_size": 364, "model_type": "idefics3_vision"},
}  # fmt: skip
