"""HunyuanVideo 1.5's transformer, over ragged packs of samples.

The network of the HunyuanVideo 1.5 technical report (arXiv 2511.18870), with the parameter names and shapes of
Diffusers' `HunyuanVideo15Transformer3DModel`, so that a real checkpoint loads as it is. Its blocks are HunyuanVideo's
dual-stream blocks. A sample is conditioned on up to three pieces, in the reference's order, valid rows only:

    latents ── patches ──────────────────────────────────┐
                                                         ├─ dual-stream blocks ── video ── velocity
    image ── projection ─┐                               │   (own weights each)
    glyphs ─ projection ─┼─ [image | glyphs | text] rows ─┘
    text ─── refiner ────┘
    timestep (and the timestep it leads to) ── one vector a sample ── shift, scale and gate of every block

Where the reference pads every text to 1,000 rows, the glyphs to 256 and a missing image to 729, and masks them in every
layer, there is nothing here. Whether a sample has an image is said by its branch, never read off zeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import apply_lora_scale
from jaxtyping import Float, Int, Shaped
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from reelbatch import ragged
from reelbatch.attention import once
from reelbatch.models.hunyuan_video15.branch import Branch
from reelbatch.models.hunyuan_video15.padded import branches_of
from reelbatch.models.layers import (
    BranchShape,
    DualStreamBlock,
    Modulation,
    PatchEmbed,
    TokenRefiner,
    TwoStreams,
    conditions,
    make_layout,
    modulated_norm,
)
from reelbatch.models.linear import linear, pad_rows, padding_of
from reelbatch.models.packed import PackedTransformer, check_heads
from reelbatch.tracing import cached

GLYPH_HIDDEN = 2048
"""Width between the layers of the glyphs' projection, whatever the width of the network."""
TEXT, GLYPHS, IMAGE = range(3)
"""Rows of `cond_type_embed`."""


@cached(4)
def _kinds(device: torch.device) -> Int[Tensor, " 3"]:
    with torch.inference_mode(False):  # what is kept serves training too
        return torch.arange(3, device=device)


