"""Identity: what a stored measurement holds for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Identity(BaseModel):
    """All that a measurement depends on. shapes: in words, as `tune.workload.shape_class` gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights: str
    device: str
    dtype: str
    attention: str
    versions: dict[str, str]
    shapes: str

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
        if self.weights != other.weights:
            differences.append("the model's weights are others now")
        for name in sorted({*self.versions, *other.versions}):
            then, now = (side.versions.get(name, "none") for side in (self, other))
            if then != now:
                differences.append(f"it was measured with {name} {then}, and this is {now}")
        return differences
