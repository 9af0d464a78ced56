"""HunyuanVideo 1.5 of Diffusers, repaired: every video of a batch is the one that it would have been alone.

The faults are those of Diffusers 0.42.1, in models/transformers/transformer_hunyuan_video15.py,
models/autoencoders/autoencoder_kl_hunyuanvideo15.py and pipelines/hunyuan_video1_5/.

The transformer's modules become ours where they stand (`network`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.models.transformers import transformer_hunyuan_video15 as theirs

from reelbatch.models import layers
from reelbatch.models.hunyuan_video15 import transformer as ours
from reelbatch.models.hunyuan_video15.vae import attention_blocks
from reelbatch.repairs.fix import Fix
from reelbatch.repairs.hunyuan_video15_pipeline import PIPELINES, FrameCausalAttnBlock, repair_pipeline, repair_vae
from reelbatch.repairs.network import (
    ATTENTION_SOURCE,
    MODULATION_SOURCE,
    MODULATIONS,
    Network,
    Sources,
    original,
    stand_in,
    transformer_stand_in,
)

Transformer = transformer_stand_in(ours.HunyuanVideo15Transformer3DModel, theirs.HunyuanVideo15Transformer3DModel)
STAND_INS: dict[type, type] = {
    their: stand_in(our, their)
    for their, our in (
        (theirs.HunyuanVideo15PatchEmbed, layers.PatchEmbed),
        (theirs.HunyuanVideo15TimeEmbedding, ours.TimeEmbedding),
        (theirs.HunyuanVideo15TokenRefiner, layers.TokenRefiner),
        (theirs.HunyuanVideo15IndividualTokenRefiner, layers.Refiner),
        (theirs.HunyuanVideo15IndividualTokenRefinerBlock, layers.RefinerBlock),
        (theirs.HunyuanVideo15AdaNorm, layers.Modulation),
        (theirs.HunyuanVideo15ByT5TextProjection, ours.GlyphProjection),
        (theirs.HunyuanVideo15ImageProjection, ours.ImageProjection),
        (theirs.HunyuanVideo15TransformerBlock, layers.DualStreamBlock),
    )
} | {**MODULATIONS, theirs.HunyuanVideo15Transformer3DModel: Transformer}

# What the repair was written for: the source of these methods, by SHA-256, in Diffusers 0.42.1
SOURCE: Sources = (
    (theirs.HunyuanVideo15PatchEmbed, "forward", "df04ad880922c13693914c740f32bf021bb8cd643b3405afd4d25d91d641311c"),
    (theirs.HunyuanVideo15TimeEmbedding, "forward", "be9ecc2ad13d68d178c5c9db26b52413ea3a8e3f4d0e04b74715d447ff85c8c0"),
    (theirs.HunyuanVideo15TokenRefiner, "forward", "9a5fde1f5d518b64e721eea488cf27b406d179caff9321580e520b970b9b036a"),
    (
        theirs.HunyuanVideo15IndividualTokenRefiner,
        "forward",
        "d2ffc04d3bb319865290085f252ec56c22a2ec134aaeaaca2bc667caa2e50c52",
    ),
    (
        theirs.HunyuanVideo15IndividualTokenRefinerBlock,
        "forward",
        "3cb78827898fb2e1f9bfa58f01c244fba94c59cee4273e4585fb5c760e9a49a3",
    ),
    (theirs.HunyuanVideo15AdaNorm, "forward", "c07d65e929233cc077e975b8c37d5b7a43b0ba43c9fb35ce28e8463019238da8"),
    (
        theirs.HunyuanVideo15RotaryPosEmbed,
        "forward",
        "cb4af2865638203a33af03b4f0cdf9ebb383d453d98c7fbbf0c9ef1c06c9e450",
    ),
    (
        theirs.HunyuanVideo15ByT5TextProjection,
        "forward",
        "0f8ec252f7e75d51ffb33a042c5d817456968001bc11f8b04be7e23b00e45f45",
    ),
    (
        theirs.HunyuanVideo15ImageProjection,
        "forward",
        "23f7ea5272afb5f9631517aeb648c6db487a43a77c768a89029f19ba820ac96e",
    ),
    (
        theirs.HunyuanVideo15TransformerBlock,
        "forward",
        "dc6d07e7f1c452e38dc69c512fa43e218cb30459a58a23d24ae0ae3e95e2fcf9",
    ),
    (
        theirs.HunyuanVideo15Transformer3DModel,
        "forward",
        "6a119831862d5f463cc7b762d6321605401492c10a74f9cf8adf72dc1f9d343e",
    ),
    (
        theirs.HunyuanVideo15AttnProcessor2_0,
        "__call__",
        "7bb9b09c8f4ac8c812029e5958ec0b53117cdb0a20fa3687edd89b8dc4460d09",
    ),
    *MODULATION_SOURCE,
    *ATTENTION_SOURCE,
)
NETWORK = Network(theirs.HunyuanVideo15Transformer3DModel, STAND_INS, theirs.HunyuanVideo15AttnProcessor2_0, SOURCE)


def faults(pipe: Any) -> list[Fix]:
    """The faults of this pipeline that are not repaired yet: of its transformer, its VAE, and of the pipeline itself.

    Args:
        pipe: a `HunyuanVideo15Pipeline` or `HunyuanVideo15ImageToVideoPipeline`. A component may be None.
    """
    transformer, vae = original(getattr(pipe, "transformer", None)), original(getattr(pipe, "vae", None))
    fixes = []
    if transformer is not None and not isinstance(transformer, ours.HunyuanVideo15Transformer3DModel):
        fixes.append(
            Fix(
                fault="The transformer decides once for the whole batch whether there is an image, so a text-to-video "
                "sample changes beside an image-to-video one; it raises where num_videos_per_prompt is above 1; and "
                "it computes padded text in all its blocks with a mask of tokens × tokens built in every layer, which "
                "keeps the fast attention kernels away.",
                cure="Each sample has its own image decided and runs with its own valid tokens alone, and no mask; "
                "image embeddings are repeated for the videos of a prompt.",
                part=transformer,
                apply=partial(NETWORK.repair, transformer),
            )
        )
    if isinstance(vae, AutoencoderKLHunyuanVideo15) and not all(
        isinstance(block, FrameCausalAttnBlock) for block in attention_blocks(vae)
    ):
        fixes.append(
            Fix(
                fault="The VAE raises on encoding or decoding more than one video at a time, and builds a mask of "
                "tokens × tokens row by row in Python.",
                cure="The VAE's attention goes frame by frame over the frames so far, for any batch and with no mask.",
                part=vae,
                apply=partial(repair_vae, vae),
            )
        )
    for pipeline, repaired in PIPELINES.items():
        if isinstance(pipe, pipeline) and not isinstance(pipe, repaired):
            fixes.append(
                Fix(
                    fault="With several prompts and num_videos_per_prompt above 1, videos get the text mask of another "
                    "prompt; one negative prompt for several prompts raises; texts are encoded and videos decoded in "
                    "one batch, whose size changes their last bits.",
                    cure="Masks are repeated in the order of the embeddings, and one negative prompt serves them all; "
                    "in exact isolation each text is encoded, and each video decoded, alone.",
                    part=pipe,
                    apply=partial(repair_pipeline, pipe, pipeline, repaired),
                )
            )
    return fixes
