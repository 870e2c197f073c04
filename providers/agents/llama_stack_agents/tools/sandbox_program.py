"""What runs inside the sandbox: executes pieces of Python, one after the other, in one namespace.

Each request is a line of JSON, ``{"code": ...}``, on standard input; each reply is four bytes of length, most
significant first, and so much JSON. This file is never imported by the server: its text is handed to the sandbox's
interpreter, which has nothing but its standard library, so it imports nothing of ours. The code that it executes may do
anything to it, so whoever reads its replies believes none of them.
"""

import ast
import base64
import contextlib
import fcntl
import json
import os
import resource
import struct
import sys
import traceback

MAX_OUTPUT_BYTES = 64 * 1024
MAX_FIGURES = 8


def limit(processes: int, memory_bytes: int, file_bytes: int) -> None:
    """No limit can be raised again: the process has no capability."""
    for what, most in (
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def execute(code: str, namespace: dict[str, object]) -> str | None:
    """Run statements; the value of a last expression is printed, as at a prompt. Returns the error, if any."""
    try:
        tree = ast.parse(code, "<code>")
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, "<code>", "exec"), namespace)  # noqa: S102  # the sandbox is for this
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), namespace)  # noqa: S307
            if value is not None:
                print(repr(value))
    except BaseException:  # also SystemExit: the session goes on
        kind, error, trace = sys.exc_info()
        return "".join(traceback.format_exception(kind, error, trace.tb_next if trace else None))
    return None


def figures() -> list[str]:
    """Open matplotlib figures as PNG, and closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    found: list[str] = []
    if pyplot is None:
        return found
    for number in pyplot.get_fignums()[:MAX_FIGURES]:
        path = f"/tmp/.figure-{number}.png"
        pyplot.figure(number).savefig(path, format="png")
        with open(path, "rb") as file:
            found.append(base64.b64encode(file.read()).decode())
        os.unlink(path)
    pyplot.close("all")
    return found


def output(descriptor: int) -> str:
    """What was written since the last time, by this process and its children, up to the limit."""
    length = os.fstat(descriptor).st_size
    text = os.pread(descriptor, MAX_OUTPUT_BYTES, 0).decode("utf-8", "replace")
    os.ftruncate(descriptor, 0)
    return text + (f"\n[{length - MAX_OUTPUT_BYTES} more bytes]" if length > MAX_OUTPUT_BYTES else "")


def main() -> None:
    """Serve requests until standard input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    written = os.memfd_create("output")  # a full disk must not take the words away that say so
    fcntl.fcntl(written, fcntl.F_SETFL, os.O_APPEND)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(written, 1)
    os.dup2(written, 2)
    limit(*map(int, sys.argv[1:4]))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line in requests:
        error = execute(json.loads(line)["code"], namespace)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, or over the limit of a file
                stream.flush()
        try:
            shown = figures()
        except Exception as failure:
            shown, error = [], error or f"the figures could not be drawn: {failure!r}"
        reply = json.dumps({"output": output(written), "error": error, "figures": shown}).encode()
        sent = struct.pack(">I", len(reply)) + reply
        while sent:
            sent = sent[os.write(replies, sent) :]


main()
