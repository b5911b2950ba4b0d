"""A step's micro-batches, and processes that take a share of them: on a CPU, two of one thread do more than
one of two, since small products and the steps between them are not worth splitting.

    helpers = Helpers(model, 1, work, arguments)    # work(rank, model, order, *arguments) -> small values
    helpers.start(order); ...; results = helpers.finish()

Writes nothing. The weights lie in shared memory: a step of the optimiser reaches every process as it is made.
"""
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

from data.batches import Batch, Maker, Stage
from data.device import compile_blocks, is_compiled


def add_gradients(model: nn.Module, batches: Iterator[Batch], stage: Stage, n: int, c: Any,
                  device: torch.device, run: Callable[..., torch.Tensor]) -> tuple[int, bool, torch.Tensor]:
    """The gradients of n of a step's micro-batches by `run`, which does what train.py's `add_gradient` does
    (c is its configuration): tokens (with those that make a batch's documents equally long, without those
    that fill up a shape on a GPU), whether the documents are the stage's longest, the sum of its results."""
    tokens, sums = 0, torch.zeros(3, device=device)
    for _ in range(n):
        batch, S = next(batches).to(device), stage.segment_len
        T, tokens = batch.idx.shape[1], tokens + batch.idx.numel()
        if device.type == "cuda":   # few shapes, so few graphs
            T = T if T >= S else min(S, T + -T % 128)
            batch = batch.padded(T, 1024)
        S = T if c.whole else min(S, T)     # what is shorter than a segment is a whole one, and the last
        if S > model.cfg.segment_len:
            raise ValueError(f"--whole: a document of '{stage}' has {T} tokens: give a longer --segment_len")
        sums += run(model, c, S, *batch[:4])
    return tokens, batch.longest, sums


def help_step(rank: int, model: nn.Module, order: tuple[Stage, int], maker: Maker, processes: int, c: Any,
              run: Callable[..., torch.Tensor]) -> tuple[int, bool, list[float]]:
    """A helper's share of a step: of its micro-batches every `processes`-th, from `rank` on."""
    stage, first = order
    if c.compile and not is_compiled(model):
        compile_blocks(model)
    mine = range(first + rank, first + c.accumulate, processes)
    tokens, longest, sums = add_gradients(model, (maker[stage, i][1] for i in mine), stage, len(mine), c,
                                          torch.device("cpu"), run)
    return tokens, longest, sums.tolist()


class Helpers:
    """`n` processes, ranks 1 .. n, of one thread each. `work` runs in all of them, on every order, and leaves
    its gradients in their copy of the model; `finish` adds them to this process's, in the order of ranks."""

    def __init__(self, model: nn.Module, n: int, work: Callable, arguments: tuple):
        self.model, self.pipes, self.processes = model, [], []
        if not n:
            return
        try:
            model.share_memory()
            self.sums = torch.zeros(n, sum(p.numel() for p in model.parameters())).share_memory_()
        except RuntimeError as error:   # such as a small /dev/shm
            raise ValueError(f"no memory for processes to share ({str(error).splitlines()[0][:200]}): "
                             "--processes 1 needs none") from None
        # a fork is quick and needs nothing pickled, but must not follow CUDA's threads
        fork = sys.platform == "linux" and not torch.cuda.is_available()
        context = multiprocessing.get_context("fork" if fork else "spawn")
        for rank in range(1, n + 1):
            here, there = context.Pipe()
            self.processes.append(context.Process(target=serve, daemon=True, args=(
                rank, model, self.sums[rank - 1], here, there, work, arguments)))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def start(self, order: Any) -> None:
        """Give all processes an order. ValueError if one has ended."""
        for pipe in self.pipes:
            try:
                pipe.send(order)
            except (BrokenPipeError, ConnectionResetError):
                raise self.gone() from None

    def finish(self) -> list:
        """What `work` returned in each process, its gradients added here; an error of one is raised."""
        try:
            answers = [pipe.recv() for pipe in self.pipes]      # all of them, before anything is raised
        except (EOFError, ConnectionResetError):
            raise self.gone() from None
        for result, has in answers:
            if has is None:
                raise result
        for (_, has), flat in zip(answers, self.sums if self.pipes else ()):
            for p, there, g in zip(self.model.parameters(), has, parts(flat, self.model)):
                if there and p.grad is None:
                    p.grad = g.clone()
                elif there:
                    p.grad += g
        return [result for result, _ in answers]

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except (BrokenPipeError, ConnectionResetError):
                pass                                            # that one has ended already
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()                                      # that still works on a step
            process.join()
        self.pipes, self.processes = [], []

    @staticmethod
    def gone() -> ValueError:
        """What to raise for a process that has ended."""
        return ValueError("a process that helps in training has ended (memory?): --processes 1 needs none")


def parts(flat: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    """Views of a row of numbers in the shapes of the model's parameters."""
    sizes = [p.numel() for p in model.parameters()]
    return [x.view_as(p) for x, p in zip(flat.split(sizes), model.parameters())]


def serve(rank: int, model: nn.Module, flat: torch.Tensor, here: Any, pipe: Any, work: Callable,
          arguments: tuple) -> None:
    """A helper's life: until it is told to end, or the process that it helps has ended."""
    here.close()                                    # of this process's copy: else the end is never seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the first process saves, then ends them all
    torch.set_num_threads(1)
    views = parts(flat, model)
    try:
        while (order := pipe.recv()) is not None:
            pipe.send(result_of(rank, model, order, views, work, arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


def result_of(rank: int, model: nn.Module, order: Any, views: list[torch.Tensor], work: Callable,
              arguments: tuple) -> tuple[Any, list[bool] | None]:
    """What `work` returns, and of which weights it has left a gradient in `views`; or its error, and None."""
    try:
        model.zero_grad(set_to_none=True)
        result, has = work(rank, model, order, *arguments), [p.grad is not None for p in model.parameters()]
        for p, view in zip(model.parameters(), views):
            if p.grad is not None:
                view.copy_(p.grad)
        return result, has
    except (ValueError, OSError) as error:          # a user's mistake
        return ValueError(str(error)), None
    except Exception:                               # ours: the cause is told, whatever can be pickled of it
        return RuntimeError(traceback.format_exc()), None
