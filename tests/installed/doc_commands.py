"""How each command and snippet of README.md and docs/ is run: as it is, with smaller numbers, or why not at all.

A command that stands in the documentation and not here fails the tests, and so does one that stands here alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from documents import CHECKOUT, documents
from story import ANY, SOME, Command, Snippet, Story, videos, write

DEMO = CHECKOUT / "src/reelbatch/demo/model"
CIRCLE, CROSS = "a large red circle moving left on a black background", "small blue cross, up, white"
CIRCLE_FILE = "a-large-red-circle-moving-left-on-a-black-background-seed"
TINY = "height=64, width=64, num_frames=5, num_inference_steps=1"  # of a pipeline
TENSORS = """
import torch
query, key, value = (torch.randn(2, {heads}, 40, 8) for _ in range(3))
mask = torch.ones(2, 40, 40, dtype=torch.bool).tril()
"""
MASKED_PIPELINE = f"""
import reelbatch, torch
from diffusers import HunyuanVideoPipeline
from reelbatch.attention import HeadRules, own_frame
pipe = HunyuanVideoPipeline.from_pretrained({str(DEMO)!r})
reelbatch.repair(pipe)
prompts = [{CIRCLE!r}, {CROSS!r}]
mask = torch.ones(2, 32 + 256, 32 + 256, dtype=torch.bool).tril()
rules_of_first = HeadRules({{0: own_frame}})
"""
SMALL = "--height 64 --width 64 --frames 5 --steps 2"

NOT_RUN = {
    "make test": "needs the checkout: it runs these tests",
    "make machine": "needs the checkout, and a quiet machine",
    "REELBATCH_DIFFUSERS_SOURCE=$PWD/diffusers make test": "needs the checkout and a clone of Diffusers",
    "git clone https://github.com/huggingface/diffusers": "needs the network",
    "git -C diffusers checkout v0.42.1": "needs a clone of Diffusers",
    ".venv/bin/python -m pip install parameterized requests-mock": "needs a package index",
    ".venv/bin/python -m tests.outside.judge --source diffusers --write docs/compatibility.md": "needs the checkout "
    "and a clone of Diffusers",
    "python -m tests.outside.judge": "needs the checkout and a clone of Diffusers",
    "accelerate launch --num_processes 4 -m reelbatch train style.yaml": "needs four GPUs; two processes on the CPU "
    "are run below",
    "accelerate launch --num_processes 4 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "-m reelbatch train style.yaml": "needs four GPUs; two processes on the CPU are run below",
    "accelerate launch --cpu": "is named as what does not do",
    'pip install "reelbatch[gguf]"': "needs a package index",
    "python tests/tiny15.py FOLDER": "needs the checkout: its tests run it",
}
"""Command -> why it cannot be run from an installed package, on any machine."""

CHECKOUT_PROGRAMS = {
    "python benchmarks/vs_diffusers.py --dtype fp32 --budget 0.2",
    "python benchmarks/real_limit.py",
    "python benchmarks/lora_new_word.py",
    "python benchmarks/kills.py",
    "python benchmarks/interrupts.py",
    "python benchmarks/masks.py",
    "python benchmarks/train_precision.py",
}
"""Programs of the checkout, of minutes to hours: of these `--help` is run, with the installed package."""


JOB = "reelbatch job run suite.txt --out suite --copies 5 --seed 0"
VBENCH = {"vbench/videos/*.mp4": 30, **{name: 1 for name in videos(0, "vbench") if "*" not in name}}
BLOCKS = (CHECKOUT / "docs/memory.md").read_text(encoding="utf-8").split("\n\n")
CARDS, CARDS_15 = (block.splitlines() for block in BLOCKS if block.startswith("| card"))
CACHE = "~/.cache/reelbatch/encoded/*.safetensors"
ENCODED = {CACHE: SOME}


def demo_folder(folder: Path) -> None:
    (folder / "models").mkdir()
    shutil.copytree(DEMO, folder / "models/HunyuanVideo")


def suite(folder: Path) -> None:
    (folder / "suite.txt").write_text(f"{CIRCLE}\n{CROSS}\n")


def checkout_of_make(folder: Path) -> None:
    """What `make demo` reads; its environment counts as set up."""
    shutil.copy(CHECKOUT / "Makefile", folder)
    shutil.copytree(CHECKOUT / "examples", folder / "examples")


def draw_masks(folder: Path) -> None:
    (folder / "docs/masks").mkdir(parents=True)
    shutil.copy(CHECKOUT / "docs/draw_masks.py", folder / "docs")


def vbench(folder: Path) -> None:
    rows = [
        {"prompt_en": CIRCLE, "dimension": ["temporal_flickering"]},
        {"prompt_en": CROSS, "dimension": ["scene"]},
    ]
    (folder / "VBench_full_info.json").write_text(json.dumps(rows))


def damage(folder: Path) -> None:
    path = folder / f"suite/{CIRCLE_FILE}1.mp4"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def folder_in_the_place_of_a_video(folder: Path) -> None:
    for path in (folder / "suite").glob(f"{CIRCLE_FILE}0.*"):
        path.unlink()
    write(f"suite/{CIRCLE_FILE}0.mp4/mine.txt", "not of the job")(folder)


def model_with_an_image(folder: Path) -> None:
    """HunyuanVideo 1.5 with random weights, which makes small videos where no size is given."""
    import tiny15

    tiny15.make_folder(folder / "model")
    (folder / "dog.png").write_bytes(tiny15.picture(64, 40))


def clips(folder: Path) -> None:
    """Clips of the bundled model's little world, with captions; one more is in a list."""
    for to, count in (("clips", "8"), ("more", "1")):
        command = [sys.executable, "-m", "reelbatch.demo.shapes", "--out", to, "--clips", count, "--seed", str(len(to))]
        subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(CHECKOUT / "src")}, check=True)
    (folder / "more/metadata.jsonl").rename(folder / "more/list.jsonl")


