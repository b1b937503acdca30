"""Boxes of a fragmented mp4 with one H.264 track, as bytes in and bytes out (ISO/IEC 14496-12, 8.8)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

__all__ = [
    "FRAGMENT_HEAD_BYTES",
    "FragmentHead",
    "Track",
    "fragment",
    "length_prefixed",
    "nal_units",
    "parse_fragment",
    "parse_init",
    "set_frame_duration",
]

# moof, mfhd, traf, tfhd, tfdt (64 bit), trun: one fixed head, since every fragment has one track and one run.
_HEAD = struct.Struct(">I4s I4sII I4s I4sII I4sIQ I4sIIi")
_SAMPLE = struct.Struct(">II")
_BOX = struct.Struct(">I4s")
FRAGMENT_HEAD_BYTES = _HEAD.size

_BASE_IS_MOOF = 0x020000
_OFFSET_SIZE_FLAGS = 0x000601
_TFDT_64_BIT = 0x01000000
_KEYFRAME = 0x02000000
_DEPENDENT = 0x01010000

_START_CODE = re.compile(rb"\x00\x00\x00?\x01")


@dataclass(frozen=True)
class Track:
    """What the init segment says of the video: picture size, clock, and decoder configuration."""

    width: int
    height: int
    timescale: int
    duration: int
    decoder: bytes

    @property
    def fps(self) -> float:
        """Return frames a second."""
        return self.timescale / self.duration if self.duration else 0.0


@dataclass(frozen=True)
class FragmentHead:
    """Where a fragment starts in time (ticks), how many frames it holds, and how long its moof box is (bytes)."""

    sequence: int
    start: int
    count: int
    moof_bytes: int


def parse_init(init: bytes) -> Track:
    """Read the track from an init segment (ftyp and moov).

    Args:
        init: the bytes from the start of the file to the end of moov.

    Returns:
        The track.

    Raises:
        ValueError: a box of an H.264 video is missing.
    """
    try:
        entry = init.index(b"avc1")
        width, height = struct.unpack_from(">HH", init, entry + 28)
        (timescale,) = struct.unpack_from(">I", init, init.index(b"mdhd") + 16)
        (duration,) = struct.unpack_from(">I", init, init.index(b"trex") + 16)
        config = init.index(b"avcC", entry)
        (size,) = struct.unpack_from(">I", init, config - 4)
    except (ValueError, struct.error) as error:
        raise ValueError(f"not the start of a fragmented H.264 mp4 ({error})") from error
    return Track(width, height, timescale, duration, init[config + 4 : config - 4 + size])


def set_frame_duration(init: bytes, fps: int) -> bytes:
    """Return the init segment with one frame's duration as the track's default, so fragments need not repeat it."""
    track = parse_init(init)
    if track.timescale % fps:
        raise ValueError(f"timescale {track.timescale} is no multiple of {fps} frames a second")
    at = init.index(b"trex") + 16
    return init[:at] + struct.pack(">I", track.timescale // fps) + init[at + 4 :]


def nal_units(annex_b: bytes) -> list[bytes]:
    """Split NAL units at their start codes (ISO/IEC 14496-10, annex B)."""
    # A NAL unit never holds a start code nor ends in a zero byte, so splitting is exact.
    return _START_CODE.split(annex_b)[1:]


def length_prefixed(annex_b: bytes) -> bytes:
    """Turn start-code separated NAL units into the length-prefixed form that mp4 stores."""
    return b"".join(part for unit in nal_units(annex_b) for part in (struct.pack(">I", len(unit)), unit))


def fragment(sequence: int, start: int, samples: list[tuple[bytes, bool]]) -> bytes:
    """Build one moof and mdat pair.

    Args:
        sequence: number of the fragment in the file, from 1.
        start: decode time of the first sample, in ticks.
        samples: (length-prefixed NAL units, is keyframe) a frame, in order.

    Returns:
        The bytes to append to the file.
    """
    trun = 20 + _SAMPLE.size * len(samples)
    moof = _HEAD.size + _SAMPLE.size * len(samples)
    payload = sum(len(data) for data, _ in samples)
    head = _HEAD.pack(
        moof, b"moof",
        16, b"mfhd", 0, sequence,
        moof - 24, b"traf",
        16, b"tfhd", _BASE_IS_MOOF, 1,
        20, b"tfdt", _TFDT_64_BIT, start,
        trun, b"trun", _OFFSET_SIZE_FLAGS, len(samples), moof + _BOX.size,
    )  # fmt: skip
    table = (_SAMPLE.pack(len(data), _KEYFRAME if key else _DEPENDENT) for data, key in samples)
    return b"".join((head, *table, _BOX.pack(_BOX.size + payload, b"mdat"), *(data for data, _ in samples)))


def parse_fragment(head: bytes) -> FragmentHead:
    """Read the head of a fragment that :func:`fragment` built.

    Args:
        head: at least ``FRAGMENT_HEAD_BYTES`` bytes from the start of its moof box.

    Returns:
        The head.

    Raises:
        ValueError: these bytes are no such head.
    """
    if len(head) < _HEAD.size:
        raise ValueError(f"{len(head)} bytes where a fragment's head takes {_HEAD.size}")
    fields = _HEAD.unpack_from(head)
    kinds = (fields[1], fields[3], fields[7], fields[9], fields[13], fields[17])
    if kinds != (b"moof", b"mfhd", b"traf", b"tfhd", b"tfdt", b"trun"):
        raise ValueError(f"boxes {kinds} where a fragment should start")
    return FragmentHead(sequence=fields[5], start=fields[15], count=fields[19], moof_bytes=fields[0])
