"""What the family's transformers share: ragged layouts, modulation, rotary embedding, patch embedding, the refiner and
the dual-stream block.

A *pack* is the samples whose rows go through one matrix product. A block receives all packs of a step and loops inside,
so its weights are fetched once a step, however the samples are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, get_1d_rotary_pos_embed
from jaxtyping import Complex, Float
from torch import Tensor, nn

from reelbatch import ragged
from reelbatch.attention import AUTO, Mask, ragged_attention
from reelbatch.models.linear import ROWS, FewRowsLinear, linear, pad_rows, padding_of
from reelbatch.models.pointwise import NORM_EPS, HeadNorm, gelu_feed_forward
from reelbatch.ragged import Lengths
from reelbatch.tracing import cached

Rows = Float[Tensor, "tokens dim"]
VideoRows = Float[Tensor, "video_tokens dim"]
TextRows = Float[Tensor, "text_tokens dim"]
Parts = Float[Tensor, "parts dim"]
Conditions = Float[Tensor, "padded_branches dim"]
"""A row for each branch, and maybe rows to ignore; see `conditions`."""

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
    """How the branches of a pack attend: the mask of each, prepared once for all layers, and the backend."""

    masks: tuple[Mask, ...] | None = None
    backend: str = AUTO

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
        return ragged_attention(query, key, value, lengths, self.masks, self.backend)


@dataclass(frozen=True)
class TwoStreams:
    """A pack in the dual-stream blocks: video rows `[v1 v2 …]` and text rows `[t1 t2 …]`."""

    video: VideoRows
    text: TextRows
    condition: Conditions
    part_condition: Float[Tensor, "padded_parts dim"]
    """A row for each run of rows that share a modulation (`Layout.video_parts`); `condition` itself where that is a
    branch."""
    layout: Layout
    attend: Attending = Attending()


# --------------------------------------------------------------------------------------------------
# Modulation and rotary embedding


def conditions(padded: Conditions, count: int) -> Conditions:
    """What the modulations are given of padded rows: few without their padding (`FewRowsLinear`), and more with it, so
    that they are padded once."""
    return padded[:count] if count < ROWS else padded


class Modulation(nn.Module):
    """AdaLN modulation: the linear that turns a sample's condition into shifts, scales and gates (DiT, section 3.2)."""

    def __init__(self, dim: int, vectors: int) -> None:
        super().__init__()
        self.linear = FewRowsLinear(dim, vectors * dim)

    def forward(self, condition: Conditions) -> tuple[Conditions, ...]:
        return linear(self.linear, condition).split(condition.shape[-1], dim=-1)


