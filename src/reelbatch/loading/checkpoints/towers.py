"""Encoders and tokenizers as Tencent's instructions put them into its layouts: parts of larger models of others.

1.0   text_encoder     the language model of LLaVA (Llama 3), and its tokenizer
      text_encoder_2   CLIP ViT-L/14, of which the text half is taken
1.5   llm              Qwen2.5-VL, of which the language model is taken
      byt5-small, Glyph-SDXL-v2    ByT5's configuration, and the weights and further tokens of Glyph
      siglip           the image encoder of FLUX.1-Redux
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer

from reelbatch.files import link_or_copy
from reelbatch.loading.checkpoints.layouts import read_json, weights_in
from reelbatch.loading.checkpoints.scales import whole_weights
from reelbatch.loading.checkpoints.weight_files import WeightFile
from reelbatch.loading.checkpoints.writing import Weights, write_json
from reelbatch.loading.configs import build, check_config
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.inspection import TOKENIZER_SETTINGS
from reelbatch.loading.layout import Layout
from reelbatch.loading.stored import plain_name
from reelbatch.wording import shown_line

CLASSES = ("LlamaModel", "CLIPTextModel", "Qwen2_5_VLTextModel", "SiglipVisionModel")
"""Encoders that are taken out of larger models. LLaVA as a whole, of image-to-video models, comes from `--rest`."""
TOKENIZER_FILES = (*TOKENIZER_SETTINGS, "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
BEFORE = (
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "module.text_tower.",
    "text_model.",
    "vision_model.",
    "model.",
    "",
)
"""What stands before the names of an encoder's weights in the larger models that it is a part of."""
NOT_OF_TEXT = re.compile(
    r"(model\.)?(visual|vision_model|vision_tower|multi_modal_projector)\..*|.*lm_head\..*|logit_scale"
    r"|(text|visual)_projection\.weight|.*position_ids|.*inv_freq"
)
NOT_OF_IMAGES = re.compile(r"text_model\..*|logit_(scale|bias)|.*position_ids")
"""Weights of the other parts, in files that an encoder of texts, or of images, is a part of."""
COLOURS, FONTS = "color_idx.json", "multilingual_10-lang_idx.json"
MOST_TOKENS = 100_000


@dataclass
class Towers:
    """What is converted of a layout's encoders: weights by component; of others, what writes them into a folder, and
    the class that model_index.json names."""

    weights: dict[str, Weights] = field(default_factory=dict)
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)


def encoders_of(places: Mapping[str, Path]) -> tuple[str, ...]:
    """The components that the folders of a layout (`layouts.Found.towers`) are for, tokenizers aside."""
    glyph = ("text_encoder_2",) if {"byt5", "glyph"} <= places.keys() else ()
    return (*(name for name in places if name not in ("byt5", "glyph")), *glyph)


def towers_of(places: Mapping[str, Path], layout: Layout, dtype: torch.dtype | None) -> Towers:
    """The encoders of a layout.

    Args:
        places: their folders, by Tencent's names (`layouts.Found.towers`).

    Raises:
        ModelFolderError: for one that is there and cannot be read.
    """
    towers = Towers()
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        if name in places and layout.classes.get(name, ("",))[0] in CLASSES:
            images = name == "image_encoder"
            section, others = ("vision_config", NOT_OF_IMAGES) if images else ("text_config", NOT_OF_TEXT)
            file = weights_in(places[name])
            own = {weight: tensor for weight, tensor in file.tensors.items() if not others.fullmatch(weight)}
            file = whole_weights(replace(file, tensors=own), None, dtype)
            config = read_json(places[name] / "config.json")
            inner = config.get(section)
            towers.weights[name] = _weights(name, layout, inner if isinstance(inner, dict) else config, file)
            if not images:
                _tokenizer(towers, name.replace("text_encoder", "tokenizer"), places[name], layout)
    if "byt5" in places and "glyph" in places:
        _glyph(towers, places["byt5"], places["glyph"], layout, dtype)
    if "feature_extractor" in places and "feature_extractor" in layout.classes:
        source = places["feature_extractor"] / "preprocessor_config.json"
        towers.files["feature_extractor"] = lambda folder: link_or_copy(source, folder / source.name)
    return towers


