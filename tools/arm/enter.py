#!/usr/bin/python3
"""enter.py FOLDER COMMAND...: run a command in the emulated ARM64 root that build.sh made; FOLDER/share is /share.

qemu is registered with the kernel in a user namespace of its own, so that nothing of the host changes.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

NEWNS, NEWUSER = 0x20000, 0x10000000  # of unshare
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000  # of mount
libc = ctypes.CDLL(None, use_errno=True)


def checked(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(source, to, kind=None, flags=0):
    checked(libc.mount(source.encode(), str(to).encode(), kind and kind.encode(), ctypes.c_ulong(flags), None))


def enter(folder, command):
    """In the child, once it is root of its own namespace."""
    root = folder / "root"
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("none", "/proc/sys/fs/binfmt_misc", "binfmt_misc")
    rules = Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_text().splitlines()
    Path("/proc/sys/fs/binfmt_misc/register").write_text(next(rule for rule in rules if rule.startswith(":")).strip())
    for shared in ("proc", "dev", "sys"):
        mount(f"/{shared}", root / shared, None, BIND | RECURSIVE)
    mount(str(folder / "share"), root / "share", None, BIND)
    os.chroot(root)
    os.chdir("/share")
    # With its 512-bit vectors qemu's `max` multiplies float32 wrongly in numpy's OpenBLAS. Threads that spin are
    # emulated as well. A board's tests have no deadlines, nor have these (CI=1, for Hypothesis).
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb", "CI": "1",
           "QEMU_CPU": "max,sve=off,sme=off", "OMP_WAIT_POLICY": "passive", "GGUF_TRIM_CACHE": "/share/cache",
           "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    os.execvpe(command[0], command, env)


def main(folder, *command):
    unshared, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        checked(libc.unshare(NEWUSER | NEWNS))
        os.write(unshared[1], b"x")
        os.read(mapped[0], 1)
        enter(Path(folder).resolve(), command)
    os.read(unshared[0], 1)
    for ids in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{ids}").write_text("0 0 65536\n")
    os.write(mapped[1], b"x")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
