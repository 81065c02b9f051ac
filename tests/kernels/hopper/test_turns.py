"""Which tile a program of the Hopper kernel takes in which turn: plain arithmetic, followed here in Python."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest

pytest.importorskip("triton", reason="triton, in which the kernel is written, is not installed")

from lpattn.kernels.hopper import attention

PROGRAMS = 132


class Scalars:
    """What the functions ask of the language, for one program, with Python's numbers."""

    constexpr = object

    def __init__(self, program: int, programs: int) -> None:
        self.program_id = lambda axis: program
        self.num_programs = lambda axis: programs

    @staticmethod
    def where(condition: bool, yes: int, no: int) -> int:
        return yes if condition else no


def plain(name: str, language: Scalars) -> Callable[..., int]:
    """A function of the kernel, that can be called."""
    function = getattr(attention, name).fn
    names = {**function.__globals__, "gl": language}
    if name != "_back_and_forth":
        names["_back_and_forth"] = plain("_back_and_forth", language)
    return types.FunctionType(function.__code__, names)


def tiles_of(program: int, programs: int, tiles: int, causal: bool) -> list[int]:
    """A program's tiles, turn by turn."""
    language = Scalars(program, programs)
    end = plain("_turns", language)(tiles, causal)
    numbers = enumerate(range(program, end, programs))
    back_and_forth = plain("_back_and_forth", language)
    return [back_and_forth(turn) if causal else index for turn, index in numbers]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("programs", "tiles"), [(1, 1), (1, 7), (3, 3), (4, 5), (4, 11), (4, 12), (132, 864), (132, 2048)]
)
def test_every_tile_is_taken_once(programs, tiles, causal) -> None:
    taken = [tile for program in range(programs) for tile in tiles_of(program, programs, tiles, causal)]
    assert sorted(taken) == list(range(tiles))


@pytest.mark.parametrize(("heads", "length"), [(32, 4096), (32, 8192), (16, 8192), (24, 32768)])
def test_programs_have_as_many_causal_key_tiles(heads, length) -> None:
    of_head = length // 128
    # The longest come first: see _query_tile.
    keys = [of_head - index // heads for index in range(of_head * heads)]
    loads = [sum(keys[i] for i in tiles_of(p, PROGRAMS, len(keys), True)) for p in range(PROGRAMS)]
    assert max(loads) < 1.03 * sum(loads) / PROGRAMS
