"""A long run keeps to the memory that it took in its first updates."""

import gc
from pathlib import Path

from tests.ppo.helpers import ROWS, output_of, prompts

import pytest
from transformers import TrainerCallback

UPDATES = 300


class Resident(TrainerCallback):
    """The memory that this process holds after each tenth update, in MiB."""

    def __init__(self):
        self.held = []

    def on_step_end(self, args, state, control, **unused):
        if state.global_step % 10 == 0:
            gc.collect()
            status = Path("/proc/self/status").read_text()
            self.held.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process holds is read from /proc")
def test_three_hundred_updates_hold_no_more_than_ten(build):
    """With evaluation, checkpoints and samples. Of some 560 MiB 1 % is what all logs and a few KiB an update take."""
    resident = Resident()
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "total_episodes": UPDATES * ROWS}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-3, "optim": "adamw_torch"}
    trainer = build(**settings, kl_limit=None, eval_dataset=prompts(ROWS), callbacks=[resident])
    trainer.train()
    assert len((output_of(trainer) / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == UPDATES * 4
    assert len(list(output_of(trainer).glob("checkpoint-*"))) == 2
    assert resident.held[-1] < 1.01 * resident.held[0], resident.held
