"""Runs one program on test inputs and writes what it returned. This file is what runs *inside* the sandbox.

It imports nothing but the standard library and is started as a script. It is not trusted: whatever is run here may
overwrite this module, write to the result pipe itself, or end the process. It can so only spoil its own result, since
what is expected never enters the sandbox and is compared outside (`codeact.evaluation.compare`).

Values are written as JSON. What JSON has not is an object with one key that says what it is:
``{"tuple": [...]}``, ``{"set": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"int": "hex"}``, ``{"float": "nan"}``,
``{"complex": [re, im]}``, ``{"bytes": "hex"}``, ``{"ratio": ["hex", "hex"]}`` (fractions, decimals); a value of a
subclass is ``{"sub": [class name, value]}``, anything else ``{"opaque": class name}``.

A line each: ``{"begin": true}`` before the program is read, ``{"loaded": true}`` then, a ``{"value": ...}`` a test,
``{"done": true}``; ``{"load": kind, "message": ...}`` or ``{"error": ...}`` where it fails, and nothing after that.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Iterator
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:  # every program would wait for what is imported here
    from typing import Any

_EXACT_INT = 1 << 53
_DEEPEST = 100
_FLUSH_SECONDS = 0.02
_FLUSH_BYTES = 1 << 16
_PART = 4096
_LONGEST_LINE = 1 << 24
_KEYS: type = type({}.keys())
_BASES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)


def encode(value: Any, depth: int = 0) -> Any:  # noqa: PLR0911 - a line for every type
    """Return ``value`` as something that JSON can write. It reads what a container holds, not what its class says."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_EXACT_INT < value < _EXACT_INT else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if depth > _DEEPEST:
        return {"opaque": "nested too deeply"}
    if kind is list:
        return value if _plain_items(value) else [encode(item, depth + 1) for item in value]
    if kind is tuple:
        return {"tuple": value if _plain_items(value) else [encode(item, depth + 1) for item in value]}
    if kind is set:
        return {"set": [encode(item, depth + 1) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if kind is bytes:
        return {"bytes": value.hex()}
    return _encode_other(value, kind, depth)


def _plain_items(items: list[Any] | tuple[Any, ...]) -> bool:
    """Whether JSON can write a list as it is; a long one (there are some of millions) then costs next to nothing."""
    kinds = set(map(type, items))
    if kinds <= {str, bool, type(None)}:
        return True
    if kinds == {int}:
        return bool(min(items) > -_EXACT_INT and max(items) < _EXACT_INT)
    return kinds == {float} and all(map(math.isfinite, items))


def _encode_other(value: Any, kind: type, depth: int) -> Any:
    if kind.__name__ in ("Fraction", "Decimal") and kind.__module__ in ("fractions", "decimal"):
        try:
            numerator, denominator = value.as_integer_ratio()
        except (ValueError, OverflowError):
            return {"opaque": str(kind.__name__)}
        return {"sub": [kind.__name__, {"ratio": [hex(numerator), hex(denominator)]}]}
    if kind is frozenset or kind is _KEYS:
        return {"sub": [kind.__name__, encode(set(value), depth)]}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return {"sub": [f"numpy.{kind.__name__}", encode(value.item(), depth)]}
    for base in _BASES:
        if issubclass(kind, base):  # a Counter, a namedtuple, an IntEnum, a float of numpy
            return {"sub": [str(kind.__name__), encode(_plain(value, base), depth)]}
    return {"opaque": str(getattr(kind, "__name__", "?"))}


def _plain(value: Any, base: type) -> Any:
    """What the base class holds, whatever methods the subclass has."""
    if base is dict:
        return dict(dict.items(value))
    if base in (list, tuple, set, frozenset):
        return set(base.__iter__(value)) if base is frozenset else base(base.__iter__(value))
    if base is str:
        return str.__getitem__(value, slice(None))
    if base is bytes:
        return bytes.__getitem__(value, slice(None))
    if base is complex:
        return complex(value.real, value.imag)
    return base.__float__(value) if base is float else int.__int__(value)


def decode(wire: Any) -> Any:  # noqa: PLR0911 - a line for every type
    """The inverse of ``encode`` for what `codeact` itself wrote; subclasses come back as their base."""
    if isinstance(wire, list):
        plain = not {list, dict} & set(map(type, wire))
        return wire if plain else [decode(item) for item in wire]
    if not isinstance(wire, dict):
        return wire
    ((kind, content),) = wire.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind in ("tuple", "set"):
        items = map(decode, content)
        return tuple(items) if kind == "tuple" else set(items)
    if kind == "sub":
        return decode(content[1])
    if kind == "ratio":
        import fractions

        return fractions.Fraction(int(content[0], 16), int(content[1], 16))
    if kind == "complex":
        return complex(decode(content[0]), decode(content[1]))
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    raise ValueError(f"{kind} is no form of a value")


# ------------------------------------------------------------------------------------------------------ in the sandbox


class _Timeout(BaseException):
    pass


def _alarm(_signal: int, _frame: Any) -> None:
    raise _Timeout


def _json_pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value; a long list is encoded in parts, so that it is not in memory twice."""
    kind = type(value)
    if kind not in (list, tuple) or len(value) <= _PART:
        yield json.dumps(encode(value), separators=(",", ":")).encode()
        return
    yield b"[" if kind is list else b'{"tuple":['
    for first in range(0, len(value), _PART):
        text = json.dumps(encode(list(value[first : first + _PART]), 1), separators=(",", ":"))
        yield (b"," if first else b"") + text[1:-1].encode()
    yield b"]" if kind is list else b"]}"


class _Results:
    """Lines of JSON to the pipe, in blocks: a write a test would cost more than most tests."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._lines: list[bytes] = []
        self._size = 0
        self._flushed = time.monotonic()

    def add_value(self, value: Any) -> None:
        """Write a result; of a very long one only its digest, which nobody can know without having the result."""
        pieces: list[bytes] = []
        size, digest = 0, None
        for piece in _json_pieces(value):
            size += len(piece)
            if digest is not None:
                digest.update(piece)
            elif size > _LONGEST_LINE:
                import hashlib

                digest = hashlib.sha256(b"".join([*pieces, piece]))
                pieces.clear()
            else:
                pieces.append(piece)
        if digest is not None:
            pieces = [json.dumps({"digest": [size, digest.hexdigest()]}, separators=(",", ":")).encode()]
        self._add(b"".join([b'{"value":', *pieces, b"}\n"]))

    def add(self, row: Any) -> None:
        """Write anything else."""
        self._add(json.dumps(row, separators=(",", ":")).encode() + b"\n")

    def _add(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size > _FLUSH_BYTES or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        data = memoryview(b"".join(self._lines))
        self._lines, self._size, self._flushed = [], 0, time.monotonic()
        while data:
            data = data[os.write(self._pipe, data) :]


def _kind(error: BaseException) -> str:
    if isinstance(error, _Timeout):
        return "time"
    if isinstance(error, MemoryError):
        return "memory"
    return "syntax" if isinstance(error, SyntaxError) else "exception"


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # its __str__ is the program's own
        return "?"


def _returned(value: Any, form: str) -> Any:
    """The form of a result that is compared: itself, as a set, or only whether it is something."""
    if form == "set":
        return set(value)
    if form == "reference not none":
        return value is not None
    if form == "not none":
        return value if isinstance(value, bool) else value is not None
    return value


class _PipeEnd:
    """What asyncio needs of a socket to wake its loop: the filter of system calls denies socket pairs."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self._descriptor, flag)

    def recv(self, size: int) -> bytes:
        return os.read(self._descriptor, size)

    def send(self, data: bytes) -> int:
        return os.write(self._descriptor, data)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _module(program: str) -> types.ModuleType:
    """The module that the program becomes: with a file and in ``sys.modules``, as a script has it.

    Its name is not ``__main__``, so that what a script does when it is run is left out.
    """
    path = os.path.abspath("program.py")
    with suppress(OSError), open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(program)  # for inspect, linecache
    module = types.ModuleType("__codeact__")
    module.__file__ = path
    sys.modules[module.__name__] = sys.modules["__main__"] = module
    sys.argv = [path]
    if "asyncio" in program:
        import socket

        socket.socketpair = lambda *_: tuple(map(_PipeEnd, os.pipe()))
    return module


def _run(request: dict[str, Any], results: _Results) -> None:
    clock = time.perf_counter
    program = request["program"].removeprefix("\ufeff")
    try:
        module = _module(program)
        begin = clock()
        signal.setitimer(signal.ITIMER_REAL, request["load_seconds"])
        # Else the program would inherit the import of annotations from __future__ above.
        exec(compile(program, str(module.__file__), "exec", dont_inherit=True), vars(module))
        signal.setitimer(signal.ITIMER_REAL, 0)
        if clock() - begin > request["load_seconds"]:
            raise _Timeout  # it turned its alarm off
        function = vars(module)[request["entry_point"]]
    except BaseException as error:
        results.add({"load": _kind(error), "message": _describe(error)})
        return
    results.add({"loaded": True})
    results.flush()
    if "check" in request:
        _record(request, vars(module), function, results)
        return
    form, timed = request["form"], request["timed"]
    for wire, seconds in zip(request["inputs"], request["seconds"], strict=True):
        arguments = decode(wire)
        begin = clock()
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            value = _returned(function(*arguments), form)
            if clock() - begin > seconds:
                raise _Timeout
            results.add_value(value)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            results.add({"error": _kind(error), "message": _describe(error)})
            return  # one failure decides
        if timed:
            results.add({"seconds": clock() - begin})
    results.add({"done": True})


def _record(request: dict[str, Any], scope: dict[str, Any], function: Any, results: _Results) -> None:
    """Run the test program of the original HumanEval on the reference and write with which arguments it called it."""

    def recorder(*arguments: Any) -> Any:
        results.add({"arguments": encode(arguments)})
        return function(*arguments)

    try:
        exec(compile(request["check"], "<check>", "exec", dont_inherit=True), scope)
        scope["check"](recorder)
    except BaseException as error:
        results.add({"load": _kind(error), "message": _describe(error)})
        return
    results.add({"done": True})


def _confine(limits: dict[str, int], user: int | None, strict: bool) -> None:
    """Set the limits that hold for this process and for what it starts, and give up root.

    ``strict``: fail where the system has not a limit (macOS knows RLIMIT_AS and refuses it).
    """
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            if strict:
                raise


def main() -> None:
    """Read a request from standard input; write results to the pipe that the first argument names."""
    given, pipe = int(sys.argv[1]), 3
    request = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    if given == pipe:
        os.set_inheritable(pipe, False)
    else:
        os.dup2(given, pipe, inheritable=False)
        os.close(given)
    sys.path.extend(request["path"])
    _confine(request["limits"], request["user"], request["strict"])
    signal.signal(signal.SIGALRM, _alarm)
    results = _Results(pipe)
    results.add({"begin": True})
    results.flush()
    _run(request, results)
    signal.setitimer(signal.ITIMER_REAL, 0)
    results.flush()
    os._exit(0)  # without waiting for threads, and without the program's exit handlers


if __name__ == "__main__":
    main()
