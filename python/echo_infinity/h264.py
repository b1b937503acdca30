"""H.264 encoding without delay: every frame in gives one packet out, so any frame may end the file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from .fmp4 import length_prefixed, nal_units, set_frame_duration

__all__ = ["H264Encoder"]

_BT709 = 1
_LIMITED_RANGE = 1
_KEYFRAME_SECONDS = 3
_MOVFLAGS = "empty_moov+default_base_moof+use_metadata_tags"


class H264Encoder:
    """Encode RGB frames with libx264; ``init`` holds the mp4 init segment that describes them."""

    def __init__(
        self,
        *,
        width: int,
        height: int,
        fps: int,
        metadata: Mapping[str, object],
        preset: str = "veryfast",
        crf: int = 18,
        threads: int = 1,
    ) -> None:
        """Open the encoder.

        Args:
            width: pixels, even.
            height: pixels, even.
            fps: frames a second.
            metadata: keys and values for the init segment; values are written as text.
            preset: x264's speed preset.
            crf: x264's constant quality, lower is better.
            threads: slices encoded at once; more than one only helps large pictures.

        Raises:
            av.FFmpegError: libx264 is missing or refuses the settings.
        """
        # zerolatency means no B-frames and no lookahead: nothing is inside the encoder when a position is taken.
        options = {"preset": preset, "tune": "zerolatency", "crf": str(crf)}
        self._context = av.CodecContext.create("libx264", "w")
        self._context.options = options
        self._context.framerate, self._context.time_base = Fraction(fps), Fraction(1, fps)
        _set_picture(self._context, width, height, fps, threads)
        self._context.flags |= Flags.global_header
        self._context.open()
        head = io.BytesIO()
        # libavformat writes the init segment and no more: it would keep an index that grows with every fragment.
        with av.open(head, "w", format="mp4", options={"movflags": _MOVFLAGS, "use_editlist": "0"}) as muxer:
            muxer.metadata.update({key: str(value) for key, value in metadata.items()})
            stream = muxer.add_stream("libx264", rate=fps, options=options)
            _set_picture(stream.codec_context, width, height, fps, threads)
            muxer.start_encoding()
            self.init = set_frame_duration(head.getvalue(), fps)
        if not all(unit in self.init for unit in nal_units(self._context.extradata or b"")):
            raise RuntimeError("two encoders with the same settings gave different H.264 parameter sets")
        self._reformatter = VideoReformatter()
        self._threads = threads
        self._count = 0

    def encode(self, frame: np.ndarray) -> tuple[bytes, bool]:
        """Encode one frame.

        Args:
            frame: ``(height, width, 3)`` RGB, uint8.

        Returns:
            Its length-prefixed NAL units, and whether it is a keyframe; the first always is.

        Raises:
            RuntimeError: the encoder held the frame back.
        """
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=self._threads,
        )
        picture.pts = self._count
        self._count += 1
        packets = self._context.encode(picture)
        if len(packets) != 1:
            raise RuntimeError(f"the H.264 encoder gave {len(packets)} packets for one frame, expected 1")
        return length_prefixed(bytes(packets[0])), packets[0].is_keyframe


def _set_picture(context: VideoCodecContext, width: int, height: int, fps: int, threads: int) -> None:
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.gop_size = _KEYFRAME_SECONDS * fps
    context.thread_count = threads
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
