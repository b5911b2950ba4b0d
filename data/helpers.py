"""Processes that take a share of every step's micro-batches: on a CPU, two of one thread do more than one of
two, since small products and the steps between them are not worth splitting.

    helpers = Helpers(model, 1, work, arguments)    # work(rank, model, order, *arguments) -> small values
    helpers.start(order); ...; results = helpers.finish()

Writes nothing. The weights lie in shared memory: a step of the optimiser reaches every process as it is made.
"""
import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn


class Helpers:
    """`n` processes, ranks 1 .. n. `work` runs in each, on every order, and leaves its gradients in its copy
    of the model; `finish` adds them to this process's, in the order of the ranks."""

    def __init__(self, model: nn.Module, n: int, work: Callable, arguments: tuple):
        self.model, self.pipes, self.processes = model, [], []
        if n:
            model.share_memory()
        self.sums = torch.zeros(n, sum(p.numel() for p in model.parameters())).share_memory_()
        for rank in range(1, n + 1):
            here, there = multiprocessing.Pipe()
            self.processes.append(multiprocessing.Process(target=serve, daemon=True, args=(
                rank, model, self.sums[rank - 1], here, there, work, arguments)))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def start(self, order: Any) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(order)
            except BrokenPipeError:
                raise self.gone() from None

    def finish(self) -> list:
        """What `work` returned in each process, its gradients added here; an exception of one is raised."""
        results = []
        for pipe, flat in zip(self.pipes, self.sums):
            try:
                result, has = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise self.gone() from None
            if isinstance(result, Exception):
                raise result
            for p, there, g in zip(self.model.parameters(), has, parts(flat, self.model)):
                if there and p.grad is None:
                    p.grad = g.clone()
                elif there:
                    p.grad += g
            results.append(result)
        return results

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()
        self.pipes, self.processes = [], []

    @staticmethod
    def gone() -> ValueError:
        return ValueError("a process that helps in training has ended (memory?): --processes 1 needs none")


def parts(flat: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    """Views of a row of numbers in the shapes of the model's parameters."""
    sizes = [p.numel() for p in model.parameters()]
    return [x.view_as(p) for x, p in zip(flat.split(sizes), model.parameters())]


def serve(rank: int, model: nn.Module, flat: torch.Tensor, here: Any, pipe: Any, work: Callable,
          arguments: tuple) -> None:
    """A helper's life: until the other end of the pipe is closed."""
    here.close()                                    # of this process's copy: else the end never comes
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the first process saves, then ends them all
    torch.set_num_threads(1)
    views = parts(flat, model)
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            model.zero_grad(set_to_none=True)
            result = work(rank, model, order, *arguments)
            has = [p.grad is not None for p in model.parameters()]
            for p, view in zip(model.parameters(), views):
                if p.grad is not None:
                    view.copy_(p.grad)
        except Exception as error:
            result, has = error, []
        try:
            pipe.send((result, has))
        except BrokenPipeError:
            return