class TimeEmbedding(nn.Module):
    """The timestep, and for mean-flow models the timestep that the step leads to, as one vector a branch."""

    def __init__(self, dim: int, use_meanflow: bool) -> None:
        super().__init__()
        self.time_proj = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.timestep_embedder_r = TimestepEmbedding(in_channels=256, time_embed_dim=dim) if use_meanflow else None

    def forward(
        self,
        timestep: Float[Tensor, " branches"],
        timestep_r: Float[Tensor, " branches"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "branches dim"]:
        condition = self.timestep_embedder(self.time_proj(timestep).to(dtype))
        if self.timestep_embedder_r is not None and timestep_r is not None:
            condition = condition + self.timestep_embedder_r(self.time_proj(timestep_r).to(dtype))
        return condition


class GlyphProjection(nn.Module):
    """ByT5's states to rows of the network."""

    def __init__(self, glyph_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(glyph_dim)
        self.linear_1 = nn.Linear(glyph_dim, GLYPH_HIDDEN)
        self.linear_2 = nn.Linear(GLYPH_HIDDEN, GLYPH_HIDDEN)
        self.linear_3 = nn.Linear(GLYPH_HIDDEN, dim)

    def forward(self, glyphs: Float[Tensor, "tokens glyph_dim"]) -> Float[Tensor, "tokens dim"]:
        rows = F.gelu(linear(self.linear_1, self.norm(glyphs)))
        return linear(self.linear_3, F.gelu(linear(self.linear_2, rows)))


class ImageProjection(nn.Module):
    """SigLIP's states to rows of the network."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(image_dim)
        self.linear_1 = nn.Linear(image_dim, image_dim)
        self.linear_2 = nn.Linear(image_dim, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, image: Float[Tensor, "tokens image_dim"]) -> Float[Tensor, "tokens dim"]:
        return self.norm_out(linear(self.linear_2, F.gelu(linear(self.linear_1, self.norm_in(image)))))


class HunyuanVideo15Transformer3DModel(PackedTransformer):
    """HunyuanVideo 1.5's transformer, with the configuration and parameters of Diffusers' class of this name.

    Args:
        in_channels: of noisy latents, condition and mask (32 + 32 + 1). out_channels: of the velocity.
        num_attention_heads, attention_head_dim: their product is the width of the network.
        num_layers: dual-stream blocks. num_refiner_layers: refiner blocks.
        mlp_ratio: hidden width of the feed-forwards over the width of the network.
        patch_size, patch_size_t: latent pixels and latent frames that make one token.
        qk_norm: "rms_norm", the only one that HunyuanVideo has.
        text_embed_dim, text_embed_2_dim, image_embed_dim: widths of the states of Qwen, ByT5 and SigLIP.
        rope_theta, rope_axes_dim: rotary base, and channels for frame, row and column; they sum to the head dim.
        target_size: side in pixels of the square with as many pixels as the videos it was trained on (640 for 480p,
            960 for 720p); of no account to the network.
        task_type: kept as it is; converters write "i2v" for text-to-video models too.
        use_meanflow: whether the model takes the timestep that a step leads to.

    Raises:
        ValueError: if the configuration is of another network, or does not fit together.
    """

    # Diffusers writes it into model_index.json. With one level more, it would look for the class in its own pipelines.
    __module__ = "reelbatch.models.hunyuan_video15"
    _skip_layerwise_casting_patterns: ClassVar = ["x_embedder", "context_embedder", "norm"]
    _no_split_modules: ClassVar = ["DualStreamBlock", "PatchEmbed", "TokenRefiner"]
    _repeated_blocks: ClassVar = ["DualStreamBlock"]
    layer_groups: ClassVar[dict[str, str]] = {
        "attention": r"transformer_blocks\.\d+\.attn\.((to|add)_[qkv](_proj)?|to_out\.0|to_add_out)",
        "mlp": r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
        "modulation": r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
        "refiner": r"context_embedder\..*",
        "embedders": r"(x_embedder|time_embed|context_embedder_2|image_embedder)\..*",
    }
    """Patterns of the full names of linear layers, by what a LoRA's `targets` call them."""
    zero_at_start: ClassVar[str] = r"(.*\.)?(norm1|norm1_context|norm_out)\.linear|proj_out"
    """Those that make shifts, scales, gates and the output: zero in an untrained network (adaLN-Zero, arXiv
    2212.09748)."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 65,
        out_channels: int = 32,
        num_attention_heads: int = 16,
        attention_head_dim: int = 128,
        num_layers: int = 54,
        num_refiner_layers: int = 2,
        mlp_ratio: float = 4.0,
        patch_size: int = 1,
        patch_size_t: int = 1,
        qk_norm: str = "rms_norm",
        text_embed_dim: int = 3584,
        text_embed_2_dim: int = 1472,
        image_embed_dim: int = 1152,
        rope_theta: float = 256.0,
        rope_axes_dim: tuple[int, ...] = (16, 56, 56),
        target_size: int = 640,
        task_type: str = "i2v",
        use_meanflow: bool = False,
    ) -> None:
        super().__init__()
        check_heads(qk_norm, rope_axes_dim, attention_head_dim)

        heads, head_dim = num_attention_heads, attention_head_dim
        dim = heads * head_dim
        # in the reference's order, so that a seed makes the same random weights
        self.x_embedder = PatchEmbed((patch_size_t, patch_size, patch_size), in_channels, dim)
        self.image_embedder = ImageProjection(image_embed_dim, dim)
        self.context_embedder = TokenRefiner(text_embed_dim, heads, head_dim, num_refiner_layers)
        self.context_embedder_2 = GlyphProjection(text_embed_2_dim, dim)
        self.time_embed = TimeEmbedding(dim, use_meanflow)
        self.cond_type_embed = nn.Embedding(3, dim)
        self.transformer_blocks = nn.ModuleList(
            [DualStreamBlock(heads, head_dim, mlp_ratio) for _ in range(num_layers)]
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size_t * patch_size * patch_size * (out_channels or in_channels))

    @property
    def without_effect(self) -> str:
        """What follows the last attention in the stream of the conditioning, which is not read any more."""
        return rf"transformer_blocks\.{self.config.num_layers - 1}\.(attn\.to_add_out|ff_context\..*)"

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Float[Tensor, "B in_channels frames height width"] | None = None,
        timestep: Float[Tensor, " B"] | None = None,
        encoder_hidden_states: Float[Tensor, "B text_tokens text_dim"] | None = None,
        encoder_attention_mask: Shaped[Tensor, "B text_tokens"] | None = None,
        timestep_r: Float[Tensor, " B"] | None = None,
        encoder_hidden_states_2: Float[Tensor, "B glyph_tokens glyph_dim"] | None = None,
        encoder_attention_mask_2: Shaped[Tensor, "B glyph_tokens"] | None = None,
        image_embeds: Float[Tensor, "prompts image_tokens image_dim"] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        packs: Sequence[Sequence[Branch]] | None = None,
    ) -> Any:
        """Velocities, of ragged packs or of a padded batch.

        With `packs`, the branches that share each matrix product: one sample a pack is exact isolation, where all
        shapes are those it has alone; all samples in one pack is the fewest and largest calls. Gives a list for each
        pack of a velocity for each branch, of the frames and size of its latents.

        Otherwise the signature of Diffusers' class: a batch of one size, each kind of conditioning padded to one
        length. Gives `Transformer2DModelOutput(sample)`, or `(sample,)` with `return_dict=False`; sample is
        `[B, out_channels, frames, height, width]`.

        Args:
            timestep: sigma × 1000. timestep_r: that of the sigma which the step leads to, for models with
                `use_meanflow`; None leaves it out, as Diffusers' text-to-video pipeline does.
            encoder_attention_mask, encoder_attention_mask_2: which tokens of text and of glyphs are real, read by
                position; None is all. Tokens that are not real are not computed.
            image_embeds: all zero for a sample without an image, which each sample decides for itself. With fewer rows
                than samples, each serves as many samples, one after the other.
            attention_kwargs: `{"scale": s}` scales LoRA adapters. `"attention_mask"` restricts the joint attention over
                `[video | image | glyphs | text]`, padding included, in any shape that
                `reelbatch.attention.attention` takes; `"attention_mask_axes"` names its axes; `"attention_rules"` is a
                `HeadRules`, or one (or None) a sample.

        Raises:
            ValueError: if, of packs, a model with `use_meanflow` gets a branch without `timestep_r`; if another model
                gets one at all.
        """
        if packs is not None:
            self._check_timestep_r(packs)
            return self._packs(packs)
        branches = branches_of(
            latents=hidden_states,
            timestep=timestep,
            timestep_r=timestep_r,
            text=encoder_hidden_states,
            text_mask=encoder_attention_mask,
            glyphs=encoder_hidden_states_2,
            glyph_mask=encoder_attention_mask_2,
            image=image_embeds,
            heads=self.config.num_attention_heads,
            patch=(self.config.patch_size_t, self.config.patch_size, self.config.patch_size),
            kwargs=attention_kwargs or {},
        )
        if timestep_r is not None:
            self._check_timestep_r([branches])
        return self._padded(branches, return_dict)

    def _check_timestep_r(self, packs: Sequence[Sequence[Branch]]) -> None:
        for pack in packs:
            given = sum(branch.timestep_r is not None for branch in pack)
            if given != (len(pack) if self.config.use_meanflow else 0):
                has = "has use_meanflow: every branch needs" if self.config.use_meanflow else "takes no"
                raise ValueError(f"This model {has} timestep_r; {given} of {len(pack)} branches have one.")

    def _packs(
        self, packs: Sequence[Sequence[Branch]]
    ) -> list[list[Float[Tensor, "out_channels frames height width"]]]:
        shapes = [[self._shape(branch.latents, branch.conditioning_rows) for branch in pack] for pack in packs]
        streams = [self._embed(pack, tuple(shape)) for pack, shape in zip(packs, shapes, strict=True)]
        for block in self.transformer_blocks:
            streams = self._run(block, streams)
        return [self._velocities(pack, shape) for pack, shape in zip(streams, shapes, strict=True)]

    def _embed(self, pack: Sequence[Branch], shapes: tuple[BranchShape, ...]) -> TwoStreams:
        timestep = torch.stack([branch.timestep for branch in pack])
        following = [branch.timestep_r for branch in pack if branch.timestep_r is not None]
        padding = padding_of(len(pack), pack[0].latents)
        embedded = self.time_embed(
            pad_rows(timestep, padding),
            pad_rows(torch.stack(following), padding) if following else None,
            pack[0].latents.dtype,
        )
        condition = conditions(F.silu(embedded), len(pack))  # every modulation begins with this SiLU
        video = self.x_embedder([branch.latents for branch in pack])
        return TwoStreams(
            video=video,
            text=self._conditioning(pack, timestep).to(video.dtype),  # autocast leaves sums and norms in float32
            condition=condition,
            part_condition=condition,
            layout=make_layout(
                shapes, tuple(self.config.rope_axes_dim), self.config.rope_theta, pack[0].latents.device
            ),
            attend=self._attending(pack, shapes),
        )

    def _conditioning(
        self, pack: Sequence[Branch], timestep: Float[Tensor, " branches"]
    ) -> Float[Tensor, "conditioning_rows dim"]:
        """The rows `[image | glyphs | text]` of each branch, one branch after the other."""
        # by a call of the module, as its weight may wait elsewhere until then
        kinds = self.cond_type_embed(_kinds(timestep.device))
        texts = self.context_embedder([branch.text for branch in pack], timestep) + kinds[TEXT]
        rows: list[Tensor] = []
        lengths = tuple(len(branch.text) for branch in pack)
        for branch, text in zip(pack, ragged.split(texts, lengths), strict=True):
            if branch.image is not None:
                rows.append(self._projected(self.image_embedder, kinds[IMAGE], branch.image))
            if branch.glyphs is not None:
                rows.append(self._projected(self.context_embedder_2, kinds[GLYPHS], branch.glyphs))
            rows.append(text)
        return ragged.join(rows)

    def _projected(self, projection: nn.Module, kind: Tensor, states: Tensor) -> Float[Tensor, "tokens dim"]:
        """Rows of a piece that no timestep changes: computed once for a tensor of states, as long as it lives."""

        def project() -> Tensor:
            return projection(states) + kind

        # what training and the scale of an adapter change is computed anew
        if torch.is_grad_enabled() or any(isinstance(module, BaseTunerLayer) for module in projection.modules()):
            return project()
        weights = (*projection.parameters(), self.cond_type_embed.weight)
        key = (weakref.ref(projection), *(weight._version for weight in weights))
        rows: Tensor = once(states, key, torch.no_grad()(project))
        return rows

    def _velocities(self, pack: TwoStreams, shapes: Sequence[BranchShape]) -> list[Tensor]:
        scale, shift = self.norm_out(pack.condition)  # this one layer has the scale first
        rows = linear(self.proj_out, modulated_norm(pack.video, pack.layout.video, shift, scale))
        return [
            self._unpatchify(part, shape)
            for part, shape in zip(ragged.split(rows, pack.layout.video), shapes, strict=True)
        ]
