"""The Diffusers layout of a model folder: its components, and what their files are called."""

from __future__ import annotations

CLASSES = {
    "transformer": ("HunyuanVideoTransformer3DModel",),
    "vae": ("AutoencoderKLHunyuanVideo",),
    "text_encoder": ("LlamaModel",),
    "text_encoder_2": ("CLIPTextModel",),
    "tokenizer": ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""The components of a model folder, and the classes that each may have in model_index.json."""

WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Components with weights, and what their files are called."""


OTHER_SCHEDULES = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
"""Scheduler settings that ask for other sigmas or another step than HunyuanVideo's."""
