"""Scalars, pictures, and texts for TensorBoard, which never stop or hold a run."""

import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

from genai_jax.files import MIB, read_bytes, read_text

PICTURES = (".png", ".jpg", ".gif")
LARGEST = 256 * MIB  # of a file of samples


class TensorBoard:
    """Writes an event file; after an error it says so once and writes nothing more.

    `tensorboardX.SummaryWriter` writes in a thread that ends at the first error (a full disk), and
    then waits forever for room in the queue of that thread. One write per row needs no thread.

    Args:
      folder: where TensorBoard looks for event files.
      first_step: events of this step and later ones, which an earlier process wrote, do not count.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder, self._file = folder, None
        start = SessionLog(status=SessionLog.START)
        try:
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115, closed at the end
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=first_step, session_log=start))
        except OSError as error:
            self._give_up(error)

    def write(self, row: dict):
        """Writes {"step": ..., name: number, ...}."""
        from tensorboardX.summary import scalar

        if not self._file:
            return
        values = [scalar(n, x).value for n, x in row.items() if n != "step"]
        try:
            self._write(_event(row["step"], *values))
        except OSError as error:
            self._give_up(error)

    def show(self, step: int, files: Mapping[str, pathlib.Path]):
        """Writes the pictures and texts among files, each under its name."""
        if not self._file:
            return
        try:
            for name, path in files.items():
                if path.suffix in PICTURES:
                    self._write(_event(step, _picture(name, path)))
                elif path.suffix == ".txt":
                    self._write(_event(step, _text(name, path)))
        except OSError as error:
            self._give_up(error)

    def close(self, failed: bool = False):
        if self._file:
            self._file.close()

    def _write(self, event):
        from tensorboardX.record_writer import masked_crc32c

        event.wall_time = time.time()
        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (header, data)]
        record = header + sums[0] + data + sums[1]
        if self._file.write(record) < len(record):
            raise OSError("no room for a whole event")

    def _give_up(self, error: OSError):
        print(
            f"warning: no more events for TensorBoard in {self._folder}: {error.strerror or error}",
            file=sys.stderr,
        )
        self.close()
        self._file = None


def _event(step: int, *values: Any) -> Any:
    """An event with the values of summaries."""
    from tensorboardX.proto.event_pb2 import Event

    event = Event(step=step)
    for several in values:
        event.summary.value.extend(several)
    return event


def _picture(name: str, path: pathlib.Path) -> Any:
    from PIL import Image
    from tensorboardX.proto.summary_pb2 import Summary

    with Image.open(path) as picture:
        width, height = picture.size
    image = Summary.Image(
        width=width,
        height=height,
        colorspace=3,
        encoded_image_string=read_bytes(path, limit=LARGEST),
    )
    return [Summary.Value(tag=name, image=image)]


def _text(name: str, path: pathlib.Path) -> Any:
    from tensorboardX.summary import text

    lines = read_text(path, limit=LARGEST).splitlines()
    return text(name, "\n".join(f"    {line}" for line in lines)).value  # as code, not Markdown
