"""Whether a model's code raises if a comparison turns out otherwise, as an `assert` does; read off its instructions.

A comparison that only chooses between two ways, such as `if repeats == 1: return x`, may turn out either way after a
cut: both ways compute what they should, and the verification sees to it; where it fails, its error names the line.
"""

from __future__ import annotations

import dis
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from torch.fx import Node

ASSERTING = ("_assert", "_check", "assert")
"""How the names of functions begin that raise if what they are given is false."""

FURTHEST = 500
"""Instructions that are looked at."""

COMPARING = ("COMPARE_OP", "CONTAINS_OP")
PASSING = ("CACHE", "COPY", "TO_BOOL", "NOT_TAKEN", "EXTENDED_ARG", "NOP")
ENDING = ("RETURN", "YIELD")


def guards(frame: FrameType, result: bool, *, compares: bool) -> bool:
    """Whether the code of a frame raises if the question that it asks just now is not answered by `result`.

    Args:
        frame: that asks.
        result: today's answer.
        compares: whether the question is a comparison, which only some instructions ask on their own; others do so to
            look something up, as in a cache of earlier results.
    """
    above = frame.f_back
    if compares and above is not None and _yielded(frame.f_code, frame.f_lasti, above.f_code, above.f_lasti):
        # Of `all`, today's answer is that of each element; of `any`, that of the element that decides.
        return _guards(above.f_code, above.f_lasti, bool(result), compares=False)
    return _guards(frame.f_code, frame.f_lasti, bool(result), compares=compares)


def guards_in_graph(frame: FrameType) -> bool:
    """The same for a comparison that is a node of a graph of torch.fx, in the frame that runs it."""
    above = frame.f_back
    node: Node | None = above.f_locals.get("n") if above is not None else None
    users = [getattr(user.target, "__name__", str(user.target)) for user in node.users] if node is not None else []
    return any(name.startswith(ASSERTING) for name in users)


def compares(frame: FrameType) -> bool:
    """Whether the instruction that a frame is at compares, and does not look something up."""
    return _compares(frame.f_code, frame.f_lasti)


@functools.cache
def _compares(code: CodeType, offset: int) -> bool:
    return any(step.offset == offset and step.opname in COMPARING for step in dis.get_instructions(code))


@functools.cache
def _yielded(code: CodeType, offset: int, above: CodeType, call: int) -> bool:
    """Whether a comparison is an element of a generator expression that a call of `all` or `any` goes through."""
    after = [step.opname for step in dis.get_instructions(code) if step.offset > offset]
    if code.co_name != "<genexpr>" or next((name for name in after if name not in PASSING), "") != "YIELD_VALUE":
        return False
    steps = list(dis.get_instructions(above))
    line = next((_line(step) for step in steps if step.offset == call and "CALL" in step.opname), None)
    named = {step.argval for step in steps if step.opname == "LOAD_GLOBAL" and _line(step) == line}
    return line is not None and not named.isdisjoint(("all", "any"))


@functools.cache
def _guards(code: CodeType, offset: int, result: bool, *, compares: bool) -> bool:
    steps = list(dis.get_instructions(code))
    place = next((number for number, step in enumerate(steps) if step.offset == offset), None)
    if place is None or (compares and steps[place].opname not in COMPARING):
        return False
    found = _branch(steps, place, result)
    if found is None:
        return _passed_on(steps, place)
    taken, other = found
    return _raises(steps, other, taken)


def _branch(steps: list[Any], place: int, result: bool) -> tuple[int, int] | None:
    """Where the code goes on for an answer, and where for the other one; None if it does not branch there."""
    at, stored = place if "JUMP" in steps[place].opname else place + 1, ""
    while at < min(len(steps), place + FURTHEST):
        step = steps[at]
        if "JUMP" in step.opname and "IF_" in step.opname and not stored:
            jumps = next((n for n, target in enumerate(steps) if target.offset == step.argval), None)
            if jumps is None or "NONE" in step.opname:
                return None
            return (jumps, at + 1) if result == ("TRUE" in step.opname) else (at + 1, jumps)
        if step.opname == "UNARY_NOT" and not stored:
            result = not result
        elif step.opname == "STORE_FAST" and not stored and steps[at - 1].offset >= steps[place].offset:
            stored = str(step.argval)  # as pytest rewrites an assert
        elif step.opname.startswith("LOAD_FAST") and step.argval == stored:
            stored = ""
        elif (step.opname not in PASSING and not stored) or "JUMP" in step.opname or step.opname.startswith(ENDING):
            return None
        at += 1
    return None


def _passed_on(steps: list[Any], place: int) -> bool:
    """Whether an answer is an argument of a function that asserts, on the same line."""
    line = _line(steps[place])
    near = [step for step in steps if line is not None and _line(step) == line]
    return any(str(step.argval).startswith(ASSERTING) for step in near if step.opname.startswith("LOAD_"))


def _line(step: Any) -> int | None:
    positions = step.positions
    return None if positions is None else positions.lineno


def _raises(steps: list[Any], start: int, taken: int) -> bool:
    """Whether each way from a start raises, apart from those that lead where the code goes on today."""
    numbers = {step.offset: number for number, step in enumerate(steps)}
    raising, seen, waiting = False, {taken}, [start]
    while waiting:
        at = waiting.pop()
        while at < len(steps) and at not in seen:
            seen.add(at)
            name = steps[at].opname
            if name == "RAISE_VARARGS":
                raising = True
                break
            if name.startswith(ENDING) or len(seen) > FURTHEST:
                return False
            if "JUMP" in name:
                waiting.append(numbers[steps[at].argval])
                if "IF_" not in name:
                    break
            at += 1
    return raising
