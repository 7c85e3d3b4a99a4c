"""A FUSE file system of one file, ``file``, with another file's bytes; reads fail with EIO while a flag file is there.

python fuse_file.py MOUNT BACKING FLAG      needs root and /dev/fuse; ends when it is unmounted
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 3, 14, 15, 18, 25, 26, 36, 42
ROOT, FILE = 1, 2
FOPEN_DIRECT_IO = 1


def mount(point: str) -> int:
    """Mounts at ``point``; returns the descriptor that requests come from."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,max_read=1048576"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"mhaffn-test", os.fsencode(point), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    return device


def attributes(node: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o444
    return struct.pack("<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, body: bytes, backing: int, flag: Path) -> bytes | int:
    """The reply's payload, or an errno."""
    size = os.fstat(backing).st_size
    if opcode == INIT:
        return struct.pack("<4I2H2I2HI7I", 7, 31, 1 << 20, 0, 16, 12, 1 << 20, 1, 256, 0, 0, *[0] * 7)
    if opcode == LOOKUP:
        if body.rstrip(b"\0") != b"file":
            return errno.ENOENT
        return struct.pack("<4Q2I", FILE, 0, 3600, 3600, 0, 0) + attributes(FILE, size)
    if opcode == GETATTR:
        return struct.pack("<Q2I", 3600, 0, 0) + attributes(node, size)
    if opcode == OPEN:
        return struct.pack("<Q2I", 0, FOPEN_DIRECT_IO, 0)
    if opcode == READ:
        _, offset, length = struct.unpack_from("<2QI", body)
        return errno.EIO if flag.exists() else os.pread(backing, length, offset)
    return b"" if opcode in (RELEASE, FLUSH) else errno.ENOSYS


def serve(device: int, backing: int, flag: Path) -> None:
    while True:
        try:
            request = os.read(device, (1 << 20) + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            raise
        _, opcode, unique, node = struct.unpack_from("<2I2Q", request)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):  # these want no reply
            continue
        reply = answer(opcode, node, request[40:], backing, flag)
        failed, payload = (reply, b"") if isinstance(reply, int) else (0, reply)
        os.write(device, struct.pack("<IiQ", 16 + len(payload), -failed, unique) + payload)


if __name__ == "__main__":
    point, backing_path, flag_path = sys.argv[1:]
    serve(mount(point), os.open(backing_path, os.O_RDONLY), Path(flag_path))
