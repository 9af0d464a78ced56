"""Stored profiles: kept, found, refused with the reason, and used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tuning import call, profile

from reelbatch.cli.options import EngineOptions
from reelbatch.cli.run import plan_of
from reelbatch.device import cache_folder
from reelbatch.loading.hashing import weights_hash
from reelbatch.loading.inspection import inspect
from reelbatch.loading.lora import LoraError
from reelbatch.request import VideoRequest
from reelbatch.tune import profiles


def test_a_profile_is_kept_found_and_replaced(cache: Path, about: profiles.Identity) -> None:
    assert profiles.find(about) == (None, None)
    path = profiles.store(profile(about))
    assert path.is_relative_to(cache)
    assert profiles.find(about).profile.batch_size == 6
    profiles.store(profile(about, batch_size=4, packed_batch_size=4))
    assert profiles.find(about).profile.batch_size == 4
    assert len(profiles.stored()) == 1
    assert profiles.stale(profiles.find(about).profile) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"versions": {"torch": "1.0"}}, "it was measured with torch 1.0, and this is"),
        ({"weights": "0" * 64}, "the model's weights are others now"),
        ({"device": "cuda: another"}, "it is of the device 'cuda: another'"),
        ({"dtype": "bfloat16"}, "it is of bfloat16, and this is float32"),
        ({"shapes": "64×64×9"}, "it is of 64×64×9, and this is 32×32×9"),
        ({"attention": "math"}, "it is of --attention math, and this is auto"),
        ({"loras": (("0" * 64, 1.0),)}, "it was measured with 1 LoRA, and this is with no LoRA"),
    ],
)
def test_a_stale_or_foreign_profile_is_refused_with_the_reason(
    cache: Path, about: profiles.Identity, change: dict, reason: str
) -> None:
    profiles.store(profile(about.model_copy(update=change)))
    found = profiles.find(about)
    assert found.profile is None
    assert reason in found.refused
    size, line, _ = profiles.advice([about], "exact", 8)
    assert size == 8
    assert reason in line
    if "versions" in change or "device" in change:
        kept = profiles.stored()[0][1]
        assert profiles.stale(kept)
        assert profiles.stale(kept, brief=True)
    assert "run `reelbatch tune`" in line


def test_other_models_profiles_are_nothing_to_speak_of(cache: Path, about: profiles.Identity) -> None:
    profiles.store(profile(about.model_copy(update={"model": "another"})))
    assert profiles.find(about) == (None, None)
    assert profiles.advice([about], "exact", 8) == (8, None, "none")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', "\x00", '{"batch_size": 0}'])
def test_a_damaged_profile_is_refused_with_its_name(cache: Path, about: profiles.Identity, text: str) -> None:
    path = profiles.store(profile(about))
    path.write_text(text)
    found = profiles.find(about)
    assert found.profile is None
    assert path.name in found.refused
    assert "is damaged or of another version" in found.refused


def test_a_profile_changes_the_batch_size_and_never_the_isolation(cache: Path, about: profiles.Identity) -> None:
    profiles.store(profile(about))
    size, line, _ = profiles.advice([about], "exact", 8)
    assert size == 2
    assert "packed was faster there (--isolation packed, batch size 6)" in line
    assert profiles.advice([about], "packed", 8)[0] == 6


def test_a_mix_takes_the_smallest_batch_of_its_shapes_if_all_are_known(cache: Path, about: profiles.Identity) -> None:
    parts = [about.model_copy(update={"shapes": shapes}) for shapes in ("32×32×9", "64×64×9")]
    mix = about.model_copy(update={"shapes": "32×32×9 + 64×64×9"})
    profiles.store(profile(parts[0], exact_batch_size=4))
    assert profiles.advice([mix, *parts], "exact", 8)[0] == 8
    profiles.store(profile(parts[1], exact_batch_size=3))
    assert profiles.advice([mix, *parts], "exact", 8)[0] == 3
    profiles.store(profile(mix, exact_batch_size=5))
    assert profiles.advice([mix, *parts], "exact", 8)[0] == 5


def test_other_weights_have_another_hash(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    before = weights_hash(copy)
    assert before == weights_hash(tiny_folder)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_hash(copy) != before


def test_the_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REELBATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder().name == "reelbatch"
    monkeypatch.setenv("REELBATCH_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_profile_of_before_there_was_offload_is_read_and_a_mix_takes_what_fits_all(
    cache: Path, about: profiles.Identity
) -> None:
    path = profiles.store(profile(about))
    old = json.loads(path.read_text(encoding="utf-8"))
    del old["offload"]
    path.write_text(json.dumps(old), encoding="utf-8")
    assert profiles.find(about).profile.offload == "none"
    assert profiles.advice([about], "exact", 8).offload == "none"
    path.write_text(json.dumps(old | {"offload": "layer"}), encoding="utf-8")
    assert "is damaged or of another version (offload:" in profiles.find(about).refused
    parts = [about.model_copy(update={"shapes": shapes}) for shapes in ("32×32×9", "64×64×9")]
    profiles.store(profile(parts[0], exact_batch_size=4))
    profiles.store(profile(parts[1], exact_batch_size=6, offload="block"))
    mix = about.model_copy(update={"shapes": "32×32×9 + 64×64×9"})
    found = profiles.advice([mix, *parts], "exact", 8)
    assert (found.batch_size, found.offload) == (4, "block")


def test_generate_takes_the_tuned_offload_unless_told_otherwise(tiny_folder: Path, here: Path) -> None:
    tuned = profiles.identity(tiny_folder, inspect(tiny_folder).name, "32×32×5", device="cpu")
    profiles.store(profile(tuned, exact_batch_size=2, isolation="exact", offload="block"))
    asked = ("generate", "a cat", "a dog", "--model", tiny_folder, "--device", "cpu", "--frames", "5", "--json")

    def made(out: str, *words: str) -> tuple[set[str], str]:
        result = call(*asked, *words, "--out", out)
        assert result.exit_code == 0, result.output
        return {json.loads(line)["offload"] for line in result.stdout.splitlines()}, result.stderr

    offload, told = made("o1")
    assert offload == {"block"}
    assert "batch size 2, offload block: as tuned" in told
    assert made("o2", "--batch-size", "2")[0] == {"none"}
    offload, told = made("o3", "--offload", "none")
    assert offload == {"none"}
    assert "the stored profile is not used: it was measured with --offload block" in told
    assert made("o4", "--offload", "block", "--batch-size", "1")[0] == {"block"}
    refused = call(*asked, "--offload", "component", "--out", "o5")
    assert "use offload 'block'" in str(refused.exception)


# -- LoRAs -----------------------------------------------------------------------------------------


def test_a_lora_is_part_of_the_identity_by_its_bytes_and_scale(
    cache: Path, about: profiles.Identity, tiny_folder: Path, tmp_path: Path
) -> None:
    first, same, other = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    first.write_bytes(b"one"), same.write_bytes(b"one"), other.write_bytes(b"two")

    def with_loras(*loras: tuple[Path, float]) -> profiles.Identity:
        return profiles.identity(tiny_folder, "tiny", "32×32×9", device="cpu", dtype="float32", loras=loras)

    assert with_loras() == about
    assert "loras" not in about.model_dump_json()  # what a version before wrote, and hashed, stays
    profiles.store(profile(about))
    assert "it was measured with no LoRA, and this is with 1 LoRA" in profiles.find(with_loras((first, 1.0))).refused
    profiles.store(profile(with_loras((first, 1.0), (other, 0.5)), exact_batch_size=3))
    assert profiles.find(about).profile.exact_batch_size == 2
    assert profiles.find(with_loras((other, 0.5), (same, 1.0))).profile.exact_batch_size == 3
    next(path for path, kept in profiles.stored() if not kept.identity.loras).unlink()
    for loras in (((first, 0.9), (other, 0.5)), ((first, 1.0), (first, 0.5))):
        assert "with others, or other scales" in profiles.find(with_loras(*loras)).refused
    with pytest.raises(LoraError, match=r"none\.safetensors: cannot be read"):
        with_loras((tmp_path / "none.safetensors", 1.0))


def test_a_run_with_a_lora_goes_by_no_profile_without_one(tiny_folder: Path, cache: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    lora.write_bytes(b"weights")
    info = inspect(tiny_folder)
    requests = [VideoRequest(prompt=prompt, frames=5).for_model(info.limits) for prompt in ("a cat", "a dog")]
    profiles.store(profile(profiles.identity(tiny_folder, info.name, "32×32×5", device="cpu"), exact_batch_size=3))
    options = EngineOptions(model=str(tiny_folder), device="cpu")
    assert plan_of(options, requests, info).config.max_batch_size == 3
    plan = plan_of(replace(options, lora=[f"{lora}:0.8"]), requests, info)
    assert plan.config.max_batch_size == 8
    assert "it was measured with no LoRA, and this is with 1 LoRA; run `reelbatch tune`" in plan.advice
    with_lora = profiles.identity(tiny_folder, info.name, "32×32×5", device="cpu", loras=[(lora, 0.8)])
    profiles.store(profile(with_lora, exact_batch_size=4))
    assert plan_of(replace(options, lora=[f"{lora}:0.8"]), requests, info).config.max_batch_size == 4
    assert plan_of(options, requests, info).config.max_batch_size == 3


# -- forgetting ------------------------------------------------------------------------------------


def test_forget_removes_what_is_named_and_says_so(cache: Path, about: profiles.Identity, tiny_folder: Path) -> None:
    shapes = ("32×32×9", "64×64×9", "64×64×9 cfg")
    mine = about.model_copy(update={"model": tiny_folder.resolve().name})
    kept = [profiles.store(profile(mine.model_copy(update={"shapes": name}))) for name in shapes]
    foreign = profiles.store(profile(about.model_copy(update={"model": f"{mine.model}-2"})))
    words = ("tune", "--forget", "--model", tiny_folder)
    some = call(*words, "--shape", "64x64x9")
    assert some.exit_code == 0
    assert kept[0].exists() and foreign.exists() and not kept[1].exists() and not kept[2].exists()
    assert "batch size 6, float32, 64×64×9, measured on 2026-11-01" in some.stderr and kept[1].name in some.stderr
    kept[1].write_text("{")
    assert set(json.loads(call(*words, "--json").stdout)) == {str(path) for path in kept[:2]}
    assert foreign.exists() and not kept[0].exists() and not kept[1].exists()
    assert "no profile of" in call(*words).stderr
    with pytest.raises(ValueError, match="give one of them"):
        raise call(*words, "--show").exception
