"""Worker processes that are started together share a list of devices: each has one, and nobody has two's."""

import subprocess
import sys

CHILD = """
import os, sys
from segpipe.pipeline.devices import take_own_device
take_own_device()
take_own_device()
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""
PARENT = """
import os, subprocess, sys
os.environ["CUDA_VISIBLE_DEVICES"] = "4, GPU-7f,6"
start = lambda: subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
def device(child):
    return child.stdout.readline().strip()
children = [start() for _ in range(3)]
first = [device(it) for it in children]
children[1].kill()
children[1].wait()
again = start()
print(sorted(first), first[1] == device(again), flush=True)
for it in [*children, again]:
    it.kill()
    it.wait()
"""


def family() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)


def test_processes_of_one_parent_take_a_device_each_and_a_new_one_takes_that_of_the_dead() -> None:
    # Two families at once: those of one job know nothing of another's, whose list is another machine's or job's.
    for told in [it.communicate()[0] for it in [family(), family()]]:
        assert told == "['4', '6', 'GPU-7f'] True\n"
