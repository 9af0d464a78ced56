"""The outside judge: Diffusers' own HunyuanVideo tests, on Diffusers' classes, on ours, and on repaired pipelines.

    python -m tests.outside.judge --source DIR [--write docs/compatibility.md]

DIR holds Diffusers' source tree (its `tests` folder is not in the wheel). Nothing of it is copied or changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = "REELBATCH_DIFFUSERS_SOURCE"
FILE_TIMEOUT_SECONDS = 1800

TRANSFORMER = "tests/models/transformers/test_models_transformer_hunyuan_video.py"
PIPELINE = "tests/pipelines/hunyuan_video/test_hunyuan_video.py"
IMAGE_TO_VIDEO = "tests/pipelines/hunyuan_video/test_hunyuan_image2video.py"
SKYREELS = "tests/pipelines/hunyuan_video/test_hunyuan_skyreels_image2video.py"
PIPELINE_15 = "tests/pipelines/hunyuan_video1_5/test_hunyuan_1_5.py"
TRANSFORMER_15 = "tests/models/transformers/test_models_transformer_hunyuan_1_5.py"
IMAGE_TO_VIDEO_15 = "image_to_video_15.py"
LORA = "tests/lora/test_lora_layers_hunyuanvideo.py"

FILES = {
    "ours": (
        TRANSFORMER,
        PIPELINE,
        SKYREELS,
        IMAGE_TO_VIDEO,
        LORA,
        TRANSFORMER_15,
        PIPELINE_15,
        IMAGE_TO_VIDEO_15,
    ),
    "repaired": (PIPELINE, LORA, PIPELINE_15, IMAGE_TO_VIDEO_15),
}
"""The test files that meet anything of ours on a side; on Diffusers' side, all of them are run.

The last is a file of this folder: Diffusers tests no image-to-video pipeline of HunyuanVideo 1.5."""

OF_15 = (TRANSFORMER_15, PIPELINE_15, IMAGE_TO_VIDEO_15)

AS_IN_DIFFUSERS = ("-c", "pyproject.toml", "--rootdir", ".", "--confcutdir", str(HERE), "-p", "tests.conftest")
"""Options under which a file of this folder is collected as one of Diffusers' tests, not as one of ours."""

TITLES = {"diffusers": "Diffusers", "ours": "Our transformers", "repaired": "After `reelbatch.repair`"}


@dataclass(frozen=True)
class Known:
    """Tests that pass for Diffusers and not for a side, and why. A pattern that matches none of these is an error."""

    side: str
    tests: str
    why: str


def _on_both_sides(tests: str, why: str) -> tuple[Known, Known]:
    return Known("ours", tests, why), Known("repaired", tests, why)


KNOWN: tuple[Known, ...] = (
    *_on_both_sides(
        "*::test_first_block_cache_*",
        "First-block cache compares residuals averaged over the batch, so a video would depend on its batch-mates: "
        "refused.",
    ),
    *_on_both_sides(
        "*::test_pyramid_attention_broadcast_*",
        "Pyramid attention broadcast is refused with the other step caches: it hooks Diffusers' attention modules.",
    ),
    *_on_both_sides(
        "*::test_faster_cache_*",
        "FasterCache is refused with the other step caches: it hooks Diffusers' attention modules.",
    ),
    *_on_both_sides(
        "*::test_taylorseer_cache_*",
        "TaylorSeer is refused with the other step caches: it extrapolates what Diffusers' blocks return.",
    ),
)


@dataclass
class Run:
    """What became of the tests of one side: outcome ("passed", "failed", "skipped") and reason by test."""

    side: str
    outcome: dict[str, str] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)
    differences: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def counts(self, file: str) -> Counter[str]:
        return Counter(outcome for test, outcome in self.outcome.items() if file_of(test) == file)

    def tests(self, outcome: str) -> list[str]:
        return [test for test, has in self.outcome.items() if has == outcome]


def file_of(test: str) -> str:
    return test.partition("::")[0]


