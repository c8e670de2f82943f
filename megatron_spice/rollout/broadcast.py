"""Weights on their way to engines that cannot map this process's memory: one broadcast a bucket, to all of them at once.

SGLang's servers join a group when they are asked to (`/init_weights_update_group`), in which the sender is rank 0 and each
server's tensor-parallel ranks follow. SGLang builds its side with torch's `_new_process_group_helper`; here the same group is
built from torch's public classes, because a group in torch's global tables would be destroyed, and counted, with Megatron's.
What both sides must agree on is the store and the three prefixes that `_join` spells out. A bucket is one flat tensor of
bytes without gaps; the request that says what is in it runs in a thread of its own while the broadcast does, because the
server answers when it has loaded the bucket.

Everything that waits for a server is bounded: a broadcast to a dead peer may hang (gloo) until the group's timeout, so it is
never waited for; the servers' answers are. A group whose broadcast failed is of no more use to anybody, so it is left to
end by itself in the background, and the members that still answer get a new one. They share a fate nevertheless: a
broadcast passes through members, and one that waits for a dead member may be stuck in it, and is then given up too.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_spice.cluster.ports import LOOPBACK
from megatron_spice.rollout.engine import EngineError, EngineRefused
from megatron_spice.rollout.remote_client import RemoteClient

BUCKET_SECONDS = 60.0
"""What one broadcast, or the founding of a group, may take. The slowest network this bears: 256 MiB in a minute."""
PATIENCE = 10.0
"""Seconds a server is given beyond that to answer, and to leave a group."""


@dataclass(frozen=True, slots=True)
class Member:
    """One server of a group; `num_ranks` are its tensor-parallel ranks."""

    client: RemoteClient
    num_ranks: int
    device: str


@dataclass(frozen=True, slots=True)
class Packed:
    """A bucket as SGLang's receiver lays it out: `flat` [bytes] uint8, the tensors one after the other without gaps;
    `contents` their names, dtypes and shapes, in this order."""

    flat: torch.Tensor
    contents: dict[str, Any]


class GroupBroken(Exception):
    """A group could not be founded or a broadcast failed. `errors`: of each member that is known to have failed."""

    def __init__(self, errors: dict[Member, EngineError]) -> None:
        super().__init__("; ".join(str(error).partition("\n")[0] for error in errors.values()))
        self.errors = errors


def pack(named_tensors: Sequence[tuple[str, torch.Tensor]]) -> Packed:
    """Lays tensors of one device one after the other; without a copy if they lie so already.

    The widest types come first, so that each tensor starts at a multiple of its type's size: the receiver views them in place.
    """
    ordered = sorted(named_tensors, key=lambda pair: -pair[1].itemsize)
    contents = {
        "names": [name for name, _ in ordered],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
        "shapes": [list(tensor.shape) for _, tensor in ordered],
    }
    tensors = [tensor.detach() for _, tensor in ordered]
    flat = _in_place(tensors)
    if flat is None:
        flat = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
    return Packed(flat, contents)


def _in_place(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    storage = tensors[0].untyped_storage()
    start = end = tensors[0].storage_offset() * tensors[0].itemsize
    for tensor in tensors:
        here = tensor.storage_offset() * tensor.itemsize
        if tensor.untyped_storage().data_ptr() != storage.data_ptr() or here != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    return torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(storage)[start:end]


class BroadcastGroup:
    """This process and all ranks of some servers.

    Args:
        device: "cpu" or "cuda", where the buckets lie. NCCL is used if they and all servers are on CUDA, else gloo.
        seconds: what founding and each broadcast may take.

    Raises:
        GroupBroken: it cannot be founded.
    """

    def __init__(self, members: Sequence[Member], device: str, seconds: float = BUCKET_SECONDS) -> None:
        self.members = tuple(members)
        self.name = f"spice-{secrets.token_hex(8)}"
        self._seconds = seconds
        self._backend = "nccl" if {device, *(member.device for member in members)} == {"cuda"} else "gloo"
        self._world_size = 1 + sum(member.num_ranks for member in members)
        # Listens on all interfaces; a group lives no longer than its store.
        self._store: dist.TCPStore | None = dist.TCPStore(
            "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
        self._group: dist.ProcessGroup | None = None
        self._in_flight: object = None
        address, port = address_towards([member.client.url for member in members]), self._store.port
        founding = in_background(lambda: self._join(address, port))
        answers, first_rank = {}, 1
        for member in members:
            join = _joining(member, self.name, address, port, first_rank, self._world_size, self._backend, seconds + PATIENCE)
            answers[member] = in_background(join)
            first_rank += member.num_ranks
        wait([founding, *answers.values()], seconds + 2 * PATIENCE, return_when="FIRST_EXCEPTION")
        if not founding.done() or founding.exception() or any(not each.done() or each.exception() for each in answers.values()):
            self._store = None  # whoever still waits for it, in any process, now fails
            wait(answers.values(), PATIENCE)
            errors = _errors(answers)
            if not errors:
                reason = founding.exception() if founding.done() else "it took too long"
                errors = {member: EngineError(f"engine {member.client.url}: no group with it: {reason}") for member in members}
            raise GroupBroken(errors)
        self._group = founding.result()

    def _join(self, address: str, port: int) -> dist.ProcessGroup:
        seconds = timedelta(seconds=self._seconds)
        store: dist.Store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=seconds)
        device = "cuda" if self._backend == "nccl" else "cpu"
        # By SGLang's init_custom_process_group, torch's _new_process_group_helper, and again that one for each device.
        for prefix in (self.name, f"{self.name}/", f"{device}/"):
            store = dist.PrefixStore(prefix, store)
        if self._backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = seconds
            return dist.ProcessGroupNCCL(store, 0, self._world_size, options)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = seconds
        # Not the interface of GLOO_SOCKET_IFNAME, which is for the trainers among themselves and may be the loopback one.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        return dist.ProcessGroupGloo(store, 0, self._world_size, options)

    def send(self, packed: Packed) -> None:
        """Broadcasts a bucket; returns when all members have loaded it.

        Raises:
            GroupBroken: some did not; the group cannot be used any more.
        """
        assert self._group is not None, "send() after close()"
        flat = packed.flat if self._backend == "nccl" else packed.flat.cpu()
        limit = self._seconds + PATIENCE
        answers = {
            member: in_background(lambda member=member: member.client.receive(self.name, packed.contents, limit))
            for member in self.members
        }
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
        work = self._group.broadcast([flat], options)
        wait(answers.values(), limit + PATIENCE)
        if errors := _errors(answers):
            self._in_flight = (work, flat)
            raise GroupBroken(errors)
        work.wait()  # over: every member has what was sent

    def close(self, silent: Collection[Member] = ()) -> None:
        """Everybody leaves, but for members that are known to be silent."""
        leaving = [
            in_background(lambda member=member: member.client.leave_group(self.name, PATIENCE))
            for member in self.members
            if member not in silent
        ]
        # Our end of it waits for what is in flight, and that for the timeout, so not in this thread.
        held = [self._group, self._in_flight]
        self._group = self._store = self._in_flight = None

        def end() -> None:
            held[0].abort()  # NCCL's communicator; gloo has nothing that could be aborted
            held.clear()

        in_background(end)
        wait(leaving, PATIENCE)


class Sender:
    """Sends buckets to all engines of this rank, each bucket once.

    The engines ask one after the other for the same bucket: the first that does starts the broadcast to all, and the others
    find their part of the result.
    """

    def __init__(self, device: str, seconds: float = BUCKET_SECONDS) -> None:
        self._device = device
        self._seconds = seconds
        self._members: list[Member] = []
        self._results: dict[Member, EngineError | None] = {}
        self._group: BroadcastGroup | None = None

    def add(self, member: Member) -> None:
        """From the next bucket on this one is sent to as well; nothing new if it is already."""
        self._results = {}
        if member not in self._members:
            self._members.append(member)

    def remove(self, member: Member) -> None:
        """Nothing more is sent to it; the others need a new group. Nothing if it is not a member."""
        self._results.pop(member, None)
        if member in self._members:
            self._members.remove(member)
            self._disband()

    def deliver(self, member: Member, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Returns when this member has loaded the bucket, which all members are asked to deliver in turn.

        Raises:
            EngineError: it has not.
        """
        if member not in self._results:
            self._results = self._send_to_all(pack(named_tensors))
        error = self._results.pop(member)
        if error is not None:
            raise error

    def _send_to_all(self, packed: Packed) -> dict[Member, EngineError | None]:
        """Sends until all are served or given up. Those that do not answer are given up at once. Those that refuse may have
        suffered from another's end, or from a connection that was cut: a new group gives them a second chance."""
        results: dict[Member, EngineError | None] = {}
        remaining, refusals = list(self._members), 0
        while remaining:
            errors = self._try(remaining, packed)
            gone = {member: error for member, error in errors.items() if not isinstance(error, EngineRefused)}
            if not gone:
                refusals += 1
            given_up = errors if refusals > 1 else gone
            results |= given_up
            remaining = [member for member in remaining if member not in given_up]
            if not errors.keys() - given_up.keys():
                break
        return results | dict.fromkeys(remaining)

    def _try(self, members: Sequence[Member], packed: Packed) -> dict[Member, EngineError]:
        try:
            if self._group is None or self._group.members != tuple(members):
                self._disband()
                self._group = BroadcastGroup(members, self._device, self._seconds)
            self._group.send(packed)
        except GroupBroken as broken:
            self._disband([member for member, error in broken.errors.items() if not isinstance(error, EngineRefused)])
            return broken.errors
        return {}

    def _disband(self, silent: Collection[Member] = ()) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close(silent)


def _joining(member: Member, name: str, address: str, port: int, rank: int, size: int, backend: str, timeout: float) -> Any:
    return lambda: member.client.join_group(
        name, address, port, first_rank=rank, world_size=size, backend=backend, timeout=timeout
    )


def _errors(answers: dict[Member, Future[None]]) -> dict[Member, EngineError]:
    """Of the members that failed or have not answered."""
    found: dict[Member, EngineError] = {}
    for member, answer in answers.items():
        error = answer.exception() if answer.done() else EngineError(f"engine {member.client.url}: no answer in time")
        if error is not None:
            if not isinstance(error, EngineError):
                raise error
            found[member] = error
    return found


def in_background(work: Callable[[], Any]) -> Future[Any]:
    """Runs it in a thread that does not keep the process alive, unlike those of an executor."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def address_towards(urls: Sequence[str]) -> str:
    """This machine's address as the servers see it: on the way to the first that is elsewhere, else the loopback one."""
    for url in urls:
        parts = urlsplit(url)
        try:
            family, kind, _, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # sends nothing
                address = probe.getsockname()[0]
        except OSError as error:
            raise EngineError(f"engine {url}: no way to it ({error})") from error
        if address not in (LOOPBACK, "::1"):
            return address
    return LOOPBACK
