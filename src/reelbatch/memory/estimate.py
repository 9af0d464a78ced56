from typing import Any


class Estimator:
    def __init__(self, *a: Any): ...
    def step(self, r: Any) -> int:
        return 0

    def decode(self, r: Any) -> int:
        return 0
