"""Processes that decode every image once, so that no image can take the trainer down.

torchvision's decoders are C libraries fed by strangers, and a broken PNG is enough to crash torchvision 0.29
(docs/decisions/0007). So each inspector is a forked child with small limits and no open file but its socket. It notes
the image it is at in shared memory: when it dies or hangs, that image gets a name and a reason, and a new child goes on
behind it.

Wire: `count, lengths[count], bytes` to the child; `verdicts[count], reasons and thumbnails` back.
"""

import contextlib
import gc
import hashlib
import mmap
import os
import select
import signal
import socket
import struct
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from worker.ingest import sandbox
from worker.ingest.archive import Bytes
from worker.parts import decode
from worker.report import Limits

PATIENCE_SECONDS = 60.0  # for one image; the slowest honest one takes a few
THUMBNAIL_SIDE = 128
THUMBNAIL_QUALITY = 85
FORMATS = ("jpeg", "png", "webp", "gif")
ALPHA, PALETTE, CMYK = 1, 2, 4  # bits of `flags`

VERDICT = np.dtype(
    [("digest", "V32"), ("height", "<u4"), ("width", "<u4"), ("thumbnail", "<u4"), ("reason", "<u4"),
     ("format", "u1"), ("channels", "u1"), ("bits", "u1"), ("flags", "u1")]
)  # fmt: skip
_VERDICT = struct.Struct("<32sIIIIBBBB")
_COUNT = struct.Struct("<Q")
_BUFFERS = 512  # of one system call; the least that every system takes is 1024
assert _VERDICT.size == VERDICT.itemsize


class Verdicts(NamedTuple):
    """What was found about a batch: `table[i]` of dtype `VERDICT`; a reason by number for those that are bad."""

    table: np.ndarray
    reasons: dict[int, str]
    thumbnails: dict[int, bytes]


def vet(data: Bytes, limits: Limits) -> tuple[bytes, bytes, bytes]:
    """Decode one image wholly; gives its packed verdict, the reason when it is bad, and the thumbnail it needs."""
    try:
        head = decode.header(data)
        if head.width * head.height > limits.max_pixels:
            raise decode.Undecodable(
                f"{head.width} x {head.height} pixels; an image may have {limits.max_pixels}; make it smaller"
            )
        image = decode.decode(data, head)
        picture = thumbnail(image)
    except decode.Undecodable as error:
        reason = str(error).encode()
        return _VERDICT.pack(bytes(32), 0, 0, 0, len(reason), 0, 0, 0, 0), reason, b""
    except (MemoryError, RuntimeError):  # torch says so when it cannot allocate
        reason = b"decoding it needs more memory than is allowed"
        return _VERDICT.pack(bytes(32), 0, 0, 0, len(reason), 0, 0, 0, 0), reason, b""
    flags = ALPHA * head.alpha | PALETTE * head.palette | CMYK * head.cmyk
    digest = hashlib.sha256(data).digest()
    _, height, width = image.shape
    kind = FORMATS.index(head.format)
    return _VERDICT.pack(digest, height, width, len(picture), 0, kind, head.channels, head.bits, flags), b"", picture


def vet_all(batch: Sequence[Bytes], limits: Limits) -> Verdicts:
    """Decode a batch in this process: only for images that we encoded ourselves."""
    found = [vet(data, limits) for data in batch]
    table = np.frombuffer(b"".join(verdict for verdict, _, _ in found), VERDICT)
    return _unpacked(table, bytearray(b"".join(reason + picture for _, reason, picture in found)))


def thumbnail(image: Tensor) -> bytes:
    """Make a JPEG of at most 128 pixels a side from `[1 or 3, height, width]`; nothing when the image is that small."""
    _, height, width = image.shape
    longest = max(height, width)
    if longest <= THUMBNAIL_SIDE:
        return b""
    size = [max(1, round(side * THUMBNAIL_SIDE / longest)) for side in (height, width)]
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    image = image[None].contiguous(memory_format=torch.channels_last)  # its fast path
    small = F.interpolate(image, size, mode="bilinear", antialias=True)[0]
    return torch.ops.image.encode_jpeg.default(small.contiguous(), THUMBNAIL_QUALITY).numpy().tobytes()


