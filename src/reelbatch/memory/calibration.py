from typing import Any


class Calibration: ...


def find(*a: Any) -> Any:
    return None
