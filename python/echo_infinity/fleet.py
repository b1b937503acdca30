"""Many streams on many devices and machines through Ray: actors hold streams, which move as saved files."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from echo_infinity.extras import library
from echo_infinity.host import LostStreamError, StreamHost, Switch
from echo_infinity.stream import AutosaveWarning


class AdvanceError(RuntimeError):
    """Some streams of a fleet failed.

    Args:
        failures: by name.
        outputs: blocks of the streams that did not.
    """

    def __init__(self, failures: Mapping[str, Exception], outputs: Mapping[str, Tensor]) -> None:
        super().__init__("; ".join(f"{name}: {error}" for name, error in failures.items()))
        self.failures, self.outputs = failures, outputs


@dataclass
class _Entry:
    """What the fleet knows of a stream, enough to make it anew."""

    host: int
    path: Path
    prompt: str
    options: dict[str, Any]
    blocks: int = 0  # handed out
    saved: int | None = None  # block of the last save
    switches: list[Switch] = field(default_factory=list)  # since then


class Fleet:
    """Hosts and the streams on them.

    A stream whose host dies goes on elsewhere: from its last save, made again up to the block handed out last, so that
    no block is missing, comes twice or differs. What a death costs is the time since that save.

    Args:
        model: a bundled model's name, or a folder that every machine sees.
        folder: where streams are saved; every machine must see it.
        hosts: actors to start.
        cpus: of each, for Ray's scheduling, and its threads.
        gpus: of each; a share such as 0.5 lets two hosts have one GPU. 0 computes on the CPU.
        save_every: blocks between saves; None saves when asked to.
        options: of :meth:`EchoPipeline.from_pretrained`, the same on every host.

    Raises:
        MissingExtraError: Ray is not installed.
        ValueError: no host at all, or ``save_every`` below 1.

    Ray is started on this machine unless the program is connected to a cluster already or ``RAY_ADDRESS`` names one.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "tiny",
        *,
        folder: str | os.PathLike[str],
        hosts: int = 1,
        cpus: int = 1,
        gpus: float = 0,
        save_every: int | None = None,
        **options: Any,
    ) -> None:
        if hosts < 1 or (save_every is not None and save_every < 1):
            raise ValueError(f"need hosts >= 1 and save_every >= 1 or None, got {hosts} and {save_every}")
        self._ray = library("ray", "a fleet of streams")
        self._lost = (self._ray.exceptions.RayActorError, LostStreamError)
        self._started_ray = not self._ray.is_initialized()
        if self._started_ray:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(**({} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}))
        self.folder, self.save_every = Path(folder).absolute(), save_every
        self.folder.mkdir(parents=True, exist_ok=True)
        source = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
        options.setdefault("device", "cuda" if gpus else "cpu")
        actor = self._ray.remote(StreamHost).options(num_cpus=cpus, num_gpus=gpus, max_restarts=-1)
        self._hosts = [actor.remote(source, max(1, cpus), options) for _ in range(hosts)]
        self._entries: dict[str, _Entry] = {}

    @property
    def streams(self) -> dict[str, int]:
        """The host of each stream."""
        return {name: entry.host for name, entry in self._entries.items()}

    def start(self, name: str, prompt: str, *, host: int | None = None, **options: Any) -> None:
        """Start a stream.

        Args:
            name: a new one; also its file's, ``<name>.state.safetensors``.
            prompt: what to show.
            host: where; by default the one with the fewest streams.
            options: of :meth:`EchoPipeline.stream`.

        Raises:
            ValueError: the name is taken or no file's name, no such host, or as :meth:`EchoPipeline.stream`.
        """
        if name in self._entries or not name or Path(name).name != name:
            raise ValueError(f"a stream needs a name that is free and can name a file, got {name!r}")
        at = self._idlest() if host is None else self._known(host)
        self._entries[name] = _Entry(at, self.folder / f"{name}.state.safetensors", prompt, options)
        try:
            self._do(name, "start", prompt, options)
        except Exception:
            del self._entries[name]
            raise

    def advance(self, names: Iterable[str] | None = None, blocks: int = 1) -> dict[str, Tensor]:
        """Generate the next blocks of several streams at the same time.

        Args:
            names: streams; by default all.
            blocks: of each.

        Returns:
            By name, the blocks' frames ``(N, H, W, 3)`` uint8, or latents ``(F, C, h, w)``.

        Raises:
            ValueError: an unknown name, or no block at all.
            AdvanceError: some streams failed; it holds all blocks that were made, also of streams that could not be
                saved then.

        Warns:
            AutosaveWarning: a stream could not be saved; it goes on.
        """
        entries = {name: self._entry(name) for name in (self._entries if names is None else names)}
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        begun = {name: self._ask(entry.host, "advance", name, blocks) for name, entry in entries.items()}
        outputs: dict[str, Tensor] = {}
        failures: dict[str, Exception] = {}
        for name, reference in begun.items():
            try:
                outputs[name] = self._do(name, "advance", blocks, begun=reference)
                entries[name].blocks += blocks
                self._save_on_time(name)
            except Exception as error:  # noqa: PERF203
                failures[name] = error
        if failures:
            raise AdvanceError(failures, outputs) from next(iter(failures.values()))
        return outputs

    def switch(self, name: str, prompt: str, **options: Any) -> None:
        """Change a stream's prompt at its next block; options as in :meth:`Stream.switch`."""
        entry = self._entry(name)
        self._do(name, "switch", prompt, options)
        entry.switches.append(Switch(entry.blocks, prompt, options))

    def save(self, name: str) -> Path:
        """Save a stream to its file and return the file."""
        entry = self._entry(name)
        self._do(name, "save", entry.path)
        entry.saved, entry.switches = entry.blocks, []
        return entry.path

    def move(self, name: str, host: int) -> None:
        """Save a stream and go on with it on another host, with the same bits.

        Raises:
            ValueError: an unknown name, or no such host.
        """
        entry, there = self._entry(name), self._known(host)
        self.save(name)
        before = entry.host
        if there != before:
            self._place(name, there)
            self._forget(name, before)

    def stop(self, name: str) -> None:
        """Close a stream and forget it; its file stays."""
        self._forget(name, self._entry(name).host)
        del self._entries[name]

    def close(self) -> None:
        """Stop all hosts, and Ray where the fleet started it; streams live on in their files only."""
        for host in self._hosts:
            self._ray.kill(host)
        self._hosts, self._entries = [], {}
        if self._started_ray:
            self._ray.shutdown()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(f"no stream {name!r}; there are: {', '.join(self._entries) or 'none'}")
        return self._entries[name]

    def _known(self, host: int) -> int:
        if not 0 <= host < len(self._hosts):
            raise ValueError(f"no host {host}: there are {len(self._hosts)}, from 0 on")
        return host

    def _loads(self) -> list[int]:
        loads = [0] * len(self._hosts)
        for entry in self._entries.values():
            loads[entry.host] += 1
        return loads

    def _idlest(self) -> int:
        loads = self._loads()
        return loads.index(min(loads))

    def _ask(self, host: int, method: str, *args: Any) -> Any:
        return getattr(self._hosts[host], method).remote(*args)

    def _get(self, reference: Any) -> Any:
        """Wait for an answer; an error of the host's is raised as it was there."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error

    def _do(self, name: str, method: str, *args: Any, begun: Any = None, deaths: int = 0) -> Any:
        """Call a method of the stream's host; if that is gone, put the stream elsewhere first, as often as hosts go."""
        entry = self._entry(name)
        try:
            if deaths:
                self._place(name, self._other(entry.host))
            return self._get(begun or self._ask(entry.host, method, name, *args))
        except self._lost:
            if deaths == len(self._hosts):
                raise
        return self._do(name, method, *args, deaths=deaths + 1)

    def _other(self, gone: int) -> int:
        """The first other host that answers; the lost one, when Ray has started it again, if there is no other."""
        loads = self._loads()
        others = sorted((i for i in range(len(self._hosts)) if i != gone), key=loads.__getitem__) or [gone]
        asked = {self._hosts[i].ready.options(max_task_retries=-1).remote(): i for i in others}
        answered, _ = self._ray.wait(list(asked), num_returns=1)
        return asked[answered[0]]

    def _place(self, name: str, host: int) -> None:
        """Put a stream on a host as it was after the last block that was handed out."""
        entry = self._entry(name)
        if entry.saved is None:
            self._get(self._ask(host, "start", name, entry.prompt, entry.options))
        else:
            again = {key: entry.options[key] for key in ("noise", "callback") if key in entry.options}
            self._get(self._ask(host, "resume", name, entry.path, again))
        self._get(self._ask(host, "replay", name, entry.blocks, entry.switches))
        entry.host = host

    def _forget(self, name: str, host: int) -> None:
        with contextlib.suppress(*self._lost):  # gone already
            self._get(self._ask(host, "stop", name))

    def _save_on_time(self, name: str) -> None:
        entry = self._entries[name]
        if self.save_every is None or entry.blocks - (entry.saved or 0) < self.save_every:
            return
        try:
            self.save(name)
        except OSError as error:
            warnings.warn(
                f"could not save {name!r} to {entry.path}: {error}; it goes on", AutosaveWarning, stacklevel=3
            )
