"""HunyuanVideo's text-to-video transformer, over ragged packs of samples.

The network of "HunyuanVideo: A Systematic Framework For Large Video Generative Models" (arXiv 2412.03603, section 4),
with the parameter names and shapes of Diffusers' `HunyuanVideoTransformer3DModel`, so that a real checkpoint loads as
it is. What differs is how samples share a forward: they are laid end to end instead of being padded to one shape, and
the text tokens that do not exist are not computed.

    latents ── patches ─┐                       ┌─ video ┐
                        ├─ dual-stream blocks ──┤        ├─ single-stream blocks ── video ── velocity
    text ─── refiner ───┘   (own weights each)  └─ text ─┘   (one set of weights)
    timestep, guidance, pooled text ── one vector a sample ── shift, scale and gate of every block

A *pack* is the samples whose rows go through one matrix product. A block receives all packs of a step and loops inside,
so its weights are fetched once a step, however the samples are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    CombinedTimestepTextProjEmbeddings,
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    Timesteps,
    get_1d_rotary_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from jaxtyping import Complex, Float, Shaped
from torch import Tensor, nn

from reelbatch import ragged
from reelbatch.attention import (
    AUTO,
    HeadRules,
    Mask,
    Sizes,
    check_backend,
    compile_rules,
    per_sample,
    ragged_attention,
)
from reelbatch.models.branch import Branch
from reelbatch.models.padded import branches_of
from reelbatch.ragged import Lengths

NORM_EPS = 1e-6

DIFFUSERS_BACKENDS = {
    "native": AUTO,
    "_native_flash": "flash",
    "_native_cudnn": "cudnn",
    "_native_efficient": "efficient",
    "_native_math": "math",
    "flex": "flex",
}
"""Diffusers' names of attention backends, in ours."""


# --------------------------------------------------------------------------------------------------
# What goes through the network