def settings_of_the_page(folder: Path) -> None:
    """docs/training.md's settings, of a small run of the bundled model."""
    (page,) = (page for page in documents() if page.name == "docs/training.md")
    (text,) = (text for language, text in page.blocks if language == "yaml")
    for old, new in {
        "model: /models/HunyuanVideo": "model: demo",
        "validation_share: 0.05": "validation_share: 0.25",
        "batch_tokens: 60000": "batch_tokens: 400",
        "steps: 4000": "steps: 2",
        "sample_every: 500": "sample_every: 2",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "style.yaml").write_text(text)
    (folder / "prompts.txt").write_text(f"{CIRCLE}\n")


def trained(folder: str, step: int, weights: str = "lora.safetensors", resumed: bool = False) -> dict[str, int]:
    """What a training leaves in `folder`; one that goes on replaces the other files."""
    last = {f"{folder}/checkpoints/step-{step:07}/*": SOME, f"{folder}/tensorboard/*": SOME}
    return (
        last
        if resumed
        else last
        | {f"{folder}/{name}": 1 for name in ("config.yaml", "metrics.csv", "loss.png")}
        | {f"{folder}/{weights}": SOME}
    )


STORIES = [
    Story("doctor", [Command("reelbatch doctor", says=["attention rules: own-frame"])], fast=True),
    Story(
        "videos of a prompt file, and one of them again",
        [
            write("prompts.jsonl", json.dumps({"prompt": CIRCLE, "width": 96}) + "\n"),
            Command(
                "reelbatch generate --prompts prompts.jsonl --copies 5 --steps 20 --out out",
                {"--copies 5 --steps 20": "--copies 2 --steps 2"},
                leaves=videos(2),
            ),
            Command("reelbatch generate --again FILE.mp4", {"FILE": f"out/{CIRCLE_FILE}1"}, says=["bit for bit"]),
        ],
    ),
    Story(
        "installing, clips and a help",
        [
            Command(
                'pip install "reelbatch[parquet]"',
                {"install": "install --quiet --no-index --no-deps --find-links $DIST --target here"},
                leaves={
                    "here/reelbatch/*": SOME,
                    "here/reelbatch-*.dist-info/*": SOME,
                    "here/bin/reelbatch": 1,
                    "~/*": ANY,
                },
            ),
            Command(
                "python -m reelbatch.demo.shapes --out clips",
                more="--clips 8",
                leaves={"clips/*.mp4": 8, "clips/metadata.jsonl": 1},
            ),
            Command("reelbatch train --help", says=["--data", "--resume"]),
        ],
        fast=True,
    ),
    Story(
        "a suite",
        [
            suite,
            Command("reelbatch job run suite.txt --copies 5 --out suite", more=SMALL, leaves=videos(10, "suite")),
            Command("reelbatch job export suite rows.csv", leaves={"rows.csv": 1}, says=["10 rows in rows.csv"]),
        ],
        fast=True,
    ),
    Story(
        "make demo",
        [
            checkout_of_make,
            Command("make demo", {"make": "make -o .venv/.installed BIN=$SITE/bin"}, leaves=videos(6, "out/demo")),
        ],
    ),
    Story(
        "README: the command line",
        [
            suite,
            demo_folder,
            Command(f'reelbatch generate "{CIRCLE}" "{CROSS}"', leaves=videos(2)),
            Command(
                'reelbatch generate "a cat, in detail" --prompt-2 "a cat"',
                leaves={"out/a-cat-in-detail-seed0.*": 2},
                says=["does not know cat"],
            ),
            Command(
                "reelbatch generate --model /models/HunyuanVideo --device cuda --batch-size 4 --prompts suite.txt",
                {"/models": "models", "cuda": "cpu"},
                leaves={"out/*-seed0-2.mp4": 2, "out/*-seed0-2.json": 2},  # of another model than those there
            ),
            Command("reelbatch model-info /models/HunyuanVideo", {"/models": "models"}, says=["transformer", "vae"]),
            lambda folder: shutil.copy(
                folder / "models/HunyuanVideo/transformer/diffusion_pytorch_model.safetensors",
                folder / "hunyuan_video.safetensors",
            ),
            Command(
                "reelbatch model-info hunyuan_video.safetensors", says=["HunyuanVideo 1.0", "--as NAME"], exit_code=1
            ),
            Command(
                "reelbatch convert hunyuan_video.safetensors /models/converted --as t2v --rest /models/HunyuanVideo",
                {"/models": "models"},
                leaves={"models/converted/**": SOME},
                says=["written and checked", "done: models/converted"],
            ),
            Command(
                f'reelbatch generate --attention-rule own-frame "{CIRCLE}"',
                leaves={"out/a-large-red-circle-*.mp4": 1, "out/a-large-red-circle-*.json": 1},
            ),
            Command("reelbatch --install-completion", leaves={"~/*": SOME}),
        ],
    ),
    Story(
        "what is used by later commands, in the cache",
        [
            Command(
                "reelbatch tune",
                exit_code=[0, 1],  # 1: the machine is too busy for an advice
                leaves={
                    "out/tune/tune.html": 1,
                    "out/tune/tune.json": 1,
                    "out/tune/*.png": SOME,
                    "~/.cache/reelbatch/profiles/*.json": ANY,  # with exit code 0
                },
            ),
            Command("reelbatch plan --calibrate", leaves={"~/.cache/reelbatch/calibrations/*.json": 1}),
        ],
    ),
    Story(
        "plans for other cards",
        [
            Command(
                "reelbatch plan --height 720 --width 1280 --frames 129 --model hunyuanvideo-13b --on h100",
                says=["1280×720, 129 frames", "h100", "should fit"],
            ),
            Command("reelbatch plan --on rtx4090", says=["rtx4090", "should fit"]),
            Command("reelbatch plan --cards", says=CARDS),
            Command("reelbatch plan --cards --model hunyuanvideo-1.5", says=CARDS_15),
            Command("reelbatch plan --help", says=["hunyuanvideo-1.5", "skyreels-v1-i2v"]),
        ],
    ),
    Story(
        "README: training",
        [
            clips,
            write("lora.yaml", "steps: 2\n"),
            Command("reelbatch train lora.yaml --data clips", leaves=trained("out/train", 2) | ENCODED),
            Command(
                "reelbatch generate --lora",
                more=f'out/train/lora.safetensors "{CIRCLE}" --out styled {SMALL}',
                leaves=videos(1, "styled"),
            ),
            lambda folder: shutil.copytree(DEMO.parent, folder / "src/reelbatch/demo"),
            Command(
                "reelbatch train src/reelbatch/demo/train.yaml",
                more="--data clips --steps 2 --batch-size 2 --sample-every 2 --out full",
                leaves=trained("full", 2, "model/*") | {"full/samples/*.png": 1, CACHE: ANY},
            ),
        ],
    ),
    Story(
        "docs/training.md",
        [
            clips,
            Command(
                "reelbatch train --data clips --out out/style",
                more="--steps 2",
                leaves=trained("out/style", 2) | ENCODED,
            ),
            demo_folder,
            Command(
                'reelbatch generate "a robot in the rain" --model /models/HunyuanVideo '
                "--lora out/style/lora.safetensors:0.8",
                {"/models": "models"},
                leaves=videos(1),
                says=["`reelbatch model-info models/HunyuanVideo` says what it draws"],
            ),
            lambda folder: shutil.copy(folder / "out/style/lora.safetensors", folder / "a.safetensors"),
            Command("reelbatch convert-lora a.safetensors b.safetensors --names kohya", leaves={"b.safetensors": 1}),
            settings_of_the_page,
            Command(
                "reelbatch train style.yaml --rank 32 --steps 4000",
                {"4000": "2"},
                leaves=trained("out/train", 2) | ENCODED | {"out/train/samples/*.png": 1},
            ),
            Command(
                "reelbatch train style.yaml --resume auto",
                more="--rank 32 --steps 3",
                leaves=trained("out/train", 3, resumed=True) | {"out/train/samples/*.png": SOME},
            ),
        ],
    ),
    Story(
        "docs/training.md: many devices",
        [
            clips,
            write("style.yaml", "data: clips\nsteps: 2\n"),
            Command(
                "accelerate launch --multi_gpu --num_processes 2 -m reelbatch train style.yaml --device cpu",
                more="--out ddp",
                leaves=trained("ddp", 2) | ENCODED,
            ),
            Command(
                "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 -m reelbatch train style.yaml "
                "--device cpu",
                more="--out fsdp",
                leaves=trained("fsdp", 2),
            ),
            Command(
                "torchrun --nproc-per-node 2 -m reelbatch train style.yaml --device cpu",
                more="--out torchrun",
                leaves=trained("torchrun", 2),
            ),
        ],
    ),
    Story(
        "docs/jobs.md",
        [
            suite,
            Command(JOB, more="--steps 4", says=["10 of 10 videos in suite"], leaves=videos(10, "suite")),
            folder_in_the_place_of_a_video,
            Command(
                JOB,
                more="--steps 4",
                exit_code=1,
                says=["failed: suite/", "9 of 10 videos in suite"],
                leaves={"suite/contact-sheet-2.png": ANY},  # the first one shows a name that is still there
            ),
            Command("reelbatch job status suite --watch", stop_at=r"failed +1", exit_code=130),
            lambda folder: (folder / f"suite/{CIRCLE_FILE}0.mp4").rename(folder / "mine"),
            Command("reelbatch job retry suite --failed", says=["1 videos are in line again"]),
            Command(JOB, more="--steps 4", says=["10 of 10"], leaves={f"suite/{CIRCLE_FILE}0.*": 2}),
            damage,
            Command(
                "reelbatch job verify suite --make-again",
                exit_code=1,
                says=["1 of 10 videos were wrong"],
                leaves={f"suite/damaged/{CIRCLE_FILE}1.mp4": 1},
                removes=[f"suite/{CIRCLE_FILE}1.mp4", f"suite/{CIRCLE_FILE}1.json"],
            ),
            Command(JOB, more="--steps 4", says=["10 of 10"], leaves={f"suite/{CIRCLE_FILE}1.*": 2}),
            Command("reelbatch job report suite", says=["suite/report.html", "suite/contact-sheet.png"]),
            write(
                "suite.csv", 'prompt,tags\n"small green square, down, black",animal\n"small blue star, up, white",\n'
            ),
            Command("reelbatch job run suite.csv --only tag=animal --limit 20 --dry-run", says=["1 video"]),
            Command(
                "reelbatch job run --add",
                {"run": "run suite.csv"},
                more="--out suite",
                leaves={"suite/small-green-square-*": 2, "suite/small-blue-star-*": 2},
            ),
            Command("reelbatch generate --again out/a-cat-seed0.mp4", {"out/a-cat-": f"suite/{CIRCLE_FILE[:-4]}"}),
        ],
    ),
    Story(
        "docs/jobs.md: VBench",
        [
            vbench,
            Command("reelbatch job run VBench_full_info.json --out vbench --naming vbench", more=SMALL, leaves=VBENCH),
            lambda folder: (folder / "vbench").rename(folder / "first"),
            write(
                "rewritten.txt", "a big red disc that moves left, on black\na little blue cross that rises on white\n"
            ),
            Command(
                "reelbatch job run rewritten.txt --named-after VBench_full_info.json --out vbench --naming vbench",
                more=SMALL,
                leaves=VBENCH,
            ),
        ],
    ),
    Story(
        "other modules",
        [
            Command(
                "python -m reelbatch.demo.evaluate",
                more="--prompts 2 --steps 2",
                says=["of all attributes of 2 clips read back as asked"],
            ),
            Command("python -m reelbatch.demo.train --help", says=["Stage 1", "export"]),
        ],
    ),
    Story(
        "docs/masks.md: pictures",
        [draw_masks, Command("python docs/draw_masks.py", leaves={"docs/masks/*.png": 9})],
    ),
    Story(
        "README: HunyuanVideo 1.5",
        [
            model_with_an_image,
            Snippet(
                'VideoRequest(prompt="the dog runs", image="dog.png")',
                {
                    "/models/HunyuanVideo-1.5-Diffusers-480p_i2v": "model",
                    'image="dog.png"': 'image="dog.png", width=48, height=32',
                    "width=848, height=480": "width=32, height=48",
                },
                leaves={"out/*.mp4": 2, "out/*.json": 2},
            ),
        ],
    ),
    Story(
        "README: from Python",
        [
            Snippet(
                "reelbatch.repair(pipe)",
                {"[6.0, 4.5]": f"[6.0, 4.5], {TINY}"},
                before=f"import reelbatch\nfrom diffusers import HunyuanVideoPipeline\nfolder = {str(DEMO)!r}",
            ),
            Snippet(
                'VideoRequest\n\nengine = Engine.from_pretrained("demo")', leaves={"out/*.mp4": 2, "out/*.json": 2}
            ),
            Snippet("from reelbatch.engine.config import EngineConfig", says=["Progress(", "Worked("]),
        ],
    ),
    Story(
        "docs/masks.md: from Python",
        [
            Snippet(
                "out = attention(query, key, value, mask)",
                before=TENSORS.format(heads=3),
                after="assert out.shape == query.shape",
            ),
            Snippet(
                'mask, axes="BQK")', before=f"from reelbatch.attention import attention\n{TENSORS.format(heads=2)}"
            ),
            Snippet(
                "pipe(prompts, attention_kwargs",
                {"(prompts,": f"(prompts, {TINY},", "range(0, 12)": "range(0, 2)"},
                before=MASKED_PIPELINE,
            ),
            Snippet("rules = HeadRules("),
            Snippet('register_rule("near-frames"', leaves={"near-frames.mp4": 1, "near-frames.json": 1}),
        ],
    ),
]
