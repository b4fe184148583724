"""Started by `sandbox` as a program of its own: takes limits on, then runs the file that is named.

python -I -B child.py SECONDS MEMORY_BYTES FILE_BYTES program.py
"""

import builtins
import contextlib
import os
import resource
import runpy
import shutil
import socket
import subprocess
import sys

_PROCESSES = 64
# What tests have no use for, and accidents are made of.
_REFUSED = {
    builtins: "input exit quit",
    os: "_exit kill killpg fork forkpty remove unlink rmdir removedirs rename renames replace truncate chmod chown"
    " lchown link symlink system popen execv execve execl execle execlp execlpe execvp execvpe posix_spawn"
    " posix_spawnp spawnl spawnle spawnv spawnve setuid setgid putenv",
    shutil: "rmtree move chown",
    subprocess: "Popen run call check_call check_output",
    socket: "socket create_connection create_server",
}


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError("not allowed in an evaluation")


def _take_limits(seconds: int, memory: int, files: int) -> None:
    # A network with nothing in it, where the system allows that; else Python alone refuses sockets.
    with contextlib.suppress(AttributeError, OSError):
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: files,
        resource.RLIMIT_NPROC: _PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        most = resource.getrlimit(name)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(name, (value, value))
    for module, names in _REFUSED.items():
        for name in names.split():
            if hasattr(module, name):
                setattr(module, name, _refuse)


if __name__ == "__main__":
    *given, program = sys.argv[1:]
    sys.argv = [program]
    leave = os._exit
    _take_limits(*map(int, given))
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit:
        # Before its tests, that is.
        print("the program ends itself", file=sys.stderr, flush=True)
        leave(1)