def modulated_norm(rows: Rows, lengths: Lengths, shift: Parts, scale: Parts) -> Rows:
    """`LayerNorm(rows) * (1 + scale) + shift`, the part's scale and shift serving as the norm's own affine.

    Args:
        lengths: rows of each part, that is of a sample, or of its first frame and of its rest. `shift` and `scale` may
            have further rows after the parts' own, which are ignored.
    """

    def norm(part: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(part, part.shape[-1:], weight, bias, NORM_EPS)

    return ragged.map_samples(norm, rows, lengths, 1 + scale, shift)


def gated_residual(rows: Rows, lengths: Lengths, gate: Parts, update: Rows) -> Rows:
    """`rows + gate * update`, with one gate a part; `lengths` and `gate` are as for `modulated_norm`."""
    updates = iter(ragged.split(update, lengths))
    return ragged.map_samples(lambda part, g: torch.addcmul(part, g, next(updates)), rows, lengths, gate)


def rotate_video_(
    rows: Float[Tensor, "tokens heads head_dim"], starts: Lengths, layout: Layout
) -> Float[Tensor, "tokens heads head_dim"]:
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


@cached(maxsize=16)
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


@cached(maxsize=256)
def make_layout(
    shapes: tuple[BranchShape, ...],
    axes_dim: tuple[int, int, int],
    theta: float,
    device: torch.device,
    first_frame_apart: bool = False,
) -> Layout:
    """The layout of a pack of these shapes; computed once, it serves every layer of every step."""

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
        return ragged.join([self._project(sample).flatten(1).t() for sample in latents]).contiguous()

    def _project(self, latents: Tensor) -> Float[Tensor, "dim frames rows columns"]:
        kernel = self.proj.weight.shape[1:]
        if latents.numel() >= ROWS * kernel.numel() or not padding_of(1, latents):
            return self.proj(latents.unsqueeze(0))[0]
        # few patches are as small a product as few rows: patches of zeros beside them, cut off again
        columns = latents.shape[-1] // kernel[-1]
        beside = F.pad(latents, (0, (ROWS - 1) * kernel[-1]))
        return self.proj(beside.unsqueeze(0))[0][..., :columns]


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
        return rows.view(len(rows), self.heads, rows.shape[-1] // self.heads)


class RefinerAttention(Projections):
    """Self-attention of a text over its own tokens."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        dim = heads * head_dim
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, rows: Float[Tensor, "tokens dim"], lengths: Lengths) -> Float[Tensor, "tokens dim"]:
        query, key, value = (self._heads(linear(to, rows)) for to in (self.to_q, self.to_k, self.to_v))
        return linear(self.to_out[0], ragged_attention(query, key, value, lengths))


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward over each text's own tokens, each update gated by the condition."""

    def __init__(self, heads: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        dim = heads * head_dim
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = RefinerAttention(heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="linear-silu")
        self.norm_out = Modulation(dim, 2)

    def forward(self, rows: TextRows, lengths: Lengths, condition: Conditions) -> TextRows:
        gate_msa, gate_mlp = self.norm_out(condition)
        rows = gated_residual(rows, lengths, gate_msa, self.attn(self.norm1(rows), lengths))
        return gated_residual(rows, lengths, gate_mlp, linear(self.ff, self.norm2(rows)))


class Refiner(nn.Module):
    """The refiner's blocks, in order. A module of its own, so that parameters are named as in Diffusers."""

    def __init__(self, heads: int, head_dim: int, layers: int, mlp_ratio: float) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList([RefinerBlock(heads, head_dim, mlp_ratio) for _ in range(layers)])

    def forward(self, rows: TextRows, lengths: Lengths, condition: Conditions) -> TextRows:
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
        pooled = torch.stack(means).to(text[0].dtype)
        padding = padding_of(len(pooled), pooled)
        condition = F.silu(self.time_text_embed(pad_rows(timestep, padding), pad_rows(pooled, padding)))
        return self.token_refiner(linear(self.proj_in, ragged.join(text)), lengths, conditions(condition, len(pooled)))


# --------------------------------------------------------------------------------------------------
# Blocks


class JointAttention(Projections):
    """The projections of a block's joint attention. `added` gives text its own, as the dual-stream blocks have."""

    def __init__(self, heads: int, head_dim: int, added: bool) -> None:
        super().__init__(heads, head_dim)
        dim = heads * head_dim
        self.norm_q = HeadNorm(head_dim, eps=NORM_EPS)
        self.norm_k = HeadNorm(head_dim, eps=NORM_EPS)
        if added:
            # in the reference's order, so that a seed makes the same random weights
            self.add_k_proj = nn.Linear(dim, dim)
            self.add_v_proj = nn.Linear(dim, dim)
            self.add_q_proj = nn.Linear(dim, dim)
            self.norm_added_q = HeadNorm(head_dim, eps=NORM_EPS)
            self.norm_added_k = HeadNorm(head_dim, eps=NORM_EPS)
            self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
            self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self, video: VideoRows, text: TextRows, layout: Layout, attend: Attending
    ) -> tuple[VideoRows, TextRows]:
        """Updates of video and text, which attend together, each projected by its own weights."""
        starts = _starts(layout.video)
        query = rotate_video_(self.norm_q(self._heads(linear(self.to_q, video))), starts, layout)
        key = rotate_video_(self.norm_k(self._heads(linear(self.to_k, video))), starts, layout)
        value = self._heads(linear(self.to_v, video))

        text_query = self.norm_added_q(self._heads(linear(self.add_q_proj, text)))
        text_key = self.norm_added_k(self._heads(linear(self.add_k_proj, text)))
        text_value = self._heads(linear(self.add_v_proj, text))

        query, key, value = (
            ragged.interleave(video_rows, layout.video, text_rows, layout.text)
            for video_rows, text_rows in ((query, text_query), (key, text_key), (value, text_value))
        )
        attended = attend(query, key, value, layout.joint)
        video, text = ragged.separate(attended, layout.video, layout.text)
        return linear(self.to_out[0], video), linear(self.to_add_out, text)

    def one_stream(self, tokens: Rows, layout: Layout, attend: Attending) -> Rows:
        """The joint sequence `[v1 t1 v2 t2 …]` attends to itself; the output projection is the block's own."""
        starts = _starts(layout.joint)
        query = rotate_video_(self.norm_q(self._heads(linear(self.to_q, tokens))), starts, layout)
        key = rotate_video_(self.norm_k(self._heads(linear(self.to_k, tokens))), starts, layout)
        return attend(query, key, self._heads(linear(self.to_v, tokens)), layout.joint)


class DualStreamBlock(nn.Module):
    """Video and text keep their own weights and meet in the attention (HunyuanVideo, figure 8, left)."""

    def __init__(self, heads: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        dim = heads * head_dim
        self.norm1 = Modulation(dim, 6)
        self.norm1_context = Modulation(dim, 6)
        self.attn = JointAttention(heads, head_dim, added=True)
        self.ff = gelu_feed_forward(dim, mlp_ratio)
        self.ff_context = gelu_feed_forward(dim, mlp_ratio)

    def forward(self, packs: list[TwoStreams]) -> list[TwoStreams]:
        return [self._pack(pack) for pack in packs]

    def _pack(self, pack: TwoStreams) -> TwoStreams:
        video, text, layout = pack.video, pack.text, pack.layout
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(pack.part_condition)
        c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(pack.condition)

        # 1. Joint attention
        video_update, text_update = self.attn(
            modulated_norm(video, layout.video_parts, shift_msa, scale_msa),
            modulated_norm(text, layout.text, c_shift_msa, c_scale_msa),
            layout,
            pack.attend,
        )
        video = gated_residual(video, layout.video_parts, gate_msa, video_update)
        text = gated_residual(text, layout.text, c_gate_msa, text_update)

        # 2. Feed-forward
        video_update = linear(self.ff, modulated_norm(video, layout.video_parts, shift_mlp, scale_mlp))
        text_update = linear(self.ff_context, modulated_norm(text, layout.text, c_shift_mlp, c_scale_mlp))
        return replace(
            pack,
            video=gated_residual(video, layout.video_parts, gate_mlp, video_update),
            text=gated_residual(text, layout.text, c_gate_mlp, text_update),
        )
