"""Cases of `fuzz.py`: files and requests with something broken in each, and what is a right result of them."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from reelbatch.jobs.prompts import PromptError, read_prompts
from reelbatch.loading.configs import CODE_ENTRIES
from reelbatch.loading.hub import ModelFolderError
from reelbatch.loading.hunyuan_video import NETWORKS
from reelbatch.loading.inspection import inspect
from reelbatch.loading.load import load
from reelbatch.loading.lora import LoraError, load_loras, parse_lora
from reelbatch.request import FIELDS, RequestError, VideoRequest

Case = Callable[[random.Random], str]
"""Runs one case; returns "right" or "refused", and raises whatever else happens."""


class Wrong(AssertionError):
    """A result that is not what was given."""


class Planted:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


# What values are replaced by -----------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def hostile(draw: random.Random) -> Any:
    """A value that no entry expects."""
    values: list[Callable[[], Any]] = [
        lambda: draw.choice([None, True, False, [], {}, "", [None], {"a": {}}, [[1]], [1, "a"]]),
        lambda: draw.choice([-5, -1, 0, 1, 2, 3, 7, 64, 2**31, 2**63, 10**9, 10**18, 10**401, -(10**401)]),
        lambda: draw.choice([0.5, -0.5, 1e308, -1e308, math.nan, math.inf, 1e-320, 2.0]),
        lambda: draw.choice(["a", "{}", "{:>999999999}", "{0.__class__}", "%s", "\ud800", "\0", "\x1b[31m", "../../x"]),
        lambda: draw.choice(
            ["eager", "kernels-community/flash-attn", "os.system", "float8", "LlamaModel", "x" * 300_000]
        ),
        lambda: draw.choice(["(a+)+$" + "a" * 40, "(.*.*.*)*x", "^(([a-z])+.)+[A-Z]([a-z])+$", "word " * 300_000]),
        lambda: nested(draw.choice([3, 60, 70, 900])),
        lambda: [0] * draw.choice([10, 100_000]),
        lambda: {str(i): i for i in range(draw.choice([10, 50_000]))},
    ]
    return draw.choice(values)()


def to_json(value: Any) -> bytes:
    """JSON, of any depth and with numbers of any length."""
    old, digits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(old)
        sys.set_int_max_str_digits(digits)


def change(value: Any, draw: random.Random) -> Any:
    """A JSON value with one place of it changed: replaced, left out, or with something added beside it."""
    value = copy.deepcopy(value)
    place, key = value, None
    while isinstance(place, dict | list) and place:
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]
    if key is None or not isinstance(place, dict | list):
        return hostile(draw)
    kind = draw.random()
    if kind < 0.2:
        del place[key]
    elif kind < 0.4 and isinstance(place, dict):
        code = [True, "os.system", "kernels-community/flash-attn", {"quant_method": "bitsandbytes"}]
        name = draw.choice([*CODE_ENTRIES, "num_layers", "shift", "r", "megatron_core", "prompt", "frames", "x"])
        place[name] = draw.choice([hostile(draw), draw.choice(code)])
    elif isinstance(place[key], int) and kind < 0.6:
        place[key] += draw.choice([-1, 1, 10, 1000, 10**6])
    else:
        place[key] = hostile(draw)
    return value


def change_bytes(data: bytes, draw: random.Random, planted: bytes) -> bytes:
    """Bytes of a file with some of them changed, cut off, or all replaced."""
    kind = draw.randrange(7)
    if kind == 0:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 1:
        return draw.choice(
            [b"", planted, planted, draw.randbytes(200), b"[" * 100_000, b"null", b"\x89PNG\r\n\x1a\n" + data]
        )
    if kind == 2:
        begin = draw.randrange(len(data) + 1)
        return data[:begin] + draw.randbytes(draw.choice([1, 8, 500])) + data[begin:]
    if kind == 3 and len(data) > 1:
        begin, end = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
        return data[:begin] + data[end:]
    changed = bytearray(data)
    for _ in range(draw.choice([1, 3, 50]) if changed else 0):
        changed[draw.randrange(min(len(changed), draw.choice([64, 4096, len(changed)])))] = draw.randrange(256)
    return bytes(changed)


def change_safetensors(data: bytes, draw: random.Random, planted: bytes) -> bytes:
    """A safetensors file whose header, length or bytes are changed."""
    length = int.from_bytes(data[:8], "little")
    kind = draw.random()
    if kind < 0.3:
        return change_bytes(data, draw, planted)
    if kind < 0.4:
        return struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 2**32, 2**62])) + data[8:]
    header = to_json(change(json.loads(data[8 : 8 + length]), draw))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


# Cases ---------------------------------------------------------------------------------------------------------------


class Models:
    """Model folders with one file changed, taken away, or added."""

    def __init__(self, folder: Path, work: Path, planted: bytes) -> None:
        self.folder = Path(shutil.copytree(folder, work / "model"))
        self.planted = planted
        self.files = {path: path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def __call__(self, draw: random.Random) -> str:
        path = draw.choice([*self.files, *(path for path in self.files if path.suffix == ".json")])
        added = self._change(path, draw)
        try:
            return self._look()
        finally:
            for other in (path, added):
                if other is not None and other.is_dir() and not other.is_symlink():
                    shutil.rmtree(other)
                elif other is not None:
                    other.unlink(missing_ok=True)
            path.write_bytes(self.files[path])

    def _change(self, path: Path, draw: random.Random) -> Path | None:
        data = self.files[path]
        kind = draw.random()
        if kind < 0.05:
            path.unlink()
            if draw.random() < 0.5:
                path.mkdir()
            elif draw.random() < 0.5:
                path.symlink_to(path.name)
            return None
        if kind < 0.12:
            names = (
                "pytorch_model.bin",
                "diffusion_pytorch_model.bin",
                "adapter_config.json",
                "model.pt",
                "x.incomplete",
            )
            added = path.parent / draw.choice([*names, f"{path.name}.index.json"])
            index = {"weight_map": {"x": draw.choice(["../x.safetensors", "/etc/passwd", 3, "a.bin", "a.safetensors"])}}
            added.write_bytes(draw.choice([self.planted, to_json(index)]))
            if draw.random() < 0.3:
                path.unlink()
            return added
        if path.suffix == ".safetensors":
            path.write_bytes(change_safetensors(data, draw, self.planted))
        elif path.suffix == ".json" and kind < 0.85:
            path.write_bytes(to_json(change(json.loads(data), draw)))
        else:
            path.write_bytes(change_bytes(data, draw, self.planted))
        return None

    def _look(self) -> str:
        try:
            info = inspect(self.folder)
            info.verdict("cpu")
            model = load(self.folder, "cpu", "float32")
        except ModelFolderError as error:
            check_message(error, self.folder)
            return "refused"
        family: Any = model.family
        text = family.text
        loaded: dict[str, nn.Module] = dict(
            zip(NETWORKS, (family.transformer, family.decoder.vae, text.llama, text.clip), strict=True)
        )
        for name, network in loaded.items():
            (file,) = (self.folder / name).glob("*.safetensors")
            check_weights(network.state_dict(), load_file(file), f"{name} of {self.folder}")
        with contextlib.suppress(ValueError):  # a template without a token is said of the prompt
            text.encode("a cat")
        return "right"


class Loras:
    """LoRA files of a network: changed metadata, names, shapes, dtypes and values."""

    def __init__(self, network: nn.Module, work: Path, planted: bytes) -> None:
        self.network, self.path, self.planted = network, work / "lora.safetensors", planted
        draw = torch.Generator().manual_seed(0)
        linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        self.layers = {name: linear[name] for name in list(linear)[::7]}
        self.weights: dict[str, Tensor] = {}
        for name, module in self.layers.items():
            self.weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=draw)
            self.weights[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=draw)
        self.config: dict[str, Any] = {
            "transformer.r": 2,
            "transformer.lora_alpha": 3.0,
            "transformer.rank_pattern": {},
            "transformer.alpha_pattern": {f"^{name}": 1.0 for name in list(self.layers)[:2]},
            "transformer.target_modules": list(self.layers),
            "transformer.use_dora": False,
            "transformer.init_lora_weights": True,
            "transformer.megatron_core": "megatron.core",
        }

    def __call__(self, draw: random.Random) -> str:
        scale = 1.0
        kind = draw.random()
        weights, config = dict(self.weights), to_json(self.config)
        if kind < 0.4:
            config = to_json(change(self.config, draw)) if kind < 0.35 else change_bytes(config, draw, self.planted)
        elif kind < 0.7:
            self._change_weights(weights, draw)
        metadata = {"format": "pt", "lora_adapter_metadata": config.decode("utf-8", "replace")}
        data = save(weights, metadata if draw.random() < 0.8 else None)
        if kind > 0.7:
            data = change_safetensors(data, draw, self.planted)
        self.path.write_bytes(data)
        try:
            if draw.random() < 0.1:
                _, scale = parse_lora(
                    f"{self.path}:{draw.choice(['nan', 'inf', '1e999', '-1e300', '0.5', '1_0', '', 'x'])}"
                )
            load_loras(self.network, [(self.path, scale)])  # type: ignore[arg-type]
        except LoraError as error:
            check_message(error, self.path)
            if any(".lora_" in name for name, _ in self.network.named_modules()):
                raise Wrong("a refused LoRA has changed the network") from None
            return "refused"
        own = self.network.state_dict()
        given = {
            re.sub(r"\.(weight|bias)$", r".lora_0.\1", re.sub(r"^(transformer|diffusion_model)\.", "", name)): tensor
            for name, tensor in load_file(self.path).items()
        }
        if all(".lora_A." in name or ".lora_B." in name for name in given):
            check_weights({name: own[name] for name in given if name in own}, given, "the LoRA")
        self.network.unload_lora()  # type: ignore[operator]
        return "right"

    def _change_weights(self, weights: dict[str, Tensor], draw: random.Random) -> None:
        name = draw.choice(list(weights))
        layer = name.rpartition(".lora_")[0]
        tensor = weights.pop(name)
        changes: list[Callable[[], tuple[str, Tensor]]] = [
            lambda: (name, tensor.clone().fill_(draw.choice([math.nan, math.inf, -math.inf, 3e38]))),
            lambda: (name, tensor[:0].clone()),
            lambda: (name, tensor.flatten().clone()),
            lambda: (name, tensor.t().contiguous()),
            lambda: (
                name,
                tensor.to(draw.choice([torch.int8, torch.int64, torch.bool, torch.float64, torch.bfloat16])),
            ),
            lambda: (name, torch.tensor(1.0)),
            lambda: (name.replace("transformer.", draw.choice(["", "lora_unet_", "x.", "diffusion_model."])), tensor),
            lambda: (draw.choice(["x", "", "a" * 100_000, "double_blocks.0.img_attn_qkv.lora_A.weight"]), tensor),
            lambda: (f"{layer}.lora_magnitude_vector", torch.full((len(tensor),), draw.choice([1.0, math.nan]))),
            lambda: (f"{layer}.lora_B.bias", torch.full((len(tensor),), draw.choice([1.0, math.inf]))),
            lambda: (f"{layer}.alpha", torch.full((draw.choice([0, 1, 2]),), draw.choice([1.0, math.nan, 0.0]))),
        ]
        if draw.random() < 0.5:
            weights[name] = tensor
        changed, value = draw.choice(changes)()
        weights[changed] = value.contiguous().clone()


PROMPTS = {
    ".txt": b"a cat\n# no\na dog\n",
    ".jsonl": b'{"prompt": "a cat", "seed": 3, "tags": ["a"], "frames": 9}\n"a dog"\n{"prompt": "x", "copies": 2}\n',
    ".json": b'["a cat", {"prompt": "a dog", "height": 64}, {"prompt_en": "x", "dimension": ["a"]}]',
    ".csv": b"prompt,seed,tags,frames\na cat,3,a;b,9\na dog,,,\n",
    ".tsv": b"prompt\tguidance\na cat\t3.5\n",
    ".parquet": b"PAR1",
}


class Prompts:
    """Prompt files of every form."""

    def __init__(self, work: Path, planted: bytes) -> None:
        self.work, self.planted, self.files = work, planted, dict(PROMPTS)
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            return
        pq.write_table(pa.table({"prompt": ["a cat", "a dog"], "seed": [1, 2]}), work / "a.parquet")
        self.files[".parquet"] = (work / "a.parquet").read_bytes()

    def __call__(self, draw: random.Random) -> str:
        suffix = draw.choice(list(self.files))
        data = self.files[suffix]
        kind = draw.random()
        if kind < 0.5 and suffix in (".json", ".jsonl"):
            value = {"prompt": "a cat", "seed": 3, "tags": ["a"], "frames": 9, "copies": 1, "guidance": 1.5}
            changed = to_json(change(value, draw))
            data = b"[" + changed + b', "a dog"]' if suffix == ".json" else changed + b"\n" + data
        elif kind < 0.3 and suffix in (".csv", ".tsv"):
            name = draw.choice([*FIELDS, "copies", "x", ""])
            cell = draw.choice(["", "nan", "9" * 401, "5.0", "-1", '"'])
            columns = draw.choice([1, 3, 200_000 if draw.random() < 0.05 else 30])
            data = f"prompt,{','.join([name] * columns)}\na,{','.join([cell] * columns)}\n".encode()
        else:
            data = change_bytes(data, draw, self.planted)
        path = self.work / f"prompts{suffix}"
        path.write_bytes(data)
        try:
            requests = read_prompts(path)
        except PromptError as error:
            if len(str(error)) > 30_000 or path.name not in str(error):
                raise Wrong(f"an unclear message: {str(error)[:200]!r}") from None
            str(error).encode()
            return "refused"
        for request in requests:
            if VideoRequest(**json.loads(request.model_dump_json())) != request:
                raise Wrong(f"{request} is another one when it is read again")
        return "right"


def one_request(draw: random.Random) -> str:
    """A request of random fields."""
    good = {"prompt": "a cat", "seed": 5, "height": 64, "width": 64, "frames": 9, "steps": 3, "guidance": 2.0}
    fields: dict[str, Any] = {name: value for name, value in good.items() if draw.random() < 0.7}
    for _ in range(draw.choice([0, 1, 1, 2])):
        name = draw.choice([*FIELDS, *FIELDS, "x", "\ud800", "lenght", "self", "x" * 10_000])
        fields[name] = hostile(draw)
    try:
        request = VideoRequest(**fields)
    except RequestError as error:
        if len(str(error)) > 20_000 or not all(problem.message for problem in error.problems):
            raise Wrong(f"an unclear message: {str(error)[:200]!r}") from None
        return "refused"
    for name, value in fields.items():
        own = getattr(request, name)
        if own != (tuple(value) if name == "tags" else value):
            raise Wrong(f"{name} is {own!r} and was {value!r}")
    if VideoRequest(**json.loads(request.model_dump_json())) != request:
        raise Wrong("the request is another one when it is read again")
    return "right"


def check_message(error: Exception, path: Path) -> None:
    """An error names the file, in a few lines of printable text."""
    text = str(error)
    if str(path) not in text or len(text) > 20_000 or not all(line.isprintable() for line in text.splitlines()):
        raise Wrong(f"an unclear message: {text[:300]!r}")


def check_weights(own: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    if own.keys() != given.keys():
        raise Wrong(f"{where} has {sorted(own.keys() ^ given.keys())[:3]} in one of file and network")
    for name, tensor in given.items():
        if not torch.equal(own[name].nan_to_num(), tensor.to(own[name].dtype).nan_to_num()):
            raise Wrong(f"{name} of {where} is not what the file holds")
