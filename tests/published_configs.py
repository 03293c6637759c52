"""config.json of full-size models, with the keys that the published ones have."""

CLIP_L = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
VICUNA_7B = {  # sizes are the defaults of LlamaConfig
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
    "torch_dtype": "float16", "vocab_size": 32064,
}  # fmt: skip
LLAMA_13B = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
    "num_hidden_layers": 40, "num_key_value_heads": 40,
}  # fmt: skip
VICUNA_13B = VICUNA_7B | {"_name_or_path": "lmsys/vicuna-13b-v1.5"} | LLAMA_13B
MISTRAL_7B = VICUNA_7B | {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_key_value_heads": 8, "rope_theta": 1000000.0, "sliding_window": None,
    "torch_dtype": "bfloat16",
}  # fmt: skip
INTERN_TEXT = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 32768, "model_type": "qwen2", "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151674,
}  # fmt: skip
INTERN_TEXT_38B = INTERN_TEXT | {
    "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
    "num_hidden_layers": 64, "num_key_value_heads": 8,
}  # fmt: skip
INTERN_TEXT_3_5 = INTERN_TEXT | {
    "attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960,
    "model_type": "qwen3", "rope_scaling": None, "vocab_size": 151936,
}  # fmt: skip
INTERN_8B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4,
}  # fmt: skip
INTERN_3_5_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8,
}  # fmt: skip
INTERN_TOWER = {
    "attention_bias": True, "hidden_act": "gelu", "hidden_size": 1024, "image_size": [448, 448],
    "intermediate_size": 4096, "layer_norm_eps": 1e-06, "layer_scale_init_value": 0.1,
    "model_type": "internvl_vision", "norm_type": "layer_norm", "num_attention_heads": 16,
    "num_channels": 3, "num_hidden_layers": 24, "patch_size": [14, 14],
    "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
    "use_qk_norm": False,
}  # fmt: skip
INTERN_TOWER_6B = INTERN_TOWER | {
    "attention_bias": False, "hidden_size": 3200, "intermediate_size": 12800,
    "norm_type": "rms_norm", "num_attention_heads": 25, "num_hidden_layers": 45,
    "use_qk_norm": True,
}  # fmt: skip
ONEVISION_TEXT = INTERN_TEXT | {"rope_scaling": None, "vocab_size": 152000}
SO400M_26 = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
    "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 26,
    "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
SHEARED_LLAMA = {
    "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20,
    "num_key_value_heads": 20,
}  # fmt: skip
LLAMA_3 = {
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "model_max_length": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rope_theta": 500000.0, "tokenizer_model_max_length": 8192, "vocab_size": 128256,
}  # fmt: skip


GEMMA3_TEXT = {
    "max_position_embeddings": 131072, "model_type": "gemma3_text", "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    "sliding_window_pattern": 6, "vocab_size": 262208,
}  # fmt: skip
GEMMA3_4B = {
    "head_dim": 256, "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8,
    "num_hidden_layers": 34, "num_key_value_heads": 4,
}  # fmt: skip
GEMMA3_27B = {
    "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
    "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
}  # fmt: skip


def gemma3(text):
    """Return the config.json of gemma-3-*-it."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": GEMMA3_TEXT | text,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    }  # fmt: skip


GEMMA4_LAYERS = [*["sliding_attention"] * 5, "full_attention"]
GEMMA4_31B = {
    "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None,
    "audio_token_id": 258881, "boa_token_id": 256000, "boi_token_id": 255999,
    "dtype": "bfloat16", "eoa_token_index": 258883, "eoi_token_id": 258882,
    "eos_token_id": [1, 106], "image_token_id": 258880, "model_type": "gemma4",
    "text_config": {
        "attention_bias": False, "attention_k_eq_v": True, "enable_moe_block": False,
        "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 5376,
        "hidden_size_per_layer_input": 0, "intermediate_size": 21504,
        "layer_types": GEMMA4_LAYERS * 10, "max_position_embeddings": 262144,
        "model_type": "gemma4_text", "num_attention_heads": 32,
        "num_global_key_value_heads": 4, "num_hidden_layers": 60, "num_key_value_heads": 16,
        "num_kv_shared_layers": 0, "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 1024, "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision", "use_double_wide_mlp": False,
        "vocab_size": 262144,
    },
    "tie_word_embeddings": True, "video_token_id": 258884,
    "vision_config": {
        "head_dim": 72, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 4304, "model_type": "gemma4_vision", "num_attention_heads": 16,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "patch_size": 16,
        "pooling_kernel_size": 3, "position_embedding_size": 10240,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": True, "use_clipped_linears": False,
    },
    "vision_soft_tokens_per_image": 280,
}  # fmt: skip


def llava(text):
    """Return the config.json of llava-1.5-*-hf."""
    return {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
        "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
        "projector_hidden_act": "gelu", "text_config": text, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.36.0.dev0", "vision_config": CLIP_L,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }  # fmt: skip


def llava_next(text):
    """Return the config.json of llava-v1.6-*-hf."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return {
        "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100,
        "image_grid_pinpoints": pinpoints, "image_token_index": 32000, "model_type": "llava_next",
        "projector_hidden_act": "gelu", "text_config": text, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.39.0.dev0",
        "use_image_newline_parameter": True, "vision_config": CLIP_L, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": 32064,
    }  # fmt: skip


