"""`reelbatch train`: the config and its flags, a run from the command line, on two processes, and stopped by Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import clips
import pytest
import tiny15
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from typer.testing import CliRunner

from reelbatch.cli import app
from reelbatch.train import loop, optimizers
from reelbatch.train.config import FIELDS, ConfigError, make_config, read_config
from reelbatch.train.report import read_metrics

# The config -------------------------------------------------------------------------------------------------------


def test_flags_override_the_file_and_the_dump_gives_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 1e-3\nrank: 8\ndata: clips\nbetas: [0.9, 0.95]\nsample_prompts: [a cat, a dog]\n")
    config = read_config(file, {"rank": 4})
    assert (config.learning_rate, config.rank, config.data, config.betas) == (1e-3, 4, (Path("clips"),), (0.9, 0.95))
    file.write_text(config.dump())
    assert read_config(file) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learing_rate: 1", "run.yaml: learing_rate: no such field; did you mean learning_rate?"),
        ("rank: 0", "run.yaml: rank=0: input should be greater than or equal to 1"),
        ("rank: many", "rank='many': input should be a valid integer"),
        ("schedule: cosin", "schedule='cosin': input should be 'constant'"),
        ("schedule: cosin", "did you mean cosine?"),
        ("weights: untrained", "weights=untrained needs method=full"),
        ("sample_every: 5", "sample_every is given without sample_prompts"),
        ("[1, 2]", "holds a list; expected lines as `learning_rate: 1e-4`"),
        ("a: b: c", "is no YAML"),
    ],
)
def test_what_is_wrong_with_a_config_is_told(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert said in str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"rank": 0, "stepps": 1, "fps": -1})
    assert len(str(caught.value).splitlines()) == 3


def test_the_help_has_a_flag_for_every_field_with_its_default() -> None:
    told = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}, color=False).output
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in told
    assert "[default: constant_with_warmup]" in told


def test_an_optimizer_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw-8bit", ("no_such_package.optim", "AdamW8bit", "bitsandbytes"))
    with pytest.raises(
        ConfigError, match=r"is of bitsandbytes, which is not installed here .* pip install bitsandbytes"
    ):
        optimizers.make_optimizer(make_config({"optimizer": "adamw-8bit"}), [torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])  # torchao's compile for a while
def test_the_optimizers_that_are_here_step(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = optimizers.make_optimizer(make_config({"optimizer": name, "learning_rate": 0.1}), [parameter])
    parameter.square().sum().backward()
    optimizer.step()
    assert parameter.detach().abs().mean() < 0.95


# From the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write_folder(tmp_path_factory.mktemp("clips"))


def flags(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    told = f"--model {model} --data {data} --out {out} --device cpu --rank 2 --learning-rate 1e-2 --log-every 1"
    return ["train", *told.split(), "--steps", "3", "--batch-size", "2", *more]


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_later(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.Run.step

    def interrupted(self: loop.Run, *args: Any) -> loop.Outcome:
        if self.position.step == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(loop.Run, "step", interrupted)
    stopped = CliRunner().invoke(app, flags(tiny_folder, data, tmp_path))
    assert stopped.exit_code == 130
    assert "stopped at step 2; the same command with --resume auto goes on" in stopped.output
    monkeypatch.setattr(loop.Run, "step", real)
    done = CliRunner().invoke(app, flags(tiny_folder, data, tmp_path, "--resume", "auto"))
    assert done.exit_code == 0 and "after 3 steps" in done.output
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == ["1", "2", "3"]


TWO = """
import os, sys
import reelbatch.cli, reelbatch.train.loop
from reelbatch.train.devices import forget_precision
import torch.distributed as group
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(child == 0))
starts = [i for i, word in enumerate(sys.argv) if word == "train"]
commands = [sys.argv[i:j] for i, j in zip(starts, [*starts[1:], None])]
ddp, fsdp = commands[:2], commands[2:]
code = 1
try:
    for command in ddp:
        assert not reelbatch.cli.app(command, standalone_mode=False)
    group.destroy_process_group()
    forget_precision()
    os.environ["MASTER_PORT"] = os.environ["OTHER_PORT"]  # one may still find the first group's store
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    for command in fsdp:
        assert not reelbatch.cli.app(command, standalone_mode=False)
    code = 0
