"""MemoryLimit: who may join a batch without overrunning what the process may hold, by estimate."""

from __future__ import annotations

from collections.abc import Sequence

from reelbatch.device import OutOfMemory, gibibytes, held_bytes
from reelbatch.engine.planner import Isolation
from reelbatch.loading.model import Model
from reelbatch.loading.skeleton import from_folder
from reelbatch.memory.calibration import Calibration
from reelbatch.memory.estimate import Estimator
from reelbatch.models.family import Phase
from reelbatch.request import VideoRequest


class MemoryLimit:
    """A limit in bytes. It makes requests wait or fail, and never changes how they are done.

    Args:
        calibration: corrects estimates by what was measured on this device, if it was.
    """

    def __init__(self, limit: int, model: Model, isolation: Isolation, calibration: Calibration | None = None) -> None:
        self.limit, self.calibration = limit, calibration
        family = model.family
        if model.offload != "none" or model.precision.int8:  # networks whose weights come and go cannot be traced
            family = from_folder(model.folder, model.precision, model.device)
        self._estimate = Estimator(family, isolation, model.device)
        model.placement.leave()
        self._held = held_bytes(model.device)
        self._visiting: dict[Phase, int] = {
            phase: model.placement.visiting_bytes(phase) for phase in ("step", "decode")
        }

    def admits(self, running: Sequence[VideoRequest], request: VideoRequest) -> bool:
        """Whether a request may join those that run. One that would be alone may: `refusal` says if it cannot."""
        return not running or self._step_bytes([*running, request]) <= self.limit

    def refusal(self, request: VideoRequest) -> OutOfMemory | None:
        """Why a request cannot be made within the limit, even alone."""
        needs = {"a step": self._step_bytes([request]), "decoding": self._decode_bytes(request)}
        what = max(needs, key=lambda name: needs[name])
        if needs[what] <= self.limit:
            return None
        tiles = ", or decode in smaller tiles (vae_tiling)" if what == "decoding" else ""
        return OutOfMemory(
            f"{what} of request {request.id!r} ({request.width}×{request.height}, {request.frames} frames) is "
            f"estimated to need {gibibytes(needs[what])}, of which {gibibytes(self._held)} are held already; the "
            f"memory limit is {gibibytes(self.limit)}. Raise the limit, or make the video smaller or shorter{tiles}."
        )

    def _step_bytes(self, requests: Sequence[VideoRequest]) -> int:
        """Estimated bytes held at the peak of a step; texts count at their longest, as they are not encoded yet."""
        peak = self._estimate.step(requests)
        corrected = peak if self.calibration is None else self.calibration.step.of(peak)
        return self._held + self._visiting["step"] + corrected

    def _decode_bytes(self, request: VideoRequest) -> int:
        peak = self._estimate.decode(request)
        corrected = peak if self.calibration is None else self.calibration.decode.of(peak)
        return self._held + self._visiting["decode"] + corrected
