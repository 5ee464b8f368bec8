"""Run a function on N gloo ranks and collect what each returns.

Ranks are forked from a server that has already imported torch, so starting four costs less than a second.
They meet, as under torchrun, at a store that the process which starts them serves: a port that was looked for here
and opened there could be somebody else's in between.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore

PATIENCE = 600.0
"""Seconds after which something hangs, on the slowest machine; nothing is measured by it."""

_context = mp.get_context("forkserver")
# torch imports dynamo when the first DTensor is distributed: a second in each rank unless the server has it.
_context.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "engine.pretraining",
        "rlhf.ppo_job",
        "rlhf.reward_job",
        "pytest",
    ]
)


def meeting_point() -> TCPStore:
    """Where ranks find each other, on a port of the system's choice; it is open as long as this object is kept."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _set_rank(rank: int, world: int, port: int) -> None:
    """The variables that torchrun sets, and one thread."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    import torch

    torch.set_num_threads(1)


def _rank_main(function: Callable[..., Any], rank: int, world: int, port: int, args: tuple, results: Any) -> None:
    _set_rank(rank, world, port)
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        results.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def _job_main(function: Callable[..., Any], rank: int, world: int, port: int, args: tuple) -> None:
    _set_rank(rank, world, port)
    function(*args)


def start_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Start `function(*args)` as `world` processes under torchrun's variables; it forms its own process group."""
    store = meeting_point()
    processes = [
        _context.Process(target=_job_main, args=(function, rank, world, store.port, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
        process.store = store  # to be kept
    return processes


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """Call `function(*args)` on `world` gloo ranks; return the ranks' results in order.

    `function` must be importable (module level) and return something picklable (numpy, not tensors).
    Raises AssertionError with the failing rank's traceback.
    """
    results, store = _context.Queue(), meeting_point()
    processes = [
        _context.Process(target=_rank_main, args=(function, rank, world, store.port, args, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    collected: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, value, error = results.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world} failed:\n{error}"
            collected[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [collected[rank] for rank in range(world)]
