"""Identity: what a stored measurement holds for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Identity(BaseModel):
    """All that a measurement depends on.

    Attributes:
        shapes: in words, as `tune.workload.shape_class` gives them.
        loras: SHA-256 of each LoRA file and its scale, in order of the hashes. Left out of JSON where there is none, as
            in files of versions that did not know it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights: str
    device: str
    dtype: str
    attention: str
    versions: dict[str, str]
    shapes: str
    loras: tuple[tuple[str, float], ...] = ()

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if not self.loras:
            del values["loras"]
        return values

    def differences(self, other: Identity) -> list[str]:
        """What sets a stored identity (`self`) apart from the one asked for (`other`), in words."""
        differences = []
        if self.model != other.model:
            differences.append(f"it is of the model {self.model}, and this is {other.model}")
        if self.shapes != other.shapes:
            differences.append(f"it is of {self.shapes}, and this is {other.shapes}")
        if self.device != other.device:
            differences.append(f"it is of the device {self.device!r}, and this is {other.device!r}")
        if self.dtype != other.dtype:
            differences.append(f"it is of {self.dtype}, and this is {other.dtype}")
        if self.attention != other.attention:
            differences.append(f"it is of --attention {self.attention}, and this is {other.attention}")
        if self.loras != other.loras:
            differences.append(_different_loras(len(self.loras), len(other.loras)))
        if self.weights != other.weights:
            differences.append("the model's weights are others now")
        for name in sorted({*self.versions, *other.versions}):
            then, now = (side.versions.get(name, "none") for side in (self, other))
            if then != now:
                differences.append(f"it was measured with {name} {then}, and this is {now}")
        return differences


def _different_loras(then: int, now: int) -> str:
    counts = [f"{count} LoRA{'s' if count > 1 else ''}" if count else "no LoRA" for count in (then, now)]
    others = "another one, or another scale" if now == 1 else "others, or other scales"
    return f"it was measured with {counts[0]}, and this is with {others if then == now else counts[1]}"
