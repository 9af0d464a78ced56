"""File names: no two videos share one, every file system takes them, and VBench's scorer finds what it looks for."""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reelbatch.jobs import naming as module
from reelbatch.jobs.naming import MAX_STEM_BYTES, Naming, ascii_stem, file_stem, name_all, vbench_problems
from reelbatch.jobs.prompts import make_requests, named_after, read_entries
from reelbatch.request import SEED_LIMIT, VideoRequest
from reelbatch.video import sidecar

VBENCH = Path(__file__).parents[1] / "shared" / "data" / "vbench"
if not VBENCH.exists():
    VBENCH = Path(__file__).parents[2] / "shared" / "data" / "vbench"
NAMINGS: tuple[Naming, ...] = ("default", "ascii", "vbench")


def asked(*prompts: str, seed: int = 0) -> list[VideoRequest]:
    return [VideoRequest(prompt=prompt, seed=seed) for prompt in prompts]


def caseless(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).upper().casefold())


AWKWARD = [
    *(
        "con",
        "CON.",
        "nul.txt",
        "a/b",
        "a_b",
        "A/B",
        "..",
        ".",
        "/",
        "\n",
        "x-0",
        "x",
        "X",
        "x-1",
        "a. ",
        "~",
        "*?",
    ),
    *("x" * 300, "X" * 300, "é" * 200, "e\u0301" * 90, "🎬" * 70, "\u202eright to left", "Straße", "STRASSE", "İ", "ſ"),
]
letters = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)
awkward = st.sampled_from([prompt for prompt in AWKWARD if prompt.strip()])
prompts = st.lists(awkward | letters.filter(str.strip), max_size=12)


def check(found: list[str], requests: list[VideoRequest], taken: list[str], folder: Path) -> None:
    assert len(found) == len(requests)
    for name in found:
        assert name.endswith(".mp4")
        assert "/" not in name and "\0" not in name and name not in (".mp4", "..mp4")
        path = folder / name
        assert len(name.encode()) <= 255 and len(sidecar(path).name.encode()) <= 255
        path.write_bytes(b"")
        sidecar(path).write_bytes(b"")
    assert len(list(folder.iterdir())) == 2 * len(found)


@settings(deadline=None)
@given(prompts=prompts, naming=st.sampled_from(NAMINGS), reserve=st.booleans())
@example(prompts=["a/b", "a_b"], naming="vbench", reserve=False)
@example(prompts=["a cat", "A CAT"], naming="vbench", reserve=True)
def test_any_prompts_get_names_of_their_own_that_can_be_written(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], naming: Naming, reserve: bool
) -> None:
    requests = asked(*prompts)
    taken = [name.swapcase() for name in name_all(requests[::2], naming)] if reserve else []
    found = name_all(requests, naming, taken, ignore_case=True)
    keys = [caseless(name) for name in found]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(map(caseless, taken))
    assert found == name_all(list(requests), naming, tuple(taken), ignore_case=True)
    check(found, requests, taken, tmp_path_factory.mktemp("names"))


@settings(deadline=None)
@given(prompts=prompts)
def test_vbench_names_hold_the_prompt_and_count_its_videos_from_0(prompts: list[str]) -> None:
    requests = asked(*prompts)
    found = name_all(requests, "vbench", ignore_case=False)
    assert len(set(found)) == len(found)
    seen: Counter[str] = Counter()
    for prompt, name in zip(prompts, found, strict=True):
        if not set(prompt) & set("/\0") and len(prompt.encode()) <= 246:
            assert name == f"{prompt}-{seen[prompt]}.mp4"
        seen[prompt] += 1


SEEDS = st.integers(0, SEED_LIMIT - 1)
RESERVED = set('/\\:*?"<>| .')


@given(letters.filter(str.strip), SEEDS)
def test_ascii_names_are_plain_on_every_system(prompt: str, seed: int) -> None:
    stem = ascii_stem(VideoRequest(prompt=prompt, seed=seed))
    assert stem.isascii() and stem == stem.lower()
    assert len(stem) <= 90
    assert not set(stem) & RESERVED
    assert stem.endswith(f"-seed{seed}")  # so it is never con, nul or aux either


