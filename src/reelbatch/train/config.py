"""TrainConfig: what a training run is asked for, from a YAML file and from flags, checked once, at the door."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from reelbatch.wording import shown

WHAT = "What is trained"
DATA = "What it is trained on"
LEARNING = "How it learns"
LOSS = "What the loss is"
MACHINE = "Precision, memory and devices"
OUTPUT = "What comes out"

OptimizerName = Literal[
    "adamw", "adafactor", "adamw-8bit", "adamw-8bit-paged", "adamw-8bit-torchao", "adamw-4bit-torchao"
]
ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]


class ConfigError(ValueError):
    """A config that cannot be used; a line for each fault: what was given, what is expected."""


def _in(panel: str, help: str, default: Any = ..., **bounds: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel}, **bounds)


class TrainConfig(BaseModel):
    """One training run. Every field is a key of the config file and, with dashes for underscores, a flag.

    Lengths in frames, sizes in pixels, rates in frames a second; steps are optimizer steps. `ConfigError` says what is
    wrong (`make_config`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = _in(WHAT, "demo, a folder in the Diffusers layout, or a hub id.", "demo")
    method: Literal["lora", "full"] = _in(WHAT, "lora: small matrices beside the weights. full: the weights.", "lora")
    weights: Literal["model", "untrained"] = _in(
        WHAT, "Where full training starts: the model's weights, or untrained ones of its architecture.", "model"
    )
    rank: int = _in(WHAT, "Rank of the LoRA.", 16, ge=1)
    alpha: float | None = _in(
        WHAT, "LoRA's alpha: it acts with alpha / rank. As large as the rank if not given.", None, gt=0
    )
    targets: tuple[str, ...] = _in(
        WHAT,
        "Layers that get a LoRA: attention, mlp, modulation, refiner, embedders, or ends of layer names as "
        "attn.to_q; a list.",
        ("attention", "mlp"),
    )
    lora_dropout: float = _in(WHAT, "Dropout before the LoRA.", 0.0, ge=0, lt=1)
    rslora: bool = _in(WHAT, "Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).", False)
    dora: bool = _in(WHAT, "Learn magnitude and direction apart (DoRA, arXiv 2402.09353).", False)
    lora_init: Literal["default", "gaussian", "orthogonal"] = _in(
        WHAT, "How the LoRA starts (PEFT's names).", "default"
    )

    data: tuple[Path, ...] = _in(
        DATA,
        "Folders of videos and images with captions, or .jsonl/.csv files that list them; a list.",
        (),
    )
    validation: tuple[Path, ...] = _in(DATA, "The same, for the validation loss; never trained on.", ())
    validation_share: float = _in(DATA, "Share of the data held out for the validation loss.", 0.0, ge=0, lt=1)
    fps: float | None = _in(DATA, "Frame rate that videos are brought to; the model's own if not given.", None, gt=0)
    max_frames: int | None = _in(
        DATA,
        "Longer clips are cut to so many frames (then to 4k + 1); the model's own length if not given.",
        None,
        ge=1,
    )
    max_pixels: int | None = _in(
        DATA,
        "Larger pictures are scaled to so many pixels, width × height; the model's own size if not given.",
        None,
        ge=1,
    )
    caption_dropout: float = _in(DATA, "Share of samples that are shown without their caption.", 0.1, ge=0, le=1)
    image_dropout: float = _in(
        DATA,
        "Share of clips that an image-to-video model is shown without their first frame as the image. Of no account to "
        "other models, and to images: they never have one.",
        0.1,
        ge=0,
        le=1,
    )
    cache: Path | None = _in(DATA, "Folder for encoded clips; REELBATCH_CACHE or the user's cache if not given.", None)

    steps: int = _in(LEARNING, "Optimizer steps in all.", 1000, ge=1)
    batch_tokens: int | None = _in(LEARNING, "Transformer rows in a pack, at most.", None, ge=1)
    batch_size: int | None = _in(LEARNING, "Samples in a pack, at most; 4 if neither is given.", None, ge=1)
    accumulate: int = _in(LEARNING, "Packs of each device that make a step.", 1, ge=1)
    learning_rate: float = _in(LEARNING, "At its highest.", 1e-4, gt=0)
    schedule: ScheduleName = _in(LEARNING, "How the learning rate goes.", "constant_with_warmup")
    warmup_steps: int = _in(LEARNING, "Steps in which the learning rate rises.", 0, ge=0)
    min_lr_share: float = _in(LEARNING, "Where cosine_with_min_lr ends, as a share of the rate.", 0.01, ge=0, le=1)
    optimizer: OptimizerName = _in(
        LEARNING, "The -8bit and -paged ones are of bitsandbytes, the -torchao ones of torchao.", "adamw"
    )
    betas: tuple[float, float] = _in(LEARNING, "AdamW's decay rates.", (0.9, 0.99))
    weight_decay: float = _in(LEARNING, "AdamW's.", 0.01, ge=0)
    max_grad_norm: float = _in(LEARNING, "Longer gradients are clipped to it; 0 never clips.", 1.0, ge=0)
    ema_decay: float | None = _in(LEARNING, "Average the weights (EMA), as 0.999; off if not given.", None, gt=0, lt=1)
    seed: int = _in(LEARNING, "Of everything that is drawn.", 0, ge=0)

    timesteps: Literal["uniform", "logit-normal"] = _in(
        LOSS, "How noise levels are drawn, one a sample (logit-normal: arXiv 2403.03206, section 3.1).", "uniform"
    )
    logit_mean: float = _in(LOSS, "Of logit-normal.", 0.0)
    logit_std: float = _in(LOSS, "Of logit-normal.", 1.0, gt=0)
    flow_shift: float | None = _in(
        LOSS, "Shift of the drawn levels towards noise; the model's if not given.", None, gt=0
    )
    shift_by_size: bool = _in(
        LOSS, "Shift each sample by its own size: flow_shift × sqrt(its tokens / those of the model's own size).", False
    )
    guidance: float = _in(LOSS, "Embedded guidance that the model is given while training.", 1.0, ge=0)
    guidance_max: float | None = _in(LOSS, "Draw the guidance between --guidance and this, one a sample.", None, ge=0)
    weigh: Literal["samples", "tokens"] = _in(
        LOSS, "What counts the same in the loss: samples, or their tokens.", "samples"
    )

    device: Literal["auto", "cpu", "cuda"] = _in(MACHINE, "auto is a GPU where there is one.", "auto")
    mixed_precision: Literal["no", "bf16", "fp16"] = _in(
        MACHINE, "What is computed in (fp16: with loss scaling).", "no"
    )
    base_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = _in(
        MACHINE, "What frozen weights are kept in under a LoRA; auto is that of mixed_precision.", "auto"
    )
    gradient_checkpointing: bool = _in(MACHINE, "Compute activations twice instead of keeping them.", False)
    attention: str = _in(MACHINE, "Attention kernel: auto, or a name that `doctor` shows.", "auto")

    out: Path = _in(OUTPUT, "Folder of the run.", Path("out/train"))
    save_dtype: Literal["float32", "bfloat16", "float16"] = _in(OUTPUT, "Dtype of the saved weights.", "float32")
    save_every: int = _in(OUTPUT, "Steps between checkpoints; 0: at the end alone.", 500, ge=0)
    keep: int = _in(OUTPUT, "Checkpoints that are kept.", 2, ge=1)
    resume: str | None = _in(OUTPUT, "A checkpoint's folder, or auto for the last one of --out.", None)
    log_every: int = _in(OUTPUT, "Steps between rows of metrics.csv.", 10, ge=1)
    sample_every: int = _in(OUTPUT, "Steps between contact sheets of --sample-prompts; 0: none.", 0, ge=0)
    sample_prompts: tuple[str, ...] = _in(
        OUTPUT, "Prompts, or prompt files (.txt, .jsonl, .csv) as `generate` takes them; a list.", ()
    )
    validate_every: int = _in(OUTPUT, "Steps between validation losses; 0: at the end alone.", 100, ge=0)

    @model_validator(mode="after")
    def _fit_together(self) -> TrainConfig:
        faults = []
        if self.weights == "untrained" and self.method == "lora":
            faults.append("weights=untrained needs method=full: a LoRA beside untrained weights learns nothing of use")
        if self.base_dtype != "auto" and self.method == "full":
            faults.append(f"base_dtype={self.base_dtype} is of frozen weights, and method=full freezes none; remove it")
        if self.guidance_max is not None and self.guidance_max < self.guidance:
            faults.append(f"guidance_max={self.guidance_max} is below guidance={self.guidance}; give a larger one")
        if self.sample_every and not self.sample_prompts:
            faults.append("sample_every is given without sample_prompts; say what to make")
        if not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"betas={self.betas} must be two numbers from 0 to below 1, as 0.9 and 0.99")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def dump(self) -> str:
        """As a config file that gives this config again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


FIELDS = tuple(TrainConfig.model_fields)


def read_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config in a YAML file (none: all defaults), with `overrides` in the place of what the file says.

    Raises:
        ConfigError: for a file that cannot be read and for every field that is unknown or has a value that is none of
            its kind.
    """
    fields: dict[str, Any] = {}
    name = "flags"
    if path is not None:
        path = Path(path)
        name = path.name
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a YAML config file") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
        if content is not None and not isinstance(content, dict):
            raise ConfigError(f"{path}: holds a {type(content).__name__}; expected lines as `learning_rate: 1e-4`")
        fields = {str(key).replace("-", "_"): value for key, value in (content or {}).items()}
    return make_config(fields | dict(overrides or {}), name)


def make_config(fields: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """A checked config; `where` names the source in messages. Raises ConfigError."""
    several = {"data", "validation", "targets", "sample_prompts"}
    listed = {name: [v] if name in several and isinstance(v, str | Path) else v for name, v in fields.items()}
    try:
        return TrainConfig.model_validate(listed)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_fault(details)}" for details in error.errors())) from None


def _fault(details: ErrorDetails) -> str:
    if not details["loc"]:
        return str(details.get("ctx", {}).get("error", details["msg"])).replace("\n", "; ")
    field = str(details["loc"][0])
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, FIELDS, n=1)
        return f"{field}: no such field; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}")
    reason = details["msg"][0].lower() + details["msg"][1:]
    if details["type"] == "literal_error":
        annotation = TrainConfig.model_fields[field].annotation
        near = difflib.get_close_matches(str(details["input"]), [str(value) for value in get_args(annotation)], n=1)
        reason += f"; did you mean {near[0]}?" if near else ""
    return f"{field}={shown(details['input'])}: {reason}"