def run(source: Path, side: str, files: Iterable[str]) -> Run:
    """Diffusers' tests of these files, each file in a process of its own.

    Raises:
        RuntimeError: if a process ends without a report, with the end of its output.
    """
    result = Run(side)
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            environment = os.environ | {
                "PYTHONPATH": str(HERE),
                "REELBATCH_JUDGE": side,
                "REELBATCH_JUDGE_REPORT": str(report),
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTEST_ADDOPTS": "",
            }
            command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q", "--tb=no"]
            own = HERE / file
            command += [*AS_IN_DIFFUSERS, str(own)] if own.exists() else [file]
            process = subprocess.run(
                command,
                cwd=source,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=FILE_TIMEOUT_SECONDS,
                check=False,
            )
            if process.returncode > 1 or not report.exists():  # 0: all passed, 1: some failed
                raise RuntimeError(f"{file} could not be run for {side}:\n{process.stdout[-3000:]}")
            record = json.loads(report.read_text(encoding="utf-8"))
        # a file of this folder goes by its name
        tests = {"::".join([file, *test.split("::")[1:]]): entry for test, entry in record["tests"].items()}
        result.outcome |= {test: entry["outcome"] for test, entry in tests.items()}
        result.reason |= {test: entry["reason"] for test, entry in tests.items()}
        result.differences |= record["differences"]
    return result


def run_all(source: Path, sides: Sequence[str] = ("ours", "repaired")) -> dict[str, Run]:
    """Diffusers' side and those named, in this order."""
    files = dict.fromkeys(file for side in sides for file in FILES[side])
    return {"diffusers": run(source, "diffusers", files)} | {side: run(source, side, FILES[side]) for side in sides}


def lost(diffusers: Run, side: Run) -> list[str]:
    """The tests that pass for Diffusers' own classes and not on this side; one that is not there is lost too."""
    files = {file_of(test) for test in side.outcome}
    expected = [test for test in diffusers.tests("passed") if file_of(test) in files]
    return [test for test in expected if side.outcome.get(test) != "passed"]


def won(diffusers: Run, side: Run) -> list[str]:
    return [test for test in side.tests("passed") if diffusers.outcome.get(test) != "passed"]


def unexplained(runs: dict[str, Run], known: Sequence[Known] = KNOWN) -> list[str]:
    """Sentences: every lost test that no `Known` explains, and every `Known` that explains nothing."""
    complaints = []
    used = set()
    for side, result in runs.items():
        for test in lost(runs["diffusers"], result):
            explanations = [entry for entry in known if entry.side == side and fnmatchcase(test, entry.tests)]
            used.update(explanations)
            if not explanations:
                complaints.append(f"{side}: {test} passes for Diffusers: {_first_line(result.reason.get(test, ''))}")
    stale = [entry for entry in known if entry.side in runs and entry not in used]
    return complaints + [f"{entry.side}: no test is lost that matches {entry.tests}" for entry in stale]


# --------------------------------------------------------------------------------------------------
# The page