@given(awkward | letters.filter(str.strip), SEEDS)
@example("\u3164\u115f", 0)  # letters that nobody sees
@example("- \u0308\u0308x\u20dd\u0308", 0)  # marks on nothing
@example("e\u0301" * 100, 0)
@example("x" + "\u0308" * 200, 0)
def test_default_names_can_be_written_and_seen_on_every_system(prompt: str, seed: int) -> None:
    stem = file_stem(VideoRequest(prompt=prompt, seed=seed))
    assert stem.endswith(f"-seed{seed}")
    assert not set(stem) & RESERVED
    words = stem.removesuffix(f"-seed{seed}")
    assert regex.fullmatch(r"([\p{L}\p{N}][\p{L}\p{N}\p{Mn}\p{Mc}-]*)?", words)
    assert not regex.search(r"\p{Default_Ignorable_Code_Point}|-\p{M}", words)
    assert unicodedata.is_normalized("NFC", stem) and len(f"{stem}-999999".encode()) <= MAX_STEM_BYTES
    if prompt.isascii() and all(len(word) <= 32 for word in regex.split("[^a-zA-Z0-9]+", prompt)):
        assert stem == ascii_stem(VideoRequest(prompt=prompt, seed=seed))  # as it always was


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("一只猫在海滩上", "一只猫在海滩上-seed0.mp4"),
        ("Кот на ПЛЯЖЕ!", "кот-на-пляже-seed0.mp4"),
        ("Cafe\u0301 am Meer", "café-am-meer-seed0.mp4"),
        ("می\u200cخواهم", "می-خواهم-seed0.mp4"),
        ("हिन्दी में बिल्ली", "हिन्दी-में-बिल्ली-seed0.mp4"),
        ("\u202egnp.mp4 \u200bcat", "gnp-mp4-cat-seed0.mp4"),
        ("🎬 ✨", "video-seed0.mp4"),
        ("猫" * 300, "猫" * 64 + "-seed0.mp4"),
        ("😺 " + "𠀀" * 300, "𠀀" * 54 + "-seed0.mp4"),
        ("क्षि" * 40, "क्षि" * 16 + "-seed0.mp4"),
        ("हि" * 31 + "aक्षि", "हि" * 31 + "a-seed0.mp4"),
    ],
)
def test_default_names_keep_letters_of_any_script(prompt: str, name: str) -> None:
    assert name_all(asked(prompt), "default") == [name]
    assert name_all(asked(prompt), "ascii")[0].isascii()


def test_names_that_a_file_system_holds_to_be_one_are_numbered() -> None:
    found = name_all(asked("Straße", "STRASSE", "\u0131", "I", "\u212a", "k", "シ", "ジ", "シ\u3099"), "default")
    assert found == [
        *("straße-seed0.mp4", "strasse-seed0-2.mp4", "\u0131-seed0.mp4", "i-seed0-2.mp4"),
        *("k-seed0.mp4", "k-seed0-2.mp4", "シ-seed0.mp4", "ジ-seed0.mp4", "ジ-seed0-2.mp4"),
    ]


def test_a_stem_is_taken_by_a_video_of_any_format_and_by_a_sidecar() -> None:
    there = ["a-cat-seed0.mp4", "A-CAT-seed0-2.GIF", "a-cat-seed0-3", "a-cat-seed0-4.json", "a-cat-seed0-5.txt"]
    assert name_all(asked("a cat"), "default", there, ending=".webm") == ["a-cat-seed0-5.webm"]
    assert name_all(asked("a cat", "a cat"), "default", ending="") == ["a-cat-seed0", "a-cat-seed0-2"]
    assert name_all(asked("v1.5"), "vbench", ["v1.5-0"], ending=".gif") == ["v1.5-1.gif"]


def test_default_names_number_what_reads_alike() -> None:
    assert name_all(asked("a cat", "A CAT!", "a dog", "a/cat", seed=7), "default", ["a-CAT-seed7-2.MP4"]) == [
        "a-cat-seed7.mp4",
        "a-cat-seed7-3.mp4",
        "a-dog-seed7.mp4",
        "a-cat-seed7-4.mp4",
    ]


def test_vbench_numbers_on_through_prompts_listed_twice() -> None:
    copies = asked(*["a cat"] * 5, *["a dog"] * 2, *["a cat"] * 5)
    assert name_all(copies, "vbench") == [
        *(f"a cat-{i}.mp4" for i in range(5)),
        *(f"a dog-{i}.mp4" for i in range(2)),
        *(f"a cat-{i}.mp4" for i in range(5, 10)),
    ]
    assert name_all(asked("a cat"), "vbench", ["a cat-0.mp4", "a cat-1.mp4"]) == ["a cat-2.mp4"]