finally:
    if child:
        code = code or os.waitpid(child, 0)[1]
    sys.stderr.flush()
    if code:
        import traceback
        traceback.print_exc()
    os._exit(code)
"""


def test_two_processes_do_what_one_does_on_the_same_batch(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """DDP with a LoRA, and with all weights of a network whose samples may lack what others have (HunyuanVideo 1.5),
    then FSDP with all weights: as one process that accumulates two packs."""
    share, full = ["--validation-share", "0.2"], ["--method", "full"]
    ways = {"ddp": share, "ddp15": [*share, *full, "--image-dropout", "0.5"], "fsdp": [*share, *full]}
    models = dict.fromkeys(ways, tiny_folder) | {"ddp15": tiny15.make_folder(tmp_path / "tiny15")}
    resume = ["--resume", str(tmp_path / "fsdp" / "checkpoints" / "step-0000002")]
    for name, more in ways.items():
        command = flags(models[name], data, tmp_path / f"{name}-alone", "--accumulate", "2", *more)
        one = CliRunner().invoke(app, command)
        assert one.exit_code == 0, one.output
    commands = [word for name, more in ways.items() for word in flags(models[name], data, tmp_path / name, *more)]
    # FSDP again, from its checkpoint of the second step
    commands[-1:] = [*commands[-1:], "--save-every", "2"]
    commands += [*flags(tiny_folder, data, tmp_path / "fsdp", *ways["fsdp"]), *resume]
    # what torchrun and accelerate's launcher do, with one import for all
    with socket.socket() as one_free, socket.socket() as other_free:
        ports = []
        for free in (one_free, other_free):
            free.bind(("localhost", 0))
            ports.append(str(free.getsockname()[1]))
    environment = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "WORLD_SIZE": "2"}
    environment |= {"MASTER_PORT": ports[0], "OTHER_PORT": ports[1]}
    two = subprocess.run(
        [sys.executable, "-c", TWO, *commands],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("checkpoint: ") == 5, two.stderr  # the main process speaks for both, once a checkpoint
    assert two.stderr.count("resumed at step 2 from") == 1
    for way in ways:
        theirs, ours = (read_metrics(tmp_path / name / "metrics.csv") for name in (way, f"{way}-alone"))
        assert len(theirs) == len(ours) == 3
        for row, expected in zip(theirs, ours, strict=True):
            for name in ("loss", "gradient_norm", "samples", "tokens"):
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-5)
        assert float(theirs[-1]["validation_loss"]) == pytest.approx(float(ours[-1]["validation_loss"]), rel=1e-5)
        weights = [load_file(written(tmp_path / name)) for name in (way, f"{way}-alone")]
        assert weights[0].keys() == weights[1].keys()
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)
    # under FSDP each process held half of the numbers, and wrote them into its checkpoint
    folder = tmp_path / "fsdp" / "checkpoints" / "step-0000003" / "sharded"
    saved = HuggingFaceStorageReader(str(folder)).read_metadata()
    held: Counter[str] = Counter()
    for name, tensor in saved.state_dict_metadata.items():
        if not name.startswith("network."):
            continue
        for chunk in tensor.chunks:
            file = saved.storage_data[MetadataIndex(name, chunk.offsets)].relative_path
            held[file] += chunk.sizes.numel()
    numbers = sum(tensor.numel() for tensor in weights[0].values())
    assert sum(held.values()) == numbers and list(held.values()) == pytest.approx([numbers / 2] * 2, rel=0.01)


def written(out: Path) -> Path:
    """The weights that a run has written."""
    lora = out / "lora.safetensors"
    return lora if lora.is_file() else out / "model" / "transformer" / "diffusion_pytorch_model.safetensors"


def test_a_lora_is_converted_from_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)},
        tmp_path / "a.safetensors",
    )
    arguments = ["convert-lora", str(tmp_path / "a.safetensors"), str(tmp_path / "k.safetensors"), "--names", "kohya"]
    found = CliRunner().invoke(app, [*arguments, "--model", str(tiny_folder)])
    assert found.exit_code == 0, found.output
    kohya = load_file(tmp_path / "k.safetensors")
    assert kohya["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (96, 2)
