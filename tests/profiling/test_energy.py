"""Joules are measured or absent; operations are those that PyTorch's counter counts, scoring included."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trainer_parts import network, resident
from trainers import make_trainer

from sparse_training.profiling import energy
from sparse_training.profiling.energy import Energy, ZeusMeter, find_meter
from sparse_training.trainer import SparseTrainer
from sparse_training.training.flops import Operations
from sparse_training.training.settings import TrainerSettings

CPU = torch.device("cpu")


class Counter:
    """A meter whose counter goes up by one joule a reading."""

    source = "a test's counter"
    open = False
    read = 0

    def start(self):
        assert not self.open
        self.open = True

    def stop(self):
        assert self.open
        self.open = False
        self.read += 1
        return 1.0


def test_a_run_without_a_meter_has_no_joules(monkeypatch):
    monkeypatch.setattr(energy, "RAPL_FOLDERS", ())
    assert find_meter(CPU) is None
    found = SparseTrainer(network()).fit(resident(), steps=2).to_dict()
    assert found["joules"] == {"measured": None, "by": "no meter"}
    json.dumps(found)


def test_evaluation_and_writing_are_not_metered(tmp_path):
    meter = Counter()

    def evaluate(model):
        assert not meter.open
        return {"accuracy": 0.0}

    trainer = SparseTrainer(network())
    options = {"evaluate": evaluate, "evaluations": 2, "checkpoint": tmp_path, "checkpoint_interval": 3}
    history = trainer.fit(resident(), steps=8, meter=meter, **options)
    # Two evaluations and the files after steps 3 and 6 part the run into five stretches.
    assert history.to_dict()["joules"] == {"measured": 5.0, "by": "a test's counter"}
    assert not meter.open


def test_joules_go_on_with_the_run_or_are_absent(tmp_path):
    def go(name, meter, stop_at=None):
        steps = iter(range(1, 100))
        return SparseTrainer(network()).fit(
            resident(), steps=6, meter=meter, checkpoint=tmp_path / name, resume=True,
            stop=lambda: next(steps) == stop_at,
        )  # fmt: skip

    for name in ("a", "b"):
        assert go(name, Counter(), stop_at=2).joules == 1.0
    assert go("a", Counter()).joules == 2.0
    resumed = go("b", None) if find_meter(CPU) is None else None
    assert resumed is None or (resumed.joules is None and resumed.meter == "no meter")


def test_a_rapl_tree_is_read_through_zeus(tmp_path, monkeypatch):
    """A package and its memory, as the kernel lays them out."""
    rapl = pytest.importorskip("zeus.device.cpu.rapl")
    import zeus.device.cpu as cpus
    from zeus.monitor import ZeusMonitor

    package, memory = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0" / "intel-rapl:0:0"
    memory.mkdir(parents=True)

    def write(folder, name, joules):
        (folder / "name").write_text(name + "\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
        (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")

    write(package, "package-0", 1000.0)
    write(memory, "dram", 50.0)
    monkeypatch.setattr(rapl, "RAPL_DIR", str(tmp_path))
    monkeypatch.setattr(cpus, "_cpus", None)
    monkeypatch.setattr(energy, "RAPL_FOLDERS", (str(tmp_path),))
    rapl.rapl_is_available.cache_clear()
    # The watch for a counter that starts again at 0 is a process of its own.
    monkeypatch.setattr(
        rapl, "RaplWraparoundTracker", lambda *args: type("", (), {"get_num_wraparounds": lambda s: 0})()
    )
    try:
        meter = find_meter(CPU)
        assert meter is not None
        assert meter.source == "RAPL, package 0"
        found = Energy(meter)
        found.start()
        write(package, "package-0", 1003.5)
        write(memory, "dram", 51.25)
        found.stop()
        write(package, "package-0", 1100.0)  # of an evaluation
        found.start()
        write(package, "package-0", 1100.5)
        found.stop()
        assert found.joules == pytest.approx(3.5 + 1.25 + 0.5)
        with pytest.raises(ValueError, match="got neither a GPU nor a processor"):
            ZeusMeter(ZeusMonitor(gpu_indices=[], cpu_indices=[]))
    finally:
        rapl.rapl_is_available.cache_clear()


@pytest.mark.parametrize(
    "policy", ["dense", "random", "gate", "gate@proxy:cnn-tiny", "gate@early:2", "importance", "masked"]
)
def test_operations_are_those_of_every_step_counted(policy):
    """Most steps are not counted, and the sum is that of a run all of whose steps are."""
    model = network()
    torch.manual_seed(0)
    trainer = make_trainer(model, policy=policy, rate=0.4, dense_start=0.2, dense_end=0.2)
    counted = 0
    step = trainer.step

    def count(*arguments):
        nonlocal counted
        before = {kind: dict(known) for kind, known in trainer.operations.known.items()}
        with FlopCounterMode(display=False) as counter:
            found = step(*arguments)
        inner = sum(len(known) - len(before.get(kind, ())) for kind, known in trainer.operations.known.items())
        counted += counter.get_total_flops()
        counts.append(inner)
        return found

    counts = []
    trainer.check(resident().load(torch.arange(16)))  # of the trying out, once before the first step
    trainer.step = count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = trainer.fit(resident(), steps=30)
    assert history.to_dict()["flops"]["counted"] == counted > 0
    assert sum(counts) <= 8  # two of each kind, of which dense phases and the policy have two
    assert ("score" in policy or history.operations.get("score", 0.0) > 0) == (policy.startswith(("gate", "masked")))


def test_a_compiled_models_operations_are_counted_too():
    torch.manual_seed(0)
    plain, compiled = nn.Linear(8, 3), nn.Linear(8, 3)
    data = [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(3)]
    found = [
        SparseTrainer(model, policy="random", rate=0.5, settings=TrainerSettings(compile=compiled_too))
        .fit(data, steps=12)
        .operations
        for model, compiled_too in ((plain, False), (compiled, True))
    ]
    assert found[0] == found[1]


def test_a_straight_line_through_two_counts():
    operations = Operations()
    layer = nn.Linear(4, 2)
    for rows in (3, 5, 9, 1, 5):
        with operations.of("train", rows), torch.no_grad():
            layer(torch.zeros(rows, 4))
    assert operations.known == {"train ": {3: 2 * 3 * 4 * 2, 5: 2 * 5 * 4 * 2}}
    assert operations.total == {"train": 2 * (3 + 5 + 9 + 1 + 5) * 4 * 2}
