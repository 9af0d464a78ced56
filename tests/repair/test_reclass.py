"""Classes of networks are exchanged in place, and exchanged back."""

from __future__ import annotations

from types import MethodType

import pytest
import torch

from reelbatch.repairs.fix import CannotRepair
from reelbatch.repairs.reclass import reclass


class Base(torch.nn.Module):
    def forward(self) -> str:
        return "base"


class Derived(Base):
    def forward(self) -> str:
        return "derived"


def test_switches_and_returns():
    module = Base()
    undo = reclass(module, Derived)
    assert type(module) is Derived
    assert module() == "derived"
    undo()
    assert type(module) is Base
    assert vars(module).keys() == vars(Base()).keys()


def test_kept_forward_is_exchanged():
    module = Base()
    module.forward = MethodType(Base.forward, module)
    undo = reclass(module, Derived)
    assert module() == "derived"
    undo()
    assert module.forward == MethodType(Base.forward, module)


def test_refuses_another_class():
    with pytest.raises(CannotRepair, match=r"found a torch.*Linear where Base was expected"):
        reclass(torch.nn.Linear(1, 1), Derived)


def test_refuses_undo_of_what_changed_again():
    class Further(Derived):
        pass

    module = Base()
    undo = reclass(module, Derived)
    later = reclass(module, Further)
    with pytest.raises(CannotRepair, match="undo that first"):
        undo()
    later()
    undo()
    assert type(module) is Base