class Inspector:
    """One child process; used by one thread at a time."""

    def __init__(self, limits: Limits, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._limits, self._patience = limits, patience_seconds
        self._at = mmap.mmap(-1, _COUNT.size)  # shared: the number of the image in work
        self._child = 0
        self._start()

    def inspect(self, batch: Sequence[Bytes]) -> Verdicts:
        """Decode a batch; an image that kills or hangs the child is bad, by name, like any other bad image."""
        parts: list[Verdicts] = []
        while batch:
            answer = self._ask(batch)
            if isinstance(answer, Verdicts):
                parts.append(answer)
                break
            number = min(_COUNT.unpack(self._at[:])[0], len(batch) - 1)
            self._start()
            parts += self.inspect(batch[:number]), Verdicts(np.zeros(1, VERDICT), {0: answer}, {})
            batch = batch[number + 1 :]
        return _joined(parts)

    def close(self) -> None:
        """End the child."""
        self._end()
        self._at.close()

    def _start(self) -> None:
        self._end()
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; this child uses none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _serve(theirs, self._at, self._limits)
        theirs.close()
        self._socket, self._child = ours, child

    def _end(self) -> None:
        if self._child:
            self._socket.close()
            self._kill()
            os.waitpid(self._child, 0)
            self._child = 0

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)

    def _ask(self, batch: Sequence[Bytes]) -> "Verdicts | str":
        """Send a batch and wait; gives the reason when the child died."""
        lengths = np.array([len(data) for data in batch], "<u8")
        self._at[:] = _COUNT.pack(0)
        try:
            self._socket.sendall(_COUNT.pack(len(batch)) + lengths.tobytes())
            for start in range(0, len(batch), _BUFFERS):
                _send(self._socket, batch[start : start + _BUFFERS])
            table = np.frombuffer(self._receive(len(batch) * VERDICT.itemsize), VERDICT)
            rest = self._receive(int(table["reason"].sum(dtype=np.int64) + table["thumbnail"].sum(dtype=np.int64)))
        except TimeoutError:
            self._kill()
            return f"decoding it took longer than {self._patience:g} seconds"
        except OSError:
            self._kill()
            return "damaged: the decoder crashed on it"
        return _unpacked(table, rest)

    def _receive(self, count: int) -> bytearray:
        data, done = bytearray(count), 0
        last, since = self._at[:], time.monotonic()
        while done < count:
            if not select.select([self._socket], [], [], min(1.0, self._patience / 4))[0]:
                if self._at[:] != last:
                    last, since = self._at[:], time.monotonic()
                elif time.monotonic() - since > self._patience:
                    raise TimeoutError
                continue
            got = self._socket.recv_into(memoryview(data)[done:])
            if not got:
                raise ConnectionResetError
            done += got
        return data


def _send(connection: socket.socket, pieces: Sequence[Bytes]) -> None:
    """Send pieces without joining them first, which would touch as much fresh memory again."""
    sent, total = connection.sendmsg(pieces), sum(len(piece) for piece in pieces)
    if sent < total:
        for piece in pieces:
            if sent < len(piece):
                connection.sendall(memoryview(piece)[sent:])
            sent = max(0, sent - len(piece))


def _joined(parts: Sequence[Verdicts]) -> Verdicts:
    reasons: dict[int, str] = {}
    thumbnails: dict[int, bytes] = {}
    at = 0
    for part in parts:
        reasons |= {at + number: reason for number, reason in part.reasons.items()}
        thumbnails |= {at + number: picture for number, picture in part.thumbnails.items()}
        at += len(part.table)
    return Verdicts(np.concatenate([np.empty(0, VERDICT), *(part.table for part in parts)]), reasons, thumbnails)


def _unpacked(table: np.ndarray, rest: bytearray) -> Verdicts:
    reasons: dict[int, str] = {}
    thumbnails: dict[int, bytes] = {}
    at = 0
    for number in np.flatnonzero(table["reason"] + table["thumbnail"]):
        words, picture = int(table["reason"][number]), int(table["thumbnail"][number])
        if words:
            reasons[int(number)] = rest[at : at + words].decode("utf-8", "replace")
        if picture:
            thumbnails[int(number)] = bytes(rest[at + words : at + words + picture])
        at += words + picture
    return Verdicts(table, reasons, thumbnails)


def _serve(connection: socket.socket, at: mmap.mmap, limits: Limits) -> NoReturn:
    """Be the child: answer batches until the parent is gone."""
    try:
        _leave_behind(connection.fileno())
        torch.set_num_threads(1)
        sandbox.confine(limits)
        head, room = bytearray(_COUNT.size), bytearray()  # the room is used again and again
        while _fill(connection, memoryview(head)):
            sandbox.allow_cpu()
            (count,) = _COUNT.unpack(head)
            sizes = bytearray(8 * count)
            _fill(connection, memoryview(sizes))
            lengths = np.frombuffer(sizes, "<u8").tolist()
            if sum(lengths) > len(room):
                room = bytearray(sum(lengths))
            data = memoryview(room)
            _fill(connection, data[: sum(lengths)])
            verdicts, rest, start = [], [], 0
            for number, length in enumerate(lengths):
                at[:] = _COUNT.pack(number)
                verdict, reason, picture = vet(data[start : start + length], limits)
                verdicts.append(verdict)
                rest += reason, picture
                start += length
            connection.sendall(b"".join(verdicts) + b"".join(rest))
    finally:
        os._exit(0)


def _fill(connection: socket.socket, room: memoryview) -> bool:
    """Receive exactly so many bytes; false when the parent is gone."""
    while room:
        got = connection.recv_into(room)
        if not got:
            return False
        room = room[got:]
    return True


def _leave_behind(keep: int) -> None:
    """Close what was inherited: the trainer's wire, other children's sockets, its terminal and its signal handlers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the end of the socket ends this process
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
    gc.disable()
