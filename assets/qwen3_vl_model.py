"""Qwen3-VL for training on scenes of one layout: batched, with fixed positions.

Modules have the published names; `transformers` loads the state dict unchanged.

Legend: B scenes, I images of a scene, P patches of an image, N image tokens of an image,
H hidden size, S tokens, D size of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate states [...,S,D] by angles whose cosines and sines are [S,D]."""
    low, high = states.chunk(2, -1)
    return (states * cos + torch.cat((-high, low), -1) * sin).to(states.dtype)


def patch_places(side: int, merge: int) -> Tensor:
    """Return row and column [P,2] of patches in the order of merged tokens."""
    blocks = torch.arange(side).view(side // merge, merge)
    shape = (side // merge, side // merge, merge, merge)
    rows, columns = blocks[:, None, :, None].expand(shape), blocks[None, :, None, :].expand(shape)
    return torch.stack((rows.flatten(), columns.flatten()), 1)


class VisionAttention(nn.Module):
    """Attention of all patches of an image to each other."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.heads = heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the output for [B,P,H]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linears with gelu between them."""

    def __init__(self, inputs: int, inner: int, outputs: int, approximate: str) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = nn.Linear(inputs, inner), nn.Linear(inner, outputs)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for [...,inputs]."""
        return self.linear_fc2(functional.gelu(self.linear_fc1(x), approximate=self.approximate))


class VisionBlock(nn.Module):
    """A layer of the tower."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-6), nn.LayerNorm(hidden, eps=1e-6)
        self.attn = VisionAttention(hidden, config["num_heads"])
        self.mlp = VisionMLP(hidden, config["intermediate_size"], hidden, "tanh")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the output for [B,P,H]."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(VisionMLP):
    """Merges neighbouring patches into one token; deepstack's normalize after the merge."""

    def __init__(self, config: dict[str, Any], after: bool) -> None:
        hidden, self_merge = config["hidden_size"], config["spatial_merge_size"] ** 2
        wide = self_merge * hidden
        super().__init__(wide, wide, config["out_hidden_size"], "none")
        self.after, self.merge = after, self_merge
        self.norm = nn.LayerNorm(wide if after else hidden, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B,N,H] for patches [B,P,H]."""
        normal = x if self.after else self.norm(x)
        grouped = normal.unflatten(1, (-1, self.merge)).flatten(2)
        return super().forward(self.norm(grouped) if self.after else grouped)


class Vision(nn.Module):
    """The tower, for square images of as many patches as it has positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.patch = config["hidden_size"], config["patch_size"]
        self.merge = config["spatial_merge_size"]
        self.side = int(config["num_position_embeddings"] ** 0.5)
        kernel = (config["temporal_patch_size"], self.patch, self.patch)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, hidden, kernel, kernel)
        self.pos_embed = nn.Embedding(config["num_position_embeddings"], hidden)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config["depth"]))
        self.merger = Merger(config, after=False)
        self.indexes = config["deepstack_visual_indexes"]
        self.deepstack_merger_list = nn.ModuleList(Merger(config, after=True) for _ in self.indexes)
        places = patch_places(self.side, self.merge)
        size = hidden // config["num_heads"] // 2
        frequencies = 10000.0 ** -(torch.arange(0, size, 2) / size)
        angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)
        self.register_buffer("places", places[:, 0] * self.side + places[:, 1], persistent=False)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return tokens [B,N,H], and those for deepstack, of images [B,side,side,3] uint8."""
        pixels = (images.float() / 127.5 - 1).permute(0, 3, 1, 2)
        grid = (self.side // self.merge, self.merge, self.patch)
        pixels = pixels.unflatten(3, grid).unflatten(2, grid)  # [B,3,rows,merge,patch,...]
        patches = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(1, 4)
        projection = self.patch_embed.proj
        weight = projection.weight.sum(2).flatten(1)  # an image is its own second frame
        x = functional.linear(patches, weight, projection.bias) + self.pos_embed(self.places)
        deeper = []
        for index, block in enumerate(self.blocks):
            x = block(x, self.cos, self.sin)
            if index in self.indexes:
                deeper.append(self.deepstack_merger_list[self.indexes.index(index)](x))
        return [self.merger(x), *deeper]


class RMSNorm(nn.Module):
    """Root mean square normalization."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for [...,size]."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Grouped attention with normalized heads."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, size = config["hidden_size"], config["head_dim"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, self.heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, self.groups * size, bias=False)
        self.v_proj = nn.Linear(hidden, self.groups * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return the output for [B,S,H]."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.groups, -1))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        q, k = (rotate(states, cos, sin).to(v.dtype) for states in (q, k))
        repeat = self.heads // self.groups
        k, v = (states.repeat_interleave(repeat, 1) for states in (k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated linears with silu."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for [B,S,H]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A layer of the decoder."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config["hidden_size"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"])
        self.self_attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return the output for [B,S,H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Tower and decoder; the head is the embedding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        text = config["text_config"]
        self.sections = text["rope_scaling"]["mrope_section"]
        self.theta, self.head_dim = text["rope_theta"], text["head_dim"]
        self.visual, self.language_model = Vision(config["vision_config"]), nn.Module()
        decoder = self.language_model
        decoder.embed_tokens = nn.Embedding(text["vocab_size"], text["hidden_size"])
        decoder.layers = nn.ModuleList(Layer(text) for _ in range(text["num_hidden_layers"]))
        decoder.norm = RMSNorm(text["hidden_size"])
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [S,D] of positions [3,S], frequencies dealt out in turn."""
        steps = torch.arange(0, self.head_dim, 2, device=positions.device)
        angles = positions[:, :, None] * self.theta ** -(steps / self.head_dim)  # [3,S,D/2]
        mixed = angles[0].clone()
        for row in (1, 2):
            chosen = slice(row, 3 * self.sections[row], 3)
            mixed[:, chosen] = angles[row][:, chosen]
        both = torch.cat((mixed, mixed), -1)
        return both.cos(), both.sin()

    def forward(
        self, images: Tensor, ids: Tensor, image_places: Tensor, angles: Any, mask: Tensor
    ) -> Tensor:
        """Return the last hidden states [B,S,H].

        Args:
            images: [B,I,side,side,3] uint8.
            ids: [B,S].
            image_places: [I*N] of the image tokens.
            angles: as the function `angles` returns.
            mask: [S,S] bool, True where a row may attend to a column.
        """
        decoder = self.language_model
        encoded = self.visual(images.flatten(0, 1))
        features, *deeper = [one.unflatten(0, images.shape[:2]).flatten(1, 2) for one in encoded]
        x = decoder.embed_tokens(ids).to(features.dtype)
        x = x.index_copy(1, image_places, features)
        for index, layer in enumerate(decoder.layers):
            x = layer(x, *angles, mask)
            if index < len(deeper):
                x = x.index_add(1, image_places, deeper[index].to(x.dtype))
        return decoder.norm(x)
