"""Runs that are killed at any moment, also during a save, end with the results of an uninterrupted run."""

import pytest

from tests.support.processes import run_alone

pytestmark = pytest.mark.slow

PROGRAM = '''
import io, json, os, random, signal, sys
from pathlib import Path
import torch
from transformers import TrainerState
from modeling_sparse_moe_vlm.toolbox.training.checkpoints import last_whole_checkpoint
from tests.support.own_data import figures, make_trainer, tensors, write_own_data
from tests.support.processors import make_speaking_model

folder = Path(sys.argv[1])
data = write_own_data(folder)
SETTINGS = {"router": "sigmoid", "router_bias_update_rate": 0.05, "attention_dropout": 0.2}
ticks, kill_at, half_written = 0, None, []


def tick(before_death=None):
    """Counts a moment of a save, and kills the process at one of them, perhaps with a file that is half written."""
    global ticks
    ticks += 1
    if before_death:
        half_written.append(ticks)
    if ticks == kill_at:
        if before_death:
            before_death()
        os.kill(os.getpid(), signal.SIGKILL)


def watch(event, arguments):
    writes = event == "open" and "w" in str(arguments[1])
    if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and "checkpoint-" in str(arguments[0]):
        tick()


def torch_save(value, path, *args, **kwargs):
    content = io.BytesIO()
    original_save(value, content)
    tick(lambda: Path(path).write_bytes(content.getvalue()[: content.tell() // 2]))
    Path(path).write_bytes(content.getvalue())


def save_state(state, path):
    tick(lambda: Path(path).write_text(json.dumps(vars(state), default=str)[:100]))
    original_state(state, path)


original_save, torch.save = torch.save, torch_save
original_state, TrainerState.save_to_json = TrainerState.save_to_json, save_state


def train(run, streaming, moment):
    """Trains in a new process, which resumes if there is a checkpoint. Returns whether it was killed."""
    global kill_at
    if child := os.fork():
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    kill_at = moment
    sys.addaudithook(watch)
    torch.manual_seed(0)
    trainer = make_trainer(
        data,
        run,
        make_speaking_model(output_router_logits=True, **SETTINGS),
        streaming,
        max_steps=5,
        save_steps=1,
        save_total_limit=2,
    )
    try:
        checkpoint = last_whole_checkpoint(trainer.args)
    except ValueError:
        checkpoint = None
    trainer.train(resume_from_checkpoint=checkpoint)
    kill_at = None
    original_save((figures(trainer), tensors(trainer), ticks, half_written), run / "result.pt")
    os._exit(0)


for streaming in (False, True):
    whole = folder / f"whole-{streaming}"
    assert not train(whole, streaming, None)
    expected, weights, number, half_written = torch.load(whole / "result.pt")
    assert number > 60, number
    assert [entry["step"] for entry in expected] == [3, 5]
    chance = random.Random(streaming)
    moments = [chance.randint(1, number), *chance.sample(half_written, 2)]
    for moment in moments:
        run = folder / f"killed-{streaming}-{moment}"
        assert train(run, streaming, moment), moment
        killed = 1 + train(run, streaming, number // 5)  # during the first save after that
        if killed == 2:
            assert not train(run, streaming, None)
        result, its_weights, *_ = torch.load(run / "result.pt")
        assert result == expected, (moment, result, expected)
        assert all(torch.equal(its_weights[name], weights[name]) for name in weights), moment
        print("killed", killed, "times, first at", moment, "of", number, flush=True)
print("all are equal", flush=True)
os._exit(0)
'''


@pytest.mark.extensive
def test_killed_runs_equal_uninterrupted_ones(tmp_path):
    result = run_alone(PROGRAM, tmp_path)
    assert "all are equal" in result.stdout, result.stdout[-3000:] + result.stderr[-4000:]
    assert "killed 2 times" in result.stdout
