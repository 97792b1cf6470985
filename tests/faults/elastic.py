"""A rank of an elastic run, and an agent that dies at a chosen moment: see test_faults_ranks.py.

As a script, ``torchrun … elastic.py FOLDER pretrain …``: `quarterview`, which writes down in FOLDER who
trains each step, and which waits where the test wants to find it. The variable LOST names the ranks that will
be lost, if this is their machine; the file FOLDER/lost says that they are. TIMEOUT is for how many seconds
ranks wait for one another.
"""

import datetime
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from quarterview.training import distributed
from quarterview.training.trainer import Trainer

HELD = 4
"""From this step on the rank of the machine that will be lost waits to be killed, the other for its part."""

DYING = """
import os, signal
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent as Agent
from torch.distributed.run import main
Agent.{} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
main()
"""
"""An agent that is killed instead of doing that. At ``_assign_worker_ranks`` both machines have joined the
rendezvous, and it has not said yet how many ranks it brings; at ``_start_workers`` it has."""


def note_and_hold(folder: Path) -> None:
    """Record ``[step, rank, ranks]`` before every step, and wait at some."""
    real, gone = Trainer._run_update, folder / "lost"

    def update(self: Trainer, batch: object) -> None:
        world = self.world
        with (folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps([self.step, world.rank, world.size]) + "\n")
        lost = os.environ.get("LOST", "").split()
        if world.size == 2 and self.step >= HELD and str(world.rank) in lost and not gone.exists():
            (folder / "pid").write_text(str(os.getpid()))
            (folder / "pid").rename(folder / "held")
            signal.pause()
        if world.size == 1 and not gone.exists():
            time.sleep(1)  # alone because the other machine is late: do not end before it has come
        real(self, batch)

    Trainer._run_update = update


if __name__ == "__main__":
    _, place, *sys.argv[1:] = sys.argv
    note_and_hold(Path(place))
    if "TIMEOUT" in os.environ:
        distributed._TIMEOUT = datetime.timedelta(seconds=int(os.environ["TIMEOUT"]))
    runpy.run_module("quarterview", run_name="__main__")
