"""Find comparisons, such as that of an `assert`, with which a model's code decides whether to raise an exception.

The comparisons are found in the bytecode.

A comparison that only chooses between two branches, such as `if repeats == 1: return x`, may change its result after
a cut: both branches compute a valid result, and the verification compares the outputs. If the verification fails, its
error names the line of the comparison.
"""

from __future__ import annotations

import dis
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from torch.fx import Node

ASSERTING = ("_assert", "_check", "assert")
"""Prefixes of the names of functions that raise if their argument is false."""

MAX_INSTRUCTIONS = 500
"""Largest number of instructions that are searched after a comparison."""

COMPARING = ("COMPARE_OP", "CONTAINS_OP")
PASSING = ("CACHE", "COPY", "TO_BOOL", "NOT_TAKEN", "EXTENDED_ARG", "NOP")
ENDING = ("RETURN", "YIELD")


def guards(frame: FrameType, result: bool, *, compares: bool) -> bool:
    """Return whether the code of a frame raises an exception if the test at its current instruction changes its result.

    Args:
        frame: the frame that runs the test.
        result: result of the test before any cut.
        compares: whether the test is a comparison method, such as `__eq__`. The test then counts only if the current
            instruction is a comparison. Other instructions call the method to look up a value, for example in a cache.
    """
    caller = frame.f_back
    if compares and caller is not None and _yielded(frame.f_code, frame.f_lasti, caller.f_code, caller.f_lasti):
        # `all` and `any` return the result of the last element that they test, so the test in the caller has the same
        # result.
        return _guards(caller.f_code, caller.f_lasti, bool(result), compares=False)
    return _guards(frame.f_code, frame.f_lasti, bool(result), compares=compares)


def guards_in_graph(frame: FrameType) -> bool:
    """Return whether a `torch.fx` graph asserts the result of a comparison.

    `frame` is the frame of `torch.fx.Interpreter` that computes the comparison.
    """
    caller = frame.f_back
    node: Node | None = caller.f_locals.get("n") if caller is not None else None
    users = [getattr(user.target, "__name__", str(user.target)) for user in node.users] if node is not None else []
    return any(name.startswith(ASSERTING) for name in users)


def compares(frame: FrameType) -> bool:
    """Return whether the current instruction of a frame is a comparison, not a lookup that compares values."""
    return _compares(frame.f_code, frame.f_lasti)


@functools.cache
def _compares(code: CodeType, offset: int) -> bool:
    return any(step.offset == offset and step.opname in COMPARING for step in dis.get_instructions(code))


@functools.cache
def _yielded(code: CodeType, offset: int, caller: CodeType, call: int) -> bool:
    """Return whether a comparison is an element of a generator expression that is an argument of `all` or `any`."""
    after = [instruction.opname for instruction in dis.get_instructions(code) if instruction.offset > offset]
    if code.co_name != "<genexpr>" or next((name for name in after if name not in PASSING), "") != "YIELD_VALUE":
        return False
    instructions = list(dis.get_instructions(caller))
    line = next((_line(each) for each in instructions if each.offset == call and "CALL" in each.opname), None)
    names = {each.argval for each in instructions if each.opname == "LOAD_GLOBAL" and _line(each) == line}
    return line is not None and not names.isdisjoint(("all", "any"))


@functools.cache
def _guards(code: CodeType, offset: int, result: bool, *, compares: bool) -> bool:
    instructions = list(dis.get_instructions(code))
    index = next((number for number, each in enumerate(instructions) if each.offset == offset), None)
    if index is None or (compares and instructions[index].opname not in COMPARING):
        return False
    branches = _branches(instructions, index, result)
    if branches is None:
        return _is_asserted(instructions, index)
    taken, other = branches
    return _raises(instructions, other, taken)


def _branches(instructions: list[Any], index: int, result: bool) -> tuple[int, int] | None:
    """Return the next instructions for `result` and for the opposite result; None if the code does not branch."""
    at, stored = index if "JUMP" in instructions[index].opname else index + 1, ""
    while at < min(len(instructions), index + MAX_INSTRUCTIONS):
        current = instructions[at]
        if "JUMP" in current.opname and "IF_" in current.opname and not stored:
            jumps = next((n for n, target in enumerate(instructions) if target.offset == current.argval), None)
            if jumps is None or "NONE" in current.opname:
                return None
            return (jumps, at + 1) if result == ("TRUE" in current.opname) else (at + 1, jumps)
        if current.opname == "UNARY_NOT" and not stored:
            result = not result
        elif (
            current.opname == "STORE_FAST" and not stored and instructions[at - 1].offset >= instructions[index].offset
        ):
            stored = str(current.argval)  # pytest stores the result of an assert in a variable
        elif current.opname.startswith("LOAD_FAST") and current.argval == stored:
            stored = ""
        elif (
            (current.opname not in PASSING and not stored)
            or "JUMP" in current.opname
            or current.opname.startswith(ENDING)
        ):
            return None
        at += 1
    return None


def _is_asserted(instructions: list[Any], index: int) -> bool:
    """Return whether a function that asserts is called on the line of a comparison."""
    line = _line(instructions[index])
    on_line = [each for each in instructions if line is not None and _line(each) == line]
    return any(str(each.argval).startswith(ASSERTING) for each in on_line if each.opname.startswith("LOAD_"))


def _line(instruction: Any) -> int | None:
    positions = instruction.positions
    return None if positions is None else positions.lineno


def _raises(instructions: list[Any], start: int, taken: int) -> bool:
    """Return whether each path from an instruction raises, except for paths that lead to the taken branch."""
    index_of = {each.offset: number for number, each in enumerate(instructions)}
    raising, seen, waiting = False, {taken}, [start]
    while waiting:
        at = waiting.pop()
        while at < len(instructions) and at not in seen:
            seen.add(at)
            name = instructions[at].opname
            if name == "RAISE_VARARGS":
                raising = True
                break
            if name.startswith(ENDING) or len(seen) > MAX_INSTRUCTIONS:
                return False
            if "JUMP" in name:
                waiting.append(index_of[instructions[at].argval])
                if "IF_" not in name:
                    break
            at += 1
    return raising