def vila(name, llm):
    """Return the config.json of a VILA1.5, with paths of the training machine as published."""
    text = {
        "_name_or_path": "./llm", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 4096, "model_max_length": 4096,
        "model_type": "llama", "num_hidden_layers": 32, "pad_token_id": 0, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right", "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2", "use_cache": True, "vocab_size": 32000,
    } | llm  # fmt: skip
    tower = {
        "_name_or_path": "./vision_tower", "architectures": ["SiglipVisionModel"],
        "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
        "image_size": 384, "intermediate_size": 4304, "layer_norm_eps": 1e-06,
        "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_channels": 3,
        "num_hidden_layers": 27, "patch_size": 14, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.2",
    }  # fmt: skip
    projector = {
        "_name_or_path": "./mm_projector", "architectures": ["MultimodalProjector"],
        "mm_projector_type": "mlp_downsample", "model_type": "v2l_projector",
        "torch_dtype": "bfloat16", "transformers_version": "4.36.2",
    }  # fmt: skip
    return {
        "_name_or_path": f"Efficient-Large-Model/{name}", "architectures": ["LlavaLlamaModel"],
        "drop_path_rate": 0.0, "hidden_size": text["hidden_size"], "image_aspect_ratio": "resize",
        "interpolate_mode": "linear", "llm_cfg": text, "mm_hidden_size": 1152,
        "mm_projector_cfg": projector, "mm_projector_lr": None, "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2, "model_dtype": "torch.bfloat16",
        "model_type": "llava_llama", "num_video_frames": 8, "resume_path": "./vlm", "s2": False,
        "s2_max_split_size": 336, "s2_scales": "336,672,1008", "transformers_version": "4.36.2",
        "tune_language_model": True, "tune_mm_projector": True, "tune_vision_tower": True,
        "vision_resolution": -1, "vision_tower_cfg": tower,
    }  # fmt: skip


def phi(name, rope_type, window):
    """Return the config.json of a Phi-3-vision, with invented rotary factors."""
    return {
        "_attn_implementation": "flash_attention_2", "_name_or_path": name,
        "architectures": ["Phi3VForCausalLM"], "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "bos_token_id": 1,
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 3072,
        "img_processor": {
            "image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model", "num_img_tokens": 144,
        },
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "model_type": "phi3_v", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [round(1.0 + 1.3 * i, 1) for i in range(48)],
            "short_factor": [round(1.0 + 0.04 * i, 2) for i in range(48)],
            "type": rope_type,
        },
        "rope_theta": 10000.0, "sliding_window": window, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.38.1", "use_cache": True,
        "vocab_size": 32064,
    }  # fmt: skip


def internvl(text, tower=INTERN_TOWER):
    """Return the config.json of InternVL*-hf; whether the head is tied is said in text_config."""
    return {
        "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5,
        "image_seq_length": 256, "image_token_id": 151667, "model_type": "internvl",
        "projector_hidden_act": "gelu", "text_config": text, "torch_dtype": "bfloat16",
        "vision_config": tower, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip


def llava_onevision(text):
    """Return the config.json of llava-onevision-qwen2-*-ov-hf."""
    sides = [384 * count for count in range(1, 7)]
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": [[height, width] for height in sides for width in sides],
        "image_token_index": 151646, "model_type": "llava_onevision",
        "projector_hidden_act": "gelu", "text_config": ONEVISION_TEXT | text,
        "tie_word_embeddings": False, "torch_dtype": "float16", "video_token_index": 151647,
        "vision_aspect_ratio": "anyres_max_9", "vision_config": SO400M_26,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }  # fmt: skip
