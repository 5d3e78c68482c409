"""
Two processes that train on a packed stream and of which one is killed at any moment, also during a save, end with the
results of an uninterrupted run.
"""

import pytest

from tests.support.processes import run_alone

pytestmark = [pytest.mark.slow, pytest.mark.extensive]

PROGRAM = '''
import os, random, signal, socket, sys
from pathlib import Path
import torch
from modeling_sparse_moe_vlm.toolbox.training.checkpoints import last_whole_checkpoint
from tests.support.own_data import figures, make_trainer, tensors, write_own_data
from tests.support.processors import make_speaking_model

torch.set_num_threads(1)
folder = Path(sys.argv[1])
# In some steps, all rows of a process are bad, or have no image.
data = write_own_data(folder, 16, bad=(8, 9), without_image=(0, 1, 4, 5, 6), long=(2, 7, 13))
SETTINGS = {"router_aux_loss_coef": 0.5, "router": "sigmoid", "router_bias_update_rate": 0.05, "attention_dropout": 0.2}
ticks, kill_at = 0, None


def tick():
    """Counts a moment, and kills the process at one of them."""
    global ticks
    ticks += 1
    if ticks == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def watch(event, arguments):
    writes = event == "open" and "w" in str(arguments[1])
    if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and "checkpoint-" in str(arguments[0]):
        tick()


def train(run):
    sys.addaudithook(watch)
    torch.manual_seed(0)
    trainer = make_trainer(
        data,
        run,
        make_speaking_model(output_router_logits=True, **SETTINGS),
        streaming=True,
        packing=True,
        skipped_file=run.parent / f"{run.name}.jsonl",
        max_steps=5,
        save_steps=1,
        save_total_limit=2,
    )
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: tick() or collator(rows)
    try:
        checkpoint = last_whole_checkpoint(trainer.args)
    except ValueError:
        checkpoint = None
    trainer.train(resume_from_checkpoint=checkpoint)
    skipped = trainer.train_dataset.reader.skipped.entries()
    torch.save((figures(trainer), tensors(trainer), sorted(entry["row"] for entry in skipped), ticks),
               run.parent / f"{run.name}-{trainer.args.process_index}.pt")


def in_two_processes(run, rank=None, moment=None):
    """Trains, and resumes if there is a checkpoint. Returns whether a process was killed. The other one then ends."""
    global kill_at
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = {}
    for number in (0, 1):
        if child := os.fork():
            children[child] = number
            continue
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        kill_at = moment if number == rank else None
        try:
            train(run)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    first, status = os.wait()
    children.pop(first)
    (second,) = children
    if status:
        os.kill(second, signal.SIGKILL)
    other = os.waitpid(second, 0)[1]
    if moment is None:
        assert status == other == 0, (status, other)
    return signal.SIGKILL in (status, other)


whole = folder / "whole"
assert not in_two_processes(whole)
expected = [torch.load(folder / f"whole-{number}.pt") for number in (0, 1)]
assert [entry["step"] for entry in expected[0][0]] == [3, 5]
assert expected[0][2] == [0, 1], expected[0][2]
chance = random.Random(3)
for rank in (0, 1, 0, 1):
    moment = chance.randint(2, expected[rank][-1])
    run = folder / f"killed-{rank}-{moment}"
    assert in_two_processes(run, rank, moment), (rank, moment)
    assert not in_two_processes(run)
    for number in (0, 1):
        figures_of_run, weights, skipped, _ = torch.load(folder / f"{run.name}-{number}.pt")
        assert figures_of_run == expected[number][0], (rank, moment, figures_of_run, expected[number][0])
        assert all(torch.equal(weights[name], expected[number][1][name]) for name in weights), (rank, moment)
        assert skipped == expected[number][2], (rank, moment, skipped)
    print("killed process", rank, "at", moment, "of", expected[rank][-1], flush=True)
print("all are equal", flush=True)
os._exit(0)
'''


def test_killed_runs_equal_uninterrupted_ones(tmp_path):
    result = run_alone(PROGRAM, tmp_path)
    assert "all are equal" in result.stdout, result.stdout[-3000:] + result.stderr[-4000:]
