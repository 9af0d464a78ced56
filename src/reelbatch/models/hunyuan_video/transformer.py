"""HunyuanVideo's text-to-video transformer, over ragged packs of samples.

The network of "HunyuanVideo: A Systematic Framework For Large Video Generative Models" (arXiv 2412.03603, section 4),
with the parameter names and shapes of Diffusers' `HunyuanVideoTransformer3DModel`, so that a real checkpoint loads as
it is. What differs is how samples share a forward: they are laid end to end instead of being padded to one shape, and
the text tokens that do not exist are not computed.

    latents ── patches ─┐                       ┌─ video ┐
                        ├─ dual-stream blocks ──┤        ├─ single-stream blocks ── video ── velocity
    text ─── refiner ───┘   (own weights each)  └─ text ─┘   (one set of weights)
    timestep, guidance, pooled text ── one vector a sample ── shift, scale and gate of every block

"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.utils import apply_lora_scale
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from reelbatch import ragged
from reelbatch.models.hunyuan_video.branch import Branch
from reelbatch.models.hunyuan_video.padded import branches_of
from reelbatch.models.layers import (
    Attending,
    BranchShape,
    DualStreamBlock,
    JointAttention,
    Layout,
    Modulation,
    PatchEmbed,
    TokenRefiner,
    TwoStreams,
    conditions,
    gated_residual,
    make_layout,
    modulated_norm,
)
from reelbatch.models.linear import linear, pad_rows, padding_of
from reelbatch.models.packed import PackedTransformer, check_heads
from reelbatch.models.pointwise import gelu_tanh


@dataclass(frozen=True)
class OneStream:
    """A pack in the single-stream blocks: `[v1 t1 v2 t2 …]`."""

    tokens: Float[Tensor, "tokens dim"]
    condition: Float[Tensor, "padded_branches dim"]
    part_condition: Float[Tensor, "padded_parts dim"]
    layout: Layout
    attend: Attending

    @classmethod
    def of(cls, pack: TwoStreams) -> OneStream:
        tokens = ragged.interleave(pack.video, pack.layout.video, pack.text, pack.layout.text)
        return cls(tokens, pack.condition, pack.part_condition, pack.layout, pack.attend)

    def video(self) -> Float[Tensor, "video_tokens dim"]:
        return ragged.separate(self.tokens, self.layout.video, self.layout.text)[0]


class ConditionEmbedding(nn.Module):
    """Timestep, pooled text and (for guidance-distilled models) guidance, summed into one vector a branch."""

    def __init__(self, dim: int, pooled_dim: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.text_embedder = PixArtAlphaTextProjection(pooled_dim, dim, act_fn="silu")
        self.guidance_embedder = TimestepEmbedding(256, dim) if guidance_embeds else None

    def forward(
        self,
        timestep: Float[Tensor, " branches"],
        pooled: Float[Tensor, "branches pooled_dim"],
        guidance: Float[Tensor, " branches"] | None,
    ) -> Float[Tensor, "branches dim"]:
        condition = self.timestep_embedder(self.time_proj(timestep).to(pooled.dtype))
        if self.guidance_embedder is not None:
            condition = condition + self.guidance_embedder(self.time_proj(guidance).to(pooled.dtype))
        return condition + self.text_embedder(pooled)

    def of_first_frame(self, pooled: Float[Tensor, "branches pooled_dim"]) -> Float[Tensor, "branches dim"]:
        """The condition of a first frame that is given, not denoised: its timestep is 0."""
        timestep = torch.zeros(len(pooled), device=pooled.device)
        return self.timestep_embedder(self.time_proj(timestep).to(pooled.dtype)) + self.text_embedder(pooled)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence (HunyuanVideo, figure 8, right)."""

    def __init__(self, heads: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        dim = heads * head_dim
        mlp_dim = int(dim * mlp_ratio)
        self.attn = JointAttention(heads, head_dim, added=False)
        self.norm = Modulation(dim, 3)
        self.proj_mlp = nn.Linear(dim, mlp_dim)
        self.proj_out = nn.Linear(dim + mlp_dim, dim)

    def forward(self, packs: list[OneStream]) -> list[OneStream]:
        return [self._pack(pack) for pack in packs]

    def _pack(self, pack: OneStream) -> OneStream:
        lengths = pack.layout.joint_parts
        shift, scale, gate = self.norm(pack.part_condition)
        normed = modulated_norm(pack.tokens, lengths, shift, scale)
        attended = self.attn.one_stream(normed, pack.layout, pack.attend)
        mlp = gelu_tanh(linear(self.proj_mlp, normed))
        update = linear(self.proj_out, torch.cat([attended, mlp], dim=-1))
        return replace(pack, tokens=gated_residual(pack.tokens, lengths, gate, update))


# --------------------------------------------------------------------------------------------------
# The network

SINGLE_BLOCK = r"single_transformer_blocks\.\d+\."
BLOCK = r"(single_)?transformer_blocks\.\d+\."
"""How the names of layers in blocks begin."""


class HunyuanVideoTransformer3DModel(PackedTransformer):
    """HunyuanVideo's text-to-video transformer, with the configuration and parameters of Diffusers' class of this name.

    Args:
        in_channels, out_channels: channels of the latents and of the velocity.
        num_attention_heads, attention_head_dim: their product is the width of the network.
        num_layers: dual-stream blocks. num_single_layers: single-stream blocks. num_refiner_layers: refiner blocks.
        mlp_ratio: hidden width of the feed-forwards over the width of the network.
        patch_size, patch_size_t: latent pixels and latent frames that make one token.
        qk_norm: "rms_norm", the only one that HunyuanVideo has.
        guidance_embeds: whether the model takes an embedded guidance scale.
        text_embed_dim, pooled_projection_dim: widths of the Llama states and of the pooled CLIP text.
        rope_theta, rope_axes_dim: rotary base, and channels for frame, row and column; they sum to the head dim.
        image_condition_type: None for text-to-video. With "latent_concat" an image comes in as further channels of the
            latents; with "token_replace" it is the first latent frame, which is modulated as of timestep 0.

    Raises:
        ValueError: if the configuration is of another network, or does not fit together.
    """

    # Diffusers writes it into model_index.json. With one level more, the folder has the name of one of its pipelines,
    # and it would look for the class there.
    __module__ = "reelbatch.models.hunyuan_video"
    _skip_layerwise_casting_patterns: ClassVar = ["x_embedder", "context_embedder", "norm"]
    _no_split_modules: ClassVar = ["DualStreamBlock", "SingleStreamBlock", "PatchEmbed", "TokenRefiner"]
    layer_groups: ClassVar[dict[str, str]] = {
        "attention": rf"{BLOCK}attn\.((to|add)_[qkv](_proj)?|to_out\.0|to_add_out)",
        "mlp": rf"{BLOCK}(ff|ff_context)\.net\.(0\.proj|2)|{SINGLE_BLOCK}(proj_mlp|proj_out)",
        "modulation": rf"{BLOCK}(norm|norm1|norm1_context)\.linear",
        "refiner": r"context_embedder\..*",
        "embedders": r"(x_embedder|time_text_embed)\..*",
    }
    """Patterns of the full names of linear layers, by what a LoRA's `targets` call them."""
    zero_at_start: ClassVar[str] = r"(.*\.)?(norm|norm1|norm1_context|norm_out)\.linear|proj_out"
    """Those that make shifts, scales, gates and the output: zero in an untrained network (adaLN-Zero, arXiv
    2212.09748)."""
    _repeated_blocks: ClassVar = ["DualStreamBlock", "SingleStreamBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        num_layers: int = 20,
        num_single_layers: int = 40,
        num_refiner_layers: int = 2,
        mlp_ratio: float = 4.0,
        patch_size: int = 2,
        patch_size_t: int = 1,
        qk_norm: str = "rms_norm",
        guidance_embeds: bool = True,
        text_embed_dim: int = 4096,
        pooled_projection_dim: int = 768,
        rope_theta: float = 256.0,
        rope_axes_dim: tuple[int, ...] = (16, 56, 56),
        image_condition_type: str | None = None,
    ) -> None:
        super().__init__()
        if image_condition_type not in (None, "latent_concat", "token_replace"):
            raise ValueError(
                f"image_condition_type is {image_condition_type!r}; "
                "it must be None, 'latent_concat' or 'token_replace'."
            )
        check_heads(qk_norm, rope_axes_dim, attention_head_dim)

        heads, head_dim = num_attention_heads, attention_head_dim
        dim = heads * head_dim
        self.x_embedder = PatchEmbed((patch_size_t, patch_size, patch_size), in_channels, dim)
        self.context_embedder = TokenRefiner(text_embed_dim, heads, head_dim, num_refiner_layers)
        self.time_text_embed = ConditionEmbedding(dim, pooled_projection_dim, guidance_embeds)
        self.transformer_blocks = nn.ModuleList(
            [DualStreamBlock(heads, head_dim, mlp_ratio) for _ in range(num_layers)]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [SingleStreamBlock(heads, head_dim, mlp_ratio) for _ in range(num_single_layers)]
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size_t * patch_size * patch_size * (out_channels or in_channels))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Float[Tensor, "B channels frames height width"] | None = None,
        timestep: Float[Tensor, " B"] | None = None,
        encoder_hidden_states: Float[Tensor, "B text_tokens text_dim"] | None = None,
        encoder_attention_mask: Shaped[Tensor, "B text_tokens"] | None = None,
        pooled_projections: Float[Tensor, "B pooled_dim"] | None = None,
        guidance: Float[Tensor, " B"] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        packs: Sequence[Sequence[Branch]] | None = None,
    ) -> Any:
        """Velocities, of ragged packs or of a padded batch.

        With `packs`, the branches that share each matrix product: one sample a pack is exact isolation, where all
        shapes are those it has alone; all samples in one pack is the fewest and largest calls. Gives a list for each
        pack of a velocity for each branch, of the shape of its latents.

        Otherwise the signature of Diffusers' class: a batch of one size, texts padded to one length. Gives
        `Transformer2DModelOutput(sample)`, or `(sample,)` with `return_dict=False`; sample is `[B, channels, frames,
        height, width]`.

        Args:
            timestep: sigma × 1000.
            encoder_attention_mask: which text tokens are real, read by position, so that left-padded and holed masks
                are right too; None is all. Tokens that are not real are not computed.
            guidance: scale × 1000, for models that take one. `[B, n]` holds the scales of n prompts in every row, as a
                pipeline makes it of a list of scales.
            attention_kwargs: `{"scale": s}` scales LoRA adapters. `"attention_mask"` restricts the joint attention
                over `[video | text_tokens]`, in any shape that `reelbatch.attention.attention` takes;
                `"attention_mask_axes"` names its axes; `"attention_rules"` is a `HeadRules`, or one (or None) a sample.
        """
        if packs is not None:
            return self._packs(packs)
        branches = branches_of(
            latents=hidden_states,
            timestep=timestep,
            text=encoder_hidden_states,
            text_mask=encoder_attention_mask,
            pooled=pooled_projections,
            guidance=guidance,
            heads=self.config.num_attention_heads,
            patch=(self.config.patch_size_t, self.config.patch_size, self.config.patch_size),
            kwargs=attention_kwargs or {},
        )
        return self._padded(branches, return_dict)

    def _packs(self, packs: Sequence[Sequence[Branch]]) -> list[list[Float[Tensor, "channels frames height width"]]]:
        shapes = [[self._shape(branch.latents, len(branch.text)) for branch in pack] for pack in packs]
        streams = [self._embed(pack, tuple(shape)) for pack, shape in zip(packs, shapes, strict=True)]
        for block in self.transformer_blocks:
            streams = self._run(block, streams)
        joined = [OneStream.of(stream) for stream in streams]
        del streams  # else they would stay through all that follows
        for block in self.single_transformer_blocks:
            joined = self._run(block, joined)
        return [self._velocities(pack, shape) for pack, shape in zip(joined, shapes, strict=True)]

    def _embed(self, pack: Sequence[Branch], shapes: tuple[BranchShape, ...]) -> TwoStreams:
        timestep = torch.stack([branch.timestep for branch in pack])
        pooled = torch.stack([branch.pooled for branch in pack])
        guidance = self._guidance(pack)
        padding = padding_of(len(pack), pooled)
        pooled = pad_rows(pooled, padding)
        embedded = self.time_text_embed(
            pad_rows(timestep, padding), pooled, None if guidance is None else pad_rows(guidance, padding)
        )
        # every modulation begins with this SiLU
        condition = part_condition = conditions(F.silu(embedded), len(pack))
        first_frame_apart = self.config.image_condition_type == "token_replace"
        if first_frame_apart:
            first_frames = conditions(F.silu(self.time_text_embed.of_first_frame(pooled)), len(pack))
            part_condition = torch.stack([first_frames, condition], dim=1).flatten(0, 1)
        return TwoStreams(
            video=self.x_embedder([branch.latents for branch in pack]),
            text=self.context_embedder([branch.text for branch in pack], timestep),
            condition=condition,
            part_condition=part_condition,
            layout=make_layout(
                shapes,
                tuple(self.config.rope_axes_dim),
                self.config.rope_theta,
                pack[0].latents.device,
                first_frame_apart,
            ),
            attend=self._attending(pack, shapes),
        )

    def _guidance(self, pack: Sequence[Branch]) -> Float[Tensor, " branches"] | None:
        if not self.config.guidance_embeds:
            return None
        if any(branch.guidance is None for branch in pack):
            raise ValueError(
                "This model has guidance_embeds: every branch needs a guidance (scale × 1000); one has none."
            )
        return torch.stack([branch.guidance for branch in pack if branch.guidance is not None])

    def _velocities(self, pack: OneStream, shapes: Sequence[BranchShape]) -> list[Tensor]:
        scale, shift = self.norm_out(pack.condition)  # this one layer has the scale first
        rows = linear(self.proj_out, modulated_norm(pack.video(), pack.layout.video, shift, scale))
        return [
            self._unpatchify(part, shape)
            for part, shape in zip(ragged.split(rows, pack.layout.video), shapes, strict=True)
        ]