def page(source: Path, runs: dict[str, Run]) -> str:
    """docs/compatibility.md."""
    diffusers, others = runs["diffusers"], {side: result for side, result in runs.items() if side != "diffusers"}
    version = importlib.metadata.version("diffusers")
    parts = [
        f"""# Diffusers' own tests, on our classes

Diffusers tests its HunyuanVideo models and pipelines. Here the same tests are run three times: on Diffusers' classes,
on our transformers put in the place of Diffusers' classes of the same names, and on Diffusers' pipelines after
`reelbatch.repair`. The classes are those of Diffusers {version}, the tests those of its
{describe(source)}, unchanged. On a CPU: tests that ask for an accelerator are skipped on every
side.

This page is written by `python -m tests.outside.judge`.

## Counts

Passed / failed / skipped. A dash: nothing of ours takes part in that file's tests.
""",
        table(runs),
        "\n## Passes for Diffusers, and not here\n",
        *(lost_list(diffusers, result) for result in others.values()),
        "\n## Passes here, and not for Diffusers\n",
        *(won_list(diffusers, result) for result in others.values()),
        "\n## Fails for Diffusers\n",
        failures(diffusers),
        f"""
## The batch tests

Diffusers skips `test_inference_batch_consistent` and `test_inference_batch_single_identical` for every pipeline of this
family. Here they are run, on every side. The second looks only at the first sample of a batch; so
`test_every_sample_of_a_batch_is_as_alone` is added, which compares each of three prompts of different lengths with the
same request alone, and `test_video_is_that_of_diffusers`, which compares with Diffusers' classes with the same weights.
The tolerance is Diffusers' own, 1e-4, of a video's values in [0, 1]. Largest differences, sample by sample:

{difference_table(runs)}

Where latents are equal and videos are not, the difference is the VAE's, to which the pipeline gives the batch whole.

## What was changed for all sides alike

- The tests take tiny tokenizers and models from the hub. They get stand-ins of the same kinds and widths
  (`tests/outside/hub.py`), so that nothing is downloaded. Hence `test_inference`, whose expected numbers belong to the
  hub's tokenizers, fails for everyone.
- Diffusers has no tests of HunyuanVideo 1.5's image-to-video pipeline. `tests/outside/image_to_video_15.py` puts it
  into the same mixin, with the components of Diffusers' text-to-video tests and an image.
- The two skipped batch tests are run, and the two tests above are added (`tests/outside/added.py`).

## Again

```sh
git clone https://github.com/huggingface/diffusers   # its tests are not in the wheel; take the installed version's tag
git -C diffusers checkout v{version}
.venv/bin/python -m pip install parameterized requests-mock   # what its test modules import besides
.venv/bin/python -m tests.outside.judge --source diffusers --write docs/compatibility.md
{SOURCE}=$PWD/diffusers make test   # the same, as one of our tests
```
""",
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def describe(source: Path) -> str:
    """The commit of a git checkout; otherwise the version that its setup.py names."""
    command = ["git", "-C", str(source), "log", "-1", "--format=%h of %cs"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode == 0:
        return f"commit {process.stdout.strip()}"
    match = re.search(r'version="([^"]+)"', (source / "setup.py").read_text(encoding="utf-8"))
    return f"version {match[1]}" if match else "a source tree of unknown version"


def table(runs: dict[str, Run]) -> str:
    heads = ["Test file", *(TITLES[side] for side in runs)]
    rows = [heads, ["---"] * len(heads)]
    for file in dict.fromkeys(map(file_of, runs["diffusers"].outcome)):
        rows.append([f"`{file.removeprefix('tests/')}`", *(count(result.counts(file)) for result in runs.values())])
    files = dict.fromkeys(map(file_of, runs["diffusers"].outcome))
    for name, of in {
        "HunyuanVideo 1.0": [file for file in files if file not in OF_15],
        "HunyuanVideo 1.5": [file for file in files if file in OF_15],
        "all of these": list(files),
    }.items():
        rows.append([name, *(count(sum(map(result.counts, of), Counter())) for result in runs.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def count(outcomes: Counter[str]) -> str:
    return " / ".join(str(outcomes[name]) for name in ("passed", "failed", "skipped")) if outcomes else "–"


def lost_list(diffusers: Run, side: Run) -> str:
    tests = lost(diffusers, side)
    if not tests:
        return f"{TITLES[side.side]}: none.\n"
    lines = [f"{TITLES[side.side]}:\n"]
    for entry in (entry for entry in KNOWN if entry.side == side.side):
        matching = [test for test in tests if fnmatchcase(test, entry.tests)]
        tests = [test for test in tests if test not in matching]
        if matching:
            name = entry.tests.removeprefix("*::").removesuffix("::*")
            lines.append(f"- `{name}` ({len(matching)}): {entry.why}")
    lines += [f"- `{short(test)}`: {_first_line(side.reason.get(test, 'not collected'))}" for test in tests]
    return "\n".join(lines) + "\n"


def won_list(diffusers: Run, side: Run) -> str:
    tests = won(diffusers, side)
    if not tests:
        return f"{TITLES[side.side]}: none.\n"
    return "\n".join([f"{TITLES[side.side]}:\n", *(f"- `{short(test)}`" for test in tests)]) + "\n"


def failures(diffusers: Run) -> str:
    return "\n".join(f"- `{short(test)}`: {_first_line(diffusers.reason[test])}" for test in diffusers.tests("failed"))


def difference_table(runs: dict[str, Run]) -> str:
    heads = ["Tests", "Compared", *(TITLES[side] for side in runs)]
    rows = [heads, ["---"] * len(heads)]
    compared = {
        (tests, what): None for result in runs.values() for tests, of in result.differences.items() for what in of
    }
    for tests, what in sorted(compared):
        found = [result.differences.get(tests, {}).get(what) for result in runs.values()]
        rows.append(
            [
                f"`{tests}`",
                what,
                *(", ".join(f"{value:.1e}" if value else "0" for value in values or ()) or "–" for values in found),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def short(test: str) -> str:
    return "::".join(test.split("::")[1:]) or test


def _first_line(reason: str) -> str:
    line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return line if len(line) <= 200 else line[:197] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=os.environ.get(SOURCE), help=f"or the variable {SOURCE}")
    parser.add_argument("--sides", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--write", type=Path, help="where the page goes, e.g. docs/compatibility.md")
    arguments = parser.parse_args()
    if arguments.source is None or not (arguments.source / "tests" / "pipelines").is_dir():
        parser.error(f"--source must be a folder with Diffusers' source tree; given: {arguments.source}")
    runs = run_all(arguments.source.resolve(), arguments.sides)
    print(table(runs))
    if arguments.write:
        arguments.write.write_text(page(arguments.source, runs), encoding="utf-8")
    complaints = unexplained(runs, [entry for entry in KNOWN if entry.side in arguments.sides])
    print(*complaints, sep="\n")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