def test_a_prompt_that_is_altered_takes_no_name_from_one_that_reads_so() -> None:
    assert name_all(asked("a/b", "a_b"), "vbench") == ["a_b-1.mp4", "a_b-0.mp4"]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_prompts_that_differ_in_case_share_no_file_where_case_is_ignored(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    requests = asked("A cat", "a cat", "Caf\u00e9", "Cafe\u0301")
    kept = platform == "linux"
    assert name_all(requests, "vbench") == [
        "A cat-0.mp4",
        "a cat-0.mp4" if kept else "a cat-1.mp4",
        "Caf\u00e9-0.mp4",
        "Cafe\u0301-0.mp4" if kept else "Cafe\u0301-1.mp4",
    ]


def test_long_prompts_are_cut_between_letters_and_kept_apart() -> None:
    found = name_all(asked("é" * 200, "é" * 201, "x" * 248, "y" * 249), "vbench")
    assert found == ["é" * 124 + "-0.mp4", "é" * 124 + "-1.mp4", "x" * 248 + "-0.mp4", "y" * 248 + "-0.mp4"]
    many = name_all(asked(*["z" * 248] * 12), "vbench")
    assert many[9:] == ["z" * 248 + "-9.mp4", "z" * 247 + "-10.mp4", "z" * 247 + "-11.mp4"]


def test_many_copies_do_not_take_the_square_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(name: str) -> str:
        nonlocal calls
        calls += 1
        return name

    monkeypatch.setattr(module, "_caseless", counted)
    assert len(set(name_all(asked("a cat") * 2000, "default"))) == 2000
    assert calls < 10_000


def test_a_name_stands_in_for_the_prompt() -> None:
    requests = [VideoRequest(prompt="a cat. Realistic", name="A/cat", seed=3), VideoRequest(prompt="a dog", seed=4)]
    assert name_all(requests, "vbench") == ["A_cat-0.mp4", "a dog-0.mp4"]
    assert name_all(requests, "default") == name_all(requests, "ascii") == ["a-cat-seed3.mp4", "a-dog-seed4.mp4"]
    (problem,) = vbench_problems(requests)
    assert problem.startswith("'A/cat': no file name can hold '/'")


def test_another_naming_is_refused() -> None:
    with pytest.raises(ValueError, match="naming='flat' must be 'default', 'ascii' or 'vbench'"):
        name_all(asked("a cat"), "flat")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a/b", r"no file name can hold '/'; it becomes _, and VBench's scorer will not find it"),
        (
            "x" * 249,
            "is too long for a file name (249 bytes); its end is cut off, and VBench's scorer will not find it",
        ),
        ("what? a <cat>", "no file name on Windows can hold '?' or '<' or '>'"),
        ("a\ncat", r"no file name on Windows can hold '\n'"),
        ("Nul. A film", "no file name on Windows can begin like this, with the name of a device"),
    ],
)
def test_what_a_file_name_cannot_hold_is_told_once(prompt: str, told: str) -> None:
    (problem,) = vbench_problems(asked(prompt, "a cat, con", "nullity. con.", prompt))
    assert problem.endswith(told)
    assert problem.isprintable()


@pytest.mark.parametrize("rewritten", [False, True])
def test_the_real_suite_gets_the_names_that_its_scorer_reads(tmp_path: Path, rewritten: bool) -> None:
    if not VBENCH.exists():
        pytest.skip("needs VBench's all_dimension.txt")
    listed = [line for line in (VBENCH / "all_dimension.txt").read_text().splitlines() if line.strip()]
    entries = read_entries(VBENCH / "all_dimension.txt")
    if rewritten:
        entries = named_after(read_entries(VBENCH / "hunyuan_all_dimension.txt"), VBENCH / "all_dimension.txt")
    requests = make_requests(entries, {"copies": 5}, first_seed=0)
    names = name_all(requests, "vbench", ignore_case=False)
    assert len(set(names)) == len(names) == 946 * 5
    for prompt in listed:  # what the scorer does
        for i in range(5):
            assert f"{prompt.strip()}-{i}.mp4" in names
    (problem,) = vbench_problems(requests)
    assert problem.startswith("'A fantasy landscape': differs from an earlier prompt only in case")
    check(names[:500], requests[:500], [], tmp_path)
    without_case = name_all(requests, "vbench", ignore_case=True)
    assert sum(name not in set(names) for name in without_case) == 5
