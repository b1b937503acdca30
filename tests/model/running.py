"""Readers of what a run leaves."""

import av


def frames_of(path):
    """Presentation times of an mp4's frames, in frames."""
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        return [round(float(f.pts * stream.time_base * stream.average_rate)) for f in video.decode(stream)]


def hashes_of(path):
    """Block -> hash; lines of the same block must agree."""
    found = {}
    for line in path.read_text().splitlines():
        block, digest = line.split()
        assert found.setdefault(int(block), digest) == digest, f"block {block} differs between runs"
    return [found[i] for i in range(len(found))]