class BranchShape(NamedTuple):
    """Patches along each axis, and text tokens."""

    frames: int
    height: int
    width: int
    text: int

    @property
    def video(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Layout:
    """Where the branches of a pack lie, and the rotary tables of their video rows."""

    video: Lengths
    text: Lengths
    rope: tuple[Complex[Tensor, "video 1 half_head_dim"], ...]
    joint: Lengths
    video_parts: Lengths
    """Video rows that share a modulation, one after the other: of a branch, or of its first frame and of its rest."""
    joint_parts: Lengths


@dataclass(frozen=True)
class Attending:
    """How the branches of a pack attend: the mask of each, made ready once for all layers, and the backend."""

    masks: tuple[Mask, ...] | None = None
    backend: str = AUTO

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
        return ragged_attention(query, key, value, lengths, self.masks, self.backend)


@dataclass(frozen=True)
class TwoStreams:
    """A pack in the dual-stream blocks: video rows `[v1 v2 …]` and text rows `[t1 t2 …]`."""

    video: Float[Tensor, "video_tokens dim"]
    text: Float[Tensor, "text_tokens dim"]
    condition: Float[Tensor, "branches dim"]
    part_condition: Float[Tensor, "parts dim"]
    """Of the rows that share a modulation (`Layout.video_parts`); `condition` itself where a branch has but one."""
    layout: Layout
    attend: Attending = Attending()

    def join(self) -> OneStream:
        tokens = ragged.interleave(self.video, self.layout.video, self.text, self.layout.text)
        return OneStream(tokens, self.condition, self.part_condition, self.layout, self.attend)


@dataclass(frozen=True)
class OneStream:
    """A pack in the single-stream blocks: `[v1 t1 v2 t2 …]`."""

    tokens: Float[Tensor, "tokens dim"]
    condition: Float[Tensor, "branches dim"]
    part_condition: Float[Tensor, "parts dim"]
    layout: Layout
    attend: Attending = Attending()

    def video(self) -> Float[Tensor, "video_tokens dim"]:
        return ragged.separate(self.tokens, self.layout.video, self.layout.text)[0]


# --------------------------------------------------------------------------------------------------
# Modulation and rotary embedding


class Modulation(nn.Module):
    """AdaLN modulation: the linear that turns a sample's condition into shifts, scales and gates (DiT, section 3.2)."""

    def __init__(self, dim: int, vectors: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, vectors * dim)

    def forward(self, condition: Float[Tensor, "branches dim"]) -> tuple[Tensor, ...]:
        return self.linear(condition).split(condition.shape[-1], dim=-1)


def modulated_norm(rows: Tensor, lengths: Lengths, shift: Tensor, scale: Tensor) -> Tensor:
    """`LayerNorm(rows) * (1 + scale) + shift`, the sample's scale and shift serving as the norm's own affine."""

    def norm(part: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(part, part.shape[-1:], weight, bias, NORM_EPS)

    return ragged.map_samples(norm, rows, lengths, 1 + scale, shift)


def gated_residual(rows: Tensor, lengths: Lengths, gate: Tensor, update: Tensor) -> Tensor:
    """`rows + gate * update`, with one gate a sample."""
    updates = iter(ragged.split(update, lengths))
    return ragged.map_samples(lambda part, g: torch.addcmul(part, g, next(updates)), rows, lengths, gate)


def rotate_video_(rows: Float[Tensor, "tokens heads head_dim"], starts: Lengths, layout: Layout) -> Tensor:
    """Rotary embedding of the video rows, in place where the dtype allows; text rows stay as they are.

    As the reference, it is computed in fp32 for half-precision rows.

    Args:
        rows: queries or keys, fresh from their norm.
        starts: the row at which each branch's video begins.
    """
    wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    for start, length, table in zip(starts, layout.video, layout.rope, strict=True):
        pairs.narrow(0, start, length).mul_(table)
    return wide.to(rows.dtype)


def _starts(lengths: Lengths) -> Lengths:
    return tuple(sum(lengths[:i]) for i in range(len(lengths)))


@lru_cache(maxsize=16)
def rotary_table(
    grid: tuple[int, int, int], axes_dim: tuple[int, int, int], theta: float, device: torch.device
) -> Complex[Tensor, "video 1 half_head_dim"]:
    """Rotary factors of a grid of patches along frame, row and column (HunyuanVideo, section 4.2).

    Args:
        grid: patches along each axis.
        axes_dim: channels of a head given to each axis.
        theta: base of the frequencies.
    """
    with torch.inference_mode(False):  # what is kept serves training too
        axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
        positions = torch.meshgrid(*axes, indexing="ij")
        tables = [
            get_1d_rotary_pos_embed(dim, position.flatten(), theta)
            for dim, position in zip(axes_dim, positions, strict=True)
        ]
        return torch.cat(tables, dim=1).unsqueeze(1)


@lru_cache(maxsize=256)
def make_layout(
    shapes: tuple[BranchShape, ...],
    axes_dim: tuple[int, int, int],
    theta: float,
    device: torch.device,
    first_frame_apart: bool = False,
) -> Layout:
    """The layout of a pack of these shapes; made once, it serves every layer of every step."""

    def parts(lengths: Lengths) -> Lengths:
        if not first_frame_apart:
            return lengths
        firsts = [shape.height * shape.width for shape in shapes]
        return tuple(part for first, n in zip(firsts, lengths, strict=True) for part in (first, n - first))

    video, text = tuple(shape.video for shape in shapes), tuple(shape.text for shape in shapes)
    joint = tuple(v + t for v, t in zip(video, text, strict=True))
    rope = tuple(rotary_table(shape[:3], axes_dim, theta, device) for shape in shapes)
    return Layout(video, text, rope, joint, parts(video), parts(joint))


# --------------------------------------------------------------------------------------------------
# Embedders


class PatchEmbed(nn.Module):
    """Latents to rows, by a convolution whose stride is its kernel."""

    def __init__(self, patch: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch, stride=patch)

    def forward(self, latents: Sequence[Float[Tensor, "channels frames height width"]]) -> Float[Tensor, "video dim"]:
        return ragged.join([self.proj(sample.unsqueeze(0))[0].flatten(1).t() for sample in latents]).contiguous()


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
        """Of a first frame that is given, not denoised: its timestep is 0."""
        timestep = torch.zeros(len(pooled), device=pooled.device)
        return self.timestep_embedder(self.time_proj(timestep).to(pooled.dtype)) + self.text_embedder(pooled)


class Projections(nn.Module):
    """Queries, keys and values of a sequence."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        dim = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def _heads(self, rows: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens heads head_dim"]:
        return rows.unflatten(-1, (self.heads, -1))


class RefinerAttention(Projections):
    """Self-attention of a text over its own tokens."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        dim = heads * head_dim
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, rows: Float[Tensor, "tokens dim"], lengths: Lengths) -> Float[Tensor, "tokens dim"]:
        query, key, value = (self._heads(to(rows)) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](ragged_attention(query, key, value, lengths))


class RefinerBlock(nn.Module):
    def __init__(self, heads: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        dim = heads * head_dim
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = RefinerAttention(heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="linear-silu")
        self.norm_out = Modulation(dim, 2)

    def forward(self, rows: Tensor, lengths: Lengths, condition: Tensor) -> Tensor:
        gate_msa, gate_mlp = self.norm_out(condition)
        rows = gated_residual(rows, lengths, gate_msa, self.attn(self.norm1(rows), lengths))
        return gated_residual(rows, lengths, gate_mlp, self.ff(self.norm2(rows)))


class Refiner(nn.Module):
    def __init__(self, heads: int, head_dim: int, layers: int, mlp_ratio: float) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList([RefinerBlock(heads, head_dim, mlp_ratio) for _ in range(layers)])

    def forward(self, rows: Tensor, lengths: Lengths, condition: Tensor) -> Tensor:
        for block in self.refiner_blocks:
            rows = block(rows, lengths, condition)
        return rows


class TokenRefiner(nn.Module):
    """Bidirectional refinement of the causal Llama states (HunyuanVideo, section 4.3).

    Its condition is the timestep plus the mean over the text's own tokens, hence it runs at every step.
    """

    def __init__(self, text_dim: int, heads: int, head_dim: int, layers: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        dim = heads * head_dim
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(embedding_dim=dim, pooled_projection_dim=text_dim)
        self.proj_in = nn.Linear(text_dim, dim)
        self.token_refiner = Refiner(heads, head_dim, layers, mlp_ratio)

    def forward(
        self, text: Sequence[Float[Tensor, "tokens text_dim"]], timestep: Float[Tensor, " branches"]
    ) -> Float[Tensor, "text_tokens dim"]:
        lengths = tuple(len(states) for states in text)
        # a text of no tokens has the mean zero, not 0/0; the mean is taken in fp32, as in the reference
        means = [states.float().sum(0) / max(len(states), 1) for states in text]
        condition = self.time_text_embed(timestep, torch.stack(means).to(text[0].dtype))
        return self.token_refiner(self.proj_in(ragged.join(text)), lengths, F.silu(condition))


# --------------------------------------------------------------------------------------------------
# Blocks


class JointAttention(Projections):
    """The projections of a block's joint attention. `added` gives text its own, as the dual-stream blocks have."""

    def __init__(self, heads: int, head_dim: int, added: bool) -> None:
        super().__init__(heads, head_dim)
        dim = heads * head_dim
        self.norm_q = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=NORM_EPS)
        if added:
            # in the reference's order, so that a seed makes the same random weights
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.add_q_proj = nn.Linear(dim, dim)
            self.norm_added_q = nn.RMSNorm(head_dim, eps=NORM_EPS)
            self.norm_added_k = nn.RMSNorm(head_dim, eps=NORM_EPS)
            self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
            self.to_add_out = nn.Linear(dim, dim)

    def two_streams(self, video: Tensor, text: Tensor, layout: Layout, attend: Attending) -> tuple[Tensor, Tensor]:
        """Video and text attend together, each projected by its own weights."""
        starts = _starts(layout.video)
        query = rotate_video_(self.norm_q(self._heads(self.to_q(video))), starts, layout)
        key = rotate_video_(self.norm_k(self._heads(self.to_k(video))), starts, layout)
        value = self._heads(self.to_v(video))

        text_query = self.norm_added_q(self._heads(self.add_q_proj(text)))
        text_key = self.norm_added_k(self._heads(self.add_k_proj(text)))
        text_value = self._heads(self.add_v_proj(text))

        query, key, value = (
            ragged.interleave(video_rows, layout.video, text_rows, layout.text)
            for video_rows, text_rows in ((query, text_query), (key, text_key), (value, text_value))
        )
        attended = attend(query, key, value, layout.joint)
        video, text = ragged.separate(attended, layout.video, layout.text)
        return self.to_out[0](video), self.to_add_out(text)

    def one_stream(self, tokens: Tensor, layout: Layout, attend: Attending) -> Tensor:
        """The joint sequence attends to itself; the output projection is the block's own."""
        starts = _starts(layout.joint)
        query = rotate_video_(self.norm_q(self._heads(self.to_q(tokens))), starts, layout)
        key = rotate_video_(self.norm_k(self._heads(self.to_k(tokens))), starts, layout)
        return attend(query, key, self._heads(self.to_v(tokens)), layout.joint)


class DualStreamBlock(nn.Module):
    """Video and text keep their own weights and meet in the attention (HunyuanVideo, figure 8, left)."""

    def __init__(self, heads: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        dim = heads * head_dim
        self.norm1 = Modulation(dim, 6)
        self.norm1_context = Modulation(dim, 6)
        self.attn = JointAttention(heads, head_dim, added=True)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")
        self.ff_context = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")

    def forward(self, packs: list[TwoStreams]) -> list[TwoStreams]:
        return [self._pack(pack) for pack in packs]

    def _pack(self, pack: TwoStreams) -> TwoStreams:
        video, text, layout = pack.video, pack.text, pack.layout
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(pack.part_condition)
        c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(pack.condition)

        # 1. Joint attention
        video_update, text_update = self.attn.two_streams(
            modulated_norm(video, layout.video_parts, shift_msa, scale_msa),
            modulated_norm(text, layout.text, c_shift_msa, c_scale_msa),
            layout,
            pack.attend,
        )
        video = gated_residual(video, layout.video_parts, gate_msa, video_update)
        text = gated_residual(text, layout.text, c_gate_msa, text_update)

        # 2. Feed-forward
        video_update = self.ff(modulated_norm(video, layout.video_parts, shift_mlp, scale_mlp))
        text_update = self.ff_context(modulated_norm(text, layout.text, c_shift_mlp, c_scale_mlp))
        return replace(
            pack,
            video=gated_residual(video, layout.video_parts, gate_mlp, video_update),
            text=gated_residual(text, layout.text, c_gate_mlp, text_update),
        )


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
        mlp = F.gelu(self.proj_mlp(normed), approximate="tanh")
        update = self.proj_out(torch.cat([attended, mlp], dim=-1))
        return replace(pack, tokens=gated_residual(pack.tokens, lengths, gate, update))


# --------------------------------------------------------------------------------------------------
# The network


class HunyuanVideoTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
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

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["x_embedder", "context_embedder", "norm"]
    _no_split_modules: ClassVar = ["DualStreamBlock", "SingleStreamBlock", "PatchEmbed", "TokenRefiner"]
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
        if qk_norm != "rms_norm":
            raise ValueError(f"qk_norm is {qk_norm!r}; HunyuanVideo's transformer has 'rms_norm'.")
        if sum(rope_axes_dim) != attention_head_dim:
            raise ValueError(
                f"rope_axes_dim {tuple(rope_axes_dim)} sums to {sum(rope_axes_dim)}; "
                f"it must sum to attention_head_dim, {attention_head_dim}."
            )

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

        self.gradient_checkpointing = False

    isolation: Literal["exact", "packed"] = "exact"
    """How the samples of a padded batch (Diffusers' signature) share the network: each as it would be alone, bit for
    bit, or all in one pack."""
    attention_backend: str = AUTO
    """The kernel of the joint attention: a name in `reelbatch.attention.BACKENDS`, or "auto"."""

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
        velocities = self._packs([[branch] for branch in branches] if self.isolation == "exact" else [branches])
        sample = torch.stack([velocity for pack in velocities for velocity in pack])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def set_attention_backend(self, backend: str) -> None:
        """The kernel of the joint attention, by our name (`reelbatch.attention.BACKENDS`, "auto") or Diffusers' own."""
        name = DIFFUSERS_BACKENDS.get(backend.lower(), backend.lower())
        check_backend(name)
        self.attention_backend = name

    def reset_attention_backend(self) -> None:
        self.attention_backend = AUTO

    def enable_cache(self, config: Any) -> None:
        """Refused: Diffusers' step caches decide once for the whole batch."""
        raise NotImplementedError(
            f"{type(config).__name__}: a step cache decides once for the whole batch what is computed. One that looks "
            "at the data would make a video depend on its batch-mates, and those that count steps work on Diffusers' "
            "own blocks. Run without it (reelbatch.restore(pipe) gives back Diffusers' own "
            "transformer, which has it)."
        )

    def _packs(self, packs: Sequence[Sequence[Branch]]) -> list[list[Float[Tensor, "channels frames height width"]]]:
        shapes = [[self._branch_shape(branch) for branch in pack] for pack in packs]
        streams = [self._embed(pack, tuple(shape)) for pack, shape in zip(packs, shapes, strict=True)]
        for block in self.transformer_blocks:
            streams = self._run(block, streams)
        joined = [stream.join() for stream in streams]
        del streams  # else they would stay through all that follows
        for block in self.single_transformer_blocks:
            joined = self._run(block, joined)
        return [self._velocities(pack, shape) for pack, shape in zip(joined, shapes, strict=True)]

    def _run(self, block: nn.Module, packs: list[Any]) -> list[Any]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, packs)
        return block(packs)

    def _embed(self, pack: Sequence[Branch], shapes: tuple[BranchShape, ...]) -> TwoStreams:
        timestep = torch.stack([branch.timestep for branch in pack])
        pooled = torch.stack([branch.pooled for branch in pack])
        # every modulation begins with this SiLU
        condition = part_condition = F.silu(self.time_text_embed(timestep, pooled, self._guidance(pack)))
        first_frame_apart = self.config.image_condition_type == "token_replace"
        if first_frame_apart:
            first_frames = F.silu(self.time_text_embed.of_first_frame(pooled))
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

    def _attending(self, pack: Sequence[Branch], shapes: Sequence[BranchShape]) -> Attending:
        if all(branch.mask is None for branch in pack):
            return Attending(None, self.attention_backend)
        masks = tuple(self._mask(branch, shape) for branch, shape in zip(pack, shapes, strict=True))
        return Attending(masks, self.attention_backend)

    def _mask(self, branch: Branch, shape: BranchShape) -> Mask:
        heads, tokens = self.config.num_attention_heads, shape.video + shape.text
        if isinstance(branch.mask, HeadRules):
            return compile_rules(branch.mask, heads, shape[:3], shape.text, branch.latents.device)
        return None if branch.mask is None else per_sample(branch.mask, Sizes(1, heads, tokens, tokens))[0]

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
        rows = self.proj_out(modulated_norm(pack.video(), pack.layout.video, shift, scale))
        return [
            self._unpatchify(part, shape)
            for part, shape in zip(ragged.split(rows, pack.layout.video), shapes, strict=True)
        ]

    def _unpatchify(self, rows: Float[Tensor, "video patch"], shape: BranchShape) -> Tensor:
        p, p_t = self.config.patch_size, self.config.patch_size_t
        patches = rows.reshape(shape.frames, shape.height, shape.width, -1, p_t, p, p)
        return patches.permute(3, 0, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def _branch_shape(self, branch: Branch) -> BranchShape:
        _, frames, height, width = branch.latents.shape
        p, p_t = self.config.patch_size, self.config.patch_size_t
        return BranchShape(frames // p_t, height // p, width // p, len(branch.text))
