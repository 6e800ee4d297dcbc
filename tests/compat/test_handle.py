"""What a drop-in changes and takes back: attributes, functions by name, methods, classes of live modules."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
from torch import nn

from pygen.compat.handle import Changes, Handle, Patch


class Base:
    def forward(self, x: int) -> str:
        return f"base {self.part(x)}"

    def part(self, x: int) -> str:
        return f"part {x}"


class Own(Base):
    """Overrides what the replacement does not call."""

    def part(self, x: int) -> str:
        return f"own {x}"


class Extended(Base):
    """Overrides the replaced method itself, and calls it."""

    def forward(self, x: int) -> str:
        return f"extended {super().forward(x)}"


class Unchanged(Base):
    def __init__(self) -> None:
        self.note = "nothing of Base's is overridden"


def double(x: int) -> int:
    return 2 * x


# Out of reach of a patch, which finds the name `double` in this module too.
ORIGINAL = (double,)


def fast_double(x: int) -> int:
    return NotImplemented if x < 0 else 2000 * x


def fast_forward(self: Base, x: int) -> str:
    return NotImplemented if x < 0 else f"fast {x}"


@pytest.fixture
def user() -> types.ModuleType:
    """A module of somebody who imported the function by name, and under another one."""
    module = types.ModuleType("somebody")
    module.double = module.twice = ORIGINAL[0]
    sys.modules["somebody"] = module
    yield module
    del sys.modules["somebody"]


def test_function_is_replaced_wherever_it_was_imported_by_name(user):
    changes = Changes()
    changes.function(double, fast_double)
    assert user.double(1) == user.twice(1) == 2000
    assert user.double is user.twice
    (replaced,) = changes.replaced
    assert {"somebody.double", "somebody.twice"} <= set(replaced.places)
    assert replaced.count == len(replaced.places)
    changes.undo()
    assert user.double is user.twice is ORIGINAL[0]


def test_replacement_passes_a_call_on(user):
    changes = Changes()
    changes.function(double, fast_double)
    assert user.double(-1) == -2
    changes.undo()


def test_reference_that_outlives_the_patch_is_the_original(user):
    changes = Changes()
    changes.function(double, fast_double)
    held = user.double
    changes.undo()
    assert held(1) == 2


def test_stand_in_looks_like_the_original(user):
    changes = Changes()
    changes.function(double, fast_double)
    assert (user.double.__name__, user.double.__module__) == ("double", __name__)
    assert user.double.__wrapped__ is ORIGINAL[0]
    changes.undo()


def test_method_serves_subclasses_that_change_no_other_part():
    changes = Changes()
    changes.method(Base, "forward", fast_forward)
    try:
        assert Base().forward(1) == "fast 1"
        assert Base().forward(-1) == "base part -1"
        assert Unchanged().forward(1) == "fast 1"
        assert Extended().forward(1) == "extended fast 1"
        assert Own().forward(1) == "base own 1"
    finally:
        changes.undo()
    assert Base().forward(1) == "base part 1"


def test_inherited_method_is_taken_off_again():
    before = vars(Own).copy()
    changes = Changes()
    changes.method(Own, "forward", fast_forward)
    assert Own().forward(1) == "fast 1"
    assert Base().forward(1) == "base part 1"
    changes.undo()
    assert dict(vars(Own)) == dict(before)


def test_class_of_a_live_module_is_swapped_and_put_back():
    class Louder(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 10

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parameters = list(model.parameters())
    x = torch.randn(3, 2)
    before = model(x)
    changes = Changes()
    changes.swap_class(model[1], Louder, "1")
    handle = Handle.of("test", changes)
    assert torch.equal(model(x), before * 10)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    handle.undo()
    assert torch.equal(model(x), before)
    assert type(model[1]) is nn.Linear


def test_submodules_and_plain_attributes_are_set_and_put_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    first, tanh = model[0], nn.Tanh()
    changes = Changes()
    changes.set(model, "1", tanh)
    changes.set(model, "note", 1)
    assert model[1] is tanh and model.note == 1
    assert list(dict(model.named_children())) == ["0", "1"]
    changes.undo()
    assert isinstance(model[1], nn.ReLU) and model[0] is first
    assert not hasattr(model, "note")


def test_what_somebody_else_changed_since_stays_theirs(user):
    changes = Changes()
    changes.function(double, fast_double)
    user.double = theirs = lambda x: 3 * x
    with pytest.warns(UserWarning, match="somebody.double was changed again"):
        changes.undo()
    assert user.double is theirs and user.twice is ORIGINAL[0]


def test_undo_happens_once():
    count = []
    handle = Handle("test", (), (), lambda: count.append(1))
    assert handle.active
    handle.undo()
    handle.undo()
    assert count == [1] and not handle.active


def test_table_names_what_was_replaced_and_what_was_left():
    changes = Changes()
    for place in ("a", "b", "c", "d", "e"):
        changes.report_replaced("library.Layer", "pygen.Layer", place)
    changes.report_left("library.Other", "it has no equal", "")
    handle = Handle.of("pygen.compat.library.convert", changes)
    text = repr(handle)
    head, *rows = text.splitlines()
    assert head == "pygen.compat.library.convert: 5 replaced, 1 left alone"
    assert rows[0].split() == ["replaced", "5", "x", "library.Layer", "->", "pygen.Layer", "a,", "b,", "c", "and", "2",
                               "more"]  # fmt: skip
    assert rows[1].split(maxsplit=4)[:4] == ["left", "alone", "1", "x"]
    assert "it has no equal" in rows[1] and rows[1].endswith("the model itself")
    handle.undo()
    assert "(undone)" in repr(handle).splitlines()[0]


@pytest.fixture
def patch(user) -> Patch:
    return Patch("library", lambda changes: changes.function(double, fast_double))


def test_patch_ends_with_its_context(user, patch):
    with patch() as handle:
        assert user.double(1) == 2000
        assert handle.replaced
    assert user.double is ORIGINAL[0] and not handle.active


def test_patch_ends_with_an_exception(user, patch):
    with pytest.raises(RuntimeError, match="inside"), patch():
        raise RuntimeError("inside")
    assert user.double is ORIGINAL[0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_nested_patches_end_in_any_order(user, patch, order):
    handles = [patch() for _ in range(3)]
    replaced = [handle.replaced for handle in handles]
    assert replaced[0] == replaced[1] == replaced[2]
    for position, index in enumerate(order):
        assert user.double(1) == 2000
        handles[index].undo()
        handles[index].undo()
        assert (user.double is ORIGINAL[0]) == (position == 2)


def test_patch_can_be_made_again(user, patch):
    for _ in range(2):
        with patch():
            assert user.double(1) == 2000
        assert user.double(1) == 2


def test_patch_that_fails_is_taken_back(user):
    def install(changes: Changes) -> None:
        changes.function(double, fast_double)
        raise ValueError("half way")

    patch = Patch("library", install)
    with pytest.raises(ValueError, match="half way"):
        patch()
    assert user.double is ORIGINAL[0]
    with pytest.raises(ValueError, match="half way"):
        patch()


def test_patches_of_many_threads(user, patch):
    faults = []

    def work() -> None:
        for _ in range(200):
            with patch():
                if user.double(1) != 2000:
                    faults.append("not in force")

    threads = [threading.Thread(target=work) for _ in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults
    assert user.double is ORIGINAL[0]


def test_pygen_does_not_import_what_it_replaces():
    code = """
import sys
import pygen, pygen.compat, pygen.ops, pygen.flows
assert not {"nflows", "normflows", "zuko"} & set(sys.modules), set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("library", ["nflows", "normflows", "zuko"])
def test_missing_library_is_named_with_the_extra_that_brings_it(library):
    code = f"""
import sys
sys.modules["{library}"] = None
try:
    import pygen.compat.{library}
except ImportError as error:
    assert str(error) == (
        "pygen.compat.{library} needs {library}, which is not installed: pip install 'pygen-torch[{library}]'"
    ), error
    assert error.name == "{library}"
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_entries_of_dicts_are_put_back():
    table = {"here": 1}
    changes = Changes()
    changes.set(table, "here", 2)
    changes.set(table, "new", 3)
    assert table == {"here": 2, "new": 3}
    changes.undo()
    assert table == {"here": 1}