def _weights(component: str, layout: Layout, config: Mapping[str, Any], file: WeightFile) -> Weights:
    checked, faults = check_config(layout.configs[component], config)
    if faults:
        raise ModelFolderError(f"{file.path}: {component}: {'; '.join(map(shown_line, faults))}")
    try:
        network: Any = build(layout.networks[component], checked)
    except ValueError as error:
        raise ModelFolderError(f"{file.path}: {component}: {error}") from None
    own: dict[int, str] = {}  # a weight that has two names is stored by the first
    shapes = {}
    for name, weight in network.state_dict(keep_vars=True).items():
        if own.setdefault(id(weight), name) == name:
            shapes[name] = tuple(weight.shape)
    sources = _sources(component, tuple(shapes), file)
    for name, source in sources.items():
        if file.tensors[source].shape != shapes[name]:
            raise ModelFolderError(
                f"{file.path}: has {source} of {list(file.tensors[source].shape)}, and its config.json asks for "
                f"{list(shapes[name])}"
            )
    network.config.architectures = [layout.classes[component][0]]
    return Weights(
        layout.weights[component],
        {name: file.tensors[source].size for name, source in sources.items()},
        lambda name: file.read(sources[name]).contiguous(),
        network.config.save_pretrained,
    )


def _sources(component: str, names: tuple[str, ...], file: WeightFile) -> dict[str, str]:
    """Where each weight of the network is in the file."""
    plain = {name: plain_name(name) for name in names}
    for before in BEFORE:
        sources = {name: before + short for name, short in plain.items()}
        # T5 calls the embedding of its tokens otherwise where it is not shared with a decoder
        sources |= {name: before + "encoder.embed_tokens.weight" for name in names if name == "shared.weight"}
        if all(source in file.tensors for source in sources.values()):
            break
    else:
        raise ModelFolderError(f"{file.path}: is no whole {component}: its config.json asks for other weights")
    others = [
        name
        for name in sorted(file.tensors.keys() - set(sources.values()))
        if name.startswith(before) and not name.endswith("shared.weight")
    ]
    if others:
        raise ModelFolderError(
            f"{file.path}: has {len(others)} weights that its config.json does not ask for, such as {others[0][:100]}"
        )
    return sources


def _tokenizer(towers: Towers, component: str, folder: Path, layout: Layout) -> None:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    settings = read_json(folder / "tokenizer_config.json")
    said = settings.get("tokenizer_class")
    towers.classes[component] = said if said in layout.classes[component] else layout.classes[component][0]

    def write(out: Path) -> None:
        for file in files:
            if file.name != "tokenizer_config.json":
                link_or_copy(file, out / file.name)
        # Diffusers' pipelines pad on the right, and do not say so to the tokenizer
        write_json(out / "tokenizer_config.json", {**settings, "padding_side": "right"})

    if files:
        towers.files[component] = write


def _glyph(towers: Towers, byt5: Path, glyph: Path, layout: Layout, dtype: torch.dtype | None) -> None:
    """ByT5 with the weights of Glyph-SDXL-v2, which has tokens for colours and fonts besides."""
    file = whole_weights(weights_in(glyph / "checkpoints", "byt5_model.pt"), None, dtype)
    embeddings = [tensor.shape[0] for name, tensor in file.tensors.items() if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1:
        raise ModelFolderError(f"{file.path}: is no whole ByT5: it has {len(embeddings)} embeddings of tokens")
    colours, fonts = (read_json(glyph / "assets" / name) for name in (COLOURS, FONTS))
    tokens = [f"<color-{number}>" for number in range(len(colours))]
    tokens += [f"<{name[:2]}-font-{number}>" for name, number in fonts.items()]
    tokenizer = ByT5Tokenizer()
    if len(tokens) > MOST_TOKENS or len(tokenizer) + len(set(tokens)) != embeddings[0]:
        raise ModelFolderError(
            f"{glyph}: has {len(set(tokens))} tokens in assets, and {embeddings[0]} in its weights; "
            f"{len(tokenizer)} are ByT5's own: get assets and checkpoints together"
        )
    config = {**read_json(byt5 / "config.json"), "vocab_size": embeddings[0]}
    towers.weights["text_encoder_2"] = _weights("text_encoder_2", layout, config, _named_as_t5(file))

    def write(out: Path) -> None:
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.save_pretrained(out)

    towers.files["tokenizer_2"] = write
    towers.classes["tokenizer_2"] = "ByT5Tokenizer"


def _named_as_t5(file: WeightFile) -> WeightFile:
    """Its names begin with those of the encoder, as `module.text_tower.encoder.` or with nothing before them."""
    if any(".encoder." in name or name.startswith("encoder.") for name in file.tensors):
        return file
    return WeightFile(
        file.path,
        file.format,
        {f"encoder.{name}": tensor for name, tensor in file.tensors.items()},
        lambda name: file.read(name.removeprefix("encoder.")),
    )
