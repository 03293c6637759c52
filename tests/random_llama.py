"""Random Hugging Face Llama, the input of modelopt's exporters."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(decoder, dtype, **config_values):
    """Build a random LlamaForCausalLM with the sizes of a Decoder and other config values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=decoder.hidden,
        intermediate_size=decoder.ffn,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        vocab_size=decoder.vocab,
        max_position_embeddings=decoder.max_positions,
        rms_norm_eps=decoder.norm_eps,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        **config_values,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)
